//! Writes the tensors of a folder as safetensors files, computing each tensor as it is written.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Tensor};
use safetensors::tensor::{Dtype, TensorView};
use safetensors::View;
use serde_json::json;

use crate::error::{Error, Result};
use crate::util::files;

/// One tensor of the folder: copied from the source, or computed when it is written.
pub(super) enum Entry<'a> {
    Source(TensorView<'a>),
    Made { make: Box<dyn Fn() -> Result<Tensor> + 'a>, dtype: DType, shape: Vec<usize>, failure: &'a Failure },
}

impl<'a> Entry<'a> {
    /// A tensor that was trained directly.
    pub fn trained(tensor: Tensor, dtype: DType, failure: &'a Failure) -> Self {
        let shape = tensor.dims().to_vec();
        Self::Made { make: Box::new(move || Ok(tensor.clone())), dtype, shape, failure }
    }
}

/// The first error of a tensor that is computed while it is written, since [`View::data`] cannot return one.
pub(super) type Failure = Mutex<Option<Error>>;

impl View for &Entry<'_> {
    fn dtype(&self) -> Dtype {
        match self {
            Entry::Source(view) => view.dtype(),
            Entry::Made { dtype, .. } => (*dtype).into(),
        }
    }

    fn shape(&self) -> &[usize] {
        match self {
            Entry::Source(view) => view.shape(),
            Entry::Made { shape, .. } => shape,
        }
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match self {
            Entry::Source(view) => Cow::Borrowed(view.data()),
            Entry::Made { make, dtype, failure, .. } => match make().and_then(|t| Ok(t.to_dtype(*dtype)?)) {
                Ok(tensor) => Cow::Owned(View::data(&tensor).into_owned()),
                Err(error) => {
                    failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                    Cow::Owned(vec![0; self.data_len()])
                }
            },
        }
    }

    fn data_len(&self) -> usize {
        match self {
            Entry::Source(view) => view.data().len(),
            Entry::Made { dtype, shape, .. } => shape.iter().product::<usize>() * dtype.size_in_bytes(),
        }
    }
}

/// Writes `model.safetensors`, or shards with their index.
///
/// # Errors
/// If a tensor cannot be computed, or a file cannot be written.
pub(super) fn write_shards(
    entries: &BTreeMap<String, Entry>,
    dir: &Path,
    max_bytes: usize,
    failure: &Failure,
) -> Result<()> {
    let (mut shards, mut room, mut total) = (Vec::<Vec<(&String, &Entry)>>::new(), 0, 0);
    for (name, entry) in entries {
        let bytes = entry.data_len();
        total += bytes;
        match shards.last_mut() {
            Some(shard) if bytes <= room => {
                shard.push((name, entry));
                room -= bytes;
            }
            _ => {
                shards.push(vec![(name, entry)]);
                room = max_bytes.saturating_sub(bytes);
            }
        }
    }
    let (count, mut places) = (shards.len(), BTreeMap::new());
    for (i, shard) in shards.into_iter().enumerate() {
        let file = match count {
            1 => "model.safetensors".to_string(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        places.extend(shard.iter().map(|(name, _)| (name.to_string(), file.clone())));
        files::write_safetensors(&dir.join(&file), shard)?;
        if let Some(error) = failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Err(error);
        }
    }
    if count > 1 {
        let index = json!({ "metadata": { "total_size": total }, "weight_map": places });
        files::write_json(&dir.join("model.safetensors.index.json"), &index)?;
    }
    Ok(())
}
