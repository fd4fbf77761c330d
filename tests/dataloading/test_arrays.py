"""Pictures as arrays: the values that are stored, by region, from files that may be damaged or made to harm."""

import io
import os
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import ExifTags, Image

from fsr_fast.dataloading.arrays import TURNS, open_array
from fsr_fast.dataloading.images import UPRIGHT, DamagedFileError, orientation

RANDOM = np.random.default_rng(0)
DEEP = RANDOM.integers(0, 2**16, (70, 90, 3), dtype=np.uint16)
REGION = (slice(13, 61), slice(7, 80))
TIFFS: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
    "strips": (DEEP, {"rowsperstrip": 16}),
    "one strip": (DEEP, {"rowsperstrip": 70}),
    "one compressed strip": (DEEP, {"rowsperstrip": 70, "compression": "zlib"}),
    "tiles": (DEEP, {"tile": (32, 16)}),
    "compressed tiles": (DEEP, {"tile": (32, 16), "compression": "zlib", "predictor": True}),
    "LZW": (DEEP, {"rowsperstrip": 16, "compression": "lzw"}),
    "Zstandard": (DEEP, {"tile": (32, 16), "compression": "zstd"}),
    "planes": (DEEP, {"planarconfig": "separate"}),
    "tiled planes": (DEEP, {"planarconfig": "separate", "tile": (32, 16)}),
    "grey": (DEEP[..., :1], {"tile": (32, 16)}),
    "seven pages": (RANDOM.integers(0, 99, (70, 90, 7), dtype=np.int16), {"tile": (32, 16)}),
    "float": (RANDOM.normal(size=(70, 90, 5)).astype(np.float32), {"tile": (32, 16)}),
    "big endian": (DEEP, {"byteorder": ">", "rowsperstrip": 16}),
    "BigTIFF": (DEEP, {"bigtiff": True}),
}


def write_tiff(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    """Three channels as colours, any other number as pages."""
    byteorder, bigtiff = options.pop("byteorder", None), options.pop("bigtiff", False)
    with tifffile.TiffWriter(path, byteorder=byteorder, bigtiff=bigtiff) as writer:
        if pixels.shape[2] == 3:
            separate = options.get("planarconfig") == "separate"
            writer.write(pixels.transpose(2, 0, 1) if separate else pixels, photometric="rgb", metadata=None, **options)
        else:
            for channel in range(pixels.shape[2]):
                writer.write(pixels[..., channel], photometric="minisblack", metadata=None, **options)
    return path


@pytest.mark.parametrize("kind", TIFFS)
@pytest.mark.parametrize("as_bytes", [False, True])
def test_a_tiff_gives_its_values_whole_and_by_region(tmp_path: Path, kind: str, as_bytes: bool) -> None:
    pixels, options = TIFFS[kind]
    path = write_tiff(tmp_path / "picture.tif", pixels, **options)
    opened = open_array(path.read_bytes() if as_bytes else path)
    assert (opened.shape, opened.dtype) == (pixels.shape, pixels.dtype)
    np.testing.assert_array_equal(opened[:, :], pixels)
    np.testing.assert_array_equal(opened[REGION], pixels[REGION])
    assert opened[5:5, :].shape == (0, 90, pixels.shape[2])


def test_a_region_decodes_the_tiles_that_it_touches_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_array(write_tiff(tmp_path / "picture.tif", DEEP, tile=(16, 16), compression="zlib"))
    decoded = []
    decode = tifffile.TiffPage.decode.func  # type: ignore[attr-defined]

    def count(page: Any) -> Any:
        return lambda content, index, **options: decoded.append(index) or decode(page)(content, index, **options)

    monkeypatch.setattr(tifffile.TiffPage, "decode", property(count))
    opened[16:48, 32:48]
    assert decoded == [8, 14]  # six tiles in a row
    opened[20:40, 33:40]
    assert decoded == [8, 14]  # kept


def test_a_page_of_colours_is_the_picture_whatever_follows(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "scan.tif") as writer:
        writer.write(DEEP, photometric="rgb", metadata=None)
        writer.write(DEEP[::2, ::2], photometric="rgb", metadata=None)
    np.testing.assert_array_equal(open_array(tmp_path / "scan.tif")[:, :], DEEP)


def test_overviews_are_no_channels(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "height.tif") as writer:
        writer.write(DEEP[..., 0], metadata=None)
        writer.write(DEEP[::2, ::2, 0], subfiletype=1, metadata=None)
    assert open_array(tmp_path / "height.tif").shape == (70, 90, 1)


def test_other_files_that_a_tiff_names_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile.imwrite(tmp_path / "set.ome.tif", DEEP[..., 0], ome=True, metadata={"axes": "YX"})
    text = tifffile.TiffFile(tmp_path / "set.ome.tif").ome_metadata
    assert text
    other = '<TiffData><UUID FileName="secret.ome.tif">urn:uuid:1</UUID></TiffData><TiffData '
    tifffile.imwrite(tmp_path / "set.ome.tif", DEEP[..., 0], description=text.replace("<TiffData ", other))
    opened = []
    start: Any = tifffile.FileHandle.__init__

    def note(self: Any, file: Any, *more: Any, **options: Any) -> None:
        opened.append(file)
        start(self, file, *more, **options)

    monkeypatch.setattr(tifffile.FileHandle, "__init__", note)
    assert open_array(tmp_path / "set.ome.tif").shape == (70, 90, 1)
    assert opened == [tmp_path / "set.ome.tif"]


@pytest.mark.parametrize("number", range(1, 9))
def test_every_orientation_of_an_array_is_turned_as_that_of_a_picture(number: int) -> None:
    pixels = RANDOM.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    expected = Image.fromarray(pixels)
    expected = expected.transpose(UPRIGHT[number]) if number in UPRIGHT else expected
    np.testing.assert_array_equal(TURNS.get(number, np.asarray)(pixels), np.asarray(expected))


def test_a_deep_tiff_is_turned_upright(tmp_path: Path) -> None:
    write_tiff(tmp_path / "turned.tif", DEEP, extratags=[(274, 3, 1, 6, True)])
    np.testing.assert_array_equal(open_array(tmp_path / "turned.tif")[:, :], DEEP.swapaxes(0, 1)[:, ::-1])


@pytest.mark.parametrize("photometric", ["miniswhite", "palette"])
def test_the_lowest_value_may_be_white_or_a_colour(tmp_path: Path, photometric: str) -> None:
    colours = (np.arange(768) * 257 % 65536).astype(np.uint16).reshape(3, 256)
    values = np.array([[0, 1, 255]], np.uint8)
    extra = {"colormap": colours} if photometric == "palette" else {}
    tifffile.imwrite(tmp_path / "odd.tif", values, photometric=photometric, **extra)
    with Image.open(tmp_path / "odd.tif") as expected:
        as_shown = np.atleast_3d(np.asarray(expected.convert("L" if not extra else "RGB")))
    np.testing.assert_array_equal(open_array(tmp_path / "odd.tif")[:, :], as_shown)


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_of_numpy_is_itself(tmp_path: Path, shape: tuple[int, ...], as_bytes: bool, order: Any) -> None:
    values = np.asarray(RANDOM.normal(size=shape), order=order)
    np.save(tmp_path / "picture.npy", values)
    opened = open_array((tmp_path / "picture.npy").read_bytes() if as_bytes else tmp_path / "picture.npy")
    np.testing.assert_array_equal(opened[1:3, 2:5], np.atleast_3d(values)[1:3, 2:5])
    assert isinstance(opened, np.memmap) != as_bytes  # of a file no more is read than is asked for


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_all_sixteen_bits_of_a_png_are_read(tmp_path: Path, channels: int) -> None:
    values = RANDOM.integers(0, 2**16, (5, 7, channels), dtype=np.uint16)
    (tmp_path / "deep.png").write_bytes(imagecodecs.png_encode(values))
    opened = open_array(tmp_path / "deep.png")
    assert opened.dtype == np.uint16
    np.testing.assert_array_equal(opened[:, :], values)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_pictures_of_eight_bits_have_the_channels_that_they_store(tmp_path: Path, mode: str) -> None:
    picture = Image.fromarray(RANDOM.integers(0, 256, (5, 7, 3), dtype=np.uint8)).convert(mode)
    picture.save(tmp_path / "picture.tif")
    channels = {"1": 1, "L": 1, "LA": 2, "RGBA": 4}.get(mode, 3)
    expected = picture.convert("L") if mode == "1" else picture.convert("RGB") if channels == 3 else picture
    opened = open_array(tmp_path / "picture.tif")
    assert (opened.shape, opened.dtype) == ((5, 7, channels), np.uint8)
    np.testing.assert_array_equal(opened[:, :], np.asarray(expected).reshape(opened.shape))


def dicom(path: Path, stored: np.ndarray, **elements: Any) -> Path:
    pydicom = pytest.importorskip("pydicom")
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.SOPClassUID, data.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", "1.2.3"
    data.Rows, data.Columns = stored.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 12, 11
    data.PixelRepresentation = int(stored.dtype.kind == "i")
    data.PixelData = stored.tobytes()
    for name, value in elements.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return path


def test_a_dicom_picture_has_the_values_of_its_modality(tmp_path: Path) -> None:
    stored = RANDOM.integers(0, 4096, (6, 5), dtype=np.uint16)
    opened = open_array(dicom(tmp_path / "ct.dcm", stored, RescaleSlope=2, RescaleIntercept=-1024))
    assert opened.dtype.kind == "i"
    np.testing.assert_array_equal(opened[:, :][..., 0], 2 * stored.astype(int) - 1024)


def test_a_dicom_picture_whose_lowest_value_is_white_is_turned_over(tmp_path: Path) -> None:
    stored = RANDOM.integers(0, 4096, (6, 5), dtype=np.uint16)
    path = dicom(tmp_path / "xray.dcm", stored, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(open_array(path)[:, :][..., 0], 4095 - stored)


class Runs:
    """Would be run if it were unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("unpickled",)


def bad_files(folder: Path) -> dict[str, Path]:
    """Damaged files, and files that are not pictures, by what the message says about them."""
    files = {}

    def keep(reason: str, name: str, content: bytes) -> None:
        files[reason] = folder / name
        files[reason].write_bytes(content)

    objects = io.BytesIO()
    np.lib.format.write_array(objects, np.array([[Runs()]], object), allow_pickle=True)
    keep("object", "objects.npy", objects.getvalue())
    keep("cannot be decoded", "pickle.npy", pickle.dumps(Runs()))
    lies = io.BytesIO()
    np.lib.format.write_array_header_1_0(lies, {"descr": "<f4", "fortran_order": False, "shape": (99, 99)})
    keep("cannot be decoded: ", "short.npy", lies.getvalue() + bytes(40))
    np.save(folder / "volume.npy", np.zeros((2, 3, 4, 5)))
    files[r"expected \(H, W\) or \(H, W, C\)"] = folder / "volume.npy"
    np.save(folder / "complex.npy", np.zeros((2, 3), complex))
    files["complex128"] = folder / "complex.npy"
    keep("cannot be decoded:  ?", "empty.tif", b"II*\0")
    return files


@pytest.mark.parametrize("as_bytes", [False, True])
def test_what_is_damaged_or_no_picture_is_refused(tmp_path: Path, as_bytes: bool) -> None:
    for reason, path in bad_files(tmp_path).items():
        with pytest.raises(DamagedFileError, match=reason) as caught:
            open_array(path.read_bytes() if as_bytes else path, str(path))[:, :]
        assert str(caught.value).startswith(f"{path}: ")


def test_a_film_is_refused(tmp_path: Path) -> None:
    path = dicom(tmp_path / "film.dcm", np.zeros((3, 6, 5), np.uint16), NumberOfFrames=3)
    with pytest.raises(DamagedFileError, match="a DICOM file of 3 frames; expected one picture per file: write each"):
        open_array(path)


def test_the_documented_way_writes_the_frames_of_a_film_as_pictures_or_channels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = RANDOM.integers(0, 4096, (3, 6, 5), dtype=np.uint16)
    path = dicom(tmp_path / "film.dcm", frames, NumberOfFrames=3, RescaleSlope=2, RescaleIntercept=-1024)
    page = (Path(__file__).parents[2] / "docs/scientific.md").read_text()
    (program,) = re.findall(r"```python title=\"frames.py\"\n(.*?)```", page, re.DOTALL)
    for options in ([], ["--channels"]):
        monkeypatch.setattr(sys, "argv", ["frames.py", str(path), *options])
        exec(program, {})
    expected = 2 * frames.astype(int) - 1024
    for number in range(3):
        frame = open_array(tmp_path / f"film_{number + 1:03}.npy")[:, :]
        np.testing.assert_array_equal(frame[..., 0], expected[number])
    np.testing.assert_array_equal(open_array(tmp_path / "film.npy")[:, :], np.moveaxis(expected, 0, -1))


def test_dicom_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = dicom(tmp_path / "ct.dcm", np.zeros((6, 5), np.uint16))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(DamagedFileError, match=r"ct\.dcm: .*pip install 'fsr_fast\[scientific\]'"):
        open_array(path)


def test_a_tiff_that_ends_too_soon_says_so_where_it_is_read(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "cut.tif", DEEP, tile=(16, 16), compression="zlib")
    tags = [page.tags["TileOffsets"].valueoffset for page in tifffile.TiffFile(path).pages]
    assert max(tags) < 2000  # in front of the pixels
    os.truncate(path, path.stat().st_size - 3000)
    opened = open_array(path)
    np.testing.assert_array_equal(opened[:16, :16], DEEP[:16, :16])
    with pytest.raises(DamagedFileError, match=r"cut\.tif: cannot be decoded: the file ends within its tile or strip"):
        opened[:, :]


@pytest.mark.parametrize("ending", ["tif", "npy", "png", "dcm"])
def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path: Path, ending: str) -> None:
    path, pixels = tmp_path / f"large.{ending}", np.zeros((20, 30), np.uint16)
    if ending == "npy":
        np.save(path, pixels)
    elif ending == "dcm":
        dicom(path, pixels)
    else:
        Image.fromarray(pixels).save(path)
    for source in (path, path.read_bytes()):
        with pytest.raises(DamagedFileError, match=r"more than 599 pixels; .* raise --data\.max_pixels"):
            open_array(source, str(path), max_pixels=599)
        assert open_array(source, str(path), max_pixels=600).shape[:2] == (20, 30)


def test_a_limit_above_that_of_pillow_holds_and_pillows_own_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (40, 30)).save(tmp_path / "grey.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # twice as many are an error
    assert open_array(tmp_path / "grey.png", max_pixels=1200).shape == (30, 40, 1)
    assert Image.MAX_IMAGE_PIXELS == 500


def test_a_camera_held_upright_is_read_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(DEEP.astype(np.uint8)).save(tmp_path / "portrait.png", exif=exif)
    with Image.open(tmp_path / "portrait.png") as stored:
        assert orientation(stored) == 6
    assert open_array(tmp_path / "portrait.png").shape == (90, 70, 3)
