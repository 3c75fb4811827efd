//! The store: names, values, copies, snapshots.

use super::*;

fn store() -> Params {
    Params::new(Noise::new(7), &Device::Cpu)
}

#[test]
fn initial_values_depend_on_the_seed_and_the_name_alone() -> Result<()> {
    let (one, two) = (store(), store());
    two.create("other", Role::A, 3, &Init::Normal(1.0))?;
    let values = |p: &Params| -> Result<Vec<f32>> {
        Ok(p.create("layer.a", Role::A, 4, &Init::Uniform(-1.0, 1.0))?.to_vec1()?)
    };
    let first = values(&one)?;
    assert_eq!(first, values(&two)?);
    assert!(first.iter().all(|v| v.abs() < 1.0) && first[0] != first[1]);
    Ok(())
}

#[test]
fn a_name_can_be_taken_only_once() -> Result<()> {
    let params = store();
    params.create("x", Role::B, 2, &Init::Constant(0.0))?;
    let error = params.create("x", Role::B, 2, &Init::Constant(0.0)).unwrap_err();
    assert!(error.to_string().contains("tensor x"), "{error}");
    Ok(())
}

#[test]
fn layers_see_values_that_are_set_and_restored() -> Result<()> {
    let params = store();
    let held = params.create("x", Role::B, 2, &Init::Constant(1.0))?;
    let before = params.snapshot()?;
    params.set("x", &Tensor::new(&[3f32, 4.0], &Device::Cpu)?)?;
    assert_eq!(held.to_vec1::<f32>()?, [3.0, 4.0]);
    params.restore(&before)?;
    assert_eq!(held.to_vec1::<f32>()?, [1.0, 1.0]);
    let error = params.set("x", &Tensor::new(&[1f32], &Device::Cpu)?).unwrap_err();
    assert!(error.to_string().contains("expected shape [2]"), "{error}");
    Ok(())
}

#[test]
fn inserted_values_are_a_copy_also_of_a_variable() -> Result<()> {
    let params = store();
    let one = params.insert("one", Role::Base, &Tensor::new(&[1f32, 2.0], &Device::Cpu)?)?;
    let two = params.insert("two", Role::Base, &one)?;
    let own = Var::new(&[5f32, 6.0], &Device::Cpu)?;
    let three = params.insert("three", Role::Base, &own)?;
    params.set("one", &Tensor::new(&[3f32, 4.0], &Device::Cpu)?)?;
    own.set(&Tensor::new(&[7f32, 8.0], &Device::Cpu)?)?;
    assert_eq!(one.to_vec1::<f32>()?, [3.0, 4.0]);
    assert_eq!(two.to_vec1::<f32>()?, [1.0, 2.0]);
    assert_eq!(three.to_vec1::<f32>()?, [5.0, 6.0]);
    Ok(())
}

#[test]
fn a_snapshot_is_restored_whole_or_not_at_all() -> Result<()> {
    let params = store();
    let held = params.create("a", Role::A, 2, &Init::Constant(1.0))?;
    params.create("b", Role::B, 2, &Init::Constant(1.0))?;
    let good = Tensor::new(&[3f32, 4.0], &Device::Cpu)?;
    for (name, bad, reason) in [
        ("b", Tensor::new(&[1f32], &Device::Cpu)?, "tensor b: expected shape [2], got [1]"),
        ("b", Tensor::new(&[0f32, f32::NAN], &Device::Cpu)?, "tensor b: it holds NaN"),
        ("c", good.clone(), "tensor c: there is no parameter of this name"),
    ] {
        let snapshot = BTreeMap::from([("a".to_string(), good.clone()), (name.to_string(), bad)]);
        let error = params.restore(&snapshot).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
        assert_eq!(held.to_vec1::<f32>()?, [1.0, 1.0]);
    }
    Ok(())
}

#[test]
fn bad_names_and_values_are_errors_that_say_so() -> Result<()> {
    let params = store();
    let error = params.set("none", &Tensor::new(&[1f32], &Device::Cpu)?).unwrap_err().to_string();
    assert!(error.contains("tensor none: there is no parameter of this name"), "{error}");
    for init in [Init::Constant(f64::NAN), Init::Normal(f64::INFINITY), Init::LogUniform(-2.0, -1.0)] {
        let error = params.create("x", Role::A, 2, &init).unwrap_err().to_string();
        assert!(error.contains("tensor x: initial value") && error.contains("not finite"), "{error}");
    }
    assert!(params.all().is_empty());
    // Values of another dtype are cast.
    params.create("x", Role::A, 2, &Init::Constant(0.0))?;
    params.set("x", &Tensor::new(&[1u32, 2], &Device::Cpu)?)?;
    let x = params.get("x").expect("it was created").var;
    assert_eq!((x.dtype(), x.to_vec1::<f32>()?), (DType::F32, vec![1.0, 2.0]));
    let error = params.var_builder(None, Role::A).get(3, "x").unwrap_err().to_string();
    assert!(error.contains("x: expected shape [3], the parameter has [2]"), "{error}");
    Ok(())
}

#[test]
fn the_store_stands_behind_a_var_builder() -> Result<()> {
    let params = store();
    let vb = params.var_builder(None, Role::Head);
    let layer = candle_nn::linear(3, 2, vb.pp("out"))?;
    let again = candle_nn::linear(3, 2, vb.pp("out"))?;
    assert_eq!(params.trainable_count(), 8);
    assert_eq!(layer.weight().id(), again.weight().id());
    assert_eq!(params.all()[0].0, "out.bias");
    assert_eq!(params.set_trainable(Role::Head, false), 2);
    assert_eq!(params.trainable_count(), 0);
    Ok(())
}
