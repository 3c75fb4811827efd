//! The loss mask of a text of which only parts are learnt.

use std::ops::Range;

/// Marks the tokens of a text that overlap one of `parts`, which are bytes of the text, in order and apart.
/// Tokens are given by their bytes, `offsets`, and whether they are special.
///
/// Blanks after the last special token of a part are not marked: a template writes them between two turns,
/// but a model that has said the end of its turn is stopped and never says them. The second result are the
/// tokens, by their place, with which parts end in this way.
pub(super) fn mark(
    text: &str,
    parts: &[Range<usize>],
    offsets: &[(usize, usize)],
    is_special: impl Fn(usize) -> bool,
) -> (Vec<bool>, Vec<usize>) {
    let (mut learnt, mut ends) = (vec![false; offsets.len()], Vec::new());
    let is_blank = |token: usize| {
        let (start, end) = offsets[token];
        // Some tokenizers leave blanks out of a token's bytes, all of them of a token that is blank.
        text.get(start..end).is_some_and(|text| text.trim().is_empty())
    };
    for part in parts {
        let overlaps = |token: &usize| offsets[*token].0 < part.end && offsets[*token].1 > part.start;
        let mut tokens: Vec<usize> = (0..offsets.len()).filter(overlaps).collect();
        let last = tokens.iter().rposition(|token| is_special(*token) || !is_blank(*token));
        if let Some(last) = last.filter(|last| is_special(tokens[*last])) {
            tokens.truncate(last + 1);
            ends.push(tokens[last]);
        }
        tokens.into_iter().for_each(|token| learnt[token] = true);
    }
    (learnt, ends)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_learnt_if_it_overlaps_a_part_but_not_the_blanks_behind_its_end() {
        // Tokens of one letter, `;` is special.
        let marked = |text: &str, parts: &[Range<usize>]| {
            let offsets: Vec<_> = (0..text.len()).map(|i| (i, i + 1)).collect();
            let (learnt, ends) = mark(text, parts, &offsets, |token| &text[token..=token] == ";");
            (learnt.iter().map(|learnt| if *learnt { 'x' } else { '.' }).collect::<String>(), ends)
        };
        assert_eq!(marked("ab;\ncd;\n", &[1..4, 5..8]), (".xx..xx.".to_string(), vec![2, 6]));
        // Without an end, blanks are what ends a turn.
        let one = |text: &str, part: Range<usize>| marked(text, std::slice::from_ref(&part));
        assert_eq!(one("ab\n\nc", 1..4), (".xxx.".to_string(), vec![]));
        assert_eq!(one("a;b \n", 0..5), ("xxxxx".to_string(), vec![]));
        // A token over a border belongs to the part.
        let (learnt, _) = mark("abcd", std::slice::from_ref(&(1..3)), &[(0, 2), (2, 2), (2, 4)], |_| false);
        assert_eq!(learnt, [true, true, true]);
    }
}
