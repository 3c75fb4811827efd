//! LoRA adapters in GGUF, as loaded by llama.cpp (`--lora FILE`) and Ollama (`ADAPTER FILE`).

use std::path::Path;

use candle_core::quantized::GgmlDType;
use candle_core::{Device, Tensor};
use serde_json::Value as Json;

use super::metadata::Described;
use super::rows;
use super::value::Value;
use super::write::{write, Entry};
use crate::error::{Error, Result};
use crate::peft::AdapterFile;

/// Writes a LoRA adapter, or the mean of a MonteCLoRA adapter, as the GGUF file `path`. `config` is the
/// `config.json` of the base model.
///
/// llama.cpp scales by alpha divided by the rank of A, so the scale of rsLoRA and per-layer alphas are folded
/// into B. The rows of B are permuted like the rows of the base weight.
///
/// # Errors
/// If the adapter has a task head, GGUF does not support the architecture of its base, it adapts a layer that
/// llama.cpp lacks (the head of a model with tied embeddings), or the file cannot be written.
pub fn write_adapter(adapter: &AdapterFile, config: &Json, path: &Path) -> Result<()> {
    let (metadata, entries) = plan(adapter, config)?;
    write(path, &metadata, &entries)
}

/// Checks before training that [`write_adapter`] will accept the adapter.
///
/// # Errors
/// As [`write_adapter`], except for a file that cannot be written.
pub fn check_adapter(adapter: &AdapterFile, config: &Json) -> Result<()> {
    plan(adapter, config).map(drop)
}

type Metadata = Vec<(String, Value)>;

/// The metadata and tensors that [`write_adapter`] writes.
fn plan(adapter: &AdapterFile, config: &Json) -> Result<(Metadata, Vec<Entry<'static>>)> {
    adapter.check()?;
    if let Some(name) = adapter.saved_modules.keys().next() {
        let reason = format!("llama.cpp only loads A and B, and this adapter also has a task head ({name})");
        return Err(Error::config("gguf", reason));
    }
    let base = Described::of(config)?;
    let alpha = adapter.config.lora_alpha;
    let paths: Vec<&str> = adapter.layers.keys().map(String::as_str).collect();
    let mut entries = Vec::with_capacity(2 * paths.len());
    for ((layer, tensors), scale) in adapter.layers.iter().zip(adapter.config.scales_of(&paths)?) {
        let name = place(&base, layer)?;
        let rank = tensors.a.dim(0)?;
        let mut b = (&tensors.b * (scale / (alpha / rank as f64)))?;
        if let Some(queries) = base.architecture.interleaved_queries(layer) {
            let (rows, heads) = (b.dim(0)?, if queries { base.heads.0 } else { base.heads.1 });
            if !rows::fits(rows, heads) {
                let reason = format!("{heads} heads of the base do not divide the {rows} rows of B");
                return Err(Error::tensor(format!("{layer}.lora_B"), reason));
            }
            let order = Tensor::new(rows::interleaved(rows, heads), &Device::Cpu)?;
            b = b.index_select(&order, 0)?;
        }
        for (end, tensor) in [("lora_a", tensors.a.clone()), ("lora_b", b)] {
            let (name, shape) = (format!("{name}.{end}"), tensor.dims().to_vec());
            let make = Box::new(move || Ok(tensor.clone()));
            entries.push(Entry { name, shape, kind: GgmlDType::F32, make });
        }
    }
    let metadata = [
        ("general.architecture", Value::from(base.architecture.name)),
        ("general.type", "adapter".into()),
        ("adapter.type", "lora".into()),
        ("adapter.lora.alpha", (alpha as f32).into()),
        ("general.file_type", 0u32.into()),
    ];
    Ok((metadata.into_iter().map(|(key, value)| (key.to_string(), value)).collect(), entries))
}

/// GGUF's name of a layer's weight.
fn place(base: &Described, layer: &str) -> Result<String> {
    if layer == "lm_head" && base.tied {
        let reason = "lm_head shares the embedding's weight, and llama.cpp has no such layer: \
                      leave lm_head out of the targets";
        return Err(Error::config("gguf", reason));
    }
    let name = base.architecture.to_gguf(&format!("{layer}.weight"));
    name.ok_or_else(|| {
        Error::config("gguf", format!("llama.cpp has no layer {layer} in {}", base.architecture.name))
    })
}
