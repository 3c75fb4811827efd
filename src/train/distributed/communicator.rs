//! What the processes of a run agree through.

use std::fmt::Debug;

use candle_core::Tensor;

use crate::error::Result;

/// A group of processes, each of which calls the same methods in the same order. The engines behind it are those of
/// clusters: [`SingleProcess`] has nobody to talk to.
pub trait Communicator: Debug {
    /// The number of this process, from 0.
    fn rank(&self) -> usize;

    /// How many processes there are.
    fn world(&self) -> usize;

    /// The sum over all processes of their `flat`, on the device of this one. All of them get the same bytes.
    ///
    /// # Shapes
    /// - `flat`: `(n)`, n and the dtype (f32 or f64) the same everywhere
    /// - output: `(n)`
    ///
    /// # Errors
    /// If the engine fails, or waits for longer than it may.
    fn all_reduce_sum(&self, flat: &Tensor) -> Result<Tensor>;

    /// The bytes of process `root`, on all of them; what the others give is left aside.
    ///
    /// # Errors
    /// As [`Self::all_reduce_sum`].
    fn broadcast(&self, bytes: Vec<u8>, root: usize) -> Result<Vec<u8>>;

    /// Returns when all processes have called it.
    ///
    /// # Errors
    /// As [`Self::all_reduce_sum`].
    fn barrier(&self) -> Result<()>;

    /// Ends all processes, this one with the exit status `code`: for an error that the others do not know of and
    /// would wait behind.
    fn abort(&self, code: i32) -> ! {
        std::process::exit(code)
    }
}

/// A process that runs alone: it exchanges nothing.
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
