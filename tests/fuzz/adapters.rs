//! Fuzzes the reader of adapters in PEFT's format: configuration, tensors and this crate's own settings.

use candle_core::{DType, Device, Tensor};
use monteclora::peft::{AdapterFile, ExportFormat, CONFIG_FILE, OWN_FILE, WEIGHTS_FILE};
use monteclora::MonteCLoRAConfig;
use serde_json::{json, Value};

use super::json::Documents;
use super::mutate::Rng;
use super::reader::{Folder, Input, Reader};
use super::tensors::TensorFiles;

const PRE: &str = "base_model.model.";

fn tensors(half: bool) -> Vec<u8> {
    let of = |shape: &[usize]| {
        let tensor = Tensor::full(0.5f32, shape, &Device::Cpu).unwrap();
        if half {
            tensor.to_dtype(DType::F16).unwrap()
        } else {
            tensor
        }
    };
    let mut named = vec![(format!("{PRE}classifier.dense.weight"), of(&[2, 3]))];
    for layer in ["x.layer.0.query", "x.layer.1.value"] {
        named.push((format!("{PRE}{layer}.lora_A.weight"), of(&[2, 4])));
        named.push((format!("{PRE}{layer}.lora_B.weight"), of(&[3, 2])));
        for (name, shape) in [
            ("std_prior", &[2][..]),
            ("expert_weights_prior", &[4]),
            ("expert_weights", &[4]),
            ("gaussian_var_prior", &[2, 2]),
        ] {
            named.push((format!("{PRE}{layer}.lora_monteclora_sampler.{name}"), of(shape)));
        }
    }
    let named: Vec<(&str, Tensor)> =
        named.iter().map(|(name, tensor)| (name.as_str(), tensor.clone())).collect();
    super::tensors::file(&named)
}

fn config() -> Value {
    json!({"peft_type": "LORA", "r": 2, "lora_alpha": 7.0, "lora_dropout": 0.0, "use_rslora": false,
        "target_modules": ["query", "value"], "exclude_modules": null, "layers_to_transform": [0, 1],
        "layers_pattern": null, "rank_pattern": {"x.*key": 3}, "alpha_pattern": {"value": 4},
        "modules_to_save": ["classifier"], "task_type": "SEQ_CLS", "base_model_name_or_path": "base",
        "bias": "none", "init_lora_weights": true, "use_dora": false,
        "monteclora_config": {"num_samples": 4, "use_entropy": false, "dirichlet_prior": 0.1,
            "sample_scaler": 1e-4, "kl_loss_weight": 1e-5, "buffer_size": 150}})
}

#[test]
fn peft_folders() {
    let folder = Folder::new(&[CONFIG_FILE, WEIGHTS_FILE, OWN_FILE]);
    let own =
        serde_json::to_value(MonteCLoRAConfig { rank: 2, num_components: 4, ..Default::default() }).unwrap();
    let values: Vec<Value> = [
        "all-linear",
        r".*\.(query|value)",
        "(a+)+$",
        r"(?=(\w+))\1{9}",
        "a{999}{999}",
        r"\w{999}",
        "((((((((((",
        "(?<!x)query",
        "[",
        "(?:a?){99}a{99}",
        "(.*)(.*)(.*)(.*)(.*)(.*)x$",
        r"(.*\.?)*\1z",
    ]
    .map(Value::from)
    .to_vec();
    let names = [
        "lora_bias",
        "use_qalora",
        "fan_in_fan_out",
        ".*",
        "query",
        "(a|b",
        "rank_pattern",
        "modules_to_save",
    ];
    let configs = Documents::new(vec![config()], values.clone(), &names);
    let owns = Documents::new(vec![own.clone()], values, &["rank", "df", "unknown"]);
    let keys = [
        "base_model.model.x.layer.0.query.lora_A.weight",
        "base_model.model.x.layer.0.query.lora_B.weight",
        "base_model.model.lora_A.weight",
        "base_model.model.classifier.modules_to_save.default.dense.weight",
        "base_model.model..lora_B.weight",
    ];
    let weights = TensorFiles::new(vec![tensors(false), tensors(true)], &keys);
    let sound = [config().to_string().into_bytes(), tensors(false), own.to_string().into_bytes()];
    let make = |rng: &mut Rng| {
        let mut files = sound.to_vec();
        let which = rng.below(6);
        if which < 3 || which == 5 {
            files[1] = weights.bytes(rng);
        }
        if which == 3 || which == 5 {
            files[0] = configs.text(rng);
        }
        if which == 4 {
            files[2] = owns.text(rng);
        }
        folder.put(Input { kind: 0, files })
    };
    let dir = folder.path();
    let read = |_: &Input| {
        let file = AdapterFile::read(&dir)?;
        // An accepted adapter must be usable and writable.
        let paths: Vec<&str> = file.layers.keys().map(String::as_str).collect();
        assert!(file.config.scales_of(&paths)?.into_iter().all(f64::is_finite));
        for (layer, rank) in file.layers.values().zip(file.config.ranks_of(&paths)?) {
            assert_eq!(layer.a.dim(0)?, rank);
        }
        assert!(!format!("{:?}", file.method()).is_empty());
        // A huge alpha may overflow single precision: then the export fails, through no fault of the file.
        file.exported(ExportFormat::Serving { fold_rslora: true }).and_then(|served| served.check()).ok();
        Ok(())
    };
    read(&folder.put(Input { kind: 0, files: sound.to_vec() })).unwrap();
    // A compiled regular expression may take some megabytes whatever its length; the library limits it.
    let names = folder.outside().display().to_string();
    Reader { name: "adapter", cost: 20, fixed: 32 << 20, times: 32, names }.run(make, read);
}
