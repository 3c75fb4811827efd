//! Compares the method's draws with those of `rand_distr`, an independent implementation, by the two-sample
//! test of Kolmogorov and Smirnov.
//!
//! The oracle draws from its own fixed streams, so every test is deterministic.

use candle_core::{DType, Device, Tensor};
use monteclora::dist::wishart::fill_bartlett;
use monteclora::dist::{Covariance, Dirichlet, Estimator};
use monteclora::noise::{DrawRng, Noise, Purpose, Stream};
use monteclora::special::gamma_quantile;
use rand_distr::{Beta, ChiSquared, Distribution, Gamma, StandardNormal};

use crate::Result;

/// The size of each sample.
const DRAWS: usize = 100_000;

/// A distribution with a p-value below this is not the oracle's. With some thirty samples, one falls below it
/// by chance for one in three thousand choices of the seeds.
const LEAST_P: f64 = 1e-5;

fn stream(name: &str) -> Stream {
    Noise::new(61).stream(name, Purpose::Predict)
}

/// The probability that two samples of one law differ by as much as these do.
///
/// ```text
/// D = sup |F_x - F_y|,   p = 2 sum_k (-1)^(k - 1) exp(-2 k^2 D^2 n m / (n + m))
/// ```
fn p_value(mut xs: Vec<f64>, mut ys: Vec<f64>) -> f64 {
    assert!(xs.iter().chain(&ys).all(|value| value.is_finite()));
    xs.sort_unstable_by(f64::total_cmp);
    ys.sort_unstable_by(f64::total_cmp);
    let (n, m) = (xs.len() as f64, ys.len() as f64);
    let (mut i, mut j, mut distance) = (0, 0, 0f64);
    while i < xs.len() && j < ys.len() {
        let at = xs[i].min(ys[j]);
        i += xs[i..].iter().take_while(|x| **x == at).count();
        j += ys[j..].iter().take_while(|y| **y == at).count();
        distance = distance.max((i as f64 / n - j as f64 / m).abs());
    }
    let lambda = distance * distance * n * m / (n + m);
    if lambda < 0.04 {
        return 1.0; // to ten digits; the series converges slowly here
    }
    let term = |k: i32| f64::from(2 * (k % 2) - 1) * (-2.0 * f64::from(k * k) * lambda).exp();
    (2.0 * (1..=100).map(term).sum::<f64>()).clamp(0.0, 1.0)
}

/// A sample from the oracle.
fn oracle(name: &str, law: &impl Distribution<f64>) -> Vec<f64> {
    law.sample_iter(stream(&format!("oracle.{name}")).rng(0)).take(DRAWS).collect()
}

fn assert_same_law(name: &str, ours: Vec<f64>, law: &impl Distribution<f64>) {
    let p = p_value(ours, oracle(name, law));
    println!("{name}: p {p:.4}");
    assert!(p > LEAST_P, "{name}: p {p}");
}

fn assert_other_law(name: &str, ours: Vec<f64>, law: &impl Distribution<f64>) {
    let p = p_value(ours, oracle(name, law));
    println!("not {name}: p {p:.1e}");
    assert!(p < LEAST_P, "{name} passes for another law: p {p}");
}

fn normals(name: &str) -> Vec<f64> {
    let mut z = vec![0.0; DRAWS];
    stream(name).fill_normal(0, &mut z);
    z
}

fn gammas(shape: f64) -> Vec<f64> {
    let mut uniforms = vec![0.0; DRAWS];
    stream(&format!("gamma.{shape}")).fill_uniform(0, &mut uniforms);
    uniforms.into_iter().map(|u| gamma_quantile(shape, u).log_z).collect()
}

/// The logarithm of a distribution's samples: those of a gamma with a small shape underflow.
struct Log<D>(D);

impl<D: Distribution<f64>> Distribution<f64> for Log<D> {
    fn sample<R: rand::Rng + ?Sized>(&self, rng: &mut R) -> f64 {
        // `rand_distr` only underflows far below the values that occur in practice at a shape of 0.05.
        self.0.sample(rng).max(f64::MIN_POSITIVE).ln()
    }
}

/// The squared diagonals of Bartlett's factors, row by row.
fn diagonals(r: usize, df: f64, covariance: Covariance) -> Result<Vec<Vec<f64>>> {
    let stream = Noise::new(61).stream("bartlett", Purpose::Wishart);
    let (mut factor, mut rows) = (vec![0.0; r * r], vec![Vec::with_capacity(DRAWS); r]);
    for draw in 0..DRAWS as u64 {
        fill_bartlett(&stream, draw, r, df, covariance, &mut factor)?;
        rows.iter_mut().enumerate().for_each(|(i, row)| row.push(factor[i * r + i].powi(2)));
    }
    Ok(rows)
}

/// Mixture weights, component by component.
fn weights(concentrations: &[f64], estimator: Estimator) -> Result<Vec<Vec<f64>>> {
    let n = concentrations.len();
    let logs: Vec<f64> = concentrations.iter().map(|a| a.ln()).collect();
    let mut noise = vec![0.0; DRAWS * n];
    estimator.fill_noise(&Noise::new(61).stream("weights", Purpose::Dirichlet), 0, &mut noise);
    let c = Tensor::from_vec(logs, n, &Device::Cpu)?.broadcast_as((DRAWS, n))?.contiguous()?;
    let noise = Tensor::from_vec(noise, (DRAWS, n), &Device::Cpu)?;
    let pi = Dirichlet::new(&c)?.rsample(estimator, &noise)?.to_dtype(DType::F64)?;
    Ok(pi.t()?.contiguous()?.to_vec2()?)
}

/// The distribution of component `i` of a Dirichlet, which is a beta.
fn marginal(concentrations: &[f64], i: usize) -> Result<Beta<f64>> {
    Ok(Beta::new(concentrations[i], concentrations.iter().sum::<f64>() - concentrations[i])?)
}

#[test]
fn normals_are_rand_distr_s_in_both_precisions() {
    assert_same_law("normal", normals("normal"), &StandardNormal);
    let mut narrow = vec![0f32; DRAWS];
    stream("narrow").fill_normal_f32(0, &mut narrow);
    assert_same_law("narrow normal", narrow.into_iter().map(f64::from).collect(), &StandardNormal);
}

#[test]
fn gamma_quantiles_are_rand_distr_s_gammas() -> Result<()> {
    for shape in [0.05, 0.3, 1.0, 2.5, 40.0] {
        assert_same_law(&format!("gamma {shape}"), gammas(shape), &Log(Gamma::new(shape, 1.0)?));
    }
    Ok(())
}

#[test]
fn the_diagonal_of_bartlett_s_factor_is_rand_distr_s_chi_squares() -> Result<()> {
    let (r, df) = (4, 5.5);
    for (i, row) in diagonals(r, df, Covariance::Full)?.into_iter().enumerate() {
        assert_same_law(&format!("chi2 of row {i}"), row, &ChiSquared::new(df - i as f64)?);
    }
    for (i, row) in diagonals(r, df, Covariance::Diagonal)?.into_iter().enumerate() {
        assert_same_law(&format!("chi2 of row {i} alone"), row, &ChiSquared::new(df)?);
    }
    Ok(())
}

#[test]
fn exact_weights_are_rand_distr_s_dirichlet() -> Result<()> {
    let concentrations = [0.3, 1.0, 4.0];
    let ours = weights(&concentrations, Estimator::Exact)?;
    // Against `rand_distr`'s Dirichlet: components, and the sum of squares, which margins do not determine.
    let dirichlet = rand_distr::Dirichlet::new(concentrations)?;
    let theirs: Vec<[f64; 3]> = dirichlet.sample_iter(stream("oracle.weights").rng(0)).take(DRAWS).collect();
    for (i, ours) in ours.iter().enumerate() {
        let p = p_value(ours.clone(), theirs.iter().map(|pi| pi[i]).collect());
        assert!(p > LEAST_P, "component {i}: p {p}");
        assert_same_law(&format!("margin {i}"), ours.clone(), &marginal(&concentrations, i)?);
    }
    let squares = |pi: [f64; 3]| pi.iter().map(|p| p * p).sum();
    let together = (0..DRAWS).map(|row| squares([0, 1, 2].map(|i| ours[i][row]))).collect();
    let p = p_value(together, theirs.into_iter().map(squares).collect());
    assert!(p > LEAST_P, "sum of squares: p {p}");
    Ok(())
}

#[test]
fn the_test_rejects_what_is_nearly_the_law() -> Result<()> {
    // A normal that is too wide by a sixteenth, and one that is shifted by a thirtieth.
    let law = StandardNormal;
    assert_other_law("normal", normals("wide").into_iter().map(|z| 1.0625 * z).collect(), &law);
    assert_other_law("normal", normals("shifted").into_iter().map(|z| z + 0.033).collect(), &law);
    assert_other_law("gamma 2.5", gammas(2.5), &Log(Gamma::new(2.6, 1.0)?));
    // Bartlett's diagonal with the degrees of freedom counted from the wrong end, or all alike.
    let rows = diagonals(4, 5.5, Covariance::Full)?;
    for (row, degrees) in [(0, 2.5), (1, 5.5), (3, 5.5)] {
        assert_other_law(&format!("chi2 {degrees}"), rows[row].clone(), &ChiSquared::new(degrees)?);
    }
    // Weights of another estimator, which give a Dirichlet only if all concentrations are one.
    let concentrations = [0.3, 1.0, 4.0];
    let ours = weights(&concentrations, Estimator::Exponential)?;
    for (i, ours) in ours.into_iter().enumerate() {
        assert_other_law(&format!("margin {i}"), ours, &marginal(&concentrations, i)?);
    }
    Ok(())
}

#[test]
fn the_p_value_is_uniform_where_the_laws_are_one() {
    // 400 pairs of small samples: as many p-values in each fifth of (0, 1).
    let sample = |rng: DrawRng| StandardNormal.sample_iter(rng).take(500).collect::<Vec<f64>>();
    let mut fifths = [0u32; 5];
    for pair in 0..400u64 {
        let p = p_value(sample(stream("left").rng(pair)), sample(stream("right").rng(pair)));
        fifths[((p * 5.0) as usize).min(4)] += 1;
    }
    // 80 each, with a standard error of 8.
    assert!(fifths.iter().all(|count| count.abs_diff(80) < 32), "{fifths:?}");
}
