//! The names (keys) of an adapter file's tensors: PEFT's prefix, the layer's Hugging Face path, and the kind
//! of tensor. A key does not contain the name of the adapter.

use super::config::PeftConfig;
use crate::error::Result;

/// The prefix of every key.
pub(super) const PREFIX: &str = "base_model.model.";
/// The name between a layer's path and that of one of its sampler's tensors.
pub(super) const SAMPLER: &str = "lora_monteclora_sampler";

/// The tensors of one layer, in the order in which they are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TensorKind {
    A,
    B,
    StdPrior,
    ExpertWeightsPrior,
    ExpertWeights,
    GaussianVarPrior,
}

impl TensorKind {
    pub(super) const ALL: [Self; 6] = [
        Self::A,
        Self::B,
        Self::StdPrior,
        Self::ExpertWeightsPrior,
        Self::ExpertWeights,
        Self::GaussianVarPrior,
    ];

    /// The part of the key after the layer's path.
    pub(super) fn suffix(self) -> &'static str {
        match self {
            Self::A => "lora_A.weight",
            Self::B => "lora_B.weight",
            Self::StdPrior => "lora_monteclora_sampler.std_prior",
            Self::ExpertWeightsPrior => "lora_monteclora_sampler.expert_weights_prior",
            Self::ExpertWeights => "lora_monteclora_sampler.expert_weights",
            Self::GaussianVarPrior => "lora_monteclora_sampler.gaussian_var_prior",
        }
    }

    /// The whole key.
    pub(super) fn key(self, path: &str) -> String {
        format!("{PREFIX}{path}.{}", self.suffix())
    }
}

/// The module of the tensor `name`: its name without the last segment.
pub(super) fn module(name: &str) -> &str {
    name.rsplit_once('.').map_or("", |(module, _)| module)
}

/// The meaning of a key.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Key {
    /// A tensor of the adapted layer at this path.
    Layer(String, TensorKind),
    /// A tensor of a module that is saved whole, by its name in the model.
    Saved(String),
}

/// Tensors that PEFT saves of a model whose vocabulary was resized, without listing them in the
/// configuration.
const OF_VOCABULARIES: [&str; 3] = ["embed_tokens.weight", "lm_head.weight", "word_embeddings.weight"];

/// Parses the keys of a file; for each, its meaning or the reason why it is rejected.
pub(super) fn parse(keys: &[&str], config: &PeftConfig) -> Result<Vec<std::result::Result<Key, String>>> {
    let mut parsed: Vec<_> = keys.iter().map(|key| of_shape(key)).collect();
    // All in one call: the configuration may have many patterns to compile.
    let mut names = Vec::new();
    for key in &mut parsed {
        if let Ok(Key::Saved(name)) = key {
            names.push((name.clone(), key));
        }
    }
    let modules: Vec<&str> = names.iter().map(|(name, _)| module(name)).collect();
    let saved = config.are_saved(&modules)?;
    for ((name, key), saved) in names.iter_mut().zip(saved) {
        if module(name).is_empty() || !saved {
            let reason = if OF_VOCABULARIES.iter().any(|part| name.ends_with(part)) {
                "adapters with a resized vocabulary are not supported: merge the adapter into its base in \
                 Python (merge_and_unload) and load the merged model"
            } else {
                "unexpected tensor: it is not part of an adapter, and modules_to_save does not name it"
            };
            **key = Err(reason.into());
        }
    }
    Ok(parsed)
}

/// Parses a key by its form alone; [`parse`] checks whether the configuration lists a saved module.
fn of_shape(key: &str) -> std::result::Result<Key, String> {
    let rest = key.strip_prefix(PREFIX).ok_or(format!("expected a name that starts with {PREFIX}"))?;
    for kind in TensorKind::ALL {
        if let Some(path) = rest.strip_suffix(kind.suffix()).and_then(|rest| rest.strip_suffix('.')) {
            return Ok(Key::Layer(path.to_string(), kind));
        }
    }
    let segments: Vec<&str> = rest.split('.').collect();
    if let Some(at) = segments.iter().position(|s| s.starts_with("lora_")) {
        return Err(why_not(segments[at], &segments[at + 1..]));
    }
    if segments.contains(&"base_layer") {
        return Err("weights of the base model in an adapter are not supported".into());
    }
    Ok(Key::Saved(without_wrapper(&segments)))
}

/// The reason why the tensor `kind`, followed by `rest`, is rejected.
fn why_not(kind: &str, rest: &[&str]) -> String {
    match (kind, rest) {
        ("lora_magnitude_vector", _) => "DoRA (a magnitude vector) is not supported".into(),
        ("lora_embedding_A" | "lora_embedding_B", _) => "adapters of embeddings are not supported".into(),
        ("lora_B", ["bias"]) => "a bias of B (lora_bias) is not supported".into(),
        ("lora_A" | "lora_B", [name, "weight"]) => {
            format!(
                "the name contains an adapter's name ({name:?}): expected {kind}.weight, as in PEFT's files"
            )
        }
        (SAMPLER, [name, _]) => {
            format!(
                "the name contains an adapter's name ({name:?}): expected {SAMPLER}.std_prior, as in PEFT's \
                 files"
            )
        }
        _ => format!("{kind} is no tensor of LoRA or MonteCLoRA"),
    }
}

/// A saved module's name without the wrapper that some versions of PEFT leave in it:
/// `classifier.modules_to_save.default.weight` is `classifier.weight`.
fn without_wrapper(segments: &[&str]) -> String {
    let mut kept = Vec::with_capacity(segments.len());
    let mut rest = segments.iter().peekable();
    while let Some(segment) = rest.next() {
        if *segment == "modules_to_save" && !kept.is_empty() {
            rest.next_if(|name| **name == "default");
        } else {
            kept.push(*segment);
        }
    }
    kept.join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(key: &str) -> std::result::Result<Key, String> {
        let config = PeftConfig { modules_to_save: Some(vec!["classifier".into()]), ..PeftConfig::default() };
        parse(&["base_model.model.classifier.x", key], &config).unwrap().remove(1)
    }

    #[test]
    fn every_key_that_is_written_is_read_back() {
        for kind in TensorKind::ALL {
            assert_eq!(parsed(&kind.key("a.0.b")), Ok(Key::Layer("a.0.b".into(), kind)));
        }
    }

    #[test]
    fn saved_modules_are_found_as_every_version_writes_them() {
        for key in [
            "base_model.model.classifier.dense.weight",
            "base_model.model.classifier.modules_to_save.dense.weight",
            "base_model.model.classifier.modules_to_save.default.dense.weight",
        ] {
            assert_eq!(parsed(key), Ok(Key::Saved("classifier.dense.weight".into())), "{key}");
        }
    }

    #[test]
    fn a_tensor_that_does_not_belong_is_refused_with_the_reason() {
        for (key, reason) in [
            ("roberta.query.lora_A.weight", "starts with base_model.model."),
            ("base_model.model.q.lora_A.default.weight", "adapter's name (\"default\")"),
            ("base_model.model.q.lora_monteclora_sampler.default.std_prior", "adapter's name (\"default\")"),
            ("base_model.model.q.lora_magnitude_vector", "DoRA"),
            ("base_model.model.q.lora_B.bias", "lora_bias"),
            ("base_model.model.e.lora_embedding_A", "embeddings"),
            ("base_model.model.q.lora_monteclora_sampler.other", "no tensor of LoRA"),
            ("base_model.model.q.base_layer.weight", "base model"),
            ("base_model.model.pooler.weight", "modules_to_save does not name it"),
            ("base_model.model.weight", "modules_to_save does not name it"),
        ] {
            let found = parsed(key).unwrap_err();
            assert!(found.contains(reason), "{key}: {found}");
        }
    }
}
