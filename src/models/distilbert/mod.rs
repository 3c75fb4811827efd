//! DistilBERT (Sanh et al. 2019): BERT's layers, half as many, without token types and without a pooler.

mod classification;
mod config;

pub use classification::DistilBertForSequenceClassification;
pub use config::DistilBertConfig;
