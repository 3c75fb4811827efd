//! The filter `tojson` of chat templates, which writes JSON as Python does: models learnt the descriptions of
//! tools with Python's blanks, and without the HTML escapes of Jinja's own filter.

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind};

/// The deepest nesting that is written; serde_json reads no deeper one. Without a limit, a template could
/// overflow the stack.
const MAX_DEPTH: usize = 128;

/// `json.dumps(value, ensure_ascii=False)`, with the options of transformers' filter: `indent`, `separators`,
/// `sort_keys` and `ensure_ascii`.
pub(super) fn tojson(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let [items, keys] = match separators.as_deref() {
        Some([items, keys]) => [items.clone(), keys.clone()],
        Some(_) => return Err(invalid("tojson: expected two separators")),
        None if indent.is_some() => [",".to_string(), ": ".to_string()],
        None => [", ".to_string(), ": ".to_string()],
    };
    let sorted = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let ascii = options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    options.assert_all_used()?;
    let mut writer = Writer { out: String::new(), indent, items, keys, sorted, ascii };
    writer.value(value, 0)?;
    Ok(writer.out)
}

fn invalid(reason: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason.into())
}

struct Writer {
    out: String,
    indent: Option<usize>,
    items: String,
    keys: String,
    sorted: bool,
    ascii: bool,
}

impl Writer {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(invalid(format!("tojson: nested deeper than {MAX_DEPTH}")));
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => self.out.push_str(&value.to_string()),
            ValueKind::Number => self.out.push_str(&float(f64::try_from(value.clone())?)),
            ValueKind::String => self.text(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.out.push('[');
                for (i, item) in items.iter().enumerate() {
                    self.separate(i, depth + 1);
                    self.value(item, depth + 1)?;
                }
                self.close(items.len(), depth, ']');
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sorted {
                    keys.sort_by_key(Value::to_string);
                }
                self.out.push('{');
                for (i, key) in keys.iter().enumerate() {
                    self.separate(i, depth + 1);
                    self.text(&key.to_string());
                    self.out.push_str(&self.keys);
                    self.value(&value.get_item(key)?, depth + 1)?;
                }
                self.close(keys.len(), depth, '}');
            }
            other => return Err(invalid(format!("tojson: expected a value of JSON, got {other}"))),
        }
        Ok(())
    }

    /// What stands before item number `i` of a list or an object.
    fn separate(&mut self, i: usize, depth: usize) {
        if i > 0 {
            self.out.push_str(&self.items);
        }
        self.line(depth);
    }

    fn close(&mut self, count: usize, depth: usize, bracket: char) {
        if count > 0 {
            self.line(depth);
        }
        self.out.push(bracket);
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = self.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', indent.min(16) * depth));
        }
    }

    fn text(&mut self, text: &str) {
        self.out.push('"');
        for letter in text.chars() {
            match letter {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                letter if letter < ' ' || self.ascii && !(' '..='~').contains(&letter) => {
                    for unit in letter.encode_utf16(&mut [0; 2]) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                letter => self.out.push(letter),
            }
        }
        self.out.push('"');
    }
}

/// A number that is not whole, as Python writes it.
fn float(number: f64) -> String {
    if !number.is_finite() {
        return match (number.is_nan(), number > 0.0) {
            (true, _) => "NaN".to_string(),
            (false, true) => "Infinity".to_string(),
            (false, false) => "-Infinity".to_string(),
        };
    }
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = number.to_string();
        return if plain.contains('.') { plain } else { format!("{plain}.0") };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.unsigned_abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dumped(json: &str, options: &[(&str, Value)]) -> String {
        let value: Value = serde_json::from_str(json).unwrap();
        tojson(&value, options.iter().cloned().collect()).unwrap()
    }

    #[test]
    fn json_is_written_with_pythons_blanks_in_the_order_of_the_keys_and_without_escapes_of_html() {
        let text = r#"{"b": [1, -2.5, true, null], "a": {"x": "<é'&\"\n"}, "c": [], "d": {}}"#;
        assert_eq!(dumped(text, &[]), text);
        let sorted = dumped(r#"{"b": 1, "a": [2]}"#, &[("sort_keys", true.into())]);
        assert_eq!(sorted, r#"{"a": [2], "b": 1}"#);
        let short = dumped(text, &[("separators", Value::from(vec![",", ":"]))]);
        assert_eq!(short, r#"{"b":[1,-2.5,true,null],"a":{"x":"<é'&\"\n"},"c":[],"d":{}}"#);
        assert_eq!(dumped(r#""é𝄞""#, &[("ensure_ascii", true.into())]), r#""\u00e9\ud834\udd1e""#);
        assert_eq!(dumped(r#""\u0001\u007f""#, &[]), "\"\\u0001\u{7f}\"");
    }

    #[test]
    fn an_indent_puts_each_item_on_its_line() {
        let lines = dumped(r#"{"a": [1, 2], "b": {}, "c": []}"#, &[("indent", 2.into())]);
        assert_eq!(lines, "{\n  \"a\": [\n    1,\n    2\n  ],\n  \"b\": {},\n  \"c\": []\n}");
    }

    #[test]
    fn numbers_are_written_as_python_writes_them() {
        // Of `json.dumps` in Python 3.
        for (number, written) in [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e-5, "1.5e-05"),
            (1e-4, "0.0001"),
            (f64::NEG_INFINITY, "-Infinity"),
        ] {
            assert_eq!(float(number), written);
        }
        assert_eq!(dumped("[18446744073709551615, -3, 2.0]", &[]), "[18446744073709551615, -3, 2.0]");
    }

    #[test]
    fn what_is_no_json_and_what_is_nested_without_end_is_refused() {
        let mut nested = Value::from(1);
        for _ in 0..200 {
            nested = Value::from(vec![nested]);
        }
        for (value, reason) in [(nested, "nested deeper than 128"), (Value::UNDEFINED, "got undefined")] {
            let error = tojson(&value, Kwargs::from_iter::<[(&str, Value); 0]>([])).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }
}
