//! The ways to fine-tune, behind one name.

use crate::adapters::LoraConfig;
use crate::error::Result;
use crate::inject::{self, Targets};
use crate::monteclora::{MonteCLoRAConfig, Regularizer};
use crate::params::Params;
use crate::peft;
use crate::slot::Linears;

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

    /// Puts this method's adapters on a model; returns the paths of the adapted layers and, where
    /// the method has one, its regulariser. Full fine-tuning adapts none.
    ///
    /// # Errors
    /// If the targets or the method's configuration do not fit the model.
    pub fn inject(
        &self,
        model: &mut dyn Linears,
        targets: &Targets,
        params: &Params,
    ) -> Result<(Vec<String>, Option<Regularizer>)> {
        let (adapted, regularizer) = match self {
            Self::Full => (Vec::new(), None),
            Self::Lora(config) => (inject::lora(model, targets, config, params)?, None),
            Self::MonteCLoRA(config) => {
                (inject::monteclora(model, targets, config, params)?, Some(Regularizer::new(config)))
            }
        };
        Ok((adapted.into_iter().map(|target| target.path).collect(), regularizer))
    }
}
