"""Questions, positives and negatives for training the retriever, in the JSON format of published DPR.

  python -m DPR.prepare_dpr_data --dataset empd              EmpatheticDialogues (the paper's first setting)
  python -m DPR.prepare_dpr_data --dataset reddit            pairs with emotional reaction
  python -m DPR.prepare_dpr_data --dataset empd-reddit       both

empd: the question is the dialogue so far, the positive the listener's turn; the hard negative is a listener
turn of the same emotion and another conversation, the other negative one of another emotion. reddit:
positives are responses with emotional reaction (level >= 1); the hard negative answers another post with it,
the other negative without.
"""

import json
import random
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for python DPR/prepare_dpr_data.py too

import options
from options import DATASETS, Paths, add_common, check, make_parser


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_common(parser)
    parser.add_argument(
        "--dataset",
        choices=DATASETS,
        default="empd",
        help="where the questions come from",
    )
    args = parser.parse_args(argv)
    check(parser, args)
    return args


def passage(text: str) -> dict:
    return {"title": "", "text": text}


def entry(question: str, positive: str, hard: str | None, other: str | None) -> dict:
    return {
        "question": question,
        "answers": [positive],
        "positive_ctxs": [passage(positive)],
        "negative_ctxs": [passage(other)] if other is not None else [],
        "hard_negative_ctxs": [passage(hard)] if hard is not None else [],
    }


def draw(rng: random.Random, pool: list[tuple[str, str]], own: str, tries: int = 50) -> str | None:
    """A text from `pool` (owner, text) whose owner is not `own`; None where there is none."""
    for _ in range(tries):  # nearly always the first try; no scan of the pool
        owner, text = pool[rng.randrange(len(pool))] if pool else (own, "")
        if owner != own:
            return text
    rest = [text for owner, text in pool if owner != own]
    return rng.choice(rest) if rest else None


def from_dialogues(path: Path, seed: int) -> list[dict]:
    from corpora import listener_turns

    examples = listener_turns(path)
    by_emotion = defaultdict(list)
    for e in examples:
        by_emotion[e.emotion].append((e.conv_id, e.response))
    emotions = sorted(by_emotion)
    rng = random.Random(seed)
    out = []
    for e in examples:
        others = [m for m in emotions if m != e.emotion]
        other = draw(rng, by_emotion[rng.choice(others)], e.conv_id) if others else None
        out.append(entry(" ".join(e.history), e.response, draw(rng, by_emotion[e.emotion], e.conv_id), other))
    return out


def from_pairs(path: Path, seed: int) -> list[dict]:
    from corpora import read_pairs

    table = read_pairs(path)
    rows = list(zip(table["seeker_post"], table["response_post"], table["level"], strict=True))
    warm = [(post, reply) for post, reply, level in rows if level >= 1]
    cold = [(post, reply) for post, reply, level in rows if level == 0]
    rng = random.Random(seed)
    return [entry(post, reply, draw(rng, warm, post), draw(rng, cold, post)) for post, reply in warm]


def main(argv=None):
    args = parse_args(argv)
    import storage

    paths = Paths(args.workdir)
    for split in ("train", "valid"):
        target = paths.dpr_data(args.dataset, split)
        used = {k: v for k, v in paths.dpr_sources(split).items() if k in args.dataset.split("-")}
        entries = [
            e for k, v in used.items() for e in (from_dialogues if k == "empd" else from_pairs)(v, args.seed)
        ]
        digests = {k: storage.sha256(v) for k, v in used.items()}
        origin = {"dataset": args.dataset, "seed": args.seed, **digests}
        if storage.ready(target, origin, args.overwrite):
            continue
        storage.write_text(target, json.dumps(entries, ensure_ascii=False, indent=1) + "\n", origin)
        print(
            f"{target}: {len(entries):,} questions, {sum(bool(e['hard_negative_ctxs']) for e in entries):,} "
            "with a hard negative"
        )


if __name__ == "__main__":
    options.run(main)
