//! The ways to fine-tune, behind one name.

use crate::adapters::LoraConfig;
use crate::error::{Error, Result};
use crate::inject::{self, Targets};
use crate::monteclora::{MonteCLoRAConfig, Regularizer};
use crate::named;
use crate::params::Params;
use crate::peft::{self, AdapterFile};
use crate::slot::Linears;

/// What a LoRA adapter is called until the posterior stands on it.
const TRAINED: &str = "trained";

/// How a model is fine-tuned.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Method {
    /// MonteCLoRA on the targets.
    MonteCLoRA(MonteCLoRAConfig),
    /// LoRA on the targets.
    Lora(LoraConfig),
    /// Every weight.
    Full,
}

impl From<peft::Method> for Method {
    fn from(method: peft::Method) -> Self {
        match method {
            peft::Method::MonteCLoRA(config) => Self::MonteCLoRA(config),
            peft::Method::Lora(config) => Self::Lora(config),
        }
    }
}

impl Method {
    /// The method's name, as the command line spells it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::MonteCLoRA(_) => "monteclora",
            Self::Lora(_) => "lora",
            Self::Full => "full",
        }
    }

    /// The adapter of this method as its file has it, where it has one.
    pub fn adapter(&self) -> Option<peft::Method> {
        match self {
            Self::MonteCLoRA(config) => Some(peft::Method::MonteCLoRA(config.clone())),
            Self::Lora(config) => Some(peft::Method::Lora(config.clone())),
            Self::Full => None,
        }
    }
}

/// What a run starts from.
// There is one of it in a run, so that its size costs nothing.
#[allow(clippy::large_enum_variant)]
#[derive(Debug, Clone)]
pub enum Start {
    /// A method that begins on these targets.
    Fresh(Method, Targets),
    /// An adapter that was trained before, here or by PEFT.
    Adapter(Box<AdapterFile>),
    /// A LoRA adapter that was trained before, with a posterior put on it: A and B stay, rho and c are
    /// trained. Rank and scale are the adapter's own, whatever the configuration says.
    PostHoc(Box<AdapterFile>, MonteCLoRAConfig),
}

impl Start {
    /// The method, with its constants.
    pub fn method(&self) -> Method {
        match self {
            Self::Fresh(method, _) => method.clone(),
            Self::Adapter(file) => Method::from(file.method()),
            Self::PostHoc(file, config) => Method::MonteCLoRA(match file.method() {
                peft::Method::Lora(LoraConfig { rank, alpha, use_rslora, .. }) => {
                    MonteCLoRAConfig { rank, alpha, use_rslora, ..config.clone() }
                }
                peft::Method::MonteCLoRA(_) => config.clone(),
            }),
        }
    }

    /// Puts the adapters on a model, their parameters into `params`; returns, where the method has
    /// one, its regulariser. Full fine-tuning adapts nothing.
    ///
    /// # Errors
    /// If the targets, the method's configuration or the adapter do not fit the model.
    pub fn inject(&self, model: &mut dyn Linears, params: &Params) -> Result<Option<Regularizer>> {
        match self {
            Self::Fresh(Method::Full, _) => (),
            Self::Fresh(Method::Lora(config), targets) => {
                inject::lora(model, targets, config, params)?;
            }
            Self::Fresh(Method::MonteCLoRA(config), targets) => {
                inject::monteclora(model, targets, config, params)?;
            }
            Self::Adapter(file) => file.apply(model, inject::DEFAULT_ADAPTER, params)?,
            Self::PostHoc(file, _) => {
                if matches!(file.method(), peft::Method::MonteCLoRA(_)) {
                    return Err(Error::config("adapter", "it has a posterior already: go on from it"));
                }
                file.apply(model, TRAINED, params)?;
                let Method::MonteCLoRA(config) = self.method() else { return Ok(None) };
                inject::posthoc(model, inject::DEFAULT_ADAPTER, &config, params)?;
                named::remove(model, TRAINED, params)?;
            }
        }
        Ok(match self.method() {
            Method::MonteCLoRA(config) => Some(Regularizer::new(&config)),
            Method::Lora(_) | Method::Full => None,
        })
    }
}
