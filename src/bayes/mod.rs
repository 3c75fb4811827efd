//! The ways to a posterior that need no other training: dropout, checkpoints, temperature, Laplace, noise as wide
//! as the model bears; what draws say of uncertainty.

mod eigen;
mod ensemble;
pub mod laplace;
mod replaced;
mod temperature;
pub mod tfb;

pub use crate::metrics::{auroc, entropy, uncertainty, Uncertainty};
pub use ensemble::{Ensemble, McDropout};
pub use laplace::{Laplace, LastLayer, Linearised, Scope, Taps};
pub use replaced::Replaced;
pub use temperature::{Temperature, BOUNDS as TEMPERATURE_BOUNDS};
pub use tfb::Tfb;
