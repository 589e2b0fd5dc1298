"""DeepStack: features of the vision tower's earlier blocks, added inside the decoder (Meng et al., arXiv 2406.04334).

Behind decoder layer k the k-th of them is added to the hidden states at the video's places in the prompt. Completions
have no video, so a prompt that is shared stays exactly the same for all of them.

Legend: B rows, S tokens of a row, N video tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class DeepStack:
    """What is added to one prompt's hidden states; nothing for a family without."""

    places: Tensor
    """int64 (N,), where the video's tokens stand in the prompt."""
    features: tuple[Tensor, ...]
    """(N, hidden), one for each of the decoder's first layers."""

    def added(self, layer: int, hidden: Tensor) -> Tensor:
        """Hidden states (B, S, hidden) behind a layer, all rows with the same prompt at their beginning."""
        if layer >= len(self.features):
            return hidden
        features = self.features[layer].to(hidden.dtype)
        return hidden.index_add(1, self.places, features.expand(len(hidden), -1, -1))

    @contextmanager
    def inside(self, language_model: Any) -> Iterator[None]:
        """Inside the block the library's own pass over the decoder adds them. Not for layers that run again later."""

        def hook(layer: int, _: Any, __: Any, output: Tensor) -> Tensor:
            return self.added(layer, output)

        layers = language_model.layers[: len(self.features)]
        handles = [layer.register_forward_hook(partial(hook, index)) for index, layer in enumerate(layers)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
