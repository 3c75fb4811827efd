//! Fuzzes checkpoints by resuming a run from them.
//!
//! Checksums detect damaged files, so most inputs here have a manifest that matches them, as a malicious or a
//! defective writer would produce.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use monteclora::train::{
    fit_with_checkpoints, Checkpoints, Loss, Objective, Observer, StepRecord, TrainConfig,
};
use monteclora::{Context, Error, Init, Noise, Params, Result, Role};
use serde_json::{json, Value};

use super::json::Documents;
use super::mutate::{bytes, Rng};
use super::reader::{Folder, Input, Reader};
use super::tensors::TensorFiles;

const STATE: &str = "state.json";
const TENSORS: &str = "tensors.safetensors";
/// The files of the checkpoint that a run of `STEPS` steps writes at its end.
const FILES: [&str; 3] =
    ["step-00000007/state.json", "step-00000007/tensors.safetensors", "step-00000007/manifest.json"];
const STEPS: usize = 7;

/// A run whose loss is the sum of squares of its only parameter.
struct Square {
    params: Params,
    w: Tensor,
}

impl Square {
    fn new() -> Result<Self> {
        let params = Params::new(Noise::new(1), &Device::Cpu);
        let w = params.create("w", Role::Head, (2, 2), &Init::Constant(0.5))?;
        Ok(Self { params, w })
    }

    /// Trains, resuming from a checkpoint in `dir` if there is one.
    fn run(&self, dir: &Path) -> Result<()> {
        let config = TrainConfig { epochs: STEPS, ..TrainConfig::default() };
        let checkpoints = Checkpoints { resume: true, ..Checkpoints::new(dir) };
        fit_with_checkpoints(self, &self.params, &config, &mut Third, &checkpoints).map(drop)
    }
}

impl Objective for Square {
    fn epoch(&self, _: u64) -> Result<Vec<Vec<usize>>> {
        Ok(vec![vec![0]])
    }

    fn loss(&self, _: &[usize], _: &Context) -> Result<Loss> {
        let total = self.w.sqr()?.sum_all()?;
        Ok(Loss { total: total.clone(), terms: vec![("task", total)] })
    }

    fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        Ok([("kept/w".to_string(), self.w.copy()?)].into())
    }
}

/// An observer that scores the third step best.
struct Third;

impl Observer for Third {
    fn step(&mut self, _: &StepRecord) -> Result<()> {
        Ok(())
    }

    fn evaluate(&mut self, step: usize) -> Result<Option<f64>> {
        Ok(Some(if step == 3 { 0.25 } else { 0.0 }))
    }
}

/// Returns the state and the tensors that a run writes at its end.
fn written() -> (Value, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    Square::new().unwrap().run(dir.path()).unwrap();
    let read = |name| std::fs::read(dir.path().join(name)).unwrap();
    let mut state: Value = serde_json::from_slice(&read(FILES[0])).unwrap();
    // The only number that differs between runs.
    state["seconds"] = json!(1.5);
    (state, read(FILES[1]))
}

fn manifest(state: &[u8], tensors: &[u8]) -> Value {
    let sum = |bytes: &[u8]| json!({"bytes": bytes.len(), "crc32": crc32fast::hash(bytes)});
    json!({STATE: sum(state), TENSORS: sum(tensors)})
}

#[test]
fn states_and_manifests() {
    let folder = Folder::new(&FILES);
    let (state, tensors) = written();
    let states = Documents::new(
        vec![state.clone()],
        vec![json!([0.1, 7]), json!({"v": usize::MAX})],
        &["w", "v", "step", "lr"],
    );
    let weights = TensorFiles::new(
        vec![tensors.clone()],
        &["w", "param/w", "first/w", "/", "method/", "param/v", "x/y"],
    );
    let sound = [state.to_string().into_bytes(), tensors];
    let sums = manifest(&sound[0], &sound[1]);
    let manifests = Documents::new(
        vec![sums.clone()],
        vec![json!("../state.json")],
        &["../state.json", "bytes", "crc32"],
    );
    let make = |rng: &mut Rng| {
        let [mut state, mut tensors] = sound.clone();
        match rng.below(8) {
            0..3 => state = states.text(rng),
            3..6 => tensors = weights.bytes(rng),
            6 => (state, tensors) = (states.text(rng), weights.bytes(rng)),
            _ => {}
        }
        let fitting = manifest(&state, &tensors);
        let manifest = match rng.below(8) {
            0 => manifests.text(rng),
            1 => bytes(
                rng,
                &[fitting.to_string().into_bytes()],
                &["0", "9", "\"", "}", "18446744073709551616"],
            ),
            _ => fitting.to_string().into_bytes(),
        };
        folder.put(Input { kind: 0, files: vec![state, tensors, manifest] })
    };
    let dir = folder.path();
    let read = |_: &Input| {
        let run = Square::new()?;
        match run.run(&dir) {
            // A resumed run holds finite parameters.
            Ok(()) => run.params.check_finite().unwrap(),
            // The error of a valid checkpoint that does not fit the run names the parameter, not the file.
            Err(Error::Tensor { .. }) => {}
            Err(other) => return Err(other),
        }
        Ok(())
    };
    let [state, weights] = sound.clone();
    let first = folder.put(Input { kind: 0, files: vec![state, weights, sums.to_string().into_bytes()] });
    read(&first).unwrap();
    let names = folder.outside().display().to_string();
    // Checksums are computed with a buffer of 64 KiB.
    Reader { name: "checkpoint", cost: 10, fixed: 128 << 10, times: 32, names }.run(make, read);
}
