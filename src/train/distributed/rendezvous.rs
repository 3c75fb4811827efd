//! Exchanges an engine's identifier between processes that only share a folder.

use std::hash::{BuildHasher, RandomState};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::launch::Launch;
use crate::error::{Error, Result};
use crate::util::files;

/// The environment variable with the folder, which all machines of a run must see.
#[cfg(feature = "nccl")]
pub(super) const RENDEZVOUS: &str = "MONTECLORA_RENDEZVOUS";

/// The time between two looks for a file.
const PAUSE: Duration = Duration::from_millis(20);

/// Sends the bytes of process 0 to all processes of `launch`, through files in `folder`.
///
/// A killed run may have left files there. Therefore each process first writes a unique word, only accepts an
/// answer that contains this word, and acknowledges it.
///
/// # Errors
/// If a file cannot be written, or a process is missing after `patience`; the error says how many are.
pub(super) fn meet(launch: &Launch, folder: &Path, bytes: &[u8], patience: Duration) -> Result<Vec<u8>> {
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let (answer, deadline) = (folder.join("answer"), Instant::now() + patience);
    if launch.rank == 0 {
        return give(launch.world, folder, &answer, bytes, deadline).map(|()| bytes.to_vec());
    }
    let (place, own) = (place(folder, launch.rank), word());
    files::write(&place, own.as_bytes())?;
    loop {
        if let Some((words, bytes)) = std::fs::read(&answer).ok().as_deref().and_then(split) {
            if words.split(' ').nth(launch.rank - 1) == Some(own.as_str()) {
                files::write(&place, format!("{own}{HAS_IT}").as_bytes())?;
                return Ok(bytes.to_vec());
            }
        }
        wait(deadline, || format!("process 0 did not appear in {}", folder.display()))?;
    }
}

/// Appended to a process's word as the acknowledgement of an answer.
const HAS_IT: &str = " has it";

fn place(folder: &Path, rank: usize) -> PathBuf {
    folder.join(format!("process-{rank}"))
}

/// Writes answers to the words found so far until every process has acknowledged its own.
fn give(world: usize, folder: &Path, answer: &Path, bytes: &[u8], deadline: Instant) -> Result<()> {
    let mut answered: Vec<String> = Vec::new();
    loop {
        // An acknowledged word that was not answered here is from an earlier run.
        let said = |rank: usize| {
            let said = std::fs::read_to_string(place(folder, rank)).ok()?;
            let word = said.trim_end_matches(HAS_IT).to_string();
            let has_it = word.len() < said.len();
            (!has_it || answered.get(rank - 1) == Some(&word)).then_some((word, has_it))
        };
        let (words, have_it): (Vec<String>, Vec<bool>) = (1..world).filter_map(said).unzip();
        let missing = world - 1 - words.len();
        if missing == 0 && words == answered && have_it.iter().all(|has_it| *has_it) {
            (1..world).for_each(|rank| drop(std::fs::remove_file(place(folder, rank))));
            return Ok(());
        }
        if missing == 0 && words != answered {
            files::write(answer, &[words.join(" ").as_bytes(), b"\n", bytes].concat())?;
            answered = words;
        }
        wait(deadline, || format!("{missing} of {world} processes did not appear, or one does not answer"))?;
    }
}

/// Returns a unique word: the standard library's hash maps have random keys.
fn word() -> String {
    format!("{:016x}", RandomState::new().hash_one(std::process::id()))
}

fn split(answer: &[u8]) -> Option<(&str, &[u8])> {
    let end = answer.iter().position(|byte| *byte == b'\n')?;
    Some((std::str::from_utf8(&answer[..end]).ok()?, &answer[end + 1..]))
}

fn wait(deadline: Instant, missing: impl FnOnce() -> String) -> Result<()> {
    if Instant::now() > deadline {
        let where_else = "on several machines, set MONTECLORA_RENDEZVOUS to a folder that all of them share";
        return Err(Error::config("distributed", format!("{}: {where_else}", missing())));
    }
    std::thread::sleep(PAUSE);
    Ok(())
}
