//! `backtide support-bundle`: what somebody who helps wants to see, in one file.
//!
//! It holds no content of a disk, and of configuration files no value that may be a secret.

use std::{
    io::{self, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use backtide_control::{ApiError, ErrorCode};
use clap::Args;
use jiff::Timestamp;
use serde::Serialize;
use tempfile::NamedTempFile;

use crate::{
    archive::Archive,
    arguments::ReceiverApi,
    commands::doctor::Report,
    context::Context,
    doctor::{Answers, examine, worst},
    ending::{Ending, Failure, failed, io_failure},
    restore::name_if_free,
};

/// As much of a log's end is taken.
const LOG_BYTES_MAX: u64 = 1 << 20;

/// A configuration file is not longer.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// A setting with one of these words in its name is left out.
const SECRET_WORDS: [&str; 6] = ["secret", "password", "passphrase", "token", "key", "credential"];

/// `backtide support-bundle`
#[derive(Args, Debug)]
pub(crate) struct SupportBundle {
    /// The file to write; it must not exist [default: backtide-support-TIME.tar in this directory]
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// A configuration file to put in, without its secrets; again for more
    #[arg(long, value_name = "FILE")]
    config: Vec<PathBuf>,
    /// A log file to put in, the last MiB of it; again for more
    #[arg(long, value_name = "FILE")]
    log: Vec<PathBuf>,
    #[command(flatten)]
    api: ReceiverApi,
}

/// A file of mode 0600 beside `output`, which must not exist; it is gone unless it gets that name.
fn beside(output: &Path) -> io::Result<NamedTempFile> {
    match output.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
        Ok(_) => return Err(io::ErrorKind::AlreadyExists.into()),
    }
    let directory = output.parent().filter(|parent| !parent.as_os_str().is_empty());
    let made = tempfile::Builder::new()
        .prefix(".backtide-support.")
        .tempfile_in(directory.unwrap_or(Path::new(".")));
    // The error names the path of the file beside; people asked for another one.
    made.map_err(|error| error.kind().into())
}

/// What was written; the JSON of the command.
#[derive(Debug, Serialize)]
struct Written {
    output: PathBuf,
    files: Vec<String>,
}

/// A file of the bundle.
struct Part {
    name: String,
    content: Vec<u8>,
}

impl SupportBundle {
    /// Writes the bundle, also when daemons are missing: then it says so, and ends with 3.
    pub(crate) async fn run(self, context: &Context) -> Result<Ending, Failure> {
        let now = Timestamp::now();
        let stem = format!("backtide-support-{}", now.strftime("%Y%m%dT%H%M%SZ"));
        let output = self.output.clone().unwrap_or_else(|| PathBuf::from(format!("{stem}.tar")));
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::AlreadyExists => {
                let message = format!("{} exists already", output.display());
                ApiError::new(ErrorCode::Exists, message).with_hint("take another name").into()
            }
            _ => io_failure(output.display(), &error),
        };
        // Before anything is asked, so that nothing is asked in vain.
        let file = beside(&output).map_err(failed)?;
        let (parts, missing) = self.gather(context).await?;
        let time = u64::try_from(now.as_second()).unwrap_or_default();
        let mut archive = Archive::new(file, time);
        let mut files = Vec::new();
        for Part { name, content } in parts {
            archive.add(&format!("backtide-support/{name}"), &content).map_err(failed)?;
            files.push(name);
        }
        let whole = archive.finish().map_err(failed)?;
        name_if_free(whole, &output).map_err(failed)?;
        let written = Written { output, files };
        context.print(&written, || {
            format!("wrote {}, which holds: {}", written.output.display(), written.files.join(", "))
        })?;
        for error in &missing {
            context.warn(&format!("the bundle lacks something: {}", error.message));
        }
        Ok(if missing.is_empty() { Ending::Done } else { Ending::Warnings })
    }

    async fn gather(&self, context: &Context) -> Result<(Vec<Part>, Vec<ApiError>), Failure> {
        let answers = Answers::gather(context, &self.api).await?;
        let mut missing = Vec::new();
        let mut parts = vec![Part::json("versions.json", &versions(&answers))?];
        let findings = examine(context, &self.api, &answers);
        parts.push(Part::json("doctor.json", &Report { verdict: worst(&findings), findings })?);
        match answers.agent {
            Ok(agent) => parts.push(Part::json("agent-status.json", &agent)?),
            Err(error) => missing.push(error),
        }
        match answers.receiver {
            Ok((receiver, disks)) => {
                parts.push(Part::json("receiver-status.json", &receiver)?);
                let client = context.receiver(&self.api)?;
                for disk in &disks.disks {
                    match client.points(&disk.name).await {
                        Ok(points) => parts.push(Part::json(&format!("points-{}.json", disk.name), &points)?),
                        Err(error) => missing.push(error),
                    }
                }
                parts.push(Part::json("receiver-disks.json", &disks)?);
                match client.mounts().await {
                    Ok(mounts) => parts.push(Part::json("mounts.json", &mounts)?),
                    Err(error) => missing.push(error),
                }
            }
            Err(error) => missing.push(error),
        }
        for (number, path) in (1..).zip(&self.config) {
            let content = redacted(&tail(path, CONFIG_BYTES_MAX)?, path)?;
            parts.push(Part { name: format!("config-{number}.toml"), content });
        }
        for (number, path) in (1..).zip(&self.log) {
            let content = tail(path, LOG_BYTES_MAX)?;
            parts.push(Part { name: format!("log-{number}.log"), content });
        }
        Ok((parts, missing))
    }
}

impl Part {
    fn json(name: &str, value: &impl Serialize) -> Result<Self, Failure> {
        let content = serde_json::to_vec_pretty(value)
            .map_err(|error| failed(format!("cannot write {name} as JSON: {error}")))?;
        Ok(Self { name: name.to_owned(), content })
    }
}

/// What runs on what.
fn versions(answers: &Answers) -> serde_json::Value {
    let text = |path: &str| std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned());
    serde_json::json!({
        "command": env!("CARGO_PKG_VERSION"),
        "agent": answers.agent.as_ref().ok().map(|agent| &agent.version),
        "receiver": answers.receiver.as_ref().ok().map(|(receiver, _)| &receiver.version),
        "kernel": text("/proc/version"),
        "system": text("/etc/os-release"),
    })
}

/// The last bytes of a file.
fn tail(path: &Path, bytes: u64) -> Result<Vec<u8>, Failure> {
    let read = || {
        let mut file = std::fs::File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(bytes)))?;
        let mut content = Vec::new();
        file.take(bytes).read_to_end(&mut content)?;
        Ok(content)
    };
    read().map_err(|error| io_failure(path.display(), &error))
}

/// A configuration without values that may be secrets.
fn redacted(text: &[u8], path: &Path) -> Result<Vec<u8>, Failure> {
    let unreadable =
        |why: String| failed(format!("the configuration {} cannot be read: {why}", path.display()));
    let text = std::str::from_utf8(text).map_err(|error| unreadable(error.to_string()))?;
    let mut table: toml::Table =
        text.parse().map_err(|error: toml::de::Error| unreadable(error.message().to_owned()))?;
    redact(&mut table);
    Ok(table.to_string().into_bytes())
}

fn redact(table: &mut toml::Table) {
    for (name, value) in table.iter_mut() {
        let name = name.to_ascii_lowercase();
        match value {
            _ if SECRET_WORDS.iter().any(|word| name.contains(word)) => {
                *value = toml::Value::String("left out".to_owned());
            }
            toml::Value::Table(inner) => redact(inner),
            toml::Value::Array(values) => {
                values.iter_mut().filter_map(toml::Value::as_table_mut).for_each(redact);
            }
            toml::Value::String(_)
            | toml::Value::Integer(_)
            | toml::Value::Float(_)
            | toml::Value::Boolean(_)
            | toml::Value::Datetime(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_left_out_wherever_they_are() {
        let text =
            "store = '/srv'\n[tls]\ncert = '/c'\nprivate_key = 'S1'\n[[peer]]\nToken = 'S2'\nname = 'a'\n";
        let kept = String::from_utf8(redacted(text.as_bytes(), Path::new("x")).unwrap()).unwrap();
        assert!(!kept.contains("S1") && !kept.contains("S2"), "{kept}");
        assert!(kept.contains("/srv") && kept.contains("/c") && kept.contains("left out"), "{kept}");
    }

    #[test]
    fn the_end_of_a_log_is_taken() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.log");
        std::fs::write(&path, "one two three").unwrap();
        assert_eq!(tail(&path, 5).unwrap(), b"three");
        assert_eq!(tail(&path, 500).unwrap(), b"one two three");
    }

    #[test]
    fn a_bundle_that_is_not_whole_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let output = directory.path().join("bundle.tar");
        drop(beside(&output).unwrap());
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        beside(&output).unwrap().persist_noclobber(&output).unwrap();
        assert_eq!(beside(&output).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
    }
}
