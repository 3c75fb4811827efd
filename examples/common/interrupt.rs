//! Handling of SIGINT, SIGTERM and SIGUSR1 (which launchers pass on to all processes, and batch systems send
//! before a job's time is over): the first signal asks the run to stop after its step, the second ends it at
//! once. SIGHUP is not handled, so that `nohup` works: it ends the process, and the newest checkpoint
//! remains.

use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::output::tell_err;
use super::Outcome;

/// The signal that was received; 0 if none.
static SIGNAL: AtomicUsize = AtomicUsize::new(0);

/// Installs the signal handlers.
#[cfg(unix)]
pub fn listen() -> Outcome {
    use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
    use signal_hook::iterator::Signals;

    let mut signals = Signals::new([SIGINT, SIGTERM, SIGUSR1])?;
    std::thread::spawn(move || {
        for number in signals.forever() {
            if SIGNAL.swap(number as usize, Ordering::Relaxed) != 0 {
                // Without running destructors, whose data another thread may still use.
                signal_hook::low_level::exit(128 + number);
            }
            tell_err!("stopping at the next safe point; signal again to stop immediately");
        }
    });
    Ok(())
}

/// On other systems a signal ends the process, and the newest checkpoint remains.
#[cfg(not(unix))]
pub fn listen() -> Outcome {
    Ok(())
}

/// Whether the run was asked to stop.
pub fn requested() -> bool {
    SIGNAL.load(Ordering::Relaxed) != 0
}

/// Stops a run at a point where there is nothing to save, if it was asked to stop.
pub fn check(step: usize) -> monteclora::Result<()> {
    if requested() {
        Err(monteclora::Error::Interrupted { step })
    } else {
        Ok(())
    }
}

/// The exit status of a run that was stopped by a signal: 130 (SIGINT), 143 (SIGTERM) or 138 (SIGUSR1).
pub fn exit_code() -> ExitCode {
    ExitCode::from(128 + SIGNAL.load(Ordering::Relaxed) as u8)
}
