//! Shared by both directions: the types of tokens, and the merges behind SentencePiece's scores.

use std::collections::HashMap;

/// GGUF's numbers of token types.
pub(super) const NORMAL: i32 = 1;
pub(super) const UNKNOWN: i32 = 2;
pub(super) const CONTROL: i32 = 3;
pub(super) const USER_DEFINED: i32 = 4;
pub(super) const UNUSED: i32 = 5;
pub(super) const BYTE: i32 = 6;

/// The character that stands for a space in SentencePiece's tokens.
pub(super) const SPACE: &str = "\u{2581}";

/// Derives the merges of byte-pair encoding from SentencePiece's scores, best first.
///
/// SentencePiece joins the two neighbours whose concatenation has the highest score, so every split of a
/// token into two others is a merge with that token's score. Ties are ordered as in transformers' converter.
pub(super) fn merges(pieces: &[String], kinds: &[i32], scores: &[f32]) -> Vec<[String; 2]> {
    let normal = |id: &usize| kinds.get(*id).is_none_or(|kind| *kind == NORMAL);
    let ids: HashMap<&str, usize> =
        (0..pieces.len()).filter(normal).map(|id| (pieces[id].as_str(), id)).collect();
    let mut merges = Vec::new();
    for (id, piece) in pieces.iter().enumerate().filter(|(id, _)| normal(id)) {
        let score = scores.get(id).copied().unwrap_or(0.0);
        let cuts = piece.char_indices().skip(1).filter_map(|(at, _)| {
            let (left, right) = piece.split_at(at);
            Some((*ids.get(left)?, *ids.get(right)?))
        });
        let mut cuts: Vec<(usize, usize)> = cuts.collect();
        cuts.sort_unstable();
        merges.extend(cuts.into_iter().map(|(left, right)| (score, left, right)));
    }
    let length = |id: usize| pieces[id].chars().count();
    let key = |merge: &(f32, usize, usize)| (length(merge.1), length(merge.2));
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| key(b).cmp(&key(a))));
    merges.into_iter().map(|(_, left, right)| [pieces[left].clone(), pieces[right].clone()]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merges_follow_the_scores() {
        let pieces = ["<unk>", "a", "b", "ab", "aba", "ba", "[X]"].map(String::from);
        let kinds = [UNKNOWN, NORMAL, NORMAL, NORMAL, NORMAL, NORMAL, UNUSED];
        let merges = merges(&pieces, &kinds, &[0.0, -9.0, -9.0, -2.0, -3.0, -1.0, 5.0]);
        let merges: Vec<String> = merges.iter().map(|pair| pair.join(" ")).collect();
        assert_eq!(merges, ["b a", "a b", "ab a", "a ba"]);
    }
}
