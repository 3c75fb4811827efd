//! Toy encoders in general position.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use monteclora::adapter::{Params, Role};
use monteclora::models::roberta::{Family, RobertaConfig, RobertaForSequenceClassification};
use monteclora::noise::Noise;

use super::{scatter, Outcome};

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
