//! The fields of a `config.json`.

use serde::de::DeserializeOwned;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// The fields of a JSON object. A null counts as an absent field, except in [`Self::unless_null`] and
/// [`Self::with_defaults`].
#[derive(Debug, Clone)]
pub(super) struct Fields(Map<String, Value>);

/// One token id or several.
#[derive(Deserialize)]
#[serde(untagged)]
enum Ids {
    One(u32),
    Several(Vec<u32>),
}

impl Fields {
    /// Takes the fields of `value`: the file's content, or the part of it called `name`.
    pub fn new(value: Value, name: &str) -> Result<Self> {
        match value {
            Value::Object(fields) => Ok(Self(fields)),
            other => Err(Error::config(name, format!("expected an object, got {other}"))),
        }
    }

    /// Adds the defaults of Hugging Face's classes for absent fields; a null stays as it is.
    pub fn with_defaults(mut self, defaults: Value) -> Self {
        if let Value::Object(defaults) = defaults {
            for (name, value) in defaults {
                self.0.entry(name).or_insert(value);
            }
        }
        self
    }

    /// Copies the field `name` from another object, if this one has none.
    pub fn inherit(&mut self, name: &str, from: &Self) {
        if let (None, Some(value)) = (self.given(name), from.given(name)) {
            self.0.insert(name.to_string(), value.clone());
        }
    }

    /// The value of a field, unless it is absent or null.
    pub fn given(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    pub fn optional<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>> {
        let read = |value: &Value| serde_json::from_value(value.clone());
        self.given(name).map(read).transpose().map_err(|e| Error::config(name, e.to_string()))
    }

    pub fn or<T: DeserializeOwned>(&self, name: &str, default: T) -> Result<T> {
        Ok(self.optional(name)?.unwrap_or(default))
    }

    pub fn required<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        self.optional(name)?.ok_or_else(|| Error::config("config.json", format!("missing field `{name}`")))
    }

    /// Reads a field for which null means "none" and absence means `default`.
    pub fn unless_null<T: DeserializeOwned>(&self, name: &str, default: T) -> Result<Option<T>> {
        match self.0.contains_key(name) {
            true => self.optional(name),
            false => Ok(Some(default)),
        }
    }

    /// The value of a field that holds an object.
    pub fn object(&self, name: &str) -> Result<Option<Self>> {
        self.given(name).map(|value| Self::new(value.clone(), name)).transpose()
    }

    /// Fails if an unsupported option is set to anything but null, false or 0.
    pub fn refuse(&self, name: &str, reason: &str) -> Result<()> {
        match self.given(name) {
            None | Some(Value::Bool(false)) => Ok(()),
            Some(value) if value.as_f64() == Some(0.0) => Ok(()),
            Some(value) => Err(Error::config(name, format!("{reason}, got {value}"))),
        }
    }

    /// The token ids of a field that holds one id or a list.
    pub fn ids(&self, name: &str) -> Result<Vec<u32>> {
        let expected = |_| Error::config(name, "expected a token id or a list of them");
        let Some(value) = self.given(name) else { return Ok(Vec::new()) };
        Ok(match serde_json::from_value(value.clone()).map_err(expected)? {
            Ids::One(id) => vec![id],
            Ids::Several(ids) => ids,
        })
    }

    /// The padding token; some checkpoints write -1 for "none".
    pub fn pad_id(&self) -> Result<Option<u32>> {
        match self.optional::<i64>("pad_token_id")? {
            None | Some(-1) => Ok(None),
            Some(id) => match u32::try_from(id) {
                Ok(id) => Ok(Some(id)),
                Err(_) => Err(Error::config("pad_token_id", format!("expected a token id or -1, got {id}"))),
            },
        }
    }
}
