"""`python -m common.data inspect DATA`, which is `poslabel inspect DATA`."""

import runpy
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "inspecting" / "inspect_data.py"

if sys.argv[1:2] != ["inspect"]:
    print("usage: python -m common.data inspect DATA", file=sys.stderr)
    sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
del sys.argv[1]
runpy.run_path(str(SCRIPT), run_name="__main__")
