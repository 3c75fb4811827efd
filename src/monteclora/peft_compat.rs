//! The numbers of PEFT 0.20/0.21 where they differ from the mathematics: everything behind
//! [`Compat::Peft`](super::Compat::Peft).
//!
//! PEFT clips the drawn variances and the variances of the weights' logits, adds the second term of eq. 12
//! instead of subtracting it, and multiplies eq. 10 by N. These numbers are reproduced on purpose, to
//! continue a run that PEFT began and to compare with it.

use candle_core::{Result, Tensor, D};
use candle_nn::ops::softmax;

use super::options::{KlEvaluation, Mixture};
use crate::dist::gaussian::kl_standard_of;
use crate::dist::{Covariance, Dirichlet, Estimator};
use crate::error::Error;
use crate::ops;

/// The value at which PEFT clips the drawn variances.
const MIN_VARIANCE: f64 = 1e-3;
/// The value at which PEFT clips the variances of the logits, and which it then adds.
const MIN_LOGIT_VARIANCE: f64 = 1e-6;

/// Checks that PEFT supports the configuration's other options.
///
/// # Errors
/// If PEFT does not support one.
pub(super) fn check(
    covariance: Covariance,
    estimator: Estimator,
    mixture: Mixture,
    evaluation: KlEvaluation,
    df_is_rank: bool,
) -> crate::Result<()> {
    let as_peft = covariance == Covariance::Diagonal
        && estimator == Estimator::LogisticNormal
        && mixture == Mixture::Explicit
        && evaluation == KlEvaluation::Sampled
        && df_is_rank;
    if !as_peft {
        return Err(Error::config(
            "compat",
            "PEFT only supports covariance diagonal, estimator logistic_normal, mixture explicit, mode \
             sampled and df = rank",
        ));
    }
    Ok(())
}

/// Computes the clipped variances `max(V q, 1e-3)`; q are the squared norms of the rows of Bartlett's T.
pub(super) fn variance(log_std: &Tensor, q: &Tensor) -> Result<Tensor> {
    at_least(&ops::mul_constant(&(log_std * 2.0)?.exp()?, q)?, MIN_VARIANCE)
}

/// Computes the diagonal of the covariance's factor, `(r)`: the square roots of the clipped variances.
pub(super) fn factor_diagonal(log_std: &Tensor, bartlett: &Tensor) -> Result<Tensor> {
    variance(log_std, &bartlett.sqr()?.sum(D::Minus1)?)?.sqrt()
}

/// Computes the mixture weights: the softmax of normals with clipped variances.
pub(super) fn weights(dirichlet: &Dirichlet, normals: &Tensor) -> Result<Tensor> {
    let (mean, variance) = dirichlet.laplace()?;
    let std = (at_least(&variance, MIN_LOGIT_VARIANCE)? + MIN_LOGIT_VARIANCE)?.sqrt()?;
    let z = normals.to_dtype(mean.dtype())?.to_device(mean.device())?;
    softmax(&(mean + ops::mul_constant(&std, &z)?)?, D::Minus1)
}

/// Computes N times eq. 10 at the clipped variances, `(l)`; `squares` are the q of [`variance`], `(l, r)`.
pub(super) fn kl_gaussian(log_std: &Tensor, squares: &Tensor, num_components: usize) -> Result<Tensor> {
    let variance = variance(log_std, squares)?;
    let r = log_std.dim(D::Minus1)?;
    kl_standard_of(&variance.sum(D::Minus1)?, &variance.log()?.sum(D::Minus1)?, r)? * num_components as f64
}

/// Combines the three terms of eq. 12, with the sign of the second one reversed.
pub(super) fn kl_dirichlet([t1, t2, t3]: [Tensor; 3]) -> Result<Tensor> {
    (t1 - t2)? + t3
}

/// Computes `max(xs, least)`, keeping NaN; candle's own maximum on CUDA turns NaN into `least`.
fn at_least(xs: &Tensor, least: f64) -> Result<Tensor> {
    let floor = (xs.detach().zeros_like()? + least)?;
    xs.detach().lt(&floor)?.where_cond(&floor, xs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    #[test]
    fn a_floor_lifts_what_is_below_it_and_keeps_nan() -> Result<()> {
        let xs = Var::new(&[f64::NAN, 0.5, 1.0, 2.0, f64::NEG_INFINITY], &Device::Cpu)?;
        let ys = at_least(&xs, 1.0)?;
        let (got, slopes) = (ys.to_vec1::<f64>()?, ys.sum_all()?.backward()?);
        assert!(got[0].is_nan() && got[1..] == [1.0, 1.0, 2.0, 1.0], "{got:?}");
        assert_eq!(slopes.get(&xs).expect("a gradient").to_vec1::<f64>()?, [1.0, 0.0, 1.0, 1.0, 0.0]);
        Ok(())
    }
}
