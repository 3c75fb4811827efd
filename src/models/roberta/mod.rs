//! RoBERTa (Liu et al. 2019) and BERT (Devlin et al. 2019): one encoder, two ways to name it.
//!
//! The two differ in how positions are counted, in token types, and in the head that reads the
//! first token. Checkpoints load with or without the `roberta.` or `bert.` prefix.

mod classification;
mod config;
mod encoder;
mod masked_lm;

pub use classification::RobertaForSequenceClassification;
pub use config::{Family, RobertaConfig};
pub use encoder::RobertaEncoder;
pub use masked_lm::RobertaForMaskedLM;
