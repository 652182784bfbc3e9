"""Which run a state belongs to: a name drawn at the run's birth, and the options that decide what is learned."""

import json
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from common import config as configuration
from common.checkpoints import storage
from common.checkpoints.run_folder import CONFIG
from common.errors import Refusal
from pretrain.config import MAY_GROW, PretrainConfig, may_change

LINE = re.compile(r"^# run ([0-9a-f]{16})$", re.MULTILINE)  # in config.yaml: it stays with a folder that is moved
NAMED = 5  # options that a refusal names


def new_line() -> str:
    """The line of config.yaml that names a new run."""
    return f"# run {secrets.token_hex(8)}"


def name_of(run: Path) -> str | None:
    """The name in a run's config.yaml; None for runs from before there was one."""
    match = LINE.search((run / CONFIG).read_text(errors="replace", encoding="utf-8"))
    return match.group(1) if match else None


def learned(config: PretrainConfig) -> dict[str, Any]:
    """The options that decide what is learned, as {dotted key: value}, in JSON's types."""
    whole = configuration.flat(OmegaConf.to_container(OmegaConf.structured(config)))
    kept = {name: value for name, value in whole.items() if not may_change(name) and name not in MAY_GROW}
    return json.loads(json.dumps(kept, default=str))


def stored(run: Path, config: PretrainConfig) -> dict[str, str | None]:
    """What a state says of its run."""
    return {"run": name_of(run), "options": json.dumps(learned(config))}


def refuse_other(folder: Path, state: Mapping[str, Any], run: Path, config: PretrainConfig) -> str | None:
    """The name of the run that wrote the checkpoint in `folder`, whose content is `state`; None if it does not say.

    Raises Refusal if that is another run than `run`. A state from before there were names is asked what its backbone's
    description says: seed, batch and objectives.
    """
    about = state.get("identity")
    try:
        if about is None:
            training = json.loads((folder / storage.DESCRIPTION).read_text(encoding="utf-8"))["training"]
            theirs = {name: training[name] for name in ("seed", "batch", "objectives") if name in training}
            name = None
        else:
            theirs, name = json.loads(about["options"]), about["run"]
        theirs = configuration.flat(theirs)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refusal(f"{folder} does not say which run it is of ({type(error).__name__}): {_help(run)}") from None
    mine, here = learned(config), name_of(run)
    differ = [f"{key}={theirs[key]}, here {mine[key]}" for key in sorted(mine.keys() & theirs.keys())
              if theirs[key] not in (mine[key], "auto")]  # fmt: skip  # auto: it was resolved later, where it was used
    if differ:
        more = f" and {len(differ) - NAMED} more" if len(differ) > NAMED else ""
        raise Refusal(f"{folder} is of another run, with {'; '.join(differ[:NAMED])}{more}: {_help(run)}")
    if None not in (name, here) and name != here:
        raise Refusal(f"{folder} is of another run, {name} (config.yaml of this one says {here}): {_help(run)}")
    return name


def _help(run: Path) -> str:
    return (
        f"put back the state/ that {run} had, with its config.yaml; or resume the folder that the state came from; to "
        "begin from another run's weights there is model.init=RUN"
    )
