//! Gaussian priors on the mean of low-rank updates and on a task head. They shrink the mean update, which the
//! paper's regulariser does not: its eq. 10 gives prior and posterior the same mean.

use std::collections::HashMap;

use candle_core::{Tensor, TensorId};
use serde::{Deserialize, Serialize};

use super::low_rank::LowRank;
use super::params::{Params, Role};
use crate::error::{Error, Result};
use crate::ops::{self, joined, OpPath};
use crate::util::check::positive;

/// The quantity of a layer that the prior is on, with its energy. Each `std` is the deviation of one element.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PriorForm {
    /// `||A||_F^2 / (2 std^2)`. Changes if (A, B) becomes (cA, B/c), although the model stays the same. While
    /// B is zero this is the only gradient of A, and an adaptive optimiser magnifies it.
    Mean {
        /// s_p.
        std: f64,
    },
    /// `||A - A0||_F^2 / (2 std^2)`, with A0 the value at the start of training, where the gradient is zero.
    Start {
        /// s_p.
        std: f64,
    },
    /// `||A - A0||_F^2 / (2 std_a^2) + ||B||_F^2 / (2 std_b^2)`.
    Factors {
        /// s_a.
        std_a: f64,
        /// s_b.
        std_b: f64,
    },
    /// `||s B A||_F^2 / (2 std^2)`: on the update itself, whichever pair makes it. A gets no gradient while B
    /// is zero.
    Update {
        /// s_w.
        std: f64,
    },
    /// The expectation of [`Self::Update`] over the posterior's draws, with weights from Dir(a): it also
    /// includes the perturbation that B carries to the output. Without a posterior it is [`Self::Update`].
    ExpectedUpdate {
        /// s_w.
        std: f64,
    },
}

impl PriorForm {
    /// The same form with another width; with [`Self::Factors`], both A and B get it.
    pub fn with_std(self, std: f64) -> Self {
        match self {
            Self::Mean { .. } => Self::Mean { std },
            Self::Start { .. } => Self::Start { std },
            Self::Factors { .. } => Self::Factors { std_a: std, std_b: std },
            Self::Update { .. } => Self::Update { std },
            Self::ExpectedUpdate { .. } => Self::ExpectedUpdate { std },
        }
    }
}

/// The options of a prior. Its energy (the negative log density, up to a constant) is added to a loss that is
/// a mean over rows, with the weight `temperature / n` for n training rows.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prior {
    /// The quantity that the prior is on in each adapted layer.
    pub form: PriorForm,
    /// The temperature tau: 1 is Bayes' rule (for a score: with noise of variance 1/2), smaller is colder.
    pub temperature: f64,
    /// Whether the adapted layers share the form's widths: each of L layers then has the width over sqrt(L).
    /// With the two forms on the update, the sum of all updates is then as wide for one layer as for many.
    #[serde(default)]
    pub shared: bool,
    /// The width h of the prior on the task head's matrices W around their start, in units of 1 /
    /// sqrt(in_dim): `in_dim ||W - W_start||_F^2 / (2 h^2)`. `None`: no prior on the head. No effect if no
    /// head is trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head_std: Option<f64>,
}

impl Prior {
    /// The prior of [`MonteCLoRAConfig::calibrated`](crate::MonteCLoRAConfig::calibrated).
    pub const fn calibrated() -> Self {
        let form = PriorForm::ExpectedUpdate { std: 3.0 };
        Self { form, temperature: 0.1, shared: true, head_std: Some(0.5) }
    }

    /// The prior for LoRA without draws: narrower, since there is no noise that B would carry to the output.
    pub const fn map() -> Self {
        Self { form: PriorForm::Update { std: 0.35 }, ..Self::calibrated() }
    }

    /// Checks the widths and the temperature.
    ///
    /// # Errors
    /// Unless all are positive and finite; the error names the wrong one.
    pub fn validate(&self) -> Result<()> {
        positive("prior.temperature", self.temperature)?;
        self.head_std.map_or(Ok(()), |std| positive("prior.head_std", std))?;
        match self.form {
            PriorForm::Factors { std_a, std_b } => {
                positive("prior.std_a", std_a)?;
                positive("prior.std_b", std_b)
            }
            PriorForm::Mean { std }
            | PriorForm::Start { std }
            | PriorForm::Update { std }
            | PriorForm::ExpectedUpdate { std } => positive("prior.std", std),
        }
    }

    /// Whether the energy depends on the values at the start of training.
    pub fn needs_start(&self) -> bool {
        matches!(self.form, PriorForm::Start { .. } | PriorForm::Factors { .. }) || self.head_std.is_some()
    }

    /// Computes the energy, a scalar, of layers with pairs of equal shapes; `layers` counts all adapted
    /// layers.
    ///
    /// # Shapes
    /// - `pairs`: l pairs of A `(r, in_dim)` and B `(out_dim, r)`
    /// - `variances`: `(l, r)`, the expected squared norms of the rows of each layer's perturbation of A, if
    ///   any
    ///
    /// # Errors
    /// If the start of training is needed and missing, or shapes differ.
    pub(crate) fn energy(
        &self,
        pairs: &[&LowRank],
        variances: Option<&Tensor>,
        start: Option<&PriorStart>,
        layers: usize,
    ) -> Result<Tensor> {
        let share = if self.shared { (layers as f64).sqrt().recip() } else { 1.0 };
        let half_square = |tensor: Tensor, std: f64| -> candle_core::Result<Tensor> {
            tensor.sqr()?.sum_all()? * (0.5 / (std * share).powi(2))
        };
        let sum = |of: &dyn Fn(&LowRank) -> Result<Tensor>| -> Result<Tensor> {
            let terms = pairs.iter().map(|pair| of(pair)).collect::<Result<Vec<_>>>()?;
            Ok(Tensor::stack(&terms, 0)?.sum_all()?)
        };
        let moved = |pair: &LowRank| -> Result<Tensor> { Ok((pair.a() - started(start)?.of(pair)?)?) };
        match self.form {
            PriorForm::Mean { std } => sum(&|pair| Ok(half_square(pair.a().clone(), std)?)),
            PriorForm::Start { std } => sum(&|pair| Ok(half_square(moved(pair)?, std)?)),
            PriorForm::Factors { std_a, std_b } => {
                sum(&|pair| Ok((half_square(moved(pair)?, std_a)? + half_square(pair.b().clone(), std_b)?)?))
            }
            PriorForm::Update { std } => update(pairs, None, std * share),
            PriorForm::ExpectedUpdate { std } => update(pairs, variances, std * share),
        }
    }

    /// Computes the energy of the task head's matrices, a scalar. Returns `None` if the head has no prior or
    /// no head is trained.
    ///
    /// # Errors
    /// If the start of training is missing.
    pub(crate) fn head_energy(&self, start: Option<&PriorStart>) -> Result<Option<Tensor>> {
        let Some(std) = self.head_std else { return Ok(None) };
        let mut total: Option<Tensor> = None;
        for (weight, start) in &started(start)?.head {
            let precision = weight.dims2()?.1 as f64 / (std * std);
            let energy = ((weight - start)?.sqr()?.sum_all()? * (0.5 * precision))?;
            total = Some(joined(total, energy)?);
        }
        Ok(total)
    }
}

/// Computes `E||s B (A + D)||_F^2 / (2 std^2)`, summed over layers.
fn update(pairs: &[&LowRank], variances: Option<&Tensor>, std: f64) -> Result<Tensor> {
    let stack = |of: fn(&LowRank) -> &Tensor| -> Result<Tensor> {
        let (rows, columns) = of(pairs[0]).dims2()?;
        // `Tensor::stack` would add a graph node for each layer.
        let all: Vec<_> = pairs.iter().map(|pair| of(pair)).collect();
        Ok(Tensor::cat(&all, 0)?.reshape((pairs.len(), rows, columns))?)
    };
    let (a, b) = (stack(LowRank::a)?, stack(LowRank::b)?);
    let none = Tensor::zeros((pairs.len(), a.dim(1)?), a.dtype(), a.device())?;
    let weights: Vec<f64> = pairs.iter().map(|pair| (pair.scale() / std).powi(2)).collect();
    Ok(ops::update_energy(&a, &b, variances.unwrap_or(&none), &weights, OpPath::Fused)?)
}

pub(super) fn started(start: Option<&PriorStart>) -> Result<&PriorStart> {
    start.ok_or_else(|| Error::config("prior", "it needs the values at the start: give a PriorStart"))
}

/// The values at the start of training, from which a prior measures distances.
#[derive(Debug, Clone, Default)]
pub struct PriorStart {
    a: HashMap<TensorId, Tensor>,
    head: Vec<(Tensor, Tensor)>,
}

impl PriorStart {
    /// Copies the current values that `prior` measures from: every A, and the task head's trained matrices.
    ///
    /// # Errors
    /// If candle cannot copy.
    pub fn new(prior: &Prior, params: &Params) -> Result<Self> {
        let about_a = matches!(prior.form, PriorForm::Start { .. } | PriorForm::Factors { .. });
        let mut start = Self::default();
        for (_, param) in params.all() {
            let value = param.var.as_tensor();
            match param.role {
                Role::A if about_a => drop(start.a.insert(value.id(), value.detach().copy()?)),
                Role::Head if param.trainable && value.rank() == 2 => {
                    start.head.push((value.clone(), value.detach().copy()?));
                }
                _ => {}
            }
        }
        Ok(start)
    }

    /// The task head's matrices, each with its value at the start.
    #[cfg(feature = "cuda")]
    pub(super) fn head(&self) -> &[(Tensor, Tensor)] {
        &self.head
    }

    pub(super) fn of(&self, pair: &LowRank) -> Result<&Tensor> {
        let start = self.a.get(&pair.a().id());
        start.ok_or_else(|| Error::config("prior", "the values at the start of training lack a layer's A"))
    }
}
