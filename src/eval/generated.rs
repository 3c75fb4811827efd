//! Generates texts with a language model after the prompts of a data set.

use crate::data::causal::PromptEncoder;
use crate::data::tokenizer;
use crate::error::{Error, Result};
use crate::models::causal::CausalLm;
use crate::models::generate::{generate, GenerateConfig};
use crate::train::LanguageModel;
use crate::util::check::at_least_one;

/// A model with its tokeniser and generation settings.
pub struct Generator<'a> {
    /// The model.
    pub model: &'a dyn CausalLm,
    /// The model's tokeniser.
    pub encoder: &'a PromptEncoder,
    /// The generation settings.
    pub config: GenerateConfig,
    /// The number of prompts that are continued together.
    pub batch_size: usize,
}

impl std::fmt::Debug for Generator<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { config, batch_size, .. } = self;
        f.debug_struct("Generator")
            .field("config", config)
            .field("batch_size", batch_size)
            .finish_non_exhaustive()
    }
}

impl<'a> Generator<'a> {
    /// The generator of an opened model, 8 prompts at a time. Texts also end at the model's own end tokens.
    pub fn of(language: &'a LanguageModel, mut config: GenerateConfig) -> Self {
        config.stop.extend(&language.model.config().eos_token_ids);
        Self { model: &language.model, encoder: &language.encoder, config, batch_size: 8 }
    }

    /// Returns the text that follows each prompt, up to and without the first of the texts in `stop`. Row `i`
    /// samples with the noise of row `config.first_row + i`, whatever the batch size.
    ///
    /// # Errors
    /// If `batch_size` is 0, a prompt is empty or leaves no room in the model's length (the error counts rows from
    /// 1), or as [`generate`].
    pub fn texts(&self, prompts: &[&str], stop: &[&str]) -> Result<Vec<String>> {
        self.texts_from(0, prompts, stop)
    }

    /// [`Self::texts`], where `take` gets the texts of each batch as soon as they are there, in order.
    ///
    /// # Errors
    /// As [`Self::texts`], or the first error of `take`.
    pub fn each_batch(
        &self,
        prompts: &[&str],
        stop: &[&str],
        take: &mut dyn FnMut(Vec<String>) -> Result<()>,
    ) -> Result<()> {
        self.each_from(0, prompts, stop, take)
    }

    /// [`Self::texts`] for prompts whose first row is number `start`.
    pub(super) fn texts_from(&self, start: usize, prompts: &[&str], stop: &[&str]) -> Result<Vec<String>> {
        let mut texts = Vec::with_capacity(prompts.len());
        self.each_from(start, prompts, stop, &mut |batch| {
            texts.extend(batch);
            Ok(())
        })?;
        Ok(texts)
    }

    /// [`Self::each_batch`] for prompts whose first row is number `start`.
    fn each_from(
        &self,
        start: usize,
        prompts: &[&str],
        stop: &[&str],
        take: &mut dyn FnMut(Vec<String>) -> Result<()>,
    ) -> Result<()> {
        self.check()?;
        let size = self.batch_size;
        // All of them first: a prompt that is too long must not end a long run in its middle.
        let ids = prompts.iter().zip(start..).map(|(prompt, row)| self.prompt_ids(row, prompt));
        let ids = ids.collect::<Result<Vec<_>>>()?;
        for (chunk, first) in ids.chunks(size).zip((start..).step_by(size)) {
            take(self.continued(chunk, first as u64, stop)?)?;
        }
        Ok(())
    }

    /// Checks the batch size.
    pub(super) fn check(&self) -> Result<()> {
        at_least_one("batch_size", self.batch_size)
    }

    /// Returns the tokens of the prompt of row `row`.
    ///
    /// # Errors
    /// If the prompt has no token, or leaves no room for one more.
    pub(super) fn prompt_ids(&self, row: usize, prompt: &str) -> Result<Vec<u32>> {
        let tokens = self.encoder.prompt(prompt)?;
        let most = self.model.max_length().saturating_sub(1);
        if (1..=most).contains(&tokens.len()) {
            return Ok(tokens);
        }
        let reason =
            format!("the prompt of row {} has {} tokens, expected 1 to {most}", row + 1, tokens.len());
        Err(Error::config("prompt", reason))
    }

    /// Continues the prompts of one batch.
    fn continued(&self, prompts: &[Vec<u32>], first: u64, stop: &[&str]) -> Result<Vec<String>> {
        let config =
            GenerateConfig { first_row: self.config.first_row.wrapping_add(first), ..self.config.clone() };
        let heads: Vec<String> = prompts.iter().map(|ids| self.decode(ids)).collect::<Result<_>>()?;
        let mut so_far = vec![Vec::new(); prompts.len()];
        let after = |row: usize, added: &[u32]| self.after(&heads[row], &prompts[row], added);
        let added = generate(self.model, prompts, &config, &mut |row, token| {
            if stop.is_empty() {
                return true;
            }
            so_far[row].push(token);
            // A decoding error is returned below; this callback cannot return one.
            let text = after(row, &so_far[row]).unwrap_or_default();
            end(&text, stop).is_none()
        })?;
        let texts = added.iter().enumerate().map(|(row, added)| {
            let mut text = after(row, added)?;
            text.truncate(end(&text, stop).unwrap_or(text.len()));
            Ok(text)
        });
        texts.collect()
    }

    /// Returns the text of the tokens `added` after those of `prompt`, whose own text is `head`. Both are
    /// decoded together: some decoders drop the first blank of their input, which would lose a program's
    /// indentation.
    fn after(&self, head: &str, prompt: &[u32], added: &[u32]) -> Result<String> {
        match self.decode(&[prompt, added].concat())?.strip_prefix(head) {
            Some(text) => Ok(text.to_string()),
            // A character spans the boundary, so that the prompt alone decodes to different text.
            None => self.decode(added),
        }
    }

    fn decode(&self, ids: &[u32]) -> Result<String> {
        tokenizer::ask(|| self.encoder.tokenizer().decode(ids, true))
    }
}

/// Returns the offset of the first stop text.
fn end(text: &str, stop: &[&str]) -> Option<usize> {
    stop.iter().filter_map(|stop| text.find(stop)).min()
}
