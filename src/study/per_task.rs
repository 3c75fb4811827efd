//! A setting with individual values for some tasks, as given on a command line.

use std::fmt::Display;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::data::task::Task;
use crate::error::{Error, Result};

/// Values for some tasks, and optionally a default for the others: `1000,sst2=4000`.
#[derive(Debug, Clone, PartialEq)]
pub struct PerTask<T> {
    entries: Vec<(Option<Task>, T)>,
}

impl<T> PerTask<T> {
    /// The task's own value, or the default if it has none.
    pub fn get(&self, task: Task) -> Option<&T> {
        let of = |whose: Option<Task>| self.entries.iter().find(|(task, _)| *task == whose);
        of(Some(task)).or_else(|| of(None)).map(|(_, value)| value)
    }

    /// The values in the order in which they were given; the default has no task.
    pub fn entries(&self) -> &[(Option<Task>, T)] {
        &self.entries
    }
}

impl<T> Default for PerTask<T> {
    fn default() -> Self {
        Self { entries: Vec::new() }
    }
}

impl<T: Display> Display for PerTask<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (place, (task, value)) in self.entries.iter().enumerate() {
            let comma = if place > 0 { "," } else { "" };
            match task {
                Some(task) => write!(f, "{comma}{task}={value}")?,
                None => write!(f, "{comma}{value}")?,
            }
        }
        Ok(())
    }
}

impl<T: Display> Serialize for PerTask<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Deserialises the text form, or a number for all tasks.
impl<'de, T: FromStr> Deserialize<'de> for PerTask<T>
where
    T::Err: Display,
{
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Text {
            Number(u64),
            Text(String),
        }
        let text = match Text::deserialize(deserializer)? {
            Text::Number(number) => number.to_string(),
            Text::Text(text) => text,
        };
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl<T: FromStr> FromStr for PerTask<T>
where
    T::Err: Display,
{
    type Err = Error;

    /// Parses values separated by commas, each with an optional `TASK=` prefix. The empty text has no values.
    ///
    /// # Errors
    /// If a task is unknown (the error lists the known ones), a value cannot be parsed, or a task or the
    /// default has two values.
    fn from_str(text: &str) -> Result<Self> {
        let mut entries: Vec<(Option<Task>, T)> = Vec::new();
        for part in text.split(',').filter(|_| !text.is_empty()) {
            let (task, value) = match part.split_once('=') {
                Some((task, value)) => (Some(task.parse::<Task>()?), value),
                None => (None, part),
            };
            let value = value.parse().map_err(|e| Error::config("value", format!("{part:?}: {e}")))?;
            if entries.iter().any(|(other, _)| *other == task) {
                let whose = task.map_or("all tasks", Task::name);
                return Err(Error::config("value", format!("{text:?} has two values for {whose}")));
            }
            entries.push((task, value));
        }
        Ok(Self { entries })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_s_own_value_counts_wherever_it_stands() -> Result<()> {
        for text in ["1000,sst2=4000,cola=7", "SST-2=4000,1000,cola=7", "cola=7,sst2=4000,1000"] {
            let limits: PerTask<usize> = text.parse()?;
            let of = [Task::Sst2, Task::Cola, Task::Rte].map(|task| limits.get(task).copied());
            assert_eq!(of, [Some(4000), Some(7), Some(1000)], "{text}");
            assert_eq!(limits.to_string().parse::<PerTask<usize>>()?, limits, "{text}");
        }
        let some: PerTask<usize> = "sst2=4000".parse()?;
        assert_eq!((some.get(Task::Sst2), some.get(Task::Rte)), (Some(&4000), None));
        let foreign: PerTask<Task> = "sst2=cola,rte".parse()?;
        assert_eq!(foreign.entries(), [(Some(Task::Sst2), Task::Cola), (None, Task::Rte)]);
        assert_eq!("".parse::<PerTask<usize>>()?, PerTask::default());
        Ok(())
    }

    #[test]
    fn strange_tasks_and_values_and_second_ones_are_refused_by_name() {
        for (text, reason) in [
            ("1000,sst=4000", "\"sst\", expected one of mrpc, cola, rte, wic, boolq, sst2"),
            ("=5", "\"\", expected one of mrpc"),
            ("sst2=many", "\"sst2=many\": invalid digit"),
            ("1000,", "\"\": cannot parse integer from empty string"),
            ("-1", "\"-1\": invalid digit"),
            ("sst2=1,SST-2=2", "has two values for sst2"),
            ("1,2", "has two values for all tasks"),
        ] {
            let error = text.parse::<PerTask<usize>>().unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
        let error = "sst2=imdb".parse::<PerTask<Task>>().unwrap_err().to_string();
        assert!(error.contains("sst2=imdb") && error.contains("expected one of mrpc"), "{error}");
    }
}
