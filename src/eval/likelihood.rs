//! The likelihood of the answers to a question, whose prompt is computed once for all of them.

use candle_core::{Device, Tensor};

use crate::adapter::Context;
use crate::data::causal::{CausalBatch, Tokens};
use crate::error::Result;
use crate::models::causal::{padded_left, CausalLm};
use crate::predict::{target_log_probabilities, token_log_probabilities};

/// A question with each of its answers.
pub(super) struct Answered<'a> {
    rows: &'a [Tokens],
    /// The number of tokens that all rows begin with. At least one token before the first target is not among
    /// them, since it is what predicts the target.
    shared: usize,
}

impl<'a> Answered<'a> {
    /// The questions in `rows`, which has the answers of each, `counts` of them, one after the other.
    pub fn each(mut rows: &'a [Tokens], counts: impl Iterator<Item = usize>) -> Vec<Self> {
        let question = |count: usize| {
            let (own, others) = rows.split_at(count);
            rows = others;
            Self { rows: own, shared: shared(own) }
        };
        counts.map(question).collect()
    }

    fn prompt(&self) -> &'a [u32] {
        self.rows.first().map_or(&[], |row| &row.ids[..self.shared])
    }

    /// What follows the shared tokens in each row.
    fn rests(&self) -> impl Iterator<Item = Tokens> + '_ {
        let rest = |row: &Tokens| Tokens {
            ids: row.ids[self.shared..].to_vec(),
            learnt: row.learnt[self.shared..].to_vec(),
            row: row.row,
        };
        self.rows.iter().map(rest)
    }
}

/// The number of tokens that all rows of a question share, without the last one before a target.
fn shared(rows: &[Tokens]) -> usize {
    let Some((first, others)) = rows.split_first() else { return 0 };
    let in_common = |row: &Tokens| first.ids.iter().zip(&row.ids).take_while(|(a, b)| a == b).count();
    let before_targets = |row: &Tokens| row.learnt.iter().skip(1).take_while(|learnt| !**learnt).count();
    let shortest = others.iter().map(in_common).chain(rows.iter().map(before_targets)).min();
    shortest.unwrap_or(0)
}

/// Returns the log-likelihood of the answer tokens of each row of each question. Questions whose prompts have
/// like lengths are computed together, at most `batch_size` prompts and `batch_size` answers at a time.
pub(super) fn likelihoods(
    model: &dyn CausalLm,
    questions: &[Answered],
    batch_size: usize,
    cx: &Context,
) -> Result<Vec<Vec<f64>>> {
    let cx = &cx.clone().without_gradient();
    let mut order: Vec<usize> = (0..questions.len()).collect();
    order.sort_by_key(|question| questions[*question].shared);
    let mut sums = vec![Vec::new(); questions.len()];
    for group in order.chunks(batch_size) {
        let own: Vec<&Answered> = group.iter().map(|question| &questions[*question]).collect();
        let mut found = of_group(model, &own, batch_size, cx)?.into_iter();
        for question in group {
            sums[*question] = found.by_ref().take(questions[*question].rows.len()).collect();
        }
    }
    Ok(sums)
}

/// The log-likelihoods of all answers of a few questions, one after the other.
fn of_group(
    model: &dyn CausalLm,
    questions: &[&Answered],
    batch_size: usize,
    cx: &Context,
) -> Result<Vec<f64>> {
    let prompts: Vec<&[u32]> = questions.iter().map(|question| question.prompt()).collect();
    let rests: Vec<(u32, Tokens)> = (0..)
        .zip(questions)
        .flat_map(|(question, own)| own.rests().map(move |rest| (question, rest)))
        .collect();
    let longest = prompts.iter().map(|prompt| prompt.len()).max().unwrap_or(0);
    let room = longest + rests.iter().map(|(_, rest)| rest.ids.len()).max().unwrap_or(0);
    let mut sums = Vec::with_capacity(rests.len());
    if prompts.iter().any(|prompt| prompt.is_empty()) || room > model.max_length() {
        let rows: Vec<&Tokens> = questions.iter().flat_map(|question| question.rows).collect();
        for chunk in rows.chunks(batch_size) {
            let batch = CausalBatch::collate(chunk, 0, model.device())?;
            let logs = token_log_probabilities(model, &batch, std::slice::from_ref(cx))?;
            sums.extend(by_row(&batch, &logs));
        }
        return Ok(sums);
    }
    let (ids, mask) = padded_left(&prompts);
    let ids = Tensor::new(ids, model.device())?; // (questions, longest)
    let mask = Tensor::new(mask, &Device::Cpu)?;
    let mut prompt_cache = model.cache(room);
    model.hidden(&ids, &mask, Some(&mut prompt_cache), cx)?;
    for chunk in rests.chunks(batch_size) {
        let rows: Vec<u32> = chunk.iter().map(|(question, _)| *question).collect();
        let rests: Vec<&Tokens> = chunk.iter().map(|(_, rest)| rest).collect();
        let batch = CausalBatch::collate(&rests, 0, model.device())?;
        let mut cache = prompt_cache.fork_rows(&rows)?;
        let of_prompts = mask.index_select(&Tensor::new(rows, &Device::Cpu)?, 0)?;
        let mask = Tensor::cat(&[&of_prompts, &batch.attention_mask], 1)?;
        let hidden = model.hidden(&batch.input_ids, &mask, Some(&mut cache), cx)?.detach();
        let predicting = batch.positions.take(&hidden, cx.path)?; // (n, d)
        let logs = target_log_probabilities(model, &predicting, &batch.targets, cx)?;
        sums.extend(by_row(&batch, &logs));
    }
    Ok(sums)
}

/// The sums over the targets of each row of a batch.
fn by_row<'a>(batch: &'a CausalBatch, mut logs: &'a [f64]) -> impl Iterator<Item = f64> + 'a {
    batch.counts.iter().map(move |count| {
        let (own, others) = logs.split_at(*count);
        logs = others;
        own.iter().sum()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_share_their_beginning_but_not_the_token_before_a_target() {
        // The second text has the first target as its letter in upper case.
        let row = |text: &str| {
            let target = text.find(char::is_uppercase).unwrap_or(text.len());
            Tokens {
                ids: text.to_lowercase().bytes().map(u32::from).collect(),
                learnt: (0..text.len()).map(|i| i >= target).collect(),
                row: 0,
            }
        };
        let rows = |texts: &[&str]| texts.iter().map(|text| row(text)).collect::<Vec<_>>();
        assert_eq!(shared(&rows(&["abcD", "abcEf"])), 2);
        assert_eq!(shared(&rows(&["abcD"])), 2);
        assert_eq!(shared(&rows(&["abcDe", "abcDf"])), 2);
        assert_eq!(shared(&rows(&["abcD", "axcD"])), 1); // tokens before the answer may differ
        assert_eq!(shared(&rows(&["abcdE", "abC"])), 1);
        assert_eq!((shared(&rows(&["aB"])), shared(&rows(&["AB"])), shared(&[])), (0, 0, 0));
        let rows = rows(&["abcD", "abcEf", "xyZ"]);
        let questions = Answered::each(&rows, [2, 1].into_iter());
        assert_eq!(questions.iter().map(|question| question.prompt().len()).collect::<Vec<_>>(), [2, 1]);
        let rests: Vec<Tokens> = questions[0].rests().collect();
        assert_eq!(
            (rests[1].ids.as_slice(), rests[1].targets()),
            ("cef".as_bytes().iter().map(|b| u32::from(*b)).collect::<Vec<_>>().as_slice(), 2)
        );
    }
}
