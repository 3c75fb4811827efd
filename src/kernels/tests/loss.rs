//! Tests of cross-entropy and both computations of its gradient, and of rows taken out and put back.

use super::*;
use crate::ops::cross_entropy;

#[test]
fn cross_entropy_and_its_gradients_are_those_of_the_block() -> Result<()> {
    const IGNORED: i64 = -1;
    // Fewer classes than threads, more; the first label, the last; ignored rows, which hold
    // NaN; large logits.
    let cases: [(&[i64], usize, f32); 4] =
        [(&[4, IGNORED, 0], 5, 1.0), (&[100, 7, IGNORED, 0], 101, 1.0), (&[0], 1, 1.0), (&[1, 2], 64, 40.0)];
    for (labels, classes, size) in cases {
        for (dtype, room) in [(DType::F32, 4e-6), (DType::BF16, 1.0 / 256.0)] {
            let (rows, factor) = (labels.len(), -0.5);
            let mut xs = vec![0f32; rows * classes];
            Noise::new(4).stream("values", Purpose::Init).fill_normal_f32(0, &mut xs);
            let xs = Tensor::from_vec(xs, (rows, classes), &Device::Cpu)?;
            let xs = (xs * f64::from(size))?.to_dtype(dtype)?.to_dtype(DType::F64)?;
            let counted = labels.iter().filter(|label| **label != IGNORED).count();
            let narrow = u64::from(dtype == DType::BF16);
            let words = labels.iter().map(|label| u64::from(*label as u32));
            let mut request = Request::of(&[21, rows as u64, classes as u64, narrow, counted as u64]);
            request = request.and(&[factor]);
            request.0.extend(words);
            let mut numbers = xs.to_vec2::<f64>()?;
            for (row, _) in numbers.iter_mut().zip(labels).filter(|(_, label)| **label == IGNORED) {
                row.fill(f64::NAN);
            }
            let got = request.and(&numbers.concat()).answer();

            let xs = Var::from_tensor(&xs)?;
            let labels = Tensor::new(labels, &Device::Cpu)?;
            let loss = cross_entropy(&xs, &labels, IGNORED, OpPath::Reference)?;
            let slopes = loss.backward()?.remove(&xs).expect("a gradient").to_vec2::<f64>()?;
            let loss = loss.to_scalar::<f64>()?;
            assert!((got[0] - loss).abs() <= 4e-6 * loss, "{dtype:?} {classes}: {} {loss}", got[0]);
            let (kept, rest) = got[1..].split_at(rows * classes);
            let (in_place, terms) = rest.split_at(rows * classes);
            for (kept, factor) in [(kept, factor), (in_place, 1.0)] {
                for (got, want) in kept.chunks(classes).zip(&slopes) {
                    let largest = want.iter().fold(0f64, |m, x| m.max(x.abs()));
                    for (got, want) in got.iter().zip(want) {
                        let error = (got - factor * want).abs();
                        assert!(error <= room * largest, "{dtype:?} {classes}: {got} {want} of {largest}");
                    }
                }
            }
            let (terms, again) = terms.split_at(rows);
            assert_eq!(terms, again);
        }
    }
    Ok(())
}

#[test]
fn rows_are_taken_out_and_put_back() {
    let places: [(u64, &[u64], usize); 4] =
        [(12, &[0, 1, 3, 9, 10, 11], 70), (5, &[4], 3), (6, &[0, 1, 2, 3, 4, 5], 1), (7, &[2, 5], 33)];
    for (total, places, dim) in places {
        for narrow in [0, 1] {
            // Integers that bf16 represents exactly.
            let xs: Vec<f64> = (0..total as usize * dim).map(|i| (i % 251) as f64 + 1.0).collect();
            let mut request = Request::of(&[22, total, places.len() as u64, dim as u64, narrow]);
            request.0.extend(places);
            let got = request.and(&xs).answer();
            let row = |place: u64| &xs[place as usize * dim..][..dim];
            let zeros = vec![0.0; dim];
            let taken = places.iter().map(|place| row(*place));
            let back = (0..total).map(|at| if places.contains(&at) { row(at) } else { &zeros });
            assert_eq!(got, taken.chain(back).collect::<Vec<_>>().concat());
        }
    }
}
