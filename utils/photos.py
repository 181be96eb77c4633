"""A small image data set that needs no network: 32x32 crops of ten photographs that ship inside scikit-image.

The class of a crop is the photograph it was cut from. The files are PNGs (lossless, so every decoder gives the same
pixels) that lie in every scikit-image wheel since 0.22.

Train and test share no pixel: a photograph is cut into five vertical stripes of equal width, stripes 2 and 4 are for
testing, 1, 3 and 5 for training. A crop is sampled from the array of one stripe alone, whose averaged half-size level
is built from that stripe alone too, and its centre is drawn so that the rotated and scaled square, with the reach of
the interpolation, stays inside the stripe.

Every crop has its own place, scale, rotation, colour strength, brightness, contrast, colour cast and noise. All of it
is integer arithmetic on integer draws of `RandomState`, whose stream numpy has frozen, so that the bytes are the same
on every machine.
"""
from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from utils.errors import UserError

PHOTOS = ("brick", "camera", "coffee", "coins", "grass", "gravel", "ihc", "moon", "motorcycle_left", "page")
SIDE = 32
TRAIN_PER_CLASS, TEST_PER_CLASS = 1200, 300
STRIPES = 5
STRIPES_OF = {"train": (0, 2, 4), "test": (1, 3)}

# Fixed point: Qn is an integer in units of 2**-n.
_STEP = (170, 400)           # Q8: photograph pixels per crop pixel, 0.66 to 1.56
_HALF_SIZE_FROM = 320        # Q8: from 1.25 pixels per step on, sample the level averaged 2x2 (no aliasing)
_TURN = 68                   # Q8 of tan(angle / 2): rotations within +-30 degrees
_CANDIDATES = 4              # places tried for each crop, the one with the most detail is taken
_DETAIL_REACH = 10           # pixels; less than the smallest crop reaches
_COLOUR = (0, 160)           # Q8: 0 is grey, 256 the photograph's own colour
_CONTRAST = (128, 300)       # Q8
_BRIGHTNESS = (-40, 40)      # grey levels
_MEAN = (48, 208)            # grey levels: the mean of a crop is kept inside, so that none drowns in black or white
_CAST = (205, 307)           # Q8: gain of each channel
_NOISE = (8, 64)             # Q8 of a triangular noise with standard deviation 105 grey levels
_MARGIN = 3 << 15            # Q16: 1.5 pixels, the reach of the interpolation on the half-size level


class _Draws(NamedTuple):
    """The geometry of n crops, arrays of shape (n,)."""

    step: np.ndarray         # Q8
    cos: np.ndarray          # Q14
    sin: np.ndarray          # Q14
    y: np.ndarray            # Q16, the centre inside the stripe
    x: np.ndarray            # Q16


def load_photo(name: str) -> np.ndarray:
    """The photograph `name` of the installed scikit-image as uint8 (H, W, 3); UserError if it is not there."""
    import skimage

    path = Path(skimage.__file__).parent / "data" / f"{name}.png"
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise UserError(f"the photograph {path} of scikit-image cannot be read ({error}); reinstall scikit-image") \
            from error


def stripe_bounds(width: int) -> list[tuple[int, int]]:
    """First and last-plus-one column of the five stripes of a photograph `width` pixels wide."""
    edges = [width * i // STRIPES for i in range(STRIPES + 1)]
    return list(zip(edges[:-1], edges[1:], strict=True))


def photo_crops(photo: np.ndarray, index: int, split: str, count: int) -> np.ndarray:
    """`count` crops, uint8 (count, 32, 32, 3), of the `split` ('train' or 'test') stripes of `photo` (H, W, 3).

    `index` seeds the draws together with the split; the stripes of the split take turns. Raises ValueError for a
    photograph whose stripes are narrower than the largest crop (about 70 pixels).
    """
    rng = np.random.RandomState([2511, index, sorted(STRIPES_OF).index(split)])
    bounds = stripe_bounds(photo.shape[1])
    stripes = STRIPES_OF[split]
    crops = np.empty((count, SIDE, SIDE, 3), np.uint8)
    for turn, stripe in enumerate(stripes):
        low, high = bounds[stripe]
        places = crops[turn::len(stripes)]
        places[...] = _finish(rng, _stripe_samples(rng, photo[:, low:high], len(places)))
    return crops


def generate_split(split: str, per_class: int) -> tuple[np.ndarray, np.ndarray]:
    """Crops, uint8 (10 * per_class, 32, 32, 3), and targets, int64, of one split; crop i is of class i mod 10."""
    classes = len(PHOTOS)
    images = np.empty((classes * per_class, SIDE, SIDE, 3), np.uint8)
    for index, name in enumerate(PHOTOS):
        images[index::classes] = photo_crops(load_photo(name), index, split, per_class)
    return images, np.arange(classes * per_class, dtype=np.int64) % classes


def _stripe_samples(rng: np.random.RandomState, stripe: np.ndarray, count: int) -> np.ndarray:
    """`count` turned and scaled squares of one stripe (H, W, 3), int32 (count, 1024, 3) in Q4 grey levels."""
    height, width = (extent // 2 * 2 for extent in stripe.shape[:2])
    draws = _draw(rng, count, stripe[:height, :width])
    level0 = stripe[:height, :width].astype(np.int64)
    level1 = (level0[::2, ::2] + level0[1::2, ::2] + level0[::2, 1::2] + level0[1::2, 1::2] + 2) >> 2
    pixels = np.concatenate([_pack(level0), _pack(level1)])
    y, x = _positions(draws)
    level = (draws.step >= _HALF_SIZE_FROM).astype(np.int64)[:, None]
    return _bilinear(pixels, (y >> level) - (1 << 15), (x >> level) - (1 << 15), width >> level, level * height * width)


def _draw(rng: np.random.RandomState, count: int, stripe: np.ndarray) -> _Draws:
    """Random scale, rotation and a centre from which the whole crop lies inside the stripe (H, W, 3)."""
    step = _integers(rng, _STEP, count)
    turn = _integers(rng, (-_TURN, _TURN), count)
    square = 256 * 256 + turn * turn          # cos and sin from tan(angle / 2), exact in integers
    cos, sin = ((256 * 256 - turn * turn) << 14) // square, ((2 * 256 * turn) << 14) // square
    reach = ((np.abs(cos) + np.abs(sin)) * (SIDE - 1) * step >> 7) + _MARGIN
    if 2 * reach.max() > min(stripe.shape[:2]) << 16:
        raise ValueError(f"a stripe of {stripe.shape[0]}x{stripe.shape[1]} pixels is too small for the largest crop")
    y, x = (reach + ((extent << 16) - 2 * reach) * _integers(rng, (0, (1 << 16) - 1), (_CANDIDATES, count)) // (1 << 16)
            for extent in stripe.shape[:2])
    best = _detail(stripe, y >> 16, x >> 16).argmax(axis=0)
    crop = np.arange(count)
    return _Draws(step, cos, sin, y[best, crop], x[best, crop])


def _integers(rng: np.random.RandomState, low_high: tuple[int, int], size: int | tuple[int, ...]) -> np.ndarray:
    """Integers from low to high, both included; int64 by name, since numpy's default depends on the platform."""
    return rng.randint(low_high[0], low_high[1] + 1, size=size, dtype=np.int64)


def _detail(stripe: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """How much the grey level varies around each place (y, x): the sum of its steps within `_DETAIL_REACH` pixels."""
    grey = stripe.astype(np.int64).sum(axis=2)
    steps = np.abs(np.diff(grey, axis=0))[:, :-1] + np.abs(np.diff(grey, axis=1))[:-1]
    total = np.pad(steps.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    top, bottom, left, right = y - _DETAIL_REACH, y + _DETAIL_REACH, x - _DETAIL_REACH, x + _DETAIL_REACH
    return total[bottom, right] - total[top, right] - total[bottom, left] + total[top, left]


def _positions(draws: _Draws) -> tuple[np.ndarray, np.ndarray]:
    """Where the 1024 pixel centres of each crop lie in the stripe: y and x, int64 (n, 1024) in Q16."""
    offset = 2 * np.arange(SIDE, dtype=np.int64) - (SIDE - 1)          # half pixels from the centre of the crop
    down, right = (grid.reshape(1, -1) for grid in np.meshgrid(offset, offset, indexing="ij"))
    cos, sin, step = (value[:, None] for value in (draws.cos, draws.sin, draws.step))
    y = draws.y[:, None] + ((cos * down + sin * right) * step >> 7)
    x = draws.x[:, None] + ((cos * right - sin * down) * step >> 7)
    return y, x


def _pack(level: np.ndarray) -> np.ndarray:
    """The three channels of (H, W, 3) side by side in one int64 (H * W,), 21 bits each: one gather serves all three."""
    return (level[..., 0] | level[..., 1] << 21 | level[..., 2] << 42).ravel()


def _bilinear(pixels: np.ndarray, y: np.ndarray, x: np.ndarray, stride: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Interpolated values, int32 (n, 1024, 3) in Q4, at the positions y, x (Q16, from pixel centres)."""
    corner = base + (y >> 16) * stride + (x >> 16)
    down, right = (y >> 10) & 63, (x >> 10) & 63                       # Q6
    upper = pixels.take(corner) * (64 - right) + pixels.take(corner + 1) * right
    corner += stride
    lower = pixels.take(corner) * (64 - right) + pixels.take(corner + 1) * right
    packed = upper * (64 - down) + lower * down                        # Q12 in each 21-bit field
    values = np.empty((*packed.shape, 3), np.int32)
    for channel in range(3):
        values[..., channel] = (packed >> 21 * channel + 8) & 0x1FFF
    return values


def _finish(rng: np.random.RandomState, crops: np.ndarray) -> np.ndarray:
    """Colour, contrast, brightness, cast and noise on crops (n, 1024, 3) in Q4; gives uint8 (n, 32, 32, 3)."""
    def draw(low_high: tuple[int, int], channels: int = 1) -> np.ndarray:
        return _integers(rng, low_high, (len(crops), 1, channels)).astype(np.int32)

    grey = (crops @ np.array([[77], [151], [28]], np.int32)) >> 8
    mean = (grey.sum(axis=1, keepdims=True) // (SIDE * SIDE)).astype(np.int32)
    crops = (crops - grey) * draw(_COLOUR) >> 8
    crops += grey - mean
    crops = crops * draw(_CONTRAST) >> 8
    crops += np.clip(mean + 16 * draw(_BRIGHTNESS), 16 * _MEAN[0], 16 * _MEAN[1])
    crops = crops * draw(_CAST, channels=3) >> 8
    noise = rng.randint(0, 256, size=(2, *crops.shape), dtype=np.uint8)
    crops += (noise[0].astype(np.int32) - noise[1]) * draw(_NOISE) >> 4
    return np.clip(crops >> 4, 0, 255).astype(np.uint8).reshape(-1, SIDE, SIDE, 3)
