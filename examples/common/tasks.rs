//! Command-line options of the benchmarks for language models.

use monteclora::data::instruct::Prompted;
use monteclora::eval::sandbox::{Limits, Sandbox};
use monteclora::eval::{Benchmark, CodeAnswer, Generator, Normalize};
use monteclora::train::distributed::Communicator;
use serde_json::{json, Value};

use super::given::Given;
use super::Outcome;

// How to measure the held-out rows besides their loss. Not a doc comment, which clap would take for the
// program's description.
#[derive(clap::Args, Clone)]
#[command(next_help_heading = "Evaluation")]
pub struct TaskOptions {
    /// The benchmark: choice (by likelihood), choice-by-name (by generation), gsm8k or humaneval.
    #[arg(long)]
    pub task: Option<String>,
    /// Measure only the first held-out rows, this many.
    #[arg(long)]
    pub limit_task: Option<usize>,
    #[command(flatten)]
    pub benchmark: BenchmarkOptions,
}

// How to run the benchmarks.
#[derive(clap::Args, Clone)]
#[command(next_help_heading = "Evaluation")]
pub struct BenchmarkOptions {
    /// What to divide a choice's likelihood by: nothing, tokens, characters (`acc_norm` of the LM evaluation
    /// harness) or bytes.
    #[arg(long, default_value = "nothing")]
    pub normalize: String,
    /// The values of k for pass@k.
    #[arg(long, value_delimiter = ',', default_value = "1")]
    pub pass_at: Vec<usize>,
    /// Completions per program; at least the largest k.
    #[arg(long)]
    pub samples: Option<usize>,
    /// Run the programs that the model writes, in separate processes with limits, or not at all if limits
    /// cannot be set.
    #[arg(long)]
    pub run_generated_programs: bool,
    /// Extract the program from a text that has it in a Markdown fence or repeats the function's header, as
    /// instruction-tuned models do. Default: the text continues the prompt, as in the LM evaluation harness.
    #[arg(long)]
    pub extract_code: bool,
    /// The interpreter for these programs.
    #[arg(long, default_value = "python3")]
    pub python: String,
}

impl TaskOptions {
    /// Warns about given options that the task does not read.
    pub fn tell_unread(&self, given: &Given) {
        let task = self.task.as_deref();
        if task.is_none() {
            given.without_effect(&["limit_task"], "there is no --task");
        }
        BenchmarkOptions::tell_unread(given, &[task.unwrap_or_default()]);
    }

    /// The benchmark, if one is requested.
    pub fn benchmark(&self) -> Outcome<Option<Benchmark>> {
        self.task.as_deref().map(|task| self.benchmark.named(task)).transpose()
    }

    /// The default maximum number of generated tokens: as in the LM evaluation harness for GSM8K, more for
    /// programs.
    pub fn max_new_tokens(&self) -> usize {
        if self.task.as_deref() == Some("humaneval") {
            512
        } else {
            256
        }
    }

    /// Checks that the rows have what the task needs.
    pub fn check(&self, generator: &Generator, rows: &[Prompted]) -> Outcome {
        let Some(benchmark) = self.benchmark()? else { return Ok(()) };
        Ok(benchmark.check(generator, self.limited(rows))?)
    }

    fn limited<'a>(&self, rows: &'a [Prompted]) -> &'a [Prompted] {
        &rows[..self.limit_task.unwrap_or(usize::MAX).min(rows.len())]
    }

    /// Measures the task on the rows, for `metrics.json`; null without a task. The processes share the rows.
    pub fn measure(
        &self,
        generator: &Generator,
        rows: &[Prompted],
        communicator: &dyn Communicator,
    ) -> Outcome<Value> {
        let Some(benchmark) = self.benchmark()? else { return Ok(Value::Null) };
        Ok(json!(benchmark.run_in_turns(generator, self.limited(rows), communicator)?))
    }
}

impl BenchmarkOptions {
    /// Warns about given options that none of these tasks reads.
    pub fn tell_unread(given: &Given, tasks: &[&str]) {
        if !tasks.contains(&"choice") {
            given.without_effect(&["normalize"], "it only applies to the task choice");
        }
        if !tasks.contains(&"humaneval") {
            let own = ["pass_at", "samples", "run_generated_programs", "python", "extract_code"];
            given.without_effect(&own, "it only applies to the task humaneval");
        }
    }

    /// Creates the benchmark with this name.
    pub fn named(&self, task: &str) -> Outcome<Benchmark> {
        Ok(match task {
            "choice" => Benchmark::Choice(match self.normalize.as_str() {
                "nothing" => Normalize::No,
                "tokens" => Normalize::Tokens,
                "characters" => Normalize::Characters,
                "bytes" => Normalize::Bytes,
                other => {
                    let expected = "expected nothing, tokens, characters or bytes";
                    return Err(format!("--normalize: {expected}, got {other}").into());
                }
            }),
            "choice-by-name" => Benchmark::ChoiceByName,
            "gsm8k" => Benchmark::Gsm8k,
            "humaneval" if self.run_generated_programs => Benchmark::Code {
                samples: self.samples.or(self.pass_at.iter().max().copied()).unwrap_or(1),
                ks: self.pass_at.clone(),
                answer: if self.extract_code { CodeAnswer::Extracted } else { CodeAnswer::Continuation },
                sandbox: Sandbox::new(&self.python, Limits::default())?,
            },
            "humaneval" => {
                return Err(
                    "humaneval runs programs that the model wrote: allow it by --run-generated-programs"
                        .into(),
                )
            }
            other => {
                let expected = "expected choice, choice-by-name, gsm8k or humaneval";
                return Err(format!("--task: {expected}, got {other}").into());
            }
        })
    }
}
