//! The Wilcoxon signed-rank test.

/// The result of the Wilcoxon signed-rank test.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Wilcoxon {
    /// The number of differences that are not zero; zeros are dropped (Wilcoxon 1945).
    pub n: usize,
    /// The sum of the ranks of the positive differences.
    pub positive: f64,
    /// The sum of the ranks of the negative differences.
    pub negative: f64,
    /// The two-sided p-value.
    pub p: f64,
    /// The one-sided p-value for the alternative that differences tend to be positive.
    pub p_greater: f64,
}

impl Wilcoxon {
    /// The smallest two-sided p-value that this number of differences can give.
    pub fn least_p(&self) -> f64 {
        (2.0 / 2f64.powi(self.n as i32)).min(1.0)
    }
}

/// The most differences for which the null distribution is computed exactly.
const EXACT: usize = 50;

/// The Wilcoxon signed-rank test of paired differences. Ties have their mean rank. Up to 50 differences the
/// p-values are exact, with or without ties (scipy's are exact without ties, and with ties up to 13
/// differences); beyond, they use a normal approximation with the variance corrected for ties, like scipy's.
/// Returns `None` without a difference that is not zero, or with a NaN.
pub fn wilcoxon(differences: &[f64]) -> Option<Wilcoxon> {
    let mut kept: Vec<f64> = differences.iter().copied().filter(|d| *d != 0.0).collect();
    if kept.is_empty() || kept.iter().any(|d| d.is_nan()) {
        return None;
    }
    kept.sort_by(|a, b| a.abs().total_cmp(&b.abs()));
    // Doubled ranks are integers even for ties.
    let (mut ranks, mut ties) = (Vec::with_capacity(kept.len()), 0.0);
    for group in kept.chunk_by(|a, b| a.abs() == b.abs()) {
        let (first, count) = (ranks.len() + 1, group.len());
        ranks.extend(std::iter::repeat_n(2 * first + count - 1, count));
        ties += (count * count * count - count) as f64;
    }
    let of_sign = |positive: bool| -> usize {
        kept.iter().zip(&ranks).filter(|(d, _)| (**d > 0.0) == positive).map(|(_, rank)| rank).sum()
    };
    let (plus, minus) = (of_sign(true), of_sign(false));
    let n = kept.len();
    let (p, p_greater) =
        if n <= EXACT { exact(&ranks, plus, minus) } else { normal(n as f64, ties, plus as f64 / 2.0) };
    Some(Wilcoxon { n, positive: plus as f64 / 2.0, negative: minus as f64 / 2.0, p, p_greater })
}

/// The exact p-values, by counting the sign patterns that give each sum: all 2^n are equally likely.
fn exact(ranks: &[usize], plus: usize, minus: usize) -> (f64, f64) {
    let mut share = vec![0.0; plus + minus + 1];
    share[0] = 1.0;
    for rank in ranks {
        for sum in (0..share.len()).rev() {
            let other = if sum >= *rank { share[sum - rank] } else { 0.0 };
            share[sum] = (share[sum] + other) / 2.0;
        }
    }
    let at_least = |sum: usize| share[sum..].iter().sum::<f64>().min(1.0);
    ((2.0 * at_least(plus.max(minus))).min(1.0), at_least(plus))
}

fn normal(n: f64, ties: f64, plus: f64) -> (f64, f64) {
    let mean = n * (n + 1.0) / 4.0;
    let variance = n * (n + 1.0) * (2.0 * n + 1.0) / 24.0 - ties / 48.0;
    let z = (plus - mean) / variance.sqrt();
    let upper = |z: f64| 0.5 * libm::erfc(z / std::f64::consts::SQRT_2);
    ((2.0 * upper(z.abs())).min(1.0), upper(z))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The expected values are from SciPy 1.17.1's `wilcoxon(d)` and `wilcoxon(d, alternative="greater")`.
    #[test]
    fn the_signed_rank_test_is_scipys() -> Result<(), &'static str> {
        let few = [1.1, -0.4, 2.3, 0.7, 3.1, -1.9, 0.2, 1.6];
        let test = wilcoxon(&few).ok_or("a test")?;
        assert_eq!((test.n, test.positive, test.negative), (8, 28.0, 8.0));
        assert_eq!((test.p, test.p_greater), (0.1953125, 0.09765625));
        assert_eq!(test.least_p(), 2.0 / 256.0);
        // Ties and a zero.
        let test = wilcoxon(&[1., 1., -2., 3., 0., 4., -1., 2., 5., 3.]).ok_or("a test")?;
        assert_eq!((test.n, test.negative, test.p), (9, 6.5, 0.0703125));
        // Many, with ties: the normal approximation.
        let many: Vec<f64> = (0..70).map(|i| f64::from((i * 37) % 23 - 9) / 4.0).collect();
        let test = wilcoxon(&many).ok_or("a test")?;
        assert_eq!((test.n, test.positive, test.negative), (67, 1482.0, 796.0));
        assert!((test.p - 0.031997552782176905).abs() < 1e-12, "{test:?}");
        assert!((test.p_greater - 0.015998776391088453).abs() < 1e-12, "{test:?}");
        assert_eq!((wilcoxon(&[0.0, 0.0]), wilcoxon(&[f64::NAN, 1.0])), (None, None));
        Ok(())
    }
}
