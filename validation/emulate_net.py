"""Small networks on this machine: a namespace for each host, bridges in one more, rates by token buckets.

Everything lives in namespaces of its own, so the machine's own network is never touched and removing the namespaces
removes all of it. They are named parplan-PID-...; those of a run that was killed are removed by the next one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

PREFIX = "parplan-"
# What a host's TCP is told, so that neither congestion control nor buffers decide how flows share a port: windows grow
# as long as nothing is lost (reno is in every kernel), sockets take whole messages, and what one of them puts into the
# queue of its own host is bounded by bytes (two packets) rather than by the rate that TCP believes in.
TCP = {
    "tcp_congestion_control": "reno",
    "tcp_slow_start_after_idle": "0",
    "tcp_wmem": f"4096 {2**25} {2**25}",
    "tcp_rmem": f"4096 {2**25} {2**25}",
    "tcp_limit_output_bytes": "32768",
}
BURST = 16384  # bytes that a bucket lets through at once; above the largest packet (GSO_BYTES), so none is cut up
GSO_BYTES = 15000
QUEUE = 64_000_000  # bytes that wait at a port before any is dropped: more than all messages of a test together
# TCP payload of a full Ethernet frame as the bucket counts it: 1500 bytes of IP of which 52 are headers (timestamps
# on), and 14 of Ethernet. Arithmetic, not fitted.
PAYLOAD = 1448 / 1514


@dataclass(frozen=True, slots=True)
class Network:
    """bridges: the bridge that each host hangs on. ranks_per_host: ranks that share a host and its wire.
    trunk: rate of the wire between bridges over that of a host's wire (full duplex both)."""

    name: str
    bridges: tuple[int, ...]
    ranks_per_host: int = 1
    trunk: float = 1.0

    @property
    def ranks(self) -> int:
        return len(self.bridges) * self.ranks_per_host


NETWORKS = (
    Network("pair", (0, 0)),
    Network("star", (0, 0, 0, 0)),
    Network("two-level", (0, 0, 1, 1)),  # two bridges, a trunk as fast as one host: 1:2 oversubscribed
    Network("shared-nic", (0, 0), ranks_per_host=2),
)


def why_not() -> str:
    """What is missing to emulate networks here; empty where nothing is."""
    if not shutil.which("ip") or not shutil.which("tc"):
        return "emulated networks need the commands ip and tc; install them (Debian: apt-get install iproute2)"
    if os.geteuid() != 0:
        return "emulated networks need root to make network namespaces; run as root or in a privileged container"
    probe = f"{PREFIX}{os.getpid()}-probe"
    try:
        _run("ip", "netns", "add", probe)
        _run("ip", "-n", probe, "link", "add", "name", "end0", "type", "veth", "peer", "name", "end1")
        _run("tc", "-n", probe, "qdisc", "add", "dev", "end0", "root", *_bucket(1e7))
    except RuntimeError as error:
        return f"emulated networks are not allowed here: {error}"
    finally:
        subprocess.run(["ip", "netns", "del", probe], capture_output=True)
    return ""


@contextmanager
def emulated(network: Network) -> Iterator[list[str]]:
    """Makes the network, unshaped; yields the namespace of each host; removes everything on every way out."""
    remove_stale()
    base = f"{PREFIX}{os.getpid()}-"
    switch = f"{base}sw"
    hosts = [f"{base}h{i}" for i in range(len(network.bridges))]
    try:
        _run("ip", "netns", "add", switch)
        for bridge in sorted(set(network.bridges)):
            _run("ip", "-n", switch, "link", "add", "name", f"br{bridge}", "type", "bridge")
            _run("ip", "-n", switch, "link", "set", f"br{bridge}", "up")
        for i, host in enumerate(hosts):
            _plug(switch, host, i, network.bridges[i])
        for bridge in sorted(set(network.bridges))[1:]:
            near, far = f"t0-{bridge}", f"t{bridge}-0"
            _run("ip", "-n", switch, "link", "add", "name", near, "type", "veth", "peer", "name", far)
            for end, at in ((near, 0), (far, bridge)):
                _run("ip", "-n", switch, "link", "set", end, "gso_max_size", str(GSO_BYTES), "master", f"br{at}", "up")
        yield hosts
    finally:
        for name in (*hosts, switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _plug(switch: str, host: str, i: int, bridge: int) -> None:
    _run("ip", "netns", "add", host)
    _run("ip", "-n", switch, "link", "add", "name", f"h{i}", "type", "veth", "peer", "name", "eth0", "netns", host)
    _run("ip", "-n", switch, "link", "set", f"h{i}", "gso_max_size", str(GSO_BYTES), "master", f"br{bridge}", "up")
    _run("ip", "-n", host, "addr", "add", f"10.231.7.{i + 1}/24", "dev", "eth0")
    _run("ip", "-n", host, "link", "set", "eth0", "gso_max_size", str(GSO_BYTES), "up")
    _run("ip", "-n", host, "link", "set", "lo", "up")
    settings = "; ".join(f"echo {value} > /proc/sys/net/ipv4/{name}" for name, value in TCP.items())
    _run("ip", "netns", "exec", host, "sh", "-ec", settings)


def shape(network: Network, hosts: list[str], rate: float) -> None:
    """Every wire of a host at `rate` bytes/s in both directions, the trunks at their share of it."""
    switch = hosts[0].rsplit("-", 1)[0] + "-sw"
    for i, host in enumerate(hosts):
        _run("tc", "-n", host, "qdisc", "replace", "dev", "eth0", "root", *_bucket(rate))
        _run("tc", "-n", switch, "qdisc", "replace", "dev", f"h{i}", "root", *_bucket(rate))
    for bridge in sorted(set(network.bridges))[1:]:
        for end in (f"t0-{bridge}", f"t{bridge}-0"):
            _run("tc", "-n", switch, "qdisc", "replace", "dev", end, "root", *_bucket(rate * network.trunk))


def _bucket(rate: float) -> tuple[str, ...]:
    return ("tbf", "rate", f"{round(8 * rate)}bit", "burst", str(BURST), "limit", str(QUEUE))


def remove_stale() -> None:
    """Removes the namespaces of runs whose process is gone."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    for line in listed.splitlines():
        name = line.split()[0] if line.split() else ""
        owner = name.removeprefix(PREFIX).split("-")[0]
        if name.startswith(PREFIX) and owner.isdigit() and not os.path.exists(f"/proc/{owner}"):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
