//! What the released code of the paper's authors trains, for comparison: LoRA whose A is frozen at its random
//! start and takes a small random walk.
//!
//! ```text
//! A_t = A_{t-1} + eps^2 sum_k pi_k F_t Z_k        before the forward pass of training step t
//! y   = W0 x + b + s B A_t dropout(x)             A_t a constant; prediction uses the last A
//! ```
//!
//! In that code, each training forward replaces A by a new parameter `A + eps sum_k pi_k (eps F Z_k)`. The
//! optimiser still holds the old parameter and so never moves A. A therefore moves only by `mu <- W`, the
//! last line of algorithm 1; the scaler is applied twice; and the task gives no gradient to rho and c, which
//! learn from the regulariser alone.
//!
//! Here a forward pass changes no state: [`ReleasedWalk`] moves A between two forward passes, once per
//! optimiser step (in the released code once per micro-batch), by the draw whose index is the step's number
//! minus one. A checkpoint stores the current A, and so the state of the walk.

use std::any::Any;

use candle_core::Tensor;

use super::config::MonteCLoRAConfig;
use super::layer::MonteCLoRA;
use super::posterior::Posterior;
use super::regularizer::{Regularizer, RegularizerTerms};
use super::schedule::ScalerSchedule;
use crate::adapter::{no_active, visit_active, AdaptableModel, Adapter, BaseLinear, Context, Params, Role};
use crate::error::{Error, Result};

impl MonteCLoRAConfig {
    /// The constants of the authors' released code: PEFT's numbers ([`super::Compat::Peft`]) with the paper's
    /// eps, N, prior and cooperative loss.
    pub const fn released() -> Self {
        Self {
            num_components: 4,
            sample_scaler: 5e-3,
            dirichlet_prior: 1.0,
            cooperative_weight: 1.0,
            ..Self::peft()
        }
    }
}

/// The adapter of one linear layer as in the authors' released code.
#[derive(Debug)]
pub struct Released {
    inner: MonteCLoRA,
}

impl Released {
    /// Creates the parameters of [`MonteCLoRA::new`]. `.a` gets no gradient.
    ///
    /// # Errors
    /// As [`MonteCLoRA::new`].
    pub fn new(
        params: &Params,
        path: &str,
        adapter: &str,
        dims: (usize, usize),
        config: &MonteCLoRAConfig,
    ) -> Result<Self> {
        Ok(Self { inner: MonteCLoRA::new(params, path, adapter, dims, config)? })
    }

    /// The MonteCLoRA adapter that holds the parameters and makes the draws.
    pub fn inner(&self) -> &MonteCLoRA {
        &self.inner
    }
}

impl Adapter for Released {
    fn forward(&self, xs: &Tensor, base: &BaseLinear, cx: &Context) -> candle_core::Result<Tensor> {
        let pair = self.inner.low_rank();
        pair.forward(xs, base, &pair.a().detach(), cx)
    }

    fn parameters(&self) -> Vec<(Role, Tensor)> {
        self.inner.parameters().into_iter().filter(|(role, _)| *role != Role::A).collect()
    }

    /// The change with A itself, in every pass: the walk has already moved A.
    fn delta(&self, _base: &BaseLinear, _cx: &Context) -> candle_core::Result<Option<Tensor>> {
        self.inner.low_rank().delta().map(Some)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// The random walk of a model's [`Released`] layers, and their regulariser.
#[derive(Debug)]
pub struct ReleasedWalk {
    layers: Vec<(String, Posterior)>,
    regularizer: Regularizer,
    params: Params,
}

impl ReleasedWalk {
    /// Creates the walk of the active layers of `model`, whose parameters are in `params`.
    ///
    /// # Errors
    /// If there is no such layer, or eps has a schedule.
    pub fn new(model: &dyn AdaptableModel, config: &MonteCLoRAConfig, params: &Params) -> Result<Self> {
        let mut layers = Vec::new();
        visit_active(model, |Released { inner }| {
            layers.push((inner.name().to_string(), inner.posterior().clone()));
            Ok(())
        })?;
        if config.scaler_schedule != ScalerSchedule::Constant {
            return Err(Error::config("scaler_schedule", "the released code has no schedule: use constant"));
        }
        if layers.is_empty() {
            return Err(no_active("released MonteCLoRA"));
        }
        Ok(Self { layers, regularizer: Regularizer::new(config), params: params.clone() })
    }

    /// Moves every A by its draw, before optimiser step `step` (1-based).
    ///
    /// # Errors
    /// If the store lacks an A, or an A would not be finite.
    pub fn before_step(&self, step: usize) -> Result<()> {
        let draw = step.saturating_sub(1) as u64;
        for (name, posterior) in &self.layers {
            let name = format!("{name}.a");
            let a = self.params.require(&name)?;
            let noise = posterior.spec().generate(posterior.streams(), draw)?;
            // The draw already contains eps once; the released code applies it twice.
            let step = (posterior.draw(&noise)?.delta.detach() * posterior.sample_scaler())?;
            self.params.set(&name, &(a.var.as_detached_tensor() + step)?)?;
        }
        Ok(())
    }

    /// Computes the regulariser, the only loss that trains rho and c.
    ///
    /// # Errors
    /// As [`Regularizer::of`].
    pub fn penalty(&self, cx: impl Into<Context>) -> Result<RegularizerTerms> {
        let posteriors: Vec<_> = self.layers.iter().map(|(_, posterior)| posterior.clone()).collect();
        self.regularizer.of(&posteriors, cx)
    }
}
