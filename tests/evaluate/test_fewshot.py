"""evaluate/fewshot.py and its draws: stratified, nested, seeded; the report; one line for each mistake."""

import numpy as np
import pytest
from pictures import write_images

from common.errors import Refusal
from evaluate.probing import subsets

CALM = ["--threads", "1", "--device", "cpu"]
LABELS = np.array([0] * 40 + [2] * 30 + [5] * 7)


def test_draws_are_stratified_nested_and_seeded():
    drawn = {k: subsets.shots(LABELS, k, seed=0) for k in (1, 5, 7)}
    for k, chosen in drawn.items():
        assert len(set(chosen.tolist())) == 3 * k and np.array_equal(chosen, np.sort(chosen))
        assert np.bincount(LABELS[chosen]).tolist() == [k, 0, k, 0, 0, k]
    assert set(drawn[1]) < set(drawn[5]) < set(drawn[7])
    parts = {part: subsets.share(LABELS, part, seed=0) for part in (0.01, 0.1, 1.0)}
    assert np.bincount(LABELS[parts[0.01]]).tolist() == [1, 0, 1, 0, 0, 1]  # never none
    assert np.bincount(LABELS[parts[0.1]]).tolist() == [4, 0, 3, 0, 0, 1]
    assert set(drawn[1]) == set(parts[0.01]) < set(parts[0.1]) < set(parts[1.0]) and len(parts[1.0]) == len(LABELS)
    assert np.array_equal(subsets.shots(LABELS, 5, seed=0), drawn[5])
    others = [subsets.shots(LABELS, 5, seed=0, draw=1), subsets.shots(LABELS, 5, seed=1)]
    assert not any(np.array_equal(drawn[5], other) for other in others) and not np.array_equal(*others)
    fewer = LABELS[:70]  # without class 5 the others' draws stay
    assert np.array_equal(subsets.shots(fewer, 5, seed=0), drawn[5][LABELS[drawn[5]] != 5])


def test_a_class_with_too_few_images_is_named():
    with pytest.raises(Refusal, match=r"--shots 8: class 5 of the data has 7 training images"):
        subsets.shots(LABELS, 8, seed=0)
    with pytest.raises(Refusal, match=r"class dog of pets has 0 training images"):
        subsets.shots(LABELS[:40], 8, seed=0, classes=["cat", "dog"], where="pets")


def test_report_and_tables(make_run, script, report_of, capsys):
    run = make_run()
    words = ["--ckpt", str(run), *CALM, "--draws", "2", "--shares", "0.3"]
    assert script("fewshot").main(words) == 0
    report, out = report_of(run, "fewshot"), capsys.readouterr().out
    assert report["protocol"]["subsets"] == ["1-shot", "5-shot", "10-shot", "30 %"]
    assert "25-shot is left out: class" in report["protocol"]["notes"][0] and "25-shot is left out" in out
    entry = report["values"]["subject"]["mean"]
    assert entry["accuracy"] == entry["subsets"]["10-shot"]["ridge"]["accuracy"]
    for by_name in entry["subsets"].values():
        for found in by_name.values():
            assert len(found["by_seed"]) == 2 and found["std"] is not None
    pixels = report["values"]["pixels"]["pixels"]["subsets"]["10-shot"]
    assert pixels["logreg"]["accuracy"] > 0.9 and pixels["ridge"]["accuracy"] > 0.6
    for word in ("ridge regression of", "logistic regression of", "1-shot", "30 %", "±", "random init", "raw pixels"):
        assert word in out
    assert script("fewshot").main([*words, "--seeds", "0", "1"]) == 0
    again = report_of(run, "fewshot")["values"]
    first = entry["subsets"]["5-shot"]["ridge"]["by_seed"]
    assert again["subject"]["mean"]["subsets"]["5-shot"]["ridge"]["by_seed"][:2] == first


def test_each_mistake_is_one_refusal_and_nothing_is_written(make_run, script, tmp_path):
    run, fewshot = make_run(), script("fewshot")

    def refused(match, *words):
        with pytest.raises(Refusal, match=match):
            fewshot.main(["--ckpt", str(run), *CALM, *map(str, words)])
        assert not (run / "evaluate").exists()

    refused(r"--shots 13: class \w+ of .* has 12 training images .* expected at least 13", "--shots", 1, 13)
    refused("--shots 0: expected at least 1", "--shots", 0)
    refused("--shares 1.5: expected", "--shares", 1.5)
    refused("--draws 0: expected", "--draws", 0)
    refused("both are empty", "--shots", "--shares")
    write_images(tmp_path / "one" / "train", 3)
    for other in list((tmp_path / "one" / "train").iterdir())[1:]:
        other.rename(tmp_path / other.name)
    refused("no labels|classes", "--data", tmp_path / "one")
