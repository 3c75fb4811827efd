//! Our own kernels for CUDA devices: the draw, norms, dropout, attention, activations, what stands beside the products of
//! linear layers, cross-entropy, rows, the regulariser and priors, the gamma function's family, AdamW.
//!
//! NVRTC compiles them when a device first needs one. Without a device they are tested as C++, noise and
//! rounding included: `dialect.cu` has what makes that possible.

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
#[cfg(all(test, unix))]
mod tests;

#[cfg(feature = "cuda")]
pub(crate) use launch::{
    alloc_uninit, check, count, elements, launch, one_each, program, supports, supports_all, tensor,
};

/// All kernels, as one program.
#[cfg(feature = "cuda")]
const SOURCE: &str = concat!(
    include_str!("dialect.cu"),
    include_str!("noise.cu"),
    include_str!("gamma.cu"),
    include_str!("blocks.cu"),
    include_str!("norm.cu"),
    include_str!("draw.cu"),
    include_str!("divergence.cu"),
    include_str!("energy.cu"),
    include_str!("update.cu"),
    include_str!("attention.cu"),
    include_str!("loss.cu"),
    include_str!("gather.cu"),
    include_str!("activation.cu"),
    include_str!("linear.cu"),
);
