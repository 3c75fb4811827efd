//! Predictions in the format of the GLUE and SuperGLUE servers.

use serde_json::json;

use super::prediction::Prediction;
use crate::data::task::Task;
use crate::error::{Error, Result};
use crate::labels::Labels;

/// A file to submit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Submission {
    /// The file name that the server expects.
    pub name: String,
    /// The file's content.
    pub text: String,
}

impl Submission {
    /// Creates the file for a task's test set `set`: `test`, or `matched` and `mismatched` for MNLI. Rows are
    /// numbered from 0. Classes are spelled as in the task's own files; scores of STS-B have three decimals
    /// and are clamped to 0 to 5, the range of the labels.
    ///
    /// # Errors
    /// If a prediction is for another task: its label is not one of the task's, or it has no score.
    pub fn new(task: Task, set: &str, predictions: &[Prediction]) -> Result<Self> {
        let name = match (task, set) {
            (Task::Wic, _) => "WiC.jsonl",
            (Task::BoolQ, _) => "BoolQ.jsonl",
            (Task::Mnli, "mismatched") => "MNLI-mm.tsv",
            (Task::Mnli, _) => "MNLI-m.tsv",
            _ => task.folder_names()[0],
        };
        let lines = name.ends_with(".jsonl");
        let name = if name.contains('.') { name.to_string() } else { format!("{name}.tsv") };
        let mut text = if lines { String::new() } else { "index\tprediction\n".to_string() };
        for (row, prediction) in predictions.iter().enumerate() {
            let answer = answer(task, prediction).map_err(|reason| {
                Error::config("predictions", format!("row {row} does not fit {task}: {reason}"))
            })?;
            text += &match lines {
                true => format!("{}\n", json!({ "idx": row, "label": answer })),
                false => format!("{row}\t{answer}\n"),
            };
        }
        Ok(Self { name, text })
    }
}

fn answer(task: Task, prediction: &Prediction) -> std::result::Result<String, String> {
    if task.is_regression() {
        return match prediction.values[..] {
            [score] => Ok(format!("{:.3}", score.clamp(0.0, 5.0))),
            _ => Err(format!("expected one score, got {} values", prediction.values.len())),
        };
    }
    let label = prediction.label.as_deref().ok_or("no class")?;
    let class = Labels::from(task).index_of(label).ok_or_else(|| format!("class {label:?}"))?;
    Ok(match task {
        Task::Mrpc | Task::Cola | Task::Sst2 | Task::Qqp => class.to_string(),
        _ => task.label_names()[class].to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn predictions(task: Task, values: &[&[f64]]) -> Vec<Prediction> {
        values.iter().map(|values| Prediction::new(values.to_vec(), &task.into(), None)).collect()
    }

    #[test]
    fn files_are_named_and_spelled_as_the_servers_want_them() -> Result<()> {
        let (first, second): (&[f64], &[f64]) = (&[0.75, 0.25], &[0.25, 0.75]);
        for (task, set, name, text) in [
            (Task::Cola, "test", "CoLA.tsv", "index\tprediction\n0\t0\n1\t1\n"),
            (Task::Sst2, "test", "SST-2.tsv", "index\tprediction\n0\t0\n1\t1\n"),
            (Task::Rte, "test", "RTE.tsv", "index\tprediction\n0\tentailment\n1\tnot_entailment\n"),
            (
                Task::Wic,
                "test",
                "WiC.jsonl",
                "{\"idx\":0,\"label\":\"false\"}\n{\"idx\":1,\"label\":\"true\"}\n",
            ),
        ] {
            let got = Submission::new(task, set, &predictions(task, &[first, second]))?;
            assert_eq!((got.name.as_str(), got.text.as_str()), (name, text));
        }
        let three = predictions(Task::Mnli, &[&[0.1, 0.7, 0.2]]);
        let got = Submission::new(Task::Mnli, "mismatched", &three)?;
        assert_eq!(
            (got.name.as_str(), got.text.as_str()),
            ("MNLI-mm.tsv", "index\tprediction\n0\tneutral\n")
        );
        assert_eq!(Submission::new(Task::Mnli, "matched", &three)?.name, "MNLI-m.tsv");
        let scores = predictions(Task::Stsb, &[&[2.34567], &[5.2], &[-0.1]]);
        let got = Submission::new(Task::Stsb, "test", &scores)?;
        assert_eq!(
            (got.name.as_str(), got.text.as_str()),
            ("STS-B.tsv", "index\tprediction\n0\t2.346\n1\t5.000\n2\t0.000\n")
        );
        let strange = Submission::new(Task::Rte, "test", &three).unwrap_err().to_string();
        assert_eq!(strange, "invalid predictions: row 0 does not fit rte: class \"neutral\"");
        Ok(())
    }
}
