//! The other fine-tuning methods, for comparison with MonteCLoRA, behind the same interface.

pub mod adalora;
pub mod blob;
pub mod bottleneck;
pub mod dora;
pub mod ia3;
pub mod lora;
pub mod lora_fa;
pub mod prompt;
mod rank_allocator;

pub use adalora::{AdaLora, AdaLoraConfig};
pub use blob::{Blob, BlobConfig};
pub use bottleneck::{Bottleneck, BottleneckConfig};
pub use dora::Dora;
pub use ia3::{Ia3, Scaled};
pub use lora::{Lora, LoraConfig, LoraLinear};
pub use lora_fa::LoraFa;
pub use prompt::{prompt_tuning, PromptConfig};
pub use rank_allocator::RankAllocator;
