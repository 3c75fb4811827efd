//! Decoders: one model with switches ([`DecoderConfig`]) for LLaMA 1, 2 and 3.x (Touvron et al. 2023;
//! Grattafiori et al. 2024), models with the same layout, and later families.
//!
//! Pre-norm layers with RMS norm, rotary positions, grouped-query attention and a gated feed-forward block.
//! Checkpoints load with or without the `model.` prefix.

mod attention;
mod candle;
mod causal_lm;
mod classification;
mod config;
mod families;
mod feed_forward;
mod joint;
mod layer;
mod model;
mod positions;
mod read;
mod rotary;
mod step;

pub use causal_lm::DecoderForCausalLM;
pub use classification::DecoderForSequenceClassification;
pub use config::{Activation, DecoderConfig, LayerConfig};
pub use model::Decoder;
pub use positions::{Positions, RotaryConfig, RotaryScaling};
