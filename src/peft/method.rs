//! Converts between PEFT's configuration and this crate's methods.

use super::config::{MonteCLoRAFields, PeftConfig};
use crate::adapter::Prior;
use crate::adapters::LoraConfig;
use crate::monteclora::MonteCLoRAConfig;

/// The method and settings of an adapter, in this crate's terms.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum AdapterMethod {
    /// LoRA.
    Lora(LoraConfig),
    /// MonteCLoRA.
    MonteCLoRA(MonteCLoRAConfig),
}

impl AdapterMethod {
    /// Combines a PEFT configuration with this crate's own settings.
    pub(super) fn from_peft(
        config: &PeftConfig,
        own: Option<&MonteCLoRAConfig>,
        prior: Option<Prior>,
    ) -> Self {
        let (rank, alpha, dropout, use_rslora) =
            (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora);
        let Some(fields) = &config.monteclora_config else {
            return Self::Lora(LoraConfig { rank, alpha, dropout, use_rslora, prior });
        };
        let own = own.cloned().unwrap_or_else(MonteCLoRAConfig::peft);
        let cooperative_weight = match (fields.use_entropy, own.cooperative_weight > 0.0) {
            (false, _) => 0.0,
            (true, true) => own.cooperative_weight,
            (true, false) => 1.0,
        };
        Self::MonteCLoRA(MonteCLoRAConfig {
            rank,
            alpha,
            dropout,
            use_rslora,
            num_components: fields.num_samples,
            sample_scaler: fields.sample_scaler,
            kl_weight: fields.kl_loss_weight,
            dirichlet_prior: fields.dirichlet_prior,
            cooperative_weight,
            // PEFT's buffer has at least one draw, ours may have none.
            buffer_size: if fields.buffer_size == own.buffer_size.max(1) {
                own.buffer_size
            } else {
                fields.buffer_size
            },
            // `relative_scaler` recomputes eps, so drop it if the file's eps has changed since.
            relative_scaler: own.relative_scaler.filter(|_| fields.sample_scaler == own.sample_scaler),
            ..own
        })
    }

    /// PEFT's settings of this method, without targets.
    pub(super) fn to_peft(&self) -> PeftConfig {
        let (rank, alpha, dropout, use_rslora, fields) = match self {
            Self::Lora(c) => (c.rank, c.alpha, c.dropout, c.use_rslora, None),
            Self::MonteCLoRA(c) => {
                let fields = MonteCLoRAFields {
                    num_samples: c.num_components,
                    use_entropy: c.cooperative_weight > 0.0,
                    dirichlet_prior: c.dirichlet_prior,
                    sample_scaler: c.sample_scaler,
                    kl_loss_weight: c.kl_weight,
                    buffer_size: c.buffer_size.max(1),
                };
                (c.rank, c.alpha, c.dropout, c.use_rslora, Some(fields))
            }
        };
        PeftConfig {
            r: rank,
            lora_alpha: alpha,
            lora_dropout: dropout,
            use_rslora,
            monteclora_config: fields,
            ..PeftConfig::default()
        }
    }
}
