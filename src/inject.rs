//! Putting adapters on the linear layers of a model: target patterns and injection.
//!
//! Patterns follow Hugging Face PEFT's rules, with one difference: a target that matches nothing
//! is an error that lists the names there are, never a silent no-op.

use std::collections::{BTreeMap, BTreeSet};

use fancy_regex::Regex;

use crate::adapters::{Lora, LoraConfig};
use crate::error::{Error, Result};
use crate::monteclora::{MonteCLoRA, MonteCLoRAConfig};
use crate::named::check_unmerged;
use crate::params::Params;
use crate::slot::{Adapter, Linears, Slot};

/// The most noise that the sample buffers of a model keep by default, as a share of the bytes of
/// its linear layers. Beyond that draws are made anew, which changes no result.
pub const BUFFER_SHARE: f64 = 0.01;

/// The name an adapter has unless it is given one.
pub const DEFAULT_ADAPTER: &str = "default";

/// A way to name layers.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Select {
    /// The model's own choice, [`Linears::default_targets`].
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
                    let before = found.len();
                    let mut hit = false;
                    for (i, _) in paths.iter().enumerate().filter(|(_, path)| ends_with(path, name)) {
                        found.insert(i);
                        hit = true;
                    }
                    if !hit && found.len() == before {
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
#[derive(Debug, Clone, PartialEq)]
pub struct Targets {
    /// The layers.
    pub select: Select,
    /// Layers to leave out again.
    pub exclude: Option<Select>,
    /// Only layers of the stack with these indices; all where absent.
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
    pub fn resolve(&self, model: &dyn Linears, rank: usize, alpha: f64) -> Result<Vec<Target>> {
        let paths = paths(model)?;
        let mut chosen = self.select.matches(&paths, model.default_targets())?;
        if let Some(exclude) = &self.exclude {
            let left_out = exclude.matches(&paths, model.default_targets())?;
            chosen.retain(|i| !left_out.contains(i));
        }
        if let Some(layers) = &self.layers_to_transform {
            let name = self.layers_pattern.as_deref().unwrap_or("[^.]*");
            // The first number of a path counts, as in PEFT: a block's, not an expert's in it.
            let index = regex("layers_pattern", &format!(r"^(?:.*?\.)??(?:{name})\.(\d+)\."))?;
            let (mut kept, mut unseen) = (BTreeSet::new(), layers.iter().collect::<BTreeSet<_>>());
            for i in chosen {
                if let Some(layer) = layer_index(&index, &paths[i])?.filter(|layer| layers.contains(layer)) {
                    unseen.remove(&layer);
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

/// Puts a LoRA adapter named [`DEFAULT_ADAPTER`] on every target; returns the targets.
///
/// # Errors
/// As [`Targets::resolve`], and if rank and layer do not fit. On an error nothing has changed.
pub fn lora(
    model: &mut dyn Linears,
    targets: &Targets,
    config: &LoraConfig,
    params: &Params,
) -> Result<Vec<Target>> {
    lora_named(model, DEFAULT_ADAPTER, targets, config, params)
}

/// [`lora`] under another name: a model holds several adapters, the last of which is active until
/// [`activate`] says otherwise. A task head is trained beside them and shared by all.
///
/// # Errors
/// As [`lora`]; and if a target has an adapter of this name.
pub fn lora_named(
    model: &mut dyn Linears,
    name: &str,
    targets: &Targets,
    config: &LoraConfig,
    params: &Params,
) -> Result<Vec<Target>> {
    let resolved = targets.resolve(model, config.rank, config.alpha)?;
    inject(model, name, &resolved, params, &mut |slot, target| {
        let config = LoraConfig { rank: target.rank, alpha: target.alpha, ..config.clone() };
        Ok(Box::new(Lora::new(params, slot.path(), name, slot.dims()?, &config)?))
    })?;
    Ok(resolved)
}

/// Puts a MonteCLoRA adapter named [`DEFAULT_ADAPTER`] on every target; returns the targets.
///
/// # Errors
/// As [`lora`].
pub fn monteclora(
    model: &mut dyn Linears,
    targets: &Targets,
    config: &MonteCLoRAConfig,
    params: &Params,
) -> Result<Vec<Target>> {
    monteclora_named(model, DEFAULT_ADAPTER, targets, config, params)
}

/// [`monteclora`] under another name, as [`lora_named`].
///
/// # Errors
/// As [`lora_named`].
pub fn monteclora_named(
    model: &mut dyn Linears,
    name: &str,
    targets: &Targets,
    config: &MonteCLoRAConfig,
    params: &Params,
) -> Result<Vec<Target>> {
    let resolved = targets.resolve(model, config.rank, config.alpha)?;
    let share = BUFFER_SHARE * base_bytes(model)? as f64 / resolved.len() as f64;
    let buffer_bytes = config.buffer_bytes.or(Some(share as usize));
    inject(model, name, &resolved, params, &mut |slot, target| {
        let (rank, alpha) = (target.rank, target.alpha);
        let config = MonteCLoRAConfig { rank, alpha, buffer_bytes, ..config.clone() };
        Ok(Box::new(MonteCLoRA::new(params, slot.path(), name, slot.dims()?, &config)?))
    })?;
    Ok(resolved)
}

/// Makes an adapter for one slot.
pub type Make<'a> = dyn FnMut(&Slot, &Target) -> Result<Box<dyn Adapter>> + 'a;

/// Puts an adapter of any method on every target: all of them or, on an error, none, and the
/// parameters that were started are taken back. Other layers let go of an adapter of another name.
///
/// # Errors
/// The first error of `make`; or if a slot has an adapter of this name, or is merged.
pub fn inject(
    model: &mut dyn Linears,
    name: &str,
    targets: &[Target],
    params: &Params,
    make: &mut Make,
) -> Result<()> {
    check_unmerged(model)?;
    let known: BTreeSet<String> = params.all().into_iter().map(|(name, _)| name).collect();
    let mut adapters: BTreeMap<String, Box<dyn Adapter>> = BTreeMap::new();
    let made = model.visit_linears(&mut |slot| {
        let Some(target) = targets.iter().find(|target| target.path == slot.path()) else {
            return Ok(());
        };
        if slot.adapter(name).is_some() {
            let reason = format!("{} has an adapter {name:?} already", slot.path());
            return Err(Error::config("adapter", reason));
        }
        adapters.insert(target.path.clone(), make(slot, target)?);
        Ok(())
    });
    if let Err(error) = made {
        for (name, _) in params.all().iter().filter(|(name, _)| !known.contains(name)) {
            params.remove(name);
        }
        return Err(error);
    }
    model.visit_linears_mut(&mut |slot| match adapters.remove(slot.path()) {
        Some(adapter) => slot.add(name, adapter),
        None if slot.active().is_some_and(|(active, _)| active != name) => slot.activate(None),
        None => Ok(()),
    })
}

/// The bytes of the weights of a model's linear layers.
fn base_bytes(model: &dyn Linears) -> Result<usize> {
    let mut bytes = 0;
    model.visit_linears(&mut |slot| {
        let weight = slot.base().weight();
        bytes += weight.elem_count() * weight.dtype().size_in_bytes();
        Ok(())
    })?;
    Ok(bytes)
}

/// The paths of a model's linear layers, in its own order.
///
/// # Errors
/// If the walk fails.
pub fn paths(model: &dyn Linears) -> Result<Vec<String>> {
    let mut paths = Vec::new();
    model.visit_linears(&mut |slot| {
        paths.push(slot.path().to_string());
        Ok(())
    })?;
    Ok(paths)
}

/// `name` is the whole path, or its end after a dot.
fn ends_with(path: &str, name: &str) -> bool {
    path.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// The distinct last names of paths, which a target could have been.
fn available(paths: &[String]) -> String {
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
    Ok(captures.and_then(|c| c.get(1)).and_then(|index| index.as_str().parse().ok()))
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
