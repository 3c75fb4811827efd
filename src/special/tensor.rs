//! The gamma function's family on tensors, with gradients.
//!
//! Computed in double precision on the host, whatever the dtype; other devices go through the
//! host, which suits the few numbers per layer that need it.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::{digamma, gamma_quantile, ln_gamma, trigamma};

/// Elementwise `ln Gamma(x)`; its gradient is [`fn@digamma`].
///
/// # Errors
/// If `xs` is neither f32 nor f64.
pub fn ln_gamma_of(xs: &Tensor) -> Result<Tensor> {
    on_host(xs, Family::LnGamma)
}

/// Elementwise `psi(x)`; its gradient is [`fn@trigamma`].
///
/// # Errors
/// If `xs` is neither f32 nor f64.
pub fn digamma_of(xs: &Tensor) -> Result<Tensor> {
    on_host(xs, Family::Digamma)
}

/// `ln z` of Gamma(exp `log_shape`, 1) draws at the given uniform numbers, differentiable in
/// `log_shape` (the implicit derivative of [`gamma_quantile`]).
///
/// # Shapes
/// - `log_shape`: any, f32 or f64
/// - `uniforms`: as many numbers in (0, 1), in row-major order
/// - output: that of `log_shape`
///
/// # Errors
/// If the counts differ, or the dtype is neither f32 nor f64.
pub fn log_gamma_rsample(log_shape: &Tensor, uniforms: Vec<f64>) -> Result<Tensor> {
    if uniforms.len() != log_shape.elem_count() {
        candle_core::bail!("{} uniform numbers for shape {:?}", uniforms.len(), log_shape.shape())
    }
    on_host(log_shape, Quantile { uniforms: uniforms.into() })
}

/// Applies an operation of the host; `to_device` carries gradients both ways.
fn on_host<O: CustomOp1 + Send + Sync + 'static>(xs: &Tensor, op: O) -> Result<Tensor> {
    xs.to_device(&Device::Cpu)?.contiguous()?.apply_op1(op)?.to_device(xs.device())
}

/// Elementwise map of a contiguous f32 or f64 slice, in double precision.
fn map(
    storage: &CpuStorage,
    layout: &Layout,
    f: impl Fn(usize, f64) -> f64 + Sync,
) -> Result<(CpuStorage, Shape)> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        candle_core::bail!("expected a contiguous tensor, got {layout:?}")
    };
    let out = match storage {
        CpuStorage::F32(xs) => {
            let xs = xs[start..end].par_iter().with_min_len(256).enumerate();
            CpuStorage::F32(xs.map(|(i, x)| f(i, f64::from(*x)) as f32).collect())
        }
        CpuStorage::F64(xs) => {
            let xs = xs[start..end].par_iter().with_min_len(256).enumerate();
            CpuStorage::F64(xs.map(|(i, x)| f(i, *x)).collect())
        }
        _ => candle_core::bail!("expected f32 or f64, got {:?}", storage_dtype(storage)),
    };
    Ok((out, layout.shape().clone()))
}

fn storage_dtype(storage: &CpuStorage) -> DType {
    use candle_core::backend::BackendStorage;
    storage.dtype()
}

/// ln Gamma and its derivatives.
#[derive(Clone, Copy)]
enum Family {
    LnGamma,
    Digamma,
    Trigamma,
}

impl CustomOp1 for Family {
    fn name(&self) -> &'static str {
        match self {
            Self::LnGamma => "ln-gamma",
            Self::Digamma => "digamma",
            Self::Trigamma => "trigamma",
        }
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let f = match self {
            Self::LnGamma => ln_gamma,
            Self::Digamma => digamma,
            Self::Trigamma => trigamma,
        };
        map(storage, layout, |_, x| f(x))
    }

    fn bwd(&self, arg: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let derivative = match self {
            Self::LnGamma => Self::Digamma,
            Self::Digamma => Self::Trigamma,
            Self::Trigamma => return Err(candle_core::Error::BackwardNotSupported { op: self.name() }),
        };
        Ok(Some((grad * on_host(&arg.detach(), derivative)?)?))
    }
}

/// `c -> ln z(exp c, u)`.
struct Quantile {
    uniforms: Arc<[f64]>,
}

impl CustomOp1 for Quantile {
    fn name(&self) -> &'static str {
        "log-gamma-quantile"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        map(storage, layout, |i, c| gamma_quantile(c.exp(), self.uniforms[i]).log_z)
    }

    fn bwd(&self, arg: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let slope = QuantileSlope { uniforms: self.uniforms.clone() };
        Ok(Some((grad * on_host(&arg.detach(), slope)?)?))
    }
}

/// `c -> d ln z / d c = a d ln z / d a`. It solves for the quantile again: that is a few
/// microseconds for a layer's N components, and nothing is kept between the two passes.
struct QuantileSlope {
    uniforms: Arc<[f64]>,
}

impl CustomOp1 for QuantileSlope {
    fn name(&self) -> &'static str {
        "log-gamma-quantile-slope"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        map(storage, layout, |i, c| c.exp() * gamma_quantile(c.exp(), self.uniforms[i]).dlog_z)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Var;

    #[test]
    fn values_and_gradients_are_those_of_the_host() -> Result<()> {
        let xs = [0.3, 1.0, 4.5, 40.0];
        let x = Var::new(&xs, &Device::Cpu)?;
        for (ys, f, df) in [
            (ln_gamma_of(&x)?, ln_gamma as fn(f64) -> f64, digamma as fn(f64) -> f64),
            (digamma_of(&x)?, digamma, trigamma),
        ] {
            assert_eq!(ys.to_vec1::<f64>()?, xs.map(f));
            let grads = ys.affine(2.0, 0.0)?.sum_all()?.backward()?;
            let slopes = grads.get(&x).unwrap().to_vec1::<f64>()?;
            assert_eq!(slopes, xs.map(|x| 2.0 * df(x)));
        }
        Ok(())
    }

    #[test]
    fn single_precision_is_the_double_result_rounded() -> Result<()> {
        // A transposed view: the layout is not contiguous.
        let x = Tensor::new(&[[0.2f32, 3.0], [7.5, 90.0]], &Device::Cpu)?.t()?;
        let want = [0.2f32, 7.5, 3.0, 90.0].map(|x| ln_gamma(f64::from(x)) as f32);
        assert_eq!(ln_gamma_of(&x)?.flatten_all()?.to_vec1::<f32>()?, want);
        assert!(ln_gamma_of(&x.to_dtype(DType::BF16)?).is_err());
        Ok(())
    }

    #[test]
    fn the_gradient_of_a_gamma_draw_is_the_implicit_derivative() -> Result<()> {
        let (cs, us) = ([-2.0, 0.0, 1.5], [0.3, 0.9, 0.05]);
        let c = Var::new(&cs, &Device::Cpu)?;
        let log_z = log_gamma_rsample(&c, us.to_vec())?;
        let slopes = log_z.sum_all()?.backward()?.get(&c).unwrap().to_vec1::<f64>()?;
        for i in 0..3 {
            let at = |c: f64| gamma_quantile(c.exp(), us[i]).log_z;
            assert_eq!(log_z.to_vec1::<f64>()?[i], at(cs[i]));
            let difference = (at(cs[i] + 1e-5) - at(cs[i] - 1e-5)) / 2e-5;
            assert!((slopes[i] / difference - 1.0).abs() < 1e-8, "{} {difference}", slopes[i]);
        }
        assert!(log_gamma_rsample(&c, vec![0.5; 2]).is_err());
        Ok(())
    }
}
