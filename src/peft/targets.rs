//! Resolves the layers that a configuration names, and their ranks and scales, by PEFT's own rules.

use std::collections::HashSet;

use super::config::{OneOrMany, PeftConfig, TargetModules};
use super::task_type::TaskType;
use crate::adapter::low_rank;
use crate::error::Result;
use crate::inject::patterns::{block_numbers, ends, first_values, is_end, matching, Pattern};

impl PeftConfig {
    /// Whether the layers at these paths are adapted. Without `target_modules`, every layer may be. Each
    /// pattern is compiled once for all paths.
    pub(super) fn are_targets(&self, paths: &[&str]) -> Result<Vec<bool>> {
        let mut chosen = match &self.target_modules {
            Some(targets) => names(targets, paths, "target_modules")?,
            None => vec![true; paths.len()],
        };
        let excluded = self.exclude_modules.as_ref().map(|out| names(out, paths, "exclude_modules"));
        for left_out in [excluded.transpose()?, Some(self.are_saved(paths)?)].into_iter().flatten() {
            chosen.iter_mut().zip(left_out).for_each(|(chosen, out)| *chosen &= !out);
        }
        let indices = self.layers_to_transform.as_ref().map_or(&[][..], OneOrMany::as_slice);
        let Some(TargetModules::Names(named)) = &self.target_modules else { return Ok(chosen) };
        if indices.is_empty() {
            return Ok(chosen);
        }
        // A layer named by its whole path needs no block index.
        let whole: HashSet<&str> = named.iter().map(String::as_str).collect();
        let blocks = self.block_indices(paths)?;
        for ((chosen, path), block) in chosen.iter_mut().zip(paths).zip(blocks) {
            *chosen &= whole.contains(path) || block.is_some_and(|block| indices.contains(&block));
        }
        Ok(chosen)
    }

    /// The ranks of the layers at these paths.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) if a pattern is not a valid regular expression.
    pub fn ranks_of(&self, paths: &[&str]) -> Result<Vec<usize>> {
        values_of(&self.rank_pattern, paths, self.r, "rank_pattern")
    }

    /// The alphas of the layers at these paths.
    pub(super) fn alphas_of(&self, paths: &[&str]) -> Result<Vec<f64>> {
        values_of(&self.alpha_pattern, paths, self.lora_alpha, "alpha_pattern")
    }

    /// The scales of the layers at these paths: `alpha / r` or, with `use_rslora`, `alpha / sqrt(r)`.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) if a pattern is not a valid regular expression.
    pub fn scales_of(&self, paths: &[&str]) -> Result<Vec<f64>> {
        let scale = |(rank, alpha)| low_rank::scaling(rank, alpha, self.use_rslora);
        Ok(self.ranks_of(paths)?.into_iter().zip(self.alphas_of(paths)?).map(scale).collect())
    }

    /// Describes settings that match none of these layers and modules, one sentence each. PEFT also warns
    /// about patterns that match nothing.
    pub(super) fn without_effect(&self, paths: &[&str], modules: &[&str]) -> Result<Vec<String>> {
        let mut told = Vec::new();
        let ranks = self.rank_pattern.iter().map(|(pattern, _)| ("rank_pattern", pattern));
        let alphas = self.alpha_pattern.iter().map(|(pattern, _)| ("alpha_pattern", pattern));
        for (option, pattern) in ranks.chain(alphas) {
            if !matching(Pattern::End(pattern), paths, option)?.contains(&true) {
                told.push(format!("{option}: {pattern:?} matches no layer of the adapter and has no effect"));
            }
        }
        if let Some(TargetModules::Names(targets)) = &self.target_modules {
            for name in targets.iter().filter(|name| !paths.iter().any(|path| is_end(name, path))) {
                told.push(format!("target_modules: {name:?} matches no layer of the adapter"));
            }
        }
        // PEFT lists both names that a classifier can have, and a model has one of them.
        let listed = self.modules_to_save.iter().flatten();
        for pattern in listed.filter(|name| !HEADS.contains(&name.as_str())) {
            if !saves(pattern, modules)?.contains(&true) {
                told.push(format!("modules_to_save: the adapter has no tensor of {pattern:?}"));
            }
        }
        Ok(told)
    }

    /// Whether these modules, or modules that contain them, are saved whole. The head of a classifier is,
    /// listed or not: before PEFT 0.11 (peft#1615) the configuration did not list it.
    pub(super) fn are_saved(&self, modules: &[&str]) -> Result<Vec<bool>> {
        let mut saved = vec![false; modules.len()];
        let is_classifier = self.task() == Some(TaskType::SequenceClassification);
        let heads = HEADS.iter().copied().filter(|_| is_classifier);
        for pattern in self.modules_to_save.iter().flatten().map(String::as_str).chain(heads) {
            let found = saves(pattern, modules)?;
            saved.iter_mut().zip(found).for_each(|(saved, found)| *saved |= found);
        }
        Ok(saved)
    }

    /// The block numbers of the paths.
    fn block_indices(&self, paths: &[&str]) -> Result<Vec<Option<usize>>> {
        let lists = match &self.layers_pattern {
            Some(OneOrMany::One(list)) if list.is_empty() => &[][..], // any name, as in PEFT
            lists => lists.as_ref().map_or(&[][..], OneOrMany::as_slice),
        };
        let mut expressions: Vec<String> =
            lists.iter().map(|list| format!(r"^(?:(?:^|.*?\.){list}\.(?<idx>\d+)\.)")).collect();
        if expressions.is_empty() {
            expressions.push(r"^(?:.*?\.[^.]*\.(?<idx>\d+)\.)".to_string());
        }
        block_numbers(&expressions, paths, "layers_pattern")
    }
}

/// The names that PEFT saves for a classifier's head.
const HEADS: [&str; 2] = ["classifier", "score"];

/// Which modules an entry of `modules_to_save` saves. PEFT takes every module whose name ends in its text,
/// even within a word: `classifier` also matches DistilBERT's `pre_classifier`. Submodules of these modules
/// are saved as well.
fn saves(entry: &str, modules: &[&str]) -> Result<Vec<bool>> {
    let within = matching(Pattern::Within(entry), modules, "modules_to_save")?;
    let holders = |module: &str| {
        let mut holders = vec![module.len()];
        holders.extend(module.match_indices('.').map(|(dot, _)| dot));
        holders.into_iter().any(|end| module[..end].ends_with(entry))
    };
    Ok(modules.iter().zip(within).map(|(module, within)| within || holders(module)).collect())
}

/// Whether `targets` name each of the layers at `paths`.
fn names(targets: &TargetModules, paths: &[&str], option: &str) -> Result<Vec<bool>> {
    match targets {
        // PEFT resolves the word to names when it saves. A file that still has it means every linear layer,
        // and its tensors tell which those are.
        TargetModules::Pattern(word) if word == "all-linear" => Ok(vec![true; paths.len()]),
        TargetModules::Pattern(pattern) => matching(Pattern::Whole(pattern), paths, option),
        TargetModules::Names(names) => {
            let names: HashSet<&str> = names.iter().map(String::as_str).collect();
            Ok(paths.iter().map(|path| ends(path).any(|end| names.contains(end))).collect())
        }
    }
}

/// For each path, the value of the first pattern, in the file's order, that matches its end.
fn values_of<T: Copy>(patterns: &[(String, T)], paths: &[&str], default: T, option: &str) -> Result<Vec<T>> {
    let patterns = patterns.iter().map(|(pattern, value)| (pattern.as_str(), *value));
    let values = first_values(patterns, paths, option)?;
    Ok(values.into_iter().map(|value| value.unwrap_or(default)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUERY: &str = "roberta.encoder.layer.3.attention.self.query";

    fn config(json: serde_json::Value) -> PeftConfig {
        serde_json::from_value(json).unwrap()
    }

    fn is_target(json: serde_json::Value, path: &str) -> bool {
        config(json).are_targets(&[path]).unwrap()[0]
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
        let error = config(json!({"target_modules": "("})).are_targets(&[QUERY]).unwrap_err().to_string();
        assert!(error.contains("target_modules") && error.contains("no regular expression"), "{error}");
    }

    #[test]
    fn modules_are_saved_whose_names_end_in_an_entry() -> Result<()> {
        let modules =
            ["pre_classifier", "classifier.dense", "classifier", "model.score", "classifiers", "pooler"];
        let default = config(serde_json::json!({"modules_to_save": ["classifier", "score"]}));
        // What PEFT saves for DistilBERT, RoBERTa, BERT and a decoder.
        assert_eq!(default.are_saved(&modules)?, [true, true, true, true, false, false]);
        Ok(())
    }

    #[test]
    fn blocks_are_chosen_by_their_number() {
        use serde_json::json;
        for (layers, pattern, chosen) in [
            (json!(3), json!(null), true),
            (json!([1, 3]), json!([]), true),
            (json!([3]), json!(""), true),
            (json!([3]), json!([""]), false),
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
        // PEFT 0.21: check_target_module_exists requires no index if the whole path is named.
        assert!(is_target(json!({"target_modules": [QUERY], "layers_to_transform": [1]}), QUERY));
    }

    #[test]
    fn ranks_and_scales_follow_their_patterns() -> Result<()> {
        // What PEFT 0.21 computes: get_pattern_key, then alpha / r or alpha / sqrt(r).
        let text = r#"{"peft_type": "LORA", "r": 4, "lora_alpha": 6,
            "rank_pattern": {"3.attention.self.query": 9, "query": 16},
            "alpha_pattern": {"^roberta.*query": 12}}"#;
        let mut config = PeftConfig::parse(text, std::path::Path::new("x"))?;
        assert_eq!(config.ranks_of(&[QUERY, "a.query", "a.value"])?, [9, 16, 4]);
        assert_eq!(config.scales_of(&[QUERY, "a.query", "a.value"])?, [12.0 / 9.0, 6.0 / 16.0, 1.5]);
        assert_eq!(config.ranks_of(&["a.value", QUERY, "b.value", "query"])?, [4, 9, 4, 16]);
        config.use_rslora = true;
        assert_eq!(config.scales_of(&[QUERY, "a.value"])?, [4.0, 3.0]);
        Ok(())
    }

    /// Compiling the patterns again for each layer took minutes, and keeping a compiled pattern for each of
    /// them would take gigabytes.
    #[test]
    fn patterns_by_the_ten_thousand_are_read_in_no_time() -> Result<()> {
        let paths: Vec<String> = (0..2_000).map(|i| format!("model.layers.{i}.self_attn.q_proj")).collect();
        let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
        let named = (0..10_000).rev().map(|i| (format!("layers.{i}.self_attn.q_proj"), i + 1)).collect();
        let config = PeftConfig { rank_pattern: named, ..PeftConfig::default() };
        let clock = std::time::Instant::now();
        let ranks = config.ranks_of(&paths)?;
        assert!(clock.elapsed().as_secs_f64() < 5.0, "{:?}", clock.elapsed());
        assert!(ranks.iter().enumerate().all(|(i, rank)| *rank == i + 1));

        let general =
            (0..300).map(|i| (format!(r".*\.{i}\.(self|cross)_attn.*"), f64::from(i + 1))).collect();
        let mut config = PeftConfig { alpha_pattern: general, ..PeftConfig::default() };
        let clock = std::time::Instant::now();
        let alphas = config.alphas_of(&paths)?;
        assert!(clock.elapsed().as_secs_f64() < 5.0, "{:?}", clock.elapsed());
        assert_eq!((alphas[7], alphas[299], alphas[300]), (8.0, 300.0, config.lora_alpha));
        assert_eq!(config.check(), Ok(()));
        config.modules_to_save = Some((0..701).map(|i| format!("(a|b){i}")).collect());
        let reason = config.check().unwrap_err();
        assert!(reason.contains("at most 1000") && reason.contains("got 1001"), "{reason}");
        Ok(())
    }
}
