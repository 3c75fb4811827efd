//! Builds the example programs, and data for them.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use super::{asset, Outcome};

/// Held while an example is built and copied: a build with other features overwrites the file.
static BUILDING: Mutex<()> = Mutex::new(());

/// Builds the example `glue` with the profile and features of this test.
pub fn glue() -> Outcome<PathBuf> {
    example("glue")
}

/// Builds an example with the profile and features of this test.
pub fn example(name: &str) -> Outcome<PathBuf> {
    let _building = BUILDING.lock().unwrap_or_else(PoisonError::into_inner);
    let built = build(&[name], &[])?.pop().ok_or("no example")?;
    // Copied to another name, since a build with other features goes to the same place.
    let (place, partial) = (format!("{name}-of-tests"), format!("{name}-of-tests-new"));
    let (place, partial) = (built.with_file_name(place), built.with_file_name(partial));
    std::fs::copy(built, &partial)?;
    std::fs::rename(partial, &place)?;
    Ok(place)
}

/// Builds examples with an additional feature and copies them into the folder `dir`.
pub fn examples_with(feature: &str, names: &[&str], dir: &Path) -> Outcome<Vec<PathBuf>> {
    let _building = BUILDING.lock().unwrap_or_else(PoisonError::into_inner);
    let copy = |(path, name): (PathBuf, &&str)| {
        let place = dir.join(name);
        std::fs::copy(path, &place)?;
        Ok(place)
    };
    build(names, &[feature])?.into_iter().zip(names).map(copy).collect()
}

fn build(names: &[&str], more_features: &[&str]) -> Outcome<Vec<PathBuf>> {
    let deps = std::env::current_exe()?;
    let profile = deps.parent().and_then(Path::parent).ok_or("a test below target/PROFILE/deps")?;
    let target = profile.parent().ok_or("a profile below target")?;
    // The only profile whose folder has another name.
    let name = match profile.file_name().and_then(OsStr::to_str).ok_or("a profile has a name")? {
        "debug" => "dev",
        name => name,
    };
    let mut build = Command::new(env!("CARGO"));
    build.args(["build", "--quiet", "--target-dir"]).arg(target).args(["--profile", name]);
    build.args(names.iter().flat_map(|name| ["--example", name]));
    if !cfg!(feature = "hub") {
        build.arg("--no-default-features");
    }
    let own = ["plot"].into_iter().filter(|_| cfg!(feature = "plot"));
    build.args(own.chain(more_features.iter().copied()).flat_map(|feature| ["--features", feature]));
    if build.current_dir(env!("CARGO_MANIFEST_DIR")).status()?.success() {
        Ok(names.iter().map(|name| profile.join("examples").join(name)).collect())
    } else {
        Err("the example cannot be built".into())
    }
}

/// Writes the first rows of the bundled SST-2 into a folder: so many to train on, so many held out.
pub fn sst2(dir: &Path, train: usize, dev: usize) -> Outcome {
    for (file, rows) in [("train.tsv", train), ("dev.tsv", dev)] {
        let text = std::fs::read_to_string(asset("sst2").join(file))?;
        let head: String = text.split_inclusive('\n').take(rows + 1).collect();
        std::fs::write(dir.join(file), head)?;
    }
    Ok(())
}
