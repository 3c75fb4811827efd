//! The regulariser: the KL terms (eq. 10 to 12) and the cooperative loss (eq. 13) over all layers.
//!
//! ```text
//! eta / L sum_layers (KL_D + KL_W + KL_N) + w_C / L sum_layers L_C
//! ```

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};

use super::config::MonteCLoRAConfig;
use super::draw::weights;
use super::layer::MonteCLoRA;
use super::noise::{DrawNoise, LatentNoise};
use super::options::{Compat, KlEvaluation};
use super::peft_compat;
use super::posterior::Posterior;
use crate::adapter::{AdaptableModel, Pass};
use crate::dist::{Dirichlet, Gaussian, Wishart};
use crate::error::{Error, Result};
use crate::ops;
use crate::util::check::not_negative;

/// The regulariser of a model's MonteCLoRA layers.
///
/// In [`KlEvaluation::Expected`] it depends on the parameters alone; in [`KlEvaluation::Sampled`] it evaluates
/// KL_N and L_C at the draw that the pass addresses, recomputed from the address.
///
/// # Example
/// ```
/// use candle_core::Device;
/// use monteclora::{MonteCLoRA, MonteCLoRAConfig, Noise, Params, Pass, Regularizer};
///
/// let params = Params::new(Noise::new(0), &Device::Cpu);
/// let config = MonteCLoRAConfig { rank: 2, ..Default::default() };
/// let layer = MonteCLoRA::new(&params, "proj", "default", (6, 4), &config)?;
/// let terms = Regularizer::new(&config).for_layers(&[&layer], &Pass::Mean)?;
/// // At the start V and a are those of the prior: two of the three divergences are zero.
/// assert_eq!(terms.kl_wishart.to_scalar::<f32>()?, 0.0);
/// assert!(terms.kl_dirichlet.to_scalar::<f32>()?.abs() < 1e-5);
/// assert!(terms.kl_gaussian.to_scalar::<f32>()? > 0.0 && terms.total.to_scalar::<f32>()? > 0.0);
/// # Ok::<(), monteclora::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Regularizer {
    mode: KlEvaluation,
    kl_weight: f64,
    cooperative_weight: f64,
}

/// The regulariser's value and its terms, all scalar tensors on the parameters' device.
#[derive(Debug, Clone)]
pub struct RegularizerTerms {
    /// `eta (kl_gaussian + kl_wishart + kl_dirichlet) + w_C cooperative`.
    pub total: Tensor,
    /// KL_N (eq. 10), the mean over layers.
    pub kl_gaussian: Tensor,
    /// KL_W (eq. 11), the mean over layers.
    pub kl_wishart: Tensor,
    /// KL_D (eq. 12), the mean over layers.
    pub kl_dirichlet: Tensor,
    /// L_C (eq. 13), the mean over layers.
    pub cooperative: Tensor,
}

impl Regularizer {
    /// The regulariser with the mode and the weights of `config`, which are checked at use.
    pub fn new(config: &MonteCLoRAConfig) -> Self {
        Self { mode: config.mode, kl_weight: config.kl_weight, cooperative_weight: config.cooperative_weight }
    }

    /// The regulariser of every layer whose active adapter is MonteCLoRA.
    ///
    /// # Errors
    /// If there is none, a weight is negative or not finite, in [`KlEvaluation::Sampled`] at [`Pass::Mean`],
    /// which addresses no draw, or in [`KlEvaluation::Expected`] with posteriors of [`Compat::Peft`], whose
    /// clipped variances have no expectation here.
    pub fn for_model(&self, model: &dyn AdaptableModel, pass: &Pass) -> Result<RegularizerTerms> {
        let mut posteriors = Vec::new();
        model.visit_linears(&mut |layer| {
            let adapter =
                layer.active().and_then(|(_, adapter)| adapter.as_any().downcast_ref::<MonteCLoRA>());
            posteriors.extend(adapter.map(|adapter| adapter.posterior().clone()));
            Ok(())
        })?;
        self.of(&posteriors, pass)
    }

    /// The regulariser of these layers.
    ///
    /// # Errors
    /// As [`Self::for_model`].
    pub fn for_layers(&self, layers: &[&MonteCLoRA], pass: &Pass) -> Result<RegularizerTerms> {
        let posteriors: Vec<_> = layers.iter().map(|layer| layer.posterior().clone()).collect();
        self.of(&posteriors, pass)
    }

    /// The regulariser of these posteriors: all that share a shape and its options in one batch.
    ///
    /// # Errors
    /// As [`Self::for_model`].
    pub fn of(&self, posteriors: &[Posterior], pass: &Pass) -> Result<RegularizerTerms> {
        let draws = match self.mode {
            KlEvaluation::Expected => None,
            KlEvaluation::Sampled => {
                let Some(draw) = pass.posterior_draw()? else {
                    return Err(Error::config("mode", "sampled needs a pass with a draw, got the mean"));
                };
                let latents = |p: &Posterior| p.spec().latents(p.streams(), draw);
                Some(posteriors.iter().map(latents).collect::<candle_core::Result<Vec<_>>>()?)
            }
        };
        self.at(posteriors, draws)
    }

    /// The regulariser at draws given from outside, one for each posterior, whatever the mode.
    ///
    /// # Errors
    /// If their numbers differ or are zero, a draw has not the shapes of its posterior, or a weight is
    /// outside its domain.
    pub fn of_draws(&self, posteriors: &[Posterior], draws: &[DrawNoise]) -> Result<RegularizerTerms> {
        if posteriors.len() != draws.len() {
            let reason = format!("expected {}, one for each layer, got {}", posteriors.len(), draws.len());
            return Err(Error::config("draws", reason));
        }
        let latents = |(posterior, draw): (&Posterior, &DrawNoise)| {
            draw.check(posterior.spec())?;
            draw.latents()
        };
        let draws = posteriors.iter().zip(draws).map(latents).collect::<candle_core::Result<_>>()?;
        self.at(posteriors, Some(draws))
    }

    /// The regulariser at these draws, or in expectation.
    fn at(&self, posteriors: &[Posterior], draws: Option<Vec<LatentNoise>>) -> Result<RegularizerTerms> {
        not_negative("kl_weight", self.kl_weight)?;
        not_negative("cooperative_weight", self.cooperative_weight)?;
        if draws.is_none() && posteriors.iter().any(|p| p.spec().config.compat == Compat::Peft) {
            return Err(Error::config("mode", "PEFT's numbers exist for sampled only, got expected"));
        }
        let mut groups: BTreeMap<String, (Vec<&Posterior>, Vec<&LatentNoise>)> = BTreeMap::new();
        for (i, posterior) in posteriors.iter().enumerate() {
            let group = groups.entry(group_key(posterior)).or_default();
            group.0.push(posterior);
            group.1.extend(draws.as_ref().map(|draws| &draws[i]));
        }
        let mut total: Option<[Tensor; 4]> = None;
        for (group, noise) in groups.values() {
            let sums = sums(group, noise)?;
            total = Some(match total {
                None => sums,
                Some(total) => {
                    let add = |i: usize| -> candle_core::Result<Tensor> {
                        &total[i] + sums[i].to_device(total[i].device())?
                    };
                    [add(0)?, add(1)?, add(2)?, add(3)?]
                }
            });
        }
        let Some([gaussian, wishart, dirichlet, cooperative]) = total else {
            return Err(Error::config("regularizer", "the model has no active MonteCLoRA layer"));
        };
        let share = 1.0 / posteriors.len() as f64;
        let (kl_gaussian, kl_wishart) = ((gaussian * share)?, (wishart * share)?);
        let (kl_dirichlet, cooperative) = ((dirichlet * share)?, (cooperative * share)?);
        let kl = ((&kl_gaussian + &kl_wishart)? + &kl_dirichlet)?;
        // A term of weight zero still gives its zero gradient: without the task's (a sparse mixture,
        // one component) the concentration would have none, which training takes for a fault.
        let total = (ops::scale(&kl, self.kl_weight)? + ops::scale(&cooperative, self.cooperative_weight)?)?;
        Ok(RegularizerTerms { total, kl_gaussian, kl_wishart, kl_dirichlet, cooperative })
    }
}

/// What layers must share to be computed in one batch.
fn group_key(posterior: &Posterior) -> String {
    let (spec, config) = (posterior.spec(), &posterior.spec().config);
    format!(
        "{} {} {} {} {:?} {:?} {:?} {:?} {:?}",
        config.rank,
        config.num_components,
        config.degrees(),
        config.dirichlet_prior,
        config.covariance,
        config.estimator,
        config.compat,
        spec.dtype,
        spec.device.location()
    )
}

/// The sums of KL_N, KL_W, KL_D and L_C over layers of one shape, stacked: `log_std` (l, r),
/// `log_concentration` (l, n). Without noise the two that depend on the draw are expectations.
fn sums(group: &[&Posterior], noise: &[&LatentNoise]) -> Result<[Tensor; 4]> {
    let config = &group[0].spec().config;
    // Not `Tensor::stack`, which has a node more for each layer.
    let stack = |of: fn(&Posterior) -> &Tensor| {
        let rows: Vec<_> = group.iter().map(|posterior| of(posterior)).collect();
        Tensor::cat(&rows, 0)?.reshape((rows.len(), rows[0].elem_count()))
    };
    let (log_std, c) = (stack(Posterior::std_prior)?, stack(Posterior::expert_weights_prior)?);
    let wishart = Wishart::new(&log_std, config.degrees(), config.covariance)?;
    let dirichlet = Dirichlet::new(&c)?;
    let terms = dirichlet.kl_terms_symmetric(config.dirichlet_prior)?;
    let kl_dirichlet = match config.compat {
        Compat::None => Dirichlet::kl_of_terms(terms)?,
        Compat::Peft => peft_compat::kl_dirichlet(terms)?,
    };
    let (kl_gaussian, cooperative) = if noise.is_empty() {
        (Gaussian::expected_kl_standard(&wishart)?, dirichlet.expected_cooperative()?)
    } else {
        let uniforms: Vec<f64> = noise.iter().flat_map(|noise| noise.weights.iter().copied()).collect();
        let uniforms = Tensor::from_vec(uniforms, (group.len(), config.num_components), &Device::Cpu)?;
        let pi = weights(&c, config, &uniforms)?;
        let factors: Vec<&[f64]> = noise.iter().map(|noise| noise.bartlett.as_slice()).collect();
        let kl_gaussian = match config.compat {
            Compat::None => Gaussian::sampled_kl_standard(&wishart, &factors)?,
            Compat::Peft => {
                let squares = wishart.bartlett_squares(&factors)?;
                peft_compat::kl_gaussian(&log_std, &squares, config.num_components)?
            }
        };
        (kl_gaussian, Dirichlet::cooperative(&pi)?)
    };
    Ok([
        kl_gaussian.sum_all()?,
        wishart.kl_standard()?.sum_all()?,
        kl_dirichlet.sum_all()?,
        cooperative.sum_all()?,
    ])
}
