"""What a table of many systems costs: its columns, intervals and tests, and a judge that reads all replies.

  python benchmarks/table.py --workdir work --judge minilm-b
  python benchmarks/table.py --workdir work --systems 20 --judge saved/empathy/minilm-all --texts 2000

The systems are made up: each answers every listener turn of the test split with a training reply, drawn by
chance, so that nearly every reply is new to the judge, which is the dearest case. The table itself is
evaluate_responses.py with the TF-IDF judge; the judge reads the first --texts distinct replies, once for all
dimensions, and once for each as critics of one dimension would. Times are processor seconds, which other
programs on the machine hardly change, and seconds by the clock.
"""

import contextlib
import io
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import reporting
from options import DIMENSIONS, NATURAL, Paths, number, run


def parse_args(argv=None):
    parser = reporting.flags(__doc__)
    add = parser.add_argument
    add("--systems", type=NATURAL, default=20, help="made-up systems in the table")
    add("--judge", default="minilm-b", help="family of critics, or the folder of one of all dimensions")
    add("--texts", type=NATURAL, default=1000, help="distinct replies that the judge reads")
    add("--resamples", type=number(int, least=100), default=2000, help="of the intervals")
    return reporting.parsed(parser, argv)


def timed(work: Callable[[], object]) -> dict[str, float]:
    began, used = time.perf_counter(), time.process_time()
    work()
    return {"processor": time.process_time() - used, "clock": time.perf_counter() - began}


def made_up(folder: Path, count: int, paths: Paths, seed: int) -> tuple[list[str], list[str]]:
    """(files of `count` systems, their distinct replies)."""
    import pandas as pd

    import storage
    from corpora import listener_turns

    items = listener_turns(paths.dialogues("test"))
    known = [e.response for e in listener_turns(paths.dialogues("train"))]
    files, replies, draw = [], [], random.Random(seed)
    for n in range(count):
        rows = [(*item.key, draw.choice(known)) for item in items]
        files.append(str(folder / f"system-{n:02d}.csv"))
        replies += [row[-1] for row in rows]
        table = pd.DataFrame(rows, columns=["conv_id", "utterance_idx", "response"])
        storage.write_csv(Path(files[-1]), table)
    return files, list(dict.fromkeys(replies))


def main(argv=None):
    args = parse_args(argv)
    import evaluate_responses
    import judges
    from critics import open_critics

    session, paths, file = reporting.begin(args, "table")
    folders = {dim: judges.place(args.judge, dim, paths) for dim in DIMENSIONS}
    scorers = open_critics(folders, session)
    together = list(dict.fromkeys(scorer.whole for scorer in scorers.values()))
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "data").symlink_to(paths.data.resolve())
        files, replies = made_up(Path(place), args.systems, paths, args.seed)
        flags = ["--workdir", place, "--device", args.device, "--family", "none", "--judges", "tfidf"]
        reporting.say(f"a table of {args.systems} systems")
        with contextlib.redirect_stdout(io.StringIO()):
            words = [*files, *flags, "--resamples", str(args.resamples)]
            spent = {"the table, without this judge": timed(lambda: evaluate_responses.main(words))}
    texts = replies[: args.texts]
    for scorer in together:
        scorer.rows(texts[:64])  # warms up
    reporting.say(f"the judge, {len(texts):,} replies")
    spent["judge, as it is"] = timed(lambda: [scorer.rows(texts) for scorer in together])
    spent["judge, a reading a dimension"] = timed(lambda: [scorers[dim].rows(texts) for dim in DIMENSIONS])
    rows = [[name, *of_one.values()] for name, of_one in spent.items()]
    print(reporting.table(["part", "processor seconds", "by the clock"], rows))
    whole = len(replies) / len(texts) / 60
    for name in list(spent)[1:]:
        minutes = whole * spent[name]["processor"]
        print(f"{name}: about {minutes:.1f} processor minutes for the {len(replies):,} distinct replies")
    result = {"spent": spent, "texts": len(texts), "distinct": len(replies), "readings": len(together)}
    reporting.write(file, vars(args), session.device.type, result)
    return result


if __name__ == "__main__":
    run(main)
