"""Where webhooks may go, against requests forged through us (SSRF).

A URL is checked when a job is accepted, and at every attempt its name is resolved once, every address of it is checked,
and the connection goes to an address that was checked.
"""

import contextlib
import dataclasses
import ipaddress
import re
import socket
import urllib.parse
from collections.abc import Awaitable, Callable, Iterable, Sequence

import httpcore

from diffusion_kd import errors

_MOST_URL_CHARACTERS = 2048
_NAME = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_DEFAULT_PORTS = {"http": 80, "https": 443}

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""(host, port) -> its addresses as text, the preferred one first. Raises OSError."""


class WebhookRefused(errors.DiffusionKDError, ValueError):
    """A webhook URL to which the service will send nothing."""


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """A checked URL. host: lower case, an IPv6 address without brackets. path: with the query."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def receiver(self) -> str:
        """Host and port as a Host header has them; safe to log, unlike the path, which may hold a token."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


def check_url(url: str, *, allow_private: bool) -> None:
    """Refuse a webhook URL that cannot be right, before any name is resolved.

    allow_private: whether loopback, link-local and private addresses are allowed; for tests and closed networks.
    Raises WebhookRefused for another scheme than http(s), a user or password, a missing or malformed host or port,
    `localhost`, and every spelling of an address that is not public (decimal, octal, hex, IPv4 within IPv6).
    """
    target(url, allow_private=allow_private)


def target(url: str, *, allow_private: bool) -> Target:
    """A URL, checked as `check_url` does and taken apart."""
    if len(url) > _MOST_URL_CHARACTERS:
        raise WebhookRefused(f"the webhook URL has {len(url)} characters; at most {_MOST_URL_CHARACTERS} will do")
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        raise WebhookRefused(
            f"the webhook URL {url!r} holds a space, a backslash or a character outside ASCII; percent-encode it, "
            "and give a name outside ASCII as xn--"
        )
    try:
        parts = urllib.parse.urlsplit(url)
        scheme, host, port = parts.scheme, parts.hostname or "", parts.port
    except ValueError as error:
        raise WebhookRefused(f"the webhook URL {url!r} is malformed: {error}") from None
    if scheme not in _DEFAULT_PORTS:
        raise WebhookRefused(f"the webhook URL has the scheme {scheme!r}; it must begin with https:// or http://")
    if "@" in parts.netloc:
        raise WebhookRefused("the webhook URL holds a user or password; leave them out, and verify our signature")
    if port == 0:
        raise WebhookRefused("the webhook URL has port 0; it must be 1 to 65535")
    host = host.removesuffix(".")
    _check_host(host, allow_private=allow_private)
    query = f"?{parts.query}" if parts.query else ""
    return Target(scheme, host, port or _DEFAULT_PORTS[scheme], (parts.path or "/") + query)


def _check_host(host: str, *, allow_private: bool) -> None:
    literal = _literal(host)
    if literal is None and (len(host) > 253 or not _NAME.fullmatch(host)):
        raise WebhookRefused(f"the webhook URL's host is {host!r}; it must be the name of a public host")
    if allow_private:
        return
    if literal is not None and not _is_public(literal):
        raise WebhookRefused(f"the webhook URL's host {host!r} is the address {literal}, which is not public")
    if host == "localhost" or host.endswith(".localhost"):
        raise WebhookRefused(f"the webhook URL's host {host!r} is this machine; it must be a public host")


def _literal(host: str) -> Address | None:
    """The address that a host spells in any way a resolver would take, such as `2130706433` or `0x7f.1`; else None."""
    if ":" in host:
        with contextlib.suppress(ValueError):
            return None if "%" in host else ipaddress.IPv6Address(host)
        return None
    with contextlib.suppress(OSError):
        return ipaddress.IPv4Address(socket.inet_aton(host))
    return None


def _is_public(address: Address) -> bool:
    """Whether an address belongs to the public internet; an IPv4 address within an IPv6 one counts as itself."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return _is_public(address.ipv4_mapped)
        if address in _NAT64:
            return _is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        inner = (address.sixtofour, *(address.teredo or ()))
        if address.is_site_local or not all(_is_public(one) for one in inner if one is not None):
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


class CheckedConnections(httpcore.AsyncNetworkBackend):
    """Connects to names by addresses that were checked, so that a second resolution cannot give another one.

    TLS goes on to ask for, and check the certificate of, the name: httpcore does that above this layer.
    """

    def __init__(self, resolve: Resolve, *, allow_private: bool) -> None:
        self._resolve, self._allow_private = resolve, allow_private
        self._tcp = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        addresses = await self._addresses(host, port)
        each_s = None if timeout is None else timeout / len(addresses)
        for address in addresses[:-1]:
            with contextlib.suppress(httpcore.ConnectError, httpcore.ConnectTimeout):
                return await self._tcp.connect_tcp(address, port, each_s, local_address, socket_options)
        return await self._tcp.connect_tcp(addresses[-1], port, each_s, local_address, socket_options)

    async def _addresses(self, host: str, port: int) -> Sequence[str]:
        literal = _literal(host)
        try:
            addresses = await self._resolve(host, port) if literal is None else [str(literal)]
        except OSError as error:
            raise httpcore.ConnectError(f"its name cannot be resolved ({errors.first_line(error)})") from error
        if not addresses:
            raise httpcore.ConnectError("its name has no address")
        if not self._allow_private:
            for address in addresses:
                if not _is_public(ipaddress.ip_address(address)):
                    raise WebhookRefused(f"the webhook's host {host} has the address {address}, which is not public")
        return addresses
