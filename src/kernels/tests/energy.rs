//! Tests of priors in two launches against the operations that they replace, in double precision.

use candle_core::{Device, Result, Tensor, Var};

use super::{assert_close, Request};
use crate::dist::Dirichlet;
use crate::noise::{Noise, Purpose};
use crate::ops::{update_energy, OpPath};

fn values(which: u64, len: usize) -> Vec<f64> {
    let mut xs = vec![0f32; len];
    Noise::new(9).stream("values", Purpose::Init).fill_normal_f32(which, &mut xs);
    xs.into_iter().map(|x| f64::from(0.6 * x)).collect()
}

/// Asserts equality up to single precision, to which differences are rounded, relative to the largest number.
fn assert_near(got: &[f64], want: &[f64], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let size = want.iter().fold(1e-30f64, |m, x| m.max(x.abs()));
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() <= 3e-7 * size, "{what} {i}: {got}, on the host {want} of {size}");
    }
}

#[test]
fn energies_of_several_tensors_and_updates_and_their_slopes_are_those_of_the_operations() -> Result<()> {
    let device = &Device::Cpu;
    // More elements than the threads of all blocks, fewer; distances from a start and from zero.
    let tensors = [(250, true, 0.7), (5, false, 11.0), (33, true, 0.02)];
    // More elements of a Gram matrix and more components than a block has threads, only one of each; without
    // a perturbation, without components.
    let layers = [(4, 3, true), (7, 40, true), (1, 1, true), (5, 0, false), (3, 0, true)];
    let mut request = Request::of(&[42, tensors.len() as u64, 3, layers.len() as u64]);
    let (mut of_distances, mut want) = (0.0, Vec::new());
    for (which, (count, centred, weight)) in (0..).zip(tensors) {
        let (at, from) = (values(2 * which, count), values(2 * which + 1, count));
        request.0.extend([count as u64, u64::from(centred)]);
        request = request.and(&[weight]).and(&at);
        let from = if centred { from } else { vec![0.0; count] };
        if centred {
            request = request.and(&from);
        }
        let away: Vec<f64> = at.iter().zip(&from).map(|(at, from)| at - from).collect();
        of_distances += weight / 2.0 * away.iter().map(|x| x * x).sum::<f64>();
        want.push(away.iter().map(|x| weight * x).collect::<Vec<f64>>());
    }
    let mut total = of_distances;
    for (which, (r, n, spread)) in (0..).zip(layers) {
        let (weight, factor, in_dim, out_dim) = (0.9 + which as f64, 0.3, 11, 6);
        let of = |offset: u64, shape: &[usize]| -> Result<Var> {
            let len = shape.iter().product();
            Var::from_tensor(&Tensor::from_vec(values(100 + 4 * which + offset, len), shape, device)?)
        };
        let (a, b) = (of(0, &[1, r, in_dim])?, of(1, &[1, out_dim, r])?);
        let (rho, c) = (of(2, &[1, r])?, of(3, &[1, n.max(1)])?);
        let grams = [a.matmul(&a.t()?)?, b.t()?.matmul(&b)?];
        let grams = grams.map(|gram| gram.flatten_all()?.to_vec1::<f64>());
        let [inner, outer] = grams.map(|gram| gram.expect("a matrix"));
        request.0.extend([r as u64, n as u64, u64::from(spread)]);
        request = request.and(&[weight, factor]).and(&inner).and(&outer);
        let square = if n > 0 {
            Dirichlet::new(&c)?.expected_cooperative()?
        } else {
            Tensor::ones(1, c.dtype(), device)?
        };
        let variances = if spread {
            request = request.and(&rho.flatten_all()?.to_vec1::<f64>()?);
            ((rho.as_tensor() * 2.0)?.exp()?.broadcast_mul(&square.unsqueeze(1)?)? * factor)?
        } else {
            rho.zeros_like()?
        };
        if n > 0 {
            request = request.and(&c.flatten_all()?.to_vec1::<f64>()?);
        }
        let energy = update_energy(&a, &b, &variances, &[weight], OpPath::Reference)?;
        total += energy.to_scalar::<f64>()?;
        let grads = energy.backward()?;
        let slopes = |var: &Var| -> Result<Vec<f64>> {
            grads.get(var).map_or_else(|| Ok(Vec::new()), |grad| grad.flatten_all()?.to_vec1())
        };
        if spread {
            want.push([slopes(&rho)?, if n > 0 { slopes(&c)? } else { Vec::new() }].concat());
        }
        let v = variances.flatten_all()?.to_vec1::<f64>()?;
        let on_diagonal = |i: usize| if i / r == i % r { v[i / r] } else { 0.0 };
        want.push(inner.iter().enumerate().map(|(i, x)| weight * (x + on_diagonal(i))).collect());
        want.push(outer.iter().map(|x| weight * x).collect());
    }
    let answer = request.answer();
    assert_close(&answer[..2], &[of_distances, total], 1e-6, "energies");
    let mut rest = &answer[2..];
    for (i, want) in want.iter().enumerate() {
        let (got, others) = rest.split_at(want.len());
        assert_near(got, want, &format!("part {i}"));
        rest = others;
    }
    assert!(rest.is_empty());
    Ok(())
}
