//! LoRA-FA, BLoB and the authors' released code against their formulas.

use candle_core::Tensor;
use candle_nn::Module;
use monteclora::adapter::{AdaptableLinear, Adapter, Context, DrawCache, Params, Pass, Role};
use monteclora::adapters::{Blob, BlobConfig, Lora, LoraConfig, LoraFa};
use monteclora::inject::{self, Targets};
use monteclora::ops;
use monteclora::optim::check_gradients;
use monteclora::{MonteCLoRAConfig, ReleasedWalk};

use crate::{assert_close, assert_gradients, assert_mean, base, normals, shake, store, Model, Result};

const PASSES: [Pass; 3] = [Pass::Mean, Pass::Train { draw: 3 }, Pass::Posterior { draw: 2 }];

fn lora_config() -> LoraConfig {
    LoraConfig { rank: 3, alpha: 5.0, ..Default::default() }
}

fn blob_config() -> BlobConfig {
    BlobConfig { rank: 3, alpha: 5.0, initial_root: 0.6, ..Default::default() }
}

fn released_config() -> MonteCLoRAConfig {
    MonteCLoRAConfig { rank: 3, alpha: 5.0, sample_scaler: 0.3, ..MonteCLoRAConfig::released() }
}

/// Two layers that are not square.
fn model() -> Result<Model> {
    Ok(Model(vec![AdaptableLinear::new("first", base(6, 4)?), AdaptableLinear::new("second", base(6, 4)?)]))
}

/// The sum of the model's weighted outputs.
fn loss(model: &Model, xs: &Tensor, cx: &Context) -> Result<Tensor> {
    let target = normals("target", &[5, 4])?;
    let of = |layer: &AdaptableLinear| ops::mul_constant(&layer.forward(xs, cx)?, &target)?.sum_all();
    let layers = model.0.iter().map(of).collect::<candle_core::Result<Vec<_>>>()?;
    Ok(Tensor::stack(&layers, 0)?.sum_all()?)
}

#[test]
fn with_b_at_zero_each_is_the_base_in_every_pass() -> Result<()> {
    let (xs, params) = (normals("xs", &[5, 6])?, store(1));
    let blob = BlobConfig { dropout: 0.3, ..blob_config() };
    let released = MonteCLoRAConfig { dropout: 0.3, ..released_config() };
    let adapters: [Box<dyn Adapter>; 3] = [
        Box::new(LoraFa::new(&params, "fa", "default", (6, 4), &lora_config())?),
        Box::new(Blob::new(&params, "blob", "default", (6, 4), &blob)?),
        Box::new(monteclora::Released::new(&params, "released", "default", (6, 4), &released)?),
    ];
    for adapter in adapters {
        for pass in PASSES {
            let got = adapter.forward(&xs, &base(6, 4)?, &pass.into())?;
            assert_close(&format!("{adapter:?}"), &got, &base(6, 4)?.forward(&xs)?, 0.0)?;
        }
    }
    Ok(())
}

#[test]
fn lora_fa_is_lora_whose_a_gets_no_gradient() -> Result<()> {
    let (params, xs, cx) = (store(1), normals("xs", &[5, 6])?, Context::from(PASSES[1]));
    let fa = LoraFa::new(&params, "proj", "default", (6, 4), &lora_config())?;
    shake(&params)?;
    let other = store(1);
    let lora = Lora::new(&other, "proj", "default", (6, 4), &lora_config())?;
    shake(&other)?;
    let (base, weights) = (base(6, 4)?, normals("target", &[5, 4])?);
    let (own, plain) = (fa.forward(&xs, &base, &cx)?, lora.forward(&xs, &base, &cx)?);
    assert_close("output", &own, &plain, 0.0)?;
    let (own, plain) = ((own * &weights)?.sum_all()?.backward()?, (plain * &weights)?.sum_all()?.backward()?);
    let pair = fa.lora().low_rank();
    let gradient = own.get(pair.b()).ok_or("B has no gradient")?;
    assert_close("B", gradient, plain.get(lora.low_rank().b()).ok_or("no gradient")?, 0.0)?;
    assert!(own.get(pair.a()).is_none() && plain.get(lora.low_rank().a()).is_some());
    Ok(())
}

#[test]
fn on_a_model_lora_fa_trains_b_alone_and_is_a_lora_to_others() -> Result<()> {
    let (mut model, params, xs) = (model()?, store(1), normals("xs", &[5, 6])?);
    inject::lora_fa(&mut model, &Targets::parse("all-linear")?, &lora_config(), &params)?;
    let frozen = |params: &Params| {
        let all = params.all().into_iter();
        all.filter(|(_, param)| param.role == Role::A).all(|(_, param)| !param.trainable)
    };
    assert!(frozen(&params));
    // Switched off and on again, A stays frozen.
    inject::activate::activate(&mut model, None, &params)?;
    inject::activate::activate(&mut model, Some("default"), &params)?;
    assert!(frozen(&params) && params.trainable_count() > 0);
    assert_eq!(params.trainable_count(), 2 * 4 * 3);
    shake(&params)?;
    assert!(check_gradients(&params, &loss(&model, &xs, &PASSES[1].into())?)?.is_exact());
    let active = model.0[0].active().ok_or("no adapter")?.1;
    assert!(active.as_any().downcast_ref::<Lora>().is_some());
    Ok(())
}

#[test]
fn gradients_of_blob_are_differences_those_of_g_among_them() -> Result<()> {
    for (pass, dropout) in [(PASSES[0], 0.3), (PASSES[1], 0.0), (PASSES[1], 0.3), (PASSES[2], 0.0)] {
        let params = store(3);
        let config = BlobConfig { dropout, ..blob_config() };
        let blob = Blob::new(&params, "layer", "default", (6, 4), &config)?;
        shake(&params)?;
        let (xs, target, base) = (normals("xs", &[2, 3, 6])?, normals("target", &[2, 3, 4])?, base(6, 4)?);
        let loss =
            || -> Result<Tensor> { Ok((blob.forward(&xs, &base, &pass.into())? * &target)?.sum_all()?) };
        assert_gradients(&format!("{pass:?}"), &params, &loss)?;
        let moves = loss()?.backward()?.get(blob.root()).is_some();
        assert_eq!(moves, pass != Pass::Mean);
        assert_gradients("kl", &params, &|| Ok(blob.kl()?))?;
    }
    Ok(())
}

#[test]
fn a_draw_of_blob_has_its_mean_and_the_squares_of_g_as_deviations() -> Result<()> {
    let params = store(2);
    let blob = Blob::new(&params, "layer", "default", (3, 2), &BlobConfig { rank: 2, ..blob_config() })?;
    shake(&params)?;
    let flat = |t: &Tensor| -> Result<Vec<f64>> { Ok(t.flatten_all()?.to_vec1()?) };
    let (mean, root) = (flat(blob.low_rank().a())?, flat(blob.root())?);
    for pass in [|draw| Pass::Train { draw }, |draw| Pass::Posterior { draw: 2 * draw }] {
        let draws = (0..100_000).map(|draw| flat(blob.effective_a(&pass(draw).into())?.as_ref()));
        let draws = draws.collect::<Result<Vec<_>>>()?;
        for i in 0..mean.len() {
            let next = (i + 1) % mean.len();
            let std = root[i] * root[i];
            let off = |draw: &Vec<f64>, i: usize| draw[i] - mean[i];
            assert_mean("mean", mean[i], draws.iter().map(|draw| draw[i]));
            assert_mean("variance", std * std, draws.iter().map(|draw| off(draw, i).powi(2)));
            assert_mean("covariance", 0.0, draws.iter().map(|draw| off(draw, i) * off(draw, next)));
        }
    }
    Ok(())
}

#[test]
fn the_divergence_of_blob_is_the_mean_of_its_log_ratio() -> Result<()> {
    let params = store(2);
    let config = BlobConfig { rank: 2, prior_std: 0.7, ..blob_config() };
    let blob = Blob::new(&params, "layer", "default", (3, 2), &config)?;
    shake(&params)?;
    let flat = |t: &Tensor| -> Result<Vec<f64>> { Ok(t.flatten_all()?.to_vec1()?) };
    let (mean, root) = (flat(blob.low_rank().a())?, flat(blob.root())?);
    // The factor 1 / sqrt(2 pi) of both densities cancels.
    let log_density = |x: f64, mean: f64, std: f64| -0.5 * ((x - mean) / std).powi(2) - std.ln();
    let ratio = |a: &Vec<f64>| -> f64 {
        let of = |i: usize| log_density(a[i], mean[i], root[i] * root[i]) - log_density(a[i], 0.0, 0.7);
        (0..a.len()).map(of).sum()
    };
    let draws = (0..100_000).map(|draw| flat(blob.effective_a(&Pass::Train { draw }.into())?.as_ref()));
    let draws = draws.collect::<Result<Vec<_>>>()?;
    assert_mean("kl", blob.kl()?.to_scalar::<f64>()?, draws.iter().map(ratio));
    Ok(())
}

#[test]
fn a_step_of_the_divergence_is_one_down_its_gradient() -> Result<()> {
    let params = store(2);
    let blob = Blob::new(&params, "layer", "default", (6, 4), &blob_config())?;
    shake(&params)?;
    let grads = blob.kl()?.backward()?;
    let before = params.snapshot()?;
    blob.descend(&params, 0.01)?;
    for (name, param) in params.all() {
        let zeros = param.var.as_tensor().zeros_like()?;
        let gradient = grads.get(&param.var).unwrap_or(&zeros);
        let want = (&before[&name] - (gradient * 0.01)?)?;
        assert_close(&name, param.var.as_tensor(), &want, 1e-13)?;
        assert_eq!(grads.get(&param.var).is_none(), param.role == Role::B);
    }
    Ok(())
}

/// One layer with the released code's method, one component and V = 1, and the walk that moves it.
fn walking(params: &Params) -> Result<(Model, ReleasedWalk)> {
    let mut model = Model(vec![AdaptableLinear::new("first", base(6, 4)?)]);
    let config = MonteCLoRAConfig { num_components: 1, ..released_config() };
    inject::monteclora_released(&mut model, &Targets::parse("all-linear")?, &config, params)?;
    params.set("first.default.std_prior", &normals("rho", &[3])?.zeros_like()?)?;
    let walk = ReleasedWalk::new(&model, &config, params)?;
    Ok((model, walk))
}

#[test]
fn a_step_of_the_released_codes_walk_has_the_scaler_twice() -> Result<()> {
    let params = store(4);
    let (_, walk) = walking(&params)?;
    let a = || -> Result<Vec<f64>> {
        Ok(params.get("first.default.a").ok_or("no A")?.var.flatten_all()?.to_vec1()?)
    };
    let (mut steps, mut before) = (Vec::new(), a()?);
    for step in 1..=40_000 {
        walk.before_step(step)?;
        let after = a()?;
        steps.push(after.iter().zip(&before).map(|(a, b)| a - b).collect::<Vec<f64>>());
        before = after;
    }
    // Sigma_ii is chi-squared with r = 3 degrees of freedom; the clip at 1e-3 changes next to nothing.
    for i in [0, 7, 17] {
        assert_mean("step", 0.0, steps.iter().map(|step| step[i]));
        assert_mean("square", 0.3f64.powi(4) * 3.0, steps.iter().map(|step| step[i].powi(2)));
        assert_mean("next", 0.0, steps.windows(2).map(|pair| pair[0][i] * pair[1][i]));
    }
    Ok(())
}

#[test]
fn under_the_released_code_the_task_trains_b_and_the_regulariser_the_rest() -> Result<()> {
    let (params, xs) = (store(4), normals("xs", &[5, 6])?);
    let (model, walk) = walking(&params)?;
    shake(&params)?;
    let at = |pass: Pass| loss(&model, &xs, &pass.into());
    let values = PASSES.map(|pass| at(pass).and_then(|loss| Ok(loss.to_scalar::<f64>()?)).unwrap());
    assert!(values[1] == values[0] && values[2] == values[0], "no pass draws");
    let (task, penalty) = (at(PASSES[1])?.backward()?, walk.penalty(PASSES[1])?.total.backward()?);
    for (name, param) in params.all() {
        let reached = (task.get(&param.var).is_some(), penalty.get(&param.var).is_some());
        let wanted = match param.role {
            Role::A => (false, false),
            Role::B => (true, false),
            _ => (false, true),
        };
        assert_eq!((reached, param.trainable), (wanted, param.role != Role::A), "{name}");
    }
    Ok(())
}

#[test]
fn predictive_draws_of_blob_come_in_pairs_around_the_mean_with_a_cache_and_without() -> Result<()> {
    let params = store(1);
    let blob = Blob::new(&params, "layer", "default", (6, 4), &blob_config())?;
    shake(&params)?;
    let kept = DrawCache::default();
    for cache in [None, Some(&kept)] {
        let at = |draw| -> Result<Tensor> {
            let cx = Context::from(Pass::Posterior { draw });
            let cx = if let Some(kept) = cache { cx.with_draws(kept) } else { cx };
            Ok(blob.effective_a(&cx)?.into_owned())
        };
        for pair in [0, 3] {
            let (one, opposite) = (at(2 * pair)?, at(2 * pair + 1)?);
            assert_close("the pair's average", &((&one + &opposite)? * 0.5)?, blob.low_rank().a(), 1e-14)?;
            assert!((one - opposite)?.abs()?.max_all()?.to_scalar::<f64>()? > 1e-3);
        }
        assert!((at(0)? - at(2)?)?.abs()?.max_all()?.to_scalar::<f64>()? > 1e-3);
    }
    Ok(())
}
