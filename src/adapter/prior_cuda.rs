//! The energy of a prior on a CUDA device: a few kernel launches for all layers, differentiated by a tape.

use candle_core::Tensor;

use super::low_rank::LowRank;
use super::prior::{started, Prior, PriorForm, PriorStart};
use crate::error::Result;
use crate::kernels::energy::{energy, Distance, LowRankUpdate, Spread};
use crate::kernels::multi_tensor::supports;
use crate::ops::Tape;

impl Prior {
    /// Computes the energy of all adapted layers, with the perturbations of those that have one, and of the
    /// task head: a scalar whose gradient `tape` computes. Returns `None` if the kernels do not support the
    /// tensors: they need single precision on one device.
    ///
    /// # Errors
    /// If the start of training is needed and missing, or the device fails.
    pub(crate) fn energy_on_device(
        &self,
        layers: Vec<(&LowRank, Option<Spread>)>,
        start: Option<&PriorStart>,
        tape: &Tape,
    ) -> Result<Option<Tensor>> {
        let share = if self.shared { (layers.len() as f64).sqrt().recip() } else { 1.0 };
        let precision = |std: f64| (std * share).powi(-2);
        let (mut distances, mut updates) = (Vec::new(), Vec::new());
        for (pair, spread) in layers {
            let mut distance = |of: &Tensor, from: Option<&Tensor>, std: f64| {
                distances.push(Distance { at: of.clone(), from: from.cloned(), weight: precision(std) });
            };
            match self.form {
                PriorForm::Mean { std } => distance(pair.a(), None, std),
                PriorForm::Start { std } => distance(pair.a(), Some(started(start)?.of(pair)?), std),
                PriorForm::Factors { std_a, std_b } => {
                    distance(pair.a(), Some(started(start)?.of(pair)?), std_a);
                    distance(pair.b(), None, std_b);
                }
                PriorForm::Update { std } | PriorForm::ExpectedUpdate { std } => {
                    let spread = spread.filter(|_| matches!(self.form, PriorForm::ExpectedUpdate { .. }));
                    let weight = pair.scale().powi(2) * precision(std);
                    updates.push(LowRankUpdate { a: pair.a().clone(), b: pair.b().clone(), weight, spread });
                }
            }
        }
        if let Some(std) = self.head_std {
            for (weight, from) in started(start)?.head() {
                let precision = weight.dims2()?.1 as f64 / (std * std);
                distances.push(Distance { at: weight.clone(), from: Some(from.clone()), weight: precision });
            }
        }
        if !serve(&distances, &updates) {
            return Ok(None);
        }
        let (total, energy) = energy(distances, updates)?;
        let leaves = tape.cut(vec![total], move |grads| match grads.into_iter().next() {
            Some(Some(grad)) => energy.gradients(&grad),
            _ => Ok(Vec::new()),
        })?;
        Ok(leaves.into_iter().next())
    }
}

/// Whether the kernels support all tensors, and these are on one device.
fn serve(distances: &[Distance], updates: &[LowRankUpdate]) -> bool {
    let distances = distances.iter().flat_map(|Distance { at, from, .. }| [Some(at), from.as_ref()]);
    let updates = updates.iter().flat_map(|LowRankUpdate { a, b, spread, .. }| {
        let c = spread.as_ref().and_then(|spread| spread.c.as_ref());
        [Some(a), Some(b), spread.as_ref().map(|spread| &spread.rho), c]
    });
    let mut all = distances.chain(updates).flatten().peekable();
    let Some(first) = all.peek().copied() else { return false };
    all.all(|tensor| supports(tensor) && tensor.device().same_device(first.device()))
}
