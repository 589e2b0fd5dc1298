"""What libraries say at start-up and users need not read. Call before the heavy imports."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Hide start-up chatter; errors and our own messages stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("DeepSpeed", "pytorch_lightning", "pytorch_lightning.utilities.rank_zero", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # Gradio asks its own server whether it is there
    for text in (
        ".*is_gradient_checkpointing.*",
        ".*does not have many workers.*",
        ".*treespec, LeafSpec.*",
        ".*Unable to fetch remote file.*",
        ".*Could not find a config file in.*",
        ".*isinstance.treespec.*",
        ".*GPU available but not used.*",
        ".*no `logger`.*",
        ".*torch.distributed.*is deprecated.*",
    ):
        warnings.filterwarnings("ignore", message=text)

    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
