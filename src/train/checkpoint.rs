//! Checkpoints: everything that a run needs to continue where it stopped, bit for bit.
//!
//! A checkpoint is a folder such as `step-00000120` with `state.json` (numbers and settings),
//! `tensors.safetensors` (parameters, moments, the best parameters so far, the method's own state) and
//! `manifest.json` (size and CRC-32 of both). It is written to a temporary folder next to its place, flushed
//! to disk and renamed, so that a run may be killed at any moment; the manifest reveals later damage. The
//! folder of a run is locked while it trains.

mod state;

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

pub(super) use state::{RunState, State};

use super::settings::Settings;
use crate::error::{Error, Result};
use crate::util::check::at_least_one;
use crate::util::files;

/// The prefix that a damaged checkpoint is renamed with. Such folders are neither read nor removed.
const DAMAGED: &str = "damaged-";
/// The settings that determine which rows a step takes, and thus what the position of a run means.
const PLACE: [&str; 5] = ["accumulation", "batch_size", "length_grouped", "rows", "seed"];

/// The settings that scores depend on: a change makes those from before it incomparable.
pub(super) const SCORE: [&str; 2] = ["held_out", "metric"];

/// Where a run keeps its checkpoints, and how it resumes from them.
#[derive(Debug, Clone)]
pub struct Checkpoints {
    /// The folder of the checkpoints.
    pub dir: PathBuf,
    /// How many of the newest checkpoints to keep, at least one.
    pub keep: usize,
    /// Steps between checkpoints, at least one; if absent, one at each evaluation. A run also writes one when
    /// it is asked to stop and when it ends.
    pub every: Option<usize>,
    /// Whether to resume from the newest valid checkpoint, if there is one.
    pub resume: bool,
    /// Further settings that must agree with the checkpoint's on resuming, such as the model. The run's own
    /// are always compared.
    pub settings: Settings,
    /// The settings that may differ from the checkpoint's. Not allowed are the settings that determine which
    /// rows a step takes: the rows, their order (the seed, grouping by length), the batch size and the
    /// accumulation. After a change of `held_out` or `metric`, by which [`Self::settings`] may name the
    /// evaluated rows and the metric, the best evaluation so far and the count of patience are forgotten.
    pub changes: Vec<String>,
}

impl Checkpoints {
    /// Checkpoints in `dir` for a new run: one at each evaluation, of which the newest two are kept.
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

    /// Returns the newest valid checkpoint, or `None` if there is no checkpoint. The folder must be locked.
    /// Newer damaged checkpoints are renamed.
    ///
    /// # Errors
    /// If [`Self::keep`] or [`Self::every`] is 0, there are checkpoints but [`Self::resume`] is off, all of them
    /// are damaged, the system cannot read one, another version wrote it, or `settings` differ in more than
    /// [`Self::changes`] allows.
    pub(super) fn begin(&self, settings: &Settings) -> Result<Option<Found>> {
        at_least_one("checkpoints.keep", self.keep)?;
        at_least_one("checkpoints.every", self.every.unwrap_or(1))?;
        let mut steps = self.steps()?;
        let Some(last) = steps.pop() else { return files::remove_stale(&self.dir).map(|()| None) };
        if !self.resume {
            let reason = format!("it has a run that reached step {last}: resume it, or give another folder");
            return Err(Error::format(&self.dir, reason));
        }
        files::remove_stale(&self.dir)?;
        let mut damaged: Vec<(usize, String)> = Vec::new();
        for step in std::iter::once(last).chain(steps.into_iter().rev()) {
            match State::read(&self.place(step), step) {
                Ok(state) => {
                    self.compare(&state.run_state.settings, settings)?;
                    let aside = |(step, why): (usize, String)| self.quarantine(step, &why);
                    let mut warnings = damaged.into_iter().map(aside).collect::<Result<Vec<_>>>()?;
                    // A run killed right after its last checkpoint did not remove the old ones.
                    warnings.extend(self.prune());
                    return Ok(Some(Found { state, warnings }));
                }
                Err(error) if is_damage(&error) => damaged.push((step, error.to_string())),
                Err(error) => return Err(error),
            }
        }
        let damaged: Vec<String> = damaged.into_iter().map(|(_, why)| why).collect();
        let reason = format!("none of its checkpoints can be read: {}", damaged.join("; "));
        Err(Error::format(&self.dir, reason))
    }

    /// Renames a damaged checkpoint, so that it is ignored but kept, and returns a warning.
    fn quarantine(&self, step: usize, why: &str) -> Result<String> {
        let place = self.place(step);
        let names = (1..).map(|i| self.dir.join(format!("{DAMAGED}{i}-step-{step:08}")));
        let aside = names.into_iter().find(|path| !path.exists()).unwrap_or_else(|| place.clone());
        fs::rename(&place, &aside).map_err(Error::io(&*place))?;
        Ok(format!("the checkpoint of step {step} cannot be read and is {} now: {why}", aside.display()))
    }

    /// Checks that the settings of a run agree with its checkpoint's, except for [`Self::changes`].
    fn compare(&self, before: &Settings, now: &Settings) -> Result<()> {
        let known = |name: &&String| !before.contains_key(*name) && !now.contains_key(*name);
        if let Some(name) = self.changes.iter().find(known) {
            let names: Vec<&str> = now.keys().map(String::as_str).collect();
            let reason = format!("there is no setting {name:?}, expected one of {}", names.join(", "));
            return Err(Error::config("changes", reason));
        }
        let none = "nothing".to_string();
        let of = |settings: &Settings, name: &String| settings.get(name).unwrap_or(&none).clone();
        let names = before.keys().chain(now.keys().filter(|name| !before.contains_key(*name)));
        for name in names.filter(|name| before.get(*name) != now.get(*name)) {
            let (was, is) = (of(before, name), of(now, name));
            let reason = format!("the run in {} had {was}, this one has {is}", self.dir.display());
            if PLACE.contains(&name.as_str()) {
                let why = "it determines which rows a step takes and cannot change during a run";
                return Err(Error::config(name, format!("{reason}: {why}")));
            }
            if !self.changes.contains(name) {
                let how = "if this is intended, allow the change (--allow-change; Checkpoints::changes)";
                return Err(Error::config(name, format!("{reason}: {how}")));
            }
        }
        Ok(())
    }

    /// Writes a checkpoint and removes the oldest beyond [`Self::keep`]. If old checkpoints cannot be
    /// removed, the reason is returned as a warning; the run can continue.
    ///
    /// # Errors
    /// If the checkpoint cannot be written.
    pub(super) fn save(&self, state: &State) -> Result<Option<String>> {
        let step = state.run_state.step;
        let partial = files::partial_folder(&self.place(step));
        fs::create_dir(&partial).map_err(Error::io(&*partial))?;
        let settled = state.write(&partial).and_then(|()| settle(&partial, &self.place(step)));
        // Free the space, in case the disk is full.
        settled.inspect_err(|_| drop(fs::remove_dir_all(&partial)))?;
        Ok(self.prune())
    }

    /// Removes the oldest checkpoints beyond [`Self::keep`]; returns a warning if that fails.
    fn prune(&self) -> Option<String> {
        self.remove_old().err().map(|error| format!("old checkpoints could not be removed: {error}"))
    }

    fn remove_old(&self) -> Result<()> {
        let steps = self.steps()?;
        for old in &steps[..steps.len().saturating_sub(self.keep)] {
            // Rename before removing: a partly removed checkpoint would look damaged.
            let place = self.place(*old);
            fs::rename(&place, files::partial_folder(&place)).map_err(Error::io(&*place))?;
        }
        files::remove_stale(&self.dir)
    }

    fn names(&self) -> Result<Vec<OsString>> {
        let name = |entry: std::io::Result<fs::DirEntry>| Ok(entry?.file_name());
        let names = fs::read_dir(&self.dir).and_then(|entries| entries.map(name).collect());
        names.map_err(Error::io(&*self.dir))
    }

    fn place(&self, step: usize) -> PathBuf {
        self.dir.join(format!("step-{step:08}"))
    }

    /// Returns the steps of the existing checkpoints in ascending order.
    fn steps(&self) -> Result<Vec<usize>> {
        // Only exact names: `step-7` and `step-+0000007` are not ours.
        let step = |name: OsString| {
            let step = name.to_str()?.strip_prefix("step-")?.parse().ok()?;
            (self.place(step).file_name() == Some(&name)).then_some(step)
        };
        let mut steps: Vec<usize> = self.names()?.into_iter().filter_map(step).collect();
        steps.sort_unstable();
        Ok(steps)
    }
}

/// The checkpoint that a run resumes from.
pub(super) struct Found {
    pub state: State,
    /// What is wrong with newer checkpoints, and where they are now.
    pub warnings: Vec<String>,
}

/// Whether the error means that a checkpoint differs from what was written. Other errors may be temporary.
fn is_damage(error: &Error) -> bool {
    match error {
        Error::Format { .. } => true,
        Error::Io { source, .. } => source.kind() == ErrorKind::NotFound,
        _ => false,
    }
}

/// Flushes a folder whose files are already on disk, and renames it to its place.
fn settle(partial: &Path, place: &Path) -> Result<()> {
    sync_folder(partial)?;
    fs::rename(partial, place).map_err(Error::io(place))?;
    sync_folder(place.parent().unwrap_or(place))
}

/// Flushes a folder's directory entries, on systems that support it.
fn sync_folder(dir: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(Error::io(dir))
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
