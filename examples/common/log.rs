//! The logs of an example's run: a line per step, a line per evaluation, and TensorBoard's event files.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use monteclora::train::{RunFolder, StepRecord, TensorBoard};
use monteclora::util::files;
use monteclora::{Error, Result};
use serde::Serialize;
use serde_json::{json, Map, Value};

use super::Outcome;

/// The files `log.jsonl`, `evaluations.jsonl` and, if requested, `tensorboard/` in the folder of a run.
pub struct Log {
    dir: PathBuf,
    steps: Lines,
    evaluations: Lines,
    tensorboard: bool,
    board: Option<TensorBoard>,
}

impl Log {
    /// Creates the logs in the folder `dir`, which is created if it is missing.
    pub fn create(dir: &Path, tensorboard: bool) -> Outcome<Self> {
        std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
        let lines = |name: &str| Lines { path: dir.join(name), file: None };
        let (steps, evaluations) = (lines("log.jsonl"), lines("evaluations.jsonl"));
        Ok(Self { dir: dir.to_path_buf(), steps, evaluations, tensorboard, board: None })
    }

    /// Removes half-written files that a killed run left in the folder.
    pub fn remove_stale(&self) -> Result<()> {
        let out = &self.dir;
        let run = RunFolder::new(out);
        [out, &run.adapter(), &run.model(), &out.join("plots")]
            .into_iter()
            .try_for_each(|dir| files::remove_stale(dir))
    }

    /// Keeps the lines of the first `done` steps and opens the logs for the following steps.
    pub fn start(&mut self, done: usize) -> Result<()> {
        self.steps.start(done)?;
        self.evaluations.start(done)?;
        if self.tensorboard {
            self.board = Some(TensorBoard::create(&self.dir.join("tensorboard"), done)?);
        }
        Ok(())
    }

    /// Writes the line of a step.
    pub fn write(&mut self, record: &StepRecord) -> Result<()> {
        self.board.as_mut().map_or(Ok(()), |board| board.record(record))?;
        self.steps.write(record)
    }

    /// Writes the line of a skipped step.
    pub fn skipped(&mut self, step: usize, why: &Error) -> Result<()> {
        self.steps.write(&json!({ "step": step, "skipped": why.to_string() }))
    }

    /// Writes the results of an evaluation.
    pub fn evaluated(&mut self, step: usize, values: &[(String, f64)]) -> Result<()> {
        let mut line = Map::from_iter([("step".to_string(), json!(step))]);
        line.extend(values.iter().map(|(name, value)| (name.clone(), json!(value))));
        for (name, value) in values {
            self.board.as_mut().map_or(Ok(()), |board| board.scalar(name, step, *value))?;
        }
        self.evaluations.write(&line)
    }
}

/// Draws the curves of a finished run, if this program can (cargo feature `plot`).
pub fn draw_curves(dir: &Path) -> Result<()> {
    #[cfg(feature = "plot")]
    monteclora::study::plot::write_run(dir, &dir.join("plots"))?;
    #[cfg(not(feature = "plot"))]
    let _ = dir;
    Ok(())
}

/// A file of JSON lines, each with its step.
struct Lines {
    path: PathBuf,
    file: Option<File>,
}

impl Lines {
    /// Keeps the lines of the first `done` steps and opens the file for the following steps.
    fn start(&mut self, done: usize) -> Result<()> {
        let log = match std::fs::read(&self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
            log => log.map_err(Error::io(&*self.path))?,
        };
        // An incomplete line (after a kill or a disk error) is dropped; all others are kept.
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
        // Each line is written at once, so that a killed run leaves its log.
        let written = line.and_then(|line| match &mut self.file {
            Some(file) => file.write_all(format!("{line}\n").as_bytes()),
            None => Ok(()),
        });
        written.map_err(Error::io(&*self.path))
    }
}
