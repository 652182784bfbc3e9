"""Streams in real processes that are killed at random, and from a server that goes away."""

import functools
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from pictures import write_tar
from runs.children import TINY, Run, Train

from common.errors import Refusal
from tests.pretrain.streaming.test_streams import BRACES, EACH, SHARDS, STREAM, picture


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(SHARDS):
        numbers = range(shard * EACH, (shard + 1) * EACH)
        write_tar(folder / f"shards-{shard:03d}.tar", [(f"{n:04d}.png", picture(n)) for n in numbers])
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_killed_at_random_go_on_to_the_bit(train: Train, shards: Path, tmp_path: Path) -> None:
    """The losses are those of a run that was left in peace, so no sample was left out or seen twice."""
    words = (str(TINY), f"data={shards}/{BRACES}", *STREAM, "batch=8", "checkpoint_every=2", "steps=24")
    peaceful, run = Run(tmp_path / "peaceful"), Run(tmp_path / "run")
    ended = train(*words, f"run={peaceful.path}", processes=2)
    assert ended.status == 0 and "2 x CPU" in ended.stdout, ended.stderr
    draw, at = random.Random(7), 0
    while at < 18:
        more = (*words, f"run={run.path}") if at == 0 else ("--resume", str(run.path), f"loader.workers={at % 3}")
        at += draw.randint(3, 7)
        child = train.start(*more, until=f"step:{at}", processes=2)
        for process in child.held():
            os.kill(process, signal.SIGKILL)
        assert child.wait().status != 0
    assert train("--resume", str(run.path), processes=2).status == 0
    assert run.losses == peaceful.losses and len(run.losses) == 24
    alone = train("--resume", str(run.path), "steps=26", processes=1)
    assert (
        alone.status == 2 and "shared by 2 processes, each with a position of its own, and here are 1" in alone.stderr
    )


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder and says nothing."""

    def log_message(self, *words: object) -> None:
        """Say nothing."""


@pytest.fixture
def served(shards: Path) -> Iterator[Callable[[int], ThreadingHTTPServer]]:
    """`served(port)` serves the shards; port 0 is any."""
    servers = []

    def serve(port: int) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer(("127.0.0.1", port), functools.partial(Quiet, directory=str(shards)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_shards_behind_a_url_whose_server_goes_away(
    served: Callable[[int], ThreadingHTTPServer],
    inside: Callable[..., int],
    shards: Path,
    tmp_path: Path,
    at_step: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("datasets.config.STREAMING_READ_MAX_RETRIES", 1)
    monkeypatch.setattr("datasets.config.STREAMING_OPEN_MAX_RETRIES", 1)
    monkeypatch.setattr("datasets.config.STREAMING_READ_RETRY_INTERVAL", 0)
    monkeypatch.setattr("datasets.config.STREAMING_OPEN_RETRY_INTERVAL", 0)
    server = served(0)
    port = server.server_address[1]
    words = [str(TINY), *STREAM, "steps=20", "loader.workers=0", "checkpoint_every=2"]
    here, away = Run(tmp_path / "here"), Run(tmp_path / "away")
    assert inside(*words, f"data={shards}/{BRACES}", f"run={here.path}") == 0

    def gone() -> None:
        server.shutdown()
        server.server_close()

    at_step(4, gone)
    with pytest.raises(Refusal, match=r"the stream http.* broke off in shard \d: .*go on with --resume") as refusal:
        inside(*words, "data=http:" + f"//127.0.0.1:{port}/{BRACES}", f"run={away.path}")
    assert "\n" not in str(refusal.value) and 4 <= len(away.steps) < 20
    served(port)
    assert inside("--resume", away.path) == 0
    assert away.losses == here.losses
