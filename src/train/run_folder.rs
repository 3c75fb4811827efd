//! The folder of a run: where its adapter and its model are, and how they are written.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::Serialize;
use serde_json::Value;

use crate::adapter::Params;
use crate::error::{Error, Result};
use crate::models::hub::ModelFiles;
use crate::peft::{AdapterFile, ExportFormat, CONFIG_FILE};
use crate::util::{files, json};

/// The folder of a run, with what it trained: `adapter/` has an adapter in PEFT's format or, of a method
/// without such a format, its parameters; `model/` has a whole model.
///
/// `Classifier::open` prefers an adapter, so each writer removes what another run left in its place.
#[derive(Debug, Clone)]
pub struct RunFolder(PathBuf);

impl RunFolder {
    /// The file beside an adapter that holds a posterior of the linearised model.
    pub(crate) const POSTERIOR: &'static str = "linearised.json";

    /// How the rows of the run were read.
    const INPUT: &'static str = "input.json";

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

    /// Writes how a program read the rows of the run, for [`Self::find_input`].
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save_input(&self, input: &impl Serialize) -> Result<()> {
        files::write_json(&self.0.join(Self::INPUT), input)
    }

    /// Reads what [`Self::save_input`] wrote in the run that `trained` belongs to, which is its folder or the
    /// `adapter/` or `model/` of it; and the run's folder. `None` if it wrote nothing, or something of another type.
    ///
    /// # Errors
    /// If the file cannot be read, or is not JSON.
    pub fn find_input<T: DeserializeOwned>(trained: &Path) -> Result<Option<(PathBuf, T)>> {
        let whole = trained.canonicalize().unwrap_or_else(|_| trained.to_owned());
        let run = whole
            .parent()
            .filter(|run| [Self::new(*run).adapter(), Self::new(*run).model()].contains(&whole));
        for folder in [Some(&*whole), run].into_iter().flatten() {
            let path = folder.join(Self::INPUT);
            if path.is_file() {
                let input: Value = json::parse(std::fs::read(&path).map_err(Error::io(&*path))?, &path)?;
                return Ok(T::deserialize(input).ok().map(|input| (folder.to_path_buf(), input)));
            }
        }
        Ok(None)
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

/// What was trained, found in a folder, with the files of its base.
#[derive(Debug)]
pub(super) enum Trained {
    /// An adapter and the files of its base.
    Adapter(Box<AdapterFile>, ModelFiles),
    /// A whole model.
    Model(ModelFiles),
}

impl Trained {
    /// Finds an adapter or a model in `dir`, or in its subfolders as a run names them. The base of an adapter is
    /// `base`, or else the model that its file names.
    ///
    /// # Errors
    /// If there is neither, the base is not found, or a file is damaged.
    pub fn find(dir: &Path, base: Option<&ModelFiles>) -> Result<Self> {
        let run = RunFolder::new(dir);
        for root in [dir, &run.adapter()] {
            if root.join(CONFIG_FILE).is_file() {
                let file = AdapterFile::read(root)?;
                let files = base.map_or_else(|| base_of(&file, root), |base| Ok(base.clone()))?;
                return Ok(Self::Adapter(Box::new(file), files));
            }
            if root.join(Params::FILE).is_file() {
                let reason =
                    "its method is for comparison only: its parameters are not in PEFT's format and \
                              cannot be opened again";
                return Err(Error::format(root, reason));
            }
        }
        for root in [dir, &run.model()] {
            if root.join("config.json").is_file() {
                if base.is_some() {
                    tracing::warn!("{}: it is a whole model: the given base is not used", root.display());
                }
                return Ok(Self::Model(ModelFiles::locate(&root.to_string_lossy(), None)?));
            }
        }
        let reason = format!("no {CONFIG_FILE} and no config.json, here or in adapter/ or model/");
        Err(Error::format(dir, reason))
    }
}

/// The base that the file of an adapter in `dir` names.
fn base_of(file: &AdapterFile, dir: &Path) -> Result<ModelFiles> {
    let Some(name) = &file.config.base_model_name_or_path else {
        let reason = "it does not name its base model: give the base model";
        return Err(Error::format(dir.join(CONFIG_FILE), reason));
    };
    ModelFiles::locate(name, file.config.revision.as_deref()).map_err(|error| {
        let reason = format!("its base model is not found ({error}): give the base model");
        Error::format(dir.join(CONFIG_FILE), reason)
    })
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
        // How rows were read is found from each of the run's folders.
        assert_eq!(RunFolder::find_input::<usize>(dir.path())?, None);
        run.save_input(&64usize)?;
        for trained in [dir.path(), &run.adapter()] {
            let (folder, length) = RunFolder::find_input::<usize>(trained)?.unwrap();
            assert_eq!((folder, length), (dir.path().canonicalize().unwrap(), 64));
        }
        assert_eq!(RunFolder::find_input::<String>(dir.path())?, None);
        assert_eq!(RunFolder::find_input::<usize>(&dir.path().join("other"))?, None);
        std::fs::write(dir.path().join("input.json"), "{").unwrap();
        assert!(RunFolder::find_input::<usize>(dir.path()).is_err());
        Ok(())
    }
}
