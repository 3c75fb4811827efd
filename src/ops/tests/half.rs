//! Tests that blocks in half precision are as accurate as a computation in f32 whose results are rounded.
//! They are compared with double precision on the same rounded inputs: for each rounding of a result, an
//! error of half a unit of the largest number of the row is allowed.

use super::*;

/// The number of half-precision results that follow each other on the way to an output: 1 for a block with a
/// single pass. `None` for blocks that only handle parameters, which are f32, and for blocks with more
/// specific tests of their own.
fn roundings(name: &str) -> Option<f64> {
    let elsewhere = ["attention", "cross entropy", "mean squared", "update energy", "add scaled rows"];
    if elsewhere.iter().any(|part| name.contains(part)) {
        return None;
    }
    let of = |starts: &[&str]| starts.iter().any(|start| name.starts_with(start));
    Some(match () {
        // The projections, their product, its gradient, the gradient of a projection, the output.
        () if of(&["swiglu"]) => 5.0,
        // The dropped input, the low-rank part, the output, and in the gradient a sum of two.
        () if name == "adapted linear, dropout" => 4.0,
        // Feed forward: projection, activation, output. Norm: the sum, its norm, and the effect of the sum's
        // rounding on the derivative.
        () if of(&["feed forward", "add layer norm, trained"]) => 3.0,
        // A bias or a low-rank part beside the product; for embeddings, rows that are summed.
        () if of(&["linear", "adapted", "embedding"]) => 2.0,
        () => 1.0,
    })
}

/// The output and the gradients of `case`, computed in `dtype` from inputs that were rounded to `half`.
/// Adapters and tables of angles are f32.
fn run_rounded(
    device: &Device,
    case: &Case,
    path: OpPath,
    half: DType,
    dtype: DType,
) -> Result<(Tensor, Vec<Option<Tensor>>)> {
    let adapted = case.name.contains("low rank") || case.name.contains("adapted");
    let (mut vars, mut tensors) = (Vec::new(), Vec::new());
    for (i, (shape, tracked)) in case.inputs.iter().enumerate() {
        let table = case.name.contains("rotary") && i == 1;
        let stored = if table || adapted && (i == 1 || i == 2) { DType::F32 } else { half };
        let dtype = if dtype == half { stored } else { dtype };
        let t = normal(&format!("{}/{i}", case.name), shape).to_dtype(stored)?.to_dtype(dtype)?;
        let var = Var::from_tensor(&t.to_device(device)?)?;
        tensors.push(if *tracked { var.as_tensor().clone() } else { var.as_detached_tensor() });
        vars.push(tracked.then_some(var));
    }
    let y = (case.block)(&tensors, path)?;
    assert_eq!(y.dtype(), output_dtype(case, dtype), "{}", case.name);
    let weights = normal("weights", y.dims()).to_dtype(half)?.to_dtype(y.dtype())?.to_device(device)?;
    let store = (&y * weights)?.sum_all()?.backward()?;
    let host = |t: &Tensor| t.to_device(&Device::Cpu)?.to_dtype(DType::F64);
    let gradients = vars.iter().map(|var| var.as_ref().and_then(|var| store.get(var)).map(host).transpose());
    Ok((host(&y)?, gradients.collect::<Result<_>>()?))
}

/// Describes the elements whose error is more than `room` times the largest number of their row.
fn beyond(what: &str, got: &Tensor, want: &Tensor, room: f64) -> Vec<String> {
    let width = want.dims().last().copied().unwrap_or(1);
    let (got, want) = (flat(got), flat(want));
    assert_eq!(got.len(), want.len(), "{what}");
    let mut found = Vec::new();
    for (row, (got, want)) in got.chunks(width).zip(want.chunks(width)).enumerate() {
        let most = room * want.iter().fold(0f64, |m, x| m.max(x.abs()));
        let wrong = got.iter().zip(want).filter(|(got, want)| !(0.0..=most).contains(&(*got - *want).abs()));
        found.extend(wrong.map(|(got, want)| format!("{what}: row {row} has {got}, not {want} +- {most}")));
    }
    found
}

/// Compares blocks on a path of a device, in both half-precision dtypes.
pub(super) fn compare_in_half_width(device: &Device, path: OpPath, cases: &[Case]) -> Result<()> {
    let mut wrong = Vec::new();
    // Half a unit in the last place, relative to a number just above a power of two.
    for (half, unit) in [(DType::BF16, 1.0 / 256.0), (DType::F16, 1.0 / 2048.0)] {
        for case in cases {
            let Some(roundings) = roundings(case.name) else { continue };
            let what = format!("{} on {path:?} in {half:?}", case.name);
            let (y, gradients) = run_rounded(device, case, path, half, half)?;
            let (want, wanted) = run_rounded(&Device::Cpu, case, OpPath::Reference, half, DType::F64)?;
            wrong.extend(beyond(&what, &y, &want, roundings * unit));
            for (i, (gradient, wanted)) in gradients.iter().zip(&wanted).enumerate() {
                if let (Some(gradient), Some(wanted)) = (gradient, wanted) {
                    let what = format!("{what}, gradient of input {i}");
                    wrong.extend(beyond(&what, gradient, wanted, roundings * unit));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

#[test]
fn half_width_is_single_precision_rounded() -> Result<()> {
    compare_in_half_width(&Device::Cpu, OpPath::Composed, &cases())
}
