//! Running a program that nobody has read: in a process of its own, with limits on time and memory
//! and without a network.
//!
//! The limits are the kernel's, set by the tools of util-linux: `unshare` (namespaces of users,
//! network, processes and IPC) and `prlimit`. Where they cannot be set, nothing is run.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// The exit status of a program that came to its end: none that Python gives by itself.
pub(crate) const FINISHED: i32 = 77;

/// The user who has nothing, for programs that root runs.
const NOBODY: &str = "65534";

/// What a program may use.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// Wall time, and time of each of its processes on a processor.
    pub seconds: u64,
    /// Address space of each of its processes, in bytes.
    pub memory_bytes: u64,
    /// Its processes and threads.
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
    /// It ended before: an exception, an exit, a limit of the kernel.
    Failed,
    /// It was still running when its time was up.
    TimedOut,
}

/// A place where Python programs run within limits that have been tried.
///
/// A program has no network, sees no process but its own, cannot make a file longer than nothing,
/// gets no environment variable, and ends with its processes when its time is up. Where this crate
/// runs as root, the program runs as `nobody`. It is no prison: what files the user may read, it may
/// read, and what files the user may delete, it may delete. Run it as a user with nothing to lose.
#[derive(Debug, Clone)]
pub struct Sandbox {
    python: PathBuf,
    limits: Limits,
}

impl Sandbox {
    /// Tries the limits with a program that looks whether they hold. `python` is the interpreter's
    /// path, or `python3` to look for it in the system's folders.
    ///
    /// # Errors
    /// [`Error::Config`] naming the limit that cannot be set, and why.
    pub fn new(python: impl Into<PathBuf>, limits: Limits) -> Result<Self> {
        if limits.seconds == 0 || limits.memory_bytes == 0 || limits.processes == 0 {
            return Err(Error::config("limits", format!("each must be at least 1, got {limits:?}")));
        }
        let sandbox = Self { python: python.into(), limits };
        let mut child = sandbox.start(&sandbox.probe(), Stdio::piped())?;
        let ended = wait(&mut child, Duration::from_secs(sandbox.limits.seconds))?;
        match ended {
            Some(FINISHED) => Ok(sandbox),
            code => {
                let mut said = String::new();
                if let Some(mut stderr) = child.stderr.take() {
                    std::io::Read::read_to_string(&mut stderr, &mut said).ok();
                }
                let why = match (said.trim().lines().last(), code) {
                    (Some(line), _) => line.to_string(),
                    (None, Some(code)) => format!("the trial program ended with {code}"),
                    (None, None) => "the trial program did not end in time".to_string(),
                };
                Err(Error::config(
                    "sandbox",
                    format!("programs cannot be limited here, so none is run: {why}"),
                ))
            }
        }
    }

    /// Runs a program to its end or to that of its time. It counts as passed if its last line was
    /// reached: one that exits before, with whatever status, did not pass.
    ///
    /// # Errors
    /// If the process cannot be started.
    pub fn run(&self, program: &str) -> Result<Outcome> {
        let program = format!("{program}\nimport os\nos._exit({FINISHED})\n");
        let mut child = self.start(&program, Stdio::null())?;
        Ok(match wait(&mut child, Duration::from_secs(self.limits.seconds))? {
            Some(FINISHED) => Outcome::Passed,
            Some(_) => Outcome::Failed,
            None => Outcome::TimedOut,
        })
    }

    /// A program that ends well only where every limit holds.
    fn probe(&self) -> String {
        let Limits { seconds, memory_bytes, processes } = self.limits;
        format!(
            "import os, resource, sys\n\
             for name, limit in (('CPU', {seconds}), ('AS', {memory_bytes}), ('NPROC', {processes}), ('FSIZE', 0)):\n\
             \x20   soft, hard = resource.getrlimit(getattr(resource, 'RLIMIT_' + name))\n\
             \x20   if hard != limit: sys.exit(f'the limit {{name}} is {{hard}}, not {{limit}}')\n\
             links = [line.split(':')[0].strip() for line in open('/proc/self/net/dev').readlines()[2:]]\n\
             if links != ['lo']: sys.exit(f'there is a network: {{links}}')\n\
             if os.getpid() != 1: sys.exit('other processes can be seen')\n\
             os._exit({FINISHED})\n"
        )
    }

    /// Starts Python on a program within the limits.
    fn start(&self, program: &str, stderr: Stdio) -> Result<Child> {
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
        // Isolated: no site packages, no variables, no module of the folder it starts in.
        command.args(["-I", "-S", "-"]);
        command.env_clear().env("PATH", "/usr/local/bin:/usr/bin:/bin").current_dir("/");
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(stderr);
        let mut child = command.spawn().map_err(|e| {
            let reason = format!("programs cannot be limited here, so none is run: {}: {e}", words[0]);
            Error::config("sandbox", reason)
        })?;
        if let Some(mut stdin) = child.stdin.take() {
            // One that ended before it read everything has its exit status to tell why.
            stdin.write_all(program.as_bytes()).ok();
        }
        Ok(child)
    }
}

/// The exit status of a process, or None where it ran out of time or was killed by a signal that
/// nobody expected; then it is no more.
fn wait(child: &mut Child, limit: Duration) -> Result<Option<i32>> {
    let start = Instant::now();
    // Starting the interpreter is not the program's fault.
    let limit = limit + Duration::from_millis(500);
    loop {
        let ended = child.try_wait().map_err(Error::io("sandbox"))?;
        match ended {
            Some(status) => return Ok(Some(status.code().unwrap_or(-1))),
            None if start.elapsed() < limit => std::thread::sleep(Duration::from_millis(5)),
            None => {
                // The namespace's first process goes with `unshare`, and all others with it.
                child.kill().and_then(|()| child.wait()).map_err(Error::io("sandbox"))?;
                return Ok(None);
            }
        }
    }
}

/// Whether this process belongs to root.
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
                println!("skipped: {error}");
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
            ("print('x' * 1000000)", Outcome::Passed),
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
        let program = format!(
            "import os, time\nif os.fork() == 0:\n  os.execvp('sleep', ['sleep', '{mark}'])\ntime.sleep(60)"
        );
        assert_eq!(sandbox.run(&program).unwrap(), Outcome::TimedOut);
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
