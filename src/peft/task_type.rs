//! The tasks of adapters, by PEFT's names.

use super::config::PeftConfig;

/// What an adapter was trained for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum TaskType {
    /// The classification of texts, by a head that the adapter contains.
    SequenceClassification,
    /// Language modelling.
    CausalLm,
}

impl TaskType {
    /// Its name in PEFT's files.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::SequenceClassification => "SEQ_CLS",
            Self::CausalLm => "CAUSAL_LM",
        }
    }
}

impl PeftConfig {
    /// The task, if it is one that this crate trains adapters for.
    pub fn task(&self) -> Option<TaskType> {
        let tasks = [TaskType::SequenceClassification, TaskType::CausalLm];
        tasks.into_iter().find(|task| self.task_type.as_deref() == Some(task.name()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_is_found_by_the_name_that_it_is_written_with() {
        let of = |name: Option<&str>| {
            PeftConfig { task_type: name.map(str::to_string), ..PeftConfig::default() }.task()
        };
        assert_eq!(of(Some("SEQ_CLS")), Some(TaskType::SequenceClassification));
        assert_eq!(of(Some("CAUSAL_LM")), Some(TaskType::CausalLm));
        assert_eq!((of(Some("TOKEN_CLS")), of(None)), (None, None));
    }
}
