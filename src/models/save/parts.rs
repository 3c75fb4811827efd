//! What the names of a model's tensors begin with, in a checkpoint of the body alone and of the whole.

use crate::adapter::AdaptableModel;
use crate::error::Result;

/// What the names of a model's tensors begin with, each with its dot: the body's first, whose layers are the first, and
/// what a family has beside it.
pub(crate) struct Parts(Vec<String>);

impl Parts {
    /// Those of a model.
    pub fn of(model: &dyn AdaptableModel) -> Result<Self> {
        let mut parts = Vec::new();
        model.visit_linears(&mut |layer| {
            let part =
                layer.path().split_once('.').map_or_else(String::new, |(first, _)| format!("{first}."));
            if !parts.contains(&part) {
                parts.push(part);
            }
            Ok(())
        })?;
        if parts.is_empty() {
            parts.push(String::new());
        }
        Ok(Self(parts))
    }

    /// Whether a tensor of this name lies in one of them.
    pub fn have(&self, name: &str) -> bool {
        self.0.iter().any(|part| name.starts_with(part))
    }

    /// Whether these names are a bare body's, which lack its part.
    pub fn are_bare<'a>(&self, mut names: impl Iterator<Item = &'a str>) -> bool {
        !names.any(|name| name.starts_with(&self.0[0]))
    }

    /// What a bare body's tensor is called in the whole model.
    pub fn whole(&self, name: &str) -> String {
        if self.have(name) {
            name.to_string()
        } else {
            format!("{}{name}", self.0[0])
        }
    }
}
