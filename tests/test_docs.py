"""The pages under docs/ say what the code does."""

import json
import re
from pathlib import Path

from conftest import ROOT, logged

import evaluate_responses
import train_glove_t5
from options import CRITICS, DIMENSIONS, Paths


def glossary(*files: str) -> set[str]:
    """The keys of these files that docs/glossary.md explains: what stands in backticks in the first column of
    their tables."""
    page = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    parts = dict(part.split("\n", 1) for part in page.split("\n## ")[1:])
    firsts = [
        cell for file in files for cell in re.findall(r"^\| ([^|]*)\|", parts[file], flags=re.MULTILINE)
    ]
    return {key for cell in firsts for key in re.findall(r"`([^`]+)`", cell)}


def keys_of(content: dict) -> set[str]:
    """All keys of a JSON object, those of the objects in it included."""
    keys = set(content)
    for value in content.values():
        if isinstance(value, dict):
            keys |= keys_of(value)
    return keys


def logged_keys(run: Path) -> set[str]:
    """Every key in a run's metrics.jsonl and result.json."""
    keys = keys_of(json.loads((run / "result.json").read_text(encoding="utf-8")))
    for row in logged(run):
        keys |= keys_of(row)
    return keys


def test_every_key_that_critics_and_the_retriever_log_is_in_the_glossary(trained):
    runs = [file.parent for file in (trained / "saved").rglob("result.json")]
    assert len(runs) == 2 * len(CRITICS) + 1  # two families of critics and the retriever
    for run in runs:
        assert logged_keys(run) <= glossary("metrics.jsonl", "result.json"), run


def test_every_key_of_a_generator_and_of_its_table_is_in_the_glossary(trained_copy):
    common = ["--workdir", str(trained_copy), "--device", "cpu"]
    lengths = "--src-len 40 --tgt-len 12 --exemplar-len 16 --max-new-tokens 5"
    short = f"--size tiny --max-steps 2 --batch-size 4 --log-every 1 --log-gradients {lengths}"
    train_glove_t5.main([*common, *short.split()])
    run = Paths(trained_copy).saved / "glove-t5" / "lempex"
    assert logged_keys(run) <= glossary("metrics.jsonl", "result.json")

    evaluate_responses.main([*common, str(run), "--family", "glove-t5"])
    table = json.loads((Paths(trained_copy).results / "evaluation" / "metrics.json").read_text())
    names = {*table["systems"], *table["floors"]}  # rows are named by their runs, not by keys
    judges = table.pop("judges")  # and judges by theirs
    assert all(set(judge) <= set(DIMENSIONS) for judge in judges.values()), judges
    assert (keys_of(table) | {"judges"}) - names <= glossary("results/NAME/metrics.json")


def test_the_modules_know_each_other_as_contributing_says():
    """No script is imported by a module, none imports itself over others, and what is beneath the rooms of
    the paper's nouns knows none of them."""
    files = {file.stem: file for file in ROOT.glob("*.py")} | {
        f"DPR.{file.stem}": file for file in (ROOT / "DPR").glob("*.py")
    }
    known = {}
    for name, file in files.items():
        text = file.read_text(encoding="utf-8")
        first = re.findall(r"^(?:import ([\w.]+)|from ([\w.]+) import \(?([\w, ]+))", text, flags=re.M)
        named = {plain or origin for plain, origin, _ in first}
        named |= {
            f"DPR.{what}" for _, origin, names in first if origin == "DPR" for what in names.split(", ")
        }
        known[name] = named & files.keys()
    scripts = {name for name, file in files.items() if '__name__ == "__main__"' in file.read_text("utf-8")}
    assert len(scripts) > 15 and not {name: seen for name in known if (seen := known[name] & scripts)}

    def below(name: str) -> set[str]:
        found, open_ = set(), [name]
        while open_:
            new = known[open_.pop()] - found
            found |= new
            open_ += new
        return found

    assert not [name for name in files if name in below(name)]
    rooms = {
        "generators",
        "predicting",
        "critics",
        "critic_training",
        "exemplars",
        "DPR.retriever",
        "DPR.learning",
    }
    for name in ("models", "critic_set", "dataloaders"):
        assert below(name) and not below(name) & (rooms | {"families", "training"}), name


def test_every_link_between_the_pages_leads_to_a_file():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    assert len(pages) >= 6
    for page in pages:
        targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
        missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
        assert not missing, page.name


def anchors(page: Path) -> set[str]:
    """As the pages are shown: a heading in small letters, without marks, its blanks hyphens."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.M)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def test_every_link_to_a_part_of_a_page_leads_to_a_heading():
    pages, count = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")], 0
    for page in pages:
        for place, part in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
            count += 1
            assert part in anchors(page.parent / place if place else page), f"{page.name}: {place}#{part}"
    assert count


def test_no_table_of_a_page_is_cut_in_two():
    """A row after an empty line is shown as a line of bars, unless it heads a table of its own."""
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        lines = ["", *page.read_text(encoding="utf-8").splitlines(), ""]
        for before, line, after in zip(lines, lines[1:], lines[2:], strict=False):
            if line.startswith("| ") and not before.startswith("|"):
                assert after.startswith("|---"), f"{page.name}: {line[:80]}"
