//! Multiple choice by the likelihood of each answer, or by the choice name in a generated text.

use super::likelihood::{likelihoods, Answered};
use crate::adapter::{Context, DrawCache, Pass};
use crate::data::causal::{Encodings, PromptEncoder, Tokens};
use crate::data::instruct::{Choices, Prompted};
use crate::error::{Error, Result};
use crate::metrics::{softmax, Metrics};
use crate::models::causal::CausalLm;
use crate::util::check::at_least_one;

/// What the log-likelihood of an answer is divided by, so that long answers are not at a disadvantage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Normalize {
    /// No division.
    No,
    /// The number of tokens.
    Tokens,
    /// The number of characters, without leading blanks: `acc_norm` of the LM evaluation harness.
    Characters,
    /// The number of bytes, without leading blanks: `acc_bytes` of the harness.
    Bytes,
}

impl Normalize {
    fn length(self, answer: &str, tokens: usize) -> f64 {
        let count = match self {
            Self::No => 1,
            Self::Tokens => tokens,
            Self::Characters => answer.trim_start().chars().count(),
            Self::Bytes => answer.trim_start().len(),
        };
        count as f64
    }
}

/// The probabilities of the choices of all questions.
#[derive(Debug, Clone, PartialEq)]
pub struct ChoiceScores {
    /// For each question one probability per choice, in the order of the instruction. Questions with fewer
    /// choices are padded with 0.
    pub probabilities: Vec<Vec<f64>>,
    /// The index of the correct choice of each question.
    pub correct: Vec<u32>,
}

impl ChoiceScores {
    /// Returns accuracy, NLL, calibration error and Brier score over the choices.
    ///
    /// # Errors
    /// If there is no question, or a probability is NaN.
    pub fn evaluate(&self) -> Result<Metrics> {
        Metrics::classification(&self.probabilities, &self.correct)
    }
}

/// Scores the choices of every question in `rows` by the log-likelihood of each answer after the prompt. Over
/// several passes (posterior draws), the probabilities of the choices are averaged.
///
/// Only the tokens of the answers are scored, without the end-of-text token.
///
/// # Errors
/// If there is no pass, `batch_size` is 0, a row has no choices, not as many names as answers, or no right
/// answer among them, an answer is longer than the encoder's `max_length`, or a forward pass fails.
pub fn score_choices(
    model: &dyn CausalLm,
    encoder: &PromptEncoder,
    rows: &[Prompted],
    batch_size: usize,
    normalize: Normalize,
    passes: &[Pass],
) -> Result<ChoiceScores> {
    scores_with(model, encoder, rows, batch_size, normalize, passes, &DrawCache::default())
}

/// [`score_choices`] with a cache of posterior draws, shared between calls.
pub(super) fn scores_with(
    model: &dyn CausalLm,
    encoder: &PromptEncoder,
    rows: &[Prompted],
    batch_size: usize,
    normalize: Normalize,
    passes: &[Pass],
    draws: &DrawCache,
) -> Result<ChoiceScores> {
    at_least_one("passes", passes.len())?;
    at_least_one("batch_size", batch_size)?;
    let Candidates { questions, texts: candidates, encoded } = candidates(encoder, rows)?;
    let width = questions.iter().map(|choices| choices.answers.len()).max().unwrap_or(0);
    let mut probabilities = vec![vec![0.0; width]; questions.len()];
    let answered = Answered::each(&encoded.rows, questions.iter().map(|choices| choices.answers.len()));
    for pass in passes {
        let cx = Context::from(*pass).with_draws(draws);
        let scores = likelihoods(model, &answered, batch_size, &cx)?;
        let mut texts = candidates.iter().zip(&encoded.rows);
        for (sums, own) in probabilities.iter_mut().zip(&scores) {
            let of_length = |(score, (text, tokens)): (&f64, (&Prompted, &Tokens))| {
                score / normalize.length(&text.answer, tokens.targets())
            };
            let own: Vec<f64> = own.iter().zip(texts.by_ref()).map(of_length).collect();
            sums.iter_mut().zip(softmax(&own)).for_each(|(sum, p)| *sum += p / passes.len() as f64);
        }
    }
    Ok(ChoiceScores { probabilities, correct: questions.iter().map(|c| c.correct as u32).collect() })
}

/// The answers of all questions, one after the other, as texts and as tokens.
struct Candidates<'a> {
    questions: Vec<&'a Choices>,
    texts: Vec<Prompted>,
    encoded: Encodings,
}

/// Checks that every question has choices and that all answers fit into `max_length`.
pub(super) fn check(encoder: &PromptEncoder, rows: &[Prompted]) -> Result<()> {
    candidates(encoder, rows).map(|_| ())
}

fn candidates<'a>(encoder: &PromptEncoder, rows: &'a [Prompted]) -> Result<Candidates<'a>> {
    let mut questions: Vec<&Choices> = Vec::with_capacity(rows.len());
    let mut candidates = Vec::new();
    for (i, row) in rows.iter().enumerate() {
        let choices = row.choices(i)?;
        let (names, answers) = (choices.names.len(), choices.answers.len());
        if names != answers || choices.correct >= names {
            let reason = format!(
                "row {}: {names} names, {answers} answers and right answer {} (from 0) do not fit",
                i + 1,
                choices.correct
            );
            return Err(Error::config("choices", reason));
        }
        let prompt = || row.prompt.clone();
        candidates.extend(choices.answers.iter().map(|answer| Prompted {
            prompt: prompt(),
            answer: answer.clone(),
            ..Prompted::default()
        }));
        questions.push(choices);
    }
    let encoded = encoder.of_answers().encode(&candidates)?;
    if encoded.cut > 0 || encoded.rows.len() != candidates.len() {
        let counts: Vec<usize> = questions.iter().map(|choices| choices.answers.len()).collect();
        return Err(unfit(encoder, &candidates, &counts)?);
    }
    Ok(Candidates { questions, texts: candidates, encoded })
}

/// Returns the error for the first answer that does not fit.
fn unfit(encoder: &PromptEncoder, candidates: &[Prompted], counts: &[usize]) -> Result<Error> {
    let (encoder, mut rest) = (encoder.of_answers(), candidates);
    for (question, count) in counts.iter().enumerate() {
        let (own, others) = rest.split_at(*count);
        rest = others;
        for (candidate, answer) in own.iter().zip(1..) {
            let (row, length, most) = (question + 1, encoder.length(candidate)?, encoder.max_length());
            if length > most {
                let reason = format!(
                    "row {row} has {length} tokens with its answer {answer}, expected at most {most}: give a \
                     larger one, or leave the row out"
                );
                return Ok(Error::config("max_length", reason));
            }
            if encoder.encode(std::slice::from_ref(candidate))?.rows.is_empty() {
                return Ok(Error::config("data", format!("row {row}: its answer {answer} has no token")));
            }
        }
    }
    Ok(Error::config("max_length", "an answer does not fit"))
}

/// Returns the index of the choice whose name comes first in a generated text, as the paper's authors extract
/// it. Of two names that match at the same place, the longer wins.
pub fn chosen_by_name(text: &str, names: &[String]) -> Option<usize> {
    let places = names.iter().enumerate().filter_map(|(i, name)| {
        let place = text.find(name.as_str())?;
        Some((place, std::cmp::Reverse(name.len()), i))
    });
    places.min().map(|(_, _, i)| i)
}
