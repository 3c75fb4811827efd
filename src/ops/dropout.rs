//! Dropout from addressed noise.

use candle_core::{DType, Device, Result, Shape, Tensor};

use super::custom_vjp::custom_vjp;
use super::dropout_mask::{check, mask_tensor, scale, DropoutMask};
use super::path::{Implementation, OpPath};
use super::reference;
use crate::noise::Stream;
use crate::util::dtype::wide;

/// Zeroes each element with probability `p` and scales the rest by `1 / (1 - p)`.
///
/// Whether element i (in row-major order) is kept depends only on (stream, draw, i): it is decided by word
/// `i % 4` of noise block `i / 4`, on every device and for any number of threads. For backward, f32 on the
/// CPU keeps one bit per element, which is 1.9 times as fast as a mask tensor; CUDA kernels recompute the
/// mask; elsewhere it takes a byte per element. `p = 0` returns `xs` itself.
///
/// # Errors
/// If `p` is not in `[0, 1)`.
pub fn dropout(xs: &Tensor, p: f64, stream: &Stream, draw: u64, path: OpPath) -> Result<Tensor> {
    check(p)?;
    if p == 0.0 {
        return Ok(xs.clone());
    }
    let keep = || DropoutMask::new(xs.elem_count(), p, stream, draw);
    match path.on(&[xs]) {
        Implementation::Reference => reference::dropout(xs, &keep()),
        Implementation::Slices => {
            let keep = keep();
            let y = keep.apply(&xs.detach())?;
            custom_vjp("dropout", [xs], y, move |call| Ok([Some(keep.apply(&call.grad)?)]))
        }
        how => {
            let plan = DropoutPlan::new((xs.shape(), xs.dtype(), xs.device()), p, stream, draw, how)?;
            let y = plan.apply(&xs.detach())?;
            custom_vjp("dropout", [xs], y, move |call| Ok([Some(plan.apply(&call.grad)?)]))
        }
    }
}

/// Dropout in tensor operations or kernels, which applies alike to a tensor and to its gradient.
pub(super) enum DropoutPlan {
    /// A precomputed mask of u8, 1 for kept elements, and the factor on kept elements.
    Mask(Tensor, f64),
    /// p, stream and draw, from which a kernel recomputes the mask each time.
    #[cfg(feature = "cuda")]
    Kernel(f64, Stream, u64),
}

impl DropoutPlan {
    /// Dropout for tensors of this shape and dtype on this device, by a kernel if [`Implementation::Kernels`]
    /// is asked for and the tensors are supported.
    #[cfg_attr(not(feature = "cuda"), allow(unused_variables))]
    pub fn new(
        (shape, dtype, device): (&Shape, DType, &Device),
        p: f64,
        stream: &Stream,
        draw: u64,
        how: Implementation,
    ) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if how == Implementation::Kernels && crate::kernels::supports(shape.elem_count(), dtype, device) {
            return Ok(Self::Kernel(p, *stream, draw));
        }
        Ok(Self::Mask(mask_tensor(shape, device, p, stream, draw)?, scale(p)))
    }

    /// Applies dropout to the detached `xs`.
    pub fn apply(&self, xs: &Tensor) -> Result<Tensor> {
        match self {
            Self::Mask(mask, scale) => {
                let x = xs.to_dtype(wide(xs.dtype()))?;
                ((&x * mask.to_dtype(x.dtype())?)? * *scale)?.to_dtype(xs.dtype())
            }
            #[cfg(feature = "cuda")]
            Self::Kernel(p, stream, draw) => crate::kernels::norm::dropout(
                xs,
                super::dropout_mask::threshold(*p),
                scale(*p),
                stream.key(),
                *draw,
            ),
        }
    }
}
