//! LoRA-FA (Zhang et al. 2023, "LoRA-FA: memory-efficient low-rank adaptation for large language models
//! fine-tuning"): A keeps its initial value, only B is trained.
//!
//! ```text
//! y = W0 x + b + s B A0 dropout(x)
//! ```
//!
//! The update stays in the row space of A0, and the gradient of B needs only `A0 x` of the inputs. A starts
//! as in LoRA (in the paper it is normal). The trained adapter is a LoRA adapter like any other: files,
//! post-hoc posteriors and treatments see a [`Lora`].

use std::any::Any;

use candle_core::Tensor;

use super::lora::{Lora, LoraConfig};
use crate::adapter::{Adapter, BaseLinear, Context, Params, Role};
use crate::error::Result;

/// A LoRA adapter of one linear layer with a constant A.
#[derive(Debug, Clone)]
pub struct LoraFa {
    lora: Lora,
}

impl LoraFa {
    /// Creates the adapter's parameters `{path}.{adapter}.a` and `.b` in the store. `.a` gets no gradient.
    ///
    /// # Errors
    /// As [`Lora::new`].
    pub fn new(
        params: &Params,
        path: &str,
        adapter: &str,
        dims: (usize, usize),
        config: &LoraConfig,
    ) -> Result<Self> {
        Ok(Self { lora: Lora::new(params, path, adapter, dims, config)? })
    }

    /// The underlying LoRA adapter.
    pub fn lora(&self) -> &Lora {
        &self.lora
    }
}

impl Adapter for LoraFa {
    fn forward(&self, xs: &Tensor, base: &BaseLinear, cx: &Context) -> candle_core::Result<Tensor> {
        let pair = self.lora.low_rank();
        pair.forward(xs, base, &pair.a().detach(), cx)
    }

    fn parameters(&self) -> Vec<(Role, Tensor)> {
        vec![(Role::B, self.lora.low_rank().b().clone())]
    }

    fn delta(&self, base: &BaseLinear, cx: &Context) -> candle_core::Result<Option<Tensor>> {
        self.lora.delta(base, cx)
    }

    fn as_any(&self) -> &dyn Any {
        &self.lora
    }
}
