//! Cases of attention: masks, windows, groups of heads, dropout, strided input.

use super::*;

/// One case: name, queries, keys, query heads, key heads, mask, and whether there is dropout.
type Sizes = (&'static str, usize, usize, usize, usize, Mask, bool);

pub(super) fn cases() -> Vec<Case> {
    let near = |mask: Mask, size: usize| Mask { window: Some(Window::new(size)), ..mask };
    let causal = Mask { causal: Some(CausalMask::default()), ..Mask::default() };
    let attentions: [Sizes; 14] = [
        ("attention", 3, 3, 2, 2, Mask::default(), false),
        ("attention, padding", 4, 4, 2, 2, mask(4, false, false), false),
        ("attention, blind rows", 4, 4, 2, 2, mask(4, false, true), false),
        ("attention, causal, tq < tk, groups", 3, 5, 4, 2, mask(5, true, false), false),
        ("attention, causal, tq > tk", 5, 3, 2, 1, causal.clone(), false),
        ("attention, dropout, groups", 3, 5, 4, 2, mask(5, false, false), true),
        ("attention, many blocks", 70, 67, 2, 1, mask(67, true, true), true),
        ("attention, window", 6, 6, 2, 2, near(mask(6, false, false), 2), false),
        ("attention, window, causal, tq < tk, groups", 3, 7, 4, 2, near(mask(7, true, false), 3), true),
        ("attention, window, causal, tq > tk", 6, 3, 2, 1, near(causal.clone(), 2), false),
        ("attention, window, tq > tk", 6, 3, 2, 1, near(Mask::default(), 2), false),
        ("attention, window, the last query", 1, 5, 2, 1, near(causal, 2), false),
        ("attention, window, many blocks", 70, 140, 2, 1, near(mask(140, true, true), 9), true),
        (
            "attention, window of both sides, many blocks",
            130,
            131,
            1,
            1,
            near(mask(131, false, false), 5),
            true,
        ),
    ];
    let mut all = Vec::new();
    for (name, tq, tk, heads, kv_heads, mask, drop) in attentions {
        let dim = if name == "attention" { 6 } else { 8 }; // device kernels do not take heads of 6
        let shape =
            |t: usize, n: usize| -> &'static [usize] { Box::leak(vec![2, t, n * dim].into_boxed_slice()) };
        let inputs = [(shape(tq, heads), true), (shape(tk, kv_heads), true), (shape(tk, kv_heads), true)];
        all.push(case(name, &inputs, move |t, path| {
            let drop = drop.then(|| (0.25, stream(), 3));
            attention(&t[0], &t[1], &t[2], heads, kv_heads, 0.4, &beside(&mask, &t[0])?, drop, path)
        }));
    }
    // q, k, v as slices of one fused projection: rows of 16 elements, 48 apart.
    all.push(case("attention, fused projection", &[(&[2, 3, 48], true)], |t, path| {
        let part = |i: usize| t[0].narrow(2, 16 * i, 16);
        let mask = beside(&mask(3, false, false), &t[0])?;
        attention(&part(0)?, &part(1)?, &part(2)?, 2, 2, 0.4, &mask, None, path)
    }));
    all
}

#[test]
fn a_kept_mask_serves_its_own_sizes_alone() {
    let (causal, window) = (CausalMask::default(), Window::new(3));
    let look = |tq: usize, tk: usize, mask: &Mask, path| {
        // Key j has the value e_j: element j of the output of query i is nonzero if and
        // only if it sees key j.
        let (q, k) = (normal("q", &[1, tq, 8]), normal("k", &[1, tk, 8]));
        let v =
            Tensor::eye(8, DType::F64, &Device::Cpu).unwrap().narrow(0, 0, tk).unwrap().unsqueeze(0).unwrap();
        let [q, k, v] = [q, k, v].map(|t| t.to_dtype(DType::F32).unwrap());
        let y = attention(&q, &k, &v, 1, 1, 0.3, mask, None, path).unwrap();
        y.squeeze(0).unwrap().to_vec2::<f32>().unwrap()
    };
    let masks = [(true, None), (true, Some(window.clone())), (false, Some(window))];
    for path in OpPath::ALL {
        for (is_causal, window) in &masks {
            let mask =
                Mask { causal: is_causal.then(|| causal.clone()), window: window.clone(), padding: None };
            for (tq, tk) in [(4, 4), (4, 4), (2, 6), (6, 2), (1, 5), (1, 1), (4, 4), (3, 8)] {
                for (i, row) in look(tq, tk, &mask, path).into_iter().enumerate() {
                    let seen = row.iter().map(|y| *y != 0.0);
                    let ahead = |j: usize| (j + tq) as i64 - (tk + i) as i64;
                    let sees = |j| {
                        j < tk && (!is_causal || ahead(j) <= 0) && (window.is_none() || ahead(j).abs() < 3)
                    };
                    assert!(seen.eq((0..8).map(sees)), "{path:?} {mask:?} {tq} {tk} query {i}: {row:?}");
                }
            }
        }
    }
}
