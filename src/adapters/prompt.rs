//! Prompt tuning (Lester et al. 2021): the embeddings of virtual tokens before each row are learned, and
//! nothing else of the model.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::adapter::{AdaptableEmbedding, Params, Role};
use crate::error::{Error, Result};
use crate::noise::Purpose;
use crate::ops::OpPath;

/// The options of prompt tuning.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PromptConfig {
    /// How many virtual tokens.
    pub virtual_tokens: usize,
}

impl Default for PromptConfig {
    fn default() -> Self {
        Self { virtual_tokens: 20 }
    }
}

/// Puts virtual tokens before every row of a model. Creates `prompt.{adapter}`, `(virtual_tokens, d)`,
/// which starts from words of the vocabulary that the seed picks (section 3.2 of the paper).
///
/// Difference: where a batch of a decoder is padded on the left, PEFT's virtual tokens stand before the
/// padding, and since it numbers columns, a row's result depends on how long the others are. Here they stand
/// directly before the first real token, as in a row alone. Without padding on the left both are the
/// same. Encoders keep them in the first columns, the place that a classifier reads.
///
/// # Errors
/// If the number of virtual tokens is 0, the model has some already, or the name is taken.
pub fn prompt_tuning(
    embedding: &mut AdaptableEmbedding,
    adapter: &str,
    config: &PromptConfig,
    params: &Params,
) -> Result<()> {
    if config.virtual_tokens == 0 {
        return Err(Error::config("virtual_tokens", "expected at least 1, got 0"));
    }
    if embedding.virtual_tokens() > 0 {
        return Err(Error::config("prompt", "the model has virtual tokens already"));
    }
    let name = format!("prompt.{adapter}");
    let mut picks = vec![0f64; config.virtual_tokens];
    params.noise().stream(&name, Purpose::Init).fill_uniform(0, &mut picks);
    let vocabulary = embedding.words().dims2()?.0;
    // Uniform draws lie in (0, 1): the last word is the most they can pick, but for rounding.
    let ids: Vec<u32> =
        picks.iter().map(|u| ((u * vocabulary as f64) as usize).min(vocabulary - 1) as u32).collect();
    let ids = Tensor::from_vec(ids, config.virtual_tokens, embedding.words().device())?;
    let start = embedding.lookup(&ids, OpPath::default())?.detach();
    embedding.set_prompt(Some(params.insert(&name, Role::Prompt, &start)?))
}
