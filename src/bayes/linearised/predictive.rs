//! The linearised predictive: Gaussian logits, and the class probabilities that follow.
//!
//! ```text
//! f ~ N(f(theta*), J Sigma J^T),   p = E softmax(f)
//! ```
//!
//! Immer et al. 2021, "Improving predictions of Bayesian neural nets via local linearization".

use crate::error::{Error, Result};
use crate::metrics::softmax;
use crate::noise::{Noise, Purpose};
use crate::util::check::at_least_one;

/// Gaussian logits of some rows.
#[derive(Debug, Clone, PartialEq)]
pub struct Linearised {
    /// The means, one row per example: the model's own logits.
    pub logits: Vec<Vec<f64>>,
    /// The covariances, `(c, c)` in row-major order, one per example.
    pub covariances: Vec<Vec<f64>>,
}

impl Linearised {
    /// Averages class probabilities over `samples` draws of the logits, of which every second one has the noise
    /// of the one before with the opposite sign. Draw s of row n does not depend on the rows after it.
    ///
    /// # Errors
    /// If `samples` is 0, or a covariance is not finite or has another shape.
    pub fn probabilities(&self, samples: usize, noise: Noise) -> Result<Vec<Vec<f64>>> {
        let mut mean: Vec<Vec<f64>> = self.logits.iter().map(|row| vec![0.0; row.len()]).collect();
        self.each_draw(samples, noise, |n, p| {
            mean[n].iter_mut().zip(p).for_each(|(sum, p)| *sum += p / samples as f64);
        })?;
        Ok(mean)
    }

    /// Returns the class probabilities of each of these draws, `(s, n, c)`, for
    /// [`uncertainty`](crate::metrics::uncertainty).
    ///
    /// # Errors
    /// As [`Self::probabilities`].
    pub fn draws(&self, samples: usize, noise: Noise) -> Result<Vec<Vec<Vec<f64>>>> {
        let mut draws: Vec<Vec<Vec<f64>>> = Vec::new();
        self.each_draw(samples, noise, |n, p| {
            if n == 0 {
                draws.push(Vec::with_capacity(self.logits.len()));
            }
            if let Some(draw) = draws.last_mut() {
                draw.push(p);
            }
        })?;
        draws.resize(samples, Vec::new()); // without rows, every draw is empty
        Ok(draws)
    }

    /// Calls `take` with the index and the probabilities of every row, draw by draw.
    fn each_draw(&self, samples: usize, noise: Noise, mut take: impl FnMut(usize, Vec<f64>)) -> Result<()> {
        at_least_one("samples", samples)?;
        let classes = self.logits.first().map_or(0, Vec::len);
        let roots = self.roots(classes)?;
        let stream = noise.stream("laplace.logits", Purpose::Predict);
        let mut z = vec![0.0; self.logits.len() * classes];
        for draw in 0..samples {
            match draw % 2 {
                0 => stream.fill_normal(draw as u64 / 2, &mut z),
                _ => z.iter_mut().for_each(|z| *z = -*z),
            }
            for (n, (row, root)) in self.logits.iter().zip(&roots).enumerate() {
                let z = &z[n * classes..][..classes];
                let moved = |k: usize| row[k] + (0..=k).map(|l| root[k * classes + l] * z[l]).sum::<f64>();
                take(n, softmax(&(0..classes).map(moved).collect::<Vec<_>>()));
            }
        }
        Ok(())
    }

    /// The probit approximation without samples (MacKay 1992): `softmax_k(f_k / sqrt(1 + pi/8 var_k))`. It
    /// ignores covariances between classes.
    ///
    /// # Errors
    /// If a covariance has another shape.
    pub fn probit(&self) -> Result<Vec<Vec<f64>>> {
        let row = |(row, covariance): (&Vec<f64>, &Vec<f64>)| {
            check_shape(row, covariance)?;
            let scaled = row.iter().enumerate().map(|(k, f)| {
                let variance = covariance[k * (row.len() + 1)];
                f / (1.0 + std::f64::consts::PI / 8.0 * variance).sqrt()
            });
            Ok(softmax(&scaled.collect::<Vec<_>>()))
        };
        self.logits.iter().zip(&self.covariances).map(row).collect()
    }

    fn roots(&self, classes: usize) -> Result<Vec<Vec<f64>>> {
        if self.covariances.len() != self.logits.len() || self.logits.iter().any(|z| z.len() != classes) {
            return Err(Error::config("logits", "rows differ in length, or covariances in number"));
        }
        let root = |(row, covariance): (&Vec<f64>, &Vec<f64>)| {
            check_shape(row, covariance)?;
            cholesky(covariance, classes)
        };
        self.logits.iter().zip(&self.covariances).map(root).collect()
    }
}

fn check_shape(row: &[f64], covariance: &[f64]) -> Result<()> {
    if covariance.len() == row.len() * row.len() {
        return Ok(());
    }
    let reason = format!("{} entries for {} classes", covariance.len(), row.len());
    Err(Error::config("covariance", reason))
}

/// The lower triangular L with `L L^T = matrix`. The matrix may be singular: a pivot at rounding level gives
/// a zero column.
fn cholesky(matrix: &[f64], n: usize) -> Result<Vec<f64>> {
    if let Some(bad) = matrix.iter().find(|v| !v.is_finite()) {
        return Err(Error::config("covariance", format!("it holds {bad}")));
    }
    let mut root = vec![0.0; n * n];
    for j in 0..n {
        let dot = |root: &[f64], i: usize| (0..j).map(|k| root[i * n + k] * root[j * n + k]).sum::<f64>();
        let own = matrix[j * n + j];
        let pivot = own - dot(&root, j);
        if pivot <= 1e-14 * own.abs() {
            continue;
        }
        root[j * n + j] = pivot.sqrt();
        for i in j + 1..n {
            root[i * n + j] = (matrix[i * n + j] - dot(&root, i)) / pivot.sqrt();
        }
    }
    Ok(root)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_variance_both_are_the_softmax() -> Result<()> {
        let logits = vec![vec![1.0, -2.0, 0.5]];
        let exact = Linearised { covariances: vec![vec![0.0; 9]], logits };
        let expected = softmax(&exact.logits[0]);
        for got in [exact.probabilities(3, Noise::new(1))?, exact.probit()?] {
            got[0].iter().zip(&expected).for_each(|(p, q)| assert!((p - q).abs() < 1e-15));
        }
        Ok(())
    }

    #[test]
    fn a_root_squares_to_its_matrix_singular_or_not() -> Result<()> {
        let of = [[2.0, 0.3, -0.4], [0.3, 1.0, 0.2], [-0.4, 0.2, 3.0]].concat();
        let singular = [[1.0, 2.0, -1.0], [2.0, 4.0, -2.0], [-1.0, -2.0, 5.0]].concat();
        for matrix in [of, singular] {
            let root = cholesky(&matrix, 3)?;
            for (i, j) in (0..9).map(|at| (at / 3, at % 3)) {
                let product: f64 = (0..3).map(|k| root[i * 3 + k] * root[j * 3 + k]).sum();
                assert!((product - matrix[i * 3 + j]).abs() < 1e-14, "{root:?}");
            }
        }
        assert!(cholesky(&[f64::NAN], 1).is_err());
        Ok(())
    }

    #[test]
    fn sampled_probabilities_are_the_integral() -> Result<()> {
        // Var(f_0 - f_1) = 2 + 1 - 2 * 0.5 = 2; integrated over 4001 points on +-10 deviations.
        let gaussian =
            Linearised { logits: vec![vec![0.7, -0.5]], covariances: vec![vec![2.0, 0.5, 0.5, 1.0]] };
        let (mut top, mut weight) = (0.0, 0.0);
        for i in -2000..=2000 {
            let z = f64::from(i) / 200.0;
            let density = (-0.5 * z * z).exp();
            top += density / (1.0 + (-1.2 - 2f64.sqrt() * z).exp());
            weight += density;
        }
        let samples = 40_000;
        let got = gaussian.probabilities(samples, Noise::new(7))?;
        // The standard deviation of a probability is at most 1/2.
        assert!((got[0][0] - top / weight).abs() < 5.0 * 0.5 / (samples as f64).sqrt(), "{got:?}");
        assert_eq!(got, gaussian.probabilities(samples, Noise::new(7))?);
        assert_ne!(got, gaussian.probabilities(samples, Noise::new(8))?);
        // In pairs, the mean logit is that of the model.
        let logit = |draw: &Vec<Vec<f64>>| (draw[0][0] / draw[0][1]).ln();
        for pair in gaussian.draws(6, Noise::new(7))?.chunks(2) {
            assert!((logit(&pair[0]) + logit(&pair[1]) - 2.0 * 1.2).abs() < 1e-12);
        }
        // `draws` returns the same draws one by one, and they do not depend on the rows after them.
        let mut two = gaussian.clone();
        two.logits.push(vec![0.1, 0.2]);
        two.covariances.push(vec![1.0, 0.0, 0.0, 1.0]);
        let draws = two.draws(50, Noise::new(7))?;
        assert_eq!((draws.len(), draws[0].len()), (50, 2));
        let mean = draws.iter().map(|draw| draw[0][0]).sum::<f64>() / 50.0;
        assert!((mean - gaussian.probabilities(50, Noise::new(7))?[0][0]).abs() < 1e-14);
        assert!(gaussian.probabilities(0, Noise::new(7)).is_err());
        let short = Linearised { covariances: vec![vec![1.0]], ..gaussian };
        assert!(short.probabilities(1, Noise::new(7)).is_err() && short.probit().is_err());
        Ok(())
    }
}
