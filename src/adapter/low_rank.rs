//! The low-rank pair A, B and its forward pass, which all low-rank adapters share.
//!
//! ```text
//! y = W0 x + b + s B A dropout(x),   s = alpha / r   (rsLoRA: alpha / sqrt r)
//! ```

use candle_core::Tensor;

use super::base::BaseLinear;
use super::context::Context;
use super::params::{Init, Params, Role};
use crate::error::{Error, Result};
use crate::noise::{Purpose, Stream};
use crate::ops;
use crate::util::check::{at_least_one, positive, share};

/// The low-rank pair A `(r, in)` and B `(out, r)`, with its scale and dropout.
#[derive(Debug, Clone)]
pub struct LowRank {
    a: Tensor,
    b: Tensor,
    scale: f64,
    dropout: f64,
    stream: Stream,
}

/// Computes the scale s of the update: `alpha / rank`, or `alpha / sqrt(rank)` with rsLoRA.
pub fn scaling(rank: usize, alpha: f64, use_rslora: bool) -> f64 {
    let rank = rank as f64;
    alpha / if use_rslora { rank.sqrt() } else { rank }
}

/// Checks the options that all low-rank adapters have.
///
/// # Errors
/// Unless `rank >= 1`, alpha is positive and finite, and dropout lies in [0, 1).
pub fn validate(rank: usize, alpha: f64, dropout: f64) -> Result<()> {
    at_least_one("rank", rank)?;
    positive("alpha", alpha)?;
    share("dropout", dropout)
}

impl LowRank {
    /// Creates the parameters `{name}.a`, uniform in +-1/sqrt(in_dim), and `{name}.b`, zero, in the store.
    ///
    /// # Errors
    /// If the rank is 0, the scale is not finite, `dropout` is not in [0, 1), or a name is taken. The store is then
    /// unchanged.
    pub fn new(
        params: &Params,
        name: &str,
        (in_dim, out_dim): (usize, usize),
        rank: usize,
        scale: f64,
        dropout: f64,
    ) -> Result<Self> {
        let bound = 1.0 / (in_dim as f64).sqrt();
        let starts = (&Init::Uniform(-bound, bound), &Init::Constant(0.0));
        Self::started(params, name, (in_dim, out_dim), rank, starts, scale, dropout)
    }

    /// [`Self::new`] with other initial values of A and B.
    pub(crate) fn started(
        params: &Params,
        name: &str,
        (in_dim, out_dim): (usize, usize),
        rank: usize,
        starts: (&Init, &Init),
        scale: f64,
        dropout: f64,
    ) -> Result<Self> {
        // A rank above the layer's dimensions adds no expressiveness, but PEFT has such adapters.
        if rank == 0 {
            return Err(Error::config("rank", format!("{name}: expected at least 1, got 0")));
        }
        if !scale.is_finite() {
            return Err(Error::config("scale", format!("{name}: expected a finite number, got {scale}")));
        }
        share("dropout", dropout)?;
        let (a, b) = params.all_or_none(&format!("{name}."), || {
            let a = params.create(&format!("{name}.a"), Role::A, (rank, in_dim), starts.0)?;
            Ok((a, params.create(&format!("{name}.b"), Role::B, (out_dim, rank), starts.1)?))
        })?;
        Ok(Self { a, b, scale, dropout, stream: params.noise().stream(name, Purpose::Dropout) })
    }

    /// A, `(rank, in_dim)`.
    pub fn a(&self) -> &Tensor {
        &self.a
    }

    /// B, `(out_dim, rank)`.
    pub fn b(&self) -> &Tensor {
        &self.b
    }

    /// The scale s of the update.
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// Computes the output of the base with this pair, with `a` in place of A (A itself, or a draw around
    /// it).
    ///
    /// # Shapes
    /// - `xs`: `(.., in_dim)`, any float dtype
    /// - `a`: `(rank, in_dim)`
    /// - output: `(.., out_dim)`, the dtype of `xs`
    ///
    /// # Errors
    /// If shapes or dtypes do not fit.
    pub fn forward(
        &self,
        xs: &Tensor,
        base: &BaseLinear,
        a: &Tensor,
        cx: &Context,
    ) -> candle_core::Result<Tensor> {
        // In a prediction, tracked parameters would make a graph of every layer.
        let tracked = |tensor: &Tensor| if cx.is_differentiated() { tensor.clone() } else { tensor.detach() };
        let (a, b) = (&tracked(a), &tracked(&self.b));
        let Some(weight) = base.dense() else {
            let dropped = self.dropped(xs, cx)?;
            let xs_low = dropped.as_ref().unwrap_or(xs);
            return ops::add_low_rank(&base.forward_in(xs, cx)?, xs_low, a, b, self.scale, cx.path);
        };
        let bias = base.bias();
        match cx.pass.dropout_draw().filter(|_| self.dropout > 0.0) {
            None => ops::adapted_linear(xs, weight, bias, a, b, self.scale, cx.path),
            Some(draw) => {
                let dropout = (self.dropout, &self.stream, draw);
                ops::adapted_linear_with_dropout(xs, weight, bias, dropout, a, b, self.scale, cx.path)
            }
        }
    }

    /// Returns `xs` with dropout applied, or `None` if this pass has no dropout.
    pub(crate) fn dropped(&self, xs: &Tensor, cx: &Context) -> candle_core::Result<Option<Tensor>> {
        let draw = cx.pass.dropout_draw().filter(|_| self.dropout > 0.0);
        draw.map(|draw| ops::dropout(xs, self.dropout, &self.stream, draw, cx.path)).transpose()
    }

    /// Computes `s B A`, `(out_dim, in_dim)`.
    ///
    /// # Errors
    /// If candle fails.
    pub fn delta(&self) -> candle_core::Result<Tensor> {
        self.delta_of(&self.a)
    }

    /// Computes `s B A` with A replaced by `a`, `(rank, in_dim)`.
    ///
    /// # Errors
    /// If candle fails.
    pub fn delta_of(&self, a: &Tensor) -> candle_core::Result<Tensor> {
        self.b.matmul(a)? * self.scale
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::Pass;
    use crate::noise::Noise;
    use crate::ops::OpPath;
    use candle_core::{DType, Device};
    use candle_nn::Linear;

    #[test]
    fn with_dropout_a_half_width_output_is_rounded_once() -> Result<()> {
        let normal = |path: &str, shape: (usize, usize)| -> Result<Tensor> {
            let mut z = vec![0f32; shape.0 * shape.1];
            Noise::new(1).stream(path, Purpose::Init).fill_normal_f32(0, &mut z);
            Ok(Tensor::from_vec(z, shape, &Device::Cpu)?)
        };
        let params = Params::new(Noise::new(2), &Device::Cpu);
        let pair = LowRank::new(&params, "layer", (6, 5), 3, 1.7, 0.4)?;
        params.set("layer.b", &normal("b", (5, 3))?)?;
        let (xs, weight) = (normal("xs", (40, 6))?.to_dtype(DType::BF16)?, normal("w", (5, 6))?);
        let base = Linear::new(weight.to_dtype(DType::BF16)?, None);
        let got = pair.forward(&xs, &base.clone().into(), pair.a(), &Pass::Train { draw: 3 }.into())?;
        let stream = Noise::new(2).stream("layer", Purpose::Dropout);
        let dropped = ops::dropout(&xs, 0.4, &stream, 3, OpPath::Fused)?.to_dtype(DType::F32)?;
        // Half precision runs on the composed path: the products are equal to the last bit.
        let low = ops::low_rank(&dropped, pair.a(), pair.b(), 1.7, OpPath::Composed)?;
        let frozen = ops::linear(&xs, base.weight(), None, OpPath::Fused)?.to_dtype(DType::F32)?;
        let want = (frozen + low)?.to_dtype(DType::BF16)?;
        let host = |t: &Tensor| t.to_dtype(DType::F32)?.to_vec2::<f32>();
        assert_eq!(got.dtype(), DType::BF16);
        assert_eq!(host(&got)?, host(&want)?);
        Ok(())
    }
}
