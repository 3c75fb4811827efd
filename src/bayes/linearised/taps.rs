//! Taps on the low-rank pairs of LoRA and MonteCLoRA, which record inputs and output gradients of A and B
//! token by token.
//!
//! While taps record, an adapter computes
//!
//! ```text
//! h = A x + t_h,   y = W0 x + b + s B h + t_y,   t_h = t_y = 0
//! ```
//!
//! The gradients of a model output F with respect to t_h and t_y, together with the inputs x and s h, give
//! the gradients of A and B: `dF/dA = sum_tokens dF/dt_h x^T`, `dF/dB = sum_tokens dF/dt_y (s h)^T`.

use std::any::Any;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

use candle_core::{Tensor, Var};

use super::record::{BatchRecord, LayerRecord, Places, Wanted};
use crate::adapter::{
    no_active, other_method, AdaptableModel, Adapter, BaseLinear, Context, LowRank, Pass, Role,
};
use crate::adapters::Lora;
use crate::data::batch::Batch;
use crate::error::{Error, Result};
use crate::monteclora::MonteCLoRA;
use crate::ops;
use crate::predict::Predictor;

/// The taps on the active LoRA or MonteCLoRA adapters of a model, until [`Self::remove`]. MonteCLoRA is taken
/// at its mean. Clones share the same taps.
#[derive(Debug, Clone)]
pub struct Taps {
    layers: Vec<Tapped>,
}

#[derive(Debug, Clone)]
struct Tapped {
    path: String,
    adapter: String,
    pair: LowRank,
    recording: Arc<Mutex<Recording>>,
}

/// The state that [`Taps`] shares with one tapped adapter.
#[derive(Debug, Default)]
struct Recording {
    /// The recordings of threads. Other threads use the model as if there were no taps.
    threads: HashMap<ThreadId, Passes>,
    /// Whether the tap currently wraps the adapter.
    holds: bool,
    /// The adapter after its tap was dropped, until it is put back into its layer.
    freed: Option<Box<dyn Adapter>>,
}

/// Which maps of an adapter are recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::bayes) enum Maps {
    /// A alone.
    A,
    /// A and B.
    Both,
}

/// The forward passes through one adapter that a thread has recorded.
#[derive(Debug)]
struct Passes {
    maps: Maps,
    seen: Vec<TappedPass>,
}

/// The inputs of the recorded maps with the taps at their outputs: of A, and then of B.
#[derive(Debug)]
struct TappedPass(Vec<(Tensor, Var)>);

/// An adapter wrapped by a tap. It behaves as the wrapped adapter, also in [`Adapter::as_any`].
#[derive(Debug)]
struct TappedAdapter {
    /// Present until the tap is dropped.
    adapter: Option<Box<dyn Adapter>>,
    pair: LowRank,
    recording: Arc<Mutex<Recording>>,
}

impl TappedAdapter {
    fn adapter(&self) -> &dyn Adapter {
        self.adapter.as_deref().expect("an adapter is in its tap until that is dropped")
    }
}

impl Drop for TappedAdapter {
    fn drop(&mut self) {
        let mut recording = lock(&self.recording);
        (recording.holds, recording.freed) = (false, self.adapter.take());
    }
}

fn lock(recording: &Mutex<Recording>) -> MutexGuard<'_, Recording> {
    // A panic leaves a partial recording, which the next recording of that thread clears.
    recording.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Adapter for TappedAdapter {
    fn forward(&self, xs: &Tensor, base: &BaseLinear, cx: &Context) -> candle_core::Result<Tensor> {
        let thread = thread::current().id();
        let Some(maps) = lock(&self.recording).threads.get(&thread).map(|passes| passes.maps) else {
            return self.adapter().forward(xs, base, cx);
        };
        let pair = &self.pair;
        // Detached: the gradients of A and B themselves are sums over examples, which are not needed.
        let (a, b) = (pair.a().detach(), pair.b().detach());
        let tap = |xs: &Tensor| Var::zeros(xs.shape(), xs.dtype(), xs.device());
        let wide = xs.to_dtype(a.dtype())?;
        let h = ops::linear(&wide, &a, None, cx.path)?;
        let of_a = tap(&h)?;
        let h = (h + of_a.as_tensor())?;
        let mut seen = vec![(wide.detach(), of_a)];
        let mut low = (ops::linear(&h, &b, None, cx.path)? * pair.scale())?;
        if maps == Maps::Both {
            let of_b = tap(&low)?;
            low = (low + of_b.as_tensor())?;
            seen.push(((h.detach() * pair.scale())?, of_b));
        }
        let frozen = base.forward_in(xs, cx)?.to_dtype(low.dtype())?;
        if let Some(passes) = lock(&self.recording).threads.get_mut(&thread) {
            passes.seen.push(TappedPass(seen));
        }
        (frozen + low)?.to_dtype(xs.dtype())
    }

    fn parameters(&self) -> Vec<(Role, Tensor)> {
        self.adapter().parameters()
    }

    fn delta(&self, base: &BaseLinear, cx: &Context) -> candle_core::Result<Option<Tensor>> {
        self.adapter().delta(base, cx)
    }

    fn as_any(&self) -> &dyn Any {
        self.adapter().as_any()
    }
}

impl Taps {
    /// Installs a tap on every active adapter. Predictions do not change.
    ///
    /// # Errors
    /// If the model has no active LoRA or MonteCLoRA adapter, an active adapter is of another method (LoRA-FA
    /// included, since its A is not a parameter), or a layer is merged. The model is then unchanged.
    pub fn install(model: &mut dyn AdaptableModel) -> Result<Self> {
        let mut layers = Vec::new();
        model.visit_linears(&mut |layer| {
            let Some((name, adapter)) = layer.active() else { return Ok(()) };
            let any = adapter.as_any();
            let pair = any.downcast_ref().map(Lora::low_rank);
            let pair = pair.or_else(|| any.downcast_ref().map(MonteCLoRA::low_rank));
            // LoRA-FA downcasts to `Lora` too, but has no A among its parameters.
            let is_whole = adapter.parameters().iter().any(|(role, _)| *role == Role::A);
            let Some(pair) = pair.filter(|_| is_whole) else {
                return Err(other_method(layer, name, "LoRA or MonteCLoRA"));
            };
            layer.check_unmerged()?;
            layers.push(Tapped {
                path: layer.path().to_string(),
                adapter: name.to_string(),
                pair: pair.clone(),
                recording: Arc::default(),
            });
            Ok(())
        })?;
        if layers.is_empty() {
            return Err(no_active("LoRA or MonteCLoRA"));
        }
        let taps = Self { layers };
        taps.exchange(model, true)?;
        Ok(taps)
    }

    /// The paths of the tapped layers, in the order of the model.
    pub(super) fn paths(&self) -> impl ExactSizeIterator<Item = &str> {
        self.layers.iter().map(|layer| layer.path.as_str())
    }

    /// The ranks of the tapped adapters, in the order of the model.
    pub(super) fn ranks(&self) -> impl Iterator<Item = usize> + '_ {
        self.layers.iter().map(|layer| layer.pair.a().dims()[0])
    }

    /// The Frobenius norms of A and of s B of every layer, in the order of the model.
    pub(super) fn norms(&self) -> Result<Vec<[f64; 2]>> {
        let norm = |tensor: &Tensor| -> Result<f64> { Ok(ops::sum_of_squares(tensor)?.sqrt()) };
        let of_layer = |Tapped { pair, .. }: &Tapped| Ok([norm(pair.a())?, pair.scale() * norm(pair.b())?]);
        self.layers.iter().map(of_layer).collect()
    }

    /// Removes the taps.
    ///
    /// # Errors
    /// If an adapter is no longer there, or its layer has been merged since.
    pub fn remove(self, model: &mut dyn AdaptableModel) -> Result<()> {
        self.exchange(model, false)
    }

    /// Replaces the adapters by tapped ones if `tapped`, and otherwise the tapped adapters by the originals.
    fn exchange(&self, model: &mut dyn AdaptableModel, tapped: bool) -> Result<()> {
        model.visit_linears_mut(&mut |layer| {
            let here = self.layers.iter().find(|tapped| tapped.path == layer.path());
            let Some(Tapped { adapter: name, pair, recording, .. }) = here else { return Ok(()) };
            let reason = format!("{} has no tap on {name:?} any more", layer.path());
            let gone = || Error::config("adapter", reason.clone());
            // The tapped adapter was replaced since: leave the new one alone.
            if lock(recording).holds == tapped {
                return Err(gone());
            }
            let active = layer.active().map(|(name, _)| name.to_string());
            let there = layer.remove(name)?;
            let adapter: Option<Box<dyn Adapter>> = if tapped {
                lock(recording).holds = true;
                Some(Box::new(TappedAdapter {
                    adapter: there,
                    pair: pair.clone(),
                    recording: recording.clone(),
                }))
            } else {
                drop(there);
                lock(recording).freed.take()
            };
            layer.add(name, adapter.ok_or_else(gone)?)?;
            layer.activate(active.as_deref())
        })
    }

    /// The uncertain tensors, those of `maps` of every layer, with their names.
    pub(in crate::bayes) fn parameters(&self, maps: Maps) -> Vec<(String, Tensor)> {
        let of_layer = |layer: &Tapped| {
            let name = |role: &str| format!("{}.{}.{role}", layer.path, layer.adapter);
            let b = (maps == Maps::Both).then(|| (name("b"), layer.pair.b().clone()));
            [Some((name("a"), layer.pair.a().clone())), b]
        };
        self.layers.iter().flat_map(of_layer).flatten().collect()
    }

    /// Records one batch: the outputs, and the inputs and output gradients of the `maps` of every layer. `None` if
    /// a layer sees what examples share, so that each has to be recorded by itself.
    pub(in crate::bayes) fn record(
        &self,
        model: &dyn Predictor,
        batch: &Batch,
        maps: Maps,
        wanted: Wanted,
    ) -> Result<Option<BatchRecord>> {
        self.start(maps);
        let outputs = model.predict(batch, &Pass::Mean.into());
        let passes = self.finish();
        let outputs = outputs?;
        let (_, classes) = outputs.dims2()?;
        let places = Places::new(batch)?;
        let mut tapped = Vec::new();
        for (layer, mut passes) in self.layers.iter().zip(passes) {
            let (Some(TappedPass(maps)), true) = (passes.pop(), passes.is_empty()) else {
                let reason = "a forward pass has to use the layer exactly once";
                return Err(Error::config("laplace", format!("{}: {reason}", layer.path)));
            };
            tapped.extend(maps.into_iter().map(|map| (layer, map)));
        }
        let records = tapped.iter().map(|(_, (inputs, _))| LayerRecord::new(inputs, &places));
        let Some(mut records) = records.collect::<Result<Option<Vec<_>>>>()? else { return Ok(None) };
        let last = classes.saturating_sub(1);
        let differentiated = if wanted == Wanted::Curvature { last } else { classes };
        for class in 0..differentiated {
            let mut output = outputs.narrow(1, class, 1)?;
            if wanted == Wanted::Curvature {
                output = (output - outputs.narrow(1, last, 1)?)?;
            }
            let grads = output.sum_all()?.backward()?;
            for (record, (layer, (_, tap))) in records.iter_mut().zip(&tapped) {
                let Some(grad) = grads.get(tap) else {
                    let reason = "no gradient reaches the layer (gradient checkpointing must be off)";
                    return Err(Error::config("laplace", format!("{}: {reason}", layer.path)));
                };
                // The output of a layer is laid out as its input is.
                record.gradients.extend(places.per_example(&grad.detach())?);
            }
        }
        BatchRecord::new(&outputs, records).map(Some)
    }

    /// Starts to record the passes of this thread.
    fn start(&self, maps: Maps) {
        for layer in &self.layers {
            let passes = Passes { maps, seen: Vec::new() };
            lock(&layer.recording).threads.insert(thread::current().id(), passes);
        }
    }

    /// Ends what [`Self::start`] started, and returns the passes of each layer.
    fn finish(&self) -> Vec<Vec<TappedPass>> {
        let passes = |layer: &Tapped| lock(&layer.recording).threads.remove(&thread::current().id());
        self.layers.iter().map(|layer| passes(layer).map(|passes| passes.seen).unwrap_or_default()).collect()
    }
}
