//! The source of a model's weights: a candle `VarBuilder`, optionally with quantised matrices beside it.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use candle_core::{DType, Device};
use candle_nn::{Init, VarBuilder};

use super::placement::Placement;
use crate::adapter::BaseLinear;
use crate::error::{Error, Result};
use crate::ops::{QuantizedWeight, Weight};

/// A source of matrices that are quantised, or are quantised as they are fetched.
pub trait QuantizedSource: Send + Sync {
    /// Returns the requested matrix; `None` if it is not quantised, so that it comes from the builder beside
    /// this source.
    ///
    /// # Errors
    /// If it has another shape, or cannot be read.
    fn get(&self, wanted: &Wanted) -> Result<Option<QuantizedWeight>>;
}

/// A matrix that a model requests.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// The full name of the tensor, such as `model.layers.0.self_attn.q_proj.weight`.
    pub name: &'a str,
    /// `(rows, columns)`.
    pub shape: (usize, usize),
    /// Whether the rows are those of a vocabulary (an embedding, or the head over it). Otherwise the matrix
    /// is the weight of a linear layer.
    pub is_table: bool,
    /// The initialisation, if the parameter is new.
    pub init: Init,
    /// The dtype of the rows when they are dequantised.
    pub dtype: DType,
    /// The device to put it on.
    pub device: &'a Device,
}

/// A `VarBuilder` with an optional source of quantised matrices, both at the same name prefix.
///
/// It dereferences to the `VarBuilder`, which must know every name, to load other tensors and to check
/// whether a tensor exists. A `VarBuilder` alone converts with `.into()`, without a source of quantised
/// matrices.
#[derive(Clone)]
pub struct Weights<'a> {
    builder: VarBuilder<'a>,
    quantized: Option<Arc<dyn QuantizedSource + 'a>>,
    placement: Option<Placement>,
}

impl<'a> Weights<'a> {
    /// The tensors of `builder`, except for the matrices that `quantized` has.
    pub fn new(builder: VarBuilder<'a>, quantized: Arc<dyn QuantizedSource + 'a>) -> Self {
        Self { builder, quantized: Some(quantized), placement: None }
    }

    /// The same weights for a model whose layers are on several devices; only decoders support this. Tensors
    /// outside the layers stay on the builder's device, which must be the placement's first device.
    pub fn placed(self, placement: &Placement) -> Self {
        Self { placement: Some(placement.clone()), ..self }
    }

    /// The placement of `layers` layers: all on the builder's device, unless [`Self::placed`] was called.
    ///
    /// # Errors
    /// If the placement has another number of layers, or the builder is not on its first device.
    pub(super) fn placement(&self, layers: usize) -> Result<Placement> {
        let Some(placement) = &self.placement else {
            return Placement::new(&[(self.builder.device().clone(), layers)]);
        };
        if placement.len() != layers {
            let reason = format!("{} layers are placed, the model has {layers}", placement.len());
            return Err(Error::config("placement", reason));
        }
        if !placement.first().same_device(self.builder.device()) {
            let (first, own) = (placement.first().location(), self.builder.device().location());
            let reason =
                format!("expected the first device to be that of the weights, {own:?}, got {first:?}");
            return Err(Error::config("placement", reason));
        }
        Ok(placement.clone())
    }

    /// The same weights, loaded onto another device.
    pub(super) fn on(&self, device: &Device) -> Self {
        Self { builder: self.builder.clone().set_device(device.clone()), ..self.clone() }
    }

    /// Returns the builder alone, to train the weights directly.
    ///
    /// # Errors
    /// If matrices are quantised.
    pub fn into_dense(self) -> Result<VarBuilder<'a>> {
        match self.quantized {
            None => Ok(self.builder),
            Some(_) => {
                let reason =
                    "full fine-tuning cannot train a quantised base: use an adapter method, or load \
                              the model without quantising it";
                Err(Error::config("quantize", reason))
            }
        }
    }

    /// Returns whether matrices are quantised, or become so when they are fetched.
    pub fn is_quantized(&self) -> bool {
        self.quantized.is_some()
    }

    /// The same weights with `name` appended to the name prefix.
    pub fn pp(&self, name: impl ToString) -> Self {
        Self { builder: self.builder.pp(name), ..self.clone() }
    }

    /// The weights of a model's body, which checkpoints store with or without `prefix`: without it if they have
    /// the body's tensor `known` under its bare name.
    pub(super) fn body(&self, prefix: &str, known: &str) -> Self {
        if self.contains_tensor(known) {
            self.clone()
        } else {
            self.pp(prefix)
        }
    }

    /// Loads the table `weight` of a vocabulary, `(rows, columns)`: an embedding, or the head over it.
    ///
    /// # Errors
    /// If it is missing or of another shape.
    pub fn table(&self, shape: (usize, usize), init: Init) -> Result<Weight> {
        self.matrix(shape, true, init)
    }

    /// Loads a linear layer: `weight` (out, in) and, if it has one, `bias` (out). If the builder creates new
    /// parameters, the weight is normal with standard deviation `init_std` and the bias zero.
    ///
    /// # Errors
    /// If a tensor is missing or of another shape.
    pub fn linear(&self, in_dim: usize, out_dim: usize, init_std: f64, has_bias: bool) -> Result<BaseLinear> {
        let weight = self.matrix((out_dim, in_dim), false, Init::Randn { mean: 0.0, stdev: init_std })?;
        let bias = match has_bias {
            true => Some(self.builder.get_with_hints(out_dim, "bias", Init::Const(0.0))?),
            false => None,
        };
        Ok(BaseLinear::new(weight, bias))
    }

    fn matrix(&self, shape: (usize, usize), is_table: bool, init: Init) -> Result<Weight> {
        if let Some(source) = &self.quantized {
            let (dtype, device) = (self.builder.dtype(), self.builder.device());
            let name = match self.builder.prefix() {
                prefix if prefix.is_empty() => "weight".to_string(),
                prefix => format!("{prefix}.weight"),
            };
            if let Some(weight) = source.get(&Wanted { name: &name, shape, is_table, init, dtype, device })? {
                return Ok(weight.into());
            }
        }
        Ok(self.builder.get_with_hints(shape, "weight", init)?.into())
    }
}

impl fmt::Debug for Weights<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "Weights({:?}, quantized: {})", self.builder.prefix(), self.is_quantized())
    }
}

impl<'a> Deref for Weights<'a> {
    type Target = VarBuilder<'a>;

    fn deref(&self) -> &VarBuilder<'a> {
        &self.builder
    }
}

impl<'a> From<VarBuilder<'a>> for Weights<'a> {
    fn from(builder: VarBuilder<'a>) -> Self {
        Self { builder, quantized: None, placement: None }
    }
}

impl<'a> From<&Weights<'a>> for Weights<'a> {
    fn from(weights: &Weights<'a>) -> Self {
        weights.clone()
    }
}

impl<'a> From<&VarBuilder<'a>> for Weights<'a> {
    fn from(builder: &VarBuilder<'a>) -> Self {
        builder.clone().into()
    }
}
