//! Files of a model.
