"""What vLLM must find in the environment when it is imported, for any engine of this project."""

import os


def defaults(on_gpu: bool, tensor_parallel_size: int = 1, server: bool = False) -> dict[str, str]:
    """Return the environment variables for an engine, without those that keep the user's own value.

    Args:
        on_gpu: the engine runs on a GPU.
        tensor_parallel_size: processes over which each layer is split.
        server: the engine belongs to a server, which logs, and must not share its process with it.
    """
    found = {
        # Where Triton is present vLLM would take its second model runner. This one is what the CPU engine, and so
        # every test, uses; `runner_v2.py` is the port to the second.
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        # The default, fork, kills the engine after anyone has asked `torch.cuda.is_available()`: the question
        # registers a fork handler, and the child then cannot initialise CUDA.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        # FlashInfer's sampler is compiled at start-up, for minutes, with nvcc and ninja. No request with a seed of
        # its own uses it.
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
    }
    if not server:
        found["VLLM_LOGGING_LEVEL"] = "ERROR"
    if not on_gpu:
        found |= {
            "VLLM_CPU_KVCACHE_SPACE": "4" if server else "1",  # GiB
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # its own binding leaves cores idle
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // tensor_parallel_size)),
        }
        if tensor_parallel_size == 1 and not server:
            found["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return found


def set_defaults(*args, **options) -> None:
    """Put `defaults` into this process's environment, which its children inherit; a user's own setting wins."""
    for name, value in defaults(*args, **options).items():
        os.environ.setdefault(name, value)
