//! Fuzzes the readers of model configurations.

use monteclora::models::decoder::DecoderConfig;
use monteclora::models::roberta::RobertaConfig;
use monteclora::models::sequence::SequenceConfig;
use serde_json::{json, Value};

use super::json::Documents;
use super::mutate::Rng;
use super::reader::{Folder, Input, Reader};

fn reader(name: &'static str) -> Reader {
    // Configurations are parsed into JSON trees, which take at most a hundred times the size of the text; the
    // size of the text is limited.
    Reader { name, cost: 1, fixed: 64 << 10, times: 512, names: "config.json".to_string() }
}

fn roberta() -> Value {
    json!({"model_type": "roberta", "vocab_size": 50265, "hidden_size": 768, "num_hidden_layers": 12,
        "num_attention_heads": 12, "intermediate_size": 3072, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1, "classifier_dropout": null, "max_position_embeddings": 514,
        "type_vocab_size": 1, "layer_norm_eps": 1e-05, "pad_token_id": 1, "initializer_range": 0.02,
        "position_embedding_type": "absolute", "id2label": {"0": "no", "1": "yes"}})
}

fn llama() -> Vec<Value> {
    let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192});
    let old = json!({"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "hidden_act": "silu",
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "rope_scaling": scaling,
        "head_dim": 128, "pad_token_id": -1, "eos_token_id": [128001, 128008], "attention_bias": false,
        "attention_dropout": 0.0, "tie_word_embeddings": false, "num_labels": 3, "bos_token_id": 128000});
    let mut new = old.clone();
    new["rope_parameters"] =
        json!({"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0});
    new["rope_scaling"] = Value::Null;
    vec![old, new]
}

/// One configuration of each family after LLaMA, with the fields specific to the family.
fn later() -> Vec<Value> {
    let shared = json!({"vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 64, "rms_norm_eps": 1e-06,
        "sliding_window": 8, "head_dim": 16, "eos_token_id": 2, "pad_token_id": 0});
    let longrope = json!({"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
        "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1, 2, 3, 4]});
    let yarn = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32,
        "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.5});
    let nested = json!({"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}});
    let types = json!(["sliding_attention", "full_attention", "sliding_attention"]);
    let gemma = json!({"query_pre_attn_scalar": 16, "hidden_activation": "gelu_pytorch_tanh", "layer_types": types,
        "final_logit_softcapping": 30.0, "attention_bias": true});
    let with = |parts: &[&Value]| {
        let mut all = shared.clone();
        for (name, value) in parts.iter().flat_map(|part| part.as_object().unwrap()) {
            all[name] = value.clone();
        }
        all
    };
    let text = with(&[&gemma, &json!({"model_type": "gemma3_text", "rope_parameters": nested})]);
    vec![
        with(&[
            &json!({"model_type": "qwen2", "use_sliding_window": true, "max_window_layers": 1, "rope_scaling": yarn}),
        ]),
        with(&[&json!({"model_type": "qwen3", "rope_theta": 1e6, "layer_types": types,
            "use_sliding_window": true})]),
        with(&[&json!({"model_type": "mistral", "rope_theta": 1e6})]),
        with(&[&json!({"model_type": "smollm3", "no_rope_layers": [1, 1, 0], "no_rope_layer_interval": 3})]),
        with(&[&json!({"model_type": "phi3", "resid_pdrop": 0.0, "original_max_position_embeddings": 32,
            "rope_parameters": longrope})]),
        with(&[&gemma, &json!({"model_type": "gemma2", "attn_logit_softcapping": 50.0})]),
        with(&[
            &gemma,
            &json!({"model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 1e4,
            "sliding_window_pattern": 2, "layer_types": null}),
        ]),
        json!({"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 106]}),
        text,
    ]
}

fn decoders_seeds() -> Vec<Value> {
    llama().into_iter().chain(later()).collect()
}

/// Configurations of the encoder families after BERT, as transformers writes them.
fn encoders_after_bert() -> Vec<Value> {
    let sizes = json!({"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3,
        "intermediate_size": 40, "max_position_embeddings": 40, "pad_token_id": 0});
    let with = |settings: Value| {
        let mut all = sizes.clone();
        for (name, value) in settings.as_object().expect("an object") {
            all[name] = value.clone();
        }
        all
    };
    vec![
        with(json!({"model_type": "electra", "embedding_size": 16})),
        with(json!({"model_type": "distilbert", "dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 40,
            "activation": "gelu", "seq_classif_dropout": 0.2})),
        with(json!({"model_type": "deberta-v2", "relative_attention": true, "position_buckets": 8,
            "norm_rel_ebd": "layer_norm", "share_att_key": true, "pos_att_type": "p2c|c2p",
            "max_relative_positions": -1, "position_biased_input": false, "type_vocab_size": 0})),
        with(json!({"model_type": "modernbert", "global_attn_every_n_layers": 3, "local_attention": 8,
            "global_rope_theta": 160000.0, "local_rope_theta": 10000.0, "classifier_pooling": "mean"})),
        with(json!({"model_type": "modernbert", "classifier_pooling": "cls",
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 160000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}})),
    ]
}

fn documents(seeds: Vec<Value>) -> Documents {
    let values = [
        "roberta",
        "llama",
        "bert",
        "camembert",
        "gelu",
        "silu",
        "llama3",
        "default",
        "phi3",
        "gemma3",
        "qwen2",
        "yarn",
    ]
    .map(Value::from);
    let names = [
        "head_dim",
        "type",
        "rope_type",
        "rope_parameters",
        "id2label",
        "num_labels",
        "9",
        "factor",
        "layer_types",
        "sliding_window",
        "text_config",
    ];
    Documents::new(seeds, values.to_vec(), &names)
}

/// Checks the values that callers read from an accepted configuration.
fn use_roberta(config: &RobertaConfig) {
    assert!(config.max_length() > 0 && config.hidden_size.is_multiple_of(config.num_attention_heads));
    assert!(config.pad_id() < u32::MAX && config.head_dropout() < 1.0);
}

fn use_decoder(config: &DecoderConfig) {
    assert!(config.head_dim >= 2 && config.head_dim.is_multiple_of(2) && config.layers.len() <= 4096);
    assert!(
        config.rotary.dim <= config.head_dim && config.layers.iter().all(|layer| layer.window != Some(0))
    );
    assert!((config.pad_id() as usize) < config.vocab_size);
}

#[test]
fn encoders() {
    let folder = Folder::new(&["config.json"]);
    let path = folder.path().join("config.json");
    let documents = documents(vec![roberta()]);
    let make = |rng: &mut Rng| folder.put(Input::one(0, documents.text(rng)));
    let read = |_: &Input| RobertaConfig::from_file(&path).map(|config| use_roberta(&config));
    read(&folder.put(Input::one(0, roberta().to_string().into_bytes()))).unwrap();
    reader("roberta_config").run(make, read);
}

#[test]
fn decoders() {
    let folder = Folder::new(&["config.json"]);
    let path = folder.path().join("config.json");
    let documents = documents(decoders_seeds());
    let make = |rng: &mut Rng| folder.put(Input::one(0, documents.text(rng)));
    let read = |_: &Input| DecoderConfig::from_file(&path).map(|config| use_decoder(&config));
    for seed in decoders_seeds() {
        read(&folder.put(Input::one(0, seed.to_string().into_bytes()))).unwrap();
    }
    reader("decoder_config").run(make, read);
}

#[test]
fn classifiers() {
    let folder = Folder::new(&["config.json"]);
    let (path, copy) = (folder.path().join("config.json"), folder.path().join("copy-of-config.json"));
    let seeds: Vec<Value> =
        decoders_seeds().into_iter().chain([roberta()]).chain(encoders_after_bert()).collect();
    let documents = documents(seeds.clone());
    let make = |rng: &mut Rng| folder.put(Input::one(0, documents.text(rng)));
    let read = |_: &Input| {
        let config = SequenceConfig::from_file(&path, 2)?;
        // The configuration must survive a round trip through its JSON.
        std::fs::write(&copy, config.to_json().to_string()).unwrap();
        SequenceConfig::from_file(&copy, 2).map(|again| {
            assert_eq!((again.vocab_size(), again.max_length()), (config.vocab_size(), config.max_length()));
        })
    };
    for seed in seeds {
        read(&folder.put(Input::one(0, seed.to_string().into_bytes()))).unwrap();
    }
    reader("sequence_config").run(make, read);
}
