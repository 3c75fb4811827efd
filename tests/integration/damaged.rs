//! Checkpoints that lack a tensor, have half a head, or are not finite.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use monteclora::models::hub::ModelFiles;
use monteclora::train::Method;

use crate::support::checkpoints::{checkpoint, load, methods};
use crate::support::Outcome;

#[test]
fn a_checkpoint_with_a_hole_is_refused_by_every_method() -> Outcome {
    let (dir, other) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let name = "roberta.encoder.layer.1.attention.self.key.weight";
    let files = changed(&checkpoint(dir.path())?, other.path(), |weights| {
        weights.remove(name);
        Ok(())
    })?;
    for method in methods() {
        let error = load(&files, &method, 2).map(drop).unwrap_err().to_string();
        assert!(error.contains(name), "{}: {error}", method.name());
    }
    Ok(())
}

/// Writes the checkpoint `whole` with changed weights into the folder `dir`.
fn changed(
    whole: &ModelFiles,
    dir: &Path,
    change: impl FnOnce(&mut HashMap<String, Tensor>) -> Outcome,
) -> Outcome<ModelFiles> {
    let mut weights = candle_core::safetensors::load(&whole.weights()[0], &Device::Cpu)?;
    change(&mut weights)?;
    candle_core::safetensors::save(&weights, dir.join("model.safetensors"))?;
    std::fs::copy(whole.config_path(), dir.join("config.json"))?;
    Ok(ModelFiles::locate(dir.to_str().ok_or("a path")?, None)?)
}

#[test]
fn a_checkpoint_with_half_a_head_is_refused_by_the_tensor_it_lacks() -> Outcome {
    let (dir, other) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let whole = checkpoint(dir.path())?;
    let missing = "classifier.out_proj.bias";
    let head = [("classifier.dense.weight", vec![32, 32]), ("classifier.dense.bias", vec![32])];
    let files = changed(&whole, other.path(), |weights| {
        for (name, shape) in head.into_iter().chain([("classifier.out_proj.weight", vec![2, 32])]) {
            weights.insert(name.to_string(), Tensor::ones(shape, DType::F32, &Device::Cpu)?);
        }
        Ok(())
    })?;
    for method in methods() {
        let error = load(&files, &method, 2).map(drop).unwrap_err().to_string();
        assert!(error.starts_with(&format!("tensor {missing}: ")), "{}: {error}", method.name());
        assert!(error.contains("the checkpoint has classifier.dense"), "{error}");
        load(&whole, &method, 2)?; // without any head
    }
    let files = changed(&files, dir.path(), |weights| {
        weights.insert(missing.to_string(), Tensor::ones(2, DType::F32, &Device::Cpu)?);
        Ok(())
    })?;
    let classifier = load(&files, &Method::Full, 2)?;
    let bias = classifier.params.get(missing).ok_or("no bias")?;
    assert_eq!(bias.var.to_vec1::<f32>()?, [1.0, 1.0]);
    Ok(())
}

#[test]
fn a_checkpoint_that_is_not_finite_is_refused_by_every_method() -> Outcome {
    let (dir, other) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let name = "roberta.encoder.layer.1.output.dense.bias";
    let files = changed(&checkpoint(dir.path())?, other.path(), |weights| {
        let bad = Tensor::full(f32::NAN, 32, &Device::Cpu)?;
        weights.insert(name.to_string(), bad);
        Ok(())
    })?;
    for method in methods() {
        let error = load(&files, &method, 2).map(drop).unwrap_err().to_string();
        assert!(error.contains(&format!("model.safetensors: tensor {name}: it holds NaN")), "{error}");
    }
    Ok(())
}
