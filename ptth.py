#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
# SPDX-License-Identifier: AGPL-3.0-or-later
"""PTTH: an HTTP server that makes only outgoing connections and is still reached by any HTTP client.

    Client -> Firewall -> Relay <- Firewall <- Server

The server behind the firewall sends a long poll to a relay on a public host.  The relay answers that poll with the
clients' requests, and the server sends each response to the relay in the body of a POST:

    P1  server -> relay    GET /7ZSFUKGV/http_listen/NAME: "is there a request for me?"
    P2  client -> relay    any request below /frontend/servers/NAME/
    P3  relay -> server    the answer to P1: every request that waits, as application/http
    P4  the server answers the request
    P5  server -> relay    POST /7ZSFUKGV/http_response/ID: the response, streamed
    P6  relay -> client    the response, streamed as it arrives
    P7  relay -> server    the answer to P5: 200 when the client has it all, 410 when the client went away

Small responses go together in one POST to http_responses/NAME, a batch; with Prefer: wait=N it is the next P1, too.  A
request's body that is too large for P3 is fetched by the server, with GET /7ZSFUKGV/http_request/ID.

This file is the whole program.  It reads from top to bottom; each section uses only those above it:

    1  Constants and errors    limits with units and reasons, the error that carries a status
    2  Tripcodes               BLAKE3, and what makes a key too weak
    3  Messages                headers, request, response, body, and the type of a handler
    4  Syntax                  heads and framing: bytes to values and back; pure
    5  Connections and bodies  heads and bodies over sockets
    6  Pages                   the HTML that people see; pure
    7  HTTP server             connections and their requests: time-outs, access log, graceful stop
    8  HTTP client             kept-alive connections to one server
    9  Forwarding              fields that a proxy drops, adds and changes; a web app as a handler
    10 File server             a path to a file, a listing or a zip; dates, ranges, tags
    11 Tunnel messages         the format of requests and responses inside P3 and P5; pure
    12 Rust form               the same for ptth_relay and ptth_server in Rust (MessagePack); pure
    13 Relay state             a relay's configuration, its servers, and requests in flight
    14 Relay desk              what a relay shows: pages, scraper API, metrics, audit log
    15 Relay                   P2 to P1, P5 to P6
    16 Server                  P1, P4, P5
    17 Configuration           TOML to dataclasses
    18 Command line            demo, relay, server, file-server

Start with `Handler` in section 3.  A file server is a handler given to an HTTP server; a PTTH server is the same
handler given to `TunnelServer`; `Relay.handle` is a handler, too: it gets the response from the server that polls it.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):
    sys.exit(f"ptth needs Python 3.11 or newer, and this is {sys.version.split()[0]}: try python3.11 or later")

import asyncio
import base64
import contextlib
import dataclasses
import errno
import functools
import io
import ipaddress
import itertools
import math
import os
import re
import select
import signal
import socket
import stat
import struct
import threading
import time
import traceback
import urllib.parse
import weakref
import zlib
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol, TypeAlias, TypeVar

if TYPE_CHECKING:  # argparse is slow to import, and some Pythons have no ssl
    import argparse
    import ssl

__version__ = "2.0.0"

# -- 1. Constants and errors --
# Limits with their units and reasons. Does not use the other sections.

MAX_HEAD = 32 * 1024  # bytes, as nginx; a larger head gets 431
MAX_FIELDS = 100  # header fields, as Apache and http.client; more get 431
MAX_MEMBERS = 100  # members of a list in a field; browsers and caches send about twenty
MAX_LINK = 8 * 1024  # bytes of all Link fields of a response; longer ones do not reach the client
MAX_CHALLENGES = 2 * 1024  # bytes of WWW-Authenticate; a longer one does not reach the client
MAX_REQUEST_LINE = 8 * 1024  # bytes; RFC 9112, 3 recommends at least 8000; a longer one gets 414
MAX_BLANK_LINES = 4  # empty lines accepted before a request line (RFC 9112, 2.2); more get 400
MAX_INNER_HEAD = 48 * 1024  # bytes of a head inside the tunnel: the relay has added Via and X-Forwarded-*
MAX_INNER_FIELDS = 128  # header fields inside the tunnel, for the same reason
MAX_CHUNK_LINE = 4 * 1024  # bytes of a chunk's size and extensions; more get 400
MAX_CHUNK_WASTE = 64 * 1024  # bytes of chunk extensions and trailers in one body, which are discarded; more get 400
MAX_INTERIM = 64  # interim responses before one response; more are an error (502)
MAX_DRAIN = 64 * 1024  # bytes of an unwanted body that are read to keep the connection; more close it
IDLE_TIMEOUT = 75.0  # seconds that a connection stays open without a request; as nginx
HEAD_TIMEOUT = 10.0  # seconds from a head's first byte to its last
STALL_TIMEOUT = 60.0  # seconds without a byte moving after which a connection is aborted; as nginx
RELAY_STALL_TIMEOUT = 240.0  # the same for a request that is sent, such as P5: a relay aborts a stalled client earlier
P7_TIMEOUT = 3600.0  # seconds to wait for P7: it comes after the client has read also what kernels had buffered
LINGER_TIMEOUT = 2.0  # seconds without a byte after which a half-closed connection is closed (RFC 9112, 9.6)
MAX_LINGER_TIMEOUT = 30.0  # seconds after which it is closed in any case
MAX_LINGER = 64 * 1024 * 1024  # bytes discarded from it after which it is closed in any case
EXPECT_TIMEOUT = 1.0  # seconds that a client waits for 100 Continue before it sends a body (RFC 9110, 10.1.1)
GRACE_PERIOD = 30.0  # seconds that requests in flight have to finish at a stop
SWEEP_INTERVAL = 0.25  # seconds between two checks of all deadlines
SMALL_BODY = 128 * 1024  # bytes; up to this size a file is read at once and sent in one write with the head
WRITE_HIGH_WATER = 64 * 1024  # bytes; with more in a connection's buffer, `send` waits for the peer
READ_SIZE = 256 * 1024  # bytes moved at a time: large enough to be cheap, small enough to be fair
MAX_FORM_PART_HEAD = 8 * 1024  # bytes of the head of one part of a form; a file's name has 255
MAX_FORM_PARTS = 1000  # parts of one form
WRITE_SIZE = 1024 * 1024  # bytes of an upload that a thread writes at a time: 256 KiB take a third more CPU time
SYNC_SIZE = 64 * 1024 * 1024  # bytes of an upload between two calls of fsync, so that the last one is short
SPLICE_MIN = 256 * 1024  # bytes; a body with at least this many left is spliced, which costs four descriptors
SENDFILE_SIZE = 1024 * 1024  # bytes for one sendfile, which blocks the loop for about half a millisecond
ZIP_PIECE = 0xFFFF  # bytes of a file in a zip read at a time, a block of deflate: a slow reader keeps some in memory
MAX_RANGES = 64  # ranges in one request; more get the whole file (RFC 9110, 14.2)
MAX_KEY = 128  # bytes of an API key; a longer one is refused before it is hashed
STDERR_TIMEOUT = 1.0  # seconds to wait for room in a full pipe; then what is written to stderr is lost
MAX_SCRAPER_DAYS = 30  # days that a scraper's key may be valid
MAX_P3_REQUESTS = 64  # requests in one P3
MIN_HALF = 8  # requests in one P3, even if that is more than half of those in flight
MAX_BATCH_BYTES = 256 * 1024  # bytes of heads in one P3
MAX_RESPONSES_BYTES = 384 * 1024  # bytes of responses in one batch; relays of all versions read at least 432 KiB
MAX_BATCHED_BODY = 64 * 1024  # bytes of a body in a batch to a far relay; to a near one SMALL_BODY
MAX_BATCHES_BYTES = 8 * 1024 * 1024  # bytes of one name's batches that the relay reads at the same time
MAX_INLINE = 64 * 1024  # bytes of a request's body that is sent inside P3; the server fetches a longer one
MAX_INLINE_TOTAL = 16 * 1024 * 1024  # bytes of all such bodies that wait at the relay
MAX_WAITING = 1000  # requests waiting for one server; the next gets 503
MAX_SENDING = 1000  # responses of one server that are being sent to clients; the next request gets 503
MAX_STREAMS = 1000  # WebSockets and event streams of one server; the next gets 503
MIN_PART = 64 * 1024  # bytes; the smallest part of a response, for a proxy that limits request bodies
PART_INTERVAL = 25.0  # seconds without data after which the server sends an empty part, to show that it is there
PART_TIMEOUT = 35.0  # seconds without a part after which the relay ends a response in parts
PART_TRIES = 8  # attempts to send one part
MAX_AT_WORK = 128  # requests of one client address at work at one server, half of MAX_HANDLERS; the others wait
MAX_FROM_ADDRESS = 500  # requests from one client address waiting or in flight at one server; the next gets 503
MAX_LOST = 200  # ids in one PTTH-Lost: 6.6 KiB, and nginx accepts 8 KiB for one field
MAX_INSTANCES = 64  # servers of one name that are counted
SPARE_DESCRIPTORS = 64  # or half, for files and open connections; with only these left, a new connection gets 503
MAX_ACCEPTS = 32  # connections accepted in one turn of the loop; fewer than SPARE_DESCRIPTORS
HASH_SHARE = 0.2  # share of the relay's time for hashing unverified keys of registered names
STRANGER_SHARE = 0.05  # the same for names that are not registered; a hash without the blake3 package takes 0.1 ms
HASH_WAIT = 10.0  # seconds that a request waits for its key's hash, then 503
MAX_PARKED = 64  # P1 waiting for one name; one more ends the oldest
MAX_HANDLERS = 256  # requests that a server handles at the same time; others wait at the relay
MAX_RUST_FIELD = 3 * 1024  # bytes of the field with the response's head in a P5 of the Rust form; usual are 300
MAX_RUST = 4 * 1024 * 1024  # bytes of a P3 in the Rust form: each byte of a field's value is one or two bytes of it
MAX_AUDIT_EVENTS = 1000  # lines of the audit log; older ones are forgotten
MAX_AUDIT_ROWS = 200  # lines of it shown on its page
MAX_AUDIT_TEXT = 200  # characters of a path or an address in it
MAX_QUERY = 1000  # characters of a query in which a directory's options are looked for
MAX_LOGGED = 1000  # characters of a request line, of Referer and of User-Agent in the access log
MAX_UNREGISTERED = 100  # names shown at /frontend/unregistered_servers
POLL_WAIT = 25.0  # seconds that a P1 waits; common proxies give up after 60, the server in Rust after 30
P1_TIMEOUT = 35.0  # seconds after which the server closes an unanswered P1 and polls again
RESPONSE_TIMEOUT = 50.0  # seconds for a response's head, then 504; nginx itself gives up after 60
FETCH_GRACE = 5.0  # seconds in which a P5 may follow one that broke off, or a broken fetch of the request's body
RECONNECT_WAIT = 10.0  # seconds that a request waits for a server without a connection, then 503
RENEWAL_TIME = 2.0  # seconds that a P1 stays open at least; a server treats a quicker empty P3 as an error
DISCONNECTED_AFTER = 2.0  # seconds without a connection before a server is shown as disconnected
MAX_CHECK_AGE = 10.0  # seconds; three health checks within them mean that a balancer checks this relay
DRAIN_TIME = 7.0  # seconds that such a relay still serves at a stop; HAProxy needs 3 failed checks, one every 2 s
UNAVAILABLE_AFTER = 60.0  # seconds without a connection after which new requests do not wait, but get 503 at once
MAX_IDLE_AGE = 20.0  # seconds; an idle connection older than this is not reused: a NAT may have dropped it
APP_IDLE_AGE = 0.5  # the same for an app while a request waits: if it has one thread, that serves the idle connection
APP_RESPONSE_TIMEOUT = 300.0  # seconds for the head of an app's response, then 504
PROBE_TIMEOUT = 5.0  # seconds for an app's answer to GET / before a first POST, which is then sent without one
APP_WAIT = 2.0  # seconds in which a connection to an app is tried again, because it may be restarting
CONNECT_TIMEOUT = 10.0  # seconds to open a connection
CONNECT_DELAY = 0.25  # seconds before the next address of a name is tried, too (RFC 8305, 5)
BACKOFF_MIN = 0.1  # seconds before the second attempt to reach the relay
BACKOFF_MAX = 3.0  # seconds before any later attempt, at most
REFUSED_DELAY = 5.0  # seconds before the next attempt when a key or a proxy's settings must be changed first
NEAR_ROUND_TRIP = 0.005  # seconds; with a shorter round trip to the relay one P1 is best, otherwise FAR_P1
SAMPLES = 3  # round trips measured; the shortest counts
MEASURE_INTERVAL = 300.0  # seconds after which the server measures again
FAR_P1 = 8  # P1 open at the same time
MAX_BATCHES = 4  # batches of responses in flight at the same time; a near relay gets several only while they are full
BACKEND = "/7ZSFUKGV/"  # the beginning of the paths of P1 and P5


class ProtocolError(Exception):
    """An error that becomes a response with `status`, and with `reason` as its text.

    A parser only raises it; its caller sends the response. `close`: close the connection after it, because the start
    of the next message is unknown. `headers`: further fields of the response.
    """

    def __init__(self, status: int, reason: str, *, close: bool = False, headers: Iterable[tuple[str, str]] = ()):
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.close = close
        self.headers = list(headers)


class IncompleteBody(ConnectionError):
    """A body that ended before its length. A message with that body must not look complete to its receiver."""


class UserError(Exception):
    """A mistake in flags, files or the environment. `main` prints each of `lines` on stderr and exits with `status`."""

    def __init__(self, *lines: str, status: int = 1) -> None:
        super().__init__(*lines)
        self.status = status


def format_error(error: BaseException) -> str:
    """Format an error as text of one line."""
    if isinstance(error, OSError) and error.errno and type(error).__module__ == "builtins":
        return os.strerror(error.errno).lower()  # asyncio and socket add the address, which the caller prints
    if numbers := re.findall(r"\[Errno ([0-9]+)\]", str(error)):  # from asyncio, for several addresses
        return ", ".join(dict.fromkeys(os.strerror(int(number)).lower() for number in numbers))
    if isinstance(error, TimeoutError) and not str(error):
        return "no answer in time"
    return str(getattr(error, "strerror", None) or error) or type(error).__name__


class _Stderr:
    """Descriptor 2. Not sys.stderr, which keeps unwritten text and raises again at exit."""

    _stuck = False  # text was lost, and none has been written since
    _piece = getattr(select, "PIPE_BUF", 4096)  # bytes that never block when a pipe is ready

    def write(self, text: str) -> None:
        """Write; a full disk or a closed stderr is ignored.

        A pipe that is not read must not stop the program: after STDERR_TIMEOUT text is lost, until it is read again.
        """
        data = text.encode("utf-8", "backslashreplace")
        with contextlib.suppress(OSError):
            for start in range(0, len(data), self._piece):
                if self._is_ready():
                    os.write(2, data[start : start + self._piece])

    def _is_ready(self) -> bool:
        """Return whether a write does not block. Wait for that, unless text was lost already."""
        if not hasattr(select, "poll"):
            return True  # Windows cannot tell
        poll = select.poll()
        poll.register(2, select.POLLOUT)
        self._stuck = not poll.poll(0 if self._stuck else STDERR_TIMEOUT * 1000)
        return not self._stuck


write_stderr = _Stderr().write

# Control characters in a client's text could control the operator's terminal, or forge a line of the log.
CONTROL_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}


def log_line(line: str) -> None:
    """Write one line for the operator on stderr."""
    write_stderr(line.translate(CONTROL_ESCAPES) + "\n")


def log_fault() -> None:
    """Log the traceback of the current exception, which is a fault in this program."""
    for line in traceback.format_exc().splitlines():
        log_line(line)


# -- 2. Tripcodes --
# The tripcode of an API key: the relay knows only that. Does not use HTTP.

_IV = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19)
_PERMUTATION = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)  # of a block's words, after each round
_MIXES = (  # the eight quarter rounds: four columns, then four diagonals
    (0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15),
    (0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14),
)  # fmt: skip
_CHUNK_START, _CHUNK_END, _ROOT = 1, 2, 8  # flags of a block
_BLOCK = 64  # bytes


def _compress(chain: tuple[int, ...], block: bytes, flags: int) -> tuple[int, ...]:
    """Return the chaining value after one block of at most 64 bytes of chunk number 0 (BLAKE3, 2.2)."""
    message = struct.unpack("<16I", block.ljust(_BLOCK, b"\0"))
    v = [*chain, *_IV[:4], 0, 0, len(block), flags]
    for _ in range(7):
        for i, (a, b, c, d) in enumerate(_MIXES):
            for word, turn_d, turn_b in ((message[2 * i], 16, 12), (message[2 * i + 1], 8, 7)):
                v[a] = (v[a] + v[b] + word) & 0xFFFFFFFF
                x = v[d] ^ v[a]
                v[d] = (x >> turn_d | x << (32 - turn_d)) & 0xFFFFFFFF
                v[c] = (v[c] + v[d]) & 0xFFFFFFFF
                x = v[b] ^ v[c]
                v[b] = (x >> turn_b | x << (32 - turn_b)) & 0xFFFFFFFF
        message = tuple(message[i] for i in _PERMUTATION)
    return tuple(v[i] ^ v[i + 8] for i in range(8))


def builtin_blake3(data: bytes) -> bytes:
    """Return the 32-byte BLAKE3 hash of up to 1024 bytes, one chunk; for keys, so short and clear instead of fast."""
    chain: tuple[int, ...] = _IV
    for start in range(0, len(data) or 1, _BLOCK):
        flags = _CHUNK_START if start == 0 else 0
        flags |= (_CHUNK_END | _ROOT) if start + _BLOCK >= len(data) else 0
        chain = _compress(chain, data[start : start + _BLOCK], flags)
    return struct.pack("<8I", *chain)


@functools.cache
def fastest_blake3() -> Callable[[bytes], bytes]:
    """Return the blake3 package's hash function if it is installed, else the built-in one. Cached: imports are slow."""
    try:
        from blake3 import blake3  # type: ignore[import-not-found, unused-ignore]  # it may be missing
    except ImportError:
        return builtin_blake3
    return lambda data: bytes(blake3(data).digest())


def tripcode(key: str) -> str:
    """Return the tripcode of an API key: standard base64 of the BLAKE3 hash of its UTF-8 bytes."""
    return base64.b64encode(fastest_blake3()(key.encode("utf-8", "surrogateescape"))).decode("ascii")


def is_same_secret(one: bytes, other: bytes) -> bool:
    """Compare in constant time."""
    import hmac

    return hmac.compare_digest(one, other)


# Sequences that people type instead of random characters: the alphabet, and the rows and columns of a keyboard.
_LINES = (
    "abcdefghijklmnopqrstuvwxyz", "0123456789", "1234567890-=", "qwertyuiop[]", "asdfghjkl;'", "zxcvbnm,./",
    "1qaz", "2wsx", "3edc", "4rfv", "5tgb", "6yhn", "7ujm", "8ik,", "9ol.", "0p;/",
)  # fmt: skip
_WORDS = ("password", "passwort", "secret", "admin", "letmein", "welcome", "iloveyou", "changeme", "default", "server")


def _go_round(line: str, step: int) -> str:
    """Return the sequences of every `step`-th character of a line that is read as a ring, each four rounds long."""
    step %= len(line)  # a negative step reads backward
    return "\n".join((line * 4 * step)[start::step] for start in range(math.gcd(step, len(line))))


# Patterns, all in one text: words and lines in short steps count from three characters on, in longer steps from four.
_NEAR = "\n".join((*_WORDS, *(_go_round(line, step) for line in _LINES for step in (1, 2, -2, -1))))
_FAR = "\n".join(_go_round(line, step) for line in _LINES for step in range(3, len(line) - 2))
_UNSHIFTED = str.maketrans('!@#$%^&*()_+{}:"<>?', "1234567890-=[];',./")
_PATTERN_BITS = 8  # bits of chance in which pattern comes next, and in its length
MIN_KEY_BITS = 56  # bits; a tripcode may become public, and a graphics card tries 2**33 keys a second: for 97 days


def _pattern_length(text: str, at: int) -> int:
    """Return how many characters from `at` on are a word, follow a line, or repeat earlier ones, also backward."""
    length = 0
    for end in range(at + 1, len(text) + 1):
        part = text[at:end]
        known = part in _NEAR or part in text[: end - 1] or part[::-1] in text[:at]
        if known or end - at > 3 and part in _FAR:
            length = end - at
        elif end - at > 3:
            break
    return length


def _estimate_bits(text: str) -> float:
    """Estimate a text's bits of chance, up to MIN_KEY_BITS: few for a pattern, all for each other character."""
    kinds = ((26, str.isalpha), (10, str.isdigit), (33, lambda c: not c.isalnum()))
    single = math.log2(sum(size for size, is_kind in kinds if any(map(is_kind, text))))
    bits, at = 0.0, 0
    while at < len(text) and bits < MIN_KEY_BITS:
        length = _pattern_length(text, at)
        bits += _PATTERN_BITS if length > 2 else single
        at += length if length > 2 else 1
    return bits


def is_guessable(key: str) -> bool:
    """Estimate whether a key has less than MIN_KEY_BITS of chance.

    The key is also read by columns, 2 to 4 of them, to find patterns as in a1b2c3d4 or 1qaz2wsx. A shifted character
    counts as the same one without shift; each change between shifted and not adds two bits, but at most one bit per
    character.
    """
    plain = key.translate(_UNSHIFTED).lower()
    for width in range(1, 5):
        text, typed = ("".join(row[i::width] for i in range(width)) for row in (plain, key))
        changes = sum(one != other for one, other in itertools.pairwise(map(str.__ne__, text, typed)))
        if _estimate_bits(text) + min(2 * changes, len(key)) < MIN_KEY_BITS:
            return True
    return False


def key_weakness(key: str) -> str:
    """Return why `key` is not accepted, as a text that follows its name; "" when it is accepted."""
    faults = (
        (key.startswith("REPLACE"), "is still the example's placeholder"),
        (len(key) < 16, f"has {len(key)} characters, it must have 16 at least"),
        (len(set(key)) < 8, f"has {len(set(key))} different characters, it must have 8 at least"),
        (len(key) > MAX_KEY, f"has more than {MAX_KEY} characters"),
        (not re.fullmatch("[!-~]*", key), "must be made of visible ASCII characters, to fit into a header field"),
    )
    for weak, what in faults:
        if weak:
            return what
    if is_guessable(key):
        return "can be guessed: it is made of sequences, rows of a keyboard, common words, repetitions or few digits"
    return ""


# -- 3. Messages --
# Request and Response as values, and the type of a handler. No parsing, no sockets.

Fields = list[tuple[str, str]]
T = TypeVar("T")


class Headers(dict[str, str]):
    """Header fields by lower-case name; the values of several fields of one name joined by commas (RFC 9110, 5.3).

    A dict, because the fields of one request are looked up about twenty times. `pairs` has every field as
    (name, value), as it was sent and in the order of arrival.
    """

    __slots__ = ("pairs",)

    def __init__(self, pairs: Iterable[tuple[str, str]] = ()) -> None:
        self.pairs: Fields = pairs if isinstance(pairs, list) else list(pairs)
        for name, value in self.pairs:  # twice as fast as dict()
            self[name.lower()] = value
        if len(self) < len(self.pairs):  # some have the same name
            self.clear()
            for name, value in self.pairs:
                key = name.lower()
                self[key] = f"{self[key]}, {value}" if key in self else value

    def all(self, name: str) -> list[str]:
        """Return the value of each field called `name` (in lower case)."""
        return [value for key, value in self.pairs if key.lower() == name]

    def tokens(self, name: str) -> list[str]:
        """Return a list's members in lower case (RFC 9110, 5.6.1); the last is all that follows MAX_MEMBERS others."""
        if name not in self:
            return []
        return [member for part in self[name].split(",", MAX_MEMBERS) if (member := part.strip(" \t").lower())]


class Peer(Protocol):
    """The connection of a request, as far as a handler may use it."""

    peer: str  # the peer's address, for logs and X-Forwarded-For
    must_close: bool  # the connection will be closed after this response
    on_close: list[Callable[[], None]]  # called once when the connection ends

    def at_eof(self) -> bool:
        """Return whether the peer will send no more: the connection is half-closed or closed."""

    def is_closed(self) -> bool:
        """Return whether the connection is closed in both directions. A half-closed client waits for its response."""

    def shut_down(self) -> None:
        """End both directions at once, also if a splice holds a duplicate of the socket."""


class Sink(Protocol):
    """What a body is written to: a connection, or a wrapper around one."""

    @property
    def written(self) -> int:
        """The number of bytes written so far."""

    async def send(self, data: bytes) -> None:
        """Send `data`; returns when the sink can take more. ConnectionError when the connection is closed or stalls."""

    async def send_file(self, fd: int, offset: int, count: int) -> bool:
        """Send `count` bytes of a file; False, and nothing sent, if impossible. IncompleteBody if it has fewer."""

    async def splice(self, source: Any, count: int) -> bool:
        """Send the next `count` bytes that the connection `source` receives; False, and nothing sent, if impossible."""


class Body:
    """The content of a message (RFC 9110, 6.4): read at most once, by `read`, by iteration or by `write_to`.

    The receiver of a Response owns its body and calls `aclose` once, whether the body was sent or not.
    """

    length: int | None = None  # bytes; None if it is not known before the end
    data: bytes | None = None  # the whole body, if it is in memory
    complete = True  # False while the peer has not sent all of it
    expects = False  # the peer waits for 100 Continue before it sends the body
    replayable = False  # `write_to` may be called again, and starts from the beginning
    begun = False  # sending has begun; only JoinedBody tells it
    on_end: Callable[[], Awaitable[None]] | None = None  # called by `aclose`, once
    _pieces: AsyncIterator[bytes] | None = None

    def __aiter__(self) -> AsyncIterator[bytes]:
        raise NotImplementedError

    @property
    def known_length(self) -> int | None:
        """The bytes still to be read; None if unknown. Known also for a chunked body that has arrived completely."""
        return self.length

    async def read(self) -> bytes:
        """Return the next bytes, or b"" at the end. Raises IncompleteBody when the body ends before its length."""
        if self._pieces is None:
            self._pieces = aiter(self)
        return await anext(self._pieces, b"")

    def unread(self, data: bytes) -> None:
        """Give back bytes, which the next `read` returns again. Only a body that is being received can do that."""
        raise NotImplementedError

    async def read_all(self, limit: int) -> bytes:
        """Return the whole body; ProtocolError 502 when it is larger than `limit` bytes."""
        pieces = []
        while piece := await self.read():
            pieces.append(piece)
            limit -= len(piece)
            if limit < 0:
                raise ProtocolError(502, "the body is too large", close=True)
        return b"".join(pieces)

    def part(self, offset: int, count: int) -> Body | None:
        """Return a part of the body, `count` bytes at most, as a Body; None if the body can only be read once.

        A part needs no `aclose`, and cannot be used after that of the body.
        """
        return None

    async def write_to(self, sink: Sink) -> None:
        """Send the whole body.

        Raises IncompleteBody when the body has fewer bytes than `length`, ConnectionError when the connection is closed
        or stalls. The caller must then close the connection so that the peer sees an incomplete message.
        """
        async for piece in self:
            await sink.send(piece)

    async def drain(self) -> bool:
        """Discard the rest, MAX_DRAIN bytes at most. Return True at the end: then the connection can be reused."""
        return True

    async def aclose(self) -> None:
        """Release what the body holds, such as an open file. The default calls `on_end`."""
        if on_end := self.on_end:
            self.on_end = None
            await on_end()


class BytesBody(Body):
    """A body that is in memory."""

    replayable = True

    def __init__(self, data: bytes = b"") -> None:
        self.data: bytes = data
        self.length = len(data)

    def part(self, offset: int, count: int) -> Body:
        return BytesBody(self.data[offset : offset + count])

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for start in range(0, len(self.data), READ_SIZE):
            yield self.data[start : start + READ_SIZE]


class JoinedBody(Body):
    """Several bodies, one after the other."""

    def __init__(self, *bodies: Body) -> None:
        self._bodies = bodies
        lengths = [body.length for body in bodies if body.length is not None]
        self.length = sum(lengths) if len(lengths) == len(bodies) else None
        data = [body.data for body in bodies if body.data is not None]
        self.data = b"".join(data) if len(data) == len(bodies) else None
        self.complete = all(body.complete for body in bodies)
        self.replayable = all(body.replayable for body in bodies)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for body in self._bodies:
            async for piece in body:
                yield piece

    async def write_to(self, sink: Sink) -> None:
        self.begun = True
        for body in self._bodies:
            await body.write_to(sink)

    async def aclose(self) -> None:
        for body in self._bodies:
            await body.aclose()


class AbsentBody(BytesBody):
    """The body of a response to HEAD: Content-Length is sent, the bytes are not (RFC 9110, 9.3.2)."""

    def __init__(self, length: int | None) -> None:
        super().__init__()
        self.length = length


EMPTY = BytesBody()  # the body of a message without one, so `is EMPTY` tells that from an empty body


@dataclass(slots=True)
class Request:
    """A request as a handler gets it: `target` begins with a slash (or is "*"), not decoded."""

    method: str
    target: str
    headers: Headers
    minor: int = 1  # x of HTTP/1.x
    body: Body = EMPTY
    connection: Peer | None = None  # None behind the tunnel: the client's connection ends at the relay
    secure: bool = False  # it came by TLS
    upgrade: str = ""  # the protocol that Upgrade asks for, if supported; after a 101, `body` has no framing

    @property
    def peer(self) -> str:
        """The address of the client, or "-"."""
        return self.connection.peer if self.connection else "-"


@dataclass(slots=True)
class Response:
    """A response as a handler makes it; the HTTP server adds the fields for framing and connection.

    `on_sent(complete, size)` is called once, when writing has ended: whether all was written, and how many bytes of the
    body. `close`: close the connection after this response.
    """

    status: int
    headers: Fields = field(default_factory=list)
    body: Body = EMPTY
    on_sent: Callable[[bool, int], None] | None = None
    close: bool = False


# A handler answers requests: from files, by a web app, or by a server behind the tunnel.
#
# It may raise ProtocolError, which becomes a response with that status, and IncompleteBody when the client has ended
# the request's body early: then no response is sent. TimeoutError becomes 504, every other IncompleteBody 502, any
# other exception 500 and a traceback in the log. A handler does not change the request; its caller does not change
# the list of the response's fields. The receiver of the response closes its body, exactly once, whether it was sent
# or not. The HTTP server cancels a handler when its client resets the connection.
Handler = Callable[[Request], Awaitable[Response]]


# -- 4. Syntax --
# Heads and framing: bytes to values and back (RFC 9112, RFC 9110). Pure: no await, no file, no socket, no clock.

TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # RFC 9110, 5.6.2
# RFC 9112, 5: no fold, no space before the colon. Possessive, as no part can match in another way: a third faster.
_FIELD_LINES = rf"(?:{TOKEN}+:[\t\x20-\x7e\x80-\xff]*+\r\n)*+"
_REQUEST_HEAD = re.compile(rf"({TOKEN}) ([!-~\x80-\xff]+) HTTP/([0-9])\.([0-9])\r\n({_FIELD_LINES})\r\n")
_RESPONSE_HEAD = re.compile(rf"HTTP/1\.[0-9] ([0-9]{{3}})(?: [\t\x20-\x7e\x80-\xff]*)?\r\n({_FIELD_LINES})\r\n")
_HEAD_TO_SEND = re.compile(rf"[!-~\x80-\xff][\x20-\x7e\x80-\xff]*\r\n{_FIELD_LINES}\r\n")
_FIELD = re.compile(r"([^:]+):[ \t]*+(.*[^ \t\r\n]|)[ \t]*+\r\n")  # of lines that _FIELD_LINES has matched
# Bytes that no head may contain. They are searched in partial heads, too: a bad head is refused as soon as it arrives.
_NEVER = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r(?!\n|\Z)")
_REG_NAME = r"(?:[A-Za-z0-9\-._~!$&'()*+,;=]++|%[0-9A-Fa-f]{2})*+"  # RFC 3986, 3.2.2
_HOST = re.compile(rf"(?:\[([0-9A-Fa-f:.]+)\]|{_REG_NAME})(?::[0-9]*)?")
_ABSOLUTE = re.compile(r"https?://([^/?]*)(.*)", re.IGNORECASE)
_LENGTH = re.compile(r"[0-9]+")
_CHUNK_LINE = re.compile(rb"0*([0-9A-Fa-f]{1,15})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?")
_TRAILER = re.compile(rf"{TOKEN}:[\t\x20-\x7e\x80-\xff]*".encode("ascii"))
CHUNKED = -1  # in place of a body's length: it comes in chunks
PHRASES = {status.value: status.phrase for status in HTTPStatus}


def is_host(text: str) -> bool:
    """Return whether `text` is a host with or without a port (RFC 9110, 7.2)."""
    match = _HOST.fullmatch(text)
    if match and match[1]:
        try:
            ipaddress.IPv6Address(match[1])
        except ValueError:
            return False
    return match is not None


def check_partial_head(data: bytes, start: int = 0) -> None:
    """Raise ProtocolError 400, 414 or 431 if `data` cannot be the beginning of a request head.

    An earlier call has checked the bytes before `start`.
    """
    if _NEVER.search(data, max(start - 1, 0)):
        raise ProtocolError(400, "a bare CR or LF, or a control character, in the head", close=True)
    if data.find(b"\r\n", 0, MAX_REQUEST_LINE + 2) < 0 and len(data) > MAX_REQUEST_LINE + 1:
        raise ProtocolError(414, f"the request line is longer than {MAX_REQUEST_LINE} bytes", close=True)
    if len(data) > MAX_HEAD:
        raise ProtocolError(431, f"the head is larger than {MAX_HEAD} bytes", close=True)


def parse_fields(lines: str, limit: int = MAX_FIELDS, status: int = 431) -> Headers:
    """Parse field lines that a head's pattern has matched; ProtocolError `status` for more than `limit` fields."""
    pairs = _FIELD.findall(lines)
    if len(pairs) > limit:
        raise ProtocolError(status, f"more than {limit} header fields", close=True)
    return Headers(pairs)


def parse_request_head(data: bytes, limit: int = MAX_FIELDS) -> Request:
    """Parse a complete head into a request without body (RFC 9112, 3). ProtocolError 400, 405, 414, 431 or 505."""
    text = data.decode("latin-1")
    match = _REQUEST_HEAD.fullmatch(text)
    if match is None or match.end(4) > MAX_REQUEST_LINE:
        check_partial_head(data)  # a line that is too long gets 414 here
        raise _why_no_request(text)
    method, target, major, minor, lines = match.groups()
    if method == "PRI":  # RFC 9113, 3.4: the preface of HTTP/2
        raise ProtocolError(400, "this is HTTP/1.1; the client began with HTTP/2", close=True)
    if major != "1":
        raise ProtocolError(505, f"HTTP/{major}.{minor} is not supported, HTTP/1.1 is", close=True)
    request = Request(method, target, parse_fields(lines, limit), 0 if minor == "0" else 1)
    _check_host(request)
    if target[0] != "/" or method == "CONNECT":
        _parse_odd_target(request)
    elif "#" in target:
        raise ProtocolError(400, "a fragment in the request target", close=True)
    return request


def _why_no_request(text: str) -> ProtocolError:
    """Return the error for a head that the pattern did not match, though `check_partial_head` accepts it."""
    line, _, rest = text.partition("\r\n")
    if not re.fullmatch(rf"{TOKEN} [!-~\x80-\xff]+ HTTP/[0-9]\.[0-9]", line):
        return ProtocolError(400, "the request line is not METHOD SP TARGET SP HTTP/1.1", close=True)
    if re.search(r"(?:\A|\r\n)[ \t]", rest):
        return ProtocolError(400, "a folded header field", close=True)
    return ProtocolError(400, "a header field is not NAME: VALUE", close=True)


def _check_host(request: Request) -> None:
    """Check the Host field (RFC 9112, 3.2), and remove a final dot that comes behind the port. ProtocolError 400."""
    host = request.headers.get("host")
    if host is None:
        if request.minor > 0:
            raise ProtocolError(400, "the Host field is missing", close=True)
    elif not is_host(host):  # two fields are joined by ", ", which is not a host either
        if not is_host(host.removesuffix(".")):
            raise ProtocolError(400, "two Host fields, or one that is not a host", close=True)
        _set_host(request, host.removesuffix("."))


def _set_host(request: Request, host: str) -> None:
    others = [pair for pair in request.headers.pairs if pair[0].lower() != "host"]
    request.headers = Headers([("Host", host), *others])


def _parse_odd_target(request: Request) -> None:
    """Change a target in absolute form to origin form (RFC 9112, 3.2). ProtocolError for others but `OPTIONS *`."""
    target = request.target
    if target == "*" and request.method == "OPTIONS":
        return
    if request.method == "CONNECT":
        raise ProtocolError(405, "this is not a forward proxy", close=True, headers=[("Allow", "GET, HEAD, OPTIONS")])
    absolute = _ABSOLUTE.fullmatch(target)
    if not absolute or absolute[1][:1] in ("", ":") or not is_host(absolute[1]) or "#" in target:
        raise ProtocolError(400, "the request target is neither a path nor a URL", close=True)
    path = absolute[2]
    request.target = path if path.startswith("/") else "/" + path
    if not path and request.method == "OPTIONS":
        request.target = "*"
    _set_host(request, absolute[1])  # RFC 9112, 3.2.2: the target's authority replaces the Host field


def parse_response_head(data: bytes, limit: int = MAX_FIELDS) -> tuple[int, Headers]:
    """Parse a response's whole head (RFC 9112, 4); raises ProtocolError 502."""
    match = _RESPONSE_HEAD.fullmatch(data.decode("latin-1"))
    if match is None:
        raise ProtocolError(502, "the response head cannot be read", close=True)
    status = int(match[1])
    if not 100 <= status <= 599:
        raise ProtocolError(502, f"{status} is not a status", close=True)
    return status, parse_fields(match[2], limit, 502)


def format_request_head(method: str, target: str, fields: Fields) -> bytes:
    """Format a request head; raises ProtocolError 500 if it would not be a valid head."""
    return format_head(f"{method} {target} HTTP/1.1", fields)


def format_response_head(status: int, fields: Fields) -> bytes:
    """Format a response head; raises ProtocolError 500 if it would not be a valid head."""
    return format_head(f"HTTP/1.1 {status} {PHRASES.get(status, '')}", fields)


def format_head(start: str, fields: Fields, *, parsed: bool = False) -> bytes:
    """Format a head from its start line and fields.

    A CR LF in any part would add a field or end the head. So the whole is checked, by one pattern and by counting the
    lines. If all parts come from a head that was `parsed`, the count is enough.
    """
    lines = "".join([f"{name}: {value}\r\n" for name, value in fields])
    text = f"{start}\r\n{lines}\r\n"
    if text.count("\n") != len(fields) + 2 or not (parsed or _HEAD_TO_SEND.fullmatch(text)):
        raise ProtocolError(500, "a header field that cannot be sent")
    return text.encode("latin-1")


def format_chunk(data: bytes) -> bytes:
    """Format one chunk (RFC 9112, 7.1); b"" for empty data, because a chunk of size 0 would end the body."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


def parse_framing(headers: Headers, minor: int = 1) -> int | None:
    """Return the body's length by its fields: bytes, CHUNKED, or None without such a field (RFC 9112, 6.3).

    Raises ProtocolError 400, 413 or 501 for fields that are invalid, contradict each other or are not supported.
    """
    length = headers.get("content-length")
    if "transfer-encoding" in headers:
        if minor == 0:  # RFC 9112, 6.1: an HTTP/1.0 proxy would have ignored it
            raise ProtocolError(400, "Transfer-Encoding in HTTP/1.0", close=True)
        if length is not None:  # RFC 9112, 6.3(3): used to smuggle a request past a proxy
            raise ProtocolError(400, "both Transfer-Encoding and Content-Length", close=True)
        codings = headers.tokens("transfer-encoding")
        if codings == ["chunked"]:
            return CHUNKED
        if not codings or "chunked" in codings[:-1]:
            raise ProtocolError(400, "chunked is not the one final transfer coding", close=True)
        raise ProtocolError(501, "an unknown transfer coding", close=True)
    if length is None:
        return None
    if not _LENGTH.fullmatch(length):
        length, *others = set(headers.all("content-length"))  # RFC 9112, 6.3(5): equal copies are harmless
        if others or not _LENGTH.fullmatch(length):
            raise ProtocolError(400, "Content-Length is not one number", close=True)
    if len(length) > 18:
        raise ProtocolError(413, "Content-Length is too large", close=True)
    return int(length)


def has_body(method: str, status: int) -> bool:
    """Return whether a response to `method` with `status` is followed by a body (RFC 9112, 6.3(1))."""
    return not (method == "HEAD" or status in (204, 304))


def wants_close(headers: Headers, minor: int) -> bool:
    """Return whether a message of HTTP/1.`minor` asks for the end of its connection (RFC 9112, 9.3)."""
    options = headers.tokens("connection")
    return "close" in options or minor == 0 and "keep-alive" not in options


def parse_chunk_line(line: bytes) -> int:
    """Return the size in a chunk's first line (RFC 9112, 7.1); ProtocolError 400. Extensions are ignored."""
    match = _CHUNK_LINE.fullmatch(line)
    if match is None:
        raise ProtocolError(400, "a chunk without a valid size", close=True)
    return int(match[1], 16)


_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


@functools.lru_cache(1024)
def format_date(seconds: int) -> str:
    """Format a POSIX time as an HTTP date (RFC 9110, 5.6.7), whatever the locale.

    Cached: formatting costs as much as opening a file, and most responses have one of a few times.
    """
    t = time.gmtime(seconds)
    return (
        f"{_DAYS[t.tm_wday]}, {t.tm_mday:02} {_MONTHS[t.tm_mon - 1]} {t.tm_year:04} "
        f"{t.tm_hour:02}:{t.tm_min:02}:{t.tm_sec:02} GMT"
    )


def quote(name: bytes) -> str:
    """Percent-encode one segment of a path: everything but unreserved characters (RFC 3986, 2.3)."""
    return urllib.parse.quote_from_bytes(name, safe="")


def redirect_below(target: str) -> str:
    """Return a Location that adds a slash to a target's path, and keeps its query.

    It is relative, so it is right under any URL prefix and cannot name another host.
    """
    path, mark, query = target.partition("?")
    name = urllib.parse.unquote_to_bytes(path.rpartition("/")[2].encode("latin-1"))
    return f"./{quote(name)}/{mark}{query}"


# -- 5. Connections and bodies --
# Heads and bodies over asyncio's streams: framing and time-outs. Does not use the meaning of fields.


class Connection:
    """A TCP or TLS connection, with the bytes that were read but not used yet (`buffer`).

    `read_deadline` and `write_deadline` are in the loop's time (inf: none). `sweep` compares them every SWEEP_INTERVAL,
    because a timer for each wait would cost a tenth of a small request.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limiter: RateLimiter | None = None
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.reader = reader
        self.writer = writer
        self.limiter = limiter
        self.transport: asyncio.Transport = writer.transport  # type: ignore[assignment]  # typeshed promises less
        self.sock: socket.socket = writer.get_extra_info("socket")
        tls = writer.get_extra_info("sslcontext") is not None
        self.is_plain = not (tls or limiter)  # the kernel may send bytes by itself: from a file, from another socket
        name = writer.get_extra_info("peername")
        self.peer = str(name[0]).removeprefix("::ffff:") if name else "-"
        self.buffer = b""
        self.read_deadline = self.write_deadline = math.inf
        self.fill_began = math.inf  # when the `fill` that waits for bytes began, in the loop's time
        self.head_deadline: float | None = None  # for the response head that is being read
        self.stall_timeout = STALL_TIMEOUT
        self.silence_timeout = STALL_TIMEOUT  # seconds without a byte after which reading a body raises TimeoutError
        self.stalled = False  # no byte was sent for `stall_timeout` seconds, though some were waiting
        self._unsent = 0  # bytes in the transport's buffer when the write deadline was set
        self.must_close = False  # it will not be used for another request
        self.written = 0  # bytes given to the connection
        self.on_close: list[Callable[[], None]] = []
        self.on_continue: Callable[[], None] | None = None  # called when 100 Continue has arrived; set while expected
        self.task: asyncio.Task[object] | None = None  # handles the request in flight; cancelled when the peer resets

    def at_eof(self) -> bool:
        """Return whether the peer will send no more: the connection is half-closed or closed."""
        return self.reader.at_eof() or self.is_closed()

    def is_closed(self) -> bool:
        """Return whether the connection is closed in both directions. A half-closed client waits for its response."""
        return self.reader.exception() is not None or self.transport.is_closing()

    def is_reset(self) -> bool:
        """Return whether the peer has reset the connection. The loop notices that itself only while it reads."""
        if self.transport.is_reading() and not self.reader.at_eof() or not hasattr(select, "poll"):
            return False  # Windows notices when the next byte is sent
        poll = select.poll()
        poll.register(self.sock.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))

    def sweep(self, now: float) -> None:
        """Handle deadlines that have passed, and a reset.

        A read raises TimeoutError. A write gets more time if the peer has taken some bytes; else the connection is
        aborted. A reset cancels the task that handles a request.
        """
        if self.read_deadline < now:
            self.read_deadline = math.inf
            self.reader.set_exception(TimeoutError("the peer sends nothing"))
        if self.write_deadline < now:
            unsent = self.transport.get_write_buffer_size()
            if unsent < self._unsent:
                self._wait_for_writing()  # slow, but alive
            else:
                self.stalled = True
                self.abort()
        if self.task and (self.transport.is_closing() or self.is_reset()):
            self.task.cancel()
            self.abort()
        elif self.transport.is_closing() and not self.transport.get_write_buffer_size():
            self._end()

    def take_received(self) -> bytes | None:
        """Return bytes that asyncio has read, b"" at the end of the stream; None if it would be necessary to wait."""
        reading = self.reader.read(READ_SIZE)
        try:
            reading.send(None)  # one step: without bytes it would wait
        except StopIteration as end:
            data: bytes = end.value
            return data
        reading.close()
        return None

    async def fill(self, timeout: float | None = None) -> bool:
        """Append at least one received byte to `buffer`; return False at the end of the stream.

        TimeoutError after `timeout` seconds (default: `silence_timeout`).
        """
        self.fill_began = self.loop.time()
        self.read_deadline = self.fill_began + (self.silence_timeout if timeout is None else timeout)
        try:
            data = await self.reader.read(READ_SIZE)
        finally:
            self.read_deadline = self.fill_began = math.inf
        self.buffer += data
        return bool(data)

    async def send(self, data: bytes) -> None:
        """Send `data`; returns when the connection can take more. ConnectionError when it is closed or stalls."""
        if self.limiter and len(data) > self.limiter.slice:
            for start in range(0, len(data), self.limiter.slice):
                await self.send(data[start : start + self.limiter.slice])
            return
        if self.limiter:
            await self.limiter.wait(len(data))
        self.transport.write(data)
        self.written += len(data)
        if self.transport.is_closing():
            raise ConnectionResetError("the connection was reset")
        if self.transport.get_write_buffer_size() > WRITE_HIGH_WATER:
            await self._drain()

    async def _drain(self) -> None:
        """Wait until the transport's buffer is small enough; ConnectionError when the peer stalls or resets."""
        self._wait_for_writing()
        try:
            await self.writer.drain()
        finally:
            self.write_deadline = math.inf
        if self.transport.is_closing():  # after an abort, `drain` returns as if all had been sent
            raise ConnectionResetError("the connection was reset")

    def _wait_for_writing(self) -> None:
        """Set the write deadline: within `stall_timeout` seconds the peer must take some of the unsent bytes."""
        self._unsent = self.transport.get_write_buffer_size()
        self.write_deadline = self.loop.time() + self.stall_timeout

    def limit_head(self, timeout: float) -> None:
        """Give the response head that is being read, if one is, `timeout` seconds from now."""
        if self.head_deadline is not None:
            self.head_deadline = self.loop.time() + timeout
            self.read_deadline = min(self.read_deadline, self.head_deadline)

    def fail(self, error: Exception) -> None:
        """Abort, and raise `error` in the pending read, which could take a plain end for the end of the body."""
        self.reader.set_exception(error)
        self.abort()

    async def flush(self) -> None:
        """Empty the transport's buffer, as os.sendfile and os.splice need it. ConnectionError when the peer stalls."""
        if self.transport.get_write_buffer_size():
            self.transport.set_write_buffer_limits(0)
            await self._drain()
            self.transport.set_write_buffer_limits()

    async def send_file(self, fd: int, offset: int, count: int) -> bool:
        """Send `count` bytes of the file from `offset`; raises IncompleteBody when the file has fewer.

        Returns False, with nothing sent, for TLS, with a limiter, without os.sendfile, or when no descriptor is left.
        Uses os.sendfile, because loop.sendfile cannot tell a slow peer from a stalled one, and stops reading the
        connection, on which a relay may answer early that the client is gone.
        """
        if not (self.is_plain and hasattr(os, "sendfile")):
            return False
        await self.flush()
        try:
            duplicate = os.dup(self.sock.fileno())  # add_writer refuses the descriptor of a transport itself
        except OSError:
            return False
        try:
            while count:
                size = min(count, SENDFILE_SIZE)
                sent = await move_bytes(self, duplicate, os.sendfile, duplicate, fd, offset, size, writes=True)
                if not sent:
                    raise IncompleteBody("the file became shorter")
                offset += sent
                count -= sent
                self.written += sent
                await asyncio.sleep(0)  # let other connections run, however fast this peer reads
            return True
        finally:
            os.close(duplicate)  # at once: while it is open, an aborted connection stays open

    async def splice(self, source: Connection, count: int) -> bool:
        """Send the next `count` bytes that `source` receives by os.splice, without copying them (Linux).

        The buffer of `source` must be empty. Returns False, with nothing sent, for the reasons that `send_file` has.
        IncompleteBody when `source` ends early; ConnectionError when either peer stalls.
        """
        if not (self.is_plain and source.is_plain and hasattr(os, "splice")):
            return False
        await self.flush()
        opened: list[int] = []
        move = functools.partial(os.splice, flags=os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK)
        try:
            try:
                for sock in (source.sock, self.sock):
                    opened.append(os.dup(sock.fileno()))
                opened += os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError:
                return False
            from_socket, to_socket, outlet, inlet = opened
            while count:
                size = min(count, SENDFILE_SIZE)
                filled = await move_bytes(source, from_socket, move, from_socket, inlet, size, writes=False)
                if not filled:
                    raise IncompleteBody("the connection ended inside a body")
                count -= filled
                while filled:
                    moved = await move_bytes(self, to_socket, move, outlet, to_socket, filled, writes=True)
                    filled -= moved
                    self.written += moved
            return True
        finally:
            for fd in opened:
                os.close(fd)

    def reset(self) -> None:
        """Close with a TCP reset. For a body that ends with the connection: a normal close would look like its end."""
        with contextlib.suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # on, 0 seconds
        self.abort()

    def close(self) -> None:
        """Close. Buffered bytes are still sent, as long as the peer takes some within each `stall_timeout`."""
        if not self.transport.is_closing():  # a TLS transport that is closed twice raises
            self.writer.close()
        if self.transport.get_write_buffer_size():
            self._wait_for_writing()  # then `sweep` calls `_end`
        else:
            self._end()

    def shut_down(self) -> None:
        """End both directions at once. A splice may hold a duplicate of the socket, for which closing is no end."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def abort(self) -> None:
        """Close at once; unsent bytes are dropped, so the peer sees an incomplete message."""
        # AttributeError: a close that had bytes to send has ended, and asyncio's transport has no loop any more.
        with contextlib.suppress(AttributeError):
            self.transport.abort()
        self._end()

    def _end(self) -> None:
        """Call the callbacks in `on_close`, once."""
        self.read_deadline = self.write_deadline = math.inf
        callbacks, self.on_close = self.on_close, []
        for callback in callbacks:
            callback()


async def move_bytes(connection: Connection, fd: int, move: Callable[..., int], *args: int, writes: bool) -> int:
    """Return the result of a system call that reads or `writes`; while it would block, wait until `fd` is ready.

    ConnectionError after `stall_timeout` seconds.
    """
    loop = connection.loop
    add, remove = (loop.add_writer, loop.remove_writer) if writes else (loop.add_reader, loop.remove_reader)
    while True:
        with contextlib.suppress(BlockingIOError):
            return move(*args)
        ready = asyncio.Event()
        add(fd, ready.set)
        try:
            async with asyncio.timeout(connection.stall_timeout):
                await ready.wait()
        except TimeoutError:
            connection.stalled = True
            raise ConnectionResetError("the peer stalls") from None
        finally:
            remove(fd)


def keep_received(connection: Connection) -> None:
    """Give the reader what the socket has received: after a failed write asyncio closes it in the loop's next turn."""
    if connection.writer.get_extra_info("sslcontext"):
        return  # the socket holds records of TLS
    with contextlib.suppress(OSError), connection.sock.dup() as duplicate:
        if data := duplicate.recv(READ_SIZE):
            connection.reader.feed_data(data)


def take_buffered(connection: Connection) -> None:
    """Pause reading, and move into `buffer` all that asyncio has read: the rest stays in the socket."""
    # Again each time: a StreamReader resumes its transport when it is empty.
    connection.transport.pause_reading()
    while data := connection.take_received():
        connection.buffer += data
        connection.transport.pause_reading()


async def read_request_head(connection: Connection) -> bytes:
    """Return the next request head with its empty line; b"" at the end of the stream before a request.

    TimeoutError: no request for IDLE_TIMEOUT seconds if `buffer` is empty, else a head that took more than
    HEAD_TIMEOUT. ConnectionError when the stream ends inside a head. ProtocolError 400, 414 or 431.
    """
    connection.read_deadline = connection.loop.time() + IDLE_TIMEOUT
    blank_lines = checked = 0
    while True:
        data = connection.buffer
        while data.startswith(b"\r\n"):
            blank_lines += 1
            if blank_lines > MAX_BLANK_LINES:
                raise ProtocolError(400, "empty lines instead of a request", close=True)
            data = data[2:]
            checked = 0
        end = data.find(b"\r\n\r\n", max(checked - 3, 0)) + 4
        if end > 3:
            break
        if data:
            check_partial_head(data, checked)
            if not checked:
                connection.read_deadline = connection.loop.time() + HEAD_TIMEOUT
            checked = len(data)
        connection.buffer = data
        # A body of 100 KiB comes with its head. Of what is pipelined, not much more than that is buffered.
        piece = await connection.reader.read(2 * WRITE_HIGH_WATER)
        if not piece:
            if data:
                raise ConnectionError("the connection ended inside a head")
            return b""
        connection.buffer = data + piece
    connection.read_deadline = math.inf
    if end > MAX_HEAD:
        check_partial_head(data[:end])
    connection.buffer = data[end:]
    return data[:end]


async def read_response_head(connection: Connection, timeout: float) -> tuple[int, Headers]:
    """Return status and fields of the next response; interim ones except 101 are skipped (RFC 9110, 15.2).

    The connection's `must_close` is set if the response asks for that.
    TimeoutError when it has not arrived after `timeout` seconds, interim responses included. ConnectionError when
    the connection ends before. ProtocolError 502 for an invalid head, and after MAX_INTERIM interim responses.
    """
    connection.head_deadline = connection.loop.time() + timeout
    for _ in range(MAX_INTERIM + 1):
        head = await _receive_response_head(connection)
        status, headers = parse_response_head(head)
        if status == 100 and connection.on_continue:
            connection.on_continue()
        if status >= 200 or status == 101:
            connection.must_close |= wants_close(headers, 0 if head.startswith(b"HTTP/1.0") else 1)
            connection.head_deadline = None
            return status, headers
    raise ProtocolError(502, f"more than {MAX_INTERIM} interim responses", close=True)


async def _receive_response_head(connection: Connection) -> bytes:
    """Return the bytes of the next response head, interim or not, which must arrive before `head_deadline`."""
    while (end := connection.buffer.find(b"\r\n\r\n") + 4) < 4 and len(connection.buffer) <= MAX_HEAD:
        if _NEVER.search(connection.buffer):  # as in a request head, do not wait for an end that may never come
            raise ProtocolError(502, "the response head cannot be read", close=True)
        left = (connection.head_deadline or 0) - connection.loop.time()
        if left <= 0:  # `fill` returns early for each byte, so the sum of the waits is checked here
            raise TimeoutError("the peer sends the response head too slowly")
        if not await connection.fill(left):
            raise ConnectionError("the connection was closed without a response")
    if not 4 <= end <= MAX_HEAD:
        raise ProtocolError(502, "the response head is too large", close=True)
    head, connection.buffer = connection.buffer[:end], connection.buffer[end:]
    return head


async def linger(connection: Connection) -> None:
    """Half-close, and discard what the peer still sends (RFC 9112, 9.6).

    Closing with unread bytes would make the kernel reset the connection, and destroy the response. Returns when the
    peer ends, after LINGER_TIMEOUT seconds without a byte, MAX_LINGER bytes, or MAX_LINGER_TIMEOUT seconds.
    """
    if connection.at_eof():
        return
    if connection.writer.can_write_eof():  # TLS has no half-close
        connection.writer.write_eof()
    connection.buffer = b""
    discarded = 0
    with contextlib.suppress(OSError):  # TimeoutError is one
        async with asyncio.timeout(MAX_LINGER_TIMEOUT):
            while discarded < MAX_LINGER and await connection.fill(LINGER_TIMEOUT):
                discarded += len(connection.buffer)
                connection.buffer = b""


async def end_stream(connection: Connection) -> None:
    """After a 101, tell the peer that no more is sent; close when it then sends nothing for MAX_LINGER_TIMEOUT.

    TLS has no half-close: only the close tells the peer.
    """
    await connection.flush()
    if connection.writer.can_write_eof():
        connection.writer.write_eof()
    ended = connection.loop.time()
    while connection.loop.time() < max(ended, connection.fill_began) + MAX_LINGER_TIMEOUT:  # only waiting counts
        await asyncio.sleep(SWEEP_INTERVAL)
    connection.close()
    await asyncio.sleep(LINGER_TIMEOUT)  # a TLS peer should close, too
    connection.abort()


def share_of_turn(items: Collection[T], turn: int) -> list[T]:
    """Return the items that a sweep checks in this turn: of a thousand or more, only a part: a turn must be short."""
    parts = min(1 + len(items) // 1000, 4)
    return list(itertools.islice(items, turn % parts, None, parts))


async def sweep(connections: set[Connection]) -> NoReturn:
    """Check all deadlines every SWEEP_INTERVAL, and every second when there are thousands, for ever."""
    loop = asyncio.get_running_loop()
    turns = itertools.count()
    while True:
        await asyncio.sleep(SWEEP_INTERVAL)
        now = loop.time()
        for connection in share_of_turn(connections, next(turns)):
            connection.sweep(now)


def set_socket_options(sock: socket.socket) -> None:
    """Set TCP options. Accepted sockets inherit them from a listening one."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # KEEP*: the kernel finds a dead peer after 35 seconds.
    # NODELAY: asyncio sets it only if the socket names its protocol; without it a response could wait 40 ms.
    # NOTSENT_LOWAT: without it a socket becomes writable only after a third of some MiB was sent, which can take a slow
    # reader longer than STALL_TIMEOUT.
    options = (("NODELAY", 1), ("KEEPIDLE", 20), ("KEEPINTVL", 5), ("KEEPCNT", 3), ("NOTSENT_LOWAT", WRITE_HIGH_WATER))
    for name, value in options:
        if option := getattr(socket, f"TCP_{name}", None):
            with contextlib.suppress(OSError):  # Python knows the option, the system does not
                sock.setsockopt(socket.IPPROTO_TCP, option, value)


def read_at(fd: int, offset: int, count: int) -> bytes:
    """Read up to `count` bytes at `offset`."""
    if hasattr(os, "pread"):
        return os.pread(fd, count, offset)
    os.lseek(fd, offset, os.SEEK_SET)
    return os.read(fd, count)


class RateLimiter:
    """A limit in bytes per second for all that is sent on the connections that share it."""

    def __init__(self, rate: int) -> None:
        self.rate = rate
        self.slice = max(min(rate // 4, WRITE_HIGH_WATER), 1)  # bytes; a quarter of a second's worth
        self._free = 0.0  # when the next byte may leave, in the loop's time

    async def wait(self, count: int) -> None:
        """Wait until `count` more bytes may leave."""
        now = asyncio.get_running_loop().time()
        self._free = max(self._free, now) + count / self.rate
        await asyncio.sleep(self._free - now)


def _late() -> ProtocolError:
    return ProtocolError(408, "the rest of the message did not arrive in time", close=True)


class IncomingBody(Body):
    """The body of a message that is being received, by its framing (RFC 9112, 6).

    `framing` is a number of bytes, CHUNKED, or None for all bytes until the connection ends. `expects`: the client sent
    Expect: 100-continue; the first `read` sends 100 Continue (RFC 9110, 10.1.1).
    """

    def __init__(self, connection: Connection, framing: int | None, *, expects: bool = False) -> None:
        self.connection = connection
        self.chunked = framing == CHUNKED
        self.until_close = framing is None
        # Bytes to receive of the body, or of the current chunk.
        self.remaining = sys.maxsize if framing is None else max(framing, 0)
        self.complete = framing == 0
        self.expects = expects
        self.unread_data = b""  # bytes that `unread` has given back
        self.overhead = 0  # bytes of chunk extensions and trailers so far
        self._expected = "size"  # the next line of the chunked framing: "size", "end" or "trailer"
        self._trailers = 0  # number of trailer fields so far

    @property
    def length(self) -> int | None:  # type: ignore[override]  # read only
        """The bytes not read yet, or None if that is not known before the end."""
        return None if self.chunked or self.until_close else self.remaining + len(self.unread_data)

    @property
    def known_length(self) -> int | None:
        """The same, but known also for a chunked body that has arrived completely."""
        return len(self.unread_data) if self.complete else self.length

    async def read(self) -> bytes:
        """Return the next bytes, or b"" at the end. IncompleteBody; ProtocolError 400, 408 or 431."""
        if self.unread_data:
            data, self.unread_data = self.unread_data, b""
            return data
        try:
            if self.expects:
                self.expects = False
                await self.connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            take = self._take_chunks if self.chunked else self._take_counted
            while not (data := take()) and not self.complete:
                if not await self.connection.fill():
                    if not self.until_close:
                        raise IncompleteBody("the connection ended inside a body")
                    self.complete = True
            return data
        except TimeoutError:
            raise _late() from None
        except ProtocolError:
            self.connection.must_close = True  # where the body ends cannot be known any more
            raise
        except OSError as error:  # a reset
            raise IncompleteBody(format_error(error)) from None

    def _take_counted(self) -> bytes:
        """Take what the buffer has of a body with a length, or of one that ends with the connection."""
        connection = self.connection
        data, connection.buffer = connection.buffer[: self.remaining], connection.buffer[self.remaining :]
        self.remaining -= len(data)
        self.complete = self.complete or not self.remaining
        return data

    def unread(self, data: bytes) -> None:
        self.unread_data = data + self.unread_data

    def _take_chunks(self) -> bytes:
        """Take the data of all chunks in the buffer. One at a time would copy the rest of the buffer for each."""
        buffer = self.connection.buffer
        pieces = []
        at = 0
        while not self.complete:
            if self.remaining:
                piece = buffer[at : at + self.remaining]
                if not piece:
                    break
                pieces.append(piece)
                at += len(piece)
                self.remaining -= len(piece)
                continue
            end = buffer.find(b"\r\n", at)
            if end < 0:
                if b"\n" in buffer[at:] or len(buffer) - at > MAX_CHUNK_LINE:
                    raise ProtocolError(400, "a chunk without a valid size", close=True)
                break
            self._take_line(buffer[at:end])
            at = end + 2
        self.connection.buffer = buffer[at:]
        return b"".join(pieces)

    def _take_line(self, line: bytes) -> None:
        """Parse one line of the chunked framing: the end of a chunk, a size, or a trailer (RFC 9112, 7.1)."""
        if len(line) > 16:  # more than a size
            self.overhead += len(line)
        if len(line) > MAX_CHUNK_LINE or self.overhead > MAX_CHUNK_WASTE:
            raise ProtocolError(400, "too many chunk extensions or trailers", close=True)
        if self._expected == "end":
            if line:
                raise ProtocolError(400, "a chunk that is longer than its size", close=True)
            self._expected = "size"
        elif self._expected == "size":
            self.remaining = parse_chunk_line(line)
            self._expected = "end" if self.remaining else "trailer"
        elif line:
            if not _TRAILER.fullmatch(line):
                raise ProtocolError(400, "an invalid trailer field", close=True)
            self._trailers += 1
            if self._trailers > MAX_FIELDS:
                raise ProtocolError(431, "too many trailer fields", close=True)
        else:
            self.complete = True

    async def check(self, *, discard: bool) -> None:
        """Check the framing of a chunked body before the handler runs: afterwards an error could not be sent.

        Check what has arrived: the client may wait for the response before it sends more. With `discard`, because the
        handler does not read the body, drop up to MAX_DRAIN bytes. ProtocolError 400, 408 or 431; IncompleteBody.
        """
        if not self.chunked or self.expects:
            return
        if discard:
            await self.drain()
        else:
            self.unread(self._take_chunks())

    async def drain(self) -> bool:
        if self.expects or (self.length or 0) > MAX_DRAIN:
            return False
        drained = 0
        while drained <= MAX_DRAIN and not self.complete:
            drained += len(await self.read())
        return self.complete

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while piece := await self.read():
            yield piece

    async def write_to(self, sink: Sink) -> None:
        if self.expects:
            await sink.send(await self.read())  # sends 100 Continue, without which nothing could be spliced
        if (self.length or 0) >= SPLICE_MIN and self.connection.is_plain:
            await self._splice_to(sink)
        while piece := await self.read():
            await sink.send(piece)

    async def _splice_to(self, sink: Sink) -> None:
        """Send what asyncio has read already, then splice the rest, if descriptors are left for that."""
        connection = self.connection
        try:
            take_buffered(connection)
            while self.unread_data or connection.buffer and self.remaining:
                await sink.send(await self.read())
            while count := min(self.remaining, 4 * SENDFILE_SIZE):
                if not await sink.splice(connection, count):
                    break
                self.remaining -= count
                await asyncio.sleep(0)  # let other connections run, however fast both peers are
            self.complete = not self.remaining
        except OSError as error:
            if connection.stalled:
                raise _late() from None
            if connection.is_closed() or connection.is_reset():
                raise IncompleteBody(format_error(error)) from None
            raise
        finally:
            if not connection.transport.is_closing():
                connection.transport.resume_reading()


class ChunkedSink:
    """Writes each piece to another sink as a chunk (RFC 9112, 7.1)."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    @property
    def written(self) -> int:
        """The number of bytes written to the other sink."""
        return self._sink.written

    async def send(self, data: bytes) -> None:
        """Send a chunk."""
        await self._sink.send(format_chunk(data))

    async def send_file(self, fd: int, offset: int, count: int) -> bool:
        """Return False: a file of known length is never sent in chunks."""
        return False

    async def splice(self, source: Any, count: int) -> bool:
        """Return False: what is spliced has a known length, too."""
        return False


async def write_body(sink: Sink, body: Body, *, chunked: bool) -> None:
    """Send a body, as it is or in chunks (RFC 9112, 7.1)."""
    if not chunked:
        await body.write_to(sink)
        return
    await body.write_to(ChunkedSink(sink))
    await sink.send(b"0\r\n\r\n")


_CHUNK_BEGIN = re.compile(rb"([0-9a-f]{1,7})\r\n")


async def inner_chunks(body: Body) -> AsyncIterator[bytes]:
    """Yield the chunks that `write_body` has put into a body; IncompleteBody if the last one is missing."""
    data = b""
    ended = False
    async for piece in body:
        data += piece
        while begin := _CHUNK_BEGIN.match(data):
            end = begin.end() + int(begin[1], 16)
            if len(data) < end + 2:
                break
            ended = end == begin.end()
            if not ended:
                yield data[begin.end() : end]
            data = data[end + 2 :]
        if not begin and len(data) > 8:
            raise IncompleteBody("a body without its chunks")
    if not ended or data:
        raise IncompleteBody("the body ended before its last chunk")


# -- 6. Pages --
# HTML pages: small, one style, usable without JavaScript. Pure.

STYLE = """
:root{color-scheme:light dark;
--ink:#1b1d20;--quiet:#62676e;--line:#e6e8eb;--edge:#8a9098;--link:#0a58ca;--page:#fff;--over:#f3f5f8;--on:#1a7f37}
@media(prefers-color-scheme:dark){:root{
--ink:#e4e6e9;--quiet:#9aa0a8;--line:#2c3036;--edge:#6b727b;--link:#86b7fe;--page:#15171a;--over:#1e2226;--on:#3fb950}}
*{box-sizing:border-box}:focus-visible{outline:2px solid var(--link);outline-offset:1px}
body{margin:0 auto;padding:2.5rem 1.25rem;max-width:60rem;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
h1{margin:0 0 .25rem;font-size:1.6rem;font-weight:600;line-height:1.3;overflow-wrap:anywhere}
h1 a{color:inherit;display:inline-block;max-width:100%}
h1 i{font-style:normal;font-weight:400;color:var(--quiet);margin:0 .15em}
a{color:var(--link);text-decoration:none}a:hover{text-decoration:underline}
p,footer,.q{color:var(--quiet)}footer{margin-top:2.5rem;font-size:.85rem}
.bar{display:flex;flex-wrap:wrap;gap:.5rem .9rem;align-items:center;margin:0 0 1.25rem}
.bar{color:var(--quiet);font-size:.9rem}.bar form{display:contents}.bar span{flex:1;min-width:10rem}
input,.bar button{font:inherit;color:inherit;background:var(--page);border:1px solid var(--edge);border-radius:6px}
input{padding:.25rem .6rem;width:12rem}::placeholder{color:var(--quiet);opacity:1}
.bar button{padding:.25rem .7rem;cursor:pointer}.bar button:hover{background:var(--over)}
table{width:calc(100% + 1rem);margin:0 -.5rem;border-collapse:collapse}
th{padding:.4rem .5rem;text-align:left;font-weight:400;color:var(--quiet);font-size:.85rem}
tr>*{border-bottom:1px solid var(--line)}th button{all:unset;cursor:pointer;padding:.4rem .5rem;margin:-.4rem -.5rem}
th button:hover{color:var(--ink)}
th button:focus-visible{outline:2px solid var(--link);outline-offset:2px}
td{padding:.42rem .5rem;vertical-align:baseline;overflow-wrap:break-word}
td:first-child,.b{overflow-wrap:anywhere}tbody tr:hover{background:var(--over)}
.n,.t{white-space:nowrap;font-variant-numeric:tabular-nums}.n{text-align:right}td.n,td.t{color:var(--quiet);font-size:.9rem}
td>a,td>i{display:block;white-space:pre-wrap;unicode-bidi:isolate;padding-left:1.7rem;position:relative}
td>a::before,td>i::before{content:"";position:absolute;left:.2rem;top:.2rem;width:.8rem;height:1rem;
border:1.5px solid var(--quiet);border-radius:2px;opacity:.6}td>i{font-style:normal;color:var(--quiet)}
.d>*::before,.d>*::after{content:"";position:absolute;left:.05rem;top:.4rem;width:1.1rem;height:.82rem;
border:0;border-radius:2px;background:var(--link);opacity:1}.d>*::after{top:.22rem;width:.5rem;height:.4rem}
.d>i::before,.d>i::after{background:var(--quiet)}
.on::before{content:"";display:inline-block;width:.5rem;height:.5rem;margin-right:.45rem;border-radius:50%;background:var(--on)}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:0;padding:.75rem;background:var(--over)}
@media(min-width:36.01rem){.l th.n{width:7rem}.l th.w{width:11rem}}
@media(max-width:36rem){body{padding:1.25rem .75rem}.w{display:none}input{flex:1}}
"""


_ENTITIES = (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;"), ("'", "&#39;"))


def escape(text: str) -> str:
    """Escape text for HTML, in an element or a quoted attribute."""
    for character, entity in _ENTITIES:  # four times as fast as str.translate; the module html is slow to import
        text = text.replace(character, entity)
    return text


def page(title: str, content: str) -> bytes:
    """Make a page. `content` is HTML, `title` is text."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width,initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n{content}\n</body>\n</html>\n"
    ).encode()


def html_table(columns: dict[str, str], rows: Iterable[Iterable[str]]) -> str:
    """Make a table. `columns` maps each heading to the CSS class of its cells; headings and `rows` are HTML."""
    top = "".join(f'<th scope="col" class="{kind}">{heading}</th>' for heading, kind in columns.items())
    cells = "".join(f'<td class="{kind}">{{}}</td>' for kind in columns.values())
    lines = "".join(f"<tr>{cells.format(*row)}</tr>\n" for row in rows)
    return f"<table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{lines}</tbody>\n</table>"


VERSION_LINE = f'PTTH {__version__}, AGPL-3.0-or-later, <a href="{{}}ptth.py">source</a>'  # {}: the root's URL


def error_page(status: int, reason: str) -> bytes:
    """Make the page for an error response."""
    title = f"{status} {PHRASES.get(status, '')}".strip()
    return page(title, f"<main>\n<h1>{escape(title)}</h1>\n<p>{escape(reason[:1].upper() + reason[1:])}.</p>\n</main>")


def format_size(count: int) -> str:
    """Format a number of bytes for people: three digits and a unit."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 999.5 or unit == "TiB":
            break
        size /= 1024
    return f"{count} B" if unit == "B" else f"{size:.{0 if size >= 99.95 else 1}f} {unit}"


def format_time(seconds: float) -> str:
    """Format a POSIX time by RFC 3339, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def format_age(seconds: float) -> str:
    """Format how long ago something was."""
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1)):
        if seconds >= length:
            return format_count(int(seconds // length), unit) + " ago"
    return "just now"


def format_count(count: int, noun: str) -> str:
    """Format a number of things."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def clamped_seconds(nanoseconds: int) -> int:
    """Return a file's time in whole seconds, limited to years 1970 to 9999: some file systems hold any 64 bits."""
    return max(0, min(nanoseconds // 1_000_000_000, 253402300799))  # the last second of 9999


# -- 7. HTTP server --
# Accepts connections, all at the same time, and serves the requests of each in order. Calls a handler.

NOSNIFF = ("X-Content-Type-Options", "nosniff")
NO_STORE = ("Cache-Control", "no-store")


def text_response(status: int, text: str, fields: Iterable[tuple[str, str]] = ()) -> Response:
    """Make a response of plain text."""
    return Response(status, [("Content-Type", "text/plain; charset=utf-8"), NOSNIFF, *fields], BytesBody(text.encode()))


def html_response(status: int, html: bytes, fields: Iterable[tuple[str, str]] = (), script: str = "") -> Response:
    """Make a response with a page of this program. It may run `script` only, and load nothing."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    if script:
        import hashlib

        policy += "; connect-src 'self'" if "fetch(" in script else ""  # for uploads
        policy += f"; script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode('ascii')}'"
    own = [("Content-Type", "text/html; charset=utf-8"), ("Content-Security-Policy", policy), NOSNIFF]
    return Response(status, [*own, *fields], BytesBody(html))


def json_response(value: object) -> Response:
    """Make a response of JSON that must not be cached."""
    import json

    fields = [("Content-Type", "application/json"), NOSNIFF, NO_STORE]
    return Response(200, fields, BytesBody(json.dumps(value).encode()))


_WEIGHT = re.compile(r"(?:\A|;)\s*q\s*=\s*([01](?:\.[0-9]*)?)\s*(?:;|\Z)")


def parse_weights(headers: Headers, name: str) -> dict[str, float]:
    """Return the members of an Accept field with their weights, 0 to 1 (RFC 9110, 12.4.2)."""
    found = {}
    for token in headers.tokens(name):
        what, _, parameters = token.partition(";")
        weight = _WEIGHT.search(parameters) if parameters else None
        found[what.strip()] = float(weight[1]) if weight else 1.0
    return found


def wants_json(headers: Headers) -> bool:
    """Return whether Accept names JSON, with a larger weight than HTML. No browser sends that."""
    accepted = parse_weights(headers, "accept")
    return accepted.get("application/json", 0) > accepted.get("text/html", 0)


def error_response(request: Request, error: ProtocolError) -> Response:
    """Make the response for an error: a page for a browser, one line of text for other clients."""
    if "text/html" in request.headers.get("accept", ""):
        response = html_response(error.status, error_page(error.status, error.reason), error.headers)
    else:
        response = text_response(error.status, f"{error.reason}\n", error.headers)
    response.close = error.close
    return response


async def call_handler(handler: Handler, request: Request) -> Response:
    """Return the handler's response, or one for what it raises: see `Handler`."""
    try:
        return await handler(request)
    except ProtocolError as error:
        return error_response(request, error)
    except TimeoutError:
        return error_response(request, ProtocolError(504, "the response did not arrive in time"))
    except IncompleteBody:
        if not request.body.complete and request.connection and request.connection.at_eof():
            raise  # the client ended the request's body early: no response can be sent
        return error_response(request, ProtocolError(502, "there was no response"))
    except Exception:
        log_fault()
        return error_response(request, ProtocolError(500, "an error in the server; its log has the details"))


class AccessLog:
    """Writes lines in the Combined Log Format to stderr, those of one turn of the event loop in one write."""

    def __init__(self, address: Callable[[Request], str] = lambda request: request.peer) -> None:
        self._address = address  # of the client, behind proxies
        self._lines: list[str] = []

    def add(self, request: Request, status: int, size: int) -> None:
        """Add the line for one response. A query that may hold a key is left out."""
        now = _log_date(int(time.time()))
        what = _quoted(f"{request.method} {_without_key(request.target)} HTTP/1.{request.minor}")
        referer = _quoted(_without_key(request.headers.get("referer", "-")))
        agent = _quoted(request.headers.get("user-agent", "-"))
        line = f'{self._address(request)} - - [{now}] "{what}" {status} {size} "{referer}" "{agent}"\n'
        if not self._lines:
            asyncio.get_running_loop().call_soon(self.flush)
        self._lines.append(line)

    def flush(self) -> None:
        """Write the collected lines."""
        lines, self._lines = self._lines, []
        write_stderr("".join(lines))


@functools.lru_cache(1)
def _log_date(seconds: int) -> str:
    """Format a POSIX time as the Common Log Format has it."""
    day, month, year, clock = format_date(seconds).split()[1:5]
    return f"{day}/{month}/{year}:{clock} +0000"


_LOG_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), *b'"\\', *range(127, 256))}
# URLs that need a key: a client may send it in the query by mistake.
_ASKS_FOR_KEY = re.compile(rf"(?:https?://[^/?]*)?/*(?:{BACKEND[1:-1]}|scraper|frontend/audit_log)\b", re.IGNORECASE)


def _without_key(url: str) -> str:
    """Remove the query of a URL that needs a key."""
    return url.partition("?")[0] if _ASKS_FOR_KEY.match(url) else url


def _quoted(text: str) -> str:
    """Shorten a text, and escape characters that would end the quotes or the line, or control a terminal."""
    if len(text) > MAX_LOGGED:
        text = f"{text[:MAX_LOGGED]}..."
    return text.translate(_LOG_ESCAPES)


def raise_file_limit() -> int:
    """Raise the limit of descriptors as far as the system allows, and return it."""
    try:
        import resource
    except ImportError:  # Windows
        return 1 << 30
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # not allowed: the old limit stays
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return soft if soft != resource.RLIM_INFINITY else 1 << 30


def is_body_soon_read(body: Body) -> bool:
    """Return whether the rest of a request's body is small enough to be read, to keep the connection."""
    return not body.expects and (body.complete or body.length is not None and body.length <= MAX_DRAIN)


def report_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """The loop's exception handler: report what was not handled, except the end of a connection.

    asyncio keeps that in a future, too, and reports it when the garbage collector takes the future before its stream.
    And it ends a transport twice whose write fails at the moment when its buffer becomes empty, as TLS may do.
    """
    is_end = isinstance(context.get("exception"), OSError) and not isinstance(context.get("future"), asyncio.Task)
    if not is_end and "_call_connection_lost" not in context["message"]:
        loop.default_exception_handler(context)


class HTTPServer:
    """Serves a handler on a listening socket, until `stop`."""

    def __init__(
        self,
        handler: Handler,
        *,
        log: AccessLog | None = None,
        tls: ssl.SSLContext | None = None,
        takes_bodies: bool = False,
    ) -> None:
        self.handler = handler
        self.log = log
        self.tls = tls
        self.takes_bodies = takes_bodies  # the handler reads also the bodies of GET and HEAD
        self.connections: set[Connection] = set()
        self.stopping = False
        self._last_loop_error = -math.inf  # when a failed accept was last logged, in the loop's time
        limit = raise_file_limit()
        self._max_descriptor = max(limit - SPARE_DESCRIPTORS, limit // 2)
        self._listener: asyncio.Server | None = None
        self._sweeper: asyncio.Task[None] | None = None

    async def listen(self, sock: socket.socket) -> None:
        """Accept connections on a listening socket; called once."""
        set_socket_options(sock)
        asyncio.get_running_loop().set_exception_handler(self._on_loop_error)
        self._sweeper = asyncio.create_task(sweep(self.connections))
        self._listener = await asyncio.start_server(
            self._serve_connection,
            sock=sock,
            limit=WRITE_HIGH_WATER,
            backlog=MAX_ACCEPTS,
            ssl=self.tls,
            ssl_shutdown_timeout=STALL_TIMEOUT if self.tls else None,  # in that time buffered bytes are still sent
        )
        sock.listen(4096)  # again: for asyncio, the backlog is also the number of accepts in one turn

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log a failed accept, at most once in 60 seconds; pass other errors to the loop's default handler."""
        error = context.get("exception")
        if not isinstance(error, OSError) or "socket" not in context:
            report_error(loop, context)
        elif loop.time() > self._last_loop_error + 60:
            self._last_loop_error = loop.time()
            log_line(f"cannot accept connections: {format_error(error)}; raise the limit (ulimit -n, LimitNOFILE=)")

    async def stop(self, grace: float = GRACE_PERIOD) -> None:
        """Accept no more connections, wait up to `grace` seconds for requests in flight, and abort the rest."""
        self.stopping = True
        if self._listener:
            self._listener.close()
        for connection in [connection for connection in self.connections if not connection.task]:
            # A TLS client may take half a minute to answer a close.
            connection.abort() if connection.buffer or self.tls else connection.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                while self.connections:
                    await asyncio.sleep(0.02)
        tasks = [connection.task for connection in self.connections if connection.task]
        for connection in list(self.connections):
            connection.abort()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)  # a handler may have a file to remove
        await asyncio.sleep(0)  # asyncio closes their sockets in the next turn of the loop
        if self._sweeper:
            self._sweeper.cancel()
        if self.log:
            self.log.flush()

    async def _serve_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve the requests of one connection until it ends."""
        connection = Connection(reader, writer)
        self.connections.add(connection)
        connection.on_close.append(lambda: self.connections.discard(connection))
        try:
            # The system assigns the lowest free number: a high one means that few are left. A TLS client that has left
            # already has no socket.
            if connection.sock and connection.sock.fileno() > self._max_descriptor:
                error = ProtocolError(503, "too many connections", close=True, headers=[("Retry-After", "5")])
                await self._refuse(connection, b"", error)
                return
            while await self._serve_request(connection):
                if connection.buffer:
                    await asyncio.sleep(0)  # let other connections run, however many requests this one has pipelined
            await connection.flush()
        except (OSError, asyncio.CancelledError):
            connection.abort()  # reset, stalled or incomplete: no error can be sent
        finally:
            connection.task = None
            connection.close()

    async def _serve_request(self, connection: Connection) -> bool:
        """Read one request, call the handler, write the response; return whether another request may follow."""
        connection.task = None
        if self.stopping and not connection.buffer:
            return False
        request = await self._read_request(connection)
        if request is None:
            return False
        connection.must_close = wants_close(request.headers, request.minor)
        response = await call_handler(self.handler, request)
        await self._write_response(connection, request, response)
        # More bytes may come of an incomplete body, or after a request without one. Under TLS, which has no half-close,
        # do not wait for the latter: a client that reads to the end of the connection would wait LINGER_TIMEOUT, too.
        needed = not request.body.complete or request.body is EMPTY and not self.tls
        if connection.must_close and needed:
            await linger(connection)
        return not connection.must_close

    async def _read_request(self, connection: Connection) -> Request | None:
        """Read a request's head, and check its body. None when no request follows, or after one was refused."""
        data = b""
        try:
            data = await read_request_head(connection)
            if not data:
                return None
            connection.task = asyncio.current_task()
            request = parse_request_head(data)
            request.connection = connection
            request.secure = self.tls is not None
            if body := self._find_body(connection, request):
                request.body = body
                await body.check(discard=not self.takes_bodies and request.method in ("GET", "HEAD"))
            return request
        except TimeoutError:
            if data or connection.buffer:
                await self._refuse(connection, data, ProtocolError(408, "the request came too slowly", close=True))
        except ProtocolError as error:
            await self._refuse(connection, data, error)
        return None

    def _find_body(self, connection: Connection, request: Request) -> IncomingBody | None:
        """Return the body; note an upgrade; check Expect (RFC 9110, 10.1.1). ProtocolError 417, or of framing."""
        headers = request.headers
        framing = parse_framing(headers, request.minor)
        expects = headers.get("expect", "").lower() if request.minor else ""
        if expects not in ("", "100-continue"):
            raise ProtocolError(417, "an unknown expectation", close=True)
        if framing:
            return IncomingBody(connection, framing, expects=bool(expects))
        if request.method == "GET" and request.minor and "upgrade" in headers.tokens("connection"):
            if "websocket" in headers.tokens("upgrade"):
                request.upgrade = "websocket"
                return IncomingBody(connection, None)
        return None

    async def _refuse(self, connection: Connection, data: bytes, error: ProtocolError) -> None:
        """Send an error response to bytes that are not a valid request, and close. HEAD gets no body, as always."""
        connection.must_close = True
        is_head = (data or connection.buffer.lstrip(b"\r\n")).startswith(b"HEAD ")
        request = Request("HEAD" if is_head else "-", "-", Headers(), connection=connection)  # what is known of it
        await self._write_response(connection, request, error_response(request, error))
        await linger(connection)

    async def _write_response(self, connection: Connection, request: Request, response: Response) -> None:
        """Write the response, close its body, call `on_sent`, and log it. ConnectionError if it is incomplete."""
        whole = False
        if request.upgrade and response.status != 101:
            request.body = EMPTY  # the next bytes are the next request
        begun = connection.written
        unsent = 0
        try:
            head = self._make_head(connection, request, response)
            begun += len(head)
            await self._write_message(connection, request, response, head)
            whole = True
        except (ProtocolError, OSError) as error:
            unsent = connection.transport.get_write_buffer_size()
            connection.abort()
            raise ConnectionError(str(error)) from error
        finally:
            await response.body.aclose()
            size = max(connection.written - begun - unsent, 0)
            if response.on_sent:
                response.on_sent(whole, size)
                response.on_sent = None  # the callback refers to the response: break this reference cycle now
            if self.log:
                self.log.add(request, response.status, size)
        if not (connection.must_close or request.body.complete):
            try:
                connection.must_close = not await request.body.drain()
            except ProtocolError:
                connection.must_close = True  # the response was sent; the next request cannot be found

    def _make_head(self, connection: Connection, request: Request, response: Response) -> bytes:
        """Format the response's head, and decide whether the connection closes after the response."""
        status, length, minor = response.status, response.body.length, request.minor
        if status == 101:  # either side may send nothing for hours; the end of one direction ends the other
            connection.must_close = True
            connection.silence_timeout = math.inf
            return format_response_head(status, [*response.headers, ("Connection", "Upgrade")])
        fields = response.headers.copy()
        if length is not None and status not in (204, 304):
            fields.append(("Content-Length", str(length)))
        elif has_body(request.method, status):  # of unknown length
            if minor:
                fields.append(("Transfer-Encoding", "chunked"))
            else:
                connection.must_close = True  # HTTP/1.0: the body ends with the connection
        fields.append(("Date", format_date(int(time.time()))))
        if response.close or self.stopping or not is_body_soon_read(request.body):
            connection.must_close = True
        if connection.must_close:
            fields.append(("Connection", "close"))
        elif status == 426:  # its Upgrade field is for this connection only (RFC 9110, 7.8)
            fields.append(("Connection", "Upgrade"))
        elif minor == 0:
            fields.append(("Connection", "keep-alive"))
        return format_response_head(status, fields)

    async def _write_message(self, connection: Connection, request: Request, response: Response, head: bytes) -> None:
        """Write head and body."""
        body = response.body if has_body(request.method, response.status) else EMPTY
        if body.data is not None and len(body.data) <= READ_SIZE:
            await connection.send(head + body.data)
            return
        await connection.send(head)
        chunked = body.length is None and request.minor == 1 and response.status != 101
        try:
            await write_body(connection, body, chunked=chunked)
        except BaseException:
            if body.length is None and not chunked:
                connection.reset()
            raise


# -- 8. HTTP client --
# Kept-alive connections to one server, direct or through a forward proxy.


async def end_task(task: asyncio.Task[Any] | None) -> None:
    """Cancel a task, and wait for its end."""
    if task:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class Refused(ConnectionError):
    """The connection fails until a configuration is changed; the text says which, and where."""


class BaseURL(NamedTuple):
    """The parts of a URL: scheme, host, port, and a path that is put before each target.

    `host` is what is resolved: a name in ASCII, or an address without brackets, perhaps with a zone: fe80::1%eth0.
    """

    tls: bool
    host: str
    port: int
    path: str
    unix: str = ""  # the path of a unix socket to connect to instead of host and port
    verify: bool = True  # check the certificate

    @property
    def name(self) -> str:
        """The host without a zone, which has a meaning on this machine only (RFC 6874, 1)."""
        return self.host.partition("%")[0]

    @property
    def place(self) -> str:
        """Host and port, or the unix socket, for messages."""
        return f"unix:{self.unix}" if self.unix else f"{bracket(self.host)}:{self.port}"

    @property
    def authority(self) -> str:
        """The Host field's value."""
        host = bracket(self.name)
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The URL, without a slash at its end."""
        return f"http{'s' if self.tls else ''}://{self.authority}{self.path}"


def bracket(host: str) -> str:
    """Put brackets around an IPv6 address, as in URLs."""
    return f"[{host}]" if ":" in host else host


def parse_base_url(url: str) -> BaseURL:
    """Parse an http or https URL, in the forms that curl accepts.

    Raises ValueError. Its text does not quote the URL, any part of which may be part of a password.
    """
    match = re.fullmatch(r"(?i:http(s?)):/{1,3}([^/?#]*)([^?#]*)(.*)", url.strip(), re.DOTALL)
    if not match:
        raise ValueError("it must begin with https:// or http://")
    authority, path = match[2], match[3].rstrip("/")
    if "@" in authority:
        raise ValueError("it must not have a user or a password")
    if match[4]:
        raise ValueError("it must not have a query or a fragment")
    if not re.fullmatch("[!-~]*", path):
        raise ValueError("its path has a character that no URL has: percent-encode it")
    place = re.fullmatch(r"(\[[^\]]*\]|[^:\[\]]*)(?::([0-9]*))?", authority)
    if not place or not place[1]:
        raise ValueError("it has no valid host and port; an IPv6 address needs brackets, as in http://[::1]:4000")
    port = int(place[2] or (443 if match[1] else 80))
    if not 0 < port < 65536:
        raise ValueError("its port is not a number from 1 to 65535")
    return BaseURL(bool(match[1]), parse_host(place[1]), port, path)


def parse_app(text: str) -> BaseURL:
    """Parse the place of an app: PORT, HOST:PORT, a URL, https+insecure://..., or unix:PATH. Raises ValueError."""
    if text.startswith("unix:"):
        path = text.removeprefix("unix:").removeprefix("//")
        if not path or not hasattr(socket, "AF_UNIX"):
            raise ValueError("a unix socket is written unix:/run/app.sock, on systems that have them")
        return BaseURL(False, "localhost", 80, "", unix=path)
    if text.isascii() and text.isdigit():
        text = f"localhost:{text}"  # not 127.0.0.1: an app may listen on ::1 only
    url, insecure = re.subn(r"\A(?i:https\+insecure)://", "https://", text)
    return parse_base_url(url if "://" in url else f"http://{url}")._replace(verify=not insecure)


def parse_host(text: str) -> str:
    """Return a URL's host in a form that can be resolved. Raises ValueError, whose text does not quote it."""
    try:
        if text.startswith("["):  # a zone is written %25eth0 (RFC 6874), by users and curl also %eth0
            address, percent, zone = text[1:-1].partition("%")
            zone = zone.removeprefix("25") or zone
            if not re.fullmatch(r"[\w.~:-]+" if percent else "", zone, re.ASCII):
                raise ValueError
            return f"{ipaddress.IPv6Address(address)}{percent}{zone}"
        text = urllib.parse.unquote(text, errors="strict").lower()
        host = ".".join(map(_ascii_label, re.split("[.\u3002\uff0e\uff61]", text)))  # all dots of RFC 3490, 3.1
        if re.fullmatch(r"0x[0-9a-f]*|[0-9]+", host.removesuffix(".").rpartition(".")[2]):
            return socket.inet_ntoa(socket.inet_aton(host.removesuffix(".")))  # also 127.1 and 0x7f000001
        if len(host) > 254 or not re.fullmatch(r"(?:[a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63}\.?", host):
            raise ValueError
    except (ValueError, OSError):
        raise ValueError("it has a host that is neither a valid name nor an address") from None
    return host


def _ascii_label(label: str) -> str:
    """Return a label of a domain name in ASCII (IDNA). Raises UnicodeError, which is a ValueError."""
    if label.isascii():
        return label
    if re.search("[\u00df\u03c2]", label):  # IDNA 2008 keeps them, and so curl; Python's codec is older
        return f"xn--{label.encode('punycode').decode('ascii')}"
    return label.encode("idna").decode("ascii")


USER_AGENT = ("User-Agent", f"ptth/{__version__}")  # some firewalls block requests without one


class ForwardProxy(NamedTuple):
    """A forward proxy on the way to the relay: its URL, and the fields with its login."""

    origin: BaseURL
    fields: Fields

    def refusal(self, status: int, headers: Headers) -> Refused:
        """Return the error for a status that the proxy itself sent, with advice for the operator."""
        if status == 407:
            schemes = re.findall(rf"(?:\A|,)\s*({TOKEN})(?=\s|,|\Z)", headers.get("proxy-authenticate", "Basic"))
            if "basic" not in map(str.lower, schemes):
                why = f"it takes {', '.join(schemes)[:80]} only, but PTTH can only do Basic; a helper such as cntlm can"
            elif self.fields:
                why = "it does not accept this user and password"
            else:
                why = "it wants a login: write http://USER:PASSWORD@HOST:PORT as its URL"
        elif status == 403:
            why = "it forbids this; ask who runs it to allow the relay's host and port"
        elif status >= 500:
            why = "it does not reach the relay"
        else:
            why = "is it an HTTP proxy that allows CONNECT?"
        return Refused(f"the proxy at {self.origin.place} answers {status}: {why}")

    async def send_connect(self, connection: Connection, origin: BaseURL) -> None:
        """Let the proxy connect to `origin`. Raises Refused if it does not. A 2xx has no content (RFC 9110, 9.3.6)."""
        target = f"{bracket(origin.name)}:{origin.port}"
        place = f"the proxy at {self.origin.place}"
        head = format_request_head("CONNECT", target, [("Host", target), USER_AGENT, *self.fields])
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                await connection.send(head)
                status, headers = await read_response_head(connection, CONNECT_TIMEOUT)
        except (OSError, ProtocolError) as error:
            raise Refused(f"{place} does not answer CONNECT {target}: {format_error(error)}") from None
        if not 200 <= status < 300:
            raise self.refusal(status, headers)
        if connection.buffer:
            raise Refused(f"{place} sends bytes of its own after its answer to CONNECT")


def parse_proxy(url: str) -> ForwardProxy:
    """Parse a proxy's URL, optionally with http:// and USER:PASSWORD@. Raises ValueError that does not quote it."""
    match = re.fullmatch(r"(?:([a-z][a-z0-9+.-]*):/{1,3})?(.*)", url.strip(), re.DOTALL | re.IGNORECASE)
    assert match  # it matches everything
    scheme = (match[1] or "http").lower()
    if scheme == "https":
        raise ValueError("a proxy that is itself reached by TLS is not supported; most take http:// on the same port")
    if scheme.startswith("socks"):
        raise ValueError("SOCKS is not supported: use an HTTP proxy, http://HOST:PORT")
    if scheme != "http":
        raise ValueError("a proxy must begin with http://")
    login, _, place = match[2].rpartition("@")
    if re.search("[/?#]", login):  # here other programs end the host, and would look up the password in DNS
        raise ValueError("a / ? or # in its user or password must be written as %2F %3F or %23")
    origin = parse_base_url(f"http://{place}")
    if origin.path:
        raise ValueError("a proxy has no path; of a PAC file, write the HOST:PORT that it names")
    fields = []
    if login:
        user, _, password = map(urllib.parse.unquote_to_bytes, login.partition(":"))
        secret = base64.b64encode(user + b":" + password).decode("ascii")
        fields.append(("Proxy-Authorization", f"Basic {secret}"))
    return ForwardProxy(origin, fields)


def proxy_from_environment(origin: BaseURL) -> str:
    """Return the proxy's URL by HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY for this origin, or ""."""
    if sys.platform == "linux" and not any(name.lower().endswith("_proxy") for name in os.environ):
        return ""  # urllib.request would take 1.7 MiB of memory, and a tenth of the start
    from urllib.request import getproxies, proxy_bypass

    proxies = getproxies()  # reads lower case, too; without any, on macOS and Windows the system's settings
    exempt = is_exempt(origin, proxies["no"]) if "no" in proxies else proxy_bypass(origin.host)
    return "" if exempt else proxies.get("https" if origin.tls else "http") or proxies.get("all", "")


def is_exempt(origin: BaseURL, exceptions: str) -> bool:
    """Return whether NO_PROXY names this origin.

    Each entry is "*", a domain (with all names below it), an address or a network (10.0.0.0/8), perhaps with a port.
    """
    host = origin.name.removesuffix(".")
    for entry in exceptions.lower().replace(",", " ").split():
        if entry == "*":
            return True
        place, port = entry, ""
        if match := re.fullmatch(r"(\[.+\]|[^:]+):([0-9]+)", entry):
            place, port = match.groups()
        place = re.sub(r"[\[\]]|%[^/\]]*", "", place)  # brackets, and a zone
        try:
            matches = ipaddress.ip_address(host) in ipaddress.ip_network(place, strict=False)
        except ValueError:
            try:
                name = parse_host(place.removeprefix("*").strip("."))
            except ValueError:
                continue
            matches = f".{host}".endswith(f".{name}")
        if matches and port in ("", str(origin.port)):
            return True
    return False


def number_zone(host: str) -> str:
    """Return an address with its zone as a number: getaddrinfo accepts a name for link-local addresses only."""
    address, _, zone = host.partition("%")
    try:
        return f"{address}%{socket.if_nametoindex(zone)}"
    except OSError:  # there is no zone, or it is a number already
        return host


async def open_place(place: BaseURL, known: str = "") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to a host or to a unix socket.

    As in curl, localhost and all names below it are this machine (RFC 6761, 6.3). Both of its loopback addresses are
    tried, even if /etc/hosts has only one. First it is the `known` one, to which the last connection went: a lookup
    takes as long as the rest of a small POST.
    """
    if place.unix:
        return await asyncio.open_unix_connection(place.unix, limit=READ_SIZE)
    is_own = re.fullmatch(r"(?:.*\.)?localhost\.?", place.host)
    addresses = (known, "localhost", "::1", "127.0.0.1") if is_own else (number_zone(place.host),)
    errors: list[OSError] = []
    for address in filter(None, addresses):
        delay = None if address == known else CONNECT_DELAY
        try:
            return await asyncio.open_connection(
                address, place.port, limit=READ_SIZE, happy_eyeballs_delay=delay, interleave=1
            )
        except OSError as error:
            errors.append(error)
    raise errors[0]


async def open_streams(
    origin: BaseURL, proxy: ForwardProxy | None, tls: ssl.SSLContext | None, known: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Open a connection. All addresses of the host are tried, each CONNECT_DELAY after the one before (RFC 8305).

    CONNECT_TIMEOUT applies to the connection, to a proxy's answer, and to TLS. Raises OSError; Refused if the proxy
    is the cause.
    """
    first = proxy.origin if proxy else origin
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            reader, writer = await open_place(first, known)
    except OSError as error:
        if not proxy:
            raise
        raise Refused(f"the proxy at {first.place} cannot be reached: {format_error(error)}") from None
    try:
        if proxy and tls:
            await proxy.send_connect(Connection(reader, writer), origin)
        async with asyncio.timeout(CONNECT_TIMEOUT):
            if tls:
                await writer.start_tls(tls, server_hostname=origin.name.removesuffix("."))
    except BaseException:
        writer.transport.abort()
        raise
    return reader, writer


class HTTPClient:
    """Kept-alive connections to one server."""

    def __init__(self, origin: BaseURL, proxy: ForwardProxy | None = None, limiter: RateLimiter | None = None) -> None:
        self.origin = origin
        self.proxy = proxy
        self.limiter = limiter
        self.silence_timeout = STALL_TIMEOUT  # for its connections
        self.idle_age = MAX_IDLE_AGE  # seconds that they may be idle while a request waits for its response
        self.retry_time = 0.0  # seconds for which opening a connection is tried again
        self.is_reachable = True  # the last attempt opened a connection
        self.connections: set[Connection] = set()
        self.idle: deque[tuple[Connection, float]] = deque()  # with the time of the last use, the latest last
        self._address = ""  # to which the last connection went
        self._sweeper: asyncio.Task[None] | None = None
        self._tls: ssl.SSLContext | None = None
        if origin.tls:
            import ssl

            self._tls = ssl.create_default_context()
            if not origin.verify:
                self._tls.check_hostname = False
                self._tls.verify_mode = ssl.CERT_NONE

    async def connect(self) -> Connection:
        """Open a connection; try again for `retry_time` seconds. Raises OSError, as `_open` does."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self.retry_time
        while True:
            try:
                connection = await self._open()
                self.is_reachable = True
                return connection
            except OSError:
                if loop.time() >= end:
                    self.is_reachable = False
                    raise
            await asyncio.sleep(0.1)

    async def _open(self) -> Connection:
        """Open a connection, and watch its deadlines. Raises OSError; Refused if the proxy is the cause."""
        streams = await open_streams(self.origin, self.proxy, self._tls, self._address)
        connection = Connection(*streams, self.limiter)
        if connection.peer != "-":  # else the peer has reset it already
            self._address = connection.peer
        connection.stall_timeout = RELAY_STALL_TIMEOUT
        connection.silence_timeout = self.silence_timeout
        set_socket_options(connection.sock)
        self.connections.add(connection)
        connection.on_close.append(lambda: self.connections.discard(connection))
        if self._sweeper is None or self._sweeper.done():
            self._sweeper = asyncio.create_task(self._sweep())
        return connection

    async def _sweep(self) -> None:
        """While there are connections, check their deadlines, and close idle ones that are too old or have ended."""
        loop = asyncio.get_running_loop()
        while self.connections:
            await asyncio.sleep(SWEEP_INTERVAL)
            now = loop.time()
            is_waiting = any(connection.head_deadline is not None for connection in self.connections)
            oldest = now - (self.idle_age if is_waiting else MAX_IDLE_AGE)
            while self.idle and (self.idle[0][1] < oldest or self.idle[0][0].at_eof()):
                self.idle.popleft()[0].close()
            for connection in list(self.connections):
                connection.sweep(now)

    def take_idle(self, *, oldest: bool = False) -> Connection | None:
        """Take an idle connection, the last used or the `oldest`; None when there is none.

        Some servers send 408 before they close an idle connection. It would be taken for the next response.
        """
        while self.idle:
            connection, _ = self.idle.popleft() if oldest else self.idle.pop()
            if not connection.at_eof() and connection.take_received() is None:
                return connection
            connection.close()
        return None

    def close(self) -> None:
        """Close all connections at once."""
        if self._sweeper:
            self._sweeper.cancel()
        for connection in list(self.connections):
            connection.abort()
        self.idle.clear()

    async def handle(self, request: Request, *, timeout: float = P7_TIMEOUT, repeatable: bool = False) -> Response:
        """Send a request; return the response when its head has arrived. A `Handler`; for `timeout` see `exchange`.

        A `repeatable` request, or a GET or HEAD without a body, may take an idle connection. If that is closed, the
        request is sent once more on a new one, also after 408, with which some servers announce that (RFC 9110,
        15.5.9). A `repeatable` one in memory is sent once more in any case. Raises what `exchange` and `connect` do.

        Any other request takes a new connection, for itself alone: if all of those were kept, there would soon be no
        descriptors left. And an app that does not read a body would take it for the next request.
        """
        idle = repeatable or request.method in ("GET", "HEAD") and request.body is EMPTY
        connection = self.take_idle() if idle else None
        is_reused = connection is not None
        try:
            connection = connection or await self.connect()
            connection.must_close = not idle
            response = await self.exchange(connection, request, timeout)
            if not is_reused or response.status != 408:
                return response
            await response.body.aclose()
        except ConnectionError as error:
            again = is_reused or repeatable and request.body.data is not None
            if not again or isinstance(error, IncompleteBody):
                raise
        return await self.exchange(await self.connect(), request, timeout)

    async def exchange(self, connection: Connection, request: Request, timeout: float) -> Response:
        """Send a request on this connection; return the response when its head has arrived.

        A response that arrives before the request's body was sent is returned at once. Both bodies go on; the end of
        the response's body ends the other. Raises ConnectionError; TimeoutError when no head arrives within `timeout`
        seconds after the request was sent; ProtocolError 502 for an invalid response; and what the request's body
        raises.
        """
        sending: asyncio.Task[None] | None = None
        try:
            sending = await self._send_request(connection, request, timeout)
            # While the body is being sent there is no limit: `_send_body` sets it afterwards.
            status, headers = await read_response_head(connection, math.inf if sending else timeout)
            if connection.on_continue:  # a final response, not 100 Continue: the body is not wanted
                connection.must_close, connection.on_continue = True, None
                await end_task(sending)
            if status == 101:
                if request.upgrade not in headers.tokens("upgrade"):
                    raise ProtocolError(502, "a change of protocol that the request did not ask for", close=True)
                sending = asyncio.create_task(self._send_body(connection, request, timeout))
            return await self._make_response(connection, request.method, status, headers, sending)
        except BaseException:
            connection.abort()
            await end_task(sending)
            raise

    async def _send_request(
        self, connection: Connection, request: Request, timeout: float
    ) -> asyncio.Task[None] | None:
        """Send a request's head and a short body; return the task that sends a longer one."""
        body, head = request.body, self._format_request(request)
        if body.data is not None and len(body.data) < READ_SIZE and not (self.limiter or body.expects):
            await connection.send(head + body.data)
            return None
        await connection.send(head)
        if body.complete and not self.limiter and 0 < (body.length or 0) < READ_SIZE:
            await body.write_to(connection)  # small: an early response can wait until it was sent
            return None
        return None if request.upgrade else asyncio.create_task(self._send_body(connection, request, timeout))

    async def _send_body(self, connection: Connection, request: Request, timeout: float) -> None:
        """Send a request's body; then the response's head must arrive within `timeout` seconds. Raises nothing."""
        body = request.body
        try:
            if "expect" in request.headers:
                go = asyncio.Event()
                connection.on_continue = go.set
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(EXPECT_TIMEOUT):
                        await go.wait()
                connection.on_continue = None
            await write_body(connection, body, chunked=body.length is None and not request.upgrade)
            if request.upgrade:
                await end_stream(connection)
            connection.limit_head(timeout)
        except IncompleteBody as error:
            connection.fail(error)  # the server must not take it for a complete body
        except ConnectionError:
            connection.must_close = True  # the error may be that of the body's source: this connection still works
            if connection.stalled:
                connection.fail(TimeoutError("the peer does not take the request"))
            keep_received(connection)  # it may have answered before it closed
            connection.limit_head(LINGER_TIMEOUT)
        except Exception as error:
            connection.fail(error)

    async def _make_response(
        self, connection: Connection, method: str, status: int, headers: Headers, sending: asyncio.Task[None] | None
    ) -> Response:
        """Make the response for a head. When its body is closed, the connection is kept or closed."""
        try:
            framing = None if status == 101 else parse_framing(headers)
        except ProtocolError as error:
            raise ProtocolError(502, error.reason, close=True) from None
        bare = not has_body(method, status)
        # Some apps send a body also in response to HEAD. It may arrive later, and be taken for the next response.
        connection.must_close |= framing is None and not bare or method == "HEAD"
        body = IncomingBody(connection, 0 if bare else framing)
        if bare:
            content: Body = AbsentBody(None if framing == CHUNKED else framing)
        elif framing == len(connection.buffer) and (not sending or sending.done()):
            content = BytesBody(await body.read())  # the whole body has arrived: free the connection at once
        else:
            body.on_end = functools.partial(self._end_exchange, body, sending)
            return Response(status, headers.pairs, body)
        await self._end_exchange(body, sending)
        return Response(status, headers.pairs, content)

    async def _end_exchange(self, body: IncomingBody, sending: asyncio.Task[None] | None) -> None:
        """Keep the connection for the next exchange, if both bodies of this one are complete; otherwise close it."""
        connection = body.connection
        whole = body.complete and (sending is None or sending.done())
        await end_task(sending)
        if whole and not (connection.must_close or connection.buffer or connection.at_eof()):
            self.idle.append((connection, connection.loop.time()))
        else:
            connection.close()

    def _format_request(self, request: Request) -> bytes:
        """Format a request's head, in absolute form if a proxy reads it (RFC 9112, 3.2.2)."""
        target = "*" if request.target == "*" else self.origin.path + request.target
        length = request.body.length
        fields = request.headers.pairs
        if "host" not in request.headers:  # this program made the request
            fields = [("Host", self.origin.authority), USER_AGENT, *fields]
        if self.proxy and not self.origin.tls:
            target = f"http://{self.origin.authority}{target}"
            fields = [*fields, *self.proxy.fields]
        if request.upgrade:
            fields = [*fields, ("Connection", "Upgrade"), ("Upgrade", request.upgrade)]
        elif length is None:
            fields = [*fields, ("Transfer-Encoding", "chunked")]
        elif length or request.method not in ("GET", "HEAD", "OPTIONS", "DELETE"):  # RFC 9110, 8.6
            fields = [*fields, ("Content-Length", str(length))]
        return format_request_head(request.method, target, fields)

    async def post(self, path: str, fields: Fields, body: Body) -> tuple[int, Headers]:
        """POST `body`, again if it is replayable; return status and fields of the response, which may come early."""
        request = Request("POST", path, Headers(fields), body=body)
        response = await self.handle(request, repeatable=body.replayable)
        async with contextlib.aclosing(response.body) as content:
            with contextlib.suppress(OSError, ProtocolError):  # only the status is needed
                await content.drain()
        return response.status, Headers(response.headers)


# -- 9. Forwarding --
# Which fields a proxy drops, adds and changes, and a local web app as a handler. Does not use the tunnel.

# Fields for one connection, which a proxy never forwards (RFC 9110, 7.6.1), and fields that this program sets itself.
_HOP_BY_HOP = frozenset({
    "connection", "proxy-connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "content-length",
    "proxy-authenticate", "proxy-authorization", "expect",
})  # fmt: skip
# Fields with which a proxy in front tells an app the visitor's scheme and host, its address, and the URL that it asked
# for. Frameworks believe them, so they pass only from a trusted proxy.
_PUBLIC_ORIGIN = frozenset({
    "forwarded", "x-forwarded-port", "x-forwarded-ssl", "x-forwarded-scheme", "x-forwarded-protocol", "x-scheme",
    "x-url-scheme", "front-end-https", "x-forwarded-server", "x-original-host", "x-host",
})  # fmt: skip
_TOLD_BY_PROXY = _PUBLIC_ORIGIN | {
    "x-real-ip", "x-client-ip", "true-client-ip", "x-cluster-client-ip", "cf-connecting-ip", "fastly-client-ip",
    "x-original-forwarded-for", "x-original-url", "x-original-uri", "x-rewrite-url", "x-script-name",
}  # fmt: skip
# Fields of a request that do not reach a server with a host of its own, and those that do not reach one below a path.
_NOT_TO_HOST = _HOP_BY_HOP | _TOLD_BY_PROXY | {
    "via", "max-forwards",
    "x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "x-forwarded-prefix",
    "proxy",  # CGI turns it into the variable HTTP_PROXY
    "x-sendfile-type",  # with X-Accel-Mapping it makes Rack name any file for a proxy to send
}  # fmt: skip
_NOT_TO_SERVER = _NOT_TO_HOST | {
    "x-apikey",  # of the scraper API
    "cookie", "cookie2", "available-dictionary", "dictionary-id",  # texts that another server of this origin chose
}  # fmt: skip
# The fields of a response that reach the client. All servers share the relay's origin, and browsers and proxies may
# obey fields that this program does not know. So every field that is not listed is dropped. Examples, and the reason:
#   Set-Cookie, Set-Login, Accept-CH, Critical-CH: make the browser tell every server something with each request.
#   Clear-Site-Data, Strict-Transport-Security, Public-Key-Pins, Expect-CT, Alt-Svc, NEL, Report-To,
#       Reporting-Endpoints, Origin-Agent-Cluster, Observe-Browsing-Topics, Origin-Trial,
#       Service-Worker-Allowed: hold for the whole origin.
#   Use-As-Dictionary, Speculation-Rules: make the browser send requests of one server's making to the others.
#   Permissions-Policy, Document-Policy, Supports-Loading-Mode: give frames of other sites the origin's permissions.
#   Cross-Origin-Opener-Policy, -Embedder-Policy: only cause an error in a sandbox.
#   Refresh: a redirect with any status.  Proxy-*, Authentication-Info: about a password for another server.
#   Surrogate-Control, Edge-Control, CDN-Cache-Control: commands to a cache in front of the relay.
_TO_CLIENT = {
    "accept-ranges", "etag", "last-modified", "digest", "repr-digest",  # of a file; more of them below as content-*
    "age", "cache-control", "expires", "pragma", "vary",  # about this URL only
    "timing-allow-origin", "cross-origin-resource-policy", "referrer-policy",  # which sites may use or see this URL
    "location", "retry-after", "allow", "server", "accept-patch", "accept-post", "preference-applied",
    "dav", "ms-author-via", "lock-token",  # of WebDAV, which browsers ignore
    "link", "www-authenticate",  # as `shared_origin_fields` leaves them
}  # fmt: skip
_TO_CLIENT_PREFIXES = ("content-", "access-control-", "sec-websocket-", "x-")
# Fields X-* affect their own page only, except these: they make a proxy in front of the relay send a file or another
# URL, or run or delete what it has cached.
_PROXY_COMMANDS = (
    "x-accel-", "x-sendfile", "x-lighttpd-",  # nginx, Apache and others, lighttpd
    "x-litespeed-", "x-lscache", "x-reproxy-", "x-perlbal-", "x-cascade", "x-esi",  # LiteSpeed, Perlbal, Rack, Varnish
)  # fmt: skip
_NOT_TO_CLIENT = (*_PROXY_COMMANDS, "x-forwarded-", "x-content-type-options")  # the last is set by the relay itself
# Fields that also a server with a host of its own may not send: they stay valid when the host has another owner, or
# affect other ports.
_NOT_TO_OWN_CLIENT = _HOP_BY_HOP | {
    "date", "via", "alt-svc", "clear-site-data", "nel", "report-to", "reporting-endpoints",
}  # fmt: skip
_NOT_TO_OWN_CLIENT_GROUPS = ("ptth-", *_PROXY_COMMANDS)  # beginnings of names
SANDBOX = "sandbox allow-scripts allow-forms allow-popups allow-downloads"
_COOKIE_DOMAIN = re.compile(r";[ \t]*domain[ \t]*(?:=[^;]*)?(?=;|\Z)", re.IGNORECASE)
_RUNS_NOTHING = re.compile(
    r"(?![^;]*\+xml)(?:image/(?!svg)[\w.+-]+|(?:audio|video|font)/[\w.+-]+|text/plain|text/css"
    r"|application/(?:json|pdf|zip|octet-stream))(?:;[^,]*)?",
    re.IGNORECASE | re.ASCII,
)


def runs_nothing(kind: str) -> bool:
    """Return whether no browser runs scripts in that Content-Type. No type, two or a malformed one may be HTML."""
    return len(kind) < 256 and _RUNS_NOTHING.fullmatch(kind) is not None


@functools.lru_cache(256)  # of names only: a field's value may be a secret
def _passing_name(name: str, dropped: frozenset[str]) -> str:
    """Return a field's name in lower case, with hyphens; "" if it is one of `dropped`, PTTH-* or X-Accel-*."""
    name = name.lower().replace("_", "-")
    return "" if name in dropped or name.startswith(("ptth-", "x-accel-")) else name


def forwardable(headers: Headers, dropped: frozenset[str]) -> Fields:
    """Return the fields of a request to forward: none of `dropped`, PTTH-*, X-Accel-*, or named by Connection.

    Host stays in any case. An app behind CGI cannot tell X_Forwarded_For from X-Forwarded-For, so underscores count as
    hyphens.
    """
    named = set(headers.tokens("connection")) if "connection" in headers else ()
    return [
        pair
        for pair in headers.pairs
        if (name := _passing_name(pair[0], dropped)) and (name not in named or name == "host")
    ]


@functools.lru_cache(256)
def _name_to_client(name: str) -> str:
    """Return a field's name in lower case, or "" if it may not go from a server to a client."""
    name = name.lower()
    if name in ("content-length", "x-apikey") or name.startswith(_NOT_TO_CLIENT):
        return ""
    return name if name in _TO_CLIENT or name.startswith(_TO_CLIENT_PREFIXES) else ""


# The members of a list. A quoted text or a <URL> may contain commas. Possessive, so no input makes the match slow.
_LIST = re.compile(r'(?:<[^<>]*+>|"(?:\\.|[^"\\])*+"|[^"<])*+')
_MEMBER = re.compile(r'(?:<[^<>]*+>|"(?:\\.|[^"\\])*+"|[^,"<])++')
_AUTH_PARAM = rf'({TOKEN})[ \t]*=[ \t]*({TOKEN}|"(?:\\.|[^"\\])*+")'  # RFC 9110, 11.2
_CHALLENGE = re.compile(rf"(?:({TOKEN})(?: +|\Z))?(?:{_AUTH_PARAM})?")  # SCHEME, SCHEME NAME=VALUE, NAME=VALUE


def _split_list(value: str) -> list[str]:
    """Return the members of a list; [] if it is ambiguous or has MAX_MEMBERS commas or more."""
    if value.count(",") >= MAX_MEMBERS or not _LIST.fullmatch(value):
        return []
    return [member for part in _MEMBER.findall(value) if (member := part.strip(" \t"))]


def name_realms(value: str, server: str) -> str:
    """Put a server's name into the realm of each challenge of WWW-Authenticate (RFC 9110, 11.6.1), or return "".

    A browser sends a password again to any URL of the same origin that names its realm. So each server gets realms of
    its own. A value that cannot be parsed, such as Negotiate with its data, is dropped.
    """
    challenges: list[tuple[str, list[tuple[str, str]]]] = []
    for member in _split_list(value):
        match = _CHALLENGE.fullmatch(member)
        if match and match[1]:
            challenges.append((match[1], []))
        if not match or not challenges:
            return ""
        if match[2]:
            challenges[-1][1].append((match[2], match[3]))
    named = []
    for scheme, parameters in challenges:
        realm = next((text for name, text in parameters if name.lower() == "realm"), "")
        realm = re.sub(r"\\(.)", r"\1", realm[1:-1]) if realm.startswith('"') else realm
        realm = server if realm in ("", server) else f"{server}: {realm}"
        others = "".join(f", {name}={text}" for name, text in parameters if name.lower() != "realm")
        quoted = re.sub(r'(["\\])', r"\\\1", realm)
        named.append(f'{scheme} realm="{quoted}"{others}')
    return ", ".join(named)


def max_forwards(request: Request) -> int | None:
    """Return Max-Forwards of OPTIONS or TRACE (RFC 9110, 7.6.2), 10**9 at most. ProtocolError 400 if it is no number.

    None for other methods, and without the field.
    """
    value = request.headers.get("max-forwards")
    if value is None or request.method not in ("OPTIONS", "TRACE"):
        return None
    if not _LENGTH.fullmatch(value):
        raise ProtocolError(400, "Max-Forwards is not one number")
    return int(min(float(value), 1e9))  # int refuses thousands of digits


def _filtered_value(name: str, value: str, headers: Headers, server: str) -> str:
    """Return the value of Link or WWW-Authenticate that the client gets, or "" to drop the field.

    A link to a compression dictionary is left out: it could apply to other servers' URLs (RFC 9842).
    """
    if name == "link":
        links = _split_list(value) if len(headers[name]) <= MAX_LINK else []
        return ", ".join(link for link in links if "compression-dictionary" not in link.replace("\\", "").lower())
    if not server:
        return value
    return name_realms(value, server) if len(headers[name]) <= MAX_CHALLENGES else ""


def _via(headers: Headers, minor: int = 1) -> tuple[str, str]:
    """Return the field Via of a message of HTTP/1.`minor` that passes the relay."""
    via = headers.get("via")
    return "Via", f"{via}, 1.{minor} ptth" if via else f"1.{minor} ptth"


def shared_origin_fields(status: int, headers: Headers, *, sandbox: bool = True, server: str = "") -> Fields:
    """Return the fields of a server's response that the client gets, with a sandbox: servers share the relay's origin.

    The name of the `server` is added to its realms; without a name they stay unchanged.
    """
    dropped = set(headers.tokens("connection"))
    if status == 304:  # a browser updates its stored response by it (RFC 9111, 4.3.4), which must not lose the sandbox
        dropped |= {"content-type", "content-security-policy"}
    result: Fields = []
    for name, value in headers.pairs:
        lower = _name_to_client(name)
        if lower in ("link", "www-authenticate"):
            value = _filtered_value(lower, value, headers, server)
            lower = lower if value else ""
        if lower and lower not in dropped:
            result.append((name, value))
    result += [_via(headers), NOSNIFF]
    # Connection may name Content-Type, and then that does not pass. Two types are joined by a comma.
    kind = "" if "content-type" in dropped else headers.get("content-type", "")
    if sandbox and status != 304 and not runs_nothing(kind):
        result.append(("Content-Security-Policy", SANDBOX))
    return result


def own_host_fields(headers: Headers) -> Fields:
    """Return the fields of a response that the client gets from a server with a host, and so an origin, of its own.

    Domain is removed from cookies, so that they are not sent to the hosts of other servers.
    """
    dropped = _NOT_TO_OWN_CLIENT.union(headers.tokens("connection"))
    result: Fields = []
    for name, value in headers.pairs:
        lower = name.lower()
        if lower not in dropped and not lower.startswith(_NOT_TO_OWN_CLIENT_GROUPS):
            result.append((name, _COOKIE_DOMAIN.sub("", value) if lower == "set-cookie" else value))
    return [*result, _via(headers)]


# A dot and the separators of a path, in every form that a proxy may normalise. nginx decodes %2F; Envoy and programs on
# Windows treat a backslash as a slash; behind two proxies an escape may be escaped again.
_ESCAPED_DOT = re.compile(r"%(?:25)*2e", re.IGNORECASE)
_SLASH, _BACKSLASH = r"/|%(?:25)*2f", r"\\|%(?:25)*5c"
_SEPARATORS = [
    re.compile(pattern, re.IGNORECASE) for pattern in ("/", _SLASH, rf"/|{_BACKSLASH}", rf"{_SLASH}|{_BACKSLASH}")
]
_PATH_PARAMETER = re.compile(rf";(?:(?!{_SLASH}|{_BACKSLASH}).)*", re.IGNORECASE)  # Java's servers ignore it
_STEPS = {"..": -1, ".": 0, "": 0}  # how much deeper a segment leads; any other: 1


def climbs(path: str) -> bool:
    """Return whether `path` leads above its beginning, in any way that a proxy or a server may read it.

    Empty segments do not count, because a proxy may merge slashes. A name may contain dots.
    """
    text = _ESCAPED_DOT.sub(".", path)
    if ".." not in text:
        return False
    text = _PATH_PARAMETER.sub("", text)
    readings = {tuple(separator.split(text)) for separator in _SEPARATORS}
    return any(min(itertools.accumulate(_STEPS.get(segment, 1) for segment in segments)) < 0 for segments in readings)


def is_loopback(address: str) -> bool:
    """Return whether an address is this machine's own."""
    return address.startswith("127.") or address in ("::1", "-", "")


def is_local(request: Request) -> bool:
    """Return whether a request comes from this machine itself, and not through a proxy on it."""
    if request.peer == "-" or not is_loopback(request.peer) or not request.minor:
        return False  # nginx as it is installed speaks HTTP/1.0 and adds no fields
    added = re.compile("forwarded|via|x-real-ip|x-forwarded-.*")  # by proxies
    return not any(map(added.fullmatch, request.headers))


def request_host(text: str) -> str:
    """Return the host in a Host field's value, in lower case, without port and without a final dot."""
    return re.sub(r":[0-9]*\Z", "", text.lower()).removesuffix(".")


def is_local_name(host: str) -> bool:
    """Return whether a Host field names this machine for itself: localhost, a name below it, a loopback address."""
    name = request_host(host)
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def outer_address(addresses: str) -> str:
    """Return the last of these addresses, as in X-Forwarded-For, that is not this machine's own, or "".

    For IPv6 return the /64 network, because one client has all its addresses.
    """
    for text in addresses.split(",")[:-9:-1]:  # of the last eight
        address = text.strip()[:MAX_AUDIT_TEXT]
        if is_loopback(address):
            continue
        try:
            return socket.inet_pton(socket.AF_INET6, address)[:8].hex()
        except (OSError, ValueError):
            return address
    return ""


class App:
    """A local web app as a handler: each request is forwarded to it over HTTP.

    `host_mode` decides which Host and Origin the app gets. "public": as the client sent them. "local": the app's own
    address. Another text: that host. "auto": public, until the app refuses that and accepts local.
    """

    def __init__(self, client: HTTPClient, host_mode: str = "auto") -> None:
        self.client = client
        client.silence_timeout = math.inf  # an event stream may be silent for hours
        client.idle_age = APP_IDLE_AGE
        client.retry_time = APP_WAIT
        self._authority = client.origin.authority if host_mode in ("auto", "public", "local") else host_mode
        self._local = host_mode not in ("auto", "public")  # whether the app gets `_authority` as its Host
        self._fixed = host_mode != "auto"  # whether `_local` stays as it is
        self._asked = self._fixed  # whether a first request has shown the mode
        self._logged = ""  # the failure that was logged last; "" after a response

    async def handle(self, request: Request) -> Response:
        """Return the app's response. ProtocolError 502 when there is none, 504 when it comes too late.

        404 for a target that leads above the path in the app's URL: only what is below it is served.
        """
        safe = request.method in ("GET", "HEAD")
        if not self._asked and not safe:
            await self._probe(request)
        response = await self._send(request, local=self._local)
        # Apps refuse an unknown Host or Origin with these. 400 and 403 may be about what another method sends.
        refused = (400, 403, 421) if safe else (421,)
        self._asked = self._asked or response.status not in refused
        can_repeat = request.body.data is not None or request.upgrade
        if self._fixed or response.status not in refused or not can_repeat:
            return response
        try:
            again = await self._send(request, local=True)
        except BaseException:
            await response.body.aclose()
            raise
        if again.status in refused:
            await again.body.aclose()
            return response
        await response.body.aclose()
        self._stay_local(response.status)
        return again

    async def _probe(self, request: Request) -> None:
        """Find out with GET / which Host the app accepts, before a request that must not be sent twice."""
        # Without Origin and Referer: the app may refuse a page of another site, and not the Host.
        fields = [pair for pair in request.headers.pairs if pair[0].lower() not in ("origin", "referer")]
        first = Request("GET", "/", Headers(fields), connection=request.connection)
        try:
            async with asyncio.timeout(PROBE_TIMEOUT):
                response = await self.handle(first)
                await response.body.aclose()
        except TimeoutError:
            pass  # that says nothing about the Host
        except ProtocolError:  # neither does this, if there is an app
            if not self.client.is_reachable:
                raise
        self._asked = True

    def _stay_local(self, status: int) -> None:
        self._local = self._fixed = self._asked = True
        log_line(
            f"ptth server: the app answers {status} to its public host name, so from now on it gets Host: "
            f'{self._authority}; to decide that in advance, set app_host = "local" or "public"'
        )

    async def _send(self, request: Request, *, local: bool) -> Response:
        """Send the request to the app, with its local or its public host name; return its response for the client."""
        if self.client.origin.path and climbs(request.target.partition("?")[0]):
            raise ProtocolError(404, "the path leads above the app's own")
        # Each proxy may add to the list; the first is the visitor's. Traefik says wss of a WebSocket.
        scheme = request.headers.get("x-forwarded-proto", "").partition(",")[0].strip().lower()
        public = f"http{'s' if scheme in ('https', 'wss') else ''}://{request.headers.get('host', '')}"
        own = f"http{'s' if self.client.origin.tls else ''}://{self._authority}"
        fields = self._request_fields(request, public, own if local else "")
        if request.body.expects:
            fields.append(("Expect", "100-continue"))
        outgoing = Request(request.method, request.target, Headers(fields), body=request.body, upgrade=request.upgrade)
        response = await self._ask(outgoing)
        response.headers = self._response_fields(response, public, own if local else "")
        return response

    async def _ask(self, request: Request) -> Response:
        """Return the app's response. ProtocolError 502 or 504; IncompleteBody for the request's body."""
        try:
            response = await self.client.handle(request, timeout=APP_RESPONSE_TIMEOUT)
        except IncompleteBody:
            raise
        except TimeoutError:
            raise ProtocolError(504, "the app did not answer in time") from None
        except OSError as error:
            raise self._failure(error) from None
        if self._logged:
            self._logged = ""
            log_line(f"ptth server: the app at {self.client.origin.place} answers again")
        return response

    def _failure(self, error: OSError) -> ProtocolError:
        """Log a change of the app's state, once. Return the client's error, which does not show the app's address."""
        if not self.client.is_reachable:
            line = f"the app at {self.client.origin.place} cannot be reached: {format_error(error)}; visitors get 502"
            reason, retry = "the app behind this server is not running", [("Retry-After", "2")]
        else:
            line = f"the app closed the connection without a response: {format_error(error)}"
            reason, retry = "the app closed the connection without a response", []
        if line != self._logged:
            self._logged = line
            log_line(f"ptth server: {line}")
        return ProtocolError(502, reason, headers=retry)

    def _request_fields(self, request: Request, public: str, own: str) -> Fields:
        """Return the fields of a request for an app that accepts only its local origin, `own`, if that is not "".

        Origin, Referer and Destination are changed if they name the `public` origin of this server. Another Origin
        stays: the app needs it to refuse requests from other sites.
        """
        path = self.client.origin.path
        if not (own or path):
            return forwardable(request.headers, _HOP_BY_HOP)
        fields = [("Host", own.partition("//")[2])] if own else []
        dropped = {"host", "x-forwarded-host", "x-forwarded-proto"} | _PUBLIC_ORIGIN if own else set()
        for name, value in forwardable(request.headers, _HOP_BY_HOP | dropped):
            lower = name.lower()
            if lower in ("origin", "referer", "destination"):
                value = move_origin(value, public, (own or public) + ("" if lower == "origin" else path))
            fields.append((name, value))
        return fields

    def _response_fields(self, response: Response, public: str, own: str) -> Fields:
        """Return the fields of the app's response, with the `public` origin in place of its `own` (if not "")."""
        path = self.client.origin.path
        headers = Headers(response.headers)
        # `forwardable` drops also these: the name of a new protocol, and the sign that tells proxies to stream.
        kept = {"upgrade", "x-accel-buffering"} if response.status in (101, 426) else {"x-accel-buffering"}
        fields = [pair for pair in headers.pairs if pair[0].lower() in kept]
        for name, value in forwardable(headers, _HOP_BY_HOP):
            lower = name.lower()
            if lower == "location" or own and lower == "access-control-allow-origin":
                value = self._public_url(value, public, own)
            elif path and lower == "set-cookie":
                value = re.sub(rf"(;[ \t]*(?i:path)[ \t]*=[ \t]*){re.escape(path)}(?=[/; \t]|\Z)/?", r"\1/", value)
            fields.append((name, value))
        return fields

    def _public_url(self, url: str, public: str, own: str) -> str:
        """Return a URL of the app as its visitors need it: with the public origin, and without the app's path."""
        path = self.client.origin.path
        url = move_origin(url, own or (public if path else ""), public, path)
        if public.startswith("https:"):  # an app that ignores X-Forwarded-Proto
            url = move_origin(url, f"http{public[5:]}", public, path)
        return without_path(url, path)


def move_origin(url: str, old: str, new: str, path: str = "") -> str:
    """Return `url` with the origin `new` if its origin is `old` (RFC 6454, 5), else as it is.

    `path`, which is put before each target at `old`, is taken away.
    """
    absolute = old.partition("//")[0] + url if url.startswith("//") else url  # RFC 3986, 4.2
    match = re.match(rf"((?i:https?)://[^/?#\s]*)(?:{re.escape(path)})?(?=[/?#]|\Z)", absolute)
    if match and normal_origin(match[1]) == normal_origin(old):
        return new + absolute[match.end() :]
    return url


def without_path(url: str, path: str) -> str:
    """Return `url` without the `path` at its beginning; as it is if it does not begin with that."""
    rest = url.removeprefix(path)
    if rest == url or rest[:1] not in ("", "/", "?", "#"):
        return url
    if re.match(r"/[/\\\t]", rest):  # browsers take //HOST and /\HOST for another host, and skip tabs
        return f"/.{rest}"
    return rest if rest.startswith("/") else f"/{rest}"


def normal_origin(origin: str) -> str:
    """Return an origin in lower case and without its scheme's default port, for comparisons."""
    scheme, _, authority = origin.lower().partition("://")
    return f"{scheme}://{authority.removesuffix({'http': ':80', 'https': ':443'}.get(scheme, ':'))}"


# -- 10. File server --
# From a path to a file, a listing or a zip, and from an upload to a file. Does not use sockets or the tunnel. In this
# order: dates, ranges, tags, paths; bodies; the page of a listing; content types; preconditions; names that are not
# served; `Site`; zips; responses with a file; uploads; handlers.

_TIME = r"(?P<hour>[01][0-9]|2[0-3]):(?P<minute>[0-5][0-9]):(?P<second>[0-5][0-9]|60)"
_DAY, _MONTH = "|".join(_DAYS), f"(?P<month>{'|'.join(_MONTHS)})"
_DATES = (  # IMF-fixdate, which is nearly always used, then the forms of RFC 850 and of asctime in C
    re.compile(rf"(?:{_DAY}), (?P<day>[0-9]{{2}}) {_MONTH} (?P<year>[0-9]{{4}}) {_TIME} GMT"),
    re.compile(
        rf"(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day, (?P<day>[0-9]{{2}})-{_MONTH}-(?P<year>[0-9]{{2}}) {_TIME} GMT"
    ),
    re.compile(rf"(?:{_DAY}) {_MONTH} (?P<day>[ 0-9][0-9]) {_TIME} (?P<year>[0-9]{{4}})"),
)


def parse_date(text: str, now: float) -> int | None:
    """Return the POSIX time of an HTTP date in any of its three forms (RFC 9110, 5.6.7), or None."""
    import calendar

    match = next(filter(None, (form.fullmatch(text) for form in _DATES)), None)
    if not match:
        return None
    day, year, hour, minute, second = map(int, match.group("day", "year", "hour", "minute", "second"))
    month = _MONTHS.index(match["month"]) + 1
    if len(match["year"]) == 2:
        today = time.gmtime(now)
        year += today.tm_year - today.tm_year % 100
        if (year - 50, month, day, hour, minute, second) > today[:6]:  # more than 50 years ahead means the past
            year -= 100
    if not (year >= 1 and 1 <= day <= calendar.monthrange(year, month)[1]):
        return None
    return calendar.timegm((year, month, day, hour, minute, second))


_RANGE = re.compile(r"([0-9]+)-([0-9]*)|-([0-9]+)")


def _number(digits: str) -> int:
    """Return the number, or one larger than any file: int() raises for more than 4,300 digits."""
    return int(digits) if len(digits) < 4300 else 10**4300


def _parse_range(text: str, size: int) -> tuple[int, int]:
    """Return the first and last position of one range; first >= size if it has no bytes. Raises ValueError."""
    match = _RANGE.fullmatch(text)
    if not match:
        raise ValueError(text)
    start, end, suffix = match.groups()
    first = max(size - _number(suffix), 0) if suffix else _number(start)  # "-5": the last five bytes
    last = _number(end) if end else first + size
    if last < first:
        raise ValueError(text)
    return first, min(last, size - 1)


def parse_ranges(text: str, size: int) -> list[tuple[int, int]] | None:
    """Return (first, last) of each satisfiable range of `size` bytes; [] if there is none, None to ignore the field.

    It is ignored for unknown units, bad syntax, ranges larger than the file in sum (RFC 9110, 14.2), and empty files:
    a proxy that fetches a file in slices asks for a range when its client wants the whole file.
    """
    unit, _, rest = text.partition("=")
    members = [member for part in rest.split(",", MAX_MEMBERS) if (member := part.strip(" \t"))]
    if unit.lower() != "bytes" or not 0 < len(members) <= MAX_RANGES or not size:
        return None
    try:
        ranges = [found for member in members if (found := _parse_range(member, size))[0] < size]
    except ValueError:
        return None
    return ranges if sum(last - first + 1 for first, last in ranges) <= size else None


_ENTITY_TAG = re.compile(r'(?:\A|,)[ \t]*(W/)?("[!#-~\x80-\xff]*")(?=[ \t]*(?:,|\Z))')


def tag_matches(field_value: str, tag: str, *, weak: bool) -> bool:
    """Return whether a list of tags, or "*", names the strong `tag`; `weak`: ignore W/ before it (RFC 9110, 8.8.3)."""
    if field_value.strip(" \t") == "*":
        return True
    if tag not in field_value:  # fast, for long lists
        return False
    members = _ENTITY_TAG.findall(field_value)
    return ("", tag) in members or weak and ("W/", tag) in members


_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")


def parse_path(path: str) -> tuple[tuple[bytes, ...], bool]:
    """Return a path's decoded segments, and whether it names a directory (it ends in a slash or a dot segment).

    Dot segments, also written %2e, are removed (RFC 3986, 5.2.4), then empty ones. An escaped slash does not separate
    segments. Only short paths are cached: 256 paths of 8 KB take 80 MB. ProtocolError 400 for an invalid path.
    """
    return _parse_short_path(path) if len(path) < 256 else _parse_path(path)


def _parse_path(path: str) -> tuple[tuple[bytes, ...], bool]:
    if not path.startswith("/"):
        raise ProtocolError(400, "the target is not a path")
    if _BAD_ESCAPE.search(path):
        raise ProtocolError(400, "a percent sign without two hex digits in the path")
    if "%00" in path or "\0" in path:
        raise ProtocolError(400, "a NUL in the path")
    raw = path.encode("latin-1").split(b"/")[1:]
    decoded = [urllib.parse.unquote_to_bytes(segment) if b"%" in segment else segment for segment in raw]
    segments: list[bytes] = []
    for segment in decoded:
        if segment not in (b".", b".."):
            segments.append(segment)
        elif segment == b".." and segments:
            segments.pop()
    return tuple(filter(None, segments)), decoded[-1] in (b"", b".", b"..")


_parse_short_path = functools.lru_cache(256)(_parse_path)


@dataclass(slots=True)
class Found:
    """What was found at a path: a regular file, which is open until `close`, or a directory."""

    fd: int  # -1 for a directory, and for a file after `close`
    facts: os.stat_result
    place: bytes  # its path in the file system

    def close(self) -> None:
        """Close the file, unless that was done before."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def has_changed(self, end: int) -> bool:
        """Return whether the open file is now shorter than `end`, or was written without growing, as a log does."""
        now = os.fstat(self.fd)
        written = now.st_mtime_ns != self.facts.st_mtime_ns
        return now.st_size < end or written and now.st_size <= self.facts.st_size


class FileBody(Body):
    """A part of an open file, which `aclose` closes; without a `length` all that can be read from `offset`."""

    def __init__(self, file: Found, offset: int, length: int | None) -> None:
        self._file = file
        self._offset = offset
        self.length = length
        self.replayable = length is not None

    def part(self, offset: int, count: int) -> Body | None:
        if self.length is None:
            return None
        return FileBody(self._file, self._offset + offset, min(count, self.length - offset))

    def slices(self, size: int) -> Iterator[tuple[int, int]]:
        """Yield (offset, count) of each part to send.

        IncompleteBody when the file has changed: its bytes are no longer those that Content-Length and ETag describe.
        """
        end = self._offset + (self.length or 0)
        for offset in range(self._offset, end, size):
            if self._file.has_changed(end):
                raise IncompleteBody("the file changed while it was sent")
            yield offset, min(size, end - offset)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        offset = self._offset
        while self.length is None and (data := read_at(self._file.fd, offset, WRITE_HIGH_WATER)):  # then no slices
            offset += len(data)
            yield data
        for offset, count in self.slices(READ_SIZE):
            data = read_at(self._file.fd, offset, count)
            if len(data) < count:
                raise IncompleteBody("the file became shorter")
            yield data
            await asyncio.sleep(0)  # let other connections run, however fast this peer reads

    async def write_to(self, sink: Sink) -> None:
        if self.length is None:
            await super().write_to(sink)
            return
        for offset, count in self.slices(4 * SENDFILE_SIZE):
            if not await sink.send_file(self._file.fd, offset, count):
                await Body.write_to(FileBody(self._file, offset, count), sink)

    async def aclose(self) -> None:
        self._file.close()


class ListingEntry(NamedTuple):
    """One line of a directory listing."""

    name: bytes
    is_dir: bool
    size: int  # bytes; 0 for a directory
    mtime: int  # POSIX time in nanoseconds
    error: str = ""  # why it cannot be read; then size and time are unknown


# Characters that are invisible in a name, or change its order: controls, marks of direction, and those without width.
_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u180e\u3164\uffa0\x00-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]"
)


def name_text(name: bytes) -> str:
    """Return a file's name as valid Unicode, with U+FFFD in place of bytes that are not UTF-8."""
    return name.decode("utf-8", "replace")


def show_name(name: bytes) -> str:
    """Return a file's name as text, with U+FFFD in place of invisible characters."""
    return _UNSEEN.sub("\ufffd", name_text(name))


def entry_link(entry: ListingEntry) -> str:
    """Return the URL of an entry, relative to its directory's URL.

    It has no "./" in front, because several programs that read listings do not support that. A colon is escaped, so
    that the text before it is not taken for a scheme.
    """
    return quote(entry.name) + ("/" if entry.is_dir else "")


LISTING_SCRIPT = """
const fold=text=>text.normalize("NFKC").toUpperCase().normalize("NFKC");
function setFilter(){const box=document.getElementById("filter"),count=document.getElementById("count");
if(!box)return;const all=count.textContent;
const rows=[...document.querySelectorAll("tbody tr:not(.up)")].map(row=>[row,fold(row.cells[0].textContent)]);
box.hidden=false;box.oninput=()=>{const word=fold(box.value);let shown=0;
for(const [row,name] of rows)shown+=!(row.hidden=!name.includes(word));
count.textContent=word?shown+" of "+rows.length+" match":all}}
setFilter();
"""
UPLOAD_FORM = """<div class="bar u"><form id="up" method="post" enctype="multipart/form-data" action="?upload={token}">
<input type="file" name="file" multiple required aria-label="Files to upload"><button>Upload</button></form>
<form id="new" method="post" enctype="multipart/form-data" action="?upload={token}"><input name="folder" required
maxlength="255" placeholder="New folder" aria-label="Name of a new folder"><button>Create</button></form></div>
<ul id="jobs" aria-live="polite"></ul>
"""
UPLOAD_STYLE = """
.u{margin-top:-.5rem}.u input[type=file]{border:0;padding:0;flex:1;min-width:12rem;width:auto}
.u input.s{flex:none;min-width:0;width:7.7rem;color:transparent}@media(pointer:coarse){.u span{visibility:hidden}}
::file-selector-button,#jobs button{font:inherit;color:var(--ink);background:var(--page);border:1px solid var(--edge);
border-radius:6px;padding:.25rem .7rem;margin-right:.7rem;cursor:pointer}#jobs button{margin:0;padding:.1rem .5rem}
#jobs{list-style:none;margin:0 0 1rem;padding:0;font-size:.9rem}
#jobs b{font-weight:400;flex:1 1 12rem;overflow-wrap:anywhere}
#jobs li{display:flex;flex-wrap:wrap;gap:.2rem .7rem;align-items:center;padding:.35rem 0;
border-bottom:1px solid var(--line)}
#jobs progress{width:8rem;accent-color:var(--link)}#jobs span{color:var(--quiet);font-variant-numeric:tabular-nums}
.drop{outline:3px dashed var(--link);outline-offset:-4px}
"""
# A page in a sandbox has no origin and can send forms only. There the script puts dropped files into the form.
UPLOAD_SCRIPT = r"""
const byId=id=>document.getElementById(id),form=byId("up"),input=form.elements.file,folder=byId("new");
const boxed=self.origin==="null",here=location.origin+location.pathname;  // without a password
const units=["B","KiB","MiB","GiB","TiB"];let queue=Promise.resolve(),active=0,timer;
const make=(tag,text="")=>Object.assign(document.createElement(tag),{textContent:text});
const size=n=>{let u=0;for(;n>=999.5&&u<4;u++)n/=1024;return(u&&n<99.95?n.toFixed(1):Math.round(n))+" "+units[u]};
const left=s=>s<90?Math.ceil(s)+" s":s<5400?Math.round(s/60)+" min":(s/3600).toFixed(1)+" h";
const reason=(status,text)=>status?text.split("\n")[0]||"error "+status:"the connection broke";
const refresh=async()=>{const word=byId("filter")?.value;
const page=new DOMParser().parseFromString(await(await fetch(here+location.search)).text(),"text/html");
for(const part of [".bar","table"])document.querySelector(part).replaceWith(page.querySelector(part));
setFilter();if(word){byId("filter").value=word;byId("filter").oninput()}};
function add(file,why){
const url=here+encodeURIComponent(file.name),row=make("li"),bar=make("progress"),note=make("span","waiting");
const stop=make("button","Cancel");let request,over=false;
row.append(make("b",file.name),bar,note,stop);byId("jobs").append(row);
bar.max=file.size||1;bar.value=0;
const end=text=>{if(!over){over=true;active--;note.textContent=text;bar.remove();stop.remove()}};
const later=tag=>queue=queue.then(()=>over||send(tag)).catch(()=>end("the connection broke"));
const ask=tag=>{note.textContent="exists already";bar.hidden=true;stop.textContent="Keep the old one";
const yes=make("button","Replace");yes.onclick=()=>{yes.remove();bar.hidden=false;stop.textContent="Cancel";later(tag)};
stop.before(yes);stop.onclick=()=>{yes.remove();end("not uploaded")}};
const cancel=()=>{end("cancelled");request?.abort()};
const send=tag=>new Promise(done=>{const begin=Date.now();stop.onclick=cancel;
request=new XMLHttpRequest;request.open("PUT",url);
request.setRequestHeader(tag?"If-Match":"If-None-Match",tag||"*");
request.upload.onprogress=e=>{bar.value=e.loaded;const speed=e.loaded*1000/(Date.now()-begin+1);note.textContent=
size(e.loaded)+" of "+size(e.total)+", "+size(speed)+"/s, "+left((e.total-e.loaded)/speed)+" left"};
request.onloadend=()=>{const status=request.status,tag=request.getResponseHeader("ETag");done();
if(status===412&&tag)return ask(tag);if(status!==201&&status!==204)return end(reason(status,request.responseText));
end("uploaded, "+size(file.size));clearTimeout(timer);timer=setTimeout(refresh,200)};request.send(file)});
stop.onclick=cancel;active++;if(why)return end(why);
fetch(url,{method:"HEAD"}).then(there=>there.headers.get("ETag")).then(tag=>tag?ask(tag):later(),()=>later())}
onbeforeunload=e=>{if(active)e.preventDefault()};
ondragover=e=>{if(e.dataTransfer.types.includes("Files")){e.preventDefault();document.body.classList.add("drop")}};
ondragleave=e=>{if(!e.relatedTarget)document.body.classList.remove("drop")};
ondrop=e=>{e.preventDefault();document.body.classList.remove("drop");const files=e.dataTransfer.files;
if(boxed){input.files=files;return form.requestSubmit()}
const items=[...e.dataTransfer.items].filter(i=>i.kind==="file");
[...files].forEach((file,i)=>add(file,items[i]?.webkitGetAsEntry?.()?.isDirectory&&"a folder: drop its files"))};
if(!boxed){form.querySelector("button").replaceWith(make("span","or drop files on this page"));input.className="s";
input.onchange=()=>{[...input.files].forEach(file=>add(file));input.value=""};
folder.onsubmit=async e=>{e.preventDefault();const name=folder.elements.folder;
const answer=await fetch(here+encodeURIComponent(name.value)+"/",{method:"PUT",headers:{"If-None-Match":"*"}});
if(answer.ok){name.value="";return refresh()}add({name:name.value},reason(answer.status,await answer.text()))}}
"""


def _sum_up(entries: list[ListingEntry]) -> str:
    """Return the number of folders and files, and their size, as text."""
    readable = [entry for entry in entries if not entry.error]
    folders = sum(entry.is_dir for entry in readable)
    facts = [format_count(n, noun) for n, noun in ((folders, "folder"), (len(readable) - folders, "file")) if n]
    facts.append(format_size(sum(entry.size for entry in readable)) if entries else "Empty folder")
    if len(readable) < len(entries):
        facts.append(f"{len(entries) - len(readable):,} not readable")
    return ", ".join(facts)


# The value of sort, the label and the attributes of each column.
_SORT_KEYS = (("name", "Name", ""), ("time", "Modified (UTC)", ' class="n w"'), ("size", "Size", ' class="n"'))
_PARENT_ROW = (
    '<tr class="up"><td class="d"><a href="../" aria-label="Folder above">..</a></td>'
    '<td class="n w"></td><td class="n"></td></tr>\n'
)


def listing_page(path: tuple[bytes, ...], entries: list[ListingEntry], order: str, form: str, script: str) -> bytes:
    """Make the page of a directory: `path` is below the root, `order` the sort order, `form` the HTML for uploads.

    All links are relative. Sorting and the zip are buttons of forms: they need no script, and wget -r ignores them.
    Programs read the page, too, by simple patterns. So each row is one line, `href` is the only attribute of its link,
    and the size is last. Links to the folders above have no quotes, because such programs look for quotes and would
    read these folders again and again.
    """
    names = ["Files", *map(show_name, path)]
    above = [f"<a href={'../' * (len(path) - i)}>{escape(name)}</a>" for i, name in enumerate(names[:-1])]
    crumbs = "<i>/</i>".join([*above, f'<span aria-current="page">{escape(names[-1])}</span>'])
    controls = (
        '<input id="filter" type="search" placeholder="Filter" aria-label="Filter by name" hidden>\n'
        '<form><button name="zip" value="">Download as .zip</button></form>'
    )
    form = f"<style>{UPLOAD_STYLE}</style>{form}" if form else ""
    headings = "".join(_sort_heading(*column, order) for column in _SORT_KEYS)
    rows = "".join([_PARENT_ROW if path else "", *map(_entry_row, entries)])
    return page(
        "/" + "/".join(names[1:]),
        f'<main>\n<h1>{crumbs}</h1>\n<div class="bar"><span id="count" aria-live="polite">{_sum_up(entries)}</span>\n'
        f'{controls if entries else ""}</div>\n{form}<form>\n<table class="l">\n<thead><tr>{headings}</tr></thead>\n'
        f"<tbody>\n{rows}</tbody>\n</table>\n</form>\n</main>\n"
        f"{f'<script>{script}</script>' if entries or form else ''}",
    )


def _sort_heading(key: str, label: str, kind: str, order: str) -> str:
    """Make a column's heading: a button that sorts by it, or reverses the order."""
    active = (order.removeprefix("-") or "name") == key
    backwards = order.startswith("-")
    value = f"-{key}" if active and not backwards else key
    aria = f' aria-sort="{"descending" if backwards else "ascending"}"' if active else ""
    arrow = f' <span aria-hidden="true">{"&darr;" if backwards else "&uarr;"}</span>' if active else ""
    return f'<th scope="col"{kind}{aria}><button name="sort" value="{value}">{label}{arrow}</button></th>'


def _entry_row(entry: ListingEntry) -> str:
    name = escape(show_name(entry.name)) + ("/" if entry.is_dir else "")
    column = '<td class="d">' if entry.is_dir else "<td>"
    if entry.error:
        link, when = f"<i>{name}</i>", ""
        size = f' title="{escape(entry.error)}">not readable'
    else:
        link = f'<a href="{entry_link(entry)}">{name}</a>'
        when = time.strftime("%Y-%m-%d %H:%M", time.gmtime(clamped_seconds(entry.mtime)))
        size = ">" if entry.is_dir else f' title="{format_count(entry.size, "byte")}">{format_size(entry.size)}'
    return f'<tr>{column}{link}</td><td class="n w">{when}</td><td class="n"{size}</td></tr>\n'


TYPES = {  # types that differ between versions of the standard library, or that it lacks
    ".7z": "application/x-7z-compressed", ".apk": "application/vnd.android.package-archive", ".apng": "image/apng",
    ".atom": "application/atom+xml", ".avi": "video/x-msvideo", ".bz2": "application/x-bzip2",
    ".cjs": "text/javascript", ".dll": "application/octet-stream", ".eot": "application/vnd.ms-fontobject",
    ".epub": "application/epub+zip", ".exe": "application/octet-stream",
    ".docx": "application/vnd.openxmlformats-officedocument.wordprocessingml.document", ".flac": "audio/flac",
    ".geojson": "application/geo+json", ".glb": "model/gltf-binary", ".gltf": "model/gltf+json",
    ".gz": "application/gzip", ".ics": "text/calendar", ".js": "text/javascript", ".jsonld": "application/ld+json",
    ".jxl": "image/jxl", ".log": "text/plain", ".m4a": "audio/mp4", ".m4v": "video/mp4", ".map": "application/json",
    ".markdown": "text/plain", ".md": "text/plain", ".mjs": "text/javascript", ".mkv": "video/x-matroska",
    ".mpd": "application/dash+xml", ".odp": "application/vnd.oasis.opendocument.presentation",
    ".ods": "application/vnd.oasis.opendocument.spreadsheet", ".odt": "application/vnd.oasis.opendocument.text",
    ".oga": "audio/ogg", ".ogg": "audio/ogg", ".ogv": "video/ogg", ".opus": "audio/ogg", ".otf": "font/otf",
    ".php": "text/plain", ".pptx": "application/vnd.openxmlformats-officedocument.presentationml.presentation",
    ".rss": "application/rss+xml", ".rst": "text/plain", ".rtf": "application/rtf", ".sh": "text/plain",
    ".sql": "text/plain", ".tex": "text/plain", ".tgz": "application/gzip", ".toml": "text/plain",
    ".ttc": "font/collection", ".ttf": "font/ttf", ".wav": "audio/wav", ".weba": "audio/webm", ".webp": "image/webp",
    ".woff": "font/woff", ".woff2": "font/woff2", ".xht": "application/xhtml+xml", ".xhtml": "application/xhtml+xml",
    ".xlsx": "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet", ".xz": "application/x-xz",
    ".yaml": "text/plain", ".yml": "text/plain", ".zst": "application/zstd",
}  # fmt: skip
PLAIN_TEXT = "text/plain; charset=utf-8"


@functools.lru_cache(1024)
def known_type(name: bytes) -> str:
    """Return the Content-Type for a file's extension, the same on every system, or "".

    Text gets charset=utf-8. HTML and XML do not: they name their encoding themselves, and charset would override it.
    """
    import mimetypes

    # Before init(), types_map is the module's own table; init() would add the types of this machine.
    extension = os.path.splitext(name)[1].lower().decode("latin-1")
    known = TYPES.get(extension) or mimetypes.types_map.get(extension) or ""
    return f"{known}; charset=utf-8" if known.startswith("text/") and known not in ("text/html", "text/xml") else known


SNIFFED = 4096  # bytes of a file that are read to find its type; also the size of each file in /sys
_BINARY = bytes((*range(9), 11, *range(14, 27), *range(28, 32)))  # as browsers decide (MIME Sniffing, 3)


def is_text(beginning: bytes) -> bool:
    """Return whether a file with this beginning is text in UTF-8."""
    if len(beginning.translate(None, _BINARY)) < len(beginning):  # six times as fast as a search by a pattern
        return False
    try:
        beginning.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data" and len(beginning) >= SNIFFED  # its last character is cut off
    return True


Outcome = tuple[int, list[tuple[int, int]]]  # of preconditions: a status; for 206 the (first, last) of each range
_WHOLE: Outcome = (200, [])
_CONDITIONS = {"if-match", "if-none-match", "if-modified-since", "if-unmodified-since", "range"}
# Times of files, in POSIX seconds, that have no meaning: Nix, container images and reproducible archives set them.
_PLACEHOLDER_TIMES = {0, 1, 315532800}


def evaluate_preconditions(method: str, headers: Headers, tag: str, modified: int, size: int, now: float) -> Outcome:
    """Decide between 200, 206, 304, 412 and 416, in the order of RFC 9110, 13.2.2; `modified` in whole seconds.

    Without a `tag` the file has no validator and no ranges.
    """
    if headers.keys().isdisjoint(_CONDITIONS):
        return _WHOLE
    if "if-match" in headers:
        failed = not tag_matches(headers["if-match"], tag, weak=False)
    else:
        since = parse_date(headers.get("if-unmodified-since", ""), now)
        failed = since is not None and modified > since
    if failed:
        return 412, []
    if "if-none-match" in headers:
        unchanged = tag_matches(headers["if-none-match"], tag, weak=True)
    else:
        since = parse_date(headers.get("if-modified-since", ""), now)
        unchanged = since is not None and modified <= since and modified not in _PLACEHOLDER_TIMES
    if unchanged:
        return 304, []
    usable = "range" in headers and method == "GET" and tag
    return _evaluate_range(headers, tag, modified, size, now) if usable else _WHOLE


def _evaluate_range(headers: Headers, tag: str, modified: int, size: int, now: float) -> Outcome:
    """Decide between 200, 206 and 416, by If-Range and Range."""
    condition = headers.get("if-range", tag)
    if condition != tag and (modified in _PLACEHOLDER_TIMES or parse_date(condition, now) != modified):
        return _WHOLE
    ranges = parse_ranges(headers["range"], size)
    if ranges is None:
        return _WHOLE
    return (206 if ranges else 416), ranges


def entity_tag(facts: os.stat_result, encoding: str = "") -> str:
    """Return a file's ETag. It has the inode and its change time: another file may have the same size and time."""
    return f'"{facts.st_mtime_ns:x}-{facts.st_size:x}-{facts.st_ino:x}-{facts.st_ctime_ns:x}{encoding}"'


METHODS = ("GET", "HEAD", "OPTIONS")
UPLOAD_METHODS = ("PUT", "POST", "MKCOL", "PROPFIND")
_ALLOW_BUT_MKCOL = ("Allow", ", ".join(name for name in (*METHODS, *UPLOAD_METHODS) if name != "MKCOL"))
_ALLOW = ("Allow", ", ".join(METHODS))
_KNOWN_METHODS = {"POST", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT"}  # these get 405, unknown ones 501
ENCODINGS = {"br": (b".br", b""), "gzip": (b".gz", b"\x1f\x8b")}  # of files beside the plain one: name, first bytes
# Characters that HFS+ ignores when it compares names.
_IGNORED = re.compile("[\u200c-\u200f\u202a-\u202e\u206a-\u206f\ufeff]")


def compared_name(name: bytes, system: str = sys.platform) -> bytes:
    """Return a file's name as the file system compares it, apart from upper and lower case."""
    if system != "darwin" or name.isascii():
        return name
    return _IGNORED.sub("", name.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")


def is_hidden(segment: bytes, system: str = sys.platform) -> bool:
    """Return whether a name is hidden: it begins with a dot, .well-known excepted (RFC 8615)."""
    name = compared_name(segment, system)
    return name.startswith(b".") and name != b".well-known"


# Names that Windows treats as a path, a drive, a stream or a device, or as another name: it drops dots and spaces at
# the end, and GIT~1 may be the short name of .git.
_NO_WINDOWS_NAME = re.compile(
    r"[\x00-\x1f\"*/:<>?\\|]|[ .]\Z|\A[^.]{0,6}~[0-9]{1,6}(?:\.[^.]{0,3})?\Z"
    r"|\A(?:con|prn|aux|nul|clock\$|conin\$|conout\$|(?:com|lpt)[0-9\xb9\xb2\xb3]) *(?:\.|\Z)",
    re.IGNORECASE,
)


def is_foreign(segment: bytes, system: str = sys.platform) -> bool:
    """Return whether a segment is not a file's name: the system would open a file of another name, or a device."""
    if b"/" in segment:
        return True
    if system in ("win32", "cygwin"):
        try:
            return bool(_NO_WINDOWS_NAME.search(segment.decode()))
        except UnicodeDecodeError:
            return True
    return system == "darwin" and compared_name(segment, system).lower() == b"..namedfork"


def is_refused(segments: tuple[bytes, ...], hidden: bool) -> bool:
    """Return whether a path is not served because of a name in it; with `hidden`, hidden names are served."""
    return any(map(is_foreign, segments)) or not hidden and any(map(is_hidden, segments))


_is_short_path_refused = functools.lru_cache(256)(is_refused)
_CONFIGURATIONS = (b"ptth_server.toml", b"ptth_relay.toml")
PARTIAL = b".ptth-upload-"  # the beginning of the name of an incomplete upload
# Texts that editors, installers and people add to the name of a copy.
_COPY_MARK = (
    rb"(?:[~#0-9]+|[ ._~#(-]+"
    rb"(?:bak|backup|copy|new|old|orig|prev|sav|te?mp|sw[a-z]|un~|dpkg-|ucf-|rpm|gz|xz|bz2|zst|br|zip|tar|[0-9]).*)"
)


def secret_names(names: Iterable[bytes]) -> re.Pattern[bytes]:
    """Return a pattern that finds the names of secret files, configurations, copies of both, and unfinished uploads."""
    patterns = [rb"ptth_(?:server|relay).*\.toml", rb"\A" + re.escape(PARTIAL)]
    for name in {*_CONFIGURATIONS, *names}:
        stem, extension = map(re.escape, os.path.splitext(name))
        copy = _COPY_MARK + rb"?"
        if extension:
            copy = rb"(?:" + copy + extension + rb"(?:[^a-z0-9].*)?|" + _COPY_MARK + rb")"
        patterns.append(rb"\A[.#~_]*(?:(?:copy|backup|bak|old)[ ._-](?:of )?)?" + stem + copy + rb"\Z")
    return re.compile(rb"\A(?!.*\.example\Z).*?(?:" + rb"|".join(patterns) + rb")", re.IGNORECASE | re.DOTALL)


_OF_A_PROCESS = re.compile(rb"/proc/[0-9]+/")


def _absolute(path: str) -> bytes:
    """Return an absolute path. Not os.path.abspath: it removes `..`, which behind a link leads to another place."""
    name = os.fsencode(path)
    return name if os.path.isabs(name) else os.path.join(os.getcwdb(), name)


def _is_below(place: bytes, root: bytes) -> bool:
    """Return whether a real path is that of the directory `root`, or below it."""
    return os.path.join(place, b"").startswith(os.path.join(root, b""))  # each with a slash at its end


_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


def _open_place(place: bytes) -> Found:
    """Open a file or a directory, but no link.

    A directory that cannot be opened may have files that can: on Windows all, elsewhere those with x and without r
    permission.
    """
    try:
        fd = os.open(place, _OPEN_FLAGS)
    except PermissionError:
        if os.path.isdir(place):
            return Found(-1, os.stat(place), place)
        raise
    return Found(fd, os.fstat(fd), place)


@dataclass(frozen=True)
class SiteOptions:
    """How a directory is served: the flags of `ptth file-server` and keys of ptth_server.toml."""

    hidden: bool = False
    follow_symlinks: bool = False  # also those that leave the root
    listing: bool = True  # also JSON and zip
    cors: bool = False
    headers: tuple[tuple[str, str], ...] = ()
    auth: str = ""  # "USER:PASSWORD"
    upload: bool = False
    max_upload: int = 0  # bytes of one file; 0 is no limit


ErrorTable: TypeAlias = Sequence[tuple[int, str, set[int]]]  # status, reason, and the errors that become them
_READ_ERRORS: ErrorTable = (
    (403, "no permission to read this", {errno.EACCES, errno.EPERM}),
    (503, "too many open files", {errno.EMFILE, errno.ENFILE}),
    (503, "not enough memory, or the file is busy; try again", {errno.EAGAIN, errno.ENOMEM}),
    (404, "not found", {errno.ENOENT, errno.ENOTDIR}),
    (404, "not found", {errno.EILSEQ, errno.EINVAL, errno.ENAMETOOLONG}),  # invalid names
    (404, "not found", {errno.EISDIR, errno.ELOOP, errno.ENODEV, errno.ENXIO, errno.EOPNOTSUPP}),  # not files
)
_WRITE_ERRORS: ErrorTable = (
    (507, "the disk has no space for this", {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}),
    (412, "the name is taken", {errno.EEXIST}),
    (403, "this folder cannot be written to", {errno.EACCES, errno.EPERM, errno.EROFS}),
    (409, "there is no such folder", {errno.ENOENT, errno.ENOTDIR}),
    (413, "the file is too large for the file system", {errno.EFBIG}),
    (400, "the file system does not accept this name", {errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL}),
    *_READ_ERRORS,
)


def file_error(error: OSError, place: bytes = b"", table: ErrorTable = _READ_ERRORS) -> ProtocolError:
    """Return the client's error for one of the file system. One that is not in `table` is 500, and logged."""
    for status, reason, numbers in table:
        if error.errno in numbers:
            return ProtocolError(status, reason, headers=[("Retry-After", "1")] if status == 503 else [])
    log_line(f"cannot read {os.fsdecode(error.filename or place)}: {format_error(error)}")
    return ProtocolError(500, "the file system failed; the server's log has the details")


_DIGITS = re.compile(r"0*(\d+)")  # of any script
_LETTERS = str.maketrans(  # that Unicode does not decompose
    {"\xf8": "o", "\u0142": "l", "\u0111": "d", "\u0127": "h", "\u0131": "i", "\xe6": "ae", "\u0153": "oe"}
)


def natural_order(name: bytes) -> tuple[str, bytes]:
    """Return the key that sorts names as people expect: 2 before 10, and letters with accents next to those without."""
    text = name_text(name).casefold()
    if not text.isascii():
        import unicodedata

        parts = unicodedata.normalize("NFKD", text).translate(_LETTERS)
        text = "".join(c for c in parts if not unicodedata.combining(c))
    # A number becomes 0, its number of digits as one character, and its digits: so a longer number sorts later.
    return _DIGITS.sub(lambda match: f"0{chr(len(match[1]))}{match[1]}", text), name


ORDERS: dict[str, Callable[[ListingEntry], Any]] = {
    "name": lambda entry: natural_order(entry.name),
    "size": lambda entry: entry.size,
    "time": lambda entry: entry.mtime,
}


def sort_entries(entries: Iterable[ListingEntry], order: str) -> list[ListingEntry]:
    """Sort entries, folders first. `order` is name, size or time, reversed with a minus; default: name."""
    found = sorted(entries, key=ORDERS["name"])
    key = ORDERS.get(order.removeprefix("-"), ORDERS["name"])
    found.sort(key=key, reverse=order.startswith("-"))  # stable: folders have no size, and stay sorted by name
    found.sort(key=lambda entry: not entry.is_dir)
    return found


def json_listing(entries: list[ListingEntry]) -> Response:
    """Make a directory's listing as JSON."""
    import json

    rows = [
        {"name": name_text(e.name), "size": e.size, "is_dir": e.is_dir, "mtime": e.mtime // 1_000_000_000}
        | {"href": entry_link(e)}
        | ({"error": e.error} if e.error else {})
        for e in entries
    ]
    fields = [("Content-Type", "application/json; charset=UTF-8"), ("Vary", "Accept"), NOSNIFF]
    return Response(200, fields, BytesBody(json.dumps({"entries": rows}, separators=(",", ":")).encode()))


class Site:
    """A directory that is served.

    Files in `private` are never served: a configuration, a certificate, a key. Copies of them, and every configuration
    of this program, are recognised by their names and not served either.
    """

    def __init__(self, root: str, options: SiteOptions | None = None, *, private: Iterable[str] = ()) -> None:
        self.options = options or SiteOptions()
        # These paths are resolved again for each request: a link to the directory, or to a key, may change.
        self._root = _absolute(root)
        self._inside = os.path.join(self._root, b"")  # with a slash at its end
        self._private = [_absolute(path) for path in private]
        pattern = secret_names(os.path.basename(path) for path in self._private)

        @functools.lru_cache(1024)  # of this site only, whose pattern it is
        def is_secret(place: bytes) -> bool:
            return bool(pattern.match(compared_name(os.path.basename(place))))

        self._is_secret = is_secret
        self.uploads = Uploads(self) if self.options.upload else None
        self._allow = ("Allow", ", ".join((*METHODS, *UPLOAD_METHODS) if self.uploads else METHODS))

    async def respond(
        self, request: Request, segments: tuple[bytes, ...], directory: bool, *, as_json: bool = False
    ) -> Response:
        """Answer a request for the path `segments` below the root; `directory`: the path ends in a slash.

        `as_json`: answer for a directory with its listing as JSON, whatever Accept says, and never with index.html.
        """
        if self.uploads and request.method in UPLOAD_METHODS:
            return await self.uploads.respond(request, segments, directory)
        if request.method not in METHODS:
            status = 405 if request.method in _KNOWN_METHODS else 501
            raise ProtocolError(status, f"{request.method} is not possible here", headers=[self._allow])
        if request.method == "OPTIONS":
            return Response(204, [self._allow, NOSNIFF])
        found = self.open(segments)
        if found.fd < 0:
            return await self._respond_folder(request, found, segments, directory, as_json)
        if directory:
            found.close()
            raise ProtocolError(404, "not found")
        return self._respond_file(request, found, segments)

    async def _respond_folder(
        self, request: Request, found: Found, segments: tuple[bytes, ...], directory: bool, as_json: bool
    ) -> Response:
        """Answer with a redirect to a directory's path with a slash, its index.html, its zip, or its listing.

        A thread makes the zip and the listing, because large ones take long.
        """
        if not directory:
            return text_response(301, "it is a directory\n", [("Location", redirect_below(request.target))])
        index = None if as_json else self._open_index(segments, found.place)
        if index:
            return self._respond_file(request, index, (*segments, b"index.html"))
        if not self.options.listing:
            raise ProtocolError(404, "not found")
        query = urllib.parse.parse_qs(request.target.partition("?")[2][:MAX_QUERY], keep_blank_values=True)
        as_json = as_json or wants_json(request.headers)
        form = self.uploads.form(request.headers) if self.uploads else ""
        try:
            # Resolve links once: if a link to the root changes meanwhile, two directories must not be mixed.
            place = self._follow(found.place)
            if "zip" in query and not as_json:
                return await asyncio.to_thread(zip_response, self, segments, place)
            order = query.get("sort", [""])[-1]
            return await asyncio.to_thread(self._list, segments, place, order, as_json, form)
        except OSError as error:
            raise file_error(error) from None

    def open(self, segments: tuple[bytes, ...]) -> Found:
        """Open a path below the root.

        Raises ProtocolError: 404 if it is missing, not served, outside the root or not a regular file, 403 without
        permission, 503 when no descriptors are left, 500 when the file system fails.
        """
        check = _is_short_path_refused if len(segments) < 32 else is_refused
        if check(segments, self.options.hidden):
            raise ProtocolError(404, "not found")
        try:
            return self._open(self._inside + (b"/".join(segments) or b"."), segments)
        except OSError as error:
            raise file_error(error) from None

    def _open(self, place: bytes, segments: tuple[bytes, ...]) -> Found:
        """Open `place`, where `segments` below the root may be links; none if links were resolved. Raises OSError."""
        asked = place
        # Only a path with a link is resolved, as that is slow. O_NOFOLLOW finds a link at the end, lstat one before.
        path = self._inside
        for segment in segments[:-1] if hasattr(os, "O_NOFOLLOW") else segments:
            path += segment
            if stat.S_ISLNK(os.lstat(path).st_mode):
                place = self._follow(place)
                break
            path += b"/"
        try:
            found = _open_place(place)
        except OSError:
            if not os.path.islink(place):
                raise
            place = self._follow(place)
            found = _open_place(place)
        mode = found.facts.st_mode
        if stat.S_ISREG(mode) and not self._is_private(place, found.facts, asked):
            return found
        found.close()
        if not stat.S_ISDIR(mode):  # a device, a socket, a FIFO (O_NONBLOCK: it does not block), or a secret file
            raise FileNotFoundError(errno.ENOENT, "not readable")
        return found

    def _follow(self, place: bytes) -> bytes:
        """Resolve the links of a path; FileNotFoundError when it leads outside the root."""
        real = os.path.realpath(place, strict=True)
        if not self.options.follow_symlinks and not _is_below(real, os.path.realpath(self._root)):
            raise FileNotFoundError(errno.ENOENT, "not readable")
        return real

    def _is_private(self, place: bytes, facts: os.stat_result, asked: bytes) -> bool:
        """Return whether a file is a secret, by its inode or its names: `asked` may be a link to `place`."""
        if self._is_secret(place) or asked is not place and self._is_secret(asked):
            return True
        for private in self._private:
            try:
                if os.path.samestat(facts, os.stat(private)):
                    return True
            except OSError:
                continue
        # Files of a process in /proc show its memory, and the passwords in its environment.
        return not facts.st_size and bool(_OF_A_PROCESS.match(os.path.realpath(place)))

    def _respond_file(self, request: Request, found: Found, segments: tuple[bytes, ...]) -> Response:
        """Answer with an open file. It is closed here, unless the response's body has to read it."""
        response = None
        try:
            kind, beginning, sized = _sniff(found, segments[-1])
            if sized:
                found, encoding, vary = self._precompressed(request, found, segments)
                known = b"" if encoding else beginning
                response = _sized_response(request, found, kind, known, encoding, vary)
            else:
                response = _unsized_response(request, found, kind)
            return response
        except OSError as error:
            raise file_error(error, found.place) from None
        finally:
            if response is None or response.body.data is not None:
                found.close()

    def _precompressed(self, request: Request, plain: Found, segments: tuple[bytes, ...]) -> tuple[Found, str, str]:
        """Return the file to send (`plain`, or NAME.br or NAME.gz beside it), its coding, and the value of Vary.

        For a range request it is always `plain`. The other files are closed.
        """
        path = self._inside + b"/".join(segments)
        there = [encoding for encoding, (name, _) in ENCODINGS.items() if os.access(path + name, os.F_OK)]
        if not there:
            return plain, "", ""  # the usual case, without the cost of exceptions
        varies = ""
        ranged = request.method == "GET" and "range" in request.headers
        accepted = {} if ranged else parse_weights(request.headers, "accept-encoding")
        weight = {encoding: accepted.get(encoding, accepted.get("*", 0)) for encoding in there}
        for encoding in sorted(there, key=lambda encoding: -weight[encoding]):
            name, beginning = ENCODINGS[encoding]
            other = self._open_encoded(plain, (*segments[:-1], segments[-1] + name), beginning)
            if other:
                varies = "Accept-Encoding"
                if weight[encoding] > 0 and weight[encoding] >= accepted.get("identity", 0):
                    plain.close()
                    return other, encoding, varies
                other.close()
        return plain, "", varies

    def _open_encoded(self, plain: Found, segments: tuple[bytes, ...], beginning: bytes) -> Found | None:
        """Open a file that is `plain` in a content coding, and begins with `beginning`; None if there is none."""
        try:
            other = self.open(segments)
        except ProtocolError:
            return None
        # It must not be older. But programs that copy the time may round it down to whole seconds or microseconds.
        mtime = plain.facts.st_mtime_ns
        rounded = (mtime // 10**9 * 10**9, mtime // 1000 * 1000)
        is_current = other.facts.st_mtime_ns >= mtime or other.facts.st_mtime_ns in rounded
        with contextlib.suppress(OSError):
            usable = other.fd >= 0 and other.facts.st_size and is_current
            if usable and (not beginning or read_at(other.fd, 0, len(beginning)) == beginning):
                return other
        other.close()
        return None

    def _open_index(self, segments: tuple[bytes, ...], place: bytes) -> Found | None:
        """Open a folder's index.html, or return None. ProtocolError 403 when it cannot be read, 500, 503."""
        try:
            found = self.open((*segments, b"index.html"))
        except ProtocolError as error:
            if error.status == 404:
                return None
            # In a folder without x permission no file can be opened. Its names, if readable, show if there is one.
            if error.status == 403 and not os.access(place, os.X_OK):
                with contextlib.suppress(OSError):
                    if b"index.html" not in os.listdir(place):
                        return None
            raise
        return found if found.fd >= 0 else None

    def _list(self, segments: tuple[bytes, ...], place: bytes, order: str, as_json: bool, form: str) -> Response:
        entries = sort_entries(self.entries(place), order)
        if as_json:
            return json_listing(entries)
        vary = ("Vary", "Accept, Origin" if self.uploads else "Accept")
        script = LISTING_SCRIPT + (UPLOAD_SCRIPT if form else "")
        return html_response(200, listing_page(segments, entries, order, form, script), [vary], script)

    def entries(self, place: bytes) -> Iterator[ListingEntry]:
        """Yield the files and directories in a directory, without hidden ones and links that leave the root.

        For an entry that cannot be read, `error` is the reason.
        """
        with os.scandir(place) as items:
            yield from filter(None, map(self._entry, items))

    def _entry(self, item: os.DirEntry[bytes]) -> ListingEntry | None:
        if is_hidden(item.name) and not self.options.hidden:
            return None
        is_dir = False  # if the file system does not tell
        try:
            is_dir = item.is_dir(follow_symlinks=False)
            place = self._follow(item.path) if item.is_symlink() else item.path
            facts = item.stat()
        except OSError as error:
            # A broken link, one that leads outside or in a circle, or a file removed meanwhile, is left out.
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return None
            return ListingEntry(item.name, is_dir, 0, 0, error.strerror or "not readable")
        is_dir = stat.S_ISDIR(facts.st_mode)  # or a link to one
        if not is_dir and (not stat.S_ISREG(facts.st_mode) or self._is_private(place, facts, item.path)):
            return None
        if not _is_readable(item.path, is_dir):
            return ListingEntry(item.name, is_dir, 0, 0, os.strerror(errno.EACCES))
        return ListingEntry(item.name, is_dir, 0 if is_dir else facts.st_size, facts.st_mtime_ns)


def _is_readable(place: bytes, is_dir: bool) -> bool:
    """Return whether a file can be read, or a folder listed, or its index.html read."""
    if is_dir and not os.access(place, os.R_OK | os.X_OK):
        place = os.path.join(place, b"index.html")
    return os.access(place, os.R_OK)


def tell_secrets(site: Site, command: str) -> None:
    """Log in one line which secret files are below its root. Only their usual places are searched."""
    root = os.path.realpath(site._root)
    usual = [os.path.join(root, folder, name) for folder in (b"", b"config") for name in _CONFIGURATIONS]
    places = map(os.path.realpath, [*site._private, *filter(os.path.exists, usual)])
    below = [os.fsdecode(place) for place in dict.fromkeys(places) if _is_below(place, root)]
    if below:
        log_line(f"ptth {command}: these secret files in the directory are not served: {', '.join(below)}")


def attachment(name: str) -> tuple[str, str]:
    """Return the Content-Disposition for a download that browsers save as `name` (RFC 6266, appendix D)."""
    plain = re.sub(r'[^ -~]|["%\\/]', "_", name)  # for old clients, some of which would decode a percent sign
    return "Content-Disposition", f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name.encode())}"


# Characters that unpacking programs drop from a name, or treat as a separator or a drive.
_NOT_IN_ZIP = re.compile(r"[\x00-\x1f\x7f\\]|(?<=^[A-Za-z]):")


def member_name(name: bytes) -> str:
    """Return the name of a file or a folder in a zip."""
    return _NOT_IN_ZIP.sub("_", name_text(name))


def distinct(name: str, taken: dict[str, int]) -> str:
    """Return `name`, with a number if it is in `taken`, and add it there: a name maps to its last number.

    Names that differ only in Unicode normalisation are equal: macOS would unpack one of them over the other.
    """
    import unicodedata

    stem, extension = os.path.splitext(name)
    first = key = unicodedata.normalize("NFC", name)
    while key in taken:
        taken[first] += 1
        name = f"{stem} ({taken[first]}){extension}"
        key = unicodedata.normalize("NFC", name)
    taken[key] = 1
    return name


ZIP32_MAX = 0xFFFFFFFF - 1024 * 1024  # bytes; a larger file may need more than 32 bits for its sizes in a zip
_ZIP_LOCAL = struct.Struct("<4s5H3I2H")
_ZIP_CENTRAL = struct.Struct("<4s6H3I5H2I")
_MADE_BY = 3 << 8 | 45  # a program on Unix, so that modes count, of version 4.5, which has sizes of 64 bits


class _Member(NamedTuple):
    """The data in both headers of a zip's member, and the offset of the first one."""

    name: bytes
    mode: int
    stamp: bytes  # extended timestamp: POSIX time of the last change, which every time zone reads alike
    form: tuple[int, int, int, int, int]  # version needed, flags, method, time, date
    offset: int


class ZipWriter:
    """Makes the bytes of a zip that can be unpacked while it arrives (APPNOTE.TXT 6.3).

    The module zipfile cannot do that: in a stream it writes each member's size after the member. Here a small member is
    stored, with size and checksum before it. A large one uses deflate without compression: that format marks its own
    end, and size and checksum follow it.
    """

    def __init__(self) -> None:
        self.waiting = bytearray()  # what `take` returns
        self._size = 0  # bytes made so far
        self._directory = bytearray()
        self._count = 0

    def take(self) -> bytes:
        """Return the bytes made since the last call."""
        data = bytes(self.waiting)
        self.waiting.clear()
        return data

    def _put(self, data: bytes) -> None:
        self.waiting += data
        self._size += len(data)

    def _begin(self, name: str, mode: int, mtime: int, *, version: int, flags: int, method: int) -> _Member:
        """Return a member that begins here. Methods: 0 is stored, 8 deflate."""
        seconds = mtime // 1_000_000_000
        stamp = struct.pack("<2HBi", 0x5455, 5, 1, seconds) if -(2**31) <= seconds < 2**31 else b""
        # Programs that do not know the stamp read this one as local time, and are usually in the server's time zone.
        year, month, day, hour, minute, second = max(
            time.localtime(min(clamped_seconds(mtime), 2**32 - 1))[:6], (1980, 1, 1, 0, 0, 0)
        )
        form = (hour << 11 | minute << 5 | second // 2, (year - 1980) << 9 | month << 5 | day)
        # Flag 0x800: the name is UTF-8.
        return _Member(name.encode(), mode, stamp, (version, flags | 0x800, method, *form), self._size)

    def add(self, name: str, mode: int, mtime: int, data: bytes = b"") -> None:
        """Add a member: `mode` is its st_mode, `mtime` in nanoseconds. A folder's name ends in a slash."""
        member = self._begin(name, mode, mtime, version=20, flags=0, method=0)
        checksum, size = zlib.crc32(data), len(data)
        self._put_local(member, checksum, size)
        self._put(data)
        self._add_to_directory(member, checksum, size, size)

    def add_large(self, name: str, mode: int, mtime: int, file: io.BufferedReader, limit: int) -> Iterator[bytes]:
        """Add a member with the rest of `file`, `limit` bytes at most; yield the bytes that are ready.

        OSError when `file` cannot be read: then the member ends there, and the zip can be continued.
        """
        large = limit > ZIP32_MAX
        # Flag 8: checksum and sizes follow the data.
        member = self._begin(name, mode, mtime, version=45 if large else 20, flags=8, method=8)
        self._put_local(member, 0, 0xFFFFFFFF if large else 0, struct.pack("<2H2Q", 1, 16, 0, 0) if large else b"")
        checksum = size = 0
        begin = self._size
        try:
            while piece := file.read(min(ZIP_PIECE, limit - size)):
                checksum, size = zlib.crc32(piece, checksum), size + len(piece)
                # A block of deflate's type "stored" (RFC 1951, 3.2.4).
                self._put(struct.pack("<BHH", 0, len(piece), len(piece) ^ 0xFFFF))
                self._put(piece)
                yield self.take()
        except OSError as error:
            raise OSError(error.errno, f"incomplete: {error.strerror}") from None
        finally:
            self._put(struct.pack("<BHH", 1, 0, 0xFFFF))  # the last block, empty
            packed = self._size - begin
            self._put(struct.pack("<4sIQQ" if large else "<4sIII", b"PK\7\10", checksum, packed, size))
            self._add_to_directory(member, checksum, packed, size)

    def _put_local(self, member: _Member, checksum: int, size: int, extra: bytes = b"") -> None:
        extra += member.stamp
        lengths = (len(member.name), len(extra))
        self._put(_ZIP_LOCAL.pack(b"PK\3\4", *member.form, checksum, size, size, *lengths) + member.name + extra)

    def _add_to_directory(self, member: _Member, checksum: int, packed: int, size: int) -> None:
        """Add a member to the central directory."""
        extra = member.stamp
        large = [number for number in (size, packed, member.offset) if number >= 0xFFFFFFFF]
        if large:
            extra += struct.pack(f"<2H{len(large)}Q", 1, 8 * len(large), *large)
        version, *form = member.form
        attributes = member.mode << 16 | (0x10 if stat.S_ISDIR(member.mode) else 0)
        packed, size, offset = (min(number, 0xFFFFFFFF) for number in (packed, size, member.offset))
        self._directory += _ZIP_CENTRAL.pack(
            b"PK\1\2", _MADE_BY, 45 if large else version, *form, checksum, packed, size,
            len(member.name), len(extra), 0, 0, 0, attributes, offset,
        )  # fmt: skip
        self._directory += member.name + extra
        self._count += 1

    def finish(self) -> Iterator[bytes]:
        """Yield the bytes not taken yet, and the central directory."""
        yield self.take()
        begin, size, count = self._size, len(self._directory), self._count
        for at in range(0, size, ZIP_PIECE):
            yield bytes(self._directory[at : at + ZIP_PIECE])
        last = b""
        if count >= 0xFFFF or begin + size >= 0xFFFFFFFF:
            last = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, _MADE_BY, 45, 0, 0, count, count, size, begin)
            last += struct.pack("<4sIQI", b"PK\6\7", 0, begin + size, 1)
        count, size, begin = min(count, 0xFFFF), min(size, 0xFFFFFFFF), min(begin, 0xFFFFFFFF)
        yield last + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, size, begin, 0)


class FolderZip:
    """A zip of all that is served below a directory, not compressed, made while it is sent.

    Its member could-not-be-read.txt lists the entries that could not be read.
    """

    def __init__(self, site: Site, top: bytes) -> None:
        self._site = site
        self._top = top  # its real path
        self._archive = ZipWriter()
        self._taken: dict[str, int] = {}  # the names in the top folder
        self.failed: list[str] = []  # a line for each entry that cannot be read

    def pieces(self) -> Iterator[bytes]:
        """Yield the zip. Raises OSError when the directory itself cannot be read."""
        archive = self._archive
        for place, name, entry in self.walk():
            if entry.is_dir:
                archive.add(name + "/", stat.S_IFDIR | 0o755, entry.mtime)
            else:
                try:
                    yield from self._file(place, name)
                except OSError as error:
                    self.failed.append(f"{name}: {error.strerror}")
            if len(archive.waiting) >= ZIP_PIECE:
                yield archive.take()
        if self.failed:
            text = "".join(f"{line}\n" for line in self.failed)
            note = distinct("could-not-be-read.txt", self._taken)
            archive.add(note, stat.S_IFREG | 0o644, time.time_ns(), text.encode())
        yield from archive.finish()

    def _file(self, place: bytes, name: str) -> Iterator[bytes]:
        """Add a file to the zip; yield the bytes that are ready. Raises OSError with the reason."""
        archive, found = self._archive, self._site._open(place, ())
        if found.fd < 0:
            raise FileNotFoundError(errno.ENOENT, "not a file any more")
        size = found.facts.st_size
        limit = size or ZIP32_MAX  # a log may grow without end; files in /proc have size 0 and are not empty
        member = (name, stat.S_IFREG | 0o644 | found.facts.st_mode & 0o111, found.facts.st_mtime_ns)
        with open(found.fd, "rb") as file:
            if size < SMALL_BODY and len(data := file.read(min(SMALL_BODY, limit))) < SMALL_BODY:
                archive.add(*member, data)
            else:
                file.seek(0)
                yield from archive.add_large(*member, file, limit)
            if found.has_changed(size):
                raise OSError(errno.EIO, "the file changed while it was read")

    def walk(self) -> Iterator[tuple[bytes, str, ListingEntry]]:
        """Yield (place, name below the top, entry) of all that is served below it, folders before their files.

        Each name is used once: names that are not UTF-8 may be equal as text. A folder that contains itself, by a link,
        is skipped.
        """
        stack = [(self._top, "", frozenset({self._top}))]
        while stack:
            place, prefix, above = stack.pop()
            try:
                # Names that a zip can hold come first, so that they stay unchanged.
                entries = sorted(
                    self._site.entries(place), key=lambda e: (member_name(e.name).encode() != e.name, e.name)
                )
            except OSError as error:
                if not prefix:
                    raise
                self.failed.append(f"{prefix[:-1]}: {error.strerror}")
                continue
            names = {} if prefix else self._taken
            for entry in entries:
                below, name = os.path.join(place, entry.name), prefix + distinct(member_name(entry.name), names)
                real = os.path.realpath(below) if entry.is_dir else b""
                if entry.error:
                    self.failed.append(f"{name}: {entry.error}")
                elif real not in above:
                    if entry.is_dir:
                        stack.append((below, name + "/", above | {real}))
                    yield below, name, entry


class ZipBody(Body):
    """A zip that is made in a thread while it is sent."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._zip = pieces

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (piece := await asyncio.to_thread(next, self._zip, None)) is not None:
            yield piece

    async def aclose(self) -> None:
        del self._zip  # closes its open file, after the thread that uses it has ended


def zip_response(site: Site, segments: tuple[bytes, ...], top: bytes) -> Response:
    """Make the response with the zip of the directory `top`. Raises OSError when that cannot be read."""
    pieces = FolderZip(site, top).pieces()
    first = next(pieces)
    disposition = attachment(show_name((segments or (b"files",))[-1]) + ".zip")
    fields = [("Content-Type", "application/zip"), NOSNIFF, disposition]
    return Response(200, fields, ZipBody(itertools.chain([first], pieces)))


_PAGES = (16 * 1024, 64 * 1024)  # bytes; the size of files in /sys with other processors


def _sniff(found: Found, name: bytes) -> tuple[str, bytes, bool]:
    """Return the content type of an open file, the bytes read from it, and whether its size is true. Raises OSError.

    Files in /proc and /sys are made while they are read; their size is 0, or that of a memory page.
    """
    kind, size = known_type(name), found.facts.st_size
    if kind and size > SNIFFED and size not in _PAGES:
        return kind, b"", True
    count = min(size, SNIFFED)
    beginning = read_at(found.fd, 0, count or SNIFFED)
    sized = len(beginning) == count or os.fstat(found.fd).st_size != size  # it is being written
    return kind or (PLAIN_TEXT if is_text(beginning) else "application/octet-stream"), beginning, sized


def _unsized_response(request: Request, found: Found, kind: str) -> Response:
    """Answer with all that can be read from a file whose size is not true. It has no validators and no ranges."""
    status, _ = evaluate_preconditions(request.method, request.headers, "", 0, 0, 0)
    if status != 200:
        return _without_file(status, 0, [])
    body = AbsentBody(None) if request.method == "HEAD" else FileBody(found, 0, None)
    return Response(200, [NOSNIFF, ("Content-Type", kind)], body)


def _sized_response(request: Request, found: Found, kind: str, beginning: bytes, encoding: str, vary: str) -> Response:
    """Answer with a file or with ranges of it; `beginning` are its bytes that were read already. Raises OSError."""
    size = found.facts.st_size
    tag = entity_tag(found.facts, encoding)
    modified = found.facts.st_mtime_ns // 1_000_000_000
    now = time.time()
    # RFC 9110, 8.8.2.1: not in the future. Some file systems have times before 1970, too.
    fields = [("ETag", tag), ("Last-Modified", format_date(max(0, min(modified, int(now)))))]
    if vary:
        fields.append(("Vary", vary))
    status, ranges = evaluate_preconditions(request.method, request.headers, tag, modified, size, now)
    if status not in (200, 206):
        return _without_file(status, size, fields)
    if encoding:
        fields.append(("Content-Encoding", encoding))
    fields += [("Accept-Ranges", "bytes"), NOSNIFF]
    if len(ranges) > 1:
        boundary = f"ptth-{found.facts.st_mtime_ns:x}-{size:x}"
        fields.append(("Content-Type", f"multipart/byteranges; boundary={boundary}"))
        return Response(206, fields, _multipart(found, kind, boundary, ranges))
    fields.append(("Content-Type", kind))
    first, last = ranges[0] if ranges else (0, size - 1)
    if ranges:
        fields.append(("Content-Range", f"bytes {first}-{last}/{size}"))
    return Response(status, fields, _file_body(request.method, found, beginning, first, last - first + 1))


def _without_file(status: int, size: int, fields: Fields) -> Response:
    """Answer 304; ProtocolError for 412 and 416."""
    if status == 304:
        return Response(304, [*fields, NOSNIFF])
    if status == 412:
        raise ProtocolError(412, "a precondition failed", headers=fields)
    raise ProtocolError(416, "no such range", headers=[*fields, ("Content-Range", f"bytes */{size}")])


def _file_body(method: str, found: Found, beginning: bytes, first: int, count: int) -> Body:
    """Return the body for a part of an open file. A small one is read now, so that it is sent with its head."""
    if method == "HEAD":
        return AbsentBody(count)
    if first + count <= len(beginning):
        return BytesBody(beginning[first : first + count])
    if count <= SMALL_BODY and len(data := read_at(found.fd, first, count)) == count:
        return BytesBody(data)
    return FileBody(found, first, count)


def _multipart(found: Found, kind: str, boundary: str, ranges: list[tuple[int, int]]) -> Body:
    """Return the body of several ranges, each behind a head of its own (RFC 9110, 14.6)."""
    bodies: list[Body] = []
    for first, last in ranges:
        content_range = f"bytes {first}-{last}/{found.facts.st_size}"
        head = f"\r\n--{boundary}\r\nContent-Type: {kind}\r\nContent-Range: {content_range}\r\n\r\n"
        bodies += [BytesBody(head.encode("latin-1")), FileBody(found, first, last - first + 1)]
    return JoinedBody(*bodies, BytesBody(f"\r\n--{boundary}--\r\n".encode("latin-1")))


_COMMIT = threading.Lock()  # held from the check that a name is free until the upload has that name
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f]")


def lock_file(fd: int) -> bool:
    """Lock an open file; return False if another process holds the lock. Windows locks open files itself."""
    try:
        import fcntl

        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except OSError:
        return False
    return True


def give_name(partial: bytes, place: bytes) -> None:
    """Rename a file to a name that must be free. Raises FileExistsError.

    Only a hard link cannot replace a file that another program makes meanwhile; not every file system has hard links.
    """
    try:
        os.link(partial, place)
    except OSError:
        if os.path.lexists(place):
            raise FileExistsError(errno.EEXIST, "the name is taken") from None
        os.rename(partial, place)
    else:
        os.unlink(partial)


class PartialFile:
    """A file that is being uploaded: hidden and locked until it is complete. Its methods block: call them in threads.

    When an upload is cancelled, a method may still run, or begin, in its thread. So each method waits for the others,
    and after `discard` none makes a file.
    """

    def __init__(self, place: bytes) -> None:
        self._place = place
        self._partial = os.path.join(os.path.dirname(place), PARTIAL + os.urandom(16).hex().encode())
        self._fd = -1
        self._busy = threading.Lock()
        self._unsynced = 0
        self._discarded = False

    def open(self, length: int) -> None:
        """Make the file. Raises OSError; ENOSPC also when the disk has fewer than `length` bytes free."""
        import shutil

        if length and shutil.disk_usage(os.path.dirname(self._place)).free < length:
            raise OSError(errno.ENOSPC, "no space")
        with self._busy:
            if not self._discarded:
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
                self._fd = os.open(self._partial, flags, 0o666)
                lock_file(self._fd)

    def write(self, data: bytearray) -> None:
        """Append `data`. Sync after every SYNC_SIZE bytes, because one sync at the end would take too long."""
        with self._busy:
            view = memoryview(data)
            while view:
                view = view[os.write(self._fd, view) :]
            self._unsynced += len(data)
            if self._unsynced >= SYNC_SIZE:
                os.fsync(self._fd)
                self._unsynced = 0

    def finish(self, mtime: int | None, check: Callable[[], os.stat_result | None]) -> os.stat_result:
        """Give the file its name, and return its status. `check` returns the file to replace, or None, or raises."""
        with self._busy:
            os.fsync(self._fd)
            if os.name == "nt":  # there an open file cannot be renamed; elsewhere the lock is needed until it is
                self._close()
            if mtime is not None:
                os.utime(self._partial, (mtime, mtime))
            with _COMMIT:
                old = check()
                if old:
                    os.chmod(self._partial, old.st_mode & 0o777)  # not setuid: it was meant for the old content
                    os.replace(self._partial, self._place)
                else:
                    give_name(self._partial, self._place)
                self._close()
                return os.stat(self._place)

    def discard(self) -> None:
        """Remove the file. There is none any more if it has its name already."""
        with self._busy, contextlib.suppress(OSError):
            self._discarded = True
            self._close()
            os.unlink(self._partial)

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def remove_partial_files(root: bytes) -> None:
    """Remove the incomplete files of uploads that were killed. Those of running uploads are locked."""
    for folder, _, names in os.walk(root):
        for name in names:
            if re.fullmatch(re.escape(PARTIAL) + rb"[0-9a-f]{32}", name):
                path = os.path.join(folder, name)
                with contextlib.suppress(OSError):
                    with open(path, "rb+") as file:
                        is_left = lock_file(file.fileno())
                    if is_left:
                        os.unlink(path)


async def in_thread(work: Callable[..., T], *args: Any) -> T:
    """Run a blocking function of an upload in a thread. Its OSError becomes a ProtocolError."""
    try:
        return await asyncio.to_thread(work, *args)
    except OSError as error:
        raise file_error(error, table=_WRITE_ERRORS) from None


def is_cross_site(headers: Headers) -> bool:
    """Return whether a page of another site makes the browser send this request: such a page must not upload.

    Browsers send Sec-Fetch-Site, but not over plain http. There, Origin must name the same host as Host. Do not take
    the host from other fields: with CORS, a page may set those. Programs send neither field.
    """
    if "sec-fetch-site" in headers:
        return headers["sec-fetch-site"] not in ("same-origin", "none")
    origin = normal_origin(headers.get("origin", ""))
    own = normal_origin(f"{origin.partition('://')[0]}://{headers.get('host', '')}")
    return "origin" in headers and origin != own


_BOUNDARY = re.compile(
    r'multipart/form-data[ \t]*;(?:.*;)?[ \t]*boundary=(?:"([ -~]{1,70})"|([!#-:<-~]{1,70}))[ \t]*(?:;|\Z)',
    re.IGNORECASE,
)
_PART_HEAD = re.compile(rf"[ \t]*\r\n({_FIELD_LINES})")
_PARAMETER = re.compile(r';[ \t]*(filename|name)=(?:"((?:\\"|[^"])*)"|([^";\s]+))', re.IGNORECASE)


class FormReader:
    """Reads multipart/form-data as a stream (RFC 7578): the head of each part, then its content in pieces.

    ProtocolError 400 with `close` when the form is invalid or incomplete, 415 when the body is not a form.
    """

    def __init__(self, request: Request) -> None:
        boundary = _BOUNDARY.match(request.headers.get("content-type", ""))
        if not boundary:
            raise ProtocolError(415, "send a form (multipart/form-data), or use PUT")
        self._body = request.body
        self._mark = f"\r\n--{boundary[1] or boundary[2]}".encode("latin-1")
        self._data = b"\r\n"  # so that the first boundary is found at the start of the body, too
        self._parts = 0

    async def read(self) -> bytes:
        """Return the next piece of the part's content, or b"" at its end."""
        while (end := self._data.find(self._mark)) < 0 and len(self._data) < len(self._mark):
            await self._more()
        count = end if end >= 0 else len(self._data) - len(self._mark) + 1  # the rest may begin a boundary
        data, self._data = self._data[:count], self._data[count:]
        return data

    async def value(self) -> bytes:
        """Return the first 256 bytes of the part's content, and discard the rest."""
        value = b""
        while piece := await self.read():
            value = (value + piece)[:256]
        return value

    async def next_part(self) -> dict[str, str] | None:
        """Skip to the next part; return its name and, if it is a file, its filename. None at the end of the form."""
        while await self.read():
            pass
        at = len(self._mark)
        while len(self._data) < at + 2:
            await self._more()
        if self._data.startswith(b"--", at):
            for _ in range(16):  # discard the epilogue
                if not await self._body.read():
                    break
            return None
        return await self._read_head(at)

    async def _read_head(self, at: int) -> dict[str, str]:
        """Read a part's head, which begins at `at`, and return its parameters."""
        while (end := self._data.find(b"\r\n\r\n", at)) < 0 and len(self._data) < MAX_FORM_PART_HEAD:
            await self._more()
        head = _PART_HEAD.fullmatch(self._data[at : end + 2].decode("latin-1"))
        self._parts += 1
        if not head or not 0 < end < MAX_FORM_PART_HEAD or self._parts > MAX_FORM_PARTS:
            raise ProtocolError(400, f"not a form, or one of more than {MAX_FORM_PARTS:,} parts", close=True)
        self._data = self._data[end + 4 :]
        found = _PARAMETER.findall(parse_fields(head[1]).get("content-disposition", ""))
        return {name.lower(): quoted or token for name, quoted, token in found}

    async def _more(self) -> None:
        data = await self._body.read()
        if not data:
            raise ProtocolError(400, "the form ends before its last boundary", close=True)
        self._data += data


class Uploads:
    """Stores files in the folders of a site. A file gets its name when it is complete. Only If-Match replaces a file.

    A listing in the relay's sandbox has no origin, and is_cross_site would refuse its form. So the form has a token,
    which is sent only in listings without an Origin field in the request: pages of other sites cannot read it.
    """

    _token = os.urandom(16).hex()  # one for the process: a page that was loaded before SIGHUP can still upload

    def __init__(self, site: Site) -> None:
        self._site = site
        self._limit = site.options.max_upload

    def form(self, headers: Headers) -> str:
        """Return the HTML of the forms in a listing."""
        return "" if "origin" in headers else UPLOAD_FORM.format(token=self._token)

    async def respond(self, request: Request, segments: tuple[bytes, ...], directory: bool) -> Response:
        """Answer PUT of a file or (with a slash at the end) a folder, POST of a form, and the WebDAV of rclone."""
        headers = request.headers
        token = urllib.parse.parse_qs(request.target.partition("?")[2][:MAX_QUERY]).get("upload", [""])[-1]
        if is_cross_site(headers) and not is_same_secret(token.encode(), self._token.encode()):
            raise ProtocolError(403, "a page of another site cannot upload; if this is not one, load it again")
        if request.method == "POST":
            return await self._take_form(request, segments, directory)
        if request.method == "PROPFIND":
            return await in_thread(self._properties, request, segments)
        return await self._put(request, segments, directory or request.method == "MKCOL")

    def _properties(self, request: Request, segments: tuple[bytes, ...]) -> Response:
        """Answer PROPFIND (RFC 4918, 9.1) for a file, or a folder and its files: rclone sends it before it copies."""
        if not self._site.options.listing:
            raise ProtocolError(404, "not found")
        found = self._site.open(segments)
        path = request.headers.get("x-forwarded-prefix", "") + request.target.partition("?")[0]
        path = urllib.parse.quote(path.encode("latin-1"), safe="/%")
        is_dir, facts = found.fd < 0, found.facts
        found.close()
        if is_dir:
            path = path.removesuffix("/") + "/"
        rows = [(path, ListingEntry(b"", is_dir, 0 if is_dir else facts.st_size, facts.st_mtime_ns))]
        if is_dir and request.headers.get("depth") != "0":
            try:
                entries = list(self._site.entries(found.place))
            except OSError as error:
                raise file_error(error) from None
            rows += [(path + entry_link(entry), entry) for entry in entries if not entry.error]
        xml = "".join(itertools.starmap(_property_row, rows))
        xml = f'<?xml version="1.0" encoding="utf-8"?>\n<D:multistatus xmlns:D="DAV:">{xml}</D:multistatus>\n'
        return Response(207, [("Content-Type", "application/xml; charset=utf-8"), NOSNIFF], BytesBody(xml.encode()))

    async def _take_form(self, request: Request, segments: tuple[bytes, ...], directory: bool) -> Response:
        """Store the files of a form and make the folders that it names. After a failure, go on with the next part."""
        folder, form = self._open_folder(segments), FormReader(request)
        stored: list[str] = []
        failed: list[ProtocolError] = []
        while (part := await form.next_part()) is not None:
            name = _form_name(part.get("filename", ""))
            try:
                if name:
                    await self._store(self._new_place(folder, name), form.read, Headers(), 0)
                    stored.append(show_name(name))
                elif part.get("name") == "folder" and (name := await form.value()):
                    await in_thread(os.mkdir, self._new_place(folder, name))
                    stored.append(show_name(name))
            except ProtocolError as error:
                if error.close:
                    raise
                failed.append(_part_failure(name, error))
        if failed or not stored:
            raise _form_failure(failed, stored)
        location = "./" if directory else redirect_below(request.target.partition("?")[0])
        return text_response(303, "".join(f"{name}\n" for name in stored), [("Location", location)])

    async def _put(self, request: Request, segments: tuple[bytes, ...], directory: bool) -> Response:
        """Answer PUT and MKCOL."""
        headers = request.headers
        if "content-range" in headers:
            raise ProtocolError(400, "a part of a file cannot be uploaded: Content-Range (RFC 9110, 14.5)")
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise ProtocolError(415, "files are stored as they come, so they cannot have a Content-Encoding")
        if not segments:
            raise self._folder_error(request, "this is a folder")
        place = self._new_place(self._open_folder(segments[:-1]), segments[-1])
        if directory:
            return await self._put_folder(request, place)
        facts = await self._store(place, request.body.read, headers, request.body.known_length or 0)
        fields = [("ETag", entity_tag(facts)), NOSNIFF]
        if _mtime(headers) is not None:
            fields.append(("X-OC-Mtime", "accepted"))
        return Response(204 if "if-match" in headers else 201, fields)  # only If-Match replaces a file

    def _open_folder(self, segments: tuple[bytes, ...]) -> bytes:
        """Return a folder's path in the file system. ProtocolError 409 if it is not there, 403 behind a link."""
        found = None
        with contextlib.suppress(ProtocolError):
            found = self._site.open(segments)
            found.close()
        if not found or not stat.S_ISDIR(found.facts.st_mode):
            raise ProtocolError(409, "there is no such folder")
        if not self._site.options.follow_symlinks and found.place != self._site._inside + (b"/".join(segments) or b"."):
            raise ProtocolError(403, "files are not uploaded through a symbolic link without --follow-symlinks")
        return found.place

    def _new_place(self, folder: bytes, name: bytes) -> bytes:
        """Return the path of a new file. ProtocolError 400 for an invalid name, 403 for one that is not served."""
        if not 0 < len(name) < 256 or name in (b".", b"..") or _CONTROLS.search(name_text(name)):
            raise ProtocolError(400, "a name has 1 to 255 bytes, and no control characters")
        if is_refused((name,), self._site.options.hidden) or self._site._is_secret(name):
            raise ProtocolError(403, "a file of this name is not served here")
        return os.path.join(folder, name)

    def _file_to_replace(self, place: bytes, headers: Headers) -> os.stat_result | None:
        """Return the file to replace, or None for a new one. ProtocolError 403, 409 or 412 (RFC 9110, 13.2)."""
        try:
            facts = os.lstat(place)
        except FileNotFoundError:
            if "if-match" in headers:
                raise ProtocolError(412, "there is no such file") from None
            return None
        if stat.S_ISDIR(facts.st_mode):
            raise ProtocolError(409, "a folder has this name")
        if not stat.S_ISREG(facts.st_mode) or self._site._is_private(place, facts, place):
            raise ProtocolError(403, "the file of this name cannot be replaced")
        tag = entity_tag(facts)
        known = tag_matches(headers.get("if-match", ""), tag, weak=False)
        if not known or tag_matches(headers.get("if-none-match", ""), tag, weak=True):
            hint = "a file of this name exists: to replace it, send If-Match with its ETag"
            raise ProtocolError(412, hint, headers=[("ETag", tag)])
        if not os.access(place, os.W_OK):
            raise ProtocolError(403, "the file of this name cannot be replaced")
        return facts

    def _check_size(self, size: int) -> None:
        if self._limit and size > self._limit:
            raise ProtocolError(413, f"a file may have {format_size(self._limit)} at most")

    async def _put_folder(self, request: Request, place: bytes) -> Response:
        """Make a folder, which may be there already, but not for MKCOL."""
        if await request.body.read():
            raise ProtocolError(415, "a folder has no content")
        try:
            await in_thread(os.mkdir, place)
        except ProtocolError as error:
            if error.status != 412 or "if-none-match" in request.headers:
                raise
            if os.path.islink(place) or not os.path.isdir(place):
                raise self._folder_error(request, "a file has this name") from None
            if request.method == "MKCOL":
                raise self._folder_error(request, "the folder is there already") from None
            return Response(204, [NOSNIFF])
        return Response(201, [NOSNIFF])

    @staticmethod
    def _folder_error(request: Request, reason: str) -> ProtocolError:
        """Return the error for a folder whose name is taken: 409, but 405 for MKCOL (RFC 4918, 9.3.1)."""
        if request.method == "MKCOL":
            return ProtocolError(405, reason, headers=[_ALLOW_BUT_MKCOL])
        return ProtocolError(409, reason)

    async def _store(
        self, place: bytes, read: Callable[[], Awaitable[bytes]], headers: Headers, length: int
    ) -> os.stat_result:
        """Store what `read` returns until b"", `length` bytes (0: unknown). Return the status of the file."""
        check = functools.partial(self._file_to_replace, place, headers)
        await in_thread(check)
        self._check_size(length)
        partial = PartialFile(place)
        try:
            await in_thread(partial.open, length)
            await self._receive(partial, read)
            return await in_thread(partial.finish, _mtime(headers), check)
        except BaseException:  # also a cancellation
            await asyncio.shield(asyncio.to_thread(partial.discard))
            raise

    async def _receive(self, partial: PartialFile, read: Callable[[], Awaitable[bytes]]) -> None:
        """Write the bytes that `read` returns, in pieces of about WRITE_SIZE."""
        size, waiting = 0, bytearray()
        while data := await read():
            size += len(data)
            self._check_size(size)
            waiting += data
            if len(waiting) >= WRITE_SIZE:
                await in_thread(partial.write, waiting)
                waiting = bytearray()
        await in_thread(partial.write, waiting)


def _property_row(path: str, entry: ListingEntry) -> str:
    """Make the XML element for one path."""
    kind = "<D:collection/>" if entry.is_dir else ""
    return (
        f"<D:response><D:href>{escape(path)}</D:href><D:propstat><D:prop><D:resourcetype>{kind}</D:resourcetype>"
        f"<D:getcontentlength>{entry.size}</D:getcontentlength>"
        f"<D:getlastmodified>{format_date(clamped_seconds(entry.mtime))}</D:getlastmodified></D:prop>"
        "<D:status>HTTP/1.1 200 OK</D:status></D:propstat></D:response>\n"
    )


def _part_failure(name: bytes, error: ProtocolError) -> ProtocolError:
    """Return the error for one part of a form: it has no preconditions, so 412 would say nothing to its sender."""
    status, reason = (409, "the name is taken") if error.status == 412 else (error.status, error.reason)
    return ProtocolError(status, f"{show_name(name)} ({reason})")


def _form_failure(failed: list[ProtocolError], stored: list[str]) -> ProtocolError:
    """Return the error for a form of which some files, or all, were not stored."""
    lists = {"not stored": [error.reason for error in failed[:100]], "stored": stored[:100]}
    reason = "; ".join(f"{what}: {', '.join(names)}" for what, names in lists.items() if names)
    return ProtocolError(failed[0].status if failed else 400, reason or "no file was chosen")


def _form_name(text: str) -> bytes:
    """Decode a file's name in a form: browsers escape a quote and line ends, curl only a quote."""
    for code, character in (('\\"', '"'), ("%22", '"'), ("%0D", "\r"), ("%0A", "\n")):
        text = text.replace(code, character)
    return text.encode("latin-1")


def _mtime(headers: Headers) -> int | None:
    """Return the file's POSIX time in seconds from X-OC-Mtime, which rclone and Nextcloud's clients send, or None."""
    text = headers.get("x-oc-mtime", "")
    return int(text.partition(".")[0]) if re.fullmatch(r"[0-9]{1,11}(?:\.[0-9]*)?", text) else None


def begin_uploads(site: Site, command: str) -> None:
    """Remove the incomplete files of earlier uploads, and warn the operator if there is no password."""
    if not site.uploads:
        return
    removal = threading.Thread(target=remove_partial_files, args=(site._root,), daemon=True)
    removal.start()
    removal.join(1)  # seconds; in a large tree it continues in the background
    if not site.options.auth:
        who = "uploads are on and there is no password, so everybody who reaches this server can add files to"
        log_line(f"ptth {command}: {who} {os.fsdecode(os.path.realpath(site._root))}")


_CORS = (
    ("Access-Control-Allow-Origin", "*"),
    ("Access-Control-Expose-Headers", "Accept-Ranges, Content-Length, Content-Range, ETag, Last-Modified"),
)


def with_site_options(handler: Handler, options: SiteOptions, realm: str, *, app: bool = False) -> Handler:
    """Wrap a handler: check the password, add the operator's fields, and allow scripts of other origins (CORS).

    An `app` does not get the password. It answers OPTIONS itself, except preflight requests.
    """
    if options.auth:
        handler = with_password(handler, options.auth, realm, pass_on=not app)
    added = [*options.headers, *(_CORS if options.cors else ())]
    if not added:
        return handler
    replaced = {name.lower() for name, _ in added} - {"vary"}  # several Vary fields are valid
    allow = ", ".join((*METHODS, "POST", "PUT", "PATCH", "DELETE") if app else METHODS)
    preflight: Fields = [
        ("Allow", allow), NOSNIFF, *added, ("Access-Control-Allow-Methods", allow.replace(", OPTIONS", "")),
        ("Access-Control-Allow-Headers", "*, Authorization"),
    ]  # fmt: skip

    async def handle(request: Request) -> Response:
        is_preflight = not app or "access-control-request-method" in request.headers
        if options.cors and request.method == "OPTIONS" and is_preflight:  # browsers send no password with it
            return Response(204, list(preflight))
        response = await call_handler(handler, request)
        return replace(response, headers=[pair for pair in response.headers if pair[0].lower() not in replaced] + added)

    return handle


def with_password(handler: Handler, password: str, realm: str, *, pass_on: bool) -> Handler:
    """Wrap a handler: require "USER:PASSWORD" by Basic (RFC 7617). The handler gets it only if `pass_on` is true."""
    secret = password.encode("utf-8", "surrogateescape")
    challenge = ("WWW-Authenticate", f'Basic realm="{realm}", charset="UTF-8"')

    async def handle(request: Request) -> Response:
        if not is_same_secret(basic_credentials(request.headers.get("authorization", "")), secret):
            raise ProtocolError(401, "password required", headers=[challenge])
        if not pass_on:
            pairs = [pair for pair in request.headers.pairs if pair[0].lower() != "authorization"]
            request = replace(request, headers=Headers(pairs))
        return await handler(request)

    return handle


def basic_credentials(value: str) -> bytes:
    """Return "USER:PASSWORD" of an Authorization field's value (RFC 7617, 2), or b"" when there is none."""
    scheme, _, coded = value.partition(" ")
    try:
        return base64.b64decode(coded.strip(" "), validate=True) if scheme.lower() == "basic" else b""
    except ValueError:
        return b""


def site_handler(site: Site) -> Handler:
    """Make the handler of `ptth file-server`: the site at the root of the URLs."""

    async def handle(request: Request) -> Response:
        if request.target == "*":
            return Response(204, [_ALLOW, NOSNIFF])
        return await site.respond(request, *parse_path(request.target.partition("?")[0]))

    return with_site_options(handle, site.options, "files")


def server_handler(site: Site, name: str) -> Handler:
    """Make the handler of `ptth server`: a small page at /, the site below /files/, as JSON below /api/v1/dir/."""

    async def handle(request: Request) -> Response:
        path = request.target.partition("?")[0]
        segments, directory = ((), True) if path == "*" else parse_path(path)
        if request.method not in ("GET", "HEAD"):
            if site.uploads and request.method in UPLOAD_METHODS and segments[:1] != (b"files",):
                raise ProtocolError(405, "files are uploaded below files/", headers=[_ALLOW])
            return await site.respond(request, segments[1:], directory)
        if not segments:
            content = f'<h1>{escape(name)}</h1>\n<p><a href="./files/">Files</a></p>'
            return html_response(200, page(name, f"<main>\n{content}\n</main>"))
        if segments[0] == b"files":
            return await site.respond(request, segments[1:], directory)
        if segments[:3] == (b"api", b"v1", b"dir"):
            return await site.respond(request, segments[3:], directory, as_json=True)
        raise ProtocolError(404, "not found; the files are below files/")

    return with_site_options(handle, site.options, name)


# -- 11. Tunnel messages --
# The format of requests and responses inside P3 and P5: application/http (RFC 9112, 10.2). Pure.

REQUESTS_TYPE = "application/http; msgtype=request"
RESPONSE_TYPE = "application/http; msgtype=response"
# The optional features of this program, named in P1 and in P3. body: requests may have bodies; upgrade: WebSockets;
# parts: a response may come in parts, each in a P5 of its own; listen: a batch with Prefer: wait is a P1, too.
FEATURES = ("PTTH-Features", "body, upgrade, parts, listen")
# In the fetch of a request's body, and in the response: a body without a length is in chunks inside the response. Some
# proxies, such as Caddy 2.6, give a regular end to a response that broke off.
FRAMING = ("PTTH-Framing", "chunked")


def _proxy_fields(request: Request, host: str, trusted: bool) -> Fields:
    """Return the fields that a proxy adds: the client's address, scheme and host, and Via."""
    headers = request.headers
    forwarded = headers.get("x-forwarded-for", "") if trusted else ""
    proto = headers.get("x-forwarded-proto", "") if trusted else ""
    fields = [
        ("X-Forwarded-For", f"{forwarded}, {request.peer}" if forwarded else request.peer),
        ("X-Forwarded-Proto", proto or ("https" if request.secure else "http")),
        ("X-Forwarded-Host", host),
        _via(headers, request.minor),
    ]
    if trusted:
        fields += [pair for pair in headers.pairs if pair[0].lower() in _TOLD_BY_PROXY]
    return fields


def pack_request(
    request_id: str, request: Request, target: str, framing: Fields, *, prefix: str = "", trusted: bool = False
) -> bytes:
    """Format the head of a client's request for the server: P3.

    `framing`: the fields that describe the body. `prefix`: the path before `target` at the relay, or "" on a host of
    the server's own, where cookies are forwarded. `trusted`: X-Forwarded-* come from a trusted proxy and are kept.
    """
    headers = request.headers
    left = max_forwards(request)
    host = headers.get("host") or "localhost"  # HTTP/1.0 needs no Host
    fields = [
        ("PTTH-Request-Id", request_id),
        *framing,
        *forwardable(headers, _NOT_TO_SERVER if prefix else _NOT_TO_HOST),
    ]
    if "host" not in headers:
        fields.append(("Host", host))
    if left is not None:
        fields.append(("Max-Forwards", str(left - 1)))
    elif "max-forwards" in headers:  # of a method that does not use it
        fields.append(("Max-Forwards", headers["max-forwards"]))
    fields += _proxy_fields(request, host, trusted)
    if prefix:
        fields.append(("X-Forwarded-Prefix", prefix))
    if request.upgrade:
        fields += [("Connection", "Upgrade"), ("Upgrade", request.upgrade)]
    return format_head(f"{request.method} {target} HTTP/1.1", fields, parsed=True)


def without_upgrade(head: bytes) -> bytes:
    """Return a head that `pack_request` has made, without its fields for an upgrade."""
    return head.replace(b"\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n", b"\r\n")


_ID = re.compile(r"[0-9A-Za-z]{8,64}")
_REQUEST_ID = re.compile(rb"\r\nPTTH-Request-Id: ([0-9A-Za-z]{8,64})\r\n", re.IGNORECASE)
_INNER_LENGTH = re.compile(rb"\r\n(Content-Length|PTTH-Body-Length|Transfer-Encoding):[ \t]*([^\r\n]*)", re.IGNORECASE)
# Makes the body of a request from its id and framing: a number of bytes, CHUNKED, or None for a stream after a 101.
Fetch = Callable[[str, "int | None"], Body]


def no_fetch(request_id: str, framing: int | None) -> Body:
    """Raise ProtocolError 400: the default, for callers that cannot fetch a body."""
    raise ProtocolError(400, "a body that cannot be fetched")


def unpack_requests(data: bytes, fetch: Fetch = no_fetch) -> Iterator[tuple[str, Request | ProtocolError]]:
    """Yield the (id, request) of each request in a P3's body.

    For an invalid request yields (id, ProtocolError), so that it gets a response. Raises ProtocolError 502 when an id
    or a length cannot be read: the rest of the P3 cannot be used then.
    """
    position = 0
    while position < len(data):
        end = data.find(b"\r\n\r\n", position) + 4
        if end < 4:
            raise ProtocolError(502, "the relay's requests end inside a head", close=True)
        head = data[position:end]
        position = end
        found = _REQUEST_ID.search(head)
        if not found:
            raise ProtocolError(502, "the relay sent a request without an id", close=True)
        request_id = found[1].decode("ascii")
        head = head[: found.start()] + head[found.end() - 2 :]  # the handler does not get the id
        (name, length), *others = _INNER_LENGTH.findall(head) or [(b"Content-Length", b"0")]
        is_inline = name.lower() == b"content-length"
        if others or not re.fullmatch(rb"[0-9]{1,18}" if is_inline else rb"[0-9]{1,18}|chunked", length):
            raise ProtocolError(502, "the relay sent a request with two lengths, or an invalid one", close=True)
        position += int(length) if is_inline else 0
        if position > len(data):
            raise ProtocolError(502, "the relay's requests end inside a body", close=True)
        try:
            yield request_id, _unpack_request(request_id, head, data[end:position], b"" if is_inline else length, fetch)
        except ProtocolError as error:
            yield request_id, error


def _unpack_request(request_id: str, head: bytes, content: bytes, to_fetch: bytes, fetch: Fetch) -> Request:
    """Return the request with its body: `content`, or one with the length `to_fetch`, which `fetch` makes."""
    if len(head) > MAX_INNER_HEAD:
        raise ProtocolError(431, "the head is too large")
    request = parse_request_head(head, MAX_INNER_FIELDS)
    if content:
        request.body = BytesBody(content)
    elif to_fetch:
        request.body = fetch(request_id, CHUNKED if to_fetch == b"chunked" else int(to_fetch))
        request.body.expects = "expect" in request.headers
    elif "websocket" in request.headers.tokens("upgrade"):
        request.upgrade = "websocket"
        request.body = fetch(request_id, None)
    return request


def pack_response_head(response: Response, batched: Iterable[tuple[str, str]] = ()) -> bytes:
    """Format the inner head of P5, which the body follows.

    In a batch, `batched` has the request's id and the body's length, and comes first.
    """
    fields = [*batched, *response.headers]
    if response.body.length is not None and response.status not in (204, 304):
        fields.append(("Content-Length", str(response.body.length)))
    return format_response_head(response.status, fields)


def pack_batched(request_id: str, response: Response, body: bytes) -> bytes:
    """Format a complete response for a batch; `body` is b"" if it has none."""
    batched = [("PTTH-Request-Id", request_id), ("PTTH-Body-Length", str(len(body)))]
    return pack_response_head(response, batched) + body


# This program puts both fields first; other servers may put them anywhere.
_BATCHED_FIRST = re.compile(
    rb"([^\r\n]*\r\n)PTTH-Request-Id: ([0-9A-Za-z]{8,64})\r\nPTTH-Body-Length: ([0-9]{1,9})\r\n"
)
_BODY_LENGTH = re.compile(rb"\r\nPTTH-Body-Length: ([0-9]{1,9})\r\n", re.IGNORECASE)


def unpack_responses(data: bytes) -> Iterator[tuple[str, bytes, bytes]]:
    """Yield the (id, head, body) of each response of a batch; the head is for `parse_inner_response`.

    ProtocolError 400 when the start of the next one is unknown.
    """
    position = 0
    while position < len(data):
        end = data.find(b"\r\n\r\n", position) + 4
        if first := _BATCHED_FIRST.match(data, position, max(end, 0)):
            request_id, length = first[2], first[3]
            head = first[1] + data[first.end() : end]
        else:
            head = data[position:end]
            id_field, length_field = _REQUEST_ID.search(head), _BODY_LENGTH.search(head)
            request_id, length = (id_field[1], length_field[1]) if id_field and length_field else (b"", b"0")
        position = end + int(length)
        if end < 4 or not request_id or position > len(data):
            raise ProtocolError(400, "a batch with a response that has no id, no length or no end", close=True)
        yield request_id.decode("ascii"), head, data[end:position]


def parse_inner_response(head: bytes, upgrade: str = "") -> tuple[int, Headers]:
    """Parse a response's head from the tunnel. ProtocolError 502 if a client must not get it.

    101 is accepted only for the `upgrade` that the client asked for.
    """
    if len(head) > MAX_INNER_HEAD:
        raise ProtocolError(502, "its head is too large")
    status, headers = parse_response_head(head, MAX_INNER_FIELDS)
    if status == 101 and upgrade and upgrade in headers.tokens("upgrade"):
        return status, Headers([(name, value) for name, value in headers.pairs if name.lower() != "content-length"])
    if status < 200 or "transfer-encoding" in headers:
        raise ProtocolError(502, "an interim response, or one with a transfer coding of its own")
    return status, headers


def content_kind(headers: Headers) -> str:
    """Return the media type in Content-Type, in lower case and without its parameters; "" if there is none."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def is_endless(response: Response) -> bool:
    """Return whether a response is a WebSocket or an event stream, which may stay open for ever."""
    return response.status == 101 or content_kind(Headers(response.headers)) == "text/event-stream"


def is_stream(response: Response) -> bool:
    """Return whether each piece of a response should be forwarded at once."""
    headers = Headers(response.headers)
    unbuffered = headers.get("x-accel-buffering", "").strip().lower() == "no"
    return is_endless(response) or content_kind(headers) == "application/x-ndjson" or unbuffered


def parse_offset(headers: Headers) -> int:
    """Return the number in PTTH-Offset, 0 without one; ProtocolError 400."""
    offset = headers.get("ptth-offset", "0")
    if not re.fullmatch("[0-9]{1,18}", offset):
        raise ProtocolError(400, "PTTH-Offset is not one number", close=True)
    return int(offset)


def parse_wait(prefer: str) -> float:
    """Return the seconds of `Prefer: wait=N` (RFC 7240, 4.3), at most POLL_WAIT, which is also the default."""
    match = re.search(r"(?:\A|[,;\s])wait\s*=\s*\"?([0-9]{1,9})(?![0-9])", prefer, re.IGNORECASE)
    return min(float(match[1]), POLL_WAIT) if match else POLL_WAIT


# -- 12. Rust form --
# The same messages in MessagePack, for ptth_relay and ptth_server in Rust. Pure.

# P3 is an array of [id, [{method: nil}, uri, {name: [byte, ...]}]], the field of P5 is [{status: nil}, {name: [byte,
# ...]}]. Only the types that these need are supported.

Value: TypeAlias = "int | str | list[Value] | dict[int | str, Value] | None"
_WIDE = {  # first byte: kind of the value, and width in bytes of its number or count, which follows
    0xCC: ("number", 1), 0xCD: ("number", 2), 0xCE: ("number", 4), 0xCF: ("number", 8),
    0xD9: ("text", 1), 0xDA: ("text", 2), 0xDB: ("text", 4), 0xDC: ("array", 2), 0xDD: ("array", 4),
    0xDE: ("map", 2), 0xDF: ("map", 4),
}  # fmt: skip
# kind: the first byte for the number or count 0, and how many from 0 on have a byte of their own, in this order
_NARROW = {"number": (0, 128), "map": (0x80, 16), "array": (0x90, 16), "text": (0xA0, 32), "nil": (0xC0, 1)}
_MEMBERS = {"array": 1, "map": 2}  # values of each member
MAX_DEPTH = 6  # levels of nested arrays and maps; the messages have five
MAX_UNPACKED = 100_000  # members of all arrays and maps in a message, except ASCII bytes: at most 0.1 s of work
RUST_FIELD = "X-PTTH-2LJYXWC4"
_NOT_FROM_RUST = _HOP_BY_HOP | {"x-apikey"}  # such a relay may pass on a scraper's key
RUST_METHODS = ("GET", "HEAD")  # the index is the number in the message; there are no others
RUST_STATUSES = (200, 204, 206, 304, 307, 400, 403, 404, 405, 416, 500)  # the same for statuses


def pack_value(value: Value) -> bytes:
    """Encode a value. ProtocolError 502 for a number, or a count of bytes or members, above 65,535."""
    if value is None:
        return _pack_head("nil", 0)
    if isinstance(value, int):
        return _pack_head("number", value)
    if isinstance(value, str):
        data = value.encode()
        return _pack_head("text", len(data)) + data
    if isinstance(value, list):
        return _pack_head("array", len(value)) + b"".join(map(pack_value, value))
    pairs = [pack_value(key) + pack_value(member) for key, member in value.items()]
    return _pack_head("map", len(pairs)) + b"".join(pairs)


def _pack_head(kind: str, count: int) -> bytes:
    """Encode a number, or the kind of a value with its count, in as few bytes as possible. ProtocolError 502."""
    least, size = _NARROW[kind]
    if count < size:
        return bytes([least + count])
    for first, (wide, width) in _WIDE.items():
        if wide == kind and count < min(1 << 8 * width, 1 << 16):
            return bytes([first]) + count.to_bytes(width, "big")
    raise ProtocolError(502, "too large for the Rust form")


def unpack_value(data: bytes) -> Value:
    """Decode the one value in `data`. ProtocolError 502 if it is invalid, or not the only one."""
    value, end = _unpack(data, 0, MAX_DEPTH, [MAX_UNPACKED])
    if end != len(data):
        raise ProtocolError(502, "bytes after the message", close=True)
    return value


def _unpack_head(data: bytes, at: int) -> tuple[str, int, int]:
    """Return the kind of the value at `at`, its number or count of members, and the position after that."""
    first = data[at] if at < len(data) else 0xC1  # MessagePack never uses this byte
    at += 1
    if first in _WIDE:
        kind, width = _WIDE[first]
        count, at = int.from_bytes(data[at : at + width], "big"), at + width
    else:
        found = ((kind, first - least) for kind, (least, size) in _NARROW.items() if least <= first < least + size)
        kind, count = next(found, ("", 0))
    if not kind or at > len(data) or kind != "number" and count > len(data) - at:  # so a large count costs nothing
        raise ProtocolError(502, "not a message in Rust form", close=True)
    return kind, count, at


def _unpack(data: bytes, at: int, depth: int, budget: list[int]) -> tuple[Value, int]:
    """Return the value at `at` and the position after it. `budget` holds how many more members are allowed."""
    kind, count, at = _unpack_head(data, at if depth else len(data))  # too deep is an error, as missing data is
    if kind in ("number", "nil"):
        return count if kind == "number" else None, at
    if kind == "text":
        try:
            return data[at : at + count].decode(), at + count
        except UnicodeDecodeError:
            raise ProtocolError(502, "a text that is not UTF-8", close=True) from None
    if kind == "array" and depth > 1 and data[at : at + count].isascii():
        return list(data[at : at + count]), at + count  # bytes below 128 are numbers: fast, for most fields
    members: list[Value] = []
    for _ in range(count * _MEMBERS[kind]):
        budget[0] -= 1
        if budget[0] < 0:
            raise ProtocolError(502, f"more than {MAX_UNPACKED} values in a message", close=True)
        member, at = _unpack(data, at, depth - 1, budget)
        members.append(member)
    return members if kind == "array" else _make_map(members), at


def _make_map(members: list[Value]) -> dict[int | str, Value]:
    """Return the map of these members: key, value, key, value, and so on. ProtocolError 502."""
    keys = [key for key in members[::2] if isinstance(key, int | str)]
    if len(set(keys)) < len(members) // 2:
        raise ProtocolError(502, "a map with the same key twice, or an invalid one", close=True)
    return dict(zip(keys, members[1::2], strict=True))


def _pack_fields(fields: Fields) -> dict[int | str, Value]:
    """Return the map of fields. It has one value for each name: several are joined, of Set-Cookie the first is used."""
    joined = Headers(fields)
    if "set-cookie" in joined:
        joined["set-cookie"] = joined.all("set-cookie")[0]
    return {name: list(value.encode("latin-1")) for name, value in joined.items()}


def _unpack_fields(value: Value) -> Fields:
    """Return the fields in the map. The caller formats them, which checks them. ProtocolError 502."""
    fields = []
    for name, data in value.items() if isinstance(value, dict) else [("", None)]:
        if not isinstance(name, str) or not isinstance(data, list):
            raise ProtocolError(502, "not header fields in Rust form")
        try:
            fields.append((name, bytes(data).decode("latin-1")))  # type: ignore[arg-type]  # this is the check
        except (TypeError, ValueError):
            raise ProtocolError(502, "a header field with a value that is not a byte") from None
    return fields


def _unpack_choice(value: Value, choices: tuple[T, ...]) -> T:
    """Return the one of `choices` that {number: nil} means. ProtocolError 502."""
    for number, choice in enumerate(choices):
        if value == {number: None}:
            return choice
    raise ProtocolError(502, "a method or status that the Rust form does not have")


def pack_rust_request(head: bytes) -> Value:
    """Return the Rust form of a request that `pack_request` made. ProtocolError 405 unless GET or HEAD."""
    ((request_id, request),) = unpack_requests(head)
    if isinstance(request, ProtocolError):
        raise request
    if request.method not in RUST_METHODS:
        raise ProtocolError(405, "this server takes GET and HEAD only", headers=[("Allow", "GET, HEAD")])
    method: dict[int | str, Value] = {RUST_METHODS.index(request.method): None}
    return [request_id, [method, request.target, _pack_fields(request.headers.pairs)]]


def unpack_rust_requests(data: bytes) -> Iterator[tuple[str, Request | ProtocolError]]:
    """Yield the (id, request) of each request in a P3 of the Rust form, as `unpack_requests` does."""
    value = unpack_value(data)
    for item in value if isinstance(value, list) else [None]:
        if not isinstance(item, list) or len(item) != 2 or not isinstance(item[0], str) or not _ID.fullmatch(item[0]):
            raise ProtocolError(502, "the relay sent a request without an id", close=True)
        request_id, parts = item[0], item[1]
        try:
            if not isinstance(parts, list) or len(parts) != 3 or not isinstance(parts[1], str):
                raise ProtocolError(400, "not a request in Rust form")
            fields = forwardable(Headers(_unpack_fields(parts[2])), _NOT_FROM_RUST)
            # Formatted and parsed again, so that it is checked like every other head.
            head = format_request_head(_unpack_choice(parts[0], RUST_METHODS), parts[1], fields)
            yield request_id, parse_request_head(head, MAX_INNER_FIELDS)
        except (ProtocolError, UnicodeEncodeError) as error:
            yield request_id, error if isinstance(error, ProtocolError) else ProtocolError(400, "an invalid character")


def pack_rust_response(response: Response) -> str:
    """Return the value of RUST_FIELD in P5: status and fields.

    The Rust form has eleven statuses. Redirects become 307, and 401 becomes 403: `auth` does not work through a relay
    in Rust. Other statuses become the 200, 400 or 500 of their class.
    """
    status = response.status
    if status not in RUST_STATUSES:
        nearest = {301: 307, 302: 307, 303: 307, 308: 307, 401: 403}
        status = nearest.get(status, 200 if status < 300 else 400 if status < 500 else 500)
    fields = _pack_fields(response.headers)
    if response.body.length is not None and status not in (204, 304):
        fields["content-length"] = list(str(response.body.length).encode())
    format_response_head(status, response.headers)  # raises for invalid fields
    return base64.b64encode(pack_value([{RUST_STATUSES.index(status): None}, fields])).decode("ascii")


def unpack_rust_response(text: str) -> tuple[int, Headers]:
    """Parse the value of RUST_FIELD in P5. ProtocolError 502."""
    if len(text) > MAX_RUST_FIELD:
        raise ProtocolError(502, f"the head in Rust form is larger than {MAX_RUST_FIELD} bytes")
    try:
        value = unpack_value(base64.b64decode(text, validate=True))
        if not isinstance(value, list) or len(value) != 2:
            raise ProtocolError(502, "not a response in Rust form")
        head = format_response_head(_unpack_choice(value[0], RUST_STATUSES), _unpack_fields(value[1]))
    except ValueError:
        raise ProtocolError(502, "not a response in Rust form") from None
    return parse_inner_response(head)


# -- 13. Relay state --
# A relay's configuration, its servers, and the requests in flight. Sends no responses.

_NAME = re.compile(r"(?!\.\.?\Z)[A-Za-z0-9._-]{1,64}")
NAME_RULE = "is not valid: 1 to 64 characters of A-Z a-z 0-9 . _ -, but not . or .."


class ServerEntry(NamedTuple):
    """One [[servers]] block of ptth_relay.toml."""

    name: str
    tripcode: str
    display_name: str = ""
    sandbox: bool = True
    host: str = ""  # a host of its own, in lower case


class ScraperKey(NamedTuple):
    """One [[scraper_keys]] block: a key of the scraper API, and when it is valid (POSIX times)."""

    name: str
    hash: str
    not_before: float
    not_after: float


@dataclass
class RelayConfig:
    """The content of ptth_relay.toml."""

    port: int = 4000
    bind: str = "127.0.0.1"
    servers: list[ServerEntry] = field(default_factory=list)
    domain: str = ""  # each server has the host NAME.domain
    trusted_proxies: list[str] = field(default_factory=list)  # networks, besides this machine
    response_timeout: float = RESPONSE_TIMEOUT
    news_url: str = ""
    enable_scraper_api: bool = False
    scraper_keys: list[ScraperKey] = field(default_factory=list)
    dev_mode: bool = False
    audit_log_public: bool = False

    def hosts_of(self, entry: ServerEntry) -> list[str]:
        """Return the hosts of a server: its `host`, then NAME.domain if the name is a valid DNS label."""
        is_label = re.fullmatch(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)", entry.name)
        below = f"{entry.name.lower()}.{self.domain}" if self.domain and is_label else ""
        return list(filter(None, (entry.host, below)))


class AuditEvent(NamedTuple):
    """One line of the audit log."""

    time: float  # POSIX
    event: str
    server: str
    client: str = ""
    method: str = ""
    path: str = ""
    status: int = 0
    bytes: int = 0  # of the body


NO_BODIES = "this server is too old to take request bodies"


class Exchange:
    """One client's request in flight: it waits, is offered in a P3, and is claimed by the P5 with its response.

    Until then it is in `waiting` or `offered` of its server: see `forget`. Until its client has the response, it is in
    `exchanges` of the relay's state: see `set_delivered`.
    """

    def __init__(self, state: RelayState, route: Route, request: Request, inline: bytes | None, address: str) -> None:
        self._state = state
        self.request_id = os.urandom(16).hex()
        self.server = route.server
        self.own_host = not route.prefix
        self.request = request
        self.method = request.method
        self.address = address  # of the client, for the limit of requests from one address
        self.client_stream = ClientStream(request.body) if request.upgrade else None
        self.inline_size = len(inline or b"")
        self.body = request.body if inline is None else None  # the body that the server fetches
        self.has_upload = bool(self.client_stream or self.body)
        framing: Fields = [("Content-Length", str(len(inline)))] if inline else []
        if self.body:
            framing = [("PTTH-Body-Length", "chunked" if self.body.length is None else str(self.body.length))]
            framing += [("Expect", "100-continue")] if self.body.expects else []
        trusted = state.trusts(request.peer)
        head = pack_request(self.request_id, request, route.target, framing, prefix=route.prefix, trusted=trusted)
        self.head = head + (inline or b"")  # with the body, if that is sent in P3
        self.waits_since = state.loop.time()  # when the request arrived, or the fetch of its body ended
        self.offers = 0  # how many times it was sent in a P3
        self.instance = ""  # PTTH-Instance of the server that it was offered to
        self.was_fetched = False  # a fetch of its body has begun
        self.fetching: asyncio.Task[object] | None = None
        self.fetch_connection: Peer | None = None  # of the server, for the fetch
        self.broke_at: float | None = None  # when the fetch, or a P5 before the end of its head, broke off
        self.has_p5 = False  # a P5 for it has begun, and perhaps broken off
        self.tunnel_body: TunnelBody | None = None  # of a response that has begun
        self.is_stream = False  # it has no end: see `add_stream`
        self.response: asyncio.Future[Response] = state.loop.create_future()
        self.delivered: asyncio.Future[bool] = state.loop.create_future()  # whether its client has the whole response

    def set_delivered(self, complete: bool, size: int = 0) -> None:
        """Resolve `delivered`, and free this request's place at the relay and at its server. Later calls do nothing.

        `size` is there for the signature of `on_sent`.
        """
        if self._state.exchanges.pop(self.request_id, None):
            self.delivered.set_result(complete)
            self.tunnel_body = None  # the connection of its P5 goes on with other responses
            self.server.release(self)

    def takes_p5(self) -> bool:
        """Return whether a P5 may follow: no response has begun, or it may go on in parts."""
        return not self.response.done() or self.tunnel_body is not None

    def is_late(self, now: float, response_timeout: float) -> bool:
        """Return whether the response's head is overdue. It is not during a fetch: one that stalls ends by itself."""
        return not self.response.done() and self.fetching is None and now - self.waits_since >= response_timeout

    def check_fetch(self) -> None:
        """End the fetch if its connection is at eof: a server does not half-close it, so it is gone.

        As long as the client sends nothing, nothing else shows that.
        """
        if self.fetching and self.fetch_connection and self.fetch_connection.at_eof():
            self.fetching.cancel()

    async def end_fetch(self) -> None:
        """End the fetch of the body, so that the HTTP server can read the client's connection again."""
        await end_task(self.fetching)
        if self.client_stream:
            await self.client_stream.end()

    def has_client_left(self) -> bool:
        """Return whether the client is at eof. Not for a WebSocket, whose end the server gets by its polls."""
        return not self.request.upgrade and self.request.connection is not None and self.request.connection.at_eof()

    def adapt_to(self, features: set[str]) -> bool:
        """Make the request fit for a server with these features; False if it cannot, and its client gets the reason."""
        if self.response.done() or self.request.connection is not None and self.request.connection.is_closed():
            self.fail(502, "the client is gone")
            return False
        if (self.body or self.inline_size) and "body" not in features:
            self.fail(501, NO_BODIES)
            return False
        if self.request.upgrade and "upgrade" not in features:
            self.head = without_upgrade(self.head)
        return True

    def break_off(self, reason: str) -> None:
        """Answer the client with 502. If its response has begun, close its P5: the client sees it incomplete."""
        self.fail(502, reason)
        if self.tunnel_body:
            self.tunnel_body.add(None)

    def fail(self, status: int, reason: str) -> None:
        """Answer the client with an error, if there is no response yet."""
        self.fail_with(ProtocolError(status, reason, headers=[("Retry-After", "5")] if status == 503 else []))

    def fail_with(self, error: Exception) -> None:
        """Let the client's request raise this error, if there is no response yet."""
        if not self.response.done():
            self.response.set_exception(error)
            self.response.exception()  # retrieved, so that asyncio logs nothing when the client is gone


class UploadBody(Body):
    """A request's body, sent from the client's connection to the server that fetches it.

    `chunked`: it is put into chunks, whatever the framing of the response: see FRAMING.
    """

    def __init__(self, exchange: Exchange, body: Body, *, chunked: bool) -> None:
        self._exchange = exchange
        self._body = body
        self._chunked = chunked
        self.length = body.length

    async def write_to(self, sink: Sink) -> None:
        """Send it. If the client causes an error, the client gets it."""
        exchange = self._exchange
        exchange.fetching = asyncio.current_task()
        try:
            await write_body(sink, self._body, chunked=self._chunked)
        except (IncompleteBody, ProtocolError) as error:
            exchange.fail_with(error)
            raise
        except (OSError, asyncio.CancelledError):
            exchange.broke_at = asyncio.get_running_loop().time()  # a response may still arrive: see `_sweep`
            raise
        finally:
            exchange.fetching = None
            exchange.waits_since = asyncio.get_running_loop().time()


class ClientStream:
    """The bytes that a client sends after a 101. The server gets them by polls, one after another."""

    def __init__(self, body: Body) -> None:
        self._body = body
        self._position = 0  # bytes that polls have returned
        self._reading: asyncio.Task[bytes] | None = None  # continues from one poll to the next
        self._latest: object = None  # the last poll, which gets the bytes: the connection of an earlier one may be dead

    async def poll(self, offset: int, wait: float) -> bytes | None:
        """Return received bytes, None after `wait` seconds without any, or b"" after the end.

        IncompleteBody if `offset` is not the number of bytes that were returned: the server has lost some.
        """
        if offset != self._position:
            raise IncompleteBody("bytes of the client's were lost on their way to the server")
        self._latest = poll = object()
        if self._reading is None:
            self._reading = asyncio.create_task(self._body.read())
        await asyncio.wait({self._reading}, timeout=wait)
        if self._latest is not poll or not self._reading.done():
            return None
        if self._reading.cancelled() or self._reading.exception():
            return b""
        if data := self._reading.result():
            self._reading = None
            self._position += len(data)
        return data

    async def end(self) -> None:
        """Stop reading the client's connection, because the HTTP server reads it again. Further polls get b""."""
        self._reading = self._reading or asyncio.create_task(self._body.read())  # even if only for `poll` to see
        await end_task(self._reading)


class ParkedPoll(NamedTuple):
    """A P1 that waits for a request."""

    batch: asyncio.Future[list[Exchange]]
    connection: Peer | None
    instance: str  # which server of this name sent it
    features: set[str]
    since: float  # in the loop's time
    until: float  # the same: then it gets an empty P3

    def is_stale(self) -> bool:
        """Return whether requests sent in answer to it would not arrive."""
        return self.batch.done() or self.connection is not None and self.connection.at_eof()

    def answer_empty(self) -> None:
        """Answer it without a request."""
        if not self.batch.done():
            self.batch.set_result([])


class RegisteredServer:
    """A server in the configuration, and its state."""

    def __init__(self, entry: ServerEntry) -> None:
        self.entry = entry
        self.name = entry.name
        self.hosts: list[str] = []  # its own hosts
        self.waiting: dict[str, Exchange] = {}
        self.offered: dict[str, Exchange] = {}  # sent in a P3, and without a response
        self.in_flight = 0  # requests whose client does not have the whole response yet
        self.streams = 0  # of these, the ones whose responses have no end
        self.addresses: Counter[str] = Counter()  # how many of these each client address has
        self.parked: deque[ParkedPoll] = deque()
        self.responding = 0  # P5 in flight, without batches
        self.batch_bytes = 0  # bytes of batches that are being read
        self.statuses: Counter[int] = Counter()  # number of responses by status
        self.body_bytes = 0
        self.last_seen: float | None = None  # in the loop's time
        self.features = {"body"}  # PTTH-Features of its last P1; before the first, bodies are assumed to be possible
        self.instances: dict[str, float] = {}  # when each server of this name was last seen
        self.connected = False  # as pages and the log show it: stays True for DISCONNECTED_AFTER between two P1
        self.dispatch_scheduled = False

    @property
    def has_connection(self) -> bool:
        """Whether a connection of the server is known: a waiting P1, a P3 without its responses yet, or a P5."""
        return bool(self.parked or self.offered or self.responding)

    def admit(self, exchange: Exchange) -> None:
        """Add a request. ProtocolError 503 if the server or the client's address has too many."""
        being_sent = self.in_flight - len(self.waiting) - len(self.offered) - self.streams
        why = ""
        if max(len(self.waiting), len(self.offered)) >= MAX_WAITING:  # the limit of each
            why = f"too many requests wait for {self.name}"
        elif being_sent >= MAX_SENDING:
            why = f"too many responses of {self.name} are being sent"
        elif exchange.address and self.addresses[exchange.address] >= MAX_FROM_ADDRESS:
            why = f"too many requests from {exchange.address} at once"
        if why:
            raise ProtocolError(503, why, headers=[("Retry-After", "5")])
        self.in_flight += 1
        self.addresses[exchange.address] += 1

    def release(self, exchange: Exchange) -> None:
        """Free the place of a request that `admit` has added."""
        self.in_flight -= 1
        self.streams -= exchange.is_stream
        self.addresses[exchange.address] -= 1
        if not self.addresses[exchange.address]:
            del self.addresses[exchange.address]

    def add_stream(self, exchange: Exchange) -> None:
        """Count a response without an end separately. ProtocolError 410 if there are MAX_STREAMS already."""
        if self.streams >= MAX_STREAMS:
            exchange.fail(503, f"too many streams of {self.name} are open")
            raise ProtocolError(410, "too many streams are open", headers=[NO_STORE])
        self.streams += 1
        exchange.is_stream = True

    def see(self, instance: str, now: float) -> None:
        """Record that a server of this name has sent a P1."""
        self.last_seen = now
        self.instances.pop(instance, None)
        self.instances[instance] = now
        if len(self.instances) > MAX_INSTANCES:
            del self.instances[next(iter(self.instances))]

    def next_requests(self, instance: str, features: set[str]) -> list[Exchange]:
        """Return the requests for one P3, and move them from `waiting` to `offered`.

        No client address gets all handlers of the server, for example by uploads that never end. A server of this
        program gets half of those in flight at a time: while it handles them, the relay has the others to do.
        """
        self.features = features
        most = min(max(self.in_flight // 2, MIN_HALF), MAX_P3_REQUESTS) if "listen" in features else MAX_P3_REQUESTS
        batch: list[Exchange] = []
        size = 0
        at_work: Counter[str] = Counter()
        if len(self.offered) + MAX_P3_REQUESTS > MAX_AT_WORK:  # only then can an address have that many
            at_work.update(exchange.address for exchange in self.offered.values())
        for exchange in list(self.waiting.values()):
            if exchange.address and at_work[exchange.address] >= MAX_AT_WORK:
                continue
            size += len(exchange.head)
            if len(batch) == most or batch and size > MAX_BATCH_BYTES:
                break
            del self.waiting[exchange.request_id]
            if not exchange.adapt_to(features):
                continue
            exchange.offers += 1
            exchange.instance = instance
            self.offered[exchange.request_id] = exchange
            at_work[exchange.address] += 1
            batch.append(exchange)
        return batch

    def dispatch(self) -> None:
        """Answer waiting P1 with waiting requests. Called at the end of a turn, to send all in one P3."""
        self.dispatch_scheduled = False
        while self.waiting and self.parked:
            if self.parked[0].is_stale():
                self.answer_empty(ParkedPoll.is_stale)
            else:
                batch = self.next_requests(self.parked[0].instance, self.parked[0].features)
                if not batch:  # the rest is of addresses that have MAX_AT_WORK requests at work
                    break
                self.parked.popleft().batch.set_result(batch)

    def answer_empty(self, which: Callable[[ParkedPoll], bool] = lambda parked: True) -> None:
        """Answer waiting P1 without a request: all, or those for which `which` is true."""
        for parked in list(filter(which, self.parked)):
            self.parked.remove(parked)
            parked.answer_empty()

    def renew_polls(self, now: float) -> None:
        """End all waiting P1, because a server has just connected (its P1 has `wait=0`): living servers poll again.

        A proxy may hold open a P1 of a dead predecessor, and requests sent there would be lost.
        """
        for parked in self.parked:
            asyncio.get_running_loop().call_later(max(parked.since + RENEWAL_TIME - now, 0), parked.answer_empty)
        self.parked.clear()

    def forget_instances(self, now: float) -> None:
        """Remove those servers of this name that have not polled for DISCONNECTED_AFTER."""
        parked_now = {parked.instance for parked in self.parked}
        for instance, seen in list(self.instances.items()):
            # A P5 does not name its instance, so it may be from any of them.
            if instance not in parked_now and now - seen > DISCONNECTED_AFTER and not self.responding:
                del self.instances[instance]

    def offer(self, exchange: Exchange) -> None:
        """Add a request to those that wait, and dispatch them at the end of this turn of the loop."""
        self.waiting[exchange.request_id] = exchange
        self.schedule_dispatch()

    def forget(self, exchange: Exchange) -> None:
        """Remove a request from those without a response."""
        self.waiting.pop(exchange.request_id, None)
        self.offered.pop(exchange.request_id, None)
        self.schedule_dispatch()  # a request of the same address may have waited for this one

    def schedule_dispatch(self) -> None:
        """Let `dispatch` be called at the end of this turn of the loop, if it has something to do."""
        if not self.dispatch_scheduled and self.parked and self.waiting:
            self.dispatch_scheduled = True
            asyncio.get_running_loop().call_soon(self.dispatch)


def parse_ids(text: str) -> list[str]:
    """Return the ids of a PTTH-Lost or PTTH-At-Work field, MAX_LOST at most."""
    return [request_id.strip() for request_id in text.split(",", MAX_LOST)[:MAX_LOST]]


class HashQueue:
    """Hashes keys for at most a `share` of the time, so that many wrong keys do not delay other requests.

    Groups take turns: a group with many keys delays each of the others by one hash only.
    """

    def __init__(self, share: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._share = share
        self._turn = asyncio.Lock()  # held by the key that is next; one key of each group waits for it
        # For each group with keys, the lock that its other keys wait for.
        self._groups: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._used_until = -math.inf  # in the loop's time: no hash before that

    async def hash(self, key: str, group: str) -> str:
        """Wait for the key's turn, and return its tripcode. ProtocolError 503 after HASH_WAIT seconds."""
        first_of_group = self._groups.setdefault(group, asyncio.Lock())
        try:
            async with asyncio.timeout(HASH_WAIT), first_of_group, self._turn:
                if self._used_until > self._loop.time():
                    await asyncio.sleep(self._used_until - self._loop.time())
                begin = time.thread_time()
                code = tripcode(key)
                cost = (time.thread_time() - begin) / self._share
                # Time that was not used more than a second ago does not count.
                self._used_until = max(self._used_until, self._loop.time() - 1) + cost
                return code
        except TimeoutError:
            reason = "too many keys are to be verified"
            raise ProtocolError(503, reason, headers=[NO_STORE, ("Retry-After", "1")]) from None


class Keys:
    """Verifies API keys by their tripcodes, in constant time.

    For each configured tripcode, the right key is remembered. That key needs no hash and never waits.
    """

    def __init__(self) -> None:
        self._known: dict[str, bytes] = {}  # a key by its tripcode
        self._tried: set[str] = set()  # tripcodes for which a key was hashed already
        self._registered = HashQueue(HASH_SHARE)
        self._strangers = HashQueue(STRANGER_SHARE)

    def configure(self, codes: Iterable[str]) -> None:
        """Forget the keys whose tripcodes are no longer configured."""
        configured = set(codes)
        self._known = {code: key for code, key in self._known.items() if code in configured}
        self._tried &= configured

    async def find(self, key: str, codes: Collection[str], group: str) -> tuple[str, bool]:
        """Return the tripcode of `key`, and True if that is one of `codes` and the key is shown for the first time.

        A key that is not known waits in its group; without `codes`, in the queue for unregistered names. The first key
        for a tripcode does not wait: after a restart of the relay the keys of all servers come at once. ProtocolError
        503 after HASH_WAIT seconds.
        """
        shown = key.encode("utf-8", "surrogateescape")
        for code in codes:
            known = self._known.get(code)
            if known is not None and is_same_secret(known, shown):
                return code, False
        if self._tried.issuperset(codes):
            found = await (self._registered if codes else self._strangers).hash(key, group)
        else:
            self._tried.update(codes)
            found = tripcode(key)
        matches = [is_same_secret(found.encode(), code.encode()) for code in codes]
        if not any(matches) or found in self._known:  # another request with the key was first
            return found, False
        self._known[found] = shown
        return found, True


class Part:
    """A part of a response's body, in one P5. ProtocolError 400."""

    def __init__(self, p5: Request, body: Body) -> None:
        self.body = body
        self.connection = p5.connection
        self.offset = parse_offset(p5.headers)  # bytes of the response's body before it
        self.more = "ptth-more" in p5.headers  # another part follows
        self.taken = asyncio.get_running_loop().create_future()  # if there is more: when the client has this part


class TunnelBody(Body):
    """The body of a response from one P5, or in parts from several, for `write_to` only.

    Nothing is stored: a slow client slows the server. After each part, also an incomplete one, the next may arrive
    within `timeout` seconds. Bytes that the client has already are skipped. The HTTP server closes each P5's
    connection.
    """

    def __init__(self, part: Part, length: int | None, timeout: float) -> None:
        self.length = length
        self._timeout = timeout
        self._position = 0  # bytes that were sent to the client
        self._latest: Part | None = None  # the last one that has arrived
        self._parts: asyncio.Queue[Part | None] = asyncio.Queue()
        self.add(part)

    def add(self, part: Part | None) -> None:
        """Continue with this part, or end the response, incomplete.

        The part before it ends if it is still being read, because its connection may be dead.
        """
        if self._latest and not self._latest.taken.done() and self._latest.connection:
            self._latest.connection.shut_down()
        if part and part.more:
            self._timeout = PART_TIMEOUT
        self._latest = part
        self._parts.put_nowait(part)

    async def _next_part(self) -> Part:
        """Wait for the next part. IncompleteBody if it does not arrive in time, or bytes before it are missing."""
        try:
            async with asyncio.timeout(self._timeout):
                part = await self._parts.get()
        except TimeoutError:
            part = None
        if part is None or part.offset > self._position:
            raise IncompleteBody("the server's response broke off")
        return part

    async def _send(self, part: Part, sink: Sink) -> None:
        """Send the bytes of a part that the client does not have yet. IncompleteBody, ProtocolError."""
        known, begun = self._position - part.offset, sink.written
        if self.length is not None and not known and part.body.length == self.length - self._position:
            try:
                await part.body.write_to(sink)  # if possible, by splice
            finally:
                self._position += sink.written - begun
            return
        while piece := await part.body.read():
            piece, known = piece[known:], max(known - len(piece), 0)
            self._position += len(piece)
            if self.length is not None and self._position > self.length:
                raise ConnectionError("the server sent more than it announced")
            await sink.send(piece)

    async def write_to(self, sink: Sink) -> None:
        more = True
        while more:
            part = await self._next_part()
            try:
                await self._send(part, sink)
                more = part.more
                if more:
                    part.taken.set_result(True)
            except (IncompleteBody, ProtocolError) as error:  # the server's connection; errors of the sink are others
                broken = ProtocolError(400, f"the response broke off: {format_error(error)}", close=True)
                part.taken.set_exception(broken)
                part.taken.exception()  # retrieved, so that asyncio logs nothing if the part's sender is gone
        if self.length not in (None, self._position):
            raise IncompleteBody("the server sent less than it announced")


class Route(NamedTuple):
    """A request's destination: the server, the target there, and the path before that ("" on a host of its own)."""

    server: RegisteredServer
    target: str
    prefix: str = ""


class RelayState:
    """The state of a relay: its configuration, its servers, and the requests in flight."""

    def __init__(self, config: RelayConfig) -> None:
        self.loop = asyncio.get_running_loop()
        self.started = self.loop.time()
        self.servers: dict[str, RegisteredServer] = {}  # sorted by name
        self.exchanges: dict[str, Exchange] = {}  # requests in flight, by id
        self.events: deque[AuditEvent] = deque(maxlen=MAX_AUDIT_EVENTS)
        self.refused = {"backend": 0, "scraper": 0}  # number of refused keys
        self.unregistered: OrderedDict[tuple[str, str], float] = OrderedDict()  # (name, tripcode): POSIX time
        self.connection_count: Callable[[], int] = int  # returns the number of open connections
        self.stopping = False
        self.draining = False  # the health check fails, requests are still served
        self.checks: deque[float] = deque(maxlen=3)  # times of the last health checks
        self.configure(config)

    def configure(self, config: RelayConfig) -> None:
        """Apply a new configuration; servers that do not change are not affected.

        A removed server: its waiting requests get 503. A removed server or a changed tripcode: its waiting P1 get an
        empty P3, so the server must show its key again. Responses in flight finish.
        """
        self.config = config
        entries = {entry.name: entry for entry in config.servers}
        for name, server in list(self.servers.items()):
            if name not in entries or entries[name].tripcode != server.entry.tripcode:
                server.answer_empty()
            if name not in entries:
                del self.servers[name]
                for exchange in server.waiting.values():
                    exchange.fail(503, f"the server {name} is not registered any more")
        for name, entry in sorted(entries.items()):
            server = self.servers[name] = self.servers.pop(name, RegisteredServer(entry))
            server.entry, server.hosts = entry, config.hosts_of(entry)
        self.hosts = {host: server for server in self.servers.values() for host in server.hosts}  # their own
        self._trusted = [ipaddress.ip_network(network) for network in config.trusted_proxies]

    def audit(self, event: str, server: str, *details: Any) -> None:
        """Add a line to the audit log; `details` are the further fields of AuditEvent."""
        self.events.append(AuditEvent(time.time(), event, server, *details))

    def trusts(self, address: str) -> bool:
        """Return whether an address is that of a trusted proxy, whose X-Forwarded-* are used."""
        if is_loopback(address):
            return True
        try:
            return any(ipaddress.ip_address(address) in network for network in self._trusted)
        except ValueError:
            return False

    def client_address(self, request: Request) -> str:
        """Return the client's address: the peer's, or the last one in X-Forwarded-For that is not a trusted proxy."""
        address = request.peer
        for said in request.headers.get("x-forwarded-for", "").rsplit(",", 8)[:-9:-1]:  # the last eight, backwards
            if not said or not self.trusts(address):
                break
            address = said.strip()[:MAX_AUDIT_TEXT]
        return address

    def find_server(self, name: str) -> RegisteredServer:
        """Return the server with that name. ProtocolError 404."""
        if name not in self.servers:
            raise ProtocolError(404, "there is no server of that name here")
        return self.servers[name]

    def server_of_host(self, host: str) -> RegisteredServer | None:
        """Return the server with this host; None for the relay's own. ProtocolError 404 for others below `domain`."""
        domain = self.config.domain
        if not (self.hosts or domain):
            return None
        host = request_host(host)
        server = self.hosts.get(host)
        if not server and domain and host.endswith(f".{domain}"):
            hint = f"a server is reached at its name followed by .{domain}"
            raise ProtocolError(404, f"no server here has the host {host[:MAX_AUDIT_TEXT]}; {hint}")
        return server


class Gate:
    """Checks the keys of requests; counts and logs those that it refuses."""

    def __init__(self, state: RelayState) -> None:
        self.state = state
        self._server_keys = Keys()
        self._scraper_keys = Keys()
        self._refusal_logged: dict[str, float] = {}  # when the last refused key was logged, by name

    def configure(self) -> None:
        """Forget keys that are no longer in the configuration."""
        self._server_keys.configure(entry.tripcode for entry in self.state.config.servers)
        self._scraper_keys.configure(key.hash for key in self.state.config.scraper_keys)

    async def is_server(self, request: Request, server: RegisteredServer | None, name: str) -> bool:
        """Return whether X-ApiKey is the server's key; False for a missing or overlong one.

        Counts and logs a wrong key, and lists an unknown name on the page of unregistered servers. ProtocolError 503 if
        the key waits for its hash for more than HASH_WAIT seconds.
        """
        key = request.headers.get("x-apikey", "")
        if not key or len(key) > MAX_KEY:
            return False
        address = outer_address(self.state.client_address(request))
        if server:
            code, is_new = await self._server_keys.find(key, [server.entry.tripcode], f"{name} {address}")
            if is_new and "ptth-instance" not in request.headers:
                self._warn_of_weakness("server", name, key)
            if is_same_secret(code.encode(), server.entry.tripcode.encode()):
                return True
        else:
            code, _ = await self._server_keys.find(key, [], address)
            self.state.unregistered[name, code] = time.time()
            self.state.unregistered.move_to_end((name, code))
            if len(self.state.unregistered) > MAX_UNREGISTERED:
                self.state.unregistered.popitem(last=False)
        self._record_refused_key("backend", request, name, "wrong key" if server else "unknown name")
        return False

    async def is_scraper(self, request: Request) -> bool:
        """Return whether X-ApiKey is a scraper's key that is valid now. The log has the reason. ProtocolError 503."""
        key = request.headers.get("x-apikey")
        why, name, now = "no key", "-", time.time()
        if key and len(key) > MAX_KEY:
            why = "a key that is too long"
        elif key:
            why = "unknown key"
            codes = [entry.hash for entry in self.state.config.scraper_keys]
            code, is_new = await self._scraper_keys.find(key, codes, outer_address(self.state.client_address(request)))
            for entry in self.state.config.scraper_keys:
                if is_same_secret(code.encode(), entry.hash.encode()):
                    name = entry.name
                    if is_new:
                        self._warn_of_weakness("scraper", name, key)
                    if entry.not_before <= now <= entry.not_after:
                        return True
                    why = "a key that is not yet valid" if now < entry.not_before else "a key that has expired"
        self._record_refused_key("scraper", request, name, why)
        return False

    @staticmethod
    def _warn_of_weakness(kind: str, name: str, key: str) -> None:
        """Warn the operator of a key that can be guessed: the server in Rust accepts such keys.

        The check takes ten times as long as the hash. So keys of servers that have checked them already are skipped.
        """
        if weakness := key_weakness(key):
            log_line(f"ptth relay: warning: the key of the {kind} {name!r} {weakness}; give it a better one")

    def _record_refused_key(self, api: str, request: Request, name: str, why: str) -> None:
        """Count a refused key. Log it at most once in 60 s for each name, and for all unregistered names together."""
        self.state.refused[api] += 1
        now = self.state.loop.time()
        known = name if name in self.state.servers or api == "scraper" else ""
        if now - self._refusal_logged.get(known, -math.inf) < 60:
            return
        self._refusal_logged[known] = now
        client = self.state.client_address(request)
        who, status = ("server", 401) if api == "backend" else ("scraper", 403)
        log_line(
            f"ptth relay: {who} {name!r}: {why} from {client}, {status}; further ones are not logged for 60 seconds"
        )
        self.state.audit(f"{api} key refused: {why}", name, client)


# -- 14. Relay desk --
# The relay's own pages, scraper API, metrics and audit log. Reads the state; changes only the times of health checks.


class Desk:
    """Answers requests for the relay's own pages, the audit log, metrics and the rest of the scraper API."""

    def __init__(self, state: RelayState, gate: Gate) -> None:
        self.state = state
        self.gate = gate
        with open(__file__, "rb") as file:
            source = file.read()  # now, because the file may be replaced while the program runs
        source_fields = [("Content-Type", "text/x-python; charset=utf-8"), NOSNIFF]
        self._pages: dict[str, Callable[[Request], Response]] = {
            "/": lambda request: text_response(302, "see frontend/servers/\n", [("Location", "./frontend/servers/")]),
            "/frontend/servers": lambda request: text_response(301, "see servers/\n", [("Location", "./servers/")]),
            "/frontend/servers/": self._server_list,
            "/frontend/unregistered_servers": self._unregistered_servers,
            "/frontend/audit_log": self._audit_counts,
            "/frontend/debug/": self._debug,
            "/frontend/tls_check": self._tls_check,
            "/frontend/relay_up_check": self._up_check,
            "/ptth.py": lambda request: Response(200, source_fields, BytesBody(source)),
        }

    async def show(self, request: Request, path: str) -> Response:
        """Answer a request for one of the relay's own pages. ProtocolError 404, 405."""
        if path not in self._pages:
            raise ProtocolError(404, "not found")
        self._check_method(request)
        if path == "/frontend/audit_log" and await self._may_see_clients(request):
            return self._audit_log(request)
        return self._pages[path](request)

    async def _may_see_clients(self, request: Request) -> bool:
        """Return whether this request may see the addresses of clients and the paths of their requests."""
        config = self.state.config
        if config.audit_log_public or is_local(request):
            return True
        return config.enable_scraper_api and "x-apikey" in request.headers and await self.gate.is_scraper(request)

    def show_scraper(self, request: Request, what: str) -> Response:
        """Answer the part of the scraper API that is not forwarded to a server. ProtocolError 404, 405."""
        self._check_method(request)
        if what == "test":
            return text_response(200, "You're valid!", [NO_STORE])
        if what == "server_list":
            return json_response({"servers": [self._server_info(server) for server in self.state.servers.values()]})
        if what == "metrics":
            return self._metrics()
        raise ProtocolError(404, "not found")

    @staticmethod
    def _check_method(request: Request) -> None:
        if request.method not in ("GET", "HEAD"):
            raise ProtocolError(405, f"{request.method} is not possible here", headers=[("Allow", "GET, HEAD")])

    # the scraper API

    def _server_info(self, server: RegisteredServer) -> dict[str, object]:
        seen = None
        if server.last_seen is not None:
            seen = format_time(time.time() - (0 if server.connected else self.state.loop.time() - server.last_seen))
        return {
            "name": server.name,
            "display_name": server.entry.display_name or None,
            "last_seen": seen,
            "connected": server.connected,
        }

    def _metrics(self) -> Response:
        """Return all counters in Prometheus' text format. Labels name registered servers only."""
        servers = self.state.servers.values()

        def each(value: Callable[[RegisteredServer], float]) -> list[tuple[str, float]]:
            return [(f'{{server="{server.name}"}}', value(server)) for server in servers]

        refused = [(f'{{api="{api}"}}', count) for api, count in self.state.refused.items()]
        answered = [
            (f'{{server="{server.name}",status="{status}"}}', count)
            for server in servers
            for status, count in sorted(server.statuses.items())
        ]
        families: list[tuple[str, str, str, Sequence[tuple[str, float]]]] = [
            ("connections", "gauge", "Open connections.", [("", self.state.connection_count())]),
            ("keys_refused_total", "counter", "Keys that were refused.", refused),
            ("server_connected", "gauge", "Whether the server is connected.", each(lambda one: one.connected)),
            ("requests_waiting", "gauge", "Requests that wait for the server.", each(lambda one: len(one.waiting))),
            ("body_bytes_total", "counter", "Bytes of bodies sent to clients.", each(lambda one: one.body_bytes)),
            ("requests_total", "counter", "Requests answered.", answered),
        ]
        lines = []
        for name, kind, text, samples in families:
            lines += [f"# HELP ptth_{name} {text}", f"# TYPE ptth_{name} {kind}"]
            lines += [f"ptth_{name}{labels} {count:.0f}" for labels, count in samples]
        fields = [("Content-Type", "text/plain; version=0.0.4; charset=utf-8"), NOSNIFF, NO_STORE]
        return Response(200, fields, BytesBody(("\n".join(lines) + "\n").encode()))

    # pages

    def _up_check(self, request: Request) -> Response:
        """Answer a health check: 200, or 503 while the relay is about to stop."""
        self.state.checks.append(self.state.loop.time())
        if self.state.draining:
            raise ProtocolError(503, "the relay is stopping", headers=[NO_STORE])
        return text_response(200, "Relay is up\n", [NO_STORE])

    def _tls_check(self, request: Request) -> Response:
        """Answer 200 if `?domain=HOST` is a server's host, else 404. Caddy asks before it gets a certificate."""
        query = urllib.parse.parse_qs(request.target.partition("?")[2])
        if request_host(query.get("domain", [""])[-1]) not in self.state.hosts:
            raise ProtocolError(404, "this is not the host of a server", headers=[NO_STORE])
        return text_response(200, "this is the host of a server\n", [NO_STORE])

    def _server_list(self, request: Request) -> Response:
        """Show the registered servers: their state, requests, and bytes sent."""
        port = re.search(r":[0-9]+\Z", request.headers.get("host", ""))
        rows = []
        for server in self.state.servers.values():
            if server.connected:
                state = "connected" + (f" ({len(server.instances)} servers)" if len(server.instances) > 1 else "")
            elif server.last_seen is None:
                state = "never seen"
            else:
                state = f"last seen {format_age(self.state.loop.time() - server.last_seen)}"
            url = f"//{server.hosts[0]}{port[0] if port else ''}/" if server.hosts else f"./{server.name}/"
            link = f'<a href="{escape(url)}">{escape(server.entry.display_name or server.name)}</a>'
            state = f'<span class="{"on" if server.connected else "q"}">{state}</span>'
            requests = f"{sum(server.statuses.values()):,}"
            rows.append((link, state, requests, format_size(server.body_bytes), str(server.in_flight)))
        news = self.state.config.news_url
        content = f'<p><a href="{escape(news)}">News</a></p>\n' if news else ""
        columns = {"Name": "d", "State": "", "Requests": "n w", "Sent": "n w", "In flight": "n w"}
        content += html_table(columns, rows) if rows else "<p>No server is registered in the relay's configuration.</p>"
        return self._page("Servers", content, "../../")

    def _page(self, title: str, content: str, top: str) -> Response:
        """Make a page of the relay; `top` is the relative URL of the root."""
        links = [("servers/", "Servers"), ("unregistered_servers", "Unregistered servers"), ("audit_log", "Audit log")]
        links += [("debug/", "Debug")] if self.state.config.dev_mode else []
        ways = " &middot; ".join(f'<a href="{top}frontend/{path}">{text}</a>' for path, text in links)
        html = f"<main>\n<h1>{title}</h1>\n{content}\n</main>\n<footer>{ways}<br>{VERSION_LINE.format(top)}</footer>"
        return html_response(200, page(title, html), [NO_STORE])

    def _audit_log(self, request: Request) -> Response:
        """Show the audit log, the newest event first, as a page or as JSON."""
        if wants_json(request.headers):
            newest_first = reversed(self.state.events)
            return json_response([event._asdict() | {"time": format_time(event.time)} for event in newest_first])
        rows = []
        for event in itertools.islice(reversed(self.state.events), MAX_AUDIT_ROWS):
            what = f"{event.method} {event.path}" if event.method else event.event
            end = f"{event.status}, {format_size(event.bytes)}" if event.status else ""
            day, _, second = format_time(event.time).removesuffix("Z").partition("T")
            when = f'<span class="w">{day} </span>{second}'
            rows.append((when, *map(escape, (event.server, event.client, what, end))))
        columns = {"Time (UTC)": "t", "Server": "", "Client": "w", "What": "b", "Answer": "n"}
        return self._page("Audit log", html_table(columns, rows) if rows else "<p>Nothing has happened.</p>", "../")

    def _audit_counts(self, request: Request) -> Response:
        """Show how often each event occurred for each server, to clients that may not see the audit log itself."""
        known = self.state.servers
        counts = Counter((one.server if one.server in known else "", one.event) for one in self.state.events)
        rows = [(server, event, count) for (server, event), count in sorted(counts.items())]
        if wants_json(request.headers):
            return json_response([dict(zip(("server", "event", "count"), row, strict=True)) for row in rows])
        content = "<p>Counts only: addresses and paths are shown on the relay's own machine and to programs with a "
        content += "scraper key, or to everybody with <code>audit_log_public = true</code>.</p>\n"
        columns, cells = {"Server": "", "What": "b", "Count": "n"}, (map(escape, map(str, row)) for row in rows)
        content += html_table(columns, cells) if rows else "<p>Nothing has happened.</p>"
        return self._page("Audit log", content, "../")

    def _debug(self, request: Request) -> Response:
        """Show version and state, in dev mode; otherwise ProtocolError 404."""
        if not self.state.config.dev_mode:
            raise ProtocolError(404, "not found")
        values = {
            "Version": __version__,
            "Python": sys.version,
            "System": sys.platform,
            "Up": format_age(self.state.loop.time() - self.state.started).removesuffix(" ago"),
            "Connections": str(self.state.connection_count()),
            "Requests not answered": str(sum(not one.response.done() for one in self.state.exchanges.values())),
        }
        rows = [(name, escape(value)) for name, value in values.items()]
        return self._page("Debug", html_table({"Name": "", "Value": "b"}, rows), "../../")

    def _unregistered_servers(self, request: Request) -> Response:
        """Show the names of unregistered servers that tried to connect, with the block that would register them."""
        now = time.time()
        rows = [
            (f'<pre>[[servers]]\nname = "{escape(name)}"\ntripcode = "{code}"</pre>', format_age(now - seen))
            for (name, code), seen in reversed(self.state.unregistered.items())
        ]
        content = "<p>These tried to connect. Anybody can: before pasting a block into ptth_relay.toml, compare its "
        content += "tripcode with what <code>server --print-tripcode</code> prints.</p>\n"
        content += html_table({"To register": "", "Tried": "n"}, rows) if rows else "<p>Nobody has tried.</p>"
        return self._page("Unregistered servers", content, "../")


# -- 15. Relay --
# Forwards P2 in answer to P1, and P5 as P6. Does not use files.

_BACKEND_ACTIONS = {  # the method of each, and the form of the name or id after it
    "http_listen": ("GET", _NAME),
    "http_request": ("GET", _ID),
    "http_response": ("POST", _ID),
    "http_responses": ("POST", _NAME),
}
_UPLOAD_FIELDS = [("Content-Type", "application/octet-stream"), ("Cache-Control", "no-store, no-transform")]


def _bad_key() -> ProtocolError:
    return ProtocolError(401, "Bad X-ApiKey", headers=[NO_STORE, ("WWW-Authenticate", 'X-ApiKey realm="ptth"')])


def _gone(*, close: bool = False) -> ProtocolError:
    return ProtocolError(410, "no client waits for this response", headers=[NO_STORE], close=close)


class Backend:
    """Answers requests from servers: P1 (with P3), fetches of bodies, and P5 (with P7)."""

    def __init__(self, state: RelayState, gate: Gate) -> None:
        self.state = state
        self.gate = gate
        self.responses = Responses(state)
        self._offered_on: dict[Peer, list[Exchange]] = {}  # requests by the connection of their P3

    async def handle(self, request: Request, path: str) -> Response:
        """Answer a server. Each request must show its key, because a proxy may mix connections."""
        action, _, rest = path.partition("/")
        method, form = _BACKEND_ACTIONS.get(action, ("", _NAME))
        if not method or not form.fullmatch(rest):
            raise ProtocolError(404, "not found")
        if request.method != method:
            raise ProtocolError(405, f"{request.method} is not possible here", headers=[("Allow", method)])
        if form is _NAME:  # about a server; the other two actions are about one request
            server = await self._verified_server(request, rest)
            return await (self._listen if method == "GET" else self._receive_batch)(request, server)
        exchange = self.state.exchanges.get(rest)
        if exchange is None or not (exchange.has_upload if method == "GET" else exchange.takes_p5()):
            raise _gone(close=not await self.responses.drain_rust(request))
        if not await self.gate.is_server(request, exchange.server, exchange.server.name):
            raise _bad_key()
        if method == "POST":
            return await self.responses.receive(request, exchange)
        stream = exchange.client_stream
        return await self._give_stream(request, exchange, stream) if stream else self._give_body(request, exchange)

    async def _verified_server(self, request: Request, name: str) -> RegisteredServer:
        """Return the server of this name, if the request has its key. ProtocolError 401."""
        server = self.state.servers.get(name)
        verified = await self.gate.is_server(request, server, name)
        if server is None or not verified or server is not self.state.servers.get(name):  # a reload has removed it
            raise _bad_key()
        return server

    async def _listen(self, request: Request, server: RegisteredServer) -> Response:
        """Answer a P1 with the waiting requests, or wait for one."""
        now = self.state.loop.time()
        if not server.connected:
            server.connected = True
            log_line(f"ptth relay: {server.name} is connected")
            self.state.audit("connected", server.name, self.state.client_address(request))
        instance = request.headers.get("ptth-instance", "")[:32]
        server.see(instance, now)
        wait = parse_wait(request.headers.get("prefer", ""))
        self._take_losses(server, request.headers)
        if instance and not wait:  # a hello: what was sent before may not have arrived, on connections that were dead
            at_work = parse_ids(request.headers.get("ptth-at-work", ""))
            sent = [one for one in server.offered.values() if one.instance == instance]
            self._offer_again(one for one in sent if one.request_id not in at_work)
        features = set(request.headers.tokens("ptth-features"))
        batch = server.next_requests(instance, features)
        if not batch and self.state.stopping:
            raise ProtocolError(503, "the relay is stopping", close=True, headers=[NO_STORE])
        if not wait:
            server.renew_polls(now)
        elif not batch:
            # Up to a tenth less, at random, so that the P1 of thousands of servers do not all end at the same time.
            until = now + wait * (1 - os.urandom(1)[0] / 2560)
            parked = ParkedPoll(self.state.loop.create_future(), request.connection, instance, features, now, until)
            batch = await self._park(parked, server)
        return self._make_p3(request, server, batch)

    async def _park(self, parked: ParkedPoll, server: RegisteredServer) -> list[Exchange]:
        """Let a P1 wait, and return the requests for it."""
        server.parked.append(parked)
        if len(server.parked) > MAX_PARKED:
            server.parked.popleft().answer_empty()
        try:
            return await parked.batch
        except asyncio.CancelledError:
            if not parked.batch.cancelled():  # a reset in the same turn of the loop: the requests are not sent
                self._offer_again(parked.batch.result())
            raise
        finally:
            server.see(parked.instance, self.state.loop.time())
            if parked in server.parked:
                server.parked.remove(parked)

    def _make_p3(self, request: Request, server: RegisteredServer, batch: list[Exchange]) -> Response:
        sent = (lambda complete, size: self._p3_sent(request.connection, batch, complete)) if batch else None
        if "application/http" not in request.headers.get("accept", ""):  # a server in Rust sends */*
            data = self._pack_for_rust(batch)
            return Response(200 if batch else 204, [NO_STORE], BytesBody(data), sent, close=self.state.stopping)
        body = BytesBody(b"".join([exchange.head for exchange in batch]))
        fields = [("Content-Type", REQUESTS_TYPE), NO_STORE, FEATURES]
        fields += [("PTTH-Host", host) for host in server.hosts[:1]]
        return Response(200, fields, body, sent, close=self.state.stopping)

    @staticmethod
    def _give_body(request: Request, exchange: Exchange) -> Response:
        """Answer a fetch with the body of a request, from the client's connection. ProtocolError 410 if repeated.

        410 also when the client waits for 100 Continue, and its response has begun already.
        """
        if exchange.body is None or exchange.was_fetched or exchange.body.expects and exchange.response.done():
            raise ProtocolError(410, "the body was fetched before, or is not wanted any more", headers=[NO_STORE])
        exchange.was_fetched = True
        exchange.fetch_connection = request.connection
        chunked = exchange.body.length is None and FRAMING[0].lower() in request.headers
        fields = [*_UPLOAD_FIELDS, FRAMING] if chunked else _UPLOAD_FIELDS
        return Response(200, fields, UploadBody(exchange, exchange.body, chunked=chunked))

    @staticmethod
    async def _give_stream(request: Request, exchange: Exchange, stream: ClientStream) -> Response:
        """Answer a poll with the bytes that the client has sent since the last one; 204 for none, 410 after the end."""
        offset, wait = parse_offset(request.headers), parse_wait(request.headers.get("prefer", ""))
        response = exchange.response
        await asyncio.wait({response}, timeout=wait)
        if not response.done():
            return Response(204, [NO_STORE])
        data: bytes | None = b""
        if not response.cancelled() and not response.exception() and response.result().status == 101:
            try:
                data = await stream.poll(offset, wait)
            except IncompleteBody as error:
                exchange.break_off(format_error(error))
        if data == b"":
            raise _gone()
        return Response(200, _UPLOAD_FIELDS, BytesBody(data)) if data else Response(204, [NO_STORE])

    def _take_losses(self, server: RegisteredServer, headers: Headers) -> None:
        """Answer 502 to the clients whose responses did not arrive: the ids in PTTH-Lost."""
        for request_id in parse_ids(headers.get("ptth-lost", "")):
            exchange = self.state.exchanges.get(request_id)
            if exchange and exchange.server is server:
                exchange.break_off("the server's response did not get through; the server's log says why")

    @staticmethod
    def _pack_for_rust(batch: list[Exchange]) -> bytes:
        """Format a P3 in Rust form. A request that this form cannot express gets its error response."""
        requests: list[Value] = []
        for exchange in batch:
            try:
                requests.append(pack_rust_request(exchange.head))
            except ProtocolError as error:
                exchange.fail_with(error)
        return pack_value(requests)

    def _p3_sent(self, connection: Peer | None, batch: list[Exchange], complete: bool) -> None:
        """After a P3 was written: if it is incomplete, offer its requests again; else remember its connection."""
        if not complete or connection is None:
            self._offer_again(batch)
            return
        if connection not in self._offered_on:
            connection.on_close.append(lambda: self._on_connection_close(connection))
        under_way = (*self._offered_on.get(connection, ()), *batch)
        self._offered_on[connection] = [one for one in under_way if not one.response.done()]

    def _on_connection_close(self, connection: Peer) -> None:
        """Offer the requests that were sent on a connection again, unless it ended after `Connection: close`."""
        exchanges = self._offered_on.pop(connection)
        if not connection.must_close:
            self._offer_again(exchanges, arrived=True)

    @staticmethod
    def _offer_again(exchanges: Iterable[Exchange], *, arrived: bool = False) -> None:
        """Offer each GET or HEAD again, once. Others may have had their effect: they get 502, unless they `arrived`."""
        for exchange in exchanges:
            if exchange.has_p5 or exchange.server.offered.pop(exchange.request_id, None) is None:
                continue  # its P5 has begun, or it is not offered any more
            if exchange.method in ("GET", "HEAD") and exchange.offers < 2 and not exchange.was_fetched:
                exchange.server.offer(exchange)
            elif not arrived:
                exchange.fail(502, "the connection to the server broke")

    async def _receive_batch(self, request: Request, server: RegisteredServer) -> Response:
        """Receive a batch. With Prefer: wait=N it is also a P1, and its answer a P3."""
        await self.responses.receive_batch(request, server)
        server.last_seen = self.state.loop.time()
        if "prefer" in request.headers and not self.state.stopping:
            return await self._listen(request, server)
        return Response(200, [NO_STORE])


def _client_fields(exchange: Exchange, status: int, headers: Headers) -> Fields:
    """Return the fields of a server's response that its client gets."""
    server = exchange.server
    if exchange.own_host:
        fields = own_host_fields(headers)
    else:
        fields = shared_origin_fields(status, headers, sandbox=server.entry.sandbox, server=server.name)
    if status in (101, 426) and "upgrade" in headers:
        fields.append(("Upgrade", headers["upgrade"]))
    return fields


class Responses:
    """Receives responses from servers, in P5, and forwards them to their clients."""

    def __init__(self, state: RelayState) -> None:
        self.state = state

    @staticmethod
    async def drain_rust(request: Request) -> bool:
        """Before P7, discard the rest of a P5, if it is in Rust form. Return whether its connection can be reused.

        After an early P7 the server in Rust sends no more of the body, but reuses the connection for its next P5. The
        relay would take the first bytes of that for the body.
        """
        return RUST_FIELD.lower() not in request.headers or await request.body.drain()

    async def receive(self, request: Request, exchange: Exchange) -> Response:
        """Receive a P5, or a part of one; return P7.

        200 when the client has all of it, 410 when no client waits for it, 400 when it is invalid; its client gets 502.
        """
        server = exchange.server
        server.responding += 1
        exchange.has_p5 = True
        try:
            await (self._go_on if exchange.tunnel_body else self._begin)(request, exchange)
            response = text_response(200, "StreamFinished\n", [NO_STORE])
        except ProtocolError as error:
            response = error_response(request, error)
        finally:
            server.responding -= 1
            server.last_seen = self.state.loop.time()
        response.close = response.close or not await self.drain_rust(request)
        return response

    async def _begin(self, request: Request, exchange: Exchange) -> None:
        """Forward a P5 to the client as its response, and wait until the client has it.

        ProtocolError 410 when no client waits for it, 400 when the P5 is invalid; its client gets 502.
        """
        try:
            status, headers, content = await self._read_response(request, exchange)
            part = Part(request, content)
            if part.offset:
                raise ProtocolError(502, "its first bytes are missing")
            if exchange.response.done():
                raise _gone()  # another P5 was first, or the client got 504
            exchange.server.forget(exchange)
            exchange.response.set_result(self._make_response(exchange, status, headers, content, part))
        except (ConnectionError, TimeoutError) as error:
            if "parts" in exchange.server.features:
                exchange.broke_at = self.state.loop.time()  # a proxy may have refused it: wait for it in parts
            else:
                exchange.fail(502, f"the server's response broke off: {format_error(error)}")
            raise
        except ProtocolError as error:
            if error.status == 410:
                raise
            exchange.fail(502, f"the server's response cannot be used: {error.reason}")
            raise ProtocolError(400, error.reason, close=True, headers=[NO_STORE]) from None
        await self._wait_for_client(exchange, part)

    async def _go_on(self, request: Request, exchange: Exchange) -> None:
        """Continue a response with a further or repeated part, and wait until the client has it. ProtocolError 410."""
        body, headers = exchange.tunnel_body, request.headers
        if body is None or not {"ptth-offset", "ptth-more"} & set(headers):
            raise _gone()  # the whole P5 was repeated
        content = request.body
        if content_kind(headers) == "application/http":  # it begins with the response's head
            _, _, content = await self._read_response(request, exchange)
        part = Part(request, content)
        if part.more and content is EMPTY and exchange.has_client_left():
            exchange.break_off("the client has left")
        body.add(part)
        await self._wait_for_client(exchange, part)

    @staticmethod
    async def _wait_for_client(exchange: Exchange, part: Part) -> None:
        """Wait until the client has this part; with the last one, all. ProtocolError 410 when the client is gone."""
        await asyncio.wait({exchange.delivered, part.taken}, return_when=asyncio.FIRST_COMPLETED)
        if not (part.taken if part.taken.done() else exchange.delivered).result():
            raise _gone()

    async def _read_response(self, request: Request, exchange: Exchange) -> tuple[int, Headers, Body]:
        """Read the inner head of P5; return status, fields and body. ProtocolError 502."""
        rust_head, content = request.headers.get(RUST_FIELD.lower()), request.body
        if rust_head is not None:
            # Faults of the server in Rust are forwarded, such as an ETag without quotes, which it wants back in
            # If-None-Match. Its body after 304 is discarded.
            status, headers = unpack_rust_response(rust_head)
            return status, headers, content if has_body(exchange.method, status) else EMPTY
        if content_kind(request.headers) != "application/http":
            raise ProtocolError(502, "the response is not application/http")
        data = b""
        while (end := data.find(b"\r\n\r\n") + 4) < 4:
            piece = await content.read()
            if not piece or len(data) > MAX_INNER_HEAD:
                raise ProtocolError(502, "its head is too large, or has no end")
            data += piece
        content.unread(data[end:])
        return *parse_inner_response(data[:end], exchange.request.upgrade), content

    def _make_response(
        self, exchange: Exchange, status: int, headers: Headers, content: Body, part: Part | None = None
    ) -> Response:
        """Make the client's response from the server's. ProtocolError 502 when its lengths contradict each other."""
        more = part is not None and part.more
        fields = _client_fields(exchange, status, headers)
        if more:
            fields.append(("X-Accel-Buffering", "no"))  # nginx in front forwards each piece at once
        announced, length = parse_framing(headers), None if more else content.length
        if not has_body(exchange.method, status):
            if length:
                raise ProtocolError(502, "a body where none may be")
            return Response(status, fields, AbsentBody(announced), exchange.set_delivered)
        if announced is not None and length not in (None, announced):
            raise ProtocolError(502, "its Content-Length is not the length of its body")
        if part:
            content = self._begin_body(exchange, part, length if announced is None else announced)
        return Response(status, fields, content, exchange.set_delivered)

    def _begin_body(self, exchange: Exchange, part: Part, length: int | None) -> TunnelBody:
        """Begin a response's body, which later parts may continue. ProtocolError 410 for too many without an end."""
        if part.more and length is None:
            exchange.server.add_stream(exchange)
        timeout = FETCH_GRACE if "parts" in exchange.server.features else 0
        exchange.tunnel_body = TunnelBody(part, length, timeout)
        return exchange.tunnel_body

    async def receive_batch(self, request: Request, server: RegisteredServer) -> None:
        """Receive a batch, a P5 with several small responses. Each is sent to its client independently.

        Unknown ids, and those with a response already, are ignored, so a server may send a batch again.
        """
        data = await self._read_batch(request.body, server)
        for request_id, head, content in unpack_responses(data):
            exchange = self.state.exchanges.get(request_id)
            if exchange is None or exchange.server is not server or exchange.response.done():
                continue
            try:
                status, headers = parse_inner_response(head)
                exchange.response.set_result(self._make_response(exchange, status, headers, BytesBody(content)))
            except ProtocolError as problem:
                exchange.fail(502, f"the server's response cannot be used: {problem.reason}")
            server.forget(exchange)

    async def _read_batch(self, body: Body, server: RegisteredServer) -> bytes:
        """Read a batch. ProtocolError 408 after the response timeout, 503 above MAX_BATCHES_BYTES, 502 if too large."""
        if body is EMPTY:
            return b""
        most = MAX_BATCH_BYTES + MAX_INNER_HEAD + SMALL_BODY
        size = most if body.length is None else min(body.length, most)
        if server.batch_bytes + size > MAX_BATCHES_BYTES:
            raise ProtocolError(503, "too many batches at once", close=True, headers=[NO_STORE, ("Retry-After", "1")])
        server.batch_bytes += size
        try:
            async with asyncio.timeout(self.state.config.response_timeout):
                return await body.read_all(most)
        except TimeoutError:
            reason = f"the batch took longer than {self.state.config.response_timeout:.0f} seconds"
            raise ProtocolError(408, reason, close=True, headers=[NO_STORE]) from None
        finally:
            server.batch_bytes -= size


class Relay:
    """Forwards clients' requests to servers. `handle` is its handler, for requests of both."""

    def __init__(self, config: RelayConfig) -> None:
        self.state = RelayState(config)
        self.gate = Gate(self.state)
        self.desk = Desk(self.state, self.gate)
        self.backend = Backend(self.state, self.gate)
        self._inline = 0  # bytes of requests' bodies that are to be sent inside P3
        self._sweeper = self.state.loop.create_task(self._sweep())

    def configure(self, config: RelayConfig) -> None:
        """Apply a new configuration, as `RelayState.configure` does."""
        self.state.configure(config)
        self.gate.configure()

    async def handle(self, request: Request) -> Response:
        """Answer any request to the relay.

        Prefixes and names are compared with the raw target, not decoded and not normalised. So what a proxy in front of
        the relay allows by a prefix means the same here.
        """
        if server := self.state.server_of_host(request.headers.get("host", "")):
            return await self._forward(request, Route(server, request.target))
        target = request.target
        path = target.partition("?")[0]
        if target == "*":
            return Response(204, [("Allow", "GET, HEAD, OPTIONS"), NOSNIFF])
        if path.startswith("/frontend/servers/") and path != "/frontend/servers/":
            segment, slash, rest = target.removeprefix("/frontend/servers/").partition("/")
            name = segment.partition("?")[0]
            server = self.state.find_server(name)
            if not slash or name != segment:
                return text_response(301, "see below\n", [("Location", redirect_below(target))])
            return await self._forward(request, Route(server, f"/{rest}", f"/frontend/servers/{name}"))
        if path.startswith("/scraper/"):
            return await self._scrape(request, target.removeprefix("/scraper/"))
        if path.startswith(BACKEND):
            return await self.backend.handle(request, path.removeprefix(BACKEND))
        return await self.desk.show(request, path)

    async def _forward(self, request: Request, route: Route) -> Response:
        """Forward a client's request to its server; count it, and add it to the audit log.

        A target that leads above the server's prefix gets 404. A proxy in front may have normalised such a path, and
        let it through by its rule for another path, perhaps one without a password.
        """
        server, target = route.server, route.target
        if route.prefix and climbs(target.partition("?")[0]):
            raise ProtocolError(404, "the path leads above the server's own")
        if request.method == "TRACE":
            raise ProtocolError(405, "TRACE is not possible here", headers=[("Allow", "GET, HEAD, OPTIONS")])
        if max_forwards(request) == 0:  # the relay answers as the last recipient
            return Response(204, [("Allow", "GET, HEAD, OPTIONS"), NOSNIFF])
        client = self.state.client_address(request)
        try:
            response = await self._ask(request, route, client)
        except ProtocolError as error:
            response = error_response(request, error)
        set_delivered = response.on_sent

        def sent(complete: bool, size: int) -> None:
            if set_delivered:
                set_delivered(complete, size)
            server.body_bytes += size
            server.statuses[response.status] += 1
            method, path = request.method[:MAX_AUDIT_TEXT], target.partition("?")[0][:MAX_AUDIT_TEXT]
            self.state.audit("request", server.name, client, method, path, response.status, size)

        response.on_sent = sent
        return response

    async def _ask(self, request: Request, route: Route, client: str) -> Response:
        """Offer a request to its server, and wait for the response. ProtocolError 501, 502, 503, 504."""
        server, now = route.server, self.state.loop.time()
        if self.state.stopping:
            raise ProtocolError(503, "the relay is stopping", headers=[("Retry-After", "5")])
        if not server.has_connection and now - (server.last_seen or self.state.started) >= UNAVAILABLE_AFTER:
            hint = "if it is yours, start it with: python3 ptth.py server; otherwise try again later"
            retry = [("Retry-After", "30")]
            raise ProtocolError(503, f"the server {server.name} is not connected to this relay; {hint}", headers=retry)
        inline = b"" if request.body is EMPTY else await self._read_inline(request, server)
        exchange = Exchange(self.state, route, request, inline, outer_address(client))
        server.admit(exchange)
        self.state.exchanges[exchange.request_id] = exchange
        self._inline += exchange.inline_size
        server.offer(exchange)
        try:
            response = await exchange.response
        except BaseException:
            exchange.set_delivered(False)
            await exchange.end_fetch()
            raise
        finally:
            self._inline -= exchange.inline_size
            server.forget(exchange)
        if exchange.has_upload:
            response.body.on_end = exchange.end_fetch
        return response

    async def _read_inline(self, request: Request, server: RegisteredServer) -> bytes | None:
        """Return a request's body if it is small enough for P3; None if the server is to fetch it."""
        body = request.body
        if request.upgrade:
            return b""
        if "body" not in server.features:
            if request.method not in ("GET", "HEAD"):
                raise ProtocolError(501, NO_BODIES, close=True)
            await body.drain()  # the body of a GET has no meaning (RFC 9110, 9.3.1)
            return b""
        size = MAX_INLINE + 1 if body.known_length is None else body.known_length
        if body.expects or size > MAX_INLINE or self._inline + size > MAX_INLINE_TOTAL:
            return None
        return await body.read_all(MAX_INLINE)

    async def _scrape(self, request: Request, path: str) -> Response:
        """Answer the scraper API: the same as the frontend, for programs with a key. ProtocolError 403, 404."""
        version, _, rest = path.partition("/")
        if not self.state.config.enable_scraper_api or version not in ("v1", "api"):
            raise ProtocolError(404, "not found")
        if not await self.gate.is_scraper(request):
            raise ProtocolError(403, "this needs a valid X-ApiKey", headers=[NO_STORE])
        what = rest.partition("?")[0]
        if not what.startswith("server/"):
            return self.desk.show_scraper(request, what)
        name, slash, below = rest.removeprefix("server/").partition("/")
        if not slash or "?" in name:
            raise ProtocolError(404, "not found")
        server = self.state.find_server(name)
        return await self._forward(request, Route(server, f"/{below}", f"/scraper/{version}/server/{name}"))

    async def _sweep(self) -> NoReturn:
        """Every SWEEP_INTERVAL, for ever, end requests and P1 that have waited for too long."""
        turns = itertools.count()
        while True:
            await asyncio.sleep(SWEEP_INTERVAL)
            now = self.state.loop.time()
            for server in share_of_turn(self.state.servers.values(), next(turns)):
                self._sweep_server(server, now)
            for exchange in self.state.exchanges.values():
                exchange.check_fetch()
                if exchange.is_late(now, self.state.config.response_timeout):
                    exchange.fail(504, f"the server {exchange.server.name} did not answer in time")
                elif exchange.broke_at and now - exchange.broke_at > FETCH_GRACE:
                    why = "the connection to the server broke"
                    exchange.fail_with(ProtocolError(502, why, close=exchange.was_fetched))

    def _sweep_server(self, server: RegisteredServer, now: float) -> None:
        """End P1 whose time is over or whose connection is at eof; answer 503 if the server stays disconnected."""
        was_connected = server.has_connection
        server.answer_empty(lambda parked: parked.is_stale() or now >= parked.until)
        server.forget_instances(now)
        if server.has_connection or server.last_seen is None and not server.waiting:
            return
        if was_connected:  # its last P1 has just ended
            server.last_seen = now
        absent_since = server.last_seen or self.state.started
        if server.connected and now - absent_since >= DISCONNECTED_AFTER:
            server.connected = False
            log_line(f"ptth relay: {server.name} is disconnected")
            self.state.audit("disconnected", server.name)
        for exchange in list(server.waiting.values()):
            if now - max(exchange.waits_since, absent_since) >= RECONNECT_WAIT:
                exchange.fail(503, f"the server {server.name} is not connected")

    async def drain(self) -> None:
        """Let the health check fail. If a balancer checks it, wait DRAIN_TIME: then no more clients come."""
        self.state.draining = True
        if len(self.state.checks) == 3 and self.state.loop.time() - self.state.checks[0] < MAX_CHECK_AGE:
            await asyncio.sleep(DRAIN_TIME)

    async def stop(self, grace: float = GRACE_PERIOD) -> None:
        """Answer new requests with 503, and wait up to `grace` seconds for the responses to those in flight."""
        state = self.state
        state.stopping = True
        for server in state.servers.values():
            server.answer_empty()
        try:
            async with asyncio.timeout(grace):
                # A stream has no end to wait for.
                while any(one.takes_p5() and not one.is_stream for one in state.exchanges.values()):
                    await asyncio.sleep(0.02)
        except TimeoutError:
            for exchange in state.exchanges.values():
                exchange.fail(503, "the relay is stopping")
        for exchange in list(state.exchanges.values()):
            if exchange.tunnel_body:
                exchange.break_off("the relay is stopping")
        self._sweeper.cancel()


# -- 16. Server --
# P1, P4 and P5: gets requests from a relay, calls a handler, sends its responses. Does not use clients' connections.


class KeyRefused(Refused):
    """The relay does not know this name with this key."""


_NO_REQUEST = Request("GET", "-", Headers())  # in place of a request that is unknown or cannot be parsed


class Workers:
    """Calls a handler for the requests from all relays of a server. `group` has all tasks of the server."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.group: asyncio.TaskGroup | None = None  # while the server runs
        self.stopping = asyncio.Event()
        self.room = asyncio.Event()  # clear while MAX_HANDLERS requests are here, or as many responses wait for a batch
        self.room.set()
        self.request_ids: dict[str, Sender] = {}  # ids of all requests without a response, and who will send it
        self.sending: Counter[str] = Counter()  # large responses that are being sent, by the client's address
        self.most_sending = raise_file_limit() // 4  # at once: each takes two descriptors, all half of the limit
        self._queue: deque[tuple[str, Request | ProtocolError, Sender]] = deque()
        self._count = 0  # number of workers, the tasks that handle what is queued
        self._batched = 0  # small responses that wait for their batch

    def spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None] | None:
        """Run `work` as a task. An exception in it ends the server. Returns None if the server is ending."""
        try:
            assert self.group
            return self.group.create_task(work)
        except RuntimeError:
            work.close()
            return None

    def add(self, request_id: str, request: Request | ProtocolError, sender: Sender) -> None:
        """Queue a request for `start`. One that is queued or handled already is ignored."""
        if request_id in self.request_ids:
            return
        self.request_ids[request_id] = sender
        self._queue.append((request_id, request, sender))

    def start(self) -> None:
        """Start a worker for the queued requests. If some are left one turn of the loop later, start another.

        All workers wait then. So fast handlers need one task, and a slow one delays no other request.
        """
        self._look_for_room()
        if self._queue and self._count < MAX_HANDLERS:
            self._count += 1
            self.spawn(self._work())
            asyncio.get_running_loop().call_soon(self.start)

    def _look_for_room(self) -> None:
        """Set or clear `room`, on which each link waits before it polls again."""
        if len(self._queue) + self._count < MAX_HANDLERS and self._batched < MAX_HANDLERS:
            self.room.set()
        else:
            self.room.clear()

    async def _work(self) -> None:
        """Handle queued requests, one after the other, until there are none."""
        try:
            while self._queue:
                await self._handle(*self._queue.popleft())
                self._look_for_room()
        finally:
            self._count -= 1
            self._look_for_room()

    async def _run_handler(self, request: Request) -> Response:
        """Return the handler's response. ProtocolError 504 for its TimeoutError, 502 for its IncompleteBody.

        RuntimeError if something in the handler has cancelled it: that does not end the server.
        """
        try:
            response = await self.handler(request)
            assert isinstance(response, Response), f"the handler returned {response!r}"
            return response
        except TimeoutError:
            raise ProtocolError(504, "the server did not answer in time") from None
        except IncompleteBody as error:
            raise ProtocolError(502, f"the response broke off: {format_error(error)}") from None
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task and task.cancelling():
                raise
            raise RuntimeError("the handler was cancelled by its own work") from error

    async def _handle(self, request_id: str, request: Request | ProtocolError, sender: Sender) -> None:
        """Call the handler for one request, and start to send its response, without waiting for a slow client."""
        try:
            if isinstance(request, ProtocolError):
                response = error_response(_NO_REQUEST, request)
                request = _NO_REQUEST
            else:
                response = await call_handler(self._run_handler, request)
            address = ""
            if not sender.can_batch(response):
                address = outer_address(request.headers.get("x-forwarded-for", ""))
                if not self._may_send(address):
                    await response.body.aclose()
                    busy = ProtocolError(503, "too many responses are being sent", headers=[("Retry-After", "5")])
                    response = error_response(request, busy)
            if sender.can_batch(response):
                self._batched += 1
                sender.batch(request_id, response, request.method)
            else:
                self.sending[address] += 1
                self.spawn(self._send(request_id, response, request.method, sender, address))
        except Exception:
            log_fault()
            self.done(request_id)

    def _may_send(self, address: str) -> bool:
        """Return whether another large response may be sent. One client address may have half of the places."""
        places = self.most_sending
        return self.sending.total() < places and not (address and self.sending[address] >= places // 2)

    async def _send(self, request_id: str, response: Response, method: str, sender: Sender, address: str) -> None:
        """Send one large response."""
        try:
            await sender.send(request_id, response, method)
        except Exception:  # an error in a body: its response is incomplete, the server continues
            log_fault()
        finally:
            self.sending -= Counter((address,))
            self.done(request_id)

    def ids_from(self, sender: Sender) -> list[str]:
        """Return the ids of the newest requests from the sender's relay without a response, MAX_LOST at most."""
        found = (key for key, value in reversed(self.request_ids.items()) if value is sender)
        return list(itertools.islice(found, MAX_LOST))

    def done(self, *request_ids: str) -> None:
        """Record that responses to these requests were sent."""
        for request_id in request_ids:
            self.request_ids.pop(request_id, None)

    def batch_taken(self, count: int) -> None:
        """Record that `count` small responses no longer wait for a batch."""
        self._batched -= count
        self._look_for_room()


class PartReader:
    """Cuts a body into parts. `ended` becomes true with the last one, and when `stopping` is set."""

    def __init__(self, body: Body, stopping: asyncio.Event) -> None:
        self.offset = 0  # bytes before the next part
        self.ended = False
        self._body = body
        self._length = body.length  # at the beginning: while a body is received, its `length` becomes smaller
        self._pieces = aiter(body)  # some may be empty
        self._size = 0  # bytes of the last part
        self._held = b""  # bytes that were read, and are in no part yet
        self._stop: asyncio.Task[Any] = asyncio.create_task(stopping.wait())
        self._reading: asyncio.Task[bytes | None] | None = None

    async def next(self, size: int) -> Body:
        """Return at most `size` bytes as a body; an empty one after PART_INTERVAL without data, or at the end."""
        self.offset += self._size
        part = self._body.part(self.offset, size)
        if part is None:
            if not self._held:
                self._held = await self._read()
            part = BytesBody(self._held[:size])
            self._held = self._held[size:]
        self._size = part.length or 0
        self.ended = self.ended or self._length is not None and self.offset + self._size >= self._length
        return part

    def put_back(self, part: Body) -> None:
        """Take the last part back, so that it is sent again in smaller ones."""
        self._size, self.ended = 0, False
        self._held = (part.data or b"") + self._held  # a file's part has no data: `Body.part` reads it again

    async def _read(self) -> bytes:
        """Return bytes that have arrived, b"" after PART_INTERVAL without any."""
        reading = self._reading = self._reading or asyncio.ensure_future(anext(self._pieces, None))
        await asyncio.wait({reading, self._stop}, timeout=PART_INTERVAL, return_when=asyncio.FIRST_COMPLETED)
        if self._stop.done() or not reading.done():
            self.ended = self._stop.done()
            return b""
        self._reading = None
        self.ended = reading.result() is None
        return reading.result() or b""

    async def aclose(self) -> None:
        """End the reading of the body, which the caller closes."""
        await end_task(self._stop)
        await end_task(self._reading)


_POST = f": responses are sent by POST, so that must be allowed below {BACKEND}"
_REFUSALS = {  # status of an answer to P5: what to do about it
    401: ": it no longer knows the key",
    403: _POST,
    405: _POST,
    408: ": its time limit for requests is too short",
    411: ": it must take requests with Transfer-Encoding: chunked",
    413: ": its limit for request bodies is small, so responses are sent in parts (nginx: client_max_body_size 0;)",
    501: _POST,
    504: ": its time limit for responses is too short (nginx: proxy_read_timeout 3600s;)",
}


Batch = Sequence[tuple[str, bytes]]  # small responses that are sent together: the id and the packed form of each


def batch_body(batch: Batch) -> Body:
    """Return the body of a POST with these responses."""
    return BytesBody(b"".join([packed for _, packed in batch]))


class Sender:
    """Sends responses to one relay: P5 and P7."""

    def __init__(self, client: HTTPClient, name: str, key: str, workers: Workers, log: Callable[[str], None]) -> None:
        self.client = client
        self.name = name
        # These three are kept up to date by `Link`.
        self.rust_relay = False  # the relay uses the Rust form
        self.features: set[str] = set()  # of the relay
        self.near = True  # the round trip to the relay is shorter than NEAR_ROUND_TRIP
        self._part_size = 0  # bytes of a POST that the proxy in front of the relay probably accepts; 0: no limit known
        self._passed = 0  # bytes of the largest POST that was accepted
        self._key = key
        self._workers = workers
        self._log_change = log
        self.lost: deque[str] = deque(maxlen=MAX_WAITING)  # ids of responses that did not reach it; `Link` takes them
        self.on_loss: Callable[[], object] = int  # called when `lost` has grown; int does nothing
        self.unsent: deque[tuple[str, bytes]] = deque()  # small responses, for the next `Batch`
        self._sending = 0  # batches in flight

    def can_batch(self, response: Response) -> bool:
        """Return whether a response is small enough to be sent in a batch.

        A relay forwards a batch when it has all of it. From afar that takes long, so that a larger body goes alone, as
        does one that a proxy accepts only in parts.
        """
        data, most = response.body.data, SMALL_BODY if self.near else MAX_BATCHED_BODY
        if data is None or len(data) > most or self.client.limiter or self.rust_relay:
            return False
        return not self._part_size or len(data) + MAX_INNER_HEAD <= self._part_size

    def batch(self, request_id: str, response: Response, method: str) -> None:
        """Queue a small response. The next batch has those of this turn of the loop, or since the last batch began."""
        body = response.body.data or b"" if has_body(method, response.status) else b""
        try:
            self.unsent.append((request_id, pack_batched(request_id, response, body)))
        except ProtocolError as error:  # a field that cannot be sent
            self.batch(request_id, error_response(_NO_REQUEST, error), method)
            return
        if len(self.unsent) == 1:
            asyncio.get_running_loop().call_soon(self._start)  # a poll that is sent before that takes the batch

    def _start(self, *, full: bool = False) -> None:
        """Start to post batches, unless enough are in flight. To a near relay that is one, if the last was not full."""
        if self.unsent and self._sending < (MAX_BATCHES if full or not self.near else 1):
            self._sending += 1
            self._workers.spawn(self._send_batches())

    async def _send_batches(self) -> None:
        """Post batches until no responses are queued."""
        try:
            while batch := self.take_batch():
                self._start(full=True)
                await self.send_batch(batch)
        finally:
            self._sending -= 1

    def take_batch(self) -> Batch:
        """Remove small responses from the queue, as many as the relay, and a proxy, read at once, and return them."""
        batch: list[tuple[str, bytes]] = []
        left = min(self._part_size or MAX_RESPONSES_BYTES, MAX_RESPONSES_BYTES)
        while self.unsent and (not batch or len(self.unsent[0][1]) <= left):
            batch.append(self.unsent.popleft())
            left -= len(batch[-1][1])
        self._workers.batch_taken(len(batch))
        return batch

    async def send_batch(self, batch: Batch) -> None:
        """Post a batch. It is sent again after an error: a relay ignores responses that it has already."""
        try:
            status, headers = await self._post_batch(batch)
        except (OSError, ProtocolError) as error:
            self._log_change(f"sending a response to the relay failed: {format_error(error)}")
            self._end_batch(batch, lost=True)
        else:
            self.settle(batch, status, headers)

    async def _post_batch(self, batch: Batch) -> tuple[int, Headers]:
        """Post a batch; return status and fields of the answer."""
        fields = [("X-ApiKey", self._key), ("Content-Type", RESPONSE_TYPE)]
        return await self.client.post(f"{BACKEND}http_responses/{self.name}", fields, batch_body(batch))

    def settle(self, batch: Batch, status: int, headers: Headers) -> None:
        """Handle the answer to a batch. After 413 its responses are queued again, for smaller batches."""
        size = sum(len(packed) for _, packed in batch)
        through = self._got_through(status, headers, size)
        if status == 413 and "parts" in self.features and self._shrink_parts(size) and len(batch) > 1:
            self.unsent.extendleft(reversed(batch))
            self._workers.batch_taken(-len(batch))
            asyncio.get_running_loop().call_soon(self._start)
        else:
            self._end_batch(batch, lost=not through)

    def _end_batch(self, batch: Batch, *, lost: bool) -> None:
        """Record that a batch was sent, or that it is lost."""
        request_ids = [request_id for request_id, _ in batch]
        if lost:
            self._lose(*request_ids)
        self._workers.done(*request_ids)

    async def send(self, request_id: str, response: Response, method: str) -> None:
        """P5 and P7: send a response to the relay, and close its body."""
        body = response.body
        try:
            if self.rust_relay:
                head, kind = b"", (RUST_FIELD, pack_rust_response(response))
            else:
                head, kind = pack_response_head(response), ("Content-Type", RESPONSE_TYPE)
        except ProtocolError as error:  # a field that cannot be sent
            await body.aclose()
            await self.send(request_id, error_response(_NO_REQUEST, error), method)
            return
        try:
            sent = body if has_body(method, response.status) else EMPTY
            in_parts = "parts" in self.features and (self._is_too_large(sent) or sent is body and is_stream(response))
            if in_parts or await self._post(request_id, JoinedBody(BytesBody(head), sent), kind):
                await self._send_parts(request_id, head, response)
        finally:
            await body.aclose()

    def _is_too_large(self, body: Body) -> bool:
        """Return whether a proxy in front of the relay would probably refuse the whole response in one POST."""
        return bool(self._part_size) and (body.length is None or body.length > self._part_size)

    async def _send_parts(self, request_id: str, head: bytes, response: Response) -> None:
        """Post a response in parts: data as soon as it arrives, and an empty part after PART_INTERVAL without any.

        The first part is the head alone, so that the client gets it at once.
        """
        delivered = False
        # A stop does not wait for WebSockets and event streams.
        parts = PartReader(response.body, self._workers.stopping if is_endless(response) else asyncio.Event())
        try:
            status = await self._post_part(request_id, BytesBody(head), RESPONSE_TYPE, 0, more=True)
            while status != 410 and not parts.ended:
                part = await parts.next(self._part_size or READ_SIZE)
                kind, more = "application/octet-stream", not parts.ended
                status = await self._post_part(request_id, part, kind, parts.offset, more=more)
                if status == 413 and self._shrink_parts(part.length):
                    parts.put_back(part)
                elif status == 413:
                    raise ConnectionError(f"the relay, or a proxy in front of it, does not take {part.length} bytes")
            delivered = True
        except (OSError, ProtocolError) as error:
            self._log_change(f"sending a response to the relay failed; the response is cut off: {format_error(error)}")
        finally:
            await parts.aclose()
            if not delivered:
                self._lose(request_id)

    def _shrink_parts(self, size: int | None) -> bool:
        """Make parts smaller, after a proxy has refused `size` bytes (413). Return whether that is possible."""
        size = size or 2 * READ_SIZE  # a guess, if the body has no length
        self._part_size = min(self._part_size or size, max(size // 2, MIN_PART))
        return size > self._part_size

    async def _post_part(self, request_id: str, content: Body, kind: str, offset: int, *, more: bool) -> int:
        """Post one part, at most PART_TRIES times; return 200, 410 or 413. ConnectionError if all fail."""
        fields = [("X-ApiKey", self._key), ("Content-Type", kind), ("PTTH-Offset", str(offset))]
        fields += [("PTTH-More", "1")] if more else []
        why = ""
        for attempt in range(PART_TRIES):
            await asyncio.sleep(min(BACKOFF_MIN * 2**attempt, BACKOFF_MAX) if attempt else 0)
            try:
                status, _ = await self.client.post(f"{BACKEND}http_response/{request_id}", fields, content)
            except IncompleteBody:
                raise  # the part itself, such as a file that changed
            except (OSError, ProtocolError) as error:
                why = format_error(error)
                continue
            if status in (200, 410, 413):
                return status
            why = f"{status}{_REFUSALS.get(status, '')}"
            if status < 500 and status != 408:
                break
        raise ConnectionError(f"a part of the response was refused: {why}")

    async def _post(self, request_id: str, body: Body, kind: tuple[str, str]) -> bool:
        """Post a response. If that fails, PTTH-Lost of the next P1 has its id.

        A body in memory is sent again after an error: a relay ignores a response that it has already. Returns True if a
        proxy refused the size and the body can be sent in parts.
        """
        divisible, lost = "parts" in self.features, True
        # Ask first if the body can be read only once, and is larger than all that were accepted.
        asks = divisible and not body.replayable and (body.length or 0) > max(self._passed, READ_SIZE)
        fields = [("X-ApiKey", self._key), kind, *([("Expect", "100-continue")] if asks else [])]
        try:
            status, headers = await self.client.post(f"{BACKEND}http_response/{request_id}", fields, body)
            lost = not self._got_through(status, headers, body.length or 0)
            if status == 413 and divisible and (body.replayable or not body.begun):
                lost = not self._shrink_parts(body.length)
                return not lost
        except (OSError, ProtocolError) as error:
            self._log_change(f"sending a response to the relay failed: {format_error(error)}")
        finally:
            if lost:
                self._lose(request_id)
        return False

    def _lose(self, *request_ids: str) -> None:
        """Add ids of responses that did not reach the relay, and report them. One in Rust cannot be told."""
        if not self.rust_relay:
            self.lost.extend(request_ids)
            self.on_loss()

    def _got_through(self, status: int, headers: Headers, size: int) -> bool:
        """Return whether the relay has accepted `size` bytes; if not, log the status and what to do."""
        if status in (200, 410) or self.rust_relay and status == 400:  # from Rust, 400 means that the client is gone
            self._passed = max(self._passed, size)
            return True
        who = headers.get("server", "the relay, or a proxy in front of it")[:60]
        self._log_change(f"{who} answered {status} to a response{_REFUSALS.get(status, '')}")
        return False

    async def probe(self) -> float:
        """Post an empty batch, to check that POST is allowed; return the seconds that it took."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with asyncio.timeout(P1_TIMEOUT):
            status, headers = await self._post_batch([])
        self._got_through(status, headers, 0)
        return loop.time() - began


class FetchedBody(Body):
    """The body of a request. It is fetched from the relay when it is read, which is possible once."""

    complete = False

    def __init__(self, client: HTTPClient, key: str, request_id: str, length: int | None = None) -> None:
        self._client = client
        headers = Headers([("X-ApiKey", key), ("Accept", "*/*"), *([FRAMING] if length is None else [])])
        self._request = Request("GET", f"{BACKEND}http_request/{request_id}", headers)
        self.length = length

    @contextlib.asynccontextmanager
    async def _fetched(self) -> AsyncIterator[tuple[Body, bool]]:
        """Request the body from the relay; also return whether it is in chunks inside the response.

        IncompleteBody if the relay no longer has it, or cannot be reached.
        """
        try:
            response = await self._client.handle(self._request, timeout=P1_TIMEOUT)
        except OSError as error:
            raise IncompleteBody(format_error(error)) from None
        async with contextlib.aclosing(response.body) as body:
            if response.status != 200 or body.length != self.length:
                raise IncompleteBody(f"the relay answers {response.status} to a request for a body")
            yield body, FRAMING[0].lower() in Headers(response.headers)
            self.complete = True

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async with self._fetched() as (body, chunked):
            async for piece in inner_chunks(body) if chunked else body:
                yield piece

    async def write_to(self, sink: Sink) -> None:
        if self.length is None:
            await super().write_to(sink)
            return
        async with self._fetched() as (body, _):
            await body.write_to(sink)


class PolledBody(FetchedBody):
    """The bytes that a client sends after a 101, fetched from the relay by polls."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        offset = failures = 0
        while failures < PART_TRIES:
            await asyncio.sleep(min(BACKOFF_MIN * 2**failures, BACKOFF_MAX) if failures else 0)
            try:
                status, data = await self._poll(offset)
            except (OSError, ProtocolError):
                status, data = 0, b""
            if status == 410:
                return
            offset += len(data)
            failures = 0 if status in (200, 204) else failures + 1
            if data:
                yield data
        raise IncompleteBody("the relay cannot be asked for what the client sends")

    async def _poll(self, offset: int) -> tuple[int, bytes]:
        """Poll for the bytes after the first `offset` ones; return the response's status and content."""
        fields = [("PTTH-Offset", str(offset)), ("Prefer", f"wait={POLL_WAIT:.0f}"), *self._request.headers.pairs]
        response = await self._client.handle(replace(self._request, headers=Headers(fields)), timeout=P1_TIMEOUT)
        async with contextlib.aclosing(response.body) as body:
            return response.status, await body.read_all(4 * READ_SIZE) if response.status == 200 else b""


def backoff() -> Iterator[float]:
    """Return the pauses before further attempts to reach a relay, in seconds; the first is short.

    They are random, so that thousands of servers do not reconnect to a restarted relay in the same second.
    """
    import random

    limit = BACKOFF_MIN
    while True:
        yield random.uniform(0.1, 1) * limit
        limit = min(limit * 4, BACKOFF_MAX)


class Link:
    """Connects to one relay, and polls it for requests by P1.

    The first P1 after connecting, the hello, does not wait: it shows whether the relay knows the key. Responses of fast
    handlers are sent together with the next P1, in one request instead of two.
    """

    def __init__(self, client: HTTPClient, name: str, key: str, workers: Workers, label: str = "") -> None:
        self.client = client
        self.name = name
        self.label = label  # the beginning of each log line, if there are several relays
        self.connected = asyncio.Event()
        self.on_change: Callable[[], object] = int  # called when `connected` has changed; int does nothing
        self._key = key
        self._instance = os.urandom(8).hex()  # tells this server from others of the same name
        self._workers = workers
        self._spawn = workers.spawn
        self._stopping = workers.stopping
        self._parked: set[Connection] = set()  # connections of P1 without an answer yet
        self._last_logged = ""
        self._host = ""  # this server's own host at the relay, if any
        self._reporting: asyncio.Task[None] | None = None  # sends the lost ids
        self._sender = Sender(client, name, key, workers, self._log_change)
        self._sender.on_loss = self._report

    async def run(self) -> None:
        """Stay connected, until the stop cancels this. After a failure try again, at first after BACKOFF_MIN."""
        loop = asyncio.get_running_loop()
        pauses = backoff()
        while not self._stopping.is_set():
            try:
                took = await self._connect()
                began = loop.time()
                error = await self._poll_until_failure(took)
                if loop.time() - began > BACKOFF_MAX:  # the connection worked for some time
                    pauses = backoff()
                raise error
            except KeyRefused:
                self._log_change(registration_needed(self.name, self._key))
                pause = REFUSED_DELAY
            except Refused as error:
                self._log_change(f"{error}; retrying every {REFUSED_DELAY:.0f} seconds")
                pause = REFUSED_DELAY
            except (OSError, ProtocolError) as error:
                host = self.client.origin.authority
                self._log_change(f"cannot reach the relay at {host}: {format_error(error)}; retrying")
                pause = next(pauses)
            self.connected.clear()
            self.on_change()
            await asyncio.sleep(pause)

    def leave(self) -> None:
        """End the open P1 by a half-close: the relay sends no more requests, and a P3 in flight still arrives."""
        for connection in list(self._parked):
            connection.must_close = True
            if connection.writer.can_write_eof():
                connection.writer.write_eof()
                # A proxy on the way may not forward a half-close.
                asyncio.get_running_loop().call_later(LINGER_TIMEOUT, connection.abort)
            else:
                connection.abort()

    def _log_change(self, line: str) -> None:
        """Log a line, unless it is the same as the last one."""
        if line != self._last_logged:
            self._last_logged = line
            for part in f"ptth server: {self.label}{line}".split("\n"):
                log_line(part)

    # P1

    async def _connect(self) -> float:
        """Connect, and send the hello. Return the seconds that the hello took."""
        loop = asyncio.get_running_loop()
        connection = await self.client.connect()
        started = loop.time()
        await self._poll(connection, 0)
        took = loop.time() - started
        origin = self.client.origin
        url = f"{origin.url}/frontend/servers/{self.name}/"
        if self._host:
            url = origin._replace(host=self._host, path="").url + "/"
        self._log_change(f"connected to the relay at {origin.authority} as {self.name}; open {url}")
        self.connected.set()
        self.on_change()
        return took

    async def _poll_until_failure(self, took: float) -> Exception:
        """Keep P1 open until one fails; return its error. `took`: the seconds that the hello took."""
        failure: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        self._sender.near = True
        self._spawn(self._listen(failure))
        self._set_distance(took, failure)
        measuring = None if self._sender.rust_relay else self._spawn(self._measure(took, failure))
        try:
            return await failure
        finally:
            await end_task(measuring)

    async def _measure(self, took: float, failure: asyncio.Future[Exception]) -> None:
        """Measure the round trip, and check that POST is allowed; again every MEASURE_INTERVAL.

        The shortest of several round trips counts, because one may be slow by chance. `took` is the first.
        """
        samples = 1 if took < NEAR_ROUND_TRIP else SAMPLES
        for _ in range(3):  # turns of the loop, so that fast responses to the requests of the hello go first
            await asyncio.sleep(0)
        while True:
            try:
                for _ in range(samples):
                    took = min(took, await self._sender.probe())
            except (OSError, ProtocolError) as error:
                self._log_change(f"cannot post to {self.client.origin.authority}: {format_error(error)}")
            if took < math.inf:
                self._set_distance(took, failure)
            await asyncio.sleep(MEASURE_INTERVAL)
            took, samples = math.inf, SAMPLES

    def _set_distance(self, round_trip: float, failure: asyncio.Future[Exception]) -> None:
        """Poll a near relay with one P1, a far one with FAR_P1. A relay in Rust allows only one."""
        was_near, self._sender.near = self._sender.near, round_trip < NEAR_ROUND_TRIP or self._sender.rust_relay
        if was_near and not self._sender.near:
            for _ in range(FAR_P1 - 1):
                self._spawn(self._listen(failure, only_if_far=True))

    def _report(self) -> None:
        """Send a P1 with PTTH-Lost at once, because the open ones were sent before the loss."""
        if self.connected.is_set() and (self._reporting is None or self._reporting.done()):
            self._reporting = self._spawn(self._report_losses())

    async def _report_losses(self) -> None:
        """Send P1 until all lost ids were sent. After a failure the next hello sends them."""
        with contextlib.suppress(OSError, ProtocolError):
            while self._sender.lost and not self._stopping.is_set():
                await self._poll_again(wait=1)

    async def _listen(self, failure: asyncio.Future[Exception], *, only_if_far: bool = False) -> None:
        """Poll the relay until a poll fails, the server stops, or, with `only_if_far`, the relay is near."""
        loop = asyncio.get_running_loop()
        try:
            brought = False
            while not (failure.done() or self._stopping.is_set() or only_if_far and self._sender.near):
                started = loop.time()
                brought = await self._poll_again(brought=brought)
                if not brought and loop.time() - started < 1 and not self._stopping.is_set():
                    raise ConnectionError("the relay, or its proxy, answers polls at once and with nothing")
                await self._workers.room.wait()
                await asyncio.sleep(0)  # fast handlers respond in this turn, so that the next P1 has a batch
        except (OSError, ProtocolError) as error:
            if not failure.done():
                failure.set_result(error)

    async def _poll_again(self, *, brought: bool = False, wait: float = POLL_WAIT) -> bool:
        """Send a P1 on an idle connection, on a new one if there is none or the relay has closed it.

        `brought`: the last P1 has brought requests, so that there may be a batch to send with this one.
        """
        both = brought and "listen" in self._sender.features and bool(self._sender.unsent)
        # Leave the connection of a P3 for its responses: it works, and a new one would cost a round trip.
        free = both or len(self.client.idle) > brought
        connection = self.client.take_idle(oldest=not both) if free else None
        if connection is not None:
            try:
                return await self._poll(connection, wait, self._sender.take_batch() if both else ())
            except ConnectionError:
                if self._stopping.is_set():
                    return False
        return await self._poll(await self.client.connect(), wait)

    def _make_p1(self, wait: float, lost: list[str], batch: Batch) -> Request:
        """Make a P1 with the `lost` ids. One with a `batch` of responses is a P5, too."""
        fields = [("X-ApiKey", self._key), ("Accept", "application/http"), ("Prefer", f"wait={wait:.0f}")]
        fields += [("PTTH-Instance", self._instance), FEATURES]
        if lost:
            fields.append(("PTTH-Lost", ", ".join(lost)))
        at_work = [] if wait else self._workers.ids_from(self._sender)  # a hello, perhaps after a lost connection
        if at_work:
            fields.append(("PTTH-At-Work", ", ".join(at_work)))
        if not batch:
            return Request("GET", f"{BACKEND}http_listen/{self.name}", Headers(fields))
        fields.append(("Content-Type", RESPONSE_TYPE))
        return Request("POST", f"{BACKEND}http_responses/{self.name}", Headers(fields), body=batch_body(batch))

    async def _poll(self, connection: Connection, wait: float, batch: Batch = ()) -> bool:
        """Send a P1, and queue the requests of its P3. Return whether there were any.

        A `batch` of responses is sent with the P1; if that fails, it is sent again without one.
        """
        if self._stopping.is_set():
            connection.close()
            return False
        lost = [self._sender.lost.popleft() for _ in range(min(len(self._sender.lost), MAX_LOST))]
        self._parked.add(connection)
        try:
            response = await self.client.exchange(connection, self._make_p1(wait, lost, batch), P1_TIMEOUT)
            headers = Headers(response.headers)
            async with contextlib.aclosing(response.body):
                if batch:
                    self._sender.settle(batch, response.status, headers)
                    batch = ()
                    if not is_p3(response.status, headers):
                        self._sender.lost.extend(lost)
                        # 200 without a P3 is from an older relay or one that stops: polls may end.
                        return response.status != 200
                self._sender.rust_relay = check_p3(response.status, headers, self.client)
                limit = MAX_RUST if self._sender.rust_relay else MAX_BATCH_BYTES + MAX_INNER_HEAD + MAX_INLINE
                body = await response.body.read_all(limit)
            self._host = headers.get("ptth-host", "")
            self._sender.features = set(headers.tokens("ptth-features"))
            self.accept(body)
        except BaseException:
            self._sender.lost.extend(lost)
            if batch:
                self._spawn(self._sender.send_batch(batch))
            raise
        finally:
            self._parked.discard(connection)
        return bool(body)

    def _fetch(self, request_id: str, framing: int | None) -> Body:
        """Make the body of a request that is not in the P3: it is fetched, or polled for after a 101."""
        if framing is None:
            return PolledBody(self.client, self._key, request_id)
        return FetchedBody(self.client, self._key, request_id, None if framing == CHUNKED else framing)

    def accept(self, data: bytes) -> None:
        """Queue the requests of a P3."""
        rust = self._sender.rust_relay and data  # an empty P3 has no form
        try:
            for request_id, request in unpack_rust_requests(data) if rust else unpack_requests(data, self._fetch):
                if request_id in self._sender.lost:  # offered again before PTTH-Lost was sent: handle it again
                    self._sender.lost.remove(request_id)
                self._workers.add(request_id, request, self._sender)
        finally:
            self._workers.start()


class TunnelServer:
    """Serves a handler through one or several relays, from `run` until `stop`.

    `connected` is set while it is connected to any of them.
    """

    def __init__(self, client: HTTPClient, name: str, key: str, handler: Handler, *others: HTTPClient) -> None:
        self.workers = Workers(handler)
        self.links = [
            Link(one, name, key, self.workers, f"{one.origin.url}: " if others else "") for one in (client, *others)
        ]
        self.connected = asyncio.Event()
        for link in self.links:
            link.on_change = self._note_change
        self._connecting: list[asyncio.Task[None]] = []  # a task for each link
        self._limit: asyncio.Timeout | None = None  # while `run` runs
        self._ended = asyncio.Event()

    async def run(self) -> None:
        """Serve until `stop`. An unexpected error or a cancellation ends all tasks at once."""
        try:
            async with asyncio.timeout(None) as self._limit, asyncio.TaskGroup() as self.workers.group:
                self._connecting = [self.workers.group.create_task(link.run()) for link in self.links]
        except TimeoutError:
            pass  # requests in flight have had their time
        finally:
            for link in self.links:
                link.client.close()
            self._limit = None
            self._ended.set()

    def _note_change(self) -> None:
        """Set or clear `connected`."""
        if any(link.connected.is_set() for link in self.links):
            self.connected.set()
        else:
            self.connected.clear()

    async def stop(self, grace: float = GRACE_PERIOD) -> None:
        """Stop polling, wait up to `grace` seconds for requests in flight, and end `run`."""
        self.workers.stopping.set()
        for task in self._connecting:
            task.cancel()
        for link in self.links:
            link.leave()
        if self._limit:
            self._limit.reschedule(asyncio.get_running_loop().time() + grace)
            await self._ended.wait()


def is_p3(status: int, headers: Headers) -> bool:
    """Return whether this is a P3 from a relay of this program, not from one in Rust."""
    return status == 200 and content_kind(headers) == "application/http"


def check_p3(status: int, headers: Headers, client: HTTPClient) -> bool:
    """Return whether this P3 is in Rust form. KeyRefused, Refused or ConnectionError if it is no P3."""
    if status == 200 and headers.get("content-encoding", "identity").lower() != "identity":
        raise Refused(f"a proxy in front of the relay compresses its answers: switch that off for {BACKEND}")
    if is_p3(status, headers):
        return False
    if status == 204 or status == 200 and not headers.get("content-type"):
        return True
    raise _refusal_of_p1(status, headers, client)


_NO_RELAY = {  # status of an answer to P1 that is not from a relay: what to do about it
    400: "if this port is for TLS, relay_url must begin with https://",
    401: f"it asks for a login; let {BACKEND} pass without one, since servers show their keys there",
    403: f"the proxy in front of the relay, or a firewall, forbids {BACKEND}; allow it there",
    404: f"relay_url must be the relay's URL without /frontend/, and the proxy in front must pass {BACKEND} on",
    407: "this network requires a proxy: set proxy_url, or HTTPS_PROXY in the environment",
    429: f"the proxy in front of the relay limits requests; exclude {BACKEND} from that limit",
    511: "log in to this network in a browser first",
}


def _asks_for_key(headers: Headers) -> bool:
    """Return whether a 401 comes from the relay, and not from a proxy in front of it."""
    challenge = headers.get("www-authenticate", "")
    return "x-apikey" in challenge.lower() or not challenge and "html" not in headers.get("content-type", "")


def _refusal_of_p1(status: int, headers: Headers, client: HTTPClient) -> Exception:
    """Return the error for a response to P1 that is not a P3. Its text says what to do."""
    if status == 401 and _asks_for_key(headers):
        return KeyRefused()
    if status == 407 and client.proxy:
        return client.proxy.refusal(status, headers)
    through = f", or the proxy at {client.proxy.origin.place}," if client.proxy and not client.origin.tls else ""
    if status >= 500 and status not in _NO_RELAY:
        return ConnectionError(f"a proxy in front of the relay, or the relay itself{through} answers {status}")
    if 300 <= status < 400:
        return Refused(f"relay_url leads to a redirect ({status}): {_redirect_advice(client.origin, headers)}")
    advice = _NO_RELAY.get(status, "a wrong relay_url, or a captive portal: log in to this network in a browser")
    scheme = headers.get("www-authenticate", "").partition(" ")[0]
    what = f"{status}, {scheme or headers.get('content-type') or 'no type'}"[:80]
    return Refused(f"{client.origin.url}{through} is not a PTTH relay ({what}): {advice}")


def _redirect_advice(origin: BaseURL, headers: Headers) -> str:
    """Return advice for a P1 that was redirected: the right relay_url, if it is known."""
    try:
        target = urllib.parse.urljoin(f"{origin.url}{BACKEND}http_listen/", headers["location"])
        base, same_path, _ = re.split(r"[?#]", target)[0].partition(f"{BACKEND}http_listen/")
        there = parse_base_url(base)
    except (KeyError, ValueError):
        return "it has no valid Location; a captive portal?"
    if there == origin and same_path:
        return "to the same URL; the proxy in front of the relay does not see that this is https already"
    if origin.tls and not there.tls:
        return f"to {there.url}, which would send the key without TLS; correct relay_url"
    to_https = there.host == origin.host and there.tls and not origin.tls
    if to_https and not same_path:  # some proxies drop the path
        there = there._replace(path=origin.path)
    if same_path or to_https:
        return f'write relay_url = "{there.url}"'
    return f"to {there.url[:200]}, which is not a relay's URL; a login page, or a captive portal?"


def format_server_block(name: str, key: str) -> str:
    """Return the TOML block that registers a server at its relay."""
    return f'[[servers]]\nname = "{name}"\ntripcode = "{tripcode(key)}"'


def registration_needed(name: str, key: str) -> str:
    """Return what the operator must do when the relay does not know the key, in several lines."""
    return (
        f"the relay does not know server {name} with this key (401). Add these lines to its ptth_relay.toml "
        f"and send it SIGHUP; retrying every {REFUSED_DELAY:.0f} seconds:\n"
        f"{format_server_block(name, key)}"
    )


# -- 17. Configuration --
# From TOML to dataclasses. All problems of a file are reported together.

NO_URL = BaseURL(False, "", 0, "")


@dataclass
class ServerConfig:
    """The configuration of `ptth server`: ptth_server.toml, overridden by flags."""

    path: str
    name: str = ""
    api_key: str = ""
    relay_url: list[str] = field(default_factory=list)
    file_server_root: str = ""
    app: str = ""  # a web app, served instead of a directory
    app_host: str = "auto"
    throttle_upload: int = 0  # bytes per second; 0 is no limit
    proxy_url: str = ""
    site: SiteOptions = SiteOptions()
    relays: list[tuple[BaseURL, ForwardProxy | None]] = field(default_factory=list)  # relay, and the proxy to it
    app_url: BaseURL = NO_URL


@dataclass
class TOMLTable:
    """A TOML table: returns values by key and type, and collects its problems."""

    values: dict[str, Any]
    where: str  # the file, and perhaps the block in it
    problems: list[str] = field(default_factory=list)  # of the whole file

    def problem(self, text: str) -> None:
        """Add a problem."""
        self.problems.append(f"{self.where}: {text}")

    def _get(self, key: str, default: T, what: str, is_valid: Callable[[Any], bool]) -> T:
        value: T = self.values.get(key, default)
        if is_valid(value):
            return value
        self.problem(f"{key} must be {what}")
        return default

    def text(self, key: str, default: str = "") -> str:
        """Return a string."""
        return self._get(key, default, "a string in quotes", lambda value: isinstance(value, str))

    def texts(self, key: str) -> list[str]:
        """Return the strings of a list, or a single string as a list; [""] if the key is missing."""
        value = self.values.get(key) or ""
        values = value if isinstance(value, list) else [value]
        texts = [text for text in values if isinstance(text, str)]
        if len(texts) == len(values):
            return texts
        self.problem(f"{key} must be a string in quotes, or a list of such strings")
        return []

    def is_text(self, key: str) -> bool:
        """Return whether the value is a string or missing; otherwise `text` has added the problem already."""
        return isinstance(self.values.get(key, ""), str)

    def tripcode(self, key: str, command: str) -> str:
        """Return a tripcode or hash that ptth.py has printed: 32 bytes in standard base64."""
        code = self.text(key)
        if self.is_text(key) and not re.fullmatch("[A-Za-z0-9+/]{43}=", code):
            self.problem(f"{key} must be what `ptth.py {command}` prints, 44 characters that end in =")
        return code

    def parsed(self, key: str, text: str, parse: Callable[[str], T], default: T) -> T:
        """Return what `parse` makes of the text of `key`; the text of its ValueError becomes a problem."""
        try:
            return parse(text)
        except ValueError as error:
            self.problem(f"{key} {error}")
            return default

    def number(self, key: str, default: int, low: int, high: int) -> int:
        """Return an integer from `low` to `high`."""
        what = f"a whole number from {low} to {high}"
        return self._get(key, default, what, lambda value: type(value) is int and low <= value <= high)

    def time(self, key: str) -> float:
        """Return the POSIX time of a date-time with an offset, in TOML's form or as a string of RFC 3339."""
        import datetime

        value = self.values.get(key)
        with contextlib.suppress(ValueError):
            when = value if isinstance(value, datetime.datetime) else datetime.datetime.fromisoformat(str(value))
            if when.tzinfo is not None:
                return when.timestamp()
        self.problem(f"{key} must be a date and time with an offset, for example 2026-01-31T12:00:00Z")
        return math.nan

    def flag(self, key: str, default: bool) -> bool:
        """Return a boolean."""
        return self._get(key, default, "true or false", lambda value: isinstance(value, bool))

    def tables(self, key: str) -> list[TOMLTable]:
        """Return the tables of an array of tables."""

        def is_valid(values: Any) -> bool:
            return isinstance(values, list) and all(isinstance(value, dict) for value in values)

        values: list[dict[str, Any]] = self._get(key, [], f"written as [[{key}]] blocks", is_valid)
        return [
            TOMLTable(value, f"{self.where}, [[{key}]] number {i}", self.problems) for i, value in enumerate(values, 1)
        ]

    def allow_only(self, keys: Iterable[str], hint: str = "") -> None:
        """Add a problem for each unknown key, with the most similar known one; without one, also the `hint`."""
        known = list(keys)
        for key in [key for key in self.values if key not in known]:
            import difflib  # here: most files have no unknown key

            near = difflib.get_close_matches(key, known, 1)
            advice = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}{hint}"
            self.problem(f"unknown key {key}; {advice}")


def read_toml(path: str, how: str) -> dict[str, object]:
    """Read a TOML file. UserError if it is missing, cannot be read, or is not valid."""
    import tomllib

    try:
        if stat.S_ISFIFO(mode := os.stat(path).st_mode) or stat.S_ISCHR(mode):
            raise UserError(f"cannot read {path}: it is a pipe or a device, which may never end; a file is needed")
        with open(path, "rb") as file:
            text = decode_config(file.read(), path)
    except FileNotFoundError:
        raise UserError(f"there is no {path}; {how}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {format_error(error)}") from None
    except ValueError:
        raise UserError(f"cannot read {path!r}: a path cannot contain a NUL byte") from None
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        at = re.search(r"\(at line (\d+),", str(error))
        hint = toml_hint(text.split("\n")[int(at[1]) - 1]) if at else ""
        raise UserError(f"{path}: not valid TOML: {error}{hint}") from None


def decode_config(data: bytes, path: str) -> str:
    """Return a file's text, without the byte order mark of some editors. UserError if it is not UTF-8."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:2]:
        width = 32 if data.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")) else 16
        raise UserError(f"{path} is in UTF-{width}; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        what = f"line {line} has the byte 0x{data[error.start]:02x}, which is not UTF-8"
        raise UserError(f"{path}: {what}; if the file is in Latin-1 or Windows-1252, save it as UTF-8") from None


def toml_hint(line: str) -> str:
    """Return how to correct a line that is not TOML, or "". It does not quote the line, which may hold a secret."""
    if re.search(r'"[^"]*\\', line):
        return "; in double quotes a backslash begins an escape, so put the value in single quotes: 'C:\\Users\\me'"
    if re.search("[\u2018-\u201f]", line):
        return "; write straight quotes, \" or '"
    return '; a text needs quotes: key = "text"' if re.search(r"=\s*[A-Za-z/~.:]", line) else ""


def find_config(given: str | None, name: str) -> str:
    """Return the path of a configuration file: `given`, else ./NAME, else ./config/NAME as in the original."""
    return given or next(filter(os.path.exists, (name, os.path.join("config", name))), name)


# No other schemes: javascript: would run in the relay's origin. No white space and no control characters: browsers skip
# them, so "java\nscript:" is the same scheme.
_NEWS_URL = re.compile(r"(?:https?://(?=[^/])|(?![A-Za-z][A-Za-z0-9+.-]*:))[^\s\x00-\x20\x7f]*", re.IGNORECASE)


def load_relay_config(path: str, domain: str | None = None) -> RelayConfig:
    """Read ptth_relay.toml; `domain`, if given, replaces the one there. UserError with a line for each problem."""
    values = read_toml(path, "it needs a [[servers]] block from each `ptth.py server --print-tripcode`")
    table = TOMLTable(values, path)
    if values.pop("server_tripcodes", None) is not None:
        table.problem(
            "the table [server_tripcodes] is an old form; write for each server a block of these lines: "
            '[[servers]]  name = "NAME"  tripcode = "TRIPCODE"'
        )
    table.allow_only(one.name for one in dataclasses.fields(RelayConfig))
    config = RelayConfig(table.number("port", 4000, 0, 65535), table.text("bind", "127.0.0.1"))
    config.response_timeout = table.number("response_timeout", int(RESPONSE_TIMEOUT), 1, 86400)
    config.domain = table.parsed("domain", table.text("domain"), parse_host_name, "") if domain is None else domain
    config.trusted_proxies = read_networks(table)
    config.news_url = table.text("news_url")
    config.enable_scraper_api = table.flag("enable_scraper_api", False)
    config.audit_log_public = table.flag("audit_log_public", False)
    config.dev_mode = values.get("dev_mode", False) is not False
    if not isinstance(values.get("dev_mode", {}), dict | bool):
        table.problem("dev_mode must be written as [dev_mode]")
    if not _NEWS_URL.fullmatch(config.news_url):
        table.problem("news_url must begin with http:// or https://, or be relative to /frontend/servers/")
    key_names: set[str] = set()
    config.scraper_keys = [read_scraper_key(block, key_names) for block in table.tables("scraper_keys")]
    names: set[str] = set()
    config.servers = [read_server_entry(block, names) for block in table.tables("servers")]
    check_hosts(config, table)
    if table.problems:
        raise UserError(*table.problems)
    return config


def parse_host_name(text: str) -> str:
    """Return a host name in lower case and without outer dots, or "". ValueError."""
    host = text.lower().strip(".")
    if not re.fullmatch("[a-z0-9.-]*", host):
        raise ValueError("must be a host name without scheme, port and path, for example app.example.org")
    return host


def read_networks(table: TOMLTable) -> list[str]:
    """Return trusted_proxies: addresses and networks."""
    value = table.values.get("trusted_proxies", [])
    networks = value if isinstance(value, list) else [value]
    for network in networks:
        try:
            ipaddress.ip_network(str(network))
        except ValueError:
            table.problem(f"trusted_proxies: {network!r} is not an address or a network such as 10.0.0.0/8")
            return []
    return list(map(str, networks))


def check_hosts(config: RelayConfig, table: TOMLTable) -> None:
    """Add a problem for each host that two servers, or a server and the relay, would have."""
    owners = {config.domain: "the relay itself"} if config.domain else {}
    for entry in config.servers:
        for host in config.hosts_of(entry):
            if owners.get(host, entry.name) != entry.name:
                table.problem(f"the host {host} would be that of {entry.name} and of {owners[host]}")
            owners[host] = entry.name


_BLOCKS_LAST = "; a key of the relay itself must be above the first block"


def read_server_entry(block: TOMLTable, names: set[str]) -> ServerEntry:
    """Read one [[servers]] block. Its name must not be in `names`, and is added there."""
    block.allow_only(["name", "tripcode", "display_name", "sandbox", "host"], _BLOCKS_LAST)
    name, code = block.text("name"), block.tripcode("tripcode", "server --print-tripcode")
    if block.is_text("name") and not _NAME.fullmatch(name):
        block.problem(f"name {name!r} {NAME_RULE}")
    elif name and name in names:
        block.problem(f"name = {name!r}: there are two servers named {name}")
    names.add(name)
    sandbox, host = block.flag("sandbox", True), block.parsed("host", block.text("host"), parse_host_name, "")
    return ServerEntry(name, code, block.text("display_name"), sandbox, host)


def read_scraper_key(block: TOMLTable, names: set[str]) -> ScraperKey:
    """Read one [[scraper_keys]] block. Its name must not be in `names`, and is added there.

    A key is valid for at most 30 days, and so is a stolen one.
    """
    block.allow_only(["name", "not_before", "not_after", "hash"], _BLOCKS_LAST)
    code = block.tripcode("hash", "relay --new-scraper-key NAME")
    key = ScraperKey(block.text("name"), code, block.time("not_before"), block.time("not_after"))
    if block.is_text("name") and not key.name:
        block.problem("name is missing")
    if key.name and key.name in names:
        block.problem(f"name = {key.name!r}: there are two scraper keys named {key.name}")
    names.add(key.name)
    span = key.not_after - key.not_before
    if span < 0 or span > MAX_SCRAPER_DAYS * 86400:
        block.problem(f"from not_before to not_after must be 0 to {MAX_SCRAPER_DAYS} days")
    return key


def check_secrecy(path: str, table: TOMLTable) -> None:
    """Add a problem if other users can read or change a file with a secret.

    Files in a secrets mount of a container can be read by all users, which cannot be changed. So they are accepted.
    """
    facts = os.stat(path)
    if os.name != "posix" or not facts.st_mode & 0o077:
        return
    mode = f"{facts.st_mode & 0o777:04o}"
    foreign = facts.st_uid != os.geteuid() and not facts.st_mode & 0o222
    mounted = not facts.st_mode & 0o022 and os.statvfs(path).f_flag & os.ST_RDONLY
    if foreign or mounted:
        log_line(f"ptth server: others can read {path} (mode {mode}); accepted, since a secrets mount looks like that")
    else:
        table.problem(f"other users can read it (mode {mode}), and it holds the key; run: chmod 600 {path}")


def find_key(table: TOMLTable) -> str:
    """Return the API key from the file, or else from the environment."""
    key, where = table.text("api_key"), "api_key"
    if not key:
        key, where = os.environ.get("PTTH_API_KEY", "").strip(), "PTTH_API_KEY in the environment"
    if not key:
        table.problem('api_key is missing: set api_key = "...", or PTTH_API_KEY in the environment')
    elif weakness := key_weakness(key):
        table.problem(f"{where} {weakness}; make one with: python3 ptth.py server --new-key")
    return key


def load_server_config(
    path: str, flags: dict[str, str | list[str]], *, to_connect: bool = True, optional: bool = False
) -> ServerConfig:
    """Read ptth_server.toml, overridden by `flags`. UserError with a line for each problem.

    Without `to_connect`, keys that only a connection needs may be missing. An `optional` file may be missing if the API
    key is in the environment.
    """
    if optional and os.environ.get("PTTH_API_KEY") and not os.path.exists(path):
        table = TOMLTable({}, path)
    else:
        how = f"make one with: (umask 077; python3 ptth.py server --new-key > {path})"
        table = TOMLTable(read_toml(path, how), path)
        check_secrecy(path, table)
    values = table.values
    site_keys = ("auth", "hidden", "follow_symlinks", "listing", "cors", "headers", "upload", "max_upload")
    own_keys = ("name", "api_key", "relay_url", "file_server_root", "app", "app_host", "throttle_upload", "proxy_url")
    table.allow_only([*own_keys, *site_keys])
    if isinstance(values.get("throttle_upload"), bool) and values.pop("throttle_upload"):
        log_line(f"ptth server: {path}: throttle_upload = true sets no limit here; give a number of bytes per second")
    values.update(flags)
    config = ServerConfig(
        path,
        name=table.text("name"),
        relay_url=table.texts("relay_url"),
        file_server_root=table.text("file_server_root"),
        app=table.text("app"),
        app_host=table.text("app_host", "auto"),
        throttle_upload=table.number("throttle_upload", 0, 0, 10**12),
        proxy_url=table.text("proxy_url"),
        site=read_site(table),
    )
    if not config.name:
        table.problem('name is missing: set name = "..." or give --name')
    elif not _NAME.fullmatch(config.name):
        table.problem(f"name {config.name!r} {NAME_RULE}")
    config.api_key = find_key(table)
    if to_connect:
        read_relays(config, table)
        read_content(config, table)
    if table.problems:
        raise UserError(*table.problems)
    return config


def read_relays(config: ServerConfig, table: TOMLTable) -> None:
    """Parse the URLs of the relays, and find the proxy to each."""
    for url in config.relay_url:
        origin = table.parsed("relay_url", url, parse_relay_url, NO_URL)
        if origin != NO_URL and origin in dict(config.relays):
            table.problem(f"relay_url has {origin.url} twice: remove one of them")
        try:
            config.relays.append((origin, find_proxy(config, origin)))
        except UserError as error:
            table.problems += [line for line in error.args if line not in table.problems]  # once for all relays


def read_content(config: ServerConfig, table: TOMLTable) -> None:
    """Check file_server_root or app."""
    if not config.app:
        try:
            config.file_server_root = check_root(config.file_server_root, f"file_server_root in {config.path}")
        except UserError as error:
            table.problem(error.args[0])
        return
    if config.file_server_root:
        table.problem(
            "app and file_server_root exclude each other, since one name serves one thing: remove one of them, or run "
            "a second server with a name of its own"
        )
    try:
        config.app_url = parse_app(config.app)
        if config.app_host not in ("auto", "public", "local") and not is_host(config.app_host or ":"):
            raise ValueError('app_host must be "auto", "public", "local" or a host')
    except ValueError as error:
        table.problem(f"app cannot be used: {error}; for example 3000, http://127.0.0.1:3000 or unix:/run/app.sock")


def parse_relay_url(url: str) -> BaseURL:
    """Parse relay_url, without the /7ZSFUKGV with which it ends in files of the original. Raises ValueError."""
    if not url:
        raise ValueError('is missing: set relay_url = "https://..." or give --relay-url')
    try:
        origin = parse_base_url(url)
    except ValueError as error:
        shown = "" if re.search("[@?#]", url) else f"= {url!r} "  # a URL may hold a password
        advice = str(error)
        if shown and not re.match("[A-Za-z]+:/", url.strip()):
            advice = f'write "https://{url.strip()}", or http:// for a relay without TLS'
        raise ValueError(f"{shown}cannot be used: {advice}") from None
    return origin._replace(path=origin.path.removesuffix(BACKEND.rstrip("/")))


def read_site(table: TOMLTable) -> SiteOptions:
    """Read the keys for how the directory or app is served."""
    keys = ("hidden", "follow_symlinks", "listing", "cors", "upload")
    flags: dict[str, Any] = {key: table.flag(key, key == "listing") for key in keys}  # only `listing` is on by default
    lines = table.values.get("headers", [])
    headers = [
        table.parsed("headers:", line if isinstance(line, str) else "", parse_header_option, ("", ""))
        for line in (lines if isinstance(lines, list) else [lines])
    ]
    auth = table.text("auth") or os.environ.get("PTTH_AUTH", "")
    if auth and not is_auth(auth):
        table.problem('auth, or PTTH_AUTH in the environment, must be "USER:PASSWORD"')
    max_upload = table.parsed("max_upload", str(table.values.get("max_upload", 0)), parse_size, 0)
    return SiteOptions(**flags, headers=tuple(headers), auth=auth, max_upload=max_upload)


def parse_size(text: str) -> int:
    """Parse a number of bytes, such as 4096, 500M or 2GiB; units are powers of 1024. ValueError."""
    match = re.fullmatch(r"([0-9]{1,15}) ?(?:([KMGT])(?:I?B)?|B)?", text.upper(), re.ASCII)
    if not match:
        raise ValueError(f"must be a number of bytes, such as 500M or 2G, and not {text!r}")
    return int(match[1]) << 10 * " KMGT".index(match[2] or " ")


def is_auth(text: str) -> bool:
    """Return whether `text` is USER:PASSWORD, both not empty."""
    return re.fullmatch("[^:]+:.+", text, re.DOTALL) is not None


_OWN_FIELDS = {
    "connection", "content-encoding", "content-length", "content-range", "date", "etag", "last-modified", "location",
    "transfer-encoding",
}  # fmt: skip


def parse_header_option(line: str) -> tuple[str, str]:
    """Parse "Name: value". ValueError if it is invalid, or a field that the server sets itself."""
    name, colon, value = (part.strip() for part in line.partition(":"))
    try:
        format_head("x", [(name, value)])
    except (ProtocolError, UnicodeError):
        colon = ""
    if not colon:
        raise ValueError(f"{line!r} is not 'Name: value'")
    if name.lower() in _OWN_FIELDS:
        raise ValueError(f"{name} is set by the server itself")
    return name, value


def find_proxy(config: ServerConfig, origin: BaseURL) -> ForwardProxy | None:
    """Return the proxy to a relay, by proxy_url or else by the environment. UserError."""
    url = config.proxy_url or proxy_from_environment(origin)
    try:
        return parse_proxy(url) if url else None
    except ValueError as error:
        where = f"{config.path}: proxy_url" if config.proxy_url else "the proxy in HTTP_PROXY, HTTPS_PROXY or ALL_PROXY"
        raise UserError(f"{where} cannot be used: {error}") from None


def check_root(root: str, how: str) -> str:
    """Return the directory to serve; "" is the current one.

    UserError if it cannot be served. For / and the home directory, unless they are named, its text says `how` to do it.
    """
    try:
        path = os.path.abspath(root)
    except OSError as error:
        why = f"the current directory cannot be found: {format_error(error)}"
        raise UserError(f"{why}; start in another one, or give the directory to serve as an absolute path") from None
    if not root:
        root = path
        if os.path.realpath(root) in (os.path.realpath(os.sep), os.path.realpath(os.path.expanduser("~"))):
            raise UserError(f"not serving {root} unless it is named; to serve it: {how}")
    try:
        if stat.S_ISDIR(os.stat(root).st_mode):
            return root
    except (FileNotFoundError, NotADirectoryError, ValueError):
        pass
    except OSError as error:
        raise UserError(f"cannot serve {root}: {format_error(error)}") from None
    hint = f" (port? use --port {root})" if root.isdigit() else ""
    if not root.isprintable():
        hint = "; in double quotes a backslash begins an escape, so write it in single quotes"
    exists = os.path.lexists(root) or hint
    raise UserError(f"{root} is not a directory{hint}" if exists else f"there is no directory {root}")


# -- 18. Command line --
# Flags, commands, signals, and the messages for the operator.


def print_output(text: str) -> None:
    """Write the result of a command to stdout. UserError if that fails."""
    try:
        os.write(1, f"{text}\n".encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise UserError(f"cannot write to stdout: {format_error(error)}") from None


def print_ready(line: str) -> None:
    """Write a line to stdout to say that the program is ready. A closed stdout is ignored."""
    with contextlib.suppress(UserError):
        print_output(line)


_NOT_LISTENING = {
    errno.EADDRINUSE: "--port chooses another port",
    errno.EADDRNOTAVAIL: "this machine does not have that address; --bind chooses another one",
    errno.EINVAL: "a link-local address needs its interface, as in fe80::1%eth0",
    errno.EACCES: "ports below 1024 need root or CAP_NET_BIND_SERVICE; --port chooses another one",
    errno.EPERM: "--port and --bind choose another place",
}


def open_socket(bind: str, port: int) -> socket.socket:
    """Return a listening socket. "" and "::" mean all interfaces, IPv4 and IPv6. UserError."""
    both = socket.has_dualstack_ipv6()
    host = re.sub("%25(?=.)", "%", re.sub(r"^\[(.+)\]$", r"\1", bind))  # allow brackets and %25, as in URLs
    host = host or ("::" if both else "0.0.0.0")
    try:
        name = number_zone(host).encode()  # for a str, Python loads tables of Unicode: 0.3 MiB
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        both = both and (address[0] == "::" or str(address[0]).startswith("::ffff:"))  # IPv4 in IPv6
        try:  # the whole address: after the port it has the interface of a link-local address
            return socket.create_server(address, family=family, dualstack_ipv6=both)
        except OSError as error:
            if bind or error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
            return socket.create_server(("", port))  # IPv6 is switched off on this machine
    except (OSError, OverflowError, UnicodeError) as error:
        hint = _NOT_LISTENING.get(getattr(error, "errno", 0), "--bind takes a name or an address, without a port")
        place = f"{bracket(host)}:{port}" if bind else f"port {port}"
        raise UserError(f"cannot listen on {place}: {format_error(error).lower()}; {hint}") from None


def listening_urls(sock: socket.socket, scheme: str = "http") -> list[str]:
    """Return the URLs at which a listening socket answers, the one for this machine first."""
    host, port, *more = sock.getsockname()
    hosts = [host.removeprefix("::ffff:")]
    if host in ("::", "0.0.0.0"):
        six = sock.family == socket.AF_INET6
        four = not six or not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
        hosts = ["127.0.0.1" if four else "::1"]
        # The addresses from which this machine would connect; connecting a UDP socket sends nothing.
        for probe in ["192.0.2.1"] * four + ["2001:db8::1"] * six:
            family = socket.AF_INET6 if ":" in probe else socket.AF_INET
            with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as udp:
                udp.connect((probe, 9))  # fails if there is no route, and so no address
                address = udp.getsockname()[0]
                hosts += [] if address.startswith(("127.", "::1")) else [address]
    elif more and more[1]:  # the interface of a link-local address
        hosts = [f"{host.partition('%')[0]}%25{socket.if_indextoname(more[1])}"]
    return [f"{scheme}://{bracket(host)}:{port}/" for host in hosts]


def stop_event(hang_up: Callable[[], None]) -> asyncio.Event:
    """Return an event that SIGINT and SIGTERM set. A second SIGINT ends the program at once.

    Until it is called, each of these signals ends the program with an error, so call it before work that takes long.
    SIGHUP calls `hang_up`, which reads the configuration again. If the terminal was closed, SIGHUP sets the event, too.
    Also sets the loop's exception handler.
    """
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(report_error)
    event = asyncio.Event()
    if hasattr(signal, "SIGHUP"):  # not on Windows
        attached = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN and has_terminal()  # nohup ignores it
        loop.add_signal_handler(signal.SIGHUP, lambda: event.set() if attached and not has_terminal() else hang_up())

    def stop(number: int) -> None:
        if event.is_set() and number == signal.SIGINT:
            os._exit(1)
        event.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, stop, number)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda number, _: loop.call_soon_threadsafe(stop, number))
    return event


async def wait_for_any(*work: Awaitable[object]) -> None:
    """Wait until one of these ends."""
    await asyncio.wait([asyncio.ensure_future(one) for one in work], return_when=asyncio.FIRST_COMPLETED)


def has_terminal() -> bool:
    """Return whether this process has a controlling terminal."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
        return True
    except OSError:
        return False


def read_again(command: str, what: str, read: Callable[..., None], *args: object) -> None:
    """Read a configuration or certificate again by `read(*args)`. If that fails, log why: the old one stays in use."""
    try:
        read(*args)
    except UserError as error:
        log_line(f"ptth {command}: keeping the old {what}: {'; '.join(error.args)}")


async def run_file_server(args: argparse.Namespace) -> None:
    """Serve a directory until SIGINT or SIGTERM. SIGHUP loads the certificate again."""
    root = check_root(args.dir or "", f"python3 ptth.py {args.command} .")
    options = SiteOptions(
        hidden=args.hidden, follow_symlinks=args.follow_symlinks, listing=not args.no_listing, cors=args.cors,
        headers=tuple(args.header), auth=find_auth(args.auth), upload=args.upload, max_upload=args.max_upload,
    )  # fmt: skip
    if args.tls_key and not args.tls_cert:
        raise UserError("--tls-key needs --tls-cert", status=2)
    files = args.tls_cert, args.tls_key
    tls = load_certificate(*files) if args.tls_cert else None
    stop = stop_event(lambda: read_again(args.command, "certificate", reload_certificate, tls, *files))
    site = Site(root, options, private=filter(None, files))
    tell_secrets(site, args.command)
    begin_uploads(site, args.command)
    server = HTTPServer(site_handler(site), log=None if args.quiet else AccessLog(), tls=tls)
    sock = open_socket(args.bind, args.port)
    await server.listen(sock)
    print_ready(f"Serving {os.path.realpath(root)} at {' '.join(listening_urls(sock, 'https' if tls else 'http'))}")
    await stop.wait()
    await server.stop()


def find_auth(given: str | None = None) -> str:
    """Return USER:PASSWORD from the flag or the environment, or "". UserError if it is invalid."""
    auth = given or os.environ.get("PTTH_AUTH", "")
    if auth and not is_auth(auth):
        raise UserError("the password in PTTH_AUTH or --auth must be USER:PASSWORD", status=2)
    return auth


def load_certificate(cert: str, key: str | None) -> ssl.SSLContext:
    """Return a TLS context. UserError."""
    import ssl

    def refuse() -> NoReturn:
        raise ValueError("the key has a passphrase; make a copy without: openssl pkey -in KEY -out NEW")

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert, key, refuse)
    except (OSError, ValueError) as error:
        why = _why_no_certificate(error, cert, key) if isinstance(error, ssl.SSLError) else format_error(error)
        raise UserError(f"cannot use {cert}{' with ' + key if key else ''}: {why}", status=2) from None
    return context


def _why_no_certificate(error: ssl.SSLError, cert: str, key: str | None) -> str:
    """Return why OpenSSL did not accept these files."""
    if error.reason == "KEY_VALUES_MISMATCH":
        return "the key belongs to another certificate"
    for path, label, what in ((cert, b"CERTIFICATE-----", "certificate"), (key or cert, b"PRIVATE KEY-----", "key")):
        with open(path, "rb") as file:
            data = file.read()
        if label not in data:
            form = "x509" if what == "certificate" else "pkey"
            der = f"; if it is in DER form: openssl {form} -inform DER -in {path} -out NEW"
            absent = "; give the key with --tls-key" if what == "key" and not key else ""
            return f"{path} holds no {what} in PEM form{der if data[:1] == b'0' else absent}"
    return f"no certificate with its key in PEM form ({(error.reason or str(error)).replace('_', ' ').lower()})"


def reload_certificate(context: ssl.SSLContext | None, cert: str, key: str | None) -> None:
    """Load the certificate again, for new connections. UserError."""
    if not context:
        log_line("ptth file-server: there is nothing to read again; changed flags take effect after a restart")
        return
    fresh = load_certificate(cert, key)

    def use_fresh(connection: ssl.SSLObject, _name: str, _context: ssl.SSLContext) -> None:
        connection.context = fresh

    # Loading into `context` itself could leave it half changed after a failure, and would keep an old certificate with
    # another type of key.
    context.sni_callback = use_fresh
    log_line(f"ptth file-server: loaded {cert} again")


async def run_relay(args: argparse.Namespace) -> None:
    """Run a relay until SIGINT or SIGTERM. SIGHUP reads the configuration again."""
    if args.new_scraper_key is not None:
        print_scraper_key(args.new_scraper_key)
        return
    path = find_config(args.config, "ptth_relay.toml")
    if args.config is None and not os.path.exists(path):
        config = RelayConfig(domain=args.domain or "")
        log_line("ptth relay: no ptth_relay.toml found: using defaults, no server registered")
    else:
        config = load_relay_config(path, args.domain)
    stop = stop_event(lambda: read_again(args.command, "configuration", reload_relay, relay, config, path, args.domain))
    sock = open_socket(args.bind or config.bind, config.port if args.port is None else args.port)
    relay = Relay(config)
    log = None if args.quiet else AccessLog(relay.state.client_address)
    server = HTTPServer(relay.handle, takes_bodies=True, log=log)
    relay.state.connection_count = lambda: len(server.connections)
    await server.listen(sock)
    print_ready(f"PTTH relay for {format_count(len(config.servers), 'server')} at {' '.join(listening_urls(sock))}")
    await stop.wait()
    await stop_relay(relay, server)


def reload_relay(relay: Relay, config: RelayConfig, path: str, domain: str | None) -> None:
    """Read the configuration again, and apply it. UserError. `config` is the one at the start."""
    fresh = load_relay_config(path, domain)
    if (fresh.port, fresh.bind) != (config.port, config.bind):
        log_line("ptth relay: a changed port or bind takes effect after a restart")
    relay.configure(fresh)
    counts = format_count(len(fresh.servers), "server"), format_count(len(fresh.scraper_keys), "scraper key")
    log_line(f"ptth relay: read {path} again: {', '.join(counts)}")


def print_scraper_key(name: str) -> None:
    """Print a [[scraper_keys]] block with the hash of a new key on stdout, and the key on stderr."""
    import secrets

    if not _NAME.fullmatch(name):
        raise UserError(f"name {name!r} {NAME_RULE}", status=2)
    key = secrets.token_urlsafe(32)
    now = time.time()
    print_output(
        f'[[scraper_keys]]\nname = "{name}"\nhash = "{tripcode(key)}"\n'
        f"not_before = {format_time(now)}\nnot_after = {format_time(now + MAX_SCRAPER_DAYS * 86400)}"
    )
    log_line(f"X-ApiKey: {key}")


async def stop_relay(relay: Relay, server: HTTPServer) -> None:
    """Stop the relay, then its HTTP server, within GRACE_PERIOD for both together."""
    loop = asyncio.get_running_loop()
    end = loop.time() + GRACE_PERIOD
    await relay.drain()
    await relay.stop(end - loop.time())
    await server.stop(end - loop.time())


async def run_server(args: argparse.Namespace) -> None:
    """Serve through a relay until SIGINT or SIGTERM, or print a key. SIGHUP reads the configuration again."""
    if args.new_key:
        print_server_config(args.name or "my-server", args.relay_url or ["https://relay.example.com"])
        return
    given = {key: getattr(args, key) for key in ("name", "relay_url", "file_server_root", "app")}
    flags = {key: value for key, value in given.items() if value is not None}
    path = find_config(args.config, "ptth_server.toml")
    load = functools.partial(load_server_config, path, flags, optional=args.config is None)
    config = load(to_connect=not args.print_tripcode)
    if args.print_tripcode:
        print_output(format_server_block(config.name, config.api_key))
        return
    stop = stop_event(lambda: read_again(args.command, "configuration", reload_server, server, config, load))
    limiter = RateLimiter(config.throttle_upload) if config.throttle_upload else None
    client, *others = (HTTPClient(origin, proxy, limiter) for origin, proxy in config.relays)
    server = TunnelServer(client, config.name, config.api_key, make_content(config), *others)
    print_ready(f"PTTH server {config.name}: serving {describe_content(config)}")
    running = asyncio.create_task(server.run())
    await wait_for_any(stop.wait(), running)
    await server.stop()
    await running


def make_content(config: ServerConfig, command: str = "server") -> Handler:
    """Return the handler of `ptth server` for its configuration: an app or a directory."""
    if config.app:
        app = App(HTTPClient(config.app_url), config.app_host)
        return with_site_options(app.handle, config.site, config.name, app=True)
    private = [config.path] if os.path.exists(config.path) else []
    site = Site(config.file_server_root, config.site, private=private)
    tell_secrets(site, command)
    begin_uploads(site, command)
    return server_handler(site, config.name)


def describe_content(config: ServerConfig) -> str:
    """Return the app or the directory as text, for messages."""
    if config.app:
        return f"the app at {config.app_url.place if config.app_url.unix else config.app_url.url}"
    return os.path.realpath(config.file_server_root)


def reload_server(server: TunnelServer, config: ServerConfig, load: Callable[[], ServerConfig]) -> None:
    """Read the configuration again, and apply it. UserError.

    `config` is the one at the start: its keys for reaching the relay stay in use.
    """
    fresh = load()
    keys = ("name", "api_key", "relay_url", "proxy_url", "throttle_upload")
    changed = [key for key in keys if getattr(fresh, key) != getattr(config, key)]
    if changed:
        log_line(f"ptth server: these changes take effect after a restart: {', '.join(changed)}")
    fresh.name = config.name  # the relay knows the server by it until a restart
    server.workers.handler = make_content(fresh)
    log_line(f"ptth server: read {config.path} again: serving {describe_content(fresh)}")


def print_server_config(name: str, relay_urls: list[str]) -> None:
    """Print a ptth_server.toml with a new key on stdout, and the relay's [[servers]] block on stderr."""
    import json
    import secrets

    if not _NAME.fullmatch(name):
        raise UserError(f"name {name!r} {NAME_RULE}", status=2)
    try:
        for url in relay_urls:
            parse_relay_url(url)
    except ValueError as error:
        raise UserError(f"--relay-url {error}", status=2) from None
    shown = relay_urls if len(relay_urls) > 1 else relay_urls[0]
    key = "REPLACE"
    while key_weakness(key):  # a token could begin like the placeholder
        key = secrets.token_urlsafe(32)
    print_output(f'name = "{name}"\napi_key = "{key}"\nrelay_url = {json.dumps(shown)}')
    write_stderr(f"# for ptth_relay.toml on the relay:\n{format_server_block(name, key)}\n")


def local_names_only(handler: Handler) -> Handler:
    """Wrap a handler: answer only requests whose Host names this machine, others with 403.

    Otherwise another site could let its own name point to 127.0.0.1, and its scripts could read all responses.
    """

    async def handle(request: Request) -> Response:
        host = request.headers.get("host")
        if host is not None and not is_local_name(host):
            why = f"this demo answers to localhost and 127.0.0.1 only, and the request is for {host[:MAX_AUDIT_TEXT]!r}"
            raise ProtocolError(403, f"{why}; open it under one of these names", close=True)
        return await handler(request)

    return handle


async def run_demo(args: argparse.Namespace) -> None:
    """Run a relay and a server, which share nothing except a connection, until SIGINT or SIGTERM."""
    import secrets

    site = SiteOptions(auth=find_auth(), upload=args.upload, max_upload=args.max_upload)
    config = ServerConfig("", name="demo", app=args.app or "", site=site)
    if args.app:
        if args.dir:
            raise UserError("a directory and --app exclude each other", status=2)
        try:
            config.app_url = parse_app(args.app)
        except ValueError as error:
            raise UserError(f"--app {error}", status=2) from None
    else:
        config.file_server_root = check_root(args.dir or "", f"python3 ptth.py {args.command} .")
    key = secrets.token_urlsafe(32)
    sock = open_socket("127.0.0.1", args.port)
    relay = Relay(RelayConfig(servers=[ServerEntry("demo", tripcode(key))], domain="localhost"))
    http = HTTPServer(local_names_only(relay.handle), takes_bodies=True, log=None if args.quiet else AccessLog())
    stop = stop_event(lambda: log_line("ptth demo: there is nothing to read again"))
    await http.listen(sock)
    port = sock.getsockname()[1]
    client = HTTPClient(BaseURL(False, "127.0.0.1", port, ""))
    server = TunnelServer(client, "demo", key, make_content(config, args.command))
    running = asyncio.create_task(server.run())
    await wait_for_any(server.connected.wait(), stop.wait(), running)
    if server.connected.is_set():
        print_ready(f"Serving {describe_content(config)} through a relay and a server; open:")
        url = f"demo.localhost:{port}/" if args.app else f"127.0.0.1:{port}/frontend/servers/demo/files/"
        print_ready(f"    http://{url}")
    await wait_for_any(stop.wait(), running)
    await asyncio.gather(server.stop(), stop_relay(relay, http))  # both within GRACE_PERIOD
    await running


_Option: TypeAlias = tuple[list[str], dict[str, Any]]  # what `add_argument` of argparse takes


def _option(names: str, value: str, text: str, parse: Callable[[str], object] = str, **settings: Any) -> _Option:
    """Return an option with its help `text`; "" hides it. `value`: the help's word for its value; "" for a switch.

    `parse` makes the value; argparse shows the text of its ValueError.
    """

    def convert(text: str) -> object:
        import argparse

        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    what: dict[str, Any] = {"metavar": value, "type": convert} if value else {"action": "store_true"}
    return names.split(), {"help": text, **what, **settings}


def parse_port(text: str) -> int:
    """Parse a port, 0 to 65535. Raises ValueError."""
    if not (text.isascii() and text.isdigit()) or int(text[:6]) > 65535:
        raise ValueError(f"{text!r} is not a port, 0 to 65535")
    return int(text)


def parse_given(text: str) -> str:
    """Return a value that is parsed later. Raises ValueError if it is empty, as an unset variable is."""
    if not text:
        raise ValueError("it is empty; give a value, or leave it out")
    return text


def _config_option(name: str) -> _Option:
    text = f"configuration file (default: ./{name}, else ./config/{name})"
    return _option("--config --config-path", "FILE", text, parse_given)


def _port_option(text: str, **settings: Any) -> _Option:
    return _option("--port", "N", f"port to listen on{text}", parse_port, **settings)


_DIR = _option("dir", "DIR", "directory to serve (default: the current one; / and your home only when named)",
               parse_given, nargs="?")  # fmt: skip
_APP = _option("--app", "TARGET", "web app to serve instead of a directory: a port here, HOST:PORT, a URL, unix:PATH",
               parse_given)  # fmt: skip
_QUIET = _option("-q --quiet", "", "do not write the access log to stderr")
_UPLOADS = (
    _option("--upload", "", "take new files, by PUT and by a form in the listing"),
    _option("--max-upload", "SIZE", "most bytes of one uploaded file, for example 500M or 2G (default: no limit)",
            parse_size, default=0),
)  # fmt: skip
_COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], Coroutine[Any, Any, None]], str, tuple[_Option, ...]]] = {
    "demo": (run_demo, "run a relay and a server on this machine, to see how it works", (
        _DIR, _APP, _QUIET, *_UPLOADS, _port_option(" (default: 4000)", default=4000),
    )),
    "relay": (run_relay, "relay requests to servers behind firewalls; runs on a public host", (
        _config_option("ptth_relay.toml"), _QUIET,
        _option("--bind", "ADDR", "address to listen on; overrides the file (default: `bind` there, or 127.0.0.1)"),
        _port_option("; overrides the file (default: `port` there, or 4000)"),
        _option("--domain", "HOST", "give each server the host NAME.HOST; overrides the file", parse_host_name),
        _option("--new-scraper-key", "NAME",
                "print a [[scraper_keys]] block, valid 30 days, on stdout and its key on stderr, and exit"),
    )),
    "server": (run_server, "serve a directory or a web app through a relay; makes only outgoing connections", (
        _config_option("ptth_server.toml"),
        _option("--name", "NAME", "this server's name at the relay; overrides the file"),
        _option("--relay-url", "URL", "the relay, for example https://relay.example.com; repeat it for several relays; "
                "overrides the file", action="append"),
        _option("--file-server-root", "DIR",
                "directory to serve (default: file_server_root in the file, else the current one)", parse_given),
        _APP,
        _option("--print-tripcode", "", "print the [[servers]] block for the relay's file, and exit"),
        _option("--new-key", "", "print a ptth_server.toml with a new key on stdout and the relay's [[servers]] block "
                "on stderr, and exit"),
        _option("-q --quiet", "", ""),  # accepted, but there is no access log
    )),
    "file-server": (run_file_server, "serve a directory, without any relay", (
        _DIR, _QUIET, *_UPLOADS, _port_option(" (default: 8000)", default=8000),
        _option("--bind", "ADDR", "address to listen on (default: all)", default=""),
        _option("--hidden", "", "list and serve names that begin with a dot, too"),
        _option("--follow-symlinks", "", "follow links that leave the directory, too"),
        _option("--no-listing", "", "no listings, no zip, no JSON: only files"),
        _option("--cors", "", "send Access-Control-Allow-Origin: *, so that scripts of all sites can read the files"),
        _option("--header", "'NAME: VALUE'", "add a field to every response; may be repeated",
                parse_header_option, action="append", default=[]),
        _option("--auth", "USER:PASSWORD", "ask for this password (so does PTTH_AUTH, which no process list shows)",
                parse_given),
        _option("--tls-cert", "FILE", "serve https with this certificate chain (PEM)", parse_given),
        _option("--tls-key", "FILE", "private key (PEM), if the --tls-cert file does not contain it", parse_given),
    )),
}  # fmt: skip
_EPILOG = (
    "Environment: PTTH_AUTH=USER:PASSWORD and PTTH_API_KEY, if the file does not have them; HTTP_PROXY, HTTPS_PROXY, "
    "ALL_PROXY, NO_PROXY and SSL_CERT_FILE for a server's way to its relay. SIGHUP makes a relay or a server read its "
    "file again, and a file server its certificate. SIGTERM and Ctrl-C stop within 30 seconds. Exit status: 0 stopped "
    "or printed, 1 not possible, 2 wrong usage."
)


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            self.exit(2, f"{self.prog.replace('.py', '')}: {message}; see {self.prog} --help\n")

    text = "An HTTP server that works behind a firewall, by way of a relay."
    parser = Parser(prog="ptth.py", description=text, epilog=f"Begin with: python3 ptth.py demo. {_EPILOG}")
    parser.add_argument("--version", action="version", version=f"ptth {__version__}")
    parser.set_defaults(parser=parser)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (run, text, options) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, epilog=_EPILOG)
        command.set_defaults(run=run, parser=command)
        for names, settings in options:
            command.add_argument(*names, **settings | {"help": settings["help"] or argparse.SUPPRESS})
    return parser


def occupy_standard_descriptors() -> None:
    """Open /dev/null for each of descriptors 0 to 2 that is closed.

    Otherwise a client's connection could get descriptor 2, and receive the log.
    """
    with contextlib.suppress(OSError):  # a chroot without /dev
        while (fd := os.open(os.devnull, os.O_RDONLY)) < 3:  # read only: writing fails, as if closed
            pass
        os.close(fd)


def main(argv: list[str] | None = None) -> int:
    """Run a command; return its exit status: 0 for success, 1 for a failure, 2 for wrong usage."""
    occupy_standard_descriptors()
    args, rest = build_parser().parse_known_args(argv)
    if rest:
        args.parser.error(f"unrecognized arguments: {' '.join(rest)}")  # the main parser's --help does not know them
    if not args.command:
        args.parser.error(f"no command; one of {', '.join(_COMMANDS)}")
    try:
        asyncio.run(args.run(args))
    except UserError as error:
        for line in error.args:
            log_line(f"ptth {args.command}: {line}")
        return error.status
    except (OSError, ImportError) as error:  # no descriptors left, or a part of Python is missing
        log_line(f"ptth {args.command}: cannot go on: {format_error(error)}")
        return 1
    except KeyboardInterrupt:
        return 1  # before `stop_event` was set up
    return 0


if __name__ == "__main__":
    sys.exit(main())
