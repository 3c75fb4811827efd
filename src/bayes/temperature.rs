//! Temperature scaling: one number that calibrates the logits of a classifier.
//!
//! ```text
//! p = softmax(z / T),   T = argmin sum_n -ln p_n[label_n]
//! ```
//!
//! Guo et al. 2017, "On calibration of modern neural networks", section 4.2. The sum is convex in b = 1/T, so
//! its minimum is the only zero of its derivative.

use crate::adapter::Params;
use crate::error::{Error, Result};
use crate::metrics::softmax;
use crate::models::sequence::output_layer;
use crate::util::check;

/// The smallest and the largest temperature that [`Temperature::fit`] returns. If every row is right, the
/// optimum is zero; if the logits are uninformative, it is infinite.
pub const BOUNDS: (f64, f64) = (1e-2, 1e2);

/// A temperature T by which logits are divided before the softmax.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Temperature {
    value: f64,
}

impl Temperature {
    /// Scales by a given temperature.
    ///
    /// # Errors
    /// Unless it is positive and finite.
    pub fn new(value: f64) -> Result<Self> {
        check::positive("temperature", value)?;
        Ok(Self { value })
    }

    /// Fits the temperature within [`BOUNDS`] that makes the labels most likely. Use held-out rows: on
    /// training rows it would only show that the model is confident about them.
    ///
    /// # Shapes
    /// - `logits`: n rows of c classes
    /// - `labels`: n classes
    ///
    /// # Errors
    /// If there is no row, rows and labels differ in number, rows differ in length or have fewer
    /// than two classes, a logit is not finite, or a label is out of range.
    pub fn fit(logits: &[Vec<f64>], labels: &[u32]) -> Result<Self> {
        check(logits, labels)?;
        // The slope increases with b: bisection over ln b keeps the zero within the interval.
        let (mut low, mut high) = (-BOUNDS.1.ln(), -BOUNDS.0.ln());
        if slope(logits, labels, low.exp()) >= 0.0 {
            return Ok(Self { value: BOUNDS.1 });
        }
        if slope(logits, labels, high.exp()) <= 0.0 {
            return Ok(Self { value: BOUNDS.0 });
        }
        while high - low > 1e-12 {
            let middle = 0.5 * (low + high);
            if slope(logits, labels, middle.exp()) < 0.0 {
                low = middle;
            } else {
                high = middle;
            }
        }
        Ok(Self { value: (-0.5 * (low + high)).exp() })
    }

    /// Divides weight and bias of the last layer of a sequence classifier's head by T: the model then gives the
    /// scaled logits itself, wherever it is opened.
    ///
    /// # Errors
    /// If the store has no head under one of Hugging Face's names.
    pub fn scale_head(&self, params: &Params) -> Result<()> {
        let layer = output_layer(params)?;
        for name in ["weight", "bias"].map(|role| format!("{layer}.{role}")) {
            if let Some(param) = params.get(&name) {
                params.set(&name, &(param.var.as_detached_tensor() / self.value)?)?;
            }
        }
        Ok(())
    }

    /// The temperature T: above 1 it makes predictions less confident, below 1 more confident.
    pub fn value(&self) -> f64 {
        self.value
    }

    /// `softmax(z / T)` of every row.
    pub fn probabilities(&self, logits: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let scaled = |row: &Vec<f64>| row.iter().map(|z| z / self.value).collect::<Vec<_>>();
        logits.iter().map(|row| softmax(&scaled(row))).collect()
    }
}

/// The derivative of the negative log-likelihood in b = 1/T: `sum_n (E_p[z] - z[label])`.
fn slope(logits: &[Vec<f64>], labels: &[u32], inverse: f64) -> f64 {
    let row = |(z, label): (&Vec<f64>, &u32)| {
        let p = softmax(&z.iter().map(|z| z * inverse).collect::<Vec<_>>());
        // Subtract first: for a confident row, the difference of the two sums would cancel.
        let own = z[*label as usize];
        p.iter().zip(z).map(|(p, z)| p * (z - own)).sum::<f64>()
    };
    logits.iter().zip(labels).map(row).sum()
}

fn check(logits: &[Vec<f64>], labels: &[u32]) -> Result<()> {
    if logits.is_empty() || logits.len() != labels.len() {
        let reason = format!("{} rows for {} labels; at least one needed", logits.len(), labels.len());
        return Err(Error::config("logits", reason));
    }
    let classes = logits[0].len();
    for (row, (z, label)) in logits.iter().zip(labels).enumerate() {
        if z.len() != classes || classes < 2 {
            let reason = format!("row {row}: {} classes, row 0: {classes}; at least 2 needed", z.len());
            return Err(Error::config("logits", reason));
        }
        if let Some(bad) = z.iter().find(|z| !z.is_finite()) {
            return Err(Error::config("logits", format!("row {row} holds {bad}")));
        }
        if *label as usize >= classes {
            return Err(Error::config("labels", format!("row {row}: label {label} of {classes} classes")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};

    use super::*;
    use crate::adapter::{Init, Role};
    use crate::noise::Noise;

    #[test]
    fn the_optimum_makes_the_mean_probability_the_share_of_right_rows() -> Result<()> {
        // Every row is (m, 0); three of four are right: sigmoid(m / T) = 3/4, T = m / ln 3.
        let logits = vec![vec![5.0, 0.0]; 4];
        let temperature = Temperature::fit(&logits, &[0, 0, 1, 0])?;
        assert!((temperature.value() - 5.0 / 3f64.ln()).abs() < 1e-9, "{temperature:?}");
        for row in temperature.probabilities(&logits) {
            assert!((row[0] - 0.75).abs() < 1e-10, "{row:?}");
        }
        Ok(())
    }

    #[test]
    fn the_likelihood_is_flat_at_the_optimum_and_lower_beside_it() -> Result<()> {
        let logits: Vec<Vec<f64>> =
            (0..40).map(|i| (0..3).map(|c| 4.0 * f64::sin(f64::from(3 * i + c))).collect()).collect();
        let labels: Vec<u32> = (0..40).map(|i| if i % 3 == 0 { 1 } else { i % 2 }).collect();
        let best = Temperature::fit(&logits, &labels)?;
        let nll = |t: f64| -> Result<f64> {
            crate::metrics::nll(&Temperature::new(t)?.probabilities(&logits), &labels)
        };
        let t = best.value();
        assert!(t > BOUNDS.0 && t < BOUNDS.1, "{t}");
        assert!(((nll(t * 1.0001)? - nll(t / 1.0001)?) / 2e-4).abs() < 1e-7);
        assert!(nll(t)? < nll(t * 1.1)? && nll(t)? < nll(t / 1.1)?);
        Ok(())
    }

    #[test]
    fn without_a_finite_optimum_it_ends_at_a_bound() -> Result<()> {
        let logits = vec![vec![2.0, -1.0], vec![0.5, 3.0]];
        assert_eq!(Temperature::fit(&logits, &[0, 1])?.value(), BOUNDS.0);
        assert_eq!(Temperature::fit(&logits, &[1, 0])?.value(), BOUNDS.1);
        Ok(())
    }

    #[test]
    fn a_scaled_head_gives_the_scaled_logits() -> Result<()> {
        let params = Params::with_dtype(Noise::new(3), DType::F64, &Device::Cpu);
        let temperature = Temperature::new(2.5)?;
        assert!(temperature.scale_head(&params).is_err());
        let weight = params.create("classifier.weight", Role::Head, (3, 4), &Init::Normal(1.0))?;
        let bias = params.create("classifier.bias", Role::Head, 3, &Init::Normal(1.0))?;
        let xs = Tensor::new(&[[0.3, -1.0, 2.0, 0.7]], &Device::Cpu)?;
        let logits = || xs.matmul(&weight.t()?)?.broadcast_add(&bias)?.to_vec2::<f64>();
        let before = logits()?;
        temperature.scale_head(&params)?;
        let after = logits()?;
        before[0].iter().zip(&after[0]).for_each(|(z, scaled)| assert!((z / 2.5 - scaled).abs() < 1e-14));
        Ok(())
    }

    #[test]
    fn what_cannot_be_fitted_is_named() {
        let refused = |logits: &[Vec<f64>], labels: &[u32], what: &str| {
            let error = Temperature::fit(logits, labels).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        };
        refused(&[], &[], "at least one");
        refused(&[vec![0.0, 1.0]], &[0, 1], "1 rows for 2 labels");
        refused(&[vec![0.0, 1.0], vec![0.0]], &[0, 0], "row 1: 1 classes");
        refused(&[vec![0.0]], &[0], "at least 2");
        refused(&[vec![0.0, f64::NAN]], &[0], "row 0 holds NaN");
        refused(&[vec![0.0, 1.0]], &[2], "label 2 of 2");
        for value in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(Temperature::new(value).is_err());
        }
    }
}
