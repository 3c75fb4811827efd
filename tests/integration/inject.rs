//! Adapters on whole models: which layers get one, and what that changes.

use std::collections::BTreeMap;

use crate::support::{assert_close, padded_batch, scatter, toy_classifier, toy_config, Outcome};
use candle_core::{DType, Device, Tensor};
use monteclora::adapter::{AdaptableModel, Context, Params, Prior, PriorForm, Role};
use monteclora::adapters::LoraConfig;
use monteclora::inject::{self, Select, Targets};
use monteclora::models::roberta::{Family, RobertaForSequenceClassification};
use monteclora::ops::{self, OpPath};
use monteclora::optim::{check_gradients, AdamW, AdamWConfig};
use monteclora::peft::{self, AdapterFile};
use monteclora::{MonteCLoRAConfig, Pass, Regularizer};

fn frozen(family: Family) -> Outcome<(RobertaForSequenceClassification, Params)> {
    toy_classifier(&toy_config(family), Role::Head, DType::F32)
}

fn paths(targets: &Targets, family: Family) -> Outcome<Vec<String>> {
    let (model, _) = frozen(family)?;
    Ok(targets.resolve(&model, 4, 8.0)?.into_iter().map(|target| target.path).collect())
}

fn error(targets: &Targets) -> String {
    let (model, _) = frozen(Family::Roberta).expect("a toy model");
    targets.resolve(&model, 4, 8.0).expect_err("an error").to_string()
}

fn logits(model: &RobertaForSequenceClassification, cx: &Context) -> Outcome<Tensor> {
    let (ids, types, mask) = padded_batch(model.config())?;
    Ok(model.forward(&ids, Some(&types), &mask, cx)?)
}

fn lora() -> LoraConfig {
    LoraConfig { rank: 3, alpha: 7.0, ..LoraConfig::default() }
}

fn bayes() -> MonteCLoRAConfig {
    MonteCLoRAConfig { rank: 3, alpha: 7.0, num_components: 3, ..MonteCLoRAConfig::default() }
}

#[test]
fn targets_follow_the_rules_of_peft() -> Outcome {
    let names = |text: &str| Targets::parse(text).map_err(Box::<dyn std::error::Error>::from);
    let two =
        |name: &str| -> Vec<String> { (0..2).map(|i| format!("roberta.encoder.layer.{i}.{name}")).collect() };
    let query = two("attention.self.query");
    assert_eq!(paths(&names("query")?, Family::Roberta)?, query);
    assert_eq!(paths(&names("self.query")?, Family::Roberta)?, query);
    assert_eq!(paths(&names(&query[1])?, Family::Roberta)?, query[1..]);
    assert_eq!(paths(&names("default")?, Family::Roberta)?.len(), 6);
    assert_eq!(paths(&names("all-linear")?, Family::Roberta)?.len(), 12);
    assert_eq!(paths(&names("all-linear")?, Family::Bert)?.len(), 13); // and the pooler
    let regex = Targets {
        select: Select::Regex(r".*\.(?!0\.)\d+\.attention\.self\.(key|value)".into()),
        ..Targets::default()
    };
    assert_eq!(
        paths(&regex, Family::Roberta)?,
        ["roberta.encoder.layer.1.attention.self.key", "roberta.encoder.layer.1.attention.self.value"]
    );
    let exclude =
        Targets { exclude: Some(Select::parse("intermediate.dense,output.dense")?), ..names("all-linear")? };
    assert_eq!(paths(&exclude, Family::Roberta)?, paths(&names("query,key,value")?, Family::Roberta)?);
    for pattern in [None, Some("layer".to_string()), Some("(layer|h)".to_string())] {
        let layers =
            Targets { layers_to_transform: Some(vec![1]), layers_pattern: pattern, ..names("query")? };
        assert_eq!(paths(&layers, Family::Roberta)?, query[1..]);
    }
    // As PEFT 0.21's `check_target_module_exists`, which ignores the layer index if a target is a whole path.
    let exact = names(&format!("{},key", query[0]))?;
    let layers = Targets { layers_to_transform: Some(vec![1]), ..exact };
    let key = "roberta.encoder.layer.1.attention.self.key".to_string();
    assert_eq!(paths(&layers, Family::Roberta)?, [query[0].clone(), key]);
    Ok(())
}

#[test]
fn a_target_that_matches_nothing_lists_the_names_there_are() -> Outcome {
    let text = error(&Targets::parse("query,q_proj")?);
    assert!(text.contains("no layer matches q_proj") && text.contains("dense, key, query, value"), "{text}");
    let regex = Targets { select: Select::Regex("query".into()), ..Targets::default() };
    assert!(error(&regex).contains("no layer matches query")); // an expression matches whole paths
    let broken = Targets { select: Select::Regex("(query".into()), ..Targets::default() };
    assert!(error(&broken).contains("targets"), "{}", error(&broken));
    let layers = Targets { layers_to_transform: Some(vec![1, 9]), ..Targets::default() };
    let text = error(&layers);
    let expected =
        "no layer matches layer 9 of layers_to_transform; the model has: 2 layers with targets, 0 to 1";
    assert!(text.contains(expected), "{text}");
    let pattern = Targets { rank_pattern: BTreeMap::from([("q_proj".into(), 2)]), ..Targets::default() };
    assert!(error(&pattern).contains("rank_pattern") && error(&pattern).contains("q_proj"));
    let pattern = Targets { alpha_pattern: BTreeMap::from([("up_proj".into(), 2.0)]), ..Targets::default() };
    assert!(error(&pattern).contains("alpha_pattern") && error(&pattern).contains("up_proj"));
    let exclude = |exclude| Targets { exclude: Some(exclude), ..Targets::default() };
    assert!(error(&exclude(Select::parse("query,o_proj")?)).contains("no layer matches o_proj"));
    assert!(error(&exclude(Select::Regex("(query".into()))).contains("(query"));
    assert!(error(&exclude(Select::ModelDefault)).contains("no layer matches Targets"));
    assert!(Targets::parse("query,,key").unwrap_err().to_string().contains("empty name"));
    Ok(())
}

#[test]
fn rank_and_alpha_patterns_change_single_layers() -> Outcome {
    let (mut model, params) = frozen(Family::Roberta)?;
    let targets = Targets {
        rank_pattern: BTreeMap::from([("key".into(), 5)]),
        alpha_pattern: BTreeMap::from([(r"layer\.1\.attention\.self\.value".into(), 11.0)]),
        ..Targets::parse("query,key,value")?
    };
    let resolved = inject::lora(&mut model, &targets, &lora(), &params)?;
    let odd: Vec<_> = resolved.iter().filter(|t| (t.rank, t.alpha) != (3, 7.0)).collect();
    assert_eq!(odd.len(), 3);
    let a = params.get("roberta.encoder.layer.0.attention.self.key.default.a").ok_or("no parameter")?;
    assert_eq!(a.var.dims(), [5, 32]);
    Ok(())
}

#[test]
fn a_rank_of_zero_changes_nothing() -> Outcome {
    let (mut model, params) = frozen(Family::Roberta)?;
    let before = params.all().len();
    let config = LoraConfig { rank: 0, ..lora() };
    let text = inject::lora(&mut model, &Targets::default(), &config, &params).unwrap_err().to_string();
    assert!(text.contains("rank"), "{text}");
    assert_eq!(params.all().len(), before);
    model.visit_linears(&mut |layer| {
        assert!(layer.active().is_none());
        Ok(())
    })?;
    Ok(())
}

#[test]
fn a_new_adapter_changes_nothing_until_b_moves() -> Outcome {
    let (model, _) = frozen(Family::Roberta)?;
    let base = logits(&model, &Pass::Mean.into())?;
    for bayesian in [false, true] {
        let (mut model, params) = frozen(Family::Roberta)?;
        if bayesian {
            inject::monteclora(&mut model, &Targets::default(), &bayes(), &params)?
        } else {
            inject::lora(&mut model, &Targets::default(), &lora(), &params)?
        };
        assert_close(&logits(&model, &Pass::Mean.into())?, &base, 1e-6)?;
        assert_close(&logits(&model, &Pass::Posterior { draw: 1 }.into())?, &base, 1e-6)?;
        scatter(&params)?;
        let moved = (logits(&model, &Pass::Mean.into())? - &base)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(moved > 1e-2, "{moved}");
    }
    Ok(())
}

#[test]
fn the_count_is_that_of_the_paper() -> Outcome {
    // Six layers of 32 x 32 with rank 3: LoRA has 6 * 3 * 64; MonteCLoRA rank + N more a layer.
    let count = |bayesian| -> Outcome<usize> {
        let (mut model, params) = frozen(Family::Roberta)?;
        let head = params.trainable_count();
        if bayesian {
            inject::monteclora(&mut model, &Targets::default(), &bayes(), &params)?
        } else {
            inject::lora(&mut model, &Targets::default(), &lora(), &params)?
        };
        Ok(params.trainable_count() - head)
    };
    assert_eq!(count(false)?, 6 * 3 * 64);
    assert_eq!(count(true)?, 6 * 3 * 64 + 6 * (3 + 3));
    Ok(())
}

#[test]
fn every_trainable_parameter_gets_a_gradient_and_nothing_else_does() -> Outcome {
    for family in [Family::Roberta, Family::Bert] {
        for path in [OpPath::Fused, OpPath::Composed] {
            let (mut model, params) = frozen(family)?;
            inject::monteclora(&mut model, &Targets::parse("all-linear")?, &bayes(), &params)?;
            scatter(&params)?;
            let cx = Context::from(Pass::Train { draw: 0 }).with_path(path);
            let labels = Tensor::new(&[2i64, 0, 1], &Device::Cpu)?;
            let task = ops::cross_entropy(&logits(&model, &cx)?, &labels, -100, path)?;
            let loss = (task + Regularizer::new(&bayes()).for_model(&model, cx.pass)?.total)?;
            let report = check_gradients(&params, &loss)?;
            assert!(report.is_exact(), "{family:?} {path:?}: {report:?}");
        }
    }
    Ok(())
}

#[test]
fn post_hoc_training_freezes_a_and_b() -> Outcome {
    let (mut model, params) = frozen(Family::Roberta)?;
    inject::monteclora(&mut model, &Targets::default(), &bayes(), &params)?;
    for role in [Role::A, Role::B, Role::Head] {
        assert!(params.set_trainable(role, false) > 0);
    }
    assert_eq!(params.trainable_count(), 6 * (3 + 3));
    assert!(params.trainable().iter().all(|(name, _)| name.ends_with("_prior")));
    Ok(())
}

#[test]
fn a_lora_adapter_gets_a_posterior_that_alone_is_trained() -> Outcome {
    for use_rslora in [false, true] {
        let (mut model, mut params) = frozen(Family::Roberta)?;
        let targets = Targets { rank_pattern: BTreeMap::from([("key".into(), 5)]), ..Targets::default() };
        let (trained, config) = (LoraConfig { use_rslora, ..lora() }, bayes());
        inject::lora(&mut model, &targets, &trained, &params)?;
        scatter(&params)?;
        if use_rslora {
            // As if read from a file: applied to a new model.
            let method = peft::AdapterMethod::Lora(trained);
            let file = AdapterFile::from_model(&model, "default", &params, &method, &Default::default())?;
            (model, params) = frozen(Family::Roberta)?;
            file.apply(&mut model, "default", &params)?;
        }
        let before = logits(&model, &Pass::Mean.into())?;
        let config = MonteCLoRAConfig { sample_scaler: 0.3, ..config };
        let prior = Prior { form: PriorForm::Mean { std: 1.0 }, ..Prior::calibrated() };
        let still = MonteCLoRAConfig { prior: Some(prior), ..config.clone() };
        let error = inject::posthoc(&mut model, "around", &still, &params).unwrap_err().to_string();
        assert!(error.contains("only expected_update"), "{error}");
        let layers = inject::posthoc(&mut model, "around", &config, &params)?;
        assert_eq!((layers.len(), layers[1].rank, layers[2].rank), (6, 5, 3));
        assert_eq!(logits(&model, &Pass::Mean.into())?.to_vec2::<f32>()?, before.to_vec2::<f32>()?);
        assert!(assert_differs(&logits(&model, &Pass::Posterior { draw: 0 }.into())?, &before)?);

        let kept = params.snapshot()?;
        let pass = Pass::Train { draw: 0 };
        let labels = Tensor::new(&[2i64, 0, 1], &Device::Cpu)?;
        let task = ops::cross_entropy(&logits(&model, &pass.into())?, &labels, -100, OpPath::Fused)?;
        let loss = (task + Regularizer::new(&config).for_model(&model, pass)?.total)?;
        AdamW::new(&params, AdamWConfig::default())?.backward_step(&loss)?;
        let bits = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
        for (name, param) in params.all() {
            let moved = bits(param.var.as_tensor())? != bits(&kept[&name])?;
            assert_eq!(moved, name.contains(".around.") && name.ends_with("_prior"), "{name}");
        }
        let error = inject::posthoc(&mut model, "again", &config, &params).unwrap_err().to_string();
        assert!(
            error.contains("\"around\" of roberta.encoder.layer.0.attention.self.query is no LoRA"),
            "{error}"
        );
        let (mut model, params) = frozen(Family::Roberta)?;
        let error = inject::posthoc(&mut model, "around", &config, &params).unwrap_err().to_string();
        assert!(error.contains("no layer has an active LoRA adapter"), "{error}");
    }
    Ok(())
}

#[test]
fn an_adapter_is_switched_off_and_taken_away() -> Outcome {
    let (mut model, params) = frozen(Family::Roberta)?;
    let base = logits(&model, &Pass::Mean.into())?;
    inject::lora(&mut model, &Targets::default(), &lora(), &params)?;
    scatter(&params)?;
    let head_moved = frozen(Family::Roberta)?;
    scatter(&head_moved.1)?;
    let base_with_moved_head = logits(&head_moved.0, &Pass::Mean.into())?;
    let adapted = logits(&model, &Pass::Mean.into())?;
    model.visit_linears_mut(&mut |layer| layer.activate(None))?;
    let off = logits(&model, &Pass::Mean.into())?;
    assert_close(&off, &base_with_moved_head, 1e-5)?;
    assert!(assert_differs(&off, &base)? && assert_differs(&off, &adapted)?);
    let mut removed = 0;
    model.visit_linears_mut(&mut |layer| {
        removed += usize::from(layer.remove(inject::DEFAULT_ADAPTER)?.is_some());
        let error = layer.activate(Some(inject::DEFAULT_ADAPTER)).unwrap_err().to_string();
        assert!(error.ends_with("has no adapter \"default\""), "{error}");
        Ok(())
    })?;
    assert_eq!(removed, 6, "query, key and value of two layers");
    assert_close(&logits(&model, &Pass::Mean.into())?, &off, 0.0)
}

fn assert_differs(one: &Tensor, other: &Tensor) -> Outcome<bool> {
    Ok((one - other)?.abs()?.max_all()?.to_scalar::<f32>()? > 1e-3)
}
