//! Where a model's files lie: a local folder, or a repository of a model hub (feature `hub`).
//!
//! [`ModelFiles::locate`] finds `config.json`, `tokenizer.json` and the safetensors weights of
//! either with one code path; pickled weights (`pytorch_model.bin`, `model.pt` ...) are refused, since
//! reading them runs code of their author.
//!
//! What is added to the `hf-hub` crate, whose requests, cache and Xet transfers serve repositories:
//! `HF_HUB_OFFLINE`, one commit per model, a limit on silence and heed of `Retry-After` (`retry`),
//! downloads that go on where they broke off and are never taken for whole before (`parts`), and
//! errors that say what to do and never hold the token (`failure`).

mod adapter;
mod bitsandbytes;
#[cfg(feature = "hub")]
mod client;
#[cfg(feature = "hub")]
mod config;
#[cfg(feature = "hub")]
mod download;
#[cfg(feature = "hub")]
mod failure;
mod index;
mod model_files;
mod names;
#[cfg(feature = "hub")]
mod parts;
mod pickles;
#[cfg(feature = "hub")]
mod repo;
#[cfg(feature = "hub")]
mod retry;
mod source;
#[cfg(test)]
mod tests;
mod weights;

pub use adapter::locate_adapter;
#[cfg(feature = "hub")]
pub use adapter::locate_adapter_with;
#[cfg(feature = "hub")]
pub use client::RepoKind;
#[cfg(feature = "hub")]
pub use config::{DownloadProgress, HubConfig};
#[cfg(feature = "hub")]
pub use download::{repo_file, repo_file_with};
pub use model_files::ModelFiles;
