//! Attention masks, the scaling of scores, and the sizes of an attention.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{bail, DType, Device, Result, Tensor};

/// Which keys a query may attend to.
#[derive(Debug, Clone, Default)]
pub struct Mask {
    /// (batch, keys) of u8: 1 where the key is a real token. `None`: all keys are real tokens.
    pub padding: Option<Tensor>,
    /// Query i, of the last tq positions, only sees keys 0 ..= tk - tq + i. `None`: every key.
    pub causal: Option<CausalMask>,
    /// Query i only sees keys near its own position, tk - tq + i. `None`: at any distance.
    pub window: Option<Window>,
}

impl Mask {
    /// The same mask without a window that hides none of `tk` keys, which some kernels have no use for.
    pub(super) fn over(&self, tq: usize, tk: usize) -> Self {
        let hides = |window: &Window| window.size < tq.max(tk);
        Self { window: self.window.clone().filter(hides), ..self.clone() }
    }
}

/// A sliding window: position i sees key j if `|i - j| < size`, and no later key under a causal mask. Like
/// the triangle of a [`CausalMask`], the mask tensor is cached.
#[derive(Debug, Clone)]
pub struct Window {
    size: usize,
    latest: Latest,
}

impl Window {
    /// A window in which a query sees `size - 1` keys before its own position, and as many after it unless a
    /// causal mask hides them.
    pub fn new(size: usize) -> Self {
        Self { size, latest: Latest::default() }
    }

    /// The smallest distance at which a key is hidden.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The mask `(1, 1, tq, tk)` of u8: 1 where query `i` of the last `tq` sees key `j`. `None` if
    /// nothing is hidden.
    fn band(&self, tq: usize, tk: usize, device: &Device) -> Result<Option<Tensor>> {
        if self.size >= tq.max(tk) {
            return Ok(None);
        }
        // |tk - tq + i - j| < size, rearranged so that no side is negative.
        let near = |i: usize, j: usize| (tk + i).abs_diff(tq + j) < self.size;
        self.latest.get((tq, tk), device, near).map(Some)
    }
}

/// A causal mask, whose triangle is cached by the model that owns it. All layers of a forward pass need the
/// same triangle, and each copy to a GPU would stall its queue.
#[derive(Debug, Clone, Default)]
pub struct CausalMask {
    latest: Latest,
}

impl CausalMask {
    /// The mask `(1, 1, tq, tk)` of u8: 1 where key `j` is not after query `i` of the last `tq`.
    fn triangle(&self, tq: usize, tk: usize, device: &Device) -> Result<Tensor> {
        self.latest.get((tq, tk), device, |i, j| j + tq <= tk + i)
    }
}

/// A cache of the most recent mask tensor, shared by clones.
#[derive(Debug, Clone, Default)]
struct Latest(Arc<Mutex<Option<Tensor>>>);

impl Latest {
    /// The mask `(1, 1, tq, tk)` of u8 with 1 where `sees(i, j)`. Every call must pass the same rule.
    fn get(
        &self,
        (tq, tk): (usize, usize),
        device: &Device,
        sees: impl Fn(usize, usize) -> bool,
    ) -> Result<Tensor> {
        // The lock may be poisoned: a panic while it is held leaves a complete mask or none.
        let mut latest = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |mask: &&Tensor| mask.dims() == [1, 1, tq, tk] && mask.device().same_device(device);
        if let Some(mask) = latest.as_ref().filter(fits) {
            return Ok(mask.clone());
        }
        let sees = &sees;
        let rows: Vec<u8> = (0..tq).flat_map(|i| (0..tk).map(move |j| u8::from(sees(i, j)))).collect();
        let mask = Tensor::from_vec(rows, (1, 1, tq, tk), device)?;
        *latest = Some(mask.clone());
        Ok(mask)
    }
}

/// How scores are computed: `scale q k`, or with a cap `cap tanh(scale q k / cap)` (Gemma 2). An `f64`
/// converts to a scale without a cap.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scores {
    /// The factor on the product `q k`, usually one over the square root of the head's width.
    pub scale: f64,
    /// The bound on the absolute value of the scores before the softmax; must be positive.
    pub cap: Option<f64>,
}

impl From<f64> for Scores {
    fn from(scale: f64) -> Self {
        Self { scale, cap: None }
    }
}

/// The sizes of one attention call.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub b: usize,
    pub tq: usize,
    pub tk: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub dim: usize,
}

impl Shape {
    pub fn new(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, kv_heads: usize) -> Result<Self> {
        let ((b, tq, width), (kb, tk, kv_width)) = (q.dims3()?, k.dims3()?);
        if heads == 0 || kv_heads == 0 || !heads.is_multiple_of(kv_heads) || !width.is_multiple_of(heads) {
            bail!("attention: width {width}, {heads} heads and {kv_heads} key heads do not divide");
        }
        let dim = width / heads;
        if dim == 0 || kb != b || v.dims() != k.dims() || kv_width != kv_heads * dim {
            bail!(
                "attention: q {:?}, k {:?}, v {:?} do not fit {kv_heads} key heads of {dim}",
                q.dims(),
                k.dims(),
                v.dims()
            );
        }
        // Candle's kernels count elements in 32 bits and never terminate for larger tensors.
        let scores = [heads, tq, tk].iter().fold(b, |count, of| count.saturating_mul(*of));
        if q.device().is_cuda() && scores >= 1 << 32 {
            bail!(
                "attention: {b} rows x {heads} heads x {tq} x {tk} scores are 2^32 or more: take fewer rows"
            );
        }
        Ok(Self { b, tq, tk, heads, kv_heads, dim })
    }

    /// The number of query heads per key head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }
}

/// The combined mask, broadcastable to (b, heads, tq, tk): 1 where a query sees a key. `None` if
/// nothing is hidden.
pub(super) fn visible(shape: &Shape, mask: &Mask, device: &Device) -> Result<Option<Tensor>> {
    let &Shape { b, tq, tk, .. } = shape;
    let padding = match &mask.padding {
        Some(padding) => Some(padding.ne(0u8)?.reshape((b, 1, 1, tk))?),
        None => None,
    };
    // A single query is the last position, so that causality hides nothing.
    let causal = mask.causal.as_ref().filter(|_| tq > 1);
    let causal = causal.map(|causal| causal.triangle(tq, tk, device)).transpose()?;
    let band = mask.window.as_ref().map(|window| window.band(tq, tk, device)).transpose()?.flatten();
    let mut visible = None;
    for part in [padding, causal, band].into_iter().flatten() {
        visible = Some(match visible {
            Some(visible) => part.broadcast_mul(&visible)?,
            None => part,
        });
    }
    Ok(visible)
}

/// The padding mask as bytes, from any integer dtype.
pub(super) fn padding_bytes(padding: &Tensor) -> Result<Vec<u8>> {
    padding.to_dtype(DType::U8)?.flatten_all()?.to_vec1()
}
