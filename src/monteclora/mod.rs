//! MonteCLoRA: a posterior over the low-rank factor A, its draws and its regulariser.

pub mod buffer;
pub mod config;
mod draw;
pub mod layer;
pub mod linear;
pub mod noise;
mod peft_compat;
pub mod posterior;
pub mod regularizer;
mod scaler;
mod schedule;

pub use buffer::SampleBuffer;
pub use config::{Compat, Initial, KlEvaluation, Mixture, MonteCLoRAConfig};
pub use draw::PosteriorDraw;
pub use layer::MonteCLoRA;
pub use linear::MonteCLoRALinear;
pub use noise::{DrawNoise, DrawSpec, NoiseStreams};
pub use posterior::Posterior;
pub use regularizer::{Regularizer, RegularizerTerms};
pub use scaler::SampleScaler;
pub use schedule::ScalerSchedule;
