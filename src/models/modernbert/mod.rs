//! ModernBERT (Warner et al. 2024): norms before the blocks, rotary positions, a gated feed-forward block,
//! and local attention in most layers.

mod classification;
mod config;
mod layer;

pub use classification::ModernBertForSequenceClassification;
pub use config::{LayerType, ModernBertConfig, Pooling, Rope, RopeParameters};
