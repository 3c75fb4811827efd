//! A sequence classifier under one of the methods: what is trained and what predicts.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::OnceLock;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;

use super::hooks::MethodHooks;
use super::method::{Method, MethodInit};
use super::objective::{Loss, Objective};
use super::settings::{self, Settings};
use crate::adapter::{Context, Param, Params, Role};
use crate::data::batch::{Batch, Batcher, IGNORED};
use crate::data::encode::{Encoded, TextEncoder};
use crate::error::{Error, Result};
use crate::inject;
use crate::labels::Labels;
use crate::models::hub::ModelFiles;
use crate::models::save::copy_companions;
use crate::models::sequence::{SequenceClassifier, SequenceConfig};
use crate::noise::Noise;
use crate::ops;
use crate::optim::Gradients;
use crate::peft::{AdapterFile, AdapterMetadata, ExportFormat};
use crate::predict::Predictor;
use crate::util::files;

/// A classifier, its trainable parameters and, what its method asks of training beside its loss.
///
/// # Example
/// ```
/// use candle_core::{DType, Device};
/// use monteclora::inject::Targets;
/// use monteclora::models::hub::ModelFiles;
/// use monteclora::train::{Classifier, Method, MethodInit};
/// use monteclora::{MonteCLoRAConfig, Noise};
///
/// # if !std::path::Path::new("examples/assets").exists() { return Ok::<(), monteclora::Error>(()) } // not in the package
/// let files = ModelFiles::locate("examples/assets/tiny-roberta", None)?; // a folder, or a hub repository
/// let method = Method::MonteCLoRA(MonteCLoRAConfig { rank: 4, ..Default::default() });
/// let start = MethodInit::Fresh(method, Targets::parse("query,value")?);
/// let classifier = Classifier::load(&files, 2, &start, Noise::new(1), DType::F32, &Device::Cpu)?;
/// assert!(!classifier.is_regression() && classifier.params.trainable_count() > 0);
/// # Ok::<(), monteclora::Error>(())
/// ```
#[derive(Debug)]
pub struct Classifier {
    /// The model with its adapters.
    pub model: Box<dyn SequenceClassifier>,
    /// What is trained.
    pub params: Params,
    /// The names of the classes, in the order of the outputs.
    pub labels: Labels,
    method: Method,
    hooks: MethodHooks,
    config: SequenceConfig,
    files: ModelFiles,
    pub(super) max_length: usize,
    /// Made of the files when it is first asked for.
    pub(super) encoder: OnceLock<TextEncoder>,
}

impl Classifier {
    /// Loads a checkpoint with an output for each of `labels` (a task, names, or how many; one: a regression) and what is trained on it. The
    /// base has the dtype `base_dtype`; what is trained is in single precision.
    ///
    /// # Errors
    /// If the files do not hold such a model, hold a part of its head alone (one without any head
    /// is fine: it starts anew), or the start does not fit it.
    pub fn load(
        files: &ModelFiles,
        labels: impl Into<Labels>,
        start: &MethodInit,
        noise: Noise,
        base_dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let labels = labels.into();
        let config = SequenceConfig::from_file(files.config_path(), labels.len())?;
        let checkpoint = files.var_builder(base_dtype, device)?;
        let (params, whole) = (Params::new(noise, device), checkpoint.clone());
        let head = params.var_builder(Some(checkpoint.clone()), Role::Head);
        let method = start.method();
        let base = match method {
            Method::Full => params.var_builder(Some(checkpoint), Role::Base),
            _ => checkpoint,
        };
        let mut model = config.load(base, head, noise)?;
        check_head(&params, &whole)?;
        if let MethodInit::PostHoc(file, _) = start {
            check_trained_head(&params, &whole, file)?;
        }
        let hooks = start.inject(model.as_mut(), &params)?;
        let max_length = config.max_length().saturating_sub(method.virtual_tokens());
        Ok(Self {
            model,
            params,
            labels,
            method,
            hooks,
            config,
            files: files.clone(),
            max_length,
            encoder: OnceLock::new(),
        })
    }

    /// Its method.
    pub fn method(&self) -> &Method {
        &self.method
    }

    /// The configuration of its model.
    pub fn config(&self) -> &SequenceConfig {
        &self.config
    }

    /// What it was loaded from.
    pub fn files(&self) -> &ModelFiles {
        &self.files
    }

    /// Writes what was trained below `dir`: `adapter/` in PEFT's layout, with the head; under full
    /// fine-tuning `model/` with configuration and weights; of a method that is here for comparison
    /// alone `adapter/parameters.safetensors`, by the names of the store. `base_model` is what the
    /// checkpoint was loaded from.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn save(&self, base_model: &str, dir: &Path) -> Result<()> {
        let method = match (self.method.adapter(), &self.method) {
            (Some(method), _) => method,
            (None, Method::Full) => return self.save_model(&dir.join("model")),
            (None, _) => return self.params.save(&dir.join("adapter")),
        };
        let metadata = AdapterMetadata {
            base_model: Some(base_model.to_string()),
            task: Some("SEQ_CLS".to_string()),
            ..AdapterMetadata::default()
        };
        let file = AdapterFile::from_model(
            self.model.as_ref(),
            inject::DEFAULT_ADAPTER,
            &self.params,
            &method,
            &metadata,
        )?;
        file.write(dir.join("adapter"), ExportFormat::PeftMonteCLoRA)
    }

    fn save_model(&self, dir: &Path) -> Result<()> {
        std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
        // A checkpoint of the bare body trains under its own names; with a head, Hugging Face
        // expects the body's prefix.
        let prefix = self.config.prefix();
        let name = |(name, param): &(String, Param)| match param.role {
            Role::Base if !name.starts_with(&prefix) => format!("{prefix}{name}"),
            _ => name.clone(),
        };
        // The weights come last: a folder that has them is whole.
        copy_companions(&self.files, dir)?;
        files::write_json(&dir.join("config.json"), &self.config.to_json())?;
        let weights = self.params.all();
        let named = weights.iter().map(|param| (name(param), param.1.var.as_tensor()));
        files::write_safetensors(&dir.join("model.safetensors"), named)
    }

    /// Whether the outputs are scores rather than classes.
    pub fn is_regression(&self) -> bool {
        self.model.num_labels() == 1
    }

    /// The loss of one batch: cross-entropy or squared error, and the regulariser's terms. `rows`: how many rows
    /// the run trains on, which a prior and the evidence bound ask for.
    ///
    /// # Errors
    /// If a label is out of range or of the wrong kind (the error names the data's row), the method asks for
    /// `rows` and there are none, or the forward pass fails.
    pub fn loss(&self, batch: &Batch, cx: &Context, rows: Option<usize>) -> Result<Loss> {
        self.check_labels(batch)?;
        if unknown(batch)? {
            let reason = format!(
                "row {} has none: it can be predicted, not trained on",
                batch.rows.first().unwrap_or(&0)
            );
            return Err(Error::config("labels", reason));
        }
        let cx = self.hooks.context(cx)?;
        let outputs = Predictor::predict(self, batch, &cx)?;
        let task = if self.is_regression() {
            let scores = batch.labels.to_device(outputs.device())?;
            ops::mean_squared_error(&outputs.squeeze(1)?, &scores, cx.path)?
        } else {
            ops::cross_entropy(&outputs, &batch.labels, IGNORED, cx.path)?
        };
        self.hooks.loss(task, self.model.as_ref(), &cx, rows)
    }

    /// Checks that the labels are what the outputs predict: candle would cut scores to classes and
    /// regress class numbers without a word.
    pub(super) fn check_labels(&self, batch: &Batch) -> Result<()> {
        if unknown(batch)? {
            return Ok(()); // rows to predict
        }
        let (outputs, scores) = (self.model.num_labels(), batch.labels.dtype().is_float());
        if scores != self.is_regression() {
            let (found, wanted) = if scores {
                ("a score", format!("a class below {outputs}: the model has {outputs} outputs"))
            } else {
                ("a class", "a score: the model has one output".to_string())
            };
            let reason = format!("row {} has {found}, expected {wanted}", batch.rows.first().unwrap_or(&0));
            return Err(Error::config("labels", reason));
        }
        if scores {
            return Ok(());
        }
        let labels = batch.labels.to_dtype(DType::I64)?.to_vec1::<i64>()?;
        let valid = |label: i64| label == IGNORED || (0..outputs as i64).contains(&label);
        match batch.rows.iter().zip(labels).find(|(_, label)| !valid(*label)) {
            Some((row, label)) => {
                let reason = format!("row {row} has class {label}, the model has {outputs} outputs");
                Err(Error::config("labels", reason))
            }
            None => Ok(()),
        }
    }
}

/// A head is the checkpoint's own or new: of one that is there in part, the rest would train from
/// random weights without a word.
fn check_head(params: &Params, checkpoint: &VarBuilder) -> Result<()> {
    let head = params.all().into_iter().filter(|(_, param)| param.role == Role::Head);
    let (held, lacking): (Vec<_>, Vec<_>) =
        head.map(|(name, _)| name).partition(|name| checkpoint.contains_tensor(name));
    match (held.first(), lacking.first()) {
        (Some(held), Some(lacking)) => {
            Err(Error::tensor(lacking, format!("the checkpoint has {held}, but not this part of the head")))
        }
        _ => Ok(()),
    }
}

/// Post hoc nothing but the posterior is trained: the head must come from somewhere.
fn check_trained_head(params: &Params, checkpoint: &VarBuilder, file: &AdapterFile) -> Result<()> {
    let given = |name: &String| checkpoint.contains_tensor(name) || file.saved_modules.contains_key(name);
    let mut head = params.all().into_iter().filter(|(_, param)| param.role == Role::Head);
    match head.find(|(name, _)| !given(name)) {
        Some((name, _)) => {
            Err(Error::tensor(name, "neither the checkpoint nor the adapter has a trained head"))
        }
        None => Ok(()),
    }
}

/// Whether no row of a batch has a label.
fn unknown(batch: &Batch) -> Result<bool> {
    let classes = batch.labels.dtype() == DType::I64;
    Ok(classes && batch.labels.to_vec1::<i64>()?.iter().all(|label| *label == IGNORED))
}

impl Predictor for Classifier {
    fn predict(&self, batch: &Batch, cx: &Context) -> candle_core::Result<Tensor> {
        self.model.logits(&batch.input_ids, &batch.token_type_ids, &batch.attention_mask, cx)
    }
}

/// Training a [`Classifier`] on encoded rows.
#[derive(Debug)]
pub struct Classification<'a> {
    /// What is trained.
    pub classifier: &'a Classifier,
    /// The training rows.
    pub rows: &'a [Encoded],
    /// How they become batches.
    pub batcher: Batcher,
}

impl Classification<'_> {
    /// The batch of some rows.
    ///
    /// # Errors
    /// If a row does not exist, or candle fails.
    pub fn batch(&self, rows: &[usize]) -> Result<Batch> {
        let chosen: Option<Vec<&Encoded>> = rows.iter().map(|row| self.rows.get(*row)).collect();
        let chosen =
            chosen.ok_or_else(|| Error::config("rows", format!("{rows:?} are not all in the data")))?;
        Batch::collate(&chosen, self.classifier.model.pad_id(), self.classifier.params.device())
    }
}

impl Objective for Classification<'_> {
    fn epoch(&self, epoch: u64) -> Result<Vec<Vec<usize>>> {
        let lengths: Vec<usize> = self.rows.iter().map(|row| row.ids.len()).collect();
        Ok(self.batcher.epoch(&lengths, epoch))
    }

    fn loss(&self, rows: &[usize], cx: &Context) -> Result<Loss> {
        self.classifier.loss(&self.batch(rows)?, cx, Some(self.rows.len()))
    }

    fn settings(&self) -> Settings {
        let Classifier { model, hooks, .. } = self.classifier;
        let numbers = self.rows.iter().flat_map(Encoded::numbers);
        settings::of_run(&self.batcher, hooks.settings(), model.as_ref(), numbers)
    }

    fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        self.classifier.hooks.state()
    }

    fn restore(&self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        self.classifier.hooks.restore(self.classifier.model.as_ref(), state)
    }

    fn before_step(&self, step: usize, total: usize) -> Result<()> {
        self.classifier.hooks.tell_rows(self.rows.len(), self.batcher.batch_size())?;
        self.classifier.hooks.before_step(step, total)
    }

    fn after_step(&self, params: &Params, gradients: &Gradients, step: usize, total: usize) -> Result<()> {
        self.classifier.hooks.after_step(self.classifier.model.as_ref(), params, gradients, step, total)
    }
}
