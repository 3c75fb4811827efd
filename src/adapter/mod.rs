//! The interface between models and fine-tuning methods.
//!
//! - [`Pass`] and [`Context`]: everything a forward pass depends on besides its input.
//! - [`Adapter`]: the interface that a method implements for one linear layer.
//! - [`AdaptableLinear`]: a model's linear layer with its adapters.
//! - [`AdaptableModel`]: gives access to all linear layers of a model.
//! - [`Params`]: the store of all trainable parameters.
//!
//! Layers store no training flag: the context decides whether a layer samples its weights or applies dropout.

mod base;
mod context;
mod embedding;
mod interface;
mod linear;
pub(crate) mod low_rank;
mod model;
mod params;
mod pass;
mod pass_cache;
mod prior;
#[cfg(feature = "cuda")]
mod prior_cuda;
mod probe;
mod standalone;
mod walk;

pub use base::BaseLinear;
pub use context::{Context, DrawCache, ScalerFactors};
pub use embedding::AdaptableEmbedding;
pub use interface::Adapter;
pub(crate) use linear::check_adapter_name;
pub use linear::AdaptableLinear;
pub use low_rank::LowRank;
pub(crate) use model::{no_active, other_method};
pub use model::{visit_active, AdaptableModel};
pub use params::{Init, Param, Params, Role};
pub use pass::Pass;
pub use prior::{Prior, PriorForm, PriorStart};
pub use probe::Probe;
pub use standalone::{AdaptedLinear, MeanView};
pub use walk::{linears, Linears};
