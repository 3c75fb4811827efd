use std::collections::BTreeMap;

use serde_json::Value;

use super::*;
use crate::adapter::{Prior, PriorForm};
use crate::monteclora::{EvidenceBound, Initial};
use crate::study::{treatment, treatments};

#[test]
fn every_name_is_a_recipe_and_options_reach_their_method() -> Result<()> {
    for name in NAMES {
        let recipe: Recipe = name.parse()?;
        assert_eq!(recipe.text, name);
        let drawn = name.starts_with("monteclora") && name != "monteclora-released";
        assert_eq!(recipe.has_posterior(), drawn || ["ivon", "blob"].contains(&name));
    }
    for name in MethodName::ALL {
        assert_eq!(name.as_str().parse::<Recipe>()?.method.name(), name);
    }
    let recipe: Recipe = "monteclora:n=64:eps=1e-2:init=random:targets=all-linear:rank=4".parse()?;
    let Method::MonteCLoRA(config) = &recipe.method else { panic!("{recipe:?}") };
    assert_eq!((config.num_components, config.sample_scaler, config.rank), (64, 1e-2, 4));
    assert_eq!(config.initial_concentration, Initial::Uniform(0.0, 1.0));
    assert_eq!(recipe.targets, Targets::parse("all-linear")?);
    let post_hoc: Recipe = "monteclora-posthoc:eps=0.1:rank=4".parse()?;
    assert_eq!(post_hoc.post_hoc.map(|c| (c.sample_scaler, c.rank)), Some((0.1, 4)));
    assert_eq!(post_hoc.method, Method::Lora(LoraConfig { rank: 4, ..Default::default() }));
    let elsewhere: Recipe = "monteclora-posthoc:adapter=runs/lora=1:eps=0.1".parse()?;
    assert_eq!(elsewhere.adapter, Some(PathBuf::from("runs/lora=1")));
    assert_eq!(elsewhere.post_hoc.map(|c| c.sample_scaler), Some(0.1));
    let blob: Recipe = "blob:rank=4:prior-std=0.1:kl-lr=0.01".parse()?;
    let config = BlobConfig { rank: 4, prior_std: 0.1, kl_lr: 0.01, ..BlobConfig::default() };
    assert_eq!(blob.method, Method::Blob(config));
    let released: Recipe = "monteclora-released:eps=1e-3".parse()?;
    let config = MonteCLoRAConfig { sample_scaler: 1e-3, ..MonteCLoRAConfig::released() };
    assert_eq!(released.method, Method::Released(config));
    let ivon: Recipe = "ivon:ess=400:h0=0.1".parse()?;
    assert!(!ivon.is_lora() && ivon.method == Method::Lora(LoraConfig::default()));
    assert_eq!(ivon.ivon.map(|c| (c.ess, c.initial_hessian)), Some((400.0, 0.1)));
    let map: Recipe = "map:width=0.2:form=update:tau=1:head=none:head-ratio=4".parse()?;
    let form = PriorForm::Update { std: 0.2 };
    let prior = Prior { form, temperature: 1.0, shared: true, head_std: None };
    assert_eq!(map.method, Method::Lora(LoraConfig { prior: Some(prior), ..Default::default() }));
    assert_eq!((map.head_lr_ratio, map.variational_lr_ratio), (4.0, 1.0));
    let map: Recipe = "map".parse()?;
    assert_eq!(map.method, Method::Lora(LoraConfig { prior: Some(Prior::map()), ..Default::default() }));
    let calibrated: Recipe = "monteclora-calibrated".parse()?;
    assert_eq!(calibrated.method, Method::MonteCLoRA(MonteCLoRAConfig::calibrated()));
    assert_eq!((calibrated.loraplus_ratio, calibrated.head_lr_ratio), (4.0, 10.0));
    let lora: Recipe = "lora".parse()?;
    assert_eq!((lora.loraplus_ratio, lora.head_lr_ratio), (1.0, 1.0));
    let bound: Recipe = "monteclora-calibrated:evidence=0.1:tau=1".parse()?;
    let evidence = Some(EvidenceBound { std: 0.1, temperature: 1.0, latents: false });
    let config = MonteCLoRAConfig { evidence, prior: None, ..MonteCLoRAConfig::calibrated() };
    assert_eq!(bound.method, Method::MonteCLoRA(config));
    let other: Recipe = "monteclora:tau=1".parse()?;
    let prior = Some(Prior { temperature: 1.0, ..Prior::calibrated() });
    assert_eq!(other.method, Method::MonteCLoRA(MonteCLoRAConfig { prior, ..MonteCLoRAConfig::paper() }));
    assert_eq!("loraplus:ratio=4".parse::<Recipe>()?.loraplus_ratio, 4.0);
    assert_eq!("lora:held-out=0.15".parse::<Recipe>()?.held_out, 0.15);
    assert_eq!("loraplus".parse::<Recipe>()?.loraplus_ratio, 16.0);
    Ok(())
}

/// The fields of a recipe's JSON by their paths, without its text.
fn fields(recipe: &str) -> Result<BTreeMap<String, String>> {
    fn collect(value: &Value, path: &str, fields: &mut BTreeMap<String, String>) {
        match value {
            Value::Object(object) => {
                object.iter().for_each(|(key, value)| collect(value, &format!("{path}/{key}"), fields));
            }
            leaf => drop(fields.insert(path.to_string(), leaf.to_string())),
        }
    }
    let recipe = Recipe { text: String::new(), ..recipe.parse()? };
    let value = serde_json::to_value(recipe).map_err(|e| Error::config("recipe", e.to_string()))?;
    let mut fields = BTreeMap::new();
    collect(&value, "", &mut fields);
    Ok(fields)
}

#[test]
fn every_option_changes_its_own_settings_and_no_others() -> Result<()> {
    const LIST: &str = "there is no such option: ";
    const CHANGES: [(&str, &str); 35] = [
        ("lora:rank=4", "/method/lora/rank=4"),
        ("dora:alpha=4", "/method/dora/alpha=4.0"),
        ("lora:targets=all-linear", "/targets/select=\"all_linear\""),
        ("lora:ratio=4", "/loraplus_ratio=4.0"),
        ("monteclora:dropout=0.1", "/method/monteclora/dropout=0.1"),
        ("lora:head-ratio=4", "/head_lr_ratio=4.0"),
        ("monteclora:variational-ratio=4", "/variational_lr_ratio=4.0"),
        ("prompt:tokens=4", "/method/prompt/virtual_tokens=4"),
        ("lora:held-out=0.25", "/held_out=0.25"),
        ("monteclora-posthoc:adapter=runs/lora", "/adapter=\"runs/lora\""),
        ("monteclora:n=64", "/method/monteclora/num_components=64"),
        (
            "monteclora-calibrated:eps=0.5",
            "/method/monteclora/sample_scaler=0.5, no /method/monteclora/relative_scaler",
        ),
        ("monteclora:kappa=2", "/method/monteclora/relative_scaler=2.0"),
        ("monteclora:eta=0.5", "/method/monteclora/kl_weight=0.5"),
        ("monteclora:cooperative=0.5", "/method/monteclora/cooperative_weight=0.5"),
        ("monteclora:prior=0.5", "/method/monteclora/dirichlet_prior=0.5"),
        ("monteclora:init=0.5", "/method/monteclora/initial_concentration/constant=0.5"),
        ("monteclora:std=0.5", "/method/monteclora/initial_std/constant=0.5"),
        ("monteclora:covariance=diagonal", "/method/monteclora/covariance=\"diagonal\""),
        ("monteclora:estimator=exponential", "/method/monteclora/estimator=\"exponential\""),
        ("monteclora:scaler=linear", "/method/monteclora/scaler_schedule=\"linear\""),
        (
            "monteclora:evidence=0.2",
            "/method/monteclora/evidence/latents=false, /method/monteclora/evidence/std=0.2, \
             /method/monteclora/evidence/temperature=0.1",
        ),
        ("map:form=mean", "/method/lora/prior/form/mean/std=0.1, no /method/lora/prior/form/update/std"),
        ("map:width=0.2", "/method/lora/prior/form/update/std=0.2"),
        ("map:tau=1", "/method/lora/prior/temperature=1.0"),
        ("map:head=0.2", "/method/lora/prior/head_std=0.2"),
        ("map:shared=false", "/method/lora/prior/shared=false"),
        ("blob:prior-std=0.5", "/method/blob/prior_std=0.5"),
        ("blob:root=0.5", "/method/blob/initial_root=0.5"),
        ("blob:kl-lr=0.5", "/method/blob/kl_lr=0.5"),
        ("blob:gamma=4", "/method/blob/gamma=4.0"),
        ("ivon:ess=400", "/ivon/ess=400.0"),
        ("ivon:h0=0.5", "/ivon/initial_hessian=0.5"),
        ("ivon:delta=0.5", "/ivon/weight_decay=0.5"),
        ("ivon:radius=0.5", "/ivon/clip_radius=0.5"),
    ];
    let error = "lora:size=3".parse::<Recipe>().unwrap_err().to_string();
    let known = error.split(LIST).nth(1).unwrap_or_default();
    let keys = CHANGES.map(|(recipe, _)| recipe.split([':', '=']).nth(1).unwrap_or_default());
    assert_eq!(known, keys.join(", "));
    let mut found = Vec::new();
    for (recipe, _) in CHANGES {
        let (before, after) = (fields(recipe.split(':').next().unwrap_or_default())?, fields(recipe)?);
        let changed = after.iter().filter(|(path, value)| before.get(*path) != Some(*value));
        let mut changes: Vec<String> = changed.map(|(path, value)| format!("{path}={value}")).collect();
        let removed = before.keys().filter(|path| !after.contains_key(*path));
        changes.extend(removed.map(|path| format!("no {path}")));
        found.push((recipe, changes.join(", ")));
    }
    assert_eq!(found, CHANGES.map(|(recipe, changes)| (recipe, changes.to_string())));
    Ok(())
}

#[test]
fn a_recipe_tells_what_its_draws_are_not() -> Result<()> {
    for (text, told) in [
        ("lora", vec![]),
        ("monteclora", vec![]),
        ("monteclora:scaler=warmup-0.1", vec![]),
        ("monteclora:scaler=cosine", vec!["wider than what was trained"]),
        ("monteclora-posthoc", vec!["that of the LoRA by construction"]),
        ("monteclora-posthoc:scaler=linear", vec!["that of the LoRA by construction", "wider than what"]),
    ] {
        let notes = text.parse::<Recipe>()?.notes();
        assert_eq!(notes.len(), told.len(), "{text}: {notes:?}");
        assert!(notes.iter().zip(told).all(|(note, part)| note.contains(part)), "{text}: {notes:?}");
    }
    Ok(())
}

#[test]
fn what_is_no_recipe_says_why() {
    for (text, reason) in [
        ("qlora", "none of full, lora"),
        ("lora:rank", "key=value"),
        ("lora:rank=x", "rank=x"),
        ("lora:width=1", "width is an option of map"),
        ("map:form=flat", "expected mean, start"),
        ("lora:eps=1", "eps is an option of MonteCLoRA"),
        ("lora:h0=1", "h0 is an option of ivon"),
        ("lora:kl-lr=1", "kl-lr is an option of blob"),
        ("monteclora:adapter=x", "adapter is an option of monteclora-posthoc"),
        ("monteclora-posthoc:rank=4:adapter=x", "rank is given by the adapter"),
        ("monteclora-posthoc:adapter=", "expected a folder"),
        ("lora:held-out=1", "between 0 and 1"),
        ("monteclora:size=3", "no such option"),
        ("monteclora:covariance=round", "covariance=round: expected full or diagonal"),
        ("monteclora:estimator=x", "estimator=x: expected exact, exponential or logistic-normal"),
        ("monteclora:scaler=x", "expected constant, linear, cosine, adaptive or warmup-SHARE, got x"),
        ("monteclora:init=x", "init=x: invalid float literal"),
        ("lora:rank=-1", "rank=-1: invalid digit found in string"),
        ("lora:ratio=", "ratio=: cannot parse float from empty string"),
        ("lora:held-out=x", "held-out=x: invalid float literal"),
        ("lora:targets=", "targets=: "),
        ("map:shared=1", "shared=1: expected true or false"),
        ("map:head=x", "head=x: invalid float literal"),
        ("full:rank=4", "full has no rank"),
        ("monteclora:evidence=0.1:width=0.2", "with evidence, width has no effect"),
    ] {
        let error = text.parse::<Recipe>().unwrap_err().to_string();
        assert!(error.contains(text) && error.contains(reason), "{error}");
    }
}

#[test]
fn a_posterior_without_closed_variances_is_measured_in_all_other_ways() -> Result<()> {
    let ways = |recipe: &str| -> Result<Vec<String>> { Ok(treatments::of_recipe(&recipe.parse()?, 5)) };
    let whole = ways("monteclora")?;
    assert!(whole.iter().any(|way| way == treatment::LINEARISED));
    let others: Vec<String> = whole.into_iter().filter(|way| way != treatment::LINEARISED).collect();
    for recipe in ["monteclora:estimator=exponential", "monteclora-posthoc:estimator=logistic-normal"] {
        assert_eq!(ways(recipe)?, others, "{recipe}");
    }
    Ok(())
}
