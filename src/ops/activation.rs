//! Activations.

use candle_core::{Result, Tensor};

/// The exact (erf) GELU.
pub fn gelu(xs: &Tensor) -> Result<Tensor> {
    xs.gelu_erf()
}

/// `x sigmoid(x)`.
pub fn silu(xs: &Tensor) -> Result<Tensor> {
    xs.silu()
}

/// `silu(gate) * up` (SwiGLU).
pub fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.silu()? * up
}
