//! Where a classifier's head comes from, and which class each of its rows stands for.

use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;

use super::method::MethodInit;
use crate::adapter::{Params, Role};
use crate::error::{Error, Result};
use crate::labels::Labels;
use crate::models::sequence::SequenceConfig;
use crate::peft::AdapterFile;

/// The head that a classifier starts with: an adapter's, the checkpoint's or a new one.
pub(super) struct HeadSource<'a> {
    /// The checkpoint to load the head from; `None` for a new head.
    pub checkpoint: Option<VarBuilder<'static>>,
    /// The adapter, if it has a head.
    adapter: Option<&'a AdapterFile>,
    /// Whether to ignore the checkpoint's head and its class names.
    fresh: bool,
    config: &'a SequenceConfig,
}

impl<'a> HeadSource<'a> {
    /// Finds the head for a model with this configuration and number of outputs. With `fresh`, the
    /// checkpoint's head is ignored.
    ///
    /// # Errors
    /// If the head has another number of outputs.
    pub(super) fn find(
        config: &'a SequenceConfig,
        checkpoint: &VarBuilder<'static>,
        start: &'a MethodInit,
        fresh: bool,
    ) -> Result<Self> {
        let outputs = config.output_tensors();
        let has_head =
            |file: &&AdapterFile| outputs.iter().all(|name| file.saved_modules.contains_key(*name));
        let adapter = match start {
            MethodInit::Adapter(file) | MethodInit::PostHoc(file, _) => Some(&**file).filter(has_head),
            MethodInit::Fresh(..) => None,
        };
        let mut source = Self { checkpoint: None, adapter, fresh, config };
        if fresh {
            return Ok(source);
        }
        let wanted = config.labels().len();
        let found = outputs.iter().find(|name| checkpoint.contains_tensor(name));
        let rows = found.map(|name| checkpoint.get_unchecked_dtype(name, DType::F32)?.dim(0)).transpose()?;
        // An adapter of this crate names its classes, which makes it a single-label head. A PEFT adapter
        // names none: its head is for the same kind of problem as the checkpoint's.
        let follows = adapter.map_or(found.is_some(), |file| file.labels.is_none());
        if let Some(problem) = config.foreign_problem().filter(|_| follows) {
            let reason = format!(
                "the head of the checkpoint, or of an adapter without class names on it, is for {problem}, \
                 which is not supported: start a new head (--new-head; in the library \
                 Classifier::load_with_new_head)"
            );
            return Err(Error::tensor(*found.unwrap_or(&outputs[0]), reason));
        }
        match (found, rows) {
            // The adapter's output layer replaces the checkpoint's. Parts of a head that PEFT does not save,
            // such as DeBERTa's pooler, do not depend on the number of classes.
            (Some(_), Some(rows)) if rows != wanted && adapter.is_some() => {
                let hidden = move |name: &str| match outputs.contains(&name) {
                    true => format!("{name} of {rows} classes"),
                    false => name.to_string(),
                };
                source.checkpoint = Some(checkpoint.clone().rename_f(hidden));
            }
            (Some(name), Some(rows)) if rows != wanted => {
                let names = config.named().ok().flatten().filter(|named| !named.are_numbers());
                let names = names.map(|named| format!(" ({})", named.names().join(", "))).unwrap_or_default();
                let reason = format!(
                    "the checkpoint's head has {rows} outputs{names}, the task has {wanted}: start a new head \
                     (--new-head; in the library Classifier::load_with_new_head)"
                );
                return Err(Error::tensor(*name, reason));
            }
            _ => source.checkpoint = Some(checkpoint.clone()),
        }
        Ok(source)
    }

    /// Checks, after the model has created its parameters, that the head is complete: missing parts would
    /// silently train from random weights. PEFT saves only a part of some heads (without DeBERTa's pooler),
    /// whose rest must be in the checkpoint. Post hoc, only the posterior is trained, so that the head must
    /// already be trained.
    ///
    /// # Errors
    /// If a tensor is missing; the error names it.
    pub(super) fn check(&self, start: &MethodInit, params: &Params) -> Result<()> {
        let head = params.of_role(Role::Head).into_iter();
        let in_checkpoint =
            |name: &String| self.checkpoint.as_ref().is_some_and(|vb| vb.contains_tensor(name));
        let (held, lacking): (Vec<_>, Vec<_>) = head.map(|(name, _)| name).partition(in_checkpoint);
        let in_adapter =
            |name: &String| self.adapter.is_some_and(|file| file.saved_modules.contains_key(name));
        let Some(lacking) = lacking.iter().find(|name| !in_adapter(name)) else { return Ok(()) };
        let trained = self.adapter.is_some() || matches!(start, MethodInit::PostHoc(..));
        match held.first() {
            Some(held) => {
                let reason = format!("the checkpoint has {held}, but not this part of the head");
                Err(Error::tensor(lacking, reason))
            }
            None if trained => {
                let reason = "neither the checkpoint nor the adapter has this part of a trained head";
                Err(Error::tensor(lacking, reason))
            }
            None => Ok(()), // a new head
        }
    }

    /// Puts the rows of the head into the order of `wanted`, by the class names of their source. Returns the
    /// names of the outputs, and a note for the user, if any.
    ///
    /// If `wanted` are mere numbers, the head keeps its order and names. If the head's names are mere
    /// numbers, its order is assumed to be that of `wanted`.
    ///
    /// # Errors
    /// If candle fails.
    pub(super) fn settle(&self, wanted: Labels, params: &Params) -> Result<(Labels, Option<String>)> {
        let (named, place) = match self.names() {
            Ok(Some(found)) => found,
            Ok(None) => return Ok((wanted, None)),
            Err(error) => {
                return Ok((wanted, Some(format!("{error}: the outputs are taken in the task's order"))));
            }
        };
        if named.len() != wanted.len() || named.are_numbers() {
            return Ok((wanted, None));
        }
        if wanted.are_numbers() {
            return Ok((named, None));
        }
        let held = |vb: &VarBuilder| self.config.output_tensors().iter().any(|name| vb.contains_tensor(name));
        if self.adapter.is_none() && !self.checkpoint.as_ref().is_some_and(held) {
            return Ok((wanted, None)); // a new head
        }
        let Some(places) = named.places_of(&wanted) else {
            let note = format!(
                "the head of the {place} has the classes {}, the task has {}: its outputs are taken in the task's \
                 order; where they mean something else, start a new head (--new-head)",
                named.names().join(", "),
                wanted.names().join(", "),
            );
            return Ok((wanted, Some(note)));
        };
        for name in self.config.output_tensors() {
            if let Some(param) = params.get(name) {
                params.set(name, &take_rows(&param.var.as_detached_tensor(), &places)?)?;
            }
        }
        Ok((wanted, None))
    }

    /// Returns the class names in the order of the head's source. PEFT stores none: its adapter has the order
    /// of the checkpoint that it was trained on. Adapters that this crate wrote before it stored names are in
    /// the task's order; they are recognised by their MonteCLoRA settings.
    fn names(&self) -> Result<Option<(Labels, &'static str)>> {
        match self.adapter {
            Some(AdapterFile { labels: Some(labels), .. }) => Ok(Some((labels.clone(), "adapter"))),
            Some(AdapterFile { monteclora: Some(_), .. }) => Ok(None),
            None if self.fresh => Ok(None),
            _ => Ok(self.config.named()?.map(|named| (named, "checkpoint"))),
        }
    }
}

/// Selects the rows `places` of an output's weight or bias, in that order.
pub(super) fn take_rows(rows: &Tensor, places: &[usize]) -> Result<Tensor> {
    let places: Vec<u32> = places.iter().map(|place| *place as u32).collect();
    Ok(rows.index_select(&Tensor::new(places, rows.device())?, 0)?)
}
