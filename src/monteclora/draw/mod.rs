//! A draw of the posterior: what it is ([`reference`]), and the faster paths.

#[cfg(feature = "cuda")]
mod cuda;
mod fused;
mod reference;

use candle_core::{Result, Tensor};

use super::buffer::SampleBuffer;
use super::noise::DrawNoise;
use super::posterior::Posterior;
use crate::ops::OpPath;

pub use reference::PosteriorDraw;
pub(super) use reference::{draw as reference, weights};

/// `A + Delta` of draw number `draw` at scale `eps`, `(r, in_dim)`: what a forward pass needs. By kernels
/// where they serve, else from the noise of `buffer`.
///
/// # Errors
/// If there is no such draw, or `a` is not of this posterior's shapes.
pub(super) fn perturbed(
    posterior: &Posterior,
    a: &Tensor,
    draw: u64,
    buffer: &SampleBuffer,
    eps: f64,
    path: OpPath,
) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if path == OpPath::Fused && cuda::serves(posterior.spec()) {
        return cuda::perturbed(posterior, a, draw, eps);
    }
    let noise = buffer.get(draw)?;
    match path {
        OpPath::Reference => a + reference::draw(posterior, &noise, eps)?.delta,
        OpPath::Fused | OpPath::Composed => fused::perturbed(posterior, a, &noise, eps, path),
    }
}

impl Posterior {
    /// `A + Delta` of a draw given by its noise, `(r, in_dim)`.
    ///
    /// # Errors
    /// If the noise or `a` is not of this posterior's shapes.
    pub fn perturbed(&self, a: &Tensor, noise: &DrawNoise) -> Result<Tensor> {
        fused::perturbed(self, a, noise, self.sample_scaler(), OpPath::Fused)
    }

    /// The whole draw, step by step as it is defined.
    ///
    /// # Errors
    /// If the noise is not of this posterior's shapes.
    pub fn draw(&self, noise: &DrawNoise) -> Result<PosteriorDraw> {
        reference::draw(self, noise, self.sample_scaler())
    }
}
