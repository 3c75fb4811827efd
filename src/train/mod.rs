//! Training: schedules, the training loop, checkpoints, and the classifiers and language models it trains.

mod causal;
mod checkpoint;
mod classifier;
mod config;
pub mod distributed;
mod evaluate;
mod evaluator;
mod head;
mod hooks;
mod memory;
mod method;
mod objective;
mod open;
mod prediction;
mod saved;
mod schedule;
mod settings;
mod step;
mod tensorboard;
mod trainer;

pub use causal::{causal_loss, held_out_loss, held_out_loss_in_turns, CausalTuning};
pub use checkpoint::Checkpoints;
pub use classifier::{Classification, Classifier};
pub use config::{OnNonFinite, TrainConfig};
pub use evaluate::{batches, Evaluation, Predictions};
pub use evaluator::Evaluator;
pub use hooks::{MethodHooks, StepDone};
pub use memory::peak_rss_bytes;
pub use method::{LrRatios, Method, MethodInit};
pub use objective::{Loss, Objective, Observer, StepRecord, Summary};
pub use saved::RunFolder;
pub use schedule::Schedule;
pub use settings::{fingerprint, Settings};
pub use tensorboard::TensorBoard;
pub use trainer::{fit, fit_distributed, fit_with_checkpoints};
