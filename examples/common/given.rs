//! The command line as given, to warn about options that a run does not read.

use clap::parser::ValueSource;
use clap::{ArgMatches, CommandFactory, FromArgMatches};

use super::output::{hear_warnings, tell_err};

/// Parses the options, and records which of them were given.
pub fn parse<T: CommandFactory + FromArgMatches>() -> (T, Given) {
    hear_warnings();
    let matches = T::command().get_matches();
    match T::from_arg_matches(&matches) {
        Ok(args) => (args, Given(matches)),
        Err(error) => error.format(&mut T::command()).exit(),
    }
}

/// The parsed command line.
pub struct Given(ArgMatches);

impl Given {
    /// Whether the option was given: `checkpoint_every` for `--checkpoint-every`.
    pub fn has(&self, option: &str) -> bool {
        self.0.value_source(option) == Some(ValueSource::CommandLine)
    }

    /// Warns for each option of `T` that was given that it has no effect, and why, but for those that are `read`,
    /// names separated by blanks.
    pub fn reads_only<T: CommandFactory>(&self, read: &str, why: &str) {
        let all = T::command();
        let options = all.get_arguments().map(|option| option.get_id().as_str());
        let unread: Vec<&str> =
            options.filter(|option| !read.split_whitespace().any(|read| read == *option)).collect();
        self.without_effect(&unread, why);
    }

    /// Warns for each of these options that was given that it has no effect, and why. Default values cause no
    /// warning.
    pub fn without_effect(&self, options: &[&str], why: &str) {
        for option in options.iter().filter(|option| self.has(option)) {
            tell_err!("warning: --{} has no effect: {why}", option.replace('_', "-"));
        }
    }
}
