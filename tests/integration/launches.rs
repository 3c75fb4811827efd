//! The launches, copies and synchronisations of a training step, as counted by the emulated device
//! (`tests/emulator`). A real device does not count, so nothing is tested on it.

use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use monteclora::adapter::{AdaptableModel, Context, Params, Pass, Role};
use monteclora::adapters::LoraConfig;
use monteclora::inject::{self, Targets};
use monteclora::models::causal::CausalLm;
use monteclora::models::decoder::DecoderConfig;
use monteclora::models::roberta::{RobertaConfig, RobertaForSequenceClassification};
use monteclora::optim::{clip_grad_norm, AdamW, AdamWConfig, Gradients};
use monteclora::{cuda_device, ops, MonteCLoRAConfig, Noise, Regularizer, Tape};

use crate::support::decoders::{frozen_on, toy_json};
use crate::support::{skipped, Outcome};

/// The requests of this thread to the device so far.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Counts {
    launches: i64,
    products: i64,
    copies: i64,
    memsets: i64,
    synchronizations: i64,
}

impl Counts {
    /// Returns `None` on a device that does not count.
    fn now() -> Outcome<Option<Self>> {
        let Some(folder) = std::env::var_os("EMULATOR_COUNTS").map(PathBuf::from) else { return Ok(None) };
        let thread = std::fs::read_link("/proc/thread-self")?;
        let bytes = std::fs::read(folder.join(thread.file_name().ok_or("a thread")?))?;
        let (words, _) = bytes.as_chunks::<8>();
        let [launches, products, copies, memsets, synchronizations, ..] =
            words.iter().map(|word| i64::from_ne_bytes(*word)).collect::<Vec<_>>()[..]
        else {
            return Err("five counts".into());
        };
        Ok(Some(Self { launches, products, copies, memsets, synchronizations }))
    }

    fn combine(self, other: Self, f: impl Fn(i64, i64) -> i64) -> Self {
        Self {
            launches: f(self.launches, other.launches),
            products: f(self.products, other.products),
            copies: f(self.copies, other.copies),
            memsets: f(self.memsets, other.memsets),
            synchronizations: f(self.synchronizations, other.synchronizations),
        }
    }

    /// The number of items queued on a device: kernels and products.
    fn queued(self) -> i64 {
        self.launches + self.products
    }
}

/// A model with its loss on one batch.
trait Step {
    fn model(&mut self) -> &mut dyn AdaptableModel;
    fn loss(&self, cx: &Context) -> candle_core::Result<Tensor>;
}

struct Encoder(RobertaForSequenceClassification, [Tensor; 2]);

impl Step for Encoder {
    fn model(&mut self) -> &mut dyn AdaptableModel {
        &mut self.0
    }

    fn loss(&self, cx: &Context) -> candle_core::Result<Tensor> {
        let [ids, mask] = &self.1;
        let labels = Tensor::new(&[0i64, 1], &Device::Cpu)?;
        ops::cross_entropy(&self.0.forward(ids, None, mask, cx)?, &labels, -100, cx.path)
    }
}

struct Decoder<M>(M, [Tensor; 2]);

impl<M: CausalLm> Step for Decoder<M> {
    fn model(&mut self) -> &mut dyn AdaptableModel {
        &mut self.0
    }

    fn loss(&self, cx: &Context) -> candle_core::Result<Tensor> {
        let [ids, mask] = &self.1;
        let hidden = self.0.hidden(ids, mask, None, cx)?.flatten_to(1)?;
        let targets: Vec<i64> = (0..hidden.dim(0)? as i64).map(|i| 3 + i % 40).collect();
        self.0.token_loss(&hidden, &Tensor::new(targets, &Device::Cpu)?, cx)
    }
}

/// Two rows of eight tokens, without padding.
fn batch(device: &Device) -> Outcome<[Tensor; 2]> {
    let ids: Vec<u32> = (0..16).map(|i| 3 + i * 7 % 40).collect();
    Ok([Tensor::from_vec(ids, (2, 8), device)?, Tensor::ones((2, 8), DType::U8, device)?])
}

fn encoder(layers: usize, dtype: DType, device: &Device) -> Outcome<(Encoder, Params)> {
    let config: RobertaConfig = serde_json::from_value(serde_json::json!({
        "model_type": "roberta", "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": layers,
        "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 40,
        "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1,
    }))?;
    let base = Params::new(Noise::new(5), &Device::Cpu);
    let vb = base.var_builder(None, Role::Base);
    RobertaForSequenceClassification::load(vb.clone(), vb, &config, Noise::new(0))?;
    let frozen = base.all().into_iter().map(|(name, param)| (name, param.var.as_detached_tensor())).collect();
    let frozen = VarBuilder::from_tensors(frozen, dtype, device);
    let params = Params::new(Noise::new(6), device);
    let head = params.var_builder(Some(frozen.clone()), Role::Head);
    let model = RobertaForSequenceClassification::load(frozen, head, &config, Noise::new(0))?;
    Ok((Encoder(model, batch(device)?), params))
}

fn decoder(layers: usize, dtype: DType, device: &Device) -> Outcome<(Decoder<impl CausalLm>, Params)> {
    let mut json = toy_json(true);
    json["num_hidden_layers"] = layers.into();
    let (model, params) = frozen_on(device, &DecoderConfig::from_value(json)?, dtype)?;
    Ok((Decoder(model, batch(device)?), params))
}

/// The counts of the third step.
fn counts(
    mut step: impl Step,
    params: &Params,
    targets: &str,
    bayes: Option<&MonteCLoRAConfig>,
) -> Outcome<Option<Counts>> {
    let targets = Targets::parse(targets)?;
    match bayes {
        Some(config) => inject::monteclora(step.model(), &targets, config, params)?,
        None => inject::lora(step.model(), &targets, &LoraConfig::default(), params)?,
    };
    let regularizer = bayes.map(|config| Regularizer::new(config).for_training(params, 100)).transpose()?;
    let mut optimizer = AdamW::new(params, AdamWConfig::default())?;
    let mut before = None;
    for draw in 0..3 {
        before = Counts::now()?;
        let tape = Tape::default();
        let cx = Context::from(Pass::Train { draw }).with_tape(&tape);
        let mut loss = step.loss(&cx)?;
        if let Some(regularizer) = &regularizer {
            loss = (loss + regularizer.for_model(step.model(), &cx)?.total)?;
        }
        let mut grads = Gradients::new();
        grads.backward(params, &loss, &tape)?;
        clip_grad_norm(&mut grads, 1e-3)?; // every step clips
        optimizer.step(&grads, 1e-4)?;
        assert!(loss.to_scalar::<f32>()?.is_finite());
    }
    Ok(Counts::now()?.zip(before).map(|(after, before)| after.combine(before, |a, b| a - b)))
}

/// The counts for `layers` layers, extrapolated from two and four layers.
fn extended(layers: i64, of: impl Fn(usize) -> Outcome<Option<Counts>>) -> Outcome<Option<Counts>> {
    let (two, four) = (of(2)?, of(4)?);
    Ok(two.zip(four).map(|(two, four)| two.combine(four, |two, four| two + (four - two) / 2 * (layers - 2))))
}

#[test]
fn a_step_keeps_its_budget_of_launches() -> Outcome {
    let device = cuda_device(0)?;
    Tensor::zeros(1, DType::F32, &device)?; // a thread's count begins with its first call
    if Counts::now()?.is_none() {
        skipped("this device does not count its launches");
        return Ok(());
    }
    let mut over = Vec::new();
    // With a bf16 base, adapters are split into bf16 parts: some more launches for each adapted layer.
    for (dtype, budgets) in [(DType::F32, [900, 2900]), (DType::BF16, [995, 3750])] {
        let roberta = |bayes: Option<&MonteCLoRAConfig>| {
            extended(12, |layers| {
                let (step, params) = encoder(layers, dtype, &device)?;
                counts(step, &params, "query,key,value", bayes)
            })
        };
        let llama = |bayes: Option<&MonteCLoRAConfig>| {
            extended(28, |layers| {
                let (step, params) = decoder(layers, dtype, &device)?;
                counts(step, &params, "all-linear", bayes)
            })
        };
        let (paper, calibrated) = (MonteCLoRAConfig::paper(), MonteCLoRAConfig::calibrated());
        let all = |of: &dyn Fn(Option<&MonteCLoRAConfig>) -> Outcome<Option<Counts>>| -> Outcome<_> {
            Ok([of(None)?, of(Some(&paper))?, of(Some(&calibrated))?])
        };
        let found =
            [("RoBERTa, 12 layers, q, k, v", all(&roberta)?), ("LLaMA, 28 layers, all linear", all(&llama)?)];
        for ((name, [lora, paper, calibrated]), most) in found.into_iter().zip(budgets) {
            for (method, bayes, most_ratio) in [("paper", paper, 1.02), ("calibrated", calibrated, 1.05)] {
                let (Some(lora), Some(bayes)) = (lora, bayes) else { return Err("counts".into()) };
                let ratio = bayes.queued() as f64 / lora.queued() as f64;
                let found =
                    format!("{name}, {dtype:?}: LoRA {lora:?}, {method} {bayes:?}, {ratio:.3} of LoRA's");
                println!("{found}");
                if bayes.queued() > most || ratio > most_ratio {
                    over.push(found);
                }
            }
        }
    }
    assert!(over.is_empty(), "over the budget:\n{}", over.join("\n"));
    Ok(())
}
