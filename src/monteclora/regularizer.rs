//! The regulariser: the KL terms (eq. 10 to 12) and the cooperative loss (eq. 13) over all layers.
//!
//! ```text
//! eta / L sum_layers (KL_D + KL_W + KL_N) + w_C / L sum_layers L_C
//! ```

use candle_core::Tensor;

use super::config::MonteCLoRAConfig;
use super::evidence::EvidenceBound;
use super::layer::MonteCLoRA;
use super::layer_sums::{self, Beside, Layer};
#[cfg(feature = "cuda")]
use super::layer_sums_cuda;
use super::noise::{DrawNoise, LatentNoise};
use super::options::{Compat, KlEvaluation};
use super::posterior::Posterior;
use crate::adapter::{AdaptableModel, Context, Params, Prior, PriorStart};
use crate::error::{Error, Result};
use crate::ops::{self, joined, Tape};
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
/// let terms = Regularizer::new(&config).for_layers(&[&layer], Pass::Mean)?;
/// // At the start V and a are those of the prior: two of the three divergences are zero.
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

/// The regulariser's value and its terms, all scalar tensors on the first layer's device. Of a pass with a
/// [`Tape`] on a CUDA device the terms are values: there the total alone has a gradient.
#[derive(Debug, Clone)]
pub struct RegularizerTerms {
    /// `eta (kl_gaussian + kl_wishart + kl_dirichlet) + w_C cooperative + tau / n prior`, or, with an evidence
    /// bound, `tau / n (kl_mean [+ L (kl_wishart + kl_dirichlet)])`, L the number of layers.
    pub total: Tensor,
    /// KL_N (eq. 10), the mean over layers.
    pub kl_gaussian: Tensor,
    /// KL_W (eq. 11), the mean over layers.
    pub kl_wishart: Tensor,
    /// KL_D (eq. 12), the mean over layers.
    pub kl_dirichlet: Tensor,
    /// L_C (eq. 13), the mean over layers.
    pub cooperative: Tensor,
    /// The energy of the prior, its sum over layers and the head; where there is a prior.
    pub prior: Option<Tensor>,
    /// KL_A of the evidence bound, its sum over layers; where it is the objective.
    pub kl_mean: Option<Tensor>,
}

impl Regularizer {
    /// The regulariser with the mode and the weights of `config`, which are checked at use.
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

    /// The same for a run on `rows` training rows (of a language model: target tokens), whose start are the
    /// present values of `params`. A prior and the evidence bound ask for it; the other terms do not.
    ///
    /// # Errors
    /// If `rows` is zero, or candle cannot copy.
    pub fn for_training(self, params: &Params, rows: usize) -> Result<Self> {
        if rows == 0 {
            return Err(Error::config("rows", "a prior weighs 1 / rows: expected at least 1, got 0"));
        }
        Ok(Self { rows: Some(rows as f64), ..self.with_start(params)? })
    }

    /// Whether a term weighs by the number of training rows.
    #[cfg(feature = "train")]
    pub(crate) fn needs_rows(&self) -> bool {
        self.prior.is_some() || self.evidence.is_some()
    }

    /// The same with the start of training alone: the trainer tells the rows.
    pub(crate) fn with_start(self, params: &Params) -> Result<Self> {
        let prior = self.prior.filter(Prior::needs_start);
        let start = prior.map(|prior| PriorStart::new(&prior, params)).transpose()?;
        Ok(Self { start, ..self })
    }

    /// The regulariser of every layer whose active adapter is MonteCLoRA. `cx`: the pass, or the context with
    /// the schedule's factors on eps, which a prior in expectation and the evidence bound see.
    ///
    /// # Errors
    /// If there is none, a weight is negative or not finite, in [`KlEvaluation::Sampled`] at [`Pass::Mean`](crate::Pass::Mean),
    /// which addresses no draw, in [`KlEvaluation::Expected`] with posteriors of [`Compat::Peft`], whose
    /// clipped variances have no expectation here, or with a prior or an evidence bound without
    /// [`Self::for_training`].
    pub fn for_model(&self, model: &dyn AdaptableModel, cx: impl Into<Context>) -> Result<RegularizerTerms> {
        self.for_model_on(model, &cx.into(), self.rows)
    }

    /// [`Self::for_model`] of a run on `rows` rows.
    pub(crate) fn for_model_on(
        &self,
        model: &dyn AdaptableModel,
        cx: &Context,
        rows: Option<f64>,
    ) -> Result<RegularizerTerms> {
        let mut layers = Vec::new();
        model.visit_linears(&mut |layer| {
            layers.extend(layer.active_as::<MonteCLoRA>().map(|adapter| Layer::of(adapter, cx)));
            Ok(())
        })?;
        self.at(&layers, self.draws(&layers, cx)?, rows, cx.tape())
    }

    /// The regulariser of these layers.
    ///
    /// # Errors
    /// As [`Self::for_model`].
    pub fn for_layers(&self, layers: &[&MonteCLoRA], cx: impl Into<Context>) -> Result<RegularizerTerms> {
        let cx = cx.into();
        let layers: Vec<_> = layers.iter().map(|layer| Layer::of(layer, &cx)).collect();
        self.at(&layers, self.draws(&layers, &cx)?, self.rows, cx.tape())
    }

    /// The regulariser of these posteriors: all that share a shape and its options in one batch.
    ///
    /// # Errors
    /// As [`Self::for_model`]; a prior and the evidence bound ask for layers, which have A and B.
    pub fn of(&self, posteriors: &[Posterior], cx: impl Into<Context>) -> Result<RegularizerTerms> {
        let layers: Vec<_> = posteriors.iter().map(Layer::of_posterior).collect();
        let cx = cx.into();
        self.at(&layers, self.draws(&layers, &cx)?, self.rows, cx.tape())
    }

    /// The regulariser at draws given from outside, one for each posterior, whatever the mode.
    ///
    /// # Errors
    /// If their numbers differ or are zero, a draw has not the shapes of its posterior, or a weight is
    /// outside its domain; as [`Self::of`].
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
        let layers: Vec<_> = posteriors.iter().map(Layer::of_posterior).collect();
        self.at(&layers, Some(draws), self.rows, None)
    }

    /// The draws that the pass addresses, made again; none in expectation.
    fn draws(&self, layers: &[Layer], cx: &Context) -> Result<Option<Vec<LatentNoise>>> {
        if self.mode == KlEvaluation::Expected {
            return Ok(None);
        }
        let Some(draw) = cx.pass.posterior_draw()? else {
            return Err(Error::config("mode", "sampled needs a pass with a draw, got the mean"));
        };
        let latents = |layer: &Layer| layer.posterior.spec().latents(layer.posterior.streams(), draw);
        Ok(Some(layers.iter().map(latents).collect::<candle_core::Result<Vec<_>>>()?))
    }

    /// The regulariser at these draws, or in expectation.
    fn at(
        &self,
        layers: &[Layer],
        draws: Option<Vec<LatentNoise>>,
        rows: Option<f64>,
        tape: Option<&Tape>,
    ) -> Result<RegularizerTerms> {
        not_negative("kl_weight", self.kl_weight)?;
        not_negative("cooperative_weight", self.cooperative_weight)?;
        self.prior.map_or(Ok(()), |prior| prior.validate())?;
        self.evidence.map_or(Ok(()), |evidence| evidence.validate())?;
        if draws.is_none() && layers.iter().any(|l| l.posterior.spec().config.compat == Compat::Peft) {
            return Err(Error::config("mode", "PEFT's numbers exist for sampled only, got expected"));
        }
        #[cfg(feature = "cuda")]
        if let (Some(tape), None, None) = (tape, &draws, &self.evidence) {
            if let Some(terms) = self.on_device(layers, rows, tape)? {
                return Ok(terms);
            }
        }
        let (start, evidence) = (self.start.as_ref(), self.evidence.as_ref());
        let beside = Beside { layers: layers.len(), prior: self.prior.as_ref(), start, evidence, tape };
        let Some(sums) = layer_sums::sums(layers, draws.as_deref(), beside)? else {
            return Err(Error::config("regularizer", "the model has no active MonteCLoRA layer"));
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
        // A term of weight zero still gives its zero gradient: without the task's (a sparse mixture,
        // one component) the concentration would have none, which training takes for a fault.
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

    /// The regulariser in expectation by our own kernels; none where they do not serve.
    #[cfg(feature = "cuda")]
    fn on_device(
        &self,
        layers: &[Layer],
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

/// The number of training rows, which is not guessed.
pub(crate) fn training_rows(rows: Option<f64>) -> Result<f64> {
    rows.ok_or_else(|| {
        let reason = "a prior weighs 1 / rows of the training set: Regularizer::for_training tells them";
        Error::config("rows", reason)
    })
}
