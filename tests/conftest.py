"""Settings of every test process: no network, no telemetry, one thread for tiny models, one engine per process."""

import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    VLLM_NO_USAGE_STATS="1",
    DO_NOT_TRACK="1",
    WANDB_MODE="offline",
    TOKENIZERS_PARALLELISM="false",
    DS_ACCELERATOR="cpu",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
