//! Downloads from the hub, with a progress bar for each file.

use std::path::{Path, PathBuf};

use monteclora::data::task::{Splits, Task};
use monteclora::models::hub::{self, ModelFiles};
use monteclora::models::Quantization;

use super::{asset, Outcome};

/// The files of a model, from a folder or a revision of a hub repository.
pub fn model_files(model: &str, revision: Option<&str>) -> Outcome<ModelFiles> {
    #[cfg(feature = "hub")]
    {
        Ok(ModelFiles::locate_with(model, revision, &with_bars())?)
    }
    #[cfg(not(feature = "hub"))]
    {
        Ok(ModelFiles::locate(model, revision)?)
    }
}

/// The base that a prediction is given, quantised as it was for the training.
pub fn given_base(
    model: Option<&str>,
    revision: Option<&str>,
    quantize: Option<Quantization>,
) -> Outcome<Option<ModelFiles>> {
    match (model, quantize) {
        (Some(model), _) => Ok(Some(model_files(model, revision)?.quantized(quantize))),
        (None, Some(_)) => Err("--quantize: give the --model that it quantises".into()),
        (None, None) => Ok(None),
    }
}

/// The rows of a task: from the folder `data`, of the bundled model from the bundled excerpt if there is one, else
/// from the hub.
pub fn task_rows(task: Task, data: Option<&Path>, is_bundled: bool) -> Outcome<Splits> {
    match data {
        Some(dir) => Ok(task.load_folder(dir)?),
        None if is_bundled && task == Task::Sst2 => Ok(task.load_folder(Path::new(&asset("sst2")?))?),
        None => hub_splits(task),
    }
}

/// The folder of an adapter: a local one, or that of a hub repository.
pub fn adapter(id_or_dir: &Path) -> Outcome<PathBuf> {
    let id_or_dir = id_or_dir.to_string_lossy();
    #[cfg(feature = "hub")]
    {
        Ok(hub::locate_adapter_with(&id_or_dir, None, &with_bars())?)
    }
    #[cfg(not(feature = "hub"))]
    {
        Ok(hub::locate_adapter(&id_or_dir, None)?)
    }
}

/// Downloads a task's rows from the hub.
#[cfg(all(feature = "hub", feature = "parquet"))]
fn hub_splits(task: Task) -> Outcome<Splits> {
    use monteclora::data::parquet::load_parquet;
    use monteclora::models::hub::{repo_file_with, RepoKind};

    let hub = with_bars();
    let mut files = Vec::new();
    for (split, path) in task.hub_files() {
        let file = repo_file_with(task.hub_repo(), RepoKind::Dataset, &path, None, &hub)?;
        files.push((split.to_string(), file));
    }
    Ok(load_parquet(task, &files)?)
}

/// Without the features `hub` and `parquet`, data must come from a folder.
#[cfg(not(all(feature = "hub", feature = "parquet")))]
fn hub_splits(task: Task) -> Outcome<Splits> {
    Err(format!("{}: give --data DIR, or build with the features hub and parquet", task.name()).into())
}

/// The hub configuration from the environment, with progress bars.
#[cfg(feature = "hub")]
fn with_bars() -> monteclora::models::hub::HubConfig {
    use std::sync::{Mutex, PoisonError};

    use indicatif::{ProgressBar, ProgressStyle};

    let template = "{prefix} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}";
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let shown: Mutex<Option<(String, ProgressBar)>> = Mutex::new(None);
    monteclora::models::hub::HubConfig::from_env().on_progress(move |at| {
        let mut shown = shown.lock().unwrap_or_else(PoisonError::into_inner);
        if shown.as_ref().is_none_or(|(file, _)| *file != at.file) {
            let bar = ProgressBar::no_length().with_style(style.clone()).with_prefix(at.file.clone());
            *shown = Some((at.file.clone(), bar));
        }
        if let Some((_, bar)) = &*shown {
            if let Some(total) = at.total {
                bar.set_length(total);
            }
            bar.set_position(at.bytes);
            if at.total == Some(at.bytes) {
                bar.finish_and_clear();
            }
        }
    })
}
