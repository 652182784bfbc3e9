"""Runs and reports as compare reads them, made by hand, and compare itself as a function."""

import csv
import json
import os

import numpy as np

from common.checkpoints.storage import sha256

K = 200  # test images
VIT = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "class_token": False, "global_pool": "avg"}
PROTOCOLS = {"knn": {"id": "knn/centred", "headline": 20}, "linear": {"id": "linear/sweep"},
             "explain": {"id": "explain/deletion"}, "layers": {"id": "layers/position+knn/centred"}}  # fmt: skip


def right(share, seed, seeds=1):
    """Outcomes (S, K): each of the K images has a difficulty of its own, common to all who are asked."""
    difficulty = np.random.default_rng(0).random(K)
    luck = np.random.default_rng(seed + 1).normal(0, 0.1, (seeds, K))
    return difficulty + luck < share


def maker(place):
    """make("a", seed=0, keep=1.0) -> a run folder in `place` with config, weights (not of any model), description."""

    def run(name, seed=0, keep=1.0, logs=True, about=None, **training):
        folder = place / name
        folder.mkdir(parents=True)
        (folder / "backbone.safetensors").write_bytes(os.fsencode(name))
        training = {"seed": seed, "data": "nowhere", "data_root": None, "step": 100, "steps": 100, "batch": 32,
                    "images_seen": 3200, "recipe": "tiny", "audit": "clean"} | training  # fmt: skip
        about = {"format": 1, "name": "vit_tiny_patch16_224", "kwargs": VIT, "size": [16, 16], "mean": [0.5] * 3,
                 "std": [0.5] * 3, "crop": 1.0, "position": "none", "pooling": "mean", "training": training,
                 "weights_sha256": sha256(folder / "backbone.safetensors")} | (about or {})  # fmt: skip
        (folder / "backbone.json").write_text(json.dumps(about))
        options = {"weight": 1.0, "keep": keep, "position": "none", "context": 1.0, "view": "global"}
        views = {"global": {"size": 16, "count": 1}}
        config = {"run": folder.name.encode("ascii", "replace").decode(), "seed": seed, "views": views,
                  "objectives": {"absolute": options}}  # fmt: skip
        (folder / "config.yaml").write_text(json.dumps(config))
        if logs:
            records = [{"step": at, "loss": 3 - at / 50, "images_per_second": 64.0} for at in range(10, 101, 10)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
        return folder

    return run


def write(run, name, rows, *, test="t" * 16, index=None, protocol=None, **changes):
    """A minimal report as report.write makes it; rows: {row: {kind: outcomes (S, K)}}."""
    folder = run / "evaluate"
    folder.mkdir(exist_ok=True)
    arrays = {f"{row}/{kind}": each for row, kinds in rows.items() for kind, each in kinds.items()}
    np.savez_compressed(folder / f"{name}.outcomes.npz", index=np.arange(K) if index is None else index, **arrays)
    values = {
        row: {kind: {"accuracy": each.mean(), "interval": [0.0, 1.0], "std": None} for kind, each in kinds.items()}
        for row, kinds in rows.items()
    }
    content = {
        "format": 1, "evaluation": name, "protocol": protocol or PROTOCOLS[name], "subject": {"name": run.name},
        "weights_sha256": json.loads((run / "backbone.json").read_text())["weights_sha256"], "step": 100,
        "data": {"spec": "nowhere", "note": "", "train": {"images": 9, "fingerprint": "train"},
                 "test": {"images": K, "fingerprint": test, "judged": K}},
        "values": values, "seeds": [0], "command": f"{name}.py <&>", "hardware": {"cpu": "some"}, "versions": {},
        "outcomes": {"file": f"{name}.outcomes.npz", "sha256": sha256(folder / f"{name}.outcomes.npz")},
    }  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(content | changes, default=float))


def standard(run, share, seed, **changes):
    """A k-NN report with baselines."""
    rows = {"subject": {"class": right(share - 0.2, seed), "mean": right(share, seed)},
            "random": {"mean": right(0.4, 90)}, "pixels": {"pixels": right(0.6, 91)}}  # fmt: skip
    write(run, "knn", rows, **changes)


def comparer(main, place):
    """compare(words...) -> {file name: text} of what was written; --no-run unless `run`."""

    def call(*words, run=False, status=0):
        out = place / "out"
        assert main([*map(str, words), "--out", str(out), *([] if run else ["--no-run"])]) == status
        return {path.name: path.read_text() for path in out.iterdir()}

    return call


def rows_of(text):
    return list(csv.DictReader(text.splitlines()))
