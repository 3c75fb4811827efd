//! LoRA-FA (Zhang et al. 2023, "LoRA-FA: memory-efficient low-rank adaptation for large language models
//! fine-tuning"): A stays where it started, B alone is trained.
//!
//! ```text
//! y = W0 x + b + s B A0 dropout(x)
//! ```
//!
//! The update stays in the row space of A0, and the gradient of B asks of the inputs for `A0 x` alone. A starts as
//! LoRA's does (the paper's is normal). What is trained is a LoRA adapter like any other: files, post-hoc posteriors
//! and treatments see one.

use std::any::Any;

use candle_core::Tensor;

use super::lora::{Lora, LoraConfig};
use crate::adapter::{Adapter, BaseLinear, Context, Params, Role};
use crate::error::Result;

/// A LoRA adapter of one linear layer whose A is constant.
#[derive(Debug, Clone)]
pub struct LoraFa {
    lora: Lora,
}

impl LoraFa {
    /// Creates the adapter's parameters `{path}.{adapter}.a`, which gets no gradient and has to be frozen in the
    /// store ([`crate::inject::lora_fa`] does), and `.b`.
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

    /// The LoRA adapter that it is.
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
