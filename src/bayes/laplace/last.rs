//! The last linear layer of a model. Its input is computed from the gradient of its weight, without a hook in
//! the model.
//!
//! ```text
//! f = W phi + b,   df_k / dW_k = phi
//! ```
//!
//! For c classes, take c examples and sum logit k of example k over k: row k of the weight's gradient is then
//! phi of example k. One backward pass thus gives the inputs of c examples.

use candle_core::{DType, Device, Tensor, Var};

use crate::adapter::{Params, Pass};
use crate::bayes::linearised::{BatchRecord, LayerRecord};
use crate::data::batch::Batch;
use crate::error::{Error, Result};
use crate::models::sequence::output_layer;
use crate::predict::Predictor;

/// The last linear layer of a model's head, by its parameters in the store.
///
/// The backward passes run through every trainable parameter. Merge the adapters first
/// ([`crate::inject::merge`]), so that they stop at the head.
#[derive(Debug, Clone)]
pub struct LastLayer {
    path: String,
    weight: Var,
    bias: Option<Var>,
}

impl LastLayer {
    /// The layer with the weight `{path}.weight`, `(classes, dim)`, and, if there is one, the bias
    /// `{path}.bias`.
    ///
    /// # Errors
    /// If the store has no such weight, or it is not a matrix.
    pub fn new(params: &Params, path: &str) -> Result<Self> {
        let weight = params.require(&format!("{path}.weight"))?;
        weight.var.dims2()?;
        let bias = params.get(&format!("{path}.bias")).map(|bias| bias.var);
        Ok(Self { path: path.to_string(), weight: weight.var, bias })
    }

    /// The last layer of a sequence classifier's head, under Hugging Face's names: `classifier.out_proj` for
    /// RoBERTa and ELECTRA, `classifier` for the other encoders, `score` for LLaMA.
    ///
    /// # Errors
    /// If the store has none of these weights.
    pub fn of_head(params: &Params) -> Result<Self> {
        Self::new(params, output_layer(params)?)
    }

    /// The weight with the bias as its last column: one parameter, `(classes, dim + 1)`.
    pub(super) fn parameters(&self) -> Result<Vec<(String, Tensor)>> {
        let weight = self.weight.as_detached_tensor();
        let whole = match &self.bias {
            Some(bias) => Tensor::cat(&[&weight, &bias.as_detached_tensor().unsqueeze(1)?], 1)?,
            None => weight,
        };
        Ok(vec![(self.path.clone(), whole)])
    }

    /// Records one batch: the outputs, and the layer's inputs and output gradients.
    ///
    /// # Errors
    /// If the outputs are not this layer's, W phi + b.
    pub(super) fn record(&self, model: &dyn Predictor, batch: &Batch) -> Result<BatchRecord> {
        let outputs = model.predict(batch, &Pass::Mean.into())?;
        let (examples, classes) = outputs.dims2()?;
        let features = self.features(&outputs)?; // (b, d)
        let (_, whole) = self.parameters()?.remove(0);
        let inputs = match self.bias {
            Some(_) => {
                let one = Tensor::ones((examples, 1), features.dtype(), features.device())?;
                Tensor::cat(&[&features, &one], 1)?
            }
            None => features,
        };
        self.check(&inputs.matmul(&whole.t()?)?, &outputs)?;
        let (dtype, device) = (inputs.dtype(), inputs.device());
        let unit = Tensor::eye(classes, dtype, device)?;
        let gradient = |k| unit.narrow(0, k, 1)?.unsqueeze(0)?.broadcast_as((examples, 1, classes));
        let gradients = (0..classes).map(gradient).collect::<candle_core::Result<Vec<_>>>()?;
        let layer = LayerRecord { inputs: inputs.unsqueeze(1)?, gradients, tokens: examples as f64 };
        BatchRecord::new(&outputs, vec![layer])
    }

    /// The layer's input, `(b, dim)`.
    fn features(&self, outputs: &Tensor) -> Result<Tensor> {
        let (examples, classes) = outputs.dims2()?;
        let eye = Tensor::eye(classes, outputs.dtype(), outputs.device())?;
        let mut features = Vec::new();
        for start in (0..examples).step_by(classes) {
            let count = classes.min(examples - start);
            let own = (outputs.narrow(0, start, count)? * eye.narrow(0, 0, count)?)?.sum_all()?;
            let grads = own.backward()?;
            let Some(grad) = grads.get(&self.weight) else {
                let reason = "the outputs give it no gradient";
                return Err(Error::tensor(format!("{}.weight", self.path), reason));
            };
            features.push(grad.detach().narrow(0, 0, count)?);
        }
        Ok(Tensor::cat(&features, 0)?)
    }

    fn check(&self, linear: &Tensor, outputs: &Tensor) -> Result<()> {
        let host = |xs: &Tensor| xs.detach().to_device(&Device::Cpu)?.to_dtype(DType::F64);
        let outputs = host(outputs)?;
        let far = (host(linear)? - &outputs)?.abs()?.max_all()?.to_scalar::<f64>()?;
        let size = outputs.abs()?.max_all()?.to_scalar::<f64>()?;
        if far <= 1e-3 * (1.0 + size) {
            return Ok(());
        }
        let reason = format!("the outputs are not W phi + b of this layer: {far:e} apart");
        Err(Error::tensor(format!("{}.weight", self.path), reason))
    }
}
