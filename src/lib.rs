#![cfg_attr(feature = "train", doc = include_str!("../README.md"))]
#![cfg_attr(
    not(feature = "train"),
    doc = "MonteCLoRA on Candle: the README is the front page of all features."
)]
#![cfg_attr(docsrs, feature(doc_cfg))]
#![warn(missing_debug_implementations)]

// Floor 0: independent of the method.
pub mod error;
mod kernels;
pub mod labels;
pub mod noise;
pub mod ops;
pub mod special;
#[cfg(all(test, any(feature = "cuda", feature = "train")))]
mod testing;
pub mod util;

// Floor 1: probability distributions.
pub mod dist;

// Floor 2: the adapter interface and the methods.
pub mod adapter;
pub mod adapters;
mod monteclora;
pub mod optim;

// Floor 3: adapters in models and on disk.
pub mod inject;
#[cfg(feature = "models")]
pub mod models;
pub mod peft;

// Floor 4: data, training and evaluation.
#[cfg(feature = "train")]
pub mod bayes;
#[cfg(feature = "train")]
pub mod data;
#[cfg(feature = "train")]
pub mod eval;
#[cfg(feature = "train")]
pub mod metrics;
#[cfg(feature = "train")]
pub mod predict;
#[cfg(feature = "train")]
pub mod study;
#[cfg(feature = "train")]
pub mod train;

pub use adapter::{
    linears, AdaptableEmbedding, AdaptableLinear, AdaptableModel, AdaptedLinear, Adapter, BaseLinear,
    Context, DrawCache, Init, LowRank, MeanView, Param, Params, Pass, Prior, PriorForm, PriorStart, Probe,
    Role, ScalerFactors,
};
pub use error::{Error, Result};
pub use labels::Labels;
pub use monteclora::{
    Compat, DrawNoise, DrawSpec, EvidenceBound, Initial, KlEvaluation, Mixture, MonteCLoRA, MonteCLoRAConfig,
    MonteCLoRALinear, NoiseStreams, Posterior, PosteriorDraw, Regularizer, RegularizerTerms, Released,
    ReleasedWalk, SampleBuffer, SampleScaler, ScalerSchedule, MAX_BUFFER_SIZE,
};
pub use noise::Noise;
pub use ops::Tape;
pub use util::device::cuda_device;

/// The code of the guide, which is compiled with the tests of the documentation.
#[cfg(all(doctest, feature = "train"))]
#[doc = include_str!("../docs/GUIDE.md")]
struct Guide;
