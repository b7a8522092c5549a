//! `backtide doctor`: what can be wrong with this installation.

use backtide_control::ErrorCode;
use clap::Args;
use serde::Serialize;

use crate::{
    arguments::ReceiverApi,
    context::Context,
    doctor::{Answers, Finding, Verdict, examine, text, worst},
    ending::{Ending, Failure},
};

/// `backtide doctor`
#[derive(Args, Debug)]
pub(crate) struct Doctor {
    #[command(flatten)]
    api: ReceiverApi,
}

/// The JSON of the command.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) verdict: Verdict,
    pub(crate) findings: Vec<Finding>,
}

impl Doctor {
    /// Looks at everything and prints it. What failed ends with 1, a warning with 3.
    pub(crate) async fn run(self, context: &Context) -> Result<Ending, Failure> {
        let answers = Answers::gather(context, &self.api).await?;
        let findings = examine(context, &self.api, &answers);
        let report = Report { verdict: worst(&findings), findings };
        context.print(&report, || text(&report.findings))?;
        Ok(match report.verdict {
            Verdict::Ok => Ending::Done,
            Verdict::Warning => Ending::Warnings,
            Verdict::Failed => Ending::Found(ErrorCode::Failed),
        })
    }
}
