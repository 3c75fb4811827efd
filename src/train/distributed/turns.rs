//! Divides work such as the batches of an evaluation among processes and collects all results on each.

use super::communicator::Communicator;
use crate::error::{Error, Result};

/// Returns the results of `compute` for the items `0..count`, in order, on all processes. Rank r of W
/// computes the items r, r + W, .. and sends their numbers to the others bit by bit; a single process
/// computes all.
///
/// # Errors
/// The error of the first process that has one, on all processes ([`Error::Distributed`] on the others), or
/// if the engine fails.
pub fn in_turns(
    communicator: &dyn Communicator,
    count: usize,
    compute: &mut dyn FnMut(usize) -> Result<Vec<f64>>,
) -> Result<Vec<Vec<f64>>> {
    let (rank, world) = (communicator.rank(), communicator.world());
    let own = (rank..count).step_by(world).map(compute).collect::<Result<Vec<_>>>();
    if world == 1 {
        return own;
    }
    let (told, own_error) = match own {
        Ok(items) => (encode(&items), None),
        Err(error) => ([&[FAILED], error.to_string().as_bytes()].concat(), Some(error)),
    };
    // Complete all broadcasts before returning an error, as the other processes wait in them.
    let said =
        (0..world).map(|root| communicator.broadcast(told.clone(), root)).collect::<Result<Vec<_>>>()?;
    let failed = said.iter().position(|bytes| bytes.first() == Some(&FAILED));
    match (own_error, failed) {
        (Some(error), Some(first)) if first == rank => return Err(error),
        (_, Some(rank)) => {
            let reason = String::from_utf8_lossy(&said[rank][1..]).into_owned();
            return Err(Error::Distributed { rank, reason });
        }
        _ => {}
    }
    let mut items: Vec<_> = said.iter().map(|bytes| decode(bytes)).collect();
    let next = |i: usize| {
        let reason = || Error::Distributed { rank: i % world, reason: format!("it sent no result {i}") };
        items[i % world].next().ok_or_else(reason)
    };
    (0..count).map(next).collect()
}

/// The first byte of an error message; results begin with 0.
const FAILED: u8 = 1;

fn encode(items: &[Vec<f64>]) -> Vec<u8> {
    let numbers = |item: &Vec<f64>| {
        let words = std::iter::once(item.len() as u64).chain(item.iter().map(|number| number.to_bits()));
        words.flat_map(u64::to_le_bytes).collect::<Vec<u8>>()
    };
    std::iter::once(0).chain(items.iter().flat_map(numbers)).collect()
}

/// Decodes the items, up to the first incomplete one.
fn decode(bytes: &[u8]) -> impl Iterator<Item = Vec<f64>> + '_ {
    let (words, _) = bytes.get(1..).unwrap_or_default().as_chunks::<8>();
    let mut words = words.iter().map(|word| u64::from_le_bytes(*word));
    std::iter::from_fn(move || {
        let count = words.next()? as usize;
        let item: Vec<f64> = words.by_ref().take(count).map(f64::from_bits).collect();
        (item.len() == count).then_some(item)
    })
}
