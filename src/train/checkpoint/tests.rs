use super::*;

fn checkpoints(dir: &Path) -> Checkpoints {
    Checkpoints { resume: true, ..Checkpoints::new(dir.join("run")) }
}

fn state(step: usize) -> Result<State> {
    let tensor = |value: f32| Ok::<_, Error>(Tensor::new(&[value, -0.0, f32::MIN_POSITIVE], &Device::Cpu)?);
    let moments = Moments { first: tensor(2.0)?, second: tensor(3.0)?, steps: step };
    Ok(State {
        numbers: Numbers {
            step,
            draw: 3 * step as u64,
            best: Some((0.1 + 0.2, 1)),
            moments: [("w".to_string(), step)].into(),
            settings: [("lr".to_string(), "0.1".to_string())].into(),
            ..Numbers::default()
        },
        params: [("w".to_string(), tensor(step as f32)?)].into(),
        moments: [("w".to_string(), moments)].into(),
        best: [("w".to_string(), tensor(0.5)?)].into(),
        method: [("kept/w".to_string(), tensor(1.0)?)].into(),
    })
}

fn begin(checkpoints: &Checkpoints) -> Result<Option<Found>> {
    checkpoints.begin(&[("lr".to_string(), "0.1".to_string())].into())
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
        checkpoints.save(&state(step)?)?;
    }
    assert_eq!(checkpoints.steps()?, [10, 100_000_000]);
    let found = begin(&checkpoints)?.unwrap();
    assert!(found.damaged.is_empty());
    let expected = state(100_000_000)?;
    assert_eq!(found.state.numbers, Numbers { version: VERSION, ..expected.numbers.clone() });
    let bits = |state: &State| -> Result<Vec<(String, Vec<u32>)>> {
        let bits = |t: &Tensor| Ok::<_, Error>(t.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect());
        state.tensors().map(|(name, t)| Ok((name, bits(t)?))).collect()
    };
    assert_eq!(bits(&found.state)?, bits(&expected)?);
    assert_eq!(found.state.moments["w"].steps, 100_000_000);
    // A run that went back does not leave what it gave up.
    checkpoints.save(&state(12)?)?;
    assert_eq!(checkpoints.steps()?, [10, 12]);
    Ok(())
}

#[test]
fn without_leave_a_run_neither_goes_on_nor_begins_over_another() -> Result<()> {
    let dir = temporary();
    let checkpoints = Checkpoints { resume: false, ..checkpoints(dir.path()) };
    checkpoints.save(&state(3)?)?;
    let error = begin(&checkpoints).err().unwrap().to_string();
    assert!(error.contains("reached step 3: resume it, or give another folder"), "{error}");
    Ok(())
}

#[test]
fn whatever_byte_is_damaged_the_one_before_is_taken_and_the_damage_named() -> Result<()> {
    let dir = temporary();
    let checkpoints = checkpoints(dir.path());
    checkpoints.save(&state(1)?)?;
    checkpoints.save(&state(2)?)?;
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
            assert_eq!(found.state.numbers.step, 1, "{name}: {damage:?}");
            assert!(found.damaged.len() == 1 && found.damaged[0].contains("step-00000002"));
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
fn what_a_killed_run_left_half_written_goes_with_the_next_checkpoint() -> Result<()> {
    let dir = temporary();
    let checkpoints = checkpoints(dir.path());
    checkpoints.save(&state(1)?)?;
    for half in ["123", "old-7"] {
        fs::create_dir_all(checkpoints.dir.join(format!("{PARTIAL}{half}/deep"))).unwrap();
    }
    assert_eq!(begin(&checkpoints)?.unwrap().state.numbers.step, 1);
    checkpoints.save(&state(2)?)?;
    assert_eq!(fs::read_dir(&checkpoints.dir).unwrap().count(), 2);
    Ok(())
}

#[test]
fn folders_that_are_no_checkpoints_of_ours_are_left_alone() -> Result<()> {
    let dir = temporary();
    let checkpoints = checkpoints(dir.path());
    checkpoints.save(&state(1)?)?;
    for stranger in ["step-9", "step-+0000009", "step-last", "step-0000000001"] {
        fs::create_dir(checkpoints.dir.join(stranger)).unwrap();
    }
    assert_eq!(checkpoints.steps()?, [1]);
    checkpoints.save(&state(2)?)?;
    assert_eq!(checkpoints.steps()?, [1, 2]);
    assert!(checkpoints.dir.join("step-9").is_dir());
    Ok(())
}

#[test]
fn tensors_that_cannot_be_read_are_named_with_their_file() -> Result<()> {
    let dir = temporary();
    let checkpoints = checkpoints(dir.path());
    checkpoints.save(&state(1)?)?;
    let place = checkpoints.place(1);
    // With a manifest that fits: no damage, but no such file either.
    fs::write(place.join(TENSORS), "no tensors").unwrap();
    let sums = [STATE, TENSORS].map(|name| (name.to_string(), Sum::of(&place.join(name)).unwrap()));
    files::write_json(&place.join(MANIFEST), &BTreeMap::from(sums))?;
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
    assert!(compare(&[("lr", "0.1"), ("seed", "1")], &["rate"]).unwrap_err().contains("\"rate\""));
    Ok(())
}
