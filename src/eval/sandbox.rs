//! Runs untrusted programs in their own process, with limits on time and memory and without a network.
//!
//! The kernel enforces the limits, set by the tools of util-linux: `unshare` (user, network, process and IPC
//! namespaces) and `prlimit`. If they cannot be set, no program is run.

use std::collections::hash_map::RandomState;
use std::fs;
use std::hash::{BuildHasher, Hasher};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// What the trial program prints if every limit holds.
const WELL: &str = "every limit holds";

/// The beginning of the error if the limits cannot be set.
const REFUSAL: &str = "programs cannot be limited here, so none is run";

/// The user and group id of `nobody`, which programs run as if this process is root.
const NOBODY: &str = "65534";

/// The resource limits of a program.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// Wall time in seconds, and CPU time of each of its processes.
    pub seconds: u64,
    /// Address space of each of its processes, in bytes.
    pub memory_bytes: u64,
    /// The number of its processes and threads, including itself.
    pub processes: u64,
}

impl Default for Limits {
    /// 3 s (as in HumanEval's own harness), 1 GiB, 8 processes.
    fn default() -> Self {
        Self { seconds: 3, memory_bytes: 1 << 30, processes: 8 }
    }
}

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outcome {
    /// It ran to its last line.
    Passed,
    /// It ended before: an exception, an exit, a kernel limit.
    Failed,
    /// It was still running at the time limit.
    TimedOut,
}

/// Runs Python programs within limits that were verified at construction.
///
/// A program has no network, sees no process but its own, cannot write anything to a file, gets no
/// environment variable but `PATH`, and is killed with its processes at the time limit. If this crate runs as
/// root, the program runs as `nobody`. This is not complete isolation: the program can use all files and
/// named sockets that the user can, and can truncate or delete the user's files; memory is limited per
/// process. Run it as a user with nothing to lose.
#[derive(Debug, Clone)]
pub struct Sandbox {
    python: PathBuf,
    limits: Limits,
}

impl Sandbox {
    /// Verifies the limits with a trial program. `python` is the interpreter's path, or `python3` to search
    /// the system's folders.
    ///
    /// # Errors
    /// [`Error::Config`] naming the limit that cannot be set, and why.
    pub fn new(python: impl Into<PathBuf>, limits: Limits) -> Result<Self> {
        if limits.seconds == 0 || limits.memory_bytes == 0 || limits.processes == 0 {
            return Err(Error::config("limits", format!("each must be at least 1, got {limits:?}")));
        }
        let sandbox = Self { python: python.into(), limits };
        let ended = sandbox.execute(&sandbox.probe())?;
        if ended.said.ends_with(WELL.as_bytes()) {
            return Ok(sandbox);
        }
        let why = match (ended.complaint.trim().lines().last(), ended.in_time) {
            (Some(line), _) => line.to_string(),
            (None, true) => "the trial program said nothing".to_string(),
            (None, false) => "the trial program did not end in time".to_string(),
        };
        Err(Error::config("sandbox", format!("{REFUSAL}: {why}")))
    }

    /// Runs a program until it ends or its time is up. It passes only if its last line is reached: a program
    /// that exits early fails, whatever its status.
    ///
    /// # Errors
    /// If the process cannot be started.
    pub fn run(&self, program: &str) -> Result<Outcome> {
        // A random word that no program prints by chance.
        let word = format!("{:016x}", RandomState::new().build_hasher().finish());
        let last = format!("import os as _os\n_os.write(1, b'{word}')\n_os._exit(0)\n");
        let ended = self.execute(&format!("{program}\n{last}"))?;
        Ok(match (ended.in_time, ended.said.ends_with(word.as_bytes())) {
            (true, true) => Outcome::Passed,
            (true, false) => Outcome::Failed,
            (false, _) => Outcome::TimedOut,
        })
    }

    /// Starts a program, writes it to Python's standard input and waits for its end.
    fn execute(&self, program: &str) -> Result<Ended> {
        let mut child = self.start()?;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        std::thread::scope(|scope| {
            let said = scope.spawn(|| tail(stdout));
            let complaint = scope.spawn(|| tail(stderr));
            scope.spawn(move || {
                // A write error means that the program ended early; its stderr says why.
                stdin.map(|mut stdin| stdin.write_all(program.as_bytes()).ok())
            });
            let in_time = wait(&mut child, Duration::from_secs(self.limits.seconds))?;
            // The reading threads do not panic.
            let text = said.join().unwrap_or_default();
            let complaint = complaint.join().unwrap_or_default();
            Ok(Ended { said: text, complaint: String::from_utf8_lossy(&complaint).into_owned(), in_time })
        })
    }

    /// A program that prints [`WELL`] only if every limit holds.
    fn probe(&self) -> String {
        let Limits { seconds, memory_bytes, processes } = self.limits;
        format!(
            "import os, resource, sys\n\
             for name, limit in (('CPU', {seconds}), ('AS', {memory_bytes}), ('NPROC', {processes}), ('FSIZE', 0)):\n\
             \x20   soft, hard = resource.getrlimit(getattr(resource, 'RLIMIT_' + name))\n\
             \x20   if hard != limit: sys.exit(f'the limit {{name}} is {{hard}}, not {{limit}}')\n\
             links = [line.split(':')[0].strip() for line in open('/proc/self/net/dev').readlines()[2:]]\n\
             if links != ['lo']: sys.exit(f'there is a network: {{links}}')\n\
             seen = [name for name in os.listdir('/proc') if name.isdigit()]\n\
             if seen != ['1']: sys.exit(f'other processes can be seen: {{seen}}')\n\
             os.write(1, b'{WELL}')\n"
        )
    }

    /// Starts Python within the limits, reading a program from standard input.
    fn start(&self) -> Result<Child> {
        let Limits { seconds, memory_bytes, processes } = self.limits;
        let mut words: Vec<String> = Vec::new();
        if is_root() {
            words.extend(
                ["setpriv", "--reuid", NOBODY, "--regid", NOBODY, "--clear-groups"].map(String::from),
            );
            words.push("--no-new-privs".to_string());
            words.push("--".to_string());
        }
        let namespaces = [
            "unshare",
            "--user",
            "--map-root-user",
            "--net",
            "--ipc",
            "--pid",
            "--fork",
            "--mount-proc",
            "--kill-child",
            "--",
        ];
        words.extend(namespaces.map(String::from));
        words.push("prlimit".to_string());
        words.push(format!("--cpu={seconds}:{seconds}"));
        words.push(format!("--as={memory_bytes}:{memory_bytes}"));
        words.push(format!("--nproc={processes}:{processes}"));
        words.extend(["--fsize=0:0", "--nofile=64:64", "--core=0:0", "--"].map(String::from));
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).arg(&self.python);
        // Isolated: no site packages, no environment variables, no modules from the current folder.
        command.args(["-I", "-S", "-"]);
        command.env_clear().env("PATH", "/usr/local/bin:/usr/bin:/bin").current_dir("/");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().map_err(|e| Error::config("sandbox", format!("{REFUSAL}: {}: {e}", words[0])))
    }
}

/// The output of a process, and whether it ended in time.
struct Ended {
    said: Vec<u8>,
    complaint: String,
    in_time: bool,
}

/// Reads a stream to its end and returns its last 4096 bytes.
fn tail(source: Option<impl Read>) -> Vec<u8> {
    let (mut kept, mut buffer) = (Vec::new(), [0; 4096]);
    let Some(mut source) = source else { return kept };
    while let Ok(count @ 1..) = source.read(&mut buffer) {
        kept.extend_from_slice(&buffer[..count]);
        kept.drain(..kept.len().saturating_sub(buffer.len()));
    }
    kept
}

/// Waits for the process and kills it at the limit; returns whether it ended in time.
fn wait(child: &mut Child, limit: Duration) -> Result<bool> {
    let start = Instant::now();
    // Half a second for starting the interpreter.
    let limit = limit + Duration::from_millis(500);
    loop {
        match child.try_wait().map_err(Error::io("sandbox"))? {
            Some(_) => return Ok(true),
            None if start.elapsed() < limit => std::thread::sleep(Duration::from_millis(5)),
            None => {
                end_namespace(child);
                child.kill().and_then(|()| child.wait()).map_err(Error::io("sandbox"))?;
                return Ok(false);
            }
        }
    }
}

/// Kills the first process of the namespace that `unshare` waits for, and with it all others. Killing
/// `unshare` alone is not enough: a program can clear its parent-death signal.
fn end_namespace(unshare: &Child) {
    let pid = unshare.id();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    for first in children.split_whitespace() {
        // The process may just have ended by itself.
        Command::new("kill").args(["-KILL", first]).stderr(Stdio::null()).status().ok();
    }
}

/// Whether this process runs as root.
#[cfg(unix)]
fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(Path::new("/proc/self")).is_ok_and(|own| own.uid() == 0)
}

#[cfg(not(unix))]
fn is_root() -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sandbox(limits: Limits) -> Option<Sandbox> {
        match Sandbox::new("python3", limits) {
            Ok(sandbox) => Some(sandbox),
            Err(error) => {
                crate::testing::skipped(&format!("{error}"));
                assert!(error.to_string().contains("so none is run"), "{error}");
                None
            }
        }
    }

    #[test]
    fn a_program_passes_only_at_its_last_line() {
        let Some(sandbox) = sandbox(Limits::default()) else { return };
        for (program, outcome) in [
            ("x = 1\nassert x == 1", Outcome::Passed),
            ("assert 1 == 2", Outcome::Failed),
            ("import sys\nsys.exit(0)", Outcome::Failed),
            ("raise SystemExit", Outcome::Failed),
            ("def f(:", Outcome::Failed),
            ("print('x' * 1000000, flush=True)", Outcome::Passed),
            ("import os\nos._exit(0)", Outcome::Failed),
        ] {
            assert_eq!(sandbox.run(program).unwrap(), outcome, "{program}");
        }
    }

    #[test]
    fn time_memory_processes_files_and_the_network_are_limited() {
        let Some(sandbox) = sandbox(Limits { seconds: 1, memory_bytes: 1 << 28, processes: 4 }) else {
            return;
        };
        let run = |program: &str| sandbox.run(program).unwrap();
        let start = Instant::now();
        assert_eq!(run("import time\ntime.sleep(60)"), Outcome::TimedOut);
        assert_ne!(run("while True: pass"), Outcome::Passed);
        assert!(start.elapsed() < Duration::from_secs(30));
        assert_eq!(run("x = bytearray(10 ** 8)"), Outcome::Passed);
        assert_eq!(run("x = bytearray(10 ** 9)"), Outcome::Failed);
        assert_eq!(
            run("import os\nfor _ in range(64):\n  if os.fork() == 0:\n    os.pause()"),
            Outcome::Failed
        );
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let connect = format!("import socket\nsocket.create_connection(('127.0.0.1', {port}), 0.5)");
        assert_eq!(run(&connect), Outcome::Failed);
        let path = std::env::temp_dir().join(format!("monteclora-sandbox-{}", std::process::id()));
        assert_eq!(run(&format!("open({path:?}, 'w').write('x' * 10000)")), Outcome::Failed);
        assert_eq!(fs::metadata(&path).map_or(0, |file| file.len()), 0);
        fs::remove_file(&path).ok();
        assert_eq!(
            run("import os\nassert set(os.environ) <= {'PATH', 'LC_CTYPE'}, os.environ"),
            Outcome::Passed
        );
    }

    #[test]
    fn a_program_leaves_no_process_behind() {
        let Some(sandbox) = sandbox(Limits { seconds: 1, ..Limits::default() }) else { return };
        let mark = format!("{}.25", 100_000 + std::process::id());
        // The program also clears its parent-death signal.
        let program = format!(
            "import ctypes, os, time\nctypes.CDLL(None).prctl(1, 0)\nif os.fork() == 0:\n  \
             os.execvp('sleep', ['sleep', '{mark}'])\ntime.sleep(60)"
        );
        let start = Instant::now();
        assert_eq!(sandbox.run(&program).unwrap(), Outcome::TimedOut);
        assert!(start.elapsed() < Duration::from_secs(20));
        let left = || {
            let entries = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok());
            let lines = entries.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
            lines
                .filter(|line| String::from_utf8_lossy(line).split('\0').eq(["sleep", mark.as_str(), ""]))
                .count()
        };
        let patience = Instant::now();
        while left() > 0 && patience.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(left(), 0);
    }

    #[test]
    fn where_a_limit_cannot_be_set_nothing_is_run() {
        let error = Sandbox::new("no-such-python", Limits::default()).unwrap_err().to_string();
        assert!(error.contains("invalid sandbox") && error.contains("so none is run"), "{error}");
        let error = Sandbox::new("python3", Limits { seconds: 0, ..Limits::default() }).unwrap_err();
        assert!(error.to_string().contains("invalid limits"), "{error}");
    }
}
