"""Annotation files -> checked values. Every refusal is a ValueError that names the file and the line or entry.

Annotation files come from the internet: their size, their text and their numbers are bounded here, once for all
readers. Nothing is repaired; what can be repaired by a policy is `tartvg.data.annotations`' business.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import math
import stat
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tartvg.types import Span

MAX_FILE_BYTES = 1 << 30
"""The largest annotation file of the field has 4 MB; a gigabyte is not one."""
MAX_TEXT_CHARS = 100_000
"""Longest query, id or video name; longer ones are refused."""
MAX_SECONDS = 1e7
"""Largest time, as in `tartvg.response`: four months is no position in a video."""


def read_text(path: Path) -> str:
    """A whole file in UTF-8, or in UTF-16 with its byte-order mark; newlines as in Python's text files.

    What gzip packed is unpacked, whatever the file's name. Raises ValueError when the file cannot be read, is too big,
    also unpacked, or is a pipe or device: those may never end.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path}: a {'directory' if path.is_dir() else 'pipe or device'}, not a file")
        if status.st_size > MAX_FILE_BYTES:
            raise ValueError(f"{path}: {status.st_size} bytes; an annotation file has at most {MAX_FILE_BYTES}")
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    if content.startswith(b"\x1f\x8b"):
        content = _unpacked(content, path)
    is_wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if is_wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-{16 if is_wide else 8} at byte {error.start}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def ending(path: Path) -> str:
    """The suffix that says what a file holds: `.json` of `val.json` and of `val.json.gz`."""
    return Path(path.name.removesuffix(".gz")).suffix


def _unpacked(content: bytes, path: Path) -> bytes:
    try:
        unpacked = gzip.GzipFile(fileobj=io.BytesIO(content)).read(MAX_FILE_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not usable as gzip ({error})") from error
    if len(unpacked) > MAX_FILE_BYTES:
        raise ValueError(f"{path}: unpacks to more than {MAX_FILE_BYTES} bytes, which no annotation file has")
    return unpacked


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """(`FILE, line N`, line) for each line that is not blank; LF and CRLF ends, with or without a final one."""
    # Not splitlines(): it also splits at U+2028 and the like, which occur inside sentences.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield f"{path}, line {number}", line.removesuffix("\r")


def parse_json(text: str, where: str) -> Any:
    """JSON without NaN, infinity and repeated keys: of two equal keys Python would drop the first in silence."""
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not usable as JSON ({error})") from error


def read_json(path: Path) -> Any:
    """One JSON value; see `parse_json`."""
    return parse_json(read_text(path), str(path))


def read_json_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`FILE, line N`, object) for each line of a JSON Lines file."""
    for where, line in read_lines(path):
        yield where, mapping(parse_json(line, where), where)


def mapping(value: Any, where: str) -> dict[str, Any]:
    """`value` if it is an object."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, got {type(value).__name__}")
    return value


def sequence(value: Any, where: str) -> list[Any]:
    """`value` if it is an array."""
    if not isinstance(value, list):
        raise ValueError(f"{where}: expected an array, got {type(value).__name__}")
    return value


def field(row: Mapping[str, Any], name: str, where: str) -> Any:
    """`row[name]`; it has to be there."""
    if name not in row:
        raise ValueError(f"{where}: {name!r} is missing")
    return row[name]


def text_of(value: Any, name: str, where: str) -> str:
    """A string of bounded length."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} must be a string, got {type(value).__name__}")
    if len(value) > MAX_TEXT_CHARS:
        raise ValueError(f"{where}: {name} has {len(value)} characters; at most {MAX_TEXT_CHARS} are accepted")
    return value


def whole_number(value: Any, name: str, where: str) -> int:
    """An integer that is none by courtesy (no bool, no float)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{where}: {name} must be a whole number, got {shorten(value)}")
    return value


def seconds(value: Any, name: str, where: str) -> float:
    """A finite time of at most `MAX_SECONDS` in absolute value. Accepts numbers and strings that hold one."""
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{where}: {name} must be a number, got {shorten(value)}") from None
    if not math.isfinite(number) or abs(number) > MAX_SECONDS:
        raise ValueError(f"{where}: {name} must be finite and at most {MAX_SECONDS:g} s, got {number:g}")
    return number


def length(value: Any, where: str) -> float:
    """The duration of a video in seconds: positive."""
    number = seconds(value, "duration", where)
    if number <= 0:
        raise ValueError(f"{where}: duration must be > 0, got {number:g}")
    return number


def span(value: Any, where: str) -> Span:
    """`[start, end]` in seconds, possibly reversed."""
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{where}: a window is [start, end], got {shorten(value)}")
    return Span(seconds(value[0], "start", where), seconds(value[1], "end", where))


def per_video(
    path: Path, times: str = "timestamps", texts: str = "sentences"
) -> Iterator[tuple[str, str, dict[str, Any], list[tuple[Span, str]]]]:
    """The form `{video: {timestamps: [[a, b], ...], sentences: [...], ...}}` of ActivityNet and what descends from it.

    Yields (where, video, the video's object, its (span, sentence) pairs). The spans are in the file's own unit. `times`
    and `texts` are the names of the two lists.
    """
    for video, value in mapping(read_json(path), str(path)).items():
        where = f"{path}, video {shorten(video)}"
        entry = mapping(value, where)
        spans = sequence(field(entry, times, where), where)
        sentences = sequence(field(entry, texts, where), where)
        if len(spans) != len(sentences):
            raise ValueError(f"{where}: {len(spans)} {times} but {len(sentences)} {texts}")
        pairs = []
        for number, (window, sentence) in enumerate(zip(spans, sentences, strict=True)):
            entry_at = f"{where}, sentence {number}"
            pairs.append((span(window, entry_at), text_of(sentence, "the sentence", entry_at)))
        yield where, text_of(video, "the video", where), entry, pairs


def per_query(path: Path) -> Iterator[tuple[str, dict[str, Any], str, str, tuple[Span, ...], float]]:
    """The form `{qid, query, vid, duration, relevant_windows: [[a, b], ...]}`, a line, of QVHighlights and lighthouse.

    Yields (where, the whole object, vid, query, windows, duration), all in seconds.
    """
    for where, value in read_json_objects(path):
        yield (
            where,
            value,
            text_of(field(value, "vid", where), "vid", where),
            text_of(field(value, "query", where), "query", where),
            tuple(span(window, where) for window in sequence(value.get("relevant_windows", []), where)),
            length(field(value, "duration", where), where),
        )


def shorten(value: Any) -> str:
    """`value` for an error message, which must not repeat megabytes."""
    shown = repr(value[:60] if isinstance(value, str) else value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {shorten(key)} is there twice")
            seen.add(key)
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")
