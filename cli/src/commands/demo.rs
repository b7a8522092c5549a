//! `backtide demo`: the whole story on a scratch disk, proved.

use std::path::PathBuf;

use backtide_control::ErrorCode;
use backtide_log_receiver::THREADS_APART;
use clap::Args;

use crate::{
    commands::{
        Stop,
        daemon::{prepare, refuse_no_directory},
    },
    context::Context,
    demo::tell,
    ending::{Ending, Failure, io_failure, wrong_usage},
    local::Local,
};

/// `backtide demo`
#[derive(Args, Debug)]
pub(crate) struct Demo {
    /// Keep everything in this directory, which must be empty or missing [default: a temporary one
    /// that is removed at the end]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

impl Demo {
    /// Tells the story; a proof that fails is a failure.
    pub(crate) async fn run(self, context: &Context, mut stop: Stop) -> Result<Ending, Failure> {
        // The story's receiver goes away on purpose: only errors are news.
        prepare(context, "error", THREADS_APART);
        let temporary = match &self.dir {
            Some(directory) => {
                refuse_used(directory)?;
                None
            }
            None => Some(
                tempfile::Builder::new()
                    .prefix("backtide-demo-")
                    .tempdir()
                    .map_err(|error| io_failure("make a temporary directory", &error))?,
            ),
        };
        let directory = match (&self.dir, &temporary) {
            (Some(directory), _) => directory.clone(),
            (None, Some(temporary)) => temporary.path().to_owned(),
            (None, None) => unreachable!("one of them is there"),
        };
        let mut local = Local::at(&directory)?;
        let told = tokio::select! {
            told = tell(context, &mut local) => told,
            () = stop.asked() => Err(Failure::Interrupted),
        };
        local.stop().await;
        let report = told?;
        if context.json() {
            context.print(&report, String::new)?;
        } else if self.dir.is_some() {
            context.tell(&format!("everything is kept in {}", local.directory().display()));
        }
        Ok(if report.proved { Ending::Done } else { Ending::Found(ErrorCode::Failed) })
    }
}

fn refuse_used(directory: &std::path::Path) -> Result<(), Failure> {
    refuse_no_directory(directory)?;
    let used = match std::fs::read_dir(directory) {
        Ok(mut entries) => entries.next().is_some(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
        Err(error) => return Err(io_failure(directory.display(), &error)),
    };
    if !used {
        return Ok(());
    }
    Err(wrong_usage(format!("{} is not empty, and the demo keeps its own things only", directory.display())))
}
