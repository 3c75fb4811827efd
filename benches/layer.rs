//! One adapted layer, forward and backward, compared with the frozen layer and plain LoRA; and the posterior
//! draw, with and without its buffer, for each form of the mixture.
//!
//! `cargo bench`; `cargo bench -- --test` runs everything once.

#[path = "../examples/common/allocator.rs"]
mod allocator;

use candle_core::{Device, Tensor, Var};
use candle_nn::Linear;
use criterion::{criterion_group, criterion_main, Criterion};
use monteclora::adapter::{Adapter, Context, Init, Role};
use monteclora::adapters::{Lora, LoraConfig};
use monteclora::ops::OpPath;
use monteclora::{BaseLinear, Mixture, MonteCLoRA, MonteCLoRAConfig, Noise, Params, Pass};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

const ROWS: usize = 1024;
const WIDTH: usize = 768;

fn random(name: &str, shape: (usize, usize)) -> Outcome<Tensor> {
    let params = Params::new(Noise::new(1), &Device::Cpu);
    Ok(params.create(name, Role::Base, shape, &Init::Normal(0.02))?.detach())
}

/// Runs forward and backward of a layer, up to the gradient of its input.
fn step(base: &BaseLinear, adapter: Option<&dyn Adapter>, xs: &Var, cx: &Context) -> Outcome<Tensor> {
    let ys = match adapter {
        Some(adapter) => adapter.forward(xs.as_tensor(), base, cx)?,
        None => base.forward_in(xs.as_tensor(), cx)?,
    };
    let grads = ys.sqr()?.sum_all()?.backward()?;
    grads.get(xs).cloned().ok_or_else(|| "the input has no gradient".into())
}

fn layers(c: &mut Criterion) -> Outcome<()> {
    let base = Linear::new(random("w", (WIDTH, WIDTH))?, None).into();
    let xs = Var::from_tensor(&random("x", (ROWS, WIDTH))?)?;
    let params = Params::new(Noise::new(2), &Device::Cpu);
    let dims = (WIDTH, WIDTH);
    let lora = Lora::new(&params, "lora", "default", dims, &LoraConfig::default())?;
    let bayes = MonteCLoRA::new(&params, "bayes", "default", dims, &MonteCLoRAConfig::default())?;
    let contenders: [(&str, Option<&dyn Adapter>); 3] =
        [("frozen", None), ("lora", Some(&lora)), ("monteclora", Some(&bayes))];
    let mut group = c.benchmark_group("cpu/layer 1024x768 forward and backward");
    for (name, adapter) in contenders {
        for (path, suffix) in [(OpPath::Fused, "fused"), (OpPath::Reference, "reference")] {
            let mut draw = 0;
            group.bench_function(format!("{name}/{suffix}"), |b| {
                b.iter(|| {
                    draw += 1;
                    let cx = Context::from(Pass::Train { draw }).with_path(path);
                    step(&base, adapter, &xs, &cx).expect("a step")
                })
            });
        }
    }
    group.finish();
    Ok(())
}

fn draws(c: &mut Criterion) -> Outcome<()> {
    let mut group = c.benchmark_group("cpu/draw 8x768");
    let mixtures =
        [(Mixture::Collapsed, "collapsed"), (Mixture::Explicit, "explicit"), (Mixture::Sparse, "sparse")];
    for (mixture, name) in mixtures {
        for (num_components, buffer_size) in [(4, 0), (4, 15), (64, 0), (64, 15)] {
            let config = MonteCLoRAConfig { num_components, mixture, ..MonteCLoRAConfig::default() };
            let params = Params::new(Noise::new(3), &Device::Cpu);
            let mut layer = MonteCLoRA::new(&params, "layer", "default", (WIDTH, WIDTH), &config)?;
            layer.buffer_mut().resize(buffer_size, None);
            let mut draw = 0;
            group.bench_function(format!("{name}/N={num_components}/buffer={buffer_size}"), |b| {
                b.iter(|| {
                    draw += 1;
                    layer.effective_a(&Pass::Train { draw }.into()).map(|a| a.into_owned()).expect("a draw")
                })
            });
        }
    }
    group.finish();
    Ok(())
}

fn all(c: &mut Criterion) {
    allocator::tune_allocator();
    layers(c).expect("the layers");
    draws(c).expect("the draws");
}

criterion_group!(benches, all);
criterion_main!(benches);
