//! Locates a model's files: in a local folder, or in a repository of a model hub (feature `hub`).
//!
//! [`ModelFiles::locate`] finds `config.json`, `tokenizer.json` and the safetensors weights of either with
//! one code path. Pickled weights (`pytorch_model.bin`, `model.pt` ...) are rejected, since reading them runs
//! their author's code.
//!
//! Requests, cache and Xet transfers are those of the `hf-hub` crate. This module adds `HF_HUB_OFFLINE`, one
//! commit per model, a limit on silence and support of `Retry-After` (`retry`), downloads that resume after
//! an interruption and are not mistaken for complete files before (`parts`), and errors that say what to do
//! and never contain the token (`failure`).

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
