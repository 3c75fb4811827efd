//! Tests of LLaMA against candle-transformers, and of cache, padding, dtypes and gradients for consistency.

use std::collections::{BTreeSet, HashMap};

use crate::gradients::check;
use crate::support::decoders::{frozen, one_row, padded, prompted, toy, toy_config, weights, ROWS};
use crate::support::{assert_close, scatter, Outcome};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::llama as oracle;
use monteclora::adapter::{AdaptableModel, Context, Params, Pass, Role};
use monteclora::adapters::LoraConfig;
use monteclora::inject::{self, Targets};
use monteclora::models::causal::CausalLm;
use monteclora::models::decoder::{DecoderForCausalLM, DecoderForSequenceClassification};
use monteclora::models::generate::{generate, GenerateConfig, PosteriorWeights, Sampling};
use monteclora::noise::Noise;
use monteclora::ops::{self, OpPath};
use monteclora::{MonteCLoRAConfig, Regularizer};

fn bayes() -> MonteCLoRAConfig {
    MonteCLoRAConfig { rank: 3, alpha: 7.0, num_components: 3, sample_scaler: 0.3, ..Default::default() }
}

#[test]
fn logits_are_those_of_candle_transformers() -> Outcome {
    for llama3 in [false, true] {
        let config = toy_config(llama3)?;
        let (model, params) = toy(&config, DType::F32)?;
        let vb = VarBuilder::from_tensors(weights(&params), DType::F32, &Device::Cpu);
        let reference = oracle::Llama::load(vb, &config.to_candle_llama()?)?;
        // Longer than the original context of the scaled positions.
        let tokens: Vec<u32> = (0..36).map(|i| 3 + (i * 17) % 40).collect();
        for length in [1, 5, 36] {
            let (ids, mask) = one_row(&tokens[..length])?;
            let mut cache = oracle::Cache::new(false, DType::F32, &config.to_candle_llama()?, &Device::Cpu)?;
            let expected = reference.forward(&ids, 0, &mut cache)?; // (1, vocab): the last position
            for path in OpPath::ALL {
                let logits = model.logits(&ids, &mask, &Context::from(Pass::Mean).with_path(path))?;
                assert_close(&logits.narrow(1, length - 1, 1)?.squeeze(1)?, &expected, 2e-5)?;
            }
        }
    }
    Ok(())
}

#[test]
fn padding_on_either_side_changes_no_logit() -> Outcome {
    // Virtual tokens: none, fewer than the padding of some row, and more than any padding.
    for (llama3, virtual_tokens) in [(false, 0), (true, 0), (false, 2), (true, 9)] {
        let (mut model, _) = toy(&toy_config(llama3)?, DType::F32)?;
        prompted(&mut model, virtual_tokens, DType::F32)?;
        for left in [false, true] {
            let (ids, mask) = padded(left)?;
            let logits = model.logits(&ids, &mask, &Pass::Mean.into())?;
            for (row, tokens) in ROWS.iter().enumerate() {
                let (ids, mask) = one_row(tokens)?;
                let expected = model.logits(&ids, &mask, &Pass::Mean.into())?.squeeze(0)?;
                let first = if left { 7 - tokens.len() } else { 0 };
                assert_close(&logits.get(row)?.narrow(0, first, tokens.len())?, &expected, 2e-5)?;
            }
        }
    }
    Ok(())
}

#[test]
fn a_cache_changes_no_logit() -> Outcome {
    for virtual_tokens in [0, 2] {
        let (mut model, params) = frozen(&toy_config(true)?, DType::F32)?;
        inject::monteclora(&mut model, &Targets::parse("all-linear")?, &bayes(), &params)?;
        scatter(&params)?;
        prompted(&mut model, virtual_tokens, DType::F32)?;
        let (ids, mask) = padded(true)?;
        for pass in [Pass::Mean, Pass::Posterior { draw: 3 }] {
            let expected = model.logits(&ids, &mask, &pass.into())?;
            // A cache of two tokens has to grow.
            let mut cache = model.cache(2);
            for (first, count) in [(0, 4), (4, 1), (5, 2)] {
                let new = ids.narrow(1, first, count)?;
                let seen = mask.narrow(1, 0, first + count)?;
                let hidden = model.hidden(&new, &seen, Some(&mut cache), &pass.into())?;
                let logits = model.head(&hidden, &pass.into())?;
                for (row, tokens) in ROWS.iter().enumerate() {
                    // Outputs at padding are arbitrary.
                    let real = (first.max(7 - tokens.len())).min(first + count);
                    let rest = first + count - real;
                    let (got, want) = (logits.get(row)?, expected.get(row)?);
                    assert_close(&got.narrow(0, real - first, rest)?, &want.narrow(0, real, rest)?, 2e-5)?;
                }
            }
            assert_eq!(cache.length(), virtual_tokens + 7);
        }
    }
    Ok(())
}

#[test]
fn what_does_not_fit_the_model_is_an_error_that_says_so() -> Outcome {
    let (model, _) = toy(&toy_config(false)?, DType::F32)?;
    let (ids, mask) = one_row(&[3; 41])?;
    let error = model.logits(&ids, &mask, &Pass::Mean.into()).unwrap_err().to_string();
    assert!(error.contains("41 tokens are more than the model's 40: shorten the text"), "{error}");
    let (ids, _) = one_row(&[3; 5])?;
    let (_, short) = one_row(&[3; 4])?;
    let error = model.logits(&ids, &short, &Pass::Mean.into()).unwrap_err().to_string();
    assert!(error.contains("padding [1, 4] does not fit"), "{error}");
    let (ids, mask) = one_row(&[50])?;
    let error = model.logits(&ids, &mask, &Pass::Mean.into()).unwrap_err().to_string();
    assert!(error.contains("id 50 at position 0"), "{error}");
    let train = Pass::Train { draw: 0 };
    let (ids, mask) = one_row(&[3])?;
    let error = model.hidden(&ids, &mask, Some(&mut model.cache(1)), &train.into()).unwrap_err().to_string();
    assert!(error.contains("invalid cache"), "{error}");

    let (mut model, _) = toy(&toy_config(false)?, DType::F32)?;
    prompted(&mut model, 3, DType::F32)?;
    let (ids, mask) = one_row(&[3; 38])?;
    let error = model.logits(&ids, &mask, &Pass::Mean.into()).unwrap_err().to_string();
    let expected = "41 tokens, 3 of them virtual, are more than the model's 40: \
                    shorten the text or take fewer virtual tokens";
    assert!(error.contains(expected), "{error}");
    let (ids, short) = (ids.narrow(1, 0, 5)?, mask.narrow(1, 0, 4)?);
    let error = model.logits(&ids, &short, &Pass::Mean.into()).unwrap_err().to_string();
    assert!(error.contains("mask [1, 4] does not fit 3 virtual tokens and rows [1, 8, 32]"), "{error}");
    // For a piece with only padding of a row, the place of its virtual tokens is unknown.
    let (ids, mask) = padded(true)?;
    let (ids, mask) = (ids.narrow(1, 0, 3)?, mask.narrow(1, 0, 3)?);
    let error =
        model.hidden(&ids, &mask, Some(&mut model.cache(7)), &Pass::Mean.into()).unwrap_err().to_string();
    assert!(error.contains("row 1 of the first piece is only padding"), "{error}");
    let empty = VarBuilder::from_tensors(HashMap::new(), DType::F32, &Device::Cpu);
    let error = DecoderForCausalLM::load(empty, &toy_config(false)?, Noise::new(0)).unwrap_err().to_string();
    assert!(error.contains("model.embed_tokens.weight"), "{error}");
    Ok(())
}

fn causal_loss(model: &DecoderForCausalLM, cx: &Context) -> Outcome<Tensor> {
    let (ids, mask) = padded(true)?;
    let logits = model.logits(&ids, &mask, cx)?.narrow(1, 0, 6)?.contiguous()?.flatten_to(1)?;
    let labels = ids.narrow(1, 1, 6)?.to_dtype(DType::I64)?.flatten_all()?;
    // Id 0 only occurs as padding and is ignored.
    Ok(ops::cross_entropy(&logits, &labels, 0, cx.path)?)
}

#[test]
fn gradients_of_the_whole_model_are_the_central_differences() -> Outcome {
    let pass = Pass::Train { draw: 4 };
    for llama3 in [false, true] {
        let (model, params) = toy(&toy_config(llama3)?, DType::F64)?;
        check(&params, || causal_loss(&model, &pass.into()))?;
    }
    let (mut model, params) = frozen(&toy_config(false)?, DType::F64)?;
    let config = MonteCLoRAConfig { kl_weight: 0.1, ..bayes() };
    inject::monteclora(&mut model, &Targets::parse("all-linear")?, &config, &params)?;
    scatter(&params)?;
    let regularizer = Regularizer::new(&config);
    check(
        &params,
        || Ok((causal_loss(&model, &pass.into())? + regularizer.for_model(&model, pass)?.total)?),
    )?;
    for virtual_tokens in [2, 9] {
        let (mut model, _) = frozen(&toy_config(true)?, DType::F64)?;
        let params = prompted(&mut model, virtual_tokens, DType::F64)?;
        check(&params, || causal_loss(&model, &pass.into()))?;
    }
    Ok(())
}

#[test]
fn a_half_width_base_trains_single_precision_adapters() -> Outcome {
    let config = toy_config(false)?;
    let gradient = |dtype: DType, role: Role| -> Outcome<(f64, Tensor)> {
        let (mut model, mut params) = frozen(&config, dtype)?;
        match role {
            Role::Prompt => params = prompted(&mut model, 3, DType::F32)?,
            _ => {
                let lora = LoraConfig { rank: 3, alpha: 7.0, ..LoraConfig::default() };
                inject::lora(&mut model, &Targets::default(), &lora, &params)?;
                scatter(&params)?;
            }
        }
        let loss = causal_loss(&model, &Pass::Mean.into())?;
        let name = params.all().into_iter().find(|(_, param)| param.role == role).map(|(name, _)| name);
        let var = params.get(&name.ok_or("a parameter")?).ok_or("its variable")?.var;
        assert_eq!(var.dtype(), DType::F32);
        let grads = loss.backward()?;
        let value = f64::from(loss.to_dtype(DType::F32)?.to_scalar::<f32>()?);
        Ok((value, grads.get(&var).ok_or("a gradient")?.clone()))
    };
    for role in [Role::A, Role::Prompt] {
        let (single, expected) = gradient(DType::F32, role)?;
        let (half, got) = gradient(DType::BF16, role)?;
        assert_eq!(got.dtype(), DType::F32);
        // bf16 has eight bits: the loss agrees to 2 %, the gradient in its direction.
        assert!((single - half).abs() < 0.02 * single, "{single} {half}");
        let dot = |a: &Tensor, b: &Tensor| -> Outcome<f32> { Ok((a * b)?.sum_all()?.to_scalar::<f32>()?) };
        let cosine = dot(&got, &expected)? / (dot(&got, &got)? * dot(&expected, &expected)?).sqrt();
        assert!(cosine > 0.99, "{role:?} {cosine}");
    }
    Ok(())
}

#[test]
fn a_classifier_reads_the_last_real_token() -> Outcome {
    let config = toy_config(false)?.with_num_labels(3);
    let params = Params::new(Noise::new(5), &Device::Cpu);
    let vb = params.var_builder(None, Role::Base);
    let mut model = DecoderForSequenceClassification::load(vb.clone(), vb, &config, Noise::new(0))?;
    scatter(&params)?;
    for virtual_tokens in [0, 2] {
        prompted(&mut model, virtual_tokens, DType::F32)?;
        let alone: Vec<Tensor> = ROWS
            .iter()
            .map(|tokens| {
                let (ids, mask) = one_row(tokens)?;
                Ok(model.forward(&ids, &mask, &Pass::Mean.into())?)
            })
            .collect::<Outcome<_>>()?;
        let expected = Tensor::cat(&alone, 0)?;
        assert_eq!(expected.dims(), [3, 3]);
        for left in [false, true] {
            let (ids, mask) = padded(left)?;
            assert_close(&model.forward(&ids, &mask, &Pass::Mean.into())?, &expected, 2e-5)?;
        }
    }
    let grads =
        model.forward(&padded(true)?.0, &padded(true)?.1, &Pass::Mean.into())?.sum_all()?.backward()?;
    for (name, param) in params.all() {
        assert!(grads.get(&param.var).is_some(), "{name}");
    }
    Ok(())
}

#[test]
fn targets_are_the_projections_and_never_the_head() -> Outcome {
    let (model, _) = toy(&toy_config(false)?, DType::F32)?;
    let count = |text: &str| -> Outcome<usize> { Ok(Targets::parse(text)?.resolve(&model, 4, 8.0)?.len()) };
    assert_eq!(model.default_targets(), ["q_proj", "k_proj", "v_proj"]);
    assert_eq!([count("default")?, count("all-linear")?, count("o_proj")?], [6, 14, 2]);
    assert_eq!(count("gate_proj,up_proj,down_proj")?, 6);
    assert!(count("lm_head").unwrap_err().to_string().contains("q_proj"));
    Ok(())
}

fn tokens(
    model: &DecoderForCausalLM,
    prompts: &[Vec<u32>],
    config: &GenerateConfig,
) -> Outcome<Vec<Vec<u32>>> {
    Ok(generate(model, prompts, config, &mut |_, _| true)?)
}

#[test]
fn a_batch_generates_what_its_rows_generate_alone() -> Outcome {
    generates_what_its_rows_do(0)
}

#[test]
fn a_batch_with_virtual_tokens_generates_what_its_rows_generate_alone() -> Outcome {
    generates_what_its_rows_do(3)
}

fn generates_what_its_rows_do(virtual_tokens: usize) -> Outcome {
    let (mut model, _) = toy(&toy_config(true)?, DType::F32)?;
    prompted(&mut model, virtual_tokens, DType::F32)?;
    let prompts: Vec<Vec<u32>> = ROWS.iter().map(|row| row.to_vec()).collect();
    let config = GenerateConfig { max_new_tokens: 12, ..Default::default() };
    let together = tokens(&model, &prompts, &config)?;
    for (prompt, expected) in prompts.iter().zip(&together) {
        let alone = tokens(&model, std::slice::from_ref(prompt), &config)?;
        assert_eq!((&alone[0], alone[0].len()), (expected, 12));
        // Without a cache: the most likely token after each prefix.
        let mut text = prompt.clone();
        for token in expected {
            let (ids, mask) = one_row(&text)?;
            let logits = model.logits(&ids, &mask, &Pass::Mean.into())?.get(0)?.get(text.len() - 1)?;
            assert_eq!(logits.argmax(0)?.to_scalar::<u32>()?, *token);
            text.push(*token);
        }
    }
    // A stop token ends a row and is not part of it.
    let stop = together[0][3];
    let stopped = tokens(&model, &prompts, &GenerateConfig { stop: vec![stop], ..config.clone() })?;
    for (got, whole) in stopped.iter().zip(&together) {
        let end = whole.iter().position(|token| *token == stop).unwrap_or(whole.len());
        assert_eq!(got[..], whole[..end]);
    }
    // The model's maximal length ends a text, too.
    let long = tokens(&model, &prompts[..1], &GenerateConfig { max_new_tokens: 1000, ..config.clone() })?;
    assert_eq!(long[0].len(), 40 - virtual_tokens - 7);
    // So does the callback when it returns false.
    let mut heard = Vec::new();
    let quiet = generate(&model, &prompts[..1], &config, &mut |row, token| {
        heard.push((row, token));
        heard.len() < 2
    })?;
    assert_eq!((quiet[0].len(), heard), (2, vec![(0, together[0][0]), (0, together[0][1])]));
    Ok(())
}

#[test]
fn choices_repeat_with_their_seed_and_draws_average() -> Outcome {
    let (mut model, params) = frozen(&toy_config(false)?, DType::F32)?;
    inject::monteclora(&mut model, &Targets::default(), &bayes(), &params)?;
    scatter(&params)?;
    let prompts = vec![vec![1, 17, 4]; 2];
    let run = |sampling: Sampling, seed: u64, weights: PosteriorWeights| {
        let config = GenerateConfig { max_new_tokens: 16, sampling, seed, weights, ..Default::default() };
        tokens(&model, &prompts, &config)
    };
    let all = || Sampling::All { temperature: 1.0 };
    let first = run(all(), 7, PosteriorWeights::Mean)?;
    assert_eq!(first, run(all(), 7, PosteriorWeights::Mean)?);
    assert_ne!(first, run(all(), 8, PosteriorWeights::Mean)?);
    assert_ne!(first[0], first[1], "rows have generators of their own");
    assert_ne!(first[1], run(all(), 8, PosteriorWeights::Mean)?[0], "and so have the rows of every seed");
    let greedy = run(Sampling::ArgMax, 0, PosteriorWeights::Mean)?;
    // The greedy text repeats itself; under a large penalty no token of the prompt or the text occurs twice.
    let distinct = |text: &[u32]| [&prompts[0], text].concat().into_iter().collect::<BTreeSet<_>>().len();
    let penalized = |repetition_penalty| {
        tokens(
            &model,
            &prompts,
            &GenerateConfig { max_new_tokens: 16, repetition_penalty, ..Default::default() },
        )
    };
    assert!(distinct(&greedy[0]) < 3 + 16);
    assert_eq!(distinct(&penalized(1e6)?[0]), 3 + 16);
    assert_eq!(penalized(1.0)?, greedy);
    // Each draw's logits are penalised, not the log of the average: draws that equal the mean give its text.
    let (alone, _) = frozen(&toy_config(false)?, DType::F32)?;
    let says = |weights| {
        let config =
            GenerateConfig { max_new_tokens: 16, repetition_penalty: 1.3, weights, ..Default::default() };
        tokens(&alone, &prompts, &config)
    };
    assert_eq!(says(PosteriorWeights::Average(2))?, says(PosteriorWeights::Mean)?);
    for narrow in [
        Sampling::TopK { k: 1, temperature: 1.0 },
        Sampling::TopP { p: 1e-6, temperature: 1.0 },
        Sampling::TopKThenTopP { k: 4, p: 1e-6, temperature: 1.0 },
        Sampling::All { temperature: 1e-4 },
    ] {
        assert_eq!(greedy, run(narrow, 3, PosteriorWeights::Mean)?);
    }
    let drawn = run(all(), 7, PosteriorWeights::Draw(0))?;
    assert_ne!(first, drawn);
    assert_eq!(drawn, run(all(), 7, PosteriorWeights::Average(1))?);
    // With two draws the first token is the most likely by the averaged probabilities.
    let (ids, mask) = one_row(&prompts[0])?;
    let probabilities = |draw| -> Outcome<Vec<f32>> {
        let logits = model.logits(&ids, &mask, &Pass::Posterior { draw }.into())?.get(0)?.get(2)?;
        Ok(candle_nn::ops::softmax(&logits, 0)?.to_vec1()?)
    };
    let sum: Vec<f32> = probabilities(0)?.iter().zip(probabilities(1)?).map(|(a, b)| a + b).collect();
    let best = (0..sum.len()).max_by(|a, b| sum[*a].total_cmp(&sum[*b])).map(|i| i as u32);
    assert_eq!(Some(run(Sampling::ArgMax, 0, PosteriorWeights::Average(2))?[0][0]), best);
    Ok(())
}

#[test]
fn generation_refuses_what_it_cannot_do() -> Outcome {
    let (model, params) = toy(&toy_config(false)?, DType::F32)?;
    let fails = |prompt: Vec<u32>, config: GenerateConfig| {
        tokens(&model, &[prompt], &config).expect_err("an error").to_string()
    };
    let config = GenerateConfig::default();
    let sampling = |sampling| GenerateConfig { sampling, ..Default::default() };
    let cases = [
        (vec![], config.clone(), "prompt 0 has no token"),
        (vec![3; 40], config.clone(), "expected fewer than the model's 40 tokens, got 40"),
        (vec![3], sampling(Sampling::All { temperature: 0.0 }), "temperature"),
        (vec![3], sampling(Sampling::TopK { k: 0, temperature: 1.0 }), "top_k"),
        (vec![3], sampling(Sampling::TopP { p: 1.5, temperature: 1.0 }), "top_p"),
        (vec![3], GenerateConfig { weights: PosteriorWeights::Average(0), ..config.clone() }, "weights"),
        (vec![3], GenerateConfig { repetition_penalty: 0.0, ..config.clone() }, "repetition_penalty"),
    ];
    for (prompt, config, expected) in cases {
        let error = fails(prompt, config);
        assert!(error.contains(expected), "{expected}: {error}");
    }
    let name = "model.norm.weight";
    params.get(name).ok_or("a parameter")?.var.set(&Tensor::full(f32::NAN, 32, &Device::Cpu)?)?;
    let error = fails(vec![3], config);
    assert!(error.contains("token 1 of row 0: a logit is NaN"), "{error}");
    Ok(())
}
