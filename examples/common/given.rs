//! The command line as it was given: options that a run does not read are told, not passed over.

use clap::parser::ValueSource;
use clap::{ArgMatches, CommandFactory, FromArgMatches};

use super::output::{hear_warnings, tell_err};

/// The options, and which of them were given.
pub fn parse<T: CommandFactory + FromArgMatches>() -> (T, Given) {
    hear_warnings();
    let matches = T::command().get_matches();
    match T::from_arg_matches(&matches) {
        Ok(args) => (args, Given(matches)),
        Err(error) => error.format(&mut T::command()).exit(),
    }
}

/// What stood on the command line.
pub struct Given(ArgMatches);

impl Given {
    /// Whether the option stood there: `checkpoint_every` for `--checkpoint-every`.
    pub fn has(&self, option: &str) -> bool {
        self.0.value_source(option) == Some(ValueSource::CommandLine)
    }

    /// Says of each of these options that was given that it changes nothing, and why. A default changes nothing
    /// by right.
    pub fn without_effect(&self, options: &[&str], why: &str) {
        for option in options.iter().filter(|option| self.has(option)) {
            tell_err!("warning: --{} has no effect: {why}", option.replace('_', "-"));
        }
    }
}
