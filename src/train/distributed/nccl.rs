//! NCCL: sums between GPUs without the host.

use std::fmt;
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, ValidAsZeroBits};
use candle_core::cuda_backend::cudarc::nccl::safe::{Comm, Id, NcclType, ReduceOp};
use candle_core::cuda_backend::{CudaDType, CudaDevice};
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, DType, Device, Storage, Tensor};

use super::communicator::Communicator;
use super::launch::Launch;
use super::rendezvous::{meet, RENDEZVOUS};
use crate::error::{Error, Result};

/// The size in bytes of the identifier with which processes find each other.
const ID: usize = 128;

/// Processes with one GPU each. Bytes other than tensors go through MPI if the processes have it, else
/// through the GPUs.
pub struct Nccl {
    comm: Comm,
    device: CudaDevice,
    host: Option<Box<dyn Communicator>>,
    patience: Duration,
}

impl Nccl {
    /// How long a process waits for the others by default.
    pub const PATIENCE: Duration = Duration::from_secs(1800);

    /// Joins the other processes of `host`, each with its own GPU.
    ///
    /// # Errors
    /// If the device is not a CUDA device, or NCCL or `host` fails.
    pub fn over(host: Box<dyn Communicator>, device: &Device) -> Result<Self> {
        let id = host.broadcast(own_id(host.rank())?, 0)?;
        let (rank, world) = (host.rank(), host.world());
        Self::begin(rank, world, &id, device, Some(host))
    }

    /// Joins the other processes of `launch` through files in a folder that all of them see: the one in
    /// `MONTECLORA_RENDEZVOUS`, or by default a folder on this machine.
    ///
    /// # Errors
    /// If the device is not a CUDA device, a process is missing, a file cannot be written, or NCCL fails.
    pub fn by_files(launch: &Launch, device: &Device) -> Result<Self> {
        // Distinct from other users' runs, and from other runs of this user.
        let names = ["USER", "SLURM_JOB_ID", "SLURM_STEP_ID", "MASTER_PORT"];
        let parts: Vec<String> = names.iter().filter_map(|name| std::env::var(name).ok()).collect();
        let default = || std::env::temp_dir().join(format!("monteclora-{}", parts.join("-")));
        let folder = std::env::var_os(RENDEZVOUS).map_or_else(default, PathBuf::from);
        let id = meet(launch, &folder, &own_id(launch.rank)?, Duration::from_secs(300))?;
        Self::begin(launch.rank, launch.world, &id, device, None)
    }

    fn begin(
        rank: usize,
        world: usize,
        id: &[u8],
        device: &Device,
        host: Option<Box<dyn Communicator>>,
    ) -> Result<Self> {
        let Device::Cuda(device) = device else {
            let reason =
                format!("NCCL sums between GPUs, and this process computes on {:?}", device.location());
            return Err(Error::config("device", reason));
        };
        let Ok(id) = <[u8; ID]>::try_from(id) else {
            return Err(Error::Distributed { rank: 0, reason: "it sent no valid NCCL identifier".into() });
        };
        let id = Id::uninit(id.map(|byte| byte as std::ffi::c_char));
        // NCCL takes the GPU that is current on this thread, which may not be the one that made the device.
        device.cuda_stream().context().bind_to_thread().map_err(|e| failed(rank, &e))?;
        let comm = Comm::from_rank(device.cuda_stream(), rank, world, id).map_err(|e| failed(rank, &e))?;
        Ok(Self { comm, device: device.clone(), host, patience: Self::PATIENCE })
    }

    /// Sets the longest time to wait for the other processes.
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Waits until the device has finished its queued work; ends this process if that takes longer than
    /// `patience`. A sum that a process does not join never ends.
    fn wait(&self) -> Result<()> {
        let done = self.comm.stream().record_event(None).map_err(|e| failed(self.rank(), &e))?;
        let start = Instant::now();
        // `is_complete` would take an error of the device for "not yet".
        while !done.try_is_complete().map_err(|e| failed(self.rank(), &e))? {
            if start.elapsed() > self.patience {
                let (rank, waited) = (self.rank(), self.patience.as_secs_f64());
                let what = "s for the other processes: one of them has ended or hangs";
                writeln!(std::io::stderr(), "rank {rank}: waited {waited:.0} {what}").ok();
                self.abort(1);
            }
            std::thread::sleep(Duration::from_micros(20));
        }
        Ok(())
    }

    fn sum<T: CudaDType + DeviceRepr + NcclType + ValidAsZeroBits>(&self, flat: &Tensor) -> Result<Tensor> {
        let flat = flat.contiguous()?;
        let count = flat.elem_count();
        let mut all = self.device.alloc_zeros::<T>(count)?;
        {
            let (storage, layout) = flat.storage_and_layout();
            let Storage::Cuda(storage) = &*storage else {
                return Err(Error::tensor("flat", "it is not on this process's GPU"));
            };
            if !BackendDevice::same_device(&storage.device, &self.device) {
                return Err(Error::tensor("flat", "it is on another GPU than this process's"));
            }
            let own = storage.as_cuda_slice::<T>()?.slice(layout.start_offset()..);
            let own = own.slice(..count);
            self.comm.all_reduce(&own, &mut all, &ReduceOp::Sum).map_err(|e| failed(self.rank(), &e))?;
        }
        self.wait()?;
        let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(all, self.device.clone()));
        Ok(Tensor::from_storage(storage, flat.shape().clone(), BackpropOp::none(), false))
    }

    fn broadcast_slice<T: DeviceRepr + NcclType + 'static>(
        &self,
        mut values: Vec<T>,
        root: usize,
    ) -> Result<Vec<T>> {
        let mut on_device = self.device.clone_htod(&values)?;
        self.comm.broadcast_in_place(&mut on_device, root as i32).map_err(|e| failed(self.rank(), &e))?;
        self.wait()?;
        self.device.memcpy_dtoh(&on_device, &mut values)?;
        self.wait()?;
        Ok(values)
    }
}

/// Returns a new identifier on process 0, nothing on the others.
fn own_id(rank: usize) -> Result<Vec<u8>> {
    if rank > 0 {
        return Ok(Vec::new());
    }
    let id = Id::new().map_err(|e| failed(rank, &e))?;
    Ok(id.internal().iter().map(|byte| *byte as u8).collect())
}

fn failed(rank: usize, error: &dyn fmt::Debug) -> Error {
    Error::Distributed { rank, reason: format!("NCCL: {error:?}") }
}

impl fmt::Debug for Nccl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nccl")
            .field("rank", &self.rank())
            .field("world", &self.world())
            .finish_non_exhaustive()
    }
}

impl Communicator for Nccl {
    fn rank(&self) -> usize {
        self.comm.rank()
    }

    fn world(&self) -> usize {
        self.comm.world_size()
    }

    fn all_reduce_sum(&self, flat: &Tensor) -> Result<Tensor> {
        match flat.dtype() {
            DType::F32 => self.sum::<f32>(flat),
            DType::F64 => self.sum::<f64>(flat),
            other => Err(Error::tensor("flat", format!("sums are in f32 or f64, got {other:?}"))),
        }
    }

    fn broadcast(&self, bytes: Vec<u8>, root: usize) -> Result<Vec<u8>> {
        if let Some(host) = &self.host {
            return host.broadcast(bytes, root);
        }
        let count = self.broadcast_slice(vec![bytes.len() as i64], root)?[0] as usize;
        let mut bytes = bytes;
        bytes.resize(count.max(1), 0);
        let mut bytes = self.broadcast_slice(bytes, root)?;
        bytes.truncate(count);
        Ok(bytes)
    }

    fn barrier(&self) -> Result<()> {
        self.all_reduce_sum(&Tensor::zeros(1, DType::F32, &Device::Cuda(self.device.clone()))?).map(drop)
    }

    fn abort(&self, code: i32) -> ! {
        match &self.host {
            Some(host) => host.abort(code),
            None => std::process::exit(code),
        }
    }
}
