//! The decoder: token embedding, pre-norm transformer layers and a final norm.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use candle_nn::Init;

use super::config::DecoderConfig;
use super::layer::Layer;
use super::step::{Step, Tables};
use crate::adapter::{linears, AdaptableEmbedding, AdaptableModel, Context, Pass};
use crate::error::{Error, Result};
use crate::models::causal::Cache;
use crate::models::layers::rms_norm;
use crate::models::packed::PackedBatch;
use crate::models::{Placement, Weights};
use crate::noise::Noise;
use crate::ops::{self, CausalMask, Mask, RmsNorm, Weight, Window};

/// The decoder without a head.
#[derive(Debug)]
pub struct Decoder {
    embeddings: AdaptableEmbedding,
    layers: Vec<Arc<Layer>>,
    checkpoint_layers: bool,
    norm: RmsNorm,
    placement: Placement,
    /// Rotary tables and causal mask of each place (device), shared by its layers, kept between passes.
    shared: Vec<(Tables, CausalMask)>,
    max_length: usize,
    targets: &'static [&'static str],
}

/// The prefixes of the decoder's tensors in checkpoints: a bare decoder, a model with a head, and a
/// multimodal model (Gemma 3) as saved by newer and by older versions of transformers.
const PREFIXES: [&str; 4] = ["", "model", "model.language_model", "language_model.model"];

impl Decoder {
    /// Loads the decoder by tensor name, with or without the prefix `model.`, or from a multimodal model.
    ///
    /// If `vb` creates new parameters, they have the prefix `model.`; matrices are initialised with standard
    /// deviation `initializer_range`.
    ///
    /// # Errors
    /// If the configuration is not supported, or a tensor is missing or of another shape.
    pub fn load<'a>(vb: impl Into<Weights<'a>>, config: &DecoderConfig, noise: Noise) -> Result<Self> {
        let vb = vb.into();
        config.validate()?;
        let there = |prefix: &&&str| match **prefix {
            "" => vb.contains_tensor("embed_tokens.weight"),
            prefix => vb.contains_tensor(&format!("{prefix}.embed_tokens.weight")),
        };
        // Layers of a bare checkpoint, and new ones, get the same paths as in a model with a head.
        let (vb, prefix) = match PREFIXES.iter().find(there) {
            Some(&"") => (vb, "model"),
            Some(prefix) => (prefix.split('.').fold(vb, |vb, name| vb.pp(name)), *prefix),
            None => (vb.pp("model"), "model"),
        };
        let init = Init::Randn { mean: 0.0, stdev: config.initializer_range };
        let embeddings = vb.pp("embed_tokens").table((config.vocab_size, config.hidden_size), init)?;
        let placement = vb.placement(config.layers.len())?;
        let mut windows = Vec::<(usize, Window)>::new();
        let mut layers = Vec::with_capacity(config.layers.len());
        for (i, layer) in config.layers.iter().enumerate() {
            let place = placement.place_of(i);
            // Layers with the same window size on the same device share the window's mask.
            let window = layer.window.map(|size| {
                let same = |(at, window): &&(usize, Window)| (*at, window.size()) == (place, size);
                let known = windows.iter().find(same).map(|(_, window)| window.clone());
                known.unwrap_or_else(|| {
                    windows.push((place, Window::new(size)));
                    windows[windows.len() - 1].1.clone()
                })
            });
            let vb = vb.pp("layers").pp(i).on(placement.device(place));
            let path = format!("{prefix}.layers.{i}");
            layers.push(Arc::new(Layer::load(&path, &vb, config, *layer, window, noise)?));
        }
        Ok(Self {
            layers,
            checkpoint_layers: false,
            norm: rms_norm(config.hidden_size, config.rms_norm_eps, config.norm_offset, &vb.pp("norm"))?,
            shared: (0..placement.places())
                .map(|place| {
                    let tables = Tables::new(config, embeddings.dtype(), placement.device(place));
                    (tables, CausalMask::default())
                })
                .collect(),
            placement,
            max_length: config.max_length(),
            embeddings: AdaptableEmbedding::new(embeddings).scaled_by(config.embedding_scale),
            targets: if config.fused_projections { &["qkv_proj"] } else { &["q_proj", "k_proj", "v_proj"] },
        })
    }

    /// Returns the last hidden states; see [`CausalLm::hidden`](crate::models::causal::CausalLm::hidden).
    ///
    /// # Errors
    /// If the shapes do not fit; if the sequence is longer than [`Self::max_length`]; if a training pass is
    /// given a cache, through which no gradient flows; if a cache begins with virtual tokens and a row of
    /// padding only, so that their position is not known yet; or if a cache outgrows its room to where the
    /// rotary positions change (LongRoPE).
    pub fn forward(
        &self,
        input_ids: &Tensor,
        attention_mask: &Tensor,
        mut cache: Option<&mut Cache>,
        cx: &Context,
    ) -> candle_core::Result<Tensor> {
        let (cx, (b, t)) = (&*cx.of_one_pass(), input_ids.dims2()?);
        let seen = cache.as_ref().map_or(0, |cache| cache.length());
        // Virtual tokens precede only the beginning of a row, not its continuations.
        let p = if seen == 0 { self.embeddings.virtual_tokens() } else { 0 };
        self.embeddings.check_length(seen + p + t, self.max_length)?;
        if cache.is_some() && matches!(cx.pass, Pass::Train { .. }) {
            return Err(Error::config("cache", "a training pass cannot use a cache").into());
        }
        if cache.is_some() && p > 0 {
            check_first_tokens(attention_mask)?;
        }
        // A new batch without virtual tokens is packed to its real tokens between attentions.
        let packs = cache.is_none() && p == 0;
        let mask = &ops::carry(attention_mask, self.device())?;
        let place = |rows| self.embeddings.after_padding(rows, mask);
        let padding = place(self.embeddings.extend_mask(mask)?)?;
        let room = cache.as_ref().map(|cache| cache.room());
        let step_at = |place: usize| -> candle_core::Result<Step> {
            let ((tables, causal), device) = (&self.shared[place], self.placement.device(place));
            let padding = ops::carry(&padding, device)?;
            let mask = Mask { padding: Some(padding), causal: Some(causal.clone()), window: None };
            let batch = match packs {
                true => PackedBatch::of_decoder((b, t), attention_mask, device)?,
                false => PackedBatch::whole((b, p + t), attention_mask),
            };
            Ok(Step { mask, angles: tables.angles(seen, p + t, room)?, batch, cx: cx.clone() })
        };
        let (mut at, mut step) = (0, step_at(0)?);
        let mut xs = match seen {
            0 => place(self.embeddings.forward(input_ids, cx.path)?)?, // (b, p + t, d)
            _ => self.embeddings.lookup(input_ids, cx.path)?,          // (b, t, d)
        };
        let batch = step.batch.clone();
        xs = batch.pack(xs, cx.path)?; // (n, d), if it is packed
        for (i, layer) in self.layers.iter().enumerate() {
            let cached = cache.as_mut().and_then(|cache| cache.layer(i));
            let own = self.placement.place_of(i);
            if own != at {
                xs = self.placement.carry(&xs, at, own)?;
                (at, step) = (own, step_at(own)?);
            }
            xs = match (self.checkpoint_layers, cx.pass) {
                (true, Pass::Train { .. }) if cx.is_differentiated() => {
                    let (block, cx) = (layer.clone(), step.cx.clone().without_tape());
                    let step = Step { cx, ..step.clone() };
                    ops::checkpoint(&xs, &layer.parameters()?, move |xs| block.forward(xs, &step, None))?
                }
                _ => cx.handed_on(layer.forward(&xs, &step, cached)?),
            };
        }
        // All real tokens are in the last t columns: virtual tokens only change places with left padding.
        let xs = if p > 0 { xs.narrow(1, p, t)? } else { xs };
        let xs = self.norm.forward_on(&self.placement.carry(&xs, at, 0)?, cx.path)?;
        batch.pad(xs, cx.path)
    }

    /// Returns an empty cache for this decoder, with room for `capacity` tokens per row.
    pub fn cache(&self, capacity: usize) -> Cache {
        let capacity = capacity + self.embeddings.virtual_tokens();
        Cache::new(self.layers.len(), capacity.min(self.max_length))
    }

    /// Turns gradient checkpointing ([`ops::checkpoint`]) on or off: training keeps only the input of each
    /// layer and recomputes the layer in the backward pass. Saves memory; costs one more forward pass.
    pub fn set_checkpoint_layers(&mut self, on: bool) {
        self.checkpoint_layers = on;
    }

    /// The longest sequence in tokens, not counting virtual tokens.
    pub fn max_length(&self) -> usize {
        self.max_length.saturating_sub(self.embeddings.virtual_tokens())
    }

    /// The token embedding `(vocab, hidden)`, to which a language-model head may be tied.
    pub fn embeddings(&self) -> &Weight {
        self.embeddings.words()
    }

    /// The device of the embedding, on which input batches must be.
    pub fn device(&self) -> &Device {
        self.embeddings().device()
    }
}

impl AdaptableModel for Decoder {
    fn default_targets(&self) -> &'static [&'static str] {
        self.targets
    }

    linears!(layers);

    fn embedding_mut(&mut self) -> Option<&mut AdaptableEmbedding> {
        Some(&mut self.embeddings)
    }
}

/// Checks that every row of a mask has a real token.
fn check_first_tokens(mask: &Tensor) -> candle_core::Result<()> {
    let rows = mask.ne(0u8)?.to_vec2::<u8>()?;
    match rows.iter().position(|row| row.iter().all(|real| *real == 0)) {
        Some(row) => {
            let reason = format!(
                "row {row} of the first piece is only padding: expected a token after the virtual tokens"
            );
            Err(Error::config("attention_mask", reason).into())
        }
        None => Ok(()),
    }
}
