"""Every command and every piece of Python that the README and the site show is run."""

import sys
from functools import partial
from pathlib import Path

import documented
import numpy as np
import pytest
from tiny import draw_image, tiny_encoder

from pyro_vje import TrainConfig
from pyro_vje.anomaly import inspection
from pyro_vje.model import encoders

ROOT = Path(__file__).parents[1]
PAGES = [
    page
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md")
    for page in sorted(ROOT.glob(pattern))
    if "```console\n" in page.read_text() or "```python\n" in page.read_text()
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty place of a user's, but for two folders of photographs; the default encoder is a tiny one."""
    rng = np.random.default_rng(0)
    for name, count in (("photos", 60), ("new_photos", 12)):
        (tmp_path / name).mkdir()
        for i in range(count):
            draw_image("stripes" if i == 5 and name != "photos" else "normal", rng).save(
                tmp_path / name / f"{i:02d}.png"
            )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(encoders.ENCODERS, "resnet-small", tiny_encoder)
    # As where no pretrained weights are installed, which would take minutes.
    monkeypatch.setattr(inspection, "packaged_weights", lambda name: None)
    monkeypatch.setattr(inspection, "TrainConfig", partial(TrainConfig, epochs=1))
    yield tmp_path
    for name in {path.stem for path in tmp_path.glob("*.py")}:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page(page, folder):
    documented.run_page(page)


def test_pages_are_found():
    assert {"README.md", "CONTRIBUTING.md", "study.md"} <= {page.name for page in PAGES}


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("epoch 2/3  loss 1.5", "epoch 10/30  loss -0.25\n", True),
        ("epoch 2/3  loss 1.5", "epoch 10/30  los -0.25\n", False),
        ("a\n...\nb", "a\nb\n", True),
        ("a\n...\nb", "a\nx\ny\nb\n", True),
        ("a\n...\nb", "a\nx\n", False),
        ("a", "a\nb\n", False),
        ("in 3.2 s: runs/mine", "in 11 s: runs/mine", True),
        ("epoch 2", "epoch two", False),
    ],
)
def test_form_of_output(shown, printed, same):
    assert documented.has_form(shown, printed) is same


@pytest.mark.parametrize(
    "block",
    [
        "$ pyro-vje train --no-such-option 1\n",
        "$ pyro-vje train --epochs many\n",
        "$ pyro-vje train --dataset cifar1000\n",
        "$ pyro-vje traine\n",
        "$ make no-such-target\n",
        '$ S="pyro-vje train"\n$ $S --epoch-count 3\n',
    ],
)
def test_wrong_commands_are_found(block):
    with pytest.raises(AssertionError):
        documented.parse_block(block, "page:1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```console\n$ false\n```\n", "ends with 1"),
        ("```console\n$ echo one\ntwo\n```\n", "another form"),
        ("```python\nraise AssertionError('in python')\n```\n", "in python"),
    ],
)
def test_wrong_blocks_are_found(text, message, folder):
    page = folder / "page.md"
    page.write_text(text)
    with pytest.raises(AssertionError, match=message):
        documented.run_page(page)
