//! The definition of a draw, in the order of `docs/METHOD.md`: covariance factor, mixture weights, scale and
//! perturbation, each computed by the distribution's own `rsample`.
//!
//! ```text
//! F = diag(exp rho) T,  Sigma = F F^T      the covariance's factor (step 1)
//! pi ~ Dir(exp c)                          the mixture weights (step 2)
//! S_k = F Z_k                              columns N(0, Sigma)
//! Delta = eps sum_k pi_k S_k               the perturbation (step 3)
//! ```
//!
//! The fused and the CUDA implementation compute the same numbers faster and are tested against this one.

use candle_core::{Result, Tensor};

use crate::dist::{Dirichlet, Gaussian, Wishart};
use crate::monteclora::config::MonteCLoRAConfig;
use crate::monteclora::noise::DrawNoise;
use crate::monteclora::options::{Compat, Mixture};
use crate::monteclora::peft_compat;
use crate::monteclora::posterior::Posterior;
use crate::ops::matmul_constant;

/// One draw of the posterior.
#[derive(Debug, Clone)]
pub struct PosteriorDraw {
    /// The covariance's factor F, `(r, r)`.
    pub scale_tril: Tensor,
    /// The mixture weights pi, `(N)`; dense also for [`Mixture::Sparse`].
    pub weights: Tensor,
    /// The perturbation Delta of A, `(r, in_dim)`.
    pub delta: Tensor,
}

/// Computes the draw with this noise and scale `eps`.
///
/// # Errors
/// If the noise does not have the shapes of this posterior.
pub(in crate::monteclora) fn draw(
    posterior: &Posterior,
    noise: &DrawNoise,
    eps: f64,
) -> Result<PosteriorDraw> {
    noise.check(posterior.spec())?;
    let config = &posterior.spec().config;
    let scale_tril = factor(posterior, noise)?;
    let weights = weights(posterior.expert_weights_prior(), config, noise.weights())?;
    let columns = Gaussian::new(&scale_tril)?.rsample(noise.z())?; // (r, in_dim), explicit (N, r, in_dim)
    let mixed = match config.mixture {
        Mixture::Explicit => mix(&weights, &columns)?,
        Mixture::Collapsed => columns.broadcast_mul(&norm(&weights)?)?,
        Mixture::Sparse => columns,
    };
    Ok(PosteriorDraw { scale_tril, weights, delta: (mixed * eps)? })
}

/// Computes the covariance's factor F, `(r, r)`.
fn factor(posterior: &Posterior, noise: &DrawNoise) -> Result<Tensor> {
    let (config, rho) = (&posterior.spec().config, posterior.std_prior());
    match config.compat {
        Compat::None => Wishart::new(rho, config.degrees(), config.covariance)?.rsample(noise.bartlett()),
        Compat::Peft => {
            let eye = Tensor::eye(config.rank, rho.dtype(), rho.device())?;
            eye.broadcast_mul(&peft_compat::factor_diagonal(rho, noise.bartlett())?.unsqueeze(1)?)
        }
    }
}

/// Computes mixture weights of one layer `(N)` or of many `(.., N)` from noise of the same shape.
pub(in crate::monteclora) fn weights(
    log_concentration: &Tensor,
    config: &MonteCLoRAConfig,
    noise: &Tensor,
) -> Result<Tensor> {
    let dirichlet = Dirichlet::new(log_concentration)?;
    match config.compat {
        Compat::None => dirichlet.rsample(config.estimator, noise),
        Compat::Peft => peft_compat::weights(&dirichlet, noise),
    }
}

/// `||pi||_2`: `sum_k pi_k S_k` has independent columns `N(0, ||pi||^2 Sigma)`.
pub(super) fn norm(weights: &Tensor) -> Result<Tensor> {
    weights.sqr()?.sum_all()?.sqrt()
}

/// `sum_k pi_k matrix_k`, `(r, in_dim)` of `(N, r, in_dim)`.
pub(super) fn mix(weights: &Tensor, matrices: &Tensor) -> Result<Tensor> {
    let (n, r, in_dim) = matrices.dims3()?;
    let matrices = matrices.reshape((n, r * in_dim))?;
    matmul_constant(&weights.reshape((1, n))?, &matrices)?.reshape((r, in_dim))
}
