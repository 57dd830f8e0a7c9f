"""Ceph's S3 server for the slow tests: one monitor, one OSD on a file and one radosgw, all on loopback.

Unlike moto it checks signatures and checksums, keeps what it has acknowledged, and takes many writers at once. The programs are
those that are installed, else Debian's packages, which apt-get fetches and dpkg unpacks into `runs/ceph` once (69 MB, 260 MB
unpacked; 5-10 s): that needs no root and installs nothing.

The kernel kills a server's processes with the thread that has started them: so start servers, and killed parts of them again,
from the main thread. A server takes 15 s to start, up to 3 s to start a part again, and 0.2 GB.
"""

import os
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from tests.places import ROOT

PROGRAMS = ("ceph", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
PACKAGES = ("ceph-mon", "ceph-osd", "radosgw")
UNPACKED = ROOT / "runs" / "ceph"
START_S = 120

Daemon = Literal["ceph-mon", "ceph-osd", "radosgw"]

CONFIGURATION = """
[global]
fsid = {fsid}
mon_host = v1:127.0.0.1:{mon_port}
mon_initial_members = a
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_msgr2 = false
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
admin_socket =
run_dir = {folder}
log_file = {folder}/log
mon_cluster_log_file = {folder}/log
crash_dir = {folder}
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 2
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
mon_data_avail_crit = 1
osd_class_dir = {libraries}/rados-classes
erasure_code_dir = {libraries}/ceph/erasure-code
plugin_dir = {libraries}/ceph
[mon.a]
mon_data = {folder}/mon
[osd.0]
osd_data = {folder}/osd
osd_objectstore = bluestore
osd_class_update_on_start = false
osd_crush_update_on_start = false
osd_memory_target = 939524096
bluestore_block_create = true
bluestore_block_size = 8589934592
bluestore_cache_autotune = false
bluestore_cache_size = 134217728
[client.rgw]
rgw_frontends = beast endpoint=127.0.0.1:{port}
rgw_data = {folder}/rgw
rgw_cache_enabled = false
rgw_enable_usage_log = false
"""


def programs() -> Path:
    """The folder that Ceph's programs and libraries lie in as below `/`: `/` itself where they are installed."""
    if all(map(shutil.which, PROGRAMS)):
        return Path("/")
    if not UNPACKED.is_dir():
        UNPACKED.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=UNPACKED.parent, prefix="ceph-") as folder:
            unpacked = _fetched(Path(folder))
            try:
                os.rename(unpacked, UNPACKED)
            except OSError:
                if not UNPACKED.is_dir():  # no other run was first
                    raise
    return UNPACKED


def _fetched(folder: Path) -> Path:
    """Debian's packages of Ceph, with what they need and this machine lacks, unpacked below a folder."""
    for name in ("lists/partial", "archives/partial", "unpacked"):
        (folder / name).mkdir(parents=True)
    places = {"Dir::State::lists": folder / "lists", "Dir::Cache": folder, "Debug::NoLocking": 1, "APT::Sandbox::User": ""}
    apt = ["apt-get", "--quiet", "--yes", *(f"-o{name}={value}" for name, value in places.items())]
    _install(*apt, "update")
    _install(*apt, "install", "--no-install-recommends", "--download-only", *PACKAGES)
    for package in sorted((folder / "archives").glob("*.deb")):
        _install("dpkg", "-x", str(package), str(folder / "unpacked"))
    return folder / "unpacked"


def _install(*command: str) -> None:
    cause = f"{command[0]} is not there"
    if shutil.which(command[0]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        if done.returncode == 0:
            return
        cause = f"`{' '.join(command)}` fails:\n{done.stdout[-2000:]}"
    needed = f"install {', '.join(PACKAGES)}, or run them where apt-get reaches Debian's packages"
    pytest.fail(f"These tests need Ceph: {needed}; {cause}", pytrace=False)


class Ceph:
    """A server with data of its own in a folder; `url` speaks S3. A daemon that was killed finds its data when started again."""

    def __init__(self, folder: Path, access_key: str, secret_key: str) -> None:
        self._root, self._folder = programs(), folder
        self._running: dict[Daemon, subprocess.Popen[bytes]] = {}
        libraries = next(self._root.glob("usr/lib/*/rados-classes")).parent
        paths = [self._root / "lib" / libraries.name, libraries, libraries / "ceph", self._root / "usr/lib"]
        self._environment = os.environ | {
            "CEPH_CONF": str(folder / "ceph.conf"),
            "LD_LIBRARY_PATH": ":".join(map(str, paths)),
            "PATH": f"{self._root}/usr/bin:{os.environ['PATH']}",
            "PYTHONPATH": f"{self._root}/usr/lib/python3/dist-packages",
        }
        self._port, self._mon_port = _free_ports(2)
        self.url = f"http://127.0.0.1:{self._port}"
        self._osd = str(uuid.uuid4())
        try:
            self._make(libraries, access_key, secret_key)
        except BaseException:
            self.close()
            raise

    def _make(self, libraries: Path, access_key: str, secret_key: str) -> None:
        values = {"folder": self._folder, "libraries": libraries, "port": self._port, "mon_port": self._mon_port}
        fsid = str(uuid.uuid4())
        (self._folder / "ceph.conf").write_text(CONFIGURATION.format(fsid=fsid, **values))
        for name in ("mon", "osd", "rgw"):
            (self._folder / name).mkdir()
        monitors = str(self._folder / "monmap")
        self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v1:127.0.0.1:{self._mon_port}]", monitors)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monitors)
        self.start("ceph-mon")
        self._ceph("osd", "new", self._osd)
        self._ceph("osd", "crush", "add", "osd.0", "1", "root=default", "host=here")
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", self._osd)
        self.start("ceph-osd")
        self.start("radosgw")
        keys = [f"--access-key={access_key}", f"--secret={secret_key}"]
        self._run("radosgw-admin", "-n", "client.rgw", "user", "create", "--uid=test", "--display-name=test", *keys)

    def start(self, daemon: Daemon) -> None:
        """Starts a daemon that does not run, and waits until it answers. From the main thread."""
        assert daemon not in self._running
        if daemon == "ceph-osd":
            self._ceph("osd", "down", "0")  # else one that was killed passes for running
        identity = {"ceph-mon": ["-i", "a"], "ceph-osd": ["-i", "0"], "radosgw": ["-n", "client.rgw"]}[daemon]
        command = ["setpriv", "--pdeathsig", "KILL", self._program(daemon), "-f", *identity]
        with (self._folder / "said").open("ab") as said:
            self._running[daemon] = subprocess.Popen(command, stdout=said, stderr=said, env=self._environment)
        answers: dict[Daemon, Callable[[], bool]] = {
            "ceph-mon": lambda: self._try("mon", "stat").returncode == 0,
            "ceph-osd": lambda: b'"num_up_osds":1' in self._try("osd", "stat", "-f", "json").stdout,
            "radosgw": self._serves,
        }
        until = time.monotonic() + START_S
        while not answers[daemon]():
            if self._running[daemon].poll() is not None or time.monotonic() > until:
                pytest.fail(f"Ceph's {daemon} does not start:\n{self._said()}", pytrace=False)
            time.sleep(0.1)

    def kill(self, daemon: Daemon) -> None:
        """SIGKILL: whatever it had not written is lost."""
        process = self._running.pop(daemon)
        process.kill()
        process.wait()

    def close(self) -> None:
        """Kills what runs and removes the data."""
        for daemon in list(self._running):
            self.kill(daemon)
        shutil.rmtree(self._folder)

    def _serves(self) -> bool:
        try:
            with urlopen(self.url, timeout=10) as answer:
                return answer.status == 200
        except (URLError, OSError):
            return False

    def _program(self, name: str) -> str:
        found = shutil.which(name, path=self._environment["PATH"])
        assert found, name
        return found

    def _run(self, *command: str) -> None:
        self._check(command, self._done([self._program(command[0]), *command[1:]]))

    def _ceph(self, *command: str) -> None:
        self._check(["ceph", *command], self._try(*command))

    def _check(self, command: Sequence[str], done: "subprocess.CompletedProcess[bytes]") -> None:
        if done.returncode:
            said = (done.stdout + done.stderr).decode(errors="replace")[-2000:]
            pytest.fail(f"Ceph's `{' '.join(command)}` fails:\n{said}{self._said()}", pytrace=False)

    def _try(self, *command: str) -> "subprocess.CompletedProcess[bytes]":
        """Ceph's own command line, which needs the Python that it was built for: the system's."""
        python = next(each for each in (Path("/usr/bin/python3"), self._root / "usr/bin/python3") if each.exists())
        return self._done([str(python), self._program("ceph"), "--connect-timeout", "20", *command])

    def _done(self, command: Sequence[str]) -> "subprocess.CompletedProcess[bytes]":
        return subprocess.run(command, capture_output=True, env=self._environment, timeout=START_S)

    def _said(self) -> str:
        files = (self._folder / name for name in ("said", "log"))
        return "".join(f"{file.name}: {file.read_text(errors='replace')[-3000:]}\n" for file in files if file.exists())


def _free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
