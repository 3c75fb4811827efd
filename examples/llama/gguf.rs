//! The GGUF files that a run writes for llama.cpp and Ollama.

use std::path::{Path, PathBuf};

use monteclora::adapter::{AdaptableModel, Params};
use monteclora::inject::DEFAULT_ADAPTER;
use monteclora::models::gguf::{check_adapter, write_adapter, GgufKind};
use monteclora::models::hub::ModelFiles;
use monteclora::models::save::{check_merged_gguf, save_merged_gguf};
use monteclora::peft::{AdapterFile, AdapterMetadata, AdapterMethod};

use crate::common::options::stays;
use crate::common::Outcome;

#[derive(clap::Args, Clone)]
#[command(next_help_heading = "Output")]
pub struct GgufOptions {
    /// Also write the adapter as this GGUF file, for llama.cpp and Ollama (lora and monteclora).
    #[arg(long, value_name = "FILE")]
    pub gguf: Option<PathBuf>,
    /// Also write the whole model with the adapter merged in as `OUT/model.gguf`: f32, f16, q8_0 or q4k.
    #[arg(long, value_name = "KIND", requires = "output")]
    pub merged_gguf: Option<GgufKind>,
}

/// A trained model and the files that it was loaded from.
pub struct Trained<'a> {
    pub model: &'a dyn AdaptableModel,
    pub params: &'a Params,
    pub adapter: Option<&'a AdapterMethod>,
    pub files: &'a ModelFiles,
}

impl Trained<'_> {
    fn file(&self) -> Outcome<AdapterFile> {
        let Some(adapter) = self.adapter else {
            return Err(
                "--gguf: only the adapters of lora, lora-fa and monteclora have a form in GGUF".into()
            );
        };
        let metadata = AdapterMetadata::default();
        Ok(AdapterFile::from_model(self.model, DEFAULT_ADAPTER, self.params, adapter, &metadata)?)
    }
}

impl GgufOptions {
    /// Whether a GGUF file is to be written.
    pub fn is_asked(&self) -> bool {
        self.gguf.is_some() || self.merged_gguf.is_some()
    }

    /// Checks before training that all files can be written afterwards; `resumes`: whether the run is
    /// resumed.
    pub fn check(&self, trained: &Trained, out: Option<&Path>, resumes: bool) -> Outcome {
        if self.gguf.is_some() {
            check_adapter(&trained.file()?, &trained.files.config()?)?;
        }
        if let Some((_, path)) = self.merged(out).filter(|(_, path)| !(resumes && path.exists())) {
            check_merged_gguf(trained.model, trained.params, trained.files, &path)?;
        }
        Ok(())
    }

    /// Writes the requested files; `resumes`: whether the run was resumed.
    pub fn write(&self, trained: &Trained, out: Option<&Path>, resumes: bool) -> Outcome {
        if let Some(path) = &self.gguf {
            write_adapter(&trained.file()?, &trained.files.config()?, path)?;
        }
        if let Some((kind, path)) = self.merged(out) {
            if !stays(&path, resumes && path.exists()) {
                save_merged_gguf(trained.model, trained.params, trained.files, &path, kind)?;
            }
        }
        Ok(())
    }

    /// The kind and path of the whole model, if it is to be written.
    pub fn merged(&self, out: Option<&Path>) -> Option<(GgufKind, PathBuf)> {
        Some((self.merged_gguf?, out?.join("model.gguf")))
    }
}
