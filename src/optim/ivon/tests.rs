use candle_core::DType;
use serde_json::Value;

use super::*;
use crate::adapter::{Init, Role};

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().expect("an array").iter().map(|x| x.as_f64().expect("a number")).collect()
}

fn assert_close(what: &str, got: &Tensor, want: &Value) -> Result<()> {
    let (got, want) = (got.to_vec1::<f64>()?, numbers(want));
    let near = got.iter().zip(&want).all(|(got, want)| (got - want).abs() < 1e-12 * (1.0 + want.abs()));
    assert!(near && got.len() == want.len(), "{what}: {got:?} against {want:?}");
    Ok(())
}

fn store(size: usize) -> Result<(Params, Tensor)> {
    let params = Params::with_dtype(Noise::new(2), DType::F64, &Device::Cpu);
    let w = params.create("w", Role::Base, size, &Init::Normal(1.0))?;
    Ok((params, w))
}

/// `1/2 w^T Q w - b^T w`.
fn quadratic(w: &Tensor, q: &Tensor, b: &Tensor) -> Result<Tensor> {
    let column = w.unsqueeze(1)?;
    Ok(((column.t()?.matmul(&q.matmul(&column)?)? * 0.5)?.sum_all()? - (w * b)?.sum_all()?)?)
}

#[test]
fn its_steps_are_those_of_algorithm_1_in_numpy() -> Result<()> {
    // tests/data/make_ivon_golden.py
    let golden: Value =
        serde_json::from_str(include_str!("../../../tests/data/ivon_golden.json")).expect("JSON");
    let vector = |value: &Value| Tensor::new(numbers(value), &Device::Cpu);
    let rows = |value: &Value| -> Vec<Value> { value.as_array().expect("rows").clone() };
    let q = rows(&golden["q"]).iter().map(vector).collect::<candle_core::Result<Vec<_>>>()?;
    let q = Tensor::stack(&q, 0)?;
    let (params, w) = store(5)?;
    params.set("w", &vector(&golden["start"])?)?;
    let config = IvonConfig {
        ess: 50.0,
        initial_hessian: 0.3,
        weight_decay: 0.02,
        beta1: 0.9,
        beta2: 0.95,
        clip_radius: 0.8,
    };
    let mut ivon = Ivon::new(&params, config.clone())?;
    for (step, after) in rows(&golden["after"]).iter().enumerate() {
        // Halfway, another optimiser continues from the state.
        if step == 2 {
            let remembered = ivon.remembered().clone();
            ivon = Ivon::new(&params, config.clone())?;
            ivon.restore(&remembered)?;
        }
        let mut grads = Gradients::new();
        for (z, b) in rows(&golden["noise"][step]).iter().zip(rows(&golden["b"])) {
            ivon.perturb_by(|_, _| vector(z))?;
            let store = (quadratic(&w, &q, &vector(&b)?)? * 0.5)?.backward()?;
            grads.accumulate(&params, &store)?;
            ivon.observe(&store)?;
        }
        ivon.step(&grads, 0.1)?;
        let Moments { first, second, steps } = &ivon.remembered()["w"];
        assert_eq!(*steps, step + 1);
        assert_close("m", &w, &after["m"])?;
        assert_close("g", first, &after["g"])?;
        assert_close("h", second, &after["h"])?;
    }
    Ok(())
}

/// Asserts a mean by its z-score.
fn assert_mean(what: &str, want: f64, draws: &[f64]) {
    let n = draws.len() as f64;
    let mean = draws.iter().sum::<f64>() / n;
    let square = draws.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
    let z = (mean - want) / (square / n).sqrt();
    assert!(z.abs() < 5.0, "{what}: {mean} against {want}, z {z}");
}

#[test]
fn draws_have_sigma_and_the_curvature_seen_along_them_is_the_hessians_diagonal() -> Result<()> {
    let (params, w) = store(2)?;
    let q = Tensor::new(&[[0.7, 0.3], [0.3, 1.9]], &Device::Cpu)?;
    let (b, mean) = (Tensor::new(&[0.2, -0.4], &Device::Cpu)?, w.to_vec1::<f64>()?);
    let config = IvonConfig { ess: 20.0, initial_hessian: 0.5, weight_decay: 0.1, ..Default::default() };
    let mut ivon = Ivon::new(&params, config.clone())?;
    let (mut squares, mut curvatures) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    for draw in 0..40_000 {
        ivon.perturb(draw)?;
        let at = w.to_vec1::<f64>()?;
        (0..2).for_each(|i| squares[i].push((at[i] - mean[i]).powi(2)));
        ivon.observe(&quadratic(&w, &q, &b)?.backward()?)?;
        let seen = ivon.curvature["w"].to_vec1::<f64>()?;
        (0..2).for_each(|i| curvatures[i].push(seen[i]));
        assert_eq!(w.to_vec1::<f64>()?, mean, "the means are back");
        ivon.skip()?;
    }
    for (i, want) in [0.7, 1.9].into_iter().enumerate() {
        assert_mean("sigma^2", 1.0 / (20.0 * 0.6), &squares[i]);
        assert_mean("h_hat", want, &curvatures[i]);
    }
    // Predictive draws have the same distribution and other noise; they come in pairs around the means.
    let posterior = IvonPosterior::new(&params, ivon.remembered(), &config)?;
    let pair = [6, 7].map(|draw| posterior.draw(draw)?["w"].to_vec1::<f64>().map_err(Error::from));
    let [one, opposite] = pair;
    for ((x, y), mean) in one?.into_iter().zip(opposite?).zip(&mean) {
        assert!((0.5 * (x + y) - mean).abs() < 1e-14 && (x - y).abs() > 1e-6, "{x} {y} {mean}");
    }
    let draws = (0..40_000).map(|draw| Ok(posterior.draw(2 * draw)?["w"].to_vec1::<f64>()?));
    let draws = draws.collect::<Result<Vec<_>>>()?;
    let off: Vec<f64> = draws.iter().map(|draw| draw[0] - mean[0]).collect();
    assert_mean("mean", 0.0, &off);
    assert_mean("variance", 1.0 / (20.0 * 0.6), &off.iter().map(|x| x * x).collect::<Vec<_>>());
    assert!(off.iter().zip(&squares[0]).all(|(x, square)| x * x != *square));
    Ok(())
}

#[test]
fn a_step_without_draws_and_constants_outside_their_domain_are_named() -> Result<()> {
    let (params, w) = store(2)?;
    let mut ivon = Ivon::new(&params, IvonConfig::default())?;
    let mut grads = Gradients::new();
    let error = ivon.step(&grads, 0.1).unwrap_err().to_string();
    assert!(error.contains("w") && error.contains("no gradient"), "{error}");
    grads.accumulate(&params, &w.sqr()?.sum_all()?.backward()?)?;
    let error = ivon.step(&grads, 0.1).unwrap_err().to_string();
    assert!(error.contains("no draw"), "{error}");
    for (option, config) in [
        ("ess", IvonConfig { ess: 0.0, ..Default::default() }),
        ("initial_hessian", IvonConfig { initial_hessian: f64::NAN, ..Default::default() }),
        ("weight_decay", IvonConfig { weight_decay: -1.0, ..Default::default() }),
        ("clip_radius", IvonConfig { clip_radius: 0.0, ..Default::default() }),
        ("beta2", IvonConfig { beta2: 1.0, ..Default::default() }),
    ] {
        let error = Ivon::new(&params, config).unwrap_err().to_string();
        assert!(error.contains(option), "{error}");
    }
    Ok(())
}

#[test]
fn it_goes_on_from_a_hessian_below_zero_as_long_as_the_decay_keeps_it_positive() -> Result<()> {
    let (params, w) = store(2)?;
    let decay = IvonConfig { weight_decay: 0.02, ..IvonConfig::default() };
    let with = |second: f64| -> Result<BTreeMap<String, Moments>> {
        let second = Tensor::new(&[0.3, second], w.device())?;
        Ok([("w".to_string(), Moments { first: w.zeros_like()?, second, steps: 3 })].into())
    };
    Ivon::new(&params, decay.clone())?.restore(&with(-0.01)?)?;
    for (config, second) in [(decay, -0.03), (IvonConfig::default(), -0.01)] {
        let error = Ivon::new(&params, config)?.restore(&with(second)?).unwrap_err().to_string();
        assert!(error.contains("second moment below"), "{error}");
    }
    Ok(())
}
