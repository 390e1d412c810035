"""Pictures that a request names: where they may come from, and how they are fetched."""

import base64
import contextlib
import functools
import http.client
import ipaddress
import socket
import ssl
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from delta_llava.errors import UserError, printable, told

from ..processing_delta_llava import DOWNLOAD_HANDLERS, MAX_DOWNLOAD_BYTES, download_picture

# What clients send. Pillow knows more, among them one that runs a PostScript interpreter.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "TIFF", "WEBP")
# An address of IPv4 in the last 32 bits, which a gateway takes out (RFC 6052).
TRANSLATED = ipaddress.ip_network("64:ff9b::/96")
# Gateways of a site (RFC 8215), and IPv4 behind zeros (deprecated): no address of the public internet begins so.
LOCAL = (ipaddress.ip_network("64:ff9b:1::/48"), ipaddress.ip_network("::/96"))


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, also where IPv6 carries one of IPv4."""
    address = ipaddress.ip_address(address)
    if address.version == 6:
        if address.is_site_local or any(address in network for network in LOCAL):
            return False
        carried = address.ipv4_mapped or address.sixtofour
        if address in TRANSLATED:
            carried = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        address = carried or address
    return address.is_global and not address.is_multicast


def connect(host: str, port: int, timeout: float) -> socket.socket:
    """A connection to a host, made to the very address that was looked at: a name may have another one a moment later.

    Raises:
        ValueError: the name has an address that is not public.
        OSError: there is no such host, or it does not answer.
    """
    addresses = [entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not all(is_public(address) for address in addresses):
        raise ValueError(f"{host} is no host of the public internet")
    for address in addresses[:-1]:
        try:
            return socket.create_connection((address, port), timeout)
        except OSError:
            continue
    return socket.create_connection((addresses[-1], port), timeout)


class Sockets(list):
    """The connections of a download, so that others can end it: slow headers have no time limit of their own."""

    def shut(self) -> None:
        for each in self:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


class _PublicConnection(http.client.HTTPConnection):
    def __init__(self, sockets: Sockets, *arguments, **options):
        super().__init__(*arguments, **options)
        self.sockets = sockets

    def connect(self):
        self.sock = connect(self.host, self.port, self.timeout)
        self.sockets.append(self.sock)


class _PublicTLSConnection(http.client.HTTPSConnection):
    def __init__(self, sockets: Sockets, *arguments, **options):
        super().__init__(*arguments, **options)
        self.sockets = sockets

    def connect(self):
        plain = connect(self.host, self.port, self.timeout)
        self.sockets.append(plain)
        self.sock = tls_context().wrap_socket(plain, server_hostname=self.host)


@functools.cache
def tls_context() -> ssl.SSLContext:
    """One for all connections: reading the machine's certificates takes tens of milliseconds and half a megabyte."""
    return ssl.create_default_context()


class _PublicHandler(urllib.request.HTTPHandler):
    https_request = urllib.request.HTTPHandler.http_request

    def __init__(self, sockets: Sockets):
        super().__init__()
        self.sockets = sockets

    def http_open(self, request):
        return self.do_open(functools.partial(_PublicConnection, self.sockets), request)

    def https_open(self, request):
        connection = functools.partial(_PublicTLSConnection, self.sockets)
        return self.do_open(connection, request, context=tls_context())


# Every hop of a redirection is opened by this. A proxy would connect to what was not looked at: none is asked.
REPLACED = (urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler)
KEPT_HANDLERS = tuple(handler for handler in DOWNLOAD_HANDLERS if handler not in REPLACED)


def read_picture(address: str, allowed: Path | None, sockets: Sockets | None = None) -> bytes:
    """The file that a `data:`, `http(s):` or `file:` address or a path names, not yet decoded.

    Args:
        allowed: folder, resolved, whose files may be read; None for no files.
        sockets: takes the connections that are opened.

    Raises:
        UserError: it may not be fetched, or cannot be, or not within the limits of size and time.
    """
    shown = printable(address, 100)
    scheme = address.partition(":")[0].lower()
    if scheme == "data":
        header, comma, content = address.partition(",")
        if not comma or not header.endswith(";base64"):
            raise UserError(f"{shown} is no data address in base64: begin it with data:image/png;base64,")
        with told("the base64 text of a picture is damaged", "send it again"):
            return base64.b64decode(content)
    if scheme in ("http", "https"):
        with told(f"{shown} cannot be fetched", "send the picture itself, as a data:image/png;base64, address"):
            public = functools.partial(_PublicHandler, Sockets() if sockets is None else sockets)
            return download_picture(address, (*KEPT_HANDLERS, public))
    if allowed is None:
        raise UserError(f"{shown} is neither a data: nor an http(s): address, and this server reads no files")
    try:
        path = urllib.request.url2pathname(urlsplit(address).path) if scheme == "file" else address
        file = (allowed / path).resolve(strict=True)
        if not file.is_relative_to(allowed) or not file.is_file():
            raise ValueError
        with file.open("rb") as stream:
            content = stream.read(MAX_DOWNLOAD_BYTES + 1)
    except (OSError, ValueError, RuntimeError):
        # The same for a file that is not there as for one outside: which files there are is nobody's business.
        raise UserError(f"{shown} is no file that may be read in the folder that this server shows") from None
    if len(content) > MAX_DOWNLOAD_BYTES:
        raise UserError(f"{shown} is larger than {MAX_DOWNLOAD_BYTES:,} bytes: make it smaller")
    return content
