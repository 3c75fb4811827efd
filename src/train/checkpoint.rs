//! Checkpoints: all that a run needs to go on where it stopped, bit for bit.
//!
//! A checkpoint is the folder `step-00000120`: `state.json` (numbers and settings),
//! `tensors.safetensors` (parameters, moments, the best parameters so far, the method's own state) and
//! `manifest.json` (size and CRC-32 of both). It is written beside its place, flushed to the disk and
//! renamed, so that a run may be killed at any moment; what is damaged afterwards, the manifest tells.
//! The folder of a run is locked while it trains.

mod state;

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

pub(super) use state::{RunState, State};

use super::settings::Settings;
use crate::error::{Error, Result};
use crate::util::files;

/// What a damaged checkpoint is called from then on: nobody reads or removes it.
const DAMAGED: &str = "damaged-";
/// The settings that say which rows a step takes: with others the place of a run means another.
const PLACE: [&str; 5] = ["accumulation", "batch_size", "length_grouped", "rows", "seed"];

/// Where the checkpoints of a run are kept, and how it goes on from them.
#[derive(Debug, Clone)]
pub struct Checkpoints {
    /// Their folder.
    pub dir: PathBuf,
    /// How many of the newest stay, at least 1.
    pub keep: usize,
    /// Steps between two of them, at least 1; at each evaluation where absent. A run that is asked to stop or ends
    /// writes one, too.
    pub every: Option<usize>,
    /// Whether a run goes on from the newest valid one, where there is one.
    pub resume: bool,
    /// What must be the same to go on, beside what the run knows itself: the model, say.
    pub settings: Settings,
    /// The settings that may differ from those of the checkpoint all the same; never those that say
    /// which rows a step takes: the rows, their order (the seed, grouping by length), the batch size,
    /// the accumulation.
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

    /// Where a run begins, in a folder that is locked: the newest checkpoint that is sound, or nothing
    /// where there is none. Newer ones that are damaged are put aside.
    ///
    /// # Errors
    /// If a count is 0, there are checkpoints and the run is not to go on from them, all of them are damaged, the
    /// system cannot read one, another version wrote it, or `settings` differ in what
    /// [`Self::changes`] does not name.
    pub(super) fn begin(&self, settings: &Settings) -> Result<Option<Found>> {
        let counts = [("keep", self.keep), ("every", self.every.unwrap_or(1))];
        if let Some((name, _)) = counts.iter().find(|(_, count)| *count == 0) {
            return Err(Error::config(format!("checkpoints.{name}"), "must be at least 1"));
        }
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
                    // A run that was killed right after its last checkpoint writes no other.
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

    /// Renames a damaged checkpoint: it no longer counts, and whoever wants it has it. Says so.
    fn quarantine(&self, step: usize, why: &str) -> Result<String> {
        let place = self.place(step);
        let names = (1..).map(|i| self.dir.join(format!("{DAMAGED}{i}-step-{step:08}")));
        let aside = names.into_iter().find(|path| !path.exists()).unwrap_or_else(|| place.clone());
        fs::rename(&place, &aside).map_err(Error::io(&*place))?;
        Ok(format!("the checkpoint of step {step} cannot be read and is {} now: {why}", aside.display()))
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
        for name in names.filter(|name| before.get(*name) != now.get(*name)) {
            let (was, is) = (of(before, name), of(now, name));
            let reason = format!("the run in {} had {was}, this one has {is}", self.dir.display());
            if PLACE.contains(&name.as_str()) {
                let why = "it says which rows a step takes, and cannot change on the way";
                return Err(Error::config(name, format!("{reason}: {why}")));
            }
            if !self.changes.contains(name) {
                return Err(Error::config(name, format!("{reason}: allow the change if it is meant")));
            }
        }
        Ok(())
    }

    /// Writes a checkpoint and removes the oldest beyond [`Self::keep`]. Returns what keeps it from
    /// removing them, which is no reason to end a run.
    ///
    /// # Errors
    /// If the checkpoint cannot be written.
    pub(super) fn save(&self, state: &State) -> Result<Option<String>> {
        let step = state.run_state.step;
        let partial = files::partial_folder(&self.place(step));
        fs::create_dir(&partial).map_err(Error::io(&*partial))?;
        let settled = state.write(&partial).and_then(|()| settle(&partial, &self.place(step)));
        // A full disk is to have room again before the error is told.
        settled.inspect_err(|_| drop(fs::remove_dir_all(&partial)))?;
        Ok(self.prune())
    }

    /// Removes the oldest beyond [`Self::keep`]; what keeps it from that.
    fn prune(&self) -> Option<String> {
        self.remove_old().err().map(|error| format!("old checkpoints stay: {error}"))
    }

    fn remove_old(&self) -> Result<()> {
        let steps = self.steps()?;
        for old in &steps[..steps.len().saturating_sub(self.keep)] {
            // Out of sight first: half removed, it would look damaged.
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

    /// The steps of the checkpoints that there are, in their order.
    fn steps(&self) -> Result<Vec<usize>> {
        // A stranger's `step-7` is no place of ours, and neither is `step-+0000007`.
        let step = |name: OsString| {
            let step = name.to_str()?.strip_prefix("step-")?.parse().ok()?;
            (self.place(step).file_name() == Some(&name)).then_some(step)
        };
        let mut steps: Vec<usize> = self.names()?.into_iter().filter_map(step).collect();
        steps.sort_unstable();
        Ok(steps)
    }
}

/// The checkpoint that a run goes on from.
pub(super) struct Found {
    pub state: State,
    /// What is wrong with newer ones, and where they are now.
    pub warnings: Vec<String>,
}

/// Whether a checkpoint is not what was written. What the system cannot read now, it may read later.
fn is_damage(error: &Error) -> bool {
    match error {
        Error::Format { .. } => true,
        Error::Io { source, .. } => source.kind() == ErrorKind::NotFound,
        _ => false,
    }
}

/// Flushes a folder whose files are on the disk, and puts it in its place.
fn settle(partial: &Path, place: &Path) -> Result<()> {
    sync_folder(partial)?;
    fs::rename(partial, place).map_err(Error::io(place))?;
    sync_folder(place.parent().unwrap_or(place))
}

/// Flushes the names in a folder, where the system has such a thing.
fn sync_folder(dir: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(Error::io(dir))
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
