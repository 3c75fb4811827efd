//! Selects the layers that get an adapter: by names, expressions and indices, with PEFT's rules.

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;

use super::patterns::{self, first_values, is_end, matching, Pattern};
use crate::adapter::AdaptableModel;
use crate::error::{Error, Result};
use serde::Serialize;

/// A selection of layers.
// Checkpoints contain the serialised form: names may change in Rust, but not in JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Select {
    /// The model's own choice, [`AdaptableModel::default_targets`].
    ModelDefault,
    /// Every linear layer below the head.
    AllLinear,
    /// Names: the whole path of a layer, or its end after a dot.
    Names(Vec<String>),
    /// A regular expression (look-around allowed) that matches the whole path of a layer.
    Regex(String),
}

impl Select {
    /// Reads `default`, `all-linear`, or names separated by commas.
    ///
    /// # Errors
    /// If a name is empty.
    pub fn parse(text: &str) -> Result<Self> {
        match text.trim() {
            "default" => Ok(Self::ModelDefault),
            "all-linear" => Ok(Self::AllLinear),
            names => {
                let names: Vec<String> = names.split(',').map(|name| name.trim().to_string()).collect();
                if names.iter().any(String::is_empty) {
                    Err(Error::config("targets", format!("{text:?} has an empty name")))
                } else {
                    Ok(Self::Names(names))
                }
            }
        }
    }

    /// Whether the layer at `path` is named by its whole path.
    fn is_exactly(&self, path: &str) -> bool {
        matches!(self, Self::Names(names) if names.iter().any(|name| name == path))
    }

    /// The indices of the selected paths.
    ///
    /// # Errors
    /// [`Error::NoTarget`] if the expression, or any of the names, matches no path.
    fn matches(&self, paths: &[&str], default: &[&str]) -> Result<BTreeSet<usize>> {
        match self {
            Self::AllLinear => Ok((0..paths.len()).collect()),
            Self::ModelDefault if default.is_empty() => Err(no_target("default", paths)),
            Self::ModelDefault => named(default, paths),
            Self::Names(names) => named(names, paths),
            Self::Regex(pattern) => {
                let found = indices(&matching(Pattern::Whole(pattern), paths, "targets")?);
                if found.is_empty() {
                    return Err(no_target(pattern, paths));
                }
                Ok(found)
            }
        }
    }
}

impl FromStr for Select {
    type Err = Error;

    /// As [`Select::parse`].
    fn from_str(text: &str) -> Result<Self> {
        Self::parse(text)
    }
}

/// The indices of the paths that end in one of the names; each name must match a path.
fn named(names: &[impl AsRef<str>], paths: &[&str]) -> Result<BTreeSet<usize>> {
    let mut found = BTreeSet::new();
    for name in names.iter().map(AsRef::as_ref) {
        let own = indices(&paths.iter().map(|path| is_end(name, path)).collect::<Vec<_>>());
        if own.is_empty() {
            return Err(no_target(name, paths));
        }
        found.extend(own);
    }
    Ok(found)
}

fn indices(chosen: &[bool]) -> BTreeSet<usize> {
    (0..chosen.len()).filter(|i| chosen[*i]).collect()
}

/// The error for a target that matches none of the paths.
pub(super) fn no_target(targets: &str, paths: &[impl AsRef<str>]) -> Error {
    Error::NoTarget { targets: targets.to_string(), available: available(paths) }
}

/// The error for a block index that no target has; `there` are the indices of the targets.
fn no_layer(index: usize, there: &BTreeSet<usize>) -> Error {
    let available = match (there.first(), there.last()) {
        (Some(first), Some(last)) if last - first + 1 == there.len() => {
            format!("{} layers with targets, {first} to {last}", there.len())
        }
        (Some(_), _) => {
            let list: Vec<String> = there.iter().map(ToString::to_string).collect();
            format!("{} layers with targets, {}", there.len(), list.join(", "))
        }
        (None, _) => "no numbered layer among the targets".to_string(),
    };
    Error::NoTarget { targets: format!("layer {index} of layers_to_transform"), available }
}

/// The layers that get an adapter, with ranks and alphas.
///
/// # Example
/// ```
/// use monteclora::inject::Targets;
///
/// // The first two blocks' queries and values, the queries at rank 16.
/// let targets = Targets {
///     layers_to_transform: Some(vec![0, 1]),
///     rank_pattern: [("query".to_string(), 16)].into(),
///     ..Targets::parse("query,value")?
/// };
/// # use candle_core::{DType, Device, Tensor};
/// # use monteclora::{linears, AdaptableLinear, AdaptableModel};
/// # struct Toy(Vec<AdaptableLinear>);
/// # impl AdaptableModel for Toy {
/// #     linears!(0);
/// # }
/// # let weight = Tensor::zeros((4, 4), DType::F32, &Device::Cpu)?;
/// # let layer = |path: String| AdaptableLinear::new(path, candle_nn::Linear::new(weight.clone(), None));
/// # let paths = (0..3).flat_map(|i| ["query", "key", "value"].map(|name| format!("layer.{i}.{name}")));
/// # let model = Toy(paths.map(layer).collect());
/// let resolved = targets.resolve(&model, 8, 16.0)?;
/// assert_eq!((resolved.len(), resolved[0].path.as_str(), resolved[0].rank), (4, "layer.0.query", 16));
/// assert!(Targets::parse("qery")?.resolve(&model, 8, 16.0).is_err()); // lists the available names
/// # Ok::<(), monteclora::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Targets {
    /// The layers to adapt.
    pub select: Select,
    /// Layers to exclude.
    pub exclude: Option<Select>,
    /// Restricts the layers to blocks with these indices and to layers named by their whole path; `None` or
    /// empty means all.
    pub layers_to_transform: Option<Vec<usize>>,
    /// The name before a block's index in a path, such as `layer`; any name if absent.
    pub layers_pattern: Option<String>,
    /// Ranks for paths whose end matches the expression. If several match, the first in sorted order counts.
    pub rank_pattern: BTreeMap<String, usize>,
    /// Values of alpha for paths whose end matches the expression; likewise.
    pub alpha_pattern: BTreeMap<String, f64>,
}

impl Default for Targets {
    fn default() -> Self {
        Self {
            select: Select::ModelDefault,
            exclude: None,
            layers_to_transform: None,
            layers_pattern: None,
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
        }
    }
}

impl Targets {
    /// Targets from a comma-separated list; see [`Select::parse`].
    ///
    /// # Errors
    /// As [`Select::parse`].
    pub fn parse(text: &str) -> Result<Self> {
        Ok(Self { select: Select::parse(text)?, ..Self::default() })
    }

    /// Resolves the targets on a model: its layers, with rank and alpha for each. `rank` and `alpha` are
    /// those of layers that no pattern matches.
    ///
    /// # Errors
    /// [`Error::NoTarget`] if a name, expression or layer index matches nothing; [`Error::Config`] for a
    /// malformed expression, or a rank or alpha pattern that matches none of the targets.
    pub fn resolve(&self, model: &dyn AdaptableModel, rank: usize, alpha: f64) -> Result<Vec<TargetLayer>> {
        let paths = paths(model)?;
        let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
        let mut chosen = self.select.matches(&paths, model.default_targets())?;
        if let Some(exclude) = &self.exclude {
            let left_out = exclude.matches(&paths, model.default_targets())?;
            chosen.retain(|i| !left_out.contains(i));
        }
        // None and an empty list mean all, as in PEFT.
        if let Some(layers) = self.layers_to_transform.as_ref().filter(|layers| !layers.is_empty()) {
            let list = self.layers_pattern.as_deref().unwrap_or("[^.]*");
            // As in PEFT, the first number in a path counts: that of a block, not that of an expert within
            // it.
            let index = format!(r"^(?:.*?\.)??(?:{list})\.(?<idx>\d+)\.");
            let blocks = patterns::block_numbers(&[index], &paths, "layers_pattern")?;
            let (mut kept, mut unseen) = (BTreeSet::new(), layers.iter().collect::<BTreeSet<_>>());
            let chosen_blocks: BTreeSet<usize> = chosen.iter().filter_map(|i| blocks[*i]).collect();
            for i in chosen {
                let layer = blocks[i].filter(|layer| layers.contains(layer));
                unseen.retain(|unseen| Some(**unseen) != layer);
                // As in PEFT, a layer named by its whole path needs no index.
                if layer.is_some() || self.select.is_exactly(paths[i]) {
                    kept.insert(i);
                }
            }
            if let Some(layer) = unseen.first() {
                return Err(no_layer(**layer, &chosen_blocks));
            }
            chosen = kept;
        }
        if chosen.is_empty() {
            return Err(no_target(&format!("{self:?}"), &paths));
        }
        let chosen: Vec<&str> = chosen.into_iter().map(|i| paths[i]).collect();
        let ranks = overrides("rank_pattern", &self.rank_pattern, &chosen)?;
        let alphas = overrides("alpha_pattern", &self.alpha_pattern, &chosen)?;
        let targets = chosen.into_iter().zip(ranks).zip(alphas).map(|((path, r), a)| TargetLayer {
            path: path.to_string(),
            rank: r.unwrap_or(rank),
            alpha: a.unwrap_or(alpha),
        });
        Ok(targets.collect())
    }
}

impl FromStr for Targets {
    type Err = Error;

    /// As [`Targets::parse`].
    fn from_str(text: &str) -> Result<Self> {
        Self::parse(text)
    }
}

/// One layer that gets an adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct TargetLayer {
    /// The layer's path.
    pub path: String,
    /// The adapter's rank.
    pub rank: usize,
    /// The adapter's alpha.
    pub alpha: f64,
}

/// The paths of a model's linear layers, in its own order.
///
/// # Errors
/// If the walk fails.
pub fn paths(model: &dyn AdaptableModel) -> Result<Vec<String>> {
    let mut paths = Vec::new();
    model.visit_linears(&mut |layer| {
        paths.push(layer.path().to_string());
        Ok(())
    })?;
    Ok(paths)
}

/// The distinct last segments of the paths and an example path, for an error message.
fn available(paths: &[impl AsRef<str>]) -> String {
    let paths = paths.iter().map(AsRef::as_ref);
    let example = paths.clone().next().map(|path| format!(" (such as {path})")).unwrap_or_default();
    let names: BTreeSet<&str> = paths.map(|path| path.rsplit('.').next().unwrap_or(path)).collect();
    format!("{}{example}", names.into_iter().collect::<Vec<_>>().join(", "))
}

/// For each path, the value of the first pattern that matches its end; each pattern must match a path.
fn overrides<T: Copy>(
    option: &str,
    patterns: &BTreeMap<String, T>,
    paths: &[&str],
) -> Result<Vec<Option<T>>> {
    for pattern in patterns.keys() {
        if !matching(Pattern::End(pattern), paths, option)?.contains(&true) {
            let reason = format!("{pattern:?} matches none of the targets: {}", available(paths));
            return Err(Error::config(option, reason));
        }
    }
    first_values(patterns.iter().map(|(pattern, value)| (pattern.as_str(), *value)), paths, option)
}
