"""What each process of a real job finds: `ranks(function)` runs `function(rank, processes)` under torchrun."""

import functools
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Found = Callable[[int, int], Any]


@functools.cache
def ranks(function: Found, processes: int = 2) -> list[Any]:
    """What the module-level `function` returned in each of `processes` gloo processes, by rank, through JSON."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    words = [__file__, function.__code__.co_filename, function.__name__]
    done = subprocess.run([*launch, *words], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    everybody = json.loads(done.stdout.splitlines()[-1])
    assert [rank for rank, _ in everybody] == list(range(processes))
    return [found for _, found in everybody]


def main(file: str, name: str) -> None:
    tests = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(tests.parent), str(tests)]  # in place of the folder of this file
    import common.processes.launch  # noqa: F401  (before torch)

    # isort: split
    import torch.distributed
    from accelerate.utils import gather_object

    from common.processes import group

    process = group.join(cpu=True)
    found = runpy.run_path(file)[name](process.process_index, process.num_processes)
    everybody = gather_object([(process.process_index, found)])
    if process.is_main_process:
        print(json.dumps(everybody), flush=True)
    torch.distributed.destroy_process_group()
    os._exit(0)  # as the scripts do: gloo's threads may abort a normal exit


if __name__ == "__main__":
    main(*sys.argv[1:])
