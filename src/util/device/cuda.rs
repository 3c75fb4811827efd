//! Creates CUDA devices; no other code does.
#![allow(unsafe_code)] // the driver's own calls, on a device and a pool that it gave; and see `new`

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::result::{device, mem_pool, DriverError};
use candle_core::cuda_backend::cudarc::driver::sys::{CUmemPool_attribute, CUmemoryPool};
use candle_core::cuda_backend::cudarc::driver::CudaContext;
use candle_core::{CudaDevice, Device};

use crate::error::{Error, Result};

/// The result of a driver call.
type Driven<T> = std::result::Result<T, DriverError>;

/// Returns the device with this number, created on first use and kept until the process ends: two devices for
/// one GPU would have two streams, while candle would take them for the same device.
pub(super) fn device(ordinal: usize) -> Result<Device> {
    static DEVICES: Mutex<BTreeMap<usize, Device>> = Mutex::new(BTreeMap::new());
    // Held while the device is created, so that two threads do not create two. A panic leaves the map intact.
    let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(device) = devices.get(&ordinal) {
        return Ok(device.clone());
    }
    let device = new(ordinal)?;
    devices.insert(ordinal, device.clone());
    Ok(device)
}

fn new(ordinal: usize) -> Result<Device> {
    let failed = |reason: String| Error::config("device", format!("cuda:{ordinal}: {reason}"));
    let count = CudaContext::device_count().map_err(|e| failed(format!("there is no device: {e:?}")))?;
    if !usize::try_from(count).is_ok_and(|count| ordinal < count) {
        return Err(failed(format!("this machine has {count} devices, numbered from 0")));
    }
    let device = Device::new_cuda_with_stream(ordinal).map_err(|e| failed(e.to_string()))?;
    let cuda = device.as_cuda_device()?;
    // Nothing is allocated yet, and all later allocations only see this one stream. It runs in the order of
    // the host's calls, so that an event for each use of each tensor would be redundant.
    unsafe { cuda.disable_event_tracking() };
    if let Some(pool) = pool(cuda) {
        let all = u64::MAX; // keep all free memory instead of returning it to the driver when the host waits
        set(pool, CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, all)
            .map_err(|e| failed(format!("cannot set the release threshold of its memory pool: {e:?}")))?;
    }
    Ok(device)
}

/// Returns the pool that a device's memory comes from, if it has one.
fn pool(device: &CudaDevice) -> Option<CUmemoryPool> {
    let stream = device.cuda_stream();
    let context = stream.context();
    if !context.has_async_alloc() {
        return None;
    }
    unsafe { device::get_default_mem_pool(context.cu_device()) }.ok()
}

fn set(pool: CUmemoryPool, attribute: CUmemPool_attribute, mut value: u64) -> Driven<()> {
    unsafe { mem_pool::set_attribute(pool, attribute, (&raw mut value).cast()) }
}

fn get(pool: CUmemoryPool, attribute: CUmemPool_attribute) -> Driven<u64> {
    let mut value = 0u64;
    unsafe { mem_pool::get_attribute(pool, attribute, (&raw mut value).cast()) }?;
    Ok(value)
}

/// Returns the high-water mark or the current use: after a reset, the mark may stay 0 until an allocation.
pub(super) fn peak_bytes(device: &Device) -> Option<u64> {
    let pool = pool(device.as_cuda_device().ok()?)?;
    let high = get(pool, CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH).ok()?;
    Some(high.max(get(pool, CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT).ok()?))
}

pub(super) fn free_bytes(device: &Device) -> Option<u64> {
    let stream = device.as_cuda_device().ok()?.cuda_stream();
    let (free, _) = stream.context().mem_get_info().ok()?;
    // Memory that the pool holds for this process without using it.
    let kept = pool(device.as_cuda_device().ok()?).map_or(0, |pool| {
        let of = |attribute| get(pool, attribute).unwrap_or(0);
        of(CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)
            .saturating_sub(of(CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT))
    });
    Some(u64::try_from(free).ok()? + kept)
}

/// If the reset fails, later peaks include earlier use.
pub(super) fn reset_peak_bytes(device: &Device) {
    if let Some(pool) = device.as_cuda_device().ok().and_then(pool) {
        set(pool, CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH, 0).ok();
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Tensor};

    use super::*;
    use crate::util::device::{cuda_device, free_device_bytes, peak_device_bytes, reset_peak_device_bytes};

    #[test]
    fn a_device_is_one_for_all_threads_and_orders_its_work_by_itself() -> Result<()> {
        let here = cuda_device(0)?;
        let others: Vec<_> = (0..4).map(|_| std::thread::spawn(|| cuda_device(0))).collect();
        for other in others {
            assert!(other.join().expect("no panic")?.same_device(&here));
        }
        let device = here.as_cuda_device()?;
        assert!(!device.is_event_tracking());
        // Neither the per-thread default stream (handle 2) nor the default stream that all wait for (0).
        assert!(device.cuda_stream().cu_stream() as usize > 2);
        Ok(())
    }

    #[test]
    fn a_device_that_is_not_there_is_named() {
        for ordinal in [4711, usize::MAX] {
            let error = cuda_device(ordinal).unwrap_err().to_string();
            assert!(error.contains(&format!("cuda:{ordinal}: this machine has ")), "{error}");
        }
    }

    #[test]
    fn the_peak_is_of_what_was_in_use_together() -> Result<()> {
        let device = cuda_device(0)?;
        reset_peak_device_bytes(&device);
        let Some(before) = peak_device_bytes(&device) else { return Ok(()) };
        let bytes = 64 << 20;
        for _ in 0..3 {
            drop(Tensor::zeros(bytes, DType::U8, &device)?);
        }
        let peak = peak_device_bytes(&device).expect("as before").saturating_sub(before);
        // Concurrent tests allocate and free memory too: expect the size once, not never or thrice.
        assert!((bytes as u64 / 2..2 * bytes as u64).contains(&peak), "{peak}");
        Ok(())
    }

    #[test]
    fn memory_that_is_given_back_is_free_again() -> Result<()> {
        let device = cuda_device(0)?;
        let free = || free_device_bytes(&device).expect("a device says what it has");
        let (before, bytes) = (free(), 256 << 20);
        let held = Tensor::zeros(bytes, DType::U8, &device)?;
        let during = free();
        drop(held);
        device.synchronize()?;
        // Concurrent tests use much less.
        let room = bytes as u64 / 2;
        assert!(during + room < before && before < free() + room, "{before}, {during}, {}", free());
        Ok(())
    }
}
