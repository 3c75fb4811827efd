//! CUDA devices with one stream each, and their memory use.

#[cfg(feature = "cuda")]
mod cuda;

use candle_core::Device;

use crate::error::Result;

/// Returns CUDA device number `ordinal`, with one stream for all threads. All calls return the same device.
///
/// Use this instead of candle's `Device::new_cuda`, which gives every host thread its own stream: data that
/// one thread loads or frees and another uses is then unordered, which raises no error but sometimes gives
/// wrong numbers. This device also keeps freed memory for later allocations instead of returning it to the
/// driver whenever the host waits.
///
/// # Example
/// ```
/// use candle_core::Device;
/// let device = monteclora::cuda_device(0).unwrap_or(Device::Cpu);
/// ```
///
/// # Errors
/// If this build lacks the feature `cuda`, there is no such device, or it fails.
pub fn cuda_device(ordinal: usize) -> Result<Device> {
    cuda::device(ordinal)
}

/// Returns the largest number of bytes that this process's tensors used at one time on a CUDA device since
/// [`reset_peak_device_bytes`], like PyTorch's `max_memory_allocated`. `None` for other devices, and for
/// devices without a memory pool.
pub fn peak_device_bytes(device: &Device) -> Option<u64> {
    cuda::peak_bytes(device)
}

/// Returns the bytes of a CUDA device that no process uses at present. `None` for other devices.
pub fn free_device_bytes(device: &Device) -> Option<u64> {
    cuda::free_bytes(device)
}

/// Resets [`peak_device_bytes`]: the next peak starts from the present use.
pub fn reset_peak_device_bytes(device: &Device) {
    cuda::reset_peak_bytes(device);
}

/// The fallback without the feature `cuda`.
#[cfg(not(feature = "cuda"))]
mod cuda {
    use candle_core::Device;

    use crate::error::{Error, Result};

    pub(super) fn device(ordinal: usize) -> Result<Device> {
        Err(Error::config("device", format!("cuda:{ordinal}: this build lacks the cargo feature `cuda`")))
    }

    pub(super) fn peak_bytes(_: &Device) -> Option<u64> {
        None
    }

    pub(super) fn free_bytes(_: &Device) -> Option<u64> {
        None
    }

    pub(super) fn reset_peak_bytes(_: &Device) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_build_without_devices_says_so() {
        assert!(cuda_device(3).unwrap_err().to_string().contains("cuda:3: this build lacks"));
    }

    #[test]
    fn the_host_has_no_memory_of_a_device() {
        reset_peak_device_bytes(&Device::Cpu);
        assert_eq!(peak_device_bytes(&Device::Cpu), None);
    }
}
