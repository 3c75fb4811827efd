//! The layers of an encoder, one after the other.

use std::sync::Arc;

use candle_core::Tensor;

use crate::adapter::{linears, AdaptableModel, Context, Pass};
use crate::error::Result;
use crate::models::packed::PackedBatch;
use crate::ops;

/// One layer of an encoder.
pub trait Block: AdaptableModel + Send + Sync + 'static {
    /// Computes the layer's hidden states from `xs`, (n, d) or, if the batch is not packed, (b, t, d). The
    /// output has the same shape, or is (b, d) for the tokens of [`PackedBatch::only`].
    ///
    /// # Errors
    /// If candle fails.
    fn forward(&self, xs: &Tensor, batch: &PackedBatch, cx: &Context) -> candle_core::Result<Tensor>;

    /// All tensors of the layer that may be trained.
    ///
    /// # Errors
    /// Those of [`AdaptableModel::visit_linears`]; there are no others.
    fn parameters(&self) -> Result<Vec<Tensor>>;
}

/// The layers of an encoder, with optional gradient checkpointing.
#[derive(Debug)]
pub struct Stack<L> {
    layers: Vec<Arc<L>>,
    checkpoint_layers: bool,
}

impl<L: Block> Stack<L> {
    /// A stack of these layers, in order.
    pub fn new(layers: Vec<L>) -> Self {
        Self { layers: layers.into_iter().map(Arc::new).collect(), checkpoint_layers: false }
    }

    /// Sets whether training keeps only each layer's input and recomputes the layer in the backward pass
    /// ([`ops::checkpoint`]).
    pub fn set_checkpoint_layers(&mut self, on: bool) {
        self.checkpoint_layers = on;
    }

    /// The last hidden states, packed as `xs` is.
    ///
    /// # Errors
    /// If candle fails.
    pub fn forward(&self, xs: Tensor, batch: &PackedBatch, cx: &Context) -> candle_core::Result<Tensor> {
        self.run(&self.layers, xs, batch, cx)
    }

    /// The last hidden state of each row's first token, (b, d). The last layer computes keys and values for
    /// all tokens, but everything else only for the first tokens.
    ///
    /// # Errors
    /// If candle fails.
    pub fn first_token(&self, xs: Tensor, batch: PackedBatch, cx: &Context) -> candle_core::Result<Tensor> {
        let Some((last, before)) = self.layers.split_last() else {
            return batch.first_tokens(xs.device())?.take(&xs, cx.path);
        };
        let xs = self.run(before, xs, &batch, cx)?; // (n, d)
        let batch = batch.of_first_tokens(xs.device())?;
        self.run(std::slice::from_ref(last), xs, &batch, cx) // (b, d)
    }

    fn run(
        &self,
        layers: &[Arc<L>],
        mut xs: Tensor,
        batch: &PackedBatch,
        cx: &Context,
    ) -> candle_core::Result<Tensor> {
        for layer in layers {
            xs = match (self.checkpoint_layers, cx.pass) {
                (true, Pass::Train { .. }) if cx.is_differentiated() => {
                    let (block, batch, cx) = (layer.clone(), batch.clone(), cx.clone().without_tape());
                    ops::checkpoint(&xs, &layer.parameters()?, move |xs| block.forward(xs, &batch, &cx))?
                }
                _ => cx.handed_on(layer.forward(&xs, batch, cx)?),
            };
        }
        Ok(xs)
    }
}

impl<L: Block> AdaptableModel for Stack<L> {
    linears!(layers);
}
