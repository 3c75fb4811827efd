//! Statistics of paired results over methods, tasks, seeds and learning rates.

mod bootstrap;
mod holm;
mod sensitivity;
mod wilcoxon;

pub use bootstrap::{two_level, Differences, PairedTask, TwoLevel};
pub use holm::holm;
pub use sensitivity::{mean_regret, pitman_morgan, within_variance, PitmanMorgan};
pub use wilcoxon::{wilcoxon, Wilcoxon};
