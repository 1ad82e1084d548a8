"""Images of every kind that goes wrong somewhere, as bytes, and what is to become of each.

The limit of pixels is lowered to :data:`LIMIT`, so that the large ones stay small.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image, PngImagePlugin

from tests.data.pictures import encoded

LIMIT = 1_000_000  # pixels
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"><script>alert(1)</script></svg>'
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) (w) file\n%%EOF\n"


def plain(size: tuple[int, int], form: str = "PNG", mode: str = "L", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, 90).save(buffer, form, **options)
    return buffer.getvalue()


def animated(form: str) -> bytes:
    frames = [Image.new("L", (9, 9), value) for value in (10, 200)]
    buffer = io.BytesIO()
    frames[0].save(buffer, form, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def promising(width: int, height: int) -> bytes:
    """A PNG file of one pixel whose header promises more."""
    png = plain((1, 1))
    header = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


def with_chunk(kind: bytes, content: bytes) -> bytes:
    """A PNG file with a further chunk before its pixels."""
    png = plain((9, 9))
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return png[:33] + chunk + png[33:]


def text_bomb(megabytes: int = 8) -> bytes:
    return with_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(megabytes << 20), 9))


def profile_bomb(megabytes: int = 8) -> bytes:
    return with_chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(megabytes << 20), 9))


def with_text() -> bytes:
    """What a camera or an editor writes: a short text."""
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x" * 1000, zip=True)
    return plain((9, 9), pnginfo=info)


def _noise(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(buffer, form)
    return buffer.getvalue()


READ = {
    "grey.png": encoded(1, "L"),
    "cmyk.jpg": encoded(2, "CMYK", "jpg"),
    "deep.png": encoded(3, "I;16"),
    "alpha.webp": encoded(4, "RGBA", "webp"),
    "on-its-side.jpg": encoded(5, "RGB", "jpg"),  # by EXIF
    "one-pixel.png": plain((1, 1)),
    "strip.png": plain((30_000, 30)),
    "tower.png": plain((30, 30_000)),
    "animated.gif": animated("GIF"),
    "animated.png": animated("PNG"),
    "animated.webp": animated("WEBP"),
    "misnamed.png": plain((9, 9), "JPEG"),
    "text.png": with_text(),
}
"""What is read, whatever its mode or its sides."""
REFUSED = {
    "cut.jpg": (_noise("JPEG")[:-400], "truncated"),
    "cut.png": (_noise("PNG")[:-400], "truncated"),
    "empty.png": (b"", "cannot identify"),
    "words.png": (b"no image", "cannot identify"),
    "hair.png": (plain((30_000, 1)), "resized to 240000 x 8, more than the limit"),
    "needle.png": (plain((1, 30_000)), "resized to 8 x 240000, more than the limit"),
    "huge.png": (plain((30_000, 40)), "30000 x 40 pixels are more than the limit of 1000000"),
    "vast.png": (promising(30_000, 30_000), "pixels"),
    "endless.png": (promising(2**31 - 1, 2**31 - 1), "pixels"),
    "text-bomb.png": (text_bomb(), "Decompressed data too large"),
    "profile-bomb.png": (profile_bomb(), "Decompressed data too large"),
    "drawing.png": (SVG, "cannot identify"),
    "document.jpg": (b"%PDF-1.7\n1 0 obj\n<< >>\nendobj\n%%EOF\n", "cannot identify"),
    "program.jpg": (EPS, "cannot identify"),
    "targa.png": (plain((9, 9), "TGA"), "cannot identify"),
    "icon.png": (plain((16, 16), "ICO"), "cannot identify"),
}
"""What is not, and a part of the reason."""
ALL = {**READ, **{name: data for name, (data, _) in REFUSED.items()}}
