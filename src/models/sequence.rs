//! Sequence classifiers of every architecture, chosen by a checkpoint's configuration.

use std::path::Path;
use std::sync::Arc;

use candle_nn::VarBuilder;
use serde_json::{json, Value};

use super::deberta::DebertaConfig;
use super::decoder::DecoderConfig;
use super::distilbert::DistilBertConfig;
use super::hub::ModelFiles;
use super::modernbert::ModernBertConfig;
use super::roberta::RobertaConfig;
use super::sequence_classifier::ClassifierConfig;
pub use super::sequence_classifier::SequenceClassifier;
use super::weights::Weights;
use crate::error::{Error, Result};
use crate::labels::Labels;
use crate::noise::Noise;
use crate::util::json;

/// The layers whose weight has one row per output ([`SequenceConfig::output_tensors`]): of RoBERTa and
/// ELECTRA, of the other encoders, of decoders.
#[cfg(feature = "train")]
pub(crate) const OUTPUT_LAYERS: [&str; 3] = ["classifier.out_proj", "classifier", "score"];

/// The last layer of a sequence classifier's head, by the names of its weights.
///
/// # Errors
/// If `params` has none of [`OUTPUT_LAYERS`].
#[cfg(feature = "train")]
pub(crate) fn output_layer(params: &crate::adapter::Params) -> Result<&'static str> {
    let held = |path: &&str| params.get(&format!("{path}.weight")).is_some();
    OUTPUT_LAYERS.into_iter().find(held).ok_or_else(|| {
        let reason =
            format!("the store has none: expected the weight of one of {}", OUTPUT_LAYERS.join(", "));
        Error::config("head", reason)
    })
}

/// An architecture of encoders.
struct Encoder {
    model_type: &'static str,
    /// The name of its class in transformers, without `ForSequenceClassification`.
    class: &'static str,
    read: Read,
}

/// Reads a `config.json` for a number of outputs.
type Read = fn(&[u8], &Path, usize) -> Result<Arc<dyn ClassifierConfig>>;

const ENCODERS: [Encoder; 8] = [
    Encoder { model_type: "roberta", class: "Roberta", read: roberta },
    Encoder { model_type: "bert", class: "Bert", read: roberta },
    Encoder { model_type: "xlm-roberta", class: "XLMRoberta", read: roberta },
    Encoder { model_type: "camembert", class: "Camembert", read: roberta },
    Encoder { model_type: "electra", class: "Electra", read: roberta },
    Encoder {
        model_type: "distilbert",
        class: "DistilBert",
        read: |text, path, labels| Ok(Arc::new(DistilBertConfig::parse(text, path)?.with_num_labels(labels))),
    },
    Encoder {
        model_type: "deberta-v2",
        class: "DebertaV2",
        read: |text, path, labels| Ok(Arc::new(DebertaConfig::parse(text, path)?.with_num_labels(labels))),
    },
    Encoder {
        model_type: "modernbert",
        class: "ModernBert",
        read: |text, path, labels| Ok(Arc::new(ModernBertConfig::parse(text, path)?.with_num_labels(labels))),
    },
];

fn roberta(text: &[u8], path: &Path, labels: usize) -> Result<Arc<dyn ClassifierConfig>> {
    Ok(Arc::new(RobertaConfig::parse(text, path)?.with_num_labels(labels)))
}

/// The configuration of a classifier of any architecture, selected by the file's `model_type`.
#[derive(Debug, Clone)]
pub struct SequenceConfig {
    config: Arc<dyn ClassifierConfig>,
    /// The name of its class in transformers.
    class: String,
    is_decoder: bool,
    json: Value,
    labels: Labels,
}

impl SequenceConfig {
    /// Reads a `config.json`, for `num_labels` outputs (1: a regression). The outputs are named as in the
    /// file if it has as many names.
    ///
    /// # Errors
    /// If the file cannot be read, is not JSON (the error names the line), is of another architecture, or
    /// requires an unsupported option.
    pub fn from_file(path: &Path, num_labels: usize) -> Result<Self> {
        Self::parse(json::read_config(path)?.as_bytes(), path, num_labels)
    }

    /// Like [`Self::from_file`], from a model's files: its `config.json`, or the metadata of its GGUF file.
    ///
    /// # Errors
    /// As [`Self::from_file`].
    pub fn from_files(files: &ModelFiles, num_labels: usize) -> Result<Self> {
        match files.gguf() {
            Some(gguf) => Self::parse(gguf.config()?.to_string().as_bytes(), gguf.path(), num_labels),
            None => Self::from_file(files.config_path(), num_labels),
        }
    }

    /// Like [`Self::from_file`], from a `config.json` that was read already.
    ///
    /// # Errors
    /// As [`Self::from_file`].
    pub fn from_value(json: &Value, num_labels: usize) -> Result<Self> {
        Self::parse(json.to_string().as_bytes(), Path::new("config.json"), num_labels)
    }

    /// Like [`Self::from_file`], from the file's bytes; `path` is only used in errors.
    pub(crate) fn parse(text: &[u8], path: &Path, num_labels: usize) -> Result<Self> {
        let json: Value = json::parse(text, path)?;
        let model_type = json.get("model_type").and_then(Value::as_str);
        let encoder = ENCODERS.iter().find(|encoder| Some(encoder.model_type) == model_type);
        let is_decoder = DecoderConfig::model_types().any(|known| Some(known) == model_type);
        let (config, class): (Arc<dyn ClassifierConfig>, _) = if let Some(encoder) = encoder {
            let class = format!("{}ForSequenceClassification", encoder.class);
            ((encoder.read)(text, path, num_labels)?, class)
        } else if is_decoder {
            let config = DecoderConfig::parse(text, path)?.with_num_labels(num_labels);
            let class = config.class_name("ForSequenceClassification");
            (Arc::new(config), class)
        } else {
            let encoders = ENCODERS.iter().map(|encoder| encoder.model_type);
            let known: Vec<_> = encoders.chain(DecoderConfig::model_types()).collect();
            let (known, got) = (known.join(", "), model_type.unwrap_or("none"));
            return Err(Error::format(path, format!("model_type: expected one of {known}, got {got}")));
        };
        let named = Labels::of_config(&json).ok().flatten().filter(|named| named.len() == num_labels);
        let labels = named.unwrap_or_else(|| Labels::numbered(num_labels));
        Ok(Self { config, class, is_decoder, json, labels })
    }

    /// The names of the outputs.
    pub fn labels(&self) -> &Labels {
        &self.labels
    }

    /// The same configuration with other names of the outputs.
    ///
    /// # Errors
    /// If the number of names is not the number of outputs.
    pub fn with_labels(self, labels: Labels) -> Result<Self> {
        if labels.len() != self.labels.len() {
            let reason = format!("{} names for {} outputs", labels.len(), self.labels.len());
            return Err(Error::config("labels", reason));
        }
        Ok(Self { labels, ..self })
    }

    /// The names of outputs in the file, whatever their number.
    ///
    /// # Errors
    /// As [`Labels::of_config`].
    pub fn named(&self) -> Result<Option<Labels>> {
        Labels::of_config(&self.json)
    }

    /// Describes the task of the file's head if it is not supported: multi-label classification, or a
    /// regression with several scores.
    pub fn foreign_problem(&self) -> Option<&'static str> {
        match self.json.get("problem_type").and_then(Value::as_str) {
            Some("multi_label_classification") => {
                Some("several classes at once (multi_label_classification)")
            }
            Some("regression") if self.labels.len() > 1 => Some("several scores at once (regression)"),
            _ => None,
        }
    }

    /// Whether the model is a decoder, whose head reads the last token.
    pub fn is_decoder(&self) -> bool {
        self.is_decoder
    }

    /// The tensors of the head that have one row per output.
    pub fn output_tensors(&self) -> &'static [&'static str] {
        self.config.output_tensors()
    }

    /// The number of token ids.
    pub fn vocab_size(&self) -> usize {
        self.config.vocab_size()
    }

    /// The most tokens that the model takes: of DeBERTa, whose positions are relative, any number.
    pub fn longest(&self) -> usize {
        self.config.longest()
    }

    /// The longest sequence that the model was trained on, in tokens.
    pub fn max_length(&self) -> usize {
        self.config.max_length()
    }

    /// The prefix of the tensor names of the model's body, with its dot.
    pub fn prefix(&self) -> String {
        format!("{}.", self.config.prefix())
    }

    /// Loads the model from `vb` and its task head from `head`.
    ///
    /// # Errors
    /// If a tensor is missing or of another shape.
    pub fn load<'a>(
        &self,
        vb: impl Into<Weights<'a>>,
        head: VarBuilder,
        noise: Noise,
    ) -> Result<Box<dyn SequenceClassifier>> {
        self.config.load(vb.into(), head, noise)
    }

    /// The `config.json` that Hugging Face writes for this classifier in single precision: the source's own,
    /// with the head's architecture and labels.
    ///
    /// Difference: a decoder's head reads the last token that the attention mask shows, while transformers
    /// reads the last token that is not `pad_token_id`. If the source names no padding token, `pad_token_id`
    /// is written as the EOS token, which batches are then usually padded with. Without an EOS token it is
    /// null, for which transformers accepts only one row at a time; an ordinary id would hide that token.
    /// Both implementations then read the same token, with two exceptions. If a text itself ends in the
    /// padding token (a tokenizer appends EOS and EOS is the padding), transformers reads the token before
    /// it. If a tokenizer pads with yet another token, `pad_token_id` must be set to that token.
    pub fn to_json(&self) -> Value {
        let mut json = self.json.clone();
        json["architectures"] = json!([self.class]);
        json["id2label"] = self.labels.id2label();
        json["label2id"] = self.labels.label2id();
        json["pad_token_id"] = json!(self.config.saved_pad_id());
        // Without it, transformers' pipelines interpret the scores of a regression as those of classes.
        let kind = if self.labels.len() == 1 { "regression" } else { "single_label_classification" };
        json["problem_type"] = json!(kind);
        for dtype in ["torch_dtype", "dtype"] {
            if let Some(named) = json.get_mut(dtype) {
                *named = json!("float32");
            }
        }
        json
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> std::result::Result<SequenceConfig, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(&path, text).unwrap();
        SequenceConfig::from_file(&path, 2).map_err(|error| error.to_string())
    }

    #[test]
    fn what_is_no_known_configuration_is_named_with_what_is_known() {
        for (text, found) in [
            ("{\"model_type\": \"gpt2\"}", "got gpt2"),
            ("{\"hidden_size\": 3}", "got none"),
            ("[]", "got none"),
        ] {
            let error = read(text).unwrap_err();
            let expected =
                "model_type: expected one of roberta, bert, xlm-roberta, camembert, electra, distilbert, \
                            deberta-v2, modernbert, llama, qwen2";
            assert!(error.contains(expected) && error.ends_with(found), "{error}");
        }
        let error = read("{\n\"model_type\": \"bert\",\n}").unwrap_err();
        assert!(error.contains("config.json, line 3: malformed"), "{error}");
        for kind in ["bert", "llama"] {
            let error = read(&format!("{{\"model_type\": \"{kind}\"}}")).unwrap_err();
            assert!(error.contains("config.json") && error.contains("missing field"), "{error}");
        }
    }

    #[test]
    fn the_padding_that_is_written_is_none_that_a_text_holds() {
        let written = |pad: Value, eos: Value| {
            let json = json!({
                "model_type": "llama", "vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 1,
                "num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 40,
                "rms_norm_eps": 1e-5, "pad_token_id": pad, "eos_token_id": eos,
            });
            let config = read(&json.to_string()).unwrap();
            assert_eq!(config.vocab_size(), 50);
            config.to_json()["pad_token_id"].clone()
        };
        assert_eq!(written(json!(4), json!(2)), json!(4));
        assert_eq!(written(json!(-1), json!(2)), json!(2));
        assert_eq!(written(Value::Null, json!([7, 8])), json!(7));
        assert_eq!(written(Value::Null, Value::Null), Value::Null);
    }
}
