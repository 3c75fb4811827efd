//! What an example says. Nobody may be there to hear it: a pager that was quit, `| head`, a full disk behind
//! standard output. That ends no run, and `println!` would panic.

use std::fmt::{Arguments, Debug, Write as _};
use std::io::{self, ErrorKind, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Whether standard output could not be written.
static LOST: AtomicBool = AtomicBool::new(false);

/// Whether another process says it all.
static HUSHED: AtomicBool = AtomicBool::new(false);

/// Says nothing from now on but the error that ends the process.
pub fn hush() {
    HUSHED.store(true, Ordering::Relaxed);
}

/// Whether [`hush`] was called.
fn is_hushed() -> bool {
    HUSHED.load(Ordering::Relaxed)
}

/// Says a line on standard output, as `println!` formats it.
macro_rules! tell {
    ($($text:tt)*) => { $crate::common::output::line(format_args!($($text)*)) };
}

/// Says a line on standard error.
macro_rules! tell_err {
    ($($text:tt)*) => { $crate::common::output::error_line(format_args!($($text)*)) };
}

pub(crate) use {tell, tell_err};

/// A line on standard output. Where it cannot be written, that is told once on standard error, or not at all if
/// the reader has gone, and the run goes on in silence.
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

/// A line on standard error, where that can be written.
pub fn error_line(text: Arguments) {
    if !is_hushed() {
        last_line(text);
    }
}

/// The error that ends the process.
pub fn last_line(text: Arguments) {
    writeln!(io::stderr(), "{text}").ok();
}

/// Has the library's warnings said on standard error.
pub fn hear_warnings() {
    // Refused where somebody listens already.
    tracing::subscriber::set_global_default(Warnings).ok();
}

/// Says the warnings of this crate, and nothing of those below it.
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
