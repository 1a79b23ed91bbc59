"""Run folders and weights files: what is read back, and what is refused."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pyro_vje import TrainConfig, load_run
from pyro_vje.model.build import build_model
from pyro_vje.runs.folder import CALIBRATION, SCHEMA_VERSION, RunInfo, read_info

WEIGHT = "posterior_network.loc.weight"


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


def test_others_may_read_the_weights_if_they_may_read_the_settings(trained_run):
    modes = {(trained_run / name).stat().st_mode for name in ("config.json", "weights.safetensors", CALIBRATION)}
    assert len(modes) == 1


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
        (lambda p: rewrite(p, lambda s: s.pop(WEIGHT)), f"missing or too many: {WEIGHT}"),
        (lambda p: rewrite(p, lambda s: s.update({"x": torch.zeros(1)})), "missing or too many: x"),
        (lambda p: rewrite(p, lambda s: s.update({WEIGHT: torch.zeros(2, 2)})), rf"{WEIGHT} is torch.float32 \(2, 2\)"),
        (lambda p: rewrite(p, lambda s: s[WEIGHT].fill_(float("nan"))), "holds non-finite values"),
        (lambda p: rewrite(p, None, lambda h: h.update(schema_version=99)), "schema version 99"),
        (lambda p: rewrite(p, None, lambda h: h.pop("image_size")), "image_size is missing"),
        (lambda p: rewrite(p, None, lambda h: h["config"].update(epochs="many")), "setting epochs must be"),
        (lambda p: rewrite(p, None, lambda h: h["config"].update(encoder="os:getcwd")), "code outside this package"),
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
        "        nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    )
    monkeypatch.chdir(tmp_path)
    rewrite(run_copy / "weights.safetensors", None, lambda h: h["config"].update(encoder="my_encoders:mine"))
    with pytest.raises(ValueError, match="--trust-plugins"):
        load_run(run_copy)
    assert not (tmp_path / "imported").exists()
    assert load_run(run_copy, trust_plugins=True).vje.feature_dim == 8
    assert (tmp_path / "imported").exists()


def test_infinite_df_survives_the_weights_header(tiny_config):
    config = TrainConfig.from_dict({**tiny_config.to_dict(), "df": "inf"})
    assert config.df == float("inf")


# config.json of a run of the encoder `tiny`.
WRITTEN = """
{"schema_version": 4,
 "config": {"dataset": "digits", "data_dir": null, "download": true, "normal_class": null, "image_size": null,
  "encoder": "tiny", "embedding_dim": 8, "hidden_dim": 16, "likelihood": "polar-student-t", "df": 5.0,
  "unit_radius": "sqrt-d", "radius": "student-t", "kl_weight": 0.1, "shared_variance": true, "epochs": 30,
  "batch_size": 128, "lr": 0.06, "weight_decay": 0.0005, "warmup_epochs": 3.0, "num_particles": 1, "devices": 1,
  "precision": "auto", "compile": false, "residency": "auto", "workers": 2, "knn_every": 5, "seed": 0},
 "image_size": 16, "mean": [0.305, 0.305, 0.305], "std": [0.319, 0.319, 0.319],
 "classes": ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"], "train_images": 1442,
 "view_size": 16, "stem": "its own stem",
 "versions": {"python": "3.11.7", "pyro-vje": "0.1.0"}}
"""


def test_a_run_of_this_version_is_read_and_no_other():
    """Also with what it does not know: the defaults stand in for settings that came later."""
    info = RunInfo.from_dict(json.loads(WRITTEN))
    assert (info.config.holdout, info.config.kl_weight, info.config.df, info.fit) == (0.05, 0.1, 5.0, "crop")
    assert RunInfo.from_dict(json.loads(json.dumps(info.to_dict()))) == info
    for version in (SCHEMA_VERSION - 1, SCHEMA_VERSION + 1, 0, -1, True, "1", [], None):
        with pytest.raises(ValueError, match=r"schema.version"):
            RunInfo.from_dict({**json.loads(WRITTEN), "schema_version": version})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 10**9}, "image_size: .* less than or equal to 8192, not 1000000000"),
        ({"std": [0.3, 0.3, 0.0]}, r"std\.2: .* greater than 0, not 0\.0"),
        ({"mean": [0.3, float("nan"), 0.3]}, r"mean\.1: .* less than or equal to 1, not nan"),
        ({"std": [10**400] * 3}, r"std\.0: .* valid number, not 1000"),
        ({"std": [0.3, 0.3]}, "std: Tuple should have at least 3 items"),
        ({"image_size": True}, "image_size: .* valid integer, not True"),
        ({"config": {**json.loads(WRITTEN)["config"], "embedding_dim": 10**9}}, "embedding_dim must be at least 2"),
        ({"config": {**json.loads(WRITTEN)["config"], "lr": float("nan")}}, "lr must be at least 0"),
    ],
)
def test_descriptions_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        RunInfo.from_dict({**json.loads(WRITTEN), **changes})


def test_a_model_is_built_only_when_its_size_fits_the_weights(run_copy):
    """A header that asks for a head of 12 TB is refused without an attempt to make it."""
    path = run_copy / "weights.safetensors"
    huge = {"projector": "linear", "hidden_dim": 2**20, "embedding_dim": 2**20 - 1}

    def with_projector(state):
        for name in [name for name in state if name.startswith("projector.0.")]:
            state[name.replace("0", "1", 1)] = state.pop(name)
        state["projector.0.weight"] = torch.zeros(8, 8)

    rewrite(path, with_projector, lambda h: h["config"].update(huge))
    with pytest.raises(ValueError, match=r"but the configuration asks for torch.float32 \(10485"):
        load_run(path)
