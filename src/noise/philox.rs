//! Philox4x32 with ten rounds (Salmon et al. 2011): maps a 128-bit counter and a 64-bit key to four random
//! words.

/// The number of blocks computed together, so that the compiler vectorises the loops over them.
pub(crate) const LANES: usize = 16;

/// The four words of [`LANES`] blocks, word by word.
pub(crate) type Words = [[u32; LANES]; 4];

const ROUNDS: usize = 10;

/// The four words of block number `block` of a draw.
pub(super) fn block(key: [u32; 2], draw: u64, block: u64) -> [u32; 4] {
    permuted(counter(draw, block), key)
}

/// The words of [`LANES`] blocks from number `LANES * group` on.
#[inline(always)]
pub(super) fn group(mut key: [u32; 2], draw: u64, group: u64) -> Words {
    let (mut c0, mut c1) = ([0u32; LANES], [0u32; LANES]);
    let [_, _, draw_low, draw_high] = counter(draw, 0);
    let (mut c2, mut c3) = ([draw_low; LANES], [draw_high; LANES]);
    for lane in 0..LANES {
        [c0[lane], c1[lane], ..] = counter(draw, group * LANES as u64 + lane as u64);
    }
    for _ in 0..ROUNDS {
        for lane in 0..LANES {
            let next = round([c0[lane], c1[lane], c2[lane], c3[lane]], key);
            [c0[lane], c1[lane], c2[lane], c3[lane]] = next;
        }
        key = next_key(key);
    }
    [c0, c1, c2, c3]
}

/// Philox's counter: the block number in the low 64 bits, the draw number in the high 64 bits.
#[inline(always)]
fn counter(draw: u64, block: u64) -> [u32; 4] {
    [block as u32, (block >> 32) as u32, draw as u32, (draw >> 32) as u32]
}

fn permuted(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        counter = round(counter, key);
        key = next_key(key);
    }
    counter
}

#[inline(always)]
fn round(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let p0 = u64::from(counter[0]) * 0xd251_1f53;
    let p1 = u64::from(counter[2]) * 0xcd9e_8d57;
    [(p1 >> 32) as u32 ^ counter[1] ^ key[0], p1 as u32, (p0 >> 32) as u32 ^ counter[3] ^ key[1], p0 as u32]
}

#[inline(always)]
fn next_key(key: [u32; 2]) -> [u32; 2] {
    [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_matches_the_known_answers_of_random123() {
        // kat_vectors of the Random123 distribution, philox4x32 with 10 rounds.
        assert_eq!(permuted([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            permuted([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            permuted([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn a_group_holds_the_words_of_its_blocks() {
        let (key, draw) = ([7, 9], 5 << 40 | 3);
        for number in [0, 1, 1 << 30] {
            let words = group(key, draw, number);
            let blocks: Vec<[u32; 4]> =
                (0..LANES).map(|lane| block(key, draw, number * LANES as u64 + lane as u64)).collect();
            for (word, lanes) in words.iter().enumerate() {
                assert!(lanes.iter().zip(&blocks).all(|(lane, block)| *lane == block[word]));
            }
        }
    }
}
