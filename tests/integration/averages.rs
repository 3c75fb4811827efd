//! Predictions averaged over several draws: probabilities are averaged, each after its own softmax.

use candle_core::{DType, Device, Tensor};
use monteclora::data::causal::Tokens;
use monteclora::eval::{score_choices, Normalize};
use monteclora::inject::{self, Targets};
use monteclora::models::causal::CausalLm;
use monteclora::models::decoder::DecoderForCausalLM;
use monteclora::train::held_out_loss;
use monteclora::{MonteCLoRAConfig, Pass};

use crate::causal;
use crate::eval::{encoder, question};
use crate::support::decoders::{frozen, toy_config};
use crate::support::{scatter, Outcome};

const DRAWS: [Pass; 2] = [Pass::Posterior { draw: 0 }, Pass::Posterior { draw: 2 }];

/// A model whose draws differ.
fn model() -> Outcome<DecoderForCausalLM> {
    let (mut model, params) = frozen(&toy_config(false)?, DType::F32)?;
    let config = MonteCLoRAConfig { rank: 4, sample_scaler: 0.3, ..MonteCLoRAConfig::default() };
    inject::monteclora(&mut model, &Targets::parse("all-linear")?, &config, &params)?;
    scatter(&params)?;
    Ok(model)
}

/// The probability of each token of a row that counts in the loss.
fn probabilities(model: &DecoderForCausalLM, row: &Tokens, pass: Pass) -> Outcome<Vec<f64>> {
    let mask = Tensor::ones((1, row.ids.len()), DType::U8, &Device::Cpu)?;
    let ids = Tensor::new(row.ids.as_slice(), &Device::Cpu)?.unsqueeze(0)?;
    let logits = model.logits(&ids, &mask, &pass.into())?.squeeze(0)?.to_dtype(DType::F64)?;
    let rows = candle_nn::ops::softmax(&logits, 1)?.to_vec2::<f64>()?;
    let places = (1..row.ids.len()).filter(|place| row.learnt[*place]);
    Ok(places.map(|place| rows[place - 1][row.ids[place] as usize]).collect())
}

#[test]
fn held_out_tokens_are_scored_by_the_mean_of_their_probabilities() -> Outcome {
    let (model, rows) = (model()?, causal::rows(9));
    let (mut logs, mut geometric) = (Vec::new(), Vec::new());
    for row in &rows {
        let [one, other] = DRAWS.map(|pass| probabilities(&model, row, pass));
        for (p, q) in one?.into_iter().zip(other?) {
            logs.push((0.5 * (p + q)).ln());
            geometric.push(0.5 * (p.ln() + q.ln()));
        }
    }
    let loss = |logs: &[f64]| -logs.iter().sum::<f64>() / logs.len() as f64;
    let got = held_out_loss(&model, &rows, 4, &DRAWS)?;
    assert!((got - loss(&logs)).abs() < 1e-5, "{got} {}", loss(&logs));
    assert!((got - loss(&geometric)).abs() > 1e-3, "{got} {}", loss(&geometric));
    Ok(())
}

#[test]
fn choices_are_scored_by_the_mean_of_the_draws_probabilities() -> Outcome {
    let (model, encoder) = (model()?, encoder(20)?);
    let rows = [question("abc", &["de", "f", "ghij"], 2), question("xy", &["a", "bcd"], 0)];
    let scores = |passes: &[Pass]| -> Outcome<Vec<f64>> {
        let scores = score_choices(&model, &encoder, &rows, 4, Normalize::Tokens, passes)?;
        Ok(scores.probabilities.concat())
    };
    let (both, one, other) = (scores(&DRAWS)?, scores(&DRAWS[..1])?, scores(&DRAWS[1..])?);
    let mut apart: f64 = 0.0;
    for ((both, p), q) in both.into_iter().zip(one).zip(other) {
        assert!((both - 0.5 * (p + q)).abs() < 1e-12, "{both} {p} {q}");
        apart = apart.max((p - q).abs());
    }
    assert!(apart > 1e-2, "{apart}");
    // A question with unequal numbers of names and answers would shift all questions after it.
    let mut lopsided = rows.clone();
    lopsided[0].choices.as_mut().ok_or("choices")?.names.pop();
    let error =
        score_choices(&model, &encoder, &lopsided, 4, Normalize::No, &DRAWS).err().ok_or("no error")?;
    assert!(error.to_string().contains("row 1: 2 names, 3 answers"), "{error}");
    Ok(())
}
