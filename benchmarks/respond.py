"""Seconds for a reply with 1, 8 and 16 candidates, the plain way (`generate`, then a scoring pass) and ours.

  python benchmarks/respond.py                                  the bundled adapter
  python benchmarks/respond.py --run saved/causal-lm/plain --threads 1 --repeats 5

Both ways have the same model, prompts and decoding, and take turns in one process. Printed for each: the
median of the seconds by the clock, and of the processor's, which other programs disturb less. Each way has
draws of its own, so its replies have lengths of their own, too: the last column, seconds a token of the
longest candidate, is what compares the ways where these differ. The plain way reads the prompt once a
candidate, with the adapter beside its base's weights. Neither has critics; `reply` is all that a person waits
for: ours with the text around it and the bundled critics' levels. No exemplars. Written to
results/benchmarks/respond.json.
"""

import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import reporting  # noqa: E402
from options import COUNT, NATURAL, run  # noqa: E402

#: written for this benchmark
DIALOGUES = (
    ("My dog died last week.",),
    ("I start a new job on Monday.", "That is exciting! What will you do?", "I will teach maths to adults."),
    ("Somebody took my bike from the yard.", "Oh no, was it locked?", "Yes, they cut the chain in daylight."),
)


def parse_args(argv=None):
    parser = reporting.flags(__doc__)
    parser.add_argument(
        "--run", default=str(ROOT / "saved" / "smollm2-empathetic"), help="a causal run's folder"
    )
    parser.add_argument("--candidates", type=NATURAL, nargs="+", default=[1, 8, 16], help="replies sampled")
    parser.add_argument("--repeats", type=NATURAL, default=5, help="replies to each dialogue and way")
    parser.add_argument("--threads", type=COUNT, default=0, help="processor threads; 0: torch's default")
    return reporting.parsed(parser, argv)


def plain(model, batch: dict, count: int, decoding):
    """transformers' loop over as many prompts as candidates, then a pass over prompts and replies."""
    import torch

    from models import until_end
    from predicting import of_flags
    from vocabulary import logits_nll

    out = model.generate(batch, num_return_sequences=count, **of_flags(decoding))  # (N, T)
    said = until_end(out == model.chat.end_id)
    ids = torch.cat([batch["input_ids"].expand(count, -1), out], dim=1)  # (N, L + T)
    before = batch["attention_mask"].expand(count, -1)
    asked = torch.cat([torch.zeros_like(before), said.long()], dim=1).bool()
    mask = torch.cat([before, said.long()], dim=1)
    logits_nll(model({"input_ids": ids, "attention_mask": mask, "target_mask": asked}), ids[asked])
    return said.sum(1).tolist()


def ours(model, batch: dict, count: int, decoding):
    import torch

    from sampling import sample

    return sample(model, batch, torch.rand(1, count, decoding.max_new_tokens), decoding).tokens.tolist()


def taken_by(way, *asked) -> tuple[float, float, list[int]]:
    """Seconds by the clock, and of the processor; what it gave."""
    began = time.perf_counter(), time.process_time()
    given = way(*asked)
    return time.perf_counter() - began[0], time.process_time() - began[1], given


def main(argv=None):
    args = parse_args(argv)
    import torch

    import bundled
    from causal_generators import load
    from responder import Responder
    from session import own_random_stream

    if args.threads:
        torch.set_num_threads(args.threads)
    session, paths, file = reporting.begin(args, "respond")
    responder = Responder.from_pretrained(
        Path(args.run), bundled.critics(), session=session, workdir=args.workdir
    )
    writer: Any = responder.writer
    models = {plain: load(Path(args.run), paths, session).to(session.device), ours: writer.model}

    def sampled(way, turns: tuple[str, ...], count: int, seed: int) -> list[int]:
        """How many tokens each candidate has."""
        batch = writer.encode(turns, ())
        with torch.inference_mode(), session.autocast(), own_random_stream(seed):
            return way(models[way], batch, count, responder.decoding)

    def reply(turns: tuple[str, ...], count: int, seed: int) -> list[int]:
        written = responder.reply(turns, count, seed=seed).candidates
        ids = writer.tokenizer([c.text for c in written], add_special_tokens=False)["input_ids"]
        return [len(row) + 1 for row in ids]

    ways = {"plain": partial(sampled, plain), "ours": partial(sampled, ours), "reply": reply}

    print(f"{torch.get_num_threads()} threads, {session.device}, {session.precision}, {args.run}")
    columns = ("seconds", "processor seconds", "tokens a candidate", "seconds a token")
    figures: dict[str, dict[str, float]] = {}
    for count in args.candidates:
        taken: dict[str, list[tuple[float, float, list[int]]]] = {name: [] for name in ways}
        for seed in range(args.repeats + 1):
            reporting.say(f"{count} candidates, turn {seed} of {args.repeats}")
            for name, way in ways.items():
                found = [taken_by(way, turns, count, seed) for turns in DIALOGUES]
                taken[name] += found if seed else []  # the first ones warm up
        for name, rows in taken.items():
            wall, processor = (statistics.median(row[i] for row in rows) for i in (0, 1))
            tokens = statistics.mean(length for row in rows for length in row[2])
            each = statistics.median(row[0] / max(row[2]) for row in rows)
            figures[f"{count}, {name}"] = dict(zip(columns, (wall, processor, tokens, each), strict=True))
    print(reporting.table(["candidates, way", *columns], [[n, *row.values()] for n, row in figures.items()]))
    reporting.write(file, vars(args), session.device.type, {"ways": figures})
    return figures


if __name__ == "__main__":
    run(main)
