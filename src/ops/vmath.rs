//! Elementary functions of f32, written so that the compiler vectorises loops over them: no calls, no
//! branches, no fused multiply-add (a library call where the target lacks it). NaN stays NaN.

const LANES: usize = 16;

/// `e^x` to about 1 ulp; 0 below -87.3, infinite above 88.7 (the range of normal f32).
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits (as in Cephes).
    const ROUND: f32 = 12_582_912.0;
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * 0.693_359_4) + n * 2.121_944_4e-4;
    let p = 1.987_569_2e-4;
    let p = p * r + 1.398_2e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let p = p * r * r + r + 1.0;
    // 2^n in two factors, so that n = 128 (x just below 88.7) does not overflow.
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let half = n >> 1;
    let power = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
    let y = p * power(half) * power(n.wrapping_sub(half));
    let y = if x < -87.33 { 0.0 } else { y };
    if x > 88.72 {
        f32::INFINITY
    } else {
        y
    }
}

/// The standard normal distribution function and density.
///
/// The tail is Abramowitz and Stegun 7.1.26 (absolute error below 5e-7 in f32). It shares the exponential
/// with the density, so that GELU and its derivative need only one.
#[inline(always)]
pub(super) fn normal(x: f32) -> (f32, f32) {
    let e = exp(-0.5 * x * x);
    let t = 1.0 / (1.0 + 0.327_591_1 * std::f32::consts::FRAC_1_SQRT_2 * x.abs());
    let p = 1.061_405_4;
    let p = p * t - 1.453_152;
    let p = p * t + 1.421_413_7;
    let p = p * t - 0.284_496_74;
    let p = p * t + 0.254_829_6;
    let tail = 0.5 * p * t * e;
    let cdf = if x > 0.0 { 1.0 - tail } else { tail };
    (cdf, e * 0.398_942_3)
}

/// The hyperbolic tangent to a few ulp. Near 0 it is computed from the series, because the quotient
/// would lose digits.
#[inline(always)]
pub(super) fn tanh(x: f32) -> f32 {
    let s = x * x;
    let series =
        x * (1.0 - s * (0.333_333_34 - s * (0.133_333_34 - s * (0.053_968_254 - s * 0.021_869_488))));
    let quotient = 1.0 - 2.0 / (exp(2.0 * x) + 1.0);
    if x.abs() < 0.25 {
        series
    } else {
        quotient
    }
}

/// The tanh GELU's argument is `GELU_SLOPE (x + GELU_CUBE x^3)`, whose derivative at 0 is `sqrt(2 / pi)`.
pub(super) const GELU_SLOPE: f64 = 0.797_884_560_802_865_4;
pub(super) const GELU_CUBE: f64 = 0.044_715;

/// The tanh approximation of GELU (Hendrycks and Gimpel 2016) and its derivative. `(1 + tanh u) / 2` is the
/// logistic function of `2 u`.
#[inline(always)]
pub(super) fn gelu_tanh(x: f32) -> (f32, f32) {
    let (slope, cube) = (2.0 * GELU_SLOPE as f32, GELU_CUBE as f32);
    let s = sigmoid(slope * x * (1.0 + cube * x * x));
    (x * s, s + x * s * (1.0 - s) * slope * (1.0 + 3.0 * cube * x * x))
}

/// `x Phi(x)`.
#[inline(always)]
pub(super) fn gelu(x: f32) -> f32 {
    x * normal(x).0
}

/// The derivative of [`gelu`]: `Phi(x) + x phi(x)`.
#[inline(always)]
pub(super) fn gelu_slope(x: f32) -> f32 {
    let (cdf, pdf) = normal(x);
    cdf + x * pdf
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The derivative of `x sigmoid(x)`.
#[inline(always)]
pub(super) fn silu_slope(x: f32) -> f32 {
    let s = sigmoid(x);
    s * (1.0 + x * (1.0 - s))
}

/// The sum of `f(a_i, b_i)`, with sixteen accumulators, because a single one would prevent SIMD.
#[inline(always)]
pub(super) fn sum2(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let (mut a, mut b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    for (a, b) in a.by_ref().zip(b.by_ref()) {
        for ((lane, &a), &b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += f(a, b);
        }
    }
    let rest: f32 = a.remainder().iter().zip(b.remainder()).map(|(&a, &b)| f(a, b)).sum();
    lanes.iter().sum::<f32>() + rest
}

/// The sum of `f(x_i)`.
#[inline(always)]
pub(super) fn sum(xs: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    sum2(xs, xs, |x, _| f(x))
}

/// The largest element. NaN elements are skipped; minus infinity if there are no others.
#[inline(always)]
pub(super) fn max(xs: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = xs.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = if x > *lane { x } else { *lane };
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp_and_keeps_nan() {
        for i in -8700..8800 {
            let x = i as f32 * 0.01 + 0.003;
            let (got, want) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((got / want - 1.0).abs() < 2.4e-7, "{x}: {got} {want}");
        }
        assert!(exp(f32::NAN).is_nan());
        assert_eq!((exp(f32::NEG_INFINITY), exp(-1e30), exp(0.0)), (0.0, 0.0, 1.0));
        assert_eq!((exp(f32::INFINITY), exp(1e30)), (f32::INFINITY, f32::INFINITY));
    }

    #[test]
    fn the_normal_distribution_function_is_right_to_single_precision() {
        for i in -800..800 {
            let x = i as f32 * 0.01 + 0.001;
            let want = 0.5 * libm::erfc(-f64::from(x) / std::f64::consts::SQRT_2);
            assert!((f64::from(normal(x).0) - want).abs() < 5e-7, "{x}");
        }
        assert!(gelu(f32::NAN).is_nan() && gelu_slope(f32::NAN).is_nan() && sigmoid(f32::NAN).is_nan());
        assert_eq!(sigmoid(-1e4), 0.0);
    }

    #[test]
    fn the_hyperbolic_tangent_is_right_to_a_few_ulp_and_keeps_nan() {
        for i in -4000..=4000 {
            let x = i as f32 * 3e-3;
            let exact = f64::from(x).tanh();
            assert!((f64::from(tanh(x)) - exact).abs() <= 6e-7 * exact.abs().max(1e-30), "{x}");
        }
        assert_eq!((tanh(100.0), tanh(-100.0)), (1.0, -1.0));
        assert!(tanh(f32::NAN).is_nan());
    }

    #[test]
    fn sums_and_maxima_reach_the_remainder() {
        let xs: Vec<f32> = (0..37).map(|i| i as f32).collect();
        assert_eq!((sum(&xs, |x| x), max(&xs)), (666.0, 36.0));
        assert!(sum(&[1.0, f32::NAN], |x| x).is_nan());
    }
}
