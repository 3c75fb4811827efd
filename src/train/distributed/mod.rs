//! Data-parallel training: one run in several processes, each of which computes a part of every step's
//! micro-batches.
//!
//! Only the gradients of trainable parameters are exchanged, in one sum per step. Rank r of W takes the
//! micro-batches r, r + W, .. of a step, each with the same draw as in a single process. W processes
//! therefore match one process with the same [`accumulation`](super::TrainConfig::accumulation) up to the
//! order of sums: the same data in the same order, dropout and draws, and the regulariser counted once. A run
//! may be resumed with another number of processes.
//!
//! All processes make the same decisions: clipping, skipped steps, evaluations, the end. Rank 0 writes the
//! checkpoints. An error of one rank in a step, an evaluation or a checkpoint ends all ranks with its reason;
//! after any other error, the caller must call [`Communicator::abort`] to end the other ranks.

mod communicator;
mod engine;
mod failure;
mod launch;
#[cfg(feature = "mpi")]
mod mpi;
#[cfg(feature = "nccl")]
mod nccl;
mod ranks;
#[cfg(any(feature = "nccl", test))]
mod rendezvous;
mod turns;

pub use communicator::{Communicator, SingleProcess};
pub use engine::launched;
pub use launch::{Launch, Launcher};
#[cfg(feature = "mpi")]
pub use mpi::Mpi;
#[cfg(feature = "nccl")]
pub use nccl::Nccl;

pub use turns::in_turns;

pub(super) use ranks::Ranks;

#[cfg(test)]
mod tests;
