//! Puts adapters on the linear layers of a model: target patterns and injection.
//!
//! Patterns follow the rules of Hugging Face PEFT, with one difference: a target that matches nothing is an
//! error that lists the available names, never a silent no-op.

pub mod activate;
mod injection;
pub mod merge;
mod methods;
pub(crate) mod patterns;
pub(crate) mod posthoc;
mod targets;

pub use injection::{inject, Make, DEFAULT_ADAPTER};
pub(crate) use methods::with_share;
pub use methods::{
    adalora, blob, bottleneck, dora, ia3, lora, lora_fa, lora_named, monteclora, monteclora_named,
    monteclora_released, BUFFER_SHARE,
};
pub use posthoc::posthoc;
pub use targets::{paths, Select, TargetLayer, Targets};
