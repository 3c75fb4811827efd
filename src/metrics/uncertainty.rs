//! Predictive uncertainty from the entropies of posterior draws, and AUROC: how well a score separates two
//! sets of rows.
//!
//! ```text
//! total      H[E_s p_s]                     predictive entropy
//! aleatoric  E_s H[p_s]                     what every draw agrees on
//! epistemic  H[E_s p_s] - E_s H[p_s]        mutual information of label and weights (BALD)
//! ```
//!
//! Houlsby et al. 2011, "Bayesian active learning for classification and preference learning".
//! Entropies are in nats.

use crate::error::{Error, Result};

/// The uncertainty of one row, in nats.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Uncertainty {
    /// The entropy of the mean prediction.
    pub total: f64,
    /// The mean entropy of the draws' predictions.
    pub aleatoric: f64,
    /// Total minus aleatoric, the mutual information of label and weights: how much the draws disagree.
    pub epistemic: f64,
}

/// Returns the uncertainty of every row. `draws` are class probabilities of shape `(s, n, c)`.
///
/// # Errors
/// If there is no draw, draws differ in shape, or a value is not a probability.
pub fn uncertainty(draws: &[Vec<Vec<f64>>]) -> Result<Vec<Uncertainty>> {
    let Some(first) = draws.first() else {
        return Err(Error::config("draws", "there is no draw"));
    };
    for (s, draw) in draws.iter().enumerate() {
        if draw.len() != first.len() || draw.iter().zip(first).any(|(row, other)| row.len() != other.len()) {
            return Err(Error::config("draws", format!("draw {s} differs in shape from draw 0")));
        }
        if let Some(bad) = draw.iter().flatten().find(|p| !(0.0..=1.0 + 1e-6).contains(*p)) {
            return Err(Error::config("draws", format!("draw {s}: {bad} is no probability")));
        }
    }
    let count = draws.len() as f64;
    let row = |n: usize| {
        let classes = first[n].len();
        let mean: Vec<f64> =
            (0..classes).map(|c| draws.iter().map(|draw| draw[n][c]).sum::<f64>() / count).collect();
        let total = entropy(&mean);
        let aleatoric = draws.iter().map(|draw| entropy(&draw[n])).sum::<f64>() / count;
        // Not negative by Jensen's inequality, but for rounding.
        Uncertainty { total, aleatoric, epistemic: (total - aleatoric).max(0.0) }
    };
    Ok((0..first.len()).map(row).collect())
}

/// Returns the entropy of one row of probabilities, in nats; `0 ln 0` counts as 0. NaN if a probability is NaN.
pub fn entropy(probabilities: &[f64]) -> f64 {
    0.0 - probabilities.iter().filter(|p| **p != 0.0).map(|p| p * p.ln()).sum::<f64>()
}

/// Area under the ROC curve: the probability that a row of `scores_out` (the rows to detect: foreign, or
/// wrong) scores above a row of `scores_in`, with ties counted half (the Mann-Whitney statistic over the
/// product of the sizes).
///
/// # Errors
/// If either slice is empty, or a score is NaN.
pub fn auroc(scores_in: &[f64], scores_out: &[f64]) -> Result<f64> {
    if scores_in.is_empty() || scores_out.is_empty() {
        let reason =
            format!("expected rows of both kinds, got {} in and {} out", scores_in.len(), scores_out.len());
        return Err(Error::config("scores", reason));
    }
    let out = scores_out.iter().map(|score| (*score, true));
    let mut all: Vec<(f64, bool)> = scores_in.iter().map(|score| (*score, false)).chain(out).collect();
    if all.iter().any(|(score, _)| score.is_nan()) {
        return Err(Error::config("scores", "a score is NaN"));
    }
    all.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (mut below, mut wins) = (0.0, 0.0);
    for tied in all.chunk_by(|a, b| a.0 == b.0) {
        let outs = tied.iter().filter(|(_, out)| *out).count() as f64;
        let ins = tied.len() as f64 - outs;
        wins += outs * (below + 0.5 * ins);
        below += ins;
    }
    Ok(wins / (scores_in.len() as f64 * scores_out.len() as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_that_agree_are_aleatoric_and_sure_ones_that_differ_epistemic() -> Result<()> {
        let agree = vec![0.5, 0.5];
        let draws = [vec![agree.clone(), vec![1.0, 0.0]], vec![agree, vec![0.0, 1.0]]];
        let got = uncertainty(&draws)?;
        let ln2 = 2f64.ln();
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-15, "{a} {b}");
        for (row, expected) in got.iter().zip([(ln2, ln2, 0.0), (ln2, 0.0, ln2)]) {
            near(row.total, expected.0);
            near(row.aleatoric, expected.1);
            near(row.epistemic, expected.2);
        }
        Ok(())
    }

    #[test]
    fn entropies_are_those_of_scipy() -> Result<()> {
        // scipy.stats.entropy of [.2, .3, .5] and [.6, .3, .1], and of their mean
        let (p, q) = (vec![0.2, 0.3, 0.5], vec![0.6, 0.3, 0.1]);
        let by_hand = |p: &[f64]| p.iter().map(|p| -p * p.ln()).sum::<f64>();
        assert!((entropy(&p) - 1.0296530140645737).abs() < 1e-15);
        let got = uncertainty(&[vec![p.clone()], vec![q.clone()]])?[0];
        assert!((got.total - by_hand(&[0.4, 0.3, 0.3])).abs() < 1e-14);
        assert!((got.aleatoric - 0.5 * (by_hand(&p) + by_hand(&q))).abs() < 1e-14);
        assert!((got.total - got.aleatoric - got.epistemic).abs() < 1e-15 && got.epistemic > 0.0);
        Ok(())
    }

    #[test]
    fn the_area_counts_pairs_and_half_of_ties() -> Result<()> {
        assert_eq!(auroc(&[1.0, 2.0], &[3.0, 4.0])?, 1.0);
        assert_eq!(auroc(&[3.0, 4.0], &[1.0, 2.0])?, 0.0);
        assert_eq!(auroc(&[1.0], &[1.0])?, 0.5);
        assert_eq!(auroc(&[0.0], &[-0.0])?, 0.5);
        let ins: Vec<f64> = (0..30).map(|i| f64::from(i * 7 % 11)).collect();
        let outs: Vec<f64> = (0..17).map(|i| f64::from(i * 5 % 13)).collect();
        let pair = |i: f64, o: f64| if o > i { 1.0 } else { f64::from(u8::from(o == i)) / 2.0 };
        let pairs: f64 = ins.iter().flat_map(|i| outs.iter().map(move |o| pair(*i, *o))).sum();
        assert!((auroc(&ins, &outs)? - pairs / (30.0 * 17.0)).abs() < 1e-15);
        Ok(())
    }

    #[test]
    fn what_has_no_uncertainty_is_named() {
        let refused = |draws: &[Vec<Vec<f64>>], what: &str| {
            let error = uncertainty(draws).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        };
        refused(&[], "no draw");
        refused(&[vec![vec![1.0]], vec![]], "draw 1 differs");
        refused(&[vec![vec![f64::NAN]]], "no probability");
        assert!(auroc(&[], &[1.0]).is_err() && auroc(&[1.0], &[f64::NAN]).is_err());
    }
}
