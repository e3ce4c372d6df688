"""Tests of ptth.py, in the order of its sections.

`python3 test_ptth.py` runs them on any machine. If pytest cannot be imported, it makes .venv beside this file, installs
pytest and blake3 there, and uses that. Arguments are given to pytest. Or run `pytest`. With PTTH_LONG=3600 in the
environment the soak and the fuzzers take an hour, and a dead link is tested, too. PTTH_PLAIN=1 tests without functions
that only some systems have: os.splice, os.sendfile, os.pread and Unix sockets.
"""

from __future__ import annotations

import os
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))


def enter_venv() -> None:
    """Run this file again in .venv, which is made if it is missing. Does not return."""
    python = os.path.join(HERE, ".venv", "Scripts" if os.name == "nt" else "bin", "python")
    if not os.path.exists(python):
        try:
            import ensurepip  # noqa: F401  Debian has venv without it
            import venv
        except ImportError:
            sys.exit("test_ptth.py: Python's venv module is missing; do: apt install python3-venv")
        print("test_ptth.py: pytest is not installed; putting it into .venv", flush=True)
        venv.create(os.path.join(HERE, ".venv"), with_pip=True)
    if subprocess.call([python, "-c", "import pytest, blake3"], stderr=subprocess.DEVNULL):
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "pytest", "blake3"]
        if subprocess.call(pip):
            sys.exit("test_ptth.py: cannot install pytest into .venv; is there a network?")
    sys.exit(subprocess.call([python, os.path.join(HERE, "test_ptth.py"), *sys.argv[1:]]))


try:
    import pytest
except ImportError:
    if __name__ != "__main__":
        raise
    enter_venv()

import ast
import asyncio
import base64
import bisect
import concurrent.futures
import contextlib
import errno
import functools
import gc
import gzip
import hashlib
import html.parser
import http.client
import inspect
import io
import itertools
import json
import math
import queue
import random
import re
import select
import shlex
import shutil
import signal
import socket
import ssl
import statistics
import struct
import textwrap
import threading
import time
import tomllib
import traceback
import tracemalloc
import urllib.parse
import urllib.request
import xml.etree.ElementTree
import zipfile
import zlib

PLAIN = os.environ.get("PTTH_PLAIN", "") != ""  # test without functions that only some systems have


def take_away() -> None:
    """Remove functions that Python has on some systems only."""
    import functools
    import os
    import shutil
    import socket

    if not hasattr(socket, "AF_UNIX"):  # this file runs as a script, and then once more as a module of pytest's
        return
    socket.socketpair = functools.partial(socket.socketpair, socket.AF_UNIX)  # an event loop's own
    shutil._USE_CP_SENDFILE = False
    for module, names in ((os, ("splice", "sendfile", "pread")), (socket, ("AF_UNIX",))):
        for name in names:
            vars(module).pop(name, None)


if PLAIN:
    take_away()

import ptth

ptth.SWEEP_INTERVAL = 0.02  # seconds; many tests wait for a sweep
PROGRAM = os.path.join(HERE, "ptth.py")
LONG = int(os.environ.get("PTTH_LONG", "0"))  # seconds for the soak and the fuzzers; not 0: test also a dead link
KEY = "correct-horse-battery-staple"
Patch = pytest.MonkeyPatch
Output = pytest.CaptureFixture[str]

# -- helpers --


def reader_of(*pieces: bytes) -> asyncio.StreamReader:
    """Return a stream reader with these pieces, at its end."""
    reader = asyncio.StreamReader(limit=ptth.READ_SIZE)
    for piece in pieces:
        reader.feed_data(piece)
    reader.feed_eof()
    return reader


class FakeWriter:
    """A writer and its transport in one, which collects the written bytes."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.closed = self.aborted = False
        self.transport = self

    def write(self, data: bytes) -> None:
        self.data += data

    def get_extra_info(self, name: str) -> object:
        return {"peername": ("192.0.2.7", 1234), "sslcontext": object()}.get(name)  # not None: sent without sendfile

    def get_write_buffer_size(self) -> int:
        return 0

    def can_write_eof(self) -> bool:
        return False

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = self.aborted = True


class FakeProxy:
    """A forward proxy, or a relay, on 127.0.0.1 that sends the same response to every request."""

    def __init__(self, answer: bytes) -> None:
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.port = self.sock.getsockname()[1]
        self.answer = answer
        self.connections = 0
        self.asked: list[bytes] = []
        self.tls = False  # the bytes after the response were TLS
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            connection, _ = self.sock.accept()
            with connection, contextlib.suppress(ConnectionError):
                data = read(connection, b"\r\n\r\n")
                if data == b"stop\r\n\r\n":
                    return
                self.connections += 1
                self.asked += [data] if data else []
                connection.sendall(self.answer)
                if self.answer:
                    connection.settimeout(20)
                    self.tls = connection.recv(1) == b"\x16"

    def close(self) -> None:
        """Stop, after serving all connections made before."""
        with connect(self.port, b"stop\r\n\r\n"):
            self._thread.join(20)
        assert not self._thread.is_alive(), "a connection to the proxy was left open"
        self.sock.close()


def say(handler: ptth.Handler, *pieces: bytes) -> bytes:
    """Return the bytes that an HTTP server sends on one connection in response to these."""

    async def talk() -> bytes:
        writer = FakeWriter()
        await ptth.HTTPServer(handler)._serve_connection(reader_of(*pieces), writer)
        return bytes(writer.data)

    return asyncio.run(talk())


def with_peer(request: ptth.Request, peer: str) -> ptth.Request:
    """Return a request as one that came from this address."""
    request.connection = ptth.Connection.__new__(ptth.Connection)
    request.connection.peer = peer
    return request


async def echo(request: ptth.Request) -> ptth.Response:
    """A handler that responds with the request's method and target, and to POST with its body."""
    if request.method == "POST":
        pieces = [piece async for piece in request.body]
        return ptth.Response(200, [], ptth.BytesBody(b"".join(pieces)))
    return ptth.text_response(200, f"{request.method} {request.target}\n")


class Stream(ptth.Body):
    """A body of what an asynchronous generator yields."""

    def __init__(self, generate: object, length: int | None = None) -> None:
        self._generate, self.length = generate, length

    def __aiter__(self) -> object:
        return self._generate()


@contextlib.asynccontextmanager
async def listening(server: ptth.HTTPServer) -> object:
    """Let an HTTP server listen until the block ends; yield its port."""
    sock = ptth.open_socket("127.0.0.1", 0)
    await server.listen(sock)
    try:
        yield sock.getsockname()[1]
    finally:
        await server.stop(0.02)


def client_of(port: int) -> ptth.HTTPClient:
    """Return an HTTP client of a port of this machine."""
    return ptth.HTTPClient(ptth.BaseURL(False, "127.0.0.1", port, ""))


@contextlib.asynccontextmanager
async def client_to(serve: object, path: str = "") -> object:
    """Yield an HTTP client of a server whose connections `serve(reader, writer)` handles."""
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    client = ptth.HTTPClient(ptth.BaseURL(False, *server.sockets[0].getsockname(), path))
    try:
        yield client
    finally:
        client.close()
        server.close()


async def read_request(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Read a request; return its head, and its body if that has a Content-Length."""
    head = await reader.readuntil(b"\r\n\r\n")
    size = re.search(rb"Content-Length: (\d+)", head)
    return head, await reader.readexactly(int(size[1])) if size else b""


@contextlib.asynccontextmanager
async def attending(server: ptth.TunnelServer) -> object:
    """Run a tunnel's server until the block ends."""
    running = asyncio.create_task(server.run())
    try:
        yield server
    finally:
        await server.stop(0.1)
        await running


def split(data: bytes) -> list[tuple[int, dict[str, str], bytes]]:
    """Split a connection's bytes into (status, fields, body) of each response; only Content-Length and chunked."""
    answers = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        status = int(lines[0].split()[1])
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        body = b""
        if fields.get("transfer-encoding") == "chunked":
            while True:
                line, _, data = data.partition(b"\r\n")
                size = int(line, 16)
                body, data = body + data[:size], data[size + 2 :]
                if not size:
                    break
        elif status not in (100, 204, 304):
            size = int(fields.get("content-length", "0"))
            body, data = data[:size], data[size:]
        answers.append((status, fields, body))
    return answers


def one(data: bytes) -> tuple[int, dict[str, str], bytes]:
    """The one response in `data`."""
    answers = split(data)
    assert len(answers) == 1, data
    return answers[0]


def connect(port: int, data: bytes = b"", patience: float = 20) -> socket.socket:
    """Return a connection to a port of this machine, on which `data` was sent."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=patience)
    sock.sendall(data)
    return sock


def reset(sock: socket.socket) -> None:
    """Close a connection with a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def read(sock: socket.socket, end: bytes | None = None) -> bytes:
    """Read until the connection ends, or until `end` has come."""
    data = bytearray()
    while not (end and end in data) and (piece := sock.recv(1 << 20)):
        data += piece
    return bytes(data)


def fetch(port: int, request: bytes, *, half_close: bool = True, patience: float = 20) -> bytes:
    """Send raw bytes to a port of this machine and return all that comes back."""
    pieces = []
    with connect(port, request, patience) as sock:
        if half_close:
            sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while piece := sock.recv(1 << 20):
                pieces.append(piece)
    return b"".join(pieces)


def listens(port: int) -> bool:
    """Return whether somebody accepts connections to a port of this machine."""
    with contextlib.suppress(OSError), connect(port):
        return True
    return False


def get(path: str, *fields: str, method: str = "GET", host: str = "example.com") -> bytes:
    """Return a request's bytes, with Connection: close."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", "Connection: close", *fields, "", ""]
    return "\r\n".join(lines).encode("latin-1")


def ask(handler: ptth.Handler, path: str, *fields: str, **options: str) -> tuple[int, dict[str, str], bytes]:
    """Return an HTTP server's response to one request."""
    return one(say(handler, get(path, *fields, **options)))


MTIME = 1_700_000_000  # Tue, 14 Nov 2023 22:13:20 GMT
DATE = "Tue, 14 Nov 2023 22:13:20 GMT"
HELLO = b"hello, world\n"


def write_files(where: object, files: dict[str | bytes, str | bytes]) -> None:
    """Write files of these names, with the folders that they need, below a folder."""
    for name, data in files.items():
        path = os.path.join(os.fsencode(where), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)


def make_tree(root: str) -> None:
    """Make the directory for the table FILES."""
    files = {
        b"hello.txt": HELLO,
        b"empty": b"",
        b"page.html": b"<p>page</p>\n",
        b"noext": b"?",
        b"a b&c<d>\"e'#%?.txt": b"odd\n",
        "\u00fcml\u00e4ut.txt".encode(): b"umlaut\n",
        b"bytes\xff\xfe": b"not UTF-8\n",
        b"new\nline": b"newline\n",
        b"back\\slash": b"backslash\n",
        b"a:b": b"colon\n",
        b"a:d/f": b"f\n",
        b"sub/file": b"in sub\n",
        b"sub dir/x": b"x\n",
        b"index/index.html": b"the index\n",
        b"index/other": b"other\n",
        b".secret": b"secret\n",
        b".git/config": b"secret\n",
        b".well-known/x": b"well known\n",
        b"big": bytes(range(256)) * 1024,
    }
    base = os.fsencode(root)
    outside = base + b".outside"
    write_files(base, files)
    write_files(outside, {b"secret": b"secret\n"})
    for name in files:
        os.utime(os.path.join(base, name), (MTIME, MTIME))
    os.mkdir(os.path.join(base, b"nothing"))
    for link, aim in (
        (b"inside", b"hello.txt"), (b"insub", b"sub"), (b"outside", outside + b"/secret"), (b"outdir", outside),
        (b"dangling", b"nowhere"), (b"loop", b"loop"), (b"up", b"sub/../../" + os.path.basename(outside)),
    ):  # fmt: skip
        os.symlink(aim, os.path.join(base, link))
    os.mkfifo(os.path.join(base, b"fifo"))


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("files") / "root")
    os.mkdir(path)
    make_tree(path)
    return path


class Background:
    """An event loop in a thread, for servers that tests connect to."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: object, patience: float = 30) -> object:
        """Run a coroutine there and return its result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(patience)

    @contextlib.contextmanager
    def inside(self, context: object) -> object:
        """Enter an asynchronous context there, and leave it when the block ends."""
        value = self.run(context.__aenter__())
        try:
            yield value
        finally:
            self.run(context.__aexit__(None, None, None))

    def serve(self, handler: ptth.Handler, **options: object) -> object:
        """Run an HTTP server with a handler there until the block ends; yield its port."""
        return self.inside(listening(ptth.HTTPServer(handler, **options)))

    async def _end(self) -> None:
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    def close(self) -> None:
        self.run(self._end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()


@pytest.fixture(scope="session", autouse=True)
def bytecode(tmp_path_factory: pytest.TempPathFactory) -> object:
    """Let the processes that import ptth share its bytecode, outside the tree: compiling takes half of their start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        patch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path_factory.mktemp("bytecode")))
        yield


@pytest.fixture(scope="session")
def background() -> object:
    made = Background()
    yield made
    made.close()


@pytest.fixture
def told(monkeypatch: Patch) -> list[str]:
    """What ptth.py writes to stderr. capfd loses what another thread writes while it is read."""
    pieces: list[str] = []
    monkeypatch.setattr(ptth, "write_stderr", pieces.append)
    return pieces


@pytest.fixture
def variables(monkeypatch: Patch) -> object:
    """Set these environment variables, and no others of a proxy."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    return lambda **values: [monkeypatch.setenv(*pair) for pair in values.items()]


class Tunnel:
    """A relay and its only server, n, with a handler; both in one loop, over real sockets."""

    relay: ptth.Relay
    server: ptth.TunnelServer

    def __init__(
        self,
        background: Background,
        handler: ptth.Handler | None = None,
        tls: ssl.SSLContext | None = None,
        **options: float,
    ) -> None:
        """Start them; without a handler, the relay alone."""
        self.background = background
        background.run(self._start(handler, tls, options))

    async def _start(self, handler: ptth.Handler | None, tls: ssl.SSLContext | None, options: dict[str, float]) -> None:
        entry = ptth.ServerEntry("n", ptth.tripcode(KEY), host="n.example.com")
        self.relay = ptth.Relay(ptth.RelayConfig(servers=[entry], **options))
        self.http = ptth.HTTPServer(self.relay.handle, takes_bodies=True, tls=tls)
        sock = ptth.open_socket("127.0.0.1", 0)
        self.port = sock.getsockname()[1]
        await self.http.listen(sock)
        self.running = None
        if handler:
            self.server = ptth.TunnelServer(client_of(self.port), "n", KEY, handler)
            self.running = asyncio.create_task(self.server.run())
            await self.server.connected.wait()

    def configure(self, config: ptth.RelayConfig) -> None:
        """Let the relay have another configuration."""

        async def apply() -> None:
            self.relay.configure(config)

        self.background.run(apply())

    @property
    def registered(self) -> ptth.RegisteredServer:
        """What the relay knows of the server."""
        return self.relay.state.servers["n"]

    async def _stop(self) -> None:
        if self.running:
            await self.server.stop(1)
            await self.running
        await self.relay.stop(0.1)
        await self.http.stop(0.1)

    def fetch(self, request: bytes, **options: bool) -> bytes:
        """Send raw bytes to the relay and return all that comes back."""
        return fetch(self.port, request, **options)

    def get(self, path: str, *fields: str, **options: str) -> tuple[int, dict[str, str], bytes]:
        """Return the relay's response to one request."""
        return one(self.fetch(get(path, *fields, **options)))

    def close(self) -> None:
        self.background.run(self._stop())


@pytest.fixture
def open_tunnel(background: Background) -> object:
    """Make a tunnel to a handler, or a relay alone. It is closed when the test ends."""
    with contextlib.ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(contextlib.closing(Tunnel(background, *args, **options)))


@pytest.fixture(scope="session")
def files_tunnel(background: Background, root: str) -> object:
    made = Tunnel(background, ptth.server_handler(ptth.Site(root), "n"))
    yield made
    made.close()


@pytest.fixture
def bare_relay(open_tunnel: object) -> Tunnel:
    """A relay without a server: the test sends P1 and P5 itself."""
    return open_tunnel()


class Process:
    """ptth.py as a real process; `port` is the one that it prints."""

    def __init__(
        self, *args: str, cwd: str | None = None, env: dict[str, str] | None = None, **constants: float
    ) -> None:
        """Start it; `constants` are values for names of the module, such as SWEEP_INTERVAL."""
        assert constants.keys() <= vars(ptth).keys()
        lines = [inspect.getsource(take_away), "take_away()"] if PLAIN else []
        lines += [f"import sys\nsys.path.insert(0, {HERE!r})\nimport ptth", f"vars(ptth).update({constants!r})"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", "\n".join([*lines, "sys.exit(ptth.main())"]), *args, "-q"],
            cwd=cwd,
            env={**os.environ, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: queue.Queue[str] = queue.Queue()
        self.told: list[str] = []
        for pipe in (self.process.stdout, self.process.stderr):
            threading.Thread(target=self._read, args=(pipe,), daemon=True).start()
        self.port = 0

    def _read(self, pipe: object) -> None:
        for line in pipe:
            self.told.append(line)
            self.lines.put(line)

    def wait_for(self, text: str, patience: float = 20) -> str:
        """Return the next line that contains `text`."""
        end = time.monotonic() + patience
        while True:
            try:
                line = self.lines.get(timeout=max(0, end - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"{text!r} did not come; it said {self.told}") from None
            if text in line:
                return line

    def listening(self) -> Process:
        """Wait until it prints its port."""
        self.port = int(re.search(r"https?://[^/ ]*:(\d+)/", self.wait_for("://"))[1])
        return self

    def end(self, number: int = signal.SIGTERM, patience: float = 40) -> int:
        """Signal it, and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(patience)

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def resident_mib(self, name: str = "VmRSS") -> float:
        """Return its resident memory in MiB."""
        with open(f"/proc/{self.process.pid}/status") as file:
            return int(re.search(rf"{name}:\s+(\d+) kB", file.read())[1]) / 1024

    def peak_mib(self) -> float:
        """Return its peak of resident memory in MiB."""
        return self.resident_mib("VmHWM")


@pytest.fixture
def start() -> object:
    """Start ptth.py with arguments. It is ended by its pid when the test ends."""
    started = []

    def begin(*args: str, **options: object) -> Process:
        started.append(Process(*args, **options))
        return started[-1]

    yield begin
    for process in started:
        process.end(signal.SIGKILL)


def write_configs(where: object, port: int, root: str = ".", **more: object) -> None:
    """Write both configuration files, for a relay on `port`."""
    (where / "ptth_relay.toml").write_text(
        f'port = {port}\n[[servers]]\nname = "n"\ntripcode = "{ptth.tripcode(KEY)}"\n'
    )
    lines = {"name": "n", "api_key": KEY, "relay_url": f"http://127.0.0.1:{port}", "file_server_root": root, **more}
    path = where / "ptth_server.toml"
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in lines.items()))
    path.chmod(0o600)


def load_relay(where: object, text: str | bytes) -> ptth.RelayConfig:
    """Load a relay's configuration of this text."""
    path = where / "r.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return ptth.load_relay_config(str(path))


def load_server(
    where: object, text: str | bytes, flags: dict[str, object] | None = None, **options: bool
) -> ptth.ServerConfig:
    """Load a server's configuration of this text."""
    path = where / "s.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    path.chmod(0o600)
    return ptth.load_server_config(str(path), flags or {}, **options)


EC = ("ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")  # faster to make than an RSA key


def make_certificate(where: object, kind: tuple[str, ...] = EC) -> ssl.SSLContext:
    """Make the files `cert` and `key` for localhost; return a TLS context for a server."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", *kind, "-nodes", "-keyout", "key", "-out", "cert", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost,IP:::1"], cwd=where, check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(where / "cert", where / "key")
    return context


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def needs(name: str) -> object:
    return pytest.mark.skipif(not shutil.which(name), reason=f"{name} is not installed")


@contextlib.contextmanager
def program(*command: object, port: int, **options: object) -> object:
    """Run another program, which listens on `port`, until the block ends."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **{**quiet, **options})
    try:
        eventually(lambda: listens(port))
        yield process
    finally:
        process.terminate()
        process.wait(20)


def eventually(check: object, patience: float = 20) -> None:
    """Wait until `check` returns something true."""
    end = time.monotonic() + patience
    while not check():
        assert time.monotonic() < end, "it did not become true"
        time.sleep(0.01)


def fill(sock: socket.socket, data: bytes, most: int) -> int:
    """Send `data` again and again, at most `most` bytes, until the peer takes no more; return how many it took."""
    sock.settimeout(0.1)
    sent = 0
    with contextlib.suppress(TimeoutError):
        while sent < most:
            sent += sock.send(data[: most - sent])
    return sent


def in_time(work: object, patience: float = 20) -> object:
    """Run a coroutine; it must end within `patience` seconds."""
    return asyncio.run(asyncio.wait_for(work, patience))


@contextlib.contextmanager
def at_once(count: int, work: object) -> object:
    """Run `work(number)` in this many threads; when the block has ended, wait until they end."""
    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    yield
    for thread in threads:
        thread.join(60 + LONG)
        assert not thread.is_alive()


def in_loop(test: object) -> object:
    """Let an async function be a test."""

    @functools.wraps(test)
    def run_it(*args: object, **options: object) -> None:
        in_time(test(*args, **options))

    return run_it


class TestShape:
    """The source: its docstring has the right sections, sections use earlier ones only, functions are short."""

    source = open(PROGRAM, encoding="utf-8").read()
    tree = ast.parse(source)
    dividers = re.findall(r"^# -- (\d+)\. (.+) --$", source, re.MULTILINE)

    def sections(self) -> list[tuple[str, list[ast.stmt]]]:
        starts = [
            self.source[: m.start()].count("\n") + 1 for m in re.finditer(r"^# -- \d+\.", self.source, re.MULTILINE)
        ]
        parts: list[tuple[str, list[ast.stmt]]] = [(name, []) for _, name in self.dividers]
        for node in self.tree.body:
            index = sum(start <= node.lineno for start in starts) - 1
            if index >= 0:
                parts[index][1].append(node)
        return parts

    @staticmethod
    def defined(nodes: list[ast.stmt]) -> set[str]:
        names = set()
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
        return names

    def test_an_old_python_can_read_the_source_and_say_that_it_is_too_old(self) -> None:
        ast.parse(self.source, feature_version=(3, 8))

    def test_the_docstring_lists_the_sections_in_their_order(self) -> None:
        listed = re.findall(
            r"^    (\d+)  ?([A-Z][A-Za-z ]+?)  ", ast.get_docstring(self.tree, clean=False), re.MULTILINE
        )
        assert listed == self.dividers
        assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))

    def test_a_section_uses_only_those_above_it(self) -> None:
        sections = self.sections()
        for i, (name, nodes) in enumerate(sections):
            later = set().union(*(self.defined(nodes) for _, nodes in sections[i + 1 :]))
            used = {n.id for node in nodes for n in ast.walk(node) if isinstance(n, ast.Name)}
            assert not used & later, name

    @pytest.mark.parametrize("name", ["Tripcodes", "Syntax", "Pages", "Tunnel messages", "Rust form"])
    def test_a_pure_section_does_no_input_or_output(self, name: str) -> None:
        for node in dict(self.sections())[name]:
            for inner in ast.walk(node):
                assert not isinstance(inner, ast.Await | ast.AsyncFunctionDef)
                assert not (isinstance(inner, ast.Name) and inner.id in ("open", "socket", "asyncio", "sys"))

    def test_functions_are_short(self) -> None:
        lengths = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[0]
                is_doc = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
                doc = first.end_lineno - first.lineno + 1 if is_doc else 0
                lengths[node.name, node.lineno] = node.end_lineno - node.lineno + 1 - doc
        assert max(lengths.values()) <= 50, max(lengths, key=lengths.get)
        assert statistics.median(lengths.values()) <= 8
        assert statistics.quantiles(lengths.values(), n=10)[-1] <= 25

    def test_classes_are_not_long(self) -> None:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ClassDef):
                assert node.end_lineno - node.lineno < 250, node.name

    def test_functions_have_few_branches(self) -> None:
        kinds = (
            ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.IfExp, ast.comprehension, ast.match_case,
        )  # fmt: skip
        for function in ast.walk(self.tree):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                inner = list(ast.walk(function))
                branches = 1 + sum(isinstance(node, kinds) for node in inner)
                branches += sum(len(node.values) - 1 for node in inner if isinstance(node, ast.BoolOp))
                assert branches <= 12, function.name

    def test_no_local_hides_a_name_of_the_module(self) -> None:
        names = self.defined(self.tree.body)
        for node in self.tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        hidden = []
        for function in ast.walk(self.tree):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                for inner in ast.walk(function):
                    if isinstance(inner, ast.arg):
                        local = inner.arg
                    elif isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                        local = inner.id
                    elif isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef) and inner is not function:
                        local = inner.name
                    else:
                        local = inner.name if isinstance(inner, ast.ExceptHandler) else None
                    if local in names:
                        hidden.append((getattr(function, "name", "lambda"), local))
        assert not hidden

    def test_every_public_function_and_class_has_a_docstring(self) -> None:
        for node in self.tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name[0] != "_":
                assert ast.get_docstring(node), node.name

    def test_every_command_in_the_readme_is_one(self) -> None:
        with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
            commands = re.findall(
                r"(?:python3?|uv run) (?:/?ptth\.py|-m ptth) ([^#\n|>&`]+)", file.read().replace("%i", "relay")
            )
        assert len(commands) >= 12
        for command in commands:
            words = shlex.split(command)
            if not {"--help", "--version"} & set(words):
                ptth.build_parser().parse_args(words)


class TestTripcodes:
    VECTORS = {  # of the BLAKE3 authors, for the input bytes 0, 1, ... 250, 0, 1, ...
        0: "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
        1: "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213",
        63: "e9bc37a594daad83be9470df7f7b3798297c3d834ce80ba85d6e207627b7db7b",
        64: "4eed7141ea4a5cd4b788606bd23f46e212af9cacebacdc7d1f4c6dc7f2511b98",
        65: "de1e5fa0be70df6d2be8fffd0e99ceaa8eb6e8c93a63f2d8d1c30ecb6b263dee",
        1023: "10108970eeda3eb932baac1428c7a2163b0e924c9a9e25b35bba72b28f70bd11",
        1024: "42214739f095a406f3fc83deb889744ac00df831c10daa55189b5d121c855af7",
    }

    @pytest.mark.parametrize("length", VECTORS)
    def test_the_built_in_hash_gives_the_published_vectors(self, length: int) -> None:
        assert ptth.builtin_blake3((bytes(range(251)) * 500)[:length]).hex() == self.VECTORS[length]

    def test_the_package_gives_the_same(self) -> None:
        package = pytest.importorskip("blake3")
        for length in self.VECTORS:
            data = os.urandom(length)
            assert ptth.builtin_blake3(data) == package.blake3(data).digest() == ptth.fastest_blake3()(data)

    def test_a_tripcode_is_padded_base64(self) -> None:
        assert ptth.tripcode("secretpassword") == "v7tW77nRaiC9s31Y6JoDcHTOHNzEDhhmKHZRBHKc87s="

    WEAK = [
        ("short", "16"), ("abababababababababab", "different"), ("REPLACE-THIS-PLACEHOLDER", "placeholder"),
        ("k\u00e9y-with-an-accent-in-it", "ASCII"), ("abcdefghij" * 13, "128"), ("with a space in it!", "ASCII"),
    ]  # fmt: skip

    GUESSABLE = """
        abcdefghabcdefgh 1234567890123456 qwertyuiopasdfgh hgfedcbahgfedcba 0987654321098765 QwErTyUiOpAsDfGh
        ABCDEFGHabcdefgh poiuytrewqlkjhgf 0123456789abcdef 1q2w3e4r5t6y7u8i 1qaz2wsx3edc4rfv zaq12wsxcde34rfv
        qazwsxedcrfvtgby abcd1234abcd1234 aabbccddeeffgghh a1b2c3d4e5f6g7h8 zxcvbnmasdfghjkl !@#$%^&*()123456
        azbycxdwevfugtht password12345678 13579bdf02468ace 12345678-12345678 acegikmoqsuwybdf xyzabcdefghijklm
        abcdefghijklmnopqrstuvwxyz qwertzuiopasdfgh aaaabbbbccccddddeeeeffffgggghhhh iloveyou2iloveyou2
    """

    @pytest.mark.parametrize(("key", "word"), [*WEAK, *((key, "guessed") for key in GUESSABLE.split())])
    def test_a_weak_key_is_named_with_a_way_to_make_a_good_one(self, key: str, word: str, tmp_path: object) -> None:
        with pytest.raises(ptth.UserError, match=f"api_key .*{word}.*server --new-key"):
            load_server(tmp_path, f"name = 'a'\napi_key = {json.dumps(key)}\n", to_connect=False)

    def test_good_keys_pass(self) -> None:
        rng = random.Random(12)
        keys = [KEY, "correcthorsebatterystaple", "my-dog-eats-green-apples", "wrong-key-that-is-long-enough"]
        for data in (rng.randbytes(16) for _ in range(200)):
            keys += [data.hex(), base64.b64encode(data).decode(), base64.urlsafe_b64encode(data[:15]).decode()]
            keys.append(base64.b32encode(data).decode())
        assert [key for key in keys if ptth.key_weakness(key)] == []

    def test_a_key_is_looked_at_in_little_time(self) -> None:
        begin = time.thread_time()
        for key in ("ab" * 64, "ab1" * 42, "".join(map(chr, range(33, 127))), "q" * 127 + "z"):
            ptth.is_guessable(key)
        assert time.thread_time() - begin < 1


class TestSyntax:
    GOOD = [  # (name, head, method, target, pairs): parsed, and formatted back to the same bytes
        ("plain", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", "GET", "/", [("Host", "a")]),
        ("port", b"GET /x?y HTTP/1.1\r\nHost: a.b:80\r\nX: y z\r\n\r\n", "GET", "/x?y", [("Host", "a.b:80"), ("X", "y z")]),
        ("ipv6", b"HEAD /%20 HTTP/1.1\r\nHost: [::1]:8\r\n\r\n", "HEAD", "/%20", [("Host", "[::1]:8")]),
        ("empty value", b"GET / HTTP/1.1\r\nHost: \r\nA: \r\n\r\n", "GET", "/", [("Host", ""), ("A", "")]),
        ("high bytes", b"GET /\xff HTTP/1.1\r\nHost: a\r\nX: \xe9\r\n\r\n", "GET", "/\xff", [("Host", "a"), ("X", "\xe9")]),
        ("own method", b"M-SEARCH * HTTP/1.1\r\nHost: a\r\n\r\n".replace(b"*", b"/"), "M-SEARCH", "/", [("Host", "a")]),
    ]  # fmt: skip
    REFUSED = [
        (b"GET / HTTP/1.1\nHost: a\n\n", 400), (b"GET / HTTP/1.1\r\nHost: a\n\r\n", 400), (b"GET /\rx HTTP/1.1\r\n", 400),
        (b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n", 400), (b"GET / HTTP/1.1 \r\nHost: a\r\n\r\n", 400),
        (b" GET / HTTP/1.1\r\nHost: a\r\n\r\n", 400), (b"GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /\r\nHost: a\r\n\r\n", 400), (b"GET / http/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET / HTTP/1.10\r\nHost: a\r\n\r\n", 400), (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
        (b"GET / HTTP/0.9\r\nHost: a\r\n\r\n", 505), (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400), (b"GET /\x00 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400), (b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
        (b"GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n", 400), (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400), (b"GET / HTTP/1.1\r\nHost: u@a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\n b\r\n\r\n", 400), (b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX y\r\n\r\n", 400), (b"GET / HTTP/1.1\r\nHost: a\r\n: y\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: \x0b\r\n\r\n", 400), (b"GET x HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET * HTTP/1.1\r\nHost: a\r\n\r\n", 400), (b"GET http:///x HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /#f HTTP/1.1\r\nHost: a\r\n\r\n", 400), (b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", 405),
        (b"CONNECT /x HTTP/1.1\r\nHost: a\r\n\r\n", 405), (b"CONNECT http://a/ HTTP/1.1\r\nHost: a\r\n\r\n", 405),
        (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414), (b"GET /" + b"x" * 9000, 414),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 100 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 33000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 33000, 431), (b"\r\n" * 5 + b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +5\r\n\r\nabcde", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1_0\r\n\r\nabcde", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0x5\r\n\r\nabcde", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: \xb2\r\n\r\nabcde", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length:\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5, 5\r\n\r\nabcde", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: " + b"9" * 30 + b"\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding:\r\n\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 501),
        (b"GET / HTTP/1.1\r\nHost: a\r\nExpect: coffee\r\n\r\n", 417), (b"GET / HTTP/1.1\r\nHost: [1]\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a:80..\r\n\r\n", 400), (b"GET / HTTP/1.1\r\nHost: a:80.b\r\n\r\n", 400), (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b:1.\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: [:::]:1\r\n\r\n", 400), (b"GET http://:80/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ]  # fmt: skip

    @pytest.mark.parametrize(("name", "head", "method", "target", "pairs"), GOOD, ids=[row[0] for row in GOOD])
    def test_a_good_head_is_parsed_and_formatted_back(
        self, name: str, head: bytes, method: str, target: str, pairs: object
    ) -> None:
        request = ptth.parse_request_head(head)
        assert (request.method, request.target, request.headers.pairs) == (method, target, pairs)
        assert ptth.format_request_head(method, target, pairs) == head

    @pytest.mark.parametrize(("data", "status"), REFUSED)
    def test_what_can_be_read_in_two_ways_is_refused(self, data: bytes, status: int) -> None:
        behind = b"GET /second HTTP/1.1\r\nHost: a\r\n\r\n"
        for pieces in ([data], [data, behind], byte_by_byte(data) if len(data) < 999 else [data]):
            answer = one(say(echo, *pieces))
            assert (answer[0], answer[1]["connection"]) == (status, "close")

    def test_white_space_around_a_value_is_not_part_of_it(self) -> None:
        head = b"GET / HTTP/1.1\r\nHost:\t a \t\r\nX:y  \r\n\r\n"
        assert ptth.parse_request_head(head).headers.pairs == [("Host", "a"), ("X", "y")]

    def test_a_field_full_of_spaces_is_no_work(self) -> None:
        begin = time.process_time()
        ptth.parse_request_head(b"GET / HTTP/1.1\r\nHost: a\r\nX: a" + b" " * 32_000 + b"b\r\nY: c \r\n\r\n")
        assert time.process_time() - begin < 0.2  # it was 1.2 when the pattern began anew at each space

    def test_a_request_line_of_the_limit_may_come_in_pieces(self) -> None:
        line = b"GET /" + b"x" * (ptth.MAX_REQUEST_LINE - 14) + b" HTTP/1.1"
        assert len(line) == ptth.MAX_REQUEST_LINE
        assert one(say(echo, line + b"\r", b"\nHost: a\r\nConnection: close\r\n\r\n"))[0] == 200

    def test_a_dot_behind_the_port_is_dropped(self) -> None:
        request = ptth.parse_request_head(b"GET / HTTP/1.1\r\nA: b\r\nHost: n.test:443.\r\n\r\n")
        assert request.headers.pairs == [("Host", "n.test:443"), ("A", "b")]

    def test_the_absolute_form_replaces_host(self) -> None:
        request = ptth.parse_request_head(b"GET HTTP://b:81/x?y HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (request.target, request.headers.get("host")) == ("/x?y", "b:81")

    @pytest.mark.parametrize(
        "pair", [("A", "b\r\nC: d"), ("A\r\nB", "c"), ("A", "b\n"), ("A b", "c"), ("", "c"), ("A", "\0")]
    )
    def test_a_field_that_would_split_the_head_is_not_formatted(self, pair: tuple[str, str]) -> None:
        with pytest.raises(ptth.ProtocolError):
            ptth.format_response_head(200, [("X", "y"), pair])

    DATES = [
        ("Sun, 06 Nov 1994 08:49:37 GMT", 784111777), ("Sunday, 06-Nov-94 08:49:37 GMT", 784111777),
        ("Sun Nov  6 08:49:37 1994", 784111777), ("Sun, 06 Nov 1994 08:49:37 UTC", None), ("Sun, 31 Feb 1994 08:49:37 GMT", None),
        ("06 Nov 1994", None), ("", None), ("Sun, 06 Nov 0000 08:49:37 GMT", None), ("Sun, 06 Nov 1994 24:00:00 GMT", None),
    ]  # fmt: skip

    @pytest.mark.parametrize(("text", "seconds"), DATES)
    def test_dates_in_three_forms(self, text: str, seconds: int | None) -> None:
        assert ptth.parse_date(text, 1.8e9) == seconds

    def test_a_year_of_two_digits_is_at_most_50_years_ahead(self) -> None:
        now = 1_800_000_000  # Friday, 15-Jan-27 08:00:00 GMT
        years = {
            "15-Jan-27 08:00:00": 2027, "31-Dec-76 00:00:00": 2076, "15-Jan-77 08:00:00": 2077,
            "15-Jan-77 08:00:01": 1977, "01-Feb-77 00:00:00": 1977, "01-Jan-78 00:00:00": 1978,
        }  # fmt: skip
        for date, year in years.items():
            assert time.gmtime(ptth.parse_date(f"Friday, {date} GMT", now)).tm_year == year

    def test_a_formatted_date_parses_back(self) -> None:
        for seconds in (0, 784111777, MTIME, 4102444799):
            assert ptth.parse_date(ptth.format_date(seconds), 1.8e9) == seconds

    RANGES = [  # of 10 bytes
        ("bytes=0-4", [(0, 4)]), ("bytes=5-", [(5, 9)]), ("bytes=-3", [(7, 9)]), ("bytes=-99", [(0, 9)]), ("bytes=9-99", [(9, 9)]),
        ("BYTES=0-0", [(0, 0)]), ("bytes=0-1, 4-5", [(0, 1), (4, 5)]), ("bytes=,0-1,,", [(0, 1)]), ("bytes=10-", []),
        ("bytes=-0", []), ("bytes=10-,-0", []), ("bytes=20-,0-1", [(0, 1)]), ("bytes=" + "9" * 5000 + "-", []),
        ("bytes=0-" + "9" * 5000, [(0, 9)]), ("bytes=4-2", None), ("bytes=-", None), ("bytes=a-b", None), ("bytes=", None),
        ("bytes 0-4", None), ("lines=0-4", None), ("bytes=0-4;5-6", None), ("bytes=0-,0-", None), ("bytes=1-2 3", None),
        ("bytes=" + ",".join(["0-0"] * 1000), None), ("bytes=--1", None), ("bytes=0x1-2", None),
    ]  # fmt: skip

    @pytest.mark.parametrize(("text", "expected"), RANGES, ids=[row[0][:20] for row in RANGES])
    def test_ranges(self, text: str, expected: object) -> None:
        assert ptth.parse_ranges(text, 10) == expected

    def test_ranges_of_an_empty_file(self) -> None:
        for text in ("bytes=0-", "bytes=0-99", "bytes=5-", "bytes=-5", "bytes=0-0,2-3"):
            assert ptth.parse_ranges(text, 0) is None

    PATHS = [
        ("/", [], True), ("/a", [b"a"], False), ("/a/", [b"a"], True), ("/a/./b", [b"a", b"b"], False), ("/a/../b", [b"b"], False),
        ("/../../b", [b"b"], False), ("/a/%2e%2E/b", [b"b"], False), ("/a/.", [b"a"], True), ("/a/b/..", [b"a"], True),
        ("//a///b", [b"a", b"b"], False), ("/a%2fb", [b"a/b"], False), ("/%ff\xfe", [b"\xff\xfe"], False), ("/...", [b"..."], False),
    ]  # fmt: skip

    @pytest.mark.parametrize(("path", "segments", "directory"), PATHS)
    def test_paths(self, path: str, segments: list[bytes], directory: bool) -> None:
        assert ptth.parse_path(path) == (tuple(segments), directory)

    def test_only_short_paths_are_kept(self) -> None:
        long, short = "/a" * 4000, "/a" * 100
        assert ptth.parse_path(long) == ((b"a",) * 4000, False)
        assert ptth.parse_path(long)[0] is not ptth.parse_path(long)[0]
        assert ptth.parse_path(short)[0] is ptth.parse_path(short)[0]

    @pytest.mark.parametrize("path", ["*", "", "a/b", "http://h/x"])
    def test_what_is_no_path_is_400(self, path: str) -> None:
        with pytest.raises(ptth.ProtocolError) as caught:
            ptth.parse_path(path)
        assert caught.value.status == 400

    TAGS = [
        ('"a"', '"a"', True, True), ('W/"a"', '"a"', True, False), ('"b", "a"', '"a"', True, True), ("*", '"a"', True, True),
        ('"b"', '"a"', False, False), ("a", '"a"', False, False), ('"a,b"', '"a,b"', True, True), ("", '"a"', False, False),
        ('w/"a"', '"a"', False, False), ('x"a"', '"a"', False, False), ('"b" , W/"a" ,', '"a"', True, False),
    ]  # fmt: skip

    @pytest.mark.parametrize(("value", "tag", "weak", "strong"), TAGS)
    def test_entity_tags(self, value: str, tag: str, weak: bool, strong: bool) -> None:
        assert ptth.tag_matches(value, tag, weak=True) is weak
        assert ptth.tag_matches(value, tag, weak=False) is strong

    def test_mutated_heads_raise_nothing_but_the_protocol_error(self) -> None:
        rng = random.Random(1)
        heads = [row[1] for row in self.GOOD] + [row[0] for row in self.REFUSED if len(row[0]) < 500]
        for _ in range(3000 + 300 * LONG):
            with contextlib.suppress(ptth.ProtocolError):
                request = ptth.parse_request_head(mutated(rng, rng.choice(heads)))
                ptth.parse_framing(request.headers, request.minor)
                again = ptth.parse_request_head(
                    ptth.format_request_head(request.method, request.target, request.headers.pairs)
                )
                assert (again.target, again.headers.pairs) == (request.target, request.headers.pairs)

    def test_mutated_values_raise_nothing(self) -> None:
        rng = random.Random(2)
        values = [DATE, "Tuesday, 14-Nov-23 22:13:20 GMT", "Tue Nov 14 22:13:20 2023", *(row[0] for row in self.RANGES)]
        for _ in range(3000 + 300 * LONG):
            text = mutated(rng, rng.choice(values).encode()).decode("latin-1")
            when = ptth.parse_date(text, 2e9)
            assert when is None or ptth.parse_date(ptth.format_date(when), 2e9) == when
            for first, last in ptth.parse_ranges(text, 1000) or []:
                assert 0 <= first <= last < 1000
            ptth.tag_matches(text, '"a"', weak=True)
            ptth.parse_wait(text)
            with contextlib.suppress(ptth.ProtocolError):
                assert not {b"", b".", b".."} & set(ptth.parse_path("/" + text)[0])

    def test_mutated_files_raise_nothing_but_the_users_error(self, tmp_path: object) -> None:
        rng = random.Random(3)
        for name, load in (("relay", load_relay), ("server", load_server)):
            with open(os.path.join(HERE, f"ptth_{name}.toml.example"), "rb") as file:
                text = file.read().replace(b"# [[", b"[[")
            for _ in range(300 + 20 * LONG):
                with contextlib.suppress(ptth.UserError):
                    load(tmp_path, mutated(rng, text))


def byte_by_byte(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


def mutated(rng: random.Random, data: bytes) -> bytes:
    """The bytes with a few of them changed."""
    made = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(made) + 1)
        made[at : at + rng.randint(0, 2)] = rng.choice(
            [b"", b"\r\n", b" ", b":", b"\0", b"\xff", b"%", b"9", b'"', b"=", bytes([rng.randrange(256)])]
        )
    return bytes(made)


def chunked(*fields: str) -> bytes:
    return "\r\n".join(["POST / HTTP/1.1", "Host: a", "Transfer-Encoding: chunked", *fields, "", ""]).encode()


def count_calls(monkeypatch: Patch, name: str) -> list[int]:
    """Return a list of what the function of os with this name returns from now on."""
    results: list[int] = []
    real = getattr(os, name)

    def call(*args: object, **options: object) -> int:
        results.append(real(*args, **options))
        return results[-1]

    monkeypatch.setattr(os, name, call)
    return results


class TestStreams:
    CHUNKED = [  # bytes after the head: the body, or the status of the error
        (b"5\r\nhello\r\n0\r\n\r\n", b"hello"), (b"0" * 15 + b"5\r\nhello\r\n0\r\n\r\n", b"hello"),
        (b"5;a=b;c\r\nhello\r\n0\r\n\r\n", b"hello"), (b"0\r\n\r\n", b""),
        (b"00A\r\n0123456789\r\n0\r\nTrailer: x\r\n\r\n", b"0123456789"), (b"1\r\na\r\n1\r\nb\r\n0\r\n\r\n", b"ab"),
        (b"5 ;a\r\nhello\r\n0\r\n\r\n", b"hello"), (b"5\nhello\r\n0\r\n\r\n", 400), (b"5\r\nhelloX\r\n0\r\n\r\n", 400),
        (b"0x5\r\nhello\r\n0\r\n\r\n", 400), (b"+5\r\nhello\r\n0\r\n\r\n", 400), (b"5_\r\nhello\r\n0\r\n\r\n", 400),
        (b"\r\nhello\r\n0\r\n\r\n", 400), (b"5 \r\nhello\r\n0\r\n\r\n", 400), (b"-1\r\n\r\n", 400), (b"f" * 20 + b"\r\n", 400),
        (b"5;\x00\r\nhello\r\n0\r\n\r\n", 400), (b"0\r\nbad trailer\r\n\r\n", 400), (b"0\r\n" + b"a: b\r\n" * 200 + b"\r\n", 431),
        (b"1;" + b"x" * 5000 + b"\r\na\r\n0\r\n\r\n", 400), (b"1;" + b"x" * 4000 + b"\r\na\r\n0\r\n\r\n", b"a"),
        ((b"1;" + b"x" * 4000 + b"\r\na\r\n") * 20 + b"0\r\n\r\n", 400),
    ]  # fmt: skip

    @pytest.mark.parametrize(("body", "expected"), CHUNKED)
    def test_chunks(self, body: bytes, expected: bytes | int) -> None:
        for pieces in ([chunked() + body], [chunked(), *(byte_by_byte(body) if len(body) < 99 else [body])]):
            status, _, content = one(say(echo, *pieces))
            assert (status if status != 200 else content) == expected

    def test_mutated_chunks_are_read_or_refused(self) -> None:
        rng = random.Random(4)
        for _ in range(1000 + 50 * LONG):
            body = mutated(rng, rng.choice([row[0] for row in self.CHUNKED if len(row[0]) < 100]))
            answers = split(say(echo, chunked() + body))
            assert not answers or answers[0][0] in (200, 400, 431)

    def test_a_request_behind_a_body_is_answered(self) -> None:
        head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello"
        answers = split(say(echo, head + chunked() + b"2\r\nhi\r\n0\r\n\r\n" + get("/x")))
        assert [body for _, _, body in answers] == [b"hello", b"hi", b"GET /x\n"]

    def test_a_flood_of_small_chunks_is_no_work(self) -> None:
        begin = time.process_time()
        assert len(one(say(echo, chunked() + b"1\r\na\r\n" * 60_000 + b"0\r\n\r\n"))[2]) == 60_000
        assert time.process_time() - begin < 0.4  # it was 4 when the rest was copied for each

    @pytest.mark.parametrize("sent", [b"5\r\nhel", b"5\r\nhello\r\n", b"5\r\nhello\r\n0\r\n", b""])
    def test_a_body_that_breaks_off_is_not_taken_for_a_whole_one(self, sent: bytes) -> None:
        assert b"200 OK" not in say(echo, chunked() + sent)
        assert b"200 OK" not in say(echo, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhell")

    def test_a_file_that_shrinks_breaks_the_transfer_and_one_that_grows_does_not(self, tmp_path: object) -> None:
        path = tmp_path / "f"

        async def send(change: object) -> bytes:
            path.write_bytes(b"x" * 300_000)
            fd = os.open(path, os.O_RDONLY)
            body = ptth.FileBody(ptth.Found(fd, os.fstat(fd), b""), 0, 300_000)
            change()
            try:
                return b"".join([piece async for piece in body])
            finally:
                await body.aclose()

        def append() -> None:
            with open(path, "ab") as file:
                file.write(b"more")

        assert asyncio.run(send(append)) == b"x" * 300_000
        for change in (
            lambda: os.truncate(path, 10),
            lambda: (path.write_bytes(b"y" * 300_000), os.utime(path, (1, 1))),
        ):
            with pytest.raises(ptth.IncompleteBody):
                asyncio.run(send(change))

    @in_loop
    async def test_a_pace_is_kept(self) -> None:
        pace = ptth.RateLimiter(1_000_000)
        begin = asyncio.get_running_loop().time()
        for _ in range(10):
            await pace.wait(10_000)
        assert asyncio.get_running_loop().time() - begin >= 0.095


class TestConnections:
    """The two ends of a real connection, in one loop."""

    @staticmethod
    @contextlib.asynccontextmanager
    async def pair(small: bool = False) -> object:
        """Yield a connection and the socket at its other end, which has `small` buffers."""
        with socket.create_server(("127.0.0.1", 0)) as listening_:
            if small:
                listening_.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader, writer = await asyncio.open_connection(*listening_.getsockname(), limit=ptth.READ_SIZE)
            other, _ = listening_.accept()
        with other:
            other.setblocking(False)
            stream = ptth.Connection(reader, writer)
            yield stream, other
            stream.abort()

    @staticmethod
    async def swept(stream: ptth.Connection, work: object) -> object:
        """Return the result of `work` on a connection that is swept all the time."""
        task = asyncio.ensure_future(work)
        while not task.done():
            await asyncio.sleep(0.005)
            stream.sweep(stream.loop.time())
        return await task

    @in_loop
    async def test_a_peer_that_does_not_read_is_noticed_while_the_connection_is_read(self) -> None:
        async with self.pair(small=True) as (stream, _):
            stream.stall_timeout = 0.05
            reading = asyncio.ensure_future(stream.fill(3600))
            with pytest.raises(ConnectionError):
                await self.swept(stream, stream.send(bytes(50_000_000)))
            reading.cancel()

    @in_loop
    async def test_a_peer_that_reads_slowly_is_kept_until_it_stops(self) -> None:
        async with self.pair() as (stream, other):
            stream.writer.write(bytes(50_000_000))
            sending = asyncio.ensure_future(stream.send(b"."))
            await asyncio.sleep(0)
            for _ in range(5):
                before = stream._unsent
                while stream.transport.get_write_buffer_size() >= before:
                    await asyncio.sleep(0)
                    with contextlib.suppress(BlockingIOError):
                        other.recv(1_000_000)
                stream.sweep(math.inf)  # the deadline has passed, but some bytes have left
                assert not stream.is_closed()
            stream._unsent = 0
            stream.sweep(math.inf)
            with pytest.raises(ConnectionError):
                await sending

    @in_loop
    async def test_a_connection_that_is_closed_with_unsent_bytes_ends_in_time(self) -> None:
        async with self.pair(small=True) as (stream, _):
            stream.stall_timeout = 0.05
            ended = asyncio.Event()
            stream.on_close.append(ended.set)
            stream.writer.write(bytes(50_000_000))
            stream.close()
            assert not ended.is_set()
            await self.swept(stream, ended.wait())

    @in_loop
    async def test_a_connection_whose_close_has_ended_can_be_aborted(self) -> None:
        async with self.pair() as (stream, other):
            stream.transport.write(bytes(5_000_000))
            stream.close()
            while stream.transport.get_write_buffer_size():
                with contextlib.suppress(BlockingIOError):
                    other.recv(1 << 20)
                await asyncio.sleep(0)
            await asyncio.sleep(0)
            stream.abort()

    @pytest.mark.parametrize("size", [ptth.SPLICE_MIN, 3 * ptth.SPLICE_MIN])
    @in_loop
    async def test_a_body_that_has_arrived_with_the_end_of_the_stream_is_complete(self, size: int) -> None:
        async with self.pair() as (source, _), self.pair() as (sink, receiver):
            data = os.urandom(size)
            source.reader.feed_data(data)
            source.reader.feed_eof()
            body = ptth.IncomingBody(source, size)
            got = b""
            writing = asyncio.ensure_future(body.write_to(sink))
            while len(got) < size:
                await asyncio.sleep(0)
                with contextlib.suppress(BlockingIOError):
                    got += receiver.recv(1 << 20)
            await writing
            assert got == data and body.complete

    @pytest.mark.parametrize("framing", [5, ptth.CHUNKED, None])
    @in_loop
    async def test_a_body_whose_connection_fails_is_incomplete(self, framing: int | None) -> None:
        for error in (
            ConnectionResetError(),
            ssl.SSLError(1, "bad record mac"),
            OSError(errno.EHOSTUNREACH, "no route"),
        ):
            async with self.pair() as (stream, _):
                stream.reader.set_exception(error)
                with pytest.raises(ptth.IncompleteBody):
                    await ptth.IncomingBody(stream, framing).read()
        async with self.pair() as (stream, _):
            stream.abort()
            with pytest.raises(ptth.IncompleteBody):  # 100 Continue cannot be sent
                await ptth.IncomingBody(stream, framing, expects=True).read()

    @in_loop
    async def test_a_limit_holds_also_for_what_another_connection_receives(self) -> None:
        counted: list[int] = []

        class Counter(ptth.RateLimiter):
            async def wait(self, count: int) -> None:
                counted.append(count)

        async with self.pair() as (source, sender), self.pair() as (sink, receiver):
            limited = ptth.Connection(sink.reader, sink.writer, Counter(1 << 30))
            writing = asyncio.ensure_future(ptth.IncomingBody(source, ptth.SPLICE_MIN).write_to(limited))
            await asyncio.get_running_loop().sock_sendall(sender, bytes(ptth.SPLICE_MIN))
            while not writing.done():
                await asyncio.sleep(0)
                with contextlib.suppress(BlockingIOError):
                    receiver.recv(1 << 20)
            assert sum(counted) == ptth.SPLICE_MIN

    @staticmethod
    async def outcome(work: object) -> object:
        """Return the result of `work`, or the exception that it raised."""
        return (await asyncio.gather(work, return_exceptions=True))[0]

    splices = pytest.mark.skipif(not hasattr(os, "splice"), reason="no os.splice")
    sends_files = pytest.mark.skipif(not hasattr(os, "sendfile"), reason="no os.sendfile")

    @splices
    @in_loop
    async def test_a_large_body_goes_from_socket_to_socket(self, monkeypatch: Patch) -> None:
        moved = count_calls(monkeypatch, "splice")
        async with self.pair() as (source, sender), self.pair() as (sink, receiver):
            data = os.urandom(2 * ptth.SPLICE_MIN)
            body = ptth.IncomingBody(source, len(data))
            work = [
                asyncio.ensure_future(source.loop.sock_sendall(sender, data + b"next")),
                asyncio.ensure_future(body.write_to(sink)),
            ]
            got = b""
            while len(got) < len(data):
                got += await source.loop.sock_recv(receiver, 1 << 20)
            await asyncio.gather(*work)
            assert got == data and body.complete
            assert await source.fill(20) and source.buffer == b"next"  # nothing of the next message was taken
        assert sum(moved) > ptth.SPLICE_MIN

    @splices
    @pytest.mark.parametrize("end", ["short", "reset", "silent", "unread", "left"])
    @in_loop
    async def test_a_splice_says_how_it_ended(self, end: str) -> None:
        async with self.pair() as (source, sender), self.pair(small=True) as (sink, receiver):
            source.stall_timeout, sink.stall_timeout = 0.05 if end == "silent" else 60, 0.05 if end == "unread" else 60
            ptth.take_buffered(source)
            work = asyncio.ensure_future(self.outcome(sink.splice(source, 50_000_000)))
            data = bytes(50_000_000 if end in ("unread", "left") else 500)
            feeding = asyncio.ensure_future(source.loop.sock_sendall(sender, data))
            leaving = {"short": sender, "reset": sender, "left": receiver}.get(end)
            if leaving:
                assert len(await source.loop.sock_recv(receiver, 500)) == 500  # it has begun
                leaving.close() if end == "short" else reset(leaving)
            result = await work
            feeding.cancel()
            await asyncio.wait({feeding})
        assert isinstance(result, ptth.IncompleteBody if end == "short" else ConnectionResetError | BrokenPipeError)
        assert ("stalls" in str(result)) is (end in ("silent", "unread"))

    @splices
    @in_loop
    async def test_a_body_whose_connection_is_aborted_inside_a_splice_is_incomplete(self) -> None:
        async with self.pair() as (source, sender), self.pair() as (sink, receiver):
            body = ptth.IncomingBody(source, ptth.SPLICE_MIN)
            writing = asyncio.ensure_future(self.outcome(body.write_to(sink)))
            await source.loop.sock_sendall(sender, bytes(500))
            assert len(await source.loop.sock_recv(receiver, 500)) == 500  # it has begun
            source.abort()
            while source.sock.fileno() >= 0:
                await asyncio.sleep(0)
            sender.close()
            assert isinstance(await writing, ptth.IncompleteBody)

    @sends_files
    def test_a_file_goes_from_the_disk_to_the_socket(self, tmp_path: object, monkeypatch: Patch) -> None:
        data = os.urandom(3 * ptth.SMALL_BODY)
        (tmp_path / "x").write_bytes(data)
        sent = count_calls(monkeypatch, "sendfile")
        assert one(fetch_direct(str(tmp_path), get("/x")))[2] == data
        assert sum(sent) == len(data)

    @sends_files
    @in_loop
    async def test_a_file_goes_to_nobody_who_stalls(self, tmp_path: object) -> None:
        (tmp_path / "x").write_bytes(bytes(20_000_000))
        async with self.pair(small=True) as (stream, _):
            stream.stall_timeout = 0.05
            with open(tmp_path / "x", "rb") as file:
                result = await self.outcome(stream.send_file(file.fileno(), 0, 20_000_000))
        assert "stalls" in str(result)

    WAYS = [pytest.param("sendfile", marks=sends_files), pytest.param("splice", marks=splices), "send"]

    @pytest.mark.parametrize("by", WAYS)
    @in_loop
    async def test_fast_peers_do_not_keep_the_loop_from_the_others(
        self, by: str, tmp_path: object, monkeypatch: Patch
    ) -> None:
        turns = 0

        def turn() -> None:
            nonlocal turns
            turns += 1
            stream.loop.call_soon(turn)

        # The reader takes all at once, and the sender has all of it.
        if by != "send":
            monkeypatch.setattr(os, by, lambda first, second, *offset_and_count, **flags: offset_and_count[-1])
        async with self.pair() as (stream, _), self.pair() as (source, _):
            turn()
            if by == "sendfile":
                await stream.send_file(0, 0, 50 * ptth.SENDFILE_SIZE)
            elif by == "splice":
                await ptth.IncomingBody(source, 200 * ptth.SENDFILE_SIZE).write_to(stream)
            else:
                stream.is_plain, stream.transport.write = False, lambda data: None
                with open(tmp_path / "x", "wb+") as file:
                    file.truncate(50 * ptth.READ_SIZE)
                    found = ptth.Found(file.fileno(), os.fstat(file.fileno()), b"")
                    await ptth.FileBody(found, 0, 50 * ptth.READ_SIZE).write_to(stream)
        assert turns > 40

    @pytest.mark.parametrize("how", ["ends", "is silent", "sends much", "sends for long"])
    @in_loop
    async def test_lingering_takes_what_still_comes_and_ends(self, how: str, monkeypatch: Patch) -> None:
        for name, value in {
            "is silent": ("LINGER_TIMEOUT", 0.05),
            "sends much": ("MAX_LINGER", 3_000_000),
            "sends for long": ("MAX_LINGER_TIMEOUT", 0.1),
        }.items():
            monkeypatch.setattr(ptth, value[0], value[1] if how == name else 10**9)
        taken = 0

        async def send() -> None:
            nonlocal taken
            while how != "ends" or taken < 5_000_000:
                await stream.loop.sock_sendall(other, bytes(100_000))
                taken += 100_000
                await asyncio.sleep(3600 if how == "is silent" else 0.01 if how == "sends for long" else 0)
            other.shutdown(socket.SHUT_WR)

        async with self.pair() as (stream, other):
            sending = asyncio.ensure_future(send())
            assert await self.outcome(self.swept(stream, ptth.linger(stream))) is None
            assert await stream.loop.sock_recv(other, 1) == b""  # an end, and no reset
            sending.cancel()
        assert taken >= {"ends": 5_000_000, "sends much": 3_000_000}.get(how, 1)

    @in_loop
    async def test_both_ends_are_tuned(self) -> None:
        """Keepalive finds dead peers, NODELAY sends at once, NOTSENT_LOWAT shows the progress of slow readers."""
        expected = {"NODELAY": 1, "KEEPIDLE": 20, "KEEPINTVL": 5, "KEEPCNT": 3, "NOTSENT_LOWAT": ptth.WRITE_HIGH_WATER}
        server = ptth.HTTPServer(echo)
        async with listening(server) as port:
            client = client_of(port)
            stream = await client.connect()
            await stream.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            await stream.fill()
            (accepted,) = server.connections
            for sock in (stream.sock, accepted.sock):
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                for name, value in expected.items():
                    if hasattr(socket, f"TCP_{name}"):
                        assert sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}")) == value, name
            client.close()

    @in_loop
    async def test_an_old_idle_connection_is_closed(self, monkeypatch: Patch) -> None:
        server = ptth.HTTPServer(echo)
        async with listening(server) as port:
            client = client_of(port)
            await client.handle(ptth.Request("GET", "/", ptth.Headers()))
            (first,) = server.connections
            await client.handle(ptth.Request("GET", "/", ptth.Headers()))
            assert server.connections == {first}
            monkeypatch.setattr(ptth, "MAX_IDLE_AGE", -1)
            async with asyncio.timeout(5):
                while server.connections:
                    await asyncio.sleep(0.02)
            assert client.take_idle() is None
            client.close()


class TestHTTPServer:
    def test_pipelined_requests_are_answered_in_their_order(self) -> None:
        requests = b"".join(f"GET /{i} HTTP/1.1\r\nHost: a\r\n\r\n".encode() for i in range(50))
        assert [body for _, _, body in split(say(echo, requests))] == [f"GET /{i}\n".encode() for i in range(50)]

    CONNECTION = [  # (request, what Connection says in the answer, whether a second request is answered)
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", None, True), (b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", "close", False),
        (b"GET / HTTP/1.1\r\nHost: a\r\nConnection: x, Close\r\n\r\n", "close", False), (b"GET / HTTP/1.0\r\n\r\n", "close", False),
        (b"GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n", "keep-alive", True), (b"GET / HTTP/1.2\r\nHost: a\r\n\r\n", None, True),
        (b"\r\n\r\nGET / HTTP/1.1\r\nHost:\r\n\r\n", None, True), (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi", None, True),
        (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999\r\n\r\n" + b"x" * 99999, "close", False),
    ]  # fmt: skip

    @pytest.mark.parametrize(("request_", "connection", "second"), CONNECTION)
    def test_keeping_the_connection(self, request_: bytes, connection: str | None, second: bool) -> None:
        answers = split(say(echo, request_, b"GET /2 HTTP/1.1\r\nHost: a\r\n\r\n"))
        assert (answers[0][1].get("connection"), len(answers) == 2) == (connection, second)

    @pytest.mark.parametrize("framing", ["Content-Length: 5000", "Transfer-Encoding: chunked"])
    def test_a_client_that_resets_inside_a_body_is_no_fault(
        self, framing: str, background: Background, capfd: Output
    ) -> None:
        seen: queue.Queue[object] = queue.Queue()

        async def handler(request: ptth.Request) -> ptth.Response:
            seen.put(await request.body.read())
            try:
                return ptth.text_response(200, str(await request.body.read()))
            except (OSError, asyncio.CancelledError) as error:
                seen.put(error)
                raise

        with background.serve(handler, takes_bodies=True) as port:
            head = f"PUT / HTTP/1.1\r\nHost: a\r\n{framing}\r\n\r\n".encode()
            client = connect(port, head + ptth.format_chunk(b"x" * 1000))
            assert seen.get(timeout=20)
            reset(client)
            assert isinstance(seen.get(timeout=20), ptth.IncompleteBody | asyncio.CancelledError)
        assert capfd.readouterr().err == ""

    @pytest.mark.parametrize(("method", "statuses"), [("POST", [100, 200]), ("PUT", [200])])
    def test_100_continue_is_said_when_the_body_is_wanted(self, method: str, statuses: list[int]) -> None:
        """`echo` reads the body of a POST only."""
        head = f"{method} / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nExpect: 100-Continue\r\n\r\n".encode()
        answers = split(say(echo, head, *([b"hi"] if 100 in statuses else [])))
        assert [status for status, _, _ in answers] == statuses
        assert (answers[-1][1].get("connection") == "close") is (100 not in statuses)

    def test_a_body_of_unknown_length_is_chunked_or_ends_with_the_connection(self) -> None:
        async def generate() -> object:
            for piece in (b"one", b"", b"two"):
                yield piece

        async def handler(request: ptth.Request) -> ptth.Response:
            return ptth.Response(200, [], Stream(generate))

        status, fields, body = ask(handler, "/")
        assert (fields["transfer-encoding"], body) == ("chunked", b"onetwo")
        old = say(handler, b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        assert old.endswith(b"\r\n\r\nonetwo") and b"close" in old and b"chunked" not in old

    @pytest.mark.parametrize("method", ["GET", "POST", "PUT"])
    def test_a_body_that_cannot_be_read_is_refused_also_where_nobody_wants_it(self, method: str, capfd: Output) -> None:
        async def handler(request: ptth.Request) -> ptth.Response:
            return ptth.text_response(200, "here")

        head = f"{method} / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n".encode()
        assert one(say(handler, head + get("/")))[0] == 400
        assert "Traceback" not in capfd.readouterr().err

    def test_an_error_that_answers_head_has_no_body(self) -> None:
        for head in (b" HTTP/1.1\r\n\r\n", b"x" * 9000 + b" HTTP/1.1\r\n\r\n", b" HTTP/1.1\r\nHost: a\n\r\n"):
            assert say(echo, b"HEAD /" + head).endswith(b"\r\n\r\n")

    @pytest.mark.parametrize(
        ("error", "status"),
        [(TimeoutError(), 504), (ptth.IncompleteBody("x"), 502), (ptth.ProtocolError(418, "x"), 418), (OSError(), 500), (RuntimeError("secret"), 500)],
    )  # fmt: skip
    def test_what_a_handler_raises_is_its_own_fault_and_tells_the_client_nothing(
        self, error: Exception, status: int, capfd: Output
    ) -> None:
        async def broken(request: ptth.Request) -> ptth.Response:
            raise error

        answer = ask(broken, "/")
        assert answer[0] == status and b"secret" not in answer[2]
        told = capfd.readouterr().err
        assert ("Traceback" in told) is (status == 500)
        assert status != 500 or f"{type(error).__name__}: {error}".strip(": ") in told

    def test_a_request_body_that_ends_early_is_not_answered_and_one_that_stalls_is_408(
        self, background: Background, monkeypatch: Patch
    ) -> None:
        head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nshort"
        assert say(echo, head) == b""
        monkeypatch.setattr(ptth.Connection.fill, "__defaults__", (0.01,))
        with background.serve(echo) as port:
            assert one(fetch(port, head, half_close=False))[0] == 408

    def test_a_response_does_not_change_what_the_handler_keeps(self) -> None:
        kept = ptth.Response(200, [("X", "y")], ptth.BytesBody(b"again"))

        async def same(request: ptth.Request) -> ptth.Response:
            return kept

        assert [body for _, _, body in split(say(same, get("/"), get("/")))] == [b"again"]
        assert kept.headers == [("X", "y")]

    def test_requests_share_no_fields(self) -> None:
        heads = [ptth.parse_request_head(get("/")).headers for _ in range(2)]
        heads[0]["host"] = "changed"
        heads[0].pairs.clear()
        assert heads[1] == ptth.Headers([("Host", "example.com"), ("Connection", "close")])

    def test_a_client_that_sends_its_whole_body_first_still_reads_the_refusal(self, background: Background) -> None:
        async def refuse(request: ptth.Request) -> ptth.Response:
            raise ptth.ProtocolError(413, "no", close=True)

        with background.serve(refuse) as port:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            connection.request("POST", "/", body=bytes(20_000_000))
            assert connection.getresponse().status == 413
            connection.close()

    @pytest.mark.parametrize("tail", [b"", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 20_000])
    def test_a_client_that_resets_ends_its_request(self, tail: bytes, background: Background) -> None:
        begun, ended = threading.Event(), threading.Event()

        async def think(request: ptth.Request) -> ptth.Response:
            begun.set()
            try:
                await asyncio.sleep(60)
            finally:
                ended.set()
            raise AssertionError

        with background.serve(think) as port:
            for half_close in (False, True):
                begun.clear(), ended.clear()
                sock = connect(port)
                sock.setblocking(False)
                sock.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" + tail)
                assert begun.wait(20)
                if half_close:
                    sock.shutdown(socket.SHUT_WR)
                    assert not ended.wait(3 * ptth.SWEEP_INTERVAL)  # half-closed: the client waits for its response
                reset(sock)
                assert ended.wait(20)

    def test_of_what_is_pipelined_little_is_kept(self, background: Background) -> None:
        begun = threading.Event()
        release = asyncio.Event()

        async def think(request: ptth.Request) -> ptth.Response:
            begun.set()
            await release.wait()
            return ptth.text_response(200, "")

        server = ptth.HTTPServer(think)
        begin = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
        with background.inside(listening(server)) as port, connect(port, begin) as sock:
            assert begun.wait(20)
            fill(sock, begin * 10_000, 1 << 27)
            (stream,) = server.connections
            assert len(stream.buffer) + len(stream.reader._buffer) < 500_000
            background.loop.call_soon_threadsafe(release.set)

    def test_a_head_that_comes_too_slowly_is_408_and_an_idle_connection_is_closed(
        self, background: Background, monkeypatch: Patch
    ) -> None:
        monkeypatch.setattr(ptth, "IDLE_TIMEOUT", 0.01)
        monkeypatch.setattr(ptth, "HEAD_TIMEOUT", 0.01)
        with background.serve(echo) as port:
            assert one(fetch(port, b"GET / HT", half_close=False))[0] == 408
            assert fetch(port, b"", half_close=False) == b""

    def test_a_half_closed_request_is_answered_and_an_incomplete_one_is_not(self, files_tunnel: Tunnel) -> None:
        assert one(files_tunnel.fetch(b"GET /frontend/relay_up_check HTTP/1.1\r\nHost: a\r\n\r\n"))[0] == 200
        assert files_tunnel.fetch(b"GET /frontend/relay_up_check HTTP/1.1\r\nHost: a\r\n") == b""

    @pytest.mark.skipif(os.name == "nt", reason="another event loop")
    @in_loop
    async def test_a_transport_that_asyncio_ends_twice_is_not_reported(self, monkeypatch: Patch) -> None:
        loop, reported = asyncio.get_running_loop(), []
        loop.set_exception_handler(ptth.report_error)
        monkeypatch.setattr(loop, "default_exception_handler", reported.append)
        ours, theirs = socket.socketpair()

        class Writer(asyncio.Protocol):  # as TLS does: more to send when the buffer is empty
            def resume_writing(self) -> None:
                theirs.close()
                transport.write(b"x")

        transport, _ = await loop.create_connection(Writer, sock=ours)
        theirs.setblocking(False)
        transport.set_write_buffer_limits(0)
        transport.write(bytes(4_000_000))
        while theirs.fileno() >= 0:
            with contextlib.suppress(BlockingIOError):
                theirs.recv(1_000_000)
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        assert reported == [] and ours.fileno() < 0

    @in_loop
    async def test_the_access_log_has_one_clean_line_for_a_request(self, capfd: Output) -> None:
        log = ptth.AccessLog()
        head = f'GET {ptth.BACKEND}http_listen/n?key=secret HTTP/1.1\r\nHost: a\r\nUser-Agent: "\x9b\\\r\nReferer: r\r\n\r\n'
        log.add(with_peer(ptth.parse_request_head(head.encode("latin-1")), "192.0.2.1"), 200, 5)
        log.flush()
        assert re.fullmatch(
            r'192\.0\.2\.1 - - \[\d\d/[A-Z][a-z]{2}/\d{4}:\d\d:\d\d:\d\d \+0000\] "GET /7ZSFUKGV/http_listen/n HTTP/1\.1" 200 5 '
            r'"r" "\\x22\\x9b\\x5c"\n', capfd.readouterr().err,
        )  # fmt: skip

    @in_loop
    async def test_what_is_too_long_is_cut_before_it_is_escaped(self, capfd: Output) -> None:
        log = ptth.AccessLog()
        head = f"GET /{'x' * 5000} HTTP/1.1\r\nHost: a\r\nReferer: {chr(34) * 20_000}\r\nUser-Agent: {'y' * ptth.MAX_LOGGED}\r\n\r\n"
        log.add(ptth.parse_request_head(head.encode()), 200, 5)
        log.flush()
        _, what, _, referer, _, agent, _ = capfd.readouterr().err.split('"')
        assert what == "GET /" + "x" * (ptth.MAX_LOGGED - 5) + "..."
        assert referer == "\\x22" * ptth.MAX_LOGGED + "..." and agent == "y" * ptth.MAX_LOGGED

    HOSTILE = (
        '"', "a,", ",", ";q=1,", '"",', 'W/"a", ', ',"a', "0-1,", "\\", "\xff", ";", "close, ", "text/html;q=0,", "gzip ,", "<a,", "%", "=\t", "x,y;z=\"",
    )  # fmt: skip
    FIELDS = (
        "Accept", "Accept-Encoding", "Authorization", "Connection", "Content-Length", "Cookie", "Expect", "Host", "If-Match", "If-Modified-Since",
        "If-None-Match", "If-Range", "Max-Forwards", "Prefer", "PTTH-Instance", "Range", "Referer", "Transfer-Encoding", "User-Agent", "Via",
        "X-ApiKey", "X-Forwarded-For", "X-Forwarded-Host", "X-Whatever",
    )  # fmt: skip

    @staticmethod
    def steps(work: object) -> int:
        """Return the number of bytecode steps of `work`: unlike its time, the same on every machine."""
        count = 0

        def trace(frame: object, event: str, argument: object) -> object:
            nonlocal count
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            count += 1
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            work()
        finally:
            sys.settrace(before)
        return count

    @pytest.mark.parametrize("field", FIELDS)
    def test_no_request_head_is_much_work(self, field: str, root: str, monkeypatch: Patch) -> None:
        monkeypatch.setattr(ptth, "write_stderr", lambda text: None)
        site = ptth.with_site_options(ptth.site_handler(ptth.Site(root)), ptth.SiteOptions(auth="me:secret"), "n")
        server = ptth.HTTPServer(site, log=ptth.AccessLog())
        many = "".join(f"F{i}: x\r\n" for i in range(90))

        async def talk(data: bytes) -> None:
            await server._serve_connection(reader_of(data), FakeWriter())

        for hostile in self.HOSTILE:
            value = (hostile * 31_000)[:30_000]
            lines = "" if field == "Host" else "Host: a\r\n"
            head = f"OPTIONS /big HTTP/1.1\r\n{lines}{field}: {value}\r\n{many}\r\n".encode("latin-1")
            assert self.steps(lambda data=head: asyncio.run(talk(data))) < 100_000, hostile
            try:
                request = ptth.parse_request_head(head)
            except ptth.ProtocolError:
                continue
            assert self.steps(functools.partial(self.go_round, request)) < 100_000, hostile

    @staticmethod
    def go_round(request: ptth.Request) -> None:
        """Do what relay and server do with the head of a request."""
        with contextlib.suppress(ptth.ProtocolError):
            list(ptth.unpack_requests(ptth.pack_request("0" * 32, request, request.target, [], prefix="/p")))
        ptth.wants_json(request.headers)
        ptth.parse_wait(request.headers.get("prefer", ""))
        ptth.request_host(request.headers.get("host", ""))
        for name in ("range", "if-none-match"):
            headers = ptth.Headers([(name, "bytes=" + request.headers.get("x-whatever", ""))])
            ptth.evaluate_preconditions("GET", headers, '"a"', 0, 9, 0)
        ptth.evaluate_preconditions("GET", request.headers, '"a"', 0, 9, 0)

    @pytest.mark.parametrize(
        "field",
        ["Connection", "Content-Length", "Content-Type", "Link", "Set-Cookie", "Via", "WWW-Authenticate", "www-authenticate: x\r\nX"],
    )  # fmt: skip
    def test_no_response_head_is_much_work(self, field: str) -> None:
        many = "".join(f"X-{i}: x\r\nWWW-Authenticate: {'a b=c,' * (i % 5)}\r\n" for i in range(60))
        for hostile in (*self.HOSTILE, "a b=c, ", 'a realm="b",'):
            for more in (many, ""):
                value = (hostile * 45_000)[: 45_000 - len(more)]
                head = f"HTTP/1.1 401 No\r\n{field}: {value}\r\n{more}\r\n".encode("latin-1")
                status, headers = ptth.parse_inner_response(head)
                fence = functools.partial(ptth.shared_origin_fields, status, headers, server="n")
                assert self.steps(fence) < 100_000, hostile

    def test_a_list_with_a_quote_that_has_no_end_is_not_much_work(self) -> None:
        headers = ptth.Headers([("Link", '"' + '\\"' * 4000)])
        begin = time.thread_time()  # the work is one step: that of a regular expression
        assert ptth.shared_origin_fields(200, headers, server="n")[0][0] == "Via"
        assert time.thread_time() - begin < 0.05

    def test_a_target_of_dot_segments_is_not_much_work(self) -> None:
        for hostile in ("/a/..", "/", "%2e%2f", ";%2e", "/../", "\\..", "%25", "a%5c.."):
            for target in (hostile * (8190 // len(hostile)), "/a" * 2000 + "/.." * 1300):
                assert self.steps(functools.partial(ptth.climbs, target)) < 100_000
                assert self.steps(functools.partial(ptth.parse_path, "/" + target)) < 200_000


class TestHTTPClient:
    """`HTTPClient.handle` with a server that the test plays itself."""

    async def ask(self, reply: bytes, request: ptth.Request, *, chunks: int = 1, reads: bytes = b"") -> object:
        """Return (status, fields, body, bytes that the server got) for a server that responds after reading `reads`."""
        got = bytearray()
        ended = asyncio.Event()

        async def origin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):
                while reads not in got or b"\r\n\r\n" not in got:
                    piece = await reader.read(1 << 16)
                    if not piece:
                        break
                    got.extend(piece)
                for i in range(chunks):
                    writer.write(reply[i * len(reply) // chunks : (i + 1) * len(reply) // chunks])
                    await writer.drain()
                while piece := await reader.read(1 << 16):
                    got.extend(piece)
                    if reply.startswith(b"HTTP/1.0") or b"close" in reply:
                        break
            writer.close()
            ended.set()

        try:
            async with client_to(origin, "/base") as client, asyncio.timeout(20):
                sweeper = asyncio.create_task(ptth.sweep(client.connections))
                response = await client.handle(request)
                try:
                    body = await response.body.read_all(1 << 20)
                finally:
                    await response.body.aclose()
                return response.status, dict(response.headers), body, len(client.idle), bytes(got)
        finally:
            sweeper.cancel()
            await ended.wait()

    OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
    REPLIES = [  # reply, method, then the status, body and idle connections, or the error
        (OK, "GET", (200, b"hello", 1)),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK, "GET", (200, b"hello", 1)),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", "GET", (200, b"hello", 1)),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello", "GET", (200, b"hello", 0)),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello", "GET", (200, b"hello", 0)),
        (b"HTTP/1.0 200 OK\r\nConnection: Keep-Alive\r\nContent-Length: 5\r\n\r\nhello", "GET", (200, b"hello", 1)),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "GET", (204, b"", 1)),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", "GET", (304, b"", 1)),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", "HEAD", (200, b"", 0)),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello", "GET", 502),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nhello", "GET", 502),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", "GET", 502),
        (b"HTTP/1.1 999 Odd\r\n\r\n", "GET", 502),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 40_000 + b"\r\n\r\n", "GET", 502),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 101 + b"\r\n", "GET", 502),
        (b"SSH-2.0-x\r\n\r\n", "GET", 502),
        (b"HTTP/1.1 200 OK\nContent-Length: 5\n\nhello", "GET", 502),
    ]  # fmt: skip

    @pytest.mark.parametrize(("reply", "method", "expected"), REPLIES, ids=range(len(REPLIES)))
    @pytest.mark.parametrize("chunks", [1, 7])
    def test_replies(self, reply: bytes, method: str, expected: object, chunks: int) -> None:
        work = self.ask(reply, ptth.Request(method, "/x?y", ptth.Headers([("A", "b")])), chunks=chunks)
        if expected == 502:
            with pytest.raises(ptth.ProtocolError) as caught:
                asyncio.run(work)
            assert caught.value.status == 502
            return
        status, _, body, idle, got = asyncio.run(work)
        assert (status, body, idle) == expected
        assert got.startswith(f"{method} /base/x?y HTTP/1.1\r\nHost: 127.0.0.1:".encode())
        assert got.endswith(b"\r\nA: b\r\n\r\n")

    def test_a_path_is_not_put_before_an_asterisk(self) -> None:
        got = asyncio.run(self.ask(self.OK, ptth.Request("OPTIONS", "*", ptth.Headers())))[-1]
        assert got.startswith(b"OPTIONS * HTTP/1.1\r\n")

    @pytest.mark.parametrize(
        ("reply", "data"),
        [(OK, b"hello"), (OK.replace(b"5", b"0")[:-5], b""), (OK[:-1], None), (OK.replace(b"5", b"6"), None),
         (b"HTTP/1.1 200 OK\r\n\r\nhello", None)],
    )  # fmt: skip
    @in_loop
    async def test_a_body_that_has_arrived_with_its_head_is_in_memory(self, reply: bytes, data: bytes | None) -> None:
        """Only then can a server send it to its relay in a batch."""
        async with client_to(lambda reader, writer: writer.write(reply)) as client:
            response = await client.handle(ptth.Request("GET", "/", ptth.Headers([])))
            await response.body.aclose()
            assert response.body.data == data
            assert len(client.idle) == (data is not None)

    class Slow(ptth.Body):
        """A body that ends, or raises, when the test says so; `sent` counts its pieces."""

        complete = False

        def __init__(self, pieces: int, error: Exception | None = None) -> None:
            self.pieces, self.error, self.sent = pieces, error, 0

        async def __aiter__(self) -> object:
            for _ in range(self.pieces):
                self.sent += 1
                yield b"x" * 1000
                await asyncio.sleep(0)
            if self.error:
                raise self.error
            if self.pieces > 99:
                await asyncio.sleep(60)

    def test_a_body_of_unknown_length_goes_in_chunks(self) -> None:
        request = ptth.Request("POST", "/", ptth.Headers(), body=self.Slow(2))
        status, _, body, _, got = asyncio.run(self.ask(self.OK, request, reads=b"0\r\n\r\n"))
        assert (status, body) == (200, b"hello")
        chunk = b"3e8\r\n" + b"x" * 1000 + b"\r\n"
        assert got.endswith(b"Transfer-Encoding: chunked\r\n\r\n" + chunk + chunk + b"0\r\n\r\n")

    def test_an_early_response_comes_through_and_ends_the_request_body(self) -> None:
        request = ptth.Request("POST", "/", ptth.Headers(), body=self.Slow(100))
        status, _, content, idle, got = asyncio.run(self.ask(self.OK, request))
        assert (status, content, idle) == (200, b"hello", 0) and not got.endswith(b"0\r\n\r\n")

    def test_a_connection_with_an_incomplete_request_is_not_used_again(self) -> None:
        """The origin would take the next request for the rest of the body."""
        body = self.Slow(2, ConnectionResetError("that of another connection, from which the body came"))
        request = ptth.Request("POST", "/", ptth.Headers(), body=body)
        status, _, content, idle, _ = asyncio.run(self.ask(self.OK, request, reads=b"xxxxx"))
        assert (status, content, idle) == (200, b"hello", 0)

    @in_loop
    async def test_a_response_before_a_reset_comes_through(self) -> None:
        """An origin that answers and closes with unread bytes resets: what it sent can still be read."""

        async def upload() -> object:
            yield b"x" * 1000
            answering, _ = origin.accept()
            answering.sendall(b"HTTP/1.1 413 No\r\nContent-Length: 5\r\n\r\nlarge")
            reset(answering)
            yield b"y"  # written before the event loop has seen anything of that

        with socket.create_server(("127.0.0.1", 0)) as origin:
            client = client_of(origin.getsockname()[1])
            response = await client.handle(ptth.Request("POST", "/", ptth.Headers(), body=Stream(upload)))
            assert (response.status, await response.body.read_all(9)) == (413, b"large")
            await response.body.aclose()
            client.close()

    def test_a_body_that_breaks_is_never_whole_for_the_origin(self) -> None:
        body = self.Slow(2, ptth.IncompleteBody("the client left"))
        with pytest.raises(ptth.IncompleteBody, match="the client left"):
            asyncio.run(self.ask(b"", ptth.Request("POST", "/", ptth.Headers(), body=body), reads=b"never"))

    @pytest.mark.parametrize(
        ("reply", "reads", "sent"),
        [(b"HTTP/1.1 413 No\r\nContent-Length: 0\r\n\r\n", b"", 0), (OK, b"0\r\n\r\n", 1)],
    )
    def test_with_expect_a_refused_body_is_not_sent(
        self, reply: bytes, reads: bytes, sent: int, monkeypatch: Patch
    ) -> None:
        monkeypatch.setattr(ptth, "EXPECT_TIMEOUT", 0.01 if sent else 60)  # an origin that does not know Expect
        body = self.Slow(1)
        request = ptth.Request("PUT", "/", ptth.Headers([("Expect", "100-continue")]), body=body)
        status, *_ = asyncio.run(self.ask(reply, request, reads=reads))
        assert (status, body.sent) == (413 if not sent else 200, sent)

    @in_loop
    async def test_after_a_final_response_the_body_is_not_sent(self, monkeypatch: Patch) -> None:
        """Also when the response's body takes longer than the wait for 100 Continue."""
        monkeypatch.setattr(ptth, "EXPECT_TIMEOUT", 0.05)

        async def origin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 413 No\r\nContent-Length: 5\r\n\r\n")
            await asyncio.sleep(0.2)
            writer.write(b"large")
            await reader.read()
            writer.close()

        async with client_to(origin) as client:
            request = ptth.Request("PUT", "/", ptth.Headers([("Expect", "100-continue")]), body=self.Slow(1))
            response = await client.handle(request)
            assert (response.status, await response.body.read_all(9)) == (413, b"large")
            await response.body.aclose()
            assert len(client.idle) == 0  # the origin still waits for the body
        assert request.body.sent == 0

    @in_loop
    async def test_an_idle_connection_that_received_something_is_not_used_again(self) -> None:
        """An origin sends 408 before it closes: that is not the next response."""
        idle = asyncio.Event()

        async def origin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(self.OK)
            await idle.wait()
            writer.write(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
            writer.close()

        async with client_to(origin) as client:
            first = await client.handle(ptth.Request("GET", "/", ptth.Headers()))
            assert len(client.idle) == len(client.connections) == 1
            idle.set()
            await asyncio.sleep(0.05)  # so that it arrives
            second = await client.handle(ptth.Request("GET", "/", ptth.Headers()))
        assert [first.status, second.status] == [200, 200]

    @in_loop
    async def test_a_body_in_response_to_head_is_not_taken_for_the_next_response(self) -> None:
        async def origin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(asyncio.IncompleteReadError):
                while await reader.readuntil(b"\r\n\r\n"):
                    writer.write(self.OK.removesuffix(b"hello"))
                    await asyncio.sleep(0.05)  # as Nagle's algorithm delays it
                    writer.write(b"hello")
            writer.close()

        async with client_to(origin) as client:
            for method in ("HEAD", "GET", "HEAD"):
                response = await client.handle(ptth.Request(method, "/", ptth.Headers()))
                assert await response.body.read_all(100) == (b"hello" if method == "GET" else b"")
                await response.body.aclose()

    @in_loop
    async def test_408_on_an_idle_connection_is_not_the_response(self) -> None:
        """It may be on its way already when the request is sent."""
        taken = 0

        async def origin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal taken
            taken += 1
            await reader.readuntil(b"\r\n\r\n")
            writer.write(self.OK if taken < 3 else b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello")
            writer.close()

        async with client_to(origin) as client:
            answers = []
            for _ in range(3):  # the last 408 is on a new connection
                response = await client.handle(ptth.Request("GET", "/", ptth.Headers()))
                await response.body.aclose()
                answers.append((response.status, taken))
            assert answers == [(200, 1), (200, 2), (408, 3)]

    def test_an_upgrade_gives_two_plain_directions(self) -> None:
        request = ptth.Request("GET", "/", ptth.Headers(), body=self.Slow(1), upgrade="websocket")
        reply = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade, close\r\n\r\nhello"
        status, _, body, idle, got = asyncio.run(self.ask(reply, request))
        assert (status, body, idle) == (101, b"hello", 0)
        assert got.partition(b"\r\n\r\n")[0].endswith(b"Connection: Upgrade\r\nUpgrade: websocket")

    @in_loop
    async def test_only_a_repeatable_request_takes_an_idle_connection_and_is_repeated(self) -> None:
        taken = []

        async def origin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            taken.append(writer)
            with contextlib.suppress(asyncio.IncompleteReadError):
                while await reader.readuntil(b"\r\n\r\n"):
                    if len(taken) == 1 and taken.count(writer) > 1:
                        break  # the second request on the first connection: closed as it arrives
                    taken[:] = [*taken, writer] if len(taken) == 1 else taken
                    writer.write(self.OK)
            writer.close()

        async def ask(method: str) -> int:
            response = await client.handle(ptth.Request(method, "/", ptth.Headers()))
            assert await response.body.read_all(100) == b"hello"
            await response.body.aclose()
            return len(set(taken))

        async with client_to(origin) as client:
            assert await ask("GET") == 1
            assert await ask("GET") == 1
            assert await ask("POST") == 2
            for writer in set(taken):
                writer.close()
            assert await ask("GET") == 3

    @in_loop
    async def test_a_connection_that_only_a_get_could_take_is_not_kept_for_it(self) -> None:
        """All those of POST would be open for 20 seconds. And some origins do not read the body."""

        async def origin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(asyncio.IncompleteReadError):
                while head := await reader.readuntil(b"\r\n\r\n"):
                    assert head.startswith((b"GET", b"POST", b"PUT"))
                    writer.write(self.OK)
            writer.close()

        async with client_to(origin) as client:
            for body in (ptth.EMPTY, ptth.BytesBody(b"unread"), self.Slow(2)):
                for method in ("GET", "POST", "GET", "PUT"):
                    sent = ptth.EMPTY if method == "GET" else body
                    response = await client.handle(ptth.Request(method, "/", ptth.Headers(), body=sent))
                    assert await response.body.read_all(100) == b"hello"
                    await response.body.aclose()
            assert len(client.idle) == len(client.connections) == 1


ETAG = '"of-hello.txt"'  # the tables use it for the file's ETag, which depends on its inode
TEXT = {"content-type": "text/plain; charset=utf-8", "etag": ETAG, "last-modified": DATE, "accept-ranges": "bytes"}


class TestConnecting:
    URLS = [  # (URL, what is connected to, the Host field, path)
        ("https://r.example", ("r.example", 443), "r.example", ""), ("HTTP://R.Example:80/", ("r.example", 80), "r.example", ""),
        ("http://r.example:0008080/a/", ("r.example", 8080), "r.example:8080", "/a"), ("https://r.example:/", ("r.example", 443), "r.example", ""),
        ("http:/r.example", ("r.example", 80), "r.example", ""), (" https:///r.example\n", ("r.example", 443), "r.example", ""),
        ("http://[::1]:4000/", ("::1", 4000), "[::1]:4000", ""), ("http://[FE80::1%25eth0]", ("fe80::1%eth0", 80), "[fe80::1]", ""),
        ("http://[fe80::1%en0.5]:1", ("fe80::1%en0.5", 1), "[fe80::1]:1", ""), ("http://[fe80::1%252]", ("fe80::1%2", 80), "[fe80::1]", ""),
        ("http://[fe80::1%25]", ("fe80::1%25", 80), "[fe80::1]", ""), ("http://[0:0::0:1]", ("::1", 80), "[::1]", ""),
        ("http://[2001:DB8:0::1]", ("2001:db8::1", 80), "[2001:db8::1]", ""), ("https://relay.example.", ("relay.example.", 443), "relay.example.", ""),
        ("https://b\u00fccher.example", ("xn--bcher-kva.example", 443), "xn--bcher-kva.example", ""),
        ("https://STRA\u1e9eE\uff61example", ("xn--strae-oqa.example", 443), "xn--strae-oqa.example", ""),
        ("http://my_box-1/", ("my_box-1", 80), "my_box-1", ""), ("http://rel%61y.example", ("relay.example", 80), "relay.example", ""),
        ("http://127.1:5", ("127.0.0.1", 5), "127.0.0.1:5", ""), ("http://0x7f000002", ("127.0.0.2", 80), "127.0.0.2", ""),
        ("http://demo.localhost:1", ("demo.localhost", 1), "demo.localhost:1", ""), ("http://localhost.", ("localhost.", 80), "localhost.", ""),
    ]  # fmt: skip

    @pytest.mark.parametrize(("url", "address", "authority", "path"), URLS)
    def test_addresses_in_the_forms_of_curl(
        self, url: str, address: tuple[str, int], authority: str, path: str
    ) -> None:
        origin = ptth.parse_base_url(url)
        assert ((origin.host, origin.port), origin.authority, origin.path) == (address, authority, path)
        assert origin.tls is url.strip().lower().startswith("https")

    NO_URLS = [
        "ftp://a", "a.example", "http://", "http:////a", "http://a b", "http://a/?q", "http://a/#f", "http://a:x", "http://a:0", "http://a:65536", "http://a..b",
        f"http://{'a' * 80}.b", f"http://{'a.' * 127}b", "http://.", "http://.a", "http://::1:80/", "http://[::1", "http://[1.2.3.4]", "http://[v1.x]", "http://[::1]x:1",
        "http://[fe80::1%]", "http://[fe80::1%e h]", "http://u:p@a", "http://a\\b", "http://a%2fb", "http://a%00b", "http://256.1.1.1", "http://1.2.3.4.5", "http://a/\u00e4",
        "http://a/ b", "http://-\u2260.\u00fc..b", "https:r.example", "http://a%zz", "http://a\x00", "http://a$b",
    ]  # fmt: skip

    @pytest.mark.parametrize("url", NO_URLS)
    def test_a_url_that_cannot_be_used_is_refused(self, url: str) -> None:
        with pytest.raises(ValueError, match=r"^its? "):
            ptth.parse_base_url(url)

    PROXIES = [
        ("http://p:3128", "p:3128", None), ("p:3128", "p:3128", None), ("HTTP://P/", "p:80", None), ("http://u:p%40@[::1]:1/", "[::1]:1", b"u:p@"),
        ("u:p@p:1", "p:1", b"u:p"), ("u@p:1", "p:1", b"u:"), ("http://DOM\\u:p:q@p:1", "p:1", b"DOM\\u:p:q"), ("http://u:a@b@p:1", "p:1", b"u:a@b"),
        ("http://u:%2f%3F%23%ff@p", "p:80", b"u:/?#\xff"), ("http://u:5%@p", "p:80", b"u:5%"), ("http://\u00fc:\u00e4@p", "p:80", "\u00fc:\u00e4".encode()),
        ("http://[fe80::1%25eth0]:3128", "[fe80::1%eth0]:3128", None), (" p:1\n", "p:1", None), ("http://@p:1", "p:1", None),
    ]  # fmt: skip

    @pytest.mark.parametrize(("url", "place", "login"), PROXIES)
    def test_a_proxys_url(self, url: str, place: str, login: bytes | None) -> None:
        proxy = ptth.parse_proxy(url)
        basic = [] if login is None else [("Proxy-Authorization", f"Basic {base64.b64encode(login).decode()}")]
        assert (proxy.origin.place, proxy.fields) == (place, basic)

    NO_PROXIES = [
        ("http://alice:80#hunter2@proxy:3128", "%23"), ("http://alice:hun/ter2@p:1", "%2F"), ("http://alice:hun?ter2@p", "%3F"), ("alice:/hunter2@p:1", "http://"),
        ("http://alice:hun@ter2/@p", "%2F"), ("https://u:hunter2@p", "TLS"), ("socks5h://u:hunter2@p:1", "SOCKS"), ("SOCKS4://p", "SOCKS"), ("ftp://hunter2@p", "http://"),
        ("http://p:hunter2", "port"), ("http://u:hunter2", "port"), ("http://p:1/hunter2.pac", "PAC"), ("http://p:1?hunter2", "query"), ("http://", "host"),
        ("http://u:p@[hunter2]:1", "host"), ("http://u:hunter2@:1", "host"), ("http://u:p@hunter2:99999", "port"), ("http://u:p@\u2100hunter2", "host"),
    ]  # fmt: skip

    @pytest.mark.parametrize(("url", "word"), NO_PROXIES)
    def test_a_proxys_url_that_cannot_be_used_is_refused_without_its_password(self, url: str, word: str) -> None:
        config = ptth.ServerConfig("s.toml", proxy_url=url)
        with pytest.raises(ptth.UserError) as caught:
            ptth.find_proxy(config, ptth.NO_URL)
        assert word in caught.value.args[0] and "s.toml: proxy_url" in caught.value.args[0]
        shown = "".join(traceback.format_exception(caught.value)).split("UserError", 1)[1]
        assert not re.search("alice|hun|ter2", shown) and caught.value.__suppress_context__

    EXEMPT = [  # (NO_PROXY, URL, whether no proxy is used)
        ("*", "http://a.example", True), ("b, *", "http://a.example", True), ("a.example", "http://A.example.", True), (".example", "http://a.example", True),
        (".example.", "http://example", True), ("*.example", "http://a.b.example", True), ("example", "http://a.badexample", False), ("A.Example", "http://a.example", True),
        ("b\tc a.example", "http://a.example", True), ("a.example:80", "http://a.example", True), ("a.example:81", "http://a.example", False), (":80", "http://a.example", False),
        ("10.0.0.0/8", "http://10.1.2.3", True), ("10.0.0.0/8", "http://11.1.2.3", False), ("10.1.2.3", "http://10.1.2.3:9", True), ("0.0.1", "http://10.0.0.1", False),
        ("10.0.0.0/8:80", "http://10.0.0.1:80", True), ("10.0.0.1:81", "http://10.0.0.1", False), ("[::1]", "http://[::1]", True), ("::1", "http://[0::1]:80", True),
        ("[::1]:81", "http://[::1]", False), ("[::1]:80", "http://[::1]", True), ("fe80::/10", "http://[fe80::1%25eth0]", True), ("[fe80::]/10", "http://[fe80::1%eth0]", True),
        ("fe80::1%eth0", "http://[fe80::1%eth0]", True), ("b\u00fccher.example", "http://b\u00fccher.example", True), ("", "http://a.example", False), (" ,, ", "http://a.example", False),
        ("10.0.0.0/99,a..b,[,/,:,.", "http://a.example", False), ("0.0.0.0/0", "http://[::1]", False), ("127.1", "http://127.0.0.1", True),
    ]  # fmt: skip

    @pytest.mark.parametrize(("exceptions", "url", "exempt"), EXEMPT)
    def test_no_proxy(self, exceptions: str, url: str, exempt: bool, variables: object) -> None:
        variables(HTTP_PROXY="http://p:1", NO_PROXY=exceptions)
        assert ptth.proxy_from_environment(ptth.parse_base_url(url)) == ("" if exempt else "http://p:1")

    VARIABLES = [  # (environment, the proxy of an https relay)
        ({"HTTPS_PROXY": "a"}, "a"), ({"https_proxy": "a", "HTTPS_PROXY": "b"}, "a"), ({"HTTP_PROXY": "a"}, ""), ({"ALL_PROXY": "a"}, "a"), ({"all_proxy": "a", "https_proxy": "b"}, "b"),
        ({"all_proxy": "a", "no_proxy": "r.example"}, ""), ({"HTTPS_PROXY": "a", "no_proxy": "b", "NO_PROXY": "r.example"}, "a"), ({}, ""),
    ]  # fmt: skip

    @pytest.mark.parametrize(("values", "url"), VARIABLES)
    def test_the_variables_of_a_proxy(self, values: dict[str, str], url: str, variables: object) -> None:
        variables(**values)
        assert ptth.proxy_from_environment(ptth.parse_base_url("https://r.example")) == url

    @staticmethod
    def resolve(monkeypatch: Patch, *addresses: str) -> None:
        """Make names below .example resolve to these addresses."""
        real = socket.getaddrinfo

        def getaddrinfo(host: str, port: int, *args: int, **options: int) -> list[object]:
            if not str(host).endswith(".example"):
                return real(host, port, *args, **options)
            return [found for address in addresses for found in real(address, port, type=socket.SOCK_STREAM)]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    @contextlib.contextmanager
    def swallowing(self, address: str, port: int) -> object:
        """Return an address at which connecting hangs: the queue of its socket is full."""
        with socket.socket() as full, contextlib.ExitStack() as clients:
            full.bind((address, port))
            full.listen(0)
            for _ in range(4):
                client = clients.enter_context(socket.socket())
                client.setblocking(False)
                client.connect_ex((address, port))
            yield

    @pytest.mark.parametrize("through", ["direct", "proxy", "CONNECT"])
    @pytest.mark.parametrize("first", ["refuses", "swallows"])
    @pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 and full queues are Linux's")
    def test_every_address_is_tried(self, first: str, through: str, monkeypatch: Patch) -> None:
        self.resolve(monkeypatch, "127.0.0.2", "127.0.0.1")
        monkeypatch.setattr(ptth, "CONNECT_DELAY", 0.01)
        proxy = FakeProxy(b"HTTP/1.1 200 OK\r\n\r\n")
        there = ptth.parse_base_url(f"http://two.example:{proxy.port}")
        client = ptth.HTTPClient(there)
        if through != "direct":
            client = ptth.HTTPClient(ptth.parse_base_url("http://r"), ptth.ForwardProxy(there, []))

        async def reach() -> None:
            if through == "CONNECT":
                client._tls = ssl.create_default_context()
            with contextlib.suppress(OSError):  # the proxy does not speak TLS
                (await client.connect()).close()

        with self.swallowing("127.0.0.2", proxy.port) if first == "swallows" else contextlib.nullcontext():
            asyncio.run(reach())
        proxy.close()
        assert proxy.connections == 1

    @pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is Linux's")
    def test_what_no_address_takes_is_said_once(self, monkeypatch: Patch) -> None:
        self.resolve(monkeypatch, "127.0.0.2", "127.0.0.3")
        with pytest.raises(OSError) as caught:
            asyncio.run(self.reach(f"http://two.example:{free_port()}"))
        assert ptth.format_error(caught.value) == "connection refused"

    TLS = "TLS begins"
    ANSWERS = [  # (a proxy's answer to CONNECT, words of the error)
        (b"HTTP/1.1 200 OK\r\n\r\n", TLS), (b"HTTP/1.0 200 Connection established\r\n\r\n", TLS), (b"HTTP/1.1 299 Fine\r\nContent-Length: 9\r\n\r\n", TLS),
        (b"HTTP/1.1 201 Made\r\nTransfer-Encoding: chunked\r\n\r\n", TLS), (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hint\r\nA: b\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", TLS),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", "bytes of its own"), (b"HTTP/1.1 101 Switch\r\n\r\n", "101"), (b"HTTP/1.1 304 Not\r\n\r\n", "304"),
        (b"HTTP/1.1 407 No\r\nProxy-Authenticate: Basic realm=x\r\nContent-Length: 0\r\n\r\n", "USER:PASSWORD"), (b"HTTP/1.1 407 No\r\n\r\n", "USER:PASSWORD"),
        (b"HTTP/1.1 407 No\r\nProxy-Authenticate: Negotiate\r\nProxy-Authenticate: NTLM\r\n\r\n", "Negotiate, NTLM"), (b"HTTP/1.1 403 No\r\n\r\n", "allow"),
        (b"HTTP/1.1 407 No\r\nProxy-Authenticate: Digest realm=\"a, b\", BASIC realm=c\r\n\r\n", "USER:PASSWORD"),
        (b"HTTP/1.1 503 No\r\n\r\n", "503"), (b"HTTP/1.1 405 No\r\n\r\n", "CONNECT"), (b"SSH-2.0-x\r\n\r\n", "cannot be read"), (b"", "closed"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 1000, "interim"), (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 9000, "too large"),
    ]  # fmt: skip

    @staticmethod
    async def reach(url: str, proxy: str = "") -> None:
        """Connect to a URL, perhaps by a proxy, and leave."""
        client = ptth.HTTPClient(ptth.parse_base_url(url), ptth.parse_proxy(proxy) if proxy else None)
        (await client.connect()).close()

    @pytest.mark.parametrize(("answer", "words"), ANSWERS, ids=range(len(ANSWERS)))
    def test_what_a_proxy_answers_to_connect(self, answer: bytes, words: str) -> None:
        proxy = FakeProxy(answer)
        with pytest.raises(OSError) as caught:
            asyncio.run(self.reach("https://[fe80::1%25eth0]/x", f"127.0.0.1:{proxy.port}"))
        proxy.close()
        head = f"CONNECT [fe80::1]:443 HTTP/1.1\r\nHost: [fe80::1]:443\r\nUser-Agent: ptth/{ptth.__version__}\r\n\r\n"
        assert proxy.asked == [head.encode()]
        assert proxy.tls is (words == self.TLS)
        if words != self.TLS:
            assert isinstance(caught.value, ptth.Refused)
            assert words in str(caught.value) and f"the proxy at 127.0.0.1:{proxy.port} " in str(caught.value)

    def test_a_login_that_a_proxy_does_not_accept(self) -> None:
        proxy = FakeProxy(b"HTTP/1.1 407 No\r\n\r\n")
        with pytest.raises(ptth.Refused, match="does not accept this user"):
            asyncio.run(self.reach("https://r.example", f"u:p@127.0.0.1:{proxy.port}"))
        proxy.close()
        assert b"\r\nProxy-Authorization: Basic dTpw\r\n" in proxy.asked[0]

    @pytest.mark.parametrize("scheme", ["http", "https"])
    @pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
    def test_a_proxy_that_is_down_is_named(self, host: str, scheme: str) -> None:
        place = f"{host}:{free_port()}"
        with pytest.raises(ptth.Refused, match=f"the proxy at {re.escape(place)} cannot be reached: "):
            asyncio.run(self.reach(f"{scheme}://r.example", place))

    def test_a_peer_that_is_silent(self, monkeypatch: Patch) -> None:
        monkeypatch.setattr(ptth, "CONNECT_TIMEOUT", 0.05)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            place = f"127.0.0.1:{silent.getsockname()[1]}"
            said = f"the proxy at {place} does not answer CONNECT r:443: no answer in time"
            with pytest.raises(ptth.Refused, match=said):
                asyncio.run(self.reach("https://r", place))
            with pytest.raises(TimeoutError) as caught:  # within TLS
                asyncio.run(self.reach(f"https://{place}"))
            assert ptth.format_error(caught.value) == "no answer in time"

    @pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6")
    def test_a_zone_says_where_to_connect(self) -> None:
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as sock:
            for zone in socket.if_nameindex()[0]:  # its number and its name
                asyncio.run(self.reach(f"http://[::1%25{zone}]:{sock.getsockname()[1]}"))

    @pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6")
    @pytest.mark.parametrize("name", ["localhost", "localhost.", "demo.localhost"])
    @pytest.mark.parametrize(("address", "known"), [("::1", "127.0.0.1"), ("127.0.0.1", "::1")])
    def test_localhost_is_both_addresses(self, address: str, known: str, name: str, monkeypatch: Patch) -> None:
        """On many systems, such as containers, the name has only one of them; Node listens on ::1."""
        real = socket.getaddrinfo
        table = {"localhost": known}
        monkeypatch.setattr(socket, "getaddrinfo", lambda host, *more, **how: real(table.get(host, host), *more, **how))
        with socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET) as sock:
            url = f"http://{name}:{sock.getsockname()[1]}"
            asyncio.run(self.reach(url))
        with pytest.raises(ConnectionRefusedError):
            asyncio.run(self.reach(url))

    @pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6")
    @in_loop
    async def test_localhost_is_looked_up_again_when_the_app_has_moved(self, monkeypatch: Patch) -> None:
        lookups = []
        real = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **how: lookups.append(args[0]) or real(*args, **how))
        client, port = None, 0
        for address, count in (("127.0.0.1", 1), ("::1", 2)):
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            with socket.create_server((address, port), family=family) as sock:
                port = sock.getsockname()[1]
                client = client or ptth.HTTPClient(ptth.parse_base_url(f"http://localhost:{port}"))
                for _ in range(3):
                    connection = await client.connect()
                    assert connection.peer == address
                    connection.close()
            assert lookups.count("localhost") == count
        client.close()

    @in_loop
    async def test_an_app_that_resets_at_once_leaves_no_address(self, monkeypatch: Patch) -> None:
        lookups = []
        real = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **how: lookups.append(args[0]) or real(*args, **how))
        with socket.create_server(("127.0.0.1", 0)) as sock:
            client = ptth.HTTPClient(ptth.parse_base_url(f"http://localhost:{sock.getsockname()[1]}"))
            with monkeypatch.context() as reset:  # asyncio asks for the peer's name after the connection was opened
                reset.setattr(asyncio.StreamWriter, "get_extra_info", self.without_peer)
                assert (await client.connect()).peer == "-"
        with pytest.raises(OSError, match="Connect call failed"):  # to one address, or to two
            await client.connect()
        client.close()
        assert set(lookups) == {"localhost"}

    @staticmethod
    def without_peer(writer: asyncio.StreamWriter, name: str) -> object:
        return None if name == "peername" else writer.transport.get_extra_info(name)

    def test_what_is_sent_names_the_program(self) -> None:
        for proxy in (None, ptth.parse_proxy("u:p@p:1")):
            client = ptth.HTTPClient(ptth.parse_base_url("http://r.example/x"), proxy)
            request = ptth.Request("GET", "/y", ptth.Headers([("A", "b")]))
            target, *lines = client._format_request(request).decode().splitlines()
            assert target == f"GET {'http://r.example' if proxy else ''}/x/y HTTP/1.1"
            assert lines[:2] == ["Host: r.example", f"User-Agent: ptth/{ptth.__version__}"]
            assert ("Proxy-Authorization: Basic dTpw" in lines) is (proxy is not None)

    def test_what_is_forwarded_keeps_its_fields(self) -> None:
        fields = [("Host", "visitor.example"), ("Accept", "*/*")]
        request = ptth.Request("GET", "/", ptth.Headers(fields))
        head = ptth.HTTPClient(ptth.parse_base_url("http://app"))._format_request(request)
        assert head == ptth.format_request_head("GET", "/", fields)

    @needs("openssl")
    @pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6")
    @in_loop
    async def test_the_name_that_a_certificate_must_have(self, tmp_path: object) -> None:
        sock = ptth.open_socket("", 0)
        server = ptth.HTTPServer(echo, tls=make_certificate(tmp_path))
        await server.listen(sock)

        def client_at(host: str) -> ptth.HTTPClient:
            client = ptth.HTTPClient(ptth.parse_base_url(f"https://{host}:{sock.getsockname()[1]}"))
            client._tls = ssl.create_default_context(cafile=tmp_path / "cert")
            return client

        for host in ("localhost", "localhost.", "LOCALHOST", "[::1]", "[::1%251]"):
            client = client_at(host)
            response = await client.handle(ptth.Request("GET", "/x", ptth.Headers()))
            assert await response.body.read() == b"GET /x\n"
            await response.body.aclose()
            client.close()
        with pytest.raises(ssl.SSLError):
            await client_at("127.0.0.1").connect()
        await server.stop(0.1)

    @staticmethod
    def read_head(*pieces: bytes, patience: float = 20, pause: float = 0) -> tuple[int, ptth.Headers]:
        """Read a response's head that arrives in these pieces."""

        async def read() -> tuple[int, ptth.Headers]:
            reader = asyncio.StreamReader()

            async def feed() -> None:
                for piece in pieces:
                    reader.feed_data(piece)
                    await asyncio.sleep(pause)
                reader.feed_eof()

            feeding = asyncio.create_task(feed())
            try:
                return await ptth.read_response_head(ptth.Connection(reader, FakeWriter()), patience)
            finally:
                feeding.cancel()

        return asyncio.run(read())

    def test_interim_responses_are_passed_over_but_not_without_end(self) -> None:
        interim, last = b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n", b"HTTP/1.1 204 No Content\r\nA: b\r\n\r\n"
        assert self.read_head(interim * ptth.MAX_INTERIM + last) == (204, {"a": "b"})
        assert self.read_head(interim, interim + last[:9], last[9:]) == (204, {"a": "b"})
        assert self.read_head(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n" + interim)[0] == 101
        with pytest.raises(ptth.ProtocolError, match="interim"):
            self.read_head(interim * (ptth.MAX_INTERIM + 1) + last)

    @pytest.mark.parametrize("piece", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 100 Continue\r\n\r\n"])
    def test_a_head_has_one_time_limit_however_it_comes(self, piece: bytes) -> None:
        pieces = [piece] if b"100" in piece else [piece, *[b"x"] * 20000]
        with pytest.raises((TimeoutError, ptth.ProtocolError), match="too slowly"):
            self.read_head(*pieces, *[b"x"] * 20000, patience=0.05, pause=0.001)


class TestFileServer:
    FILES = [  # (path, fields, status, some of the answer's fields, body or None): the same directly and tunnelled
        ("/hello.txt", [], 200, TEXT, HELLO),
        ("/hello.txt?query", [], 200, TEXT, HELLO),
        ("/./sub/..//hello%2etxt", [], 200, TEXT, HELLO),
        ("/empty", [], 200, {"content-length": "0"}, b""),
        ("/page.html", [], 200, {"content-type": "text/html", "x-content-type-options": "nosniff"}, b"<p>page</p>\n"),
        ("/noext", [], 200, {"content-type": "text/plain; charset=utf-8"}, b"?"),
        ("/a%20b%26c%3Cd%3E%22e%27%23%25%3F.txt", [], 200, {}, b"odd\n"),
        ("/%C3%BCml%C3%A4ut.txt", [], 200, {}, b"umlaut\n"),
        ("/bytes%FF%fe", [], 200, {}, b"not UTF-8\n"),
        ("/bytes\xff\xfe", [], 200, {}, b"not UTF-8\n"),
        ("/new%0Aline", [], 200, {}, b"newline\n"),
        ("/back\\slash", [], 200, {}, b"backslash\n"),
        ("/a:b", [], 200, {}, b"colon\n"),
        ("/big", [], 200, {"content-length": "262144", "content-type": "application/octet-stream"}, bytes(range(256)) * 1024),
        ("/inside", [], 200, {"content-type": "text/plain; charset=utf-8"}, HELLO),
        ("/insub/file", [], 200, {}, b"in sub\n"),
        ("/index/", [], 200, {"content-type": "text/html"}, b"the index\n"),
        ("/index/", ["Accept: application/json, text/plain, */*"], 200, {"content-type": "text/html", "vary": None}, b"the index\n"),
        ("/.well-known/x", [], 200, {}, b"well known\n"),
        ("/sub", [], 301, {"location": "./sub/"}, None),
        ("/sub?a=b&c", [], 301, {"location": "./sub/?a=b&c"}, None),
        ("/sub%20dir", [], 301, {"location": "./sub%20dir/"}, None),
        ("/a:d", [], 301, {"location": "./a%3Ad/"}, None),
        ("/.//sub", [], 301, {"location": "./sub/"}, None),
        ("/insub", [], 301, {"location": "./insub/"}, None),
        *((path, [], 404, {}, None) for path in (
            "/missing", "/hello.txt/", "/hello.txt/x", "/sub%2Ffile", "/outside", "/outdir/secret", "/up/secret", "/dangling", "/loop",
            "/fifo", "/.secret", "/.git/config", "/sub/../.secret", "/%2esecret", "/" + "x" * 300, "/bytes", "/..%2fhello.txt", "/loop/x",
        )),  # fmt: skip
        *((path, [], 400, {}, None) for path in ("/%", "/%zz", "/%4", "/hello.txt%00", "/%00")),
        ("/hello.txt", ["If-None-Match: " + ETAG], 304, {"etag": ETAG}, b""),
        ("/hello.txt", ["If-None-Match: W/" + ETAG], 304, {}, b""),
        ("/hello.txt", ['If-None-Match: "x", ' + ETAG], 304, {}, b""),
        ("/hello.txt", ["If-None-Match: *"], 304, {}, b""),
        ("/hello.txt", ['If-None-Match: "x"'], 200, {}, HELLO),
        ("/hello.txt", ['If-None-Match: "x"', "If-Modified-Since: " + DATE], 200, {}, HELLO),
        ("/hello.txt", ["If-Modified-Since: " + DATE], 304, {"last-modified": DATE}, b""),
        ("/hello.txt", ["If-Modified-Since: Tuesday, 14-Nov-23 22:13:20 GMT"], 304, {}, b""),
        ("/hello.txt", ["If-Modified-Since: Tue Nov 14 22:13:19 2023"], 200, {}, HELLO),
        ("/hello.txt", ["If-Modified-Since: yesterday"], 200, {}, HELLO),
        ("/hello.txt", ["If-Match: " + ETAG], 200, {}, HELLO),
        ("/hello.txt", ["If-Match: W/" + ETAG], 412, {}, None),
        ("/hello.txt", ['If-Match: "x"', "If-None-Match: " + ETAG], 412, {}, None),
        ("/hello.txt", ["If-Unmodified-Since: Tue, 14 Nov 2023 22:13:19 GMT"], 412, {}, None),
        ("/hello.txt", ["If-Unmodified-Since: " + DATE], 200, {}, HELLO),
        ("/hello.txt", ["If-Match: *", "If-Unmodified-Since: Tue, 14 Nov 2023 22:13:19 GMT"], 200, {}, HELLO),
        ("/hello.txt", ["Range: bytes=7-"], 206, {"content-range": "bytes 7-12/13", "content-length": "6"}, b"world\n"),
        ("/hello.txt", ["Range: bytes=-1"], 206, {"content-range": "bytes 12-12/13"}, b"\n"),
        ("/hello.txt", ["Range: bytes=0-99"], 206, {"content-range": "bytes 0-12/13"}, HELLO),
        ("/hello.txt", ["Range: bytes=13-"], 416, {"content-range": "bytes */13"}, None),
        ("/hello.txt", ["Range: bytes=20-,1-1"], 206, {"content-range": "bytes 1-1/13"}, b"e"),
        ("/hello.txt", ["Range: bytes=x"], 200, {}, HELLO),
        ("/hello.txt", ["Range: bytes=0-0", "Range: bytes=1-1"], 200, {}, HELLO),
        ("/hello.txt", ["Range: bytes=1-1", "If-Range: " + ETAG], 206, {}, b"e"),
        ("/hello.txt", ["Range: bytes=1-1", "If-Range: W/" + ETAG], 200, {}, HELLO),
        ("/hello.txt", ["Range: bytes=1-1", "If-Range: " + DATE], 206, {}, b"e"),
        ("/hello.txt", ["Range: bytes=1-1", "If-Range: Tue, 14 Nov 2023 22:13:21 GMT"], 200, {}, HELLO),
        ("/hello.txt", ["Range: bytes=1-1", "If-None-Match: " + ETAG], 304, {}, b""),
        ("/big", ["Range: bytes=1000-200999"], 206, {"content-range": "bytes 1000-200999/262144"}, (bytes(range(256)) * 1024)[1000:201000]),
        ("/empty", ["Range: bytes=0-"], 200, {"content-length": "0", "content-range": None}, b""),
        ("/empty", ["Range: bytes=0-99"], 200, {}, b""),
        ("/empty", ["Range: bytes=-1"], 200, {}, b""),
    ]  # fmt: skip
    VOLATILE = {"date", "via", "content-security-policy", "connection", "keep-alive", "transfer-encoding"}

    def both(
        self, root: str, tunnel: Tunnel, path: str, fields: list[str], method: str = "GET"
    ) -> tuple[int, dict[str, str], bytes]:
        """Return the response to a request, which must be the same directly and through the tunnel."""
        direct = parse_answer(fetch_direct(root, get(path, *fields, method=method)), method)
        through = parse_answer(tunnel.fetch(get("/frontend/servers/n/files" + path, *fields, method=method)), method)
        for _, answer, _ in (direct, through):
            for name in self.VOLATILE:
                answer.pop(name, None)
        assert direct == through
        return direct

    @pytest.mark.parametrize(("path", "fields", "status", "expected", "body"), FILES)
    def test_files(
        self,
        path: str,
        fields: list[str],
        status: int,
        expected: dict[str, str],
        body: bytes | None,
        root: str,
        files_tunnel: Tunnel,
    ) -> None:
        tag = ask(self.site(root), "/hello.txt")[1]["etag"]
        expected = {name: value and value.replace(ETAG, tag) for name, value in expected.items()}
        answer = self.both(root, files_tunnel, path, [field.replace(ETAG, tag) for field in fields])
        assert answer[0] == status
        assert {name: answer[1].get(name) for name in expected} == expected
        assert body is None or answer[2] == body

    @pytest.mark.parametrize("path", ["/hello.txt", "/big", "/sub", "/", "/missing", "/empty"])
    def test_head_is_get_without_the_body_and_ignores_range(self, path: str, root: str, files_tunnel: Tunnel) -> None:
        status, fields, body = self.both(root, files_tunnel, path, [])
        assert body or path == "/empty"
        again, head_fields, nothing = self.both(root, files_tunnel, path, ["Range: bytes=0-1"], "HEAD")
        assert (again, nothing) == (status, b"")
        assert head_fields == fields

    def test_several_ranges_are_one_multipart_body(self, root: str, files_tunnel: Tunnel) -> None:
        status, fields, body = self.both(root, files_tunnel, "/hello.txt", ["Range: bytes=0-1, 7-8,-1"])
        boundary = re.fullmatch(r"multipart/byteranges; boundary=([\w-]+)", fields["content-type"])[1]
        parts = body.split(f"\r\n--{boundary}".encode())
        assert (status, parts[0], parts[-1]) == (206, b"", b"--\r\n")
        head = "\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Range: bytes {}/13\r\n\r\n{}"
        expected = [head.format(*part).encode() for part in (("0-1", "he"), ("7-8", "wo"), ("12-12", "\n"))]
        assert parts[1:-1] == expected

    @pytest.mark.parametrize(
        ("method", "status"), [("POST", 405), ("DELETE", 405), ("TRACE", 405), ("BREW", 501), ("OPTIONS", 204)]
    )
    def test_other_methods(self, method: str, status: int, root: str, files_tunnel: Tunnel) -> None:
        answer = self.both(root, files_tunnel, "/hello.txt", [], method)
        assert (answer[0], answer[1]["allow"]) == (status, "GET, HEAD, OPTIONS")

    def test_a_listing_shows_what_can_be_fetched_and_nothing_else(self, root: str, files_tunnel: Tunnel) -> None:
        _, fields, body = self.both(root, files_tunnel, "/", ["Accept: application/json"])
        names = {ptth.parse_path("/" + entry["href"])[0][0] for entry in json.loads(body)["entries"]}
        hidden = {b".secret", b".git", b"outside", b"outdir", b"dangling", b"loop", b"fifo", b"up"}
        assert names == {name for name in os.listdir(os.fsencode(root)) if name not in hidden}
        page = self.both(root, files_tunnel, "/", [])[2].decode()
        links = set(re.findall(r'<td[^>]*><a href="([^"]+)"', page))
        assert {ptth.parse_path("/" + link)[0][0] for link in links} == names
        for link in links:
            assert self.both(root, files_tunnel, "/" + link, [])[0] == 200

    def test_every_page_marks_its_main_part(self, files_tunnel: Tunnel) -> None:
        for path in (
            "servers/",
            "unregistered_servers",
            "audit_log",
            "servers/n/",
            "servers/n/files/",
            "servers/n/none",
        ):
            assert files_tunnel.get(f"/frontend/{path}", "Accept: text/html")[2].count(b"<main>") == 1, path

    def test_json_tells_name_size_kind_and_time(self, root: str, files_tunnel: Tunnel) -> None:
        entries = json.loads(self.both(root, files_tunnel, "/sub/", ["Accept: application/json"])[2])
        assert entries == {"entries": [{"name": "file", "size": 7, "is_dir": False, "mtime": MTIME, "href": "file"}]}
        original = files_tunnel.get("/frontend/servers/n/api/v1/dir/sub/")
        assert json.loads(original[2]) == entries and original[1]["content-type"] == "application/json; charset=UTF-8"

    ODD_NAMES = [
        "a:b", "c:", "...", "..a", "~", " ", "  x", "%41", "%2e%2e", "q\"u'o", "<i>", "a&b", "x?y=z", "#", "httpx", "&amp;", "+;",
    ]  # fmt: skip
    READERS = {  # how programs find the entries in a listing: patterns for each line, and for the whole page
        "Kodi 21": r'(?m)<a href="([^"]*)"[^>]*>\s*(.*?)\s*</a>(.+?)(?=<a|</tr|$)',
        "Kodi 13": r'<a href="(.*)">(.*)</a>()',
        "fsspec": r"""<(?:a|A)\s+(?:[^>]*?\s+)?(?:href|HREF)=["']([^"']+)()()""",
        "a shell script": r'href="([^"]*)"()()',
    }  # fmt: skip

    @pytest.mark.parametrize("reader", READERS)
    def test_programs_find_the_entries_of_a_listing_and_nothing_else(self, reader: str, tmp_path: object) -> None:
        write_files(tmp_path / "one" / "two", dict.fromkeys(self.ODD_NAMES, "0123456789" * 200))
        (tmp_path / "one" / "two" / "sub dir").mkdir()
        page = ask(self.site(tmp_path, hidden=True), "/one/two/")[2].decode()
        found = []
        for link, text, rest in re.findall(self.READERS[reader], page):
            name = os.fsdecode(urllib.parse.unquote_to_bytes(link.removesuffix("/")))
            if not reader.startswith("Kodi") or html.unescape(text).strip().removesuffix("/") == name.strip():
                found.append((link, name))
                size = re.search(r"> *([0-9.]+) *(B|K|M|G| )(iB)?</td>", rest)
                assert not rest or link[-1] == "/" or size[1] == "2.0"
        assert sorted(name for _, name in found if name != "..") == sorted([*self.ODD_NAMES, "sub dir"])
        for link, _ in found:
            assert urllib.parse.urljoin("http://h/one/two/", link).startswith("http://h/one/two/") or link == "../"

    @pytest.mark.parametrize(
        ("path", "links"),
        [("/", ["one/"]), ("/one/", ["../", "../", "two/"]), ("/one/two/", ["../../", "../", "../"])],
    )
    def test_a_listing_links_to_the_folders_above_and_not_to_itself(
        self, path: str, links: list[str], tmp_path: object
    ) -> None:
        found: list[str | None] = []

        class Links(html.parser.HTMLParser):
            def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
                if tag == "a":
                    found.append(dict(attributes)["href"])

        (tmp_path / "one" / "two").mkdir(parents=True)
        Links().feed(ask(self.site(tmp_path), path)[2].decode())
        assert found == links

    def test_every_entry_of_the_json_has_a_link_that_works_and_a_valid_name(self, files_tunnel: Tunnel) -> None:
        for base in ("/frontend/servers/n/api/v1/dir/", "/frontend/servers/n/files/"):
            body = files_tunnel.get(base, "Accept: application/json")[2]
            for entry in json.loads(body)["entries"]:
                entry["name"].encode()  # a lone surrogate is an error here
                target = urllib.parse.urljoin(base, entry["href"])
                assert target.startswith(base) and target.endswith("/") is entry["is_dir"]
                assert files_tunnel.get(target)[0] == 200

    ORDER = [  # each row is sorted already
        ["a1", "a2", "a10", "a11"], ["1", "2", "10", "11"], ["v1.9.2", "v1.10.0", "v1.10.1"], ["file.txt", "file1.txt", "file2.txt"],
        ["Apfel", "\u00c4pfel", "Birne", "\u00e9clair", "Elch", "Zebra"], ["a\u0301b", "\u00e1c", "ad"], ["\u0141\u00f3d\u017a", "lodz2", "\u00d8rsted", "Oz"],
        ["stra\u00dfe 2", "STRASSE 10"], ["x" + "9" * 200, "x1" + "0" * 200], ["0" * 250, "1"], ["007", "7", "08", "8"], ["a", "a1", "a1b", "ab"], ["", "a"],
        ["x\u00b2", "x2", "x\uff13"], ["\u0662", "\u0661\u0660"], ["x\u096f", "x\u0967\u0966"],
    ]  # fmt: skip

    @pytest.mark.parametrize("names", ORDER, ids=lambda names: names[0][:20])
    def test_names_are_sorted_as_people_do(self, names: list[str]) -> None:
        expected = sorted(names, key=lambda name: (ptth.natural_order(name.encode())[0], name.encode()))
        for turn in range(5):
            mixed = random.Random(turn).sample(names, len(names))
            assert sorted(mixed, key=lambda name: ptth.natural_order(name.encode())) == expected
        keys = [ptth.natural_order(name.encode()) for name in names]
        assert sorted(key[0] for key in keys) == [key[0] for key in keys] and len(set(keys)) == len(keys)

    def test_names_are_escaped(self, root: str, files_tunnel: Tunnel) -> None:
        page = self.both(root, files_tunnel, "/", [])[2].decode()
        assert "a b&amp;c&lt;d&gt;&quot;e&#39;#%?.txt" in page and "<d>" not in page

    def test_the_servers_own_configuration_is_never_served(self, tmp_path: object) -> None:
        secret = tmp_path / "ptth_server.toml"
        write_files(tmp_path, {"ptth_server.toml": "api_key", "other": "other", "new": "api_key"})
        os.link(secret, tmp_path / "hard")
        os.symlink(secret, tmp_path / "soft")
        site = self.site(tmp_path, private=[str(secret)])
        for name, status in (("ptth_server.toml", 404), ("hard", 404), ("soft", 404), ("other", 200)):
            assert ask(site, f"/{name}")[0] == status
        (tmp_path / "new").rename(secret)  # an editor's way to save: another inode under the same name
        assert ask(site, "/ptth_server.toml")[0] == 404
        assert b"toml" not in say(site, get("/"))

    COPIES = [
        "{}", "{}~", "{}.bak", "{}.old", "{}.orig", "{}.save", "{}.save.1", "{}.1", "{}.2026-11-25", "{}-copy", "{} (1)", "{}.~1~", ".{}.swp", ".{}.swo", ".{}.un~",
        "#{}#", ".#{}", "{}.gz", "{}.dpkg-old", "{}.rpmsave", "Copy of {}", "backup-{}", "{}_backup", "{}.new", "{}.tmp",
    ]  # fmt: skip

    @pytest.mark.parametrize(
        "name", ["ptth_server.toml", "ptth_relay.toml", "site.key", "key", "Full Chain.PEM", "a+b[c].toml"]
    )
    def test_copies_of_a_secret_are_never_served(self, name: str, tmp_path: object) -> None:
        stem, extension = os.path.splitext(name)
        middle = (f"{stem} - Copy", f"{stem} (2)", f"{stem}.bak", f"{stem}-old", f"{stem}.2026", f"{stem}7")
        secrets = [*(copy.format(name) for copy in self.COPIES), name.upper(), *(m + extension for m in middle)]
        secrets.append(f"{stem}.orig")
        others = [f"{name}.example", f"x{stem}y", f"{stem}s.txt", "x.toml", "x.key"]
        for folder in (tmp_path, tmp_path / "sub"):
            write_files(folder, dict.fromkeys([*secrets, *others], "secret"))
        (tmp_path / "link.txt").symlink_to(secrets[1])
        (tmp_path / "sub" / f"{name}~~").symlink_to("x.toml")
        site = self.site(tmp_path, hidden=True, private=[f"/elsewhere/{name}"])
        for folder in ("", "sub/"):
            for each, status in (*((secret, 404) for secret in secrets), *((other, 200) for other in others)):
                assert ask(site, f"/{folder}{ptth.quote(each.encode())}")[0] == status, each
            rows = json.loads(ask(site, f"/{folder}", "Accept: application/json")[2])["entries"]
            assert {row["name"] for row in rows} - {"sub"} == set(others)
        with zipfile.ZipFile(io.BytesIO(ask(site, "/?zip")[2])) as archive:
            assert set(archive.namelist()) == {"sub/", *others, *(f"sub/{each}" for each in others)}
        for path in ("/link.txt", f"/sub/{ptth.quote(name.encode())}~~"):
            assert ask(site, path)[0] == 404

    def test_a_configuration_of_this_program_is_never_served(self, tmp_path: object) -> None:
        names = ("ptth_server.toml", "deep/er/ptth_relay.toml", "deep/PTTH_Server2.toml", "deep/old_ptth_relay.toml.x")
        write_files(tmp_path, dict.fromkeys(names, "api_key"))
        site = self.site(tmp_path)
        assert [ask(site, f"/{name}")[0] for name in names] == [404] * 4
        assert b"toml" not in say(site, get("/deep/"))

    def test_a_secret_behind_a_link_that_changes_is_never_served(self, tmp_path: object) -> None:
        write_files(tmp_path, {"a": "a", "b": "b"})
        site = self.site(tmp_path, private=[str(tmp_path / "key.pem")])
        for aim, expected in (("a", [404, 200, 404]), ("b", [200, 404, 404])):
            (tmp_path / "key.pem").unlink(missing_ok=True)
            (tmp_path / "key.pem").symlink_to(aim)
            assert [ask(site, f"/{name}")[0] for name in ("a", "b", "key.pem")] == expected

    def test_the_operator_is_told_which_secrets_lie_below_the_root(self, tmp_path: object, capfd: Output) -> None:
        root = tmp_path / "root"
        root.mkdir()
        ptth.tell_secrets(ptth.Site(str(root), private=[str(tmp_path / "key.pem")]), "file-server")
        assert capfd.readouterr().err == ""
        names = ("ptth_server.toml", "config/ptth_relay.toml", "k.pem")
        write_files(root, dict.fromkeys(names, ""))
        write_files(tmp_path, {"root2.pem": ""})
        (tmp_path / "link").symlink_to(root)
        for served, key in ((root, root / "k.pem"), (tmp_path / "link", tmp_path / "link" / "k.pem")):
            ptth.tell_secrets(ptth.Site(str(served), private=[str(key), str(tmp_path / "root2.pem")]), "file-server")
            told = capfd.readouterr().err
            assert told.count("\n") == 1 and "root2.pem" not in told
            assert all(f"{root}/{name}" in told for name in names)

    FOREIGN = [
        *(("win32", name) for name in (
            "GIT~1", "git~12", "PROGRA~1.TXT", "SECRET~1.", "GI7EBA~1", "CON", "con.txt", "NUL", "nul .txt", "Aux.tar.gz", "PRN ", "COM1", "lpt9.log", "COM\xb9", "CONIN$",
            "CLOCK$", "a.txt.", "a.txt ", "...", "a.txt::$DATA", "a:b", "C:", "a\\b", "..\\x", "a/b", "a?", "a*", "a|b", "a<", "\x01",
        )),
        *(("darwin", name) for name in ("a/b", "..namedfork", "..NamedFork", "..named\u200cfork")), ("linux", "a/b"),
    ]  # fmt: skip

    @pytest.mark.parametrize(("system", "name"), FOREIGN)
    def test_a_name_by_which_a_system_opens_something_else_is_refused(self, system: str, name: str) -> None:
        assert ptth.is_foreign(name.encode(), system)
        assert name in ("a/b",) or not ptth.is_foreign(name.encode(), "linux")

    @pytest.mark.parametrize(
        "name", ["a", ".git", "console.txt", "COM", "COM10", "a~b", "a~1b", "longer-name~1.txt", "nul-x", "\u00e4"]
    )
    def test_an_ordinary_name_is_not_refused(self, name: str) -> None:
        assert not any(ptth.is_foreign(name.encode(), system) for system in ("win32", "darwin", "linux"))

    def test_a_name_that_is_not_utf_8_is_none_on_windows_only(self) -> None:
        assert [ptth.is_foreign(b"\xff", system) for system in ("win32", "darwin", "linux")] == [True, False, False]

    def test_what_hfs_ignores_does_not_show_a_hidden_name(self) -> None:
        for name in ("\u200c.git", "\ufeff.git", ".\u200dgit", "\u202e\u206a.x", ".well\u200cknown"):
            assert ptth.is_hidden(name.encode(), "darwin")
        assert not ptth.is_hidden("\u200c.git".encode(), "linux") and not ptth.is_hidden("\u200cgit".encode(), "darwin")
        assert not ptth.is_hidden(b".well-known", "darwin") and ptth.is_hidden(b".git\xff", "darwin")

    @pytest.mark.parametrize(
        ("query", "names"),
        [("", "b d a C"), ("?sort=name", "b d a C"), ("?sort=-name", "d b C a"), ("?sort=size", "b d C a"), ("?sort=-size", "b d a C"),
         ("?sort=time", "b d C a"), ("?sort=-time", "d b a C"), ("?sort=nonsense", "b d a C"), ("?sort=", "b d a C")],
    )  # fmt: skip
    def test_a_listing_is_sorted_folders_first(self, query: str, names: str, tmp_path: object) -> None:
        write_files(tmp_path, {"a": "x" * 20, "C": "x" * 10})
        for name, when in (("a", 200), ("C", 100), ("b", 1), ("d", 2)):
            if name in "bd":
                (tmp_path / name).mkdir()
            os.utime(tmp_path / name, (when, when))
        page = ask(self.site(tmp_path), "/" + query)[2].decode()
        assert re.findall(r'<td[^>]*><a href="([^/"]+)/?"', page) == names.split()

    def test_a_listing_is_small_and_needs_no_script(self, root: str) -> None:
        page = ask(self.site(root), "/sub/")[2]
        assert len(page) < 12_000 and page.count(b"<script>") == 1 and b"src=" not in page
        assert b'<button name="zip"' in page and b'<button name="sort"' in page

    def site(self, root: object, private: object = (), **options: object) -> ptth.Handler:
        return ptth.site_handler(ptth.Site(str(root), ptth.SiteOptions(**options), private=private))

    def test_a_folder_as_a_zip(self, tmp_path: object) -> None:
        base = tmp_path / "base"
        files = {"a.txt": b"a", "sub/b": b"b" * 600_000, "\u00fcml\u00e4ut/x": b"", "sub/deep/c": b"c"}
        write_files(base, {**files, ".hidden": "hidden", b"\xff": "bytes"})
        (base / "empty").mkdir()
        (tmp_path / "secret").write_text("secret")
        for link, aim in (("out", "../secret"), ("in", "a.txt"), ("loop", "."), ("sub/up", "..")):
            (base / link).symlink_to(aim)
        os.mkfifo(base / "fifo")
        status, fields, body = ask(self.site(base), "/?zip")
        assert (status, fields["content-type"]) == (200, "application/zip")
        assert fields["content-disposition"] == "attachment; filename=\"files.zip\"; filename*=UTF-8''files.zip"
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            assert archive.testzip() is None
            expected = {*files, "sub/", "sub/deep/", "empty/", "\u00fcml\u00e4ut/", "in", "\ufffd"}
            assert set(archive.namelist()) == expected
            assert {name: archive.read(name) for name in files} == files
        assert fields["content-disposition"] != ask(self.site(base), "/sub/?zip=")[1]["content-disposition"]
        assert say(self.site(base), get("/sub/?zip", method="HEAD")).endswith(b"\r\n\r\n")

    @staticmethod
    def unpack(data: bytes) -> dict[str, bytes]:
        """Return the members of a zip, read in one pass as from a pipe, without its central directory."""
        members: dict[str, bytes] = {}
        while data[:4] == b"PK\3\4":
            version, flags, method, _, _, checksum, packed, size, name_length, extra_length = struct.unpack_from(
                "<5H3I2H", data, 4
            )
            name = data[30 : 30 + name_length].decode()
            large = data[30 + name_length :][:4] == b"\1\0\20\0"
            data = data[30 + name_length + extra_length :]
            assert name not in members and flags & ~8 == 0x800 and version == (45 if large else 20)
            if flags & 8:
                assert method == 8, "the end of a stored member cannot be found"
                inflate = zlib.decompressobj(-15)
                before, content = len(data), inflate.decompress(data)
                data = inflate.unused_data
                form = struct.Struct("<4sIQQ" if large else "<4sIII")  # Java takes the long form for what is long, only
                mark, checksum, packed, size = form.unpack_from(data)
                assert (mark, packed) == (b"PK\7\10", before - len(data))
                data = data[form.size :]
            else:
                assert (method, packed) == (0, size)
                content, data = data[:size], data[size:]
            assert (zlib.crc32(content), len(content)) == (checksum, size)
            members[name] = content
        assert data[:4] in (b"PK\1\2", b"PK\5\6")
        return members

    @pytest.mark.parametrize("limit", [ptth.ZIP32_MAX, 1_000_000], ids=["", "large"])
    def test_a_zip_can_be_unpacked_while_it_arrives(self, limit: int, tmp_path: object, monkeypatch: Patch) -> None:
        monkeypatch.setattr(ptth, "ZIP32_MAX", limit)
        sizes = (0, 1, 65535, 65536, ptth.SMALL_BODY - 1, ptth.SMALL_BODY, ptth.SMALL_BODY + 1, 2_500_000)
        files = {f"f{size}": random.Random(size).randbytes(size) for size in sizes}
        write_files(tmp_path, files)
        (tmp_path / "sub").mkdir()
        body = ask(self.site(tmp_path), "/?zip")[2]
        assert self.unpack(body) == {**files, "sub/": b""}
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            assert {name: archive.read(name) for name in archive.namelist()} == {**files, "sub/": b""}
        (tmp_path / "none").mkdir()
        empty = ask(self.site(tmp_path), "/none/?zip")[2]
        assert self.unpack(empty) == {} and zipfile.ZipFile(io.BytesIO(empty)).namelist() == []

    @needs("busybox")
    def test_busybox_unpacks_small_files_from_a_pipe(self, tmp_path: object) -> None:
        write_files(tmp_path / "from", {name: name * 100_000 for name in "abc"})
        body = ask(self.site(tmp_path / "from"), "/?zip")[2]
        subprocess.run(["busybox", "unzip", "-q", "-"], input=body, cwd=tmp_path, check=True, timeout=60)
        assert [(tmp_path / name).read_text() for name in "abc"] == [name * 100_000 for name in "abc"]

    def test_a_zip_of_more_members_than_16_bits_count(self) -> None:
        archive = ptth.ZipWriter()
        for i in range(65_536):
            archive.add(f"{i}", 0o100644, 0)
        with zipfile.ZipFile(io.BytesIO(b"".join(archive.finish()))) as read:
            assert len(read.namelist()) == 65_536

    SAME = [  # (the names of files, the names of their members in the zip)
        ([b"caf\xe9", b"caf\xe8", b"caf\xea", b"na\xefve.tar", b"na\xeeve.tar"], ["caf\ufffd", "caf\ufffd (2)", "caf\ufffd (3)", "na\ufffdve (2).tar", "na\ufffdve.tar"]),
        ([b"\xff", "\ufffd".encode(), b"\xfe"], ["\ufffd", "\ufffd (2)", "\ufffd (3)"]),
        ([b"\xff", "\ufffd (2)".encode(), b"\xfe"], ["\ufffd", "\ufffd (2)", "\ufffd (3)"]),
        ([b"\xff/x", b"\xfe/x"], None), ([b"\xff/x", b"\xfe"], None),
        ([b"a\\b", b"a/b", b"a_b"], None), ([b"d\\", b"d/x"], None), ([b"a\nb", b"ab"], None), ([b"a:b", b"b", b"a_b"], None),
        ([b"could-not-be-read.txt"], ["could-not-be-read.txt"]), ([b"could-not-be-read.txt/x", b"could-not-be-read (2).txt"], None),
        (["\u00e4".encode(), "a\u0308".encode(), "\u2215\uff0f".encode()], ["a\u0308", "\u00e4 (2)", "\u2215\uff0f"]),
        (["\u00e4/x".encode(), "a\u0308/x".encode()], ["a\u0308/x", "\u00e4 (2)/x"]),
    ]  # fmt: skip

    @pytest.mark.parametrize(("names", "members"), SAME)
    @pytest.mark.filterwarnings("error")
    def test_every_file_has_a_name_of_its_own_in_the_zip(
        self, names: list[bytes], members: list[str] | None, tmp_path: object, monkeypatch: Patch
    ) -> None:
        write_files(tmp_path, {name: str(i) for i, name in enumerate(names)})
        found = self.unpack(ask(self.site(tmp_path), "/?zip")[2])
        files = {name: data for name, data in found.items() if name[-1] != "/"}
        assert sorted(files.values()) == sorted(str(i).encode() for i in range(len(names)))
        assert not re.search(r"[\x00-\x1f\\]", "".join(found))
        assert len({name.strip("/") for name in found}) == len(found)
        assert members is None or sorted(files) == members
        monkeypatch.setattr(ptth.FolderZip, "_file", failing(errno.EACCES))
        notes = self.unpack(ask(self.site(tmp_path), "/?zip")[2])
        note = [data for name, data in notes.items() if name[-1] != "/"]
        assert len(note) == 1 and note[0].count(b": Permission denied\n") == len(names)

    def test_as_many_names_that_are_not_utf8_as_one_likes(self) -> None:
        taken: dict[str, int] = {}
        assert len({ptth.distinct("x", taken) for _ in range(20_000)}) == 20_000

    @needs("unzip")
    def test_times_and_permission_to_execute_survive_in_another_time_zone(self, tmp_path: object) -> None:
        times = {"script": 1_700_000_001, "summer": 1_689_000_001, "old": 1, "future": 2**31 - 1}
        write_files(tmp_path / "from", dict.fromkeys(times, "#!/bin/sh\n"))
        for name, when in times.items():
            os.utime(tmp_path / "from" / name, (when, when))
        (tmp_path / "from" / "script").chmod(0o750)
        (tmp_path / "x.zip").write_bytes(ask(self.site(tmp_path / "from"), "/?zip")[2])
        zone = {**os.environ, "TZ": "XXX-9YYY"}
        subprocess.run(["unzip", "-q", "x.zip", "-d", "to"], cwd=tmp_path, check=True, env=zone, timeout=60)
        assert {name: int((tmp_path / "to" / name).stat().st_mtime) for name in times} == times
        modes = [(tmp_path / "to" / name).stat().st_mode & 0o111 for name in ("script", "summer")]
        assert modes == [0o110, 0]

    @pytest.mark.parametrize("nanoseconds", [-(2**62), -1, 2**31 * 10**9, 2**62])
    def test_a_time_that_a_zip_cannot_hold_is_no_error(self, nanoseconds: int) -> None:
        archive = ptth.ZipWriter()
        archive.add("x", 0o100644, nanoseconds)
        assert self.unpack(b"".join(archive.finish())) == {"x": b""}

    DISPOSITIONS = [  # (name, what stands in quotes, what stands behind UTF-8'')
        ("dir.zip", "dir.zip", "dir.zip"), ("a b.zip", "a b.zip", "a%20b.zip"), ("\u00c4pfel.zip", "_pfel.zip", "%C3%84pfel.zip"),
        ('q"u\\o.zip', "q_u_o.zip", "q%22u%5Co.zip"), ("100%25.zip", "100_25.zip", "100%2525.zip"), ("it's.zip", "it's.zip", "it%27s.zip"),
        ("a;b=c.zip", "a;b=c.zip", "a%3Bb%3Dc.zip"), ("x\r\ny\x7f.zip", "x__y_.zip", "x%0D%0Ay%7F.zip"), ("\U0001f600.zip", "_.zip", "%F0%9F%98%80.zip"),
    ]  # fmt: skip

    @pytest.mark.parametrize(("name", "plain", "coded"), DISPOSITIONS)
    def test_the_name_of_a_download_for_old_and_new_clients(self, name: str, plain: str, coded: str) -> None:
        value = f"attachment; filename=\"{plain}\"; filename*=UTF-8''{coded}"
        assert ptth.attachment(name) == ("Content-Disposition", value)

    def test_a_zip_of_a_folder_with_an_odd_name(self, tmp_path: object) -> None:
        (tmp_path / os.fsdecode(b'\xff"\n')).mkdir()
        fields = ask(self.site(tmp_path), "/%FF%22%0A/?zip")[1]
        assert fields["content-disposition"].startswith('attachment; filename="___.zip"; filename*=UTF-8')

    def test_what_cannot_be_read_is_told_in_the_listing_the_json_and_the_zip(
        self, tmp_path: object, monkeypatch: Patch
    ) -> None:
        write_files(tmp_path, dict.fromkeys(("good", "bad&name", "gone", "circle", "shut"), "x"))
        for name in ("closed", "locked"):
            (tmp_path / name).mkdir()
        errors = {"bad&name": errno.EACCES, "gone": errno.ENOENT, "circle": errno.ELOOP, "locked": errno.EIO}
        real = os.scandir

        class Item:
            def __init__(self, item: object) -> None:
                self.item, self.name, self.path = item, item.name, item.path
                self.is_symlink, self.is_dir = item.is_symlink, item.is_dir

            def stat(self) -> os.stat_result:
                number = errors.get(os.fsdecode(self.name))
                return failing(number)() if number else self.item.stat()

        @contextlib.contextmanager
        def scandir(place: bytes) -> object:
            if place.endswith(b"closed"):
                failing(errno.EACCES)()
            with real(place) as items:
                yield map(Item, items)

        monkeypatch.setattr(os, "scandir", scandir)
        refuse_to_open(monkeypatch, b"/shut", errno.EACCES)  # what the zip alone does
        handler = self.site(tmp_path)
        page = ask(handler, "/")[2].decode()
        assert "1 folder, 2 files, 2 B, 2 not readable" in page and page.count("not readable</td>") == 2
        assert 'title="Permission denied"' in page and ">bad&amp;name</i>" in page and ">locked/</i>" in page
        assert set(re.findall(r'href="([^"]+)"', page)) == {"closed/", "good", "shut"}
        entries = json.loads(ask(handler, "/", "Accept: application/json")[2])["entries"]
        told = {entry["name"]: (entry["is_dir"], entry.get("error")) for entry in entries}
        bad = {"bad&name": (False, "Permission denied"), "locked": (True, os.strerror(errno.EIO))}
        assert told == {"good": (False, None), "shut": (False, None), "closed": (True, None), **bad}
        members = self.unpack(ask(handler, "/?zip")[2])
        note = members.pop("could-not-be-read.txt").decode().splitlines()
        assert members == {"good": b"x", "closed/": b""}
        denied = [f"{name}: Permission denied" for name in ("bad&name", "closed")]
        assert sorted(note) == [*denied, f"locked: {os.strerror(errno.EIO)}", "shut: Permission denied"]
        for fields in ([], ["Accept: application/json"]):
            assert ask(handler, "/closed/", *fields)[0] == 403
        assert ask(handler, "/closed/?zip")[0] == 403

    CHANGES = {  # changes of a file of 3 MiB while it is zipped: (the member's content, the line in could-not-be-read.txt)
        "it grows": (3 << 20, ""), "it shrinks": (1 << 20, "changed"), "it is written again": (3 << 20, "changed"),
    }  # fmt: skip

    @pytest.mark.parametrize("change", CHANGES)
    def test_a_file_that_changes_while_it_is_zipped(self, change: str, tmp_path: object) -> None:
        path = tmp_path / "x"
        path.write_bytes(bytes(3 << 20))
        site = ptth.Site(str(tmp_path))
        pieces = ptth.FolderZip(site, os.fsencode(tmp_path)).pieces()
        data = next(pieces)
        with open(path, "r+b", buffering=0) as file:
            if change == "it grows":
                file.seek(0, os.SEEK_END)
                file.write(b"more")
            elif change == "it shrinks":
                file.truncate(1 << 20)
            elif change == "it is written again":
                file.seek(2 << 20)
                file.write(b"other")
                os.utime(path, (1, 1))
        data += b"".join(pieces)
        size, word = self.CHANGES[change]
        members = self.unpack(data)
        assert len(members["x"]) == size and word in members.get("could-not-be-read.txt", b"").decode()
        assert ("could-not-be-read.txt" in members) is bool(word)

    def test_a_disk_that_fails_ends_the_member_and_not_the_zip(self) -> None:
        class File:
            pieces = [b"x" * ptth.ZIP_PIECE]

            def read(self, count: int) -> bytes:
                return self.pieces.pop() if self.pieces else failing(errno.EIO)()

        archive = ptth.ZipWriter()
        part = archive.add_large("x", 0o100644, 0, File(), 1 << 22)
        data = next(part)
        with pytest.raises(OSError, match="incomplete: "):
            next(part)
        archive.add("y", 0o100644, 0, b"y")
        data += b"".join(archive.finish())
        assert self.unpack(data) == {"x": b"x" * ptth.ZIP_PIECE, "y": b"y"}

    @in_loop
    async def test_a_slow_reader_of_a_zip_costs_little_memory(self, tmp_path: object) -> None:
        write_files(tmp_path, {"large": bytes(3 << 20), **{f"medium {i}": bytes((1 << 20) - 1) for i in range(3)}})
        site = ptth.Site(str(tmp_path))
        held = []

        class Slow:
            async def send(self, data: bytes) -> None:
                held.append(tracemalloc.get_traced_memory()[0])

        body = ptth.zip_response(site, (), os.fsencode(tmp_path)).body
        tracemalloc.start()
        try:
            await body.write_to(ptth.ChunkedSink(Slow()))
        finally:
            tracemalloc.stop()
            await body.aclose()
        assert len(held) > 12 and max(held) < 700 * 1024  # no file as a whole

    def test_no_descriptor_is_503_and_a_failing_disk_leaves_none_open(
        self, tmp_path: object, monkeypatch: Patch
    ) -> None:
        (tmp_path / "x").write_text("x")
        site = self.site(tmp_path)
        before = len(os.listdir("/proc/self/fd"))
        with monkeypatch.context() as patched:
            patched.setattr(os, "scandir", failing(errno.EMFILE))
            assert ask(site, "/")[0] == 503
        with monkeypatch.context() as patched:
            patched.setattr(ptth, "read_at", failing(errno.EIO))
            assert b"x" not in say(site, get("/x")).partition(b"\r\n\r\n")[2]
        assert len(os.listdir("/proc/self/fd")) == before

    @pytest.mark.parametrize(
        ("number", "there", "searchable", "status"),
        [(errno.EACCES, "", True, 403), (errno.EMFILE, "", True, 503), (errno.ENOENT, "", True, 200),
         (errno.EACCES, "other", False, 200), (errno.EACCES, "index.html", False, 403)],
    )  # fmt: skip
    def test_an_index_that_cannot_be_opened_does_not_show_the_listing(
        self, number: int, there: str, searchable: bool, status: int, tmp_path: object, monkeypatch: Patch
    ) -> None:
        """But a folder that can only be listed, and has no index, shows its names."""
        if there:
            (tmp_path / there).write_text("x")
        refuse_to_open(monkeypatch, b"index.html", number)
        if not searchable:
            monkeypatch.setattr(os, "access", lambda path, mode: mode != os.X_OK)
        answer = ask(self.site(tmp_path), "/")
        assert (answer[0], b"other" in answer[2]) == (status, there == "other")

    def test_a_folder_that_vanishes_does_not_break_the_zip(self, tmp_path: object) -> None:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
        site = ptth.Site(str(tmp_path))
        made = ptth.FolderZip(site, os.fsencode(tmp_path))
        walk = made.walk()
        assert next(walk)[1] == "a"
        (tmp_path / "b").rmdir()
        assert [name for _, name, _ in walk] == ["b"] and "b: " in made.failed[0]

    def test_hidden_names_when_asked_for(self, root: str) -> None:
        assert ask(self.site(root, hidden=True), "/.secret")[0] == 200
        assert b".secret" in say(self.site(root, hidden=True), get("/"))

    def test_links_that_leave_when_asked_for(self, root: str) -> None:
        assert ask(self.site(root, follow_symlinks=True), "/outdir/secret")[2] == b"secret\n"

    @pytest.mark.parametrize(
        ("accept", "kind"),
        [("application/json", "json"), ("APPLICATION/JSON;q=0.1, text/plain, */*", "json"), ("application/json;q=0.9, text/html;q=0.8", "json"),
         ("text/html;q=0, application/json;q=0.5", "json"), ("text/html, application/json", "html"), ("application/json;q=0.8, text/html;q=0.9", "html"),
         ("application/json;q=0", "html"), ("*/*", "html"), ("text/html, application/xhtml+xml, */*;q=0.8", "html")],
    )  # fmt: skip
    def test_a_listing_is_of_the_kind_that_is_preferred(self, accept: str, kind: str, root: str) -> None:
        assert kind in ask(self.site(root), "/", f"Accept: {accept}")[1]["content-type"]

    def test_without_listing_there_is_no_json_and_no_zip(self, root: str) -> None:
        handler = self.site(root, listing=False)
        for path, fields in (("/", []), ("/?zip", []), ("/", ["Accept: application/json"])):
            assert ask(handler, path, *fields)[0] == 404
        assert ask(handler, "/index/", "Accept: application/json")[2] == b"the index\n"
        assert [ask(handler, path)[0] for path in ("/hello.txt", "/index/")] == [200, 200]

    def test_other_origins_may_read_when_asked_for(self, root: str) -> None:
        handler = self.site(root, cors=True, auth="u:p")
        for path in ("/hello.txt", "/missing"):
            assert ask(handler, path)[1]["access-control-allow-origin"] == "*"
        status, fields, _ = ask(handler, "/hello.txt", "Access-Control-Request-Method: GET", method="OPTIONS")
        assert (status, fields["access-control-allow-methods"]) == (204, "GET, HEAD")

    def test_fields_of_the_operator_replace_ours(self, root: str) -> None:
        handler = self.site(root, headers=(("X-Mine", "1"), ("content-type", "text/x")))
        status, fields, _ = ask(handler, "/hello.txt")
        assert (status, fields["x-mine"], fields["content-type"]) == (200, "1", "text/x")

    def test_a_handlers_response_stays_as_it_made_it(self) -> None:
        made = ptth.text_response(200, "hi", [("Vary", "A")])
        before = list(made.headers)

        async def handler(request: ptth.Request) -> ptth.Response:
            return made

        guarded = ptth.with_site_options(handler, ptth.SiteOptions(headers=(("Vary", "B"), ("X-Y", "z"))), "n")
        request = ptth.parse_request_head(get("/"))
        for _ in range(2):
            assert asyncio.run(guarded(request)).headers == [*before, ("Vary", "B"), ("X-Y", "z")]
        assert made.headers == before

    def test_a_vary_of_the_operator_adds_to_ours(self, tmp_path: object) -> None:
        write_files(tmp_path, {"x": "x", "x.gz": gzip.compress(b"x")})
        answer = say(self.site(tmp_path, headers=(("Vary", "Origin"),)), get("/x", "Accept-Encoding: gzip"))
        assert b"Vary: Accept-Encoding\r\n" in answer and b"Vary: Origin\r\n" in answer

    AUTH = [
        ("Basic dTpwOnE=", 200), ("basic dTpwOnE=", 200), ("Basic dTpw", 401), ("Basic", 401), ("Bearer dTpwOnE=", 401), ("Basic ???", 401), ("", 401),
    ]  # fmt: skip

    @pytest.mark.parametrize(("value", "status"), AUTH)
    def test_a_password(self, value: str, status: int, root: str) -> None:
        for handler, realm in (
            (self.site(root, auth="u:p:q"), "files"),
            (ptth.server_handler(ptth.Site(root, ptth.SiteOptions(auth="u:p:q")), "my-server"), "my-server"),
        ):
            answer = ask(handler, "/", *([f"Authorization: {value}"] if value else []))
            assert answer[0] == status
            assert status == 200 or answer[1]["www-authenticate"] == f'Basic realm="{realm}", charset="UTF-8"'

    ENCODED = [  # (fields, the coding of the answer, its body)
        ([], None, b"plain"), (["Accept-Encoding: gzip"], "gzip", b"\x1f\x8bzipped"), (["Accept-Encoding: deflate, gzip;q=0.5"], "gzip", b"\x1f\x8bzipped"),
        (["Accept-Encoding: br, gzip"], "br", b"brotli"), (["Accept-Encoding: *"], "br", b"brotli"), (["Accept-Encoding: gzip;q=0"], None, b"plain"),
        (["Accept-Encoding: br;q=0, *"], "gzip", b"\x1f\x8bzipped"), (["Accept-Encoding: gzip", "Range: bytes=0-1"], None, b"pl"),
        (["Accept-Encoding: identity"], None, b"plain"), (["Accept-Encoding: br;q=0.1, gzip"], "gzip", b"\x1f\x8bzipped"),
        (["Accept-Encoding: gzip;q=0.5, identity"], None, b"plain"),
    ]  # fmt: skip

    @pytest.mark.parametrize(("fields", "coding", "body"), ENCODED)
    def test_a_compressed_file_beside_the_plain_one(
        self, fields: list[str], coding: str | None, body: bytes, tmp_path: object
    ) -> None:
        write_files(tmp_path, {"x.txt": b"plain", "x.txt.gz": b"\x1f\x8bzipped", "x.txt.br": b"brotli"})
        status, answer, got = ask(self.site(tmp_path), "/x.txt", *fields)
        assert (answer.get("content-encoding"), got) == (coding, body)
        assert answer["content-type"] == "text/plain; charset=utf-8"
        assert answer["vary"] == "Accept-Encoding"
        if "Range" not in str(fields):
            again = get("/x.txt", *fields, "If-None-Match: " + answer["etag"])
            assert one(say(self.site(tmp_path), again))[0] == 304
        plain = ask(self.site(tmp_path), "/x.txt")[1]
        assert (answer["etag"] == plain["etag"]) is (coding is None)

    TYPES = [
        ("x.wasm", "application/wasm"), ("x.mjs", "text/javascript; charset=utf-8"), ("x.webmanifest", "application/manifest+json"),
        ("x.exe", "application/octet-stream"), ("x.php", "text/plain; charset=utf-8"), ("x.sql", "text/plain; charset=utf-8"),
        ("x.avif", "image/avif"), ("x.webp", "image/webp"), ("x.woff2", "font/woff2"), ("x.md", "text/plain; charset=utf-8"),
        ("X.HTML", "text/html"), ("x.xml", "text/xml"), ("x.xhtml", "application/xhtml+xml"), ("x.svg", "image/svg+xml"), ("x.csv", "text/csv; charset=utf-8"),
        ("x.css", "text/css; charset=utf-8"), ("x.js", "text/javascript; charset=utf-8"), ("x.m4v", "video/mp4"), ("x.epub", "application/epub+zip"),
        ("x.jxl", "image/jxl"), ("x.ics", "text/calendar; charset=utf-8"), ("x.bin", "application/octet-stream"), ("x.tar.gz", "application/gzip"), ("x.svg", "image/svg+xml"), ("x.json", "application/json"),
        ("x", "application/octet-stream"), ("x.pdf", "application/pdf"), ("x.png", "image/png"), ("x.mp4", "video/mp4"), ("x.\xff", "application/octet-stream"),
    ]  # fmt: skip

    @pytest.mark.parametrize(("name", "kind"), TYPES)
    def test_types(self, name: str, kind: str, tmp_path: object) -> None:
        write_files(tmp_path, {name.encode("latin-1"): b"\0"})
        assert ask(self.site(tmp_path), "/" + ptth.quote(name.encode("latin-1")))[1]["content-type"] == kind

    SNIFFED = [
        ("README", b"read me\n", True), ("x.rs", "\u00e4".encode() * 5000, True), ("x.diff", b"x" + "\u20ac".encode() * 5000, True), ("LICENSE", b"", True),
        (".gitignore", b"*.o\n", True), ("x.conf", b"a\r\n\tb\x1b[0m\x0c", True), ("x.rs", b"\xe4", False), ("x.rs", b"caf\xc3", False),
        ("Makefile", b"a\0b", False), ("x", b"\x7fELF\x02", False), ("x", b"\x01", False), ("x", b"x" * 300 + b"\xff" + b"x" * 5000, False),
        ("x.exe", b"MZ text", False), ("x", b"text" * 2000 + b"\0", True),
    ]  # fmt: skip

    @pytest.mark.parametrize(("name", "data", "text"), SNIFFED, ids=range(len(SNIFFED)))
    def test_text_without_a_type_is_shown_and_not_saved(
        self, name: str, data: bytes, text: bool, tmp_path: object
    ) -> None:
        (tmp_path / name).write_bytes(data)
        for method, fields in (("GET", []), ("HEAD", []), ("GET", ["Range: bytes=0-1"])):
            answer = say(self.site(tmp_path, hidden=True), get(f"/{name}", *fields, method=method))
            assert (b"Content-Type: text/plain; charset=utf-8\r\n" in answer) is text
            assert (b"Content-Type: application/octet-stream\r\n" in answer) is not text
        assert ask(self.site(tmp_path, hidden=True), f"/{name}")[2] == data

    def test_another_file_of_the_same_size_and_time_has_another_tag(self, tmp_path: object) -> None:
        site = self.site(tmp_path)
        write_files(tmp_path, {"x": b"old", "y": b"new"})
        for name in "xy":
            os.utime(tmp_path / name, (1, 1))
        fields = ask(site, "/x")[1]
        tag = fields["etag"]
        assert ask(self.site(tmp_path), "/x")[1]["etag"] == tag and tag[0] == '"'
        assert ask(site, "/x", f"If-None-Match: {tag}")[0] == 304
        assert ask(site, "/x", "Range: bytes=1-", f"If-Range: {tag}")[2] == b"ld"
        (tmp_path / "y").rename(tmp_path / "x")
        for field in (f"If-None-Match: {tag}", f"If-Modified-Since: {fields['last-modified']}"):
            assert ask(site, "/x", field)[2] == b"new"
        for value in (tag, fields["last-modified"]):
            assert ask(site, "/x", "Range: bytes=1-", f"If-Range: {value}")[2] == b"new"
        assert ask(site, "/x", f"If-Match: {tag}")[0] == 412

    def test_a_file_written_in_place_has_another_tag(self, tmp_path: object) -> None:
        (tmp_path / "x").write_bytes(b"old")
        facts = os.stat(tmp_path / "x")
        tag = ask(self.site(tmp_path), "/x")[1]["etag"]

        def write() -> bool:  # until the clock of the file system has moved on
            (tmp_path / "x").write_bytes(b"new")
            os.utime(tmp_path / "x", ns=(facts.st_mtime_ns, facts.st_mtime_ns))
            return os.stat(tmp_path / "x").st_ctime_ns != facts.st_ctime_ns

        eventually(write)
        assert ask(self.site(tmp_path), "/x", f"If-None-Match: {tag}")[2] == b"new"

    GZIPPED = gzip.compress(b"new")
    STALE = [  # (the compressed file, how much newer than the plain one it is in nanoseconds, whether it is sent)
        (GZIPPED, 10**9, True), (GZIPPED, 0, True), (GZIPPED, -123_456_789, True), (GZIPPED, -789, True), (GZIPPED, -1, False), (GZIPPED, -10**9, False),
        (GZIPPED, -456_789, False), (b"", 10**9, False), (b"new", 10**9, False), (b"\x1f", 10**9, False), (b"PK\3\4", 10**9, False),
    ]  # fmt: skip

    @pytest.mark.parametrize(("data", "newer", "taken"), STALE)
    def test_a_compressed_file_that_cannot_be_the_plain_one_is_not_used(
        self, data: bytes, newer: int, taken: bool, tmp_path: object
    ) -> None:
        when = MTIME * 10**9 + 123_456_789
        write_files(tmp_path, {"x.json": b"new", "x.json.gz": data})
        os.utime(tmp_path / "x.json", ns=(when, when))
        os.utime(tmp_path / "x.json.gz", ns=(when + newer, when + newer))
        before = len(os.listdir("/proc/self/fd"))
        _, fields, body = ask(self.site(tmp_path), "/x.json", "Accept-Encoding: gzip")
        assert (fields.get("content-encoding"), body) == (("gzip", data) if taken else (None, b"new"))
        assert len(os.listdir("/proc/self/fd")) == before

    def test_an_empty_or_special_compressed_file_is_not_used(self, tmp_path: object) -> None:
        write_files(tmp_path, {"x": b"plain", "x.br": b""})
        os.mkfifo(tmp_path / "x.gz")
        assert ask(self.site(tmp_path), "/x", "Accept-Encoding: br, gzip")[2] == b"plain"

    @pytest.mark.parametrize("below", ["", "/sub", "/sub/..", "/deep/../sub"])
    def test_the_root_that_was_named_is_followed(self, below: str, tmp_path: object) -> None:
        for name in ("a", "b"):
            (tmp_path / name / "sub" / "deep").mkdir(parents=True)
            (tmp_path / name / "deep").mkdir()
            for folder in (tmp_path / name, tmp_path / name / "sub"):
                write_files(folder, {"x": name, f"only-in-{name}": ""})
                (folder / "inside").symlink_to("x")
                (folder / "outside").symlink_to(tmp_path / "a" / "x")
        (tmp_path / "current").symlink_to("a")
        site = self.site(f"{tmp_path}/current{below}")

        def check(name: str) -> None:
            assert [ask(site, path)[2] for path in ("/x", "/inside")] == [name.encode()] * 2
            listing = say(site, get("/"))
            assert f"only-in-{name}".encode() in listing and listing.count(b"only-in-") == 2
            assert f"only-in-{name}".encode() in say(site, get("/?zip"))

        check("a")
        (tmp_path / "next").symlink_to("b")
        (tmp_path / "next").rename(tmp_path / "current")
        check("b")
        assert ask(site, "/outside")[0] == 404
        shutil.rmtree(tmp_path / "a")
        check("b")
        (tmp_path / "b").rename(tmp_path / "c")
        assert ask(site, "/x")[0] == 404
        (tmp_path / "current").unlink()
        (tmp_path / "c").rename(tmp_path / "current")  # now it is no link any more
        check("b")

    def test_a_relative_root_is_the_one_of_the_start(self, tmp_path: object, monkeypatch: Patch) -> None:
        write_files(tmp_path, {"a/root/x": "a", "b/root/x": "b"})
        monkeypatch.chdir(tmp_path / "a")
        site = self.site("root")
        monkeypatch.chdir(tmp_path / "b")
        assert ask(site, "/x")[2] == b"a"

    MADE_UP = ["/proc/sys/kernel/ostype", "/proc/cpuinfo", "/sys/kernel/mm/transparent_hugepage/enabled"]

    @pytest.mark.parametrize("path", MADE_UP)
    @pytest.mark.parametrize("fields", [[], ["Range: bytes=0-1"], ['If-None-Match: "x"', f"If-Modified-Since: {DATE}"]])
    def test_a_file_whose_size_is_not_true_is_read_to_its_end(
        self, path: str, fields: list[str], background: Background
    ) -> None:
        if not os.path.exists(path):
            pytest.skip(f"there is no {path}")
        folder, name = os.path.split(path)
        tunnel = Tunnel(background, ptth.server_handler(ptth.Site(folder), "n"))
        before = len(os.listdir("/proc/self/fd"))
        for answer in (
            fetch_direct(folder, get(f"/{name}", *fields)),
            tunnel.fetch(get(f"/frontend/servers/n/files/{name}", *fields)),
        ):
            status, got, body = one(answer)
            with open(path, "rb") as file:
                whole = file.read()
            assert status == 200 and got["transfer-encoding"] == "chunked" and got["content-type"] == ptth.PLAIN_TEXT
            assert not {"content-length", "accept-ranges", "etag", "last-modified"} & got.keys()
            assert body == whole or path == "/proc/cpuinfo" and len(body) > 100  # the clock rates change
        old = fetch_direct(folder, f"GET /{name} HTTP/1.0\r\n\r\n".encode())
        assert old.partition(b"\r\n\r\n")[2] and b"Content-Length" not in old
        head = fetch_direct(folder, get(f"/{name}", method="HEAD"))
        assert b" 200 " in head and b"Content-Length" not in head
        tunnel.close()
        eventually(lambda: len(os.listdir("/proc/self/fd")) <= before)

    def test_what_the_system_shows_of_a_process_is_not_served(self) -> None:
        if not os.path.exists("/proc/self/environ"):
            pytest.skip("there is no /proc")
        for path in ("/self/environ", f"/{os.getpid()}/environ", f"/{os.getpid()}/maps"):
            assert ask(self.site("/proc"), path)[0] == 404
        assert ask(self.site("/proc/self"), "/status")[0] == 404

    ERRORS = [
        (errno.ENOENT, 404), (errno.ENOTDIR, 404), (errno.ELOOP, 404), (errno.ENAMETOOLONG, 404), (errno.EILSEQ, 404), (errno.EINVAL, 404), (errno.ENXIO, 404),
        (errno.EACCES, 403), (errno.EPERM, 403), (errno.EMFILE, 503), (errno.ENFILE, 503), (errno.ENOMEM, 503),
        (errno.EIO, 500), (errno.ETIMEDOUT, 500), (errno.ESTALE, 500), (errno.EHOSTDOWN, 500), (errno.ENOTCONN, 500),
    ]  # fmt: skip

    @pytest.mark.parametrize(("number", "status"), ERRORS, ids=[errno.errorcode[row[0]] for row in ERRORS])
    def test_an_error_of_the_file_system_is_told_apart(
        self, number: int, status: int, tmp_path: object, monkeypatch: Patch, capfd: Output
    ) -> None:
        (tmp_path / "x").write_text("x")
        refuse_to_open(monkeypatch, os.fsencode(tmp_path / "x"), number)
        assert ask(self.site(tmp_path), "/x")[0] == status
        told = capfd.readouterr().err
        assert (f"{tmp_path}/x" in told and "cannot read" in told) is (status == 500)
        assert told.count("\n") == (status == 500)

    @pytest.mark.parametrize("number", [errno.EIO, errno.ETIMEDOUT])
    @pytest.mark.parametrize("name", ["x.txt", "x", "large.txt"])
    def test_a_file_that_cannot_be_read_is_500_with_its_path_in_the_log(
        self, name: str, number: int, tmp_path: object, monkeypatch: Patch, capfd: Output
    ) -> None:
        (tmp_path / name).write_bytes(b"x" * (50_000 if name == "large.txt" else 10))
        before = len(os.listdir("/proc/self/fd"))
        monkeypatch.setattr(ptth, "read_at", failing(number))
        assert ask(self.site(tmp_path), f"/{name}")[0] == 500
        assert f"{tmp_path}/{name}: {os.strerror(number).lower()}" in capfd.readouterr().err
        assert len(os.listdir("/proc/self/fd")) == before

    @pytest.mark.skipif(
        not hasattr(os, "setresuid") or os.geteuid() != 0,
        reason="only root can become somebody else, and not everywhere",
    )
    def test_a_folder_that_can_only_be_searched_or_only_be_listed(self) -> None:
        import pathlib
        import tempfile

        with tempfile.TemporaryDirectory() as made:  # other users cannot enter tmp_path
            self.check_closed_folders(pathlib.Path(made))

    def check_closed_folders(self, tmp_path: object) -> None:
        for name in ("searched/deep", "listed", "closed"):
            write_files(tmp_path / name, {"index.html": "the index", "x.txt": "x"})
        (tmp_path / "searched" / "index.html").write_text("the index")
        (tmp_path / "link").symlink_to("searched")
        (tmp_path / "bare").mkdir(0o711)
        for name, mode in (("searched", 0o711), ("listed", 0o744), ("closed", 0o700)):
            (tmp_path / name).chmod(mode)
        write_files(tmp_path / "shown", {"open": "x", "file": "x", "ptth_server.toml": "x"})
        for name in ("file", "ptth_server.toml"):
            (tmp_path / "shown" / name).chmod(0)
        for name in ("searched", "listed", "closed", "bare"):
            (tmp_path / "shown" / name).symlink_to(f"../{name}")
        tmp_path.chmod(0o711)
        site = self.site(tmp_path)
        statuses = {
            "/searched/": 200, "/searched": 301, "/link/": 200, "/link": 301, "/searched/index.html": 200, "/searched/deep/x.txt": 200,
            "/searched/missing": 404, "/bare/": 403, "/bare/?zip": 403, "/listed/index.html": 403, "/listed/x.txt": 403, "/closed/": 403, "/closed/x.txt": 403,
        }  # fmt: skip
        for path in ("/listed/x.txt", "/shown/?zip"):  # import what others may not read
            ask(site, path)
        os.setresuid(65534, 65534, 0)
        try:
            got = {path: ask(site, path)[0] for path in statuses}
            index = ask(site, "/link/", "Accept: application/json")[2]
            page, listing, archive = (
                ask(site, *to)[2] for to in (["/shown/"], ["/shown/", "Accept: application/json"], ["/shown/?zip"])
            )
        finally:
            os.setresuid(0, 0, 0)
        assert got == statuses and index == b"the index"
        closed = ["bare", "closed", "file", "listed"]
        assert set(re.findall(rb'href="([^"]+)"', page)) == {b"../", b"open", b"searched/"}
        entries = json.loads(listing)["entries"]
        assert sorted(entry["name"] for entry in entries if entry.get("error") == "Permission denied") == closed
        assert len(entries) == 6
        note = self.unpack(archive)["could-not-be-read.txt"].decode().splitlines()
        assert sorted(note) == [f"{name}: Permission denied" for name in [*closed, "searched"]]

    def test_a_time_that_no_calendar_has_is_no_error(self, tmp_path: object) -> None:
        (tmp_path / "f").write_text("x")
        os.utime(tmp_path / "f", (2**33, 2**33))
        status, fields, _ = ask(self.site(tmp_path), "/f")
        assert (status, ptth.parse_date(fields["last-modified"], 1.8e9) <= time.time()) == (200, True)
        assert ask(self.site(tmp_path), "/")[0] == 200
        assert ptth.clamped_seconds(2**62 * 10**9) == 253402300799

    def test_no_descriptor_stays_open(self, root: str) -> None:
        handler = self.site(root)
        say(handler, get("/hello.txt"))
        before = len(os.listdir("/proc/self/fd"))
        for path, fields, *_ in self.FILES:
            say(handler, get(path, *fields))
            say(handler, get(path, *fields, method="HEAD"))
        assert len(os.listdir("/proc/self/fd")) == before


def parse_answer(data: bytes, method: str) -> tuple[int, dict[str, str], bytes]:
    """Return the only response to a request; to HEAD it has a length and no body."""
    if method != "HEAD":
        return one(data)
    status, fields, body = one(re.sub(rb"(?i)\r\nContent-Length: ", b"\r\nLength: ", data))
    return status, {name.replace("length", "content-length"): value for name, value in fields.items()}, body


def fetch_direct(root: str, request: bytes) -> bytes:
    """Return the response of a file server over a real socket, so that it uses sendfile."""

    async def talk() -> bytes:
        async with listening(ptth.HTTPServer(ptth.site_handler(ptth.Site(root)))) as port:
            return await asyncio.to_thread(fetch, port, request)

    return in_time(talk())


def failing(number: int) -> object:
    """Return a function that fails with this error of the system."""

    def fail(*args: object, **options: object) -> object:
        raise OSError(number, os.strerror(number), *[path for path in args[:1] if isinstance(path, bytes)])

    return fail


def refuse_to_open(monkeypatch: Patch, ending: bytes, number: int) -> None:
    """Let os.open fail for paths with this ending."""
    real = os.open

    def open_(path: object, *args: object, **options: object) -> int:
        return failing(number)(path) if os.fsencode(path).endswith(ending) else real(path, *args, **options)

    monkeypatch.setattr(os, "open", open_)


class Inbox:
    """A folder for uploads, directly or through a tunnel."""

    def __init__(self, background: Background, where: object, through: str, **options: object) -> None:
        self.root = where / "inbox"
        self.root.mkdir()
        self.site = ptth.Site(str(self.root), ptth.SiteOptions(upload=True, **options))
        self.prefix, self.tunnel = "", None
        self._stack = contextlib.ExitStack()
        if through == "tunnel":
            self.prefix = "/frontend/servers/n/files"
            self.tunnel = Tunnel(background, ptth.server_handler(self.site, "n"))
            self._stack.callback(self.tunnel.close)
            self.port = self.tunnel.port
        else:
            self.port = self._stack.enter_context(background.serve(ptth.site_handler(self.site)))

    def close(self) -> None:
        self._stack.close()

    def send(self, path: str, *pieces: bytes, method: str = "PUT", fields: object = ()) -> tuple[int, dict, bytes]:
        """Send a request with a body; in chunks, if there are several pieces."""
        length = [f"Content-Length: {len(pieces[0])}"] if len(pieces) == 1 else ["Transfer-Encoding: chunked"]
        body = pieces[0] if len(pieces) == 1 else b"".join([*map(ptth.format_chunk, pieces), b"0\r\n\r\n"])
        head = get(self.prefix + path, *length, *fields, method=method)
        return one(fetch(self.port, head + body, half_close=False))

    def put(self, path: str, *pieces: bytes, fields: object = ()) -> int:
        return self.send(path, *pieces, fields=fields)[0]

    def tag(self, path: str) -> str:
        return one(fetch(self.port, get(self.prefix + path)))[1]["etag"]

    def files(self) -> dict[str, bytes]:
        """Return everything below the folder: names (with a slash for folders) and contents."""
        found = {}
        for path in sorted(self.root.rglob("*")):
            name = str(path.relative_to(self.root))
            with contextlib.suppress(FileNotFoundError):  # a part of an upload that was given up meanwhile
                found[name + "/" * path.is_dir()] = b"" if path.is_dir() else path.read_bytes()
        return found


@pytest.fixture
def open_inbox(background: Background, tmp_path: object) -> object:
    """Make an inbox with options, without a tunnel if nothing else is said. It is closed when the test ends."""
    with contextlib.ExitStack() as stack:

        def make(through: str = "direct", **options: object) -> Inbox:
            return stack.enter_context(contextlib.closing(Inbox(background, tmp_path, through, **options)))

        yield make


@pytest.fixture(params=["direct", "tunnel"])
def inbox(request: pytest.FixtureRequest, open_inbox: object) -> Inbox:
    return open_inbox(request.param)


class TestUploads:
    @pytest.mark.parametrize("size", [0, 5, ptth.MAX_INLINE + 1, 3_000_000])
    def test_a_file_arrives_whole_and_is_replaced_when_its_version_is_named(self, size: int, inbox: Inbox) -> None:
        old, new = random.Random(size).randbytes(size), b"new"
        status, fields, _ = inbox.send("/x", old)
        assert (status, inbox.files(), fields["etag"]) == (201, {"x": old}, inbox.tag("/x"))
        for wrong in ([], ['If-Match: "x"'], ["If-None-Match: *"], [f"If-Match: W/{fields['etag']}"]):
            status, told, _ = inbox.send("/x", new, fields=wrong)
            assert (status, told["etag"], inbox.files()) == (412, fields["etag"], {"x": old})
        status, told, _ = inbox.send("/x", b"n", b"ew", fields=[f'If-Match: "y", {fields["etag"]}'])
        assert (status, told["etag"], inbox.files()) == (204, inbox.tag("/x"), {"x": new})
        assert inbox.put("/x", old, fields=[f"If-Match: {fields['etag']}"]) == 412
        assert inbox.put("/x", old, fields=["If-Match: *", f"If-None-Match: {told['etag']}"]) == 412
        assert inbox.put("/x", old, fields=["If-Match: *"]) == 204
        assert inbox.put("/y", old, fields=["If-Match: *"]) == 412
        assert inbox.put("/y", old, fields=["If-None-Match: *"]) == 201
        assert inbox.files() == {"x": old, "y": old}

    def test_folders(self, inbox: Inbox) -> None:
        assert inbox.put("/a/x", b"x") == 409
        assert [inbox.put("/a/", b"") for _ in range(2)] == [201, 204]
        assert inbox.put("/a/", b"", fields=["If-None-Match: *"]) == 412
        (inbox.root / "link").symlink_to("a")
        assert inbox.put("/link/", b"") == 409
        (inbox.root / "link").unlink()
        assert inbox.put("/a/x", b"x") == 201
        for path in ("/a", "/a/x/", "/a/x/y", "/", "/b/c/", "/c/.."):
            assert inbox.put(path, b"") == 409, path
        assert inbox.put("/d/", b"x") == 415
        assert inbox.files() == {"a/": b"", "a/x": b"x"}

    NAMES = [  # (path, status)
        ("/.x", 403), ("/.git/x", 409), ("/%2ex", 403), ("/a%2Fb", 403), ("/..%2Fx", 403), ("/a%0Ab", 400), ("/a%7F", 400), ("/a%C2%85", 400),
        ("/" + "x" * 256, 400), ("/" + "%C3%BC" * 128, 400), ("/ptth_server.toml", 403), ("/ptth_relay.toml.bak", 403), ("/a%00", 400), ("/%zz", 400),
        ("/.ptth-upload-1", 403), ("/link", 403), ("/dangling", 403), ("/out/x", 409), ("/dead/x", 409), ("/fifo", 403), ("/sub/x", 403), ("/sub/x/", 403),
    ]  # fmt: skip

    @pytest.mark.parametrize(("path", "status"), NAMES)
    def test_the_walls_are_those_of_reading(self, path: str, status: int, open_inbox: object, tmp_path: object) -> None:
        inbox = open_inbox()
        write_files(tmp_path, {"secret/x": "secret", "inbox/hello": "hello"})
        for name in (".git", "folder"):
            (inbox.root / name).mkdir()
        os.mkfifo(inbox.root / "fifo")
        links = {
            "link": "hello", "dangling": tmp_path / "new", "out": tmp_path / "secret", "dead": "/no", "sub": "folder",
        }  # fmt: skip
        for link, aim in links.items():
            (inbox.root / link).symlink_to(aim)
        before = sorted(os.walk(tmp_path))
        for fields in ([], ["If-Match: *"]):
            assert inbox.put(path, b"evil", fields=fields) in (status, 412 if status == 403 else 0)
        assert sorted(os.walk(tmp_path)) == before
        assert (inbox.root / "hello").read_text() == "hello" and (tmp_path / "secret" / "x").read_text() == "secret"

    def test_links_to_folders_are_followed_where_all_links_are(self, open_inbox: object, tmp_path: object) -> None:
        inbox = open_inbox(follow_symlinks=True)
        (tmp_path / "disk").mkdir()
        (inbox.root / "link").symlink_to(tmp_path / "disk")
        assert [inbox.put("/link/x", b"x"), inbox.put("/link/new/", b"")] == [201, 201]
        assert sorted(os.listdir(tmp_path / "disk")) == ["new", "x"]

    def test_every_name_that_a_listing_shows_can_be_uploaded(self, inbox: Inbox) -> None:
        names = [b"a b&c<d>\"e'#%?.txt", "\u00fcml\u00e4ut".encode(), b"bytes\xff\xfe", b"back\\slash", b"a:b", b"~"]
        names.append(b"x" * 255)
        assert [inbox.put("/" + ptth.quote(name), name) for name in names] == [201] * 7
        for name in names:
            with open(os.path.join(os.fsencode(inbox.root), name), "rb") as file:
                assert file.read() == name

    def test_a_key_is_not_replaced_and_a_file_keeps_its_mode(self, open_inbox: object) -> None:
        inbox = open_inbox()
        for name in ("key", "run"):
            (inbox.root / name).write_text("old")
            (inbox.root / name).chmod(0o4755)
        inbox.site._private.append(os.fsencode(inbox.root / "key"))
        assert [inbox.put("/" + name, b"new", fields=["If-Match: *"]) for name in ("key", "run")] == [403, 204]
        assert inbox.files() == {"key": b"old", "run": b"new"}
        assert (inbox.root / "run").stat().st_mode & 0o7777 == 0o755

    def test_without_upload_nothing_is_taken(self, root: str, files_tunnel: Tunnel) -> None:
        for method in ("PUT", "POST"):
            data = get("/frontend/servers/n/files/new", "Content-Length: 1", method=method) + b"x"
            status, fields, _ = one(files_tunnel.fetch(data))
            assert (status, fields["allow"]) == (405, "GET, HEAD, OPTIONS")
        assert not os.path.exists(os.path.join(root, "new"))

    def test_only_the_place_of_the_files_takes_any(self, inbox: Inbox) -> None:
        allowed = one(fetch(inbox.port, get(inbox.prefix + "/", method="OPTIONS")))[1]["allow"]
        assert allowed.endswith("PUT, POST, MKCOL, PROPFIND")
        if inbox.tunnel:
            for path in ("/x", "/api/v1/dir/x", "/", "/files"):
                data = get("/frontend/servers/n" + path, "Content-Length: 1", method="PUT") + b"x"
                assert one(inbox.tunnel.fetch(data))[0] in (405, 409), path
        assert inbox.files() == {}

    def test_what_is_no_whole_file_is_refused(self, inbox: Inbox) -> None:
        assert inbox.put("/x", b"x", fields=["Content-Range: bytes 0-0/2"]) == 400
        assert inbox.put("/x", b"x", fields=["Content-Encoding: gzip"]) == 415
        assert inbox.files() == {}

    @pytest.mark.parametrize(
        ("fields", "status"),
        [
            (["Origin: http://example.com"], 201), (["Origin: http://example.com:80"], 201), (["Sec-Fetch-Site: same-origin"], 201),
            (["Sec-Fetch-Site: none"], 201), (["Origin: http://evil.test"], 403), (["Origin: null"], 403), (["Origin: http://example.com:81"], 403),
            (["Origin: http://example.com.evil.test"], 403), (["Sec-Fetch-Site: cross-site"], 403), (["Sec-Fetch-Site: same-site"], 403),
            (["Origin: http://evil.test", "X-Forwarded-Host: evil.test"], 403), (["Origin: "], 403), (["Origin: null", "Sec-Fetch-Site: cross-site"], 403),
            (["Sec-Fetch-Site: same-origin", "Sec-Fetch-Site: cross-site"], 403),
        ],
    )  # fmt: skip
    def test_a_page_of_another_site_cannot_upload(self, fields: list[str], status: int, open_inbox: object) -> None:
        inbox = open_inbox(cors=True)
        assert inbox.put("/x", b"x", fields=fields) == status
        asked = get("/x", "Origin: http://evil.test", "Access-Control-Request-Method: PUT", method="OPTIONS")
        assert one(fetch(inbox.port, asked))[1]["access-control-allow-methods"] == "GET, HEAD"

    @pytest.mark.parametrize("through", ["direct", "tunnel"])
    def test_a_limit_holds_with_and_without_a_length(self, through: str, open_inbox: object) -> None:
        inbox = open_inbox(through, max_upload=100_000)
        assert inbox.put("/a", bytes(100_000)) == inbox.put("/b", bytes(50_000), bytes(50_000)) == 201
        assert inbox.put("/c", bytes(50_000), bytes(50_001)) == 413
        head = get(inbox.prefix + "/d", "Content-Length: 100001", "Expect: 100-continue", method="PUT")
        assert one(fetch(inbox.port, head, half_close=False))[0] == 413
        assert set(inbox.files()) == {"a", "b"}

    def test_a_file_for_which_there_is_no_space_is_refused_before_it_comes(self, inbox: Inbox) -> None:
        head = get(inbox.prefix + "/x", f"Content-Length: {10**16}", "Expect: 100-continue", method="PUT")
        assert one(fetch(inbox.port, head, half_close=False))[0] == 507
        assert inbox.files() == {}

    @pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can mount")
    def test_a_full_disk_is_507_and_leaves_nothing(self, inbox: Inbox) -> None:
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", inbox.root], check=False).returncode:
            pytest.skip("mount is not allowed")
        try:
            assert inbox.put("/x", *[bytes(100_000)] * 30) == 507
            assert inbox.put("/y", bytes(2_000_000)) == 507
            assert inbox.files() == {}
            assert inbox.put("/z", bytes(100_000)) == 201
        finally:
            subprocess.run(["umount", "-l", inbox.root], check=True)

    @pytest.mark.parametrize("framing", ["Content-Length: 1000000", "Transfer-Encoding: chunked"])
    def test_an_upload_that_breaks_off_leaves_nothing(self, framing: str, inbox: Inbox) -> None:
        (inbox.root / "old").write_bytes(b"old")
        body = bytes(300_000) if "Length" in framing else ptth.format_chunk(bytes(300_000))
        for path, fields in (("/x", []), ("/old", ["If-Match: *"])):
            with connect(inbox.port, get(inbox.prefix + path, framing, *fields, method="PUT") + body):
                eventually(lambda: len(os.listdir(inbox.root)) > 1)  # it is there, hidden, and never listed
                assert b"upload-" not in fetch(inbox.port, get(inbox.prefix + "/"))
            eventually(lambda: inbox.files() == {"old": b"old"})

    def test_half_a_file_is_never_served(self, open_inbox: object) -> None:
        inbox = open_inbox(hidden=True)
        partial = ptth.PARTIAL.decode() + "0" * 32
        write_files(inbox.root, {partial: "half", ".whole": "whole"})
        body = one(fetch(inbox.port, get("/", "Accept: application/json")))[2]
        assert [entry["name"] for entry in json.loads(body)["entries"]] == [".whole"]
        assert one(fetch(inbox.port, get(f"/{partial}")))[0] == 404
        assert inbox.put(f"/{partial}", b"x", fields=["If-Match: *"]) == 403

    @pytest.mark.parametrize("replaced", [False, True])
    def test_of_many_uploads_of_one_name_one_wins(self, replaced: bool, inbox: Inbox) -> None:
        condition = []
        if replaced:
            (inbox.root / "x").write_bytes(b"old")
            condition = [f"If-Match: {inbox.tag('/x')}"]
        with concurrent.futures.ThreadPoolExecutor(50) as pool:
            datas = [bytes([i]) * 100_000 for i in range(50)]
            statuses = list(pool.map(lambda data: inbox.put("/x", data, fields=condition), datas))
        assert sorted(statuses) == sorted([204 if replaced else 201, *[412] * 49])
        assert inbox.files() == {"x": datas[[status < 300 for status in statuses].index(True)]}

    def test_the_operator_is_told_who_can_write(self, tmp_path: object, capfd: Output) -> None:
        write_configs(tmp_path, 1, str(tmp_path / "in"), upload=True)
        (tmp_path / "in").mkdir()
        path = str(tmp_path / "ptth_server.toml")
        for auth, words in (("", f"everybody who reaches this server can add files to {tmp_path}/in\n"), ("me:x", "")):
            config = ptth.load_server_config(path, {"auth": auth})
            ptth.make_content(config)
            told = capfd.readouterr().err
            assert told.endswith(words) and bool(told) == bool(words)

    @pytest.mark.parametrize("call", ["open", "fsync", "link", "unlink"])
    def test_a_slow_disk_keeps_nobody_else_waiting(self, call: str, open_inbox: object, monkeypatch: Patch) -> None:
        inbox, real, begun, end = open_inbox(), getattr(os, call), threading.Event(), threading.Event()
        (inbox.root / "other").write_bytes(b"other")

        def slow(path: object, *more: object) -> object:
            if call == "fsync" or ptth.PARTIAL in os.fsencode(path):
                begun.set()
                assert end.wait(20)
            return real(path, *more)

        monkeypatch.setattr(os, call, slow)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            status = pool.submit(inbox.put, "/x", b"x")
            assert begun.wait(20)
            assert one(fetch(inbox.port, get("/other")))[2] == b"other"
            assert one(fetch(inbox.port, get("/x")))[0] == (200 if call == "unlink" else 404)
            end.set()
            assert status.result(20) == 201
        assert inbox.files() == {"other": b"other", "x": b"x"}

    def test_no_upload_comes_between_the_check_of_a_version_and_its_replacement(
        self, open_inbox: object, monkeypatch: Patch
    ) -> None:
        inbox, real, begun, end = open_inbox(), os.replace, threading.Event(), threading.Event()
        (inbox.root / "x").write_bytes(b"old")

        def slow(*paths: object) -> None:
            begun.set()
            assert end.wait(20)
            real(*paths)

        monkeypatch.setattr(os, "replace", slow)
        condition = [f"If-Match: {inbox.tag('/x')}"]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            first = pool.submit(inbox.put, "/x", b"1", fields=condition)
            assert begun.wait(20)
            second = pool.submit(inbox.put, "/x", b"2", fields=condition)
            eventually(lambda: len(os.listdir(inbox.root)) == 3)
            concurrent.futures.wait([second], 0.1)  # it would come through in this time
            end.set()
            assert [first.result(20), second.result(20)] == [204, 412]
        assert inbox.files() == {"x": b"1"}

    def test_a_large_upload_goes_to_the_disk_while_it_arrives(self, open_inbox: object, monkeypatch: Patch) -> None:
        calls, real = [], os.fsync
        monkeypatch.setattr(os, "fsync", lambda fd: calls.append(os.fstat(fd).st_size) or real(fd))
        monkeypatch.setattr(ptth, "SYNC_SIZE", ptth.WRITE_SIZE)
        assert open_inbox().put("/x", bytes(ptth.WRITE_SIZE * 3)) == 201
        assert len(calls) >= 3 and calls[0] < calls[-1]

    ERRORS = [
        (errno.ENOSPC, 507), (errno.EDQUOT, 507), (errno.EACCES, 403), (errno.EPERM, 403), (errno.EROFS, 403), (errno.ENOENT, 409), (errno.ENOTDIR, 409),
        (errno.EFBIG, 413), (errno.ENAMETOOLONG, 400), (errno.EINVAL, 400), (errno.EMFILE, 503), (errno.EIO, 500), (errno.EEXIST, 412),
    ]  # fmt: skip

    @pytest.mark.parametrize(("number", "status"), ERRORS)
    def test_what_the_file_system_refuses(
        self, number: int, status: int, open_inbox: object, monkeypatch: Patch
    ) -> None:
        inbox = open_inbox()
        monkeypatch.setattr(os, "mkdir", failing(number))
        assert inbox.put("/a/", b"", fields=["If-None-Match: *"]) == status
        monkeypatch.setattr(os, "fsync", failing(number))
        assert inbox.put("/x", b"x") == status
        assert inbox.files() == {}

    def test_a_file_that_may_not_be_written_is_not_replaced(self, open_inbox: object, monkeypatch: Patch) -> None:
        inbox = open_inbox(listing=False)
        (inbox.root / "x").write_bytes(b"old")
        monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
        assert inbox.put("/x", b"new", fields=["If-Match: *"]) == 403
        assert [inbox.send(path, b"", method="PROPFIND")[0] for path in ("/", "/x")] == [404, 404]
        assert inbox.files() == {"x": b"old"}

    @in_loop
    async def test_a_stop_removes_what_has_not_arrived(self, tmp_path: object) -> None:
        server = ptth.HTTPServer(ptth.site_handler(ptth.Site(str(tmp_path), ptth.SiteOptions(upload=True))))
        async with listening(server) as port:
            with connect(port, get("/x", "Content-Length: 6", method="PUT") + b"abc"):
                while not os.listdir(tmp_path):
                    await asyncio.sleep(0.01)
                await server.stop(0)
        assert os.listdir(tmp_path) == []

    def test_where_there_are_no_hard_links(self, open_inbox: object, monkeypatch: Patch) -> None:
        monkeypatch.setattr(os, "link", failing(errno.EPERM))
        inbox = open_inbox()
        assert [inbox.put("/x", b"x"), inbox.put("/x", b"y")] == [201, 412]
        assert inbox.put("/x", b"z", fields=["If-Match: *"]) == 204
        assert inbox.files() == {"x": b"z"}
        with pytest.raises(FileExistsError):
            ptth.give_name(b"/nowhere", os.fsencode(inbox.root / "x"))

    @pytest.mark.parametrize(
        ("text", "seconds"),
        [("1000000000", 10**9), ("1000000000.5", 10**9), ("-1", None), ("9" * 99, None), ("x", None)],
    )
    def test_a_file_keeps_the_time_that_its_client_sends(
        self, text: str, seconds: int | None, open_inbox: object
    ) -> None:
        inbox = open_inbox()
        status, fields, _ = inbox.send("/x", b"x", fields=[f"X-OC-Mtime: {text}"])
        assert (status, fields.get("x-oc-mtime")) == (201, "accepted" if seconds else None)
        assert fields["etag"] == inbox.tag("/x")
        assert ((inbox.root / "x").stat().st_mtime == 10**9) == (seconds is not None)

    def test_a_killed_upload_leaves_the_old_file_and_the_next_start_removes_the_rest(
        self, start: object, tmp_path: object
    ) -> None:
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "x").write_bytes(b"old")
        options = ("file-server", str(tmp_path), "--port", "0", "--upload")
        server = start(*options).listening()
        eventually(lambda: "everybody" in "".join(server.told))
        upload = get("/sub/x", "Content-Length: 9000000", "If-Match: *", method="PUT") + bytes(1_000_000)
        with connect(server.port, upload):
            eventually(lambda: len(os.listdir(tmp_path / "sub")) == 2)
            other = start(*options).listening()  # the file is locked: a second server leaves it
            assert len(os.listdir(tmp_path / "sub")) == 2
            server.end(signal.SIGKILL)
        assert (tmp_path / "sub" / "x").read_bytes() == b"old"
        other.end()
        start(*options).listening()
        assert os.listdir(tmp_path / "sub") == ["x"]

    @pytest.mark.parametrize(
        ("text", "size"),
        [("0", 0), ("4096", 4096), ("1k", 1024), ("500M", 500 << 20), ("2 GiB", 2 << 30), ("1tb", 1 << 40), ("7B", 7), *((text, None) for text in ("", "-1", "1.5G", "x", "1P", "True", "1KK"))],
    )  # fmt: skip
    def test_sizes(self, text: str, size: int | None, tmp_path: object) -> None:
        if size is None:
            with pytest.raises(ValueError, match="500M"):
                ptth.parse_size(text)
        else:
            assert ptth.parse_size(text) == size
        write_configs(tmp_path, 1, str(tmp_path), upload=True, max_upload=text)
        if size is None:
            with pytest.raises(ptth.UserError, match="max_upload must be"):
                ptth.load_server_config(str(tmp_path / "ptth_server.toml"), {})
        else:
            site = ptth.load_server_config(str(tmp_path / "ptth_server.toml"), {}).site
            assert (site.upload, site.max_upload) == (True, size)

    @staticmethod
    def form(*parts: bytes, boundary: str = "b", end: bytes = b"--b--\r\n") -> tuple[bytes, list[str]]:
        """Return a form's body of these parts, each with its head, and its Content-Type field."""
        body = b"".join(b"--b\r\n" + part + b"\r\n" for part in parts) + end
        return body, [f"Content-Type: multipart/form-data; boundary={boundary}"]

    @staticmethod
    def part(filename: bytes, data: bytes, name: bytes = b"file") -> bytes:
        head = b'Content-Disposition: form-data; name="' + name + b'"'
        return head + (b'; filename="' + filename + b'"' if filename else b"") + b"\r\n\r\n" + data

    def post(self, inbox: Inbox, body: bytes, fields: list[str], path: str = "/") -> tuple[int, dict[str, str], str]:
        status, told, text = inbox.send(path, body, method="POST", fields=fields)
        return status, told, text.decode()

    def test_a_form_stores_files_and_makes_folders(self, inbox: Inbox) -> None:
        large = random.Random(1).randbytes(1_000_000)
        parts = [
            self.part(b"a.txt", b"a"), self.part(b"", b"", b"other"), self.part(b"large", large), self.part(b"", b"new", b"folder"),
            self.part(b"\xc3\xbc%22%.txt", b"\r\n--c\r\n--"), self.part(b"empty", b""), self.part(b'q\\"q', b""),
        ]  # fmt: skip
        status, fields, _ = self.post(inbox, *self.form(*parts))
        assert (status, fields["location"]) == (303, "./")
        names = {"a.txt": b"a", "large": large, "new/": b"", '\u00fc"%.txt': b"\r\n--c\r\n--", "empty": b"", 'q"q': b""}
        assert inbox.files() == names
        status, fields, _ = self.post(inbox, *self.form(self.part(b"x", b"x")), "/new")
        assert (status, fields["location"], inbox.files()) == (303, "./new/", {**names, "new/x": b"x"})
        if inbox.tunnel:  # the folder of all files has a name there
            status, fields, _ = self.post(inbox, *self.form(self.part(b"y", b"y")), "")
            assert (status, fields["location"]) == (303, "./files/")

    def test_a_form_says_what_it_could_not_store(self, inbox: Inbox) -> None:
        (inbox.root / "old").write_bytes(b"old")
        names = [
            b"old", b"../up", b".x", b"/etc/x", b"a%0Ab", b"a%0Db", b"..", b"ptth_server.toml", b"x" * 256, b"fine",
        ]  # fmt: skip
        status, _, text = self.post(inbox, *self.form(*[self.part(name, b"new") for name in names]))
        assert (status, inbox.files()) == (409, {"old": b"old", "fine": b"new"})
        assert "not stored: old (the name is taken), ../up (" in text and "; stored: fine" in text
        for parts in ([], [self.part(b"", b"", b"file")], [self.part(b"", b"", b"folder")]):
            assert self.post(inbox, *self.form(*parts))[0] == 400
        for name, status in ((b"old", 409), (b"../x", 403), (b"n" * 300, 400)):
            assert self.post(inbox, *self.form(self.part(b"", name, b"folder")))[0] == status
        assert self.post(inbox, *self.form(self.part(b"x", b"")), "/missing/")[0] == 409
        assert inbox.files() == {"old": b"old", "fine": b"new"}

    LAST = b"--b\r\nContent-Disposition: form-data; filename=x\r\n\r\nx\r\n--b--\r\n"  # a part that could be stored
    BROKEN = [  # (body, what stands behind multipart/form-data, status)
        (b"", "; boundary=b", 400), (b"--b", "; boundary=b", 400), (b"--b\r\n", "; boundary=b", 400), (b"--c--\r\n", "; boundary=b", 400),
        (b"--b\r\n" + b"x" * 9000, "; boundary=b", 400), (b"--b\r\nX: " + b"x" * 9000 + b"\r\n\r\n\r\n" + LAST, "; boundary=b", 400),
        (b"--b\r\nno field\r\n\r\nx\r\n" + LAST, "; boundary=b", 400), (b"--bb\r\n\r\n\r\n--bb--\r\n", "; boundary=b", 400),
        (b"--b\r\n\r\n\r\n" * 1000 + LAST, "; boundary=b", 400), (b"--b\r\n" * 10000 + LAST, "; boundary=b", 400),
        (b"--b--", "", 415), (b"--b--", "; boundary=", 415), (b"--b--", "; boundary=" + "b" * 71, 415), (b"--b--", '; boundary="b', 415),
    ]  # fmt: skip

    @pytest.mark.parametrize(("body", "kind", "status"), BROKEN)
    def test_a_broken_form_is_refused(self, body: bytes, kind: str, status: int, open_inbox: object) -> None:
        inbox = open_inbox()
        assert self.post(inbox, body, ["Content-Type: multipart/form-data" + kind])[0] == status
        assert inbox.files() == {}

    def test_a_form_without_its_end_leaves_whole_files_only(self, inbox: Inbox) -> None:
        for end in (b"", b"--b", b"--b-", b"\r\n--B--\r\n"):
            body, fields = self.form(self.part(b"one", b"1"), end=b"--b\r\n" + self.part(b"two", b"2") + end)
            assert self.post(inbox, body, fields)[0] == 400
            assert inbox.files() == {"one": b"1"}
            (inbox.root / "one").unlink()

    @pytest.mark.parametrize(
        "kind", ["; boundary=b", '; boundary="b"', "; charset=utf-8; BOUNDARY=b", ";boundary=b ; x=y"]
    )
    @in_loop
    async def test_a_form_in_other_spellings_and_in_any_pieces(self, kind: str, tmp_path: object) -> None:
        content = b"\r\n--\r\n--\r\n-b\r\n--\r\r\n--c--b" * 3
        body = b"preamble\r\n--b \t\r\nContent-Disposition: form-data; NAME=file; filename=x\r\n\r\n" + content
        body += b"\r\n--b\r\nContent-Disposition: form-data; name=folder\r\n\r\na folder\r\n--b--\r\nepilogue"
        site = ptth.Site(str(tmp_path), ptth.SiteOptions(upload=True))

        async def pieces(size: int) -> object:
            for i in range(0, len(body), size):
                yield body[i : i + size]

        for size in (1, 2, 3, 7, 50, 1000):
            headers = ptth.Headers([("Content-Type", "multipart/form-data" + kind)])
            request = ptth.Request("POST", "/", headers, body=Stream(functools.partial(pieces, size)))
            assert (await ptth.site_handler(site)(request)).status == 303
            assert (tmp_path / "x").read_bytes() == content
            (tmp_path / "x").unlink()
            (tmp_path / "a folder").rmdir()

    @in_loop
    async def test_an_endless_head_of_a_part_is_not_read_to_its_end(self, tmp_path: object) -> None:
        async def pieces() -> object:
            yield b"--b\r\n"
            while True:
                yield b"X: x\r\n"

        headers = ptth.Headers([("Content-Type", "multipart/form-data; boundary=b")])
        request = ptth.Request("POST", "/", headers, body=Stream(pieces))
        with pytest.raises(ptth.ProtocolError, match="not a form"):
            await ptth.Site(str(tmp_path), ptth.SiteOptions(upload=True)).respond(request, (), True)

    def test_a_form_cannot_name_the_folder_itself(self, open_inbox: object) -> None:
        inbox = open_inbox(hidden=True)
        assert self.post(inbox, *self.form(self.part(b".", b""), self.part(b"..", b"")))[0] == 400
        assert inbox.files() == {}

    def test_a_limit_holds_for_each_file_of_a_form(self, open_inbox: object) -> None:
        inbox = open_inbox(max_upload=100)
        body, fields = self.form(self.part(b"a", bytes(100)), self.part(b"b", bytes(101)), self.part(b"c", bytes(100)))
        assert self.post(inbox, body, fields)[0] == 413
        assert set(inbox.files()) == {"a", "c"}

    def test_a_form_of_the_listing_works_where_the_page_has_no_origin(self, open_inbox: object) -> None:
        inbox = open_inbox(cors=True)
        body, fields = self.form(self.part(b"x", b"x"))
        fields += ["Origin: null", "Sec-Fetch-Site: cross-site"]
        shown = one(fetch(inbox.port, get("/")))[2].decode()
        action = re.search(r'action="(\?upload=\w+)"', shown)[1]
        foreign = one(fetch(inbox.port, get("/", "Origin: null")))  # so a script of another site would read it
        assert "upload=" not in foreign[2].decode() and "Origin" in foreign[1]["vary"]
        for path, status in (("/", 403), (action[:-1], 403), ("/?upload=", 403), ("/" + action, 303)):
            assert self.post(inbox, body, fields, path.replace("?", "/?", path[0] == "?"))[0] == status, path

    def test_a_browser_uploads_by_choice_by_drop_and_in_the_sandbox(
        self, inbox: Inbox, tmp_path: object, browser: Browser
    ) -> None:
        write_files(tmp_path, {"one": "one", "two": "two", "old": "old"})
        (inbox.root / "old").write_bytes(b"older")
        browser.open(f"http://user:password@127.0.0.1:{inbox.port}{inbox.prefix}/")  # fetch() refuses such a URL
        rows = "return [...document.querySelectorAll('tbody a')].map(a => a.textContent)"
        drop = """const data = new DataTransfer(); for (const name of ['3', '4', '5']) data.items.add(new File([name], name));
            document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true}))"""
        click = "[...document.querySelectorAll('button')].find(b => b.textContent === '%s').click()"
        if inbox.tunnel:
            browser.type("#up input", f"{tmp_path}/one\n{tmp_path}/two")
            browser.run(click % "Upload")
        else:
            browser.type("#up input", f"{tmp_path}/one\n{tmp_path}/two\n{tmp_path}/old")
            eventually(lambda: "exists already" in browser.run("return document.querySelector('#jobs').innerText"))
        eventually(lambda: browser.run(rows) == ["old", "one", "two"])
        files = {"one": b"one", "two": b"two", "old": b"older"}
        assert inbox.files() == files
        browser.run(drop)
        eventually(lambda: browser.run(rows) == ["3", "4", "5", "old", "one", "two"])
        browser.type("#new input", "a folder")
        browser.run(click % "Create")
        eventually(lambda: browser.run(rows) == ["a folder/", "3", "4", "5", "old", "one", "two"])
        if not inbox.tunnel:
            browser.run(click % "Replace")
            files["old"] = b"old"
        files.update({"a folder/": b"", "3": b"3", "4": b"4", "5": b"5"})
        eventually(lambda: inbox.files() == files)

    def test_what_is_there_is_told_as_webdav_has_it(self, inbox: Inbox) -> None:
        write_files(inbox.root, {"a & b": b"12345", ".hidden": b"x", "ptth_server.toml": b"x"})
        for method, path, status in (
            ("MKCOL", "/\u00fc", 201), ("MKCOL", "/\u00fc/", 405), ("MKCOL", "/a%20%26%20b", 405), ("MKCOL", "/", 405), ("MKCOL", "/no/x", 409), ("MKCOL", "/.x", 403),
            ("PROPFIND", "/no", 404), ("PROPFIND", "/.hidden", 404), ("PROPFIND", "/ptth_server.toml", 404),
        ):  # fmt: skip
            got, fields, _ = inbox.send(path.encode().decode("latin-1"), b"", method=method)
            assert got == status, (method, path)
            assert fields.get("allow") == ("GET, HEAD, OPTIONS, PUT, POST, PROPFIND" if got == 405 else None)
        base = f"{inbox.prefix}/"
        for path, depth, expected in (
            ("/", "1", {base: ("0", True), base + "a%20%26%20b": ("5", False), base + "%C3%BC/": ("0", True)}),
            ("/", "0", {base: ("0", True)}), ("/%C3%BC", "1", {base + "%C3%BC/": ("0", True)}), ("/a%20%26%20b", "1", {base + "a%20%26%20b": ("5", False)}),
        ):  # fmt: skip
            status, fields, body = inbox.send(path, b"", method="PROPFIND", fields=[f"Depth: {depth}"])
            assert (status, fields["content-type"]) == (207, "application/xml; charset=utf-8")
            told = {}
            for row in xml.etree.ElementTree.fromstring(body).findall("{DAV:}response"):
                size, is_folder = row.findtext(".//{DAV:}getcontentlength"), row.find(".//{DAV:}collection") is not None
                told[row.findtext("{DAV:}href")] = (size, is_folder)
            assert told == expected

    @pytest.mark.parametrize(
        ("number", "status", "words"), [(errno.EACCES, 403, "no permission to read"), (errno.ENOENT, 404, "not found")]
    )
    def test_what_cannot_be_read_is_told_as_in_a_listing(
        self, number: int, status: int, words: str, inbox: Inbox, monkeypatch: Patch
    ) -> None:
        monkeypatch.setattr(os, "scandir", failing(number))
        got, _, body = inbox.send("/", b"", method="PROPFIND")
        assert got == status and words in body.decode()

    @pytest.mark.parametrize(("length", "sent"), [(100, 10), (100_000, 1_000), (900_000, 100_000)])
    @pytest.mark.parametrize("through", ["direct", "tunnel"])
    def test_an_upload_that_stalls_is_408_and_leaves_nothing(
        self, length: int, sent: int, through: str, open_inbox: object, monkeypatch: Patch
    ) -> None:
        monkeypatch.setattr(ptth, "STALL_TIMEOUT", 0.3)
        inbox = open_inbox(through)
        head = get(f"{inbox.prefix}/x", f"Content-Length: {length}", method="PUT")
        assert one(fetch(inbox.port, head + bytes(sent), half_close=False))[0] == 408
        eventually(lambda: inbox.files() == {})

    def test_a_relay_that_is_gone_when_it_is_asked_for_an_upload_is_no_fault(
        self, open_inbox: object, monkeypatch: Patch, capfd: Output
    ) -> None:
        inbox = open_inbox("tunnel")
        handle, asked = inbox.tunnel.http.handler, []

        async def reset(request: ptth.Request) -> ptth.Response:
            if "/http_request/" in request.target:
                asked.append(request)
                request.connection.reset()
            return await handle(request)

        monkeypatch.setattr(inbox.tunnel.http, "handler", reset)
        assert inbox.put("/x", bytes(100_000)) == 502
        assert asked and inbox.files() == {} and "Traceback" not in capfd.readouterr().err

    @pytest.mark.skipif(os.name == "nt", reason="no locks")
    @pytest.mark.parametrize(("name", "fields", "status"), [("link", [], 201), ("replace", ["If-Match: *"], 204)])
    def test_a_server_that_starts_leaves_an_upload_alone_that_gets_its_name(
        self, name: str, fields: list[str], status: int, inbox: Inbox, monkeypatch: Patch
    ) -> None:
        work = getattr(os, name)

        def start_another(*paths: bytes) -> None:
            ptth.remove_partial_files(os.fsencode(inbox.root))
            work(*paths)

        write_files(inbox.root, {"x": b"old"} if fields else {})
        monkeypatch.setattr(os, name, start_another)
        assert inbox.put("/x", b"new", fields=fields) == status
        assert inbox.files() == {"x": b"new"}

    @pytest.mark.parametrize(("rest", "closes"), [(b"0\r\n\r\n", False), (b"20000\r\n" + bytes(100_000), True)])
    def test_the_answer_to_an_upload_that_is_refused_tells_whether_the_connection_closes(
        self, rest: bytes, closes: bool, inbox: Inbox
    ) -> None:
        write_files(inbox.root, {"x": b"old"})
        head = f"PUT {inbox.prefix}/x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        with connect(inbox.port, head + b"4\r\nmore\r\n" + rest) as sock:
            fields = sock.recv(10_000).lower()
        assert b" 412 " in fields and (b"\r\nconnection: close\r\n" in fields) is closes

    @needs("rclone")
    def test_rclone_copies_there_and_back(self, inbox: Inbox, tmp_path: object) -> None:
        write_files(tmp_path / "from", {"one": b"1", "sub \u00fc/two & 2": b"2"})
        there = f":webdav,vendor=nextcloud,url='http://127.0.0.1:{inbox.port}{inbox.prefix}/':new"
        for aim in ((tmp_path / "from", there), (tmp_path / "from", there), (there, tmp_path / "back")):
            command = ["rclone", "--config", tmp_path / "none", "--retries", "1", "copy", *aim]
            subprocess.run(command, check=True, timeout=60, capture_output=True)
        assert inbox.files() == {"new/": b"", "new/one": b"1", "new/sub \u00fc/": b"", "new/sub \u00fc/two & 2": b"2"}
        assert (tmp_path / "back" / "sub \u00fc" / "two & 2").read_bytes() == b"2"

    @needs("curl")
    def test_curl_sends_a_form(self, inbox: Inbox, tmp_path: object) -> None:
        (tmp_path / "data").write_bytes(bytes(range(256)) * 4096)
        url = f"http://127.0.0.1:{inbox.port}{inbox.prefix}/"
        name = 'odd "name", \\ ;.txt'
        other = name.replace("\\", "\\\\").replace('"', '\\"')
        files = ["-F", f"file=@{tmp_path}/data", "-F", f'x=@{tmp_path}/data;filename="{other}"']
        subprocess.run(["curl", "-sSf", *files, url], check=True, timeout=60)
        assert inbox.files() == {"data": bytes(range(256)) * 4096, name: bytes(range(256)) * 4096}

    @needs("curl")
    def test_curl_uploads(self, inbox: Inbox, tmp_path: object) -> None:
        (tmp_path / "data").write_bytes(bytes(range(256)) * 4096)
        url = f"http://127.0.0.1:{inbox.port}{inbox.prefix}/"
        subprocess.run(["curl", "-sSf", "-T", tmp_path / "data", url], check=True, timeout=60)
        subprocess.run(["curl", "-sSf", "-T", "-", url + "two"], input=b"two", check=True, timeout=60)
        assert inbox.files() == {"data": bytes(range(256)) * 4096, "two": b"two"}

    @pytest.mark.skipif(not LONG, reason="takes long")
    def test_4_gib_take_no_memory(self, start: object, tmp_path: object) -> None:
        (tmp_path / "inbox").mkdir()
        pair = Pair(start, tmp_path, str(tmp_path / "inbox"), upload=True)
        with open(tmp_path / "large", "wb") as file:
            file.truncate(4 << 30)
        url = f"http://127.0.0.1:{pair.port}/frontend/servers/n/files/"
        subprocess.run(["curl", "-sSf", "-T", tmp_path / "large", url], check=True, timeout=900)
        assert (tmp_path / "inbox" / "large").stat().st_size == 4 << 30
        assert max(pair.relay.peak_mib(), pair.server.peak_mib()) < 80


class TestTunnelMessages:
    def pack(self, head: bytes, **more: object) -> bytes:
        request = with_peer(ptth.parse_request_head(head), "192.0.2.9")
        return ptth.pack_request("0" * 32, request, request.target, [], **{"prefix": "/p", **more})

    def test_a_request_is_rebuilt(self) -> None:
        head = (
            b"PUT http://h/x?y HTTP/1.1\r\nHost: a\r\nAccept: */*\r\nConnection: close, X-Mine\r\nX-Mine: 1\r\nKeep-Alive: 2\r\nTE: 3\r\n"
            b"Trailer: 4\r\nUpgrade: 5\r\nContent-Length: 0\r\nExpect: 100-continue\r\nCookie: 6\r\nX-ApiKey: 7\r\nPTTH-Request-Id: 8\r\n"
            b"Proxy-Authorization: 9\r\nX-Accel-Redirect: 10\r\nAuthorization: Basic eA==\r\nVia: 1.0 front\r\nX-Forwarded-For: 1.2.3.4\r\n\r\n"
        )  # fmt: skip
        begin = b"PUT /x?y HTTP/1.1\r\nPTTH-Request-Id: " + b"0" * 32 + b"\r\nHost: h\r\nAccept: */*\r\n"
        end = b"Authorization: Basic eA==\r\nX-Forwarded-For: 192.0.2.9\r\nX-Forwarded-Proto: http\r\nX-Forwarded-Host: h\r\n"
        end += b"Via: 1.0 front, 1.1 ptth\r\n"
        assert self.pack(head) == begin + end + b"X-Forwarded-Prefix: /p\r\n\r\n"
        assert b"\r\nX-Forwarded-For: 1.2.3.4, 192.0.2.9\r\n" in self.pack(head, trusted=True)
        own = begin + b"Cookie: 6\r\nX-ApiKey: 7\r\n" + end + b"\r\n"
        assert self.pack(head, prefix="") == own  # on a host of its own

    FORGED = [  # a client's field, and what the server gets of it: from a stranger, and from a trusted proxy
        ("X-Forwarded-Proto: https", b"X-Forwarded-Proto: http\r\n", b"X-Forwarded-Proto: https\r\n"),
        ("X-Forwarded-Host: evil", b"X-Forwarded-Host: example.com\r\n", b"X-Forwarded-Host: example.com\r\n"),
        ("X-Forwarded-For: 1.1.1.1", b"X-Forwarded-For: 192.0.2.9\r\n", b"X-Forwarded-For: 1.1.1.1, 192.0.2.9\r\n"),
        ("Forwarded: for=1.1.1.1", b"", b"Forwarded: for=1.1.1.1\r\n"), ("X-Forwarded-Prefix: /evil", b"", b""),
        ("PTTH-Body-Length: 5", b"", b""),
        *((f"{name}: evil", b"", f"{name}: evil\r\n".encode()) for name in (
            "X-Forwarded-Port", "x-forwarded-ssl", "X-Forwarded-Scheme", "X-Url-Scheme", "Front-End-Https", "X-Forwarded-Server",
            "X-Original-Host", "X-Real-IP", "X-Client-IP", "True-Client-IP", "CF-Connecting-IP", "X-Original-URL", "X-Rewrite-URL",
        )), ("X_Real_IP: evil", b"", b""),
    ]  # fmt: skip

    @pytest.mark.parametrize(("field", "stranger", "proxy"), FORGED)
    def test_only_a_trusted_proxy_is_believed(self, field: str, stranger: bytes, proxy: bytes) -> None:
        name = b"\r\n" + field.partition(":")[0].encode() + b":"
        for trusted, expected in ((False, stranger), (True, proxy)):
            head = self.pack(get("/", field), prefix="", trusted=trusted)
            assert (expected in head) if expected else (name not in head), head

    P3 = [  # the bytes after the id in an inner head: the body, or the error
        (b"Content-Length: 5\r\n\r\nhello", b"hello"), (b"content-length: 05\r\n\r\nhello", b"hello"),
        (b"PTTH-Body-Length: 7\r\n\r\n", 7), (b"PTTH-Body-Length: chunked\r\n\r\n", ptth.CHUNKED),
        (b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello", OSError), (b"Content-Length: 5\r\n\r\nhell", OSError),
        (b"Content-Length: 5\r\nPTTH-Body-Length: 5\r\n\r\nhello", OSError), (b"Content-Length: +5\r\n\r\nhello", OSError),
        (b"Transfer-Encoding: chunked\r\n\r\n", ptth.CHUNKED), (b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n", None), (b"PTTH-Body-Length: x\r\n\r\n", OSError),
        (b"Content-Length: chunked\r\n\r\n", OSError),
    ]  # fmt: skip

    @pytest.mark.parametrize(("rest", "expected"), P3)
    def test_bodies_in_p3(self, rest: bytes, expected: object) -> None:
        class Asked(ptth.Body):
            def __init__(self, identity: str, length: int | None) -> None:
                self.length = length

        head = b"PUT /x HTTP/1.1\r\nHost: a\r\nPTTH-Request-Id: 12345678\r\n" + rest
        unpack = ptth.unpack_requests(head, Asked)
        if expected is OSError:
            with pytest.raises(ptth.ProtocolError):
                list(unpack)
            return
        ((_, request),) = unpack
        assert (request.body.data if isinstance(expected, bytes) else request.body.length) == expected

    def test_a_host_is_supplied_for_http_1_0(self) -> None:
        assert b"\r\nHost: localhost\r\n" in self.pack(b"GET / HTTP/1.0\r\n\r\n")

    def test_requests_are_unpacked_in_their_order(self) -> None:
        unpacked = list(ptth.unpack_requests(self.pack(get("/1")) + self.pack(get("/2"))))
        assert [(identity, request.target) for identity, request in unpacked] == [("0" * 32, "/1"), ("0" * 32, "/2")]
        assert list(ptth.unpack_requests(b"")) == []

    def test_a_bad_request_fails_its_own_id(self) -> None:
        bad = self.pack(get("/")).replace(b"Host:", b"Host :")
        with_body = self.pack(get("/")).replace(b"\r\n\r\n", b"\r\nContent-Length: 5\r\n\r\nhello")
        answers = [request for _, request in ptth.unpack_requests(bad + with_body + self.pack(get("/good")))]
        assert [getattr(answer, "status", 200) for answer in answers] == [400, 200, 200]
        assert answers[1].body.data == b"hello"

    @pytest.mark.parametrize(
        "data", [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"GET / HTTP/1.1\r\nPTTH-Request-Id: 12345678\r\n", b"x"]
    )
    def test_without_an_id_or_an_end_the_rest_is_lost(self, data: bytes) -> None:
        with pytest.raises(ptth.ProtocolError):
            list(ptth.unpack_requests(data))

    DANGEROUS = (  # fields that affect the whole origin, a proxy in front, the connection, or the tunnel
        "Set-Cookie", "sEt-cOOkie", "Set-Cookie2", "Service-Worker-Allowed", "Clear-Site-Data", "Strict-Transport-Security", "Alt-Svc", "NEL",
        "Report-To", "Reporting-Endpoints", "Use-As-Dictionary", "Accept-CH", "Critical-CH", "Set-Login", "Public-Key-Pins", "Expect-CT",
        "Origin-Trial", "Origin-Agent-Cluster", "Observe-Browsing-Topics", "Speculation-Rules", "Supports-Loading-Mode", "Document-Policy",
        "Permissions-Policy", "Refresh", "Sec-Purpose", "Surrogate-Control", "CDN-Cache-Control", "Edge-Control", "Nobody-Knows-This",
        "X-Accel-Redirect", "x-accel-expires", "X-Sendfile", "X-SENDFILE-Type", "X-LiteSpeed-Location", "X-Litespeed-Purge", "X-Reproxy-URL",
        "X-REPROXY-FILE", "X-Lighttpd-Send-File", "X-Cascade", "X_Accel_Redirect", "X-ApiKey", "X-Forwarded-For", "Connection", "Trailer",
        "Proxy-Authenticate", "Proxy-Authentication-Info", "Proxy-Connection", "PTTH-Request-Id", "Transfer-Encoding", "Keep-Alive", "Upgrade",
        "Date", "Content-Length", "X-Content-Type-Options",
    )  # fmt: skip
    HARMLESS = (  # fields that affect this one resource
        "ETag", "Last-Modified", "Accept-Ranges", "Content-Range", "Content-Encoding", "Content-Language", "Content-Disposition", "CONTENT-MD5",
        "Content-Location", "Digest", "Cache-Control", "Expires", "Vary", "Age", "Pragma", "Allow", "Location", "Retry-After", "Link",
        "Access-Control-Allow-Origin", "access-control-expose-headers", "Timing-Allow-Origin", "X-Frame-Options", "X-Robots-Tag", "X-My-Own",
        "Server", "DAV", "Referrer-Policy",
    )  # fmt: skip

    def test_a_response_is_fenced_in(self) -> None:
        names = [*self.DANGEROUS, *self.HARMLESS, "Content-Type", "X-Named", "Content-Named"]
        told = [*((name, "y") for name in names), ("Connection", "x-named, close, Content-Named")]
        passed = [name for name, _ in ptth.shared_origin_fields(200, ptth.Headers(told))]
        expected = [*self.HARMLESS, "Content-Type", "Via", "X-Content-Type-Options", "Content-Security-Policy"]
        assert passed == expected

    LINKS = [
        ("<a>; rel=preload", "<a>; rel=preload"), ('<d>; rel="compression-dictionary"', None), ("<d>;rel=Compression-DICTIONARY", None),
        ('<a>; rel=next, <d>; rel="x compression-dictionary" , <b,c>; title="e,f"', '<a>; rel=next, <b,c>; title="e,f"'),
        ('<d>; rel="compression\\-dictionary"', None), ('<a>; x="b, <d>; rel=compression-dictionary', None),
    ]  # fmt: skip

    @pytest.mark.parametrize(("value", "expected"), LINKS)
    def test_a_link_to_a_dictionary_does_not_pass(self, value: str, expected: str | None) -> None:
        passed = ptth.shared_origin_fields(200, ptth.Headers([("Link", value)]))
        assert dict(passed).get("Link") == expected

    REALMS = [
        ('Basic realm="victim"', 'Basic realm="n: victim"'), ("Basic realm=victim", 'Basic realm="n: victim"'), ("bAsic", 'bAsic realm="n"'),
        ('Basic REALM = "victim"', 'Basic realm="n: victim"'), ('Basic realm=""', 'Basic realm="n"'), ('Basic realm="n"', 'Basic realm="n"'),
        ('Basic charset="UTF-8", realm="v"', 'Basic realm="n: v", charset="UTF-8"'), ('Basic x=y,,realm=v', 'Basic realm="n: v", x=y'),
        ('Basic realm="a", realm="victim"', 'Basic realm="n: a"'), (', Basic ,realm="v"', 'Basic realm="n: v"'),
        ('Digest realm="v", nonce="a,b=c", qop="auth,auth-int", Basic realm="v"', 'Digest realm="n: v", nonce="a,b=c", qop="auth,auth-int", Basic realm="n: v"'),
        ('Bearer, Basic realm="a\\"b\\\\c"', 'Bearer realm="n", Basic realm="n: a\\"b\\\\c"'), ("Basic   realm=v , New", 'Basic realm="n: v", New realm="n"'),
        ('X realm="a, Basic realm=\\"v"', 'X realm="n: a, Basic realm=\\"v"'), ('Basic realm="\\v\\i"', 'Basic realm="n: vi"'),
        *((value, None) for value in (
            'realm="victim"', "Negotiate YII=", "NTLM TlRM, Basic realm=v", 'Basic realm="victim', "Basic realm=a b", "Basic realm", "Basic realm=",
            'Basic\trealm="v"', '"Basic" realm="v"', "", "Basic realm=v," * 101,
        )),
    ]  # fmt: skip

    @pytest.mark.parametrize(("value", "expected"), REALMS)
    def test_a_servers_name_goes_into_its_realms(self, value: str, expected: str | None) -> None:
        told = ptth.Headers([("WWW-Authenticate", value), ("www-authenticate", "Basic realm=other")])
        passed = ptth.shared_origin_fields(401, told, server="n")
        values = [text for name, text in passed if name.lower() == "www-authenticate"]
        assert values == [*([expected] if expected else []), 'Basic realm="n: other"']
        kept = [pair for pair in ptth.shared_origin_fields(401, told) if pair in told.pairs]
        assert kept == [pair for pair in told.pairs if pair[1]]  # a server on a host of its own

    @pytest.mark.parametrize(
        ("name", "value", "most"),
        [("WWW-Authenticate", "Basic realm=v", ptth.MAX_CHALLENGES), ("Link", "<a>;rel=b", ptth.MAX_LINK)],
    )
    def test_too_many_challenges_or_links_do_not_pass(self, name: str, value: str, most: int) -> None:
        fitting = (most + 2) // (len(value) + 2)
        for count, passes in ((fitting, fitting), (fitting + 1, 0)):
            passed = ptth.shared_origin_fields(401, ptth.Headers([(name, value)] * count), server="n")
            assert [pair[0] for pair in passed].count(name) == passes

    def test_what_a_visitor_says_to_be_taken_for_the_relay_is_dropped(self) -> None:
        names = [
            "Available-Dictionary", "Dictionary-ID", "PTTH-Request-Id", "ptth-body-length", "PTTH_Request_Id", "X_Forwarded_Host", "Proxy",
            "X-Accel-Mapping", "X-Sendfile-Type", "Cookie", "Cookie2", "Proxy-Authorization", "X_ApiKey",
        ]  # fmt: skip
        head = "".join(f"{name}: evil\r\n" for name in [*names, "X-Good"])
        packed = self.pack(f"GET / HTTP/1.1\r\nHost: a\r\n{head}\r\n".encode())
        assert packed.count(b"evil") == 1 and b"X-Good: evil" in packed

    @pytest.mark.parametrize(
        ("value", "expected"),
        [("5", "4"), ("1", "0"), ("007", "6"), ("1000", "999"), ("9" * 9, "999999998"), ("9" * 5000, "999999999"), ("0" * 9000 + "2", "1")],
    )  # fmt: skip
    def test_max_forwards_is_counted_down(self, value: str, expected: str) -> None:
        for method, told in (("OPTIONS", expected), ("TRACE", expected), ("GET", value)):  # to GET it means nothing
            packed = self.pack(get("/", f"Max-Forwards: {value}", method=method))
            assert f"\r\nMax-Forwards: {told}\r\n".encode() in packed

    @pytest.mark.parametrize("value", ["", "x", "-1", "+1", "1.0", "5, 5", "0x5", "\xb2", "1 2"])
    def test_max_forwards_that_is_no_number_is_400(self, value: str) -> None:
        with pytest.raises(ptth.ProtocolError) as caught:
            self.pack(get("/", f"Max-Forwards: {value}", method="OPTIONS"))
        assert caught.value.status == 400

    def test_a_304_changes_nothing_of_the_fence_round_what_is_stored(self) -> None:
        told = [("ETag", "x"), ("Content-Type", "text/plain"), ("Content-Security-Policy", "default-src *")]
        passed = ptth.shared_origin_fields(304, ptth.Headers(told))
        assert [name for name, _ in passed] == ["ETag", "Via", "X-Content-Type-Options"]

    def batched(self, identity: str, body: bytes, *fields: tuple[str, str]) -> bytes:
        return ptth.pack_batched(identity, ptth.Response(200, list(fields), ptth.BytesBody(body)), body)

    def test_a_batch_both_ways(self) -> None:
        bodies = [b"", b"a", b"HTTP/1.1 200 OK\r\n\r\n" * 9]
        data = b"".join(self.batched(f"{i}" * 8, body, ("X", "y")) for i, body in enumerate(bodies))
        elsewhere = b"HTTP/1.1 404 No\r\nX: y\r\nptth-body-length: 1\r\nA: b\r\nptth-request-id: 33333333\r\n\r\nz"
        unpacked = list(ptth.unpack_responses(data + elsewhere))
        assert [body for _, _, body in unpacked] == [*bodies, b"z"]
        assert [identity for identity, _, _ in unpacked] == [f"{i}" * 8 for i in range(4)]
        heads = [ptth.parse_inner_response(head) for _, head, _ in unpacked]
        assert [status for status, _ in heads] == [200, 200, 200, 404]
        assert all(headers["x"] == "y" for _, headers in heads)

    @pytest.mark.parametrize("cut", [b"PTTH-Request-Id", b"PTTH-Body-Length", b"\r\n\r\nbody", b"dy"])
    def test_a_batch_that_lost_its_framing_is_given_up(self, cut: bytes) -> None:
        good, bad = self.batched("0" * 8, b"good"), self.batched("1" * 8, b"body").replace(cut, b"", 1)
        unpacked = ptth.unpack_responses(good + bad)
        assert next(unpacked)[2] == b"good"
        with pytest.raises(ptth.ProtocolError):
            next(unpacked)

    SANDBOX = [
        ("text/html", True), ("image/png", False), ("IMAGE/SVG+xml", True), ("text/plain; charset=utf-8", False), ("font/woff2", False),
        ("application/json", False), ("application/pdf", False), ("text/plain, text/html", True), ("text/plain;x=,text/html", True),
        ("application/xhtml+xml", True), ("text/javascript", True), ("text/xml", True), ("", True), ("text/plainx", True), ("x", True),
        ("image/x+xml", True), ("audio/x+xml; a=b", True), ("application/octet-stream", False), ("video/mp4", False), ("image/", True), ("text/css", False), ("application/zip", False),
    ]  # fmt: skip

    @pytest.mark.parametrize(("kind", "sandbox"), SANDBOX)
    def test_only_what_runs_nothing_is_spared_the_sandbox(self, kind: str, sandbox: bool) -> None:
        def is_fenced(*fields: tuple[str, str], **options: bool) -> bool:
            passed = ptth.shared_origin_fields(200, ptth.Headers(list(fields)), **options)
            return ("Content-Security-Policy", ptth.SANDBOX) in passed

        assert is_fenced(*([("Content-Type", kind)] if kind else [])) is sandbox
        assert is_fenced(("Content-Type", "image/png"), ("content-type", kind))
        assert not ptth.runs_nothing(f"{kind}; x={'y' * 256}")  # nor is it kept
        assert is_fenced(("Content-Type", "image/png"), ("Connection", "Content-Type"))
        assert not is_fenced(sandbox=False)

    @pytest.mark.parametrize(
        ("prefer", "seconds"),
        [("wait=5", 5), ("wait=0", 0), ("wait=99", 25), ("", 25), ("respond-async, wait=7", 7), ('wait="3"', 3), ("awaited=3", 25)],
    )  # fmt: skip
    def test_wait(self, prefer: str, seconds: float) -> None:
        assert ptth.parse_wait(prefer) == seconds


class TestOriginalMessages:
    """The Rust form: bytes that were recorded between the original relay and server."""

    P3 = bytes.fromhex(
        "9192ba303146344236314351463147593339424d354832345352394833938100c0a72f66696c65732f81a4686f73749b6578616d706c652e636f6d"
    )
    P5 = [  # (value of the field, status, fields)
        ("koEAwIA=", 200, []),
        ("koEAwIGsY29udGVudC10eXBlmnRleHQvcGxhaW4=", 200, [("content-type", "text/plain")]),
        ("koEHwIGuY29udGVudC1sZW5ndGiSNDg=", 404, [("content-length", "48")]),
        ("koEEwIKobG9jYXRpb26Uc3ViL65jb250ZW50LWxlbmd0aJIxNQ==", 307, [("location", "sub/"), ("content-length", "15")]),
    ]

    def test_the_recorded_p3_both_ways(self) -> None:
        assert ptth.pack_value(ptth.unpack_value(self.P3)) == self.P3
        ((identity, request),) = ptth.unpack_rust_requests(self.P3)
        assert (identity, request.method, request.target) == ("01F4B61CQF1GY39BM5H24SR9H3", "GET", "/files/")
        assert request.headers.pairs == [("host", "example.com")]
        head = b"GET /files/ HTTP/1.1\r\nPTTH-Request-Id: 01F4B61CQF1GY39BM5H24SR9H3\r\nHost: example.com\r\n\r\n"
        assert ptth.pack_value([ptth.pack_rust_request(head)]) == self.P3

    @pytest.mark.parametrize(("text", "status", "fields"), P5)
    def test_the_recorded_p5_both_ways(self, text: str, status: int, fields: list[tuple[str, str]]) -> None:
        assert ptth.unpack_rust_response(text) == (status, dict(fields))
        length = int(dict(fields).get("content-length", "-1"))
        body = ptth.AbsentBody(length if length >= 0 else None)
        others = [pair for pair in fields if pair[0] != "content-length"]
        assert ptth.pack_rust_response(ptth.Response(status, others, body)) == text

    STATUSES = [
        (301, 307), (302, 307), (308, 307), (401, 403), (412, 400), (429, 400), (501, 500), (503, 500), (206, 206), (416, 416), (202, 200),
    ]  # fmt: skip

    @pytest.mark.parametrize(("ours", "theirs"), STATUSES)
    def test_statuses_that_the_original_lacks(self, ours: int, theirs: int) -> None:
        packed = ptth.pack_rust_response(ptth.Response(ours, [], ptth.AbsentBody(None)))
        assert ptth.unpack_rust_response(packed)[0] == theirs

    VALUES = [
        None, 0, 127, 128, 255, 256, 65535, "", "x" * 31, "x" * 32, "x" * 300, "\u00fc", [], [None] * 16, {}, {i: [i] for i in range(17)},
    ]  # fmt: skip

    @pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
    def test_values_both_ways(self, value: ptth.Value) -> None:
        assert ptth.unpack_value(ptth.pack_value(value)) == value

    @pytest.mark.parametrize("value", [65536, "x" * 65536, [0] * 65536, dict.fromkeys(range(65536))], ids=range(4))
    def test_what_is_too_large_for_this_form_is_refused(self, value: ptth.Value) -> None:
        with pytest.raises(ptth.ProtocolError, match="too large"):
            ptth.pack_value(value)

    REFUSED = ["", "c1", "c0c0", "92c0", "dcffff", "ddffffffff", "a3ffffff", "dbffffffff41", "82c0c0c0c0", "8200c000c0", "91" * 9 + "c0", "cb0000000000000000",
               "c2", "e0", "cc", "cd01", "d9", "df00000001c0c0", "81c0c0", "8191c0c0"]  # fmt: skip

    @pytest.mark.parametrize("data", REFUSED)
    def test_what_is_not_this_form_is_refused(self, data: str) -> None:
        with pytest.raises(ptth.ProtocolError):
            ptth.unpack_value(bytes.fromhex(data))

    HUGE = [  # (what is repeated, how many of them fill 4 MiB)
        (b"\x90", 1 << 22), (b"\x91\x91\x91\xc0", 1 << 20), (b"\xcc\xff", 1 << 21), (b"\xa1a", 1 << 21), (b"\x80", 1 << 22), (b"\xc0", 1 << 22), (b"\x81\x01\xc0", 1 << 20),
        (ptth.pack_value(["a" * 8, [{0: None}, "/", {}]]), 240_000),
    ]  # fmt: skip

    @pytest.mark.parametrize(("member", "count"), HUGE, ids=range(len(HUGE)))
    def test_a_message_of_many_values_is_refused(self, member: bytes, count: int, monkeypatch: Patch) -> None:
        monkeypatch.setattr(ptth, "MAX_UNPACKED", 10_000)  # of the millions in each; the real limit takes longer
        data = b"\xdd" + count.to_bytes(4, "big") + member * count
        small = b"\x9f" + (b"\xdc\xff\xff" + b"\xc0" * 65535) * 15  # many small arrays, not one large one
        for huge in (data, small):
            with pytest.raises(ptth.ProtocolError, match="values in a message"):
                ptth.unpack_value(huge)

    def test_large_values_of_fields_are_taken(self) -> None:
        fields = {"host": list(b"a"), "cookie": list(b"x" * 8000), "x-name": list("\u00fc".encode() * 100)}
        packed = ptth.pack_value([[f"{i:026}", [{0: None}, "/", fields]] for i in range(64)])
        unpacked = list(ptth.unpack_rust_requests(packed))
        assert len(unpacked) == 64 and unpacked[-1][1].headers["x-name"] == "\u00c3\u00bc" * 100

    BAD_REQUESTS = [
        [{2: None}, "/", {}], [{0: 1}, "/", {}], [{}, "/", {}], ["Get", "/", {}], [{0: None}, "", {}], [{0: None}, "/ x", {}], [{0: None}, "/\r\nX: y", {}],
        [{0: None}, "/", {"host": [256]}], [{0: None}, "/", {"host": "a"}], [{0: None}, "/", {"ho st": [97]}], [{0: None}, "/", {"x": [13, 10]}],
        [{0: None}, "/", []], [{0: None}, "/"], [{0: None}, "/\u1234", {"host": [97]}], [{0: None}, 1, {}],
    ]  # fmt: skip

    @pytest.mark.parametrize("parts", BAD_REQUESTS, ids=range(len(BAD_REQUESTS)))
    def test_a_bad_request_fails_its_own_id(self, parts: object) -> None:
        good = [{1: None}, "/good", {"host": [97], "connection": [120]}]
        packed = ptth.pack_value([["a" * 26, parts], ["b" * 26, good]])
        (identity, error), (_, request) = ptth.unpack_rust_requests(packed)
        assert isinstance(error, ptth.ProtocolError) and identity == "a" * 26
        assert (request.method, request.target, request.headers) == ("HEAD", "/good", {"host": "a"})

    @pytest.mark.parametrize("text", ["", "?", "koEAwA==", "koELwIA=", "kA==", "koEAwIGBwMA="])
    def test_a_bad_response_is_refused(self, text: str) -> None:
        with pytest.raises(ptth.ProtocolError):
            ptth.unpack_rust_response(text)

    def test_values_of_one_name_are_joined_but_cookies(self) -> None:
        fields = [("X", "1"), ("x", "2"), ("Set-Cookie", "a"), ("Set-Cookie", "b")]
        packed = ptth.pack_rust_response(ptth.Response(200, fields, ptth.AbsentBody(None)))
        assert ptth.unpack_rust_response(packed)[1] == {"x": "1, 2", "set-cookie": "a"}


class Hand:
    """A server that the test plays, on one connection to the relay."""

    def __init__(self, port: int, name: str = "n", key: str = KEY) -> None:
        self.sock = connect(port)
        self.name, self.key, self.data = name, key, b""

    def send(self, method: str, path: str, body: bytes = b"", *fields: str) -> None:
        is_chunked = any(field.startswith("Transfer") for field in fields)
        length = [] if is_chunked or method == "GET" else [f"Content-Length: {len(body)}"]
        lines = [f"{method} /7ZSFUKGV/{path} HTTP/1.1", "Host: r", f"X-ApiKey: {self.key}", *length, *fields, "", ""]
        self.sock.sendall("\r\n".join(lines).encode() + body)

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Return the next response on this connection."""
        while True:
            head, end, rest = self.data.partition(b"\r\n\r\n")
            if end:
                length = re.search(rb"(?i)content-length: (\d+)", head)
                size = int(length[1]) if length else 0
                if len(rest) >= size:
                    self.data = rest[size:]
                    return one(head + end + rest[:size])
            piece = self.sock.recv(1 << 16)
            assert piece, f"the connection ended: {self.data!r}"
            self.data += piece

    def listen(self, wait: int = 20, *fields: str) -> None:
        """Send a P1."""
        self.send("GET", f"http_listen/{self.name}", b"", "Accept: application/http", f"Prefer: wait={wait}", *fields)

    def requests(self) -> list[tuple[str, str]]:
        """Read a P3; return the (id, target) of its requests."""
        status, fields, body = self.answer()
        assert (status, fields["content-type"], fields["cache-control"]) == (200, ptth.REQUESTS_TYPE, "no-store")
        return [(identity, request.target) for identity, request in ptth.unpack_requests(body)]

    def request_id(self) -> str:
        """Read a P3 with one request, whose body is elsewhere; return its id."""
        (identity,) = re.findall(rb"PTTH-Request-Id: (\w+)", self.answer()[2])
        return identity.decode()

    def respond(self, identity: str, inner: bytes, *fields: str) -> None:
        """Send a P5."""
        kind = "Content-Type: application/http; msgtype=response"
        self.send("POST", f"http_response/{identity}", inner, kind, *fields)

    def begin(self, identity: str, *chunks: bytes) -> None:
        """Send the beginning of a P5 in chunks."""
        self.respond(identity, b"".join(map(ptth.format_chunk, chunks)), "Transfer-Encoding: chunked")

    def reply(self, identity: str, inner: bytes) -> int:
        """Send a P5; return the status of P7."""
        self.respond(identity, inner)
        return self.answer()[0]

    def complete(self, identity: str, client: Client) -> None:
        """Send a P5, which its client gets."""
        assert (self.reply(identity, OK), client.answer()[::2]) == (200, (200, b"hi"))

    def close(self) -> None:
        self.sock.close()


class Client:
    """A client in a thread; the test reads its response later."""

    def __init__(self, port: int, path: str = "/x", *fields: str, method: str = "GET", version: str = "1.1") -> None:
        request = get("/frontend/servers/n" + path, *fields, method=method)
        request = request.replace(b"HTTP/1.1", b"HTTP/" + version.encode(), 1)
        self.result: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=lambda: self.result.put(fetch(port, request)), daemon=True).start()

    def raw(self) -> bytes:
        return self.result.get(timeout=30)

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        return one(self.raw())


OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nhi"


def inner_response(identity: str, body: bytes, *fields: str) -> bytes:
    """Return a response as it stands in a batch."""
    told = [f"PTTH-Request-Id: {identity}", f"PTTH-Body-Length: {len(body)}", *fields]
    return "\r\n".join(["HTTP/1.1 200 OK", *told, "", ""]).encode() + body


class TestApp:
    """A web app as a handler. The app is an HTTP server of ptth.py that responds with what it got."""

    PUBLIC = [("Host", "n.example.com"), ("X-Forwarded-Host", "n.example.com"), ("X-Forwarded-Proto", "https")]

    def ask(
        self,
        requests: list[tuple[str, list[tuple[str, str]], bytes]],
        mode: str = "auto",
        fields: object = (),
        refuse: object = lambda request: 0,
        path: str = "",
    ) -> list[tuple[int, dict[str, str], dict[str, object]]]:
        """Return (status, fields, what the app got) for each request. `refuse(request)` is the app's error, or 0."""
        self.seen = []

        async def app(request: ptth.Request) -> ptth.Response:
            got = {"method": request.method, "target": request.target, "fields": dict(request.headers)}
            got["body"] = len(await request.body.read_all(1 << 30))
            self.seen.append(got)
            status = refuse(request) or 200
            own = f"http://{request.headers['host']}"
            reply = [(name, value.replace("OWN", own).replace("AUTHORITY", own[7:])) for name, value in fields]
            return ptth.Response(status, reply, ptth.BytesBody(json.dumps(got).encode()))

        async def talk() -> list[object]:
            answers = []
            async with listening(ptth.HTTPServer(app)) as self.port:
                origin = ptth.BaseURL(False, "127.0.0.1", self.port, path)
                handler = ptth.App(ptth.HTTPClient(origin), mode)
                for method, more, body in requests:
                    headers = ptth.Headers([*self.PUBLIC, *more])
                    response = await handler.handle(ptth.Request(method, "/x?y", headers, body=ptth.BytesBody(body)))
                    content = await response.body.read_all(1 << 30)
                    await response.body.aclose()
                    answers.append((response.status, dict(response.headers), json.loads(content or b"{}")))
                handler.client.close()
            return answers

        return in_time(talk())

    @in_loop
    async def test_an_app_with_a_single_thread_gets_the_next_request(self) -> None:
        """It reads the idle connection of the first GET until that is closed."""
        free = asyncio.Lock()

        async def app(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            async with free:
                with contextlib.suppress(asyncio.IncompleteReadError):
                    while await reader.readuntil(b"\r\n\r\n"):
                        writer.write(OK)
            writer.close()

        async with client_to(app) as client, asyncio.timeout(5):
            handler = ptth.App(client)
            for method in ("GET", "POST", "GET", "GET", "DELETE"):
                response = await handler.handle(ptth.Request(method, "/", ptth.Headers(self.PUBLIC)))
                await response.body.aclose()
                assert response.status == 200

    def test_the_public_way_sends_what_the_visitor_sent(self) -> None:
        more = [
            ("Origin", "https://n.example.com"), ("Cookie", "a=b"), ("X-ApiKey", "mine"), ("Connection", "x"), ("X", "hop"), ("TE", "trailers"),
        ]  # fmt: skip
        ((status, fields, got),) = self.ask([("POST", more, b"12345")], "public", [("X-ApiKey", "new")])
        assert fields["X-ApiKey"] == "new"
        assert (status, got["method"], got["target"], got["body"]) == (200, "POST", "/x?y", 5)
        assert got["fields"] == {
            "host": "n.example.com", "x-forwarded-host": "n.example.com", "x-forwarded-proto": "https",
            "origin": "https://n.example.com", "cookie": "a=b", "x-apikey": "mine", "content-length": "5",
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("origin", "mapped"),
        [("https://n.example.com", True), ("HTTPS://N.example.com:443", True), ("http://n.example.com", False),
         ("https://n.example.com.evil.test", False), ("https://evil.test", False), ("null", False)],
    )  # fmt: skip
    def test_the_local_way_maps_what_names_its_own_origin_only(self, origin: str, mapped: bool) -> None:
        more = [("Origin", origin), ("Referer", f"{origin}/p?q"), ("Destination", f"{origin}/new")]
        more.append(("Forwarded", "for=192.0.2.9;host=n.example.com;proto=https"))
        more += [("X-Forwarded-Port", "443"), ("X-Real-IP", "192.0.2.9")]
        ((_, _, got),) = self.ask([("PUT", more, b"")], "local")
        own = f"http://127.0.0.1:{self.port}" if mapped else origin
        fields = got["fields"]
        assert fields["host"] == f"127.0.0.1:{self.port}"
        assert not {"x-forwarded-host", "x-forwarded-proto", "forwarded", "x-forwarded-port"} & set(fields)
        assert fields["x-real-ip"] == "192.0.2.9"
        assert (fields["origin"], fields["referer"], fields["destination"]) == (own, f"{own}/p?q", f"{own}/new")

    def test_a_name_of_the_operators_is_the_local_way_with_that_name(self) -> None:
        ((_, _, got),) = self.ask([("GET", [("Origin", "https://n.example.com")], b"")], "app.internal")
        assert (got["fields"]["host"], got["fields"]["origin"]) == ("app.internal", "http://app.internal")

    @pytest.mark.parametrize(
        ("mode", "location", "expected"),
        [("public", "OWN/a", "https://n.example.com/a"), ("public", "https://n.example.com/a", "https://n.example.com/a"),
         ("local", "OWN/a?b", "https://n.example.com/a?b"), ("local", "/a", "/a"), ("local", "https://else.test/", "https://else.test/"), ("local", "//else.test/", "//else.test/"), ("local", "//AUTHORITY/a", "https://n.example.com/a"),
         ("local", "http://n.example.com/a", "https://n.example.com/a"), ("public", "http://127.0.0.1:1/", "http://127.0.0.1:1/")],
    )  # fmt: skip
    def test_redirects_name_the_public_origin(self, mode: str, location: str, expected: str) -> None:
        told = [("Location", location), ("Connection", "x"), ("X", "1")]
        ((_, fields, _),) = self.ask([("GET", [], b"")], mode, told)
        assert fields["Location"] == expected and "X" not in fields and "Connection" not in fields

    @pytest.mark.parametrize(
        ("location", "expected"),
        [("/pre/z?q", "/z?q"), ("/pre", ""), ("/pre?q", "?q"), ("/prefix", "/prefix"), ("/", "/"), ("/PRE/z", "/PRE/z"), ("/pre/pre/z", "/pre/z"),
         ("/pre//z", "//z")],
    )  # fmt: skip
    @pytest.mark.parametrize("mode", ["local", "public"])
    def test_the_path_of_an_app_is_not_seen_in_redirects(self, mode: str, location: str, expected: str) -> None:
        """It is put before the next target again."""
        more = [("Origin", "https://n.example.com"), ("Destination", "https://n.example.com/new")]
        ((_, fields, got),) = self.ask([("MOVE", more, b"")], mode, [("Location", f"OWN{location}")], path="/pre")
        own = f"http://127.0.0.1:{self.port}" if mode == "local" else "https://n.example.com"
        assert fields["Location"] == f"https://n.example.com{expected}"
        assert (got["target"], got["fields"]["destination"]) == ("/pre/x?y", f"{own}/pre/new")
        assert got["fields"]["origin"] == own

    @pytest.mark.parametrize(
        ("location", "expected"),
        [("/pre/z?q", "/z?q"), ("/pre", "/"), ("/pre/", "/"), ("/pre?q", "/?q"), ("/pre#f", "/#f"), ("/prefix", "/prefix"), ("z", "z"),
         ("/pre//evil.test/", "/.//evil.test/"), ("/pre/\\evil.test", "/./\\evil.test"), ("/pre/\t/evil.test", "/./\t/evil.test"),
         ("//pre/z", "//pre/z")],
    )  # fmt: skip
    @pytest.mark.parametrize("mode", ["local", "public"])
    def test_a_redirect_without_a_host_names_no_other_one(self, mode: str, location: str, expected: str) -> None:
        ((_, fields, _),) = self.ask([("GET", [], b"")], mode, [("Location", location)], path="/pre")
        assert fields["Location"] == expected

    @pytest.mark.parametrize("target", ["/../x", "/a/../../x", "/%2e%2E/x", "/..%2fx", "/..\\x", "/..;/x", "//../x"])
    def test_a_target_does_not_lead_above_the_path_of_an_app(self, target: str) -> None:
        async def ask(path: str, target: str) -> int:
            async with client_to(lambda reader, writer: writer.write(OK), path) as client:
                handler = functools.partial(ptth.call_handler, ptth.App(client).handle)
                return (await handler(ptth.Request("GET", target, ptth.Headers(self.PUBLIC)))).status

        assert in_time(ask("/pre", target)) == 404
        assert in_time(ask("", target)) == in_time(ask("/pre", f"/a/b{target}?/../../x")) == 200

    @pytest.mark.parametrize(
        ("cookie", "expected"),
        [("a=b; Path=/pre", "a=b; Path=/"), ("a=b;path = /pre/z; Secure", "a=b;path = /z; Secure"), ("a=b; Path=/pre/ ;X", "a=b; Path=/ ;X"),
         ("a=b; Path=/prefix", "a=b; Path=/prefix"), ("a=b; Path=/", "a=b; Path=/"), ("path=/pre", "path=/pre")],
    )  # fmt: skip
    def test_the_path_of_an_app_is_not_seen_in_cookies(self, cookie: str, expected: str) -> None:
        """A browser would send them to no other page."""
        ((_, fields, _),) = self.ask([("GET", [], b"")], "public", [("Set-Cookie", cookie)], path="/pre")
        assert fields["Set-Cookie"] == expected

    @pytest.mark.parametrize(
        ("scheme", "expected"),
        [("HTTPS", "https"), ("https, http", "https"), (" https ,https", "https"), ("wss", "https"), ("http, https", "http"), ("HTTP", "http")],
    )  # fmt: skip
    def test_the_public_origin_has_the_visitors_scheme(self, scheme: str, expected: str, monkeypatch: Patch) -> None:
        """However a proxy in front writes it, and whatever a second one adds."""
        monkeypatch.setattr(self, "PUBLIC", [("Host", "n.example.com"), ("X-Forwarded-Proto", scheme)])
        more = [("Origin", f"{expected}://n.example.com")]
        ((_, fields, got),) = self.ask([("GET", more, b"")], "local", [("Location", "OWN/a")])
        assert fields["Location"] == f"{expected}://n.example.com/a"
        assert got["fields"]["origin"] == f"http://127.0.0.1:{self.port}"

    ASKED = [  # (methods of requests, what the app gets: method, target, whether with its public name)
        (["GET", "GET", "POST"], [("GET", "/x?y", True), ("GET", "/x?y", False), ("GET", "/x?y", False), ("POST", "/x?y", False)]),
        (["GET", "POST"], [("GET", "/x?y", True), ("GET", "/x?y", False), ("POST", "/x?y", False)]),
        (["POST"], [("GET", "/", True), ("GET", "/", False), ("POST", "/x?y", False)]),
    ]  # fmt: skip

    @pytest.mark.parametrize("status", [400, 403, 421])
    @pytest.mark.parametrize(("methods", "asked"), ASKED, ids=[" ".join(row[0]) for row in ASKED])
    def test_an_app_that_refuses_its_public_name_is_asked_the_local_way(
        self, methods: list[str], asked: list[tuple[str, str, bool]], status: int, capfd: Output
    ) -> None:
        """Before a POST, for its first page, unless a GET has shown it."""

        def refuse(request: ptth.Request) -> int:
            return status if request.headers["host"] == "n.example.com" else 0

        answers = self.ask([(method, [], b"x" * (method == "POST")) for method in methods], refuse=refuse)
        assert [answer[0] for answer in answers] == [200] * len(methods)
        got = [(got["method"], got["target"], got["fields"]["host"] == "n.example.com") for got in self.seen]
        assert got == asked
        assert capfd.readouterr().err.count("app_host") == 1

    def test_a_first_post_from_another_site_does_not_decide_which_host_the_app_gets(self) -> None:
        def refuse(request: ptth.Request) -> int:
            ours = f"http://{request.headers['host']}"
            own = request.headers["host"] != "n.example.com" and request.headers.get("origin", ours) == ours
            return 0 if own else 403

        posts = [("POST", [("Origin", origin)], b"x") for origin in ("http://evil.example", "https://n.example.com")]
        assert [status for status, *_ in self.ask(posts, refuse=refuse)] == [403, 200]

    @pytest.mark.parametrize("answer", [b"", b"nonsense\r\n\r\n", None])
    @in_loop
    async def test_an_app_that_does_not_answer_its_first_page_gets_the_first_post(
        self, answer: bytes | None, monkeypatch: Patch
    ) -> None:
        """It closes, sends nonsense, or sends nothing; and it is not asked again."""
        monkeypatch.setattr(ptth, "PROBE_TIMEOUT", 20 if answer is not None else 0.01)
        asked = []

        async def app(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head, _ = await read_request(reader)
            asked.append(head.partition(b" HTTP")[0])
            if head.startswith(b"POST"):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            elif answer is not None:
                writer.write(answer)
            else:
                await reader.read()
            writer.close()

        async with client_to(app) as client, asyncio.timeout(10):
            handler = ptth.App(client)
            for _ in range(2):
                headers = ptth.Headers(self.PUBLIC)
                response = await handler.handle(ptth.Request("POST", "/rpc", headers, body=ptth.BytesBody(b"x")))
                await response.body.aclose()
                assert response.status == 200
        assert asked == [b"GET /", b"POST /rpc", b"POST /rpc"]

    @in_loop
    async def test_a_probe_that_is_cut_off_leaves_the_error_to_the_request_itself(self, monkeypatch: Patch) -> None:
        """The app was refused once, and then nothing answers: 504 says that it is the app."""
        monkeypatch.setattr(ptth, "PROBE_TIMEOUT", 0.01)
        client = client_of(1)
        client.is_reachable = False

        async def connect() -> ptth.Connection:
            if ptth.PROBE_TIMEOUT:
                monkeypatch.setattr(ptth, "PROBE_TIMEOUT", 0)
                await asyncio.sleep(60)
            raise TimeoutError

        client.connect = connect
        request = ptth.Request("POST", "/rpc", ptth.Headers(self.PUBLIC), body=ptth.BytesBody(b"x"))
        with pytest.raises(ptth.ProtocolError, match="the app did not answer in time"):
            await ptth.App(client).handle(request)

    def test_a_refusal_that_is_not_for_the_name_stays(self, capfd: Output) -> None:
        def refuse(request: ptth.Request) -> int:
            return 403 if request.target != "/" else 0

        answers = self.ask([("GET", [], b""), ("POST", [], b"x"), ("GET", [], b"")], refuse=refuse)
        assert [answer[0] for answer in answers] == [403, 403, 403] and capfd.readouterr().err == ""
        assert sum(got["method"] == "POST" for got in self.seen) == 1

    @in_loop
    async def test_a_second_try_that_fails_closes_the_first_response(self, monkeypatch: Patch) -> None:
        closed = []

        class Refusal(ptth.BytesBody):
            async def aclose(self) -> None:
                closed.append(True)

        async def respond(request: ptth.Request, **_: object) -> ptth.Response:
            if request.headers["host"] != "n.example.com":
                raise TimeoutError
            return ptth.Response(403, [], Refusal())

        client = client_of(1)
        monkeypatch.setattr(client, "handle", respond)
        with pytest.raises(ptth.ProtocolError, match="in time"):
            await ptth.App(client).handle(ptth.Request("GET", "/", ptth.Headers(self.PUBLIC)))
        assert closed == [True]

    @in_loop
    async def test_an_app_that_is_not_there_is_502_and_the_log_says_so_once(
        self, capfd: Output, monkeypatch: Patch
    ) -> None:
        monkeypatch.setattr(ptth, "APP_WAIT", 0.01)
        port = free_port()
        handler = ptth.App(client_of(port))
        for method in ("GET", "POST", "GET"):
            with pytest.raises(ptth.ProtocolError) as caught:
                await handler.handle(ptth.Request(method, "/", ptth.Headers(self.PUBLIC)))
            assert (caught.value.status, caught.value.headers) == (502, [("Retry-After", "2")])
            assert str(port) not in caught.value.reason
        server = ptth.HTTPServer(echo)
        await server.listen(ptth.open_socket("127.0.0.1", port))
        response = await handler.handle(ptth.Request("GET", "/", ptth.Headers(self.PUBLIC)))
        await response.body.aclose()
        assert response.status == 200
        handler.client.close()
        await server.stop(0.1)
        told = re.findall("cannot be reached|answers again", capfd.readouterr().err)
        assert told == ["cannot be reached", "answers again"]

    @pytest.mark.parametrize(
        ("text", "expected"),
        [("3000", "http://localhost:3000"), ("host:81", "http://host:81"), ("http://127.0.0.1:3000/p/", "http://127.0.0.1:3000/p"),
         ("HTTPS+insecure://h", "https://h"), ("https://h", "https://h"), ("[::1]:80", "http://[::1]"), ("unix:/run/x", None if PLAIN else "unix:/run/x"),
         ("unix:", None), ("", None), ("0", None), ("99999", None), ("ftp://h", None), ("h/?q", None)],
    )  # fmt: skip
    def test_an_apps_target(self, text: str, expected: str | None) -> None:
        if expected is None:
            with pytest.raises(ValueError):
                ptth.parse_app(text)
            return
        origin = ptth.parse_app(text)
        assert (origin.place if origin.unix else origin.url) == expected
        assert origin.verify is not ("insecure" in text)

    def test_an_app_and_a_directory_exclude_each_other(self, tmp_path: object) -> None:
        base = f'name = "n"\napi_key = "{KEY}"\nrelay_url = "http://127.0.0.1"\n'
        for more, word in (
            ('app = "3000"\nfile_server_root = "."\n', "exclude each other"), ('app = "ftp://x"\n', "app cannot be used"),
            ('app = "3000"\napp_host = "no host"\n', "app_host must be"), ('app_hots = "x"\n', "did you mean app_host"),
        ):  # fmt: skip
            with pytest.raises(ptth.UserError, match=word):
                load_server(tmp_path, base + more)
        for flags, url in (({}, "http://localhost:3000"), ({"app": "h:1"}, "http://h:1")):
            assert load_server(tmp_path, base + 'app = "3000"\n', flags).app_url.url == url


@pytest.fixture
def hand(bare_relay: Tunnel) -> object:
    made = Hand(bare_relay.port)
    made.listen(0)
    assert made.requests() == []
    yield made
    made.close()


class TestRelay:
    def hand_over(
        self, relay: Tunnel, hand: Hand, *clients: tuple[object, ...], **options: str
    ) -> tuple[list[Client], list[str]]:
        """Let clients send requests one after the other; return the clients and the ids of their requests."""
        made, ids = [], []
        for i, fields in enumerate(clients or ((),)):
            hand.listen()
            made.append(Client(relay.port, f"/{i}", *fields, **options))
            ((identity, target),) = hand.requests()
            assert target == f"/{i}"
            ids.append(identity)
        return made, ids

    def test_a_request_goes_round(self, bare_relay: Tunnel, hand: Hand) -> None:
        (client,), (identity,) = self.hand_over(bare_relay, hand)
        assert hand.reply(identity, OK) == 200
        status, fields, body = client.answer()
        assert (status, fields["via"], fields["content-length"], body) == (200, "1.1 ptth", "2", b"hi")

    def test_one_address_does_not_get_all_handlers(self, bare_relay: Tunnel, hand: Hand, monkeypatch: Patch) -> None:
        """What it asks for beyond its share waits, and the requests of others pass it."""
        monkeypatch.setattr(ptth, "MAX_AT_WORK", 2)
        clients = []
        for number in range(3):
            clients.append(Client(bare_relay.port, f"/{number}", "X-Forwarded-For: 192.0.2.1"))
            eventually(lambda number=number: len(bare_relay.registered.waiting) == number + 1)
        hand.listen()
        held = hand.requests()
        assert [target for _, target in held] == ["/0", "/1"]
        hand.listen()
        other = Client(bare_relay.port, "/other", "X-Forwarded-For: 198.51.100.1")
        ((identity, target),) = hand.requests()
        assert target == "/other"
        hand.complete(identity, other)
        listener = Hand(bare_relay.port)
        listener.listen()
        hand.complete(held[0][0], clients[0])
        ((identity, target),) = listener.requests()
        assert target == "/2"
        hand.complete(held[1][0], clients[1])
        hand.complete(identity, clients[2])
        listener.close()

    @pytest.mark.parametrize(("features", "counts"), [("body", [20]), ("body, listen", [10, 10])])
    def test_a_server_of_this_program_gets_half_of_the_requests_at_a_time(
        self, features: str, counts: list[int], bare_relay: Tunnel, hand: Hand
    ) -> None:
        clients = [Client(bare_relay.port) for _ in range(20)]
        eventually(lambda: len(bare_relay.registered.waiting) == 20)
        batches = []
        for _ in counts:
            hand.listen(0, f"PTTH-Features: {features}")
            batches.append(hand.requests())
        assert [len(batch) for batch in batches] == counts
        for identity, _ in itertools.chain(*batches):
            hand.reply(identity, OK)
        assert [client.answer()[0] for client in clients] == [200] * 20

    def test_what_waits_is_handed_over_together(self, bare_relay: Tunnel, hand: Hand) -> None:
        clients = [Client(bare_relay.port, f"/{i}") for i in range(70)]
        eventually(lambda: len(bare_relay.registered.waiting) == 70)
        hand.listen()
        first = hand.requests()
        hand.listen()
        second = hand.requests()
        assert (len(first), len(second)) == (64, 6)
        for identity, target in first + second:
            assert hand.reply(identity, b"HTTP/1.1 200 OK\r\n\r\n" + target.encode()) == 200
        assert [client.answer()[2] for client in clients] == [f"/{i}".encode() for i in range(70)]

    BAD_RESPONSES = [
        b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/2 200 OK\r\n\r\n", b"HTTP/1.1 99 X\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nhi", b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nhi",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: y\n z: 1\r\n\r\n", b"HTTP/1.1 304 X\r\n\r\nhi",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nhi", b"HTTP/1.1 200 OK\r\nX: " + b"y" * 60_000 + b"\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\n\r\nhi", b"HTTP/1.1 200 OK\r\nX: " + b"y" * 50_000 + b"\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n", b"HTTP/1.1 999 X\r\n\r\n",
    ]  # fmt: skip

    @pytest.mark.parametrize("inner", BAD_RESPONSES, ids=range(len(BAD_RESPONSES)))
    def test_a_response_that_cannot_be_used_is_502(self, inner: bytes, bare_relay: Tunnel, hand: Hand) -> None:
        (client,), (identity,) = self.hand_over(bare_relay, hand)
        assert hand.reply(identity, inner) == 400
        assert client.answer()[0] == 502

    def test_the_first_response_claims_the_id(self, bare_relay: Tunnel, hand: Hand) -> None:
        (client,), (identity,) = self.hand_over(bare_relay, hand)
        assert [hand.reply(identity, OK), hand.reply(identity, OK), hand.reply("0" * 32, OK)] == [200, 410, 410]
        assert client.answer()[0] == 200

    def test_a_good_response_right_behind_a_bad_one_is_too_late(self, bare_relay: Tunnel, hand: Hand) -> None:
        (client,), (identity,) = self.hand_over(bare_relay, hand)
        bad, good = Hand(bare_relay.port), Hand(bare_relay.port)
        paused = threading.Event()
        bare_relay.background.loop.call_soon_threadsafe(paused.wait)  # so that both arrive in one turn
        bad.respond(identity, b"nonsense\r\n\r\n")
        good.respond(identity, OK)
        paused.set()
        assert sorted([bad.answer()[0], good.answer()[0]]) in ([400, 410], [200, 410])
        assert client.answer()[0] in (200, 502)

    def test_a_hello_renews_what_is_parked(self, bare_relay: Tunnel, hand: Hand, monkeypatch: Patch) -> None:
        monkeypatch.setattr(ptth, "RENEWAL_TIME", 0.05)
        hand.listen()  # its server is gone, but a proxy holds the P1 open
        eventually(lambda: bare_relay.registered.parked)
        new = Hand(bare_relay.port)
        new.listen(0)
        assert new.requests() == []
        (client,), (identity,) = self.hand_over(bare_relay, new)
        new.complete(identity, client)
        assert hand.requests() == []

    def test_the_oldest_of_too_many_p1_is_answered(self, bare_relay: Tunnel, monkeypatch: Patch) -> None:
        monkeypatch.setattr(ptth, "MAX_PARKED", 2)
        hands = [Hand(bare_relay.port) for _ in range(3)]
        for i, hand in enumerate(hands):
            hand.listen()
            eventually(lambda i=i: len(bare_relay.registered.parked) == min(i + 1, 2))
        assert hands[0].requests() == []
        client = Client(bare_relay.port)
        ((identity, _),) = hands[1].requests()
        hands[1].complete(identity, client)
        for hand in hands:
            hand.close()

    def test_what_a_dead_connection_took_is_offered_again_after_a_hello(self, bare_relay: Tunnel, hand: Hand) -> None:
        clients = []
        ids = []
        for method in ("GET", "DELETE", "GET", "GET"):
            hand.listen(20, "PTTH-Instance: one" if len(ids) < 3 else "PTTH-Instance: two")
            clients.append(Client(bare_relay.port, f"/{len(ids)}", method=method))
            ids += [identity for identity, _ in hand.requests()]
        new = Hand(bare_relay.port)
        new.listen(0, "PTTH-Instance: one", f"PTTH-At-Work: {ids[2]}, x")
        assert new.requests() == [(ids[0], "/0")]
        assert clients[1].answer()[0] == 502
        new.listen(0, "PTTH-Instance: one", f"PTTH-At-Work: {ids[2]}")
        assert new.requests() == []  # it is offered a second time, not a third
        assert clients[0].answer()[0] == 502
        assert [new.reply(ids[2], OK), new.reply(ids[3], OK)] == [200, 200]
        assert [client.answer()[0] for client in clients[2:]] == [200, 200]

    def test_a_response_that_was_lost_on_its_way_is_502_at_once(self, bare_relay: Tunnel, hand: Hand) -> None:
        (waiting, begun, other), ids = self.hand_over(bare_relay, hand, (), (), ())
        post = Hand(bare_relay.port)
        post.begin(ids[1], b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        eventually(lambda: len(bare_relay.registered.offered) == 2)
        many = ", ".join(f"{i:032}" for i in range(ptth.MAX_LOST - 2))
        hand.listen(0, f"PTTH-Lost: {ids[0]}, {ids[1]}, {many}, {ids[2]}")
        assert waiting.answer()[0] == 502
        raw = begun.raw()
        assert b" 200 OK" in raw and raw.endswith(b"\r\n\r\n")
        assert hand.requests() == []
        hand.complete(ids[2], other)  # its id was after MAX_LOST others, and is ignored
        assert not bare_relay.relay.state.exchanges

    def test_a_client_that_resets_while_it_waits_frees_its_place(self, bare_relay: Tunnel, hand: Hand) -> None:
        server = bare_relay.registered
        hand.listen()
        socks = [connect(bare_relay.port, get("/frontend/servers/n/x"))]
        ((identity, _),) = hand.requests()
        socks.append(connect(bare_relay.port, get("/frontend/servers/n/x")))  # this one is not handed over
        eventually(lambda: server.in_flight == 2 and len(server.waiting) == 1)
        for sock in socks:
            reset(sock)
        eventually(lambda: not (server.in_flight or server.waiting or server.offered or server.addresses))
        assert not bare_relay.relay.state.exchanges
        assert hand.reply(identity, OK) == 410

    def test_thousands_of_instances_are_bounded(self, bare_relay: Tunnel, hand: Hand) -> None:
        for i in range(ptth.MAX_INSTANCES + 5):
            hand.listen(0, f"PTTH-Instance: {i}")
            assert hand.requests() == []
        assert len(bare_relay.registered.instances) == ptth.MAX_INSTANCES

    def test_a_server_cannot_lose_what_another_one_has(self, bare_relay: Tunnel, hand: Hand) -> None:
        key = "another-key-than-the-right-one"
        entries = [ptth.ServerEntry("n", ptth.tripcode(KEY)), ptth.ServerEntry("m", ptth.tripcode(key))]
        bare_relay.background.loop.call_soon_threadsafe(bare_relay.relay.configure, ptth.RelayConfig(servers=entries))
        (client,), (identity,) = self.hand_over(bare_relay, hand)
        other = Hand(bare_relay.port, "m", key)
        other.listen(0, f"PTTH-Lost: {identity}")
        assert other.requests() == []
        hand.complete(identity, client)

    def test_responses_that_are_being_sent_are_bounded(
        self, bare_relay: Tunnel, hand: Hand, monkeypatch: Patch
    ) -> None:
        monkeypatch.setattr(ptth, "MAX_SENDING", 3)
        monkeypatch.setattr(ptth, "MAX_FROM_ADDRESS", 2)
        slow = []
        for address in ("192.0.2.1", "192.0.2.1", ""):
            hand.listen()
            fields = [f"X-Forwarded-For: 6.6.6.6, {address}"] if address else []
            sock, post = connect(bare_relay.port, get("/frontend/servers/n/", *fields)), Hand(bare_relay.port)
            ((identity, _),) = hand.requests()
            post.begin(identity, b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n")
            slow += [(sock, post)]
        server = bare_relay.registered
        eventually(lambda: server.in_flight == 3 and not server.offered)
        for fields in ((), ("X-Forwarded-For: 192.0.2.9",)):
            status, headers, _ = bare_relay.get("/frontend/servers/n/", *fields)
            assert (status, "retry-after" in headers) == (503, True)
        slow[2][1].close()
        eventually(lambda: server.in_flight == 2)
        assert bare_relay.get("/frontend/servers/n/", "X-Forwarded-For: 192.0.2.1")[0] == 503
        (client,), (identity,) = self.hand_over(bare_relay, hand, ("X-Forwarded-For: 192.0.2.9",))
        hand.complete(identity, client)
        for sock, post in slow:
            sock.close()
            post.close()
        eventually(lambda: not server.in_flight and not server.addresses)

    @pytest.mark.parametrize(
        ("addresses", "outer"),
        [
            ("192.0.2.1", "192.0.2.1"), ("6.6.6.6, 192.0.2.1, 127.0.0.1", "192.0.2.1"), ("127.0.0.1", ""), ("", ""), ("-", ""), ("::1", ""),
            ("2001:db8:0:1:2::3", "20010db800000001"), ("2001:db8:0:1::4", "20010db800000001"), ("unknown\0", "unknown\0"),
            ("1.2.3.4, " + "127.0.0.1, " * 9, ""),
        ],
    )  # fmt: skip
    def test_which_address_a_client_has(self, addresses: str, outer: str) -> None:
        assert ptth.outer_address(addresses) == outer

    def test_an_answer_to_head_has_a_length_and_no_body(self, bare_relay: Tunnel, hand: Hand) -> None:
        (client,), (identity,) = self.hand_over(bare_relay, hand, method="HEAD")
        assert hand.reply(identity, OK[:-2]) == 200
        status, fields, body = parse_answer(client.raw(), "HEAD")
        assert (status, fields["content-length"], body) == (200, "2", b"")

    @pytest.mark.parametrize("told", [b"", b"Content-Length: 4\r\n"])
    def test_a_chunked_response_arrives_as_it_comes(self, told: bytes, bare_relay: Tunnel, hand: Hand) -> None:
        (client,), (identity,) = self.hand_over(bare_relay, hand)
        hand.begin(identity, b"HTTP/1.1 200 OK\r\n%b\r\n" % told)
        for piece in (b"2\r\nhi\r\n", b"2\r\n!!\r\n", b"0\r\n\r\n"):
            hand.sock.sendall(piece)
        assert hand.answer()[0] == 200
        _, fields, body = client.answer()
        framing = fields.get("content-length") or fields["transfer-encoding"]
        assert (framing, body) == ("4" if told else "chunked", b"hi!!")

    def test_large_chunks_arrive_whole_also_without_chunks(self, bare_relay: Tunnel, hand: Hand) -> None:
        data = os.urandom(1 << 20)
        (client,), (identity,) = self.hand_over(bare_relay, hand, version="1.0")
        hand.begin(identity, b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n", data, data)
        hand.sock.sendall(b"0\r\n\r\n")
        assert client.raw().partition(b"\r\n\r\n")[2] == data + data
        assert hand.answer()[0] == 200

    def test_a_chunked_body_that_breaks_off_has_no_last_chunk(self, bare_relay: Tunnel, hand: Hand) -> None:
        (client,), (identity,) = self.hand_over(bare_relay, hand)
        hand.begin(identity, b"HTTP/1.1 200 OK\r\n\r\n", b"hi")
        hand.close()
        raw = client.raw()
        assert b"chunked" in raw and not raw.endswith(b"0\r\n\r\n")

    def test_towards_http_1_0_a_broken_body_ends_in_a_reset(self, bare_relay: Tunnel, hand: Hand) -> None:
        hand.listen()
        with connect(bare_relay.port, b"GET /frontend/servers/n/ HTTP/1.0\r\n\r\n") as client:
            ((identity, _),) = hand.requests()
            hand.begin(identity, b"HTTP/1.1 200 OK\r\n\r\n", b"hi")
            read(client, b"\r\n\r\nhi")
            hand.close()
            with pytest.raises(ConnectionResetError):
                client.recv(1000)

    def test_a_short_body_ends_before_its_content_length(self, bare_relay: Tunnel, hand: Hand) -> None:
        (client,), (identity,) = self.hand_over(bare_relay, hand)
        hand.begin(identity, b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n", b"hi")
        hand.sock.sendall(b"0\r\n\r\n")
        raw = client.raw()
        assert b"Content-Length: 100" in raw and raw.endswith(b"\r\n\r\nhi")

    def test_a_client_that_leaves_ends_the_servers_post(self, bare_relay: Tunnel, hand: Hand) -> None:
        hand.listen()
        client = connect(bare_relay.port, get("/frontend/servers/n/"))
        ((identity, _),) = hand.requests()
        hand.begin(identity, b"HTTP/1.1 200 OK\r\n\r\n")
        client.recv(100)
        client.close()
        with contextlib.suppress(ConnectionError):
            for _ in range(10_000):
                hand.sock.sendall(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
            raise AssertionError("the relay read on for a client that had left")

    def test_a_get_is_offered_again_when_its_connection_ends_and_only_once(
        self, bare_relay: Tunnel, hand: Hand
    ) -> None:
        (client,), (identity,) = self.hand_over(bare_relay, hand)
        again = Hand(bare_relay.port)
        again.listen()
        hand.close()
        assert again.requests() == [(identity, "/0")]
        last = Hand(bare_relay.port)
        again.close()
        eventually(lambda: not bare_relay.relay.backend._offered_on)
        last.listen(0)
        assert last.requests() == []
        last.complete(identity, client)
        last.close()

    def test_a_close_that_was_announced_loses_nothing(self, bare_relay: Tunnel) -> None:
        hand = Hand(bare_relay.port)
        hand.listen(20, "Connection: close")
        client = Client(bare_relay.port)
        ((identity, _),) = hand.requests()
        assert hand.sock.recv(1) == b""
        hand.close()
        hand = Hand(bare_relay.port)
        hand.listen(0)
        assert hand.requests() == []
        hand.complete(identity, client)
        hand.close()

    def test_a_batch_goes_to_its_clients(self, bare_relay: Tunnel, hand: Hand) -> None:
        clients, ids = self.hand_over(bare_relay, hand, (), (), (), ())
        foreign = inner_response("0" * 32, b"no")
        good = inner_response(ids[0], b"hi", "X-Y: z")
        wrong_length = inner_response(ids[1], b"hi", "Content-Length: 3")
        broken = inner_response(ids[2], b"hi").replace(b"200 OK", b"100 OK")
        body = foreign + good + wrong_length + broken + inner_response(ids[3], b"!!")
        for _ in range(2):  # a repeat does no harm
            hand.send("POST", "http_responses/n", body, "Content-Type: application/http; msgtype=response")
            assert hand.answer()[0] == 200
        answers = [client.answer() for client in clients]
        assert [(status, body) for status, _, body in answers if status == 200] == [(200, b"hi"), (200, b"!!")]
        assert [status for status, _, _ in answers] == [200, 502, 502, 200]
        assert not any(name.startswith("ptth-") for _, fields, _ in answers for name in fields)

    def test_a_batch_that_waits_is_the_next_p1(self, bare_relay: Tunnel, hand: Hand) -> None:
        (client,), (identity,) = self.hand_over(bare_relay, hand)
        batch = inner_response(identity, b"hi")
        fields = ("Content-Type: application/http", "Accept: application/http", "Prefer: wait=20")
        hand.send("POST", "http_responses/n", batch, *fields)
        assert client.answer()[2] == b"hi"  # while the P3 is still to come
        client = Client(bare_relay.port, "/next")
        ((identity, target),) = hand.requests()
        assert target == "/next"
        hand.complete(identity, client)
        bare_relay.relay.state.stopping = True
        hand.send("POST", "http_responses/n", batch, *fields)
        status, answer, _ = hand.answer()
        bare_relay.relay.state.stopping = False
        assert status == 200 and "content-type" not in answer

    def test_a_batch_needs_the_key_and_its_framing(self, bare_relay: Tunnel, hand: Hand) -> None:
        other = Hand(bare_relay.port, key="another-key-than-the-right-one")
        other.send("POST", "http_responses/n", b"")
        assert other.answer()[0] == 401
        (client,), (identity,) = self.hand_over(bare_relay, hand)
        hand.send("POST", "http_responses/n", inner_response(identity, b"hi") + b"HTTP/1.1 200 OK\r\n\r\n")
        assert hand.answer()[0] == 400
        assert client.answer()[2] == b"hi"

    @staticmethod
    def begin_batch(port: int, framing: str) -> Hand:
        """Return a server that has sent only the first byte of a batch."""
        hand = Hand(port)
        lines = ("POST /7ZSFUKGV/http_responses/n HTTP/1.1", "Host: r", f"X-ApiKey: {KEY}", framing, "", "1")
        hand.sock.sendall("\r\n".join(lines).encode() + (b"\r\nx" if framing.endswith("chunked") else b""))
        return hand

    def test_batches_without_their_end_take_no_more_than_their_share_of_memory(self, bare_relay: Tunnel) -> None:
        server = bare_relay.registered
        most = ptth.MAX_BATCHES_BYTES // 400_000
        hands = [self.begin_batch(bare_relay.port, "Content-Length: 400000") for _ in range(most)]
        eventually(lambda: server.batch_bytes == most * 400_000)
        for framing in ("Content-Length: 400000", "Transfer-Encoding: chunked"):
            refused = self.begin_batch(bare_relay.port, framing)
            assert refused.answer()[0] == 503
            refused.close()
        for hand in hands:
            hand.close()
        eventually(lambda: server.batch_bytes == 0)

    @pytest.mark.parametrize("framing", ["Content-Length: 400000", "Transfer-Encoding: chunked"])
    def test_a_batch_that_takes_longer_than_its_clients_wait_is_408(self, framing: str, open_tunnel: object) -> None:
        relay = open_tunnel(response_timeout=0.05)
        hand = self.begin_batch(relay.port, framing)
        assert (hand.answer()[0], relay.registered.batch_bytes) == (408, 0)
        hand.close()

    def test_a_client_that_does_not_read_holds_up_nobody_in_its_batch(self, bare_relay: Tunnel, hand: Hand) -> None:
        lazy = connect(bare_relay.port)
        clients = []
        for _ in range(3):
            hand.listen()
            lazy.sendall(b"GET /frontend/servers/n/lazy HTTP/1.1\r\nHost: a\r\n\r\n") if not clients else None
            clients.append(Client(bare_relay.port, "/other"))
            requests = hand.requests()
            if len(clients) == 1 and len(requests) == 1:
                hand.listen()
                requests += hand.requests()
            sizes = {"/lazy": 60_000, "/other": 2}
            batch = b"".join(inner_response(identity, b"x" * sizes[target]) for identity, target in requests)
            hand.send("POST", "http_responses/n", batch)
            assert hand.answer()[0] == 200
            assert clients[-1].answer()[2] == b"xx"
        lazy.close()

    @staticmethod
    async def park(*fields: tuple[str, str]) -> tuple[ptth.Relay, ptth.Request, asyncio.Task[ptth.Response]]:
        """Return a relay, a P1 with these fields, and the task that waits for its P3."""
        relay = ptth.Relay(ptth.RelayConfig(servers=[ptth.ServerEntry("n", ptth.tripcode(KEY))]))
        p1 = ptth.Request("GET", "/7ZSFUKGV/http_listen/n", ptth.Headers([("X-ApiKey", KEY), *fields]))
        poll = asyncio.create_task(relay.handle(p1))
        while not relay.state.servers["n"].parked:
            await asyncio.sleep(0)
        return relay, p1, poll

    @staticmethod
    async def visit(relay: ptth.Relay, method: str, turns: int) -> asyncio.Task[ptth.Response]:
        """Return the task of a request that has had this many turns of the loop."""
        request = ptth.Request(method, "/frontend/servers/n/x", ptth.Headers([("Host", "a")]))
        client = asyncio.create_task(relay.handle(request))
        for _ in range(turns):
            await asyncio.sleep(0)
        return client

    @in_loop
    async def test_a_client_that_leaves_while_its_p3_is_made_does_not_end_the_p1(self) -> None:
        """The P3 in the form of the original cannot carry its request, and it takes no error any more."""
        begun = []
        for turns in range(6):
            relay, _, poll = await self.park(("Accept", "*/*"), ("Prefer", "wait=1"))
            (await self.visit(relay, "DELETE", turns)).cancel()
            begun.append((relay, poll))
        for relay, poll in begun:
            assert (await poll).status in (200, 204)
            await relay.stop(0)

    @pytest.mark.parametrize("turns", range(6))
    @in_loop
    async def test_a_request_whose_p1_ends_while_it_is_handed_over_is_offered_again(self, turns: int) -> None:
        relay, p1, poll = await self.park(("Accept", "application/http"))
        client = await self.visit(relay, "GET", turns)
        if not poll.done():
            poll.cancel()
            assert (await asyncio.wait_for(relay.handle(p1), 5)).body.data.startswith(b"GET /x ")
        client.cancel()
        await relay.stop(0)

    def original(self, relay: Tunnel) -> Hand:
        """Return a server in Rust, which sends Accept: */*, after its first P1."""
        hand, before = Hand(relay.port), len(relay.registered.parked)
        hand.send("GET", "http_listen/n", b"", "Accept: */*")
        eventually(lambda: len(relay.registered.parked) == before + 1)
        return hand

    @pytest.mark.parametrize(
        ("method", "field", "body", "expected"),
        [
            ("GET", "koEAwIGuY29udGVudC1sZW5ndGiRMg==", b"hi", (200, b"hi")), ("GET", "koEAwIA=", b"hi", (200, b"hi")),
            ("HEAD", "koEBwIA=", b"", (204, b"")), ("GET", "koEDwIA=", b"its mistake", (304, b"")),
            ("GET", "koEAwIGuY29udGVudC1sZW5ndGiRMg==", b"too long", (502, None)),
        ],
    )  # fmt: skip
    def test_a_server_of_the_original(
        self, method: str, field: str, body: bytes, expected: tuple[int, bytes | None], bare_relay: Tunnel
    ) -> None:
        hand = self.original(bare_relay)
        client = Client(bare_relay.port, "/a?b", method=method)
        status, fields, packed = hand.answer()
        assert status == 200 and "content-type" not in fields
        ((identity, request),) = ptth.unpack_rust_requests(packed)
        assert (request.method, request.target) == (method, "/a?b")
        hand.send("POST", f"http_response/{identity}", body, f"X-PTTH-2LJYXWC4: {field}")
        assert hand.answer()[0] == (200 if expected[0] != 502 else 400)
        answer = parse_answer(client.raw(), method)
        assert answer[0] == expected[0] and expected[1] in (None, answer[2])
        hand.close()

    @pytest.mark.parametrize("client_waits", [True, False])
    def test_an_original_server_gets_p7_when_its_body_was_read(self, client_waits: bool, bare_relay: Tunnel) -> None:
        hand = self.original(bare_relay)
        client = Client(bare_relay.port)
        ((identity, _),) = ptth.unpack_rust_requests(hand.answer()[2])
        head = f"POST /7ZSFUKGV/http_response/{identity if client_waits else 'x' * 32} HTTP/1.1\r\nHost: r\r\nX-ApiKey: {KEY}\r\n"
        not_modified = f"{head}X-PTTH-2LJYXWC4: koEDwIA=\r\n"
        hand.sock.sendall(f"{not_modified}Content-Length: 13\r\n\r\n".encode())
        if client_waits:
            assert parse_answer(client.raw(), "GET")[0] == 304
        for _ in range(3):
            bare_relay.fetch(get("/frontend/relay_up_check"))
        hand.sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            hand.sock.recv(1)
        hand.sock.settimeout(20)
        hand.sock.sendall(b"hello, world\n")
        status, fields, _ = hand.answer()
        assert (status, fields.get("connection")) == (200 if client_waits else 410, None)
        hand.sock.sendall(f"{not_modified}Content-Length: 9999999\r\n\r\n".encode())  # too much to read it all
        status, fields, _ = hand.answer()
        assert (status, fields["connection"]) == (410, "close")
        hand.close()

    def test_a_server_of_the_original_beside_ours(self, bare_relay: Tunnel) -> None:
        theirs, ours = self.original(bare_relay), Hand(bare_relay.port)
        ours.listen()
        eventually(lambda: len(bare_relay.registered.parked) == 2)
        client = Client(bare_relay.port, "/1")
        ((identity, _),) = ptth.unpack_rust_requests(theirs.answer()[2])
        hand = Hand(bare_relay.port)
        hand.send("POST", f"http_response/{identity}", b"", "X-PTTH-2LJYXWC4: koEAwIA=")
        assert hand.answer()[0] == 200
        assert client.answer()[0] == 200
        client = Client(bare_relay.port, "/2", method="OPTIONS")
        ((identity, _),) = ours.requests()
        ours.complete(identity, client)

    def test_an_original_server_gets_204_when_the_wait_is_over(self, bare_relay: Tunnel) -> None:
        hand = Hand(bare_relay.port)
        hand.send("GET", "http_listen/n", b"", "Accept: */*", "Prefer: wait=0")
        status, _, body = hand.answer()
        assert (status, body) == (204, b"")
        hand.close()

    def test_what_the_original_cannot_take_is_405(self, bare_relay: Tunnel) -> None:
        hand = self.original(bare_relay)
        assert Client(bare_relay.port, method="DELETE").answer()[0] == 405
        hand.close()

    def test_a_half_closed_p1_gets_no_request(self, bare_relay: Tunnel) -> None:
        leaving, staying = Hand(bare_relay.port), Hand(bare_relay.port)
        leaving.listen()
        leaving.sock.shutdown(socket.SHUT_WR)
        parked = bare_relay.registered.parked
        eventually(lambda: [poll.connection.at_eof() for poll in parked] in ([True], []))
        (client,), (identity,) = self.hand_over(bare_relay, staying)
        assert leaving.requests() == []
        staying.complete(identity, client)

    @pytest.mark.parametrize(
        ("name", "key"),
        [("n", "wrong-key-that-is-long-enough"), ("unknown", KEY), ("n", "k" * 129), ("n", "")],
    )
    def test_a_wrong_key_and_an_unknown_name_get_the_same_401(self, name: str, key: str, bare_relay: Tunnel) -> None:
        hand = Hand(bare_relay.port, name, key)
        hand.listen(0)
        status, _, body = hand.answer()
        assert (status, body) == (401, b"Bad X-ApiKey\n")
        hand.close()

    def test_a_response_needs_the_key_of_its_server(self, bare_relay: Tunnel, hand: Hand) -> None:
        (client,), (identity,) = self.hand_over(bare_relay, hand)
        other = Hand(bare_relay.port, key="another-key-than-the-right-one")
        assert other.reply(identity, OK) == 401
        hand.complete(identity, client)

    STATUSES = [
        ("/frontend/servers/unknown/", 404), ("/frontend/servers/n", 301), ("/frontend/servers/../n/", 404), ("/frontend/servers//n/", 404),
        ("/frontend//servers/n/", 404), ("/7ZSFUKGV/../frontend/servers/", 404), ("/7ZSFUKGV/http_listen/../n", 404), ("/nothing", 404),
        ("/%66rontend/servers/", 404), ("/7ZSFUKGV/http_listen/", 404), ("/7ZSFUKGV/", 404), ("/frontend/servers/%6e/", 404), ("/", 302),
        ("/frontend/servers/./", 404), ("/frontend/servers", 301), ("/frontend/relay_up_check", 200), ("/frontend/servers/", 200),
        ("/7ZSFUKGV/http_listen/%6e", 404), ("/7ZSFUKGV/http_listen/..", 404), ("/7ZSFUKGV/http_response/..", 404),
        ("/frontend/unregistered_servers", 200), ("/ptth.py", 200), ("/7ZSFUKGV/http_listen/n/x", 404),
    ]  # fmt: skip

    @pytest.mark.parametrize(("path", "status"), STATUSES)
    def test_targets_are_matched_literally(self, path: str, status: int, bare_relay: Tunnel) -> None:
        assert bare_relay.get(path)[0] == status

    def test_redirects_are_relative(self, bare_relay: Tunnel) -> None:
        assert bare_relay.get("/frontend/servers/n?a=b/c")[1]["location"] == "./n/?a=b/c"
        assert bare_relay.get("/")[1]["location"] == "./frontend/servers/"

    @pytest.mark.parametrize("path", ["/", "/a/../%2e//b?c=%20/../d", "/\xff", "/a%2Fb\\c;d=e/..?/../.."])
    def test_what_follows_the_name_is_forwarded_untouched(self, path: str, bare_relay: Tunnel, hand: Hand) -> None:
        hand.listen()
        client = Client(bare_relay.port, path)
        ((identity, target),) = hand.requests()
        assert target == path
        hand.complete(identity, client)

    UP = [
        "..", "../", "../x", "a/../..", "a/b/../../../x", "./..", "/..", "//../x", "a//../../x", "a/./../..", "a///..//../x",
        "%2e%2e", ".%2E/x", "%2e./x", "a/%2e%2e/%2E%2E/x", "..%2fx", "..%2Fx", "%2e%2e%2fx", "a%2f..%2f..%2fx", "a/..%2f..", "%2f../x",
        "..\\x", "a\\..\\..\\x", "..%5cx", "..%5C..", "%2e%2e%5Cx", "a/..\\../x", "\\../x", "a%5c../..", "x%2fy/../..",
        "%252e%252e/x", "..%252fx", "%25252e./x", "..%255Cx", "..;/x", "..;a=b/x", "a/..;x/..;y", "%2e%2e;/x", "a;b/../..", "..?", "../?q",
    ]  # fmt: skip
    NOT_UP = [
        "", "...", "..a", "a..", "a..b", "..a/..b", ".../x", ".x/..", "a/..", "a/../b", "a/b/../..", "./", "a/./", "%2e", "%2e%2e%2e", "a?/../..",
        "?../..", "a%2f..b", "..%2", "..%25", "a\\b", "1..2/..3", "a/%2e%2e/b", "..%00", "%2e%2ea", "v1..v2.tar.gz", "a;..",
    ]  # fmt: skip

    @pytest.mark.parametrize("below", ["frontend/servers/n/", "scraper/v1/server/n/", "scraper/api/server/n/"])
    def test_a_path_that_climbs_above_the_servers_is_404(self, below: str, open_tunnel: object) -> None:
        tunnel = open_tunnel(echo)
        tunnel.relay.state.config.enable_scraper_api = True
        tunnel.relay.state.config.scraper_keys = [ptth.ScraperKey("s", ptth.tripcode(KEY), 0, time.time() + 99)]
        for paths, status in ((self.UP, 404), (self.NOT_UP, 200)):
            for path in paths:
                assert tunnel.get(f"/{below}{path}", f"X-ApiKey: {KEY}")[0] == status, path

    @pytest.mark.parametrize(
        ("method", "value", "status"), [("OPTIONS", "0", 204), ("TRACE", "00", 405), ("OPTIONS", "x", 400), ("TRACE", "1, 0", 405)]
    )  # fmt: skip
    def test_max_forwards_ends_at_the_relay(self, method: str, value: str, status: int, bare_relay: Tunnel) -> None:
        answer = bare_relay.get("/frontend/servers/n/", f"Max-Forwards: {value}", method=method)
        assert answer[0] == status and ("allow" in answer[1]) is (status != 400)
        assert not bare_relay.relay.state.exchanges

    def test_a_request_body_is_refused_but_drained_where_it_means_nothing(self, bare_relay: Tunnel, hand: Hand) -> None:
        for method in ("POST", "PUT"):
            head = f"{method} /frontend/servers/n/ HTTP/1.1\r\nHost: a\r\n".encode()
            for rest in (b"Content-Length: 2\r\n\r\nhi", b"Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n"):
                status, fields, _ = one(bare_relay.fetch(head + rest))
                assert (status, fields["connection"]) == (501, "close")
        hand.listen()
        head = get("/frontend/servers/n/", "Content-Length: 2").replace(b"Connection: close\r\n", b"")
        with connect(bare_relay.port, head + b"hi" + get("/nothing")) as sock:
            ((identity, _),) = hand.requests()
            assert hand.reply(identity, OK) == 200
            assert [status for status, _, _ in split(read(sock))] == [200, 404]

    def test_a_server_that_is_away_is_503(self, bare_relay: Tunnel) -> None:
        bare_relay.relay.state.started -= 100
        status, fields, _ = bare_relay.get("/frontend/servers/n/")
        assert (status, "retry-after" in fields) == (503, True)

    def test_a_server_that_does_not_answer_is_504(self, open_tunnel: object) -> None:
        relay = open_tunnel(response_timeout=0.01)
        hand = Hand(relay.port)
        (client,), (identity,) = self.hand_over(relay, hand)
        assert client.answer()[0] == 504
        assert hand.reply(identity, OK) == 410

    def test_a_thousand_requests_may_wait(self, bare_relay: Tunnel) -> None:
        waiting = bare_relay.registered.waiting
        waiting.update({str(i): None for i in range(ptth.MAX_WAITING)})
        try:
            assert bare_relay.get("/frontend/servers/n/")[0] == 503
        finally:
            waiting.clear()

    def test_unregistered_servers_are_shown_with_what_would_register_them(self, bare_relay: Tunnel) -> None:
        for name, key in (("stranger", KEY), ("n", "wrong-key-that-is-long-enough"), ("<script>", KEY)):
            hand = Hand(bare_relay.port, name, key)
            hand.listen(0)
            hand.answer()
        page = bare_relay.get("/frontend/unregistered_servers")[2].decode()
        assert "stranger" in page and ptth.tripcode(KEY) in page
        assert ptth.tripcode("wrong-key-that-is-long-enough") not in page and "<script>" not in page and KEY not in page

    def test_pages_of_the_relay(self, bare_relay: Tunnel) -> None:
        page = bare_relay.get("/frontend/servers/")[2].decode()
        assert 'href="//n.example.com/"' in page and "never seen" in page
        with open(PROGRAM, "rb") as file:
            assert bare_relay.get("/ptth.py")[2] == file.read()
        assert bare_relay.get("/", method="POST")[0] == 405
        assert b"<!doctype html>" in bare_relay.fetch(get("/nothing", "Accept: text/html"))

    def test_a_stopping_relay_finishes_what_it_accepted(self, bare_relay: Tunnel, hand: Hand) -> None:
        (client,), (identity,) = self.hand_over(bare_relay, hand)
        hand.listen()
        eventually(lambda: bare_relay.registered.parked)
        stopping = asyncio.run_coroutine_threadsafe(bare_relay.relay.stop(), bare_relay.background.loop)
        status, fields, body = hand.answer()
        assert (status, fields["connection"], body) == (200, "close", b"")
        assert bare_relay.get("/frontend/servers/n/")[0] == 503
        again = Hand(bare_relay.port)
        again.listen(20, "Connection: close")
        assert again.answer()[0] == 503
        again = Hand(bare_relay.port)
        assert again.reply(identity, OK) == 200
        assert client.answer()[0] == 200
        stopping.result(5)


class TestKeys:
    """Which keys are accepted, and the time for hashing them."""

    @pytest.fixture
    def counted(self, monkeypatch: Patch) -> list[str]:
        """Return the list of hashed keys. A hash seems to take a millisecond, that of "dear" a second more."""
        hashed: list[str] = []

        def tripcode(key: str) -> str:
            hashed.append(key)
            return f"code of {key}"

        monkeypatch.setattr(ptth, "tripcode", tripcode)
        monkeypatch.setattr(ptth.time, "thread_time", lambda: len(hashed) / 1000 + hashed.count("dear"))
        return hashed

    @in_loop
    async def test_a_key_is_hashed_once_also_after_a_reload(self, counted: list[str]) -> None:
        keys = ptth.Keys()
        assert await keys.find("a", ["code of a"], "") == ("code of a", True)
        keys.configure(["code of a", "code of b"])
        assert await keys.find("a", ["code of b", "code of a"], "") == ("code of a", False)
        assert counted == ["a"]
        assert await keys.find("b", ["code of a"], "") == ("code of b", False)
        keys.configure(["code of b"])  # what is not configured is not kept
        assert await keys.find("a", ["code of a"], "") == ("code of a", True)
        assert counted == ["a", "b", "a"]

    @in_loop
    async def test_groups_take_turns(self, counted: list[str]) -> None:
        hashes = ptth.HashQueue(1)
        await hashes.hash("dear", "x")
        flood = [asyncio.create_task(hashes.hash(f"flood {i}", "x")) for i in range(100)]
        await asyncio.sleep(0)
        flood[3].cancel()
        await asyncio.wait_for(hashes.hash("fresh", "y"), 5)
        assert counted.index("fresh") < 20  # of a hundred
        await asyncio.gather(*flood, return_exceptions=True)
        assert len(counted) == 101 and "flood 3" not in counted

    @in_loop
    async def test_hashing_takes_its_share_of_the_time_and_no_more(self, counted: list[str]) -> None:
        loop = asyncio.get_running_loop()
        hashes = ptth.HashQueue(0.02)  # a hash in a twentieth of a second
        begin = loop.time()
        await asyncio.gather(*(hashes.hash(str(i), "") for i in range(25)))
        assert loop.time() - begin > 0.19  # 20 of them at once: for that a second had been saved

    @in_loop
    async def test_a_wait_for_a_hash_ends_with_503(self, counted: list[str], monkeypatch: Patch) -> None:
        monkeypatch.setattr(ptth, "HASH_WAIT", 0.01)
        hashes = ptth.HashQueue(1e-6)
        await hashes.hash("a", "")
        with pytest.raises(ptth.ProtocolError) as caught:
            await hashes.hash("b", "")
        assert caught.value.status == 503 and ("Retry-After", "1") in caught.value.headers

    @in_loop
    async def test_the_first_key_for_a_tripcode_does_not_wait(self, counted: list[str]) -> None:
        keys = ptth.Keys()
        keys.configure([f"code of {i}" for i in range(3000)])
        for wrong in ("first", "dear"):  # the second one uses up the share for seconds
            await keys.find(wrong, ["code of 0"], "attacker")
        for i in range(1, 3000):
            coroutine = keys.find(str(i), [f"code of {i}"], "")
            with pytest.raises(StopIteration) as end:
                coroutine.send(None)
            assert end.value.value == (f"code of {i}", True)
        with pytest.raises(TimeoutError):  # but the second one does, also after the configuration was read again
            keys.configure([f"code of {i}" for i in range(3000)])
            await asyncio.wait_for(keys.find("0", ["code of 0"], ""), 0.01)

    def test_a_key_that_its_server_has_checked_is_not_checked_again(
        self, bare_relay: Tunnel, monkeypatch: Patch
    ) -> None:
        checked = []
        monkeypatch.setattr(ptth, "key_weakness", checked.append)
        hand = Hand(bare_relay.port)
        hand.send("GET", "http_listen/n", b"", "Accept: application/http", "Prefer: wait=0", "PTTH-Instance: a")
        assert hand.answer()[0] == 200 and not checked

    def test_a_weak_key_of_an_original_peer_is_told_once(self, bare_relay: Tunnel, capfd: Output) -> None:
        weak = "abcdefghabcdefgh"
        bare_relay.configure(ptth.RelayConfig(servers=[ptth.ServerEntry("n", ptth.tripcode(weak))]))
        hand = Hand(bare_relay.port, key=weak)
        for _ in range(2):
            hand.send("GET", "http_listen/n", b"", "Accept: */*", "Prefer: wait=0")
            assert hand.answer()[0] == 204
        told = capfd.readouterr().err
        assert told.count("warning") == 1 and "'n'" in told and "guessed" in told and weak not in told


@pytest.fixture(scope="module")
def app_tunnel(background: Background) -> object:
    """A tunnel to an app that responds with what it got. Some tests use its `hold`, `got` and `complete`."""

    async def app(request: ptth.Request) -> ptth.Response:
        path = request.target.partition("?")[0]
        if path == "/refuse":
            raise ptth.ProtocolError(413, "no", close=True)
        digest, size = hashlib.sha256(), 0
        async for piece in request.body:
            digest.update(piece)
            size += len(piece)
            made.got = size
            if path == "/wait":
                await asyncio.wrap_future(made.hold)
        made.complete = True
        fields = [
            ("Set-Cookie", "a=b; Domain=example.com; Path=/"), ("Strict-Transport-Security", "x"), ("X-Accel-Redirect", "/"),
        ]  # fmt: skip
        told = {"method": request.method, "target": request.target, "size": size, "digest": digest.hexdigest()}
        told["fields"] = dict(request.headers)
        return ptth.Response(200, fields, ptth.BytesBody(json.dumps(told).encode()))

    with background.serve(app, takes_bodies=True) as port:
        made = Tunnel(background, ptth.App(client_of(port), "public").handle)
        made.app_port = port
        yield made
        made.close()


class TestBodies:
    """Requests with bodies through relay and server to an app, and the same without a tunnel."""

    def begin(self, port: int, framing: str, body: bytes = b"", method: str = "PUT", path: str = "/") -> socket.socket:
        """Return a connection on which a request, or its beginning, was sent."""
        head = f"{method} {path} HTTP/1.1\r\nHost: n.example.com\r\nConnection: close\r\n{framing}\r\n\r\n"
        return connect(port, head.encode() + body)

    def send(
        self, port: int, method: str, framing: str, *pieces: bytes, path: str = "/x?y"
    ) -> tuple[int, dict[str, str], bytes]:
        with self.begin(port, framing, method=method, path=path) as sock:
            for piece in pieces:
                sock.sendall(piece)
            return one(read(sock))

    @staticmethod
    def chunks(data: bytes, size: int) -> list[bytes]:
        made = [ptth.format_chunk(data[i : i + size]) for i in range(0, len(data), size)]
        return [*made, b"0\r\n\r\n"]

    @pytest.mark.parametrize("size", [0, 1, 1000, ptth.MAX_INLINE, ptth.MAX_INLINE + 1, 5_000_000])
    @pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "GET", "PROPFIND"])
    def test_a_body_arrives_whole(self, method: str, size: int, app_tunnel: Tunnel) -> None:
        data = random.Random(size).randbytes(size)
        for framing, pieces in (
            (f"Content-Length: {size}", [data]),
            ("Transfer-Encoding: chunked", self.chunks(data, 40_000)),
        ):
            answers = []
            for port in (app_tunnel.app_port, app_tunnel.port):
                status, _, body = self.send(port, method, framing, *pieces)
                told = json.loads(body)
                assert (status, told["method"], told["target"]) == (200, method, "/x?y")
                assert (told["size"], told["digest"]) == (size, hashlib.sha256(data).hexdigest())
                answers.append(told)
            assert not {"ptth-request-id", "ptth-body-length"} & set(answers[1]["fields"])

    @pytest.mark.parametrize("framing", ["", "PTTH-Framing: chunked"])
    def test_a_fetched_body_without_a_length_is_in_chunks_for_who_reads_them(
        self, framing: str, bare_relay: Tunnel, hand: Hand
    ) -> None:
        hand.listen(20, "PTTH-Features: body")
        with self.begin(bare_relay.port, "Transfer-Encoding: chunked", ptth.format_chunk(b"hello")) as client:
            more = ["Connection: close", *([framing] if framing else [])]
            hand.send("GET", f"http_request/{hand.request_id()}", b"", *more)
            client.sendall(b"0\r\n\r\n")
            _, fields, body = one(read(hand.sock))
            assert ("ptth-framing" in fields, body) == (
                bool(framing),
                b"5\r\nhello\r\n0\r\n\r\n" if framing else b"hello",
            )

    @pytest.mark.parametrize(
        ("fields", "body", "content"),
        [("", b"hello", b"hello"), ("PTTH-Framing: chunked", b"5\r\nhello\r\n10\r\n0123456789abcdef\r\n0\r\n\r\n", b"hello0123456789abcdef"),
         ("PTTH-Framing: chunked", b"0\r\n\r\n", b""), ("PTTH-Framing: chunked", b"", None), ("PTTH-Framing: chunked", b"5\r\nhello\r\n", None),
         ("PTTH-Framing: chunked", b"5\r\nhel", None), ("PTTH-Framing: chunked", b"5\r\nhello\r\n0\r\n", None),
         ("PTTH-Framing: chunked", b"0\r\n\r\nx", None), ("PTTH-Framing: chunked", b"hello, world", None), ("PTTH-Framing: chunked", b"fffffffffffff", None)],
    )  # fmt: skip
    @pytest.mark.parametrize("size", [1, 1000])
    @in_loop
    async def test_a_fetched_body_that_lacks_its_last_chunk_is_incomplete(
        self, size: int, fields: str, body: bytes, content: bytes | None
    ) -> None:
        """Some proxies give it a regular end, although the visitor has left."""

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert b"\r\nPTTH-Framing: chunked\r\n" in await reader.readuntil(b"\r\n\r\n")
            writer.write(
                f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n{fields}\r\n".encode() + b"\r\n" * bool(fields)
            )
            for chunk in self.chunks(body, size):
                writer.write(chunk)
                await asyncio.sleep(0)

        async with client_to(relay) as client:
            fetched = ptth.FetchedBody(client, "key", "x" * 32)
            if content is None:
                with pytest.raises(ptth.IncompleteBody):
                    await fetched.read_all(1000)
            else:
                assert await fetched.read_all(1000) == content
            assert fetched.complete == (content is not None)

    def test_the_fetch_of_a_body_names_the_program_once(self, app_tunnel: Tunnel, monkeypatch: Patch) -> None:
        agents: list[str] = []

        async def record(request: ptth.Request) -> ptth.Response:
            if request.target.startswith(f"{ptth.BACKEND}http_request/"):
                agents.append(request.headers["user-agent"])
            return await app_tunnel.relay.handle(request)

        monkeypatch.setattr(app_tunnel.http, "handler", record)
        assert self.send(app_tunnel.port, "POST", "Content-Length: 100000", bytes(100_000))[0] == 200
        assert agents == [f"ptth/{ptth.__version__}"]

    def test_expect_is_answered_when_the_app_reads_and_not_when_it_refuses(self, app_tunnel: Tunnel) -> None:
        for path, first in (("/x", b"HTTP/1.1 100 "), ("/refuse", b"HTTP/1.1 413 ")):
            with self.begin(app_tunnel.port, "Content-Length: 5\r\nExpect: 100-continue", path=path) as sock:
                assert sock.recv(13) == first
                if b"100" in first:
                    sock.sendall(b"hello")
                    assert b'"size": 5' in read(sock)

    def test_a_body_is_not_asked_for_inside_the_response(self, hand: Hand, bare_relay: Tunnel) -> None:
        """100 Continue would be read as bytes of the response."""
        hand.listen(20, "PTTH-Features: body")
        with self.begin(bare_relay.port, "Content-Length: 5\r\nExpect: 100-continue") as sock:
            identity = hand.request_id()
            hand.begin(identity, b"HTTP/1.1 413 No\r\nContent-Length: 5\r\n\r\n")
            answer = read(sock, b"\r\n\r\n")
            other = Hand(bare_relay.port)
            other.send("GET", f"http_request/{identity}")
            assert other.answer()[0] == 410
            other.close()
            hand.sock.sendall(ptth.format_chunk(b"large") + b"0\r\n\r\n")
            assert one(answer + read(sock))[::2] == (413, b"large")

    def test_an_app_may_answer_before_the_first_chunk(self, app_tunnel: Tunnel) -> None:
        for port in (app_tunnel.app_port, app_tunnel.port):
            with self.begin(port, "Transfer-Encoding: chunked", path="/refuse") as sock:
                assert sock.recv(13) == b"HTTP/1.1 413 "

    def test_after_a_bad_chunk_nothing_is_taken_for_a_request(self, app_tunnel: Tunnel) -> None:
        app_tunnel.got = 0
        head = b"PUT /x HTTP/1.1\r\nHost: n.example.com\r\nTransfer-Encoding: chunked\r\n\r\n"
        with connect(app_tunnel.port, head + b"5\r\nabc") as sock:
            eventually(lambda: app_tunnel.got == 3)
            # "de" are data. Read as a size they make a whole body of what follows.
            sock.sendall(b"de\r\nZZ\r\n".ljust(4 + 0xDE) + b"\r\n0\r\n\r\n" + get("/frontend/relay_up_check"))
            assert one(read(sock))[0] == 400

    @pytest.mark.parametrize("framing", ["Content-Length: 30000000", "Transfer-Encoding: chunked"])
    def test_an_early_refusal_reaches_a_client_that_sends_all_first(self, framing: str, app_tunnel: Tunnel) -> None:
        data = bytes(30_000_000)
        pieces = self.chunks(data, 1 << 20) if "chunked" in framing else [data]
        assert self.send(app_tunnel.port, "POST", framing, *pieces, path="/refuse")[0] == 413

    def test_a_client_that_leaves_never_looks_complete(self, app_tunnel: Tunnel) -> None:
        app_tunnel.complete, app_tunnel.got = False, 0
        with self.begin(app_tunnel.port, "Content-Length: 1000000", bytes(500_000), path="/leave"):
            eventually(lambda: app_tunnel.got == 500_000)
        eventually(lambda: not app_tunnel.relay.state.exchanges)
        eventually(lambda: not app_tunnel.server.workers.request_ids)
        assert not app_tunnel.complete

    def test_an_app_that_does_not_read_stops_the_client(self, app_tunnel: Tunnel) -> None:
        app_tunnel.hold = concurrent.futures.Future()
        size = 1 << 27
        with self.begin(app_tunnel.port, f"Content-Length: {size}", path="/wait") as sock:
            sent = fill(sock, bytes(1 << 20), size)
            assert sent < size // 2  # the kernels' buffers on the way, and no more
            app_tunnel.hold.set_result(None)
            sock.settimeout(20)
            sock.sendall(bytes(size - sent))
            assert f'"size": {size}'.encode() in read(sock)

    def test_each_byte_of_a_body_gives_more_time(self, open_tunnel: object) -> None:
        async def count(request: ptth.Request) -> ptth.Response:
            return ptth.text_response(200, str(len(await request.body.read_all(1 << 20))))

        tunnel = open_tunnel(count, response_timeout=1)
        with self.begin(tunnel.port, "Transfer-Encoding: chunked") as sock:
            begin = time.monotonic()
            while time.monotonic() < begin + 1.6:
                sock.sendall(b"1\r\nx\r\n")
                time.sleep(0.02)
            sock.sendall(b"0\r\n\r\n")
            assert sock.recv(100).startswith(b"HTTP/1.1 200")

    def test_other_bytes_on_the_connection_of_a_body_give_no_more_time(self, open_tunnel: object) -> None:
        relay = open_tunnel(response_timeout=0.5)
        hand = Hand(relay.port)
        hand.listen(0, "PTTH-Features: body")
        hand.answer()
        hand.listen(20, "PTTH-Features: body")
        with self.begin(relay.port, "Content-Length: 100000", bytes(100_000)) as client:
            hand.send("GET", f"http_request/{hand.request_id()}")
            assert hand.answer()[2] == bytes(100_000)
            client.setblocking(False)
            begin, answer = time.monotonic(), b""
            while not answer and time.monotonic() < begin + 3:
                hand.listen(0, "PTTH-Features: body")
                hand.answer()
                with contextlib.suppress(BlockingIOError):
                    answer = client.recv(100)
            assert answer.startswith(b"HTTP/1.1 504")
        hand.close()

    def test_a_server_that_dies_with_half_a_body_is_502_and_the_request_is_not_offered_again(
        self, bare_relay: Tunnel, hand: Hand, monkeypatch: Patch
    ) -> None:
        monkeypatch.setattr(ptth, "FETCH_GRACE", 0.1)
        hand.listen(20, "PTTH-Features: body")
        with self.begin(bare_relay.port, "Content-Length: 1000000", bytes(200_000)) as client:
            body = hand.answer()[2]
            assert re.findall(rb"\r\n(.*-Length: .*)\r\n", body) == [b"PTTH-Body-Length: 1000000"]
            identity = re.search(rb"PTTH-Request-Id: (\w+)", body)[1].decode()
            other, again = Hand(bare_relay.port), Hand(bare_relay.port)
            other.send("GET", f"http_request/{identity}")
            other.sock.recv(1000)
            again.send("GET", f"http_request/{identity}")
            assert again.answer()[0] == 410
            other.close()
            hand.close()
            assert client.recv(100).startswith(b"HTTP/1.1 502")
        new = Hand(bare_relay.port)
        new.listen(0, "PTTH-Features: body")
        assert new.answer()[2] == b""

    @pytest.mark.parametrize("framing", ["Content-Length: 1000000", "Transfer-Encoding: chunked"])
    def test_a_server_that_dies_while_its_client_pauses_is_502_and_then_away(
        self, framing: str, bare_relay: Tunnel, hand: Hand, monkeypatch: Patch
    ) -> None:
        monkeypatch.setattr(ptth, "FETCH_GRACE", 0.1)
        monkeypatch.setattr(ptth, "RECONNECT_WAIT", 0.1)
        hand.listen(20, "PTTH-Features: body")
        head = f"PUT / HTTP/1.1\r\nHost: n.example.com\r\n{framing}\r\n\r\n".encode()
        with connect(bare_relay.port, head + ptth.format_chunk(bytes(300_000))) as client:
            hand.send("GET", f"http_request/{hand.request_id()}")
            assert read(hand.sock, b"\0").startswith(b"HTTP/1.1 200")
            hand.sock.shutdown(socket.SHUT_WR)
            assert read(client).startswith(b"HTTP/1.1 502")
        assert Client(bare_relay.port).answer()[0] == 503

    def test_a_wrong_key_gets_no_body(self, bare_relay: Tunnel, hand: Hand) -> None:
        hand.listen(20, "PTTH-Features: body")
        with self.begin(bare_relay.port, "Content-Length: 1000000"):
            thief = Hand(bare_relay.port, key="wrong-key-that-is-long-enough")
            thief.send("GET", f"http_request/{hand.request_id()}")
            assert thief.answer()[0] == 401

    def test_a_server_without_the_feature_gets_no_body(self, bare_relay: Tunnel, hand: Hand) -> None:
        hand.listen()
        assert self.send(bare_relay.port, "PUT", "Content-Length: 5", b"hello")[0] == 501
        hand.sock.close()


class StreamApp:
    """A web app on raw sockets: it accepts an Upgrade, and streams what the test puts into `events`."""

    HEAD = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: WebSocket\r\nConnection: upgrade\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"

    def __init__(self) -> None:
        self.left: list[asyncio.StreamWriter] = []  # connections on which the app noticed that the client is gone
        self.heads: list[bytes] = []
        self.writers: list[asyncio.StreamWriter] = []

    async def start(self) -> int:
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        return self.server.sockets[0].getsockname()[1]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            self.heads.append(head)
            self.writers.append(writer)
            await self.answer(head.split()[1].decode(), reader, writer)
        self.left.append(writer)
        writer.close()

    async def answer(self, path: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if path.startswith("/echo"):
            writer.write(self.HEAD)
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        elif path == "/deaf":
            writer.write(self.HEAD)
            await writer.drain()
            await asyncio.wrap_future(self.hold)
            while await reader.read(1 << 16):
                pass
        elif path == "/speak":  # all at once, and then the end
            writer.write(self.HEAD + bytes(range(256)) * 8000)
            await writer.drain()
        elif path == "/reset":
            writer.write(self.HEAD + b"hello")
            await reader.read(1)
            writer.transport.abort()
        elif path == "/last-word":
            writer.write(self.HEAD)
            data = await reader.read()
            writer.write(b"you said %d" % len(data))
        elif path.startswith("/stream"):
            fields = urllib.parse.unquote_to_bytes(path.partition("?")[2])
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n" + fields + b"\r\n")
            await reader.read()
        else:
            status = path[1:4].encode()
            writer.write(
                b"HTTP/1.1 " + status + b" X\r\nUpgrade: h2c\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno"
            )


@pytest.fixture(scope="class")
def streams(background: Background) -> object:
    """A StreamApp behind an HTTP server, and behind relay and server: `ports` has both."""
    app = StreamApp()
    app.port, app.loop = background.run(app.start()), background.loop
    tunnel = Tunnel(background, ptth.App(client_of(app.port), "public").handle)
    with background.serve(ptth.App(client_of(app.port), "public").handle) as direct:
        app.ports = {"direct": direct, "tunnel": tunnel.port}
        yield app
    tunnel.close()
    background.loop.call_soon_threadsafe(app.server.close)


class Visitor:
    """A client of a stream, on a raw socket."""

    ASKS = (
        "Upgrade: websocket", "Connection: keep-alive, Upgrade", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13",
    )  # fmt: skip

    def __init__(self, port: int, path: str, *fields: str, early: bytes = b"", host: str = "n.example.com") -> None:
        lines = [f"GET {path} HTTP/1.1", f"Host: {host}", *(fields or self.ASKS), "", ""]
        self.sock = connect(port, "\r\n".join(lines).encode() + early)
        head, end, self.data = read(self.sock, b"\r\n\r\n").partition(b"\r\n\r\n")
        assert end, head
        self.status = int(head.split()[1])
        self.fields = {name.lower(): value for name, value in re.findall(r"\r\n([^:]+): ([^\r]*)", head.decode())}

    def read(self, count: int = 1 << 40) -> bytes:
        """The next `count` bytes, or all until the end."""
        while len(self.data) < count and (piece := self.sock.recv(1 << 20)):
            self.data += piece
        data, self.data = self.data[:count], self.data[count:]
        return data

    def close(self) -> None:
        self.sock.close()


def event_stream(generate: object) -> ptth.Handler:
    """Return a handler whose responses are streams of events, which an asynchronous generator yields."""

    async def handler(request: ptth.Request) -> ptth.Response:
        return ptth.Response(200, [("Content-Type", "text/event-stream")], Stream(generate))

    return handler


WAYS = pytest.mark.parametrize("way", ["direct", "tunnel"])


class TestUpgrades:
    """A WebSocket to an app, by an HTTP server and through the tunnel."""

    @WAYS
    def test_bytes_pass_in_both_directions(self, way: str, streams: StreamApp) -> None:
        visitor = Visitor(streams.ports[way], "/echo?a", early=b"first")
        assert (visitor.status, visitor.fields["upgrade"].lower()) == (101, "websocket")
        assert (visitor.fields["connection"], visitor.fields["sec-websocket-accept"][:3]) == ("Upgrade", "s3p")
        assert not {"content-length", "transfer-encoding"} & set(visitor.fields)
        assert visitor.read(5) == b"first"
        data = random.Random(1).randbytes(3_000_000)
        threading.Thread(target=visitor.sock.sendall, args=(data,), daemon=True).start()
        assert visitor.read(len(data)) == data
        for i in range(20):
            visitor.sock.sendall(b"ping %d" % i)
            assert visitor.read(6 + (i > 9)) == b"ping %d" % i
        visitor.sock.shutdown(socket.SHUT_WR)
        assert visitor.read() == b""
        head = streams.heads[-1].lower()
        assert b"\r\nconnection: upgrade\r\nupgrade: websocket\r\n" in head and b"keep-alive" not in head
        assert b"\r\nsec-websocket-key: dghl" in head

    @WAYS
    @pytest.mark.parametrize(
        ("path", "ends", "answer"),
        [("/speak", False, bytes(range(256)) * 8000), ("/last-word", True, b"you said 100000"), ("/echo", True, b"x" * 100_000)],
    )  # fmt: skip
    def test_the_end_of_one_side_ends_the_other_when_all_has_passed(
        self, path: str, ends: bool, answer: bytes, way: str, streams: StreamApp
    ) -> None:
        visitor = Visitor(streams.ports[way], path)
        if ends:
            visitor.sock.sendall(b"x" * 100_000)
            visitor.sock.shutdown(socket.SHUT_WR)
        assert visitor.read() == answer
        visitor.close()

    @WAYS
    def test_the_end_of_a_visitor_ends_the_stream_of_an_app_that_ignores_it(
        self, way: str, streams: StreamApp, monkeypatch: Patch
    ) -> None:
        monkeypatch.setattr(ptth, "MAX_LINGER_TIMEOUT", 0.1)
        streams.hold = concurrent.futures.Future()
        visitor = Visitor(streams.ports[way], "/deaf")
        visitor.sock.shutdown(socket.SHUT_WR)
        assert visitor.read() == b""
        streams.hold.set_result(None)
        visitor.close()

    @pytest.mark.parametrize(("path", "answer"), [("/echo", b"x" * 100_000), ("/deaf", b"")])
    def test_under_tls_an_app_learns_the_end_of_its_visitor_by_a_close(
        self, path: str, answer: bytes, streams: StreamApp, background: Background, tmp_path: object, monkeypatch: Patch
    ) -> None:
        """TLS has no half-close. What the app says first still arrives, and one that ignores the close ends, too."""
        for name in ("LINGER_TIMEOUT", "MAX_LINGER_TIMEOUT"):
            monkeypatch.setattr(ptth, name, 0.5)
        streams.hold = concurrent.futures.Future()
        context = make_certificate(tmp_path)
        server = background.run(asyncio.start_server(streams.serve, "127.0.0.1", 0, ssl=context))
        app = ptth.App(
            ptth.HTTPClient(ptth.parse_app(f"https+insecure://127.0.0.1:{server.sockets[0].getsockname()[1]}"))
        )
        with background.serve(app.handle) as port:
            visitor = Visitor(port, path)
            visitor.sock.sendall(answer)
            visitor.sock.shutdown(socket.SHUT_WR)
            assert visitor.read() == answer
            visitor.close()
            streams.hold.set_result(None)
            eventually(lambda: streams.writers[-1] in streams.left)
        background.loop.call_soon_threadsafe(server.close)

    def test_below_the_prefix_it_works_the_same(self, streams: StreamApp) -> None:
        visitor = Visitor(streams.ports["tunnel"], "/frontend/servers/n/echo?a", host="relay.example.com")
        visitor.sock.sendall(b"hello")
        assert (visitor.status, visitor.read(5)) == (101, b"hello")
        assert streams.heads[-1].startswith(b"GET /echo?a HTTP/1.1\r\n")
        visitor.close()

    @WAYS
    def test_an_app_that_does_not_read_stops_its_visitor(self, way: str, streams: StreamApp) -> None:
        streams.hold = concurrent.futures.Future()
        visitor = Visitor(streams.ports[way], "/deaf")
        assert fill(visitor.sock, bytes(1 << 20), 1 << 27) < 1 << 26  # the kernels' buffers on the way, and no more
        streams.hold.set_result(None)
        visitor.close()

    @WAYS
    @pytest.mark.parametrize("leave", [socket.socket.close, reset])
    def test_the_app_notices_that_its_visitor_has_left(self, leave: object, way: str, streams: StreamApp) -> None:
        visitor = Visitor(streams.ports[way], "/echo")
        visitor.sock.sendall(b"hello")
        assert visitor.read(5) == b"hello"
        writer = streams.writers[-1]
        leave(visitor.sock)
        eventually(lambda: writer in streams.left)

    @WAYS
    def test_a_reset_by_the_app_ends_the_visitor(self, way: str, streams: StreamApp) -> None:
        visitor = Visitor(streams.ports[way], "/reset")
        assert visitor.read(5) == b"hello"
        visitor.sock.sendall(b"x")
        with contextlib.suppress(ConnectionResetError):
            assert visitor.read() == b""

    @WAYS
    @pytest.mark.parametrize("status", [200, 403, 426])
    def test_a_refused_upgrade_passes_as_it_is_and_the_connection_is_kept(
        self, status: int, way: str, streams: StreamApp
    ) -> None:
        visitor = Visitor(streams.ports[way], f"/{status}")
        assert (visitor.status, visitor.read(2)) == (status, b"no")
        assert visitor.fields.get("upgrade") == ("h2c" if status == 426 else None)
        visitor.sock.sendall(get("/200", host="n.example.com"))
        assert one(visitor.read())[0] == 200

    @WAYS
    def test_a_change_to_another_protocol_than_the_one_that_was_asked_for_is_502(
        self, way: str, streams: StreamApp
    ) -> None:
        assert Visitor(streams.ports[way], "/101").status == 502

    NO_UPGRADES = [
        ("Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: x"), ("Upgrade: websocket",), ("Upgrade: websocket", "Connection: keep-alive"),
        ("Upgrade: websocket", "Connection: Upgrade", "Content-Length: 1"), ("Upgrade: websocket2, TLS/1.0", "Connection: Upgrade"),
    ]  # fmt: skip

    @WAYS
    @pytest.mark.parametrize("fields", NO_UPGRADES)
    def test_nothing_else_is_an_upgrade(self, fields: tuple[str, ...], way: str, streams: StreamApp) -> None:
        visitor = Visitor(streams.ports[way], "/200", *fields, early=b"x" * ("Content-Length: 1" in fields))
        assert (visitor.status, visitor.read(2)) == (200, b"no")
        assert not re.search(rb"(?i)\r\n(upgrade|http2-settings):", streams.heads[-1])

    def test_a_handler_that_knows_no_upgrade_ignores_it(self) -> None:
        asks = "\r\n".join(Visitor.ASKS).encode()
        requests = [b"GET /%d HTTP/1.1\r\nHost: a\r\n%b\r\n\r\n" % (i, asks) for i in range(3)]
        assert [body for _, _, body in split(say(echo, *requests))] == [b"GET /%d\n" % i for i in range(3)]

    def test_silence_does_not_end_a_stream(self, streams: StreamApp, monkeypatch: Patch) -> None:
        monkeypatch.setattr(ptth, "STALL_TIMEOUT", 0.05)
        visitor = Visitor(streams.ports["direct"], "/echo")
        visitor.sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            visitor.sock.recv(1)
        visitor.sock.sendall(b"still here")
        assert visitor.read(10) == b"still here"
        visitor.close()


class Parts:
    """A client, and the server of its request, which the test plays: it sends a response in parts."""

    EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    SWITCH = b"HTTP/1.1 101 X\r\nUpgrade: websocket\r\n\r\n"

    def __init__(self, relay: Tunnel, *fields: str, features: str = "body, upgrade, parts") -> None:
        self.port = relay.port
        self.hand = Hand(relay.port)
        self.hand.listen(20, f"PTTH-Features: {features}")
        lines = ["GET /x HTTP/1.1", "Host: n.example.com", *(fields or ["Connection: close"]), "", ""]
        self.client = connect(relay.port, "\r\n".join(lines).encode())
        self.p3 = self.hand.answer()[2]
        self.identity = re.search(rb"PTTH-Request-Id: (\w+)", self.p3)[1].decode()
        self.head, self.data = b"", b""

    def send(self, data: bytes, offset: int, *, more: bool = True, first: bool = False) -> None:
        fields = [f"PTTH-Offset: {offset}", f"Content-Type: application/{'http' if first else 'octet-stream'}"]
        fields += ["PTTH-More: 1"] if more else []
        self.hand.send("POST", f"http_response/{self.identity}", data, *fields)

    def post(self, data: bytes, offset: int, **options: bool) -> int:
        """Send a part; return the status of its response."""
        self.send(data, offset, **options)
        status = self.hand.answer()[0]
        if status >= 400:
            self.hand.close()
            self.hand = Hand(self.port)
        return status

    def poll(self, offset: int, wait: int = 20) -> tuple[int, bytes]:
        """Poll for the bytes that the client sent."""
        self.hand.send("GET", f"http_request/{self.identity}", b"", f"PTTH-Offset: {offset}", f"Prefer: wait={wait}")
        status, _, body = self.hand.answer()
        return status, body if status == 200 else b""

    def read(self, count: int = 1 << 40) -> bytes:
        """Return what the client gets: `count` bytes of the body, or all until the end."""
        while not self.head or len(self.data) < count:
            piece = b""
            with contextlib.suppress(ConnectionResetError):
                piece = self.client.recv(1 << 16)
            if not piece:
                break
            self.data += piece
            if not self.head and b"\r\n\r\n" in self.data:
                self.head, _, self.data = self.data.partition(b"\r\n\r\n")
                self.head += b"\r\n"
        data, self.data = self.data[:count], self.data[count:]
        return data

    def close(self) -> None:
        self.client.close()
        self.hand.close()


@pytest.fixture
def parts(bare_relay: Tunnel) -> object:
    """Make a `Parts` with these fields of the client's request."""
    made = []

    def make(*fields: str, **options: str) -> Parts:
        made.append(Parts(bare_relay, *fields, **options))
        return made[-1]

    yield make
    for one_of in made:
        one_of.close()


@pytest.fixture
def websocket(parts: object) -> Parts:
    """A stream after its 101."""
    stream = parts("Upgrade: websocket", "Connection: Upgrade")
    assert stream.post(Parts.SWITCH, 0, first=True) == 200
    return stream


class TestParts:
    """Responses in parts and polls for what a client sends, at the relay."""

    def test_a_poll_for_the_bytes_of_a_client_that_resets_before_its_response_is_410(self, parts: object) -> None:
        stream = parts(*Visitor.ASKS)
        stream.hand.send("GET", f"http_request/{stream.identity}", b"", "PTTH-Offset: 0", "Prefer: wait=20")
        time.sleep(0.1)
        reset(stream.client)
        assert stream.hand.answer()[0] == 410

    @in_loop
    async def test_a_body_that_is_received_is_cut_into_parts_up_to_its_end(self) -> None:
        """Its `length` is what is still to come, and becomes smaller while it is read."""
        connection = ptth.Connection(reader_of(b"0123456789" * 100), FakeWriter())
        parts = ptth.PartReader(ptth.IncomingBody(connection, 1000), asyncio.Event())
        pieces = []
        while not parts.ended:
            pieces.append((await parts.next(300)).data)
        assert b"".join(pieces) == b"0123456789" * 100 and len(pieces) == 4

    def test_each_part_is_with_the_client_before_the_next(self, parts: object) -> None:
        stream = parts()
        assert stream.post(Parts.EVENTS + b"one", 0, first=True) == 200
        assert stream.read(8) == b"3\r\none\r\n"
        assert b"\r\nX-Accel-Buffering: no\r\n" in stream.head
        assert stream.post(b"two", 3) == 200
        assert stream.read(8) == b"3\r\ntwo\r\n"
        stream.send(b"", 6, more=False)
        assert stream.read(5) == b"0\r\n\r\n"
        assert stream.hand.answer()[0] == 200
        assert stream.post(b"more", 6) == 410

    REPEATS = [  # [(offset, data, status)], what the client gets
        ([(3, b"two", 200), (3, b"two", 200)], b"two"), ([(0, b"onetwo", 200), (5, b"othree", 200)], b"twothree"), ([(3, b"", 200), (0, b"", 200), (3, b"x", 200)], b"x"),
        ([(3, b"two", 200), (7, b"!", 410)], b"two"), ([(4, b"wo", 410)], b""), ([(4, b"", 410)], b""), ([(3, b"two", 200), ("x", b"!", 400), (6, b"!", 200)], b"two!"),
        ([(10**20, b"", 400), (3, b"!", 200)], b"!"),
    ]  # fmt: skip

    @pytest.mark.parametrize(("sent", "got"), REPEATS)
    def test_what_is_known_is_passed_over_and_a_gap_is_the_end(self, sent: object, got: bytes, parts: object) -> None:
        stream = parts("Upgrade: websocket", "Connection: Upgrade")
        assert stream.post(Parts.SWITCH + b"one", 0, first=True) == 200
        assert stream.read(3) == b"one"
        for offset, data, status in sent:
            assert stream.post(data, offset) == status
        assert stream.read(len(got)) == got
        if sent[-1][2] == 410:
            assert stream.read() == b""
            assert stream.post(b"x", 3) == 410
        else:
            assert stream.post(Parts.SWITCH + b"one", 0, first=True) == 200  # the first one, once more
            stream.send(b"", 3 + len(got), more=False)
            assert stream.read() == b""

    @pytest.mark.parametrize("offset", ["3", "-1", "1e3", "0, 0", "9" * 30, ""])
    def test_a_response_whose_beginning_is_missing_is_refused(self, offset: str, parts: object) -> None:
        stream = parts()
        assert stream.post(Parts.EVENTS + b"one", offset, first=True) == 400
        assert b"missing" in stream.read() or offset != "3"
        assert stream.head.startswith(b"HTTP/1.1 502 ")

    def test_a_part_that_breaks_off_is_repeated_and_each_byte_arrives_once(self, websocket: Parts) -> None:
        for reset_ in (False, True):
            broken = Hand(websocket.port)
            begin = f"POST /7ZSFUKGV/http_response/{websocket.identity} HTTP/1.1\r\nHost: r\r\nX-ApiKey: {KEY}\r\nPTTH-More: 1\r\n"
            broken.sock.sendall(f"{begin}PTTH-Offset: {10 * reset_}\r\nContent-Length: 10\r\n\r\n12345".encode())
            assert websocket.read(5) == b"12345"
            if not reset_:
                broken.close()  # the other one stays open, without a further byte
            assert websocket.post(b"1234567890", 10 * reset_) == 200
            assert websocket.read(5) == b"67890"
            broken.close()

    def test_a_silent_stream_lives_by_its_empty_parts(self, monkeypatch: Patch, websocket: Parts) -> None:
        monkeypatch.setattr(ptth, "PART_TIMEOUT", 0.5)
        begin = time.monotonic()
        while time.monotonic() < begin + 0.7:
            assert websocket.post(b"", 0) == 200
        assert websocket.read() == b""
        assert websocket.post(b"", 0) == 410

    @pytest.mark.parametrize("data", [b"", b"event"])
    def test_a_client_that_has_left_is_410(self, data: bytes, parts: object) -> None:
        stream = parts()
        assert stream.post(Parts.EVENTS + b"one", 0, first=True) == 200
        stream.read(8)
        stream.client.close()
        offsets = itertools.count(3, len(data))
        eventually(lambda: stream.post(data, next(offsets)) == 410)

    @pytest.mark.parametrize("sent", [8, 9, 10])
    def test_a_length_that_was_told_is_kept(self, sent: int, parts: object) -> None:
        stream = parts()
        assert stream.post(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n1234", 0, first=True) == 200
        stream.send(b"5678901234"[: sent - 4], 4, more=False)
        assert (stream.read() == b"123456789") == (sent == 9)
        assert b"\r\nContent-Length: 9\r\n" in stream.head
        assert stream.hand.answer()[0] == (200 if sent == 9 else 410)

    @pytest.mark.parametrize("is_chunked", [True, False])
    @pytest.mark.parametrize("is_closed", [True, False])
    def test_a_response_that_broke_off_goes_on_in_parts(self, is_closed: bool, is_chunked: bool, parts: object) -> None:
        """Also if the connection of its P5 is dead, and nothing says so."""
        data = random.Random(5).randbytes(600_000)
        head = b"HTTP/1.1 200 OK\r\nContent-Length: 600000\r\n\r\n"
        stream = parts()
        broken = Hand(stream.port)
        lines = [f"POST /7ZSFUKGV/http_response/{stream.identity} HTTP/1.1", "Host: r", f"X-ApiKey: {KEY}"]
        lines.append("Transfer-Encoding: chunked" if is_chunked else f"Content-Length: {len(head + data)}")
        sent = head + data[:400_000]
        begin = "\r\n".join([*lines, "Content-Type: application/http", "", ""]).encode()
        broken.sock.sendall(begin + (ptth.format_chunk(sent) if is_chunked else sent))
        got = stream.read(300_000)
        if is_closed:
            broken.close()
        for offset in range(0, 600_000, 150_000):
            first = head if not offset else b""
            more = offset < 450_000
            stream.send(first + data[offset : offset + 150_000], offset, more=more, first=not offset)
            got += stream.read(offset + 150_000 - len(got))
            assert stream.hand.answer()[0] == 200
        assert got == data
        broken.close()

    def test_the_end_of_the_p5_before_does_not_end_a_part(self, parts: object, bare_relay: Tunnel) -> None:
        stream = parts()
        stream.hand.begin(stream.identity, b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nabc")
        assert stream.read(3) == b"abc"
        later = Hand(stream.port)
        fields = ["PTTH-Offset: 3", "Content-Type: application/octet-stream", "Transfer-Encoding: chunked"]
        later.send("POST", f"http_response/{stream.identity}", ptth.format_chunk(b"de"), *fields)
        assert stream.read(2) == b"de"
        eventually(lambda: len(bare_relay.http.connections) == 2)  # the client's, and that of the part
        later.sock.sendall(ptth.format_chunk(b"f") + b"0\r\n\r\n")
        assert (later.answer()[0], stream.read()) == (200, b"f")
        later.close()

    @pytest.mark.parametrize(("features", "patience"), [("body", 0), ("parts", 0.2)])
    def test_a_response_that_does_not_go_on_breaks_off(
        self, features: str, patience: float, parts: object, monkeypatch: Patch
    ) -> None:
        monkeypatch.setattr(ptth, "FETCH_GRACE", 0.2 if patience else 20)
        stream = parts(features=features)
        stream.hand.begin(stream.identity, Parts.EVENTS + b"x")
        assert stream.read(6) == b"1\r\nx\r\n"
        stream.hand.close()
        begin = time.monotonic()
        assert stream.read() == b""
        assert patience <= time.monotonic() - begin < 10

    def test_streams_have_places_of_their_own(self, parts: object, monkeypatch: Patch) -> None:
        monkeypatch.setattr(ptth, "MAX_STREAMS", 2)
        monkeypatch.setattr(ptth, "MAX_SENDING", 1)
        streams = [parts(), parts(), parts()]
        assert [stream.post(Parts.EVENTS, 0, first=True) for stream in streams] == [200, 200, 410]
        assert streams[2].read() and streams[2].head.startswith(b"HTTP/1.1 503 ")
        streams[0].send(b"", 0, more=False)
        assert streams[0].hand.answer()[0] == 200
        assert parts().post(Parts.EVENTS, 0, first=True) == 200

    def test_a_wrong_key_adds_no_part_and_gets_nothing(self, websocket: Parts) -> None:
        websocket.hand.key = "a-wrong-key-of-some-length"
        assert websocket.post(b"forged", 0) == 401
        websocket.hand.key = "a-wrong-key-of-some-length"
        assert websocket.poll(0)[0] == 401

    # what a client sends after a 101

    def test_polls_bring_what_the_client_sends(self, parts: object) -> None:
        stream = parts("Upgrade: websocket", "Connection: Upgrade")
        assert b"\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n" in stream.p3
        assert stream.poll(0, 0) == (204, b"")  # before the 101
        stream.client.sendall(b"early")
        assert stream.post(Parts.SWITCH, 0, first=True) == 200
        assert stream.poll(0) == (200, b"early")
        assert stream.poll(5, 0) == (204, b"")
        stream.client.sendall(b"hello")
        assert stream.poll(5) == (200, b"hello")
        stream.client.shutdown(socket.SHUT_WR)
        assert stream.poll(10) == (410, b"")
        assert stream.post(b"last word", 0, more=False) == 200
        assert stream.read() == b"last word"

    @pytest.mark.parametrize("offset", [0, 4, 6, 999])
    def test_lost_bytes_close_the_stream(self, offset: int, websocket: Parts) -> None:
        websocket.client.sendall(b"hello")
        assert websocket.poll(0) == (200, b"hello")
        assert websocket.poll(offset)[0] == 410
        assert websocket.read() == b""
        assert websocket.post(b"x", 0) == 410

    def test_the_latest_poll_gets_what_comes(self, websocket: Parts) -> None:
        old, websocket.hand = websocket.hand, Hand(websocket.port)
        old.send("GET", f"http_request/{websocket.identity}", b"", "PTTH-Offset: 0", "Prefer: wait=20")
        old.sock.settimeout(0.1)
        with pytest.raises(TimeoutError):
            old.sock.recv(1)
        later = threading.Timer(0.1, websocket.client.sendall, (b"hello",))
        later.start()
        assert websocket.poll(0) == (200, b"hello")
        old.sock.settimeout(20)
        assert old.answer()[0] == 204

    NO_SWITCH = [
        b"HTTP/1.1 101 X\r\n\r\n", b"HTTP/1.1 101 X\r\nUpgrade: h2c\r\n\r\n", b"HTTP/1.1 100 X\r\nUpgrade: websocket\r\n\r\n",
    ]  # fmt: skip

    @pytest.mark.parametrize("inner", NO_SWITCH)
    def test_only_a_websocket_that_was_asked_for_is_a_switch(self, inner: bytes, parts: object) -> None:
        for fields, reply in ((("Upgrade: websocket", "Connection: Upgrade"), inner), ((), Parts.SWITCH)):
            stream = parts(*fields)
            assert stream.post(reply, 0, first=True) == 400
            stream.read(1)
            assert stream.head.startswith(b"HTTP/1.1 502 ")

    def test_a_server_without_the_feature_gets_no_upgrade(self, parts: object) -> None:
        stream = parts("Upgrade: websocket", "Connection: Upgrade", features="body")
        assert not re.search(rb"(?i)upgrade", stream.p3)


class Cutter:
    """A proxy that cuts each connection after a number of bytes that `rng` draws."""

    def __init__(self, target: int, rng: random.Random) -> None:
        self.target, self.rng = target, rng
        self.most = 0
        self.lefts: list[list[float]] = []
        self.cut = 0

    def draw(self) -> float:
        return self.rng.randrange(1, self.most) if self.most else math.inf

    def arm(self, most: int) -> None:
        """Cut each connection after fewer than `most` bytes; with 0, none."""
        self.most = most
        for left in self.lefts:
            left[0] = self.draw()

    async def start(self) -> int:
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        return self.server.sockets[0].getsockname()[1]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left = [self.draw()]
        self.lefts.append(left)
        with contextlib.suppress(OSError):
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
            ways = [self.pass_on(reader, far_writer, left), self.pass_on(far_reader, writer, left)]
            await asyncio.wait([asyncio.create_task(way) for way in ways], return_when=asyncio.FIRST_COMPLETED)
            far_writer.transport.abort()
        self.cut += left[0] <= 0
        self.lefts = [one_of for one_of in self.lefts if one_of is not left]
        writer.transport.abort()

    @staticmethod
    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, left: list[float]) -> None:
        with contextlib.suppress(OSError):
            while left[0] > 0 and (data := await reader.read(1 << 16)):
                data = data[: min(len(data), left[0])]
                left[0] -= len(data)
                writer.write(data)
                await writer.drain()


@contextlib.contextmanager
def tunnel_behind(background: Background, port: int, handler: ptth.Handler) -> object:
    """A tunnel's server that reaches its relay by another port."""
    server = ptth.TunnelServer(client_of(port), "n", KEY, handler)
    with background.inside(attending(server)):
        background.run(server.connected.wait())
        yield server


class TestCutConnections:
    """A proxy cuts connections: no byte of a stream is lost or repeated, or the stream ends."""

    @pytest.fixture
    def quick(self, monkeypatch: Patch) -> None:
        monkeypatch.setattr(ptth, "BACKOFF_MIN", 0.001)
        monkeypatch.setattr(ptth, "BACKOFF_MAX", 0.01)
        monkeypatch.setattr(ptth, "PART_TIMEOUT", 2)

    @pytest.mark.parametrize("seed", range(4))
    def test_a_websocket(
        self, seed: int, quick: None, background: Background, bare_relay: Tunnel, streams: StreamApp
    ) -> None:
        rng = random.Random(seed)
        cutter = Cutter(bare_relay.port, rng)
        port = background.run(cutter.start())
        data = rng.randbytes(400_000)
        with tunnel_behind(background, port, ptth.App(client_of(streams.port), "public").handle):
            whole = 0
            for _ in range(8):
                visitor = Visitor(bare_relay.port, "/echo")
                background.loop.call_soon_threadsafe(cutter.arm, 150_000)
                threading.Thread(target=self.send, args=(visitor.sock, data), daemon=True).start()
                got = b""
                with contextlib.suppress(ConnectionResetError):
                    while len(got) < len(data) and (piece := visitor.sock.recv(1 << 16)):
                        got += piece
                assert data.startswith(got)
                whole += got == data
                visitor.close()
                background.loop.call_soon_threadsafe(cutter.arm, 0)
            assert cutter.cut
        background.loop.call_soon_threadsafe(cutter.server.close)

    @staticmethod
    def send(sock: socket.socket, data: bytes) -> None:
        with contextlib.suppress(OSError):
            sock.sendall(data)

    @pytest.mark.parametrize("seed", range(3))
    def test_events_survive_all_cuts(self, seed: int, quick: None, background: Background, bare_relay: Tunnel) -> None:
        rng = random.Random(seed)
        cutter = Cutter(bare_relay.port, rng)
        port = background.run(cutter.start())
        events = [rng.randbytes(rng.randrange(1, 40_000)) for _ in range(60)]

        async def generate() -> object:
            cutter.arm(100_000)
            for event in events:
                yield event
            cutter.arm(0)

        with tunnel_behind(background, port, event_stream(generate)):
            assert bare_relay.get("/", host="n.example.com")[2] == b"".join(events)
            assert cutter.cut
        background.loop.call_soon_threadsafe(cutter.server.close)


class TestEventStreams:
    """Responses without an end, through the tunnel."""

    KINDS = [("text/event-stream", True), ("Text/Event-Stream; charset=utf-8", True), ("application/x-ndjson", True), ("text/plain\r\nX-Accel-Buffering: no", True), ("text/plain", False)]  # fmt: skip

    @pytest.mark.parametrize(("kind", "in_parts"), KINDS)
    def test_each_event_is_there_at_once(self, kind: str, in_parts: bool, streams: StreamApp) -> None:
        query = urllib.parse.quote(f"Content-Type: {kind}\r\n")
        visitor = Visitor(streams.ports["tunnel"], f"/stream?{query}", "Accept: */*")
        assert visitor.fields.get("x-accel-buffering") == ("no" if in_parts else None)
        writer, took = streams.writers[-1], []
        for i in range(20):
            begin = time.monotonic()
            streams.loop.call_soon_threadsafe(writer.write, b"5\r\nev%03d\r\n" % i)
            assert visitor.read(10) == b"5\r\nev%03d\r\n" % i
            took.append(time.monotonic() - begin)
        assert statistics.median(took) < 0.05
        streams.loop.call_soon_threadsafe(writer.write, b"0\r\n\r\n")
        assert visitor.read(5) == b"0\r\n\r\n"
        visitor.close()

    @pytest.mark.parametrize("talks", [False, True])
    def test_the_app_notices_that_its_visitor_has_left(
        self, talks: bool, streams: StreamApp, monkeypatch: Patch
    ) -> None:
        monkeypatch.setattr(ptth, "PART_INTERVAL", 0.03)
        visitor = Visitor(streams.ports["tunnel"], "/stream?Content-Type:%20text/event-stream%0D%0A", "Accept: */*")
        writer = streams.writers[-1]
        time.sleep(0.1)
        assert writer not in streams.left  # silence alone is no end
        visitor.close()

        def has_left() -> bool:
            if talks:
                streams.loop.call_soon_threadsafe(writer.write, b"2\r\n: \r\n")
            return writer in streams.left

        eventually(has_left)

    def test_a_visitor_that_does_not_read_stops_the_app(self, open_tunnel: object) -> None:
        made = []

        async def flood() -> object:
            while len(made) < 10_000:
                made.append(1)
                yield bytes(1 << 16)

        visitor = Visitor(open_tunnel(event_stream(flood)).port, "/", "Connection: close")
        before = -1
        while len(made) != before:
            before = len(made)
            time.sleep(0.1)
        assert before < 1000  # the kernels' buffers on the way, and no more
        visitor.read(before << 16)
        eventually(lambda: len(made) > before)
        visitor.close()

    @pytest.mark.parametrize("kind", ["text/event-stream", "101"])
    def test_a_stop_waits_for_no_stream(self, kind: str, background: Background, open_tunnel: object) -> None:
        async def silence() -> object:
            yield b"begun"
            await asyncio.sleep(60)

        async def switch(request: ptth.Request) -> ptth.Response:
            return ptth.Response(101, [("Upgrade", "websocket")], Stream(silence))

        tunnel = open_tunnel(switch if kind == "101" else event_stream(silence))
        asks = Visitor.ASKS if kind == "101" else ["Connection: close"]
        visitors = [Visitor(tunnel.port, "/", *asks) for _ in range(2)]
        begun, ended = (b"begun", b"") if kind == "101" else (b"5\r\nbegun\r\n", b"0\r\n\r\n")
        assert [visitor.read(len(begun)) for visitor in visitors] == [begun] * 2
        begin = time.monotonic()
        background.run(tunnel.server.stop(20))
        assert time.monotonic() - begin < 10
        assert [visitor.read() for visitor in visitors] == [ended] * 2

    def test_a_stop_ends_also_a_stream_that_begins_after_it(self, background: Background, open_tunnel: object) -> None:
        begun = threading.Event()

        async def silence() -> object:
            await asyncio.sleep(60)
            yield b""

        async def late(request: ptth.Request) -> ptth.Response:
            begun.set()
            await tunnel.server.workers.stopping.wait()
            return await event_stream(silence)(request)

        tunnel = open_tunnel(late)
        client = Client(tunnel.port, "/")
        assert begun.wait(10)
        background.run(tunnel.server.stop(20), 10)
        status, _, body = client.answer()
        assert (status, body) == (200, b"")

    def test_streams_keep_no_handler(self, open_tunnel: object, monkeypatch: Patch) -> None:
        monkeypatch.setattr(ptth, "MAX_HANDLERS", 2)

        async def silence() -> object:
            await asyncio.sleep(60)
            yield b""

        async def handler(request: ptth.Request) -> ptth.Response:
            return await (echo if request.target == "/other" else event_stream(silence))(request)

        tunnel = open_tunnel(handler)
        visitors = [Visitor(tunnel.port, "/", "Accept: */*") for _ in range(5)]
        assert tunnel.get("/other", host="n.example.com")[2] == b"GET /other\n"
        for visitor in visitors:
            visitor.close()


class LimitedFront:
    """A proxy in front of the relay that takes `limit` bytes in a request: known by its length, or when they are too many."""

    class Counted(ptth.Body):
        def __init__(self, body: ptth.Body, limit: int) -> None:
            self.body, self.limit, self.length = body, limit, body.length

        async def __aiter__(self) -> object:
            passed = 0
            async for piece in self.body:
                passed += len(piece)
                if passed > self.limit:
                    raise ptth.ProtocolError(413, "too large", close=True)
                yield piece

    def __init__(self, relay: int, limit: int, late: bool) -> None:
        self.client = client_of(relay)
        self.limit, self.late = limit, late
        self.sizes: list[int] = []

    async def handle(self, request: ptth.Request) -> ptth.Response:
        if not self.late and (request.body.length or 0) > self.limit:
            raise ptth.ProtocolError(413, "too large", close=True)
        framing = ("connection", "content-length", "transfer-encoding", "expect")
        headers = ptth.Headers([pair for pair in request.headers.pairs if pair[0].lower() not in framing])
        body = self.Counted(request.body, self.limit) if request.method == "POST" else ptth.EMPTY
        self.sizes.append(request.body.length or 0)
        response = await self.client.handle(ptth.Request(request.method, request.target, headers, body=body))
        response.headers = [pair for pair in response.headers if pair[0].lower() not in framing]
        return response


class TestLimits:
    """A proxy in front of the relay that limits the bodies of requests: responses go in parts."""

    DATA = random.Random(7).randbytes(3_000_000)

    ROWS = [  # limit in KiB, whether it is noticed late, kind of body
        (1024, False, "bytes"), (1024, True, "bytes"), (1024, False, "file"), (1024, True, "file"), (1024, False, "ranges"), (1024, False, "once"),
        (300, False, "bytes"), (70, False, "file"), (70, True, "ranges"),
    ]  # fmt: skip

    @pytest.mark.parametrize(("limit", "late", "kind"), ROWS)
    def test_a_large_response_goes_in_parts_and_its_client_sees_nothing(
        self, limit: int, late: bool, kind: str, background: Background, bare_relay: Tunnel, tmp_path: object
    ) -> None:
        (tmp_path / "f").write_bytes(self.DATA)
        files = ptth.server_handler(ptth.Site(str(tmp_path)), "n")

        async def handler(request: ptth.Request) -> ptth.Response:
            if kind in ("file", "ranges"):
                return await files(request)
            if kind == "bytes":
                return ptth.Response(200, [], ptth.BytesBody(self.DATA))
            left = iter(range(0, len(self.DATA), 100_000))  # so that the body can be read only once

            async def pieces() -> object:
                for i in left:
                    yield self.DATA[i : i + 100_000]

            once = Stream(pieces, len(self.DATA))
            once.complete = False
            return ptth.Response(200, [], once)

        front = LimitedFront(bare_relay.port, limit * 1024, late)
        with (
            background.serve(front.handle, takes_bodies=True) as port,
            tunnel_behind(background, port, handler),
        ):
            fields = ["Range: bytes=0-1499999,1500001-2999999"] if kind == "ranges" else []
            for _ in range(2):
                status, answered, body = bare_relay.get("/files/f", *fields, host="n.example.com")
                assert int(answered["content-length"]) == len(body)
                if kind == "ranges":
                    assert status == 206 and self.DATA[:1_500_000] in body and self.DATA[1_500_001:] in body
                else:
                    assert (status, body) == (200, self.DATA)
            if kind in ("bytes", "file"):
                assert max(size for size in front.sizes if size <= limit * 1024) > limit * 1024 // 4
        background.loop.call_soon_threadsafe(front.client.close)

    def test_a_batch_that_is_too_large_goes_in_smaller_ones(self, background: Background, bare_relay: Tunnel) -> None:
        async def handler(request: ptth.Request) -> ptth.Response:
            await asyncio.sleep(0.05)
            return ptth.Response(200, [], ptth.BytesBody(self.DATA[:60_000]))

        front = LimitedFront(bare_relay.port, 70 * 1024, False)
        with (
            background.serve(front.handle, takes_bodies=True) as port,
            tunnel_behind(background, port, handler),
        ):
            clients = [Client(bare_relay.port) for _ in range(12)]
            assert [client.answer()[2] for client in clients] == [self.DATA[:60_000]] * 12
        background.loop.call_soon_threadsafe(front.client.close)


class TestHosts:
    """Servers with hosts of their own."""

    HOSTS = [  # Host field, target, the server that gets it or the status of the relay's own answer
        ("a.relay.test", "/x", "a"), ("A.Relay.Test.:443", "/x", "a"), ("A.Relay.Test:443.", "/x", "a"), ("a.relay.test", "/7ZSFUKGV/http_listen/a", "a"),
        ("a.relay.test", "/frontend/servers/b/", "a"), ("app.test", "/scraper/v1/test", "b"), ("b.relay.test", "/x", "b"),
        ("a.relay.test", "http://app.test/x", "b"), ("app.test", "/../x", "b"), ("no.relay.test", "/x", 404), ("x.a.relay.test", "/x", 404),
        ("under_score.relay.test", "/x", 404), ("relay.test", "/frontend/relay_up_check", 200), ("else.test", "/frontend/relay_up_check", 200),
        ("a.relay.test.evil.test", "/x", 404), ("relay.test", "/frontend/servers/a/x", "a"), ("[::1]:4000", "/frontend/relay_up_check", 200),
    ]  # fmt: skip

    @pytest.mark.parametrize(("host", "target", "expected"), HOSTS)
    @in_loop
    async def test_the_host_alone_decides(self, host: str, target: str, expected: object) -> None:
        hosts = {"a": "", "b": "app.test", "under_score": ""}
        entries = [ptth.ServerEntry(name, ptth.tripcode(KEY), host=own) for name, own in hosts.items()]
        relay = ptth.Relay(ptth.RelayConfig(servers=entries, domain="relay.test"))
        relay._sweeper.cancel()

        async def forward(request: ptth.Request, route: object) -> ptth.Response:
            return ptth.text_response(299, f"{route.server.name} {route.target}")

        relay._forward = forward
        request = ptth.parse_request_head(f"GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        response = await ptth.call_handler(relay.handle, request)
        if response.status != 299:
            assert response.status == expected
            return
        name, _, got = response.body.data.decode().partition(" ")
        below = target.startswith("/frontend/") and host == "relay.test"
        assert name == expected and got == ("/x" if below else target.removeprefix("http://app.test"))

    def test_a_server_with_a_host_has_an_origin_of_its_own(self, open_tunnel: object) -> None:
        fields = [
            ("Set-Cookie", "a=b; Domain=example.com; Path=/"), ("Set-Cookie", "c=d;domain=.x;Secure"), ("Strict-Transport-Security", "max-age=1"),
            ("Service-Worker-Allowed", "/"), ("Content-Security-Policy", "own"), ("Clear-Site-Data", "*"), ("X-Accel-Redirect", "/x"),
            ("Alt-Svc", "x"), ("NEL", "x"), ("Content-Type", "text/html"),
        ]  # fmt: skip
        seen = {}

        async def page(request: ptth.Request) -> ptth.Response:
            seen.update(request.headers)
            return ptth.Response(200, fields, ptth.BytesBody(b"page"))

        tunnel = open_tunnel(page)
        answer = tunnel.fetch(get("/", "Cookie: a=b", "X-ApiKey: mine", host="n.example.com"))
        assert re.findall(rb"\r\nSet-Cookie: ([^\r]*)", answer) == [b"a=b; Path=/", b"c=d;Secure"]
        assert (seen["cookie"], seen["x-apikey"], seen["x-forwarded-host"]) == ("a=b", "mine", "n.example.com")
        status, got, body = one(answer)
        assert (status, body) == (200, b"page")
        assert (got["content-security-policy"], got["service-worker-allowed"]) == ("own", "/")
        assert "strict-transport-security" in got
        assert not {"clear-site-data", "x-accel-redirect", "alt-svc", "nel"} & set(got)
        below = tunnel.get("/frontend/servers/n/", "Cookie: a=b")[1]
        assert "set-cookie" not in below and "sandbox" in below["content-security-policy"]


class TestLastRelease:
    """Release 1.0.0 as the peer, by recorded bytes: files are served as before, request bodies get 501."""

    P1 = (
        b"GET /7ZSFUKGV/http_listen/n HTTP/1.1\r\nHost: 127.0.0.1:4000\r\nX-ApiKey: correct-horse-battery-staple\r\n"
        b"Accept: application/http\r\nPrefer: wait=25\r\nPTTH-Instance: 0123456789abcdef\r\n\r\n"
    )
    P3_BODY = (
        b"GET /files/a HTTP/1.1\r\nPTTH-Request-Id: 0123456789abcdef0123456789abcdef\r\nHost: h\r\nAccept: */*\r\n"
        b"X-Forwarded-For: 127.0.0.1\r\nX-Forwarded-Proto: http\r\nX-Forwarded-Host: h\r\nVia: 1.1 ptth\r\n"
    )
    P5 = (
        b"POST /7ZSFUKGV/http_response/%b HTTP/1.1\r\nHost: 127.0.0.1:4000\r\nX-ApiKey: correct-horse-battery-staple\r\n"
        b"Content-Type: application/http; msgtype=response\r\nContent-Length: 69\r\n\r\n"
        b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n\r\nhello"
    )

    def test_its_server_is_served_by_the_relay(self, bare_relay: Tunnel) -> None:
        with connect(bare_relay.port, self.P1) as server:
            client = connect(
                bare_relay.port, b"GET /frontend/servers/n/files/a HTTP/1.1\r\nHost: h\r\nAccept: */*\r\n\r\n"
            )
            data = b""
            while data.count(b"\r\n\r\n") < 2:
                data += server.recv(1 << 16)
            head, _, body = data.partition(b"\r\n\r\n")
            assert b"\r\nContent-Type: application/http; msgtype=request\r\n" in head
            request_id = re.search(rb"PTTH-Request-Id: (\w+)", body)[1]
            expected = self.P3_BODY.replace(b"0123456789abcdef0123456789abcdef", request_id)
            assert body == expected + b"X-Forwarded-Prefix: /frontend/servers/n\r\n\r\n"
            server.sendall(self.P5 % request_id)
            assert read(client, b"\r\n\r\nhello").endswith(b"\r\n\r\nhello")
            client.close()
            server.sendall(self.P1)
            eventually(lambda: bare_relay.registered.parked)
            put = b"PUT /frontend/servers/n/files/a HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello"
            assert one(bare_relay.fetch(put))[0] == 501

    @in_loop
    async def test_its_relay_is_served_by_the_server(self) -> None:
        posts: asyncio.Queue[bytes] = asyncio.Queue()
        polls = itertools.count()

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    head, content = await read_request(reader)
                    if head.startswith(b"GET "):
                        number = next(polls)
                        if number > 1:
                            await asyncio.sleep(60)
                        body = self.P3_BODY + b"\r\n" if number else b""  # the first P1 is the hello
                        fields = b"Content-Type: application/http; msgtype=request\r\nCache-Control: no-store\r\n"
                        writer.write(b"HTTP/1.1 200 OK\r\n%bContent-Length: %d\r\n\r\n%b" % (fields, len(body), body))
                        continue
                    if content:  # not the empty batch behind the hello
                        posts.put_nowait(head + content)
                    writer.write(b"HTTP/1.1 200 OK\r\nCache-Control: no-store\r\nContent-Length: 0\r\n\r\n")

        async with client_to(relay) as client, attending(ptth.TunnelServer(client, "n", KEY, echo)):
            post = await posts.get()
        assert post.startswith(b"POST /7ZSFUKGV/http_responses/n HTTP/1.1\r\n")
        ((identity, head, body),) = ptth.unpack_responses(post.partition(b"\r\n\r\n")[2])
        assert (identity, body) == ("0123456789abcdef0123456789abcdef", b"GET /files/a\n")
        assert ptth.parse_inner_response(head)[0] == 200


class TestOperator:
    """The scraper API, the audit log, metrics and a live configuration."""

    SCRAPER = "scraper-key-that-is-long-enough"

    @pytest.fixture
    def tunnel(self, open_tunnel: object) -> Tunnel:
        return open_tunnel(echo)

    def configure(self, tunnel: Tunnel, *keys: ptth.ScraperKey, **more: object) -> None:
        own = {"servers": [ptth.ServerEntry("n", ptth.tripcode(KEY))], "enable_scraper_api": True}
        tunnel.configure(ptth.RelayConfig(**{**own, "scraper_keys": list(keys), **more}))

    def key(self, begin: float = -10, end: float = 10, name: str = "s", key: str = SCRAPER) -> ptth.ScraperKey:
        now = time.time()
        return ptth.ScraperKey(name, ptth.tripcode(key), now + begin, now + end)

    def test_the_scraper_api_is_off_unless_asked_for(self, tunnel: Tunnel) -> None:
        assert tunnel.get("/scraper/v1/test", f"X-ApiKey: {self.SCRAPER}")[0] == 404

    def test_what_a_scraper_may_see(self, tunnel: Tunnel) -> None:
        self.configure(tunnel, self.key())
        field = f"X-ApiKey: {self.SCRAPER}"
        for base in ("/scraper/v1/", "/scraper/api/"):
            assert tunnel.get(base + "test", field)[2] == b"You're valid!"
            (server,) = json.loads(tunnel.get(base + "server_list", field)[2])["servers"]
            assert (server["name"], server["display_name"], server["connected"]) == ("n", None, True)
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", server["last_seen"])
            assert tunnel.get(base + "server/n/x?y", field)[2] == b"GET /x?y\n"
            for path in ("nothing", "server/m/", "server/n"):
                assert tunnel.get(base + path, field)[0] == 404, path
        assert tunnel.get("/scraper/v2/test", field)[0] == 404

    REFUSED = [
        ([], []), ([(-20, -10)], []), ([(10, 20)], []), ([(-10, 10)], ["X-ApiKey: another-key"]), ([(-10, 10)], ["X-ApiKey: " + "k" * 200]),
    ]  # fmt: skip

    @pytest.mark.parametrize(("spans", "fields"), REFUSED)
    def test_every_refusal_is_the_same_403(
        self, spans: list[tuple[float, float]], fields: list[str], tunnel: Tunnel, capfd: Output
    ) -> None:
        self.configure(tunnel, *(self.key(*span) for span in spans))
        status, _, body = tunnel.get("/scraper/v1/test", *(fields or [f"X-ApiKey: {self.SCRAPER}"]))
        assert (status, body) == (403, b"this needs a valid X-ApiKey\n")
        assert tunnel.get("/scraper/v1/test")[::2] == (403, b"this needs a valid X-ApiKey\n")
        told = capfd.readouterr().err
        assert "ptth relay: scraper " in told and self.SCRAPER not in told
        self.configure(tunnel, self.key())
        metrics = tunnel.get("/scraper/v1/metrics", f"X-ApiKey: {self.SCRAPER}")[2].decode()
        assert 'keys_refused_total{api="scraper"} 2' in metrics

    def test_metrics_are_counted(self, tunnel: Tunnel) -> None:
        self.configure(tunnel, self.key())
        for path in ("/a", "/b"):
            assert tunnel.get("/frontend/servers/n" + path)[0] == 200
        assert tunnel.get("/frontend/servers/n/", method="TRACE")[0] == 405
        status, fields, body = tunnel.get("/scraper/v1/metrics", f"X-ApiKey: {self.SCRAPER}")
        assert fields["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        lines = body.decode().splitlines()
        for line in ('ptth_server_connected{server="n"} 1', 'ptth_requests_total{server="n",status="200"} 2', 'ptth_requests_waiting{server="n"} 0',
                     'ptth_keys_refused_total{api="backend"} 0', "ptth_connections 0"):  # fmt: skip
            assert line in lines, lines
        sent = next(int(line.split()[1]) for line in lines if line.startswith("ptth_body_bytes_total"))
        assert sent >= 2 * len("GET /a\n")
        names = {line.split("{")[0].split()[0] for line in lines if line[0] != "#"}
        assert all(f"# TYPE {name} " in body.decode() and f"# HELP {name} " in body.decode() for name in names)

    def test_the_audit_log(self, tunnel: Tunnel) -> None:
        assert tunnel.get("/frontend/servers/n/<b>?secret", "X-Forwarded-For: 192.0.2.1")[0] == 200
        hand = Hand(tunnel.port, key="wrong-key-that-is-long-enough")
        hand.listen(0)
        hand.answer()
        events = json.loads(tunnel.get("/frontend/audit_log", "Accept: application/json")[2])
        assert [event["event"] for event in events] == ["backend key refused: wrong key", "request", "connected"]
        del events[1]["time"]
        assert events[1] == {"event": "request", "server": "n", "client": "192.0.2.1", "method": "GET", "path": "/<b>",
                             "status": 200, "bytes": len("GET /<b>?secret\n")}  # fmt: skip
        page = tunnel.get("/frontend/audit_log")[2].decode()
        assert "/&lt;b&gt;" in page and "<b>" not in page and "secret" not in page
        for _ in range(300):
            long = get("/frontend/servers/n/" + "x" * 5000, "X-Forwarded-For: " + "y" * 5000)
            assert one(tunnel.fetch(long))[0] == 200
        assert len(tunnel.get("/frontend/audit_log")[2]) < 150_000

    ELSEWHERE = [
        "X-Forwarded-For: 192.0.2.7", "Forwarded: for=192.0.2.7", "X-Real-IP: 192.0.2.7", "Via: 1.1 front", "X-Forwarded-Proto: https",
        "HTTP/1.0",
    ]  # fmt: skip

    @pytest.mark.parametrize("field", ELSEWHERE)
    def test_strangers_see_counts_of_the_audit_log_only(self, field: str, tunnel: Tunnel) -> None:
        self.configure(tunnel, self.key(), self.key(-20, -10, "old", "old-key-that-is-long-enough"))

        def look(*fields: str) -> tuple[object, str]:
            requests = [get("/frontend/audit_log", *fields, accept) for accept in ("Accept: application/json", "A: b")]
            if field == "HTTP/1.0" and field in fields:  # from nginx as it is installed, which adds no fields
                requests = [each.replace(b"HTTP/1.0\r\n", b"").replace(b"HTTP/1.1", b"HTTP/1.0") for each in requests]
            data, page = map(tunnel.fetch, requests)
            assert one(data)[0] == one(page)[0] == 200
            return json.loads(one(data)[2]), one(page)[2].decode()

        for _ in range(2):
            assert tunnel.get("/frontend/servers/n/private", "X-Forwarded-For: 192.0.2.1")[0] == 200
        for shown in ([], ["X-ApiKey: old-key-that-is-long-enough"], ["X-ApiKey: wrong"], ["X-ApiKey: "]):
            events, page = look(field, *shown)
            assert {"server": "n", "event": "request", "count": 2} in events
            assert {key for event in events for key in event} == {"server", "event", "count"}
            assert "private" not in page and "192.0.2" not in page and "audit_log_public" in page
        for seen in ([field, f"X-ApiKey: {self.SCRAPER}"], []):
            events, page = look(*seen)
            assert "/private" in [event["path"] for event in events] and "/private" in page and "192.0.2.1" in page
        self.configure(tunnel, audit_log_public=True)
        assert "/private" in look(field)[1]
        self.configure(tunnel, self.key(), enable_scraper_api=False)
        assert "private" not in look(field, f"X-ApiKey: {self.SCRAPER}")[1]

    @pytest.mark.parametrize(
        "request_", [get("/scraper/v1/test?key=sesame"), get("/scraper?sesame"), get("//scraper/v1/metrics?sesame"), get("/Scraper/?sesame"),
                     get("/scraper/v1/server/n/x?sesame"), get("/frontend/audit_log?key=sesame"), get("/7ZSFUKGV/http_listen/n?sesame"),
                     get("/", "Referer: https://r.example/scraper/v1/test?key=sesame")],
    )  # fmt: skip
    def test_a_key_in_a_query_is_not_logged(
        self, request_: bytes, tunnel: Tunnel, told: list[str], capfd: Output
    ) -> None:
        self.configure(tunnel, self.key())
        request_ = request_.replace(b"\r\n\r\n", f"\r\nX-ApiKey: {self.SCRAPER}\r\n\r\n".encode())
        tunnel.http.log = ptth.AccessLog()
        tunnel.fetch(request_)
        assert b"sesame" not in tunnel.fetch(get("/frontend/audit_log"))
        eventually(lambda: "".join(told).count(" HTTP/1.1") >= 2)
        told.append(capfd.readouterr().err)
        assert "sesame" not in "".join(told) and self.SCRAPER not in "".join(told)

    def test_the_pages_say_what_they_should(self, tunnel: Tunnel) -> None:
        assert tunnel.get("/frontend/debug/")[0] == 404
        self.configure(tunnel, news_url="https://news.example/?a=1&b=2", dev_mode=True)
        assert tunnel.get("/frontend/servers/n/x")[0] == 200
        page = tunnel.get("/frontend/servers/")[2].decode()
        assert 'href="https://news.example/?a=1&amp;b=2"' in page and "connected" in page
        for path in ("servers/", "unregistered_servers", "audit_log", "debug/"):
            page = tunnel.get("/frontend/" + path)[2].decode()
            assert ptth.__version__ in page and "AGPL" in page and "ptth.py" in page and "<form" not in page
            for link in re.findall(r'href="(\.[^"]*)"', page):
                target = urllib.parse.urljoin("/frontend/" + path, link)
                assert tunnel.get(target)[0] == 200, target

    def test_servers_come_and_go_without_touching_the_others(self, tunnel: Tunnel) -> None:
        trip = ptth.tripcode(KEY)
        self.configure(tunnel, servers=[ptth.ServerEntry("n", trip, "En"), ptth.ServerEntry("m", trip)])
        hand = Hand(tunnel.port, "m")
        hand.listen()
        eventually(lambda: tunnel.relay.state.servers["m"].parked)
        assert tunnel.get("/frontend/servers/n/x")[0] == 200
        self.configure(tunnel)
        assert hand.requests() == []
        hand.listen()
        assert hand.answer()[0] == 401
        assert [tunnel.get(f"/frontend/servers/{name}/")[0] for name in "nm"] == [200, 404]
        self.configure(tunnel, servers=[ptth.ServerEntry("n", ptth.tripcode("another-key-than-before"))])
        hand = Hand(tunnel.port)
        hand.listen(0)
        assert hand.answer()[0] == 401

    @pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP")
    def test_sighup_reads_the_file_again(self, start: object, tmp_path: object) -> None:
        write_configs(tmp_path, free_port())
        relay = start("relay", cwd=tmp_path).listening()
        path = tmp_path / "ptth_relay.toml"
        good = path.read_text()
        path.write_text(good + good.partition("\n")[2].replace('"n"', '"m"'))
        relay.process.send_signal(signal.SIGHUP)
        relay.wait_for("2 servers")
        path.write_text("nonsense")
        relay.process.send_signal(signal.SIGHUP)
        relay.wait_for("keeping the old configuration")
        assert [one(fetch(relay.port, get(f"/frontend/servers/{name}")))[0] for name in "nm"] == [301, 301]

    @pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP")
    def test_sighup_names_a_port_that_is_not_the_one_in_use(self, start: object, tmp_path: object) -> None:
        write_configs(tmp_path, free_port())
        relay = start("relay", cwd=tmp_path).listening()
        path = tmp_path / "ptth_relay.toml"
        good = path.read_text()
        for text in ("port = 1\n" + good.partition("\n")[2], None, good):
            if text:
                path.write_text(text)
            relay.process.send_signal(signal.SIGHUP)
            relay.wait_for("again: 1 server")
        told = [line for line in relay.told if "restart" in line or "again" in line]
        assert ["restart" in line for line in told] == [True, False, True, False, False]


class Impostor:
    """A relay that sends the same bytes in response to every P1, and closes."""

    def __init__(self, answer: bytes) -> None:
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.port = self.sock.getsockname()[1]
        self.polls: list[bytes] = []
        self.posts: list[bytes] = []
        self.answer = answer
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.sock.accept()
            except OSError:
                return
            with connection:
                data = b""
                while not self.whole(data) and (piece := connection.recv(1 << 16)):
                    data += piece
                if data.startswith(b"GET"):
                    self.polls.append(data)
                    connection.sendall(self.answer)
                else:
                    self.posts.append(data)
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    @staticmethod
    def whole(data: bytes) -> bool:
        """Return whether this is a complete request, by its Content-Length if any."""
        head, end, body = data.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        return bool(end) and len(body) >= (int(length[1]) if length else 0)


def inner_request(identity: str = "aaaaaaaa", target: str = "/") -> bytes:
    """Return a request as it stands in a P3."""
    return f"GET {target} HTTP/1.1\r\nPTTH-Request-Id: {identity}\r\nHost: a\r\n\r\n".encode()


def p3(*requests: bytes) -> bytes:
    body = b"".join(requests)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/http\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
    return head % len(body) + body


class TestServer:
    IMPOSTORS = [
        (b"HTTP/1.1 302 Found\r\nLocation: https://elsewhere/\r\nContent-Length: 0\r\n\r\n", "elsewhere"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 5\r\n\r\nlogin", "portal"),
        (b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n", "tripcode ="), (b"HTTP/1.1 502 Bad\r\nContent-Length: 0\r\n\r\n", "answers 502"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: application/http\r\n\r\n" + b"x" * 400_000, "too large"), (b"", "closed"), (b"SSH-2.0-x\r\n\r\n", "head"),
        (p3(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"), "without an id"), (p3(), "at once and with nothing"),
    ]  # fmt: skip

    def test_what_is_no_relay_is_named(self, start: object, tmp_path: object) -> None:
        began = []
        begin = time.monotonic()
        for answer, word in self.IMPOSTORS:  # all at once, which takes a quarter of the time
            relay, where = Impostor(answer), tmp_path / word
            where.mkdir()
            write_configs(where, relay.port)
            began.append((relay, start("server", cwd=where), word))
        for relay, server, word in began:
            server.wait_for(word)
            assert len(relay.polls) < 20 + 20 * (time.monotonic() - begin)  # not thousands a second
            assert KEY not in "".join(server.told)
            assert server.end() == 0

    NO_P3 = [  # (status, fields, relay_url, words of the error)
        (301, {"location": "https://r.example/7ZSFUKGV/http_listen/n"}, "http://r.example", 'write relay_url = "https://r.example"'),
        (308, {"location": "https://R.example:8443/x/7ZSFUKGV/http_listen/n?a=b#c"}, "http://r.example/x", '"https://r.example:8443/x"'),
        (302, {"location": "/y/7ZSFUKGV/http_listen/n/"}, "https://r.example/x", '"https://r.example/y"'), (301, {"location": "https://r.example/"}, "http://r.example/x", '"https://r.example/x"'),
        (307, {"location": "//s.example/7ZSFUKGV/http_listen/n"}, "https://r.example", '"https://s.example"'), (301, {"location": "https://r.example"}, "http://r.example", '"https://r.example"'),
        (302, {"location": "https://login.example/?next=/7ZSFUKGV/http_listen/n"}, "https://r.example", "https://login.example, which is not a relay's URL"),
        (302, {"location": "http://portal.example/login"}, "http://r.example", "portal"), (302, {}, "https://r.example", "portal"), (302, {"location": "http://["}, "https://r.example", "portal"),
        (302, {"location": "https://u:p@r.example/7ZSFUKGV/http_listen/n"}, "http://r.example", "no valid Location"),
        (301, {"location": "https://r.example/7ZSFUKGV/http_listen/n"}, "https://r.example", "to the same URL"), (301, {"location": "http://r.example/7ZSFUKGV/http_listen/n"}, "https://r.example", "without TLS"),
        (401, {"www-authenticate": 'Basic realm="front"'}, "https://r.example", "(401, Basic): it asks for a login; let /7ZSFUKGV/ pass"), (401, {"www-authenticate": "Bearer"}, "https://r.example", "login"),
        (401, {"content-type": "text/html"}, "https://r.example", "login"), (403, {"content-type": "text/html"}, "https://r.example", "forbids /7ZSFUKGV/"), (404, {}, "https://r.example/frontend", "without /frontend/"),
        (407, {}, "http://r.example", "proxy_url"), (429, {}, "http://r.example", "limits"), (400, {"content-type": "text/html"}, "http://r.example:443", "https://"), (511, {}, "http://r.example", "log in"),
        (200, {"content-type": "text/html"}, "http://r.example", "portal"), (206, {"content-type": "application/http"}, "http://r.example", "not a PTTH relay"), (101, {}, "http://r.example", "not a PTTH relay"),
        (200, {"content-type": "application/http", "content-encoding": "gzip"}, "http://r.example", "compresses"), (302, {"location": "https://r.example/" + "x" * 9000}, "https://s.example", "not a relay"),
    ]  # fmt: skip

    @pytest.mark.parametrize(("status", "fields", "url", "words"), NO_P3, ids=range(len(NO_P3)))
    def test_what_is_no_p3_says_what_to_do(self, status: int, fields: dict[str, str], url: str, words: str) -> None:
        client = ptth.HTTPClient(ptth.parse_base_url(url))
        with pytest.raises(ptth.Refused) as caught:
            ptth.check_p3(status, ptth.Headers(fields.items()), client)
        assert words in str(caught.value) and len(str(caught.value)) < 500
        assert not isinstance(caught.value, ptth.KeyRefused)

    OWN_401 = [
        {"www-authenticate": 'X-ApiKey realm="ptth"', "content-type": "text/html"}, {}, {"content-type": "text/plain; charset=utf-8"},
    ]  # fmt: skip

    @pytest.mark.parametrize("fields", OWN_401)
    def test_a_relays_own_401(self, fields: dict[str, str]) -> None:
        with pytest.raises(ptth.KeyRefused):
            ptth.check_p3(401, ptth.Headers(fields.items()), ptth.HTTPClient(ptth.parse_base_url("http://r.example")))

    def test_a_status_that_may_be_a_forward_proxys(self) -> None:
        client = ptth.HTTPClient(ptth.parse_base_url("http://r.example"), ptth.parse_proxy("p:3128"))
        with pytest.raises(ConnectionError, match="the relay itself, or the proxy at p:3128, answers 502") as caught:
            ptth.check_p3(502, ptth.Headers(), client)
        assert not isinstance(caught.value, ptth.Refused)  # tried again soon: a relay that is started again
        with pytest.raises(ptth.Refused, match="the proxy at p:3128 answers 407: it wants a login"):
            ptth.check_p3(407, ptth.Headers(), client)
        with pytest.raises(ptth.Refused, match=r"http://r\.example, or the proxy at p:3128, is not a PTTH relay"):
            ptth.check_p3(403, ptth.Headers(), client)

    REFUSING = [  # (answer, scheme of relay_url, whether by a proxy, words)
        (b"HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n", "https", True, "407"), (b"HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n", "http", True, "407"),
        (b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n", "https", True, "403"), (b"", "https", True, "closed"), (b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n", "http", False, "404"),
    ]  # fmt: skip

    @pytest.mark.parametrize(("answer", "scheme", "by_proxy", "words"), REFUSING)
    def test_what_somebody_must_change_is_not_tried_again_at_once(
        self, answer: bytes, scheme: str, by_proxy: bool, words: str, monkeypatch: Patch, capfd: Output
    ) -> None:
        for name, value in (("BACKOFF_MIN", 0), ("BACKOFF_MAX", 0), ("REFUSED_DELAY", 3600)):
            monkeypatch.setattr(ptth, name, value)
        proxy = FakeProxy(answer)
        here = f"127.0.0.1:{proxy.port}"
        origin = ptth.parse_base_url(f"{scheme}://{'r.example' if by_proxy else here}")
        client = ptth.HTTPClient(origin, ptth.parse_proxy(here) if by_proxy else None)

        async def attend() -> None:
            async with attending(ptth.TunnelServer(client, "n", KEY, echo)) as server:
                while not server.links[0]._last_logged:
                    await asyncio.sleep(0.001)
                for _ in range(100):
                    await asyncio.sleep(0)

        in_time(attend())
        proxy.close()
        told = capfd.readouterr().err
        assert len(proxy.asked) == 1 and told.count("\n") == 1
        assert words in told and here in told and "retrying every 3600 seconds" in told
        assert scheme == "http" or "r.example" not in told.split("CONNECT")[0]

    def test_a_bad_request_in_a_p3_is_answered_400_and_a_repeated_one_once(
        self, start: object, tmp_path: object
    ) -> None:
        bad = inner_request().replace(b"Host:", b"Host :")
        good = inner_request("bbbbbbbb", "/files/../../etc/passwd")
        relay = Impostor(p3(bad, good, good))
        write_configs(tmp_path, relay.port)
        server = start("server", cwd=tmp_path)
        eventually(lambda: relay.posts)
        relay.sock.close()
        head, _, batch = relay.posts[0].partition(b"\r\n\r\n")
        assert head.startswith(b"POST /7ZSFUKGV/http_responses/n HTTP/1.1\r\n")
        answers = [
            (identity, ptth.parse_inner_response(inner)[0]) for identity, inner, _ in ptth.unpack_responses(batch)
        ]
        assert answers == [("aaaaaaaa", 400), ("bbbbbbbb", 404)]
        assert server.end() == 0

    def test_requests_to_the_relay_name_the_program(self, start: object, tmp_path: object) -> None:
        relay = Impostor(p3(inner_request(target="/missing")))
        write_configs(tmp_path, relay.port)
        server = start("server", cwd=tmp_path)
        eventually(lambda: relay.posts)
        relay.sock.close()
        line = f"\r\nUser-Agent: ptth/{ptth.__version__}\r\n".encode()
        assert all(head.count(line) == 1 for head in (relay.polls[0], relay.posts[0]))
        assert server.end() == 0

    @in_loop
    async def test_a_batch_that_broke_off_is_sent_again(self) -> None:
        posts = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            posts.append(await reader.readuntil(b"end"))
            if len(posts) == 2:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            writer.close()

        async with client_to(serve) as client:
            sender = ptth.Sender(client, "n", KEY, ptth.Workers(echo), print)
            await sender.send_batch([("x", b"the end")])
        assert len(posts) == 2 and posts[0] == posts[1]

    def test_what_is_answered_at_once_leaves_with_the_next_p1(self, open_tunnel: object) -> None:
        seen: list[tuple[str, bool]] = []
        go = asyncio.Event()

        async def handler(request: ptth.Request) -> ptth.Response:
            if request.target == "/slow":
                await go.wait()
            return await echo(request)

        tunnel = open_tunnel(handler)
        tunnel.fetch(get("/frontend/servers/n/first"))

        async def record(request: ptth.Request) -> ptth.Response:
            if request.target.startswith(ptth.BACKEND) and (request.method == "GET" or request.body is not ptth.EMPTY):
                seen.append((request.method, "prefer" in request.headers))
                go.set()
            return await tunnel.relay.handle(request)

        tunnel.http.handler = record
        assert [tunnel.get(f"/frontend/servers/n/{i}")[0] for i in range(3)] == [200] * 3
        assert seen == [("POST", True)] * 3
        go.clear()
        del seen[:]
        assert b"/slow" in tunnel.fetch(get("/frontend/servers/n/slow"))
        assert seen == [("GET", True), ("POST", False)]

    @pytest.mark.parametrize(
        ("answer", "then"),
        [
            (b"", b"POST"),  # the connection breaks: the batch once more, by itself
            (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"wait=0"),  # an older relay has it: hello again
            (b"HTTP/1.1 413 No\r\nContent-Length: 0\r\n\r\n", b"PTTH-Lost: aaaaaaaa"),
        ],
    )
    @in_loop
    async def test_a_batch_whose_answer_is_no_p3(self, answer: bytes, then: bytes) -> None:
        posts: list[bytes] = []
        features = (b"Connection: close", b"PTTH-Features: body, listen")
        nothing, request = (p3(*requests).replace(*features) for requests in ([], [inner_request()]))
        ended = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    head, body = await read_request(reader)
                    if posts and then in head and (body or not head.startswith(b"POST")):
                        assert body in (b"", *posts) and (not body or b"Prefer" not in head)
                        ended.set()
                    elif body:
                        posts.append(body)
                        assert b"Prefer: wait=25" in head and b"Accept: application/http\r\n" in head
                        if not answer:
                            break
                        writer.write(answer)
                    elif not head.startswith(b"POST"):
                        writer.write(nothing if b"wait=0" in head else b"" if posts else request)
                    else:  # whether POST gets through
                        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            writer.close()

        async with client_to(serve) as client, attending(ptth.TunnelServer(client, "n", KEY, echo)):
            await ended.wait()
        assert len(posts) == 1

    def test_a_request_leaves_nothing_to_the_garbage_collector(self, open_tunnel: object) -> None:
        tunnel = open_tunnel(echo)

        def exchanges() -> int:
            return sum(isinstance(each, ptth.Exchange) for each in gc.get_objects())

        gc.collect()
        before = exchanges()
        gc.disable()
        try:
            for i in range(20):
                tunnel.fetch(get(f"/frontend/servers/n/{i}"))
            left = exchanges() - before
            assert left < 10, f"{left} of 20"  # those of the last P3 are remembered until the next
        finally:
            gc.enable()

    def test_a_batch_that_is_the_next_p1_delays_no_stop(
        self, background: Background, open_tunnel: object, monkeypatch: Patch
    ) -> None:
        tunnel = open_tunnel(echo)
        tunnel.fetch(get("/frontend/servers/n/x"))
        monkeypatch.setattr(ptth, "LINGER_TIMEOUT", 20)  # after which a stop breaks off what is still open
        background.run(tunnel.server.stop(25), 15)

    @pytest.mark.parametrize("begin", [b"", b"begin"])  # b"": as it is sent to a relay of the original
    @in_loop
    async def test_a_body_of_unknown_length_arrives_also_behind_nothing(self, begin: bytes) -> None:
        bodies: list[bytes] = []

        async def pieces() -> object:
            for piece in (b"one", b"", b"two"):
                yield piece

        async def keep(request: ptth.Request) -> ptth.Response:
            bodies.append(b"".join([piece async for piece in request.body]))
            return ptth.text_response(200, "")

        async with listening(ptth.HTTPServer(keep)) as port:
            client = client_of(port)
            status, _ = await client.post("/", [], ptth.JoinedBody(ptth.BytesBody(begin), Stream(pieces)))
            client.close()
        assert (status, bodies) == (200, [begin + b"onetwo"])

    @pytest.mark.parametrize("size", [1, 1_000_000])
    @in_loop
    async def test_a_p7_that_never_comes_is_given_up(self, size: int, monkeypatch: Patch) -> None:
        release = asyncio.Event()

        async def never(request: ptth.Request) -> ptth.Response:
            await request.body.read_all(2_000_000)
            await release.wait()
            return ptth.text_response(200, "")

        monkeypatch.setitem(ptth.HTTPClient.handle.__kwdefaults__, "timeout", 0.1)
        async with listening(ptth.HTTPServer(never)) as port:
            client = client_of(port)
            with pytest.raises(TimeoutError):
                await client.post("/", [], ptth.BytesBody(bytes(size)))
            client.close()
            release.set()

    @in_loop
    async def test_an_early_p7_ends_the_response(self) -> None:
        async def endless() -> object:
            while True:
                yield bytes(10_000)

        async def gone(request: ptth.Request) -> ptth.Response:
            return ptth.text_response(410, "the client is gone")

        async with listening(ptth.HTTPServer(gone)) as port:
            client = client_of(port)
            status, _ = await client.post("/", [], Stream(endless))
            assert status == 410 and not client.idle  # what was sent of the body would be read as a request
            client.close()

    def test_no_p1_is_open_while_there_is_no_room(self, open_tunnel: object, monkeypatch: Patch) -> None:
        """While all handlers are at work the rest waits at the relay."""
        monkeypatch.setattr(ptth, "MAX_HANDLERS", 2)
        monkeypatch.setattr(ptth, "FAR_P1", 1)  # a slow machine looks like a long way
        begun: list[str] = []
        release = threading.Event()

        async def handler(request: ptth.Request) -> ptth.Response:
            begun.append(request.target)
            await asyncio.to_thread(release.wait)
            return ptth.text_response(200, request.target)

        tunnel = open_tunnel(handler)
        waiting, parked = tunnel.registered.waiting, tunnel.registered.parked
        clients = []
        try:
            for i in range(2):
                clients.append(Client(tunnel.port, f"/{i}"))
                eventually(lambda i=i: len(begun) == i + 1)
            eventually(lambda: not parked)
            clients.append(Client(tunnel.port, "/2"))
            eventually(lambda: waiting)
            for _ in range(20):
                assert tunnel.get("/frontend/relay_up_check")[0] == 200
            assert len(waiting) == 1 and len(begun) == 2
        finally:
            release.set()  # also after a failure, or its thread would keep the tests from ending
        assert [client.answer()[2] for client in clients] == [b"/0", b"/1", b"/2"]

    def test_a_relay_of_the_original(self, start: object, tmp_path: object) -> None:
        (tmp_path / "hello.txt").write_bytes(HELLO)
        rows = (("A", 0, "/files/hello.txt"), ("B", 1, "/files/hello.txt"), ("C", 0, "/files"))
        packed = ptth.pack_value([[name * 26, [{method: None}, path, {"host": [97]}]] for name, method, path in rows])
        relay = Impostor(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(packed) + packed)
        write_configs(tmp_path, relay.port, str(tmp_path))
        server = start("server", cwd=tmp_path)
        eventually(lambda: len(relay.posts) >= 3)
        relay.sock.close()
        answers = {}
        for post in relay.posts[:3]:
            head, _, body = post.partition(b"\r\n\r\n")
            field = re.search(rb"X-PTTH-2LJYXWC4: (\S+)", head)[1].decode()
            status, headers = ptth.unpack_rust_response(field)
            answers[head[29:30]] = (status, headers.get("content-length"), body)
        assert answers[b"A"] == (200, "13", HELLO) and answers[b"B"] == (200, "13", b"")
        assert answers[b"C"][0] == 307
        assert server.end() == 0

    def test_the_requests_before_a_bad_one_are_answered(self, start: object, tmp_path: object) -> None:
        relay = Impostor(p3(inner_request(target="/missing"), b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"))
        write_configs(tmp_path, relay.port)
        start("server", cwd=tmp_path).wait_for("without an id")
        eventually(lambda: relay.posts)

    def test_a_stop_does_not_wait_for_a_relay_that_is_silent(self, start: object, tmp_path: object) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            write_configs(tmp_path, silent.getsockname()[1])
            server = start("server", cwd=tmp_path)
            silent.accept()[0].recv(1000)
            assert server.end(patience=5) == 0

    @in_loop
    async def test_no_more_handlers_at_once_than_the_limit(self) -> None:
        running, most, release = 0, 0, asyncio.Event()

        async def handler(request: ptth.Request) -> ptth.Response:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await release.wait()
            running -= 1
            raise ConnectionAbortedError  # the client is gone

        server = ptth.TunnelServer(client_of(1), "n", KEY, handler)
        async with asyncio.TaskGroup() as server.workers.group:
            server.links[0].accept(b"".join(inner_request(f"aaaa{i:04}") for i in range(600)))
            for _ in range(1000):
                await asyncio.sleep(0)
            assert most == ptth.MAX_HANDLERS
            release.set()
        assert most == ptth.MAX_HANDLERS and not server.workers.request_ids

    @pytest.mark.parametrize(("near", "expected"), [(True, [3, 3, 3, 3]), (False, [])])
    @in_loop
    async def test_a_batch_has_larger_bodies_for_a_near_relay_and_no_more_than_any_relay_reads(
        self, near: bool, expected: list[int]
    ) -> None:
        sender = ptth.Sender(client_of(1), "n", KEY, ptth.Workers(echo), print)
        sender.features, sender.near = {"listen"}, near
        response = ptth.Response(200, [], ptth.BytesBody(b"x" * 100 * 1024))
        for number in range(12):
            if sender.can_batch(response):
                sender.batch(f"{number:08}", response, "GET")
        sizes = []
        while batch := sender.take_batch():
            sizes.append(ptth.batch_body(batch).length)
        assert [size // (100 * 1024) for size in sizes] == expected
        # What release 1.0.0 and later ones read: 256 KiB, a head, and a body.
        assert max(sizes, default=0) <= ptth.MAX_RESPONSES_BYTES <= (256 + 48 + 128) * 1024

    @in_loop
    async def test_a_body_that_a_proxy_takes_only_in_parts_is_not_in_a_batch(self) -> None:
        sender = ptth.Sender(client_of(1), "n", KEY, ptth.Workers(echo), print)
        bodies = [ptth.Response(200, [], ptth.BytesBody(bytes(size))) for size in (100 * 1024, 1000)]
        assert [*map(sender.can_batch, bodies)] == [True, True]
        sender._shrink_parts(100 * 1024)  # after 413
        assert [*map(sender.can_batch, bodies)] == [False, True]

    @pytest.mark.parametrize(
        ("near", "size", "expected"),
        [(True, 100 * 1024, 4), (True, 100, 1), (False, 60 * 1024, 4), (False, 100, 2)],
    )
    @in_loop
    async def test_several_batches_are_in_flight_to_a_far_relay_or_while_they_are_full(
        self, near: bool, size: int, expected: int
    ) -> None:
        sender = ptth.Sender(client_of(1), "n", KEY, ptth.Workers(echo), print)
        sender.features, sender.near = {"listen"}, near
        sent: list[ptth.Batch] = []
        finish = asyncio.Event()

        async def send_batch(batch: ptth.Batch) -> None:
            sent.append(batch)
            await finish.wait()

        sender.send_batch = send_batch
        response = ptth.Response(200, [], ptth.BytesBody(b"x" * size))
        async with asyncio.TaskGroup() as sender._workers.group:
            for number in range(80):
                sender.batch(f"{number:08}", response, "GET")
                if number in (39, 79):
                    for _ in range(20):
                        await asyncio.sleep(0)
            assert len(sent) == expected
            finish.set()
        assert sum(map(len, sent)) == 80

    def test_whatever_a_handler_raises_becomes_a_response(self, open_tunnel: object, capfd: Output) -> None:
        async def faulty() -> object:
            yield b"x" * 100_000
            raise LookupError("the body has a fault")

        async def cancelled() -> None:
            raise asyncio.CancelledError

        errors = {
            "timeout": TimeoutError, "broken": ptth.IncompleteBody, "value": ValueError, "reset": ConnectionResetError,
        }  # fmt: skip

        async def handler(request: ptth.Request) -> ptth.Response:
            kind = request.target[1:]
            if kind == "fault-in-the-body":
                return ptth.Response(200, [], Stream(faulty, 300_000))
            if kind == "field":
                return ptth.Response(200, [("X", "a\r\nb")], ptth.BytesBody(b"x" * ptth.SMALL_BODY * 2))
            if kind == "None":
                return None
            if kind == "cancelled":
                await asyncio.gather(asyncio.sleep(0), cancelled())
            raise errors[kind]

        tunnel = open_tunnel(handler)
        for kind, status in {
            "timeout": 504, "broken": 502, "value": 500, "reset": 500, "None": 500, "field": 500, "cancelled": 500,
        }.items():  # fmt: skip
            assert tunnel.get(f"/frontend/servers/n/{kind}")[0] == status, kind
        raw = tunnel.fetch(get("/frontend/servers/n/fault-in-the-body"))
        assert b" 200 OK" in raw and len(raw) < 200_000
        assert "the body has a fault" in capfd.readouterr().err
        assert tunnel.get("/frontend/servers/n/value")[0] == 500

    def test_clients_that_do_not_read_keep_no_handler(
        self, open_tunnel: object, tmp_path: object, monkeypatch: Patch
    ) -> None:
        with open(tmp_path / "big", "wb") as file:
            file.truncate(1 << 28)
        (tmp_path / "small").write_bytes(HELLO)
        monkeypatch.setattr(ptth, "MAX_HANDLERS", 2)
        tunnel = open_tunnel(ptth.server_handler(ptth.Site(str(tmp_path)), "n"))
        lazy = [begin_download(tunnel.port, "/big") for _ in range(5)]
        assert tunnel.get("/frontend/servers/n/files/small")[2] == HELLO
        tunnel.server.workers.most_sending = 5
        status, fields, _ = tunnel.get("/frontend/servers/n/files/big")
        assert (status, "retry-after" in fields) == (503, True)
        assert tunnel.get("/frontend/servers/n/files/small")[2] == HELLO
        for sock in lazy:
            sock.close()
        eventually(lambda: not tunnel.server.workers.sending)

    @in_loop
    async def test_small_responses_that_the_relay_does_not_take_stop_the_polling(self) -> None:
        server = ptth.TunnelServer(client_of(1), "n", KEY, echo)
        rooms, release = [], asyncio.Event()

        async def post(*_: object) -> tuple[int, ptth.Headers]:
            await release.wait()
            return 200, ptth.Headers()

        server.links[0].client.post = post
        async with asyncio.TaskGroup() as server.workers.group:
            for numbers in (range(ptth.MAX_HANDLERS - 1), [ptth.MAX_HANDLERS - 1]):
                server.links[0].accept(b"".join(inner_request(f"aaaa{number:04}") for number in numbers))
                while server.workers._queue or server.workers._count:
                    await asyncio.sleep(0)
                rooms.append(server.workers.room.is_set())
            release.set()
        assert rooms == [True, False]
        assert server.workers.room.is_set() and not server.workers.request_ids

    @in_loop
    async def test_what_is_offered_again_is_not_told_as_lost(self) -> None:
        server = ptth.TunnelServer(client_of(1), "n", KEY, echo)
        server.links[0]._sender.lost.extend(["aaaaaaaa", "bbbbbbbb"])
        async with asyncio.TaskGroup() as server.workers.group:
            server.links[0].accept(inner_request())
            assert list(server.links[0]._sender.lost) == ["bbbbbbbb"]

    def test_one_address_has_half_of_the_places_for_large_responses(self) -> None:
        workers = ptth.Workers(echo)
        workers.most_sending = 4
        workers.sending.update({"192.0.2.1": 2})
        assert [workers._may_send(address) for address in ("192.0.2.1", "192.0.2.2", "")] == [False, True, True]
        workers.sending.update({"": 2})
        assert not workers._may_send("192.0.2.2")

    @pytest.mark.parametrize(
        ("refusal", "word"),
        [
            (b"HTTP/1.1 413 X\r\nServer: front/1 \xe9\r\n", "front/1"), (b"HTTP/1.1 413 X\r\n", "client_max_body_size 0"),
            (b"HTTP/1.1 405 X\r\n", "POST"), (b"HTTP/1.1 403 X\r\n", "403"), (b"", "closed"),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("size", [5, 3_000_000])
    @in_loop
    async def test_a_response_that_is_refused_is_told_to_the_relay(
        self, size: int, refusal: bytes, word: str, capfd: Output
    ) -> None:
        lost: list[str] = []
        done = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"POST"):
                writer.write(refusal + b"Content-Length: 0\r\nConnection: close\r\n\r\n" if refusal else b"")
            elif told := re.search(rb"PTTH-Lost: (.*)\r", head):
                lost.append(told[1].decode())
                writer.write(p3())
                done.set()
            elif b"wait=0" in head:
                writer.write(p3(inner_request()))
            else:
                await done.wait()
            await writer.drain()
            writer.close()

        async def handler(request: ptth.Request) -> ptth.Response:
            return ptth.Response(200, [], ptth.BytesBody(b"x" * size))

        async with client_to(serve) as client, attending(ptth.TunnelServer(client, "n", KEY, handler)):
            await done.wait()
        assert lost[0] == "aaaaaaaa"
        told = capfd.readouterr().err
        assert word in told and KEY not in told

    @in_loop
    async def test_the_shortest_of_several_round_trips_counts_and_is_measured_again(self, monkeypatch: Patch) -> None:
        monkeypatch.setattr(ptth, "MEASURE_INTERVAL", 0)
        link = ptth.Link(client_of(1), "n", KEY, ptth.Workers(echo))
        samples = iter([0.9, 0.001, 0.9, 0.9, 0.8, 0.7, 0.9, 0.9, OSError("refused"), 0.0, OSError("refused")])
        seen: list[tuple[bool, int]] = []
        polls = 0
        set_distance = link._set_distance

        async def probe() -> float:
            sample = next(samples, None)
            if sample is None:
                raise asyncio.CancelledError
            if isinstance(sample, OSError):
                raise sample
            return sample

        async def listen(failure: object, *, only_if_far: bool) -> None:
            nonlocal polls
            polls += only_if_far

        def look(took: float, failure: object) -> None:
            set_distance(took, failure)
            seen.append((link._sender.near, polls))

        link._sender.probe, link._listen, link._set_distance = probe, listen, look
        async with asyncio.TaskGroup() as link._workers.group:
            link._workers.spawn(link._measure(0.9, None))
        # 0.9 and three samples; then three at a time, one of which may fail, and then those before it count
        more = ptth.FAR_P1 - 1
        assert seen == [(True, 0), (False, 0), (False, more), (True, more)]

    @pytest.mark.parametrize("fault", [False, True])
    def test_an_unexpected_error_and_a_cancellation_end_the_server(
        self, fault: bool, bare_relay: Tunnel, background: Background
    ) -> None:
        async def attend() -> None:
            server = ptth.TunnelServer(client_of(bare_relay.port), "n", KEY, echo)
            running = asyncio.create_task(server.run())
            await server.connected.wait()
            if fault:
                server.links[0].accept = None
                Client(bare_relay.port)
            else:
                running.cancel()
            await asyncio.wait({running}, timeout=10)
            assert running.done()
            if fault:
                assert running.exception().subgroup(TypeError)
            assert not server.links[0].client.connections
            await server.stop()

        background.run(attend())

    def test_a_slow_handler_holds_up_nobody(self, open_tunnel: object) -> None:
        release = threading.Event()

        async def handler(request: ptth.Request) -> ptth.Response:
            if request.target == "/slow":
                await asyncio.to_thread(release.wait)
            return ptth.text_response(200, request.target)

        tunnel = open_tunnel(handler)
        slow = Client(tunnel.port, "/slow")
        assert [Client(tunnel.port, f"/{i}").answer()[2] for i in range(5)] == [f"/{i}".encode() for i in range(5)]
        release.set()
        assert slow.answer()[2] == b"/slow"


class TestSeveralRelays:
    """One server at several relays, which share no state."""

    @pytest.fixture
    def relays(self, open_tunnel: object) -> list[Tunnel]:
        return [open_tunnel() for _ in range(3)]

    @staticmethod
    @contextlib.contextmanager
    def attend(background: Background, *ports: int) -> object:
        """Run a server at the relays on these ports."""
        client, *others = map(client_of, ports)
        server = ptth.TunnelServer(client, "n", KEY, echo, *others)
        with background.inside(attending(server)):
            background.run(server.connected.wait())
            yield server

    @staticmethod
    def reach(relay: Tunnel) -> int:
        return one(fetch(relay.port, get("/frontend/servers/n/")))[0]

    def test_each_relay_reaches_the_server_and_one_handler_answers(
        self, background: Background, relays: list[Tunnel]
    ) -> None:
        with self.attend(background, *[relay.port for relay in relays]):
            assert [self.reach(relay) for relay in relays] == [200, 200, 200]
            assert all(relay.registered.connected for relay in relays)
        assert not any(relay.registered.parked for relay in relays)

    def test_one_that_refuses_and_one_that_is_away_do_not_touch_the_others(
        self, background: Background, relays: list[Tunnel], monkeypatch: Patch, told: list[str]
    ) -> None:
        monkeypatch.setattr(ptth, "REFUSED_DELAY", 0.05)
        good, refusing = relays[:2]
        refusing.configure(ptth.RelayConfig(servers=[ptth.ServerEntry("n", ptth.tripcode(KEY + "x"))]))
        ports = (refusing.port, good.port, free_port())
        with self.attend(background, *ports) as server:
            eventually(lambda: all(f"//127.0.0.1:{port}: " in "".join(told) for port in ports))
            assert self.reach(good) == 200 and server.connected.is_set()
            states = dict(re.findall("ptth server: http://127.0.0.1:([0-9]+): (.*)", "".join(told)))
            expected = (
                "does not know server n with this key (401)",
                "connected to the relay",
                "cannot reach the relay at",
            )
            assert all(words in states[str(port)] for port, words in zip(ports, expected, strict=True))
            refusing.configure(good.relay.state.config)
            eventually(lambda: refusing.registered.connected)  # it was let in later, by itself
            assert self.reach(refusing) == 200

    def test_connected_says_whether_any_relay_is(self, background: Background, relays: list[Tunnel]) -> None:
        async def end(relay: Tunnel) -> None:
            await relay.relay.stop(0)
            await relay.http.stop(0)

        with self.attend(background, relays[0].port, relays[1].port) as server:
            eventually(lambda: all(link.connected.is_set() for link in server.links))
            background.run(end(relays[0]))
            eventually(lambda: not server.links[0].connected.is_set())
            assert server.connected.is_set() and self.reach(relays[1]) == 200
            background.run(end(relays[1]))
            eventually(lambda: not server.connected.is_set())

    def test_one_that_is_far_is_asked_by_several_polls_and_a_near_one_by_one(
        self, background: Background, relays: list[Tunnel], monkeypatch: Patch
    ) -> None:
        near, far = relays[:2]
        set_distance = ptth.Link._set_distance

        def distance(link: ptth.Link, took: float, failure: object) -> None:
            set_distance(link, 1 if link.client.origin.port == far.port else 0, failure)

        monkeypatch.setattr(ptth.Link, "_set_distance", distance)
        with self.attend(background, near.port, far.port):
            eventually(lambda: len(far.registered.parked) == ptth.FAR_P1)
            assert len(near.registered.parked) <= 1

    def test_servers_come_back_to_a_restarted_relay_soon_but_not_in_the_same_second(self) -> None:
        rng = random.Random(7)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(random, "uniform", rng.uniform)
            for away in (0.5, 1, 3, 20):
                times = []
                for _ in range(2000):
                    when, pauses = 0.0, ptth.backoff()
                    while when < away:
                        when += next(pauses)
                    times.append(when - away)
                times.sort()
                assert times[-1] <= ptth.BACKOFF_MAX
                assert max(bisect.bisect(times, one_ + 1) - i for i, one_ in enumerate(times)) < 1700
        assert next(ptth.backoff()) <= 0.1

    def test_a_sweep_checks_few_each_time_and_thousands_each_second(self) -> None:
        for count, turns in ((0, 1), (1, 1), (999, 1), (1500, 2), (5000, 4), (100_000, 4)):
            parts = [ptth.share_of_turn(range(count), turn) for turn in range(7, 7 + turns)]
            assert sorted(itertools.chain(*parts)) == list(range(count))
            assert max(map(len, parts)) <= count / turns + 1

    CHECK = get("/frontend/relay_up_check")

    @pytest.mark.parametrize(("checks", "drains"), [(3, True), (9, True), (2, False), (0, False)])
    def test_a_relay_that_a_balancer_checks_works_on_until_that_knows_of_the_stop(
        self, checks: int, drains: bool, background: Background, bare_relay: Tunnel, monkeypatch: Patch
    ) -> None:
        monkeypatch.setattr(ptth, "DRAIN_TIME", 3600)
        assert all(one(bare_relay.fetch(self.CHECK))[0] == 200 for _ in range(checks))

        async def drain() -> object:
            task = asyncio.create_task(bare_relay.relay.drain())
            await asyncio.wait({task}, timeout=0 if drains else 20)
            return task

        task = background.run(drain())
        assert one(bare_relay.fetch(self.CHECK))[0] == 503
        assert bare_relay.get("/frontend/servers/")[0] == 200
        assert task.done() != drains
        background.loop.call_soon_threadsafe(task.cancel)

    def test_checks_that_are_long_past_delay_no_stop(self, bare_relay: Tunnel, background: Background) -> None:
        bare_relay.relay.state.checks.extend([background.loop.time() - ptth.MAX_CHECK_AGE - 1] * 3)
        background.run(bare_relay.relay.drain(), 5)

    def test_sigterm_drains_then_stops(self, start: object, tmp_path: object) -> None:
        write_configs(tmp_path, 0)
        relay = start("relay", cwd=tmp_path, DRAIN_TIME=0.2).listening()
        for _ in range(3):
            fetch(relay.port, self.CHECK)
        began = time.monotonic()
        assert relay.end() == 0 and time.monotonic() - began >= 0.2

    def test_sigterm_finishes_what_is_under_way_at_each(self, start: object, tmp_path: object) -> None:
        size = 1 << 25
        (tmp_path / "files").mkdir()
        with open(tmp_path / "files" / "big", "wb") as file:
            file.truncate(size)
        write_configs(tmp_path, 0, str(tmp_path / "files"))
        relays = [start("relay", cwd=tmp_path).listening() for _ in range(2)]
        urls = [f"--relay-url=http://127.0.0.1:{relay.port}" for relay in relays]
        server = start("server", *urls, cwd=tmp_path)
        for _ in relays:
            server.wait_for("connected to the relay")
        socks = [begin_download(relay.port, "/big") for relay in relays]
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("again: serving")
        server.process.send_signal(signal.SIGTERM)
        assert all(read_to_end(sock) > size for sock in socks)
        assert server.process.wait(20) == 0 and "after a restart" not in "".join(server.told)


class TestConfiguration:
    TRIP = ptth.tripcode(KEY)
    SERVER = f'name = "a"\napi_key = "{KEY}"\n'
    SPAN = "not_before=2026-01-01T00:00:00Z\nnot_after=2026-01-30T00:00:00Z\n"
    FAULTS = [  # (a relay's file, the number of lines that say what is wrong, words of them)
        ("prot = 1", 1, ["prot", "did you mean port"]), ("port = 'x'", 1, ["port", "number"]), ("port = 70000", 1, ["65535"]), ("port = true", 1, ["number"]),
        ("[[servers]]\nname = 'a b'\ntripcode = ''", 2, ["a b", "tripcode"]), ("[[servers]]\nname = '..'", 2, ["'..'"]), ("port =", 1, ["TOML"]),
        ("dev_mode = 1", 1, ["[dev_mode]"]), ("x = " + "[" * 9999, 1, ["TOML"]), ("port = " + "9" * 9999, 1, ["TOML"]),
        (f"[[scraper_keys]]\nname='a'\nhash='{TRIP}'\nnot_before=1970-01-01T00:00:00Z\nnot_after=2099-01-01T00:00:00Z", 1, ["30 days"]),
        ("[server_tripcodes]\na = 'x'", 1, ["[[servers]]", "old form"]), ("servers = 1", 1, ["[[servers]]"]), ("[[servers]]\nnmae = 'x'", 3, ["nmae", "name"]),
        ("news_url = 'ftp://x'", 1, ["news_url"]), ("audit_log_public = 1", 1, ["true or false"]), ("enable_scraper_api = 1", 1, ["true or false"]), ("[[scraper_keys]]\nname = 'a'", 3, ["hash", "not_before"]),
        (f"[[scraper_keys]]\nname='a'\nhash='{TRIP}'\nnot_before=2026-01-01T00:00:00Z\nnot_after=2026-02-01T00:00:00Z", 1, ["30 days", "number 1"]),
        (f"[[scraper_keys]]\nname='a'\nhash='{TRIP}'\nnot_before='2026-01-02T00:00:00Z'\nnot_after='2026-01-01T00:00:00Z'", 1, ["30 days"]),
        (f"[[scraper_keys]]\nname='a'\nhash='{TRIP}'\nnot_before=2026-01-01T00:00:00\nnot_after=2026-01-02", 2, ["not_before", "not_after", "offset"]),
        (f"[[scraper_keys]]\nname='a'\nhash=5\n{SPAN}", 1, ["[[scraper_keys]] number 1", "hash", "string"]),
        (f"[[scraper_keys]]\nname=5\nhash='{TRIP}'\n{SPAN}", 1, ["[[scraper_keys]] number 1", "name", "string"]),
        (f"[[scraper_keys]]\nhash='{TRIP}'\n{SPAN}", 1, ["[[scraper_keys]] number 1", "name is missing"]),
        (2 * f"[[scraper_keys]]\nname='a'\nhash='{TRIP}'\n{SPAN}", 1, ["[[scraper_keys]] number 2", "two scraper keys named a"]),
        (f"[[scraper_keys]]\nname='a'\nhash='{TRIP}'\nnot_before=5\nnot_after=2026-01-30T00:00:00Z", 1, ["[[scraper_keys]] number 1", "not_before"]),
        (f"[[servers]]\nname=5\ntripcode='{TRIP}'", 1, ["[[servers]] number 1", "name", "string"]),
        ("[[servers]]\nname='a'\ntripcode=['x']", 1, ["[[servers]] number 1", "tripcode", "string"]),
        (f"[[servers]]\nname='a'\n[[servers]]\nname='b'\ntripcode='{TRIP}'", 1, ["[[servers]] number 1", "tripcode"]),
        (2 * f"[[servers]]\nname='a'\ntripcode='{TRIP}'\n", 1, ["[[servers]] number 2", "two servers named a"]),
        (f"[[servers]]\nname='a'\ntripcode='{TRIP}'\ndomain='a.org'", 1, ["unknown key domain", "above the first block"]),
    ]  # fmt: skip

    @pytest.mark.parametrize("value", ['"10.0.0.0/8"', '["10.0.0.0/8"]'])
    def test_trusted_proxies_may_be_one_or_a_list(self, value: str, tmp_path: object) -> None:
        assert load_relay(tmp_path, f"trusted_proxies = {value}\n").trusted_proxies == ["10.0.0.0/8"]

    @pytest.mark.parametrize(("text", "lines", "words"), FAULTS)
    def test_each_fault_of_a_relays_file_is_one_line_with_the_table_and_the_key(
        self, text: str, lines: int, words: list[str], tmp_path: object
    ) -> None:
        with pytest.raises(ptth.UserError) as caught:
            load_relay(tmp_path, text)
        told = caught.value.args
        assert len(told) == lines and all(line.startswith(f"{tmp_path}/r.toml") for line in told)
        assert all(word in "\n".join(told) for word in words), told

    @pytest.mark.parametrize(
        "data",
        [b"\xef\xbb\xbfport = 5\n", b"\tport\t=\t5 # caf\xc3\xa9\t\r\n[dev_mode]\r\n", b"port = 5", b"\xef\xbb\xbf# x\r\nport = 5\r\n"],
    )  # fmt: skip
    def test_what_editors_make_of_a_file_is_read(self, data: bytes, tmp_path: object) -> None:
        assert load_relay(tmp_path, data).port == 5

    UNREADABLE = [  # (the bytes of a file, words of the message, all of which must be there)
        ("port = 5\n".encode("utf-16"), ["UTF-16", "save it as UTF-8"]), (b"\xfe\xff" + "# x".encode("utf-16-be"), ["UTF-16"]),
        ("port = 5\n".encode("utf-16-le"), ["UTF-16"]), ("port = 5".encode("utf-16-be"), ["UTF-16"]), ("port = 5".encode("utf-32"), ["UTF-32"]),
        ("# eins\n# zwei\nname = 'f\u00fcr'\n".encode("latin-1"), ["line 3", "0xfc", "Latin-1", "UTF-8"]),
        (b'\n\nfile_server_root = "C:\\Users\\me"', ["line 3", "single quotes", "'C:\\Users\\me'"]), (b'x = "\\\\srv\\share"', ["line 1", "single quotes"]),
        (b'x = "D:\\my files"\r\n', ["line 1", "single quotes"]), ("name = \u201cbox\u201d".encode(), ["line 1", "straight quotes"]),
        (b"\nname = my-server\n", ["line 2", "needs quotes"]), (b"name = /srv", ["needs quotes"]), (b"name", ["TOML"]), (b"a = 1\na = 2", ["TOML"]),
    ]  # fmt: skip

    @pytest.mark.parametrize(("data", "words"), UNREADABLE)
    def test_a_file_that_cannot_be_read_is_told_how_to_be_mended(
        self, data: bytes, words: list[str], tmp_path: object
    ) -> None:
        with pytest.raises(ptth.UserError) as caught:
            load_relay(tmp_path, data)
        (line,) = caught.value.args
        assert f"{tmp_path}/r.toml" in line and "\n" not in line
        assert all(word in line for word in words), line

    @pytest.mark.parametrize(
        ("name", "word"),
        [("fifo", "pipe"), ("", "directory"), ("no\0ne", "NUL"), ("/dev/zero", "device"), ("fifo/x", "cannot read"), ("x", "how")],
    )  # fmt: skip
    def test_what_is_no_file_is_no_configuration(self, name: str, word: str, tmp_path: object) -> None:
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(ptth.UserError, match=word):
            ptth.read_toml(os.path.join(tmp_path, name), "how")  # a pipe would wait, and a device go on, for ever

    def test_a_path_in_double_quotes_may_be_spoilt_by_its_backslashes(self) -> None:
        with pytest.raises(ptth.UserError, match="single quotes"):
            ptth.check_root("C:\temp\new", "DIR")

    MODES = [  # (mode, whether the file is another user's, whether it is on a read-only mount, whether it is accepted)
        (0o600, False, False, True), (0o400, False, False, True), (0o644, False, False, False), (0o444, False, False, False), (0o440, False, False, False),
        (0o444, True, False, True), (0o440, True, False, True), (0o644, True, False, False), (0o464, True, False, False), (0o446, True, False, False),
        (0o644, False, True, True), (0o444, False, True, True), (0o666, True, True, False),
    ]  # fmt: skip

    @pytest.mark.parametrize(("mode", "foreign", "mounted", "accepted"), MODES)
    def test_who_may_read_the_servers_file(
        self, mode: int, foreign: bool, mounted: bool, accepted: bool, tmp_path: object,
        monkeypatch: Patch, capfd: Output
    ) -> None:  # fmt: skip
        path = tmp_path / "s.toml"
        path.write_text(f'name = "a"\napi_key = "{KEY}"\n')
        path.chmod(mode)
        if foreign:
            monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
        if mounted:
            real = os.statvfs(path)
            monkeypatch.setattr(
                os, "statvfs", lambda _: os.statvfs_result((*real[:8], real.f_flag | os.ST_RDONLY, real[9]))
            )
        if accepted:
            assert ptth.load_server_config(str(path), {}, to_connect=False).api_key == KEY
            assert capfd.readouterr().err.count("\n") == (mode & 0o077 != 0)
        else:
            with pytest.raises(ptth.UserError, match="chmod 600"):
                ptth.load_server_config(str(path), {}, to_connect=False)

    def test_the_key_may_come_from_the_environment(self, tmp_path: object, monkeypatch: Patch) -> None:
        monkeypatch.setenv("PTTH_API_KEY", f" {KEY}x\n")  # as a secret that was made with echo has it
        flags = {"name": "a", "relay_url": "http://r.example", "file_server_root": str(tmp_path)}
        path = str(tmp_path / "s.toml")
        assert ptth.load_server_config(path, flags, optional=True).api_key == KEY + "x"
        with pytest.raises(ptth.UserError, match="there is no"):
            ptth.load_server_config(path, flags)
        assert load_server(tmp_path, 'name = "a"', to_connect=False).api_key == KEY + "x"
        text = f'name = "a"\napi_key = "{KEY}"'
        assert load_server(tmp_path, text, to_connect=False).api_key == KEY  # the file goes before it
        monkeypatch.setenv("PTTH_API_KEY", "short\udcff")
        with pytest.raises(ptth.UserError, match="PTTH_API_KEY in the environment has 6 characters"):
            load_server(tmp_path, 'name = "a"', to_connect=False)

    @pytest.mark.parametrize(
        ("url", "good"),
        [("https://n.example/a?b#c", True), ("HTTP://n.example", True), ("/news", True), ("../../news.html", True), ("?x=a:b", True), ("./a:b", True),
         ("//n.example/", True), ("", True), ("javascript:alert(1)", False), ("JavaScript:alert(1)", False), (" javascript:alert(1)", False),
         ("java\\nscript:alert(1)", False), ("\\u0001javascript:alert(1)", False), ("data:text/html,x", False), ("http:n.example", False),
         ("http://", False), ("vbscript:x", False), ("a b", False)],
    )  # fmt: skip
    def test_the_news_may_be_anywhere_but_in_a_script(self, url: str, good: bool, tmp_path: object) -> None:
        if good:
            assert load_relay(tmp_path, f'news_url = "{url}"').news_url == url
        else:
            with pytest.raises(ptth.UserError, match="news_url"):
                load_relay(tmp_path, f'news_url = "{url}"')

    def test_dev_mode_may_be_switched_off(self, tmp_path: object) -> None:
        assert not load_relay(tmp_path, "dev_mode = false").dev_mode

    def test_scraper_keys_are_read_from_strings_and_date_times(self, tmp_path: object) -> None:
        block = f"[[scraper_keys]]\nname='a'\nhash='{self.TRIP}'\n"
        span = "not_before='2026-01-01T00:00:00+01:00'\nnot_after=2026-01-30T00:00:00Z\n"
        config = load_relay(tmp_path, f"{block}{span}[dev_mode]\n")
        assert config.scraper_keys == [ptth.ScraperKey("a", self.TRIP, 1767222000.0, 1769731200.0)]
        assert config.dev_mode

    @pytest.mark.parametrize(("domain", "fails"), [("old.example", False), ("new.example", True)])
    def test_hosts_are_compared_below_the_domain_that_is_used(
        self, domain: str, fails: bool, start: object, tmp_path: object
    ) -> None:
        path = tmp_path / "r.toml"
        servers = f"[[servers]]\nname='a'\ntripcode='{self.TRIP}'\n[[servers]]\nname='b'\ntripcode='{self.TRIP}'\n"
        path.write_text(f"domain='old.example'\nport=0\n{servers}host='a.{domain}'\n")
        relay = start("relay", "--config", str(path), "--domain", "new.example", cwd=tmp_path)
        relay.wait_for("the host a.new.example would be that of b and of a" if fails else "PTTH relay for 2 servers")
        assert (relay.process.wait(20) if fails else relay.end()) == int(fails)

    def test_the_environments_proxy_and_its_exceptions(self, variables: object) -> None:
        config = ptth.ServerConfig("s.toml")
        tls, plain = (ptth.BaseURL(secure, "r.example", 443, "") for secure in (True, False))
        assert ptth.find_proxy(config, tls) is None
        variables(HTTPS_PROXY="http://p:1")
        assert ptth.find_proxy(config, tls).origin.port == 1
        assert ptth.find_proxy(config, plain) is None
        variables(NO_PROXY=".example")
        assert ptth.find_proxy(config, tls) is None
        config.proxy_url = "http://q:2"
        assert ptth.find_proxy(config, tls).origin.port == 2
        config.proxy_url = "socks5://q:2"
        with pytest.raises(ptth.UserError, match="proxy_url"):
            ptth.find_proxy(config, tls)

    def test_all_lines_of_the_relays_example_can_be_used_where_they_are(self, tmp_path: object) -> None:
        with open(os.path.join(HERE, "ptth_relay.toml.example")) as file:
            text = re.sub(r"^# (?=\[|[a-z_]+ = )", "", file.read(), flags=re.MULTILINE)
        config = load_relay(tmp_path, re.sub('"what [^"]*"', f'"{self.TRIP}"', text))
        assert config.servers and config.scraper_keys and config.dev_mode

    def test_the_examples_are_the_defaults(self, tmp_path: object) -> None:
        assert ptth.load_relay_config(os.path.join(HERE, "ptth_relay.toml.example")) == ptth.RelayConfig()
        copy = tmp_path / "ptth_server.toml"
        shutil.copy(os.path.join(HERE, "ptth_server.toml.example"), copy)
        copy.chmod(0o644)
        with pytest.raises(ptth.UserError) as caught:
            ptth.load_server_config(str(copy), {})
        assert "chmod 600" in caught.value.args[0] and "placeholder" in caught.value.args[1]  # both at once

    def test_flags_go_before_the_file_and_what_is_missing_is_named(self, tmp_path: object) -> None:
        text = f'name = "a"\napi_key = "{KEY}"\nthrottle_upload = true\n'
        config = load_server(tmp_path, text, {"name": "b", "relay_url": "https://r.example/7ZSFUKGV/"})
        assert (config.name, config.throttle_upload) == ("b", 0)
        assert config.relays == [(ptth.BaseURL(True, "r.example", 443, ""), None)]
        path = tmp_path / "s.toml"
        path.write_text('file_server_root = "/nowhere"\nextra = 1\nproxy_url = "socks5://x"')
        path.chmod(0o644)
        with pytest.raises(ptth.UserError) as caught:
            ptth.load_server_config(str(path), {})
        words = ["chmod 600", "unknown key extra", *(f"{key} is missing" for key in ("name", "api_key", "relay_url"))]
        words += ["proxy_url", "no directory /nowhere"]
        assert all(word in line for word, line in zip(words, caught.value.args, strict=True))

    RELAY_URLS = [  # (relay_url, words of the error)
        ("relay.example.com", 'write "https://relay.example.com"'), ("relay.example.com:4000/x", 'write "https://relay.example.com:4000/x"'), ("ftp://a", "https://"), ("wss://a", "https://"),
        ("https://alice:hunter2@r.example", "user or a password"), ("https://alice:hun/ter2@r.example", "cannot be used"), ("https://alice:hun#ter2@r", "cannot be used"), ("alice:hunter2@r", "https://"),
        ("https://r.example/?hunter2", "query"), ("https://r.example/#hunter2", "query"), ("https://alice:99@r:hunter2", "cannot be used"), ("http://::1:4000", "[::1]"), ("", "is missing"), ("https://", "host"),
    ]  # fmt: skip

    @pytest.mark.parametrize(("url", "words"), RELAY_URLS)
    def test_a_relay_url_that_cannot_be_used(self, url: str, words: str, tmp_path: object) -> None:
        with pytest.raises(ptth.UserError) as caught:
            load_server(tmp_path, f'{self.SERVER}relay_url = "{url}"\nfile_server_root = "/"\n')
        assert words in caught.value.args[0] and "relay_url" in caught.value.args[0]
        assert not re.search("alice|hun|ter2", caught.value.args[0])

    RELAY_LISTS = [  # (relay_url as TOML, the URLs that it means or words of the error)
        ('"https://a"', ["https://a"]), ('["https://a"]', ["https://a"]), ('["https://a", "http://b:1/x/"]', ["https://a", "http://b:1/x"]),
        ('["http://a", "https://a"]', ["http://a", "https://a"]), ('["https://a", "https://a/x"]', ["https://a", "https://a/x"]),
        ('["https://a/", "HTTPS://A:443/7ZSFUKGV"]', "relay_url has https://a twice"), ("[]", "relay_url is missing"), ('["https://a", ""]', "relay_url is missing"),
        ('["https://a", 7]', "relay_url must be a string in quotes, or a list"), ("true", "relay_url must be a string in quotes, or a list"), ('["https://a", "b"]', 'write "https://b"'),
    ]  # fmt: skip

    @pytest.mark.parametrize(("toml", "expected"), RELAY_LISTS)
    def test_several_relay_urls(
        self, toml: str, expected: list[str] | str, tmp_path: object, monkeypatch: Patch
    ) -> None:
        monkeypatch.setenv("NO_PROXY", "*")
        try:
            config = load_server(tmp_path, f'{self.SERVER}relay_url = {toml}\nfile_server_root = "/"\n')
            found = [origin.url for origin, _ in config.relays]
        except ptth.UserError as error:
            found = "; ".join(error.args)
        assert found == expected or isinstance(found, str) and expected in found and ";" not in found

    def test_each_relay_has_its_own_way_through_proxies(self, tmp_path: object, monkeypatch: Patch) -> None:
        monkeypatch.setenv("HTTPS_PROXY", "http://p:1")
        monkeypatch.setenv("NO_PROXY", "near.example")
        flags = {"relay_url": ["https://near.example", "https://far.example"]}
        relays = load_server(tmp_path, f'{self.SERVER}file_server_root = "/"\n', flags).relays
        assert [proxy and proxy.origin.port for _, proxy in relays] == [None, 1]

    def test_a_relay_url_with_the_path_of_the_backend(self) -> None:
        for url in ("https://r.example/x/7ZSFUKGV", "https://r.example/x/7ZSFUKGV/", "HTTPS://R.example:443/x//"):
            assert ptth.parse_relay_url(url).url == "https://r.example/x"

    def test_how_the_directory_is_served(self, tmp_path: object, monkeypatch: Patch) -> None:
        own = 'auth = "u:p"\nhidden = true\nfollow_symlinks = true\nlisting = false\ncors = true\nheaders = ["X-A: b", "X-C: d"]\n'
        options = load_server(tmp_path, self.SERVER + own, to_connect=False).site
        assert options == ptth.SiteOptions(True, True, False, True, (("X-A", "b"), ("X-C", "d")), "u:p")
        monkeypatch.setenv("PTTH_AUTH", "v:q")
        assert load_server(tmp_path, self.SERVER, to_connect=False).site.auth == "v:q"
        bad = 'auth = "u"\nhidden = 1\nheaders = ["x", "Date: y", "A: b\\r\\nC: d"]\n'
        with pytest.raises(ptth.UserError) as caught:
            load_server(tmp_path, self.SERVER + bad, to_connect=False)
        assert len(caught.value.args) == 5

    def test_the_original_kept_its_files_in_config(self, tmp_path: object, monkeypatch: Patch) -> None:
        monkeypatch.chdir(tmp_path)
        assert ptth.find_config(None, "x.toml") == "x.toml"
        (tmp_path / "config").mkdir()
        (tmp_path / "config" / "x.toml").touch()
        assert ptth.find_config(None, "x.toml") == os.path.join("config", "x.toml")
        (tmp_path / "x.toml").touch()
        assert ptth.find_config(None, "x.toml") == "x.toml"

    def test_the_root_and_the_home_directory_are_served_only_when_named(
        self, tmp_path: object, monkeypatch: Patch
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ptth.UserError, match="to serve it"):
            ptth.check_root("", "DIR")
        assert ptth.check_root(str(tmp_path), "DIR") == str(tmp_path)
        with pytest.raises(ptth.UserError, match="--port 8000"):
            ptth.check_root("8000", "DIR")


def run(*args: str, cwd: object = None) -> tuple[int, str, str]:
    """Run ptth.py to its end; return (status, stdout, stderr)."""
    done = subprocess.run(
        [sys.executable, PROGRAM, *args], cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout, done.stderr


class TestCommandLine:
    @pytest.fixture
    def call(self, capfd: Output) -> object:
        """Run the program to its end in this process, which is faster; return (status, stdout, stderr)."""

        def call(*args: str) -> tuple[int, str, str]:
            try:
                status = ptth.main([*args])
            except SystemExit as error:
                status = error.code
            return (status, *capfd.readouterr())

        return call

    @pytest.mark.parametrize("command", ["", "demo", "relay", "server", "file-server"])
    def test_help_fits_the_command(self, command: str, call: object) -> None:
        status, out, err = call(*command.split(), "--help")
        assert (status, err) == (0, "") and "usage: ptth.py" in out

    @pytest.mark.parametrize(
        "args",
        ["", "nonsense", "relay --port x", "file-server --port 70000", "demo --nonsense", "file-server --header x", "file-server --header Date:x", "server --app=",
         "demo --app=", "file-server --auth=", "file-server --tls-cert=", "file-server --tls-cert=c.pem --tls-key=", "server --file-server-root=", "relay --config="],
    )  # fmt: skip
    def test_wrong_usage_is_2(self, args: str, call: object) -> None:
        status, out, err = call(*args.split())
        assert (status, out, err.count("\n")) == (2, "", 1) and "--help" in err

    @pytest.mark.parametrize(
        ("args", "words"),
        [("server", "--new-key > ptth_server.toml"), ("relay --config none.toml", "none.toml"), ("file-server nowhere", "no directory"),
         ("file-server 8000", "--port 8000"), ("relay --bind 192.0.2.1 --port 0", "cannot listen"), ("server --config .", "cannot read")],
    )  # fmt: skip
    def test_a_users_mistake_is_one_line_and_1(
        self, args: str, words: str, tmp_path: object, monkeypatch: Patch, call: object
    ) -> None:
        monkeypatch.chdir(tmp_path)
        status, out, err = call(*args.split())
        last = err.splitlines()[-1]
        assert (status, out) == (1, "") and "Traceback" not in err
        assert words in last and last.startswith(f"ptth {args.split()[0]}: ")

    @pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6")
    @pytest.mark.parametrize(
        ("bind", "answering"),
        [("::", ["127.0.0.1", "::1"]), ("[::]", ["127.0.0.1", "::1"]), ("0::0", ["127.0.0.1", "::1"]), ("", ["127.0.0.1", "::1"]), ("[::1]", ["::1"]), ("::1", ["::1"]),
         ("0.0.0.0", ["127.0.0.1"]), ("127.0.0.1", ["127.0.0.1"]), ("::1%1", ["::1"]), ("[::1%251]", ["::1"]),
         (f"::1%{socket.if_nameindex()[0][1]}", ["::1"]), ("::ffff:127.0.0.1", ["127.0.0.1"]), ("[::FFFF:7f00:1]", ["127.0.0.1"])],
    )  # fmt: skip
    def test_where_a_socket_listens_and_which_urls_are_printed(self, bind: str, answering: list[str]) -> None:
        with ptth.open_socket(bind, 0) as sock:
            port = sock.getsockname()[1]
            sock.settimeout(2)

            def answers(address: object) -> bool:
                """Tell whether this socket answers there, and not that of another program with the same port."""
                try:
                    with socket.create_connection(address, timeout=20):
                        sock.accept()[0].close()
                except (ConnectionRefusedError, TimeoutError):
                    return False
                return True

            assert [host for host in ("127.0.0.1", "::1") if answers((host, port))] == answering
            urls = ptth.listening_urls(sock)
            assert urls[0] == f"http://{ptth.bracket(answering[0])}:{port}/"
            origins = map(ptth.parse_base_url, urls)
            assert all(answers((origin.host, origin.port)) for origin in origins)

    @pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6")
    def test_the_urls_of_a_socket_for_ipv6_only(self) -> None:
        with socket.create_server(("::", 0), family=socket.AF_INET6) as sock:
            urls = ptth.listening_urls(sock)
            assert urls[0].startswith("http://[::1]:") and all("[" in url for url in urls)

    def test_the_urls_of_a_link_local_address(self) -> None:
        class LinkLocal:
            family = socket.AF_INET6
            getsockname = staticmethod(lambda: ("fe80::1", 80, 0, socket.if_nameindex()[0][0]))

        assert ptth.listening_urls(LinkLocal()) == [f"http://[fe80::1%25{socket.if_nameindex()[0][1]}]:80/"]

    @pytest.mark.parametrize(
        ("bind", "words"),
        [("192.0.2.1", "192.0.2.1:0: cannot assign requested address; this machine does not have"), ("[2001:db8::1]", "[2001:db8::1]:0: "), ("fe80::1", "fe80::1%eth0"),
         ("127.0.0.1:80", "without a port"), ("[::1]:80", "without a port"), ("http://127.0.0.1", "without a port"), ("[", "cannot listen"), ("[]", "cannot listen"), ("[::1", "cannot listen"), (" ", "cannot listen"), ("a" * 99 + "..b", "cannot listen"), ("fe80::1%nope", "cannot listen")],
    )  # fmt: skip
    def test_where_nothing_can_listen(self, bind: str, words: str) -> None:
        with pytest.raises(ptth.UserError, match=r"^cannot listen on ") as caught:
            ptth.open_socket(bind, 0)
        assert words in caught.value.args[0]

    def test_a_port_that_is_taken_is_named(self, tmp_path: object) -> None:
        with socket.create_server(("127.0.0.1", 0)) as sock:
            status, _, err = run("demo", str(tmp_path), "--port", str(sock.getsockname()[1]))
        assert status == 1 and err.count("\n") == 1 and "address already in use" in err

    def test_print_tripcode_can_be_appended_to_the_relays_file(self, tmp_path: object) -> None:
        write_configs(tmp_path, 1)
        status, out, _ = run("server", "--print-tripcode", "--name", "other", cwd=tmp_path)
        assert status == 0
        both = tomllib.loads((tmp_path / "ptth_relay.toml").read_text() + out)
        assert both["servers"][1] == {"name": "other", "tripcode": ptth.tripcode(KEY)}

    @pytest.mark.parametrize("args", ["--auth x", "--tls-key x", "--tls-cert none"])
    def test_a_wrong_value_is_one_line_and_2(self, args: str, root: str, call: object) -> None:
        status, out, err = call("file-server", root, *args.split())
        assert (status, out, err.count("\n")) == (2, "", 1)

    def test_a_password_from_the_environment(self, start: object, root: str) -> None:
        server = start("file-server", root, "--port", "0", env={"PTTH_AUTH": "u:p"}).listening()
        assert one(fetch(server.port, get("/hello.txt")))[0] == 401
        assert one(fetch(server.port, get("/hello.txt", "Authorization: Basic dTpw")))[2] == HELLO

    def test_a_new_key_is_a_ready_configuration(self, tmp_path: object) -> None:
        status, out, err = run("server", "--new-key", "--name", "box", "--relay-url", "https://r.example")
        config = load_server(tmp_path, out)
        assert (status, config.name, config.relay_url) == (0, "box", ["https://r.example"])
        assert tomllib.loads(err) == {"servers": [{"name": "box", "tripcode": ptth.tripcode(config.api_key)}]}
        assert config.api_key not in err and run("server", "--new-key")[1] != out
        urls = ["https://a.example", "https://b.example"]
        out = run("server", "--new-key", *(f"--relay-url={url}" for url in urls))[1]
        assert tomllib.loads(out)["relay_url"] == urls

    def test_a_new_scraper_key_is_a_ready_block(self, tmp_path: object) -> None:
        status, out, err = run("relay", "--new-scraper-key", "box")
        (key,) = load_relay(tmp_path, out).scraper_keys
        assert (status, key.name) == (0, "box") and 0 < key.not_after - time.time() <= 30 * 86400
        assert key.hash == ptth.tripcode(err.split()[-1]) and err.split()[-1] not in out
        assert run("relay", "--new-scraper-key", "a b")[0] == 2

    @pytest.mark.parametrize(
        ("command", "args", "prefix"),
        [
            ("file-server", ["--bind", "127.0.0.1"], "/"),
            ("demo", [], "/frontend/servers/demo/files/"),
            ("server", None, ""),
        ],
    )
    def test_secrets_below_the_root_are_told_and_not_served(
        self, command: str, args: list[str] | None, prefix: str, start: object, tmp_path: object
    ) -> None:
        write_configs(tmp_path, free_port(), str(tmp_path))
        options = [] if args is None else [str(tmp_path), "--port", "0", *args]
        process = start(command, *options, cwd=str(tmp_path))
        eventually(lambda: any("not served" in told for told in process.told))
        (line,) = (told for told in process.told if "not served" in told)
        assert line.startswith(f"ptth {command}: ")
        assert f"{tmp_path}/ptth_server.toml" in line and f"{tmp_path}/ptth_relay.toml" in line
        if prefix:
            port = process.listening().port
            assert one(fetch(port, get(f"{prefix}ptth_server.toml", host="localhost")))[0] == 404
            assert b"toml" not in fetch(port, get(f"{prefix}?zip"))

    def test_version(self) -> None:
        assert run("--version")[:2] == (0, f"ptth {ptth.__version__}\n")

    def test_what_was_asked_for_and_cannot_be_written_is_an_error(self) -> None:
        with open("/dev/full", "wb") as full:
            command = [sys.executable, PROGRAM, "server", "--new-key"]
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
        assert (done.returncode, done.stderr.count(b"\n")) == (1, 1)

    @pytest.mark.parametrize("args", ["demo", "file-server", "file-server .", "server --config {}"])
    def test_a_start_in_a_directory_that_is_gone_is_one_line(self, args: str, tmp_path: object) -> None:
        write_configs(tmp_path, 1, root="")
        (tmp_path / "gone").mkdir()
        script = f"rmdir ../gone; exec {sys.executable} {PROGRAM} {args.format(tmp_path / 'ptth_server.toml')}"
        done = subprocess.run(
            ["/bin/sh", "-c", script], cwd=tmp_path / "gone", capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert "absolute path" in done.stderr

    @pytest.mark.parametrize(
        "closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", "</dev/full >/dev/full 2>/dev/full", ">/dev/full 2>&-"]
    )
    def test_poor_surroundings_stop_nothing(self, closed: str, root: str) -> None:
        """No HOME, an unknown locale and time zone. And no client gets the log on its connection."""
        port = free_port()
        command = f"exec {sys.executable} {PROGRAM} file-server {root} --port {port} {closed}"
        env = {"PATH": "", "TZ": "Nowhere/Never", "LC_ALL": "xx_YY.none", "PYTHONUTF8": "0"}
        pipes = {"stdin": subprocess.PIPE, "stdout": None, "stderr": subprocess.PIPE}
        with program("/bin/sh", "-c", command, port=port, env=env, **pipes) as process:
            for _ in range(10):
                with connect(port) as sock:
                    for _ in range(2):
                        sock.sendall(get("/hello.txt").replace(b"Connection: close\r\n", b""))
                        answer = http.client.HTTPResponse(sock)
                        answer.begin()
                        assert (answer.status, answer.read()) == (200, HELLO)
        assert process.returncode == 0
        assert "Traceback" not in process.stderr.read().decode()

    @pytest.mark.skipif(not hasattr(select, "poll"), reason="no poll")
    def test_a_log_that_nobody_reads_stops_nothing(self) -> None:
        """More than a pipe holds is lost, and what comes when it is read again is there."""
        code = """import ptth, sys
ptth.STDERR_TIMEOUT = 0.01
for number in range(5000):
    ptth.log_line(f"{number:5} {'x' * 93}")
print("written", flush=True)
sys.stdin.readline()
ptth.log_line("later")
"""
        command = [sys.executable, "-c", code]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        with subprocess.Popen(command, cwd=HERE, **pipes) as process:
            killer = threading.Timer(60, process.kill)
            killer.start()
            assert process.stdout.readline() == b"written\n"
            read = os.read(process.stderr.fileno(), 4096)
            read += process.communicate(b"\n")[1]
            killer.cancel()
        lines = read.splitlines(keepends=True)
        assert 100 < len(lines) < 5000 and lines[-1] == b"later\n"
        assert [int(line.split()[0]) for line in lines[:-1]] == [*range(len(lines) - 1)]

    @pytest.mark.parametrize("error", [OSError(errno.EMFILE, "too many"), ImportError("No module named '_ssl'")])
    def test_what_is_missing_round_the_program_is_one_line(
        self, error: Exception, root: str, monkeypatch: Patch, capfd: Output
    ) -> None:
        def fail(*args: object) -> None:
            raise error

        monkeypatch.setattr(ptth, "open_socket", fail)
        assert ptth.main(["file-server", root, "--port", "0"]) == 1
        told = capfd.readouterr().err
        assert told.count("\n") == 1 and ptth.format_error(error) in told

    @pytest.mark.parametrize(("error", "lines"), [(ConnectionResetError(), 0), (ValueError("a fault"), 1)])
    def test_the_end_of_a_connection_is_no_news(
        self, error: Exception, lines: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def lose() -> None:
            ptth.stop_event(lambda: None)
            asyncio.get_running_loop().create_future().set_exception(error)

        asyncio.run(lose())
        assert len(caplog.records) == lines

    def test_a_system_without_dev_null_will_do(self, monkeypatch: Patch, call: object) -> None:
        monkeypatch.setattr(os, "devnull", "/nowhere/null")
        assert call("--version") == (0, f"ptth {ptth.__version__}\n", "")

    @needs("openssl")
    def test_a_certificate_that_cannot_be_used_is_one_line(self, tmp_path: object) -> None:
        make_certificate(tmp_path)
        (tmp_path / "own").mkdir()
        make_certificate(tmp_path / "own")
        for command in (
            "pkey -in key -aes128 -passout pass:x -out locked", "x509 -in cert -outform DER -out cert.der",
            "pkey -in key -outform DER -out key.der", "pkcs12 -export -in cert -inkey key -passout pass:x -out both.p12",
        ):  # fmt: skip
            subprocess.run(["openssl", *command.split()], cwd=tmp_path, check=True)
        (tmp_path / "empty").touch()
        (tmp_path / "half").write_bytes((tmp_path / "cert").read_bytes()[:300])
        cases = [
            ("cert", "locked", "passphrase"), ("cert", "own/key", "another certificate"), ("cert.der", "key", "-inform DER"),
            ("cert", "key.der", "-inform DER"), ("both.p12", None, "DER"), ("cert", None, "--tls-key"), ("key", "key", "no certificate"),
            ("cert", "cert", "no key"), ("empty", "key", "no certificate"), ("half", "key", "PEM"), ("cert", "none", "no such file"), (".", "key", "directory"),
        ]  # fmt: skip
        for cert, key, word in cases:
            with pytest.raises(ptth.UserError, match=word) as caught:
                ptth.load_certificate(str(tmp_path / cert), str(tmp_path / key) if key else None)
            assert str(caught.value).count("\n") == 0
        both = tmp_path / "both"
        both.write_bytes((tmp_path / "cert").read_bytes() + (tmp_path / "key").read_bytes())
        assert ptth.load_certificate(str(both), None)

    @needs("openssl")
    def test_sighup_loads_the_certificate_again(self, start: object, tmp_path: object, root: str) -> None:
        make_certificate(tmp_path)
        cert, key = tmp_path / "cert", tmp_path / "key"
        options = ["--port", "0", "--tls-cert", str(cert), "--tls-key", str(key)]
        server = start("file-server", root, *options).listening()

        def shown() -> bytes:
            with socket.create_connection(("localhost", server.port), timeout=20) as sock:
                trusting = ssl.create_default_context(cafile=cert)
                with trusting.wrap_socket(sock, server_hostname="localhost") as tls:
                    return tls.getpeercert(True)

        def kept() -> bytes:
            return ssl.PEM_cert_to_DER_cert(cert.read_text())

        first, text = kept(), (cert.read_text(), key.read_text())
        assert shown() == first
        for broken in (cert, key):
            make_certificate(tmp_path)
            broken.write_text(text[broken == key])  # one of the two is still the old one
            server.process.send_signal(signal.SIGHUP)
            server.wait_for("keeping the old certificate")
            cert.write_text(text[0])
            assert shown() == first
        for kind in (("rsa:2048",), EC):  # the old one must not stay beside one with another kind of key
            make_certificate(tmp_path, kind)
            server.process.send_signal(signal.SIGHUP)
            server.wait_for("loaded")
            assert shown() == kept() != first
        assert server.end() == 0

    def test_sighup_reads_the_servers_file_again(
        self, bare_relay: Tunnel, start: object, tmp_path: object, root: str
    ) -> None:
        other = tmp_path / "other"
        other.mkdir()
        (other / "hello.txt").write_text("other\n")
        write_configs(tmp_path, bare_relay.port, str(tmp_path))
        server = start("server", "--file-server-root", root, cwd=tmp_path)
        server.wait_for("connected to the relay")

        def again(text: str, **keys: object) -> tuple[int, dict[str, str], bytes]:
            write_configs(tmp_path, bare_relay.port, **keys)
            server.process.send_signal(signal.SIGHUP)
            server.wait_for(text)
            return bare_relay.get("/frontend/servers/n/files/.secret")

        assert again("again: serving")[0] == 404
        status, fields, body = again("again: serving", hidden=True, headers=["X-Own: yes"])
        assert (status, fields["x-own"], body) == (200, "yes", b"secret\n")
        assert again("after a restart: name, throttle_upload", name="m", throttle_upload=5, hidden=True)[0] == 200
        assert again("keeping the old configuration: ptth_server.toml: auth", auth="x")[0] == 200
        assert again("again: serving", auth="u:p", hidden=True)[0] == 401
        server.end()
        server = start("server", cwd=tmp_path)  # without the flag the file says which directory
        write_configs(tmp_path, bare_relay.port, str(other))
        server.wait_for("connected to the relay")
        server.process.send_signal(signal.SIGHUP)
        server.wait_for(f"serving {os.path.realpath(other)}")
        assert bare_relay.get("/frontend/servers/n/files/hello.txt")[2] == b"other\n"
        assert server.end() == 0

    @pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP")
    def test_a_form_of_before_sighup_can_be_sent_after_it(
        self, bare_relay: Tunnel, start: object, tmp_path: object
    ) -> None:
        write_configs(tmp_path, bare_relay.port, upload=True)
        server = start("server", cwd=tmp_path)
        server.wait_for("connected to the relay")
        page = bare_relay.get("/frontend/servers/n/files/")[2]
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("again: serving")
        path = "/frontend/servers/n/files/" + re.search(rb'action="(\?upload=[^"]+)"', page)[1].decode()
        form = b'--B\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\nx\r\n--B--\r\n'
        fields = ["Origin: null", "Content-Type: multipart/form-data; boundary=B", f"Content-Length: {len(form)}"]
        assert one(bare_relay.fetch(get(path, *fields, method="POST") + form))[0] == 303
        assert (tmp_path / "x").read_bytes() == b"x"

    @pytest.mark.parametrize("command", ["file-server", "server", "demo"])
    @pytest.mark.parametrize("name", ["SIGHUP", "SIGTERM"])
    @pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP")
    def test_a_signal_that_comes_early_is_handled(self, command: str, name: str, tmp_path: object) -> None:
        write_configs(tmp_path, free_port(), upload=True)
        code = f"""\
            import os, signal, sys
            sys.path.insert(0, {HERE!r})
            import ptth
            work = ptth.remove_partial_files

            def signal_once(root):
                ptth.remove_partial_files = work
                os.kill(os.getpid(), signal.{name})

            ptth.remove_partial_files = signal_once
            sys.exit(ptth.main())
        """
        options = [] if command == "server" else [".", "--upload", "--port", "0"]
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), command, *options],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            if name == "SIGHUP":
                assert any(b"again" in line for line in process.stderr)
                process.terminate()
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.communicate()

    def test_sighup_from_a_terminal_that_was_closed_stops(self, root: str) -> None:
        import fcntl
        import termios

        master, terminal = os.openpty()
        process = subprocess.Popen(
            [sys.executable, PROGRAM, "file-server", root, "--port", "0"],
            stdin=terminal, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            preexec_fn=lambda: (signal.signal(signal.SIGHUP, signal.SIG_DFL), fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)),
        )  # fmt: skip
        os.close(terminal)
        try:
            assert process.stdout.readline().startswith(b"Serving")
            process.send_signal(signal.SIGHUP)  # the terminal is there
            assert b"nothing to read again" in process.stderr.readline()
            os.close(master)
            assert process.wait(10) == 0
        finally:
            process.kill()
            process.wait(10)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_the_demo_serves_and_stops(self, number: int, start: object, root: str) -> None:
        demo = start("demo", root, "--port", "0").listening()
        demo.process.send_signal(signal.SIGHUP)
        demo.wait_for("nothing to read again")
        request = get("/frontend/servers/demo/files/hello.txt", host="localhost")
        assert one(fetch(demo.port, request))[2] == HELLO
        assert demo.end(number) == 0
        assert "Traceback" not in "".join(demo.told)

    def test_the_demo_stops_also_before_it_is_connected(self, root: str, monkeypatch: Patch) -> None:
        def stopped(_hang_up: object) -> asyncio.Event:
            event = asyncio.Event()
            event.set()
            return event

        async def never_connected(link: ptth.Link) -> None:
            await link._stopping.wait()

        monkeypatch.setattr(ptth, "stop_event", stopped)
        monkeypatch.setattr(ptth.Link, "run", never_connected)
        args = ptth.build_parser().parse_args(["demo", root, "--port", "0", "-q"])
        asyncio.run(asyncio.wait_for(args.run(args), 20))

    def test_the_demo_answers_to_names_of_this_machine_only(self, start: object, root: str) -> None:
        demo = start("demo", root, "--port", "0").listening()

        def status(host: str, path: str = "/frontend/servers/demo/files/hello.txt") -> int:
            return one(fetch(demo.port, get(path, host=host)))[0]

        for host in (
            "localhost", "LocalHost:80", "localhost.", "127.0.0.1", "127.1.2.3:9", "[::1]", "[::1]:4000", "127.0.0.1:",
        ):  # fmt: skip
            assert status(host) == 200, host
        for host in ("evil.example", "evil.example:4000", "localhost.evil.example", "evillocalhost", "127.0.0.1.evil.example", "[::2]", "10.0.0.1",
                     "0.0.0.0", "[::127.0.0.1]", "[localhost]", "localhost:80.evil.example", ""):  # fmt: skip
            assert status(host) in (403, 400), host
            assert status("localhost", f"http://{host or 'x'}/frontend/servers/") in (403, 400), host
        text = fetch(demo.port, get("/"))
        assert text.startswith(b"HTTP/1.1 403 ") and b"localhost" in text and b"example.com" in text

    def test_both_families_by_default(self, start: object, root: str) -> None:
        server = start("file-server", root, "--port", "0").listening()
        assert one(fetch(server.port, get("/hello.txt")))[0] == 200
        if socket.has_dualstack_ipv6():
            with socket.create_connection(("::1", server.port), timeout=20) as sock:
                sock.sendall(get("/hello.txt"))
                assert sock.recv(12) == b"HTTP/1.1 200"


def begin_download(port: int, path: str) -> socket.socket:
    """Start a download from server n; return its connection after the first bytes."""
    sock = connect(port, get("/frontend/servers/n/files" + path), patience=30)
    assert sock.recv(15).startswith(b"HTTP/1.1 200 OK")
    return sock


class Pair:
    """A relay and a server as two processes, with their files in one directory."""

    def __init__(self, start: object, where: object, root: str, port: int = 0, **more: object) -> None:
        self.start, self.where = start, where
        self.port = port or free_port()
        write_configs(where, self.port, root, **more)
        self.start_relay()
        self.start_server()

    def start_relay(self) -> None:
        self.relay = self.start("relay", cwd=self.where).listening()

    def start_server(self) -> None:
        self.server = self.start("server", cwd=self.where)
        self.server.wait_for("connected to the relay")

    def get(self, path: str, *fields: str) -> bytes:
        return fetch(self.port, get("/frontend/servers/n/files" + path, *fields))

    def download(self, path: str) -> socket.socket:
        return begin_download(self.port, path)


def read_to_end(sock: socket.socket) -> int:
    """Read until the connection ends; return the number of bytes."""
    total = 0
    with sock, contextlib.suppress(ConnectionError):
        while piece := sock.recv(1 << 20):
            total += len(piece)
    return total


class TestRealProcesses:
    SIZE = 1 << 27  # bytes; more than all buffers on the way, and than the allowed memory

    @pytest.fixture
    def big(self, tmp_path: object) -> str:
        """Make a directory with a large sparse file; each MiB has its number."""
        (tmp_path / "files").mkdir()
        with open(tmp_path / "files" / "big", "wb") as file:
            for start in range(0, self.SIZE, 1 << 20):
                file.seek(start)
                file.write(b"%d" % start)
            file.truncate(self.SIZE)
        (tmp_path / "files" / "hello.txt").write_bytes(HELLO)
        return str(tmp_path / "files")

    @pytest.fixture
    def pair(self, start: object, tmp_path: object, big: str) -> Pair:
        return Pair(start, tmp_path, big)

    def test_it_runs_as_a_module_without_being_compiled_anew(self, tmp_path: object) -> None:
        """As the README's unit starts it: that names the directory in which it lies."""
        program = tmp_path / "ptth.py"
        shutil.copy(PROGRAM, program)
        python = [sys.executable, "-m"]
        mode = "--invalidation-mode=unchecked-hash"  # Python believes it whatever the source says
        subprocess.run([*python, "compileall", "-q", mode, "."], cwd=tmp_path, check=True)
        program.write_text("raise SystemExit('compiled anew')\n")
        done = subprocess.run([*python, "ptth", "--version"], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["ptth", ptth.__version__]
        with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
            (command,) = re.findall(r"WorkingDirectory=/opt/ptth\nExecStart=\S+ -m ptth (.+)\n", file.read())
        for name in ("relay", "server"):
            arguments = ptth.build_parser().parse_args(command.replace("%i", name).split())
            assert (arguments.command, arguments.config) == (name, f"/etc/ptth/ptth_{name}.toml")

    def test_a_large_file_arrives_whole_in_little_memory(self, pair: Pair, big: str) -> None:
        got = hashlib.sha256()
        connection = http.client.HTTPConnection("127.0.0.1", pair.port, timeout=60)
        connection.request("GET", "/frontend/servers/n/files/big")
        answer = connection.getresponse()
        while piece := answer.read(1 << 20):
            got.update(piece)
        connection.close()
        with open(os.path.join(big, "big"), "rb") as file:
            assert got.digest() == hashlib.file_digest(file, "sha256").digest()
        assert pair.relay.peak_mib() < 60 and pair.server.peak_mib() < 60

    def test_a_client_that_leaves_stops_the_servers_reading(self, pair: Pair) -> None:
        counts = []
        for _ in range(9):
            sock = pair.download("/big")
            eventually(lambda: self.opens(pair.server, "big"))
            sock.close()
            eventually(lambda: not self.opens(pair.server, "big"))
            assert one(pair.get("/hello.txt"))[2] == HELLO
            counts.append(pair.server.descriptors())
        eventually(lambda: pair.server.descriptors() < counts[0] + 8)  # each of the eight would leave one at least

    @staticmethod
    def opens(process: Process, name: str) -> bool:
        base = f"/proc/{process.process.pid}/fd"
        for fd in os.listdir(base):
            with contextlib.suppress(OSError):
                if os.readlink(f"{base}/{fd}").endswith(name):
                    return True
        return False

    def test_a_client_that_does_not_read_costs_no_memory(self, pair: Pair) -> None:
        sock = pair.download("/big")
        eventually(lambda: self.opens(pair.server, "big"))
        assert one(pair.get("/hello.txt"))[2] == HELLO
        assert pair.relay.peak_mib() < 60
        assert read_to_end(sock) > self.SIZE

    def test_a_killed_server_never_looks_like_a_complete_response(
        self, start: object, tmp_path: object, big: str
    ) -> None:
        pair = Pair(functools.partial(start, FETCH_GRACE=0.1), tmp_path, big)
        sock = pair.download("/big")
        pair.server.end(signal.SIGKILL)
        assert read_to_end(sock) < self.SIZE
        pair.start_server()
        assert one(pair.get("/hello.txt"))[2] == HELLO

    def test_the_server_comes_back_to_a_killed_relay_by_itself(self, pair: Pair) -> None:
        sock = pair.download("/big")
        pair.relay.end(signal.SIGKILL)
        assert read_to_end(sock) < self.SIZE
        pair.server.wait_for("cannot reach the relay")
        pair.start_relay()
        pair.server.wait_for("connected to the relay")
        assert one(pair.get("/hello.txt"))[2] == HELLO

    @pytest.mark.parametrize("side", ["relay", "server"])
    def test_a_stop_finishes_what_is_in_flight(self, side: str, pair: Pair) -> None:
        sock = pair.download("/big")
        process = getattr(pair, side)
        process.process.send_signal(signal.SIGTERM)
        assert read_to_end(sock) > self.SIZE
        assert process.process.wait(20) == 0
        assert "Traceback" not in "".join(process.told)

    def test_nothing_stays_behind(self, pair: Pair) -> None:
        assert one(pair.get("/hello.txt"))[0] == 200
        before = pair.relay.descriptors(), pair.server.descriptors()
        for fields in (["Range: bytes=0-1"], ["If-None-Match: *"], []):
            for path in ("/hello.txt", "/missing", "/", "/%00"):
                pair.get(path, *fields)
        pair.download("/big").close()
        eventually(lambda: pair.relay.descriptors() < before[0] + 9 and pair.server.descriptors() < before[1] + 9)

    def test_the_key_is_told_to_nobody(self, pair: Pair) -> None:
        for process in (pair.relay, pair.server):
            with open(f"/proc/{process.process.pid}/cmdline") as file:
                assert KEY not in file.read() + "".join(process.told)


class TestFaults:
    """Real processes that are killed, stopped, starved and attacked."""

    MEDIUM = 8_000_000  # bytes; more than all buffers on the way

    @pytest.fixture
    def files(self, tmp_path: object) -> str:
        (tmp_path / "files").mkdir()
        (tmp_path / "files" / "hello.txt").write_bytes(HELLO)
        (tmp_path / "files" / "medium").write_bytes(os.urandom(self.MEDIUM))
        return str(tmp_path / "files")

    @pytest.fixture
    def pair(self, start: object, tmp_path: object, files: str) -> Pair:
        return Pair(start, tmp_path, files)

    @needs("curl")
    def test_a_download_is_resumed_after_the_server_was_killed(
        self, start: object, tmp_path: object, files: str
    ) -> None:
        pair = Pair(functools.partial(start, FETCH_GRACE=0.1), tmp_path, files, throttle_upload=1_000_000)
        target = tmp_path / "copy"
        url = f"http://127.0.0.1:{pair.port}/frontend/servers/n/files/medium"
        command = ["curl", "-sf", "-C", "-", "-o", str(target), url]
        first = subprocess.Popen(command)
        eventually(lambda: target.exists() and target.stat().st_size > 100_000)
        pair.server.end(signal.SIGKILL)
        assert first.wait(10) in (18, 56)  # curl: partial file, or the connection was reset
        assert target.stat().st_size < self.MEDIUM
        write_configs(tmp_path, pair.port, files)  # without the limit
        pair.start_server()
        subprocess.run(command, check=True, timeout=60)
        with open(os.path.join(files, "medium"), "rb") as file:
            assert target.read_bytes() == file.read()

    def test_a_stopped_server_loses_nothing_and_slows_nobody(self, pair: Pair) -> None:
        pair.server.process.send_signal(signal.SIGSTOP)
        waiting = [Client(pair.port, "/files/hello.txt") for _ in range(5)]
        assert one(fetch(pair.port, get("/frontend/relay_up_check")))[0] == 200
        time.sleep(0.2)
        pair.server.process.send_signal(signal.SIGCONT)
        assert [client.answer()[2] for client in waiting] == [HELLO] * 5

    def test_a_relay_restarts_under_load(self, pair: Pair) -> None:
        answers: list[tuple[int, bytes] | None] = []
        running = True

        def ask_again(_: int) -> None:
            while running:
                try:
                    data = pair.get("/hello.txt")
                    answers.append(one(data)[::2] if data else None)
                except OSError:
                    answers.append(None)
                    time.sleep(0.02)

        with at_once(8, ask_again):
            for number, status in ((signal.SIGTERM, 0), (signal.SIGKILL, -9)):
                before = len(answers) + 100
                eventually(lambda before=before: len(answers) > before)
                assert pair.relay.end(number) == status
                pair.start_relay()
                pair.server.wait_for("connected to the relay")
            good = answers.count((200, HELLO))
            eventually(lambda: answers.count((200, HELLO)) > good + 50)
            running = False
        assert {answer for answer in answers if answer and answer[0] != 503} == {(200, HELLO)}

    def test_two_servers_of_one_name(self, start: object, tmp_path: object, files: str) -> None:
        pair = Pair(functools.partial(start, DISCONNECTED_AFTER=0.3, RENEWAL_TIME=0.3), tmp_path, files)
        second = pair.start("server", cwd=pair.where)
        second.wait_for("connected")
        eventually(lambda: b"connected (2 servers)" in fetch(pair.port, get("/frontend/servers/")))
        clients = [Client(pair.port, "/files/hello.txt") for _ in range(20)]
        second.end(signal.SIGKILL)
        assert {client.answer()[2] for client in clients} == {HELLO}
        eventually(lambda: b"(2 servers)" not in fetch(pair.port, get("/frontend/servers/")))
        assert one(pair.get("/hello.txt"))[2] == HELLO

    def test_without_descriptors_new_connections_get_503(self, files: str) -> None:
        port = free_port()
        command = f"ulimit -n 128; exec {sys.executable} {PROGRAM} file-server {files} --port {port} -q"
        with program("bash", "-c", command, port=port, stderr=subprocess.PIPE) as process:

            def ticks() -> int:
                with open(f"/proc/{process.pid}/stat") as file:
                    return int(file.read().split()[13])

            with contextlib.ExitStack() as stack:
                idle = [stack.enter_context(connect(port)) for _ in range(90)]
                refused = idle[-1].recv(1000)
                assert refused.startswith(b"HTTP/1.1 503") and b"Retry-After" in refused
                idle[0].sendall(get("/hello.txt"))
                assert idle[0].recv(1000).endswith(HELLO)
                before = ticks()
                time.sleep(0.3)
                assert ticks() - before < 15  # of 10 ms each: no busy loop
            eventually(lambda: fetch(port, get("/hello.txt")).endswith(HELLO))
        assert process.returncode == 0
        told = process.stderr.read()
        assert told.count(b"\n") <= 2, told

    @pytest.mark.parametrize("limit", [24, 64])
    def test_with_a_low_limit_of_descriptors_it_serves(self, limit: int, files: str) -> None:
        port = free_port()
        command = f"ulimit -n {limit}; exec {sys.executable} {PROGRAM} file-server {files} --port {port} -q"
        with program("bash", "-c", command, port=port):
            for target in ("/hello.txt", "/?zip", "/"):
                assert one(fetch(port, get(target)))[0] == 200

    @pytest.mark.parametrize("name", ["dup", "pipe2"])
    def test_without_descriptors_downloads_go_on(
        self, name: str, open_tunnel: object, tmp_path: object, monkeypatch: Patch
    ) -> None:
        data = os.urandom(3_000_000)
        (tmp_path / "x").write_bytes(data)
        tunnel = open_tunnel(ptth.server_handler(ptth.Site(str(tmp_path)), "n"))
        monkeypatch.setattr(os, name, failing(errno.EMFILE))
        assert tunnel.get("/frontend/servers/n/files/x")[2] == data

    def test_many_idle_clients_and_downloads_at_once(self, pair: Pair, files: str) -> None:
        digests: list[bytes] = []

        def download(_: int) -> None:
            digests.append(hashlib.sha256(one(pair.get("/medium"))[2]).digest())

        with contextlib.ExitStack() as stack:
            for _ in range(500):
                stack.enter_context(connect(pair.port))
            with at_once(20, download):
                assert one(pair.get("/hello.txt"))[2] == HELLO
        with open(os.path.join(files, "medium"), "rb") as file:
            assert digests == [hashlib.sha256(file.read()).digest()] * 20
        assert pair.relay.peak_mib() < 100 and pair.server.peak_mib() < 60

    def test_one_servers_queue_does_not_delay_anothers(self, bare_relay: Tunnel, hand: Hand) -> None:
        other = ptth.RegisteredServer(ptth.ServerEntry("other", ptth.tripcode(KEY)))
        bare_relay.relay.state.servers["other"] = other
        clients = [Client(bare_relay.port) for _ in range(200)]
        eventually(lambda: len(bare_relay.registered.waiting) == 200)
        quick = Hand(bare_relay.port, "other")
        quick.listen()
        with connect(bare_relay.port, get("/frontend/servers/other/"), patience=2) as sock:
            ((identity, _),) = quick.requests()
            assert quick.reply(identity, OK) == 200
            assert one(read(sock))[0] == 200
        for exchange in list(bare_relay.registered.waiting.values()):
            bare_relay.background.loop.call_soon_threadsafe(exchange.fail, 503, "over")
        assert {client.answer()[0] for client in clients} == {503}

    FLOODS = {
        "idle": b"", "slow head": b"GET / HT", "slow body": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n",
        "pipelined": get("/missing").replace(b"Connection: close\r\n", b"") * 3000, "extensions": chunked() + b"1;" + b"x" * 4000,
        "ranges": get("/hello.txt", "Range: bytes=" + ",".join(["0-0"] * 5000)).replace(b"Connection: close\r\n", b""),
        "fields": b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 90, "paths": b"GET " + b"/a/.." * 1300 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    }  # fmt: skip

    @staticmethod
    def median_time(port: int) -> float:
        """Return the median of the seconds for a small file."""
        times = []
        for _ in range(15):
            begin = time.monotonic()
            assert one(fetch(port, get("/hello.txt")))[2] == HELLO
            times.append(time.monotonic() - begin)
        return statistics.median(times)

    @pytest.mark.parametrize("flood", FLOODS)
    def test_an_attacker_does_not_slow_the_others(self, flood: str, start: object, files: str) -> None:
        server = start("file-server", files, "--port", "0").listening()
        quiet = self.median_time(server.port)
        with contextlib.ExitStack() as stack:
            attackers = [stack.enter_context(connect(server.port)) for _ in range(50)]
            for sock in attackers:
                sock.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    sock.send(self.FLOODS[flood])
            assert self.median_time(server.port) < 0.1 + 5 * quiet
        assert server.peak_mib() < 80

    def test_a_flood_of_wrong_keys_keeps_no_server_away(self, start: object, tmp_path: object) -> None:
        port = free_port()
        write_configs(tmp_path, port)
        with open(tmp_path / "ptth_relay.toml", "a") as file:
            file.write(f'[[servers]]\nname = "fresh"\ntripcode = "{ptth.tripcode("the-second-key-of-this-test")}"\n')
        relay = start("relay", cwd=tmp_path).listening()
        known = Hand(port)
        known.listen(0)
        assert known.answer()[0] == 200
        stop = threading.Event()
        statuses = set()

        def flood(number: int) -> None:
            hand = Hand(port, ("n", "fresh", "unknown")[number % 3])
            while not stop.is_set():
                hand.key = f"wrong-key-that-is-long-enough-{os.urandom(4).hex()}"
                hand.listen(0)
                statuses.add(hand.answer()[0])
            hand.close()

        def refused() -> int:
            return len([line for line in relay.told if "wrong key" in line or "unknown name" in line])

        with at_once(24, flood):
            eventually(lambda: refused() == 3)  # one line for each name, and one for all unknown names
            fresh = Hand(port, "fresh", "the-second-key-of-this-test")
            for _ in range(2):
                for hand in (known, fresh):
                    hand.listen(0)
                    assert hand.answer()[0] == 200
                relay.process.send_signal(signal.SIGHUP)
                relay.wait_for("read ptth_relay.toml again")
            stop.set()
        assert statuses == {401} and refused() == 3
        for hand in (known, fresh):
            hand.close()

    def test_the_relays_name_and_the_clock_may_fail_and_come_back(
        self, bare_relay: Tunnel, background: Background, monkeypatch: Patch, told: list[str]
    ) -> None:
        resolve, now = socket.getaddrinfo, time.time
        resolves = False

        def getaddrinfo(host: object, *args: object, **options: object) -> object:
            if host != "relay.example":
                return resolve(host, *args, **options)
            if not resolves:
                raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
            return resolve("127.0.0.1", *args, **options)

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        client = ptth.HTTPClient(ptth.BaseURL(False, "relay.example", bare_relay.port, ""))
        with background.inside(attending(ptth.TunnelServer(client, "n", KEY, echo))) as server:
            eventually(lambda: "name resolution" in "".join(told))
            resolves = True
            eventually(lambda: server.connected.is_set())
            for jump in (0, 1e6, -1e6):
                monkeypatch.setattr(time, "time", lambda jump=jump: now() + jump)
                assert Client(bare_relay.port).answer()[0] == 200

    @pytest.mark.skipif(not LONG, reason="takes a minute: PTTH_LONG is not set")
    def test_a_dead_link_is_noticed_and_the_address_may_change(
        self, start: object, tmp_path: object, files: str
    ) -> None:
        """No packet passes, as if the cable were cut at the server's end."""
        space, near, far = "ptth-test", "ptth-near", "ptth-far"
        setup = [f"ip netns add {space}", f"ip link add {near} type veth peer name {far}", f"ip link set {far} netns {space}",
                 f"ip addr add 198.18.77.1/24 dev {near}", f"ip link set {near} up", f"ip -n {space} addr add 198.18.77.2/24 dev {far}",
                 f"ip -n {space} link set {far} up"]  # fmt: skip
        if not shutil.which("ip") or subprocess.run(setup[0].split(), capture_output=True, check=False).returncode:
            pytest.skip("no network namespaces here")
        try:
            for command in setup[1:]:
                subprocess.run(command.split(), check=True)
            write_configs(tmp_path, 4000, files, relay_url="http://198.18.77.1:4000")
            relay = start("relay", "--bind", "198.18.77.1", cwd=tmp_path).listening()
            command = ["ip", "netns", "exec", space, sys.executable, PROGRAM, "server"]
            with open(tmp_path / "log", "wb") as log:
                server = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
            relay.wait_for("n is connected")
            subprocess.run(["ip", "-n", space, "link", "set", far, "down"], check=True)
            begin = time.monotonic()
            relay.wait_for("n is disconnected", patience=60)
            eventually(
                lambda: b"cannot reach the relay" in (tmp_path / "log").read_bytes(),
                patience=60 - (time.monotonic() - begin),
            )
            for command in (
                f"addr del 198.18.77.2/24 dev {far}",
                f"addr add 198.18.77.3/24 dev {far}",
                f"link set {far} up",
            ):
                subprocess.run(["ip", "-n", space, *command.split()], check=True)
            relay.wait_for("n is connected")
            url = "http://198.18.77.1:4000/frontend/servers/n/files/hello.txt"
            with urllib.request.urlopen(url, timeout=20) as response:
                assert response.read() == HELLO
            server.terminate()
            assert server.wait(10) == 0
        finally:
            subprocess.run(["ip", "netns", "pids", space], check=False, capture_output=True)
            subprocess.run(["ip", "netns", "del", space], check=False)
            subprocess.run(["ip", "link", "del", near], check=False, capture_output=True)

    def test_a_soak_leaves_nothing_behind(self, pair: Pair, files: str) -> None:
        """Traffic of all kinds, for one or for PTTH_LONG seconds: memory and descriptors do not grow."""
        with open(os.path.join(files, "medium"), "rb") as file:
            digest = hashlib.sha256(file.read()).digest()
        stop = 0.0
        wrong: list[object] = []

        def work(number: int) -> None:
            rng = random.Random(number)
            while time.monotonic() < stop:
                kind = rng.random()
                if kind < 0.05:
                    body = one(pair.get("/medium"))[2]
                    if hashlib.sha256(body).digest() != digest:
                        wrong.append("medium")
                elif kind < 0.1:
                    with pair.download("/medium") as sock:
                        sock.recv(rng.randrange(1, 100_000))
                elif kind < 0.2:
                    fetch(pair.port, get("/frontend/servers/n/files/hello.txt")[: rng.randrange(1, 60)])
                elif one(pair.get("/hello.txt"))[2] != HELLO:
                    wrong.append("hello")

        for round_ in range(2):  # the first warms up
            stop = time.monotonic() + (LONG if round_ and LONG else 0.5)
            with at_once(12, work):
                pass
            eventually(lambda: all(process.descriptors() < 40 for process in (pair.relay, pair.server)))
            memory = [process.resident_mib() for process in (pair.relay, pair.server)]
            if round_ == 0:
                before = memory
        assert not wrong
        assert all(now < then + 16 for then, now in zip(before, memory, strict=True)), (before, memory)

    def test_a_random_life_keeps_its_promises(
        self, background: Background, open_tunnel: object, monkeypatch: Patch
    ) -> None:
        """Clients, servers and faults in random order: every request gets its own response, or an error."""
        monkeypatch.setattr(ptth, "FETCH_GRACE", 0.2)
        rng = random.Random(7)
        served: list[str] = []

        def content(path: str) -> bytes:
            return path.encode() * (1 + 20_000 * path.startswith("/large"))

        async def handler(request: ptth.Request) -> ptth.Response:
            served.append(request.target)
            if request.target.startswith("/slow"):
                await asyncio.sleep(0.05)
            return ptth.Response(200, [("Content-Type", "text/plain")], ptth.BytesBody(content(request.target)))

        tunnel = open_tunnel(handler, response_timeout=1)  # what a fault has lost is an honest 504 then
        tasks = len(background.run(self.all_tasks()))
        clients: list[tuple[str, Client]] = []
        for i in range(150):
            action = rng.random()
            if action < 0.8:
                path = f"/{rng.choice(['quick', 'slow', 'large'])}/{i}"
                clients.append((path, Client(tunnel.port, path)))
            elif action < 0.9:
                connect(tunnel.port, get(f"/frontend/servers/n/gone/{i}")).close()
            else:
                background.run(self.break_connections(tunnel, rng))
        for path, client in clients:
            raw = client.raw()
            if raw and b"\r\n\r\n" in raw:
                status, fields, body = one(raw)
                whole = body == content(path)
                assert status in (502, 503, 504) or whole or len(body) < int(fields["content-length"])
        assert len(served) - len(set(served)) <= len(served) * 0.2  # a GET may be offered again after a break, once
        eventually(lambda: not tunnel.relay.state.exchanges)
        kept = tunnel.server.links[0].client.connections  # each is a task at the relay's end
        eventually(lambda: len(background.run(self.all_tasks())) <= tasks + len(kept))

    @staticmethod
    async def all_tasks() -> set[object]:
        return asyncio.all_tasks()

    @staticmethod
    async def break_connections(tunnel: Tunnel, rng: random.Random) -> None:
        """Reset one of the server's connections to its relay."""
        if tunnel.server.links[0].client.connections:
            rng.choice(sorted(tunnel.server.links[0].client.connections, key=id)).transport.abort()


NGINX = """user root; daemon off; worker_processes 1; pid p; error_log e; events {}
http { access_log off; client_body_temp_path .; proxy_temp_path .; fastcgi_temp_path .; uwsgi_temp_path .; scgi_temp_path .;
"""
FRONTS = {
    "nginx": ["nginx", "-e", "e", "-p", ".", "-c", "conf"],
    "haproxy": ["haproxy", "-db", "-f", "conf"],
    "caddy": ["caddy", "run", "--adapter", "caddyfile", "--config", "conf"],
}
EACH_FRONT = pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in FRONTS])


@contextlib.contextmanager
def front_of(name: str, where: object, port: int, text: str, **ports: int) -> object:
    """Run a proxy that listens on `port`. PORT and the names of other ports in its configuration are replaced."""
    for word, number in {"PORT": port, **ports}.items():
        text = re.sub(rf"\b{word}\b", str(number), text)
    (where / "conf").write_text(f"{NGINX}{text}}}\n" if name == "nginx" else text)
    home = {**os.environ, "HOME": str(where), "XDG_DATA_HOME": str(where)}
    with program(*FRONTS[name], port=port, cwd=where, env=home):
        yield


CHROMIUM = [
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync", "--disable-component-update",
    "--disable-quic",
]  # fmt: skip


class Browser:
    """Chromium by way of chromedriver (WebDriver: JSON over HTTP)."""

    def __init__(self, port: int, downloads: str) -> None:
        self.port, self.session = port, ""
        options = {
            "args": ["--headless=new", *CHROMIUM, f"--user-data-dir={downloads}/profile"],
            "prefs": {"download.default_directory": downloads, "download.prompt_for_download": False},
        }
        wanted = {"browserName": "chrome", "goog:chromeOptions": options}
        made = self.call("POST", "", {"capabilities": {"alwaysMatch": wanted}})
        self.session = f"/{made['sessionId']}"

    def call(self, method: str, path: str, data: object = None) -> object:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, f"/session{self.session}{path}", json.dumps(data) if data is not None else None)
        value = json.load(connection.getresponse())["value"]
        connection.close()
        assert not (isinstance(value, dict) and "error" in value), value
        return value

    def open(self, url: str) -> None:
        self.call("POST", "/url", {"url": url})

    def run(self, script: str) -> object:
        return self.call("POST", "/execute/sync", {"script": script, "args": []})

    def type(self, selector: str, text: str) -> None:
        element = next(iter(self.call("POST", "/element", {"using": "css selector", "value": selector}).values()))
        self.call("POST", f"/element/{element}/value", {"text": text})

    def close(self) -> None:
        self.call("DELETE", "")


@pytest.fixture
def browser(tmp_path: object) -> object:
    if not (shutil.which("chromedriver") and shutil.which("chromium")):
        pytest.skip("chromium or chromedriver is not installed")
    port = free_port()
    with (
        program("chromedriver", f"--port={port}", "--log-level=OFF", port=port),
        contextlib.closing(Browser(port, str(tmp_path))) as made,
    ):
        yield made


class TestRealPrograms:
    @needs("nginx")
    @pytest.mark.parametrize("kept", [False, True], ids=["closing", "kept-alive"])
    def test_nginx_carries_both_legs(self, kept: bool, start: object, tmp_path: object, background: Background) -> None:
        runs: list[str] = []
        (tmp_path / "big").write_bytes(os.urandom(3_000_000))
        files = ptth.server_handler(ptth.Site(str(tmp_path)), "n")

        async def handler(request: ptth.Request) -> ptth.Response:
            runs.append(request.target)
            return await files(request)

        relay, front = free_port(), free_port()
        block = """upstream relay { server 127.0.0.1:RELAY; }
            server { listen 127.0.0.1:PORT; location / { proxy_pass http://relay; client_max_body_size 0;
            proxy_http_version 1.1; proxy_request_buffering off; proxy_buffering off; } }"""
        if kept:
            block = block.replace("RELAY;", "RELAY; keepalive 16;")
            block = block.replace("http_version 1.1;", 'http_version 1.1; proxy_set_header Connection "";')
        write_configs(tmp_path, relay)
        start("relay", cwd=tmp_path).listening()
        asked = [f"/files/big?{i}" for i in range(30)]
        with front_of("nginx", tmp_path, front, block, RELAY=relay), tunnel_behind(background, front, handler):
            for path in asked:
                status, _, body = one(fetch(front, get("/frontend/servers/n" + path), half_close=False))
                assert (status, len(body)) == (200, 3_000_000)
        assert sorted(runs) == sorted(asked)  # none ran twice

    @needs("nginx")
    def test_a_front_that_refuses_responses_is_an_honest_502_at_once(self, start: object, tmp_path: object) -> None:
        (tmp_path / "big").write_bytes(os.urandom(3_000_000))
        relay, front = free_port(), free_port()
        block = "server { listen 127.0.0.1:PORT; location / { proxy_pass http://127.0.0.1:RELAY; limit_except GET { deny all; } } }"
        write_configs(tmp_path, relay, str(tmp_path))
        start("relay", cwd=tmp_path).listening()
        with front_of("nginx", tmp_path, front, block, RELAY=relay):
            server = start("server", "--relay-url", f"http://127.0.0.1:{front}", cwd=tmp_path)
            server.wait_for("connected to the relay")
            server.wait_for("by POST")  # before any client has asked
            assert one(fetch(relay, get("/frontend/servers/n/files/big"), patience=20))[0] == 502

    AS_INSTALLED = {  # with default settings
        "nginx": """client_max_body_size 1m;
            server { listen 127.0.0.1:PORT; location / { proxy_pass http://127.0.0.1:RELAY; proxy_set_header Host $http_host; } }
            server { listen 127.0.0.1:VISITORS; location / { proxy_pass http://127.0.0.1:RELAY; proxy_set_header Host $http_host;
            proxy_http_version 1.1; proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection $http_connection; } }""",
        "haproxy": """defaults\n mode http\n timeout connect 5s\n timeout client 50s\n timeout server 50s
            \nlisten x\n bind 127.0.0.1:PORT\n bind 127.0.0.1:VISITORS\n server r 127.0.0.1:RELAY\n""",
        "caddy": "{\n admin off\n auto_https off\n}\nhttp://:PORT, http://:VISITORS {\n reverse_proxy 127.0.0.1:RELAY\n}\n",
    }  # fmt: skip

    @EACH_FRONT
    def test_streams_and_large_files_pass_a_proxy_as_it_is_installed(
        self, name: str, bare_relay: Tunnel, streams: StreamApp, background: Background, tmp_path: object
    ) -> None:
        front, visitors = free_port(), free_port()
        (tmp_path / "big").write_bytes(random.Random(3).randbytes(5_000_000))
        app = ptth.App(client_of(streams.port), "public")
        files = ptth.server_handler(ptth.Site(str(tmp_path)), "n")

        async def handler(request: ptth.Request) -> ptth.Response:
            return await (files if request.target.startswith("/files") else app.handle)(request)

        ports = {"RELAY": bare_relay.port, "VISITORS": visitors}
        with (
            front_of(name, tmp_path, front, self.AS_INSTALLED[name], **ports),
            tunnel_behind(background, front, handler),
        ):
            eventually(lambda: listens(visitors))
            body = one(fetch(visitors, get("/files/big", host="n.example.com"), half_close=False))[2]
            assert body == (tmp_path / "big").read_bytes()
            asked = bare_relay.port if LONG else visitors  # a silence of the visitor's own ends at that proxy
            socket_ = Visitor(asked, "/echo")
            events = Visitor(asked, "/stream?Content-Type:%20text/event-stream%0D%0A", "Accept: */*")
            writer = streams.writers[-1]
            for pause in (0, 0, 90) if LONG >= 60 else (0, 0):
                time.sleep(pause)
                socket_.sock.sendall(b"hello")
                assert socket_.read(5) == b"hello"
                streams.loop.call_soon_threadsafe(writer.write, b"5\r\nevent\r\n")
                assert events.read(10) == b"5\r\nevent\r\n"
            socket_.close()
            events.close()

    STREAMING = {
        "nginx": """upstream r { server 127.0.0.1:RELAY; keepalive 9; } server { listen 127.0.0.1:PORT; location / { proxy_pass http://r;
            proxy_http_version 1.1; proxy_set_header Connection ""; proxy_request_buffering off; proxy_buffering off; } }""",
        "haproxy": """defaults\n mode http\n timeout connect 5s\n timeout client 5s\n timeout server 60s
            listen a\n bind 127.0.0.1:PORT\n server s 127.0.0.1:RELAY\n""",
        "caddy": """{\n admin off\n auto_https off\n}
            http://:PORT {\n bind 127.0.0.1\n reverse_proxy 127.0.0.1:RELAY {\n flush_interval -1\n }\n}\n""",
    }  # fmt: skip
    HIDDEN = b"GET /frontend/servers/n/smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
    AMBIGUOUS = [  # fields of a request whose body is another request if they are read in another way
        "Content-Length: {n}\r\nTransfer-Encoding : chunked", "Content-Length: {n}\r\nTransfer-Encoding: xchunked",
        "Content-Length: {n}\r\nTransfer-Encoding:\x0bchunked", "Content-Length: {n}\r\n Transfer-Encoding: chunked",
        "Content-Length: {n}\r\nX: y\nTransfer-Encoding: chunked", "Content-Length: {n}\r\nContent-Length: 0",
        "Content-Length: 0\r\nContent-Length: {n}", "Content-Length: +{n}", "Content-Length: {n},0", "Content-Length: 0x{n}",
        "Transfer-Encoding: chunked, identity\r\nContent-Length: {n}", "Content-Length : {n}", "Content-Length: {n} 0",
    ]  # fmt: skip

    @EACH_FRONT
    def test_no_front_and_relay_read_one_request_as_two(self, name: str, tmp_path: object, open_tunnel: object) -> None:
        asked: list[str] = []

        async def handler(request: ptth.Request) -> ptth.Response:
            asked.append(request.target)
            return ptth.text_response(200, "here")

        front = free_port()
        with front_of(name, tmp_path, front, self.STREAMING[name], RELAY=open_tunnel(handler).port):
            for method in ("GET", "POST"):
                for fields in self.AMBIGUOUS:
                    if name == "caddy" and "y\nTransfer" in fields:
                        continue  # to Caddy it is a field, which goes before the length: two requests, also for the relay
                    top = f"{method} /frontend/servers/n/first HTTP/1.1\r\nHost: a\r\n"
                    head = f"{top}{fields.format(n=len(self.HIDDEN) + 5)}\r\n\r\n"
                    with contextlib.suppress(OSError):
                        fetch(front, head.encode("latin-1") + b"0\r\n\r\n" + self.HIDDEN, patience=5)
            assert one(fetch(front, get("/frontend/servers/n/last"), half_close=False))[0] == 200
            assert "/last" in asked and "/smuggled" not in asked

    @staticmethod
    def readme(language: str, word: str = "") -> str:
        """Return the first block of that language in the README that contains `word`, without its indentation."""
        with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
            blocks = re.findall(rf"^ *```{language}\n(.*?)^ *```$", file.read(), re.MULTILINE | re.DOTALL)
        return textwrap.dedent(next(block for block in blocks if word in block))

    def front_with_a_password(self, name: str, where: object) -> str:
        """Return the README's configuration with the user me:secret."""
        if name == "caddy":
            closed = self.readme("caddy", "basicauth")
            block = self.readme("caddy").replace("{\n", "{\n" + closed, 1).replace("relay.example.com", "http://:PORT")
            coded = "$2b$04$abcdefghijklmnopqrstuu2r9OfJnfCsdneAXAGHnS4UpFFP8WIrW"
            block = block.replace("127.0.0.1:4000", "127.0.0.1:RELAY").replace("$2a$14$...", coded)
            return "{\n admin off\n auto_https off\n}\n" + block
        (where / "users").write_text("me:{PLAIN}secret\n")
        closed = self.readme("nginx", "auth_basic").replace("/etc/nginx/htpasswd", f"{where}/users")
        block = self.readme("nginx", "upstream ptth").replace("    location / { proxy_pass http://ptth; }\n", closed)
        return block.replace("4000", "RELAY").replace("443 ssl", "127.0.0.1:PORT")

    @pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in ("nginx", "caddy")])
    def test_the_readmes_password_cannot_be_walked_round(
        self, name: str, tmp_path: object, open_tunnel: object
    ) -> None:
        asked: list[ptth.Request] = []

        async def handler(request: ptth.Request) -> ptth.Response:
            asked.append(request)
            return ptth.text_response(200, "secret")

        front, below = free_port(), "/frontend/servers/n/"
        text = self.front_with_a_password(name, tmp_path)
        with front_of(name, tmp_path, front, text, RELAY=open_tunnel(handler).port):
            for up, slash, opened in itertools.product(
                ("..", "%2e%2e", ".%2E", "..%2f..", "..\\", "..%5c", "a/../..", "..;"),
                ("/", "//", "%2f", "\\", "/./"),
                ("7ZSFUKGV", "scraper", "files/secret"),
            ):
                climbing = below + slash.join([up] * 3 + [opened, "x"])
                for path in (climbing, f"/{opened}{slash}{up}{slash}{below[1:]}x"):
                    status = fetch(front, get(path), half_close=False)[9:12]
                    assert not asked and status in (b"400", b"401", b"404"), (path, status)
            assert one(fetch(front, get(below), half_close=False))[0] == 401
            with_password = get(below, "Authorization: Basic " + base64.b64encode(b"me:secret").decode())
            assert one(fetch(front, with_password, half_close=False))[2] == b"secret"
            assert "authorization" not in asked[0].headers
            for path in ("/7ZSFUKGV/http_listen/n", "/scraper/v1/test"):  # the relay's own refusals
                assert b"Basic" not in fetch(front, get(path), half_close=False), path

    def front_for_hosts(self, name: str, where: object) -> str:
        """Return the README's configuration for hosts, with a certificate of the test."""
        make_certificate(where)
        (where / "both.pem").write_text((where / "cert").read_text() + (where / "key").read_text())
        block = self.readme(name, "upstream ptth" if name == "nginx" else "")
        if name == "haproxy":
            block = block.replace(":443 ssl crt /etc/haproxy/certs/", f"127.0.0.1:PORT ssl crt {where}/both.pem")
        elif name == "caddy":
            ports = f"https_port PORT\n http_port {free_port()}\n"
            own = f"{{\n admin off\n {ports} local_certs\n skip_install_trust\n storage file_system {where}/caddy\n"
            asking = " on_demand_tls {\n ask http://127.0.0.1:4000/frontend/tls_check\n }\n}\n"
            named = block.replace("relay.example.com {", "relay.example.com, app.example.org {")
            block = own + asking + named + block.replace("relay.example.com {", "https:// {\n tls {\n on_demand\n }")
        else:
            certificate = f"ssl_certificate {where}/cert; ssl_certificate_key {where}/key;"
            block = block.replace("# ssl_certificate ...; ssl_certificate_key ...;", certificate)
            block = block.replace("server_name relay.example.com;", "server_name n.example.com;")
            block = block.replace("listen 443", "listen 127.0.0.1:PORT")
        return block.replace("127.0.0.1:4000", "127.0.0.1:RELAY")

    @needs("openssl")
    @EACH_FRONT
    def test_the_readmes_proxies_bring_hosts_and_websockets(
        self, name: str, tmp_path: object, open_tunnel: object
    ) -> None:
        async def handler(request: ptth.Request) -> ptth.Response:
            if request.upgrade:
                fields = [("Upgrade", "websocket"), ("Sec-WebSocket-Accept", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")]
                return ptth.Response(101, fields, request.body)
            return ptth.text_response(200, request.headers["x-forwarded-proto"], [("Set-Cookie", "a=b")])

        tunnel, front = open_tunnel(handler), free_port()
        trusting = ssl.create_default_context()
        trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE

        def visit() -> ssl.SSLSocket:
            return trusting.wrap_socket(connect(front), server_hostname="n.example.com")

        with front_of(name, tmp_path, front, self.front_for_hosts(name, tmp_path), RELAY=tunnel.port):
            for upgrade in (False, True):
                with visit() as client:
                    fields = Visitor.ASKS if upgrade else ["Connection: close"]
                    client.sendall("\r\n".join(["GET / HTTP/1.1", "Host: n.example.com", *fields, "", ""]).encode())
                    data = client.recv(4096)
                    client.sendall(b"ping" * upgrade)
                    while not data.endswith(b"ping" if upgrade else b"https") and (piece := client.recv(4096)):
                        data += piece
                    assert data.endswith(b"ping" if upgrade else b"https"), data
                    assert upgrade or b"a=b" in data
            # A server that dies must not get another request: the proxy has to close its P1 at the relay.
            parked = tunnel.registered.parked
            p1 = f"GET /7ZSFUKGV/http_listen/n HTTP/1.1\r\nHost: relay.example.com\r\nX-ApiKey: {KEY}\r\n"
            with visit() as client:
                client.sendall(f"{p1}Accept: application/http\r\nPTTH-Instance: {'a' * 16}\r\n\r\n".encode())
                eventually(lambda: any(poll.instance == "a" * 16 for poll in list(parked)))
            eventually(lambda: all(poll.instance != "a" * 16 or poll.is_stale() for poll in list(parked)), 5)

    @staticmethod
    def https(port: int, where: object) -> http.client.HTTPSConnection:
        """Return a client that trusts the certificate of the test."""
        context = ssl.create_default_context(cafile=where / "cert")
        return http.client.HTTPSConnection("localhost", port, context=context, timeout=20)

    @needs("openssl")
    def test_https_to_the_relay_checks_the_certificate(
        self, start: object, tmp_path: object, open_tunnel: object
    ) -> None:
        port = open_tunnel(tls=make_certificate(tmp_path)).port
        (tmp_path / "big").write_bytes(b"x" * 3_000_000)
        write_configs(tmp_path, port, relay_url=f"https://localhost:{port}/")
        start("server", cwd=tmp_path).wait_for("certificate")
        trusting = start("server", cwd=tmp_path, env={"SSL_CERT_FILE": str(tmp_path / "cert")})
        trusting.wait_for("connected")
        client = self.https(port, tmp_path)
        client.request("GET", "/frontend/servers/n/files/big")
        assert client.getresponse().read() == b"x" * 3_000_000
        client.close()
        assert trusting.end() == 0

    @needs("tinyproxy")
    @pytest.mark.parametrize("scheme", ["http", "https"])
    def test_a_forward_proxy_on_the_way(
        self, scheme: str, start: object, tmp_path: object, open_tunnel: object
    ) -> None:
        context = make_certificate(tmp_path)
        port, proxy = open_tunnel(tls=context if scheme == "https" else None).port, free_port()
        config = f'Port {proxy}\nListen 127.0.0.1\nAllow 127.0.0.1\nTimeout 60\nLogFile "{tmp_path}/proxy.log"\nBasicAuth u p\nMaxClients 50\n'
        (tmp_path / "proxy.conf").write_text(config)
        (tmp_path / "big").write_bytes(b"x" * 1_000_000)
        ways = {"relay_url": f"{scheme}://localhost:{port}/", "proxy_url": f"http://u:p@127.0.0.1:{proxy}"}
        write_configs(tmp_path, port, **ways)
        with program("tinyproxy", "-d", "-c", str(tmp_path / "proxy.conf"), port=proxy):
            start("server", cwd=tmp_path, env={"SSL_CERT_FILE": str(tmp_path / "cert")}).wait_for("connected")
            is_https = scheme == "https"
            client = (
                self.https(port, tmp_path) if is_https else http.client.HTTPConnection("localhost", port, timeout=20)
            )
            client.request("GET", "/frontend/servers/n/files/big")
            assert client.getresponse().read() == b"x" * 1_000_000
            client.close()
            assert ("CONNECT localhost" in (tmp_path / "proxy.log").read_text()) is is_https

    @needs("openssl")
    def test_a_key_in_the_served_folder_is_not_served(self, start: object, tmp_path: object) -> None:
        make_certificate(tmp_path)
        shutil.copy(tmp_path / "key", tmp_path / "key~")
        (tmp_path / "public.txt").write_text("public")
        args = ["--bind", "127.0.0.1", "--port", "0", "--tls-cert", "cert", "--tls-key", "key"]
        server = start("file-server", ".", *args, cwd=str(tmp_path)).listening()
        eventually(lambda: any("not served" in line and f"{tmp_path}/key" in line for line in server.told))
        for path, status in (("/public.txt", 200), ("/cert", 404), ("/key", 404), ("/key~", 404)):
            client = self.https(server.port, tmp_path)
            client.request("GET", path)
            assert client.getresponse().status == status
            client.close()

    @needs("openssl")
    def test_https_by_the_file_server(self, start: object, tmp_path: object, root: str) -> None:
        make_certificate(tmp_path)
        args = ["--tls-cert", str(tmp_path / "cert"), "--tls-key", str(tmp_path / "key")]
        server = start("file-server", root, "--port", "0", *args).listening()
        client = self.https(server.port, tmp_path)
        client.request("GET", "/big")
        assert client.getresponse().read() == bytes(range(256)) * 1024
        client.close()  # a kept connection: closing it once made a traceback
        client.request("POST", "/big", body=b"x" * 1_000_000)
        assert client.getresponse().status == 405
        client.close()
        trusting = ssl.create_default_context(cafile=tmp_path / "cert")

        def visit(patience: float) -> ssl.SSLSocket:
            plain = socket.create_connection(("localhost", server.port), timeout=patience)
            return trusting.wrap_socket(plain, server_hostname="localhost")

        with visit(1.5) as tls:  # the end does not take the 2 seconds of lingering
            tls.sendall(get("/hello.txt"))
            read(tls)
        idle = visit(20)
        idle.sendall(get("/hello.txt").replace(b"Connection: close\r\n", b""))
        assert idle.recv(1000)
        assert server.end(patience=10) == 0  # the clients do not answer its close
        idle.close()
        assert len(server.told) == 1, server.told

    @needs("unzip")
    def test_unzip_accepts_a_large_zip_made_in_little_memory(self, start: object, tmp_path: object) -> None:
        (tmp_path / "files").mkdir()
        large = 4_400_000_000 if LONG else 100_000_000  # more than 32 bits hold, or more than the memory allowed below
        for name, size in (("large", large), ("small", 10)):
            with open(tmp_path / "files" / name, "wb") as file:
                file.truncate(size)
        server = start("file-server", str(tmp_path / "files"), "--port", "0").listening()
        before = server.peak_mib()
        with connect(server.port, patience=60) as sock:
            sock.sendall(b"GET /?zip HTTP/1.0\r\n\r\n")
            stream = sock.makefile("rb", 1 << 20)
            while stream.readline() != b"\r\n":
                pass
            with open(tmp_path / "x.zip", "wb") as file:
                while piece := stream.read(1 << 14):  # less than the blocks of deflate, whose heads are not zeros
                    if piece.count(0) == len(piece):
                        file.seek(len(piece), os.SEEK_CUR)  # a sparse copy, too
                    else:
                        file.write(piece)
                file.truncate()
        assert server.peak_mib() - before < 25  # beyond what the program itself needs
        done = subprocess.run(
            ["unzip", "-tq", tmp_path / "x.zip"], capture_output=True, text=True, timeout=300, check=False
        )
        assert "No errors detected" in done.stdout, done

    def test_a_browser_sorts_filters_and_downloads(
        self, files_tunnel: Tunnel, tmp_path: object, browser: Browser
    ) -> None:
        browser.open(f"http://127.0.0.1:{files_tunnel.port}/frontend/servers/n/files/")
        names = (
            "return [...document.querySelectorAll('tbody tr')].filter(r => !r.hidden).map(r => r.cells[0].textContent)"
        )
        everything = browser.run(names)
        assert "hello.txt" in everything and everything[0].endswith("/")
        browser.run("document.querySelector('button[value=size]').click()")
        eventually(lambda: browser.run("return location.search") == "?sort=size")
        assert browser.run(names)[-1] == "big"
        browser.type("#filter", "HELLO")
        eventually(lambda: browser.run(names) == ["hello.txt"])
        for text in (
            "\u00dcML\u00c4",
            "U\u0308mla\u0308",
            "\u00fcMLA\u0308",
        ):  # composed, and decomposed as a Mac has it
            browser.run("document.querySelector('#filter').value = ''")
            browser.type("#filter", text)
            eventually(lambda: browser.run(names) == ["\u00fcml\u00e4ut.txt"])
        browser.run("document.querySelector('button[name=zip]').click()")
        eventually(lambda: (tmp_path / "files.zip").exists())

    @needs("curl")
    def test_curl_resumes_a_download(self, files_tunnel: Tunnel, tmp_path: object) -> None:
        target = tmp_path / "big"
        target.write_bytes((bytes(range(256)) * 1024)[:100_000])
        url = f"http://127.0.0.1:{files_tunnel.port}/frontend/servers/n/files/big"
        subprocess.run(["curl", "-sSf", "-C", "-", "-o", target, url], check=True, timeout=60)
        assert target.read_bytes() == bytes(range(256)) * 1024

    @needs("wget")
    def test_wget_mirrors_a_folder(self, files_tunnel: Tunnel, tmp_path: object) -> None:
        url = f"http://127.0.0.1:{files_tunnel.port}/frontend/servers/n/files/sub/"
        subprocess.run(["wget", "-q", "-r", "-np", "-nH", "--cut-dirs=5", url], cwd=tmp_path, check=True, timeout=60)
        assert (tmp_path / "file").read_bytes() == b"in sub\n"

    @needs("chromium")
    def test_chromium_shows_the_listing_through_the_tunnel(self, files_tunnel: Tunnel, tmp_path: object) -> None:
        url = f"http://127.0.0.1:{files_tunnel.port}/frontend/servers/n/files/"
        command = ["chromium", "--headless", *CHROMIUM, f"--user-data-dir={tmp_path}", "--dump-dom", url]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        assert '<a href="hello.txt">hello.txt</a>' in shown


if __name__ == "__main__":
    sys.exit(pytest.main([os.path.abspath(__file__), *sys.argv[1:]]))
