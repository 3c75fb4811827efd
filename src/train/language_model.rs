//! A trained language model with its tokenizer, opened from the files of a run or of Hugging Face.

use std::path::Path;

use candle_core::{DType, Device};

use super::method::MethodInit;
use super::run_folder::Trained;
use crate::adapter::Params;
use crate::data::causal::PromptEncoder;
use crate::data::encode::fit_vocabulary;
use crate::data::tokenizer;
use crate::error::Result;
use crate::models::causal::CausalLm;
use crate::models::decoder::{DecoderConfig, DecoderForCausalLM};
use crate::models::hub::ModelFiles;
use crate::noise::Noise;

/// A language model as it was trained, for answers to prompts: [`Generator::of`](crate::eval::Generator::of).
///
/// # Example
/// ```
/// use candle_core::{DType, Device};
/// use monteclora::eval::Generator;
/// use monteclora::models::generate::GenerateConfig;
/// use monteclora::train::LanguageModel;
///
/// # if !std::path::Path::new("examples/assets").exists() { return Ok::<(), monteclora::Error>(()) } // not in the package
/// let folder = "examples/assets/stories260k"; // or that of a run or of an adapter
/// let language = LanguageModel::open(folder.as_ref(), None, DType::F32, &[Device::Cpu])?;
/// let config = GenerateConfig { max_new_tokens: 12, ..GenerateConfig::default() };
/// let texts = Generator::of(&language, config).texts(&["Once upon a time"], &[])?;
/// assert!(texts[0].starts_with(", there was a little girl"), "{texts:?}");
/// # Ok::<(), monteclora::Error>(())
/// ```
#[derive(Debug)]
pub struct LanguageModel {
    /// The model with its adapter.
    pub model: DecoderForCausalLM,
    /// The parameters of the adapter.
    pub params: Params,
    /// The encoder of prompts. For conversations that a chat template rendered, replace it by its
    /// [`PromptEncoder::of_rendered`].
    pub encoder: PromptEncoder,
    files: ModelFiles,
    has_posterior: bool,
}

impl LanguageModel {
    /// Opens a trained language model. `dir` is the folder of an adapter (this crate's or PEFT's), of a model, or
    /// of a run that contains either (`adapter/`, `model/`). The base of an adapter is `base`, or else the model
    /// that its file names; its weights have the dtype `dtype`, unless they are quantised. The layers are split
    /// over `devices` ([`DecoderConfig::place`]).
    ///
    /// # Errors
    /// If the folder has neither, the base is not found or is no decoder, the adapter does not fit it, a file is
    /// damaged, or there is no device.
    pub fn open(dir: &Path, base: Option<&ModelFiles>, dtype: DType, devices: &[Device]) -> Result<Self> {
        match Trained::find(dir, base)? {
            Trained::Model(files) => Self::of_checkpoint(&files, dtype, devices),
            Trained::Adapter(file, files) => {
                Self::load(&files, Some(&MethodInit::Adapter(file)), dtype, devices)
            }
        }
    }

    /// Opens a checkpoint as it is, such as a hub repository's.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn of_checkpoint(files: &ModelFiles, dtype: DType, devices: &[Device]) -> Result<Self> {
        Self::load(files, None, dtype, devices)
    }

    fn load(
        files: &ModelFiles,
        start: Option<&MethodInit>,
        dtype: DType,
        devices: &[Device],
    ) -> Result<Self> {
        let config = DecoderConfig::from_files(files)?;
        let placement = config.place(devices)?;
        let params = Params::new(Noise::new(0), placement.first());
        let weights = files.open_weights(dtype, placement.first())?.placed(&placement);
        let mut model = DecoderForCausalLM::load(weights, &config, Noise::new(0))?;
        start.map_or(Ok(()), |start| start.adapt(&mut model, &params))?;
        let has_posterior = start.is_some_and(|start| start.method().has_posterior());
        let tokenizer = fit_vocabulary(tokenizer::of_model(files)?, config.vocab_size)?;
        let longest = model.max_length();
        let encoder = PromptEncoder::new(tokenizer, longest, longest, config.eos_token_ids, false)?;
        Ok(Self { model, params, encoder, files: files.clone(), has_posterior })
    }

    /// Whether the method of the adapter has a posterior to draw from.
    pub fn has_posterior(&self) -> bool {
        self.has_posterior
    }

    /// The files of the model or of the adapter's base, which may have a chat template.
    pub fn files(&self) -> &ModelFiles {
        &self.files
    }
}
