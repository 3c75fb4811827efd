//! The laws of the method: moments, divergences, gradients and contracts, in double precision.
//!
//! A sampled quantity is judged by its z-score, from the sample's own standard error: it must be below 5,
//! mostly over at least 1e5 draws. Seeds are fixed, so the tests are deterministic.

mod adapters;
mod distributions;
mod gradients;
mod input;
mod methods;
mod mixture;
mod opponents;
mod oracle;
mod peft;
mod prior;
mod regularizer;
mod several_layers;

use candle_core::{DType, Device, Tensor};
use candle_nn::Linear;
use monteclora::adapter::{AdaptableLinear, AdaptableModel, BaseLinear, Params};
use monteclora::linears;
use monteclora::noise::{Noise, Purpose};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// A store of double-precision parameters.
fn store(seed: u64) -> Params {
    Params::with_dtype(Noise::new(seed), DType::F64, &Device::Cpu)
}

/// Standard normal numbers that depend only on the name.
fn normals(name: &str, shape: &[usize]) -> Result<Tensor> {
    let mut z = vec![0.0; shape.iter().product()];
    Noise::new(77).stream(name, Purpose::Init).fill_normal(0, &mut z);
    Ok(Tensor::from_vec(z, shape, &Device::Cpu)?)
}

/// A frozen linear layer in general position: not square, bias not zero.
fn base(in_dim: usize, out_dim: usize) -> Result<BaseLinear> {
    Ok(Linear::new(normals("base.weight", &[out_dim, in_dim])?, Some(normals("base.bias", &[out_dim])?))
        .into())
}

/// Moves every parameter of the store away from its start, in particular B away from zero.
fn shake(params: &Params) -> Result<()> {
    for (name, param) in params.all() {
        let step = (normals(&name, param.var.dims())? * 0.4)?;
        params.set(&name, &(param.var.as_tensor() + step)?)?;
    }
    Ok(())
}

/// A model of independent linear layers.
struct Model(Vec<AdaptableLinear>);

impl AdaptableModel for Model {
    linears!(0);
}

/// Asserts that the mean of `draws` is `want`, by its z-score; returns the score.
fn assert_mean(what: &str, want: f64, draws: impl IntoIterator<Item = f64>) -> f64 {
    let (mut n, mut sum, mut squares) = (0.0, 0.0, 0.0);
    for x in draws {
        let x = x - want;
        n += 1.0;
        sum += x;
        squares += x * x;
    }
    let mean: f64 = sum / n;
    let z = mean / ((squares / n - mean * mean) / n).sqrt();
    println!("{what}: {:.6} against {want:.6}, z {z:+.2}, {n} draws", want + mean);
    assert!(z.abs() < 5.0, "{what}: mean {} against {want}, z {z}", want + mean);
    z
}

/// Asserts that two tensors are equal to `tolerance`, relative to the largest element.
fn assert_close(what: &str, got: &Tensor, want: &Tensor, tolerance: f64) -> Result<()> {
    assert_eq!(got.dims(), want.dims(), "{what}");
    let flat = |t: &Tensor| -> Result<Vec<f64>> { Ok(t.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?) };
    let (got, want) = (flat(got)?, flat(want)?);
    let size = want.iter().fold(1e-12f64, |m, x| m.max(x.abs()));
    for (i, (g, w)) in got.iter().zip(&want).enumerate() {
        assert!((g - w).abs() <= tolerance * size, "{what}[{i}]: {g} against {w}");
    }
    Ok(())
}

/// Asserts that every parameter's gradient equals central differences of the loss.
fn assert_gradients(what: &str, params: &Params, loss: &dyn Fn() -> Result<Tensor>) -> Result<()> {
    let grads = loss()?.backward()?;
    let value = || -> Result<f64> { Ok(loss()?.to_scalar()?) };
    let h = 1e-5;
    for (name, param) in params.all() {
        let start = param.var.as_detached_tensor().copy()?;
        let values = start.flatten_all()?.to_vec1::<f64>()?;
        let mut slopes = values.clone();
        for i in 0..values.len() {
            let at = |step: f64| -> Result<f64> {
                let mut moved = values.clone();
                moved[i] += step;
                params.set(&name, &Tensor::from_vec(moved, start.dims(), &Device::Cpu)?)?;
                value()
            };
            slopes[i] = (at(h)? - at(-h)?) / (2.0 * h);
        }
        params.set(&name, &start)?;
        let slopes = Tensor::from_vec(slopes, start.dims(), &Device::Cpu)?;
        let zeros = start.zeros_like()?;
        let grad = grads.get(&param.var).unwrap_or(&zeros);
        let difference = (grad - &slopes)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>()?;
        let size = slopes.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>()?;
        assert!(
            difference <= 1e-7 * size + 1e-9,
            "{what}, {name}: gradient {grad} against differences {slopes}"
        );
    }
    Ok(())
}
