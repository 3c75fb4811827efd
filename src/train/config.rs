//! The settings of a training run.

use std::str::FromStr;

use serde::Serialize;

use super::schedule::Schedule;
use super::settings::Settings;
use crate::adapter::{Params, Role};
use crate::error::{Error, Result};
use crate::optim::{AdamW, AdamWConfig, Ivon, IvonConfig, Optimizer};
use crate::util::check::{at_least_one, not_negative, positive};

/// What to do with a step whose loss or gradient is not finite.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum OnNonFinite {
    /// End the run.
    #[default]
    Stop,
    /// Skip and count the step: parameters and moments stay as they are. Ten skipped steps in a row end the
    /// run, as it would not recover.
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

/// The settings of a training run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TrainConfig {
    /// The number of passes over the data.
    pub epochs: usize,
    /// The largest number of steps: a run of more ends there, and its schedules span these steps. If absent, it
    /// takes all steps of its epochs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<usize>,
    /// The peak learning rate.
    pub lr: f64,
    /// The schedule of the learning rate.
    pub schedule: Schedule,
    /// The share of all steps in which the learning rate rises from zero.
    pub warmup_ratio: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// AdamW's decay rate of the running mean of gradients.
    #[serde(skip_serializing_if = "is_default_beta1")]
    pub adam_beta1: f64,
    /// AdamW's decay rate of the running mean of squared gradients.
    #[serde(skip_serializing_if = "is_default_beta2")]
    pub adam_beta2: f64,
    /// What AdamW adds to the square root of the second moment.
    #[serde(skip_serializing_if = "is_default_eps")]
    pub adam_eps: f64,
    /// Whether one-dimensional parameters (biases, scales of norms) are decayed, as PyTorch's AdamW does and the
    /// trainer of transformers does not.
    #[serde(skip_serializing_if = "is_true")]
    pub decay_vectors: bool,
    /// Whether the posterior's parameters rho and c are decayed as well, as they are when transformers trains
    /// PEFT's adapter.
    pub decay_variational: bool,
    /// The learning rate of B as a multiple of A's (LoRA+).
    pub loraplus_ratio: f64,
    /// The learning rate of a task's head as a multiple of A's.
    #[serde(skip_serializing_if = "is_one")]
    pub head_lr_ratio: f64,
    /// The learning rate of the posterior's parameters rho and c as a multiple of A's.
    #[serde(skip_serializing_if = "is_one")]
    pub variational_lr_ratio: f64,
    /// The settings of IVON; if absent, the optimiser is AdamW. IVON has one learning rate and its own weight
    /// decay: the ratios, [`Self::weight_decay`] and the constants of AdamW do not apply to it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ivon: Option<IvonConfig>,
    /// The largest global gradient norm; no clipping if absent. IVON clips each element instead.
    pub clip: Option<f64>,
    /// The number of micro-batches in an optimiser step, summed over all processes.
    pub accumulation: usize,
    /// Whether the micro-batches of a step share one posterior draw, like the rows of one larger batch.
    /// Dropout is also addressed by the draw, so that its masks are the same in each micro-batch.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub shared_draw: bool,
    /// Steps between evaluations; if absent, the model is evaluated at the end of each epoch.
    pub eval_every: Option<usize>,
    /// Whether to keep the parameters of the best evaluation rather than the last.
    pub keep_best: bool,
    /// The number of consecutive evaluations without improvement after which the run ends normally, with its
    /// best parameters unless [`Self::keep_best`] is off. If absent, the run goes to its last step. The
    /// learning rate schedule always spans all steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub patience: Option<usize>,
    /// The factor of the loss before it is differentiated, by which the gradients are divided again. Beside an f16
    /// base a power of two such as 1024 keeps small gradients from underflow; otherwise 1.
    #[serde(skip_serializing_if = "is_one")]
    pub loss_scale: f64,
    /// What to do with a step whose loss or gradient is not finite.
    pub on_nonfinite: OnNonFinite,
}

impl Default for TrainConfig {
    fn default() -> Self {
        let AdamWConfig { beta1, beta2, eps, weight_decay, decay_vectors, .. } = AdamWConfig::default();
        Self {
            epochs: 3,
            max_steps: None,
            lr: 3e-4,
            schedule: Schedule::Linear,
            warmup_ratio: 0.06,
            weight_decay,
            adam_beta1: beta1,
            adam_beta2: beta2,
            adam_eps: eps,
            decay_vectors,
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

/// Checkpoints compare settings as text: omitting the default keeps older checkpoints valid.
#[allow(clippy::trivially_copy_pass_by_ref)] // serde's signature
fn is_one(ratio: &f64) -> bool {
    *ratio == 1.0
}

#[allow(clippy::trivially_copy_pass_by_ref)] // as above
fn is_true(on: &bool) -> bool {
    *on
}

#[allow(clippy::trivially_copy_pass_by_ref)] // as above
fn is_default_beta1(beta1: &f64) -> bool {
    *beta1 == AdamWConfig::default().beta1
}

#[allow(clippy::trivially_copy_pass_by_ref)] // as above
fn is_default_beta2(beta2: &f64) -> bool {
    *beta2 == AdamWConfig::default().beta2
}

#[allow(clippy::trivially_copy_pass_by_ref)] // as above
fn is_default_eps(eps: &f64) -> bool {
    *eps == AdamWConfig::default().eps
}

impl TrainConfig {
    pub(super) fn validate(&self) -> Result<()> {
        let counts = [
            ("epochs", self.epochs),
            ("max_steps", self.max_steps.unwrap_or(1)),
            ("accumulation", self.accumulation),
            ("eval_every", self.eval_every.unwrap_or(1)),
            ("patience", self.patience.unwrap_or(1)),
        ];
        counts.iter().try_for_each(|(name, count)| at_least_one(name, *count))?;
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
            return Err(Error::config("loss_scale", "IVON needs unscaled gradients: expected 1"));
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

    /// Checks that a run in `world` processes can use these settings.
    pub(super) fn validate_for(&self, world: usize) -> Result<()> {
        if world > 1 && self.ivon.is_some() {
            let reason = "IVON's curvature estimates are not summed over processes: train in one process";
            return Err(Error::config("ivon", reason));
        }
        if self.accumulation < world {
            let reason = format!(
                "expected at least one micro-batch for each of {world} processes, got {}",
                self.accumulation
            );
            return Err(Error::config("accumulation", reason));
        }
        Ok(())
    }

    /// Returns every setting by its name.
    pub(super) fn settings(&self) -> Settings {
        match serde_json::to_value(self) {
            Ok(serde_json::Value::Object(fields)) => {
                fields.into_iter().map(|(name, value)| (name, value.to_string())).collect()
            }
            _ => Settings::new(), // a struct of plain values serialises to an object
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
            beta1: self.adam_beta1,
            beta2: self.adam_beta2,
            eps: self.adam_eps,
            weight_decay: self.weight_decay,
            decay_vectors: self.decay_vectors,
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
