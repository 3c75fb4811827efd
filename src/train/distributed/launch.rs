//! Who started this process, as one of how many: what launchers leave in the environment.

use std::fmt;

use crate::error::{Error, Result};

/// What started the processes of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Launcher {
    /// Open MPI's `mpirun`.
    Mpirun,
    /// Slurm's `srun`.
    Srun,
    /// `torchrun`, or who sets its variables.
    Torchrun,
}

/// This process among those that were started together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// What started it.
    pub launcher: Launcher,
    /// Its number among all, from 0.
    pub rank: usize,
    /// How many there are.
    pub world: usize,
    /// Its number among those on this machine: which of its devices it takes.
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
    /// What the environment says; None of a process that was started by itself.
    ///
    /// # Errors
    /// If its variables contradict each other: a number of processes without this one's, one that is not among them.
    pub fn from_env() -> Result<Option<Self>> {
        Self::from_variables(&|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    /// The same of other variables.
    ///
    /// # Errors
    /// As [`Self::from_env`].
    pub fn from_variables(get: &dyn Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        // Within a step of `srun` alone: a batch script has SLURM_PROCID and SLURM_NTASKS as well.
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
                let reason = format!("{rank} is none of the {world} processes that {} says", names[0]);
                return Err(Error::config(names[1], reason));
            }
            return Ok((world > 1).then_some(Self { launcher, rank, world, local_rank }));
        }
        Ok(None)
    }
}

/// The numbers of the variables, of which the last may be missing where there is one process on each machine.
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
