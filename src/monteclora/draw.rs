//! Draws of the posterior: the definition ([`reference`]) and the faster implementations.

#[cfg(feature = "cuda")]
mod cuda;
mod fused;
mod reference;

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::buffer::SampleBuffer;
use super::group::{DrawRequest, GroupMember, GroupMembership};
use super::noise::DrawNoise;
use super::posterior::Posterior;
use crate::adapter::Context;
use crate::ops::OpPath;

pub use reference::PosteriorDraw;
pub(super) use reference::{draw as reference, weights};

/// Computes `A + Delta` of draw number `draw`, `(r, in_dim)`, for a forward pass: with CUDA kernels if they
/// support the layer, otherwise from the noise of `buffer`. In a pass of a model, the first layer of the
/// group of `membership` prepares the draws of all its layers.
///
/// # Errors
/// If there is no such draw, or the shape of A does not fit the posterior.
pub(super) fn perturbed(
    asked: &DrawRequest,
    draw: u64,
    buffer: &SampleBuffer,
    membership: Option<&GroupMembership>,
    cx: &Context,
) -> Result<Tensor> {
    let DrawRequest { posterior, mean, eps } = *asked;
    let membership = membership.filter(|_| cx.path == OpPath::Fused);
    #[cfg(feature = "cuda")]
    if cx.path == OpPath::Fused && cuda::serves(posterior.spec()) {
        let together =
            |members: &[Option<GroupMember>]| cuda::perturbed_together(members, posterior, draw, cx);
        let made = membership.map(|membership| membership.take(posterior, draw, cx, together)).transpose()?;
        return made.flatten().map_or_else(|| cuda::perturbed(asked, draw), Ok);
    }
    if buffer.is_empty() && fused::is_made_ahead(posterior) {
        let made =
            membership.map(|membership| membership.take(posterior, draw, cx, |members| ahead(members, draw)));
        if let Some(ahead) = made.transpose()?.flatten() {
            return ahead.perturbed(posterior, mean, eps, cx.path);
        }
    }
    let noise = buffer.get(draw)?;
    match cx.path {
        OpPath::Reference => mean + reference::draw(posterior, &noise, eps)?.delta,
        OpPath::Fused | OpPath::Composed => fused::perturbed(posterior, mean, &noise, eps, cx.path),
    }
}

/// Prepares the members' draws, except for the parts that depend on A and rho, on all threads. With few
/// tokens, a layer that prepared its own draw on one thread, mostly gamma quantiles, would spend most of its
/// time on it.
fn ahead(members: &[Option<GroupMember>], draw: u64) -> Result<Vec<Option<fused::PreparedDraw>>> {
    let of = |member: &GroupMember| {
        let posterior = &member.posterior;
        let noise = || posterior.spec().generate(posterior.streams(), draw);
        let served = fused::is_made_ahead(posterior);
        served.then(|| fused::PreparedDraw::new(posterior, noise()?, OpPath::Fused)).transpose()
    };
    members.par_iter().map(|member| Ok(member.as_ref().map(of).transpose()?.flatten())).collect()
}

impl Posterior {
    /// Computes `A + Delta` of the draw with this noise, `(r, in_dim)`.
    ///
    /// # Errors
    /// If the noise or `a` does not have the shapes of this posterior.
    pub fn perturbed(&self, a: &Tensor, noise: &DrawNoise) -> Result<Tensor> {
        fused::perturbed(self, a, noise, self.sample_scaler(), OpPath::Fused)
    }

    /// Computes the whole draw step by step, as it is defined.
    ///
    /// # Errors
    /// If the noise does not have the shapes of this posterior.
    pub fn draw(&self, noise: &DrawNoise) -> Result<PosteriorDraw> {
        reference::draw(self, noise, self.sample_scaler())
    }
}
