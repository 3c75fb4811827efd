//! What every model that classifies a whole sequence offers, and which of them a checkpoint is.

use std::fmt::Debug;
use std::path::Path;

use candle_core::Tensor;
use candle_nn::VarBuilder;
use serde_json::{json, Map, Value};

use super::llama::{LlamaConfig, LlamaForSequenceClassification};
use super::roberta::{RobertaConfig, RobertaForSequenceClassification};
use crate::error::{Error, Result};
use crate::noise::Noise;
use crate::slot::{Linears, Pass};

/// A model with a head that classifies or scores a whole sequence.
pub trait SequenceClassifier: Linears + Debug {
    /// The logits, or the scores of a regression.
    ///
    /// # Shapes
    /// - `input_ids`, `token_type_ids`: `(b, t)` of u32; token types are left aside by models
    ///   that have none
    /// - `attention_mask`: `(b, t)` of u8, 1 on real tokens
    /// - output: `(b, num_labels)`, the head's dtype
    ///
    /// # Errors
    /// If shapes differ, or the sequence is longer than the model's.
    fn logits(
        &self,
        input_ids: &Tensor,
        token_type_ids: &Tensor,
        attention_mask: &Tensor,
        pass: &Pass,
    ) -> candle_core::Result<Tensor>;

    /// The number of outputs.
    fn num_labels(&self) -> usize;

    /// The id that fills a batch.
    fn pad_id(&self) -> u32;
}

impl SequenceClassifier for RobertaForSequenceClassification {
    fn logits(
        &self,
        input_ids: &Tensor,
        token_type_ids: &Tensor,
        attention_mask: &Tensor,
        pass: &Pass,
    ) -> candle_core::Result<Tensor> {
        // RoBERTa has one token type; its tokenizers number pairs all the same.
        let types = (self.config().type_vocab_size > 1).then_some(token_type_ids);
        self.forward(input_ids, types, attention_mask, pass)
    }

    fn num_labels(&self) -> usize {
        self.config().num_labels()
    }

    fn pad_id(&self) -> u32 {
        self.config().pad_id()
    }
}

impl SequenceClassifier for LlamaForSequenceClassification {
    fn logits(
        &self,
        input_ids: &Tensor,
        _token_type_ids: &Tensor,
        attention_mask: &Tensor,
        pass: &Pass,
    ) -> candle_core::Result<Tensor> {
        self.forward(input_ids, attention_mask, pass)
    }

    fn num_labels(&self) -> usize {
        self.config().num_labels
    }

    fn pad_id(&self) -> u32 {
        self.config().pad_id()
    }
}

/// The configuration of a classifier of either architecture, by the `model_type` of its file.
#[derive(Debug, Clone)]
pub struct SequenceConfig {
    architecture: Architecture,
    json: Value,
}

#[derive(Debug, Clone)]
enum Architecture {
    Roberta(RobertaConfig),
    Llama(LlamaConfig),
}

impl SequenceConfig {
    /// Reads a `config.json`, for `num_labels` outputs (1: a regression).
    ///
    /// # Errors
    /// If the file cannot be read, is of another architecture, or asks for what is not supported.
    pub fn from_file(path: &Path, num_labels: usize) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
        let json: Value = serde_json::from_str(&text)
            .map_err(|e| Error::format_at(path, e.line(), format!("malformed: {e}")))?;
        let architecture = match json.get("model_type").and_then(Value::as_str) {
            Some("llama") => Architecture::Llama(LlamaConfig::from_file(path)?.with_num_labels(num_labels)),
            _ => Architecture::Roberta(RobertaConfig::from_file(path)?.with_num_labels(num_labels)),
        };
        Ok(Self { architecture, json })
    }

    /// The longest sequence, in tokens.
    pub fn max_length(&self) -> usize {
        match &self.architecture {
            Architecture::Roberta(config) => config.max_length(),
            Architecture::Llama(config) => config.decoder.max_position_embeddings,
        }
    }

    /// The prefix, with its dot, of the names of the model's body.
    pub fn prefix(&self) -> String {
        match &self.architecture {
            Architecture::Roberta(config) => format!("{}.", config.model_type.prefix()),
            Architecture::Llama(_) => "model.".to_string(),
        }
    }

    /// Fetches the model from `vb` and its task head from `head`.
    ///
    /// # Errors
    /// If a tensor is missing or of another shape.
    pub fn load(
        &self,
        vb: VarBuilder,
        head: VarBuilder,
        noise: Noise,
    ) -> Result<Box<dyn SequenceClassifier>> {
        Ok(match &self.architecture {
            Architecture::Roberta(config) => {
                Box::new(RobertaForSequenceClassification::load(vb, head, config, noise)?)
            }
            Architecture::Llama(config) => {
                Box::new(LlamaForSequenceClassification::load(vb, head, config, noise)?)
            }
        })
    }

    /// The file as Hugging Face writes it for this classifier in single precision: the source's
    /// own, with the head's architecture and labels.
    pub fn to_json(&self) -> Value {
        let (family, labels, pad) = match &self.architecture {
            Architecture::Llama(config) => ("Llama", config.num_labels, config.pad_id()),
            Architecture::Roberta(config) => {
                let family = match self.json.get("model_type").and_then(Value::as_str) {
                    Some("bert") => "Bert",
                    Some("xlm-roberta") => "XLMRoberta",
                    Some("camembert") => "Camembert",
                    _ => "Roberta",
                };
                (family, config.num_labels(), config.pad_id())
            }
        };
        let names: Vec<String> = (0..labels).map(|i| format!("LABEL_{i}")).collect();
        let named = |(i, name): (usize, &String)| (i.to_string(), json!(name));
        let numbered = |(i, name): (usize, &String)| (name.clone(), json!(i));
        let mut json = self.json.clone();
        json["architectures"] = json!([format!("{family}ForSequenceClassification")]);
        json["id2label"] = Value::Object(names.iter().enumerate().map(named).collect::<Map<_, _>>());
        json["label2id"] = Value::Object(names.iter().enumerate().map(numbered).collect::<Map<_, _>>());
        json["pad_token_id"] = json!(pad);
        for dtype in ["torch_dtype", "dtype"] {
            if let Some(named) = json.get_mut(dtype) {
                *named = json!("float32");
            }
        }
        json
    }
}
