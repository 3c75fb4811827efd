//! Which tensors a merged checkpoint has, and where each comes from.

use std::collections::BTreeMap;

use candle_core::safetensors::MmapedSafetensors;
use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Dtype, TensorView};

use super::shards::{Entry, Failure};
use super::TensorPrefixes;
use crate::adapter::{AdaptableModel, Params, Pass, Role};
use crate::error::{Error, Result};

/// The name prefixes of pretraining and task heads in the model classes of transformers.
const HEADS: [&str; 17] = [
    "lm_head.",
    "score.",
    "classifier.",
    "pre_classifier.",
    "cls.",
    "head.",
    "decoder.",
    "pooler.",
    "qa_outputs.",
    "vocab_transform.",
    "vocab_layer_norm.",
    "vocab_projector.",
    "discriminator_predictions.",
    "generator_predictions.",
    "generator_lm_head.",
    "lm_predictions.",
    "mask_predictions.",
];

/// The tensors to write, by name.
pub(super) fn plan<'a>(
    model: &'a dyn AdaptableModel,
    params: &Params,
    source: &'a MmapedSafetensors,
    failure: &'a Failure,
    pass: Pass,
) -> Result<BTreeMap<String, Entry<'a>>> {
    let prefixes = TensorPrefixes::of(model)?;
    let (adapted, is_quantized) = adapted_layers(model)?;
    let views = source.tensors();
    let bare = prefixes.are_bare(views.iter().map(|(name, _)| name.as_str()));
    let whole = |name: String| if bare { prefixes.whole(&name) } else { name };
    let (trained, has_head) = trained_weights(params, whole)?;
    if adapted.is_empty() && trained.is_empty() {
        let reason = "no layer has an active adapter and no weight was trained: there is nothing to merge";
        return Err(Error::config("adapter", reason));
    }
    let mut left = Left { model, pass, failure, is_quantized, adapted, trained };
    let mut entries = BTreeMap::new();
    for (name, view) in views {
        let name = whole(name);
        // A trained head replaces any head of the checkpoint. Other tensors beside the body, such as an image
        // tower, are kept.
        if has_head && left.is_head(&name) && !prefixes.matches(&name) {
            continue;
        }
        let entry = left.entry(&name, view)?;
        entries.insert(name, entry);
    }
    entries.extend(left.new_tensors()?);
    Ok(entries)
}

/// The shapes of the layers with an active adapter, by path, and whether their base is quantised, which is
/// logged.
fn adapted_layers(model: &dyn AdaptableModel) -> Result<(BTreeMap<String, Vec<usize>>, bool)> {
    let (mut adapted, mut kind) = (BTreeMap::new(), None);
    model.visit_linears(&mut |layer| {
        if layer.active().is_some() {
            kind = kind.take().or_else(|| layer.base().dense().is_none().then(|| layer.base().kind()));
            let (in_dim, out_dim) = layer.dims()?;
            adapted.insert(layer.path().to_string(), vec![out_dim, in_dim]);
        }
        Ok(())
    })?;
    if let Some(kind) = &kind {
        tracing::warn!(
            "the adapter was trained on a base in {kind} and is merged into the checkpoint's own weights: \
             the two bases differ by the quantisation error"
        );
    }
    Ok((adapted, kind.is_some()))
}

/// The weights that were trained directly, by their name in the whole model, and whether one is of a head.
///
/// # Errors
/// If there are virtual tokens.
fn trained_weights(
    params: &Params,
    whole: impl Fn(String) -> String,
) -> Result<(BTreeMap<String, Tensor>, bool)> {
    let (mut trained, mut has_head) = (BTreeMap::new(), false);
    for (name, param) in params.all() {
        // Weights that were loaded from a checkpoint without the body's prefix have no prefix either.
        let name = match param.role {
            Role::Base => whole(name),
            Role::Head => {
                has_head = true;
                name
            }
            Role::Prompt => {
                return Err(Error::tensor(name, "virtual tokens cannot be merged into a checkpoint"))
            }
            _ => continue,
        };
        trained.insert(name, param.var.as_detached_tensor());
    }
    Ok((trained, has_head))
}

/// The changes to the source that have not found their tensor yet.
struct Left<'a> {
    model: &'a dyn AdaptableModel,
    pass: Pass,
    failure: &'a Failure,
    /// Whether the adapted base is quantised.
    is_quantized: bool,
    /// The shapes of adapted layers, by path.
    adapted: BTreeMap<String, Vec<usize>>,
    /// The weights that were trained directly, by name.
    trained: BTreeMap<String, Tensor>,
}

impl<'a> Left<'a> {
    /// Whether the name is that of a trained weight or of a head.
    fn is_head(&self, name: &str) -> bool {
        self.trained.contains_key(name) || HEADS.iter().any(|head| name.starts_with(head))
    }

    /// What is written for the tensor `name` of the source.
    fn entry(&mut self, name: &str, view: TensorView<'a>) -> Result<Entry<'a>> {
        let path = name.strip_suffix(".weight").unwrap_or(name).to_string();
        let (model, pass, failure) = (self.model, self.pass, self.failure);
        Ok(match (self.adapted.remove(&path), self.trained.remove(name)) {
            (Some(shape), _) if shape == view.shape() => {
                let dtype = DType::try_from(view.dtype())?;
                let make = Box::new(move || merged(model, &path, &tensor(&view)?, &pass));
                Entry::Made { make, dtype, shape, failure }
            }
            (None, Some(tensor)) if tensor.dims() == view.shape() => {
                Entry::trained(tensor, DType::try_from(view.dtype())?, failure)
            }
            (None, None) => Entry::Source(view),
            _ if self.is_quantized && view.dtype() == Dtype::U8 => {
                let reason = "the checkpoint has it in 4 bits, which cannot be merged into: save the \
                              adapter, or merge it into the model's unquantised checkpoint";
                return Err(Error::tensor(name, reason));
            }
            _ => return Err(Error::tensor(name, format!("the checkpoint has shape {:?}", view.shape()))),
        })
    }

    /// The trained weights that the source lacks, such as a new head.
    ///
    /// # Errors
    /// If it lacks the weight of an adapted layer.
    fn new_tensors(self) -> Result<impl Iterator<Item = (String, Entry<'a>)>> {
        if let Some(path) = self.adapted.keys().next() {
            return Err(Error::tensor(format!("{path}.weight"), "the checkpoint has no such tensor"));
        }
        let failure = self.failure;
        Ok(self.trained.into_iter().map(move |(name, tensor)| {
            let dtype = tensor.dtype();
            (name, Entry::trained(tensor, dtype, failure))
        }))
    }
}

/// The weight `source` of the layer at `path`, with its adapter merged in.
pub(super) fn merged(model: &dyn AdaptableModel, path: &str, source: &Tensor, pass: &Pass) -> Result<Tensor> {
    let mut merged = None;
    model.visit_linears(&mut |layer| {
        if layer.path() == path {
            merged = layer.merged_weight(source, pass)?;
        }
        Ok(())
    })?;
    merged.ok_or_else(|| {
        Error::tensor(format!("{path}.weight"), "the adapter of this layer is no longer there")
    })
}

/// A copy of a tensor of the source.
pub(super) fn tensor(view: &TensorView) -> Result<Tensor> {
    let dtype = DType::try_from(view.dtype())?;
    Ok(Tensor::from_raw_buffer(view.data(), dtype, view.shape(), &Device::Cpu)?)
}
