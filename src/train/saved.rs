//! The folder of a run: where its adapter and its model are, and how they are written.

use std::path::{Path, PathBuf};

use crate::adapter::Params;
use crate::error::Result;
use crate::peft::{AdapterFile, ExportFormat, CONFIG_FILE};
use crate::util::files;

/// The folder of a run, with what it trained: `adapter/` has an adapter in PEFT's format or, of a method
/// without such a format, its parameters; `model/` has a whole model.
///
/// `Classifier::open` prefers an adapter, so each writer removes what another run left in its place.
#[derive(Debug, Clone)]
pub struct RunFolder(PathBuf);

impl RunFolder {
    /// The file beside an adapter that holds a posterior of the linearised model.
    pub(crate) const POSTERIOR: &'static str = "linearised.json";

    /// The folder `dir`, which need not exist.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self(dir.into())
    }

    /// The folder of the adapter.
    pub fn adapter(&self) -> PathBuf {
        self.0.join("adapter")
    }

    /// The folder of the whole model.
    pub fn model(&self) -> PathBuf {
        self.0.join("model")
    }

    /// The folder of an adapter in PEFT's format: `dir` itself, or the `adapter/` of the run in `dir` if only
    /// that has one.
    pub fn find_adapter(dir: &Path) -> PathBuf {
        let of_run = Self::new(dir).adapter();
        match !dir.join(CONFIG_FILE).is_file() && of_run.join(CONFIG_FILE).is_file() {
            true => of_run,
            false => dir.to_path_buf(),
        }
    }

    /// Writes an adapter.
    ///
    /// # Errors
    /// As [`AdapterFile::write`].
    pub fn save_adapter(&self, file: &AdapterFile, format: ExportFormat) -> Result<()> {
        let dir = self.adapter();
        [Params::FILE, Self::POSTERIOR].iter().try_for_each(|name| files::remove(&dir.join(name)))?;
        file.write(dir, format)
    }

    /// Writes the parameters of a method that has no form in PEFT's format.
    ///
    /// # Errors
    /// If a file cannot be written or removed.
    pub fn save_parameters(&self, params: &Params) -> Result<()> {
        let dir = self.adapter();
        self.remove_adapter()?;
        params.save(&dir)
    }

    /// Removes what [`Self::save_adapter`] and [`Self::save_parameters`] wrote, for a run that writes a whole
    /// model.
    ///
    /// # Errors
    /// If a file cannot be removed.
    pub fn remove_adapter(&self) -> Result<()> {
        let dir = self.adapter();
        AdapterFile::remove(&dir)?;
        [Params::FILE, Self::POSTERIOR].iter().try_for_each(|name| files::remove(&dir.join(name)))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};
    use candle_nn::Linear;

    use super::*;
    use crate::adapters::{LoraConfig, LoraLinear};
    use crate::noise::Noise;
    use crate::peft::{AdapterMetadata, AdapterMethod, WEIGHTS_FILE};

    #[test]
    fn a_run_leaves_nothing_of_another_in_the_place_of_its_adapter() -> Result<()> {
        let params = Params::new(Noise::new(0), &Device::Cpu);
        let config = LoraConfig { rank: 2, ..Default::default() };
        let base = Linear::new(Tensor::ones((6, 4), DType::F32, &Device::Cpu)?, None);
        let up = LoraLinear::new(base, &params, "up", &config)?;
        let (layers, method) = ([("up", up.adapter() as _)], AdapterMethod::Lora(config));
        let file = AdapterFile::from_layers(&layers, &params, &method, &AdapterMetadata::default())?;

        let dir = tempfile::tempdir().unwrap();
        let run = RunFolder::new(dir.path());
        let there = || {
            let names = [CONFIG_FILE, WEIGHTS_FILE, Params::FILE];
            names.map(|name| run.adapter().join(name).is_file())
        };
        assert_eq!(RunFolder::find_adapter(dir.path()), dir.path());
        run.save_adapter(&file, ExportFormat::default())?;
        assert_eq!(there(), [true, true, false]);
        assert_eq!(RunFolder::find_adapter(dir.path()), run.adapter());
        assert_eq!(RunFolder::find_adapter(&run.adapter()), run.adapter());
        run.save_parameters(&params)?;
        assert_eq!(there(), [false, false, true]);
        assert_eq!(RunFolder::find_adapter(dir.path()), dir.path());
        run.save_adapter(&file, ExportFormat::default())?;
        assert_eq!(there(), [true, true, false]);
        run.remove_adapter()?;
        run.save_parameters(&params)?;
        run.remove_adapter()?;
        assert_eq!(there(), [false; 3]);
        Ok(())
    }
}
