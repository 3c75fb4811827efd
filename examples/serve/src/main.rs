//! A fine-tuned classifier behind HTTP: one model in memory, used by several threads at once.
//!
//! ```sh
//! cargo run --release --example glue -- --method monteclora --output OUT
//! cargo run --release --manifest-path examples/serve/Cargo.toml -- OUT
//! curl -s localhost:3000/predict -H 'content-type: application/json' \
//!     -d '{"texts": ["a film to be seen twice"], "draws": 10}'
//! ```

#[path = "../../common/allocator.rs"]
mod allocator;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use candle_core::{DType, Device};
use clap::Parser;
use monteclora::bayes::TrainedClassifier;
use monteclora::data::task::Example;
use monteclora::metrics::entropy;
use monteclora::models::hub::ModelFiles;
use monteclora::models::Quantization;
use monteclora::predict::Prediction;
use monteclora::train::RunFolder;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

/// Serves a fine-tuned classifier: POST /predict with {"texts": ["a text", ["a", "pair"]], "draws": 0}, GET /health.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// The folder of a run, of an adapter, or of a model with a trained head.
    folder: PathBuf,
    /// The base model of the adapter. Default: the one that the adapter names.
    #[arg(long)]
    model: Option<String>,
    /// The maximum number of tokens in a text; longer texts are cut. Default: that of the run, or else the model's.
    #[arg(long)]
    max_length: Option<usize>,
    /// Quantise the base --model as for the training of the adapter: q8_0, q4k, ..
    #[arg(long)]
    quantize: Option<Quantization>,
    /// Answer without draws in the linearised model, with the posterior of a run with this option.
    #[arg(long)]
    linearised: bool,
    /// The maximum number of texts, and of posterior draws, in a request.
    #[arg(long, default_value_t = 64)]
    limit: usize,
    /// Requests that are computed at the same time; others wait. Default: one per core.
    #[arg(long)]
    threads: Option<usize>,
    /// The address to listen on.
    #[arg(long, default_value = "127.0.0.1:3000")]
    address: String,
}

#[derive(Deserialize)]
struct Request {
    texts: Vec<Text>,
    /// The number of posterior draws to average; 0 uses the mean, or the linearised model.
    #[serde(default)]
    draws: usize,
}

/// `"a text"`, or `["one", "other"]`.
#[derive(Deserialize)]
#[serde(untagged)]
enum Text {
    Single(String),
    Pair(String, String),
}

impl Text {
    fn example(&self) -> Example {
        match self {
            Self::Single(text) => text.as_str().into(),
            Self::Pair(one, other) => (one.as_str(), other.as_str()).into(),
        }
    }
}

#[derive(Serialize)]
struct Response {
    predictions: Vec<Answer>,
}

/// The prediction for one text.
#[derive(Serialize)]
struct Answer {
    /// The most probable class; `None` for a regression.
    label: Option<String>,
    /// The probability of each class; for a regression, its score.
    values: BTreeMap<String, f64>,
    /// The entropy of the prediction, in nats.
    entropy: Option<f64>,
    /// The part of the entropy that is due to the posterior, in nats: how much the draws disagree.
    mutual_information: Option<f64>,
}

type Failure = (StatusCode, String);

/// How the run read its rows.
#[derive(Deserialize)]
struct Input {
    max_length: usize,
}

/// The state that all requests share.
struct Shared {
    model: TrainedClassifier,
    limit: usize,
    /// One permit for each request that is being computed.
    places: Arc<Semaphore>,
}

fn main() -> ExitCode {
    allocator::tune_allocator();
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> Result<(), Box<dyn std::error::Error>> {
    if args.threads == Some(0) {
        return Err("--threads: expected at least 1, got 0".into());
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    if args.quantize.is_some() && args.model.is_none() {
        return Err("--quantize: give the --model that it quantises".into());
    }
    let base = args.model.map(|model| ModelFiles::locate(&model, None)).transpose()?;
    let base = base.map(|files| files.quantized(args.quantize));
    let (base, linearised) = (base.as_ref(), args.linearised);
    let mut model = TrainedClassifier::open(&args.folder, base, linearised, DType::F32, &Device::Cpu)?;
    let of_run = RunFolder::find_input::<Input>(&args.folder)?.map(|(_, input)| input.max_length);
    let of_run = of_run.map(|length| length.min(model.classifier().config().longest()));
    if let Some(max_length) = args.max_length.or(of_run) {
        model.classifier_mut().set_max_length(max_length)?;
    }
    let shared = Arc::new(Shared {
        model,
        limit: args.limit,
        places: Arc::new(Semaphore::new(args.threads.unwrap_or(cores))),
    });
    let routes = Router::new()
        .route("/predict", post(predict))
        .route("/health", get(|| async { "ok" }))
        .with_state(shared);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind(&args.address).await?;
        println!("http://{}", listener.local_addr()?);
        let stop = async { tokio::signal::ctrl_c().await.unwrap_or(()) };
        axum::serve(listener, routes).with_graceful_shutdown(stop).await
    })?;
    Ok(())
}

async fn predict(
    State(shared): State<Arc<Shared>>,
    Json(request): Json<Request>,
) -> Result<Json<Response>, Failure> {
    if request.draws > shared.limit || request.texts.len() > shared.limit {
        let reason = format!("expected at most {} texts and draws", shared.limit);
        return Err((StatusCode::BAD_REQUEST, reason));
    }
    let internal = |error: String| (StatusCode::INTERNAL_SERVER_ERROR, error);
    let place = shared.places.clone().acquire_owned().await;
    let place = place.map_err(|error| internal(error.to_string()))?;
    // Computing blocks, so it runs on its own thread while the server keeps listening. The permit is held
    // until the computation ends, even if the client disconnects before.
    let worker = shared.clone();
    let answers = tokio::task::spawn_blocking(move || {
        let _place = place;
        worker.answer(&request)
    });
    let answers = answers.await.map_err(|error| internal(error.to_string()))?;
    let predictions = answers.map_err(|error| (StatusCode::BAD_REQUEST, error.to_string()))?;
    Ok(Json(Response { predictions }))
}

impl Shared {
    fn answer(&self, request: &Request) -> monteclora::Result<Vec<Answer>> {
        let texts: Vec<Example> = request.texts.iter().map(Text::example).collect();
        let predictions = self.model.predict(&texts, request.draws)?;
        Ok(predictions.into_iter().map(|prediction| self.said(prediction)).collect())
    }

    fn said(&self, prediction: Prediction) -> Answer {
        let Prediction { label, values, uncertainty } = prediction;
        let names = self.model.classifier().labels.names().iter().cloned();
        Answer {
            entropy: label.as_ref().map(|_| entropy(&values)),
            label,
            values: names.zip(values).collect(),
            mutual_information: uncertainty.map(|uncertainty| uncertainty.epistemic),
        }
    }
}
