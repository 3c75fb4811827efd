//! The frozen linear layer under the adapters.

use candle_core::{DType, Device, Tensor};
use candle_nn::{Linear, Module};

use super::context::Context;
use super::pass::Pass;
use crate::error::{Error, Result};
use crate::ops::{self, QuantizedWeight};

/// A frozen linear layer, `y = W0 x + b`, with a dense or a quantised weight.
///
/// # Example
/// A base layer from a user's own weight, quantised to four bits:
/// ```
/// use std::sync::Arc;
///
/// use candle_core::quantized::{GgmlDType, QTensor};
/// use candle_core::{DType, Device, Tensor};
/// use monteclora::ops::QuantizedWeight;
/// use monteclora::{AdaptableLinear, BaseLinear, Pass, QuantizedLinear};
///
/// let weight = Tensor::ones((6, 32), DType::F32, &Device::Cpu)?;
/// let blocks = Arc::new(QTensor::quantize(&weight, GgmlDType::Q4_0)?);
/// let base: BaseLinear = QuantizedLinear::new(QuantizedWeight::new(blocks, DType::F32)?, None).into();
/// assert_eq!((base.kind(), base.bytes()), ("q4_0".to_string(), 6 * 18));
///
/// let layer = AdaptableLinear::new("block.proj", base);
/// let ys = layer.forward(&Tensor::ones((1, 32), DType::F32, &Device::Cpu)?, &Pass::Mean.into())?;
/// assert_eq!(ys.dims(), [1, 6]);
/// # Ok::<(), monteclora::Error>(())
/// ```
#[derive(Debug, Clone)]
pub enum BaseLinear {
    /// A dense weight.
    Dense(Linear),
    /// A quantised weight, in blocks of a few bits per number.
    Quantized(QuantizedLinear),
}

/// A linear layer whose weight is quantised.
#[derive(Debug, Clone)]
pub struct QuantizedLinear {
    weight: QuantizedWeight,
    bias: Option<Tensor>, // (out)
}

impl QuantizedLinear {
    /// Creates a layer from `weight`, `(out, in)`, and `bias`, `(out)`.
    pub fn new(weight: QuantizedWeight, bias: Option<Tensor>) -> Self {
        Self { weight, bias }
    }

    /// The weight.
    pub fn weight(&self) -> &QuantizedWeight {
        &self.weight
    }

    /// The bias.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }
}

impl BaseLinear {
    /// Returns `(in_dim, out_dim)`.
    ///
    /// # Errors
    /// If the weight is not a matrix.
    pub fn dims(&self) -> Result<(usize, usize)> {
        let (out_dim, in_dim) = match self {
            Self::Dense(layer) => layer.weight().dims2()?,
            Self::Quantized(layer) => layer.weight.dims(),
        };
        Ok((in_dim, out_dim))
    }

    /// The bias.
    pub fn bias(&self) -> Option<&Tensor> {
        match self {
            Self::Dense(layer) => layer.bias(),
            Self::Quantized(layer) => layer.bias(),
        }
    }

    /// The dtype of the weight; for a quantised weight, the dtype of its dequantised rows.
    pub fn dtype(&self) -> DType {
        match self {
            Self::Dense(layer) => layer.weight().dtype(),
            Self::Quantized(layer) => layer.weight.dtype(),
        }
    }

    /// The device of the weight.
    pub fn device(&self) -> &Device {
        match self {
            Self::Dense(layer) => layer.weight().device(),
            Self::Quantized(layer) => layer.weight.device(),
        }
    }

    /// The storage format of the weight: its dtype, such as `bf16`, or the kind of its blocks, such as `q4k`.
    pub fn kind(&self) -> String {
        match self {
            Self::Dense(layer) => layer.weight().dtype().as_str().to_string(),
            Self::Quantized(layer) => layer.weight.kind(),
        }
    }

    /// The size of the weight in bytes.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Dense(layer) => layer.weight().elem_count() * layer.weight().dtype().size_in_bytes(),
            Self::Quantized(layer) => layer.weight.bytes(),
        }
    }

    /// Returns candle's linear layer, or `None` if the weight is quantised.
    pub fn dense(&self) -> Option<&Linear> {
        match self {
            Self::Dense(layer) => Some(layer),
            Self::Quantized(_) => None,
        }
    }

    /// Returns the dense layer, for a caller (`who`, named in the error) that cannot work on a quantised one.
    ///
    /// # Errors
    /// If the weight is quantised.
    pub(crate) fn require_dense(&self, who: &str) -> Result<&Linear> {
        self.dense().ok_or_else(|| {
            let reason = format!(
                "{who} needs the weight's own numbers, and this base is quantised ({}): load the model without \
                 quantising it",
                self.kind()
            );
            Error::config("quantize", reason)
        })
    }

    /// Returns the layer with a dense weight; a quantised weight is dequantised as a whole.
    ///
    /// # Errors
    /// If candle fails.
    pub fn dequantize(&self) -> candle_core::Result<Linear> {
        match self {
            Self::Dense(layer) => Ok(layer.clone()),
            Self::Quantized(layer) => Ok(Linear::new(layer.weight.dequantize()?, layer.bias.clone())),
        }
    }

    /// Computes the layer's output as one operation, differentiable in `xs` (and in a tracked dense weight).
    ///
    /// # Shapes
    /// - `xs`: `(.., in_dim)`
    /// - output: `(.., out_dim)`, the dtype of `xs`
    ///
    /// # Errors
    /// If shapes or dtypes do not fit.
    pub fn forward_in(&self, xs: &Tensor, cx: &Context) -> candle_core::Result<Tensor> {
        match self {
            Self::Dense(layer) => ops::linear(xs, layer.weight(), layer.bias(), cx.path),
            Self::Quantized(layer) if cx.only_predicts && !matches!(cx.pass, Pass::Train { .. }) => {
                ops::quantized_linear(&xs.detach(), &layer.weight, layer.bias(), cx.path)
            }
            Self::Quantized(layer) => {
                ops::quantized_linear_by_blocks(xs, &layer.weight, layer.bias(), cx.path)
            }
        }
    }

    /// Returns the layer with detached weights: no gradient reaches them.
    pub(crate) fn frozen(&self) -> Self {
        let bias = self.bias().map(Tensor::detach);
        match self {
            Self::Dense(layer) => Self::Dense(Linear::new(layer.weight().detach(), bias)),
            Self::Quantized(layer) => Self::Quantized(QuantizedLinear::new(layer.weight.clone(), bias)),
        }
    }
}

impl From<Linear> for BaseLinear {
    fn from(layer: Linear) -> Self {
        Self::Dense(layer)
    }
}

impl From<QuantizedLinear> for BaseLinear {
    fn from(layer: QuantizedLinear) -> Self {
        Self::Quantized(layer)
    }
}

impl Module for BaseLinear {
    fn forward(&self, xs: &Tensor) -> candle_core::Result<Tensor> {
        self.forward_in(xs, &Pass::Mean.into())
    }
}
