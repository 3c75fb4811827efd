//! The MonteCLoRA adapter of one linear layer.
//!
//! ```text
//! y = W0 x + b + s B (A + Delta) dropout(x),   Delta a draw in training, zero at the mean
//! ```

use std::any::Any;
use std::borrow::Cow;
use std::sync::Arc;

use candle_core::Tensor;

use super::buffer::SampleBuffer;
use super::config::MonteCLoRAConfig;
use super::draw::{self, PosteriorDraw};
use super::group::{self, DrawGroup, DrawRequest, GroupMember, GroupMembership};
use super::noise::{DrawSpec, NoiseStreams};
use super::posterior::Posterior;
use crate::adapter::{Adapter, BaseLinear, Context, LowRank, Params, Role};
use crate::error::Result;

/// A low-rank adapter with a posterior over A: a Gaussian around the mean A, with a Wishart-distributed
/// covariance and Dirichlet-distributed mixture weights.
///
/// In addition to LoRA's A and B it trains r + N numbers: `std_prior` and `expert_weights_prior`.
#[derive(Debug)]
pub struct MonteCLoRA {
    name: String,
    pair: LowRank,
    posterior: Posterior,
    buffer: SampleBuffer,
    membership: Option<GroupMembership>,
}

impl MonteCLoRA {
    /// Creates the adapter's parameters `{path}.{adapter}.a`, `.b`, `.std_prior` and
    /// `.expert_weights_prior` in the store.
    ///
    /// # Errors
    /// If an option is outside its domain (rank 0 included), or a name is taken. The store is then unchanged.
    pub fn new(
        params: &Params,
        path: &str,
        adapter: &str,
        (in_dim, out_dim): (usize, usize),
        config: &MonteCLoRAConfig,
    ) -> Result<Self> {
        config.validate()?;
        let name = format!("{path}.{adapter}");
        params.all_or_none(&format!("{name}."), || Self::create(params, &name, (in_dim, out_dim), config))
    }

    /// [`Self::new`] for a layer of a model; the layers in `group` make their draws together.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub(crate) fn in_group(
        group: &Arc<DrawGroup>,
        params: &Params,
        path: &str,
        adapter: &str,
        dims: (usize, usize),
        config: &MonteCLoRAConfig,
    ) -> Result<Self> {
        let alone = Self::new(params, path, adapter, dims, config)?;
        let (name, mean, posterior) = (alone.name.clone(), alone.pair.a().clone(), alone.posterior.clone());
        Ok(Self {
            membership: Some(GroupMembership::new(group, GroupMember { name, mean, posterior })),
            ..alone
        })
    }

    fn create(
        params: &Params,
        name: &str,
        (in_dim, out_dim): (usize, usize),
        config: &MonteCLoRAConfig,
    ) -> Result<Self> {
        let pair =
            LowRank::new(params, name, (in_dim, out_dim), config.rank, config.scaling(), config.dropout)?;
        let std_prior = params.create(
            &format!("{name}.std_prior"),
            Role::LogStd,
            config.rank,
            &config.initial_std.of_log(),
        )?;
        let expert_weights_prior = params.create(
            &format!("{name}.expert_weights_prior"),
            Role::Concentration,
            config.num_components,
            &config.initial_concentration.of_log(),
        )?;
        let spec = DrawSpec::new(config, in_dim, params.dtype(), params.device());
        let streams = NoiseStreams::new(params.noise(), name);
        // On the CPU, making a draw's noise is faster than fetching it from a buffer: see `SampleBuffer`.
        let size = if params.device().is_cpu() { 0 } else { config.buffer_size };
        let buffer = SampleBuffer::new(spec.clone(), streams.clone(), size, config.buffer_bytes);
        let posterior = Posterior::new(&std_prior, &expert_weights_prior, spec, streams)?;
        Ok(Self { name: name.to_string(), pair, posterior, buffer, membership: None })
    }

    /// The prefix of the parameters' names, `{path}.{adapter}`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A, B and their scale.
    pub fn low_rank(&self) -> &LowRank {
        &self.pair
    }

    /// The variational parameters.
    pub fn posterior(&self) -> &Posterior {
        &self.posterior
    }

    /// The variational parameters, to change the sample scaler.
    pub fn posterior_mut(&mut self) -> &mut Posterior {
        &mut self.posterior
    }

    /// The sample buffer.
    pub fn buffer(&self) -> &SampleBuffer {
        &self.buffer
    }

    /// The sample buffer, to resize it.
    pub fn buffer_mut(&mut self) -> &mut SampleBuffer {
        &mut self.buffer
    }

    /// Computes the draw of the context's pass step by step, as it is defined; `None` at the mean.
    ///
    /// # Errors
    /// If candle fails.
    pub fn draw(&self, cx: &Context) -> candle_core::Result<Option<PosteriorDraw>> {
        let Some(draw) = cx.pass.posterior_draw()? else { return Ok(None) };
        draw::reference(&self.posterior, &self.buffer.get(draw)?, self.eps(cx) * cx.pass.sign()).map(Some)
    }

    /// Computes the A of a pass, `(r, in_dim)`: the mean, or the mean with the draw's perturbation added.
    ///
    /// # Errors
    /// If candle fails.
    pub fn effective_a(&self, cx: &Context) -> candle_core::Result<Cow<'_, Tensor>> {
        let mean = self.pair.a();
        cx.drawn(mean, self.eps(cx), |draw, eps| {
            let asked = DrawRequest { posterior: &self.posterior, mean, eps };
            draw::perturbed(&asked, draw, &self.buffer, self.membership.as_ref(), cx)
        })
    }

    /// The scale eps of the perturbation in this context.
    pub(super) fn eps(&self, cx: &Context) -> f64 {
        group::eps(&self.posterior, &self.name, cx)
    }
}

impl Adapter for MonteCLoRA {
    fn forward(&self, xs: &Tensor, base: &BaseLinear, cx: &Context) -> candle_core::Result<Tensor> {
        self.pair.forward(xs, base, self.effective_a(cx)?.as_ref(), cx)
    }

    fn parameters(&self) -> Vec<(Role, Tensor)> {
        vec![
            (Role::A, self.pair.a().clone()),
            (Role::B, self.pair.b().clone()),
            (Role::LogStd, self.posterior.std_prior().clone()),
            (Role::Concentration, self.posterior.expert_weights_prior().clone()),
        ]
    }

    fn delta(&self, _base: &BaseLinear, cx: &Context) -> candle_core::Result<Option<Tensor>> {
        self.pair.delta_of(self.effective_a(cx)?.as_ref()).map(Some)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
