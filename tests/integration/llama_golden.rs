//! Tests of LLaMA and its adapters against Hugging Face transformers and PEFT (golden values of
//! `tests/data/make_llama_golden.py`).

use std::collections::HashMap;

use crate::support::{assert_close, data, golden, vb, Outcome};
use candle_core::{DType, Device, Tensor};
use monteclora::adapter::{Context, Params, Pass, Role};
use monteclora::inject::merge::merge;
use monteclora::models::causal::CausalLm;
use monteclora::models::decoder::{DecoderConfig, DecoderForCausalLM, DecoderForSequenceClassification};
use monteclora::noise::Noise;
use monteclora::ops::{self, OpPath};
use monteclora::peft::AdapterFile;

const MODELS: [&str; 2] = ["toy_llama", "toy_llama3"];

/// One model's part of the golden file.
struct Golden {
    tensors: HashMap<String, Tensor>,
    config: DecoderConfig,
}

impl Golden {
    fn open(name: &str) -> Outcome<Self> {
        let config = DecoderConfig::from_file(&data(&format!("{name}_config.json")))?;
        Ok(Self { tensors: golden("llama", name)?, config })
    }

    fn model(&self, dtype: DType) -> Outcome<DecoderForCausalLM> {
        Ok(DecoderForCausalLM::load(vb(&self.tensors, dtype), &self.config, Noise::new(0))?)
    }

    /// Ids and attention mask, padded on one side.
    fn inputs(&self, side: &str) -> Outcome<(Tensor, Tensor)> {
        let ids = self.tensors[&format!("{side}input_ids")].to_dtype(DType::U32)?;
        Ok((ids, self.tensors[&format!("{side}attention_mask")].to_dtype(DType::U8)?))
    }

    /// Compares the logits of real tokens with those of the file.
    fn compare(&self, logits: &Tensor, name: &str, side: &str, tolerance: f64) -> Outcome {
        let real = self.inputs(side)?.1.unsqueeze(2)?.to_dtype(logits.dtype())?;
        let expected = self.tensors[name].to_dtype(logits.dtype())?.broadcast_mul(&real)?;
        assert_close(&logits.broadcast_mul(&real)?, &expected, tolerance)
    }
}

#[test]
fn the_head_gives_the_logits_of_transformers_with_padding_on_either_side() -> Outcome {
    for name in MODELS {
        let golden = Golden::open(name)?;
        for (dtype, tolerance) in [(DType::F32, 1e-4), (DType::F64, 5e-6)] {
            let model = golden.model(dtype)?;
            for (side, path) in
                ["", "left_"].into_iter().flat_map(|side| OpPath::ALL.map(|path| (side, path)))
            {
                let (ids, mask) = golden.inputs(side)?;
                let logits = model.logits(&ids, &mask, &Context::from(Pass::Mean).with_path(path))?;
                golden.compare(&logits, &format!("{side}logits"), side, tolerance)?;
            }
        }
    }
    Ok(())
}

#[test]
fn loss_and_gradients_are_those_of_transformers() -> Outcome {
    for name in MODELS {
        let golden = Golden::open(name)?;
        let params = Params::new(Noise::new(0), &Device::Cpu);
        let vb = params.var_builder(Some(vb(&golden.tensors, DType::F32)), Role::Base);
        let model = DecoderForCausalLM::load(vb, &golden.config, Noise::new(0))?;
        let (ids, mask) = golden.inputs("")?;
        let t = ids.dim(1)?;
        let labels = golden.tensors["labels"].narrow(1, 1, t - 1)?.flatten_all()?;
        for path in OpPath::ALL {
            let logits = model.logits(&ids, &mask, &Context::from(Pass::Mean).with_path(path))?;
            let logits = logits.narrow(1, 0, t - 1)?.contiguous()?.flatten_to(1)?;
            let loss = ops::cross_entropy(&logits, &labels, -100, path)?;
            assert_close(&loss, &golden.tensors["loss"].squeeze(0)?, 1e-5)?;
            let grads = loss.backward()?;
            for name in ["model.layers.0.self_attn.k_proj.weight", "model.embed_tokens.weight"] {
                let param = params.get(name).ok_or("no such parameter")?;
                let grad = grads.get(&param.var).ok_or("no gradient")?;
                assert_close(grad, &golden.tensors[&format!("grad.{name}")], 2e-5)?;
            }
        }
    }
    Ok(())
}

#[test]
fn the_classifier_gives_the_logits_of_transformers() -> Outcome {
    for name in MODELS {
        let golden = Golden::open(name)?;
        let (ids, mask) = golden.inputs("")?;
        let (vb, config) = (vb(&golden.tensors, DType::F32), &golden.config);
        let model = DecoderForSequenceClassification::load(vb.clone(), vb, config, Noise::new(0))?;
        assert_eq!(config.num_labels, 3);
        assert_close(&model.forward(&ids, &mask, &Pass::Mean.into())?, &golden.tensors["cls_logits"], 1e-4)?;
    }
    Ok(())
}

#[test]
fn adapters_of_python_peft_give_the_logits_that_peft_gives_merged_or_not() -> Outcome {
    for name in MODELS {
        let golden = Golden::open(name)?;
        let (ids, mask) = golden.inputs("")?;
        for (kind, layers) in [("lora", 12), ("monteclora", 6)] {
            let mut model = golden.model(DType::F32)?;
            let params = Params::new(Noise::new(0), &Device::Cpu);
            let file = AdapterFile::read(data(&format!("peft_adapters/{name}_{kind}")))?;
            assert_eq!(file.layers.len(), layers);
            file.apply(&mut model, "default", &params)?;
            let expected = format!("{kind}_logits");
            golden.compare(&model.logits(&ids, &mask, &Pass::Mean.into())?, &expected, "", 1e-4)?;
            merge(&mut model)?;
            golden.compare(&model.logits(&ids, &mask, &Pass::Mean.into())?, &expected, "", 1e-4)?;
        }
    }
    Ok(())
}
