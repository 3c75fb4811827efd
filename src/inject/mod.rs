//! Puts adapters on the linear layers of a model: target patterns and injection.
//!
//! Patterns follow the rules of Hugging Face PEFT, with one difference: a target that matches nothing is an
//! error that lists the available names, never a silent no-op.

pub mod activate;
mod injection;
pub mod merge;
pub(crate) mod patterns;
pub(crate) mod posthoc;
mod targets;

pub(crate) use injection::with_share;
pub use injection::{
    inject, lora, lora_fa, lora_named, monteclora, monteclora_named, monteclora_released, Make, BUFFER_SHARE,
    DEFAULT_ADAPTER,
};
pub use posthoc::posthoc;
pub use targets::{paths, Select, TargetLayer, Targets};
