//! The encoders against an independent implementation, candle-transformers.

use std::collections::HashMap;

use crate::support::{assert_close, padded_batch, toy_classifier, toy_config, toy_weights, Outcome};
use candle_core::{DType, Device, Tensor};
use candle_nn::{Activation, VarBuilder};
use candle_transformers::models::{bert, xlm_roberta};
use monteclora::adapter::{Context, Params, Pass, Role};
use monteclora::models::roberta::{
    Family, RobertaConfig, RobertaEncoder, RobertaForMaskedLM, RobertaForSequenceClassification,
};
use monteclora::noise::Noise;
use monteclora::ops::OpPath;

fn frozen(weights: &HashMap<String, Tensor>) -> VarBuilder<'static> {
    VarBuilder::from_tensors(weights.clone(), DType::F32, &Device::Cpu)
}

pub fn xlm_config(config: &RobertaConfig) -> xlm_roberta::Config {
    xlm_roberta::Config {
        hidden_size: config.hidden_size,
        layer_norm_eps: config.layer_norm_eps,
        attention_probs_dropout_prob: 0.0,
        hidden_dropout_prob: 0.0,
        num_attention_heads: config.num_attention_heads,
        position_embedding_type: "absolute".into(),
        intermediate_size: config.intermediate_size,
        hidden_act: Activation::Gelu,
        num_hidden_layers: config.num_hidden_layers,
        vocab_size: config.vocab_size,
        max_position_embeddings: config.max_position_embeddings,
        type_vocab_size: config.type_vocab_size,
        pad_token_id: config.pad_id(),
    }
}

fn bert_config(config: &RobertaConfig) -> Outcome<bert::Config> {
    Ok(serde_json::from_value(serde_json::json!({
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers, "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads, "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0, "max_position_embeddings": config.max_position_embeddings,
        "type_vocab_size": config.type_vocab_size, "initializer_range": 0.02,
        "layer_norm_eps": config.layer_norm_eps, "pad_token_id": 0, "model_type": "bert",
    }))?)
}

#[test]
fn roberta_classifies_as_candle_transformers_does() -> Outcome {
    let config = toy_config(Family::Roberta);
    let weights = toy_weights(|vb, noise| {
        RobertaForSequenceClassification::load(vb.clone(), vb, &config, noise).map(drop)
    })?;
    let (ids, types, mask) = padded_batch(&config)?;
    let vb = frozen(&weights);
    let oracle = xlm_roberta::XLMRobertaForSequenceClassification::new(3, &xlm_config(&config), vb.clone())?;
    let expected = oracle.forward(&ids, &mask, &types)?;
    let model = RobertaForSequenceClassification::load(vb.clone(), vb, &config, Noise::new(0))?;
    let logits = model.forward(&ids, Some(&types), &mask, &Pass::Mean.into())?;
    assert_eq!(logits.dims(), [3, 3]);
    assert_close(&logits, &expected, 2e-5)?;
    let without_types = model.forward(&ids, None, &mask, &Pass::Mean.into())?;
    assert_close(&without_types, &expected, 2e-5)
}

#[test]
fn roberta_names_masked_tokens_as_candle_transformers_does() -> Outcome {
    let config = toy_config(Family::Roberta);
    let weights = toy_weights(|vb, noise| RobertaForMaskedLM::load(vb, &config, noise).map(drop))?;
    let (ids, types, mask) = padded_batch(&config)?;
    let vb = frozen(&weights);
    let oracle = xlm_roberta::XLMRobertaForMaskedLM::new(&xlm_config(&config), vb.clone())?;
    // candle-transformers omits the projection's bias, so it is added here.
    let t = ids.dim(1)?;
    let expected = oracle
        .forward(&ids, &mask, &types, None, None, None)?
        .broadcast_add(&weights["lm_head.bias"])?
        .reshape((3 * t, config.vocab_size))?;
    let positions = Tensor::new(&[1u32, 2, t as u32 + 1, 2 * t as u32], &Device::Cpu)?;
    let model = RobertaForMaskedLM::load(vb, &config, Noise::new(0))?;
    let logits = model.forward(&ids, None, &mask, &positions, &Pass::Mean.into())?;
    assert_close(&logits, &expected.index_select(&positions, 0)?, 5e-5)
}

#[test]
fn bert_encodes_as_candle_transformers_does() -> Outcome {
    let config = toy_config(Family::Bert);
    let weights = toy_weights(|vb, noise| RobertaEncoder::load(&vb, &config, noise).map(drop))?;
    let (ids, types, mask) = padded_batch(&config)?;
    let oracle = bert::BertModel::load(frozen(&weights), &bert_config(&config)?)?;
    let expected = oracle.forward(&ids, &types, Some(&mask))?;
    let model = RobertaEncoder::load(frozen(&weights), &config, Noise::new(0))?;
    let hidden = model.forward(&ids, Some(&types), &mask, &Pass::Mean.into())?;
    // Outputs at padding are arbitrary: compare only real tokens.
    let real = mask.unsqueeze(2)?.to_dtype(DType::F32)?;
    assert_close(&hidden.broadcast_mul(&real)?, &expected.broadcast_mul(&real)?, 5e-5)
}

#[test]
fn bert_names_masked_tokens_as_candle_transformers_does() -> Outcome {
    let config = toy_config(Family::Bert);
    let mut weights = toy_weights(|vb, noise| RobertaForMaskedLM::load(vb, &config, noise).map(drop))?;
    let (ids, types, mask) = padded_batch(&config)?;
    let t = ids.dim(1)?;
    let positions = Tensor::new(&[1u32, 2, t as u32 + 1, 2 * t as u32], &Device::Cpu)?;
    let model = RobertaForMaskedLM::load(frozen(&weights), &config, Noise::new(0))?;
    let logits = model.forward(&ids, Some(&types), &mask, &positions, &Pass::Mean.into())?;
    // candle-transformers does not tie the projection to the embedding.
    for (projection, tied) in [
        ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ] {
        weights.insert(projection.to_string(), weights[tied].clone());
    }
    let oracle = bert::BertForMaskedLM::load(frozen(&weights), &bert_config(&config)?)?;
    let expected = oracle.forward(&ids, &types, Some(&mask))?.reshape((3 * t, config.vocab_size))?;
    assert_close(&logits, &expected.index_select(&positions, 0)?, 5e-5)
}

#[test]
fn the_norms_of_old_bert_checkpoints_are_called_gamma_and_beta() -> Outcome {
    let config = toy_config(Family::Bert);
    let weights = toy_weights(|vb, noise| {
        RobertaForSequenceClassification::load(vb.clone(), vb, &config, noise).map(drop)
    })?;
    let old_name = |name: &str| {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    };
    let mut old: HashMap<_, _> = weights.iter().map(|(name, t)| (old_name(name), t.clone())).collect();
    let renamed = old.keys().filter(|name| !weights.contains_key(*name)).count();
    assert_eq!(renamed, 2 * (1 + 2 * config.num_hidden_layers));
    let (ids, types, mask) = padded_batch(&config)?;
    let load = |vb: VarBuilder<'static>| {
        RobertaForSequenceClassification::load(vb.clone(), vb, &config, Noise::new(0))
    };
    let expected = load(frozen(&weights))?.forward(&ids, Some(&types), &mask, &Pass::Mean.into())?;
    // Frozen, and trained under full fine-tuning.
    let params = Params::new(Noise::new(0), &Device::Cpu);
    for vb in [frozen(&old), params.var_builder(Some(frozen(&old)), Role::Base)] {
        let logits = load(vb)?.forward(&ids, Some(&types), &mask, &Pass::Mean.into())?;
        assert_close(&logits, &expected, 0.0)?;
    }
    assert!(params.get("bert.encoder.layer.1.output.LayerNorm.gamma").is_some());
    let half = "bert.encoder.layer.1.output.LayerNorm.beta";
    old.remove(half);
    let error = load(frozen(&old)).expect_err("an error").to_string();
    assert!(error.contains(half), "{error}");
    Ok(())
}

#[test]
fn a_checkpoint_loads_with_and_without_its_prefix() -> Outcome {
    for family in [Family::Roberta, Family::Bert] {
        let config = toy_config(family);
        let weights = toy_weights(|vb, noise| {
            RobertaForSequenceClassification::load(vb.clone(), vb, &config, noise).map(drop)
        })?;
        let prefix = format!("{}.", family.prefix());
        let bare: HashMap<_, _> = weights
            .iter()
            .map(|(name, t)| (name.strip_prefix(&prefix).unwrap_or(name).to_string(), t.clone()))
            .collect();
        let (ids, types, mask) = padded_batch(&config)?;
        let logits = |weights| -> Outcome<Tensor> {
            let vb = frozen(weights);
            let model = RobertaForSequenceClassification::load(vb.clone(), vb, &config, Noise::new(0))?;
            Ok(model.forward(&ids, Some(&types), &mask, &Pass::Mean.into())?)
        };
        assert_close(&logits(&bare)?, &logits(&weights)?, 0.0)?;
    }
    Ok(())
}

#[test]
fn padding_does_not_change_a_prediction() -> Outcome {
    for family in [Family::Roberta, Family::Bert] {
        let config = toy_config(family);
        let (model, _) = toy_classifier(&config, Role::Base, DType::F32)?;
        let (ids, types, mask) = padded_batch(&config)?;
        let together = model.forward(&ids, Some(&types), &mask, &Pass::Mean.into())?;
        // Row 1 has 4 real tokens.
        let cut = |x: &Tensor| x.narrow(0, 1, 1)?.narrow(1, 0, 4)?.contiguous();
        let alone = model.forward(&cut(&ids)?, Some(&cut(&types)?), &cut(&mask)?, &Pass::Mean.into())?;
        assert_close(&alone, &together.narrow(0, 1, 1)?, 1e-5)?;
    }
    Ok(())
}

#[test]
fn the_first_token_is_that_of_the_whole_whatever_the_padding() -> Outcome {
    let config = toy_config(Family::Roberta);
    let weights = toy_weights(|vb, noise| RobertaEncoder::load(&vb, &config, noise).map(drop))?;
    let model = RobertaEncoder::load(frozen(&weights), &config, Noise::new(0))?;
    let (ids, types, right) = padded_batch(&config)?;
    let full = Tensor::ones((3, 7), DType::U8, &Device::Cpu)?;
    // The second row is padded on the left: its first column is padding, and the rows are not packed.
    let left =
        Tensor::new(&[[1u8, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]], &Device::Cpu)?;
    for mask in [&full, &right, &left] {
        for path in [OpPath::Fused, OpPath::Composed] {
            let cx = Context::from(Pass::Mean).with_path(path);
            let whole = model.forward(&ids, Some(&types), mask, &cx)?.narrow(1, 0, 1)?.squeeze(1)?;
            let first = model.first_token(&ids, Some(&types), mask, &cx)?;
            assert_close(&first, &whole, 2e-6)?;
        }
    }
    Ok(())
}

#[test]
fn a_checkpoint_that_does_not_fit_is_refused_by_the_tensor_at_fault() -> Outcome {
    let config = toy_config(Family::Roberta);
    let weights = toy_weights(|vb, noise| {
        RobertaForSequenceClassification::load(vb.clone(), vb, &config, noise).map(drop)
    })?;
    let load = |weights: &HashMap<String, Tensor>| {
        let vb = frozen(weights);
        let loaded = RobertaForSequenceClassification::load(vb.clone(), vb, &config, Noise::new(0));
        loaded.expect_err("an error").to_string()
    };
    for name in ["roberta.encoder.layer.1.attention.self.key.weight", "classifier.dense.bias"] {
        let mut missing = weights.clone();
        missing.remove(name);
        let error = load(&missing);
        assert!(error.contains(name), "{name}: {error}");
        let mut narrow = weights.clone();
        narrow.insert(name.to_string(), weights[name].narrow(0, 0, 31)?.contiguous()?);
        let error = load(&narrow);
        assert!(error.contains(name) && error.contains("31"), "{name}: {error}");
    }
    Ok(())
}

#[test]
fn a_sequence_longer_than_the_model_is_refused() -> Outcome {
    let config = toy_config(Family::Roberta);
    let (model, _) = toy_classifier(&config, Role::Base, DType::F32)?;
    let long = Tensor::full(5u32, (1, config.max_length() + 1), &Device::Cpu)?;
    let mask = long.ones_like()?.to_dtype(DType::U8)?;
    let error = model.forward(&long, None, &mask, &Pass::Mean.into()).unwrap_err().to_string();
    assert!(error.contains("max_length") && error.contains("more than the model's 38"), "{error}");
    Ok(())
}

#[test]
fn the_configured_dropouts_act_in_training_alone() -> Outcome {
    let config = toy_config(Family::Roberta);
    let (ids, types, mask) = padded_batch(&config)?;
    let out = |config: &RobertaConfig, pass: Pass| -> Outcome<Vec<f32>> {
        let (model, _) = toy_classifier(config, Role::Base, DType::F32)?;
        Ok(model.forward(&ids, Some(&types), &mask, &pass.into())?.flatten_all()?.to_vec1()?)
    };
    let mean = out(&config, Pass::Mean)?;
    assert_eq!(mean, out(&config, Pass::Posterior { draw: 3 })?);
    // Each dropout alone changes the output; the same draw gives the same output.
    let only = |hidden, attention, head| RobertaConfig {
        hidden_dropout_prob: hidden,
        attention_probs_dropout_prob: attention,
        classifier_dropout: Some(head),
        ..config.clone()
    };
    assert_eq!(mean, out(&only(0.0, 0.0, 0.0), Pass::Train { draw: 1 })?);
    for dropped in [only(0.3, 0.0, 0.0), only(0.0, 0.3, 0.0), only(0.0, 0.0, 0.3)] {
        let one = out(&dropped, Pass::Train { draw: 1 })?;
        assert_ne!(one, mean);
        assert_eq!(one, out(&dropped, Pass::Train { draw: 1 })?);
        assert_ne!(one, out(&dropped, Pass::Train { draw: 2 })?);
    }
    Ok(())
}
