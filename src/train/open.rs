//! Opens a trained classifier from the files of a run or of Hugging Face.

use std::path::Path;

use candle_core::{DType, Device};

use super::classifier::{Classifier, LoadPurpose};
use super::method::{Method, MethodInit};
use super::run_folder::Trained;
use crate::error::{Error, Result};
use crate::inject::Targets;
use crate::labels::Labels;
use crate::models::hub::ModelFiles;
use crate::models::sequence::OUTPUT_LAYERS;
use crate::noise::Noise;

impl Classifier {
    /// Opens a trained classifier for prediction or further training. `dir` is the folder of an adapter (this
    /// crate's or PEFT's), of a model with a head, or of a run that contains either (`adapter/`, `model/`).
    /// The classes and their order come from the folder. The base of an adapter is `base`, or else the model
    /// that its file names. The length to which training cut its texts is not read: set it with
    /// [`Self::set_max_length`]. For the posterior of the linearised model, see
    /// [`TrainedClassifier`](crate::bayes::TrainedClassifier).
    ///
    /// # Errors
    /// If the folder has neither, the base is not found, there is no trained head, or a file is damaged.
    pub fn open(dir: &Path, base: Option<&ModelFiles>, dtype: DType, device: &Device) -> Result<Self> {
        let (file, files) = match Trained::find(dir, base)? {
            Trained::Model(files) => return Self::of_checkpoint(&files, dtype, device),
            Trained::Adapter(file, files) => (file, files),
        };
        let weights = OUTPUT_LAYERS.map(|layer| format!("{layer}.weight"));
        let outputs = weights.iter().find_map(|name| file.saved_modules.get(name));
        let outputs = outputs.map(|head| head.dim(0)).transpose()?;
        let outputs = outputs.map_or_else(|| outputs_of(&files), Ok)?;
        let names = file.labels.clone();
        let start = MethodInit::Adapter(file);
        let opened = Self::load(&files, outputs, &start, Noise::new(0), dtype, device)?;
        Ok(opened.with_numbers_of(names))
    }

    /// Opens the classifier of a checkpoint with a trained head, such as a hub repository's. In f32 its weights are
    /// trainable; if they are quantised or of another dtype, the whole model is frozen.
    ///
    /// # Errors
    /// As [`Self::load`], and if it has no head.
    pub fn of_checkpoint(files: &ModelFiles, dtype: DType, device: &Device) -> Result<Self> {
        let start = MethodInit::Fresh(Method::Full, Targets::default());
        let labels = Labels::from(outputs_of(files)?);
        let opened = Self::with_head(files, labels, &start, Noise::new(0), dtype, device, LoadPurpose::Open)?;
        let names = opened.config().named()?;
        Ok(opened.with_numbers_of(names))
    }

    /// Takes the file's spelling of numbered classes: 0 and 1 rather than LABEL_0 and LABEL_1.
    fn with_numbers_of(mut self, names: Option<Labels>) -> Self {
        let numbers = |names: &Labels| names.are_numbers() && names.len() == self.labels.len();
        if let Some(labels) = names.filter(numbers).filter(|_| self.labels.are_numbers()) {
            self.labels = labels;
        }
        self
    }
}

/// Returns the number of outputs of a checkpoint's head.
fn outputs_of(files: &ModelFiles) -> Result<usize> {
    let tensors = files.var_builder(DType::F32, &Device::Cpu)?;
    let weights = OUTPUT_LAYERS.map(|layer| format!("{layer}.weight"));
    let Some(name) = weights.iter().find(|name| tensors.contains_tensor(name)) else {
        let reason = "there is no trained head in it, nor in an adapter: train one first";
        return Err(Error::format(files.config_path(), reason));
    };
    Ok(tensors.get_unchecked(name)?.dim(0)?)
}
