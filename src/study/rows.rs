//! A cell's predictions of every measured row in every arm, by which comparisons pair rows.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::error::{Error, Result};
use crate::util::files;

/// The tensor of the rows' indices.
const ROW: &str = "row";
/// The tensor of the rows' labels.
const LABEL: &str = "label";
/// The prefix of a treatment's tensor name.
const TREATMENT: &str = "log_probabilities/";

/// The n measured rows of a cell and the predictions in each treatment.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct CellRows {
    /// The index of each row in its development set.
    pub row: Vec<u32>,
    /// The class of each row.
    pub label: Vec<u32>,
    /// By treatment: the log-probabilities of the c classes, `(n, c)` row-major. -inf is probability 0.
    pub arms: BTreeMap<String, Vec<f32>>,
    /// The rows of each task by name, if the cell was measured on several tasks; the other fields are then
    /// empty.
    pub tasks: BTreeMap<String, CellRows>,
}

impl CellRows {
    /// Whether there are no predictions, as for a regression and for a cell that diverged or failed.
    pub fn is_empty(&self) -> bool {
        self.arms.is_empty() && self.tasks.values().all(Self::is_empty)
    }

    /// Keeps the predictions in a treatment: n rows of c probabilities.
    pub(super) fn add(&mut self, treatment: &str, probabilities: &[Vec<f64>]) {
        let logs = probabilities.iter().flatten().map(|p| p.ln() as f32).collect();
        self.arms.insert(treatment.to_string(), logs);
    }

    /// The class probabilities in a treatment, row-major, and the number of classes.
    pub fn probabilities(&self, treatment: &str) -> Option<(Vec<f64>, usize)> {
        let logs = self.arms.get(treatment)?;
        Some((logs.iter().map(|log| f64::from(*log).exp()).collect(), logs.len() / self.row.len().max(1)))
    }

    /// Writes the file `path`: `row` and `label` as `(n)` of u32, and each treatment as `(n, c)` of f32. With
    /// several tasks, tensor names begin with the task's name and a slash.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub(super) fn write(&self, path: &Path) -> Result<()> {
        let mut parts = Vec::new();
        self.parts("", &mut parts);
        let mut tensors = BTreeMap::new();
        for (name, dtype, shape, bytes) in &parts {
            let view = TensorView::new(*dtype, shape.clone(), bytes);
            tensors.insert(name.clone(), view.map_err(|e| Error::format(path, e.to_string()))?);
        }
        files::write_safetensors(path, tensors)
    }

    /// Collects the tensors (name with `prefix`, dtype, shape and bytes).
    fn parts(&self, prefix: &str, parts: &mut Vec<(String, Dtype, Vec<usize>, Vec<u8>)>) {
        for (task, rows) in &self.tasks {
            rows.parts(&format!("{prefix}{task}/"), parts);
        }
        if self.arms.is_empty() {
            return;
        }
        let n = self.row.len();
        let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
        parts.push((format!("{prefix}{ROW}"), Dtype::U32, vec![self.row.len()], words(&self.row)));
        parts.push((format!("{prefix}{LABEL}"), Dtype::U32, vec![self.label.len()], words(&self.label)));
        for (treatment, logs) in &self.arms {
            let bytes = logs.iter().flat_map(|log| log.to_le_bytes()).collect();
            let name = format!("{prefix}{TREATMENT}{treatment}");
            parts.push((name, Dtype::F32, vec![n, logs.len() / n.max(1)], bytes));
        }
    }

    /// Reads the rows of a cell, or of one of its tasks, from `file`, in which their tensor names begin with
    /// `prefix`; `None` if there are no such tensors. `path` appears in errors.
    ///
    /// # Errors
    /// If a tensor is missing, has another type or shape, or contains an invalid class or log-probability.
    pub(super) fn read(file: &SafeTensors, prefix: &str, path: &Path) -> Result<Option<Self>> {
        let wrong = |name: &str, reason: &str| Error::format(path, format!("{prefix}{name}: {reason}"));
        let words = |name: &str| -> Result<Vec<u32>> {
            let view = file.tensor(&format!("{prefix}{name}")).map_err(|_| wrong(name, "it is missing"))?;
            if view.dtype() != Dtype::U32 || view.shape().len() != 1 {
                return Err(wrong(name, "expected a row of u32"));
            }
            Ok(view.data().chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
        };
        let start = format!("{prefix}{TREATMENT}");
        let names: Vec<String> = file
            .names()
            .into_iter()
            .filter_map(|name| Some(name.strip_prefix(&start)?.to_string()))
            .collect();
        if names.is_empty() {
            return Ok(None);
        }
        let mut rows = Self { row: words(ROW)?, label: words(LABEL)?, ..Self::default() };
        let n = rows.row.len();
        if n == 0 || rows.label.len() != n {
            return Err(wrong(LABEL, "expected a label for each row, and at least one"));
        }
        for treatment in names {
            let name = format!("{TREATMENT}{treatment}");
            let view =
                file.tensor(&format!("{start}{treatment}")).map_err(|_| wrong(&name, "it is missing"))?;
            let classes = match *view.shape() {
                [rows, classes] if rows == n && classes > 1 && view.dtype() == Dtype::F32 => classes,
                _ => {
                    let expected = format!("expected f32 of shape ({n}, classes), classes >= 2");
                    let got = format!("got {:?} {:?}", view.dtype(), view.shape());
                    return Err(wrong(&name, &format!("{expected}, {got}")));
                }
            };
            let bytes = view.data().chunks_exact(4);
            let logs: Vec<f32> = bytes.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
            if logs.iter().any(|log| log.is_nan() || *log > 1e-5) {
                return Err(wrong(&name, "it holds a value that is not the logarithm of a probability"));
            }
            if rows.label.iter().any(|label| *label as usize >= classes) {
                return Err(wrong(LABEL, &format!("it holds a label that is none of {classes} classes")));
            }
            rows.arms.insert(treatment, logs);
        }
        Ok(Some(rows))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> CellRows {
        let mut rows = CellRows { row: vec![4, 9, 11], label: vec![1, 0, 1], ..CellRows::default() };
        rows.add("mean", &[vec![0.25, 0.75], vec![1.0, 0.0], vec![0.5, 0.5]]);
        rows.add("5 draws", &[vec![0.3, 0.7], vec![0.9, 0.1], vec![0.5, 0.5]]);
        rows
    }

    #[test]
    fn rows_are_read_as_they_were_written() -> Result<()> {
        let dir = tempfile::tempdir().map_err(Error::io("a temporary folder"))?;
        let path = dir.path().join("rows.safetensors");
        rows().write(&path)?;
        let bytes = std::fs::read(&path).map_err(Error::io(&*path))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| Error::format(&path, e.to_string()))?;
        let read = CellRows::read(&file, "", &path)?;
        assert_eq!(read.as_ref(), Some(&rows()));
        assert_eq!(CellRows::read(&file, "other/", &path)?, None);
        let (probabilities, classes) = rows().probabilities("mean").unwrap_or_default();
        assert_eq!((classes, probabilities[2], probabilities[3]), (2, 1.0, 0.0));
        assert!((probabilities[0] - 0.25).abs() < 1e-7 && rows().probabilities("laplace").is_none());
        Ok(())
    }

    #[test]
    fn the_rows_of_several_tasks_stand_apart() -> Result<()> {
        let dir = tempfile::tempdir().map_err(Error::io("a temporary folder"))?;
        let path = dir.path().join("rows.safetensors");
        let other = CellRows { row: vec![1, 2, 3], ..rows() };
        let tasks = [("a".to_string(), rows()), ("b".to_string(), other.clone())].into();
        CellRows { tasks, ..CellRows::default() }.write(&path)?;
        let bytes = std::fs::read(&path).map_err(Error::io(&*path))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| Error::format(&path, e.to_string()))?;
        assert_eq!(CellRows::read(&file, "a/", &path)?, Some(rows()));
        assert_eq!(CellRows::read(&file, "b/", &path)?, Some(other));
        assert_eq!(CellRows::read(&file, "", &path)?, None);
        Ok(())
    }

    #[test]
    fn what_is_no_row_is_named() -> Result<()> {
        let dir = tempfile::tempdir().map_err(Error::io("a temporary folder"))?;
        let path = dir.path().join("rows.safetensors");
        let refused = |rows: CellRows, reason: &str| -> Result<()> {
            rows.write(&path)?;
            let bytes = std::fs::read(&path).map_err(Error::io(&*path))?;
            let file = SafeTensors::deserialize(&bytes).map_err(|e| Error::format(&path, e.to_string()))?;
            let error = CellRows::read(&file, "", &path).map(drop).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
            Ok(())
        };
        refused(CellRows { label: vec![1, 2, 0], ..rows() }, "none of 2 classes")?;
        refused(CellRows { label: vec![1], ..rows() }, "a label for each row")?;
        let mut odd = rows();
        odd.add("mean", &[vec![0.5, 0.5], vec![2.0, 0.0], vec![0.5, 0.5]]);
        refused(odd, "log_probabilities/mean: it holds a value that is not the logarithm")
    }
}
