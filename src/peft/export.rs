//! Who an adapter is written for, and what changes for them.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::adapter::{AdapterFile, LayerTensors};
use super::config::TargetModules;
use crate::error::{Error, Result};

/// Who an adapter is written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum ExportFormat {
    /// PEFT from version 0.20 on: everything that training needs to go on.
    #[default]
    PeftMonteCLoRA,
    /// Servers and any version of PEFT: the mean's A and B alone. All layers have one rank (smaller
    /// ones are filled up with zeros) and one scale (B makes up for the difference), because vLLM
    /// reads no patterns and llama.cpp divides by the rank that it finds.
    Serving {
        /// What is done with rsLoRA's scale, `lora_alpha / sqrt(r)`. True: B is multiplied by `sqrt(r)`,
        /// so that `lora_alpha / r` gives the same for every reader. False: `use_rslora` says so, which PEFT and
        /// vLLM read and llama.cpp passes over.
        fold_rslora: bool,
    },
}

impl AdapterFile {
    /// This adapter as `format` has it; what [`ExportFormat::Serving`] changes does not change what the
    /// adapter computes.
    ///
    /// # Errors
    /// For [`ExportFormat::Serving`], if there are saved modules: servers refuse adapters with a task
    /// head, and without it the adapter answers another question.
    pub fn exported(&self, format: ExportFormat) -> Result<Self> {
        match format {
            ExportFormat::PeftMonteCLoRA => Ok(self.clone()),
            ExportFormat::Serving { fold_rslora } => self.serving(fold_rslora),
        }
    }

    fn serving(&self, fold_rslora: bool) -> Result<Self> {
        if let Some(name) = self.saved_modules.keys().next() {
            let reason =
                format!("serving adapters hold A and B alone, and this one has a task head too ({name})");
            return Err(Error::config("format", reason));
        }
        let ranks = self.layers.values().map(|layer| layer.a.dim(0)).collect::<candle_core::Result<Vec<_>>>();
        let rank = ranks?.into_iter().max().unwrap_or(self.config.r);
        let mut config = self.config.clone();
        config.use_rslora &= !fold_rslora;
        (config.r, config.rank_pattern, config.alpha_pattern) = (rank, Vec::new(), Vec::new());
        (config.monteclora_config, config.modules_to_save) = (None, None);
        let filtered = config.exclude_modules.is_some() || config.layers_to_transform.is_some();
        if filtered || !matches!(config.target_modules, Some(TargetModules::Names(_))) {
            // Whole paths mean the same to every reader.
            config.target_modules = Some(TargetModules::Names(self.layers.keys().cloned().collect()));
            (config.exclude_modules, config.layers_to_transform, config.layers_pattern) = (None, None, None);
        }
        let paths: Vec<&str> = self.layers.keys().map(String::as_str).collect();
        let scales = self.config.scales_of(&paths)?.into_iter().zip(config.scales_of(&paths)?);
        let layers = self
            .layers
            .iter()
            .zip(scales)
            .map(|((path, layer), (old, new))| Ok((path.clone(), widened(layer, rank, old / new)?)));
        let layers = layers.collect::<Result<_>>()?;
        Ok(Self {
            config,
            layers,
            saved_modules: BTreeMap::new(),
            monteclora: None,
            prior: None,
            labels: None,
        })
    }
}

/// A and B of this rank, the new rows and columns zero, and B times `factor`.
fn widened(layer: &LayerTensors, rank: usize, factor: f64) -> Result<LayerTensors> {
    let more = rank - layer.a.dim(0)?;
    let fill = |tensor: &Tensor, dim| match more {
        0 => Ok(tensor.clone()),
        _ => tensor.pad_with_zeros(dim, 0, more),
    };
    let b = if factor == 1.0 { layer.b.clone() } else { (&layer.b * factor)? };
    Ok(LayerTensors { a: fill(&layer.a, 0)?, b: fill(&b, 1)?, sampler: None })
}
