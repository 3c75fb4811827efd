//! The model in memory, and what it says of texts. It knows nothing of HTTP.

use candle_core::{DType, Device};
use monteclora::bayes::{entropy, uncertainty};
use monteclora::data::encode::{check_vocabulary, TextEncoder};
use monteclora::data::task::{Example, Label};
use monteclora::data::tokenizer;
use monteclora::inject::Targets;
use monteclora::labels::Labels;
use monteclora::metrics::softmax;
use monteclora::models::hub::ModelFiles;
use monteclora::models::sequence::SequenceConfig;
use monteclora::peft::AdapterFile;
use monteclora::predict::{logits, posterior_draws};
use monteclora::train::{batches, Classifier, Method, MethodInit};
use monteclora::{Error, Noise, Pass, Result};
use serde::Serialize;

use crate::Args;

/// Rows of one forward pass.
const BATCH: usize = 32;

/// A classifier and its tokenizer: a shared reference is all that a request needs.
pub struct Service {
    classifier: Classifier,
    encoder: TextEncoder,
}

/// What is said of one text.
#[derive(Debug, Serialize)]
pub struct Answer {
    label: String,
    /// In the order of the labels.
    probabilities: Vec<f64>,
    /// How unsure it is, in nats.
    entropy: f64,
    /// What of it is the posterior's, in nats: how much the draws disagree. With draws alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    mutual_information: Option<f64>,
}

impl Service {
    /// Loads what the options say.
    ///
    /// # Errors
    /// If the files cannot be had, or do not fit each other or the labels.
    pub fn load(args: &Args) -> Result<Self> {
        let files = ModelFiles::locate(&args.model, None)?;
        let start = match &args.adapter {
            Some(dir) => MethodInit::Adapter(Box::new(AdapterFile::read(dir)?)),
            None => MethodInit::Fresh(Method::Full, Targets::default()),
        };
        // Draws are addressed by the seed: the same request has the same answer for ever.
        let (labels, noise) = (Labels::new(args.labels.iter().cloned())?, Noise::new(1));
        let config = SequenceConfig::from_file(files.config_path(), labels.len())?;
        let classifier = Classifier::load(&files, labels, &start, noise, DType::F32, &Device::Cpu)?;
        let path =
            files.tokenizer_path().ok_or_else(|| Error::config("model", "it has no tokenizer.json"))?;
        let tokenizer = tokenizer::read(path)?;
        check_vocabulary(&tokenizer, config.vocab_size())?;
        let encoder = TextEncoder::new(tokenizer, args.max_length, config.max_length())?;
        Ok(Self { classifier, encoder })
    }

    /// One answer a text, by the mean or, where `draws` are given, by their average.
    ///
    /// # Errors
    /// If there is no text, or the tokenizer makes nothing of one.
    pub fn answer(&self, texts: Vec<String>, draws: usize) -> Result<Vec<Answer>> {
        let rows =
            texts.into_iter().map(|text| Example { text_a: text, text_b: None, label: Label::Class(0) });
        let rows = self.encoder.encode(&rows.collect::<Vec<_>>())?;
        let batches = batches(&self.classifier, &rows, BATCH)?;
        if draws == 0 {
            let outputs = logits(&self.classifier, &batches, &Pass::Mean.into())?;
            return Ok(outputs.iter().map(|row| self.said(softmax(row), None)).collect());
        }
        let draws = posterior_draws(&self.classifier, &batches, draws)?;
        let count = draws.len() as f64;
        let mean = |row: usize| -> Vec<f64> {
            (0..self.classifier.labels.len())
                .map(|class| draws.iter().map(|draw| draw[row][class]).sum::<f64>() / count)
                .collect()
        };
        let unsure = uncertainty(&draws)?.into_iter().enumerate();
        Ok(unsure.map(|(row, of)| self.said(mean(row), Some(of.epistemic))).collect())
    }

    fn said(&self, probabilities: Vec<f64>, mutual_information: Option<f64>) -> Answer {
        let best =
            (1..probabilities.len())
                .fold(0, |best, i| if probabilities[i] > probabilities[best] { i } else { best });
        Answer {
            label: self.classifier.labels.names()[best].clone(),
            entropy: entropy(&probabilities),
            probabilities,
            mutual_information,
        }
    }
}
