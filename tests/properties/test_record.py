"""The record of the long run, and the machinery that writes it.

A record of other sources than today's is reported as a warning, not as a failure. Any edit to the
library makes it stale, and a failure would ask for a million examples after each; what guards a
change is the quick run of the same laws on the changed sources. What the record must never be is
incomplete: a law that it does not name, too few examples or a failure fail here.
"""

from __future__ import annotations

import json
import warnings

import pytest
import torch

pytest.importorskip("hypothesis")
import run_long
from hypothesis import strategies as st
from laws import Law

AGAIN = "run: python tests/properties/run_long.py -n <processes>"


@pytest.fixture(scope="module")
def record() -> dict:
    assert run_long.RECORD.exists(), f"no {run_long.RECORD.name}; {AGAIN}"
    return json.loads(run_long.RECORD.read_text())


@pytest.fixture
def threads() -> None:
    """run_long computes with one thread; what follows here shall not."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_million_examples_and_no_failure(record) -> None:
    counts = {name: entry["examples"] for name, entry in record["laws"].items()}
    assert record["examples"] == sum(counts.values()) >= 1_000_000, AGAIN
    assert record["failures"] == []
    assert all(entry["failures"] == 0 for entry in record["laws"].values())
    # Laws with little to choose from meet the same example again; most examples are new ones.
    assert all(0 < e["different"] <= e["examples"] for e in record["laws"].values())
    assert record["different"] >= 0.9 * record["examples"]


def test_every_law_is_in_the_record(record, threads) -> None:
    laws = run_long.laws()
    missing = set(laws) - set(record["laws"])
    assert not missing, f"{sorted(missing)} never ran at length; {AGAIN}"
    assert sum(record["laws"][name]["examples"] for name in laws) >= 1_000_000, AGAIN


def test_the_record_says_what_was_run(record) -> None:
    assert set(record["versions"]) == {"python", "torch", "hypothesis", "mixgrain"}
    assert record["wall_seconds"] > 0 and record["processes"] >= 1
    assert isinstance(record["seed"], int) and record["date"]
    if record["digest"] != run_long.digest():
        warnings.warn(
            f"the long run of {record['date']} was of other sources than these; {AGAIN}",
            stacklevel=1,
        )


def test_pieces_deal_out_all_examples() -> None:
    shares = {"a": 4.0, "b": 1.0, "c": 0.01}
    made = run_long.pieces(shares, 50_000, seed=3)
    counts = {law: sum(p.examples for p in made if p.law == law) for law in shares}
    assert sum(counts.values()) >= 50_000
    assert counts["a"] == pytest.approx(4 * counts["b"], rel=1e-3) and counts["c"] > 0
    assert len({p.seed for p in made}) == len(made) == len({(p.law, p.number) for p in made})
    assert made == run_long.pieces(shares, 50_000, seed=3)
    assert made != run_long.pieces(shares, 50_000, seed=4)
    assert max(p.examples for p in made) < 2 * run_long.PIECE


def start(monkeypatch, tmp_path, laws: dict[str, Law], *more: str) -> tuple[int, dict]:
    monkeypatch.setattr(run_long, "laws", lambda: laws)
    monkeypatch.setattr(run_long, "_laws", lambda: laws)
    record = tmp_path / "record.json"
    arguments = ["run_long", "-n", "1", "--record", str(record), *more]
    monkeypatch.setattr("sys.argv", [*arguments, "--progress", str(tmp_path / "progress.jsonl")])
    return run_long.main(), json.loads(record.read_text())


def test_a_run_counts_what_ran_and_goes_on_where_it_stopped(
    monkeypatch, tmp_path, threads, capsys
) -> None:
    ran: list[int] = []

    def body(n: int) -> None:
        ran.append(n)

    laws = {"x::many": Law(body, {"n": st.integers()}, 1.0),
            "x::few": Law(lambda b: None, {"b": st.booleans()}, 1.0)}  # fmt: skip
    status, record = start(monkeypatch, tmp_path, laws, "--examples", "3000")
    assert status == 0 and record["failures"] == []
    many, few = record["laws"]["x::many"], record["laws"]["x::few"]
    assert many["examples"] == len(ran) == 1500 and many["different"] > 1000
    # hypothesis stops when it has seen everything there is.
    assert few["different"] == 2 and few["examples"] < 1500
    assert record["examples"] == many["examples"] + few["examples"]
    again, same = start(monkeypatch, tmp_path, laws, "--examples", "3000")
    assert again == 0 and len(ran) == 1500 and same["laws"] == record["laws"]
    assert "0 pieces to go" in capsys.readouterr().out
    # Half a line, as a killed process leaves it, is done again.
    progress = tmp_path / "progress.jsonl"
    progress.write_text(progress.read_text()[:-30])
    start(monkeypatch, tmp_path, laws, "--examples", "3000")
    assert "1 pieces to go" in capsys.readouterr().out
    # Another seed is another run.
    start(monkeypatch, tmp_path, laws, "--examples", "3000", "--seed", "1")
    assert len(ran) >= 3000


def test_a_failure_is_recorded(monkeypatch, tmp_path, threads, capsys) -> None:
    def body(n: int) -> None:
        assert n < 100

    laws = {"x::fails": Law(body, {"n": st.integers(0)}, 1.0),
            "x::holds": Law(lambda n: None, {"n": st.integers()}, 1.0)}  # fmt: skip
    status, record = start(monkeypatch, tmp_path, laws, "--examples", "400")
    assert status == 1 and len(record["failures"]) == 1
    assert record["laws"]["x::fails"]["failures"] == 1
    assert record["laws"]["x::holds"]["failures"] == 0
    assert "n=100" in record["failures"][0]["error"]  # the smallest
    assert "FAILED x::fails" in capsys.readouterr().out
