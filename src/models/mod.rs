//! Models.

pub mod hub;
pub mod roberta;
