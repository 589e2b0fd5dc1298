"""Settings of the page that answers questions about videos."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from tartvg.config.choices import require
from tartvg.config.fields import Effect, Settings, setting

MAX_POLICIES = 2


@dataclass
class ServeConfig(Settings, path="serve", effect=Effect.none):
    """stage=serve: a page in the browser."""

    host: str = "127.0.0.1"
    """Address to listen on. Any other than a loopback one lets everybody who reaches this machine ask: there is no
    password, and nothing is encrypted."""
    port: int = setting(7860, at_least=1, at_most=65535)
    """Port to listen on."""
    policies: list[str] = field(default_factory=list)
    """One or two to answer side by side: `base`, a stage of this run (`grpo1`, `sft`, `grpo2`) or an adapter folder.
    []: the base and what stage=ground takes."""
    max_megabytes: int = setting(200, at_least=1)
    """Larger files are refused."""
    max_seconds: float = setting(600.0, above=0)
    """Longer videos are refused."""
    max_characters: int = setting(300, at_least=1)
    """Longer sentences are refused."""
    timeout_s: float = setting(120.0, above=0)
    """An answer that takes longer is cut off."""
    num_examples: int = setting(6, at_least=0)
    """Videos of evaluate.split that the page offers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.host != "", "serve.host", "an address or a name", self.host)
        require(len(self.policies) <= MAX_POLICIES, "serve.policies", "one or two policies, or []", self.policies)
        require(len(set(self.policies)) == len(self.policies), "serve.policies", "different policies", self.policies)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches the page."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
