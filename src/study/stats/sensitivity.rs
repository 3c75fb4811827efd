//! How much a score depends on a setting such as the learning rate.
//!
//! The paper's spread, best - worst, is small for a method that is bad everywhere. Here the scores of each
//! task and seed are centred first, so that only the setting matters; variances are compared by a paired
//! test; and regret measures the cost of choosing a setting blindly.

use statrs::distribution::{ContinuousCDF, StudentsT};

/// The result of the Pitman-Morgan test of two variances.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PitmanMorgan {
    /// The variances of the two variables within their groups.
    pub variances: [f64; 2],
    /// The correlation of sums and differences: positive if the first variable varies more.
    pub correlation: f64,
    /// The degrees of freedom: the number of pairs, minus the number of groups, minus one.
    pub df: usize,
    /// The two-sided p-value.
    pub p: f64,
}

/// Tests whether two paired variables have equal variances within groups, by the correlation of their sum and
/// difference (Pitman and Morgan, 1939).
///
/// ```text
/// x, y centred in each of g groups;   r = corr(x + y, x - y);   t = r sqrt(df / (1 - r^2)),   df = n - g - 1
/// ```
///
/// `groups` has the pairs of each group: for example, for a task, the scores of two methods at each learning
/// rate. Groups with fewer than two pairs are ignored. The test is exact for pairs that are independent and normal
/// within their group. Returns
/// `None` with a value that is not finite, with less than one degree of freedom, or if neither variable
/// varies.
pub fn pitman_morgan(groups: &[Vec<[f64; 2]>]) -> Option<PitmanMorgan> {
    let groups: Vec<&Vec<[f64; 2]>> = groups.iter().filter(|group| group.len() > 1).collect();
    let n: usize = groups.iter().map(|group| group.len()).sum();
    let df = n.checked_sub(groups.len() + 1).filter(|df| *df > 0)?;
    // corr(x + y, x - y) from the sums and differences themselves: xx - yy and xx + yy +- 2 xy would cancel.
    let (mut xx, mut yy, mut sums, mut differences, mut products) = (0.0, 0.0, 0.0, 0.0, 0.0);
    let mut rounding: f64 = 0.0; // bounds the rounding error of one difference
    for group in &groups {
        let mean = [0, 1].map(|k| group.iter().map(|pair| pair[k]).sum::<f64>() / group.len() as f64);
        for pair in *group {
            let (x, y) = (pair[0] - mean[0], pair[1] - mean[1]);
            (xx, yy) = (xx + x * x, yy + y * y);
            let (s, d) = (x + y, x - y);
            (sums, differences, products) = (sums + s * s, differences + d * d, products + s * d);
            rounding = pair.iter().fold(rounding, |most, v| most.max(4.0 * f64::EPSILON * v.abs()));
        }
    }
    let nothing = n as f64 * rounding * rounding;
    if xx + yy <= nothing {
        return None;
    }
    // Scores that are equal or differ by a constant have equal variances.
    let alike = differences.min(sums) <= nothing;
    let correlation = if alike { 0.0 } else { products / (sums * differences).sqrt() };
    if !correlation.is_finite() {
        return None;
    }
    let correlation = correlation.clamp(-1.0, 1.0);
    let t = correlation * (df as f64 / (1.0 - correlation * correlation)).sqrt();
    let law = StudentsT::new(0.0, 1.0, df as f64).ok()?;
    let within = (n - groups.len()) as f64;
    Some(PitmanMorgan { variances: [xx / within, yy / within], correlation, df, p: two_sided(&law, t) })
}

/// The probability of a value at least as far from zero as t.
pub(super) fn two_sided(law: &StudentsT, t: f64) -> f64 {
    if t.is_infinite() {
        0.0
    } else {
        (2.0 * law.cdf(-t.abs())).min(1.0)
    }
}

/// The variance of scores within their groups: squares about the group means over the remaining degrees of
/// freedom. NaN if no group has two scores.
pub fn within_variance(groups: &[Vec<f64>]) -> f64 {
    let (mut squares, mut df) = (0.0, 0);
    for group in groups.iter().filter(|group| group.len() > 1) {
        let mean = group.iter().sum::<f64>() / group.len() as f64;
        squares += group.iter().map(|score| (score - mean).powi(2)).sum::<f64>();
        df += group.len() - 1;
    }
    squares / df as f64
}

/// The mean regret over groups of scores: how much worse a score is than the best of its group, averaged over
/// the group and then over groups. It is the cost of choosing a setting blindly; the best itself counts, with
/// 0. NaN if no group has a score.
pub fn mean_regret(groups: &[Vec<f64>], lower_is_better: bool) -> f64 {
    let sign = if lower_is_better { 1.0 } else { -1.0 };
    let of_group = |group: &Vec<f64>| {
        let best = group.iter().map(|score| sign * score).fold(f64::INFINITY, f64::min);
        group.iter().map(|score| sign * score - best).sum::<f64>() / group.len() as f64
    };
    let regrets: Vec<f64> = groups.iter().filter(|group| !group.is_empty()).map(of_group).collect();
    regrets.iter().sum::<f64>() / regrets.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::{Noise, Purpose};

    const OWN: [f64; 6] = [0.61, 0.55, 0.82, 0.70, 0.93, 0.58];
    const OTHER: [f64; 6] = [0.48, 0.47, 0.52, 0.50, 0.55, 0.46];

    fn pairs(range: std::ops::Range<usize>) -> Vec<[f64; 2]> {
        range.map(|i| [OWN[i], OTHER[i]]).collect()
    }

    fn close(got: f64, want: f64) {
        assert!((got / want - 1.0).abs() < 1e-10, "{got} is not {want}");
    }

    #[test]
    fn the_test_is_that_of_scipys_correlation() -> Result<(), &'static str> {
        // r, p = scipy.stats.pearsonr(x + y, x - y); x.var(ddof=1), y.var(ddof=1)
        let test = pitman_morgan(&[pairs(0..6)]).ok_or("a test")?;
        close(test.correlation, 0.9964213964984494);
        close(test.p, 1.9186690012618077e-05);
        close(test.variances[0], 0.022456666666666666);
        close(test.variances[1], 0.0011466666666666678);
        assert_eq!(test.df, 4);
        // Each half centred; s, d = x + y, x - y; r = (s * d).sum() / np.sqrt((s * s).sum() * (d * d).sum());
        // df = 6 - 2 - 1; p = 2 * scipy.stats.t.sf(r * np.sqrt(df / (1 - r * r)), df)
        let test = pitman_morgan(&[pairs(0..3), pairs(3..6), pairs(0..1)]).ok_or("a test")?;
        close(test.correlation, 0.9965822277903198);
        close(test.p, 0.00023973186035390634);
        close(test.variances[0], 0.025866666666666666);
        close(within_variance(&[OWN[..3].to_vec(), OWN[3..].to_vec(), vec![7.0]]), test.variances[0]);
        assert_eq!(test.df, 3);
        Ok(())
    }

    #[test]
    fn what_does_not_vary_or_is_not_finite_is_not_tested() -> Result<(), &'static str> {
        assert_eq!(pitman_morgan(&[vec![[1.0, 2.0]; 5]]), None);
        assert_eq!(pitman_morgan(&[vec![[0.1, 0.3]; 3]]), None); // only the rounding of the means varies
        assert_eq!(pitman_morgan(&[pairs(0..2)]), None);
        assert!(within_variance(&[vec![1.0], vec![]]).is_nan());
        assert_eq!(pitman_morgan(&[vec![[1.0, f64::INFINITY], [2.0, 1.0], [1.0, 1.0]]]), None);
        // Equal in every pair: correlation 0. Only one varies: correlation 1.
        let alike = pitman_morgan(&[vec![[1.0, 1.0], [2.0, 2.0], [4.0, 4.0]]]).ok_or("a test")?;
        assert_eq!((alike.correlation, alike.p), (0.0, 1.0));
        let one = pitman_morgan(&[vec![[1.0, 1.0], [2.0, 1.0], [4.0, 1.0]]]).ok_or("a test")?;
        assert_eq!((one.correlation, one.p), (1.0, 0.0));
        // Scores that differ by a constant have equal variances; small other differences must still count.
        let scores = [0.51, 0.43, 0.62, 0.55, 0.38];
        let shifted = pitman_morgan(&[scores.map(|x| [x, x + 0.3]).to_vec()]).ok_or("a test")?;
        assert_eq!((shifted.correlation, shifted.p), (0.0, 1.0));
        let near = |step: f64| {
            let z = [0.3, -1.2, 0.8, 0.1, -0.4];
            pitman_morgan(&[scores.iter().zip(z).map(|(x, z)| [*x, x + step * z]).collect()]).ok_or("a test")
        };
        assert!((near(1e-9)?.correlation - near(1e-5)?.correlation).abs() < 1e-3);
        Ok(())
    }

    /// The fraction of p-values at most 0.05 for pairs of correlated normals in six groups of three with
    /// different means, where the first variable has `ratio` times the other's standard deviation.
    fn rejected(ratio: f64) -> f64 {
        const TIMES: u64 = 8000;
        let stream = Noise::new(5).stream("pitman", Purpose::Predict);
        let reject = |time: &u64| {
            let mut z = [0.0; 6 * 3 * 3];
            stream.fill_normal(*time, &mut z);
            let group = |(g, z): (usize, &[f64])| {
                let pair = |z: &[f64]| [ratio * (z[0] + z[1]) + g as f64, z[0] + z[2] - 5.0 * g as f64];
                z.chunks(3).map(pair).collect::<Vec<_>>()
            };
            let groups: Vec<Vec<[f64; 2]>> = z.chunks(9).enumerate().map(group).collect();
            pitman_morgan(&groups).is_some_and(|test| test.p <= 0.05)
        };
        (0..TIMES).filter(reject).count() as f64 / TIMES as f64
    }

    #[test]
    fn equal_variances_are_rejected_as_seldom_as_promised_and_others_often() {
        let z = (rejected(1.0) - 0.05) / (0.05 * 0.95 / 8000f64).sqrt();
        assert!(z.abs() < 4.0, "{z}");
        assert!(rejected(3.0) > 0.8);
    }

    #[test]
    fn regret_is_what_a_blind_choice_costs() {
        // 0, 0.2, 0.7 and 0, 0.1; the last group has no score.
        let groups = [vec![0.5, 0.7, 1.2], vec![0.4, 0.3], vec![]];
        assert!((mean_regret(&groups, true) - (0.3 + 0.05) / 2.0).abs() < 1e-15);
        // 0.7, 0.5, 0 and 0, 0.1
        assert!((mean_regret(&groups, false) - (0.4 + 0.05) / 2.0).abs() < 1e-15);
        assert!(mean_regret(&[], true).is_nan());
    }
}
