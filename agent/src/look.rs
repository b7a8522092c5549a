//! A look at what an agent would find, by who does not become it: `agent run --check`.
//!
//! Invariant: nothing stays changed, and a running agent's lock of the state directory is nobody's concern here.

use std::{io, path::Path, sync::Arc};

use backtide_control::{ApiError, ErrorCode};
use backtide_export::{NbdRule, NbdTls, NbdUri, TlsDemand};
use backtide_storage::RealStorage;
use backtide_units::DiskName;

use crate::{
    Config,
    record::{AllRecords, DiskRecord, Records},
};

/// How an agent that is to be restarted tells the program that looks for it of disks whose records it cannot use either.
pub(crate) const LOST: &str = "BACKTIDE_CHECK_LOST";

/// So much has to fit into the state directory: a record, and what a file system takes for its name.
const PROBED_BYTES: usize = 16 << 10;

/// Between their names.
const SEPARATOR: char = ',';

/// What [`lost`] reads of these names.
pub(crate) fn lost_text(names: &[DiskName]) -> String {
    names.iter().map(DiskName::as_str).collect::<Vec<_>>().join(&SEPARATOR.to_string())
}

/// Disks that the agent which has this process look neither serves nor knows: none, where no agent does.
pub fn lost() -> Vec<DiskName> {
    names_in(&std::env::var(LOST).unwrap_or_default())
}

fn names_in(text: &str) -> Vec<DiskName> {
    text.split(SEPARATOR).filter_map(|name| name.parse().ok()).collect()
}

/// How many disks an agent with these settings would know. Of those that are `lost` it need not know anything: with
/// them nothing gets worse.
///
/// # Errors
/// One sentence for each record that it could not use, and for each disk that it could not serve for its certificates. `damaged`
/// when a record is, else `refused`.
pub fn look(config: &Config, lost: &[DiskName]) -> Result<usize, ApiError> {
    if !config.state.exists() {
        return can_be_made(&config.state).map(|()| 0);
    }
    let unreadable = |error: io::Error| {
        let why = format!("cannot read the disks' records in {}: {error}", config.state.display());
        ApiError::new(ErrorCode::Failed, why)
    };
    has_room(&config.state)?;
    let storage = RealStorage::open(&config.state).map_err(unreadable)?;
    let AllRecords { known, mut unreadable } =
        Records::new(Arc::new(storage)).load_all().map_err(unreadable)?;
    unreadable.retain(|(disk, _)| !lost.contains(disk));
    let is_damaged = unreadable.iter().any(|(_, error)| error.kind() != io::ErrorKind::Unsupported);
    let mut wrong: Vec<String> =
        unreadable.into_iter().map(|(disk, error)| format!("disk {disk}: {error}")).collect();
    wrong.extend(known.iter().filter_map(|record| unservable(record, &config.nbd_rule())));
    if wrong.is_empty() {
        return Ok(known.len());
    }
    let code = if is_damaged { ErrorCode::Damaged } else { ErrorCode::Refused };
    let state = Path::display(&config.state);
    Err(ApiError::new(code, wrong.join("\n")).with_hint(format!(
        "use a program that knows such records, put whole ones back, or move them out of {state}, which forgets what the disks \
         were; `attach --adopt` continues their history"
    )))
}

/// Whether an agent could keep there what it has to before it serves a disk: its record, with another epoch. Only an attempt tells.
fn has_room(state: &Path) -> Result<(), ApiError> {
    let attempt = state.join(format!(".backtide-check-{}", std::process::id()));
    let written = std::fs::File::create_new(&attempt).and_then(|mut file| {
        io::Write::write_all(&mut file, &[0; PROBED_BYTES])?;
        file.sync_all()
    });
    let removed = std::fs::remove_file(&attempt);
    written.and(removed).map_err(|error| {
        let why = format!("nothing can be written in the state directory {}: {error}", state.display());
        ApiError::new(ErrorCode::Refused, why)
            .with_hint("make room there, or have it written to again: no disk is attached without its record")
    })
}

/// Whether the directory could be made. Who may make one there, and whether that file system takes any, only an attempt tells.
fn can_be_made(state: &Path) -> Result<(), ApiError> {
    let above = std::path::absolute(state)
        .map(|state| state.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/")).to_owned());
    let attempt = above.and_then(|above| {
        let attempt = above.join(format!(".backtide-check-{}", std::process::id()));
        std::fs::create_dir(&attempt)?;
        std::fs::remove_dir(&attempt)
    });
    attempt.map_err(|error| {
        let why = format!("the state directory {} is not there and cannot be made: {error}", state.display());
        ApiError::new(ErrorCode::Failed, why)
            .with_hint("give an agent that may not make it another one with --state")
    })
}

/// Why an attached disk could not be served where it is, as far as its certificates tell, and what is allowed.
fn unservable(record: &DiskRecord, rule: &NbdRule) -> Option<String> {
    let uri: NbdUri = record.nbd.as_deref().filter(|_| record.attached)?.parse().ok()?;
    let why = match (rule.check_open(&uri), uri.tls) {
        (Err(open), _) => open.to_string(),
        (Ok(()), Some(tls)) => {
            let tls = NbdTls { mode: TlsDemand::Required, certificates: tls.certificates };
            tls.check().err()?.chain().to_string()
        }
        (Ok(()), None) => return None,
    };
    Some(format!("disk {}: it could not be served: {why}", record.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_record_that_cannot_be_used_is_told_in_a_sentence() {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("state");
        let config: Config = serde_json::from_value(serde_json::json!({
            "api": "unix:/nowhere/agent.sock", "state": state, "run": directory.path(),
        }))
        .unwrap();
        assert_eq!(look(&config, &[]), Ok(0));
        assert!(!state.exists() && directory.path().read_dir().unwrap().next().is_none(), "it only looks");
        let nowhere = Config { state: "/proc/backtide/state".into(), ..config.clone() };
        let error = look(&nowhere, &[]).unwrap_err();
        let told = "the state directory /proc/backtide/state is not there and cannot be made: ";
        assert!(error.message.starts_with(told) && error.code == ErrorCode::Failed, "{error:?}");
        let records = Records::new(Arc::new(RealStorage::open(&state).unwrap()));
        let record = |name: &str| {
            DiskRecord::new(name.parse().unwrap(), format!("/{name}"), "unix:/r.sock".parse().unwrap())
        };
        for name in ["vm1", "vm2", "vm3"] {
            records.save(&record(name)).unwrap();
        }
        assert_eq!(look(&config, &[]), Ok(3));
        let newer = std::fs::read_to_string(state.join("vm2.json")).unwrap();
        std::fs::write(state.join("vm2.json"), newer.replace("\"version\": 1", "\"version\": 7")).unwrap();
        let error = look(&config, &[]).unwrap_err();
        assert_eq!(error.code, ErrorCode::Refused);
        let file = state.join("vm2.json");
        let version = format!(
            "disk vm2: the record {} is of version 7, and this program knows version 1 only",
            file.display()
        );
        assert_eq!(error.message, version);
        std::fs::write(state.join("vm3.json"), "{").unwrap();
        let missing = directory.path().join("pki");
        let nbd = format!("nbds+unix:///vm1?socket=/s&tls-certificates={}", missing.display());
        records.save(&DiskRecord { nbd: Some(nbd), attached: true, ..record("vm1") }).unwrap();
        let error = look(&config, &[]).unwrap_err();
        assert_eq!(error.code, ErrorCode::Damaged);
        let mut said: Vec<_> = error.message.lines().collect();
        said.sort_unstable();
        assert_eq!(said.len(), 3, "{said:?}");
        assert!(said[0].starts_with("disk vm1: it could not be served: cannot read"), "{said:?}");
        assert_eq!(said[1], version);
        assert!(said[2].contains("vm3.json is damaged: "), "{said:?}");
        // Those that nobody knew before hold up nobody, but no disk that was served is one of them.
        let lost = names_in(&lost_text(&["vm2", "vm3"].map(|name| name.parse().unwrap())));
        let error = look(&config, &lost).unwrap_err();
        assert_eq!(error.message, said[0]);
        let exposed = Some("nbd://0.0.0.0:10809/vm1".to_owned());
        records.save(&DiskRecord { nbd: exposed, attached: true, ..record("vm1") }).unwrap();
        let error = look(&config, &lost).unwrap_err();
        assert_eq!(error.code, ErrorCode::Refused);
        assert!(error.message.starts_with("disk vm1: it could not be served: nbd://0.0.0.0"), "{error}");
        assert_eq!(look(&Config { insecure: true, ..config.clone() }, &lost), Ok(1));
        records.save(&record("vm1")).unwrap();
        assert_eq!(look(&config, &lost), Ok(1));
        assert!(look(&config, &lost[..1]).unwrap_err().message.contains("vm3.json"));
        assert_eq!(names_in(&lost_text(&[])), []);
    }
}
