//! DeBERTa-v3 (He et al. 2021), whose checkpoints call themselves `deberta-v2`: BERT's layers with disentangled
//! attention over relative positions, and no absolute ones.

mod classification;
mod config;

pub use classification::DebertaForSequenceClassification;
pub use config::DebertaConfig;
