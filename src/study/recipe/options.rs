//! The options of a recipe: the setting that each `key=value` changes, and the methods it belongs to.

use std::path::PathBuf;

use crate::adapter::{Prior, PriorForm};
use crate::adapters::{BlobConfig, LoraConfig, PromptConfig};
use crate::dist::{Covariance, Estimator};
use crate::error::Error;
use crate::inject::Targets;
use crate::monteclora::{EvidenceBound, Initial, MonteCLoRAConfig};
use crate::optim::IvonConfig;

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

/// All options with their owners.
const OPTIONS: [(&str, Owner); 35] = [
    ("rank", Owner::Pair),
    ("alpha", Owner::Pair),
    ("targets", Owner::Pair),
    ("ratio", Owner::Pair),
    ("dropout", Owner::Any),
    ("head-ratio", Owner::Any),
    ("variational-ratio", Owner::Any),
    ("tokens", Owner::Any),
    ("held-out", Owner::Any),
    ("adapter", Owner::Any),
    ("n", Owner::Posterior),
    ("eps", Owner::Posterior),
    ("kappa", Owner::Posterior),
    ("eta", Owner::Posterior),
    ("cooperative", Owner::Posterior),
    ("prior", Owner::Posterior),
    ("init", Owner::Posterior),
    ("std", Owner::Posterior),
    ("covariance", Owner::Posterior),
    ("estimator", Owner::Posterior),
    ("scaler", Owner::Posterior),
    ("evidence", Owner::Posterior),
    ("form", Owner::Prior),
    ("width", Owner::Prior),
    ("tau", Owner::Prior),
    ("head", Owner::Prior),
    ("shared", Owner::Prior),
    ("prior-std", Owner::Blob),
    ("root", Owner::Blob),
    ("kl-lr", Owner::Blob),
    ("gamma", Owner::Blob),
    ("ess", Owner::Ivon),
    ("h0", Owner::Ivon),
    ("delta", Owner::Ivon),
    ("radius", Owner::Ivon),
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
    /// The defaults of the recipe `name`.
    pub fn of(name: &str) -> Self {
        let bayes = match name {
            "monteclora-calibrated" => MonteCLoRAConfig::calibrated(),
            "monteclora-released" => MonteCLoRAConfig::released(),
            _ => MonteCLoRAConfig::paper(),
        };
        Self {
            lora: LoraConfig::default(),
            bayes,
            targets: Targets::default(),
            ratio: None,
            head_ratio: None,
            variational_ratio: None,
            prior: if name == "map" { Prior::map() } else { Prior::calibrated() },
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

    /// The evidence bound, if it is the objective. Its temperature is `tau`.
    pub fn bound(&self) -> Option<EvidenceBound> {
        self.evidence.map(|std| EvidenceBound { std, temperature: self.prior.temperature, latents: false })
    }

    pub fn set(&mut self, key: &str, value: &str) -> std::result::Result<(), String> {
        let number = || value.parse::<f64>().map_err(|e| e.to_string());
        let count = || value.parse::<usize>().map_err(|e| e.to_string());
        let Some(option) = OPTIONS.iter().find(|(known, _)| *known == key) else {
            let known: Vec<&str> = OPTIONS.iter().map(|(key, _)| *key).collect();
            return Err(format!("there is no such option: {}", known.join(", ")));
        };
        self.given.push(*option);
        let bayes = &mut self.bayes;
        match key {
            "rank" => (self.lora.rank, bayes.rank) = (count()?, count()?),
            "alpha" => (self.lora.alpha, bayes.alpha) = (number()?, number()?),
            "dropout" => (self.lora.dropout, bayes.dropout) = (number()?, number()?),
            "tokens" => self.prompt.virtual_tokens = count()?,
            "ratio" => self.ratio = Some(number()?),
            "head-ratio" => self.head_ratio = Some(number()?),
            "variational-ratio" => self.variational_ratio = Some(number()?),
            "form" => {
                let form = prior_form(value)?;
                self.prior.form = self.width.map_or(form, |std| form.with_std(std));
            }
            "width" => {
                let std = number()?;
                (self.width, self.prior.form) = (Some(std), self.prior.form.with_std(std));
            }
            "tau" => self.prior.temperature = number()?,
            "shared" => {
                self.prior.shared = value.parse().map_err(|_| "expected true or false".to_string())?
            }
            "evidence" => self.evidence = Some(number()?),
            "head" if value == "none" => self.prior.head_std = None,
            "head" => self.prior.head_std = Some(number()?),
            "targets" => self.targets = Targets::parse(value).map_err(|e| e.to_string())?,
            "adapter" if value.is_empty() => return Err("expected a folder".to_string()),
            "adapter" => self.adapter = Some(value.into()),
            "prior-std" => self.blob.prior_std = number()?,
            "root" => self.blob.initial_root = number()?,
            "kl-lr" => self.blob.kl_lr = number()?,
            "gamma" => self.blob.gamma = number()?,
            "ess" => self.ivon.ess = number()?,
            "h0" => self.ivon.initial_hessian = number()?,
            "delta" => self.ivon.weight_decay = number()?,
            "radius" => self.ivon.clip_radius = number()?,
            "held-out" => {
                self.held_out = number()?;
                if !(self.held_out > 0.0 && self.held_out < 1.0) {
                    return Err("expected a share between 0 and 1".to_string());
                }
            }
            "n" => bayes.num_components = count()?,
            "eps" => (bayes.sample_scaler, bayes.relative_scaler) = (number()?, None),
            "kappa" => bayes.relative_scaler = Some(number()?),
            "eta" => bayes.kl_weight = number()?,
            "cooperative" => bayes.cooperative_weight = number()?,
            "prior" => bayes.dirichlet_prior = number()?,
            "scaler" => bayes.scaler_schedule = value.parse().map_err(|e: Error| e.to_string())?,
            "std" => bayes.initial_std = Initial::Constant(number()?),
            "init" => {
                bayes.initial_concentration = match value {
                    "random" => Initial::Uniform(0.0, 1.0),
                    _ => Initial::Constant(number()?),
                }
            }
            "covariance" => {
                bayes.covariance = match value {
                    "full" => Covariance::Full,
                    "diagonal" => Covariance::Diagonal,
                    _ => return Err("expected full or diagonal".to_string()),
                }
            }
            "estimator" => {
                bayes.estimator = match value {
                    "exact" => Estimator::Exact,
                    "exponential" => Estimator::Exponential,
                    "logistic-normal" => Estimator::LogisticNormal,
                    _ => return Err("expected exact, exponential or logistic-normal".to_string()),
                }
            }
            other => return Err(format!("`{other}` is listed, but sets nothing")),
        }
        Ok(())
    }
}

/// The form of a prior by name, with a default width that suits it.
fn prior_form(name: &str) -> std::result::Result<PriorForm, String> {
    match name {
        "mean" => Ok(PriorForm::Mean { std: 0.1 }),
        "start" => Ok(PriorForm::Start { std: 0.1 }),
        "factors" => Ok(PriorForm::Factors { std_a: 0.1, std_b: 0.1 }),
        "update" => Ok(PriorForm::Update { std: 0.7 }),
        "expected-update" => Ok(PriorForm::ExpectedUpdate { std: 0.7 }),
        _ => Err("expected mean, start, factors, update or expected-update".to_string()),
    }
}
