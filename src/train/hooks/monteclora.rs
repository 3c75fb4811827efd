//! MonteCLoRA: its regulariser in the loss, and the schedule of its sample scaler.

use std::collections::BTreeMap;
use std::sync::Mutex;

use candle_core::Tensor;

use super::hook::{locked, Hook, StepDone};
use crate::adapter::{AdaptableModel, Context, Params};
use crate::error::Result;
use crate::monteclora::{MonteCLoRAConfig, Regularizer, SampleScaler};
use crate::ops::{self, joined};
use crate::train::objective::Loss;

#[derive(Debug)]
pub(super) struct PosteriorHook {
    regularizer: Regularizer,
    scaler: Mutex<SampleScaler>,
}

impl PosteriorHook {
    pub fn new(config: &MonteCLoRAConfig, params: &Params) -> Result<Self> {
        let scaler = Mutex::new(SampleScaler::new(config.scaler_schedule));
        Ok(Self { regularizer: Regularizer::new(config).with_start(params)?, scaler })
    }
}

impl Hook for PosteriorHook {
    fn loss(
        &self,
        task: Tensor,
        model: &dyn AdaptableModel,
        cx: &Context,
        rows: Option<f64>,
    ) -> Result<Loss> {
        let penalty = self.regularizer.for_model_on(model, cx, rows)?;
        let total = joined(Some(task.clone()), penalty.total)?;
        let mut terms = vec![
            ("task", task),
            ("kl_gaussian", penalty.kl_gaussian),
            ("kl_wishart", penalty.kl_wishart),
            ("kl_dirichlet", penalty.kl_dirichlet),
            ("cooperative", penalty.cooperative),
        ];
        terms.extend(penalty.prior.map(|prior| ("prior", prior)));
        terms.extend(penalty.kl_mean.map(|kl| ("kl_mean", kl)));
        Ok(Loss { total, terms })
    }

    fn context(&self, cx: &Context) -> Result<Context> {
        Ok(cx.clone().with_scaler_factors(locked(&self.scaler)?.factors()))
    }

    fn before_step(&self, step: usize, total: usize) -> Result<()> {
        locked(&self.scaler)?.before_step(step, total)
    }

    fn after_step(&self, done: &StepDone) -> Result<()> {
        locked(&self.scaler)?.after_step(done.model, &|name| {
            // A frozen A (post hoc) has no gradient, and thus no signal that could fade.
            done.gradients.get(name)?.map_or(Ok(0.0), |gradient| Ok(ops::sum_of_squares(&gradient)?))
        })
    }

    fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        locked(&self.scaler)?.state()
    }

    fn restore(&self, model: &dyn AdaptableModel, state: &BTreeMap<String, Tensor>) -> Result<()> {
        locked(&self.scaler)?.restore(model, state)
    }
}
