//! Shared by the integration tests: toy encoders in general position, and helpers.

use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use monteclora::adapter::{Params, Role};
use monteclora::models::roberta::{Family, RobertaConfig, RobertaForSequenceClassification};
use monteclora::noise::{Noise, Purpose};

/// A test's result.
pub type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

/// Reports that a test was skipped, in a way that the test runner does not capture.
pub fn skipped(why: &str) {
    writeln!(std::io::stderr(), "skipped: {why}").ok();
}

/// A bundled file or folder. These tests are not in the published package, so it must be there.
pub fn asset(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/assets").join(name);
    assert!(path.exists(), "{}: no such file or folder", path.display());
    path
}

/// A case of `shared/cases` in a folder above the crate; if there is none, reports that.
pub fn case(name: &str) -> Option<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let found =
        here.ancestors().skip(1).map(|up| up.join("shared/cases").join(name)).find(|dir| dir.is_dir());
    if found.is_none() {
        skipped(&format!("no shared/cases/{name} beside the crate"));
    }
    found
}

/// A file or folder of `tests/data`.
pub fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

/// The tensors of `tests/data/{file}_golden.safetensors` whose names begin with `prefix/`, without it.
pub fn golden(file: &str, prefix: &str) -> Outcome<HashMap<String, Tensor>> {
    let path = data(&format!("{file}_golden.safetensors"));
    let all = candle_core::safetensors::load(path, &Device::Cpu)?.into_iter();
    let prefix = format!("{prefix}/");
    Ok(all.filter_map(|(name, t)| Some((name.strip_prefix(&prefix)?.to_string(), t))).collect())
}

/// These tensors as weights of a model.
pub fn vb(tensors: &HashMap<String, Tensor>, dtype: DType) -> VarBuilder<'static> {
    VarBuilder::from_tensors(tensors.clone(), dtype, &Device::Cpu)
}

/// A configuration with three labels, two layers, and all widths different.
pub fn toy_config(family: Family) -> RobertaConfig {
    let (pad, types) = match family {
        Family::Roberta => (1, 1),
        Family::Bert | Family::Electra => (0, 2),
    };
    let value = serde_json::json!({
        "model_type": family.prefix(), "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 40,
        "type_vocab_size": types, "layer_norm_eps": 1e-5, "pad_token_id": pad,
    });
    let config: RobertaConfig = serde_json::from_value(value).expect("a valid configuration");
    config.with_num_labels(3)
}

/// Three rows of 7, 4 and 5 real tokens: ids, token types, attention mask.
pub fn padded_batch(config: &RobertaConfig) -> Outcome<(Tensor, Tensor, Tensor)> {
    let mut ids = vec![config.pad_id(); 21];
    let (mut types, mut mask) = (vec![0u32; 21], vec![0u8; 21]);
    for (row, length) in [7, 4, 5].into_iter().enumerate() {
        for column in 0..length {
            let i = row * 7 + column;
            ids[i] = 3 + ((i * 17 + row) % 40) as u32;
            types[i] = u32::from(config.type_vocab_size > 1 && column > 2);
            mask[i] = 1;
        }
    }
    let device = &Device::Cpu;
    Ok((
        Tensor::from_vec(ids, (3, 7), device)?,
        Tensor::from_vec(types, (3, 7), device)?,
        Tensor::from_vec(mask, (3, 7), device)?,
    ))
}

/// Moves every parameter into general position: biases are not 0, norms are not 1.
pub fn scatter(params: &Params) -> Outcome {
    for (name, param) in params.all() {
        let mut z = vec![0.0; param.var.elem_count()];
        Noise::new(11).stream(&name, Purpose::Init).fill_normal(0, &mut z);
        let z = Tensor::from_vec(z, param.var.shape(), params.device())?.to_dtype(params.dtype())?;
        params.set(&name, &(param.var.as_tensor() + (z * 0.15)?)?.detach())?;
    }
    Ok(())
}

/// The weights of the model that `load` builds, in general position.
pub fn toy_weights(
    load: impl Fn(VarBuilder<'static>, Noise) -> monteclora::Result<()>,
) -> Outcome<HashMap<String, Tensor>> {
    let params = Params::new(Noise::new(5), &Device::Cpu);
    load(params.var_builder(None, Role::Base), Noise::new(0))?;
    scatter(&params)?;
    let all = params.all().into_iter();
    Ok(all.map(|(name, param)| (name, param.var.as_detached_tensor())).collect())
}

/// A classifier in general position. With `Role::Base` all of it is trainable, with `Role::Head`
/// only its head.
pub fn toy_classifier(
    config: &RobertaConfig,
    role: Role,
    dtype: DType,
) -> Outcome<(RobertaForSequenceClassification, Params)> {
    let all = Params::with_dtype(Noise::new(5), dtype, &Device::Cpu);
    let vb = all.var_builder(None, Role::Base);
    let model = RobertaForSequenceClassification::load(vb.clone(), vb, config, Noise::new(0))?;
    scatter(&all)?;
    if role == Role::Base {
        return Ok((model, all));
    }
    let weights = all.all().into_iter().map(|(name, param)| (name, param.var.as_detached_tensor()));
    let vb = VarBuilder::from_tensors(weights.collect(), dtype, &Device::Cpu);
    let params = Params::with_dtype(Noise::new(6), dtype, &Device::Cpu);
    let head = params.var_builder(Some(vb.clone()), Role::Head);
    Ok((RobertaForSequenceClassification::load(vb, head, config, Noise::new(0))?, params))
}

/// Asserts that every element is within `tolerance`, which is absolute.
pub fn assert_close(got: &Tensor, expected: &Tensor, tolerance: f64) -> Outcome {
    assert_eq!(got.dims(), expected.dims());
    let wide = |t: &Tensor| t.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
    let (got, expected) = (wide(got)?, wide(expected)?);
    for (i, (g, e)) in got.iter().zip(&expected).enumerate() {
        assert!((g - e).abs() <= tolerance, "element {i}: got {g}, expected {e} within {tolerance}");
    }
    Ok(())
}

/// The recipe of this name with rank 4 and alpha 8, if it has them.
pub fn small(name: &str) -> String {
    match name {
        "full" | "ia3" | "prompt" => name.to_string(),
        "bottleneck" => format!("{name}:rank=4"),
        _ => format!("{name}:rank=4:alpha=8"),
    }
}
