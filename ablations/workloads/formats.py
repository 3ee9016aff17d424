"""The image formats that are read: pictures made of pixels, as far as Pillow can open them here.

Pillow would also open what starts other programs (PostScript), videos, icons, and scientific files of which it knows
the name alone; those stay closed, whatever a file calls itself.
"""

from __future__ import annotations

from PIL import Image

_PICTURES = (
    "JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "HEIF", "JXL", "QOI", "DIB", "PCX", "SGI",
    "SUN", "TGA",
)  # fmt: skip
"""The frequent first: they are tried in this order. HEIF and JXL come with packages that add them to Pillow."""
_WITHIN = {"MPO": "JPEG"}  # opened by the reader of another format


def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are opened."""
    Image.init()
    return tuple(name for name in _PICTURES if name in Image.OPEN)


def suffixes() -> frozenset[str]:
    """How the names of their files end, in lower case, with the dot."""
    opened = {*formats()}
    opened |= {name for name, by in _WITHIN.items() if by in opened}
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in opened)
