//! Adapters on disk in the format of Hugging Face PEFT: `adapter_config.json` beside
//! `adapter_model.safetensors`. PEFT's names are used in this module only.
//!
//! [`AdapterFile`] is such an adapter in memory, independent of any model. Reading validates the whole file;
//! writing is deterministic and never mixes new files with old ones.

mod adapter;
mod config;
mod export;
mod files;
mod keys;
mod method;
mod model;
mod own;
mod renamed;
mod targets;
mod task_type;

pub use adapter::{AdapterFile, LayerTensors, SamplerTensors, CONFIG_FILE, OWN_FILE, WEIGHTS_FILE};
pub use config::{MonteCLoRAFields, OneOrMany, PeftConfig, TargetModules};
pub use export::ExportFormat;
pub use method::AdapterMethod;
pub use model::AdapterMetadata;
pub use task_type::TaskType;

#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod settings_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod write_tests;
