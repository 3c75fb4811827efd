//! The gated feed-forward block of a layer.

use candle_core::Tensor;

use super::config::{Activation, DecoderConfig};
use super::joint::Joint;
use crate::adapter::{linears, AdaptableLinear, AdaptableModel, Context};
use crate::error::Result;
use crate::models::layers::adaptable_linear_of;
use crate::models::Weights;
use crate::ops;

/// The gated feed-forward block, `(activation(x Wg^T) * x Wu^T) Wd^T` (Shazeer 2020).
#[derive(Debug)]
pub(super) struct FeedForward {
    gate_up: Joint<2>,
    down_proj: AdaptableLinear,
    activation: Activation,
}

impl FeedForward {
    pub fn load(path: &str, vb: &Weights, config: &DecoderConfig) -> Result<Self> {
        let (d, inner) = (config.hidden_size, config.intermediate_size);
        let (std, bias) = (config.initializer_range, config.mlp_bias);
        let layer = |name: &str, in_dim, out_dim| {
            adaptable_linear_of(&format!("{path}.{name}"), in_dim, out_dim, std, bias, &vb.pp(name))
        };
        let gate_up = match config.fused_projections {
            true => Joint::Fused { layer: layer("gate_up_proj", d, 2 * inner)?, widths: [inner; 2] },
            false => Joint::Apart([layer("gate_proj", d, inner)?, layer("up_proj", d, inner)?]),
        };
        Ok(Self { gate_up, down_proj: layer("down_proj", inner, d)?, activation: config.activation })
    }

    pub fn forward(&self, xs: &Tensor, cx: &Context) -> candle_core::Result<Tensor> {
        if let Some([gate, up, down]) = self.as_swiglu(cx) {
            return ops::swiglu(xs, gate, up, down, cx.path);
        }
        let [gate, up] = self.gate_up.forward(xs, cx)?;
        let inner = match self.activation {
            Activation::Silu => ops::silu_mul(&gate, &up, cx.path)?,
            Activation::GeluTanh => ops::gelu_tanh_mul(&gate, &up, cx.path)?,
        };
        self.down_proj.forward(&inner, cx)
    }

    /// Returns the weights of gate, up and down if the whole block can run as one fused SwiGLU operation:
    /// SiLU with separate dense layers that have no bias, active adapter or probe.
    fn as_swiglu(&self, cx: &Context) -> Option<[&Tensor; 3]> {
        let Joint::Apart([gate, up]) = &self.gate_up else { return None };
        fn weight<'a>(layer: &'a AdaptableLinear, cx: &Context) -> Option<&'a Tensor> {
            layer.as_linear(cx).filter(|(_, bias)| bias.is_none()).map(|(weight, _)| weight)
        }
        match self.activation {
            Activation::Silu => Some([weight(gate, cx)?, weight(up, cx)?, weight(&self.down_proj, cx)?]),
            Activation::GeluTanh => None,
        }
    }
}

impl AdaptableModel for FeedForward {
    linears!(gate_up, down_proj);
}
