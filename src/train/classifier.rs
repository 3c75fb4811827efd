//! A sequence classifier under any of the methods, for training and prediction.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::OnceLock;

use candle_core::{DType, Device, Tensor};

use super::head::{self, HeadSource};
use super::hooks::{MethodHooks, StepDone};
use super::method::{Method, MethodInit};
use super::objective::{Loss, Objective};
use super::run_folder::RunFolder;
use super::settings::{self, Settings};
use crate::adapter::{Context, Param, Params, Role};
use crate::data::batch::{Batch, Batcher};
use crate::data::encode::{Encoded, TextEncoder};
use crate::data::task::Label;
use crate::error::{Error, Result};
use crate::inject;
use crate::labels::Labels;
use crate::models::hub::ModelFiles;
use crate::models::save::{self, copy_companions, TensorPrefixes};
use crate::models::sequence::{SequenceClassifier, SequenceConfig};
use crate::noise::Noise;
use crate::ops;
use crate::optim::Gradients;
use crate::peft::{AdapterFile, AdapterMetadata, AdapterMethod, ExportFormat, TaskType};
use crate::predict::Predictor;
use crate::util::files;

/// A classifier: its model, its trainable parameters, and what its method adds to training.
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
    /// The trainable parameters.
    pub params: Params,
    /// The names of the classes, in the order of the outputs.
    pub labels: Labels,
    note: Option<String>,
    method: Method,
    hooks: MethodHooks,
    config: SequenceConfig,
    files: ModelFiles,
    pub(super) max_length: usize,
    pub(super) eval_batch_size: usize,
    /// The class whose F1 is measured, of two.
    pub(super) positive: u32,
    /// Created from the files on first use.
    pub(super) encoder: OnceLock<TextEncoder>,
}

/// The purpose of loading a classifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LoadPurpose {
    /// Training, from the checkpoint's head if it has one.
    Train,
    /// Training, from a new head.
    TrainNewHead,
    /// Prediction, or training if the weights allow it (dense and f32).
    Open,
}

impl Classifier {
    /// Loads a checkpoint with one output for each of `labels` (a task, names, or a number; one output is a
    /// regression), and the parameters to train. The base has the dtype `base_dtype`; trainable parameters
    /// are f32, which with [`Method::Full`] includes the base.
    ///
    /// If the checkpoint or the adapter has a head, its rows are put into the order of `labels` by the names
    /// of their classes ([`Labels::places_of`]). If the names differ, the rows are taken as if in that order,
    /// and [`Self::note`] says so. If `labels` is only a number, the classifier takes the head's order and
    /// names.
    ///
    /// # Errors
    /// If the files do not hold such a model, hold only a part of its head or a head with another number of
    /// outputs (no head at all is fine: a new one is created), or `start` does not fit the model. With
    /// [`Method::Full`] also if the base is quantised or `base_dtype` is not f32.
    pub fn load(
        files: &ModelFiles,
        labels: impl Into<Labels>,
        start: &MethodInit,
        noise: Noise,
        base_dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        Self::with_head(files, labels.into(), start, noise, base_dtype, device, LoadPurpose::Train)
    }

    /// [`Self::load`] with a new head, whatever the checkpoint has. The head of an adapter is still loaded.
    ///
    /// # Errors
    /// As [`Self::load`], except for the checkpoint's head.
    pub fn load_with_new_head(
        files: &ModelFiles,
        labels: impl Into<Labels>,
        start: &MethodInit,
        noise: Noise,
        base_dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        Self::with_head(files, labels.into(), start, noise, base_dtype, device, LoadPurpose::TrainNewHead)
    }

    pub(super) fn with_head(
        files: &ModelFiles,
        wanted: Labels,
        start: &MethodInit,
        noise: Noise,
        base_dtype: DType,
        device: &Device,
        purpose: LoadPurpose,
    ) -> Result<Self> {
        let config = SequenceConfig::from_files(files, wanted.len())?;
        let checkpoint = files.open_weights(base_dtype, device)?;
        let source = HeadSource::find(&config, &checkpoint, start, purpose == LoadPurpose::TrainNewHead)?;
        let params = Params::new(noise, device);
        let head = params.var_builder(source.checkpoint.clone(), Role::Head);
        let method = start.method();
        let trainable = base_dtype == DType::F32 && !checkpoint.is_quantized();
        let base = match purpose {
            LoadPurpose::Open if !trainable => checkpoint,
            _ => start.base(checkpoint, &params)?,
        };
        let mut model = config.load(base, head, noise)?;
        source.check(start, &params)?;
        if method == Method::Full && !trainable {
            params.set_trainable(Role::Head, false);
        }
        start.adapt(model.as_mut(), &params)?;
        let (labels, note) = source.settle(wanted, &params)?;
        // After `settle`: a prior on the head starts from its rows in their final order.
        let hooks = start.hooks(model.as_ref(), &params)?;
        if let Some(note) = &note {
            tracing::warn!("{}: {note}", files.config_path().display());
        }
        let max_length = config.max_length().saturating_sub(method.virtual_tokens());
        let eval_batch_size = if config.is_decoder() { 16 } else { 64 };
        Ok(Self {
            model,
            params,
            labels,
            note,
            method,
            hooks,
            config,
            files: files.clone(),
            max_length,
            eval_batch_size,
            positive: 1,
            encoder: OnceLock::new(),
        })
    }

    /// A note for the user if the names of the head's classes are not those of the task, else `None`.
    pub fn note(&self) -> Option<&str> {
        self.note.as_deref()
    }

    /// Returns the fine-tuning method.
    pub fn method(&self) -> &Method {
        &self.method
    }

    /// Returns the configuration of the model.
    pub fn config(&self) -> &SequenceConfig {
        &self.config
    }

    /// Returns the files that it was loaded from.
    pub fn files(&self) -> &ModelFiles {
        &self.files
    }

    /// Writes what was trained below `dir` ([`RunFolder`]): `adapter/` in PEFT's layout, with the head; for full fine-tuning
    /// `model/` with configuration and weights; for methods that are only here for comparison
    /// `adapter/parameters.safetensors`, by parameter names. Adapter files of another run are removed.
    /// `base_model` is the name of the checkpoint that was loaded.
    ///
    /// # Errors
    /// If a file cannot be written, or the whole model is frozen ([`Self::of_checkpoint`]).
    pub fn save(&self, base_model: &str, dir: &Path) -> Result<()> {
        let is_full = self.method == Method::Full;
        if is_full && self.params.of_role(Role::Base).is_empty() {
            let reason = "the model was opened to predict, and nothing of it is trained";
            return Err(Error::config("classifier", reason));
        }
        let run = RunFolder::new(dir);
        match self.method.adapter() {
            Some(method) => {
                let file = self.adapter_file(&method, Some(base_model.to_string()))?;
                run.save_adapter(&file, ExportFormat::Peft)
            }
            None if is_full => {
                run.remove_adapter()?;
                self.save_model(&run.model())
            }
            None => run.save_parameters(&self.params),
        }
    }

    /// Writes the whole model with the mean of its adapter merged in, its head and the names of the classes, to the
    /// folder `dir` as transformers reads it ([`save::save_merged`]).
    ///
    /// # Errors
    /// As [`save::save_merged`].
    pub fn save_merged(&self, dir: &Path) -> Result<()> {
        let config = self.config.clone().with_labels(self.labels.clone())?.to_json();
        let (model, params) = (self.model.as_ref(), &self.params);
        save::save_merged(model, params, &self.files, Some(&config), dir, save::MAX_SHARD_BYTES)
    }

    /// Returns the adapter with the head. If the checkpoint names the same classes in another order, the rows
    /// of the head are put into that order: PEFT stores no names and takes them from the checkpoint.
    ///
    /// # Errors
    /// If `method` is not the method of the layers.
    pub(crate) fn adapter_file(
        &self,
        method: &AdapterMethod,
        base_model: Option<String>,
    ) -> Result<AdapterFile> {
        let of_checkpoint = self.config.named().ok().flatten().filter(|named| !named.are_numbers());
        let places = of_checkpoint.as_ref().and_then(|named| self.labels.places_of(named));
        // If the checkpoint has other names, ours are stored even if they are mere numbers.
        let labels = match (&places, &of_checkpoint) {
            (Some(_), _) => of_checkpoint,
            (None, Some(_)) => Some(self.labels.clone()),
            // Names are stored unless they are LABEL_0, LABEL_1 ..; 0, 1 .. are other names. If the
            // checkpoint's head is for an unsupported kind of problem, stored names also mark the adapter's
            // head as another one.
            (None, None) => {
                let of_files = SequenceConfig::from_files(&self.files, self.labels.len())?;
                let is_numbered = self.labels == Labels::numbered(self.labels.len());
                Some(self.labels.clone()).filter(|_| !is_numbered || of_files.foreign_problem().is_some())
            }
        };
        let task = Some(TaskType::SequenceClassification);
        let revision = self.files.revision().map(str::to_string);
        let metadata = AdapterMetadata { base_model, revision, task, labels };
        let (model, name) = (self.model.as_ref(), inject::DEFAULT_ADAPTER);
        let mut file = AdapterFile::from_model(model, name, &self.params, method, &metadata)?;
        if let Some(places) = places {
            for name in self.config.output_tensors() {
                if let Some(rows) = file.saved_modules.get_mut(*name) {
                    *rows = head::take_rows(rows, &places)?;
                }
            }
        }
        Ok(file)
    }

    fn save_model(&self, dir: &Path) -> Result<()> {
        std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
        let (weights, prefixes) = (self.params.all(), TensorPrefixes::of(self.model.as_ref())?);
        let base = weights.iter().filter(|(_, param)| param.role == Role::Base);
        // A checkpoint of the bare body is trained under its own names; with a head, Hugging Face expects the
        // body's prefix.
        let bare = prefixes.are_bare(base.map(|(name, _)| name.as_str()));
        let name = |(name, param): &(String, Param)| match param.role {
            Role::Base if bare => prefixes.whole(name),
            _ => name.clone(),
        };
        // Weights last: a folder that has them is complete.
        copy_companions(&self.files, dir)?;
        files::write_json(
            &dir.join("config.json"),
            &self.config.clone().with_labels(self.labels.clone())?.to_json(),
        )?;
        let named = weights.iter().map(|param| (name(param), param.1.var.as_tensor()));
        files::write_safetensors(&dir.join("model.safetensors"), named)
    }

    /// Whether the outputs are scores rather than classes.
    pub fn is_regression(&self) -> bool {
        self.model.num_labels() == 1
    }

    /// Returns the loss of one batch: cross-entropy or squared error, plus the regulariser's terms. `rows` is
    /// the number of training rows, which a prior and the evidence bound need.
    ///
    /// # Errors
    /// If a label is out of range or of the wrong kind (the error names the data's row), the method needs
    /// `rows` and there are none, or the forward pass fails.
    pub fn loss(&self, batch: &Batch, cx: &Context, rows: Option<usize>) -> Result<Loss> {
        self.check_labels(batch)?;
        if unknown(batch)? {
            let reason = format!(
                "row {} has no label: it can be predicted, not trained on",
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
            ops::cross_entropy(&outputs, &batch.labels, ops::IGNORED_LABEL, cx.path)?
        };
        self.hooks.loss(task, self.model.as_ref(), &cx, rows)
    }

    /// Checks that the labels are of the kind that the outputs predict: candle would truncate scores to
    /// classes and use class numbers as scores without an error.
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
        let valid = |label: i64| label == ops::IGNORED_LABEL || (0..outputs as i64).contains(&label);
        match batch.rows.iter().zip(labels).find(|(_, label)| !valid(*label)) {
            Some((row, label)) => {
                let reason = format!("row {row} has class {label}, the model has {outputs} outputs");
                Err(Error::config("labels", reason))
            }
            None => Ok(()),
        }
    }
}

/// Whether no row of a batch has a label.
fn unknown(batch: &Batch) -> Result<bool> {
    let classes = batch.labels.dtype() == DType::I64;
    Ok(classes && batch.labels.to_vec1::<i64>()?.iter().all(|label| *label == ops::IGNORED_LABEL))
}

impl Predictor for Classifier {
    fn predict(&self, batch: &Batch, cx: &Context) -> candle_core::Result<Tensor> {
        self.model.logits(&batch.input_ids, &batch.token_type_ids, &batch.attention_mask, cx)
    }
}

/// Training a [`Classifier`] on encoded rows.
#[derive(Debug)]
pub struct Classification<'a> {
    classifier: &'a Classifier,
    rows: &'a [Encoded],
    batcher: Batcher,
    labelled: usize,
}

impl<'a> Classification<'a> {
    /// The training of `classifier` on `rows`, in batches of `batcher`.
    pub fn new(classifier: &'a Classifier, rows: &'a [Encoded], batcher: Batcher) -> Self {
        Self { classifier, rows, batcher, labelled: labelled(rows) }
    }

    /// Returns the batch of some rows.
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

/// The number of labelled rows, over which a loss is a mean and against which a prior is weighed.
fn labelled<'a>(rows: impl IntoIterator<Item = &'a Encoded>) -> usize {
    rows.into_iter().filter(|row| row.label != Label::Unknown).count()
}

impl Objective for Classification<'_> {
    fn epoch(&self, epoch: u64) -> Result<Vec<Vec<usize>>> {
        let lengths: Vec<usize> = self.rows.iter().map(|row| row.ids.len()).collect();
        Ok(self.batcher.epoch(&lengths, epoch))
    }

    fn loss(&self, rows: &[usize], cx: &Context) -> Result<Loss> {
        self.classifier.loss(&self.batch(rows)?, cx, Some(self.labelled))
    }

    fn weight(&self, rows: &[usize]) -> f64 {
        labelled(rows.iter().filter_map(|row| self.rows.get(*row))) as f64
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
        self.classifier.hooks.before_step(step, total)
    }

    fn after_step(&self, params: &Params, gradients: &Gradients, step: usize, total: usize) -> Result<()> {
        let Classifier { model, hooks, .. } = self.classifier;
        let (model, rows, batch_size) = (model.as_ref(), self.labelled, self.batcher.batch_size());
        hooks.after_step(&StepDone { model, params, gradients, step, total, rows, batch_size })
    }
}
