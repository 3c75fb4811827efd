//! LLaMA 1, 2 and 3.x (Touvron et al. 2023; Grattafiori et al. 2024) and what shares their layout.
//!
//! Pre-norm decoder layers with RMS norm, rotary positions, grouped-query attention and SwiGLU.
//! Checkpoints load with or without the `model.` prefix.

mod causal_lm;
mod classification;
mod config;
mod end_tokens;
mod model;
mod rotary;

pub use causal_lm::DecoderForCausalLM;
pub use classification::DecoderForSequenceClassification;
pub use config::DecoderConfig;
pub use model::Decoder;
