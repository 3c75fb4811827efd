//! The output of the examples. Writing may fail: a pager was quit, `| head` has ended, the disk behind
//! standard output is full. A run continues nevertheless, whereas `println!` would panic.

use std::fmt::{Arguments, Debug, Write as _};
use std::io::{self, ErrorKind, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Whether writing to standard output has failed.
static LOST: AtomicBool = AtomicBool::new(false);

/// Whether this process prints nothing because another one does.
static HUSHED: AtomicBool = AtomicBool::new(false);

/// Suppresses all further output, except for the error that ends the process.
pub fn hush() {
    HUSHED.store(true, Ordering::Relaxed);
}

/// Whether [`hush`] was called.
fn is_hushed() -> bool {
    HUSHED.load(Ordering::Relaxed)
}

/// Prints a line to standard output, formatted as by `println!`.
macro_rules! tell {
    ($($text:tt)*) => { $crate::common::output::line(format_args!($($text)*)) };
}

/// Prints a line to standard error.
macro_rules! tell_err {
    ($($text:tt)*) => { $crate::common::output::error_line(format_args!($($text)*)) };
}

pub(crate) use {tell, tell_err};

/// Prints a line to standard output. If that fails, the run continues without output; the failure is reported
/// once on standard error, unless the reader has closed the pipe.
pub fn line(text: Arguments) {
    if LOST.load(Ordering::Relaxed) || is_hushed() {
        return;
    }
    let mut out = io::stdout().lock();
    if let Err(error) = writeln!(out, "{text}").and_then(|()| out.flush()) {
        LOST.store(true, Ordering::Relaxed);
        if error.kind() != ErrorKind::BrokenPipe {
            tell_err!("standard output cannot be written ({error}): the run goes on without it");
        }
    }
}

/// Prints lines of a result to standard output. Unlike [`line`], whose text comments on a run, this fails if they
/// cannot be written: the result would be lost.
pub fn result(text: &str) -> monteclora::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}").and_then(|()| out.flush()).map_err(monteclora::Error::io("standard output"))
}

/// Prints a line to standard error, if possible.
pub fn error_line(text: Arguments) {
    if !is_hushed() {
        last_line(text);
    }
}

/// Prints the error that ends the process.
pub fn last_line(text: Arguments) {
    writeln!(io::stderr(), "{text}").ok();
}

/// Prints the library's warnings to standard error.
pub fn hear_warnings() {
    // Fails if another subscriber is set.
    tracing::subscriber::set_global_default(Warnings).ok();
}

/// Prints the warnings of this crate, but not of its dependencies.
struct Warnings;

impl Subscriber for Warnings {
    fn enabled(&self, metadata: &Metadata) -> bool {
        metadata.is_event() && *metadata.level() <= Level::WARN && metadata.target().starts_with("monteclora")
    }
    fn event(&self, event: &Event) {
        struct Message(String);
        impl Visit for Message {
            fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
                if field.name() == "message" {
                    write!(self.0, "{value:?}").ok();
                }
            }
        }
        let mut message = Message(String::new());
        event.record(&mut message);
        tell_err!("warning: {}", message.0);
    }
    // Spans are not enabled.
    fn new_span(&self, _: &Attributes) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}
