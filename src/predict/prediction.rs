//! The prediction for one text, and tables of predictions.

use std::path::Path;

use crate::error::{Error, Result};
use crate::labels::Labels;
use crate::metrics::{argmax, entropy, uncertainty, Uncertainty};
use crate::util::files;

/// A classifier's prediction for one text.
#[derive(Debug, Clone, PartialEq)]
pub struct Prediction {
    /// The name of the most probable class; `None` for a regression.
    pub label: Option<String>,
    /// The probability of each class, in the order of the classifier's labels; for a regression, the score
    /// alone.
    pub values: Vec<f64>,
    /// The uncertainty from posterior draws, if several were averaged.
    pub uncertainty: Option<Uncertainty>,
}

impl Prediction {
    /// Creates a prediction from class probabilities, or from one score.
    pub(crate) fn new(values: Vec<f64>, labels: &Labels, uncertainty: Option<Uncertainty>) -> Self {
        let label = (values.len() > 1).then(|| argmax(&values)).and_then(|class| labels.name(class));
        Self { label: label.map(str::to_string), values, uncertainty }
    }

    /// The predictions of classes averaged over draws of shape `(s, n, c)`, with their uncertainty.
    ///
    /// # Errors
    /// As [`uncertainty`].
    pub(crate) fn of_draws(draws: &[Vec<Vec<f64>>], labels: &Labels) -> Result<Vec<Self>> {
        let row = |(n, uncertainty): (usize, Uncertainty)| {
            let mean =
                |class: usize| draws.iter().map(|draw| draw[n][class]).sum::<f64>() / draws.len() as f64;
            Self::new((0..labels.len()).map(mean).collect(), labels, Some(uncertainty))
        };
        Ok(uncertainty(draws)?.into_iter().enumerate().map(row).collect())
    }

    /// Writes predictions as a CSV table with one row each: the row number from 0, the label, the probability
    /// of each class (column `p_` and the class name), their entropy in nats, and, if draws were averaged,
    /// the mutual information of label and weights. For a regression: row number and score.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write_csv(predictions: &[Self], labels: &Labels, path: &Path) -> Result<()> {
        files::write(path, Self::csv(predictions, labels)?.as_bytes())
    }

    /// Returns the text of [`Self::write_csv`].
    ///
    /// # Errors
    /// If a prediction does not have as many values as there are labels.
    pub fn csv(predictions: &[Self], labels: &Labels) -> Result<String> {
        let averaged = predictions.iter().any(|prediction| prediction.uncertainty.is_some());
        let mut header = vec!["row".to_string()];
        if labels.len() == 1 {
            header.push("score".into());
        } else {
            header.push("label".into());
            header.extend(labels.names().iter().map(|name| format!("p_{name}")));
            header.push("entropy".into());
            header.extend(averaged.then(|| "mutual_information".into()));
        }
        let mut writer = csv::Writer::from_writer(Vec::new());
        let failed = |error: csv::Error| Error::config("predictions", error.to_string());
        writer.write_record(&header).map_err(failed)?;
        for (row, prediction) in predictions.iter().enumerate() {
            let mut fields = vec![row.to_string()];
            fields.extend(prediction.label.clone());
            fields.extend(prediction.values.iter().map(f64::to_string));
            if labels.len() > 1 {
                fields.push(entropy(&prediction.values).to_string());
            }
            fields.extend(prediction.uncertainty.map(|uncertainty| uncertainty.epistemic.to_string()));
            writer.write_record(&fields).map_err(failed)?;
        }
        let bytes = writer.into_inner().map_err(|error| Error::config("predictions", error.to_string()))?;
        String::from_utf8(bytes).map_err(|error| Error::config("predictions", error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_a_row_for_each_text_and_names_in_quotes_where_they_need_them() -> Result<()> {
        let labels = Labels::new(["no", "yes, very"])?;
        let uncertainty = Uncertainty { total: 0.5, aleatoric: 0.25, epistemic: 0.25 };
        let predictions = [
            Prediction::new(vec![0.25, 0.75], &labels, Some(uncertainty)),
            Prediction::new(vec![0.5, 0.5], &labels, Some(uncertainty)),
        ];
        let text = Prediction::csv(&predictions, &labels)?;
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "row,label,p_no,\"p_yes, very\",entropy,mutual_information");
        assert_eq!(lines[1], format!("0,\"yes, very\",0.25,0.75,{},0.25", entropy(&[0.25, 0.75])));
        assert_eq!((lines[2].split(',').nth(1), lines.len()), (Some("no"), 3)); // the first of equal ones
        let one = Labels::numbered(1);
        let score = Prediction::new(vec![2.5], &one, None);
        assert_eq!(Prediction::csv(&[score], &one)?, "row,score\n0,2.5\n");
        // The row has another width than the header.
        assert!(Prediction::csv(&predictions, &Labels::numbered(3)).is_err());
        Ok(())
    }
}
