//! BLoB (Wang et al. 2024, "BLoB: Bayesian low-rank adaptation by backpropagation for large language
//! models"): every element of A has its own standard deviation, learnt together with its mean.
//!
//! ```text
//! y = W0 x + b + s B (M + Omega * E) dropout(x),   Omega = G * G elementwise, E standard normal
//! KL = sum_ij [ ln (s_p / Omega_ij) + (Omega_ij^2 + M_ij^2) / (2 s_p^2) - 1/2 ]
//! ```
//!
//! The task's loss and the divergence are minimised alternately, as in the authors' code. The optimiser takes
//! a step on the task's loss; then the mean M and G take one step of plain gradient descent on `pi_i KL`
//! ([`Blob::descend`]), whose weight pi_i grows within a cycle of `m` steps ([`kl_share`]). The authors'
//! Flipout (random signs of the noise for each token) is not implemented: a draw has the same weights for a
//! whole batch, as in the other methods here.

use std::any::Any;
use std::borrow::Cow;

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::adapter::{low_rank, Adapter, BaseLinear, Context, Init, LowRank, Params, Role};
use crate::error::Result;
use crate::noise::{Purpose, Stream};
use crate::ops;
use crate::util::check::{not_negative, positive};
use crate::util::dtype::to_dtype_device;

/// Added, as in the authors' code, to a standard deviation before its logarithm and to the denominator of the
/// squares. Without it, a G near zero would make too large a step.
const STABILISER: f64 = 1e-6;

/// The options of a BLoB adapter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BlobConfig {
    /// The rank r of the update.
    pub rank: usize,
    /// The update is scaled by `alpha / rank`.
    pub alpha: f64,
    /// Probability of dropping an input of the low-rank branch, in training.
    pub dropout: f64,
    /// The upper bound of G's uniform start (the paper's epsilon); the lower bound is this over sqrt(2).
    pub initial_root: f64,
    /// The prior's standard deviation s_p of each element of A.
    pub prior_std: f64,
    /// The highest learning rate of the descent on the divergence.
    pub kl_lr: f64,
    /// Rescales the number of rows in the length of a cycle: see [`cycle`].
    pub gamma: f64,
}

impl Default for BlobConfig {
    /// The constants of the authors' script for RoBERTa, with the rank and alpha of the other methods here.
    fn default() -> Self {
        Self {
            rank: 8,
            alpha: 16.0,
            dropout: 0.0,
            initial_root: 0.05,
            prior_std: 0.2,
            kl_lr: 2e-3,
            gamma: 8.0,
        }
    }
}

impl BlobConfig {
    /// Checks every option.
    ///
    /// # Errors
    /// If one is outside its domain; the error names it.
    pub fn validate(&self) -> Result<()> {
        low_rank::validate(self.rank, self.alpha, self.dropout)?;
        positive("initial_root", self.initial_root)?;
        positive("prior_std", self.prior_std)?;
        not_negative("kl_lr", self.kl_lr)?;
        positive("gamma", self.gamma)
    }
}

/// Computes the number of steps m in a cycle of KL weights: m = 100 n^(pi / gamma) / b for `rows` n in
/// batches of b, at least 1. This is the authors' rescaled number of batches; for n = 400 it corresponds to
/// 1052 rows. If a step accumulates several micro-batches, b is the size of a micro-batch, and the divergence
/// counts less.
pub fn cycle(rows: usize, batch_size: usize, gamma: f64) -> usize {
    let rescaled = 100.0 * (rows as f64).powf(std::f64::consts::PI / gamma);
    ((rescaled / batch_size.max(1) as f64) as usize).max(1)
}

/// Computes the weight of the divergence at optimiser step `step` (1-based) in cycles of `m` steps, as in
/// Blundell et al. 2015, but increasing.
///
/// ```text
/// pi_i = 2^i / (2^(m + 1) - 1),   i = 1 .. m
/// ```
///
/// The weights of a cycle add up to 1 - 1 / (2^(m + 1) - 1), and nearly all of it is in the last few steps.
pub fn kl_share(step: usize, m: usize) -> f64 {
    let m = m.max(1);
    let left = (m - 1 - step.saturating_sub(1) % m) as f64; // m - i
    let whole = m as f64 + 1.0; // m may be the largest integer: no integer sum

    // Numerator and denominator divided by 2^(m + 1), which soon overflows.
    (-1.0 - left).exp2() / (1.0 - (-whole).exp2())
}

/// A BLoB adapter of one linear layer.
#[derive(Debug, Clone)]
pub struct Blob {
    name: String,
    pair: LowRank,
    root: Tensor, // G, (r, in)
    prior_std: f64,
    stream: Stream,
}

impl Blob {
    /// Creates the adapter's parameters `{path}.{adapter}.a` (the mean M), `.b` and `.g` in the store.
    ///
    /// # Errors
    /// If an option is outside its domain (rank 0 included), or a name is taken. The store is then unchanged.
    pub fn new(
        params: &Params,
        path: &str,
        adapter: &str,
        (in_dim, out_dim): (usize, usize),
        config: &BlobConfig,
    ) -> Result<Self> {
        config.validate()?;
        let name = format!("{path}.{adapter}");
        let scale = low_rank::scaling(config.rank, config.alpha, false);
        let highest = config.initial_root;
        let start = Init::Uniform(highest / std::f64::consts::SQRT_2, highest);
        let (pair, root) = params.all_or_none(&format!("{name}."), || {
            let pair = LowRank::new(params, &name, (in_dim, out_dim), config.rank, scale, config.dropout)?;
            let root = params.create(&format!("{name}.g"), Role::RootStd, (config.rank, in_dim), &start)?;
            Ok((pair, root))
        })?;
        let stream = params.noise().stream(&name, Purpose::Gaussian);
        Ok(Self { name, pair, root, prior_std: config.prior_std, stream })
    }

    /// M, B and their scale.
    pub fn low_rank(&self) -> &LowRank {
        &self.pair
    }

    /// The matrix G, `(r, in_dim)`; the standard deviations are its squares.
    pub fn root(&self) -> &Tensor {
        &self.root
    }

    /// Computes the A of a pass, `(r, in_dim)`: the mean, or `M + G^2 * E` for the draw of the pass.
    ///
    /// # Errors
    /// If candle fails.
    pub fn effective_a(&self, cx: &Context) -> candle_core::Result<Cow<'_, Tensor>> {
        let mean = self.pair.a();
        cx.drawn(mean, 1.0, |draw, sign| {
            let step = ops::mul_constant(&self.root.sqr()?, &self.noise(draw)?)?;
            if sign > 0.0 {
                mean + step
            } else {
                mean - step
            }
        })
    }

    /// Generates the noise E of a draw, `(r, in_dim)`.
    fn noise(&self, draw: u64) -> candle_core::Result<Tensor> {
        let (shape, dtype, device) = (self.root.shape(), self.root.dtype(), self.root.device());
        if dtype == DType::F64 {
            let mut z = vec![0f64; shape.elem_count()];
            self.stream.fill_normal(draw, &mut z);
            return Tensor::from_vec(z, shape, device);
        }
        let mut z = vec![0f32; shape.elem_count()];
        self.stream.fill_normal_f32(draw, &mut z);
        to_dtype_device(&Tensor::from_vec(z, shape, &Device::Cpu)?, dtype, device)
    }

    /// Computes the divergence of A's posterior from its prior, a scalar.
    ///
    /// # Errors
    /// If candle fails.
    pub fn kl(&self) -> candle_core::Result<Tensor> {
        let (std, prior) = (self.root.sqr()?, self.prior_std);
        let squares = ((std.sqr()? + self.pair.a().sqr()?)? / (2.0 * prior * prior + STABILISER))?;
        let count = std.elem_count() as f64;
        (squares.sum_all()? - (std + STABILISER)?.log()?.sum_all()?)?
            + count * ((prior + STABILISER).ln() - 0.5)
    }

    /// Updates M and G in the store `params` by one step of gradient descent on [`Self::kl`] with learning
    /// rate `rate`.
    ///
    /// # Errors
    /// If the store lacks M or G, or a value would not be finite.
    pub fn descend(&self, params: &Params, rate: f64) -> Result<()> {
        let (mean, root) = (self.pair.a().detach(), self.root.detach());
        let shrink = 2.0 / (2.0 * self.prior_std * self.prior_std + STABILISER);
        // d KL / dG = 2 G d KL / dOmega
        let std = root.sqr()?;
        let slope = ((&std * shrink)? - (&std + STABILISER)?.recip()?)?;
        let moved =
            [("a", (mean * (1.0 - rate * shrink))?), ("g", (&root - ((&root * slope)? * (2.0 * rate))?)?)];
        for (name, values) in moved {
            let name = format!("{}.{name}", self.name);
            // Frozen parameters do not change.
            if params.get(&name).is_none_or(|param| param.trainable) {
                params.set(&name, &values)?;
            }
        }
        Ok(())
    }
}

impl Adapter for Blob {
    fn forward(&self, xs: &Tensor, base: &BaseLinear, cx: &Context) -> candle_core::Result<Tensor> {
        self.pair.forward(xs, base, self.effective_a(cx)?.as_ref(), cx)
    }

    fn parameters(&self) -> Vec<(Role, Tensor)> {
        vec![
            (Role::A, self.pair.a().clone()),
            (Role::B, self.pair.b().clone()),
            (Role::RootStd, self.root.clone()),
        ]
    }

    fn delta(&self, _base: &BaseLinear, cx: &Context) -> candle_core::Result<Option<Tensor>> {
        self.pair.delta_of(self.effective_a(cx)?.as_ref()).map(Some)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cycle_has_a_weight_of_nearly_one_and_most_of_it_at_its_end() {
        // [2**i / (2**(m + 1) - 1) for i in range(1, m + 1)]
        for (step, want) in [(1, 2.0 / 15.0), (2, 4.0 / 15.0), (3, 8.0 / 15.0), (4, 2.0 / 15.0)] {
            assert!((kl_share(step, 3) - want).abs() < 1e-15, "{step}");
        }
        let whole: f64 = (1..=2000).map(|step| kl_share(step, 2000)).sum();
        assert!((whole - 1.0).abs() < 1e-12 && (kl_share(2000, 2000) - 0.5).abs() < 1e-12);
        // With a small gamma, a cycle is longer than the largest integer, and no step has any weight.
        assert_eq!((cycle(67349, 32, 0.5), kl_share(7, usize::MAX)), (usize::MAX, 0.0));
        // int(100 * 400 ** (math.pi / 8) / 32), for 2490 rows in batches of 8, for 3 rows in a batch of 1000
        assert_eq!([cycle(400, 32, 8.0), cycle(2490, 8, 8.0), cycle(3, 1000, 8.0)], [32, 269, 1]);
    }
}
