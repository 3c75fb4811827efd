//! The seam between models and methods: [`Pass`] and [`Context`] go down a forward pass, [`Adapter`] is what
//! a method is to a layer, [`AdaptableLinear`] a model's layer with its adapters, [`AdaptableModel`] the one
//! walk over them, and [`Params`] the store of all that is trained.
//!
//! Whether a layer samples or drops is never a flag that it stores: the context says it.

mod base;
mod context;
mod embedding;
mod interface;
mod linear;
pub(crate) mod low_rank;
mod model;
mod params;
mod pass;
mod prior;
#[cfg(feature = "cuda")]
mod prior_cuda;
mod probe;
mod standalone;
mod together;
mod walk;

pub use base::{BaseLinear, QuantizedLinear};
pub use context::{Context, DrawCache, ScalerFactors};
pub use embedding::AdaptableEmbedding;
pub use interface::Adapter;
pub(crate) use linear::check_adapter_name;
pub use linear::AdaptableLinear;
pub use low_rank::LowRank;
pub use model::AdaptableModel;
pub use params::{Init, Param, Params, Role};
pub use pass::Pass;
pub use prior::{Prior, PriorForm, PriorStart};
pub use probe::Probe;
pub use standalone::{AdaptedLinear, MeanView};
pub use walk::{linears, Linears};
