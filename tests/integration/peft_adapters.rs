//! Adapters that Python's PEFT wrote (tests/data/make_peft_adapters.py) are read, understood and
//! written again without loss.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Result as CandleResult, Tensor};
use monteclora::models::hub::ModelFiles;
use monteclora::peft::{AdapterFile, AdapterMethod, ExportFormat, WEIGHTS_FILE};
use monteclora::{Error, MonteCLoRAConfig, Result};

use crate::support::case;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/peft_adapters").join(name)
}

#[test]
fn peft_s_monteclora_adapter_is_understood() -> Result<()> {
    let file = AdapterFile::read(folder("roberta_monteclora"))?;
    let query = "roberta.encoder.layer.0.attention.self.query";
    assert_eq!(file.layers.len() % 3, 0);
    let layer = &file.layers[query];
    let sampler = layer.sampler.as_ref().expect("MonteCLoRA has a sampler");
    assert_eq!((layer.a.dim(0)?, layer.b.dim(1)?), (4, 4));
    assert_eq!((sampler.std_prior.dims(), sampler.expert_weights_prior.dims()), (&[4][..], &[3][..]));
    assert_eq!(file.config.scales_of(&[query])?, [2.0]);
    let expected = MonteCLoRAConfig {
        rank: 4,
        alpha: 8.0,
        dropout: 0.1,
        num_components: 3,
        cooperative_weight: 1.0,
        dirichlet_prior: 1.0,
        sample_scaler: 5e-3,
        kl_weight: 1e-5,
        buffer_size: 15,
        ..MonteCLoRAConfig::peft()
    };
    assert_eq!(file.method(), AdapterMethod::MonteCLoRA(expected));
    let heads: Vec<&str> = file.saved_modules.keys().map(String::as_str).collect();
    let names = ["classifier.dense.bias", "classifier.dense.weight", "classifier.out_proj.bias"];
    assert_eq!(heads, [&names[..], &["classifier.out_proj.weight"]].concat());
    Ok(())
}

#[test]
fn peft_s_rank_stabilised_lora_has_the_scale_of_each_layer() -> Result<()> {
    let file = AdapterFile::read(folder("bert_lora"))?;
    for (path, layer) in &file.layers {
        let (rank, scale) = if path.ends_with("value") { (2, 10.0 / 2f64.sqrt()) } else { (4, 3.0) };
        assert_eq!(layer.a.dim(0)?, rank, "{path}");
        assert!((file.config.scales_of(&[path])?[0] - scale).abs() < 1e-12, "{path}");
        assert!(layer.sampler.is_none());
    }
    assert!(matches!(file.method(), AdapterMethod::Lora(_)));
    Ok(())
}

#[test]
fn peft_s_adapters_are_written_again_tensor_for_tensor() -> Result<()> {
    for name in ["roberta_monteclora", "bert_lora"] {
        let dir = tempfile::tempdir().map_err(monteclora::Error::io(name))?;
        AdapterFile::read(folder(name))?.write(dir.path(), ExportFormat::Peft)?;
        let load = |dir: &Path| candle_core::safetensors::load(dir.join(WEIGHTS_FILE), &Device::Cpu);
        let (theirs, ours) = (load(&folder(name))?, load(dir.path())?);
        assert_eq!(theirs.len(), ours.len());
        let values = |tensor: &Tensor| -> CandleResult<Vec<f32>> { tensor.flatten_all()?.to_vec1() };
        for (key, tensor) in &theirs {
            let own = ours.get(key).unwrap_or_else(|| panic!("{key} is missing"));
            assert_eq!((tensor.dims(), values(tensor)?), (own.dims(), values(own)?), "{key}");
        }
    }
    Ok(())
}

#[test]
fn patterns_of_a_file_that_name_none_of_its_layers_are_told() -> Result<()> {
    let Some(dir) = case("rank-pattern-stale") else { return Ok(()) };
    let warnings = AdapterFile::read(dir)?.warnings()?;
    let told =
        ["rank_pattern: \"nosuch.layer\" matches no layer", "alpha_pattern: \"kuery\" matches no layer"];
    assert_eq!(warnings.len(), told.len(), "{warnings:?}");
    assert!(warnings.iter().zip(told).all(|(warning, told)| warning.starts_with(told)), "{warnings:?}");
    Ok(())
}

#[test]
fn a_git_lfs_pointer_in_the_place_of_weights_says_what_to_run() -> Result<()> {
    let Some(pointer) = case("lfs-pointer") else { return Ok(()) };
    let dir = tempfile::tempdir().map_err(Error::io("a temporary folder"))?;
    let copy = |from: PathBuf, to: &str| {
        let bytes = std::fs::read(&from).map_err(Error::io(&*from))?;
        let to = dir.path().join(to);
        std::fs::write(&to, bytes).map_err(Error::io(to))
    };
    for file in ["adapter_config.json", WEIGHTS_FILE] {
        copy(folder("roberta_monteclora").join(file), file)?;
    }
    AdapterFile::read(dir.path())?;
    copy(pointer.join("model.safetensors"), WEIGHTS_FILE)?;
    let message = AdapterFile::read(dir.path()).unwrap_err().to_string();
    assert!(message.contains(WEIGHTS_FILE) && message.contains("git lfs pull"), "{message}");

    copy(pointer.join("model.safetensors"), "model.safetensors")?;
    copy(folder("roberta_monteclora").join("adapter_config.json"), "config.json")?;
    let files = ModelFiles::locate(&dir.path().to_string_lossy(), None)?;
    let message = files.var_builder(DType::F32, &Device::Cpu).err().map(|error| error.to_string());
    assert!(message.is_some_and(|message| message.contains("model.safetensors: it is a Git LFS pointer")));
    Ok(())
}
