//! Puts the adapters of each method on the targets of a model.

use std::sync::Arc;

use super::injection::{inject, Make, DEFAULT_ADAPTER};
use super::targets::{Select, TargetLayer, Targets};
use crate::adapter::{AdaptableModel, Params};
use crate::adapters::{
    AdaLora, AdaLoraConfig, Blob, BlobConfig, Bottleneck, BottleneckConfig, Dora, Ia3, Lora, LoraConfig,
    LoraFa, Scaled,
};
use crate::error::{Error, Result};
use crate::monteclora::{MonteCLoRA, MonteCLoRAConfig, Released};

/// Default limit of the noise in a model's sample buffers, as a fraction of the bytes of its linear layers.
/// Draws beyond it are recomputed, which does not change any result.
pub const BUFFER_SHARE: f64 = 0.01;

/// The layers that IA3 scales by default: keys, values, and the inner activations of feed-forward blocks. In Phi 3
/// and ModernBERT, which have one layer for queries, keys and values, only the last.
const IA3_TARGETS: &str = r".*\.(?:key|value|(?:k|v|key|value)_proj|[kv]_lin|down_proj|ffn\.lin2|mlp\.Wo|(?<!attention\.)output\.dense)";
/// The layers that bottleneck adapters follow by default: the last ones of attention and feed-forward blocks.
const BOTTLENECK_TARGETS: &str =
    r".*\.(?:output\.dense|o_proj|down_proj|attention\.out_lin|ffn\.lin2|attn\.Wo|mlp\.Wo)";

/// The rank and alpha of methods without a pair B A.
const NO_PAIR: (usize, f64) = (1, 1.0);

/// Puts the adapter that `make` creates on every target; returns the targets.
fn on_each(
    model: &mut dyn AdaptableModel,
    name: &str,
    targets: &Targets,
    (rank, alpha): (usize, f64),
    params: &Params,
    make: &mut Make,
) -> Result<Vec<TargetLayer>> {
    let resolved = targets.resolve(model, rank, alpha)?;
    inject(model, name, &resolved, params, make)?;
    Ok(resolved)
}

/// Checks that no single layer has a rank or alpha of its own, which `method` has no use for.
fn check_no_patterns(targets: &Targets, method: &str) -> Result<()> {
    if targets.rank_pattern.is_empty() && targets.alpha_pattern.is_empty() {
        return Ok(());
    }
    Err(Error::config("rank_pattern", format!("{method} has no rank or alpha of single layers")))
}

/// `targets` with these layers in place of the model's default.
fn or_regex(targets: &Targets, pattern: &str) -> Targets {
    let select = match &targets.select {
        Select::ModelDefault => Select::Regex(pattern.to_string()),
        given => given.clone(),
    };
    Targets { select, ..targets.clone() }
}

/// Puts a LoRA adapter named [`DEFAULT_ADAPTER`] on every target; returns the targets.
///
/// # Errors
/// As [`Targets::resolve`], and if rank and layer do not fit. On an error nothing has changed.
pub fn lora(
    model: &mut dyn AdaptableModel,
    targets: &Targets,
    config: &LoraConfig,
    params: &Params,
) -> Result<Vec<TargetLayer>> {
    lora_named(model, DEFAULT_ADAPTER, targets, config, params)
}

/// [`lora`] under another name. A model can have several adapters; the last one added is active and trained
/// until [`crate::inject::activate::activate`] selects another. A task head is trained with them and shared
/// by all.
///
/// # Errors
/// As [`lora`], and if a target has an adapter of this name.
pub fn lora_named(
    model: &mut dyn AdaptableModel,
    name: &str,
    targets: &Targets,
    config: &LoraConfig,
    params: &Params,
) -> Result<Vec<TargetLayer>> {
    on_each(model, name, targets, (config.rank, config.alpha), params, &mut |layer, target, params| {
        let config = LoraConfig { rank: target.rank, alpha: target.alpha, ..config.clone() };
        Ok(Box::new(Lora::new(params, layer.path(), name, layer.dims()?, &config)?))
    })
}

/// Puts a LoRA-FA adapter named [`DEFAULT_ADAPTER`], whose A is frozen, on every target; returns the targets.
///
/// # Errors
/// As [`lora`], and if the configuration has a prior.
pub fn lora_fa(
    model: &mut dyn AdaptableModel,
    targets: &Targets,
    config: &LoraConfig,
    params: &Params,
) -> Result<Vec<TargetLayer>> {
    if config.prior.is_some() {
        return Err(Error::config("prior", "LoRA-FA does not support a prior"));
    }
    let (name, pair) = (DEFAULT_ADAPTER, (config.rank, config.alpha));
    on_each(model, name, targets, pair, params, &mut |layer, target, params| {
        let config = LoraConfig { rank: target.rank, alpha: target.alpha, ..config.clone() };
        Ok(Box::new(LoraFa::new(params, layer.path(), name, layer.dims()?, &config)?))
    })
}

/// Puts the adapter of the authors' released code, named [`DEFAULT_ADAPTER`], on every target; returns the
/// targets. Its A is frozen: the optimiser does not change it, [`ReleasedWalk`](crate::ReleasedWalk) does.
///
/// # Errors
/// As [`lora`].
pub fn monteclora_released(
    model: &mut dyn AdaptableModel,
    targets: &Targets,
    config: &MonteCLoRAConfig,
    params: &Params,
) -> Result<Vec<TargetLayer>> {
    let (name, pair) = (DEFAULT_ADAPTER, (config.rank, config.alpha));
    on_each(model, name, targets, pair, params, &mut |layer, target, params| {
        let config = MonteCLoRAConfig { rank: target.rank, alpha: target.alpha, ..config.clone() };
        Ok(Box::new(Released::new(params, layer.path(), name, layer.dims()?, &config)?))
    })
}

/// Puts a MonteCLoRA adapter named [`DEFAULT_ADAPTER`] on every target; returns the targets.
///
/// # Errors
/// As [`lora`].
pub fn monteclora(
    model: &mut dyn AdaptableModel,
    targets: &Targets,
    config: &MonteCLoRAConfig,
    params: &Params,
) -> Result<Vec<TargetLayer>> {
    monteclora_named(model, DEFAULT_ADAPTER, targets, config, params)
}

/// [`monteclora`] under another name, as [`lora_named`].
///
/// # Errors
/// As [`lora_named`].
pub fn monteclora_named(
    model: &mut dyn AdaptableModel,
    name: &str,
    targets: &Targets,
    config: &MonteCLoRAConfig,
    params: &Params,
) -> Result<Vec<TargetLayer>> {
    let resolved = targets.resolve(model, config.rank, config.alpha)?;
    let (config, group) = (with_share(model, config, resolved.len())?, Arc::default());
    inject(model, name, &resolved, params, &mut |layer, target, params| {
        let config = MonteCLoRAConfig { rank: target.rank, alpha: target.alpha, ..config.clone() };
        Ok(Box::new(MonteCLoRA::in_group(&group, params, layer.path(), name, layer.dims()?, &config)?))
    })?;
    Ok(resolved)
}

/// `config` with an equal share of [`BUFFER_SHARE`] as each layer's buffer limit, unless it sets a limit.
pub(crate) fn with_share(
    model: &dyn AdaptableModel,
    config: &MonteCLoRAConfig,
    layers: usize,
) -> Result<MonteCLoRAConfig> {
    let share = BUFFER_SHARE * base_bytes(model)? as f64 / layers as f64;
    Ok(MonteCLoRAConfig { buffer_bytes: config.buffer_bytes.or(Some(share as usize)), ..config.clone() })
}

/// Puts a DoRA adapter named [`DEFAULT_ADAPTER`] on every target; returns the targets.
///
/// # Errors
/// As [`lora`], and if the configuration has a prior.
pub fn dora(
    model: &mut dyn AdaptableModel,
    targets: &Targets,
    config: &LoraConfig,
    params: &Params,
) -> Result<Vec<TargetLayer>> {
    if config.prior.is_some() {
        let reason = "DoRA does not support a prior: the magnitude is not in B A";
        return Err(Error::config("prior", reason));
    }
    let (name, pair) = (DEFAULT_ADAPTER, (config.rank, config.alpha));
    on_each(model, name, targets, pair, params, &mut |layer, target, params| {
        let config = LoraConfig { rank: target.rank, alpha: target.alpha, ..config.clone() };
        Ok(Box::new(Dora::new(params, layer.path(), name, layer.base(), &config)?))
    })
}

/// Puts an AdaLoRA adapter named [`DEFAULT_ADAPTER`] on every target; returns the targets.
///
/// # Errors
/// As [`lora`], and if single layers have a rank or alpha of their own.
pub fn adalora(
    model: &mut dyn AdaptableModel,
    targets: &Targets,
    config: &AdaLoraConfig,
    params: &Params,
) -> Result<Vec<TargetLayer>> {
    check_no_patterns(targets, "adalora")?;
    let (name, pair) = (DEFAULT_ADAPTER, (config.init_rank, config.alpha));
    on_each(model, name, targets, pair, params, &mut |layer, _, params| {
        Ok(Box::new(AdaLora::new(params, layer.path(), name, layer.dims()?, config)?))
    })
}

/// Puts a BLoB adapter named [`DEFAULT_ADAPTER`] on every target; returns the targets.
///
/// # Errors
/// As [`lora`].
pub fn blob(
    model: &mut dyn AdaptableModel,
    targets: &Targets,
    config: &BlobConfig,
    params: &Params,
) -> Result<Vec<TargetLayer>> {
    let (name, pair) = (DEFAULT_ADAPTER, (config.rank, config.alpha));
    on_each(model, name, targets, pair, params, &mut |layer, target, params| {
        let config = BlobConfig { rank: target.rank, alpha: target.alpha, ..config.clone() };
        Ok(Box::new(Blob::new(params, layer.path(), name, layer.dims()?, &config)?))
    })
}

/// Puts a bottleneck adapter named [`DEFAULT_ADAPTER`] behind every target, by default the last layers of
/// attention and feed-forward blocks; returns the targets.
///
/// # Errors
/// As [`lora`], and if single layers have a rank or alpha of their own.
pub fn bottleneck(
    model: &mut dyn AdaptableModel,
    targets: &Targets,
    config: &BottleneckConfig,
    params: &Params,
) -> Result<Vec<TargetLayer>> {
    check_no_patterns(targets, "bottleneck")?;
    let (name, targets) = (DEFAULT_ADAPTER, &or_regex(targets, BOTTLENECK_TARGETS));
    on_each(model, name, targets, NO_PAIR, params, &mut |layer, _, params| {
        Ok(Box::new(Bottleneck::new(params, layer.path(), name, layer.dims()?, config)?))
    })
}

/// Puts an IA3 adapter named [`DEFAULT_ADAPTER`] on every target, by default keys, values and the inner activations
/// of feed-forward blocks; returns the targets.
///
/// # Errors
/// As [`lora`], and if single layers have a rank or alpha of their own.
pub fn ia3(model: &mut dyn AdaptableModel, targets: &Targets, params: &Params) -> Result<Vec<TargetLayer>> {
    check_no_patterns(targets, "ia3")?;
    let (name, targets) = (DEFAULT_ADAPTER, &or_regex(targets, IA3_TARGETS));
    on_each(model, name, targets, NO_PAIR, params, &mut |layer, _, params| {
        let scaled = if closes_feed_forward(layer.path()) { Scaled::Input } else { Scaled::Output };
        Ok(Box::new(Ia3::new(params, layer.path(), name, layer.dims()?, scaled)?))
    })
}

/// Whether a layer is the second one of a feed-forward block, by its name in BERT, LLaMA, DistilBERT and
/// ModernBERT. Its input is the block's inner activation.
fn closes_feed_forward(path: &str) -> bool {
    [".down_proj", ".ffn.lin2", ".mlp.Wo"].iter().any(|name| path.ends_with(name))
        || (path.ends_with(".output.dense") && !path.ends_with(".attention.output.dense"))
}

/// The size in bytes of the weights of a model's linear layers.
fn base_bytes(model: &dyn AdaptableModel) -> Result<usize> {
    let mut bytes = 0;
    model.visit_linears(&mut |layer| {
        bytes += layer.base().bytes();
        Ok(())
    })?;
    Ok(bytes)
}
