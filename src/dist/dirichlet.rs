//! The Dirichlet distribution, parametrised by the logarithm of its concentration; batched over leading
//! dimensions. Draws have three named estimators; KL divergence: eq. 12 of the paper.

use candle_core::{Device, Result, Tensor, D};
use candle_nn::ops::softmax;
use serde::{Deserialize, Serialize};

use crate::noise::Stream;
use crate::ops::{add_constant, mul_constant};
use crate::special::ln_gamma;
use crate::special::tensor::{digamma_of, ln_gamma_of, normalised_gamma_rsample};

/// How a draw is computed from noise, so that gradients reach the concentration.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Estimator {
    /// Normalised gamma quantiles with their implicit derivative: exactly a Dirichlet.
    #[default]
    Exact,
    /// `y_i = -a_i ln u_i`, normalised (the paper, appendix C.3): a Dirichlet only at a = 1.
    Exponential,
    /// The softmax of a normal, Laplace's approximation with a diagonal covariance (the authors'
    /// code and PEFT).
    LogisticNormal,
}

impl Estimator {
    /// Fills the noise of draw number `draw`: normals for [`Self::LogisticNormal`], uniform
    /// numbers for the others.
    pub fn fill_noise(self, stream: &Stream, draw: u64, out: &mut [f64]) {
        match self {
            Self::Exact | Self::Exponential => stream.fill_uniform(draw, out),
            Self::LogisticNormal => stream.fill_normal(draw, out),
        }
    }
}

/// `pi ~ Dir(a)`, `a = exp(c)`.
///
/// # Sampling
/// See [`Estimator`]; differentiable in c.
#[derive(Debug, Clone)]
pub struct Dirichlet {
    log_concentration: Tensor,
}

impl Dirichlet {
    /// The distribution with log concentration c, `(.., N)`.
    ///
    /// # Errors
    /// If `log_concentration` is a scalar.
    pub fn new(log_concentration: &Tensor) -> Result<Self> {
        log_concentration.dim(D::Minus1)?;
        Ok(Self { log_concentration: log_concentration.clone() })
    }

    /// The concentration a, `(.., N)`.
    ///
    /// # Errors
    /// If candle fails.
    pub fn concentration(&self) -> Result<Tensor> {
        self.log_concentration.exp()
    }

    /// `E[pi] = a / sum a`, `(.., N)`.
    ///
    /// # Errors
    /// If candle fails.
    pub fn mean(&self) -> Result<Tensor> {
        softmax(&self.log_concentration, D::Minus1)
    }

    /// `Var[pi_i] = m_i (1 - m_i) / (a0 + 1)`, m the mean and a0 the sum of a; `(.., N)`.
    ///
    /// # Errors
    /// If candle fails.
    pub fn variance(&self) -> Result<Tensor> {
        let mean = self.mean()?;
        let total = self.concentration()?.sum_keepdim(D::Minus1)?;
        (&mean * mean.affine(-1.0, 1.0)?)?.broadcast_div(&(total + 1.0)?)
    }

    /// The cooperative loss of drawn weights (eq. 13), `sum pi_i^2`, `(..)` of `(.., N)`.
    ///
    /// # Errors
    /// If `weights` is a scalar.
    pub fn cooperative(weights: &Tensor) -> Result<Tensor> {
        weights.sqr()?.sum(D::Minus1)
    }

    /// The expectation of the cooperative loss (eq. 13) over Dir(a); `(..)`.
    ///
    /// ```text
    /// E[sum pi_i^2] = sum a_i (a_i + 1) / (a0 (a0 + 1)),   a0 = sum a
    /// ```
    ///
    /// # Errors
    /// If candle fails.
    pub fn expected_cooperative(&self) -> Result<Tensor> {
        let a = self.concentration()?;
        let total = a.sum(D::Minus1)?;
        (&a * (&a + 1.0)?)?.sum(D::Minus1)? / (&total * (&total + 1.0)?)?
    }

    /// The expected entropy of the weights, `E[-sum pi_i ln pi_i]` over Dir(a), in nats; `(..)`.
    ///
    /// ```text
    /// psi(a0 + 1) - sum (a_i / a0) psi(a_i + 1),   a0 = sum a
    /// ```
    ///
    /// Its negative bounds `E[ln ||pi||^2]`, which has no closed form, from below (Jensen:
    /// `||pi||^2 = sum pi_i pi_i`).
    ///
    /// # Errors
    /// If candle fails.
    pub fn expected_entropy(&self) -> Result<Tensor> {
        let a = self.concentration()?;
        let own = (self.mean()? * digamma_of(&(&a + 1.0)?)?)?.sum(D::Minus1)?;
        digamma_of(&(a.sum(D::Minus1)? + 1.0)?)? - own
    }

    /// A draw of mixture weights.
    ///
    /// # Shapes
    /// - `noise`: that of c, f64 on the host, from [`Estimator::fill_noise`]
    /// - output: that of c, non-negative, summing to one over the last dimension
    ///
    /// # Errors
    /// If the shapes differ.
    pub fn rsample(&self, estimator: Estimator, noise: &Tensor) -> Result<Tensor> {
        let c = &self.log_concentration;
        if noise.shape() != c.shape() {
            candle_core::bail!("noise of shape {:?} for concentrations {:?}", noise.shape(), c.shape())
        }
        let n = c.dim(D::Minus1)?;
        if n == 1 {
            return c.ones_like(); // one weight is one; the normal below would have variance zero
        }
        let like_c = |x: Tensor| x.to_dtype(c.dtype())?.to_device(c.device());
        let logits = match estimator {
            Estimator::Exact => {
                let uniforms = noise.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f64>()?;
                return normalised_gamma_rsample(c, uniforms);
            }
            // ln y = c + ln(-ln u)
            Estimator::Exponential => add_constant(c, &like_c(noise.log()?.neg()?.log()?)?)?,
            Estimator::LogisticNormal => {
                let (mean, variance) = self.laplace()?;
                (mean + mul_constant(&variance.sqrt()?, &like_c(noise.clone())?)?)?
            }
        };
        softmax(&logits, D::Minus1)
    }

    /// Mean and variance of the logits in Laplace's approximation, each `(.., N)`.
    ///
    /// ```text
    /// mean_i = ln a_i - mean(ln a),   variance_i = (1 - 2/N) / a_i + sum(1/a) / N^2
    /// ```
    ///
    /// # Errors
    /// If candle fails.
    pub fn laplace(&self) -> Result<(Tensor, Tensor)> {
        let c = &self.log_concentration;
        let n = c.dim(D::Minus1)? as f64;
        let inverse = c.neg()?.exp()?;
        let mean = c.broadcast_sub(&c.mean_keepdim(D::Minus1)?)?;
        let shared = (inverse.sum_keepdim(D::Minus1)? / (n * n))?;
        let variance = (inverse * (1.0 - 2.0 / n))?.broadcast_add(&shared)?;
        Ok((mean, variance))
    }

    /// `KL(posterior || prior)`, eq. 12; `(..)`. Shapes broadcast.
    ///
    /// ```text
    /// t1 = ln Gamma(sum a) - ln Gamma(sum b)
    /// t2 = sum (ln Gamma(b_i) - ln Gamma(a_i))
    /// t3 = sum (a_i - b_i) (psi(a_i) - psi(sum a))
    /// ```
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn kl_divergence(&self, prior: &Self) -> Result<Tensor> {
        Self::kl_of_terms(self.kl_terms(prior)?)
    }

    /// The sum of the three terms of [`Self::kl_divergence`].
    ///
    /// # Errors
    /// If the shapes differ.
    pub fn kl_of_terms([t1, t2, t3]: [Tensor; 3]) -> Result<Tensor> {
        (t1 + t2)? + t3
    }

    /// The three terms of [`Self::kl_divergence`].
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn kl_terms(&self, prior: &Self) -> Result<[Tensor; 3]> {
        let c = &self.log_concentration;
        let prior = Self::new(&prior.log_concentration.broadcast_as(c.shape())?)?;
        let b = prior.concentration()?;
        let [prior_total, prior_sum] = sums_of(&ln_gamma_of(&with_total(&b)?)?)?;
        let (a, [total, sum], psi) = self.gammas()?;
        let t1 = add_constant(&total, &prior_total.neg()?)?;
        let t2 = add_constant(&sum.neg()?, &prior_sum)?;
        let t3 = (add_constant(&a, &b.neg()?)? * psi)?.sum(D::Minus1)?;
        Ok([t1, t2, t3])
    }

    /// The same three terms against the symmetric prior Dir(b, .., b). The prior's part is computed as plain
    /// numbers on the host, so it needs no GPU kernel or synchronisation.
    ///
    /// # Errors
    /// If candle fails.
    pub fn kl_terms_symmetric(&self, b: f64) -> Result<[Tensor; 3]> {
        let n = self.log_concentration.dim(D::Minus1)? as f64;
        let (a, [total, sum], psi) = self.gammas()?;
        let t1 = (total - ln_gamma(n * b))?;
        let t2 = (sum.neg()? + n * ln_gamma(b))?;
        let t3 = ((a - b)? * psi)?.sum(D::Minus1)?;
        Ok([t1, t2, t3])
    }

    /// Returns a; `ln Gamma(sum a)` and `sum ln Gamma(a_i)`; `psi(a_i) - psi(sum a)`. All ln Gamma are one op
    /// and all psi another, to limit the trips to the host.
    fn gammas(&self) -> Result<(Tensor, [Tensor; 2], Tensor)> {
        let a = self.concentration()?;
        let (all, n) = (with_total(&a)?, a.dim(D::Minus1)?);
        let psi = digamma_of(&all)?;
        let psi = psi.narrow(D::Minus1, 0, n)?.broadcast_sub(&psi.narrow(D::Minus1, n, 1)?)?;
        Ok((a, sums_of(&ln_gamma_of(&all)?)?, psi))
    }
}

/// Appends the sum over the last dimension: `(.., n)` becomes `(.., n + 1)`.
fn with_total(a: &Tensor) -> Result<Tensor> {
    Tensor::cat(&[a, &a.sum_keepdim(D::Minus1)?], D::Minus1)
}

/// The last element of `(.., n + 1)`, and the sum of the others.
fn sums_of(x: &Tensor) -> Result<[Tensor; 2]> {
    let n = x.dim(D::Minus1)? - 1;
    Ok([x.narrow(D::Minus1, n, 1)?.squeeze(D::Minus1)?, x.narrow(D::Minus1, 0, n)?.sum(D::Minus1)?])
}
