//! The number of launches of each block on a CUDA device, counted by the emulated device (`tests/emulator`).
//! A real device counts nothing.

use super::*;

/// The number of kernels and matrix products that this thread has launched; `None` without the emulator.
fn launched() -> Option<i64> {
    let folder = std::env::var_os("EMULATOR_COUNTS").map(std::path::PathBuf::from)?;
    let thread = std::fs::read_link("/proc/thread-self").unwrap();
    let bytes = std::fs::read(folder.join(thread.file_name().unwrap())).unwrap();
    let words: Vec<i64> = bytes.as_chunks().0.iter().map(|word| i64::from_ne_bytes(*word)).collect();
    Some(words[0] + words[1])
}

/// The launches of a block's forward and backward pass, without candle's own: the initial gradient of ones,
/// and an addition for each tensor that gets a gradient.
fn count(case: &Case, device: &Device, dtype: DType, path: OpPath) -> Option<[i64; 2]> {
    let factor =
        |i: usize| case.name.contains("adapted") && (i == 1 || i == 2) || case.name == "rotary" && i == 1;
    let tensors: Vec<Tensor> = (0..case.inputs.len())
        .map(|i| {
            let (shape, tracked) = case.inputs[i];
            let dtype = if factor(i) { DType::F32 } else { dtype };
            let t = normal("counted", shape).to_dtype(dtype).unwrap().to_device(device).unwrap();
            if tracked {
                Var::from_tensor(&t).unwrap().into_inner()
            } else {
                t
            }
        })
        .collect();
    let gradients = case.inputs.iter().filter(|(_, tracked)| *tracked).count() as i64;
    let start = launched()?;
    let y = (case.block)(&tensors, path).unwrap();
    let middle = launched()?;
    y.backward().unwrap();
    Some([middle - start, launched()? - middle - 1 - gradients])
}

#[test]
fn blocks_keep_their_budget_of_launches() -> Result<()> {
    let device = cuda_device(0)?;
    // Launches [forward, backward] in f32 and in bf16.
    let budgets = [
        (
            [[4, 5], [5, 7]],
            case(
                "adapted linear, bias",
                &[(&[2, 3, 5], true), (&[2, 5], true), (&[7, 2], true), (&[7, 5], false), (&[7], false)],
                |t, path| adapted_linear(&t[0], &t[3], Some(&t[4]), &t[1], &t[2], 1.7, path),
            ),
        ),
        (
            [[3, 5], [5, 7]],
            case(
                "adapted linear",
                &[(&[2, 3, 5], true), (&[2, 5], true), (&[7, 2], true), (&[7, 5], false)],
                |t, path| adapted_linear(&t[0], &t[3], None, &t[1], &t[2], 1.7, path),
            ),
        ),
        (
            [[2, 1], [2, 1]],
            case("linear, bias", &[(&[2, 3, 5], true), (&[7, 5], false), (&[7], false)], |t, path| {
                linear(&t[0], &t[1], Some(&t[2]), path)
            }),
        ),
        (
            [[4, 3], [4, 3]],
            case(
                "feed forward",
                &[(&[2, 3, 5], true), (&[7, 5], false), (&[7], false), (&[5, 7], false), (&[5], false)],
                |t, path| feed_forward(&t[0], &t[1], Some(&t[2]), &t[3], Some(&t[4]), path),
            ),
        ),
        (
            [[4, 4], [4, 4]],
            case(
                "swiglu",
                &[(&[2, 3, 5], true), (&[7, 5], false), (&[7, 5], false), (&[5, 7], false)],
                |t, path| swiglu(&t[0], &t[1], &t[2], &t[3], path),
            ),
        ),
        ([[1, 1], [1, 1]], case("gelu", &[(&[3, 41], true)], |t, path| gelu(&t[0], path))),
        (
            [[1, 1], [1, 1]],
            case("silu mul", &[(&[3, 41], true), (&[3, 41], true)], |t, path| silu_mul(&t[0], &t[1], path)),
        ),
        (
            [[1, 1], [1, 1]],
            case("rotary", &[(&[2, 3, 4, 6], true), (&[1, 3, 3], false)], |t, path| {
                rotary(&t[0], &t[1], &t[1], path)
            }),
        ),
        (
            [[4, 5], [4, 5]],
            case("attention", &[(&[2, 4, 16], true), (&[2, 4, 16], true), (&[2, 4, 16], true)], |t, path| {
                let (mask, drop) = (beside(&mask(4, false, false), &t[0])?, Some((0.25, stream(), 3)));
                attention(&t[0], &t[1], &t[2], 2, 2, 0.4, &mask, drop, path)
            }),
        ),
        (
            [[4, 6], [4, 8]],
            case(
                "attention, groups",
                &[(&[2, 4, 32], true), (&[2, 4, 16], true), (&[2, 4, 16], true)],
                |t, path| {
                    let mask = beside(&mask(4, true, false), &t[0])?;
                    attention(&t[0], &t[1], &t[2], 4, 2, 0.4, &mask, None, path)
                },
            ),
        ),
        (
            [[2, 1], [2, 1]],
            case("cross entropy", &[(&[4, 19], true)], |t, path| {
                cross_entropy(&t[0], &Tensor::new(&[3i64, -100, 0, 18], &Device::Cpu)?, -100, path)
            }),
        ),
        // One more to cast the loss's f32 gradient to bf16.
        (
            [[4, 1], [4, 2]],
            case("linear cross entropy", &[(&[600, 5], true), (&[19, 5], false)], |t, path| {
                let labels = Tensor::from_iter((0..600).map(|i| i % 19), &Device::Cpu)?;
                linear_cross_entropy(&t[0], &t[1], &labels, -100, path)
            }),
        ),
        // Candle also accumulates the gradient of the reshaped matrix.
        (
            [[1, 2], [1, 2]],
            case("take rows", &[(&[6, 5], true)], |t, path| {
                Rows::new(vec![1, 4], 6, t[0].device())?.take(&t[0], path)
            }),
        ),
    ];
    for (budget, case) in &budgets {
        for (dtype, most) in [DType::F32, DType::BF16].into_iter().zip(*budget) {
            let Some(ours) = count(case, &device, dtype, OpPath::Fused) else {
                crate::testing::skipped("this device does not count its launches");
                return Ok(());
            };
            let composed = count(case, &device, dtype, OpPath::Composed);
            println!("{} in {dtype:?}: {ours:?}, composed {composed:?}", case.name);
            assert_eq!(ours, most, "{} in {dtype:?}", case.name);
        }
    }
    Ok(())
}
