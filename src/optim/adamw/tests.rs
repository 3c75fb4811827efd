//! AdamW against PyTorch, and its errors.

use candle_core::{DType, Device};

use super::*;
use crate::adapter::Init;
use crate::noise::Noise;

fn store(role: Role) -> Result<(Params, Tensor)> {
    let params = Params::with_dtype(Noise::new(1), DType::F64, &Device::Cpu);
    let w = params.create("w", role, 3, &Init::Constant(0.0))?;
    params.set("w", &Tensor::new(&[1.0, -2.0, 0.5], &Device::Cpu)?)?;
    Ok((params, w))
}

fn step(optimizer: &mut AdamW, params: &Params, w: &Tensor, grad: [f64; 3], lr: f64) -> Result<()> {
    let loss = (w * Tensor::new(&grad, &Device::Cpu)?)?.sum_all()?;
    let mut grads = Gradients::new();
    grads.accumulate(params, &loss.backward()?)?;
    optimizer.step(&grads, lr)
}

#[test]
fn three_steps_are_those_of_torch() -> Result<()> {
    // w = torch.tensor([1., -2., .5], dtype=torch.float64)
    // torch.optim.AdamW([w], lr=0.1, weight_decay=0.05) with the gradients below
    let (params, w) = store(Role::Base)?;
    let mut optimizer = AdamW::new(&params, AdamWConfig { weight_decay: 0.05, ..Default::default() })?;
    let grads = [[0.3, -0.2, 1.0], [0.1, 0.4, -0.5], [-0.7, 0.05, 0.2]];
    let expected = [
        [0.8950000033333332, -1.8900000049999996, 0.397500001],
        [0.8034186121405289, -1.9171603565210367, 0.3688787973659032],
        [0.8299285178080283, -1.9428011583709783, 0.33551004721602257],
    ];
    for (grad, expected) in grads.into_iter().zip(expected) {
        step(&mut optimizer, &params, &w, grad, 0.1)?;
        for (got, expected) in w.to_vec1::<f64>()?.into_iter().zip(expected) {
            assert!((got - expected).abs() < 1e-12, "{got} {expected}");
        }
    }
    assert_eq!(optimizer.moments("w")?.map(|moments| moments.steps), Some(3));
    Ok(())
}

#[test]
fn the_posterior_is_not_decayed() -> Result<()> {
    for (role, decayed) in [(Role::A, true), (Role::LogStd, false), (Role::Concentration, false)] {
        let (params, w) = store(role)?;
        let mut optimizer = AdamW::new(&params, AdamWConfig { weight_decay: 0.5, ..Default::default() })?;
        step(&mut optimizer, &params, &w, [0.0; 3], 0.1)?;
        assert_eq!(w.to_vec1::<f64>()? != [1.0, -2.0, 0.5], decayed, "{role:?}");
    }
    Ok(())
}

#[test]
fn a_parameter_that_takes_the_name_of_another_begins_anew() -> Result<()> {
    let (params, w) = store(Role::A)?;
    let mut optimizer = AdamW::new(&params, AdamWConfig::default())?;
    step(&mut optimizer, &params, &w, [0.3, -0.2, 1.0], 0.1)?;
    params.remove("w");
    let longer = params.create("w", Role::A, 5, &Init::Constant(0.0))?;
    let grad = Tensor::new(&[1.0, 1.0, 1.0, -1.0, -1.0], &Device::Cpu)?;
    optimizer.backward_step(&(&longer * grad)?.sum_all()?)?;
    // The size of a first step is the learning rate, whatever the gradient's size, for all five numbers.
    let rate = AdamWConfig::default().lr;
    for (got, sign) in longer.to_vec1::<f64>()?.into_iter().zip([-1.0, -1.0, -1.0, 1.0, 1.0]) {
        assert!((got - sign * rate).abs() < 1e-6 * rate, "{got}");
    }
    assert_eq!(optimizer.moments("w")?.map(|moments| moments.steps), Some(1));
    // The state of removed parameters is dropped, and the remaining state can be restored.
    params.remove("w");
    let other = params.create("v", Role::A, 2, &Init::Constant(0.0))?;
    optimizer.backward_step(&other.sum_all()?)?;
    assert_eq!(optimizer.remembered().keys().collect::<Vec<_>>(), ["v"]);
    let remembered = optimizer.remembered().clone();
    optimizer.restore(&remembered)
}

#[test]
fn missing_gradients_and_bad_constants_are_named() -> Result<()> {
    let (params, _) = store(Role::A)?;
    let mut optimizer = AdamW::new(&params, AdamWConfig::default())?;
    let error = optimizer.step(&Gradients::new(), 0.1).unwrap_err().to_string();
    assert!(error.contains("tensor w"), "{error}");
    let good = AdamWConfig::default;
    for (name, config) in [
        ("lr", AdamWConfig { lr: -1e-3, ..good() }),
        ("beta1", AdamWConfig { beta1: -0.1, ..good() }),
        ("beta1", AdamWConfig { beta1: f64::NAN, ..good() }),
        ("beta2", AdamWConfig { beta2: 1.0, ..good() }),
        ("eps", AdamWConfig { eps: 0.0, ..good() }),
        ("eps", AdamWConfig { eps: f64::INFINITY, ..good() }),
        ("weight_decay", AdamWConfig { weight_decay: -0.01, ..good() }),
    ] {
        let error = AdamW::new(&params, config).unwrap_err().to_string();
        assert!(error.starts_with(&format!("invalid {name}: ")), "{name}: {error}");
    }
    Ok(())
}

#[test]
fn single_precision_steps_are_those_of_torch_too() -> Result<()> {
    // As above in f32, where steps are in place.
    let params = Params::new(Noise::new(1), &Device::Cpu);
    let w = params.insert("w", Role::Base, &Tensor::new(&[1f32, -2.0, 0.5], &Device::Cpu)?)?;
    let mut optimizer = AdamW::new(&params, AdamWConfig { weight_decay: 0.05, ..Default::default() })?;
    for grad in [[0.3f32, -0.2, 1.0], [0.1, 0.4, -0.5], [-0.7, 0.05, 0.2]] {
        let loss = (&w * Tensor::new(&grad, &Device::Cpu)?)?.sum_all()?;
        let mut grads = Gradients::new();
        grads.accumulate(&params, &loss.backward()?)?;
        optimizer.step(&grads, 0.1)?;
    }
    let expected = [0.8299285178080283, -1.9428011583709783, 0.33551004721602257];
    for (got, expected) in w.to_vec1::<f32>()?.into_iter().zip(expected) {
        assert!((f64::from(got) - expected).abs() < 1e-6, "{got} {expected}");
    }
    Ok(())
}

#[test]
fn an_optimiser_continues_from_another_bit_for_bit() -> Result<()> {
    let grads = [[0.3, -0.2, 1.0], [0.1, 0.4, -0.5], [-0.7, 0.05, 0.2], [0.2, 0.1, -0.3]];
    let (whole, w) = store(Role::Base)?;
    let mut optimizer = AdamW::new(&whole, AdamWConfig::default())?;
    for grad in grads {
        step(&mut optimizer, &whole, &w, grad, 0.1)?;
    }
    let (params, again) = store(Role::Base)?;
    let mut first = AdamW::new(&params, AdamWConfig::default())?;
    assert!(first.moments("w")?.is_none());
    for grad in &grads[..2] {
        step(&mut first, &params, &again, *grad, 0.1)?;
    }
    let moments = first.moments("w")?.unwrap();
    let mut second = AdamW::new(&params, AdamWConfig::default())?;
    second.restore(&[("w".to_string(), moments.clone())].into())?;
    for grad in &grads[2..] {
        step(&mut second, &params, &again, *grad, 0.1)?;
    }
    assert_eq!(w.to_vec1::<f64>()?, again.to_vec1::<f64>()?);
    Ok(())
}

#[test]
fn vectors_are_decayed_unless_told_otherwise() -> Result<()> {
    for (decay_vectors, decayed) in [(true, true), (false, false)] {
        let (params, w) = store(Role::Base)?;
        let config = AdamWConfig { weight_decay: 0.5, decay_vectors, ..Default::default() };
        let mut optimizer = AdamW::new(&params, config)?;
        step(&mut optimizer, &params, &w, [0.0; 3], 0.1)?;
        assert_eq!(w.to_vec1::<f64>()? != [1.0, -2.0, 0.5], decayed);
    }
    Ok(())
}

#[test]
fn a_step_that_fails_changes_nothing() -> Result<()> {
    let (params, w) = store(Role::A)?;
    params.create("x", Role::A, 1, &Init::Constant(1.0))?;
    let mut optimizer = AdamW::new(&params, AdamWConfig::default())?;
    let mut grads = Gradients::new();
    params.set_trainable(Role::A, false);
    params.create("v", Role::B, 1, &Init::Constant(1.0))?;
    grads.accumulate(&params, &params.get("v").unwrap().var.sqr()?.sum_all()?.backward()?)?;
    params.set_trainable(Role::A, true); // v has a gradient; w and x have none
    assert!(optimizer.step(&grads, 0.1).is_err());
    assert_eq!(params.get("v").unwrap().var.to_vec1::<f64>()?, [1.0]);
    assert_eq!((w.to_vec1::<f64>()?, optimizer.moments("w")?.is_none()), (vec![1.0, -2.0, 0.5], true));
    Ok(())
}

#[test]
fn a_parameter_that_is_released_later_begins_as_the_first_ones_did() -> Result<()> {
    let (params, w) = store(Role::Base)?;
    let x = params.create("x", Role::Head, 3, &Init::Constant(0.0))?;
    let mut optimizer = AdamW::new(&params, AdamWConfig { weight_decay: 0.0, ..Default::default() })?;
    params.set_trainable(Role::Head, false);
    for _ in 0..50 {
        step(&mut optimizer, &params, &w, [0.3, -0.2, 1.0], 0.1)?;
    }
    params.set_trainable(Role::Head, true);
    step(&mut optimizer, &params, &(&w + &x)?, [0.3, -0.2, 1.0], 0.1)?;
    // The size of Adam's first step is the learning rate, whatever the gradient's size.
    for (got, expected) in x.to_vec1::<f64>()?.into_iter().zip([-0.1, 0.1, -0.1]) {
        assert!((got - expected).abs() < 1e-6, "{got} {expected}");
    }
    let steps = |name| Ok::<_, Error>(optimizer.moments(name)?.map(|moments| moments.steps));
    assert_eq!((steps("w")?, steps("x")?), (Some(51), Some(1)));
    Ok(())
}

#[test]
fn moments_that_do_not_fit_are_named_and_change_nothing() -> Result<()> {
    let (params, w) = store(Role::Base)?;
    let mut optimizer = AdamW::new(&params, AdamWConfig::default())?;
    step(&mut optimizer, &params, &w, [0.3, -0.2, 1.0], 0.1)?;
    let good = optimizer.moments("w")?.unwrap();
    let mut refusal = |moments: &[(&str, Moments)]| {
        let moments = moments.iter().map(|(name, moments)| (name.to_string(), moments.clone())).collect();
        optimizer.restore(&moments).unwrap_err().to_string()
    };
    let values = |bad: f64| Tensor::new(&[0.1, bad, 0.1], &Device::Cpu);
    assert_eq!(refusal(&[]), "tensor w: there are no moments of this trainable parameter");
    let error = refusal(&[("w", good.clone()), ("z", good.clone())]);
    assert!(error.contains("tensor z: there is no parameter"), "{error}");
    let error = refusal(&[("w", Moments { second: good.second.narrow(0, 0, 2)?, ..good.clone() })]);
    assert!(error.contains("tensor w: expected moments of shape [3], got [2]"), "{error}");
    let integers = good.second.to_dtype(DType::U32)?;
    let error = refusal(&[("w", Moments { second: integers, ..good.clone() })]);
    assert!(error.contains("tensor w: expected moments of F64, F32, F16 or BF16, got U32"), "{error}");
    for bad in [
        Moments { first: values(f64::NAN)?, ..good.clone() },
        Moments { first: values(f64::INFINITY)?, ..good.clone() },
        Moments { second: values(f64::INFINITY)?, ..good.clone() },
        Moments { second: values(-1e-3)?, ..good.clone() },
    ] {
        let error = refusal(&[("w", bad)]);
        assert!(error.contains("tensor w: its moments hold NaN"), "{error}");
    }
    assert_eq!(optimizer.moments("w")?.unwrap().first.to_vec1::<f64>()?, good.first.to_vec1::<f64>()?);
    Ok(())
}
