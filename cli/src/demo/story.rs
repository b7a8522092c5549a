//! What happens in the demo, in its order, and what is proved.

use std::{fs::File, path::PathBuf, time::Duration};

use backtide_agent_api::{
    AckPolicy, AgentClient, AttachRequest, DiskStatus, LimitsRequest, MARK_WAIT_MS, MarkRequest, Mode,
    OnOutage,
};
use backtide_control::{ApiError, ErrorCode};
use backtide_receiver_api::{Hole, MountRequest, ReceiverClient};
use backtide_units::{ByteCount, DiskName, Lsn};
use blake3::Hash;
use serde::Serialize;

use crate::{
    commands::{
        restore::{What, restore},
        wait,
    },
    context::Context,
    demo::guest::Guest,
    ending::{Failure, failed, io_failure},
    local::Local,
    quantity::{duration_text, size_text},
};

const DISK: ByteCount = ByteCount(64 << 20);

/// So small that the outage overflows it and a resync is needed.
const WINDOW: ByteCount = ByteCount(1 << 20);

const WRITTEN_BEFORE: ByteCount = ByteCount(16 << 20);
const WRITTEN_IN_OUTAGE: ByteCount = ByteCount(12 << 20);
const WRITTEN_AFTER: ByteCount = ByteCount(8 << 20);

/// No step takes so long on any machine; a demo that hangs says where.
const STEP_TIMEOUT: Duration = Duration::from_secs(45);

/// What the demo found; its JSON.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// The restored points.
    pub(crate) proofs: Vec<Proof>,
    /// What cannot be gone back to, and why.
    pub(crate) holes: Vec<Hole>,
    /// Whether a point in the hole was refused.
    pub(crate) hole_refused: bool,
    /// Whether everything was proved.
    pub(crate) proved: bool,
    /// How long it all took.
    pub(crate) seconds: f64,
}

/// One restored point against what was written.
#[derive(Debug, Serialize)]
pub(crate) struct Proof {
    /// Which point of the story.
    pub(crate) name: &'static str,
    /// Its LSN.
    pub(crate) lsn: Lsn,
    /// BLAKE3 of what the guest had written until then.
    pub(crate) expected: String,
    /// BLAKE3 of the restored file.
    pub(crate) restored: String,
    /// Whether they are the same.
    pub(crate) same: bool,
}

/// A point to come back to.
struct Moment {
    name: &'static str,
    lsn: Lsn,
    expected: Hash,
}

/// Who takes part.
struct Stage<'a> {
    context: &'a Context,
    local: &'a mut Local,
    agent: AgentClient,
    receiver: ReceiverClient,
    disk: DiskName,
    step: u32,
}

/// Tells the story. Leaves the daemons of `local` running.
pub(crate) async fn tell(context: &Context, local: &mut Local) -> Result<Report, Failure> {
    let begun = std::time::Instant::now();
    local.start_receiver().await?;
    local.start_agent().await?;
    let name: DiskName = "demo".parse().expect("a constant name");
    let mut stage = Stage {
        agent: local.agent_client()?,
        receiver: local.receiver_client()?,
        context,
        local,
        disk: name,
        step: 0,
    };
    let mut guest = stage.attach().await?;
    let before = stage.before_the_cut(&mut guest).await?;
    let lost = stage.outage(&mut guest).await?;
    let resync = stage.resync(&mut guest).await?;
    let latest = stage.after(&mut guest).await?;
    let mut proofs = Vec::new();
    for moment in [before, resync, latest] {
        proofs.push(stage.prove(moment).await?);
    }
    let (holes, hole_refused) = stage.hole(lost).await?;
    let proved = hole_refused && proofs.iter().all(|proof| proof.same);
    let seconds = begun.elapsed().as_secs_f64();
    stage.say(if proved {
        format!("proved in {}: every point is what the guest had written until then", duration_text(seconds))
    } else {
        format!("FAILED after {}: see above", duration_text(seconds))
    })?;
    Ok(Report { proofs, holes, hole_refused, proved, seconds })
}

impl Stage<'_> {
    async fn attach(&mut self) -> Result<Guest, Failure> {
        let path = self.local.directory().join("demo.img");
        create_disk(&path)?;
        let request = AttachRequest {
            name: self.disk.clone(),
            image: path.to_string_lossy().into_owned(),
            receiver: self.local.stream(),
            nbd: None,
            // The guest's flushes pace it while the receiver is there, and cost nothing in the outage.
            ack: Some(AckPolicy::Durable),
            on_outage: Some(OnOutage::Continue),
            stream_tls: None,
            adopt: None,
            from: None,
            failover: false,
            take_over: false,
            format: None,
            cache: None,
            limits: LimitsRequest { window_bytes: Some(WINDOW), ..LimitsRequest::default() },
        };
        let attached = self.agent.attach(&request).await?;
        self.wait(wait::in_sync).await?;
        self.say(format!(
            "a receiver and an agent run; a scratch disk of {} is served at {}",
            size_text(DISK),
            attached.nbd_uri
        ))?;
        Guest::boot(&attached.nbd_uri).await
    }

    async fn before_the_cut(&mut self, guest: &mut Guest) -> Result<Moment, Failure> {
        let writes = guest.write(WRITTEN_BEFORE).await?;
        let lsn = self.mark("before-the-cut").await?;
        self.durable(lsn).await?;
        self.say(format!(
            "the guest writes {} in {writes} writes over NBD; all durable at the receiver: lsn:{lsn} is marked",
            size_text(WRITTEN_BEFORE)
        ))?;
        Ok(Moment { name: "before the cut", lsn, expected: guest.hash() })
    }

    /// Gives an LSN that nobody can go back to.
    async fn outage(&mut self, guest: &mut Guest) -> Result<Lsn, Failure> {
        self.local.stop_receiver().await;
        self.wait(|disk| !disk.connected).await?;
        self.say("the receiver is stopped: the stream is cut".to_owned())?;
        guest.write(WINDOW).await?;
        let lost = self.wait(|_| true).await?.lsn.last;
        let writes = guest.write(WRITTEN_IN_OUTAGE).await?;
        let disk = self.wait(|disk| disk.mode == Mode::Tracking).await?;
        self.say(format!(
            "the guest writes on, {} more; its window of {} overflows: mode tracking, {} blocks are marked dirty",
            writes,
            size_text(WINDOW),
            disk.dirty.blocks
        ))?;
        Ok(lost)
    }

    async fn resync(&mut self, guest: &mut Guest) -> Result<Moment, Failure> {
        let expected = guest.hash();
        self.local.start_receiver().await?;
        self.wait(wait::in_sync).await?;
        let points = self.receiver.points(&self.disk).await?;
        let lsn = points
            .holes
            .iter()
            .filter(|hole| hole.after_lsn > Lsn::ZERO)
            .find_map(|hole| hole.before_lsn)
            .ok_or_else(|| failed("the outage left no closed hole in the timeline"))?;
        self.say(format!(
            "the receiver is back: the dirty blocks are sent as they were at lsn:{lsn}, then the disk is in sync"
        ))?;
        Ok(Moment { name: "the resync point", lsn, expected })
    }

    async fn after(&mut self, guest: &mut Guest) -> Result<Moment, Failure> {
        let writes = guest.write(WRITTEN_AFTER).await?;
        let lsn = self.wait(|_| true).await?.lsn.last;
        self.durable(lsn).await?;
        self.say(format!(
            "the guest writes {} in {writes} writes more, up to lsn:{lsn}",
            size_text(WRITTEN_AFTER)
        ))?;
        Ok(Moment { name: "latest", lsn, expected: guest.hash() })
    }

    async fn prove(&mut self, moment: Moment) -> Result<Proof, Failure> {
        let output = self.local.directory().join(format!("restored-{}.img", moment.lsn));
        let at = match moment.name {
            "latest" => "latest".to_owned(),
            _ => format!("lsn:{}", moment.lsn),
        };
        let request = MountRequest {
            name: self.disk.clone(),
            at,
            nbd: None,
            temporary: true,
            writable: false,
            changed_since: None,
        };
        let path = output.to_string_lossy().into_owned();
        let what =
            What { output: &path, force: true, only_changed: false, around_damage: false, verify: true };
        let restored = restore(self.context, &self.receiver, &request, what, std::future::pending()).await?;
        let hash = hash_of(output).await?;
        let same = hash == moment.expected && restored.lsn == moment.lsn;
        self.say(format!(
            "restored {} (lsn:{}): BLAKE3 {} {}",
            moment.name,
            restored.lsn,
            &hash.to_hex()[..16],
            if same { "is what the guest had written" } else { "IS NOT WHAT THE GUEST HAD WRITTEN" }
        ))?;
        Ok(Proof {
            name: moment.name,
            lsn: moment.lsn,
            expected: moment.expected.to_hex().to_string(),
            restored: hash.to_hex().to_string(),
            same,
        })
    }

    /// Shows the hole, and that a point in it is refused.
    async fn hole(&mut self, lost: Lsn) -> Result<(Vec<Hole>, bool), Failure> {
        let points = self.receiver.points(&self.disk).await?;
        let holes: Vec<Hole> = points.holes.into_iter().filter(|hole| hole.after_lsn > Lsn::ZERO).collect();
        for hole in &holes {
            let before = hole.before_lsn.map_or_else(|| "now".to_owned(), |lsn| format!("lsn:{lsn}"));
            self.say(format!("the hole: above lsn:{} and below {before}: {}", hole.after_lsn, hole.reason))?;
        }
        let refused = match self.receiver.resolve(&self.disk, &format!("lsn:{lost}")).await {
            Err(ApiError { code: ErrorCode::PointInHole, message, .. }) => {
                self.say(format!("lsn:{lost} lies in it and is refused: {message}"))?;
                true
            }
            Err(error) => return Err(error.into()),
            Ok(_) => {
                self.say(format!("lsn:{lost} lies in it and IS OFFERED ALL THE SAME"))?;
                false
            }
        };
        Ok((holes, refused))
    }

    async fn mark(&self, label: &str) -> Result<Lsn, Failure> {
        let request =
            MarkRequest { label: label.to_owned(), disks: vec![self.disk.clone()], wait_ms: MARK_WAIT_MS };
        let report = self.agent.mark(&request).await?;
        report.marks.first().map(|mark| mark.lsn).ok_or_else(|| failed("the agent marked nothing"))
    }

    async fn durable(&self, lsn: Lsn) -> Result<(), Failure> {
        self.wait(move |disk| disk.lsn.durable >= lsn).await.map(drop)
    }

    async fn wait(&self, reached: impl Fn(&DiskStatus) -> bool) -> Result<DiskStatus, Failure> {
        wait::until(self.context, &self.agent, &self.disk, reached, Some(STEP_TIMEOUT)).await
    }

    /// A line of the story; scripts get the report only.
    fn say(&mut self, text: String) -> Result<(), Failure> {
        self.step += 1;
        if self.context.json() {
            Ok(())
        } else {
            self.context.print_line(&format!("{:>2}. {text}", self.step))
        }
    }
}

fn create_disk(path: &std::path::Path) -> Result<(), Failure> {
    let failed = |error: std::io::Error| io_failure(format_args!("create {}", path.display()), &error);
    File::create(path).and_then(|file| file.set_len(DISK.0)).map_err(failed)
}

async fn hash_of(path: PathBuf) -> Result<Hash, Failure> {
    let name = path.display().to_string();
    let hashed = tokio::task::spawn_blocking(move || {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(File::open(path)?)?;
        Ok::<_, std::io::Error>(hasher.finalize())
    });
    match hashed.await {
        Ok(Ok(hash)) => Ok(hash),
        Ok(Err(error)) => Err(io_failure(format_args!("read {name}"), &error)),
        Err(error) => Err(failed(format!("hash {name}: {error}"))),
    }
}
