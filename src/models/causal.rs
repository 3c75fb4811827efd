//! The interface of next-token models to training, evaluation and generation.

use candle_core::{Device, Tensor};
use candle_nn::kv_cache::KvCache;

use crate::adapter::{AdaptableModel, Context};
use crate::ops;

/// The KV cache of one batch: the keys and values of every layer for the tokens seen so far.
///
/// It does not implement `Clone`, because a clone would share memory with the original. [`Self::fork`] copies
/// the memory as well.
#[derive(Debug)]
pub struct Cache {
    layers: Vec<KvCache>,
    room: usize,
}

impl Cache {
    /// Creates an empty cache for `layers` layers. It grows once a row has more than `capacity` tokens.
    pub fn new(layers: usize, capacity: usize) -> Self {
        Self { layers: (0..layers).map(|_| KvCache::new(1, capacity.max(1))).collect(), room: capacity }
    }

    /// Returns a copy with its own memory, to continue one prompt in several ways.
    ///
    /// # Errors
    /// If candle fails.
    pub fn fork(&self) -> candle_core::Result<Self> {
        self.copied(|all| all.contiguous())
    }

    /// Returns a cache whose row `i` is a copy of row `rows[i]` of this one, to continue prompts in several ways
    /// together.
    ///
    /// # Errors
    /// If a row is not there, or candle fails.
    pub fn fork_rows(&self, rows: &[u32]) -> candle_core::Result<Self> {
        self.copied(|all| all.contiguous()?.index_select(&Tensor::new(rows, all.device())?, 0))
    }

    fn copied(&self, copy: impl Fn(Tensor) -> candle_core::Result<Tensor>) -> candle_core::Result<Self> {
        let mut fork = Self::new(self.layers.len(), self.room.max(self.length()));
        for (own, layer) in fork.layers.iter_mut().zip(&self.layers) {
            if let (Some(k), Some(v)) = (layer.k()?, layer.v()?) {
                own.append(&copy(k)?, &copy(v)?)?;
            }
        }
        Ok(Self { room: self.room, ..fork })
    }

    /// The capacity that the cache was created with, in tokens per row.
    pub fn room(&self) -> usize {
        self.room
    }

    /// The number of tokens per row in the cache, including padding and virtual tokens.
    pub fn length(&self) -> usize {
        self.layers.first().map_or(0, KvCache::current_seq_len)
    }

    /// The cache of one layer.
    pub(crate) fn layer(&mut self, index: usize) -> Option<&mut KvCache> {
        self.layers.get_mut(index)
    }
}

/// Pads prompts on the left with token 0 to the longest of them, as a cache needs them to go on together, and
/// returns them with their mask: 1 on real tokens.
pub(crate) fn padded_left(prompts: &[&[u32]]) -> (Vec<Vec<u32>>, Vec<Vec<u8>>) {
    let longest = prompts.iter().map(|prompt| prompt.len()).max().unwrap_or(0);
    let padded = |prompt: &&[u32]| {
        let padding = longest - prompt.len();
        ([&vec![0; padding], *prompt].concat(), [vec![0; padding], vec![1; prompt.len()]].concat())
    };
    prompts.iter().map(padded).unzip()
}

/// A decoder with a language-model head. It can be shared between threads, each with its own cache.
pub trait CausalLm: AdaptableModel + Send + Sync {
    /// The device that the model expects its input on.
    fn device(&self) -> &Device;

    /// Sets whether training keeps only each layer's input and recomputes the layer in the backward pass
    /// ([`crate::ops::checkpoint`]). This saves memory and costs one more forward pass.
    fn set_checkpoint_layers(&mut self, on: bool);

    /// The longest sequence in tokens, prompt and answer together, not counting virtual tokens.
    fn max_length(&self) -> usize;

    /// Creates an empty cache for this model, with room for `capacity` tokens per row.
    fn cache(&self, capacity: usize) -> Cache;

    /// Computes the last hidden states. With a cache, `input_ids` continue the cached tokens, and their keys
    /// and values are appended to the cache. No gradient flows through cached keys and values.
    ///
    /// Rows may be padded on either side. Positions are column indices: left padding shifts them, which
    /// changes nothing else, since rotary embeddings are relative. The virtual tokens of prompt tuning are
    /// placed directly before a row's first real token, after any left padding.
    ///
    /// # Shapes
    /// - `input_ids`: `(b, t)` of u32
    /// - `attention_mask`: `(b, cached + t)` of u8, 1 on real tokens, on any device; it has no columns for virtual tokens
    /// - output: `(b, t, hidden)`
    ///
    /// # Errors
    /// If shapes differ, the sequence is longer than [`Self::max_length`], virtual tokens would be cached for
    /// a row that so far contains only padding, or a cache grows beyond its capacity to a length at which the
    /// model uses other rotary positions (LongRoPE).
    fn hidden(
        &self,
        input_ids: &Tensor,
        attention_mask: &Tensor,
        cache: Option<&mut Cache>,
        cx: &Context,
    ) -> candle_core::Result<Tensor>;

    /// Computes the next-token logits from hidden states at any positions.
    ///
    /// # Shapes
    /// - `hidden`: `(.., hidden)`, of rank 2 or more
    /// - output: `(.., vocab)`
    ///
    /// # Errors
    /// If the last dimension differs.
    fn head(&self, hidden: &Tensor, cx: &Context) -> candle_core::Result<Tensor>;

    /// The mean cross-entropy of the next tokens `targets`, given hidden states at any positions.
    ///
    /// # Shapes
    /// - `hidden`: `(n, hidden)`
    /// - `targets`: `(n)` of i64; entries of [`ops::IGNORED_LABEL`] are ignored
    /// - output: a scalar; in f32 for a base in half precision
    ///
    /// # Errors
    /// As [`Self::head`] and [`ops::cross_entropy`].
    fn token_loss(&self, hidden: &Tensor, targets: &Tensor, cx: &Context) -> candle_core::Result<Tensor> {
        ops::cross_entropy(&self.head(hidden, cx)?, targets, ops::IGNORED_LABEL, cx.path)
    }

    /// The logits at every position, `(b, t, vocab)`: [`Self::hidden`] and [`Self::head`].
    ///
    /// # Errors
    /// As [`Self::hidden`] and [`Self::head`].
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

    #[test]
    fn forked_rows_are_copies_of_the_rows_named() -> candle_core::Result<()> {
        let mut cache = Cache::new(1, 4);
        let keys = Tensor::new(&[[[1f32], [2.0]], [[3.0], [4.0]]], &Device::Cpu)?; // (2, 2, 1)
        cache.layer(0).expect("a layer").append(&keys, &keys.neg()?)?;
        let mut fork = cache.fork_rows(&[1, 0, 1])?;
        let more = Tensor::new(&[[[5f32]], [[6.0]], [[7.0]]], &Device::Cpu)?;
        let (k, v) = fork.layer(0).expect("a layer").append(&more, &more.neg()?)?;
        assert_eq!(k.squeeze(2)?.to_vec2::<f32>()?, [[3.0, 4.0, 5.0], [1.0, 2.0, 6.0], [3.0, 4.0, 7.0]]);
        assert_eq!((k + v)?.abs()?.max_all()?.to_scalar::<f32>()?, 0.0);
        assert_eq!((fork.length(), fork.room(), cache.length()), (3, 4, 2));
        assert!(cache.fork_rows(&[2]).is_err());
        Ok(())
    }
}
