"""The oldest dependencies: read from pyproject.toml, and installed where `make floors` says so."""

import re
from importlib.metadata import version

import pytest
from floors import PROJECT, floors


def test_every_dependency_has_a_floor_and_it_is_read() -> None:
    text = PROJECT.read_text()
    assert floors(text)["timm"] == re.search(r'"timm>=([\d.]+)"', text)[1]  # type: ignore[index]
    assert {"torch", "torchvision", "pillow", "numpy", "safetensors"} < floors(text).keys()
    with pytest.raises(ValueError, match="1 dependencies, and 0 of them have a floor"):
        floors('\ndependencies = [\n    "timm",\n]')


def test_nothing_is_older_than_its_floor() -> None:
    """And in .venv-floors nothing is newer: the tests beside this one then tried what is promised."""
    for name, floor in floors(PROJECT.read_text()).items():
        installed = [int(part) for part in re.findall(r"\d+", version(name).partition("+")[0])[:3]]
        oldest = [int(part) for part in floor.split(".")]
        assert installed >= oldest, (name, installed)
        if ".venv-floors" in pytest.__file__:
            assert installed[: len(oldest)] == oldest and not any(installed[len(oldest) :]), (name, installed)
