//! The ways to fine-tune, behind one name.

use serde::Serialize;

use super::config::TrainConfig;
use super::hooks::MethodHooks;
use super::settings::{self, Settings};
use crate::adapter::{AdaptableModel, Adapter, Params};
use crate::adapters::{
    prompt_tuning, AdaLora, AdaLoraConfig, Blob, BlobConfig, Bottleneck, BottleneckConfig, Dora, Ia3,
    LoraConfig, PromptConfig, Scaled,
};
use crate::error::{Error, Result};
use crate::inject::{self, activate, Select, Targets};
use crate::monteclora::MonteCLoRAConfig;
use crate::peft::{self, AdapterFile};

/// The name of a LoRA adapter until a posterior is put on it.
const TRAINED: &str = "trained";

/// The second layer of a feed-forward block, whose input is the inside of the block, in the names of BERT,
/// LLaMA, DistilBERT and ModernBERT.
fn closes_feed_forward(path: &str) -> bool {
    [".down_proj", ".ffn.lin2", ".mlp.Wo"].iter().any(|name| path.ends_with(name))
        || (path.ends_with(".output.dense") && !path.ends_with(".attention.output.dense"))
}

/// How a model is fine-tuned.
// Checkpoints hold it as it is serialised: a name in Rust may change, one in JSON may not.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Method {
    /// MonteCLoRA on the targets.
    #[serde(rename = "monteclora")]
    MonteCLoRA(MonteCLoRAConfig),
    /// What the authors' released code does, on the targets.
    #[serde(rename = "monteclora_released")]
    Released(MonteCLoRAConfig),
    /// LoRA on the targets.
    Lora(LoraConfig),
    /// LoRA-FA on the targets: A stays at its start.
    LoraFa(LoraConfig),
    /// DoRA on the targets.
    Dora(LoraConfig),
    /// AdaLoRA on the targets.
    #[serde(rename = "adalora")]
    AdaLora(AdaLoraConfig),
    /// BLoB on the targets.
    Blob(BlobConfig),
    /// IA3 on keys, values and the inside of feed-forward blocks.
    Ia3,
    /// Bottleneck adapters after attention and feed-forward blocks.
    Bottleneck(BottleneckConfig),
    /// Virtual tokens before each row.
    Prompt(PromptConfig),
    /// Every weight.
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
    /// The method's name, as the command line spells it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::MonteCLoRA(_) => "monteclora",
            Self::Released(_) => "monteclora-released",
            Self::Lora(_) => "lora",
            Self::LoraFa(_) => "lora-fa",
            Self::Dora(_) => "dora",
            Self::AdaLora(_) => "adalora",
            Self::Blob(_) => "blob",
            Self::Ia3 => "ia3",
            Self::Bottleneck(_) => "bottleneck",
            Self::Prompt(_) => "prompt",
            Self::Full => "full",
        }
    }

    /// How many times the learning rate of A suits B (4 under a prior, else 1) and a new task head (10 under a
    /// prior on it, else 1).
    ///
    /// While B is zero the update is learnt through the head, and the head through features that the update has
    /// not changed. Under draws or a prior, slow ones leave both near their start, the majority class, for a
    /// whole run of a few hundred steps (examples/results/README.md); the prior keeps fast ones from growing sure.
    pub fn lr_ratios(&self) -> LrRatios {
        let prior = match self {
            Self::MonteCLoRA(config) => config.prior,
            Self::Lora(config) => config.prior,
            _ => None,
        };
        let head = prior.is_some_and(|prior| prior.head_std.is_some());
        LrRatios { b: if prior.is_some() { 4.0 } else { 1.0 }, head: if head { 10.0 } else { 1.0 } }
    }

    /// The defaults of a training run with [`Self::lr_ratios`].
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

    /// The places before each row that it takes: the virtual tokens of prompt tuning, else none.
    pub fn virtual_tokens(&self) -> usize {
        match self {
            Self::Prompt(config) => config.virtual_tokens,
            _ => 0,
        }
    }

    /// Whether it ends in a posterior whose draws a prediction can average. The authors' released code has none:
    /// its walk moves A itself, and every pass takes A as it is.
    pub fn has_posterior(&self) -> bool {
        matches!(self, Self::MonteCLoRA(_) | Self::Blob(_))
    }

    /// The layers that it changes unless others are named, by their names in encoders and decoders; of Phi 3 and
    /// ModernBERT, whose queries, keys and values are one layer, IA3 scales the inside of feed-forward blocks alone.
    /// The model's own choice where the method's paper names none.
    fn default_select(&self) -> Select {
        let regex = |pattern: &str| Select::Regex(pattern.to_string());
        match self {
            Self::Ia3 => regex(
                r".*\.(?:key|value|(?:k|v|key|value)_proj|[kv]_lin|down_proj|ffn\.lin2|mlp\.Wo|(?<!attention\.)output\.dense)",
            ),
            Self::Bottleneck(_) => {
                regex(r".*\.(?:output\.dense|o_proj|down_proj|attention\.out_lin|ffn\.lin2|attn\.Wo|mlp\.Wo)")
            }
            _ => Select::ModelDefault,
        }
    }

    /// Remarks on its predictions to make before it is trained, a sentence each; `post_hoc` if it is a posterior around a
    /// LoRA that stays as it is.
    pub(crate) fn notes(&self, post_hoc: bool) -> Vec<&'static str> {
        let mut notes = Vec::new();
        if post_hoc {
            notes.push(
                "post hoc the mean prediction is that of the LoRA by construction: averaged draws alone can \
                 differ from it",
            );
        }
        if matches!(self, Self::MonteCLoRA(config) if config.scaler_schedule.anneals()) {
            notes.push(
                "its training may end with a far smaller eps than the draws of a prediction have: these are \
                 wider than what was trained",
            );
        }
        notes
    }

    /// The adapter of this method as its file has it, where it has one.
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

/// Learning rates as multiples of that of A.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LrRatios {
    /// That of B.
    pub b: f64,
    /// That of a task's head.
    pub head: f64,
}

/// What a run starts from.
// There is one of it in a run, so that its size costs nothing.
#[allow(clippy::large_enum_variant)]
#[derive(Debug, Clone)]
pub enum MethodInit {
    /// A method that begins on these targets.
    Fresh(Method, Targets),
    /// An adapter that was trained before, here or by PEFT.
    Adapter(Box<AdapterFile>),
    /// A LoRA adapter that was trained before, with a posterior put on it: A and B stay, rho and c are
    /// trained. Rank and scale are the adapter's own, whatever the configuration says.
    PostHoc(Box<AdapterFile>, MonteCLoRAConfig),
}

impl MethodInit {
    /// The method, with its constants.
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

    /// Remarks on the predictions to make before the training, a sentence each: that post hoc the mean is the LoRA's,
    /// that a schedule which anneals eps away trains other draws than a prediction takes.
    pub fn notes(&self) -> Vec<&'static str> {
        self.method().notes(matches!(self, Self::PostHoc(..)))
    }

    /// Puts the adapters on a model, their parameters into `params`; returns what the method asks of
    /// training beside the task's loss. Full fine-tuning adapts nothing.
    ///
    /// # Errors
    /// If the targets, the method's configuration or the adapter do not fit the model.
    pub fn inject(&self, model: &mut dyn AdaptableModel, params: &Params) -> Result<MethodHooks> {
        self.adapt(model, params)?;
        self.hooks(model, params)
    }

    /// The first half of [`Self::inject`]: the adapters alone.
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

    /// The second half: what is asked of training, which begins at the present values of the parameters.
    pub(super) fn hooks(&self, model: &dyn AdaptableModel, params: &Params) -> Result<MethodHooks> {
        let hooks = match self.method() {
            Method::MonteCLoRA(config) => MethodHooks::of_posterior(&config, params)?,
            Method::Released(config) => MethodHooks::of_walk(model, &config, params)?,
            Method::Blob(config) => MethodHooks::of_divergence(&config),
            Method::Lora(LoraConfig { prior: Some(prior), .. }) => MethodHooks::of_prior(&prior, params)?,
            Method::AdaLora(config) => MethodHooks::of_budget(model, &config)?,
            _ => MethodHooks::default(),
        };
        Ok(hooks.with_settings(self.settings()?))
    }

    /// What a run must find unchanged to go on: the method's constants and the layers that it is on.
    fn settings(&self) -> Result<Settings> {
        let targets = match self {
            Self::Fresh(_, targets) => settings::setting("targets", targets)?,
            Self::Adapter(file) | Self::PostHoc(file, _) => settings::setting("targets", &file.config)?,
        };
        Ok([settings::setting("method", &self.method())?, targets].into())
    }
}

impl Method {
    /// Starts the method on these layers of a model.
    fn inject(&self, model: &mut dyn AdaptableModel, given: &Targets, params: &Params) -> Result<()> {
        let targets = match &given.select {
            Select::ModelDefault => Targets { select: self.default_select(), ..given.clone() },
            _ => given.clone(),
        };
        let patterns = !(targets.rank_pattern.is_empty() && targets.alpha_pattern.is_empty());
        if patterns && matches!(self, Self::AdaLora(_) | Self::Ia3 | Self::Bottleneck(_)) {
            let reason = format!("{} has no rank or alpha of single layers", self.name());
            return Err(Error::config("rank_pattern", reason));
        }
        let name = inject::DEFAULT_ADAPTER;
        if let Self::Prompt(config) = self {
            if *given != Targets::default() {
                return Err(Error::config("targets", "prompt tuning changes no layer: name none"));
            }
            let embedding = model.embedding_mut().ok_or_else(|| {
                Error::config("method", "this model has no place for the virtual tokens of prompt tuning")
            })?;
            return prompt_tuning(embedding, name, config, params);
        }
        // Rank and alpha of single layers are those of a pair A, B; the rest has none.
        let (rank, alpha) = match self {
            Self::Full | Self::Prompt(_) => return Ok(()),
            Self::Lora(config) => return inject::lora(model, &targets, config, params).map(drop),
            Self::LoraFa(LoraConfig { prior: Some(_), .. }) => {
                return Err(Error::config("prior", "LoRA-FA has none here"));
            }
            Self::LoraFa(config) => return inject::lora_fa(model, &targets, config, params).map(drop),
            Self::MonteCLoRA(config) => return inject::monteclora(model, &targets, config, params).map(drop),
            Self::Released(config) => {
                return inject::monteclora_released(model, &targets, config, params).map(drop);
            }
            Self::Dora(LoraConfig { prior: Some(_), .. }) => {
                return Err(Error::config("prior", "DoRA has none here: its magnitude is no part of B A"));
            }
            Self::Dora(config) => (config.rank, config.alpha),
            Self::AdaLora(config) => (config.init_rank, config.alpha),
            Self::Blob(config) => (config.rank, config.alpha),
            Self::Ia3 | Self::Bottleneck(_) => (1, 1.0),
        };
        let resolved = targets.resolve(model, rank, alpha)?;
        inject::inject(model, name, &resolved, params, &mut |layer, target, params| {
            let (path, base) = (layer.path(), layer.base());
            Ok(match self {
                Self::Dora(config) => {
                    let config = LoraConfig { rank: target.rank, alpha: target.alpha, ..config.clone() };
                    Box::new(Dora::new(params, path, name, base, &config)?) as Box<dyn Adapter>
                }
                Self::AdaLora(config) => Box::new(AdaLora::new(params, path, name, base, config)?),
                Self::Blob(config) => {
                    let config = BlobConfig { rank: target.rank, alpha: target.alpha, ..config.clone() };
                    Box::new(Blob::new(params, path, name, layer.dims()?, &config)?)
                }
                Self::Bottleneck(config) => Box::new(Bottleneck::new(params, path, name, base, config)?),
                _ => {
                    let scaled = if closes_feed_forward(path) { Scaled::Input } else { Scaled::Output };
                    Box::new(Ia3::new(params, path, name, base, scaled)?)
                }
            })
        })
    }
}
