//! CUDA devices with one stream each, and how much of their memory was in use at most.

#[cfg(feature = "cuda")]
mod cuda;

use candle_core::Device;

use crate::error::Result;

/// CUDA device number `ordinal`, with one stream for all threads: the same device whenever and wherever it is asked
/// for.
///
/// Take it in the place of candle's `Device::new_cuda`, which gives every thread of the host a stream of its own. What
/// one thread has loaded or freed and another uses is unordered there; nothing fails, numbers are wrong at times. It
/// also keeps freed memory for what comes next, instead of giving it back to the driver whenever the host waits.
///
/// # Example
/// ```
/// use candle_core::Device;
/// let device = monteclora::cuda_device(0).unwrap_or(Device::Cpu);
/// ```
///
/// # Errors
/// If this build is without the feature `cuda`, there is no such device, or it fails.
pub fn cuda_device(ordinal: usize) -> Result<Device> {
    cuda::device(ordinal)
}

/// The most bytes of a CUDA device that tensors of this process had in use at one time since
/// [`reset_peak_device_bytes`]: what PyTorch calls `max_memory_allocated`. None for other devices, and for those that
/// have no memory pool.
pub fn peak_device_bytes(device: &Device) -> Option<u64> {
    cuda::peak_bytes(device)
}

/// The bytes of a CUDA device that nothing has in use now, of this process or another. None for other devices.
pub fn free_device_bytes(device: &Device) -> Option<u64> {
    cuda::free_bytes(device)
}

/// Forgets the peak of [`peak_device_bytes`] so far: the next one begins with what is in use now.
pub fn reset_peak_device_bytes(device: &Device) {
    cuda::reset_peak_bytes(device);
}

/// What there is without the feature.
#[cfg(not(feature = "cuda"))]
mod cuda {
    use candle_core::Device;

    use crate::error::{Error, Result};

    pub(super) fn device(ordinal: usize) -> Result<Device> {
        Err(Error::config("device", format!("cuda:{ordinal}: this build is without `cuda`")))
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
        assert!(cuda_device(3).unwrap_err().to_string().contains("cuda:3: this build is without"));
    }

    #[test]
    fn the_host_has_no_memory_of_a_device() {
        reset_peak_device_bytes(&Device::Cpu);
        assert_eq!(peak_device_bytes(&Device::Cpu), None);
    }
}
