"""Decoding: the completions of some prompts, token by token, on tensors that keep their place in memory.

A step feeds each row's last token, draws the next one, and notes it with its log-probability and whether the row has
ended. It is a function of tensors on the device alone: even the number of tokens so far is one. The host only looks
every few tokens at which prompts are over. So on CUDA a step is captured as a graph, which starts with one call what
else are thousands of kernels; on the CPU the same step runs as it is.

Legend: P prompts, G rollouts per prompt, R = P * G rows, T tokens of a completion, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from tartvg.config import SamplingConfig
from tartvg.policy.decode_layers import DecodePass
from tartvg.policy.kv_cache import DecodeCache
from tartvg.policy.sampling import draw, restrict, uniforms

Head = Callable[[Tensor], Tensor]
"""Hidden states (R, hidden) -> float32 logits (R, V)."""
Said = tuple[list[int], list[float]]
"""Tokens of a row up to its end, and their log-probabilities."""
Watch = Callable[[list[int]], None]
"""Told the newest token of every row that is still decoded, token after token. What it raises ends the decoding."""


@dataclass(frozen=True)
class Pace:
    """What suits a kind of device; the tokens do not depend on it."""

    look_every: int
    """Tokens between two looks at which prompts are over."""
    bucket: int
    """Tokens by which the places for the rows' own keys and values grow."""
    least_over: float
    """Share of the prompts that are over before their rows are dropped."""


PACES = {
    "cpu": Pace(look_every=1, bucket=64, least_over=0.0),
    # A look waits for all kernels, and each growth or drop captures the graph anew.
    "cuda": Pace(look_every=16, bucket=256, least_over=0.5),
}


@dataclass
class Rows:
    """What a step reads and writes beside the cache; all tensors but `length` have a row for each completion."""

    ids: Tensor
    """int64 (R,), the token to feed."""
    start: Tensor
    """int64 (R,), position of the first token."""
    temperature: Tensor
    """float32 (R, 1); 0 is greedy."""
    numbers: Tensor
    """float64 (R, T), what each token is drawn with."""
    has_ended: Tensor
    """bool (R,)."""
    tokens: Tensor
    """int64 (R, T); what follows an end is of no account."""
    logps: Tensor
    """float32 (R, T), at the row's temperature, before top-k and top-p."""
    length: Tensor
    """int64 (1,), tokens of every row so far."""

    @classmethod
    def begin(cls, start: Tensor, temperature: Tensor, numbers: Tensor) -> Rows:
        """Rows that have no token yet."""
        rows, device = len(start), start.device
        return cls(
            ids=torch.zeros(rows, dtype=torch.long, device=device),
            start=start,
            temperature=temperature,
            numbers=numbers,
            has_ended=torch.zeros(rows, dtype=torch.bool, device=device),
            tokens=torch.zeros(numbers.shape, dtype=torch.long, device=device),
            logps=torch.zeros(numbers.shape, device=device),
            length=torch.zeros(1, dtype=torch.long, device=device),
        )

    def keep(self, rows: Tensor) -> None:
        """Drop all other rows."""
        for field in fields(self):
            if field.name != "length":
                setattr(self, field.name, getattr(self, field.name)[rows])

    def state(self) -> list[Tensor]:
        """What a step changes."""
        return [self.ids, self.has_ended, self.tokens, self.logps, self.length]


@dataclass
class Decoding:
    """The step, and all that it works on."""

    decoder: DecodePass
    head: Head
    cache: DecodeCache
    rows: Rows
    limits: SamplingConfig
    """Of the rows that are not greedy."""
    ends: Tensor
    """int64 (any number,), tokens that end a row."""
    has_greedy: bool
    has_drawn: bool

    def step(self) -> None:
        """Feed each row's last token and draw the next."""
        place = self.rows.length - 1
        self.cache.open(place)
        self.draw(self.decoder(self.rows.ids, self.rows.start + place, self.cache))

    def draw(self, hidden: Tensor) -> None:
        """Draw a token of each row behind hidden states (R, hidden), and note it."""
        rows = self.rows
        is_greedy = rows.temperature == 0
        logits = self.head(hidden) / rows.temperature.masked_fill(is_greedy, 1.0)
        if self.has_greedy:
            chosen = logits.argmax(dim=-1)
        if self.has_drawn:
            drawn = draw(restrict(logits, self.limits), rows.numbers.index_select(1, rows.length)[:, 0])
            chosen = torch.where(is_greedy[:, 0], chosen, drawn) if self.has_greedy else drawn
        rows.ids.copy_(chosen)
        rows.tokens.index_copy_(1, rows.length, chosen[:, None])
        rows.logps.index_copy_(1, rows.length, logits.log_softmax(dim=-1).gather(-1, chosen[:, None]))
        rows.has_ended.logical_or_((chosen[:, None] == self.ends).any(dim=-1))
        rows.length.add_(1)


class Stepper:
    """Takes steps: as they are, or on CUDA by a graph that is captured whenever the tensors have moved."""

    distrust: ClassVar[str | None] = None
    """Why this process captures no more graphs."""
    is_proven: ClassVar[bool] = False
    """Whether a graph has made a step just as it is made without."""

    def __init__(self, decoding: Decoding) -> None:
        self.decoding = decoding
        self.graph: torch.cuda.CUDAGraph | None = None
        self.memory: Any = None
        """Pool that this sampling's graphs share."""

    def __call__(self) -> None:
        """Take one step."""
        if self.graph is not None:
            self.graph.replay()
        elif self.decoding.rows.ids.is_cuda and Stepper.distrust is None:
            self._capture()
        else:
            self.decoding.step()

    def forget(self) -> None:
        """Capture anew: rows were dropped, or places were added."""
        self.graph = None

    def _capture(self) -> None:
        """Take one step as it is, which also makes what kernels make once, and capture the next without taking it."""
        before = [x.clone() for x in self.decoding.rows.state()]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.decoding.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads (NCCL's) may call CUDA meanwhile
            with torch.cuda.graph(graph, pool=self.memory, capture_error_mode="thread_local"):
                self.decoding.step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._give_up(f"{type(error).__name__}: {error}".splitlines()[0])
            return
        self.memory = graph.pool()
        if Stepper.is_proven or self._prove(graph, before):
            self.graph = graph

    def _prove(self, graph: torch.cuda.CUDAGraph, before: Sequence[Tensor]) -> bool:
        """Take the last step again by the graph, and compare."""
        state = self.decoding.rows.state()
        expected = [x.clone() for x in state]
        for now, then in zip(state, before, strict=True):
            now.copy_(then)
        graph.replay()
        Stepper.is_proven = all(_are_close(a, b) for a, b in zip(state, expected, strict=True))
        if not Stepper.is_proven:
            for now, then in zip(state, expected, strict=True):
                now.copy_(then)
            self._give_up("it drew something else than the step that it captured")
        return Stepper.is_proven

    def _give_up(self, reason: str) -> None:
        Stepper.distrust = reason
        print(f"decoding goes on without a CUDA graph, which is slower: {reason}")


def _are_close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.float(), b.float(), atol=1e-3, equal_nan=True)


def pace_of(device: torch.device) -> Pace:
    """The pace on that device."""
    return PACES.get(device.type, PACES["cpu"])


def decode(
    language_model: Any, head: Head, cache: DecodeCache, hidden: Tensor, start: Sequence[int], limits: SamplingConfig,
    seeds: Sequence[int], end_ids: Collection[int], num_greedy: int = 0, watch: Watch | None = None,
) -> list[list[Said]]:  # fmt: skip
    """Completions of the P prompts in `cache`, as many of each as it has rows: first `num_greedy` greedy ones.

    hidden (P, hidden) holds the states of the prompts' last tokens, start the positions of the tokens behind them. With
    temperature 0 all are greedy. A `watch` costs a look at the device per token.
    """
    group, device = cache.group_size - num_greedy, hidden.device
    is_drawn = limits.temperature > 0 and group > 0
    numbers = torch.zeros(len(start), cache.group_size, limits.max_new_tokens, dtype=torch.float64)
    if is_drawn:
        numbers[:, num_greedy:] = uniforms(seeds, group, limits.max_new_tokens)
    temperature = torch.tensor([0.0] * num_greedy + [limits.temperature] * group, device=device)
    rows = Rows.begin(
        torch.tensor(start, device=device).repeat_interleave(cache.group_size),
        temperature.repeat(len(start))[:, None],
        numbers.flatten(0, 1).to(device),
    )
    ends = torch.tensor(sorted(end_ids), dtype=torch.long, device=device)
    has_greedy = num_greedy > 0 or not is_drawn
    decoding = Decoding(DecodePass(language_model), head, cache, rows, limits, ends, has_greedy, is_drawn)
    decoding.draw(hidden.repeat_interleave(cache.group_size, dim=0))
    pace = pace_of(device) if watch is None else replace(pace_of(device), look_every=1)
    return _to_the_end(decoding, len(start), pace, end_ids, watch)


def _to_the_end(
    decoding: Decoding, num_prompts: int, pace: Pace, end_ids: Collection[int], watch: Watch | None
) -> list[list[Said]]:
    """Take steps until all prompts are over, and drop rows whose prompts are."""
    cache, rows, stepper = decoding.cache, decoding.rows, Stepper(decoding)
    said: list[list[Said]] = [[] for _ in range(num_prompts)]
    live, length, longest = list(range(num_prompts)), 1, decoding.limits.max_new_tokens
    while True:
        if watch is not None:
            watch(rows.ids.tolist())
        if length == longest or (length - 1) % pace.look_every == 0:
            is_over = rows.has_ended.view(len(live), -1).all(dim=1).tolist()
            if all(is_over) or length == longest:
                _collect(rows, live, range(len(live)), length, end_ids, said)
                return said
            if any(is_over) and sum(is_over) >= pace.least_over * len(live):
                over = [i for i, is_one in enumerate(is_over) if is_one]
                _collect(rows, live, over, length, end_ids, said)
                kept = [i for i, is_one in enumerate(is_over) if not is_one]
                rows.keep(cache.keep(torch.tensor(kept, device=rows.ids.device)))
                live = [live[i] for i in kept]
                stepper.forget()
        if length > cache.num_places:
            cache.grow()
            stepper.forget()
        stepper()
        length += 1


def _collect(
    rows: Rows, live: Sequence[int], which: Sequence[int], length: int, end_ids: Collection[int],
    said: list[list[Said]],
) -> None:  # fmt: skip
    """Read the completions of some of the live prompts, each up to its end, into the list of all prompts."""
    shape = (len(live), -1, rows.tokens.shape[1])
    index = torch.tensor(list(which), device=rows.tokens.device)
    tokens, logps = (x.view(shape)[index, :, :length].tolist() for x in (rows.tokens, rows.logps))
    for place, token_rows, logp_rows in zip(which, tokens, logps, strict=True):
        for ids, values in zip(token_rows, logp_rows, strict=True):
            end = next((i for i, token in enumerate(ids, 1) if token in end_ids), length)
            said[live[place]].append((ids[:end], values[:end]))
