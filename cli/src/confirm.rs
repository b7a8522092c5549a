//! Asks a person before something is done that cannot be taken back as easily as it is done.

use std::io::{self, IsTerminal, Write};

use tokio::sync::oneshot;

use crate::{
    context::Context,
    ending::{Failure, failed, wrong_usage},
};

/// Shows what will be done and goes on only when a person says so; scripts have said so by `--yes`.
///
/// # Errors
/// When nobody can be asked, or the answer is no.
pub(crate) async fn confirm(context: &Context, what: &str) -> Result<(), Failure> {
    match ask(context, what, "Do it? [y/N] ").await?.as_deref() {
        Some("y" | "Y" | "yes") => Ok(()),
        Some(_) | None => Err(failed("nothing was done")),
    }
}

/// The same of what can never be taken back: the person types a name.
///
/// # Errors
/// As [`confirm`].
pub(crate) async fn confirm_by_name(context: &Context, name: &str, what: &str) -> Result<(), Failure> {
    match ask(context, what, &format!("Type {name} to do it: ")).await? {
        Some(line) if line == name => Ok(()),
        Some(_) | None => Err(failed("nothing was done")),
    }
}

/// A line that a person types; none when it cannot be read.
async fn ask(context: &Context, what: &str, question: &str) -> Result<Option<String>, Failure> {
    if context.json() || !io::stdin().is_terminal() {
        return Err(wrong_usage(format!("{what}\nwith --yes it is done")));
    }
    // Nothing can be done when stderr is gone.
    let _ = write!(io::stderr(), "{what}\n{question}");
    let (answer, answered) = oneshot::channel();
    // A thread of its own, which nobody waits for: a signal ends the command while it still reads.
    std::thread::spawn(move || {
        let mut line = String::new();
        let read = io::stdin().read_line(&mut line);
        let _ = answer.send(read.is_ok().then(|| line.trim().to_owned()));
    });
    Ok(answered.await.unwrap_or_default())
}
