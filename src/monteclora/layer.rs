//! The MonteCLoRA adapter of one linear layer.
//!
//! ```text
//! y = W0 x + b + s B (A + Delta) dropout(x),   Delta a draw in training, zero at the mean
//! ```

use std::any::Any;
use std::borrow::Cow;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::Tensor;
use candle_nn::Linear;

use super::buffer::SampleBuffer;
use super::config::{positive, MonteCLoRAConfig};
use super::held::held;
use super::noise::{DrawNoise, NoiseSpec, NoiseStreams};
use super::posterior::{Posterior, PosteriorDraw};
use crate::adapters::LowRank;
use crate::error::Result;
use crate::params::{Params, Role};
use crate::slot::{Adapter, Pass};

/// A low-rank adapter whose A has a posterior: mean A, covariance Wishart, mixture Dirichlet.
///
/// Beyond LoRA's A and B it trains r + N numbers: `std_prior` and `expert_weights_prior`.
#[derive(Debug)]
pub struct MonteCLoRA {
    name: String,
    pair: LowRank,
    posterior: Posterior,
    buffer: SampleBuffer,
    /// The bits of the factor on eps in training draws: set between steps, read within.
    training_factor: AtomicU64,
}

impl MonteCLoRA {
    /// Creates the adapter's parameters `{path}.{adapter}.a`, `.b`, `.std_prior` and
    /// `.expert_weights_prior` in the store.
    ///
    /// # Errors
    /// If an option is outside its domain (rank 0 or above min(in_dim, out_dim) included), or a
    /// name is taken; the store is then as it was.
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
            Role::Scale,
            config.rank,
            &config.initial_std.of_log(),
        )?;
        let expert_weights_prior = params.create(
            &format!("{name}.expert_weights_prior"),
            Role::Concentration,
            config.num_components,
            &config.initial_concentration.of_log(),
        )?;
        let spec = NoiseSpec::new(config, in_dim, params.dtype(), params.device());
        let streams = NoiseStreams::new(params.noise(), name);
        // On the CPU a draw's noise is made faster than it is fetched: see `SampleBuffer`.
        let size = if params.device().is_cpu() { 0 } else { config.buffer_size };
        let buffer = SampleBuffer::new(spec.clone(), streams.clone(), size, config.buffer_bytes);
        let posterior = Posterior::new(&std_prior, &expert_weights_prior, config, spec, streams)?;
        let training_factor = AtomicU64::new(1f64.to_bits());
        Ok(Self { name: name.to_string(), pair, posterior, buffer, training_factor })
    }

    /// The prefix of its parameters' names, `{path}.{adapter}`.
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

    /// The same, to change the sample scaler.
    pub fn posterior_mut(&mut self) -> &mut Posterior {
        &mut self.posterior
    }

    /// The sample buffer.
    pub fn buffer(&self) -> &SampleBuffer {
        &self.buffer
    }

    /// The same, to resize it.
    pub fn buffer_mut(&mut self) -> &mut SampleBuffer {
        &mut self.buffer
    }

    /// Scales eps in training draws, as a schedule does between two steps.
    ///
    /// # Errors
    /// Unless the factor is positive and finite.
    pub fn set_training_factor(&self, factor: f64) -> Result<()> {
        positive("scaler_schedule", factor)?;
        self.training_factor.store(factor.to_bits(), Ordering::Relaxed);
        Ok(())
    }

    /// The posterior that a pass draws from.
    fn posterior_of(&self, pass: &Pass) -> Cow<'_, Posterior> {
        let factor = f64::from_bits(self.training_factor.load(Ordering::Relaxed));
        match pass {
            Pass::Train { .. } if factor != 1.0 => Cow::Owned(self.posterior.scaled(factor)),
            _ => Cow::Borrowed(&self.posterior),
        }
    }

    /// The noise that `pass` addresses; none at the mean.
    ///
    /// # Errors
    /// If candle fails.
    pub fn noise(&self, pass: &Pass) -> candle_core::Result<Option<DrawNoise>> {
        pass.posterior_draw()?.map(|draw| self.buffer.get(draw)).transpose()
    }

    /// The draw that `pass` addresses; none at the mean.
    ///
    /// # Errors
    /// If candle fails.
    pub fn draw(&self, pass: &Pass) -> candle_core::Result<Option<PosteriorDraw>> {
        self.noise(pass)?.map(|noise| self.posterior_of(pass).draw(&noise)).transpose()
    }

    /// The A of a pass, `(r, in_dim)`: the mean, or the mean and the draw's perturbation.
    ///
    /// # Errors
    /// If candle fails.
    pub fn effective_a(&self, pass: &Pass) -> candle_core::Result<Cow<'_, Tensor>> {
        let draw = |draw| self.posterior_of(pass).perturbed_at(self.pair.a(), draw, &self.buffer);
        Ok(match (pass, pass.posterior_draw()?) {
            (_, None) => Cow::Borrowed(self.pair.a()),
            (Pass::Posterior { .. }, Some(at)) => Cow::Owned(held(self.pair.a().id(), at, || draw(at))?),
            (_, Some(at)) => Cow::Owned(draw(at)?),
        })
    }
}

impl Adapter for MonteCLoRA {
    fn forward(&self, xs: &Tensor, base: &Linear, pass: &Pass) -> candle_core::Result<Tensor> {
        self.pair.forward(xs, base, self.effective_a(pass)?.as_ref(), pass)
    }

    fn parameters(&self) -> Vec<(Role, Tensor)> {
        vec![
            (Role::A, self.pair.a().clone()),
            (Role::B, self.pair.b().clone()),
            (Role::Scale, self.posterior.std_prior().clone()),
            (Role::Concentration, self.posterior.expert_weights_prior().clone()),
        ]
    }

    fn delta(&self, _base: &Linear) -> candle_core::Result<Option<Tensor>> {
        self.pair.delta().map(Some)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}
