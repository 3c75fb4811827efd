//! Which layers an adapter goes on: names, expressions and indices, by PEFT's rules.

use std::collections::{BTreeMap, BTreeSet};

use fancy_regex::Regex;
use serde::Serialize;

use super::paths;
use crate::adapter::AdaptableModel;
use crate::error::{Error, Result};

/// A way to name layers.
// Checkpoints hold it as it is serialised: a name in Rust may change, one in JSON may not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Select {
    /// The model's own choice, [`AdaptableModel::default_targets`].
    ModelDefault,
    /// Every linear layer below the head.
    AllLinear,
    /// Names: a layer's whole path, or the end of it after a dot.
    Names(Vec<String>),
    /// A regular expression (look-around allowed) that a layer's whole path matches.
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
                match names.iter().any(String::is_empty) {
                    true => Err(Error::config("targets", format!("{text:?} has an empty name"))),
                    false => Ok(Self::Names(names)),
                }
            }
        }
    }

    /// Whether the layer at `path` is named by its whole path.
    fn is_exactly(&self, path: &str) -> bool {
        matches!(self, Self::Names(names) if names.iter().any(|name| name == path))
    }

    /// The layers of `paths` that are named, in their order.
    ///
    /// # Errors
    /// [`Error::NoTarget`] if the expression, or any of the names, matches no path.
    fn matches(&self, paths: &[String], default: &[&str]) -> Result<BTreeSet<usize>> {
        let unmatched =
            |targets: &str| Error::NoTarget { targets: targets.to_string(), available: available(paths) };
        match self {
            Self::AllLinear => Ok((0..paths.len()).collect()),
            Self::ModelDefault => {
                Self::Names(default.iter().map(ToString::to_string).collect()).matches(paths, &[])
            }
            Self::Names(names) => {
                let mut found = BTreeSet::new();
                for name in names {
                    let mut hit = false;
                    for (i, _) in paths.iter().enumerate().filter(|(_, path)| ends_with(path, name)) {
                        found.insert(i);
                        hit = true;
                    }
                    if !hit {
                        return Err(unmatched(name));
                    }
                }
                Ok(found)
            }
            Self::Regex(pattern) => {
                let regex = whole("targets", pattern)?;
                let found: BTreeSet<usize> = matching(&regex, paths)?;
                if found.is_empty() {
                    return Err(unmatched(pattern));
                }
                Ok(found)
            }
        }
    }
}

/// Which layers get an adapter, and of what size.
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
/// # use monteclora::{AdaptableLinear, AdaptableModel, Result};
/// # struct Toy(Vec<AdaptableLinear>);
/// # impl AdaptableModel for Toy {
/// #     fn default_targets(&self) -> &'static [&'static str] {
/// #         &[]
/// #     }
/// #     fn visit_linears(&self, f: &mut dyn FnMut(&AdaptableLinear) -> Result<()>) -> Result<()> {
/// #         self.0.iter().try_for_each(f)
/// #     }
/// #     fn visit_linears_mut(&mut self, f: &mut dyn FnMut(&mut AdaptableLinear) -> Result<()>) -> Result<()> {
/// #         self.0.iter_mut().try_for_each(f)
/// #     }
/// # }
/// # let weight = Tensor::zeros((4, 4), DType::F32, &Device::Cpu)?;
/// # let layer = |path: String| AdaptableLinear::new(path, candle_nn::Linear::new(weight.clone(), None));
/// # let paths = (0..3).flat_map(|i| ["query", "key", "value"].map(|name| format!("layer.{i}.{name}")));
/// # let model = Toy(paths.map(layer).collect());
/// let resolved = targets.resolve(&model, 8, 16.0)?;
/// assert_eq!((resolved.len(), resolved[0].path.as_str(), resolved[0].rank), (4, "layer.0.query", 16));
/// assert!(Targets::parse("qery")?.resolve(&model, 8, 16.0).is_err()); // with the names that there are
/// # Ok::<(), monteclora::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Targets {
    /// The layers.
    pub select: Select,
    /// Layers to leave out again.
    pub exclude: Option<Select>,
    /// Only layers of the stack with these indices, and those that are named by their whole path; all
    /// where absent.
    pub layers_to_transform: Option<Vec<usize>>,
    /// The name before a layer's index, such as `layer`; any where absent.
    pub layers_pattern: Option<String>,
    /// Other ranks for paths whose end matches the expression; of several the first, in the order
    /// of the expressions.
    pub rank_pattern: BTreeMap<String, usize>,
    /// Other values of alpha for paths whose end matches the expression.
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

    /// The layers of a model that these targets name, with rank and alpha for each.
    ///
    /// # Errors
    /// [`Error::NoTarget`] where a name, expression or layer index matches nothing;
    /// [`Error::Config`] for a malformed expression, or a rank or alpha pattern that matches none of
    /// the targets.
    pub fn resolve(&self, model: &dyn AdaptableModel, rank: usize, alpha: f64) -> Result<Vec<Target>> {
        let paths = paths(model)?;
        let mut chosen = self.select.matches(&paths, model.default_targets())?;
        if let Some(exclude) = &self.exclude {
            let left_out = exclude.matches(&paths, model.default_targets())?;
            chosen.retain(|i| !left_out.contains(i));
        }
        // None and an empty list mean all, as in PEFT.
        if let Some(layers) = self.layers_to_transform.as_ref().filter(|layers| !layers.is_empty()) {
            let name = self.layers_pattern.as_deref().unwrap_or("[^.]*");
            // The first number of a path counts, as in PEFT: a block's, not an expert's in it.
            let index = regex("layers_pattern", &format!(r"^(?:.*?\.)??(?:{name})\.(?<idx>\d+)\."))?;
            let (mut kept, mut unseen) = (BTreeSet::new(), layers.iter().collect::<BTreeSet<_>>());
            for i in chosen {
                let layer = layer_index(&index, &paths[i])?.filter(|layer| layers.contains(layer));
                unseen.retain(|unseen| Some(**unseen) != layer);
                // As in PEFT, a whole path says itself which layer it means.
                if layer.is_some() || self.select.is_exactly(&paths[i]) {
                    kept.insert(i);
                }
            }
            if let Some(layer) = unseen.first() {
                let targets = format!("layer {layer} of layers_to_transform");
                return Err(Error::NoTarget { targets, available: available(&paths) });
            }
            chosen = kept;
        }
        if chosen.is_empty() {
            let targets = format!("{self:?}");
            return Err(Error::NoTarget { targets, available: available(&paths) });
        }
        let chosen: Vec<String> = chosen.into_iter().map(|i| paths[i].clone()).collect();
        let ranks = overrides("rank_pattern", &self.rank_pattern, &chosen)?;
        let alphas = overrides("alpha_pattern", &self.alpha_pattern, &chosen)?;
        let targets = chosen.into_iter().zip(ranks).zip(alphas).map(|((path, r), a)| Target {
            path,
            rank: r.unwrap_or(rank),
            alpha: a.unwrap_or(alpha),
        });
        Ok(targets.collect())
    }
}

/// One layer that gets an adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct Target {
    /// The layer's path.
    pub path: String,
    /// The adapter's rank.
    pub rank: usize,
    /// The adapter's alpha.
    pub alpha: f64,
}

/// `name` is the whole path, or its end after a dot.
fn ends_with(path: &str, name: &str) -> bool {
    path.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// The distinct last names of paths, which a target could have been.
pub(super) fn available(paths: &[String]) -> String {
    let names: BTreeSet<&str> = paths.iter().map(|path| path.rsplit('.').next().unwrap_or(path)).collect();
    let names: Vec<&str> = names.into_iter().collect();
    let example = paths.first().map(|path| format!(" (such as {path})")).unwrap_or_default();
    format!("{}{example}", names.join(", "))
}

fn regex(option: &str, pattern: &str) -> Result<Regex> {
    Regex::new(pattern).map_err(|e| Error::config(option, format!("{pattern:?}: {e}")))
}

/// `pattern` against the whole of a text.
fn whole(option: &str, pattern: &str) -> Result<Regex> {
    regex(option, &format!("^(?:{pattern})$"))
}

/// A backtracking expression can give up: that is an error, not "no match".
fn gave_up(pattern: &Regex, error: fancy_regex::Error) -> Error {
    Error::config("pattern", format!("{:?}: {error}", pattern.as_str()))
}

fn matching(regex: &Regex, paths: &[String]) -> Result<BTreeSet<usize>> {
    let mut found = BTreeSet::new();
    for (i, path) in paths.iter().enumerate() {
        if regex.is_match(path).map_err(|e| gave_up(regex, e))? {
            found.insert(i);
        }
    }
    Ok(found)
}

fn layer_index(regex: &Regex, path: &str) -> Result<Option<usize>> {
    let captures = regex.captures(path).map_err(|e| gave_up(regex, e))?;
    Ok(captures.and_then(|c| c.name("idx")).and_then(|index| index.as_str().parse().ok()))
}

/// For each path the value of the first pattern that matches its end.
fn overrides<T: Copy>(
    option: &str,
    patterns: &BTreeMap<String, T>,
    paths: &[String],
) -> Result<Vec<Option<T>>> {
    let mut values = vec![None; paths.len()];
    for (pattern, value) in patterns {
        let found = matching(&regex(option, &format!(r"^(?:.*\.)?(?:{pattern})$"))?, paths)?;
        if found.is_empty() {
            let reason = format!("{pattern:?} matches none of the targets: {}", available(paths));
            return Err(Error::config(option, reason));
        }
        found.into_iter().for_each(|i| {
            values[i].get_or_insert(*value);
        });
    }
    Ok(values)
}
