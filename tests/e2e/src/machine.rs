//! A virtual machine in software: QEMU with a small Linux guest, see `guest/build` beside this crate.
//!
//! A guest that dies ends every wait for it: QEMU ends with it, and its end of the sockets closes.

use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
};

use crate::{
    Bench,
    bench::{build_directory, text},
    tools,
};

/// Where the guest is: `BACKTIDE_GUEST`, else beside what cargo builds, where `tests/run` makes it.
fn guest() -> PathBuf {
    let elsewhere = std::env::var_os("BACKTIDE_GUEST").map(PathBuf::from);
    elsewhere.unwrap_or_else(|| build_directory().parent().expect("target/PROFILE").join("guest"))
}

/// Why no guest can be run here, if none can.
pub fn cannot_boot() -> Option<&'static str> {
    if !tools::is_there("qemu-system-x86_64") {
        return Some("there is no qemu-system-x86_64, which is in the Debian package qemu-system-x86");
    }
    let built = guest().join("initramfs").exists();
    (!built).then_some("there is no guest: tests/e2e/guest/build target/guest makes it")
}

/// What a guest runs from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Root {
    /// Memory.
    Memory,
    /// Its first disk, see [`make_root`].
    FirstDisk,
}

/// Makes the ext4 that a guest runs from in an image: its own files and a directory beside them.
pub fn make_root(image: &Path, directory: &Path) {
    let beside = text(directory);
    let files = tempfile::tempdir_in(image.parent().expect("a file is in a directory"));
    let files = files.expect("make a directory");
    let root = text(files.path());
    tools::run("cp", &["-r", "--no-target-directory", &text(&guest().join("root")), &root]);
    tools::run("cp", &["-r", &beside, &root]);
    tools::run("mkfs.ext4", &["-q", "-F", "-d", &root, &text(image)]);
}

/// A running machine. Dropped, it is cut off.
pub struct Machine {
    process: tools::Beside,
    commands: Port,
    ports: Vec<Port>,
}

impl Machine {
    /// Starts a machine with these disks, raw images or URIs, and waits until the guest takes commands.
    /// Beside those it has a port for each of `ports`, in the guest `/dev/ports/NAME`.
    pub fn boot(bench: &Bench, name: &str, root: Root, disks: &[&str], ports: &[&str]) -> Self {
        Self::boot_with(bench, name, root, disks, ports, &[])
    }

    /// The same with more arguments for QEMU.
    pub fn boot_with(
        bench: &Bench,
        name: &str,
        root: Root,
        disks: &[&str],
        ports: &[&str],
        more: &[&str],
    ) -> Self {
        let console = bench.path(&format!("{name}.console"));
        let guest = guest();
        let mut arguments: Vec<String> = [
            ["-machine", "q35,accel=tcg"],
            ["-cpu", "max"],
            ["-m", "256"],
            ["-display", "none"],
            ["-device", "virtio-serial-pci"],
            ["-kernel", &text(&guest.join("vmlinuz"))],
            ["-initrd", &text(&guest.join("initramfs"))],
            ["-serial", &format!("file:{}", text(&console))],
        ]
        .concat()
        .into_iter()
        .map(str::to_owned)
        .collect();
        // A panic is an end: the guest's console says why.
        let root = if root == Root::FirstDisk { "root=/dev/vda" } else { "" };
        let append = format!("console=ttyS0 quiet panic=-1 ports={} {root}", ports.len() + 1);
        arguments.extend(["-append".to_owned(), append]);
        arguments.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(str::to_owned));
        for (nth, disk) in disks.iter().enumerate() {
            let drive = format!("if=none,id=d{nth},format=raw,discard=unmap,file={disk}");
            let device = format!("virtio-blk-pci,drive=d{nth}");
            arguments.extend(["-drive".to_owned(), drive, "-device".to_owned(), device]);
        }
        let names = [&["commands"], ports].concat();
        let listeners: Vec<UnixListener> = names
            .iter()
            .map(|port| {
                let socket = bench.path(&format!("{name}.{port}"));
                let chardev = format!("socket,id={port},path={}", text(&socket));
                let device = format!("virtserialport,chardev={port},name={port}");
                arguments.extend(["-chardev".to_owned(), chardev, "-device".to_owned(), device]);
                UnixListener::bind(socket).expect("listen for a machine")
            })
            .collect();
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).chain(more.iter().copied()).collect();
        let mut process = tools::Beside::start("qemu-system-x86_64", &arguments);
        let mut connected = listeners.iter().map(|listener| {
            let stream = accept(listener, &mut process);
            Port { stream: BufReader::new(stream), console: console.clone() }
        });
        let commands = connected.next().expect("there is a port for commands");
        let ports = connected.collect();
        let mut machine = Self { process, commands, ports };
        machine.answer("boot");
        machine
    }

    /// Has the guest run a script of one line, which must succeed; what it printed.
    pub fn run(&mut self, script: &str) -> String {
        assert!(!script.contains('\n'), "one line: {script}");
        self.commands.say(script);
        let (code, said) = self.answer(script);
        assert_eq!(code, 0, "{script}: {said}: {}", self.commands.console());
        said
    }

    /// Waits until a guest that was reset takes commands again.
    pub fn comes_up_again(&mut self) {
        self.answer("boot after a reset");
    }

    /// Takes a port out, the first that is left.
    pub fn port(&mut self) -> Port {
        self.ports.remove(0)
    }

    /// Cuts it off, as a host that loses power does.
    pub fn cut_off(self) {
        self.process.kill();
    }

    fn answer(&mut self, script: &str) -> (i32, String) {
        let line = self.commands.line();
        let fields = line.split_once(' ').and_then(|(code, length)| {
            Some((code.parse::<i32>().ok()?, length.trim().parse::<usize>().ok()?))
        });
        let (code, length) =
            fields.unwrap_or_else(|| panic!("{script}: {line:?}: {}", self.commands.console()));
        let mut said = vec![0; length];
        self.commands.stream.read_exact(&mut said).expect("read what a guest printed");
        (code, String::from_utf8_lossy(&said).into_owned())
    }
}

/// A connection with something in a guest.
pub struct Port {
    stream: BufReader<UnixStream>,
    console: PathBuf,
}

impl Port {
    /// Sends a line.
    pub fn say(&mut self, line: &str) {
        // When the guest has died, reading tells.
        let _ = writeln!(self.stream.get_mut(), "{line}");
    }

    /// Waits for a line, empty at the end of the guest.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        match self.stream.read_line(&mut line) {
            Ok(_) => line.trim_end().to_owned(),
            Err(error) => panic!("read from a guest: {error}: {}", self.console()),
        }
    }

    /// What the guest's kernel had to say.
    pub fn console(&self) -> String {
        let said = String::from_utf8_lossy(&std::fs::read(&self.console).unwrap_or_default()).into_owned();
        let lines: Vec<&str> = said.lines().collect();
        format!("the guest's console:\n{}", lines[lines.len().saturating_sub(40)..].join("\n"))
    }
}

/// Waits until the machine has connected, or has ended.
fn accept(listener: &UnixListener, process: &mut tools::Beside) -> UnixStream {
    listener.set_nonblocking(true).expect("set up a socket");
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false).expect("set up a socket");
                return stream;
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                assert!(process.runs(), "QEMU ended: {}", process.said());
                std::thread::yield_now();
            }
            Err(error) => panic!("wait for a machine: {error}"),
        }
    }
}
