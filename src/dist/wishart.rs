//! The Wishart distribution with a diagonal scale, by Bartlett's factor; batched over leading
//! dimensions. KL divergence: eq. 11 of the paper.

use candle_core::{Device, Result, Tensor, D};
use serde::{Deserialize, Serialize};

use crate::noise::Stream;
use crate::ops::mul_constant;
use crate::special::gamma::{gamma_quantile, MAX_SHAPE};
use crate::util::dtype::to_dtype_device;

/// How much of the drawn covariance is kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Covariance {
    /// The whole matrix (the paper).
    #[default]
    Full,
    /// Its diagonal only, as the authors' code and PEFT keep: independent `V_i chi2(df)`.
    Diagonal,
}

/// `Sigma ~ Wishart_r(V, df)`, `V = diag(exp(2 rho))`.
///
/// # Sampling
/// Bartlett: T lower triangular, `T_ii = sqrt(chi2(df - i))`, `T_ij ~ N(0, 1)` below; then
/// `F = diag(exp rho) T` and `Sigma = F F^T`. Differentiable in rho, not in df.
#[derive(Debug, Clone)]
pub struct Wishart {
    log_std: Tensor,
    df: f64,
    covariance: Covariance,
}

impl Wishart {
    /// The distribution with `log_std` rho `(.., r)` and `df` degrees of freedom.
    ///
    /// # Errors
    /// Unless `r >= 1` and `df > r - 1`, and `df` is finite.
    pub fn new(log_std: &Tensor, df: f64, covariance: Covariance) -> Result<Self> {
        check_df(log_std.dim(D::Minus1)?, df)?;
        Ok(Self { log_std: log_std.clone(), df, covariance })
    }

    /// rho, `(.., r)`.
    pub fn log_std(&self) -> &Tensor {
        &self.log_std
    }

    /// The degrees of freedom.
    pub fn df(&self) -> f64 {
        self.df
    }

    /// How much of the drawn covariance is kept.
    pub fn covariance(&self) -> Covariance {
        self.covariance
    }

    /// The dimension r.
    ///
    /// # Errors
    /// If `log_std` is a scalar.
    pub fn dim(&self) -> Result<usize> {
        self.log_std.dim(D::Minus1)
    }

    /// The diagonal of V, `(.., r)`.
    ///
    /// # Errors
    /// If candle fails.
    pub fn scale(&self) -> Result<Tensor> {
        (&self.log_std * 2.0)?.exp()
    }

    /// The factor `F = diag(exp rho) T` of a draw.
    ///
    /// # Shapes
    /// - `bartlett`: `(.., r, r)`, from [`fill_bartlett`]
    /// - output: `(.., r, r)`
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn rsample(&self, bartlett: &Tensor) -> Result<Tensor> {
        mul_constant(&self.log_std.exp()?.unsqueeze(D::Minus1)?, bartlett)
    }

    /// The squared row norms of the factors T, `(l, r)`, on the parameters' device and in their dtype.
    /// Weighted by V they give the trace of a draw.
    ///
    /// # Errors
    /// If a factor does not have `r * r` numbers.
    pub fn bartlett_squares(&self, factors: &[&[f64]]) -> Result<Tensor> {
        let r = self.dim()?;
        if let Some(factor) = factors.iter().find(|factor| factor.len() != r * r) {
            candle_core::bail!("a factor of dimension {r} has {} numbers, got {}", r * r, factor.len())
        }
        let row_squares = |row: &[f64]| row.iter().map(|x| x * x).sum::<f64>();
        let squares: Vec<f64> = factors.iter().flat_map(|t| t.chunks(r).map(row_squares)).collect();
        let squares = Tensor::from_vec(squares, (factors.len(), r), &Device::Cpu)?;
        to_dtype_device(&squares, self.log_std.dtype(), self.log_std.device())
    }

    /// `E[Sigma] = df V`, its diagonal, `(.., r)`.
    ///
    /// # Errors
    /// If candle fails.
    pub fn mean(&self) -> Result<Tensor> {
        self.scale()? * self.df
    }

    /// `Var[Sigma_ij] = df (V_ij^2 + V_ii V_jj)`, `(.., r, r)`; zero off the diagonal for
    /// [`Covariance::Diagonal`].
    ///
    /// # Errors
    /// If candle fails.
    pub fn variance(&self) -> Result<Tensor> {
        let v = self.scale()?;
        let outer = v.unsqueeze(D::Minus1)?.broadcast_mul(&v.unsqueeze(D::Minus2)?)?;
        let eye = Tensor::eye(self.dim()?, v.dtype(), v.device())?;
        match self.covariance {
            Covariance::Full => outer.broadcast_mul(&(eye + 1.0)?)? * self.df,
            Covariance::Diagonal => outer.broadcast_mul(&(eye * 2.0)?)? * self.df,
        }
    }

    /// `KL(posterior || prior)` of two Wisharts with the same df, eq. 11; `(..)`.
    ///
    /// ```text
    /// df/2 (tr(V_q^-1 V_p) - ln |V_q^-1 V_p| - r)
    /// ```
    ///
    /// # Errors
    /// If dimensions or degrees of freedom differ.
    pub fn kl_divergence(&self, prior: &Self) -> Result<Tensor> {
        if self.df != prior.df {
            candle_core::bail!("eq. 11 needs equal df, got {} and {}", self.df, prior.df)
        }
        let (own, other) = (self.dim()?, prior.dim()?);
        if own != other {
            candle_core::bail!("two Wisharts of dimensions {own} and {other} have no divergence")
        }
        self.kl_of(&self.log_std.broadcast_sub(&prior.log_std)?)
    }

    /// [`Self::kl_divergence`] from the standard Wishart, V = I with the same df.
    ///
    /// # Errors
    /// If candle fails.
    pub fn kl_standard(&self) -> Result<Tensor> {
        self.kl_of(&self.log_std)
    }

    /// Eq. 11 at `V_q^-1 V_p = diag(exp(2 log_ratio))`.
    fn kl_of(&self, log_ratio: &Tensor) -> Result<Tensor> {
        let log_ratio = (log_ratio * 2.0)?;
        let trace = log_ratio.exp()?.sum(D::Minus1)?;
        let log_det = log_ratio.sum(D::Minus1)?;
        ((trace - log_det)? - self.dim()? as f64)? * (self.df / 2.0)
    }
}

fn check_df(r: usize, df: f64) -> Result<()> {
    if r == 0 {
        candle_core::bail!("a Wishart has a dimension of at least 1, got 0")
    }
    let least = r as f64 - 1.0;
    if !(df > least && df.is_finite()) {
        candle_core::bail!("a Wishart of dimension {r} needs df > {least} and finite, got {df}")
    }
    Ok(())
}

/// The number of draws of [`fill_bartlett`].
pub const DRAWS: u64 = 1 << 63;

/// Fills `out` with Bartlett's T of draw number `draw`: `r * r` numbers, row-major; diag(sqrt(chi2(df))) for
/// [`Covariance::Diagonal`].
///
/// T does not depend on V, so it can be kept while V is trained. Chi-square numbers are quantiles of the
/// stream's draw `2 * draw`; normals are those of its draw `2 * draw + 1`.
///
/// # Errors
/// If `draw` is not below [`DRAWS`], `out` does not have exactly `r * r` elements, or `df` is not above
/// `r - 1` or too large for [`gamma_quantile`].
pub fn fill_bartlett(
    stream: &Stream,
    draw: u64,
    r: usize,
    df: f64,
    covariance: Covariance,
    out: &mut [f64],
) -> Result<()> {
    check_draw(draw, r, df)?;
    if out.len() != r * r {
        candle_core::bail!("a factor of dimension {r} has {} numbers, got room for {}", r * r, out.len())
    }
    out.fill(0.0);
    let mut uniforms = vec![0.0; r];
    stream.fill_uniform(2 * draw, &mut uniforms);
    for (i, u) in uniforms.iter().enumerate() {
        let degrees = match covariance {
            Covariance::Full => df - i as f64,
            Covariance::Diagonal => df,
        };
        // chi2(k) = 2 Gamma(k / 2); the square root is taken in logarithms.
        let log_chi2 = std::f64::consts::LN_2 + gamma_quantile(degrees / 2.0, *u).log_z;
        // With few degrees of freedom left it may underflow; it must stay positive, since the KL divergence
        // takes its logarithm.
        out[i * r + i] = (0.5 * log_chi2).exp().max(f64::MIN_POSITIVE);
    }
    if covariance == Covariance::Full {
        let mut normals = vec![0.0; r * (r - 1) / 2];
        stream.fill_normal(2 * draw + 1, &mut normals);
        let mut below = normals.into_iter();
        for i in 1..r {
            for (slot, z) in out[i * r..i * r + i].iter_mut().zip(&mut below) {
                *slot = z;
            }
        }
    }
    Ok(())
}

/// Checks that [`fill_bartlett`] has this draw.
pub(crate) fn check_draw(draw: u64, r: usize, df: f64) -> Result<()> {
    check_df(r, df)?;
    if df / 2.0 > MAX_SHAPE {
        candle_core::bail!("a Wishart can be drawn with df up to {:e}, got {df:e}", 2.0 * MAX_SHAPE)
    }
    if draw >= DRAWS {
        candle_core::bail!("expected a draw below 2^63, got {draw}")
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::{Noise, Purpose};

    #[test]
    fn the_kl_from_the_standard_matches_numpy() -> Result<()> {
        // python: V = np.exp(2 * np.array([0.3, -0.5, 0.1])); 4.5 / 2 * (V.sum() - np.log(V).sum() - 3)
        let rho = Tensor::new(&[0.3, -0.5, 0.1], &Device::Cpu)?;
        let kl = Wishart::new(&rho, 4.5, Covariance::Full)?.kl_standard()?.to_scalar::<f64>()?;
        assert!((kl - KL).abs() < 1e-13, "{kl}");
        Ok(())
    }

    #[test]
    fn distributions_of_several_dimensions_have_no_divergence() -> Result<()> {
        let of = |r: usize| {
            let rho = Tensor::zeros(r, candle_core::DType::F64, &Device::Cpu)?;
            Wishart::new(&rho, 9.0, Covariance::Full)
        };
        let error = of(1)?.kl_divergence(&of(8)?).unwrap_err().to_string();
        assert!(error.contains("1 and 8"), "{error}");
        assert!(of(0).unwrap_err().to_string().contains("at least 1"));
        Ok(())
    }

    const KL: f64 = 1.3756522493747718;

    #[test]
    fn degrees_of_freedom_at_or_below_the_dimension_less_one_are_an_error() -> Result<()> {
        let rho = Tensor::zeros(3, candle_core::DType::F64, &Device::Cpu)?;
        assert!(Wishart::new(&rho, 2.0, Covariance::Full).unwrap_err().to_string().contains("df > 2"));
        for df in [f64::NAN, f64::INFINITY] {
            let error = Wishart::new(&rho, df, Covariance::Full).unwrap_err().to_string();
            assert!(error.contains(&format!("finite, got {df}")), "{error}");
        }
        assert!(Wishart::new(&rho, 2.01, Covariance::Full).is_ok());
        Ok(())
    }

    #[test]
    fn the_noise_is_lower_triangular_and_addressed() -> Result<()> {
        let stream = Noise::new(1).stream("x", Purpose::Wishart);
        let fill = |draw, covariance| {
            let mut t = [9.0; 9];
            fill_bartlett(&stream, draw, 3, 3.0, covariance, &mut t).map(|()| t)
        };
        let t = fill(4, Covariance::Full)?;
        assert_eq!(t, fill(4, Covariance::Full)?);
        assert_ne!(t, fill(5, Covariance::Full)?);
        assert!(t[1] == 0.0 && t[2] == 0.0 && t[5] == 0.0);
        assert!(t[3] != 0.0 && t[6] != 0.0 && t[7] != 0.0 && t[0] > 0.0 && t[4] > 0.0 && t[8] > 0.0);
        let d = fill(4, Covariance::Diagonal)?;
        assert!(d[3] == 0.0 && d[6] == 0.0 && d[7] == 0.0 && d[0] == t[0] && d[8] > t[8]);
        Ok(())
    }

    #[test]
    fn noise_that_does_not_exist_or_does_not_fit_is_an_error() {
        let stream = Noise::new(1).stream("x", Purpose::Wishart);
        let error = |draw, df, len| {
            let mut t = vec![0.0; len];
            fill_bartlett(&stream, draw, 3, df, Covariance::Full, &mut t).unwrap_err().to_string()
        };
        assert!(error(DRAWS, 3.0, 9).contains("draw below 2^63"));
        for len in [0, 8, 10] {
            assert!(error(0, 3.0, len).contains(&format!("has 9 numbers, got room for {len}")));
        }
        assert!(error(0, 2.0, 9).contains("df > 2"));
        assert!(error(0, f64::INFINITY, 9).contains("finite, got inf"));
        assert!(error(0, 1e12, 9).contains("df up to 2e9, got 1e12"));
    }
}
