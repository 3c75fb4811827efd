//! Random numbers by address instead of from a consumed state.
//!
//! Every random number of this crate is a pure function of (seed, path, purpose, draw index, position). The
//! generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Its
//! key is a stable hash of seed, path and purpose; its counter is the draw index and the position. So a
//! checkpoint stores only a seed and an index, the order of layers does not matter, and a layer recomputed by
//! gradient checkpointing sees the same draw.
//!
//! [`Noise`] is a seed, [`Stream`] the noise of one place for one purpose, and [`Stream::rng`] a generator of
//! the crate `rand` over one draw of it, for any distribution of `rand_distr`.
//!
//! Integer words, uniform numbers and single-precision normals are the same on every machine and for any
//! number of threads. Double-precision normals are the same only for one build on one target, since they use
//! the system's `ln`, `sin` and `cos`.

mod normal;
mod philox;
mod rng;
mod stream;

/// The number of blocks in a [`Stream::word_group`].
pub(crate) use philox::LANES as WORD_LANES;
pub use rng::DrawRng;
pub use stream::{Noise, Purpose, Stream};
