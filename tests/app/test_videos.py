"""What visitors bring: taken over, refused in words, deleted."""

import pytest
from helpers.videos import write_usual

from tartvg.app.videos import Refusal, Shelf, refusal
from tartvg.config import ServeConfig


@pytest.fixture
def shelf(tmp_path):
    folder = tmp_path / "shelf"
    folder.mkdir()
    return Shelf(folder, ServeConfig(max_seconds=10, max_megabytes=1))


def kept(shelf):
    return sorted(path.name for path in shelf.folder.rglob("*") if path.is_file())


def test_a_video_is_taken_over_replaced_and_forgotten(shelf, tmp_path):
    for _ in range(2):
        shown = shelf.take(write_usual(tmp_path), "anna")
        assert shown.duration == pytest.approx(6.0) and shown.frames.startswith(b"\xff\xd8")
        assert kept(shelf) == ["video.mp4"] and not (tmp_path / "usual.mp4").exists()
    shelf.take(write_usual(tmp_path), "berta")
    example = shelf.example(write_usual(tmp_path), "a circle")
    assert len(kept(shelf)) == 3 and (tmp_path / "usual.mp4").exists()
    for visitor in ("anna", "anna", "berta", "nobody"):
        shelf.forget(visitor)
    assert kept(shelf) == ["video.mp4"] and example.path.is_file()


def test_what_is_refused_is_said_and_not_kept(shelf, tmp_path):
    tight = Shelf(shelf.folder, ServeConfig(max_seconds=5.5))
    with pytest.raises(Refusal, match=r"lasts 6 s; the limit is 5.5 s \(serve.max_seconds\)"):
        tight.take(write_usual(tmp_path), "anna")
    for name, content, words in (
        ("broken.mp4", b"\0" * 999, "This file cannot be read as a video: Invalid data"),
        ("page.mp4", b"<!doctype html><p>404", "a web page and not a video"),
        ("big.mp4", b"\0" * 2_000_000, r"has 2 MB; the limit is 1 MB \(serve.max_megabytes\)"),
    ):
        file = tmp_path / name
        file.write_bytes(content)
        with pytest.raises(Refusal, match=words) as refused:
            shelf.take(file, "anna")
        assert str(tmp_path) not in str(refused.value) and not file.exists()
    assert kept(shelf) == []


def test_questions_that_are_not_asked(shelf, tmp_path):
    limits = ServeConfig(max_characters=5)
    shown = shelf.take(write_usual(tmp_path), "anna")
    assert "Upload a video" in refusal(None, "x", limits)
    assert "Type a sentence" in refusal(shown, " \n", limits)
    assert "has 6 characters; the limit is 5" in refusal(shown, "abcdef", limits)
    assert refusal(shown, "abcde", limits) == ""
