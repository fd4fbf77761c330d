import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from fsr_fast.dataloading import images
from fsr_fast.dataloading.images import DamagedFileError, check_name, image_size, inside, read_image
from fsr_fast.dataloading.mask_files import read_mask

RED, GREEN, BLUE, WHITE = (230, 20, 20), (20, 200, 20), (20, 20, 230), (240, 240, 240)


def corners() -> Image.Image:
    """A picture of 48 × 32 pixels: red and green above, blue and white below."""
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:16, :24], pixels[:16, 24:], pixels[16:, :24], pixels[16:, 24:] = RED, GREEN, BLUE, WHITE
    return Image.fromarray(pixels)


def colour_at(image: Image.Image, x: int, y: int) -> np.ndarray:
    return np.array(image.getpixel((x, y)))


def assert_upright(image: Image.Image) -> None:
    assert (image.mode, image.size) == ("RGB", (48, 32))
    for colour, place in ((RED, (8, 8)), (GREEN, (40, 8)), (BLUE, (8, 24)), (WHITE, (40, 24))):
        np.testing.assert_allclose(colour_at(image, *place), colour, atol=12)


@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_files_and_their_bytes_give_the_same_pixels(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"corners.{ending}"
    corners().save(path)
    assert_upright(read_image(path))
    assert read_image(path).tobytes() == read_image(path.read_bytes()).tobytes()


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    corners().convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert_upright(read_image(tmp_path / "cmyk.jpg"))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1"])
def test_greyscale_and_palette_become_rgb(tmp_path: Path, mode: str) -> None:
    Image.new("L", (5, 4), 255).convert(mode).save(tmp_path / "grey.png")
    image = read_image(tmp_path / "grey.png")
    assert (image.mode, image.size) == ("RGB", (5, 4))
    assert colour_at(image, 2, 2).tolist() == [255, 255, 255]


def test_transparency_is_dropped(tmp_path: Path) -> None:
    Image.new("RGBA", (3, 3), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert colour_at(read_image(tmp_path / "clear.png"), 1, 1).tolist() == [10, 20, 30]


def test_the_upper_eight_of_sixteen_bits_are_kept(tmp_path: Path) -> None:
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert np.asarray(read_image(tmp_path / "deep.png"))[0, :, 1].tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize("ending", ["jpg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(tmp_path: Path, orientation: int, ending: str) -> None:
    undo = images.UPRIGHT.get(orientation)
    inverse = {
        Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270,
        Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90,
    }
    stored = corners() if undo is None else corners().transpose(inverse.get(undo, undo))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored.save(tmp_path / f"turned.{ending}", exif=exif)
    assert_upright(read_image(tmp_path / f"turned.{ending}"))
    assert image_size(tmp_path / f"turned.{ending}") == (48, 32)


def test_orientation_six_is_a_camera_held_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # the first stored row is the right side of the scene
    corners().save(tmp_path / "portrait.jpg", exif=exif, quality=95)
    image = read_image(tmp_path / "portrait.jpg")
    assert image.size == (32, 48)
    np.testing.assert_allclose(colour_at(image, 24, 8), RED, atol=12)
    np.testing.assert_allclose(colour_at(image, 8, 8), BLUE, atol=12)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_data_do_not_cost_the_image(tmp_path: Path) -> None:
    corners().save(tmp_path / "odd.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xffrubbish")
    assert_upright(read_image(tmp_path / "odd.jpg"))


def test_one_pixel_is_an_image(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (7, 8, 9)).save(tmp_path / "dot.png")
    assert np.asarray(read_image(tmp_path / "dot.png")).tolist() == [[[7, 8, 9]]]
    assert image_size(tmp_path / "dot.png") == (1, 1)


def test_twenty_thousand_pixels_are_read_as_long_as_there_are_few_of_them(tmp_path: Path) -> None:
    Image.new("L", (20_000, 20), 9).save(tmp_path / "wide.png")
    assert read_image(tmp_path / "wide.png").size == (20_000, 20)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 20_000])
def test_a_huge_image_is_refused_before_it_is_decoded(
    tmp_path: Path, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("1", (side, side)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    for read in (read_image, image_size):
        with pytest.raises(DamagedFileError, match=r"huge\.png: more than 80,000,000 pixels; scale it down"):
            read(tmp_path / "huge.png")


@pytest.mark.parametrize("name", ["zero.jpg", "cut.jpg", "text.png", "cut.png", "missing.jpg", "folder.jpg"])
def test_what_cannot_be_decoded_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "folder.jpg":
        path.mkdir()
    elif name == "text.png":
        path.write_text("no image")
    elif name != "missing.jpg":
        corners().resize((480, 320)).save(path)
        os.truncate(path, 0 if name == "zero.jpg" else path.stat().st_size // 2)
    expected = {"zero.jpg": "the file is empty", "missing.jpg": "no such file"}.get(name, "cannot be decoded")
    with pytest.raises(DamagedFileError) as caught:
        read_image(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert expected in str(caught.value)
    assert "take its id off the list" in str(caught.value)


def test_bytes_are_called_what_the_caller_says() -> None:
    with pytest.raises(DamagedFileError, match=r"^shard\.tar, dog: cannot be decoded: the file is empty"):
        read_image(b"", "shard.tar, dog")


@pytest.mark.parametrize("name", ["a dog.jpg", "straße 犬.jpg", "deep er/ä.jpg"])
def test_names_may_hold_spaces_and_any_letters(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    corners().save(tmp_path / name)
    assert_upright(read_image(inside(tmp_path, name)))


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret.jpg", "a/../../b", "a/..", "", "C:\\a.jpg"])
def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    for refuse in (check_name, lambda name: inside(tmp_path, name)):
        with pytest.raises(DamagedFileError, match="leads out of the data set"):
            refuse(name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a\0b", "control characters"),
        ("a\nb.jpg", "control characters"),
        ("\x1b[31mred.jpg", "control characters"),
        ("caf\udce9.jpg", "not in UTF-8"),
        (f"deep/{'x' * 251}", "too long"),
        (f"{'é' * 126}/a.jpg", "too long"),
    ],
)
def test_a_name_that_no_result_could_bear_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(DamagedFileError, match=f"{reason}.*rename it") as caught:
        check_name(name)
    assert "\x1b" not in str(caught.value)
    with pytest.raises(DamagedFileError, match=reason):
        inside(tmp_path, name)


def test_dots_within_a_name_are_no_way_out(tmp_path: Path) -> None:
    assert inside(tmp_path, "dog..1.jpg") == tmp_path / "dog..1.jpg"


def test_the_folder_is_not_a_file_in_itself(tmp_path: Path) -> None:
    with pytest.raises(DamagedFileError, match="leads out of"):
        inside(tmp_path, ".")


def test_a_link_to_a_place_outside_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "elsewhere").mkdir()
    corners().save(tmp_path / "elsewhere/secret.png")
    (tmp_path / "set/innocent.png").symlink_to(tmp_path / "elsewhere/secret.png")
    (tmp_path / "set/deep").symlink_to(tmp_path / "elsewhere")
    for name in ("innocent.png", "deep/secret.png"):
        with pytest.raises(DamagedFileError, match="symbolic link that leads out"):
            inside(tmp_path / "set", name)


def test_links_within_the_folder_and_a_folder_that_is_a_link_will_do(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    corners().save(tmp_path / "store/one.png")
    (tmp_path / "store/two.png").symlink_to("one.png")
    (tmp_path / "JPEGImages").symlink_to(tmp_path / "store")
    assert_upright(read_image(inside(tmp_path / "JPEGImages", "two.png")))


def test_masks_are_values_not_colours(tmp_path: Path) -> None:
    values = np.array([[0, 1, 2], [3, 255, 0]], np.uint8)
    palette = Image.fromarray(values, mode="P")
    palette.putpalette([255 - value // 3 for value in range(768)])
    palette.save(tmp_path / "palette.png")
    Image.fromarray(values).save(tmp_path / "grey.png")
    for name in ("palette.png", "grey.png"):
        mask = read_mask(tmp_path / name, 3)
        assert mask.dtype == np.uint8
        np.testing.assert_array_equal(mask, values)
    buffer = io.BytesIO((tmp_path / "palette.png").read_bytes())
    np.testing.assert_array_equal(read_mask(buffer.getvalue(), 3, "mask"), values)


def test_a_mask_value_without_a_class_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 7, 255]], np.uint8)).save(tmp_path / "mask.png")
    with pytest.raises(DamagedFileError, match="the value 7, but there are 3 classes"):
        read_mask(tmp_path / "mask.png", 3)


def damaged(content: bytes, draws: np.random.Generator) -> bytes:
    """Change up to eight bytes, and perhaps cut the end."""
    changed = bytearray(content)
    for place in draws.integers(0, len(changed), draws.integers(1, 9)):
        changed[place] = draws.integers(0, 256)
    return bytes(changed[: draws.integers(1, len(changed) + 1)] if draws.random() < 0.3 else changed)


@pytest.mark.fuzz
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_damaged_bytes_give_an_image_or_one_error(kind: str) -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    corners().save(buffer, kind, **({} if kind == "BMP" else {"exif": exif}))
    draws = np.random.default_rng(0)
    outcomes = []
    for _ in range(150):
        content = damaged(buffer.getvalue(), draws)
        try:
            outcomes.append(read_image(content, "picture").mode)
        except DamagedFileError as error:
            outcomes.append(str(error).partition(": ")[0])
    assert set(outcomes) == {"RGB", "picture"}


@pytest.mark.fuzz
@pytest.mark.filterwarnings("ignore")
def test_damaged_masks_give_values_or_one_error() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 4).save(buffer, "PNG")
    draws = np.random.default_rng(0)
    for _ in range(300):
        try:
            mask = read_mask(damaged(buffer.getvalue(), draws), 3, "mask")
        except DamagedFileError:
            continue
        assert mask.dtype == np.uint8
        assert mask.ndim == 2
        assert set(np.unique(mask)) <= {0, 1, 2, 3, 255}


def test_a_damaged_png_is_no_black_image() -> None:
    """Asking Pillow for the EXIF data of a PNG decodes it; the error must not be lost there."""
    target = io.BytesIO()
    Image.effect_noise((16, 16), 50).save(target, "PNG")
    content = bytearray(target.getvalue())
    start = content.index(b"IDAT") + 4
    content[start : start + 20] = bytes(20)
    with pytest.raises(DamagedFileError, match="cannot be decoded"):
        read_image(bytes(content))


def test_a_relative_folder_is_the_one_of_the_present_directory(tmp_path, monkeypatch):
    for name in ("first", "second"):
        (tmp_path / name / "images").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / name)
        assert inside(Path("images"), "a.jpg") == Path("images/a.jpg")
