//! Contracts of the adapters, in general position: alpha != r, not square, B not zero.

use candle_core::{DType, Device, Tensor};
use candle_nn::{Linear, Module, ModuleT};
use monteclora::adapter::{Adapter, Context, DrawCache, Params, Pass, ScalerFactors};
use monteclora::adapters::{Lora, LoraConfig, LoraLinear};
use monteclora::noise::Noise;
use monteclora::{Mixture, MonteCLoRA, MonteCLoRAConfig, MonteCLoRALinear, MAX_BUFFER_SIZE};

use crate::{assert_close, assert_mean, base, normals, shake, store, Result};

fn config() -> MonteCLoRAConfig {
    MonteCLoRAConfig { rank: 3, alpha: 5.0, num_components: 4, sample_scaler: 0.3, ..Default::default() }
}

fn linear(params: &Params, config: &MonteCLoRAConfig) -> Result<MonteCLoRALinear> {
    Ok(MonteCLoRALinear::new(base(6, 4)?, params, "proj", config)?)
}

const TRAIN: Pass = Pass::Train { draw: 2 };

#[test]
fn with_b_at_zero_every_pass_is_the_base() -> Result<()> {
    let xs = normals("xs", &[2, 5, 6])?;
    let config = MonteCLoRAConfig { dropout: 0.3, ..config() };
    let layer = linear(&store(1), &config)?;
    let want = xs.apply(layer.base())?;
    for pass in [Pass::Mean, TRAIN, Pass::Posterior { draw: 2 }] {
        assert_close("output", &layer.forward_with(&xs, &pass.into())?, &want, 0.0)?;
    }
    Ok(())
}

#[test]
fn the_mean_is_plain_lora_with_the_same_pair() -> Result<()> {
    let xs = normals("xs", &[2, 5, 6])?;
    let (params, other) = (store(1), store(1));
    let layer = linear(&params, &config())?;
    let lora = Lora::new(
        &other,
        "proj",
        "default",
        (6, 4),
        &LoraConfig { rank: 3, alpha: 5.0, ..Default::default() },
    )?;
    shake(&params)?;
    shake(&other)?;
    let want = lora.forward(&xs, layer.base(), &Pass::Mean.into())?;
    assert_close("mean", &layer.forward_with(&xs, &Pass::Mean.into())?, &want, 0.0)?;
    assert_close("view", &layer.mean().forward(&xs)?, &want, 0.0)?;
    assert_close("forward_t", &layer.forward_t(&xs, false)?, &want, 0.0)?;
    // The mean equals the base with the weight W0 + s B A.
    let delta = layer.adapter().delta(layer.base(), &Pass::Mean.into())?.ok_or("no delta")?;
    let merged = Linear::new((layer.base().dequantize()?.weight() + &delta)?, layer.base().bias().cloned());
    assert_close("merged", &want, &merged.forward(&xs)?, 1e-13)?;
    let pair = layer.adapter().low_rank();
    assert_close("delta", &delta, &(pair.b().matmul(pair.a())? * (5.0 / 3.0))?, 1e-14)?;
    let bare = xs.apply(layer.base())?;
    assert!((want - bare)?.abs()?.mean_all()?.to_scalar::<f64>()? > 0.1);
    Ok(())
}

#[test]
fn a_draw_repeats_and_training_predictive_and_other_draws_differ() -> Result<()> {
    let (params, xs) = (store(1), normals("xs", &[5, 6])?);
    let layer = linear(&params, &config())?;
    shake(&params)?;
    let at = |pass: Pass| -> Result<Vec<f64>> {
        Ok(layer.forward_with(&xs, &pass.into())?.flatten_all()?.to_vec1()?)
    };
    let passes = [
        Pass::Mean,
        TRAIN,
        Pass::Train { draw: 3 },
        Pass::Posterior { draw: 2 },
        Pass::Posterior { draw: 3 },
    ];
    let first = passes.map(|pass| at(pass).unwrap());
    for (i, pass) in passes.into_iter().enumerate() {
        assert_eq!(at(pass)?, first[i]);
        assert!(first[..i].iter().all(|other| *other != first[i]));
    }
    // `forward_t` counts its draws: 0, 1, 2.
    assert_eq!(layer.next_draw(), 0);
    layer.forward_t(&xs, true)?;
    layer.forward_t(&xs, true)?;
    assert_eq!(layer.forward_t(&xs, true)?.flatten_all()?.to_vec1::<f64>()?, first[1]);
    layer.set_next_draw(2);
    assert_eq!(layer.forward_t(&xs, true)?.flatten_all()?.to_vec1::<f64>()?, first[1]);
    Ok(())
}

#[test]
fn a_predictive_draw_shares_no_part_of_its_noise_with_training() -> Result<()> {
    for mixture in [Mixture::Collapsed, Mixture::Explicit, Mixture::Sparse] {
        let params = store(1);
        let layer = linear(&params, &MonteCLoRAConfig { mixture, ..config() })?;
        let parts = |pass: Pass| -> Result<[Vec<f64>; 3]> {
            let draw = layer.adapter().draw(&pass.into())?.ok_or("no draw")?;
            let flat = |t: Tensor| t.flatten_all()?.to_vec1::<f64>();
            Ok([flat(draw.scale_tril)?, flat(draw.weights)?, flat(draw.delta)?])
        };
        for draw in [0, 1, 7, (1 << 62) - 1] {
            let (train, predict) = (parts(Pass::Train { draw })?, parts(Pass::Posterior { draw })?);
            for (part, (train, predict)) in
                ["factor", "weights", "delta"].iter().zip(train.iter().zip(&predict))
            {
                // Above the diagonal both factors are zero.
                let same = train.iter().zip(predict).filter(|(a, b)| a == b && **a != 0.0).count();
                assert_eq!(same, 0, "{mixture:?} {part} of draw {draw}");
            }
        }
        for pass in [Pass::Train { draw: 1 << 62 }, Pass::Posterior { draw: 1 << 62 }] {
            let error = layer.forward_with(&normals("xs", &[5, 6])?, &pass.into()).unwrap_err().to_string();
            assert!(error.contains("expected a draw below 2^62, got 4611686018427387904"), "{error}");
        }
    }
    Ok(())
}

#[test]
fn kept_draws_are_the_same_numbers_made_once() -> Result<()> {
    let (params, xs) = (store(1), normals("xs", &[5, 6])?);
    let layer = linear(&params, &config())?;
    shake(&params)?;
    let at =
        |cx: Context| -> Result<Vec<f64>> { Ok(layer.forward_with(&xs, &cx)?.flatten_all()?.to_vec1()?) };
    let draws = [0, 1].map(|draw| Pass::Posterior { draw });
    let before = draws.map(|pass| at(pass.into()).unwrap());
    let training = at(TRAIN.into())?;
    let cache = DrawCache::default();
    let kept = |pass: Pass| at(Context::from(pass).with_draws(&cache));
    assert_eq!(draws.map(|pass| kept(pass).unwrap()), before);
    let name = "proj.default.std_prior";
    params.set(name, &(params.get(name).ok_or("none")?.var.as_tensor() + 1.0)?)?;
    // Posterior draws are kept; training draws never are.
    assert_eq!(draws.map(|pass| kept(pass).unwrap()), before);
    assert_ne!(kept(TRAIN)?, training);
    assert_ne!(at(draws[0].into())?, before[0]);
    Ok(())
}

#[test]
fn the_shift_of_the_output_is_proportional_to_the_scaler() -> Result<()> {
    let xs = normals("xs", &[5, 6])?;
    let shift = |sample_scaler: f64| -> Result<Tensor> {
        let params = store(1);
        let layer = linear(&params, &MonteCLoRAConfig { sample_scaler, ..config() })?;
        shake(&params)?;
        Ok((layer.forward_with(&xs, &TRAIN.into())? - layer.forward_with(&xs, &Pass::Mean.into())?)?)
    };
    assert_close("shift", &shift(0.6)?, &(shift(0.2)? * 3.0)?, 1e-12)?;
    assert!(shift(0.2)?.abs()?.mean_all()?.to_scalar::<f64>()? > 0.01);
    // The shift is s B Delta x, with eps in it once.
    let params = store(1);
    let layer = linear(&params, &MonteCLoRAConfig { sample_scaler: 0.2, ..config() })?;
    shake(&params)?;
    let draw = layer.adapter().draw(&TRAIN.into())?.ok_or("no draw")?;
    let want = (xs.matmul(&draw.delta.t()?)?.matmul(&layer.adapter().low_rank().b().t()?)? * (5.0 / 3.0))?;
    assert_close("s B Delta x", &shift(0.2)?, &want, 1e-12)
}

#[test]
fn the_average_over_draws_tends_to_the_mean() -> Result<()> {
    use rayon::prelude::*;
    let (params, xs) = (store(1), normals("xs", &[1, 6])?);
    let layer = linear(&params, &config())?;
    shake(&params)?;
    let mean = layer.mean().forward(&xs)?.flatten_all()?.to_vec1::<f64>()?;
    // One draw of each pair: a whole pair averages to the mean exactly.
    let draw = |pair: u64| {
        layer.forward_with(&xs, &Pass::Posterior { draw: 2 * pair }.into())?.flatten_all()?.to_vec1::<f64>()
    };
    let draws = (0..100_000).into_par_iter().map(draw).collect::<candle_core::Result<Vec<_>>>()?;
    for (i, mean) in mean.iter().enumerate() {
        assert_mean(&format!("output {i}"), *mean, draws.iter().map(|y| y[i]));
    }
    Ok(())
}

#[test]
fn predictive_draws_come_in_pairs_around_the_mean() -> Result<()> {
    let xs = normals("xs", &[3, 6])?;
    for mixture in [Mixture::Collapsed, Mixture::Explicit, Mixture::Sparse] {
        let params = store(1);
        let layer = linear(&params, &MonteCLoRAConfig { mixture, ..config() })?;
        shake(&params)?;
        let at = |pass: Pass| layer.forward_with(&xs, &pass.into());
        let drawn = |draw: u64| {
            Ok::<_, candle_core::Error>((Pass::Posterior { draw }, at(Pass::Posterior { draw })?))
        };
        for pair in [0, 5] {
            let ((one, y), (other, opposite)) = (drawn(2 * pair)?, drawn(2 * pair + 1)?);
            assert_eq!((one.sign(), other.sign()), (1.0, -1.0));
            assert_close("the pair's average", &((&y + &opposite)? * 0.5)?, &at(Pass::Mean)?, 1e-14)?;
            assert!((y - opposite)?.abs()?.max_all()?.to_scalar::<f64>()? > 1e-3, "{mixture:?}");
            let draws = [one, other].map(|pass| layer.adapter().draw(&pass.into()).unwrap().unwrap());
            assert_close("T", &draws[0].scale_tril, &draws[1].scale_tril, 0.0)?;
            assert_close("pi", &draws[0].weights, &draws[1].weights, 0.0)?;
            assert_close("Delta", &draws[0].delta, &draws[1].delta.neg()?, 0.0)?;
        }
        assert!(((drawn(0)?.1 - drawn(2)?.1)?.abs()?.max_all()?.to_scalar::<f64>()?) > 1e-3, "{mixture:?}");
    }
    // Training draws do not come in pairs.
    let layer = linear(&store(1), &config())?;
    let [one, next] = [6, 7].map(|draw| layer.adapter().draw(&Pass::Train { draw }.into()).unwrap().unwrap());
    assert!((one.delta + next.delta)?.abs()?.max_all()?.to_scalar::<f64>()? > 1e-3);
    Ok(())
}

#[test]
fn dropout_acts_in_training_alone_and_on_the_low_rank_branch_alone() -> Result<()> {
    let xs = normals("xs", &[40, 6])?;
    let outputs = |dropout: f64, pass: Pass| -> Result<(Tensor, Tensor)> {
        let params = store(1);
        let layer = linear(&params, &MonteCLoRAConfig { dropout, ..config() })?;
        shake(&params)?;
        Ok((layer.forward_with(&xs, &pass.into())?, xs.apply(layer.base())?))
    };
    for pass in [Pass::Mean, Pass::Posterior { draw: 1 }] {
        assert_close("without", &outputs(0.9, pass)?.0, &outputs(0.0, pass)?.0, 0.0)?;
    }
    let (with, bare) = outputs(0.9, TRAIN)?;
    // If all six inputs of a row are dropped (.9^6 = 53 %), only the base is left.
    let shift = (with - bare)?.abs()?.sum(1)?.to_vec1::<f64>()?;
    let untouched = shift.iter().filter(|s| **s < 1e-12).count();
    assert!((8..35).contains(&untouched), "{untouched}");
    assert_close("repeat", &outputs(0.9, TRAIN)?.0, &outputs(0.9, TRAIN)?.0, 0.0)
}

#[test]
fn the_size_of_the_buffer_never_changes_a_result() -> Result<()> {
    let xs = normals("xs", &[2, 6])?;
    for mixture in [Mixture::Collapsed, Mixture::Explicit] {
        let run = |buffer_size: usize, buffer_bytes: Option<usize>| -> Result<Vec<f64>> {
            let params = store(1);
            let mut layer = linear(&params, &MonteCLoRAConfig { mixture, ..config() })?;
            layer.adapter_mut().buffer_mut().resize(buffer_size, buffer_bytes);
            shake(&params)?;
            let mut all = Vec::new();
            // Forwards, backwards, repeated, and with predictive draws in between.
            for draw in [0, 1, 2, 7, 6, 5, 5, 14, 15, 16, u64::MAX >> 2, 0] {
                for pass in [Pass::Train { draw }, Pass::Posterior { draw }, Pass::Train { draw }] {
                    all.extend(layer.forward_with(&xs, &pass.into())?.flatten_all()?.to_vec1::<f64>()?);
                }
            }
            Ok(all)
        };
        let want = run(0, None)?;
        for (size, bytes) in [(1, None), (2, None), (5, None), (15, None), (15, Some(0)), (15, Some(700))] {
            assert_eq!(run(size, bytes)?, want, "{mixture:?} {size} {bytes:?}");
        }
    }
    Ok(())
}

#[test]
fn many_threads_share_a_buffer_without_waiting_for_each_other_for_ever() -> Result<()> {
    use rayon::prelude::*;
    let all = |buffer_size: usize| -> Vec<Vec<f64>> {
        let (params, xs) = (store(1), normals("xs", &[1, 6]).unwrap());
        let mut layer = linear(&params, &config()).unwrap();
        layer.adapter_mut().buffer_mut().resize(buffer_size, None);
        shake(&params).unwrap();
        let draw = |draw| -> candle_core::Result<Vec<f64>> {
            layer.forward_with(&xs, &Pass::Posterior { draw }.into())?.flatten_all()?.to_vec1::<f64>()
        };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(8).build().unwrap();
        pool.install(|| (0..3000u64).into_par_iter().map(|i| draw(i).unwrap()).collect())
    };
    // On a separate thread, so that a deadlock is a failure and not a test run that never ends.
    let (done, wait) = std::sync::mpsc::channel();
    std::thread::spawn(move || done.send((all(0), all(15))));
    let (without, with) = wait.recv_timeout(std::time::Duration::from_secs(120))?;
    assert!(without == with);
    Ok(())
}

#[test]
fn the_last_draws_of_all_are_the_same_for_every_size_and_the_next_an_error() -> Result<()> {
    let get = |size: usize, draw: u64| -> candle_core::Result<Vec<Vec<f64>>> {
        let mut layer = linear(&store(1), &config()).map_err(candle_core::Error::msg)?;
        layer.adapter_mut().buffer_mut().resize(size, None);
        let noise = layer.adapter().buffer().get(draw)?;
        layer.adapter().posterior().draw(&noise)?.delta.to_vec2()
    };
    for draw in [(1 << 63) - 2, (1 << 63) - 1] {
        let want = get(0, draw)?;
        for size in [1, 2, 15] {
            assert_eq!(get(size, draw)?, want, "{size} {draw}");
        }
    }
    for size in [0, 1, 15] {
        for draw in [1 << 63, u64::MAX] {
            let error = get(size, draw).unwrap_err().to_string();
            assert!(error.contains("draw below 2^63"), "{error}");
        }
    }
    Ok(())
}

#[test]
fn the_buffer_keeps_to_its_size_and_its_cap() -> Result<()> {
    let mut layer = linear(&store(1), &config())?;
    let buffer = layer.adapter_mut().buffer_mut();
    // Z (3, 6), T (3, 3), four uniform numbers, eight bytes each.
    assert_eq!(buffer.spec().bytes_per_draw(), 8 * (18 + 9 + 4));
    assert!(buffer.is_empty(), "a layer on the CPU starts without one");
    buffer.resize(15, None);
    assert_eq!((buffer.len(), buffer.bytes()), (15, 15 * 248));
    buffer.resize(15, Some(1000));
    assert_eq!((buffer.len(), buffer.is_empty()), (4, false));
    buffer.resize(15, Some(100));
    assert!(buffer.is_empty());
    buffer.resize(usize::MAX, None);
    assert_eq!(buffer.len(), MAX_BUFFER_SIZE);
    Ok(())
}

#[test]
fn it_trains_rank_and_components_beyond_lora() -> Result<()> {
    let (params, other) = (store(1), store(1));
    linear(&params, &config())?;
    LoraLinear::new(base(6, 4)?, &other, "proj", &LoraConfig { rank: 3, ..Default::default() })?;
    assert_eq!(other.trainable_count(), 3 * (6 + 4));
    assert_eq!(params.trainable_count(), other.trainable_count() + 3 + 4);
    let names: Vec<_> = params.all().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["a", "b", "expert_weights_prior", "std_prior"].map(|n| format!("proj.default.{n}")));
    Ok(())
}

#[test]
fn parameters_start_as_configured() -> Result<()> {
    let params = store(1);
    let layer = linear(&params, &MonteCLoRAConfig::peft_like())?;
    let host = |t: &Tensor| t.flatten_all().and_then(|t| t.to_vec1::<f64>());
    let bound = 1.0 / 6f64.sqrt();
    let a = host(layer.adapter().low_rank().a())?;
    assert!(a.iter().all(|x| x.abs() < bound) && a.iter().any(|x| x.abs() > 0.7 * bound));
    assert!(host(layer.adapter().low_rank().b())?.iter().all(|x| *x == 0.0));
    let posterior = layer.adapter().posterior();
    for start in [host(posterior.std_prior())?, host(posterior.expert_weights_prior())?] {
        assert!(start.iter().all(|x| (0.0..1.0).contains(x)) && start[0] != start[1]);
    }
    Ok(())
}

trait PeftLike {
    fn peft_like() -> Self;
}

impl PeftLike for MonteCLoRAConfig {
    fn peft_like() -> Self {
        Self { rank: 3, ..Self::peft() }
    }
}

#[test]
fn a_rank_of_zero_is_an_error_and_one_above_the_width_is_not() -> Result<()> {
    let error = linear(&store(1), &MonteCLoRAConfig { rank: 0, ..config() }).unwrap_err().to_string();
    assert!(error.contains("invalid rank"), "{error}");
    let lora = |rank| {
        let config = LoraConfig { rank, ..Default::default() };
        Lora::new(&store(1), "layer.proj", "default", (6, 4), &config)
    };
    assert!(lora(0).unwrap_err().to_string().contains("invalid rank"));
    assert_eq!(lora(9)?.low_rank().b().dims(), [4, 9]);
    // A rank above the width is allowed, as in PEFT, and has an effect in draws too.
    let params = store(1);
    let wide = linear(&params, &MonteCLoRAConfig { rank: 9, ..config() })?;
    shake(&params)?;
    let xs = normals("xs", &[3, 6])?;
    let change = (wide.forward_with(&xs, &TRAIN.into())? - wide.forward_with(&xs, &Pass::Mean.into())?)?;
    assert!(change.abs()?.min_all()?.to_scalar::<f64>()? > 1e-6);
    Ok(())
}

#[test]
fn a_perturbation_far_below_the_half_precision_step_of_a_survives_on_a_half_precision_base() -> Result<()> {
    let device = Device::Cpu;
    let params = Params::new(Noise::new(1), &device);
    let base = Linear::new(Tensor::zeros((4, 6), DType::BF16, &device)?, None);
    let config = MonteCLoRAConfig { sample_scaler: 2.5e-5, ..config() };
    let layer = MonteCLoRALinear::new(base, &params, "proj", &config)?;
    let adapter: &MonteCLoRA = layer.adapter();
    let (a, mean) = (adapter.effective_a(&TRAIN.into())?.into_owned(), adapter.low_rank().a().clone());
    assert_eq!(a.dtype(), DType::F32);
    let (moved, draw) = ((a - mean)?, adapter.draw(&TRAIN.into())?.ok_or("no draw")?.delta);
    assert_close("perturbation", &moved, &draw, 1e-2)?;
    let xs = normals("xs", &[5, 6])?.to_dtype(DType::BF16)?;
    assert_eq!(layer.forward_with(&xs, &TRAIN.into())?.dtype(), DType::BF16);
    Ok(())
}

#[test]
fn a_schedule_scales_the_draws_of_training_alone() -> Result<()> {
    let xs = normals("xs", &[5, 6])?;
    for mixture in [Mixture::Collapsed, Mixture::Explicit, Mixture::Sparse] {
        let params = store(1);
        let layer = linear(&params, &MonteCLoRAConfig { mixture, ..config() })?;
        shake(&params)?;
        let change = |pass: Pass, factors: ScalerFactors| -> Result<Tensor> {
            let cx = Context::from(pass).with_scaler_factors(factors);
            Ok((layer.forward_with(&xs, &cx)? - layer.forward_with(&xs, &Pass::Mean.into())?)?)
        };
        let (predictive, one) = (Pass::Posterior { draw: 2 }, ScalerFactors::default);
        let (before, predicted) = (change(TRAIN, one())?, change(predictive, one())?);
        // For all layers, or for this one among others.
        let own = [("proj.default".to_string(), 0.25), ("other.default".to_string(), 3.0)];
        for factors in
            [ScalerFactors::new(0.25, [].into())?, ScalerFactors::new(2.0, own.into_iter().collect())?]
        {
            assert_close("training", &change(TRAIN, factors.clone())?, &(&before * 0.25)?, 1e-12)?;
            assert_close("predictive", &change(predictive, factors)?, &predicted, 0.0)?;
        }
        for bad in [0.0, -1.0, f64::NAN] {
            assert!(ScalerFactors::new(bad, [].into()).is_err());
            assert!(ScalerFactors::new(1.0, [("proj.default".to_string(), bad)].into()).is_err());
        }
    }
    Ok(())
}
