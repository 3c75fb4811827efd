//! The evidence bound: the divergence of the posterior, with the covariance that the draws have, from a prior
//! of given width. All columns of A and its mean count.
//!
//! ```text
//! task + tau / n sum_layers (KL_A [+ KL_W + KL_D])
//! KL_A = 1/2 { in_dim [tr C / s_p^2 - r - ln |C| + r ln s_p^2] + ||A||_F^2 / s_p^2 },   C = eps^2 ||pi||^2 Sigma
//! ```
//!
//! The prior is A ~ N(0, s_p^2) by element, independent of Sigma ~ Wishart(I, df) and pi ~ Dir(b). Sigma and
//! pi are latent in both prior and posterior, and the likelihood depends on them only through A. So KL_A +
//! KL_W + KL_D is an upper bound of the divergence between the marginals of A. By convexity, the expectation
//! of KL_A alone is an upper bound too, and a tighter one.

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::options::Mixture;
use crate::adapter::LowRank;
use crate::dist::Dirichlet;
use crate::error::Result;
use crate::ops::{self, add_constant, mul_constant};
use crate::util::check::positive;
use crate::util::dtype::to_dtype_device;

/// The options of the evidence bound.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvidenceBound {
    /// s_p, the prior's standard deviation of an element of A.
    pub std: f64,
    /// The temperature tau: 1 is the bound itself, smaller values give a colder posterior.
    pub temperature: f64,
    /// Whether KL_W and KL_D are added: a bound on the joint divergence in place of the tighter one.
    #[serde(default)]
    pub latents: bool,
}

impl EvidenceBound {
    /// Checks the width and the temperature.
    ///
    /// # Errors
    /// Unless both are positive and finite; the error names the wrong one.
    pub fn validate(&self) -> Result<()> {
        positive("evidence.std", self.std)?;
        positive("evidence.temperature", self.temperature)
    }

    /// Computes KL_A, summed over layers of one shape.
    ///
    /// # Shapes
    /// - `trace`, `log_det`: tr Sigma and ln |Sigma|, `(l)`
    /// - `mixture`: the moments of the layers' weights
    /// - output: a scalar
    ///
    /// # Errors
    /// If candle fails.
    pub(super) fn divergence(
        &self,
        pairs: &[&LowRank],
        (trace, log_det): (&Tensor, &Tensor),
        mixture: &MixtureMoments,
        eps: &[f64],
    ) -> Result<Tensor> {
        let (rank, in_dim) = pairs[0].a().dims2()?;
        let (r, columns, precision) = (rank as f64, in_dim as f64, self.std.powi(-2));
        let constant = |of: &dyn Fn(f64) -> f64| per_layer(eps.iter().map(|eps| of(*eps)).collect(), trace);
        let spread = mul_constant(&(trace * &mixture.square)?, &constant(&|eps| eps * eps * precision)?)?;
        let volume = (log_det + (&mixture.log_square * r)?)?;
        let volume = add_constant(&volume, &constant(&|eps| r * (2.0 * eps.ln() + precision.ln()))?)?;
        let perturbation = (((spread - volume)?.sum_all()? - r * eps.len() as f64)? * columns)?;
        let means =
            pairs.iter().map(|pair| pair.a().sqr()?.sum_all()).collect::<candle_core::Result<Vec<_>>>()?;
        let mean = (Tensor::stack(&means, 0)?.sum_all()? * precision)?;
        Ok(((perturbation + mean)? * 0.5)?)
    }
}

/// The moments `||pi||^2` and `ln ||pi||^2`, drawn or in expectation, each `(l)`.
pub(super) struct MixtureMoments {
    pub square: Tensor,
    pub log_square: Tensor,
}

impl MixtureMoments {
    /// Computes the moments at drawn weights `(l, N)`, or in expectation: `E ||pi||^2`, and a lower bound of
    /// `E ln ||pi||^2`. KL_A decreases in the logarithm, so that only a lower bound keeps KL_A an upper
    /// bound.
    ///
    /// # Errors
    /// If candle fails.
    pub fn new(
        mixture: Mixture,
        dirichlet: &Dirichlet,
        weights: Option<&Tensor>,
    ) -> candle_core::Result<Self> {
        if mixture == Mixture::Sparse {
            // One component with weight one. The concentration still gets its zero gradient.
            let square = ops::scale(&dirichlet.expected_cooperative()?, 0.0)?;
            return Ok(Self { log_square: square.clone(), square: (square + 1.0)? });
        }
        Ok(match weights {
            Some(weights) => {
                let square = Dirichlet::cooperative(weights)?;
                Self { log_square: square.log()?, square }
            }
            None => Self {
                square: dirichlet.expected_cooperative()?,
                log_square: dirichlet.expected_entropy()?.neg()?,
            },
        })
    }
}

/// One constant per layer, `(l)`, on the device of `like` and in its dtype.
fn per_layer(values: Vec<f64>, like: &Tensor) -> candle_core::Result<Tensor> {
    let values = Tensor::from_vec(values, like.dims1()?, &Device::Cpu)?;
    to_dtype_device(&values, like.dtype(), like.device())
}

/// Computes the expected squared norms of the rows of the perturbation, `(l, r)`: `in_dim eps^2 ||pi||^2 df
/// V_i`, from V, the `scale` `(l, r)`.
///
/// # Errors
/// If candle fails.
pub(super) fn row_variances(
    scale: &Tensor,
    (in_dim, df): (usize, f64),
    mixture: &MixtureMoments,
    eps: &[f64],
) -> candle_core::Result<Tensor> {
    let factors = per_layer(eps.iter().map(|eps| in_dim as f64 * eps * eps * df).collect(), &mixture.square)?;
    scale.broadcast_mul(&mul_constant(&mixture.square, &factors)?.unsqueeze(1)?)
}
