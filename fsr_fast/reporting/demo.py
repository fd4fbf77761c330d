"""A local page to drop a picture on and see masks and class activation maps."""

from __future__ import annotations

import ipaddress
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from PIL import Image

from fsr_fast.config import Config
from fsr_fast.dataloading.palette import voc_palette
from fsr_fast.errors import UserError
from fsr_fast.evaluation.inference import Prediction, read_picture, segment_batch
from fsr_fast.evaluation.passes import scale_pixels
from fsr_fast.models import Network
from fsr_fast.reporting.figures import TEMPLATES, borders, colourise, data_uri, heatmap, outline

WAITING = 4
"""Pictures that may wait for the network; more are refused."""
SENDING = 64
"""Clients that may send a picture at the same time; a slow one does not block the network."""
SILENCE = 30.0
"""Seconds of silence after which a client's connection is closed, and that its picture may take in total."""
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class DemoServer(ThreadingHTTPServer):
    """Serves the page and segments the pictures that it sends; keeps nothing after the answer.

    Args:
        place: host and port.
        network: in eval mode, on its device.
        largest: largest picture file, bytes.
        side: pictures are scaled down to this longer side, pixels.
        config: sections `evaluate`, `cam` and `run.amp`.

    Raises:
        OSError: the address is in use.
    """

    daemon_threads = True

    def __init__(self, place: tuple[str, int], network: Network, *, largest: int, side: int, config: Config) -> None:
        super().__init__(place, _Handler)
        self.network, self.largest, self.side, self.config = network, largest, side, config
        self.turn = threading.Lock()
        self.seats = threading.BoundedSemaphore(WAITING)
        self.senders = threading.BoundedSemaphore(SENDING)
        host, self.port = place[0], self.server_address[1]
        self.address = f"http://{host}:{self.port}/"
        here = {"127.0.0.1", "localhost", "[::1]"}
        self.open = host in ("0.0.0.0", "::")
        self.names = here if host in ("127.0.0.1", "localhost", "::1") else {host.lower()}
        if self.open:
            self.names = here | {socket.gethostname().lower(), socket.getfqdn().lower()}
        environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True)
        self.page = environment.get_template("demo.html").render(
            classes=network.classes, mib=largest // 2**20, style=Markup((TEMPLATES / "report.css").read_text("utf-8"))
        )

    def is_ours(self, host: str) -> bool:
        """Return whether a `Host` header names this server, by an address or a name that nobody else can point here."""
        name, _, port = host.lower().rpartition(":") if re.search(r":\d+$", host) else (host.lower(), "", "80")
        return port == str(self.port) and (name in self.names or (self.open and _is_address(name)))

    def answer(self, content: bytes) -> dict[str, Any]:
        """Segment a picture.

        Args:
            content: of its file.

        Returns:
            What the page shows, ready for JSON.

        Raises:
            UserError: it cannot be decoded.
        """
        reading = self.network.reading
        pixels = scale_pixels(read_picture(content, "the picture", reading), self.side)
        with self.turn:
            prediction = segment_batch(self.network, [pixels], self.config)[0]
        return _describe(Image.fromarray(reading.colours(pixels)), prediction)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay silent about a client that went away; its connection is closed."""


class _Handler(BaseHTTPRequestHandler):
    server: DemoServer
    timeout = SILENCE
    server_version, sys_version = "fsr_fast", ""

    def do_GET(self) -> None:
        if not self._is_welcome():
            return
        if self.path != "/":
            self._refuse(HTTPStatus.NOT_FOUND, "there is one page here, /")
            return
        self._send(HTTPStatus.OK, "text/html; charset=utf-8", self.server.page.encode())

    def do_POST(self) -> None:
        if not self._is_welcome():
            return
        length = self.headers.get("Content-Length", "")
        if self.path != "/segment":
            self._refuse(HTTPStatus.NOT_FOUND, "pictures go to /segment")
        elif "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdecimal()):
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "give the size of the picture in Content-Length")
        elif len(length) > 15 or int(length) > self.server.largest:
            limit = self.server.largest // 2**20
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the file is larger than {limit} MiB; scale it down")
        else:
            with _place(self.server.senders) as there:
                content = self._receive(int(length)) if there else None
            if not there:
                self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "too many pictures at once; try again")
            elif content is not None:
                self._segment(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log nothing: requests are private."""

    def _receive(self, length: int) -> bytes | None:
        """Read the picture; None if the client stops sending or takes too long."""
        content, ends = bytearray(), time.monotonic() + SILENCE
        try:
            while len(content) < length and (left := ends - time.monotonic()) > 0:
                self.connection.settimeout(left)
                part = self.rfile.read1(min(length - len(content), 65536))
                if not part:
                    break
                content += part
        finally:
            self.connection.settimeout(SILENCE)
        if len(content) == length:
            return bytes(content)
        self.close_connection = True
        return None

    def _segment(self, content: bytes) -> None:
        with _place(self.server.seats) as there:
            if not there:
                self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "too many pictures at once; try again")
                return
            try:
                answer = self.server.answer(content)
            except UserError as error:
                self._refuse(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
                return
        self._send(HTTPStatus.OK, "application/json", json.dumps(answer).encode())

    def _is_welcome(self) -> bool:
        """Answer only our own page: neither other sites in the same browser, nor names that resolve to this address."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if not self.server.is_ours(host):
            self._refuse(HTTPStatus.FORBIDDEN, f"open {self.server.address} instead")
        elif origin is not None and origin != f"http://{host}":
            self._refuse(HTTPStatus.FORBIDDEN, "pictures are only accepted from this page")
        else:
            return True
        return False

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        self.close_connection = True  # the rest of the client's data is not read
        self._send(status, "application/json", json.dumps({"error": reason}).encode())

    def _send(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def _place(places: threading.BoundedSemaphore) -> Iterator[bool]:
    there = places.acquire(blocking=False)
    try:
        yield there
    finally:
        if there:
            places.release()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def _describe(picture: Image.Image, prediction: Prediction) -> dict[str, Any]:
    image, mask = np.asarray(picture), prediction.mask
    names = list(prediction.scores)
    labels, counts = np.unique(mask, return_counts=True)
    opaque = (mask > 0) | borders(mask)  # the background is transparent
    colours = np.dstack([outline(colourise(mask), mask), np.where(opaque, 255, 0).astype(np.uint8)])
    return {
        "picture": data_uri(picture, None),
        "mask": data_uri(Image.fromarray(colours), None, lossless=True),
        "legend": [
            {
                "name": names[label - 1],
                "colour": "#" + "".join(f"{value:02x}" for value in voc_palette()[label]),
                "share": int(count) / mask.size,
            }
            for label, count in zip(labels.tolist(), counts.tolist(), strict=True)
            if label
        ],
        "scores": sorted(prediction.scores.items(), key=lambda item: -item[1]),
        "cams": [[name, data_uri(Image.fromarray(heatmap(image, cam)), None)] for name, cam in prediction.cams.items()],
    }
