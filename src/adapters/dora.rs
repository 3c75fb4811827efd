//! DoRA (Liu et al. 2024): a low-rank update of a weight's direction, and a learned vector for its magnitude.
//!
//! ```text
//! W' = diag(m / n) (W0 + s B A),   n_o = || row o of W0 + s B A ||,   m = n at the start
//! y  = W' x + b
//! ```
//!
//! The backward pass treats n as a constant (section 4.3 of the paper). The squares of n are computed as
//! `||w||^2 + 2 s w.(BA) + s^2 ||BA||^2` from products with A, without a matrix of the weight's size.

use std::any::Any;

use candle_core::{DType, Tensor, D};

use super::lora::LoraConfig;
use crate::adapter::{low_rank, Adapter, BaseLinear, Context, LowRank, Params, Pass, Role};
use crate::error::Result;

/// A DoRA adapter of one linear layer.
#[derive(Debug, Clone)]
pub struct Dora {
    pair: LowRank,
    magnitude: Tensor,    // (out)
    base_squares: Tensor, // (out): the squared norms of the base's rows
}

impl Dora {
    /// Creates `{path}.{adapter}.a`, `.b` and `.magnitude` in the store. The magnitude starts at the norms of
    /// the base's rows, so that the layer's output does not change at first.
    ///
    /// # Errors
    /// As [`super::Lora::new`].
    pub fn new(
        params: &Params,
        path: &str,
        adapter: &str,
        base: &BaseLinear,
        config: &LoraConfig,
    ) -> Result<Self> {
        config.validate()?;
        let weight = base.require_dense("DoRA")?;
        let scale = low_rank::scaling(config.rank, config.alpha, config.use_rslora);
        let name = format!("{path}.{adapter}");
        let weight = weight.detach().to_device(params.device())?.to_dtype(params.dtype())?;
        let base_squares = weight.sqr()?.sum(1)?;
        params.all_or_none(&format!("{name}."), || {
            let dims = base.dims()?;
            let pair = LowRank::new(params, &name, dims, config.rank, scale, config.dropout)?;
            let norms = base_squares.sqrt()?;
            let magnitude = params.insert(&format!("{name}.magnitude"), Role::Magnitude, &norms)?;
            Ok(Self { pair, magnitude, base_squares })
        })
    }

    /// A, B and their scale.
    pub fn low_rank(&self) -> &LowRank {
        &self.pair
    }

    /// The magnitude m, `(out_dim)`.
    pub fn magnitude(&self) -> &Tensor {
        &self.magnitude
    }

    /// Computes `m / n`, `(out_dim)`, for this weight of the base; differentiable in m only.
    fn ratio(&self, weight: &Tensor) -> candle_core::Result<Tensor> {
        let (a, b, s) = (self.pair.a().detach(), self.pair.b().detach(), self.pair.scale());
        let weight = weight.detach().to_dtype(a.dtype())?;
        let cross = (weight.matmul(&a.t()?)? * &b)?.sum(D::Minus1)?;
        let own = (b.matmul(&a.matmul(&a.t()?)?)? * &b)?.sum(D::Minus1)?;
        let squares = ((&self.base_squares + (cross * (2.0 * s))?)? + (own * (s * s))?)?;
        // A row of zeros has no direction: its magnitude is zero, and so is its output.
        &self.magnitude / squares.maximum(f64::from(f32::MIN_POSITIVE))?.sqrt()?
    }
}

impl Adapter for Dora {
    fn forward(&self, xs: &Tensor, base: &BaseLinear, cx: &Context) -> candle_core::Result<Tensor> {
        let weight = base.require_dense("DoRA")?;
        let ratio = self.ratio(weight)?;
        let turned = |ys: Tensor, ratio: &Tensor| ys.to_dtype(ratio.dtype())?.broadcast_mul(ratio);
        let without_dropout = cx.clone().with_pass(Pass::Mean);
        let bare = BaseLinear::new(weight, None);
        let ys = match self.pair.dropped(xs, cx)? {
            None => turned(self.pair.forward(xs, &bare, self.pair.a(), &without_dropout)?, &ratio)?,
            // As in PEFT, the base's own output sees no dropout; its change of magnitude does.
            Some(dropped) => {
                let kept = crate::ops::linear(xs, weight, None, cx.path)?.to_dtype(ratio.dtype())?;
                let frozen = crate::ops::linear(&dropped, weight, None, cx.path)?;
                let both = self.pair.forward(&dropped, &bare, self.pair.a(), &without_dropout)?;
                ((kept + turned(both, &ratio)?)? - frozen.to_dtype(ratio.dtype())?)?
            }
        };
        match base.bias() {
            Some(bias) => ys.broadcast_add(&bias.to_dtype(ys.dtype())?)?.to_dtype(xs.dtype()),
            None => ys.to_dtype(xs.dtype()),
        }
    }

    fn parameters(&self) -> Vec<(Role, Tensor)> {
        vec![
            (Role::A, self.pair.a().clone()),
            (Role::B, self.pair.b().clone()),
            (Role::Magnitude, self.magnitude.clone()),
        ]
    }

    fn delta(&self, base: &BaseLinear, _cx: &Context) -> candle_core::Result<Option<Tensor>> {
        let weight = base.require_dense("DoRA")?;
        let ratio = self.ratio(weight)?;
        let wide = if weight.dtype() == DType::F64 { DType::F64 } else { self.magnitude.dtype() };
        let weight = weight.detach().to_dtype(wide)?;
        let moved = (&weight + self.pair.delta()?.to_dtype(wide)?)?;
        let ratio = ratio.to_dtype(wide)?.unsqueeze(1)?;
        Ok(Some((moved.broadcast_mul(&ratio)? - weight)?))
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
