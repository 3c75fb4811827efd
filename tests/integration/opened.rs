//! A whole model that is opened to predict: frozen in the dtype or the blocks that are asked for.

use candle_core::{DType, Device};
use monteclora::adapters::LoraConfig;
use monteclora::data::encode::Encoded;
use monteclora::inject::Targets;
use monteclora::models::decoder::DecoderConfig;
use monteclora::models::hub::ModelFiles;
use monteclora::train::{batches, Classifier, Method, MethodInit, Predictions};
use monteclora::{Noise, Params};

use crate::support::checkpoints::{checkpoint, llama_checkpoint, rows};
use crate::support::{scatter, Outcome};

fn logits(classifier: &Classifier, rows: &[Encoded]) -> Outcome<Vec<f64>> {
    Ok(Predictions::new(classifier, rows, &batches(classifier, rows, 4)?, 0)?.logits.concat())
}

#[test]
fn a_whole_model_is_frozen_unless_it_can_be_trained_on() -> Outcome {
    let (dir, out) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let (files, full) = (checkpoint(dir.path())?, MethodInit::Fresh(Method::Full, Targets::default()));
    let load = |dtype| Classifier::load(&files, 2, &full, Noise::new(4), dtype, &Device::Cpu);
    let trained = load(DType::F32)?;
    scatter(&trained.params)?;
    trained.save("toy", out.path())?;
    let (rows, device) = (rows(6, false), Device::Cpu);
    let single = Classifier::open(out.path(), None, DType::F32, &device)?;
    assert!(single.params.trainable_count() > 0);
    let expected = logits(&single, &rows)?;
    assert_eq!(expected, logits(&trained, &rows)?);

    // What a refused save must leave alone.
    let adapter = out.path().join("adapter");
    std::fs::create_dir_all(&adapter)?;
    std::fs::write(adapter.join("adapter_config.json"), "{}")?;
    let saved = out.path().join("model");
    let saved = ModelFiles::locate(saved.to_str().ok_or("a path")?, None)?;
    let blocks = saved.clone().quantized(Some("q8_0".parse()?));
    for (files, dtype, kind) in [(&saved, DType::BF16, "bf16"), (&blocks, DType::F32, "q8_0")] {
        let opened = Classifier::of_checkpoint(files, dtype, &device)?;
        assert_eq!(opened.params.trainable_count(), 0, "{kind}");
        let mut kinds = Vec::new();
        opened.model.visit_linears(&mut |layer| {
            kinds.push(layer.base().kind());
            Ok(())
        })?;
        assert!(kinds.iter().any(|own| own == kind), "{kinds:?}");
        let apart = logits(&opened, &rows)?.into_iter().zip(&expected).map(|(x, y)| (x - y).abs());
        let (apart, size) =
            (apart.fold(0.0, f64::max), expected.iter().fold(0.0f64, |most, y| most.max(y.abs())));
        assert!(apart > 0.0 && apart < 0.05 * size, "{kind}: {apart} of {size}");
        let error = opened.save("toy", out.path()).expect_err("nothing was trained").to_string();
        assert!(error.contains("opened to predict"), "{error}");
        assert!(adapter.join("adapter_config.json").is_file(), "{kind}");
    }
    let error = load(DType::BF16).map(drop).expect_err("half a width").to_string();
    assert!(error.starts_with("invalid dtype"), "{error}");
    Ok(())
}

#[test]
fn the_base_of_a_method_is_frozen_or_in_single_precision() -> Outcome {
    let dir = tempfile::tempdir()?;
    let files = llama_checkpoint(dir.path())?;
    let width = DecoderConfig::from_files(&files)?.hidden_size;
    let of = |method, dtype| {
        let (start, params) =
            (MethodInit::Fresh(method, Targets::default()), Params::new(Noise::new(0), &Device::Cpu));
        let base = start.base(files.open_weights(dtype, &Device::Cpu)?, &params)?;
        let norm = base.get(width, "model.norm.weight")?;
        Ok::<_, monteclora::Error>((norm.dtype(), params.trainable_count()))
    };
    let lora = || Method::Lora(LoraConfig::default());
    assert_eq!(of(lora(), DType::BF16)?, (DType::BF16, 0));
    assert_eq!(of(Method::Full, DType::F32)?, (DType::F32, width));
    let error = of(Method::Full, DType::BF16).map(drop).expect_err("half a width").to_string();
    assert!(error.starts_with("invalid dtype: full fine-tuning trains the base in f32"), "{error}");
    Ok(())
}

#[test]
fn decoders_are_evaluated_in_smaller_batches() -> Outcome {
    let (dir, other) = (tempfile::tempdir()?, tempfile::tempdir()?);
    for (files, size) in [(checkpoint(dir.path())?, 64), (llama_checkpoint(other.path())?, 16)] {
        let start = MethodInit::Fresh(Method::Lora(LoraConfig::default()), Targets::default());
        let mut classifier = Classifier::load(&files, 2, &start, Noise::new(4), DType::F32, &Device::Cpu)?;
        assert_eq!(classifier.eval_batch_size(), size);
        classifier.set_eval_batch_size(3)?;
        assert_eq!(classifier.eval_batch_size(), 3);
        assert!(classifier.set_eval_batch_size(0).is_err());
    }
    Ok(())
}
