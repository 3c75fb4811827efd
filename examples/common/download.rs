//! Downloads from the hub, with a progress bar for each file.

use std::path::{Path, PathBuf};

use monteclora::data::task::{Splits, Task};
use monteclora::models::hub::{self, ModelFiles};

use super::Outcome;

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
pub fn hub_splits(task: Task) -> Outcome<Splits> {
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
pub fn hub_splits(task: Task) -> Outcome<Splits> {
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
