//! The price of one training step, method by method, on random weights of a model's geometry.
//!
//! `cargo run --release --example throughput -- --config CONFIG.json --batch 8 --length 128
//! --rank 8 --targets query,key,value --method lora,monteclora --steps 12`
//!
//! The methods alternate step by step in one process, so that their ratio is fair on a noisy
//! machine; each method's peak memory comes from a process of its own.

mod common;

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use clap::Parser;
use common::Outcome;
use monteclora::adapters::LoraConfig;
use monteclora::files;
use monteclora::inject::{self, Targets};
use monteclora::models::roberta::{RobertaConfig, RobertaForSequenceClassification};
use monteclora::noise::Noise;
use monteclora::ops;
use monteclora::params::{Params, Role};
use monteclora::slot::Pass;
use monteclora::train::{clip_grad_norm, peak_rss_bytes, AdamW, AdamWConfig, Gradients};
use monteclora::{MonteCLoRAConfig, Regularizer};
use serde_json::{json, Value};

#[derive(Parser)]
#[command(args_override_self = true)]
struct Args {
    /// A `config.json` of the RoBERTa or BERT family.
    #[arg(long)]
    config: PathBuf,
    #[arg(long, default_value_t = 8)]
    batch: usize,
    #[arg(long, default_value_t = 128)]
    length: usize,
    #[arg(long, default_value_t = 8)]
    rank: usize,
    #[arg(long, default_value = "query,key,value")]
    targets: String,
    /// Any of lora, monteclora and full, separated by commas.
    #[arg(long, default_value = "lora,monteclora")]
    method: String,
    /// Mixture components N of MonteCLoRA.
    #[arg(long, default_value_t = 4)]
    num_components: usize,
    /// Counted steps of each method; two more warm up.
    #[arg(long, default_value_t = 12)]
    steps: usize,
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Where to write the table as JSON.
    #[arg(long)]
    output: Option<PathBuf>,
}

/// One method on its own copy of the model.
struct Contender {
    name: String,
    model: RobertaForSequenceClassification,
    regularizer: Option<Regularizer>,
    params: Params,
    optimizer: AdamW,
    seconds: [Vec<f64>; 3], // forward, backward, optimiser
}

impl Contender {
    fn new(name: &str, args: &Args, device: &Device) -> Outcome<Self> {
        let config = RobertaConfig::from_file(&args.config)?;
        let random = Params::new(Noise::new(1), device);
        let vb = random.var_builder(None, Role::Base);
        let load = |vb: VarBuilder<'static>, head| {
            RobertaForSequenceClassification::load(vb, head, &config, Noise::new(2))
        };
        let (mut model, params) = match name {
            "full" => (load(vb.clone(), vb)?, random),
            _ => {
                load(vb.clone(), vb)?; // fills the store
                let weights = random.all().into_iter().map(|(name, p)| (name, p.var.as_detached_tensor()));
                let frozen = VarBuilder::from_tensors(weights.collect(), DType::F32, device);
                let params = Params::new(Noise::new(3), device);
                let head = params.var_builder(Some(frozen.clone()), Role::Head);
                (load(frozen, head)?, params)
            }
        };
        let targets = Targets::parse(&args.targets)?;
        let mut regularizer = None;
        match name {
            "full" => {}
            "lora" => {
                let config = LoraConfig { rank: args.rank, ..LoraConfig::default() };
                inject::lora(&mut model, &targets, &config, &params)?;
            }
            "monteclora" => {
                let components = args.num_components;
                let config =
                    MonteCLoRAConfig { rank: args.rank, num_components: components, ..Default::default() };
                inject::monteclora(&mut model, &targets, &config, &params)?;
                regularizer = Some(Regularizer::new(&config));
            }
            other => return Err(format!("--method: expected lora, monteclora or full, got {other}").into()),
        }
        let optimizer = AdamW::new(&params, AdamWConfig::default())?;
        Ok(Self { name: name.into(), model, regularizer, params, optimizer, seconds: Default::default() })
    }

    fn step(&mut self, ids: &Tensor, mask: &Tensor, labels: &Tensor, draw: u64) -> Outcome {
        let pass = Pass::Train { draw };
        let start = Instant::now();
        let logits = self.model.forward(ids, None, mask, &pass)?;
        let mut loss = ops::cross_entropy(&logits, labels, -100)?;
        if let Some(regularizer) = &self.regularizer {
            loss = (loss + regularizer.for_model(&self.model, &pass)?.total)?;
        }
        loss.to_dtype(DType::F32)?.to_scalar::<f32>()?; // waits for the device
        let forward = Instant::now();
        let mut grads = Gradients::new();
        grads.accumulate(&self.params, &loss.backward()?)?;
        clip_grad_norm(&mut grads, 1.0)?;
        let backward = Instant::now();
        self.optimizer.step(&grads, 1e-4)?;
        ids.device().synchronize()?;
        let spans = [forward - start, backward - forward, backward.elapsed()];
        self.seconds.iter_mut().zip(spans).for_each(|(all, span)| all.push(span.as_secs_f64()));
        Ok(())
    }

    fn row(&self, args: &Args, peak_rss_mb: Option<f64>) -> Value {
        let steps: Vec<f64> =
            (0..self.seconds[0].len()).map(|i| self.seconds.iter().map(|spans| spans[i]).sum()).collect();
        let [forward, backward, optimizer] = self.seconds.clone().map(median);
        let step = median(steps);
        json!({
            "method": self.name, "step_seconds_median": step, "forward_seconds_median": forward,
            "backward_seconds_median": backward, "optimizer_seconds_median": optimizer,
            "tokens_per_second": (args.batch * args.length) as f64 / step,
            "peak_rss_mb": peak_rss_mb, "trainable_parameters": self.params.trainable_count(),
        })
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    (values[(n - 1) / 2] + values[n / 2]) / 2.0
}

fn main() -> ExitCode {
    common::exit(run())
}

fn run() -> Outcome {
    common::tune_allocator();
    let args = Args::parse();
    if args.steps == 0 || args.batch == 0 || args.length == 0 {
        return Err("--steps, --batch and --length must be at least 1".into());
    }
    let device = common::device(&args.device)?;
    let names: Vec<&str> = args.method.split(',').map(str::trim).collect();
    let mut contenders =
        names.iter().map(|name| Contender::new(name, &args, &device)).collect::<Outcome<Vec<_>>>()?;
    let ids: Vec<u32> = (0..args.batch * args.length).map(|i| 5 + (i * 7919 % 1000) as u32).collect();
    let ids = Tensor::from_vec(ids, (args.batch, args.length), &device)?;
    let mask = Tensor::ones((args.batch, args.length), DType::U8, &device)?;
    let labels: Vec<i64> = (0..args.batch as i64).map(|i| i % 2).collect();
    let labels = Tensor::from_vec(labels, args.batch, &device)?;
    for step in 0..args.steps + 2 {
        for contender in &mut contenders {
            contender.step(&ids, &mask, &labels, step as u64)?;
            if step < 2 {
                contender.seconds.iter_mut().for_each(Vec::clear);
            }
        }
    }
    let mut rows = Vec::new();
    for contender in &contenders {
        let peak = match contenders.len() {
            1 => peak_rss_bytes().map(|bytes| bytes as f64 / 1e6),
            _ => Some(alone(&contender.name)?),
        };
        rows.push(contender.row(&args, peak));
    }
    let table = json!({ "ratios": ratios(&rows), "rows": rows });
    println!("{}", serde_json::to_string_pretty(&table)?);
    if let Some(path) = &args.output {
        files::write(path, serde_json::to_string_pretty(&table)?.as_bytes())?;
    }
    Ok(())
}

/// The peak memory (MB) of one method, measured by this program in a process of its own.
fn alone(method: &str) -> Outcome<f64> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("alone.json");
    let last = ["--method", method, "--steps", "3", "--output", path.to_str().ok_or("path")?];
    let arguments = std::env::args().skip(1).chain(last.map(str::to_string)); // the last one counts
    let output = Command::new(std::env::current_exe()?).args(arguments).output()?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned().into());
    }
    let table: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
    table["rows"][0]["peak_rss_mb"].as_f64().ok_or_else(|| "peak memory is unknown on this system".into())
}

/// Every method's step time and memory over LoRA's.
fn ratios(rows: &[Value]) -> Value {
    let Some(lora) = rows.iter().find(|row| row["method"] == "lora") else {
        return json!({});
    };
    let over = |row: &Value, key: &str| Some(row[key].as_f64()? / lora[key].as_f64()?);
    let entries = rows.iter().filter(|row| row["method"] != "lora").map(|row| {
        let name = format!("{}/lora", row["method"].as_str().unwrap_or_default());
        (name, json!({ "time": over(row, "step_seconds_median"), "memory": over(row, "peak_rss_mb") }))
    });
    Value::Object(entries.collect())
}
