//! The options of text generation, compared with the model's own generation settings.

use monteclora::models::generate::{GenerateConfig, PosteriorWeights, Sampling};
use monteclora::models::hub::ModelFiles;
use serde_json::Value;

use crate::common::output::tell_err;
use crate::common::Outcome;

// Not a doc comment, which clap would take for the program's description.
#[derive(clap::Args, Clone)]
#[command(next_help_heading = "Generation")]
pub struct GenerationOptions {
    /// The maximum number of generated tokens. Default: 64 for the sample, 256 for answers and the task (512 for
    /// programs).
    #[arg(long)]
    pub max_new_tokens: Option<usize>,
    /// The sampling temperature; 0 always takes the most probable token.
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f64,
    /// Sample among the k most probable tokens only; needs a temperature.
    #[arg(long)]
    pub top_k: Option<usize>,
    /// Sample among the most probable tokens up to this total probability only; needs a temperature.
    #[arg(long)]
    pub top_p: Option<f64>,
    /// Penalty on tokens that are already in the text; above 1 makes them less likely.
    #[arg(long, default_value_t = 1.0)]
    pub repetition_penalty: f64,
    /// A text before which a sample or an answer ends, besides the model's end tokens. May be given several times.
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
}

impl GenerationOptions {
    /// The generation settings, with `stop` as end tokens and at most `most` new tokens unless an option sets
    /// the number.
    pub fn config(
        &self,
        seed: u64,
        stop: Vec<u32>,
        weights: PosteriorWeights,
        most: usize,
    ) -> Outcome<GenerateConfig> {
        let temperature = self.temperature;
        let sampling = match (temperature == 0.0, self.top_k, self.top_p) {
            (true, None, None) => Sampling::ArgMax,
            (true, _, _) => return Err("--top-k and --top-p: want a --temperature above 0".into()),
            (false, None, None) => Sampling::All { temperature },
            (false, Some(k), None) => Sampling::TopK { k, temperature },
            (false, None, Some(p)) => Sampling::TopP { p, temperature },
            (false, Some(k), Some(p)) => Sampling::TopKThenTopP { k, p, temperature },
        };
        let (max_new_tokens, repetition_penalty) =
            (self.max_new_tokens.unwrap_or(most), self.repetition_penalty);
        let defaults = GenerateConfig::default();
        Ok(GenerateConfig { max_new_tokens, sampling, repetition_penalty, seed, stop, weights, ..defaults })
    }

    /// The texts before which a text ends.
    pub fn stops(&self) -> Vec<&str> {
        self.stop.iter().map(String::as_str).collect()
    }

    /// Reports if the model's `generation_config.json` has another repetition penalty than the one in use,
    /// because transformers would apply the file's penalty by default.
    pub fn tell_asked(&self, files: &ModelFiles) -> Outcome {
        let Some(path) = files.file("generation_config.json")? else { return Ok(()) };
        let settings: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
        let asked = settings["repetition_penalty"].as_f64();
        if let Some(asked) = asked.filter(|asked| *asked != self.repetition_penalty) {
            let (name, applied) = (path.display(), self.repetition_penalty);
            tell_err!("{name} recommends --repetition-penalty {asked}, this run uses {applied}");
        }
        Ok(())
    }
}
