//! The cost of one training step, method by method, on random weights of a model's geometry: the paper's
//! table 12 in one command.
//!
//! `cargo run --release --example throughput -- --config CONFIG.json --batch 8 --length 128
//! --rank 8 --targets query,key,value --method lora,monteclora --steps 12`
//!
//! The methods alternate step by step in one process, so that their ratio is fair on a noisy machine. The
//! matrix products of every linear layer on all tokens ("gemm") are timed before and after. The methods share
//! the frozen weights, which are made on the device. On the host, each method's peak memory comes from a
//! process of its own; on a device, from its own steps.

#![deny(clippy::print_stdout, clippy::print_stderr)] // use `tell!`: a closed pipe must not panic

#[path = "../common/mod.rs"]
mod common;
mod contender;
mod random_weights;

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use clap::Parser;
use common::output::tell;
use common::processes::{self, Processes};
use common::Outcome;
use contender::{Contender, Geometry};
use monteclora::metrics::median;
use monteclora::models::Quantization;
use monteclora::train::peak_rss_bytes;
use monteclora::util::files;
use monteclora::Error;
use random_weights::base;
use serde_json::{json, Value};

/// The cost of one training step, method by method, on random weights of a model's geometry. The methods
/// alternate step by step; on the CPU each one's peak memory comes from a process of its own.
#[derive(Parser)]
#[command(name = "throughput", version, args_override_self = true, after_help = EXAMPLES)]
struct Args {
    /// The `config.json` of an encoder or a decoder.
    #[arg(long, required_unless_present = "all_reduce")]
    config: Option<PathBuf>,
    /// Methods separated by commas: lora, monteclora, monteclora-calibrated or full.
    #[arg(long, default_value = "lora,monteclora")]
    method: String,
    /// Measured steps of each method, after two warm-up steps.
    #[arg(long, default_value_t = 12)]
    steps: usize,
    /// The device: cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// The dtype of the frozen base: f32, bf16 or f16.
    #[arg(long, default_value = "f32")]
    dtype: String,
    /// Quantise the frozen base: bf16, f16, q8_0, q6k, q5k, q4k, q3k, q2k, q5_1, q5_0, q4_1 or q4_0.
    #[arg(long)]
    quantize: Option<Quantization>,
    /// Skip the peak memory, which on the CPU takes three more steps of each method.
    #[arg(long)]
    no_memory: bool,
    /// Only time an all-reduce of this many numbers over all processes, --steps times: what a step of several
    /// processes adds.
    #[arg(long, value_name = "NUMBERS", conflicts_with = "config")]
    all_reduce: Option<usize>,
    /// The file to write the table to, as JSON.
    #[arg(long)]
    output: Option<PathBuf>,
    #[command(flatten)]
    geometry: Geometry,
}

const EXAMPLES: &str = "\
Examples:
  throughput --config CONFIG.json --batch 8 --length 128 --method lora,monteclora --steps 12
  throughput --config examples/assets/tiny-roberta/config.json --method full,lora --no-memory
  mpirun -n 4 throughput --all-reduce 12845056";

fn main() -> ExitCode {
    processes::run(run)
}

fn run(processes: &Processes) -> Outcome {
    common::tune_allocator();
    let (args, _) = common::given::parse::<Args>();
    if args.steps == 0 {
        return Err("--steps must be at least 1".into());
    }
    processes.join(&args.device)?;
    let (device, dtype) = (processes.device(&args.device)?, common::dtype(&args.dtype)?);
    let Some(config) = &args.config else {
        return all_reduce(args.all_reduce.unwrap_or(1), args.steps, &device, processes);
    };
    if processes.world() > 1 {
        return Err(
            "--config: steps are timed in one process; for several, --all-reduce times their sums".into()
        );
    }
    let names: Vec<&str> = args.method.split(',').map(str::trim).collect();
    let base = base(dtype, args.quantize, &device);
    let new = |name: &&str| Contender::new(name, config, &args.geometry, &base);
    let mut contenders = names.iter().map(new).collect::<Outcome<Vec<_>>>()?;
    // A single method is run for its peak memory, which the products would raise.
    let products = match contenders.len() {
        1 => Vec::new(),
        _ => contenders[0].products(&args.geometry, dtype, &device)?,
    };
    // Timed before and after, not in between: a step is slower after the products than after another step.
    let passes = |count: usize| (0..count).map(|_| time_of(&products, &device)).collect::<Outcome<Vec<_>>>();
    passes(1)?;
    let mut gemm = passes(args.steps.div_ceil(2))?;
    for step in 0..args.steps + 2 {
        for contender in &mut contenders {
            contender.step(step as u64)?;
            if step < 2 {
                contender.forget();
            }
        }
    }
    gemm.extend(passes(args.steps / 2)?);
    let gemm = (!products.is_empty()).then(|| median(&gemm));
    let mut rows: Vec<_> = contenders.iter().map(|contender| row(contender, &args.geometry, gemm)).collect();
    let write = |rows: &[Value]| -> Outcome<Value> {
        let table = json!({
            "rows": rows, "ratios": ratios(rows), "gemm_seconds_median": gemm, "machine": machine(&device),
        });
        if let Some(path) = &args.output {
            files::write_json(path, &table)?;
        }
        Ok(table)
    };
    if !args.no_memory && device.is_cpu() {
        write(&rows)?; // keeps the times if the rest is interrupted
        memory(&mut rows)?;
    }
    tell!("{}", serde_json::to_string_pretty(&write(&rows)?)?);
    Ok(())
}

/// Times the all-reduce of a training step.
fn all_reduce(numbers: usize, times: usize, device: &Device, processes: &Processes) -> Outcome {
    let communicator = processes.communicator();
    let flat = Tensor::zeros(numbers, DType::F32, device)?;
    let mut seconds = Vec::new();
    for _ in 0..times + 1 {
        communicator.barrier()?;
        let start = Instant::now();
        communicator.all_reduce_sum(&flat)?;
        device.synchronize()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    let (world, bytes) = (processes.world(), numbers * 4);
    // The bytes that each process sends in a ring, the minimum for any algorithm.
    let sent = 2 * (world - 1) * bytes / world;
    let table = json!({
        "processes": world, "bytes": bytes, "sent_by_each_at_least": sent, "seconds_median": median(&seconds[1..]),
    });
    tell!("{}", serde_json::to_string_pretty(&table)?);
    Ok(())
}

/// Adds each method's peak memory on the host: of this process if it is the only method, else of a process of
/// its own.
fn memory(rows: &mut [Value]) -> Outcome {
    if let [row] = rows {
        row["peak_rss_mb"] = peak_rss_bytes().map(|bytes| bytes as f64 / 1e6).into();
        return Ok(());
    }
    for row in rows {
        row["peak_rss_mb"] = alone(row["method"].as_str().unwrap_or_default())?.into();
    }
    Ok(())
}

/// Returns the time of the given matrix products, computed one after the other.
fn time_of(products: &[(Tensor, Tensor)], device: &Device) -> Outcome<f64> {
    let start = Instant::now();
    for (lhs, rhs) in products {
        lhs.matmul(rhs)?;
    }
    device.synchronize()?;
    Ok(start.elapsed().as_secs_f64())
}

fn row(contender: &Contender, geometry: &Geometry, gemm: Option<f64>) -> Value {
    let [forward, backward, optimizer] = contender.seconds().clone();
    let steps = forward.iter().zip(&backward).zip(&optimizer).map(|((f, b), o)| f + b + o);
    let step = median(&steps.collect::<Vec<f64>>());
    json!({
        "method": contender.name(), "step_seconds_median": step,
        "forward_seconds_median": median(&forward), "backward_seconds_median": median(&backward),
        "optimizer_seconds_median": median(&optimizer),
        "tokens_per_second": geometry.tokens() as f64 / step,
        "over_gemm": gemm.map(|gemm| step / gemm),
        "ready_seconds": contender.ready_seconds(),
        "weights_mb": contender.weights_mb(), "peak_rss_mb": null, "peak_device_mb": contender.peak_device_mb(),
        "trainable_parameters": contender.trainable_parameters(),
    })
}

/// Returns the peak memory (MB) of one method, measured by this program in a new process.
fn alone(method: &str) -> Outcome<f64> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("alone.json");
    let last = ["--method", method, "--steps", "1", "--output", path.to_str().ok_or("path")?];
    let arguments = std::env::args().skip(1).chain(last.map(str::to_string)); // later options override
    let output = Command::new(std::env::current_exe()?).args(arguments).output()?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned().into());
    }
    let table = std::fs::read(&path).map_err(Error::io(&*path))?;
    let table: Value = serde_json::from_slice(&table)?;
    table["rows"][0]["peak_rss_mb"].as_f64().ok_or_else(|| "peak memory is unknown on this system".into())
}

/// The ratios of every method's step time and memory to LoRA's.
fn ratios(rows: &[Value]) -> Value {
    let Some(lora) = rows.iter().find(|row| row["method"] == "lora") else {
        return json!({});
    };
    let over = |row: &Value, key: &str| Some(row[key].as_f64()? / lora[key].as_f64()?);
    let entries = rows.iter().filter(|row| row["method"] != "lora").map(|row| {
        let name = format!("{}/lora", row["method"].as_str().unwrap_or_default());
        let memory = over(row, "peak_device_mb").or_else(|| over(row, "peak_rss_mb"));
        (name, json!({ "time": over(row, "step_seconds_median"), "memory": memory }))
    });
    Value::Object(entries.collect())
}

fn machine(device: &Device) -> Value {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let of = |key: &str| info.lines().find(|line| line.starts_with(key))?.split_once(": ").map(|pair| pair.1);
    let flags: Vec<&str> = of("flags").unwrap_or_default().split(' ').collect();
    let vectors = ["avx512f", "avx2"].into_iter().find(|flag| flags.contains(flag));
    json!({
        "cpu": of("model name"), "threads": candle_core::utils::get_num_threads(), "vectors": vectors,
        "device": format!("{:?}", device.location()), "os": std::env::consts::OS,
    })
}
