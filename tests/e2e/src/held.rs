//! An agent behind its holder, and a guest that reconnects.

use std::path::Path;

use crate::{Bench, Daemon, tools};

/// A holder and the agent it looks after. Dropped, both are killed.
pub struct Held {
    /// The holder.
    pub holder: Option<Daemon>,
}

impl Held {
    /// Starts both.
    pub fn start(bench: &Bench) -> Self {
        Self { holder: Some(bench.daemon(&["agent", "run", "--hold"])) }
    }

    /// The same, for a story in which the agent dies.
    pub fn dying(bench: &Bench) -> Self {
        let mut held = Self::start(bench);
        held.holder.as_mut().expect("it runs").may_complain("the agent has died");
        held
    }

    /// The holder.
    pub fn holder(&self) -> &Daemon {
        self.holder.as_ref().expect("it runs")
    }

    /// The process of the agent, if there is one at this moment.
    pub fn agent(&self) -> Option<u32> {
        child_of(self.holder().id())
    }

    /// Kills the agent with `kill -9`.
    pub fn kill_agent(&self) {
        loop {
            // Between two agents there may be none for a moment.
            let Some(id) = self.agent() else { continue };
            if tools::try_run("kill", &["-s", "KILL", &id.to_string()]).0 {
                return;
            }
        }
    }

    /// Asks the holder to end; its exit code.
    pub fn stop(mut self) -> i32 {
        self.holder.take().expect("it runs").stop()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let Some(holder) = self.holder.take() else { return };
        // A holder that stands still starts no other.
        holder.signal("STOP");
        if let Some(agent) = child_of(holder.id()) {
            tools::try_run("kill", &["-s", "KILL", &agent.to_string()]);
        }
    }
}

fn child_of(parent: u32) -> Option<u32> {
    let processes = std::fs::read_dir("/proc").expect("read /proc");
    let ids = processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    ids.into_iter().find(|id| {
        let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
        let mut fields = stat.rsplit(") ").next().unwrap_or_default().split_whitespace();
        let state = fields.next();
        state != Some("Z") && fields.next().and_then(|id| id.parse().ok()) == Some(parent)
    })
}

/// A `qemu-storage-daemon` between a guest and an export: a client that reconnects, as QEMU does.
pub struct Reconnecting {
    _daemon: tools::Beside,
    /// Where the guest is served.
    pub uri: String,
}

impl Reconnecting {
    /// In front of the export of a disk at the unix socket `socket`.
    pub fn before(bench: &Bench, disk: &str, socket: &Path) -> Self {
        let own = bench.name(&format!("{disk}.qsd"));
        let node = format!(
            "driver=nbd,node-name=disk,server.type=unix,server.path={},export={disk},reconnect-delay=600",
            socket.display()
        );
        let server = format!("addr.type=unix,addr.path={own}");
        let export = "type=nbd,id=disk,node-name=disk,name=disk,writable=on";
        let arguments = ["--blockdev", &node, "--nbd-server", &server, "--export", export];
        let daemon = tools::Beside::start("qemu-storage-daemon", &arguments);
        tools::wait_for_socket(own.as_ref());
        Self { _daemon: daemon, uri: format!("nbd+unix:///disk?socket={own}") }
    }
}
