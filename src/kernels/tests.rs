//! Tests of the kernels as C++ (`host.cpp`, compiled by `c++`) against the operations that they replace,
//! under two sanitizers.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use candle_core::{DType, Device, Result, Tensor, Var};

use crate::noise::{Noise, Purpose, Stream};
use crate::ops::{layer_norm, rms_norm, OpPath};
use crate::special::{digamma, gamma_quantile, ln_gamma, trigamma};

mod activation;
mod attention;
mod divergence;
mod draws;
mod energy;
mod linear;
mod loss;

/// The words of a request to the program: integers, and doubles by their bits.
#[derive(Default)]
struct Request(Vec<u64>);

impl Request {
    fn of(integers: &[u64]) -> Self {
        Self(integers.to_vec())
    }

    fn and(mut self, numbers: &[f64]) -> Self {
        self.0.extend(numbers.iter().map(|x| x.to_bits()));
        self
    }

    /// The numbers of the answer, which must be the same from a program with the thread sanitizer and one
    /// with the address sanitizer.
    fn answer(&self) -> Vec<f64> {
        static PROGRAMS: OnceLock<tempfile::TempDir> = OnceLock::new();
        let folder = PROGRAMS.get_or_init(|| {
            let folder = tempfile::tempdir().expect("a folder");
            SANITIZERS.iter().for_each(|sanitizer| compile(sanitizer, &folder.path().join(sanitizer)));
            folder
        });
        let [races, addresses] = SANITIZERS.map(|sanitizer| self.ask(&folder.path().join(sanitizer)));
        assert_eq!(races, addresses, "the order of threads shows");
        let words = races.chunks_exact(8);
        words.map(|word| f64::from_ne_bytes(word.try_into().expect("eight bytes"))).collect()
    }

    fn ask(&self, program: &Path) -> Vec<u8> {
        let mut child = Command::new(program)
            .env("ASAN_OPTIONS", "detect_leaks=0")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program");
        let request: Vec<u8> = self.0.iter().flat_map(|word| word.to_ne_bytes()).collect();
        child.stdin.take().expect("its input").write_all(&request).expect("room for the request");
        let output = child.wait_with_output().expect("an answer");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    }
}

const SANITIZERS: [&str; 2] = ["thread", "address,undefined"];

fn compile(sanitizer: &str, program: &Path) {
    let mut compiler = Command::new("c++");
    let options = ["-std=c++17", "-O1", "-g", "-ffp-contract=off", "-fno-sanitize-recover=all", "-pthread"];
    compiler.args(options).arg(format!("-fsanitize={sanitizer}")).arg("-o").arg(program);
    compiler.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/kernels/host.cpp"));
    assert!(compiler.status().expect("a C++ compiler, `c++`").success());
}

fn stream(purpose: Purpose) -> Stream {
    Noise::new(11).stream("layer.default", purpose)
}

fn assert_close(got: &[f64], want: &[f64], relative: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let room = relative * want.abs().max(1e-30);
        assert!((got - want).abs() <= room, "{what} {i}: {got}, on the host {want}");
    }
}

#[test]
fn noise_has_the_host_s_bits() {
    let (stream, draw, n) = (stream(Purpose::Gaussian), (5 << 40) + 3, 1000);
    let got = Request::of(&[1, stream.key(), draw, n as u64]).answer();
    let (mut uniforms, mut normals, mut doubles) = (vec![0.0; n], vec![0f32; n], vec![0.0; n]);
    stream.fill_uniform(draw, &mut uniforms);
    stream.fill_normal_f32(draw, &mut normals);
    stream.fill_normal(draw, &mut doubles);
    assert_eq!(got[..n], uniforms);
    assert_eq!(got[n..2 * n], normals.into_iter().map(f64::from).collect::<Vec<_>>());
    assert_close(&got[2 * n..], &doubles, 1e-12, "normal");
}

#[test]
fn the_gamma_family_and_quantiles_are_the_host_s() {
    let xs = [1e-3, 0.07, 0.5, 1.0, 1.46163, 2.0, 7.3, 11.99, 12.0, 55.0, 1e6];
    for (derivative, f) in [ln_gamma as fn(f64) -> f64, digamma, trigamma].into_iter().enumerate() {
        let got = Request::of(&[3, derivative as u64, xs.len() as u64]).and(&xs).answer();
        let want = xs.map(f);
        for (i, (got, want)) in got.iter().zip(want).enumerate() {
            assert!((got - want).abs() <= 4e-15 * want.abs().max(1.0), "{derivative} {i}: {got} {want}");
        }
        let narrow = xs.map(|x| f64::from(f(f64::from(x as f32)) as f32));
        assert_close(&got[xs.len()..], &narrow, 1.2e-7, "in single precision");
    }
    let shapes = [1e-4, 0.05, 0.3, 0.99, 1.0, 1.5, 4.0, 17.0, 200.0];
    let uniforms = [1e-12, 1e-3, 0.2, 0.5, 0.63, 0.9, 0.999, 1.0 - 1e-12];
    let pairs: Vec<f64> = shapes.iter().flat_map(|a| uniforms.iter().flat_map(|u| [*a, *u])).collect();
    let got = Request::of(&[2, pairs.len() as u64 / 2]).and(&pairs).answer();
    for (pair, got) in pairs.chunks(2).zip(got.chunks(2)) {
        let want = gamma_quantile(pair[0], pair[1]);
        assert!(
            (got[0] - want.log_z).abs() <= 1e-12 * want.log_z.abs().max(1.0),
            "{pair:?}: {got:?} {want:?}"
        );
        assert!((got[1] / want.dlog_z - 1.0).abs() < 1e-9, "{pair:?}: {got:?} {want:?}");
    }
    let outside = Request::of(&[2, 4]).and(&[0.0, 0.5, f64::NAN, 0.5, 1.0, 0.0, 2e9, 0.5]).answer();
    assert!(outside.iter().all(|x| x.is_nan()), "{outside:?}");
}

#[test]
fn dropout_keeps_what_the_host_keeps() {
    let (stream, draw, threshold) = (stream(Purpose::Dropout), 9, 1 << 30);
    for count in [1, 2, 5, 128, 131] {
        let got = Request::of(&[5, stream.key(), draw, count, threshold]).answer();
        let keeps = |i: u64| stream.words(draw, i / 4)[(i % 4) as usize] >= threshold as u32;
        let want: Vec<f64> = (0..count).map(|i| f64::from(u8::from(keeps(i)))).collect();
        let (mask, dropped) = got.split_at(count as usize + 1);
        assert_eq!(mask, [&want[..], &[255.0]].concat());
        assert!(dropped.iter().zip(&want).all(|(dropped, kept)| *dropped == 2.0 * kept));
        assert!(dropped[count as usize].is_nan());
    }
}

#[test]
fn norms_and_their_gradients_are_those_of_the_blocks() -> Result<()> {
    let (device, eps) = (Device::Cpu, 1e-3);
    // More elements than threads, fewer, and only one.
    for (dim, narrow, centred, added, biased) in [
        (100, false, true, true, true),
        (100, false, false, false, false),
        (7, false, true, false, true),
        (1, false, true, true, true),
        (70, true, true, true, true),
        (70, true, false, false, false),
    ] {
        let rows = 3;
        let dtype = if narrow { DType::BF16 } else { DType::F32 };
        let values = |which: u64, len: usize| -> Result<Tensor> {
            let mut xs = vec![0f32; len];
            Noise::new(4).stream("values", Purpose::Init).fill_normal_f32(which, &mut xs);
            Tensor::from_vec(xs, len, &device)?.to_dtype(dtype)?.to_dtype(DType::F64)
        };
        let parts = [rows * dim, rows * dim, dim, dim, rows * dim];
        let parts = parts.iter().zip(0..).map(|(len, i)| values(i, *len)).collect::<Result<Vec<_>>>()?;
        let sizes = [rows, dim, narrow.into(), centred.into(), added.into(), biased.into()].map(|n| n as u64);
        let numbers = parts.iter().map(Tensor::to_vec1::<f64>).collect::<Result<Vec<_>>>()?.concat();
        let got = Request::of(&[&[6][..], &sizes].concat()).and(&[eps]).and(&numbers).answer();

        let [x, r, w, b, g] = &parts[..] else { unreachable!("five parts") };
        let x = Var::from_tensor(&x.reshape((rows, dim))?)?;
        let input = if added { (x.as_tensor() + r.reshape((rows, dim))?)? } else { x.as_tensor().clone() };
        let b = if biased { b.clone() } else { b.zeros_like()? };
        let y = if centred {
            layer_norm(&input, w, &b, eps, OpPath::Fused)?
        } else {
            rms_norm(&input, w, eps, OpPath::Fused)?
        };
        let grads = (&y * g.reshape((rows, dim))?)?.sum_all()?.backward()?;
        let dx = grads.get(&x).expect("a gradient").flatten_all()?.to_vec1::<f64>()?;
        let want = [y.flatten_all()?.to_vec1::<f64>()?, dx].concat();
        let room = if narrow { 0.004 } else { 2e-6 };
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            assert!((got - want).abs() <= room * want.abs().max(0.3), "{dim} {narrow} {i}: {got} {want}");
        }
        assert_eq!(got.len(), want.len());
    }
    Ok(())
}

#[test]
fn numbers_are_rounded_to_bf16_as_the_host_rounds_them() -> Result<()> {
    // An RMS norm of one element with weight x: z is 1 up to rounding, so y is x.
    let nans = [f32::NAN, f32::from_bits(0x7fff_ffff)];
    let xs = [1.0f32, 1.003_906_2, 1.011_718_8, -3.389_5e38, f32::INFINITY, 1e-40, -0.0, 0.1];
    for x in xs.into_iter().chain(nans) {
        let sizes = [6, 1, 1, 1, 0, 0, 0];
        let got = Request::of(&sizes).and(&[0.0, 1.0, 0.0, f64::from(x), 0.0, 1.0]).answer()[0];
        let want = Tensor::new(&[x], &Device::Cpu)?.to_dtype(DType::BF16)?.to_dtype(DType::F64)?;
        let want = want.to_vec1::<f64>()?[0];
        assert!(got == want || got.is_nan() && want.is_nan(), "{x}: {got} {want}");
    }
    Ok(())
}

#[test]
fn adamw_and_clipping_have_the_host_s_bits_and_squares_their_sum() {
    let values = |which: u64, count: usize| {
        let mut xs = vec![0f32; count];
        Noise::new(4).stream("values", Purpose::Init).fill_normal_f32(which, &mut xs);
        xs
    };
    let wide = |xs: &[f32]| xs.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
    let [factor, beta1, rest1, beta2, rest2, eps] = [0.3, 0.9, 0.1, 0.98, 0.02, 1e-6f32];
    // More elements than the threads of all blocks, fewer, none.
    let (blocks, mut want, mut squares) = (3, Vec::new(), 0.0);
    let (mut clipped, mut summed) = (Vec::new(), Vec::new());
    let mut request = Request::of(&[4, 3, blocks]).and(&wide(&[factor, beta1, rest1, beta2, rest2, eps]));
    for (i, count) in [250, 5, 0].into_iter().enumerate() {
        let (i, [keep, rate, inverse]) = (i as u64, [0.999, 3e-3, 7.0 + i as f32]);
        let (mut w, mut m, grad) = (values(4 * i, count), values(4 * i + 1, count), values(4 * i + 3, count));
        let mut v: Vec<f32> = values(4 * i + 2, count).iter().map(|x| x * x).collect();
        request.0.push(count as u64);
        request = request.and(&wide(&[keep, rate, inverse])).and(&wide(&[&w[..], &m, &v, &grad].concat()));
        for i in 0..count {
            let g = factor * grad[i];
            m[i] = beta1 * m[i] + rest1 * g;
            v[i] = beta2 * v[i] + rest2 * (g * g);
            w[i] = keep * w[i] - rate * m[i] / ((v[i] * inverse).sqrt() + eps);
        }
        want.extend(wide(&[w, m, v].concat()));
        squares += wide(&grad).iter().map(|g| g * g).sum::<f64>();
        clipped.extend(grad.iter().map(|g| f64::from(beta1 * g)));
        summed.extend(grad.iter().map(|g| f64::from(g + beta1 * g)));
    }
    let got = request.answer();
    let (updated, rest) = got.split_at(want.len());
    let (total, scaled) = rest.split_at(1);
    assert_eq!(updated, want);
    assert_close(total, &[squares], 1e-14, "sum of squares");
    let (scaled, added) = scaled.split_at(clipped.len());
    assert_eq!(scaled, clipped);
    assert_eq!(added, summed);
}
