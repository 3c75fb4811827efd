//! The row order of q and k.
//!
//! Hugging Face rotates element `j` of a head with element `j + d / 2`, llama.cpp's `llama` element `2 j`
//! with `2 j + 1`. Its converter permutes the rows accordingly, including the rows of B in an adapter.

/// Returns, for each row of a GGUF tensor with `heads` heads, the index of that row in Hugging Face's tensor.
pub(super) fn interleaved(rows: usize, heads: usize) -> Vec<u32> {
    let width = rows / heads.max(1);
    let half = width / 2;
    let of_head = |head: usize| (0..half).flat_map(move |j| [head * width + j, head * width + half + j]);
    (0..heads).flat_map(of_head).map(|row| row as u32).collect()
}

/// Reorders the rows of a GGUF tensor, as raw bytes, to Hugging Face's order.
pub(super) fn restored(bytes: &[u8], rows: usize, heads: usize) -> Vec<u8> {
    let width = bytes.len() / rows.max(1);
    let mut restored = vec![0; bytes.len()];
    for (here, there) in interleaved(rows, heads).into_iter().enumerate() {
        let there = there as usize * width;
        restored[there..there + width].copy_from_slice(&bytes[here * width..(here + 1) * width]);
    }
    restored
}

/// Whether `rows` rows split into `heads` heads of even width.
pub(super) fn fits(rows: usize, heads: usize) -> bool {
    heads > 0 && rows.is_multiple_of(2 * heads)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_those_of_the_converter() {
        // weights.reshape(2, 2, 2, -1).swapaxes(1, 2).reshape(8, -1) on rows 0 to 7.
        assert_eq!(interleaved(8, 2), [0, 2, 1, 3, 4, 6, 5, 7]);
        let bytes: Vec<u8> =
            interleaved(12, 2).into_iter().flat_map(|row| [row as u8, 100 + row as u8]).collect();
        let restored = restored(&bytes, 12, 2);
        assert_eq!(restored, (0..12).flat_map(|row| [row, 100 + row]).collect::<Vec<u8>>());
        assert!(fits(12, 2) && !fits(12, 4) && !fits(12, 0));
    }
}
