//! Zero-mean normal columns N(0, F F^T), given by the factor F; batched over leading dimensions.
//!
//! KL divergence: eq. 10 of the paper; its expectation over a Wishart covariance in closed form.

use candle_core::{Device, Result, Tensor, D};

use super::wishart::{Covariance, Wishart};
use crate::ops::{add_constant, mul_constant};
use crate::special::digamma;
use crate::util::dtype::to_dtype_device;

/// Matrices whose columns are independent N(0, Sigma), `Sigma = F F^T`.
///
/// # Sampling
/// `S = F Z`, Z standard normal. Differentiable in F.
#[derive(Debug, Clone)]
pub struct Gaussian {
    scale_tril: Tensor,
}

impl Gaussian {
    /// The distribution with lower triangular factor F, `(.., r, r)`, positive on the diagonal.
    ///
    /// # Errors
    /// If `scale_tril` is not square in its last two dimensions.
    pub fn new(scale_tril: &Tensor) -> Result<Self> {
        let (rows, columns) = (scale_tril.dim(D::Minus2)?, scale_tril.dim(D::Minus1)?);
        if rows != columns {
            candle_core::bail!("expected a square factor, got {:?}", scale_tril.shape())
        }
        Ok(Self { scale_tril: scale_tril.clone() })
    }

    /// The factor F, `(.., r, r)`.
    pub fn scale_tril(&self) -> &Tensor {
        &self.scale_tril
    }

    /// `F Z`.
    ///
    /// # Shapes
    /// - `z`: `(.., r, n)` standard normal
    /// - output: the same
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn rsample(&self, z: &Tensor) -> Result<Tensor> {
        self.scale_tril.broadcast_matmul(z)
    }

    /// `F F^T`, `(.., r, r)`.
    ///
    /// # Errors
    /// If candle fails.
    pub fn covariance(&self) -> Result<Tensor> {
        self.scale_tril.matmul(&self.scale_tril.transpose(D::Minus2, D::Minus1)?.contiguous()?)
    }

    /// `KL(N(0, Sigma) || N(0, I))`, eq. 10 with the standard prior; `(..)`.
    ///
    /// ```text
    /// 1/2 (tr Sigma - ln |Sigma| - r),   tr Sigma = ||F||_F^2,   ln |Sigma| = 2 sum ln F_ii
    /// ```
    ///
    /// # Errors
    /// If candle fails.
    pub fn kl_standard(&self) -> Result<Tensor> {
        let r = self.scale_tril.dim(D::Minus1)?;
        let trace = self.scale_tril.sqr()?.sum((D::Minus2, D::Minus1))?;
        let eye = Tensor::eye(r, self.scale_tril.dtype(), self.scale_tril.device())?;
        let log_det = (mul_constant(&self.scale_tril, &eye)?.sum(D::Minus1)?.log()?.sum(D::Minus1)? * 2.0)?;
        kl_standard_of(&trace, &log_det, r)
    }

    /// The expectation of [`Self::kl_standard`] over `Sigma ~ Wishart`; `(..)`.
    ///
    /// # Errors
    /// If candle fails.
    pub fn expected_kl_standard(wishart: &Wishart) -> Result<Tensor> {
        let (trace, log_det) = Self::expected_moments(wishart)?;
        kl_standard_of(&trace, &log_det, wishart.dim()?)
    }

    /// `E tr Sigma` and `E ln |Sigma|` over `Sigma ~ Wishart`, each `(..)`.
    ///
    /// ```text
    /// E tr Sigma = df sum V_i
    /// E ln |Sigma| = sum_{i < r} psi((df - i) / 2) + r ln 2 + sum ln V_i      Full
    ///              = r psi(df / 2)                 + r ln 2 + sum ln V_i      Diagonal
    /// ```
    ///
    /// # Errors
    /// If candle fails.
    pub fn expected_moments(wishart: &Wishart) -> Result<(Tensor, Tensor)> {
        let (r, df) = (wishart.dim()?, wishart.df());
        let trace = (wishart.scale()?.sum(D::Minus1)? * df)?;
        let psi: f64 = match wishart.covariance() {
            Covariance::Full => (0..r).map(|i| digamma((df - i as f64) / 2.0)).sum(),
            Covariance::Diagonal => r as f64 * digamma(df / 2.0),
        };
        let log_v = (wishart.log_std().sum(D::Minus1)? * 2.0)?;
        let log_det = (log_v + (psi + r as f64 * std::f64::consts::LN_2))?;
        Ok((trace, log_det))
    }

    /// [`Self::kl_standard`] at draws of the covariance, `(l)`: `bartlett` has one row-major factor T for
    /// each of the `l` Wisharts, from [`fill_bartlett`](super::wishart::fill_bartlett).
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn sampled_kl_standard(wishart: &Wishart, bartlett: &[&[f64]]) -> Result<Tensor> {
        let (trace, log_det) = Self::sampled_moments(wishart, bartlett)?;
        kl_standard_of(&trace, &log_det, wishart.dim()?)
    }

    /// `tr Sigma` and `ln |Sigma|` at draws of the covariance, each `(l)`; the factors are those of
    /// [`Self::sampled_kl_standard`].
    ///
    /// ```text
    /// tr Sigma = sum_i V_i |T_i|^2,   ln |Sigma| = 2 sum rho_i + 2 sum ln T_ii
    /// ```
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn sampled_moments(wishart: &Wishart, bartlett: &[&[f64]]) -> Result<(Tensor, Tensor)> {
        let (r, log_std) = (wishart.dim()?, wishart.log_std());
        let trace = mul_constant(&wishart.scale()?, &wishart.bartlett_squares(bartlett)?)?.sum(D::Minus1)?;
        let log_diagonal =
            bartlett.iter().map(|t| (0..r).map(|i| 2.0 * t[i * r + i].ln()).sum::<f64>()).collect::<Vec<_>>();
        let log_diagonal = Tensor::from_vec(log_diagonal, bartlett.len(), &Device::Cpu)?;
        let log_diagonal = to_dtype_device(&log_diagonal, log_std.dtype(), log_std.device())?;
        let log_det = add_constant(&(log_std.sum(D::Minus1)? * 2.0)?, &log_diagonal)?;
        Ok((trace, log_det))
    }
}

/// `1/2 (trace - log_det - r)`: eq. 10 against the standard normal.
///
/// # Errors
/// If the shapes differ.
pub fn kl_standard_of(trace: &Tensor, log_det: &Tensor, r: usize) -> Result<Tensor> {
    ((trace - log_det)? - r as f64)? * 0.5
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kl_of_a_small_covariance_matches_numpy() -> Result<()> {
        // python: F = np.array([[1.5, 0.], [-0.4, 0.8]]); S = F @ F.T
        //         0.5 * (np.trace(S) - np.linalg.slogdet(S)[1] - 2)   # 0.34267844320604546
        let f = Tensor::new(&[[1.5, 0.0], [-0.4, 0.8]], &Device::Cpu)?;
        let kl = Gaussian::new(&f)?.kl_standard()?.to_scalar::<f64>()?;
        assert!((kl - 0.342_678_443_206_045_46).abs() < 1e-14, "{kl}");
        let eye = Tensor::eye(3, candle_core::DType::F64, &Device::Cpu)?;
        assert_eq!(Gaussian::new(&eye)?.kl_standard()?.to_scalar::<f64>()?, 0.0);
        Ok(())
    }

    #[test]
    fn a_sample_is_the_factor_times_the_noise() -> Result<()> {
        let f = Tensor::new(&[[2.0, 0.0], [1.0, 3.0]], &Device::Cpu)?;
        let z = Tensor::new(&[[1.0, -1.0, 0.5], [2.0, 0.0, 1.0]], &Device::Cpu)?;
        let g = Gaussian::new(&f)?;
        assert_eq!(g.rsample(&z)?.to_vec2::<f64>()?, [[2.0, -2.0, 1.0], [7.0, -1.0, 3.5]]);
        assert_eq!(g.covariance()?.to_vec2::<f64>()?, [[4.0, 2.0], [2.0, 10.0]]);
        Ok(())
    }

    #[test]
    fn a_factor_that_is_not_square_is_an_error() -> Result<()> {
        let f = Tensor::zeros((2, 3), candle_core::DType::F64, &Device::Cpu)?;
        assert!(Gaussian::new(&f).unwrap_err().to_string().contains("square"));
        Ok(())
    }
}
