//! The bottleneck adapter (Houlsby et al. 2019): a small two-layer network after a sub-layer.
//!
//! ```text
//! h = W0 x + b
//! y = h + U gelu(D h + d) + u
//! ```
//!
//! It is placed on the last linear layer of a sub-layer (both attention and feed-forward), before dropout,
//! residual and norm, as in figure 2 of the paper.

use std::any::Any;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::adapter::{Adapter, BaseLinear, Context, Init, Params, Role};
use crate::error::Result;
use crate::ops;
use crate::util::check::at_least_one;

/// The options of a bottleneck adapter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BottleneckConfig {
    /// The inner width m.
    pub width: usize,
}

impl Default for BottleneckConfig {
    fn default() -> Self {
        Self { width: 16 }
    }
}

impl BottleneckConfig {
    /// Checks the width.
    ///
    /// # Errors
    /// If it is 0.
    pub fn validate(&self) -> Result<()> {
        at_least_one("width", self.width)
    }
}

/// A bottleneck adapter of one linear layer, with `2 m out_dim + m + out_dim` parameters.
#[derive(Debug, Clone)]
pub struct Bottleneck {
    down: Tensor,      // (m, out)
    down_bias: Tensor, // (m)
    up: Tensor,        // (out, m)
    up_bias: Tensor,   // (out)
}

impl Bottleneck {
    /// Creates `{path}.{adapter}.down`, `.up` (normal, standard deviation 0.01) and their biases (zero), so
    /// that the adapter starts close to the identity, as in section 2.1 of the paper.
    ///
    /// # Errors
    /// If the width is 0, or a name is taken.
    pub fn new(
        params: &Params,
        path: &str,
        adapter: &str,
        (_, out_dim): (usize, usize),
        config: &BottleneckConfig,
    ) -> Result<Self> {
        config.validate()?;
        let (m, name) = (config.width, format!("{path}.{adapter}."));
        let (near_zero, zero) = (Init::Normal(0.01), Init::Constant(0.0));
        params.all_or_none(&name, || {
            Ok(Self {
                down: params.create(&format!("{name}down"), Role::A, (m, out_dim), &near_zero)?,
                down_bias: params.create(&format!("{name}down_bias"), Role::Bias, m, &zero)?,
                up: params.create(&format!("{name}up"), Role::B, (out_dim, m), &near_zero)?,
                up_bias: params.create(&format!("{name}up_bias"), Role::Bias, out_dim, &zero)?,
            })
        })
    }
}

impl Adapter for Bottleneck {
    fn forward(&self, xs: &Tensor, base: &BaseLinear, cx: &Context) -> candle_core::Result<Tensor> {
        let hidden = base.forward_in(xs, cx)?.to_dtype(self.down.dtype())?;
        let inner = ops::gelu(&ops::linear(&hidden, &self.down, Some(&self.down_bias), cx.path)?, cx.path)?;
        let change = ops::linear(&inner, &self.up, Some(&self.up_bias), cx.path)?;
        (hidden + change)?.to_dtype(xs.dtype())
    }

    fn parameters(&self) -> Vec<(Role, Tensor)> {
        vec![
            (Role::A, self.down.clone()),
            (Role::Bias, self.down_bias.clone()),
            (Role::B, self.up.clone()),
            (Role::Bias, self.up_bias.clone()),
        ]
    }

    /// Returns `None`: the adapter is not a linear map.
    fn delta(&self, _base: &BaseLinear, _cx: &Context) -> candle_core::Result<Option<Tensor>> {
        Ok(None)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
