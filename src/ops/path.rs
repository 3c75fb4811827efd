//! Which implementation of a block runs.

use candle_core::{DType, Tensor};

/// The three implementations of every block of [`crate::ops`].
///
/// A caller says which one it wants; [`Self::Fused`], the default, is the fastest that the tensors
/// allow. To name another serves the tests: a machine without a GPU runs what a GPU will run. A backward
/// pass stays on the path of its forward pass.
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
    /// Slices, rayon and the `gemm` crate for f32 on the CPU, kernels of our own where there are some on
    /// a CUDA device; elsewhere it means `Composed`.
    #[default]
    Fused,
    /// Ordinary tensor operations on detached inputs with a closed-form backward: every device and
    /// every float dtype.
    Composed,
    /// Candle's own differentiable operations: what the tests compare with.
    Reference,
}

impl OpPath {
    /// The path of an operation on these tensors: `Fused` where all are f32 on the CPU.
    pub(super) fn on(self, tensors: &[&Tensor]) -> Self {
        match self {
            Self::Fused if !tensors.iter().all(|t| t.device().is_cpu() && t.dtype() == DType::F32) => {
                Self::Composed
            }
            path => path,
        }
    }

    /// Whether kernels of our own may stand in for composed operations on a device that has them.
    pub(crate) fn has_kernels(self) -> bool {
        self == Self::Fused
    }
}
