//! Writes the scalars of a run to TensorBoard event files.
//!
//! A file is a sequence of records, each framed by its length and masked CRC-32Cs (TFRecord), and each with
//! one protocol buffer `Event`. Only a few fields are written here; comments give their names in
//! <https://github.com/tensorflow/tensorboard/tree/master/tensorboard/compat/proto>.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::objective::StepRecord;
use crate::error::{Error, Result};

/// An open event file.
///
/// # Example
/// ```
/// use monteclora::train::TensorBoard;
///
/// # let dir = tempfile::tempdir().map_err(monteclora::Error::io("a temporary folder"))?;
/// # let dir = dir.path();
/// let mut board = TensorBoard::create(dir, 0)?; // then: tensorboard --logdir DIR
/// board.scalar("train/loss", 1, 0.7)?;
/// board.scalar("train/loss", 2, 0.6)?;
/// # Ok::<(), monteclora::Error>(())
/// ```
#[derive(Debug)]
pub struct TensorBoard {
    file: File,
    path: PathBuf,
}

impl TensorBoard {
    /// Creates an event file in the folder `dir`, and the folder if it is missing. If a run resumes after
    /// step `done`, TensorBoard no longer shows later steps of earlier files.
    ///
    /// # Errors
    /// If the file cannot be written; the error names it.
    pub fn create(dir: &Path, done: usize) -> Result<Self> {
        std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
        let (seconds, process) = (now() as u64, std::process::id());
        // A count separates files of the same second and process; TensorBoard reads files in the order of
        // their names.
        let mut count = 0;
        let (path, file) = loop {
            let path = dir.join(format!("events.out.tfevents.{seconds:010}.monteclora.{process}.{count}"));
            match File::options().create_new(true).append(true).open(&path) {
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => count += 1,
                file => break (path.clone(), file.map_err(Error::io(&*path))?),
            }
        };
        let mut board = Self { file, path };
        board.event(0, |event| event.bytes(3, b"brain.Event:2"))?; // file_version
        if done > 0 {
            // session_log { status: START }
            board.event(done + 1, |event| event.message(7, |log| log.integer(1, 1)))?;
        }
        Ok(board)
    }

    /// Writes the value of `tag` at a step. Non-finite values, which TensorBoard cannot show, are omitted.
    ///
    /// # Errors
    /// If the file cannot be written; the error names it.
    pub fn scalar(&mut self, tag: &str, step: usize, value: f64) -> Result<()> {
        self.scalars(step, &[(tag, value)])
    }

    /// Writes a training step: `train/loss`, its parts, `train/lr`, `train/grad_norm`, `train/epoch`.
    ///
    /// # Errors
    /// As [`Self::scalar`].
    pub fn record(&mut self, record: &StepRecord) -> Result<()> {
        let StepRecord { step, epoch, lr, loss, terms, grad_norm } = record;
        let terms: Vec<(String, f64)> =
            terms.iter().map(|(name, value)| (format!("train/{name}"), *value)).collect();
        let own = [
            ("train/loss", *loss),
            ("train/lr", *lr),
            ("train/grad_norm", *grad_norm),
            ("train/epoch", *epoch),
        ];
        let values: Vec<(&str, f64)> =
            own.into_iter().chain(terms.iter().map(|(name, value)| (name.as_str(), *value))).collect();
        self.scalars(*step, &values)
    }

    fn scalars(&mut self, step: usize, values: &[(&str, f64)]) -> Result<()> {
        let finite: Vec<_> = values.iter().filter(|(_, value)| (*value as f32).is_finite()).collect();
        if finite.is_empty() {
            return Ok(());
        }
        self.event(step, |event| {
            // summary { value { tag, simple_value } .. }
            event.message(5, |summary| {
                for (tag, value) in finite {
                    summary.message(1, |one| {
                        one.bytes(1, tag.as_bytes());
                        one.float(2, *value as f32);
                    });
                }
            });
        })
    }

    /// Writes an event in one call, so that events survive if the run is killed.
    fn event(&mut self, step: usize, fill: impl FnOnce(&mut Message)) -> Result<()> {
        let mut event = Message::default();
        event.double(1, now()); // wall_time
        event.integer(2, step as u64);
        fill(&mut event);
        self.file.write_all(&framed(&event.0)).map_err(Error::io(&*self.path))
    }
}

/// Returns seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

/// Returns a record: the length of the data, its checksum, the data, their checksum.
fn framed(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let masked = |bytes: &[u8]| {
        let crc = crc32c::crc32c(bytes);
        crc.rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
    };
    [&length[..], &masked(&length), data, &masked(data)].concat()
}

/// A protocol buffer message, written field by field.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    /// Writes the number of a field and the wire type of its value.
    fn key(&mut self, field: u64, kind: u64) {
        self.varint(field << 3 | kind);
    }

    fn integer(&mut self, field: u64, value: u64) {
        self.key(field, 0);
        self.varint(value);
    }

    fn double(&mut self, field: u64, value: f64) {
        self.key(field, 1);
        self.0.extend(value.to_le_bytes());
    }

    fn bytes(&mut self, field: u64, value: &[u8]) {
        self.key(field, 2);
        self.varint(value.len() as u64);
        self.0.extend(value);
    }

    fn float(&mut self, field: u64, value: f32) {
        self.key(field, 5);
        self.0.extend(value.to_le_bytes());
    }

    fn message(&mut self, field: u64, fill: impl FnOnce(&mut Self)) {
        let mut inner = Self::default();
        fill(&mut inner);
        self.bytes(field, &inner.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes from the `RecordWriter` of TensorBoard 2.21 for Event(wall_time=1.5, step=300,
    /// summary=Summary(value=[Summary.Value(tag="train/loss", simple_value=0.25)])).
    #[test]
    fn a_record_has_the_bytes_that_tensorboard_writes() {
        let mut event = Message::default();
        event.double(1, 1.5);
        event.integer(2, 300);
        event.message(5, |summary| {
            summary.message(1, |value| {
                value.bytes(1, b"train/loss");
                value.float(2, 0.25);
            });
        });
        let hex: String = framed(&event.0).iter().map(|byte| format!("{byte:02x}")).collect();
        let expected =
            "2100000000000000017becf609000000000000f83f10ac022a130a110a0a747261696e2f6c6f7373150000803e\
                        6557981f";
        assert_eq!(hex, expected);
    }

    #[test]
    fn every_run_has_a_file_of_its_own_and_what_is_not_finite_is_left_out() -> Result<()> {
        let dir = tempfile::tempdir().map_err(Error::io("a temporary folder"))?;
        let mut sizes = Vec::new();
        for done in [0, 0, 7] {
            let mut board = TensorBoard::create(&dir.path().join("board"), done)?;
            let before = board.file.metadata().map_err(Error::io("events"))?.len();
            board.scalar("nll", 1, f64::NAN)?;
            board.scalar("nll", 1, 1e300)?;
            let after = board.file.metadata().map_err(Error::io("events"))?.len();
            assert_eq!(before, after);
            let terms = [("task", 0.5), ("kl", f64::INFINITY)].into();
            board.record(&StepRecord { step: 8, epoch: 0.5, lr: 1e-3, loss: 0.5, terms, grad_norm: 1.0 })?;
            let bytes = std::fs::read(&board.path).map_err(Error::io(&*board.path))?;
            let has = |tag: &str| bytes.windows(tag.len()).any(|window| window == tag.as_bytes());
            assert!(has("train/task") && has("train/lr") && !has("train/kl"));
            sizes.push(before);
        }
        // A resumed run writes its start step.
        assert!(sizes[0] == sizes[1] && sizes[1] < sizes[2], "{sizes:?}");
        assert_eq!(std::fs::read_dir(dir.path().join("board")).map_err(Error::io("board"))?.count(), 3);
        Ok(())
    }
}
