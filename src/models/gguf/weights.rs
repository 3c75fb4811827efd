//! The tensors of a GGUF file under Hugging Face's names: quantised matrices as stored, and all tensors
//! dequantised on request.

use std::borrow::Cow;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};

use super::file::Gguf;
use super::header::TensorInfo;
use super::{blocks, rows};
use crate::error::Result;
use crate::models::weights::{QuantizedSource, Wanted};
use crate::ops::QuantizedWeight;
use crate::util::finite::first_non_finite;

impl Gguf {
    /// The quantised matrices as stored; `None` if there are none. A model is loaded from these and
    /// [`Self::var_builder`] ([`ModelFiles::open_weights`](crate::models::hub::ModelFiles::open_weights)).
    pub fn quantized(&self) -> Option<Arc<dyn QuantizedSource>> {
        let mut infos = self.tensor_names().filter_map(|name| self.info(name));
        infos.any(|info| is_quantized(info.kind)).then(|| Arc::new(self.clone()) as Arc<dyn QuantizedSource>)
    }

    /// The weights under Hugging Face's names, in `dtype`; quantised ones are dequantised when requested.
    pub fn var_builder(&self, dtype: DType, device: &Device) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(self.clone()), dtype, device.clone())
    }

    /// The Hugging Face names of the weights, with their shapes.
    pub fn names(&self) -> Vec<(String, Vec<usize>)> {
        let named =
            |name: &str| Some((self.architecture().to_hugging_face(name)?, self.info(name)?.shape.clone()));
        self.tensor_names().filter_map(named).collect()
    }

    /// Loads the tensor that Hugging Face calls `name` as stored, but with its rows in Hugging Face's order.
    fn stored(&self, name: &str, info: &TensorInfo, device: &Device) -> Result<QTensor> {
        let bytes = self.bytes(info);
        let Some(queries) = self.architecture().interleaved_queries(name) else {
            return self.load(info, Cow::Borrowed(bytes), device);
        };
        let (heads, rows) = (self.heads(queries)?, info.shape.first().copied().unwrap_or(0));
        if !rows::fits(rows, heads) {
            return Err(self.error(format!("tensor {name}: {heads} heads do not divide its {rows} rows")));
        }
        self.load(info, Cow::Owned(rows::restored(bytes, rows, heads)), device)
    }

    /// Loads a tensor dequantised to `dtype`, with norm weights as in Hugging Face.
    pub(in crate::models) fn numbers(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let info = self.wanted(name)?;
        let tensor = self.stored(name, info, device)?.dequantize(device)?;
        let tensor = match self.architecture().added(name) {
            0.0 => tensor,
            added => (tensor - added)?,
        };
        if let Some((at, value)) = first_non_finite(&tensor)? {
            return Err(self.error(format!("tensor {name}: value {at} is {value}")));
        }
        Ok(tensor.to_dtype(dtype)?)
    }

    /// The entry of the tensor that Hugging Face calls `name`.
    fn wanted(&self, name: &str) -> Result<&TensorInfo> {
        let theirs = self.architecture().to_gguf(name);
        theirs.as_deref().and_then(|theirs| self.info(theirs)).ok_or_else(|| {
            let theirs = theirs.map(|theirs| format!(" ({theirs} in GGUF)")).unwrap_or_default();
            self.error(format!("there is no tensor {name}{theirs}"))
        })
    }

    fn check_shape(&self, name: &str, info: &TensorInfo, shape: &[usize]) -> Result<()> {
        match info.shape == shape {
            true => Ok(()),
            false => {
                Err(self.error(format!("tensor {name}: expected shape {shape:?}, got {:?}", info.shape)))
            }
        }
    }
}

fn is_quantized(kind: GgmlDType) -> bool {
    !matches!(kind, GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16)
}

impl QuantizedSource for Gguf {
    fn get(&self, wanted: &Wanted) -> Result<Option<QuantizedWeight>> {
        let info = self.wanted(wanted.name)?;
        if !is_quantized(info.kind) {
            return Ok(None);
        }
        let (rows, columns) = wanted.shape;
        self.check_shape(wanted.name, info, &[rows, columns])?;
        if let Some(block) = blocks::first_non_finite(self.bytes(info), info.kind) {
            let reason = format!("tensor {}: the scale of block {block} is NaN or infinite", wanted.name);
            return Err(self.error(reason));
        }
        let tensor = self.stored(wanted.name, info, wanted.device)?;
        Ok(Some(QuantizedWeight::new(Arc::new(tensor), wanted.dtype)?))
    }
}

impl SimpleBackend for Gguf {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        self.wanted(name).and_then(|info| self.check_shape(name, info, shape.dims()))?;
        Ok(self.numbers(name, dtype, device)?)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        Ok(self.numbers(name, dtype, device)?)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.wanted(name).is_ok()
    }
}
