//! The options of MonteCLoRA, their presets and their validation.

use serde::{Deserialize, Serialize};

use super::evidence::EvidenceBound;
use super::options::{Compat, Initial, KlEvaluation, Mixture};
use super::peft_compat;
use super::schedule::ScalerSchedule;
use crate::adapter::{low_rank, Prior};
use crate::dist::{Covariance, Estimator};
use crate::error::{Error, Result};
use crate::special::gamma::MAX_SHAPE;
use crate::util::check::{at_least_one, not_negative, positive};

/// The largest number of draws that a layer's buffer prepares ahead. The limit keeps a typing error from
/// exhausting the machine's memory.
pub const MAX_BUFFER_SIZE: usize = 1 << 16;

/// The options of MonteCLoRA. Presets: [`Self::paper`] (the default), [`Self::calibrated`],
/// [`Self::paper_literal`], [`Self::peft`], [`Self::released`].
///
/// # Example
/// ```
/// use monteclora::MonteCLoRAConfig;
///
/// let config = MonteCLoRAConfig { rank: 4, num_components: 8, ..Default::default() };
/// config.validate()?;
/// let error = MonteCLoRAConfig { rank: 4, df: Some(3.0), ..config }.validate().unwrap_err();
/// assert!(error.to_string().starts_with("invalid df"));
/// # Ok::<(), monteclora::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
// Missing fields take the paper's defaults, so that old files keep their meaning.
#[serde(default = "MonteCLoRAConfig::paper", deny_unknown_fields)]
pub struct MonteCLoRAConfig {
    /// The rank r of the update.
    pub rank: usize,
    /// The update is scaled by `alpha / rank`.
    pub alpha: f64,
    /// Probability of dropping an input of the low-rank branch, in training.
    pub dropout: f64,
    /// Scale by `alpha / sqrt(rank)` instead (rsLoRA).
    pub use_rslora: bool,
    /// N, the number of mixture components (PEFT: `num_samples`).
    pub num_components: usize,
    /// eps, the scale of the perturbation.
    pub sample_scaler: f64,
    /// kappa, the standard deviation of the perturbation's elements in units of 1 / sqrt(in_dim) while V and
    /// a are one (A starts at 0.58). If set, each layer computes its `sample_scaler` from kappa and its own
    /// width ([`Self::at_width`]); `None` uses `sample_scaler` for every width. PEFT supports only
    /// `sample_scaler`, and uses it if it continues the training.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub relative_scaler: Option<f64>,
    /// How eps changes over training; `train::fit` applies it. In your own training loop, give each pass the
    /// factors of a [`SampleScaler`](crate::SampleScaler); without them, eps is constant.
    pub scaler_schedule: ScalerSchedule,
    /// eta, the weight of the three KL terms.
    pub kl_weight: f64,
    /// The weight of the cooperative loss.
    pub cooperative_weight: f64,
    /// b, the concentration of the Dirichlet prior, the same for every component.
    pub dirichlet_prior: f64,
    /// The degrees of freedom of the Wishart distribution; `None` is the rank.
    pub df: Option<f64>,
    /// Whether draws use the full covariance or only its diagonal.
    pub covariance: Covariance,
    /// How the mixture weights are drawn.
    pub estimator: Estimator,
    /// How the mixture is drawn.
    pub mixture: Mixture,
    /// How the regulariser is evaluated.
    pub mode: KlEvaluation,
    /// The number of draws whose noise each layer on a device prepares ahead, at most [`MAX_BUFFER_SIZE`]; 0
    /// disables the buffer. It never changes a result. Layers on the CPU have no buffer
    /// ([`SampleBuffer`](super::buffer::SampleBuffer)).
    pub buffer_size: usize,
    /// The largest number of bytes of noise that a layer keeps, whatever `buffer_size` is. `None`: no limit
    /// for a standalone layer; the layers of a model together keep at most [`crate::inject::BUFFER_SHARE`] of
    /// the base's bytes.
    pub buffer_bytes: Option<usize>,
    /// The initial value of the concentration a.
    pub initial_concentration: Initial,
    /// The initial value of the standard deviations sqrt(V_i).
    pub initial_std: Initial,
    /// Which implementation's numbers to reproduce.
    pub compat: Compat,
    /// A prior on the mean of the update, in addition to the regulariser's terms; the paper has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prior: Option<Prior>,
    /// The evidence bound, in place of the regulariser's terms; the paper has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub evidence: Option<EvidenceBound>,
}

impl Default for MonteCLoRAConfig {
    fn default() -> Self {
        Self::paper()
    }
}

impl MonteCLoRAConfig {
    /// The paper's values for RoBERTa-base, with our estimators where the paper's are biased or noisier. (For
    /// LLaMA-3.2-3B the paper uses a `sample_scaler` of 2.5e-5.)
    pub const fn paper() -> Self {
        Self {
            rank: 8,
            alpha: 16.0,
            dropout: 0.0,
            use_rslora: false,
            num_components: 4,
            sample_scaler: 5e-3,
            relative_scaler: None,
            scaler_schedule: ScalerSchedule::Constant,
            kl_weight: 1e-5,
            cooperative_weight: 1.0,
            dirichlet_prior: 1.0,
            df: None,
            covariance: Covariance::Full,
            estimator: Estimator::Exact,
            mixture: Mixture::Collapsed,
            mode: KlEvaluation::Expected,
            buffer_size: 15,
            buffer_bytes: None,
            initial_concentration: Initial::Constant(1.0),
            initial_std: Initial::Constant(1.0),
            compat: Compat::None,
            prior: None,
            evidence: None,
        }
    }

    /// [`Self::paper`] with draws large enough to influence training: eps rises over the first half of
    /// training, and a prior acts on the update in expectation over the draws, weighted by 1 / n for n
    /// training rows. Meant for few rows and many epochs, where LoRA becomes over-confident;
    /// examples/results/README.md has the measurements.
    ///
    /// The perturbation has the same relative size in layers of every width; `sample_scaler` is its value at
    /// width 768, for PEFT. B and the head need higher learning rates than A, 4 and 10 times as high:
    /// `train::Method::train_config` sets them for `train::fit`, whose own defaults do not. In your own
    /// training loop, set [`AdamWConfig::lr_ratios`](crate::optim::AdamWConfig::lr_ratios) and pass the
    /// factors of a [`SampleScaler`](crate::SampleScaler) to each forward pass in its context.
    pub const fn calibrated() -> Self {
        Self {
            sample_scaler: 0.06,
            relative_scaler: Some(3.0),
            scaler_schedule: ScalerSchedule::Warmup(0.5),
            prior: Some(Prior::calibrated()),
            ..Self::paper()
        }
    }

    /// Returns the configuration for a layer of this width, with the eps that `relative_scaler` asks for:
    /// `eps = kappa / sqrt(in_dim df E||pi||^2)`.
    ///
    /// # Example
    /// ```
    /// use monteclora::MonteCLoRAConfig;
    ///
    /// let config = MonteCLoRAConfig { relative_scaler: Some(1.0), rank: 16, ..MonteCLoRAConfig::paper() };
    /// assert!((config.at_width(768).sample_scaler - 0.0143).abs() < 1e-4);
    /// assert_eq!(MonteCLoRAConfig::paper().at_width(768), MonteCLoRAConfig::paper());
    /// ```
    pub fn at_width(&self, in_dim: usize) -> Self {
        let Some(kappa) = self.relative_scaler else { return self.clone() };
        let square =
            if self.mixture == Mixture::Sparse { 1.0 } else { 2.0 / (self.num_components + 1) as f64 };
        let sample_scaler = kappa / (in_dim as f64 * self.degrees() * square).sqrt();
        Self { sample_scaler, ..self.clone() }
    }

    /// The paper's values with the paper's own estimators.
    pub const fn paper_literal() -> Self {
        Self {
            estimator: Estimator::Exponential,
            mixture: Mixture::Explicit,
            mode: KlEvaluation::Sampled,
            ..Self::paper()
        }
    }

    /// PEFT's defaults and numbers; [`Compat::Peft`] describes what is wrong with them.
    pub const fn peft() -> Self {
        Self {
            num_components: 8,
            sample_scaler: 1e-4,
            cooperative_weight: 0.0,
            dirichlet_prior: 0.1,
            covariance: Covariance::Diagonal,
            estimator: Estimator::LogisticNormal,
            mixture: Mixture::Explicit,
            mode: KlEvaluation::Sampled,
            buffer_size: 150,
            initial_concentration: Initial::ExpUniform(0.0, 1.0),
            initial_std: Initial::ExpUniform(0.0, 1.0),
            compat: Compat::Peft,
            ..Self::paper()
        }
    }

    /// The degrees of freedom of the Wishart distribution: `df`, or the rank.
    pub fn degrees(&self) -> f64 {
        self.df.unwrap_or(self.rank as f64)
    }

    /// The scale s of the low-rank update: `alpha / rank`, or `alpha / sqrt(rank)` with rsLoRA.
    pub fn scaling(&self) -> f64 {
        low_rank::scaling(self.rank, self.alpha, self.use_rslora)
    }

    /// Whether the variances of A over draws are known in closed form: not if they are clipped as PEFT's, or if
    /// the weights come from an estimator that is no Dirichlet.
    pub(crate) fn has_row_variances(&self) -> bool {
        self.compat != Compat::Peft && (self.estimator == Estimator::Exact || self.mixture == Mixture::Sparse)
    }

    /// Checks every option, and that the options are consistent with each other.
    ///
    /// # Errors
    /// If an option is outside its domain or in conflict with another one; the error names it.
    pub fn validate(&self) -> Result<()> {
        low_rank::validate(self.rank, self.alpha, self.dropout)?;
        at_least_one("num_components", self.num_components)?;
        positive("sample_scaler", self.sample_scaler)?;
        self.relative_scaler.map_or(Ok(()), |kappa| positive("relative_scaler", kappa))?;
        self.scaler_schedule.validate()?;
        positive("dirichlet_prior", self.dirichlet_prior)?;
        not_negative("kl_weight", self.kl_weight)?;
        not_negative("cooperative_weight", self.cooperative_weight)?;
        let (df, least, most) = (self.degrees(), self.rank as f64 - 1.0, 2.0 * MAX_SHAPE);
        if !(df > least && df <= most) {
            let reason = format!("expected more than rank - 1 = {least} and at most {most:e}, got {df}");
            return Err(Error::config("df", reason));
        }
        if self.buffer_size > MAX_BUFFER_SIZE {
            let reason = format!("expected at most {MAX_BUFFER_SIZE}, got {}", self.buffer_size);
            return Err(Error::config("buffer_size", reason));
        }
        // A draw of the weights asks for gamma quantiles of these shapes.
        self.initial_concentration.validate("initial_concentration", MAX_SHAPE)?;
        self.initial_std.validate("initial_std", f64::from(f32::MAX))?;
        self.prior.map_or(Ok(()), |prior| prior.validate())?;
        self.evidence.map_or(Ok(()), |evidence| evidence.validate())?;
        // The expectations are those of Dir(a), which the other estimators do not draw from.
        let expected = self.mode == KlEvaluation::Expected && self.mixture != Mixture::Sparse;
        if self.evidence.is_some_and(|bound| expected || bound.latents) && self.estimator != Estimator::Exact
        {
            let reason =
                format!("the bound needs Exact: the draws of {:?} are not Dirichlet draws", self.estimator);
            return Err(Error::config("evidence", reason));
        }
        if self.prior.is_some() && self.evidence.is_some() {
            return Err(Error::config(
                "prior",
                "the evidence bound has its own prior: choose one of the two",
            ));
        }
        if self.compat == Compat::Peft && (self.prior.is_some() || self.evidence.is_some()) {
            return Err(Error::config("compat", "PEFT supports neither a prior nor an evidence bound"));
        }
        if self.compat == Compat::Peft {
            let df_is_rank = self.df.is_none_or(|df| df == self.rank as f64);
            peft_compat::check(self.covariance, self.estimator, self.mixture, self.mode, df_is_rank)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::PriorForm;

    #[test]
    fn every_preset_is_valid_and_survives_json() {
        for config in [
            MonteCLoRAConfig::paper(),
            MonteCLoRAConfig::calibrated(),
            MonteCLoRAConfig::paper_literal(),
            MonteCLoRAConfig::peft(),
        ] {
            config.validate().unwrap();
            let json = serde_json::to_string(&config).unwrap();
            assert_eq!(serde_json::from_str::<MonteCLoRAConfig>(&json).unwrap(), config);
        }
        assert_eq!(MonteCLoRAConfig::default(), MonteCLoRAConfig::paper());
        let error = serde_json::from_str::<MonteCLoRAConfig>(r#"{"ranc": 3}"#).unwrap_err().to_string();
        assert!(error.starts_with("unknown field `ranc`, expected one of `rank`"), "{error}");
    }

    #[test]
    fn the_calibrated_preset_and_its_prior_are_what_was_measured() {
        let calibrated = MonteCLoRAConfig::calibrated();
        assert_eq!((calibrated.sample_scaler, calibrated.relative_scaler), (0.06, Some(3.0)));
        assert_eq!(calibrated.scaler_schedule, ScalerSchedule::Warmup(0.5));
        let prior = Prior {
            form: PriorForm::ExpectedUpdate { std: 3.0 },
            temperature: 0.1,
            shared: true,
            head_std: Some(0.5),
        };
        assert_eq!(calibrated.prior, Some(prior));
        assert_eq!(Prior::map(), Prior { form: PriorForm::Update { std: 0.35 }, ..prior });
        // What PEFT reads is eps of the width of BERT's base models.
        let at_width = calibrated.at_width(768).sample_scaler;
        assert!((at_width / calibrated.sample_scaler - 1.0).abs() < 0.05, "{at_width}");
    }

    #[test]
    fn an_option_outside_its_domain_is_an_error_that_names_it() {
        type Spoil = fn(&mut MonteCLoRAConfig);
        fn bound(config: &mut MonteCLoRAConfig, std: f64, latents: bool) {
            config.evidence = Some(EvidenceBound { std, temperature: 1.0, latents });
        }
        let cases: [(&str, Spoil); 29] = [
            ("rank", |c| c.rank = 0),
            ("alpha", |c| c.alpha = 0.0),
            ("alpha", |c| c.alpha = f64::NAN),
            ("dropout", |c| c.dropout = 1.0),
            ("num_components", |c| c.num_components = 0),
            ("sample_scaler", |c| c.sample_scaler = -1.0),
            ("sample_scaler", |c| c.sample_scaler = 0.0),
            ("sample_scaler", |c| c.sample_scaler = f64::NAN),
            ("relative_scaler", |c| c.relative_scaler = Some(0.0)),
            ("kl_weight", |c| c.kl_weight = f64::INFINITY),
            ("cooperative_weight", |c| c.cooperative_weight = -0.1),
            ("dirichlet_prior", |c| c.dirichlet_prior = 0.0),
            ("df", |c| c.df = Some(7.0)),
            ("df", |c| c.df = Some(f64::NAN)),
            ("df", |c| c.df = Some(f64::INFINITY)),
            ("df", |c| c.df = Some(1e10)),
            ("buffer_size", |c| c.buffer_size = MAX_BUFFER_SIZE + 1),
            ("initial_concentration", |c| c.initial_concentration = Initial::Constant(0.0)),
            // No gamma quantile is that of so large a shape.
            ("initial_concentration", |c| c.initial_concentration = Initial::Constant(2e9)),
            ("initial_concentration", |c| c.initial_concentration = Initial::ExpUniform(21.0, 22.0)),
            ("initial_std", |c| c.initial_std = Initial::Uniform(1.0, 0.0)),
            ("compat", |c| c.compat = Compat::Peft),
            ("compat", |c| {
                *c = MonteCLoRAConfig { prior: Some(Prior::calibrated()), ..MonteCLoRAConfig::peft() };
            }),
            ("prior.temperature", |c| c.prior = Some(Prior { temperature: 0.0, ..Prior::calibrated() })),
            ("prior.head_std", |c| c.prior = Some(Prior { head_std: Some(-1.0), ..Prior::calibrated() })),
            ("evidence.std", |c| bound(c, 0.0, false)),
            // An estimator other than the Dirichlet's, in the expectation and in KL_D.
            ("evidence", |c| {
                bound(c, 1.0, false);
                c.estimator = Estimator::Exponential;
            }),
            ("evidence", |c| {
                bound(c, 1.0, true);
                (c.estimator, c.mode) = (Estimator::LogisticNormal, KlEvaluation::Sampled);
            }),
            ("prior", |c| {
                bound(c, 1.0, false);
                c.prior = Some(Prior::calibrated());
            }),
        ];
        for (option, spoil) in cases {
            let mut config = MonteCLoRAConfig::paper();
            spoil(&mut config);
            let error = config.validate().unwrap_err().to_string();
            assert!(error.starts_with(&format!("invalid {option}:")), "{option}: {error}");
        }
    }
}
