//! Every differentiable block of `monteclora::ops`, forward and backward, on the fused path and on the
//! reference path: RoBERTa-base's sizes (8 x 128 rows of 768), f32 on the CPU.
//!
//! Every step includes candle's sum and its gradient, on either path: `sum alone` measures that share.
//!
//! `cargo bench --bench ops`; with `-- gelu` only the names that contain it, with `-- --test` every case
//! once.

#[path = "../examples/common/allocator.rs"]
mod allocator;

use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};
use criterion::{criterion_group, criterion_main, Criterion};
use monteclora::noise::{Noise, Purpose};
use monteclora::ops::{self, CausalMask, Mask, OpPath, Scores, Window};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;
type Block = Box<dyn Fn(&[Tensor], OpPath) -> candle_core::Result<Tensor>>;
/// A shape, and whether the tensor is tracked.
type Input = (&'static [usize], bool);

const BATCH: usize = 8;
const LENGTH: usize = 128;
const ROWS: usize = BATCH * LENGTH;
const WIDTH: usize = 768;
const INNER: usize = 3072;
const HEADS: usize = 12;
const HEAD: usize = WIDTH / HEADS;
const RANK: usize = 8;
const SCALE: f64 = 2.0;
const VOCABULARY: usize = 32000;
const LABELS: usize = 256;
const EPS: f64 = 1e-5;

const X: Input = (&[BATCH, LENGTH, WIDTH], true);
const WIDE: Input = (&[BATCH, LENGTH, INNER], true);
const SPLIT: Input = (&[BATCH, LENGTH, HEADS, HEAD], true);
const WEIGHT: Input = (&[WIDTH, WIDTH], false);
const UP: Input = (&[INNER, WIDTH], false);
const DOWN: Input = (&[WIDTH, INNER], false);
const VECTOR: Input = (&[WIDTH], false);
const WIDE_VECTOR: Input = (&[INNER], false);
const A: Input = (&[RANK, WIDTH], true);
const B: Input = (&[WIDTH, RANK], true);
const TRAINED: [Input; 2] = [(&[WIDTH, WIDTH], true), (&[WIDTH], true)];

struct Case {
    name: &'static str,
    inputs: Vec<Input>,
    block: Block,
}

fn case(
    name: &'static str,
    inputs: &[Input],
    block: impl Fn(&[Tensor], OpPath) -> candle_core::Result<Tensor> + 'static,
) -> Case {
    Case { name, inputs: inputs.to_vec(), block: Box::new(block) }
}

/// Normal numbers: activations (rank 3 and more) of size 1, matrices and vectors of the size of weights.
fn random(name: &str, shape: &[usize]) -> Outcome<Tensor> {
    let mut values = vec![0f32; shape.iter().product()];
    Noise::new(1).stream(name, Purpose::Init).fill_normal_f32(0, &mut values);
    let size = if shape.len() > 2 { 1.0 } else { 0.02 };
    Ok((Tensor::from_vec(values, shape, &Device::Cpu)? * size)?)
}

fn cases() -> Outcome<Vec<Case>> {
    let stream = Noise::new(2).stream("drop", Purpose::Dropout);
    // The rows of the batch end in 0, 8, 16, .. padding tokens.
    let real = |row: usize| (0..LENGTH).map(move |i| u8::from(i < LENGTH - 8 * row));
    let padding = Tensor::from_vec((0..BATCH).flat_map(real).collect(), (BATCH, LENGTH), &Device::Cpu)?;
    let angles = random("angles", &[1, LENGTH, HEAD / 2])?;
    let (cos, sin) = (angles.cos()?, angles.sin()?);
    let ids: Vec<u32> = (0..ROWS as u32).map(|i| i * i % VOCABULARY as u32).collect();
    let ids = Tensor::from_vec(ids, (BATCH, LENGTH), &Device::Cpu)?;
    let labels: Vec<i64> = (0..LABELS as i64).map(|i| i * 125 % VOCABULARY as i64).collect();
    let labels = Tensor::from_vec(labels, LABELS, &Device::Cpu)?;

    let mut all = vec![
        case("sum alone, 768", &[X], |t, _| Ok(t[0].clone())),
        case("sum alone, 3072", &[WIDE], |t, _| Ok(t[0].clone())),
        case("linear, frozen", &[X, WEIGHT, VECTOR], |t, path| ops::linear(&t[0], &t[1], Some(&t[2]), path)),
        case("linear, trained", &[X, TRAINED[0], TRAINED[1]], |t, path| {
            ops::linear(&t[0], &t[1], Some(&t[2]), path)
        }),
        case("low_rank", &[X, A, B], |t, path| ops::low_rank(&t[0], &t[1], &t[2], SCALE, path)),
        case("adapted_linear", &[X, WEIGHT, VECTOR, A, B], |t, path| {
            ops::adapted_linear(&t[0], &t[1], Some(&t[2]), &t[3], &t[4], SCALE, path)
        }),
        case("linear_and_low_rank", &[X, WEIGHT, VECTOR, X, A, B], |t, path| {
            ops::linear_and_low_rank(&t[0], &t[1], Some(&t[2]), &t[3], &t[4], &t[5], SCALE, path)
        }),
        case("feed_forward", &[X, UP, WIDE_VECTOR, DOWN, VECTOR], |t, path| {
            ops::feed_forward(&t[0], &t[1], Some(&t[2]), &t[3], Some(&t[4]), path)
        }),
        case("checkpoint of feed_forward", &[X, UP, WIDE_VECTOR, DOWN, VECTOR], |t, path| {
            let w = t[1..].to_vec();
            let block =
                move |xs: &Tensor| ops::feed_forward(xs, &w[0], Some(&w[1]), &w[2], Some(&w[3]), path);
            ops::checkpoint(&t[0], &[], block)
        }),
        case("layer_norm", &[X, VECTOR, VECTOR], |t, path| ops::layer_norm(&t[0], &t[1], &t[2], EPS, path)),
        case("add_layer_norm", &[X, X, VECTOR, VECTOR], |t, path| {
            ops::add_layer_norm(&t[0], &t[1], &t[2], &t[3], EPS, path)
        }),
        case("rms_norm", &[X, VECTOR], |t, path| ops::rms_norm(&t[0], &t[1], EPS, path)),
        case("gelu", &[WIDE], |t, path| ops::gelu(&t[0], path)),
        case("silu", &[WIDE], |t, path| ops::silu(&t[0], path)),
        case("silu_mul", &[WIDE, WIDE], |t, path| ops::silu_mul(&t[0], &t[1], path)),
        case("gelu_tanh_mul", &[WIDE, WIDE], |t, path| ops::gelu_tanh_mul(&t[0], &t[1], path)),
        case("soft_cap", &[WIDE], |t, path| ops::soft_cap(&t[0], 30.0, path)),
        case("rotary", &[SPLIT], move |t, path| ops::rotary(&t[0], &cos, &sin, path)),
        case("dropout", &[X], move |t, path| ops::dropout(&t[0], 0.1, &stream, 0, path)),
        case("cross_entropy", &[(&[LABELS, VOCABULARY], true)], move |t, path| {
            ops::cross_entropy(&t[0], &labels, -100, path)
        }),
        case("embedding, trained", &[(&[VOCABULARY, WIDTH], true)], move |t, path| {
            ops::embedding(&ids, &t[0], path)
        }),
        case("add_scaled_rows", &[A, (&[RANK], true), (&[RANK, WIDTH], false)], |t, path| {
            ops::add_scaled_rows(&t[0], &t[1], &t[2], path)
        }),
        case(
            "add_scaled_rows, 1024",
            &[(&[ROWS, WIDTH], true), (&[ROWS], true), (&[ROWS, WIDTH], false)],
            |t, path| ops::add_scaled_rows(&t[0], &t[1], &t[2], path),
        ),
    ];
    let real_keys = padding.clone();
    let attentions = [
        ("attention", None, false, false, None, None),
        ("attention, padding", Some(padding.clone()), false, false, None, None),
        ("attention, causal", None, true, false, None, None),
        ("attention, padding and causal", Some(padding.clone()), true, false, None, None),
        ("attention, padding and dropout", Some(padding), false, true, None, None),
        ("attention, causal and window", None, true, false, Some(32), None),
        ("attention, causal and capped", None, true, false, None, Some(50.0)),
    ];
    for (name, padding, causal, dropped, window, cap) in attentions {
        let window = window.map(Window::new);
        let mask = Mask { padding, causal: causal.then(CausalMask::default), window };
        all.push(case(name, &[X, X, X], move |t, path| {
            let scores = Scores { scale: 1.0 / (HEAD as f64).sqrt(), cap };
            let dropout = dropped.then_some((0.1, stream, 0));
            ops::attention(&t[0], &t[1], &t[2], HEADS, HEADS, scores, &mask, dropout, path)
        }));
    }
    // As in DeBERTa-v3: 256 buckets, of which rows of this length use only those of single distances.
    let relative = 2 * LENGTH - 1;
    let rows: Vec<u32> = (0..relative as u32).collect();
    let projected = [(&[ROWS + 2 * LENGTH - 1, WIDTH] as &[usize], true); 2];
    all.push(case("disentangled_attention", &[projected[0], projected[1], X], move |t, path| {
        let scale = 1.0 / (3.0 * HEAD as f64).sqrt();
        ops::disentangled_attention(&t[0], &t[1], &t[2], &rows, HEADS, scale, &real_keys, None, path)
    }));
    Ok(all)
}

/// Creates the inputs of a case; tracked ones are variables.
fn inputs(case: &Case) -> Outcome<Vec<Tensor>> {
    let mut tensors = Vec::new();
    for (i, &(shape, tracked)) in case.inputs.iter().enumerate() {
        let tensor = random(&format!("{}/{i}", case.name), shape)?;
        tensors.push(if tracked { Var::from_tensor(&tensor)?.into_inner() } else { tensor });
    }
    Ok(tensors)
}

/// Runs forward and backward of a block, up to the gradient of every tracked input.
fn step(case: &Case, inputs: &[Tensor], path: OpPath) -> Outcome<GradStore> {
    let grads = (case.block)(inputs, path)?.sum_all()?.backward()?;
    if inputs.iter().any(|input| input.is_variable() && grads.get(input).is_none()) {
        return Err(format!("{}: an input has no gradient", case.name).into());
    }
    Ok(grads)
}

fn blocks(c: &mut Criterion) -> Outcome<()> {
    let mut group = c.benchmark_group("cpu/block forward and backward");
    group.sample_size(20);
    for case in cases()? {
        let inputs = inputs(&case)?;
        for (path, suffix) in [(OpPath::Fused, "fused"), (OpPath::Reference, "reference")] {
            group.bench_function(format!("{}/{suffix}", case.name), |b| {
                b.iter(|| step(&case, &inputs, path).expect("a step"))
            });
        }
    }
    group.finish();
    Ok(())
}

fn all(c: &mut Criterion) {
    allocator::tune_allocator();
    blocks(c).expect("the blocks");
}

criterion_group!(benches, all);
criterion_main!(benches);
