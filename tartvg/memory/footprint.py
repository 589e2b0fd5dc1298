"""How much memory the policy needs for a piece of work, before anything is allocated.

The policy's own code runs on tensors that have a shape and no content (torch's FakeTensor), and every storage that it
makes is counted from its birth to its end. So the numbers follow the code: no formula has to be kept in step with it.
What is not seen: the workspace inside a kernel, fragmentation, and the context of a GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint

from tartvg.config import FramesConfig, PolicyConfig, SamplingConfig
from tartvg.data.video import TEMPORAL_PATCH, target_size
from tartvg.policy.decode_layers import DecodePass
from tartvg.policy.decoding import Decoding, Rows
from tartvg.policy.deepstack import DeepStack
from tartvg.policy.families.family import Family, family_of, family_of_published
from tartvg.policy.kv_cache import DecodeCache
from tartvg.policy.loading import DTYPES, base_path, new_adapter, read_config
from tartvg.policy.model_files import check_small_files, hub_small_files
from tartvg.policy.policy import Policy, TokenBatch
from tartvg.timing import PhaseTimer

TRACED_LAYERS = (4, 6)
"""Decoder layers of the models that stand in for a deeper one."""
TEXT_TOKENS = 400
"""Of a prompt beside its video and its stamps: instructions and query."""
WORK = ("sample", "update", "update_one")
"""What is traced; the last is an update with one completion."""


@dataclass(frozen=True)
class Load:
    """What one process works on at once."""

    prompt_tokens: int
    """Of the longest prompt, its video's included."""
    num_prompts: int
    """Of a step."""
    group_size: int
    new_tokens: int
    """Longest completion."""
    has_reference: bool = False
    """Whether a second, frozen adapter is kept."""
    at_once: int | None = None
    """Prompts that are sampled in one batch; None: all of the step."""
    rows_per_pass: int | None = None
    """Completions of a group per forward pass of an update; None: all."""
    text_tokens: int = TEXT_TOKENS
    """Of the longest prompt, those that are no video tokens."""

    @property
    def video_tokens(self) -> int:
        """Of the longest prompt."""
        return max(0, self.prompt_tokens - self.text_tokens)


@dataclass(frozen=True)
class Footprint:
    """Bytes of one process that holds the whole model."""

    weights: int
    """Of the frozen base, buffers included."""
    largest_block: int
    """Of the largest decoder layer, embedding or head: what ZeRO-3 holds whole at a time."""
    adapter: int
    """The trainable adapter's weights."""
    reference: int
    features: int
    """Video features of the prompts of a step."""
    vision: int
    """On top of what is kept, while a video is encoded."""
    sample: int
    update: int
    """On top of weights, gradients and optimiser state, for the largest group."""
    update_one: int
    """The same for one completion: the least that a process can do with, see `tartvg.training.out_of_memory`."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are made inside the block and still referenced."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def ignore(self, tensor: Tensor) -> None:
        """A storage that was there before."""
        self._sizes[tensor.untyped_storage()._cdata] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and look at what it made."""
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._see(value)
        return out

    def lap(self) -> int:
        """The peak since the last call, or since the beginning."""
        peak, self.peak = self.peak, self.now
        return peak

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += self._sizes[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


class ShapePolicy(Policy):
    """The policy without content: built on the meta device; `become_fake` lets it run inside a FakeTensorMode."""

    def __init__(self, settings: PolicyConfig, config: Any) -> None:
        torch.nn.Module.__init__(self)
        self.settings, self.family = settings, family_of(config.model_type)
        with torch.device("meta"):  # the libraries move and cast weights while they build, which no fake tensor allows
            base = self.family.model_class._from_config(
                config, dtype=DTYPES[settings.precision], attn_implementation=settings.attention
            )
            base.requires_grad_(False)
            self.model = new_adapter(base.eval(), settings.lora, 0)
        self._core = [base]
        self.timer = PhaseTimer()
        self.vocabulary = int(config.get_text_config().vocab_size)
        self.tokenizer = range(self.vocabulary)
        self.ban([0])

    def become_fake(self) -> None:
        """Give every weight and buffer a CPU tensor of the current FakeTensorMode; shared ones stay shared."""
        made: dict[int, Tensor] = {}
        for module in self.modules():
            for owner in (module._parameters, module._buffers):
                tensors: dict[str, Any] = owner
                for name, old in tensors.items():
                    if old is not None and id(old) not in made:
                        new = torch.empty(old.shape, dtype=old.dtype)
                        is_weight = isinstance(old, torch.nn.Parameter)
                        made[id(old)] = torch.nn.Parameter(new, old.requires_grad) if is_weight else new
                    tensors[name] = None if old is None else made[id(old)]

    def _embed_prompt(self, prepared: Any) -> tuple[Tensor, DeepStack]:
        width, dtype = self.language_model.config.hidden_size, next(self.core.parameters()).dtype
        places = torch.zeros(prepared.video_tokens, dtype=torch.long)
        added = self.family.num_features(self.core.config) - 1
        features = tuple(torch.zeros(len(places), width, dtype=dtype) for _ in range(added))
        return torch.zeros(1, prepared.inputs.length, width, dtype=dtype), DeepStack(places, features)

    def logps(self, prepared: Any, tokens: TokenBatch, temperature: float = 1.0) -> Tensor:
        """As `Policy.logps` does it where every token is real: how many are is no question of shapes."""
        states = self._states(prepared, tokens).flatten(0, 1)
        parts = [
            checkpoint(self._chunk_logps, chunk, ids, temperature, use_reentrant=False, preserve_rng_state=False)
            for chunk, ids in zip(
                states.split(self.settings.logit_chunk), tokens.ids.flatten().split(self.settings.logit_chunk),
                strict=True,
            )
        ]  # fmt: skip
        return torch.cat(parts)


def model_config(settings: PolicyConfig) -> Any:
    """The shapes of the base: published ones, or those of its own folder. Raises SettingError."""
    if (family := family_of_published(settings.path)) is not None:
        return family.config_class(**family.published[settings.path])
    folder, setting = Path(base_path(settings)), f"policy.path={settings.path}"
    if folder.is_dir():
        check_small_files(folder, setting)
    else:
        folder = hub_small_files(settings.path, settings.revision, setting)
    return read_config(folder, setting)


def most_tokens(frames: FramesConfig, family: Family) -> tuple[int, int]:
    """Video tokens of the longest prompt, and the text tokens that tell their times: a picture of 16:9, any length."""
    side, most = family.patch_form.side, (0, 0)
    for count in range(TEMPORAL_PATCH, frames.max_frames + 1, TEMPORAL_PATCH):
        height, width = target_size(1080, 1920, count, frames, side)
        steps = count // TEMPORAL_PATCH
        most = max(most, (steps * (height // side) * (width // side), steps * family.step_tokens), key=sum)
    return most


_KNOWN: dict[tuple[str, Load], Footprint] = {}
"""Footprints of this process, by settings and load."""


def trace(settings: PolicyConfig, load: Load) -> Footprint:
    """The footprint of one GRPO step's work on these settings. Seconds for the 7B; no memory to speak of."""
    key = (repr(settings), load)
    if key not in _KNOWN:
        _KNOWN[key] = _trace(settings, load)
    return _KNOWN[key]


def _trace(settings: PolicyConfig, load: Load) -> Footprint:
    config = model_config(settings)
    policy = ShapePolicy(settings, config)
    frozen = [p for p in [*policy.core.parameters(), *policy.core.buffers()] if not p.requires_grad]
    adapter = _bytes([p for p in policy.parameters() if p.requires_grad])
    work = _of_all_layers(settings, config, load)
    return Footprint(
        weights=_bytes(frozen),
        largest_block=max(_bytes(list(block.parameters())) for block in _blocks(policy)),
        adapter=adapter,
        reference=adapter if load.has_reference else 0,
        features=load.num_prompts * _feature_bytes(policy, load),
        vision=_vision_bytes(config, policy, load),
        sample=work["sample"],
        update=work["update"],
        update_one=work["update_one"],
    )


def update_bytes(settings: PolicyConfig, load: Load) -> int:
    """Of the update of one group alone, see `Footprint.update`."""
    return _of_all_layers(settings, model_config(settings), load, ("update",))["update"]


def _of_all_layers(settings: PolicyConfig, config: Any, load: Load, names: Sequence[str] = WORK) -> dict[str, int]:
    """Peaks of some of `WORK`.

    The decoder's layers are alike, so the peak of a phase grows by the same bytes with each: two small models tell a
    deep one's. The phases of each are told apart, as the highest may be another one in a deeper model.
    """
    layers = int(config.get_text_config().num_hidden_layers)
    if layers <= max(TRACED_LAYERS):
        return {name: max(phases) for name, phases in _peaks(settings, config, load, names).items()}
    few, more = (_peaks(settings, with_layers(config, number), load, names) for number in TRACED_LAYERS)
    step = TRACED_LAYERS[1] - TRACED_LAYERS[0]
    return {
        name: max(a + (b - a) * (layers - TRACED_LAYERS[0]) // step for a, b in zip(few[name], more[name], strict=True))
        for name in few
    }


def with_layers(config: Any, number: int) -> Any:
    """The same decoder with fewer layers."""
    changed = deepcopy(config)
    text: Any = changed.get_text_config()
    text.num_hidden_layers = number
    if hasattr(text, "layer_types"):
        text.layer_types = text.layer_types[:number]
    return changed


def _peaks(settings: PolicyConfig, config: Any, load: Load, names: Sequence[str] = WORK) -> dict[str, list[int]]:
    policy = ShapePolicy(settings, config)
    with FakeTensorMode():
        policy.become_fake()
        known = [*policy.parameters(), *policy.buffers()]
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
                known.append(parameter.grad)
        rows = min(load.group_size, load.rows_per_pass or load.group_size)
        some, one = replace(load, group_size=rows), replace(load, group_size=1)
        work = dict(zip(WORK, ((load, _sample), (some, _update), (one, _update)), strict=True))
        return {name: _measured(policy, known, *work[name]) for name in names}


def _measured(policy: ShapePolicy, known: list[Tensor], load: Load, work: Any) -> list[int]:
    """The peak of each phase of the work: it yields after all but the last."""
    live = LiveBytes()
    for tensor in known:
        live.ignore(tensor)
    with live:
        peaks = [live.lap() for _ in work(policy, load)]
    return [*peaks, live.lap()]


def _prepared(load: Load) -> Any:
    length = load.prompt_tokens
    positions = torch.zeros(3, length, dtype=torch.long)
    inputs = SimpleNamespace(length=length, positions=positions, next_position=length)
    return SimpleNamespace(inputs=inputs, video_tokens=load.video_tokens)


def _sample(policy: ShapePolicy, load: Load) -> Iterator[None]:
    """Prefill of all prompts, putting them together, and the last of the longest completions' tokens."""
    num_prompts = min(load.num_prompts, load.at_once or load.num_prompts)
    with torch.no_grad():
        filled = [policy._prefill(_prepared(load)) for _ in range(num_prompts)]
        yield
        cache = DecodeCache([c for c, _ in filled], load.group_size, load.new_tokens, load.new_tokens)
        del filled
        yield
        rows, ones = num_prompts * load.group_size, torch.ones(num_prompts * load.group_size, dtype=torch.long)
        written = Rows.begin(ones, torch.ones(rows, 1), torch.zeros(rows, load.new_tokens, dtype=torch.float64))
        decoding = Decoding(
            DecodePass(policy.language_model), policy._logits, cache, written, SamplingConfig(), ones[:1], False, True
        )
        decoding.step()


def _update(policy: ShapePolicy, load: Load) -> Iterator[None]:
    """Log-probabilities of one group, and their gradient."""
    policy.train()
    shape = (load.group_size, load.new_tokens)
    tokens = TokenBatch(torch.zeros(shape, dtype=torch.long), torch.ones(shape, dtype=torch.bool), torch.zeros(shape))
    loss = policy.logps(_prepared(load), tokens).sum()
    yield
    loss.backward()
    policy.eval()


def _blocks(policy: ShapePolicy) -> list[Any]:
    language_model = policy.language_model
    return [language_model.embed_tokens, policy.core.lm_head, *language_model.layers]


def _bytes(tensors: list[Any]) -> int:
    return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())


def _feature_bytes(policy: ShapePolicy, load: Load) -> int:
    size = DTYPES[policy.settings.precision].itemsize * policy.family.num_features(policy.core.config)
    return load.video_tokens * policy.language_model.config.hidden_size * size


def _vision_bytes(config: Any, policy: ShapePolicy, load: Load) -> int:
    """Of one video without gradient: its patches in float32 and in the tower's type, and the widest layer's states.

    From the shapes alone: the tower reads its grid's numbers, which a tensor without content cannot give.
    """
    vision: Any = config.vision_config
    size = DTYPES[policy.settings.precision].itemsize
    patches = 4 * load.video_tokens
    pixels = 3 * vision.temporal_patch_size * vision.patch_size**2
    return patches * (pixels * (4 + size) + size * (6 * vision.hidden_size + 3 * vision.intermediate_size))
