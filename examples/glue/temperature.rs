//! A temperature that is fitted on training rows which are held out for it.

use monteclora::bayes::{Temperature, TEMPERATURE_BOUNDS};
use monteclora::data::encode::Encoded;
use monteclora::data::split::{at, hold_out, strata};
use monteclora::data::task::Label;
use monteclora::predict::logits;
use monteclora::train::{self, Classifier};
use monteclora::{Noise, Pass};

use crate::common::output::tell_err;
use crate::common::Outcome;

/// Splits rows into those to train on and a share of the labelled ones, stratified by class.
pub fn split(rows: Vec<Encoded>, share: f64, noise: Noise) -> Outcome<(Vec<Encoded>, Vec<Encoded>)> {
    if share == 0.0 {
        return Ok((rows, Vec::new())); // without a copy
    }
    let labelled: Vec<usize> = (0..rows.len()).filter(|row| rows[*row].label != Label::Unknown).collect();
    let (_, held) = hold_out(&at(&strata(&rows), &labelled), share, noise)
        .map_err(|why| format!("--temperature-share: {why}"))?;
    let held = at(&labelled, &held);
    let stay: Vec<usize> = (0..rows.len()).filter(|row| held.binary_search(row).is_err()).collect();
    Ok((at(&rows, &stay), at(&rows, &held)))
}

/// Fits a temperature on rows that were not trained on, and divides the head by it.
pub fn fit(classifier: &Classifier, rows: &[Encoded]) -> Outcome<Temperature> {
    let batches = train::batches(classifier, rows, classifier.eval_batch_size())?;
    let fitted = Temperature::fit(&logits(classifier, &batches, &Pass::Mean.into())?, &strata(rows))?;
    let count = rows.len();
    if fitted.value() == TEMPERATURE_BOUNDS.0 {
        // The likelihood of rows that are all right has no maximum: it would make the model certain.
        tell_err!("--temperature-share: the {count} held-out rows are all right: the head stays as it is");
        return Ok(Temperature::new(1.0)?);
    }
    fitted.scale_head(&classifier.params)?;
    tell_err!("temperature {:.3}, from {count} rows that were not trained on", fitted.value());
    Ok(fitted)
}
