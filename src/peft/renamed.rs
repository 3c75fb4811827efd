//! Adapters of vision-language models, of which this crate has only the decoder. Two versions of transformers
//! name the decoder's layers differently, and PEFT matches target names in the vision part as well.

use std::collections::BTreeSet;

use super::adapter::AdapterFile;
use super::config::TargetModules;
use crate::adapter::AdaptableModel;
use crate::error::Result;

/// The path of the decoder in a vision-language model (Gemma 3): in transformers before 4.52 and in
/// checkpoints, and in transformers since.
const DECODERS: [&str; 2] = ["language_model.model", "model.language_model"];

impl AdapterFile {
    /// The adapter for a model with the decoder alone, renamed if the model uses the paths of the other
    /// version; `None` if nothing has to change.
    ///
    /// # Errors
    /// If the walk fails.
    pub(super) fn fitted_to(&self, model: &dyn AdaptableModel) -> Result<Option<Self>> {
        let mut found = None;
        model.visit_linears(&mut |layer| {
            found = found.or(decoder_of(layer.path()));
            Ok(())
        })?;
        let Some(to) = found else { return Ok(None) };
        let seeing = self.layers.keys().filter(|path| sees(path)).count();
        let decoder = (seeing > 0 && seeing < self.layers.len()).then(|| {
            #[cfg(feature = "models")] // which enables `tracing`
            tracing::warn!(
                "{seeing} adapted layers belong to the vision part, which is not supported: they are left out"
            );
            let mut decoder = self.clone();
            decoder.layers.retain(|path, _| !sees(path));
            decoder
        });
        let own = self.layers.keys().find_map(|path| decoder_of(path));
        Ok(match own {
            Some(from) if from != to => {
                Some(decoder.as_ref().unwrap_or(self).renamed(DECODERS[from], DECODERS[to]))
            }
            _ => decoder,
        })
    }

    fn renamed(&self, from: &str, to: &str) -> Self {
        // Names begin with `from`; expressions contain it anywhere, with or without an escaped dot.
        let name = |text: &str| match text.strip_prefix(from) {
            Some(rest) => format!("{to}{rest}"),
            None => text.to_string(),
        };
        let escaped = [from, to].map(|text| text.replace('.', r"\."));
        let expression = |text: &str| text.replace(&escaped[0], &escaped[1]).replace(from, to);
        let targets = |targets: &TargetModules| match targets {
            TargetModules::Names(names) => {
                TargetModules::Names(names.iter().map(|text| name(text)).collect())
            }
            TargetModules::Pattern(text) => TargetModules::Pattern(expression(text)),
        };
        let mut file = self.clone();
        file.layers = self.layers.iter().map(|(path, layer)| (name(path), layer.clone())).collect();
        let config = &mut file.config;
        config.target_modules = config.target_modules.as_ref().map(targets);
        config.exclude_modules = config.exclude_modules.as_ref().map(targets);
        config.rank_pattern.iter_mut().for_each(|(pattern, _)| *pattern = expression(pattern));
        config.alpha_pattern.iter_mut().for_each(|(pattern, _)| *pattern = expression(pattern));
        file
    }
}

/// The target modules for these adapted layers, where `others` are not adapted. For a vision-language model
/// this is an expression that matches in the decoder only, under the paths of either version.
pub(super) fn targets<'a>(
    adapted: impl Iterator<Item = &'a String> + Clone,
    others: &[String],
) -> TargetModules {
    let names = shortest(adapted.clone(), others);
    if !adapted.into_iter().any(|path| decoder_of(path).is_some()) {
        return TargetModules::Names(names);
    }
    let names: Vec<String> = names.iter().map(|name| pattern(name).replace('.', r"\.")).collect();
    TargetModules::Pattern(format!(r"(?:.*\.)?language_model\.(?:.*\.)?(?:{})", names.join("|")))
}

/// The shortest exact list of targets: a layer's last segment if all layers with it are adapted, else its
/// whole path. `dense` is never used alone: a Hugging Face model can have such layers (a pooler's) that
/// cannot be adapted here.
fn shortest<'a>(adapted: impl Iterator<Item = &'a String>, others: &[String]) -> Vec<String> {
    let last = |path: &str| path.rsplit('.').next().unwrap_or(path).to_string();
    let left: BTreeSet<String> = others.iter().map(|path| last(path)).chain(["dense".to_string()]).collect();
    let name =
        |path: &String| Some(last(path)).filter(|name| !left.contains(name)).unwrap_or_else(|| path.clone());
    adapted.map(name).collect::<BTreeSet<_>>().into_iter().collect()
}

/// The part of a layer's path to use in patterns: without the path of the decoder, if it starts with one.
pub(super) fn pattern(path: &str) -> &str {
    decoder_of(path).map_or(path, |which| &path[DECODERS[which].len() + 1..])
}

/// Whether a layer belongs to the vision part.
fn sees(path: &str) -> bool {
    let path = path.strip_prefix("model.").unwrap_or(path);
    ["vision_tower.", "multi_modal_projector."].iter().any(|part| path.starts_with(part))
}

/// The index of the entry of [`DECODERS`] with which a layer's path begins.
fn decoder_of(path: &str) -> Option<usize> {
    DECODERS.iter().position(|name| path.strip_prefix(name).is_some_and(|rest| rest.starts_with('.')))
}
