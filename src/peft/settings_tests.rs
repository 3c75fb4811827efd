//! Tests of settings that other writers omit or set to null, and of the data in `monteclora.json`.

use std::collections::HashMap;

use serde_json::{json, Value};

use super::tests::{adapter, Files};
use super::*;
use crate::error::Result;
use crate::{Labels, MonteCLoRAConfig};

#[test]
fn an_initialisation_that_leaves_the_base_alone_is_plain_lora() -> Result<()> {
    let mut files = Files::new();
    for init in ["gaussian", "Gaussian", "GAUSSIAN", "orthogonal", "eva", "mica", "MiCA"] {
        files.config["init_lora_weights"] = json!(init);
        assert_eq!(files.read()?.layers.len(), 2, "{init}");
    }
    Ok(())
}

#[test]
fn every_null_is_as_good_as_an_absent_setting() {
    let read = |config: Value, outer: Option<Value>| {
        let mut files = Files::new();
        files.config = match outer {
            Some(mut outer) => {
                outer["monteclora_config"] = config;
                outer
            }
            None => config,
        };
        let read = files.read();
        // Each attempt has its own folder: compare the messages without the path.
        let reason = |error: String| error.split_once(": ").map(|(_, reason)| reason.to_string());
        read.map(|file| format!("{:?}", file.config)).map_err(|error| reason(error.to_string()))
    };
    let whole = Files::new().config;
    let inner = whole["monteclora_config"].clone();
    for (config, outer) in [(whole.clone(), None), (inner, Some(whole))] {
        for name in config.as_object().unwrap().keys() {
            let (mut null, mut absent) = (config.clone(), config.clone());
            null[name] = Value::Null;
            absent.as_object_mut().unwrap().remove(name);
            assert_eq!(read(null, outer.clone()), read(absent, outer.clone()), "{name}");
        }
    }
}

#[test]
fn the_names_of_a_head_are_kept_beside_it() -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    let own = dir.path().join(OWN_FILE);
    let mut file = adapter();
    file.labels = Some(Labels::new(["no", "yes"])?);
    for monteclora in [None, Some(MonteCLoRAConfig::paper())] {
        file.monteclora = monteclora.clone();
        file.write(dir.path(), ExportFormat::Peft)?;
        let read = AdapterFile::read(dir.path());
        match &monteclora {
            // With names alone, the file has no MonteCLoRA settings.
            None => assert!(read.is_ok_and(|read| read.monteclora.is_none() && read.labels == file.labels)),
            Some(_) => {
                assert!(read.is_ok_and(|read| read.monteclora == monteclora && read.labels == file.labels))
            }
        }
    }
    // Names left by an earlier adapter in the folder are ignored.
    let mut config = Files::new().config;
    config["monteclora_config"] = Value::Null;
    let layers = |key: &String| !key.contains("sampler");
    let tensors: HashMap<_, _> = Files::new().tensors.into_iter().filter(|(key, _)| layers(key)).collect();
    candle_core::safetensors::save(&tensors, dir.path().join(WEIGHTS_FILE))?;
    std::fs::write(dir.path().join(CONFIG_FILE), config.to_string()).unwrap();
    assert_eq!(AdapterFile::read(dir.path())?.labels, None);
    std::fs::write(&own, "{\"id2label\": {\"0\": \"a\", \"1\": \"b\"}}").unwrap();
    assert_eq!(AdapterFile::read(dir.path())?.labels, Some(Labels::new(["a", "b"])?));
    std::fs::write(&own, "{\"id2label\": {\"0\": \"a\", \"2\": \"b\"}}").unwrap();
    let message = AdapterFile::read(dir.path()).unwrap_err().to_string();
    assert!(
        message.contains(OWN_FILE) && message.contains("id2label: expected the numbers 0 to 1"),
        "{message}"
    );
    file.labels = None;
    file.monteclora = None;
    file.write(dir.path(), ExportFormat::Peft)?;
    assert!(!own.exists());
    Ok(())
}

#[test]
fn a_classifiers_head_is_its_own_though_old_configurations_do_not_list_it() -> Result<()> {
    let mut old = Files::new();
    (old.config["modules_to_save"], old.config["task_type"]) = (Value::Null, json!("SEQ_CLS"));
    assert_eq!(old.read()?.saved_modules.len(), adapter().saved_modules.len());
    old.config["task_type"] = json!("CAUSAL_LM");
    assert!(old.refusal(WEIGHTS_FILE).contains("classifier.dense.weight"));
    Ok(())
}

#[test]
fn what_is_not_supported_is_refused_where_it_is_switched_on() -> Result<()> {
    for (key, what) in super::config::REFUSED {
        let mut files = Files::new();
        for off in [json!(null), json!(false), json!([]), json!({})] {
            files.config[key] = off;
            files.read()?;
        }
        for on in [json!(true), json!({"x": 1}), json!([1])] {
            files.config[key] = on;
            let error = files.read().err().map(|error| error.to_string()).unwrap_or_default();
            assert!(error.contains(&format!("{key}: {what} is not supported")), "{key}: {error}");
        }
    }
    Ok(())
}
