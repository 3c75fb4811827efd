//! The arithmetic of AdamW: in place on single-precision CPU tensors, in one launch for all parameters on
//! CUDA devices, by ordinary tensor operations elsewhere. Elements are independent, so that the number of
//! threads does not change results.

use candle_core::backend::BackendStorage;
use candle_core::{bail, CpuStorage, DType, InplaceOp2, InplaceOp3, Layout, Result, Tensor, Var};
use rayon::prelude::*;

use super::gradients::times;
use super::moments::Moments;
#[cfg(feature = "cuda")]
use crate::kernels::multi_tensor;
use crate::util::simd::vectorized;

/// Elements per task: enough to outweigh the cost of handing it to a thread.
const PIECE: usize = 8192;

/// The scalars of one AdamW step.
#[derive(Debug, Clone, Copy)]
pub(super) struct Constants {
    /// Multiplies the gradient before anything else.
    pub factor: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    /// `1 - lr decay`.
    pub keep: f64,
    /// `lr / (1 - beta1^t)`.
    pub rate: f64,
    /// `1 - beta2^t`.
    pub correction2: f64,
}

/// The AdamW steps of some parameters. Those on a CUDA device are collected and taken together in `finish`.
#[derive(Default)]
pub(super) struct Steps {
    #[cfg(feature = "cuda")]
    waiting: Vec<multi_tensor::AdamWUpdate>,
}

impl Steps {
    /// Takes the step of `var` now, or in [`Self::finish`].
    pub fn take(&mut self, var: &Var, moments: &mut Moments, grad: &Tensor, of: &Constants) -> Result<()> {
        #[cfg(feature = "cuda")]
        if multi_tensor::supports(var) && grad.dtype() == DType::F32 {
            self.waiting.push(multi_tensor::AdamWUpdate {
                value: var.as_detached_tensor(),
                first: moments.first.clone(),
                second: moments.second.clone(),
                grad: grad.contiguous()?,
                keep: of.keep as f32,
                rate: of.rate as f32,
                inverse: (1.0 / of.correction2) as f32,
            });
            return Ok(());
        }
        update(var, moments, grad, of)
    }

    /// Takes the collected steps.
    #[cfg_attr(not(feature = "cuda"), allow(unused_variables, clippy::unused_self))]
    pub fn finish(self, factor: f64, betas: [f64; 2], eps: f64) -> Result<()> {
        #[cfg(feature = "cuda")]
        multi_tensor::adamw(&self.waiting, factor, betas, eps)?;
        Ok(())
    }
}

/// Takes one step of `var`.
fn update(var: &Var, moments: &mut Moments, grad: &Tensor, constants: &Constants) -> Result<()> {
    let single = [var.dtype(), grad.dtype()] == [DType::F32; 2];
    if single && var.device().is_cpu() && var.is_contiguous() {
        in_place(var, moments, &grad.contiguous()?, constants)
    } else {
        by_tensors(var, moments, grad, constants)
    }
}

/// Without allocation: in full fine-tuning the temporaries would be larger than the model.
fn in_place(var: &Var, moments: &mut Moments, grad: &Tensor, constants: &Constants) -> Result<()> {
    let factor = constants.factor;
    moments.first.inplace_op2(grad, &Mean { factor, beta: constants.beta1, of_squares: false })?;
    moments.second.inplace_op2(grad, &Mean { factor, beta: constants.beta2, of_squares: true })?;
    var.inplace_op3(&moments.first, &moments.second, &Step(*constants))
}

fn by_tensors(var: &Var, moments: &mut Moments, grad: &Tensor, constants: &Constants) -> Result<()> {
    let Constants { factor, beta1, beta2, eps, keep, rate, correction2 } = *constants;
    let grad = &times(grad, factor)?;
    moments.first = ((&moments.first * beta1)? + (grad * (1.0 - beta1))?)?;
    moments.second = ((&moments.second * beta2)? + (grad.sqr()? * (1.0 - beta2))?)?;
    let denominator = ((&moments.second / correction2)?.sqrt()? + eps)?;
    let update = ((&moments.first * rate)? / denominator)?;
    var.set(&((var.as_detached_tensor() * keep)? - update)?)
}

/// `mean <- beta mean + (1 - beta) g`, or of g squared, where g is the gradient times `factor`.
struct Mean {
    factor: f64,
    beta: f64,
    of_squares: bool,
}

impl InplaceOp2 for Mean {
    fn name(&self) -> &'static str {
        "adamw-mean"
    }

    fn cpu_fwd(&self, s1: &mut CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<()> {
        let (mean, grad) = (elements_mut(s1, l1)?, elements(s2, l2)?);
        let (factor, beta, rest) = (self.factor as f32, self.beta as f32, (1.0 - self.beta) as f32);
        mean.par_chunks_mut(PIECE).zip(grad.par_chunks(PIECE)).for_each(|(mean, grad)| {
            let pairs = mean.iter_mut().zip(grad).map(|(m, g)| (m, g * factor));
            vectorized!(if self.of_squares {
                pairs.for_each(|(m, g)| *m = beta * *m + rest * (g * g))
            } else {
                pairs.for_each(|(m, g)| *m = beta * *m + rest * g)
            })
        });
        Ok(())
    }
}

/// `w <- keep w - rate m / (sqrt(v / correction2) + eps)`.
struct Step(Constants);

impl InplaceOp3 for Step {
    fn name(&self) -> &'static str {
        "adamw-step"
    }

    fn cpu_fwd(
        &self,
        s1: &mut CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<()> {
        let (value, first, second) = (elements_mut(s1, l1)?, elements(s2, l2)?, elements(s3, l3)?);
        let (keep, rate, eps) = (self.0.keep as f32, self.0.rate as f32, self.0.eps as f32);
        let inverse = (1.0 / self.0.correction2) as f32;
        let pieces = value.par_chunks_mut(PIECE).zip(first.par_chunks(PIECE)).zip(second.par_chunks(PIECE));
        pieces.for_each(|((value, first), second)| {
            vectorized!({
                for ((w, m), v) in value.iter_mut().zip(first).zip(second) {
                    *w = keep * *w - rate * m / ((v * inverse).sqrt() + eps);
                }
            });
        });
        Ok(())
    }
}

fn elements<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(data), Some((start, end))) => Ok(&data[start..end]),
        _ => bail!("a contiguous f32 tensor was expected, got {:?} of {layout:?}", storage.dtype()),
    }
}

fn elements_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(data), Some((start, end))) => Ok(&mut data[start..end]),
        (storage, _) => {
            bail!("a contiguous f32 tensor was expected, got {:?} of {layout:?}", storage.dtype())
        }
    }
}

#[cfg(all(test, feature = "cuda"))]
mod device_tests;

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::noise::{Noise, Purpose};

    #[test]
    fn both_ways_agree_and_the_gradient_may_have_any_strides() -> Result<()> {
        // More than two pieces, the last of them short.
        let (rows, columns) = (2 * PIECE / 64 + 1, 65);
        let random = |path: &str, draw| -> Result<Tensor> {
            let mut values = vec![0f32; rows * columns];
            Noise::new(1).stream(path, Purpose::Predict).fill_normal_f32(draw, &mut values);
            Tensor::from_vec(values, (columns, rows), &Device::Cpu)
        };
        let start = random("w", 0)?;
        let zero = start.zeros_like()?;
        let new = || -> Result<(Var, Moments)> {
            Ok((
                Var::from_tensor(&start.copy()?)?,
                Moments { first: zero.copy()?, second: zero.copy()?, steps: 0 },
            ))
        };
        let ((one, mut fast), (other, mut plain)) = (new()?, new()?);
        for t in 1..=4 {
            // A transposed gradient, as the backward pass of a matrix product may give.
            let grad = random("g", t as u64)?.t()?.contiguous()?.t()?;
            let constants = Constants {
                factor: 0.25,
                beta1: 0.9,
                beta2: 0.98,
                eps: 1e-6,
                keep: 1.0 - 1e-3,
                rate: 0.01 / (1.0 - 0.9f64.powi(t)),
                correction2: 1.0 - 0.98f64.powi(t),
            };
            update(&one, &mut fast, &grad, &constants)?;
            by_tensors(&other, &mut plain, &grad, &constants)?;
        }
        let distance = |a: &Tensor, b: &Tensor| (a - b)?.abs()?.max_all()?.to_scalar::<f32>();
        assert!(distance(one.as_tensor(), other.as_tensor())? < 1e-5);
        assert!(distance(&fast.first, &plain.first)? < 1e-6 && distance(&fast.second, &plain.second)? < 1e-6);
        assert!(distance(one.as_tensor(), &start)? > 1e-2); // it moved
        Ok(())
    }
}
