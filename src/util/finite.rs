//! Checks tensors for NaN and infinity.

use candle_core::{DType, Result, Tensor};

/// Returns an f32 scalar on the tensor's device: 0 if all elements are finite, else NaN. The scalars of many
/// tensors can be copied to the host at once.
pub(crate) fn zero_if_finite(tensor: &Tensor) -> Result<Tensor> {
    // NaN and infinity times zero are NaN. Flattening makes a scalar a row of one: candle's sum over no
    // dimension asks the device for an empty allocation, which a device without a memory pool refuses.
    (tensor.detach() * 0.0)?.flatten_all()?.sum_all()?.to_dtype(DType::F32)
}

/// Whether every element is a finite number.
pub(crate) fn is_finite(tensor: &Tensor) -> Result<bool> {
    Ok(zero_if_finite(tensor)?.to_scalar::<f32>()? == 0.0)
}

/// Returns the index, in row-major order, and the value of the first element that is not finite in single
/// precision.
pub(crate) fn first_non_finite(tensor: &Tensor) -> Result<Option<(usize, f32)>> {
    let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    Ok(values.into_iter().enumerate().find(|(_, value)| !value.is_finite()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    #[test]
    fn nan_and_infinity_are_found_in_every_dtype() -> Result<()> {
        let xs = Tensor::new(&[[1f32, -3.0], [0.5, 3e4]], &Device::Cpu)?;
        for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
            assert!(is_finite(&xs.to_dtype(dtype)?)?);
            assert_eq!(first_non_finite(&xs.to_dtype(dtype)?)?, None);
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let ys = Tensor::new(&[[1f32, -3.0], [bad, 3e4]], &Device::Cpu)?.to_dtype(dtype)?;
                assert!(!is_finite(&ys)?, "{bad} {dtype:?}");
                let (at, found) = first_non_finite(&ys)?.expect("a bad element");
                assert!(at == 2 && found.to_bits() == bad.to_bits(), "{at} {found}");
            }
        }
        // The result is not part of the graph.
        assert!(!zero_if_finite(Var::from_tensor(&xs)?.as_tensor())?.track_op());
        assert!(is_finite(&Tensor::zeros(0, DType::F32, &Device::Cpu)?)?);
        Ok(())
    }
}
