//! Dtypes and devices.

use candle_core::{DType, Device, Result, Tensor};

/// `xs` in another dtype and place: cast before it leaves the host, or after it has come from a
/// device, because not every device has double precision.
pub(crate) fn to_dtype_device(xs: &Tensor, dtype: DType, device: &Device) -> Result<Tensor> {
    if xs.device().is_cpu() {
        xs.to_dtype(dtype)?.to_device(device)
    } else {
        xs.to_device(device)?.to_dtype(dtype)
    }
}

/// The dtype that transcendental functions and sums run in: f32 for the half-width ones.
pub(crate) fn wide(dtype: DType) -> DType {
    if dtype == DType::F64 {
        DType::F64
    } else {
        DType::F32
    }
}
