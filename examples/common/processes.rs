//! Runs in one process or in several: this process's role, and the work that only the first one does.

use std::cell::OnceCell;
use std::process::ExitCode;

use candle_core::Device;
use indicatif::{ProgressBar, ProgressDrawTarget};
use monteclora::study::Shard;
use monteclora::train::distributed::{in_turns, launched, Communicator, Launch, SingleProcess};
use monteclora::Error;

use super::output::{self, tell_err};
use super::{interrupt, Outcome};

/// This process and those that it was started with.
pub struct Processes {
    launch: Option<Launch>,
    communicator: OnceCell<Box<dyn Communicator>>,
}

/// Runs an example and ends it, in all of its processes.
pub fn run(example: impl FnOnce(&Processes) -> Outcome) -> ExitCode {
    let outcome = Processes::find().and_then(|processes| {
        let outcome = example(&processes);
        processes.leave(outcome)
    });
    super::exit(outcome)
}

impl Processes {
    fn find() -> Outcome<Self> {
        let launch = Launch::from_env()?;
        if launch.as_ref().is_some_and(|launch| launch.rank > 0) {
            output::hush();
        }
        Ok(Self { launch, communicator: OnceCell::new() })
    }

    /// Connects to the other processes, once their `--device` is known.
    pub fn join(&self, device: &str) -> Outcome {
        let communicator = launched(self.launch.as_ref(), &self.devices(device)?[0])?;
        if let Some(launch) = self.launch.as_ref().filter(|_| self.is_first()) {
            tell_err!("{launch}");
        }
        self.communicator.set(communicator).map_err(|_| "they are joined once".into())
    }

    /// Ends this process. After an error that only this process knows of, aborts all, since the others would
    /// wait for it.
    fn leave(&self, outcome: Outcome) -> Outcome {
        match (outcome, self.communicator.get()) {
            (Err(error), Some(communicator)) if self.world() > 1 && !is_interruption(error.as_ref()) => {
                output::last_line(format_args!("rank {}: error: {error}", communicator.rank()));
                communicator.abort(1)
            }
            (outcome, _) => outcome,
        }
    }

    /// The communicator between the processes.
    pub fn communicator(&self) -> &dyn Communicator {
        self.communicator.get().map_or(&SingleProcess, AsRef::as_ref)
    }

    /// The number of processes.
    pub fn world(&self) -> usize {
        self.launch.as_ref().map_or(1, |launch| launch.world)
    }

    /// Whether this process is the first, which writes the files.
    pub fn is_first(&self) -> bool {
        self.launch.as_ref().is_none_or(|launch| launch.rank == 0)
    }

    /// The device that `--device` names.
    pub fn device(&self, text: &str) -> Outcome<Device> {
        super::device(&self.device_name(text))
    }

    /// The devices that `--device` names, separated by commas; more than one only for a single process.
    pub fn devices(&self, text: &str) -> Outcome<Vec<Device>> {
        if text.contains(',') && self.world() > 1 {
            return Err(format!(
                "--device {text}: expected one device for each of {} processes, got several",
                self.world()
            )
            .into());
        }
        text.split(',').map(|text| self.device(text)).collect()
    }

    /// For `cuda`, the device with this process's local rank.
    pub fn device_name(&self, text: &str) -> String {
        match (&self.launch, text) {
            (Some(launch), "cuda") => format!("cuda:{}", launch.local_rank),
            _ => text.to_string(),
        }
    }

    /// This process's share of a shard of a study's cells.
    pub fn share(&self, of: Shard) -> Shard {
        self.launch.as_ref().map_or(of, |launch| of.share(launch.rank, launch.world))
    }

    /// Stops all processes at a point where there is nothing to save, if one was asked to stop.
    pub fn check(&self, step: usize) -> Outcome {
        let own = |_| Ok(vec![f64::from(u8::from(interrupt::requested()))]);
        let asked = in_turns(self.communicator(), self.world(), &mut { own })?;
        match asked.concat().iter().any(|asked| *asked > 0.0) {
            true => Err(Error::Interrupted { step }.into()),
            false => Ok(()),
        }
    }

    /// Creates a progress bar that only the first process shows.
    pub fn progress(&self, length: u64, name: &str) -> ProgressBar {
        let bar = super::progress(length, name);
        if !self.is_first() {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        bar
    }
}

fn is_interruption(error: &(dyn std::error::Error + Send + Sync + 'static)) -> bool {
    matches!(error.downcast_ref(), Some(Error::Interrupted { .. }))
}
