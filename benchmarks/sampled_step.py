"""Seconds of an update's loss on sampled replies by part: each reply with a source of its own, and ours.

  python benchmarks/sampled_step.py --workdir demo                       both bundled generators
  python benchmarks/sampled_step.py --part causal --contexts 8 --repeats 1
  python benchmarks/sampled_step.py --emo saved/empathy/minilm-emo      other critics than the bundled

Training dialogues of the workdir, as a training takes them (--sampled-examples, --samples). `draw`: replies
are sampled, by `generate` with the source read once a reply, or once a context. `judge`: critics read them
and the gold replies. `score`: their likelihood with its gradient, of all words at all positions of rows with
a source each, or as the objective does it. `nll`: the gold replies of the same contexts, forward and
backward, which an update has besides. Both ways score the same replies; in `draw` a causal language model's
two ways have random streams, and so replies, of their own.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import reporting  # noqa: E402
from options import CRITICS, NATURAL, Paths, run  # noqa: E402

PLAIN, OURS = "a source a reply", "ours"


@dataclass(frozen=True)
class Work:
    """Of one family: what is measured, {way: function}, and what it is measured on."""

    model: Any
    draw: dict[str, Callable]
    score: dict[str, Callable]
    nll: Callable
    examples: Sequence[Any]
    texts: Sequence[str]


def parse_args(argv=None):
    parser = reporting.flags(__doc__)
    add = parser.add_argument
    parts = ["t5", "causal"]
    add("--part", nargs="+", choices=parts, default=parts, help="the families that are measured")
    add(
        "--run", default=str(ROOT / "saved" / "lempex-mini" / "generator"), help="t5: a run without exemplars"
    )
    add("--causal", default=str(ROOT / "saved" / "smollm2-empathetic"), help="causal: a causal run's folder")
    for kind in CRITICS:
        add(f"--{kind}", metavar="RUN", help="a critic that judges (default: the bundled one)")
    add(
        "--contexts",
        type=NATURAL,
        default=4,
        help="as --sampled-examples of the training scripts; of SmolLM2 the plain way holds 20 GiB for 8",
    )
    add("--samples", type=NATURAL, default=6, help="replies to each context")
    add("--new-tokens", type=NATURAL, default=48, help="at most, of a reply")
    add("--repeats", type=NATURAL, default=3, help="turns of each way, of which the fastest counts")
    return reporting.parsed(parser, argv)


def t5_work(args, session, paths: Paths, options) -> Work:
    """Of a T5 or GloVe-T5."""
    import exemplars
    from generators import split_data
    from models import Generator, token_nll
    from objectives import OF_AN_EXAMPLE, draw_replies, sampled_nll
    from predicting import decoding_arguments
    from pretrained import load_tokenizer
    from quick import quicken

    model = Generator.from_pretrained(args.run).to(session.device).eval()
    quicken(model, session.device)
    tokenizer = load_tokenizer(args.run)
    found = split_data(model.settings, "train", tokenizer, exemplars.Way(), paths, whole=False)
    batch = found.data.collate(chosen(len(found.data), args))
    arguments = decoding_arguments(options.decoding(model.settings.tgt_len), tokenizer, model.vocabulary)
    arguments["max_new_tokens"] = args.new_tokens
    draw = draw_replies(tokenizer, arguments, session.device)
    alone = {
        k: v.repeat_interleave(args.samples, 0).to(session.device)
        for k, v in batch.items()
        if k in OF_AN_EXAMPLE
    }

    @sampling(args, session)
    def drawn():
        return draw(model, batch, 0, args.samples)

    @sampling(args, session)
    def drawn_alone():
        return model.generate(alone, **arguments)

    replies = drawn()
    sampled = session.move(replies.batch)

    def scored():
        return sampled_nll(model, sampled, options)

    def scored_alone():
        logits = model(alone | {"labels": sampled["labels"]})
        logits = within_top_k(logits, sampled["labels"], sampled["suppressed"], options)
        return token_nll(logits, sampled["labels"]).sum(1)

    def gold():
        moved = session.move(batch)
        return token_nll(model(moved), moved["labels"])

    examples = [found.examples[n] for n in batch["numbers"]]
    draws, scores = {PLAIN: drawn_alone, OURS: drawn}, {PLAIN: scored_alone, OURS: scored}
    return Work(model, draws, scores, gold, examples, replies.texts)


def causal_work(args, session, paths: Paths, options) -> Work:
    """Of a causal language model."""
    from causal_generators import draw_replies, load, read_split, sampled_nll, scored_rows
    from causal_models import example_nll
    from chats import causal_data, prompt_data
    from predicting import of_flags
    from quick import quicken
    from vocabulary import logits_nll

    model = load(Path(args.causal), paths, session).to(session.device).eval()
    quicken(model, session.device)
    every, _ = read_split(model, "train", paths)
    examples = [every[n] for n in chosen(len(every), args)]
    layout = model.settings.layout
    prompts = prompt_data(examples, model.tokenizer, **layout)
    numbers = list(range(len(examples)))
    batch = causal_data(examples, model.tokenizer, packed=False, **layout).collate(numbers)
    draw = draw_replies(prompts, args.new_tokens, options, session.device)
    arguments = of_flags(options.decoding(args.new_tokens))
    asked = session.move(prompts.collate(numbers))

    @sampling(args, session)
    def drawn():
        return draw(model, batch, 0, args.samples)

    @sampling(args, session)
    def drawn_alone():
        return model.generate(asked, num_return_sequences=args.samples, **arguments)

    replies = drawn()
    sampled = session.move(replies.batch)
    alone = session.move(scored_rows(one_reply_a_row(replies.batch["parts"], prompts, args.samples), model))

    def scored():
        return sampled_nll(model, sampled, options)

    def scored_alone():
        logits = within_top_k(model(alone), alone["target_ids"], alone["suppressed"], options)
        return example_nll(logits_nll(logits, alone["target_ids"]), alone)

    def gold():
        moved = session.move(batch)
        return logits_nll(model(moved), moved["target_ids"])

    draws, scores = {PLAIN: drawn_alone, OURS: drawn}, {PLAIN: scored_alone, OURS: scored}
    return Work(model, draws, scores, gold, examples, replies.texts)


def one_reply_a_row(parts: list[dict], prompts, samples: int) -> list[tuple]:
    """What `scored_rows` reads: each sampled reply behind a prompt of its own."""
    replies = [
        part["target_ids"][part["example_of"] == n] for part in parts for n in part["examples"].tolist()
    ]
    asked = prompts.collate(list(range(len(replies) // samples)))
    before = [ids[mask.bool()] for ids, mask in zip(asked["input_ids"], asked["attention_mask"], strict=True)]
    return [(before[n // samples], [reply]) for n, reply in enumerate(replies)]


def within_top_k(logits, drawn, suppressed, options):
    """(..., V), (...) -> the same without all that could not be drawn, at the draw's temperature."""
    import torch

    logits = logits.index_fill(-1, suppressed, -torch.inf) / options.sampled_temperature
    least = logits.detach().topk(options.sampled_top_k).values[..., -1:]
    kept = (logits >= least).scatter(-1, drawn.clamp(min=0)[..., None], True)
    return logits.masked_fill(~kept, -torch.inf)


def chosen(count: int, args) -> list[int]:
    import numpy as np

    return np.sort(np.random.default_rng(args.seed).permutation(count)[: args.contexts]).tolist()


def sampling(args, session) -> Callable[[Callable], Callable]:
    """Without a gradient, with the same random numbers each time."""
    import torch

    from session import own_random_stream

    def wrap(draw: Callable) -> Callable:
        def work():
            with torch.no_grad(), session.autocast(), own_random_stream(args.seed):
                return draw()

        return work

    return wrap


def with_gradient(loss: Callable, model, session) -> Callable:
    def work():
        with session.autocast():
            found = loss()
        found.sum().backward()
        model.zero_grad()
        return found.detach()

    return work


def measure(part: str, args, session, paths: Paths, critics: dict) -> dict:
    """{part: {way: seconds}}, printed as a table."""
    import torch

    from objectives import EnergyScore
    from settings import SampledOptions

    reporting.say(f"{part}: the generator and its dialogues")
    options = SampledOptions(1.0, "energy", args.samples, args.contexts, 20, 0.9)
    found = {"t5": t5_work, "causal": causal_work}[part](args, session, paths, options)
    examples, texts = found.examples, found.texts
    rewards = EnergyScore(critics, [e.history for e in examples], [e.response for e in examples])
    numbers = [n for n in range(len(examples)) for _ in range(args.samples)]
    work: dict[str, dict[str, Callable]] = {
        "draw": found.draw,
        "judge": {OURS: lambda: rewards.of(numbers, texts, args.samples)},
        "score": {way: with_gradient(score, found.model, session) for way, score in found.score.items()},
        "nll": {OURS: with_gradient(found.nll, found.model, session)},
    }
    taken = {}
    for name, each in work.items():
        taken[name], given = reporting.seconds(each, args.repeats)
        if name == "score":  # the same likelihood by either way
            torch.testing.assert_close(given[PLAIN], given[OURS], atol=0.05, rtol=0.02)
    print(f"\n{part}: {len(examples)} contexts, {len(texts)} replies, {session.precision}")
    rows: list[list] = []
    for name, seconds in taken.items():
        plain = seconds.get(PLAIN, seconds[OURS])
        rows.append([name, plain, seconds[OURS], plain / seconds[OURS]])
    totals = [sum(row[i] for row in rows) for i in (1, 2)]
    rows.append(["all", *totals, totals[0] / totals[1]])
    print(reporting.table(["part", PLAIN, OURS, "ratio"], rows), flush=True)
    return {"seconds": taken, "replies": len(texts), "times_faster": totals[0] / totals[1]}


def main(argv=None):
    args = parse_args(argv)
    session, paths, file = reporting.begin(args, "sampled_step")
    import bundled
    from critics import open_critics

    folders = {kind: Path(getattr(args, kind) or bundled.MINI / kind) for kind in CRITICS}
    critics = open_critics(folders, session, CRITICS)
    result = {part: measure(part, args, session, paths, critics) for part in args.part}
    reporting.write(file, vars(args), session.device.type, result)
    return result


if __name__ == "__main__":
    run(main)
