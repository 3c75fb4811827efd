//! Groups encoded rows into batches and pads each batch to its longest row.
//!
//! The order of an epoch is a pure function of the seed and the epoch's number.

use candle_core::{Device, Tensor};

use crate::data::encode::Encoded;
use crate::data::task::Label;
use crate::error::{Error, Result};
use crate::noise::{Noise, Purpose};
use crate::ops::IGNORED_LABEL;
use crate::util::check::at_least_one;

/// With `length_grouped`, rows are sorted by length within groups of this many batches.
const GROUP: usize = 50;

/// Encoded rows as tensors on one device: `b` rows of `t` tokens.
#[derive(Debug, Clone)]
pub struct Batch {
    /// [`Encoded::row`] of each row.
    pub rows: Vec<usize>,
    /// `(b, t)` of u32.
    pub input_ids: Tensor,
    /// `(b, t)` of u32; 0 on padding.
    pub token_type_ids: Tensor,
    /// `(b, t)` of u8, 1 on real tokens.
    pub attention_mask: Tensor,
    /// `(b)`: i64 for classes ([`IGNORED_LABEL`] if unknown), f32 for scores; always on the host, where the
    /// losses read them.
    pub labels: Tensor,
}

impl Batch {
    /// Pads `rows` on the right with `pad_id` to the longest of them.
    ///
    /// # Errors
    /// If `rows` is empty, or if it mixes scores with classes or unknown labels.
    pub fn collate(rows: &[&Encoded], pad_id: u32, device: &Device) -> Result<Self> {
        if rows.is_empty() {
            return Err(Error::config("batch", "a batch needs at least one row"));
        }
        let (b, t) = (rows.len(), rows.iter().map(|row| row.ids.len()).max().unwrap_or(0));
        let (mut ids, mut types, mut mask) = (vec![pad_id; b * t], vec![0u32; b * t], vec![0u8; b * t]);
        let (mut classes, mut scores) = (Vec::new(), Vec::new());
        for (r, row) in rows.iter().enumerate() {
            for (c, &id) in row.ids.iter().enumerate() {
                (ids[r * t + c], mask[r * t + c]) = (id, 1);
                types[r * t + c] = row.type_ids.get(c).copied().unwrap_or(0);
            }
            match row.label {
                Label::Class(class) => classes.push(i64::from(class)),
                Label::Score(score) => scores.push(score),
                Label::Unknown => classes.push(IGNORED_LABEL),
            }
        }
        let labels = match (classes.len(), scores.len()) {
            (n, 0) => Tensor::from_vec(classes, n, &Device::Cpu)?,
            (0, n) => Tensor::from_vec(scores, n, &Device::Cpu)?,
            _ => {
                let row_with = |score: bool| {
                    let is = |row: &&&Encoded| matches!(row.label, Label::Score(_)) == score;
                    rows.iter().find(is).map_or(0, |row| row.row)
                };
                let (class, score) = (row_with(false), row_with(true));
                let unknown = rows.iter().any(|row| row.row == class && row.label == Label::Unknown);
                let what = if unknown { "no label" } else { "a class" };
                let reason = format!("row {class} has {what} and row {score} a score, in one batch");
                return Err(Error::config("labels", reason));
            }
        };
        Ok(Self {
            rows: rows.iter().map(|row| row.row).collect(),
            input_ids: Tensor::from_vec(ids, (b, t), device)?,
            token_type_ids: Tensor::from_vec(types, (b, t), device)?,
            attention_mask: Tensor::from_vec(mask, (b, t), device)?,
            labels,
        })
    }

    /// The `count` rows from `start` on, with their padding.
    ///
    /// # Errors
    /// If there are fewer rows.
    pub fn narrow(&self, start: usize, count: usize) -> Result<Self> {
        let part = |tensor: &Tensor| tensor.narrow(0, start, count);
        Ok(Self {
            input_ids: part(&self.input_ids)?,
            token_type_ids: part(&self.token_type_ids)?,
            attention_mask: part(&self.attention_mask)?,
            labels: part(&self.labels)?,
            rows: self.rows[start..start + count].to_vec(),
        })
    }

    /// The same rows, padded only to the longest of them, or to one token.
    ///
    /// # Errors
    /// If candle fails.
    pub fn without_padding(&self) -> Result<Self> {
        let mask = self.attention_mask.to_vec2::<u8>()?;
        let length = |row: &Vec<u8>| row.iter().rposition(|shown| *shown != 0).map_or(0, |last| last + 1);
        let (_, all) = self.attention_mask.dims2()?;
        let longest = mask.iter().map(length).max().unwrap_or(0).clamp(all.min(1), all);
        let part = |tensor: &Tensor| tensor.narrow(1, 0, longest);
        Ok(Self {
            input_ids: part(&self.input_ids)?,
            token_type_ids: part(&self.token_type_ids)?,
            attention_mask: part(&self.attention_mask)?,
            labels: self.labels.clone(),
            rows: self.rows.clone(),
        })
    }
}

/// Splits the rows of an epoch into batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batcher {
    batch_size: usize,
    length_grouped: bool,
    noise: Noise,
}

impl Batcher {
    /// Creates a batcher of `batch_size` rows in random order. With `length_grouped`, the rows of a batch
    /// have similar lengths: less padding, but a slightly less random order.
    ///
    /// # Errors
    /// If `batch_size` is 0.
    pub fn new(batch_size: usize, length_grouped: bool, noise: Noise) -> Result<Self> {
        at_least_one("batch_size", batch_size)?;
        Ok(Self { batch_size, length_grouped, noise })
    }

    /// The settings as (name, value) pairs.
    pub fn settings(&self) -> [(&'static str, String); 3] {
        let Self { batch_size, length_grouped, noise } = self;
        [
            ("batch_size", batch_size.to_string()),
            ("length_grouped", length_grouped.to_string()),
            ("seed", noise.seed().to_string()),
        ]
    }

    /// The number of rows per batch.
    pub fn batch_size(&self) -> usize {
        self.batch_size
    }

    /// The number of batches of an epoch over `rows` rows.
    pub fn batches(&self, rows: usize) -> usize {
        rows.div_ceil(self.batch_size)
    }

    /// Returns the batches of epoch number `epoch` as indices into `lengths`, the token counts of the rows.
    /// Every row is in exactly one batch. If the rows do not divide evenly, one batch is smaller: the last
    /// or, with `length_grouped`, any.
    pub fn epoch(&self, lengths: &[usize], epoch: u64) -> Vec<Vec<usize>> {
        let mut order = self.noise.stream("data", Purpose::Shuffle).permutation(epoch, lengths.len());
        if !self.length_grouped {
            return order.chunks(self.batch_size).map(<[usize]>::to_vec).collect();
        }
        for group in order.chunks_mut(self.batch_size.saturating_mul(GROUP)) {
            group.sort_by_key(|&row| lengths[row]); // stable: equal lengths stay shuffled
        }
        let mut batches: Vec<Vec<usize>> = order.chunks(self.batch_size).map(<[usize]>::to_vec).collect();
        let shuffle = self.noise.stream("data.batches", Purpose::Shuffle);
        shuffle
            .permutation(epoch, batches.len())
            .into_iter()
            .map(|i| std::mem::take(&mut batches[i]))
            .collect()
    }
}

/// Splits rows `0..len` in order into batches of `batch_size`, for evaluation.
///
/// # Errors
/// If `batch_size` is 0.
pub fn in_order(len: usize, batch_size: usize) -> Result<Vec<Vec<usize>>> {
    at_least_one("batch_size", batch_size)?;
    let starts = (0..len).step_by(batch_size);
    Ok(starts.map(|start| (start..len.min(start.saturating_add(batch_size))).collect()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::DType;

    fn encoded(row: usize, ids: &[u32], label: Label) -> Encoded {
        Encoded { ids: ids.to_vec(), type_ids: vec![1; ids.len()], label, row }
    }

    #[test]
    fn collating_pads_to_the_longest_of_the_batch() -> Result<()> {
        let rows = [encoded(4, &[0, 7, 8, 2], Label::Class(2)), encoded(9, &[0, 2], Label::Class(0))];
        let batch = Batch::collate(&rows.iter().collect::<Vec<_>>(), 1, &Device::Cpu)?;
        assert_eq!(batch.rows, [4, 9]);
        assert_eq!(batch.input_ids.to_vec2::<u32>()?, [[0, 7, 8, 2], [0, 2, 1, 1]]);
        assert_eq!(batch.token_type_ids.to_vec2::<u32>()?, [[1, 1, 1, 1], [1, 1, 0, 0]]);
        assert_eq!(batch.attention_mask.to_vec2::<u8>()?, [[1, 1, 1, 1], [1, 1, 0, 0]]);
        assert_eq!(batch.labels.to_vec1::<i64>()?, [2, 0]);
        Ok(())
    }

    #[test]
    fn scores_are_single_precision_and_do_not_mix_with_classes() -> Result<()> {
        let (score, class) = (encoded(0, &[5], Label::Score(2.5)), encoded(1, &[5], Label::Class(1)));
        let batch = Batch::collate(&[&score, &score], 1, &Device::Cpu)?;
        assert_eq!((batch.labels.dtype(), batch.labels.to_vec1::<f32>()?), (DType::F32, vec![2.5, 2.5]));
        let refusal = |rows: &[&Encoded]| Batch::collate(rows, 1, &Device::Cpu).unwrap_err().to_string();
        let mixed = "invalid labels: row 1 has a class and row 0 a score, in one batch";
        assert_eq!(refusal(&[&score, &class]), mixed);
        assert_eq!(refusal(&[]), "invalid batch: a batch needs at least one row");
        Ok(())
    }

    #[test]
    fn an_epoch_holds_every_row_once_and_depends_on_seed_and_epoch() -> Result<()> {
        let lengths: Vec<usize> = (0..1003).map(|i| 3 + (i * 37) % 120).collect();
        for grouped in [false, true] {
            let batcher = Batcher::new(8, grouped, Noise::new(1))?;
            let batches = batcher.epoch(&lengths, 0);
            assert_eq!(batches.len(), batcher.batches(lengths.len()));
            assert_eq!(batches.iter().filter(|batch| batch.len() == 8).count(), 125);
            let mut rows = batches.concat();
            rows.sort_unstable();
            assert_eq!(rows, (0..1003).collect::<Vec<_>>());
            assert_eq!(batches, batcher.epoch(&lengths, 0));
            assert_ne!(batches, batcher.epoch(&lengths, 1));
            assert_ne!(batches, Batcher::new(8, grouped, Noise::new(2))?.epoch(&lengths, 0));
            assert!(batcher.epoch(&[], 0).is_empty());
        }
        Ok(())
    }

    #[test]
    fn grouping_by_length_saves_padding_and_shuffles_the_batches() -> Result<()> {
        let lengths: Vec<usize> = (0..2000).map(|i| 3 + (i * 37) % 120).collect();
        let longest = |batch: &Vec<usize>| batch.iter().map(|&r| lengths[r]).max().unwrap_or(0);
        let cost = |grouped| -> Result<usize> {
            let batches = Batcher::new(8, grouped, Noise::new(1))?.epoch(&lengths, 0);
            Ok(batches.iter().map(|batch| longest(batch) * batch.len()).sum())
        };
        let real: usize = lengths.iter().sum();
        assert!(cost(true)? < real + real / 20 && cost(false)? > real + real / 2);
        let batches = Batcher::new(8, true, Noise::new(1))?.epoch(&lengths, 0);
        let rising = batches.windows(2).filter(|w| longest(&w[0]) <= longest(&w[1])).count();
        assert!((80..170).contains(&rising), "{rising} of 249 neighbours rise");
        Ok(())
    }

    #[test]
    fn in_order_is_in_order_and_no_batch_is_empty() -> Result<()> {
        assert_eq!(in_order(5, 2)?, [vec![0, 1], vec![2, 3], vec![4]]);
        assert!(in_order(0, 2)?.is_empty());
        assert_eq!(in_order(2, usize::MAX)?, [vec![0, 1]]);
        let zero = "invalid batch_size: expected at least 1, got 0";
        assert_eq!(in_order(5, 0).unwrap_err().to_string(), zero);
        assert_eq!(Batcher::new(0, true, Noise::new(1)).unwrap_err().to_string(), zero);
        Ok(())
    }
}
