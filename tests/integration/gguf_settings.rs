//! Settings in GGUF files that this crate does not implement.

use std::path::Path;

use crate::gguf::locate;
use crate::support::Outcome;

#[test]
fn settings_of_a_file_that_nothing_here_computes_are_refused_by_name() -> Outcome {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/gguf_golden.gguf");
    let (folder, bytes) = (tempfile::tempdir()?, std::fs::read(data)?);
    let path = folder.path().join("model.gguf");
    let number = |value: f32| (6, value.to_le_bytes().to_vec());
    let truth = |value: bool| (7, vec![u8::from(value)]);
    for (key, neutral, other) in [
        ("llama.rope.scaling.attn_factor", number(1.0), number(2.0)),
        ("llama.rope.scaling.yarn_attn_factor", number(1.0), number(2.0)),
        ("llama.rope.scaling.yarn_log_multiplier", number(0.0), number(0.1)),
        ("llama.rope.scaling.yarn_ext_factor", number(-1.0), number(1.0)),
        ("llama.attention.causal", truth(true), truth(false)),
    ] {
        std::fs::write(&path, with_value(&bytes, key, neutral))?;
        locate(&path)?.config()?;
        std::fs::write(&path, with_value(&bytes, key, other))?;
        let error = locate(&path)?.config().unwrap_err().to_string();
        assert!(error.contains(&format!("{key}: ")), "{error}");
    }
    Ok(())
}

/// The bytes of a GGUF file with an additional metadata value of this type and these bytes.
fn with_value(file: &[u8], key: &str, (kind, value): (u32, Vec<u8>)) -> Vec<u8> {
    let count = u64::from_le_bytes(std::array::from_fn(|i| file[16 + i]));
    let text = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
    let mut more =
        [text(key), kind.to_le_bytes().to_vec(), value, text("blanks"), 8u32.to_le_bytes().to_vec()].concat();
    // Pads with blanks, since tensors are aligned to 32 bytes.
    more.extend(text(&" ".repeat(32 - (more.len() + 8) % 32)));
    [&file[..16], &(count + 2).to_le_bytes(), &more, &file[24..]].concat()
}
