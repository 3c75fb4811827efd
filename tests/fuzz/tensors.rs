//! Mutates safetensors files, mostly where the header and the data must agree.

use candle_core::Tensor;
use serde_json::{json, Value};

use super::json::Documents;
use super::mutate::{bytes, Rng};

/// Valid files, also split into header and data.
pub struct TensorFiles {
    headers: Documents,
    seeds: Vec<(Value, Vec<u8>)>,
    files: Vec<Vec<u8>>,
}

/// Serialises these tensors as a file.
pub fn file(named: &[(&str, Tensor)]) -> Vec<u8> {
    safetensors::serialize(named.iter().map(|(name, tensor)| (*name, tensor)), None).unwrap()
}

impl TensorFiles {
    /// `names` are tensor names that are significant to the reader.
    pub fn new(files: Vec<Vec<u8>>, names: &[&str]) -> Self {
        let seeds: Vec<(Value, Vec<u8>)> = files
            .iter()
            .map(|file| {
                let (length, rest) = file.split_at(8);
                let length = u64::from_le_bytes(length.try_into().unwrap()) as usize;
                (serde_json::from_slice(&rest[..length]).unwrap(), rest[length..].to_vec())
            })
            .collect();
        let mut values: Vec<Value> = [
            "F64", "F32", "F16", "BF16", "I64", "I32", "U32", "U8", "I8", "BOOL", "F8_E4M3", "F8_E8M0", "F4",
            "C64", "I16", "f32",
        ]
        .into_iter()
        .map(Value::from)
        .collect();
        values.extend([
            json!([0]),
            json!([2, 0]),
            json!([1u64 << 32, 1u64 << 32]),
            json!([0, 1u64 << 63, 4]),
            json!([1u64 << 63, 0]),
            json!([0, u64::MAX]),
            json!([u64::MAX, 0]),
            json!([0, 0]),
            json!([8, 4]),
            json!([1u64 << 62, 4]),
            json!({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}),
            json!({"dtype": "F32", "shape": [1u64 << 40, 0, 1u64 << 40], "data_offsets": [0, 0]}),
        ]);
        let headers = seeds.iter().map(|(header, _)| header.clone()).collect();
        Self { headers: Documents::new(headers, values, names), seeds, files }
    }

    /// One of the files, mutated.
    pub fn bytes(&self, rng: &mut Rng) -> Vec<u8> {
        let (header, data) = &self.seeds[rng.below(self.seeds.len())];
        let mut data = data.clone();
        match rng.below(8) {
            0 | 1 => return bytes(rng, &self.files, &["\"shape\":[", "[0,", "F16", "BF16", "]", "}", "  "]),
            2 => return whole(&self.headers.text(rng), &data),
            // Only a number in the data: NaN, infinity, negative or extreme.
            3 => {
                let strange = [f32::NAN, f32::INFINITY, -1.0, f32::MAX, -0.0, 1e-45];
                let at = 4 * rng.below(data.len() / 4 + 1);
                let value = strange[rng.below(strange.len())].to_le_bytes();
                data.iter_mut().skip(at).zip(value).for_each(|(slot, byte)| *slot = byte);
                return whole(header.to_string().as_bytes(), &data);
            }
            4 => data.resize(rng.below(2 * data.len() + 2), 0x41),
            _ => {}
        }
        whole(self.headers.changed(rng, header.clone()).to_string().as_bytes(), &data)
    }
}

/// A file with this header and this data.
fn whole(header: &[u8], data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header, data].concat()
}
