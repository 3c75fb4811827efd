//! The feed-forward block of an encoder with frozen weights.

use candle_core::{Result, Tensor};

/// `gelu(x W1^T + b1) W2^T + b2`.
pub fn feed_forward(
    xs: &Tensor,
    w1: &Tensor,
    b1: Option<&Tensor>,
    w2: &Tensor,
    b2: Option<&Tensor>,
) -> Result<Tensor> {
    super::linear(&super::gelu(&super::linear(xs, w1, b1)?)?, w2, b2)
}
