//! Precision, recall and F1 of each class.

use std::collections::BTreeMap;

use serde::Serialize;

use super::same_length;
use crate::error::Result;

/// The scores of one class against the others.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ClassScores {
    /// The class.
    pub class: u32,
    /// The share of its predictions that are right; 0 if it is never predicted.
    pub precision: f64,
    /// The share of its rows that are found; 0 if it has none.
    pub recall: f64,
    /// The harmonic mean of precision and recall; 0 if both are 0.
    pub f1: f64,
    /// The number of rows with this label.
    pub rows: usize,
}

/// Returns the scores of every class that occurs as a prediction or a label, in ascending order.
///
/// # Errors
/// If there is no row, or if both slices differ in length.
pub fn class_scores(predicted: &[u32], labels: &[u32]) -> Result<Vec<ClassScores>> {
    same_length(predicted.len(), labels.len())?;
    // Right, predicted, labelled.
    let mut counts = BTreeMap::<u32, [usize; 3]>::new();
    for (p, l) in predicted.iter().zip(labels) {
        counts.entry(*p).or_default()[1] += 1;
        let label = counts.entry(*l).or_default();
        label[2] += 1;
        label[0] += usize::from(p == l);
    }
    let share = |part: usize, whole: usize| if whole == 0 { 0.0 } else { part as f64 / whole as f64 };
    let scores = |(class, [right, predicted, rows]): (u32, [usize; 3])| ClassScores {
        class,
        precision: share(right, predicted),
        recall: share(right, rows),
        f1: share(2 * right, predicted + rows),
        rows,
    };
    Ok(counts.into_iter().map(scores).collect())
}

#[cfg(test)]
mod tests {
    use super::super::Metrics;
    use super::*;

    #[test]
    fn scores_of_classes_and_their_averages_are_scikit_learn_s() -> Result<()> {
        // y = [0, 0, 0, 1, 1, 2, 2, 2, 2, 0], p = [0, 0, 1, 1, 4, 2, 2, 0, 1, 0] of five classes, 3 unused:
        // sklearn.metrics.precision_recall_fscore_support(y, p, zero_division=0),
        // f1_score(y, p, average='macro') and 'weighted'
        let labels = [0, 0, 0, 1, 1, 2, 2, 2, 2, 0];
        let predicted = [0, 0, 1, 1, 4, 2, 2, 0, 1, 0];
        let got = class_scores(&predicted, &labels)?;
        let expected = [
            (0, 0.75, 0.75, 0.75, 4),
            (1, 1.0 / 3.0, 0.5, 0.4, 2),
            (2, 1.0, 0.5, 2.0 / 3.0, 4),
            (4, 0.0, 0.0, 0.0, 0),
        ];
        assert_eq!(got.len(), expected.len());
        for (got, (class, precision, recall, f1, rows)) in got.iter().zip(expected) {
            let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-15, "{class}: {a} {b}");
            near(got.precision, precision);
            near(got.recall, recall);
            near(got.f1, f1);
            assert_eq!((got.class, got.rows), (class, rows));
        }
        let sure = |class: &u32| (0..5).map(|c| f64::from(u8::from(c == *class))).collect::<Vec<_>>();
        let rows: Vec<Vec<f64>> = predicted.iter().map(sure).collect();
        let metrics = Metrics::of_own_data(&rows, &labels)?;
        let near = |a: Option<f64>, b: f64| assert!(a.is_some_and(|a| (a - b).abs() < 1e-15), "{a:?} {b}");
        near(metrics.macro_f1, 0.45416666666666666);
        near(metrics.weighted_f1, 0.6466666666666667);
        near(metrics.accuracy, 0.6);
        assert_eq!(
            Metrics { macro_f1: None, weighted_f1: None, ..metrics },
            Metrics::classification(&rows, &labels)?
        );
        assert!(class_scores(&[], &[]).is_err() && class_scores(&[1], &[]).is_err());
        Ok(())
    }
}
