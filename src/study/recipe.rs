//! Recipes: fine-tuning methods by name, with options, as a grid combines them.
//!
//! A recipe is a name followed by colons and the options that differ from the paper's RoBERTa setting:
//! `lora`, `lora:rank=16`, `monteclora:n=64:eps=1e-2`, `monteclora-sparse`, `monteclora-posthoc`,
//! `monteclora-posthoc:adapter=DIR`, `monteclora-calibrated`, `map:form=update:width=0.4`.
//!
//! `lora:held-out=0.15` is trained on 85 % of the rows that `lora` uses; the others serve to fit something
//! after training, such as a temperature.

mod kind;
mod options;

use std::path::PathBuf;
use std::str::FromStr;

use kind::{Kind, Variant};
use options::{Options, Owner, Set};
use serde::Serialize;

use crate::adapters::{AdaLoraConfig, BlobConfig, BottleneckConfig, LoraConfig};
use crate::error::{Error, Result};
use crate::inject::Targets;
use crate::monteclora::MonteCLoRAConfig;
use crate::optim::IvonConfig;
use crate::train::{Method, MethodName};

pub use kind::NAMES;

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
        self.posterior().is_some()
    }

    /// The configuration of MonteCLoRA, if the recipe results in it.
    pub(super) fn posterior(&self) -> Option<&MonteCLoRAConfig> {
        match (&self.post_hoc, &self.method) {
            (Some(config), _) | (None, Method::MonteCLoRA(config)) => Some(config),
            (None, _) => None,
        }
    }
}

impl FromStr for Recipe {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut parts = text.split(':');
        let name = parts.next().unwrap_or_default();
        let kind = Kind::of(name)
            .ok_or_else(|| wrong(text, &format!("{name:?} is none of {}", NAMES.join(", "))))?;
        let mut options = Options::of(kind);
        for part in parts {
            let (key, value) = part.split_once('=').ok_or_else(|| wrong(text, "expected key=value"))?;
            options.set(key, value).map_err(|reason| wrong(text, &format!("{part}: {reason}")))?;
        }
        check(kind, &options).map_err(|reason| wrong(text, &reason))?;
        let method = method(kind, &options);
        let ratios = method.lr_ratios();
        Ok(Self {
            text: text.to_string(),
            head_lr_ratio: options.head_ratio.unwrap_or(ratios.head),
            method,
            loraplus_ratio: options.ratio.unwrap_or(ratios.b),
            variational_lr_ratio: options.variational_ratio.unwrap_or(1.0),
            post_hoc: (kind.variant == Variant::PostHoc).then(|| options.posterior()),
            ivon: (kind.variant == Variant::Ivon).then_some(options.ivon),
            targets: options.targets,
            adapter: options.adapter,
            held_out: options.held_out,
        })
    }
}

/// The method that a recipe trains.
fn method(kind: Kind, options: &Options) -> Method {
    let prior = (kind.method == MethodName::Map).then_some(options.prior);
    let lora = LoraConfig { prior, ..options.lora.clone() };
    let LoraConfig { rank, alpha, dropout, .. } = lora;
    match kind.method {
        MethodName::Full => Method::Full,
        MethodName::Lora | MethodName::Map => Method::Lora(lora),
        MethodName::LoraFa => Method::LoraFa(lora),
        MethodName::Dora => Method::Dora(lora),
        MethodName::AdaLora => {
            Method::AdaLora(AdaLoraConfig { alpha, dropout, ..AdaLoraConfig::towards(rank) })
        }
        MethodName::Ia3 => Method::Ia3,
        MethodName::Bottleneck => Method::Bottleneck(BottleneckConfig { width: rank }),
        MethodName::Prompt => Method::Prompt(options.prompt.clone()),
        MethodName::Blob => Method::Blob(BlobConfig { rank, alpha, dropout, ..options.blob.clone() }),
        MethodName::MonteCLoRA => Method::MonteCLoRA(options.posterior()),
        MethodName::Released => Method::Released(options.posterior()),
    }
}

/// Checks that the options given to a recipe have an effect on it.
fn check(kind: Kind, options: &Options) -> Set {
    let Kind { name, method, variant } = kind;
    let prior = method == MethodName::Map || kind.has_mixture() && method != MethodName::Released;
    for (owner, its, whose) in [
        (Owner::Posterior, kind.has_mixture(), "MonteCLoRA"),
        (Owner::Blob, method == MethodName::Blob, "blob"),
        (Owner::Ivon, variant == Variant::Ivon, "ivon"),
        (Owner::Prior, prior, "map and of MonteCLoRA"),
    ] {
        if let Some(other) = options.given(owner).filter(|_| !its) {
            return Err(format!("{other} is an option of {whose}"));
        }
    }
    if let Some((other, _)) = options.given.iter().find(|(key, _)| !reads(kind, key)) {
        return Err(format!("{name} has no {other}"));
    }
    let of_prior = options.given.iter().find(|(key, owner)| *owner == Owner::Prior && *key != "tau");
    if let Some((other, _)) = of_prior.filter(|_| options.evidence.is_some()) {
        return Err(format!("with evidence, {other} has no effect: the evidence bound has its own prior"));
    }
    if options.adapter.is_some() {
        if variant != Variant::PostHoc {
            return Err("adapter is an option of monteclora-posthoc".to_string());
        }
        if let Some(other) = options.given(Owner::Pair) {
            return Err(format!("{other} is given by the adapter"));
        }
    }
    Ok(())
}

/// Whether a recipe accepts this option, for the options of [`Owner::Any`] and [`Owner::Pair`]; true for all
/// others.
fn reads(kind: Kind, key: &str) -> bool {
    match key {
        "rank" => kind.method.has_rank(),
        "alpha" | "dropout" => kind.method.has_pair(),
        "ratio" => kind.method.has_rank() && kind.variant != Variant::Ivon,
        "head-ratio" => kind.variant != Variant::Ivon,
        "targets" => kind.method.has_targets(),
        "variational-ratio" => kind.has_mixture(),
        "tokens" => kind.method == MethodName::Prompt,
        _ => true,
    }
}

fn wrong(text: &str, reason: &str) -> Error {
    Error::config("method", format!("{text:?}: {reason}"))
}

#[cfg(test)]
mod tests;
