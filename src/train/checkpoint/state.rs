//! One checkpoint: the state of a run as files with checksums.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::optim::Moments;
use crate::train::settings::Settings;
use crate::util::{files, json};

pub(super) const STATE: &str = "state.json";
pub(super) const TENSORS: &str = "tensors.safetensors";
pub(super) const MANIFEST: &str = "manifest.json";
/// The version of the layout that is written, and the only one that is read. Version 1 stored settings in
/// Rust's debug format, which renaming anything would have made unreadable.
pub(super) const VERSION: u32 = 2;

/// The numbers in the state of a run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::train) struct RunState {
    pub version: u32,
    /// Completed optimiser steps, including skipped ones.
    pub step: usize,
    /// The index of the next draw: the number of micro-batches so far, or of steps if a step shares one draw.
    pub draw: u64,
    /// The number of skipped steps, and how many of them were the most recent in a row.
    pub skipped: usize,
    pub skipped_in_a_row: usize,
    /// Wall time so far, in seconds.
    pub seconds: f64,
    /// The score and the step of the best evaluation.
    pub best: Option<(f64, usize)>,
    /// Evaluations since the best one.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub waited: usize,
    /// The number of steps that each parameter has taken.
    pub moments: BTreeMap<String, usize>,
    pub settings: Settings,
}

/// Zero is not written, so that a run without early stopping is written as in earlier releases.
#[allow(clippy::trivially_copy_pass_by_ref)] // serde's signature
fn is_zero(count: &usize) -> bool {
    *count == 0
}

/// The whole state of a run.
#[derive(Debug, Default)]
pub(in crate::train) struct State {
    pub run_state: RunState,
    pub params: BTreeMap<String, Tensor>,
    pub moments: BTreeMap<String, Moments>,
    /// The parameters of the best evaluation, unless they are the current ones.
    pub best: BTreeMap<String, Tensor>,
    /// The method's own state.
    pub method: BTreeMap<String, Tensor>,
}

impl State {
    /// Returns all tensors, named by kind and name.
    pub fn tensors(&self) -> impl Iterator<Item = (String, &Tensor)> {
        let named = |kind: &'static str| move |(name, tensor)| (format!("{kind}/{name}"), tensor);
        let firsts = self.moments.iter().map(|(name, moments)| (name, &moments.first));
        let seconds = self.moments.iter().map(|(name, moments)| (name, &moments.second));
        let params = self.params.iter().map(named("param"));
        let moments = firsts.map(named("first")).chain(seconds.map(named("second")));
        params
            .chain(moments)
            .chain(self.best.iter().map(named("best")))
            .chain(self.method.iter().map(named("method")))
    }

    pub fn write(&self, dir: &Path) -> Result<()> {
        files::write_safetensors(&dir.join(TENSORS), self.tensors())?;
        files::write_json(&dir.join(STATE), &RunState { version: VERSION, ..self.run_state.clone() })?;
        let sum = |name: &str| {
            let path = dir.join(name);
            let sum = File::open(&path).and_then(Sum::of).map_err(Error::io(&*path))?;
            Ok((name.to_string(), sum))
        };
        let sums: BTreeMap<_, _> = [STATE, TENSORS].into_iter().map(sum).collect::<Result<_>>()?;
        files::write_json(&dir.join(MANIFEST), &sums)
    }

    /// Reads the checkpoint in `dir`, which must be of this step.
    ///
    /// # Errors
    /// [`Error::Format`] if it is damaged, [`Error::Io`] if a file is missing or the system cannot read
    /// it, [`Error::Config`] if another version of this crate wrote it.
    pub fn read(dir: &Path, step: usize) -> Result<Self> {
        let path = dir.join(MANIFEST);
        let sums: HashMap<String, Sum> = json::parse(bytes_of(&path)?, &path)?;
        let checked = |name: &str| {
            let expected = sums
                .get(name)
                .ok_or_else(|| Error::format(&*path, format!("it has no checksum of {name}")))?;
            let path = dir.join(name);
            let bytes = bytes_of(&path)?;
            let found = Sum::of(&*bytes).map_err(Error::io(&*path))?;
            if found == *expected {
                Ok((path, bytes))
            } else {
                let reason = format!("it is damaged: expected {expected}, found {found}");
                Err(Error::format(path, reason))
            }
        };
        let ((state, run_state), (path, tensors)) = (checked(STATE)?, checked(TENSORS)?);
        // Check the version first: another version may have other fields.
        let Version { version } = json::parse(&run_state, &state)?;
        if version != VERSION {
            let reason = format!("{} has version {version}, this crate reads {VERSION}", state.display());
            return Err(Error::config(
                "checkpoint",
                format!("{reason}: go on with the release that wrote it"),
            ));
        }
        let run_state: RunState = json::parse(&run_state, &state)?;
        if run_state.step != step {
            let reason = format!("expected the state of step {step}, found that of step {}", run_state.step);
            return Err(Error::format(state, reason));
        }
        Self::of_tensor_bytes(run_state, &tensors, &path)
    }

    /// Returns all tensors in the bytes of their file format.
    ///
    /// # Errors
    /// If candle fails.
    pub fn tensor_bytes(&self) -> Result<Vec<u8>> {
        safetensors::serialize(self.tensors(), None)
            .map_err(|error| Error::config("checkpoint", format!("it cannot be sent: {error}")))
    }

    /// Creates a state from its numbers and the bytes of its tensors; `path` only appears in errors.
    ///
    /// # Errors
    /// If the bytes are damaged.
    pub fn of_tensor_bytes(run_state: RunState, tensors: &[u8], path: &Path) -> Result<Self> {
        let tensors = candle_core::safetensors::load_buffer(tensors, &Device::Cpu)
            .map_err(|e| Error::format(path, format!("its tensors cannot be read: {e}")))?;
        Self::sort(run_state, tensors, path)
    }

    /// Sorts tensors by their kind.
    fn sort(run_state: RunState, tensors: HashMap<String, Tensor>, path: &Path) -> Result<Self> {
        let mut kinds: BTreeMap<String, BTreeMap<String, Tensor>> = BTreeMap::new();
        for (name, tensor) in tensors {
            let (kind, name) = name
                .split_once('/')
                .ok_or_else(|| Error::format(path, format!("unknown tensor {name:?}")))?;
            kinds.entry(kind.to_string()).or_default().insert(name.to_string(), tensor);
        }
        let mut take = |kind: &str| kinds.remove(kind).unwrap_or_default();
        let (params, mut first, mut second) = (take("param"), take("first"), take("second"));
        let (best, method) = (take("best"), take("method"));
        let moments =
            run_state.moments.iter().map(|(name, &steps)| match (first.remove(name), second.remove(name)) {
                (Some(first), Some(second)) => Ok((name.clone(), Moments { first, second, steps })),
                _ => Err(Error::format(path, format!("it has no moments of {name}"))),
            });
        Ok(Self { moments: moments.collect::<Result<_>>()?, run_state, params, best, method })
    }
}

/// The size and checksum of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Sum {
    bytes: u64,
    crc32: u32,
}

impl std::fmt::Display for Sum {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes with CRC-32 {:08x}", self.bytes, self.crc32)
    }
}

impl Sum {
    pub fn of(mut content: impl Read) -> std::io::Result<Self> {
        let (mut hasher, mut bytes, mut buffer) = (crc32fast::Hasher::new(), 0, vec![0; 1 << 16]);
        loop {
            match content.read(&mut buffer)? {
                0 => return Ok(Self { bytes, crc32: hasher.finalize() }),
                read => {
                    hasher.update(&buffer[..read]);
                    bytes += read as u64;
                }
            }
        }
    }
}

#[derive(Deserialize)]
struct Version {
    version: u32,
}

fn bytes_of(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(Error::io(path))
}
