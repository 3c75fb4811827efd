//! The gamma function and its relatives on tensors, with gradients.
//!
//! Results are computed in double precision, whatever the dtype. On CUDA devices, ln Gamma and its
//! derivatives are a kernel; everything else is computed on the host, which is fast enough for the few
//! numbers per layer.

use std::sync::Arc;

#[cfg(feature = "cuda")]
use candle_core::{backend::BackendStorage, CudaStorage};
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Tensor, D};
use rayon::prelude::*;

use super::functions::{digamma, ln_gamma, softmax, trigamma};
use super::gamma::{gamma_quantile, GammaQuantile};

/// Elementwise `ln Gamma(x)`; its gradient is [`fn@digamma`].
///
/// # Errors
/// If `xs` is neither f32 nor f64.
pub fn ln_gamma_of(xs: &Tensor) -> Result<Tensor> {
    Family::LnGamma.of(xs)
}

/// Elementwise `psi(x)`; its gradient is [`fn@trigamma`].
///
/// # Errors
/// If `xs` is neither f32 nor f64.
pub fn digamma_of(xs: &Tensor) -> Result<Tensor> {
    Family::Digamma.of(xs)
}

/// `z / sum z` over the last dimension, z draws of Gamma(exp `log_shape`, 1) at the given uniform
/// numbers; differentiable in `log_shape` (the implicit derivative of [`gamma_quantile`]).
///
/// This is one op, because ln z is thousands below zero at small shapes: rounded to single precision before
/// the softmax, it would lose all but three digits of the result.
///
/// # Shapes
/// - `log_shape`: `(.., n)`, f32 or f64
/// - `uniforms`: as many numbers in (0, 1), in row-major order
/// - output: that of `log_shape`
///
/// # Errors
/// If the counts differ, `log_shape` is a scalar, or its dtype is neither f32 nor f64.
pub fn normalised_gamma_rsample(log_shape: &Tensor, uniforms: Vec<f64>) -> Result<Tensor> {
    if uniforms.len() != log_shape.elem_count() {
        candle_core::bail!("{} uniform numbers for shape {:?}", uniforms.len(), log_shape.shape())
    }
    let width = log_shape.dim(D::Minus1)?.max(1);
    on_host(log_shape, Normalised { uniforms: uniforms.into(), width })
}

/// Applies an op on the host; gradients pass through `to_device` in both directions.
fn on_host<O: CustomOp1 + Send + Sync + 'static>(xs: &Tensor, op: O) -> Result<Tensor> {
    xs.to_device(&Device::Cpu)?.contiguous()?.apply_op1(op)?.to_device(xs.device())
}

/// `f(i, x)` of every element of a contiguous f32 or f64 slice, in double precision.
fn doubles<T: Send>(
    storage: &CpuStorage,
    layout: &Layout,
    f: impl Fn(usize, f64) -> T + Sync,
) -> Result<Vec<T>> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        candle_core::bail!("expected a contiguous tensor, got {layout:?}")
    };
    match storage {
        CpuStorage::F32(xs) => {
            let xs = xs[start..end].par_iter().with_min_len(256).enumerate();
            Ok(xs.map(|(i, x)| f(i, f64::from(*x))).collect())
        }
        CpuStorage::F64(xs) => {
            let xs = xs[start..end].par_iter().with_min_len(256).enumerate();
            Ok(xs.map(|(i, x)| f(i, *x)).collect())
        }
        _ => candle_core::bail!("expected f32 or f64, got {:?}", storage_dtype(storage)),
    }
}

/// Converts double-precision results to the dtype of `like`.
fn rounded(results: Vec<f64>, like: &CpuStorage) -> CpuStorage {
    match like {
        CpuStorage::F32(_) => CpuStorage::F32(results.into_iter().map(|x| x as f32).collect()),
        _ => CpuStorage::F64(results),
    }
}

fn storage_dtype(storage: &CpuStorage) -> DType {
    use candle_core::backend::BackendStorage;
    storage.dtype()
}

/// ln Gamma and its derivatives; the discriminant is the order of the derivative.
#[derive(Clone, Copy)]
enum Family {
    LnGamma,
    Digamma,
    Trigamma,
}

impl Family {
    fn of(self, xs: &Tensor) -> Result<Tensor> {
        if cfg!(feature = "cuda") && xs.device().is_cuda() {
            xs.contiguous()?.apply_op1(self)
        } else {
            on_host(xs, self)
        }
    }
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
        Ok((rounded(doubles(storage, layout, |_, x| f(x))?, storage), layout.shape().clone()))
    }

    fn bwd(&self, arg: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let derivative = match self {
            Self::LnGamma => Self::Digamma,
            Self::Digamma => Self::Trigamma,
            Self::Trigamma => return Err(candle_core::Error::BackwardNotSupported { op: self.name() }),
        };
        Ok(Some((grad * derivative.of(&arg.detach())?)?))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        use crate::kernels::{alloc_uninit, count, elements, launch, one_each};
        let (device, n) = (storage.device().clone(), layout.shape().elem_count());
        let (derivative, len) = (*self as u32, count(n)?);
        let out = match storage.dtype() {
            DType::F32 => {
                let (xs, mut ys) =
                    (elements::<f32>(&device, storage, layout)?, alloc_uninit::<f32>(&device, n)?);
                launch!(&device; one_each(len); gamma_family_f32(&derivative, &len, &xs, &mut ys));
                CudaStorage::wrap_cuda_slice(ys, device)
            }
            DType::F64 => {
                let (xs, mut ys) =
                    (elements::<f64>(&device, storage, layout)?, alloc_uninit::<f64>(&device, n)?);
                launch!(&device; one_each(len); gamma_family_f64(&derivative, &len, &xs, &mut ys));
                CudaStorage::wrap_cuda_slice(ys, device)
            }
            other => candle_core::bail!("expected f32 or f64, got {other:?}"),
        };
        Ok((out, layout.shape().clone()))
    }
}

/// `c -> softmax ln z(exp c, u)` in rows of `width`.
struct Normalised {
    uniforms: Arc<[f64]>,
    width: usize,
}

impl CustomOp1 for Normalised {
    fn name(&self) -> &'static str {
        "normalised-gamma"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let draws = doubles(storage, layout, |i, c| gamma_quantile(c.exp(), self.uniforms[i]))?;
        let pi = draws.chunks(self.width).flat_map(normalised).collect();
        Ok((rounded(pi, storage), layout.shape().clone()))
    }

    fn bwd(&self, arg: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?;
        let slope = NormalisedSlope { uniforms: self.uniforms.clone(), width: self.width, grad };
        on_host(&arg.detach(), slope).map(Some)
    }
}

/// The gradient of [`Normalised`]. It recomputes the quantiles, which takes a few microseconds for a layer's
/// N components, so that nothing is kept between the two passes.
struct NormalisedSlope {
    uniforms: Arc<[f64]>,
    width: usize,
    grad: Vec<f64>,
}

impl CustomOp1 for NormalisedSlope {
    fn name(&self) -> &'static str {
        "normalised-gamma-slope"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let draws = doubles(storage, layout, |i, c| (c.exp(), gamma_quantile(c.exp(), self.uniforms[i])))?;
        let rows = draws.chunks(self.width).zip(self.grad.chunks(self.width));
        let slopes = rows.flat_map(|(row, grad)| {
            let (shapes, draws): (Vec<f64>, Vec<GammaQuantile>) = row.iter().copied().unzip();
            normalised_slope(&shapes, &draws, &normalised(&draws), grad)
        });
        Ok((rounded(slopes.collect(), storage), layout.shape().clone()))
    }
}

/// `pi_i = z_i / sum z` of draws z.
pub(crate) fn normalised(draws: &[GammaQuantile]) -> Vec<f64> {
    let mut pi: Vec<f64> = draws.iter().map(|draw| draw.log_z).collect();
    softmax(&mut pi);
    pi
}

/// Turns the gradient `g` with respect to [`normalised`] `pi` into that with respect to the logarithms of the
/// shapes a:
/// `a_i (d ln z_i / d a_i) pi_i (g_i - sum_k pi_k g_k)`.
pub(crate) fn normalised_slope(
    shapes: &[f64],
    draws: &[GammaQuantile],
    pi: &[f64],
    grad: &[f64],
) -> Vec<f64> {
    let along: f64 = pi.iter().zip(grad).map(|(pi, g)| pi * g).sum();
    let terms = shapes.iter().zip(draws).zip(pi).zip(grad);
    terms.map(|(((a, draw), pi), g)| a * draw.dlog_z * pi * (g - along)).collect()
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

    #[cfg(feature = "cuda")]
    #[test]
    fn many_elements_on_a_device_are_those_of_the_host() -> Result<()> {
        // More elements than threads in a block, with a partial last block.
        let xs: Vec<f64> = (1..=1000).map(|i| 0.013 * f64::from(i)).collect();
        let host = Tensor::new(xs, &Device::Cpu)?;
        let device = host.to_device(&crate::cuda_device(0)?)?;
        for of in [ln_gamma_of as fn(&Tensor) -> Result<Tensor>, digamma_of] {
            for (dtype, room) in [(DType::F64, 1e-12), (DType::F32, 2e-7)] {
                let wide = |xs: &Tensor| of(&xs.to_dtype(dtype)?)?.to_dtype(DType::F64)?.to_vec1::<f64>();
                for (got, want) in wide(&device)?.into_iter().zip(wide(&host)?) {
                    assert!((got - want).abs() <= room * want.abs().max(1.0), "{dtype:?}: {got} {want}");
                }
            }
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
    fn the_gradient_of_a_normalised_draw_is_the_implicit_derivative() -> Result<()> {
        let (cs, us, weights) = ([-0.5, 0.0, 0.8], [0.9, 0.6, 0.3], [0.4, -1.1, 2.0]);
        let c = Var::new(&[cs, [0.3; 3]], &Device::Cpu)?;
        let pi = normalised_gamma_rsample(&c, [us, us].concat())?;
        let weighed = pi.get(0)?.mul(&Tensor::new(&weights, &Device::Cpu)?)?.sum_all()?;
        let slopes = weighed.backward()?.get(&c).unwrap().to_vec2::<f64>()?;
        let at = |cs: [f64; 3]| {
            let z = [0, 1, 2].map(|i| gamma_quantile(f64::exp(cs[i]), us[i]).z());
            let sum: f64 = z.iter().sum();
            z.map(|z| z / sum)
        };
        for (got, want) in pi.get(0)?.to_vec1::<f64>()?.into_iter().zip(at(cs)) {
            assert!((got - want).abs() < 1e-14, "{got} {want}");
        }
        let loss = |cs: [f64; 3]| at(cs).iter().zip(weights).map(|(pi, w)| pi * w).sum::<f64>();
        for i in 0..3 {
            let moved = |step: f64| {
                let mut cs = cs;
                cs[i] += step;
                loss(cs)
            };
            let difference = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            assert!((slopes[0][i] / difference - 1.0).abs() < 1e-8, "{} {difference}", slopes[0][i]);
        }
        assert_eq!(slopes[1], [0.0; 3]);
        let error = normalised_gamma_rsample(&c, vec![0.5; 2]).unwrap_err().to_string();
        assert!(error.contains("2 uniform numbers for shape [2, 3]"), "{error}");
        Ok(())
    }

    #[test]
    fn weights_at_a_tiny_concentration_keep_single_precision() -> Result<()> {
        // ln z is near -12600, where neighbours in single precision are 1e-3 apart.
        let uniforms = vec![1.0e-5, 1.000_01e-5, 1.000_02e-5];
        let c = Var::new(&[-7f32; 3], &Device::Cpu)?;
        let log_z = gamma_quantile((-7f64).exp(), uniforms[0]).log_z;
        assert!((-13_000.0..-12_000.0).contains(&log_z), "{log_z}");
        let narrow = normalised_gamma_rsample(&c, uniforms.clone())?;
        let wide = normalised_gamma_rsample(&c.to_dtype(DType::F64)?, uniforms)?;
        let weights = Tensor::new(&[1f32, -2.0, 3.0], &Device::Cpu)?;
        let slope = |pi: &Tensor| -> Result<Vec<f32>> {
            let loss = pi.to_dtype(DType::F32)?.mul(&weights)?.sum_all()?;
            loss.backward()?.get(&c).expect("a gradient").to_vec1()
        };
        let pairs = [(narrow.to_vec1::<f32>()?, wide.to_dtype(DType::F32)?.to_vec1::<f32>()?)];
        for (narrow, wide) in pairs.into_iter().chain([(slope(&narrow)?, slope(&wide)?)]) {
            for (narrow, wide) in narrow.iter().zip(&wide) {
                assert!((narrow / wide - 1.0).abs() < 1e-6, "{narrow} {wide}");
            }
        }
        Ok(())
    }
}
