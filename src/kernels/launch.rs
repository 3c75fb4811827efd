//! Compiling, loading and launching; and tensors as what a launch takes.
#![allow(unsafe_code)] // a launch trusts its arguments, and new memory is what the kernel makes of it

use std::sync::OnceLock;

use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, DevicePtr, LaunchConfig};
use candle_core::cuda_backend::cudarc::nvrtc::{compile_ptx_with_opts, CompileOptions};
use candle_core::cuda_backend::{CudaDType, CudaDevice, CudaStorageSlice};
use candle_core::op::BackpropOp;
use candle_core::{bail, CudaStorage, DType, Device, Layout, Result, Shape, Storage, Tensor};

/// Threads of a block: the kernels' `MOST_THREADS`.
pub(super) const THREADS: u32 = 256;

/// The program of all kernels, compiled at first need.
///
/// # Errors
/// If NVRTC refuses it.
pub(crate) fn program() -> Result<&'static str> {
    static PROGRAM: OnceLock<std::result::Result<String, String>> = OnceLock::new();
    match PROGRAM.get_or_init(compile) {
        Ok(program) => Ok(program),
        Err(reason) => bail!("NVRTC refuses the kernels: {reason}"),
    }
}

/// Without contraction: products and sums round as they do on the host.
fn compile() -> std::result::Result<String, String> {
    let options = CompileOptions { fmad: Some(false), ..Default::default() };
    let program = compile_ptx_with_opts(super::SOURCE, options);
    program.map(|program| program.to_src()).map_err(|e| format!("{e:?}"))
}

/// `blocks` blocks of a fixed number of threads.
pub(crate) fn grid(blocks: u32) -> LaunchConfig {
    LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 }
}

/// A thread for each of `count` elements.
pub(crate) fn one_each(count: u32) -> LaunchConfig {
    grid(count.div_ceil(THREADS).max(1))
}

/// Launches a kernel on a device, `launch!(&device; grid(1); draw_slopes(&rank, &n, ..))`: references to its arguments
/// in its own order and types.
macro_rules! launch {
    ($device:expr; $config:expr; $name:ident($($argument:expr),+)) => {{
        use candle_core::cuda_backend::{cudarc::driver::PushKernelArg, WrapErr};
        let program = $crate::kernels::program()?;
        let function = $device.get_or_load_custom_func(stringify!($name), "monteclora", program)?;
        let mut launch = function.builder();
        $(launch.arg($argument);)+
        #[allow(unsafe_code)] // the arguments are those of the kernel, and its bounds those of the tensors
        unsafe { launch.launch($config) }.w()?;
    }};
}
pub(crate) use launch;

/// The CUDA device of a tensor.
///
/// # Errors
/// If it is elsewhere.
pub(crate) fn device_of(tensor: &Tensor) -> Result<&CudaDevice> {
    match tensor.device() {
        Device::Cuda(device) => Ok(device),
        other => bail!("a tensor on a CUDA device was expected, got one on {:?}", other.location()),
    }
}

/// A number of elements or a size as kernels count them.
///
/// # Errors
/// If it is 2^32 or more.
pub(crate) fn count(n: usize) -> Result<u32> {
    match u32::try_from(n) {
        Ok(n) => Ok(n),
        Err(_) => bail!("the kernels count to 2^32, got {n}"),
    }
}

/// Memory whose every element the next launch writes.
pub(crate) fn alloc_uninit<T: CudaDType + candle_core::cuda_backend::cudarc::driver::DeviceRepr>(
    device: &CudaDevice,
    len: usize,
) -> Result<CudaSlice<T>> {
    unsafe { device.alloc::<T>(len) }
}

/// A tensor whose every element the next launch writes.
pub(crate) fn empty(device: &CudaDevice, shape: &Shape, dtype: DType) -> Result<Tensor> {
    let storage = Storage::Cuda(unsafe { device.alloc_uninit(shape, dtype) }?);
    Ok(Tensor::from_storage(storage, shape, BackpropOp::none(), false))
}

/// Where the elements of a contiguous tensor of `dtype`, f32 or bf16, are. All work on them is in the order of the device's one
/// stream, so nothing else says that a launch uses them.
///
/// # Errors
/// If the tensor is not contiguous, of another dtype, or elsewhere.
pub(crate) fn address(tensor: &Tensor, dtype: DType) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    let (Storage::Cuda(storage), Some((start, _))) = (&*storage, layout.contiguous_offsets()) else {
        bail!("a contiguous tensor on a CUDA device was expected, got {layout:?} on {:?}", tensor.device());
    };
    let stream = storage.device.cuda_stream();
    let base = match (&storage.slice, dtype) {
        (CudaStorageSlice::F32(data), DType::F32) => data.device_ptr(&stream).0,
        (CudaStorageSlice::BF16(data), DType::BF16) => data.device_ptr(&stream).0,
        _ => bail!("{dtype:?} was expected, got {:?}", tensor.dtype()),
    };
    Ok(base + (start * dtype.size_in_bytes()) as u64)
}

/// Where memory of a device begins, as [`address`].
pub(super) fn slice_address<T>(slice: &CudaSlice<T>) -> u64 {
    slice.device_ptr(slice.stream()).0
}

/// The elements of a storage that is contiguous under `layout`.
pub(crate) fn elements<'a, T: CudaDType>(
    storage: &'a CudaStorage,
    layout: &Layout,
) -> Result<CudaView<'a, T>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(storage.as_cuda_slice::<T>()?.slice(start..end)),
        None => bail!("a contiguous tensor was expected, got {layout:?}"),
    }
}

/// A tensor of what a launch has written.
pub(crate) fn tensor<T: CudaDType>(
    data: CudaSlice<T>,
    shape: impl Into<Shape>,
    device: &CudaDevice,
) -> Tensor {
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(data, device.clone()));
    Tensor::from_storage(storage, shape, BackpropOp::none(), false)
}

#[cfg(test)]
mod tests {
    #[test]
    fn nvrtc_takes_the_kernels() {
        let program = super::compile().expect("a program");
        for name in ["draw_scales", "draw_perturb", "draw_slopes", "gamma_family_f32", "adamw"] {
            assert!(program.contains(&format!(".entry {name}(")), "{name}");
        }
    }
}
