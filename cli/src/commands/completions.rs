//! `backtide completions`: for a shell.

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::{
    arguments::Arguments,
    context::Context,
    ending::{Ending, Failure, failed},
};

/// `backtide completions`
#[derive(Args, Debug)]
pub(crate) struct Completions {
    /// Which shell
    shell: Shell,
}

impl Completions {
    /// Prints the script.
    pub(crate) fn run(self, context: &Context) -> Result<Ending, Failure> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Arguments::command(), "backtide", &mut script);
        let script = String::from_utf8(script).map_err(|_| failed("the completions are not UTF-8"))?;
        context.print_line(&script)?;
        Ok(Ending::Done)
    }
}
