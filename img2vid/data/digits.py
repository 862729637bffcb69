"""Handwritten digits, and the pictures made from them.

scikit-learn ships 1,797 handwritten digits of 8 x 8 pixels, so they are at hand on any machine without a network.
This module splits them, paints random backgrounds and draws a digit at any position, size, angle and colour.
A picture is one draw; a clip is one draw in which the centre, scale or angle has one entry for each frame.

Conventions, the same everywhere in this module:
    canvas      uint8 RGB, shape (..., height, width, 3)
    position    (x, y) in pixels, x to the right, y down; (0, 0) is the canvas's top left corner, so the centre of the
                top left pixel is (0.5, 0.5) and the middle of the canvas is (width / 2, height / 2)
    scale       side, in canvas pixels, of the square that the digit's 8 x 8 grid covers
    angle       degrees, counter-clockwise as seen
    rng         a numpy.random.Generator: equal state, equal pictures
"""

import numpy as np

from img2vid.data.errors import missing_extra

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_GRID = 8  # the digits are 8 x 8 pixels

SPLITS = ("train", "val", "test")
_SPLIT_ENDS = (0.7, 0.8)  # train ends at 70 % of each class, val at 80 %, test takes the rest
_SPLIT_SEED = 0

# What counts as readable. A digit pixel must cover at least one canvas pixel, or bilinear sampling skips strokes.
MIN_SCALE = DIGIT_GRID
_MIN_CONTRAST = 100.0  # between the digit's luminance and the background's mean, of 255
_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # Rec. 601 weights of R, G, B

BACKGROUNDS = ("plain", "gradient", "noise")


def load_digits(split):
    """Load one split of the handwritten digits.

    The splits are disjoint and stratified (70, 10 and 20 % of each class) and never change: the published weights of
    `nano_clip` have seen "train" alone.

    Args:
        split: "train", "val" or "test".

    Returns:
        images: float32 (n, 8, 8), ink from 0 (none) to 1 (full).
        labels: int64 (n,), the digit 0 to 9.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(map(repr, SPLITS))}")
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ImportError as error:
        raise missing_extra("scikit-learn", "eval", "The set of handwritten digits, which comes with it,") from error

    bunch = sklearn_digits()
    shuffle = np.random.default_rng(_SPLIT_SEED)
    chosen = []
    for digit in range(10):
        members = shuffle.permutation(np.flatnonzero(bunch.target == digit))
        ends = [round(end * len(members)) for end in _SPLIT_ENDS]
        chosen.append(np.split(members, ends)[SPLITS.index(split)])
    chosen = np.sort(np.concatenate(chosen))
    images = bunch.images[chosen].astype(np.float32) / 16  # the source counts ink in sixteenths
    return images, bunch.target[chosen].astype(np.int64)


def draw(digit, centre, scale, angle, colour, background):
    """Draw digits on backgrounds.

    Every argument may have leading axes, and these broadcast: one digit with (T, 2) centres on one background gives a
    clip of T frames; n digits on n backgrounds give n pictures. Sampling is bilinear at the exact position, so motion
    of a fraction of a pixel shows.

    Args:
        digit: (..., 8, 8), ink from 0 to 1; ink is the opacity of the colour.
        centre: (..., 2), x and y in pixels. Digits may stick out of the canvas.
        scale: (...), side of the digit's grid in pixels, at least 8.
        angle: (...), degrees, counter-clockwise as seen.
        colour: (..., 3), RGB from 0 to 255.
        background: uint8 (..., height, width, 3).

    Returns:
        uint8 (..., height, width, 3), with the leading axes of all arguments broadcast together.
    """
    digit = _checked("digit", digit, (DIGIT_GRID, DIGIT_GRID), 0, 1)
    centre = _checked("centre", centre, (2,))
    scale = _checked("scale", scale, (), low=MIN_SCALE)
    angle = _checked("angle", angle, ())
    colour = _checked("colour", colour, (3,), 0, 255)
    background = np.asarray(background)
    if background.dtype != np.uint8 or background.ndim < 3 or background.shape[-1] != 3:
        raise ValueError(
            f"background must be uint8 of shape (..., height, width, 3), got {background.dtype} {background.shape}"
        )

    try:
        lead = np.broadcast_shapes(
            digit.shape[:-2], centre.shape[:-1], scale.shape, angle.shape, colour.shape[:-1], background.shape[:-3]
        )
    except ValueError as error:
        raise ValueError(
            "the leading axes do not broadcast: "
            f"digit {digit.shape}, centre {centre.shape}, scale {scale.shape}, angle {angle.shape}, "
            f"colour {colour.shape}, background {background.shape}"
        ) from error
    height, width = background.shape[-3:-1]

    # Where each canvas pixel looks in the digit's grid: undo the translation, the rotation and the scale.
    axes = (..., None, None)  # (...) -> (..., 1, 1)
    dx = np.arange(width, dtype=np.float32) + 0.5 - centre[..., 0][axes]  # (..., 1, W)
    dy = (np.arange(height, dtype=np.float32) + 0.5)[:, None] - centre[..., 1][axes]  # (..., H, 1)
    turn, cells_per_pixel = np.deg2rad(angle), DIGIT_GRID / scale
    cos, sin = (np.cos(turn) * cells_per_pixel)[axes], (np.sin(turn) * cells_per_pixel)[axes]
    column = cos * dx - sin * dy  # (..., H, W), in cells from the middle of the grid
    row = sin * dx + cos * dy

    ink = _sample(digit, row, column, lead)[..., None]  # (..., H, W, 1)
    canvas = background + ink * (colour[..., None, None, :] - background)
    return np.rint(canvas).astype(np.uint8)


def random_background(rng, count, size, kinds=BACKGROUNDS):
    """Paint square backgrounds of random colour and texture.

    Args:
        rng: numpy.random.Generator.
        count: how many.
        size: side in pixels.
        kinds: those to choose from, each as likely as the others: "plain" (one colour), "gradient" (a linear ramp),
            "noise" (smooth coloured noise, a sum of three octaves).

    Returns:
        uint8 (count, size, size, 3).
    """
    unknown = [kind for kind in kinds if kind not in BACKGROUNDS]
    if unknown or not kinds:
        raise ValueError(f"kinds must be chosen from {BACKGROUNDS}, got {kinds!r}")
    base = rng.uniform(0, 255, (count, 1, 1, 3))
    strength = rng.uniform(10, 50, (count, 1, 1, 1))
    kind = np.array(kinds)[rng.integers(len(kinds), size=count)][:, None, None, None]

    # Both textures are within -1 to 1. Both are always drawn, so that the state of rng does not depend on `kinds`.
    turn = rng.uniform(0, 2 * np.pi, (count, 1, 1))
    along = (np.arange(size) + 0.5) / size * 2 - 1  # (size,)
    ramp = (np.cos(turn) * along + np.sin(turn) * along[:, None]) / np.sqrt(2)  # (count, size, size)
    gradient = ramp[..., None] * rng.uniform(-1, 1, (count, 1, 1, 3))
    noise = np.zeros((count, size, size, 3))
    for cells, weight in ((2, 0.5), (4, 0.3), (8, 0.2)):
        knots = rng.uniform(-1, 1, (count, cells + 1, cells + 1, 3))
        spread = _linear_weights(cells, size)  # (size, cells + 1)
        noise += weight * np.einsum("ya,nabc,xb->nyxc", spread, knots, spread, optimize=True)

    texture = np.where(kind == "gradient", 2 * gradient, np.where(kind == "noise", 2 * noise, 0.0))
    return np.rint(np.clip(base + strength * texture, 0, 255)).astype(np.uint8)


def random_style(rng, background):
    """Choose how a digit is drawn on each background, so that it stays whole and readable.

    Args:
        rng: numpy.random.Generator.
        background: uint8 (n, size, size, 3), square.

    Returns:
        A dict of the arguments of `draw`: `centre` (n, 2), keeping the digit's upright square on the canvas; `scale`
        (n,), from 0.4 to 0.9 of the canvas; `angle` (n,), from -30 to 30 degrees; `colour` (n, 3), at least 100 of 255
        away from the background's mean in luminance.
    """
    background = np.asarray(background)
    if background.ndim != 4 or background.shape[1] != background.shape[2] or background.shape[3] != 3:
        raise ValueError(f"background must have the shape (n, size, size, 3), got {background.shape}")
    count, size = background.shape[:2]
    if size < MIN_SCALE / 0.4:
        raise ValueError(f"a canvas of {size} pixels is too small for readable digits: use {MIN_SCALE / 0.4:g} or more")
    scale = rng.uniform(0.4, 0.9, count) * size
    centre = size / 2 + rng.uniform(-0.5, 0.5, (count, 2)) * (size - scale[:, None])
    angle = rng.uniform(-30, 30, count)
    colour = _away_from(rng.uniform(0, 255, (count, 3)), background.mean(axis=(1, 2)))
    return {"centre": centre, "scale": scale, "angle": angle, "colour": colour}


def _away_from(colour, other):
    """Move colours (n, 3) towards black or white until their luminance is _MIN_CONTRAST away from `other` (n, 3)."""
    light, against = colour @ _LUMINANCE, other @ _LUMINANCE
    # Keep the side that the colour is on, unless that side has no room left.
    up = np.where(light >= against, against + _MIN_CONTRAST <= 255, against - _MIN_CONTRAST < 0)
    wanted = np.where(up, np.maximum(light, against + _MIN_CONTRAST), np.minimum(light, against - _MIN_CONTRAST))
    # Luminance is linear, so mixing by t with white (or black) moves it by t of the way to 255 (or 0).
    end = np.where(up, 255.0, 0.0)
    mix = (wanted - light) / np.where(end == light, 1.0, end - light)
    return np.clip(colour + mix[:, None] * (end[:, None] - colour), 0, 255)


def _linear_weights(cells, size):
    """(size, cells + 1) weights that interpolate `cells + 1` evenly spaced knots at the centres of `size` pixels."""
    at = (np.arange(size) + 0.5) / size * cells  # (size,)
    return np.maximum(0.0, 1 - np.abs(at[:, None] - np.arange(cells + 1)))


def _sample(digit, row, column, lead):
    """Bilinear samples of digit (..., 8, 8), zero outside, at rows and columns (..., H, W) from the grid's middle."""
    shape = lead + np.broadcast_shapes(row.shape, column.shape)[-2:]
    side = DIGIT_GRID + 2  # one ring of zeros makes the outside an ordinary cell
    padded = np.zeros(lead + (side, side), dtype=np.float32)
    padded[..., 1:-1, 1:-1] = digit
    padded = padded.reshape(-1, side * side)  # (n, 100)

    def corner(at):  # index of the cell before, and how far past it
        at = np.clip(np.broadcast_to(at, shape).reshape(len(padded), -1) + (side - 1) / 2, 0, side - 1)
        before = np.minimum(at.astype(np.int64), side - 2)
        return before, at - before

    (row, down), (column, right) = corner(row), corner(column)  # each (n, H * W)
    first = row * side + column
    top, bottom = (
        np.take_along_axis(padded, first + start, axis=1) * (1 - right)
        + np.take_along_axis(padded, first + start + 1, axis=1) * right
        for start in (0, side)
    )
    return (top * (1 - down) + bottom * down).reshape(shape)


def _checked(name, value, tail, low=None, high=None):
    """`value` as float32, after checking that its last axes are `tail` and its entries lie within low and high."""
    value = np.asarray(value, dtype=np.float32)
    if value.shape[value.ndim - len(tail) :] != tail:
        wanted = ", ".join(["..."] + [str(n) for n in tail])
        raise ValueError(f"{name} must have the shape ({wanted}), got {value.shape}")
    if not np.isfinite(value).all():
        raise ValueError(f"{name} must be finite, got {value}")
    below, above = low is not None and (value < low).any(), high is not None and (value > high).any()
    if below or above:
        limits = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be {limits}, got values from {value.min():g} to {value.max():g}")
    return value
