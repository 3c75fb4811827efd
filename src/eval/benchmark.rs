//! A benchmark over the rows of a data set, by one call.

use std::collections::BTreeMap;

use super::choice::{self, chosen_by_name, score_choices, Normalize};
use super::extract::CodeAnswer;
use super::generated::Generator;
use super::sandbox::Sandbox;
use super::{code, gsm8k};
use crate::data::instruct::Prompted;
use crate::error::{Error, Result};
use crate::models::generate::{GenerateConfig, Sampling};

/// What a language model is measured by.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Benchmark {
    /// Multiple choice by the likelihood of each answer: `accuracy`, `nll`, `ece`, `brier`.
    Choice(Normalize),
    /// Multiple choice by the name that a generated text says first: `accuracy`, and `answered`, the
    /// share of texts that say any.
    ChoiceByName,
    /// GSM8K: `strict_match` and `flexible_extract`. The question alone is given; the LM evaluation
    /// harness shows five answered ones before it and generates up to 256 tokens.
    Gsm8k,
    /// HumanEval: `pass@k` for each k. It runs what the model wrote. Several completions of a row want
    /// sampling, or they are all the same.
    Code {
        /// Completions of each row.
        samples: usize,
        /// The k's.
        ks: Vec<usize>,
        /// What of a generated text is the program.
        answer: CodeAnswer,
        /// Where they run.
        sandbox: Sandbox,
    },
}

impl Benchmark {
    /// The figures over all rows, by name. Likelihoods are those of the generator's weights.
    ///
    /// # Errors
    /// If there is no row, a row lacks what the benchmark asks for (the error counts from 1), or
    /// generation fails.
    pub fn run(&self, generator: &Generator, rows: &[Prompted]) -> Result<BTreeMap<String, f64>> {
        self.check(generator, rows)?;
        let prompts: Vec<&str> = rows.iter().map(|row| row.prompt.as_str()).collect();
        let figures = match self {
            Self::Choice(normalize) => {
                let Generator { model, encoder, config, batch_size } = generator;
                let passes = config.weights.passes();
                let scores = score_choices(*model, encoder, rows, *batch_size, *normalize, &passes)?;
                let metrics = scores.evaluate()?;
                let named = ["accuracy", "nll", "ece", "brier"].map(|name| (name, metrics.get(name)));
                named.into_iter().filter_map(|(name, value)| Some((name.to_string(), value?))).collect()
            }
            Self::ChoiceByName => {
                let texts = generator.texts(&prompts, &[])?;
                let named = |(text, row): (&String, &Prompted)| {
                    let choices = row.choices.as_ref()?;
                    chosen_by_name(text, &choices.names).map(|chosen| chosen == choices.correct)
                };
                let verdicts: Vec<bool> = texts.iter().zip(rows).filter_map(named).collect();
                let right = verdicts.iter().filter(|right| **right).count();
                shares([("accuracy", right), ("answered", verdicts.len())], rows.len())
            }
            Self::Gsm8k => {
                let texts = generator.texts(&prompts, &gsm8k::STOP)?;
                let pairs = texts.iter().zip(rows).map(|(text, row)| (text.as_str(), row.answer.as_str()));
                let (strict, flexible) = gsm8k::accuracy(pairs).unwrap_or_default();
                [("strict_match", strict), ("flexible_extract", flexible)]
                    .map(|(name, value)| (name.to_string(), value))
                    .into()
            }
            Self::Code { samples, ks, answer, sandbox } => {
                let mut programs = vec![Vec::with_capacity(*samples); rows.len()];
                for sample in 0..*samples {
                    let first_row = generator.config.first_row.wrapping_add((sample * rows.len()) as u64);
                    let config = GenerateConfig { first_row, ..generator.config.clone() };
                    let texts = Generator { config, ..*generator }.texts(&prompts, answer.stop())?;
                    for (i, ((group, text), row)) in programs.iter_mut().zip(texts).zip(rows).enumerate() {
                        group.push(answer.program(&row.prompt, &text, &row.tests(i)?.entry_point));
                    }
                }
                let rates = code::program_pass_rates(rows, &programs, ks, sandbox)?;
                ks.iter().zip(rates).map(|(k, rate)| (format!("pass@{k}"), rate)).collect()
            }
        };
        Ok(figures)
    }

    /// Whether every row has what it is measured by: worth a call before an hour of training.
    ///
    /// # Errors
    /// As [`Self::run`], save what generation meets.
    pub fn check(&self, generator: &Generator, rows: &[Prompted]) -> Result<()> {
        if rows.is_empty() {
            return Err(Error::config("data", "there is no row to measure by"));
        }
        if let Self::Choice(_) = self {
            choice::check(generator.encoder, rows)?;
        }
        for (i, row) in rows.iter().enumerate() {
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

/// Counts as shares of a total.
fn shares<const N: usize>(counts: [(&str, usize); N], total: usize) -> BTreeMap<String, f64> {
    counts.map(|(name, count)| (name.to_string(), count as f64 / total as f64)).into()
}
