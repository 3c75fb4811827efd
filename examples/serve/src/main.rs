//! A fine-tuned classifier behind HTTP: one model in memory, asked by several threads at once.
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
use monteclora::data::task::Example;
use monteclora::metrics::entropy;
use monteclora::models::hub::ModelFiles;
use monteclora::predict::Prediction;
use monteclora::train::Classifier;
use monteclora::Pass;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

/// Serves a fine-tuned classifier: POST /predict with {"texts": ["a text", ["a", "pair"]], "draws": 0}, GET /health.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// The folder of a run, of an adapter, or of a model with a trained head.
    folder: PathBuf,
    /// The model that the adapter stands on. Default: the one that it names.
    #[arg(long)]
    model: Option<String>,
    /// The most tokens of a text, the rest is cut off. Default: the model's.
    #[arg(long)]
    max_length: Option<usize>,
    /// The most texts, and the most posterior draws, that a request may ask for.
    #[arg(long, default_value_t = 64)]
    limit: usize,
    /// Requests that are computed at the same time; others wait. Default: one a core.
    #[arg(long)]
    threads: Option<usize>,
    /// Where it listens.
    #[arg(long, default_value = "127.0.0.1:3000")]
    address: String,
}

#[derive(Deserialize)]
struct Request {
    texts: Vec<Text>,
    /// Posterior draws to average over; the mean answers where there are none.
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

/// What is said of one text.
#[derive(Serialize)]
struct Answer {
    /// The most probable class; none of a regression.
    label: Option<String>,
    /// The probability of each class; of a regression its score.
    values: BTreeMap<String, f64>,
    /// How unsure it is, in nats.
    entropy: Option<f64>,
    /// What of it is the posterior's, in nats: how much the draws disagree.
    mutual_information: Option<f64>,
}

type Failure = (StatusCode, String);

/// What every request shares.
struct Shared {
    classifier: Classifier,
    limit: usize,
    /// One permit a request that is computed.
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
    let base = args.model.map(|model| ModelFiles::locate(&model, None)).transpose()?;
    let mut classifier = Classifier::open(&args.folder, base.as_ref(), DType::F32, &Device::Cpu)?;
    if let Some(max_length) = args.max_length {
        classifier.set_max_length(max_length)?;
    }
    let shared = Arc::new(Shared {
        classifier,
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
    // Arithmetic blocks: it has threads of its own, and the server's goes on listening. The place is kept until it ends,
    // though the client may have hung up before.
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
    /// One answer a text, by the mean or, where draws are asked for, by their average.
    fn answer(&self, request: &Request) -> monteclora::Result<Vec<Answer>> {
        let texts: Vec<Example> = request.texts.iter().map(Text::example).collect();
        let predictions = match request.draws {
            0 => self.classifier.predict(&texts, &Pass::Mean)?,
            draws => self.classifier.predict_averaged(&texts, draws)?,
        };
        Ok(predictions.into_iter().map(|prediction| self.said(prediction)).collect())
    }

    fn said(&self, prediction: Prediction) -> Answer {
        let Prediction { label, values, uncertainty } = prediction;
        let names = self.classifier.labels.names().iter().cloned();
        Answer {
            entropy: label.as_ref().map(|_| entropy(&values)),
            label,
            values: names.zip(values).collect(),
            mutual_information: uncertainty.map(|uncertainty| uncertainty.epistemic),
        }
    }
}
