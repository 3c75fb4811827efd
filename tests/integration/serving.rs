//! One model in memory that answers from several threads at once.

use std::thread;

use crate::support::checkpoints::{checkpoint, llama_checkpoint, rows};
use crate::support::{scatter, Outcome};
use candle_core::{DType, Device};
use monteclora::data::batch::Batch;
use monteclora::data::encode::Encoded;
use monteclora::inject::{self, Targets};
use monteclora::models::causal::CausalLm;
use monteclora::models::decoder::{DecoderConfig, DecoderForCausalLM};
use monteclora::models::generate::{generate, GenerateConfig};
use monteclora::models::sequence::SequenceClassifier;
use monteclora::predict::{logits, posterior_probabilities};
use monteclora::train::{Classifier, Method, MethodInit};
use monteclora::{MonteCLoRAConfig, Noise, Params, Pass};

fn is_shared<T: Send + Sync + ?Sized>() {}

fn bayes() -> MonteCLoRAConfig {
    MonteCLoRAConfig { rank: 3, alpha: 7.0, num_components: 3, sample_scaler: 0.3, ..Default::default() }
}

/// The answers of a service: by the mean, by one draw, and averaged over draws.
type Answers = (Vec<Vec<f64>>, Vec<Vec<f64>>, Vec<Vec<f64>>);

fn answers(classifier: &Classifier, row: &Encoded) -> Outcome<Answers> {
    let batch = [Batch::collate(&[row], classifier.model.pad_id(), &Device::Cpu)?];
    Ok((
        logits(classifier, &batch, &Pass::Mean.into())?,
        logits(classifier, &batch, &Pass::Posterior { draw: 5 }.into())?,
        posterior_probabilities(classifier, &batch, 3)?,
    ))
}

#[test]
fn threads_that_share_a_classifier_say_what_one_says() -> Outcome {
    is_shared::<Classifier>();
    is_shared::<dyn SequenceClassifier>();
    is_shared::<dyn CausalLm>();
    let (dir, other) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let rows = rows(24, false);
    for files in [checkpoint(dir.path())?, llama_checkpoint(other.path())?] {
        let start = MethodInit::Fresh(Method::MonteCLoRA(bayes()), Targets::default());
        let classifier = Classifier::load(&files, 2, &start, Noise::new(9), DType::F32, &Device::Cpu)?;
        scatter(&classifier.params)?;
        let serial = rows.iter().map(|row| answers(&classifier, row)).collect::<Outcome<Vec<_>>>()?;
        for count in [1, 2, 4] {
            // Each thread answers all rows, starting from a different one, so that different rows are
            // answered at the same time.
            let ask = |first: usize| -> Result<(), String> {
                for i in (0..rows.len()).map(|i| (first * 7 + i) % rows.len()) {
                    let got = answers(&classifier, &rows[i]).map_err(|error| error.to_string())?;
                    if got != serial[i] {
                        return Err(format!("row {i} of {count} threads: {got:?} against {:?}", serial[i]));
                    }
                }
                Ok(())
            };
            thread::scope(|scope| {
                let threads: Vec<_> = (0..count).map(|first| scope.spawn(move || ask(first))).collect();
                threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| "a panic".to_string())?)
            })?;
        }
    }
    Ok(())
}

#[test]
fn threads_that_share_a_language_model_write_what_one_writes() -> Outcome {
    let dir = tempfile::tempdir()?;
    let files = llama_checkpoint(dir.path())?;
    let config = DecoderConfig::from_file(files.config_path())?;
    let mut model =
        DecoderForCausalLM::load(files.var_builder(DType::F32, &Device::Cpu)?, &config, Noise::new(0))?;
    let params = Params::new(Noise::new(1), &Device::Cpu);
    inject::monteclora(&mut model, &Targets::default(), &bayes(), &params)?;
    scatter(&params)?;
    let model: Box<dyn CausalLm> = Box::new(model);
    let write = |prompt: u32| {
        let config = GenerateConfig { max_new_tokens: 12, ..GenerateConfig::default() };
        generate(model.as_ref(), &[vec![1, prompt]], &config, &mut |_, _| true)
            .map_err(|error| error.to_string())
    };
    let serial = (3..9).map(write).collect::<Result<Vec<_>, _>>()?;
    thread::scope(|scope| {
        let threads: Vec<_> =
            (0..4).map(|_| scope.spawn(|| (3..9).map(write).collect::<Result<Vec<_>, _>>())).collect();
        threads.into_iter().try_for_each(|thread| {
            assert_eq!(thread.join().map_err(|_| "a panic".to_string())??, serial);
            Ok::<(), String>(())
        })
    })?;
    Ok(())
}
