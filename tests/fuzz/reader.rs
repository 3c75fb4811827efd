//! Runs one reader under test over its inputs, with limits on time and memory.

use std::cell::RefCell;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{mpsc, Arc};
use std::time::{Duration, Instant};

use monteclora::noise::{Noise, Purpose};
use monteclora::Result;

use super::memory;
use super::mutate::Rng;

/// The number of inputs of a reader of cost 1 in an ordinary run.
const INPUTS: u64 = 60_000;
/// The time limit for one input. A busy machine may suspend a thread for longer, so a slow input is tried up
/// to twice more, measured in CPU time of the thread where the system provides it.
const PATIENCE: Duration = Duration::from_secs(2);
/// The time after which an input counts as hanging. The process is then aborted, since a thread cannot be.
const HANG: Duration = Duration::from_secs(60);
/// The number of failures after which the run of a reader stops.
const ENOUGH: usize = 8;

/// A reader under test and its limits.
pub struct Reader {
    /// The reader's name, from which its inputs are derived.
    pub name: &'static str,
    /// The cost of one input, relative to the cheapest readers.
    pub cost: u64,
    /// The memory in bytes that it may take for a file of any size.
    pub fixed: usize,
    /// The memory that it may take in addition, in multiples of the file's size.
    pub times: usize,
    /// The text that each error must contain: the name of the file or of its folder.
    pub names: String,
}

/// One input: the files, and an index for readers with several kinds of input.
pub struct Input {
    pub kind: usize,
    pub files: Vec<Vec<u8>>,
}

impl Input {
    pub fn one(kind: usize, file: Vec<u8>) -> Self {
        Self { kind, files: vec![file] }
    }
}

impl Reader {
    /// Reads as many inputs as the environment asks for.
    ///
    /// # Panics
    /// If an input fails; the message lists the failures with the indices of their inputs.
    pub fn run(&self, make: impl Fn(&mut Rng) -> Input, read: impl Fn(&Input) -> Result<()>) {
        let first = setting("MONTECLORA_FUZZ_FIRST").unwrap_or(0);
        let count = setting("MONTECLORA_FUZZ_INPUTS").unwrap_or(INPUTS).div_ceil(self.cost);
        let stream = Noise::new(2024).stream(&format!("fuzz.{}", self.name), Purpose::Shuffle);
        let watchdog = Watchdog::new(self.name);
        let start = Instant::now();
        let (mut tried, mut accepted) = (0u64, 0u64);
        let (mut most, mut slowest) = ((0, 0, 0), (Duration::ZERO, 0));
        let mut failures: Vec<String> = Vec::new();
        for index in first..first + count {
            let input = make(&mut Rng::new(stream, index));
            let size: usize = input.files.iter().map(Vec::len).sum();
            let limit = self.fixed + self.times * size;
            watchdog.at.store(index, Ordering::Relaxed);
            let mut attempts = 0;
            let (found, peak, took) = loop {
                let (clock, before) = (Instant::now(), (attempts > 0).then(busy).flatten());
                let (found, peak) = memory::peak((self.name, index), 4 * limit + (256 << 20), || {
                    catch_unwind(AssertUnwindSafe(|| read(&input).map_err(|error| error.to_string())))
                });
                let took = before.and_then(|before| busy()?.checked_sub(before)).unwrap_or(clock.elapsed());
                attempts += 1;
                // Try again: what a process loads only once, such as the symbols of its first backtrace, must
                // not count against the input.
                if (took <= PATIENCE && peak <= limit) || attempts == 3 {
                    break (found, peak, took);
                }
            };
            tried += 1;
            most = most.max((peak, size, index));
            slowest = slowest.max((took, index));
            let complaint = match found {
                Err(panic) => Some(format!("it panicked: {}", message(&*panic))),
                Ok(Err(error)) if !error.contains(&self.names) => {
                    Some(format!("the error names no file: {error}"))
                }
                _ if peak > limit => Some(format!("it took {peak} bytes for a file of {size}")),
                _ if took > PATIENCE => Some(format!("it took {took:?}")),
                Ok(found) => {
                    accepted += u64::from(found.is_ok());
                    None
                }
            };
            failures.extend(complaint.map(|complaint| format!("input {index}: {complaint}")));
            if failures.len() >= ENOUGH {
                break;
            }
        }
        println!(
            "fuzz {}: {tried} inputs from {first}, {accepted} accepted, {:.1} s; most memory: {} bytes for {} \
             (input {}); slowest: {:?} (input {})",
            self.name,
            start.elapsed().as_secs_f64(),
            most.0,
            most.1,
            most.2,
            slowest.0,
            slowest.1,
        );
        assert!(failures.is_empty(), "{}:\n{}", self.name, failures.join("\n"));
    }
}

/// Reads a number from an environment variable.
fn setting(name: &str) -> Option<u64> {
    std::env::var(name)
        .ok()
        .map(|text| text.parse().unwrap_or_else(|_| panic!("{name}: {text:?} is no number")))
}

/// The CPU time of this thread so far, if the system provides it.
fn busy() -> Option<Duration> {
    #[cfg(unix)]
    {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the call writes only to `time`, which is valid. The standard library has no such clock.
        #[allow(unsafe_code)]
        let failed = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
        (failed == 0).then(|| Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
    }
    #[cfg(not(unix))]
    None
}

/// The message of a panic.
fn message(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("(no text)")
}

/// Aborts the process if a reader hangs at one input.
struct Watchdog {
    at: Arc<AtomicU64>,
    _running: mpsc::Sender<()>,
}

impl Watchdog {
    fn new(name: &'static str) -> Self {
        let (running, ended) = mpsc::channel();
        let at = Arc::new(AtomicU64::new(u64::MAX));
        let seen = at.clone();
        std::thread::spawn(move || {
            let mut before = u64::MAX;
            while ended.recv_timeout(HANG) == Err(mpsc::RecvTimeoutError::Timeout) {
                let now = seen.load(Ordering::Relaxed);
                if now == before && now != u64::MAX {
                    crate::say(&format!("fuzz {name}: input {now} hangs"));
                    std::process::abort();
                }
                before = now;
            }
        });
        Self { at, _running: running }
    }
}

/// A folder whose files are rewritten for each input, if they differ from those of the previous one.
pub struct Folder {
    root: tempfile::TempDir,
    names: Vec<&'static str>,
    last: RefCell<Vec<Option<Vec<u8>>>>,
}

impl Folder {
    pub fn new(names: &[&'static str]) -> Self {
        // In memory if possible: on a disk, a rewritten file is flushed, which takes longer than reading it.
        let memory = Path::new("/dev/shm");
        let root = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
        let inside = root.path().join("inside");
        std::fs::create_dir(&inside).unwrap();
        for folder in names.iter().filter_map(|name| Path::new(name).parent()) {
            std::fs::create_dir_all(inside.join(folder)).unwrap();
        }
        Self { root, names: names.to_vec(), last: RefCell::new(vec![None; names.len()]) }
    }

    /// The folder that readers are given.
    pub fn path(&self) -> PathBuf {
        self.root.path().join("inside")
    }

    /// The folder around it, which readers must not access.
    pub fn outside(&self) -> &Path {
        self.root.path()
    }

    /// Writes the files of an input.
    pub fn put(&self, input: Input) -> Input {
        let mut last = self.last.borrow_mut();
        for ((name, last), bytes) in self.names.iter().zip(last.iter_mut()).zip(&input.files) {
            if last.as_ref() != Some(bytes) {
                std::fs::write(self.path().join(name), bytes).unwrap();
                *last = Some(bytes.clone());
            }
        }
        input
    }
}

#[test]
fn an_input_is_a_function_of_its_name_and_index() {
    let of = |name: &str, index| {
        let stream = Noise::new(2024).stream(name, Purpose::Shuffle);
        crate::mutate::bytes(
            &mut Rng::new(stream, index),
            &[b"some bytes".to_vec(), b"and others".to_vec()],
            &["x"],
        )
    };
    assert_eq!(of("a", 3), of("a", 3));
    assert!((0..20).any(|i| of("a", i) != of("b", i)) && (0..20).any(|i| of("a", i) != of("a", i + 1)));
}

#[test]
fn what_a_reader_must_not_do_is_found() {
    let failure = |read: &(dyn Fn(&Input) -> Result<()> + std::panic::RefUnwindSafe)| {
        let reader = Reader { name: "bad", cost: u64::MAX, fixed: 1000, times: 2, names: "x.txt".into() };
        let make = |_: &mut Rng| Input::one(0, vec![0; 10]);
        let panic = catch_unwind(|| reader.run(make, read)).unwrap_err();
        message(&*panic).to_string()
    };
    assert!(failure(&|_| panic!("oh")).contains("it panicked: oh"));
    assert!(failure(&|_| Err(monteclora::Error::format("y.txt", "no"))).contains("the error names no file"));
    let greedy = |_: &Input| {
        drop(std::hint::black_box(vec![1u8; 2000]));
        Ok(())
    };
    assert!(failure(&greedy).contains("bytes for a file of 10"));
}
