import base64
import http.client
import io
import json
import os
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fsr_fast.commands.serve import main
from fsr_fast.errors import UserError
from fsr_fast.evaluation.inference import Prediction, segment_batch
from fsr_fast.models.build import Trained
from fsr_fast.reporting.demo import WAITING, DemoServer
from fsr_fast.reporting.figures import borders
from tests import helpers
from tests.browser import open_page

RECIPE = helpers.config()
NETWORK = helpers.network(RECIPE).eval()
LARGEST = 50_000


@pytest.fixture(scope="module")
def server():
    with DemoServer(("127.0.0.1", 0), NETWORK, largest=LARGEST, side=48, config=RECIPE) as demo:
        thread = threading.Thread(target=demo.serve_forever)
        thread.start()
        yield demo
        demo.shutdown()
        thread.join()


def encoded(width: int = 40, height: int = 30, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


def ask(server, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict, bytes]:
    connection = http.client.HTTPConnection(*server.server_address)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    return response.status, dict(response.headers), answer


def raw(server, text: bytes) -> bytes:
    """Send bytes as they are, close our side, and give all that comes back."""
    with socket.create_connection(server.server_address) as client:
        client.sendall(text)
        client.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: client.recv(65536), b""))


def request(server, *lines: str) -> bytes:
    host = f"Host: 127.0.0.1:{server.server_address[1]}"
    return "\r\n".join([lines[0], host, *lines[1:], "", ""]).encode()


def test_a_picture_gets_its_scores_masks_and_maps(server):
    status, headers, body = ask(server, "POST", "/segment", encoded())
    assert status == 200
    assert headers["Content-Security-Policy"].startswith("default-src 'none'")
    answer = json.loads(body)
    expected = segment_batch(NETWORK, [Image.open(io.BytesIO(encoded()))], RECIPE)[0]
    assert dict(answer["scores"]) == pytest.approx(expected.scores, rel=1e-5)
    assert [name for name, _ in answer["cams"]] == list(expected.cams)
    shares = {entry["name"]: entry["share"] for entry in answer["legend"]}
    for number, name in enumerate(helpers.CLASSES, start=1):
        assert shares.get(name, 0) == pytest.approx((expected.mask == number).mean())
    picture, mask = (
        Image.open(io.BytesIO(base64.b64decode(answer[key].partition(",")[2]))) for key in ("picture", "mask")
    )
    assert (picture.size, mask.size) == ((40, 30), (40, 30))
    shown = np.asarray(mask.convert("RGBA"))
    np.testing.assert_array_equal(shown[..., 3] == 255, (expected.mask > 0) | borders(expected.mask))
    assert (shown[borders(expected.mask)] == 255).all(), "white, so that dark colours are seen"


def test_an_object_is_outlined_on_the_transparent_background_too(server, monkeypatch):
    mask = np.zeros((30, 40), np.uint8)
    mask[10:20, 10:20] = 1
    found = Prediction(mask, dict.fromkeys(helpers.CLASSES, 0.5), {}, np.zeros((1 + len(helpers.CLASSES), 30, 40)))
    monkeypatch.setattr("fsr_fast.reporting.demo.segment_batch", lambda *_: [found])
    answer = json.loads(ask(server, "POST", "/segment", encoded())[2])
    shown = Image.open(io.BytesIO(base64.b64decode(answer["mask"].partition(",")[2]))).convert("RGBA")
    assert shown.getpixel((15, 20)) == (255, 255, 255, 255), "the row below the object"
    assert shown.getpixel((15, 22))[3] == 0


def test_large_pictures_are_scaled_down(server):
    answer = json.loads(ask(server, "POST", "/segment", encoded(120, 60, "JPEG"))[2])
    assert len(answer["scores"]) == len(helpers.CLASSES)
    _, _, content = answer["picture"].partition(",")
    assert Image.open(io.BytesIO(base64.b64decode(content))).size == (48, 24)


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"", 422, "the file is empty"),
        (b"not a picture", 422, "cannot be decoded"),
        (encoded()[:200], 422, "cannot be decoded"),
        (b"GIF89a" + b"\xff" * 300, 422, "cannot be decoded"),
        (b"x" * (LARGEST + 1), 413, "larger than"),
    ],
)
def test_what_is_no_picture_is_refused(server, body, status, reason):
    found, _, answer = ask(server, "POST", "/segment", body)
    assert found == status
    assert reason in json.loads(answer)["error"]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_not_decoded(server):
    content = io.BytesIO()
    Image.new("1", (20_000, 5_000)).save(content, "PNG")
    assert len(content.getvalue()) < LARGEST
    status, _, answer = ask(server, "POST", "/segment", content.getvalue())
    assert status == 422
    assert "more than 80,000,000 pixels" in json.loads(answer)["error"]


@pytest.mark.parametrize("path", ["/../../etc/passwd", "//etc/passwd", "/%2e%2e/", "/index.html", "/?x"])
def test_there_is_one_page_and_no_file(server, path):
    assert ask(server, "GET", path)[0] == 404


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "TRACE", "HEAD"])
def test_other_methods_are_refused(server, method):
    assert ask(server, method, "/")[0] == 501


@pytest.mark.parametrize("length", ["-1", "1e3", "", "0x10", "\u0663", "9" * 400])
def test_sizes_that_are_none_are_refused(server, length):
    answer = raw(server, request(server, "POST /segment HTTP/1.1", f"Content-Length: {length}"))
    assert answer.startswith((b"HTTP/1.0 411", b"HTTP/1.0 413"))


def test_chunks_are_refused(server):
    answer = raw(server, request(server, "POST /segment HTTP/1.1", "Transfer-Encoding: chunked", "Content-Length: 5"))
    assert answer.startswith(b"HTTP/1.0 411")


@pytest.mark.parametrize("text", [b"", b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"POST /segment HTTP/9.9\r\n\r\n"])
def test_noise_does_not_stop_the_server(server, text):
    raw(server, text)
    assert ask(server, "GET", "/")[0] == 200


def test_a_body_that_ends_early_gets_no_answer_and_frees_its_seat(server):
    for _ in range(WAITING + 1):
        raw(server, request(server, "POST /segment HTTP/1.1", "Content-Length: 100") + b"half")
    assert ask(server, "POST", "/segment", encoded())[0] == 200


def test_other_sites_and_other_names_are_turned_away(server):
    port = server.server_address[1]
    assert ask(server, "GET", "/", Host=f"localhost:{port}")[0] == 200
    assert ask(server, "GET", "/", Host=f"evil.example:{port}")[0] == 403
    assert ask(server, "POST", "/segment", encoded(), Origin="http://evil.example")[0] == 403
    assert ask(server, "POST", "/segment", encoded(), Origin=f"http://127.0.0.1:{port}")[0] == 200


def test_more_pictures_than_may_wait_are_turned_away(server):
    for _ in range(WAITING):
        server.seats.acquire()
    try:
        assert ask(server, "POST", "/segment", encoded())[0] == 503
    finally:
        for _ in range(WAITING):
            server.seats.release()


def test_nothing_is_written(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert ask(server, "POST", "/segment", encoded())[0] == 200
    assert list(tmp_path.iterdir()) == []


def test_the_page_shows_a_picture_in_the_browser(server, tmp_path):
    (tmp_path / "cat & <b>.png").write_bytes(encoded())
    with open_page(server.address) as page:
        page.get_by_label("choose a file").set_input_files(tmp_path / "cat & <b>.png")
        page.get_by_text("cat & <b>.png: done").wait_for()
        assert page.locator("#scores tr").count() == len(helpers.CLASSES)
        assert page.locator("#cams img").count() >= 1
        assert page.locator("#picture").evaluate("picture => picture.naturalWidth") == 40
        page.get_by_label("Opacity").fill("0")
        assert page.locator("#mask").evaluate("mask => mask.style.opacity") == "0"


def test_a_place_that_is_taken_and_a_port_that_is_none_are_refused(server, tmp_path, monkeypatch):
    monkeypatch.setattr("fsr_fast.commands.serve.open_trained", lambda *arguments: Trained(NETWORK, RECIPE, None, True))
    with pytest.raises(UserError, match=r"cannot listen on 127\.0\.0\.1:\d+"):
        main(["--checkpoint", "run", "--port", str(server.server_address[1])])
    with pytest.raises(UserError, match="--port: 70000; expected 0"):
        main(["--checkpoint", "run", "--port", "70000"])
    for option in ("--side", "--max-mib"):
        with pytest.raises(UserError, match=f"{option}: 0; expected 1 or more"):
            main(["--checkpoint", "run", option, "0", "--port", str(server.server_address[1])])
    assert not list(Path(tmp_path).iterdir())


def test_names_of_classes_are_text_in_the_page():
    network = helpers.network(RECIPE)
    network.classes = ("<script>alert(1)</script>", "\"'`", "{{ 7 * 7 }}")
    page = served("127.0.0.1", 8000, network).page
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "{{ 7 * 7 }}" in page


# --- whom it answers


def served(host: str, port: int, network=NETWORK) -> DemoServer:
    with pytest.MonkeyPatch.context() as patch:  # without listening on the port
        patch.setattr(DemoServer, "server_bind", lambda self: setattr(self, "server_address", (host, port)))
        patch.setattr(DemoServer, "server_activate", lambda self: None)
        demo = DemoServer((host, port), network, largest=LARGEST, side=48, config=RECIPE)
    demo.server_close()
    return demo


@pytest.mark.parametrize(
    ("host", "port", "header", "welcome"),
    [
        ("127.0.0.1", 80, "127.0.0.1", True),
        ("127.0.0.1", 80, "localhost:80", True),
        ("127.0.0.1", 80, "LOCALHOST", True),
        ("127.0.0.1", 8000, "127.0.0.1", False),
        ("127.0.0.1", 8000, "[::1]:8000", True),
        ("127.0.0.1", 8000, "evil.example:8000", False),
        ("127.0.0.1", 8000, "", False),
        ("0.0.0.0", 8000, "192.168.1.7:8000", True),
        ("0.0.0.0", 8000, f"{socket.gethostname()}:8000", True),
        ("0.0.0.0", 8000, "evil.example:8000", False),
        ("0.0.0.0", 8000, "192.168.1.7.evil.example:8000", False),
        ("0.0.0.0", 8000, "", False),
    ],
)
def test_it_answers_to_its_own_addresses_alone(host, port, header, welcome):
    assert served(host, port).is_ours(header) == welcome


def test_slow_senders_take_no_place_from_a_picture_that_is_there(server):
    port = server.server_address[1]
    head = f"POST /segment HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: 1000\r\n\r\n".encode()
    slow = [socket.create_connection(server.server_address) for _ in range(WAITING + 2)]
    for client in slow:
        client.sendall(head + b"x")
    assert ask(server, "POST", "/segment", encoded())[0] == 200
    for client in slow:
        client.close()


def test_a_picture_that_takes_too_long_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr("fsr_fast.reporting.demo.SILENCE", 0.0)
    answer = raw(server, request(server, "POST /segment HTTP/1.1", "Content-Length: 100"))
    assert answer == b""


def test_two_hundred_requests_leave_nothing_behind(server):
    ask(server, "POST", "/segment", b"not a picture")
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(200):
        ask(server, "POST", "/segment", b"not a picture")
    assert threading.active_count() <= before[0] + 2
    assert len(os.listdir("/proc/self/fd")) <= before[1] + 4
