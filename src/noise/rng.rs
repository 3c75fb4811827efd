//! A draw of a stream as a generator of the crate `rand`.

use rand::RngCore;

use super::stream::Stream;

/// A [`rand::RngCore`] over the words of one draw of a [`Stream`], so that any distribution of `rand_distr`
/// can be sampled by address. Equal addresses give equal numbers; different draws or streams share none.
///
/// It reads the same words as the stream's own methods ([`Stream::fill_normal`] ...): use a draw number that
/// nothing else uses.
///
/// # Example
/// ```
/// use monteclora::noise::{Noise, Purpose};
/// use rand_distr::{Distribution, Gamma};
///
/// let stream = Noise::new(42).stream("roberta.encoder.layer.0", Purpose::Predict);
/// let gamma = Gamma::new(2.5, 1.0)?;
/// let first = gamma.sample(&mut stream.rng(7));
/// assert_eq!(first, gamma.sample(&mut stream.rng(7)));
/// assert_ne!(first, gamma.sample(&mut stream.rng(8)));
/// # Ok::<(), rand_distr::GammaError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DrawRng {
    stream: Stream,
    draw: u64,
    block: u64,
    words: [u32; 4],
    read: usize,
}

impl Stream {
    /// A generator over draw number `draw`, starting at its first word.
    pub fn rng(&self, draw: u64) -> DrawRng {
        DrawRng { stream: *self, draw, block: 0, words: [0; 4], read: 4 }
    }
}

impl RngCore for DrawRng {
    fn next_u32(&mut self) -> u32 {
        if self.read == self.words.len() {
            self.words = self.stream.words(self.draw, self.block);
            (self.block, self.read) = (self.block.wrapping_add(1), 0);
        }
        self.read += 1;
        self.words[self.read - 1]
    }

    /// Returns two words, the first in the low bits.
    fn next_u64(&mut self) -> u64 {
        u64::from(self.next_u32()) | u64::from(self.next_u32()) << 32
    }

    /// Fills in whole words in little-endian order; the last word may be truncated.
    fn fill_bytes(&mut self, bytes: &mut [u8]) {
        for piece in bytes.chunks_mut(4) {
            let word = self.next_u32().to_le_bytes();
            piece.copy_from_slice(&word[..piece.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::{Noise, Purpose};

    #[test]
    fn the_generator_reads_the_draw_s_words_in_their_order() {
        let stream = Noise::new(42).stream("roberta.encoder.layer.0", Purpose::Gaussian);
        let words: Vec<u32> = (0..3).flat_map(|block| stream.words(7, block)).collect();
        let mut rng = stream.rng(7);
        assert_eq!(words, (0..12).map(|_| rng.next_u32()).collect::<Vec<_>>());

        let pairs = words.chunks(2).map(|pair| u64::from(pair[1]) << 32 | u64::from(pair[0]));
        let mut rng = stream.rng(7);
        assert_eq!(pairs.collect::<Vec<_>>(), (0..6).map(|_| rng.next_u64()).collect::<Vec<_>>());

        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        for len in [0, 1, 4, 5, 16, 45, 48] {
            let mut got = vec![0; len];
            let mut rng = stream.rng(7);
            rng.fill_bytes(&mut got);
            assert_eq!(got, bytes[..len]);
            // The rest of a truncated word is not read again.
            if len < 45 {
                assert_eq!(rng.next_u32(), words[len.div_ceil(4)]);
            }
        }

        let mut mixed = stream.rng(7);
        let (odd, across) = ([0, 1, 2].map(|_| mixed.next_u32()), mixed.next_u64());
        assert_eq!(odd, words[..3]);
        assert_eq!(across, u64::from(words[4]) << 32 | u64::from(words[3]));
    }

    #[test]
    fn the_numbers_of_an_address_never_change() {
        let stream = Noise::new(42).stream("roberta.encoder.layer.0", Purpose::Gaussian);
        let mut rng = stream.rng(3);
        assert_eq!([0, 1, 2, 3, 4].map(|_| rng.next_u32()), VALUE_STABILITY);
    }

    const VALUE_STABILITY: [u32; 5] =
        [1_553_615_539, 2_419_268_906, 1_025_057_535, 2_965_003_072, 156_332_820];
}
