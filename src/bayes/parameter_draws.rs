//! Posterior draws in the form of parameters, which replace the model's own during a prediction.

use std::collections::BTreeMap;

use candle_core::Tensor;

use crate::adapter::{Context, Params, Pass};
use crate::data::batch::Batch;
use crate::error::{Error, Result};
use crate::predict::Predictor;

/// A model whose posterior draw s is the s-th of the given parameter sets. Other passes use the model's own
/// parameters.
///
/// The model's parameters are restored after every batch, also on error.
pub struct ParameterDraws<'a> {
    model: &'a dyn Predictor,
    params: &'a Params,
    draws: Vec<BTreeMap<String, Tensor>>,
}

impl std::fmt::Debug for ParameterDraws<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ParameterDraws").field("draws", &self.draws.len()).finish_non_exhaustive()
    }
}

impl<'a> ParameterDraws<'a> {
    /// Combines `model`, whose parameters are `params`, with draws of some or all of them. Unmerge merged
    /// layers first: they do not read their adapters' parameters.
    pub fn new(model: &'a dyn Predictor, params: &'a Params, draws: Vec<BTreeMap<String, Tensor>>) -> Self {
        Self { model, params, draws }
    }

    fn at(&self, draw: u64, batch: &Batch, cx: &Context) -> Result<Tensor> {
        let drawn = usize::try_from(draw).ok().and_then(|draw| self.draws.get(draw));
        let drawn = drawn.ok_or_else(|| {
            let reason = format!("expected less than {}, got {draw}", self.draws.len());
            Error::config("draw", reason)
        })?;
        let before = self.params.snapshot()?;
        self.params.restore(drawn)?;
        let outputs = self.model.predict(batch, &cx.clone().with_pass(Pass::Mean));
        self.params.restore(&before)?;
        Ok(outputs?)
    }
}

impl Predictor for ParameterDraws<'_> {
    fn predict(&self, batch: &Batch, cx: &Context) -> candle_core::Result<Tensor> {
        match cx.pass {
            Pass::Posterior { draw } => Ok(self.at(draw, batch, cx)?),
            _ => self.model.predict(batch, cx),
        }
    }
}
