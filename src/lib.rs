#![doc = include_str!("../README.md")]
#![warn(missing_debug_implementations)]

// Floor 0: ground. Knows nothing of the method.
pub mod error;
pub mod files;
#[cfg(test)]
mod fuzz;
mod kernels;
pub mod noise;
pub mod ops;
mod simd;
pub mod special;
#[cfg(test)]
mod testing;
mod util;

// Floor 1: probability.
pub mod dist;

// Floor 2: the method.
pub mod adapters;
pub mod monteclora;
pub mod params;
pub mod slot;

// Floor 3: into models and onto disk.
pub mod inject;
pub mod merge;
pub mod models;
pub mod named;
pub mod peft;

// Floor 4: experiments.
pub mod bayes;
pub mod data;
pub mod eval;
pub mod generate;
pub mod metrics;
pub mod study;
pub mod train;

pub use error::{Error, Result};
pub use monteclora::{MonteCLoRA, MonteCLoRAConfig, MonteCLoRALinear, Regularizer, RegularizerTerms};
pub use noise::Noise;
pub use params::Params;
pub use slot::Pass;
