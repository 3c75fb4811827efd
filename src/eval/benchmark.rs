//! Benchmarks of language models over the rows of a data set.

use std::collections::BTreeMap;
use std::ops::Range;

use super::choice::{self, chosen_by_name, ChoiceScores, Normalize};
use super::extract::CodeAnswer;
use super::generated::Generator;
use super::sandbox::Sandbox;
use super::{code, gsm8k};
use crate::adapter::DrawCache;
use crate::data::instruct::Prompted;
use crate::error::{Error, Result};
use crate::models::generate::{GenerateConfig, Sampling};
use crate::train::distributed::{in_turns, Communicator, SingleProcess};

/// A benchmark of a language model.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Benchmark {
    /// Multiple choice by the likelihood of each answer: `accuracy`, `nll`, `ece`, `brier`.
    Choice(Normalize),
    /// Multiple choice by the first choice name in a generated text: `accuracy`, and `answered`, the share of
    /// texts that contain a name.
    ChoiceByName,
    /// GSM8K: `strict_match` and `flexible_extract`. The prompt is the question alone; the LM evaluation
    /// harness shows five answered examples before it and generates up to 256 tokens.
    Gsm8k,
    /// HumanEval: `pass@k` for each k. Runs the code that the model wrote. More than one completion per row
    /// needs sampling, as greedy completions are all the same.
    Code {
        /// The number of completions of each row.
        samples: usize,
        /// The values of k.
        ks: Vec<usize>,
        /// Which part of a generated text is the program.
        answer: CodeAnswer,
        /// Runs the programs.
        sandbox: Sandbox,
    },
}

impl Benchmark {
    /// Returns the scores over all rows, by name. Likelihoods are those of the generator's weights.
    ///
    /// # Errors
    /// If there is no row, a row lacks data that the benchmark needs (the error counts rows from 1), or
    /// generation fails.
    pub fn run(&self, generator: &Generator, rows: &[Prompted]) -> Result<BTreeMap<String, f64>> {
        self.run_in_turns(generator, rows, &SingleProcess)
    }

    /// [`Self::run`] divided among several processes, which take batches of rows in turns and all get the scores
    /// over all rows. A batch has as many rows as the generator continues together.
    ///
    /// # Errors
    /// As [`Self::run`]; an error of one process is returned on all.
    pub fn run_in_turns(
        &self,
        generator: &Generator,
        rows: &[Prompted],
        communicator: &dyn Communicator,
    ) -> Result<BTreeMap<String, f64>> {
        self.check(generator, rows)?;
        let (size, draws) = (generator.batch_size, DrawCache::default());
        let parts = in_turns(communicator, rows.len().div_ceil(size), &mut |part| {
            let start = part * size;
            let measured = self.measured(generator, rows, start..rows.len().min(start + size), &draws)?;
            Ok(measured.into_iter().flat_map(|row| [vec![row.len() as f64], row].concat()).collect())
        })?;
        let mut measured = Vec::with_capacity(rows.len());
        for part in &parts {
            let mut rest = part.as_slice();
            while let [length, others @ ..] = rest {
                let (row, others) = others.split_at((*length as usize).min(others.len()));
                measured.push(row);
                rest = others;
            }
        }
        let least = if matches!(self, Self::Code { .. }) { 1 } else { 2 };
        if measured.len() != rows.len() || measured.iter().any(|row| row.len() < least) {
            let reason =
                format!("expected complete results of {} rows, got {} rows", rows.len(), measured.len());
            return Err(Error::config("share", reason));
        }
        self.figures(&measured)
    }

    /// Measures the rows of a part: for each row the numbers that [`Self::figures`] averages.
    fn measured(
        &self,
        generator: &Generator,
        rows: &[Prompted],
        part: Range<usize>,
        draws: &DrawCache,
    ) -> Result<Vec<Vec<f64>>> {
        let (start, total, rows) = (part.start, rows.len(), &rows[part]);
        let prompts: Vec<&str> = rows.iter().map(|row| row.prompt.as_str()).collect();
        let flag = |is: bool| f64::from(u8::from(is));
        match self {
            // The index of the correct choice, then the probability of each choice.
            Self::Choice(normalize) => {
                let Generator { model, encoder, config, batch_size } = generator;
                let passes = config.weights.passes();
                let scores =
                    choice::scores_with(*model, encoder, rows, *batch_size, *normalize, &passes, draws)?;
                let all = scores.correct.into_iter().zip(scores.probabilities);
                Ok(all.map(|(correct, row)| [vec![f64::from(correct)], row].concat()).collect())
            }
            // Whether the text names the correct choice, and whether it names any.
            Self::ChoiceByName => {
                let texts = generator.texts_from(start, &prompts, &[])?;
                let said = |(text, row): (&String, &Prompted)| {
                    let choices = row.choices.as_ref()?;
                    Some((chosen_by_name(text, &choices.names)?, choices.correct))
                };
                let said = texts.iter().zip(rows).map(said);
                Ok(said
                    .map(|said| vec![flag(said.is_some_and(|(a, b)| a == b)), flag(said.is_some())])
                    .collect())
            }
            Self::Gsm8k => {
                let texts = generator.texts_from(start, &prompts, &gsm8k::STOP)?;
                let rights = texts.iter().zip(rows).map(|(text, row)| gsm8k::rights(text, &row.answer));
                Ok(rights.map(|rights| rights.map(flag).to_vec()).collect())
            }
            // The number of programs that pass.
            Self::Code { samples, answer, sandbox, .. } => {
                let mut programs = vec![Vec::with_capacity(*samples); rows.len()];
                for sample in 0..*samples {
                    let first_row = generator.config.first_row.wrapping_add((sample * total) as u64);
                    let config = GenerateConfig { first_row, ..generator.config.clone() };
                    let texts =
                        Generator { config, ..*generator }.texts_from(start, &prompts, answer.stop())?;
                    for (i, ((group, text), row)) in programs.iter_mut().zip(texts).zip(rows).enumerate() {
                        group.push(answer.program(&row.prompt, &text, &row.tests(start + i)?.entry_point));
                    }
                }
                let passing = |(i, (row, programs)): (usize, (&Prompted, &Vec<String>))| {
                    Ok(vec![code::passing(row.tests(start + i)?, programs, sandbox)? as f64])
                };
                rows.iter().zip(&programs).enumerate().map(passing).collect()
            }
        }
    }

    /// Averages the measurements of all rows into the scores.
    fn figures(&self, rows: &[&[f64]]) -> Result<BTreeMap<String, f64>> {
        let mean = |of: &dyn Fn(&[f64]) -> Result<f64>| -> Result<f64> {
            Ok(rows.iter().map(|row| of(row)).sum::<Result<f64>>()? / rows.len() as f64)
        };
        let of_column = |column: usize| mean(&|row| Ok(row[column]));
        let of_columns = |names: [&str; 2]| -> Result<BTreeMap<String, f64>> {
            Ok([(names[0].to_string(), of_column(0)?), (names[1].to_string(), of_column(1)?)].into())
        };
        match self {
            Self::Choice(_) => {
                let width = rows.iter().map(|row| row.len() - 1).max().unwrap_or(0);
                // Pad to the same number of choices for every question.
                let wide = |row: &&[f64]| {
                    let mut probabilities = row[1..].to_vec();
                    probabilities.resize(width, 0.0);
                    probabilities
                };
                let correct = rows.iter().map(|row| row[0] as u32).collect();
                let scores = ChoiceScores { probabilities: rows.iter().map(wide).collect(), correct };
                let metrics = scores.evaluate()?;
                let named = ["accuracy", "nll", "ece", "brier"].map(|name| (name, metrics.get(name)));
                Ok(named.into_iter().filter_map(|(name, value)| Some((name.to_string(), value?))).collect())
            }
            Self::ChoiceByName => of_columns(["accuracy", "answered"]),
            Self::Gsm8k => of_columns(["strict_match", "flexible_extract"]),
            Self::Code { samples, ks, .. } => {
                let rate = |k: &usize| {
                    let rate = mean(&|row| code::pass_at_k(*samples, row[0] as usize, *k))?;
                    Ok((format!("pass@{k}"), rate))
                };
                ks.iter().map(rate).collect()
            }
        }
    }

    /// Checks that every row has the data the benchmark needs and fits into the model. Cheap enough to call
    /// before an hour of training.
    ///
    /// # Errors
    /// As [`Self::run`], except for failures of forward passes and programs.
    pub fn check(&self, generator: &Generator, rows: &[Prompted]) -> Result<()> {
        if rows.is_empty() {
            return Err(Error::config("data", "there is no row to measure by"));
        }
        generator.check()?;
        if let Self::Choice(_) = self {
            choice::check(generator.encoder, rows)?;
        }
        for (i, row) in rows.iter().enumerate() {
            if !matches!(self, Self::Choice(_)) {
                generator.prompt_ids(i, &row.prompt)?;
            }
            match self {
                Self::Choice(_) | Self::ChoiceByName => row.choices(i).map(|_| ())?,
                Self::Gsm8k if !row.answer.contains(gsm8k::MARK) => {
                    let reason = format!("the answer of row {} has no {:?}", i + 1, gsm8k::MARK);
                    return Err(Error::config("data", reason));
                }
                Self::Gsm8k => (),
                Self::Code { .. } => row.tests(i).map(|_| ())?,
            }
        }
        let Self::Code { samples, ks, .. } = self else { return Ok(()) };
        ks.iter().try_for_each(|k| code::pass_at_k(*samples, 0, *k).map(|_| ()))?;
        if *samples > 1 && generator.config.sampling == Sampling::ArgMax {
            let reason = format!("{samples} greedy completions are all the same: give a temperature");
            return Err(Error::config("samples", reason));
        }
        Ok(())
    }
}
