"""What people see of a preparation: bars, times and warnings on a terminal, the page, the contact sheet."""

import io
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from data_prep import report
from data_prep.audit import verify
from data_prep.config import PrepareConfig
from data_prep.encode import HISTOGRAMS
from data_prep.page import GAP, MARGIN, Shown, contact_sheet, html_report
from data_prep.preparation import prepare
from data_prep.schema import (
    REJECT_SCHEMA,
    REJECTS,
    CodecRecord,
    Counts,
    Manifest,
    read_manifest,
)
from data_prep.schema.proof import SIDE
from data_prep.shards import write_table
from models.codec_layouts import Normalisation
from models.command import duration, load_config
from pipeline.config import TrainConfig
from pipeline.runs.planning import prepared_data
from pipeline.runs.setup import fit_run
from tests import train_factory
from tests.prep_factory import config_of_pictures, pixels
from tests.shard_factory import Kind, make_manifest

HOSTILE = [
    "<script>alert(1)</script>",
    "</table></html><!--",
    "\"><img src=x onerror='x'>",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt; &amp",
    "https://example.com/a.js",
    "x" * 3000,
    "\u202eright to left \u0000 \ufffd",
]


@pytest.fixture(params=[True, False], ids=["terminal", "log"])
def screen(request, monkeypatch) -> io.StringIO:
    """What the console of reports writes, as on a terminal or into a file."""
    file = io.StringIO()
    terminal = request.param
    monkeypatch.setattr(
        report, "console", Console(file=file, force_terminal=terminal, width=100, soft_wrap=True)
    )
    monkeypatch.setattr(report, "LINE_EVERY_S", 0.0)
    return file


def test_a_bar_never_passes_its_total(screen):
    with report.Progress("encode", 1000, "pictures", 990) as progress:
        progress.update(995)
        progress.update(1012, rejected=3)
    counts = re.findall(r"([\d,]*\d)(?:/| of )([\d,]*\d)", screen.getvalue())
    numbers = [[int(n.replace(",", "")) for n in pair] for pair in counts]
    assert max(done for done, _ in numbers) == 1000


def test_what_goes_on_is_said(screen):
    with report.status("starting Ray"):
        pass
    assert "starting Ray" in screen.getvalue()


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.0, "0.0 s"), (59.0, "59.0 s"), (60.0, "1.0 min"), (359.0, "6.0 min"), (360.0, "0.1 h"), (4e6, "1,111.1 h")],
)  # fmt: skip
def test_hours_under_a_tenth_are_minutes(seconds, said):
    assert duration(seconds) == said


def page_of(manifest: Manifest, text: str) -> str:
    """A page on which every text from outside is this one."""
    commit = {"height": 64, "width": 32, "split": "train", "num_samples": 12_345, "bytes": 1 << 30}
    commit["histograms"] = {name: [0, 5, *[7] * (len(b) - 2)] for name, b in HISTOGRAMS.items()}
    shown = [Shown("64x32", text, 30.0, pixels(i, 128, 64), pixels(i + 9, 128, 64)) for i in (0, 1)]
    reject = {"reason": "undecodable", "source": text, "name": text, "detail": text}
    return html_report(manifest, [commit], shown, [reject])


class Reader(HTMLParser):
    """The tags of a page, its text, and what its attributes refer to."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.texts, self.links = list[str](), list[str](), list[str]()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_the_page_is_one_file_that_shows_any_text_as_text(text):
    manifest = make_manifest(Kind(), [("train", (64, 32), 12)], {"path": text})
    changes = {"classes": [text], "counts": Counts(seen=9, kept=5, rejected={text: 4})}
    plain, page = (
        Reader(page_of(manifest.model_copy(update=changes), each)) for each in ("plain", text)
    )
    assert page.tags == plain.tags
    assert "script" not in page.tags
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert sum(shown == text for shown in page.texts) >= 5 - text.count("\0") * 5


def test_the_page_has_bars_separators_and_what_was_cut():
    counts = Counts(
        seen=20_000,
        kept=12_345,
        rejected={"aspect": 7_655},
        cut_captions={"mini": 99},
        other_files={"heic": 1_234},
    )
    manifest = make_manifest(Kind(), [("train", (64, 32), 12)], {})
    page = page_of(manifest.model_copy(update={"counts": counts}), "x")
    assert all(number in page for number in ("20,000", "12,345", "7,655", "99 of 12,345", "1,234"))
    shares = [float(width) for width in re.findall(r"width: ([\d.]+)%\"></i>", page)]
    assert shares[:3] == [100.0, 61.7, 38.3]
    assert max(shares) == 100.0
    assert len(shares) == 3 + 1 + 1 + sum(len(bins) - 1 for bins in HISTOGRAMS.values())


def test_the_contact_sheet_has_gaps_buckets_and_captions_that_stay_in_their_cells():
    sizes = [(64, 64), (32, 64), (64, 32), (128, 128)] * 2
    pairs = [
        Shown(f"{h}x{w}", "a caption " * 50, 9.9, pixels(i, h, w) // 2, pixels(i, h, w) // 2)
        for i, (h, w) in enumerate(sizes)
    ]
    sheet = np.asarray(contact_sheet(pairs)).astype(int)
    width = 2 * SIDE + GAP + MARGIN
    gaps = [sheet[:, i * width : i * width + MARGIN - 1] for i in range(5)]
    assert all((gap > 250).all() for gap in gaps)
    middle = sheet[MARGIN : MARGIN + SIDE, MARGIN + SIDE : MARGIN + SIDE + GAP]
    assert (middle == 255).all()
    # The bucket's name and the caption are dark letters below a picture.
    below = sheet[MARGIN + SIDE : MARGIN + SIDE + 40, MARGIN : MARGIN + 2 * SIDE]
    assert (below.min(axis=(1, 2)) < 90).sum() > 15
    other = [Shown("1x1", *list(vars(pair).values())[1:]) for pair in pairs]
    assert (np.asarray(contact_sheet(other)) != sheet).any()


def doubt_of(means: list[float], stds: list[float], norm: Normalisation) -> str:
    record = {"class_name": "AutoencoderKL", "path": "", "weights_sha256": "", "dtype": "fp32"}
    record |= {"channels": len(means), "downscale": 8, "deterministic": False}
    return CodecRecord.model_validate(record | {"normalisation": norm}).doubt(means, stds)


@pytest.mark.parametrize("scale", [0.05, 0.3, 0.49, 0.51, 1.0, 1.99, 2.01, 40.0])
@pytest.mark.parametrize("channels", [1, 4, 16])
def test_normalised_latents_far_from_std_1_are_said(scale, channels):
    rng = np.random.default_rng(channels)
    raw = rng.normal(0, rng.uniform(0.8, 1.2, channels), (100_000, channels)) + rng.normal(0, 0.1)
    shift, std = raw.mean(axis=0), raw.std(axis=0)
    whole = (raw - shift.mean()).std() / scale
    norm = Normalisation(mean=(float(shift.mean()),) * channels, std=(float(whole),) * channels)
    doubt = doubt_of(shift.tolist(), std.tolist(), norm)
    assert bool(doubt) == (not 0.5 <= scale <= 2)
    if doubt:
        assert f"have a std of {scale:.3g}, " in doubt
        assert f"about {1 / (whole * scale):.4g} fits" in doubt


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_a_codec_that_does_not_fit_is_told_wherever_its_dataset_is_used(tmp_path, capsys, scale):
    codec = {"normalisation": {"mean": [0.0] * 4, "std": [scale] * 4}}
    path = train_factory.write_config(tmp_path, codec=codec)
    doubt = f"std of {1 / scale:g}, expected 0.5 to 2"
    write_table(tmp_path / "dataset" / REJECTS, REJECT_SCHEMA.empty_table())
    uses = {
        "prepare": lambda: report.print_result(
            tmp_path / "dataset", read_manifest(tmp_path / "dataset"), {}
        ),
        "verify": lambda: verify(tmp_path / "dataset"),
        "plan": lambda: print(*prepared_data(load_config(TrainConfig, path, [])).doubts),
        "train": lambda: fit_run(load_config(TrainConfig, path, [])),
    }
    for name, use in uses.items():
        use()
        shown = " ".join(capsys.readouterr().out.split())
        assert (doubt in shown) == (scale != 1), name
        assert shown.count("warning") == (scale != 1), name


@pytest.mark.parametrize(
    ("factor", "said"), [(0.7, False), (None, True), (0.0, True), ("none", True)]
)
def test_a_codec_without_a_scale_is_said_before_anything_is_made(
    tmp_path, vae_folder, text_folder, capsys, factor, said
):
    config = json.loads((vae_folder / "config.json").read_text()) | {"scaling_factor": factor}
    if factor == "none":
        del config["scaling_factor"]
    vae = shutil.copytree(vae_folder, tmp_path / "vae")
    (vae / "config.json").write_text(json.dumps(config))
    path = config_of_pictures(tmp_path, 2, vae, text_folder)
    prepare(load_config(PrepareConfig, path, []), dry_run=True)
    assert (f"{vae}/config.json has no scaling_factor" in capsys.readouterr().out) == said


@pytest.mark.parametrize(("count", "said"), [(0, True), (31, True), (32, False)])
def test_too_few_held_out_pictures_are_said(tmp_path, capsys, count, said):
    train_factory.write_config(tmp_path, heldout=[((32, 32), count)] * bool(count))
    write_table(tmp_path / "dataset" / REJECTS, REJECT_SCHEMA.empty_table())
    report.print_result(tmp_path / "dataset", read_manifest(tmp_path / "dataset"), {})
    assert (f"{count} pictures are held out, too few" in capsys.readouterr().out) == said


def test_latents_that_are_all_alike_are_said():
    assert "std of 0," in doubt_of([3.0], [0.0], Normalisation(mean=(0.0,), std=(1.0,)))
