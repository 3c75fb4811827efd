//! 4-bit weights as bitsandbytes leaves them in safetensors: NF4, its scales quantised once more or not.
//!
//! Beside the codes `{name}` lie `{name}.absmax`, the scale of each block of numbers, `{name}.quant_map`, what the
//! codes stand for, and `{name}.quant_state.bitsandbytes__nf4`, a JSON text with the shape and the size of a block. Of
//! double quantisation the scales are codes themselves:
//!
//! ```text
//! scale = nested_quant_map(code) * nested_absmax(block of scales) + nested_offset
//! ```

use candle_core::safetensors::MmapedSafetensors;
use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Dtype, TensorView};
use serde::Deserialize;

use crate::error::{Error, Result};
use crate::models::weights::{QuantizedSource, Wanted};
use crate::ops::QuantizedWeight;

/// What ends the name of a state, before its `nf4` or `fp4`.
const STATE: &str = ".quant_state.bitsandbytes__";

/// The state of one matrix; what a reader of its own needs of it.
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
    mapped: MmapedSafetensors,
}

impl FourBits {
    /// Those of `mapped`, if it has any.
    ///
    /// # Errors
    /// If one is of another kind than NF4.
    pub fn find(mapped: MmapedSafetensors) -> Result<Option<Self>> {
        let mut found = false;
        for (name, _) in mapped.tensors() {
            match name.split_once(STATE) {
                None => {}
                Some((_, "nf4")) => found = true,
                Some((tensor, kind)) => return Err(unread(tensor, kind)),
            }
        }
        Ok(found.then_some(Self { mapped }))
    }

    fn state(&self, name: &str) -> Result<Option<State>> {
        let Ok(view) = self.mapped.get(&format!("{name}{STATE}nf4")) else { return Ok(None) };
        let state: State = serde_json::from_slice(view.data())
            .map_err(|e| Error::tensor(name, format!("its {STATE}nf4 cannot be read: {e}")))?;
        match state.quant_type.as_str() {
            "nf4" => Ok(Some(state)),
            other => Err(unread(name, other)),
        }
    }

    /// The tensor `name.part` of a dtype and a number of elements.
    fn part(&self, name: &str, part: &str, dtype: Dtype, count: usize) -> Result<TensorView<'_>> {
        let missing =
            |_| Error::tensor(format!("{name}.{part}"), "there is no such tensor beside the 4-bit weight");
        let view = self.mapped.get(&format!("{name}.{part}")).map_err(missing)?;
        let elements: usize = view.shape().iter().product();
        if view.dtype() != dtype || elements != count {
            let reason = format!(
                "expected {count} numbers of {dtype:?}, got {:?} of {:?}",
                view.shape(),
                view.dtype()
            );
            return Err(Error::tensor(format!("{name}.{part}"), reason));
        }
        Ok(view)
    }

    fn floats(&self, name: &str, part: &str, count: usize) -> Result<Vec<f32>> {
        let view = self.part(name, part, Dtype::F32, count)?;
        let (numbers, _) = view.data().as_chunks::<4>();
        let numbers: Vec<f32> = numbers.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        match numbers.iter().all(|number| number.is_finite()) {
            true => Ok(numbers),
            false => Err(Error::tensor(format!("{name}.{part}"), "it holds NaN or infinity")),
        }
    }

    /// The scale of each of `count` blocks.
    fn scales(&self, name: &str, state: &State, count: usize) -> Result<Vec<f32>> {
        let Some(nested) = state.nested_blocksize else { return self.floats(name, "absmax", count) };
        if nested == 0 {
            return Err(Error::tensor(name, "nested_blocksize: expected at least 1, got 0"));
        }
        let codes = self.part(name, "absmax", Dtype::U8, count)?;
        let values = self.floats(name, "nested_quant_map", 256)?;
        let outer = self.floats(name, "nested_absmax", count.div_ceil(nested))?;
        let offset = state.nested_offset.unwrap_or(0.0);
        let scale = |(at, code): (usize, &u8)| values[usize::from(*code)] * outer[at / nested] + offset;
        let scales: Vec<f32> = codes.data().iter().enumerate().map(scale).collect();
        match scales.iter().all(|scale| scale.is_finite()) {
            true => Ok(scales),
            false => Err(Error::tensor(name, "its scales are not finite")),
        }
    }
}

impl QuantizedSource for FourBits {
    fn get(&self, wanted: &Wanted) -> Result<Option<QuantizedWeight>> {
        let name = wanted.name;
        let Some(state) = self.state(name)? else { return Ok(None) };
        let (rows, columns) = wanted.shape;
        if state.shape != [rows, columns] {
            let reason = format!("expected shape {:?}, got {:?}", [rows, columns], state.shape);
            return Err(Error::tensor(name, reason));
        }
        let block = state.blocksize;
        if block < 2 || !block.is_multiple_of(2) || !columns.is_multiple_of(block) {
            let reason =
                format!("its blocks of {block} do not divide its rows of {columns}, which is not read here");
            return Err(Error::tensor(name, reason));
        }
        let view = self.mapped.get(name).map_err(|_| Error::tensor(name, "its 4-bit codes are missing"))?;
        if view.dtype() != Dtype::U8 || view.data().len() != rows * columns / 2 {
            let reason = format!(
                "expected {} bytes of codes, got {:?} of {:?}",
                rows * columns / 2,
                view.shape(),
                view.dtype()
            );
            return Err(Error::tensor(name, reason));
        }
        let values = self.floats(name, "quant_map", 16)?;
        let values: [f32; 16] = std::array::from_fn(|code| values[code]);
        let scales = self.scales(name, &state, rows * columns / block)?;
        let codes = Tensor::from_raw_buffer(view.data(), DType::U8, &[rows, columns / 2], &Device::Cpu)?;
        let scales = Tensor::from_vec(scales, (rows, columns / block), &Device::Cpu)?;
        let (codes, scales) = (codes.to_device(wanted.device)?, scales.to_device(wanted.device)?);
        Ok(Some(QuantizedWeight::nf4(codes, scales, values, wanted.dtype)?))
    }
}

fn unread(name: &str, kind: &str) -> Error {
    Error::tensor(
        name,
        format!("bitsandbytes' {kind} is not read here, only nf4: quantise the model to that"),
    )
}
