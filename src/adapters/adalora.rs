//! AdaLoRA (Zhang et al. 2023): a low-rank update in the form of a singular value decomposition, with a
//! budget of ranks that moves to the layers that need it ([`RankAllocator`](super::RankAllocator)).
//!
//! ```text
//! y = W0 x + b + s B diag(e) A dropout(x),   s = alpha / (r + 1e-5) as in PEFT
//! penalty = w / (2 L) sum_layers ( ||A A^T - I||_F + ||B^T B - I||_F )
//! ```

use std::any::Any;

use candle_core::{Tensor, D};
use serde::{Deserialize, Serialize};

use crate::adapter::{
    low_rank, visit_active, AdaptableModel, Adapter, BaseLinear, Context, Init, LowRank, Params, Role,
};
use crate::error::{Error, Result};
use crate::ops;
use crate::util::check::{at_least_one, not_negative, share};

/// The options of AdaLoRA; the defaults are PEFT's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdaLoraConfig {
    /// The rank of every layer at the start.
    pub init_rank: usize,
    /// The mean rank at the end.
    pub target_rank: usize,
    /// The update is scaled by `alpha / (init_rank + 1e-5)`, as in PEFT.
    pub alpha: f64,
    /// Probability of dropping an input of the low-rank branch, in training.
    pub dropout: f64,
    /// The share of all steps before the budget begins to fall.
    pub warmup_share: f64,
    /// The share of all steps, at the end, that use the final budget.
    pub final_share: f64,
    /// The number of steps between two allocations.
    pub interval: usize,
    /// The decay of the running mean of the importance.
    pub beta1: f64,
    /// The decay of the running mean of the importance's uncertainty.
    pub beta2: f64,
    /// The weight w of the penalty that keeps A and B near orthogonal.
    pub orthogonal_weight: f64,
}

impl Default for AdaLoraConfig {
    fn default() -> Self {
        Self {
            init_rank: 12,
            target_rank: 8,
            alpha: 16.0,
            dropout: 0.0,
            warmup_share: 0.1,
            final_share: 0.3,
            interval: 1,
            beta1: 0.85,
            beta2: 0.85,
            orthogonal_weight: 0.5,
        }
    }
}

impl AdaLoraConfig {
    /// Options with a mean final rank of `rank`, starting from one and a half times as much, as in the paper.
    pub fn towards(rank: usize) -> Self {
        Self { init_rank: rank + rank.div_ceil(2), target_rank: rank, ..Self::default() }
    }

    /// Checks every option.
    ///
    /// # Errors
    /// If one is outside its domain; the error names it.
    pub fn validate(&self) -> Result<()> {
        low_rank::validate(self.init_rank, self.alpha, self.dropout)?;
        if !(1..=self.init_rank).contains(&self.target_rank) {
            let reason =
                format!("expected 1 to init_rank, which is {}, got {}", self.init_rank, self.target_rank);
            return Err(Error::config("target_rank", reason));
        }
        share("warmup_share", self.warmup_share)?;
        share("final_share", self.final_share)?;
        let still = self.warmup_share + self.final_share;
        if still >= 1.0 {
            let reason = format!("expected less than 1 together with warmup_share, got {still}");
            return Err(Error::config("final_share", reason));
        }
        at_least_one("interval", self.interval)?;
        share("beta1", self.beta1)?;
        share("beta2", self.beta2)?;
        not_negative("orthogonal_weight", self.orthogonal_weight)
    }
}

/// An AdaLoRA adapter of one linear layer.
#[derive(Debug, Clone)]
pub struct AdaLora {
    name: String,
    pair: LowRank,
    values: Tensor, // (r): the singular values e
}

impl AdaLora {
    /// Creates `{path}.{adapter}.a` and `.b` (normal, standard deviation 0.02) and `.values` (zero).
    ///
    /// # Errors
    /// If an option is outside its domain, or a name is taken.
    pub fn new(
        params: &Params,
        path: &str,
        adapter: &str,
        dims: (usize, usize),
        config: &AdaLoraConfig,
    ) -> Result<Self> {
        config.validate()?;
        let (rank, name) = (config.init_rank, format!("{path}.{adapter}"));
        let scale = config.alpha / (rank as f64 + 1e-5);
        let normal = Init::Normal(0.02);
        params.all_or_none(&format!("{name}."), || {
            let pair =
                LowRank::started(params, &name, dims, rank, (&normal, &normal), scale, config.dropout)?;
            let values =
                params.create(&format!("{name}.values"), Role::SingularValues, rank, &Init::Constant(0.0))?;
            Ok(Self { name: name.clone(), pair, values })
        })
    }

    /// The prefix of the parameters' names, which are `{name}.a`, `.b` and `.values`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A, B and their scale.
    pub fn low_rank(&self) -> &LowRank {
        &self.pair
    }

    /// The singular values e, `(rank)`.
    pub fn values(&self) -> &Tensor {
        &self.values
    }

    /// Computes `diag(e) A`, `(rank, in_dim)`.
    fn weighted(&self) -> candle_core::Result<Tensor> {
        self.pair.a().broadcast_mul(&self.values.unsqueeze(1)?)
    }

    /// Computes `||A A^T - I||_F + ||B^T B - I||_F`, a scalar.
    fn departure(&self) -> candle_core::Result<Tensor> {
        let (a, b) = (self.pair.a(), self.pair.b());
        let from_identity = |gram: Tensor| -> candle_core::Result<Tensor> {
            let identity = Tensor::eye(gram.dim(0)?, gram.dtype(), gram.device())?;
            // The constant keeps the gradient of an orthonormal factor at 0; that of the square root at 0 is
            // infinite.
            ((gram - identity)?.sqr()?.sum_all()? + f64::from(f32::MIN_POSITIVE))?.sqrt()
        };
        from_identity(a.matmul(&a.t()?)?)? + from_identity(b.t()?.matmul(b)?)?
    }
}

/// Computes the mean of `||A A^T - I||_F` and `||B^T B - I||_F` over A and B of every active AdaLoRA layer: a
/// differentiable scalar. Returns `None` if there is no such layer.
///
/// # Errors
/// If candle fails.
pub fn orthogonal_penalty(model: &dyn AdaptableModel) -> Result<Option<Tensor>> {
    let mut terms = Vec::new();
    visit_active(model, |adapter: &AdaLora| {
        terms.push(adapter.departure()?);
        Ok(())
    })?;
    if terms.is_empty() {
        Ok(None)
    } else {
        Ok(Some((ops::stacked(&terms)?.sum(D::Minus1)? / (2 * terms.len()) as f64)?))
    }
}

impl Adapter for AdaLora {
    fn forward(&self, xs: &Tensor, base: &BaseLinear, cx: &Context) -> candle_core::Result<Tensor> {
        self.pair.forward(xs, base, &self.weighted()?, cx)
    }

    fn parameters(&self) -> Vec<(Role, Tensor)> {
        vec![
            (Role::A, self.pair.a().clone()),
            (Role::B, self.pair.b().clone()),
            (Role::SingularValues, self.values.clone()),
        ]
    }

    fn delta(&self, _base: &BaseLinear, _cx: &Context) -> candle_core::Result<Option<Tensor>> {
        (self.pair.b().matmul(&self.weighted()?)? * self.pair.scale()).map(Some)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
