//! Tests of the attention kernels, and of the tables of addresses of its products.

use super::*;
use crate::ops::{attention, CausalMask, Mask};

/// The sizes and options of a call.
struct Case {
    batches: usize,
    /// Query heads, key heads, elements of a head.
    heads: [usize; 3],
    queries: usize,
    keys: usize,
    /// Threads per row of scores.
    lanes: u64,
    causal: bool,
    /// Which keys of each batch are real; empty: all.
    padding: Vec<u8>,
    p: f64,
}

impl Case {
    fn new(batches: usize, heads: [usize; 3], queries: usize, keys: usize) -> Self {
        Self { batches, heads, queries, keys, lanes: 4, causal: false, padding: vec![], p: 0.0 }
    }

    fn shapes(&self) -> [(usize, usize, usize); 4] {
        let Self { batches, heads: [heads, key_heads, dim], queries, keys, .. } = *self;
        let (query, key) = ((batches, queries, heads * dim), (batches, keys, key_heads * dim));
        [query, key, key, query]
    }

    /// q, k, v and the gradient of the output, rounded to `dtype`, in double precision.
    fn inputs(&self, dtype: DType) -> Result<Vec<Tensor>> {
        let values = |(which, shape): (u64, (usize, usize, usize))| {
            let mut xs = vec![0f32; shape.0 * shape.1 * shape.2];
            Noise::new(4).stream("values", Purpose::Init).fill_normal_f32(which, &mut xs);
            Tensor::from_vec(xs, shape, &Device::Cpu)?.to_dtype(dtype)?.to_dtype(DType::F64)
        };
        (0..).zip(self.shapes()).map(values).collect()
    }

    /// The output and the gradients of q, k and v, by the kernels.
    fn answer(&self, dtype: DType) -> Result<Vec<Vec<f64>>> {
        let stream = stream(Purpose::Dropout);
        let Self { batches, heads: [heads, key_heads, dim], queries, keys, .. } = *self;
        let sizes = [batches, heads, key_heads, queries, keys, dim].map(|n| n as u64);
        let padded = !self.padding.is_empty();
        let flags = [dtype == DType::BF16, self.causal, padded, self.p > 0.0].map(u64::from);
        let threshold = (self.p * 2f64.powi(32)) as u64;
        let mut request = Request::of(&[&[20], &sizes[..], &[self.lanes], &flags, &[threshold]].concat());
        request.0.extend([stream.key(), 3]);
        request = request.and(&[SCALE, 1.0 / (1.0 - self.p)]);
        let bytes = |i: usize| u64::from(self.padding.get(i).copied().unwrap_or(1));
        request.0.extend((0..batches * keys).map(bytes));
        for input in self.inputs(dtype)? {
            request = request.and(&input.flatten_all()?.to_vec1()?);
        }
        let answer = request.answer();
        let mut rest = &answer[..];
        let [of_q, of_k, ..] = self.shapes().map(|(a, b, c)| a * b * c);
        let parts = [of_q, of_q, of_k, of_k].map(|len| {
            let (part, others) = rest.split_at(len);
            rest = others;
            part.to_vec()
        });
        assert_eq!(rest.len(), batches * heads * queries, "logarithms");
        Ok(parts.to_vec())
    }

    /// The same from differentiating the reference path in double precision.
    fn want(&self, dtype: DType) -> Result<Vec<Vec<f64>>> {
        let inputs = self.inputs(dtype)?;
        let vars = inputs[..3].iter().map(Var::from_tensor).collect::<Result<Vec<_>>>()?;
        let padding = (!self.padding.is_empty())
            .then(|| Tensor::from_slice(&self.padding, (self.batches, self.keys), &Device::Cpu));
        let causal = self.causal.then(CausalMask::default);
        let mask = Mask { padding: padding.transpose()?, causal, window: None };
        let dropout = (self.p > 0.0).then(|| (self.p, stream(Purpose::Dropout), 3));
        let [heads, key_heads, _] = self.heads;
        let [q, k, v] = [0, 1, 2].map(|i| vars[i].as_tensor());
        let y = attention(q, k, v, heads, key_heads, SCALE, &mask, dropout, OpPath::Reference)?;
        let grads = (&y * &inputs[3])?.sum_all()?.backward()?;
        let mut parts = vec![y.flatten_all()?.to_vec1()?];
        for var in &vars {
            parts.push(grads.get(var).expect("a gradient").flatten_all()?.to_vec1()?);
        }
        Ok(parts)
    }

    /// The largest error of each part, relative to the largest number of its row.
    fn errors(&self, dtype: DType) -> Result<Vec<f64>> {
        let (got, want) = (self.answer(dtype)?, self.want(dtype)?);
        let [(.., query), (.., key), ..] = self.shapes();
        let rows = [query, query, key, key];
        let parts = got.iter().zip(&want).zip(rows).map(|((got, want), width)| {
            let rows = got.chunks(width).zip(want.chunks(width));
            rows.map(|(got, want)| {
                let size = want.iter().fold(0f64, |size, x| size.max(x.abs()));
                let error = got.iter().zip(want).map(|(got, want)| (got - want).abs());
                let error = error.fold(0f64, |m, x| if x <= m { m } else { x });
                if error == 0.0 {
                    0.0
                } else {
                    error / size
                }
            })
            .fold(0f64, |m, x| if x <= m { m } else { x })
        });
        Ok(parts.collect())
    }
}

const SCALE: f64 = 0.7;

/// More and fewer keys than two quads per thread of a row; rows that begin inside a block of noise; groups;
/// more queries than keys; a batch that sees nothing.
fn cases() -> Vec<Case> {
    let base = Case::new;
    vec![
        Case { lanes: 32, ..base(2, [2, 2, 16], 3, 5) },
        Case { padding: vec![1, 0, 1, 1, 0, 0, 0, 0], p: 0.25, ..base(2, [2, 2, 16], 5, 4) },
        Case { causal: true, lanes: 1, p: 0.4, ..base(1, [4, 2, 16], 3, 7) },
        Case { causal: true, lanes: 2, ..base(2, [6, 2, 12], 9, 5) },
        Case { p: 0.1, lanes: 8, padding: [[1; 37], [0; 37]].concat(), ..base(2, [3, 1, 24], 4, 37) },
        Case { p: 0.1, causal: true, lanes: 32, ..base(1, [2, 1, 24], 40, 161) },
    ]
}

#[test]
fn an_attention_and_its_gradients_are_those_of_the_block() -> Result<()> {
    for (i, case) in cases().iter().enumerate() {
        // In bf16, the probabilities and the gradients of the scores are rounded before the products, and the
        // products after it.
        for (dtype, room) in [(DType::F32, 2e-5), (DType::BF16, 2.0 / 256.0)] {
            let errors = case.errors(dtype)?;
            assert!(errors.iter().all(|error| *error <= room), "case {i} in {dtype:?}: {errors:?}");
        }
    }
    Ok(())
}
