//! The logs of a run of the examples: a line for each step, a line for each evaluation, and what TensorBoard reads.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use monteclora::train::{StepRecord, TensorBoard};
use monteclora::util::files;
use monteclora::{Error, Result};
use serde::Serialize;
use serde_json::{json, Map, Value};

use super::Outcome;

/// `log.jsonl`, `evaluations.jsonl` and, where it is asked for, `tensorboard/` in the folder of a run.
pub struct Log {
    dir: PathBuf,
    steps: Lines,
    evaluations: Lines,
    tensorboard: bool,
    board: Option<TensorBoard>,
}

impl Log {
    /// The logs in the folder `dir`, which is made where it is missing.
    pub fn create(dir: &Path, tensorboard: bool) -> Outcome<Self> {
        std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
        let lines = |name: &str| Lines { path: dir.join(name), file: None };
        let (steps, evaluations) = (lines("log.jsonl"), lines("evaluations.jsonl"));
        Ok(Self { dir: dir.to_path_buf(), steps, evaluations, tensorboard, board: None })
    }

    /// Removes what a run before this one, killed, left half-written in the folder.
    pub fn remove_stale(&self) -> Result<()> {
        let out = &self.dir;
        [out, &out.join("adapter"), &out.join("model"), &out.join("plots")]
            .into_iter()
            .try_for_each(|dir| files::remove_stale(dir))
    }

    /// Keeps what is of the first `done` steps, and is ready for those after them.
    pub fn start(&mut self, done: usize) -> Result<()> {
        self.steps.start(done)?;
        self.evaluations.start(done)?;
        if self.tensorboard {
            self.board = Some(TensorBoard::create(&self.dir.join("tensorboard"), done)?);
        }
        Ok(())
    }

    /// A step.
    pub fn write(&mut self, record: &StepRecord) -> Result<()> {
        self.board.as_mut().map_or(Ok(()), |board| board.record(record))?;
        self.steps.write(record)
    }

    /// The line of a step that was left out.
    pub fn skipped(&mut self, step: usize, why: &Error) -> Result<()> {
        self.steps.write(&json!({ "step": step, "skipped": why.to_string() }))
    }

    /// What an evaluation found.
    pub fn evaluated(&mut self, step: usize, values: &[(String, f64)]) -> Result<()> {
        let mut line = Map::from_iter([("step".to_string(), json!(step))]);
        line.extend(values.iter().map(|(name, value)| (name.clone(), json!(value))));
        for (name, value) in values {
            self.board.as_mut().map_or(Ok(()), |board| board.scalar(name, step, *value))?;
        }
        self.evaluations.write(&line)
    }
}

/// Draws the curves of a run that is done, where this program can (cargo feature `plot`).
pub fn draw_curves(dir: &Path) -> Result<()> {
    #[cfg(feature = "plot")]
    monteclora::study::plot::write_run(dir, &dir.join("plots"))?;
    #[cfg(not(feature = "plot"))]
    let _ = dir;
    Ok(())
}

/// A file of JSON lines, each of a step.
struct Lines {
    path: PathBuf,
    file: Option<File>,
}

impl Lines {
    /// Keeps the lines of the first `done` steps and opens the file for those after them.
    fn start(&mut self, done: usize) -> Result<()> {
        let log = match std::fs::read(&self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
            log => log.map_err(Error::io(&*self.path))?,
        };
        // A line that a kill cut, or a disk damaged, is the one that is lost.
        let step = |line: &[u8]| serde_json::from_slice::<Value>(line).ok()?["step"].as_u64();
        let lines = log.split(|byte| *byte == b'\n');
        let kept = lines.filter(|line| step(line).is_some_and(|step| step <= done as u64));
        let kept: Vec<u8> = kept.flat_map(|line| [line, b"\n"]).flatten().copied().collect();
        files::write(&self.path, &kept)?;
        let file = File::options().append(true).open(&self.path);
        self.file = Some(file.map_err(Error::io(&*self.path))?);
        Ok(())
    }

    fn write(&mut self, record: &impl Serialize) -> Result<()> {
        let line = serde_json::to_string(record).map_err(std::io::Error::from);
        // Each line at once: a run that is killed leaves its log.
        let written = line.and_then(|line| match &mut self.file {
            Some(file) => file.write_all(format!("{line}\n").as_bytes()),
            None => Ok(()),
        });
        written.map_err(Error::io(&*self.path))
    }
}
