//! Predictions of a classifier for texts.

use std::sync::OnceLock;

use super::classifier::Classifier;
use super::predictions::{batches, Predictions};
use crate::adapter::Pass;
use crate::data::batch::Batch;
use crate::data::encode::{fit_vocabulary, Encoded, TextEncoder};
use crate::data::task::Example;
use crate::data::tokenizer;
use crate::error::{Error, Result};
use crate::metrics::{softmax, Metrics};
use crate::predict::{logits, posterior_draws, posterior_scores, Prediction};
use crate::util::check::at_least_one;

impl Classifier {
    /// Tokenises examples with the model's tokeniser, up to [`Self::max_length`] tokens each.
    ///
    /// # Errors
    /// If there is no tokeniser, it is damaged or of another model, or it rejects a text.
    pub fn encode(&self, examples: &[Example]) -> Result<Vec<Encoded>> {
        self.encoder()?.encode(examples)
    }

    /// The maximum number of tokens of a text, including special tokens: the model's, unless
    /// [`Self::set_max_length`] set less.
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// Sets the number of tokens to which texts are cut. Pairs lose tokens of the longer text first.
    ///
    /// # Errors
    /// If the model takes fewer tokens or a pair does not fit; as [`Self::encode`] if there is no tokeniser.
    pub fn set_max_length(&mut self, max_length: usize) -> Result<()> {
        self.encoder = OnceLock::from(self.new_encoder(max_length)?);
        self.max_length = max_length;
        Ok(())
    }

    /// The number of texts per batch of [`Self::evaluate`], [`Self::predict`] and [`Self::predict_averaged`]: 64 of
    /// an encoder and 16 of a decoder, unless [`Self::set_eval_batch_size`] set another.
    pub fn eval_batch_size(&self) -> usize {
        self.eval_batch_size
    }

    /// Sets the number of texts per batch: fewer take less memory.
    ///
    /// # Errors
    /// If it is 0.
    pub fn set_eval_batch_size(&mut self, rows: usize) -> Result<()> {
        at_least_one("eval_batch_size", rows)?;
        self.eval_batch_size = rows;
        Ok(())
    }

    /// The positive one of two classes, of which F1 is measured ([`Metrics::f1`]): the second, unless
    /// [`Self::set_positive_class`] named the first. `None` if there are not two.
    pub fn positive_class(&self) -> Option<&str> {
        self.labels.name(self.positive as usize).filter(|_| self.labels.len() == 2)
    }

    /// Sets the positive one of two classes, like scikit-learn's `pos_label`.
    ///
    /// # Errors
    /// If there are not two classes, or none has this name.
    pub fn set_positive_class(&mut self, name: &str) -> Result<()> {
        match self.labels.index_of(name).filter(|_| self.labels.len() == 2) {
            Some(class) => {
                self.positive = class as u32;
                Ok(())
            }
            None => {
                let known = self.labels.names().join(", ");
                let reason = format!("expected one of two classes, got {name} of {known}");
                Err(Error::config("positive_class", reason))
            }
        }
    }

    /// Evaluates labelled examples at the posterior mean, with all metrics of [`Metrics::of_own_data`].
    ///
    /// # Errors
    /// As [`Self::encode`]; if no example has a label, or a label is not of the kind that the classifier
    /// predicts.
    pub fn evaluate(&self, examples: &[Example]) -> Result<Metrics> {
        let rows = self.encode(examples)?;
        let predictions = Predictions::new(self, &rows, &batches(self, &rows, self.eval_batch_size)?, 0)?;
        Ok(predictions.evaluate_own_data()?.mean)
    }

    /// Predicts texts or pairs: `&["a text", "another"]`, `&[("a pair", "of texts")]`, or [`Example`]s. The
    /// pass selects the weights: [`Pass::Mean`], or one draw of the posterior. Returns one prediction per
    /// text, in order. Texts are cut to [`Self::max_length`] tokens: if training used fewer, call
    /// [`Self::set_max_length`].
    ///
    /// # Errors
    /// As [`Self::encode`]; if the forward pass fails or its outputs are not finite.
    pub fn predict<T: Clone + Into<Example>>(&self, texts: &[T], pass: &Pass) -> Result<Vec<Prediction>> {
        let Some(batches) = self.text_batches(texts)? else { return Ok(Vec::new()) };
        let rows = logits(self, &batches, &(*pass).into())?;
        check_finite(&rows)?;
        let row = |row: Vec<f64>| {
            let values = if self.is_regression() { row } else { softmax(&row) };
            Prediction::new(values, &self.labels, None)
        };
        Ok(rows.into_iter().map(row).collect())
    }

    /// Predicts as [`Self::predict`], averaged over the posterior draws 0, 1 .. after the softmax of each,
    /// with the uncertainty from the draws. A regression only has the average.
    ///
    /// # Errors
    /// As [`Self::predict`]; if `samples` is 0, or the method has no posterior.
    pub fn predict_averaged<T: Clone + Into<Example>>(
        &self,
        texts: &[T],
        samples: usize,
    ) -> Result<Vec<Prediction>> {
        self.check_has_posterior()?;
        let Some(batches) = self.text_batches(texts)? else { return Ok(Vec::new()) };
        if self.is_regression() {
            let rows = posterior_scores(self, &batches, samples)?;
            check_finite(&rows)?;
            return Ok(rows.into_iter().map(|row| Prediction::new(row, &self.labels, None)).collect());
        }
        Prediction::of_draws(&posterior_draws(self, &batches, samples)?, &self.labels)
    }

    /// Checks that the method has a posterior to draw from.
    pub(super) fn check_has_posterior(&self) -> Result<()> {
        if self.method().has_posterior() {
            return Ok(());
        }
        let reason = format!("{} has no posterior: its draws would all be its mean", self.method().name());
        Err(Error::config("posterior_samples", reason))
    }

    /// The texts in batches to predict, or `None` if there is no text.
    pub(crate) fn text_batches<T: Clone + Into<Example>>(&self, texts: &[T]) -> Result<Option<Vec<Batch>>> {
        if texts.is_empty() {
            return Ok(None);
        }
        let examples: Vec<Example> = texts.iter().cloned().map(Into::into).collect();
        batches(self, &self.encode(&examples)?, self.eval_batch_size).map(Some)
    }

    /// Creates an encoder of at most `max_length` tokens with the model's tokeniser.
    fn new_encoder(&self, max_length: usize) -> Result<TextEncoder> {
        let tokenizer = fit_vocabulary(tokenizer::of_model(self.files())?, self.config().vocab_size())?;
        let longest = self.config().longest().saturating_sub(self.method().virtual_tokens());
        TextEncoder::new(tokenizer, max_length, longest)
    }

    fn encoder(&self) -> Result<&TextEncoder> {
        if let Some(encoder) = self.encoder.get() {
            return Ok(encoder);
        }
        let encoder = self.new_encoder(self.max_length)?;
        Ok(self.encoder.get_or_init(|| encoder))
    }
}

fn check_finite(rows: &[Vec<f64>]) -> Result<()> {
    match rows.iter().position(|row| row.iter().any(|value| !value.is_finite())) {
        Some(row) => {
            Err(Error::config("predictions", format!("row {row} (from 0) is not finite: {:?}", rows[row])))
        }
        None => Ok(()),
    }
}
