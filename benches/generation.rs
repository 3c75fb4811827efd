//! Greedy generation on the CPU, one row, 32 tokens after a prompt of 16: the base model, and the same model
//! with adapters on all of its linear layers, unmerged and merged. The model is a LLaMA of RoBERTa-base's
//! width (12 layers x 768) with random weights.
//!
//! `cargo bench --bench generation`.

#[path = "../examples/common/allocator.rs"]
mod allocator;

use candle_core::Device;
use criterion::{criterion_group, criterion_main, Criterion};
use monteclora::adapter::Role;
use monteclora::adapters::LoraConfig;
use monteclora::inject::{self, merge, Targets};
use monteclora::models::decoder::{DecoderConfig, DecoderForCausalLM};
use monteclora::models::generate::{generate, GenerateConfig, PosteriorWeights};
use monteclora::{MonteCLoRAConfig, Noise, Params};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

fn config() -> Outcome<DecoderConfig> {
    Ok(DecoderConfig::from_value(serde_json::json!({
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 768, "num_hidden_layers": 12,
        "num_attention_heads": 12, "num_key_value_heads": 12, "intermediate_size": 2048,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    }))?)
}

/// Creates a model with frozen random weights: the detached values of a store.
fn base(config: &DecoderConfig) -> Outcome<DecoderForCausalLM> {
    let all = Params::new(Noise::new(1), &Device::Cpu);
    DecoderForCausalLM::load(all.var_builder(None, Role::Base), config, Noise::new(0))?;
    let weights = all.all().into_iter().map(|(name, param)| (name, param.var.as_detached_tensor()));
    let vb = candle_nn::VarBuilder::from_tensors(weights.collect(), candle_core::DType::F32, &Device::Cpu);
    Ok(DecoderForCausalLM::load(vb, config, Noise::new(0))?)
}

fn run(c: &mut Criterion) -> Outcome<()> {
    let config = config()?;
    let targets = Targets::parse("all-linear")?;
    let params = || Params::new(Noise::new(2), &Device::Cpu);
    let plain = base(&config)?;
    let mut lora = base(&config)?;
    inject::lora(&mut lora, &targets, &LoraConfig::default(), &params())?;
    let mut bayes = base(&config)?;
    inject::monteclora(&mut bayes, &targets, &MonteCLoRAConfig::default(), &params())?;
    let mut merged = base(&config)?;
    inject::monteclora(&mut merged, &targets, &MonteCLoRAConfig::default(), &params())?;
    merge::merge(&mut merged)?;

    let contenders = [
        ("base", &plain, PosteriorWeights::Mean),
        ("lora", &lora, PosteriorWeights::Mean),
        ("monteclora mean", &bayes, PosteriorWeights::Mean),
        ("monteclora merged", &merged, PosteriorWeights::Mean),
        ("monteclora draw", &bayes, PosteriorWeights::Draw(0)),
        ("monteclora average of 4", &bayes, PosteriorWeights::Average(4)),
    ];
    let prompt = vec![(0..16u32).map(|i| 3 + i * 97).collect::<Vec<_>>()];
    let mut group = c.benchmark_group("cpu/generate 32 tokens");
    group.sample_size(10);
    for (name, model, weights) in contenders {
        let config = GenerateConfig { max_new_tokens: 32, weights, ..Default::default() };
        group.bench_function(name, |b| {
            b.iter(|| generate(model, &prompt, &config, &mut |_, _| true).expect("tokens"))
        });
    }
    group.finish();
    Ok(())
}

fn all(c: &mut Criterion) {
    allocator::tune_allocator();
    run(c).expect("a benchmark");
}

criterion_group!(benches, all);
criterion_main!(benches);
