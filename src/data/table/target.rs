//! The prediction target of a table: named classes, or numbers.

use std::collections::BTreeMap;
use std::str::FromStr;

use super::read::{Record, Table};
use crate::data::lines::excerpt;
use crate::data::task::{Example, Label};
use crate::error::{Error, Result};
use crate::labels::Labels;

/// With more rows than this, if each has a label of its own, the label column is taken to be wrong.
const MAX_UNIQUE_LABELS: usize = 20;

/// The kind of a prediction target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProblemType {
    /// One of some classes.
    Classification,
    /// A number.
    Regression,
}

impl FromStr for ProblemType {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "classification" => Ok(Self::Classification),
            "regression" => Ok(Self::Regression),
            _ => {
                let reason = format!("expected classification or regression, got {text}");
                Err(Error::config("problem_type", reason))
            }
        }
    }
}

/// The prediction target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// One of these classes.
    Classes(Labels),
    /// A number.
    Score,
}

impl From<&Target> for Labels {
    /// The names of the classes; for a regression, the name of its one output.
    fn from(target: &Target) -> Self {
        match target {
            Target::Classes(labels) => labels.clone(),
            Target::Score => Self::numbered(1),
        }
    }
}

impl Target {
    /// Infers the target from the labels of a training table; `given` overrides its kind. Labels are scores
    /// if all are numbers and one has a fractional part, and classes otherwise, in numerical order if all are
    /// integers, else in alphabetical order.
    ///
    /// # Errors
    /// If a row has no label; if classes are all the same, or more than 20 rows each have a class of their
    /// own; if labels are whole numbers written with a point (`1.0`), which could be either; or if a score is
    /// not a finite number.
    pub fn infer(table: &Table, given: Option<ProblemType>) -> Result<Self> {
        let mut first = BTreeMap::<&str, &Record>::new();
        for record in &table.records {
            first.entry(required(table, record)?).or_insert(record);
        }
        let whole: Option<Vec<i64>> = first.keys().map(|label| label.parse().ok()).collect();
        let numbers: Option<Vec<f64>> = first.keys().map(|label| label.parse().ok()).collect();
        let regression = match (given, &whole, &numbers) {
            (Some(given), ..) => given == ProblemType::Regression,
            (None, None, Some(numbers)) => {
                if numbers.iter().all(|number| number.fract() == 0.0) {
                    let reason =
                        "labels are whole numbers with a decimal point (1.0): set the problem type to \
                                  classification (classes) or regression (scores)";
                    return Err(Error::format(&table.path, reason));
                }
                true
            }
            _ => false,
        };
        if regression {
            for record in &table.records {
                score(table, record)?;
            }
            return Ok(Self::Score);
        }
        if first.len() < 2 {
            let only = first.keys().next().copied().unwrap_or_default();
            let reason =
                format!("all rows have the label {:?}: expected at least two classes", excerpt(only));
            return Err(Error::format(&table.path, reason));
        }
        if first.len() == table.records.len() && first.len() > MAX_UNIQUE_LABELS {
            let reason =
                format!("each of {} rows has a different label: is this the right column?", first.len());
            return Err(Error::format(&table.path, reason));
        }
        let mut names: Vec<&str> = first.into_keys().collect();
        if whole.is_some() {
            names.sort_by_key(|name| name.parse::<i64>().unwrap_or(i64::MAX));
        }
        Ok(Self::Classes(Labels::new(names)?))
    }

    /// The rows of a table with their labels; without labels if no row has one.
    ///
    /// # Errors
    /// If only some rows have labels, or a label is none of the classes or not a finite number.
    pub fn examples(&self, table: &Table) -> Result<Vec<Example>> {
        let labelled = table.records.iter().any(|record| record.label.is_some());
        let example = |record: &Record| {
            let label = if labelled { self.label(table, record)? } else { Label::Unknown };
            Ok(Example::new(&record.text_a, record.text_b.as_deref(), label))
        };
        table.records.iter().map(example).collect()
    }

    fn label(&self, table: &Table, record: &Record) -> Result<Label> {
        let Self::Classes(labels) = self else { return score(table, record).map(Label::Score) };
        let name = required(table, record)?;
        match labels.index_of(name) {
            Some(class) => Ok(Label::Class(class as u32)),
            None => {
                let known = excerpt(&labels.names().join(", "));
                let reason = format!("unknown label {:?}, expected one of {known}", excerpt(name));
                Err(table.fault(record, &reason))
            }
        }
    }
}

fn required<'a>(table: &Table, record: &'a Record) -> Result<&'a str> {
    record.label.as_deref().ok_or_else(|| table.fault(record, "no label"))
}

fn score(table: &Table, record: &Record) -> Result<f32> {
    let text = required(table, record)?;
    match text.parse::<f32>() {
        Ok(score) if score.is_finite() => Ok(score),
        _ => Err(table.fault(record, &format!("label {:?}, expected a finite number", excerpt(text)))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{read_from, Columns};
    use super::*;
    use std::path::Path;

    fn table(labels: &[&str]) -> Table {
        let rows: String = labels.iter().map(|label| format!("some text\t{label}\n")).collect();
        let text = format!("text\tlabel\n{rows}");
        read_from(text.as_bytes(), Path::new("x.tsv"), &Columns::default()).unwrap()
    }

    fn inferred(labels: &[&str]) -> std::result::Result<Target, String> {
        Target::infer(&table(labels), None).map_err(|error| error.to_string())
    }

    fn classes(names: &[&str]) -> Target {
        Target::Classes(Labels::new(names.iter().copied()).unwrap())
    }

    #[test]
    fn words_and_whole_numbers_are_classes_and_fractions_scores() {
        assert_eq!(inferred(&["pos", "neg", "pos"]), Ok(classes(&["neg", "pos"])));
        assert_eq!(inferred(&["10", "2", "-1", "2"]), Ok(classes(&["-1", "2", "10"])));
        assert_eq!(inferred(&["true", "false"]), Ok(classes(&["false", "true"])));
        assert_eq!(inferred(&["1", "x"]), Ok(classes(&["1", "x"])));
        assert_eq!(inferred(&["1", "2.5", "3e0"]), Ok(Target::Score));
        let given = |kind: &str| Target::infer(&table(&["1.0", "0.0"]), Some(kind.parse().unwrap())).unwrap();
        assert_eq!((given("regression"), given("classification")), (Target::Score, classes(&["0.0", "1.0"])));
        assert!("both".parse::<ProblemType>().unwrap_err().to_string().starts_with("invalid problem_type"));
    }

    #[test]
    fn what_says_no_class_is_told() {
        let own: Vec<String> = (0..21).map(|i| format!("id-{i}")).collect();
        let own: Vec<&str> = own.iter().map(String::as_str).collect();
        for (labels, expected) in [
            (&["a", "", "b"][..], "x.tsv, line 3: no label"),
            (&["a", "a"], "x.tsv: all rows have the label \"a\": expected at least two classes"),
            (&["1.0", "0.0"], "x.tsv: labels are whole numbers with a decimal point (1.0): set the"),
            (&["1.5", "nan"], "x.tsv, line 3: label \"nan\", expected a finite number"),
            (&own, "x.tsv: each of 21 rows has a different label: is this the right column?"),
        ] {
            let message = inferred(labels).unwrap_err();
            assert!(message.starts_with(expected), "{message}");
        }
    }

    #[test]
    fn rows_get_the_numbers_of_their_classes_by_name() {
        let target = classes(&["not_ok", "ok"]);
        let labels = |labels: &[&str]| -> std::result::Result<Vec<Label>, String> {
            let rows = target.examples(&table(labels)).map_err(|error| error.to_string())?;
            Ok(rows.iter().map(|row| row.label).collect::<Vec<_>>())
        };
        assert_eq!(labels(&["ok", "Not OK"]), Ok(vec![Label::Class(1), Label::Class(0)]));
        assert_eq!(labels(&["", ""]), Ok(vec![Label::Unknown; 2]));
        assert_eq!(labels(&["ok", ""]), Err("x.tsv, line 3: no label".to_string()));
        let strange = "x.tsv, line 2: unknown label \"maybe\", expected one of not_ok, ok";
        assert_eq!(labels(&["maybe"]), Err(strange.to_string()));
        let scores = Target::Score.examples(&table(&["1", "-2.5"])).unwrap();
        assert_eq!((scores[0].label, scores[1].label), (Label::Score(1.0), Label::Score(-2.5)));
        assert!(Target::Score.examples(&table(&["1", "inf"])).is_err());
    }
}
