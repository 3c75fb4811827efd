//! Noise that is addressed, not consumed.
//!
//! Every random number of this crate is a pure function of (seed, path, purpose, draw index,
//! position). The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy
//! as 1, 2, 3", SC 2011), keyed by a stable hash of the first three and counting the last two.
//! So a checkpoint stores only a seed and an index, the order of layers never matters, and a
//! layer recomputed in a checkpointed backward sees the same draw.
//!
//! [`Noise`] is a seed, [`Stream`] the noise of one place for one purpose, and [`Stream::rng`] a
//! generator of the crate `rand` over one draw of it, for any law of `rand_distr`.
//!
//! The integer words are the same on every machine and for every number of threads, and so are
//! uniform numbers and single-precision normals. Double-precision normals are the same for one build
//! on one target: they pass through the system's `ln`, `sin`, `cos`.

mod normal;
mod philox;
mod rng;
mod stream;

/// The noise blocks of [`Stream::word_group`].
pub(crate) use philox::LANES as WORD_LANES;
pub use rng::DrawRng;
pub use stream::{Noise, Purpose, Stream};
