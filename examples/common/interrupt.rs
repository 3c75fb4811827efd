//! SIGINT and SIGTERM: the first asks the run to stop after its step, the second ends it at once.

use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use super::Outcome;

/// The signal that came, 0 before.
fn signal() -> &'static Arc<AtomicUsize> {
    static SIGNAL: OnceLock<Arc<AtomicUsize>> = OnceLock::new();
    SIGNAL.get_or_init(Arc::default)
}

/// Begins to listen.
#[cfg(unix)]
pub fn listen() -> Outcome {
    use signal_hook::consts::{SIGINT, SIGTERM};
    use std::sync::atomic::AtomicBool;

    let again = Arc::new(AtomicBool::new(false));
    for number in [SIGINT, SIGTERM] {
        // In this order: the first signal finds the flag down.
        signal_hook::flag::register_conditional_shutdown(number, 128 + number, again.clone())?;
        signal_hook::flag::register(number, again.clone())?;
        signal_hook::flag::register_usize(number, signal().clone(), number as usize)?;
    }
    Ok(())
}

/// Elsewhere a signal ends the process, and the newest checkpoint stands.
#[cfg(not(unix))]
pub fn listen() -> Outcome {
    Ok(())
}

/// Whether the run is to stop.
pub fn requested() -> bool {
    signal().load(Ordering::Relaxed) != 0
}

/// Stops between two parts of a run that have nothing to save.
pub fn check(step: usize) -> monteclora::Result<()> {
    match requested() {
        true => Err(monteclora::Error::Interrupted { step }),
        false => Ok(()),
    }
}

/// The exit status of a run that a signal stopped: 130 and 143.
pub fn exit_code() -> ExitCode {
    ExitCode::from(128 + signal().load(Ordering::Relaxed) as u8)
}
