//! Tests of activations and rotary positions against candle's own differentiation in double precision.

use super::*;
use crate::ops::{gelu, rotary, silu_mul};

/// Normal numbers rounded to f32 or bf16, some of them large, in double precision.
fn values(which: u64, shape: impl Into<candle_core::Shape>, narrow: bool) -> Result<Tensor> {
    let shape = shape.into();
    let mut xs = vec![0f32; shape.elem_count()];
    Noise::new(4).stream("values", Purpose::Init).fill_normal_f32(which, &mut xs);
    xs.iter_mut().step_by(7).for_each(|x| *x *= 4.0);
    let dtype = if narrow { DType::BF16 } else { DType::F32 };
    Tensor::from_vec(xs, shape, &Device::Cpu)?.to_dtype(dtype)?.to_dtype(DType::F64)
}

fn flat(xs: &Tensor) -> Result<Vec<f64>> {
    xs.flatten_all()?.to_vec1()
}

/// Asserts that each row is accurate to 2^-8 (narrow) or 2e-6 of its largest number.
fn assert_rows(what: &str, got: &[f64], want: &Tensor, narrow: bool) -> Result<()> {
    let want = flat(want)?.chunks(want.dims()[want.rank() - 1]).map(<[f64]>::to_vec).collect::<Vec<_>>();
    let width = want[0].len();
    assert_eq!(got.len(), want.len() * width, "{what}");
    for (row, (got, want)) in got.chunks(width).zip(&want).enumerate() {
        let size = want.iter().fold(0f64, |m, x| m.max(x.abs()));
        let room = if narrow { size / 256.0 } else { 2e-6 * size };
        for (i, (got, want)) in got.iter().zip(want).enumerate() {
            assert!((got - want).abs() <= room, "{what}, narrow {narrow}, row {row}, {i}: {got}, not {want}");
        }
    }
    Ok(())
}

#[test]
fn gelu_and_its_gradient_are_those_of_the_block() -> Result<()> {
    // More rows than blocks and fewer, more columns than threads and fewer.
    for (rows, dim, biased, blocks, narrow) in
        [(5, 37, true, 2, false), (3, 70, true, 3, true), (2, 5, false, 7, true), (4, 33, false, 1, false)]
    {
        let (x, bias) = (values(0, (rows, dim), narrow)?, values(1, dim, narrow)?);
        let (grad, shown) = (values(2, (rows, dim), narrow)?, biased as u64);
        let sizes = [30, rows as u64, dim as u64, narrow.into(), shown, blocks];
        let got = Request::of(&sizes).and(&[flat(&x)?, flat(&bias)?, flat(&grad)?].concat()).answer();
        let x = Var::from_tensor(&if biased { x.broadcast_add(&bias)? } else { x })?;
        let y = gelu(&x, OpPath::Reference)?;
        let grads = (&y * &grad)?.sum_all()?.backward()?;
        let (ys, dxs) = got.split_at(rows * dim);
        assert_rows("gelu", ys, &y, narrow)?;
        assert_rows("gelu's gradient", dxs, grads.get(&x).expect("a gradient"), narrow)?;
    }
    Ok(())
}

#[test]
fn silu_mul_and_its_gradients_are_those_of_the_block() -> Result<()> {
    for (count, blocks, narrow) in [(131, 2, false), (131, 9, true), (3, 1, true)] {
        let parts = (0..3).map(|i| values(i, (1, count), narrow)).collect::<Result<Vec<_>>>()?;
        let numbers = parts.iter().map(flat).collect::<Result<Vec<_>>>()?.concat();
        let got = Request::of(&[31, count as u64, narrow.into(), blocks]).and(&numbers).answer();
        let (gate, up) = (Var::from_tensor(&parts[0])?, Var::from_tensor(&parts[1])?);
        let y = silu_mul(&gate, &up, OpPath::Reference)?;
        let grads = (&y * &parts[2])?.sum_all()?.backward()?;
        assert_rows("silu mul", &got[..count], &y, narrow)?;
        for (i, var) in [&gate, &up].into_iter().enumerate() {
            let want = grads.get(var).expect("a gradient");
            assert_rows(&format!("gradient {i}"), &got[(i + 1) * count..(i + 2) * count], want, narrow)?;
        }
    }
    Ok(())
}

#[test]
fn rotary_turns_and_turns_back_as_the_block_does() -> Result<()> {
    // One table for all rows of the batch, and one for each.
    for (b, tables, t, heads, half, blocks, narrow) in
        [(2, 1, 3, 2, 4, 4, false), (2, 2, 3, 5, 9, 2, true), (1, 1, 2, 1, 1, 9, false)]
    {
        let xs = values(0, (b, t, heads, 2 * half), narrow)?;
        let (cos, sin) = (values(1, (tables, t, half), false)?, values(2, (tables, t, half), false)?);
        let sizes = [b * t, tables * t, heads, half, usize::from(narrow), blocks].map(|n| n as u64);
        let numbers = [flat(&xs)?, flat(&cos)?, flat(&sin)?].concat();
        let got = Request::of(&[&[32][..], &sizes].concat()).and(&numbers).answer();
        let (ys, back) = got.split_at(xs.elem_count());
        assert_rows("rotary", ys, &rotary(&xs, &cos, &sin, OpPath::Reference)?, narrow)?;
        assert_rows("back", back, &rotary(&xs, &cos, &sin.neg()?, OpPath::Reference)?, narrow)?;
    }
    Ok(())
}

#[test]
fn nan_stays_nan() {
    for narrow in [0, 1] {
        let gelu = Request::of(&[30, 1, 2, narrow, 0, 1]).and(&[f64::NAN, 1.0, 0.0, 0.0, 1.0, 1.0]).answer();
        assert!(gelu[0].is_nan() && gelu[2].is_nan() && !gelu[1].is_nan(), "{gelu:?}");
        let silu = Request::of(&[31, 1, narrow, 1]).and(&[f64::NAN, 1.0, 1.0]).answer();
        assert!(silu.iter().all(|x| x.is_nan()), "{silu:?}");
    }
}
