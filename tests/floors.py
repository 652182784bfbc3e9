"""Prints the floors of pyproject.toml as constraints for pip, a line each: what `make floors` installs."""

import re
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
FLOOR = re.compile(r'^ +"([\w.-]+)>=([\d.]+)",', re.M)


def floors(text: str) -> dict[str, str]:
    """{name: oldest version} of the `dependencies` in a pyproject.toml. Raises ValueError for one without a floor."""
    listed = text.partition("\ndependencies = [")[2].partition("\n]")[0]
    found = dict(FLOOR.findall(listed))
    lines = [line for line in listed.splitlines() if line.strip().startswith('"')]
    if not lines or len(found) != len(lines):
        raise ValueError(f"{PROJECT}: {len(lines)} dependencies, and {len(found)} of them have a floor")
    return found


if __name__ == "__main__":
    for name, version in floors(PROJECT.read_text()).items():
        print(f"{name}=={version}")
