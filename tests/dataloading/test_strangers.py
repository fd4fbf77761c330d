"""Untrusted pictures: only the documented formats are opened, in one place."""

import os
from pathlib import Path

import pytest
from PIL import Image

from fsr_fast.dataloading.datasets import build_datasets
from fsr_fast.errors import UserError
from tests.dataloading.people import config

# --- pictures from strangers

STRANGERS: dict[str, tuple[bytes, str]] = {
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "PostScript"),
    "EPS of DOS": (b"\xc5\xd0\xd3\xc6" + bytes(28) + b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript"),
    "WMF": (b"\xd7\xcd\xc6\x9a\0\0" + bytes(70), "Windows metafile"),
    "PDF": (b"%PDF-1.7\n1 0 obj\n", "a PDF document"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"><rect/></svg>', "a drawing"),
    "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0", "save it as JPEG"),
    "GIF": (b"GIF89a\1\0\1\0\x80\0\0\0\0\0\0\0\0,\0\0\0\0\1\0\1\0\0\2\2D\1\0;", "a GIF"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
}


@pytest.mark.parametrize("case", STRANGERS)
def test_only_the_documented_formats_are_opened(
    mydata: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    ghost = tmp_path / "bin/gs"
    ghost.parent.mkdir()
    ghost.write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
    ghost.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ghost.parent}:{os.environ['PATH']}")
    content, reason = STRANGERS[case]
    (mydata / "images/a.jpg").write_bytes(content)
    train, _ = build_datasets(config(mydata))
    with pytest.raises(UserError, match=r"a\.jpg: cannot be decoded: it is") as caught:
        train.image(0)
    assert reason in str(caught.value)
    assert "object at" not in str(caught.value)
    assert not (tmp_path / "called").exists()


def test_pillow_is_asked_for_pictures_in_one_place() -> None:
    package = Path(__file__).parents[2]
    files = [*package.glob("dataloading/*.py"), *package.glob("fsr_fast/**/*.py")]
    opening = {file.name for file in files if "Image.open(" in file.read_text(encoding="utf-8")}
    assert opening == {"images.py"}


def test_a_jpeg_of_thousands_of_scans_is_refused_undecoded(mydata: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.effect_noise((64, 64), 50).save(mydata / "images/a.jpg", progressive=True)
    content = (mydata / "images/a.jpg").read_bytes()
    start = content.rindex(b"\xff\xda")
    (mydata / "images/a.jpg").write_bytes(content[:-2] + content[start:-2] * 3000 + b"\xff\xd9")
    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(UserError, match=r"a\.jpg: cannot be decoded: a JPEG of more than 100 scans"):
        build_datasets(config(mydata))[0].image(0)
