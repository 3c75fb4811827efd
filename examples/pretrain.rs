//! Pre-trains a small RoBERTa from scratch by masked language modelling on plain text: its byte-level BPE
//! tokenizer, its weights, its model folder.
//!
//! `cargo run --release --example pretrain -- --text SENTENCES.txt --text sst2/train.tsv --output DIR`
//!
//! Text files hold one sequence per line. Of `.tsv` files (with a header line), the first column is read; of
//! `.jsonl` files, the field `question`.

#![deny(clippy::print_stdout, clippy::print_stderr)] // use `tell!`: a closed pipe must not panic

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use clap::Parser;
use common::output::tell;
use common::Outcome;
use monteclora::adapter::{Context, Params, Pass, Role};
use monteclora::data::masked::{MaskedBatch, Masking};
use monteclora::models::roberta::{RobertaConfig, RobertaForMaskedLM};
use monteclora::noise::{Noise, Purpose};
use monteclora::ops;
use monteclora::optim::{clip_grad_norm, AdamW, AdamWConfig, Gradients};
use monteclora::train::Schedule;
use monteclora::util::files;
use monteclora::{Error, Tape};
use serde_json::{json, Value};
use tokenizers::models::bpe::{BpeTrainer, BPE};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::roberta::RobertaProcessing;
use tokenizers::{AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper};
use tokenizers::{PreTokenizerWrapper, Tokenizer, TokenizerBuilder};

/// RoBERTa's special tokens, in the order of their ids.
const SPECIAL: [&str; 5] = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"];
const PAD: u32 = 1;
const MASK: u32 = 4;

/// Pre-trains a small RoBERTa from scratch by masked language modelling on plain text: its byte-level BPE
/// tokenizer, its weights, its model folder.
#[derive(Parser)]
#[command(name = "pretrain", version, after_help = EXAMPLES)]
struct Args {
    /// A text file with a sequence per line (of .tsv the first column, of .jsonl the field `question`);
    /// repeat for more.
    #[arg(long, required = true)]
    text: Vec<PathBuf>,
    /// The model folder to write.
    #[arg(long)]
    output: PathBuf,
    /// The vocabulary size of the tokenizer, special tokens included.
    #[arg(long, default_value_t = 8000, help_heading = "Model")]
    vocab_size: usize,
    /// The width of a hidden state.
    #[arg(long, default_value_t = 192, help_heading = "Model")]
    hidden: usize,
    /// The number of layers.
    #[arg(long, default_value_t = 4, help_heading = "Model")]
    layers: usize,
    /// The number of attention heads per layer, a divisor of the width.
    #[arg(long, default_value_t = 4, help_heading = "Model")]
    heads: usize,
    /// The inner width of a feed-forward block.
    #[arg(long, default_value_t = 768, help_heading = "Model")]
    intermediate: usize,
    /// The maximum sequence length, in tokens.
    #[arg(long, default_value_t = 128, help_heading = "Model")]
    max_length: usize,
    /// Training steps; 0 writes the random weights that training would start from.
    #[arg(long, default_value_t = 4000, help_heading = "Training")]
    steps: usize,
    /// Steps between evaluations on held-out text, each of which saves the model.
    #[arg(long, default_value_t = 500, help_heading = "Training")]
    save_every: usize,
    /// Tokens per step, padding included.
    #[arg(long, default_value_t = 4096, help_heading = "Training")]
    batch_tokens: usize,
    /// The peak learning rate, after a twentieth of the steps; it then falls linearly to zero.
    #[arg(long, default_value_t = 1e-3, help_heading = "Training")]
    lr: f64,
    /// Dropout probability of hidden states and attention.
    #[arg(long, default_value_t = 0.1, help_heading = "Training")]
    dropout: f64,
    /// The seed of weights, row order and masking.
    #[arg(long, default_value_t = 1, help_heading = "Training")]
    seed: u64,
    /// The device: cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: String,
}

const EXAMPLES: &str = "\
Example:
  pretrain --text SENTENCES.txt --text sst2/train.tsv --steps 4000 --output DIR";

fn main() -> ExitCode {
    common::exit(run())
}

fn run() -> Outcome {
    common::tune_allocator();
    let (args, _) = common::given::parse::<Args>();
    if args.save_every == 0 {
        return Err("--save-every must be at least 1".into());
    }
    if args.max_length < 8 {
        return Err(format!("--max-length: expected at least 8, got {}", args.max_length).into());
    }
    let device = common::device(&args.device)?;
    let noise = Noise::new(args.seed);

    let mut lines = Vec::new();
    for path in &args.text {
        let before = lines.len();
        read_lines(path, &mut lines)?;
        tell!("{}: {} sequences", path.display(), lines.len() - before);
    }
    let tokenizer = train_tokenizer(&lines, args.vocab_size)?;
    std::fs::create_dir_all(&args.output).map_err(Error::io(&args.output))?;
    let rows = encode(&tokenizer, &lines, args.max_length)?;
    // About one in fifty sequences is held out; equal texts are on the same side.
    let (held_out, train): (Vec<_>, Vec<_>) = rows.into_iter().partition(|row| held_out(row));
    if train.is_empty() || held_out.is_empty() {
        return Err("--text: too little to train on and to hold out".into());
    }
    let tokens: usize = train.iter().map(Vec::len).sum();
    tell!("{} training sequences of {tokens} tokens, {} held out", train.len(), held_out.len());

    let config = model_config(&args, tokenizer.get_vocab_size(true))?;
    let params = Params::new(noise, &device);
    let model = RobertaForMaskedLM::load(params.var_builder(None, Role::Base), &config, noise)?;
    tell!("{} parameters", params.trainable_count());
    let masking = Masking {
        rate: 0.15,
        mask_id: MASK,
        first_ordinary_id: SPECIAL.len() as u32,
        vocab_size: config.vocab_size,
    };
    let data = Data { masking, noise, batch_tokens: args.batch_tokens, device: device.clone() };
    let before = data.evaluate(&model, &held_out)?;
    tell!("held-out masked-LM loss before: {before:.4}");

    let mut optimizer = AdamW::new(&params, AdamWConfig { beta2: 0.98, eps: 1e-6, ..Default::default() })?;
    let bar = common::progress(args.steps as u64, "pre-training");
    let start = Instant::now();
    let (mut seen, mut running, mut epoch) = (0usize, 0.0, 0u64);
    let mut batches: Vec<Vec<usize>> = Vec::new();
    let summary = |steps: usize, seen: usize, held: f64, minutes: f64| {
        json!({
            "steps": steps, "tokens_seen": seen, "training_tokens": tokens, "minutes": minutes,
            "held_out_loss_before": before, "held_out_loss_after": held, "seed": args.seed,
        })
    };
    if args.steps == 0 {
        save(&args.output, &tokenizer, &config, &params, &summary(0, 0, before, 0.0))?;
    }
    for step in 0..args.steps {
        if batches.is_empty() {
            batches = data.plan(&train, epoch);
            epoch += 1;
        }
        let rows: Vec<&[u32]> = batches.pop().into_iter().flatten().map(|i| train[i].as_slice()).collect();
        let batch = data.batch(&rows, "train", step as u64)?;
        seen += rows.iter().map(|row| row.len()).sum::<usize>();
        let loss = loss(&model, &batch, &Pass::Train { draw: step as u64 }.into())?;
        let mut grads = Gradients::new();
        grads.backward(&params, &loss, &Tape::default())?;
        let value = f64::from(loss.to_scalar::<f32>()?);
        let norm = clip_grad_norm(&mut grads, 1.0)?;
        if !(value.is_finite() && norm.is_finite()) {
            return Err(format!("step {}: the loss is {value}, its gradient {norm}", step + 1).into());
        }
        optimizer
            .step(&grads, args.lr * Schedule::Linear.factor(step + 1, args.steps / 20, args.steps + 1))?;
        running = if step == 0 { value } else { 0.98 * running + 0.02 * value };
        bar.inc(1);
        let rate = seen as f64 / start.elapsed().as_secs_f64();
        bar.set_message(format!("loss {running:.3}, epoch {epoch}, {rate:.0} tokens/s"));
        let done = step + 1;
        if done % args.save_every == 0 || done == args.steps {
            let held = data.evaluate(&model, &held_out)?;
            let minutes = start.elapsed().as_secs_f64() / 60.0;
            let line = format!("step {done}: held-out loss {held:.4}, training {running:.4}");
            common::watch::say(&bar, &format!("{line}, {seen} tokens in {minutes:.1} minutes"));
            save(&args.output, &tokenizer, &config, &params, &summary(done, seen, held, minutes))?;
        }
    }
    bar.finish();
    tell!("wrote {}", args.output.display());
    Ok(())
}

/// Appends the sequences of a file to `lines`.
fn read_lines(path: &Path, lines: &mut Vec<String>) -> Outcome {
    let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("txt");
    for (i, line) in text.lines().enumerate().skip(usize::from(extension == "tsv")) {
        let sequence = match extension {
            "tsv" => line.split('\t').next().unwrap_or_default().trim().to_string(),
            "jsonl" => {
                let row: Value = serde_json::from_str(line)
                    .map_err(|e| format!("{}, line {}: {e}", path.display(), i + 1))?;
                row["question"].as_str().unwrap_or_default().replace('\n', " ").trim().to_lowercase()
            }
            _ => line.trim().to_string(),
        };
        if !sequence.is_empty() {
            lines.push(sequence);
        }
    }
    Ok(())
}

/// Trains a byte-level BPE tokenizer with RoBERTa's special tokens and templates.
fn train_tokenizer(lines: &[String], vocab_size: usize) -> Outcome<Tokenizer> {
    let special: Vec<AddedToken> = SPECIAL.iter().map(|token| AddedToken::from(*token, true)).collect();
    let mut trainer = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(vocab_size)
        .min_frequency(2)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(special)
        .build();
    let sep = ("</s>".to_string(), 2);
    let mut tokenizer = TokenizerBuilder::<
        BPE,
        NormalizerWrapper,
        PreTokenizerWrapper,
        PostProcessorWrapper,
        DecoderWrapper,
    >::default()
    .with_model(BPE::default())
    .with_normalizer(None)
    .with_pre_tokenizer(Some(ByteLevel::new(true, true, true).into()))
    .with_post_processor(Some(RobertaProcessing::new(sep, ("<s>".to_string(), 0)).into()))
    .with_decoder(Some(ByteLevel::default().into()))
    .build()?;
    tokenizer.train(&mut trainer, lines.iter())?;
    // Read back from its file format, so that training and later use have the same tokenizer.
    Tokenizer::from_bytes(tokenizer.to_string(false)?.as_bytes())
}

fn encode(tokenizer: &Tokenizer, lines: &[String], max_length: usize) -> Outcome<Vec<Vec<u32>>> {
    let encodings = tokenizer.encode_batch_fast(lines.iter().map(String::as_str).collect(), true)?;
    let rows = encodings.into_iter().map(|encoding| {
        let mut ids = encoding.get_ids().to_vec();
        if ids.len() > max_length {
            ids.truncate(max_length - 1);
            ids.push(2);
        }
        ids
    });
    Ok(rows.filter(|ids| ids.len() > 4).collect())
}

/// Whether a row is held out; decided by its content, so that equal sequences are on the same side.
fn held_out(row: &[u32]) -> bool {
    let hash = row.iter().fold(17u64, |hash, id| (hash ^ u64::from(*id)).wrapping_mul(0x0000_0100_0000_01b3));
    (hash >> 20) % 50 == 0
}

fn model_config(args: &Args, vocab_size: usize) -> Outcome<RobertaConfig> {
    Ok(serde_json::from_value(json!({
        "model_type": "roberta", "vocab_size": vocab_size, "hidden_size": args.hidden,
        "num_hidden_layers": args.layers, "num_attention_heads": args.heads,
        "intermediate_size": args.intermediate, "max_position_embeddings": args.max_length + 2,
        "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": PAD,
        "hidden_dropout_prob": args.dropout, "attention_probs_dropout_prob": args.dropout,
    }))?)
}

/// The settings for making batches of sequences.
struct Data {
    masking: Masking,
    noise: Noise,
    batch_tokens: usize,
    device: Device,
}

impl Data {
    /// Plans the batches of an epoch, each of about `batch_tokens` tokens in rows of similar lengths,
    /// shuffled.
    fn plan(&self, rows: &[Vec<u32>], epoch: u64) -> Vec<Vec<usize>> {
        let stream = self.noise.stream("pretrain", Purpose::Shuffle);
        let mut order = stream.permutation(epoch << 1, rows.len());
        order.chunks_mut(50 * 64).for_each(|chunk| chunk.sort_by_key(|i| rows[*i].len()));
        let mut batches: Vec<Vec<usize>> = Vec::new();
        let (mut batch, mut longest) = (Vec::new(), 0);
        for i in order {
            longest = longest.max(rows[i].len());
            if !batch.is_empty() && longest * (batch.len() + 1) > self.batch_tokens {
                batches.push(std::mem::take(&mut batch));
                longest = rows[i].len();
            }
            batch.push(i);
        }
        batches.push(batch);
        let shuffled = stream.permutation(epoch << 1 | 1, batches.len());
        shuffled.into_iter().map(|i| std::mem::take(&mut batches[i])).collect()
    }

    fn batch(&self, rows: &[&[u32]], set: &str, draw: u64) -> Outcome<MaskedBatch> {
        let stream = self.noise.stream(set, Purpose::Mask);
        Ok(self.masking.batch(rows, PAD, &stream, draw, &self.device)?)
    }

    /// Computes the loss over all masked tokens of a set; the same tokens are masked every time.
    fn evaluate(&self, model: &RobertaForMaskedLM, rows: &[Vec<u32>]) -> Outcome<f64> {
        let (mut sum, mut count) = (0.0, 0.0);
        for (i, chunk) in rows.chunks(32).enumerate() {
            let rows: Vec<&[u32]> = chunk.iter().map(Vec::as_slice).collect();
            let batch = self.batch(&rows, "held-out", i as u64)?;
            let n = batch.labels.dim(0)? as f64;
            sum += n * f64::from(loss(model, &batch, &Pass::Mean.into())?.to_scalar::<f32>()?);
            count += n;
        }
        Ok(sum / count)
    }
}

fn loss(model: &RobertaForMaskedLM, batch: &MaskedBatch, cx: &Context) -> Outcome<Tensor> {
    let logits = model.forward(&batch.input_ids, None, &batch.attention_mask, &batch.positions, cx)?;
    Ok(ops::cross_entropy(&logits, &batch.labels, ops::IGNORED_LABEL, cx.path)?)
}

/// Writes `tokenizer.json`, `tokenizer_config.json`, `config.json`, `model.safetensors` in half precision,
/// and `pretraining.json`.
fn save(
    dir: &Path,
    tokenizer: &Tokenizer,
    config: &RobertaConfig,
    params: &Params,
    summary: &Value,
) -> Outcome {
    let mut json = serde_json::to_value(config)?;
    json["architectures"] = json!(["RobertaForMaskedLM"]);
    json["torch_dtype"] = json!("float16");
    for (i, name) in ["bos_token_id", "pad_token_id", "eos_token_id"].iter().enumerate() {
        json[*name] = json!(i);
    }
    let halves = params.all().into_iter().map(|(name, param)| {
        Ok((name, param.var.as_detached_tensor().to_device(&Device::Cpu)?.to_dtype(DType::F16)?))
    });
    let halves = halves.collect::<candle_core::Result<BTreeMap<String, Tensor>>>()?;
    // Written atomically: a run that is stopped here keeps the model of its last evaluation.
    let halves = halves.iter().map(|(name, tensor)| (name.clone(), tensor));
    files::write_safetensors(&dir.join("model.safetensors"), halves)?;
    files::write(&dir.join("tokenizer.json"), tokenizer.to_string(false)?.as_bytes())?;
    // Without this file, transformers uses RoBERTa's own tokenizer, which treats the first word differently.
    let tokenizer_config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.max_length(),
        "bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "pad_token": "<pad>",
        "unk_token": "<unk>", "mask_token": "<mask>", "model_input_names": ["input_ids", "attention_mask"],
    });
    files::write_json(&dir.join("tokenizer_config.json"), &tokenizer_config)?;
    files::write_json(&dir.join("config.json"), &json)?;
    files::write_json(&dir.join("pretraining.json"), summary)?;
    Ok(())
}
