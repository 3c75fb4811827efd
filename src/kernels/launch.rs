//! Compiling, loading and launching kernels, and tensors as arguments of a launch.
#![allow(unsafe_code)] // a launch trusts its arguments, and new memory is uninitialised

use std::sync::OnceLock;

use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, DevicePtr, LaunchConfig};
use candle_core::cuda_backend::cudarc::nvrtc::{compile_ptx_with_opts, CompileOptions};
use candle_core::cuda_backend::{CudaDType, CudaDevice, CudaStorageSlice};
use candle_core::op::BackpropOp;
use candle_core::{bail, CudaStorage, DType, Device, Layout, Result, Shape, Storage, Tensor};

/// The number of threads of a block, the kernels' `MAX_THREADS`.
pub(super) const THREADS: u32 = 256;

/// The maximum number of elements, rows or columns of one tensor. A thread's 32-bit index may step past the
/// last element by a whole grid, of up to 2^16 threads, before it stops, and must not wrap around.
pub(crate) const MAX_COUNT: usize = (1 << 32) - (1 << 16);

/// The program of all kernels, compiled on first use.
///
/// # Errors
/// If NVRTC fails to compile it.
pub(crate) fn program() -> Result<&'static str> {
    static PROGRAM: OnceLock<std::result::Result<String, String>> = OnceLock::new();
    match PROGRAM.get_or_init(compile) {
        Ok(program) => Ok(program),
        Err(reason) => bail!("NVRTC refuses the kernels: {reason}"),
    }
}

/// Compiles without contraction, so that products and sums round as on the host.
fn compile() -> std::result::Result<String, String> {
    let options = CompileOptions { fmad: Some(false), ..Default::default() };
    let program = compile_ptx_with_opts(super::source::SOURCE, options);
    program.map(|program| program.to_src()).map_err(|e| format!("{e:?}"))
}

/// A grid of `blocks` blocks with [`THREADS`] threads each.
pub(crate) fn grid(blocks: u32) -> LaunchConfig {
    LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 }
}

/// A thread for each of `count` elements.
pub(crate) fn one_each(count: u32) -> LaunchConfig {
    grid(count.div_ceil(THREADS).max(1))
}

/// Checks that a device can launch this grid. The driver would only say that a value is invalid.
///
/// # Errors
/// If the grid is empty or too large.
pub(crate) fn check(name: &str, config: &LaunchConfig) -> Result<()> {
    let (x, y, _) = config.grid_dim;
    if (1..1 << 31).contains(&x) && (1..1 << 16).contains(&y) {
        return Ok(());
    }
    bail!("{name}: {x} x {y} blocks, expected 1 to 2^31 - 1 by 1 to 65535: a tensor is empty or too large")
}

/// A block for each of `rows` rows, but at most 2^20 blocks, for kernels that go through rows in strides.
pub(super) fn some_rows(rows: u32) -> LaunchConfig {
    grid(rows.clamp(1, 1 << 20))
}

/// About four of `count` elements per thread, but at most 2^20 blocks, for kernels that go through
/// elements in strides.
pub(super) fn spread(count: u32) -> LaunchConfig {
    grid(count.div_ceil(4 * THREADS).clamp(1, 1 << 20))
}

/// Launches a kernel on a device: `launch!(&device; grid(1); draw_slopes(&rank, &n, ..))`. The arguments are
/// references, in the order and with the types of the kernel's parameters. Tensors are given by their
/// [`address`], which checks that they are on this device.
macro_rules! launch {
    ($device:expr; $config:expr; $name:ident($($argument:expr),+)) => {{
        use candle_core::cuda_backend::{cudarc::driver::PushKernelArg, WrapErr};
        let (program, config) = ($crate::kernels::program()?, $config);
        $crate::kernels::check(stringify!($name), &config)?;
        let function = $device.get_or_load_custom_func(stringify!($name), "monteclora", program)?;
        let mut launch = function.builder();
        $(launch.arg($argument);)+
        #[allow(unsafe_code)] // the arguments match the kernel's parameters, its bounds the tensors' sizes
        unsafe { launch.launch(config) }.w()?;
    }};
}
pub(crate) use launch;

/// The CUDA device of a tensor.
///
/// # Errors
/// If the tensor is not on a CUDA device.
pub(crate) fn device_of(tensor: &Tensor) -> Result<&CudaDevice> {
    match tensor.device() {
        Device::Cuda(device) => Ok(device),
        other => bail!("a tensor on a CUDA device was expected, got one on {:?}", other.location()),
    }
}

/// A number of elements or a size, as an argument of a kernel.
///
/// # Errors
/// If `n` is more than [`MAX_COUNT`].
pub(crate) fn count(n: usize) -> Result<u32> {
    match u32::try_from(n) {
        Ok(n) if n as usize <= MAX_COUNT => Ok(n),
        _ => bail!("the kernels count to {MAX_COUNT}, got {n}"),
    }
}

/// Fails for memory of another device or stream: the address of another GPU is invalid here, and memory of
/// another stream of this GPU may not have been written yet.
fn check_device(device: &CudaDevice, found: &CudaDevice, shape: &Shape) -> Result<()> {
    if found.same_device(device) {
        return Ok(());
    }
    let (here, there) = (device.location(), found.location());
    if here == there {
        bail!("a tensor {shape:?} belongs to another stream of {here:?}: take the device from `cuda_device`");
    }
    bail!("a launch on {here:?} was given a tensor {shape:?} on {there:?}")
}

/// Allocates memory, of which the next launch must write every element.
///
/// # Errors
/// If `len` is 0, for which the driver would only say that a value is invalid, or there is not enough memory.
pub(crate) fn alloc_uninit<T: CudaDType + candle_core::cuda_backend::cudarc::driver::DeviceRepr>(
    device: &CudaDevice,
    len: usize,
) -> Result<CudaSlice<T>> {
    if len == 0 {
        bail!("a launch on {:?} would write nothing: a width or a count is 0", device.location());
    }
    unsafe { device.alloc::<T>(len) }
}

/// Allocates a tensor, of which the next launch must write every element.
pub(crate) fn empty(device: &CudaDevice, shape: &Shape, dtype: DType) -> Result<Tensor> {
    let storage = Storage::Cuda(unsafe { device.alloc_uninit(shape, dtype) }?);
    Ok(Tensor::from_storage(storage, shape, BackpropOp::none(), false))
}

/// The address of a contiguous tensor of `dtype` (f32, bf16, u8 or u32) on the device of the launch.
/// All work on the tensor is ordered by the single stream of that device, so the launch needs no
/// other synchronisation.
///
/// # Errors
/// If the tensor is not contiguous, of another dtype, or on another device.
pub(crate) fn address(device: &CudaDevice, tensor: &Tensor, dtype: DType) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    let (Storage::Cuda(storage), Some((start, _))) = (&*storage, layout.contiguous_offsets()) else {
        bail!("a contiguous tensor on a CUDA device was expected, got {layout:?} on {:?}", tensor.device());
    };
    check_device(device, &storage.device, layout.shape())?;
    let stream = storage.device.cuda_stream();
    let base = match (&storage.slice, dtype) {
        (CudaStorageSlice::F32(data), DType::F32) => data.device_ptr(&stream).0,
        (CudaStorageSlice::BF16(data), DType::BF16) => data.device_ptr(&stream).0,
        (CudaStorageSlice::U8(data), DType::U8) => data.device_ptr(&stream).0,
        (CudaStorageSlice::U32(data), DType::U32) => data.device_ptr(&stream).0,
        _ => bail!("{dtype:?} was expected, got {:?}", tensor.dtype()),
    };
    Ok(base + (start * dtype.size_in_bytes()) as u64)
}

/// The address of memory on a device, as [`address`].
pub(super) fn slice_address<T>(slice: &CudaSlice<T>) -> u64 {
    slice.device_ptr(slice.stream()).0
}

/// Packs two words of 32 bits into one word of a table, which kernels read as two fields.
pub(super) fn packed(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

/// The address of a table's last word, such as its counter of blocks, as [`address`].
pub(super) fn last_word(table: &CudaSlice<u64>) -> u64 {
    slice_address(table) + (size_of::<u64>() * (table.len() - 1)) as u64
}

/// Whether most kernels support the tensors: of one dtype, f32 or bf16, on CUDA devices, and not empty.
pub(crate) fn supports_all<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> bool {
    let mut tensors = tensors.into_iter().peekable();
    let dtype = tensors.peek().map(|first| first.dtype());
    tensors.all(|tensor| {
        Some(tensor.dtype()) == dtype && supports(tensor.elem_count(), tensor.dtype(), tensor.device())
    })
}

/// [`supports_all`] for one tensor, given by its properties.
pub(crate) fn supports(len: usize, dtype: DType, device: &Device) -> bool {
    device.is_cuda() && (1..=MAX_COUNT).contains(&len) && matches!(dtype, DType::F32 | DType::BF16)
}

/// Whether the tensor is stored as bf16, as the argument `narrow` of kernels.
pub(super) fn narrow(tensor: &Tensor) -> u32 {
    u32::from(tensor.dtype() == DType::BF16)
}

/// Whether there is a tensor, and its address.
pub(super) fn optional(device: &CudaDevice, tensor: Option<&Tensor>, dtype: DType) -> Result<(u32, u64)> {
    let place = tensor.map(|tensor| address(device, tensor, dtype)).transpose()?;
    Ok((tensor.is_some().into(), place.unwrap_or(0)))
}

/// The elements of a storage that is contiguous under `layout`, on the device of the launch.
///
/// # Errors
/// As [`address`].
pub(crate) fn elements<'a, T: CudaDType>(
    device: &CudaDevice,
    storage: &'a CudaStorage,
    layout: &Layout,
) -> Result<CudaView<'a, T>> {
    check_device(device, &storage.device, layout.shape())?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(storage.as_cuda_slice::<T>()?.slice(start..end)),
        None => bail!("a contiguous tensor was expected, got {layout:?}"),
    }
}

/// A tensor that owns `data`, which a launch has written.
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
    use super::*;

    #[test]
    fn what_is_too_much_or_nothing_is_refused_by_name() {
        assert_eq!(count(MAX_COUNT).expect("the most"), u32::MAX - 65535);
        for n in [MAX_COUNT + 1, (1 << 32) - 3, 1 << 32, usize::MAX] {
            assert!(count(n).unwrap_err().to_string().contains(&n.to_string()));
        }
        let tensors = |y| LaunchConfig { grid_dim: (4, y, 1), ..grid(4) };
        assert!(check("adamw", &tensors(65535)).is_ok() && check("adamw", &grid(1)).is_ok());
        for config in [grid(0), grid(1 << 31), tensors(0), tensors(65536)] {
            let error = check("adamw", &config).unwrap_err().to_string();
            assert!(error.contains("adamw: ") && error.contains("65535"), "{error}");
        }
    }

    #[test]
    fn nvrtc_takes_the_kernels() {
        let program = super::compile().expect("a program");
        for name in ["draw_scales", "draw_perturb", "draw_slopes", "gamma_family_f32", "adamw"] {
            assert!(program.contains(&format!(".entry {name}(")), "{name}");
        }
    }
}
