//! MonteCLoRA's Gaussian over A against draws, dense Jacobians and its evidence bound, in double precision.

use candle_core::{Device, Tensor};

use super::*;
use crate::adapter::Pass;
use crate::bayes::laplace::tests::{batch, dense, near, Toy, CLASSES};
use crate::dist::Estimator;
use crate::error::Result;
use crate::monteclora::{Mixture, MonteCLoRA, MonteCLoRAConfig};
use crate::predict::logits;

const A: &str = "layer.drawn.a";
/// The input and output width of the adapted layer, and its rank.
const DIMS: (usize, usize) = (5, 4);
const RANK: usize = 2;

/// The toy with MonteCLoRA in place of LoRA, with its A and B, and unequal scales.
fn drawn(config: MonteCLoRAConfig) -> Result<Toy> {
    let mut toy = Toy::new()?;
    let [a, b] = ["a", "b"].map(|role| toy.params.get(&format!("layer.default.{role}")).unwrap().var);
    let config = MonteCLoRAConfig { rank: RANK, alpha: 3.4, ..config };
    let adapter = MonteCLoRA::new(&toy.params, "layer", "drawn", DIMS, &config)?;
    toy.params.set(A, &a)?;
    toy.params.set("layer.drawn.b", &b)?;
    toy.params.set("layer.drawn.std_prior", &Tensor::new(&[-0.7, 0.2], &Device::Cpu)?)?;
    toy.layer.remove("default")?;
    toy.layer.add("drawn", Box::new(adapter))?;
    Ok(toy)
}

fn adapter(toy: &Toy) -> &MonteCLoRA {
    toy.layer.active_as().unwrap()
}

#[test]
fn a_row_s_variance_is_that_of_draws() -> Result<()> {
    const DRAWS: u64 = 20_000;
    for mixture in [Mixture::Collapsed, Mixture::Explicit, Mixture::Sparse] {
        let config = MonteCLoRAConfig { mixture, sample_scaler: 0.3, df: Some(4.0), ..Default::default() };
        let toy = drawn(config)?;
        let posterior = adapter(&toy).posterior();
        let want = posterior.row_variances()?;
        for (i, want) in want.iter().enumerate() {
            let (mut sum, mut squares) = (0.0, 0.0);
            for draw in 0..DRAWS {
                let noise = posterior.spec().generate(posterior.streams(), draw)?;
                let row = posterior.draw(&noise)?.delta.get(i)?.to_vec1::<f64>()?;
                let square = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
                (sum, squares) = (sum + square, squares + square * square);
            }
            let mean = sum / DRAWS as f64;
            let error = ((squares / DRAWS as f64 - mean * mean) / DRAWS as f64).sqrt();
            let z = (mean - want) / error;
            assert!(z.abs() < 4.0, "{mixture:?}, row {i}: {mean}, expected {want}: {z}");
        }
    }
    Ok(())
}

#[test]
fn logits_have_the_covariance_of_the_dense_jacobian_and_of_small_draws() -> Result<()> {
    let mut toy = drawn(MonteCLoRAConfig { sample_scaler: 1e-4, ..Default::default() })?;
    let rows: [(&[u32], u32); 3] = [(&[1, 2, 3], 0), (&[4], 1), (&[5, 6], 2)];
    let all = batch(&rows)?;
    let v = adapter(&toy).posterior().row_variances()?;
    let plain = logits(&toy, std::slice::from_ref(&all), &Pass::Mean.into())?;
    let taps = Taps::install(&mut toy)?;
    let posterior = LinearisedPosterior::trained(&toy, taps.clone())?;
    assert_eq!(posterior.variances(), std::slice::from_ref(&v));
    let got = posterior.predict(&toy, &[batch(&rows[..1])?, batch(&rows[1..])?])?;
    taps.remove(&mut toy)?;
    got.logits.iter().flatten().zip(plain.iter().flatten()).for_each(|(got, z)| near(*got, *z));
    for (n, row) in rows.iter().enumerate() {
        let js = toy.jacobian(&batch(std::slice::from_ref(row))?, A)?;
        for (k, l) in (0..CLASSES * CLASSES).map(|at| (at / CLASSES, at % CLASSES)) {
            let terms = js[k].iter().zip(&js[l]).enumerate();
            let want: f64 = terms.map(|(at, (left, right))| v[at / DIMS.0] * left * right).sum();
            near(got.covariances[n][k * CLASSES + l] * 1e8, want * 1e8);
        }
    }
    // Draws that are small enough for the model to be linear.
    const DRAWS: u64 = 4000;
    let mut products = vec![vec![Vec::new(); CLASSES * CLASSES]; rows.len()];
    for draw in 0..DRAWS {
        let moved = logits(&toy, std::slice::from_ref(&all), &Pass::Posterior { draw }.into())?;
        for (n, z) in moved.iter().enumerate() {
            let d: Vec<f64> = z.iter().zip(&plain[n]).map(|(z, mean)| z - mean).collect();
            for (at, product) in products[n].iter_mut().enumerate() {
                product.push(d[at / CLASSES] * d[at % CLASSES]);
            }
        }
    }
    for (n, row) in products.iter().enumerate() {
        for (product, want) in row.iter().zip(&got.covariances[n]) {
            // Draws come in pairs with opposite noise, whose products are nearly equal.
            let pairs: Vec<f64> = product.chunks(2).map(|pair| 0.5 * (pair[0] + pair[1])).collect();
            let count = pairs.len() as f64;
            let mean = pairs.iter().sum::<f64>() / count;
            let error = (pairs.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / count / count).sqrt();
            assert!(((mean - want) / error).abs() < 4.5, "row {n}: {mean}, expected {want} +- {error}");
        }
    }
    Ok(())
}

#[test]
fn refitted_scales_have_the_greatest_evidence() -> Result<()> {
    let mut toy = drawn(MonteCLoRAConfig::default())?;
    // With one token and the same input in every row, the Kronecker product is exact.
    let rows: [(&[u32], u32); 4] = [(&[4], 1), (&[4], 0), (&[4], 2), (&[4], 1)];
    let curvature = dense(&toy, &rows, &[A])?;
    let taps = Taps::install(&mut toy)?;
    let refitted =
        LinearisedPosterior::refitted(&toy, taps.clone(), &[batch(&rows[..3])?, batch(&rows[3..])?], None)?;
    taps.remove(&mut toy)?;
    let v = refitted.variances()[0].clone();
    let width = DIMS.0 as f64;
    let trace = |i: usize| (0..DIMS.0).map(|j| curvature[i * DIMS.0 + j][i * DIMS.0 + j]).sum::<f64>();
    let norm = toy.params.get(A).unwrap().var.sqr()?.sum_all()?.to_scalar::<f64>()?;
    let deltas: Vec<f64> = (0..RANK).map(|i| 1.0 / v[i] - trace(i) / width).collect();
    near(deltas[0], deltas[1]);
    let bound = |v: &[f64], delta: f64| {
        let of_row = |i: usize| width * (v[i].ln() + delta.ln() - delta * v[i]) - trace(i) * v[i];
        0.5 * ((0..RANK).map(of_row).sum::<f64>() - delta * norm)
    };
    // Flat in the logarithm of every scale and of delta, and lower beside.
    let at = |i: usize, factor: f64| {
        let (mut v, mut delta) = (v.clone(), deltas[0]);
        match v.get_mut(i) {
            Some(v) => *v *= factor,
            None => delta *= factor,
        }
        bound(&v, delta)
    };
    for i in 0..=RANK {
        assert!(((at(i, 1.0001) - at(i, 1.0 / 1.0001)) / 2e-4).abs() < 1e-6, "{i}");
        assert!(at(i, 1.0) > at(i, 1.2) && at(i, 1.0) > at(i, 1.0 / 1.2), "{i}");
    }
    Ok(())
}

#[test]
fn some_rows_stand_for_all_and_lora_can_be_refitted() -> Result<()> {
    let mut toy = Toy::new()?;
    let one: [(&[u32], u32); 2] = [(&[1, 2], 0), (&[4], 1)];
    let batches = [batch(&one)?, batch(&one)?, batch(&one)?];
    let taps = Taps::install(&mut toy)?;
    let fit = |batches, of_rows| LinearisedPosterior::refitted(&toy, taps.clone(), batches, of_rows);
    let (all, some) = (fit(&batches, None)?, fit(&batches[..1], Some(6))?);
    all.variances()[0].iter().zip(&some.variances()[0]).for_each(|(a, b)| near(*a, *b));
    let error = fit(&[], None).unwrap_err().to_string();
    assert!(error.contains("got 0"), "{error}");
    let error = LinearisedPosterior::trained(&toy, taps).unwrap_err().to_string();
    assert!(error.contains("no layer has an active MonteCLoRA adapter"), "{error}");
    Ok(())
}

#[test]
fn peft_s_clipped_variances_are_refused() -> Result<()> {
    let toy = drawn(MonteCLoRAConfig { rank: RANK, ..MonteCLoRAConfig::peft() })?;
    let error = adapter(&toy).posterior().row_variances().unwrap_err().to_string();
    assert!(error.contains("compat"), "{error}");
    Ok(())
}

#[test]
fn weights_that_are_no_dirichlet_s_are_refused() -> Result<()> {
    for estimator in [Estimator::Exponential, Estimator::LogisticNormal] {
        let toy = drawn(MonteCLoRAConfig { estimator, ..Default::default() })?;
        let error = adapter(&toy).posterior().row_variances().unwrap_err().to_string();
        assert!(error.contains("estimator"), "{error}");
    }
    Ok(())
}
