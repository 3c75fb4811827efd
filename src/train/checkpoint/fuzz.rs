//! Bad checkpoints: see [`crate::fuzz`].
//!
//! A damaged file is found by its checksum. So most inputs here have a manifest that fits them, as
//! from somebody who means harm, or from a version with a defect.

use candle_core::{Device, Tensor};
use serde_json::{json, Value};

use super::state::{MANIFEST, STATE, TENSORS, VERSION};
use super::*;
use crate::adapter::{Init, Params, Role};
use crate::fuzz::json::Documents;
use crate::fuzz::tensors::{file, TensorFiles};
use crate::fuzz::{bytes, Folder, Input, Reader, Rng};
use crate::optim::{AdamW, AdamWConfig};
use crate::Noise;

const STEP: usize = 7;

fn numbers() -> Value {
    json!({"version": VERSION, "step": STEP, "draw": 21, "skipped": 1, "skipped_in_a_row": 0, "seconds": 1.5,
        "best": [0.25, 3], "moments": {"w": 7}, "settings": {"lr": "0.1"}})
}

fn tensors() -> Vec<u8> {
    let tensor = Tensor::new(&[[0.5f32, 1.0], [2.0, 3.0]], &Device::Cpu).unwrap();
    file(&["param/w", "first/w", "second/w", "best/w", "method/kept/w"].map(|name| (name, tensor.clone())))
}

fn manifest(state: &[u8], tensors: &[u8]) -> Value {
    let sum = |bytes: &[u8]| json!({"bytes": bytes.len(), "crc32": crc32fast::hash(bytes)});
    json!({STATE: sum(state), TENSORS: sum(tensors)})
}

#[test]
fn states_and_manifests() {
    let folder = Folder::new(&[STATE, TENSORS, MANIFEST]);
    let states = Documents::new(
        vec![numbers()],
        vec![json!([0.1, 7]), json!({"v": usize::MAX})],
        &["w", "v", "step", "lr"],
    );
    let weights =
        TensorFiles::new(vec![tensors()], &["w", "param/w", "first/w", "/", "method/", "param/v", "x/y"]);
    let sound = [numbers().to_string().into_bytes(), tensors()];
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
        let state = State::read(&dir, STEP)?;
        // What goes on from it refuses what does not fit, or holds finite numbers afterwards.
        let params = Params::new(Noise::new(1), &Device::Cpu);
        params.create("w", Role::Head, (2, 2), &Init::Constant(0.0))?;
        let mut optimizer = AdamW::new(&params, AdamWConfig::default())?;
        if params.restore(&state.params).is_ok() && optimizer.restore(&state.moments).is_ok() {
            params.check_finite()?;
        }
        Ok(())
    };
    let [state, weights] = sound.clone();
    read(&folder.put(Input { kind: 0, files: vec![state, weights, sums.to_string().into_bytes()] })).unwrap();
    let names = folder.outside().display().to_string();
    // The buffer that checksums are made with has 64 KiB.
    Reader { name: "checkpoint", cost: 10, fixed: 128 << 10, times: 32, names }.run(make, read);
}
