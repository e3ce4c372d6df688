"""What the programs beside this file share: ports, waiting, requests, configurations, and processes."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self, TypeVar

HERE = Path(__file__).resolve().parent.parent
PTTH = (sys.executable, str(HERE / "ptth.py"))
KEY = "correct-horse-battery-staple"
T = TypeVar("T")
Process = subprocess.Popen[bytes]
PORTS = iter(random.sample(range(10_000, 32_000), 22_000))

sys.path.insert(0, str(HERE))
import ptth  # noqa: E402

os.environ["PATH"] += ":/usr/sbin"


def quiet(*command: str) -> bool:
    """Run a command, show what it prints only when it fails, and return whether it succeeded."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, check=False)
    except OSError as error:
        print(f"{command[0]}: {error}", flush=True)
        return False
    if done.returncode:
        print(f"{' '.join(command)} failed:\n{done.stdout.decode(errors='replace')[-2000:]}", flush=True)
    return done.returncode == 0


def install(*programs: str) -> None:
    """Install the programs that are missing, each by its package of Debian: `program` or `program:package`."""
    missing = [program for program in programs if not shutil.which(program.partition(":")[0])]
    if missing and quiet("apt-get", "update", "-qq"):
        for program in missing:  # one by one: one that cannot be had shall not keep the others away
            quiet("apt-get", "install", "-y", "-qq", "--no-install-recommends", program.rpartition(":")[2])


def free_port() -> int:
    """Return a port that is free, and below those that the system gives to clients: it stays free until it is used."""
    for port in PORTS:
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise OSError("no port is free")


def listening(port: int) -> bool:
    """Return whether a program listens on a port of localhost."""
    with contextlib.suppress(OSError), socket.create_connection(("localhost", port), 5):
        return True
    return False


def eventually(done: Callable[[], T], patience: float = 20) -> T | None:
    """Return what `done` returns as soon as it is true, or None after `patience` seconds."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if result := done():
                return result
        time.sleep(0.05)
    return None


class Answer:
    """A response that was read whole."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status, self.headers, self.body = response.status, response.headers, response.read()

    @property
    def text(self) -> str:
        """The body as text."""
        return self.body.decode(errors="replace")

    def __repr__(self) -> str:
        return f"{self.status} {self.text[:300]!r}"


def ask(
    host: str | int, path: str, method: str = "GET", body: object = None, *, timeout: float = 60, **fields: str
) -> Answer:
    """Send one request, on a connection of its own; a number is a port of 127.0.0.1."""
    host = f"127.0.0.1:{host}" if isinstance(host, int) else host
    headers = {name.replace("_", "-"): value for name, value in fields.items()}
    with contextlib.closing(http.client.HTTPConnection(host, timeout=timeout)) as connection:
        connection.request(method, path, body, headers)
        return Answer(connection.getresponse())


def write_relay(path: Path, port: int, keys: Mapping[str, str], *more: str) -> None:
    """Write a relay's configuration for servers with these keys, by name; `more` are lines before their blocks."""
    blocks = [f'[[servers]]\nname = "{name}"\ntripcode = "{ptth.tripcode(key)}"' for name, key in keys.items()]
    path.write_text("\n".join([f"port = {port}", *more, *blocks, ""]))


def write_server(path: Path, name: str, **settings: str | list[str]) -> None:
    """Write the configuration of a server with KEY; a text or a list is the same in TOML and JSON."""
    settings = {"name": name, "api_key": KEY, **settings}
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
    path.chmod(0o600)


def write_nginx(where: Path, http: str) -> list[str]:
    """Write a configuration for nginx with one worker; return the command that runs it."""
    path = where / "nginx.conf"
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = " ".join(f"{kind}_temp_path {where}/{kind};" for kind in kinds)
    path.write_text(
        f"user root; worker_processes 1; daemon off; pid {where}/nginx.pid; error_log stderr;\n"
        f"events {{ worker_connections 4096; }}\nhttp {{\naccess_log off; {temporary}\n{http}\n}}\n"
    )
    return ["nginx", "-p", str(where), "-c", str(path)]


class Programs:
    """Programs that run in a directory, with their logs there, until they are stopped together."""

    signals = (signal.SIGTERM, signal.SIGKILL)  # that stop them

    def __init__(self, where: Path) -> None:
        self.where = where
        self.running: dict[Process, Path] = {}  # with their logs
        where.mkdir(parents=True, exist_ok=True)

    def start(self, *command: str, log: str = "", cwd: Path | None = None, **environment: str) -> Process:
        """Start a program that stays, in a process group of its own."""
        path = self.where / (log or f"{len(self.running)}-{Path(command[0]).name}.log")
        with open(path, "ab") as file:
            process = subprocess.Popen(
                command, cwd=cwd or self.where, env={**os.environ, **environment}, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            )  # fmt: skip
        self.running[process] = path
        return process

    def wait(self, done: Callable[[], T], patience: float = 90) -> T:
        """Return what `done` returns as soon as it is true; AssertionError when a program ends before."""

        def look() -> T:
            for process, path in self.running.items():
                assert process.poll() is None, f"{path.name}: exit status {process.returncode}"
            return done()

        result = eventually(look, patience)
        assert result, f"not ready after {patience} s"
        return result

    def end(self, process: Process, number: int = signal.SIGKILL) -> int:
        """End one program by a signal, and return its exit status."""
        del self.running[process]
        process.send_signal(number)
        return process.wait(40)

    def logs(self, size: int = 2500) -> str:
        """Return the end of every log."""
        return "".join(f"--- {path.name}\n{path.read_text(errors='replace')[-size:]}" for path in self.running.values())

    def stop(self) -> None:
        """Send each signal to every program and what it has started, and wait up to 5 seconds after each."""
        for number in self.signals:
            for process in reversed(self.running):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
            for process in self.running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)
        self.running.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind:
            print(self.logs(), flush=True)
        self.stop()


def pids(processes: tuple[Process, ...]) -> list[int]:
    """Return the ids of processes and of their children."""
    parents = [str(process.pid) for process in processes]
    command = ["pgrep", "-P", ",".join(parents)]
    children = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return [int(pid) for pid in parents + children]


def cpu(*processes: Process) -> float:
    """Return the CPU seconds that processes and their children have used."""
    ticks = 0
    for pid in pids(processes):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def memory(*processes: Process) -> float:
    """Return the resident memory of processes and their children in MiB."""
    total = 0
    for pid in pids(processes):
        with contextlib.suppress(OSError):
            total += sum(map(int, re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())))
    return total / 1024
