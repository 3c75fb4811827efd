//! Mutates JSON by its structure: values of another type, huge and negative numbers, deep nesting, fields
//! that are removed, added or renamed.

use serde_json::{json, Map, Value};

use super::mutate::{bytes, Rng};

/// Tokens that are significant to a JSON reader.
const TOKENS: [&str; 26] = [
    "{",
    "}",
    "[",
    "]",
    "\"",
    ":",
    ",",
    "null",
    "true",
    "false",
    "NaN",
    "1e999",
    "-0",
    "-1",
    "0.5",
    "\\u0000",
    "\\ud800",
    "\\",
    "\n",
    "\u{feff}",
    "[[",
    "{\"a\":0},",
    "[0],",
    "[],",
    "{},",
    "0,",
];

/// Valid documents, and the values and names to mutate them with.
pub struct Documents {
    seeds: Vec<Value>,
    texts: Vec<Vec<u8>>,
    values: Vec<Value>,
    names: Vec<String>,
}

impl Documents {
    /// `values` and `names` are significant to the reader; values that no reader expects are added.
    pub fn new(seeds: Vec<Value>, values: Vec<Value>, names: &[&str]) -> Self {
        let nested = (0..100).fold(json!(1), |inner, depth| match depth % 3 {
            0 => json!({ "a": inner }),
            _ => json!([inner]),
        });
        let strange = [
            json!(null),
            json!(true),
            json!(false),
            json!(0),
            json!(1),
            json!(-1),
            json!(0.5),
            json!(u64::MAX),
            json!(i64::MIN),
            json!(i64::MAX),
            json!(1u64 << 32),
            json!(1u64 << 53),
            json!(1e308),
            json!(-1e-320),
            json!(""),
            json!("x".repeat(2000)),
            json!("\u{e9}\u{0}\u{202e}\u{1f600}"),
            json!([]),
            json!({}),
            json!(vec![0; 500]),
            json!(vec![json!({ "a": 0 }); 300]),
            json!(["a", 1, null]),
            json!("../outside"),
            json!("/etc/passwd"),
            nested,
        ];
        let texts = seeds.iter().map(|seed| seed.to_string().into_bytes()).collect();
        let values = values.into_iter().chain(strange).collect();
        Self { seeds, texts, values, names: names.iter().map(ToString::to_string).collect() }
    }

    /// One of the documents, mutated as JSON, as bytes, or as both.
    pub fn text(&self, rng: &mut Rng) -> Vec<u8> {
        match rng.below(8) {
            0..3 => bytes(rng, &self.texts, &TOKENS),
            3..7 => self.value(rng).to_string().into_bytes(),
            _ => {
                let text = self.value(rng).to_string().into_bytes();
                bytes(rng, &[text], &TOKENS)
            }
        }
    }

    /// One of the documents with one to three changes.
    pub fn value(&self, rng: &mut Rng) -> Value {
        let seed = rng.below(self.seeds.len());
        self.changed(rng, self.seeds[seed].clone())
    }

    /// `value` with one to three changes.
    pub fn changed(&self, rng: &mut Rng, mut value: Value) -> Value {
        for _ in 0..=rng.below(3) {
            let (mut from, mut to) = (rng.below(count(&value)), rng.below(count(&value)));
            let copied = at(&mut value, &mut from, &mut |node| node.clone());
            at(&mut value, &mut to, &mut |node| self.change(rng, node, &copied));
        }
        value
    }

    fn change(&self, rng: &mut Rng, node: &mut Value, copied: &Option<Value>) {
        match node {
            Value::Object(fields) if rng.once_in(2) => self.change_fields(rng, fields),
            Value::Array(items) if rng.once_in(2) => {
                let at = rng.below(items.len() + 1);
                match rng.below(3) {
                    0 if at < items.len() => drop(items.remove(at)),
                    1 => items.insert(at, self.values[rng.below(self.values.len())].clone()),
                    _ => items.extend_from_within(..at),
                }
            }
            Value::Number(number) if rng.once_in(2) => {
                let number = number.as_f64().unwrap_or(0.0);
                let near = [number + 1.0, number - 1.0, -number, number * 4_294_967_296.0, number / 3.0];
                let near = near[rng.below(near.len())];
                *node =
                    if near.fract() == 0.0 && near.abs() < 1e18 { json!(near as i64) } else { json!(near) };
            }
            node => {
                *node = match copied {
                    Some(copied) if rng.once_in(4) => copied.clone(),
                    _ => self.values[rng.below(self.values.len())].clone(),
                }
            }
        }
    }

    fn change_fields(&self, rng: &mut Rng, fields: &mut Map<String, Value>) {
        let name = fields.keys().nth(rng.below(fields.len())).cloned().unwrap_or_default();
        let other = if self.names.is_empty() {
            name.repeat(2)
        } else {
            self.names[rng.below(self.names.len())].clone()
        };
        match rng.below(3) {
            0 => drop(fields.remove(&name)),
            1 => {
                let value = fields.remove(&name).unwrap_or_default();
                fields.insert(other, value);
            }
            _ => drop(fields.insert(other, self.values[rng.below(self.values.len())].clone())),
        }
    }
}

/// The number of values in `value`, including `value` itself.
fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(items) => items.iter().map(count).sum(),
        Value::Object(fields) => fields.values().map(count).sum(),
        _ => 0,
    }
}

/// Calls `f` with value number `left` of `value`, counted in pre-order.
fn at<T>(value: &mut Value, left: &mut usize, f: &mut dyn FnMut(&mut Value) -> T) -> Option<T> {
    if *left == 0 {
        return Some(f(value));
    }
    *left -= 1;
    match value {
        Value::Array(items) => items.iter_mut().find_map(|item| at(item, left, f)),
        Value::Object(fields) => fields.values_mut().find_map(|field| at(field, left, f)),
        _ => None,
    }
}
