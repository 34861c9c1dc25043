"""Systems on one table: their replies read, measured, judged, and shown beside the gold ones and the floors.

Here all parts meet, in order. What is read: systems.py; what is measured: measuring.py, by the definitions in
columns.py; what is compared: comparison.py; how it is shown: rendering.py, pages.py.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import floors
import judges
import lineage
import normalising
import runs
import storage
import validation
from answers import Turns, Valued, announce
from captions import flattered, notes, served_by
from columns import COLUMNS, critic_columns, judge_columns
from comparison import Comparison, Numbers, Row
from corpora import Example, listener_turns, read_exemplars
from critics import load_finished
from DPR.retriever import Retriever, own_conversations
from exports import as_numbers, items_table, pairs_table, unmatched_table, worth
from lineage import Served
from markup import cell
from measures import require_length, signature
from measuring import Extras, Standard, normalised_sets
from options import CRITICS, DIMENSIONS, Paths, UserError, named_places, refuse_existing
from pages import html_cases, markdown_cases, sections, traits
from plots import plot_learning, plot_levels
from rendering import Page
from session import Session
from systems import Named, System, item_set, read_system, require_complete, restrict, set_hash

FILES = ("metrics.json", "table.md", "items.csv", "pairs.csv")
PAGES = {"case_studies.md": markdown_cases, "case_studies.html": html_cases}
CURVES, LEVELS = "learning_curves.png", "levels.png"
VALIDATION = "validation.md"
UNMATCHED = "unmatched.csv"


@dataclass(frozen=True)
class TableOptions:
    """What the table's command was asked for (evaluate_responses.py explains each)."""

    runs: list[str]
    split: str
    items: str
    format: str
    references: str | None
    family: str
    name: str
    cases: int
    untuned_exemplars: str | None
    seed: int
    overwrite: bool
    resamples: int
    judges: str | None
    nearest: str
    relevance: bool
    fluency_model: str | None
    bertscore_model: str | None
    validate_metrics: str | None


def as_path(text: str | None) -> Path | None:
    return Path(text) if text else None


def read_all(options: TableOptions, examples: Sequence[Example], paths: Paths) -> list[Named]:
    """Every system of the table; two of one name are told apart by their files' folders, or a number."""
    found: list[Named] = []
    of_files: dict[int, str] = {}  # {id of a line: its file's folder}
    for text in options.runs:
        name, places = named_places(text)
        again = [place for place, times in Counter(Path(p).resolve() for p in places).items() if times > 1]
        if again:
            raise UserError(f"{text}: {again[0]} is given twice; each place is one seed")
        read: list[System] = []
        for place in places:
            systems = read_system(
                Path(place),
                examples,
                options.split,
                paths,
                layout=options.format,
                references=as_path(options.references),
            )
            if name and len(systems) > 1:
                held = ", ".join(system.name for system in systems)
                raise UserError(
                    f"{text}: {place} holds {len(systems)} systems ({held}), and {name}=... are seeds of "
                    "one; give it without a name"
                )
            read += systems
        found += [Named(name, read)] if name else [Named(system.name, [system]) for system in read]
        if not name and Path(places[0]).is_file():
            folder = Path(places[0]).resolve().parent.name
            of_files |= {id(line): folder for line in found[-len(read) :]}
    times = Counter(line.name for line in found)
    for line in found:
        if times[line.name] > 1 and id(line) in of_files:
            line.name = f"{of_files[id(line)]}/{line.name}"
    for n, line in enumerate(found):
        if line.name in ["gold", *(other.name for other in found[:n])]:
            line.name += f" ({n + 1})"
    if options.references and not any(system.referenced for line in found for system in line.systems):
        held = ", ".join(f"{system.name} as {system.layout}" for line in found for system in line.systems)
        raise UserError(
            f"--references {options.references}: not used, since every file says by itself which items it "
            f"answers ({held[:300]}); leave it out, or say --format lines where a file holds one reply a line"
        )
    return found


def replies(options: TableOptions, paths: Paths) -> tuple[list[Example], list[dict], list[str]]:
    """The items of the tables, all systems with their replies to them, gold first, and the lines that say
    what both are: for raters."""
    examples = listener_turns(paths.dialogues(options.split))
    lines = read_all(options, examples, paths)
    numbers = settled(options, examples, lines)
    found: list[dict] = [{"name": "gold", "replies": [examples[i].response for i in numbers]}]
    for line in lines:
        if len(line.systems) > 1:
            raise UserError(
                f"--rating-kit: {line.name} has {len(line.systems)} runs, and people rate the replies of "
                "one; give it alone"
            )
        found.append({"name": line.name, "replies": restrict(line.systems[0], numbers).replies})
    about = [f"{of_items(options, numbers, set_hash(examples, numbers))}; the kit's are drawn of these."]
    return [examples[i] for i in numbers], found, about + notes(lines, {}, [], paths)


def settled(options: TableOptions, examples: Sequence[Example], lines: Sequence[Named]) -> Numbers:
    """The set of items that every system answers as asked for. Raises `UserError` where one does not."""
    systems = [system for line in lines for system in line.systems]
    numbers = tuple(item_set(examples, options.items, systems))
    for system in systems:
        require_complete(system, numbers, examples)
    return numbers


# ------------------------------------------------------------------------------------------------ measuring


def standard(
    options: TableOptions,
    examples: Sequence[Example],
    training: Sequence[Example],
    paths: Paths,
    session: Session,
    critics: Mapping[str, Valued],
    among: Sequence[judges.Judge],
) -> Standard:
    """What every line is held against."""

    def scores(numbers: Numbers, replies: Sequence[str]) -> dict[str, np.ndarray]:
        histories = [examples[i].history for i in numbers]
        return {kind: ask(replies, histories) for kind, ask in critics.items()}

    shown = paths.exemplars(options.split)
    relevance = fluency = None
    if bertscore := as_path(options.bertscore_model):
        require_length(bertscore)
    if options.relevance:
        relevance = Retriever.from_pretrained(encoder="minilm", session=session)
    if model := options.fluency_model:
        import causal_models  # with peft, which takes seconds that no other table needs

        fluency = causal_models.load_base(model, paths.cache, session.device, flag="--fluency-model")
    return Standard(
        examples=examples,
        training=training,
        exemplars=read_exemplars(shown, examples) if shown.exists() else None,
        judges=among,
        critics=scores,
        session=session,
        extras=Extras(relevance, fluency, bertscore),
        resamples=options.resamples,
        seed=options.seed,
    )


def load_judges(
    options: TableOptions, paths: Paths, session: Session, served: Iterable[Served]
) -> list[judges.Judge]:
    """Those asked for; by default those that can be had, of the half of the pairs that no critic in a loss
    or reward has seen, where there is such a half. `served`: the critics of all systems."""
    if options.judges is not None:
        return judges.load(paths, session, judges.named(options.judges))
    return judges.load(paths, session, half=lineage.other_half(served))


def announce_judging(
    among: Sequence[judges.Judge],
    critics: Mapping[str, Valued],
    lines: Sequence[Named],
    examples: Sequence[Example],
    training: Sequence[Example],
    session: Session,
) -> None:
    """About how long all replies take to be judged, before any is. As `Standard.measure` asks: several
    samples by the judges alone, all in their context and all by themselves; beside them the training
    replies, from which the ceiling is learnt."""
    replies, contexts = [e.response for e in examples], [e.history for e in examples]
    alone: list[str] = []
    several: list[Turns] = []
    for system in (system for line in lines for system in line.systems):
        replies += system.replies
        contexts += [examples[number].history for number in system.numbers]
        for row, number in zip(system.samples or (), system.numbers, strict=False):
            alone += row
            several += [examples[number].history] * len(row)
    learnt = training if alone else []
    judged = [text.strip() for text in [*replies, *alone, *alone, *(e.response for e in learnt)]]
    before = [*contexts, *several, *[()] * len(alone), *(e.history for e in learnt)]
    by_judges = [ask for judge in among for ask in judge.ask.values() if isinstance(ask, Valued)]
    # heads of one encoder share their answers
    asked = [(answers, judged, before) for answers in dict.fromkeys(ask.answers for ask in by_judges)]
    of_critics = dict.fromkeys(ask.answers for ask in critics.values())
    announce([*asked, *((answers, replies, contexts) for answers in of_critics)], session.say)


def nearest(
    options: TableOptions, against: Standard, examples: Sequence[Example], paths: Paths, session: Session
) -> Callable | None:
    """How the nearest training reply is found, for floors.replies."""
    if options.nearest == "none":
        return None
    training = against.training
    owners, held = own_conversations(examples, training), [t.conv_id for t in training]
    if options.nearest == "tfidf":
        return lambda asked, known: floors.nearest_by_tfidf(asked, known, owners, held)
    return lambda asked, known: floors.nearest_by_minilm(asked, known, owners, held, paths, session)


class Shown:
    """The exemplars that each system was shown, each file read once."""

    def __init__(self, split: str, against: Standard, paths: Paths):
        self.split, self.against, self.paths = split, against, paths
        self.known: dict[tuple[Path, str | None], list[frozenset[str]] | None] = {}

    def to(self, system: System) -> Sequence[frozenset[str]] | None:
        """By item; of a run those of its own file, of anybody's file those of the table. None of a model's
        replies beside which none are noted."""
        run = system.folder or system.run
        if not run and "model" not in system.origin:
            return self.against.shown
        file = lineage.exemplars_of(system.origin, run, self.split, self.paths)
        if file is None:
            return None
        noted = system.origin.get("exemplars")
        digest = noted.get("sha256") if isinstance(noted, dict) else None
        if (file, digest) not in self.known:
            lacks = "" if file.exists() else "no such file"
            if not lacks and digest and storage.sha256(file) != digest:
                lacks = "other exemplars than its replies were written with"
            if lacks:
                print(f"note: {file}: {lacks}; what {system.name} copies from its exemplars is left out")
            found = None if lacks else read_exemplars(file, self.against.examples)
            self.known[file, digest] = normalised_sets(found)
        return self.known[file, digest]


def all_rows(
    options: TableOptions,
    against: Standard,
    lines: Sequence[Named],
    numbers: Numbers,
    how: Callable | None,
    paths: Paths,
) -> list[Row]:
    """Gold, floors, systems. `numbers`: the items of the tables; levels' floors know the gold levels of
    those."""
    everything = tuple(range(len(against.examples)))
    gold = against.measure("gold", [e.response for e in against.examples], everything, shown=against.shown)
    rows = [Row("gold", "gold", [gold]), *against.floors(numbers, options.seed, how)]
    rows += against.level_floors(numbers)
    if any(system.samples for line in lines for system in line.systems):
        encoder = "minilm" if options.nearest == "minilm" else None
        rows += against.context_only(numbers, encoder, paths.cache)
    shown = Shown(options.split, against, paths)
    for line in lines:
        measured = []
        for system in line.systems:
            own = tuple(system.numbers)
            measured.append(
                against.measure(
                    line.name,
                    system.replies,
                    own,
                    likelihoods=system.likelihoods,
                    samples=system.samples,
                    parameters=system.parameters,
                    shown=shown.to(system),
                )
            )
        rows.append(Row(line.name, "system", measured))
    return rows


# --------------------------------------------------------------------------------------------------- output


def of_items(options: TableOptions, numbers: Numbers, digest: str) -> str:
    return f"Split {options.split}, items {options.items}, n = {len(numbers):,}, set {digest}"


def footer(
    options: TableOptions, numbers: Numbers, digest: str, named: Sequence[str], family: str
) -> list[str]:
    """Of what and by what the tables are. `named`: the judges; `family`: of the critics."""
    return [
        f"{of_items(options, numbers, digest)}; {options.resamples:,} resamples of its conversations, seed "
        f"{options.seed}.",
        f"{normalising.DESCRIPTION}. BLEU-1..4: {signature()}.",
        f"Judges: {', '.join(named) or 'none'}; training critics, which stand apart: {family}.",
        runs.made_by(),
    ]


def score_name(key: str) -> str:
    """What the pages call a judge's score of a reply; empty for other figures."""
    if key.startswith("critic_"):
        return key.removeprefix("critic_")
    return key.removesuffix("_level").replace("_", ": ") if key.endswith("_level") else ""


def cases(
    lines: Sequence[Named], rows: Sequence[Row], examples: Sequence[Example], numbers: Numbers
) -> list[dict]:
    """What pages.py shows: each system's replies to the items of the tables, with the judges' scores."""
    found = []
    of_line = {line.name: line.systems for line in lines}
    for row in (r for r in rows if r.kind in ("gold", "system")):
        run = row.runs[0]
        places = run.places(numbers)
        scores = {}
        for key in run.figures:
            if name := score_name(key):
                scores[name] = run.item_values(key)[places].tolist()
        shown: dict = {"name": row.name, "scores": scores}
        if row.kind == "gold":
            shown["replies"] = [examples[i].response for i in numbers]
        else:
            system = of_line[row.name][0]
            shown["replies"] = [system.replies[place] for place in places]
            shown["folders"] = [str(s.folder) for s in of_line[row.name] if s.folder]
            if run_folder := system.folder or system.run:
                shown["traits"] = traits(run_folder)
            if system.parameters is not None:
                shown |= {"parameters": system.parameters, "adapter": system.adapter}
        found.append(shown)
    return found


def write_cases(
    options: TableOptions,
    against: Standard,
    lines: Sequence[Named],
    rows: Sequence[Row],
    numbers: Numbers,
    files: dict[str, Path],
    untuned: Sequence[Sequence[str]] | None,
    foot: Sequence[str],
) -> None:
    """The pages that people look at, of the items of the tables. `untuned`: another retriever's exemplars."""
    shown = None
    if against.exemplars is not None:
        shown = [against.exemplars[i] for i in numbers]
    retrievers: dict[str, Sequence[Sequence[str]]] | None = None
    if shown is not None and untuned is not None:
        retrievers = {"tuned retriever": shown, "untuned retriever": [untuned[i] for i in numbers]}
    systems = cases(lines, rows, against.examples, numbers)
    keys = {
        score_name(f"{judge.name}_{dim}_level"): f"by the judge {judge.name}, the probability that the reply "
        f"reaches level 1 of {known.name}"
        for judge in against.judges
        for dim, known in DIMENSIONS.items()
    }
    foot = [
        *(
            f"{cell(line.name)}: replies and levels of {line.systems[0].name} alone, the first of its "
            f"{len(line.systems)} runs."
            for line in lines
            if len(line.systems) > 1
        ),
        *foot,
    ]
    chosen = [against.examples[i] for i in numbers]
    for name, page in PAGES.items():
        sides = sections(systems, shown, retrievers)
        storage.write_text(files[name], page(sides, chosen, options.cases, options.seed, keys, foot))
    files[CURVES].unlink(missing_ok=True)  # of a table that is overwritten, and had runs
    plot_learning(systems, files[CURVES])


def levels(page: Page, judged: Sequence[str]) -> tuple[list[tuple[str, dict]], dict[str, str]]:
    """(rows, titles) of the levels that the judges `judged` see, for `plot_levels`; gold is the first. Left
    out: the constant reply, far from all others."""
    keys = [f"{judge}_{dim}_level" for judge in judged for dim in DIMENSIONS]
    columns = [c for c in page.columns if c.key in keys]
    rows = []
    for row in page.comparison.rows:
        known = page.table[row.name]
        points = {
            c.key: (known[c.key].point, *(c.interval(known[c.key]) or ())) for c in columns if c.key in known
        }
        if points and row.kind in ("gold", "floor", "system") and row.name != floors.CONSTANT:
            rows.append((row.name, points))
    return rows, {c.key: score_name(c.key) for c in columns}


def evaluate(options: TableOptions, paths: Paths, session: Session) -> dict:
    """Write FILES, and the pages and pictures that there are, to results/NAME/; returns metrics.json."""
    folder = paths.results / options.name
    files = {name: folder / name for name in (*FILES, *PAGES, CURVES, LEVELS, VALIDATION, UNMATCHED)}
    refuse_existing([files["metrics.json"]], options.overwrite, "another --name")  # written last
    storage.require_room_for(folder)
    # read before the measuring: what is wrong with it is said now
    ratings = validation.read_ratings(options.validate_metrics) if options.validate_metrics else None
    examples = listener_turns(paths.dialogues(options.split))
    untuned = None
    if options.untuned_exemplars:
        file = Paths(exemplars=options.untuned_exemplars).exemplars(options.split)
        untuned = read_exemplars(file, examples)
    lines = read_all(options, examples, paths)
    if ratings is not None:
        said = [text for line in lines for system in line.systems for text in system.replies]
        said += [e.response for e in examples]
        validation.require_matches(ratings, said)
    numbers = settled(options, examples, lines)
    folders = {kind: paths.find_critic(kind, options.family) for kind in CRITICS}
    critics = judges.training_critics(load_finished(folders, session), paths.cache)
    served = [critic for line in lines for system in line.systems for critic in served_by(system, paths)]
    among = load_judges(options, paths, session, served)
    training = listener_turns(paths.dialogues("train"))
    announce_judging(among, critics, lines, examples, training, session)
    against = standard(options, examples, training, paths, session, critics, among)
    how = nearest(options, against, [examples[i] for i in numbers], paths, session)
    rows = all_rows(options, against, lines, numbers, how, paths)
    columns = list(COLUMNS)
    for j in against.judges:
        columns += judge_columns(j.name, list(DIMENSIONS))
    columns += critic_columns(list(critics))
    conversations = [e.conv_id for e in examples]
    comparison = Comparison(rows, columns, options.resamples, options.seed, conversations)
    comparison.settle(numbers)
    scope = item_set(examples, "all" if options.items == "shared" else options.items, [])
    tests, refused = comparison.tests(scope)
    page = Page(comparison, tests, flattered(lines, among, paths))

    digest, talks = set_hash(examples, numbers), len({examples[n].conv_id for n in numbers})
    place = f"Items: {options.items}, n = {len(numbers):,} of {talks:,} conversations, set {digest}."
    below = [place, *page.remarks(refused)]
    below += notes(lines, {kind: folders[kind] for kind in critics}, against.judges, paths)
    if against.judges:
        chosen = [examples[i] for i in numbers]
        below += judges.report(against.judges, [e.response for e in chosen], [e.history for e in chosen])
    unmatched = unmatched_table((line.name, system) for line in lines for system in line.systems)
    below += [f"Every reply left out: {UNMATCHED}."] * (len(unmatched) > 0)
    family = options.family if critics else "none"
    foot = footer(options, numbers, digest, [j.name for j in against.judges], family)
    below += foot
    about = [*notes(lines, {}, [], paths), *foot]
    first = "\n\n".join([page.main(), *below])
    refuse_existing([files["metrics.json"]], options.overwrite, "another --name")  # another process's
    files["metrics.json"].unlink(missing_ok=True)  # of a table that is overwritten: it says that all is whole
    storage.write_text(files["table.md"], "\n\n".join([first, *page.groups(place)]) + "\n")
    write_cases(options, against, lines, rows, numbers, files, untuned, about)
    files[LEVELS].unlink(missing_ok=True)  # of a table that is overwritten, and had judges
    plot_levels(*levels(page, [j.name for j in against.judges]), gold=[0], target=files[LEVELS])
    items = items_table(rows, columns, examples, numbers)
    storage.write_csv(files["items.csv"], items)
    if ratings is not None:
        rated = (
            f"{options.validate_metrics}, with every system on all its items; a column that compares a reply "
            "with the gold reply leaves the gold replies out."
        )
        # a floor gives a text to an item that it was not said to
        people = [r for r in rows if r.kind in ("gold", "system")]
        said_there = items_table(people, columns, examples, numbers)
        validated = [worth(ratings, said_there, columns), rated, *about]
        storage.write_text(files[VALIDATION], "\n\n".join(validated) + "\n")
    else:
        files[VALIDATION].unlink(missing_ok=True)
    storage.write_csv(files["pairs.csv"], pairs_table(tests))
    files[UNMATCHED].unlink(missing_ok=True)  # of a table that is overwritten
    if len(unmatched):
        storage.write_csv(files[UNMATCHED], unmatched)
    content = {"split": options.split, "items": options.items, "replies": len(numbers), "set": digest}
    content |= {"normaliser": normalising.VERSION, "critics": family}
    content |= {"judges": {j.name: dict(j.sha256) for j in against.judges}, **as_numbers(page)}
    storage.write_json(files["metrics.json"], content)
    print(first)
    levels_too = ", the judges' levels among them" * bool(against.judges)
    print(f"all columns{levels_too}, with their intervals: {files['table.md']}")
    print(f"written to {folder}: {', '.join(f.name for f in files.values() if f.exists())}")
    return content
