//! The code that the examples share: devices, the allocator, progress bars, bundled files, adapters on disk.

#![allow(dead_code)] // each example uses only a part

pub mod allocator;
pub mod download;
pub mod given;
pub mod interrupt;
pub mod log;
pub mod options;
pub mod output;
pub mod processes;
pub mod tasks;
pub mod training;
pub mod watch;

pub use allocator::tune_allocator;

use std::io::ErrorKind;
use std::path::Path;
use std::process::ExitCode;

use candle_core::{DType, Device};
use indicatif::{ProgressBar, ProgressStyle};
use monteclora::data::encode::fit_vocabulary;
use monteclora::data::tokenizer;
use monteclora::models::hub::ModelFiles;
use output::tell_err;
use tokenizers::Tokenizer;

/// The result type of the examples.
pub type Outcome<T = ()> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Turns an example's result into an exit code, and prints the error.
pub fn exit(outcome: Outcome) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => match error.downcast_ref() {
            Some(monteclora::Error::Interrupted { .. }) => {
                tell_err!("{error}");
                interrupt::exit_code()
            }
            // Whoever read the result has seen enough.
            Some(monteclora::Error::Io { source, .. }) if source.kind() == ErrorKind::BrokenPipe => {
                ExitCode::SUCCESS
            }
            _ => {
                output::last_line(format_args!("error: {error}"));
                ExitCode::FAILURE
            }
        },
    }
}

/// Parses `cpu`, `cuda` or `cuda:N`.
pub fn device(text: &str) -> Outcome<Device> {
    match text.split_once(':').unwrap_or((text, "0")) {
        ("cpu", _) => Ok(Device::Cpu),
        ("cuda", index) => {
            let index = index.parse().map_err(|_| format!("--device {text}: expected cuda:N"))?;
            Ok(monteclora::cuda_device(index)?)
        }
        _ => Err(format!("--device: expected cpu, cuda or cuda:N, got {text}").into()),
    }
}

/// Parses `f32`, `bf16` or `f16`.
pub fn dtype(text: &str) -> Outcome<DType> {
    match text {
        "f32" => Ok(DType::F32),
        "bf16" => Ok(DType::BF16),
        "f16" => Ok(DType::F16),
        _ => Err(format!("--dtype: expected f32, bf16 or f16, got {text}").into()),
    }
}

/// Resets the peak memory of the process, so that each of several methods gets its own. If the system does
/// not support this, a later method's peak includes those of the methods before it.
pub fn reset_peak_memory() {
    #[cfg(target_os = "linux")]
    std::fs::write("/proc/self/clear_refs", "5").ok();
}

/// Creates a progress bar on standard error.
pub fn progress(length: u64, name: &str) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix} {wide_bar} {pos}/{len} {elapsed}<{eta} {msg}");
    let bar = ProgressBar::new(length).with_prefix(name.to_string());
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// The path of a bundled folder. The published package does not contain them.
pub fn asset(name: &str) -> Outcome<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/assets").join(name);
    if path.is_dir() {
        Ok(path.display().to_string())
    } else {
        Err(format!(
            "{}: the bundled files are in the repository, not in the package: clone it, or give --model and --data",
            path.display()
        )
        .into())
    }
}

/// Loads the tokenizer of a model with a vocabulary of this size.
pub fn tokenizer(files: &ModelFiles, vocab_size: usize) -> Outcome<Tokenizer> {
    Ok(fit_vocabulary(tokenizer::of_model(files)?, vocab_size)?)
}
