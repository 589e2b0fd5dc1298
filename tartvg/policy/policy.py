"""The policy: a vision-language model that says where in a video a sentence happens.

Legend: P prompts, G rollouts per prompt, R = P * G rows, S prompt tokens, T completion tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tartvg.config import PolicyConfig, SamplingConfig
from tartvg.data.clips import ClipReader
from tartvg.data.video import Clip
from tartvg.policy.decoding import Watch, decode, pace_of
from tartvg.policy.deepstack import DeepStack
from tartvg.policy.disk_cache import DiskCache, disk_cache
from tartvg.policy.families.family import family_of
from tartvg.policy.features import FeatureCache, VideoFeatures, video_key
from tartvg.policy.head import compute_in_float32, never_sampled, token_bias
from tartvg.policy.inputs import PromptInputs, clip_patches
from tartvg.policy.kv_cache import DecodeCache, PrefixCache
from tartvg.policy.loading import ADAPTER, REFERENCE, add_adapter, load_adapter, load_base, new_adapter
from tartvg.policy.packed import packed_states
from tartvg.policy.prefix_attention import suffix_states
from tartvg.policy.torch_setup import eval_mode
from tartvg.timing import PhaseTimer
from tartvg.types import Completion, GroundingSample, Prompt


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
    longest = max(len(c.token_ids) for c in completions)
    ids = torch.zeros(len(completions), longest, dtype=torch.long)
    mask = torch.zeros(len(completions), longest, dtype=torch.bool)
    logps = torch.zeros(len(completions), longest)
    for row, completion in enumerate(completions):
        n = len(completion.token_ids)
        ids[row, :n] = torch.tensor(completion.token_ids, dtype=torch.long)
        logps[row, :n] = torch.tensor(completion.logps)
        mask[row, :n] = True
    return TokenBatch(ids.to(device), mask.to(device), logps.to(device))


class Policy(torch.nn.Module):
    """Base model, LoRA adapter, reference and tokenizer behind the few operations that training needs.

    `adapter` None starts a fresh adapter (the base itself); a folder continues that adapter. The reference is the
    policy at this moment: the base without adapter, or a frozen copy of the loaded adapter.
    """

    lockstep_head_calls = 0
    """Inside `lockstep`: how often each call of `logps` calls the output head; 0 outside."""
    fits_whole: Callable[[int, int], bool] | None = None
    """For `activation_checkpointing: auto`: whether so many prompt and completion tokens fit; None: they never do."""
    token_bias: Tensor
    """float32 (V,), added to logits: -inf for what the policy may never say."""

    def __init__(self, settings: PolicyConfig, adapter: Path | None = None, seed: int = 0) -> None:
        super().__init__()
        self.settings = settings
        base, self.tokenizer = load_base(settings)
        self.model: PeftModel = (
            new_adapter(base, settings.lora, seed)
            if adapter is None
            else load_adapter(base, adapter, settings.lora, is_reference_kept=True)
        )
        if not any(p.requires_grad for p in self.model.parameters()):
            raise ValueError("the policy has no trainable parameter: the adapter was loaded frozen")
        self._core: list[Any] = [self.model.get_base_model()]  # in a list: a module must not be registered twice
        self.family = family_of(base.config.model_type)
        self.cache = FeatureCache(settings.feature_cache_gib)
        self.disk = self._disk_cache()
        self.clips = ClipReader()
        self.timer = PhaseTimer()
        self.ban(never_sampled(self.tokenizer))
        self.end_id = int(self.tokenizer.convert_tokens_to_ids("<|im_end|>"))
        self.end_ids = {self.end_id, int(self.tokenizer.convert_tokens_to_ids("<|endoftext|>"))}

    @property
    def core(self) -> Any:
        """The base model with the LoRA layers inside."""
        return self._core[0]

    @property
    def language_model(self) -> Any:
        """The decoder."""
        return self.core.model.language_model

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def ban(self, ids: Sequence[int]) -> None:
        """Never say these tokens, nor any that the tokenizer has no word for."""
        self.banned = list(ids)
        bias = token_bias(self.banned, len(self.tokenizer), self.core.lm_head.out_features, self.device)
        self.register_buffer("token_bias", bias, persistent=False)

    def compute_logits_in_float32(self) -> None:
        """Do so while sampling and in every pass, for more than one update per batch."""
        compute_in_float32(self.core.lm_head)

    # -- inputs ------------------------------------------------------------------------------------------------------

    def prepare(self, prompt: Prompt, clip: Clip | None = None) -> PreparedPrompt:
        """Decode the video (unless `clip` brings it), encode it once, tokenise. Raises VideoError."""
        video = self._video(prompt.sample.video, clip)
        return PreparedPrompt(prompt, self.encode_prompt(prompt.text, video), video)

    def encode_prompt(self, text: str, video: VideoFeatures) -> PromptInputs:
        """Ids and positions of a prompt around a video, of which only shape and times count."""
        return self.family.encode_prompt(self.tokenizer, text, video, self.core.config, self.settings)

    def read(self, path: Path) -> Clip:
        """The clip of a file in the family's sizes. Raises VideoError."""
        return self.clips.read(path, self.settings.frames, self.family.patch_form.side)

    @torch.no_grad()
    def _video(self, path: Path, clip: Clip | None) -> VideoFeatures:
        key = self._key(path)
        if (known := self._known(key)) is not None:
            return known
        if clip is None:
            with self.timer("decode"):
                clip = self.read(path)
        with self.timer("vision"):
            video = clip_patches(clip, self.family.patch_form)
            nothing = torch.empty(0, device=self.device)
            features = VideoFeatures(
                nothing, video.grid_thw, video.seconds_per_grid, clip.duration, video.patches, stamps=video.stamps
            )
            if self.is_tower_trainable:
                return features
            embeddings, *deepstack = (x.detach() for x in self._encode(video.patches, video.grid_thw))
            features = replace(features, embeddings=embeddings, deepstack=tuple(deepstack), patches=None)
        if key is not None:
            self.cache.put(key, features)
            if self.disk is not None:
                self.disk.put(key, features)
        return features

    def has_features(self, path: Path) -> bool:
        """Return whether the features of a file are cached, so that nothing has to be decoded."""
        key = self._key(path)
        return key is not None and (key in self.cache or (self.disk is not None and key in self.disk))

    def _key(self, path: Path) -> Hashable | None:
        """Return the cache key of a file's features; None where they cannot be cached."""
        if self.is_tower_trainable or not path.is_file():
            return None
        return video_key(path, self.settings.frames, self.device.type)

    def _known(self, key: Hashable) -> VideoFeatures | None:
        """Features from RAM, else from disk; None without a key."""
        known = self.cache.get(key)
        if known is None and key is not None and self.disk is not None and (known := self.disk.get(key)) is not None:
            self.cache.put(key, known)
        return None if known is None else known.mapped(lambda features: features.to(self.device))

    def _disk_cache(self) -> DiskCache | None:
        if self.is_tower_trainable:
            print("policy.lora.vision: the vision tower is trained, so its features are not cached")
            return None
        return disk_cache(self.settings, self.core.model.visual)

    @property
    def is_tower_trainable(self) -> bool:
        """Whether an update changes what the vision tower sees."""
        return any(p.requires_grad for p in self.core.model.visual.parameters())

    def _encode(self, patches: Tensor, grid_thw: tuple[int, int, int]) -> tuple[Tensor, ...]:
        """Run the vision tower once: patches (N, width) -> features, each (video tokens, hidden)."""
        grid = torch.tensor([grid_thw], device=self.device)
        return self.family.encode_video(self.core.model, patches.to(self.device), grid)

    def _embed_prompt(self, prepared: PreparedPrompt) -> tuple[Tensor, DeepStack]:
        """Embeddings of the prompt, (1, S, hidden), and what the decoder's first layers add to it."""
        ids, is_video = prepared.inputs.ids.to(self.device), prepared.inputs.is_video.to(self.device)
        video = prepared.video
        features = (video.embeddings, *video.deepstack)
        if video.patches is not None:
            features = self._encode(video.patches, video.grid_thw)
        embeddings = self.language_model.embed_tokens(ids).clone()
        embeddings[is_video] = features[0].to(embeddings)
        if not features[1:]:
            return embeddings[None], DeepStack(ids[:0], ())
        return embeddings[None], DeepStack(prepared.inputs.is_video.nonzero()[:, 0].to(self.device), features[1:])

    def _prefill(self, prepared: PreparedPrompt) -> tuple[PrefixCache, Tensor]:
        """Run one prompt. Returns its cache and the last token's hidden state, (1, 1, hidden)."""
        prefix, (embeddings, deepstack) = PrefixCache(), self._embed_prompt(prepared)
        with deepstack.inside(self.language_model):
            out = self.language_model(
                inputs_embeds=embeddings,
                position_ids=prepared.inputs.positions[:, None].to(self.device),
                attention_mask=None,
                past_key_values=prefix,
                use_cache=True,
            )
        return prefix, out.last_hidden_state[:, -1:]

    # -- sampling ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[PreparedPrompt], group_size: int, settings: SamplingConfig, seeds: Sequence[int],
        num_greedy: int = 0, watch: Watch | None = None,
    ) -> list[list[Completion]]:  # fmt: skip
        """G completions of each prompt; each prompt is prefilled once. Temperature 0 is greedy.

        `seeds` has one number per prompt: a group depends on its own seed only, not on its neighbours. Before the G
        come `num_greedy` greedy ones, from the same prefill. `watch` sees the tokens as they come.
        """
        with self.timer("sample"), eval_mode(self):
            filled = [self._prefill(p) for p in prompts]
            hidden, bucket = torch.cat([last[:, 0] for _, last in filled]), pace_of(self.device).bucket
            rows = num_greedy + group_size
            cache = DecodeCache([prefix for prefix, _ in filled], rows, settings.max_new_tokens, bucket)
            del filled  # every prompt has been copied
            start = [p.inputs.next_position for p in prompts]
            said = decode(
                self.language_model, self._logits, cache, hidden, start, settings, seeds, self.end_ids, num_greedy,
                watch,
            )  # fmt: skip
        return [[self._completion(*row) for row in group] for group in said]

    def _completion(self, ids: list[int], logps: list[float]) -> Completion:
        return Completion(self.text_of(ids), tuple(ids), tuple(logps), ids[-1] in self.end_ids)

    def text_of(self, ids: Sequence[int]) -> str:
        """Decode tokens of a completion, without those that end it."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _logits(self, hidden: Tensor) -> Tensor:
        """float32 logits of (..., hidden) states; tokens that a policy may never say are at -inf."""
        logits: Tensor = self.core.lm_head(hidden).float()
        return logits.add_(self.token_bias)

    # -- log-probabilities -------------------------------------------------------------------------------------------

    def logps(self, prepared: PreparedPrompt, tokens: TokenBatch, temperature: float = 1.0) -> Tensor:
        """log-probabilities of the completions of one prompt: float32 (G, T), 0 on padding.

        With `policy.shared_prefix` the prompt runs once, with gradient, and the G completions run as one batch on
        top; else the whole sequence runs G times, which gives the same numbers slowly. With
        `policy.activation_checkpointing` there is a third way to them (`tartvg.policy.packed`).
        """
        num_calls, length = self.lockstep_head_calls, tokens.ids.shape[1]
        if num_calls and length == 1:  # a lone token needs no pass of the completions, which all ranks have to take
            tokens = TokenBatch(*(torch.nn.functional.pad(t, (0, 1)) for t in (tokens.ids, tokens.mask, tokens.logps)))
        states, ids = self._states(prepared, tokens)[tokens.mask], tokens.ids[tokens.mask]
        parts, size = [], self.settings.logit_chunk
        chunks = list(zip(states.split(size), ids.split(size), strict=True))
        chunks += [(states[:0], ids[:0])] * (num_calls - len(chunks))
        for chunk, target in chunks:
            if torch.is_grad_enabled():
                # logits of a chunk are made again in the backward pass instead of being kept
                parts.append(checkpoint(self._chunk_logps, chunk, target, temperature, use_reentrant=num_calls > 0))
            else:
                parts.append(self._chunk_logps(chunk, target, temperature))
        logps = torch.zeros(tokens.mask.shape, device=states.device).masked_scatter(tokens.mask, torch.cat(parts))
        return logps[:, :length]

    def num_head_calls(self, num_tokens: int) -> int:
        """Calls of the output head that `logps` needs for so many completion tokens."""
        return max(1, -(-num_tokens // self.settings.logit_chunk))

    @contextmanager
    def lockstep(self, num_head_calls: int) -> Iterator[None]:
        """Inside the block all ranks take equal passes through every module, as ZeRO-3 needs it.

        `logps` calls the head so often, without work where there is none. Checkpointed layers and the head run a
        backward pass of their own: tensors saved by autograd would hold weights that are released by then.
        """
        self.lockstep_head_calls = num_head_calls
        try:
            yield
        finally:
            self.lockstep_head_calls = 0

    def empty_pass(self) -> Tensor:
        """Return 0 by way of every module that `logps` uses, for a rank that has nothing to compute in lockstep."""
        ids = torch.full((1, 2), self.end_id, device=self.device)
        width = self.language_model.config.hidden_size
        video = VideoFeatures(torch.zeros(0, width, device=self.device), (0, 0, 0), 0.0, 0.0)
        sample = GroundingSample("", Path(), "", (), 0.0, "train")
        inputs = PromptInputs(ids[0], torch.arange(2, device=self.device).expand(3, -1), ids[0] != self.end_id)
        tokens = TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(1, 2, device=self.device))
        return 0.0 * self.logps(PreparedPrompt(Prompt(sample, ""), inputs, video), tokens).sum()

    def _chunk_logps(self, states: Tensor, ids: Tensor, temperature: float) -> Tensor:
        return (self._logits(states) / temperature).log_softmax(dim=-1).gather(-1, ids[:, None])[:, 0]

    def _states(self, prepared: PreparedPrompt, tokens: TokenBatch) -> Tensor:
        """Hidden states that predict each completion token: (G, T, hidden)."""
        if not self.settings.shared_prefix:
            return self._naive(prepared, tokens)
        group, length = tokens.ids.shape
        rows = self.language_model.embed_tokens(tokens.ids[:, :-1])
        steps = prepared.inputs.next_position + torch.arange(length - 1, device=self.device)
        if self.is_checkpointed(prepared.inputs.length, tokens.ids.numel()):
            (prompt, deepstack), positions = self._embed_prompt(prepared), prepared.inputs.positions.to(self.device)
            name, is_reentrant = self.settings.attention, self.lockstep_head_calls > 0
            last, states = packed_states(
                self.language_model, prompt, deepstack, positions, rows, steps, name, is_reentrant
            )  # fmt: skip
            return torch.cat([last.expand(group, -1, -1), states], dim=1)
        prefix, last = self._prefill(prepared)
        last = last.expand(group, -1, -1)
        if length == 1:
            return last
        states = suffix_states(self.language_model, rows, steps, prefix, self.settings.attention)
        return torch.cat([last, states], dim=1)

    def is_checkpointed(self, num_prompt: int, num_completion: int) -> bool:
        """Return whether the layers of a group of so many tokens run twice. Nothing else counts: KL compares passes."""
        value = self.settings.activation_checkpointing
        if isinstance(value, bool):
            return value
        return self.fits_whole is None or not self.fits_whole(num_prompt, num_completion)

    def _naive(self, prepared: PreparedPrompt, tokens: TokenBatch) -> Tensor:
        """Compute the same states from G whole sequences, without any cache."""
        group, length = tokens.ids.shape
        new = length - 1
        prompt, deepstack = self._embed_prompt(prepared)
        before = prompt.expand(group, -1, -1)
        after = self.language_model.embed_tokens(tokens.ids[:, :new])
        steps = prepared.inputs.next_position + torch.arange(new, device=self.device)
        positions = torch.cat([prepared.inputs.positions.to(self.device), steps.expand(3, -1)], dim=1)
        with deepstack.inside(self.language_model):
            out = self.language_model(
                inputs_embeds=torch.cat([before, after], dim=1),
                position_ids=positions[:, None].expand(-1, group, -1),
                attention_mask=None,
                use_cache=False,
            )
        return out.last_hidden_state[:, -length:]

    # -- adapters ----------------------------------------------------------------------------------------------------

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Inside the block this is the policy as it was at the start of the stage, without gradient or dropout."""
        with torch.no_grad(), eval_mode(self):
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

    def add_adapter(self, name: str, folder: Path) -> None:
        """Load another adapter beside the policy's own, on the same base. `check_adapter` has seen its folder."""
        add_adapter(self.model, folder, name, self.settings.lora)

    @contextmanager
    def as_adapter(self, name: str) -> Iterator[None]:
        """Inside the block the policy speaks with that adapter; `ADAPTER` is its own."""
        tuner: Any = self.model.base_model
        tuner.set_adapter(name)
        try:
            yield
        finally:
            tuner.set_adapter(ADAPTER)
