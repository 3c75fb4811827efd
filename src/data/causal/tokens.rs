//! Token ids with a loss mask, and the splitting and packing of rows.

/// The token ids of a text, with their loss mask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokens {
    /// The token ids, including the first, which is never predicted; not empty.
    pub ids: Vec<u32>,
    /// The loss mask: whether the prediction of each id counts; as long as `ids`.
    pub learnt: Vec<bool>,
    /// The index of the row, from 0; for packed rows, of the first.
    pub row: usize,
}

impl Tokens {
    /// The number of ids that count in the loss. The first never does, because nothing precedes it.
    pub fn targets(&self) -> usize {
        self.learnt.iter().skip(1).filter(|learnt| **learnt).count()
    }

    /// The content of the row as numbers, for a checksum of the data.
    pub fn numbers(&self) -> impl Iterator<Item = u32> + '_ {
        let learnt = self.learnt.iter().map(|learnt| u32::from(*learnt));
        self.ids.iter().copied().chain(learnt).chain([u32::MAX])
    }
}

/// Splits a text into windows of at most `max_length` tokens that overlap by one; drops windows without
/// targets.
pub(super) fn windows(text: Tokens, max_length: usize) -> impl Iterator<Item = Tokens> {
    let starts = (0..text.ids.len().saturating_sub(1)).step_by(max_length - 1);
    starts
        .map(move |start| {
            let piece = start..(start + max_length).min(text.ids.len());
            Tokens {
                ids: text.ids[piece.clone()].to_vec(),
                learnt: text.learnt[piece].to_vec(),
                row: text.row,
            }
        })
        .filter(|tokens| tokens.targets() > 0)
}

/// Packs rows, in order, into sequences of at most `max_length` tokens, to save padding.
///
/// A row is never split. It attends to the rows before it in its sequence, its positions continue theirs, and
/// its first token is not a target.
pub fn pack(rows: &[Tokens], max_length: usize) -> Vec<Tokens> {
    let mut packed: Vec<Tokens> = Vec::new();
    for row in rows {
        match packed.last_mut() {
            Some(last) if last.ids.len() + row.ids.len() <= max_length => {
                last.ids.extend(&row.ids);
                last.learnt.push(false);
                last.learnt.extend(row.learnt.iter().skip(1));
            }
            _ => packed.push(row.clone()),
        }
    }
    packed
}
