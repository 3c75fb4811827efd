//! Moments and divergences of the three distributions.

use candle_core::{Device, Tensor};
use monteclora::dist::wishart::fill_bartlett;
use monteclora::dist::{Covariance, Dirichlet, Estimator, Gaussian, Wishart};
use monteclora::noise::{Noise, Purpose};
use rayon::prelude::*;

use crate::{assert_close, assert_mean, normals, Result};

const DRAWS: usize = 200_000;
const DF: f64 = 4.3;

fn wishart(covariance: Covariance) -> Result<Wishart> {
    Ok(Wishart::new(&Tensor::new(&[0.3, -0.5, 0.1], &Device::Cpu)?, DF, covariance)?)
}

/// Factors F of many draws, `(DRAWS, 3, 3)`.
fn factors(wishart: &Wishart) -> Result<Tensor> {
    let stream = Noise::new(4).stream("law", Purpose::Wishart);
    let mut t = vec![0.0; DRAWS * 9];
    t.par_chunks_mut(9).enumerate().try_for_each(|(draw, t)| {
        fill_bartlett(&stream, draw as u64, 3, wishart.df(), wishart.covariance(), t)
    })?;
    Ok(wishart.rsample(&Tensor::from_vec(t, (DRAWS, 3, 3), &Device::Cpu)?)?)
}

/// Weights of many draws, as rows.
fn weights(concentration: &[f64], estimator: Estimator) -> Result<Vec<Vec<f64>>> {
    let n = concentration.len();
    let mut noise = vec![0.0; DRAWS * n];
    estimator.fill_noise(&Noise::new(5).stream("law", Purpose::Dirichlet), 0, &mut noise);
    let noise = Tensor::from_vec(noise, (DRAWS, n), &Device::Cpu)?;
    let c = Tensor::new(concentration, &Device::Cpu)?.log()?.broadcast_as((DRAWS, n))?.contiguous()?;
    Ok(Dirichlet::new(&c)?.rsample(estimator, &noise)?.to_vec2()?)
}

#[test]
fn wishart_draws_have_the_moments_of_a_wishart() -> Result<()> {
    for covariance in [Covariance::Full, Covariance::Diagonal] {
        let wishart = wishart(covariance)?;
        let draws = Gaussian::new(&factors(&wishart)?)?.covariance()?.to_vec3::<f64>()?;
        let mean = wishart.mean()?.to_vec1::<f64>()?;
        let variance = wishart.variance()?.to_vec2::<f64>()?;
        let v = wishart.scale()?.to_vec1::<f64>()?;
        for i in 0..3 {
            assert!((mean[i] - DF * v[i]).abs() < 1e-14);
            for j in 0..=i {
                let same = f64::from(u8::from(i == j));
                let want = DF * (same * v[i] * v[i] + v[i] * v[j]);
                if covariance == Covariance::Diagonal && i != j {
                    assert!(draws.iter().all(|w| w[i][j] == 0.0) && variance[i][j] == 0.0);
                    continue;
                }
                assert!((variance[i][j] - want).abs() < 1e-12);
                let centre = same * mean[i];
                assert_mean(&format!("{covariance:?} E W[{i}][{j}]"), centre, draws.iter().map(|w| w[i][j]));
                let squares = draws.iter().map(|w| (w[i][j] - centre).powi(2));
                assert_mean(&format!("{covariance:?} Var W[{i}][{j}]"), want, squares);
            }
        }
    }
    Ok(())
}

#[test]
fn exact_draws_have_the_moments_of_a_dirichlet() -> Result<()> {
    let a = [0.3, 1.2, 4.0];
    let draws = weights(&a, Estimator::Exact)?;
    let dirichlet = Dirichlet::new(&Tensor::new(&a, &Device::Cpu)?.log()?)?;
    let (mean, variance) = (dirichlet.mean()?.to_vec1::<f64>()?, dirichlet.variance()?.to_vec1::<f64>()?);
    for i in 0..3 {
        let m = a[i] / 5.5;
        assert!((mean[i] - m).abs() < 1e-14 && (variance[i] - m * (1.0 - m) / 6.5).abs() < 1e-14);
        assert_mean(&format!("E pi[{i}]"), mean[i], draws.iter().map(|p| p[i]));
        assert_mean(&format!("Var pi[{i}]"), variance[i], draws.iter().map(|p| (p[i] - mean[i]).powi(2)));
    }
    assert!(draws.iter().all(|p| (p.iter().sum::<f64>() - 1.0).abs() < 1e-12));
    let cooperative = dirichlet.expected_cooperative()?.to_scalar::<f64>()?;
    assert_mean("E L_C", cooperative, draws.iter().map(|p| p.iter().map(|x| x * x).sum()));
    Ok(())
}

#[test]
fn exponential_draws_match_quadrature_and_are_no_dirichlet() -> Result<()> {
    // For e ~ Exp(1), e_1 / (e_1 + e_2) is uniform: E[pi_1] = integral s a_1 / (s a_1 + (1 - s) a_2) ds.
    let (a, n) = ([1.0, 4.0], 100_000);
    let points = (0..n).map(|i| (f64::from(i) + 0.5) / f64::from(n));
    let want = points.map(|s| s * a[0] / (s * a[0] + (1.0 - s) * a[1])).sum::<f64>() / f64::from(n);
    assert!((want - 0.283).abs() < 1e-3 && (want - 0.2f64).abs() > 0.08);
    let draws = weights(&a, Estimator::Exponential)?;
    assert_mean("Exponential E pi[0]", want, draws.iter().map(|p| p[0]));
    assert_mean("Exponential E pi[1]", 1.0 - want, draws.iter().map(|p| p[1]));
    // At a = 1 it is a Dirichlet.
    let draws = weights(&[1.0, 1.0, 1.0], Estimator::Exponential)?;
    let squares = draws.iter().map(|p| (p[1] - 1.0 / 3.0).powi(2));
    assert_mean("Exponential Var pi[1] at one", 1.0 / 18.0, squares);
    Ok(())
}

#[test]
fn logistic_normal_draws_have_laplaces_log_ratios() -> Result<()> {
    let a = [0.3f64, 1.2, 4.0];
    let draws = weights(&a, Estimator::LogisticNormal)?;
    let shared = a.iter().map(|a| 1.0 / a).sum::<f64>() / 9.0;
    let variance = a.map(|a| (1.0 - 2.0 / 3.0) / a + shared);
    for (i, j) in [(0, 1), (1, 2), (2, 0)] {
        let (mean, var) = ((a[i] / a[j]).ln(), variance[i] + variance[j]);
        let ratio = |p: &Vec<f64>| (p[i] / p[j]).ln();
        assert_mean(&format!("E ln pi[{i}]/pi[{j}]"), mean, draws.iter().map(ratio));
        let squares = draws.iter().map(|p| (ratio(p) - mean).powi(2));
        assert_mean(&format!("Var ln pi[{i}]/pi[{j}]"), var, squares);
    }
    Ok(())
}

#[test]
fn the_gaussian_divergence_equals_monte_carlo() -> Result<()> {
    let f = [[1.3, 0.0], [-0.7, 0.6]];
    let kl = Gaussian::new(&Tensor::new(&f, &Device::Cpu)?)?.kl_standard()?.to_scalar::<f64>()?;
    let z = normals("kl", &[2, DRAWS])?;
    let x = Gaussian::new(&Tensor::new(&f, &Device::Cpu)?)?.rsample(&z)?.to_vec2::<f64>()?;
    let z = z.to_vec2::<f64>()?;
    let log_det = (1.3f64 * 0.6).ln();
    let log_ratio =
        |i: usize| 0.5 * (x[0][i].powi(2) + x[1][i].powi(2) - z[0][i].powi(2) - z[1][i].powi(2)) - log_det;
    assert_mean("KL_N", kl, (0..DRAWS).map(log_ratio));
    Ok(())
}

#[test]
fn the_wishart_divergence_equals_monte_carlo() -> Result<()> {
    let posterior = wishart(Covariance::Full)?;
    let prior = Wishart::new(&Tensor::new(&[-0.2, 0.1, 0.25], &Device::Cpu)?, DF, Covariance::Full)?;
    let draws = Gaussian::new(&factors(&posterior)?)?.covariance()?.to_vec3::<f64>()?;
    let (p, q) = (posterior.scale()?.to_vec1::<f64>()?, prior.scale()?.to_vec1::<f64>()?);
    // ln density: (df - r - 1)/2 ln |W| - tr(V^-1 W)/2 - df/2 ln |V|, up to shared terms.
    let log_ratio = |w: &Vec<Vec<f64>>| {
        (0..3).map(|i| 0.5 * w[i][i] * (1.0 / q[i] - 1.0 / p[i]) - 0.5 * DF * (p[i] / q[i]).ln()).sum()
    };
    let kl = posterior.kl_divergence(&prior)?.to_scalar::<f64>()?;
    assert_mean("KL_W", kl, draws.iter().map(log_ratio));
    let standard = Wishart::new(&Tensor::new(&[0.0; 3], &Device::Cpu)?, DF, Covariance::Full)?;
    let both = (posterior.kl_divergence(&standard)?, posterior.kl_standard()?);
    assert_eq!(both.0.to_scalar::<f64>()?, both.1.to_scalar::<f64>()?);
    let other = Wishart::new(prior.log_std(), 5.0, Covariance::Full)?;
    let error = posterior.kl_divergence(&other).unwrap_err().to_string();
    assert!(error.contains("equal df, got 4.3 and 5"), "{error}");
    Ok(())
}

#[test]
fn the_dirichlet_divergence_equals_monte_carlo() -> Result<()> {
    use monteclora::special::ln_gamma;
    let log = |a: &[f64]| -> Result<Dirichlet> { Ok(Dirichlet::new(&Tensor::new(a, &Device::Cpu)?.log()?)?) };
    for (a, b) in [(vec![1.5, 1.5], vec![1.0, 1.0]), (vec![0.4, 2.5, 1.1], vec![0.7, 0.7, 0.7])] {
        let kl = log(&a)?.kl_divergence(&log(&b)?)?.to_scalar::<f64>()?;
        let norm = |a: &[f64]| ln_gamma(a.iter().sum()) - a.iter().map(|a| ln_gamma(*a)).sum::<f64>();
        let constant = norm(&a) - norm(&b);
        let draws = weights(&a, Estimator::Exact)?;
        let log_ratio =
            |p: &Vec<f64>| constant + (0..a.len()).map(|i| (a[i] - b[i]) * p[i].ln()).sum::<f64>();
        assert_mean("KL_D", kl, draws.iter().map(log_ratio));
    }
    // The symmetric prior given as a number: the same values and gradients, for a batch.
    let c = candle_core::Var::from_tensor(&normals("symmetric", &[3, 4])?)?;
    let (b, weights) = (Dirichlet::new(&Tensor::full(0.7f64.ln(), 4, &Device::Cpu)?)?, normals("w", &[3])?);
    let terms = [Dirichlet::new(&c)?.kl_terms(&b)?, Dirichlet::new(&c)?.kl_terms_symmetric(0.7)?];
    for (tensor, number) in terms[0].iter().zip(&terms[1]) {
        assert_close("term", number, tensor, 1e-13)?;
        let slope = |term: &Tensor| -> Result<Tensor> {
            let grads = (term * &weights)?.sum_all()?.backward()?;
            Ok(grads.get(&c).ok_or("no gradient")?.clone())
        };
        assert_close("slope", &slope(number)?, &slope(tensor)?, 1e-13)?;
    }
    // The value that a reversed sign turns into -0.4347.
    let kl = log(&[1.5, 1.5])?.kl_divergence(&log(&[1.0, 1.0])?)?.to_scalar::<f64>()?;
    assert!((kl - 0.0484).abs() < 1e-4, "{kl}");
    Ok(())
}

#[test]
fn the_expected_gaussian_divergence_is_the_mean_over_covariances() -> Result<()> {
    for covariance in [Covariance::Full, Covariance::Diagonal] {
        let wishart = wishart(covariance)?;
        let want = Gaussian::expected_kl_standard(&wishart)?.to_scalar::<f64>()?;
        let draws = Gaussian::new(&factors(&wishart)?)?.kl_standard()?.to_vec1::<f64>()?;
        assert_mean(&format!("{covariance:?} E KL_N"), want, draws);
    }
    Ok(())
}

#[test]
fn divergences_are_zero_at_the_prior_and_never_negative() -> Result<()> {
    let n = 300;
    let (c, d) = ((normals("c", &[n, 4])? * 1.5)?, (normals("d", &[n, 4])? * 1.5)?);
    let dirichlet = |c: &Tensor| Dirichlet::new(c);
    let wishart = |rho: &Tensor| Wishart::new(rho, 5.5, Covariance::Full);
    let same = [dirichlet(&c)?.kl_divergence(&dirichlet(&c)?)?, wishart(&c)?.kl_divergence(&wishart(&c)?)?];
    for kl in same {
        assert!(kl.to_vec1::<f64>()?.iter().all(|kl| kl.abs() < 1e-11));
    }
    let other = [dirichlet(&c)?.kl_divergence(&dirichlet(&d)?)?, wishart(&c)?.kl_divergence(&wishart(&d)?)?];
    for kl in other {
        assert!(kl.to_vec1::<f64>()?.iter().all(|kl| *kl > 1e-3));
    }
    let f = wishart(&c)?.rsample(
        &(normals("t", &[n, 4, 4])?
            * Tensor::tril2(4, candle_core::DType::F64, &Device::Cpu)?.broadcast_as((n, 4, 4))?)?
        .sqr()?,
    )?;
    assert!(Gaussian::new(&f)?.kl_standard()?.to_vec1::<f64>()?.iter().all(|kl| *kl > 0.0));
    Ok(())
}
