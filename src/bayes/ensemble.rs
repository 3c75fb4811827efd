//! Predictive averages over the dropout masks or the checkpoints of a training.
//!
//! ```text
//! p(y | x) = 1/M sum_m softmax(f(x; theta_m))
//! ```
//!
//! Gal and Ghahramani 2016, "Dropout as a Bayesian approximation"; Lakshminarayanan et al. 2017,
//! "Simple and scalable predictive uncertainty estimation using deep ensembles".

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::parameter_draws::ParameterDraws;
use crate::adapter::{Context, Params, Pass};
use crate::data::batch::Batch;
use crate::error::{Error, Result};
use crate::predict::{posterior_draws, posterior_probabilities, Predictor};

/// MC dropout: posterior draw s is a training pass, with dropout mask s.
///
/// A MonteCLoRA adapter also samples its posterior in a training pass, so its draws then combine both. A mask
/// depends on the draw and the position in the batch: two batches of the same shape get the same masks.
#[derive(Clone, Copy)]
pub struct McDropout<'a>(pub &'a dyn Predictor);

impl std::fmt::Debug for McDropout<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("McDropout")
    }
}

impl Predictor for McDropout<'_> {
    fn predict(&self, batch: &Batch, cx: &Context) -> candle_core::Result<Tensor> {
        match cx.pass {
            Pass::Posterior { draw } => self.0.predict(batch, &cx.clone().with_pass(Pass::Train { draw })),
            _ => self.0.predict(batch, cx),
        }
    }
}

/// An ensemble of checkpoints of one model, from one or several runs. It holds copies of the parameters.
#[derive(Debug, Clone, Default)]
pub struct Ensemble {
    members: Vec<BTreeMap<String, Tensor>>,
}

impl Ensemble {
    /// An ensemble without members.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a copy of the current parameters.
    ///
    /// # Errors
    /// If candle cannot copy them.
    pub fn push(&mut self, params: &Params) -> Result<()> {
        self.members.push(params.snapshot()?);
        Ok(())
    }

    /// Adds a [`Params::snapshot`].
    pub fn push_snapshot(&mut self, snapshot: BTreeMap<String, Tensor>) {
        self.members.push(snapshot);
    }

    /// The number of members.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Whether the ensemble has no member.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// Returns class probabilities, one row per example, averaged over the members after the softmax.
    /// `params` are the parameters of `model` and are unchanged afterwards, also on error. No layer may be
    /// merged, since a merged layer does not read its adapter's parameters.
    ///
    /// # Errors
    /// If there is no member, a member does not fit the parameters, or the forward pass fails.
    pub fn probabilities(
        &self,
        model: &dyn Predictor,
        params: &Params,
        batches: &[Batch],
    ) -> Result<Vec<Vec<f64>>> {
        posterior_probabilities(&self.as_draws(model, params)?, batches, self.len())
    }

    /// Returns the class probabilities of each member, `(m, n, c)`; [`Self::probabilities`] is their mean.
    ///
    /// # Errors
    /// As [`Self::probabilities`].
    pub fn draws(
        &self,
        model: &dyn Predictor,
        params: &Params,
        batches: &[Batch],
    ) -> Result<Vec<Vec<Vec<f64>>>> {
        posterior_draws(&self.as_draws(model, params)?, batches, self.len())
    }

    fn as_draws<'a>(&self, model: &'a dyn Predictor, params: &'a Params) -> Result<ParameterDraws<'a>> {
        if self.members.is_empty() {
            return Err(Error::config("ensemble", "it has no member to average"));
        }
        Ok(ParameterDraws::new(model, params, self.members.clone()))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::adapter::{Init, Role};
    use crate::data::encode::Encoded;
    use crate::data::task::Label;
    use crate::metrics::softmax;
    use crate::noise::Noise;
    use crate::predict::{logits, posterior_scores};

    /// Predicts the logits `(id * w, draw)`, with the draw of a training pass and -1 in other passes.
    struct Scaled(Tensor);

    impl Predictor for Scaled {
        fn predict(&self, batch: &Batch, cx: &Context) -> candle_core::Result<Tensor> {
            let draw = cx.pass.dropout_draw().map_or(-1.0, |draw| draw as f64);
            let ids = batch.input_ids.narrow(1, 0, 1)?.to_dtype(DType::F64)?.broadcast_mul(&self.0)?;
            if ids.max_all()?.to_scalar::<f64>()? > 100.0 {
                candle_core::bail!("too large")
            }
            Tensor::cat(&[&ids, &(ids.zeros_like()? + draw)?], 1)
        }
    }

    fn toy() -> Result<(Scaled, Params, Vec<Batch>)> {
        let params = Params::with_dtype(Noise::new(0), DType::F64, &Device::Cpu);
        let w = params.create("w", Role::Head, (1, 1), &Init::Constant(0.5))?;
        let rows = [2, 1].map(|id| Encoded {
            ids: vec![id],
            type_ids: vec![0],
            label: Label::Class(0),
            row: id as usize,
        });
        let batch = |row| Batch::collate(&[row], 0, &Device::Cpu);
        Ok((Scaled(w), params, vec![batch(&rows[0])?, batch(&rows[1])?]))
    }

    fn set(params: &Params, value: f64) -> Result<()> {
        params.set("w", &Tensor::new(&[[value]], &Device::Cpu)?)
    }

    #[test]
    fn a_draw_of_dropout_is_a_training_pass() -> Result<()> {
        let (model, _, batches) = toy()?;
        let dropped = McDropout(&model);
        assert_eq!(posterior_scores(&model, &batches, 3)?, [[1.0, -1.0], [0.5, -1.0]]);
        assert_eq!(posterior_scores(&dropped, &batches, 3)?, [[1.0, 1.0], [0.5, 1.0]]);
        assert_eq!(
            logits(&dropped, &batches, &Pass::Mean.into())?,
            logits(&model, &batches, &Pass::Mean.into())?
        );
        Ok(())
    }

    #[test]
    fn members_are_averaged_after_the_softmax_and_the_model_is_as_before() -> Result<()> {
        let (model, params, batches) = toy()?;
        let mut ensemble = Ensemble::new();
        for value in [-1.0, 2.0, 0.25] {
            set(&params, value)?;
            ensemble.push(&params)?;
        }
        set(&params, 7.0)?;
        let got = ensemble.probabilities(&model, &params, &batches)?;
        for (row, id) in got.iter().zip([2.0, 1.0]) {
            // The second logit is -1.
            let one = |w: f64| 1.0 / (1.0 + (-1.0 - id * w).exp());
            let expected = (one(-1.0) + one(2.0) + one(0.25)) / 3.0;
            assert!((row[0] - expected).abs() < 1e-12 && (row[0] + row[1] - 1.0).abs() < 1e-12, "{row:?}");
        }
        let draws = ensemble.draws(&model, &params, &batches)?;
        assert_eq!(draws.len(), 3);
        for (i, row) in got.iter().enumerate() {
            assert_eq!(row[0], (draws[0][i][0] + draws[1][i][0] + draws[2][i][0]) / 3.0);
        }
        assert_eq!(logits(&model, &batches, &Pass::Mean.into())?[0][0], 14.0);
        Ok(())
    }

    #[test]
    fn what_a_member_does_not_say_is_the_models_own() -> Result<()> {
        let (model, params, batches) = toy()?;
        let mut ensemble = Ensemble::new();
        set(&params, 2.0)?;
        ensemble.push(&params)?;
        ensemble.push_snapshot(BTreeMap::new());
        set(&params, 0.25)?;
        let draws = ensemble.draws(&model, &params, &batches)?;
        assert_eq!(draws[1][0], softmax(&[0.5, -1.0]));
        Ok(())
    }

    #[test]
    fn an_error_leaves_the_model_as_before_too() -> Result<()> {
        let (model, params, batches) = toy()?;
        let mut ensemble = Ensemble::new();
        assert!(ensemble.is_empty());
        let error = ensemble.probabilities(&model, &params, &batches).unwrap_err().to_string();
        assert!(error.contains("no member"), "{error}");
        set(&params, 200.0)?;
        ensemble.push(&params)?;
        set(&params, 3.0)?;
        let error = ensemble.probabilities(&model, &params, &batches).unwrap_err().to_string();
        assert!(error.contains("too large"), "{error}");
        assert_eq!(logits(&model, &batches, &Pass::Mean.into())?[0][0], 6.0);
        // After a member that fits.
        let mut ensemble = Ensemble::new();
        ensemble.push(&params)?;
        ensemble.push_snapshot(BTreeMap::from([("other".to_string(), Tensor::new(1f64, &Device::Cpu)?)]));
        assert_eq!(ensemble.len(), 2);
        let error = ensemble.probabilities(&model, &params, &batches).unwrap_err().to_string();
        assert!(error.contains("tensor other: there is no parameter of this name"), "{error}");
        assert_eq!(logits(&model, &batches, &Pass::Mean.into())?[0][0], 6.0);
        Ok(())
    }
}
