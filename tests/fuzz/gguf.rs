//! Fuzzes the reader of GGUF models: header, configuration, tokenizer and tensors.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use monteclora::models::gguf::GgufKind;
use monteclora::models::hub::ModelFiles;
use monteclora::models::save::save_gguf;
use monteclora::Result;
use serde_json::{json, Value};

use super::mutate::{self, Rng};
use super::reader::{Folder, Input, Reader};

const FILE: &str = "model.gguf";

/// A BPE tokenizer that is written to GGUF as SentencePiece's (with byte fallback) or as a byte-level one.
fn tokenizer(sentence_piece: bool) -> Value {
    let vocabulary = json!({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "ab": 5, "aba": 6, "<0x41>": 7});
    let added = |id: u32, content: &str| json!({"id": id, "content": content, "special": true});
    json!({
        "version": "1.0", "added_tokens": [added(1, "<s>"), added(2, "</s>")],
        "normalizer": {"type": "Prepend", "prepend": "\u{2581}"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": sentence_piece, "vocab": vocabulary,
            "merges": [["a", "b"], ["ab", "a"]]},
    })
}

/// Returns the file of a model of one block, whose matrices are stored as `kind`.
fn seed(model_type: &str, sentence_piece: bool, kind: GgufKind) -> Vec<u8> {
    let config = json!({
        "model_type": model_type, "vocab_size": 8, "hidden_size": 32, "intermediate_size": 32, "head_dim": 16,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32, "tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": 2,
        "rope_scaling": (model_type == "llama").then(|| json!({"rope_type": "llama3", "factor": 8.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192})),
    });
    let block = |name: &str| format!("model.layers.0.{name}.weight");
    let shapes = [
        ("model.embed_tokens.weight".to_string(), vec![8, 32]),
        ("model.norm.weight".to_string(), vec![32]),
        (block("input_layernorm"), vec![32]),
        (block("post_attention_layernorm"), vec![32]),
        (block("self_attn.q_proj"), vec![32, 32]),
        (block("self_attn.k_proj"), vec![16, 32]),
        (block("self_attn.v_proj"), vec![16, 32]),
        (block("self_attn.o_proj"), vec![32, 32]),
        (block("mlp.gate_proj"), vec![32, 32]),
        (block("mlp.up_proj"), vec![32, 32]),
        (block("mlp.down_proj"), vec![32, 32]),
    ];
    let ones = |shape| Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap();
    let tensors: HashMap<String, Tensor> =
        shapes.into_iter().map(|(name, shape)| (name, ones(shape))).collect();
    let dir = tempfile::tempdir().unwrap();
    candle_core::safetensors::save(&tensors, dir.path().join("model.safetensors")).unwrap();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer(sentence_piece).to_string()).unwrap();
    let files = ModelFiles::locate(dir.path().to_str().unwrap(), None).unwrap();
    let path = dir.path().join(FILE);
    save_gguf(&files, &path, kind).unwrap();
    std::fs::read(path).unwrap()
}

/// Reads everything that this crate reads from a GGUF file.
fn load(path: &Path) -> Result<()> {
    let files = ModelFiles::locate(path.to_str().unwrap(), None)?;
    let gguf = files.gguf().unwrap();
    files.config()?;
    gguf.tokenizer()?;
    let vb = files.var_builder(DType::F32, &Device::Cpu)?;
    for (name, shape) in gguf.names() {
        assert_eq!(vb.get_unchecked(&name)?.dims(), shape);
    }
    Ok(())
}

#[test]
fn gguf_files() {
    let folder = Folder::new(&[FILE]);
    let seeds = vec![
        seed("llama", true, GgufKind::Q8_0),
        seed("qwen2", false, GgufKind::Q4K),
        seed("llama", false, GgufKind::F16),
    ];
    let tokens = [
        "GGUF",
        "\0\0\0\0\0\0\0\0",
        "\u{1}\0\0\0",
        "\u{8}\0\0\0",
        "\u{9}\0\0\0\u{8}\0\0\0",
        "\u{c}\0\0\0",
        "llama",
        "qwen3",
        "gemma3",
        "llama.block_count",
        "llama.attention.head_count",
        "general.alignment",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.scores",
        "blk.0.attn_q.weight",
    ];
    let make = |rng: &mut Rng| folder.put(Input::one(0, mutate::bytes(rng, &seeds, &tokens)));
    let path = folder.path().join(FILE);
    let read = |_: &Input| load(&path);
    for seed in &seeds {
        folder.put(Input::one(0, seed.clone()));
        read(&Input::one(0, Vec::new())).unwrap();
    }
    // The tokenizer is held as a JSON tree while it is read.
    let names = path.display().to_string();
    Reader { name: "gguf", cost: 10, fixed: 128 << 10, times: 64, names }.run(make, read);
}
