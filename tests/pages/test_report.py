import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from pyro_vje.metrics.conformal import conformal_p_values
from pyro_vje.pages.report import MOST_ROWS, ReportData, render_report

VOID = {"meta", "link", "img", "br", "hr", "path", "use", "rect", "image"}
HOSTILE = [
    "a/<script>alert(1)<!--.png",
    "a/\"onerror='x'.png",
    "a/new\nline.png",
    "a/bytes\udcff\udc80.png",
    "a/" + "very_long_name_" * 40 + ".png",
    "a/{{ data.made }}{% for %}&lt;$x$.png",
]


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
        if not self.open or self.open[-1] not in ("style", "title"):
            self.parts.append(data)


def make(count=60, *, labels=True, calibration=49, alpha=0.1, asked=None, **changes):
    """A report of ``count`` images, everything known unless a test says otherwise."""
    rng = np.random.default_rng(0)
    is_anomaly = np.arange(count) % 4 == 1
    scores = rng.normal(size=count) + 3 * is_anomaly
    held_out = rng.normal(size=calibration) if calibration else None
    p_values = conformal_p_values(scores, held_out) if calibration else None

    def thumbnails(indices):
        if asked is not None:
            asked.extend(indices)
        return [Image.new("RGB", (24, 16), (int(i) % 256, 0, 0)) for i in indices]

    fields = {
        "title": "Strange photos",
        "score_name": "conditional",
        "score_meaning": "minus the log-likelihood",
        "made": {"Likelihood": "polar-student-t", "Seed": 7},
        "paths": [f"photos/{i:04d}.png" for i in range(count)],
        "scores": scores,
        "thumbnails": thumbnails,
        "p_values": p_values,
        "calibration_scores": held_out,
        "is_anomaly": is_anomaly if labels else None,
        "log_direction": rng.normal(size=count),
        "log_radius": rng.normal(size=count),
        "alpha": alpha if calibration else None,
        "decisions": p_values <= alpha if calibration and alpha else None,
        "decided_by": "p ≤ 0.1",
        "metrics": {"AUROC": (0.9123, 0.8, 0.95), "AUPR, normal images positive": 0.25} if labels else None,
    }
    return ReportData(**(fields | changes))


def charts(html):
    return re.findall(r'aria-label="Chart: (.*?)"', html)


def test_summary_tells_the_numbers():
    data = make(failed=[("b.txt", "not an image"), ("c.png", "truncated")])
    html = render_report(data)
    page = Page(html)
    flagged = int(data.decisions.sum())
    found = int((data.decisions & data.is_anomaly).sum())
    assert 0 < found < flagged
    assert f"{flagged} images of 60 are flagged as strange at the level α = 0.1 (p ≤ 0.1)." in page.text
    assert "2 more images could not be read" in page.text
    assert "those of 49 held-out normal images, so no p-value can be below 0.02." in page.text
    assert f"Of the {flagged} flagged images, {found} are anomalies and {flagged - found} normal" in page.text
    assert f"{15 - found} anomal" in page.text
    tiles = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", html))
    assert tiles == {
        "Images scored": "60",
        "Flagged at α&nbsp;=&nbsp;0.1": str(flagged),
        "Could not be read": "2",
        "Held-out normal images": "49",
        "Smallest possible p-value": "0.02",
        "AUROC": "0.912",
    }
    for text in (
        "0.800 to 0.950",
        "AUPR, normal images positive 0.250",
        "polar-student-t",
        "b.txt not an image",
    ):
        assert text in page.text
    assert "expected to have p ≤ 0.1" in page.text
    assert "It is void if" in page.text


def test_all_charts_and_grids():
    asked = []
    data = make(asked=asked)
    html = render_report(data)
    assert charts(html) == ["Scores", "P-values", "Direction and radius", "ROC curve", "Precision and recall"]
    order = np.argsort(data.scores)
    assert asked == [*order[::-1][:12], *order[:12]]
    names = re.findall(r'<bdi title="(\d+\.png)"', html)
    assert names == [f"{i:04d}.png" for i in asked]
    assert html.count("data:image/png;base64,") >= 24
    assert html.count('class="flagged"') == data.decisions[asked].sum()


def test_nothing_is_loaded_and_ids_are_unique():
    html = render_report(make(failed=[("a", "b")]))
    page = Page(html)
    assert "http" not in html.replace("http-equiv", "")
    assert "url(" not in re.sub(r"url\(#", "", html)
    assert "@import" not in html
    assert not {"script", "iframe", "object", "form"} & set(page.tags)
    assert page.links
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert len(page.ids) == len(set(page.ids))
    # Every reference inside a chart meets what it refers to.
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert set(re.findall(r"url\(#(.*?)\)", html)) <= set(page.ids)


def test_hostile_names(tmp_path):
    data = make(len(HOSTILE), paths=HOSTILE, failed=[(name, f"{name} <b>?</b>") for name in HOSTILE])
    ordinary = Page(render_report(make(len(HOSTILE), failed=[("x", "y")] * len(HOSTILE))))
    html = render_report(data)
    page = Page(html)
    assert page.tags == ordinary.tags
    (tmp_path / "report.html").write_text(html, encoding="utf-8")
    assert r"bytes\udcff\udc80.png" in page.text
    for name in (HOSTILE[0], HOSTILE[1], HOSTILE[5], HOSTILE[4]):
        assert name in page.text


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("calibration", [49, 0])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_images(labels, calibration, count):
    asked = []
    html = render_report(make(count, labels=labels, calibration=calibration, asked=asked))
    page = Page(html)
    assert sorted(asked) == list(range(count))
    assert ("ROC curve" in charts(html)) == (labels and count > 1)
    assert ("P-values" in charts(html)) == bool(calibration)
    assert ("Against the labels" in page.text) == labels
    if not calibration:
        assert f"{count} image{'s are' if count > 1 else ' is'} ranked" in page.text
        assert "There are no p-values" in page.text
        assert "exchangeable" not in page.text


def test_no_image_scored():
    asked = []
    page = Page(render_report(make(0, calibration=0, asked=asked, failed=[("a", "broken")])))
    assert not asked
    assert "0 images are ranked" in page.text
    assert "1 more image could not be read" in page.text


@pytest.mark.parametrize("value", [0.0, -1234.5, 1e20, float("nan"), float("inf")])
def test_equal_scores(value):
    scores = np.full(30, value)
    page = Page(render_report(make(30, scores=scores)))
    assert ("All scores are equal" in page.text) == (not np.isnan(value))
    assert ("30 images have no score" in page.text) == np.isnan(value)


def test_scores_and_parts_that_are_not_finite():
    data = make(p_values=np.full(60, np.nan), decisions=np.zeros(60, dtype=bool))
    data.scores[:4] = np.nan, np.inf, -np.inf, 1e30
    data.log_direction[:] = np.nan
    html = render_report(data)
    page = Page(html)
    assert charts(html) == ["Scores", "ROC curve", "Precision and recall"]
    assert "1 image has no score" in page.text
    assert "photos/0000.png its score is not a number" in page.text
    assert re.findall(r"score (\S+)", page.text.split("Strangest images")[1])[:2] == ["∞", "1e+30"]
    assert "score −∞" in page.text
    assert "0 images of 60 are flagged" in page.text


def test_a_level_that_nothing_can_reach():
    html = render_report(make(alpha=0.001))
    assert "nothing can be flagged at this level" in html
    assert "at least 999 held-out images" in html
    assert "nothing can be flagged" not in render_report(make())


def test_100_000_images_make_a_small_page():
    failed = [(f"bad/{i}.png", "truncated") for i in range(50_000)]
    html = render_report(make(100_000, calibration=999, failed=failed))
    page = Page(html)
    assert len(html) < 1_500_000
    assert "Images scored 100,000" in page.text
    assert "Could not be read 50,000" in page.text
    assert f"{50_000 - MOST_ROWS:,} more." in page.text
    assert "bad/99.png" in page.text
    assert "bad/100.png" not in page.text


def test_large_images_are_made_small():
    noise = np.random.default_rng(0).integers(0, 256, (2000, 3000), dtype=np.uint8)
    html = render_report(make(2, thumbnails=lambda indices: [Image.fromarray(noise)] * len(indices)))
    assert html.count("data:image/jpeg") == 2
    assert len(html) < 400_000


def test_bad_input():
    with pytest.raises(ValueError, match=r"decisions has shape \(3,\), but there are 60 paths"):
        make(decisions=np.zeros(3, dtype=bool))
    with pytest.raises(ValueError, match="alpha and decisions come together"):
        make(alpha=None, decisions=np.zeros(60, dtype=bool))
    with pytest.raises(ValueError, match="shorter"):
        render_report(make(thumbnails=lambda indices: []))
