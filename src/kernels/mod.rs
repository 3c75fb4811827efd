//! The crate's own kernels for CUDA devices: draws, norms, dropout, attention, activations, biases and split
//! adapters of linear layers, cross-entropy, gathering of rows, the regulariser and priors, the gamma
//! function's family, AdamW.
//!
//! NVRTC compiles them when a device first needs one. The tests compile them as C++ and run them without a
//! device, including noise and rounding; `dialect.cu` has the macros that make this possible.

#[cfg(feature = "cuda")]
pub(crate) mod activation;
#[cfg(feature = "cuda")]
pub(crate) mod attention;
#[cfg(feature = "cuda")]
mod cublas;
#[cfg(feature = "cuda")]
pub(crate) mod divergence;
#[cfg(feature = "cuda")]
pub(crate) mod draws;
#[cfg(feature = "cuda")]
pub(crate) mod energy;
#[cfg(feature = "cuda")]
pub(crate) mod gather;
#[cfg(feature = "cuda")]
pub(crate) mod gemm;
#[cfg(feature = "cuda")]
mod launch;
#[cfg(feature = "cuda")]
pub(crate) mod linear;
#[cfg(feature = "cuda")]
pub(crate) mod loss;
#[cfg(feature = "cuda")]
pub(crate) mod multi_tensor;
#[cfg(feature = "cuda")]
pub(crate) mod norm;
#[cfg(feature = "cuda")]
mod products;
#[cfg(feature = "cuda")]
mod source;
#[cfg(all(test, unix))]
mod tests;

#[cfg(feature = "cuda")]
pub(crate) use launch::{
    alloc_uninit, check, count, elements, launch, one_each, program, supports, supports_all, tensor,
};
