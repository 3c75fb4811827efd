//! The GGUF architectures that this crate reads and writes: their names and tensor names in Hugging Face, and
//! the changes that llama.cpp's converter makes to weights.

/// A GGUF architecture: its names, and what llama.cpp assumes of its models instead of reading it from files.
#[derive(Debug)]
pub(super) struct Architecture {
    /// GGUF's name.
    pub name: &'static str,
    /// Hugging Face's `model_type`.
    pub model_type: &'static str,
    /// The `model_type` of its models with a sliding window, if that is another.
    pub windowed_as: Option<&'static str>,
    /// The `general.name` of models with a vocabulary below 100 000 ids. Only under this name does llama.cpp
    /// strip the spaces after special tokens, as is right for Phi 3. Phi 4 has the same model type but a
    /// larger vocabulary, and its special tokens do not strip.
    pub small_name: Option<&'static str>,
    /// Whether the rows of q and k are permuted so that the two elements of a rotated pair are adjacent.
    pub interleaved: bool,
    /// Whether norm weights are stored as Hugging Face's plus 1.
    pub norm_plus_one: bool,
    /// Whether the feed-forward block has GELU, approximated by tanh, instead of SiLU.
    pub gelu: bool,
    /// Whether `config.json` says which projections have biases; else the architecture does.
    pub has_bias_fields: bool,
    /// Whether llama.cpp reads biases other than those of q, k and v.
    pub other_biases: bool,
    /// Whether llama.cpp applies both soft caps to every model: a cap of 0 would be a division by 0.
    pub always_capped: bool,
    /// Whether a file may have one factor per rotary frequency (`rope_freqs`), as of Llama 3's rule.
    pub rope_factors: bool,
    /// Whether a file may have LongRoPE's factors, and the length that the model was first trained on.
    pub long_rope: bool,
    /// Whether every fourth layer has no rotary positions.
    pub fourth_unrotated: bool,
    /// The layers with a sliding window; `None` if llama.cpp gives no layer one.
    pub windows: Option<Windows>,
    /// Whether a file has `attention.sliding_window`, 0 for none, although llama.cpp gives no layer a window.
    pub has_unused_window: bool,
    /// The number of layers of the family's largest model, whose attention scale does not follow from the
    /// width of a head; `None` if that scale always does.
    pub wide_scale_layers: Option<usize>,
    /// The tensors of a block.
    blocks: &'static [Names],
}

/// The sliding windows of an architecture.
#[derive(Debug)]
pub(super) struct Windows {
    /// One layer in so many has no window.
    pub full_every: usize,
    /// The window of a file that gives none; without it, no layer of such a file has one.
    pub default: Option<usize>,
}

/// Pairs of GGUF's and Hugging Face's names.
type Names = &'static [(&'static str, &'static str)];

const ATTENTION: Names = &[
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
];
const HEAD_NORMS: Names = &[("attn_q_norm", "self_attn.q_norm"), ("attn_k_norm", "self_attn.k_norm")];
const FEED_FORWARD: Names =
    &[("ffn_gate", "mlp.gate_proj"), ("ffn_up", "mlp.up_proj"), ("ffn_down", "mlp.down_proj")];
const PRE_NORM: Names = &[("ffn_norm", "post_attention_layernorm")];
const FUSED: Names = &[
    ("attn_norm", "input_layernorm"),
    ("attn_qkv", "self_attn.qkv_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_up", "mlp.gate_up_proj"),
    ("ffn_down", "mlp.down_proj"),
];
const AROUND: Names = &[
    ("post_attention_norm", "post_attention_layernorm"),
    ("ffn_norm", "pre_feedforward_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
];
/// The tensors outside the blocks.
const OUTSIDE: Names =
    &[("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];

/// What the architectures below differ from.
const PLAIN: Architecture = Architecture {
    name: "",
    model_type: "",
    windowed_as: None,
    small_name: None,
    interleaved: false,
    norm_plus_one: false,
    gelu: false,
    has_bias_fields: false,
    other_biases: false,
    always_capped: false,
    rope_factors: false,
    long_rope: false,
    fourth_unrotated: false,
    windows: None,
    has_unused_window: false,
    wide_scale_layers: None,
    blocks: &[ATTENTION, PRE_NORM, FEED_FORWARD],
};

/// The supported architectures. Mistral and SmolLM2 are `llama`.
const ALL: [Architecture; 7] = [
    Architecture {
        name: "llama",
        model_type: "llama",
        windowed_as: Some("mistral"),
        interleaved: true,
        has_bias_fields: true,
        other_biases: true,
        rope_factors: true,
        ..PLAIN
    },
    Architecture {
        name: "smollm3",
        model_type: "smollm3",
        interleaved: true,
        has_bias_fields: true,
        rope_factors: true,
        fourth_unrotated: true,
        ..PLAIN
    },
    Architecture { name: "qwen2", model_type: "qwen2", ..PLAIN },
    Architecture {
        name: "qwen3",
        model_type: "qwen3",
        blocks: &[ATTENTION, HEAD_NORMS, PRE_NORM, FEED_FORWARD],
        ..PLAIN
    },
    Architecture {
        name: "phi3",
        model_type: "phi3",
        small_name: Some("phi-3"),
        long_rope: true,
        has_unused_window: true,
        blocks: &[FUSED, PRE_NORM],
        ..PLAIN
    },
    Architecture {
        name: "gemma2",
        model_type: "gemma2",
        norm_plus_one: true,
        gelu: true,
        always_capped: true,
        windows: Some(Windows { full_every: 2, default: Some(4096) }),
        wide_scale_layers: Some(46),
        blocks: &[ATTENTION, AROUND, FEED_FORWARD],
        ..PLAIN
    },
    Architecture {
        name: "gemma3",
        model_type: "gemma3_text",
        norm_plus_one: true,
        gelu: true,
        windows: Some(Windows { full_every: 6, default: None }),
        wide_scale_layers: Some(62),
        blocks: &[ATTENTION, HEAD_NORMS, AROUND, FEED_FORWARD],
        ..PLAIN
    },
];

impl Architecture {
    /// Finds the architecture that GGUF calls `name`; the error lists the supported ones.
    pub fn named(name: &str) -> Result<&'static Self, String> {
        ALL.iter().find(|one| one.name == name).ok_or_else(|| {
            let names: Vec<&str> = ALL.iter().map(|one| one.name).collect();
            format!("general.architecture: expected one of {}, got {name}", names.join(", "))
        })
    }

    /// Finds the architecture of Hugging Face's `model_type`; the error lists the supported ones.
    pub fn of_model_type(model_type: &str) -> Result<&'static Self, String> {
        // Its tensors have other names, and its image encoder has no place in these files.
        if model_type == "gemma3" {
            return Err(
                "GGUF is for text-only checkpoints (gemma3_text), got gemma3, which has a vision part".into(),
            );
        }
        let is = |one: &&Self| one.model_type == model_type || one.windowed_as == Some(model_type);
        ALL.iter().find(is).ok_or_else(|| {
            let types: Vec<&str> = ALL.iter().map(|one| one.model_type).collect();
            format!("GGUF is for decoders: expected mistral or one of {}, got {model_type}", types.join(", "))
        })
    }

    /// GGUF's name of the tensor or layer that Hugging Face calls `name`, if it has one.
    pub fn to_gguf(&self, name: &str) -> Option<String> {
        let (module, end) = parted(name);
        let of_attention = ["q_proj", "k_proj", "v_proj"].iter().any(|layer| module.ends_with(layer));
        if end == ".bias" && !of_attention && !self.other_biases {
            return None;
        }
        if let Some(rest) = module.strip_prefix("model.layers.") {
            let (block, module) = rest.split_once('.')?;
            let (name, _) = self.blocks().find(|(_, theirs)| *theirs == module)?;
            return Some(format!("blk.{}.{name}{end}", block.parse::<u32>().ok()?));
        }
        OUTSIDE.iter().find(|(_, theirs)| *theirs == module).map(|(name, _)| format!("{name}{end}"))
    }

    /// Hugging Face's name of the tensor that GGUF calls `name`, if it has one.
    pub fn to_hugging_face(&self, name: &str) -> Option<String> {
        let (module, end) = parted(name);
        if let Some(rest) = module.strip_prefix("blk.") {
            let (block, module) = rest.split_once('.')?;
            let (_, theirs) = self.blocks().find(|(ours, _)| *ours == module)?;
            return Some(format!("model.layers.{}.{theirs}{end}", block.parse::<u32>().ok()?));
        }
        OUTSIDE.iter().find(|(ours, _)| *ours == module).map(|(_, theirs)| format!("{theirs}{end}"))
    }

    /// Whether the layer or tensor with this Hugging Face name has interleaved rows: `Some(true)` for q,
    /// `Some(false)` for k, `None` if not interleaved.
    pub fn interleaved_queries(&self, name: &str) -> Option<bool> {
        match parted(name).0.rsplit('.').next() {
            Some("q_proj") if self.interleaved => Some(true),
            Some("k_proj") if self.interleaved => Some(false),
            _ => None,
        }
    }

    /// The constant that is added to the tensor with this Hugging Face name when it is written.
    pub fn added(&self, name: &str) -> f64 {
        if self.norm_plus_one && name.ends_with("norm.weight") {
            1.0
        } else {
            0.0
        }
    }

    /// The number whose inverse square root llama.cpp takes as the attention scale of a model with so many
    /// layers. `share` is its hidden size divided by the number of heads.
    pub fn query_scalar(&self, layers: usize, share: usize, head_dim: usize) -> usize {
        if self.wide_scale_layers == Some(layers) {
            share
        } else {
            head_dim
        }
    }

    fn blocks(&self) -> impl Iterator<Item = &'static (&'static str, &'static str)> {
        self.blocks.iter().flat_map(|names| names.iter())
    }
}

impl Windows {
    /// Whether a layer, counted from 0, has a window in a model that has any.
    pub fn has(&self, layer: usize) -> bool {
        !(layer + 1).is_multiple_of(self.full_every)
    }
}

/// Splits a name into the module and the suffix `.weight` or `.bias`, if any.
fn parted(name: &str) -> (&str, &str) {
    for end in [".weight", ".bias"] {
        if let Some(module) = name.strip_suffix(end) {
            return (module, end);
        }
    }
    (name, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_goes_there_and_back() {
        for one in &ALL {
            let names = one.blocks().map(|(ours, theirs)| {
                (format!("blk.7.{ours}.weight"), format!("model.layers.7.{theirs}.weight"))
            });
            let outside =
                OUTSIDE.iter().map(|(ours, theirs)| (format!("{ours}.weight"), format!("{theirs}.weight")));
            for (ours, theirs) in names.chain(outside) {
                assert_eq!(one.to_gguf(&theirs).as_deref(), Some(&*ours), "{}", one.name);
                assert_eq!(one.to_hugging_face(&ours).as_deref(), Some(&*theirs), "{}", one.name);
            }
            assert_eq!(one.to_gguf("model.layers.0.self_attn.rotary_emb.inv_freq"), None);
            assert_eq!(one.to_hugging_face("rope_freqs.weight"), None);
        }
        assert_eq!(
            ALL[2].to_gguf("model.layers.3.self_attn.q_proj.bias").as_deref(),
            Some("blk.3.attn_q.bias")
        );
        let bias = "model.layers.3.self_attn.o_proj.bias";
        assert_eq!(
            (ALL[0].to_gguf(bias).as_deref(), ALL[2].to_gguf(bias)),
            (Some("blk.3.attn_output.bias"), None)
        );
        assert_eq!(ALL[0].interleaved_queries("model.layers.0.self_attn.k_proj"), Some(false));
        assert_eq!(ALL[3].interleaved_queries("model.layers.0.self_attn.q_proj.weight"), None);
    }
}
