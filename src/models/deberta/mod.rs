//! DeBERTa-v3 (He et al. 2021), whose checkpoints call themselves `deberta-v2`: BERT's layers with disentangled
//! attention over relative positions, and no absolute ones.
//!
//! Queries and keys of tokens and of relative positions come from the same projections, so an adapter on them sees both. A
//! Laplace approximation over all adapters counts the tokens of each example and refuses these rows by name: choose
//! `value_proj` and the feed-forward block for it, or the last layer.

mod classification;
mod config;

pub use classification::DebertaForSequenceClassification;
pub use config::DebertaConfig;
