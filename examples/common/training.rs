//! Command-line options of the training that the fine-tuning examples share.

use std::path::Path;

use candle_core::DType;
use monteclora::optim::IvonConfig;
use monteclora::train::{
    fingerprint, Checkpoints, LrRatios, Method, MethodInit, MethodName, OnNonFinite, Schedule, Settings,
    TrainConfig,
};
use monteclora::util::files;

use super::given::Given;
use super::Outcome;

// How to train.
#[derive(clap::Args, Clone)]
#[command(next_help_heading = "Training")]
pub struct TrainOptions {
    /// Passes over the training rows.
    #[arg(long, default_value_t = 3)]
    pub epochs: usize,
    /// End after this many steps if --epochs has more; the schedules span these steps.
    #[arg(long)]
    pub max_steps: Option<usize>,
    /// Micro-batches per step, over all processes. Default: one per process.
    #[arg(long)]
    pub accumulation: Option<usize>,
    /// Use one draw of posterior and dropout for all micro-batches of a step, as for the rows of one batch.
    #[arg(long)]
    pub shared_draw: bool,
    /// The peak learning rate. Default: 3e-4; for the small bundled models 2e-3 (glue) and 5e-3 (llama).
    #[arg(long)]
    pub lr: Option<f64>,
    /// B's learning rate as a multiple of A's (LoRA+). Default: 4 with a prior on the head, else 1.
    #[arg(long)]
    pub loraplus_ratio: Option<f64>,
    /// Use IVON with its default constants instead of AdamW.
    #[arg(long)]
    pub ivon: bool,
    /// The task head's learning rate as a multiple of A's. Default: 10 with a prior on the head, else 1.
    #[arg(long)]
    pub head_lr_ratio: Option<f64>,
    /// The learning rate of the posterior's own parameters as a multiple of A's.
    #[arg(long, default_value_t = 1.0)]
    pub variational_lr_ratio: f64,
    /// The learning-rate schedule after the warm-up: constant, linear (to zero) or cosine (to zero).
    #[arg(long, default_value = "linear")]
    pub schedule: String,
    /// The share of all steps in which the learning rate rises from zero.
    #[arg(long, default_value_t = 0.06)]
    pub warmup_ratio: f64,
    /// Decoupled weight decay of AdamW.
    #[arg(long, default_value_t = 0.01)]
    pub weight_decay: f64,
    /// AdamW's decay rate of the running mean of gradients.
    #[arg(long, default_value_t = 0.9)]
    pub adam_beta1: f64,
    /// AdamW's decay rate of the running mean of squared gradients.
    #[arg(long, default_value_t = 0.999)]
    pub adam_beta2: f64,
    /// What AdamW adds to the square root of the second moment.
    #[arg(long, default_value_t = 1e-8)]
    pub adam_eps: f64,
    /// Do not decay one-dimensional parameters (biases, scales of norms), as in the trainer of transformers.
    #[arg(long)]
    pub no_vector_decay: bool,
    /// The maximum global gradient norm; 0 disables clipping.
    #[arg(long, default_value_t = 1.0)]
    pub clip: f64,
    /// Batch rows of similar lengths together.
    #[arg(long)]
    pub length_grouped: bool,
    /// The seed of new weights, row order, dropout and draws: the same seed gives the same run.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Train on this many rows: the first ones, or of your own table a draw by the seed, stratified by label.
    #[arg(long)]
    pub limit_train: Option<usize>,
    /// Steps between evaluations. Default: one evaluation per epoch.
    #[arg(long)]
    pub eval_every: Option<usize>,
    /// Stop after this many consecutive evaluations that do not improve on the best.
    #[arg(long)]
    pub patience: Option<usize>,
    /// Keep the last parameters instead of those of the best evaluation.
    #[arg(long)]
    pub keep_last: bool,
    /// Keep only each layer's input and recompute the layer in the backward pass: less memory for up to 1.6
    /// times the time.
    #[arg(long)]
    pub checkpoint_layers: bool,
    /// What to do with a step whose loss or gradient is not finite: stop or skip.
    #[arg(long, default_value = "stop")]
    pub on_nonfinite: String,
    /// Also write TensorBoard event files to OUT/tensorboard.
    #[arg(long, requires = "output", help_heading = "Checkpoints and logs")]
    pub tensorboard: bool,
    /// With --output: steps between checkpoints. Default: one at each evaluation.
    #[arg(long, help_heading = "Checkpoints and logs")]
    pub checkpoint_every: Option<usize>,
    /// The number of newest checkpoints to keep.
    #[arg(long, default_value_t = 2, help_heading = "Checkpoints and logs")]
    pub keep: usize,
    /// Resume from the checkpoints below --output, if there are any.
    #[arg(long, requires = "output", help_heading = "Checkpoints and logs")]
    pub resume: bool,
    /// Settings, separated by commas, that may differ from the checkpoint's.
    #[arg(long, value_delimiter = ',', requires = "resume", help_heading = "Checkpoints and logs")]
    pub allow_change: Vec<String>,
}

impl TrainOptions {
    /// Warns about given options that the methods with these names do not read.
    pub fn tell_unread(&self, given: &Given, names: &[MethodName], output: bool) {
        let names = || names.iter().copied();
        if self.ivon {
            let of_adamw =
                ["weight_decay", "clip", "adam_beta1", "adam_beta2", "adam_eps", "no_vector_decay"];
            given.without_effect(&of_adamw, "it only applies to AdamW, and --ivon has its own");
        }
        if !names().any(MethodName::has_rank) {
            given.without_effect(&["loraplus_ratio"], "the method has no B");
        }
        if !names().any(MethodName::is_monteclora) {
            given.without_effect(
                &["variational_lr_ratio"],
                "only monteclora's posterior has a rate of its own",
            );
        }
        if !output {
            given.without_effect(&["checkpoint_every", "keep"], "without --output there are no checkpoints");
        }
    }

    /// The training configuration of a run of `method` on a base of dtype `base` in `world` processes.
    pub fn config(
        &self,
        default_lr: f64,
        method: &Method,
        base: DType,
        world: usize,
    ) -> Outcome<TrainConfig> {
        if self.clip.is_nan() || self.clip < 0.0 {
            return Err(format!("--clip: expected a norm, or 0 for no clipping, got {}", self.clip).into());
        }
        // IVON has a single learning rate for all parameters.
        let ratios = if self.ivon { LrRatios { b: 1.0, head: 1.0 } } else { method.lr_ratios() };
        Ok(TrainConfig {
            epochs: self.epochs,
            max_steps: self.max_steps,
            lr: self.lr.unwrap_or(default_lr),
            schedule: self.schedule.parse::<Schedule>()?,
            warmup_ratio: self.warmup_ratio,
            weight_decay: self.weight_decay,
            adam_beta1: self.adam_beta1,
            adam_beta2: self.adam_beta2,
            adam_eps: self.adam_eps,
            decay_vectors: !self.no_vector_decay,
            loraplus_ratio: self.loraplus_ratio.unwrap_or(ratios.b),
            head_lr_ratio: self.head_lr_ratio.unwrap_or(ratios.head),
            variational_lr_ratio: self.variational_lr_ratio,
            ivon: self.ivon.then(IvonConfig::default),
            clip: (self.clip > 0.0).then_some(self.clip),
            accumulation: self.accumulation.unwrap_or(world),
            shared_draw: self.shared_draw,
            eval_every: self.eval_every,
            keep_best: !self.keep_last,
            patience: self.patience,
            // Small gradients are lost in f16.
            loss_scale: if base == DType::F16 && !self.ivon { 1024.0 } else { 1.0 },
            on_nonfinite: self.on_nonfinite.parse::<OnNonFinite>()?,
            ..TrainConfig::default()
        })
    }

    /// Whether the run writes its adapter or model. `--epochs 0` only measures: it writes an adapter that it
    /// was given, for example in another format, but not an untrained one. It is an error to measure into the
    /// folder of a trained run, whose results would be replaced.
    pub fn writes(&self, start: &MethodInit, out: Option<&Path>) -> Outcome<bool> {
        match out.map(|dir| dir.join("checkpoints")).filter(|dir| files::has_entries(dir)) {
            Some(checkpoints) if self.epochs == 0 => {
                let reason = "only measures, but this folder holds a trained run: give another --output";
                Err(format!("--epochs 0 {reason} ({})", checkpoints.display()).into())
            }
            _ => Ok(self.epochs > 0 || !matches!(start, MethodInit::Fresh(..))),
        }
    }

    /// The checkpoints of a run below `out`. To be resumed, it must have the same model and held-out rows, in
    /// addition to what the library compares.
    pub fn checkpoints(
        &self,
        out: &Path,
        model: &str,
        held_out: impl IntoIterator<Item = u32>,
    ) -> Checkpoints {
        let settings = [("model", model.to_string()), ("held_out", fingerprint(held_out))];
        let settings = settings.map(|(name, value)| (name.to_string(), value));
        Checkpoints {
            keep: self.keep,
            every: self.checkpoint_every,
            resume: self.resume,
            settings: Settings::from(settings),
            changes: self.allow_change.clone(),
            ..Checkpoints::new(out.join("checkpoints"))
        }
    }

    /// The first rows, up to the limit of `--limit-train`.
    pub fn limit<'a, T>(&self, rows: &'a [T]) -> &'a [T] {
        &rows[..self.limit_train.unwrap_or(usize::MAX).min(rows.len())]
    }
}
