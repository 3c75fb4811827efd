//! Tests of the encoder families after BERT against Hugging Face transformers (golden values of
//! `tests/data/make_encoders_golden.py`), and of gradients against finite differences.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use monteclora::adapter::{Context, Params, Pass, Role};
use monteclora::adapters::{prompt_tuning, LoraConfig, PromptConfig};
use monteclora::inject::{self, Targets};
use monteclora::models::hub::ModelFiles;
use monteclora::models::sequence::{SequenceClassifier, SequenceConfig};
use monteclora::noise::Noise;
use monteclora::ops::{self, OpPath};
use monteclora::peft::{AdapterFile, ExportFormat};
use monteclora::train::{Classifier, Method, MethodInit};
use monteclora::{KlEvaluation, MonteCLoRAConfig, Regularizer};
use serde_json::{json, Value};

use crate::gradients::check;
use crate::support::{assert_close, data, golden, scatter, vb, Outcome};

pub const FAMILIES: [&str; 4] = ["distilbert", "electra", "deberta", "modernbert"];

/// One family's part of the golden file, and its configuration.
pub struct Golden {
    tensors: HashMap<String, Tensor>,
    config: Value,
}

impl Golden {
    pub fn open(family: &str) -> Outcome<Self> {
        let config = std::fs::read(data(&format!("toy_{family}_config.json")))?;
        Ok(Self { tensors: golden("encoders", family)?, config: serde_json::from_slice(&config)? })
    }

    /// Returns it with other settings.
    fn with(mut self, settings: Value) -> Self {
        for (name, value) in settings.as_object().into_iter().flatten() {
            self.config[name] = value.clone();
        }
        self
    }

    /// Returns it with all dropout rates at 0.
    pub fn no_dropout(self) -> Self {
        let rates: Vec<String> = match self.config.as_object() {
            Some(fields) => fields.keys().filter(|name| name.contains("dropout")).cloned().collect(),
            None => Vec::new(),
        };
        rates.iter().fold(self, |golden, rate| golden.with(json!({ rate.as_str(): 0.0 })))
    }

    /// Writes a checkpoint folder.
    pub fn write(&self, dir: &Path) -> Outcome<ModelFiles> {
        std::fs::create_dir_all(dir)?;
        let is_weight = |name: &str| name.ends_with(".weight") || name.ends_with(".bias");
        let weights = self.tensors.iter().filter(|(name, _)| is_weight(name) && !name.starts_with("grad."));
        let weights = weights.map(|(name, weight)| (name.clone(), weight.clone()));
        monteclora::util::files::write_safetensors(&dir.join("model.safetensors"), weights)?;
        std::fs::write(dir.join("config.json"), self.config.to_string())?;
        Ok(ModelFiles::locate(dir.to_str().ok_or("a path")?, None)?)
    }

    fn config(&self) -> Outcome<SequenceConfig> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("config.json");
        std::fs::write(&path, self.config.to_string())?;
        Ok(SequenceConfig::from_file(&path, 3)?)
    }

    fn frozen(&self, dtype: DType) -> Outcome<Box<dyn SequenceClassifier>> {
        Ok(self.config()?.load(vb(&self.tensors, dtype), vb(&self.tensors, dtype), Noise::new(0))?)
    }

    /// A model with all weights trainable, or, with `Role::Head`, only the head.
    fn trained(&self, role: Role, dtype: DType) -> Outcome<(Box<dyn SequenceClassifier>, Params)> {
        let params = Params::with_dtype(Noise::new(6), dtype, &Device::Cpu);
        let head = params.var_builder(Some(vb(&self.tensors, dtype)), role);
        let body = if role == Role::Base { head.clone() } else { vb(&self.tensors, dtype) };
        Ok((self.config()?.load(body, head, Noise::new(0))?, params))
    }

    /// Ids, token types, attention mask.
    fn inputs(&self) -> Outcome<[Tensor; 3]> {
        let ids = self.tensors["input_ids"].to_dtype(DType::U32)?;
        let types = match self.tensors.get("token_type_ids") {
            Some(types) => types.to_dtype(DType::U32)?,
            None => ids.zeros_like()?,
        };
        Ok([ids, types, self.tensors["attention_mask"].to_dtype(DType::U8)?])
    }

    fn logits(&self, model: &dyn SequenceClassifier, cx: &Context) -> Outcome<Tensor> {
        let [ids, types, mask] = self.inputs()?;
        Ok(model.logits(&ids, &types, &mask, cx)?)
    }

    fn loss(&self, model: &dyn SequenceClassifier, cx: &Context) -> Outcome<Tensor> {
        let logits = self.logits(model, cx)?;
        Ok(ops::cross_entropy(&logits, &self.tensors["labels"], -100, cx.path)?)
    }
}

/// The families, and variants with other settings, each with the key of its golden logits.
fn variants() -> Outcome<Vec<(&'static str, Golden, &'static str)>> {
    let of = |family: &'static str| Ok((family, Golden::open(family)?, "logits"));
    let mut all = FAMILIES.into_iter().map(of).collect::<Outcome<Vec<_>>>()?;
    let mean = Golden::open("modernbert")?.with(json!({ "classifier_pooling": "mean" }));
    all.push(("modernbert", mean, "logits.mean"));
    let types = ["full_attention", "sliding_attention", "sliding_attention"];
    let local = Golden::open("modernbert")?.with(json!({ "num_hidden_layers": 3, "layer_types": types }));
    all.push(("modernbert", local, "logits.local"));
    Ok(all)
}

#[test]
fn every_family_gives_the_logits_of_transformers() -> Outcome {
    for (family, golden, key) in variants()? {
        for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F64, 2e-6)] {
            let model = golden.frozen(dtype)?;
            for path in OpPath::ALL {
                let logits = golden.logits(model.as_ref(), &Context::from(Pass::Mean).with_path(path))?;
                assert_close(&logits, &golden.tensors[key], tolerance)
                    .map_err(|error| format!("{family}, {key}, {dtype:?}, {path:?}: {error}"))?;
            }
        }
    }
    Ok(())
}

#[test]
fn a_row_has_the_logits_that_it_has_without_padding() -> Outcome {
    for (family, golden, key) in variants()? {
        let model = golden.frozen(DType::F32)?;
        let [ids, types, mask] = golden.inputs()?;
        for (row, length) in [(0, 17), (1, 9), (2, 4)] {
            let own = |t: &Tensor| t.narrow(0, row, 1)?.narrow(1, 0, length);
            let logits = model.logits(&own(&ids)?, &own(&types)?, &own(&mask)?, &Pass::Mean.into())?;
            assert_close(&logits, &golden.tensors[key].narrow(0, row, 1)?, 1e-4)
                .map_err(|error| format!("{family}: {error}"))?;
        }
        // A row longer than any that the model was trained on: DeBERTa's relative positions take it.
        let long = Tensor::full(5u32, (1, 41), &Device::Cpu)?;
        let mask = long.ones_like()?.to_dtype(DType::U8)?;
        match model.logits(&long, &long.zeros_like()?, &mask, &Pass::Mean.into()) {
            Ok(logits) => {
                let size = logits.abs()?.max_all()?.to_scalar::<f32>()?;
                assert!(
                    family.starts_with("deberta") && size.is_finite() && size > 0.0,
                    "{family}: {logits}"
                );
            }
            Err(error) => {
                assert!(!family.starts_with("deberta"), "{family}: {error}");
                assert!(error.to_string().contains("more than the model's 40"), "{family}: {error}");
            }
        }
    }
    Ok(())
}

#[test]
fn gradients_are_those_of_transformers_kept_or_computed_again() -> Outcome {
    for (family, golden, key) in variants()? {
        if key != "logits" {
            continue;
        }
        assert!(golden.tensors.keys().filter(|name| name.starts_with("grad.")).count() > 1);
        let golden = golden.no_dropout();
        let (mut model, params) = golden.trained(Role::Base, DType::F32)?;
        for again in [false, true] {
            model.set_checkpoint_layers(again);
            for path in OpPath::ALL {
                // In training, since layers are only recomputed in training.
                let cx = Context::from(Pass::Train { draw: 0 }).with_path(path);
                let loss = golden.loss(model.as_ref(), &cx)?;
                assert_close(&loss, &golden.tensors["loss"].squeeze(0)?, 2e-5)?;
                let grads = loss.backward()?;
                for (name, expected) in golden.tensors.iter().filter(|(name, _)| name.starts_with("grad.")) {
                    let name = &name["grad.".len()..];
                    let param = params.get(name).ok_or_else(|| format!("{name} is no parameter"))?;
                    let grad = grads.get(&param.var).ok_or_else(|| format!("{name} has no gradient"))?;
                    let what = |error| format!("{family}, {name}, {path:?}, again {again}: {error}");
                    assert_close(grad, expected, 5e-5).map_err(what)?;
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_checkpoint_loads_with_and_without_its_prefix() -> Outcome {
    for family in FAMILIES {
        let golden = Golden::open(family)?;
        let prefix = golden.config()?.prefix();
        let bare = golden.tensors.iter().map(|(name, t)| {
            // Tensors outside of the body keep their names.
            (name.strip_prefix(&prefix).unwrap_or(name).to_string(), t.clone())
        });
        let bare = Golden { tensors: bare.collect(), config: golden.config.clone() };
        assert_ne!(bare.tensors.contains_key("embeddings.word_embeddings.weight"), family == "modernbert");
        let logits = bare.logits(bare.frozen(DType::F32)?.as_ref(), &Pass::Mean.into())?;
        assert_close(&logits, &golden.tensors["logits"], 1e-5)?;
    }
    Ok(())
}

#[test]
fn a_model_that_was_trained_whole_is_saved_under_the_checkpoint_s_names() -> Outcome {
    for family in FAMILIES {
        let dir = tempfile::tempdir()?;
        let golden = Golden::open(family)?;
        let prefix = golden.config()?.prefix();
        let names = |path: &Path| -> Outcome<BTreeSet<String>> {
            Ok(candle_core::safetensors::load(path, &Device::Cpu)?.into_keys().collect())
        };
        let whole = golden.write(&dir.path().join("whole"))?;
        let expected = names(&dir.path().join("whole/model.safetensors"))?;
        let body = golden
            .tensors
            .iter()
            .map(|(name, tensor)| (name.strip_prefix(&prefix).unwrap_or(name).to_string(), tensor.clone()));
        let bare = Golden { tensors: body.collect(), config: golden.config.clone() };
        let bare = bare.write(&dir.path().join("bare"))?;
        for (which, files) in [("whole", whole), ("bare", bare)] {
            let start = MethodInit::Fresh(Method::Full, Targets::default());
            let classifier = Classifier::load(&files, 3, &start, Noise::new(1), DType::F32, &Device::Cpu)?;
            let out = dir.path().join(format!("{which} trained"));
            classifier.save("base", &out)?;
            assert_eq!(names(&out.join("model/model.safetensors"))?, expected, "{family}, {which}");
            let opened = Classifier::open(&out, None, DType::F32, &Device::Cpu)?;
            let logits = golden.logits(opened.model.as_ref(), &Pass::Mean.into())?;
            assert_close(&logits, &golden.tensors["logits"], 1e-5)?;
        }
    }
    Ok(())
}

#[test]
fn each_dropout_acts_in_training_alone() -> Outcome {
    for family in FAMILIES {
        let golden = Golden::open(family)?.no_dropout();
        let mean = golden.logits(golden.frozen(DType::F32)?.as_ref(), &Pass::Mean.into())?;
        let rates: &[&str] = match family {
            "distilbert" => &["dropout", "attention_dropout", "seq_classif_dropout"],
            "electra" => &["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"],
            "deberta" => {
                &["hidden_dropout_prob", "attention_probs_dropout_prob", "pooler_dropout", "cls_dropout"]
            }
            _ => &["embedding_dropout", "attention_dropout", "mlp_dropout", "classifier_dropout"],
        };
        // All other rates are set to 0: a head with a rate of 0 must not use the rate of the body.
        let off: Value = rates.iter().map(|rate| (rate.to_string(), json!(0.0))).collect();
        for rate in rates {
            let golden = Golden::open(family)?.with(off.clone()).with(json!({ *rate: 0.3 }));
            let model = golden.frozen(DType::F32)?;
            let of = |pass: Pass| -> Outcome<Vec<f32>> {
                Ok(golden.logits(model.as_ref(), &pass.into())?.flatten_all()?.to_vec1()?)
            };
            assert_eq!(of(Pass::Mean)?, mean.flatten_all()?.to_vec1::<f32>()?, "{family}, {rate}");
            let one = of(Pass::Train { draw: 1 })?;
            assert_ne!(one, of(Pass::Mean)?, "{family}, {rate}");
            assert_eq!(one, of(Pass::Train { draw: 1 })?, "{family}, {rate}");
            assert_ne!(one, of(Pass::Train { draw: 2 })?, "{family}, {rate}");
        }
    }
    Ok(())
}

#[test]
fn a_new_head_is_trained_whole_and_what_is_saved_computes_the_same() -> Outcome {
    for (family, expected, heads) in [
        ("distilbert", ["k_lin", "q_lin", "v_lin"].as_slice(), ["classifier", "pre_classifier"].as_slice()),
        ("electra", &["key", "query", "value"], &["classifier.dense", "classifier.out_proj"]),
        ("deberta", &["key_proj", "query_proj", "value_proj"], &["classifier", "pooler.dense"]),
        ("modernbert", &["Wqkv"], &["classifier"]),
    ] {
        let dir = tempfile::tempdir()?;
        let mut golden = Golden::open(family)?;
        // As after pre-training: without a head.
        golden.tensors.retain(|name, _| !heads.iter().any(|head| name.starts_with(&format!("{head}."))));
        let files = golden.write(&dir.path().join("base"))?;
        let config = MonteCLoRAConfig { rank: 3, num_components: 3, ..MonteCLoRAConfig::default() };
        let start = MethodInit::Fresh(Method::MonteCLoRA(config), Targets::default());
        let classifier = Classifier::load(&files, 3, &start, Noise::new(1), DType::F32, &Device::Cpu)?;
        scatter(&classifier.params)?;
        let mut last: BTreeSet<String> = BTreeSet::new();
        classifier.model.visit_linears(&mut |layer| {
            let adapted =
                layer.active().map(|_| layer.path().rsplit('.').next().unwrap_or_default().to_string());
            last.extend(adapted);
            Ok(())
        })?;
        assert!(last.iter().eq(expected), "{family}: {last:?}");
        let trained = classifier.params.of_role(Role::Head).into_iter();
        let trained: BTreeSet<String> =
            trained.filter_map(|(name, _)| Some(name.rsplit_once('.')?.0.to_string())).collect();
        assert!(trained.iter().eq(heads), "{family}: {trained:?}");

        let logits = golden.logits(classifier.model.as_ref(), &Pass::Mean.into())?;
        let merged = dir.path().join("merged");
        classifier.save_merged(&merged)?;
        let opened = Classifier::open(&merged, None, DType::F32, &Device::Cpu)?;
        let again = golden.logits(opened.model.as_ref(), &Pass::Mean.into())?;
        assert_close(&again, &logits, 1e-5).map_err(|error| format!("{family}: {error}"))?;
    }
    Ok(())
}

#[test]
fn a_head_that_peft_saved_in_part_is_completed_by_the_checkpoint_alone() -> Outcome {
    let golden = Golden::open("deberta")?;
    let dir = tempfile::tempdir()?;
    let files = golden.write(&dir.path().join("base"))?;
    let start = MethodInit::Fresh(Method::Lora(LoraConfig::default()), Targets::default());
    let classifier = Classifier::load(&files, 3, &start, Noise::new(1), DType::F32, &Device::Cpu)?;
    let pooler: Vec<(String, Tensor)> =
        classifier.params.snapshot()?.into_iter().filter(|(name, _)| name.starts_with("pooler.")).collect();
    scatter(&classifier.params)?;
    pooler.iter().try_for_each(|(name, value)| classifier.params.set(name, value))?;
    let logits = golden.logits(classifier.model.as_ref(), &Pass::Mean.into())?;
    classifier.save("base", dir.path())?;
    // Of a DeBERTa's head PEFT only saves the classifier.
    let mut file = AdapterFile::read(dir.path().join("adapter"))?;
    file.saved_modules.retain(|name, _| !name.starts_with("pooler."));
    file.config.modules_to_save = Some(vec!["classifier".into(), "score".into()]);
    file.write(dir.path().join("part"), ExportFormat::Peft)?;
    let open = |files: &ModelFiles| {
        Classifier::open(&dir.path().join("part"), Some(files), DType::F32, &Device::Cpu)
    };
    let again = golden.logits(open(&files)?.model.as_ref(), &Pass::Mean.into())?;
    assert_close(&again, &logits, 1e-6)?;

    // An adapter of two classes on a checkpoint of three: the pooler still comes from the base.
    let three = AdapterFile::read(dir.path().join("part"))?;
    let mut two = three.clone();
    for (name, tensor) in &three.saved_modules {
        two.saved_modules.insert(name.clone(), tensor.narrow(0, 0, 2)?);
    }
    two.labels = None;
    two.write(dir.path().join("two"), ExportFormat::Peft)?;
    let opened = Classifier::open(&dir.path().join("two"), Some(&files), DType::F32, &Device::Cpu)?;
    let again = golden.logits(opened.model.as_ref(), &Pass::Mean.into())?;
    assert_close(&again, &logits.narrow(1, 0, 2)?, 1e-6)?;

    let mut bare = Golden::open("deberta")?;
    bare.tensors.retain(|name, _| !name.starts_with("pooler.") && !name.starts_with("classifier."));
    let error =
        open(&bare.write(&dir.path().join("bare"))?).err().ok_or("a pooler from nowhere")?.to_string();
    assert!(
        error.contains("pooler.dense") && error.contains("neither the checkpoint nor the adapter"),
        "{error}"
    );
    Ok(())
}

#[test]
fn full_fine_tuning_differentiates_every_weight() -> Outcome {
    for (_, golden, _) in variants()? {
        let (model, params) = golden.trained(Role::Base, DType::F64)?;
        check(&params, || golden.loss(model.as_ref(), &Pass::Train { draw: 4 }.into()))?;
    }
    Ok(())
}

#[test]
fn adapters_and_prompts_are_differentiated() -> Outcome {
    let (targets, cx) = (Targets::parse("all-linear")?, Context::from(Pass::Train { draw: 4 }));
    for (_, golden, _) in variants()? {
        let (mut model, params) = golden.trained(Role::Head, DType::F64)?;
        let config = LoraConfig { rank: 3, alpha: 7.0, dropout: 0.2, ..LoraConfig::default() };
        inject::lora(model.as_mut(), &targets, &config, &params)?;
        scatter(&params)?;
        check(&params, || golden.loss(model.as_ref(), &cx))?;

        let (mut model, params) = golden.trained(Role::Head, DType::F64)?;
        let embedding = model.embedding_mut().ok_or("an embedding")?;
        prompt_tuning(embedding, "default", &PromptConfig { virtual_tokens: 3 }, &params)?;
        scatter(&params)?;
        check(&params, || golden.loss(model.as_ref(), &cx))?;

        let (mut model, params) = golden.trained(Role::Head, DType::F64)?;
        let config = MonteCLoRAConfig {
            rank: 3,
            alpha: 7.0,
            num_components: 3,
            sample_scaler: 0.3,
            kl_weight: 0.1,
            mode: KlEvaluation::Sampled,
            ..MonteCLoRAConfig::default()
        };
        inject::monteclora(model.as_mut(), &Targets::default(), &config, &params)?;
        scatter(&params)?;
        let regularizer = Regularizer::new(&config);
        check(&params, || {
            Ok((golden.loss(model.as_ref(), &cx)? + regularizer.for_model(model.as_ref(), cx.pass)?.total)?)
        })?;
    }
    Ok(())
}
