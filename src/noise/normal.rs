//! Standard normals from random words by the Box-Muller transform, one word per number.
//!
//! Training draws single-precision numbers by the million, so they use polynomials that the compiler
//! vectorises: ten times as fast as the library's functions, and with the same bits on every machine (the
//! library's differ between systems). They agree with the double-precision numbers, which serve the tests of
//! distributions, to a few units in the last place of the radius.

use super::philox::{Words, LANES};

/// Normals in the order of their computation: cosine and sine of words 0 and 1, then of words 2 and 3.
#[inline(always)]
pub(super) fn single(words: &Words) -> [[f32; LANES]; 4] {
    let mut z = [[0f32; LANES]; 4];
    for half in [0, 2] {
        for lane in 0..LANES {
            let radius = (-2.0 * ln_unit(words[half][lane])).sqrt();
            let (sin, cos) = sin_cos_turn(words[half + 1][lane]);
            z[half][lane] = radius * cos;
            z[half + 1][lane] = radius * sin;
        }
    }
    z
}

/// [`single`] in double precision.
pub(super) fn double(words: &Words) -> [[f64; LANES]; 4] {
    let unit = |word: u32| (f64::from(word) + 0.5) * 2f64.powi(-32);
    let mut z = [[0f64; LANES]; 4];
    for half in [0, 2] {
        for lane in 0..LANES {
            let radius = (-2.0 * unit(words[half][lane]).ln()).sqrt();
            let (sin, cos) = (std::f64::consts::TAU * unit(words[half + 1][lane])).sin_cos();
            z[half][lane] = radius * cos;
            z[half + 1][lane] = radius * sin;
        }
    }
    z
}

/// `2^-32`.
const UNIT: f32 = 1.0 / 4_294_967_296.0;

/// `ln((word + 1/2) / 2^32)`, by the polynomial of Cephes' `logf` around one.
#[inline(always)]
fn ln_unit(word: u32) -> f32 {
    const ROOT_HALF: u32 = 3_037_000_500; // 2^32 / sqrt 2
    let bits = (word as f32 + 0.5).to_bits();
    // m in [sqrt 1/2, sqrt 2), with word + 1/2 = m 2^e
    let shifted = bits.wrapping_sub(0x3f35_04f3);
    let e = (shifted as i32) >> 23;
    let m = f32::from_bits((shifted & 0x007f_ffff).wrapping_add(0x3f35_04f3));
    // Near one, compute the distance from one directly: it has the significant digits.
    let near = word > ROOT_HALF;
    let f = if near { -((!word) as f32 + 0.5) * UNIT } else { m - 1.0 };
    let e = if near { 0.0 } else { (e - 32) as f32 };
    let p = 7.037_683_6e-2 * f - 1.151_461e-1;
    let p = p * f + 1.167_699_9e-1;
    let p = p * f - 1.242_014_1e-1;
    let p = p * f + 1.424_932_3e-1;
    let p = p * f - 1.666_805_8e-1;
    let p = p * f + 2.000_071_5e-1;
    let p = p * f - 2.499_999_4e-1;
    let p = p * f + 3.333_333e-1;
    let square = f * f;
    let tail = p * f * square - 2.121_944_4e-4 * e - 0.5 * square;
    (f + tail) + 0.693_359_4 * e
}

/// Sine and cosine of `2 pi (word + 1/2) / 2^32`, by Cephes' polynomials for an eighth of a turn.
#[inline(always)]
fn sin_cos_turn(word: u32) -> (f32, f32) {
    let quarter = word.wrapping_add(1 << 29) >> 30;
    let rest = word.wrapping_sub(quarter << 30) as i32;
    let x = (rest as f32 + 0.5) * (std::f32::consts::TAU * UNIT);
    let x2 = x * x;
    let sin = x + x * x2 * ((-1.951_529_6e-4 * x2 + 8.332_161e-3) * x2 - 1.666_665_5e-1);
    let cos = 1.0 - 0.5 * x2 + x2 * x2 * ((2.443_315_7e-5 * x2 - 1.388_731_6e-3) * x2 + 4.166_664_6e-2);
    let (s, c) = if quarter & 1 == 0 { (sin, cos) } else { (cos, sin) };
    let sign = |negative: u32, x: f32| f32::from_bits(x.to_bits() ^ (negative & 2) << 30);
    (sign(quarter, s), sign(quarter.wrapping_add(1), c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn single_precision_is_the_double_transform_to_its_last_digits() {
        let edges =
            [0, 1, 2, 3, 1 << 29, (1 << 29) - 1, 3_037_000_500, 3_037_000_501, u32::MAX - 1, u32::MAX];
        let many = (0..200_000u32).map(|i| i.wrapping_mul(2_654_435_761) ^ (i >> 7));
        for word in edges.into_iter().chain(many) {
            let unit = (f64::from(word) + 0.5) / 4_294_967_296.0;
            let (got, want) = (f64::from(ln_unit(word)), unit.ln());
            assert!((got / want - 1.0).abs() < 3e-7, "ln at {word}: {got} {want}");
            let (sin, cos) = sin_cos_turn(word);
            let (s, c) = (std::f64::consts::TAU * unit).sin_cos();
            let error = (f64::from(sin) - s).abs().max((f64::from(cos) - c).abs());
            assert!(error < 1.5e-7, "sine and cosine at {word}: {error}");
        }
    }

    #[test]
    fn the_least_word_gives_the_largest_radius_and_every_radius_is_finite() {
        let z = |word| single(&[[word; LANES], [0; LANES], [word; LANES], [1 << 30; LANES]]);
        assert!((z(0)[0][0] - 6.7637).abs() < 1e-3, "{}", z(0)[0][0]);
        assert!(z(u32::MAX)[0][0] > 0.0 && z(u32::MAX)[0][0] < 2e-5);
    }
}
