//! Tests of the regulariser of several layers in one launch against the formulas of the distributions,
//! in double precision.

use candle_core::{Device, Result, Tensor, Var};

use super::{assert_close, Request};
use crate::dist::{Covariance, Dirichlet, Gaussian, Wishart};
use crate::noise::{Noise, Purpose};

#[test]
fn divergences_of_several_layers_and_their_slopes_are_those_of_the_distributions() -> Result<()> {
    // More numbers than a block has threads, only one of each, both covariances, different priors.
    let cases = [
        (4, 3, Covariance::Full, 4.0, 1.0),
        (40, 70, Covariance::Full, 41.5, 0.3),
        (1, 1, Covariance::Full, 0.5, 2.0),
        (6, 4, Covariance::Diagonal, 7.0, 1.0),
    ];
    let (kl, cooperative, device) = (0.7, 1.3, &Device::Cpu);
    let values = |which: u64, len: usize| -> Vec<f64> {
        let mut xs = vec![0f32; len];
        Noise::new(6).stream("values", Purpose::Init).fill_normal_f32(which, &mut xs);
        xs.into_iter().map(|x| f64::from(0.7 * x)).collect()
    };
    let mut request = Request::of(&[41, cases.len() as u64]).and(&[kl, cooperative]);
    let (mut means, mut total, mut parameters) = ([0.0; 4], None::<Tensor>, Vec::new());
    for (which, (r, n, covariance, df, prior)) in (0..).zip(cases) {
        let (rho, c) = (values(2 * which, r), values(2 * which + 1, n));
        request.0.extend([r as u64, n as u64, u64::from(covariance == Covariance::Diagonal)]);
        request = request.and(&[df, prior]).and(&rho).and(&c);
        let (rho, c) = (Var::new(rho, device)?, Var::new(c, device)?);
        let (wishart, dirichlet) = (Wishart::new(&rho, df, covariance)?, Dirichlet::new(&c)?);
        let terms = [
            Gaussian::expected_kl_standard(&wishart)?,
            wishart.kl_standard()?,
            Dirichlet::kl_of_terms(dirichlet.kl_terms_symmetric(prior)?)?,
            dirichlet.expected_cooperative()?,
        ];
        for (mean, term) in means.iter_mut().zip(&terms) {
            *mean += term.to_scalar::<f64>()? / cases.len() as f64;
        }
        let [gaussian, wishart, dirichlet, weights] = terms;
        let own = ((((gaussian + wishart)? + dirichlet)? * kl)? + (weights * cooperative)?)?;
        total = Some(match total {
            Some(total) => (total + own)?,
            None => own,
        });
        parameters.extend([rho, c]);
    }
    let total = (total.expect("some layers") / cases.len() as f64)?;
    let grads = total.backward()?;
    let mut want = means.to_vec();
    want.push(total.to_scalar()?);
    let answer = request.answer();
    assert_close(&answer[..5], &want, 1e-6, "means and total");
    let mut rest = &answer[5..];
    for (i, parameter) in parameters.iter().enumerate() {
        let want = grads.get(parameter).expect("a gradient").to_vec1::<f64>()?;
        let (got, others) = rest.split_at(want.len());
        let size = want.iter().fold(0f64, |m, x| m.max(x.abs()));
        for (got, want) in got.iter().zip(&want) {
            // With one component, the gradient is 0 up to rounding.
            assert!((got - want).abs() <= 1e-6 * size + 1e-12, "parameter {i}: {got} {want}");
        }
        rest = others;
    }
    assert!(rest.is_empty());
    Ok(())
}
