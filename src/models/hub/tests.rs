//! Tests of local folders: which files are found, and which are rejected with which error.

use super::model_files::{INDEX, TOKENIZER, WEIGHTS};
use super::source::CONFIG;
use super::ModelFiles;
use crate::adapter::{Params, Role};
use crate::error::Result;
use crate::noise::Noise;
use candle_core::Tensor;
use candle_core::{DType, Device};
use std::collections::HashMap;

/// A folder with `config.json` and the given files.
fn folder(files: &[(&str, Vec<u8>)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join(CONFIG), "{}").unwrap();
    for (name, bytes) in files {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
    dir
}

/// A safetensors file of vectors `name = [value, value]`.
fn tensors(named: &[(&str, f32)]) -> Vec<u8> {
    let vector = |value: f32| Tensor::new(&[value, value], &Device::Cpu).unwrap();
    let named: HashMap<&str, Tensor> = named.iter().map(|(name, value)| (*name, vector(*value))).collect();
    safetensors::serialize(named, None).unwrap()
}

fn index(entries: &[(&str, &str)]) -> Vec<u8> {
    let map: HashMap<_, _> = entries.iter().copied().collect();
    serde_json::json!({ "metadata": {}, "weight_map": map }).to_string().into_bytes()
}

fn locate(dir: &tempfile::TempDir) -> Result<ModelFiles> {
    ModelFiles::locate(dir.path().to_str().unwrap(), None)
}

fn refusal(files: &[(&str, Vec<u8>)]) -> String {
    locate(&folder(files)).unwrap_err().to_string()
}

#[test]
fn a_folder_with_one_file_of_weights_is_read() -> Result<()> {
    let dir = folder(&[(WEIGHTS, tensors(&[("a", 1.5)])), (TOKENIZER, b"{}".to_vec())]);
    let files = locate(&dir)?;
    assert_eq!(files.config_path(), dir.path().join(CONFIG));
    assert_eq!(files.tokenizer_path(), Some(dir.path().join(TOKENIZER).as_path()));
    assert_eq!(files.weights(), [dir.path().join(WEIGHTS)]);
    assert_eq!(files.file("generation_config.json")?, None);
    assert!(files.file("../secret").is_err());
    let vb = files.var_builder(DType::F64, &Device::Cpu)?;
    assert_eq!(vb.get(2, "a")?.to_vec1::<f64>()?, [1.5, 1.5]);
    Ok(())
}

#[test]
fn weights_that_are_quantised_in_another_way_are_refused_by_its_name() {
    let open = |config: &str| {
        let dir = folder(&[(CONFIG, config.into()), (WEIGHTS, tensors(&[("a", 1.5)]))]);
        locate(&dir)?.open_weights(DType::F32, &Device::Cpu).map(drop)
    };
    for (method, named) in [
        (r#"{"quant_method": "awq", "bits": 4}"#, "awq"),
        (r#"{"quant_method": "gptq"}"#, "gptq"),
        (r#"{"quant_method": "fp8"}"#, "fp8"),
        (r#"{"quant_method": "bitsandbytes", "load_in_8bit": true}"#, "bitsandbytes in 8 bits"),
    ] {
        let error = open(&format!(r#"{{"quantization_config": {method}}}"#)).unwrap_err().to_string();
        assert!(error.starts_with("invalid quantization_config: ") && error.contains(named), "{error}");
    }
    for fine in [
        "{}",
        r#"{"quantization_config": null}"#,
        r#"{"quantization_config": {"quant_method": "bitsandbytes"}}"#,
    ] {
        assert!(open(fine).is_ok(), "{fine}");
    }
}

#[test]
fn shards_are_listed_once_each_and_read_as_one() -> Result<()> {
    let dir = folder(&[
        (INDEX, index(&[("b", "w-2.safetensors"), ("a", "w-1.safetensors"), ("c", "w-1.safetensors")])),
        ("w-1.safetensors", tensors(&[("a", 1.0), ("c", 3.0)])),
        ("w-2.safetensors", tensors(&[("b", 2.0)])),
    ]);
    let files = locate(&dir)?;
    assert_eq!(files.weights(), [dir.path().join("w-1.safetensors"), dir.path().join("w-2.safetensors")]);
    assert!(files.tokenizer_path().is_none());
    let vb = files.var_builder(DType::F32, &Device::Cpu)?;
    for (name, value) in [("a", 1.0), ("b", 2.0), ("c", 3.0)] {
        assert_eq!(vb.get(2, name)?.to_vec1::<f32>()?, [value, value]);
    }
    Ok(())
}

#[test]
fn an_index_that_leads_outside_its_folder_is_refused() {
    for (shard, reason) in [
        ("../w.safetensors", "leads outside"),
        ("sub/../../w.safetensors", "leads outside"),
        ("..\\w.safetensors", "leads outside"),
        ("/etc/w.safetensors", "absolute"),
        ("C:\\w.safetensors", "absolute"),
        ("", "not a file name"),
        ("w.bin", ".safetensors"),
    ] {
        let message = refusal(&[(INDEX, index(&[("encoder.a", shard)]))]);
        assert!(message.contains(reason) && message.contains("tensor encoder.a"), "{shard:?}: {message}");
        assert!(message.contains(INDEX), "{message}");
    }
}

#[test]
fn an_index_that_promises_too_much_is_refused() {
    let shard = || ("w-1.safetensors", tensors(&[("a", 1.0)]));
    let message = refusal(&[(INDEX, index(&[("a", "w-1.safetensors"), ("b", "w-2.safetensors")])), shard()]);
    assert!(message.contains(r#""w-2.safetensors", which does not exist"#), "{message}");
    let message = refusal(&[(INDEX, index(&[("a", "w-1.safetensors"), ("b", "w-1.safetensors")])), shard()]);
    assert!(message.contains("tensor b is in w-1.safetensors, which does not hold it"), "{message}");
    for text in ["", "{", "[]", "{}", r#"{"weight_map": {"a": 3}}"#, r#"{"weight_map": {}}"#] {
        let message = refusal(&[(INDEX, text.into()), shard()]);
        assert!(message.contains(INDEX), "{text:?}: {message}");
    }
}

#[test]
fn a_tensor_in_two_shards_is_refused() -> Result<()> {
    let dir = folder(&[
        (INDEX, index(&[("a", "w-1.safetensors"), ("b", "w-2.safetensors")])),
        ("w-1.safetensors", tensors(&[("a", 1.0)])),
        ("w-2.safetensors", tensors(&[("a", 2.0), ("b", 2.0)])),
    ]);
    let message = locate(&dir)?.var_builder(DType::F32, &Device::Cpu).err().unwrap().to_string();
    assert!(message.contains("w-2.safetensors: tensor a is in another shard"), "{message}");
    Ok(())
}

#[test]
fn weights_that_are_not_whole_are_refused_by_name() -> Result<()> {
    let whole = tensors(&[("a", 1.0), ("b", 2.0)]);
    let mut longer = whole.clone();
    longer.push(0);
    let mut huge_header = whole.clone();
    huge_header[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    // Two tensors that share bytes.
    let text = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#;
    let overlap = (text.len() as u64).to_le_bytes().into_iter().chain(text.bytes()).chain([0; 12]).collect();
    let cuts = [0, 4, 8, 20, whole.len() - 1].map(|length| whole[..length].to_vec());
    for bytes in cuts.into_iter().chain([longer, huge_header, overlap, b"not a safetensors file".to_vec()]) {
        let length = bytes.len();
        let dir = folder(&[(WEIGHTS, bytes)]);
        let files = locate(&dir)?;
        let message = files.var_builder(DType::F32, &Device::Cpu).err().unwrap().to_string();
        assert!(message.contains(WEIGHTS) && message.contains("not a whole"), "{length}: {message}");
    }
    Ok(())
}

#[test]
fn pickled_weights_are_refused_with_the_reason() {
    for pickle in
        ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "pytorch_model-00001-of-00002.bin"]
    {
        let message = refusal(&[(pickle, b"\x80\x02".to_vec()), ("training_args.bin", Vec::new())]);
        assert!(message.contains(&format!("({pickle})")) && message.contains("run any code"), "{message}");
    }
    assert!(refusal(&[("training_args.bin", Vec::new())]).contains("no model.safetensors"));
}

#[test]
fn what_a_folder_lacks_is_named() {
    assert!(refusal(&[]).contains("no model.safetensors"));
    let empty = tempfile::tempdir().unwrap();
    assert!(locate(&empty).unwrap_err().to_string().contains("no config.json"));
    let dir = folder(&[(WEIGHTS, tensors(&[("a", 1.0)]))]);
    let message = ModelFiles::locate(dir.path().to_str().unwrap(), Some("main")).unwrap_err().to_string();
    assert!(message.contains("revision") && message.contains("local folder"), "{message}");
    let file = dir.path().join(CONFIG);
    let message = ModelFiles::locate(file.to_str().unwrap(), None).unwrap_err().to_string();
    assert!(message.contains("found another file"), "{message}");
    let absent = dir.path().join("absent");
    let message = ModelFiles::locate(absent.to_str().unwrap(), None).unwrap_err().to_string();
    assert!(message.contains("no such local folder"), "{message}");
}

#[test]
#[cfg(unix)]
fn a_link_to_nothing_is_told_as_one() {
    let dir = folder(&[]);
    std::os::unix::fs::symlink("../../blobs/0123", dir.path().join(WEIGHTS)).unwrap();
    let message = locate(&dir).unwrap_err().to_string();
    assert!(message.contains("model.safetensors: a link to a file that does not exist"), "{message}");
}

#[test]
fn what_cannot_be_a_weight_is_refused_by_file_and_tensor() -> Result<()> {
    let refusal = |tensor: Tensor| -> Result<String> {
        let whole = tensors(&[("good", 1.0)]);
        let bad = safetensors::serialize([("encoder.bad", tensor)], None).unwrap();
        let index = index(&[("good", "w-1.safetensors"), ("encoder.bad", "w-2.safetensors")]);
        let dir = folder(&[(INDEX, index), ("w-1.safetensors", whole), ("w-2.safetensors", bad)]);
        let vb = locate(&dir)?.var_builder(DType::F32, &Device::Cpu)?;
        assert_eq!(vb.get(2, "good")?.to_vec1::<f32>()?, [1.0, 1.0]);
        Ok(vb.pp("encoder").get(2, "bad").unwrap_err().to_string())
    };
    let floats = [DType::F64, DType::F32, DType::F16, DType::BF16];
    for (dtype, bad) in floats.into_iter().flat_map(|dtype| [f64::NAN, f64::INFINITY].map(|bad| (dtype, bad)))
    {
        for bad in [[bad, 1.0], [1.0, -bad]] {
            let message = refusal(Tensor::new(&bad, &Device::Cpu)?.to_dtype(dtype)?)?;
            let expected = "w-2.safetensors: tensor encoder.bad: it holds NaN or infinity";
            assert!(message.contains(expected), "{dtype:?}: {message}");
        }
    }
    for (dtype, name) in [(DType::I64, "I64"), (DType::U8, "U8"), (DType::U32, "U32")] {
        let message = refusal(Tensor::zeros(2, dtype, &Device::Cpu)?)?;
        let expected = format!("tensor encoder.bad: expected weights of F64, F32, F16 or BF16, got {name}");
        assert!(message.contains(&expected) && message.contains("w-2.safetensors"), "{message}");
    }
    let message = refusal(Tensor::zeros(3, DType::F32, &Device::Cpu)?)?;
    assert!(
        message.contains("w-2.safetensors: tensor encoder.bad: expected shape [2], got [3]"),
        "{message}"
    );
    Ok(())
}

#[test]
fn the_largest_and_smallest_numbers_of_every_dtype_are_weights() -> Result<()> {
    let limits = [
        (DType::F64, f64::MAX, f64::MIN_POSITIVE),
        (DType::F32, f64::from(f32::MAX), f64::from(f32::MIN_POSITIVE)),
        (DType::F16, 65504.0, 2f64.powi(-14)),
        (DType::BF16, 255.0 * 2f64.powi(120), 2f64.powi(-126)),
    ];
    for (dtype, largest, smallest) in limits {
        let tensor = Tensor::new(&[-largest, smallest], &Device::Cpu)?.to_dtype(dtype)?;
        let bytes = safetensors::serialize([("a", &tensor)], None).unwrap();
        let vb = locate(&folder(&[(WEIGHTS, bytes)]))?.var_builder(tensor.dtype(), &Device::Cpu)?;
        let same = vb.get(2, "a")?.eq(&tensor)?.to_vec1::<u8>()?;
        assert_eq!(same, [1, 1], "{:?}", tensor.dtype());
    }
    Ok(())
}

#[test]
fn a_git_lfs_pointer_in_the_place_of_weights_or_index_is_told_as_one() -> Result<()> {
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4400000\n".to_vec();
    let dir = folder(&[(WEIGHTS, pointer.clone())]);
    let message = locate(&dir)?.var_builder(DType::F32, &Device::Cpu).err().unwrap().to_string();
    assert!(message.contains(WEIGHTS) && message.contains("git lfs pull"), "{message}");
    let message = refusal(&[(INDEX, pointer.clone())]);
    assert!(message.contains(INDEX) && message.contains("git lfs pull"), "{message}");
    let shards = [(INDEX, index(&[("a", "w-1.safetensors")])), ("w-1.safetensors", pointer)];
    let message = refusal(&shards);
    assert!(message.contains("w-1.safetensors") && message.contains("git lfs pull"), "{message}");
    Ok(())
}

#[test]
fn a_missing_tensor_is_told_with_its_file_and_an_output_with_what_shares_it() -> Result<()> {
    let names = ["model.embed_tokens.weight", "model.norm.weight"];
    let one = folder(&[(WEIGHTS, tensors(&names.map(|name| (name, 1.0))))]);
    let vb = locate(&one)?.var_builder(DType::F32, &Device::Cpu)?;
    let missing = |name: &str| vb.get(2, name).unwrap_err().to_string();
    let message = missing("model.layers.0.weight");
    assert!(message.contains("model.safetensors: there is no tensor model.layers.0.weight"), "{message}");
    assert!(message.contains("such as model.embed_tokens.weight"), "{message}");
    let message = missing("lm_head.weight");
    assert!(message.contains(r#""tie_word_embeddings": true"#), "{message}");
    for layer in ["bert.pooler.dense.weight", "head.dense.weight"] {
        assert!(missing(layer).contains("AutoModelForSequenceClassification"), "{layer}");
    }
    // Full fine-tuning reads through the parameter store.
    let params = Params::new(Noise::new(1), &Device::Cpu);
    let message =
        params.var_builder(Some(vb.clone()), Role::Base).get(2, "x.weight").unwrap_err().to_string();
    assert!(message.contains("model.safetensors: there is no tensor x.weight"), "{message}");

    let shards = folder(&[
        (INDEX, index(&[("a", "w-1.safetensors"), ("b", "w-2.safetensors")])),
        ("w-1.safetensors", tensors(&[("a", 1.0)])),
        ("w-2.safetensors", tensors(&[("b", 2.0)])),
    ]);
    let vb = locate(&shards)?.var_builder(DType::F32, &Device::Cpu)?;
    let message = vb.get(2, "lm_head.weight").unwrap_err().to_string();
    assert!(message.contains("none of the 2 shards has a tensor lm_head.weight (it has others"), "{message}");
    Ok(())
}

#[test]
fn a_weight_that_a_dtype_cannot_hold_is_told_by_tensor_and_value() -> Result<()> {
    let load = |values: [f64; 3], from: DType, to: DType| -> Result<candle_core::Result<Tensor>> {
        let tensor = Tensor::new(&values, &Device::Cpu)?.to_dtype(from)?;
        let dir = folder(&[(WEIGHTS, safetensors::serialize([("layer.norm", tensor)], None).unwrap())]);
        Ok(locate(&dir)?.var_builder(to, &Device::Cpu)?.get(3, "layer.norm"))
    };
    for (value, from, to) in [
        (-70000.0, DType::F32, DType::F16),
        (65520.0, DType::F32, DType::F16),
        (66048.0, DType::BF16, DType::F16),
        (1e5, DType::F64, DType::F16),
        (f64::from(f32::MAX), DType::F32, DType::BF16),
        (1e300, DType::F64, DType::F32),
        (-1e39, DType::F64, DType::BF16),
    ] {
        let message = load([1.0, value, 2.0], from, to)?.unwrap_err().to_string();
        let expected = format!("tensor layer.norm: value 1 is {value}, more than {} can hold", to.as_str());
        assert!(message.contains(&expected) && message.contains(WEIGHTS), "{message}");
        assert_eq!(message.contains("bf16 or f32"), to == DType::F16, "{message}");
    }
    // Values that round to the largest finite number are accepted, as are those of the same dtype.
    for (value, from, to) in [
        (65519.0, DType::F32, DType::F16),
        (65504.0, DType::F16, DType::F16),
        (65504.0, DType::F16, DType::BF16),
        (3.389e38, DType::F32, DType::BF16),
        (f64::from(f32::MAX), DType::F64, DType::F32),
        (3.38e38, DType::BF16, DType::F32),
    ] {
        let values = load([1.0, value, 2.0], from, to)??.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        assert!(values[1].is_finite(), "{value} {from:?} {to:?}");
    }
    Ok(())
}
