"""Supervised fine-tuning on filtered traces. Traces of one query share its prompt, as rollouts do."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from tartvg.config import SftConfig
from tartvg.data.packets import VideoError
from tartvg.policy.policy import PreparedPrompt, TokenBatch, token_batch
from tartvg.records import to_json
from tartvg.training import distributed
from tartvg.training.batches import permutation
from tartvg.training.out_of_memory import GroupLoss, NothingFits
from tartvg.training.probes import rows_of
from tartvg.training.step import StepModule
from tartvg.types import Completion, Prompt, Trace

Query = tuple[Prompt, list[Trace]]
"""A prompt and its traces."""


class TraceBatch:
    """The traces of one step that this process trains on, those of one query together."""

    def __init__(self, step: int, groups: Sequence[Query]) -> None:
        self.step = step
        self.groups = tuple(groups)


class TraceDataset(Dataset[TraceBatch]):
    """Steps of `batch_size` traces; queries are shuffled anew in every epoch. Sized, and a function of the seed.

    `share` is (r, n): of n processes this is number r, and it gets every n-th query of a step.
    """

    def __init__(
        self, traces: Sequence[Trace], prompts: dict[str, Prompt], settings: SftConfig, seed: int, start: int = 0,
        share: tuple[int, int] = (0, 1),
    ) -> None:  # fmt: skip
        if not traces:
            raise ValueError("no traces to train on: the filter kept none (see filter/summary.json)")
        self.prompts = prompts
        self.batch_size = settings.batch_size
        self.seed = seed
        self.start = start
        self.share = share
        self.by_query: dict[str, list[Trace]] = {}
        for trace in traces:
            self.by_query.setdefault(trace.sample_id, []).append(trace)
        self.queries = list(self.by_query)
        self.steps_per_epoch = -(-len(traces) // self.batch_size)
        self.stop = self.steps_per_epoch * settings.epochs

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> TraceBatch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        step = self.start + index
        epoch, place = divmod(step, self.steps_per_epoch)
        order = permutation(self.seed, epoch, len(self.queries))
        traces = [trace for i in order for trace in self.by_query[self.queries[i]]]
        chosen = traces[place * self.batch_size : (place + 1) * self.batch_size]
        groups = [(self.prompts[key], list(rows)) for key, rows in groupby(chosen, key=lambda t: t.sample_id)]
        return TraceBatch(step, groups[self.share[0] :: self.share[1]])


class SftModule(StepModule):
    """Next-token loss on the traces, averaged over the tokens of the step."""

    settings: SftConfig

    def on_train_batch_start(self, batch: TraceBatch, batch_idx: int) -> None:
        """The videos: not in the step, see `Engine.whole`."""
        self.begin_step(batch.step)
        self.kept = self.with_whole_weights(lambda: self.prepare(batch))

    def training_step(self, batch: TraceBatch, batch_idx: int) -> None:
        """Minimise -log p(trace | prompt)."""
        num_tokens = int(distributed.all_reduce_sum(sum(int(tokens.mask.sum()) for _, _, tokens in self.kept))[0])
        chunks = self.even_chunks([tokens for _, _, tokens in self.kept])
        groups = [self.group_loss(prepared, tokens, num_tokens, chunks) for _, prepared, tokens in self.kept]
        try:
            with self.policy.timer("update"):
                norm = self.fitting_update(groups, batch.step, chunks)
        except NothingFits:
            self.end_step(batch.step, self.nothing_to_learn(batch.step, is_fault=True))
            return
        loss = distributed.all_reduce_sum(sum(float(part) for group in groups for part in group.parts))[0] / num_tokens
        metrics = {"loss/total": loss, "optim/grad_norm": norm}
        self.judge_update(batch.step, metrics, partial(self.offending_groups, groups))
        self.end_step(batch.step, metrics)

    def offending_groups(self, groups: Sequence[GroupLoss]) -> list[dict[str, Any]]:
        """The queries of this process with their losses: what to look at when a step was not finite."""
        return [
            {
                "sample_id": prompt.sample.sample_id,
                "loss": sum(float(part) for part in group.parts),
                "prompt": prompt.text,
                "traces": to_json(traces),
            }
            for ((prompt, traces), _, _), group in zip(self.kept, groups, strict=True)
            if group.parts
        ]

    def prepare(self, batch: TraceBatch) -> list[tuple[Query, PreparedPrompt, TokenBatch]]:
        """Queries with their prompts and tokens; one whose video cannot be decoded is left out, and says so."""
        kept = []
        for prompt, traces in batch.groups:
            try:
                kept.append(((prompt, traces), self.policy.prepare(prompt), self.tokens(traces)))
            except VideoError as error:
                print(f"step {batch.step}: training goes on without {prompt.sample.sample_id}: {error}")
        return kept

    def tokens(self, traces: Sequence[Trace]) -> TokenBatch:
        """Token ids of the traces' texts, each with the end token."""
        completions = []
        for trace in traces:
            ids = [*self.policy.tokenizer.encode(trace.text, add_special_tokens=False), self.policy.end_id]
            completions.append(Completion(trace.text, tuple(ids), (0.0,) * len(ids), True))
        return token_batch(completions, self.policy.device, 2 if self.engine.is_even else 1)

    def group_loss(
        self, prepared: PreparedPrompt, tokens: TokenBatch, num_tokens: int, num_chunks: int = 0
    ) -> GroupLoss:
        """One query's share of the step's loss; noted of each part is its summed negative log-likelihood."""
        parts: list[Tensor] = []

        def compute(part: slice) -> Tensor:
            loss = -self.policy.logps(prepared, rows_of(tokens, part), num_chunks=num_chunks).sum()
            parts.append(loss.detach())
            return loss / num_tokens

        return self.loss_of(prepared, tokens, compute, parts)
