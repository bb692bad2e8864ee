"""A real SLURM cluster on this machine, for tests: slurmctld, munged, N slurmd and, if asked for, slurmdbd.

As root each node is a host of its own (network, hostname, mounts, processes) on a bridge that exists only inside the
namespaces; node1 … nodeN resolve, and a node can lose power or miss a shared folder. Elsewhere all slurmd share this
machine's network and name ("loopback"): jobs run, but nodes have no addresses of their own.

    with Cluster(tmp_path / "slurm") as cluster:
        cluster.run("srun", "-N4", "hostname")

If this process dies without stop(), a watcher (this file, run as a program) takes the cluster down.
Debian or Ubuntu: apt-get install slurm-wlm munge iproute2; with accounting also slurmdbd slurm-wlm-mysql-plugin
mariadb-server.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

CLIENTS = ["sbatch", "srun", "salloc", "squeue", "sacct", "scontrol", "scancel", "sinfo", "sacctmgr"]
# not the caller's, which may lead to stubs or to the wrappers of another cluster
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CONTROLLER = "ctl"
CONTROLLER_NAMESPACES = ["--net", "--uts", "--mount"]  # clients come from outside, and need the /proc they are in
NODE_NAMESPACES = [*CONTROLLER_NAMESPACES, "--pid"]
UNSHARE_NODE = ["unshare", *NODE_NAMESPACES, "--fork", "--kill-child", "--mount-proc"]


def missing(accounting: bool = False) -> str | None:
    """Why no cluster can be started here: the commands and packages that are missing; None if it can."""
    commands = {"slurm-wlm": ["slurmctld", "slurmd", "sbatch"], "munge": ["munged"]}
    if accounting:
        commands |= {"slurmdbd": ["slurmdbd"], "mariadb-server": ["mariadbd", "mariadb-install-db"]}
    lacking = {command: package for package, names in commands.items() for command in names if not _which(command)}
    return f"no {', '.join(lacking)}: apt-get install {' '.join({*lacking.values()})}" if lacking else None


def namespaces_work() -> bool:
    """Whether this process may make hosts: namespaces with a bridge and a veth pair in them."""
    if os.geteuid() != 0 or not all(map(_which, ["ip", "unshare", "nsenter", "hostname"])):
        return False
    probe = "mount -t tmpfs tmpfs /mnt && ip link add br0 type bridge && ip link add v0 type veth peer name v1"
    command = [*UNSHARE_NODE, "bash", "-c", probe]
    return subprocess.run(command, capture_output=True, env={"PATH": SYSTEM_PATH}).returncode == 0


@dataclass
class Cluster:
    """A cluster whose nodes have as many CPUs, fake GPUs and as much memory as asked for, whatever the machine has.

    state: a folder for this cluster alone; slurm.conf and log/ stay in it after stop().
    big: nodes without slurmd in a partition of that name, for `sbatch --test-only`. Start no job there.
    extra_conf: lines for slurm.conf; a line with the key (or node or partition name) of one below replaces it.
    mode: "namespaces" or "loopback"; None takes the first where it works.
    """

    state: Path
    nodes: int = 4
    gpus: int = 2
    cpus: int = 8
    memory_mb: int = 64_000
    accounting: bool = False
    big: int = 0
    extra_conf: str = ""
    mode: str | None = None

    def __post_init__(self) -> None:
        self.state = Path(self.state).resolve()
        self.mode = self.mode or ("namespaces" if namespaces_work() else "loopback")
        self.bin, self.log, self.conf = self.state / "bin", self.state / "log", self.state / "slurm.conf"
        self.names = [f"node{k}" for k in range(1, self.nodes + 1)]
        self._user = pwd.getpwuid(os.geteuid()).pw_name
        # start() links this to a short path in /tmp: the path of a unix socket ends at 107 characters
        self._run = self._link = self.state / "sockets"
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._hosts: dict[str, int] = {}  # name: PID of the process that holds its namespaces, PID 1 of a node
        self._watcher: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Cluster:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, timeout: float = 30) -> Cluster:
        """Bring the cluster up and wait until all nodes are idle; on failure raise with the ends of the logs."""
        if why := missing(self.accounting):
            raise RuntimeError(why)
        self.stop()  # leftovers, should even the watcher have been killed
        for folder in (self.bin, self.log, self.state / "save", self.state / "dev", self.state / "mysql"):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        self._run = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self._run.chmod(0o755)  # munged insists: others may reach its socket, but not write beside it
        self._link.symlink_to(self._run)
        watch = [sys.executable, "-IS", __file__, str(self.state)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._watcher = subprocess.Popen(watch, stdin=subprocess.PIPE, start_new_session=True, **quiet)
        try:
            self._write_configuration()
            self._start_munge()
            if self.mode == "namespaces":
                self._start_hosts([CONTROLLER, *self.names])
            self._write_clients()
            if self.accounting:
                self._start_accounting()
            self._spawn("slurmctld", *self._enter(CONTROLLER), "slurmctld", "-D")
            self._until("slurmctld answers", timeout, lambda: "is UP" in self._output("scontrol", "ping", check=False))
            for node in self.names:
                self._start_slurmd(node)
            self.wait_idle(timeout)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Kill all processes of the cluster (nothing is worth saving), and with them the namespaces. Logs stay."""
        deadline = time.monotonic() + 10
        while (found := self._find_processes()) and time.monotonic() < deadline:
            for pid in found:
                _kill(pid)
            time.sleep(0.01)
        for process in self._processes.values():
            process.communicate()
        self._hosts, self._processes = {}, {}
        if self._link.is_symlink():
            shutil.rmtree(self._link.resolve(), ignore_errors=True)
            self._link.unlink()
        shutil.rmtree(self.bin, ignore_errors=True)  # its wrappers hold a PID that may come to be another's
        if self._watcher:
            self._watcher.kill()
            self._watcher.communicate()

    def _find_processes(self) -> list[int]:
        """All that has our slurm.conf in its environment (daemons, jobs, waiting clients) and what descends from it.

        slurmstepd outlives slurmd and starts a session of its own, so parents and sessions do not tell in loopback.
        """
        mark, parents, marked = f"SLURM_CONF={self.conf}".encode(), {}, set()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # gone, or another user's
                parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
                if mark in (process / "environ").read_bytes().split(b"\0"):
                    marked.add(int(process.name))

        def line(pid: int) -> set[int]:
            return {pid} | line(parents[pid]) if pid in parents else set()

        marked -= line(os.getpid())
        return [pid for pid in parents if line(pid) & marked]

    def env(self) -> dict[str, str]:
        """os.environ in which sbatch and the like lead to this cluster."""
        return {**os.environ, "PATH": f"{self.bin}:{os.environ.get('PATH', '')}", "SLURM_CONF": str(self.conf)}

    def run(
        self, *argv: str | Path, node: str | None = None, check: bool = True, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command with env(), on a node if named; `options` are subprocess.run's.

        Raises:
            RuntimeError: it fails (unless `check` is False), or the cluster is not up.
        """
        if not self.bin.exists():
            raise RuntimeError(f"{shlex.join(map(str, argv))}: the cluster is not up")
        if "input" not in options:
            options.setdefault("stdin", subprocess.DEVNULL)  # srun would read ours
        options = {"env": self.env(), "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
        enter = self._enter(node, options.get("cwd")) if node else []
        done = subprocess.run([*enter, *map(str, argv)], **options)
        if check and done.returncode:
            output = f"{done.stdout or ''}{done.stderr or ''}"
            raise RuntimeError(f"{shlex.join(map(str, argv))}: status {done.returncode}\n{output}")
        return done

    def idle(self) -> bool:
        """Whether every node answers and runs nothing."""
        command = ["sinfo", "--noheader", "--Node", "--partition=debug", "--format=%t"]
        return self._output(*command, check=False).split() == ["idle"] * self.nodes  # "idle*" does not answer

    def wait_idle(self, timeout: float = 30) -> None:
        self._until("all nodes are idle", timeout, self.idle)

    def crash(self, node: str) -> None:
        """Power loss: the node's processes and its network are gone. slurmctld notices after 20 to 30 s."""
        self._need_host(node)
        _kill(self._hosts.pop(node))
        self._processes.pop(node).communicate()
        with contextlib.suppress(subprocess.CalledProcessError):  # the link goes by itself too, but maybe after boot()
            self._ip(f"link del v-{node}")

    def cut(self, node: str) -> None:
        """Its cable is pulled: the node's processes go on, and reach nobody."""
        self._need_host(node)
        self._ip(f"link set v-{node} down")

    def reconnect(self, node: str) -> None:
        """The cable is back. slurmctld asks a node that it took for down again only after minutes, so it is told."""
        self._ip(f"link set v-{node} up")
        self._output("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)

    def restart_controller(self, away: float = 5) -> None:
        """slurmctld is killed, and started again after `away` seconds."""
        process = self._processes.pop("slurmctld")
        process.kill()
        process.wait()
        time.sleep(away)
        self._spawn("slurmctld", *self._enter(CONTROLLER), "slurmctld", "-D")

    def kill_slurmd(self, node: str) -> None:
        """Only slurmd dies; the steps on the node go on."""
        if node in self._hosts:
            self._tell(node, "kill -KILL $slurmd; wait $slurmd; true")
        else:
            process = self._processes.pop(node)
            process.kill()
            process.wait()

    def boot(self, node: str) -> None:
        """Start a crashed node again (its jobs end or are requeued), or slurmd again after kill_slurmd()."""
        if self.mode == "namespaces" and node not in self._hosts:
            # what slurmctld does when a node's boot time is new, which it is not here: the machine has been up
            self._output("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=rebooted")
            self._start_hosts([node])
        self._start_slurmd(node)

    def mount_over(self, node: str, path: Path) -> None:
        """Put an empty tmpfs over `path` on one node: a shared file system that is not mounted there."""
        self._need_host(node)
        if self.state.is_relative_to(path) or self._run.is_relative_to(path):
            raise ValueError(f"{path} holds the cluster's own files")
        self._tell(node, f"mount -t tmpfs tmpfs {quote(str(path))}")

    def unmount(self, node: str, path: Path) -> None:
        """Take away what mount_over() put there. No process may be using it."""
        self._need_host(node)
        self._tell(node, f"umount {quote(str(path))}")

    def _write_configuration(self) -> None:
        if self.mode == "namespaces":
            host, address, ports = CONTROLLER, _address(CONTROLLER), [6817, 6819, *[6818] * self.nodes]
            where = ""
            hosts = ["127.0.0.1 localhost", *(f"{_address(name)} {name}" for name in [CONTROLLER, *self.names])]
            (self.state / "hosts").write_text("\n".join(hosts) + "\n")
            (self.state / "nsswitch.conf").write_text("hosts: files\n")  # no DNS to wait on
        else:
            host, address, ports = socket.gethostname().split(".")[0], "127.0.0.1", _free_ports(2 + self.nodes)
            where = f"NodeAddr=127.0.0.1 NodeHostname={host}"
        lines = f"""
            ClusterName=test
            SlurmctldHost={host}({address})
            SlurmctldPort={ports[0]}
            SlurmUser={self._user}
            SlurmdUser={self._user}
            AuthType=auth/munge
            # one munged for all hosts: a unix socket is a path, and crosses network namespaces
            AuthInfo=socket={self._run}/munge.sock
            StateSaveLocation={self.state}/save
            # slurmstepd has its sockets here
            SlurmdSpoolDir={self._run}/spool/%n
            SlurmctldPidFile={self._run}/slurmctld.pid
            SlurmdPidFile={self._run}/slurmd.%n.pid
            SlurmdLogFile={self.log}/slurmd.%n.log
            # no cgroups: there is no systemd here to make them
            ProctrackType=proctrack/linuxproc
            TaskPlugin=task/none
            JobAcctGatherType=jobacct_gather/linux
            MpiDefault=none
            # nodes have more CPUs and memory than the machine
            SlurmdParameters=config_overrides
            SelectType=select/cons_tres
            SelectTypeParameters=CR_CPU
            GresTypes=gpu
            # else nodes in State=CLOUD are hidden
            PrivateData=cloud
            # refuse what is over a partition's limits, where the default lets it wait for ever
            EnforcePartLimits=ALL
            # a node that comes back is used again, whyever it was down
            ReturnToService=2
            PreemptType=preempt/partition_prio
            PreemptMode=REQUEUE
            # --signal's signal at preemption too
            SlurmctldParameters=preempt_send_user_signal
            # schedule at once: the defaults wait for seconds
            SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,sched_interval=2,bf_interval=1
            SlurmdTimeout=20
            MessageTimeout=10
            TCPTimeout=2
            KillWait=3
            UnkillableStepTimeout=20
            # ended jobs stay in squeue --states=all and scontrol
            MinJobAge=3600
            NodeName=DEFAULT CPUs={self.cpus} RealMemory={self.memory_mb} {f"Gres=gpu:{self.gpus}" if self.gpus else ""}
            PartitionName=DEFAULT Nodes=node[1-{self.nodes}] DefaultTime=60 MaxTime=INFINITE PriorityTier=5
            PartitionName=debug Default=YES
            PartitionName=short DefaultTime=5 MaxTime=5
            PartitionName=low PriorityTier=1
            PartitionName=high PriorityTier=10 PreemptMode=OFF
            PartitionName=spot PriorityTier=1 GraceTime=8
        """.splitlines()
        lines += [f"NodeName={name} Port={port} {where}" for name, port in zip(self.names, ports[2:], strict=True)]
        if self.big:  # of the nodes without slurmd only CLOUD ones are taken for free, and their address must resolve
            lines += [f"NodeName=big[1-{self.big}] NodeAddr=127.0.0.1 Port=9 State=CLOUD"]
            lines += [f"PartitionName=big Nodes=big[1-{self.big}]"]
        if self.accounting:
            lines += ["AccountingStorageType=accounting_storage/slurmdbd", "AccountingStorageTRES=gres/gpu"]
            lines += [f"AccountingStorageHost={address}", f"AccountingStoragePort={ports[1]}"]
            lines += [f"AccountingStoragePass={self._run}/munge.sock"]  # slurmdbd's clients do not read AuthInfo
            dbd = f"AuthType=auth/munge\nAuthInfo=socket={self._run}/munge.sock\nSlurmUser={self._user}\n"
            dbd += f"DbdHost={host}\nDbdAddr={address}\nDbdPort={ports[1]}\nPidFile={self._run}/slurmdbd.pid\n"
            dbd += f"StorageType=accounting_storage/mysql\nStorageHost=localhost\nStorageUser={self._user}\n"
            _write_private(self.state / "slurmdbd.conf", dbd.encode())
        # one line a key, the last one: clients complain of a key that is there twice
        lines = [line.strip() for line in (*lines, *self.extra_conf.splitlines()) if line.strip()]
        key = re.compile(r"(NodeName|PartitionName)=\S+|#.*|\w+")
        self.conf.write_text("\n".join({key.match(line)[0]: line for line in lines}.values()) + "\n")
        # A GPU needs a File: Count alone gives none. One File cannot stand for several, but links to one device can.
        for k in range(self.gpus):
            (self.state / "dev" / f"nvidia{k}").symlink_to("/dev/null")
        gres = f"Name=gpu File={self.state}/dev/nvidia[0-{self.gpus - 1}]\n" if self.gpus else ""
        (self.state / "gres.conf").write_text(gres)
        # slurmd loads a cgroup plugin in any case, and v2 wants dbus. v1 wants nothing until it is used; 23.02 has none
        version = [int(number) for number in re.findall(r"\d+", self._output("slurmctld", "-V"))[:2]]
        plugin = "disabled" if version >= [23, 2] else "cgroup/v1"
        (self.state / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")

    def _write_clients(self) -> None:
        """Wrappers that enter the controller's host, unless they run on a host: those have our hosts file."""
        enter = ""
        if self.mode == "namespaces":
            nsenter = f"nsenter --target={self._hosts[CONTROLLER]} {' '.join(CONTROLLER_NAMESPACES)}"
            enter = f'[ /etc/hosts -ef {quote(f"{self.state}/hosts")} ] || set -- {nsenter} env -C "$PWD" "$@"\n'
        for client in filter(_which, CLIENTS):
            script = f'#!/bin/sh\nexport SLURM_CONF={quote(str(self.conf))}\nset -- {_which(client)} "$@"\n'
            (self.bin / client).write_text(f'{script}{enter}exec "$@"\n')
            (self.bin / client).chmod(0o755)

    def _start_munge(self) -> None:
        _write_private(self._run / "munge.key", os.urandom(128))
        files = {"socket": "munge.sock", "key-file": "munge.key", "seed-file": "munge.seed", "pid-file": "munge.pid"}
        self._spawn("munged", "munged", "--foreground", *(f"--{k}={self._run}/{v}" for k, v in files.items()))
        self._until("munged listens", 10, (self._run / "munge.sock").exists)

    def _start_accounting(self) -> None:
        """MariaDB on a unix socket that knows us by our user, so no password; slurmdbd makes its tables itself."""
        sock, enter = f"{self._run}/mysql.sock", self._enter(CONTROLLER)
        if self.mode == "namespaces":  # fsync on a disk is most of the time that a new database takes
            self._tell(CONTROLLER, f"mount -t tmpfs tmpfs {quote(f'{self.state}/mysql')}")
        options = ["--no-defaults", f"--datadir={self.state}/mysql", f"--user={self._user}"]
        options += ["--innodb-log-file-size=16M", "--innodb-flush-log-at-trx-commit=0", "--innodb-doublewrite=0"]
        install = ["mariadb-install-db", *options, f"--auth-root-socket-user={self._user}", "--skip-test-db"]
        self._output(*enter, *install)
        server = ["mariadbd", *options, f"--socket={sock}", "--skip-networking", f"--pid-file={self._run}/mysql.pid"]
        self._spawn("mariadbd", *enter, *server, "--innodb-buffer-pool-size=64M")
        self._until("mariadbd listens", 20, Path(sock).exists)
        self._spawn("slurmdbd", *enter, "slurmdbd", "-D", MYSQL_UNIX_PORT=sock)
        self._until("slurmdbd answers", 20, lambda: "started" in (self.log / "slurmdbd.log").read_text())
        self._output("sacctmgr", "-i", "add", "cluster", "test")  # before slurmctld, which gives up else

    def _start_slurmd(self, node: str) -> None:
        (self._run / "spool" / node).mkdir(parents=True, exist_ok=True)
        command = ["slurmd", "-D", "-N", node]
        if self.mode == "loopback":
            self._spawn(node, *command)
        else:  # bash starts a background command with SIGINT ignored, and the jobs would inherit that
            command = ["env", "--default-signal=INT,QUIT", *command]
            self._tell(node, f"{shlex.join(command)} >>{quote(f'{self.log}/{node}.log')} 2>&1 & slurmd=$!")

    def _start_hosts(self, names: list[str]) -> None:
        """A bash that reads commands from us holds the namespaces; as PID 1 of a node it reaps orphans too."""
        for name in names:
            unshare = ["unshare", *CONTROLLER_NAMESPACES] if name == CONTROLLER else UNSHARE_NODE
            self._spawn(name, *unshare, "bash", pipe=True)
        binds = [f"mount --bind {quote(f'{self.state}/{f}')} /etc/{f}" for f in ("hosts", "nsswitch.conf")]
        for name in names:
            # shared memory of its own: nothing may work between nodes that would not elsewhere
            self._tell(name, " && ".join([f"hostname {name}", *binds, "mount -t tmpfs -o size=1g tmpfs /dev/shm"]))
            pid = self._processes[name].pid
            self._hosts[name] = pid if name == CONTROLLER else int(Path(f"/proc/{pid}/task/{pid}/children").read_text())
            card = "br0" if name == CONTROLLER else "eth0"
            if name == CONTROLLER:
                self._ip("link add br0 type bridge")
            else:
                # the same hardware address after a boot: the other nodes remember it
                mac = "02:00:" + ":".join(f"{int(part):02x}" for part in _address(name).split("."))
                peer = f"peer name eth0 address {mac} netns {self._hosts[name]}"
                self._ip(f"link add v-{name} type veth {peer}", f"link set v-{name} master br0 up")
            up = [f"addr add {_address(name)}/16 dev {card}", f"link set {card} up", "link set lo up"]
            self._tell(name, " && ".join(f"ip {command}" for command in up))

    def _spawn(self, name: str, *argv: str, pipe: bool = False, **env: str) -> None:
        """Start a daemon, in a session of its own: Ctrl-C must not reach it before stop() does."""
        with (self.log / f"{name}.log").open("a") as log:
            self._processes[name] = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE if pipe else subprocess.DEVNULL,
                stdout=subprocess.PIPE if pipe else log,
                stderr=log,
                env={**self._daemon_env(), **env},
                start_new_session=True,
                text=True,
            )

    def _tell(self, host: str, command: str) -> None:
        """Have the host's bash run a command, and wait for it."""
        process = self._processes[host]
        process.stdin.write(f"{command}\necho $?\n")
        process.stdin.flush()
        if process.stdout.readline() != "0\n":
            raise RuntimeError(f"{host}: {command} failed\n{self._log_ends()}")

    def _ip(self, *commands: str) -> None:
        """`ip` commands in the controller's network, where the bridge is."""
        argv = ["nsenter", f"--net=/proc/{self._hosts[CONTROLLER]}/ns/net", "ip", "-batch", "-"]
        options = {"text": True, "env": self._daemon_env(), "capture_output": True, "check": True}
        subprocess.run(argv, input="\n".join(commands), **options)

    def _enter(self, host: str, cwd: str | Path | None = None) -> list[str]:
        """The words before a command that have it run on a host, in the same folder."""
        if self.mode == "loopback":
            return []
        spaces = CONTROLLER_NAMESPACES if host == CONTROLLER else NODE_NAMESPACES
        return ["nsenter", f"--target={self._hosts[host]}", *spaces, "env", f"--chdir={Path(cwd or '.').resolve()}"]

    def _need_host(self, node: str) -> None:
        if node not in self._hosts:
            raise RuntimeError(f"{node} is no host of its own, or is down (mode {self.mode})")

    def _daemon_env(self) -> dict[str, str]:
        return {"PATH": f"{self.bin}:{SYSTEM_PATH}", "SLURM_CONF": str(self.conf)}

    def _output(self, *argv: str, check: bool = True) -> str:
        """What a command prints, errors too."""
        return self.run(*argv, check=check, env=self._daemon_env(), stderr=subprocess.STDOUT).stdout

    def _until(self, what: str, timeout: float, test: Callable[[], bool]) -> None:
        deadline = time.monotonic() + timeout
        while not test():
            dead = [name for name, process in self._processes.items() if process.poll() is not None]
            if dead or time.monotonic() > deadline:
                why = f"{', '.join(dead)} ended" if dead else f"not in {timeout} s"
                raise TimeoutError(f"{what}: {why}\n{self._log_ends()}")
            time.sleep(0.03)

    def _log_ends(self) -> str:
        logs = {file.name: file.read_text(errors="replace").splitlines() for file in sorted(self.log.glob("*.log"))}
        return "\n".join(f"{name}: {line}" for name, lines in logs.items() for line in lines[-4:])


def _which(command: str) -> str | None:
    return shutil.which(command, path=SYSTEM_PATH)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def _address(name: str) -> str:
    k = 0 if name == CONTROLLER else int(name.removeprefix("node"))
    return f"10.77.{1 + k // 250}.{1 + k % 250}"


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [s.getsockname()[1] for s in sockets]


def _write_private(path: Path, content: bytes) -> None:
    """Write a file that only we may read, as munged and slurmdbd insist."""
    path.touch()
    path.chmod(0o600)
    path.write_bytes(content)


if __name__ == "__main__":  # the watcher: its stdin ends when the process that started the cluster does
    sys.stdin.read()
    Cluster(Path(sys.argv[1]), mode="loopback").stop()
