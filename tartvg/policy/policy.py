"""The policy: a vision-language model that says where in a video a sentence happens.

Legend: P prompts, G rollouts per prompt, R = P * G rows, S prompt tokens, T completion tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tartvg.config import PolicyConfig, SamplingConfig
from tartvg.data.video import Clip, read_clip
from tartvg.policy.cache import DecodeCache, ExpandedCache, PrefixCache, decoding
from tartvg.policy.features import FeatureCache, VideoFeatures, video_key
from tartvg.policy.inputs import PromptInputs, clip_patches, encode_prompt
from tartvg.policy.loading import ADAPTER, REFERENCE, load_adapter, load_base, new_adapter
from tartvg.policy.sampling import draw, generators, restrict, uniforms
from tartvg.timing import PhaseTimer
from tartvg.types import Completion, Prompt

NEVER_SAMPLED = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
CAUSAL: dict[str, Tensor | None] = {"full_attention": None}
"""Mask of a plain causal pass; our own dict keeps the library from building one."""


@dataclass(frozen=True)
class PreparedPrompt:
    """A prompt with everything that does not depend on the adapter."""

    prompt: Prompt
    inputs: PromptInputs
    video: VideoFeatures


@dataclass(frozen=True)
class TokenBatch:
    """Completions of one prompt as tensors, padded at the end."""

    ids: Tensor
    """int64 (G, T)."""
    mask: Tensor
    """bool (G, T), True on real tokens."""
    logps: Tensor
    """float32 (G, T), recorded while sampling; 0 on padding."""


def token_batch(completions: Sequence[Completion], device: torch.device) -> TokenBatch:
    """Pad the completions of a group to the longest one."""
    longest = max(1, max(len(c.token_ids) for c in completions))
    ids = torch.zeros(len(completions), longest, dtype=torch.long)
    mask = torch.zeros(len(completions), longest, dtype=torch.bool)
    logps = torch.zeros(len(completions), longest)
    for row, completion in enumerate(completions):
        n = len(completion.token_ids)
        ids[row, :n] = torch.tensor(completion.token_ids, dtype=torch.long)
        logps[row, :n] = torch.tensor(completion.logps)
        mask[row, :n] = True
    return TokenBatch(ids.to(device), mask.to(device), logps.to(device))


def stream_seed(*parts: object) -> int:
    """A seed that depends on all parts and on nothing else: rollouts survive a restart unchanged."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Policy(torch.nn.Module):
    """Base model, LoRA adapter, reference and tokenizer behind the few operations that training needs.

    `adapter` None starts a fresh adapter (the base itself); a folder continues that adapter. The reference is the
    policy at this moment: the base without adapter, or a frozen copy of the loaded adapter.
    """

    def __init__(self, settings: PolicyConfig, adapter: Path | None = None, seed: int = 0) -> None:
        super().__init__()
        self.settings = settings
        base, self.tokenizer = load_base(settings)
        self.model: PeftModel = (
            new_adapter(base, settings.lora, seed)
            if adapter is None
            else load_adapter(base, adapter, is_reference_kept=True)
        )
        if not any(p.requires_grad for p in self.model.parameters()):
            raise ValueError("the policy has no trainable parameter: the adapter was loaded frozen")
        self.cache = FeatureCache(settings.feature_cache_mb)
        self.timer = PhaseTimer()
        core: Any = self.model.get_base_model()
        self._core: list[Any] = [core]  # in a list: a module must not be registered twice
        banned = [self.tokenizer.convert_tokens_to_ids(t) for t in NEVER_SAMPLED]
        self.banned = [b for b in banned if b is not None and b != self.tokenizer.unk_token_id]
        self.end_id = int(self.tokenizer.convert_tokens_to_ids("<|im_end|>"))
        self.end_ids = {self.end_id, int(self.tokenizer.convert_tokens_to_ids("<|endoftext|>"))}
        self.tokens_per_second = float(core.config.vision_config.tokens_per_second)

    @property
    def core(self) -> Any:
        """The Qwen2.5-VL model with the LoRA layers inside."""
        return self._core[0]

    @property
    def language_model(self) -> Any:
        """The decoder."""
        return self.core.model.language_model

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    # -- inputs ------------------------------------------------------------------------------------------------------

    def prepare(self, prompt: Prompt, clip: Clip | None = None) -> PreparedPrompt:
        """Decode the video (unless `clip` brings it), encode it once, tokenise. Raises VideoError."""
        video = self._video(prompt.sample.video, clip)
        inputs = encode_prompt(
            self.tokenizer, prompt.text, video.grid_thw, video.seconds_per_grid, self.tokens_per_second
        )
        return PreparedPrompt(prompt, inputs, video)

    @torch.no_grad()
    def _video(self, path: Path, clip: Clip | None) -> VideoFeatures:
        key = video_key(path, self.settings.frames) if path.is_file() else None
        known = self.cache.get(key)
        if known is not None:
            return known
        if clip is None:
            with self.timer("decode"):
                clip = read_clip(path, self.settings.frames)
        with self.timer("vision"):
            clip_input = clip_patches(clip)
            grid = torch.tensor([clip_input.grid_thw], device=self.device)
            out = self.core.model.get_video_features(clip_input.patches.to(self.device), grid)
            embeddings = torch.cat(tuple(out.pooler_output)).detach()
        features = VideoFeatures(embeddings, clip_input.grid_thw, clip_input.seconds_per_grid, clip.duration)
        if key is not None:
            self.cache.put(key, features)
        return features

    def _embed_prompt(self, prepared: PreparedPrompt) -> Tensor:
        ids, is_video = prepared.inputs.ids.to(self.device), prepared.inputs.is_video.to(self.device)
        embeddings = self.language_model.embed_tokens(ids).clone()
        embeddings[is_video] = prepared.video.embeddings.to(embeddings)
        return embeddings[None]

    def _prefill(self, prepared: PreparedPrompt) -> tuple[PrefixCache, Tensor]:
        """Run one prompt. Returns its cache and the last token's hidden state, (1, 1, hidden)."""
        prefix = PrefixCache()
        out = self.language_model(
            inputs_embeds=self._embed_prompt(prepared),
            position_ids=prepared.inputs.positions[:, None].to(self.device),
            attention_mask=CAUSAL,
            past_key_values=prefix,
            use_cache=True,
        )
        return prefix, out.last_hidden_state[:, -1:]

    # -- sampling ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[PreparedPrompt], group_size: int, settings: SamplingConfig, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        """G completions of each prompt; each prompt is prefilled once. Temperature 0 is greedy.

        `seeds` has one number per prompt: a group depends on its own seed only, not on its neighbours.
        """
        with self.timer("sample"), eval_mode(self):
            filled = [self._prefill(p) for p in prompts]
            hidden = torch.cat([h for _, h in filled]).repeat_interleave(group_size, dim=0)
            cache = DecodeCache([c for c, _ in filled], group_size, settings.max_new_tokens)
            del filled
            with decoding(self.language_model):
                return self._decode(prompts, cache, hidden, group_size, settings, seeds)

    def _decode(
        self, prompts: Sequence[PreparedPrompt], cache: DecodeCache, hidden: Tensor, group_size: int,
        settings: SamplingConfig, seeds: Sequence[int],
    ) -> list[list[Completion]]:  # fmt: skip
        rows = len(prompts) * group_size
        tokens: list[list[int]] = [[] for _ in range(rows)]
        logps: list[list[float]] = [[] for _ in range(rows)]
        has_ended = [False] * rows
        live = list(range(len(prompts)))
        streams = generators(seeds)
        start = torch.tensor([p.inputs.next_position for p in prompts], device=self.device)
        while cache.length < settings.max_new_tokens:
            logits = self._logits(hidden[:, 0])
            if settings.temperature == 0:
                chosen = logits.argmax(dim=-1)
            else:
                numbers = uniforms([streams[p] for p in live], group_size).to(self.device)
                chosen = draw(restrict(logits, settings), numbers)
            scale = settings.temperature or 1.0
            picked = (logits / scale).log_softmax(dim=-1).gather(-1, chosen[:, None])[:, 0]
            row_of = [p * group_size + g for p in live for g in range(group_size)]
            for row, token, logp in zip(row_of, chosen.tolist(), picked.tolist(), strict=True):
                if not has_ended[row]:
                    tokens[row].append(token)
                    logps[row].append(logp)
                    has_ended[row] = token in self.end_ids
            keep = [i for i, p in enumerate(live) if not all(has_ended[p * group_size : (p + 1) * group_size])]
            if not keep or cache.length + 1 == settings.max_new_tokens:
                break
            if len(keep) < len(live):
                index = torch.tensor(keep, device=self.device)
                cache.keep(index)
                chosen = chosen.view(-1, group_size)[index].flatten()
                start = start[index]
                live = [live[i] for i in keep]
            hidden = self._decode_one(chosen, start.repeat_interleave(group_size) + cache.length, cache)
        done = [
            Completion(self.tokenizer.decode(t, skip_special_tokens=True), tuple(t), tuple(p), ended)
            for t, p, ended in zip(tokens, logps, has_ended, strict=True)
        ]
        return [done[p * group_size : (p + 1) * group_size] for p in range(len(prompts))]

    def _decode_one(self, ids: Tensor, positions: Tensor, cache: DecodeCache) -> Tensor:
        """Feed one token per row, (R,); returns its hidden state, (R, 1, hidden)."""
        out = self.language_model(
            inputs_embeds=self.language_model.embed_tokens(ids)[:, None],
            position_ids=positions[None, :, None].expand(3, -1, -1),
            attention_mask=CAUSAL,
            past_key_values=cache,
            use_cache=True,
            shared=cache,
        )
        cache.length += 1
        return out.last_hidden_state

    def _logits(self, hidden: Tensor) -> Tensor:
        """float32 logits of (..., hidden) states; tokens that a policy may never say are at -inf."""
        logits = self.core.lm_head(hidden).float()
        logits[..., self.banned] = float("-inf")
        logits[..., len(self.tokenizer) :] = float("-inf")  # released heads have more rows than the tokenizer words
        return logits

    # -- log-probabilities -------------------------------------------------------------------------------------------

    def logps(self, prepared: PreparedPrompt, tokens: TokenBatch, temperature: float = 1.0) -> Tensor:
        """log-probabilities of the completions of one prompt: float32 (G, T), 0 on padding.

        With `policy.shared_prefix` the prompt runs once, with gradient, and the G completions run as one batch on
        top; else the whole sequence runs G times, which gives the same numbers slowly.
        """
        hidden = self._shared_states(prepared, tokens) if self.settings.shared_prefix else self._naive(prepared, tokens)
        states, ids = hidden[tokens.mask], tokens.ids[tokens.mask]
        parts = []
        for chunk, target in zip(
            states.split(self.settings.logit_chunk), ids.split(self.settings.logit_chunk), strict=True
        ):
            if torch.is_grad_enabled():
                # logits of a chunk are made again in the backward pass instead of being kept
                parts.append(checkpoint(self._chunk_logps, chunk, target, temperature, use_reentrant=False))
            else:
                parts.append(self._chunk_logps(chunk, target, temperature))
        return torch.zeros(tokens.mask.shape, device=states.device).masked_scatter(tokens.mask, torch.cat(parts))

    def _chunk_logps(self, states: Tensor, ids: Tensor, temperature: float) -> Tensor:
        return (self._logits(states) / temperature).log_softmax(dim=-1).gather(-1, ids[:, None])[:, 0]

    def _shared_states(self, prepared: PreparedPrompt, tokens: TokenBatch) -> Tensor:
        """Hidden states that predict each completion token: (G, T, hidden)."""
        prefix, last = self._prefill(prepared)
        group, length = tokens.ids.shape
        last = last.expand(group, -1, -1)
        if length == 1:
            return last
        new, before = length - 1, prepared.inputs.length
        causal = torch.ones(new, new, dtype=torch.bool, device=self.device).tril()
        mask = torch.cat([causal.new_ones(new, before), causal], dim=1)[None, None]
        steps = prepared.inputs.next_position + torch.arange(new, device=self.device)
        out = self.language_model(
            inputs_embeds=self.language_model.embed_tokens(tokens.ids[:, :-1]),
            position_ids=steps.expand(3, group, -1),
            attention_mask={"full_attention": mask},
            past_key_values=ExpandedCache(prefix),
            use_cache=True,
        )
        return torch.cat([last, out.last_hidden_state], dim=1)

    def _naive(self, prepared: PreparedPrompt, tokens: TokenBatch) -> Tensor:
        """The same states from G whole sequences, without any cache."""
        group, length = tokens.ids.shape
        new = length - 1
        before = self._embed_prompt(prepared).expand(group, -1, -1)
        after = self.language_model.embed_tokens(tokens.ids[:, :new])
        steps = prepared.inputs.next_position + torch.arange(new, device=self.device)
        positions = torch.cat([prepared.inputs.positions.to(self.device), steps.expand(3, -1)], dim=1)
        out = self.language_model(
            inputs_embeds=torch.cat([before, after], dim=1),
            position_ids=positions[:, None].expand(-1, group, -1),
            attention_mask=CAUSAL,
            use_cache=False,
        )
        return out.last_hidden_state[:, -length:]

    # -- adapters ----------------------------------------------------------------------------------------------------

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Inside the block this is the policy as it was at the start of the stage, without gradient."""
        with torch.no_grad():
            if REFERENCE not in self.model.peft_config:
                with self.model.disable_adapter():
                    yield
                return
            tuner: Any = self.model.base_model
            tuner.set_adapter(REFERENCE, inference_mode=True)
            try:
                yield
            finally:
                tuner.set_adapter(ADAPTER, inference_mode=False)


@contextmanager
def eval_mode(policy: Policy) -> Iterator[None]:
    """Eval mode inside the block; the mode before is restored."""
    was_training = policy.training
    policy.eval()
    try:
        yield
    finally:
        policy.train(was_training)


def greedy(settings: SamplingConfig) -> SamplingConfig:
    """The same limits, without randomness."""
    return replace(settings, temperature=0.0, top_p=1.0, top_k=0)
