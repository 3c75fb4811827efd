//! MonteCLoRA: a posterior over the low-rank factor A, its draws and its regulariser.

pub mod buffer;
pub mod config;
mod held;
#[cfg(feature = "cuda")]
mod kernel_draw;
pub mod layer;
pub mod linear;
pub mod noise;
pub mod posterior;
pub mod regularizer;
mod row_scales;
mod scaler;

pub use buffer::SampleBuffer;
pub use config::{Compat, Initial, Mixture, Mode, MonteCLoRAConfig};
pub use held::with_held_draws;
pub use layer::MonteCLoRA;
pub use linear::{MonteCLoRALinear, MonteCLoRAMean};
pub use noise::{DrawNoise, NoiseSpec, NoiseStreams};
pub use posterior::{Posterior, PosteriorDraw};
pub use regularizer::{Regularizer, RegularizerTerms};
pub use scaler::{SampleScaler, ScalerSchedule};
