//! The softmax over keys in tensor operations, shared by plain and disentangled attention.

use candle_core::{Result, Tensor, D};

use super::dropout::DropoutPlan;

/// The score of a hidden key: far below all others, but finite, because a row without a
/// visible key would be NaN.
const HIDDEN: f32 = -1e30;

/// The mask and the dropout of the attention probabilities.
pub(super) struct Softmax {
    /// 1 where a query sees a key, broadcastable to (b, heads, tq, tk). `None`: everywhere.
    pub visible: Option<Tensor>,
    pub dropout: Option<DropoutPlan>,
}

impl Softmax {
    /// The probabilities of scores (b, heads, tq, tk) before dropout, and the log-sum-exp of each row,
    /// (b, heads, tq, 1), from which [`Self::again`] recomputes them.
    pub fn of(&self, scores: Tensor) -> Result<(Tensor, Tensor)> {
        let scores = self.seen(scores)?;
        let max = scores.max_keepdim(D::Minus1)?;
        let e = self.hide(scores.broadcast_sub(&max)?.exp()?)?;
        let sum = e.sum_keepdim(D::Minus1)?;
        let sum = (&sum + sum.eq(0f64)?.to_dtype(sum.dtype())?)?;
        Ok((e.broadcast_div(&sum)?, (sum.log()? + max)?))
    }

    /// Recomputes the probabilities from the log-sum-exps that [`Self::of`] returned.
    pub fn again(&self, scores: Tensor, log_sums: &Tensor) -> Result<Tensor> {
        self.hide(self.seen(scores)?.broadcast_sub(log_sums)?.exp()?)
    }

    /// Applies dropout to the probabilities or to their gradient.
    pub fn drop(&self, p: &Tensor) -> Result<Tensor> {
        match &self.dropout {
            Some(plan) => plan.apply(p),
            None => Ok(p.clone()),
        }
    }

    /// The scores with hidden keys set to [`HIDDEN`].
    fn seen(&self, scores: Tensor) -> Result<Tensor> {
        let Some(visible) = &self.visible else { return Ok(scores) };
        let hidden = Tensor::full(HIDDEN, scores.dims(), scores.device())?.to_dtype(scores.dtype())?;
        visible.broadcast_as(scores.dims())?.contiguous()?.where_cond(&scores, &hidden)
    }

    /// Sets hidden probabilities to zero; a row without a visible key would otherwise be uniform.
    fn hide(&self, p: Tensor) -> Result<Tensor> {
        match &self.visible {
            Some(visible) => p.broadcast_mul(&visible.to_dtype(p.dtype())?),
            None => Ok(p),
        }
    }
}
