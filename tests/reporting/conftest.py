"""What the tests of figures share."""

import pytest

from fairseq_hash.reporting import drawing


@pytest.fixture
def drawn(monkeypatch):
    """Figures instead of PNGs."""
    monkeypatch.setattr(drawing, "png", lambda figure: figure)


@pytest.fixture
def unrendered(monkeypatch):
    """Figures are made, but not rendered, which takes most of a report's time."""
    monkeypatch.setattr(drawing, "png", lambda figure: b"a picture")
