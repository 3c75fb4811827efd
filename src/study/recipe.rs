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

use options::{Options, Owner, Set};
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
        let of_name = method(name, &options);
        let method =
            of_name.ok_or_else(|| wrong(text, &format!("{name:?} is none of {}", NAMES.join(", "))))?;
        check(name, &options).map_err(|reason| wrong(text, &reason))?;
        let ratios = method.lr_ratios();
        let ratio = if name == "loraplus" { 16.0 } else { ratios.b };
        Ok(Self {
            text: text.to_string(),
            head_lr_ratio: options.head_ratio.unwrap_or(ratios.head),
            method,
            loraplus_ratio: options.ratio.unwrap_or(ratio),
            variational_lr_ratio: options.variational_ratio.unwrap_or(1.0),
            post_hoc: (name == "monteclora-posthoc").then(|| posterior(name, &options)),
            ivon: (name == "ivon").then_some(options.ivon),
            targets: options.targets,
            adapter: options.adapter,
            held_out: options.held_out,
        })
    }
}

/// The method that a recipe of this name trains; `None` if there is no such name.
fn method(name: &str, options: &Options) -> Option<Method> {
    let prior = (name == "map").then_some(options.prior);
    let lora = LoraConfig { prior, ..options.lora.clone() };
    let LoraConfig { rank, alpha, dropout, .. } = lora;
    Some(match name {
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
        "monteclora" | "monteclora-calibrated" => Method::MonteCLoRA(posterior(name, options)),
        "monteclora-released" => Method::Released(posterior(name, options)),
        "monteclora-sparse" => {
            let mixture = Mixture::Sparse;
            Method::MonteCLoRA(MonteCLoRAConfig { mixture, ..posterior(name, options) })
        }
        _ => return None,
    })
}

/// The configuration of MonteCLoRA, for the names that begin with it.
fn posterior(name: &str, options: &Options) -> MonteCLoRAConfig {
    let mut config = options.bayes.clone();
    if let Some(bound) = options.bound() {
        (config.evidence, config.prior) = (Some(bound), None);
    } else if name == "monteclora-calibrated" || options.given(Owner::Prior).is_some() {
        config.prior = Some(options.prior);
    }
    config
}

/// Checks that the options given to a recipe of this name have an effect on it.
fn check(name: &str, options: &Options) -> Set {
    let bayesian = name.starts_with("monteclora");
    let prior = name == "map" || bayesian && name != "monteclora-released";
    for (owner, its, whose) in [
        (Owner::Posterior, bayesian, "MonteCLoRA"),
        (Owner::Blob, name == "blob", "blob"),
        (Owner::Ivon, name == "ivon", "ivon"),
        (Owner::Prior, prior, "map and of MonteCLoRA"),
    ] {
        if let Some(other) = options.given(owner).filter(|_| !its) {
            return Err(format!("{other} is an option of {whose}"));
        }
    }
    if let Some((other, _)) = options.given.iter().find(|(key, _)| !reads(name, key)) {
        return Err(format!("{name} has no {other}"));
    }
    let of_prior = options.given.iter().find(|(key, owner)| *owner == Owner::Prior && *key != "tau");
    if let Some((other, _)) = of_prior.filter(|_| options.evidence.is_some()) {
        return Err(format!("with evidence, {other} has no effect: the evidence bound has its own prior"));
    }
    if options.adapter.is_some() {
        if name != "monteclora-posthoc" {
            return Err("adapter is an option of monteclora-posthoc".to_string());
        }
        if let Some(other) = options.given(Owner::Pair) {
            return Err(format!("{other} is given by the adapter"));
        }
    }
    Ok(())
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
mod tests;
