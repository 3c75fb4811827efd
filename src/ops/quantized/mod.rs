//! Linear layers and embedding tables with a quantised weight: a few bits per number, in blocks with a scale.

mod linear;
mod nf4;
mod quantized_weight;
#[cfg(test)]
mod tests;
mod weight;

pub use linear::quantized_linear;
pub use quantized_weight::QuantizedWeight;
pub use weight::Weight;
