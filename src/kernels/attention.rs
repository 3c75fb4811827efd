//! The attention core on f32 and bf16 tensors of a CUDA device: one kernel per direction
//! between matrix products.

use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::cuda_backend::CudaDevice;
use candle_core::{DType, Result, Tensor};

use super::launch::{address, count, device_of, empty, grid, launch, supports_all, THREADS};
use super::products::{Strides, Table};

/// Dropout of the probabilities. Whether an element is kept depends on (key, draw, element).
#[derive(Clone, Copy)]
pub(crate) struct Dropout {
    pub key: u64,
    pub draw: u64,
    /// Elements whose word of noise is below it are dropped.
    pub threshold: u32,
    /// The factor on kept elements.
    pub kept: f64,
}

/// The sizes and constants of one call: `softmax(scale q k^T + mask) v`, with `q`
/// `(batches, queries, heads * dim)`, and `k` and `v` `(batches, keys, key_heads * dim)`.
pub(crate) struct Attention {
    pub batches: usize,
    pub heads: usize,
    pub key_heads: usize,
    pub queries: usize,
    pub keys: usize,
    pub dim: usize,
    pub scale: f64,
    /// `(batches, keys)` of u8, contiguous: 0 where no query sees the key.
    pub padding: Option<Tensor>,
    /// Whether query i only sees keys `0 ..= keys - queries + i`.
    pub causal: bool,
    pub dropout: Option<Dropout>,
}

/// The struct `Attention` of the kernels.
#[repr(C)]
struct Call {
    padding: u64,
    key: u64,
    draw: u64,
    rows: u32,
    heads: u32,
    queries: u32,
    keys: u32,
    lanes: u32,
    narrow: u32,
    causal: u32,
    dropped: u32,
    threshold: u32,
    scale: f32,
    kept: f32,
}

#[allow(unsafe_code)] // the same layout as in the kernels
unsafe impl DeviceRepr for Call {}

/// Whether these kernels and cuBLAS support `q`, `k` and `v` with heads of `dim`: of one dtype, f32 or
/// bf16, on CUDA devices, not empty, and with each head's rows at multiples of 16 bytes, as batched
/// products by address require.
pub(crate) fn supports(tensors: [&Tensor; 3], dim: usize) -> bool {
    supports_all(tensors) && (dim * tensors[0].dtype().size_in_bytes()).is_multiple_of(ALIGNMENT as usize)
}

const ALIGNMENT: u64 = 16;

impl Attention {
    /// The output, with the shape of `q`, and the log-sum-exp of each row of scores,
    /// `(batches, heads, queries)` of f32.
    ///
    /// # Errors
    /// If the tensors are not supported ([`supports`]), there are more rows of scores than a launch can
    /// count, or the device fails.
    pub fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let &Self { batches, heads, queries, keys, dim, .. } = self;
        let (device, dtype) = (device_of(q)?, q.dtype());
        let (q, k, v) = (aligned(device, q)?, aligned(device, k)?, aligned(device, v)?);
        let scores = empty(device, &self.scores(), DType::F32)?;
        let weights = self.beside(&scores, dtype)?;
        let y = empty(device, q.shape(), dtype)?;
        let log_sums = empty(device, &(batches, heads, queries).into(), DType::F32)?;

        let mut table = self.table(device);
        let (of_q, of_k) =
            (table.operand(&[&q], self.query_heads())?, table.operand(&[&k], self.key_heads())?);
        let of_scores = table.operand(&[&scores], self.score_heads())?;
        let of_weights = table.operand(&[&weights], self.score_heads())?;
        let (of_v, of_y) =
            (table.operand(&[&v], self.key_heads())?, table.operand(&[&y], self.query_heads())?);
        let products = table.fill()?;

        products.multiply([queries, keys, dim], of_q, of_k.t(), of_scores)?;
        let (call, blocks) = self.call(device, dtype)?;
        let [from, to] = [address(device, &scores, DType::F32)?, address(device, &weights, dtype)?];
        let sums = address(device, &log_sums, DType::F32)?;
        launch!(device; grid(blocks); attention_softmax(&call, &from, &to, &sums));
        products.multiply([queries, dim, keys], of_weights, of_v, of_y)?;
        Ok((y, log_sums))
    }

    /// The gradients of `q`, `k` and `v`, from the gradient of the output. The scores are recomputed, and P
    /// is recomputed from their log-sum-exps. With the dropout mask M: `dV = (P M)^T dY`,
    /// `dS = P (M dY V^T - rowsum(P M dY V^T))`, `dQ = s dS K`, `dK = s dS^T Q`.
    ///
    /// The row sum is computed from the terms that it is subtracted from, not as `dY Y`: a row of dS then
    /// still sums to 0 after rounding to bf16, even if one key has nearly all of the weight.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn backward(
        &self,
        [q, k, v]: [&Tensor; 3],
        grad: &Tensor,
        log_sums: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let &Self { heads, key_heads, queries, keys, dim, .. } = self;
        let (device, dtype) = (device_of(q)?, q.dtype());
        let (q, k, v, dy) =
            (aligned(device, q)?, aligned(device, k)?, aligned(device, v)?, aligned(device, grad)?);
        let scores = empty(device, &self.scores(), DType::F32)?;
        let dp = empty(device, &self.scores(), DType::F32)?;
        let (weights, ds) = (self.beside(&scores, dtype)?, self.beside(&dp, dtype)?);
        let dq = empty(device, q.shape(), dtype)?;
        // Sums over a group of heads are in f32, to be rounded only once.
        let sums = if heads == key_heads { dtype } else { DType::F32 };
        let (dk, dv) = (empty(device, k.shape(), sums)?, empty(device, v.shape(), sums)?);

        let mut table = self.table(device);
        let of_q_dy = table.operand(&[&q, &dy], self.query_heads())?;
        let of_k_v = table.operand(&[&k, &v], self.key_heads())?;
        let of_scores_dp = table.operand(&[&scores, &dp], self.score_heads())?;
        let of_weights_ds = table.operand(&[&weights, &ds], self.score_heads())?;
        let of_dy_q = table.operand(&[&dy, &q], self.query_heads())?;
        let of_dv_dk = table.operand(&[&dv, &dk], self.key_heads())?;
        let of_ds = table.operand(&[&ds], self.score_heads())?;
        let of_k = table.operand(&[&k], self.key_heads())?;
        let of_dq = table.operand(&[&dq], self.query_heads())?;
        let products = table.fill()?;

        products.multiply([queries, keys, dim], of_q_dy, of_k_v.t(), of_scores_dp)?;
        let (call, blocks) = self.call(device, dtype)?;
        let [from, grad, sums] = [&scores, &dp, log_sums].map(|tensor| address(device, tensor, DType::F32));
        let (from, grad, sums) = (from?, grad?, sums?);
        let (to, slopes) = (address(device, &weights, dtype)?, address(device, &ds, dtype)?);
        launch!(device; grid(blocks); attention_slopes(&call, &from, &sums, &grad, &to, &slopes));
        products.multiply([keys, dim, queries], of_weights_ds.t(), of_dy_q, of_dv_dk)?;
        products.multiply([queries, dim, keys], of_ds, of_k, of_dq)?;
        Ok([Some(dq), Some(dk), Some(dv)])
    }

    fn table<'a>(&self, device: &'a CudaDevice) -> Table<'a> {
        Table::new(device, self.batches, self.key_heads, self.heads / self.key_heads)
    }

    /// The elements of a padded row of scores: whole pairs of the kernels' quads.
    fn pitch(&self) -> usize {
        self.keys.next_multiple_of(8)
    }

    fn scores(&self) -> candle_core::Shape {
        (self.batches, self.heads, self.queries, self.pitch()).into()
    }

    /// Memory for what a kernel computes from `scores` in `dtype`: that of the scores themselves for f32,
    /// otherwise new memory.
    fn beside(&self, scores: &Tensor, dtype: DType) -> Result<Tensor> {
        match dtype {
            DType::F32 => Ok(scores.clone()),
            _ => empty(device_of(scores)?, scores.shape(), dtype),
        }
    }

    fn query_heads(&self) -> Strides {
        let row = self.heads * self.dim;
        let head = self.heads / self.key_heads * self.dim;
        Strides { batch: self.queries * row, head, member: self.dim, row }
    }

    fn key_heads(&self) -> Strides {
        let row = self.key_heads * self.dim;
        Strides { batch: self.keys * row, head: self.dim, member: 0, row }
    }

    fn score_heads(&self) -> Strides {
        let (row, member) = (self.pitch(), self.queries * self.pitch());
        Strides { batch: self.heads * member, head: self.heads / self.key_heads * member, member, row }
    }

    /// The arguments of the kernels, and their number of blocks: two quads per thread of a row (more in long
    /// rows), and as many rows per block as fit.
    fn call(&self, device: &CudaDevice, dtype: DType) -> Result<(Call, u32)> {
        let rows = count(self.batches * self.heads * self.queries)?;
        let lanes = (count(self.keys)?.div_ceil(8)).next_power_of_two().min(THREADS);
        let dropout = self.dropout.unwrap_or(Dropout { key: 0, draw: 0, threshold: 0, kept: 1.0 });
        let padding = self.padding.as_ref().map(|padding| address(device, padding, DType::U8)).transpose()?;
        let call = Call {
            padding: padding.unwrap_or(0),
            key: dropout.key,
            draw: dropout.draw,
            rows,
            heads: self.heads as u32,
            queries: self.queries as u32,
            keys: self.keys as u32,
            lanes,
            narrow: u32::from(dtype == DType::BF16),
            causal: u32::from(self.causal),
            dropped: u32::from(self.dropout.is_some()),
            threshold: dropout.threshold,
            scale: self.scale as f32,
            kept: dropout.kept as f32,
        };
        Ok((call, rows.div_ceil(THREADS / lanes)))
    }
}

/// The tensor itself if it is contiguous and begins at a multiple of 16 bytes, otherwise a copy that does.
fn aligned(device: &CudaDevice, tensor: &Tensor) -> Result<Tensor> {
    let tensor = tensor.contiguous()?;
    match address(device, &tensor, tensor.dtype())?.is_multiple_of(ALIGNMENT) {
        true => Ok(tensor),
        false => tensor.force_contiguous(),
    }
}
