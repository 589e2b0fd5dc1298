"""Supervised fine-tuning on filtered traces. Traces of one query share its prompt, as rollouts do."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Any

from torch.utils.data import Dataset

from tartvg.config import SftConfig
from tartvg.data.packets import VideoError
from tartvg.grpo import LossOutput
from tartvg.policy.policy import PreparedPrompt, TokenBatch, token_batch
from tartvg.records import to_json
from tartvg.training import distributed
from tartvg.training.batches import StepBatch, permutation
from tartvg.training.probes import rows_of
from tartvg.training.step import StepModule
from tartvg.training.update import UpdateResult
from tartvg.types import Completion, Prompt, Trace

Query = tuple[Prompt, list[Trace]]
"""A prompt and its traces."""


class TraceBatch(StepBatch):
    """The traces of one step that this process trains on, those of one query together."""

    def __init__(self, step: int, groups: Sequence[Query]) -> None:
        super().__init__(step, [prompt for prompt, _ in groups])
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
        epoch, index = divmod(step, self.steps_per_epoch)
        order = permutation(self.seed, epoch, len(self.queries))
        traces = [trace for i in order for trace in self.by_query[self.queries[i]]]
        chosen = traces[index * self.batch_size : (index + 1) * self.batch_size]
        groups = [(self.prompts[key], list(rows)) for key, rows in groupby(chosen, key=lambda t: t.sample_id)]
        return TraceBatch(step, groups[self.share[0] :: self.share[1]])


class SftModule(StepModule):
    """Next-token loss on the traces, averaged over the tokens of the step."""

    settings: SftConfig

    def on_train_batch_start(self, batch: TraceBatch, batch_idx: int) -> None:
        """Decode and encode the videos: everything without gradient."""
        self.begin(batch.step)
        self.queries = self.without_gradient(lambda: self.prepare(batch))

    def training_step(self, batch: TraceBatch, batch_idx: int) -> None:
        """Minimise -log p(trace | prompt)."""
        self.end(batch.step, self.learn(batch.step))

    def prepare(self, batch: TraceBatch) -> list[tuple[Query, PreparedPrompt, TokenBatch]]:
        """Encode queries and their traces; skip a query whose video cannot be decoded."""
        prepared = []
        for prompt, traces in batch.groups:
            try:
                encoded = self.policy.prepare(prompt, batch.clips.get(prompt.sample.video))
                prepared.append(((prompt, traces), encoded, self.tokens(traces)))
            except VideoError as error:
                print(f"step {batch.step}: training goes on without {prompt.sample.sample_id}: {error}")
        return prepared

    def tokens(self, traces: Sequence[Trace]) -> TokenBatch:
        """Token ids of the traces' texts, each with the end token."""
        completions = []
        for trace in traces:
            ids = [*self.policy.tokenizer.encode(trace.text, add_special_tokens=False), self.policy.end_id]
            completions.append(Completion(trace.text, tuple(ids), (0.0,) * len(ids), True))
        return token_batch(completions, self.policy.device)

    def learn(self, step: int) -> dict[str, float]:
        """Make one update on the prepared traces; return its metrics."""
        num_tokens = int(distributed.all_reduce_sum(sum(int(tokens.mask.sum()) for _, _, tokens in self.queries))[0])
        losses = [
            self.as_group_loss(prepared, tokens, partial(self.loss, prepared, tokens, num_tokens))
            for _, prepared, tokens in self.queries
        ]
        with self.policy.timer("update"):
            result = self.update(losses, step)
        if result is None:
            return self.skip(step, is_fault=True)
        total = sum(self.summed_nll(outputs) for outputs in result.outputs)
        loss = distributed.all_reduce_sum(total)[0] / num_tokens
        return {"loss/total": loss} | self.check_update(step, result, self.offending_groups)

    def loss(self, prepared: PreparedPrompt, tokens: TokenBatch, num_tokens: int, part: slice) -> LossOutput:
        """Share of some traces of one query in the step's loss."""
        rows = rows_of(tokens, part)
        nll = -self.policy.logps(prepared, rows).sum()
        return LossOutput(nll / num_tokens, {"nll": nll.detach()}, int(rows.mask.sum()))

    def summed_nll(self, outputs: Sequence[LossOutput]) -> float:
        """Negative log-likelihood of one query's traces, in nats."""
        return sum(float(output.metrics["nll"]) for output in outputs)

    def offending_groups(self, result: UpdateResult) -> list[dict[str, Any]]:
        """Describe the queries of this rank with their losses, for the record of a step that was not finite."""
        return [
            {
                "sample_id": prompt.sample.sample_id,
                "loss": self.summed_nll(outputs),
                "prompt": prompt.text,
                "traces": to_json(traces),
            }
            for ((prompt, traces), _, _), outputs in zip(self.queries, result.outputs, strict=True)
            if outputs
        ]
