"""The memory that a benchmark's process has used."""

from pathlib import Path

import torch


def peak(device: str) -> float:
    """Most MiB in use so far. Of this program alone: what getrusage says begins with the peak of the parent process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    words = Path("/proc/self/status").read_text(encoding="utf-8").split()
    return int(words[words.index("VmHWM:") + 1]) / 2**10  # Linux: kB
