//! A test's result, the files of the repository, values.

use std::io::Write;
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use monteclora::adapter::Params;
use monteclora::noise::{Noise, Purpose};

/// A test's result.
pub type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

/// Reports that a test was skipped, in a way that the test runner does not capture.
pub fn skipped(why: &str) {
    writeln!(std::io::stderr(), "skipped: {why}").ok();
}

/// A bundled file or folder. These tests are not in the published package, so it must be there.
pub fn asset(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/assets").join(name);
    assert!(path.exists(), "{}: no such file or folder", path.display());
    path
}

/// A case of `shared/cases` in a folder above the crate; if there is none, reports that.
pub fn case(name: &str) -> Option<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let found =
        here.ancestors().skip(1).map(|up| up.join("shared/cases").join(name)).find(|dir| dir.is_dir());
    if found.is_none() {
        skipped(&format!("no shared/cases/{name} beside the crate"));
    }
    found
}

/// A file or folder of `tests/data`.
pub fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

/// Moves every parameter into general position: biases are not 0, norms are not 1.
pub fn scatter(params: &Params) -> Outcome {
    for (name, param) in params.all() {
        let mut z = vec![0.0; param.var.elem_count()];
        Noise::new(11).stream(&name, Purpose::Init).fill_normal(0, &mut z);
        let z = Tensor::from_vec(z, param.var.shape(), params.device())?.to_dtype(params.dtype())?;
        params.set(&name, &(param.var.as_tensor() + (z * 0.15)?)?.detach())?;
    }
    Ok(())
}

/// Asserts that every element is within `tolerance`, which is absolute.
pub fn assert_close(got: &Tensor, expected: &Tensor, tolerance: f64) -> Outcome {
    assert_eq!(got.dims(), expected.dims());
    let wide = |t: &Tensor| t.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
    let (got, expected) = (wide(got)?, wide(expected)?);
    for (i, (g, e)) in got.iter().zip(&expected).enumerate() {
        assert!((g - e).abs() <= tolerance, "element {i}: got {g}, expected {e} within {tolerance}");
    }
    Ok(())
}

/// The recipe of this name with rank 4 and alpha 8, if it has them.
pub fn small(name: &str) -> String {
    match name {
        "full" | "ia3" | "prompt" => name.to_string(),
        "bottleneck" => format!("{name}:rank=4"),
        _ => format!("{name}:rank=4:alpha=8"),
    }
}
