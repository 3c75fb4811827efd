//! One checkpoint: what a run remembers, as files with their checksums.

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
/// The layout that is written, and the only one that is read. In version 1 the settings were Rust's own
/// words for them, which a change of names would have made unreadable.
pub(super) const VERSION: u32 = 2;

/// The numbers of a run on its way.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::train) struct RunState {
    pub version: u32,
    /// Optimiser steps done, skipped ones among them.
    pub step: usize,
    /// The index of the next draw: micro-batches done, or steps where one draw serves a step.
    pub draw: u64,
    /// Steps that were skipped, and how many of them at the end.
    pub skipped: usize,
    pub skipped_in_a_row: usize,
    /// Wall time so far.
    pub seconds: f64,
    /// Score and step of the best evaluation.
    pub best: Option<(f64, usize)>,
    /// Evaluations since then that were no better.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub waited: usize,
    /// The steps that each parameter has taken.
    pub moments: BTreeMap<String, usize>,
    pub settings: Settings,
}

/// A run without early stopping is written as it always was.
#[allow(clippy::trivially_copy_pass_by_ref)] // as serde asks for it
fn is_zero(count: &usize) -> bool {
    *count == 0
}

/// All of a run on its way.
#[derive(Debug, Default)]
pub(in crate::train) struct State {
    pub run_state: RunState,
    pub params: BTreeMap<String, Tensor>,
    pub moments: BTreeMap<String, Moments>,
    /// The parameters of the best evaluation, unless they are the present ones.
    pub best: BTreeMap<String, Tensor>,
    /// What the method remembers.
    pub method: BTreeMap<String, Tensor>,
}

impl State {
    /// All tensors by kind and name.
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

    /// Reads the checkpoint in `dir`, which claims to be of this step.
    ///
    /// # Errors
    /// [`Error::Format`] if it is damaged, [`Error::Io`] if a file is missing or the system cannot read
    /// it, [`Error::Config`] if another version of this crate wrote it.
    pub fn read(dir: &Path, step: usize) -> Result<Self> {
        let path = dir.join(MANIFEST);
        let sums: HashMap<String, Sum> = json::parse(bytes_of(&path)?, &path)?;
        let checked = |name: &str| {
            let expected =
                sums.get(name).ok_or_else(|| Error::format(&*path, format!("{name} is not in it")))?;
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
        // Another version may have other fields beside it.
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

    /// All tensors as the bytes of their file.
    ///
    /// # Errors
    /// If candle fails.
    pub fn tensor_bytes(&self) -> Result<Vec<u8>> {
        safetensors::serialize(self.tensors(), None)
            .map_err(|error| Error::config("checkpoint", format!("it cannot be sent: {error}")))
    }

    /// The state of these numbers and the bytes of its tensors; `path` only names them in errors.
    ///
    /// # Errors
    /// If they are damaged.
    pub fn of_tensor_bytes(run_state: RunState, tensors: &[u8], path: &Path) -> Result<Self> {
        let tensors = candle_core::safetensors::load_buffer(tensors, &Device::Cpu)
            .map_err(|e| Error::format(path, format!("its tensors cannot be read: {e}")))?;
        Self::sort(run_state, tensors, path)
    }

    /// Tensors by their kinds.
    fn sort(run_state: RunState, tensors: HashMap<String, Tensor>, path: &Path) -> Result<Self> {
        let mut kinds: BTreeMap<String, BTreeMap<String, Tensor>> = BTreeMap::new();
        for (name, tensor) in tensors {
            let (kind, name) =
                name.split_once('/').ok_or_else(|| Error::format(path, format!("it has {name:?}")))?;
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

/// Size and checksum of a file.
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
