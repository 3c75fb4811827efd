//! Differentiable building blocks, forward and backward side by side.
//!
//! Candle differentiates by recording every elementary operation: a layer norm is nine nodes, a
//! frozen linear computes the gradient of a weight that nobody trains, and every intermediate is
//! kept. Here each block is one node with a closed-form backward that computes what is asked for
//! and nothing else: a tensor gets a gradient when, and only when, candle tracks it.
//!
//! Every block has three implementations, of which [`Lane`] names one. Ratios in these pages are CPU
//! time of forward and backward against `Lane::Plain`, on two cores, f32, at batch 8 x 128 of
//! RoBERTa-base; twelve of its layers with rank 8 on q, k, v and dropout take 5.4 s against 14.2 s.

mod activation;
mod attach;
mod attention;
mod attention_fast;
mod checkpoint;
mod constant;
mod dropout;
mod embedding;
mod feed_forward;
mod gemm;
mod host;
mod lane;
mod linear;
mod linear_loss;
mod loss;
mod low_rank;
mod norm;
mod plain;
mod rotary;
mod rows;
mod scaled_rows;
mod swiglu;
#[cfg(test)]
mod tests;
mod thin;
mod vmath;

pub use activation::{gelu, silu, silu_mul};
pub(crate) use attach::attach;
pub use attention::{attention, Mask};
pub use checkpoint::checkpoint;
pub(crate) use constant::place;
pub use constant::{add_constant, matmul_constant, mul_constant, scale};
pub use dropout::dropout;
pub use embedding::embedding;
pub use feed_forward::feed_forward;
pub(crate) use host::sum_of_squares;
pub(crate) use lane::slow_lane_forced;
pub use lane::{with_lane, Lane};
pub use linear::linear;
pub use linear_loss::linear_cross_entropy;
pub use loss::{cross_entropy, mean_squared_error};
pub use low_rank::{adapted_linear, linear_and_low_rank, low_rank};
pub use norm::{add_layer_norm, layer_norm, rms_norm};
pub use rotary::rotary;
pub use rows::Rows;
pub use scaled_rows::add_scaled_rows;
pub use swiglu::swiglu;
