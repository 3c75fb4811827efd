//! The regulariser: the KL terms (eqs. 10 to 12) and the cooperative loss (eq. 13) over all layers.
//!
//! ```text
//! eta / L sum_layers (KL_D + KL_W + KL_N) + w_C / L sum_layers L_C
//! ```

use candle_core::Tensor;

use super::config::MonteCLoRAConfig;
use super::evidence::EvidenceBound;
use super::layer::MonteCLoRA;
use super::layer_sums::{self, ExtraTerms, RegularizedLayer};
#[cfg(feature = "cuda")]
use super::layer_sums_cuda;
use super::noise::{DrawNoise, LatentNoise};
use super::options::{Compat, KlEvaluation};
use super::posterior::Posterior;
use crate::adapter::{no_active, visit_active, AdaptableModel, Context, Params, Prior, PriorStart};
use crate::error::{Error, Result};
use crate::ops::{self, joined, Tape};
use crate::util::check::{at_least_one, not_negative};

/// The regulariser of a model's MonteCLoRA layers.
///
/// With [`KlEvaluation::Expected`] it depends on the parameters alone. With [`KlEvaluation::Sampled`] it
/// evaluates KL_N and L_C at the draw of the pass, recomputed from its index.
///
/// # Example
/// ```
/// use candle_core::Device;
/// use monteclora::{MonteCLoRA, MonteCLoRAConfig, Noise, Params, Pass, Regularizer};
///
/// let params = Params::new(Noise::new(0), &Device::Cpu);
/// let config = MonteCLoRAConfig { rank: 2, ..Default::default() };
/// let layer = MonteCLoRA::new(&params, "proj", "default", (6, 4), &config)?;
/// let terms = Regularizer::new(&config).for_layers(&[&layer], Pass::Mean)?;
/// // At the start, V and a equal the prior's: two of the three divergences are zero.
/// assert_eq!(terms.kl_wishart.to_scalar::<f32>()?, 0.0);
/// assert!(terms.kl_dirichlet.to_scalar::<f32>()?.abs() < 1e-5);
/// assert!(terms.kl_gaussian.to_scalar::<f32>()? > 0.0 && terms.total.to_scalar::<f32>()? > 0.0);
/// # Ok::<(), monteclora::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Regularizer {
    mode: KlEvaluation,
    kl_weight: f64,
    cooperative_weight: f64,
    prior: Option<Prior>,
    evidence: Option<EvidenceBound>,
    rows: Option<f64>,
    start: Option<PriorStart>,
}

/// The regulariser's value and its terms, scalar tensors on the first layer's device. In a pass with a
/// [`Tape`] on a CUDA device, only the total has a gradient.
#[derive(Debug, Clone)]
pub struct RegularizerTerms {
    /// The sum that is added to the loss: `eta (kl_gaussian + kl_wishart + kl_dirichlet) + w_C cooperative +
    /// tau / n prior`, or, with an evidence bound, `tau / n (kl_mean [+ L (kl_wishart + kl_dirichlet)])`,
    /// where L is the number of layers.
    pub total: Tensor,
    /// KL_N (eq. 10), averaged over layers.
    pub kl_gaussian: Tensor,
    /// KL_W (eq. 11), averaged over layers.
    pub kl_wishart: Tensor,
    /// KL_D (eq. 12), averaged over layers.
    pub kl_dirichlet: Tensor,
    /// L_C (eq. 13), averaged over layers.
    pub cooperative: Tensor,
    /// The energy of the prior, if there is one, summed over layers and the head.
    pub prior: Option<Tensor>,
    /// KL_A of the evidence bound, if it is used, summed over layers.
    pub kl_mean: Option<Tensor>,
}

impl Regularizer {
    /// Creates the regulariser with the mode and weights of `config`, which are checked when it is evaluated.
    pub fn new(config: &MonteCLoRAConfig) -> Self {
        Self {
            mode: config.mode,
            kl_weight: config.kl_weight,
            cooperative_weight: config.cooperative_weight,
            prior: config.prior,
            evidence: config.evidence,
            rows: None,
            start: None,
        }
    }

    /// Sets the number of training rows (of a language model: target tokens) and takes the current values of
    /// `params` as the start of training. A prior and the evidence bound need this; the other terms do not.
    ///
    /// # Errors
    /// If `rows` is zero, or candle cannot copy.
    pub fn for_training(self, params: &Params, rows: usize) -> Result<Self> {
        at_least_one("rows", rows)?;
        Ok(Self { rows: Some(rows as f64), ..self.with_start(params)? })
    }

    /// Sets only the start of training; the trainer passes the number of rows.
    pub(crate) fn with_start(self, params: &Params) -> Result<Self> {
        let prior = self.prior.filter(Prior::needs_start);
        let start = prior.map(|prior| PriorStart::new(&prior, params)).transpose()?;
        Ok(Self { start, ..self })
    }

    /// Computes the regulariser over every layer whose active adapter is MonteCLoRA. `cx` is the pass, or a
    /// context with the schedule's factors on eps, which a prior in expectation and the evidence bound depend
    /// on.
    ///
    /// # Errors
    /// If the model has no such layer; if a weight is negative or not finite; with [`KlEvaluation::Sampled`]
    /// at [`Pass::Mean`](crate::Pass::Mean), which has no draw; with [`KlEvaluation::Expected`] for
    /// posteriors of [`Compat::Peft`], whose clipped variances have no expectation here; or with a prior or
    /// an evidence bound without [`Self::for_training`].
    pub fn for_model(&self, model: &dyn AdaptableModel, cx: impl Into<Context>) -> Result<RegularizerTerms> {
        self.for_model_on(model, &cx.into(), self.rows)
    }

    /// [`Self::for_model`] for a run on `rows` rows.
    pub(crate) fn for_model_on(
        &self,
        model: &dyn AdaptableModel,
        cx: &Context,
        rows: Option<f64>,
    ) -> Result<RegularizerTerms> {
        let mut layers = Vec::new();
        visit_active(model, |adapter| {
            layers.push(RegularizedLayer::of(adapter, cx));
            Ok(())
        })?;
        self.at(&layers, self.draws(&layers, cx)?, rows, cx.tape())
    }

    /// Computes the regulariser over these layers.
    ///
    /// # Errors
    /// As [`Self::for_model`].
    pub fn for_layers(&self, layers: &[&MonteCLoRA], cx: impl Into<Context>) -> Result<RegularizerTerms> {
        let cx = cx.into();
        let layers: Vec<_> = layers.iter().map(|layer| RegularizedLayer::of(layer, &cx)).collect();
        self.at(&layers, self.draws(&layers, &cx)?, self.rows, cx.tape())
    }

    /// Computes the regulariser over these posteriors; those with equal shapes and options form one batch.
    ///
    /// # Errors
    /// As [`Self::for_model`]; and with a prior or the evidence bound, which need layers with A and B.
    pub fn of(&self, posteriors: &[Posterior], cx: impl Into<Context>) -> Result<RegularizerTerms> {
        let layers: Vec<_> = posteriors.iter().map(RegularizedLayer::of_posterior).collect();
        let cx = cx.into();
        self.at(&layers, self.draws(&layers, &cx)?, self.rows, cx.tape())
    }

    /// Computes the regulariser at given draws, one for each posterior, whatever the mode.
    ///
    /// # Errors
    /// If the numbers of posteriors and draws differ or are zero, a draw does not have the shapes of its
    /// posterior, or a weight is outside its domain; and as [`Self::of`].
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
        let layers: Vec<_> = posteriors.iter().map(RegularizedLayer::of_posterior).collect();
        self.at(&layers, Some(draws), self.rows, None)
    }

    /// Recomputes the draws of the pass; `None` in expectation.
    fn draws(&self, layers: &[RegularizedLayer], cx: &Context) -> Result<Option<Vec<LatentNoise>>> {
        if self.mode == KlEvaluation::Expected {
            return Ok(None);
        }
        let Some(draw) = cx.pass.posterior_draw()? else {
            return Err(Error::config("mode", "sampled needs a pass with a draw, got the mean"));
        };
        let latents =
            |layer: &RegularizedLayer| layer.posterior.spec().latents(layer.posterior.streams(), draw);
        Ok(Some(layers.iter().map(latents).collect::<candle_core::Result<Vec<_>>>()?))
    }

    /// Computes the regulariser at these draws, or in expectation.
    fn at(
        &self,
        layers: &[RegularizedLayer],
        draws: Option<Vec<LatentNoise>>,
        rows: Option<f64>,
        tape: Option<&Tape>,
    ) -> Result<RegularizerTerms> {
        not_negative("kl_weight", self.kl_weight)?;
        not_negative("cooperative_weight", self.cooperative_weight)?;
        self.prior.map_or(Ok(()), |prior| prior.validate())?;
        self.evidence.map_or(Ok(()), |evidence| evidence.validate())?;
        if draws.is_none() && layers.iter().any(|l| l.posterior.spec().config.compat == Compat::Peft) {
            return Err(Error::config("mode", "PEFT only supports sampled, got expected"));
        }
        #[cfg(feature = "cuda")]
        if let (Some(tape), None, None) = (tape, &draws, &self.evidence) {
            if let Some(terms) = self.on_device(layers, rows, tape)? {
                return Ok(terms);
            }
        }
        let (start, evidence) = (self.start.as_ref(), self.evidence.as_ref());
        let beside = ExtraTerms { layers: layers.len(), prior: self.prior.as_ref(), start, evidence, tape };
        let Some(sums) = layer_sums::sums(layers, draws.as_deref(), beside)? else {
            return Err(no_active("MonteCLoRA"));
        };
        let share = 1.0 / layers.len() as f64;
        let [gaussian, wishart, dirichlet, cooperative] = sums.terms;
        let (kl_gaussian, kl_wishart) = ((gaussian * share)?, (wishart * share)?);
        let (kl_dirichlet, cooperative) = ((dirichlet * share)?, (cooperative * share)?);
        let prior = match (sums.prior, self.prior) {
            (Some(layers), Some(prior)) => Some(match prior.head_energy(self.start.as_ref())? {
                Some(head) => joined(Some(layers), head)?,
                None => layers,
            }),
            _ => None,
        };
        // A term of weight zero still contributes a zero gradient. Without it, the concentration might have
        // no gradient at all (sparse mixture, one component), which training treats as an error.
        let total = if let (Some(bound), Some(kl_mean)) = (&self.evidence, &sums.kl_mean) {
            let weight = bound.temperature / training_rows(rows)?;
            let latents = if bound.latents { weight * layers.len() as f64 } else { 0.0 };
            let kl = ops::scale(&(&kl_wishart + &kl_dirichlet)?, latents)?;
            ((kl_mean * weight)? + kl)?
        } else {
            let kl = ((&kl_gaussian + &kl_wishart)? + &kl_dirichlet)?;
            (ops::scale(&kl, self.kl_weight)? + ops::scale(&cooperative, self.cooperative_weight)?)?
        };
        let total = match (&prior, self.prior) {
            (Some(energy), Some(prior)) => (total + (energy * (prior.temperature / training_rows(rows)?))?)?,
            _ => total,
        };
        let kl_mean = sums.kl_mean;
        Ok(RegularizerTerms { total, kl_gaussian, kl_wishart, kl_dirichlet, cooperative, prior, kl_mean })
    }

    /// Computes the regulariser in expectation with our CUDA kernels; `None` if they do not support it.
    #[cfg(feature = "cuda")]
    fn on_device(
        &self,
        layers: &[RegularizedLayer],
        rows: Option<f64>,
        tape: &Tape,
    ) -> Result<Option<RegularizerTerms>> {
        let prior = match &self.prior {
            Some(prior) => {
                let Some(layers) = layer_sums_cuda::pairs(layers) else { return Ok(None) };
                let energy = prior.energy_on_device(layers, self.start.as_ref(), tape)?;
                let Some(energy) = energy else { return Ok(None) };
                Some((energy, prior.temperature / training_rows(rows)?))
            }
            None => None,
        };
        let weights = [self.kl_weight, self.cooperative_weight];
        let Some((means, total)) = layer_sums_cuda::means_and_total(layers, weights, tape)? else {
            return Ok(None);
        };
        let [kl_gaussian, kl_wishart, kl_dirichlet, cooperative] = means;
        let total = match &prior {
            Some((energy, weight)) => (total + (energy * *weight)?)?,
            None => total,
        };
        let prior = prior.map(|(energy, _)| energy);
        Ok(Some(RegularizerTerms {
            total,
            kl_gaussian,
            kl_wishart,
            kl_dirichlet,
            cooperative,
            prior,
            kl_mean: None,
        }))
    }
}

/// Returns the number of training rows; an error if it was not set.
pub(crate) fn training_rows(rows: Option<f64>) -> Result<f64> {
    rows.ok_or_else(|| {
        let reason = "a prior is weighted by 1 / rows: set their number by Regularizer::for_training";
        Error::config("rows", reason)
    })
}
