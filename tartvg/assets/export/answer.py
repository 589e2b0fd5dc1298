"""Ask the model in this folder when a sentence happens in a video.

python answer.py clip.mp4 "the door opens"

Needs torch, transformers (tried with 5.23) and PyAV, and nothing else: no adapter, no package of the training.
"""

import json
import math
import sys
from bisect import bisect_right
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

FOLDER = Path(__file__).resolve().parent
SETTINGS = json.loads((FOLDER / "grounding.json").read_text(encoding="utf-8"))
SIDE = 28


def size_of(height: int, width: int, num_frames: int) -> tuple[int, int]:
    """Sides of a frame for the model: multiples of 28 within the budgets of pixels."""
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


def read(path: str | Path) -> tuple[np.ndarray, float]:
    """Frames, uint8 (F, height, width, 3), and the seconds between two pairs of them.

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
    return np.stack([found[stamp] for stamp in chosen]), 2 * step


def patches_of(frames: np.ndarray) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """The rows that the vision tower reads, (T*H*W, 1176), and the grid (T, H, W) in patches of 14 pixels."""
    config = json.loads((FOLDER / "preprocessor_config.json").read_text(encoding="utf-8"))
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("image_mean", "image_std"))
    pixels = (torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous().float() / 255.0 - mean) / std
    time, height, width = len(frames) // 2, frames.shape[1] // 14, frames.shape[2] // 14
    blocks = pixels.view(time, 2, 3, height // 2, 2, 14, width // 2, 2, 14).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return blocks.reshape(time * height * width, -1), (time, height, width)


def positions_of(before: int, after: int, grid: tuple[int, int, int], ticks: float) -> torch.Tensor:
    """Positions of text, video and text, (3, 1, S): the video in absolute time, the text behind it after its last.

    transformers 5 puts that text after the video's height or width instead, which the weights were not trained with.
    """
    axes = (torch.arange(grid[0]) * ticks).long(), torch.arange(grid[1] // 2), torch.arange(grid[2] // 2)
    video = torch.stack(torch.meshgrid(*axes, indexing="ij")).reshape(3, -1) + before
    start = int(video.max()) + 1
    parts = torch.arange(before).expand(3, -1), video, torch.arange(start, start + after).expand(3, -1)
    return torch.cat(parts, dim=1)[:, None]


def answer(model: Any, tokenizer: Any, path: str | Path, query: str) -> str:
    """What the model says, reasoning included. Greedy, by generation_config.json."""
    frames, seconds = read(path)
    patches, grid = patches_of(frames)
    query = " ".join(query.split())
    head = query.removesuffix(".").rstrip()  # without the full stop of a sentence; an ellipsis stays
    prompt = SETTINGS["prompt"].replace("{query}", query if head.endswith(".") else head).replace("<|", "< |")
    content = [{"type": "text", "text": prompt}, {"type": "video"}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    before, after = (tokenizer.encode(part, add_special_tokens=False) for part in text.split("<|video_pad|>"))
    num_video = grid[0] * grid[1] * grid[2] // 4
    ids = torch.tensor([before + [model.config.video_token_id] * num_video + after])
    ticks = seconds * model.config.vision_config.tokens_per_second
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": patches.to(model.dtype),
        "video_grid_thw": torch.tensor([grid]),
        "position_ids": positions_of(len(before), len(after), grid, ticks),
    }
    with torch.no_grad():
        out = model.generate(**{name: value.to(model.device) for name, value in inputs.items()})
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def load(device: str = "cpu") -> tuple[Any, Any]:
    """The model of this folder and its tokenizer."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(FOLDER, dtype="auto").to(device).eval()
    return model, AutoTokenizer.from_pretrained(FOLDER)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(answer(*load("cuda" if torch.cuda.is_available() else "cpu"), *sys.argv[1:]))
