//! Tests of what the blocks guarantee beyond their values: masks, ranges, dtypes, bad and empty input.

use super::*;

#[test]
fn an_ignored_row_hides_even_nan() {
    for path in [OpPath::Fused, OpPath::Composed] {
        let logits = Tensor::new(&[[1f32, 2.0], [f32::NAN, 0.0]], &Device::Cpu).unwrap();
        let logits = Var::from_tensor(&logits).unwrap();
        let labels = Tensor::new(&[1i64, -100], &Device::Cpu).unwrap();
        let loss = cross_entropy(&logits, &labels, -100, path).unwrap();
        let gradient = flat(loss.backward().unwrap().get(&logits).unwrap());
        let p = 1.0 / (1.0 + 1f64.exp());
        assert_close("loss", &flat(&loss), &[-(1.0 - p).ln()], 1e-6);
        assert_close("gradient", &gradient, &[p, -p, 0.0, 0.0], 1e-6);
    }
}

#[test]
fn an_unseeing_query_gives_zero_and_gets_zero() {
    for path in OpPath::ALL {
        let var =
            |path: &str| Var::from_tensor(&normal(path, &[2, 4, 6]).to_dtype(DType::F32).unwrap()).unwrap();
        let (q, k, v) = (var("q"), var("k"), var("v"));
        let y = attention(&q, &k, &v, 2, 2, 0.3, &mask(4, false, true), None, path).unwrap();
        let (seeing, blind) = (flat(&y.get(0).unwrap()), flat(&y.get(1).unwrap()));
        assert!(seeing.iter().all(|y| *y != 0.0) && blind.iter().all(|y| *y == 0.0), "{path:?}");
        let store = y.sum_all().unwrap().backward().unwrap();
        for var in [&q, &k, &v] {
            assert!(flat(&store.get(var).unwrap().get(1).unwrap()).iter().all(|g| *g == 0.0), "{path:?}");
        }
        // The padded key in the first row of the batch gets no gradient either.
        let dv = flat(&store.get(&v).unwrap().get(0).unwrap());
        assert!(dv[12..18].iter().all(|g| *g == 0.0) && dv[..12].iter().all(|g| *g != 0.0), "{path:?}");
    }
}

#[test]
fn scores_beyond_the_range_of_exp_do_not_overflow() {
    for path in [OpPath::Fused, OpPath::Composed] {
        let x = (normal("large", &[1, 5, 8]).to_dtype(DType::F32).unwrap() * 300.0).unwrap();
        let open = Mask::default();
        let y = attention(&x, &x, &x, 2, 2, 1.0, &open, None, path).unwrap();
        assert!(flat(&y).iter().all(|y| y.is_finite()), "{path:?}");
        let labels = Tensor::new(&[0i64, 1, 2, 3, 4], &Device::Cpu).unwrap();
        let loss = cross_entropy(&x.get(0).unwrap(), &labels, -100, path).unwrap();
        assert!(loss.to_scalar::<f32>().unwrap().is_finite(), "{path:?}");
        for y in [gelu(&x, path).unwrap(), silu(&x, path).unwrap()] {
            assert!(flat(&y).iter().all(|y| y.is_finite()), "{path:?}");
        }
    }
}

#[test]
fn a_dropout_mask_is_a_function_of_stream_draw_and_index() {
    let ones = Tensor::ones((30_000,), DType::F32, &Device::Cpu).unwrap();
    let drop = |path, draw| flat(&dropout(&ones, 0.25, &stream(), draw, path).unwrap());
    let fused = drop(OpPath::Fused, 1);
    for (i, y) in fused.iter().enumerate() {
        let kept = stream().words(1, i as u64 / 4)[i % 4] >= 1 << 30;
        let want = if kept { f64::from((1.0 / 0.75) as f32) } else { 0.0 };
        assert_eq!(*y, want, "element {i}");
    }
    assert_close("composed", &drop(OpPath::Composed, 1), &fused, 1e-6);
    assert_close("reference", &drop(OpPath::Reference, 1), &fused, 1e-6);
    assert_ne!(fused, drop(OpPath::Fused, 2));
    // Within five standard errors of a binomial proportion.
    let share = fused.iter().filter(|y| **y == 0.0).count() as f64 / 30_000.0;
    assert!((share - 0.25).abs() < 5.0 * (0.25 * 0.75 / 30_000f64).sqrt());
    let same = dropout(&ones, 0.0, &stream(), 1, OpPath::Fused).unwrap();
    assert_eq!(same.id(), ones.id());
}

#[test]
fn low_rank_products_of_a_half_width_base_run_in_the_adapters_dtype() {
    // A perturbation of A far below one bf16 step must reach the output.
    let narrow = |path: &str, shape: &[usize]| normal(path, shape).to_dtype(DType::BF16).unwrap();
    let wide = |path: &str, shape: &[usize]| normal(path, shape).to_dtype(DType::F32).unwrap();
    let (x, a, b) = (narrow("x", &[4, 5]), wide("a", &[2, 5]), wide("b", &[7, 2]));
    let (weight, zero) = (narrow("w", &[7, 5]), Tensor::zeros((7, 5), DType::BF16, &Device::Cpu).unwrap());
    let a = Var::from_tensor(&a).unwrap();
    let moved = ((a.as_tensor() * 1.0001).unwrap() - a.as_tensor()).unwrap();
    let difference = low_rank(&x, &moved, &b, 1e4, OpPath::Fused).unwrap();
    let direct = low_rank(&x, &a, &b, 1.0, OpPath::Fused).unwrap();
    assert_close("difference", &flat(&difference), &flat(&direct), 0.02);
    let y = adapted_linear(&x, &weight, None, &a, &b, 1.0, OpPath::Fused).unwrap();
    assert_eq!(y.dtype(), DType::BF16);
    let gradient = y.sum_all().unwrap().backward().unwrap().remove(&a).unwrap();
    assert_eq!(gradient.dtype(), DType::F32);
    let alone = adapted_linear(&x, &zero, None, &a, &b, 1.0, OpPath::Fused).unwrap();
    assert_close("zero base", &flat(&alone), &flat(&direct), 1e-9);
}

#[test]
fn bad_input_is_an_error_that_names_it() {
    let t = |shape: &[usize]| normal("t", shape).to_dtype(DType::F32).unwrap();
    let fails = |result: Result<Tensor>, parts: &[&str]| {
        let message = result.expect_err("bad input").to_string();
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    };
    let labels = |labels: &[i64]| Tensor::new(labels, &Device::Cpu).unwrap();
    for path in [OpPath::Fused, OpPath::Composed] {
        fails(linear(&t(&[2, 4]), &t(&[7, 5]), None, path), &["[2, 4]", "[7, 5]"]);
        fails(linear(&t(&[2, 5]), &t(&[7, 5]), Some(&t(&[5])), path), &["bias [5]", "[7, 5]"]);
        fails(low_rank(&t(&[2, 5]), &t(&[3, 5]), &t(&[7, 2]), 1.0, path), &["[3, 5]", "[7, 2]"]);
        fails(
            adapted_linear(&t(&[2, 5]), &t(&[7, 5]), None, &t(&[2, 5]), &t(&[6, 2]), 1.0, path),
            &["[6, 2]"],
        );
        fails(feed_forward(&t(&[2, 5]), &t(&[7, 4]), None, &t(&[3, 7]), None, path), &["[2, 5]", "[7, 4]"]);
        fails(feed_forward(&t(&[2, 5]), &t(&[7, 5]), Some(&t(&[3])), &t(&[3, 7]), None, path), &["bias [3]"]);
        let misfit = feed_forward(&t(&[2, 5]), &t(&[7, 5]), None, &t(&[3, 6]), None, path);
        fails(misfit, &["w1 [7, 5], w2 [3, 6]"]);
        let misfit = feed_forward(&t(&[2, 5]), &t(&[7, 5]), None, &t(&[3, 7]), Some(&t(&[4])), path);
        fails(misfit, &["w2 [3, 7], b2 Some([4])"]);
        let misfit = swiglu(&t(&[2, 5]), &t(&[7, 5]), &t(&[6, 5]), &t(&[3, 7]), path);
        fails(misfit, &["gate [7, 5], up [6, 5], down [3, 7]"]);
        let labelled = linear_cross_entropy(&t(&[2, 5]), t(&[3, 5]), &labels(&[0, 3]), -100, path);
        fails(labelled, &["label 3", "row 1", "3 classes"]);
        fails(
            linear_cross_entropy(&t(&[2, 5]), t(&[3, 4]), &labels(&[0, 1]), -100, path),
            &["[2, 5]", "[3, 4]"],
        );
        fails(silu_mul(&t(&[2, 4]), &t(&[3, 4]), path), &["[2, 4]", "[3, 4]"]);
        fails(silu_mul(&t(&[2, 4]), &t(&[4]), path), &["[2, 4]", "[4]"]);
        fails(layer_norm(&t(&[2, 5]), &t(&[4]), &t(&[5]), 1e-5, path), &["[2, 5]", "[4]"]);
        fails(add_layer_norm(&t(&[2, 5]), &t(&[3, 5]), &t(&[5]), &t(&[5]), 1e-5, path), &["[3, 5]"]);
        let ids = Tensor::new(&[1u32, 6], &Device::Cpu).unwrap();
        fails(embedding(&ids, &t(&[6, 2]), path), &["id 6", "position 1", "vocabulary of 6"]);
        fails(cross_entropy(&t(&[2, 3]), &labels(&[0, 3]), -100, path), &["label 3", "row 1", "3 classes"]);
        fails(cross_entropy(&t(&[2, 3]), &labels(&[-1, 0]), -100, path), &["label -1", "row 0"]);
        fails(cross_entropy(&t(&[2, 3]), &labels(&[-100, -100]), -100, path), &["all 2 rows", "-100"]);
        fails(cross_entropy(&t(&[2, 3]), &labels(&[0]), -100, path), &["labels (2)", "[1]"]);
        fails(mean_squared_error(&t(&[2]), &t(&[3]), path), &["[2]", "[3]"]);
        for p in [-0.1, 1.0, f64::NAN] {
            fails(dropout(&t(&[2]), p, &stream(), 0, path), &["[0, 1)", &p.to_string()]);
        }
        let open = Mask::default();
        let attend = |kv: usize, mask: &Mask, p: f64| {
            let x = t(&[1, 3, 12]);
            attention(&x, &x, &x, 4, kv, 1.0, mask, Some((p, stream(), 0)), path)
        };
        fails(attend(3, &open, 0.0), &["4 heads", "3 key heads"]);
        fails(attend(2, &open, 0.0), &["2 key heads"]);
        fails(attend(4, &open, 1.0), &["[0, 1)"]);
        fails(attend(4, &mask(4, false, false), 0.0), &["padding [2, 4]"]);
        fails(attend(4, &Mask { window: Some(Window::new(0)), ..Mask::default() }, 0.0), &["window of 0"]);
        fails(rotary(&t(&[1, 2, 1, 4]), &t(&[1, 3, 2]), &t(&[1, 3, 2]), path), &["[1, 3, 2]"]);
    }
}

#[test]
fn empty_batches_pass_through() {
    let t = |shape: &[usize]| normal("t", shape).to_dtype(DType::F32).unwrap();
    let (x, w, bias) = (t(&[0, 5]), t(&[5, 5]), t(&[5]));
    assert_eq!(linear(&x, &w, Some(&bias), OpPath::Fused).unwrap().dims(), &[0, 5]);
    assert_eq!(layer_norm(&x, &bias, &bias, 1e-5, OpPath::Fused).unwrap().dims(), &[0, 5]);
    assert_eq!(gelu(&x, OpPath::Fused).unwrap().dims(), &[0, 5]);
}
