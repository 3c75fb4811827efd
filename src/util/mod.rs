//! Small tools that every floor uses.

pub(crate) mod finite;
