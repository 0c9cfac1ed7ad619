"""Environment of the whole suite: the CPU build of vLLM,
its Triton kernels in the interpreter, one process an engine.
"""

import gc
import os

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# The engine runs inside the test's process, so that a test can look at the scheduler and the worker.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def pytest_collection_finish() -> None:
    """What is imported by now stays, and need not be looked through by every collection of garbage."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()
