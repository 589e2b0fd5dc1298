"""Videos whose pictures carry their number."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from tartvg.config import FramesConfig
from tartvg.data.video import Clip

FRAMES = FramesConfig(min_pixels=784, max_pixels=6272, total_pixels=10**7, timeout_s=120)


HEIGHT, WIDTH, BITS, RATE = 64, 80, 8, 8


def picture(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A picture that carries its number: bright and dark columns above, something that moves below."""
    image = np.full((height, width, 3), 30, np.uint8)
    for bit in range(BITS):
        if number >> bit & 1:
            image[: height // 2, bit * width // BITS : (bit + 1) * width // BITS] = 225
    image[height // 2 :] = np.random.default_rng(number // 4).integers(60, 190, (height - height // 2, width, 3))
    return image


def number_on(image: np.ndarray) -> int:
    """The number that a picture carries."""
    height, width = image.shape[:2]
    columns = [image[height // 8 : height * 3 // 8, int((bit + 0.5) * width / BITS)].mean() for bit in range(BITS)]
    return sum(int(bright > 128) << bit for bit, bright in enumerate(columns))


def write(path: Path, stamps: list[int], base: Fraction = Fraction(1, RATE), codec: str = "libx264",
          pix_fmt: str = "yuv420p", size: tuple[int, int] = (HEIGHT, WIDTH), rotation: float | None = None,
          **options: str) -> Path:  # fmt: skip
    """Frames that carry their numbers, at the times `stamps * base`."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=round(1 / base), options={"threads": "1", **options})
        stream.height, stream.width = size
        stream.pix_fmt = pix_fmt
        stream.time_base = stream.codec_context.time_base = base
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for number, stamp in enumerate(stamps):
            frame = av.VideoFrame.from_ndarray(picture(number % 256, *size), format="rgb24")
            frame.pts, frame.time_base = stamp, base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers_on(clip: Clip) -> list[int]:
    return [number_on(frame) for frame in clip.frames]


def write_usual(folder: Path) -> Path:
    """Six seconds with B-frames and a keyframe every second and a half."""
    return write(folder / "usual.mp4", list(range(48)), g="12", sc_threshold="0", crf="18")
