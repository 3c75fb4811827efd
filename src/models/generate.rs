//! Text generation with a key-value cache: from the posterior mean, from one posterior draw, or from
//! next-token probabilities averaged over several draws.

mod sampling;

use std::collections::BTreeSet;

use candle_core::{DType, Tensor};
use rand::Rng;
use rayon::prelude::*;

use crate::adapter::{Context, DrawCache, Pass};
use crate::error::{Error, Result};
use crate::models::causal::{padded_left, Cache, CausalLm};
use crate::noise::{Noise, Purpose, Stream};
use crate::special::softmax;
use crate::util::check::positive;
pub use sampling::Sampling;

/// Which weights of the posterior make the predictions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PosteriorWeights {
    /// The posterior mean.
    Mean,
    /// Posterior draw number `.0`, the same for the whole text.
    Draw(u64),
    /// The average of the next-token probabilities of draws `0 .. .0`. Each draw has its own KV cache.
    Average(usize),
}

impl PosteriorWeights {
    /// The passes whose probabilities are averaged.
    pub fn passes(&self) -> Vec<Pass> {
        match *self {
            Self::Mean => vec![Pass::Mean],
            Self::Draw(draw) => vec![Pass::Posterior { draw }],
            Self::Average(draws) => (0..draws as u64).map(|draw| Pass::Posterior { draw }).collect(),
        }
    }
}

/// The options of [`generate`].
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateConfig {
    /// The maximum number of tokens added to a prompt.
    pub max_new_tokens: usize,
    /// How a token is chosen: `ArgMax` is greedy.
    pub sampling: Sampling,
    /// Makes tokens that already occur in the prompt or the text less likely: positive logits are divided by
    /// this and negative ones multiplied by it (Keskar et al. 2019, as in transformers). 1 changes nothing.
    pub repetition_penalty: f64,
    /// The seed of the random choices. Each is a function of the seed, the row and the index of the token.
    pub seed: u64,
    /// The row number of the first prompt. It makes the text of a row independent of how rows are split into
    /// batches.
    pub first_row: u64,
    /// The tokens that end a text. They are not part of the result.
    pub stop: Vec<u32>,
    /// The weights that make the predictions.
    pub weights: PosteriorWeights,
}

impl Default for GenerateConfig {
    fn default() -> Self {
        Self {
            max_new_tokens: 128,
            sampling: Sampling::ArgMax,
            repetition_penalty: 1.0,
            seed: 0,
            first_row: 0,
            stop: Vec::new(),
            weights: PosteriorWeights::Mean,
        }
    }
}

impl GenerateConfig {
    fn validate(&self) -> Result<()> {
        if self.weights == PosteriorWeights::Average(0) {
            return Err(Error::config("weights", "expected at least one draw to average over, got 0"));
        }
        positive("repetition_penalty", self.repetition_penalty)?;
        self.sampling.validate()
    }

    /// Chooses the next token of a row from the logits of each pass. `seen` gives the row's tokens so far. An
    /// error is a reason.
    fn choose<I: Iterator<Item = u32>>(
        &self,
        mut passes: Vec<Vec<f32>>,
        seen: impl Fn() -> I,
        rng: &mut impl Rng,
    ) -> std::result::Result<u32, String> {
        passes.iter_mut().for_each(|logits| self.penalize(logits, seen()));
        // For several passes, the logits are the logarithms of the averaged probabilities.
        let logits = match passes.as_mut_slice() {
            [one] => std::mem::take(one),
            several => average(several),
        };
        if let Some(bad) = logits.iter().find(|logit| logit.is_nan() || **logit == f32::INFINITY) {
            return Err(format!("a logit is {bad} (a base in f16 may overflow: load it as bf16 or f32)"));
        }
        self.sampling.choose(&logits, rng).ok_or_else(|| "no token has a positive probability".to_string())
    }

    /// Applies the repetition penalty to a row's logits. `seen` are the row's tokens so far.
    fn penalize(&self, logits: &mut [f32], seen: impl Iterator<Item = u32>) {
        if self.repetition_penalty == 1.0 {
            return;
        }
        for token in seen.collect::<BTreeSet<_>>() {
            if let Some(logit) = logits.get_mut(token as usize) {
                let (value, penalty) = (f64::from(*logit), self.repetition_penalty);
                *logit = if value > 0.0 { value / penalty } else { value * penalty } as f32;
            }
        }
    }
}

/// Continues every prompt and returns the tokens added to each.
///
/// A row ends at a stop token, after `max_new_tokens`, or when the longest prompt of the batch with its
/// continuation reaches the model's maximum length.
///
/// Prompts of different lengths are padded on the left. `on_token(row, token)` is called for every added
/// token as it is chosen; if it returns false, the row ends.
///
/// # Errors
/// If a prompt is empty or leaves no room in the model's maximum length, an option is outside its domain, a
/// logit is NaN or positive infinity, or no token has a positive probability.
pub fn generate(
    model: &dyn CausalLm,
    prompts: &[Vec<u32>],
    config: &GenerateConfig,
    on_token: &mut dyn FnMut(usize, u32) -> bool,
) -> Result<Vec<Vec<u32>>> {
    config.validate()?;
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    if let Some(row) = prompts.iter().position(Vec::is_empty) {
        return Err(Error::config("prompt", format!("prompt {row} has no token")));
    }
    if prompts.is_empty() || config.max_new_tokens == 0 {
        return Ok(vec![Vec::new(); prompts.len()]);
    }
    if longest >= model.max_length() {
        let reason = format!("expected fewer than the model's {} tokens, got {longest}", model.max_length());
        return Err(Error::config("prompt", reason));
    }
    run(model, prompts, longest, config, on_token)
}

/// The loop over tokens.
fn run(
    model: &dyn CausalLm,
    prompts: &[Vec<u32>],
    longest: usize,
    config: &GenerateConfig,
    on_token: &mut dyn FnMut(usize, u32) -> bool,
) -> Result<Vec<Vec<u32>>> {
    let steps = config.max_new_tokens.min(model.max_length() - longest);
    let mut batch = Continuation::new(model, prompts, longest, steps, config);
    let mut done = vec![false; prompts.len()];
    let mut texts = vec![Vec::new(); prompts.len()];
    for step in 0..steps {
        let mut passes = batch.advance(model)?;
        let of_row = |row: usize| passes.iter_mut().map(|pass| std::mem::take(&mut pass[row])).collect();
        let logits: Vec<Vec<Vec<f32>>> = (0..prompts.len()).map(of_row).collect();
        let choose = |(row, logits): (usize, Vec<Vec<f32>>)| {
            if done[row] {
                return Ok(None);
            }
            let seen = || prompts[row].iter().chain(&texts[row]).copied();
            config.choose(logits, seen, &mut batch.choices[row].rng(step as u64)).map(Some).map_err(
                |reason| Error::tensor("logits", format!("token {} of row {row}: {reason}", step + 1)),
            )
        };
        let next = logits.into_par_iter().enumerate().map(choose).collect::<Result<Vec<Option<u32>>>>()?;
        for (row, token) in next.iter().enumerate() {
            let Some(token) = *token else { continue };
            if config.stop.contains(&token) {
                done[row] = true;
                continue;
            }
            texts[row].push(token);
            done[row] = !on_token(row, token);
        }
        if done.iter().all(|done| *done) {
            break;
        }
        batch.feed(next.into_iter().map(Option::unwrap_or_default).collect());
    }
    Ok(texts)
}

/// The state of a batch between two steps: the input of the next step, and the KV cache of each pass.
struct Continuation {
    tokens: Vec<Vec<u32>>, // not yet in the caches; equally many in each row
    mask: Vec<Vec<u8>>,    // of all columns so far, including those of `tokens`
    contexts: Vec<(Context, Cache)>,
    choices: Vec<Stream>,
}

impl Continuation {
    fn new(
        model: &dyn CausalLm,
        prompts: &[Vec<u32>],
        longest: usize,
        steps: usize,
        config: &GenerateConfig,
    ) -> Self {
        let (tokens, mask) = padded_left(&prompts.iter().map(Vec::as_slice).collect::<Vec<_>>());
        let noise = Noise::new(config.seed);
        let choices = |row: usize| {
            let row = config.first_row.wrapping_add(row as u64);
            noise.stream(&format!("row.{row}"), Purpose::Predict)
        };
        let draws = DrawCache::default();
        let context =
            |pass| (Context::from(pass).with_draws(&draws).only_to_predict(), model.cache(longest + steps));
        Self {
            tokens,
            mask,
            contexts: config.weights.passes().into_iter().map(context).collect(),
            choices: (0..prompts.len()).map(choices).collect(),
        }
    }

    /// Appends one token to every row. The tokens of finished rows have no effect on other rows.
    fn feed(&mut self, next: Vec<u32>) {
        self.tokens = next.into_iter().map(|token| vec![token]).collect();
        self.mask.iter_mut().for_each(|row| row.push(1));
    }

    /// Runs the model on `tokens` and returns the next-token logits by pass and row.
    fn advance(&mut self, model: &dyn CausalLm) -> Result<Vec<Vec<Vec<f32>>>> {
        let rows = self.tokens.len();
        let new = self.tokens[0].len();
        let ids = Tensor::from_vec(self.tokens.concat(), (rows, new), model.device())?;
        let mask = Tensor::from_vec(self.mask.concat(), (rows, self.mask[0].len()), model.device())?;
        let mut logits = Vec::with_capacity(self.contexts.len());
        for (cx, cache) in &mut self.contexts {
            let hidden = model.hidden(&ids, &mask, Some(cache), cx)?;
            let last = hidden.detach().narrow(1, new - 1, 1)?.squeeze(1)?.contiguous()?; // (b, d)
            logits.push(model.head(&last, cx)?.detach().to_dtype(DType::F32)?.to_vec2::<f32>()?);
        }
        Ok(logits)
    }
}

/// The logarithms of the mean probabilities of several rows of logits.
fn average(draws: &[Vec<f32>]) -> Vec<f32> {
    let mut sum = Vec::new();
    let mut count = 0.0;
    for draw in draws {
        let mut row: Vec<f64> = draw.iter().map(|logit| f64::from(*logit)).collect();
        softmax(&mut row);
        sum.resize(row.len(), 0.0);
        sum.iter_mut().zip(row).for_each(|(sum, p)| *sum += p);
        count += 1.0;
    }
    sum.into_iter().map(|sum: f64| (sum / count).ln() as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_penalty_is_that_of_transformers() {
        // RepetitionPenaltyLogitsProcessor(2.0)(
        //     torch.tensor([[0, 1, 1, 4]]), torch.tensor([[2., -1., .5, -3., 0.]]))
        let config = GenerateConfig { repetition_penalty: 2.0, ..GenerateConfig::default() };
        let mut logits = [2.0, -1.0, 0.5, -3.0, 0.0];
        GenerateConfig::default().penalize(&mut logits, [0, 1].into_iter());
        assert_eq!(logits, [2.0, -1.0, 0.5, -3.0, 0.0]);
        config.penalize(&mut logits, [0, 1, 1, 4].into_iter());
        assert_eq!(logits, [1.0, -2.0, 0.5, -3.0, 0.0]);
    }
}
