//! A fine-tuned sentence classifier behind HTTP: one model in memory, asked by several threads at once.
//!
//! ```sh
//! cargo run --release --example glue -- --method monteclora --output OUT
//! cargo run --release --manifest-path examples/serve/Cargo.toml -- --model examples/assets/tiny-roberta \
//!     --adapter OUT/adapter --labels negative,positive
//! curl -s localhost:3000/predict -H 'content-type: application/json' \
//!     -d '{"texts": ["a film to be seen twice"], "draws": 10}'
//! ```

#[path = "../../common/allocator.rs"]
mod allocator;
mod service;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use clap::Parser;
use serde::{Deserialize, Serialize};
use service::{Answer, Service};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

/// Serves a fine-tuned classifier: POST /predict with {"texts": [..], "draws": 0}, GET /health.
#[derive(Parser)]
#[command(version)]
pub struct Args {
    /// The model that was fine-tuned: a folder, or (feature hub) a hub repository.
    #[arg(long)]
    model: String,
    /// The folder of its adapter. Without one the model itself answers: merged, or fully fine-tuned.
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// The names of the classes, in the order that it was trained with.
    #[arg(long, value_delimiter = ',', required = true)]
    labels: Vec<String>,
    /// The most tokens of a text; the rest is cut off.
    #[arg(long, default_value_t = 128)]
    max_length: usize,
    /// The most posterior draws that a request may ask for.
    #[arg(long, default_value_t = 32)]
    max_draws: usize,
    /// Requests that are computed at the same time; others wait. Default: one a core.
    #[arg(long)]
    threads: Option<usize>,
    /// Where it listens.
    #[arg(long, default_value = "127.0.0.1:3000")]
    address: String,
}

#[derive(Deserialize)]
struct Request {
    texts: Vec<String>,
    /// Posterior draws to average over; the mean answers where there are none.
    #[serde(default)]
    draws: usize,
}

#[derive(Serialize)]
struct Response {
    predictions: Vec<Answer>,
}

type Failure = (StatusCode, String);

/// What every request shares.
struct Shared {
    service: Service,
    max_draws: usize,
    /// One permit a request that is computed.
    places: Semaphore,
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
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let shared = Arc::new(Shared {
        service: Service::load(&args)?,
        max_draws: args.max_draws,
        places: Semaphore::new(args.threads.unwrap_or(cores)),
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
    if request.draws > shared.max_draws {
        let reason = format!("draws: at most {}, got {}", shared.max_draws, request.draws);
        return Err((StatusCode::BAD_REQUEST, reason));
    }
    let internal = |error: String| (StatusCode::INTERNAL_SERVER_ERROR, error);
    let place = shared.places.acquire().await.map_err(|error| internal(error.to_string()))?;
    // Arithmetic blocks: it has threads of its own, and the server's go on listening.
    let worker = shared.clone();
    let answers = tokio::task::spawn_blocking(move || worker.service.answer(request.texts, request.draws));
    let answers = answers.await.map_err(|error| internal(error.to_string()))?;
    drop(place);
    let predictions = answers.map_err(|error| (StatusCode::BAD_REQUEST, error.to_string()))?;
    Ok(Json(Response { predictions }))
}
