//! Tests of every block on every path: values and gradients are compared with candle's differentiation of the
//! reference, and gradients with central differences, at random inputs.

use candle_core::{DType, Device, Result, Tensor, Var};

use super::*;
use crate::noise::{Noise, Purpose, Stream};
use crate::util::dtype::wide;

mod attention;
mod caps;
mod contracts;
#[cfg(feature = "cuda")]
mod device;
mod disentangled;
mod half;

type Block = Box<dyn Fn(&[Tensor], OpPath) -> Result<Tensor>>;

/// A block, its inputs' shapes and which of them are tracked.
struct Case {
    name: &'static str,
    inputs: Vec<(&'static [usize], bool)>,
    block: Block,
}

fn normal(path: &str, shape: &[usize]) -> Tensor {
    let mut values = vec![0f64; shape.iter().product()];
    Noise::new(11).stream(path, Purpose::Init).fill_normal(0, &mut values);
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn stream() -> Stream {
    Noise::new(5).stream("drop", Purpose::Dropout)
}

fn case(
    name: &'static str,
    inputs: &[(&'static [usize], bool)],
    block: impl Fn(&[Tensor], OpPath) -> Result<Tensor> + 'static,
) -> Case {
    Case { name, inputs: inputs.to_vec(), block: Box::new(block) }
}

/// A mask for a batch of two rows: the first row has one padded key; if `blind`, the second
/// row is all padding.
fn mask(tk: usize, causal: bool, blind: bool) -> Mask {
    let mut padding = vec![1u8; 2 * tk];
    padding[tk - 2] = 0;
    if blind {
        padding[tk..].fill(0);
    }
    let padding = Some(Tensor::from_vec(padding, (2, tk), &Device::Cpu).unwrap());
    Mask { padding, causal: causal.then(CausalMask::default), window: None }
}

/// The mask on the device of `xs`.
fn beside(mask: &Mask, xs: &Tensor) -> Result<Mask> {
    let padding = mask.padding.as_ref().map(|padding| padding.to_device(xs.device())).transpose()?;
    Ok(Mask { padding, ..mask.clone() })
}

fn cases() -> Vec<Case> {
    let mut all = vec![
        case("linear, frozen", &[(&[2, 3, 5], true), (&[7, 5], false), (&[7], false)], |t, path| {
            linear(&t[0], &t[1], Some(&t[2]), path)
        }),
        case("linear, frozen, no bias, rank 2", &[(&[6, 5], true), (&[7, 5], false)], |t, path| {
            linear(&t[0], &t[1], None, path)
        }),
        case("linear, trained", &[(&[2, 3, 5], true), (&[7, 5], true), (&[7], true)], |t, path| {
            linear(&t[0], &t[1], Some(&t[2]), path)
        }),
        case("linear, trained, no bias", &[(&[2, 3, 5], false), (&[7, 5], true)], |t, path| {
            linear(&t[0], &t[1], None, path)
        }),
        case("linear, bias alone trained", &[(&[4, 5], false), (&[7, 5], false), (&[7], true)], |t, path| {
            linear(&t[0], &t[1], Some(&t[2]), path)
        }),
        case("linear, transposed input", &[(&[2, 5, 3], true), (&[7, 5], true), (&[7], true)], |t, path| {
            linear(&t[0].transpose(1, 2)?, &t[1], Some(&t[2]), path)
        }),
        case("low rank", &[(&[2, 3, 5], true), (&[2, 5], true), (&[7, 2], true)], |t, path| {
            low_rank(&t[0], &t[1], &t[2], 1.7, path)
        }),
        case(
            "low rank, untracked transposed input",
            &[(&[5, 6], false), (&[2, 5], true), (&[7, 2], true)],
            |t, path| low_rank(&t[0].t()?, &t[1], &t[2], -0.6, path),
        ),
        case(
            "adapted linear",
            &[(&[2, 3, 5], true), (&[2, 5], true), (&[7, 2], true), (&[7, 5], false), (&[7], false)],
            |t, path| adapted_linear(&t[0], &t[3], Some(&t[4]), &t[1], &t[2], 1.7, path),
        ),
        case(
            "adapted linear, untracked input, no bias",
            &[(&[4, 5], false), (&[2, 5], true), (&[7, 2], true), (&[7, 5], false)],
            |t, path| adapted_linear(&t[0], &t[3], None, &t[1], &t[2], 0.3, path),
        ),
        case(
            "adapted linear, trained base",
            &[(&[4, 5], true), (&[2, 5], true), (&[7, 2], true), (&[7, 5], true), (&[7], true)],
            |t, path| adapted_linear(&t[0], &t[3], Some(&t[4]), &t[1], &t[2], 0.3, path),
        ),
        case("embedding", &[(&[6, 5], true)], |t, path| {
            embedding(&Tensor::new(&[[3u32, 1, 3], [0, 3, 5]], t[0].device())?, &t[0], path)
        }),
        case("layer norm, frozen", &[(&[2, 3, 37], true), (&[37], false), (&[37], false)], |t, path| {
            layer_norm(&t[0], &t[1], &t[2], 1e-3, path)
        }),
        case("layer norm, trained", &[(&[2, 3, 37], true), (&[37], true), (&[37], true)], |t, path| {
            layer_norm(&t[0], &t[1], &t[2], 1e-3, path)
        }),
        case(
            "add layer norm, frozen",
            &[(&[2, 3, 37], true), (&[2, 3, 37], true), (&[37], false), (&[37], false)],
            |t, path| add_layer_norm(&t[0], &t[1], &t[2], &t[3], 1e-3, path),
        ),
        case(
            "add layer norm, trained, transposed",
            &[(&[2, 37, 3], true), (&[2, 3, 37], true), (&[37], true), (&[37], false)],
            |t, path| add_layer_norm(&t[0].transpose(1, 2)?, &t[1], &t[2], &t[3], 1e-3, path),
        ),
        case("rms norm, frozen", &[(&[5, 19], true), (&[19], false)], |t, path| {
            rms_norm(&t[0], &t[1], 1e-3, path)
        }),
        case("rms norm, trained", &[(&[5, 19], true), (&[19], true)], |t, path| {
            rms_norm(&t[0], &t[1], 1e-3, path)
        }),
        case("update energy", &[(&[2, 3, 7], true), (&[2, 5, 3], true), (&[2, 3], true)], |t, path| {
            update_energy(&t[0], &t[1], &t[2], &[0.7, 1.9], path)
        }),
        case(
            "update energy, frozen factors",
            &[(&[1, 3, 7], false), (&[1, 5, 3], true), (&[1, 3], false)],
            |t, path| update_energy(&t[0], &t[1], &t[2], &[0.3], path),
        ),
        case("add scaled rows", &[(&[3, 41], true), (&[3], true), (&[3, 41], false)], |t, path| {
            add_scaled_rows(&t[0], &t[1], &t[2], path)
        }),
        case(
            "add scaled rows, transposed, frozen xs",
            &[(&[41, 3], false), (&[3], true), (&[41, 3], false)],
            |t, path| add_scaled_rows(&t[0].t()?, &t[1], &t[2].t()?, path),
        ),
        case("gelu", &[(&[3, 41], true)], |t, path| gelu(&(&t[0] * 2.0)?.t()?, path)),
        case("silu", &[(&[3, 41], true)], |t, path| silu(&t[0].t()?, path)),
        case("silu mul", &[(&[3, 41], true), (&[3, 41], true)], |t, path| silu_mul(&t[0], &t[1], path)),
        case("silu mul, transposed, one tracked", &[(&[3, 4], false), (&[4, 3], true)], |t, path| {
            silu_mul(&t[0].t()?, &t[1], path)
        }),
        case(
            "feed forward, frozen",
            &[(&[2, 3, 5], true), (&[7, 5], false), (&[7], false), (&[5, 7], false), (&[5], false)],
            |t, path| feed_forward(&t[0], &t[1], Some(&t[2]), &t[3], Some(&t[4]), path),
        ),
        case(
            "feed forward, frozen, no bias",
            &[(&[4, 5], true), (&[7, 5], false), (&[3, 7], false)],
            |t, path| feed_forward(&t[0], &t[1], None, &t[2], None, path),
        ),
        case(
            "feed forward, trained",
            &[(&[4, 5], true), (&[7, 5], true), (&[7], true), (&[3, 7], true), (&[3], true)],
            |t, path| feed_forward(&t[0], &t[1], Some(&t[2]), &t[3], Some(&t[4]), path),
        ),
        case(
            "swiglu, frozen",
            &[(&[2, 3, 5], true), (&[7, 5], false), (&[7, 5], false), (&[5, 7], false)],
            |t, path| swiglu(&t[0], &t[1], &t[2], &t[3], path),
        ),
        case(
            "swiglu, trained, transposed",
            &[(&[5, 4], true), (&[7, 5], true), (&[7, 5], true), (&[3, 7], true)],
            |t, path| swiglu(&t[0].t()?, &t[1], &t[2], &t[3], path),
        ),
        case("rotary", &[(&[2, 3, 4, 6], true), (&[2, 3, 3], false)], |t, path| {
            rotary(&t[0], &t[1].cos()?, &t[1].sin()?, path)
        }),
        case("rotary, one table, transposed", &[(&[2, 4, 3, 6], true), (&[1, 3, 3], false)], |t, path| {
            rotary(&t[0].transpose(1, 2)?, &t[1].cos()?, &t[1].sin()?, path)
        }),
        case("dropout", &[(&[3, 7, 5], true)], |t, path| {
            dropout(&t[0].transpose(0, 1)?, 0.3, &stream(), 9, path)
        }),
        case("cross entropy", &[(&[4, 19], true)], |t, path| {
            cross_entropy(&t[0], &Tensor::new(&[3i64, -100, 0, 18], t[0].device())?, -100, path)
        }),
        case("cross entropy, transposed", &[(&[19, 4], true)], |t, path| {
            cross_entropy(&t[0].t()?, &Tensor::new(&[-1i64, 1, 0, 3], t[0].device())?, -1, path)
        }),
        case("linear cross entropy", &[(&[4, 5], true), (&[19, 5], false)], |t, path| {
            linear_cross_entropy(&t[0], &t[1], &Tensor::new(&[3i64, -100, 0, 18], t[0].device())?, -100, path)
        }),
        case("linear cross entropy, trained, transposed", &[(&[5, 4], true), (&[19, 5], true)], |t, path| {
            linear_cross_entropy(
                &t[0].t()?,
                &t[1],
                &Tensor::new(&[3i64, -100, 0, 18], t[0].device())?,
                -100,
                path,
            )
        }),
        case("linear cross entropy, several pieces", &[(&[600, 3], true), (&[7, 3], false)], |t, path| {
            let label = |i: i64| if i % 5 == 0 || (256..512).contains(&i) { -100 } else { i % 7 };
            let labels = Tensor::from_iter((0..600).map(label), t[0].device())?;
            linear_cross_entropy(&t[0], &t[1], &labels, -100, path)
        }),
        case("mean squared error", &[(&[7], true), (&[7], true)], |t, path| {
            mean_squared_error(&t[0], &t[1], path)
        }),
    ];
    all.extend(attention::cases());
    all.extend(caps::cases());
    all.extend(disentangled::cases());
    all
}

/// The inputs of a case; tracked ones are variables.
fn inputs(case: &Case, dtype: DType, device: &Device) -> (Vec<Option<Var>>, Vec<Tensor>) {
    let mut vars = Vec::new();
    let mut tensors = Vec::new();
    for (i, (shape, tracked)) in case.inputs.iter().enumerate() {
        let t = normal(&format!("{}/{i}", case.name), shape).to_dtype(dtype).unwrap();
        let t = t.to_device(device).unwrap();
        let var = tracked.then(|| Var::from_tensor(&t).unwrap());
        tensors.push(var.as_ref().map_or(t, |v| v.as_tensor().clone()));
        vars.push(var);
    }
    (vars, tensors)
}

/// The dtype of a block's output; losses are in the wide dtype.
fn output_dtype(case: &Case, dtype: DType) -> DType {
    let is_loss = ["cross entropy", "squared error"].iter().any(|loss| case.name.contains(loss));
    if is_loss {
        wide(dtype)
    } else {
        dtype
    }
}

/// Reduces the output to a scalar in which every element has a different weight.
fn scalar(y: &Tensor) -> Result<Tensor> {
    let weights = normal("weights", y.dims()).to_dtype(y.dtype())?.to_device(y.device())?;
    (y * weights)?.flatten_all()?.sum_all() // flattened, also for a scalar: see `util::finite`
}

fn flat(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The output and the gradient of every tracked input. Asserts that a second backward gives
/// the same gradients.
fn run(case: &Case, path: OpPath, dtype: DType) -> (Vec<f64>, Vec<Option<Vec<f64>>>) {
    run_on(&Device::Cpu, case, path, dtype)
}

fn run_on(device: &Device, case: &Case, path: OpPath, dtype: DType) -> (Vec<f64>, Vec<Option<Vec<f64>>>) {
    let (vars, tensors) = inputs(case, dtype, device);
    let y = (case.block)(&tensors, path).unwrap_or_else(|e| panic!("{}: {e}", case.name));
    assert_eq!(y.dtype(), output_dtype(case, dtype), "{}", case.name);
    let loss = scalar(&y).unwrap();
    let mut gradients = Vec::new();
    for _ in 0..2 {
        let store = loss.backward().unwrap_or_else(|e| panic!("{}: {e}", case.name));
        for (tensor, var) in tensors.iter().zip(&vars) {
            let gradient = store.get(tensor);
            // The reference also gives gradients to frozen tensors; the other paths must not.
            let wanted = path == OpPath::Reference || gradient.is_some() == var.is_some();
            assert!(wanted, "{} on {path:?}: who gets a gradient", case.name);
            gradients.push(gradient.filter(|_| var.is_some()).map(flat));
        }
    }
    let second = gradients.split_off(tensors.len());
    assert_eq!(gradients, second, "{} on {path:?}: a second backward differs", case.name);
    (flat(&y), gradients)
}

fn assert_close(what: &str, a: &[f64], b: &[f64], tolerance: f64) {
    assert_eq!(a.len(), b.len(), "{what}");
    let size = b.iter().fold(1.0, |m: f64, x| m.max(x.abs()));
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        assert!((a - b).abs() <= tolerance * size, "{what}: element {i} is {a}, not {b}");
    }
}

fn compare(case: &Case, path: OpPath, dtype: DType, tolerance: f64) {
    compare_on(&Device::Cpu, case, path, dtype, tolerance);
}

fn compare_on(device: &Device, case: &Case, path: OpPath, dtype: DType, tolerance: f64) {
    // The reference runs in double precision on the host.
    let (y, gradients) = run_on(device, case, path, dtype);
    let (want, wanted) = run(case, OpPath::Reference, DType::F64);
    assert_close(&format!("{} on {path:?}", case.name), &y, &want, tolerance);
    for (i, (gradient, wanted)) in gradients.iter().zip(&wanted).enumerate() {
        if let (Some(gradient), Some(wanted)) = (gradient, wanted) {
            let what = format!("{} on {path:?}, gradient of input {i}", case.name);
            assert!(wanted.iter().any(|g| *g != 0.0), "{what} is zero");
            assert_close(&what, gradient, wanted, tolerance);
        }
    }
}

#[test]
fn the_fused_path_computes_what_the_reference_computes() {
    for case in cases() {
        compare(&case, OpPath::Fused, DType::F32, 2e-5);
    }
}

#[test]
fn the_composed_path_computes_what_the_reference_computes() {
    for case in cases() {
        compare(&case, OpPath::Composed, DType::F64, 1e-10);
        compare(&case, OpPath::Composed, DType::F32, 2e-5);
    }
}

#[test]
fn the_composed_path_runs_in_half_width() {
    for case in cases() {
        compare(&case, OpPath::Composed, DType::BF16, 0.06);
        compare(&case, OpPath::Composed, DType::F16, 0.01);
    }
}

#[test]
fn gradients_are_the_central_differences() {
    for case in cases() {
        let (_, gradients) = run(&case, OpPath::Composed, DType::F64);
        let (_, tensors) = inputs(&case, DType::F64, &Device::Cpu);
        for (i, gradient) in gradients.iter().enumerate() {
            let Some(gradient) = gradient else { continue };
            let values = flat(&tensors[i]);
            let step = 1e-5;
            // A dozen elements of each input, spread over it.
            for at in (0..values.len()).step_by(values.len().div_ceil(12)) {
                let loss = |delta: f64| {
                    let mut values = values.clone();
                    values[at] += delta;
                    let mut moved: Vec<Tensor> = tensors.iter().map(Tensor::detach).collect();
                    moved[i] = Tensor::from_vec(values, tensors[i].dims(), &Device::Cpu).unwrap();
                    let y = (case.block)(&moved, OpPath::Composed).unwrap();
                    scalar(&y).unwrap().to_scalar::<f64>().unwrap()
                };
                let difference = (loss(step) - loss(-step)) / (2.0 * step);
                let error = (difference - gradient[at]).abs();
                assert!(
                    error < 1e-6 * (1.0 + difference.abs()),
                    "{}, input {i}, element {at}: {} against {difference}",
                    case.name,
                    gradient[at]
                );
            }
        }
    }
}

#[test]
fn the_number_of_threads_changes_no_byte() {
    let big = |path: &str, shape: &[usize]| normal(path, shape).to_dtype(DType::F32).unwrap();
    let path = OpPath::Fused;
    let compute = || -> Result<Vec<f32>> {
        let var = |path: &str, shape: &[usize]| Var::from_tensor(&big(path, shape));
        let (x, w, bias) = (var("x", &[2, 150, 96])?, var("w", &[96, 96])?, var("bias", &[96])?);
        let (a, b, table) = (var("a", &[4, 96])?, var("b", &[96, 4])?, var("table", &[50, 96])?);
        let ids = Tensor::arange(0u32, 300, &Device::Cpu)?.reshape((2, 150))?;
        let ids = ids.to_dtype(DType::F64)?.affine(0.161, 0.0)?.to_dtype(DType::U32)?;
        let x1 = (embedding(&ids, &table, path)? + x.as_tensor())?;
        let y = adapted_linear(&linear(&x1, &w, Some(&bias), path)?, &w.detach(), None, &a, &b, 0.5, path)?;
        let y = gelu(&layer_norm(&y, &bias, &bias, 1e-5, path)?, path)?;
        let z = attention(&y, &x1, &y, 4, 4, 0.2, &mask(150, true, false), Some((0.1, stream(), 1)), path)?;
        let z = rms_norm(&dropout(&silu_mul(&z, &y, path)?, 0.2, &stream(), 4, path)?, &bias, 1e-5, path)?;
        let labels = Tensor::arange(0i64, 300, &Device::Cpu)?.affine(0.3, 0.0)?;
        let loss = cross_entropy(&z.reshape((300, 96))?, &labels, 7, path)?;
        let store = loss.backward()?;
        let mut bytes = vec![loss.to_scalar::<f32>()?];
        for var in [&x, &w, &bias, &a, &b, &table] {
            bytes.extend(store.get(var).expect("a gradient").flatten_all()?.to_vec1::<f32>()?);
        }
        Ok(bytes)
    };
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(compute).unwrap()
    };
    let one = on(1);
    assert!(one.iter().all(|x| x.is_finite()));
    for threads in [2, 3, 7] {
        assert!(one == on(threads), "{threads} threads");
    }
}

#[test]
fn nan_in_is_nan_out_forward_and_backward() {
    for case in cases() {
        if case.name.starts_with("embedding") {
            continue; // copies rows, which the comparison with the reference covers
        }
        for path in [OpPath::Fused, OpPath::Composed] {
            let (_, mut tensors) = inputs(&case, DType::F32, &Device::Cpu);
            // The last element: it is in a remainder, in the last row and in the last key.
            let mut values = flat(&tensors[0]);
            *values.last_mut().unwrap() = f64::NAN;
            let x = Tensor::from_vec(values, tensors[0].dims(), &Device::Cpu).unwrap();
            let x = Var::from_tensor(&x.to_dtype(DType::F32).unwrap()).unwrap();
            tensors[0] = x.as_tensor().clone();
            let y = (case.block)(&tensors, path).unwrap();
            // Blind rows hide their inputs, and in these cases the last row of the batch is blind.
            let blind = case.name.contains("blind") || case.name.contains("many blocks");
            assert!(blind || flat(&y).iter().any(|y| y.is_nan()), "{} on {path:?}", case.name);
            let linear_in_x = ["linear", "low rank", "rotary", "dropout", "scaled rows"]
                .iter()
                .any(|n| case.name.contains(n));
            let dx = flat(y.sum_all().unwrap().backward().unwrap().get(&x).unwrap());
            assert!(
                blind || linear_in_x || dx.iter().any(|d| d.is_nan()),
                "{} on {path:?}, backward",
                case.name
            );
        }
    }
}
