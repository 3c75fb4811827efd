//! Which layers a configuration names, and each one's rank and scale, by PEFT's own rules.

use fancy_regex::Regex;

use super::config::{OneOrMany, PeftConfig, Targets};
use crate::error::{Error, Result};

impl PeftConfig {
    /// Whether the layer at `path` is adapted. Without `target_modules` every layer may be.
    ///
    /// # Errors
    /// [`Error::Config`] if a pattern is no regular expression.
    pub fn is_target(&self, path: &str) -> Result<bool> {
        if let Some(excluded) = &self.exclude_modules {
            if names(excluded, path, "exclude_modules")? {
                return Ok(false);
            }
        }
        if self.is_saved(path)? {
            return Ok(false);
        }
        let Some(targets) = &self.target_modules else { return Ok(true) };
        if !names(targets, path, "target_modules")? {
            return Ok(false);
        }
        match (&self.layers_to_transform, targets) {
            // A whole path says itself which block it means.
            (_, Targets::Names(names)) if names.iter().any(|name| name == path) => Ok(true),
            (Some(indices), Targets::Names(_)) if !indices.as_slice().is_empty() => {
                let index = self.block_index(path)?;
                Ok(index.is_some_and(|index| indices.as_slice().contains(&index)))
            }
            _ => Ok(true),
        }
    }

    /// The rank of the layer at `path`.
    ///
    /// # Errors
    /// [`Error::Config`] if a pattern is no regular expression.
    pub fn rank_of(&self, path: &str) -> Result<usize> {
        first_match(&self.rank_pattern, path, "rank_pattern").map(|found| found.unwrap_or(self.r))
    }

    /// The alpha of the layer at `path`.
    ///
    /// # Errors
    /// [`Error::Config`] if a pattern is no regular expression.
    pub fn alpha_of(&self, path: &str) -> Result<f64> {
        first_match(&self.alpha_pattern, path, "alpha_pattern").map(|found| found.unwrap_or(self.lora_alpha))
    }

    /// What the product of B and A is multiplied by at `path`: `alpha / r`, or, with
    /// `use_rslora`, `alpha / sqrt(r)`.
    ///
    /// # Errors
    /// [`Error::Config`] if a pattern is no regular expression.
    pub fn scale_of(&self, path: &str) -> Result<f64> {
        let (rank, alpha) = (self.rank_of(path)? as f64, self.alpha_of(path)?);
        Ok(if self.use_rslora { alpha / rank.sqrt() } else { alpha / rank })
    }

    /// Whether the module of this name, or one that holds it, is saved whole.
    pub(super) fn is_saved(&self, name: &str) -> Result<bool> {
        for module in self.modules_to_save.iter().flatten() {
            if matches(&format!(r"(^|.*\.){module}($|\..*)"), name, "modules_to_save")? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The number of the block that `path` lies in.
    fn block_index(&self, path: &str) -> Result<Option<usize>> {
        let lists = self.layers_pattern.as_ref().map_or(&[][..], OneOrMany::as_slice);
        let any = [r".*?\.[^.]*\.(?<idx>\d+)\.".to_string()];
        let named: Vec<String> =
            lists.iter().map(|list| format!(r"(?:^|.*?\.){list}\.(?<idx>\d+)\.")).collect();
        for pattern in if named.is_empty() { &any[..] } else { &named } {
            let regex = compile(&format!("^(?:{pattern})"), "layers_pattern")?;
            let captures =
                regex.captures(path).map_err(|e| Error::config("layers_pattern", e.to_string()))?;
            if let Some(index) = captures.and_then(|c| c.name("idx")?.as_str().parse().ok()) {
                return Ok(Some(index));
            }
        }
        Ok(None)
    }
}

/// Whether `targets` name the layer at `path`.
fn names(targets: &Targets, path: &str, option: &str) -> Result<bool> {
    match targets {
        // PEFT resolves the word to names when it saves; a file that still has it means every
        // linear layer, and the tensors say which those are.
        Targets::Pattern(word) if word == "all-linear" => Ok(true),
        Targets::Pattern(pattern) => matches(&format!("^(?:{pattern})$"), path, option),
        Targets::Names(names) => Ok(names.iter().any(|name| {
            let end = path.strip_suffix(name.as_str());
            end.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        })),
    }
}

/// The value of the first pattern that matches `path` or the end of it.
fn first_match<T: Copy>(patterns: &[(String, T)], path: &str, option: &str) -> Result<Option<T>> {
    for (pattern, value) in patterns {
        if matches(&format!(r"^(?:.*\.)?(?:{pattern})$"), path, option)? {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

fn matches(pattern: &str, path: &str, option: &str) -> Result<bool> {
    compile(pattern, option)?.is_match(path).map_err(|e| Error::config(option, format!("{pattern:?}: {e}")))
}

fn compile(pattern: &str, option: &str) -> Result<Regex> {
    Regex::new(pattern)
        .map_err(|e| Error::config(option, format!("{pattern:?} is no regular expression: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUERY: &str = "roberta.encoder.layer.3.attention.self.query";

    fn config(json: serde_json::Value) -> PeftConfig {
        serde_json::from_value(json).unwrap()
    }

    fn is_target(json: serde_json::Value, path: &str) -> bool {
        config(json).is_target(path).unwrap()
    }

    #[test]
    fn targets_are_ends_of_paths_or_whole_expressions() {
        use serde_json::json;
        assert!(is_target(json!({"target_modules": ["value", "query"]}), QUERY));
        assert!(is_target(json!({"target_modules": ["self.query"]}), QUERY));
        assert!(is_target(json!({"target_modules": [QUERY]}), QUERY));
        assert!(!is_target(json!({"target_modules": ["uery"]}), QUERY));
        assert!(is_target(json!({"target_modules": r".*\.(query|value)"}), QUERY));
        assert!(!is_target(json!({"target_modules": "query"}), QUERY));
        assert!(is_target(json!({"target_modules": r".*(?<!cross)attention\.self\.(?=q)\w+"}), QUERY));
        assert!(is_target(json!({"target_modules": "all-linear"}), QUERY));
        assert!(!is_target(json!({"target_modules": ["query"], "exclude_modules": r".*\.3\..*"}), QUERY));
        assert!(!is_target(
            json!({"target_modules": ["dense"], "modules_to_save": ["classifier"]}),
            "classifier.dense"
        ));
        let error = config(json!({"target_modules": "("})).is_target(QUERY).unwrap_err().to_string();
        assert!(error.contains("target_modules") && error.contains("no regular expression"), "{error}");
    }

    #[test]
    fn blocks_are_chosen_by_their_number() {
        use serde_json::json;
        for (layers, pattern, chosen) in [
            (json!(3), json!(null), true),
            (json!([1, 3]), json!([]), true),
            (json!([1, 2]), json!(null), false),
            (json!([3]), json!("layer"), true),
            (json!([3]), json!(["h", "layers"]), false),
            (json!([3]), json!("(layer|h)"), true),
            (json!([1]), json!("(layer|h)"), false),
            (json!([]), json!(null), true),
        ] {
            let config = json!({"target_modules": ["query"], "layers_to_transform": layers, "layers_pattern": pattern});
            assert_eq!(is_target(config.clone(), QUERY), chosen, "{config}");
        }
        // PEFT 0.21: check_target_module_exists asks no index of a whole path.
        assert!(is_target(json!({"target_modules": [QUERY], "layers_to_transform": [1]}), QUERY));
    }

    #[test]
    fn ranks_and_scales_follow_their_patterns() -> Result<()> {
        // What PEFT 0.21 computes: get_pattern_key, then alpha / r or alpha / sqrt(r).
        let text = r#"{"peft_type": "LORA", "r": 4, "lora_alpha": 6,
            "rank_pattern": {"3.attention.self.query": 9, "query": 16},
            "alpha_pattern": {"^roberta.*query": 12}}"#;
        let mut config = PeftConfig::parse(text, std::path::Path::new("x"))?;
        assert_eq!(
            (config.rank_of(QUERY)?, config.rank_of("a.query")?, config.rank_of("a.value")?),
            (9, 16, 4)
        );
        assert_eq!((config.scale_of(QUERY)?, config.scale_of("a.value")?), (12.0 / 9.0, 1.5));
        assert_eq!(config.scale_of("a.query")?, 6.0 / 16.0);
        config.use_rslora = true;
        assert_eq!((config.scale_of(QUERY)?, config.scale_of("a.value")?), (4.0, 3.0));
        Ok(())
    }
}
