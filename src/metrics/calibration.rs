//! How reliable the expected calibration error (ECE) is: its floor, and an estimate with less bias.
//!
//! Over finitely many rows the gap of every bin is partly chance, and absolute values never cancel: even a
//! perfectly calibrated model has an ECE above 0, the larger the fewer rows there are.

use super::{argmax, check_probabilities, ECE_BINS};
use crate::error::Result;

/// The largest number of rows in a bin for the exact distribution; larger bins use the normal approximation.
const EXACT: usize = 1024;

/// The expected ECE (see [`super::ece`]) of these predictions if they are calibrated, that is if every row is
/// right with its top probability, independently of the others.
///
/// ```text
/// floor = sum_b E|K_b - sum_(n in b) p_n| / N,   K_b the sum of Bernoulli(p_n)
/// ```
///
/// The distribution of K (Poisson binomial) is exact up to 1024 rows in a bin, and normal beyond.
///
/// # Errors
/// As [`super::Metrics::classification`], except for labels.
pub fn ece_floor(probabilities: &[Vec<f64>]) -> Result<f64> {
    check_probabilities(probabilities, &vec![0; probabilities.len()])?;
    let mut bins = vec![Vec::new(); ECE_BINS];
    for row in probabilities {
        let top = row[argmax(row)].min(1.0);
        bins[confidence_bin(top)].push(top);
    }
    Ok(bins.iter().map(|bin| expected_gap(bin)).sum::<f64>() / probabilities.len() as f64)
}

/// The expected calibration error with less bias: from each bin's gap, the part due to chance in the labels
/// is subtracted. Kumar et al. 2019 ("Verified uncertainty calibration") estimate that part for the absolute
/// error with normal labels:
///
/// ```text
/// sum_b n_b/N (2 |a_b - c_b| - E|Z_b|),   Z_b ~ N(a_b - c_b, a_b (1 - a_b) / n_b)
/// ```
///
/// a is a bin's accuracy, c its mean top probability; the bins are those of [`super::ece`]. The expectation
/// is in closed form, where the authors' code samples. The result may be negative, as any estimate with
/// little bias must be if the truth is 0. If a bin's gap has the standard error s, the remaining bias is
/// 0.47 s at a true gap of 0 (0.80 s without the correction), -0.09 s (overcorrected) at a gap of 1.4 s, and
/// none from 3 s on.
///
/// # Errors
/// As [`super::Metrics::classification`].
pub fn ece_debiased(probabilities: &[Vec<f64>], labels: &[u32]) -> Result<f64> {
    check_probabilities(probabilities, labels)?;
    let mut bins = ConfidenceBins::default();
    for (row, label) in probabilities.iter().zip(labels) {
        let class = argmax(row);
        bins.add(confidence_bin(row[class]), row[class], class == *label as usize, 1.0);
    }
    Ok(bins.debiased())
}

/// Returns the bin `(low, high]` of a top probability; bins have equal width. The probability is compared
/// with the bounds instead of multiplied, so that rounding does not move a row into another bin.
pub(crate) fn confidence_bin(top: f64) -> usize {
    (1..ECE_BINS).filter(|k| top > *k as f64 / ECE_BINS as f64).count()
}

/// Sums over rows by confidence bin. Weights count how often a resample contains each row.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct ConfidenceBins {
    rows: [f64; ECE_BINS],
    confidence: [f64; ECE_BINS],
    right: [f64; ECE_BINS],
}

impl ConfidenceBins {
    /// Adds a row to a bin.
    #[inline]
    pub fn add(&mut self, bin: usize, confidence: f64, right: bool, weight: f64) {
        self.rows[bin] += weight;
        self.confidence[bin] += weight * confidence;
        self.right[bin] += if right { weight } else { 0.0 };
    }

    /// As [`ece_debiased`]; NaN if there is no row.
    pub fn debiased(&self) -> f64 {
        let bin = |b: usize| {
            let rows = self.rows[b];
            if rows <= 0.0 {
                return 0.0;
            }
            let (accuracy, confidence) = (self.right[b] / rows, self.confidence[b] / rows);
            let gap = accuracy - confidence;
            // Rounding may leave an accuracy above 1.
            let sd = (accuracy * (1.0 - accuracy) / rows).max(0.0).sqrt();
            rows * (2.0 * gap.abs() - folded_mean(gap, sd))
        };
        (0..ECE_BINS).map(bin).sum::<f64>() / self.rows.iter().sum::<f64>()
    }
}

/// `E|Z|` of a normal Z: `s sqrt(2/pi) exp(-m^2 / 2 s^2) + m erf(m / s sqrt 2)`.
fn folded_mean(mean: f64, sd: f64) -> f64 {
    if sd == 0.0 {
        return mean.abs();
    }
    let t = mean / (sd * std::f64::consts::SQRT_2);
    sd * (2.0 / std::f64::consts::PI).sqrt() * (-t * t).exp() + mean * libm::erf(t)
}

/// `E|K - E K|`, where K is the number of successes of independent trials.
fn expected_gap(shares: &[f64]) -> f64 {
    if shares.len() > EXACT {
        let variance: f64 = shares.iter().map(|p| p * (1.0 - p)).sum();
        return folded_mean(0.0, variance.sqrt());
    }
    let mut law = vec![0.0; shares.len() + 1];
    law[0] = 1.0;
    for (trials, p) in shares.iter().enumerate() {
        for k in (0..=trials + 1).rev() {
            let fewer = if k > 0 { law[k - 1] } else { 0.0 };
            law[k] = law[k] * (1.0 - p) + fewer * p;
        }
    }
    let mean: f64 = shares.iter().sum();
    law.iter().enumerate().map(|(k, share)| share * (k as f64 - mean).abs()).sum()
}

#[cfg(test)]
mod tests {
    use super::super::ece;
    use super::*;
    use crate::noise::{Noise, Purpose};

    fn close(got: f64, want: f64) {
        assert!((got - want).abs() <= 1e-13 * want.abs().max(1.0), "{got} is not {want}");
    }

    #[test]
    fn the_gap_of_few_trials_is_counted_by_hand_and_of_many_nearly_normal() {
        // K is 0, 1, 2 with probabilities 0.06, 0.38, 0.56; its mean is 1.5.
        close(expected_gap(&[0.8, 0.7]), 0.06 * 1.5 + 0.38 * 0.5 + 0.56 * 0.5);
        close(expected_gap(&[1.0, 1.0]), 0.0);
        // n = 1024, p = [(i % 97) / 97 for i in range(n)]; the normal approximation is
        // sqrt(2/pi * sum p (1 - p)).
        let many: Vec<f64> = (0..EXACT).map(|i| (i % 97) as f64 / 97.0).collect();
        let (exact, normal) = (expected_gap(&many), expected_gap(&[&many[..], &[0.0]].concat()));
        assert!((exact / normal - 1.0).abs() < 1e-3 && exact != normal, "{exact} {normal}");
    }

    #[test]
    fn the_debiased_error_is_that_of_scipys_folded_normal() -> Result<()> {
        // P = np.array([[.7,.2,.1],[.1,.6,.3],[.2,.5,.3],[.05,.05,.9],[.68,.3,.02],[.35,.4,.25],[.69,.2,.11],
        // [.92,.04,.04]]); L = np.array([0,2,1,2,1,1,0,0]); c = P.max(1); a = P.argmax(1) == L
        // b = np.ceil(c * 15); for each value k of b, m = b == k, n = m.sum(), A = a[m].mean(),
        // d = A - c[m].mean(), s = np.sqrt(A * (1 - A) / n): the sum of n / 8 * (2 * abs(d) - e), where e is
        // scipy.stats.foldnorm.mean(abs(d) / s, scale=s), or abs(d) where s is 0
        let rows = [
            [0.7, 0.2, 0.1],
            [0.1, 0.6, 0.3],
            [0.2, 0.5, 0.3],
            [0.05, 0.05, 0.9],
            [0.68, 0.3, 0.02],
            [0.35, 0.4, 0.25],
            [0.69, 0.2, 0.11],
            [0.92, 0.04, 0.04],
        ];
        close(ece_debiased(&rows.map(Vec::from), &[0, 2, 1, 2, 1, 1, 0, 0])?, 0.17076716214528675);
        assert!(ece_floor(&[]).is_err() && ece_debiased(&rows.map(Vec::from), &[0]).is_err());
        Ok(())
    }

    /// Rows of two classes with a top probability between 0.5 and 1, and labels that are right with the top
    /// probability less `shift`.
    fn drawn(rows: usize, shift: f64, draw: u64) -> (Vec<Vec<f64>>, Vec<u32>) {
        let (mut tops, mut labels) = (vec![0.0; rows], vec![0.0; rows]);
        Noise::new(1).stream("tops", Purpose::Predict).fill_uniform(0, &mut tops);
        Noise::new(1).stream("labels", Purpose::Predict).fill_uniform(draw, &mut labels);
        let top = |u: &f64| 0.5 + 0.5 * u * u;
        let right = labels.iter().zip(&tops).map(|(u, v)| u32::from(*u > top(v) - shift));
        (tops.iter().map(|u| vec![top(u), 1.0 - top(u)]).collect(), right.collect())
    }

    /// The mean ECE and the mean debiased ECE over draws of the labels, and the standard error of the first.
    fn means(shift: f64) -> Result<[f64; 3]> {
        const TIMES: u64 = 3000;
        let (mut plain, mut square, mut debiased) = (0.0, 0.0, 0.0);
        for draw in 0..TIMES {
            let (p, labels) = drawn(300, shift, draw);
            let error = ece(&p, &labels)?;
            (plain, square) = (plain + error, square + error * error);
            debiased += ece_debiased(&p, &labels)?;
        }
        let (times, plain) = (TIMES as f64, plain / TIMES as f64);
        Ok([plain, debiased / times, ((square / times - plain * plain) / times).sqrt()])
    }

    #[test]
    fn the_floor_is_the_mean_error_of_calibrated_rows_and_the_correction_takes_off_what_it_says() -> Result<()>
    {
        let [plain, debiased, error] = means(0.0)?;
        let floor = ece_floor(&drawn(300, 0.0, 0).0)?;
        assert!(((plain - floor) / error).abs() < 4.0, "{plain} {floor} {error}");
        // With normal labels a share of 2 - sqrt 2 of the error remains.
        assert!((debiased / plain - (2.0 - 2f64.sqrt())).abs() < 0.02, "{plain} {debiased}");
        // Gaps near their standard error: the correction overshoots, by no more than the plain ECE is off.
        let [plain, debiased, error] = means(0.1)?;
        assert!(
            debiased < 0.1 && 0.1 < plain && 0.1 - debiased < plain - 0.1 + 4.0 * error,
            "{plain} {debiased}"
        );
        Ok(())
    }
}
