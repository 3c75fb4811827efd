//! The random numbers of one input, and random mutations of bytes.

use monteclora::noise::Stream;

/// The maximal length of an input in bytes.
const MOST: usize = 1 << 16;

/// The random numbers of one input.
pub struct Rng {
    stream: Stream,
    index: u64,
    block: u64,
    words: [u32; 4],
}

impl Rng {
    pub fn new(stream: Stream, index: u64) -> Self {
        Self { stream, index, block: 0, words: [0; 4] }
    }

    pub fn word(&mut self) -> u32 {
        let at = (self.block % 4) as usize;
        if at == 0 {
            self.words = self.stream.words(self.index, self.block / 4);
        }
        self.block += 1;
        self.words[at]
    }

    /// A number below `n`; 0 if `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        ((u64::from(self.word()) * n as u64) >> 32) as usize
    }

    /// True with a probability of 1 / `n`.
    pub fn once_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub fn pick<'a, T: ?Sized>(&mut self, of: &[&'a T]) -> &'a T {
        of[self.below(of.len())]
    }
}

/// A number at which readers of binary headers tend to fail; `len` is the input's length.
fn number(rng: &mut Rng, len: usize) -> u64 {
    let edges = [0, 1, 2, 7, 8, 127, 128, 255, 256, 65_535, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff];
    let wide = [1 << 32, 1 << 40, 1 << 53, 1 << 62, 1 << 63, u64::MAX, u64::MAX - 7];
    match rng.below(4) {
        0 => edges[rng.below(edges.len())],
        1 => wide[rng.below(wide.len())],
        2 => (len as u64).wrapping_add(rng.below(17) as u64).wrapping_sub(8),
        _ => u64::from(rng.word()),
    }
}

/// One of the seeds with one to six mutations; `tokens` are significant to the reader.
pub fn bytes(rng: &mut Rng, seeds: &[Vec<u8>], tokens: &[&str]) -> Vec<u8> {
    let mut bytes = seeds[rng.below(seeds.len())].clone();
    for _ in 0..=rng.below(6) {
        edit(rng, &mut bytes, seeds, tokens);
    }
    bytes.truncate(MOST);
    bytes
}

fn edit(rng: &mut Rng, bytes: &mut Vec<u8>, seeds: &[Vec<u8>], tokens: &[&str]) {
    let at = rng.below(bytes.len() + 1);
    let slice = |rng: &mut Rng, of: &[u8]| {
        let from = rng.below(of.len() + 1);
        let to = from + rng.below((of.len() - from).min(64) + 1);
        from..to
    };
    match rng.below(13) {
        0 => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << rng.below(8);
            }
        }
        1 => {
            let byte = rng.word() as u8;
            if let Some(slot) = bytes.get_mut(at) {
                *slot = byte;
            }
        }
        2 | 3 => insert(bytes, at, rng.pick(tokens).as_bytes()),
        4 => {
            let token = rng.pick(tokens).as_bytes();
            bytes.truncate(at);
            bytes.extend_from_slice(token);
        }
        5 if rng.once_in(3) => bytes.truncate(at),
        6 => {
            let random: Vec<u8> = (0..=rng.below(12)).map(|_| rng.word() as u8).collect();
            insert(bytes, at, &random);
        }
        7 => {
            let part = slice(rng, bytes);
            let part = bytes[part].to_vec();
            insert(bytes, at, &part);
        }
        8 => drop(bytes.drain(slice(rng, bytes))),
        9 => {
            let other = &seeds[rng.below(seeds.len())];
            let from = rng.below(other.len() + 1);
            bytes.truncate(at);
            bytes.extend_from_slice(&other[from..]);
        }
        10 => {
            let other = &seeds[rng.below(seeds.len())];
            insert(bytes, at, &other[slice(rng, other)]);
        }
        11 => {
            let value = number(rng, bytes.len()).to_le_bytes();
            let width = [1, 2, 4, 8][rng.below(4)];
            for (slot, byte) in bytes[at..].iter_mut().zip(&value[..width]) {
                *slot = *byte;
            }
        }
        12 if rng.once_in(64) => {
            // The same few bytes over and over, to find readers that take much memory for each of them.
            let part = slice(rng, bytes);
            let part =
                if rng.once_in(2) { rng.pick(tokens).as_bytes().to_vec() } else { bytes[part].to_vec() };
            let times = MOST.checked_div(part.len()).map_or(0, |most| rng.below(most));
            insert(bytes, at, &part.repeat(times));
        }
        _ => {}
    }
}

fn insert(bytes: &mut Vec<u8>, at: usize, part: &[u8]) {
    bytes.splice(at..at, part.iter().copied());
}
