//! RoBERTa and BERT.
