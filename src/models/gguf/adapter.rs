//! LoRA in GGUF, as llama.cpp (`--lora FILE`) and Ollama (`ADAPTER FILE`) load it.

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

/// Writes an adapter, LoRA or the mean of MonteCLoRA, as the GGUF file `path`, for the base of this `config.json`.
///
/// llama.cpp multiplies by alpha over the rank that it finds: rsLoRA's scale and alphas of single layers go into B. Rows
/// of B lie as the base's rows do.
///
/// # Errors
/// If the adapter has a task head, its base is of no architecture that GGUF is written of, it adapts a layer that
/// llama.cpp has not (the head of a model whose head is its embedding), or the file cannot be written.
pub fn write_adapter(adapter: &AdapterFile, config: &Json, path: &Path) -> Result<()> {
    let (metadata, entries) = plan(adapter, config)?;
    write(path, &metadata, &entries)
}

/// Checks, before anything is trained, what [`write_adapter`] would refuse afterwards.
///
/// # Errors
/// As [`write_adapter`], but for a file that cannot be written.
pub fn check_adapter(adapter: &AdapterFile, config: &Json) -> Result<()> {
    plan(adapter, config).map(drop)
}

type Metadata = Vec<(String, Value)>;

/// What is written.
fn plan(adapter: &AdapterFile, config: &Json) -> Result<(Metadata, Vec<Entry<'static>>)> {
    adapter.check()?;
    if let Some(name) = adapter.saved_modules.keys().next() {
        let reason = format!("llama.cpp loads A and B alone, and this adapter has a task head too ({name})");
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

/// GGUF's name of the weight of a layer.
fn place(base: &Described, layer: &str) -> Result<String> {
    if layer == "lm_head" && base.tied {
        let reason = "the base's head is its embedding, and llama.cpp has no such layer: leave lm_head out of the targets";
        return Err(Error::config("gguf", reason));
    }
    let name = base.architecture.to_gguf(&format!("{layer}.weight"));
    name.ok_or_else(|| {
        Error::config("gguf", format!("llama.cpp has no layer {layer} in {}", base.architecture.name))
    })
}
