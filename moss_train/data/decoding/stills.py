"""Stills, read with Pillow: upright, on white, scaled as the model's image processor scales them."""

import io

import numpy as np
from PIL import Image, ImageOps

from moss_train.data.decoding.pictures import DecodedArrays, DecodeLimits, first_line, fitted_size, tiled
from moss_train.data.decoding.probe import check_pixels
from moss_train.errors import SampleError


def read_still(data: bytes, copies: int, size: int | None, key: str, limits: DecodeLimits) -> DecodedArrays:
    """The picture, `copies` times."""
    try:
        with Image.open(io.BytesIO(data)) as opened:
            check_pixels(*opened.size, limits.max_pixels, key)
            picture = _on_white(ImageOps.exif_transpose(opened))
        if size is not None:
            picture = picture.resize(fitted_size(*picture.size, size), Image.Resampling.BILINEAR)
        else:
            limits.check_native(copies, *picture.size, key)
    except SampleError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and struct.error on broken files
        raise SampleError(key, f"picture does not decode: {type(error).__name__}: {first_line(error)}") from error
    frames = np.repeat(tiled(np.asarray(picture)[None], size), copies, axis=0)
    return DecodedArrays(frames, "pillow", np.zeros(copies))


def _on_white(picture: Image.Image) -> Image.Image:
    """RGB; transparent parts become white, as in Hugging Face's image processors."""
    if "A" in picture.getbands() or picture.info.get("transparency") is not None:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")
