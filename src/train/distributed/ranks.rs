//! The training loop's view of several processes: who computes what, sums, and agreement.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::DType;
use serde::de::DeserializeOwned;
use serde::Serialize;

use super::communicator::Communicator;
use super::failure::Failure;
use crate::adapter::Params;
use crate::error::{Error, Result};
use crate::optim::Gradients;
use crate::train::checkpoint::State;
use crate::train::settings::{fingerprint, Settings};
use crate::train::step::StepGradients;

/// The processes of a run.
#[derive(Debug)]
pub(in crate::train) struct Ranks<'a> {
    communicator: &'a dyn Communicator,
    /// The names of the loss's terms in the order of the sum, once rank 0 has sent them.
    terms: Option<Vec<String>>,
    /// The names of this process's terms; empty before its first micro-batch.
    own_terms: Vec<&'static str>,
    /// An error of this process since the last sum, deferred until the next.
    pending: Option<Error>,
}

impl<'a> Ranks<'a> {
    pub fn new(communicator: &'a dyn Communicator) -> Self {
        Self { communicator, terms: None, own_terms: Vec::new(), pending: None }
    }

    /// Whether there is more than one process.
    pub fn are_several(&self) -> bool {
        self.communicator.world() > 1
    }

    /// Whether this process writes files.
    pub fn is_first(&self) -> bool {
        self.communicator.rank() == 0
    }

    /// Whether this process computes micro-batch `index` of a step.
    pub fn takes(&self, index: usize) -> bool {
        index % self.communicator.world() == self.communicator.rank()
    }

    /// Checks that all processes have the same settings and initial parameters.
    ///
    /// # Errors
    /// If a process differs; the error names it.
    pub fn check_same(&self, settings: &Settings, params: &Params) -> Result<()> {
        if !self.are_several() {
            return Ok(());
        }
        let mut numbers = Vec::new();
        for (_, param) in params.all() {
            let values =
                param.var.as_detached_tensor().flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
            numbers.extend(values.into_iter().map(f32::to_bits));
        }
        let own = (settings.clone(), fingerprint(numbers));
        let mut all: Vec<(Settings, String)> = Vec::new();
        for root in 0..self.communicator.world() {
            all.push(self.broadcast_json(&own, root)?);
        }
        let first = &all[0];
        for (rank, (theirs, values)) in all.iter().enumerate() {
            let names = first.0.keys().chain(theirs.keys());
            if let Some(name) = names.into_iter().find(|name| theirs.get(*name) != first.0.get(*name)) {
                let of =
                    |settings: &Settings| settings.get(name).cloned().unwrap_or_else(|| "nothing".into());
                let reason = format!("rank {rank} has {}, rank 0 has {}", of(theirs), of(&first.0));
                return Err(Error::config(name, reason));
            }
            if *values != first.1 {
                let reason = format!("the initial parameters of rank {rank} differ from those of rank 0");
                return Err(Error::config("parameters", reason));
            }
        }
        Ok(())
    }

    /// Defers an error of this process until the next sum, which tells the other processes: they must not
    /// wait for a process that has ended. A single process returns it at once.
    ///
    /// # Errors
    /// In a single process, the error of `outcome`.
    pub fn hold(&mut self, outcome: Result<()>) -> Result<()> {
        match outcome {
            Err(error) if self.are_several() => {
                self.pending.get_or_insert(error);
                Ok(())
            }
            outcome => outcome,
        }
    }

    /// Whether no error is deferred by [`Self::hold`].
    pub fn is_well(&self) -> bool {
        self.pending.is_none()
    }

    /// Returns the error deferred by [`Self::hold`], if any.
    ///
    /// # Errors
    /// The deferred error.
    pub fn held(&mut self) -> Result<()> {
        self.pending.take().map_or(Ok(()), Err)
    }

    /// Returns rank 0's value on all processes. An error of another rank is deferred.
    ///
    /// # Errors
    /// Rank 0's error, on all processes.
    pub fn of_first<T: Serialize + DeserializeOwned>(&mut self, outcome: Result<T>) -> Result<T> {
        if !self.are_several() {
            return outcome;
        }
        let told: std::result::Result<&T, Failure> = outcome.as_ref().map_err(Failure::from);
        let said: std::result::Result<T, Failure> = self.broadcast_json(&told, 0)?;
        match (outcome, said) {
            (Err(error), Err(_)) if self.is_first() => Err(error),
            (_, Err(failure)) => Err(failure.into_error(0)),
            (outcome, Ok(value)) => {
                self.hold(outcome.map(drop))?;
                Ok(value)
            }
        }
    }

    /// Returns the checkpoint that rank 0 has found on all processes.
    ///
    /// # Errors
    /// Rank 0's error, on all processes.
    pub fn state_of_first(&mut self, found: Result<Option<State>>) -> Result<Option<State>> {
        if !self.are_several() {
            return found;
        }
        let mut tensors = Vec::new();
        let numbers = found.and_then(|found| {
            found
                .map(|state| {
                    tensors = state.tensor_bytes()?;
                    Ok(state.run_state)
                })
                .transpose()
        });
        let Some(run_state) = self.of_first(numbers)? else { return Ok(None) };
        let tensors = self.communicator.broadcast(tensors, 0)?;
        State::of_tensor_bytes(run_state, &tensors, Path::new("rank 0's checkpoint")).map(Some)
    }

    /// Sums a step's results over all processes in one exchange, and returns whether any of them was asked to
    /// stop.
    ///
    /// # Errors
    /// The error of the first process that has one, on all processes. Errors that end the run take
    /// precedence.
    pub fn sum(
        &mut self,
        params: &Params,
        outcome: Result<StepGradients>,
        stop: bool,
    ) -> Result<(StepGradients, bool)> {
        if !self.are_several() {
            return Ok((outcome?, stop));
        }
        let outcome = self.agree_on_terms(outcome)?;
        let (rank, world) = (self.communicator.rank(), self.communicator.world());
        let names = self.terms.clone().unwrap_or_default();
        let mut scalars = vec![0f64; 1 + names.len() + 1 + world]; // loss, terms, stop, failures by rank
        let (stop_at, failed_at) = (1 + names.len(), 2 + names.len());
        scalars[stop_at] = f64::from(u8::from(stop));
        let empty = Gradients::new();
        let grads = match &outcome {
            Ok(group) => {
                scalars[0] = group.loss;
                for (name, value) in &group.terms {
                    if let Some(at) = names.iter().position(|known| known == name) {
                        scalars[1 + at] = *value;
                    }
                }
                &group.grads
            }
            // 2: ends the run, and takes precedence over 1, a step that may be skipped.
            Err(error) => {
                scalars[failed_at + rank] = if matches!(error, Error::NonFinite { .. }) { 1.0 } else { 2.0 };
                &empty
            }
        };
        let flat = grads.flat(params, &scalars)?;
        let sums = self.communicator.all_reduce_sum(&flat)?;
        let (grads, scalars) = Gradients::of_flat(params, &sums)?;
        let worst = scalars[failed_at..].iter().copied().fold(0.0, f64::max);
        if let Some(failed) = (0..world).find(|rank| worst > 0.0 && scalars[failed_at + rank] == worst) {
            let failure = outcome.as_ref().err().map(Failure::from);
            let failure: Option<Failure> = self.broadcast_json(&failure, failed)?;
            return Err(match (outcome, failure) {
                (Err(error), _) if rank == failed => error,
                (_, Some(failure)) => failure.into_error(failed),
                (_, None) => {
                    Error::Distributed { rank: failed, reason: "it failed without a message".into() }
                }
            });
        }
        let terms = names.iter().zip(&scalars[1..stop_at]);
        let own = |name: &String| self.own_terms.iter().copied().find(|own| own == name);
        let terms: BTreeMap<_, _> = terms.filter_map(|(name, value)| Some((own(name)?, *value))).collect();
        Ok((StepGradients { grads, loss: scalars[0], terms }, scalars[stop_at] > 0.0))
    }

    /// Waits until all processes have reached the end of the run without an error.
    ///
    /// # Errors
    /// As [`Self::sum`].
    pub fn finish(&mut self, params: &Params) -> Result<()> {
        if !self.are_several() {
            return Ok(());
        }
        let nothing = StepGradients { grads: Gradients::new(), loss: 0.0, terms: BTreeMap::new() };
        let outcome = self.held().map(|()| nothing);
        self.sum(params, outcome, false).map(drop)
    }

    /// Broadcasts the names of the loss's terms once from rank 0, which has a micro-batch of every step.
    fn agree_on_terms(&mut self, outcome: Result<StepGradients>) -> Result<Result<StepGradients>> {
        if let Ok(group) = &outcome {
            if self.own_terms.is_empty() {
                self.own_terms = group.terms.keys().copied().collect();
            }
        }
        if self.terms.is_none() {
            let own = outcome.as_ref().ok().map(|group| group.terms.keys().copied().collect::<Vec<_>>());
            self.terms = self.broadcast_json(&own, 0)?;
        }
        let Ok(group) = &outcome else { return Ok(outcome) };
        let known = |name: &&str| self.terms.iter().flatten().any(|known| known == name);
        match group.terms.keys().find(|name| !known(name)) {
            Some(name) if self.terms.is_some() => {
                let reason = format!("the loss has a term {name:?}, which the loss of rank 0 lacks");
                Ok(Err(Error::config("objective", reason)))
            }
            _ => Ok(outcome),
        }
    }

    /// Returns the value of process `root`, sent as JSON.
    fn broadcast_json<T: DeserializeOwned>(&self, value: &impl Serialize, root: usize) -> Result<T> {
        let malformed =
            |error: serde_json::Error| Error::Distributed { rank: root, reason: error.to_string() };
        let own = if self.communicator.rank() == root {
            serde_json::to_vec(value).map_err(malformed)?
        } else {
            Vec::new()
        };
        serde_json::from_slice(&self.communicator.broadcast(own, root)?).map_err(malformed)
    }
}
