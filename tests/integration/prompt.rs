//! Tests of prompt tuning against Hugging Face PEFT (golden values of `tests/data/make_prompt_golden.py`).

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use monteclora::adapter::{AdaptableEmbedding, AdaptableModel, Context, Params, Pass, Role};
use monteclora::adapters::{prompt_tuning, PromptConfig};
use monteclora::models::causal::CausalLm;
use monteclora::models::decoder::{DecoderConfig, DecoderForCausalLM};
use monteclora::models::roberta::{Family, RobertaConfig, RobertaForSequenceClassification};
use monteclora::noise::Noise;
use monteclora::ops::{self, OpPath};

use crate::support::{assert_close, data, decoders, golden, toy_classifier, toy_config, vb, Outcome};

const PROMPT: &str = "prompt.default";

/// One model's weights and inputs, and PEFT's results for them with virtual tokens.
struct Golden {
    model: HashMap<String, Tensor>,
    prompt: HashMap<String, Tensor>,
}

impl Golden {
    fn open(file: &str, name: &str) -> Outcome<Self> {
        Ok(Self { model: golden(file, name)?, prompt: golden("prompt", name)? })
    }

    fn input(&self, name: &str, dtype: DType) -> Outcome<Tensor> {
        Ok(self.model[name].to_dtype(dtype)?)
    }

    /// Adds the virtual tokens of the file to a model.
    fn tune(&self, model: &mut dyn AdaptableModel) -> Outcome<Params> {
        let params = Params::new(Noise::new(0), &Device::Cpu);
        let embedding = model.embedding_mut().ok_or("no place for a prompt")?;
        prompt_tuning(embedding, "default", &PromptConfig { virtual_tokens: 3 }, &params)?;
        assert_eq!(params.trainable_count(), 3 * 32);
        params.set(PROMPT, &self.prompt["prompt"])?;
        Ok(params)
    }

    /// Checks loss and gradient on every path of the ops.
    fn check(&self, params: &Params, loss: impl Fn(&Context) -> Outcome<Tensor>) -> Outcome {
        for path in OpPath::ALL {
            let loss = loss(&Context::from(Pass::Mean).with_path(path))?;
            assert_close(&loss, &self.prompt["loss"].squeeze(0)?, 1e-5)?;
            let grads = loss.backward()?;
            let grad = grads.get(&params.get(PROMPT).ok_or("no prompt")?.var).ok_or("no gradient")?;
            assert_close(grad, &self.prompt["grad"], 2e-5)?;
        }
        Ok(())
    }
}

#[test]
fn classifiers_with_virtual_tokens_are_pefts() -> Outcome {
    for name in ["roberta", "bert"] {
        let golden = Golden::open("transformers", name)?;
        let config = RobertaConfig::from_file(&data(&format!("toy_{name}_config.json")))?;
        let mut model = RobertaForSequenceClassification::load(
            vb(&golden.model, DType::F32),
            vb(&golden.model, DType::F32),
            &config,
            Noise::new(0),
        )?;
        let (ids, mask) =
            (golden.input("input_ids", DType::U32)?, golden.input("attention_mask", DType::U8)?);
        let types = golden.model.get("token_type_ids").map(|types| types.to_dtype(DType::U32)).transpose()?;
        let params = golden.tune(&mut model)?;
        let logits =
            |cx: &Context| -> Outcome<Tensor> { Ok(model.forward(&ids, types.as_ref(), &mask, cx)?) };
        assert_close(&logits(&Pass::Mean.into())?, &golden.prompt["logits"], 5e-5)?;
        let labels = &golden.model["labels"];
        golden.check(&params, |cx| Ok(ops::cross_entropy(&logits(cx)?, labels, -100, cx.path)?))?;
        let long = Tensor::ones((1, 38), DType::U32, &Device::Cpu)?;
        let error = model
            .forward(&long, None, &long.to_dtype(DType::U8)?, &Pass::Mean.into())
            .unwrap_err()
            .to_string();
        assert!(error.contains("41 tokens, 3 of them virtual, are more than the model's "), "{error}");
    }
    Ok(())
}

#[test]
fn a_decoder_with_virtual_tokens_is_pefts_with_a_cache_or_without() -> Outcome {
    let golden = Golden::open("llama", "toy_llama")?;
    let config = DecoderConfig::from_file(&data("toy_llama_config.json"))?;
    let mut model = DecoderForCausalLM::load(vb(&golden.model, DType::F32), &config, Noise::new(0))?;
    let (ids, mask) = (golden.input("input_ids", DType::U32)?, golden.input("attention_mask", DType::U8)?);
    let params = golden.tune(&mut model)?;
    assert_eq!(model.max_length(), 64 - 3);
    let real = mask.unsqueeze(2)?.to_dtype(DType::F32)?;
    let logits = model.logits(&ids, &mask, &Pass::Mean.into())?;
    let expected = golden.prompt["logits"].broadcast_mul(&real)?;
    assert_close(&logits.broadcast_mul(&real)?, &expected, 1e-4)?;

    let t = ids.dim(1)?;
    let labels = golden.model["labels"].narrow(1, 1, t - 1)?.flatten_all()?;
    golden.check(&params, |cx| {
        let logits = model.logits(&ids, &mask, cx)?.narrow(1, 0, t - 1)?.contiguous()?;
        Ok(ops::cross_entropy(&logits.flatten_to(1)?, &labels, -100, cx.path)?)
    })?;

    // In pieces, with a cache: the virtual tokens are added only once.
    let mut cache = model.cache(8);
    let mut pieces = Vec::new();
    for (start, len) in [(0, 4), (4, 1), (5, 11)] {
        let (ids, mask) = (ids.narrow(1, start, len)?, mask.narrow(1, 0, start + len)?);
        let hidden =
            model.hidden(&ids.contiguous()?, &mask.contiguous()?, Some(&mut cache), &Pass::Mean.into())?;
        pieces.push(model.head(&hidden, &Pass::Mean.into())?);
    }
    assert_eq!(cache.length(), 3 + 16);
    let real = real.narrow(1, 0, 16)?;
    let expected = golden.prompt["logits"].narrow(1, 0, 16)?.broadcast_mul(&real)?;
    assert_close(&Tensor::cat(&pieces, 1)?.broadcast_mul(&real)?, &expected, 1e-4)
}

#[test]
fn under_left_padding_virtual_tokens_learn_what_they_learn_from_each_row_alone() -> Outcome {
    for dtype in [DType::F64, DType::F32] {
        let (mut model, _) = decoders::frozen(&decoders::toy_config(true)?, dtype)?;
        let prompt = decoders::prompted(&mut model, 3, dtype)?.get(PROMPT).ok_or("no prompt")?.var;
        // Over real tokens only; different weights, so that tokens cannot be mistaken for each other.
        let gradient = |ids: &Tensor, mask: &Tensor, path: OpPath| -> Outcome<Tensor> {
            let cx = Context::from(Pass::Mean).with_path(path);
            let hidden = model.hidden(ids, mask, None, &cx)?;
            let weight = (ids.to_dtype(dtype)?.sin()? * mask.to_dtype(dtype)?)?;
            let loss = hidden.sqr()?.sin()?.sum(2)?.mul(&weight)?.sum_all()?;
            Ok(loss.backward()?.get(&prompt).ok_or("no gradient")?.clone())
        };
        let (ids, mask) = decoders::padded(true)?;
        // A fourth row that is only padding must not affect the others.
        let (ids, mask) = (ids.pad_with_zeros(0, 0, 1)?, mask.pad_with_zeros(0, 0, 1)?);
        let mut expected = prompt.zeros_like()?;
        for row in decoders::ROWS {
            let (ids, mask) = decoders::one_row(row)?;
            expected = (expected + gradient(&ids, &mask, OpPath::Fused)?)?;
        }
        let size = expected.abs()?.max_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        // Rotary angles depend on the column and are rounded to single precision.
        let tolerance = if dtype == DType::F64 { 1e-7 } else { 1e-5 };
        for path in OpPath::ALL {
            let got = gradient(&ids, &mask, path)?;
            assert_close(&got, &expected, tolerance * (1.0 + size)).map_err(|e| format!("{path:?}: {e}"))?;
        }
    }
    Ok(())
}

#[test]
fn an_encoder_that_numbers_real_tokens_is_free_of_its_padding_s_side() -> Outcome {
    let (mut model, _) = toy_classifier(&toy_config(Family::Roberta), Role::Head, DType::F32)?;
    decoders::prompted(&mut model, 3, DType::F32)?;
    let pad = |row: &[u32], with: u32, left: bool| {
        let padding = vec![with; 7 - row.len()];
        if left {
            [&padding, row].concat()
        } else {
            [row, &padding].concat()
        }
    };
    let logits = |left: bool| -> Outcome<Tensor> {
        // Without the first id of each row, 1, which is this model's padding.
        let rows = decoders::ROWS.map(|row| pad(&row[1..], 1, left)).concat();
        let real = decoders::ROWS.map(|row| pad(&vec![1; row.len() - 1], 0, left)).concat();
        let ids = Tensor::from_vec(rows, (3, 7), &Device::Cpu)?;
        let mask = Tensor::from_vec(real, (3, 7), &Device::Cpu)?.to_dtype(DType::U8)?;
        Ok(model.forward(&ids, None, &mask, &Pass::Mean.into())?)
    };
    assert_close(&logits(true)?, &logits(false)?, 2e-5)
}

#[test]
fn a_half_width_base_sums_the_gradients_of_rows_in_single_precision() -> Outcome {
    let words = Tensor::ones((4, 3), DType::BF16, &Device::Cpu)?;
    let mut embedding = AdaptableEmbedding::new(words);
    let params = Params::new(Noise::new(0), &Device::Cpu);
    prompt_tuning(&mut embedding, "default", &PromptConfig { virtual_tokens: 2 }, &params)?;
    // In bf16, 256 + 1 is 256.
    let rows = 300;
    let ids = Tensor::zeros((rows, 1), DType::U32, &Device::Cpu)?;
    let grads = embedding.forward(&ids, OpPath::Fused)?.to_dtype(DType::F32)?.sum_all()?.backward()?;
    let prompt = params.get(PROMPT).ok_or("no prompt")?.var;
    let grad = grads.get(&prompt).ok_or("no gradient")?;
    assert_eq!(grad.to_vec2::<f32>()?, vec![vec![rows as f32; 3]; 2]);
    Ok(())
}

#[test]
fn virtual_tokens_start_from_words_and_stand_once() -> Outcome {
    let golden = Golden::open("llama", "toy_llama")?;
    let config = DecoderConfig::from_file(&data("toy_llama_config.json"))?;
    let mut model = DecoderForCausalLM::load(vb(&golden.model, DType::F32), &config, Noise::new(0))?;
    let before = model.max_length();
    let params = Params::new(Noise::new(5), &Device::Cpu);
    let embedding = model.embedding_mut().ok_or("no place for a prompt")?;
    let tune = |embedding: &mut _, tokens| {
        prompt_tuning(embedding, "default", &PromptConfig { virtual_tokens: tokens }, &params)
    };
    assert!(tune(embedding, 0).is_err_and(|error| error.to_string().contains("virtual_tokens")));
    tune(embedding, 8)?;
    assert!(tune(embedding, 8).is_err_and(|error| error.to_string().contains("already")));
    let words = embedding.words().dequantize()?.to_vec2::<f32>()?;
    let rows = params.get(PROMPT).ok_or("no prompt")?.var.to_vec2::<f32>()?;
    let picked: Vec<_> = rows.iter().map(|row| words.iter().position(|word| word == row)).collect();
    assert!(picked.iter().all(Option::is_some), "{picked:?}");
    assert!(picked.iter().any(|word| *word != picked[0]), "{picked:?}");

    let wide = Tensor::zeros((2, 31), DType::F32, &Device::Cpu)?;
    assert!(embedding.set_prompt(Some(wide)).is_err_and(|error| error.to_string().contains("(p, 32)")));
    embedding.set_prompt(None)?;
    assert_eq!(model.max_length(), before);
    Ok(())
}
