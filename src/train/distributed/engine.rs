//! Chooses the engine through which the processes of a run communicate.

use candle_core::Device;

use super::communicator::{Communicator, SingleProcess};
use super::launch::{Launch, Launcher};
use crate::error::{Error, Result};

/// Returns the engine for processes that were launched together: NCCL between CUDA devices, else MPI. A
/// process that was started alone gets [`SingleProcess`].
///
/// # Errors
/// If this build lacks an engine for them (the error names the feature to enable), MPI and the launcher
/// disagree about the processes, or the engine cannot start.
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
            "{launch}, but MPI reports {} of {}: it is for another launcher (with Slurm, srun --mpi=pmix)",
            mpi.rank(),
            mpi.world()
        );
        return Err(Error::config("distributed", reason));
    }
    #[cfg(feature = "nccl")]
    if device.is_cuda() {
        return Ok(Box::new(super::nccl::Nccl::over(Box::new(mpi), device)?));
    }
    let _ = device; // tensors go through the host
    Ok(Box::new(mpi))
}

#[cfg(not(feature = "mpi"))]
fn over_mpi(launch: &Launch, device: &Device) -> Result<Box<dyn Communicator>> {
    // Slurm's processes need no MPI if they have GPUs.
    if cfg!(feature = "nccl") && device.is_cuda() {
        return by_files(launch, device);
    }
    Err(Error::config("distributed", format!("{launch}, but this program was built without the feature mpi")))
}
