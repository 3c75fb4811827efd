//! The frozen linear layer under the adapters.

use candle_core::{DType, Device, Tensor};
use candle_nn::{Linear, Module};

use super::context::Context;
use super::pass::Pass;
use crate::error::{Error, Result};
use crate::ops::{self, Weight};

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
/// use monteclora::{AdaptableLinear, BaseLinear, Pass};
///
/// let weight = Tensor::ones((6, 32), DType::F32, &Device::Cpu)?;
/// let blocks = Arc::new(QTensor::quantize(&weight, GgmlDType::Q4_0)?);
/// let base = BaseLinear::new(QuantizedWeight::new(blocks, DType::F32)?, None);
/// assert_eq!((base.kind(), base.bytes()), ("q4_0".to_string(), 6 * 18));
///
/// let layer = AdaptableLinear::new("block.proj", base);
/// let ys = layer.forward(&Tensor::ones((1, 32), DType::F32, &Device::Cpu)?, &Pass::Mean.into())?;
/// assert_eq!(ys.dims(), [1, 6]);
/// # Ok::<(), monteclora::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct BaseLinear {
    weight: Weight,       // (out, in)
    bias: Option<Tensor>, // (out)
}

impl BaseLinear {
    /// Creates a layer from `weight`, `(out, in)`, and `bias`, `(out)`.
    pub fn new(weight: impl Into<Weight>, bias: Option<Tensor>) -> Self {
        Self { weight: weight.into(), bias }
    }

    /// Returns `(in_dim, out_dim)`.
    ///
    /// # Errors
    /// If the weight is not a matrix.
    pub fn dims(&self) -> Result<(usize, usize)> {
        let (out_dim, in_dim) = self.weight.dims2()?;
        Ok((in_dim, out_dim))
    }

    /// The weight.
    pub fn weight(&self) -> &Weight {
        &self.weight
    }

    /// The bias.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// The dtype of the weight; for a quantised weight, the dtype of its dequantised rows.
    pub fn dtype(&self) -> DType {
        self.weight.dtype()
    }

    /// The device of the weight.
    pub fn device(&self) -> &Device {
        self.weight.device()
    }

    /// The storage format of the weight: its dtype, such as `bf16`, or the kind of its blocks, such as `q4k`.
    pub fn kind(&self) -> String {
        self.weight.kind()
    }

    /// The size of the weight in bytes.
    pub fn bytes(&self) -> usize {
        self.weight.bytes()
    }

    /// Returns the dense weight, or `None` if the weight is quantised.
    pub fn dense(&self) -> Option<&Tensor> {
        self.weight.dense()
    }

    /// Returns the dense weight, for a caller (`who`, named in the error) that cannot work on a quantised one.
    ///
    /// # Errors
    /// If the weight is quantised.
    pub(crate) fn require_dense(&self, who: &str) -> Result<&Tensor> {
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
        Ok(Linear::new(self.weight.dequantize()?, self.bias.clone()))
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
        match &self.weight {
            Weight::Quantized(weight) if cx.only_predicts && !matches!(cx.pass, Pass::Train { .. }) => {
                ops::quantized_linear(&xs.detach(), weight, self.bias(), cx.path)
            }
            weight => weight.linear_by_blocks(xs, self.bias(), cx.path),
        }
    }

    /// Returns the layer with detached weights: no gradient reaches them.
    pub(crate) fn frozen(&self) -> Self {
        Self { weight: self.weight.detach(), bias: self.bias().map(Tensor::detach) }
    }
}

impl From<Linear> for BaseLinear {
    fn from(layer: Linear) -> Self {
        Self::new(layer.weight(), layer.bias().cloned())
    }
}

impl Module for BaseLinear {
    fn forward(&self, xs: &Tensor) -> candle_core::Result<Tensor> {
        self.forward_in(xs, &Pass::Mean.into())
    }
}
