"""The tower's first layer as a matrix product, beside the library's convolution."""

import time

import pytest
import torch

from tartvg.policy.patches import embed_as_product, patch_product

WIDTH = 3 * 2 * 14 * 14


@pytest.fixture(scope="module")
def released():
    """The layer of the released towers, and patches as large as normalised pixels are."""
    torch.manual_seed(0)
    convolution = torch.nn.Conv3d(3, 1280, (2, 14, 14), (2, 14, 14), bias=False)
    return convolution, torch.randn(256, WIDTH)


def convolved(convolution, rows):
    with torch.no_grad():
        return convolution(rows.view(-1, 3, 2, 14, 14)).view(-1, 1280)


def seconds(call):
    call()
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return sorted(taken)[1]


def test_the_product_is_the_convolution(released):
    convolution, rows = released
    with torch.no_grad():
        product = patch_product(rows, convolution.weight)
    expected = convolved(convolution, rows)
    apart = float((product - expected).abs().max())
    slow = seconds(lambda: convolved(convolution, rows))
    quick = seconds(lambda: patch_product(rows, convolution.weight.detach()))
    print(f"apart by {apart:.1e} of {float(expected.abs().max()):.1f}; Conv3d {slow:.4f} s, product {quick:.4f} s")
    assert apart <= 5e-6


def test_rows_are_cast_to_the_weights_type(released):
    convolution, rows = released
    assert patch_product(rows[:2], convolution.weight.detach().bfloat16()).dtype == torch.bfloat16


def test_the_cpu_stays_with_the_library(policy):
    """Its numbers must not change by a bit; the CUDA branch runs on fake tensors in test_fake_cuda.py."""
    embed = policy.core.model.visual.patch_embed
    rows = torch.randn(8, WIDTH)
    with torch.no_grad():
        assert torch.equal(embed(rows), type(embed).forward(embed, rows))
    assert embed.forward.__qualname__.startswith(embed_as_product.__name__)
