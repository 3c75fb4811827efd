//! Several linear projections of the same input.

use std::array;

use candle_core::{Result, Tensor, D};

use crate::adapter::{AdaptableLinear, Context, Linears};
use crate::error;

/// N projections of the same input: separate layers, or one fused layer (Phi 3) whose outputs are
/// concatenated and which takes a single adapter.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // N layers are no smaller than one
pub(super) enum Joint<const N: usize> {
    Apart([AdaptableLinear; N]),
    Fused { layer: AdaptableLinear, widths: [usize; N] },
}

impl<const N: usize> Joint<N> {
    /// Returns all N outputs, `(.., width)` each.
    pub fn forward(&self, xs: &Tensor, cx: &Context) -> Result<[Tensor; N]> {
        let mut outputs = array::from_fn(|_| xs.clone());
        match self {
            Self::Apart(layers) => {
                for (output, layer) in outputs.iter_mut().zip(layers) {
                    *output = layer.forward(xs, cx)?;
                }
            }
            Self::Fused { layer, widths } => {
                let (ys, mut first) = (layer.forward(xs, cx)?, 0);
                for (output, width) in outputs.iter_mut().zip(widths) {
                    *output = ys.narrow(D::Minus1, first, *width)?;
                    first += width;
                }
            }
        }
        Ok(outputs)
    }
}

impl<const N: usize> Linears for Joint<N> {
    fn visit(&self, f: &mut dyn FnMut(&AdaptableLinear) -> error::Result<()>) -> error::Result<()> {
        match self {
            Self::Apart(layers) => layers.visit(f),
            Self::Fused { layer, .. } => layer.visit(f),
        }
    }

    fn visit_mut(
        &mut self,
        f: &mut dyn FnMut(&mut AdaptableLinear) -> error::Result<()>,
    ) -> error::Result<()> {
        match self {
            Self::Apart(layers) => layers.visit_mut(f),
            Self::Fused { layer, .. } => layer.visit_mut(f),
        }
    }
}
