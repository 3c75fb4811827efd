//! Training of a language model: its loss, gradient accumulation, and learning with every method.

use candle_core::{DType, Device, Tensor};
use monteclora::adapter::{Context, Role};
use monteclora::adapters::{AdaLoraConfig, BlobConfig, LoraConfig};
use monteclora::data::batch::Batcher;
use monteclora::data::causal::{CausalBatch, Tokens};
use monteclora::inject::{Targets, DEFAULT_ADAPTER};
use monteclora::models::causal::CausalLm;
use monteclora::models::decoder::{DecoderConfig, DecoderForCausalLM};
use monteclora::ops::{self, OpPath};
use monteclora::peft::{AdapterFile, AdapterMetadata};
use monteclora::train::{causal_loss, fit, held_out_loss, CausalTuning, Method, MethodInit, TrainConfig};
use monteclora::{EvidenceBound, MonteCLoRAConfig, Noise, Params, Pass, Prior, PriorForm};

use crate::support::checkpoints::Log;
use crate::support::decoders::{frozen, toy_config};
use crate::support::{scatter, Outcome};

/// Rows that count upwards by a step that the second token encodes; the first two tokens are the prompt.
pub fn rows(count: usize) -> Vec<Tokens> {
    let row = |row: usize| {
        let (step, length) = (1 + row % 3, 5 + row % 4);
        let mut ids = vec![1, 40 + step as u32];
        ids.extend((0..length).map(|i| (3 + (row + i * step) % 30) as u32));
        let learnt = (0..ids.len()).map(|i| i >= 2).collect();
        Tokens { ids, learnt, row }
    };
    (0..count).map(row).collect()
}

pub fn methods() -> [Method; 2] {
    let lora = LoraConfig { rank: 4, alpha: 8.0, ..LoraConfig::default() };
    let bayes = MonteCLoRAConfig { rank: 4, alpha: 8.0, ..MonteCLoRAConfig::default() };
    [Method::Lora(lora), Method::MonteCLoRA(bayes)]
}

/// Trains a new toy model; returns the log, and the losses on unseen rows before and after.
fn train(method: &Method, batch_size: usize, config: &TrainConfig) -> Outcome<(Log, f64, f64)> {
    train_beside(DType::F32, method, batch_size, config)
}

/// [`train`] with a base of this dtype.
fn train_beside(
    dtype: DType,
    method: &Method,
    batch_size: usize,
    config: &TrainConfig,
) -> Outcome<(Log, f64, f64)> {
    // Without dropout, whose masks depend on the micro-batch.
    let toy = DecoderConfig { attention_dropout: 0.0, ..toy_config(false)? };
    let (mut model, params) = frozen(&toy, dtype)?;
    let start = MethodInit::Fresh(method.clone(), Targets::parse("all-linear")?);
    let hooks = start.inject(&mut model, &params)?;
    let (seen, unseen) = (rows(60), &rows(90)[60..]);
    let before = held_out_loss(&model, unseen, 7, &[Pass::Mean])?;
    let batcher = Batcher::new(batch_size, false, Noise::new(3))?;
    let objective = CausalTuning::new(&model, hooks, &seen, batcher, 0);
    let mut log = Log::default();
    fit(&objective, &params, config, &mut log)?;
    Ok((log, before, held_out_loss(&model, unseen, 7, &[Pass::Mean])?))
}

#[test]
fn both_methods_lower_the_loss_of_text_they_never_saw() -> Outcome {
    let config = TrainConfig { epochs: 12, lr: 1e-2, keep_best: false, ..TrainConfig::default() };
    for method in methods() {
        let (log, before, after) = train(&method, 10, &config)?;
        assert!(after < 0.7 * before, "{}: {before} -> {after}", method.name());
        let (again, _, same) = train(&method, 10, &config)?;
        assert_eq!((log.0, after), (again.0, same), "{}", method.name());
    }
    Ok(())
}

#[test]
fn what_a_method_adds_to_the_loss_is_added_beside_a_base_of_half_width() -> Outcome {
    let config = TrainConfig { epochs: 1, lr: 1e-3, ..TrainConfig::default() };
    let calibrated = MonteCLoRAConfig { rank: 4, alpha: 8.0, ..MonteCLoRAConfig::calibrated() };
    let evidence = Some(EvidenceBound { std: 0.1, temperature: 1.0, latents: true });
    let bound = MonteCLoRAConfig { rank: 4, evidence, ..MonteCLoRAConfig::default() };
    let released = MonteCLoRAConfig { rank: 4, ..MonteCLoRAConfig::released() };
    let map = LoraConfig { rank: 4, prior: Some(Prior::map()), ..LoraConfig::default() };
    let [lora, paper] = methods();
    let with_a_term = [
        (paper, "kl_gaussian"),
        (Method::MonteCLoRA(calibrated), "prior"),
        (Method::MonteCLoRA(bound), "kl_mean"),
        (Method::Released(released), "regularizer"),
        (Method::Lora(map), "prior"),
        (Method::AdaLora(AdaLoraConfig::default()), "orthogonal"),
        (Method::Blob(BlobConfig::default()), "kl"),
    ];
    for (method, term) in with_a_term.into_iter().chain([(lora, "task")]) {
        for half in [DType::BF16, DType::F16] {
            let (single, ..) = train(&method, 10, &config)?;
            let (log, ..) = train_beside(half, &method, 10, &config)?;
            let (first, same) = (&log.0[0], &single.0[0]);
            let close = (first.loss - same.loss).abs() < 0.02 * same.loss;
            assert!(
                close && first.terms.contains_key(term),
                "{} {half:?}: {first:?} {same:?}",
                method.name()
            );
            // The loss is computed in single precision: not all values fit into the base's dtype.
            let tasks: Vec<f64> = log.0.iter().map(|step| step.terms["task"]).collect();
            let tasks = Tensor::new(tasks, &Device::Cpu)?;
            let rounded = tasks.to_dtype(half)?.to_dtype(DType::F64)?;
            assert!((tasks - rounded)?.abs()?.max_all()?.to_scalar::<f64>()? > 0.0);
        }
    }
    Ok(())
}

#[test]
fn a_prior_weighs_by_the_tokens_that_are_learnt() -> Outcome {
    let prior =
        Some(Prior { form: PriorForm::Mean { std: 0.1 }, temperature: 0.5, shared: false, head_std: None });
    let map = Method::Lora(LoraConfig { rank: 4, prior, ..LoraConfig::default() });
    let config = TrainConfig { epochs: 1, ..TrainConfig::default() };
    let tokens: usize = rows(60).iter().map(|row| row.ids.len() - 2).sum();
    for record in train(&map, 10, &config)?.0 .0 {
        let want = record.terms["task"] + 0.5 / tokens as f64 * record.terms["prior"];
        assert!((record.loss - want).abs() < 1e-6 * want, "{record:?}");
    }
    Ok(())
}

#[test]
fn a_posterior_is_trained_on_a_lora_that_stays() -> Outcome {
    let toy = DecoderConfig { attention_dropout: 0.0, ..toy_config(false)? };
    let (mut model, params) = frozen(&toy, DType::F32)?;
    let [lora, _] = methods();
    MethodInit::Fresh(lora.clone(), Targets::parse("all-linear")?).inject(&mut model, &params)?;
    scatter(&params)?;
    let adapter = lora.adapter().ok_or("an adapter")?;
    let file =
        AdapterFile::from_model(&model, DEFAULT_ADAPTER, &params, &adapter, &AdapterMetadata::default())?;
    let logits = |model: &DecoderForCausalLM, cx: &Context| -> Outcome<Tensor> {
        let ids = Tensor::new(&[[1u32, 41, 3, 4, 5]], &Device::Cpu)?;
        Ok(model.logits(&ids, &ids.ones_like()?.to_dtype(DType::U8)?, cx)?.detach())
    };
    let expected = logits(&model, &Pass::Mean.into())?;

    // A prior on frozen parameters would have no effect, so it is refused.
    let prior = Prior { form: PriorForm::Update { std: 1.0 }, ..Prior::calibrated() };
    let still = MonteCLoRAConfig { prior: Some(prior), ..MonteCLoRAConfig::default() };
    let (mut other, others) = frozen(&toy, DType::F32)?;
    let error = MethodInit::PostHoc(Box::new(file.clone()), still).inject(&mut other, &others);
    let error = error.expect_err("nothing to pull on").to_string();
    assert!(error.starts_with("invalid prior") && others.all().is_empty(), "{error}");

    // Rank and alpha come from the adapter, the scaler of the perturbation from the configuration.
    let config = MonteCLoRAConfig { rank: 2, alpha: 1.0, sample_scaler: 0.1, ..Default::default() };
    let start = MethodInit::PostHoc(Box::new(file), config);
    let Method::MonteCLoRA(config) = start.method() else { return Err("MonteCLoRA".into()) };
    assert_eq!((config.rank, config.alpha, config.sample_scaler), (4, 8.0, 0.1));
    let (mut model, params) = frozen(&toy, DType::F32)?;
    let hooks = start.inject(&mut model, &params)?;
    assert!(params.trainable().iter().all(|(_, p)| matches!(p.role, Role::LogStd | Role::Concentration)));
    let rho = |params: &Params| -> Outcome<f32> {
        let all = params.of_role(Role::LogStd).into_iter();
        let sums = all.map(|(_, p)| Ok(p.var.as_tensor().abs()?.sum_all()?.to_scalar::<f32>()?));
        Ok(sums.collect::<Outcome<Vec<_>>>()?.iter().sum())
    };
    let before = rho(&params)?;
    let (seen, batcher) = (rows(24), Batcher::new(8, false, Noise::new(3))?);
    let objective = CausalTuning::new(&model, hooks, &seen, batcher, 0);
    let config = TrainConfig { epochs: 2, keep_best: false, ..TrainConfig::default() };
    fit(&objective, &params, &config, &mut Log::default())?;
    assert_ne!(rho(&params)?, before);
    let mean = logits(&model, &Pass::Mean.into())?;
    assert_eq!(mean.flatten_all()?.to_vec1::<f32>()?, expected.flatten_all()?.to_vec1::<f32>()?);
    let draw = logits(&model, &Pass::Posterior { draw: 0 }.into())?;
    assert!((draw - mean)?.abs()?.max_all()?.to_scalar::<f32>()? > 1e-3);

    let adapter = start.method().adapter().ok_or("an adapter")?;
    let write = |method: &monteclora::peft::AdapterMethod| {
        AdapterFile::from_model(&model, DEFAULT_ADAPTER, &params, method, &AdapterMetadata::default())
    };
    let file = write(&adapter)?;
    let error = MethodInit::PostHoc(Box::new(file), MonteCLoRAConfig::default());
    let (mut other, others) = frozen(&toy, DType::F32)?;
    let error = error.inject(&mut other, &others).expect_err("a posterior is there").to_string();
    assert!(error.contains("it has a posterior already"), "{error}");
    // A file has one scaler for all layers, so a layer with another one is refused.
    let narrow = MonteCLoRAConfig { rank: 4, alpha: 8.0, sample_scaler: 0.2, ..Default::default() };
    let error =
        write(&monteclora::peft::AdapterMethod::MonteCLoRA(narrow)).expect_err("two scalers").to_string();
    assert!(
        error.contains("invalid sample_scaler: ") && error.contains("has 0.1, the method has 0.2"),
        "{error}"
    );
    Ok(())
}

#[test]
fn accumulated_micro_batches_weigh_their_tokens() -> Outcome {
    // Micro-batches of one row have 5 to 8 targets, so a mean of means would differ.
    let config = |accumulation| TrainConfig { epochs: 1, accumulation, ..TrainConfig::default() };
    let lora = &methods()[0];
    let (small, _, one) = train(lora, 1, &config(6))?;
    let (big, _, other) = train(lora, 6, &config(1))?;
    for (a, b) in small.0.iter().zip(&big.0) {
        assert!((a.loss - b.loss).abs() < 1e-5 && (a.grad_norm - b.grad_norm).abs() < 1e-4, "{a:?} {b:?}");
    }
    assert!((one - other).abs() < 1e-5, "{one} {other}");
    Ok(())
}

#[test]
fn the_loss_is_that_of_all_logits_with_shifted_labels() -> Outcome {
    let (model, params) = frozen(&toy_config(true)?, DType::F64)?;
    scatter(&params)?;
    let rows = rows(5);
    let batch = CausalBatch::collate(&rows.iter().collect::<Vec<_>>(), 0, &Device::Cpu)?;
    let loss = causal_loss(&model, &batch, &Pass::Mean.into())?.to_scalar::<f64>()?;
    let (b, t) = batch.input_ids.dims2()?;
    let mut labels = vec![-100i64; b * t];
    for (r, row) in rows.iter().enumerate() {
        for c in 1..row.ids.len() {
            labels[r * t + c - 1] = if row.learnt[c] { i64::from(row.ids[c]) } else { -100 };
        }
    }
    let labels = Tensor::from_vec(labels, b * t, &Device::Cpu)?;
    let logits = model.logits(&batch.input_ids, &batch.attention_mask, &Pass::Mean.into())?.flatten_to(1)?;
    let expected = ops::cross_entropy(&logits, &labels, -100, OpPath::Fused)?.to_scalar::<f64>()?;
    assert!((loss - expected).abs() < 1e-10, "{loss} {expected}");
    // The mean over tokens, whatever the batch size.
    for size in [1, 2, 5] {
        let held_out = held_out_loss(&model, &rows, size, &[Pass::Mean])?;
        assert!((held_out - expected).abs() < 1e-5, "{held_out} {expected}");
        let twice = held_out_loss(&model, &rows, size, &[Pass::Mean, Pass::Mean])?;
        assert!((twice - held_out).abs() < 1e-12);
    }
    assert!(held_out_loss(&model, &[], 1, &[Pass::Mean]).is_err());
    assert!(held_out_loss(&model, &rows, 1, &[]).is_err());
    Ok(())
}
