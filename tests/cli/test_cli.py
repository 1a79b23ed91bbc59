"""The commands as a user types them."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import click
import pytest
from click.testing import CliRunner

from pyro_vje import ScoreConfig, TrainConfig
from pyro_vje.cli import main
from pyro_vje.config import ABLATION_AXES, fields_of
from pyro_vje.runs.stopping import restored_handlers

SMALL = "--encoder tiny --embedding-dim 8 --hidden-dim 16 --batch-size 16 --precision 32 --image-size 16"


def commands(group=main, names=()):
    """Every command, by the words that call it."""
    for name, command in group.commands.items():
        yield from (commands(command, (*names, name)) if isinstance(command, click.Group) else [(*names, name)])


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


def test_train_eval_score_embed(image_folder, tmp_path):
    out = tmp_path / "run"
    where = ("--dataset", "folder", "--data-dir", image_folder, "--out", out)
    result = run("train", *where, "--epochs", 2, *SMALL.split())
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(out)

    result = run("eval", "--ckpt", out, "--k", 5)
    assert result.exit_code == 0, result.output
    assert "trained encoder" in result.stdout
    assert json.loads((out / "eval.json").read_text())["train_images"] == 48

    result = run("score", "--ckpt", out)
    assert result.exit_code == 0, result.output
    assert "18 images scored by aggregate" in result.stdout
    assert "AUROC" in result.stdout
    with open(out / "scores.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 18

    result = run("embed", "--ckpt", out, "--data", image_folder / "test", "--out", tmp_path / "emb.npz")
    assert result.exit_code == 0, result.output
    assert "18 images embedded" in result.stdout

    files = ("--data", image_folder / "test", "--out", tmp_path / "s.csv")
    result = run("score", "--ckpt", out / "weights.safetensors", *files)
    assert result.exit_code == 0, result.output


def test_one_class_run_scores_against_its_own_class(image_folder, tmp_path):
    arguments = ["--dataset", "folder", "--data-dir", image_folder, "--out", tmp_path / "run", "--epochs", 1]
    result = run("train", *arguments, "--normal-class", "stripes", *SMALL.replace("16 --pre", "8 --pre").split())
    assert result.exit_code == 0, result.output
    result = run("score", "--ckpt", tmp_path / "run")
    assert "normal: 6" in result.stdout


def test_damaged_image_gives_a_row_and_exit_code_one(trained_run, image_folder, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "good.png").write_bytes(next(image_folder.rglob("*.png")).read_bytes())
    (folder / "bad.png").write_text("no image")
    result = run("score", "--ckpt", trained_run, "--data", folder, "--out", tmp_path / "s.csv")
    assert result.exit_code == 1
    assert "1 image scored" in result.stdout
    assert "1 image could not be read" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--dataset", "cifar1000"], "'cifar1000' is not one of 'digits', 'cifar10'"),
        (["eval", "--ckpt", ".", "--dataset", "cifar1000"], "'cifar1000' is not one of"),
        (["train", "--dataset", "no_such_module:data"], "'no_such_module:data'"),
        (["train", "--likelihood", "cauchy"], "unknown likelihood family 'cauchy'"),
        (["train", "--dataset", "folder", "--data-dir", "/no/such/place"], "/no/such/place"),
        (["train", "--resume"], "--out RUN"),
        (["train", "--resume", "--out", "x", "--overwrite"], "leave one out"),
        (["train", "--lr", "1", "--epochs", "2", "--lr", "2"], "--lr takes one value, and was given 2 times"),
        (["benchmark", "one-class", "--df", "1", "--df", "2", "--out", "x"], "--df takes one value"),
        (["score", "--ckpt", ".", "--alpha", "0.1", "--fdr", "0.1"], "alpha and fdr are two rules"),
        (["ablate", "--dataset", "folder", "--data-dir", "no", "--out", "x"], "/no (--data-dir)"),
        (["train", "--epochs", "0"], "epochs must be at least 1"),
        (["eval", "--ckpt", "/no/such/run"], "'/no/such/run' does not exist"),
        (["score", "--ckpt", "/no/such/run"], "'/no/such/run' does not exist"),
        (["train", "--likelihood", "no_such_module:family"], "no module 'no_such_module'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="epochs"):
        run("--debug", "train", "--epochs", "0")


FACTORIES = """
from torch import nn

class NoSize(nn.Module):
    pass

def nothing(image_size): pass

def number(image_size): return 3

def broken(image_size): raise KeyError("weights")

def misfit(image_size): return nn.Linear(7, 7)
"""


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("NoSize", r"must be a function from an image size .*failed when called with 16 \(TypeError: "),
        ("nothing", r"gave a NoneType: it must return an nn\.Module"),
        ("number", r"gave a int: it must return"),
        ("broken", r"failed when called .*KeyError: 'weights'"),
        ("misfit", r"the encoder \(Linear\) fails on images of shape \(2, 3, 16, 16\)"),
    ],
)
def test_unfit_encoder_of_the_users_own_is_named(factory, message, tmp_path, monkeypatch):
    (tmp_path / "unfit_encoders.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    result = run("train", "--encoder", f"unfit_encoders:{factory}")
    assert result.exit_code == 2
    assert re.search(message, result.stderr)
    assert factory == "misfit" or f"'unfit_encoders:{factory}'" in result.stderr


def test_ctrl_c_and_sigterm_are_one_line_and_exit_codes_130_and_143(trained_run, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("pyro_vje.representation.evaluation.evaluate", interrupted)
    result = run("eval", "--ckpt", trained_run)
    assert (result.exit_code, result.output) == (130, "stopped\n")
    before = signal.getsignal(signal.SIGTERM)
    terminate = lambda *_, **__: signal.raise_signal(signal.SIGTERM)  # noqa: E731
    monkeypatch.setattr("pyro_vje.representation.evaluation.evaluate", terminate)
    result = run("eval", "--ckpt", trained_run)
    assert (result.exit_code, result.output) == (143, "stopped\n")
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.setattr("pyro_vje.training.run.load_train_set", interrupted)
    result = run("train", "--out", tmp_path / "run")
    assert (result.exit_code, result.output) == (130, "stopped: nothing was written, the same command begins anew\n")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_a_destructor_stops_too(trained_run, monkeypatch, signum, code):
    """Python prints and drops what a destructor raises: Lightning's profiler has one."""

    class Slow:
        def __del__(self):
            signal.raise_signal(signum)

    def work(*_, **__):
        Slow()
        time.sleep(30)
        raise AssertionError("it was not stopped")

    monkeypatch.setattr("pyro_vje.representation.evaluation.evaluate", work)
    before = sys.unraisablehook
    with restored_handlers():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        result = run("eval", "--ckpt", trained_run)
    assert (result.exit_code, result.output) == (code, "stopped\n")
    assert sys.unraisablehook is before


def test_repeatable_flag_shows_and_takes_its_names():
    for command in ("train", "ablate"):
        told = run(command, "-h")
        assert "[default: shared-variance]" in " ".join(told.stdout.split()), told.output
    given = {
        (): (True,),
        ("--separate-variance",): (False,),
        ("--separate-variance", "--shared-variance"): (False, True),
    }
    for arguments, values in given.items():
        context = main.commands["ablate"].make_context("ablate", [*arguments, "--out", "x"])
        assert context.params["shared_variance"] == values


def test_warnings_of_health_wait_for_the_warm_up_and_are_not_repeated(image_folder, tmp_path, monkeypatch):
    ratios = iter([0.1] * 6 + [0.2, 9.0, 0.3, 0.4])  # of epochs 1 to 10: healthy in epoch 8 alone
    monkeypatch.setattr("pyro_vje.metrics.posterior_snr", lambda *_: next(ratios))
    where = ["--dataset", "folder", "--data-dir", image_folder, "--out", tmp_path / "run"]
    how = ["--epochs", 10, "--warmup-epochs", 6, "--knn-every", 1, *SMALL.split()]
    result = run("train", *where, *how)
    assert result.exit_code == 0, result.output
    said = [line.split(":")[0] for line in result.stderr.splitlines() if "mostly noise" in line]
    assert said == ["epoch 7", "epoch 9"]


@pytest.mark.parametrize("given", [[], ["--normal-class", "normal"]])
def test_hint_at_the_one_class_protocol(image_folder, tmp_path, given):
    where = ["--dataset", "folder", "--data-dir", image_folder, "--out", tmp_path / "run"]
    how = [*SMALL.replace("16 --pre", "8 --pre").split(), "--epochs", 1, *given]
    result = run("train", *where, *how)
    assert result.exit_code == 0, result.output
    assert ("training on all 3 classes; --normal-class normal" in result.stderr) == (not given)


def test_likelihood_of_the_users_own_file(image_folder, tmp_path, monkeypatch):
    (tmp_path / "mine_for_test.py").write_text(
        "import pyro.distributions as dist\n"
        "def family(loc, scale, settings):\n"
        "    return dist.Laplace(loc, scale).to_event(1)\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = ["--dataset", "folder", "--data-dir", image_folder, "--out", "run", *SMALL.split()]
    result = run("train", *arguments, "--epochs", 1, "--likelihood", "mine_for_test:family")
    assert result.exit_code == 0, result.output
    assert run("score", "--ckpt", "run").exit_code == 2  # the run folder alone may not import code
    result = run("score", "--ckpt", "run", "--trust-plugins")
    assert result.exit_code == 0, result.output


LIGHT = """
import sys
from pyro_vje.cli import main
for arguments, code in {calls}:
    try: main(arguments)
    except SystemExit as stop: assert stop.code == code, (arguments, stop.code)
heavy = {{"torch", "pyro", "lightning", "sklearn", "matplotlib", "numpy", "pandas"}} & set(sys.modules)
assert not heavy, heavy
"""


def call_lightly(calls, **environment):
    """Standard output and error of calls in a process of their own, which may not import anything heavy."""
    result = subprocess.run(
        [sys.executable, "-c", LIGHT.format(calls=calls)],
        capture_output=True,
        timeout=60,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr.decode()
    return result


def test_bad_arguments_are_refused_before_torch_is_loaded():
    bad = """train --dataset nope; train --dataset folder --data-dir /no/such/place; train --seed -1; train --resume
    ablate --epochs 0 --out x; eval --ckpt /no/such/run; score --ckpt . --alpha 2; train --lr 1 --lr 2"""
    calls = [(call.split(), 2) for call in bad.replace("\n", ";").split(";")]
    assert call_lightly(calls).stderr.count(b"Error: ") == len(calls)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_every_help_on_every_stream_with_nothing_heavy(encoding):
    calls = [([*words, "--help"], 0) for words in [(), *commands()]]
    out = call_lightly(calls, PYTHONIOENCODING=encoding).stdout.decode()
    assert out.count("Usage: ") == len(calls)
    assert ("\\u221aD" if encoding == "cp1252" else "√D") in out  # Click writes UTF-8 where ASCII is named


@pytest.mark.skipif(sys.platform == "win32", reason="counts the time of child processes as POSIX does")
def test_help_answers_in_half_a_second():
    import resource

    def seconds():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    began = seconds()
    subprocess.run([sys.executable, "-m", "pyro_vje.cli", "train", "--help"], capture_output=True, check=True)
    assert seconds() - began < 0.5


def test_every_setting_is_an_option_with_its_default():
    for words, settings in (("train", TrainConfig), ("score", ScoreConfig)):
        options = {option.name: option for option in main.commands[words].params}
        assert {name: options[name].default for name in fields_of(settings)} == {
            name: field.default for name, field in fields_of(settings).items()
        }
        assert all(options[name].help for name in fields_of(settings))
    ablate = {option.name: option.multiple for option in main.commands["ablate"].params}
    single = {"dataset", "data_dir", "download", "out", "recipe"}
    assert ablate == {name: name not in single for name in {*fields_of(TrainConfig), *single} - {"devices"}}


def test_any_setting_of_several_values_makes_a_grid(monkeypatch):
    called = []
    monkeypatch.setattr("pyro_vje.experiments.ablation.ablate", lambda *given: called.append(given) or 1 / 0)
    grid = "--lr 0.1 --lr 0.2 --epochs 3 --projector mlp --embedding-dim 8 --embedding-dim 16 --radius none"
    with pytest.raises(ZeroDivisionError):
        run("--debug", "ablate", "--out", "x", *grid.split(), "--separate-variance", "--shared-variance")
    ((base, axes, out),) = called
    assert (base.epochs, base.projector, base.lr, str(out)) == (3, "mlp", TrainConfig().lr, "x")
    assert {name: axes.pop(name) for name in ("lr", "embedding_dim", "radius", "shared_variance")} == {
        "lr": (0.1, 0.2),
        "embedding_dim": (8, 16),
        "radius": (None,),
        "shared_variance": (False, True),
    }
    assert axes == {name: (getattr(base, name),) for name in axes}
    assert set(axes) < set(ABLATION_AXES)


def test_resuming_takes_the_stored_settings_and_those_given(trained_run, tiny_config, monkeypatch):
    called = []
    monkeypatch.setattr("pyro_vje.training.run.train", lambda *given, **how: called.append((given, how)))
    resume = ("train", "--resume", "--out", trained_run)
    assert run(*resume).exit_code == run(*resume, "--epochs", 9, "--encoder", "tiny").exit_code == 0
    stored, more = (given[0] for given, _ in called)
    assert (stored.encoder, stored.epochs, more.epochs) == ("tiny", tiny_config.epochs, 9)
    assert all(how == {"resume": True, "overwrite": False} for _, how in called)
    assert all(getattr(stored, n) == getattr(more, n) for n in fields_of(TrainConfig) if n != "epochs")


def test_what_is_said_when_going_on_is_heeded_though_it_is_a_default(trained_run, tmp_path):
    run_copy = shutil.copytree(trained_run, tmp_path / "copy")
    told = run("train", "--resume", "--out", run_copy, "--hidden-dim", TrainConfig().hidden_dim)
    assert (told.exit_code, "was trained with hidden_dim" in told.stderr) == (2, True)
    assert run("train", "--resume", "--out", run_copy, "--views", 2, "--workers", 0).exit_code == 0


def test_an_unknown_score_is_known_before_torch_is_loaded(trained_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyro_vje.anomaly.table", None)
    assert "unknown score 'nosuch'" in run("score", "--ckpt", trained_run, "--score", "nosuch").stderr


def test_only_the_first_of_several_processes_prints_the_folder(monkeypatch):
    monkeypatch.setattr("pyro_vje.training.run.train", lambda *_, **__: "the/run")
    assert run("train", "--devices", 2).stdout == "the/run\n"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run("train", "--devices", 2).stdout == ""


def test_a_data_set_of_ones_own(image_folder, tmp_path, monkeypatch):
    (tmp_path / "own_photos.py").write_text(
        "from pyro_vje.data.datasets import DATASETS\nphotos = DATASETS['folder']\n"
    )
    monkeypatch.chdir(tmp_path)
    where = ("--dataset", "own_photos:photos", "--data-dir", image_folder, "--out", "run")
    result = run("train", *where, "--epochs", 1, *SMALL.split())
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["dataset"] == where[1]


@pytest.mark.parametrize(
    ("level", "rule", "sure"),
    [
        ("--alpha", r"(p-value \u2264 0.5)", "normal images are marked by mistake, here 9 if all 18 were"),
        ("--fdr", "(Benjamini-Hochberg at a false-discovery rate of 0.5)", "those are normal, on average"),
    ],
)
def test_decisions_are_counted(trained_run, tmp_path, level, rule, sure):
    arguments = ["score", "--ckpt", trained_run, level, "0.5", "--out", tmp_path / "s.csv"]
    result = CliRunner(charset="cp1252").invoke(main, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    assert re.search(rf"^\d+ of 18 called anomalies {re.escape(rule)}$", result.stdout, re.MULTILINE)
    assert re.search(rf"^how sure: .*\b50 % of {sure}", result.stdout, re.MULTILINE)


JARGON = r"\bnats?\b|\bkl\b|radius|posterior|likelihood|kl_weight|particles|batch norm|loss|epoch"


def test_inspect_speaks_of_images_and_the_rest_is_for_debug(image_folder, tmp_path, monkeypatch):
    """Its words are for one with a folder: what, how sure, what to do."""
    monkeypatch.setattr("pyro_vje.anomaly.inspection.TrainConfig", partial(TrainConfig, epochs=2))
    out = ["inspect", image_folder / "train", image_folder / "test", "--encoder", "tiny", "--image-size", 16]
    out += ["--alpha", 0.3]
    result = run(*out, "--out", tmp_path / "a")
    assert result.exit_code == 0, result.output
    for line in result.output.replace(str(tmp_path), "").splitlines():
        assert not re.search(JARGON, line, re.IGNORECASE), line
    for what in ("look strange", "how sure: ", "look at them: ", "all numbers: "):
        assert what in result.stdout
    told = run("--log-level", "debug", *out, "--out", tmp_path / "b").stderr
    for what in ("loss", "kl ", "likelihood", "particles"):
        assert what in told
