//! The index of sharded weights, `model.safetensors.index.json`: which file holds which tensor.
//!
//! An index is untrusted input: its file names are checked before any file is opened.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::names::check_relative;
use super::weights;
use crate::error::{Error, Result};
use crate::util::json;

/// An index whose file names are all below its own folder.
#[derive(Debug)]
pub(super) struct Index {
    path: PathBuf,
    /// Tensor name to file name.
    weight_map: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct File {
    weight_map: BTreeMap<String, String>,
}

impl Index {
    /// Reads the index at `path`.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read(path).map_err(Error::io(path))?;
        let File { weight_map } = json::parse(text, path)?;
        if weight_map.is_empty() {
            return Err(Error::format(path, "the index lists no tensor"));
        }
        for (tensor, shard) in &weight_map {
            check_relative(shard)
                .map_err(|reason| Error::format(path, format!("tensor {tensor}: {reason}")))?;
            if !shard.ends_with(".safetensors") {
                let reason =
                    format!("tensor {tensor}: expected a .safetensors file, the index names {shard:?}");
                return Err(Error::format(path, reason));
            }
        }
        Ok(Self { path: path.to_path_buf(), weight_map })
    }

    /// The files that the index lists, each once, in order of their names.
    pub(super) fn shards(&self) -> Vec<&str> {
        let unique: BTreeSet<&str> = self.weight_map.values().map(String::as_str).collect();
        unique.into_iter().collect()
    }

    /// The error for a listed file that does not exist.
    pub(super) fn missing_shard(&self, shard: &str) -> Error {
        Error::format(&self.path, format!("the index lists {shard:?}, which does not exist"))
    }

    /// Checks that each shard holds the tensors listed for it; `files` are the shards and their paths.
    pub(super) fn check<'a>(&self, files: impl Iterator<Item = (&'a str, &'a Path)>) -> Result<()> {
        for (shard, path) in files {
            let held: BTreeSet<String> = weights::tensor_names(path)?.into_iter().collect();
            let listed = self.weight_map.iter().filter(|(_, file)| *file == shard);
            if let Some((tensor, _)) = listed.into_iter().find(|(tensor, _)| !held.contains(*tensor)) {
                let reason =
                    format!("the index says that tensor {tensor} is in {shard}, which does not hold it");
                return Err(Error::format(&self.path, reason));
            }
        }
        Ok(())
    }
}
