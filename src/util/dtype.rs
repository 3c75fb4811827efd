//! Conversions between dtypes and devices.

use candle_core::{DType, Device, Result, Tensor};

/// Converts `xs` to another dtype and device. The cast runs on the host, before or after the copy, because
/// not every device supports double precision.
pub(crate) fn to_dtype_device(xs: &Tensor, dtype: DType, device: &Device) -> Result<Tensor> {
    if xs.device().is_cpu() {
        xs.to_dtype(dtype)?.to_device(device)
    } else {
        xs.to_device(device)?.to_dtype(dtype)
    }
}

/// The dtype for transcendental functions and sums: f32 for half-precision types.
pub(crate) fn wide(dtype: DType) -> DType {
    if dtype == DType::F64 {
        DType::F64
    } else {
        DType::F32
    }
}
