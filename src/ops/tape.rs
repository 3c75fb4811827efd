//! What many layers differentiate together, after candle's own backward pass.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Result, Tensor};

#[cfg(any(test, feature = "cuda"))]
use super::custom_vjp::leaf;

/// Steps of a backward pass that are taken for many layers at once.
///
/// Candle differentiates one tensor after the other, and an op of its graph has three arguments at most. What depends on
/// the parameters of all layers, as their draws and their regulariser do, costs some launches for each layer there. A
/// tape cuts it off: its results are leaves of candle's graph, and
/// [`Gradients::backward`](crate::optim::Gradients::backward), which is given the tape, goes on behind them where
/// candle ends, in a few launches for all of them. On the CPU nothing is cut.
///
/// It is for one forward and one backward pass; clones share. A loss of a pass with a tape that is differentiated without
/// it has no gradient of the parameters behind it, which [`Gradients`](crate::optim::Gradients) take for the error it is.
///
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use monteclora::adapters::{LoraConfig, LoraLinear};
/// use monteclora::optim::Gradients;
/// use monteclora::{Context, Noise, Params, Pass, Tape};
///
/// let device = Device::Cpu;
/// let base = candle_nn::Linear::new(Tensor::ones((6, 4), DType::F32, &device)?, None);
/// let params = Params::new(Noise::new(0), &device);
/// let layer = LoraLinear::new(base, &params, "proj", &LoraConfig { rank: 2, ..Default::default() })?;
/// let tape = Tape::default();
/// let cx = Context::from(Pass::Train { draw: 0 }).with_tape(&tape);
/// let loss = layer.forward_with(&Tensor::ones((1, 4), DType::F32, &device)?, &cx)?.sum_all()?;
/// let mut grads = Gradients::new();
/// grads.backward(&params, &loss, &tape)?;
/// assert_eq!(grads.tensors()?.len(), 2); // of A and B
/// # Ok::<(), monteclora::Error>(())
/// ```
#[derive(Clone, Default)]
pub struct Tape {
    cuts: Arc<Mutex<Vec<Cut>>>,
}

/// From the gradients of a cut's leaves, none of those that the loss does not depend on, those of tensors before it.
type Backward = Box<dyn FnOnce(Vec<Option<Tensor>>) -> Result<Vec<(Tensor, Tensor)>> + Send>;

pub(super) struct Cut {
    pub leaves: Vec<Tensor>,
    pub backward: Backward,
}

impl std::fmt::Debug for Tape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tape").field("cuts", &self.lock().len()).finish()
    }
}

impl Tape {
    // A panic while the lock is held leaves the list whole.
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Cut>> {
        self.cuts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `results`, freshly computed and held by nobody else, as leaves that `backward` differentiates.
    ///
    /// # Errors
    /// If candle fails.
    #[cfg(any(test, feature = "cuda"))]
    pub(crate) fn cut(
        &self,
        results: Vec<Tensor>,
        backward: impl FnOnce(Vec<Option<Tensor>>) -> Result<Vec<(Tensor, Tensor)>> + Send + 'static,
    ) -> Result<Vec<Tensor>> {
        let leaves = results.into_iter().map(leaf).collect::<Result<Vec<_>>>()?;
        self.lock().push(Cut { leaves: leaves.clone(), backward: Box::new(backward) });
        Ok(leaves)
    }

    /// The vectors `(n)` of many layers as rows `(l, n)`, a leaf; none where nothing is gained: on the CPU.
    ///
    /// # Errors
    /// If candle fails.
    #[cfg_attr(not(feature = "cuda"), allow(unused_variables, clippy::unused_self))]
    pub(crate) fn stack(&self, vectors: &[&Tensor]) -> Result<Option<Tensor>> {
        #[cfg(feature = "cuda")]
        if let Some(all) = crate::kernels::multi_tensor::joined(vectors)? {
            let rows = all.reshape((vectors.len(), ()))?;
            let vectors: Vec<Tensor> = vectors.iter().map(|vector| (*vector).clone()).collect();
            let backward = move |grads: Vec<Option<Tensor>>| {
                let Some(Some(grad)) = grads.into_iter().next() else { return Ok(Vec::new()) };
                let grad = grad.contiguous()?;
                let row = |(i, vector): (usize, Tensor)| Ok((vector, grad.get(i)?));
                vectors.into_iter().enumerate().map(row).collect()
            };
            return Ok(self.cut(vec![rows], backward)?.pop());
        }
        Ok(None)
    }

    /// What is left of the pass, the last first; the tape is empty then.
    pub(super) fn take(&self) -> Vec<Cut> {
        let mut cuts = std::mem::take(&mut *self.lock());
        cuts.reverse();
        cuts
    }

    /// Every leaf.
    pub(super) fn leaves(&self) -> Vec<Tensor> {
        self.lock().iter().flat_map(|cut| cut.leaves.iter().cloned()).collect()
    }
}
