//! A method on a model with random weights, as timed by the throughput example.

use std::collections::btree_map::{BTreeMap, Entry};
use std::path::Path;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use monteclora::adapter::{AdaptableModel, Context, Params, Pass, Role};
use monteclora::adapters::LoraConfig;
use monteclora::inject::{self, Targets};
use monteclora::models::causal::CausalLm;
use monteclora::models::decoder::{DecoderConfig, DecoderForCausalLM};
use monteclora::models::sequence::{SequenceClassifier, SequenceConfig};
use monteclora::models::Weights;
use monteclora::noise::Noise;
use monteclora::ops;
use monteclora::optim::{clip_grad_norm, AdamW, AdamWConfig, Gradients};
use monteclora::util::device::{peak_device_bytes, reset_peak_device_bytes};
use monteclora::{Error, MonteCLoRAConfig, Regularizer, Tape};
use serde_json::Value;

use super::random_weights::random_weights;
use crate::common::Outcome;

// Sizes of a step. Not a doc comment, which clap would take for the program's description.
#[derive(clap::Args, Clone)]
#[command(next_help_heading = "Geometry")]
pub struct Geometry {
    /// Rows per step.
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Tokens per row.
    #[arg(long, default_value_t = 128)]
    length: usize,
    /// Rank of the update.
    #[arg(long, default_value_t = 8)]
    rank: usize,
    /// Layers to adapt: names separated by commas, `all-linear` or `default`.
    #[arg(long, default_value = "default")]
    targets: String,
    /// Mixture components N of MonteCLoRA.
    #[arg(long, default_value_t = 4)]
    num_components: usize,
    /// The number of the model's layers. Default: as in the configuration.
    #[arg(long)]
    num_layers: Option<usize>,
    /// Keep only each layer's input and recompute the layer in the backward pass.
    #[arg(long)]
    checkpoint_layers: bool,
}

impl Geometry {
    /// The number of tokens per step.
    pub fn tokens(&self) -> usize {
        self.batch * self.length
    }
}

enum Model {
    Encoder(Box<dyn SequenceClassifier>),
    Decoder(Box<DecoderForCausalLM>),
}

impl Model {
    /// Creates the model of a configuration with the given tensors.
    fn load(json: &Value, base: Weights<'static>, head: VarBuilder<'static>) -> Outcome<Self> {
        Ok(if DecoderConfig::model_types().any(|known| json["model_type"] == known) {
            let config = DecoderConfig::from_value(json.clone())?;
            Self::Decoder(Box::new(DecoderForCausalLM::load(base, &config, Noise::new(2))?))
        } else {
            Self::Encoder(SequenceConfig::from_value(json, 2)?.load(base, head, Noise::new(2))?)
        })
    }

    fn adaptable(&self) -> &dyn AdaptableModel {
        match self {
            Self::Encoder(model) => &**model,
            Self::Decoder(model) => &**model,
        }
    }

    fn linears_mut(&mut self) -> &mut dyn AdaptableModel {
        match self {
            Self::Encoder(model) => &mut **model,
            Self::Decoder(model) => &mut **model,
        }
    }

    fn set_checkpoint_layers(&mut self, on: bool) {
        match self {
            Self::Encoder(model) => model.set_checkpoint_layers(on),
            Self::Decoder(model) => model.set_checkpoint_layers(on),
        }
    }

    /// The labels of full rows: their classes, or their next tokens; i64 on the host, as in any batch.
    fn labels(&self, ids: &[u32], length: usize) -> Vec<i64> {
        match self {
            Self::Encoder(_) => (0..(ids.len() / length) as i64).map(|row| row % 2).collect(),
            Self::Decoder(_) => {
                ids.chunks(length).flat_map(|row| &row[1..]).map(|id| i64::from(*id)).collect()
            }
        }
    }

    fn loss(&self, Batch { ids, mask, labels }: &Batch, cx: &Context) -> candle_core::Result<Tensor> {
        match self {
            Self::Encoder(model) => {
                let logits = model.logits(ids, &ids.zeros_like()?, mask, cx)?;
                ops::cross_entropy(&logits, labels, ops::IGNORED_LABEL, cx.path)
            }
            Self::Decoder(model) => {
                let before_last = ids.dim(1)? - 1;
                let hidden = model.hidden(ids, mask, None, cx)?.narrow(1, 0, before_last)?.flatten_to(1)?;
                model.token_loss(&hidden, labels, cx)
            }
        }
    }
}

struct Batch {
    ids: Tensor,    // (b, t)
    mask: Tensor,   // (b, t)
    labels: Tensor, // (b) or (b (t - 1)), on the host
}

/// One method on a model of its own, which shares its frozen weights with the others.
pub struct Contender {
    name: String,
    model: Model,
    regularizer: Option<Regularizer>,
    params: Params,
    optimizer: AdamW,
    batch: Batch,
    weight_bytes: usize,
    ready_seconds: f64,
    seconds: [Vec<f64>; 3], // forward, backward, optimiser
    device_bytes: Option<u64>,
}

impl Contender {
    /// Creates a method on the weights of `base`; full fine-tuning gets its own weights, in single precision.
    pub fn new(name: &str, config: &Path, geometry: &Geometry, base: &Weights<'static>) -> Outcome<Self> {
        let (start, device) = (Instant::now(), base.device());
        let Geometry { batch, length, rank, num_components, .. } = *geometry;
        if batch == 0 || length < 2 {
            return Err("--batch must be at least 1 and --length at least 2".into());
        }
        let text = std::fs::read(config).map_err(Error::io(config))?;
        let json = serde_json::from_slice(&text).map_err(|e| format!("--config {}: {e}", config.display()));
        let mut json: Value = json?;
        if let Some(layers) = geometry.num_layers {
            json["num_hidden_layers"] = layers.into();
        }
        let params = Params::new(Noise::new(3), device);
        let mut model = if name == "full" {
            let trained = params.var_builder(Some(random_weights(DType::F32, device)), Role::Base);
            Model::load(&json, trained.clone().into(), trained)?
        } else {
            Model::load(&json, base.clone(), params.var_builder(None, Role::Head))?
        };
        let linears = model.linears_mut();
        let mut weight_bytes = linears.embedding_mut().map_or(0, |embedding| embedding.words().bytes());
        linears.visit_linears(&mut |layer| {
            weight_bytes += layer.base().bytes();
            Ok(())
        })?;
        let targets = Targets::parse(&geometry.targets)?;
        let mut regularizer = None;
        match name {
            "full" => {}
            "lora" => {
                let config = LoraConfig { rank, ..LoraConfig::default() };
                inject::lora(model.linears_mut(), &targets, &config, &params)?;
            }
            "monteclora" | "monteclora-calibrated" => {
                let preset =
                    if name == "monteclora" { MonteCLoRAConfig::paper } else { MonteCLoRAConfig::calibrated };
                let config = MonteCLoRAConfig { rank, num_components, ..preset() };
                inject::monteclora(model.linears_mut(), &targets, &config, &params)?;
                regularizer = Some(Regularizer::new(&config).for_training(&params, batch)?);
            }
            other => {
                let known = "lora, monteclora, monteclora-calibrated or full";
                return Err(format!("--method: expected {known}, got {other}").into());
            }
        }
        model.set_checkpoint_layers(geometry.checkpoint_layers);
        let vocabulary = json["vocab_size"].as_u64().unwrap_or(1000).min(1000) as usize;
        if vocabulary <= 5 {
            return Err(format!("vocab_size: expected more than 5, got {vocabulary}").into());
        }
        let ids: Vec<u32> = (0..batch * length).map(|i| (5 + i * 7919 % (vocabulary - 5)) as u32).collect();
        let batch = Batch {
            labels: Tensor::new(model.labels(&ids, length), &Device::Cpu)?,
            ids: Tensor::from_vec(ids, (batch, length), device)?,
            mask: Tensor::ones((batch, length), DType::U8, device)?,
        };
        let optimizer = AdamW::new(&params, AdamWConfig::default())?;
        device.synchronize()?;
        Ok(Self {
            name: name.to_string(),
            model,
            regularizer,
            params,
            optimizer,
            batch,
            weight_bytes,
            ready_seconds: start.elapsed().as_secs_f64(),
            seconds: Default::default(),
            device_bytes: None,
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The seconds until the model was ready; for the first contender, with the time to make the weights.
    pub fn ready_seconds(&self) -> f64 {
        self.ready_seconds
    }

    /// The seconds of forward, backward (with clipping) and optimiser, for each step.
    pub fn seconds(&self) -> &[Vec<f64>; 3] {
        &self.seconds
    }

    /// Clears the times so far.
    pub fn forget(&mut self) {
        self.seconds.iter_mut().for_each(Vec::clear);
    }

    /// The size (MB) of the linear layers and the word embedding, which a tied head shares.
    pub fn weights_mb(&self) -> f64 {
        self.weight_bytes as f64 / 1e6
    }

    pub fn trainable_parameters(&self) -> usize {
        self.params.trainable_count()
    }

    /// The peak memory (MB) in use on a CUDA device during this method's steps, including the adapters and
    /// optimiser states of the other methods.
    pub fn peak_device_mb(&self) -> Option<f64> {
        self.device_bytes.map(|bytes| bytes as f64 / 1e6)
    }

    /// Takes one training step.
    pub fn step(&mut self, draw: u64) -> Outcome {
        let (tape, device) = (Tape::default(), self.batch.ids.device());
        let cx = Context::from(Pass::Train { draw }).with_tape(&tape);
        reset_peak_device_bytes(device);
        let start = Instant::now();
        let mut loss = self.model.loss(&self.batch, &cx)?;
        if let Some(regularizer) = &self.regularizer {
            loss = (loss + regularizer.for_model(self.model.adaptable(), &cx)?.total)?;
        }
        loss.to_scalar::<f32>()?; // waits for the device
        let forward = Instant::now();
        let mut grads = Gradients::new();
        grads.backward(&self.params, &loss, &tape)?;
        clip_grad_norm(&mut grads, 1.0)?;
        let backward = Instant::now();
        self.optimizer.step(&grads, 1e-4)?;
        device.synchronize()?;
        self.device_bytes = self.device_bytes.max(peak_device_bytes(device));
        let spans = [forward - start, backward - forward, backward.elapsed()];
        self.seconds.iter_mut().zip(spans).for_each(|(all, span)| all.push(span.as_secs_f64()));
        Ok(())
    }

    /// The operands of a step's matrix products with frozen weights and without adapters: `x W^T` forward and
    /// `dY W` backward for every linear layer. The products within attention and with the vocabulary are left
    /// out.
    pub fn products(
        &self,
        geometry: &Geometry,
        dtype: DType,
        device: &Device,
    ) -> Outcome<Vec<(Tensor, Tensor)>> {
        let (mut products, mut inputs) = (Vec::new(), BTreeMap::new());
        let mut input = |width: usize| -> candle_core::Result<Tensor> {
            match inputs.entry(width) {
                Entry::Occupied(entry) => Ok(Tensor::clone(entry.get())),
                Entry::Vacant(entry) => {
                    Ok(entry.insert(Tensor::ones((geometry.tokens(), width), dtype, device)?).clone())
                }
            }
        };
        self.model.adaptable().visit_linears(&mut |layer| {
            let (in_dim, out_dim) = layer.dims()?;
            let weight = layer.base().dequantize()?.weight().detach().to_dtype(dtype)?;
            products.push((input(in_dim)?, weight.t()?));
            products.push((input(out_dim)?, weight));
            Ok(())
        })?;
        Ok(products)
    }
}
