//! Pre-tokenizers of byte-level BPE: GGUF stores a name, `tokenizer.json` the full definition.

use serde_json::{json, Value as Json};

/// A pre-tokenizer.
pub(super) struct PreTokenizer {
    /// GGUF's names; the first one is written.
    pub names: &'static [&'static str],
    cut: Cut,
    /// Whether a text is normalised to composed characters (NFC) first.
    pub composed: bool,
    /// Whether a word in the vocabulary is kept whole, regardless of the merges.
    pub ignore_merges: bool,
    /// Whether a text begins with the BOS token if the file does not say.
    pub begins: bool,
}

enum Cut {
    /// By this regular expression.
    Regex(&'static str),
    /// By GPT-2's regular expression; with `digits`, every digit is split off first.
    Gpt2 { digits: bool },
}

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const ALL: [PreTokenizer; 6] = [
    PreTokenizer {
        names: &["llama-bpe", "llama3", "llama-v3", "pixtral"],
        cut: Cut::Regex(LLAMA3),
        composed: false,
        ignore_merges: true,
        begins: true,
    },
    PreTokenizer {
        names: &["smaug-bpe", "dbrx"],
        cut: Cut::Regex(LLAMA3),
        composed: false,
        ignore_merges: false,
        begins: false,
    },
    PreTokenizer {
        names: &["qwen2", "deepseek-r1-qwen"],
        cut: Cut::Regex(QWEN2),
        composed: true,
        ignore_merges: false,
        begins: false,
    },
    PreTokenizer {
        names: &["tekken"],
        cut: Cut::Regex(TEKKEN),
        composed: false,
        ignore_merges: true,
        begins: true,
    },
    PreTokenizer {
        names: &["smollm"],
        cut: Cut::Gpt2 { digits: true },
        composed: false,
        ignore_merges: false,
        begins: false,
    },
    PreTokenizer {
        names: &["gpt-2", "phi-2"],
        cut: Cut::Gpt2 { digits: false },
        composed: false,
        ignore_merges: false,
        begins: false,
    },
];

impl PreTokenizer {
    /// Finds the pre-tokenizer that GGUF calls `name`.
    pub fn named(name: &str) -> Option<&'static Self> {
        ALL.iter().find(|one| one.names.contains(&name))
    }

    /// The supported names, separated by commas.
    pub fn known() -> String {
        ALL.iter().flat_map(|one| one.names).copied().collect::<Vec<_>>().join(", ")
    }

    /// Finds the pre-tokenizer that a `tokenizer.json` defines.
    pub fn of(tokenizer: &Json) -> Option<&'static Self> {
        let pre = &tokenizer["pre_tokenizer"];
        let steps: Vec<&Json> = match pre["pretokenizers"].as_array() {
            Some(steps) => steps.iter().collect(),
            None => vec![pre],
        };
        let of_type = |kind: &str| steps.iter().find(|step| step["type"] == kind);
        of_type("ByteLevel")?;
        let (split, digits) = (of_type("Split"), of_type("Digits").is_some());
        let ignores = tokenizer["model"]["ignore_merges"] == true;
        let fits = |one: &&PreTokenizer| match (&one.cut, split) {
            (Cut::Regex(regex), Some(split)) => split["pattern"]["Regex"].as_str() == Some(regex),
            (Cut::Gpt2 { digits: wanted }, None) => *wanted == digits,
            _ => false,
        };
        // Two pre-tokenizers may differ only in `ignore_merges`.
        ALL.iter().filter(fits).find(|one| one.ignore_merges == ignores).or_else(|| ALL.iter().find(fits))
    }

    /// The definition in a `tokenizer.json`.
    pub fn json(&self) -> Json {
        let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": use_regex});
        match self.cut {
            Cut::Regex(regex) => json!({"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false},
                bytes(false),
            ]}),
            Cut::Gpt2 { digits: true } => json!({"type": "Sequence", "pretokenizers": [
                {"type": "Digits", "individual_digits": true},
                bytes(true),
            ]}),
            Cut::Gpt2 { digits: false } => bytes(true),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_is_known_again() {
        for one in &ALL {
            let tokenizer =
                json!({"pre_tokenizer": one.json(), "model": {"ignore_merges": one.ignore_merges}});
            assert_eq!(PreTokenizer::of(&tokenizer).map(|found| found.names), Some(one.names));
            assert!(one.names.iter().all(|name| PreTokenizer::named(name).is_some()));
        }
        let other = json!({"pre_tokenizer": {"type": "Whitespace"}, "model": {}});
        assert!(PreTokenizer::of(&other).is_none() && PreTokenizer::named("default").is_none());
    }
}
