//! Tests of adapters saved from a model and loaded into one, and of files that do not fit.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::Linear;

use super::*;
use crate::adapter::{linears, AdaptableLinear, AdaptableModel, Params, Pass, Prior, Role};
use crate::adapters::{Lora, LoraConfig};
use crate::error::{Error, Result};
use crate::monteclora::{EvidenceBound, MonteCLoRA, MonteCLoRAConfig};
use crate::noise::Noise;

const PATHS: [&str; 3] = ["enc.layer.0.self.query", "enc.layer.1.self.query", "enc.layer.0.out.dense"];

/// Linear layers of 6 inputs and 5 outputs, and a head.
struct Toy {
    layers: Vec<AdaptableLinear>,
    params: Params,
}

impl Toy {
    fn new(seed: u64) -> Result<Self> {
        Self::called(&PATHS, seed)
    }

    /// A toy with layers at these paths.
    fn called(paths: &[&str], seed: u64) -> Result<Self> {
        let base = || Ok::<_, Error>(Linear::new(Tensor::ones((5, 6), DType::F32, &Device::Cpu)?, None));
        let layers =
            paths.iter().map(|path| Ok(AdaptableLinear::new(*path, base()?))).collect::<Result<_>>()?;
        let params = Params::new(Noise::new(seed), &Device::Cpu);
        params.create("classifier.weight", Role::Head, (2, 5), &crate::adapter::Init::Normal(1.0))?;
        Ok(Self { layers, params })
    }

    /// A toy with MonteCLoRA of these ranks on the layers (0: none), every parameter in general position.
    fn adapted(ranks: [usize; 3], config: &MonteCLoRAConfig) -> Result<Self> {
        Self::new(1)?.with(&ranks, config)
    }

    fn with(self, ranks: &[usize], config: &MonteCLoRAConfig) -> Result<Self> {
        let mut toy = self;
        for (layer, &rank) in toy.layers.iter_mut().zip(ranks).filter(|(_, rank)| **rank > 0) {
            let config = MonteCLoRAConfig { rank, ..config.clone() };
            let path = layer.path().to_string();
            layer
                .add("default", Box::new(MonteCLoRA::new(&toy.params, &path, "default", (6, 5), &config)?))?;
        }
        for (name, param) in toy.params.all() {
            let noise = Tensor::arange(1f32, 1.0 + param.var.elem_count() as f32, &Device::Cpu)?;
            let shift = 0.1 + 0.01 * name.len() as f64;
            toy.params.set(&name, &noise.affine(0.03, shift)?.sin()?.reshape(param.var.shape())?)?;
        }
        Ok(toy)
    }

    fn outputs(&self, pass: Pass) -> Result<Vec<f32>> {
        let xs = Tensor::arange(0f32, 12.0, &Device::Cpu)?.reshape((2, 6))?;
        let ys = self
            .layers
            .iter()
            .map(|layer| Ok(layer.forward(&xs, &pass.into())?))
            .collect::<Result<Vec<_>>>()?;
        Ok(Tensor::stack(&ys, 0)?.flatten_all()?.to_vec1()?)
    }
}

impl AdaptableModel for Toy {
    linears!(layers);
}

fn paper() -> MonteCLoRAConfig {
    MonteCLoRAConfig {
        rank: 3,
        alpha: 7.0,
        num_components: 2,
        cooperative_weight: 0.5,
        ..MonteCLoRAConfig::paper()
    }
}

fn file(toy: &Toy, config: &MonteCLoRAConfig) -> Result<AdapterFile> {
    let metadata = AdapterMetadata {
        base_model: Some("owner/tiny".into()),
        revision: None,
        task: Some(TaskType::SequenceClassification),
        labels: None,
    };
    AdapterFile::from_model(
        toy,
        "default",
        &toy.params,
        &AdapterMethod::MonteCLoRA(config.clone()),
        &metadata,
    )
}

fn load(file: &AdapterFile, toy: &mut Toy, adapter: &str) -> Result<()> {
    let params = toy.params.clone();
    file.apply(toy, adapter, &params)
}

#[test]
fn a_model_saved_and_loaded_gives_the_same_outputs_and_the_same_draws() -> Result<()> {
    let evidence = Some(EvidenceBound { std: 0.1, temperature: 0.5, latents: true });
    for (use_rslora, prior, evidence) in
        [(false, None, None), (true, Some(Prior::calibrated()), None), (true, None, evidence)]
    {
        let relative_scaler = prior.map(|_| 2.0);
        let config = MonteCLoRAConfig { use_rslora, prior, evidence, relative_scaler, ..paper() };
        let toy = Toy::adapted([3, 2, 3], &config)?;
        let dir = tempfile::tempdir().unwrap();
        file(&toy, &config)?.write(dir.path(), ExportFormat::Peft)?;
        let read = AdapterFile::read(dir.path())?;
        // Fields that older files do not have are written only if they are used.
        let text = std::fs::read_to_string(dir.path().join(OWN_FILE)).unwrap();
        assert_eq!(text.contains("\"prior\"") || text.contains("\"evidence\""), use_rslora, "{text}");
        assert_eq!(read.method(), AdapterMethod::MonteCLoRA(config));
        assert_eq!(read.config.rank_pattern, [(PATHS[1].to_string(), 2)]);
        let mut other = Toy::new(1)?;
        load(&read, &mut other, "default")?;
        for pass in [Pass::Mean, Pass::Train { draw: 3 }, Pass::Posterior { draw: 1 }] {
            assert_eq!(toy.outputs(pass)?, other.outputs(pass)?, "{pass:?}");
        }
        assert_ne!(toy.outputs(Pass::Mean)?, Toy::new(1)?.outputs(Pass::Mean)?);
        let head = |toy: &Toy| toy.params.get("classifier.weight").unwrap().var.to_vec2::<f32>();
        assert_eq!(head(&toy)?, head(&other)?);
    }
    Ok(())
}

#[test]
fn layers_of_several_alphas_are_written_with_theirs() -> Result<()> {
    for use_rslora in [false, true] {
        let config = MonteCLoRAConfig { use_rslora, ..paper() };
        let toy = Toy::new(1)?.with(&[3, 0, 0], &config)?;
        let wide = MonteCLoRAConfig { alpha: 11.0, ..config.clone() };
        let mut toy = toy;
        let adapter = MonteCLoRA::new(&toy.params, PATHS[1], "default", (6, 5), &wide)?;
        toy.layers[1].add("default", Box::new(adapter))?;
        let toy = toy.with(&[], &config)?;
        let dir = tempfile::tempdir().unwrap();
        file(&toy, &config)?.write(dir.path(), ExportFormat::Peft)?;
        let read = AdapterFile::read(dir.path())?;
        let [(path, alpha)] = &read.config.alpha_pattern[..] else { panic!("{:?}", read.config) };
        assert!(path == PATHS[1] && (alpha - 11.0).abs() < 1e-12, "{path} {alpha}");
        let mut other = Toy::new(1)?;
        load(&read, &mut other, "default")?;
        assert_eq!(toy.outputs(Pass::Mean)?, other.outputs(Pass::Mean)?);
    }
    Ok(())
}

#[test]
fn a_rank_above_a_layers_dimensions_is_taken_as_peft_takes_it() -> Result<()> {
    let config = MonteCLoRAConfig { rank: 8, ..paper() };
    let toy = Toy::adapted([8, 7, 0], &config)?;
    let mut other = Toy::new(1)?;
    load(&file(&toy, &config)?, &mut other, "default")?;
    for pass in [Pass::Mean, Pass::Posterior { draw: 1 }] {
        assert_eq!(toy.outputs(pass)?, other.outputs(pass)?, "{pass:?}");
    }
    Ok(())
}

#[test]
fn of_a_model_that_sees_images_only_the_decoder_is_written_and_read() -> Result<()> {
    // The paths in Gemma 3's checkpoints, and in transformers since 4.52.
    let names = ["language_model.model", "model.language_model"];
    let paths = names.map(|name| [0, 1].map(|i| format!("{name}.layers.{i}.self_attn.q_proj")));
    let seeing = "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj";
    let toy = |which: usize| Toy::called(&paths[which].each_ref().map(String::as_str), 1);
    let one = toy(0)?.with(&[3, 2], &paper())?;
    let written = file(&one, &paper())?;
    for names in &paths {
        let all =
            [names[0].as_str(), names[1].as_str(), seeing, "model.vision_tower.layers.0.self_attn.q_proj"];
        assert_eq!(written.config.are_targets(&all)?, [true, true, false, false]);
        assert_eq!(written.config.ranks_of(&all[..2])?, [3, 2]);
    }
    // If only some layers are adapted, they are targeted by the ends of their paths.
    let part = file(&toy(1)?.with(&[0, 3], &paper())?, &paper())?;
    assert_eq!(part.config.are_targets(&[&paths[0][0], &paths[0][1], seeing])?, [false, true, false]);

    // As PEFT writes it: the last name of the layers, which also matches in the vision part.
    let mut wide = written.clone();
    wide.config.target_modules = Some(TargetModules::Names(vec!["q_proj".into()]));
    wide.layers.insert(seeing.into(), written.layers[&paths[0][0]].clone());
    for which in [0, 1] {
        let mut other = toy(which)?;
        load(&wide, &mut other, "default")?;
        assert_eq!(other.outputs(Pass::Mean)?, one.outputs(Pass::Mean)?);
    }
    // In any other model, the layer of the vision part is unknown.
    let mut other = file(&Toy::adapted([3, 3, 0], &paper())?, &paper())?;
    other.config.target_modules = Some(TargetModules::Names(vec!["query".into(), "q_proj".into()]));
    other.layers.insert(seeing.into(), written.layers[&paths[0][0]].clone());
    let error = load(&other, &mut Toy::new(1)?, "default").unwrap_err().to_string();
    assert!(error.starts_with(&format!("no layer matches {seeing}; ")), "{error}");
    Ok(())
}

#[test]
fn a_file_is_a_copy_that_training_does_not_change() -> Result<()> {
    let toy = Toy::adapted([3, 3, 0], &paper())?;
    let file = file(&toy, &paper())?;
    let before = file.layers[PATHS[0]].a.to_vec2::<f32>()?;
    toy.params.set(&format!("{}.default.a", PATHS[0]), &Tensor::zeros((3, 6), DType::F32, &Device::Cpu)?)?;
    assert_eq!(file.layers[PATHS[0]].a.to_vec2::<f32>()?, before);
    Ok(())
}

#[test]
fn targets_are_names_where_every_such_layer_is_adapted() -> Result<()> {
    let names =
        |ranks| Ok::<_, Error>(file(&Toy::adapted(ranks, &paper())?, &paper())?.config.target_modules);
    let list = |names: &[&str]| Some(TargetModules::Names(names.iter().map(ToString::to_string).collect()));
    assert_eq!(names([3, 3, 0])?, list(&["query"]));
    assert_eq!(names([0, 3, 3])?, list(&[PATHS[2], PATHS[1]]));
    let modules = file(&Toy::adapted([3, 3, 3], &paper())?, &paper())?.config.modules_to_save;
    assert_eq!(modules, Some(vec!["classifier".into(), "score".into()]));
    Ok(())
}

#[test]
fn an_adapter_of_peft_s_own_keeps_the_law_it_was_trained_under() -> Result<()> {
    let config = MonteCLoRAConfig { rank: 3, alpha: 7.0, buffer_size: 9, ..MonteCLoRAConfig::peft() };
    let toy = Toy::adapted([3, 3, 0], &config)?;
    let dir = tempfile::tempdir().unwrap();
    file(&toy, &config)?.write(dir.path(), ExportFormat::Peft)?;
    std::fs::remove_file(dir.path().join(OWN_FILE)).unwrap();
    let mut read = AdapterFile::read(dir.path())?;
    assert_eq!(read.method(), AdapterMethod::MonteCLoRA(config));
    // As if PEFT had continued training with the entropy term.
    read.config.monteclora_config.as_mut().unwrap().use_entropy = true;
    let AdapterMethod::MonteCLoRA(config) = read.method() else { panic!("{:?}", read.method()) };
    assert_eq!(config.cooperative_weight, 1.0);
    Ok(())
}

#[test]
fn an_eps_that_the_other_file_has_by_now_is_not_worked_out_anew() -> Result<()> {
    let config = MonteCLoRAConfig { rank: 3, ..MonteCLoRAConfig::calibrated() };
    let toy = Toy::adapted([3, 3, 0], &config)?;
    let mut file = file(&toy, &config)?;
    let read = |file: &AdapterFile| match file.method() {
        AdapterMethod::MonteCLoRA(config) => (config.sample_scaler, config.relative_scaler),
        other => panic!("{other:?}"),
    };
    assert_eq!(read(&file), (config.sample_scaler, config.relative_scaler));
    file.config.monteclora_config.as_mut().unwrap().sample_scaler = 0.01;
    assert_eq!(read(&file), (0.01, None));
    Ok(())
}

#[test]
fn our_own_file_goes_with_the_adapter_that_it_belongs_to() -> Result<()> {
    let toy = Toy::adapted([3, 3, 0], &paper())?;
    let dir = tempfile::tempdir().unwrap();
    let mut file = file(&toy, &paper())?;
    file.write(dir.path(), ExportFormat::Peft)?;
    std::fs::write(dir.path().join(OWN_FILE), "{").unwrap();
    let message = AdapterFile::read(dir.path()).unwrap_err().to_string();
    assert!(message.contains(OWN_FILE) && message.contains("malformed"), "{message}");
    (file.saved_modules, file.config.modules_to_save) = (BTreeMap::new(), None);
    file.write(dir.path(), ExportFormat::Serving { fold_rslora: false })?;
    assert!(!dir.path().join(OWN_FILE).exists());
    assert!(matches!(AdapterFile::read(dir.path())?.method(), AdapterMethod::Lora(_)));
    Ok(())
}

#[test]
fn lora_comes_and_goes_the_same_way() -> Result<()> {
    let config = LoraConfig { rank: 2, alpha: 5.0, dropout: 0.1, use_rslora: false, prior: None };
    let mut toy = Toy::new(1)?;
    let path = PATHS[0];
    toy.layers[0].add("mine", Box::new(Lora::new(&toy.params, path, "mine", (6, 5), &config)?))?;
    toy.params.set(&format!("{path}.mine.b"), &Tensor::ones((5, 2), DType::F32, &Device::Cpu)?)?;
    let method = AdapterMethod::Lora(config.clone());
    let file = AdapterFile::from_model(&toy, "mine", &toy.params, &method, &AdapterMetadata::default())?;
    assert_eq!(file.method(), method);
    // With a prior, which PEFT's format has no place for.
    let with_prior = AdapterMethod::Lora(LoraConfig { prior: Some(Prior::map()), ..config });
    let dir = tempfile::tempdir().unwrap();
    AdapterFile::from_model(&toy, "mine", &toy.params, &with_prior, &AdapterMetadata::default())?
        .write(dir.path(), ExportFormat::Peft)?;
    assert_eq!(AdapterFile::read(dir.path())?.method(), with_prior);
    std::fs::remove_file(dir.path().join(OWN_FILE)).unwrap();
    assert_eq!(AdapterFile::read(dir.path())?.method(), method);
    let mut other = Toy::new(2)?;
    load(&file, &mut other, "theirs")?;
    assert_eq!(toy.outputs(Pass::Mean)?, other.outputs(Pass::Mean)?);
    let wrong = AdapterFile::from_model(
        &toy,
        "mine",
        &toy.params,
        &AdapterMethod::MonteCLoRA(paper()),
        &AdapterMetadata::default(),
    );
    assert!(wrong.unwrap_err().to_string().contains("is not MonteCLoRA"));
    let absent = AdapterFile::from_model(&toy, "other", &toy.params, &method, &AdapterMetadata::default());
    assert!(absent.unwrap_err().to_string().contains("no layer has an adapter \"other\""));
    Ok(())
}

#[test]
fn what_does_not_fit_a_model_is_named_and_changes_nothing() -> Result<()> {
    type Spoil = fn(&mut AdapterFile);
    let cases: [(&str, Spoil); 9] = [
        ("embed_tokens.weight: modules_to_save is only supported for a task head, and the model has classifier", |f| {
            f.config.modules_to_save.as_mut().unwrap().push("embed_tokens".into());
            let tensor = f.saved_modules["classifier.weight"].clone();
            f.saved_modules.insert("embed_tokens.weight".into(), tensor);
        }),
        ("enc.layer.9.self.query", |f| {
            let layer = f.layers[PATHS[0]].clone();
            f.layers.insert("enc.layer.9.self.query".into(), layer);
        }),
        ("enc.layer.1.self.query.lora_A.weight: it is missing", |f| drop(f.layers.remove(PATHS[1]))),
        ("the layer needs shape [3, 6], got [3, 4]", |f| {
            let layer = f.layers.get_mut(PATHS[0]).unwrap();
            layer.a = layer.a.narrow(1, 0, 4).unwrap();
        }),
        ("the layer needs shape [5, 3], got [4, 3]", |f| {
            let layer = f.layers.get_mut(PATHS[0]).unwrap();
            layer.b = layer.b.narrow(0, 0, 4).unwrap();
        }),
        ("classifier.weight: expected shape [2, 5]", |f| {
            let tensor = f.saved_modules["classifier.weight"].narrow(0, 0, 1).unwrap();
            f.saved_modules.insert("classifier.weight".into(), tensor);
        }),
        ("classifier.bias: the model has no trainable parameter", |f| {
            f.saved_modules
                .insert("classifier.bias".into(), Tensor::ones(2, DType::F32, &Device::Cpu).unwrap());
        }),
        ("classifier.weight: it is missing from the file", |f| {
            (f.config.modules_to_save, f.saved_modules) = (None, Default::default());
        }),
        ("1.self.query\": expected a positive number, got 0", |f| {
            f.config.alpha_pattern.push((PATHS[1].into(), 0.0));
        }),
    ];
    for (words, spoil) in cases {
        let mut spoilt = file(&Toy::adapted([3, 3, 0], &paper())?, &paper())?;
        spoil(&mut spoilt);
        let mut toy = Toy::new(1)?;
        let count = toy.params.all().len();
        let message = load(&spoilt, &mut toy, "default").unwrap_err().to_string();
        assert!(message.contains(words), "{words}: {message}");
        assert_eq!(toy.params.all().len(), count);
        assert!(toy.layers.iter().all(|layer| layer.active().is_none()));
    }
    let mut toy = Toy::adapted([3, 3, 0], &paper())?;
    let message = load(&file(&toy, &paper())?, &mut toy, "default").unwrap_err().to_string();
    assert!(message.contains("has an adapter \"default\" already"), "{message}");
    Ok(())
}

/// What a failed [`AdapterFile::apply`] must not change: parameter names, the head, active adapters.
fn state(toy: &Toy) -> Result<(Vec<String>, Vec<f32>, String)> {
    let names = toy.params.all().into_iter().map(|(name, _)| name).collect();
    let head = toy.params.get("classifier.weight").unwrap().var.flatten_all()?.to_vec1()?;
    let active = toy.layers.iter().map(|layer| layer.active().map(|(name, _)| name)).collect::<Vec<_>>();
    let active = format!("{active:?}");
    Ok((names, head, active))
}

#[test]
fn a_failure_on_the_way_takes_everything_back() -> Result<()> {
    let file = file(&Toy::adapted([3, 3, 0], &paper())?, &paper())?;
    // The name of the second layer's B is taken: loading fails after the first layer and the second A are
    // made.
    let mut toy = Toy::new(1)?;
    let taken = format!("{}.default.b", PATHS[1]);
    toy.params.create(&taken, Role::B, 1, &crate::adapter::Init::Constant(0.0))?;
    let before = state(&toy)?;
    let message = load(&file, &mut toy, "default").unwrap_err().to_string();
    assert!(message.contains(&taken), "{message}");
    assert_eq!(state(&toy)?, before);
    Ok(())
}

#[test]
fn a_merged_model_takes_no_file() -> Result<()> {
    let written = file(&Toy::adapted([3, 3, 0], &paper())?, &paper())?;
    let mut toy = Toy::adapted([0, 0, 3], &paper())?;
    crate::inject::merge::merge(&mut toy)?;
    let before = state(&toy)?;
    let message = load(&written, &mut toy, "second").unwrap_err().to_string();
    assert!(message.contains(PATHS[2]) && message.contains("unmerge it first"), "{message}");
    assert_eq!(state(&toy)?, before);
    Ok(())
}

#[test]
fn a_second_adapter_cannot_bring_another_head() -> Result<()> {
    let mut toy = Toy::adapted([3, 3, 0], &paper())?;
    let mut second = file(&toy, &paper())?;
    load(&second, &mut toy, "same")?;
    let head = (&second.saved_modules["classifier.weight"] + 1.0)?;
    second.saved_modules.insert("classifier.weight".into(), head);
    let before = state(&toy)?;
    let message = load(&second, &mut toy, "second").unwrap_err().to_string();
    assert!(message.contains("classifier.weight: it differs from the head in use"), "{message}");
    assert_eq!(state(&toy)?, before);
    // A model's only adapter may bring its own head.
    load(&second, &mut Toy::new(1)?, "second")
}
