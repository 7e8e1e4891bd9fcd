"""Images are the same whoever decodes them, damaged ones are told from sound ones, and sizes follow one formula."""

import struct
import zlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from apps.reid import images as module
from apps.reid.images import ImageError, load_image, png_bytes, read_image, resize

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def picture(channels: int, height: int, width: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (channels, height, width), dtype=torch.uint8, generator=generator)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, colour: int, rows: bytes, *, depth: int = 8, interlaced: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    return SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def filtered(image: Tensor, filters: list[int]) -> bytes:
    """The rows of an image as the format's text defines them, byte by byte."""
    channels, height, width = image.shape
    pixels = image.permute(1, 2, 0).reshape(height, width * channels).tolist()
    out = bytearray()
    for y in range(height):
        out.append(filters[y])
        for i in range(width * channels):
            left = pixels[y][i - channels] if i >= channels else 0
            up = pixels[y - 1][i] if y else 0
            corner = pixels[y - 1][i - channels] if y and i >= channels else 0
            estimate = left + up - corner
            nearest = min((left, up, corner), key=lambda value: abs(estimate - value))  # the first of equals
            guess = (0, left, up, (left + up) // 2, nearest)[filters[y]]
            out.append((pixels[y][i] - guess) % 256)
    return bytes(out)


@pytest.fixture
def without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise AssertionError(f"{path} was given to Pillow")

    monkeypatch.setattr(module, "find_spec", lambda name: None)
    monkeypatch.setattr(module, "_pillow", refuse)


def stored(folder: Path, data: bytes, name: str = "image.png") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


# PNG


@pytest.mark.parametrize(
    "filters", [[0] * 7, [1] * 7, [2] * 7, [3] * 7, [4] * 7, [4, 3, 2, 1, 0, 2, 3], [2, 2, 1, 2, 0, 2, 1]]
)
@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
@pytest.mark.usefixtures("without_pillow")
def test_png_of_every_filter_and_colour_gives_its_pixels(
    tmp_path: Path, filters: list[int], colour: int, channels: int
):
    image = picture(channels, 7, 5, seed=colour)
    found = read_image(stored(tmp_path, png(5, 7, colour, filtered(image, filters))))
    expected = image[:3] if channels > 2 else image[:1].expand(3, -1, -1)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (9, 1), (3, 8)])
@pytest.mark.usefixtures("without_pillow")
def test_png_of_any_shape_is_read(tmp_path: Path, height: int, width: int):
    image = picture(3, height, width)
    for kind in (2, 4):
        data = png(width, height, 2, filtered(image, [kind] * height))
        assert torch.equal(read_image(stored(tmp_path, data)), image)


@pytest.mark.usefixtures("without_pillow")
def test_pixels_may_stand_in_several_chunks(tmp_path: Path):
    image = picture(1, 4, 6)
    rows = zlib.compress(filtered(image, [1, 2, 0, 2]))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 6, 4, 8, 0, 0, 0, 0))
    parts = chunk(b"tEXt", b"a\0b") + chunk(b"IDAT", rows[:9]) + chunk(b"IDAT", rows[9:]) + chunk(b"IEND", b"")
    assert torch.equal(read_image(stored(tmp_path, SIGNATURE + header + parts)), image.expand(3, -1, -1))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.usefixtures("without_pillow")
def test_written_png_is_read_again(tmp_path: Path, channels: int):
    image = picture(channels, 13, 8)
    assert torch.equal(read_image(stored(tmp_path, png_bytes(image))), image.expand(3, -1, -1))


@pytest.mark.parametrize("channels", [1, 3])
def test_written_png_is_what_pillow_reads(tmp_path: Path, channels: int):
    Image = pytest.importorskip("PIL.Image")
    image = picture(channels, 13, 8)
    with Image.open(stored(tmp_path, png_bytes(image))) as opened:
        assert (opened.size, opened.mode) == ((8, 13), "L" if channels == 1 else "RGB")
        assert opened.tobytes() == bytes(image.permute(1, 2, 0).flatten().tolist())


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA"])
@pytest.mark.usefixtures("without_pillow")
def test_png_of_pillow_is_read_as_pillow_reads_it(tmp_path: Path, mode: str):
    Image = pytest.importorskip("PIL.Image")
    smooth = torch.arange(40).view(1, 40, 1) * 3 + torch.arange(20) * 5
    image = torch.cat([smooth, smooth // 2, 255 - smooth // 3, smooth // 4]).clamp(0, 255).to(torch.uint8)
    source = Image.frombytes("RGBA", (20, 40), bytes(image.permute(1, 2, 0).flatten().tolist())).convert(mode)
    path = tmp_path / "image.png"
    source.save(path)
    expected = torch.tensor(list(source.convert("RGB").tobytes()), dtype=torch.uint8).view(40, 20, 3).permute(2, 0, 1)
    assert torch.equal(read_image(path), expected)


def damaged_pngs() -> dict[str, bytes]:
    image = picture(3, 6, 5)
    whole = png(5, 6, 2, filtered(image, [2] * 6))
    flipped = bytearray(whole)
    flipped[60] ^= 1
    wrong_pixels = SIGNATURE + chunk(b"IHDR", whole[16:29]) + chunk(b"IDAT", b"not compressed") + chunk(b"IEND", b"")
    return {
        "ends too early": whole[:-20],
        "checksum": bytes(flipped),
        "where 96 belong": png(5, 6, 2, filtered(image, [2] * 6)[:-3]),
        "unknown filter 9": png(5, 6, 2, b"\x09" + filtered(image, [2] * 6)[1:]),
        "damaged pixels": wrong_pixels,
        "without a header": SIGNATURE + chunk(b"IDAT", b"") + chunk(b"IEND", b""),
        "0 x 6 pixels": png(0, 6, 2, b""),
        "1,000,000 x 1,000,000": png(1_000_000, 1_000_000, 2, b""),
    }


@pytest.mark.parametrize(("found", "data"), damaged_pngs().items(), ids=list(damaged_pngs()))
def test_damaged_png_is_named(tmp_path: Path, found: str, data: bytes):
    path = stored(tmp_path, data)
    with pytest.raises(ImageError, match=r"restore the file") as caught:
        read_image(path)
    assert found in str(caught.value)
    assert str(caught.value).startswith(f"{path}: expected a readable image, found ")


# PNM


def test_pnm_gives_its_pixels(tmp_path: Path):
    colour, grey = picture(3, 4, 3), picture(1, 4, 3)
    raw = bytes(colour.permute(1, 2, 0).flatten().tolist())
    assert torch.equal(read_image(stored(tmp_path, b"P6\n# by hand\n3 4\n255\n" + raw, "a.ppm")), colour)
    raw = bytes(grey.flatten().tolist())
    assert torch.equal(read_image(stored(tmp_path, b"P5 3 4 255 " + raw, "a.pgm")), grey.expand(3, -1, -1))


def test_truncated_pnm_is_named(tmp_path: Path):
    path = stored(tmp_path, b"P5 3 4 255 " + bytes(11), "a.pgm")
    with pytest.raises(ImageError, match="11 bytes of pixels, where 12 belong"):
        read_image(path)


def test_real_pgm_equals_its_bytes(real_data):
    path = real_data("orl-faces") / "s1" / "1.pgm"
    data = path.read_bytes()
    assert data.startswith(b"P5\n92 112\n255\n")
    expected = torch.tensor(list(data[-92 * 112 :]), dtype=torch.uint8).view(1, 112, 92)
    assert torch.equal(read_image(path), expected.expand(3, -1, -1))


# Everything else


def test_jpeg_is_what_pillow_decodes(tmp_path: Path):
    Image = pytest.importorskip("PIL.Image")
    path = tmp_path / "a.jpg"
    Image.frombytes("RGB", (20, 40), bytes(picture(3, 40, 20).permute(1, 2, 0).flatten().tolist())).save(path)
    with Image.open(path) as opened:
        expected = torch.tensor(list(opened.convert("RGB").tobytes()), dtype=torch.uint8).view(40, 20, 3)
    assert torch.equal(read_image(path), expected.permute(2, 0, 1))
    assert torch.equal(load_image(path, 40, 20), expected.permute(2, 0, 1))


def test_large_jpeg_is_decoded_small_and_looks_the_same(tmp_path: Path):
    Image = pytest.importorskip("PIL.Image")
    smooth = (torch.arange(640).view(-1, 1) + torch.arange(320)).div(4).to(torch.uint8).expand(3, -1, -1)
    path = tmp_path / "a.jpg"
    Image.frombytes("RGB", (320, 640), bytes(smooth.permute(1, 2, 0).flatten().tolist())).save(path, quality=95)
    small = load_image(path, 64, 32)
    assert small.shape == (3, 64, 32)
    assert float((small.int() - resize(read_image(path), 64, 32).int()).abs().float().mean()) < 2


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"\xff\xd8\xff\xe0 no picture", b"P5 nothing"])
def test_what_is_no_image_is_named(tmp_path: Path, data: bytes):
    pytest.importorskip("PIL.Image")
    path = stored(tmp_path, data, "a.jpg")
    with pytest.raises(ImageError, match="what Pillow cannot read"):
        read_image(path)


def test_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ImageError, match="cannot be opened"):
        read_image(tmp_path / "none.png")


def test_missing_pillow_is_told_with_the_command_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    path = stored(tmp_path, b"\xff\xd8\xff\xe0", "a.jpg")
    with pytest.raises(ImageError, match=r"pip install -e \.\[formats\]"):
        read_image(path)


# Sizes


def test_resized_pixels_are_means_weighted_by_distance():
    image = picture(1, 12, 8)
    found = resize(image, 3, 4)

    def weights(size: int, target: int, place: int) -> Tensor:
        """Of a triangle as wide as the step between new pixels."""
        scale = size / target
        centre = (place + 0.5) * scale
        weight = (1 - ((torch.arange(size, dtype=torch.float64) + 0.5 - centre) / scale).abs()).clamp(min=0)
        return weight / weight.sum()

    for y in range(3):
        for x in range(4):
            expected = weights(12, 3, y) @ image[0].double() @ weights(8, 4, x)
            assert abs(float(found[0, y, x]) - float(expected)) <= 0.501


def test_size_of_its_own_leaves_pixels_alone():
    image = picture(3, 6, 5)
    assert torch.equal(resize(image, 6, 5), image)


def test_loaded_image_is_the_read_one_resized(tmp_path: Path):
    for channels in (1, 3):
        path = stored(tmp_path, png_bytes(picture(channels, 40, 30)))
        assert torch.equal(load_image(path, 24, 12), resize(read_image(path), 24, 12))
