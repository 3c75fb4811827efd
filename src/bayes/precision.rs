//! The precision of a Gaussian prior on the weights, chosen by the evidence.

/// The smallest and the largest prior precision that the evidence chooses.
pub const PRECISION_BOUNDS: (f64, f64) = (1e-6, 1e9);

/// Returns the precision delta within [`PRECISION_BOUNDS`] with the greatest evidence, for weights of this
/// squared norm. `determined` is the effective number of weights that the data determine, `sum lambda /
/// (lambda + delta)` over the eigenvalues of the curvature.
///
/// It is the zero of `determined(delta) - delta |theta|^2` (MacKay 1992), which decreases in delta.
pub(super) fn most_evident(determined: impl Fn(f64) -> f64, squared_norm: f64) -> f64 {
    let (mut low, mut high) = (PRECISION_BOUNDS.0.ln(), PRECISION_BOUNDS.1.ln());
    while high - low > 1e-11 {
        let middle = 0.5 * (low + high);
        let precision = middle.exp();
        if determined(precision) - precision * squared_norm > 0.0 {
            low = middle;
        } else {
            high = middle;
        }
    }
    (0.5 * (low + high)).exp().clamp(PRECISION_BOUNDS.0, PRECISION_BOUNDS.1)
}
