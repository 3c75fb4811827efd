//! One method on its own copy of a model with random weights: what the throughput example times.

use std::collections::btree_map::{BTreeMap, Entry};
use std::path::Path;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use monteclora::adapter::{AdaptableModel, Context, Params, Pass, Role};
use monteclora::adapters::LoraConfig;
use monteclora::inject::{self, Targets};
use monteclora::models::causal::CausalLm;
use monteclora::models::llama::{LlamaConfig, LlamaForCausalLM};
use monteclora::models::roberta::{RobertaConfig, RobertaForSequenceClassification};
use monteclora::noise::Noise;
use monteclora::ops;
use monteclora::optim::{clip_grad_norm, AdamW, AdamWConfig, Gradients};
use monteclora::{Error, MonteCLoRAConfig, Regularizer, Tape};
use serde_json::Value;

use super::Outcome;

// Sizes of a step. No doc comment, which clap would take for the program's description.
#[derive(clap::Args, Clone)]
#[command(next_help_heading = "Geometry")]
pub struct Geometry {
    /// Rows of a step.
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Tokens of a row.
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
    /// Layers of the model. Default: as in the configuration.
    #[arg(long)]
    num_layers: Option<usize>,
    /// Keep each layer's input alone and compute the layer again in backward.
    #[arg(long)]
    checkpoint_layers: bool,
}

impl Geometry {
    /// The tokens of a step.
    pub fn tokens(&self) -> usize {
        self.batch * self.length
    }
}

enum Model {
    Encoder(Box<RobertaForSequenceClassification>),
    Decoder(Box<LlamaForCausalLM>),
}

impl Model {
    /// Reads the configuration, and makes the model of the given tensors.
    fn load(json: &Value, base: VarBuilder<'static>, head: VarBuilder<'static>) -> Outcome<Self> {
        Ok(if json["model_type"] == "llama" {
            let config = LlamaConfig::from_value(json.clone())?;
            Self::Decoder(Box::new(LlamaForCausalLM::load(base, &config, Noise::new(2))?))
        } else {
            let config: RobertaConfig = serde_json::from_value(json.clone())?;
            let model = RobertaForSequenceClassification::load(base, head, &config, Noise::new(2))?;
            Self::Encoder(Box::new(model))
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

    /// The loss of full rows: their classes, or their next tokens.
    fn loss(&self, ids: &Tensor, mask: &Tensor, cx: &Context) -> candle_core::Result<Tensor> {
        let (batch, length) = ids.dims2()?;
        match self {
            Self::Encoder(model) => {
                let labels: Vec<i64> = (0..batch as i64).map(|i| i % 2).collect();
                let labels = Tensor::from_vec(labels, batch, ids.device())?;
                ops::cross_entropy(&model.forward(ids, None, mask, cx)?, &labels, -100, cx.path)
            }
            Self::Decoder(model) => {
                let hidden = model.hidden(ids, mask, None, cx)?.narrow(1, 0, length - 1)?.flatten_to(1)?;
                let next = ids.narrow(1, 1, length - 1)?.flatten_all()?.to_dtype(DType::I64)?;
                model.token_loss(&hidden, &next, cx)
            }
        }
    }
}

/// One method on its own copy of the model.
pub struct Contender {
    name: String,
    model: Model,
    regularizer: Option<Regularizer>,
    params: Params,
    optimizer: AdamW,
    batch: (Tensor, Tensor), // ids and mask, (b, t)
    seconds: [Vec<f64>; 3],  // forward, backward, optimiser
    device_bytes: Option<u64>,
}

impl Contender {
    pub fn new(
        name: &str,
        config: &Path,
        geometry: &Geometry,
        dtype: DType,
        device: &Device,
    ) -> Outcome<Self> {
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
        let random = Params::new(Noise::new(1), device);
        let vb = random.var_builder(None, Role::Base);
        let mut model = Model::load(&json, vb.clone(), vb)?;
        let mut params = random.clone();
        if name != "full" {
            let frozen = random
                .all()
                .into_iter()
                .map(|(name, p)| Ok((name, p.var.as_detached_tensor().to_dtype(dtype)?)));
            let frozen = frozen.collect::<candle_core::Result<_>>()?;
            let frozen = VarBuilder::from_tensors(frozen, dtype, device);
            params = Params::new(Noise::new(3), device);
            let head = params.var_builder(Some(frozen.clone()), Role::Head);
            model = Model::load(&json, frozen, head)?;
        }
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
        let ids = Tensor::from_vec(ids, (batch, length), device)?;
        let mask = Tensor::ones((batch, length), DType::U8, device)?;
        let optimizer = AdamW::new(&params, AdamWConfig::default())?;
        let (name, seconds) = (name.to_string(), Default::default());
        Ok(Self {
            name,
            model,
            regularizer,
            params,
            optimizer,
            batch: (ids, mask),
            seconds,
            device_bytes: None,
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Seconds of forward, backward (with clipping) and optimiser, of each step.
    pub fn seconds(&self) -> &[Vec<f64>; 3] {
        &self.seconds
    }

    /// Forgets the times so far.
    pub fn forget(&mut self) {
        self.seconds.iter_mut().for_each(Vec::clear);
    }

    pub fn trainable_parameters(&self) -> usize {
        self.params.trainable_count()
    }

    /// The most memory (MB) that was in use on the device between forward and backward, where it has
    /// its own.
    pub fn peak_device_mb(&self) -> Option<f64> {
        self.device_bytes.map(|bytes| bytes as f64 / 1e6)
    }

    /// One training step.
    pub fn step(&mut self, draw: u64) -> Outcome {
        let (tape, (ids, mask)) = (Tape::default(), &self.batch);
        let cx = Context::from(Pass::Train { draw }).with_tape(&tape);
        let start = Instant::now();
        let mut loss = self.model.loss(ids, mask, &cx)?.to_dtype(DType::F32)?;
        if let Some(regularizer) = &self.regularizer {
            loss = (loss + regularizer.for_model(self.model.adaptable(), &cx)?.total)?;
        }
        loss.to_scalar::<f32>()?; // waits for the device
        let forward = Instant::now();
        self.device_bytes = self.device_bytes.max(super::device_bytes_in_use(ids.device()));
        let mut grads = Gradients::new();
        grads.backward(&self.params, &loss, &tape)?;
        clip_grad_norm(&mut grads, 1.0)?;
        let backward = Instant::now();
        self.optimizer.step(&grads, 1e-4)?;
        ids.device().synchronize()?;
        let spans = [forward - start, backward - forward, backward.elapsed()];
        self.seconds.iter_mut().zip(spans).for_each(|(all, span)| all.push(span.as_secs_f64()));
        Ok(())
    }

    /// The matrix products of a step with frozen weights and without adapters: of every linear layer
    /// `x W^T` forward and `dY W` backward. Attention's own products and a vocabulary's are left out.
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
            let weight = layer.base().weight().detach().to_dtype(dtype)?;
            products.push((input(in_dim)?, weight.t()?));
            products.push((input(out_dim)?, weight));
            Ok(())
        })?;
        Ok(products)
    }
}
