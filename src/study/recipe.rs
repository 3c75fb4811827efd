//! Recipes: fine-tuning methods by name, with options, as a grid combines them.
//!
//! A recipe is a name followed by colons and the options that differ from the paper's RoBERTa setting:
//! `lora`, `lora:rank=16`, `monteclora:n=64:eps=1e-2`, `monteclora-sparse`, `monteclora-posthoc`,
//! `monteclora-posthoc:adapter=DIR`, `monteclora-calibrated`, `map:form=update:width=0.4`.
//!
//! `lora:held-out=0.15` is trained on 85 % of the rows that `lora` uses; the others serve to fit something
//! after training, such as a temperature.

mod options;

use std::path::PathBuf;
use std::str::FromStr;

use options::{Options, Owner};
use serde::Serialize;

use crate::adapters::{AdaLoraConfig, BlobConfig, BottleneckConfig, LoraConfig};
use crate::error::{Error, Result};
use crate::inject::Targets;
use crate::monteclora::{Mixture, MonteCLoRAConfig};
use crate::optim::IvonConfig;
use crate::train::Method;

/// The names that a recipe can begin with.
pub const NAMES: [&str; 18] = [
    "full",
    "lora",
    "map",
    "rslora",
    "loraplus",
    "lora-fa",
    "ivon",
    "dora",
    "adalora",
    "ia3",
    "bottleneck",
    "prompt",
    "blob",
    "monteclora",
    "monteclora-calibrated",
    "monteclora-sparse",
    "monteclora-posthoc",
    "monteclora-released",
];

/// How a model is fine-tuned in a study.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Recipe {
    /// The recipe as it was written.
    pub text: String,
    /// The method that is trained; if `post_hoc` is set, the one to which the posterior is added.
    pub method: Method,
    /// The layers that the method changes.
    pub targets: Targets,
    /// The learning rate of B as a multiple of that of A.
    pub loraplus_ratio: f64,
    /// The learning rate of the task's head as a multiple of that of A.
    pub head_lr_ratio: f64,
    /// The learning rate of rho and c as a multiple of that of A.
    pub variational_lr_ratio: f64,
    /// The constants of IVON, if it is the optimiser.
    pub ivon: Option<IvonConfig>,
    /// The posterior that is added to the trained LoRA, if any.
    pub post_hoc: Option<MonteCLoRAConfig>,
    /// The folder of an existing LoRA that the posterior is added to, instead of one trained here. Ranks,
    /// scales and layers are those of that LoRA.
    pub adapter: Option<PathBuf>,
    /// The fraction of rows to hold out of training, on which a temperature, for example, is fitted
    /// afterwards. 0 for none.
    pub held_out: f64,
}

impl Recipe {
    /// Whether the recipe results in a posterior that can be sampled.
    pub fn has_posterior(&self) -> bool {
        self.post_hoc.is_some() || self.ivon.is_some() || self.method.has_posterior()
    }

    /// Notes on the predictions, from [`MethodInit::notes`](crate::train::MethodInit::notes).
    pub fn notes(&self) -> Vec<&'static str> {
        match &self.post_hoc {
            Some(config) => Method::MonteCLoRA(config.clone()).notes(true),
            None => self.method.notes(false),
        }
    }

    /// Whether the recipe results in plain LoRA, to which the Bayesian treatments of a trained LoRA apply.
    pub fn is_lora(&self) -> bool {
        self.post_hoc.is_none() && self.ivon.is_none() && matches!(self.method, Method::Lora(_))
    }

    /// Whether the recipe results in MonteCLoRA's adapters.
    pub fn is_monteclora(&self) -> bool {
        self.post_hoc.is_some() || matches!(self.method, Method::MonteCLoRA(_))
    }
}

impl FromStr for Recipe {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut parts = text.split(':');
        let name = parts.next().unwrap_or_default();
        let mut options = Options::of(name);
        for part in parts {
            let (key, value) = part.split_once('=').ok_or_else(|| wrong(text, "expected key=value"))?;
            options.set(key, value).map_err(|reason| wrong(text, &format!("{part}: {reason}")))?;
        }
        let (mut lora, mut bayes) = (options.lora.clone(), options.bayes.clone());
        if name == "map" {
            lora.prior = Some(options.prior);
        } else if let Some(bound) = options.bound() {
            (bayes.evidence, bayes.prior) = (Some(bound), None);
        } else if name == "monteclora-calibrated" || options.given(Owner::Prior).is_some() {
            bayes.prior = Some(options.prior);
        }
        let (rank, alpha, dropout) = (lora.rank, lora.alpha, lora.dropout);
        let method = match name {
            "full" => Method::Full,
            "lora" | "loraplus" | "map" | "ivon" | "monteclora-posthoc" => Method::Lora(lora),
            "rslora" => Method::Lora(LoraConfig { use_rslora: true, ..lora }),
            "lora-fa" => Method::LoraFa(lora),
            "dora" => Method::Dora(lora),
            "adalora" => Method::AdaLora(AdaLoraConfig { alpha, dropout, ..AdaLoraConfig::towards(rank) }),
            "ia3" => Method::Ia3,
            "bottleneck" => Method::Bottleneck(BottleneckConfig { width: rank }),
            "prompt" => Method::Prompt(options.prompt.clone()),
            "blob" => Method::Blob(BlobConfig { rank, alpha, dropout, ..options.blob.clone() }),
            "monteclora" | "monteclora-calibrated" => Method::MonteCLoRA(bayes.clone()),
            "monteclora-released" => Method::Released(bayes.clone()),
            "monteclora-sparse" => {
                Method::MonteCLoRA(MonteCLoRAConfig { mixture: Mixture::Sparse, ..bayes.clone() })
            }
            _ => return Err(wrong(text, &format!("{name:?} is none of {}", NAMES.join(", ")))),
        };
        let bayesian = name.starts_with("monteclora");
        let prior = name == "map" || bayesian && name != "monteclora-released";
        for (owner, its, whose) in [
            (Owner::Posterior, bayesian, "MonteCLoRA"),
            (Owner::Blob, name == "blob", "blob"),
            (Owner::Ivon, name == "ivon", "ivon"),
            (Owner::Prior, prior, "map and of MonteCLoRA"),
        ] {
            if let Some(other) = options.given(owner).filter(|_| !its) {
                return Err(wrong(text, &format!("{other} is an option of {whose}")));
            }
        }
        if let Some((other, _)) = options.given.iter().find(|(key, _)| !reads(name, key)) {
            return Err(wrong(text, &format!("{name} has no {other}")));
        }
        let of_prior = options.given.iter().find(|(key, owner)| *owner == Owner::Prior && *key != "tau");
        if let Some((other, _)) = of_prior.filter(|_| options.evidence.is_some()) {
            let reason =
                format!("with evidence, {other} has no effect: the evidence bound has its own prior");
            return Err(wrong(text, &reason));
        }
        if options.adapter.is_some() {
            if name != "monteclora-posthoc" {
                return Err(wrong(text, "adapter is an option of monteclora-posthoc"));
            }
            if let Some(other) = options.given(Owner::Pair) {
                return Err(wrong(text, &format!("{other} is given by the adapter")));
            }
        }
        let ratios = method.lr_ratios();
        let ratio = if name == "loraplus" { 16.0 } else { ratios.b };
        Ok(Self {
            text: text.to_string(),
            head_lr_ratio: options.head_ratio.unwrap_or(ratios.head),
            method,
            targets: options.targets,
            loraplus_ratio: options.ratio.unwrap_or(ratio),
            variational_lr_ratio: options.variational_ratio.unwrap_or(1.0),
            ivon: (name == "ivon").then_some(options.ivon),
            post_hoc: (name == "monteclora-posthoc").then_some(bayes),
            adapter: options.adapter,
            held_out: options.held_out,
        })
    }
}

/// Whether a method accepts this option, for the options of [`Owner::Any`] and [`Owner::Pair`]; true for all
/// others.
fn reads(name: &str, key: &str) -> bool {
    match key {
        "rank" => !["full", "ia3", "prompt"].contains(&name),
        "alpha" | "dropout" => !["full", "ia3", "prompt", "bottleneck"].contains(&name),
        "ratio" => !["full", "ia3", "prompt", "ivon"].contains(&name),
        "head-ratio" => name != "ivon",
        "targets" => !["full", "prompt"].contains(&name),
        "variational-ratio" => name.starts_with("monteclora"),
        "tokens" => name == "prompt",
        _ => true,
    }
}

fn wrong(text: &str, reason: &str) -> Error {
    Error::config("method", format!("{text:?}: {reason}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::{Prior, PriorForm};
    use crate::monteclora::{EvidenceBound, Initial};

    #[test]
    fn every_name_is_a_recipe_and_options_reach_their_method() -> Result<()> {
        for name in NAMES {
            let recipe: Recipe = name.parse()?;
            assert_eq!(recipe.text, name);
            let drawn = name.starts_with("monteclora") && name != "monteclora-released";
            assert_eq!(recipe.has_posterior(), drawn || ["ivon", "blob"].contains(&name));
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
            ("monteclora:covariance=round", "full or diagonal"),
        ] {
            let error = text.parse::<Recipe>().unwrap_err().to_string();
            assert!(error.contains(text) && error.contains(reason), "{error}");
        }
    }
}
