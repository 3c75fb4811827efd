//! Communication between the processes of a run.

use std::fmt::Debug;

use candle_core::Tensor;

use crate::error::Result;

/// A group of processes, each of which calls the same methods in the same order. Implemented by the engines
/// of clusters, and by [`SingleProcess`] without communication.
pub trait Communicator: Debug {
    /// Returns the rank of this process, from 0.
    fn rank(&self) -> usize;

    /// Returns the number of processes.
    fn world(&self) -> usize;

    /// Returns the sum of `flat` over all processes, on this process's device. All processes get the same
    /// bytes.
    ///
    /// # Shapes
    /// - `flat`: `(n)`, with the same n and dtype (f32 or f64) in all processes
    /// - output: `(n)`
    ///
    /// # Errors
    /// If the engine fails, or a process waits longer than it may.
    fn all_reduce_sum(&self, flat: &Tensor) -> Result<Tensor>;

    /// Returns the bytes of process `root` in all processes; the bytes of the others are ignored.
    ///
    /// # Errors
    /// As [`Self::all_reduce_sum`].
    fn broadcast(&self, bytes: Vec<u8>, root: usize) -> Result<Vec<u8>>;

    /// Returns once all processes have called it.
    ///
    /// # Errors
    /// As [`Self::all_reduce_sum`].
    fn barrier(&self) -> Result<()>;

    /// Ends all processes, this one with the exit status `code`: for an error that the other processes do not
    /// know of, so that they would wait for this one. The default exits this process.
    fn abort(&self, code: i32) -> ! {
        std::process::exit(code)
    }
}

/// A single process, which exchanges nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct SingleProcess;

impl Communicator for SingleProcess {
    fn rank(&self) -> usize {
        0
    }

    fn world(&self) -> usize {
        1
    }

    fn all_reduce_sum(&self, flat: &Tensor) -> Result<Tensor> {
        Ok(flat.clone())
    }

    fn broadcast(&self, bytes: Vec<u8>, _root: usize) -> Result<Vec<u8>> {
        Ok(bytes)
    }

    fn barrier(&self) -> Result<()> {
        Ok(())
    }
}
