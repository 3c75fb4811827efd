//! Checkpoints: all that a run needs to go on where it stopped, bit for bit.
//!
//! A checkpoint is the folder `step-00000120`: `state.json` (numbers and settings),
//! `tensors.safetensors` (parameters, moments, the best parameters so far, the method's own state) and
//! `manifest.json` (size and CRC-32 of both). It is written beside its place, flushed to the disk and
//! renamed, so that a run may be killed at any moment; what is damaged afterwards, the manifest tells.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::optim::Moments;
use crate::data::batch::Batcher;
use crate::error::{Error, Result};
use crate::files;

const STATE: &str = "state.json";
const TENSORS: &str = "tensors.safetensors";
const MANIFEST: &str = "manifest.json";
/// The layout that is written, and the only one that is read.
const VERSION: u32 = 1;
/// What a folder is called while it is written or removed: nobody reads it.
const PARTIAL: &str = ".partial-";

/// Settings by name, as text: what two parts of one run must agree on.
pub type Settings = BTreeMap<String, String>;

/// The settings of data and batches: `numbers` are all that the rows hold.
pub(super) fn settings(batcher: &Batcher, numbers: impl Iterator<Item = u32>) -> Settings {
    let mut hasher = crc32fast::Hasher::new();
    numbers.for_each(|number| hasher.update(&number.to_le_bytes()));
    let rows = ("rows", format!("CRC-32 {:08x}", hasher.finalize()));
    batcher.settings().into_iter().chain([rows]).map(|(name, value)| (name.to_string(), value)).collect()
}

/// Where the checkpoints of a run are kept, and how it goes on from them.
#[derive(Debug, Clone)]
pub struct Checkpoints {
    /// Their folder.
    pub dir: PathBuf,
    /// How many of the newest stay; one at least.
    pub keep: usize,
    /// Steps between two of them; at each evaluation where absent. A run that is asked to stop or ends
    /// writes one, too.
    pub every: Option<usize>,
    /// Whether a run goes on from the newest valid one, where there is one.
    pub resume: bool,
    /// What must be the same to go on, beside what the run knows itself: the model, say.
    pub settings: Settings,
    /// The settings that may differ from those of the checkpoint all the same.
    pub changes: Vec<String>,
}

impl Checkpoints {
    /// Two checkpoints in `dir`, one at each evaluation, of a run that begins anew.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self {
            dir: dir.into(),
            keep: 2,
            every: None,
            resume: false,
            settings: Settings::new(),
            changes: Vec::new(),
        }
    }

    /// Where a run begins: the newest valid checkpoint and what was wrong with those after it, or
    /// nothing where there is none.
    ///
    /// # Errors
    /// If there are checkpoints and the run is not to go on from them, all of them are damaged, or
    /// `settings` differ in what [`Self::changes`] does not name.
    pub(super) fn begin(&self, settings: &Settings) -> Result<Option<Found>> {
        let mut steps = self.steps()?;
        let Some(last) = steps.pop() else { return Ok(None) };
        if !self.resume {
            let reason = format!("it has a run that reached step {last}: resume it, or give another folder");
            return Err(Error::format(&self.dir, reason));
        }
        let mut damaged = Vec::new();
        for step in std::iter::once(last).chain(steps.into_iter().rev()) {
            match State::read(&self.place(step), step) {
                Ok(state) => {
                    self.compare(&state.numbers.settings, settings)?;
                    return Ok(Some(Found { state, damaged }));
                }
                Err(error) => damaged.push(error.to_string()),
            }
        }
        let reason = format!("none of its checkpoints can be read: {}", damaged.join("; "));
        Err(Error::format(&self.dir, reason))
    }

    /// Checks that the settings of a run are those of its checkpoint, but for what may change.
    fn compare(&self, before: &Settings, now: &Settings) -> Result<()> {
        let known = |name: &&String| !before.contains_key(*name) && !now.contains_key(*name);
        if let Some(name) = self.changes.iter().find(known) {
            let names: Vec<&str> = now.keys().map(String::as_str).collect();
            let reason =
                format!("a change of {name:?} is allowed, but the settings are {}", names.join(", "));
            return Err(Error::config("changes", reason));
        }
        let none = "nothing".to_string();
        let of = |settings: &Settings, name: &String| settings.get(name).unwrap_or(&none).clone();
        let names = before.keys().chain(now.keys().filter(|name| !before.contains_key(*name)));
        let mut changed = names.filter(|name| before.get(*name) != now.get(*name));
        match changed.find(|name| !self.changes.contains(name)) {
            Some(name) => {
                let (was, is) = (of(before, name), of(now, name));
                let reason = format!("the run in {} had {was}, this one has {is}", self.dir.display());
                Err(Error::config(name, format!("{reason}: allow the change if it is meant")))
            }
            None => Ok(()),
        }
    }

    /// Writes a checkpoint and removes the oldest beyond [`Self::keep`].
    pub(super) fn save(&self, state: &State) -> Result<()> {
        fs::create_dir_all(&self.dir).map_err(Error::io(&*self.dir))?;
        self.sweep()?;
        let step = state.numbers.step;
        let partial = self.dir.join(format!("{PARTIAL}{}", std::process::id()));
        fs::create_dir(&partial).map_err(Error::io(&*partial))?;
        let written = state.write(&partial);
        // A full disk is to have room again before the error is told.
        let settled = written.and_then(|()| settle(&partial, &self.place(step)));
        settled.inspect_err(|_| drop(fs::remove_dir_all(&partial)))?;
        // Later ones are of a run that was given up: damaged, or resumed from before them.
        let (earlier, later): (Vec<_>, Vec<_>) = self.steps()?.into_iter().partition(|other| *other <= step);
        let spare = earlier.len().saturating_sub(self.keep.max(1));
        for old in earlier[..spare].iter().chain(&later) {
            // Out of sight first: half removed, it would look damaged.
            let hidden = self.dir.join(format!("{PARTIAL}old-{old}"));
            fs::rename(self.place(*old), &hidden).map_err(Error::io(self.place(*old)))?;
        }
        self.sweep()
    }

    /// Removes what is out of sight: old checkpoints, and what killed runs left half-written.
    fn sweep(&self) -> Result<()> {
        for entry in fs::read_dir(&self.dir).map_err(Error::io(&*self.dir))?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(PARTIAL) {
                fs::remove_dir_all(entry.path()).map_err(Error::io(entry.path()))?;
            }
        }
        Ok(())
    }

    fn place(&self, step: usize) -> PathBuf {
        self.dir.join(format!("step-{step:08}"))
    }

    /// The steps of the checkpoints that there are, in their order.
    fn steps(&self) -> Result<Vec<usize>> {
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::io(&*self.dir)(error)),
        };
        // A stranger's `step-7` is no place of ours, and neither is `step-+0000007`.
        let step = |name: std::ffi::OsString| {
            let step = name.to_str()?.strip_prefix("step-")?.parse().ok()?;
            (self.place(step).file_name() == Some(&name)).then_some(step)
        };
        let mut steps: Vec<usize> = entries.flatten().filter_map(|entry| step(entry.file_name())).collect();
        steps.sort_unstable();
        Ok(steps)
    }
}

/// The checkpoint that a run goes on from.
pub(super) struct Found {
    pub state: State,
    /// What is wrong with newer ones.
    pub damaged: Vec<String>,
}

/// The numbers of a run on its way.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Numbers {
    pub version: u32,
    /// Optimiser steps done, skipped ones among them.
    pub step: usize,
    /// Micro-batches done: the index of the next draw.
    pub draw: u64,
    /// Steps that were skipped, and how many of them at the end.
    pub skipped: usize,
    pub skipped_in_a_row: usize,
    /// Wall time so far.
    pub seconds: f64,
    /// Score and step of the best evaluation.
    pub best: Option<(f64, usize)>,
    /// The steps that each parameter has taken.
    pub moments: BTreeMap<String, usize>,
    pub settings: Settings,
}

/// All of a run on its way.
#[derive(Debug, Default)]
pub(super) struct State {
    pub numbers: Numbers,
    pub params: BTreeMap<String, Tensor>,
    pub moments: BTreeMap<String, Moments>,
    /// The parameters of the best evaluation, unless they are the present ones.
    pub best: BTreeMap<String, Tensor>,
    /// What the method remembers.
    pub method: BTreeMap<String, Tensor>,
}

impl State {
    /// All tensors by kind and name.
    fn tensors(&self) -> impl Iterator<Item = (String, &Tensor)> {
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

    fn write(&self, dir: &Path) -> Result<()> {
        files::write_safetensors(&dir.join(TENSORS), self.tensors())?;
        files::write_json(&dir.join(STATE), &Numbers { version: VERSION, ..self.numbers.clone() })?;
        let sums = [STATE, TENSORS].map(|name| Ok((name.to_string(), Sum::of(&dir.join(name))?)));
        files::write_json(&dir.join(MANIFEST), &sums.into_iter().collect::<Result<BTreeMap<_, _>>>()?)
    }

    /// Reads the checkpoint in `dir`, which claims to be of this step.
    pub fn read(dir: &Path, step: usize) -> Result<Self> {
        let sums: HashMap<String, Sum> = read_json(&dir.join(MANIFEST))?;
        for name in [STATE, TENSORS] {
            let path = dir.join(name);
            let sum = sums
                .get(name)
                .ok_or_else(|| Error::format(dir.join(MANIFEST), format!("{name} is not in it")))?;
            let found = Sum::of(&path)?;
            if found != *sum {
                return Err(Error::format(path, format!("it is damaged: expected {sum}, found {found}")));
            }
        }
        let path = dir.join(STATE);
        let numbers: Numbers = read_json(&path)?;
        if (numbers.version, numbers.step) != (VERSION, step) {
            let (version, of) = (numbers.version, numbers.step);
            let reason =
                format!("expected version {VERSION} of step {step}, found version {version} of step {of}");
            return Err(Error::format(path, reason));
        }
        let path = dir.join(TENSORS);
        let tensors = candle_core::safetensors::load(&path, &Device::Cpu);
        let tensors =
            tensors.map_err(|e| Error::format(&path, format!("its tensors cannot be read: {e}")))?;
        Self::sort(numbers, tensors, &path)
    }

    /// Tensors by their kinds.
    fn sort(numbers: Numbers, tensors: HashMap<String, Tensor>, path: &Path) -> Result<Self> {
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
            numbers.moments.iter().map(|(name, &steps)| match (first.remove(name), second.remove(name)) {
                (Some(first), Some(second)) => Ok((name.clone(), Moments { first, second, steps })),
                _ => Err(Error::format(path, format!("it has no moments of {name}"))),
            });
        Ok(Self { moments: moments.collect::<Result<_>>()?, numbers, params, best, method })
    }
}

/// Size and checksum of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Sum {
    bytes: u64,
    crc32: u32,
}

impl std::fmt::Display for Sum {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes with CRC-32 {:08x}", self.bytes, self.crc32)
    }
}

impl Sum {
    fn of(path: &Path) -> Result<Self> {
        let mut file = File::open(path).map_err(Error::io(path))?;
        let (mut hasher, mut bytes, mut buffer) = (crc32fast::Hasher::new(), 0, vec![0; 1 << 16]);
        loop {
            match file.read(&mut buffer).map_err(Error::io(path))? {
                0 => return Ok(Self { bytes, crc32: hasher.finalize() }),
                read => {
                    hasher.update(&buffer[..read]);
                    bytes += read as u64;
                }
            }
        }
    }
}

/// Flushes a folder whose files are on the disk, and puts it in its place.
fn settle(partial: &Path, place: &Path) -> Result<()> {
    sync_folder(partial)?;
    // Of a run whose later checkpoints were damaged: this step comes again.
    if place.exists() {
        fs::remove_dir_all(place).map_err(Error::io(place))?;
    }
    fs::rename(partial, place).map_err(Error::io(place))?;
    sync_folder(place.parent().unwrap_or(place))
}

/// Flushes the names in a folder, where the system has such a thing.
fn sync_folder(dir: &Path) -> Result<()> {
    match cfg!(unix) {
        true => File::open(dir).and_then(|dir| dir.sync_all()).map_err(Error::io(dir)),
        false => Ok(()),
    }
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let bytes = fs::read(path).map_err(Error::io(path))?;
    serde_json::from_slice(&bytes).map_err(|e| Error::format_at(path, e.line(), format!("malformed: {e}")))
}

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;
