//! The configuration that all families start from: plain LLaMA, with all other switches off.

use serde_json::{Map, Value};

use super::fields::Fields;
use super::rope;
use crate::error::{Error, Result};
use crate::models::decoder::config::{Activation, DecoderConfig, LayerConfig};
use crate::models::decoder::positions::{Positions, RotaryConfig};

/// The limit on layers, more than any decoder has: memory for each is allocated before any weight is read.
const MAX_LAYERS: usize = 4096;

/// Reads a plain decoder of the family `model_type`.
pub(super) fn plain(fields: &Fields, model_type: &'static str) -> Result<DecoderConfig> {
    let head_dim = head_dim(fields)?;
    with_rotary(fields, model_type, rope::whole(rope::rotary(fields, head_dim)?, head_dim)?)
}

/// The width of a head: `head_dim`, else `hidden_size / num_attention_heads`.
pub(super) fn head_dim(fields: &Fields) -> Result<usize> {
    if let Some(dim) = fields.optional("head_dim")? {
        return Ok(dim);
    }
    let (hidden, heads): (usize, usize) =
        (fields.required("hidden_size")?, fields.required("num_attention_heads")?);
    if !hidden.is_multiple_of(heads.saturating_mul(2)) || heads == 0 {
        let reason = format!("{heads} heads do not divide hidden_size {hidden} into heads of even width");
        return Err(Error::config("num_attention_heads", reason));
    }
    Ok(hidden / heads)
}

/// [`plain`] with rotary settings that were already read.
pub(super) fn with_rotary(
    fields: &Fields,
    model_type: &'static str,
    rotary: RotaryConfig,
) -> Result<DecoderConfig> {
    let layers: usize = fields.required("num_hidden_layers")?;
    if layers > MAX_LAYERS {
        return Err(Error::config(
            "num_hidden_layers",
            format!("expected at most {MAX_LAYERS}, got {layers}"),
        ));
    }
    let num_attention_heads = fields.required("num_attention_heads")?;
    let head_dim = head_dim(fields)?;
    let named = fields.optional::<Map<String, Value>>("id2label")?.as_ref().map(Map::len);
    Ok(DecoderConfig {
        model_type,
        vocab_size: fields.required("vocab_size")?,
        hidden_size: fields.required("hidden_size")?,
        intermediate_size: fields.required("intermediate_size")?,
        num_attention_heads,
        num_key_value_heads: fields.or("num_key_value_heads", num_attention_heads)?,
        head_dim,
        max_position_embeddings: fields.required("max_position_embeddings")?,
        layers: vec![LayerConfig { window: None, positions: Positions::Global }; layers],
        rotary,
        local_rotary: None,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        fused_projections: false,
        post_norms: false,
        norm_offset: false,
        rms_norm_eps: fields.required("rms_norm_eps")?,
        activation: activation(fields, "hidden_act", "silu")?,
        attention_scale: (head_dim as f64).sqrt().recip(),
        attention_cap: None,
        logit_cap: None,
        embedding_scale: None,
        tie_word_embeddings: fields.or("tie_word_embeddings", false)?,
        bos_token_id: fields.ids("bos_token_id")?.first().copied(),
        eos_token_ids: fields.ids("eos_token_id")?,
        pad_token_id: fields.pad_id()?,
        num_labels: match named {
            Some(named) => named,
            None => fields.or("num_labels", 2)?,
        },
        attention_dropout: fields.or("attention_dropout", 0.0)?,
        initializer_range: fields.or("initializer_range", 0.02)?,
    })
}

/// Reads the activation of the feed-forward block from the field `name`.
pub(super) fn activation(fields: &Fields, name: &str, default: &str) -> Result<Activation> {
    match fields.or(name, default.to_string())?.as_str() {
        "silu" => Ok(Activation::Silu),
        "gelu_pytorch_tanh" => Ok(Activation::GeluTanh),
        other => Err(Error::config(name, format!("expected silu or gelu_pytorch_tanh, got {other}"))),
    }
}

/// Sets `window` for the layers that `layer_types` lists as sliding or, without that list, for those selected
/// by `by_default`; the others get none.
pub(super) fn windows(
    fields: &Fields,
    layers: &mut [LayerConfig],
    window: Option<usize>,
    by_default: impl Fn(usize) -> bool,
) -> Result<()> {
    let types = fields.optional::<Vec<String>>("layer_types")?;
    if let Some(types) = types.as_ref().filter(|types| types.len() != layers.len()) {
        let reason = format!("{} types for {} layers", types.len(), layers.len());
        return Err(Error::config("layer_types", reason));
    }
    for (i, layer) in layers.iter_mut().enumerate() {
        let slides = match types.as_ref().map(|types| types[i].as_str()) {
            Some("full_attention") => false,
            Some("sliding_attention") => true,
            Some(other) => {
                let reason = format!("expected full_attention or sliding_attention, got {other}");
                return Err(Error::config("layer_types", reason));
            }
            None => by_default(i),
        };
        if slides && window.is_none() {
            return Err(Error::config(
                "sliding_window",
                format!("it is missing, although layer {i} has sliding attention"),
            ));
        }
        layer.window = window.filter(|_| slides);
    }
    Ok(())
}
