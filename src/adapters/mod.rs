//! What MonteCLoRA is compared with, behind the same seam.

pub mod lora;
pub mod low_rank;

pub use lora::{Lora, LoraConfig, LoraLinear};
pub use low_rank::LowRank;
