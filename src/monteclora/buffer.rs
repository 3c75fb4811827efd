//! The sample buffer: the noise of a block of draws, prepared in bulk.
//!
//! It holds untransformed noise only, because the parameters change at every step. Whatever its
//! size, results are the same: noise is addressed, not consumed.

use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::Result;
use rayon::prelude::*;

use super::config::MAX_BUFFER_SIZE;
use super::noise::{DrawNoise, DrawSpec, NoiseStreams};
use crate::dist::wishart;

/// The noise of one layer's draws, a block of `len` consecutive indices at a time.
///
/// It is for devices to which noise comes from the host: one round of copies for `len` draws. CUDA
/// devices make the default draws' noise themselves and never use it. On the CPU a draw from its
/// address is as fast or faster (8 x 768, N = 4: collapsed 18 us, with a buffer of 15 21 us; explicit 39
/// and 52 us, at N = 64 0.49 and 1.4 ms) and keeps nothing, so layers there start without one;
/// [`Self::resize`] gives them one all the same. A thread that prepares blocks ahead
/// would be paid for in memory and has less than a percent of a step to save.
///
/// # Memory
/// ```text
/// len * (K r in_dim + r^2) * (bytes of the dtype) + 8 N len,   K = N if Explicit, else 1
/// ```
/// For RoBERTa-base's query, key and value at r = 8, 15 draws of single-precision noise are 13 MB.
/// Threads that miss it at the same time each prepare a block, of which one is kept.
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
    /// A buffer of at most `size` draws (and [`MAX_BUFFER_SIZE`]) and, where given, `byte_cap` bytes;
    /// it fills at first use.
    pub fn new(spec: DrawSpec, streams: NoiseStreams, size: usize, byte_cap: Option<usize>) -> Self {
        Self { spec, streams, size, byte_cap, block: Mutex::new(None) }
    }

    /// The specification of its noise.
    pub fn spec(&self) -> &DrawSpec {
        &self.spec
    }

    /// The number of draws of a block: the size, or what fits under the cap; 0 is off.
    pub fn len(&self) -> usize {
        let fits = self.byte_cap.map_or(MAX_BUFFER_SIZE, |cap| cap / self.spec.bytes_per_draw().max(1));
        self.size.min(fits).min(MAX_BUFFER_SIZE)
    }

    /// Whether it keeps nothing, and every draw is made anew.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes of a full block.
    pub fn bytes(&self) -> usize {
        self.len().saturating_mul(self.spec.bytes_per_draw())
    }

    /// Sets the size and the most bytes, and forgets the present block.
    pub fn resize(&mut self, size: usize, byte_cap: Option<usize>) {
        (self.size, self.byte_cap) = (size, byte_cap);
        self.block = Mutex::new(None);
    }

    /// The noise of draw number `draw` ([`crate::adapter::Pass::posterior_draw`]).
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
            other => *other = None, // its memory is free before the next block takes its own
        }
        // Not under the lock: while rayon waits for the last pieces of the block, this thread may
        // take up another job, and that job may ask this very buffer.
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
