"""Settings of a pipeline on an untrained base, which keeps whatever that says."""

import pytest
from helpers.settings import OPEN_FILTER


@pytest.fixture(scope="session")
def settings(small, untrained_base):
    return [*small, *OPEN_FILTER, f"policy.path={untrained_base}", "grpo.sampling.max_new_tokens=24"]
