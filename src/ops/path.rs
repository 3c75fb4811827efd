//! The choice of a block's implementation.

use candle_core::{DType, Tensor};

/// The three implementations of every block of [`crate::ops`].
///
/// The caller chooses one; [`Self::Fused`], the default, is the fastest that the tensors allow. The others
/// are for tests, so that a machine without a GPU can run what a GPU runs. A backward pass stays on the path
/// of its forward pass.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use monteclora::ops::{gelu, OpPath};
/// let xs = Tensor::new(&[-1f32, 0.5, 2.0], &Device::Cpu)?;
/// let fused = gelu(&xs, OpPath::Fused)?.to_vec1::<f32>()?;
/// let composed = gelu(&xs, OpPath::Composed)?.to_vec1::<f32>()?;
/// assert!(fused.iter().zip(&composed).all(|(a, b)| (a - b).abs() < 1e-6));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum OpPath {
    /// Slices, rayon and the `gemm` crate for f32 on the CPU, and this crate's kernels, where there are any,
    /// on a CUDA device; elsewhere the same as `Composed`.
    #[default]
    Fused,
    /// Ordinary tensor operations on detached inputs with a closed-form backward, for every
    /// device and float dtype.
    Composed,
    /// Candle's own differentiable operations, with which tests compare the other paths.
    Reference,
}

impl OpPath {
    /// Every path.
    pub const ALL: [Self; 3] = [Self::Fused, Self::Composed, Self::Reference];
}

/// The code that computes an operation on given tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Implementation {
    /// That of [`OpPath::Reference`].
    Reference,
    /// That of [`OpPath::Composed`].
    Composed,
    /// This crate's kernels for the steps that have one for the tensors at hand, and [`Self::Composed`] for
    /// the others.
    Kernels,
    /// Slices, rayon and `gemm`: all tensors are f32 on the CPU.
    Slices,
}

impl OpPath {
    /// The implementation of an operation on these tensors.
    pub(super) fn on(self, tensors: &[&Tensor]) -> Implementation {
        match self {
            Self::Reference => Implementation::Reference,
            Self::Composed => Implementation::Composed,
            Self::Fused if tensors.iter().all(|t| t.device().is_cpu() && t.dtype() == DType::F32) => {
                Implementation::Slices
            }
            Self::Fused => Implementation::Kernels,
        }
    }
}
