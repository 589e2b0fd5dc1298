"""What CUDA's allocator is told before torch is imported."""

import os
import subprocess
import sys

import pytest

from tartvg.launch.processes import prepare_allocator

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.mark.parametrize(
    ("given", "then"),
    [
        ({}, ["expandable_segments:True", None]),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, ["max_split_size_mb:64", None]),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}, [None, "backend:cudaMallocAsync"]),
    ],
)
def test_segments_grow_unless_the_user_says_otherwise(given, then, monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    prepare_allocator()
    assert [os.environ.get(name) for name in NAMES] == then


def test_a_run_says_it_before_torch_is_there():
    code = "import sys, tartvg.stages; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
