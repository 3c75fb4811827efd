//! Compares the Laplace approximation with a dense one, in double precision.

use candle_core::{DType, Device, Tensor};
use candle_nn::Linear;

use super::*;
use crate::adapter::{linears, AdaptableLinear, AdaptableModel, Context, Init, Params, Pass, Role};
use crate::adapters::{Lora, LoraConfig, LoraFa};
use crate::bayes::PRECISION_BOUNDS;
use crate::data::encode::Encoded;
use crate::data::task::Label;
use crate::inject::{Select, Targets};
use crate::metrics::softmax;
use crate::models::sequence::{SequenceClassifier, SequenceConfig};
use crate::monteclora::{MonteCLoRA, MonteCLoRAConfig};
use crate::noise::{Noise, Purpose};
use crate::ops;
use crate::predict::logits;

mod models;

pub(in crate::bayes) const CLASSES: usize = 3;

/// A model of an embedding, an adapted layer, tanh, the mean over tokens, and a head.
pub(in crate::bayes) struct Toy {
    table: Tensor,
    pub layer: AdaptableLinear,
    head: (Tensor, Tensor),
    pub params: Params,
}

fn normal(path: &str, shape: (usize, usize)) -> Result<Tensor> {
    let mut z = vec![0f64; shape.0 * shape.1];
    Noise::new(5).stream(path, Purpose::Init).fill_normal(0, &mut z);
    Ok(Tensor::from_vec(z, shape, &Device::Cpu)?)
}

impl Toy {
    /// A model whose A and B are in general position.
    pub fn new() -> Result<Self> {
        let params = Params::with_dtype(Noise::new(2), DType::F64, &Device::Cpu);
        let mut layer = AdaptableLinear::new("layer", Linear::new(normal("base", (4, 5))?, None));
        let config = LoraConfig { rank: 2, alpha: 3.4, ..Default::default() };
        layer.add("default", Box::new(Lora::new(&params, "layer", "default", (5, 4), &config)?))?;
        params.set("layer.default.b", &(normal("b", (4, 2))? * 0.3)?)?;
        let weight = params.create("head.weight", Role::Head, (CLASSES, 4), &Init::Normal(0.8))?;
        let bias = params.create("head.bias", Role::Head, CLASSES, &Init::Normal(0.5))?;
        Ok(Self { table: normal("table", (9, 5))?, layer, head: (weight, bias), params })
    }

    /// The Jacobian `J[k]` of one example with respect to a parameter, flat, by one backward pass per class.
    pub fn jacobian(&self, batch: &Batch, name: &str) -> Result<Vec<Vec<f64>>> {
        let var = self.params.get(name).unwrap().var;
        let outputs = self.predict(batch, &Pass::Mean.into())?;
        let class = |k| {
            let grads = outputs.narrow(1, k, 1)?.sum_all()?.backward()?;
            Ok(grads.get(&var).unwrap().flatten_all()?.to_vec1::<f64>()?)
        };
        (0..CLASSES).map(class).collect()
    }
}

impl Predictor for Toy {
    fn predict(&self, batch: &Batch, cx: &Context) -> candle_core::Result<Tensor> {
        let (b, t) = batch.input_ids.dims2()?;
        let xs = self.table.index_select(&batch.input_ids.flatten_all()?, 0)?.reshape((b, t, 5))?;
        let ys = self.layer.forward(&xs, cx)?.tanh()?;
        let mask = batch.attention_mask.to_dtype(DType::F64)?.unsqueeze(2)?;
        let pooled = ys.broadcast_mul(&mask)?.sum(1)?.broadcast_div(&mask.sum(1)?)?;
        ops::linear(&pooled, &self.head.0, Some(&self.head.1), cx.path)
    }
}

impl AdaptableModel for Toy {
    fn default_targets(&self) -> &'static [&'static str] {
        &["layer"]
    }

    linears!(layer);
}

fn encoded(rows: &[(&[u32], u32)]) -> Vec<Encoded> {
    let row = |(i, (ids, label)): (usize, &(&[u32], u32))| Encoded {
        ids: ids.to_vec(),
        type_ids: vec![0; ids.len()],
        label: Label::Class(*label),
        row: i,
    };
    rows.iter().enumerate().map(row).collect()
}

pub(in crate::bayes) fn batch(rows: &[(&[u32], u32)]) -> Result<Batch> {
    let rows = encoded(rows);
    Batch::collate(&rows.iter().collect::<Vec<_>>(), 8, &Device::Cpu)
}

pub(in crate::bayes) fn near(got: f64, expected: f64) {
    assert!((got - expected).abs() < 1e-9 * (1.0 + expected.abs()), "got {got}, expected {expected}");
}

pub(in crate::bayes) type Matrix = Vec<Vec<f64>>;

/// `sum_n J_n^T (diag(p) - p p^T) J_n` for some parameters, computed one example at a time.
pub(in crate::bayes) fn dense(toy: &Toy, rows: &[(&[u32], u32)], names: &[&str]) -> Result<Matrix> {
    let mut sum = Matrix::new();
    for row in rows {
        let one = batch(std::slice::from_ref(row))?;
        let p = softmax(&logits(toy, std::slice::from_ref(&one), &Pass::Mean.into())?[0]);
        let js = stacked(toy, &one, names)?;
        sum.resize(js[0].len(), vec![0.0; js[0].len()]);
        for (k, l) in pairs() {
            let h = f64::from(u8::from(k == l)) * p[k] - p[k] * p[l];
            for (sums, left) in sum.iter_mut().zip(&js[k]) {
                sums.iter_mut().zip(&js[l]).for_each(|(sum, right)| *sum += h * left * right);
            }
        }
    }
    Ok(sum)
}

fn pairs() -> impl Iterator<Item = (usize, usize)> {
    (0..CLASSES * CLASSES).map(|at| (at / CLASSES, at % CLASSES))
}

/// The Jacobians with respect to several parameters, concatenated.
fn stacked(toy: &Toy, one: &Batch, names: &[&str]) -> Result<Matrix> {
    let parts = names.iter().map(|name| toy.jacobian(one, name)).collect::<Result<Vec<_>>>()?;
    Ok((0..CLASSES).map(|k| parts.iter().flat_map(|part| part[k].iter().copied()).collect()).collect())
}

/// The inverse and log-determinant of the positive definite `matrix + delta 1`, by Gauss-Jordan elimination
/// without pivoting.
fn invert(matrix: &Matrix, delta: f64) -> (Matrix, f64) {
    let n = matrix.len();
    let unit = |i: usize, j: usize| f64::from(u8::from(i == j));
    let wide = |i: usize| {
        let left = (0..n).map(|j| matrix[i][j] + delta * unit(i, j));
        left.chain((0..n).map(|j| unit(i, j))).collect::<Vec<f64>>()
    };
    let mut rows: Matrix = (0..n).map(wide).collect();
    let mut log_det = 0.0;
    for i in 0..n {
        let pivot = rows[i][i];
        log_det += pivot.ln();
        rows[i].iter_mut().for_each(|x| *x /= pivot);
        let own = rows[i].clone();
        for (_, row) in rows.iter_mut().enumerate().filter(|(j, _)| *j != i) {
            let factor = row[i];
            row.iter_mut().zip(&own).for_each(|(x, y)| *x -= factor * y);
        }
    }
    (rows.into_iter().map(|row| row[n..].to_vec()).collect(), log_det)
}

fn squared_norm(toy: &Toy, names: &[&str]) -> Result<f64> {
    let mut sum = 0.0;
    for name in names {
        sum += toy.params.get(name).unwrap().var.sqr()?.sum_all()?.to_scalar::<f64>()?;
    }
    Ok(sum)
}

/// Compares the evidence and the predictive covariance with those of dense blocks of the given parameters.
fn compare(toy: &Toy, laplace: &Laplace, rows: &[(&[u32], u32)], blocks: &[&[&str]]) -> Result<()> {
    let delta = 0.37;
    let curvature = blocks.iter().map(|names| dense(toy, rows, names)).collect::<Result<Vec<_>>>()?;
    let mut evidence = 0.0;
    for (ids, label) in rows {
        let z = &logits(toy, &[batch(&[(ids, *label)])?], &Pass::Mean.into())?[0];
        evidence += softmax(z)[*label as usize].ln();
    }
    for (names, matrix) in blocks.iter().zip(&curvature) {
        let size = matrix.len() as f64;
        evidence -= 0.5 * delta * squared_norm(toy, names)?;
        evidence += 0.5 * size * delta.ln() - 0.5 * invert(matrix, delta).1;
    }
    near(laplace.log_marginal_likelihood(delta)?, evidence);
    // Rows other than those of the curvature, two at a time.
    let new: [(&[u32], u32); 3] = [(&[5, 1, 2], 0), (&[7], 1), (&[0, 3], 2)];
    let batches = [batch(&new[..2])?, batch(&new[2..])?];
    let got = laplace.predict_at(toy, &batches, &[5.0, delta])?.remove(1);
    for (n, row) in new.iter().enumerate() {
        let one = batch(std::slice::from_ref(row))?;
        let mut expected = [0.0; CLASSES * CLASSES];
        for (names, matrix) in blocks.iter().zip(&curvature) {
            let (sigma, _) = invert(matrix, delta);
            let js = stacked(toy, &one, names)?;
            for (k, l) in pairs() {
                let through = |row: &Vec<f64>| row.iter().zip(&js[l]).map(|(s, j)| s * j).sum::<f64>();
                expected[k * CLASSES + l] +=
                    js[k].iter().zip(&sigma).map(|(j, row)| j * through(row)).sum::<f64>();
            }
        }
        got.covariances[n].iter().zip(expected).for_each(|(got, expected)| near(*got, expected));
        let z = &logits(toy, &[one], &Pass::Mean.into())?[0];
        z.iter().zip(&got.logits[n]).for_each(|(z, got)| near(*got, *z));
    }
    Ok(())
}

const A: &str = "layer.default.a";
const B: &str = "layer.default.b";

#[test]
fn taps_give_the_jacobian_of_every_example_with_padding() -> Result<()> {
    let mut toy = Toy::new()?;
    let rows: [(&[u32], u32); 3] = [(&[1, 2, 3], 0), (&[4], 1), (&[5, 6], 2)];
    let batch_of_all = batch(&rows)?;
    let before = logits(&toy, std::slice::from_ref(&batch_of_all), &Pass::Mean.into())?;
    let taps = Taps::install(&mut toy)?;
    let record = taps.record(&toy, &batch_of_all, Maps::Both, Wanted::Jacobians)?.unwrap();
    assert_eq!(record.layers[0].tokens, 6.0);
    for (layer, name) in record.layers.iter().zip([A, B]) {
        for k in 0..CLASSES {
            let got = layer.jacobian(k)?.flatten_from(1)?.to_vec2::<f64>()?;
            for (n, row) in rows.iter().enumerate() {
                let expected = &toy.jacobian(&batch(std::slice::from_ref(row))?, name)?[k];
                assert!(expected.iter().any(|j| j.abs() > 1e-3));
                got[n].iter().zip(expected.iter()).for_each(|(got, expected)| near(*got, *expected));
            }
        }
    }
    // A tapped adapter still is and predicts as the LoRA adapter, and so it does after the taps are removed.
    for outputs in [&record.logits, &logits(&toy, std::slice::from_ref(&batch_of_all), &Pass::Mean.into())?] {
        outputs.iter().flatten().zip(before.iter().flatten()).for_each(|(got, z)| near(*got, *z));
    }
    assert!(toy.layer.active().unwrap().1.as_any().is::<Lora>());
    taps.remove(&mut toy)?;
    assert_eq!(logits(&toy, &[batch_of_all], &Pass::Mean.into())?, before);
    assert!(format!("{:?}", toy.layer.active().unwrap().1).starts_with("Lora"));
    Ok(())
}

#[test]
fn over_one_example_of_one_token_adapters_are_exact() -> Result<()> {
    let mut toy = Toy::new()?;
    let rows: [(&[u32], u32); 1] = [(&[4], 1)];
    let scope = Scope::Adapters(Taps::install(&mut toy)?);
    let laplace = Laplace::fit(&toy, scope, &[batch(&rows)?], None)?;
    compare(&toy, &laplace, &rows, &[&[A], &[B]])
}

#[test]
fn over_examples_of_one_input_both_scopes_are_exact() -> Result<()> {
    let mut toy = Toy::new()?;
    let rows: [(&[u32], u32); 4] = [(&[4], 1), (&[4], 0), (&[4], 2), (&[4], 1)];
    let batches = [batch(&rows[..3])?, batch(&rows[3..])?];
    let scope = Scope::LastLayer(LastLayer::new(&toy.params, "head")?);
    let last = Laplace::fit(&toy, scope, &batches, None)?;
    compare(&toy, &last, &rows, &[&["head.weight", "head.bias"]])?;
    let taps = Taps::install(&mut toy)?;
    let adapters = Laplace::fit(&toy, Scope::Adapters(taps), &batches, None)?;
    compare(&toy, &adapters, &rows, &[&[A], &[B]])
}

#[test]
fn factors_are_the_mean_of_inputs_and_the_sum_of_gradients() -> Result<()> {
    let toy = Toy::new()?;
    let rows: [(&[u32], u32); 5] = [(&[1, 2], 0), (&[4], 1), (&[5, 6, 0], 2), (&[7, 3], 1), (&[2], 0)];
    let scope = Scope::LastLayer(LastLayer::new(&toy.params, "head")?);
    let laplace = Laplace::fit(&toy, scope, &[batch(&rows[..4])?, batch(&rows[4..])?], None)?;
    let (mut inputs, mut outputs) = ([[0.0; 5]; 5], [[0.0; CLASSES]; CLASSES]);
    for row in &rows {
        let one = batch(std::slice::from_ref(row))?;
        // The bias has the input 1.
        let mut phi = toy.jacobian(&one, "head.weight")?[0][..4].to_vec();
        phi.push(1.0);
        let p = softmax(&logits(&toy, &[one], &Pass::Mean.into())?[0]);
        for (i, j) in (0..25).map(|at| (at / 5, at % 5)) {
            inputs[i][j] += phi[i] * phi[j] / rows.len() as f64;
        }
        for (k, l) in pairs() {
            outputs[k][l] += f64::from(u8::from(k == l)) * p[k] - p[k] * p[l];
        }
    }
    let block = &laplace.blocks[0];
    for (eigen, expected) in [(&block.inputs, inputs.concat()), (&block.outputs, outputs.concat())] {
        let values = Tensor::from_slice(&eigen.values, (eigen.values.len(), 1), &Device::Cpu)?;
        let got = eigen.vectors.t()?.contiguous()?.matmul(&eigen.vectors.broadcast_mul(&values)?)?;
        let got = got.flatten_all()?.to_vec1::<f64>()?;
        assert_eq!(got.len(), expected.len());
        got.iter().zip(expected).for_each(|(got, expected)| near(*got, expected));
    }
    Ok(())
}

#[test]
fn the_evidence_is_flat_at_its_optimum_and_lower_beside_it() -> Result<()> {
    let mut toy = Toy::new()?;
    let rows: Vec<(&[u32], u32)> = vec![(&[1, 2], 0), (&[4], 1), (&[5, 6, 0], 2), (&[7, 3], 1)];
    let scope = Scope::Adapters(Taps::install(&mut toy)?);
    let mut laplace = Laplace::fit(&toy, scope, &[batch(&rows)?], None)?;
    let best = laplace.maximise_evidence();
    assert_eq!(best, laplace.prior_precision());
    let at = |delta: f64| laplace.log_marginal_likelihood(delta);
    assert!(best > 2.0 * PRECISION_BOUNDS.0 && best < 0.5 * PRECISION_BOUNDS.1, "{best}");
    assert!(((at(best * 1.0001)? - at(best / 1.0001)?) / 2e-4).abs() < 1e-6);
    assert!(at(best)? > at(best * 1.2)? && at(best)? > at(best / 1.2)?);
    Ok(())
}

#[test]
fn a_precision_is_chosen_from_a_grid_by_held_out_rows() -> Result<()> {
    let toy = Toy::new()?;
    let rows: [(&[u32], u32); 3] = [(&[1, 2], 0), (&[4], 1), (&[5], 2)];
    let batches = [batch(&rows)?];
    let scope = Scope::LastLayer(LastLayer::new(&toy.params, "head")?);
    let mut laplace = Laplace::fit(&toy, scope, &batches, None)?;
    let outputs = logits(&toy, &batches, &Pass::Mean.into())?;
    let held_out = |right: bool| {
        let extreme = |z: &Vec<f64>| {
            let order = |a: &usize, b: &usize| z[*a].total_cmp(&z[*b]);
            let class = if right { (0..CLASSES).max_by(order) } else { (0..CLASSES).min_by(order) };
            class.unwrap() as u32
        };
        let labelled = rows.iter().zip(&outputs).map(|((ids, _), z)| (*ids, extreme(z)));
        Ok::<_, Error>([batch(&labelled.collect::<Vec<_>>())?])
    };
    let grid = [1e-3, 1.0, 1e6];
    // If every prediction is right, the highest precision (confidence) wins; if all are wrong, the lowest.
    assert_eq!(laplace.select_precision(&toy, &held_out(true)?, &grid)?, 1e6);
    assert_eq!(laplace.select_precision(&toy, &held_out(false)?, &grid)?, 1e-3);
    assert_eq!(laplace.prior_precision(), 1e-3);
    assert!(laplace.select_precision(&toy, &batches, &[]).is_err());
    assert!(laplace.select_precision(&toy, &batches, &[0.0]).is_err());
    Ok(())
}

#[test]
fn padding_and_the_cut_into_batches_change_nothing() -> Result<()> {
    let mut toy = Toy::new()?;
    let taps = Taps::install(&mut toy)?;
    let rows: [(&[u32], u32); 4] = [(&[1, 2, 3], 0), (&[4], 1), (&[5, 6], 2), (&[7], 0)];
    let alone = rows.iter().map(|row| batch(std::slice::from_ref(row))).collect::<Result<Vec<_>>>()?;
    let fit = |batches: &[Batch]| Laplace::fit(&toy, Scope::Adapters(taps.clone()), batches, None);
    let (padded, alone) = (fit(&[batch(&rows)?])?, fit(&alone)?);
    near(padded.log_marginal_likelihood(0.3)?, alone.log_marginal_likelihood(0.3)?);
    let new = [batch(&[(&[2, 6], 0), (&[3], 1)])?];
    let (a, b) = (padded.predict(&toy, &new)?, alone.predict(&toy, &new)?);
    a.covariances.iter().flatten().zip(b.covariances.iter().flatten()).for_each(|(a, b)| near(*a, *b));
    Ok(())
}

#[test]
fn around_the_mean_of_a_posterior_it_is_that_of_the_pair_and_the_posterior_stays() -> Result<()> {
    let mut toy = Toy::new()?;
    let rows: [(&[u32], u32); 3] = [(&[1, 2, 3], 0), (&[4], 1), (&[5, 6], 2)];
    let (seen, new) = ([batch(&rows)?], [batch(&[(&[2, 6], 0)])?]);
    let approximation = |toy: &mut Toy| -> Result<(f64, Vec<Vec<f64>>)> {
        let taps = Taps::install(toy)?;
        let laplace = Laplace::fit(toy, Scope::Adapters(taps.clone()), &seen, None)?;
        let found = (laplace.log_marginal_likelihood(0.3)?, laplace.predict(toy, &new)?.covariances);
        taps.remove(toy)?;
        Ok(found)
    };
    let of_pair = approximation(&mut toy)?;

    let [a, b] = ["a", "b"].map(|role| toy.params.get(&format!("layer.default.{role}")).unwrap().var);
    let config = MonteCLoRAConfig { rank: 2, alpha: 3.4, sample_scaler: 0.2, ..Default::default() };
    let posterior = MonteCLoRA::new(&toy.params, "layer", "drawn", (5, 4), &config)?;
    toy.params.set("layer.drawn.a", &a)?;
    toy.params.set("layer.drawn.b", &b)?;
    toy.layer.remove("default")?;
    toy.layer.add("drawn", Box::new(posterior))?;
    let draws = |toy: &Toy| logits(toy, &new, &Pass::Posterior { draw: 1 }.into());
    let before = draws(&toy)?;
    assert!(before != logits(&toy, &new, &Pass::Mean.into())?);
    let (evidence, covariances) = approximation(&mut toy)?;
    near(evidence, of_pair.0);
    covariances.iter().flatten().zip(of_pair.1.iter().flatten()).for_each(|(a, b)| near(*a, *b));
    assert_eq!(draws(&toy)?, before);
    // Removing taps twice, or after their adapter was replaced, is an error and leaves the layer unchanged.
    let taps = Taps::install(&mut toy)?;
    taps.clone().remove(&mut toy)?;
    assert!(taps.remove(&mut toy).is_err() && draws(&toy)? == before);
    let taps = Taps::install(&mut toy)?;
    toy.layer.remove("drawn")?;
    let other =
        Lora::new(&toy.params, "layer", "other", (5, 4), &LoraConfig { rank: 2, ..Default::default() })?;
    toy.layer.add("drawn", Box::new(other))?;
    assert!(taps.remove(&mut toy).unwrap_err().to_string().contains("no tap on \"drawn\" any more"));
    assert!(toy.layer.active().is_some_and(|(_, adapter)| adapter.as_any().is::<Lora>()));
    Ok(())
}

#[test]
fn an_adapter_without_the_whole_pair_is_refused_and_stays() -> Result<()> {
    let mut toy = Toy::new()?;
    toy.layer.remove("default")?;
    let config = LoraConfig { rank: 2, ..Default::default() };
    toy.layer.add("fixed", Box::new(LoraFa::new(&toy.params, "layer", "fixed", (5, 4), &config)?))?;
    let error = Taps::install(&mut toy).unwrap_err().to_string();
    assert!(error.contains("\"fixed\" of layer is no LoRA or MonteCLoRA adapter"), "{error}");
    let (_, adapter) = toy.layer.active().unwrap();
    assert!(adapter.parameters().iter().all(|(role, _)| *role != Role::A));
    Ok(())
}

#[test]
fn some_rows_stand_for_all() -> Result<()> {
    let toy = Toy::new()?;
    let scope = || Ok::<_, Error>(Scope::LastLayer(LastLayer::new(&toy.params, "head")?));
    let one: [(&[u32], u32); 2] = [(&[1, 2], 0), (&[4], 1)];
    let batches = [batch(&one)?, batch(&one)?, batch(&one)?];
    let all = Laplace::fit(&toy, scope()?, &batches, None)?;
    let some = Laplace::fit(&toy, scope()?, &batches[..1], Some(6))?;
    near(some.log_marginal_likelihood(0.2)?, all.log_marginal_likelihood(0.2)?);
    let (a, b) = (all.predict(&toy, &batches[..1])?, some.predict(&toy, &batches[..1])?);
    a.covariances.iter().flatten().zip(b.covariances.iter().flatten()).for_each(|(a, b)| near(*a, *b));
    Ok(())
}

#[test]
fn what_has_no_approximation_is_named() -> Result<()> {
    let mut toy = Toy::new()?;
    let rows = [batch(&[(&[1], 0)])?];
    let last = || LastLayer::new(&toy.params, "head").map(Scope::LastLayer);
    let refused = |result: Result<Laplace>, what: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    };
    refused(Laplace::fit(&toy, last()?, &[], None), "got 0");
    refused(Laplace::fit(&toy, last()?, &rows, Some(0)), "some of the 0 training rows, got 1");
    refused(Laplace::fit(&toy, last()?, &[batch(&[(&[1], 3)])?], None), "class 3");
    let mut laplace = Laplace::fit(&toy, last()?, &rows, None)?;
    for precision in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert!(laplace.set_prior_precision(precision).is_err());
        assert!(laplace.log_marginal_likelihood(precision).is_err());
    }
    assert!(LastLayer::new(&toy.params, "tail").is_err());
    assert!(LastLayer::of_head(&toy.params).unwrap_err().to_string().contains("score"));
    // The weight of another layer: its shape fits, but W phi is not f.
    toy.params.create("other.weight", Role::Head, (CLASSES, 4), &Init::Constant(1.0))?;
    let other = Scope::LastLayer(LastLayer::new(&toy.params, "other")?);
    refused(Laplace::fit(&toy, other, &rows, None), "other.weight");
    toy.layer.activate(None)?;
    assert!(Taps::install(&mut toy).unwrap_err().to_string().contains("no layer has an active LoRA"));
    Ok(())
}
