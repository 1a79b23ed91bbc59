"""Commands that are killed with SIGKILL and called again must end as if nothing had happened.

This process imports everything once and computes nothing; each life of a command is a fork of it that runs the real
entry point, and reports over a pipe what it is about to do, so that a kill can be aimed at a moment and its place
told. The second process of a DDP run is launched by Lightning as ever.
"""

import csv
import importlib.util
import json
import os
import random
import select
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pyro_vje.anomaly import table as scoring
from pyro_vje.cli import main as command
from pyro_vje.data import splits
from pyro_vje.experiments import ablation, cells, protocols
from pyro_vje.pages import pictures
from pyro_vje.training import checkpoints
from pyro_vje.training import monitor as monitoring
from pyro_vje.training import run as training

PHASES = ("start-up", "step", "checkpoint", "evaluation", "final writes", "table")
EVENT = struct.Struct("ii")
TIMING = {"seconds", "images_per_second", "date"}
PATIENCE = 180.0  # seconds after which a life is called hung
EPOCHS, STEPS = 6, 20
QUICK_EPOCHS, QUICK_STEPS = 2, 10
SETTINGS = {
    "dataset": "folder",
    "encoder": "tests.soak.encoder:tiny",
    "embedding-dim": 8,
    "hidden-dim": 16,
    "batch-size": 8,
    "knn-every": 1,
    "precision": "32",
    "image-size": 16,
    "workers": 2,
    "residency": "stream",
}


# Lives ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Aim:
    """Where to be killed: ``delay`` seconds after a phase begins for the first time at a step not before ``step``.

    With ``events``, that many seconds after so many phases have begun, whatever they are.
    """

    phase: str
    step: int
    delay: float
    victim: str = "first"
    events: int = 0


class Life:
    """A fork of this process that runs a command, and kills itself where it is aimed at."""

    def __init__(self, arguments: Sequence[str], log: Path, aim: Aim | None = None) -> None:
        self.read, write = os.pipe()
        self.events = [("start-up", 0)]
        self.times = [time.monotonic()]
        self.second: list[int] = []
        self.log = log
        self.pid = os.fork()
        if self.pid == 0:
            code: Any = 99
            try:
                os.close(self.read)
                _live(arguments, log, write, aim)
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        os.close(write)

    def end(self) -> int:
        """Follow the process to its end, and return its exit status: -9 if it was killed."""
        while select.select([self.read], [], [], PATIENCE)[0]:
            data = os.read(self.read, EVENT.size)
            if not data:
                break
            number, value = EVENT.unpack(data)
            if number < 0:
                self.second.append(value)
                continue
            self.events.append((PHASES[number], value))
            self.times.append(time.monotonic())
        else:
            os.kill(self.pid, signal.SIGKILL)
            raise AssertionError(f"hung in {self.events[-1]}: {self.log.read_text()[-2000:]}")
        os.close(self.read)
        self.times.append(time.monotonic())
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def durations(self) -> dict[str, float]:
        """Median seconds of each phase, and ``all`` of them."""
        spans: dict[str, list[float]] = {}
        for (phase, _), start, end in zip(self.events, self.times[:-1], self.times[1:], strict=True):
            spans.setdefault(phase, []).append(end - start)
        medians = {phase: float(np.median(found)) for phase, found in spans.items()}
        return {**medians, "all": self.times[-1] - self.times[0]}

    def succeed(self) -> "Life":
        assert self.end() == 0, f"the command fails: {self.log.read_text()[-2000:]}"
        return self


def _second_process() -> list[int]:
    """The child of this process that runs the command too: the second of a DDP run."""
    found = [int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]
    return [pid for pid in found if b"pyro_vje.cli" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def _live(arguments: Sequence[str], log: Path, pipe: int, aim: Aim | None) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["pyro-vje", *arguments]
    # What Lightning launches as the second process: the command, not this file.
    sys.modules["__main__"].__spec__ = importlib.util.find_spec("pyro_vje.cli")
    state = {"step": 0, "aimed": 0, "events": 0}

    def kill(delay: float, victim: str) -> None:
        time.sleep(delay)
        second = _second_process()
        for pid in second:
            os.write(pipe, EVENT.pack(-1, pid))
            if victim != "first":
                os.kill(pid, signal.SIGKILL)
        if victim != "second" or not second:
            os.kill(os.getpid(), signal.SIGKILL)

    def take_aim(phase: str) -> None:
        # What is past the aim counts as well: a run whose steps are done still has its end.
        if aim is None or state["aimed"]:
            return
        state["events"] += 1
        past = (phase == aim.phase and state["step"] >= aim.step) or phase == "final writes"
        if state["events"] == aim.events if aim.events else past:
            state["aimed"] = 1
            threading.Thread(target=kill, args=(aim.delay, aim.victim), daemon=True).start()

    def tell(phase: str) -> None:
        os.write(pipe, EVENT.pack(PHASES.index(phase), state["step"]))
        take_aim(phase)

    take_aim("start-up")

    def announce(owner: Any, name: str, phase: str, after: str | None = None) -> None:
        original = getattr(owner, name)

        def wrapper(*arguments: Any, **options: Any) -> Any:
            if phase == "step":
                state["step"] = getattr(arguments[0], "global_step", 0)
            tell(phase)
            result = original(*arguments, **options)
            if after:
                tell(after)
            return result

        setattr(owner, name, wrapper)

    announce(training.Pretraining, "training_step", "step")
    announce(checkpoints.Checkpoints, "_save", "checkpoint", "step")
    announce(monitoring.EpochReport, "on_train_epoch_end", "evaluation", "step")
    announce(splits, "reference_images", "final writes")
    announce(ablation, "_measure", "evaluation")
    announce(protocols, "all_scores", "evaluation")
    announce(cells.Cells, "summarise", "table", "step")
    announce(scoring, "score_images", "evaluation", "table")
    announce(scoring.Rows, "add", "step")
    figure = pictures.Figure  # most of the time, and not compared
    pictures.Figure = lambda **settings: figure(**settings | {"dpi": 40, "layout": None})
    checkpoints.CHECKPOINT_SECONDS = 0.0  # after every step: each is a moment to be killed in
    torch.set_num_threads(1)  # steps of this size are no faster on two
    command(list(arguments))  # exits


# What is compared -----------------------------------------------------------------------------------------------------


def without_timing(path: Path) -> Any:
    """A CSV's rows or a JSON's values without what tells the time."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: strip(inner) for name, inner in value.items() if name not in TIMING}
        return [strip(inner) for inner in value] if isinstance(value, list) else value

    if path.suffix == ".json":
        return strip(json.loads(path.read_text()))
    with open(path, newline="") as file:
        return strip(list(csv.DictReader(file)))


def compare(whole: Path, killed: Path, names: Sequence[str]) -> None:
    for name in names:
        if name.endswith((".csv", ".json")):
            same = without_timing(whole / name) == without_timing(killed / name)
        else:
            same = (whole / name).read_bytes() == (killed / name).read_bytes()
        assert same, f"{name} differs from that of the run that was not killed: {whole} and {killed}"


def make_images(root: Path, steps: int) -> None:
    """Noise in three classes, which make so many steps: the numbers matter, not what they mean."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 14 * steps // 5), ("test", 8)):  # a twentieth of them is held out
        for i, kind in enumerate(("normal", "other", "third")):
            folder = root / split / kind
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.normal(80 + 40 * i, 40, (16, 16, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:03d}.png")


RUN_FILES = ("weights.safetensors", "metrics.csv", "calibration.safetensors", "reference.safetensors", "config.json")


# Training -------------------------------------------------------------------------------------------------------------


def train_arguments(images: Path, out: Path, **changes: Any) -> list[str]:
    settings = {**SETTINGS, "data-dir": images, "out": out, **changes}
    return ["train", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))]


def kill_training(
    work: Path, images: Path, kills: int, seed: int, *, epochs: int, steps: int, devices: int = 1
) -> dict[str, Any]:
    """A run that is killed ``kills`` times against one that is not."""
    whole, killed, log = (work / name for name in ("whole", "killed", "log.txt"))
    work.mkdir()
    how = {"epochs": epochs, "devices": devices}
    spans = Life(train_arguments(images, whole, **how), log).succeed().durations()
    total = epochs * steps
    draw = random.Random(seed)
    landed: Counter[str] = Counter()
    victims: Counter[str] = Counter()
    torn = loadable = faster = 0
    began = time.monotonic()
    final = max(1, kills // 15)
    for number in range(kills):
        # Spread over the run's steps; the last kills are left for the time after them.
        target = total * number // max(1, kills - final)
        at_end = target % steps >= steps - max(2, 2 * total // kills)
        kinds = ["start-up", "step", "step", "checkpoint", *["evaluation"] * (2 * at_end)]
        kind = draw.choice(kinds) if number < kills - final else "final writes"
        step = 0 if kind == "start-up" else target
        victim = draw.choice(["first", "second", "both"]) if devices > 1 else "first"
        aim = Aim(kind, step, draw.random() * spans[kind], victim)
        begun = (killed / "config.json").is_file()
        resume = ["train", "--resume", "--out", str(killed)]
        life = Life(resume if begun else train_arguments(images, killed, **how), log, aim)
        status = life.end()
        if status == 0:  # only the last writes are over so soon
            faster += 1
            continue
        assert status < 0 or devices > 1, f"fails by itself: {log.read_text()[-2000:]}"
        landed[life.events[-1][0]] += 1
        victims[victim if life.second else "first"] += 1
        for pid in life.second:  # whichever was killed, the other must not stay behind
            patience = time.monotonic() + 20
            while Path(f"/proc/{pid}").exists() and time.monotonic() < patience:
                time.sleep(0.05)
            assert not Path(f"/proc/{pid}").exists(), "the second process outlives the first"
        torn += len(list(killed.rglob(".*.tmp")))
        last = killed / "checkpoints" / "last.ckpt"
        if last.is_file():
            torch.load(last, map_location="cpu", weights_only=True)
            loadable += 1
    Life(["train", "--resume", "--out", str(killed)], log).succeed()
    compare(whole, killed, RUN_FILES)
    assert not list(killed.rglob(".*.tmp")), "temporary files stay behind"
    figures = {
        "kills": sum(landed.values()),
        "faster_than_the_kill": faster,
        "landed_in": dict(landed),
        "temporary_files_left_by_kills": torn,
        "checkpoint_loadable_after": loadable,
        "epochs": epochs,
        "steps": total,
        "identical": list(RUN_FILES),
        "seconds": round(time.monotonic() - began, 1),
    }
    return figures | ({"killed_process": dict(victims)} if devices > 1 else {})


# Other commands -------------------------------------------------------------------------------------------------------


def kill_command(
    work: Path, call: list[str], out: str, again: list[str], files: list[str], kills: int, seed: int
) -> dict[str, Any]:
    """Kill a command at moments spread over its time, call it again each time, and compare what it leaves."""
    whole, killed, log = (work / name for name in ("whole", "killed", "log.txt"))
    for folder in (whole, killed):
        folder.mkdir(parents=True)
    alone = Life([*call, str(whole / out)], log).succeed()
    draw = random.Random(seed)
    landed: Counter[str] = Counter()
    faster = 0
    for number in range(kills):
        # A share of all that there is to do, so that about as many calls as kills are needed; shortly after a phase
        # has begun, or well into it.
        count = draw.randint(1, max(1, 2 * (len(alone.events) - 1) // (kills + 1)))
        aim = Aim("", 0, draw.random() * (0.02 if number % 2 else 0.5), events=count)
        life = Life([*call, str(killed / out), *again], log, aim)
        if life.end() == 0:
            faster += 1
        else:
            landed[life.events[-1][0]] += 1
    Life([*call, str(killed / out), *again], log).succeed()
    compare(whole, killed, files)
    return {"kills": kills - faster, "landed_in": dict(landed), "faster_than_the_kill": faster, "identical": files}


def run(quick: bool, seed: int) -> dict[str, Any]:
    """All of it, or a few kills of a run and of the scoring of its images."""
    work = Path(tempfile.mkdtemp(prefix="soak-"))
    images = work / "images"
    epochs, steps = (QUICK_EPOCHS, QUICK_STEPS) if quick else (EPOCHS, STEPS)
    make_images(images, steps)
    figures: dict[str, Any] = {}
    score = ["score", "--ckpt", str(work / "train" / "whole"), "--trust-plugins", "--data", str(images)]
    score += ["--batch-size", "1"]
    settings = [f"--{name}={value}" for name, value in {**SETTINGS, "data-dir": images, "epochs": 2}.items()]
    grid = ["ablate", *settings, "--likelihood", "normal", "--likelihood", "laplace"]
    protocol = ["benchmark", "one-class", *settings, "--normal-class", "normal", "--normal-class", "other"]
    others = (
        ("score --resume", score, ["--resume"], "s.csv", ["s.csv"], 2 if quick else 10),
        ("ablate", grid, [], "", ["ablation.csv", "ablation.json"], 8),
        ("benchmark one-class", protocol, [], "", ["table.csv", "table.json", "table.md"], 8),
    )

    def report(name: str, found: dict[str, Any]) -> None:
        figures[name] = found
        places = ", ".join(f"{count} in {phase}" for phase, count in found["landed_in"].items())
        print(f"kills: {name}: {found['kills']} ({places}): identical", file=sys.stderr)

    how = {"epochs": epochs, "steps": steps}
    report("train", kill_training(work / "train", images, 4 if quick else 50, seed, **how))
    if not quick:
        report("train --devices 2", kill_training(work / "ddp", images, 12, seed, **how, devices=2))
    for name, call, again, out, files, kills in others[:1] if quick else others:
        report(name, kill_command(work / name, [*call, "--out"], out, again, files, kills, seed))
    shutil.rmtree(work)
    return figures
