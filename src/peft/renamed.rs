//! Layers that two versions of transformers call differently.

use super::adapter::AdapterFile;
use super::config::TargetModules;
use crate::adapter::AdaptableModel;
use crate::error::Result;

/// Where transformers has the decoder of a model that sees images too (Gemma 3): before 4.52, as checkpoints still have it,
/// and since.
const DECODERS: [&str; 2] = ["language_model.model", "model.language_model"];

impl AdapterFile {
    /// The same adapter for a model whose decoder is called as the other version has it; none where there is nothing to
    /// rename.
    ///
    /// # Errors
    /// If the walk fails.
    pub(super) fn renamed_for(&self, model: &dyn AdaptableModel) -> Result<Option<Self>> {
        let mut found = None;
        model.visit_linears(&mut |layer| {
            found = found.or(decoder_of(layer.path()));
            Ok(())
        })?;
        let own = self.layers.keys().find_map(|path| decoder_of(path));
        Ok(match (own, found) {
            (Some(from), Some(to)) if from != to => Some(self.renamed(DECODERS[from], DECODERS[to])),
            _ => None,
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

/// Which of the names a layer's path begins with.
fn decoder_of(path: &str) -> Option<usize> {
    DECODERS.iter().position(|name| path.strip_prefix(name).is_some_and(|rest| rest.starts_with('.')))
}
