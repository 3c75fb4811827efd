//! Round trips, and one test per way in which a file can be wrong.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde_json::{json, Value};

use super::keys::TensorKind;
use super::*;
use crate::error::Result;

pub(super) const Q: &str = "roberta.encoder.layer.0.attention.self.query";
pub(super) const V: &str = "roberta.encoder.layer.0.attention.self.value";
const PRE: &str = "base_model.model.";

/// A tensor in general position, different for each `start`.
pub(super) fn filled(shape: &[usize], start: f32) -> Tensor {
    let count = shape.iter().product::<usize>() as f32;
    Tensor::arange(0f32, count, &Device::Cpu)
        .unwrap()
        .affine(0.25, f64::from(start))
        .unwrap()
        .reshape(shape)
        .unwrap()
}

/// Two layers of ranks 3 and 2 with samplers of four components, and a head.
pub(super) fn adapter() -> AdapterFile {
    let layer = |rank: usize, start: f32| LayerTensors {
        a: filled(&[rank, 6], start),
        b: filled(&[5, rank], -start),
        sampler: Some(SamplerTensors::new(filled(&[rank], 0.5), filled(&[4], -0.5)).unwrap()),
    };
    let fields = MonteCLoRAFields { num_samples: 4, sample_scaler: 5e-3, ..MonteCLoRAFields::default() };
    let config = PeftConfig {
        r: 3,
        lora_alpha: 7.0,
        target_modules: Some(TargetModules::Names(vec!["query".into(), "value".into()])),
        rank_pattern: vec![("value".into(), 2)],
        modules_to_save: Some(vec!["classifier".into(), "score".into()]),
        task_type: Some("SEQ_CLS".into()),
        monteclora_config: Some(fields),
        ..PeftConfig::default()
    };
    let saved_modules = [("classifier.dense.weight".to_string(), filled(&[2, 5], 3.0))].into();
    AdapterFile {
        config,
        layers: [(Q.into(), layer(3, 1.0)), (V.into(), layer(2, 2.0))].into(),
        saved_modules,
        monteclora: None,
        prior: None,
        labels: None,
    }
}

pub(super) fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// The contents of an adapter's folder, for tests to modify.
pub(super) struct Files {
    pub config: Value,
    pub tensors: HashMap<String, Tensor>,
}

impl Files {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        adapter().write(dir.path(), ExportFormat::Peft).unwrap();
        let config = std::fs::read_to_string(dir.path().join(CONFIG_FILE)).unwrap();
        let tensors = candle_core::safetensors::load(dir.path().join(WEIGHTS_FILE), &Device::Cpu).unwrap();
        Self { config: serde_json::from_str(&config).unwrap(), tensors }
    }

    pub fn read(&self) -> Result<AdapterFile> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(CONFIG_FILE), self.config.to_string()).unwrap();
        candle_core::safetensors::save(&self.tensors, dir.path().join(WEIGHTS_FILE)).unwrap();
        AdapterFile::read(dir.path())
    }

    /// The error for a file with this setting.
    fn with(mut self, key: &str, value: Value) -> String {
        self.config[key] = value;
        self.refusal(CONFIG_FILE)
    }

    /// The error for a file whose tensors were changed by `spoil`.
    fn spoilt(mut self, spoil: impl FnOnce(&mut HashMap<String, Tensor>)) -> String {
        spoil(&mut self.tensors);
        self.refusal(WEIGHTS_FILE)
    }

    pub fn refusal(&self, file: &str) -> String {
        let message = self.read().unwrap_err().to_string();
        assert!(message.contains(file), "{message}");
        message
    }
}

#[test]
fn an_adapter_is_read_back_as_it_was_written() -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    let written = adapter();
    written.write(dir.path(), ExportFormat::Peft)?;
    let read = AdapterFile::read(dir.path())?;
    assert_eq!(read.config, written.config);
    assert_eq!(read.layers.len(), 2);
    for (path, layer) in &written.layers {
        for kind in TensorKind::ALL {
            let (was, is) = (layer.tensor(kind).unwrap(), read.layers[path].tensor(kind).unwrap());
            assert_eq!((values(was), was.dims()), (values(is), is.dims()), "{path} {kind:?}");
        }
    }
    assert_eq!(values(&read.saved_modules["classifier.dense.weight"]), values(&filled(&[2, 5], 3.0)));
    Ok(())
}

#[test]
fn the_keys_are_those_that_peft_writes() {
    // PEFT 0.21.2: safe_open(..).keys() of get_peft_model(.., LoraConfig(target_modules=["query"],
    // modules_to_save=["classifier"], monteclora_config=MontecloraConfig(..))).save_pretrained(..)
    let mut keys: Vec<String> =
        Files::new().tensors.into_keys().filter(|key| !key.contains("value")).collect();
    keys.sort();
    let expected = [
        "base_model.model.classifier.dense.weight",
        "base_model.model.roberta.encoder.layer.0.attention.self.query.lora_A.weight",
        "base_model.model.roberta.encoder.layer.0.attention.self.query.lora_B.weight",
        "base_model.model.roberta.encoder.layer.0.attention.self.query.lora_monteclora_sampler.expert_weights",
        "base_model.model.roberta.encoder.layer.0.attention.self.query.lora_monteclora_sampler.expert_weights_prior",
        "base_model.model.roberta.encoder.layer.0.attention.self.query.lora_monteclora_sampler.gaussian_var_prior",
        "base_model.model.roberta.encoder.layer.0.attention.self.query.lora_monteclora_sampler.std_prior",
    ];
    assert_eq!(keys, expected);
}

#[test]
fn writing_is_deterministic_replaces_and_leaves_nothing_behind() -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    let bytes = |dir: &Path| [CONFIG_FILE, WEIGHTS_FILE].map(|name| std::fs::read(dir.join(name)).unwrap());
    let inner = dir.path().join("new/folder");
    adapter().write(&inner, ExportFormat::Peft)?;
    let first = bytes(&inner);
    adapter().write(&inner, ExportFormat::Peft)?;
    assert_eq!(first, bytes(&inner));
    let header = String::from_utf8_lossy(&first[1][8..200]).into_owned();
    assert!(header.starts_with(r#"{"__metadata__":{"format":"pt"}"#), "{header}");
    assert_eq!(std::fs::read_dir(&inner).unwrap().count(), 2);

    let mut broken = adapter();
    broken.layers.get_mut(Q).unwrap().a = Tensor::full(f32::NAN, (3, 6), &Device::Cpu)?;
    let message = broken.write(&inner, ExportFormat::Peft).unwrap_err().to_string();
    assert!(message.contains("query.lora_A.weight") && message.contains("NaN"), "{message}");
    assert_eq!(first, bytes(&inner));
    assert_eq!(std::fs::read_dir(&inner).unwrap().count(), 2);
    Ok(())
}

#[test]
fn the_configuration_has_what_its_readers_ask_for() {
    let config = Files::new().config;
    for (key, value) in [
        ("peft_type", json!("LORA")),
        ("r", json!(3)),
        ("lora_alpha", json!(7)),
        ("inference_mode", json!(true)),
        ("bias", json!("none")),
        ("alpha_pattern", json!({})),
        ("rank_pattern", json!({"value": 2})),
        ("loftq_config", json!({})),
        ("layers_to_transform", json!(null)),
    ] {
        assert_eq!(config.get(key), Some(&value), "{key}");
    }
    assert!(config.get("runtime_config").is_none());
    let fields = config["monteclora_config"].as_object().unwrap();
    let names: Vec<&String> = fields.keys().collect();
    let six =
        ["buffer_size", "dirichlet_prior", "kl_loss_weight", "num_samples", "sample_scaler", "use_entropy"];
    assert_eq!(names, six);
}

#[test]
fn half_precision_becomes_single_and_other_dtypes_are_refused() -> Result<()> {
    for dtype in [DType::F16, DType::BF16] {
        let mut files = Files::new();
        for tensor in files.tensors.values_mut() {
            *tensor = tensor.to_dtype(dtype)?;
        }
        let read = files.read()?;
        assert_eq!(read.layers[Q].a.dtype(), DType::F32);
        assert_eq!(values(&read.layers[Q].a), values(&adapter().layers[Q].a));
    }
    let message = Files::new().spoilt(|tensors| {
        let tensor = tensors.get_mut(&TensorKind::B.key(Q)).unwrap();
        *tensor = tensor.to_dtype(DType::F64).unwrap();
    });
    assert!(message.contains("query.lora_B.weight: expected F32, F16 or BF16, got F64"), "{message}");
    Ok(())
}

#[test]
fn settings_that_change_the_algebra_are_refused_by_name() {
    for (key, value) in [
        ("peft_type", json!("IA3")),
        ("peft_type", json!(null)),
        ("use_dora", json!(true)),
        ("lora_bias", json!(true)),
        ("bias", json!("lora_only")),
        ("bias", json!("all")),
        ("alora_invocation_tokens", json!([1, 2])),
        ("layer_replication", json!([[0, 4], [2, 5]])),
        ("target_parameters", json!(["experts.gate_up_proj"])),
        ("trainable_token_indices", json!([1])),
        ("init_lora_weights", json!("pissa")),
        ("init_lora_weights", json!("pissa_niter_16")),
        ("init_lora_weights", json!("olora")),
        ("init_lora_weights", json!("loftq")),
        ("init_lora_weights", json!("corda")),
        ("kasa_config", json!({"beta": 1})),
    ] {
        let message = Files::new().with(key, value.clone());
        assert!(message.contains(key), "{key} {value}: {message}");
    }
}

#[test]
fn settings_outside_their_domain_are_refused_by_name() {
    for (key, value, word) in [
        ("r", json!(0), "r: expected at least 1, got 0"),
        ("r", json!("8"), "invalid type"),
        ("r", json!(-1), "invalid value"),
        ("r", json!(1.5), "invalid type"),
        ("lora_alpha", json!("x"), "invalid type"),
        ("lora_alpha", json!(0), "lora_alpha: expected a positive number, got 0"),
        (
            "alpha_pattern",
            json!({"query": -2.0}),
            "alpha_pattern: \"query\": expected a positive number, got -2",
        ),
        ("lora_dropout", json!(1.0), "lora_dropout"),
        ("rank_pattern", json!({"(": 3}), "rank_pattern"),
        ("alpha_pattern", json!({"(": 3}), "alpha_pattern: \"^(?:.*\\\\.)?(?:()$\" is no regular expression"),
        ("rank_pattern", json!({"value": 0}), "rank_pattern: \"value\": expected at least 1"),
        ("rank_pattern", json!([1]), "object of patterns"),
        ("target_modules", json!("("), "target_modules"),
        ("target_modules", json!(["key"]), "query.lora_A.weight: target_modules does not name"),
        ("monteclora_config", json!(null), "has no monteclora_config"),
        ("monteclora_config", json!({"num_samples": 0}), "num_samples"),
        ("monteclora_config", json!({"num_samples": 4, "sparse": true}), "unknown field `sparse`"),
        ("monteclora_config", json!({"num_samples": 4, "dirichlet_prior": -1}), "dirichlet_prior"),
        (
            "monteclora_config",
            json!({"num_samples": 4, "sample_scaler": 0}),
            "sample_scaler: expected a positive",
        ),
        (
            "monteclora_config",
            json!({"num_samples": 4, "kl_loss_weight": -1}),
            "kl_loss_weight: expected zero or",
        ),
    ] {
        let mut files = Files::new();
        files.config[key] = value.clone();
        let message = files.read().unwrap_err().to_string();
        assert!(message.contains(word), "{key} {value}: {message}");
    }
}

#[test]
fn settings_of_other_versions_are_passed_over() -> Result<()> {
    let mut files = Files::new();
    for (key, value) in [
        ("a_key_of_the_future", json!({"x": 1})),
        ("peft_version", json!("0.21.2")),
        ("eva_config", json!(null)),
        ("megatron_core", json!("megatron.core")),
        ("qalora_group_size", json!(16)),
        ("init_lora_weights", json!("gaussian")),
        ("alpha_pattern", json!(null)),
        ("lora_dropout", json!(null)),
        ("lora_bias", json!(false)),
        ("target_parameters", json!([])),
        ("target_modules", json!(r".*\.self\.(?!key)\w+")),
    ] {
        files.config[key] = value;
    }
    let read = files.read()?;
    assert!(read.config.alpha_pattern.is_empty() && read.config.lora_dropout == 0.0);
    // The minimum that PEFT accepts.
    files.config =
        json!({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["value"], "task_type": null});
    files
        .tensors
        .retain(|key, _| key.ends_with("value.lora_A.weight") || key.ends_with("value.lora_B.weight"));
    assert_eq!(files.read()?.config.scales_of(&[V])?, [2.0]);
    Ok(())
}

#[test]
fn missing_and_unexpected_tensors_are_named() {
    for kind in TensorKind::ALL {
        let message = Files::new().spoilt(|tensors| drop(tensors.remove(&kind.key(Q))));
        assert!(message.contains(&format!("{}: it is missing", kind.key(Q))), "{message}");
    }
    let message = Files::new().spoilt(|tensors| {
        tensors.retain(|key, _| !key.contains("query.lora_monteclora_sampler"));
    });
    assert!(message.contains("query.lora_monteclora_sampler.std_prior: it is missing"), "{message}");
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    for (kind, shape) in [
        (TensorKind::A, &[2, 6][..]),
        (TensorKind::A, &[18]),
        (TensorKind::B, &[5, 4]),
        (TensorKind::B, &[3, 5]),
        (TensorKind::StdPrior, &[2]),
        (TensorKind::StdPrior, &[3, 1]),
        (TensorKind::ExpertWeightsPrior, &[3]),
        (TensorKind::ExpertWeights, &[5]),
        (TensorKind::GaussianVarPrior, &[3]),
    ] {
        let key = kind.key(Q);
        let message = Files::new().spoilt(|tensors| drop(tensors.insert(key.clone(), filled(shape, 0.0))));
        assert!(message.contains(&format!("{key}: expected shape")), "{message}");
        assert!(message.contains(&format!("got {shape:?}")), "{message}");
    }
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let key = TensorKind::StdPrior.key(V);
        let tensor = Tensor::new(&[0f32, value], &Device::Cpu).unwrap();
        let message = Files::new().spoilt(|tensors| drop(tensors.insert(key.clone(), tensor)));
        assert!(message.contains(&format!("{key}: value 1 is")), "{message}");
    }
}

#[test]
fn names_that_peft_would_not_understand_are_refused() {
    let rename = |from: String, to: String| {
        Files::new().spoilt(|tensors| {
            let tensor = tensors.remove(&from).unwrap();
            tensors.insert(to, tensor);
        })
    };
    let message = rename(TensorKind::A.key(Q), format!("{PRE}{Q}.lora_A.default.weight"));
    assert!(message.contains("adapter's name (\"default\")"), "{message}");
    let message = rename(TensorKind::A.key(Q), format!("{Q}.lora_A.weight"));
    assert!(message.contains("starts with base_model.model."), "{message}");
    let message =
        Files::new().spoilt(|tensors| drop(tensors.insert(format!("{PRE}pooler.weight"), filled(&[2], 0.0))));
    assert!(message.contains("base_model.model.pooler.weight"), "{message}");
}

#[test]
fn a_head_may_keep_its_wrapper_but_not_come_twice() -> Result<()> {
    let head = format!("{PRE}classifier.dense.weight");
    let mut files = Files::new();
    let tensor = files.tensors.remove(&head).unwrap();
    files.tensors.insert(format!("{PRE}classifier.modules_to_save.default.dense.weight"), tensor.clone());
    assert!(files.read()?.saved_modules.contains_key("classifier.dense.weight"));
    let message = files.spoilt(|tensors| drop(tensors.insert(head.clone(), tensor)));
    assert!(message.contains("twice"), "{message}");
    let mut files = Files::new();
    files.tensors.remove(&head);
    let message = files.read().unwrap_err().to_string();
    assert!(message.contains("modules_to_save: there is no tensor of classifier, score"), "{message}");
    Ok(())
}

#[test]
fn files_that_are_not_whole_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let message = || AdapterFile::read(dir.path()).unwrap_err().to_string();
    assert!(message().contains(CONFIG_FILE));
    adapter().write(dir.path(), ExportFormat::Peft).unwrap();
    let (config, weights) = (dir.path().join(CONFIG_FILE), dir.path().join(WEIGHTS_FILE));
    let (text, bytes) = (std::fs::read_to_string(&config).unwrap(), std::fs::read(&weights).unwrap());
    for length in [0, 5, 40, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&weights, &bytes[..length]).unwrap();
        assert!(
            message().contains(&format!("{WEIGHTS_FILE}: not a whole safetensors file")),
            "{}",
            message()
        );
    }
    std::fs::remove_file(&weights).unwrap();
    assert!(message().contains(WEIGHTS_FILE));
    std::fs::write(dir.path().join("adapter_model.bin"), b"\x80").unwrap();
    assert!(message().contains("adapter_model.bin is a pickle"), "{}", message());
    std::fs::write(&weights, &bytes).unwrap();
    for wrong in ["", "{", "[]", "null", &text[..text.len() / 2]] {
        std::fs::write(&config, wrong).unwrap();
        let message = message();
        assert!(
            message.contains(&format!("{CONFIG_FILE}, line")) && message.contains("malformed"),
            "{message}"
        );
    }
    std::fs::write(&config, "{}").unwrap();
    assert!(message().contains("peft_type is missing"), "{}", message());
}

#[test]
fn a_git_lfs_pointer_is_told_as_one_in_each_of_the_files() {
    let dir = tempfile::tempdir().unwrap();
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4400000\n";
    for file in [WEIGHTS_FILE, OWN_FILE, CONFIG_FILE] {
        adapter().write(dir.path(), ExportFormat::Peft).unwrap();
        std::fs::write(dir.path().join(file), pointer).unwrap();
        let message = AdapterFile::read(dir.path()).unwrap_err().to_string();
        assert!(message.contains(file) && message.contains("git lfs pull"), "{message}");
    }
}

/// PEFT 0.21.2 also warns: "keys did not match any targeted module and were ignored".
#[test]
fn patterns_and_modules_that_name_nothing_are_told() -> Result<()> {
    let mut files = Files::new();
    assert_eq!(files.read()?.warnings()?, Vec::<String>::new());
    files.config["rank_pattern"]["nosuch.layer"] = json!(2);
    files.config["rank_pattern"][".*[.]5[.].*"] = json!(3);
    files.config["alpha_pattern"] = json!({"kuery": 3});
    files.config["target_modules"] = json!(["query", "foobar_proj", "value"]);
    files.config["modules_to_save"] = json!(["classifier", "score", "embed_tokens"]);
    let warnings = files.read()?.warnings()?;
    let told = [
        "rank_pattern: \".*[.]5[.].*\"",
        "rank_pattern: \"nosuch.layer\"",
        "alpha_pattern: \"kuery\"",
        "target_modules: \"foobar_proj\"",
        "modules_to_save: the adapter has no tensor of \"embed_tokens\"",
    ];
    assert_eq!(warnings.len(), told.len(), "{warnings:?}");
    for (warning, told) in warnings.iter().zip(told) {
        assert!(warning.starts_with(told), "{warning}");
    }
    Ok(())
}
