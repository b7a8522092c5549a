//! A tar archive of small files, in the ustar form that every `tar` reads.

use std::io::{self, Write};

/// Everything in an archive begins at a multiple of this.
const BLOCK: usize = 512;

/// The longest name.
const NAME_BYTES_MAX: usize = 100;

/// Writes an archive.
pub(crate) struct Archive<W> {
    out: W,
    /// Seconds since 1970: the time of every file in it.
    time: u64,
}

impl<W: Write> Archive<W> {
    /// Of files of this time, in seconds since 1970.
    pub(crate) fn new(out: W, time: u64) -> Self {
        Self { out, time }
    }

    /// Adds a file with mode 0600.
    ///
    /// # Panics
    /// When the name has more than 100 bytes.
    pub(crate) fn add(&mut self, name: &str, content: &[u8]) -> io::Result<()> {
        self.out.write_all(&header(name, content.len() as u64, self.time))?;
        self.out.write_all(content)?;
        let over = content.len() % BLOCK;
        if over > 0 {
            self.out.write_all(&[0; BLOCK][over..])?;
        }
        Ok(())
    }

    /// Ends it, and gives back where it was written.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.out.write_all(&[0; 2 * BLOCK])?;
        Ok(self.out)
    }
}

/// Fields of fixed places: numbers are octal text, the checksum is the sum of all bytes with its own
/// field as spaces.
fn header(name: &str, size: u64, time: u64) -> [u8; BLOCK] {
    assert!(name.len() <= NAME_BYTES_MAX, "a name in an archive has at most {NAME_BYTES_MAX} bytes");
    let mut header = [0; BLOCK];
    let mut put = |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(0, name);
    put(100, "0000600");
    put(108, "0000000");
    put(116, "0000000");
    put(124, &format!("{size:011o}"));
    put(136, &format!("{time:011o}"));
    put(148, "        ");
    put(156, "0");
    put(257, "ustar\u{0}00");
    let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn tar_reads_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.tar");
        let mut archive = Archive::new(std::fs::File::create(&path).unwrap(), 1_772_366_400);
        let long = vec![b'x'; 3 * BLOCK + 1];
        archive.add("b/empty", b"").unwrap();
        archive.add("b/long", &long).unwrap();
        archive.add("b/short", b"hello\n").unwrap();
        archive.finish().unwrap();
        let status =
            Command::new("tar").arg("-xf").arg(&path).arg("-C").arg(directory.path()).status().unwrap();
        assert!(status.success());
        let read = |name: &str| std::fs::read(directory.path().join(name)).unwrap();
        assert_eq!((read("b/empty"), read("b/long"), read("b/short")), (vec![], long, b"hello\n".to_vec()));
    }
}
