//! The state of a run for a checkpoint, and back.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::{Best, Run};
use crate::error::{Error, Result};
use crate::train::checkpoint::{RunState, State, SCORE};
use crate::train::settings::Settings;

impl Run<'_> {
    /// Returns the state for a checkpoint. Tensors are not copied, as it is written before the next step.
    pub(super) fn state(&self) -> Result<State> {
        let params: BTreeMap<String, Tensor> = self
            .params
            .all()
            .into_iter()
            .map(|(name, param)| (name, param.var.as_detached_tensor()))
            .collect();
        let moments = self.optimizer.remembered().clone();
        let best = self.best.as_ref();
        Ok(State {
            run_state: RunState {
                seconds: self.seconds_so_far(),
                best: best.map(|best| (best.score, best.step)),
                moments: moments.iter().map(|(name, of)| (name.clone(), of.steps)).collect(),
                settings: self.settings.clone(),
                ..self.at.clone()
            },
            params,
            moments,
            // If the best step is the present one, `params` already has its values.
            best: best
                .filter(|best| best.step < self.at.step)
                .map(|best| best.values.clone())
                .unwrap_or_default(),
            method: self.objective.state()?,
        })
    }

    /// Resumes from a checkpoint. If its scores cannot be compared with those to come, the best step and the
    /// count of patience start anew; the returned warning says so.
    pub(super) fn resume(&mut self, state: State) -> Result<Option<String>> {
        let State { mut run_state, params, moments, best, method } = state;
        if run_state.step > self.total {
            let reason =
                format!("the checkpoint is of step {}, the run ends with {}", run_state.step, self.total);
            let option = if self.config.max_steps == Some(self.total) { "max_steps" } else { "epochs" };
            return Err(Error::config(option, reason));
        }
        let forgotten = forget_scores(&mut run_state, &self.settings);
        let present = self.params.all();
        if let Some((name, _)) = present.iter().find(|(name, _)| !params.contains_key(name)) {
            return Err(Error::tensor(name, "the checkpoint does not hold this parameter"));
        }
        if let Some(name) = params.keys().find(|name| self.params.get(name).is_none()) {
            return Err(Error::tensor(name, "the checkpoint holds this parameter, the model does not"));
        }
        self.params.restore(&params)?;
        if !moments.is_empty() {
            self.optimizer.restore(&moments)?;
        }
        self.objective.restore(&method)?;
        self.best = run_state.best.map(|(score, step)| {
            let values = if step == run_state.step { params } else { best };
            Best { score, step, values }
        });
        self.at = run_state;
        Ok(forgotten)
    }
}

/// Forgets the scores of a checkpoint if one of the settings that they depend on differs now; returns a
/// warning then.
fn forget_scores(state: &mut RunState, now: &Settings) -> Option<String> {
    let changed = SCORE.iter().copied().filter(|name| state.settings.get(*name) != now.get(*name));
    let changed: Vec<&str> = changed.collect();
    if changed.is_empty() || (state.best.is_none() && state.waited == 0) {
        return None;
    }
    (state.best, state.waited) = (None, 0);
    Some(format!(
        "scores from before the change of {} do not compare with later ones: the best step so far is forgotten, \
         and patience counts anew",
        changed.join(" and ")
    ))
}
