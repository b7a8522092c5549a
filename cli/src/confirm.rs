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
    if context.json() || !io::stdin().is_terminal() {
        return Err(wrong_usage(format!("{what}\nwith --yes it is done")));
    }
    // Nothing can be done when stderr is gone.
    let _ = write!(io::stderr(), "{what}\nDo it? [y/N] ");
    let (answer, answered) = oneshot::channel();
    // A thread of its own, which nobody waits for: a signal ends the command while it still reads.
    std::thread::spawn(move || {
        let mut line = String::new();
        let read = io::stdin().read_line(&mut line);
        let _ = answer.send(read.is_ok() && matches!(line.trim(), "y" | "Y" | "yes"));
    });
    match answered.await {
        Ok(true) => Ok(()),
        Ok(false) | Err(_) => Err(failed("nothing was done")),
    }
}
