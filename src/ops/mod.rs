//! Differentiable building blocks.

mod activation;
mod attention;
mod dropout;
mod feed_forward;
mod linear;
mod loss;
mod norm;
mod rotary;

pub use activation::{gelu, silu, silu_mul};
pub use attention::{attention, Mask};
pub use dropout::dropout;
pub use feed_forward::feed_forward;
pub use linear::{adapted_linear, embedding, linear, low_rank};
pub use loss::{cross_entropy, mean_squared_error};
pub use norm::{add_layer_norm, layer_norm, rms_norm};
pub use rotary::rotary;
