//! The Laplace approximation of a trained classifier: a Gaussian around its weights, without further
//! training.
//!
//! ```text
//! p(theta | D) ~ N(theta*, Sigma),   Sigma^-1 = H + delta 1
//! H = sum_n J_n^T (diag(p_n) - p_n p_n^T) J_n      J_n = df_n / dtheta (the generalised Gauss-Newton)
//! ```
//!
//! where delta is the precision of a zero-mean Gaussian prior. H is approximated by one block per weight W,
//! each a Kronecker product (KFAC: Martens and Grosse 2015; for tokens that share a weight, the "expand" form
//! of Eschenhagen et al. 2023; Ritter et al. 2018):
//!
//! ```text
//! H_W ~ G (x) A,   A = 1/T sum_{n,t} x x^T,   G = sum_{n,t,c} g_c g_c^T
//! ```
//!
//! where x is a token's input to W, T the number of tokens of all examples without padding, and g_c the
//! gradient at the output of W of the logits along column c of the root of the logits' Hessian (exact, not
//! sampled). The product is exact for a single token, and for one token per example with the same input in
//! every example.
//!
//! - [`Taps`]: over A and B of every LoRA adapter, or MonteCLoRA adapter around its mean (Yang et al. 2024,
//!   "Bayesian low-rank adaptation for large language models"). Difference: the larger factors are kept in
//!   full, whereas the paper keeps their largest eigenvectors; memory and time are those of matrices as wide
//!   as the layers.
//! - [`LastLayer`]: over the last layer of the head only (Kristiadi et al. 2020, "Being Bayesian, even just a
//!   bit, fixes overconfidence in ReLU networks").

mod kron;
mod last;
#[cfg(test)]
pub(super) mod tests;

use candle_core::{DType, Tensor};
use rayon::prelude::*;

use super::linearised::{each_part, scale_to, BatchRecord, Linearised, Maps, Taps, Wanted};
use super::precision::most_evident;
use crate::data::batch::Batch;
use crate::error::{Error, Result};
use crate::ops;
use crate::predict::Predictor;
use crate::util::check;
use kron::{KroneckerBlock, Sums};

pub use last::LastLayer;

/// The name of the prior precision in error messages.
const PRECISION: &str = "prior_precision";

/// Which weights are uncertain.
#[derive(Debug, Clone)]
pub enum Scope {
    /// A and B of every active LoRA or MonteCLoRA adapter.
    Adapters(Taps),
    /// The weight and bias of the head's last layer.
    LastLayer(LastLayer),
}

impl Scope {
    /// A last layer is recorded with the Jacobians in any case: they cost nothing.
    fn record(&self, model: &dyn Predictor, batch: &Batch, wanted: Wanted) -> Result<Option<BatchRecord>> {
        match self {
            Self::Adapters(taps) => taps.record(model, batch, Maps::Both, wanted),
            Self::LastLayer(layer) => layer.record(model, batch).map(Some),
        }
    }

    fn parameters(&self) -> Result<Vec<(String, Tensor)>> {
        match self {
            Self::Adapters(taps) => Ok(taps.parameters(Maps::Both)),
            Self::LastLayer(layer) => layer.parameters(),
        }
    }
}

/// A Laplace approximation around the current weights of a classifier. Fit it again after the weights change.
#[derive(Debug)]
pub struct Laplace {
    scope: Scope,
    blocks: Vec<KroneckerBlock>,
    squared_norm: f64,
    log_likelihood: f64,
    prior_precision: f64,
}

impl Laplace {
    /// Computes the curvature of the mean prediction on the training rows. The prior precision is 1.
    ///
    /// Taps stay on the model, also on error: remove them with a clone.
    ///
    /// If the batches are a sample of the training rows, `of_rows` is the number of all, to which the sums are
    /// scaled up.
    ///
    /// # Errors
    /// If there is no row or more than `of_rows`, the model has fewer than two outputs, a label is not one of
    /// its classes, the scope belongs to another model, or a value is not finite.
    pub fn fit(
        model: &dyn Predictor,
        scope: Scope,
        batches: &[Batch],
        of_rows: Option<usize>,
    ) -> Result<Self> {
        let scale = scale_to(of_rows, batches)?;
        let (mut sums, mut log_likelihood) = (Vec::<Sums>::new(), 0.0);
        let record = |part: &Batch| scope.record(model, part, Wanted::Curvature);
        each_part(batches, record, |part, record| {
            log_likelihood += record.log_likelihood(part)?;
            let roots = record.hessian_roots();
            for (i, layer) in record.layers.iter().enumerate() {
                let new = Sums::new(layer, &roots)?;
                match sums.get_mut(i) {
                    Some(sum) => sum.add(&new)?,
                    None => sums.push(new),
                }
            }
            Ok(())
        })?;
        let parameters = scope.parameters()?;
        let blocks = sums.par_iter().zip(&parameters).map(|(sums, (name, _))| sums.block(name, scale));
        let blocks = blocks.collect::<Result<_>>()?;
        let squares = parameters.iter().map(|(_, tensor)| ops::sum_of_squares(tensor));
        let squared_norm = squares.sum::<candle_core::Result<f64>>()?;
        let log_likelihood = scale * log_likelihood;
        Ok(Self { scope, blocks, squared_norm, log_likelihood, prior_precision: 1.0 })
    }

    /// The prior precision delta that predictions use.
    pub fn prior_precision(&self) -> f64 {
        self.prior_precision
    }

    /// Sets the prior precision.
    ///
    /// # Errors
    /// Unless it is positive and finite.
    pub fn set_prior_precision(&mut self, precision: f64) -> Result<()> {
        check::positive(PRECISION, precision)?;
        self.prior_precision = precision;
        Ok(())
    }

    /// The Laplace approximation of `ln p(D)` under a prior precision:
    ///
    /// ```text
    /// ln p(D | theta*) - delta/2 |theta*|^2 + P/2 ln delta - 1/2 ln det(H + delta 1)
    /// ```
    ///
    /// # Errors
    /// Unless the precision is positive and finite.
    pub fn log_marginal_likelihood(&self, precision: f64) -> Result<f64> {
        check::positive(PRECISION, precision)?;
        // ln(lambda + delta) - ln delta, precise where delta is much the larger.
        let volume: f64 = self.eigenvalues().map(|value| (value / precision).ln_1p()).sum();
        Ok(self.log_likelihood - 0.5 * precision * self.squared_norm - 0.5 * volume)
    }

    /// Sets the prior precision to the one within [`PRECISION_BOUNDS`](super::PRECISION_BOUNDS) that maximises
    /// [`Self::log_marginal_likelihood`], and returns it. It is the zero of
    /// `sum lambda / (lambda + delta) - delta |theta*|^2` (MacKay 1992), which decreases in delta.
    pub fn maximise_evidence(&mut self) -> f64 {
        let determined =
            |precision: f64| self.eigenvalues().map(|value| value / (value + precision)).sum::<f64>();
        self.prior_precision = most_evident(determined, self.squared_norm);
        self.prior_precision
    }

    /// Sets the prior precision to the value of `grid` whose [`Linearised::probit`] probabilities have the
    /// lowest negative log-likelihood on held-out rows (the first, if several are equal), and returns it.
    ///
    /// # Errors
    /// If the grid is empty or holds a number that is not positive, or as [`Self::fit`].
    pub fn select_precision(
        &mut self,
        model: &dyn Predictor,
        batches: &[Batch],
        grid: &[f64],
    ) -> Result<f64> {
        let mut labels = Vec::new();
        for batch in batches {
            if batch.labels.dtype().is_float() {
                return Err(Error::config("labels", "expected classes, got scores"));
            }
            labels.extend(batch.labels.to_dtype(DType::U32)?.to_vec1::<u32>()?);
        }
        let mut best: Option<(f64, f64)> = None;
        for (precision, predicted) in grid.iter().zip(self.predict_at(model, batches, grid)?) {
            let nll = crate::metrics::nll(&predicted.probit()?, &labels)?;
            if best.is_none_or(|(lowest, _)| nll < lowest) {
                best = Some((nll, *precision));
            }
        }
        let Some((_, precision)) = best else {
            return Err(Error::config("grid", "it holds no prior precision"));
        };
        self.prior_precision = precision;
        Ok(precision)
    }

    /// Predicts Gaussian logits for every row: the model's own logits, with the covariance that the uncertain
    /// weights cause.
    ///
    /// # Errors
    /// If the forward or backward pass fails, or the model is not the one of [`Self::fit`].
    pub fn predict(&self, model: &dyn Predictor, batches: &[Batch]) -> Result<Linearised> {
        Ok(self.predict_at(model, batches, &[self.prior_precision])?.remove(0))
    }

    /// [`Self::predict`] under several prior precisions, from the same backward passes.
    ///
    /// # Errors
    /// As [`Self::predict`], and if a precision is not positive and finite.
    pub fn predict_at(
        &self,
        model: &dyn Predictor,
        batches: &[Batch],
        precisions: &[f64],
    ) -> Result<Vec<Linearised>> {
        precisions.iter().try_for_each(|precision| check::positive(PRECISION, *precision))?;
        let empty = || Linearised { logits: Vec::new(), covariances: Vec::new() };
        let mut out: Vec<Linearised> = precisions.iter().map(|_| empty()).collect();
        let record = |part: &Batch| self.scope.record(model, part, Wanted::Jacobians);
        each_part(batches, record, |_, record| {
            let classes = record.logits.first().map_or(0, Vec::len);
            let mut sums = vec![vec![vec![0.0; classes * classes]; record.logits.len()]; precisions.len()];
            for (block, layer) in self.blocks.iter().zip(&record.layers) {
                block.add_covariance(layer, precisions, &mut sums)?;
            }
            for (out, covariances) in out.iter_mut().zip(sums) {
                out.logits.extend(record.logits.iter().cloned());
                out.covariances.extend(covariances);
            }
            Ok(())
        })?;
        Ok(out)
    }

    fn eigenvalues(&self) -> impl Iterator<Item = f64> + '_ {
        self.blocks.iter().flat_map(KroneckerBlock::eigenvalues)
    }
}
