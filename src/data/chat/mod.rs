//! Conversations: rows with `messages`, which the model's own chat template turns into text, and of which the
//! assistant's turns are learnt.
//!
//! The template is a Jinja program that comes with the model. It is run as transformers runs it, with a limit
//! on its work, and with no access to files, the network or the clock. The parts to learn are found by
//! comparing the text of a whole conversation with that of its beginnings, so that any template will do: it
//! needs no `{% generation %}` marks.

mod message;
mod read;
mod spans;
mod template;
#[cfg(test)]
mod tests;
mod tojson;

pub use read::{prompts_from, read, read_from, read_prompts, turn_ends, Conversations};
pub use template::ChatTemplate;
