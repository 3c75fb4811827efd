//! Training: gradients, the optimiser, schedules, the loop, and the
//! classifiers and language models that run through it.

mod causal;
mod checkpoint;
mod classifier;
mod config;
mod evaluate;
mod gradients;
mod memory;
mod method;
mod objective;
mod optim;
mod schedule;
mod settings;
mod trainer;
mod update;
mod upkeep;

pub use causal::{causal_loss, held_out_loss, token_log_probabilities, CausalTuning};
pub use checkpoint::Checkpoints;
pub use classifier::{Classification, Classifier};
pub use config::{OnNonFinite, TrainConfig};
pub use evaluate::{batches, Evaluation, Predictions};
pub use gradients::{check_gradients, clip_grad_norm, GradientReport, Gradients};
pub use memory::peak_rss_bytes;
pub use method::{Method, Start};
pub use objective::{Loss, Objective, Observer, Record, Summary};
pub use optim::{AdamW, AdamWConfig, Moments};
pub use schedule::Schedule;
pub use settings::{fingerprint, Settings};
pub use trainer::{fit, fit_with_checkpoints};
pub use upkeep::Upkeep;
