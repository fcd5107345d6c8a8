"""A picture by URL, for services that switch it on: public addresses only, checked where the connection goes.

The host's name is resolved once, every address it has must be public, and the connection is made to the address that
was checked, so that a name which resolves differently a moment later (DNS rebinding) gains nothing. Redirects are not
followed. Bytes are limited, and so is the time: for the whole of it, however slowly the host sends.
"""

import http.client
import io
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable
from typing import IO, Any, cast
from urllib.parse import urlsplit

from service.errors import InputError

_CHUNK = 64 * 1024
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_PORTS = {"http": 80, "https": 443}

Resolver = Callable[[str, int], list[str]]


def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host. Raises OSError where it has none."""
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def is_public(address: str) -> bool:
    """Whether an address belongs to the public internet; an IPv6 address that carries an IPv4 one counts as that.

    Of the others only global unicast does: older ways to carry one (::10.0.0.1, ::ffff:0:10.0.0.1) are outside it.
    """
    parsed: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        embedded = parsed.ipv4_mapped or parsed.sixtofour or (parsed.teredo[1] if parsed.teredo else None)
        if parsed in _NAT64:
            embedded = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
        if embedded is None and parsed not in _GLOBAL_UNICAST:
            return False
        parsed = embedded or parsed
    return parsed.is_global and not parsed.is_multicast


def fetch(
    url: str,
    *,
    max_bytes: int,
    timeout_s: float,
    resolver: Resolver = resolve,
    allowed: Callable[[str], bool] = is_public,
) -> bytes:
    """The body at an http or https URL. Blocks; `timeout_s` does not end a name server's silence.

    Raises InputError with code url_refused (the URL itself, or where it leads), url_failed or too_many_bytes.
    """
    until = time.monotonic() + timeout_s
    try:
        parts = urlsplit(url)
        host, scheme = parts.hostname, parts.scheme
        port = parts.port or _PORTS.get(scheme, 0)
    except ValueError:
        raise InputError("url_refused", f"{url[:128]!r} is not a URL") from None
    if scheme not in _PORTS or not host or parts.username is not None or not url.isascii() or " " in url:
        raise InputError("url_refused", "the URL must be http://HOST/... or https://HOST/..., without a user name")
    try:
        addresses = resolver(host, port)
    except (OSError, UnicodeError):
        raise InputError("url_failed", f"the host {host[:128]!r} has no address") from None
    if not addresses or not all(allowed(address) for address in addresses):
        raise InputError("url_refused", f"the host {host[:128]!r} is not on the public internet")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    try:
        with socket.create_connection((addresses[0], port), timeout=_left(until)) as connection:
            if scheme == "http":
                return _get(connection, parts.netloc, target, max_bytes, until)
            connection.settimeout(_left(until))
            with ssl.create_default_context().wrap_socket(connection, server_hostname=host) as secured:
                return _get(secured, parts.netloc, target, max_bytes, until)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = "it took too long" if isinstance(error, TimeoutError) else type(error).__name__
        raise failed(url, reason) from None


def failed(url: str, reason: str) -> InputError:
    """The error for a picture that the host did not give."""
    return InputError("url_failed", f"the picture at {url[:128]!r} could not be fetched: {reason}")


def _left(until: float) -> float:
    """Seconds until then. Raises TimeoutError where there are none."""
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class _Timed(io.RawIOBase):
    """What a connection receives, until then: a socket's own time limit begins anew with each byte."""

    def __init__(self, connection: socket.socket, until: float) -> None:
        self._connection = connection
        self._until = until

    def readable(self) -> bool:
        """As of any raw stream."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As of any raw stream. Raises TimeoutError when the time is over."""
        self._connection.settimeout(_left(self._until))
        return self._connection.recv_into(buffer)

    def makefile(self, _: str) -> IO[bytes]:
        """What HTTPResponse asks a socket for."""
        return io.BufferedReader(self)


def _get(connection: socket.socket, host: str, target: str, max_bytes: int, until: float) -> bytes:
    """One GET over a connection that is made already; the time limit holds for the whole of it."""
    lines = (
        f"GET {target} HTTP/1.1",
        f"Host: {host}",
        "Accept: image/*",
        "User-Agent: encnet-serve",
        "Connection: close",
    )
    connection.settimeout(_left(until))
    connection.sendall("".join(f"{line}\r\n" for line in (*lines, "")).encode("ascii"))
    response = http.client.HTTPResponse(cast(socket.socket, _Timed(connection, until)), method="GET")
    response.begin()
    if response.status != 200:
        raise InputError("url_failed", f"the picture's host answered {response.status}; redirects are not followed")
    body = bytearray()
    while chunk := response.read1(_CHUNK):
        body += chunk
        if len(body) > max_bytes:
            raise InputError("too_many_bytes", f"the picture at the URL is larger than the {max_bytes} bytes allowed")
    if not body:
        raise InputError("url_failed", "the picture's host answered 200 without a picture: the body is empty")
    return bytes(body)
