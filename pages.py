"""Case studies, which show replies beside each other, as markdown and as a page for a browser.

They take plain lists, so that any caller can fill them: a system is a dict with `name`, `replies` (one an
item) and `scores` (a judge's name -> one number an item); a run has its `traits`, and a model `parameters`
(how many) and `adapter` (whether these are one's), too.
"""

import html
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import jinja2

import markup
import storage
from corpora import Example
from markup import cell
from options import DIMENSIONS, HERE, SENTIMENT

SMALL_MODEL = (
    "Some of these replies were written by a very small model (fewer than two million weights, trained for "
    "seconds or minutes). They show that every part works, not what the method can do: `python "
    "reproduce.py --recipe glove` (hours on one GPU) or `--recipe t5` makes better ones."
)
#: what a column of the case studies says; judges that are not here are explained by the caller
COLUMN_KEYS = {
    "case": "the number of the case in this page; conversation and utterance find it in the data",
    "emotion": "the emotion that the speaker was asked to tell about, as the data give it",
    "context": "everything said before, oldest first; the listener's next turn is what the systems write",
    "exemplars": "the three retrieved replies to similar contexts that rank highest",
    "system": "who wrote the reply; gold is the person's own",
    "reply": "the text that is judged",
    "words": "the reply's length in words, split at white space",
    **{kind: f"{known.title.lower()}: {known.shown}" for kind, known in DIMENSIONS.items()},
    SENTIMENT: "the sentiment critic's score of the reply, from -1 (negative) to 1 (positive)",
}
PLAIN = ("case", "emotion", "context", "exemplars", "system", "reply")


def render(template: str, **content: object) -> str:
    """A page out of templates/; every text is escaped on its way in, unless the template says otherwise."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**content)


# ----------------------------------------------------------------------------------------------- case studies


@dataclass(frozen=True)
class Section:
    """One kind of case study: some systems beside each other, on the cases of the page."""

    title: str
    systems: list[dict]
    exemplars: Sequence[Sequence[str]] | None = field(default=None, repr=False)  # of every item


def choose(total: int, count: int, seed: int) -> list[int]:
    """The numbers of the items that are shown: a random sample of all of them, in their order."""
    return sorted(random.Random(seed).sample(range(total), min(count, total)))


def rule(total: int, count: int, seed: int) -> str:
    return (
        f"{min(count, total)} of the {total} items, drawn at random with seed {seed} before any reply was "
        "looked at; none was left out or put in by hand. The same cases stand in every section."
    )


def traits(run: Path) -> dict:
    """What a run's settings say for the sections: its script's kind, exemplars or none, losses or none, and
    its size, marks, targets and start, for two runs that differ there differ in more than these."""
    made_with = storage.read_json(run / "args.json")
    given = made_with.get("args", {})
    losses = ("empathy_loss_w", "sentiment_loss_w")
    return {
        "model": str(given.get("model", run.parent.name)),
        "exemplars": given.get("add_exemplars", "none") != "none",
        "losses": any(given.get(name, 0) for name in losses),
        "rewards": bool(given.get("sampled_loss_w")),
        **{name: given.get(name) for name in ("size", "control", "targets")},
        "start": made_with.get("inputs", {}).get("init"),  # what it is, not where it lay
    }


def sections(
    systems: list[dict],
    exemplars: Sequence[Sequence[str]] | None = None,
    retrievers: dict[str, Sequence[Sequence[str]]] | None = None,
) -> list[Section]:
    """The paper's four kinds, those that the systems allow.

    `exemplars`: of every item, best first. `retrievers`: the same by name, of two retrievers or more (tuned,
    untuned). Two systems make a pair where what their key "traits" says differs in one thing only.
    """
    found = [Section("Models side by side", systems, exemplars)]
    known = [system for system in systems if system.get("traits")]
    gold = [s for s in systems if s["name"] == "gold"]
    for title, differs in (
        ("With and without exemplars", "exemplars"),
        ("With and without the losses of empathy and sentiment", "losses"),
    ):
        for a, b in combinations(known, 2):
            if [k for k in a["traits"] if a["traits"][k] != b["traits"][k]] == [differs]:
                with_it, without = (a, b) if a["traits"][differs] else (b, a)
                found.append(Section(title, [*gold, with_it, without], exemplars))
    if retrievers and len(retrievers) > 1:
        best = [
            {"name": name, "replies": [rows[0] if rows else "" for rows in lists], "scores": {}}
            for name, lists in retrievers.items()
        ]
        found.append(Section("Top exemplar of each retriever", [*gold, *best]))
    return found


def judges_of(section: Section) -> list[str]:
    """The judges of any of its systems, in their order."""
    return list(dict.fromkeys(kind for system in section.systems for kind in system["scores"]))


def keys_of(shown: list[Section], keys: dict[str, str] | None, plain: Sequence[str]) -> dict[str, str]:
    """What each column of the page means, the `plain` ones and the judges'; `keys` adds to COLUMN_KEYS, or
    overrules it."""
    explained = COLUMN_KEYS | (keys or {})
    judges = [kind for section in shown for kind in judges_of(section)]
    return {k: explained.get(k, "a judge's score of the reply") for k in dict.fromkeys([*plain, *judges])}


def markdown_cases(
    shown: list[Section],
    examples: list[Example],
    count: int,
    seed: int,
    keys: dict[str, str] | None = None,
    foot: Sequence[str] = (),
) -> str:
    """All sections as one markdown page; `keys` explains judges that COLUMN_KEYS does not know, `foot`: of
    which items, by whom and by which command."""
    lines = ["# Case studies", ""]
    if small_models(shown):
        lines += [SMALL_MODEL, ""]
    lines += [f"Rule: {rule(len(examples), count, seed)}", ""]
    explained = keys_of(shown, keys, PLAIN)
    lines += [*(f"- **{cell(name)}**: {cell(text)}" for name, text in explained.items()), ""]
    for section in shown:
        lines += [f"# {section.title}: {', '.join(cell(s['name']) for s in section.systems)}", ""]
        for n, i in enumerate(choose(len(examples), count, seed), start=1):
            lines += one_case(n, i, section, examples[i])
    for line in foot:
        lines += [line, ""]
    return "\n".join(lines) + "\n"


def score(system: dict, kind: str, i: int) -> str:
    """A judge's score of item `i`, or a dash where this system has none of it."""
    value = system["scores"][kind][i] if kind in system["scores"] else math.nan
    return f"{value:.2f}" if math.isfinite(value) else "-"


def small_models(shown: list[Section]) -> bool:
    systems = [s for section in shown for s in section.systems]
    return any(s.get("parameters", 10**9) < 2_000_000 and not s.get("adapter") for s in systems)


def one_case(n: int, i: int, section: Section, example: Example) -> list[str]:
    """The `n`-th case study, of example number `i`."""
    title = f"## {n}. {example.emotion} ({cell(example.conv_id)}, utterance {example.utterance_idx})"
    lines = [title, ""]
    for t, turn in enumerate(example.history):
        lines.append(f"- **{('speaker', 'listener')[t % 2]}:** {cell(turn)}")
    exemplars = section.exemplars[i][:3] if section.exemplars is not None else []
    if exemplars:
        lines.append("")
    for rank, text in enumerate(exemplars, start=1):
        lines.append(f"> exemplar {rank}: {cell(text)}  ")
    kinds = judges_of(section)
    titles = ["", "reply", *map(cell, kinds)]
    rows = [
        [cell(system["name"]), cell(system["replies"][i]), *(score(system, kind, i) for kind in kinds)]
        for system in section.systems
    ]
    return [*lines, "", markup.table(titles, rows), ""]


def html_cases(
    shown: list[Section],
    examples: list[Example],
    count: int,
    seed: int,
    keys: dict[str, str] | None = None,
    foot: Sequence[str] = (),
) -> str:
    """The same as one self-contained page whose cases sort by any column; texts are escaped."""
    chosen = choose(len(examples), count, seed)
    tables = []
    for section in shown:
        kinds = judges_of(section)
        cases = []
        for n, i in enumerate(chosen, start=1):
            rows = []
            for system in section.systems:
                scores = [score(system, kind, i) for kind in kinds]
                text = system["replies"][i]
                rows.append({"system": system["name"], "reply": text, "scores": scores})
            exemplars = section.exemplars[i][:3] if section.exemplars is not None else []
            cases.append({"number": n, "example": examples[i], "exemplars": exemplars, "rows": rows})
        names = [s["name"] for s in section.systems]
        tables.append({"title": section.title, "systems": names, "judges": kinds, "cases": cases})
    return render(
        "cases.html",
        tables=tables,
        # rem that two columns of text and the numbers need beside each other; below, cases are cards
        wide=55 + 5 * max(len(table["judges"]) for table in tables),
        rule=rule(len(examples), count, seed),
        keys=keys_of(shown, keys, [*PLAIN, "words"]),
        foot=[html.unescape(line) for line in foot],  # lines of a markdown table's foot
        warning=SMALL_MODEL.replace("`", "") if small_models(shown) else "",
    )
