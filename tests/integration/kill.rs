//! The `glue` example under SIGKILL, other signals, a full disk, a folder that cannot be written, and with
//! different numbers of threads. In a measured run, 8 of 52 kills hit the writing of a checkpoint; 32 runs
//! ended with the same bytes.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use monteclora::noise::{Noise, Purpose};

use crate::support::programs::{glue, sst2};
use crate::support::{skipped, Outcome};

/// The number of kills per method, at random moments of a run.
const KILLS: [(&str, u64); 3] = [("monteclora", 26), ("lora", 13), ("full", 13)];

/// A small task, and the example and method to run on it.
struct Setup {
    home: tempfile::TempDir,
    glue: PathBuf,
    method: &'static str,
    epochs: usize,
}

impl Setup {
    fn new(method: &'static str) -> Outcome<Self> {
        let home = tempfile::tempdir()?;
        sst2(home.path(), 48, 24)?;
        Ok(Self { home, glue: glue()?, method, epochs: 3 })
    }

    /// The arguments of a run into `out`. The learning rate is high enough for its effect to show.
    fn args(&self, out: &Path) -> Vec<String> {
        let text = format!(
            "--data {} --method {} --epochs {} --batch-size 4 --accumulation 2 --eval-every 5 --lr 3e-3 \
             --checkpoint-every 1 --posterior-samples 2 --resume --output {}",
            self.home.path().display(),
            self.method,
            self.epochs,
            out.display()
        );
        text.split_whitespace().map(str::to_string).collect()
    }

    fn command(&self, out: &Path) -> Command {
        let mut command = Command::new(&self.glue);
        // One thread leaves cores to the other tests; the results do not depend on the number of threads.
        command.args(self.args(out)).stdout(Stdio::null()).env("RAYON_NUM_THREADS", "1");
        command
    }

    /// Runs to the end and returns the standard error.
    fn finish(&self, out: &Path) -> Outcome<String> {
        let output = self.command(out).stderr(Stdio::piped()).output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() {
            Ok(said)
        } else {
            Err(said.into())
        }
    }

    /// Runs to the end, or kills the run after `patience`.
    fn kill_after(&self, out: &Path, patience: Duration) -> Outcome<ExitStatus> {
        let mut child = Guard(self.command(out).stderr(Stdio::null()).spawn()?);
        let clock = Instant::now();
        loop {
            match child.0.try_wait()? {
                Some(status) => return Ok(status),
                None if clock.elapsed() > patience => {
                    child.0.kill()?;
                    return Ok(child.0.wait()?);
                }
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }
}

/// A process that is killed when dropped, so that no failed test leaves it behind.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// All files of a finished run with their bytes, which are left empty for files that differ each time.
fn results(out: &Path) -> Outcome<Vec<(PathBuf, Vec<u8>)>> {
    let (mut folders, mut files) = (vec![out.to_path_buf()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            // These contain wall times, or the checksum of a file with wall times.
            let timed =
                ["metrics.json", "state.json", "manifest.json"].iter().any(|name| path.ends_with(name));
            let bytes = if timed { Vec::new() } else { std::fs::read(&path)? };
            files.push((path.strip_prefix(out)?.to_path_buf(), bytes));
        }
    }
    files.sort();
    let names: Vec<&str> = files.iter().filter_map(|(path, _)| path.to_str()).collect();
    let weights = ["adapter/adapter_model.safetensors", "model/model.safetensors"];
    assert!(names.contains(&"predictions.jsonl") && names.contains(&"log.jsonl"), "{names:?}");
    assert!(weights.iter().any(|name| names.contains(name)), "{names:?}");
    Ok(files)
}

/// Asserts that two runs have the same files with the same bytes; names the first that differs.
fn assert_same(found: &[(PathBuf, Vec<u8>)], expected: &[(PathBuf, Vec<u8>)], what: &str) {
    let alone = found.iter().find(|file| !expected.contains(file));
    let alone = alone.or_else(|| expected.iter().find(|file| !found.contains(file)));
    assert!(alone.is_none(), "{what}: {:?}", alone.map(|(path, _)| path));
}

/// Whether a run was killed while it wrote a checkpoint.
fn left_half(out: &Path) -> bool {
    let entries = std::fs::read_dir(out.join("checkpoints")).into_iter().flatten().flatten();
    entries.into_iter().any(|entry| entry.file_name().to_string_lossy().ends_with(".partial"))
}

#[test]
fn a_run_that_is_killed_again_and_again_ends_as_one_that_was_not() -> Outcome {
    let (mut all, mut halves, mut finished) = (0, 0, 0);
    for (method, share) in KILLS {
        let setup = Setup::new(method)?;
        let whole = setup.home.path().join("whole");
        let clock = Instant::now();
        setup.finish(&whole)?;
        let length = clock.elapsed().as_secs_f64();
        let expected = results(&whole)?;

        let moments = Noise::new(7).stream(method, Purpose::Predict);
        let (mut kills, mut tries) = (0, 0..40 * share);
        while kills < share {
            let out = setup.home.path().join(format!("killed-{finished}"));
            while kills < share {
                let mut moment = [0.0];
                moments.fill_uniform(tries.next().ok_or("runs end before they can be killed")?, &mut moment);
                // With each start less of the run is left.
                let status = setup.kill_after(&out, Duration::from_secs_f64(0.8 * moment[0] * length))?;
                if status.success() {
                    break;
                }
                assert_eq!(status.signal(), Some(9), "it ended by itself: {status}");
                kills += 1;
                halves += usize::from(left_half(&out));
            }
            let said = setup.finish(&out)?;
            // A kill never leaves a damaged checkpoint under its final name.
            assert!(!said.contains("cannot be read"), "{said}");
            assert_same(&results(&out)?, &expected, &format!("{method} after {kills} kills"));
            finished += 1;
        }
        all += kills;
    }
    println!("{all} kills, {halves} of them while a checkpoint was written; {finished} runs ended alike");
    Ok(())
}

#[test]
fn signals_stop_a_run_after_its_step_and_it_goes_on() -> Outcome {
    // Long enough for a signal to arrive during the run, even on a busy machine.
    let setup = Setup { epochs: 20, ..Setup::new("lora")? };
    let (whole, out) = (setup.home.path().join("whole"), setup.home.path().join("stopped"));
    setup.finish(&whole)?;
    for (signal, code) in [("INT", 130), ("TERM", 143)] {
        let newest = || {
            let entries = std::fs::read_dir(out.join("checkpoints")).into_iter().flatten().flatten();
            let names = entries
                .map(|entry| entry.file_name())
                .filter(|name| !name.to_string_lossy().starts_with('.'));
            names.max()
        };
        let before = newest();
        let mut child = Guard(setup.command(&out).stderr(Stdio::piped()).spawn()?);
        // Wait for the first step: before it, the signal handlers may not be installed.
        while newest() == before && child.0.try_wait()?.is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        Command::new("kill").args([format!("-{signal}"), child.0.id().to_string()]).status()?;
        let mut said = String::new();
        child.0.stderr.take().ok_or("its standard error is a pipe")?.read_to_string(&mut said)?;
        assert_eq!(child.0.wait()?.code(), Some(code), "{signal}: {said}");
        assert!(said.contains("stopped after step"), "{said}");
    }
    setup.finish(&out)?;
    assert_same(&results(&out)?, &results(&whole)?, "after signals");
    Ok(())
}

#[test]
fn a_second_signal_ends_a_run_at_once() -> Outcome {
    let setup = Setup::new("lora")?;
    let config = setup.home.path().join("adapter_config.json");
    assert!(Command::new("mkfifo").arg(&config).status()?.success());
    let mut command = setup.command(&setup.home.path().join("out"));
    let mut child = Guard(command.arg("--adapter").arg(setup.home.path()).stderr(Stdio::piped()).spawn()?);
    // The adapter's configuration is an empty pipe, so that the run blocks on it with its signal handlers
    // installed. Opening it for writing without blocking fails until the run has opened it for reading.
    let open = || File::options().write(true).custom_flags(libc::O_NONBLOCK).open(&config);
    let _pipe = loop {
        match open() {
            Ok(pipe) => break pipe,
            Err(error) if child.0.try_wait()?.is_some() => return Err(error.into()),
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    };
    let signal = |name: &str, id: u32| Command::new("kill").args([name, &id.to_string()]).status();
    signal("-INT", child.0.id())?;
    let mut said = String::new();
    BufReader::new(child.0.stderr.take().ok_or("its standard error is a pipe")?).read_line(&mut said)?;
    assert!(said.contains("signal again to stop immediately"), "{said}");
    assert!(child.0.try_wait()?.is_none());
    signal("-TERM", child.0.id())?;
    assert_eq!(child.0.wait()?.code(), Some(143));
    Ok(())
}

/// Runs on a disk of 4 MB that is nearly full, then read-only, then has room, in a separate mount namespace.
const SMALL_DISK: &str = r#"
set -u
mount -t tmpfs -o size=4m tmpfs "$DISK" || exit 77
head -c 3800000 /dev/zero > "$DISK/other"
"$GLUE" "$@" && exit 2
echo "== full: $(ls "$DISK/out/checkpoints" 2>/dev/null | wc -l) checkpoints"
mount -o remount,ro "$DISK" || exit 77
"$GLUE" "$@" && exit 3
echo "== read-only"
mount -o remount,rw "$DISK" && rm "$DISK/other"
"$GLUE" "$@" || exit 4
cp -r "$DISK/out" "$END"
"#;

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_and_a_read_only_folder_end_a_run_that_goes_on_when_they_are_mended() -> Outcome {
    let setup = Setup::new("monteclora")?;
    let (whole, disk, end) =
        (setup.home.path().join("whole"), setup.home.path().join("disk"), setup.home.path().join("end"));
    setup.finish(&whole)?;
    std::fs::create_dir(&disk)?;
    let output = Command::new("unshare")
        .args(["-rm", "sh", "-c", SMALL_DISK, "sh"])
        .args(setup.args(&disk.join("out")))
        .envs([("DISK", &disk), ("END", &end), ("GLUE", &setup.glue)])
        .env("RAYON_NUM_THREADS", "1")
        .output();
    let said = match &output {
        Ok(output) => {
            [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned()).concat()
        }
        Err(error) => error.to_string(),
    };
    // Without the permission to mount, the small disk cannot be made.
    let cannot = output.as_ref().map_or(true, |o| o.status.code() == Some(77) || said.contains("unshare"));
    if cannot {
        skipped("this machine lets nobody mount a file system");
        return Ok(());
    }
    assert!(output?.status.success(), "{said}");
    assert!(said.contains("No space left on device") && said.contains("Read-only file system"), "{said}");
    assert_same(&results(&end)?, &results(&whole)?, &said);
    Ok(())
}

#[test]
fn a_folder_in_which_nothing_can_be_made_is_named_before_anything_is_trained() -> Outcome {
    let setup = Setup::new("lora")?;
    let file = setup.home.path().join("file");
    std::fs::write(&file, "")?;
    let error = setup.finish(&file.join("out")).unwrap_err().to_string();
    // The error comes after a warning: LoRA has no posterior to sample.
    let last = error.lines().last().unwrap_or_default();
    assert!(last.starts_with("error: ") && last.contains("file/out"), "{error}");
    assert!(!error.contains("step"), "{error}");
    Ok(())
}

#[test]
fn a_run_goes_on_neither_with_other_held_out_rows_nor_over_its_own_start() -> Outcome {
    let setup = Setup { epochs: 1, ..Setup::new("lora")? };
    let out = setup.home.path().join("out");
    setup.finish(&out)?;
    let before = results(&out)?;
    let dev = setup.home.path().join("dev.tsv");
    let rows = std::fs::read_to_string(&dev)?;
    let shorter = rows.trim_end().rsplit_once('\n').ok_or("a row")?.0.to_string() + "\n";
    std::fs::write(&dev, shorter)?;
    let error = setup.finish(&out).unwrap_err().to_string();
    assert!(error.contains("invalid held_out: the run in"), "{error}");
    let mut again = setup.command(&out);
    again.arg("--adapter").arg(out.join("adapter")).stderr(Stdio::piped());
    let output = again.output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("would overwrite the folder that it"), "{said}");
    assert_same(&results(&out)?, &before, "a refusal");
    Ok(())
}

#[test]
fn the_number_of_threads_changes_no_byte_and_the_seed_changes_all() -> Outcome {
    for method in ["monteclora", "full"] {
        let setup = Setup::new(method)?;
        let run = |name: &str, threads: &str, seed: &str| -> Outcome<Vec<(PathBuf, Vec<u8>)>> {
            let out = setup.home.path().join(name);
            let mut command = setup.command(&out);
            command.env("RAYON_NUM_THREADS", threads).args(["--seed", seed]).stderr(Stdio::null());
            assert!(command.status()?.success());
            results(&out)
        };
        let one = run("one", "1", "1")?;
        for threads in ["2", "5"] {
            assert_same(&run(threads, threads, "1")?, &one, &format!("{method}: {threads} threads"));
        }
        let other = run("other", "1", "2")?;
        let data =
            |path: &Path| ["jsonl", "safetensors"].iter().any(|kind| path.extension() == Some(kind.as_ref()));
        for ((path, one), (same, other)) in one.iter().zip(&other) {
            assert!(path == same && (one != other || !data(path)), "{method}: {path:?}, {same:?}");
        }
        assert_eq!(one.len(), other.len());
    }
    Ok(())
}
