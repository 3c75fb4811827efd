//! Batches of matrix products on cuBLAS with matrices at any addresses. cuBLAS reads the addresses from a
//! table that a kernel fills, so that the heads of an attention, and groups of query heads that share a key
//! head, need no copies.
#![allow(unsafe_code)] // cuBLAS trusts its arguments

use std::borrow::Borrow;

use candle_core::cuda_backend::cudarc::cublas::sys;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr, DeviceRepr};
use candle_core::cuda_backend::{CudaDevice, WrapErr};
use candle_core::{bail, DType, Result, Tensor};

use super::cublas::{compute_type, data_type, operation, size, sum_in_f32};
use super::launch::{address, alloc_uninit, count, launch, one_each};

/// The `MAX_LATTICES` of the kernel.
const MAX_LATTICES: usize = 16;

/// The struct `Lattice` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Lattice {
    base: u64,
    batch: u64,
    head: u64,
    member: u64,
    first: u64,
    step: u64,
}

unsafe impl DeviceRepr for Lattice {}

/// The layout of the matrices of a contiguous tensor: one for each batch, head and member
/// of the head's group.
#[derive(Clone, Copy)]
pub(super) struct Strides {
    /// The distances in elements between batches, heads and members; 0 for members that share a matrix.
    pub batch: usize,
    pub head: usize,
    pub member: usize,
    /// The distance in elements between the rows of a matrix.
    pub row: usize,
}

/// A factor or the result of products: where the addresses of its matrices are in the table.
#[derive(Clone, Copy)]
pub(super) struct Operand {
    first: usize,
    tensors: usize,
    row: usize,
    shared: bool,
    dtype: DType,
    transposed: bool,
}

impl Operand {
    /// The transposes of the matrices, as a factor.
    pub fn t(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }
}

/// A table of addresses that is not yet filled.
pub(super) struct Table<'a> {
    device: &'a CudaDevice,
    batches: usize,
    heads: usize,
    members: usize,
    lattices: [Lattice; MAX_LATTICES],
    used: usize,
    len: usize,
}

impl<'a> Table<'a> {
    /// Creates a table for products of `batches` times `heads` groups of `members` matrices.
    pub fn new(device: &'a CudaDevice, batches: usize, heads: usize, members: usize) -> Self {
        Self { device, batches, heads, members, lattices: Default::default(), used: 0, len: 0 }
    }

    /// Adds the matrices of contiguous tensors with the same dtype and layout; products run over the matrices
    /// of all of them at once.
    ///
    /// # Errors
    /// If the table is full, the tensors' dtypes differ, or one is not contiguous or on another device.
    pub fn operand(&mut self, tensors: &[&Tensor], strides: Strides) -> Result<Operand> {
        let [dtype, ..] = tensors.iter().map(|tensor| tensor.dtype()).collect::<Vec<_>>()[..] else {
            bail!("an operand of products without a tensor");
        };
        let (each, first) = (self.batches * self.heads, self.len);
        for (i, tensor) in tensors.iter().enumerate() {
            let Some(lattice) = self.lattices.get_mut(self.used) else {
                bail!("a table of products has room for {MAX_LATTICES} operands");
            };
            let bytes = |elements: usize| (elements * dtype.size_in_bytes()) as u64;
            *lattice = Lattice {
                base: address(self.device, tensor, dtype)?,
                batch: bytes(strides.batch),
                head: bytes(strides.head),
                member: bytes(strides.member),
                first: (first + i * each) as u64,
                step: (tensors.len() * each) as u64,
            };
            self.used += 1;
        }
        self.len += tensors.len() * each * self.members;
        let shared = self.members > 1 && strides.member == 0;
        Ok(Operand { first, tensors: tensors.len(), row: strides.row, shared, dtype, transposed: false })
    }

    /// Fills the table in one launch.
    ///
    /// # Errors
    /// If there are more matrices than a launch can count, or the device fails.
    pub fn fill(self) -> Result<Products<'a>> {
        let device = self.device;
        let mut addresses = alloc_uninit::<i64>(device, self.len)?;
        let matrices = count(self.batches * self.heads * self.members)?;
        let (used, batches, heads, members) =
            (self.used as u32, self.batches as u32, self.heads as u32, self.members as u32);
        launch!(device; one_each(matrices); matrix_addresses(
            &self.lattices, &used, &batches, &heads, &members, &mut addresses
        ));
        Ok(Products { device, addresses, each: self.batches * self.heads, members: self.members })
    }
}

/// A table for matrices that are separate tensors.
pub(super) struct List<'a> {
    device: &'a CudaDevice,
    addresses: Vec<i64>,
}

impl<'a> List<'a> {
    /// Creates an empty table.
    pub fn new(device: &'a CudaDevice) -> Self {
        Self { device, addresses: Vec::new() }
    }

    /// Adds contiguous f32 matrices of one shape, one for each product.
    ///
    /// # Errors
    /// If there is none, their shapes differ, or one is not contiguous, of another dtype or
    /// on another device.
    pub fn operand(&mut self, matrices: &[impl Borrow<Tensor>]) -> Result<Operand> {
        let Some(shape) = matrices.first().map(|matrix| matrix.borrow().dims2()).transpose()? else {
            bail!("an operand of products without a tensor")
        };
        let first = self.addresses.len();
        for matrix in matrices.iter().map(Borrow::borrow) {
            if matrix.dims2()? != shape {
                bail!("products of matrices {shape:?} and {:?} at once", matrix.dims());
            }
            self.addresses.push(address(self.device, matrix, DType::F32)?.cast_signed());
        }
        let (tensors, row) = (matrices.len(), shape.1);
        Ok(Operand { first, tensors, row, shared: false, dtype: DType::F32, transposed: false })
    }

    /// Uploads the table to the device.
    ///
    /// # Errors
    /// If the device fails.
    pub fn fill(self) -> Result<Products<'a>> {
        let addresses = self.device.clone_htod(&self.addresses)?;
        Ok(Products { device: self.device, addresses, each: 1, members: 1 })
    }
}

/// A table of addresses on the device, for products of its matrices.
pub(super) struct Products<'a> {
    device: &'a CudaDevice,
    addresses: CudaSlice<i64>, // words of 64 bits
    each: usize,
    members: usize,
}

impl Products<'_> {
    /// `C = A B` of matrices `(m, k)` and `(k, n)` in row-major order, summed in single precision. If the
    /// members of a group share C, it is the sum over them.
    ///
    /// # Errors
    /// If a size or a number of matrices is 2^31 or more, or cuBLAS fails.
    pub fn multiply(&self, [m, n, k]: [usize; 3], a: Operand, b: Operand, c: Operand) -> Result<()> {
        let sums = if c.shared { self.members } else { 1 };
        let len = c.tensors * self.each * self.members / sums;
        for sum in 0..sums {
            let beta = if sum == 0 { 0f32 } else { 1.0 };
            self.gemm([n, m, k], len, [b, a, c].map(|operand| (operand, operand.first + sum * len)), beta)?;
        }
        Ok(())
    }

    /// `len` products in cuBLAS's column-major order: the transposes of ours, with the factors exchanged.
    fn gemm(
        &self,
        [m, n, k]: [usize; 3],
        len: usize,
        [a, b, c]: [(Operand, usize); 3],
        beta: f32,
    ) -> Result<()> {
        let (table, _order) = self.addresses.device_ptr(self.addresses.stream());
        let at = |(_, first): (Operand, usize)| (table + 8 * first as u64) as *const *const std::ffi::c_void;
        let (alpha, blas) = (1f32, self.device.cublas_handle());
        let status = unsafe {
            sum_in_f32(*blas.handle())?;
            sys::cublasGemmBatchedEx(
                *blas.handle(),
                operation(a.0.transposed),
                operation(b.0.transposed),
                size(m)?,
                size(n)?,
                size(k)?,
                std::ptr::from_ref(&alpha).cast(),
                at(a),
                data_type(a.0.dtype)?,
                size(a.0.row)?,
                at(b),
                data_type(b.0.dtype)?,
                size(b.0.row)?,
                std::ptr::from_ref(&beta).cast(),
                at(c).cast(),
                data_type(c.0.dtype)?,
                size(c.0.row)?,
                size(len)?,
                compute_type(a.0.dtype),
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
            )
        };
        status.result().w()
    }
}
