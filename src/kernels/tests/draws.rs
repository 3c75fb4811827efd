//! Tests of the draws of several layers in one launch against the elementary operations, in double precision.

use candle_core::{Device, Result, Tensor, Var};

use super::{assert_close, stream, Request};
use crate::dist::{wishart::fill_bartlett, Covariance, Dirichlet, Estimator};
use crate::noise::{Noise, Purpose};
use crate::ops::{add_scaled_rows, OpPath};

/// One layer of a request: its sizes, constants and parameters.
struct Layer {
    sizes: [usize; 3],
    covariance: Covariance,
    df: f64,
    eps: f64,
    /// rho, c, A and the gradient of A_eff.
    values: [Vec<f64>; 4],
}

impl Layer {
    fn new(place: u64, (r, n, width, covariance): (usize, usize, usize, Covariance)) -> Self {
        let values = |which: u64, len: usize, scale: f64| {
            let mut xs = vec![0f32; len];
            Noise::new(4).stream("values", Purpose::Init).fill_normal_f32(8 * place + which, &mut xs);
            xs.into_iter().map(|x| f64::from((scale * f64::from(x)) as f32)).collect()
        };
        let values =
            [values(0, r, 0.5), values(1, n, 1.0), values(2, r * width, 1.0), values(3, r * width, 1.0)];
        Self { sizes: [r, n, width], covariance, df: r as f64 + 0.5, eps: 0.3, values }
    }

    fn ask(&self, request: Request, keys: [u64; 3]) -> Request {
        let mut request = request;
        request.0.extend(self.sizes.map(|size| size as u64));
        request.0.push(u64::from(self.covariance == Covariance::Diagonal));
        request.0.extend(keys);
        request.and(&[self.df, self.eps]).and(&self.values.concat())
    }
}

#[test]
fn draws_of_several_layers_and_their_gradients_are_those_of_the_elementary_operations() -> Result<()> {
    let streams = [Purpose::Wishart, Purpose::Dirichlet, Purpose::Gaussian].map(stream);
    // One tile, several, and tiles narrower than 64; more threads than rows and fewer; a partial last tile.
    let cases = [
        (1, 1, 3, Covariance::Full),
        (8, 4, 70, Covariance::Full),
        (8, 4, 70, Covariance::Diagonal),
        (40, 70, 130, Covariance::Full),
        (100, 2, 90, Covariance::Full),
        (3, 0, 200, Covariance::Full),
    ];
    let layers: Vec<Layer> = (0..).zip(cases).map(|(place, case)| Layer::new(place, case)).collect();
    let (draw, keys) = (5, streams.each_ref().map(|stream| stream.key()));
    let request = Request::of(&[40, layers.len() as u64, draw]);
    let answer = layers.iter().fold(request, |request, layer| layer.ask(request, keys)).answer();
    let mut rest = &answer[..];
    for Layer { sizes: [r, n, width], covariance, df, eps, values: [rho, c, a, grad] } in layers {
        let mut next = |len| {
            let (first, others) = rest.split_at(len);
            rest = others;
            first
        };
        let (tril, pi, out) = (next(r * r), next(n), next(r * width));
        let (drho, dc) = (next(r), next(n));

        let ([wishart, dirichlet, gaussian], device) = (&streams, Device::Cpu);
        let mut t = vec![0.0; r * r];
        fill_bartlett(wishart, draw, r, df, covariance, &mut t)?;
        assert_close(tril, &t, 2e-7, "T");
        let mut z = vec![0f32; r * width];
        gaussian.fill_normal_f32(draw, &mut z);
        let matrix = |xs: Vec<f64>| Tensor::from_vec(xs, (r, width), &device);
        let z = matrix(z.into_iter().map(f64::from).collect())?;
        let t = Tensor::from_vec(t, (r, r), &device)?;
        let (rho, c) = (Var::new(rho, &device)?, Var::new(c, &device)?);
        let mut scales = (rho.exp()? * eps)?;
        if n > 0 {
            let mut uniforms = vec![0.0; n];
            Estimator::Exact.fill_noise(dirichlet, draw, &mut uniforms);
            let weights = Dirichlet::new(&c)?.rsample(Estimator::Exact, &Tensor::new(uniforms, &device)?)?;
            assert_close(pi, &weights.to_vec1()?, 1e-10, "pi");
            scales = scales.broadcast_mul(&weights.sqr()?.sum_all()?.sqrt()?)?;
        }
        let want = add_scaled_rows(&matrix(a)?, &scales, &t.matmul(&z)?, OpPath::Fused)?;
        let error = (&want - matrix(out.to_vec())?)?.abs()?.max_all()?.to_scalar::<f64>()?;
        let size = want.abs()?.max_all()?.to_scalar::<f64>()?;
        assert!(error < 1e-6 * size, "{r} {n} {width}: {error} of {size}");
        let grads = (want * matrix(grad)?)?.sum_all()?.backward()?;
        let compare = |got: &[f64], var: &Var, what: &str| -> Result<()> {
            let want = match grads.get(var) {
                Some(want) => want.to_vec1::<f64>()?,
                None => vec![0.0; got.len()],
            };
            let size = want.iter().fold(0f64, |m, x| m.max(x.abs()));
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                assert!((got - want).abs() <= 2e-6 * size, "{what} {i} of {r} {n} {width}: {got} {want}");
            }
            Ok(())
        };
        compare(drho, &rho, "drho")?;
        compare(dc, &c, "dc")?;
    }
    Ok(())
}

#[test]
fn nan_in_a_concentration_is_nan_in_the_draw_of_its_layer_alone() {
    let layer = |c: [f64; 3]| {
        let values = [vec![0.1, 0.0], c.to_vec(), vec![1.0, 2.0], vec![0.5, 0.5]];
        Layer { sizes: [2, 3, 1], covariance: Covariance::Full, df: 2.0, eps: 1.0, values }
    };
    let good = layer([0.1, 0.2, 0.3]);
    for c in [[0.1, f64::NAN, 0.2], [f64::NAN, 0.1, 0.2], [0.1, 0.2, f64::INFINITY]] {
        let keys = [1, 2, 3];
        let answer = layer(c).ask(good.ask(Request::of(&[40, 2, 4]), keys), keys).answer();
        let (good, bad) = answer.split_at(answer.len() / 2);
        let a = 4 + 3..4 + 3 + 2; // after T and pi
        assert!(good[a.clone()].iter().all(|x| x.is_finite()), "{answer:?}");
        assert!(bad[a].iter().all(|x| x.is_nan()), "{answer:?}");
    }
}
