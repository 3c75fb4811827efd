//! Command-line options of the method that the fine-tuning examples share.

use std::path::{Path, PathBuf};

use monteclora::adapters::{AdaLoraConfig, BlobConfig, BottleneckConfig, LoraConfig, PromptConfig};
use monteclora::inject::{Select, Targets};
use monteclora::peft::AdapterFile;
use monteclora::train::{Method, MethodInit, MethodName, RunFolder};
use monteclora::{MonteCLoRAConfig, Prior};

use super::download;
use super::given::Given;
use super::output::{tell, tell_err};
use super::{asset, Outcome};

// What to train and where. Not a doc comment, which clap would take for the program's description.
#[derive(clap::Args, Clone)]
#[command(next_help_heading = "Method")]
pub struct MethodOptions {
    /// The method: monteclora, monteclora-released, lora, map (LoRA with a prior), lora-fa, dora, adalora,
    /// blob, ia3, bottleneck, prompt or full. Default: lora, then monteclora.
    #[arg(long)]
    pub method: Option<MethodName>,
    /// Layers to adapt: names separated by commas, `all-linear` or `default` (the query, key and value
    /// projections).
    #[arg(long, default_value = "default")]
    pub targets: String,
    /// Layers to exclude from --targets, in the same form.
    #[arg(long)]
    pub exclude: Option<String>,
    /// Only the layers of the stack with these indices, separated by commas.
    #[arg(long, value_delimiter = ',')]
    pub layers: Option<Vec<usize>>,
    /// Rank r of the update; with bottleneck, its width.
    #[arg(long, default_value_t = 8)]
    pub rank: usize,
    /// The update is scaled by alpha / rank.
    #[arg(long, default_value_t = 16.0)]
    pub alpha: f64,
    /// Scale by alpha / sqrt(rank) instead (rsLoRA).
    #[arg(long)]
    pub rslora: bool,
    /// Dropout probability in the adapters.
    #[arg(long, default_value_t = 0.0)]
    pub adapter_dropout: f64,
    /// The number of virtual tokens in prompt tuning.
    #[arg(long, default_value_t = 20)]
    pub virtual_tokens: usize,
    /// The preset of MonteCLoRA's constants: paper, calibrated, paper-literal or peft.
    #[arg(long, default_value = "paper")]
    pub preset: String,
    /// The number N of mixture components.
    #[arg(long)]
    pub num_components: Option<usize>,
    /// The scale epsilon of the perturbation. Default: the preset's; of paper 5e-3, as for RoBERTa (for LLaMA the paper
    /// has 2.5e-5).
    #[arg(long)]
    pub sample_scaler: Option<f64>,
    /// The weight eta of the KL terms.
    #[arg(long)]
    pub kl_weight: Option<f64>,
    /// An adapter to continue from, of this crate or of PEFT: a folder, also of a run, or a hub repository. Its
    /// targets and constants replace the options above.
    #[arg(long)]
    pub adapter: Option<PathBuf>,
    /// Put a posterior on the LoRA of --adapter: A and B stay fixed, only the posterior is trained.
    #[arg(long, requires = "adapter")]
    pub post_hoc: bool,
}

/// The base of a run.
pub struct Base {
    /// A folder, or a hub repository.
    pub model: String,
    /// The revision of the repository.
    pub revision: Option<String>,
    /// Whether it is the example's bundled model, which is small and needs a higher learning rate.
    pub is_bundled: bool,
}

/// Whether a method reads an option.
type IsRead = fn(MethodName) -> bool;

/// The options, each with whether a method reads it.
const READ_BY: [(&str, IsRead); 12] = [
    ("targets", MethodName::has_targets),
    ("exclude", MethodName::has_targets),
    ("layers", MethodName::has_targets),
    ("rank", MethodName::has_rank),
    ("alpha", MethodName::has_pair),
    ("rslora", MethodName::has_rslora),
    ("adapter_dropout", MethodName::has_pair),
    ("virtual_tokens", |name| name == MethodName::Prompt),
    ("preset", |name| name == MethodName::MonteCLoRA),
    ("num_components", MethodName::is_monteclora),
    ("sample_scaler", MethodName::is_monteclora),
    ("kl_weight", MethodName::is_monteclora),
];

impl MethodOptions {
    /// Finds --adapter: where it is a hub repository, its files are downloaded; of a run, it is in a folder
    /// below.
    pub fn find_adapter(&mut self) -> Outcome {
        let found = self.adapter.as_deref().map(download::adapter).transpose()?;
        self.adapter = found.map(|dir| RunFolder::find_adapter(&dir));
        Ok(())
    }

    /// The base: that of --model, or else of the --adapter, or else the bundled model of this name.
    pub fn base(&self, model: Option<&str>, revision: Option<&str>, bundled: &str) -> Outcome<Base> {
        let given = model.map(|model| (model.to_string(), revision.map(str::to_string)));
        let config = match (&given, &self.adapter) {
            (None, Some(dir)) => Some(AdapterFile::read(dir)?.config),
            _ => None,
        };
        let of_file = config.and_then(|config| Some((config.base_model_name_or_path?, config.revision)));
        let (model, revision) = match given.or(of_file) {
            Some(base) => base,
            None => (asset(bundled)?, None),
        };
        let place = |path: &str| Path::new(path).canonicalize().ok();
        let is_bundled = asset(bundled).is_ok_and(|bundled| place(&bundled) == place(&model));
        Ok(Base { model, revision, is_bundled })
    }

    /// The names of the methods to run, one after the other.
    pub fn names(&self) -> Outcome<Vec<MethodName>> {
        let of_file = match &self.adapter {
            Some(_) if self.post_hoc => Some(MethodName::MonteCLoRA),
            Some(dir) => Some(Method::from(AdapterFile::read(dir)?.method()).name()),
            None => None,
        };
        Ok(match (self.method, of_file) {
            (Some(method), Some(name)) if method != name => {
                return Err(format!("--method {method}: the method of --adapter is {name}").into());
            }
            (_, Some(name)) | (Some(name), None) => vec![name],
            (None, None) => vec![MethodName::Lora, MethodName::MonteCLoRA],
        })
    }

    /// Whether one of the methods with these names is as asked.
    pub fn any(&self, names: &[MethodName], is: fn(&Method) -> bool) -> Outcome<bool> {
        for name in names {
            if is(&self.method(*name)?) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// How the method with this name starts, in a run that writes below `out`.
    pub fn start(&self, name: MethodName, out: Option<&Path>) -> Outcome<MethodInit> {
        if let (Some(dir), Some(out)) = (&self.adapter, out) {
            check_apart("--adapter", dir, &RunFolder::new(out).adapter())?;
        }
        let start = match &self.adapter {
            Some(dir) if self.post_hoc => {
                MethodInit::PostHoc(Box::new(AdapterFile::read(dir)?), self.monteclora()?)
            }
            Some(dir) => MethodInit::Adapter(Box::new(AdapterFile::read(dir)?)),
            None => MethodInit::Fresh(self.method(name)?, self.targets()?),
        };
        start.notes().iter().for_each(|note| tell_err!("{name}: {note}"));
        Ok(start)
    }

    /// Warns about given options that none of the methods with these names reads.
    pub fn tell_unread(&self, given: &Given, names: &[MethodName]) {
        if self.post_hoc {
            given.without_effect(
                &["loraplus_ratio", "head_lr_ratio"],
                "with --post-hoc, B and the head are fixed",
            );
        }
        let of_file =
            self.adapter.as_ref().map(|dir| format!("its value comes from --adapter {}", dir.display()));
        for (option, reads) in READ_BY {
            // With --post-hoc, only the posterior's own options are read; the rest comes from the adapter.
            let posterior = reads(MethodName::MonteCLoRA) && !reads(MethodName::Lora);
            match &of_file {
                Some(why) if !(self.post_hoc && posterior) => given.without_effect(&[option], why),
                _ if !names.iter().any(|name| reads(*name)) => {
                    let methods = MethodName::ALL.into_iter().filter(|name| reads(*name));
                    let methods: Vec<&str> = methods.map(MethodName::as_str).collect();
                    given.without_effect(&[option], &format!("it only applies to {}", methods.join(", ")));
                }
                _ => {}
            }
        }
    }

    /// The text length for `--max-length` on a model of `longest` positions, given the method's virtual
    /// tokens.
    pub fn text_length(&self, max_length: usize, longest: usize) -> usize {
        let virtual_tokens = if self.method == Some(MethodName::Prompt) { self.virtual_tokens } else { 0 };
        text_length(max_length, longest, virtual_tokens)
    }

    fn targets(&self) -> Outcome<Targets> {
        let exclude = self.exclude.as_deref().map(Select::parse).transpose()?;
        let layers_to_transform = self.layers.clone();
        Ok(Targets { exclude, layers_to_transform, ..Targets::parse(&self.targets)? })
    }

    /// Creates the method with this name from the options that it reads.
    fn method(&self, name: MethodName) -> Outcome<Method> {
        let (rank, alpha, dropout, use_rslora) = (self.rank, self.alpha, self.adapter_dropout, self.rslora);
        let lora = LoraConfig { rank, alpha, dropout, use_rslora, prior: None };
        Ok(match name {
            MethodName::Full => Method::Full,
            MethodName::Lora => Method::Lora(lora),
            MethodName::Map => Method::Lora(LoraConfig { prior: Some(Prior::map()), ..lora }),
            MethodName::LoraFa => Method::LoraFa(lora),
            MethodName::Dora => Method::Dora(lora),
            MethodName::AdaLora => {
                Method::AdaLora(AdaLoraConfig { alpha, dropout, ..AdaLoraConfig::towards(rank) })
            }
            MethodName::Blob => Method::Blob(BlobConfig { rank, alpha, dropout, ..BlobConfig::default() }),
            MethodName::Prompt => Method::Prompt(PromptConfig { virtual_tokens: self.virtual_tokens }),
            MethodName::Ia3 => Method::Ia3,
            MethodName::Bottleneck => Method::Bottleneck(BottleneckConfig { width: rank }),
            MethodName::MonteCLoRA => Method::MonteCLoRA(self.monteclora()?),
            MethodName::Released => Method::Released(self.with_options(MonteCLoRAConfig::released())),
        })
    }

    /// The configuration of MonteCLoRA from its preset and options.
    fn monteclora(&self) -> Outcome<MonteCLoRAConfig> {
        let preset = match self.preset.as_str() {
            "paper" => MonteCLoRAConfig::paper(),
            "calibrated" => MonteCLoRAConfig::calibrated(),
            "paper-literal" => MonteCLoRAConfig::paper_literal(),
            "peft" => MonteCLoRAConfig::peft(),
            other => {
                let expected = "expected calibrated, paper, paper-literal or peft";
                return Err(format!("--preset: {expected}, got {other}").into());
            }
        };
        Ok(self.with_options(preset))
    }

    fn with_options(&self, preset: MonteCLoRAConfig) -> MonteCLoRAConfig {
        MonteCLoRAConfig {
            rank: self.rank,
            alpha: self.alpha,
            dropout: self.adapter_dropout,
            use_rslora: self.rslora,
            num_components: self.num_components.unwrap_or(preset.num_components),
            sample_scaler: self.sample_scaler.unwrap_or(preset.sample_scaler),
            relative_scaler: preset.relative_scaler.filter(|_| self.sample_scaler.is_none()),
            kl_weight: self.kl_weight.unwrap_or(preset.kl_weight),
            ..preset
        }
    }
}

/// The folder of a method's run below `--output`: with several methods, each has its own.
pub fn output_of(output: Option<&Path>, name: MethodName, methods: &[MethodName]) -> Option<PathBuf> {
    output.map(|dir| if methods.len() == 1 { dir.to_path_buf() } else { dir.join(name.as_str()) })
}

/// Refuses a run that would overwrite the folder that it starts from.
pub fn check_apart(option: &str, source: &Path, target: &Path) -> Outcome {
    match (source.canonicalize(), target.canonicalize()) {
        (Ok(source), Ok(target)) if source == target => {
            let why = "the run would overwrite the folder that it starts from: give another --output";
            Err(format!("{option} {}: {why}", source.display()).into())
        }
        _ => Ok(()),
    }
}

/// Whether an existing model (`there`) is kept, as when a finished run is started again. A model is written
/// completely or not at all, and it may belong to somebody else, so it is never overwritten.
pub fn stays(path: &Path, there: bool) -> bool {
    if there {
        tell!("{}: it exists already and is kept", path.display());
    }
    there
}

/// Limits `--max-length` on a model of `longest` positions to the room that virtual tokens leave for the
/// text, with a message. A value above `longest` is returned unchanged, and the encoder refuses it.
pub fn text_length(max_length: usize, longest: usize, virtual_tokens: usize) -> usize {
    let room = longest.saturating_sub(virtual_tokens);
    if max_length <= room || max_length > longest {
        return max_length;
    }
    let beside = format!("{virtual_tokens} of the model's {longest} positions are virtual tokens");
    tell!("--max-length {max_length}: reduced to {room}, as {beside}");
    room
}
