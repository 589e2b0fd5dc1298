"""LoRA in the compute type: the same adapters as PEFT's, with fp32 master weights and 16-bit arithmetic.

y = W x + s B A x (Hu et al. 2021, arXiv 2106.09685, section 4.1). PEFT computes the second term in the type of A and
B. Beside a bf16 base these are fp32, as an optimiser step of 1e-6 would vanish in bf16; so PEFT casts each layer's
input to fp32, keeps that copy for the backward pass, and multiplies without the tensor cores. Here A and s B are cast
instead, which are small, and the term is added inside the second product. Gradients arrive in fp32 at the masters.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn


class Down(nn.Linear):
    """A, cast to the type of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., rank)."""
        # torch's function by its full name: under ZeRO-3 it is another one, which keeps no gathered weight
        return torch.nn.functional.linear(input, self.weight.to(input.dtype))


class Up(nn.Linear):
    """B, scaled in fp32, cast, and added to what the base layer says."""

    def forward(self, input: Tensor, base: Tensor, scale: float) -> Tensor:  # type: ignore[override]
        """low (..., rank) and base (..., out) -> (..., out)."""
        weight = (self.weight * scale).to(base.dtype)
        flat = torch.addmm(base.flatten(0, -2), input.flatten(0, -2), weight.t())
        return flat.view(base.shape)


class NativeLora(LoraLinear):
    """PEFT's layer with another forward pass. Its parameters, names and files are PEFT's.

    A and B stay modules that are called: under ZeRO-3 that is when DeepSpeed gathers their weights.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) -> (..., out), with the adapters that are active."""
        out: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return out
        for name in self.active_adapters:
            if name in self.lora_A:
                low = self.lora_A[name](self.lora_dropout[name](x))
                out = self.lora_B[name](low, out, self.scaling[name])
        return out


def compute_natively(model: nn.Module) -> None:
    """Have all LoRA layers of a PEFT model, with the adapters that they hold by now, compute as `NativeLora` does."""
    for module in list(model.modules()):
        if isinstance(module, LoraLinear):
            module.__class__ = NativeLora
            for parts, kind in ((module.lora_A, Down), (module.lora_B, Up)):
                for part in parts.values():
                    part.__class__ = kind
