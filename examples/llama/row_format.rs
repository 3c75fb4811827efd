//! The format of a language model's rows: a template of this crate, or the model's own chat template.

use std::path::{Path, PathBuf};

use monteclora::data::chat::{self, ChatTemplate};
use monteclora::data::instruct::{self, Format, Prompted};
use monteclora::models::hub::ModelFiles;

use crate::common::given::Given;
use crate::common::output::tell_err;
use crate::common::Outcome;

// Not a doc comment, which clap would take for the program's description.
#[derive(clap::Args, Clone)]
#[command(next_help_heading = "Model and data")]
pub struct FormatOptions {
    /// The format of the rows: instruct, completion, gsm8k, text, code, or chat (conversations in `messages`,
    /// of which the assistant's turns are learnt). With --adapter, by default that of its run.
    #[arg(long, default_value = "gsm8k")]
    pub format: String,
    /// With --format chat: the Jinja template of conversations. Default: the model's own.
    #[arg(long, value_name = "FILE")]
    pub chat_template: Option<PathBuf>,
}

impl FormatOptions {
    /// The format, with the chat template of these files if it needs one.
    pub fn row_format(&self, files: &ModelFiles) -> Outcome<RowFormat> {
        if self.format != "chat" {
            let known = "instruct, completion, gsm8k, text, code or chat";
            let format = self.format.parse();
            return match format {
                Ok(format) => Ok(RowFormat::Plain(format)),
                Err(_) => Err(format!("--format: expected {known}, got {}", self.format).into()),
            };
        }
        Ok(RowFormat::Chat(match &self.chat_template {
            Some(path) => ChatTemplate::read(path, files)?,
            None => ChatTemplate::of_model(files)?,
        }))
    }

    /// Warns about given options that the format does not read.
    pub fn tell_unread(&self, given: &Given) {
        if self.format != "chat" {
            given.without_effect(&["chat_template"], "it only applies to --format chat");
        }
    }
}

/// The format of rows.
pub enum RowFormat {
    /// Prompts and answers, in a template of this crate.
    Plain(Format),
    /// Conversations, in a model's template.
    Chat(ChatTemplate),
}

impl RowFormat {
    /// Whether rows are conversations.
    pub fn is_chat(&self) -> bool {
        matches!(self, Self::Chat(_))
    }

    /// The template in one line: its text or, of conversations, the file that it is from.
    pub fn template(&self) -> String {
        match self {
            Self::Plain(format) => format.template().replace('\n', "\\n"),
            Self::Chat(template) => template.path().display().to_string(),
        }
    }

    /// The text of the chat template.
    pub fn template_text(&self) -> Option<&str> {
        match self {
            Self::Plain(_) => None,
            Self::Chat(template) => Some(template.text()),
        }
    }

    /// Reads the rows of a file.
    pub fn read(&self, path: &Path) -> Outcome<Vec<Prompted>> {
        Ok(self.numbered(path)?.into_iter().map(|(_, row)| row).collect())
    }

    /// Reads the rows of a file and holds out every twentieth: the rows to train on, and those held out. Rows
    /// of one conversation stay together, so that none is measured whose beginning was learnt.
    pub fn read_parted(&self, path: &Path) -> Outcome<(Vec<Prompted>, Vec<Prompted>)> {
        let (held_out, rows): (Vec<_>, Vec<_>) =
            self.numbered(path)?.into_iter().partition(|(number, _)| number % 20 == 19);
        let texts = |rows: Vec<(usize, Prompted)>| rows.into_iter().map(|(_, row)| row).collect();
        Ok((texts(rows), texts(held_out)))
    }

    /// The rows of a file, each with the number of its row there or, of conversations, of its conversation.
    fn numbered(&self, path: &Path) -> Outcome<Vec<(usize, Prompted)>> {
        let template = match self {
            Self::Plain(format) => {
                return Ok(instruct::read(path, *format)?.into_iter().enumerate().collect())
            }
            Self::Chat(template) => template,
        };
        let read = chat::read(path, template)?;
        if read.left_out > 0 {
            let why = "the assistant says nothing in them";
            tell_err!("{}: {} conversations are left out: {why}", path.display(), read.left_out);
        }
        if read.split > 0 {
            let why = "the template writes a turn differently once others follow";
            let what = "became one row for each turn of the assistant";
            tell_err!("{}: {} conversations {what}: {why}", path.display(), read.split);
        }
        Ok(read.conversations.into_iter().zip(read.rows).collect())
    }

    /// Reads the prompts of a file, whose rows need no answers.
    pub fn read_prompts(&self, path: &Path) -> Outcome<Vec<String>> {
        Ok(match self {
            Self::Plain(format) => instruct::read_prompts(path, *format)?,
            Self::Chat(template) => chat::read_prompts(path, template)?,
        })
    }

    /// The text that a model continues for a prompt.
    pub fn prompt(&self, prompt: &str) -> Outcome<String> {
        Ok(match self {
            Self::Plain(_) => prompt.to_string(),
            Self::Chat(template) => template.prompt(prompt)?,
        })
    }
}
