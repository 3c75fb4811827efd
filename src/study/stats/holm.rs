//! Holm's correction of the p-values of a family of tests.

/// Returns the p-values corrected by Holm 1979 ("A simple sequentially rejective multiple test procedure"),
/// in their order. Rejecting where the corrected p-value is at most alpha rejects any true null hypothesis of
/// the family with probability at most alpha, whatever the dependence between the tests.
///
/// ```text
/// p'_(i) = max_(j <= i) min(1, (m - j + 1) p_(j))
/// ```
///
/// A NaN (a test without a result) stays NaN and still counts as one of the m.
pub fn holm(p: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|a, b| p[*a].total_cmp(&p[*b]));
    let (mut corrected, mut highest) = (vec![f64::NAN; p.len()], 0f64);
    for (rank, place) in order.into_iter().enumerate().filter(|(_, place)| !p[*place].is_nan()) {
        highest = highest.max(((p.len() - rank) as f64 * p[place]).min(1.0));
        corrected[place] = highest;
    }
    corrected
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::{Noise, Purpose};

    #[test]
    fn the_correction_is_holms() {
        // Times 4, 3, 2, 1 in increasing order, made monotone: 0.04 becomes 0.06 like 0.03.
        let got = holm(&[0.01, 0.04, 0.03, 0.005]);
        for (got, want) in got.iter().zip([0.03, 0.06, 0.06, 0.02]) {
            assert!((got - want).abs() < 1e-15, "{got} {want}");
        }
        assert_eq!(holm(&[0.6, 0.7]), [1.0, 1.0]);
        let got = holm(&[f64::NAN, 0.02]);
        assert!(got[0].is_nan() && got[1] == 0.04);
        assert!(holm(&[]).is_empty());
    }

    #[test]
    fn a_family_of_true_hypotheses_is_rejected_as_seldom_as_promised() {
        const TIMES: u64 = 20_000;
        let stream = Noise::new(3).stream("holm", Purpose::Predict);
        let rejected = (0..TIMES).filter(|time| {
            let mut p = [0.0; 5];
            stream.fill_uniform(*time, &mut p);
            holm(&p).iter().any(|p| *p <= 0.05)
        });
        // For independent tests, the smallest p-value is at most alpha / m with probability 1 - (1 - 0.01)^5.
        let (share, want) = (rejected.count() as f64 / TIMES as f64, 1.0 - 0.99f64.powi(5));
        let z = (share - want) / (want * (1.0 - want) / TIMES as f64).sqrt();
        assert!(z.abs() < 4.0, "{share} {want}");
    }
}
