//! PEFT 0.20/0.21's numbers where they differ from the mathematics: all of [`Compat::Peft`](super::Compat::Peft).
//!
//! PEFT clips drawn variances and the variances of the weights' logits, adds the second term of eq. 12
//! where it should be subtracted, and multiplies eq. 10 by N. These are its numbers on purpose, to
//! continue a run that it began and to be compared with it.

use candle_core::{Result, Tensor, D};
use candle_nn::ops::softmax;

use super::options::{KlEvaluation, Mixture};
use crate::dist::gaussian::kl_standard_of;
use crate::dist::{Covariance, Dirichlet, Estimator};
use crate::error::Error;
use crate::ops;

/// PEFT clips the drawn variances here.
const LEAST_VARIANCE: f64 = 1e-3;
/// PEFT clips the variances of the logits here, and adds as much again.
const LEAST_LOGIT_VARIANCE: f64 = 1e-6;

/// Checks that PEFT has what a configuration asks for beside its numbers.
///
/// # Errors
/// If it has not.
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
            "PEFT's numbers exist for covariance diagonal, estimator logistic_normal, mixture explicit, \
             mode sampled and df = rank only",
        ));
    }
    Ok(())
}

/// The clipped variances `max(V q, 1e-3)`, elementwise: q the squared norms of the rows of Bartlett's T.
pub(super) fn variance(log_std: &Tensor, q: &Tensor) -> Result<Tensor> {
    at_least(&ops::mul_constant(&(log_std * 2.0)?.exp()?, q)?, LEAST_VARIANCE)
}

/// The covariance's factor as its diagonal, `(r)`: the roots of the clipped variances.
pub(super) fn factor_diagonal(log_std: &Tensor, bartlett: &Tensor) -> Result<Tensor> {
    variance(log_std, &bartlett.sqr()?.sum(D::Minus1)?)?.sqrt()
}

/// Mixture weights: the softmax of normals whose variances are clipped.
pub(super) fn weights(dirichlet: &Dirichlet, normals: &Tensor) -> Result<Tensor> {
    let (mean, variance) = dirichlet.laplace()?;
    let std = (at_least(&variance, LEAST_LOGIT_VARIANCE)? + LEAST_LOGIT_VARIANCE)?.sqrt()?;
    let z = normals.to_dtype(mean.dtype())?.to_device(mean.device())?;
    softmax(&(mean + ops::mul_constant(&std, &z)?)?, D::Minus1)
}

/// N times eq. 10 at the clipped variances, `(l)`: `squares` are those of [`variance`], `(l, r)`.
pub(super) fn kl_gaussian(log_std: &Tensor, squares: &Tensor, num_components: usize) -> Result<Tensor> {
    let variance = variance(log_std, squares)?;
    let r = log_std.dim(D::Minus1)?;
    kl_standard_of(&variance.sum(D::Minus1)?, &variance.log()?.sum(D::Minus1)?, r)? * num_components as f64
}

/// Eq. 12 of its three terms with the second one's sign reversed.
pub(super) fn kl_dirichlet([t1, t2, t3]: [Tensor; 3]) -> Result<Tensor> {
    (t1 - t2)? + t3
}

/// `max(xs, least)` in which NaN stays NaN: candle's own maximum on CUDA makes `least` of it.
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
