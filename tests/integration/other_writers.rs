//! Reads small files of other tools and data sets, one of each kind, from `shared/cases` beside the crate, if
//! it exists.

use monteclora::data::task::{Label, Task};
use monteclora::models::decoder::DecoderConfig;
use monteclora::models::hub::ModelFiles;
use monteclora::models::roberta::RobertaConfig;
use monteclora::peft::AdapterFile;

use crate::support::{asset, case, Outcome};

#[test]
fn a_null_an_initialisation_and_a_layout_of_others_are_read() -> Outcome {
    if let Some(dir) = case("id2label-null") {
        assert_eq!(RobertaConfig::from_file(&dir.join("config.json"))?.num_labels(), 2);
    }
    if let Some(dir) = case("init-mica") {
        assert!(!AdapterFile::read(dir)?.layers.is_empty());
    }
    if let Some(dir) = case("boolq-official") {
        let splits = Task::BoolQ.load_folder(&dir)?;
        let labels: Vec<Label> = splits.dev[0].1.iter().map(|row| row.label).collect();
        assert_eq!((splits.train.len(), labels), (2, vec![Label::Class(1), Label::Class(0)]));
    }
    Ok(())
}

#[test]
fn end_tokens_beside_the_bundled_model_are_read() -> Outcome {
    let Some(dir) = case("generation-config") else { return Ok(()) };
    let (model, copy) = (asset("stories260k"), tempfile::tempdir()?);
    for (from, name) in
        [(&model, "config.json"), (&model, "model.safetensors"), (&dir, "generation_config.json")]
    {
        std::fs::copy(from.join(name), copy.path().join(name))?;
    }
    let files = ModelFiles::locate(copy.path().to_str().ok_or("a path")?, None)?;
    let mut ends = DecoderConfig::from_files(&files)?.eos_token_ids;
    ends.sort_unstable();
    assert_eq!(ends, [2, 426]);
    Ok(())
}
