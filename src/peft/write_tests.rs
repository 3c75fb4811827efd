//! Tests of the export formats and of interrupted writes.

use std::collections::BTreeMap;
use std::fs;

use super::tests::{adapter, filled, values, Q, V};
use super::*;
use crate::error::Result;
use crate::monteclora::MonteCLoRAConfig;

/// The weight update of the layer at `path`, at a reader's scale.
fn update(file: &AdapterFile, path: &str, scale: f64) -> Result<Vec<f32>> {
    Ok(values(&(file.layers[path].b.matmul(&file.layers[path].a)? * scale)?))
}

fn bare() -> AdapterFile {
    let mut file = adapter();
    (file.saved_modules, file.config.modules_to_save) = (BTreeMap::new(), None);
    file
}

fn served(file: &AdapterFile, fold_rslora: bool) -> Result<AdapterFile> {
    let dir = tempfile::tempdir().unwrap();
    file.write(dir.path(), ExportFormat::Serving { fold_rslora })?;
    let text = fs::read_to_string(dir.path().join(CONFIG_FILE)).unwrap();
    for words in ["\"rank_pattern\": {}", "\"alpha_pattern\": {}"] {
        assert!(text.contains(words) && !text.contains("monteclora"), "{text}");
    }
    AdapterFile::read(dir.path())
}

#[test]
fn serving_computes_the_same_for_every_reader() -> Result<()> {
    for (use_rslora, fold_rslora, patterns) in [false, true]
        .into_iter()
        .flat_map(|r| [false, true].map(|f| (r, f)))
        .flat_map(|(r, f)| [false, true].map(|patterns| (r, f, patterns)))
    {
        let mut file = bare();
        file.config.use_rslora = use_rslora;
        if patterns {
            file.config.alpha_pattern = vec![("query".into(), 11.0)]
        } else {
            file.layers.remove(V);
        }
        let read = served(&file, fold_rslora)?;
        let case = format!("rslora {use_rslora}, fold {fold_rslora}, patterns {patterns}");
        assert_eq!(read.config.use_rslora, use_rslora && !fold_rslora, "{case}");
        assert_eq!((read.config.r, read.config.lora_alpha), (3, 7.0), "{case}");
        for (path, layer) in &read.layers {
            assert!(layer.sampler.is_none() && layer.a.dim(0)? == 3, "{case}");
            // vLLM uses one rank and one alpha; llama.cpp divides alpha by the rank of the tensor.
            let scale = if read.config.use_rslora { 7.0 / 3f64.sqrt() } else { 7.0 / layer.a.dim(0)? as f64 };
            let was = update(&file, path, file.config.scales_of(&[path])?[0])?;
            let pairs = was.into_iter().zip(update(&read, path, scale)?);
            assert!(pairs.into_iter().all(|(x, y)| (x - y).abs() <= 1e-5 * x.abs()), "{case}: {path}");
        }
        // B is unchanged if the scale does not change.
        let untouched = values(&read.layers[Q].b) == values(&file.layers[Q].b);
        assert_eq!(untouched, !patterns && (!use_rslora || !fold_rslora), "{case}");
    }
    Ok(())
}

#[test]
fn serving_names_its_layers_and_has_no_head() -> Result<()> {
    let names = |names: &[&str]| Some(TargetModules::Names(names.iter().map(ToString::to_string).collect()));
    let mut file = bare();
    assert_eq!(served(&file, true)?.config.target_modules, names(&["query", "value"]));
    file.config.target_modules = Some(TargetModules::Pattern(r".*\.(query|value)".into()));
    file.config.exclude_modules = Some(TargetModules::Names(vec!["key".into()]));
    let config = served(&file, true)?.config;
    assert_eq!((config.target_modules, config.exclude_modules), (names(&[Q, V]), None));
    let dir = tempfile::tempdir().unwrap();
    let message =
        adapter().write(dir.path(), ExportFormat::Serving { fold_rslora: false }).unwrap_err().to_string();
    assert!(message.contains("classifier.dense.weight"), "{message}");
    Ok(())
}

#[test]
fn an_interrupted_write_is_refused_and_never_a_mixture() -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    let own = |sample_scaler| {
        let mut file = adapter();
        file.monteclora = Some(MonteCLoRAConfig { df: Some(sample_scaler), ..MonteCLoRAConfig::paper() });
        file
    };
    own(9.0).write(dir.path(), ExportFormat::Peft)?;
    let weights = dir.path().join(WEIGHTS_FILE);
    let before = fs::read(&weights).unwrap();
    // A folder in place of the weights file makes the write fail where a crash could.
    fs::remove_file(&weights).unwrap();
    fs::create_dir_all(weights.join("in the way")).unwrap();
    let message = own(11.0).write(dir.path(), ExportFormat::Peft).unwrap_err().to_string();
    assert!(message.starts_with(&format!("{}: ", weights.display())), "{message}");
    fs::remove_dir_all(&weights).unwrap();
    fs::write(&weights, before).unwrap();
    let message = AdapterFile::read(dir.path()).unwrap_err().to_string();
    assert!(message.contains(CONFIG_FILE), "{message}");
    own(11.0).write(dir.path(), ExportFormat::Peft)?;
    assert_eq!(AdapterFile::read(dir.path())?.monteclora.unwrap().df, Some(11.0));
    Ok(())
}

#[test]
fn our_own_settings_are_checked_and_named() -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    let mut file = adapter();
    file.monteclora = Some(MonteCLoRAConfig::paper());
    file.write(dir.path(), ExportFormat::Peft)?;
    let own = dir.path().join(OWN_FILE);
    let text = fs::read_to_string(&own).unwrap();
    for (from, to, words) in [
        ("\"df\": null", "\"df\": 1.5", "invalid df: expected more than rank - 1 = 7"),
        ("\"cooperative_weight\": 1.0", "\"cooperative_weight\": -1.0", "invalid cooperative_weight"),
        ("\"df\": null", "\"dff\": null", "unknown field `dff`"),
        ("\"collapsed\"", "\"folded\"", "unknown variant `folded`"),
    ] {
        assert!(text.contains(from), "{text}");
        fs::write(&own, text.replace(from, to)).unwrap();
        let message = AdapterFile::read(dir.path()).unwrap_err().to_string();
        assert!(message.contains(OWN_FILE) && message.contains(words), "{message}");
    }
    file.monteclora = Some(MonteCLoRAConfig { df: Some(f64::NAN), ..MonteCLoRAConfig::paper() });
    let message = file.write(dir.path(), ExportFormat::Peft).unwrap_err().to_string();
    assert!(message.contains(OWN_FILE) && message.contains("df"), "{message}");
    let layer = file.layers.get_mut(Q).unwrap();
    (file.monteclora, layer.a) = (None, filled(&[4, 6], 1.0));
    assert!(file
        .check()
        .unwrap_err()
        .to_string()
        .contains("query.lora_A.weight: expected shape (3, in_dim)"));
    Ok(())
}
