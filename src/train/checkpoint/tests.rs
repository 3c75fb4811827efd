use std::collections::HashSet;

use candle_core::{Device, Tensor};

use super::state::{Sum, MANIFEST, STATE, TENSORS, VERSION};
use std::collections::BTreeMap;

use super::*;
use crate::optim::Moments;

fn checkpoints(dir: &Path) -> Checkpoints {
    Checkpoints { resume: true, ..Checkpoints::new(dir.join("run")) }
}

fn state(step: usize) -> Result<State> {
    let tensor = |value: f32| Ok::<_, Error>(Tensor::new(&[value, -0.0, f32::MIN_POSITIVE], &Device::Cpu)?);
    let moments = Moments { first: tensor(2.0)?, second: tensor(3.0)?, steps: step };
    Ok(State {
        run_state: RunState {
            step,
            draw: 3 * step as u64,
            best: Some((0.1 + 0.2, 1)),
            moments: [("w".to_string(), step)].into(),
            settings: [("lr".to_string(), "0.1".to_string())].into(),
            ..RunState::default()
        },
        params: [("w".to_string(), tensor(step as f32)?)].into(),
        moments: [("w".to_string(), moments)].into(),
        best: [("w".to_string(), tensor(0.5)?)].into(),
        method: [("kept/w".to_string(), tensor(1.0)?)].into(),
    })
}

fn begin(checkpoints: &Checkpoints) -> Result<Option<Found>> {
    fs::create_dir_all(&checkpoints.dir).map_err(Error::io(&*checkpoints.dir))?;
    checkpoints.begin(&[("lr".to_string(), "0.1".to_string())].into())
}

fn save(checkpoints: &Checkpoints, step: usize) -> Result<()> {
    fs::create_dir_all(&checkpoints.dir).map_err(Error::io(&*checkpoints.dir))?;
    assert_eq!(checkpoints.save(&state(step)?)?, None);
    Ok(())
}

fn names(checkpoints: &Checkpoints) -> HashSet<String> {
    checkpoints.names().unwrap().into_iter().map(|name| name.into_string().unwrap()).collect()
}

fn temporary() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

#[test]
fn a_state_comes_back_to_the_bit_and_the_oldest_go() -> Result<()> {
    let dir = temporary();
    let checkpoints = checkpoints(dir.path());
    assert!(begin(&checkpoints)?.is_none());
    for step in [2, 4, 10, 100_000_000] {
        save(&checkpoints, step)?;
    }
    assert_eq!(checkpoints.steps()?, [10, 100_000_000]);
    let found = begin(&checkpoints)?.unwrap();
    assert!(found.warnings.is_empty());
    let expected = state(100_000_000)?;
    assert_eq!(found.state.run_state, RunState { version: VERSION, ..expected.run_state.clone() });
    let bits = |state: &State| -> Result<Vec<(String, Vec<u32>)>> {
        let bits = |t: &Tensor| Ok::<_, Error>(t.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect());
        state.tensors().map(|(name, t)| Ok((name, bits(t)?))).collect()
    };
    assert_eq!(bits(&found.state)?, bits(&expected)?);
    assert_eq!(found.state.moments["w"].steps, 100_000_000);
    Ok(())
}

#[test]
fn without_leave_a_run_neither_goes_on_nor_begins_over_another() -> Result<()> {
    let dir = temporary();
    let checkpoints = Checkpoints { resume: false, ..checkpoints(dir.path()) };
    save(&checkpoints, 3)?;
    let error = begin(&checkpoints).err().unwrap().to_string();
    assert!(error.contains("reached step 3: resume it, or give another folder"), "{error}");
    Ok(())
}

#[test]
fn whatever_byte_is_damaged_the_one_before_is_taken_and_the_damage_named() -> Result<()> {
    let dir = temporary();
    let checkpoints = checkpoints(dir.path());
    save(&checkpoints, 1)?;
    save(&checkpoints, 2)?;
    let mut tried = 0;
    for name in [STATE, TENSORS, MANIFEST] {
        let path = checkpoints.place(2).join(name);
        let whole = fs::read(&path).unwrap();
        let mut damages = vec![None, Some(Vec::new()), Some([&whole[..], b"x"].concat())];
        damages.extend((0..whole.len()).step_by(7).map(|at| Some(whole[..at].to_vec())));
        damages.extend((0..whole.len()).map(|at| {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << (at % 8);
            Some(bytes)
        }));
        for damage in damages {
            match &damage {
                Some(bytes) => fs::write(&path, bytes).unwrap(),
                None => fs::remove_file(&path).unwrap(),
            }
            tried += 1;
            let found = begin(&checkpoints)?.unwrap();
            assert_eq!(found.state.run_state.step, 1, "{name}: {damage:?}");
            assert!(
                found.warnings.len() == 1 && found.warnings[0].contains("step-00000002"),
                "{:?}",
                found.warnings
            );
            // It was renamed; move it back for the next damage.
            fs::rename(checkpoints.dir.join("damaged-1-step-00000002"), checkpoints.place(2)).unwrap();
        }
        fs::write(&path, whole).unwrap();
    }
    assert!(tried > 800, "{tried}");
    fs::write(checkpoints.place(1).join(STATE), "{}").unwrap();
    fs::write(checkpoints.place(2).join(STATE), "{}").unwrap();
    let error = begin(&checkpoints).err().unwrap().to_string();
    assert!(error.contains("none of its checkpoints can be read") && error.contains("CRC-32"), "{error}");
    Ok(())
}

#[test]
fn what_a_killed_run_left_half_written_goes_with_the_next_start() -> Result<()> {
    let dir = temporary();
    let checkpoints = checkpoints(dir.path());
    save(&checkpoints, 1)?;
    for step in [1, 7] {
        fs::create_dir_all(files::partial_folder(&checkpoints.place(step)).join("deep")).unwrap();
    }
    assert_eq!(begin(&checkpoints)?.unwrap().state.run_state.step, 1);
    assert_eq!(names(&checkpoints), ["step-00000001".to_string()].into());
    // Killed between its last checkpoint and the removal of older ones.
    for step in [2, 3] {
        save(&Checkpoints { keep: 9, ..checkpoints.clone() }, step)?;
    }
    assert_eq!(begin(&checkpoints)?.unwrap().state.run_state.step, 3);
    assert_eq!(names(&checkpoints), ["step-00000002", "step-00000003"].map(String::from).into());
    Ok(())
}

#[test]
fn folders_that_are_no_checkpoints_of_ours_are_left_alone() -> Result<()> {
    let dir = temporary();
    let checkpoints = checkpoints(dir.path());
    save(&checkpoints, 1)?;
    for stranger in ["step-9", "step-+0000009", "step-last", "step-0000000001"] {
        fs::create_dir(checkpoints.dir.join(stranger)).unwrap();
    }
    assert_eq!(checkpoints.steps()?, [1]);
    save(&checkpoints, 2)?;
    assert_eq!(checkpoints.steps()?, [1, 2]);
    assert!(checkpoints.dir.join("step-9").is_dir());
    Ok(())
}

/// Writes a manifest that matches the files.
fn seal(place: &Path) {
    let sum = |name: &str| Sum::of(&*fs::read(place.join(name)).unwrap()).unwrap();
    let sums = [STATE, TENSORS].map(|name| (name.to_string(), sum(name)));
    files::write_json(&place.join(MANIFEST), &BTreeMap::from(sums)).unwrap();
}

#[test]
fn damaged_checkpoints_are_put_aside_and_count_for_nothing() -> Result<()> {
    let dir = temporary();
    let checkpoints = Checkpoints { keep: 3, ..checkpoints(dir.path()) };
    for step in [1, 2, 3] {
        save(&checkpoints, step)?;
    }
    for step in [2, 3] {
        fs::write(checkpoints.place(step).join(TENSORS), "").unwrap();
    }
    let found = begin(&checkpoints)?.unwrap();
    assert!(found.state.run_state.step == 1 && found.warnings.len() == 2);
    // The same step is written and damaged again.
    save(&checkpoints, 2)?;
    fs::remove_file(checkpoints.place(2).join(MANIFEST)).unwrap();
    assert!(begin(&checkpoints)?.unwrap().warnings[0].contains("damaged-2-step-00000002"));
    for step in [2, 3, 4] {
        save(&checkpoints, step)?;
    }
    let damaged = ["damaged-1-step-00000002", "damaged-2-step-00000002", "damaged-1-step-00000003"];
    let sound = ["step-00000002", "step-00000003", "step-00000004"];
    assert_eq!(names(&checkpoints), damaged.into_iter().chain(sound).map(String::from).collect());
    Ok(())
}

#[test]
fn what_cannot_be_read_now_or_by_this_version_is_no_damage() -> Result<()> {
    let dir = temporary();
    let checkpoints = checkpoints(dir.path());
    save(&checkpoints, 1)?;
    save(&checkpoints, 2)?;
    let before = names(&checkpoints);
    let place = checkpoints.place(2);
    let run_state = fs::read_to_string(place.join(STATE)).unwrap();
    // The previous version, and a later one with an unknown field.
    for (version, rest) in [(1, ""), (3, ", \"later\": true")] {
        let other = run_state.replace("\"version\": 2", &format!("\"version\": {version}{rest}"));
        assert_ne!(run_state, other);
        fs::write(place.join(STATE), other).unwrap();
        seal(&place);
        let error = begin(&checkpoints).err().unwrap().to_string();
        assert!(error.contains(&format!("has version {version}, this crate reads 2")), "{error}");
    }
    // A folder in a file's place: it exists, but cannot be read as a file.
    fs::remove_file(place.join(MANIFEST)).unwrap();
    fs::create_dir(place.join(MANIFEST)).unwrap();
    let error = begin(&checkpoints).err().unwrap();
    assert!(matches!(&error, Error::Io { .. }), "{error}");
    assert_eq!(names(&checkpoints), before);
    Ok(())
}

#[test]
fn an_old_checkpoint_that_stays_is_told_and_ends_nothing() -> Result<()> {
    let dir = temporary();
    let checkpoints = Checkpoints { keep: 1, ..checkpoints(dir.path()) };
    save(&checkpoints, 1)?;
    // A file at the path to which the old checkpoint would be renamed.
    fs::write(files::partial_folder(&checkpoints.place(1)), "").unwrap();
    let warning = checkpoints.save(&state(2)?)?.unwrap();
    assert!(
        warning.starts_with("old checkpoints could not be removed: ") && warning.contains("step-00000001"),
        "{warning}"
    );
    assert_eq!(checkpoints.steps()?, [1, 2]);
    Ok(())
}

#[test]
fn tensors_that_cannot_be_read_are_named_with_their_file() -> Result<()> {
    let dir = temporary();
    let checkpoints = checkpoints(dir.path());
    save(&checkpoints, 1)?;
    let place = checkpoints.place(1);
    // A matching manifest: the file is not damaged, but is no safetensors file either.
    fs::write(place.join(TENSORS), "no tensors").unwrap();
    seal(&place);
    let error = State::read(&place, 1).unwrap_err().to_string();
    assert!(error.contains(TENSORS) && error.contains("its tensors cannot be read"), "{error}");
    Ok(())
}

#[test]
fn settings_must_agree_but_for_what_is_named() -> Result<()> {
    let dir = temporary();
    let of = |pairs: &[(&str, &str)]| -> Settings {
        pairs.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect()
    };
    let before = of(&[("lr", "0.1"), ("seed", "1")]);
    let compare = |now: &[(&str, &str)], changes: &[&str]| {
        let changes = changes.iter().map(ToString::to_string).collect();
        let checkpoints = Checkpoints { changes, ..checkpoints(dir.path()) };
        checkpoints.compare(&before, &of(now)).map_err(|error| error.to_string())
    };
    assert_eq!(compare(&[("lr", "0.1"), ("seed", "1")], &[]), Ok(()));
    let error = compare(&[("lr", "0.2"), ("seed", "1")], &[]).unwrap_err();
    assert!(error.contains("lr") && error.contains("had 0.1, this one has 0.2"), "{error}");
    assert_eq!(compare(&[("lr", "0.2"), ("seed", "1")], &["lr"]), Ok(()));
    assert!(compare(&[("lr", "0.2"), ("seed", "2")], &["lr"]).unwrap_err().contains("seed"));
    assert!(compare(&[("lr", "0.1")], &[]).unwrap_err().contains("this one has nothing"));
    assert!(compare(&[("lr", "0.1"), ("seed", "1"), ("new", "2")], &[]).unwrap_err().contains("had nothing"));
    let with = |rows: &str| compare(&[("lr", "0.1"), ("seed", "1"), ("rows", rows)], &["rows"]);
    assert!(with("CRC-32 1").unwrap_err().contains("rows a step takes and cannot change"));
    assert!(compare(&[("lr", "0.1"), ("seed", "1")], &["rate"]).unwrap_err().contains("\"rate\""));
    Ok(())
}
