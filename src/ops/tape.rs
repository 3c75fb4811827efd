//! Backward steps shared by many layers, which follow candle's own backward pass.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Result, Tensor};

#[cfg(any(test, feature = "cuda"))]
use super::custom_vjp::leaf;

/// Backward steps that are taken for many layers at once.
///
/// Candle differentiates one tensor after the other, and its ops have at most three arguments. Computations
/// on the parameters of all layers, such as their draws and their regulariser, would therefore cost several
/// launches per layer. A tape cuts them out of candle's graph: their results become leaves of the graph, and
/// [`Gradients::backward`](crate::optim::Gradients::backward), which takes the tape, continues from these
/// leaves in a few launches for all layers. On the CPU nothing is cut.
///
/// A tape serves one forward and one backward pass; clones share it. If a loss is differentiated without the
/// tape of its forward pass, the parameters behind the cuts get no gradient, which
/// [`Gradients`](crate::optim::Gradients) report as an error.
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

/// Computes the gradients of the tensors before a cut, as pairs of tensor and gradient, from those of its
/// leaves, which are `None` for leaves that the loss does not depend on.
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
    // The lock may be poisoned: a panic while it is held leaves the list intact.
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Cut>> {
        self.cuts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Turns `results`, which must be freshly computed and not shared, into leaves that
    /// `backward` differentiates.
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

    /// Stacks the vectors `(n)` of many layers into a leaf `(l, n)`. Returns `None` where this gains
    /// nothing, as on the CPU.
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

    /// Removes and returns all cuts, the last one first.
    pub(super) fn take(&self) -> Vec<Cut> {
        let mut cuts = std::mem::take(&mut *self.lock());
        cuts.reverse();
        cuts
    }

    /// The leaves of all cuts.
    pub(super) fn leaves(&self) -> Vec<Tensor> {
        self.lock().iter().flat_map(|cut| cut.leaves.iter().cloned()).collect()
    }
}
