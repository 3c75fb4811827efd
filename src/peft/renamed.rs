//! Models that see images too, of which only the decoder is here: two versions of transformers call its layers differently,
//! and PEFT finds a layer's name in the other part as well.

use std::collections::BTreeSet;

use super::adapter::AdapterFile;
use super::config::TargetModules;
use crate::adapter::AdaptableModel;
use crate::error::Result;

/// Where transformers has the decoder of a model that sees images too (Gemma 3): before 4.52, as checkpoints still have it,
/// and since.
const DECODERS: [&str; 2] = ["language_model.model", "model.language_model"];

impl AdapterFile {
    /// The same adapter for a model that has the decoder alone, perhaps called as the other version has it; none where
    /// there is nothing to change.
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
            #[cfg(feature = "models")] // which brings the crate that tells it
            tracing::warn!(
                "{seeing} adapted layers are of the part that sees images, which is not here: left out"
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
        // Names begin with it; expressions have it anywhere, its dot by itself or not.
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

/// The targets of these adapted layers, where `others` are not adapted. Of a model that sees images, an expression that finds
/// them in the decoder alone, by either version's names.
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

/// The shortest honest list of targets: a layer's last name where all layers of that name are
/// adapted, else its whole path. `dense` never stands alone: a Hugging Face model can have such
/// layers (a pooler's) that cannot be adapted here.
fn shortest<'a>(adapted: impl Iterator<Item = &'a String>, others: &[String]) -> Vec<String> {
    let last = |path: &str| path.rsplit('.').next().unwrap_or(path).to_string();
    let left: BTreeSet<String> = others.iter().map(|path| last(path)).chain(["dense".to_string()]).collect();
    let name =
        |path: &String| Some(last(path)).filter(|name| !left.contains(name)).unwrap_or_else(|| path.clone());
    adapted.map(name).collect::<BTreeSet<_>>().into_iter().collect()
}

/// The end of a layer's path by which patterns find it: that of a decoder within such a model begins after its name.
pub(super) fn pattern(path: &str) -> &str {
    decoder_of(path).map_or(path, |which| &path[DECODERS[which].len() + 1..])
}

/// Whether a layer is of the part that sees.
fn sees(path: &str) -> bool {
    let path = path.strip_prefix("model.").unwrap_or(path);
    ["vision_tower.", "multi_modal_projector."].iter().any(|part| path.starts_with(part))
}

/// Which of the names a layer's path begins with.
fn decoder_of(path: &str) -> Option<usize> {
    DECODERS.iter().position(|name| path.strip_prefix(name).is_some_and(|rest| rest.starts_with('.')))
}
