//! The observer of an example's run: progress bar, log, signals.

use std::path::{Path, PathBuf};

use indicatif::ProgressBar;
use monteclora::train::{self, Checkpoints, Objective, Observer, StepRecord, Summary, TrainConfig};
use monteclora::util::files;
use monteclora::{Error, Params, Result};

use super::interrupt;
use super::log::Log;
use super::output::tell_err;
use super::processes::Processes;

/// The results of an evaluation.
#[derive(Default)]
pub struct Scores {
    /// The score that picks the best parameters; higher is better.
    pub score: Option<f64>,
    /// The values to log, with their names, such as `dev/accuracy`.
    pub values: Vec<(String, f64)>,
}

/// The progress bar and the log of a run. The example supplies the evaluation and the saving.
pub struct Watch<'a> {
    /// The progress bar.
    pub bar: ProgressBar,
    /// The log, if the run has an output folder.
    pub log: Option<Log>,
    /// Evaluates the current parameters.
    pub evaluate: &'a dyn Fn(&ProgressBar, usize) -> Result<Scores>,
    /// Whether this is the only process; several must stop together.
    pub is_alone: bool,
    /// Writes the current parameters.
    pub keep: &'a dyn Fn() -> Result<()>,
    /// The whole models that the run writes at its end. They are never overwritten, so an existing one blocks
    /// more steps.
    pub at_end: Vec<PathBuf>,
}

impl Watch<'_> {
    fn log(&mut self, write: impl FnOnce(&mut Log) -> Result<()>) -> Result<()> {
        self.log.as_mut().map_or(Ok(()), write)
    }
}

impl Observer for Watch<'_> {
    fn start(&mut self, total_steps: usize, done: usize) -> Result<()> {
        if self.is_alone {
            interrupt::check(done)?;
        }
        if let Some(path) = self.at_end.iter().find(|path| done < total_steps && is_there(path)) {
            let reason = format!("it is older than the {} steps to do: move it away", total_steps - done);
            return Err(Error::format(path, reason));
        }
        self.bar.set_length(total_steps as u64);
        self.bar.set_position(done as u64);
        if done > 0 {
            say(&self.bar, &format!("{}: resuming after step {done}", self.bar.prefix()));
        }
        self.log(|log| {
            log.remove_stale()?;
            log.start(done)
        })
    }

    fn warned(&mut self, what: &str) {
        say(&self.bar, &format!("warning: {what}"));
    }

    fn step(&mut self, record: &StepRecord) -> Result<()> {
        self.bar.inc(1);
        self.bar.set_message(format!("loss {:.3}", record.loss));
        self.log(|log| log.write(record))
    }

    fn skipped(&mut self, step: usize, why: &Error) -> Result<()> {
        self.bar.inc(1);
        say(&self.bar, &format!("skipped {why}"));
        self.log(|log| log.skipped(step, why))
    }

    fn evaluate(&mut self, step: usize) -> Result<Option<f64>> {
        let Scores { score, values } = (self.evaluate)(&self.bar, step)?;
        self.log(|log| log.evaluated(step, &values))?;
        Ok(score)
    }

    fn kept(&mut self, _step: usize) -> Result<()> {
        (self.keep)()
    }

    fn stop(&self) -> bool {
        interrupt::requested()
    }
}

/// Trains, with checkpoints if given, in all processes.
pub fn fit(
    objective: &dyn Objective,
    params: &Params,
    config: &TrainConfig,
    watch: &mut Watch,
    checkpoints: Option<&Checkpoints>,
    processes: &Processes,
) -> Result<Summary> {
    if !watch.is_alone {
        processes.check(0).map_err(|_| Error::Interrupted { step: 0 })?;
    }
    train::fit_distributed(objective, params, config, watch, checkpoints, processes.communicator())
}

/// Whether the path is a file, or a folder with entries.
fn is_there(path: &Path) -> bool {
    path.is_file() || files::has_entries(path)
}

/// Prints a line above a progress bar. A bar without a terminal drops printed lines, which would leave the
/// log of a long background run empty, so the line then goes to standard error.
pub fn say(bar: &ProgressBar, line: &str) {
    if bar.is_hidden() {
        tell_err!("{line}")
    } else {
        bar.println(line)
    }
}
