"""Ask the model in this folder when a sentence happens in a video.

python answer.py clip.mp4 "the door opens"

Needs torch, transformers (tried with 5.23) and PyAV, and nothing else: no adapter, no package of the training.
"""

import json
import math
import sys
from bisect import bisect_right
from itertools import groupby
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

FOLDER = Path(__file__).resolve().parent
SETTINGS = json.loads((FOLDER / "grounding.json").read_text(encoding="utf-8"))
PICTURES = json.loads((FOLDER / "preprocessor_config.json").read_text(encoding="utf-8"))
PATCH = PICTURES["patch_size"]
SIDE = 2 * PATCH


def size_of(height: int, width: int, num_frames: int) -> tuple[int, int]:
    """Sides of a frame for the model: multiples of two patches within the budgets of pixels."""
    share = SETTINGS["total_pixels"] * 2 // num_frames
    most = max(min(SETTINGS["max_pixels"], share), int(SETTINGS["min_pixels"] * 1.05))
    new = max(SIDE, round(height / SIDE) * SIDE), max(SIDE, round(width / SIDE) * SIDE)
    if new[0] * new[1] > most:
        scale = math.sqrt(height * width / most)
        new = max(SIDE, math.floor(height / scale / SIDE) * SIDE), max(SIDE, math.floor(width / scale / SIDE) * SIDE)
    elif new[0] * new[1] < SETTINGS["min_pixels"]:
        scale = math.sqrt(SETTINGS["min_pixels"] / (height * width))
        new = math.ceil(height * scale / SIDE) * SIDE, math.ceil(width * scale / SIDE) * SIDE
    return new


def read(path: str | Path) -> tuple[np.ndarray, list[float], float]:
    """Frames, uint8 (F, height, width, 3), the second in the middle of each pair, and the seconds between two pairs.

    For files as cameras and ffmpeg write them; the training's own reader also mends cut and rotated ones.
    """
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        packets = sorted((p.pts, p.duration or 0) for p in container.demux(stream) if p.pts is not None)
        clock = float(stream.time_base or 1)
    stamps, first = [stamp for stamp, _ in packets], packets[0][0]
    duration = (stamps[-1] + packets[-1][1] - first) * clock
    most = min(SETTINGS["max_frames"], len(stamps)) // 2 * 2
    wanted = min(max(duration * SETTINGS["fps"], SETTINGS["min_frames"]), most)
    count = max(2, math.floor((wanted + 1e-6) / 2) * 2)
    step = duration / count
    chosen = [stamps[min(int(i * len(stamps) / count), len(stamps) - 1)] for i in range(count)]
    if any(abs((stamp - first) * clock - i * step) > step / 2 for i, stamp in enumerate(chosen)):
        times = [(stamp - first) * clock for stamp in stamps]  # of a variable frame rate
        chosen = [stamps[bisect_right(times, i * step) - 1] for i in range(count)]
    found = {}
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            if frame.pts in chosen:
                height, width = size_of(frame.height, frame.width, count)
                image = frame.reformat(width=width, height=height, format="rgb24", interpolation="BICUBIC")
                found[frame.pts] = image.to_ndarray()
    shown = [(stamp - first) * clock for stamp in chosen]
    middles = [(a + b) / 2 for a, b in zip(shown[::2], shown[1::2], strict=True)]
    return np.stack([found[stamp] for stamp in chosen]), middles, 2 * step


def patches_of(frames: np.ndarray) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """The rows that the vision tower reads, (T*H*W, 6 * patch²), and the grid (T, H, W) in patches."""
    white = SETTINGS["white"]  # in the order of the training's arithmetic: equal to the last bit
    mean, std = (torch.tensor(PICTURES[name])[:, None, None] * (255 / white) for name in ("image_mean", "image_std"))
    pixels = (torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous().float() / white - mean) / std
    time, height, width = len(frames) // 2, frames.shape[1] // PATCH, frames.shape[2] // PATCH
    blocks = pixels.view(time, 2, 3, height // 2, 2, PATCH, width // 2, 2, PATCH).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return blocks.reshape(time * height * width, -1), (time, height, width)


def positions_of(is_video: list[bool], grid: tuple[int, int, int], ticks: float) -> torch.Tensor:
    """Positions of the prompt's tokens, (3, 1, S): what follows goes on after the largest position so far.

    Video tokens without text between them share the clock, `ticks` to a temporal step. transformers 5 puts the text
    behind a Qwen2.5-VL's video after its height or width instead, which the weights were not trained with.
    """
    rows, columns = grid[1] // 2, grid[2] // 2
    parts, start = [], 0
    for is_block, run in groupby(is_video):
        length = len(list(run))
        axes = (torch.arange(length // (rows * columns)) * ticks).long(), torch.arange(rows), torch.arange(columns)
        block = torch.stack(torch.meshgrid(*axes, indexing="ij")).reshape(3, -1)
        parts.append(start + (block if is_block else torch.arange(length).expand(3, -1)))
        start = int(parts[-1].max()) + 1
    return torch.cat(parts, dim=1)[:, None]


def answer(model: Any, tokenizer: Any, path: str | Path, query: str) -> str:
    """What the model says, reasoning included. Greedy, by generation_config.json."""
    frames, times, seconds = read(path)
    patches, grid = patches_of(frames)
    query = " ".join(query.split())
    head = query.removesuffix(".").rstrip()  # without the full stop of a sentence; an ellipsis stays
    prompt = SETTINGS["prompt"].replace("{query}", query if head.endswith(".") else head).replace("<|", "< |")
    content = [{"type": "text", "text": prompt}, {"type": "video"}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    place, step, token = SETTINGS["place"], SETTINGS["step"], model.config.video_token_id
    shown = [step.format(time=time) for time in times]  # times are text, or else in the positions
    short = tokenizer.encode(text.replace(place, "".join(shown)), add_special_tokens=False)
    ids = torch.tensor([[x for x in short for _ in range(grid[1] * grid[2] // 4 if x == token else 1)]])
    ticks = seconds * getattr(model.config.vision_config, "tokens_per_second", 0)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": patches.to(model.dtype),
        "video_grid_thw": torch.tensor([grid]),
        "position_ids": positions_of((ids[0] == token).tolist(), grid, ticks),
    }
    with torch.no_grad():
        out = model.generate(**{name: value.to(model.device) for name, value in inputs.items()})
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def load(device: str = "cpu") -> tuple[Any, Any]:
    """The model of this folder and its tokenizer."""
    model = AutoModelForImageTextToText.from_pretrained(FOLDER, dtype="auto").to(device).eval()
    return model, AutoTokenizer.from_pretrained(FOLDER)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(answer(*load("cuda" if torch.cuda.is_available() else "cpu"), *sys.argv[1:]))
