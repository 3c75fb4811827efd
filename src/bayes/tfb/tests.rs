use candle_nn::Linear;

use super::*;
use crate::adapter::{linears, AdaptableLinear, Context, Role};
use crate::adapters::LoraConfig;
use crate::data::encode::Encoded;
use crate::data::task::Label;

/// One adapted layer with three inputs and a zero base weight; its inputs are a row's ids.
struct Toy(AdaptableLinear);

impl AdaptableModel for Toy {
    linears!(0);
}

impl Predictor for Toy {
    fn predict(&self, batch: &Batch, cx: &Context) -> candle_core::Result<Tensor> {
        self.0.forward(&batch.input_ids.to_dtype(DType::F64)?, cx)
    }
}

/// A toy with rank 2, s = 1.5 and this B, and its parameters.
fn toy(b: &[[f64; 2]]) -> Result<(Toy, Params)> {
    let params = Params::with_dtype(Noise::new(3), DType::F64, &Device::Cpu);
    let base = Linear::new(Tensor::zeros((b.len(), 3), DType::F64, &Device::Cpu)?, None);
    let mut layer = AdaptableLinear::new("proj", base);
    let config = LoraConfig { rank: 2, alpha: 3.0, ..LoraConfig::default() };
    layer.add("default", Box::new(Lora::new(&params, "proj", "default", (3, b.len()), &config)?))?;
    params.set("proj.default.b", &Tensor::from_vec(b.concat(), (b.len(), 2), &Device::Cpu)?)?;
    Ok((Toy(layer), params))
}

/// The updates `s B A` of many draws, row-major.
fn updates(model: &Toy, params: &Params, sigma: f64, draws: u64) -> Result<Vec<Vec<f64>>> {
    let tfb = Tfb::new(model, params.noise())?;
    let b = params.get("proj.default.b").map(|b| b.var.as_detached_tensor()).expect("B");
    let update = |draw| {
        let a = tfb.draw(sigma, draw)?.remove("proj.default.a").expect("A");
        Ok((b.matmul(&a)? * 1.5)?.flatten_all()?.to_vec1::<f64>()?)
    };
    (0..draws).map(|pair| update(2 * pair)).collect() // one of each pair
}

fn assert_mean(what: &str, want: f64, draws: impl Iterator<Item = f64>) {
    let draws: Vec<f64> = draws.map(|x| x - want).collect();
    let n = draws.len() as f64;
    let mean = draws.iter().sum::<f64>() / n;
    let square = draws.iter().map(|x| x * x).sum::<f64>() / n;
    let z = mean / ((square - mean * mean) / n).sqrt();
    assert!(z.abs() < 5.0, "{what}: {} against {want}, z {z}", want + mean);
}

#[test]
fn draws_come_in_pairs_around_the_mean() -> Result<()> {
    let (model, params) = toy(&[[3.0, -1.0], [0.2, 0.5]])?;
    let tfb = Tfb::new(&model, params.noise())?;
    let at = |sigma, draw| -> Result<Vec<f64>> {
        Ok(tfb.draw(sigma, draw)?["proj.default.a"].flatten_all()?.to_vec1()?)
    };
    let mean = at(0.0, 0)?;
    for pair in [0, 4] {
        let (one, opposite) = (at(0.4, 2 * pair)?, at(0.4, 2 * pair + 1)?);
        for ((x, y), mean) in one.iter().zip(&opposite).zip(&mean) {
            assert!((0.5 * (x + y) - mean).abs() < 1e-14 && (x - y).abs() > 1e-6, "{x} {y} {mean}");
        }
    }
    Ok(())
}

#[test]
fn the_update_is_perturbed_alike_in_every_direction_that_b_has() -> Result<()> {
    // The singular values of B are far apart: isotropic noise on A would be scaled by them.
    let b = [[3.0, -1.0], [0.2, 0.5], [-2.0, 0.1], [1.0, 0.3]];
    let (model, params) = toy(&b)?;
    let (sigma, mean) = (0.4, updates(&model, &params, 0.0, 1)?.remove(0));
    let draws = updates(&model, &params, sigma, 100_000)?;
    // U U^T = B (B^T B)^{-1} B^T
    let dot = |i: usize, j: usize| b.iter().map(|row| row[i] * row[j]).sum::<f64>();
    let (p, q, r) = (dot(0, 0), dot(0, 1), dot(1, 1));
    let det = p * r - q * q;
    let projection = |i: usize, j: usize| {
        let (x, y) = (b[i], b[j]);
        (x[0] * (r * y[0] - q * y[1]) + x[1] * (p * y[1] - q * y[0])) / det
    };
    let off = |draw: &[f64], i: usize, column: usize| draw[3 * i + column] - mean[3 * i + column];
    for i in 0..4 {
        assert_mean("mean", mean[3 * i], draws.iter().map(|draw| draw[3 * i]));
        for j in 0..4 {
            let want = (1.5 * sigma).powi(2) * projection(i, j);
            assert_mean("covariance", want, draws.iter().map(|d| off(d, i, 0) * off(d, j, 0)));
            assert_mean("of columns", 0.0, draws.iter().map(|d| off(d, i, 0) * off(d, j, 2)));
        }
    }
    Ok(())
}

#[test]
fn a_direction_that_b_has_not_gets_no_noise() -> Result<()> {
    // B has rank 1: U = (0.6, 0.8).
    let (model, params) = toy(&[[0.6, 1.2], [0.8, 1.6]])?;
    let (sigma, mean) = (0.4, updates(&model, &params, 0.0, 1)?.remove(0));
    for draw in updates(&model, &params, sigma, 100)? {
        let step: Vec<f64> = draw.iter().zip(&mean).map(|(x, mean)| x - mean).collect();
        for column in 0..3 {
            assert!((0.8 * step[column] - 0.6 * step[3 + column]).abs() < 1e-12, "{step:?}");
            assert!(step[column].abs() > 1e-6);
        }
    }
    // If B is zero, every draw is A.
    let (model, params) = toy(&[[0.0; 2]; 2])?;
    let a = params.snapshot()?["proj.default.a"].to_vec2::<f64>()?;
    assert_eq!(Tfb::new(&model, params.noise())?.draw(1.0, 5)?["proj.default.a"].to_vec2::<f64>()?, a);
    Ok(())
}

#[test]
fn a_merged_layer_has_no_draws() -> Result<()> {
    let (mut model, params) = toy(&[[1.0, 0.0], [0.0, 0.5]])?;
    crate::inject::merge::merge(&mut model)?;
    let error = Tfb::new(&model, params.noise()).unwrap_err().to_string();
    assert!(error.contains("proj is merged: unmerge it first"), "{error}");
    Ok(())
}

/// Rows for the model of `sure`, which classifies all but the last correctly.
fn rows() -> Result<(Vec<Batch>, Vec<u32>)> {
    let row =
        |ids: [u32; 3]| Encoded { ids: ids.to_vec(), type_ids: vec![0; 3], label: Label::Class(0), row: 0 };
    let rows = [[9, 1, 0], [8, 0, 2], [0, 1, 9], [1, 2, 8], [7, 1, 1]].map(row);
    let batch = |rows: &[Encoded]| Batch::collate(&rows.iter().collect::<Vec<_>>(), 0, &Device::Cpu);
    Ok((vec![batch(&rows[..3])?, batch(&rows[3..])?], vec![0, 0, 1, 1, 1]))
}

/// A confident toy: the first id is evidence for class 0, the last for class 1.
fn sure() -> Result<(Toy, Params)> {
    let (model, params) = toy(&[[1.0, 0.0], [0.0, 0.5]])?;
    let a = [[0.5, 0.0, -0.2], [-0.2, 0.0, 0.5]];
    params.set("proj.default.a", &Tensor::new(&a, &Device::Cpu)?)?;
    Ok((model, params))
}

#[test]
fn the_largest_tolerated_sigma_is_tolerated_and_no_larger_one() -> Result<()> {
    let ((model, params), (anchor, _)) = (sure()?, rows()?);
    let tfb = Tfb::new(&model, params.noise())?;
    let before = params.snapshot()?;
    let search = Search { steps: 30, ..Search::default() };
    let at = |sigma: f64| tfb.probabilities(&model, &params, &anchor, sigma, search.draws);
    let labels = predicted(&at(0.0)?);
    assert_eq!(labels, [0, 0, 1, 1, 0]);
    let tolerance = released_tolerance(labels.len());
    let sigma = tfb.tolerated(&model, &params, (&anchor, &labels), tolerance, &search)?;
    assert!(sigma > search.low && sigma < search.high, "{sigma}");
    let without = nll(&at(0.0)?, &labels)?;
    let change = |sigma: f64| Ok::<_, Error>((nll(&at(sigma)?, &labels)? - without).abs() / without);
    assert!(change(sigma)? <= tolerance && change(sigma * 1.001)? > tolerance, "{sigma}");
    // A tolerance that allows any sigma, and one that allows none.
    let found = |tolerance| tfb.tolerated(&model, &params, (&anchor, &labels), tolerance, &search);
    assert_eq!(found(1e9)?, search.high);
    assert!((found(1e-9)? / search.low - 1.0).abs() < 1e-6);
    for (name, values) in params.snapshot()? {
        assert_eq!(values.to_vec2::<f64>()?, before[&name].to_vec2::<f64>()?, "{name}");
    }
    Ok(())
}

#[test]
fn held_out_rows_choose_the_noise_that_a_sure_mistake_asks_for() -> Result<()> {
    let ((model, params), (held_out, labels)) = (sure()?, rows()?);
    let tfb = Tfb::new(&model, params.noise())?;
    let search = Search { steps: 7, draws: 20, ..Search::default() };
    let sigma = tfb.best(&model, &params, (&held_out, &labels), &search)?;
    let loss = |sigma: f64| nll(&tfb.probabilities(&model, &params, &held_out, sigma, 20)?, &labels);
    let ratio = 10f64.sqrt();
    assert!(sigma > 2.0 * search.low, "{sigma}");
    assert!(loss(sigma)? < loss(0.0)? && loss(sigma)? <= loss(sigma / ratio)?.min(loss(sigma * ratio)?));
    Ok(())
}

#[test]
fn what_has_no_answer_says_so() -> Result<()> {
    let ((model, params), (rows, labels)) = (sure()?, rows()?);
    let tfb = Tfb::new(&model, params.noise())?;
    let error = tfb.probabilities(&model, &params, &rows, 0.1, 0).unwrap_err().to_string();
    assert!(error.contains("at least 1"), "{error}");
    let search = Search { low: 0.5, high: 0.1, ..Search::default() };
    let error = tfb.best(&model, &params, (&rows, &labels), &search).unwrap_err().to_string();
    assert!(error.contains("invalid low"), "{error}");
    let bare = Toy(AdaptableLinear::new(
        "proj",
        Linear::new(Tensor::zeros((2, 3), DType::F64, &Device::Cpu)?, None),
    ));
    let error = Tfb::new(&bare, Noise::new(0)).unwrap_err().to_string();
    assert!(error.contains("no layer has an active LoRA adapter"), "{error}");
    // A draw whose shape does not fit the parameters is an error.
    params.remove("proj.default.a");
    params.insert("proj.default.a", Role::A, &Tensor::zeros((1, 3), DType::F64, &Device::Cpu)?)?;
    assert!(tfb.probabilities(&model, &params, &rows, 0.1, 2).is_err());
    Ok(())
}
