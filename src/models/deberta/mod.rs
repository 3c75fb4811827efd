//! DeBERTa-v3 (He et al. 2021), whose checkpoints have the `model_type` `deberta-v2`: BERT's layers with
//! disentangled attention over relative positions, and without absolute positions.
//!
//! Queries and keys of tokens and of relative positions come from the same projections, so an adapter on
//! these projections sees both. A Laplace approximation over all adapters needs the rows of each example and
//! fails with an error for such an adapter: choose `value_proj` and the feed-forward block as targets, or
//! approximate the last layer only.

mod classification;
mod config;

pub use classification::DebertaForSequenceClassification;
pub use config::DebertaConfig;
