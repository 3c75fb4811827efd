//! What every model that predicts the next token offers: to training, evaluation and generation.

use candle_core::{Device, Tensor};
use candle_nn::kv_cache::KvCache;

use crate::adapter::{AdaptableModel, Context};
use crate::ops;

/// The keys and values of every layer for the tokens seen so far, of one batch.
///
/// It is no `Clone`: one would write into the memory of the other. [`Self::fork`] makes one of its own.
#[derive(Debug)]
pub struct Cache {
    layers: Vec<KvCache>,
    room: usize,
}

impl Cache {
    /// An empty cache for `layers` layers, with room for `capacity` tokens a row before it grows.
    pub fn new(layers: usize, capacity: usize) -> Self {
        Self { layers: (0..layers).map(|_| KvCache::new(1, capacity.max(1))).collect(), room: capacity }
    }

    /// A cache with the same tokens and memory of its own: several continuations of one prompt.
    ///
    /// # Errors
    /// If candle fails.
    pub fn fork(&self) -> candle_core::Result<Self> {
        let mut fork = Self::new(self.layers.len(), self.room.max(self.length()));
        for (own, layer) in fork.layers.iter_mut().zip(&self.layers) {
            if let (Some(k), Some(v)) = (layer.k()?, layer.v()?) {
                own.append(&k.contiguous()?, &v.contiguous()?)?;
            }
        }
        Ok(Self { room: self.room, ..fork })
    }

    /// How many tokens of each row it was begun for.
    pub fn room(&self) -> usize {
        self.room
    }

    /// The tokens of each row that are in the cache, padding and virtual tokens included.
    pub fn length(&self) -> usize {
        self.layers.first().map_or(0, KvCache::current_seq_len)
    }

    /// The part of one layer.
    pub(crate) fn layer(&mut self, index: usize) -> Option<&mut KvCache> {
        self.layers.get_mut(index)
    }
}

/// A decoder with a language-model head. One of them serves any number of threads, each with a cache of its own.
pub trait CausalLm: AdaptableModel + Send + Sync {
    /// Where a batch comes in.
    fn device(&self) -> &Device;

    /// Whether training keeps each layer's input alone and computes the layer again in backward
    /// ([`crate::ops::checkpoint`]): less memory for one more forward pass.
    fn set_checkpoint_layers(&mut self, on: bool);

    /// The longest sequence, prompt and answer together, beside virtual tokens.
    fn max_length(&self) -> usize;

    /// An empty cache for this model, with room for `capacity` tokens a row.
    fn cache(&self, capacity: usize) -> Cache;

    /// The last hidden states. With a cache, `input_ids` continue what is in it, and their keys and
    /// values are appended; nothing is differentiated through what was there.
    ///
    /// Padding may stand on either side. Positions count columns: rotary embeddings are relative,
    /// so that left padding shifts nothing but them. The virtual tokens of prompt tuning stand
    /// directly before a row's first real token, whatever padding is before it.
    ///
    /// # Shapes
    /// - `input_ids`: `(b, t)` of u32
    /// - `attention_mask`: `(b, cached + t)` of u8, 1 on real tokens; virtual ones are not counted
    /// - output: `(b, t, hidden)`
    ///
    /// # Errors
    /// If shapes differ, the sequence is longer than [`Self::max_length`], virtual tokens go into
    /// a cache before a row that is padding alone so far, or a cache grows beyond its room to where the model's
    /// positions are others (LongRoPE).
    fn hidden(
        &self,
        input_ids: &Tensor,
        attention_mask: &Tensor,
        cache: Option<&mut Cache>,
        cx: &Context,
    ) -> candle_core::Result<Tensor>;

    /// The logits of the next token for hidden states at any positions.
    ///
    /// # Shapes
    /// - `hidden`: `(.., hidden)`, of rank 2 or more
    /// - output: `(.., vocab)`
    ///
    /// # Errors
    /// If the last dimension differs.
    fn head(&self, hidden: &Tensor, cx: &Context) -> candle_core::Result<Tensor>;

    /// The mean cross-entropy of `targets`, the next tokens of hidden states at any positions.
    ///
    /// # Shapes
    /// - `hidden`: `(n, hidden)`
    /// - `targets`: `(n)` of i64; [`ops::IGNORED_LABEL`] is left out
    /// - output: a scalar, of a base of half width in f32
    ///
    /// # Errors
    /// As [`Self::head`] and [`ops::cross_entropy`].
    fn token_loss(&self, hidden: &Tensor, targets: &Tensor, cx: &Context) -> candle_core::Result<Tensor> {
        ops::cross_entropy(&self.head(hidden, cx)?, targets, ops::IGNORED_LABEL, cx.path)
    }

    /// The logits at every position, `(b, t, vocab)`: [`Self::hidden`] and [`Self::head`].
    ///
    /// # Errors
    /// As those.
    fn logits(
        &self,
        input_ids: &Tensor,
        attention_mask: &Tensor,
        cx: &Context,
    ) -> candle_core::Result<Tensor> {
        self.head(&self.hidden(input_ids, attention_mask, None, cx)?, cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fork_does_not_see_what_the_other_goes_on_with() -> candle_core::Result<()> {
        let tokens = |value: f64, n: usize| -> candle_core::Result<Tensor> {
            Tensor::ones((1, n, 2), candle_core::DType::F32, &Device::Cpu)? * value
        };
        let mut cache = Cache::new(1, 8);
        let add = |cache: &mut Cache, value, n| -> candle_core::Result<Vec<f32>> {
            let layer = cache.layer(0).expect("a layer");
            let (k, v) = layer.append(&tokens(value, n)?, &tokens(-value, n)?)?;
            assert_eq!((k.neg()? - v)?.abs()?.max_all()?.to_scalar::<f32>()?, 0.0);
            k.mean(2)?.flatten_all()?.to_vec1()
        };
        add(&mut cache, 1.0, 3)?;
        let mut fork = cache.fork()?;
        assert_eq!((fork.length(), fork.room()), (3, 8));
        assert_eq!(add(&mut fork, 2.0, 1)?, [1.0, 1.0, 1.0, 2.0]);
        assert_eq!(add(&mut cache, 3.0, 2)?, [1.0, 1.0, 1.0, 3.0, 3.0]);
        assert_eq!(add(&mut fork, 4.0, 1)?, [1.0, 1.0, 1.0, 2.0, 4.0]);
        assert!(Cache::new(2, 4).fork()?.length() == 0);
        Ok(())
    }
}
