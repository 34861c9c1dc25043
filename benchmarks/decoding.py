"""One generator's replies under several decodings, beside each other: diversity, length, relevance, judged
levels.

  python benchmarks/decoding.py saved/glove-t5/plain                         four ways, on the test split
  python benchmarks/decoding.py saved/causal-lm/plain --split valid --relevance
  python benchmarks/decoding.py saved/glove-t5/plain --ways "top-p 0.9" greedy --parallel 2

Each way is a call of --inference with --output results/NAME/WAY, all are scored by one evaluate_responses.py;
what has finished is skipped. Its whole table is results/NAME/table.md; the columns in which decodings differ
are printed, gold first, to which the best way is the nearest, and stand in results/benchmarks/NAME.json.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import reporting
from options import NATURAL, Paths, check, run, run_name

#: a --top-k that leaves every word in
EVERY_WORD = 1_000_000
WAYS = {
    "top-k 20 at 0.9": "--top-k 20 --temperature 0.9",
    "top-p 0.9": f"--top-k {EVERY_WORD} --top-p 0.9 --temperature 1.0",
    "top-k 20 at 0.7": "--top-k 20 --temperature 0.7",
    "beam 8 blocked": "--beams 8 --no-repeat-ngram 3",
    "beam 8": "--beams 8",
    "greedy": "--top-k 1",
}
COLUMNS = {
    "distinct_1_items": "Distinct-1",
    "distinct_2_items": "Distinct-2",
    "most_frequent": "most frequent %",
    "verbatim_training": "verbatim training %",
    "words_exemplar": "words from exemplars %",
    "length": "words",
    "rouge_l": "ROUGE-L",
    "cosine_last_turn": "relevance",
    "vader": "VADER",
}


def parse_args(argv=None):
    parser = reporting.flags(__doc__)
    add = parser.add_argument
    add("run", metavar="RUN", help="a finished generator's folder")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS)[:4], metavar="WAY", help=", ".join(WAYS))
    add("--split", choices=["valid", "test"], default="test", help="whose contexts are replied to")
    add("--name", type=run_name, help="folder under results/ (default: decoding-RUN)")
    add("--batch-size", type=NATURAL, default=64, help="replies written at a time")
    add("--max-new-tokens", type=NATURAL, default=60, help="a reply that has not ended by then is cut")
    add("--parallel", type=NATURAL, default=1, help="ways at a time")
    add("--relevance", action="store_true", help="also MiniLM's cosine of reply and last turn")
    add("--judges", metavar="NAME,NAME", help="as of evaluate_responses.py")
    args = parser.parse_args(argv)
    check(parser, args, [] if Path(args.run).is_dir() else [f"RUN {args.run}: no such folder"])
    return args


def lines(args, script: str, family: str, folder: Path) -> tuple[list[str], str]:
    """The commands that write the replies, and the one that scores them."""
    import shlex

    device = ["--device", args.device, "--precision", args.precision, *["--overwrite"] * args.overwrite]
    seed = ["--seed", str(args.seed)]
    size = ["--predict-batch-size", str(args.batch_size), "--max-new-tokens", str(args.max_new_tokens)]
    places, found = [], []
    for way in args.ways:
        places.append(str(folder / way.replace(" ", "-")))
        words = [script, "--inference", str(Path(args.run).resolve()), "--output", places[-1], *seed]
        words += [*WAYS[way].split(), *size, "--predict-split", args.split, *device]
        found.append(shlex.join(words))
    words = ["evaluate_responses.py", *places, "--name", folder.name, "--split", args.split, *device]
    words += ["--family", family, *["--relevance"] * args.relevance]
    words += ["--judges", args.judges] if args.judges else []
    return found, shlex.join(words)


def short_table(rows: dict[str, dict]) -> tuple[list[str], list[list]]:
    """(titles, a row for each system) of what the ways differ in."""
    levels = [key for key in rows["gold"] if key.endswith("_level")]
    keys = [*(key for key in COLUMNS if key in rows["gold"]), *levels]
    titles = [COLUMNS.get(key, key.removesuffix("_level").replace("_", " ")) for key in keys]
    return ["", *titles], [[name, *(row.get(key, "-") for key in keys)] for name, row in rows.items()]


def main(argv=None):
    args = parse_args(argv)
    import torch

    import advice
    import runs
    import stages
    import storage
    from recipes import PREPARED, Changes, Group, plan

    runs.require_run(Path(args.run), advice.GIVE_A_GENERATOR)
    paths = Paths(args.workdir)
    name = args.name or f"decoding-{Path(args.run).resolve().name}"
    file = reporting.target(paths, name, args.overwrite, "another --name")
    folder = paths.results.resolve() / name
    model, family = advice.kind_of(Path(args.run))
    script = advice.GENERATORS["causal-lm" if model == "CausalGenerator" else family]
    writing, scoring = lines(args, script, family, folder)
    recipe = {"replies": Group(writing), "table": Group([scoring], ("replies",))}
    todo = plan(recipe, str(Path(args.workdir).resolve()), PREPARED, Changes())
    # another run's weights in the same place make other replies
    weights = [storage.sha256(place)[:16] for place in sorted(Path(args.run).glob("*.safetensors"))]
    todo = [replace(stage, identity="-".join([stage.identity, *weights])) for stage in todo]
    outcome = stages.run(
        todo, stages.Record(folder / "stages.json"), folder / "logs", stages.Box(args.parallel)
    )
    stages.settle_outcome(outcome, todo)
    found = storage.read_json(folder / "metrics.json")
    titles, rows = short_table(found["systems"])
    print("\n" + reporting.table(titles, rows) + "\n")
    flags = {place: WAYS[way] for place, way in zip(list(found["systems"])[1:], args.ways, strict=True)}
    result = {"ways": flags, "replies": found["replies"], "systems": found["systems"]}
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    reporting.write(file, vars(args), device, result)
    return result


if __name__ == "__main__":
    run(main)
