//! Fuzzes the readers of model weights and of the index of sharded weights.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use monteclora::models::hub::ModelFiles;
use monteclora::Result;
use safetensors::SafeTensors;
use serde_json::{json, Value};

use super::json::Documents;
use super::mutate::Rng;
use super::reader::{Folder, Input, Reader};
use super::tensors::{file, TensorFiles};

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

fn weights(names: [&str; 2]) -> Vec<u8> {
    let tensor = |value: f32| Tensor::new(&[[value, 1.0, 2.0], [3.0, value, 4.0]], &Device::Cpu).unwrap();
    let half = tensor(0.25).to_dtype(DType::BF16).unwrap();
    file(&[(names[0], tensor(0.5)), (names[1], half)])
}

/// Finds the model in the folder and reads all of its tensors.
fn load(dir: &Path) -> Result<()> {
    let files = ModelFiles::locate(dir.to_str().unwrap(), None)?;
    for path in files.weights() {
        let real = std::fs::canonicalize(path).unwrap();
        assert!(real.starts_with(std::fs::canonicalize(dir).unwrap()), "{} is outside", real.display());
    }
    let vb = files.var_builder(DType::F32, &Device::Cpu)?;
    for path in files.weights() {
        let bytes = std::fs::read(path).unwrap();
        let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
        for name in metadata.tensors().keys() {
            let tensor = vb.get_unchecked(name)?;
            assert!(tensor.elem_count() < 1 << 20);
        }
    }
    Ok(())
}

#[test]
fn single_files_of_weights() {
    let folder = Folder::new(&[CONFIG, WEIGHTS]);
    let sound = weights(["a", "b.c"]);
    let files = TensorFiles::new(vec![sound.clone()], &["a", "__metadata__", ""]);
    let of = |weights: Vec<u8>| Input { kind: 0, files: vec![b"{}".to_vec(), weights] };
    let make = |rng: &mut Rng| folder.put(of(files.bytes(rng)));
    let dir = folder.path();
    let read = |_: &Input| load(&dir);
    read(&folder.put(of(sound))).unwrap();
    let names = folder.outside().display().to_string();
    Reader { name: "weights", cost: 10, fixed: 64 << 10, times: 32, names }.run(make, read);
}

#[test]
fn indices_of_shards() {
    let folder = Folder::new(&[CONFIG, INDEX, "w-1.safetensors", "w-2.safetensors"]);
    // A file outside the folder, which a reader that follows `..` would find.
    let bait = folder.outside().join("bait.safetensors");
    std::fs::write(&bait, weights(["a", "b"])).unwrap();
    let index = json!({"metadata": {"total_size": 24},
        "weight_map": {"a": "w-1.safetensors", "b": "w-1.safetensors", "c": "w-2.safetensors"}});
    let mut values: Vec<Value> = [
        "../bait.safetensors",
        "./../bait.safetensors",
        "x/../../bait.safetensors",
        "..\\bait.safetensors",
        "w-2.safetensors",
        "./w-1.safetensors",
        "inside/../w-1.safetensors",
        "w-1.safetensors/",
        "w-1.safetensors\u{0}",
        ".safetensors",
        "file:///etc/passwd.safetensors",
        "~/w.safetensors",
        "C:w.safetensors",
        "",
        "config.json",
    ]
    .map(Value::from)
    .to_vec();
    values.push(json!(bait.display().to_string()));
    let indices = Documents::new(vec![index.clone()], values, &["a", "b", "c", "weight_map", "d"]);
    let shards = [weights(["a", "b"]), weights(["c", "d"])];
    let spoilt = TensorFiles::new(shards.to_vec(), &["a", "c"]);
    let of = |index: Vec<u8>| Input {
        kind: 0,
        files: vec![b"{}".to_vec(), index, shards[0].clone(), shards[1].clone()],
    };
    let make = |rng: &mut Rng| {
        let mut input = of(indices.text(rng));
        if rng.once_in(4) {
            input.files[2 + rng.below(2)] = spoilt.bytes(rng);
        }
        folder.put(input)
    };
    let dir = folder.path();
    let read = |_: &Input| load(&dir);
    read(&folder.put(of(index.to_string().into_bytes()))).unwrap();
    let names = folder.outside().display().to_string();
    Reader { name: "index", cost: 10, fixed: 64 << 10, times: 32, names }.run(make, read);
}

#[test]
fn matrices_in_four_bits() {
    let folder = Folder::new(&[CONFIG, WEIGHTS]);
    let bytes = |of: &[u8], count: usize| {
        let bytes: Vec<u8> = of.iter().cycle().take(count).copied().collect();
        Tensor::from_vec(bytes, count, &Device::Cpu).unwrap()
    };
    let floats = |count: usize| Tensor::arange(0f32, count as f32, &Device::Cpu).unwrap();
    let seed = |doubled: bool| {
        let mut state = json!({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [2, 128]});
        if doubled {
            state["nested_blocksize"] = json!(2);
            state["nested_offset"] = json!(0.5);
        }
        let state = state.to_string().into_bytes();
        let scales = if doubled { bytes(&[1, 2, 3, 255], 4) } else { floats(4) };
        let mut tensors = vec![
            ("a.weight", bytes(&[0x1f, 0xa7], 128)),
            ("a.weight.absmax", scales),
            ("a.weight.quant_map", floats(16)),
            ("a.weight.quant_state.bitsandbytes__nf4", bytes(&state, state.len())),
        ];
        if doubled {
            tensors.push(("a.weight.nested_absmax", floats(2)));
            tensors.push(("a.weight.nested_quant_map", floats(256)));
        }
        file(&tensors)
    };
    let files = TensorFiles::new(
        vec![seed(false), seed(true)],
        &["a.weight", "nf4", "blocksize", "64", "shape", "nested_"],
    );
    let of = |weights: Vec<u8>| Input { kind: 0, files: vec![b"{}".to_vec(), weights] };
    let make = |rng: &mut Rng| folder.put(of(files.bytes(rng)));
    let dir = folder.path();
    let read = |_: &Input| {
        let files = ModelFiles::locate(dir.to_str().unwrap(), None)?;
        let layer = files.open_weights(DType::F32, &Device::Cpu)?.pp("a").linear(128, 2, 0.0, false)?;
        assert_eq!(layer.dequantize()?.weight().dims(), [2, 128]);
        Ok(())
    };
    for doubled in [false, true] {
        read(&folder.put(of(seed(doubled)))).unwrap();
    }
    let names = folder.outside().display().to_string();
    Reader { name: "nf4", cost: 10, fixed: 64 << 10, times: 32, names }.run(make, read);
}
