//! The options of a recipe: the setting that each `key=value` changes, and the methods it belongs to.

use std::fmt::Display;
use std::path::PathBuf;
use std::str::FromStr;

use super::kind::{Kind, Variant};
use crate::adapter::{Prior, PriorForm};
use crate::adapters::{BlobConfig, LoraConfig, PromptConfig};
use crate::dist::{Covariance, Estimator};
use crate::inject::Targets;
use crate::monteclora::{EvidenceBound, Initial, Mixture, MonteCLoRAConfig};
use crate::optim::IvonConfig;
use crate::train::MethodName;

/// The methods that an option belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    /// Every method that has such a setting.
    Any,
    /// Methods with a low-rank pair; fixed for an existing adapter.
    Pair,
    Posterior,
    Prior,
    Blob,
    Ivon,
}

/// Nothing, or what is wrong with a value or an option.
pub(super) type Set = std::result::Result<(), String>;

/// An option: its key, its owner, and how a text sets it.
struct Spec {
    key: &'static str,
    owner: Owner,
    set: fn(&mut Options, &str) -> Set,
}

const fn spec(key: &'static str, owner: Owner, set: fn(&mut Options, &str) -> Set) -> Spec {
    Spec { key, owner, set }
}

/// All options, in the order in which an error lists them.
const SPECS: [Spec; 35] = [
    spec("rank", Owner::Pair, |o, v| both(&mut o.lora.rank, &mut o.bayes.rank, v)),
    spec("alpha", Owner::Pair, |o, v| both(&mut o.lora.alpha, &mut o.bayes.alpha, v)),
    spec("targets", Owner::Pair, |o, v| store(&mut o.targets, v)),
    spec("ratio", Owner::Pair, |o, v| fill(&mut o.ratio, v)),
    spec("dropout", Owner::Any, |o, v| both(&mut o.lora.dropout, &mut o.bayes.dropout, v)),
    spec("head-ratio", Owner::Any, |o, v| fill(&mut o.head_ratio, v)),
    spec("variational-ratio", Owner::Any, |o, v| fill(&mut o.variational_ratio, v)),
    spec("tokens", Owner::Any, |o, v| store(&mut o.prompt.virtual_tokens, v)),
    spec("held-out", Owner::Any, Options::set_held_out),
    spec("adapter", Owner::Any, Options::set_adapter),
    spec("n", Owner::Posterior, |o, v| store(&mut o.bayes.num_components, v)),
    spec("eps", Owner::Posterior, Options::set_eps),
    spec("kappa", Owner::Posterior, |o, v| fill(&mut o.bayes.relative_scaler, v)),
    spec("eta", Owner::Posterior, |o, v| store(&mut o.bayes.kl_weight, v)),
    spec("cooperative", Owner::Posterior, |o, v| store(&mut o.bayes.cooperative_weight, v)),
    spec("prior", Owner::Posterior, |o, v| store(&mut o.bayes.dirichlet_prior, v)),
    spec("init", Owner::Posterior, |o, v| change(&mut o.bayes.initial_concentration, initial(v))),
    spec("std", Owner::Posterior, |o, v| change(&mut o.bayes.initial_std, number(v).map(Initial::Constant))),
    spec("covariance", Owner::Posterior, |o, v| change(&mut o.bayes.covariance, covariance(v))),
    spec("estimator", Owner::Posterior, |o, v| change(&mut o.bayes.estimator, estimator(v))),
    spec("scaler", Owner::Posterior, |o, v| store(&mut o.bayes.scaler_schedule, v)),
    spec("evidence", Owner::Posterior, |o, v| fill(&mut o.evidence, v)),
    spec("form", Owner::Prior, Options::set_form),
    spec("width", Owner::Prior, Options::set_width),
    spec("tau", Owner::Prior, |o, v| store(&mut o.prior.temperature, v)),
    spec("head", Owner::Prior, |o, v| change(&mut o.prior.head_std, std_or_none(v))),
    spec("shared", Owner::Prior, |o, v| change(&mut o.prior.shared, flag(v))),
    spec("prior-std", Owner::Blob, |o, v| store(&mut o.blob.prior_std, v)),
    spec("root", Owner::Blob, |o, v| store(&mut o.blob.initial_root, v)),
    spec("kl-lr", Owner::Blob, |o, v| store(&mut o.blob.kl_lr, v)),
    spec("gamma", Owner::Blob, |o, v| store(&mut o.blob.gamma, v)),
    spec("ess", Owner::Ivon, |o, v| store(&mut o.ivon.ess, v)),
    spec("h0", Owner::Ivon, |o, v| store(&mut o.ivon.initial_hessian, v)),
    spec("delta", Owner::Ivon, |o, v| store(&mut o.ivon.weight_decay, v)),
    spec("radius", Owner::Ivon, |o, v| store(&mut o.ivon.clip_radius, v)),
];

/// The settings that options change.
pub(super) struct Options {
    pub lora: LoraConfig,
    pub bayes: MonteCLoRAConfig,
    pub targets: Targets,
    pub ratio: Option<f64>,
    pub head_ratio: Option<f64>,
    pub variational_ratio: Option<f64>,
    pub prior: Prior,
    /// The given width of the prior, which also applies to a `form` given after it.
    width: Option<f64>,
    /// The width of the evidence bound's prior, if the bound is the objective.
    pub evidence: Option<f64>,
    pub prompt: PromptConfig,
    pub blob: BlobConfig,
    pub ivon: IvonConfig,
    pub adapter: Option<PathBuf>,
    pub held_out: f64,
    /// The given options, in order.
    pub given: Vec<(&'static str, Owner)>,
}

impl Options {
    /// The defaults of a recipe.
    pub fn of(kind: Kind) -> Self {
        let bayes = match (kind.method, kind.variant) {
            (MethodName::Released, _) => MonteCLoRAConfig::released(),
            (_, Variant::Calibrated) => MonteCLoRAConfig::calibrated(),
            (_, Variant::Sparse) => {
                MonteCLoRAConfig { mixture: Mixture::Sparse, ..MonteCLoRAConfig::paper() }
            }
            _ => MonteCLoRAConfig::paper(),
        };
        Self {
            lora: LoraConfig { use_rslora: kind.variant == Variant::RsLora, ..LoraConfig::default() },
            bayes,
            targets: Targets::default(),
            ratio: (kind.variant == Variant::LoraPlus).then_some(16.0),
            head_ratio: None,
            variational_ratio: None,
            prior: if kind.method == MethodName::Map { Prior::map() } else { Prior::calibrated() },
            width: None,
            evidence: None,
            prompt: PromptConfig::default(),
            blob: BlobConfig::default(),
            ivon: IvonConfig::default(),
            adapter: None,
            held_out: 0.0,
            given: Vec::new(),
        }
    }

    /// The last option of this owner that was given.
    pub fn given(&self, owner: Owner) -> Option<&'static str> {
        self.given.iter().rev().find(|(_, whose)| *whose == owner).map(|(key, _)| *key)
    }

    /// The configuration of MonteCLoRA. The temperature of the evidence bound is `tau`.
    pub fn posterior(&self) -> MonteCLoRAConfig {
        let mut config = self.bayes.clone();
        if let Some(std) = self.evidence {
            let bound = EvidenceBound { std, temperature: self.prior.temperature, latents: false };
            (config.evidence, config.prior) = (Some(bound), None);
        } else if self.given(Owner::Prior).is_some() {
            config.prior = Some(self.prior);
        }
        config
    }

    /// Sets the option of this key.
    ///
    /// # Errors
    /// If there is no such option, or the value does not fit it.
    pub fn set(&mut self, key: &str, value: &str) -> Set {
        let Some(spec) = SPECS.iter().find(|spec| spec.key == key) else {
            let known: Vec<&str> = SPECS.iter().map(|spec| spec.key).collect();
            return Err(format!("there is no such option: {}", known.join(", ")));
        };
        self.given.push((spec.key, spec.owner));
        (spec.set)(self, value)
    }

    fn set_held_out(&mut self, value: &str) -> Set {
        store(&mut self.held_out, value)?;
        if !(self.held_out > 0.0 && self.held_out < 1.0) {
            return Err("expected a share between 0 and 1".to_string());
        }
        Ok(())
    }

    fn set_adapter(&mut self, value: &str) -> Set {
        if value.is_empty() {
            return Err("expected a folder".to_string());
        }
        fill(&mut self.adapter, value)
    }

    /// An absolute scale replaces the relative one of a preset.
    fn set_eps(&mut self, value: &str) -> Set {
        store(&mut self.bayes.sample_scaler, value)?;
        self.bayes.relative_scaler = None;
        Ok(())
    }

    fn set_form(&mut self, value: &str) -> Set {
        let form = prior_form(value)?;
        self.prior.form = self.width.map_or(form, |std| form.with_std(std));
        Ok(())
    }

    fn set_width(&mut self, value: &str) -> Set {
        let std = number(value)?;
        (self.width, self.prior.form) = (Some(std), self.prior.form.with_std(std));
        Ok(())
    }
}

/// A value, or what is wrong with its text.
type Parsed<T> = std::result::Result<T, String>;

fn parsed<T: FromStr<Err: Display>>(text: &str) -> Parsed<T> {
    text.parse().map_err(|e: T::Err| e.to_string())
}

fn number(text: &str) -> Parsed<f64> {
    parsed(text)
}

fn change<T>(place: &mut T, value: Parsed<T>) -> Set {
    *place = value?;
    Ok(())
}

fn store<T: FromStr<Err: Display>>(place: &mut T, text: &str) -> Set {
    change(place, parsed(text))
}

fn fill<T: FromStr<Err: Display>>(place: &mut Option<T>, text: &str) -> Set {
    change(place, parsed(text).map(Some))
}

/// Stores a setting that the method has with and without a posterior.
fn both<T: FromStr<Err: Display>>(lora: &mut T, bayes: &mut T, text: &str) -> Set {
    store(lora, text)?;
    store(bayes, text)
}

fn flag(text: &str) -> Parsed<bool> {
    text.parse().map_err(|_| "expected true or false".to_string())
}

fn std_or_none(text: &str) -> Parsed<Option<f64>> {
    match text {
        "none" => Ok(None),
        _ => number(text).map(Some),
    }
}

fn initial(text: &str) -> Parsed<Initial> {
    match text {
        "random" => Ok(Initial::Uniform(0.0, 1.0)),
        _ => number(text).map(Initial::Constant),
    }
}

fn covariance(name: &str) -> Parsed<Covariance> {
    match name {
        "full" => Ok(Covariance::Full),
        "diagonal" => Ok(Covariance::Diagonal),
        _ => Err("expected full or diagonal".to_string()),
    }
}

fn estimator(name: &str) -> Parsed<Estimator> {
    match name {
        "exact" => Ok(Estimator::Exact),
        "exponential" => Ok(Estimator::Exponential),
        "logistic-normal" => Ok(Estimator::LogisticNormal),
        _ => Err("expected exact, exponential or logistic-normal".to_string()),
    }
}

/// The form of a prior by name, with a default width that suits it.
fn prior_form(name: &str) -> Parsed<PriorForm> {
    match name {
        "mean" => Ok(PriorForm::Mean { std: 0.1 }),
        "start" => Ok(PriorForm::Start { std: 0.1 }),
        "factors" => Ok(PriorForm::Factors { std_a: 0.1, std_b: 0.1 }),
        "update" => Ok(PriorForm::Update { std: 0.7 }),
        "expected-update" => Ok(PriorForm::ExpectedUpdate { std: 0.7 }),
        _ => Err("expected mean, start, factors, update or expected-update".to_string()),
    }
}
