//! Which engine the processes of a run meet through.

use candle_core::Device;

use super::communicator::{Communicator, SingleProcess};
use super::launch::{Launch, Launcher};
use crate::error::{Error, Result};

/// The engine for the processes that were started together: for a process that was started alone [`SingleProcess`];
/// between CUDA devices NCCL, else MPI.
///
/// # Errors
/// If this build has no engine for them, it says which feature has one; if MPI counts other processes than the
/// launcher, or the engine cannot begin.
pub fn launched(launch: Option<&Launch>, device: &Device) -> Result<Box<dyn Communicator>> {
    let Some(launch) = launch else { return Ok(Box::new(SingleProcess)) };
    match launch.launcher {
        Launcher::Torchrun => by_files(launch, device),
        Launcher::Mpirun | Launcher::Srun => over_mpi(launch, device),
    }
}

#[cfg(feature = "nccl")]
fn by_files(launch: &Launch, device: &Device) -> Result<Box<dyn Communicator>> {
    Ok(Box::new(super::nccl::Nccl::by_files(launch, device)?))
}

#[cfg(not(feature = "nccl"))]
fn by_files(launch: &Launch, _: &Device) -> Result<Box<dyn Communicator>> {
    let reason = format!("{launch}: processes meet through MPI (feature mpi): start them by mpirun or srun");
    Err(Error::config("distributed", reason))
}

#[cfg(feature = "mpi")]
fn over_mpi(launch: &Launch, device: &Device) -> Result<Box<dyn Communicator>> {
    let mpi = super::mpi::Mpi::new()?;
    if (mpi.rank(), mpi.world()) != (launch.rank, launch.world) {
        let reason = format!(
            "{launch}, but MPI says {} of {}: it was built for another launcher (with Slurm, srun --mpi=pmix)",
            mpi.rank(),
            mpi.world()
        );
        return Err(Error::config("distributed", reason));
    }
    #[cfg(feature = "nccl")]
    if device.is_cuda() {
        return Ok(Box::new(super::nccl::Nccl::over(Box::new(mpi), device)?));
    }
    let _ = device; // its tensors go through the host
    Ok(Box::new(mpi))
}

#[cfg(not(feature = "mpi"))]
fn over_mpi(launch: &Launch, device: &Device) -> Result<Box<dyn Communicator>> {
    // Slurm's processes need no MPI where they have GPUs.
    if cfg!(feature = "nccl") && device.is_cuda() {
        return by_files(launch, device);
    }
    Err(Error::config("distributed", format!("{launch}, but this program was built without the feature mpi")))
}
