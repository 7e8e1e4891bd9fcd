"""Images of files as uint8 tensors: PNG and PNM by the standard library and torch, everything else by Pillow.

Legend: C channels, H height, W width; N bytes of a diagonal.

Own decoding covers what the demo writes and what is common in small sets: PNG with 8 bits per channel that is not
interlaced, and binary PNM (P5, P6) with 255 as the largest value. Transparency is dropped, grey is repeated, as Pillow
does; so it does not matter which of the two has read a file.
"""

import re
import struct
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # by colour type: grey, RGB, grey and alpha, RGBA
_SUB, _UP, _AVERAGE, _PAETH = 1, 2, 3, 4  # filters of PNG rows
_PNM = re.compile(rb"P([56])" + 3 * rb"(?:\s|#[^\n]*\n)+(\d{1,9})" + rb"\s")
_PNM_HEADER_BYTES = 4096  # no header with its comments is longer
_MAX_PIXELS = 1 << 27  # a file that claims more is not the picture of a person


class ImageError(ValueError):
    """A file that is no readable image; the arguments are the file, what was found in it, and the repair."""

    def __init__(self, file: str, found: str, repair: str) -> None:
        super().__init__(file, found, repair)
        self.file, self.found, self.repair = file, found, repair

    def __str__(self) -> str:
        return f"{self.file}: expected a readable image, found {self.found}; {self.repair}"


def read_image(path: Path) -> Tensor:
    """The image as RGB, [3, H, W] uint8; raises ImageError."""
    return _decoded(path, None).expand(3, -1, -1)


def load_image(path: Path, height: int, width: int) -> Tensor:
    """The image as RGB in this size, whatever its own shape, [3, height, width] uint8; raises ImageError.

    A JPEG that is several times larger is decoded at a half, a quarter or an eighth, still at least twice this size.
    """
    return resize(_decoded(path, (height, width)), height, width).expand(3, -1, -1)


def resize(image_CHW: Tensor, height: int, width: int) -> Tensor:
    """The image in another size, uint8: bilinear with antialiasing, computed in float32 and rounded to the nearest."""
    if image_CHW.shape[1:] == (height, width):
        return image_CHW
    floats = F.interpolate(image_CHW[None].float(), (height, width), mode="bilinear", antialias=True)
    return floats[0].round_().clamp_(0, 255).to(torch.uint8)


def png_bytes(image_CHW: Tensor) -> bytes:
    """A PNG file of a grey ([1, H, W]) or RGB ([3, H, W]) uint8 image; every row is stored as what changed in it."""
    channels, height, width = image_CHW.shape
    pixel_HWC = image_CHW.permute(1, 2, 0)
    row_HS = torch.empty(height, 1 + width * channels, dtype=torch.uint8)
    row_HS[:, 0] = _UP
    row_HS[:, 1:] = torch.cat([pixel_HWC[:1], pixel_HWC[1:] - pixel_HWC[:-1]]).reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2}[channels], 0, 0, 0)
    raw = bytearray(row_HS.numel())
    torch.frombuffer(raw, dtype=torch.uint8).copy_(row_HS.flatten())
    data = zlib.compress(raw, 6)
    return _PNG + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


def _decoded(path: Path, wanted: tuple[int, int] | None) -> Tensor:
    """[1, H, W] where the image is grey and [3, H, W] otherwise, uint8; `wanted` is a height and a width."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, f"a file that cannot be opened ({error.strerror})") from None
    image = None
    if data.startswith(_PNG):
        image = _decode_png(path, data)
    elif data[:2] in (b"P5", b"P6"):
        image = _decode_pnm(path, data)
    return _decode_with_pillow(path, wanted) if image is None else image


def _unreadable(path: Path, found: str) -> ImageError:
    return ImageError(str(path), found, "restore the file, or take it out of the source")


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _decode_pnm(path: Path, data: bytes) -> Tensor | None:
    header = _PNM.match(data[:_PNM_HEADER_BYTES])
    if header is None or int(header[4]) != 255:
        return None
    channels, width, height = 1 if header[1] == b"5" else 3, int(header[2]), int(header[3])
    _check_size(path, height, width)
    size = height * width * channels
    if len(data) < header.end() + size:
        raise _unreadable(path, f"{len(data) - header.end():,} bytes of pixels, where {size:,} belong")
    return _bytes(data[header.end() : header.end() + size]).view(height, width, channels).permute(2, 0, 1)


def _check_size(path: Path, height: int, width: int) -> None:
    if not 0 < height * width <= _MAX_PIXELS:
        raise _unreadable(path, f"{width:,} x {height:,} pixels")


def _decode_png(path: Path, data: bytes) -> Tensor | None:
    """The image without its transparency, or None for a kind of PNG that is left to Pillow."""
    chunks = _png_chunks(path, data)
    if not chunks or chunks[0][0] != b"IHDR" or len(chunks[0][1]) != 13:
        raise _unreadable(path, "a PNG without a header")
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", chunks[0][1])
    if depth != 8 or colour not in _PNG_CHANNELS or interlaced:
        return None
    _check_size(path, height, width)
    channels = _PNG_CHANNELS[colour]
    size = height * (1 + width * channels)
    try:
        pixels = zlib.decompressobj().decompress(b"".join(body for kind, body in chunks if kind == b"IDAT"), size)
    except zlib.error as error:
        raise _unreadable(path, f"damaged pixels ({error})") from None
    if len(pixels) < size:
        raise _unreadable(path, f"{len(pixels):,} bytes of pixels, where {size:,} belong")
    row_HS = _bytes(pixels).view(height, -1)
    filter_H = row_HS[:, 0].clone()
    if int(filter_H.max()) > _PAETH:
        raise _unreadable(path, f"a row with the unknown filter {int(filter_H.max())}")
    row_HWC = row_HS[:, 1:].reshape(height, width, channels)
    is_simple = bool((filter_H < _AVERAGE).all())
    if not is_simple and find_spec("PIL") is not None:
        return None  # many times faster there, and equal
    pixel_HWC = _unfilter_simple(filter_H, row_HWC) if is_simple else _unfilter(filter_H, row_HWC)
    return pixel_HWC[:, :, : 3 if channels > 2 else 1].permute(2, 0, 1).contiguous()


def _png_chunks(path: Path, data: bytes) -> list[tuple[bytes, bytes]]:
    """Kinds and bodies of all chunks up to the end of the image, their checksums compared."""
    chunks: list[tuple[bytes, bytes]] = []
    place = len(_PNG)
    while True:
        if place + 12 > len(data):
            raise _unreadable(path, "a PNG that ends too early")
        (length,) = struct.unpack_from(">I", data, place)
        kind, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
        if place + 12 + length > len(data):
            raise _unreadable(path, "a PNG that ends too early")
        if struct.unpack_from(">I", data, place + 8 + length)[0] != zlib.crc32(kind + body):
            raise _unreadable(path, f"a chunk {kind!r} that does not match its checksum")
        if kind == b"IEND":
            return chunks
        chunks.append((kind, body))
        place += 12 + length


def _unfilter_simple(filter_H: Tensor, row_HWC: Tensor) -> Tensor:
    """Pixels of rows that are stored plainly, as differences along the row, or as differences to the row above."""
    value_HWC = row_HWC.to(torch.int32)
    along = filter_H == _SUB
    value_HWC[along] = value_HWC[along].cumsum(1, dtype=torch.int32) & 255
    # rows of differences build on the last one that was not: sums from there on, as sums from the top less those before
    number_H = torch.arange(len(filter_H))
    first_H = torch.where(filter_H == _UP, 0, number_H).cummax(0).values
    sum_HWC = torch.cat([torch.zeros_like(value_HWC[:1]), value_HWC.cumsum(0, dtype=torch.int32)])
    return (sum_HWC[number_H + 1] - sum_HWC[first_H]).to(torch.uint8)


def _unfilter(filter_H: Tensor, row_HWC: Tensor) -> Tensor:
    """Pixels of rows of any filters: each needs its left, upper and upper left ones, so one diagonal follows another.

    With a row and a column of zeros in front, the pixels of a diagonal lie in memory at equal distances.
    """
    height, width, channels = row_HWC.shape
    pixel_HWC = torch.zeros(height + 1, width + 1, channels, dtype=torch.int16)
    pixel_HWC[1:, 1:] = row_HWC
    filter_H1 = filter_H[:, None]
    row, step = (width + 1) * channels, width * channels
    for diagonal in range(height + width - 1):
        top = max(0, diagonal - width + 1)
        count = min(height - 1, diagonal) - top + 1
        here = (top + 1) * row + (diagonal - top + 1) * channels

        def pixels(back: int, count: int = count, here: int = here) -> Tensor:
            return pixel_HWC.as_strided((count, channels), (step, 1), here - back)

        left_NC, up_NC, corner_NC = pixels(channels), pixels(row), pixels(row + channels)
        far_left, far_up = (up_NC - corner_NC).abs(), (left_NC - corner_NC).abs()
        far_corner = (left_NC + up_NC - 2 * corner_NC).abs()
        nearest_NC = torch.where(far_up <= far_corner, up_NC, corner_NC)
        nearest_NC = torch.where((far_left <= far_up) & (far_left <= far_corner), left_NC, nearest_NC)
        filter_N1 = filter_H1[top : top + count]
        guess_NC = nearest_NC * (filter_N1 == _PAETH)
        guess_NC += ((left_NC + up_NC) >> 1) * (filter_N1 == _AVERAGE)
        guess_NC += up_NC * (filter_N1 == _UP) + left_NC * (filter_N1 == _SUB)
        pixels(0).add_(guess_NC).bitwise_and_(255)
    return pixel_HWC[1:, 1:].to(torch.uint8)


def _decode_with_pillow(path: Path, wanted: tuple[int, int] | None) -> Tensor:
    Image = _pillow(path)
    try:
        with Image.open(path) as image:
            _check_size(path, image.height, image.width)
            if wanted is not None:
                image.draft(None, (2 * wanted[1], 2 * wanted[0]))  # of any use for JPEG alone
            grey = image.mode == "L"
            plain = image if grey else image.convert("RGB")
            data, width, height = plain.tobytes(), plain.width, plain.height
    except ImageError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        found = (str(error).strip() or type(error).__name__).splitlines()[0].replace(str(path), "the file")
        raise _unreadable(path, f"what Pillow cannot read ({found[:200]})") from None
    return _bytes(data).view(height, width, 1 if grey else 3).permute(2, 0, 1)


def _pillow(path: Path) -> Any:
    try:
        from PIL import Image
    except ImportError:
        found = f"a {path.suffix or 'nameless'} file of a kind that Pillow reads, which is not installed"
        raise ImageError(str(path), found, "install it: pip install -e .[formats]") from None
    return Image
