//! Rotary scaling of LLaMA 3.1 and later: GGUF stores a factor per frequency, Hugging Face the rule.

use serde_json::{json, Value as Json};

/// The parameters of Hugging Face's `llama3` scaling.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Llama3 {
    pub factor: f64,
    pub low: f64,
    pub high: f64,
    /// The original context length, in tokens.
    pub original: f64,
}

impl Llama3 {
    /// The rule as Hugging Face's `rope_scaling`.
    pub fn to_json(self) -> Json {
        json!({
            "rope_type": "llama3", "factor": self.factor, "low_freq_factor": self.low, "high_freq_factor": self.high,
            "original_max_position_embeddings": self.original as u64,
        })
    }

    /// The divisors of the `dim / 2` frequencies of base `theta`, by the formula of llama.cpp's converter.
    pub fn factors(self, theta: f64, dim: usize) -> Vec<f32> {
        let factor = |i: usize| {
            let wavelength = std::f64::consts::TAU * theta.powf(i as f64 / dim as f64);
            if wavelength < self.original / self.high {
                1.0
            } else if wavelength > self.original / self.low {
                self.factor
            } else {
                let smooth = (self.original / wavelength - self.low) / (self.high - self.low);
                1.0 / ((1.0 - smooth) / self.factor + smooth)
            }
        };
        (0..dim).step_by(2).map(|i| factor(i) as f32).collect()
    }

    /// Recovers the rule from its factors, assuming Meta's values for all but `factor`. `None` if that rule
    /// does not give these factors.
    pub fn behind(factors: &[f32], theta: f64) -> Option<Self> {
        let factor = factors.iter().copied().fold(1.0, f32::max);
        let rule = Self { factor: f64::from(factor), low: 1.0, high: 4.0, original: 8192.0 };
        let made = rule.factors(theta, 2 * factors.len());
        let close = |(a, b): (&f32, f32)| (a - b).abs() <= 1e-3 * b;
        factors.iter().zip(made).all(close).then_some(rule)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rule_is_found_behind_its_factors_and_another_is_not() {
        let rule = Llama3 { factor: 32.0, low: 1.0, high: 4.0, original: 8192.0 };
        let factors = rule.factors(500000.0, 64);
        assert_eq!((factors.len(), factors[0], factors[31]), (32, 1.0, 32.0));
        assert!(factors.iter().any(|factor| *factor > 1.0 && *factor < 32.0));
        assert_eq!(Llama3::behind(&factors, 500000.0), Some(rule));
        let other = Llama3 { high: 8.0, ..rule }.factors(500000.0, 64);
        assert_eq!(Llama3::behind(&other, 500000.0), None);
    }
}
