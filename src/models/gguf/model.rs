//! Writing a whole model as a GGUF file.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::quantized::GgmlDType;
use candle_core::{Device, Tensor};
use serde_json::Value as Json;

use super::kind::GgufKind;
use super::metadata::Described;
use super::rows;
use super::tokenizer::tokenizer_metadata;
use super::value::Value;
use super::write::{write, Entry};
use crate::error::{Error, Result};
use crate::util::json::token_text;

/// The files in a model's folder that define its tokenizer and chat template.
#[derive(Debug, Clone, Default)]
pub struct Texts {
    /// `tokenizer.json`.
    pub tokenizer: Option<Json>,
    /// `tokenizer_config.json`.
    pub settings: Option<Json>,
    /// The chat template, from whichever file has it.
    pub template: Option<String>,
}

/// A tensor that is computed when it is written.
pub(in crate::models) struct Named<'a> {
    /// Hugging Face's name.
    pub name: String,
    /// Slowest axis first.
    pub shape: Vec<usize>,
    pub make: Box<dyn Fn() -> Result<Tensor> + 'a>,
}

/// Writes the model with this `config.json`, texts and tensors as the GGUF file `path`, completely or not at
/// all. Only one tensor is in memory at a time.
///
/// # Errors
/// If GGUF cannot express the architecture, a tensor or the tokenizer, llama.cpp would compute something else
/// than the configuration says, a tensor cannot be made, or the file cannot be written.
pub(in crate::models) fn write_model(
    path: &Path,
    config: &Json,
    texts: &Texts,
    kind: GgufKind,
    tensors: Vec<Named>,
) -> Result<()> {
    let (metadata, entries) = plan_model(config, texts, kind, tensors)?;
    write(path, &metadata, &entries)
}

type Metadata = Vec<(String, Value)>;

/// Checks that [`write_model`] will accept the model. Tensors are not made, and nothing is written.
pub(in crate::models) fn check_model(config: &Json, texts: &Texts, tensors: Vec<Named>) -> Result<()> {
    plan_model(config, texts, GgufKind::F16, tensors).map(drop)
}

/// The metadata and tensors that [`write_model`] writes.
fn plan_model<'a>(
    config: &Json,
    texts: &Texts,
    kind: GgufKind,
    tensors: Vec<Named<'a>>,
) -> Result<(Metadata, Vec<Entry<'a>>)> {
    let model = Described::of(config)?;
    let mut metadata: BTreeMap<String, Value> = model.metadata.iter().cloned().collect();
    metadata.insert("general.file_type".into(), kind.number().into());
    metadata.insert("general.quantization_version".into(), 2u32.into());
    let vocab_size = tensors.iter().find(|tensor| tensor.name == "model.embed_tokens.weight");
    let vocab_size = vocab_size.and_then(|tensor| tensor.shape.first()).copied().unwrap_or(0);
    describe_texts(config, texts, vocab_size, &mut metadata)?;
    let mut entries = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        // Skip buffers of old checkpoints, and a head that repeats the embedding.
        let is_buffer = tensor.name.ends_with("rotary_emb.inv_freq");
        if is_buffer || model.tied && tensor.name == "lm_head.weight" {
            continue;
        }
        let Some(name) = model.architecture.to_gguf(&tensor.name) else {
            let reason = format!("llama.cpp has no such tensor in {}", model.architecture.name);
            return Err(Error::tensor(&tensor.name, reason));
        };
        let is_head = name == "output.weight" || model.tied && name == "token_embd.weight";
        let kind =
            if name.ends_with("_norm.weight") { GgmlDType::F32 } else { kind.of(&tensor.shape, is_head) };
        let shape = tensor.shape.clone();
        entries.push(Entry { name, shape, kind, make: converted(&model, tensor)? });
    }
    for (name, factors) in model.factors {
        let (name, shape) = (name.to_string(), vec![factors.len()]);
        let make = move || Ok(Tensor::new(factors.as_slice(), &Device::Cpu)?);
        entries.push(Entry { name, shape, kind: GgmlDType::F32, make: Box::new(make) });
    }
    Ok((metadata.into_iter().collect(), entries))
}

type Make<'a> = Box<dyn Fn() -> Result<Tensor> + 'a>;

/// Returns a function that makes the tensor with the changes of llama.cpp's converter.
fn converted<'a>(model: &Described, tensor: Named<'a>) -> Result<Make<'a>> {
    let Named { name, shape, make } = tensor;
    if let Some(queries) = model.architecture.interleaved_queries(&name) {
        let (rows, heads) =
            (shape.first().copied().unwrap_or(0), if queries { model.heads.0 } else { model.heads.1 });
        if !rows::fits(rows, heads) {
            return Err(Error::tensor(name, format!("{heads} heads do not divide its {rows} rows")));
        }
        return Ok(Box::new(move || {
            let order = Tensor::new(rows::interleaved(rows, heads), &Device::Cpu)?;
            Ok(make()?.index_select(&order, 0)?)
        }));
    }
    let added = model.architecture.added(&name);
    Ok(match added {
        0.0 => make,
        _ => Box::new(move || Ok((make()?.to_dtype(candle_core::DType::F32)? + added)?)),
    })
}

/// Adds the tokenizer, special tokens and chat template to `metadata`.
fn describe_texts(
    config: &Json,
    texts: &Texts,
    vocab_size: usize,
    metadata: &mut BTreeMap<String, Value>,
) -> Result<()> {
    match &texts.tokenizer {
        Some(tokenizer) => metadata.extend(tokenizer_metadata(tokenizer, vocab_size)?),
        None => {
            tracing::warn!(
                "there is no tokenizer.json: llama.cpp will load the file, but only accept token ids"
            );
            metadata.insert("tokenizer.ggml.model".into(), "none".into());
        }
    }
    let settings = texts.settings.as_ref().unwrap_or(&Json::Null);
    let id_of = |piece: &str| match metadata.get("tokenizer.ggml.tokens") {
        Some(Value::Texts(pieces)) => pieces.iter().position(|one| one == piece).map(|id| id as u64),
        _ => None,
    };
    let mut ids = Vec::new();
    for (name, key) in
        [("bos", "bos_token"), ("eos", "eos_token"), ("padding", "pad_token"), ("unknown", "unk_token")]
    {
        let named = token_text(&settings[key]).and_then(id_of);
        let listed = &config[format!("{key}_id")];
        let listed = listed.as_u64().or(listed[0].as_u64());
        ids.extend(named.or(listed).map(|id| (format!("tokenizer.ggml.{name}_token_id"), id)));
    }
    for (key, id) in ids {
        if id < vocab_size as u64 {
            metadata.entry(key).or_insert(Value::U32(id as u32));
        }
    }
    for key in ["add_bos_token", "add_eos_token"] {
        if let Some(set) = settings[key].as_bool() {
            metadata.insert(format!("tokenizer.ggml.{key}"), set.into());
        }
    }
    if let Some(template) = texts.template.as_deref() {
        metadata.insert("tokenizer.chat_template".into(), template.into());
    }
    Ok(())
}
