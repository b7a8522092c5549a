//! What the daemon commands share: settings out of a file, the environment and flags, and logs.
//!
//! Flags go before the environment, that before the file, that before the defaults. What a daemon
//! does not know is refused, in the file as on the command line.

use std::{
    io::IsTerminal,
    path::{Path, PathBuf},
};

use backtide_control::{Address, ApiError, ErrorCode};
use serde::{Serialize, de::DeserializeOwned};
use tracing_subscriber::EnvFilter;

use crate::{
    commands::Stop,
    context::Context,
    ending::{Ending, Failure, io_failure, wrong_usage},
    log_output::LogOutput,
    open_files,
    places::Places,
    process_wide::end_on_panic,
};

/// A daemon's settings on their way to its own configuration type.
pub(crate) struct Settings {
    table: toml::Table,
    from: String,
}

impl Settings {
    /// Those of a file, or none.
    pub(crate) fn read(file: Option<&Path>) -> Result<Self, Failure> {
        let Some(file) = file else {
            return Ok(Self { table: toml::Table::new(), from: "the command line".to_owned() });
        };
        let from = file.display().to_string();
        let text = std::fs::read_to_string(file).map_err(|error| io_failure(&from, &error))?;
        let table = text.parse().map_err(|error| unreadable(&from, &error))?;
        Ok(Self { table, from })
    }

    /// Sets what was given.
    pub(crate) fn set(&mut self, name: &str, value: Option<impl Serialize>) -> Result<(), Failure> {
        if let Some(value) = value {
            let value = toml::Value::try_from(value)
                .map_err(|error| wrong_usage(format!("the value of {name} cannot be used: {error}")))?;
            self.table.insert(name.to_owned(), value);
        }
        Ok(())
    }

    /// Makes a directory's path absolute, so that it means the same to whoever is told of it, and
    /// refuses what is something else.
    pub(crate) fn directory(&mut self, name: &str) -> Result<(), Failure> {
        let given: PathBuf = self.get(name)?;
        let path = std::path::absolute(&given).map_err(|error| io_failure(given.display(), &error))?;
        refuse_no_directory(&path)?;
        self.set(name, Some(path))
    }

    /// Takes a setting back, whoever made it.
    pub(crate) fn unset(&mut self, name: &str) {
        self.table.remove(name);
    }

    /// One setting, if it is there.
    pub(crate) fn find<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, Failure> {
        if self.table.contains_key(name) { self.get(name).map(Some) } else { Ok(None) }
    }

    /// Sets what nobody has set.
    pub(crate) fn set_default<T: Serialize>(
        &mut self,
        name: &str,
        value: impl FnOnce() -> Result<T, Failure>,
    ) -> Result<(), Failure> {
        if self.table.contains_key(name) { Ok(()) } else { self.set(name, Some(value()?)) }
    }

    /// One setting that is there.
    pub(crate) fn get<T: DeserializeOwned>(&self, name: &str) -> Result<T, Failure> {
        let value = self
            .table
            .get(name)
            .cloned()
            .ok_or_else(|| wrong_usage(format!("{} does not set {name}", self.from)))?;
        value.try_into().map_err(|error| unreadable(&self.from, &error))
    }

    /// The daemon's configuration.
    pub(crate) fn config<T: DeserializeOwned>(self) -> Result<T, Failure> {
        let from = self.from;
        self.table.try_into().map_err(|error| unreadable(&from, &error))
    }
}

fn unreadable(from: &str, error: &toml::de::Error) -> Failure {
    ApiError::new(ErrorCode::Usage, format!("the configuration of {from} cannot be used: {error}"))
        .with_hint("the settings are in docs/cli.md")
        .into()
}

impl Settings {
    /// Says where the control API is, and that sockets without an address of their own are beside it.
    pub(crate) fn set_places(
        &mut self,
        api: Option<Address>,
        default: impl FnOnce() -> Result<Address, Failure>,
        places: &Places,
    ) -> Result<(), Failure> {
        self.set("api", api)?;
        self.set_default("api", default)?;
        let api: Address = self.get("api")?;
        self.set_default("run", || run_dir(&api, places))
    }
}

/// Refuses the path of something that is there and no directory.
pub(crate) fn refuse_no_directory(path: &Path) -> Result<(), Failure> {
    match std::fs::metadata(path) {
        Ok(found) if !found.is_dir() => Err(wrong_usage(format!("{} is not a directory", path.display()))),
        // What is missing is made, and what cannot be looked at fails when it is used.
        Ok(_) | Err(_) => Ok(()),
    }
}

/// Prints that a daemon is ready, waits until it is to stop, and ends it in good order.
pub(crate) async fn serve(
    context: &Context,
    mut stop: Stop,
    ready: &impl Serialize,
    text: impl FnOnce() -> String,
    shutdown: impl Future<Output = ()>,
) -> Result<Ending, Failure> {
    tell_ready(context, ready, text);
    stop.asked().await;
    shutdown.await;
    Ok(Ending::Done)
}

/// Prints that a daemon is ready. Nobody has to read it: neither a pipe that is closed nor a file system that is full, as that
/// of logs may be after a start of the machine, is a reason to protect nothing.
pub(crate) fn tell_ready(context: &Context, ready: &impl Serialize, text: impl FnOnce() -> String) {
    if let Err(Failure::Error(error)) = context.print(ready, text) {
        tracing::warn!(why = error.message, "cannot print that this is ready: it goes on");
    }
}

/// Sockets without an address of their own are beside the control API's.
fn run_dir(api: &Address, places: &Places) -> Result<PathBuf, Failure> {
    api.socket_path().and_then(Path::parent).map_or_else(|| places.run_dir(), |parent| Ok(parent.to_owned()))
}

/// What a process does before it becomes a daemon, or holds some: logs go to stderr, as JSON with
/// `--json`, from this level on by default; as many files may be open as the system allows; and a panic ends it, but in the
/// threads of `apart` ([`end_on_panic`]).
pub(crate) fn prepare(context: &Context, level: &str, apart: &'static [&'static str]) {
    log_at(context, level);
    open_files::raise();
    end_on_panic(apart);
}

fn log_at(context: &Context, default: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    let color =
        std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|set| set.is_empty());
    // Without a descriptor for them there are no logs.
    let Ok(output) = LogOutput::stderr(context.json()) else { return };
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(color).with_writer(output);
    // An error means that logs are set up already, by whoever runs this in his process.
    let _ = if context.json() { builder.json().try_init() } else { builder.try_init() };
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use backtide_log_receiver::Config;

    use super::*;

    fn file(text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    fn message(failure: Failure) -> String {
        match failure {
            Failure::Error(error) => error.message,
            Failure::ClosedPipe | Failure::Interrupted => String::new(),
        }
    }

    #[test]
    fn flags_go_before_the_file_and_that_before_defaults() {
        let file = file("store = '/from/file'\napi = 'unix:/file/api.sock'\n[limits]\nmounts = 3\n");
        let mut settings = Settings::read(Some(file.path())).unwrap();
        settings.set("store", Some("/from/flag")).unwrap();
        settings.set("listen", None::<Vec<Address>>).unwrap();
        settings.set_default("api", || Ok(Address::unix("/default/api.sock"))).unwrap();
        settings.set_default("run", || Ok("/default")).unwrap();
        let config: Config = settings.config().unwrap();
        assert_eq!(config.store, Path::new("/from/flag"));
        assert_eq!(config.api_address().to_string(), "unix:/file/api.sock");
        assert_eq!(config.run_dir(), Path::new("/default"));
        assert_eq!(config.limits.mounts, 3);
    }

    #[test]
    fn an_unknown_setting_is_refused_and_named_with_its_file() {
        let file = file("store = '/x'\nstroe = 1\n");
        let settings = Settings::read(Some(file.path())).unwrap();
        let text = message(settings.config::<Config>().unwrap_err());
        assert!(text.contains("stroe") && text.contains(&file.path().display().to_string()), "{text}");
        let text = message(Settings::read(Some(Path::new("/nonexistent.toml"))).err().unwrap());
        assert!(text.starts_with("/nonexistent.toml: "), "{text}");
    }

    #[test]
    fn sockets_are_beside_the_api() {
        let places = Places::of_this_user();
        assert_eq!(run_dir(&Address::unix("/a/b/api.sock"), &places).unwrap(), Path::new("/a/b"));
        let beside = run_dir(&"tcp://127.0.0.1:1".parse().unwrap(), &places);
        assert_eq!(beside.ok(), places.run_dir().ok());
    }
}
