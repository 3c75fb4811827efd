//! Streams of noise by their address: seed, path and purpose.

use super::normal;
use super::philox::{self, Words, LANES};
use crate::util::simd::vectorized;

/// What a stream of noise is for. Streams of different purposes are independent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Purpose {
    /// Initial values of parameters.
    Init,
    /// Dropout masks.
    Dropout,
    /// The Bartlett factor of the Wishart draw.
    Wishart,
    /// Mixture weights.
    Dirichlet,
    /// The standard normal matrices of the perturbation.
    Gaussian,
    /// The order of the training rows.
    Shuffle,
    /// The tokens that masked language modelling hides.
    Mask,
    /// Sampling of outputs.
    Predict,
    /// Resampling, as in a bootstrap.
    Resample,
}

impl Purpose {
    /// A stable number: never reorder, only append.
    const fn tag(self) -> u64 {
        match self {
            Self::Init => 1,
            Self::Dropout => 2,
            Self::Wishart => 3,
            Self::Dirichlet => 4,
            Self::Gaussian => 5,
            Self::Shuffle => 6,
            Self::Mask => 7,
            Self::Predict => 8,
            Self::Resample => 9,
        }
    }
}

/// The root of all noise: a seed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Noise {
    seed: u64,
}

impl Noise {
    /// Noise of this seed.
    pub const fn new(seed: u64) -> Self {
        Self { seed }
    }

    /// The seed.
    pub const fn seed(&self) -> u64 {
        self.seed
    }

    /// The stream of the layer or module at `path`, for one purpose.
    pub fn stream(&self, path: &str, purpose: Purpose) -> Stream {
        // FNV-1a over the path, then two rounds of mixing: similar paths get unrelated keys.
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        for byte in path.bytes() {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        let key = mix(mix(hash ^ purpose.tag().wrapping_mul(0x9e37_79b9_7f4a_7c15)) ^ mix(self.seed));
        Stream { key: [key as u32, (key >> 32) as u32] }
    }
}

/// The finaliser of SplitMix64: a bijection of 64-bit words in which every bit moves every other.
const fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// One stream of noise: an unlimited number of draws, each an unlimited sequence of words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream {
    key: [u32; 2],
}

impl Stream {
    /// The key for device kernels: two words, the first in the low bits.
    #[cfg(any(test, feature = "cuda"))]
    pub(crate) fn key(&self) -> u64 {
        u64::from(self.key[0]) | u64::from(self.key[1]) << 32
    }

    /// Words `4 * block .. 4 * block + 4` of draw number `draw`.
    pub fn words(&self, draw: u64, block: u64) -> [u32; 4] {
        philox::block(self.key, draw, block)
    }

    /// Fills in uniform numbers in the open interval (0, 1): the midpoints of 2^52 equal parts; two words
    /// each.
    pub fn fill_uniform(&self, draw: u64, out: &mut [f64]) {
        for (block, pair) in out.chunks_mut(2).enumerate() {
            let w = self.words(draw, block as u64);
            for (slot, u) in pair.iter_mut().zip([open_unit(w[0], w[1]), open_unit(w[2], w[3])]) {
                *slot = u;
            }
        }
    }

    /// Fills in standard normal numbers by the Box-Muller transform; one word each.
    pub fn fill_normal(&self, draw: u64, out: &mut [f64]) {
        for (group, out) in out.chunks_mut(4 * LANES).enumerate() {
            let z = normal::double(&self.word_group(draw, group as u64));
            out.copy_from_slice(&z.as_flattened()[..out.len()]);
        }
    }

    /// Fills in the numbers of [`Self::fill_normal`] in single precision. The transform itself runs in single
    /// precision, with an error of a few units in the last place.
    pub fn fill_normal_f32(&self, draw: u64, out: &mut [f32]) {
        vectorized!({
            for (group, out) in out.chunks_mut(4 * LANES).enumerate() {
                let z = normal::single(&self.word_group(draw, group as u64));
                out.copy_from_slice(&z.as_flattened()[..out.len()]);
            }
        });
    }

    /// The words of `LANES` blocks from number `LANES * group` on.
    #[inline(always)]
    pub(crate) fn word_group(&self, draw: u64, group: u64) -> Words {
        philox::group(self.key, draw, group)
    }

    /// A uniformly random permutation of `0..len` (Fisher and Yates).
    pub fn permutation(&self, draw: u64, len: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..len).collect();
        for i in (1..len).rev() {
            let w = self.words(draw, i as u64);
            // Widening multiplication: the bias is below len / 2^64.
            let word = (u64::from(w[1]) << 32) | u64::from(w[0]);
            let j = ((u128::from(word) * (i as u128 + 1)) >> 64) as usize;
            order.swap(i, j);
        }
        order
    }
}

/// A number in (0, 1) from 52 of the 64 bits, never 0 nor 1: with 53, the last midpoint would round
/// to 1.
fn open_unit(low: u32, high: u32) -> f64 {
    let bits = ((u64::from(high) << 32) | u64::from(low)) >> 12;
    (bits as f64 + 0.5) * (1.0 / (1u64 << 52) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_differ_by_seed_path_purpose_and_draw_alone() {
        let word = |seed, path, purpose, draw| Noise::new(seed).stream(path, purpose).words(draw, 0);
        let base = word(1, "a.b", Purpose::Init, 0);
        assert_eq!(base, word(1, "a.b", Purpose::Init, 0));
        assert_ne!(base, word(2, "a.b", Purpose::Init, 0));
        assert_ne!(base, word(1, "a.c", Purpose::Init, 0));
        assert_ne!(base, word(1, "a.b", Purpose::Dropout, 0));
        assert_ne!(base, word(1, "a.b", Purpose::Init, 1));
    }

    #[test]
    fn the_words_of_a_seed_never_change() {
        // Value stability: a change here changes every result of every user, so it must be announced.
        let stream = Noise::new(42).stream("roberta.encoder.layer.0", Purpose::Gaussian);
        assert_eq!(stream.words(7, 3), VALUE_STABILITY);
    }

    const VALUE_STABILITY: [u32; 4] = [3_955_029_812, 1_370_148_387, 3_896_760_273, 4_187_264_119];

    #[test]
    fn normals_have_the_moments_of_a_normal() {
        let n = 400_000;
        let mut z = vec![0.0; n];
        Noise::new(3).stream("x", Purpose::Gaussian).fill_normal(0, &mut z);
        let moment = |p: i32| z.iter().map(|v| v.powi(p)).sum::<f64>() / n as f64;
        let root = (n as f64).sqrt();
        // Standard errors of the first four raw moments: 1, sqrt 2, sqrt 15, sqrt 96 over sqrt n.
        assert!(moment(1).abs() < 5.0 / root);
        assert!((moment(2) - 1.0).abs() < 5.0 * 2f64.sqrt() / root);
        assert!(moment(3).abs() < 5.0 * 15f64.sqrt() / root);
        assert!((moment(4) - 3.0).abs() < 5.0 * 96f64.sqrt() / root);
        let neighbours = z.windows(2).map(|w| w[0] * w[1]).sum::<f64>() / n as f64;
        assert!(neighbours.abs() < 5.0 / root);
    }

    #[test]
    fn normals_are_the_words_transformed_whatever_the_length_and_precision() {
        let stream = Noise::new(9).stream("x", Purpose::Init);
        let n = 5 * 4 * LANES;
        let (mut wide, mut narrow) = (vec![0.0; n], vec![0.0; n]);
        stream.fill_normal(1, &mut wide);
        stream.fill_normal_f32(1, &mut narrow);
        for (i, (w, z)) in wide.iter().zip(&narrow).enumerate() {
            assert!((w - f64::from(*z)).abs() < 1e-6, "number {i}: {w} {z}");
            let (group, word, lane) = (i / (4 * LANES), i / LANES % 4, i % LANES);
            let words = stream.words(1, (group * LANES + lane) as u64);
            let unit = |j: usize| (f64::from(words[j]) + 0.5) / 4_294_967_296.0;
            let radius = (-2.0 * unit(word & 2).ln()).sqrt();
            let (sin, cos) = (std::f64::consts::TAU * unit(word | 1)).sin_cos();
            assert!((w - radius * [cos, sin][word & 1]).abs() < 1e-14);
        }
        for len in [0, 1, 17, 63, 65] {
            let (mut a, mut b) = (vec![0.0; len], vec![0.0; len]);
            stream.fill_normal(1, &mut a);
            stream.fill_normal_f32(1, &mut b);
            assert_eq!((&a[..], &b[..]), (&wide[..len], &narrow[..len]));
        }
    }

    #[test]
    fn a_permutation_holds_every_index_once_and_moves_them() {
        let stream = Noise::new(5).stream("data", Purpose::Shuffle);
        let order = stream.permutation(0, 100);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..100).collect::<Vec<_>>());
        assert_ne!(order, sorted);
        assert_ne!(order, stream.permutation(1, 100));
        assert!(stream.permutation(0, 0).is_empty());
    }
}
