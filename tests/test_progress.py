"""How far long work is: one line in a terminal, a line a minute in a log, nothing where nobody listens."""

import io
import logging
import re
import sys
from collections import Counter

import pytest

from pyro_vje import cli, embed, evaluate, progress, score
from pyro_vje.progress import Progress, clear_line, duration

SMALL = "--encoder tiny --embedding-dim 8 --hidden-dim 16 --batch-size 16 --precision 32 --image-size 16"


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def screen(self):
        """What stands there: a carriage return goes back to the line's beginning, and what is written covers it."""
        lines = []
        for line in self.getvalue().split("\n"):
            shown = ""
            for part in line.split("\r"):
                shown = part + shown[len(part) :]
            lines.append(shown.rstrip())
        return lines


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_a_minute_where_nobody_looks(clock, caplog):
    caplog.set_level(logging.INFO, "pyro_vje")
    work = Progress("scoring", 1000)
    for clock[0] in range(30, 301, 30):
        work.add(100)
    assert caplog.messages == [
        f"scoring: {done} of 1000 images, {left}"
        for done, left in ((200, "4 min left"), (400, "3 min left"), (600, "2 min left"), (800, "60 s left"))
    ]


@pytest.mark.parametrize("columns", [80, 30])
def test_one_line_in_a_terminal_that_goes_away(clock, monkeypatch, columns):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", str(columns))
    log = logging.getLogger("pyro_vje")
    monkeypatch.setattr(log, "handlers", [cli.Lines(terminal)])
    log.setLevel(logging.INFO)
    work = Progress("looking at the images", 10)
    for clock[0] in range(1, 5):
        work.add(1)
    line = "looking at the images: 4 of 10 images, 6 s left"
    assert terminal.screen() == [line[: columns - 1]]
    log.info("a word")
    assert terminal.screen() == ["a word", ""]
    work.add(5)
    clear_line()
    assert terminal.screen() == ["a word", ""]
    assert all(len(part) < columns for part in re.split("[\r\n]", terminal.getvalue()))
    log.setLevel(logging.WARNING)
    clock[0] = 99
    Progress("more", 10).add(1)
    assert "more" not in terminal.getvalue()


def test_durations():
    assert [duration(x) for x in (0.2, 40, 89, 91, 5340, 7500)] == [
        *("1 s", "40 s", "89 s", "2 min", "89 min", "2 h 5 min")
    ]


def test_training_in_a_terminal_and_in_a_pipe(image_folder, tmp_path, monkeypatch):
    """One display: the same lines stay; in a terminal a line of loss, its parts and the time left comes and goes."""
    monkeypatch.setattr(progress, "REDRAWN", 0.0)
    where = ("--dataset", "folder", "--data-dir", image_folder, "--epochs", 2, *SMALL.split())
    pipe, terminal = io.StringIO(), Terminal()
    for stream in (pipe, terminal):
        monkeypatch.setattr(sys, "stderr", stream)
        arguments = ["train", *map(str, where), "--out", str(tmp_path / str(len(pipe.getvalue())))]
        cli.main(arguments, standalone_mode=False)
    loss = r"loss -?[\d.]+ \(direction -?[\d.]+, radius -?[\d.]+, kl [\d.]+\)"
    steps = [part for part in re.split("[\r\n]", terminal.getvalue()) if re.match(r"epoch.*step", part)]
    assert re.fullmatch(rf"epoch 1/2  step 1/\d  \d+ s left  {loss} *", steps[0])
    forms = [
        [re.sub(r"-?\d[\d.]*", "N", line) for line in lines]
        for lines in (terminal.screen(), pipe.getvalue().split("\n"))
    ]
    assert forms[0] == forms[1]
    assert re.search(rf"^epoch 1/2  {loss}  k-NN [\d.]+  \d+ s left$", pipe.getvalue(), re.MULTILINE)
    assert re.search(r"^tiny on 46 images of 16×16 pixels: 2 epochs of 2 steps, on ", pipe.getvalue(), re.MULTILINE)


def test_scoring_embedding_and_evaluation_say_how_far_they_are(image_folder, trained_run, tmp_path, monkeypatch):
    done = Counter()
    monkeypatch.setattr(Progress, "add", lambda self, count: done.update({self.what: count}))
    data = image_folder / "test"
    score(trained_run, data=data, out=tmp_path / "s.csv")
    assert done == {"scoring": 18}
    embed(trained_run, data, tmp_path / "e.npz")
    assert done == {"scoring": 18, "encoding": 18}
    evaluate(trained_run, out=tmp_path / "e.json", k=5)
    assert done == {"scoring": 18, "encoding": 18 + 2 * (48 + 18), "reading": 48 + 18}
