//! The fast draw on the CPU: T Z as a loop, the scales of the rows as one graph node, and their sum with A as
//! another. The composed path, for every device, works the same way without the node for the scales.

use candle_core::{DType, Device, Result, Tensor};

use super::reference::{mix, norm, weights};
use crate::dist::Estimator;
use crate::monteclora::noise::DrawNoise;
use crate::monteclora::options::{Compat, Mixture};
use crate::monteclora::peft_compat;
use crate::monteclora::posterior::Posterior;
use crate::ops::{add_scaled_rows, custom_vjp, OpPath};
use crate::special::tensor::{normalised, normalised_slope};
use crate::special::{gamma_quantile, GammaQuantile};
use crate::util::simd::vectorized;

/// Up to this rank `T Z` is a plain loop; above, a blocked matrix product is faster.
const SMALL_RANK: usize = 32;

/// The parts of a draw that do not depend on A and rho: the noise, `T Z` and, if the fused path uses them,
/// the gamma draws of the weights at the current c.
pub(super) struct PreparedDraw {
    noise: DrawNoise,
    matrices: Tensor,
    weights: Option<GammaDraws>,
}

/// Whether the layers of a pass prepare this together: on the CPU, if `T Z` is no larger than A.
pub(super) fn is_made_ahead(posterior: &Posterior) -> bool {
    let spec = posterior.spec();
    spec.device.is_cpu() && spec.config.mixture != Mixture::Explicit
}

impl PreparedDraw {
    /// Prepares the draw with this noise.
    ///
    /// # Errors
    /// If the noise does not have the shapes of this posterior.
    pub fn new(posterior: &Posterior, noise: DrawNoise, path: OpPath) -> Result<Self> {
        noise.check(posterior.spec())?;
        let config = &posterior.spec().config;
        let exact = config.compat == Compat::None && config.estimator == Estimator::Exact;
        let on_host = posterior.spec().device.is_cpu() && path == OpPath::Fused;
        let c = posterior.expert_weights_prior();
        let weights = (exact && on_host && config.mixture == Mixture::Collapsed)
            .then(|| GammaDraws::new(c, noise.weights()))
            .transpose()?;
        Ok(Self { matrices: tril_product(&noise, config.compat)?, noise, weights })
    }

    /// Computes the same as the function [`perturbed`], from the prepared parts.
    ///
    /// # Errors
    /// If `a` does not have the shape of this posterior.
    pub fn perturbed(self, posterior: &Posterior, a: &Tensor, eps: f64, path: OpPath) -> Result<Tensor> {
        let (rho, c, config) =
            (posterior.std_prior(), posterior.expert_weights_prior(), &posterior.spec().config);
        let Self { noise, matrices, weights: gamma } = self;
        let rows = || match config.compat {
            Compat::None => rho.exp()? * eps,
            Compat::Peft => peft_compat::factor_diagonal(rho, noise.bartlett())? * eps,
        };
        let weights = || weights(c, config, noise.weights());
        match config.mixture {
            Mixture::Explicit => {
                let (rows, matrix) = (rows()?, mix(&weights()?, &matrices)?);
                a + matrix.broadcast_mul(&rows.unsqueeze(1)?)?
            }
            Mixture::Collapsed => {
                let rows = match gamma {
                    Some(gamma) => row_scales(rho, c, gamma, eps)?,
                    None => rows()?.broadcast_mul(&norm(&weights()?)?)?,
                };
                add_scaled_rows(a, &rows, &matrices, path)
            }
            Mixture::Sparse => add_scaled_rows(a, &rows()?, &matrices, path),
        }
    }
}

/// Computes `A + eps sum_k pi_k F Z_k` as `A + diag(row scales) T Z`, `(r, in_dim)`.
///
/// # Errors
/// If the noise or `a` does not have the shapes of this posterior.
pub(super) fn perturbed(
    posterior: &Posterior,
    a: &Tensor,
    noise: &DrawNoise,
    eps: f64,
    path: OpPath,
) -> Result<Tensor> {
    PreparedDraw::new(posterior, noise.clone(), path)?.perturbed(posterior, a, eps, path)
}

/// Computes `T Z`, in the shape of Z; returns Z itself for [`Compat::Peft`], which clips `V T T^T` first.
fn tril_product(noise: &DrawNoise, compat: Compat) -> Result<Tensor> {
    let (t, z) = (noise.bartlett(), noise.z());
    let r = t.dim(0)?;
    if compat == Compat::Peft {
        return Ok(z.clone());
    }
    // A loop for small ranks: candle's product queries the number of cores at every call, which takes longer
    // than the product itself.
    let width = z.dim(z.rank() - 1)?;
    match (z.device().is_cpu() && r <= SMALL_RANK, z.dtype()) {
        (true, DType::F32) => {
            let (t, mut z_host) = (t.flatten_all()?.to_vec1::<f32>()?, z.flatten_all()?.to_vec1::<f32>()?);
            lower_product(&t, &mut z_host, r, width);
            Tensor::from_vec(z_host, z.shape(), &Device::Cpu)
        }
        (true, DType::F64) => {
            let (t, mut z_host) = (t.flatten_all()?.to_vec1::<f64>()?, z.flatten_all()?.to_vec1::<f64>()?);
            lower_product(&t, &mut z_host, r, width);
            Tensor::from_vec(z_host, z.shape(), &Device::Cpu)
        }
        _ => t.broadcast_matmul(z),
    }
}

/// Computes `T Z` in place for every matrix Z `(r, width)` in `zs`, with T `(r, r)` lower triangular. Rows
/// are computed from the last one up, since each depends only on itself and the rows above.
fn lower_product<T>(t: &[T], zs: &mut [T], r: usize, width: usize)
where
    T: Copy + std::ops::Mul<Output = T> + std::ops::AddAssign,
{
    vectorized!(for z in zs.chunks_exact_mut(r * width) {
        for i in (0..r).rev() {
            let (above, row) = z.split_at_mut(i * width);
            let row = &mut row[..width];
            let own = t[i * r + i];
            row.iter_mut().for_each(|x| *x = *x * own);
            for (j, above) in above.chunks_exact(width).enumerate() {
                let factor = t[i * r + j];
                row.iter_mut().zip(above).for_each(|(x, a)| *x += *a * factor);
            }
        }
    });
}

/// The gamma draws that the mixture weights are normalised from.
struct GammaDraws {
    /// The concentration `exp c`.
    shapes: Vec<f64>,
    draws: Vec<GammaQuantile>,
}

impl GammaDraws {
    /// Draws with concentration `exp c` at `uniforms`, both `(N)`, on the CPU.
    fn new(c: &Tensor, uniforms: &Tensor) -> Result<Self> {
        let shapes: Vec<f64> = host(c)?.into_iter().map(f64::exp).collect();
        let draws = shapes.iter().zip(host(uniforms)?).map(|(a, u)| gamma_quantile(*a, u)).collect();
        Ok(Self { shapes, draws })
    }
}

/// Computes `eps ||pi||_2 exp(rho)`, where pi are the normalised gamma draws of concentration `exp c`
/// ([`Estimator::Exact`](crate::dist::Estimator::Exact)).
///
/// Runs in double precision on the host and keeps what the backward pass needs. As tensor operations on a few
/// numbers each, this would be thirty graph nodes and compute the quantiles twice.
///
/// # Shapes
/// - `rho`: `(r)`, `c`: `(N)`, on the CPU
/// - output: `(r)`
///
/// # Errors
/// If a tensor does not have one dimension.
fn row_scales(rho: &Tensor, c: &Tensor, of: GammaDraws, eps: f64) -> Result<Tensor> {
    let GammaDraws { shapes, draws } = of;
    let scales: Vec<f64> = host(rho)?.into_iter().map(|rho| eps * rho.exp()).collect();
    let pi = normalised(&draws);
    let norm = pi.iter().map(|pi| pi * pi).sum::<f64>().sqrt();
    let rows = scales.iter().map(|scale| scale * norm).collect();
    let rows = Tensor::from_vec(rows, scales.len(), &Device::Cpu)?.to_dtype(rho.dtype())?;
    custom_vjp("row-scales", [rho, c], rows, move |call| {
        let grad = host(&call.grad)?;
        let along: Vec<f64> = grad.iter().zip(&scales).map(|(g, scale)| g * scale).collect();
        let dnorm: f64 = along.iter().sum();
        let drho = along.iter().map(|along| along * norm).collect();
        let dpi: Vec<f64> = pi.iter().map(|pi| dnorm * pi / norm).collect();
        let dc = normalised_slope(&shapes, &draws, &pi, &dpi);
        let place = |xs: Vec<f64>| Tensor::new(xs, &Device::Cpu).map(Some);
        Ok([place(drho)?, place(dc)?])
    })
}

fn host(xs: &Tensor) -> Result<Vec<f64>> {
    xs.detach().to_dtype(DType::F64)?.to_vec1()
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;
    use crate::dist::{Dirichlet, Estimator};

    #[test]
    fn value_and_gradients_are_those_of_the_elementary_operations() -> Result<()> {
        let device = Device::Cpu;
        for (c, us) in [(vec![0.3, -0.8, 1.1], vec![0.4, 0.9, 0.05]), (vec![0.2], vec![0.7])] {
            let rho = Var::new(&[0.1, -0.4], &device)?;
            let (c, us) = (Var::new(c, &device)?, Tensor::new(us, &device)?);
            let weight = Tensor::new(&[1.3, -0.7], &device)?;
            let ours = row_scales(&rho, &c, GammaDraws::new(&c, &us)?, 0.02)?;
            let pi = Dirichlet::new(&c)?.rsample(Estimator::Exact, &us)?;
            let reference = (rho.exp()? * 0.02)?.broadcast_mul(&pi.sqr()?.sum_all()?.sqrt()?)?;
            let grads = |ys: &Tensor| -> Result<_> { (ys * &weight)?.sum_all()?.backward() };
            let (got, want) = (grads(&ours)?, grads(&reference)?);
            let close = |a: &Tensor, b: &Tensor| -> Result<bool> {
                Ok((a - b)?.abs()?.max_all()?.to_scalar::<f64>()? < 1e-15)
            };
            assert!(close(&ours, &reference)?);
            assert!(close(got.get(&rho).expect("of rho"), want.get(&rho).expect("of rho"))?);
            // A single weight is one whatever c is: the elementary operations give no gradient, this one
            // gives zero.
            let dc = got.get(&c).expect("of c");
            match want.get(&c) {
                Some(want) => assert!(close(dc, want)? && c.elem_count() > 1),
                None => assert_eq!(dc.to_vec1::<f64>()?, [0.0]),
            }
        }
        Ok(())
    }
}
