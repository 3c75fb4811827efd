//! Tests of biases, and of f32 numbers split into bf16 parts.

use super::*;

fn values(which: u64, len: usize) -> Vec<f64> {
    let mut xs = vec![0f32; len];
    Noise::new(4).stream("values", Purpose::Init).fill_normal_f32(which, &mut xs);
    xs.into_iter().map(f64::from).collect()
}

/// A number rounded to bf16.
fn rounded(x: f64) -> Result<f64> {
    Tensor::new(x as f32, &Device::Cpu)?.to_dtype(DType::BF16)?.to_dtype(DType::F64)?.to_scalar()
}

/// Three bf16 numbers whose sum is the f32 number `x`.
fn parts(x: f64) -> Result<[f64; 3]> {
    let first = rounded(x)?;
    let second = rounded(x - first)?;
    Ok([first, second, rounded(x - first - second)?])
}

#[test]
fn a_bias_is_in_every_row() -> Result<()> {
    for (rows, dim, narrow, blocks) in [(5, 37, 0, 2), (2, 3, 1, 4)] {
        let bias = values(0, dim);
        let got = Request::of(&[33, rows, dim as u64, narrow, blocks]).and(&bias).answer();
        let want = bias.iter().map(|x| if narrow == 1 { rounded(*x) } else { Ok(*x) });
        assert_eq!(got, want.collect::<Result<Vec<_>>>()?.repeat(rows as usize));
    }
    Ok(())
}

#[test]
fn factors_lie_as_parts_that_lose_no_bit() -> Result<()> {
    for (rank, padded, lead, width, height, blocks) in
        [(3, 8, 8, 5, 7, 2), (8, 8, 0, 9, 4, 1), (9, 16, 8, 3, 2, 9), (1, 8, 0, 1, 1, 1)]
    {
        let sizes = [34, rank, padded, lead, width, height, blocks].map(|n| n as u64);
        let (a, b, bias) = (values(0, rank * width), values(1, height * rank), values(2, height));
        let got = Request::of(&sizes).and(&[&a[..], &b, &bias].concat()).answer();
        let (rows, columns) = got.split_at(4 * padded * width);
        let across = lead + 4 * padded;
        assert_eq!(columns.len(), height * across);
        let which = [0, 0, 1, 2]; // the first part comes twice
        for (place, part) in (0..4 * padded).map(|place| (place, which[place / padded])) {
            let k = place % padded;
            for i in 0..width {
                let want = if k < rank { parts(a[k * width + i])?[part] } else { 0.0 };
                assert_eq!(rows[place * width + i], want, "A, part {part} of {k}, {i}");
            }
            for i in 0..height {
                let want = if k < rank { parts(b[i * rank + k])?[part] } else { 0.0 };
                assert_eq!(columns[i * across + lead + place], want, "B, part {part} of {i}, {k}");
            }
        }
        for (row, bias) in columns.chunks(across).zip(&bias).filter(|_| lead > 0) {
            assert_eq!(row[0], rounded(*bias)?);
            assert!(row[1..lead].iter().all(|x| *x == 0.0));
        }
        assert!(a.iter().all(|x| parts(*x).is_ok_and(|parts| parts.iter().sum::<f64>() == *x)));
    }
    Ok(())
}

#[test]
fn a_product_is_summed_and_split_again() -> Result<()> {
    for (rows, padded, lead, blocks) in [(5, 8, 8, 2), (3, 16, 0, 9)] {
        let thirds = values(0, rows * 3 * padded);
        let sizes = [35, rows, padded, lead, blocks].map(|n| n as u64);
        let got = Request::of(&sizes).and(&thirds).answer();
        for (row, got) in got.chunks(lead + 3 * padded).enumerate() {
            let (front, got) = got.split_at(lead);
            assert!(front.iter().enumerate().all(|(i, x)| *x == f64::from(u8::from(i == 0))), "{front:?}");
            let thirds = &thirds[row * 3 * padded..];
            for k in 0..padded {
                let [first, second, third] = [0, padded, 2 * padded].map(|step| thirds[step + k] as f32);
                let want = parts(f64::from(first + (second + third)))?;
                assert_eq!([0, padded, 2 * padded].map(|step| got[step + k]), [want[0], want[1], want[0]]);
            }
        }
    }
    Ok(())
}

#[test]
fn gradients_are_the_sums_of_their_halves() {
    for (rank, padded, width, height, wanted, blocks) in
        [(3, 8, 5, 7, 3, 2), (8, 8, 2, 3, 1, 1), (9, 16, 4, 3, 2, 9)]
    {
        let sizes = [36, rank, padded, width, height, wanted, blocks].map(|n| n as u64);
        let (a, b) = (values(0, 2 * padded * width), values(1, height * 2 * padded));
        let got = Request::of(&sizes).and(&[&a[..], &b].concat()).answer();
        let (da, db) = got.split_at(rank * width);
        let sum = |x: f64, y: f64| f64::from(x as f32 + y as f32);
        for (i, da) in da.iter().enumerate() {
            let want = sum(a[i], a[padded * width + i]);
            assert!(if wanted & 1 != 0 { *da == want } else { da.is_nan() }, "A, {i}: {da}");
        }
        for (i, db) in db.iter().enumerate() {
            let at = i / rank * 2 * padded + i % rank;
            assert!(
                if wanted & 2 != 0 { *db == sum(b[at], b[at + padded]) } else { db.is_nan() },
                "B, {i}: {db}"
            );
        }
    }
}
