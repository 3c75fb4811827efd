//! Relative positions of disentangled attention: one table for all layers, one row per bucket of distances.

use candle_core::Tensor;

use crate::adapter::Context;
use crate::models::layers::Dropout;
use crate::ops::LayerNorm;

/// The table of relative positions, shared by the layers.
#[derive(Debug)]
pub struct RelativePositions {
    /// The table (2 * span, d): the row of a bucket is `span + bucket`.
    pub table: Tensor,
    /// The norm of its rows, if the model has one.
    pub norm: Option<LayerNorm>,
    /// Which distances share a row.
    pub buckets: Buckets,
}

/// The mapping of distances to buckets.
#[derive(Debug, Clone, Copy)]
pub struct Buckets {
    /// The number of buckets on each side, half of which hold one distance each. `None`: all buckets do.
    pub log: Option<usize>,
    /// The distance from which on there are no further buckets.
    pub max_distance: usize,
}

impl Buckets {
    /// Half the number of rows of the table.
    pub fn span(&self) -> usize {
        self.log.unwrap_or(self.max_distance)
    }

    /// The row of the table for `distance`, the query's position minus the key's.
    pub fn row(&self, distance: i64) -> usize {
        let span = self.span() as i64;
        (self.bucket(distance) + span).clamp(0, 2 * span - 1) as usize
    }

    /// The bucket of a distance: the distance itself up to half the buckets, then logarithmically fewer
    /// buckets: `sign (mid + ceil(log(|x| / mid) / log((max - 1) / mid) (mid - 1)))`. It is computed in
    /// single precision, as in the models' own training.
    fn bucket(&self, distance: i64) -> i64 {
        let Some(buckets) = self.log else { return distance };
        let mid = (buckets / 2) as i64;
        if distance.abs() <= mid {
            return distance;
        }
        let (middle, far) = (mid as f32, (self.max_distance - 1) as f32);
        let share = (distance.abs() as f32 / middle).ln() / (far / middle).ln();
        distance.signum() * ((share * (middle - 1.0)).ceil() as i64 + mid)
    }
}

impl RelativePositions {
    /// The rows for all distances between `t` tokens, (m, d), and the index among them for each distance from
    /// `-(t - 1)` to `t - 1`.
    ///
    /// # Errors
    /// If there is no token, or candle fails.
    pub fn rows(&self, t: usize, dropout: &Dropout, cx: &Context) -> candle_core::Result<(Tensor, Vec<u32>)> {
        if t == 0 {
            candle_core::bail!("relative positions: expected at least one token, got none");
        }
        let far = t as i64 - 1;
        let (first, last) = (self.buckets.row(-far), self.buckets.row(far));
        let rows = (-far..=far).map(|distance| (self.buckets.row(distance) - first) as u32);
        let mut table = self.table.narrow(0, first, last + 1 - first)?;
        if let Some(norm) = &self.norm {
            table = norm.forward_on(&table, cx.path)?;
        }
        Ok((dropout.forward(&table, cx)?, rows.collect()))
    }

    /// All tensors that may be trained.
    pub fn parameters(&self) -> impl Iterator<Item = Tensor> + '_ {
        let norm = self.norm.iter().flat_map(LayerNorm::parameters);
        std::iter::once(self.table.clone()).chain(norm)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn distances_are_in_the_buckets_of_transformers() -> candle_core::Result<()> {
        let path =
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/encoders_golden.safetensors");
        let golden = candle_core::safetensors::load(path, &Device::Cpu)?;
        let expected = golden["deberta/buckets"].to_vec1::<i64>()?;
        let buckets = Buckets { log: Some(256), max_distance: 512 };
        let far = expected.len() as i64 / 2;
        let found: Vec<i64> = (-far..=far).map(|distance| buckets.bucket(distance)).collect();
        assert_eq!(found, expected);
        // Distances beyond the last bucket are clamped to it; without `log`, each has its own bucket.
        assert_eq!((buckets.row(-far), buckets.row(far), buckets.row(0)), (0, 511, 256));
        let each = Buckets { log: None, max_distance: 3 };
        assert_eq!([-4, -3, 0, 2, 3].map(|distance| each.row(distance)), [0, 0, 3, 5, 5]);
        Ok(())
    }
}
