//! The constants of a run.

use std::str::FromStr;

use serde::Serialize;

use super::schedule::Schedule;
use super::settings::Settings;
use crate::adapter::{Params, Role};
use crate::error::{Error, Result};
use crate::optim::{AdamW, AdamWConfig, Ivon, IvonConfig, Optimizer};
use crate::util::check::{not_negative, positive};

/// What is done with a step whose loss or gradient is not finite.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum OnNonFinite {
    /// It ends the run.
    #[default]
    Stop,
    /// It is left out and counted: parameters and moments stay as they are. Ten in a row end the run:
    /// there is nothing to wait for.
    Skip,
}

impl FromStr for OnNonFinite {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "stop" => Ok(Self::Stop),
            "skip" => Ok(Self::Skip),
            other => Err(Error::config("on_nonfinite", format!("expected stop or skip, got {other}"))),
        }
    }
}

/// The constants of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TrainConfig {
    /// Passes over the data.
    pub epochs: usize,
    /// The highest learning rate.
    pub lr: f64,
    /// Its course.
    pub schedule: Schedule,
    /// The share of all steps in which it rises from zero.
    pub warmup_ratio: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Whether the posterior's own parameters rho and c are decayed, too, as they are where PEFT's
    /// adapter is trained by transformers.
    pub decay_variational: bool,
    /// How many times the learning rate of A that of B is (LoRA+).
    pub loraplus_ratio: f64,
    /// How many times the learning rate of A that of a task's head is.
    #[serde(skip_serializing_if = "is_one")]
    pub head_lr_ratio: f64,
    /// How many times the learning rate of A that of a posterior's own parameters rho and c is.
    #[serde(skip_serializing_if = "is_one")]
    pub variational_lr_ratio: f64,
    /// The constants of IVON, where it is the optimiser and not AdamW. It has one learning rate and its own decay of
    /// weights: ratios and [`Self::weight_decay`] are AdamW's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ivon: Option<IvonConfig>,
    /// The largest global gradient norm; no clipping where absent. IVON clips each element instead.
    pub clip: Option<f64>,
    /// Micro-batches of one optimiser step, over all processes where there are several.
    pub accumulation: usize,
    /// Whether the micro-batches of a step share one draw of the posterior, as the rows of one larger batch do. Dropout,
    /// which is addressed by the draw as well, then drops alike in each of them.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub shared_draw: bool,
    /// Steps between two evaluations; at the end of each epoch where absent.
    pub eval_every: Option<usize>,
    /// Keep the parameters of the best evaluation rather than the last.
    pub keep_best: bool,
    /// How many evaluations in a row may be no better than the best before the run ends, well and with its best
    /// parameters (unless [`Self::keep_best`] is off); it goes to its last step where absent. The schedule of the
    /// learning rate is that of all steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub patience: Option<usize>,
    /// What the loss is multiplied by before it is differentiated, and the gradients divided by after: a power of two
    /// such as 1024 beside a base in f16, where small gradients would be lost, else 1.
    #[serde(skip_serializing_if = "is_one")]
    pub loss_scale: f64,
    /// What is done with a step whose loss or gradient is not finite.
    pub on_nonfinite: OnNonFinite,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            epochs: 3,
            lr: 3e-4,
            schedule: Schedule::Linear,
            warmup_ratio: 0.06,
            weight_decay: 0.01,
            decay_variational: false,
            loraplus_ratio: 1.0,
            head_lr_ratio: 1.0,
            variational_lr_ratio: 1.0,
            ivon: None,
            clip: Some(1.0),
            accumulation: 1,
            shared_draw: false,
            eval_every: None,
            keep_best: true,
            patience: None,
            loss_scale: 1.0,
            on_nonfinite: OnNonFinite::Stop,
        }
    }
}

/// Checkpoints compare settings as text: what is as it always was is not written.
#[allow(clippy::trivially_copy_pass_by_ref)] // as serde asks for it
fn is_one(ratio: &f64) -> bool {
    *ratio == 1.0
}

impl TrainConfig {
    pub(super) fn validate(&self) -> Result<()> {
        let counts = [
            ("epochs", self.epochs),
            ("accumulation", self.accumulation),
            ("eval_every", self.eval_every.unwrap_or(1)),
            ("patience", self.patience.unwrap_or(1)),
        ];
        if let Some((name, _)) = counts.iter().find(|(_, value)| *value == 0) {
            return Err(Error::config(*name, "must be at least 1"));
        }
        let ratios = [
            ("loraplus_ratio", self.loraplus_ratio),
            ("head_lr_ratio", self.head_lr_ratio),
            ("variational_lr_ratio", self.variational_lr_ratio),
        ];
        if let (Some(_), Some((name, ratio))) = (&self.ivon, ratios.iter().find(|(_, ratio)| *ratio != 1.0)) {
            let reason = format!("IVON has one learning rate for all parameters, got a ratio of {ratio}");
            return Err(Error::config(*name, reason));
        }
        if self.ivon.is_some() && self.loss_scale != 1.0 {
            return Err(Error::config("loss_scale", "IVON takes the curvature from gradients as they are"));
        }
        positive("loss_scale", self.loss_scale)?;
        not_negative("lr", self.lr)?;
        // Infinite: as without clipping.
        self.clip.filter(|clip| *clip != f64::INFINITY).map_or(Ok(()), |clip| positive("clip", clip))?;
        if !(0.0..=1.0).contains(&self.warmup_ratio) {
            let reason = format!("expected a share in [0, 1], got {}", self.warmup_ratio);
            return Err(Error::config("warmup_ratio", reason));
        }
        Ok(())
    }

    /// Whether a run in `world` processes can keep to these constants.
    pub(super) fn validate_for(&self, world: usize) -> Result<()> {
        if world > 1 && self.ivon.is_some() {
            let reason = "what IVON draws and observes is not added up over processes: train in one";
            return Err(Error::config("ivon", reason));
        }
        if self.accumulation < world {
            let reason = format!(
                "{} micro-batches of a step for {world} processes: each takes one at least, so {world} or a multiple",
                self.accumulation
            );
            return Err(Error::config("accumulation", reason));
        }
        Ok(())
    }

    /// Every constant by its name.
    pub(super) fn settings(&self) -> Settings {
        match serde_json::to_value(self) {
            Ok(serde_json::Value::Object(fields)) => {
                fields.into_iter().map(|(name, value)| (name, value.to_string())).collect()
            }
            _ => Settings::new(), // a struct of plain values is an object
        }
    }

    pub(super) fn optimizer(&self, params: &Params) -> Result<Optimizer> {
        match &self.ivon {
            Some(config) => Ok(Optimizer::Ivon(Ivon::new(params, config.clone())?)),
            None => Ok(Optimizer::AdamW(AdamW::new(params, self.adamw())?)),
        }
    }

    fn adamw(&self) -> AdamWConfig {
        let config = AdamWConfig {
            lr: self.lr,
            weight_decay: self.weight_decay,
            lr_ratios: vec![
                (Role::B, self.loraplus_ratio),
                (Role::Head, self.head_lr_ratio),
                (Role::LogStd, self.variational_lr_ratio),
                (Role::Concentration, self.variational_lr_ratio),
            ],
            ..AdamWConfig::default()
        };
        if self.decay_variational {
            AdamWConfig { no_decay: Vec::new(), ..config }
        } else {
            config
        }
    }
}
