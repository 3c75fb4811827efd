//! Draws stratified random subsets of rows by a seed: for training, and to hold out.
//!
//! The first or last rows of a file are no random sample: files are sorted by source, length or label.

use std::collections::BTreeMap;

use crate::data::encode::Encoded;
use crate::data::task::Label;
use crate::error::{Error, Result};
use crate::noise::{Noise, Purpose};

/// A subset that [`stratified`] draws, by its purpose; those for different purposes are independent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subset {
    /// Rows to train on.
    Training,
    /// Rows kept from training, to fit something on afterwards.
    HeldOut,
    /// Rows to evaluate on.
    Measured,
    /// Rows to compute a curvature on.
    Curvature,
}

impl Subset {
    const fn path(self) -> &'static str {
        match self {
            Self::Training => "data.split.training",
            Self::HeldOut => "data.split.held_out",
            Self::Measured => "data.split.measured",
            Self::Curvature => "data.split.curvature",
        }
    }
}

/// The stratum of each row: its class; all scores and unknown labels are in stratum 0.
pub fn strata(rows: &[Encoded]) -> Vec<u32> {
    rows.iter().map(|row| stratum(row.label)).collect()
}

/// The stratum of a label.
pub(super) const fn stratum(label: Label) -> u32 {
    match label {
        Label::Class(class) => class,
        Label::Score(_) | Label::Unknown => 0,
    }
}

/// Draws `count` rows without replacement and returns their indices, ascending; all rows if there are no
/// more.
///
/// Each stratum gets its share of `count`, rounded by the largest remainders (of equal ones, the lower
/// stratum first). Within a stratum every row is equally likely.
pub fn stratified(strata: &[u32], count: usize, noise: Noise, subset: Subset) -> Vec<usize> {
    if count >= strata.len() {
        return (0..strata.len()).collect();
    }
    let mut groups = BTreeMap::<u32, Vec<usize>>::new();
    strata.iter().enumerate().for_each(|(place, stratum)| groups.entry(*stratum).or_default().push(place));
    // In integers: quotient and remainder of size * count / rows.
    let share = |group: &Vec<usize>| {
        let product = group.len() as u128 * count as u128;
        ((product / strata.len() as u128) as usize, product % strata.len() as u128)
    };
    let mut quotas: Vec<(u32, usize, u128)> =
        groups.iter().map(|(stratum, group)| (*stratum, share(group).0, share(group).1)).collect();
    let short = count - quotas.iter().map(|(_, quota, _)| quota).sum::<usize>();
    quotas.sort_by_key(|(stratum, _, rest)| (std::cmp::Reverse(*rest), *stratum));
    quotas.iter_mut().take(short).for_each(|(_, quota, _)| *quota += 1);
    let stream = noise.stream(subset.path(), Purpose::Shuffle);
    let mut chosen = Vec::with_capacity(count);
    for (stratum, quota, _) in quotas {
        let group = &groups[&stratum];
        let order = stream.permutation(u64::from(stratum), group.len());
        chosen.extend(order.into_iter().take(quota).map(|i| group[i]));
    }
    chosen.sort_unstable();
    chosen
}

/// Splits rows into those that stay and a share to hold out, drawn by [`stratified`]; returns the indices of
/// both, ascending. The number of held-out rows is rounded to the nearest integer. The only row of a stratum
/// stays, so that a class of one row is trained on.
///
/// # Errors
/// If `share` is not at least 0 and below 1; or if it is above 0 and would hold out no row, or all.
pub fn hold_out(strata: &[u32], share: f64, noise: Noise) -> Result<(Vec<usize>, Vec<usize>)> {
    if !(0.0..1.0).contains(&share) {
        return Err(Error::config("held_out", format!("expected a share from 0 to below 1, got {share}")));
    }
    let mut sizes = BTreeMap::<u32, usize>::new();
    strata.iter().for_each(|stratum| *sizes.entry(*stratum).or_default() += 1);
    let several: Vec<usize> = (0..strata.len()).filter(|place| sizes[&strata[*place]] > 1).collect();
    let count = (several.len() as f64 * share).round() as usize;
    if share > 0.0 && (count == 0 || count == several.len()) {
        let reason = format!(
            "{share} of {} rows is {count}: at least one row must be held out, and one must remain",
            several.len()
        );
        return Err(Error::config("held_out", reason));
    }
    let held = stratified(&at(strata, &several), count, noise, Subset::HeldOut);
    let held = at(&several, &held);
    let stay = (0..strata.len()).filter(|place| held.binary_search(place).is_err()).collect();
    Ok((stay, held))
}

/// The rows to measure on: all or, with a limit, a stratified draw of so many, whatever the seed of the training.
/// `strata` gives the stratum of each row.
pub fn measured<T: Clone>(
    rows: Vec<T>,
    limit: Option<usize>,
    strata: impl FnOnce(&[T]) -> Vec<u32>,
) -> Vec<T> {
    match limit {
        Some(count) => at(&rows, &stratified(&strata(&rows), count, Noise::new(0), Subset::Measured)),
        None => rows,
    }
}

/// The rows at these indices.
///
/// # Panics
/// If an index is out of range.
pub fn at<T: Clone>(rows: &[T], places: &[usize]) -> Vec<T> {
    places.iter().map(|place| rows[*place].clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 60 rows of class 0, then 30 of class 1, then 10 of class 2.
    fn sorted() -> Vec<u32> {
        [vec![0; 60], vec![1; 30], vec![2; 10]].concat()
    }

    fn counts(strata: &[u32], places: &[usize]) -> [usize; 3] {
        [0, 1, 2].map(|class| places.iter().filter(|place| strata[**place] == class).count())
    }

    #[test]
    fn strata_keep_their_shares_and_remainders_go_to_the_largest() {
        let strata = sorted();
        for (count, want) in [(10, [6, 3, 1]), (20, [12, 6, 2]), (7, [4, 2, 1]), (4, [3, 1, 0]), (0, [0; 3])]
        {
            // Quotas for 7: 4.2, 2.1, 0.7; for 4: 2.4, 1.2, 0.4, of equal remainders the lower stratum.
            let places = stratified(&strata, count, Noise::new(1), Subset::Training);
            assert_eq!(counts(&strata, &places), want, "{count}");
            assert!(places.windows(2).all(|pair| pair[0] < pair[1]));
        }
        assert_eq!(stratified(&strata, 1000, Noise::new(1), Subset::Training).len(), 100);
    }

    #[test]
    fn measured_rows_are_all_or_a_stratified_draw() {
        let strata = |rows: &[usize]| rows.iter().map(|row| sorted()[*row]).collect::<Vec<u32>>();
        let rows: Vec<usize> = (0..100).collect();
        assert_eq!(measured(rows.clone(), None, strata), rows);
        assert_eq!(measured(rows.clone(), Some(200), strata), rows);
        assert_eq!(counts(&sorted(), &measured(rows, Some(20), strata)), [12, 6, 2]);
    }

    #[test]
    fn the_only_row_of_a_stratum_is_not_held_out() -> Result<()> {
        let strata = [0, 1, 0, 2, 0, 0];
        for seed in 0..20 {
            let (stay, held) = hold_out(&strata, 0.5, Noise::new(seed))?;
            assert_eq!((stay.len(), held.len()), (4, 2));
            assert!(stay.contains(&1) && stay.contains(&3), "{stay:?}");
        }
        // Of two rows, not both: the class would not be trained on.
        let error = hold_out(&[0, 0, 1], 0.8, Noise::new(1)).unwrap_err().to_string();
        assert!(error.contains("0.8 of 2 rows is 2"), "{error}");
        Ok(())
    }

    #[test]
    fn a_subset_depends_on_seed_and_purpose_and_every_row_comes_equally_often() {
        let strata = sorted();
        let of = |seed, subset| stratified(&strata, 20, Noise::new(seed), subset);
        assert_eq!(of(3, Subset::Training), of(3, Subset::Training));
        assert_ne!(of(3, Subset::Training), of(4, Subset::Training));
        let all = [Subset::Training, Subset::HeldOut, Subset::Measured, Subset::Curvature];
        let draws: std::collections::BTreeSet<_> = all.into_iter().map(|subset| of(3, subset)).collect();
        assert_eq!(draws.len(), all.len());
        // Each row is in one draw of five: binomial with n = 2000, standard deviation 18.
        let mut times = [0u32; 100];
        (0..2000).for_each(|seed| of(seed, Subset::Training).iter().for_each(|place| times[*place] += 1));
        let sd = (2000.0 * 0.2 * 0.8f64).sqrt();
        for (place, times) in times.iter().enumerate() {
            assert!((f64::from(*times) - 400.0).abs() < 4.5 * sd, "{place}: {times}");
        }
    }

    #[test]
    fn held_out_rows_and_those_that_stay_are_all_rows_and_share_none() -> Result<()> {
        let strata = sorted();
        let (stay, held) = hold_out(&strata, 0.15, Noise::new(2))?;
        assert_eq!((counts(&strata, &stay), counts(&strata, &held)), ([51, 25, 9], [9, 5, 1]));
        let mut all = [stay, held].concat();
        all.sort_unstable();
        assert_eq!(all, (0..100).collect::<Vec<_>>());
        assert_eq!(hold_out(&strata, 0.0, Noise::new(2))?.1, Vec::<usize>::new());
        for (strata, share) in [(&strata[..], 1.0), (&strata, -0.1), (&strata, f64::NAN), (&strata[..2], 0.1)]
        {
            assert!(hold_out(strata, share, Noise::new(2)).is_err(), "{share}");
        }
        Ok(())
    }

    #[test]
    fn scores_are_one_stratum() {
        let row = |label| Encoded { ids: vec![1], type_ids: vec![0], label, row: 0 };
        assert_eq!(strata(&[row(Label::Class(2)), row(Label::Score(3.0))]), [2, 0]);
    }
}
