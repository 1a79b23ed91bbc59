import pytest

from pyro_vje.pages import pictures


@pytest.fixture(autouse=True)
def _coarse(monkeypatch):
    """A third of the resolution and no search for a layout: most of the time; training and scoring draw in full."""
    figure = pictures.Figure
    monkeypatch.setattr(
        pictures, "Figure", lambda **settings: figure(**settings | {"dpi": 40, "layout": None})
    )
