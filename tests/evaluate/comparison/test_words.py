"""Words and flags of the evaluations, and the batch that follows from them."""

import dataclasses

import pytest

from common.errors import Refusal
from common.processes.launch import set_threads
from evaluate.finetuning.options import FinetuneConfig, fit_batch
from evaluate.job.arguments import parser
from evaluate.segmenting.options import SegmentationConfig
from evaluate.segmenting.options import fit_batch as segmentation_batch


def test_words_may_follow_anything(script):
    read = script("finetune").read
    for words in (["lr=1", "--seeds", "0", "1", "epochs=3"], ["--seeds", "0", "1", "epochs=3", "lr=1"]):
        arguments, recipe, config = read(["finetune_small", "--ckpt", "x", *words])
        assert (arguments.seeds, recipe, config.epochs, config.lr, config.batch) == ([0, 1], "finetune_small", 3, 1, 64)
    assert read(["--ckpt", "x=1", "--no-baselines", "lr=2"])[2].lr == 2


def test_no_thread_is_refused_by_name():
    with pytest.raises(Refusal, match="threads=0: expected a number of at least 1"):
        set_threads(0)


def test_every_option_of_an_evaluation_is_understood_in_both_forms(script):
    """`threads=1` as `--threads 1`, whatever reads it."""
    read = script("finetune").read
    for words in (["threads=1", "seeds=3,4"], ["--seeds", "3", "4", "threads=1"], ["seeds=[3,4]", "--threads", "1"]):
        arguments, _, config = read(["--ckpt", "x", *words, "tensorboard=false", "resume=true", "overwrite=false"])
        assert (arguments.threads, arguments.seeds, arguments.ckpt) == (1, [3, 4], "x")
        assert (config.tensorboard, arguments.resume, arguments.overwrite) == (False, True, False)
    options = parser("")
    given = options.parse_args(["ckpt=a=b", "--out", "threads=2", "data_root=x y", "workers=3"])
    assert (given.ckpt, given.out, given.threads, given.data_root, given.workers) == (
        "a=b",
        "threads=2",
        None,
        "x y",
        3,
    )
    with pytest.raises(Refusal, match="unrecognized arguments: thread=1; did you mean '--threads'"):
        options.parse_args(["--ckpt", "x", "thread=1"])
    with pytest.raises(Refusal, match="resume=maybe: expected resume=true, or --resume"):
        read(["--ckpt", "x", "resume=maybe"])


def test_batches_fit_images_and_processes():
    config = FinetuneConfig(batch=256, mixup=0.8)
    fitted, note = fit_batch(config, 37, 3)
    assert fitted.batch == 36 and "37 training images" in note
    assert fit_batch(config, 1000, 4)[1] == ""
    with pytest.raises(Refusal, match="multiple of 12"):
        fit_batch(FinetuneConfig(batch=254, cutmix=1.0, accumulate=2), 1000, 3)
    for number, unit, processes, accumulate, words in (
        (3, 4, 2, 1, "two images, as they are mixed in pairs, for each of 2 processes x 1 accumulation step;"),
        (3, 4, 1, 2, "two images, as they are mixed in pairs, for each of 1 process x 2 accumulation steps;"),
        (1, 2, 1, 1, "1 training image and a step needs at least 2: two images"),
    ):
        with pytest.raises(Refusal, match=f"a step needs at least {unit}: ") as refusal:
            fit_batch(dataclasses.replace(config, accumulate=accumulate), number, processes)
        assert words in str(refusal.value) and "--mixup 0" in str(refusal.value)
        assert fit_batch(dataclasses.replace(config, accumulate=accumulate), unit, processes)[0].batch == unit
    with pytest.raises(Refusal, match="2 training images and a step needs at least 3: one image for each of 3 proc"):
        segmentation_batch(SegmentationConfig(), 2, 3)
