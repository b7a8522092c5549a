//! How a command ends: its exit code, and the error people or scripts read.
//!
//! Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done with warnings, 4 not found, 5 refused,
//! 6 peer unreachable, 8 damaged data, 130 interrupted.

use std::{
    io::{self, Write},
    process::ExitCode,
    time::Duration,
};

use backtide_control::{ApiError, ErrorCode};

use crate::{context::Context, output::printable_lines};

/// Exit code of a command that did its work and has something to say about it.
const WARNINGS: u8 = 3;

/// How long threads have after an interrupt to put in order what they have begun.
const LAST_WORK: Duration = Duration::from_secs(5);

/// How a command that did its work ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// Without anything to remark.
    Done,
    /// With warnings, which are on stderr already.
    Warnings,
    /// The work was to check something, and this is what it found; said already.
    Found(ErrorCode),
    /// As the process ended that this one stood in front of.
    As(u8),
}

/// Why a command did not do its work.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Something went wrong.
    Error(Box<ApiError>),
    /// The reader of stdout has gone away, as `head` does: it has what it wanted.
    ClosedPipe,
    /// A signal asked to stop.
    Interrupted,
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Self::Error(Box::new(error))
    }
}

/// An error of code `failed`.
pub(crate) fn failed(message: impl Into<String>) -> Failure {
    ApiError::new(ErrorCode::Failed, message).into()
}

/// An error of code `usage`.
pub(crate) fn wrong_usage(message: impl Into<String>) -> Failure {
    ApiError::new(ErrorCode::Usage, message).into()
}

/// `what: why`, where `what` is what was tried.
pub(crate) fn io_failure(what: impl std::fmt::Display, error: &io::Error) -> Failure {
    let code = match error.kind() {
        io::ErrorKind::NotFound => ErrorCode::NotFound,
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => ErrorCode::Refused,
        io::ErrorKind::AddrInUse => ErrorCode::Locked,
        // The rest has no exit code of its own.
        _ => ErrorCode::Failed,
    };
    ApiError::new(code, format!("{what}: {error}")).into()
}

/// Says what went wrong, if anything did, and gives the exit code.
pub(crate) fn exit_code(result: Result<Ending, Failure>, context: &Context) -> ExitCode {
    match result {
        Ok(Ending::Done) if context.has_remarked() => ExitCode::from(WARNINGS),
        Ok(Ending::Done) | Err(Failure::ClosedPipe) => ExitCode::SUCCESS,
        Ok(Ending::Warnings) => ExitCode::from(WARNINGS),
        Ok(Ending::Found(code)) => code.into(),
        Ok(Ending::As(code)) => ExitCode::from(code),
        Err(Failure::Interrupted) => {
            let error = ApiError::new(ErrorCode::Interrupted, "interrupted");
            say(&error_text(&error, context.json()));
            error.code.into()
        }
        Err(Failure::Error(error)) => {
            say(&error_text(&error, context.json()));
            error.code.into()
        }
    }
}

/// Ends the process after a while, whatever its threads wait for then: a pipe that nobody reads holds one for ever.
pub(crate) fn soon() {
    std::thread::spawn(|| {
        std::thread::sleep(LAST_WORK);
        say("backtide: interrupted");
        std::process::exit(ErrorCode::Interrupted.exit_code().into());
    });
}

/// Wrong usage, or `--help` and `--version`, which clap reports the same way.
pub(crate) fn usage(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        return match error.print() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        };
    }
    if std::env::args_os().any(|argument| argument == "--json") {
        let usage = ApiError::new(ErrorCode::Usage, usage_message(error)).with_hint("see `backtide help`");
        say(&error_text(&usage, true));
    } else {
        // Nothing can be done when stderr is gone.
        let _ = error.print();
    }
    ErrorCode::Usage.into()
}

/// What is wrong with the arguments, as one sentence.
fn usage_message(error: &clap::Error) -> String {
    use clap::error::ErrorKind;
    let no_command = [ErrorKind::MissingSubcommand, ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand];
    if no_command.contains(&error.kind()) {
        return "a command is missing".to_owned();
    }
    let text = error.render().to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    // The first paragraph: what is wrong, and below it, further in, the arguments it is about.
    let lines: Vec<&str> = text.lines().take_while(|line| !line.is_empty()).map(str::trim).collect();
    match lines.split_first() {
        Some((what, [])) => (*what).to_owned(),
        Some((what, named)) => format!("{what} {}", named.join(", ")),
        None => "the arguments are wrong".to_owned(),
    }
}

/// The error as one line of JSON, or as a sentence and a hint.
fn error_text(error: &ApiError, json: bool) -> String {
    if json {
        return serde_json::json!({ "error": error }).to_string();
    }
    // What a guest or another host has named may be in it.
    let message = printable_lines(&error.message);
    match &error.hint {
        Some(hint) => format!("backtide: {message}\nhint: {}", printable_lines(hint)),
        None => format!("backtide: {message}"),
    }
}

fn say(text: &str) {
    // Nothing can be done when stderr is gone.
    let _ = writeln!(io::stderr(), "{text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_a_sentence_and_a_hint_or_one_line_of_json() {
        let error =
            ApiError::new(ErrorCode::NotFound, "there is no disk vm9").with_hint("see `backtide status`");
        assert_eq!(error_text(&error, false), "backtide: there is no disk vm9\nhint: see `backtide status`");
        assert_eq!(
            error_text(&error, true),
            r#"{"error":{"code":"not-found","hint":"see `backtide status`","message":"there is no disk vm9"}}"#
        );
    }

    #[test]
    fn an_error_gives_the_terminal_no_orders() {
        let error =
            ApiError::new(ErrorCode::Failed, "\u{1b}]0;owned\u{7} and \u{9b}2J\nmore").with_hint("\r!");
        let text = error_text(&error, false);
        assert_eq!(text, "backtide: \u{fffd}]0;owned\u{fffd} and \u{fffd}2J\nmore\nhint: \u{fffd}!");
    }

    #[test]
    fn operating_system_errors_have_the_exit_code_of_their_kind() {
        let code = |kind: io::ErrorKind| match io_failure("open x", &io::Error::from(kind)) {
            Failure::Error(error) => error.code.exit_code(),
            Failure::ClosedPipe | Failure::Interrupted => 0,
        };
        assert_eq!(code(io::ErrorKind::NotFound), 4);
        assert_eq!(code(io::ErrorKind::PermissionDenied), 5);
        assert_eq!(code(io::ErrorKind::StorageFull), 1);
    }
}
