//! Tests of the encoders against Hugging Face transformers (golden values of
//! `tests/data/make_transformers_golden.py`), on every path of the ops.

use std::collections::HashMap;

use crate::support::{assert_close, data, golden, vb, Outcome};
use candle_core::{DType, Device, Tensor};
use monteclora::adapter::{Context, Params, Pass, Role};
use monteclora::models::roberta::{RobertaConfig, RobertaForMaskedLM, RobertaForSequenceClassification};
use monteclora::noise::Noise;
use monteclora::ops::{self, OpPath};
use monteclora::peft::AdapterFile;

/// One model's part of the golden file: weights and expected values, and its configuration.
struct Golden {
    tensors: HashMap<String, Tensor>,
    config: RobertaConfig,
}

impl Golden {
    fn open(family: &str) -> Outcome<Self> {
        let config = RobertaConfig::from_file(&data(&format!("toy_{family}_config.json")))?;
        Ok(Self { tensors: golden("transformers", family)?, config })
    }

    /// Ids, token types if the model has them, attention mask.
    fn inputs(&self) -> Outcome<(Tensor, Option<Tensor>, Tensor)> {
        let types = self.tensors.get("token_type_ids").map(|t| t.to_dtype(DType::U32)).transpose()?;
        let mask = self.tensors["attention_mask"].to_dtype(DType::U8)?;
        Ok((self.tensors["input_ids"].to_dtype(DType::U32)?, types, mask))
    }
}

#[test]
fn classifiers_give_the_logits_of_transformers() -> Outcome {
    for family in ["roberta", "bert"] {
        let golden = Golden::open(family)?;
        let (ids, types, mask) = golden.inputs()?;
        for (dtype, tolerance) in [(DType::F32, 5e-5), (DType::F64, 2e-6)] {
            let vb = vb(&golden.tensors, dtype);
            let model =
                RobertaForSequenceClassification::load(vb.clone(), vb, &golden.config, Noise::new(0))?;
            for path in OpPath::ALL {
                let cx = Context::from(Pass::Mean).with_path(path);
                let logits = model.forward(&ids, types.as_ref(), &mask, &cx)?;
                assert_close(&logits, &golden.tensors["logits"], tolerance)?;
            }
        }
    }
    Ok(())
}

#[test]
fn the_masked_lm_head_gives_the_logits_of_transformers() -> Outcome {
    let golden = Golden::open("roberta")?;
    let (ids, _, mask) = golden.inputs()?;
    let (b, t, vocab) = golden.tensors["mlm_logits"].dims3()?;
    let positions = Tensor::arange(0u32, (b * t) as u32, &Device::Cpu)?;
    let model = RobertaForMaskedLM::load(vb(&golden.tensors, DType::F32), &golden.config, Noise::new(0))?;
    let logits = model.forward(&ids, None, &mask, &positions, &Pass::Mean.into())?;
    // Outputs at padding are arbitrary: compare only real tokens.
    let real = mask.reshape((b * t, 1))?.to_dtype(DType::F32)?;
    let expected = golden.tensors["mlm_logits"].reshape((b * t, vocab))?;
    assert_close(&logits.broadcast_mul(&real)?, &expected.broadcast_mul(&real)?, 1e-4)
}

#[test]
fn gradients_are_those_of_transformers() -> Outcome {
    let golden = Golden::open("roberta")?;
    let (ids, _, mask) = golden.inputs()?;
    let params = Params::new(Noise::new(0), &Device::Cpu);
    let vb = params.var_builder(Some(vb(&golden.tensors, DType::F32)), Role::Base);
    let model = RobertaForSequenceClassification::load(vb.clone(), vb, &golden.config, Noise::new(0))?;
    let expected: Vec<_> = golden.tensors.iter().filter(|(name, _)| name.starts_with("grad.")).collect();
    assert_eq!(expected.len(), 2);
    for path in OpPath::ALL {
        let logits = model.forward(&ids, None, &mask, &Context::from(Pass::Mean).with_path(path))?;
        let loss = ops::cross_entropy(&logits, &golden.tensors["labels"], -100, path)?;
        assert_close(&loss, &golden.tensors["loss"].squeeze(0)?, 1e-5)?;
        let grads = loss.backward()?;
        for (name, expected) in &expected {
            let param =
                params.get(&name["grad.".len()..]).ok_or_else(|| format!("{name} is no parameter"))?;
            let grad = grads.get(&param.var).ok_or_else(|| format!("{name} has no gradient"))?;
            assert_close(grad, expected, 1e-5)?;
        }
    }
    Ok(())
}

#[test]
fn adapters_of_python_peft_give_the_logits_that_peft_gives() -> Outcome {
    let dir = data("peft_adapters");
    let expected = candle_core::safetensors::load(dir.join("expected.safetensors"), &Device::Cpu)?;
    for (family, name) in
        [("roberta", "roberta_monteclora"), ("bert", "bert_lora"), ("roberta", "roberta_lora")]
    {
        let golden = Golden::open(family)?;
        let (ids, types, mask) = golden.inputs()?;
        let params = Params::new(Noise::new(0), &Device::Cpu);
        let vb = vb(&golden.tensors, DType::F32);
        let head = params.var_builder(Some(vb.clone()), Role::Head);
        let mut model = RobertaForSequenceClassification::load(vb, head, &golden.config, Noise::new(0))?;
        let forward = |model: &RobertaForSequenceClassification| {
            model.forward(&ids, types.as_ref(), &mask, &Pass::Mean.into())
        };
        let base = forward(&model)?;
        AdapterFile::read(dir.join(name))?.apply(&mut model, "default", &params)?;
        let logits = forward(&model)?;
        assert_close(&logits, &expected[&format!("{name}/logits")], 1e-4)?;
        let moved = (logits - base)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(moved > 0.05, "the adapter of {name} moves the logits by {moved} only");
    }
    Ok(())
}
