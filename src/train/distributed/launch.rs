//! Reads from a launcher's environment variables which process this is, and of how many.

use std::fmt;

use crate::error::{Error, Result};

/// The launcher of a run's processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Launcher {
    /// Open MPI's `mpirun`.
    Mpirun,
    /// Slurm's `srun`.
    Srun,
    /// `torchrun`, or anything that sets the same variables.
    Torchrun,
}

/// This process among those that were launched together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// The launcher.
    pub launcher: Launcher,
    /// The rank among all processes, from 0.
    pub rank: usize,
    /// The number of processes.
    pub world: usize,
    /// The rank among the processes on this machine, which selects its device.
    pub local_rank: usize,
}

impl fmt::Display for Launch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let launcher = match self.launcher {
            Launcher::Mpirun => "mpirun",
            Launcher::Srun => "srun",
            Launcher::Torchrun => "torchrun",
        };
        let Self { rank, world, local_rank, .. } = self;
        write!(f, "process {rank} of {world}, number {local_rank} on this machine, started by {launcher}")
    }
}

impl Launch {
    /// Reads the environment; `None` if this process was started alone.
    ///
    /// # Errors
    /// If the variables contradict each other: a number of processes without a rank, or a rank out of range.
    pub fn from_env() -> Result<Option<Self>> {
        Self::from_variables(&|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    /// [`Self::from_env`] for given variables.
    ///
    /// # Errors
    /// As [`Self::from_env`].
    pub fn from_variables(get: &dyn Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        // SLURM_STEP_NUM_TASKS is only set within a step of `srun`; a batch script also has SLURM_PROCID and
        // SLURM_NTASKS.
        let launchers = [
            (
                Launcher::Mpirun,
                ["OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"],
            ),
            (Launcher::Torchrun, ["WORLD_SIZE", "RANK", "LOCAL_RANK"]),
            (Launcher::Srun, ["SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"]),
        ];
        for (launcher, names) in launchers {
            let values = names.map(get);
            let [world, rank, local_rank] = match (launcher, &values) {
                (_, [None, ..]) if launcher != Launcher::Torchrun => continue,
                (_, [None, None, _]) => continue,
                _ => number_each(names, &values)?,
            };
            if rank >= world {
                let reason = format!("expected less than {world} ({}), got {rank}", names[0]);
                return Err(Error::config(names[1], reason));
            }
            return Ok((world > 1).then_some(Self { launcher, rank, world, local_rank }));
        }
        Ok(None)
    }
}

/// Parses the variables. The last may be missing, if there is one process on each machine.
fn number_each(names: [&str; 3], values: &[Option<String>; 3]) -> Result<[usize; 3]> {
    let number = |at: usize| {
        let (name, value) = (names[at], values[at].as_deref());
        let missing = || {
            let has = names.iter().zip(values).find_map(|(name, value)| Some((name, value.as_ref()?)));
            let (other, value) = has.map_or(("", ""), |(name, value)| (*name, value.as_str()));
            Error::config(name, format!("it is not set, though {other} is {value}"))
        };
        let value = match (value, at) {
            (None, 2) => return Ok(0),
            (value, _) => value.ok_or_else(missing)?,
        };
        value.trim().parse().map_err(|_| Error::config(name, format!("expected a number, got {value:?}")))
    };
    Ok([number(0)?, number(1)?, number(2)?])
}
