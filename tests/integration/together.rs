//! Layers that make their draws together compute the same as each alone, from the current parameters.

use crate::support::{padded_batch, toy_classifier, toy_config, Outcome};
use candle_core::{DType, Tensor};
use monteclora::adapter::{Context, Params, Role};
use monteclora::inject::{self, Targets};
use monteclora::models::roberta::{Family, RobertaForSequenceClassification};
use monteclora::optim::Gradients;
use monteclora::{Mixture, MonteCLoRA, MonteCLoRAConfig, Pass};

type Model = RobertaForSequenceClassification;

fn config() -> MonteCLoRAConfig {
    MonteCLoRAConfig { rank: 3, num_components: 4, sample_scaler: 0.3, ..MonteCLoRAConfig::paper() }
}

/// A model with adapters on all layers, B away from zero, which draw together or each by itself.
fn model(config: &MonteCLoRAConfig, together: bool) -> Outcome<(Model, Params)> {
    let (mut model, params) = toy_classifier(&toy_config(Family::Bert), Role::Head, DType::F32)?;
    let targets = Targets::parse("all-linear")?;
    if together {
        inject::monteclora(&mut model, &targets, config, &params)?;
    } else {
        let targets = targets.resolve(&model, config.rank, config.alpha)?;
        inject::inject(&mut model, "default", &targets, &params, &mut |layer, _, params| {
            Ok(Box::new(MonteCLoRA::new(params, layer.path(), "default", layer.dims()?, config)?))
        })?;
    }
    shift(&params, 0.1)?;
    Ok((model, params))
}

/// Moves every element of every parameter.
fn shift(params: &Params, by: f64) -> Outcome {
    for (name, param) in params.all() {
        params.set(&name, &(param.var.as_detached_tensor() + by)?)?;
    }
    Ok(())
}

fn logits(model: &Model, cx: &Context) -> Outcome<Tensor> {
    let (ids, types, mask) = padded_batch(model.config())?;
    Ok(model.forward(&ids, Some(&types), &mask, cx)?)
}

/// The logits and all gradients, in one row.
fn numbers(model: &Model, params: &Params, cx: &Context) -> Outcome<Vec<f32>> {
    let ys = logits(model, cx)?;
    let mut grads = Gradients::new();
    let loss = ys.sqr()?.sum_all()?;
    let posterior = params.of_role(Role::Concentration).into_iter();
    let sum = |sum: Tensor, c: Tensor| sum + (c.sum_all()? * 0.5)?;
    // A term for the concentrations, since the weights of a sparse mixture have no part in a draw.
    let c = posterior.map(|(_, param)| param.var.as_tensor().clone());
    let loss = c.into_iter().try_fold(loss, sum)?;
    grads.accumulate(params, &loss.backward()?)?;
    let mut numbers = ys.flatten_all()?.to_vec1::<f32>()?;
    for grad in grads.tensors()?.values() {
        numbers.extend(grad.flatten_all()?.to_vec1::<f32>()?);
    }
    Ok(numbers)
}

#[test]
fn layers_draw_together_what_each_draws_alone() -> Outcome {
    for config in [config(), MonteCLoRAConfig { mixture: Mixture::Sparse, ..config() }] {
        let ((mut joint, joint_params), (mut single, single_params)) =
            (model(&config, true)?, model(&config, false)?);
        for checkpointed in [false, true] {
            joint.set_checkpoint_layers(checkpointed);
            single.set_checkpoint_layers(checkpointed);
            for pass in [Pass::Train { draw: 4 }, Pass::Posterior { draw: 4 }] {
                let got = numbers(&joint, &joint_params, &pass.into())?;
                assert_eq!(got, numbers(&single, &single_params, &pass.into())?, "{checkpointed} {pass:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_pass_sees_the_parameters_as_they_are_whatever_context_it_comes_with() -> Outcome {
    let (model, params) = model(&config(), true)?;
    let kept = Context::from(Pass::Train { draw: 1 });
    let mut seen = vec![numbers(&model, &params, &kept)?];
    for role in [Role::A, Role::LogStd, Role::Concentration] {
        // Changed directly, without the store, as a candle optimiser does.
        for (_, param) in params.of_role(role) {
            param.var.set(&(param.var.as_detached_tensor() + 0.2)?)?;
        }
        let now = numbers(&model, &params, &kept)?;
        assert_eq!(now, numbers(&model, &params, &Pass::Train { draw: 1 }.into())?, "{role:?}");
        assert!(!seen.contains(&now), "{role:?}");
        seen.push(now);
    }
    // Another draw in between, in the same context.
    let before = numbers(&model, &params, &kept)?;
    numbers(&model, &params, &kept.clone().with_pass(Pass::Train { draw: 2 }))?;
    shift(&params, 0.1)?;
    assert_ne!(numbers(&model, &params, &kept)?, before);
    Ok(())
}
