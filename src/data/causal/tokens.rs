//! A text as token ids: in pieces, or several in one sequence.

/// A text as token ids, and which of them count in the loss.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokens {
    /// The ids, the first of a text included; never empty.
    pub ids: Vec<u32>,
    /// Whether the loss counts the prediction of each id from those before it; as long as `ids`.
    pub learnt: Vec<bool>,
    /// Which row this is, counted from 0; of packed rows the first.
    pub row: usize,
}

impl Tokens {
    /// The number of ids that are predicted: the first has nothing before it.
    pub fn targets(&self) -> usize {
        self.learnt.iter().skip(1).filter(|learnt| **learnt).count()
    }

    /// All that the row says, as numbers: for a checksum of the data.
    pub fn numbers(&self) -> impl Iterator<Item = u32> + '_ {
        let learnt = self.learnt.iter().map(|learnt| u32::from(*learnt));
        self.ids.iter().copied().chain(learnt).chain([u32::MAX])
    }
}

/// A text in pieces of at most `max_length` tokens that overlap by one; those with nothing to learn
/// are left out.
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

/// Puts rows one after the other into sequences of at most `max_length` tokens, in their order: less
/// padding. A row is never split, but it does see those before it in its sequence, and its
/// positions go on from theirs; its first token is given, not learnt.
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
