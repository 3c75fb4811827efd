//! Quantiles as in NumPy.

/// Returns the `q`-quantile of `values` by linear interpolation, as NumPy does; NaN if there is no value, or if
/// `q` or a value is NaN.
pub fn quantile(values: &[f64], q: f64) -> f64 {
    if q.is_nan() || values.iter().any(|value| value.is_nan()) {
        return f64::NAN;
    }
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let place = q.clamp(0.0, 1.0) * last as f64;
    let (low, high) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    if low == high || high.is_infinite() {
        high
    } else {
        low + (high - low) * place.fract()
    }
}

/// Returns the median; NaN if there is no value.
pub fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_numpys() {
        let values = [3.0, 1.0, 4.0, 1.5, 9.0];
        assert_eq!([0.25, 0.5, 0.75].map(|q| quantile(&values, q)), [1.5, 3.0, 4.0]);
        assert_eq!([0.0, 0.1, 1.0].map(|q| quantile(&values, q)), [1.0, 1.2, 9.0]);
        assert_eq!(median(&[1.0, f64::INFINITY]), f64::INFINITY);
        assert_eq!(median(&[f64::INFINITY, f64::INFINITY]), f64::INFINITY);
        assert!(median(&[]).is_nan() && median(&[1.0, 2.0, f64::NAN]).is_nan());
        assert!(quantile(&values, f64::NAN).is_nan());
    }
}
