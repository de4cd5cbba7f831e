"""Settings of every test process: no network, no telemetry, one thread for tiny models, one engine per process.

Started in the background of a shell or under nohup, SIGINT is ignored and would be by all that the tests start; tests
that interrupt processes need the default back.
"""

import os
import signal

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

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
