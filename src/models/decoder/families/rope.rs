//! Rotary settings in `config.json`.
//!
//! transformers 5 stores them in `rope_parameters`, possibly per layer type; older versions in `rope_theta`
//! and `rope_scaling`, whose kind was first called `type`. A file with both must have the same settings in
//! them: transformers takes the old one and loses the base in the new one.

use super::fields::Fields;
use crate::error::{Error, Result};
use crate::models::decoder::positions::{RotaryConfig, RotaryScaling};

/// The layer types that `rope_parameters` may be nested by.
const LAYER_TYPES: [&str; 2] = ["full_attention", "sliding_attention"];

/// Reads the settings that all layers share, for heads of width `head_dim`.
pub(super) fn rotary(fields: &Fields, head_dim: usize) -> Result<RotaryConfig> {
    let scaling = match parameters(fields)? {
        Some(new) => Some(new),
        None => fields.object("rope_scaling")?,
    };
    let theta = fields.or("rope_theta", 10_000.0)?;
    read(fields, scaling, theta, head_dim)
}

/// Reads the settings of layers of one of [`LAYER_TYPES`], whose base older files store in `old_base`.
pub(super) fn rotary_by_type(
    fields: &Fields,
    layer_type: &'static str,
    old_base: &str,
    head_dim: usize,
) -> Result<RotaryConfig> {
    let theta = fields.required(old_base)?;
    let scaling = match parameters(fields)? {
        Some(new) if LAYER_TYPES.iter().any(|name| new.given(name).is_some()) => new.object(layer_type)?,
        Some(flat) => Some(flat).filter(|_| layer_type == LAYER_TYPES[0]),
        None => fields.object("rope_scaling")?.filter(|_| layer_type == LAYER_TYPES[0]),
    };
    read(fields, scaling, theta, head_dim)
}

/// Reads `rope_parameters` and fails if `rope_scaling` disagrees with it, or with its entry for full
/// attention if it is nested by layer type.
fn parameters(fields: &Fields) -> Result<Option<Fields>> {
    let Some(new) = fields.object("rope_parameters")? else { return Ok(None) };
    let Some(old) = fields.object("rope_scaling")? else { return Ok(Some(new)) };
    let full = new.object(LAYER_TYPES[0])?.unwrap_or_else(|| new.clone());
    let theta: Option<f32> = old.optional("rope_theta")?;
    let same_theta = theta.is_none() || theta == full.optional("rope_theta")?;
    if same_theta && scaled(fields, &old)? == scaled(fields, &full)? {
        return Ok(Some(new));
    }
    let reason = "there are rope_parameters as well, with other values: keep one of the two";
    Err(Error::config("rope_scaling", reason))
}

fn read(fields: &Fields, scaling: Option<Fields>, theta: f32, head_dim: usize) -> Result<RotaryConfig> {
    let Some(rope) = scaling else {
        let dim = turning(fields.or("partial_rotary_factor", 1.0)?, head_dim)?;
        return Ok(RotaryConfig { theta, dim, scaling: RotaryScaling::None });
    };
    let share = rope.or("partial_rotary_factor", fields.or("partial_rotary_factor", 1.0)?)?;
    let theta = rope.or("rope_theta", theta)?;
    Ok(RotaryConfig { theta, dim: turning(share, head_dim)?, scaling: scaled(fields, &rope)? })
}

/// The number of rotated elements of a head.
fn turning(share: f64, head_dim: usize) -> Result<usize> {
    if share > 0.0 && share <= 1.0 {
        return Ok((head_dim as f64 * share) as usize);
    }
    Err(Error::config("partial_rotary_factor", format!("expected a number in (0, 1], got {share}")))
}

/// Refuses partial rotary positions, for families without them.
pub(super) fn whole(rotary: RotaryConfig, head_dim: usize) -> Result<RotaryConfig> {
    if rotary.dim == head_dim {
        return Ok(rotary);
    }
    let reason = format!("expected 1, got {}", rotary.dim as f64 / head_dim as f64);
    Err(Error::config("partial_rotary_factor", reason))
}

fn scaled(fields: &Fields, rope: &Fields) -> Result<RotaryScaling> {
    let kind: String = match rope.optional("rope_type")? {
        Some(kind) => kind,
        None => rope.or("type", "default".to_string())?,
    };
    let longest: usize = fields.required("max_position_embeddings")?;
    // A top-level field takes precedence: Phi 3 has it there.
    let original = match fields.optional("original_max_position_embeddings")? {
        Some(original) => original,
        None => rope.or("original_max_position_embeddings", longest)?,
    };
    let factor = || -> Result<f32> {
        rope.optional("factor")?
            .ok_or_else(|| Error::config("rope_scaling", format!("{kind} needs a factor")))
    };
    match kind.as_str() {
        "default" => Ok(RotaryScaling::None),
        "linear" => Ok(RotaryScaling::Linear { factor: factor()? }),
        "llama3" => {
            let field = |name: &str| -> Result<f32> {
                let missing = || Error::config("rope_scaling", format!("llama3 needs a {name}"));
                rope.optional(name)?.ok_or_else(missing)
            };
            Ok(RotaryScaling::Llama3 {
                factor: factor()?,
                low_freq_factor: field("low_freq_factor")?,
                high_freq_factor: field("high_freq_factor")?,
                original,
            })
        }
        // Early files of Phi 3 call LongRoPE "su" or "yarn".
        "yarn" if rope.given("short_factor").is_none() => yarn(rope, factor()?, original),
        "longrope" | "su" | "yarn" => longrope(rope, longest, original),
        other => {
            let reason = format!("expected default, linear, llama3, yarn or longrope, got {other}");
            Err(Error::config("rope_scaling", reason))
        }
    }
}

fn yarn(rope: &Fields, factor: f32, original: usize) -> Result<RotaryScaling> {
    let larger = |scale: f32| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
    let scale = |name: &str| Ok::<_, Error>(rope.optional::<f32>(name)?.filter(|scale| *scale != 0.0));
    let magnitude = match (rope.optional("attention_factor")?, scale("mscale")?, scale("mscale_all_dim")?) {
        (Some(magnitude), ..) => magnitude,
        (None, Some(scale), Some(all)) => larger(scale) / larger(all),
        _ => larger(1.0),
    };
    Ok(RotaryScaling::Yarn {
        factor,
        beta_fast: rope.or("beta_fast", 32.0)?,
        beta_slow: rope.or("beta_slow", 1.0)?,
        original,
        truncate: rope.or("truncate", true)?,
        magnitude,
    })
}

fn longrope(rope: &Fields, longest: usize, original: usize) -> Result<RotaryScaling> {
    let list = |name: &str| -> Result<Vec<f32>> {
        rope.optional(name)?.ok_or_else(|| Error::config("rope_scaling", format!("longrope needs a {name}")))
    };
    let factor = rope.or("factor", longest as f64 / original as f64)?;
    let larger = || if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / (original as f64).ln()).sqrt() };
    let magnitude = rope.optional("attention_factor")?.unwrap_or_else(|| larger() as f32);
    Ok(RotaryScaling::LongRope {
        short: list("short_factor")?,
        long: list("long_factor")?,
        original,
        magnitude,
    })
}
