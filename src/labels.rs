//! The names of the classes, in the order of a model's outputs.
//!
//! A task identifies classes by name, a checkpoint by the row of its head, and the order of the rows differs
//! between checkpoints. The names in a configuration's `id2label` map one to the other.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// The class names in the order of their indices. The single output of a regression has a name, too.
///
/// # Example
/// ```
/// use monteclora::Labels;
///
/// let task = Labels::new(["entailment", "neutral", "contradiction"])?;
/// let checkpoint = Labels::new(["CONTRADICTION", "NEUTRAL", "ENTAILMENT"])?;
/// assert_eq!(task.index_of("Neutral"), Some(1));
/// assert_eq!(checkpoint.places_of(&task), Some(vec![2, 1, 0])); // the row of the head for each class
/// assert!(Labels::numbered(3).are_numbers() && !task.are_numbers());
/// # Ok::<(), monteclora::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Labels {
    names: Vec<String>,
}

impl Labels {
    /// Creates labels from the class names, class 0 first.
    ///
    /// # Errors
    /// If there is no name, or two are the same.
    pub fn new<N: Into<String>>(names: impl IntoIterator<Item = N>) -> Result<Self> {
        let names: Vec<String> = names.into_iter().map(Into::into).collect();
        if names.is_empty() {
            return Err(Error::config("labels", "expected the name of at least one class"));
        }
        let mut seen = BTreeMap::new();
        for (class, name) in names.iter().enumerate() {
            if let Some(before) = seen.insert(name, class) {
                return Err(Error::config(
                    "labels",
                    format!("classes {before} and {class} are both {name:?}"),
                ));
            }
        }
        Ok(Self { names })
    }

    /// `LABEL_0`, `LABEL_1` ...: the default names of Hugging Face.
    pub fn numbered(count: usize) -> Self {
        Self { names: (0..count).map(|class| format!("LABEL_{class}")).collect() }
    }

    /// Reads the names in a `config.json` from `id2label` or, if that is absent, from `label2id`. Returns
    /// `None` if it has neither (null and empty count as absent).
    ///
    /// # Errors
    /// If the numbers are not 0, 1, 2 ..., or two names are the same.
    pub fn of_config(json: &Value) -> Result<Option<Self>> {
        let table =
            |field: &str| json.get(field).and_then(Value::as_object).filter(|table| !table.is_empty());
        if let Some(table) = table("id2label") {
            let pairs = table.iter().map(|(number, name)| (number.trim().parse().ok(), plain(name)));
            return Self::in_order("id2label", pairs).map(Some);
        }
        let Some(table) = table("label2id") else { return Ok(None) };
        let number = |value: &Value| value.as_u64().and_then(|number| usize::try_from(number).ok());
        let pairs = table.iter().map(|(name, value)| (number(value), name.clone()));
        Self::in_order("label2id", pairs).map(Some)
    }

    fn in_order(field: &str, pairs: impl Iterator<Item = (Option<usize>, String)>) -> Result<Self> {
        let pairs: Vec<_> = pairs.collect();
        let by_number: BTreeMap<_, _> = pairs.iter().map(|(number, name)| (*number, name.clone())).collect();
        let expected = (0..pairs.len()).map(Some);
        if !by_number.keys().copied().eq(expected) {
            let reason = format!("expected the numbers 0 to {}, each once", pairs.len().saturating_sub(1));
            return Err(Error::config(field, reason));
        }
        Self::new(by_number.into_values()).map_err(|error| Error::config(field, error.to_string()))
    }

    /// `id2label` of a `config.json`.
    pub fn id2label(&self) -> Value {
        let pairs =
            self.names.iter().enumerate().map(|(class, name)| (class.to_string(), name.clone().into()));
        Value::Object(pairs.collect::<Map<_, _>>())
    }

    /// `label2id` of a `config.json`.
    pub fn label2id(&self) -> Value {
        let pairs = self.names.iter().enumerate().map(|(class, name)| (name.clone(), class.into()));
        Value::Object(pairs.collect::<Map<_, _>>())
    }

    /// The number of classes.
    // Never empty if created by `new`.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// The names, class 0 first.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The name of class number `class`, if there is one.
    pub fn name(&self, class: usize) -> Option<&str> {
        self.names.get(class).map(String::as_str)
    }

    /// The index of the class `name`: an exact match, else the only name that matches if case and the
    /// difference between `_`, `-` and space are ignored.
    pub fn index_of(&self, name: &str) -> Option<usize> {
        if let Some(class) = self.names.iter().position(|own| own == name) {
            return Some(class);
        }
        let wanted = folded(name);
        let mut alike = self.names.iter().enumerate().filter(|(_, own)| folded(own) == wanted);
        match (alike.next(), alike.next()) {
            (Some((class, _)), None) => Some(class),
            _ => None,
        }
    }

    /// Whether the names say no more than the indices: each is `LABEL_i` or `i`.
    pub fn are_numbers(&self) -> bool {
        let is_number = |(class, name): (usize, &String)| {
            let name = folded(name);
            name.strip_prefix("label ").unwrap_or(&name) == class.to_string()
        };
        self.names.iter().enumerate().all(is_number)
    }

    /// For each class of `wanted`, in order, its index in `self`: the rows to take from a head with this
    /// order. Returns `None` if the two do not have the same classes.
    pub fn places_of(&self, wanted: &Labels) -> Option<Vec<usize>> {
        let places: Vec<usize> =
            wanted.names.iter().map(|name| self.index_of(name)).collect::<Option<_>>()?;
        let mut each = places.clone();
        each.sort_unstable();
        each.iter().copied().eq(0..self.len()).then_some(places)
    }
}

impl From<usize> for Labels {
    /// [`Labels::numbered`].
    fn from(count: usize) -> Self {
        Self::numbered(count)
    }
}

/// The text of a name; some files have a number instead of a string.
pub(crate) fn plain(name: &Value) -> String {
    name.as_str().map_or_else(|| name.to_string(), str::to_string)
}

/// Normalises the spelling of a name: case, `_` and `-`, surrounding white space.
fn folded(name: &str) -> String {
    name.trim().to_lowercase().replace(['_', '-'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn labels(names: &[&str]) -> Labels {
        Labels::new(names.iter().copied()).unwrap()
    }

    #[test]
    fn names_are_found_whatever_their_spelling() {
        let task = labels(&["entailment", "not_entailment"]);
        for name in ["not_entailment", "NOT-ENTAILMENT", "Not Entailment", " not_entailment "] {
            assert_eq!(task.index_of(name), Some(1), "{name:?}");
        }
        assert_eq!(task.index_of("neutral"), None);
        let cased = labels(&["Us", "us", "other"]);
        assert_eq!((cased.index_of("us"), cased.index_of("US")), (Some(1), None));
        // "US" is ambiguous
    }

    #[test]
    fn a_permutation_takes_the_row_of_each_wanted_class() {
        let task = labels(&["entailment", "neutral", "contradiction"]);
        let head = labels(&["Contradiction", "Entailment", "Neutral"]);
        assert_eq!(head.places_of(&task), Some(vec![1, 2, 0]));
        assert_eq!(task.places_of(&head), Some(vec![2, 0, 1]));
        assert_eq!(task.places_of(&task), Some(vec![0, 1, 2]));
        for strange in [labels(&["entailment", "neutral"]), labels(&["a", "b", "c"]), Labels::numbered(3)] {
            assert_eq!((strange.places_of(&task), task.places_of(&strange)), (None, None));
        }
        assert_eq!(labels(&["a", "A"]).places_of(&labels(&["A", "a"])), Some(vec![1, 0]));
    }

    #[test]
    fn numbers_are_no_names() {
        for names in [["LABEL_0", "LABEL_1"], ["label-0", "Label 1"], ["0", "1"]] {
            assert!(labels(&names).are_numbers(), "{names:?}");
        }
        for names in [["LABEL_1", "LABEL_0"], ["LABEL_0", "yes"], ["1", "2"]] {
            assert!(!labels(&names).are_numbers(), "{names:?}");
        }
    }

    #[test]
    fn a_configuration_s_names_come_back() {
        let many = Labels::new((0..12).map(|i| format!("class {i}"))).unwrap(); // "10" sorts before "2"
        let json = json!({ "id2label": many.id2label(), "label2id": many.label2id() });
        assert_eq!(Labels::of_config(&json).unwrap(), Some(many.clone()));
        let json = json!({ "id2label": null, "label2id": many.label2id() });
        assert_eq!(Labels::of_config(&json).unwrap(), Some(many));
        for none in [json!({}), json!({ "id2label": null }), json!({ "id2label": {}, "label2id": null })] {
            assert_eq!(Labels::of_config(&none).unwrap(), None);
        }
        let json = json!({ "id2label": { "0": 5, "1": true } });
        assert_eq!(Labels::of_config(&json).unwrap(), Some(labels(&["5", "true"])));
    }

    #[test]
    fn what_names_no_class_is_refused() {
        let message = |json: Value| Labels::of_config(&json).unwrap_err().to_string();
        let gap = message(json!({ "id2label": { "0": "a", "2": "b" } }));
        assert_eq!(gap, "invalid id2label: expected the numbers 0 to 1, each once");
        let twice = message(json!({ "label2id": { "a": 0, "b": 0 } }));
        assert_eq!(twice, "invalid label2id: expected the numbers 0 to 1, each once");
        let same = message(json!({ "id2label": { "0": "a", "1": "a" } }));
        assert!(same.contains("classes 0 and 1 are both \"a\""), "{same}");
        assert!(Labels::new(Vec::<String>::new()).is_err());
    }
}
