//! SIGINT, SIGTERM and SIGUSR1 (which launchers pass on to all processes, and batch systems send before a job's time
//! is over): the first asks the run to stop after its step, the second ends it at once.
//! SIGHUP stays as it is, so that `nohup` works: it ends the process, and the newest checkpoint stands.

use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::output::tell_err;
use super::Outcome;

/// The signal that came, 0 before.
static SIGNAL: AtomicUsize = AtomicUsize::new(0);

/// Begins to listen.
#[cfg(unix)]
pub fn listen() -> Outcome {
    use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
    use signal_hook::iterator::Signals;

    let mut signals = Signals::new([SIGINT, SIGTERM, SIGUSR1])?;
    std::thread::spawn(move || {
        for number in signals.forever() {
            if SIGNAL.swap(number as usize, Ordering::Relaxed) != 0 {
                // Without destructors, which another thread may still need.
                signal_hook::low_level::exit(128 + number);
            }
            tell_err!("stopping as soon as nothing is lost by it; once more to stop at once");
        }
    });
    Ok(())
}

/// Elsewhere a signal ends the process, and the newest checkpoint stands.
#[cfg(not(unix))]
pub fn listen() -> Outcome {
    Ok(())
}

/// Whether the run is to stop.
pub fn requested() -> bool {
    SIGNAL.load(Ordering::Relaxed) != 0
}

/// Stops between two parts of a run that have nothing to save.
pub fn check(step: usize) -> monteclora::Result<()> {
    if requested() {
        Err(monteclora::Error::Interrupted { step })
    } else {
        Ok(())
    }
}

/// The exit status of a run that a signal stopped: 130, 143 and 138.
pub fn exit_code() -> ExitCode {
    ExitCode::from(128 + SIGNAL.load(Ordering::Relaxed) as u8)
}
