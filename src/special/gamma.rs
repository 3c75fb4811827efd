//! Gamma draws as quantiles of uniform numbers, in logarithms, with their implicit derivative.
//!
//! For a fixed uniform number, a quantile is smooth in the shape, so draws can be differentiated, checked by
//! finite differences and kept in a buffer (Figurnov et al. 2018; Jankowiak and Obermeyer 2018).

use super::{digamma, ln_gamma};

/// A Gamma(a, 1) draw: the quantile of a uniform number, and its derivative in the shape.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GammaQuantile {
    /// `ln z`; finite even if `z` itself underflows.
    pub log_z: f64,
    /// `d ln z / d a` at fixed `u`.
    pub dlog_z: f64,
}

impl GammaQuantile {
    /// The draw `z`; zero if it underflows.
    pub fn z(&self) -> f64 {
        self.log_z.exp()
    }
}

/// The `u` quantile of Gamma(`shape`, 1) and its implicit derivative.
///
/// ```text
/// F(z; a) = u,   d ln z / d a = -(dF/da)(z; a) / (z p(z; a))
/// ```
///
/// Newton's method: below `a + 1` in ln z on ln F, above it in z on ln(1 - F). The first function is concave
/// and increasing, so from any start the first step lands left of the root and the rest approach it from
/// there; the second is approached from the right if a > 1 and from the left if a < 1. NaN unless
/// `0 < shape <= MAX_SHAPE` and `0 < u < 1`.
pub fn gamma_quantile(shape: f64, u: f64) -> GammaQuantile {
    if !(shape > 0.0 && shape <= MAX_SHAPE && u > 0.0 && u < 1.0) {
        return GammaQuantile { log_z: f64::NAN, dlog_z: f64::NAN };
    }
    let a = shape;
    let (ln_u, ln_norm) = (u.ln(), ln_gamma(a + 1.0));
    let split = a + 1.0;
    let ln_cdf = |y: f64, x: f64, sum: f64| a * y - x - ln_norm + sum.ln();
    // The median lies below the shape.
    if u <= 0.5 || ln_u <= ln_cdf(split.ln(), split, lower_series::<false>(a, split).0) {
        // Start at the root's asymptote as x -> 0, from F <= x^a / Gamma(a + 1), with the next two terms of
        // its expansion (Gil, Segura and Temme 2012) if they are small.
        let mut y = (ln_u + ln_norm) / a;
        let r = y.exp();
        let next = r / (a + 1.0);
        if next < 0.5 {
            y += (next + r * r * (3.0 * a + 5.0) / (2.0 * (a + 1.0) * (a + 1.0) * (a + 2.0))).ln_1p();
        }
        for _ in 0..MAX_STEPS {
            let (sum, _) = lower_series::<false>(a, y.exp());
            let step = (ln_u - ln_cdf(y, y.exp(), sum)) * sum / a; // d ln F / d y = a / sum
            y += step;
            if step.abs() <= 1e-10 + 1e-14 * y.abs() {
                break;
            }
        }
        let (sum, dsum) = lower_series::<true>(a, y.exp());
        GammaQuantile { log_z: y, dlog_z: -(y - digamma(a + 1.0) + dsum / sum) * sum / a }
    } else {
        let ln_v = (-u).ln_1p();
        let ln_gamma_a = ln_norm - a.ln();
        // Start at 1 - F ~ x^(a - 1) e^-x / Gamma(a), solved for x in two rounds; exact at a = 1.
        let t = -(ln_v + ln_gamma_a);
        let x = t + (a - 1.0) * t.max(split).ln();
        let mut x = (t + (a - 1.0) * x.max(split).ln()).max(split);
        for _ in 0..MAX_STEPS {
            let (h, _) = upper_fraction::<false>(a, x);
            let ln_survival = a * x.ln() - x - ln_gamma_a + h.ln();
            let next = (x + (ln_survival - ln_v) * x * h).max(split); // d ln(1 - F) / d x = -1 / (x h)
            let done = (next - x).abs() <= 1e-10 * x;
            x = next;
            if done {
                break;
            }
        }
        let (h, dln_h) = upper_fraction::<true>(a, x);
        GammaQuantile { log_z: x.ln(), dlog_z: (x.ln() - digamma(a) + dln_h) * h }
    }
}

/// The most Newton steps: about ten are needed, but the loop must end for a NaN too.
const MAX_STEPS: usize = 200;
/// The largest shape of [`gamma_quantile`]: beyond it, the series would be truncated silently.
pub const MAX_SHAPE: f64 = 1e9;
/// The most series terms: about ten times the square root of the shape are needed.
const MAX_TERMS: usize = 1_000_000;

/// `s` of `F(x; a) = x^a e^-x s / Gamma(a + 1)` and, if `SLOPED`, `ds / da`.
///
/// ```text
/// s = sum_{n >= 0} x^n / ((a + 1) ... (a + n))
/// ```
fn lower_series<const SLOPED: bool>(a: f64, x: f64) -> (f64, f64) {
    let (mut term, mut dterm, mut sum, mut dsum) = (1.0, 0.0, 1.0, 0.0);
    for n in 1..MAX_TERMS {
        let k = a + n as f64;
        let ratio = x / k;
        if SLOPED {
            dterm = (dterm - term / k) * ratio;
            dsum += dterm;
        }
        term *= ratio;
        sum += term;
        if term <= 1e-17 * sum && dterm.abs() <= 1e-17 * (dsum.abs() + 1e-300) {
            break;
        }
    }
    (sum, dsum)
}

/// `h` of `1 - F(x; a) = x^a e^-x h / Gamma(a)` and, if `SLOPED`, `d ln h / da`, for `x >= a + 1`: the
/// continued fraction (Abramowitz and Stegun 6.5.31) by Lentz's method, differentiated term by term.
///
/// ```text
/// h = 1 / (x + 1 - a - 1 (1 - a) / (x + 3 - a - 2 (2 - a) / (x + 5 - a - ...)))
/// ```
fn upper_fraction<const SLOPED: bool>(a: f64, x: f64) -> (f64, f64) {
    let mut b = x + 1.0 - a;
    let (mut c, mut dc) = (1e300, 0.0);
    let mut d = 1.0 / b;
    let mut dd = d * d;
    let (mut h, mut dln_h) = (d, d);
    for i in 1..MAX_TERMS {
        let i = i as f64;
        let numerator = -i * (i - a); // its derivative is i, that of b is -1
        b += 2.0;
        let d_next = 1.0 / (numerator * d + b);
        if SLOPED {
            dd = -d_next * d_next * (i * d + numerator * dd - 1.0);
            dc = -1.0 + (i - numerator * dc / c) / c;
        }
        c = b + numerator / c;
        d = d_next;
        let (ratio, mut dratio) = (c * d, 0.0);
        if SLOPED {
            dratio = dc * d + c * dd;
            dln_h += dratio / ratio;
        }
        h *= ratio;
        // An integer shape ends the fraction (numerator 0) but not its derivative: check both.
        if (ratio - 1.0).abs() <= 1e-16 && dratio.abs() <= 1e-16 * dln_h.abs() {
            break;
        }
    }
    (h, dln_h)
}
#[cfg(test)]
mod tests {
    use super::*;

    // python (mpmath, 60 digits): y solves gammainc(a, 0, e^y, regularized=True) = u, and dy/da is
    // its central difference at step 1e-15.
    #[rustfmt::skip]
    const KNOWN: [(f64, f64, f64, f64); 13] = [
        (0.01, 0.3, -120.96631122720057, 12040.542576933),
        (0.01, 0.9999, 1.1712549653460849, 25.225818522505),
        (0.05, 1e-06, -276.8472726093307, 5526.9885523606),
        (0.5, 0.5, -1.4807447797617275, 3.7735709919982),
        (1.0, 0.25, -1.2458993237072382, 2.0180484342664),
        (1.0, 0.9999999999999991, 3.5455100848464817, 0.11976652364236),
        (2.0, 0.999999, 2.814715113114863, 0.15571148657426),
        (3.7, 0.7, 1.4862591908783348, 0.25832964776552),
        (8.0, 1e-15, -2.9861642972087737, 0.64454211524698),
        (50.0, 0.5, 3.9053420296880868, 0.020133905451758),
        (50.0, 0.999999, 4.511555841598558, 0.014648391860657),
        (200.0, 1e-06, 4.940344520253555, 0.0059531497532471),
        (200.0, 0.9, 5.385982453905884, 0.0047880267762019),
    ];

    #[test]
    fn quantiles_and_their_derivatives_match_mpmath() {
        for (a, u, log_z, dlog_z) in KNOWN {
            let got = gamma_quantile(a, u);
            let error = (got.log_z - log_z).abs() / log_z.abs().max(1.0);
            assert!(error < 1e-13, "a {a} u {u}: got {}, want {log_z}", got.log_z);
            let error = (got.dlog_z / dlog_z - 1.0).abs();
            assert!(error < 1e-10, "a {a} u {u}: got {}, want {dlog_z}", got.dlog_z);
        }
    }

    #[test]
    fn implicit_derivatives_equal_central_differences_of_the_quantile() {
        let shapes = [0.05, 0.11, 0.3, 0.5, 0.99, 1.0, 1.01, 2.0, 3.5, 8.0, 17.0, 30.0, 50.0];
        let uniforms = [1e-6, 1e-4, 0.01, 0.1, 0.3, 0.5, 0.6, 0.7, 0.9, 0.99, 0.999, 0.9999, 1.0 - 1e-6];
        for a in shapes {
            for u in uniforms {
                let at = |a: f64| gamma_quantile(a, u);
                let (got, h) = (at(a), 1e-5 * a);
                let slope = (at(a + h).log_z - at(a - h).log_z) / (2.0 * h);
                assert!((got.dlog_z / slope - 1.0).abs() < 1e-5, "a {a} u {u}: {} {slope}", got.dlog_z);
                if got.log_z > -600.0 {
                    let slope = (at(a + h).z() - at(a - h).z()) / (2.0 * h);
                    let dz = got.z() * got.dlog_z;
                    assert!((dz / slope - 1.0).abs() < 1e-5, "a {a} u {u}: {dz} {slope}");
                }
            }
        }
    }

    #[test]
    fn the_quantile_inverts_the_distribution_function() {
        for a in [0.01, 0.2, 1.0, 5.0, 50.0, 200.0] {
            for u in [1e-15, 1e-8, 0.02, 0.4, 0.8, 1.0 - 1e-9, 1.0 - 1e-15] {
                let z = gamma_quantile(a, u).z();
                if z > 1e-300 {
                    let back = statrs::function::gamma::gamma_lr(a, z);
                    assert!((back - u).abs() < 1e-10 * u, "a {a} u {u}: {back}");
                }
            }
        }
    }

    #[test]
    fn a_draw_that_underflows_has_a_finite_logarithm() {
        let got = gamma_quantile(0.01, 1e-12);
        assert_eq!(got.z(), 0.0);
        // F(x) -> x^a / Gamma(a + 1): ln z = (ln u + ln Gamma(a + 1)) / a.
        assert!((got.log_z - (1e-12f64.ln() + ln_gamma(1.01)) / 0.01).abs() < 1e-9);
        assert!(got.dlog_z.is_finite());
    }

    #[test]
    fn arguments_outside_the_domain_give_nan() {
        let shapes = [0.0, -1.0, f64::NAN, f64::INFINITY, 1.001 * MAX_SHAPE].map(|a| (a, 0.5));
        for (a, u) in shapes.into_iter().chain([(1.0, 0.0), (1.0, 1.0)]) {
            let got = gamma_quantile(a, u);
            assert!(got.log_z.is_nan() && got.dlog_z.is_nan(), "a {a} u {u}");
        }
    }

    #[test]
    fn the_largest_shape_is_served_in_full() {
        // Cornish and Fisher: z = a + x sqrt a + (x^2 - 1) / 3 + O(1 / sqrt a), x the normal quantile.
        for (u, x) in [(0.25, -0.674_489_750_196_081_7), (0.975, 1.959_963_984_540_054)] {
            let (a, got) = (MAX_SHAPE, gamma_quantile(MAX_SHAPE, u));
            let want = (a + x * a.sqrt() + (x * x - 1.0) / 3.0).ln();
            assert!((got.log_z - want).abs() < 1e-9, "u {u}: {} {want}", got.log_z);
            let slope = (1.0 + 0.5 * x / a.sqrt()) / want.exp();
            assert!((got.dlog_z / slope - 1.0).abs() < 1e-4, "u {u}: {} {slope}", got.dlog_z);
        }
    }
}
