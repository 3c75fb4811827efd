//! IA3 (Liu et al. 2022): activations are scaled by learned vectors.
//!
//! ```text
//! y = l * (W0 x + b)          on keys and values
//! y = W0 (l * x) + b          on the second layer of a feed-forward block
//! ```

use std::any::Any;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::adapter::{Adapter, BaseLinear, Context, Init, Params, Role};
use crate::error::Result;

/// Which side of a layer the vector scales.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Scaled {
    /// The output, as for keys and values.
    Output,
    /// The input, as for the second layer of a feed-forward block, whose input is the block's hidden
    /// activation.
    Input,
}

/// An IA3 adapter of one linear layer, with `out_dim` or `in_dim` parameters.
#[derive(Debug, Clone)]
pub struct Ia3 {
    scaling: Tensor,
    scaled: Scaled,
}

impl Ia3 {
    /// Creates the parameter `{path}.{adapter}.scaling`, all ones, in the store.
    ///
    /// # Errors
    /// If the name is taken.
    pub fn new(
        params: &Params,
        path: &str,
        adapter: &str,
        (in_dim, out_dim): (usize, usize),
        scaled: Scaled,
    ) -> Result<Self> {
        let len = if scaled == Scaled::Output { out_dim } else { in_dim };
        let name = format!("{path}.{adapter}.scaling");
        Ok(Self { scaling: params.create(&name, Role::Scaling, len, &Init::Constant(1.0))?, scaled })
    }

    /// The vector l, `(out_dim)`, or `(in_dim)` if the input is scaled.
    pub fn scaling(&self) -> &Tensor {
        &self.scaling
    }
}

impl Adapter for Ia3 {
    fn forward(&self, xs: &Tensor, base: &BaseLinear, cx: &Context) -> candle_core::Result<Tensor> {
        // The product is computed in the vector's precision, whatever the base's dtype.
        let scale =
            |t: &Tensor| t.to_dtype(self.scaling.dtype())?.broadcast_mul(&self.scaling)?.to_dtype(xs.dtype());
        match self.scaled {
            Scaled::Output => scale(&base.forward_in(xs, cx)?),
            Scaled::Input => base.forward_in(&scale(xs)?, cx),
        }
    }

    fn parameters(&self) -> Vec<(Role, Tensor)> {
        vec![(Role::Scaling, self.scaling.clone())]
    }

    /// Returns `None` if a bias is scaled too, which is not a change of the weight alone.
    fn delta(&self, base: &BaseLinear, _cx: &Context) -> candle_core::Result<Option<Tensor>> {
        let by = (&self.scaling.detach() - 1.0)?;
        let by = match (self.scaled, base.bias()) {
            (Scaled::Output, Some(_)) => return Ok(None),
            (Scaled::Output, None) => by.unsqueeze(1)?,
            (Scaled::Input, _) => by.unsqueeze(0)?,
        };
        base.dequantize()?.weight().detach().to_dtype(by.dtype())?.broadcast_mul(&by).map(Some)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
