//! A user's model of candle-nn's layers and standalone layers: cut gradients are found, and trained
//! parameters are saved and read.

use std::collections::HashMap;

use crate::support::{scatter, Outcome};
use candle_core::{DType, Device, Tensor, Var, D};
use candle_nn::{Linear, Module, VarBuilder, VarMap};
use monteclora::adapters::{LoraConfig, LoraLinear};
use monteclora::inject::{self, merge, Targets};
use monteclora::ops::{self, OpPath};
use monteclora::optim::{check_gradients, check_gradients_numerically, Gradients};
use monteclora::peft::{AdapterFile, AdapterMetadata, AdapterMethod, ExportFormat};
use monteclora::{
    linears, AdaptableLinear, AdaptableModel, Context, MonteCLoRAConfig, MonteCLoRALinear, Noise, Params,
    Pass, Role,
};

fn normal(name: &str, shape: (usize, usize)) -> Outcome<Tensor> {
    let params = Params::new(Noise::new(3), &Device::Cpu);
    Ok(params.create(name, Role::Base, shape, &monteclora::Init::Normal(0.5))?.detach())
}

fn bayes() -> MonteCLoRAConfig {
    MonteCLoRAConfig { rank: 2, alpha: 4.0, num_components: 3, sample_scaler: 0.1, ..Default::default() }
}

/// Two standalone layers, each with a residual connection, and an operation between them.
struct Own {
    up: MonteCLoRALinear,
    down: MonteCLoRALinear,
}

impl Own {
    fn new(params: &Params) -> Outcome<Self> {
        let layer = |path: &str| -> Outcome<MonteCLoRALinear> {
            Ok(MonteCLoRALinear::new(Linear::new(normal(path, (8, 8))?, None), params, path, &bayes())?)
        };
        let model = Self { up: layer("block.up")?, down: layer("block.down")? };
        scatter(params)?;
        Ok(model)
    }

    fn layers(&self) -> [(&str, &dyn monteclora::Adapter); 2] {
        [("block.up", self.up.adapter()), ("block.down", self.down.adapter())]
    }

    fn forward(&self, between: &str, pass: Pass) -> monteclora::Result<Tensor> {
        let (cx, device) = (Context::from(pass), &Device::Cpu);
        let ones = Tensor::ones(8, DType::F32, device)?;
        let zeros = ones.zeros_like()?;
        let xs = Tensor::arange(0f32, 40., device)?.sin()?.reshape((5, 8))?;
        let hidden = (&xs + self.up.forward_with(&xs, &cx)?)?;
        let heads = |xs: &Tensor| xs.reshape((1, 2, 5, 4)); // (b, heads, t, dim)
        let angles = Tensor::arange(0f32, 10., device)?.reshape((5, 2))?;
        let (cos, sin) = (angles.cos()?, angles.sin()?);
        let between = match between {
            "candle layer norm" => candle_nn::LayerNorm::new(ones, zeros, 1e-5).forward(&hidden)?,
            "candle rms norm" => candle_nn::RmsNorm::new(ones, 1e-5).forward(&hidden)?,
            "candle softmax" => candle_nn::ops::softmax_last_dim(&hidden)?,
            "candle rope" => candle_nn::rotary_emb::rope(&heads(&hidden)?, &cos, &sin)?.reshape((5, 8))?,
            "layer norm" => ops::LayerNorm::new(ones, zeros, 1e-5).forward(&hidden)?,
            "rms norm" => ops::RmsNorm::new(ones, 1e-5).forward(&hidden)?,
            "softmax" => candle_nn::ops::softmax(&hidden, D::Minus1)?,
            "rope slow" => candle_nn::rotary_emb::rope_slow(&heads(&hidden)?, &cos, &sin)?.reshape((5, 8))?,
            "rope" => {
                let (cos, sin) = (cos.unsqueeze(0)?, sin.unsqueeze(0)?);
                ops::rotary(&hidden.reshape((1, 5, 2, 4))?, &cos, &sin, OpPath::Fused)?.reshape((5, 8))?
            }
            other => panic!("{other}"),
        };
        Ok((&hidden + self.down.forward_with(&between, &cx)?)?)
    }

    fn loss(&self, between: &str, pass: Pass) -> monteclora::Result<Tensor> {
        Ok(self.forward(between, pass)?.sqr()?.mean_all()?)
    }
}

#[test]
fn a_gradient_that_is_cut_beside_a_residual_is_found_and_placed() -> Outcome {
    let params = Params::new(Noise::new(1), &Device::Cpu);
    let model = Own::new(&params)?;
    let before = params.snapshot()?;
    for between in ["candle layer norm", "candle rms norm", "candle softmax", "candle rope"] {
        let loss = || model.loss(between, Pass::Train { draw: 0 });
        assert!(check_gradients(&params, &loss()?)?.is_clean(), "{between}: the residual hides it");
        let report = check_gradients_numerically(&params, loss)?;
        assert!(!report.is_clean(), "{between}: {report:?}");
        assert!(report.wrong.contains(&"block.up.default.b".to_string()), "{between}: {report:?}");
        assert!(!report.wrong.iter().any(|name| name.starts_with("block.down")), "{between}: {report:?}");
    }
    for between in ["layer norm", "rms norm", "softmax", "rope slow", "rope"] {
        for pass in [Pass::Mean, Pass::Train { draw: 7 }, Pass::Posterior { draw: 1 }] {
            // At the mean the loss does not depend on the posterior's own parameters: their slopes are zero.
            let report = check_gradients_numerically(&params, || model.loss(between, pass))?;
            assert!(report.is_clean() && report.wrong.is_empty(), "{between} {pass:?}: {report:?}");
        }
    }
    for (name, values) in params.snapshot()? {
        assert_eq!(values.flatten_all()?.to_vec1::<f32>()?, before[&name].flatten_all()?.to_vec1::<f32>()?);
    }
    Ok(())
}

#[test]
fn what_differences_cannot_say_is_an_error() -> Outcome {
    let params = Params::new(Noise::new(1), &Device::Cpu);
    let model = Own::new(&params)?;
    let mut draw = 0;
    let fresh = check_gradients_numerically(&params, || {
        draw += 1;
        model.loss("layer norm", Pass::Train { draw })
    });
    assert!(fresh.unwrap_err().to_string().contains("two calls give"));
    let half = check_gradients_numerically(&params, || {
        Ok(model.loss("layer norm", Pass::Mean)?.to_dtype(DType::BF16)?)
    });
    assert!(half.unwrap_err().to_string().contains("bf16"));
    let rows = check_gradients_numerically(&params, || model.forward("layer norm", Pass::Mean));
    assert!(rows.unwrap_err().to_string().contains("expected a scalar"));
    // A large constant added to the loss makes its differences too coarse.
    let drowned = check_gradients_numerically(&params, || Ok((model.loss("layer norm", Pass::Mean)? + 1e7)?));
    assert!(drowned.unwrap_err().to_string().contains("too inexact"));
    Ok(())
}

#[test]
fn a_base_that_is_a_variable_is_frozen_by_its_adapter() -> Outcome {
    let map = VarMap::new();
    let vb = VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu);
    let bases = || candle_nn::linear(8, 8, vb.pp("proj"));
    let (weight, xs) = (bases()?.weight().clone(), normal("xs", (3, 8))?);
    assert!(weight.is_variable());
    let cx = Context::from(Pass::Train { draw: 0 });

    let params = Params::new(Noise::new(1), &Device::Cpu);
    let alone = LoraLinear::new(bases()?, &params, "alone", &LoraConfig::default())?;
    let loss = alone.forward_with(&xs, &cx)?.sqr()?.mean_all()?;
    assert!(check_gradients(&params, &loss)?.is_exact());

    struct Toy(AdaptableLinear);
    impl AdaptableModel for Toy {
        linears!(0);
    }
    let params = Params::new(Noise::new(1), &Device::Cpu);
    let mut model = Toy(AdaptableLinear::new("proj", bases()?));
    // Without an adapter the base is still trainable.
    assert!(model.0.forward(&xs, &cx)?.sqr()?.mean_all()?.backward()?.get(&weight).is_some());
    let error = inject::lora(&mut model, &Targets::default(), &LoraConfig::default(), &params).unwrap_err();
    assert!(error.to_string().contains("no layer matches default; the model has: proj"), "{error}");
    inject::lora(&mut model, &Targets::parse("proj")?, &LoraConfig::default(), &params)?;
    let loss = model.0.forward(&xs, &cx)?.sqr()?.mean_all()?;
    assert!(check_gradients(&params, &loss)?.is_exact());
    assert_eq!(merge::merge(&mut model)?, 1);
    Ok(())
}

#[test]
fn standalone_layers_are_an_adapter_of_peft_and_come_back() -> Outcome {
    let params = Params::new(Noise::new(1), &Device::Cpu);
    let model = Own::new(&params)?;
    params.create("head.weight", Role::Head, (2, 8), &monteclora::Init::Normal(1.0))?;
    let method = AdapterMethod::MonteCLoRA(bayes());
    let file = AdapterFile::from_layers(&model.layers(), &params, &method, &AdapterMetadata::default())?;
    let dir = tempfile::tempdir()?;
    file.write(dir.path(), ExportFormat::Peft)?;
    let read = AdapterFile::read(dir.path())?;

    let fresh = Params::new(Noise::new(2), &Device::Cpu);
    let other = Own::new(&fresh)?;
    fresh.create("head.weight", Role::Head, (2, 8), &monteclora::Init::Normal(1.0))?;
    read.apply_to_layers(&other.layers(), &fresh)?;
    for (name, param) in params.all() {
        let found = fresh.get(&name).ok_or("a parameter")?;
        let values = |var: &Var| var.flatten_all()?.to_vec1::<f32>();
        assert_eq!(values(&param.var)?, values(&found.var)?, "{name}");
    }

    let says = |result: monteclora::Result<()>, what: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    };
    let [up, down] = other.layers();
    says(read.apply_to_layers(&[up], &fresh), "no layer matches block.down");
    says(read.apply_to_layers(&[up, down, ("block.side", up.1)], &fresh), "block.side");
    let twice = AdapterFile::from_layers(&[up, up], &params, &method, &AdapterMetadata::default());
    says(twice.map(drop), "comes twice");
    let wider = MonteCLoRAConfig { alpha: 8.0, ..bayes() };
    let base = || Ok::<_, Box<dyn std::error::Error>>(Linear::new(normal("w", (8, 8))?, None));
    let elsewhere = Params::new(Noise::new(2), &Device::Cpu);
    let layers = [
        MonteCLoRALinear::new(base()?, &elsewhere, "block.up", &wider)?,
        MonteCLoRALinear::new(base()?, &elsewhere, "block.down", &wider)?,
    ];
    let layers = [("block.up", layers[0].adapter() as _), ("block.down", layers[1].adapter() as _)];
    says(read.apply_to_layers(&layers, &elsewhere), "alpha");
    Ok(())
}

#[test]
fn parameters_come_back_whole_or_not_at_all() -> Outcome {
    let (params, dir) = (Params::new(Noise::new(1), &Device::Cpu), tempfile::tempdir()?);
    Own::new(&params)?;
    params.save(dir.path())?;
    let values = |params: &Params| -> Outcome<HashMap<String, Vec<f32>>> {
        let all = params.all().into_iter();
        all.map(|(name, param)| Ok((name, param.var.flatten_all()?.to_vec1::<f32>()?))).collect()
    };
    let other = Params::new(Noise::new(2), &Device::Cpu);
    Own::new(&other)?;
    let fresh = values(&other)?;
    assert_ne!(values(&params)?, fresh);
    other.load(dir.path())?;
    assert_eq!(values(&params)?, values(&other)?);

    let says = |what: &str| {
        let error = other.load(dir.path()).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    };
    params.create("more", Role::Head, 2, &monteclora::Init::Constant(1.0))?;
    params.save(dir.path())?;
    says("tensor more");
    params.remove("more");
    params.remove("block.up.default.b");
    params.save(dir.path())?;
    says("tensor block.up.default.b");
    assert_eq!(values(&other)?.len(), fresh.len());
    std::fs::write(dir.path().join("parameters.safetensors"), b"version https://")?;
    says("parameters.safetensors");
    std::fs::remove_file(dir.path().join("parameters.safetensors"))?;
    says("parameters.safetensors");
    Ok(())
}

#[test]
fn a_missing_gradient_names_what_cuts_it() -> Outcome {
    let params = Params::new(Noise::new(1), &Device::Cpu);
    let w = params.create("w", Role::Head, (2, 8), &monteclora::Init::Normal(1.0))?;
    let norm = candle_nn::RmsNorm::new(Tensor::ones(8, DType::F32, &Device::Cpu)?, 1e-5);
    let store = norm.forward(&w)?.sum_all()?.backward()?;
    let error = Gradients::new().accumulate(&params, &store).unwrap_err().to_string();
    assert!(error.contains("tensor w") && error.contains("RmsNorm"), "{error}");
    Ok(())
}
