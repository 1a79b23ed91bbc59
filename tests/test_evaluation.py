"""`evaluate`: three representations, each number with its protocol."""

import json

import pytest

from pyro_vje import evaluate
from pyro_vje.evaluation import format_table


def test_table_of_three_representations(trained_run, tmp_path):
    result = evaluate(trained_run, out=tmp_path / "eval.json", k=5)
    assert [row["representation"] for row in result["rows"]] == [
        "trained encoder",
        "untrained encoder",
        "raw pixels",
    ]
    assert [row["dim"] for row in result["rows"]] == [16, 16, 3 * 16 * 16]
    for row in result["rows"]:
        assert 0 <= row["knn"] <= 1
        assert 0 <= row["linear"] <= 1
    assert result["protocols"]["knn"]["k"] == 5
    assert (result["train_images"], result["test_images"]) == (48, 18)
    assert json.loads((tmp_path / "eval.json").read_text()) == result
    text = format_table(result)
    assert "raw pixels" in text
    assert "k 5" in text


def test_evaluating_twice_gives_the_same_numbers(trained_run, tmp_path):
    assert evaluate(trained_run, out=tmp_path / "a.json") == evaluate(trained_run, out=tmp_path / "b.json")


def test_unlabelled_images_are_refused(trained_run, image_folder, tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for i, source in enumerate(sorted((image_folder / split).rglob("*.png"))):
            (tmp_path / split / f"{i}.png").write_bytes(source.read_bytes())
    with pytest.raises(ValueError, match="no labels"):
        evaluate(trained_run, data_dir=str(tmp_path), out=tmp_path / "eval.json")
