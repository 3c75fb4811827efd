//! Reads and writes the files of an adapter.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Dtype, TensorView};
use safetensors::SafeTensors;

use super::adapter::{AdapterFile, LayerTensors, SamplerTensors, CONFIG_FILE, OWN_FILE, WEIGHTS_FILE};
use super::config::PeftConfig;
use super::export::ExportFormat;
use super::keys::{self, Key, TensorKind};
use super::own;
use crate::error::{Error, Result};
use crate::util::files::{self, Pending};
use crate::util::{json, lfs_pointer};

/// The pickled weights file of older PEFT versions.
const PICKLE: &str = "adapter_model.bin";

impl AdapterFile {
    /// Reads the adapter in the folder `dir`. Half-precision tensors become single precision.
    ///
    /// # Errors
    /// - [`Error::Io`]: a file cannot be read;
    /// - [`Error::Format`]: malformed JSON or safetensors, tensors that are missing, unexpected,
    ///   of the wrong shape or dtype, or not finite; or a kind of adapter that is not plain LoRA or
    ///   MonteCLoRA (DoRA, trained biases, initialisations that change the base ...).
    ///
    /// The error names the file, and the tensor or the setting in it.
    pub fn read(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let path = dir.join(CONFIG_FILE);
        let text = json::read_config(&path)?;
        let config = PeftConfig::parse(&text, &path)?;
        let weights = dir.join(WEIGHTS_FILE);
        if !weights.exists() && dir.join(PICKLE).exists() {
            let reason = format!(
                "{PICKLE} is a pickle, which can run any code when read; convert it to {WEIGHTS_FILE}"
            );
            return Err(Error::format(dir.join(PICKLE), reason));
        }
        let bytes = fs::read(&weights).map_err(Error::io(&weights))?;
        lfs_pointer::refuse(&bytes, &weights)?;
        let own = dir.join(OWN_FILE);
        let (monteclora, prior, labels) = match own.exists() {
            true => own::parse(&json::read_config(&own)?, &own, config.monteclora_config.is_some())?,
            false => (None, None, None),
        };
        let file = Self::assemble(config, &weights, &bytes).and_then(|mut file| {
            (file.monteclora, file.prior, file.labels) = (monteclora, prior, labels);
            file.check()?;
            Ok(file)
        });
        file.map_err(|error| match error {
            Error::Tensor { name, reason } => Error::format(&weights, format!("tensor {name}: {reason}")),
            Error::Config { option, reason } if option == OWN_FILE => Error::format(&own, reason),
            Error::Config { option, reason } => Error::format(&path, format!("{option}: {reason}")),
            format @ Error::Format { .. } => format,
            other => Error::format(&weights, other.to_string()),
        })
    }

    /// Sorts the tensors of a safetensors file into layers and saved modules.
    fn assemble(config: PeftConfig, path: &Path, bytes: &[u8]) -> Result<Self> {
        let file = SafeTensors::deserialize(bytes)
            .map_err(|e| Error::format(path, format!("not a whole safetensors file: {e}")))?;
        let mut names = file.names();
        names.sort_unstable();
        let mut parts: BTreeMap<String, Vec<(TensorKind, Tensor)>> = BTreeMap::new();
        let mut saved_modules = BTreeMap::new();
        for (name, key) in names.iter().copied().zip(keys::parse(&names, &config)?) {
            let view = file.tensor(name).map_err(|e| Error::tensor(name, e.to_string()))?;
            match key.map_err(|reason| Error::tensor(name, reason))? {
                Key::Layer(path, kind) => parts.entry(path).or_default().push((kind, tensor(name, &view)?)),
                Key::Saved(module) => {
                    if saved_modules.insert(module, tensor(name, &view)?).is_some() {
                        return Err(Error::tensor(name, "the file has this tensor twice, under two names"));
                    }
                }
            }
        }
        let layers = parts.into_iter().map(|(path, found)| {
            let mut found: Vec<_> = found.into_iter().map(Some).collect();
            let mut take = |wanted: TensorKind| {
                let slot = found.iter_mut().find(|slot| matches!(slot, Some((kind, _)) if *kind == wanted));
                let (_, tensor) = slot.and_then(Option::take)?;
                Some(tensor)
            };
            let missing = |kind: TensorKind| Error::tensor(kind.key(&path), "it is missing");
            let a = take(TensorKind::A).ok_or_else(|| missing(TensorKind::A))?;
            let b = take(TensorKind::B).ok_or_else(|| missing(TensorKind::B))?;
            let sampler = [
                TensorKind::StdPrior,
                TensorKind::ExpertWeightsPrior,
                TensorKind::ExpertWeights,
                TensorKind::GaussianVarPrior,
            ]
            .map(|kind| (kind, take(kind)));
            let sampler = if sampler.iter().all(|(_, tensor)| tensor.is_none()) {
                None
            } else {
                let [s, p, w, v] = sampler.map(|(kind, tensor)| tensor.ok_or_else(|| missing(kind)));
                Some(SamplerTensors {
                    std_prior: s?,
                    expert_weights_prior: p?,
                    expert_weights: w?,
                    gaussian_var_prior: v?,
                })
            };
            Ok((path, LayerTensors { a, b, sampler }))
        });
        let layers = layers.collect::<Result<_>>()?;
        Ok(Self { config, layers, saved_modules, monteclora: None, prior: None, labels: None })
    }

    /// Writes the adapter into the folder `dir`, which is created if needed. Equal adapters give equal bytes.
    ///
    /// All files are first written beside their final paths. Then the old configuration is removed, the other
    /// files are moved into place, and the new configuration is moved last. A crash in between leaves a
    /// folder without a configuration, which every reader rejects, never the tensors of one adapter with the
    /// settings of another.
    ///
    /// # Errors
    /// Those of [`Self::check`] and [`Self::exported`], before anything is written; then [`Error::Io`].
    pub fn write(&self, dir: impl AsRef<Path>, format: ExportFormat) -> Result<()> {
        self.check()?;
        let file = self.exported(format)?;
        file.check()?;
        let text = |error: serde_json::Error| Error::config("adapter configuration", error.to_string());
        let config = file.config.to_text().map_err(text)?;
        let beyond = own::text(&file).map_err(text)?;
        let bytes = file.to_bytes()?;
        let dir = dir.as_ref();
        fs::create_dir_all(dir).map_err(Error::io(dir))?;
        let own = beyond.map(|text| Pending::write(dir.join(OWN_FILE), text.as_bytes()));
        let (own, weights) = (own.transpose()?, Pending::write(dir.join(WEIGHTS_FILE), &bytes)?);
        let config = Pending::write(dir.join(CONFIG_FILE), config.as_bytes())?;
        files::remove(&dir.join(CONFIG_FILE))?;
        weights.commit()?;
        match own {
            Some(own) => own.commit()?,
            // It belongs to an adapter that was in this folder before.
            None => files::remove(&dir.join(OWN_FILE))?,
        }
        config.commit()
    }

    /// Removes the files of an adapter from the folder `dir`, if there are any, so that something written
    /// there in another form is not mistaken for them.
    ///
    /// # Errors
    /// If a file cannot be removed.
    pub fn remove(dir: impl AsRef<Path>) -> Result<()> {
        // The configuration first: without it the other files are not read.
        [CONFIG_FILE, WEIGHTS_FILE, OWN_FILE]
            .iter()
            .try_for_each(|name| files::remove(&dir.as_ref().join(name)))
    }

    fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut named: BTreeMap<String, &Tensor> = BTreeMap::new();
        for (path, layer) in &self.layers {
            let parts =
                TensorKind::ALL.into_iter().filter_map(|kind| Some((kind.key(path), layer.tensor(kind)?)));
            named.extend(parts);
        }
        named.extend(
            self.saved_modules.iter().map(|(name, tensor)| (format!("{}{name}", keys::PREFIX), tensor)),
        );
        let single = |(name, tensor): (String, &Tensor)| Ok((name, tensor.to_dtype(DType::F32)?));
        let named = named.into_iter().map(single).collect::<Result<BTreeMap<_, _>>>()?;
        safetensors::serialize(named, Some(files::metadata()))
            .map_err(|e| Error::config("weights", e.to_string()))
    }
}

/// A tensor of the file in single precision.
fn tensor(name: &str, view: &TensorView) -> Result<Tensor> {
    let dtype = match view.dtype() {
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        other => return Err(Error::tensor(name, format!("expected F32, F16 or BF16, got {other:?}"))),
    };
    Ok(Tensor::from_raw_buffer(view.data(), dtype, view.shape(), &Device::Cpu)?.to_dtype(DType::F32)?)
}
