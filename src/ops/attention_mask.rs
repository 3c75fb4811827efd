//! Which keys a query sees, how it scores them, and the sizes of an attention.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{bail, DType, Device, Result, Tensor};

/// Which keys a query may attend to.
#[derive(Debug, Clone, Default)]
pub struct Mask {
    /// (batch, keys) of u8: 1 where the key is a real token. None: all are.
    pub padding: Option<Tensor>,
    /// Query i (of tq, the last ones) sees keys 0 ..= tk - tq + i only. None: every key.
    pub causal: Option<CausalMask>,
    /// Query i sees the keys near its own place, tk - tq + i, only. None: however far.
    pub window: Option<Window>,
}

/// How far a query sees: key j from place i where `|i - j| < size`, under a causal mask back alone. The band is kept
/// as the triangle of a [`CausalMask`] is.
#[derive(Debug, Clone)]
pub struct Window {
    size: usize,
    latest: Latest,
}

impl Window {
    /// Queries see `size - 1` keys before their own place, and as many after it where no causal mask hides them.
    pub fn new(size: usize) -> Self {
        Self { size, latest: Latest::default() }
    }

    /// The first distance that is out of sight.
    pub fn size(&self) -> usize {
        self.size
    }

    /// 1 where key `j` is in sight of query `i` of the last `tq`, `(1, 1, tq, tk)` of u8. None: everywhere.
    fn band(&self, tq: usize, tk: usize, device: &Device) -> Result<Option<Tensor>> {
        if self.size >= tq.max(tk) {
            return Ok(None);
        }
        // Both sides of |tk - tq + i - j| < size with tq and j brought over: none is negative.
        let near = |i: usize, j: usize| (tk + i).abs_diff(tq + j) < self.size;
        self.latest.get((tq, tk), device, near).map(Some)
    }
}

/// The triangle of a causal mask, kept from layer to layer and pass to pass by the model that owns it:
/// all layers of a forward pass ask for the same one, and a copy to a GPU holds up the queue of its work.
#[derive(Debug, Clone, Default)]
pub struct CausalMask {
    latest: Latest,
}

impl CausalMask {
    /// 1 where key `j` is not after query `i` of the last `tq`, `(1, 1, tq, tk)` of u8.
    fn triangle(&self, tq: usize, tk: usize, device: &Device) -> Result<Tensor> {
        self.latest.get((tq, tk), device, |i, j| j + tq <= tk + i)
    }
}

/// The mask of u8 that was asked for last, shared by clones.
#[derive(Debug, Clone, Default)]
struct Latest(Arc<Mutex<Option<Tensor>>>);

impl Latest {
    /// `(1, 1, tq, tk)`, 1 where `sees(i, j)`: the same rule in every call.
    fn get(
        &self,
        (tq, tk): (usize, usize),
        device: &Device,
        sees: impl Fn(usize, usize) -> bool,
    ) -> Result<Tensor> {
        // A panic while the lock is held leaves a whole mask or none.
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

/// The score of query q at key k: `scale q k`, and with a cap `cap tanh(scale q k / cap)` (Gemma 2). A number alone is
/// a scale without a cap.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scores {
    /// What the product is multiplied by, mostly one over the root of the head's width.
    pub scale: f64,
    /// The bound that scores approach, before the softmax; positive.
    pub cap: Option<f64>,
}

impl From<f64> for Scores {
    fn from(scale: f64) -> Self {
        Self { scale, cap: None }
    }
}

/// The sizes of one call.
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
        // Candle's kernels count the elements of a tensor in 32 bits, and go on for ever where there are more.
        let scores = [heads, tq, tk].iter().fold(b, |count, of| count.saturating_mul(*of));
        if q.device().is_cuda() && scores >= 1 << 32 {
            bail!(
                "attention: {b} rows x {heads} heads x {tq} x {tk} scores are 2^32 or more: take fewer rows"
            );
        }
        Ok(Self { b, tq, tk, heads, kv_heads, dim })
    }

    /// Query heads for each key head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }
}

/// 1 where a query sees a key, broadcastable to (b, heads, tq, tk). None: everywhere.
pub(super) fn visible(shape: &Shape, mask: &Mask, device: &Device) -> Result<Option<Tensor>> {
    let &Shape { b, tq, tk, .. } = shape;
    let padding = match &mask.padding {
        Some(padding) => Some(padding.ne(0u8)?.reshape((b, 1, 1, tk))?),
        None => None,
    };
    // The last query alone sees every key that is near enough.
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

/// The padding mask as bytes, whatever integer dtype it came in.
pub(super) fn padding_bytes(padding: &Tensor) -> Result<Vec<u8>> {
    padding.to_dtype(DType::U8)?.flatten_all()?.to_vec1()
}
