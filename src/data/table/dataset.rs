//! A data set: rows for training and evaluation, and the prediction target.

use std::path::Path;

use super::columns::Columns;
use super::read::read;
use super::target::{ProblemType, Target};
use crate::data::split::{at, hold_out, stratum};
use crate::data::task::{Example, Label};
use crate::error::{Error, Result};
use crate::noise::Noise;

/// A data set read from tables.
///
/// # Example
/// ```
/// use monteclora::data::table::{Columns, DataSet};
/// use monteclora::Noise;
///
/// let dir = tempfile::tempdir()?;
/// let path = dir.path().join("mail.csv");
/// let rows: String = (0..30).map(|i| format!("\"text, {i}\",{}\n", ["spam", "ham"][i % 2])).collect();
/// std::fs::write(&path, format!("text,label\n{rows}"))?;
///
/// let data = DataSet::read(&path, &Columns::default(), None)?.hold_out(0.2, Noise::new(1))?;
/// assert_eq!((data.train.len(), data.dev.len()), (24, 6));
/// let counts: Vec<_> = data.counts().into_iter().map(|c| (c.name, c.train, c.dev)).collect();
/// assert_eq!(counts, [("ham".to_string(), 12, 3), ("spam".to_string(), 12, 3)]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct DataSet {
    /// The columns to read from its files.
    pub columns: Columns,
    /// The prediction target.
    pub target: Target,
    /// The rows to train on.
    pub train: Vec<Example>,
    /// The rows to evaluate on.
    pub dev: Vec<Example>,
}

/// How often a class occurs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabelCount {
    /// The name of the class.
    pub name: String,
    /// The number of training rows.
    pub train: usize,
    /// The number of evaluation rows.
    pub dev: usize,
}

impl DataSet {
    /// Reads the training rows. The target is inferred from their labels ([`Target::infer`]); `problem`
    /// overrides its kind.
    ///
    /// # Errors
    /// As [`super::read()`] and [`Target::infer`].
    pub fn read(train: impl AsRef<Path>, columns: &Columns, problem: Option<ProblemType>) -> Result<Self> {
        let table = read(train, columns)?;
        let target = Target::infer(&table, problem)?;
        let train = target.examples(&table)?;
        Ok(Self { columns: columns.clone(), target, train, dev: Vec::new() })
    }

    /// Reads the evaluation rows from a file.
    ///
    /// # Errors
    /// As [`Self::read_labelled`].
    pub fn with_dev(self, dev: impl AsRef<Path>) -> Result<Self> {
        Ok(Self { dev: self.read_labelled(dev)?, ..self })
    }

    /// Reads further rows with the columns and the target of this set, such as those of a final test.
    ///
    /// # Errors
    /// As [`super::read()`] and [`Target::examples`]; or if no row has a label.
    pub fn read_labelled(&self, path: impl AsRef<Path>) -> Result<Vec<Example>> {
        let table = read(path, &self.columns)?;
        let rows = self.target.examples(&table)?;
        match rows.iter().all(|row| row.label == Label::Unknown) {
            true => Err(Error::format(&table.path, "no row has a label to measure by")),
            false => Ok(rows),
        }
    }

    /// Moves a share of the training rows, drawn by the seed and stratified by class, to the evaluation rows,
    /// replacing any. A class with only one row keeps it in training.
    ///
    /// # Errors
    /// As [`hold_out`].
    pub fn hold_out(self, share: f64, noise: Noise) -> Result<Self> {
        let strata: Vec<u32> = self.train.iter().map(|row| stratum(row.label)).collect();
        let (stay, held) = hold_out(&strata, share, noise)?;
        Ok(Self { train: at(&self.train, &stay), dev: at(&self.train, &held), ..self })
    }

    /// How often each class occurs; empty for a regression.
    pub fn counts(&self) -> Vec<LabelCount> {
        let Target::Classes(labels) = &self.target else { return Vec::new() };
        let count = |rows: &[Example], class: usize| {
            rows.iter().filter(|row| row.label == Label::Class(class as u32)).count()
        };
        let of = |(class, name): (usize, &String)| LabelCount {
            name: name.clone(),
            train: count(&self.train, class),
            dev: count(&self.dev, class),
        };
        labels.names().iter().enumerate().map(of).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::write;

    #[test]
    fn a_file_to_measure_has_the_classes_of_the_training_file() -> Result<()> {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        write(path("train.csv"), "text,label\na,y\nb,x\nc,y\n").unwrap();
        write(path("dev.jsonl"), "{\"text\": \"d\", \"label\": \"X\"}\n").unwrap();
        let data =
            DataSet::read(path("train.csv"), &Columns::default(), None)?.with_dev(path("dev.jsonl"))?;
        assert_eq!(
            (data.dev.len(), data.dev[0].label, data.train[0].label),
            (1, Label::Class(0), Label::Class(1))
        );
        write(path("dev.jsonl"), "{\"text\": \"d\", \"label\": \"z\"}\n").unwrap();
        let strange = data.with_dev(path("dev.jsonl")).unwrap_err().to_string();
        assert!(
            strange.ends_with("dev.jsonl, line 1: unknown label \"z\", expected one of x, y"),
            "{strange}"
        );
        write(path("dev.jsonl"), "{\"text\": \"d\", \"label\": null}\n").unwrap();
        let data = DataSet::read(path("train.csv"), &Columns::default(), None)?;
        let bare = data.with_dev(path("dev.jsonl")).unwrap_err().to_string();
        assert!(bare.ends_with("dev.jsonl: no row has a label to measure by"), "{bare}");
        Ok(())
    }

    #[test]
    fn a_class_of_one_row_is_trained_on_whatever_the_seed() -> Result<()> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("train.csv");
        let rows: String =
            (0..21).map(|i| format!("{i},{}\n", if i == 20 { "rare" } else { "often" })).collect();
        write(&path, format!("text,label\n{rows}")).unwrap();
        let data = DataSet::read(&path, &Columns::default(), None)?;
        for seed in 0..50 {
            let parts = data.clone().hold_out(0.5, Noise::new(seed))?;
            let counts: Vec<_> = parts.counts().iter().map(|count| (count.train, count.dev)).collect();
            assert_eq!(counts, [(10, 10), (1, 0)], "{seed}");
            let mut all = [parts.train, parts.dev].concat();
            all.sort_by_key(|row| row.text_a.parse::<usize>().unwrap_or(99));
            assert_eq!(all, data.train, "{seed}");
        }
        Ok(())
    }
}
