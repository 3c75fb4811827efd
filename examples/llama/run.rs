//! One run: training with one method, evaluation and the files that it writes.

use std::path::Path;

use indicatif::ProgressBar;
use monteclora::data::batch::Batcher;
use monteclora::data::causal::{PromptEncoder, Tokens};
use monteclora::eval::Generator;
use monteclora::inject::DEFAULT_ADAPTER;
use monteclora::models::causal::CausalLm;
use monteclora::models::decoder::{DecoderConfig, DecoderForCausalLM};
use monteclora::models::generate::PosteriorWeights;
use monteclora::models::hub::ModelFiles;
use monteclora::models::save::{check_merged, save_merged, MAX_SHARD_BYTES};
use monteclora::peft::{self, AdapterFile, AdapterMetadata, ExportFormat, TaskType};
use monteclora::train::distributed::Communicator;
use monteclora::train::{self, held_out_loss_in_turns, CausalTuning, MethodName, RunFolder, Summary};
use monteclora::util::files;
use monteclora::{Noise, Params};
use serde_json::{json, Value};

use super::gguf::Trained;
use super::rows::{Data, Input};
use super::Args;
use crate::common::log::{draw_curves, Log};
use crate::common::options::{check_apart, stays, Base};
use crate::common::output::{tell, tell_err};
use crate::common::processes::Processes;
use crate::common::watch::{self, say, Scores, Watch};
use crate::common::{self, Outcome};

/// The data that all methods share.
pub struct Setup {
    pub args: Args,
    pub base: Base,
    pub files: ModelFiles,
    pub config: DecoderConfig,
    pub encoder: PromptEncoder,
    /// How the rows are read, if that is known.
    pub input: Option<Input>,
    pub data: Data,
}

impl Setup {
    /// Runs one method: load, generate, train, evaluate, generate, write. Returns the contents of
    /// `metrics.json`.
    pub fn tune(&self, name: MethodName, out: Option<&Path>, processes: &Processes) -> Outcome<Value> {
        processes.check(0)?;
        let writes = out.filter(|_| processes.is_first());
        // Held until everything is written, not only during training.
        let _lock = writes.map(files::lock).transpose()?;
        common::reset_peak_memory();
        let Self { args, config, data, .. } = self;
        let placement = config.place(&processes.devices(&args.device)?)?;
        if placement.places() > 1 {
            tell_err!("{placement}");
        }
        let (noise, device) = (Noise::new(args.train.seed), placement.first());
        let params = Params::new(noise, device);
        let checkpoint = self.files.open_weights(common::dtype(&args.dtype)?, device)?;
        let start = args.method.start(name, out)?;
        let base = start.base(checkpoint, &params)?;
        let mut model = DecoderForCausalLM::load(base.placed(&placement), config, noise)?;
        model.set_checkpoint_layers(args.train.checkpoint_layers);
        let (hooks, saves) = (start.inject(&mut model, &params)?, args.train.writes(&start, out)?);
        if !saves && (args.merged || args.serving || args.gguf.is_asked()) {
            return Err("--epochs 0: nothing was trained that could be written: give an --adapter".into());
        }

        let whole = writes
            .filter(|_| saves && (args.merged || name == MethodName::Full))
            .map(|dir| RunFolder::new(dir).model());
        if let Some(dir) = &whole {
            check_apart("--model", Path::new(&self.base.model), dir)?;
            if !(args.train.resume && files::has_entries(dir)) {
                check_merged(&model, &params, &self.files, dir)?;
            }
        }
        let adapter = start.method().adapter();
        let trained =
            Trained { model: &model, params: &params, adapter: adapter.as_ref(), files: &self.files };
        args.gguf.check(&trained, writes, args.train.resume)?;
        args.task.check(&self.generator(&model, PosteriorWeights::Mean, 1)?, &data.held_out_texts)?;

        let communicator = processes.communicator();
        let (rows, most) = (&data.held_out, args.batch_size.min(16));
        let loss =
            |w: PosteriorWeights| held_out_loss_in_turns(&model, rows, most, &w.passes(), communicator);
        let before = loss(PosteriorWeights::Mean)?;
        tell!("\n{name}, before: {}[{}]", data.prompt, self.speak(&model));
        let log = writes.map(|dir| Log::create(dir, args.train.tensorboard)).transpose()?;
        let keep = || {
            let Some(dir) = writes.filter(|_| saves) else { return Ok(()) };
            self.input.as_ref().map_or(Ok(()), |input| input.write(dir))?;
            match &adapter {
                Some(adapter) => self.save_adapter(&model, &params, adapter, dir),
                None if name == MethodName::Full => RunFolder::new(dir).remove_adapter(),
                None => RunFolder::new(dir).save_parameters(&params),
            }
        };
        let bar = processes.progress(0, name.as_str());
        let evaluate = |bar: &ProgressBar, step| {
            let loss = loss(PosteriorWeights::Mean)?;
            say(bar, &format!("{} step {step}: held-out loss {loss:.4}", bar.prefix()));
            Ok(Scores { score: Some(-loss), values: vec![("held-out/loss".to_string(), loss)] })
        };
        let at_end = whole.iter().cloned().chain(args.gguf.merged(writes).map(|(_, path)| path)).collect();
        let is_alone = processes.world() == 1;
        let mut watch = Watch { bar, log, evaluate: &evaluate, keep: &keep, is_alone, at_end };
        let summary = match args.train.epochs {
            0 => Summary::default(),
            _ => {
                let batcher = Batcher::new(args.batch_size, args.train.length_grouped, noise)?;
                let (rows, pad_id) = (&data.train, config.pad_id());
                let objective = CausalTuning::new(&model, hooks, rows, batcher, pad_id);
                let config = args.train.config(
                    if self.base.is_bundled { 5e-3 } else { 3e-4 },
                    &start.method(),
                    common::dtype(&args.dtype)?,
                    processes.world(),
                )?;
                let held_out = data.held_out.iter().flat_map(Tokens::numbers);
                let checkpoints = out.map(|dir| args.train.checkpoints(dir, &self.base.model, held_out));
                watch::fit(&objective, &params, &config, &mut watch, checkpoints.as_ref(), processes)?
            }
        };
        watch.bar.finish_and_clear();

        // Written first, before anything else can fail.
        keep()?;
        if let Some(dir) = &whole {
            if !stays(dir, args.train.resume && files::has_entries(dir)) {
                save_merged(&model, &params, &self.files, None, dir, MAX_SHARD_BYTES)?;
            }
        }
        if processes.is_first() {
            args.gguf.write(&trained, writes, args.train.resume)?;
        }
        processes.check(summary.steps)?;
        tell!("{name}, after: {}[{}]", data.prompt, self.speak(&model));
        let draws = if start.method().has_posterior() { args.posterior_samples } else { 0 };
        let posterior = (draws > 0).then_some(PosteriorWeights::Average(draws));
        let metrics = json!({
            "model": self.base.model, "method": name.as_str(), "seed": args.train.seed, "steps": summary.steps,
            "kept_step": summary.kept_step, "seconds": summary.seconds,
            "step_seconds_median": summary.step_seconds_median, "skipped": summary.skipped,
            "trainable_parameters": params.trainable_count(), "loss_before": before,
            "loss_mean": loss(PosteriorWeights::Mean)?, "loss_posterior": posterior.map(loss).transpose()?,
            "task": args.task.task, "task_mean": self.measure(&model, PosteriorWeights::Mean, communicator)?,
            "task_posterior": posterior.map(|weights| self.measure(&model, weights, communicator)).transpose()?,
            "peak_rss_mb": train::peak_rss_bytes().map(|bytes| bytes as f64 / 1e6),
        });
        if let Some(dir) = writes {
            files::write_json(&dir.join("metrics.json"), &metrics)?;
            draw_curves(dir)?;
        }
        for weights in ["task_mean", "task_posterior"].iter().filter(|key| !metrics[**key].is_null()) {
            tell!("{name}, {weights}: {}", metrics[*weights]);
        }
        Ok(metrics)
    }

    /// Writes the adapter in its current state.
    fn save_adapter(
        &self,
        model: &DecoderForCausalLM,
        params: &Params,
        adapter: &peft::AdapterMethod,
        dir: &Path,
    ) -> monteclora::Result<()> {
        let (base_model, task) = (Some(self.base.model.clone()), Some(TaskType::CausalLm));
        let revision = self.files.revision().map(str::to_string);
        let metadata = AdapterMetadata { base_model, revision, task, labels: None };
        let format = if self.args.serving {
            ExportFormat::Serving { fold_rslora: self.args.fold_rslora }
        } else {
            ExportFormat::Peft
        };
        let file = AdapterFile::from_model(model, DEFAULT_ADAPTER, params, adapter, &metadata)?;
        RunFolder::new(dir).save_adapter(&file, format)
    }

    /// Generates the continuation of the prompt. A run goes on without this sample.
    fn speak(&self, model: &DecoderForCausalLM) -> String {
        let generator = self.generator(model, PosteriorWeights::Mean, 64);
        let texts = generator
            .and_then(|generator| Ok(generator.texts(&[&self.data.prompt], &self.args.generation.stops())?));
        texts.map(|mut texts| texts.swap_remove(0)).unwrap_or_else(|why| {
            tell_err!("there is no sample: {why}");
            String::new()
        })
    }

    /// The results of the task; null without one.
    fn measure(
        &self,
        model: &DecoderForCausalLM,
        weights: PosteriorWeights,
        communicator: &dyn Communicator,
    ) -> Outcome<Value> {
        let generator = self.generator(model, weights, self.args.task.max_new_tokens())?;
        self.args.task.measure(&generator, &self.data.held_out_texts, communicator)
    }

    fn generator<'a>(
        &'a self,
        model: &'a DecoderForCausalLM,
        weights: PosteriorWeights,
        most: usize,
    ) -> Outcome<Generator<'a>> {
        let (seed, stop) = (self.args.train.seed, self.data.stop.clone());
        let config = self.args.generation.config(seed, stop, weights, most)?;
        Ok(Generator { model, encoder: &self.encoder, config, batch_size: self.args.batch_size })
    }
}
