//! The sample buffer: the noise of a block of draws, prepared in bulk.
//!
//! The buffer holds only untransformed noise, because the parameters change at every step. Its size never
//! changes results: noise is a function of the draw's index, not consumed from a generator.

use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::Result;
use rayon::prelude::*;

use super::config::MAX_BUFFER_SIZE;
use super::noise::{DrawNoise, DrawSpec, NoiseStreams};
use crate::dist::wishart;

/// The noise of one layer's draws, in blocks of `len` consecutive indices.
///
/// Meant for devices that receive their noise from the host: `len` draws need one round of copies. CUDA
/// devices generate the noise of the default draws themselves and never use the buffer. On the CPU,
/// generating a draw from its index is as fast or faster (8 x 768, N = 4: collapsed 18 us, against 21 us with
/// a buffer of 15 draws; explicit 39 against 52 us, at N = 64 0.49 against 1.4 ms) and takes no memory, so
/// layers there start without a buffer; [`Self::resize`] adds one. A thread that prepares blocks ahead would
/// cost memory and save less than a percent of a step.
///
/// # Memory
/// ```text
/// len * (K r in_dim + r^2) * (bytes of the dtype) + 8 N len,   K = N if Explicit, else 1
/// ```
/// For RoBERTa-base's query, key and value at r = 8, 15 draws of single-precision noise are 13 MB.
/// If several threads miss the buffer at the same time, each prepares a block, and one block is kept.
#[derive(Debug)]
pub struct SampleBuffer {
    spec: DrawSpec,
    streams: NoiseStreams,
    size: usize,
    byte_cap: Option<usize>,
    block: Mutex<Option<Block>>,
}

/// The draws `block * len .. (block + 1) * len`.
#[derive(Debug)]
struct Block {
    index: u64,
    draws: Vec<DrawNoise>,
}

impl SampleBuffer {
    /// Creates a buffer of at most `size` draws (and [`MAX_BUFFER_SIZE`]) and, if given, `byte_cap` bytes. It
    /// is filled at first use.
    pub fn new(spec: DrawSpec, streams: NoiseStreams, size: usize, byte_cap: Option<usize>) -> Self {
        Self { spec, streams, size, byte_cap, block: Mutex::new(None) }
    }

    /// The specification of its noise.
    pub fn spec(&self) -> &DrawSpec {
        &self.spec
    }

    /// The number of draws in a block: the size, or as many as fit under the byte cap; 0 disables the buffer.
    pub fn len(&self) -> usize {
        let fits = self.byte_cap.map_or(MAX_BUFFER_SIZE, |cap| cap / self.spec.bytes_per_draw().max(1));
        self.size.min(fits).min(MAX_BUFFER_SIZE)
    }

    /// Whether the buffer is disabled, so that every draw is generated anew.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The size of a full block in bytes.
    pub fn bytes(&self) -> usize {
        self.len().saturating_mul(self.spec.bytes_per_draw())
    }

    /// Sets the size and the byte cap, and drops the current block.
    pub fn resize(&mut self, size: usize, byte_cap: Option<usize>) {
        (self.size, self.byte_cap) = (size, byte_cap);
        self.block = Mutex::new(None);
    }

    /// Returns the noise of draw number `draw` ([`crate::adapter::Pass::posterior_draw`]).
    ///
    /// # Errors
    /// As [`DrawSpec::generate`].
    pub fn get(&self, draw: u64) -> Result<DrawNoise> {
        let len = self.len() as u64;
        if len == 0 || draw >= wishart::DRAWS {
            return self.spec.generate(&self.streams, draw);
        }
        let (index, place) = (draw / len, (draw % len) as usize);
        match &mut *self.lock() {
            Some(kept) if kept.index == index => return Ok(kept.draws[place].clone()),
            other => *other = None, // frees its memory before the next block is allocated
        }
        // The lock is not held here: while rayon waits for the last pieces of the block, this thread may
        // start another job, which may call this buffer.
        let first = index * len;
        let host = (first..(first + len).min(wishart::DRAWS))
            .into_par_iter()
            .map(|draw| self.spec.host(&self.streams, draw))
            .collect::<Result<Vec<_>>>()?;
        let draws = host.into_iter().map(|host| self.spec.upload(host)).collect::<Result<Vec<_>>>()?;
        let noise = draws[place].clone();
        *self.lock() = Some(Block { index, draws });
        Ok(noise)
    }

    // A panic while the lock is held leaves a whole block or none.
    fn lock(&self) -> MutexGuard<'_, Option<Block>> {
        self.block.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
