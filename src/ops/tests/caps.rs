//! Cases for Gemma and Phi: soft caps, the tanh gate, rotary positions on a part of each head.

use super::*;

pub(super) fn cases() -> Vec<Case> {
    let labels = |t: &Tensor| Tensor::new(&[3i64, -100, 0, 18], t.device());
    // Scores and logits have a standard deviation of about 1 to 2, so that these caps have an effect.
    let capped = |cap| Scores { scale: 0.4, cap: Some(cap) };
    let mut all = vec![
        case("soft cap", &[(&[2, 3, 7], true)], |t, path| soft_cap(&t[0], 0.8, path)),
        case("soft cap, transposed", &[(&[5, 3], true)], |t, path| soft_cap(&t[0].t()?, 0.8, path)),
        case("gelu tanh mul", &[(&[2, 3, 7], true), (&[2, 3, 7], true)], |t, path| {
            gelu_tanh_mul(&t[0], &t[1], path)
        }),
        case("gelu tanh mul, halves of one", &[(&[2, 3, 14], true)], |t, path| {
            gelu_tanh_mul(&t[0].narrow(2, 0, 7)?, &t[0].narrow(2, 7, 7)?, path)
        }),
        case("gelu tanh mul, gate alone", &[(&[2, 7], true), (&[2, 7], false)], |t, path| {
            gelu_tanh_mul(&t[0], &t[1], path)
        }),
        case("capped cross entropy", &[(&[4, 5], true), (&[19, 5], false)], move |t, path| {
            capped_linear_cross_entropy(&t[0], &t[1], &labels(&t[0])?, -100, Some(1.5), path)
        }),
        case("capped cross entropy, trained", &[(&[4, 5], true), (&[19, 5], true)], move |t, path| {
            capped_linear_cross_entropy(&t[0], &t[1], &labels(&t[0])?, -100, Some(1.5), path)
        }),
        case("rotary, a part of each head", &[(&[2, 3, 2, 10], true)], |t, path| {
            let angle = (Tensor::arange(0f64, 9.0, t[0].device())?.reshape((1, 3, 3))? * 0.7)?;
            let (cos, sin) = (angle.cos()?.to_dtype(t[0].dtype())?, angle.sin()?.to_dtype(t[0].dtype())?);
            rotary(&t[0], &cos, &sin, path)
        }),
    ];
    let masks: [(&str, usize, usize, Mask, bool); 3] = [
        ("attention, capped", 4, 4, Mask::default(), false),
        ("attention, capped, padding, blind rows", 4, 4, mask(4, true, true), true),
        (
            "attention, capped, window, many blocks",
            70,
            140,
            Mask { window: Some(Window::new(9)), ..mask(140, true, false) },
            true,
        ),
    ];
    for (name, tq, tk, mask, drop) in masks {
        let shape =
            |t: usize, n: usize| -> &'static [usize] { Box::leak(vec![2, t, n * 8].into_boxed_slice()) };
        let inputs = [(shape(tq, 2), true), (shape(tk, 1), true), (shape(tk, 1), true)];
        all.push(case(name, &inputs, move |t, path| {
            let drop = drop.then(|| (0.25, stream(), 3));
            attention(&t[0], &t[1], &t[2], 2, 1, capped(0.9), &beside(&mask, &t[0])?, drop, path)
        }));
    }
    all
}

#[test]
fn a_cap_bites_and_a_wide_one_does_not() {
    let xs = (normal("cap", &[50]).to_dtype(DType::F32).unwrap() * 3.0).unwrap();
    for path in OpPath::ALL {
        let narrow = flat(&soft_cap(&xs, 2.0, path).unwrap());
        assert!(narrow.iter().all(|y| y.abs() < 2.0) && narrow.iter().any(|y| y.abs() > 1.9), "{path:?}");
        assert_close("wide", &flat(&soft_cap(&xs, 1e4, path).unwrap()), &flat(&xs), 1e-5);
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let error = soft_cap(&xs, bad, path).unwrap_err().to_string();
            assert!(error.contains(&format!("positive number, got {bad}")), "{error}");
        }
        let x = normal("q", &[1, 3, 8]).to_dtype(DType::F32).unwrap();
        let scores = Scores { scale: 1.0, cap: Some(0.0) };
        let error =
            attention(&x, &x, &x, 1, 1, scores, &Mask::default(), None, path).unwrap_err().to_string();
        assert!(error.contains("positive cap on scores, got 0"), "{error}");
    }
}
