//! Export formats of adapters, and the conversion to them.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::adapter::{AdapterFile, LayerTensors};
use super::config::TargetModules;
use crate::error::{Error, Result};

/// The readers that an adapter is written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum ExportFormat {
    /// PEFT from version 0.20 on, with everything needed to continue training.
    #[default]
    Peft,
    /// Inference servers and any version of PEFT: only A and B of the mean. All layers have the same rank
    /// (smaller ones are padded with zeros) and the same scale (B is multiplied by the ratio), because vLLM
    /// reads no patterns and llama.cpp divides by the rank of the tensors.
    Serving {
        /// How rsLoRA's scale, `lora_alpha / sqrt(r)`, is written. True: B is multiplied by `sqrt(r)`, so
        /// that every reader gets the same result with `lora_alpha / r`. False: `use_rslora` is set, which
        /// PEFT and vLLM read but llama.cpp ignores.
        fold_rslora: bool,
    },
}

impl AdapterFile {
    /// Converts this adapter to `format`. [`ExportFormat::Serving`] does not change the mean that it
    /// computes.
    ///
    /// # Errors
    /// For [`ExportFormat::Serving`], if there are saved modules: servers reject adapters with a task head,
    /// and without the head the adapter solves another task.
    pub fn exported(&self, format: ExportFormat) -> Result<Self> {
        match format {
            ExportFormat::Peft => Ok(self.clone()),
            ExportFormat::Serving { fold_rslora } => self.serving(fold_rslora),
        }
    }

    fn serving(&self, fold_rslora: bool) -> Result<Self> {
        if let Some(name) = self.saved_modules.keys().next() {
            let reason =
                format!("serving adapters only have A and B, and this one also has a task head ({name})");
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

/// Pads A and B to `rank` with zeros and multiplies B by `factor`.
fn widened(layer: &LayerTensors, rank: usize, factor: f64) -> Result<LayerTensors> {
    let more = rank - layer.a.dim(0)?;
    let fill = |tensor: &Tensor, dim| match more {
        0 => Ok(tensor.clone()),
        _ => tensor.pad_with_zeros(dim, 0, more),
    };
    let b = if factor == 1.0 { layer.b.clone() } else { (&layer.b * factor)? };
    Ok(LayerTensors { a: fill(&layer.a, 0)?, b: fill(&b, 1)?, sampler: None })
}
