//! MPI: the engine for clusters without GPUs, and for GPUs if NCCL is not built in.

use std::fmt;
use std::io::Write;
use std::time::{Duration, Instant};

use ::mpi::collective::{CommunicatorCollectives, Root, SystemOperation};
use ::mpi::datatype::Equivalence;
use ::mpi::environment::Universe;
use ::mpi::request::{scope, Request, Scope};
use ::mpi::topology::{Communicator as _, SimpleCommunicator};
use ::mpi::Threading;
use candle_core::{DType, Tensor, WithDType};

use super::communicator::Communicator;
use crate::error::{Error, Result};

/// The largest number of elements in one call: MPI counts in 32 bits.
const PIECE: usize = 1 << 28;

/// The processes that `mpirun` or `srun` started. Tensors on a device go through the host.
///
/// If a process dies, the others end: the launcher notices at once, and a process that waits longer than its
/// patience reports it and ends all of them. A process that panics also ends all.
pub struct Mpi {
    world: SimpleCommunicator,
    patience: Duration,
    _universe: Universe, // finalises MPI when dropped
}

impl Mpi {
    /// How long a process waits for the others by default: rank 0 may evaluate or write meanwhile.
    pub const PATIENCE: Duration = Duration::from_secs(1800);

    /// Joins the other processes.
    ///
    /// # Errors
    /// If MPI was initialised before in this process.
    pub fn new() -> Result<Self> {
        // Rayon's threads compute; only this thread calls MPI.
        let Some((universe, _)) = ::mpi::initialize_with_threading(Threading::Funneled) else {
            return Err(Error::config("mpi", "it was already initialised in this process"));
        };
        Ok(Self { world: universe.world(), patience: Self::PATIENCE, _universe: universe })
    }

    /// Sets the longest time to wait for the other processes.
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Waits for a request; ends all processes if it takes longer than `patience`.
    fn wait<'a, D: ?Sized, S: Scope<'a>>(&self, mut request: Request<'a, D, S>) {
        let start = Instant::now();
        for turn in 0u32.. {
            request = match request.test() {
                Ok(_) => return,
                Err(request) => request,
            };
            if start.elapsed() > self.patience {
                let waited = self.patience.as_secs_f64();
                self.say(&format!(
                    "waited {waited:.0} s for the other processes: one of them has ended or hangs"
                ));
                self.world.abort(1);
            }
            // Laptops often run more processes than cores: give up the core after a moment.
            match turn {
                0..1000 => std::hint::spin_loop(),
                1000..2000 => std::thread::yield_now(),
                _ => std::thread::sleep(Duration::from_micros(50)),
            }
        }
    }

    fn say(&self, what: &str) {
        writeln!(std::io::stderr(), "rank {}: {what}", self.world.rank()).ok();
    }

    fn sum<T: WithDType + Equivalence>(&self, flat: &Tensor) -> Result<Tensor> {
        let own = flat.to_vec1::<T>()?;
        let mut all = vec![T::zero(); own.len()];
        for (own, all) in own.chunks(PIECE).zip(all.chunks_mut(PIECE)) {
            scope(|scope| {
                self.wait(self.world.immediate_all_reduce_into(scope, own, all, SystemOperation::sum()));
            });
        }
        Ok(Tensor::from_vec(all, flat.dims(), flat.device())?)
    }
}

impl fmt::Debug for Mpi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mpi")
            .field("rank", &self.rank())
            .field("world", &self.world())
            .finish_non_exhaustive()
    }
}

impl Communicator for Mpi {
    fn rank(&self) -> usize {
        self.world.rank() as usize
    }

    fn world(&self) -> usize {
        self.world.size() as usize
    }

    fn all_reduce_sum(&self, flat: &Tensor) -> Result<Tensor> {
        match flat.dtype() {
            DType::F32 => self.sum::<f32>(flat),
            DType::F64 => self.sum::<f64>(flat),
            other => Err(Error::tensor("flat", format!("sums are in f32 or f64, got {other:?}"))),
        }
    }

    fn broadcast(&self, mut bytes: Vec<u8>, root: usize) -> Result<Vec<u8>> {
        let root = self.world.process_at_rank(root as i32);
        let mut count = bytes.len() as u64;
        scope(|scope| self.wait(root.immediate_broadcast_into(scope, &mut count)));
        bytes.resize(count as usize, 0);
        for piece in bytes.chunks_mut(PIECE) {
            scope(|scope| self.wait(root.immediate_broadcast_into(scope, piece)));
        }
        Ok(bytes)
    }

    fn barrier(&self) -> Result<()> {
        self.all_reduce_sum(&Tensor::zeros(1, DType::F32, &candle_core::Device::Cpu)?).map(drop)
    }

    fn abort(&self, code: i32) -> ! {
        self.world.abort(code)
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Finalising MPI would wait for the others, which wait for this process.
            self.say("it panicked");
            self.world.abort(101);
        }
    }
}
