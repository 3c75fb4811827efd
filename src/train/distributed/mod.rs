//! Data-parallel training: one run in several processes, each of which computes its share of a step's micro-batches.
//!
//! Only the gradients of what is trained cross, in one sum for each step. Rank r of W takes the micro-batches r, r + W,
//! .. of a step, each with the draw that it has in one process, so that W processes are one process with the same
//! [`accumulation`](super::TrainConfig::accumulation) up to the order of sums: the same data in the same order, the
//! same dropout, the same draws, the regulariser counted once. A run may go on with another number of processes.
//!
//! What is decided, is decided by all alike: clipping, steps that are left out, evaluations, the end. Rank 0 writes the
//! checkpoints; an error of one rank in a step, an evaluation or a checkpoint ends all of them with its reason, and one
//! that is nobody else's ends the others where its caller calls [`Communicator::abort`].

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
