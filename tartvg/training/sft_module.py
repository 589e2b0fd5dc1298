"""Supervised fine-tuning on filtered traces. Traces of one query share its prompt, as rollouts do."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import groupby

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tartvg.config import SftConfig
from tartvg.policy.policy import PreparedPrompt, TokenBatch, token_batch
from tartvg.training.loop import StepModule
from tartvg.training.plan import permutation
from tartvg.types import Completion, Prompt, Trace


class TraceBatch:
    """The traces of one step, those of one query together."""

    def __init__(self, step: int, groups: Sequence[tuple[Prompt, list[Trace]]]) -> None:
        self.step = step
        self.groups = tuple(groups)


class TraceDataset(Dataset[TraceBatch]):
    """Steps of `batch_size` traces; queries are shuffled anew in every epoch. Sized, and a function of the seed."""

    def __init__(
        self, traces: Sequence[Trace], prompts: dict[str, Prompt], settings: SftConfig, seed: int, start: int = 0
    ) -> None:
        if not traces:
            raise ValueError("no traces to train on: the filter kept none (see filter/summary.json)")
        self.prompts = prompts
        self.batch_size = settings.batch_size
        self.seed = seed
        self.start = start
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
        return TraceBatch(step, groups)


class SftModule(StepModule):
    """Next-token loss on the traces, averaged over the tokens of the step."""

    settings: SftConfig

    def training_step(self, batch: TraceBatch, batch_idx: int) -> None:
        """Minimise -log p(trace | prompt)."""
        self.begin_step(batch.step)
        pairs = [(self.policy.prepare(prompt), self.tokens(traces)) for prompt, traces in batch.groups]
        num_tokens = sum(int(tokens.mask.sum()) for _, tokens in pairs)
        total: list[Tensor] = []
        micro = [partial(self.group_loss, *pair, total, num_tokens) for pair in pairs]
        with self.policy.timer("update"):
            norm = self.update(micro)
        loss = float(torch.stack(total).sum()) / num_tokens
        self.end_step(batch.step, {"loss/total": loss, "optim/grad_norm": norm})

    def tokens(self, traces: Sequence[Trace]) -> TokenBatch:
        """Token ids of the traces' texts, each with the end token."""
        completions = []
        for trace in traces:
            ids = [*self.policy.tokenizer.encode(trace.text, add_special_tokens=False), self.policy.end_id]
            completions.append(Completion(trace.text, tuple(ids), (0.0,) * len(ids), True))
        return token_batch(completions, self.device)

    def group_loss(self, prepared: PreparedPrompt, tokens: TokenBatch, total: list[Tensor], num_tokens: int) -> Tensor:
        """One query's share of the step's loss; its summed negative log-likelihood is appended to `total`."""
        loss = -self.policy.logps(prepared, tokens).sum()
        total.append(loss.detach())
        return loss / num_tokens
