//! The allocator settings of a training program; the benches use this file too.

/// Keeps freed memory in the process. Candle allocates every intermediate result anew, and by default glibc
/// returns large blocks to the system each time: a million page faults per training step.
#[allow(unsafe_code)] // mallopt only sets allocator options
pub fn tune_allocator() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    unsafe {
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
    }
}
