//! Prompt tuning (Lester et al. 2021): only the embeddings of virtual tokens before each row are learned,
//! nothing else in the model.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::adapter::{AdaptableEmbedding, Params, Role};
use crate::error::{Error, Result};
use crate::noise::Purpose;
use crate::ops::OpPath;
use crate::util::check::at_least_one;

/// The options of prompt tuning.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PromptConfig {
    /// The number of virtual tokens.
    pub virtual_tokens: usize,
}

impl Default for PromptConfig {
    fn default() -> Self {
        Self { virtual_tokens: 20 }
    }
}

impl PromptConfig {
    /// Checks the number of virtual tokens.
    ///
    /// # Errors
    /// If it is 0.
    pub fn validate(&self) -> Result<()> {
        at_least_one("virtual_tokens", self.virtual_tokens)
    }
}

/// Adds virtual tokens before every row of a model. Creates the parameter `prompt.{adapter}`,
/// `(virtual_tokens, d)`, which starts at the embeddings of words that the seed picks from the vocabulary
/// (section 3.2 of the paper).
///
/// Difference: in a batch of a decoder that is padded on the left, PEFT puts the virtual tokens before the
/// padding. Since it numbers columns, a row's result then depends on the length of the other rows. Here the
/// virtual tokens are directly before the first real token, as in a row by itself. Without left padding, the
/// two are equal. Encoders keep the virtual tokens in the first columns, which a classifier reads.
///
/// # Errors
/// If the number of virtual tokens is 0, the model already has virtual tokens, or the name is taken.
pub fn prompt_tuning(
    embedding: &mut AdaptableEmbedding,
    adapter: &str,
    config: &PromptConfig,
    params: &Params,
) -> Result<()> {
    config.validate()?;
    if embedding.virtual_tokens() > 0 {
        return Err(Error::config("prompt", "the model has virtual tokens already"));
    }
    let name = format!("prompt.{adapter}");
    let mut picks = vec![0f64; config.virtual_tokens];
    params.noise().stream(&name, Purpose::Init).fill_uniform(0, &mut picks);
    let vocabulary = embedding.words().dims2()?.0;
    // The draws are in (0, 1), so the index stays below the vocabulary's size, except for rounding.
    let ids: Vec<u32> =
        picks.iter().map(|u| ((u * vocabulary as f64) as usize).min(vocabulary - 1) as u32).collect();
    let ids = Tensor::from_vec(ids, config.virtual_tokens, embedding.words().device())?;
    let start = embedding.lookup(&ids, OpPath::default())?.detach();
    embedding.set_prompt(Some(params.insert(&name, Role::Prompt, &start)?))
}
