//! The cases of disentangled attention.

use super::*;

pub(super) fn cases() -> Vec<Case> {
    // Distances of 3 and more share a row of positions. Of nine rows, two belong to no distance.
    let sizes: [(&str, usize, usize, usize, bool, bool); 4] = [
        ("disentangled attention", 4, 4, 7, false, false),
        ("disentangled attention, first token", 1, 5, 7, false, false),
        ("disentangled attention, blind rows, dropout", 4, 4, 7, true, true),
        ("disentangled attention, many blocks", 67, 67, 9, false, true),
    ];
    let mut all = Vec::new();
    for (name, tq, tk, m, blind, drop) in sizes {
        let shape = |dims: &[usize]| -> &'static [usize] { Box::leak(dims.to_vec().into_boxed_slice()) };
        let inputs =
            [(shape(&[2 * tq + m, 16]), true), (shape(&[2 * tk + m, 16]), true), (shape(&[2, tk, 16]), true)];
        let far = tk as i64 - 1;
        let rows: Vec<u32> = (-far..=far).map(|distance| (3 - distance.clamp(-3, 3)) as u32).collect();
        all.push(case(name, &inputs, move |t, path| {
            let padding = beside(&mask(tk, false, blind), &t[0])?.padding.expect("padding");
            let drop = drop.then(|| (0.25, stream(), 3));
            disentangled_attention(&t[0], &t[1], &t[2], &rows, 2, 0.4, &padding, drop, path)
        }));
    }
    all
}
