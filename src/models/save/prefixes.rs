//! The prefixes of tensor names, in checkpoints of the whole model and of the body alone.

use crate::adapter::AdaptableModel;
use crate::error::Result;

/// The prefixes of a model's tensor names, each with its dot. The first is the body's, since a model's first
/// layer belongs to its body; the others are those of the parts that a family has beside the body.
pub(crate) struct TensorPrefixes(Vec<String>);

impl TensorPrefixes {
    /// The prefixes of a model.
    pub fn of(model: &dyn AdaptableModel) -> Result<Self> {
        let mut prefixes = Vec::new();
        model.visit_linears(&mut |layer| {
            let prefix =
                layer.path().split_once('.').map_or_else(String::new, |(first, _)| format!("{first}."));
            if !prefixes.contains(&prefix) {
                prefixes.push(prefix);
            }
            Ok(())
        })?;
        if prefixes.is_empty() {
            prefixes.push(String::new());
        }
        Ok(Self(prefixes))
    }

    /// Whether a tensor name has one of the prefixes.
    pub fn matches(&self, name: &str) -> bool {
        self.0.iter().any(|prefix| name.starts_with(prefix))
    }

    /// Whether these names belong to a checkpoint of the body alone, which lacks the body's prefix.
    pub fn are_bare<'a>(&self, mut names: impl Iterator<Item = &'a str>) -> bool {
        !names.any(|name| name.starts_with(&self.0[0]))
    }

    /// The name in the whole model of a tensor from a checkpoint of the body alone.
    pub fn whole(&self, name: &str) -> String {
        if self.matches(name) {
            name.to_string()
        } else {
            format!("{}{name}", self.0[0])
        }
    }
}
