//! ln Gamma and its first two derivatives, and the softmax, on the host.
//!
//! `ln_gamma` is libm's and `digamma` statrs's. `trigamma` uses the recurrence up to x >= 12, and then the
//! asymptotic series (Abramowitz and Stegun 6.4.12).

/// The logarithm of the gamma function.
///
/// ```text
/// ln_gamma(x) = ln integral_0^inf t^(x-1) e^-t dt,   x > 0
/// ```
pub fn ln_gamma(x: f64) -> f64 {
    libm::lgamma(x)
}

/// The derivative of [`ln_gamma`].
pub fn digamma(x: f64) -> f64 {
    statrs::function::gamma::digamma(x)
}

/// The derivative of [`digamma`] for positive arguments; NaN for others.
///
/// ```text
/// trigamma(x) = sum_{k >= 0} 1 / (x + k)^2
/// ```
pub fn trigamma(x: f64) -> f64 {
    if x.is_nan() || x <= 0.0 {
        return f64::NAN;
    }
    let (mut x, mut sum) = (x, 0.0);
    while x < 12.0 {
        sum += 1.0 / (x * x);
        x += 1.0;
    }
    // 1/x + 1/(2 x^2) + sum_k B_2k / x^(2k + 1); the first term left out is 1.2 x^-13 < 2e-14 / x.
    let r = 1.0 / (x * x);
    let tail = r
        * (1.0 / 6.0
            + r * (-1.0 / 30.0
                + r * (1.0 / 42.0
                    + r * (-1.0 / 30.0 + r * (5.0 / 66.0 + r * (-691.0 / 2730.0 + r * 7.0 / 6.0))))));
    sum + (1.0 + 0.5 / x + tail) / x
}

/// Turns logits into probabilities in place, shifted by the largest so that nothing overflows. A NaN makes
/// all of them NaN.
///
/// ```text
/// softmax(x)_i = exp(x_i) / sum_k exp(x_k)
/// ```
pub fn softmax(row: &mut [f64]) {
    let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    row.iter_mut().for_each(|x| *x = (*x - largest).exp());
    let sum: f64 = row.iter().sum();
    row.iter_mut().for_each(|x| *x /= sum);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assert_close(got: f64, want: f64) {
        assert!((got - want).abs() <= 2e-14 * want.abs().max(1.0), "got {got}, want {want}");
    }

    // python: [(x, gammaln(x), digamma(x), polygamma(1, x)) for x in xs]   (scipy.special)
    const KNOWN: [(f64, f64, f64, f64); 8] = [
        (0.001, 6.907178885383853, -1000.5755719318103, 1000001.6425331959),
        (0.1, 2.252712651734206, -10.423754940411076, 101.43329915079275),
        (0.7, 0.2608672465316665, -1.2200235536979347, 2.8340491566946113),
        (1.5, -0.12078223763524526, 0.03648997397857652, 0.9348022005446793),
        (3.0, std::f64::consts::LN_2, 0.9227843350984671, 0.39493406684822646),
        (12.0, 17.502307845873887, 2.4426616799758123, 0.0869018728717684),
        (47.25, 133.91311374698927, 3.8448333187133032, 0.02138955886832809),
        (200.0, 857.9336698258575, 5.295815283219911, 0.005012520833229169),
    ];

    #[test]
    fn values_match_scipy() {
        for (x, lg, psi, psi1) in KNOWN {
            assert_close(ln_gamma(x), lg);
            assert_close(digamma(x), psi);
            assert_close(trigamma(x), psi1);
        }
    }

    #[test]
    fn trigamma_is_not_defined_at_or_below_zero() {
        assert!(trigamma(0.0).is_nan() && trigamma(-0.5).is_nan() && trigamma(f64::NAN).is_nan());
    }
}
