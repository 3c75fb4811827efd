//! Masked language modelling (Devlin et al. 2019): selects the tokens to predict and what replaces them.

use candle_core::{Device, Tensor};

use crate::error::{Error, Result};
use crate::noise::Stream;

/// The masking rule.
#[derive(Debug, Clone, PartialEq)]
pub struct Masking {
    /// The fraction of tokens to predict; 0.15 in BERT and RoBERTa.
    pub rate: f64,
    /// The id of the mask token. Of the tokens to predict, 80 % are replaced by it, 10 % by a random token,
    /// and 10 % stay as they are.
    pub mask_id: u32,
    /// Ids below this one are special: they are neither masked nor drawn as replacements.
    pub first_ordinary_id: u32,
    /// The number of token ids.
    pub vocab_size: usize,
}

/// A batch of sequences with masked tokens, on one device.
#[derive(Debug, Clone)]
pub struct MaskedBatch {
    /// `(b, t)` of u32.
    pub input_ids: Tensor,
    /// `(b, t)` of u8, 1 on real tokens.
    pub attention_mask: Tensor,
    /// `(n)` of u32: the positions of the tokens to predict, `row * t + column`.
    pub positions: Tensor,
    /// `(n)` of i64: the original ids at these positions; always on the host, where the losses read them.
    pub labels: Tensor,
}

impl Masking {
    /// Checks the values.
    ///
    /// # Errors
    /// If a value is invalid; the error names the first such option.
    pub fn validate(&self) -> Result<()> {
        if !(0.0..=1.0).contains(&self.rate) {
            return Err(Error::config("rate", format!("expected a share in [0, 1], got {}", self.rate)));
        }
        for (name, id) in [("mask_id", self.mask_id), ("first_ordinary_id", self.first_ordinary_id)] {
            if id as usize >= self.vocab_size {
                let reason = format!("{id} is outside a vocabulary of {}", self.vocab_size);
                return Err(Error::config(name, reason));
            }
        }
        Ok(())
    }

    /// Pads `rows` to the longest and masks tokens. The mask is a pure function of `(stream, draw)`, so that
    /// it can change with every epoch and stay the same for a held-out set. At least one token is masked.
    ///
    /// # Errors
    /// If no row has an ordinary token, or as [`Self::validate`].
    pub fn batch(
        &self,
        rows: &[&[u32]],
        pad_id: u32,
        stream: &Stream,
        draw: u64,
        device: &Device,
    ) -> Result<MaskedBatch> {
        self.validate()?;
        let t = rows.iter().map(|row| row.len()).max().unwrap_or(0);
        let mut ids = vec![pad_id; rows.len() * t];
        let mut mask = vec![0u8; ids.len()];
        let ordinary = |id: u32| id >= self.first_ordinary_id;
        let (mut positions, mut labels) = (Vec::new(), Vec::new());
        let mut fallback = None;
        for (r, row) in rows.iter().enumerate() {
            for (c, &id) in row.iter().enumerate() {
                let at = r * t + c;
                (ids[at], mask[at]) = (id, 1);
                if !ordinary(id) {
                    continue;
                }
                fallback = fallback.or(Some((at, id)));
                let words = stream.words(draw, at as u64);
                if unit(words[0]) < self.rate {
                    positions.push(at as u32);
                    labels.push(i64::from(id));
                    ids[at] = self.hide(id, words);
                }
            }
        }
        if positions.is_empty() {
            let Some((at, id)) = fallback else {
                return Err(Error::config("text", "a batch has no ordinary token to predict"));
            };
            (positions, labels) = (vec![at as u32], vec![i64::from(id)]);
            ids[at] = self.mask_id;
        }
        let n = positions.len();
        Ok(MaskedBatch {
            input_ids: Tensor::from_vec(ids, (rows.len(), t), device)?,
            attention_mask: Tensor::from_vec(mask, (rows.len(), t), device)?,
            positions: Tensor::from_vec(positions, n, device)?,
            labels: Tensor::from_vec(labels, n, &Device::Cpu)?,
        })
    }

    fn hide(&self, id: u32, words: [u32; 4]) -> u32 {
        match unit(words[1]) {
            u if u < 0.8 => self.mask_id,
            u if u < 0.9 => {
                let ordinary = (self.vocab_size as u32).saturating_sub(self.first_ordinary_id);
                self.first_ordinary_id + (unit(words[2]) * f64::from(ordinary)) as u32
            }
            _ => id,
        }
    }
}

/// Maps a random word to [0, 1).
fn unit(word: u32) -> f64 {
    f64::from(word) / 4_294_967_296.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::{Noise, Purpose};

    const RULE: Masking = Masking { rate: 0.15, mask_id: 4, first_ordinary_id: 5, vocab_size: 100 };

    fn stream() -> Stream {
        Noise::new(1).stream("mlm", Purpose::Mask)
    }

    #[test]
    fn hides_the_asked_share_behind_mask_random_and_same_in_8_1_1() -> Result<()> {
        let row: Vec<u32> = (0..40_000).map(|i| 5 + (i % 95) as u32).collect();
        let batch = RULE.batch(&[&row], 1, &stream(), 0, &Device::Cpu)?;
        let (ids, n) = (batch.input_ids.flatten_all()?.to_vec1::<u32>()?, batch.labels.dim(0)? as f64);
        let positions = batch.positions.to_vec1::<u32>()?;
        let labels = batch.labels.to_vec1::<i64>()?;
        let close = |got: f64, p: f64, n: f64| (got / n - p).abs() < 5.0 * (p * (1.0 - p) / n).sqrt();
        assert!(close(n, 0.15, 40_000.0), "{n} hidden");
        let masked = positions.iter().filter(|p| ids[**p as usize] == 4).count() as f64;
        let same = positions.iter().zip(&labels).filter(|(p, l)| i64::from(ids[**p as usize]) == **l);
        // One in 95 random replacements is the original token.
        assert!(close(masked, 0.8, n) && close(same.count() as f64, 0.1 + 0.1 / 95.0, n));
        let hidden: std::collections::BTreeSet<u32> = positions.iter().copied().collect();
        let untouched = ids.iter().enumerate().filter(|(i, _)| !hidden.contains(&(*i as u32)));
        assert!(untouched.into_iter().all(|(i, id)| *id == row[i]));
        assert!(labels.iter().zip(&positions).all(|(l, p)| *l == i64::from(row[*p as usize])));
        Ok(())
    }

    #[test]
    fn special_tokens_and_padding_are_never_hidden() -> Result<()> {
        let rule = Masking { rate: 1.0, ..RULE };
        let batch = rule.batch(&[&[0, 7, 8, 2], &[0, 9, 2]], 1, &stream(), 3, &Device::Cpu)?;
        assert_eq!(batch.positions.to_vec1::<u32>()?, [1, 2, 5]);
        assert_eq!(batch.labels.to_vec1::<i64>()?, [7, 8, 9]);
        assert_eq!(batch.attention_mask.to_vec2::<u8>()?, [[1, 1, 1, 1], [1, 1, 1, 0]]);
        assert_eq!(batch.input_ids.to_vec2::<u32>()?[1][3], 1);
        Ok(())
    }

    #[test]
    fn draws_repeat_and_at_least_one_token_is_hidden() -> Result<()> {
        let ids = |rule: &Masking, draw| -> Result<Vec<u32>> {
            let row: Vec<u32> = (5..90).collect();
            Ok(rule.batch(&[&row], 1, &stream(), draw, &Device::Cpu)?.input_ids.flatten_all()?.to_vec1()?)
        };
        assert_eq!(ids(&RULE, 0)?, ids(&RULE, 0)?);
        assert_ne!(ids(&RULE, 0)?, ids(&RULE, 1)?);
        assert_eq!(ids(&Masking { rate: 0.0, ..RULE }, 0)?[0], 4);
        let error = RULE.batch(&[&[0, 2]], 1, &stream(), 0, &Device::Cpu).unwrap_err().to_string();
        assert_eq!(error, "invalid text: a batch has no ordinary token to predict");
        Ok(())
    }

    #[test]
    fn a_rule_outside_its_domain_is_named() {
        for (name, rule) in [
            ("rate", Masking { rate: 1.5, ..RULE }),
            ("rate", Masking { rate: -0.1, ..RULE }),
            ("rate", Masking { rate: f64::NAN, ..RULE }),
            ("mask_id", Masking { mask_id: 100, ..RULE }),
            ("first_ordinary_id", Masking { first_ordinary_id: 100, ..RULE }),
            ("mask_id", Masking { vocab_size: 0, ..RULE }),
        ] {
            let error = rule.batch(&[&[0, 7, 2]], 1, &stream(), 0, &Device::Cpu).unwrap_err().to_string();
            assert!(error.starts_with(&format!("invalid {name}: ")), "{name}: {error}");
        }
    }
}
