"""Run folders and weights files: what is read back, and what is refused."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pyro_vje import TrainConfig, load_run
from pyro_vje.runs import build_model, read_info


@pytest.fixture
def run_copy(trained_run, tmp_path):
    return shutil.copytree(trained_run, tmp_path / "copy")


def rewrite(path, change_state=None, change_header=None):
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["pyro_vje"])
    state = load_file(path)
    if change_state:
        change_state(state)
    if change_header:
        change_header(header)
    save_file(state, path, {"pyro_vje": json.dumps(header)})


def test_folder_and_weights_file_give_the_same_model(trained_run):
    folder, file = load_run(trained_run), load_run(trained_run / "weights.safetensors")
    assert folder.info == file.info == read_info(trained_run)
    assert folder.folder == trained_run
    assert file.folder is None
    images = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(folder.vje.embed(images), file.vje.embed(images), rtol=0, atol=0)
    assert not folder.vje.training


def test_untrained_twin_is_the_initialisation_of_training(tiny_config):
    one, two = build_model(tiny_config, 16), build_model(tiny_config, 16)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_building_a_model_leaves_the_random_state_alone(tiny_config):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    build_model(tiny_config, 16)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:1000]), "no readable safetensors file"),
        (lambda p: p.write_bytes(b""), "no readable safetensors file"),
        (lambda p: p.write_bytes(pickle.dumps({"a": 1})), "no readable safetensors file"),
        (lambda p: save_file({"a": torch.zeros(1)}, p), "not written by pyro-vje"),
        (
            lambda p: rewrite(p, lambda s: s.pop("projector.0.weight")),
            "missing or too many: projector.0.weight",
        ),
        (lambda p: rewrite(p, lambda s: s.update({"x": torch.zeros(1)})), "missing or too many: x"),
        (
            lambda p: rewrite(p, lambda s: s.update({"projector.0.weight": torch.zeros(2, 2)})),
            r"projector.0.weight is torch.float32 \(2, 2\)",
        ),
        (
            lambda p: rewrite(p, lambda s: s["projector.0.weight"].fill_(float("nan"))),
            "holds non-finite values",
        ),
        (lambda p: rewrite(p, None, lambda h: h.update(schema_version=99)), "schema version 99"),
        (lambda p: rewrite(p, None, lambda h: h.pop("image_size")), "image_size is missing"),
        (lambda p: rewrite(p, None, lambda h: h["config"].update(epochs="many")), "setting epochs must be"),
        (
            lambda p: rewrite(p, None, lambda h: h["config"].update(encoder="os:getcwd")),
            "code outside this package",
        ),
    ],
)
def test_damaged_weights_are_refused(run_copy, damage, message):
    path = run_copy / "weights.safetensors"
    damage(path)
    for ckpt in (run_copy, path):
        with pytest.raises(ValueError, match=message):
            load_run(ckpt)


def test_what_is_not_a_run_is_said(tmp_path, run_copy):
    with pytest.raises(FileNotFoundError, match="no such run folder"):
        load_run(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"not a run folder: it holds no config\.json"):
        load_run(tmp_path / "empty")
    (run_copy / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        load_run(run_copy)


def test_user_code_is_imported_only_when_trusted(run_copy, tmp_path, monkeypatch):
    (tmp_path / "my_encoders.py").write_text(
        "import pathlib\npathlib.Path('imported').touch()\nfrom tests_tiny import tiny_encoder as mine\n"
    )
    (tmp_path / "tests_tiny.py").write_text(
        "from torch import nn\n"
        "def tiny_encoder(image_size):\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),\n"
        "        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    )
    monkeypatch.chdir(tmp_path)
    rewrite(run_copy / "weights.safetensors", None, lambda h: h["config"].update(encoder="my_encoders:mine"))
    with pytest.raises(ValueError, match="--trust-plugins"):
        load_run(run_copy)
    assert not (tmp_path / "imported").exists()
    assert load_run(run_copy, trust_plugins=True).vje.feature_dim == 16
    assert (tmp_path / "imported").exists()


def test_infinite_df_survives_the_weights_header(tiny_config):
    config = TrainConfig.from_dict({**tiny_config.to_dict(), "df": "inf"})
    assert config.df == float("inf")
