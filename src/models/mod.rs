//! Trainable models and the files they come from.
//!
//! The models of `candle-transformers` are for inference: their fused layers cut gradients and
//! their linear layers are private. These are trainable, their linear layers are
//! [`AdaptableLinear`](crate::adapter::AdaptableLinear)s, and their forward passes are tested against
//! `candle-transformers` and against Hugging Face.

pub mod causal;
pub(crate) mod chat_template;
mod checks;
pub mod deberta;
pub mod decoder;
pub mod distilbert;
pub(crate) mod encoder;
mod end_tokens;
pub mod generate;
pub mod gguf;
pub mod hub;
pub(crate) mod layers;
pub mod modernbert;
pub(crate) mod packed;
mod placement;
pub(crate) mod post_processor;
mod quantize;
pub mod roberta;
mod rotary_table;
pub mod save;
pub mod sequence;
mod sequence_classifier;
mod weights;

pub use placement::{Crossing, Placement, Transfer};
pub use quantize::Quantization;
pub use weights::{QuantizedSource, Wanted, Weights};
