//! `backtide`: everything a person does.
//!
//! The way of one command: [`arguments`] says what can be asked, one file of [`commands`] does it
//! through the daemons' control APIs, [`output`] turns answers into text or JSON, and an [`Ending`]
//! becomes the exit code. Data goes to stdout, everything else to stderr.

mod archive;
mod arguments;
mod commands;
mod confirm;
mod context;
mod demo;
mod doctor;
mod ending;
mod inside;
mod local;
mod log_output;
mod open_files;
mod output;
mod places;
#[cfg(test)]
mod played_agent;
mod process_wide;
mod qmp;
mod quantity;
mod restore;

use std::process::ExitCode;

use backtide_control::{Lasting, build_lasting};
use clap::Parser;

use crate::{
    arguments::Arguments,
    context::Context,
    ending::{Ending, Failure},
};

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return ending::usage(&error),
    };
    let context = Context::new(&arguments);
    let result = run(&context, arguments);
    ending::exit_code(result, &context)
}

fn run(context: &Context, arguments: Arguments) -> Result<Ending, Failure> {
    let runtime = match arguments.command.threads() {
        None => tokio::runtime::Builder::new_current_thread().enable_all().build().map(Lasting::from),
        Some(threads) => build_lasting(tokio::runtime::Builder::new_multi_thread().worker_threads(threads)),
    };
    let runtime = runtime.map_err(|error| ending::failed(format!("cannot start: {error}")))?;
    let result = runtime.block_on(async {
        process_wide::survive_file_size_limits();
        commands::run(context, arguments.command).await
    });
    if matches!(result, Err(Failure::Interrupted)) {
        ending::soon();
    }
    result
}
