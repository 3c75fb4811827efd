//! A language model through the one loop: its loss, its accumulation, and what it learns.

use candle_core::{DType, Device, Tensor};
use monteclora::adapters::LoraConfig;
use monteclora::data::batch::Batcher;
use monteclora::data::causal::{CausalBatch, PromptEncoder, Tokens};
use monteclora::data::instruct::{Choices, Prompted};
use monteclora::eval::{chosen_by_name, score_choices, Normalize};
use monteclora::inject::Targets;
use monteclora::metrics::softmax;
use monteclora::models::causal::CausalLm;
use monteclora::models::llama::LlamaConfig;
use monteclora::ops;
use monteclora::train::{causal_loss, fit, held_out_loss, CausalTuning, Method, Start, TrainConfig};
use monteclora::{MonteCLoRAConfig, Noise, Pass};

use tokenizers::models::wordlevel::WordLevel;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{SplitDelimiterBehavior, Tokenizer};

use crate::finetune::Log;
use crate::llama::{frozen, toy_config};
use crate::support::{scatter, Outcome};

/// Texts that count upwards in steps of the first token; prompts of two tokens.
fn rows(count: usize) -> Vec<Tokens> {
    let row = |row: usize| {
        let (step, length) = (1 + row % 3, 5 + row % 4);
        let mut ids = vec![1, 40 + step as u32];
        ids.extend((0..length).map(|i| (3 + (row + i * step) % 30) as u32));
        let learnt = (0..ids.len()).map(|i| i >= 2).collect();
        Tokens { ids, learnt, row }
    };
    (0..count).map(row).collect()
}

fn methods() -> [Method; 2] {
    let lora = LoraConfig { rank: 4, alpha: 8.0, ..LoraConfig::default() };
    let bayes = MonteCLoRAConfig { rank: 4, alpha: 8.0, ..MonteCLoRAConfig::default() };
    [Method::Lora(lora), Method::MonteCLoRA(bayes)]
}

/// Trains the toy model from its start and returns its losses on rows it never saw.
fn train(method: &Method, batch_size: usize, config: &TrainConfig) -> Outcome<(Log, f64, f64)> {
    // Without dropout, whose masks go by micro-batch.
    let toy = LlamaConfig { attention_dropout: 0.0, ..toy_config(false)? };
    let (mut model, params) = frozen(&toy, DType::F32)?;
    let start = Start::Fresh(method.clone(), Targets::parse("all-linear")?);
    let regularizer = start.inject(&mut model, &params)?;
    let (seen, unseen) = (rows(60), &rows(90)[60..]);
    let before = held_out_loss(&model, unseen, 7, &[Pass::Mean])?;
    let batcher = Batcher::new(batch_size, false, Noise::new(3))?;
    let objective = CausalTuning { model: &model, regularizer, rows: &seen, batcher, pad_id: 0 };
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
fn accumulated_micro_batches_weigh_their_tokens() -> Outcome {
    // Micro-batches of one row have from 5 to 8 targets: a mean of means would be another number.
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
    let loss = causal_loss(&model, &batch, &Pass::Mean)?.to_scalar::<f64>()?;
    let (b, t) = batch.input_ids.dims2()?;
    let mut labels = vec![-100i64; b * t];
    for (r, row) in rows.iter().enumerate() {
        for c in 1..row.ids.len() {
            labels[r * t + c - 1] = if row.learnt[c] { i64::from(row.ids[c]) } else { -100 };
        }
    }
    let labels = Tensor::from_vec(labels, b * t, &Device::Cpu)?;
    let logits = model.logits(&batch.input_ids, &batch.attention_mask, &Pass::Mean)?.flatten_to(1)?;
    let expected = ops::cross_entropy(&logits, &labels, -100)?.to_scalar::<f64>()?;
    assert!((loss - expected).abs() < 1e-10, "{loss} {expected}");
    // The mean over tokens, whatever the batches.
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

/// A tokenizer of single letters: `a` is 3, `b` is 4, and so on.
fn letters() -> Outcome<Tokenizer> {
    let vocab: Vec<(String, u32)> =
        ('a'..='z').zip(3..).map(|(letter, id)| (letter.to_string(), id)).chain([("?".into(), 0)]).collect();
    let model = WordLevel::builder().vocab(vocab.into_iter().collect()).unk_token("?".into()).build();
    let model = model.map_err(|e| e.to_string())?;
    let mut tokenizer = Tokenizer::new(model);
    let isolated = Split::new(SplitPattern::Regex(".".into()), SplitDelimiterBehavior::Isolated, false);
    let isolated = isolated.map_err(|e| e.to_string())?;
    tokenizer.with_pre_tokenizer(Some(isolated));
    Ok(tokenizer)
}

#[test]
fn choices_are_scored_by_the_likelihood_of_their_answers() -> Outcome {
    let (model, params) = frozen(&toy_config(false)?, DType::F32)?;
    scatter(&params)?;
    let question = |prompt: &str, answers: &[&str], correct: usize| Prompted {
        prompt: prompt.into(),
        answer: answers[correct].to_string(),
        choices: Some(Choices {
            names: answers.iter().map(ToString::to_string).collect(),
            answers: answers.iter().map(ToString::to_string).collect(),
            correct,
        }),
        ..Prompted::default()
    };
    let rows = [question("abc", &["de", "f", "ghij"], 2), question("xy", &["a", "bcd"], 0)];
    let encoder = PromptEncoder::new(letters()?, 20, 40, None, false)?;
    // The log-probability of each next letter, by hand.
    let likelihood = |prompt: &str, answer: &str| -> Outcome<f64> {
        let ids: Vec<u32> = format!("{prompt}{answer}").chars().map(|c| c as u32 - 'a' as u32 + 3).collect();
        let mask = Tensor::ones((1, ids.len()), DType::U8, &Device::Cpu)?;
        let logits =
            model.logits(&Tensor::new(ids.as_slice(), &Device::Cpu)?.unsqueeze(0)?, &mask, &Pass::Mean)?;
        let logs = candle_nn::ops::log_softmax(&logits.squeeze(0)?, 1)?.to_vec2::<f32>()?;
        Ok((prompt.len()..ids.len()).map(|i| f64::from(logs[i - 1][ids[i] as usize])).sum())
    };
    for (normalize, batch_size) in [(Normalize::No, 1), (Normalize::Tokens, 2), (Normalize::Bytes, 64)] {
        let passes = [Pass::Mean, Pass::Mean];
        let scores = score_choices(&model, &encoder, &rows, batch_size, normalize, &passes)?;
        assert_eq!(scores.correct, [2, 0]);
        for (row, got) in rows.iter().zip(&scores.probabilities) {
            let answers = &row.choices.as_ref().ok_or("choices")?.answers;
            let by_hand = answers.iter().map(|answer| {
                // One letter is one token and one byte.
                let length = if normalize == Normalize::No { 1.0 } else { answer.len() as f64 };
                Ok(likelihood(&row.prompt, answer)? / length)
            });
            let mut expected = softmax(&by_hand.collect::<Outcome<Vec<f64>>>()?);
            expected.resize(3, 0.0);
            assert!(expected.iter().zip(got).all(|(a, b)| (a - b).abs() < 1e-5), "{expected:?} {got:?}");
        }
        assert!(scores.evaluate()?.accuracy.is_some());
    }
    let fails = |rows: &[Prompted], max_length, passes: &[Pass]| -> Outcome<String> {
        let encoder = PromptEncoder::new(letters()?, max_length, 40, None, false)?;
        let scores = score_choices(&model, &encoder, rows, 4, Normalize::No, passes);
        Ok(scores.expect_err("an error").to_string())
    };
    assert!(fails(&rows, 6, &[Pass::Mean])?.contains("max_length: 1 answers do not fit"));
    assert!(fails(&rows, 20, &[])?.contains("passes"));
    let plain = [Prompted { choices: None, ..rows[0].clone() }];
    assert!(fails(&plain, 20, &[Pass::Mean])?.contains("row 1 has no choices"));
    let names = ["answer1".to_string(), "answer2".to_string()];
    assert_eq!(chosen_by_name("the correct answer is answer2, not answer1", &names), Some(1));
    assert_eq!(chosen_by_name("who knows", &names), None);
    Ok(())
}
