"""Input that means harm or makes no sense, and what must hold whatever comes. No torch.

    python tests/fuzzing.py completions --count 1000000         through parser and rubric
    python tests/fuzzing.py annotations --count 10000           files, through every reader and the scorer's
    python tests/fuzzing.py atheris --minutes 30                guided by coverage; needs `pip install atheris`

Each prints what it did and ends with code 1 on the first input that breaks a promise, which it writes to the current
folder. The quick tests run a part of the first two.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
import time
from pathlib import Path

from tartvg.config import AnchorsConfig, CountPenalty, DatasetName, IouKind, RewardConfig
from tartvg.data.annotations import ReadOptions
from tartvg.data.datasets import SOURCES
from tartvg.data.parsing import MAX_SECONDS, MAX_TEXT_CHARS
from tartvg.evaluation.formats import read_predictions
from tartvg.evaluation.readings import READINGS
from tartvg.response import parse_response
from tartvg.rewards import Rubric
from tartvg.types import GroundingSample, Span

MAX_SECONDS_PER_COMPLETION = 1.0
MAX_SECONDS_PER_FILE = 5.0
"""Of processor time; both are hundreds of times what is usual."""

# -- completions -------------------------------------------------------------------------------------------------------

SAMPLE = GroundingSample("q0", Path("v.mp4"), "a person opens a door", (Span(10.0, 20.0),), 60.0, "train")
RUBRICS = [
    Rubric(RewardConfig(), AnchorsConfig()),
    Rubric(RewardConfig(iou=IouKind.hard, tar2_form=CountPenalty.squared), AnchorsConfig(count=1, max_count=1)),
    Rubric(RewardConfig(tar2_form=CountPenalty.indicator, answer_is_last_anchor=False), AnchorsConfig(3, 5)),
    Rubric(RewardConfig(needs_anchors=False, beta=0, gamma=0, tar1_weight=0), AnchorsConfig()),
]
PIECES = [
    "<think>", "</think>", "<answer>", "</answer>", "<timestamp>", "</timestamp>", "<|im_end|>", "<|endoftext|>",
    "12.54 to 17.83", "20 to 10", "0 to 0", "-1 to 5", "nan to inf", "1e9 to 1e10", "9999999 to 10000000",
    "99999999 to 1", "1 to 2 to 3", "3s to 4 seconds", " to ", ".", "1" * 40, "\n", " ", "\x00",
    "\ud800", "\u202e", "person", "<", ">",
]  # fmt: skip


def valid(rng: random.Random) -> str:
    spans = [sorted((rng.uniform(0, 60), rng.uniform(0, 60))) for _ in range(rng.randrange(1, 6))]
    stamps = " so ".join(f"<timestamp>{a:.2f} to {b:.2f}</timestamp>" for a, b in spans)
    return f"<think>I see {stamps} </think><answer>{spans[-1][0]:.2f} to {spans[-1][1]:.2f}</answer>"


def mutated(rng: random.Random) -> str:
    text = valid(rng)
    for _ in range(rng.randrange(1, 4)):
        a, b = sorted((rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)))
        match rng.randrange(4):
            case 0:
                text = text[:a] + text[min(b, a + 12) :]
            case 1:
                text = text[:a] + rng.choice(PIECES) + text[a:]
            case 2:
                text = text[:b] + text[a:b] + text[b:]
            case _:
                text = text[:b]
    return text


def soup(rng: random.Random) -> str:
    return "".join(rng.choices(PIECES, k=rng.randrange(14)))


def check_reward(text, response, rubric, reward):
    """What holds for every completion."""
    setting, anchors = rubric.reward, rubric.anchors
    paid = min(response.num_anchors, anchors.max_count)
    assert math.isfinite(reward.total), text
    assert reward.terms["format"] in (0.0, 1.0)
    assert not (reward.terms["format"] and response.num_anchors > anchors.max_count), text
    iou = reward.terms["iou"]
    assert iou == setting.unparsed_iou if response.answer is None else -1 <= iou <= 1, text
    assert abs(reward.terms["tar1"]) <= paid * (paid + 1) / 2, text
    assert abs(reward.terms["tar3"]) <= max(paid - 1, 0), text
    assert reward.terms["tar2"] >= 0
    assert len(reward.anchor_ious) == response.num_anchors
    assert all(-1 <= v <= 1 for v in reward.anchor_ious), text
    # no completion earns more than a perfect one that uses every paid anchor
    most = anchors.max_count
    best = setting.format_weight + setting.iou_weight + setting.tar1_weight * most * (most + 1) / 2
    assert reward.total <= best + setting.gamma * (most - 1), text


# -- annotation and prediction files -----------------------------------------------------------------------------------

NUMBERS = [
    0,
    1,
    -1,
    3.5,
    1e-300,
    1e300,
    2e7,
    10**400,
    float("nan"),
    float("inf"),
    True,
    None,
    "7",
    "nan",
    "1e9",
    [],
    {},
]
TEXTS = ["", " ", "a.mp4", "../../etc/passwd", "/etc/passwd", "x/../../y", "..\\a", "a\0b", "\ud800", "\u202e", "##",
         "x" * (MAX_TEXT_CHARS + 1), "<|im_start|>", "2.0 - 9.0", "12 - ", 7, None, [], {}]  # fmt: skip


BENCHES = (DatasetName.charades_timelens, DatasetName.activitynet_timelens, DatasetName.qvhighlights_timelens)
TIMELENS = (DatasetName.timelens_100k, DatasetName.timelens2_93k)
LINES = (DatasetName.jsonl, DatasetName.qvhighlights, *TIMELENS)
"""Data sets whose files are JSON Lines."""


def row_of(rng, name):
    """One record of a data set's own form, mostly valid."""
    a, b = sorted((round(rng.uniform(0, 50), 2), round(rng.uniform(0, 50), 2)))
    number = rng.randrange(10**6)
    pairs = {"timestamps": [[a, b]], "sentences": ["a person opens the door."]}
    if name in BENCHES:
        return {"duration": 60.0, "spans": [[a, b]], "queries": ["a person opens the door."]}
    if name in TIMELENS:
        event = {"query": "q", "span": rng.choice([[[a, b]], [a, b]])}
        more = rng.choice([{"events": [event, event]}, {**event, "rollouts": ["[[1, 2]]"]}])
        return {"video_path": f"x/v{number}.mp4", "duration": 60.0, "source": "s", **more}
    return {
        DatasetName.jsonl: {"video": f"v{number}.mp4", "query": "q", "windows": [[a, b]], "duration": 60.0},
        DatasetName.qvhighlights: {"qid": number, "query": "q", "vid": f"v{number}", "duration": 60,
                                   "relevant_windows": [[a, b]]},
        DatasetName.activitynet: {"duration": 60.0, **pairs},
        DatasetName.charades_sta: {"duration": 60.0, **pairs},
        DatasetName.tacos: {"fps": 25.0, "num_frames": 1500, **pairs},
        DatasetName.tvgbench: rng.choice([
            {"path": f"x/v{number}.mp4", "question": "q", "answer": f"{a}-{b}", "duration": 60.0, "start": 1, "end": 2},
            {"video": f"v{number}.mp4", "sentence": "s", "timestamp": [a, b], "duration": 60.0},
        ]),
    }[name]  # fmt: skip


def bent(rng, value, depth=0):
    """The same value with one thing wrong, somewhere inside."""
    if isinstance(value, dict) and value and rng.random() < 0.9 - 0.2 * depth:
        key = rng.choice(list(value))
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return {k: bent(rng, v, depth + 1) if k == key else v for k, v in value.items()}
    if isinstance(value, list) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        if rng.random() < 0.2:
            return value[:place] + value[place + 1 :]
        return [bent(rng, v, depth + 1) if i == place else v for i, v in enumerate(value)]
    return rng.choice(TEXTS if isinstance(value, str) and rng.random() < 0.8 else NUMBERS)


def damaged(rng, content):
    """Bytes lost, doubled or changed."""
    if not content:
        return content
    a, b = sorted((rng.randrange(len(content)), rng.randrange(len(content))))
    match rng.randrange(4):
        case 0:
            return content[:a] + content[min(b, a + 20) :]
        case 1:
            return content[:b] + content[a:b] + content[b:]
        case 2:
            return content[:a] + bytes([rng.randrange(256)]) + content[a + 1 :]
        case _:
            return content[:a] + rng.choice([b"[" * 3000, b"\x00", b"\xff", b"NaN", b"9" * 5000, b"\n"]) + content[a:]


def annotation_file(rng, name):
    """The content of a file: valid, bent or damaged."""
    rows = [row_of(rng, name) for _ in range(rng.randrange(1, 5))]
    if rng.random() < 0.7:
        place = rng.randrange(len(rows))
        rows[place] = bent(rng, rows[place])
    if name in LINES:
        text = "".join(json.dumps(row, ensure_ascii=rng.random() < 0.5) + "\n" for row in rows)
    elif name is DatasetName.tvgbench:
        text = json.dumps(rows)
    else:
        keys = [
            rng.choice([f"v_{i}", "v_0", "../x", "/y"]) if rng.random() < 0.1 else f"v_{i}" for i in range(len(rows))
        ]
        text = "{" + ", ".join(f"{json.dumps(k)}: {json.dumps(r)}" for k, r in zip(keys, rows, strict=True)) + "}"
    content = text.encode("utf-8", "surrogatepass")
    return damaged(rng, content) if rng.random() < 0.4 else content


def charades_files(rng):
    """The text form with its table."""
    lines = [
        f"V{i} {rng.uniform(0, 9):.1f} {rng.uniform(0, 60):.1f}##a person sits." for i in range(rng.randrange(1, 5))
    ]
    table = "id,length\n" + "".join(f"V{i},{rng.choice(['30.5', '60', '0', 'nan', 'x', ''])}\n" for i in range(5))
    text, table = ("\n".join(lines) + "\n").encode(), table.encode()
    return (damaged(rng, text), table) if rng.random() < 0.5 else (text, damaged(rng, table))


def prediction_file(rng, samples):
    """A prediction file of one of the known forms, about `samples`."""
    rows, form = [], rng.randrange(8)
    for i, sample in enumerate(samples):
        rows.append([
            {"sample_id": sample.sample_id, "output_text": rng.choice([valid, mutated, soup])(rng)},
            {"qid": i, "query": sample.query, "pred_relevant_windows": [[1.0, 2.0, 0.5]]},
            {"videos": ["v.mp4"], "messages": [{"role": "user", "content": "q?"}], "response": "1 to 2"},
            {"doc_id": i, "target": "[1, 2]", "filtered_resps": ["1 - 2"], "input": "q?"},
            {"prompt": "q?", "predict": "from 1 to 2", "label": ""},
            {"v.mp4>>>q>>>[1, 2]": {"timestamps": [[1, 2]], "answers": "1 - 2"}},
            {"qid": f"activitynet_{i}", "target": [1, 2], "duration": 9.0, "output_text": "1 to 2"},
            {"sample_id": sample.sample_id, "sample_index": 0, "query": sample.query, "video": "v.mp4",
             "windows": [[1, 2]], "duration": 9.0, "text": "", "anchors": [[1, 2]], "answer": [1, 2], "faults": [],
             "is_finished": True, "seconds": 0.1},
        ][form])  # fmt: skip
    if rows and rng.random() < 0.8:
        place = rng.randrange(len(rows))
        rows[place] = bent(rng, rows[place])
    content = "".join(json.dumps(row) + "\n" for row in rows).encode("utf-8", "surrogatepass")
    return damaged(rng, content) if rng.random() < 0.4 else content


def check_samples(annotations, videos):
    """What holds for everything that a reader lets through."""
    for sample in annotations.samples:
        assert sample.video.is_relative_to(videos) and ".." not in sample.video.parts, sample
        assert len(sample.query) <= MAX_TEXT_CHARS and 0 < sample.duration <= MAX_SECONDS, sample
        assert all(abs(t) <= MAX_SECONDS for window in sample.windows for t in window), sample


def read_once(rng, folder):
    """One file through one reader; whether it was accepted. Any error but a ValueError that names it is a bug."""
    name = rng.choice([n for n in SOURCES if n.value not in ("planted", "planted_long")] + [None])
    options = ReadOptions(rng.choice(["train", "test"]), folder / "videos")
    paths = [folder / ("f.jsonl" if name in (*LINES, None) else "f.json")]
    samples = [GroundingSample(f"qvhighlights_{i}", Path("v.mp4"), "q", (Span(1, 2),), 9.0, "test") for i in range(3)]
    if name is None:
        paths[0].write_bytes(prediction_file(rng, samples))
    elif name is DatasetName.charades_sta and rng.random() < 0.5:
        paths = [folder / "f.txt", folder / "f.csv"]
        for path, content in zip(paths, charades_files(rng), strict=True):
            path.write_bytes(content)
    else:
        paths[0].write_bytes(annotation_file(rng, name))
    start = time.process_time()
    try:
        if name is None:
            read_predictions(paths[0], samples, rng.choice([None, *READINGS]))
        else:
            check_samples(SOURCES[name].read(paths, options), folder / "videos")
    except ValueError as error:
        assert any(str(path) in str(error) for path in paths), f"names no file: {error}"
        assert len(str(error)) < 1000 + len(str(folder)) * 4, "repeats the file"
        return False
    finally:
        assert time.process_time() - start < MAX_SECONDS_PER_FILE
    return True


# -- campaigns ---------------------------------------------------------------------------------------------------------


def fuzz_completions(count, seed):
    """Random completions through parser and rubric."""
    rng, makers, slowest = random.Random(seed), [valid, mutated, mutated, soup], 0.0
    for i in range(count):
        text = makers[i % len(makers)](rng)
        start = time.process_time()
        response = parse_response(text)
        rubric = RUBRICS[rng.randrange(len(RUBRICS))]
        reward = rubric.score(response, SAMPLE)
        slowest = max(slowest, time.process_time() - start)
        check_reward(text, response, rubric, reward)
    assert slowest < MAX_SECONDS_PER_COMPLETION
    print(f"{count} completions, the slowest took {1000 * slowest:.1f} ms; no promise broken")


def fuzz_annotations(count, seed):
    """Random files through the readers."""
    accepted = 0
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "videos").mkdir()
        for i in range(count):
            try:
                accepted += read_once(random.Random(f"{seed} {i}"), Path(folder))
            except BaseException:
                print(f"file {i} of seed {seed} breaks a promise", file=sys.stderr)
                raise
    print(f"{count} files, {accepted} accepted, {count - accepted} refused by name; no promise broken")


def fuzz_guided(minutes, corpus, seed):
    """libFuzzer mutates the inputs in `corpus` towards code that was not reached before."""
    import atheris

    atheris.instrument_all()
    corpus.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp())
    (folder / "videos").mkdir()
    readers = [SOURCES[name].read for name in sorted(SOURCES, key=lambda n: n.value) if "planted" not in name.value]

    def test_one(data):
        if not data:
            return
        kind, content = data[0] % (len(readers) + 1), data[1:]
        if kind == len(readers):
            text = content.decode("utf-8", "surrogateescape")
            rubric = RUBRICS[len(content) % len(RUBRICS)]
            response = parse_response(text)
            check_reward(text, response, rubric, rubric.score(response, SAMPLE))
            return
        path = folder / "f.json"
        path.write_bytes(content)
        try:
            check_samples(readers[kind]([path], ReadOptions("test", folder / "videos")), folder / "videos")
        except ValueError as error:
            assert str(path) in str(error), error

    options = [
        f"-max_total_time={60 * minutes}",
        f"-seed={seed}",
        "-max_len=4096",
        "-timeout=10",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], str(corpus), *options], test_one)
    atheris.Fuzz()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["completions", "annotations", "atheris"])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--minutes", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", type=Path, default=Path("experiments/fuzzing/corpus"))
    options = parser.parse_args()
    if options.what == "completions":
        fuzz_completions(options.count, options.seed)
    elif options.what == "annotations":
        fuzz_annotations(options.count, options.seed)
    else:
        fuzz_guided(options.minutes, options.corpus, options.seed)


if __name__ == "__main__":
    main()
