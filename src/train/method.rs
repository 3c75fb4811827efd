//! The fine-tuning methods as one type.

use serde::Serialize;

use super::config::TrainConfig;
use super::hooks::MethodHooks;
use super::method_name::MethodName;
use super::settings::{self, Settings};
use crate::adapter::{AdaptableModel, Params, Role};
use crate::adapters::{prompt_tuning, AdaLoraConfig, BlobConfig, BottleneckConfig, LoraConfig, PromptConfig};
use crate::error::{Error, Result};
use crate::inject::{self, activate, Targets};
use crate::models::Weights;
use crate::monteclora::MonteCLoRAConfig;
use crate::peft::{self, AdapterFile};

/// The name of a LoRA adapter until a posterior is put on it.
const TRAINED: &str = "trained";

/// A fine-tuning method.
// Checkpoints store the serialised form: Rust names may change, JSON names may not.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Method {
    /// MonteCLoRA on the targets.
    #[serde(rename = "monteclora")]
    MonteCLoRA(MonteCLoRAConfig),
    /// MonteCLoRA as in the authors' released code, on the targets.
    #[serde(rename = "monteclora_released")]
    Released(MonteCLoRAConfig),
    /// LoRA on the targets.
    Lora(LoraConfig),
    /// LoRA-FA on the targets: A keeps its initial values.
    LoraFa(LoraConfig),
    /// DoRA on the targets.
    Dora(LoraConfig),
    /// AdaLoRA on the targets.
    #[serde(rename = "adalora")]
    AdaLora(AdaLoraConfig),
    /// BLoB on the targets.
    Blob(BlobConfig),
    /// IA3 on keys, values and the inner activations of feed-forward blocks.
    Ia3,
    /// Bottleneck adapters after attention and feed-forward blocks.
    Bottleneck(BottleneckConfig),
    /// Virtual tokens before each row.
    Prompt(PromptConfig),
    /// Full fine-tuning.
    Full,
}

impl From<peft::AdapterMethod> for Method {
    fn from(method: peft::AdapterMethod) -> Self {
        match method {
            peft::AdapterMethod::MonteCLoRA(config) => Self::MonteCLoRA(config),
            peft::AdapterMethod::Lora(config) => Self::Lora(config),
        }
    }
}

impl Method {
    /// Returns the method's name.
    pub fn name(&self) -> MethodName {
        match self {
            Self::MonteCLoRA(_) => MethodName::MonteCLoRA,
            Self::Released(_) => MethodName::Released,
            Self::Lora(LoraConfig { prior: Some(_), .. }) => MethodName::Map,
            Self::Lora(_) => MethodName::Lora,
            Self::LoraFa(_) => MethodName::LoraFa,
            Self::Dora(_) => MethodName::Dora,
            Self::AdaLora(_) => MethodName::AdaLora,
            Self::Blob(_) => MethodName::Blob,
            Self::Ia3 => MethodName::Ia3,
            Self::Bottleneck(_) => MethodName::Bottleneck,
            Self::Prompt(_) => MethodName::Prompt,
            Self::Full => MethodName::Full,
        }
    }

    /// Returns suitable learning rates as multiples of A's: for B (4 under a prior, else 1) and for a new
    /// task head (10 under a prior on it, else 1).
    ///
    /// While B is zero, the update is learnt through the head, and the head on features that the update has
    /// not changed. Under posterior draws or a prior, low learning rates leave both near their start,
    /// predicting the majority class, for a whole run of a few hundred steps (examples/results/README.md);
    /// the prior keeps high ones from becoming overconfident.
    pub fn lr_ratios(&self) -> LrRatios {
        let prior = match self {
            Self::MonteCLoRA(config) => config.prior,
            Self::Lora(config) => config.prior,
            _ => None,
        };
        let head = prior.is_some_and(|prior| prior.head_std.is_some());
        LrRatios { b: if prior.is_some() { 4.0 } else { 1.0 }, head: if head { 10.0 } else { 1.0 } }
    }

    /// Returns the default training settings with [`Self::lr_ratios`].
    ///
    /// # Example
    /// ```
    /// use monteclora::train::{Method, TrainConfig};
    /// use monteclora::MonteCLoRAConfig;
    ///
    /// let calibrated = Method::MonteCLoRA(MonteCLoRAConfig::calibrated());
    /// let config = TrainConfig { epochs: 20, lr: 1e-3, ..calibrated.train_config() };
    /// assert_eq!((config.loraplus_ratio, config.head_lr_ratio), (4.0, 10.0));
    /// assert_eq!(Method::MonteCLoRA(MonteCLoRAConfig::paper()).train_config(), TrainConfig::default());
    /// ```
    pub fn train_config(&self) -> TrainConfig {
        let LrRatios { b, head } = self.lr_ratios();
        TrainConfig { loraplus_ratio: b, head_lr_ratio: head, ..TrainConfig::default() }
    }

    /// Returns the number of positions added to each row: prompt tuning's virtual tokens, else 0.
    pub fn virtual_tokens(&self) -> usize {
        match self {
            Self::Prompt(config) => config.virtual_tokens,
            _ => 0,
        }
    }

    /// Whether training ends in a posterior whose draws a prediction can average. The authors' released code
    /// has none: its walk moves A itself, and every pass uses A as it is.
    pub fn has_posterior(&self) -> bool {
        matches!(self, Self::MonteCLoRA(_) | Self::Blob(_))
    }

    /// Whether a trained model has the pairs B A that [`Taps`](crate::bayes::Taps) take.
    pub fn can_be_linearised(&self) -> bool {
        matches!(self, Self::MonteCLoRA(_) | Self::Lora(_))
    }

    /// Returns notes on the method's predictions to show before training, one sentence each. `post_hoc`: the
    /// method is a posterior around a LoRA that stays fixed.
    pub(crate) fn notes(&self, post_hoc: bool) -> Vec<&'static str> {
        let mut notes = Vec::new();
        if post_hoc {
            notes.push(
                "post hoc the mean prediction is that of the LoRA by construction: averaged draws alone can \
                 differ from it",
            );
        }
        if self.adapter().is_none() && *self != Self::Full {
            notes
                .push("it is here for comparison: what it trains can be measured, but not opened to predict");
        }
        if matches!(self, Self::MonteCLoRA(config) if config.scaler_schedule.anneals()) {
            notes.push(
                "its training may end with a far smaller eps than the draws of a prediction have: these are \
                 wider than what was trained",
            );
        }
        notes
    }

    /// Returns the method in the form of PEFT's adapter files, if it has one.
    pub fn adapter(&self) -> Option<peft::AdapterMethod> {
        match self {
            Self::MonteCLoRA(config) => Some(peft::AdapterMethod::MonteCLoRA(config.clone())),
            Self::Lora(config) | Self::LoraFa(config) => Some(peft::AdapterMethod::Lora(config.clone())),
            Self::Released(_) | Self::Blob(_) => None,
            Self::Full | Self::Dora(_) | Self::AdaLora(_) => None,
            Self::Ia3 | Self::Bottleneck(_) | Self::Prompt(_) => None,
        }
    }
}

/// Learning rates as multiples of A's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LrRatios {
    /// The learning rate of B.
    pub b: f64,
    /// The learning rate of a task's head.
    pub head: f64,
}

/// What a training run starts from.
// A run has only one, so that its size does not matter.
#[allow(clippy::large_enum_variant)]
#[derive(Debug, Clone)]
pub enum MethodInit {
    /// A new adapter with this method on these targets.
    Fresh(Method, Targets),
    /// A trained adapter, from this crate or PEFT.
    Adapter(Box<AdapterFile>),
    /// A trained LoRA adapter, around which a posterior is put: A and B stay fixed, rho and c are trained.
    /// Rank and scale are the adapter's own, whatever the configuration says.
    PostHoc(Box<AdapterFile>, MonteCLoRAConfig),
}

impl MethodInit {
    /// Returns the method with its hyperparameters.
    pub fn method(&self) -> Method {
        match self {
            Self::Fresh(method, _) => method.clone(),
            Self::Adapter(file) => Method::from(file.method()),
            Self::PostHoc(file, config) => Method::MonteCLoRA(match file.method() {
                peft::AdapterMethod::Lora(LoraConfig { rank, alpha, use_rslora, .. }) => {
                    MonteCLoRAConfig { rank, alpha, use_rslora, ..config.clone() }
                }
                peft::AdapterMethod::MonteCLoRA(_) => config.clone(),
            }),
        }
    }

    /// Returns notes on the predictions to show before training, one sentence each: that a post-hoc mean is
    /// the LoRA's, or that a schedule which anneals eps away trains with other draws than a prediction uses.
    pub fn notes(&self) -> Vec<&'static str> {
        self.method().notes(matches!(self, Self::PostHoc(..)))
    }

    /// Returns the weights to load the model from: those of `checkpoint`, which stay as they are, or with
    /// [`Method::Full`] new parameters of `params` with their values.
    ///
    /// # Errors
    /// With [`Method::Full`], if the checkpoint is quantised, or not of the dtype of `params`: its weights would
    /// be trained from rounded values, in more memory than the dtype promises.
    pub fn base(&self, checkpoint: Weights<'static>, params: &Params) -> Result<Weights<'static>> {
        if self.method() != Method::Full {
            return Ok(checkpoint);
        }
        let dense = checkpoint.into_dense()?;
        if dense.dtype() != params.dtype() {
            let (wanted, got) = (params.dtype().as_str(), dense.dtype().as_str());
            let reason = format!("full fine-tuning trains the base in {wanted}, got {got}");
            return Err(Error::config("dtype", reason));
        }
        Ok(params.var_builder(Some(dense), Role::Base).into())
    }

    /// Puts the adapters on a model and their parameters into `params`; returns the method's part in
    /// training. Full fine-tuning has no adapter.
    ///
    /// # Errors
    /// If the targets, the method's configuration or the adapter do not fit the model.
    pub fn inject(&self, model: &mut dyn AdaptableModel, params: &Params) -> Result<MethodHooks> {
        self.adapt(model, params)?;
        self.hooks(model, params)
    }

    /// The first half of [`Self::inject`]: adds the adapters.
    pub(super) fn adapt(&self, model: &mut dyn AdaptableModel, params: &Params) -> Result<()> {
        match self {
            Self::Fresh(method, targets) => method.inject(model, targets, params)?,
            Self::Adapter(file) => file.apply(model, inject::DEFAULT_ADAPTER, params)?,
            Self::PostHoc(file, config) => {
                inject::posthoc::check(config)?;
                if matches!(file.method(), peft::AdapterMethod::MonteCLoRA(_)) {
                    return Err(Error::config("adapter", "it has a posterior already: go on from it"));
                }
                file.apply(model, TRAINED, params)?;
                let Method::MonteCLoRA(config) = self.method() else { return Ok(()) };
                inject::posthoc(model, inject::DEFAULT_ADAPTER, &config, params)?;
                activate::remove(model, TRAINED, params)?;
            }
        }
        Ok(())
    }

    /// The second half of [`Self::inject`]: creates the hooks. Training starts at the present parameters.
    pub(super) fn hooks(&self, model: &dyn AdaptableModel, params: &Params) -> Result<MethodHooks> {
        let hooks = match self.method() {
            Method::MonteCLoRA(config) => MethodHooks::of_monteclora(&config, params)?,
            Method::Released(config) => MethodHooks::of_released(model, &config, params)?,
            Method::Blob(config) => MethodHooks::of_blob(&config),
            Method::Lora(LoraConfig { prior: Some(prior), .. }) => MethodHooks::of_prior(&prior, params)?,
            Method::AdaLora(config) => MethodHooks::of_adalora(model, &config)?,
            _ => MethodHooks::default(),
        };
        Ok(hooks.with_settings(self.settings()?))
    }

    /// Returns the settings that must agree to resume: the method's hyperparameters and its target layers.
    fn settings(&self) -> Result<Settings> {
        let targets = match self {
            Self::Fresh(_, targets) => settings::setting("targets", targets)?,
            Self::Adapter(file) | Self::PostHoc(file, _) => settings::setting("targets", &file.config)?,
        };
        Ok([settings::setting("method", &self.method())?, targets].into())
    }
}

impl Method {
    /// Adds the method's adapters to the given layers of a model.
    fn inject(&self, model: &mut dyn AdaptableModel, targets: &Targets, params: &Params) -> Result<()> {
        match self {
            Self::Full => Ok(()),
            Self::Prompt(config) => {
                if *targets != Targets::default() {
                    return Err(Error::config("targets", "prompt tuning changes no layer: name none"));
                }
                let embedding = model.embedding_mut().ok_or_else(|| {
                    Error::config("method", "this model has no place for the virtual tokens of prompt tuning")
                })?;
                prompt_tuning(embedding, inject::DEFAULT_ADAPTER, config, params)
            }
            Self::Lora(config) => inject::lora(model, targets, config, params).map(drop),
            Self::LoraFa(config) => inject::lora_fa(model, targets, config, params).map(drop),
            Self::Dora(config) => inject::dora(model, targets, config, params).map(drop),
            Self::AdaLora(config) => inject::adalora(model, targets, config, params).map(drop),
            Self::Blob(config) => inject::blob(model, targets, config, params).map(drop),
            Self::MonteCLoRA(config) => inject::monteclora(model, targets, config, params).map(drop),
            Self::Released(config) => inject::monteclora_released(model, targets, config, params).map(drop),
            Self::Bottleneck(config) => inject::bottleneck(model, targets, config, params).map(drop),
            Self::Ia3 => inject::ia3(model, targets, params).map(drop),
        }
    }
}
