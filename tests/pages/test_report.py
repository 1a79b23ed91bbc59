import base64
import hashlib
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pyro_vje.metrics import conformal_p_values, detection_metrics
from pyro_vje.pages import pictures, report
from pyro_vje.pages.report import MOST_FLAGGED, render_report

VOID = {"meta", "link", "img", "input", "br", "hr", "path", "use", "rect", "image"}
HOSTILE = [
    "a/<script>alert(1)<!--.png",
    "a/\"onerror='x'.png",
    "a/new\nline.png",
    "a/bytes\udcff\udc80.png",
    "a/" + "very_long_name_" * 15 + ".png",
    "a/{{ title }}{% for %}&lt;$x$.png",
]
FDR = "Benjamini-Hochberg: false-discovery rate at most the level"


class Page(HTMLParser):
    """The page as a reader meets it; fails where tags do not nest."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.ids, self.links, self.open, self.parts = [], [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.parts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            if name == "id":
                self.ids.append(value)
            elif name in ("src", "href", "xlink:href", "srcset", "action"):
                self.links.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "title", "script"):
            self.parts.append(data)


def rows(count=60, calibration=49, level=0.1, failed=(), **columns):
    """A table of ``count`` images with held-out scores behind it, every fourth image an anomaly."""
    rng = np.random.default_rng(0)
    is_anomaly = np.arange(count) % 4 == 1
    scores = rng.normal(size=count) + 3 * is_anomaly
    held_out = rng.normal(size=calibration) if calibration else None
    p_values = conformal_p_values(scores, held_out) if calibration and count else np.full(count, np.nan)
    decisions = np.where(p_values <= level, "anomaly", "normal") if calibration and level else [""] * count
    table = {
        "path": [f"photos/{i:04d}.png" for i in range(count)],
        "anomaly_score": scores,
        "p_value": p_values,
        "decision": decisions,
        "error": None,
        "is_anomaly": is_anomaly,
    }
    table |= columns
    table["path"] = pd.Series(table["path"], dtype=object)  # pandas' own strings hold no bytes that are no text
    table = pd.DataFrame(table)
    unread = pd.DataFrame(failed, columns=["path", "error"], dtype=object)
    return (pd.concat([table, unread], ignore_index=True) if len(failed) else table), held_out


def render(
    table, held_out, *, level=0.1, rule="p-value at most the level", asked=None, metrics=None, folds=1, folder=Path()
):
    """The page of a table; ``asked`` collects the rows whose images it shows."""

    def thumbnails(positions):
        asked.extend(positions) if asked is not None else None
        return [Image.new("RGB", (24, 16), (int(i) % 256, 0, 0)) for i in positions]

    summary = {
        "run": "runs/x",
        "data": "photos",
        "score": {"score": "conditional", "meaning": "minus the log-likelihood", "likelihood": "polar", "seed": 7},
        "decision": {"rule": rule, "level": level} if level and held_out is not None else None,
        "metrics": metrics,
        "calibration": {"folds": folds},
        "date": "2026-11-25",
        "versions": {"torch": "2.8"},
    }
    return render_report(table, summary, held_out, thumbnails, folder)


@pytest.fixture
def _no_charts(monkeypatch):
    """Most of a page's time, where a test does not look at them."""
    monkeypatch.setattr(report, "_charts", lambda *_: [])


def charts(html):
    return re.findall(r'aria-label="Chart: (.*?)"', html)


def test_a_plain_summary_then_the_numbers():
    table, held_out = rows(failed=[("b.txt", "not an image"), ("c.png", "truncated")])
    found = detection_metrics(table["anomaly_score"][:60].to_numpy(), np.arange(60) % 4 == 1)
    html = render(table, held_out, metrics=found)
    page = Page(html)
    flagged = table["decision"].eq("anomaly")
    right = int((flagged & table["is_anomaly"].eq(True)).sum())
    assert 0 < right < flagged.sum()
    assert page.text.startswith(
        f"Anomaly scores: photos {flagged.sum()} of 60 images look strange (limit: p-value at most 0.1). 2 files could"
    )
    assert (
        "a normal image is marked by mistake in at most 10 % of cases. Were all 60 normal, about 6 would" in page.text
    )
    assert "are like the 49 held-out ones" in page.text
    assert f"Of the {flagged.sum()} marked images, {right} are anomalies; {15 - right} anomal" in page.text
    tiles = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", html))
    assert tiles == {
        "Images scored": "60",
        "Look strange": str(flagged.sum()),
        "Could not be read": "2",
        "AUROC": f"{found['auroc']:.3f}",
    }
    low, high = found["auroc_95"]
    for text in (
        f"{low:.3f} to {high:.3f}",
        f"AUPR normal positive {found['aupr_normal_positive']:.3f}",
        "likelihood polar",
        "b.txt not an image",
        "versions torch 2.8",
        "It is void if",
    ):
        assert text in page.text
    assert page.text.index("How sure") < page.text.index("Strange images") < page.text.index("P-value")
    by_rate = Page(render(table, held_out, rule=FDR)).text
    assert "(limit: false-discovery rate at most 0.1)" in by_rate
    assert "on average at most 10 % are normal ones, marked by mistake" in by_rate
    folds = Page(render(table, held_out, folds=5)).text
    assert "in about 10 % of cases (certainly at most 35 %)" in folds  # 2 · 0.1 + 2 · 0.8 / (49 / 5 + 1)
    assert "near α, and of at most 2α + 0.15 whatever the model" in folds
    assert "on average about 10 %" in Page(render(table, held_out, rule=FDR, folds=5)).text


def test_charts_and_grids():
    asked = []
    table, held_out = rows()
    html = render(table, held_out, asked=asked)
    assert charts(html) == ["Scores", "P-values", "ROC curve"]
    order = np.argsort(-table["anomaly_score"].to_numpy())
    flagged = int(table["decision"].eq("anomaly").sum())
    assert flagged > report.SHOWN
    assert asked == [*order[:flagged], *order[::-1][:12]]
    names = re.findall(r'<bdi title="(\d+\.png)"', html)
    assert names == [f"{i:04d}.png" for i in asked]
    assert html.count('class="flagged"') == flagged
    assert f"All {flagged} that are marked." in Page(html).text
    ranks = re.findall(r'data-rank="(\d+)" data-name="(.*?)"', html)
    assert [int(rank) for rank, _ in ranks] == [*range(1, flagged + 1), *range(1, 13)]
    few, held_out = rows(calibration=report.LEAST_CALIBRATION - 1)
    assert "P-values" not in charts(render(few, held_out))


@pytest.mark.usefixtures("_no_charts")
def test_flagged_images_come_first_whatever_their_scores():
    """With folds a p-value is no function of the score."""
    decisions = np.where(np.arange(60) % 3 == 0, "anomaly", "normal")
    table, held_out = rows(decision=decisions)
    asked = []
    html = render(table, held_out, asked=asked, folds=5)
    assert html.count('class="flagged"') == 20
    assert set(asked[:20]) == set(range(0, 60, 3))
    assert (np.diff(table["anomaly_score"].to_numpy()[asked[:20]]) <= 0).all()
    assert "All 20 that are marked." in Page(html).text


def test_no_limit_is_drawn_where_scores_are_none():
    table, held_out = rows()
    assert "Flagged from" in render(table, held_out)
    table.loc[table["anomaly_score"].idxmax(), "decision"] = "normal"
    assert "Flagged from" not in render(table, held_out, folds=5)


def test_every_flagged_image_is_shown_up_to_a_bound_and_100_000_make_a_small_page():
    failed = [(f"bad/{i}.png", "truncated") for i in range(50_000)]
    table, held_out = rows(100_000, calibration=999, failed=failed)
    asked = []
    html = render(table, held_out, asked=asked)
    page = Page(html)
    flagged = table["decision"].eq("anomaly").sum()
    assert len(asked) == MOST_FLAGGED + report.SHOWN < flagged
    assert f"The {MOST_FLAGGED} strangest of {flagged:,} marked images" in page.text
    assert len(html) < 1_500_000
    assert "Images scored 100,000" in page.text
    assert "49,900 more." in page.text
    assert "bad/99.png" in page.text
    assert "bad/100.png" not in page.text


@pytest.mark.usefixtures("_no_charts")
def test_links_lead_to_the_files(tmp_path):
    names = ["a b#c?.png", "100%.png", "javascript:alert(1).png", os.fsdecode(b"bytes\xff.png"), "gone.png"]
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in names[:-1]:
        (folder / name).touch()
    table, held_out = rows(5, path=[str(folder / name) for name in names], anomaly_score=[5.0, 4, 3, 2, 1])
    for where in (tmp_path / "out" / "deep", tmp_path):
        page = Page(render(table, held_out, folder=where))
        links = [link for link in page.links if not link.startswith(("data:", "#"))]
        assert len(links) == 4
        for link, name in zip(sorted(links), sorted(names[:-1], key=os.fsencode), strict=True):
            assert not re.search(r"[ ?#:]", link)
            target = os.path.join(os.fsencode(where), unquote_to_bytes(link))
            assert os.path.normpath(target) == os.fsencode(folder / name)


def test_nothing_is_loaded_and_ids_are_unique():
    html = render(*rows(failed=[("a", "b")]))
    page = Page(html)
    assert "http" not in html.replace("http-equiv", "")
    assert "url(" not in re.sub(r"url\(#", "", html)
    assert "@import" not in html
    assert not {"iframe", "object", "form"} & set(page.tags)
    # One script, the one that the page's policy names.
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in html
    assert page.links
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert len(page.ids) == len(set(page.ids))
    # Every reference inside a chart meets what it refers to.
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert set(re.findall(r"url\(#(.*?)\)", html)) <= set(page.ids)


@pytest.mark.usefixtures("_no_charts")
def test_hostile_names(tmp_path):
    count = len(HOSTILE)
    ordinary = Page(render(*rows(count, failed=[("x", "y")] * count)))
    html = render(*rows(count, failed=[(name, f"{name} <b>?</b>") for name in HOSTILE], path=HOSTILE))
    page = Page(html)
    assert page.tags == ordinary.tags
    (tmp_path / "report.html").write_text(html, encoding="utf-8")
    assert r"bytes\udcff\udc80.png" in page.text
    for name in (HOSTILE[0], HOSTILE[1], HOSTILE[5], HOSTILE[4]):
        assert name in page.text


@pytest.mark.parametrize(("count", "known"), [(0, True), (0, False), (1, True), (1, False), (2, True), (5, False)])
def test_few_images(count, known):
    asked = []
    table, held_out = rows(count, calibration=49 if known else 0, failed=[("a", "broken")])
    html = render(table if known else table.assign(is_anomaly=np.nan), held_out, asked=asked)
    page = Page(html)
    assert sorted(asked) == list(range(count))
    assert ("ROC curve" in charts(html)) == (known and count > 1)
    assert ("P-values" in charts(html)) == (known and count > 0)
    assert "1 file could not be read" in page.text
    if not known:
        assert f"{count} image{'' if count == 1 else 's'}, ordered from the strangest" in page.text
        assert "that cannot be said" in page.text
        assert "exchangeable" not in page.text


def test_unlabelled_images_are_left_out_of_what_labels_say():
    labels = [True, False, None] * 20
    table, held_out = rows(is_anomaly=pd.array(labels, dtype="boolean"))
    html = render(table, held_out)
    assert "20 images are anomalies and 20 normal" in Page(html).text
    assert "ROC curve" in charts(html)
    assert "unlabelled (20)" in html
    assert "label: unlabelled" in html


def test_equal_scores():
    for value in (-1234.5, 1e20, float("nan"), float("inf")):
        table, held_out = rows(30, anomaly_score=value)
        page = Page(render(table, held_out))
        assert ("All scores are equal" in page.text) == np.isfinite(value)
        assert ("30 images have no score" in page.text) == np.isnan(value)


def test_scores_and_parts_that_are_not_finite():
    table, held_out = rows(p_value=np.nan, decision="normal")
    table.loc[:3, "anomaly_score"] = np.nan, np.inf, -np.inf, 1e30
    html = render(table, held_out)
    page = Page(html)
    assert charts(html) == ["Scores", "ROC curve"]
    assert "1 image has no score" in page.text
    assert "photos/0000.png its score is not a number" in page.text
    assert re.findall(r"score (\S+)", page.text.split("Strangest images")[1])[:2] == ["∞", "1e+30"]
    assert "score −∞" in page.text
    assert "0 of 60 images look strange" in page.text


@pytest.mark.usefixtures("_no_charts")
def test_a_level_that_nothing_can_reach():
    html = render(*rows(level=0.001), level=0.001)
    assert "Nothing can be marked at this limit" in html
    assert "at least 999 images held out" in html
    assert "Nothing can be marked" not in render(*rows())


def test_a_chart_that_fails_is_left_out(monkeypatch, caplog):
    monkeypatch.setattr(pictures, "draw_scores", lambda *_: 1 / 0)
    assert charts(render(*rows())) == ["P-values", "ROC curve"]
    assert "could not draw the report's chart 'Scores': division by zero" in caplog.text


def test_large_images_are_made_small():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (2000, 3000), dtype=np.uint8))
    assert report._data_uri(noise).startswith("data:image/jpeg")
    assert len(report._data_uri(noise)) < 100_000
