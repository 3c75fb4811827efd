//! 4-bit weights as bitsandbytes stores them in safetensors: NF4, with or without double quantisation.
//!
//! The tensor `{name}` holds the codes. Beside it are `{name}.absmax`, the scale of each block of elements;
//! `{name}.quant_map`, the values of the codes; and `{name}.quant_state.bitsandbytes__nf4`, a JSON text with
//! the shape and the block size. With double quantisation, the scales are codes themselves:
//!
//! ```text
//! scale = nested_quant_map(code) * nested_absmax(block of scales) + nested_offset
//! ```

use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Dtype, TensorView};
use serde::Deserialize;

use super::weights::MappedWeights;
use crate::error::Result;
use crate::models::weights::{QuantizedSource, Wanted};
use crate::ops::QuantizedWeight;

/// The part of a state's name between the tensor's name and `nf4` or `fp4`.
const STATE: &str = ".quant_state.bitsandbytes__";

/// The quantisation state of one matrix: the fields that this reader needs.
#[derive(Debug, Deserialize)]
struct State {
    quant_type: String,
    blocksize: usize,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_offset: Option<f32>,
}

/// The 4-bit matrices of some files.
pub(super) struct FourBits {
    files: MappedWeights,
}

impl FourBits {
    /// Finds the 4-bit matrices of `files`, if there are any.
    ///
    /// # Errors
    /// If one is of another kind than NF4.
    pub fn find(files: MappedWeights) -> Result<Option<Self>> {
        let mut found = false;
        for name in files.names() {
            match name.split_once(STATE) {
                None => {}
                Some((_, "nf4")) => found = true,
                Some((_, kind)) => return Err(files.unfit(&name, unread(kind))),
            }
        }
        Ok(found.then_some(Self { files }))
    }

    fn state(&self, name: &str) -> Result<Option<State>> {
        let part = format!("{name}{STATE}nf4");
        let Some(view) = self.files.view(&part) else { return Ok(None) };
        let state: State = serde_json::from_slice(view.data())
            .map_err(|e| self.files.unfit(&part, format!("it cannot be read: {e}")))?;
        match state.quant_type.as_str() {
            "nf4" => Ok(Some(state)),
            other => Err(self.files.unfit(&part, unread(other))),
        }
    }

    /// The tensor `name`, checked to have the given dtype and number of elements.
    fn part(&self, name: &str, dtype: Dtype, count: usize) -> Result<TensorView<'_>> {
        let view = self.files.view(name).ok_or_else(|| self.files.missing(name))?;
        let elements: usize = view.shape().iter().product();
        if view.dtype() != dtype || elements != count {
            let reason =
                format!("expected {count} of {dtype:?}, got {:?} of {:?}", view.shape(), view.dtype());
            return Err(self.files.unfit(name, reason));
        }
        Ok(view)
    }

    fn floats(&self, name: &str, count: usize) -> Result<Vec<f32>> {
        let view = self.part(name, Dtype::F32, count)?;
        let (numbers, _) = view.data().as_chunks::<4>();
        self.finite(name, numbers.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
    }

    fn finite(&self, name: &str, numbers: Vec<f32>) -> Result<Vec<f32>> {
        match numbers.iter().all(|number| number.is_finite()) {
            true => Ok(numbers),
            false => Err(self.files.unfit(name, "it holds NaN or infinity".to_string())),
        }
    }

    /// The scale of each of `count` blocks.
    fn scales(&self, name: &str, state: &State, count: usize) -> Result<Vec<f32>> {
        let part = format!("{name}.absmax");
        let Some(nested) = state.nested_blocksize else { return self.floats(&part, count) };
        if nested == 0 {
            return Err(self.files.unfit(name, "nested_blocksize: expected at least 1, got 0".to_string()));
        }
        let codes = self.part(&part, Dtype::U8, count)?;
        let values = self.floats(&format!("{name}.nested_quant_map"), 256)?;
        let outer = self.floats(&format!("{name}.nested_absmax"), count.div_ceil(nested))?;
        let offset = state.nested_offset.unwrap_or(0.0);
        let scale = |(at, code): (usize, &u8)| values[usize::from(*code)] * outer[at / nested] + offset;
        self.finite(&part, codes.data().iter().enumerate().map(scale).collect())
    }
}

impl QuantizedSource for FourBits {
    fn get(&self, wanted: &Wanted) -> Result<Option<QuantizedWeight>> {
        let name = wanted.name;
        let Some(state) = self.state(name)? else { return Ok(None) };
        let (block, (rows, columns)) = (state.blocksize, wanted.shape);
        if state.shape != [rows, columns] {
            let reason = format!("expected shape {:?}, got {:?}", [rows, columns], state.shape);
            return Err(self.files.unfit(name, reason));
        }
        if block < 2 || !block.is_multiple_of(2) || !columns.is_multiple_of(block) {
            let reason =
                format!("expected an even size that divides rows of {columns}, got blocks of {block}");
            return Err(self.files.unfit(name, reason));
        }
        let codes = self.part(name, Dtype::U8, rows * columns / 2)?;
        let values = self.floats(&format!("{name}.quant_map"), 16)?;
        let values: [f32; 16] = std::array::from_fn(|code| values[code]);
        let scales = self.scales(name, &state, rows * columns / block)?;
        let codes = Tensor::from_raw_buffer(codes.data(), DType::U8, &[rows, columns / 2], &Device::Cpu)?;
        let scales = Tensor::from_vec(scales, (rows, columns / block), &Device::Cpu)?;
        let (codes, scales) = (codes.to_device(wanted.device)?, scales.to_device(wanted.device)?);
        Ok(Some(QuantizedWeight::nf4(codes, scales, values, wanted.dtype)?))
    }
}

fn unread(kind: &str) -> String {
    format!("bitsandbytes' {kind} is not supported: quantise the model to nf4")
}
