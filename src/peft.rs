//! Placeholder: peft.
