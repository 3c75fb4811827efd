//! The tasks that a language model is measured on in a study, and how their results are recorded.

use std::collections::BTreeMap;

use super::cell::TaskResult;
use super::rows::CellRows;
use super::treatments::{not_finite, reliability};
use crate::bayes::Temperature;
use crate::data::causal::PromptEncoder;
use crate::data::instruct::Prompted;
use crate::error::{Error, Result};
use crate::eval::{score_choices, Benchmark, ChoiceScores, Generator, Normalize};
use crate::metrics::Metrics;
use crate::models::causal::CausalLm;
use crate::models::generate::{GenerateConfig, PosteriorWeights};
use crate::train::held_out_loss;

/// The number of rows scored, or prompts continued, per batch.
const BATCH: usize = 16;
/// The logit of a choice that a question does not have: its probability is zero at any temperature.
const ABSENT: f64 = -1e30;

/// A task that a language model is measured on.
#[derive(Debug, Clone)]
pub struct EvaluatedTask {
    /// The task's name.
    pub name: String,
    /// How the task is measured.
    pub benchmark: Benchmark,
    /// The task's rows.
    pub rows: Vec<Prompted>,
    /// The generation settings; weights, seed and stop tokens come from the cell.
    pub generation: GenerateConfig,
}

impl EvaluatedTask {
    /// The primary metric of every task: the fraction of correct rows.
    pub(super) const METRIC: &'static str = "accuracy";

    /// The names of the task in reports, each with the figure of the benchmark that is its accuracy. A
    /// benchmark with several figures counts as several tasks: `gsm8k-strict_match`,
    /// `gsm8k-flexible_extract`, `humaneval-pass@2`.
    fn figures(&self) -> Vec<(String, String)> {
        let of = |figure: String| (format!("{}-{figure}", self.name), figure);
        match &self.benchmark {
            Benchmark::Choice(_) | Benchmark::ChoiceByName => {
                vec![(self.name.clone(), Self::METRIC.to_string())]
            }
            Benchmark::Gsm8k => ["strict_match", "flexible_extract"].map(|name| of(name.to_string())).into(),
            Benchmark::Code { ks, .. } => ks.iter().map(|k| of(format!("pass@{k}"))).collect(),
        }
    }

    /// The task's entries in a result before anything is measured.
    pub(super) fn begun(&self) -> Vec<(String, TaskResult)> {
        let empty = TaskResult { metric: Self::METRIC.to_string(), ..TaskResult::default() };
        self.figures().into_iter().map(|(name, _)| (name, empty.clone())).collect()
    }

    /// Checks that every row can be measured.
    ///
    /// # Errors
    /// As [`Benchmark::check`].
    pub(super) fn check(&self, model: &dyn CausalLm, encoder: &PromptEncoder) -> Result<()> {
        let config = self.generation.clone();
        self.benchmark.check(&Generator { model, encoder, config, batch_size: BATCH }, &self.rows)
    }
}

/// Measures the ways to predict with a trained model, task by task.
pub(super) struct TaskArms<'a> {
    pub model: &'a dyn CausalLm,
    pub encoder: &'a PromptEncoder,
    /// The tokens that end a text.
    pub stop: Vec<u32>,
    pub seed: u64,
    pub found: &'a mut BTreeMap<String, TaskResult>,
    /// The probabilities of every row, from multiple choice by likelihood.
    pub rows: &'a mut CellRows,
}

impl TaskArms<'_> {
    /// Measures the model with these weights. Multiple choice by likelihood gives accuracy, NLL, calibration
    /// and Brier score over the choices. Generated texts give the accuracy and, for GSM8K and code, the mean
    /// NLL per token of the reference answers, stored with the benchmark's first figure.
    ///
    /// # Errors
    /// If a forward pass fails, or a prediction is not finite.
    pub fn add(&mut self, treatment: &str, tasks: &[EvaluatedTask], weights: PosteriorWeights) -> Result<()> {
        for task in tasks {
            if let Benchmark::Choice(normalize) = &task.benchmark {
                let scores = self.scores(&task.rows, *normalize, weights)?;
                self.add_choices(treatment, task, &scores.probabilities, &scores.correct)?;
                continue;
            }
            let (stop, seed) = (self.stop.clone(), self.seed);
            let config = GenerateConfig { stop, seed, weights, ..task.generation.clone() };
            let generator = Generator { model: self.model, encoder: self.encoder, config, batch_size: BATCH };
            let nll = match &task.benchmark {
                Benchmark::Choice(_) | Benchmark::ChoiceByName => None,
                Benchmark::Gsm8k | Benchmark::Code { .. } => Some(self.answer_loss(&task.rows, weights)?),
            };
            let values = task.benchmark.run(&generator, &task.rows)?;
            for (place, (name, figure)) in task.figures().into_iter().enumerate() {
                // Store the NLL of the answers once, however many figures there are.
                let nll = nll.filter(|_| place == 0);
                let metrics = Metrics { accuracy: values.get(&figure).copied(), nll, ..Metrics::default() };
                self.found.entry(name).or_default().arms.insert(treatment.to_string(), metrics);
            }
        }
        Ok(())
    }

    /// Measures the mean prediction of multiple choice by likelihood, at the temperature that makes the right
    /// choices of `held_out` most likely.
    ///
    /// # Errors
    /// As [`Self::add`], and if a held-out row has no choices.
    pub fn add_temperature(
        &mut self,
        treatment: &str,
        tasks: &[EvaluatedTask],
        held_out: &[Prompted],
    ) -> Result<()> {
        let mut fitted: Option<(Normalize, Temperature)> = None;
        for task in tasks {
            let Benchmark::Choice(normalize) = &task.benchmark else { continue };
            let temperature = match fitted {
                Some((same, temperature)) if same == *normalize => temperature,
                _ => {
                    let scores = self.scores(held_out, *normalize, PosteriorWeights::Mean)?;
                    let logits = logits(&scores, held_out);
                    Temperature::fit(&logits, &scores.correct).map_err(not_finite)?
                }
            };
            fitted = Some((*normalize, temperature));
            let scores = self.scores(&task.rows, *normalize, PosteriorWeights::Mean)?;
            let probabilities = temperature.probabilities(&logits(&scores, &task.rows));
            self.add_choices(treatment, task, &probabilities, &scores.correct)?;
        }
        Ok(())
    }

    /// The mean NLL per token of the reference answers.
    fn answer_loss(&self, rows: &[Prompted], weights: PosteriorWeights) -> Result<f64> {
        let answers = self.encoder.encode(rows)?.rows;
        let loss = held_out_loss(self.model, &answers, BATCH, &weights.passes())?;
        if loss.is_nan() {
            return Err(not_finite(Error::config("loss", "the loss of the reference answers is NaN")));
        }
        Ok(loss)
    }

    fn scores(
        &self,
        rows: &[Prompted],
        normalize: Normalize,
        weights: PosteriorWeights,
    ) -> Result<ChoiceScores> {
        score_choices(self.model, self.encoder, rows, BATCH, normalize, &weights.passes())
    }

    fn add_choices(
        &mut self,
        treatment: &str,
        task: &EvaluatedTask,
        probabilities: &[Vec<f64>],
        correct: &[u32],
    ) -> Result<()> {
        let metrics = Metrics::classification(probabilities, correct).map_err(not_finite)?;
        let found = self.found.entry(task.name.clone()).or_default();
        found.arms.insert(treatment.to_string(), metrics);
        found.reliability.insert(treatment.to_string(), reliability(probabilities, correct));
        let rows = self.rows.tasks.entry(task.name.clone()).or_default();
        rows.row = (0..correct.len() as u32).collect();
        rows.label = correct.to_vec();
        rows.add(treatment, probabilities);
        Ok(())
    }
}

/// The logits of the choices of every question, up to a constant per question.
fn logits(scores: &ChoiceScores, rows: &[Prompted]) -> Vec<Vec<f64>> {
    let row = |(probabilities, row): (&Vec<f64>, &Prompted)| {
        let own = row.choices.as_ref().map_or(0, |choices| choices.names.len());
        let logit = |(i, p): (usize, &f64)| if i < own { p.max(f64::MIN_POSITIVE).ln() } else { ABSENT };
        probabilities.iter().enumerate().map(logit).collect()
    };
    scores.probabilities.iter().zip(rows).map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::instruct::Choices;

    #[test]
    fn a_choice_that_a_question_lacks_stays_impossible_at_any_temperature() -> Result<()> {
        let of = |count: usize| Prompted {
            choices: Some(Choices {
                names: vec!["a".to_string(); count],
                answers: vec!["a".to_string(); count],
                correct: 0,
            }),
            ..Prompted::default()
        };
        let rows = [of(2), of(3)];
        let probabilities = vec![vec![0.9, 0.1, 0.0], vec![0.5, 0.5, 0.0]];
        let scores = ChoiceScores { probabilities: probabilities.clone(), correct: vec![1, 0] };
        let logits = logits(&scores, &rows);
        let same = Temperature::new(1.0)?.probabilities(&logits);
        for (got, want) in same.iter().flatten().zip(probabilities.iter().flatten()) {
            assert!((got - want).abs() < 1e-12, "{same:?}");
        }
        let warm = Temperature::fit(&logits, &scores.correct)?;
        let warm = warm.probabilities(&logits);
        // The second question has a third choice, but with probability 0 in the scores.
        assert!(warm[0][2] == 0.0 && warm[1][2] > 0.0 && warm[1][2] < 1e-2, "{warm:?}");
        assert!(warm[0][1] > 0.1 && warm[0][0] > warm[0][1]);
        Ok(())
    }
}
