//! The ways to a posterior that need no other training: dropout, checkpoints, temperature, Laplace;
//! what draws say of uncertainty.

mod ensemble;
pub mod laplace;
mod temperature;
mod uncertainty;

pub use ensemble::{Ensemble, McDropout};
pub use laplace::{Laplace, LastLayer, Linearised, Scope, Taps};
pub use temperature::{Temperature, BOUNDS as TEMPERATURE_BOUNDS};
pub use uncertainty::{auroc, entropy, uncertainty, Uncertainty};
