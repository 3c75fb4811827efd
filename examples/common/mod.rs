//! What the examples share: device, allocator, progress.

#![allow(dead_code)] // each example uses its own part

use candle_core::Device;
use indicatif::{ProgressBar, ProgressStyle};

/// Reads `cpu`, `cuda` or `cuda:N`.
pub fn device(text: &str) -> Result<Device, String> {
    match text.split_once(':').unwrap_or((text, "0")) {
        ("cpu", _) => Ok(Device::Cpu),
        ("cuda", index) => {
            let index = index.parse().map_err(|_| format!("--device {text}: expected cuda:N"))?;
            Device::new_cuda(index).map_err(|e| format!("--device {text}: {e}"))
        }
        _ => Err(format!("--device: expected cpu, cuda or cuda:N, got {text}")),
    }
}

/// Keeps freed memory in the process. Candle allocates every intermediate anew, and by default
/// glibc returns large blocks to the system each time: a million page faults a training step.
#[allow(unsafe_code)] // mallopt only sets allocator options
pub fn tune_allocator() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    unsafe {
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
    }
}

/// A progress bar on standard error.
pub fn progress(length: u64, name: &str) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix} {wide_bar} {pos}/{len} {elapsed}<{eta} {msg}");
    let bar = ProgressBar::new(length).with_prefix(name.to_string());
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
