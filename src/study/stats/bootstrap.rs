//! A two-level bootstrap of the mean difference between two methods over tasks, with seeds and measured rows
//! as the sources of chance.

use rayon::prelude::*;
use statrs::distribution::{ContinuousCDF, StudentsT};

use super::sensitivity::two_sided;
use crate::noise::{Noise, Purpose, Stream};

/// The differences of a score on one task, as a function of row weights.
pub struct PairedTask<'a> {
    /// The number of measured rows, which are the same for every seed and both methods.
    pub rows: usize,
    /// The number of seeds.
    pub seeds: usize,
    /// Maps the weight of each row to the difference of each seed.
    pub differences: Box<Differences<'a>>,
}

/// Maps row weights to the differences of the seeds.
pub type Differences<'a> = dyn Fn(&[f64]) -> Vec<f64> + Sync + 'a;

impl std::fmt::Debug for PairedTask<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PairedTask {{ rows: {}, seeds: {} }}", self.rows, self.seeds)
    }
}

/// The bootstrap of a mean difference.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TwoLevel {
    /// The mean over seeds, and then over tasks.
    pub estimate: f64,
    /// The standard error, from the variances over resamples.
    pub error: f64,
    /// The degrees of freedom of the error; infinite if seeds do not differ or every task has one seed.
    pub df: f64,
    /// The lower end of the 95 % interval.
    pub low: f64,
    /// The upper end of the 95 % interval.
    pub high: f64,
    /// The two-sided p-value of the hypothesis of no difference.
    pub p: f64,
}

/// Computes the mean difference over equally weighted tasks and its crossed bootstrap (Owen 2007, "The
/// pigeonhole bootstrap"). Every resample redraws the rows of each task, the same for all of its seeds since
/// they share one development set, and its seeds. Tasks are not redrawn: the result holds for these tasks.
///
/// ```text
/// T = mean_t mean_s d_ts,    T* = mean_t 1/k_t sum_s w_ts d*_ts
/// w = 1 + sqrt(k / (k - 1)) (m - 1),   m how often a seed was drawn
/// error^2 = V_rows + V_seeds - V_shared,   V_shared = max(0, var T* - V_rows - V_seeds)
/// df = error^4 / sum_t (V_t^2 / (k_t - 1)),   V_t the part of V_seeds that t has
/// ```
///
/// V_rows is the variance over resamples of the rows alone, V_seeds that over resamples of the seeds alone. What
/// belongs to a row and a seed together, such as the noise of one training on one row, is in both of them and
/// a third time in the variance of T*; the error counts it once. It is not less than either variance.
///
/// The weights w give the variance of k seeds, which plain resampling would shrink by (k - 1) / k. Few seeds
/// also give an uncertain variance: interval and p-value are Student's, with the degrees of freedom of Welch
/// and Satterthwaite, in which the rows' part has infinitely many. For a task with one seed, only rows are
/// redrawn, and the variance between seeds remains unknown.
///
/// Returns `None` without tasks, if a task has no rows or no seeds, with fewer than two resamples, or if a
/// difference is not finite.
pub fn two_level(tasks: &[PairedTask], resamples: usize, noise: Noise) -> Option<TwoLevel> {
    if tasks.is_empty() || resamples < 2 || tasks.iter().any(|task| task.rows == 0 || task.seeds == 0) {
        return None;
    }
    let count = tasks.len() as f64;
    let (mut estimate, mut of_seeds) = (0.0, Vec::new());
    for task in tasks {
        let differences = (task.differences)(&vec![1.0; task.rows]);
        let k = differences.len() as f64;
        let mean = differences.iter().sum::<f64>() / k;
        estimate += mean / count;
        if task.seeds > 1 {
            let square: f64 = differences.iter().map(|d| (d - mean).powi(2)).sum();
            of_seeds.push((square / (k - 1.0) / k / count.powi(2), k - 1.0));
        }
    }
    let streams: Vec<[Stream; 2]> = (0..tasks.len())
        .map(|t| ["rows", "seeds"].map(|level| noise.stream(&format!("{level}.{t}"), Purpose::Resample)))
        .collect();
    // T* with the rows redrawn, and with rows and seeds redrawn.
    let resample = |draw: usize| -> [f64; 2] {
        let of_task = |(task, [rows, seeds]): (&PairedTask, &[Stream; 2])| {
            let differences = (task.differences)(&times(rows, draw as u64, task.rows));
            let k = task.seeds as f64;
            let stretch = if task.seeds > 1 { (k / (k - 1.0)).sqrt() } else { 0.0 };
            let drawn = times(seeds, draw as u64, task.seeds);
            let weighted = drawn.iter().zip(&differences).map(|(m, d)| (1.0 + stretch * (m - 1.0)) * d);
            [differences.iter().sum::<f64>() / k, weighted.sum::<f64>() / k]
        };
        let add = |sum: [f64; 2], of: [f64; 2]| [sum[0] + of[0] / count, sum[1] + of[1] / count];
        tasks.iter().zip(&streams).map(of_task).fold([0.0; 2], add)
    };
    let again: Vec<[f64; 2]> = (0..resamples).into_par_iter().map(resample).collect();
    let [of_rows, of_both] = [0, 1].map(|k| {
        let mean = again.iter().map(|t| t[k]).sum::<f64>() / resamples as f64;
        again.iter().map(|t| (t[k] - mean).powi(2)).sum::<f64>() / (resamples - 1) as f64
    });
    let between_seeds: f64 = of_seeds.iter().map(|(part, _)| part).sum();
    let shared = (of_both - of_rows - between_seeds).max(0.0);
    let variance = (of_rows + between_seeds - shared).max(of_rows).max(between_seeds);
    if !(estimate.is_finite() && variance.is_finite()) {
        return None;
    }
    let error = variance.sqrt();
    let least: f64 = of_seeds.iter().map(|(part, df)| part * part / df).sum();
    let df = if least > 0.0 { variance * variance / least } else { f64::INFINITY };
    let (p, half) = if error == 0.0 {
        (if estimate == 0.0 { 1.0 } else { 0.0 }, 0.0)
    } else if df < NORMAL {
        let law = StudentsT::new(0.0, 1.0, df).ok()?;
        (two_sided(&law, estimate / error), law.inverse_cdf(0.975) * error)
    } else {
        let t = (estimate / error).abs();
        (libm::erfc(t / std::f64::consts::SQRT_2), NORMAL_QUANTILE * error)
    };
    Some(TwoLevel { estimate, error, df, low: estimate - half, high: estimate + half, p })
}

/// The degrees of freedom from which Student's t agrees with the normal distribution in all printed digits.
const NORMAL: f64 = 1e6;
/// The value that a standard normal number exceeds with probability 1/40.
const NORMAL_QUANTILE: f64 = 1.959963984540054;

/// How often each of n items is drawn in n draws with replacement.
fn times(stream: &Stream, draw: u64, n: usize) -> Vec<f64> {
    let mut times = vec![0.0; n];
    for block in 0..n.div_ceil(4) {
        let words = stream.words(draw, block as u64);
        for word in words.iter().take(n - 4 * block) {
            // Widening multiplication: the bias is below n / 2^32.
            times[((u64::from(*word) * n as u64) >> 32) as usize] += 1.0;
        }
    }
    times
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A task in which the difference of a seed is the mean over its row of `table`.
    fn task(table: &[Vec<f64>]) -> PairedTask<'_> {
        let rows = table[0].len();
        let mean = move |weights: &[f64]| {
            let of_seed =
                |row: &Vec<f64>| row.iter().zip(weights).map(|(d, w)| d * w).sum::<f64>() / rows as f64;
            table.iter().map(of_seed).collect()
        };
        PairedTask { rows, seeds: table.len(), differences: Box::new(mean) }
    }

    /// The table `shift + a_s + b_r + e_sr` of seeds s by rows r, with these standard deviations.
    fn table(seeds: usize, rows: usize, [shift, a, b, e]: [f64; 4], draw: u64) -> Vec<Vec<f64>> {
        let normals = |name: &str, n: usize| {
            let mut z = vec![0.0; n];
            Noise::new(7).stream(name, Purpose::Predict).fill_normal(draw, &mut z);
            z
        };
        let (of_seed, of_row, rest) = (normals("a", seeds), normals("b", rows), normals("e", seeds * rows));
        let of = |s: usize, r: usize| shift + a * of_seed[s] + b * of_row[r] + e * rest[s * rows + r];
        (0..seeds).map(|s| (0..rows).map(|r| of(s, r)).collect()).collect()
    }

    #[test]
    fn the_error_is_that_of_the_mean_squares_of_two_way_tables() -> Result<(), &'static str> {
        // Without bias, the variance of the mean of a table of random rows and seeds is (MSA + MSB - MSE) / (n k).
        let d = table(4, 30, [0.2, 0.3, 1.0, 0.5], 1);
        let (k, n) = (4.0, 30.0);
        let of_seed: Vec<f64> = d.iter().map(|row| row.iter().sum::<f64>() / n).collect();
        let of_row: Vec<f64> = (0..30).map(|r| d.iter().map(|row| row[r]).sum::<f64>() / k).collect();
        let mean = of_seed.iter().sum::<f64>() / k;
        let between = |means: &[f64]| means.iter().map(|m| (m - mean).powi(2)).sum::<f64>();
        let rest: f64 = (0..4)
            .flat_map(|s| (0..30).map(move |r| (s, r)))
            .map(|(s, r)| (d[s][r] - of_seed[s] - of_row[r] + mean).powi(2))
            .sum();
        // Resampling takes 1/n instead of 1/(n - 1) over rows.
        let seeds = between(&of_seed) / (k - 1.0) / k;
        let rows = between(&of_row) / n / n;
        let both = rest / (k - 1.0) / k / n / n;
        let want = rows + seeds - both;
        const TIMES: usize = 20_000;
        let got = two_level(&[task(&d)], TIMES, Noise::new(1)).ok_or("a result")?;
        // The variance of 2 V_rows - var T*, if the two were independent.
        let sd = (2.0 / TIMES as f64).sqrt() * (2.0 * rows).hypot(rows + seeds + both);
        let z = (got.error.powi(2) - want) / sd;
        assert!(z.abs() < 4.0, "{} {want}: {z}", got.error.powi(2));
        // Two such tasks: the same mean, half the variance, and twice the seeds' degrees of freedom.
        let two = two_level(&[task(&d), task(&d)], TIMES, Noise::new(1)).ok_or("a result")?;
        assert!((two.estimate - got.estimate).abs() < 1e-15 && two.df > 1.8 * got.df);
        assert!((two.error.powi(2) / want * 2.0 - 1.0).abs() < 6.0 * sd / want);
        Ok(())
    }

    #[test]
    fn seeds_alone_give_the_t_test_and_rows_alone_the_normal_one() -> Result<(), &'static str> {
        // Rows do not differ: with d = [0.1, 0.3, 0.2, 0.5, 0.15], scipy.stats.ttest_1samp(d, 0) has df 4.
        let d = [0.1, 0.3, 0.2, 0.5, 0.15].map(|d| vec![d; 10]);
        let got = two_level(&[task(&d)], 40_000, Noise::new(2)).ok_or("a result")?;
        let want: f64 = 0.025 / 5.0; // d.var(ddof=1) / 5
        assert!((got.estimate - 0.25).abs() < 1e-12 && (got.error.powi(2) / want - 1.0).abs() < 0.03);
        assert!((got.df - 4.0).abs() < 0.25, "{got:?}");
        // One seed: the variance between seeds is unknown.
        let rows = table(1, 400, [0.1, 0.0, 1.0, 0.0], 3);
        let got = two_level(&[task(&rows)], 4000, Noise::new(2)).ok_or("a result")?;
        assert!(got.df.is_infinite() && (got.error * 20.0 - 1.0).abs() < 0.15, "{got:?}");
        assert!((got.high - got.estimate - 1.959964 * got.error).abs() < 1e-5 * got.error);
        Ok(())
    }

    /// The fraction of 600 studies of two tasks with p <= 0.05; `parts` are the parameters of `table`.
    fn rejected(seeds: usize, parts: [f64; 4]) -> f64 {
        const TIMES: u64 = 600;
        let reject = |time: &u64| {
            let tables = [2 * time, 2 * time + 1].map(|draw| table(seeds, 80, parts, draw));
            let tasks = tables.each_ref().map(|table| task(table));
            two_level(&tasks, 300, Noise::new(*time)).is_some_and(|found| found.p <= 0.05)
        };
        (0..TIMES).filter(reject).count() as f64 / TIMES as f64
    }

    #[test]
    fn no_difference_is_found_as_seldom_as_promised_whoever_varies_and_a_real_one_often() {
        let sd = (0.05 * 0.95 / 600f64).sqrt();
        for (seeds, parts) in [
            (4, [0.0, 1.0, 0.3, 0.3]),
            (4, [0.0, 0.05, 1.0, 0.2]),
            (3, [0.0, 0.2, 1.0, 0.1]),
            (5, [0.0, 0.05, 0.5, 1.0]),
        ] {
            let z = (rejected(seeds, parts) - 0.05) / sd;
            assert!(z.abs() < 4.0, "{seeds} seeds, {parts:?}: {z}");
        }
        // A shift of 5 standard errors.
        assert!(rejected(5, [0.5, 0.2, 0.5, 0.3]) > 0.9);
    }

    #[test]
    fn what_is_nothing_or_not_finite_says_nothing() {
        let infinite = [vec![f64::INFINITY, 1.0], vec![1.0, 1.0]];
        assert_eq!(two_level(&[task(&infinite)], 100, Noise::new(1)), None);
        assert_eq!(two_level(&[], 100, Noise::new(1)), None);
        let equal = two_level(&[task(&[vec![0.0; 3], vec![0.0; 3]])], 100, Noise::new(1));
        assert_eq!(equal.map(|equal| (equal.p, equal.low, equal.high)), Some((1.0, 0.0, 0.0)));
    }
}
