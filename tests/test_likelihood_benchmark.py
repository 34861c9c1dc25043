"""benchmarks/likelihood.py: gold replies' likelihood compared without any reply."""

import json

import pandas as pd
import pytest

from benchmarks import likelihood
from corpora import listener_turns
from options import Paths, UserError


@pytest.fixture
def table(workdir) -> pd.DataFrame:
    """Of each listener turn, twice as many nats as words."""
    examples = listener_turns(Paths(workdir).dialogues("test"))
    rows = [(*e.key, 2.0 * n, 0.1, n, 0, n, 0.0) for n, e in enumerate(examples, 3)]
    return pd.DataFrame(
        rows,
        columns=["conv_id", "utterance_idx", "nll", "nll_end", "tokens", "unknown", "words", "nll_class"],
    )


def test_systems_are_put_on_the_items_that_all_have_and_every_two_are_paired(
    table, workdir, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("intervals.FEWEST", 10)
    monkeypatch.setattr("intervals.FEWEST_DRAWN", 2)
    monkeypatch.setattr("intervals.LEAST_DRAWN", 2)
    for name, factor, rows in (("near", 0.99, table), ("far", 1.0, table[2:]), ("seed", 1.02, table[2:])):
        (tmp_path / name).mkdir()
        rows.assign(nll=factor * rows["nll"]).to_csv(tmp_path / name / "likelihood.csv", index=False)
    words = [str(tmp_path / "near"), f"both={tmp_path / 'far'},{tmp_path / 'seed' / 'likelihood.csv'}"]
    likelihood.main([*words, "--workdir", str(workdir), "--resamples", "200"])
    said = capsys.readouterr().out
    assert f"{len(table) - 2:,} gold replies, test split" in said
    found = json.loads((workdir / "results" / "benchmarks" / "likelihood.json").read_text())
    near, both = (found["systems"][name]["ppl_word"]["point"] for name in ("near", "both"))
    assert near == pytest.approx(2.718281828**1.98)
    assert both == pytest.approx((2.718281828**2 + 2.718281828**2.04) / 2)
    [test] = found["tests"]
    assert test["ppl_word"]["less"] == pytest.approx(near - both)
    # every item has the same nats a word: no resample of items moves it, the seeds alone do: with the
    # spread s of the two, s^2 (1 + 1 / 2)
    low, high = test["ppl_word"]["interval"]
    spread = 2.718281828**2 * (2.718281828**0.04 - 1) / 2**0.5
    assert high - low == pytest.approx(2 * 12.706 * spread * 1.5**0.5, rel=1e-3)
    assert test["ppl_word"]["p"] > 0.05
    with pytest.raises(UserError, match="--overwrite"):
        likelihood.main([*words, "--workdir", str(workdir)])


def test_what_cannot_be_compared_is_named(table, workdir, tmp_path, capsys):
    words = ["--workdir", str(workdir), "--overwrite"]
    with pytest.raises(UserError, match="likelihood.csv: no such file; it is written by --inference RUN"):
        likelihood.main([str(tmp_path), *words])
    with pytest.raises(UserError, match="likelihood_valid.csv: no such file"):
        likelihood.main([str(tmp_path), "--split", "valid", *words])
    for name, content, message in (
        ("empty", "", r"empty.csv: not as --inference RUN writes it \(No columns"),
        ("other", "a,b\n1,2\n", "other.csv: .*no column conv_id, utterance_idx, nll"),
        ("text", table.astype(object).assign(nll="much").to_csv(index=False), "text.csv: not as"),
        (
            "short",
            table.drop(columns="words").to_csv(index=False),
            "gold replies without nll, tokens or words",
        ),
    ):
        (tmp_path / f"{name}.csv").write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            likelihood.main([str(tmp_path / f"{name}.csv"), *words])
    with pytest.raises(SystemExit):
        likelihood.main([f"twice={tmp_path},{tmp_path}", *words])
    assert "stands twice, which is no second seed" in capsys.readouterr().err
    (tmp_path / "lr=1e-4").mkdir()
    assert likelihood.named(str(tmp_path / "lr=1e-4")) == ("lr=1e-4", [str(tmp_path / "lr=1e-4")])
    table[:7].to_csv(tmp_path / "few.csv", index=False)
    with pytest.raises(UserError, match=r"are 7 items of \d conversations; a test needs 200 of 30"):
        likelihood.main([f"few={tmp_path / 'few.csv'}", *words])
    with pytest.raises(SystemExit):
        likelihood.main(["a/plain", "b/plain", *words])
    assert "two systems named plain; name them: NAME=PLACE" in capsys.readouterr().err
