"""explain: numbers that agree with the layout, and words that say what to do."""

import pytest
import torch
from attention_cases import PATTERNS

import mixgrain as mg
from mixgrain import patterns as P


@pytest.mark.parametrize("name", PATTERNS)
def test_parts_add_up_to_the_pattern(name) -> None:
    pattern = PATTERNS[name](300, 400)
    found = mg.explain(pattern, 300, 400)
    assert found.kept == pattern.nnz(300, 400) == sum(part.kept for part in found.parts)
    assert found.computed >= found.kept
    assert found.density == pytest.approx(pattern.density(300, 400))
    assert repr(pattern) in str(found) and "predicted" in str(found)


def test_a_narrow_window_beats_dense_and_a_wide_one_does_not() -> None:
    narrow = mg.explain(P.window(128), 8192, 8192)
    assert not narrow.dense_is_cheaper and "times faster than dense" in str(narrow)
    assert narrow.dense_seconds / narrow.seconds > 4
    wide = mg.explain(P.window(1700), 2048, 2048)
    assert wide.dense_is_cheaper and "costs no more" in str(wide)


def test_scattered_global_tokens_become_panels() -> None:
    pattern = P.longformer(128, torch.arange(0, 4096, 64))
    names = [part.name for part in mg.explain(pattern, 4096, 4096).parts]
    assert "panels" in names and "blocks of 64" in names


def test_heads_nm_and_layouts() -> None:
    heads = mg.explain(P.per_head([P.window(4), P.causal()]), 100, 100)
    assert heads.lead == (1, 2) and "2 heads" in str(heads)
    for kept in (P.nm(2, 4), P.nm(2, 4) & P.window(8)):
        found = mg.explain(kept, 128, 128)
        assert found.kept == kept.nnz(128, 128) and "N:M" in str(found)
    row = P.window(3).to_layout("row", 64, 64)
    assert mg.explain(row, 64, 64).parts[0].name == "single entries"
    with pytest.raises(mg.LayoutError, match="own shape"):
        mg.explain(row, 64, 65)
