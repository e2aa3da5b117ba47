"""The arithmetic of pieces: whatever the cuts they were written in, what is read is the parameter's own elements."""

import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from models.config import InputError
from pipeline.training.pieces import Piece, Pieces, even_share, merged, overlaps

SIZE = 40


@st.composite
def cuts(draw) -> list[tuple[str, int, int]]:
    """A parameter of SIZE elements cut anywhere, each part in a file of its own, the files in any order."""
    edges = sorted({0, SIZE, *draw(st.lists(st.integers(1, SIZE - 1)))})
    files = draw(st.permutations(range(len(edges) - 1)))
    pairs = itertools.pairwise(edges)
    return [(f"f{n}", low, high - low) for n, (low, high) in zip(files, pairs, strict=True)]


@given(cuts(), st.integers(0, SIZE - 1), st.data())
def test_any_range_is_read_from_any_cuts_each_element_once_and_no_file_for_nothing(
    places, first, data
):
    count = data.draw(st.integers(1, SIZE - first))
    held = {file: range(begin, begin + size) for file, begin, size in places}
    runs = overlaps("raw/w", places, first, count)
    assert [e for file, low, high in runs for e in held[file][low:high]] == [
        *range(first, first + count)
    ]
    needed = [f for f, elements in held.items() if {*elements} & {*range(first, first + count)}]
    assert sorted(needed) == sorted(file for file, _, _ in runs)


@given(cuts(), st.data())
def test_an_element_that_no_file_holds_is_named(places, data):
    lost = data.draw(st.sampled_from(places))
    rest = [place for place in places if place != lost]
    with pytest.raises(InputError, match=f"w: no piece holds element {lost[1]}, expected 0 to 39"):
        overlaps("raw/w", rest, 0, SIZE)


@given(st.lists(st.integers(1, 30), min_size=1), st.integers(1, 9))
def test_equal_shares_hold_each_element_once_and_none_is_larger_by_more_than_one(sizes, ranks):
    whole = [Piece(str(i), 0, torch.empty(0), 0, size) for i, size in enumerate(sizes)]
    shares = [list(even_share(whole, rank, ranks)) for rank in range(ranks)]
    held = [(p.name, p.at + i) for share in shares for p in share for i in range(p.size)]
    assert held == [(str(i), element) for i, size in enumerate(sizes) for element in range(size)]
    assert all(p.start == p.at for share in shares for p in share)
    counts = [sum(p.size for p in share) for share in shares]
    assert max(counts) - min(counts) <= 1


def test_a_parameter_is_put_together_bit_for_bit_from_several_files(tmp_path):
    weight, indexes = torch.randn(3, 5), []
    for number, (first, count) in enumerate([(0, 7), (7, 2), (9, 6)]):
        part = weight.flatten()[first : first + count].clone()
        file = f"{number}.safetensors"
        save_file({"ema/w": part}, tmp_path / file)
        places = {"ema/w": [(file, first, count)]}
        indexes.append({"optimizer_step": 4, "shapes": {"w": [3, 5]}, "pieces": places})
    (tmp_path / "index.json").write_text(json.dumps(merged(indexes[::-1])))
    stored = Pieces(tmp_path)
    assert torch.equal(stored.whole("ema", "w"), weight)
    assert torch.equal(stored.read("ema/w", 6, 4), weight.flatten()[6:10])
    assert (stored.optimizer_step, stored.states) == (4, ["ema"])
    (tmp_path / "0.safetensors").unlink()
    stored = Pieces(tmp_path)
    assert torch.equal(stored.read("ema/w", 8, 7), weight.flatten()[8:])  # opens the other two only
    with pytest.raises(InputError, match=r"index.json: raw/w: no piece holds element 0"):
        stored.read("raw/w", 0, 15)
