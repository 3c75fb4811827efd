//! Sampling a token from its logits.

use rand::Rng;

use crate::error::{Error, Result};
use crate::util::check::at_least_one;

/// How a token is chosen. Logits are divided by the temperature: below 1, it makes likely tokens likelier.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Sampling {
    /// The most probable token (greedy).
    ArgMax,
    /// Any token, with its probability.
    All {
        /// Above zero.
        temperature: f64,
    },
    /// One of the `k` most probable tokens.
    TopK {
        /// At least 1.
        k: usize,
        /// Above zero.
        temperature: f64,
    },
    /// One of the nucleus: the smallest set of most probable tokens whose total probability reaches `p`.
    TopP {
        /// In (0, 1].
        p: f64,
        /// Above zero.
        temperature: f64,
    },
    /// One of the nucleus tokens among the `k` most probable tokens.
    TopKThenTopP {
        /// At least 1.
        k: usize,
        /// In (0, 1], as a share of the probability of all tokens.
        p: f64,
        /// Above zero.
        temperature: f64,
    },
}

impl Sampling {
    /// Temperature, k and p; `None` for the greedy choice.
    fn parts(self) -> Option<(f64, usize, f64)> {
        match self {
            Self::ArgMax => None,
            Self::All { temperature } => Some((temperature, usize::MAX, 1.0)),
            Self::TopK { k, temperature } => Some((temperature, k, 1.0)),
            Self::TopP { p, temperature } => Some((temperature, usize::MAX, p)),
            Self::TopKThenTopP { k, p, temperature } => Some((temperature, k, p)),
        }
    }

    pub(super) fn validate(self) -> Result<()> {
        let Some((temperature, k, p)) = self.parts() else { return Ok(()) };
        if !(temperature > 0.0 && temperature.is_finite()) {
            let reason =
                format!("expected a positive number, got {temperature} (use ArgMax for greedy decoding)");
            return Err(Error::config("temperature", reason));
        }
        at_least_one("top_k", k)?;
        if !(p > 0.0 && p <= 1.0) {
            return Err(Error::config("top_p", format!("expected a share in (0, 1], got {p}")));
        }
        Ok(())
    }

    /// Chooses a token with the next number of `rng`; `None` if no token has a positive probability.
    pub(super) fn choose(self, logits: &[f32], rng: &mut impl Rng) -> Option<u32> {
        let larger = |best: usize, i: usize| if logits[i] > logits[best] { i } else { best };
        let best = (0..logits.len()).reduce(larger).filter(|best| logits[*best] > f32::NEG_INFINITY)?;
        let Some((temperature, k, p)) = self.parts() else { return Some(best as u32) };
        let top = f64::from(logits[best]);
        // The largest logit is subtracted first, so that nothing overflows at any temperature.
        let weight = |logit: &f32| (((f64::from(*logit) - top) / temperature) as f32).exp();
        let tokens = candidates(logits.iter().map(weight), k, p);
        let (mut sum, target) = (0.0, rng.random::<f64>() * total(&tokens));
        let chosen = tokens.into_iter().find(|(_, weight)| {
            sum += f64::from(*weight);
            sum > target
        });
        chosen.map(|(token, _)| token as u32)
    }
}

fn total(tokens: &[(usize, f32)]) -> f64 {
    tokens.iter().map(|(_, weight)| f64::from(*weight)).sum()
}

/// The first `k` tokens of the nucleus of the share `p`, with their weights. They are sorted by decreasing
/// weight, or left in the order of their ids if every token qualifies.
fn candidates(weights: impl Iterator<Item = f32>, k: usize, p: f64) -> Vec<(usize, f32)> {
    let mut tokens: Vec<(usize, f32)> = weights.enumerate().collect();
    if p >= 1.0 && k >= tokens.len() {
        return tokens;
    }
    let all = total(&tokens);
    if p < 1.0 {
        // Tokens below this weight together have less than half of the weight outside the nucleus, so none
        // of them is in it. Dropping them leaves few tokens to sort.
        let least = (1.0 - p) * all / (2.0 * tokens.len() as f64);
        tokens.retain(|(_, weight)| f64::from(*weight) >= least);
    }
    let by_weight = |a: &(usize, f32), b: &(usize, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if k < tokens.len() {
        tokens.select_nth_unstable_by(k, by_weight);
        tokens.truncate(k);
    }
    tokens.sort_unstable_by(by_weight);
    if p < 1.0 {
        let mut sum = 0.0;
        let nucleus = tokens.iter().take_while(|(_, weight)| {
            let lacks = sum < p * all;
            sum += f64::from(*weight);
            lacks
        });
        let nucleus = nucleus.count();
        tokens.truncate(nucleus);
    }
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::{Noise, Purpose};

    /// The probabilities of the tokens.
    const SHARES: [f32; 6] = [0.05, 0.4, 0.0, 0.25, 0.2, 0.1];

    /// The observed frequency of each token.
    fn shares(sampling: Sampling) -> Vec<f64> {
        let logits = SHARES.map(f32::ln);
        let stream = Noise::new(1).stream("row", Purpose::Predict);
        let (n, mut counts) = (40_000u64, vec![0.0; SHARES.len()]);
        for step in 0..n {
            counts[sampling.choose(&logits, &mut stream.rng(step)).unwrap() as usize] += 1.0 / n as f64;
        }
        counts
    }

    #[test]
    fn tokens_come_by_their_probabilities_among_those_that_may() {
        let temperature = 1.0;
        let cases = [
            (Sampling::ArgMax, [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]),
            (Sampling::All { temperature }, [0.05, 0.4, 0.0, 0.25, 0.2, 0.1]),
            // The square roots of the probabilities, and their squares: [x ** 0.5 / sum(y ** 0.5 for y in p)]
            (Sampling::All { temperature: 2.0 }, [0.1055, 0.2984, 0.0, 0.2359, 0.2110, 0.1492]),
            (Sampling::All { temperature: 0.5 }, [0.0091, 0.5818, 0.0, 0.2273, 0.1455, 0.0364]),
            (Sampling::TopK { k: 2, temperature }, [0.0, 0.4 / 0.65, 0.0, 0.25 / 0.65, 0.0, 0.0]),
            (Sampling::TopK { k: 99, temperature }, [0.05, 0.4, 0.0, 0.25, 0.2, 0.1]),
            // The first two tokens reach only 0.65 of 0.66, so the third belongs to the nucleus.
            (Sampling::TopP { p: 0.66, temperature }, [0.0, 0.4 / 0.85, 0.0, 0.25 / 0.85, 0.2 / 0.85, 0.0]),
            (Sampling::TopP { p: 0.3, temperature }, [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]),
            (Sampling::TopP { p: 1.0, temperature }, [0.05, 0.4, 0.0, 0.25, 0.2, 0.1]),
            (
                Sampling::TopKThenTopP { k: 4, p: 0.66, temperature },
                [0.0, 0.4 / 0.85, 0.0, 0.25 / 0.85, 0.2 / 0.85, 0.0],
            ),
            (
                Sampling::TopKThenTopP { k: 2, p: 0.66, temperature },
                [0.0, 0.4 / 0.65, 0.0, 0.25 / 0.65, 0.0, 0.0],
            ),
        ];
        for (sampling, want) in cases {
            for (got, want) in shares(sampling).into_iter().zip(want) {
                let error = (want * (1.0 - want) / 40_000.0f64).sqrt();
                assert!((got - want).abs() <= 4.5 * error + 1e-4 * want, "{sampling:?}: {got} {want}");
            }
        }
    }

    #[test]
    fn a_nucleus_among_many_is_that_of_all_sorted() {
        let mut z = vec![0f32; 4000];
        Noise::new(2).stream("logits", Purpose::Init).fill_normal_f32(0, &mut z);
        let weights: Vec<(usize, f32)> = z.iter().map(|z| (4.0 * z).exp()).enumerate().collect();
        let found = |k, p| candidates(weights.iter().map(|(_, weight)| *weight), k, p);
        let mut sorted = weights.clone();
        sorted.sort_by(|a, b| b.1.total_cmp(&a.1));
        for p in [1e-9, 0.1, 0.5, 0.9, 0.999] {
            let (mut sum, mut want) = (0.0, Vec::new());
            for (token, weight) in &sorted {
                if sum >= p * total(&weights) {
                    break;
                }
                sum += f64::from(*weight);
                want.push((*token, *weight));
            }
            assert!(want.len() < 4000);
            assert_eq!(found(usize::MAX, p), want);
            assert_eq!(found(7, p), want[..want.len().min(7)]);
        }
        assert_eq!(found(7, 1.0), sorted[..7]);
        assert_eq!(found(4000, 1.0), weights);
    }

    #[test]
    fn of_equal_logits_the_first_counts_and_without_probabilities_there_is_no_token() {
        let mut rng = Noise::new(1).stream("row", Purpose::Predict).rng(0);
        assert_eq!(Sampling::ArgMax.choose(&[0.0, 2.0, 2.0], &mut rng), Some(1));
        assert_eq!(Sampling::TopK { k: 1, temperature: 1.0 }.choose(&[0.0, 2.0, 2.0], &mut rng), Some(1));
        // Divided by this temperature, the logit itself would overflow.
        assert_eq!(Sampling::All { temperature: 1e-308 }.choose(&[-9.0, 1e30, 7.0], &mut rng), Some(1));
        for sampling in [Sampling::All { temperature: 1.0 }, Sampling::TopP { p: 0.5, temperature: 1.0 }] {
            assert_eq!(sampling.choose(&[f32::NEG_INFINITY; 3], &mut rng), None);
            assert_eq!(sampling.choose(&[], &mut rng), None);
        }
    }
}
