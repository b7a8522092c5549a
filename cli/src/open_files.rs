//! How many files a daemon may have open: connections, segments, sockets. The usual limit of a shell
//! is too low for a receiver of many disks; a process may raise it to the hard limit by itself.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// With fewer a daemon works, and may refuse connections when there are many disks.
pub(crate) const ENOUGH: u64 = 4096;

/// Raises this process's limit as far as it may; the limit then. None is no limit.
pub(crate) fn raise() -> Option<u64> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })
    {
        tracing::warn!(%error, ?current, "cannot raise the limit of open files");
        return current;
    }
    if let Some(limit) = maximum.filter(|&limit| limit < ENOUGH) {
        tracing::warn!(limit, enough = ENOUGH, "few files may be open at once: raise the hard limit");
    }
    maximum
}

/// The soft limit of a process, out of the text of its `/proc/PID/limits`. None when it is not there,
/// or unlimited.
pub(crate) fn soft_limit(limits: &str) -> Option<u64> {
    let line = limits.lines().find(|line| line.starts_with("Max open files"))?;
    line.split_whitespace().nth(3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_read_as_the_kernel_writes_it() {
        let own = std::fs::read_to_string("/proc/self/limits").unwrap();
        assert_eq!(soft_limit(&own), getrlimit(Resource::Nofile).current);
        let text = "Limit  Soft Limit  Hard Limit  Units\nMax open files            1024                 524288               files\n";
        assert_eq!(soft_limit(text), Some(1024));
        assert_eq!(soft_limit("Max open files  unlimited unlimited files"), None);
    }
}
