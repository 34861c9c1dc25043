"""Whether a language model knows the corpus by heart: the share of replies that it continues word for word.

  python train_causal_lm.py --epochs 0 --name zero-shot                     the base, as it stands
  python benchmarks/memorised.py saved/causal-lm/zero-shot saved/smollm2-empathetic

A model that has read the corpus on the web would make every figure on its test split worthless. So each
reply is begun with its own first words, and the model goes on greedily: counted are the replies whose next
words it then has exactly. Asked twice, since nobody knows how it would have read them: as a chat, and as
plain text, a turn a line. A few replies are guessed by anybody ("I'm so sorry to hear that ..."): another
model that cannot have read them, or an adapter beside its base, says how many. Writes
results/benchmarks/memorised.json.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import reporting
from options import COUNT, NATURAL, Paths, UserError, check, run


def parse_args(argv=None):
    parser = reporting.flags(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a causal run's folder")
    parser.add_argument("--split", choices=["train", "valid", "test"], default="test", help="whose replies")
    parser.add_argument("--given", type=NATURAL, default=4, help="words of a reply that the model is given")
    parser.add_argument("--words", type=NATURAL, default=8, help="words that it must then have exactly")
    parser.add_argument("--items", type=COUNT, default=0, help="replies asked for, drawn by --seed; 0: all")
    parser.add_argument("--batch-size", type=NATURAL, default=32, help="replies at a time")
    args = parser.parse_args(argv)
    names = [Path(place).name for place in args.runs]
    same = sorted({name for name in names if names.count(name) > 1})
    check(parser, args, [f"RUN {name}: two of one name; ask for them one after the other" for name in same])
    return args


def asked(model, example, given: int, words: int) -> dict[str, tuple[list[int], list[int]]]:
    """{way of asking: (the tokens before, the tokens that the model must go on with)}"""
    from chats import prompt_data

    tokenizer, settings = model.tokenizer, model.settings
    reply = example.response.split()[: given + words]

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    begun, whole = ids(" ".join(reply[:given])), ids(" ".join(reply))
    layout = settings.layout | {"tgt_len": None}
    chat = prompt_data([example], tokenizer, **layout).collate([0])["input_ids"][0]
    plain = ids("\n".join(example.history) + "\n")[-settings.src_len :]
    wanted = whole[len(begun) :]
    return {"chat": ([*chat.tolist(), *begun], wanted), "plain": ([*plain, *begun], wanted)}


def continued(
    model, rows: list[tuple[list[int], list[int]]], batch_size: int, title: str, session
) -> list[bool]:
    """Whether each row's wanted tokens are what the model would write greedily: each is the likeliest after
    those before it, which one pass over all of them tells."""
    import numpy as np
    import torch
    from tqdm import tqdm

    from chats import pad_id
    from dataloaders import pad, plan_once

    found = [False] * len(rows)
    plan = plan_once([len(before) + len(wanted) for before, wanted in rows], batch_size)
    for numbers in tqdm(plan, title, disable=None, leave=False):
        ids, mask = pad([np.array(sum(rows[i], [])) for i in numbers], pad_id(model.tokenizer))
        begins = torch.tensor([len(rows[i][0]) for i in numbers])[:, None]
        targets = (torch.arange(ids.shape[1]) >= begins) & mask.bool()  # (B, L)
        batch = session.move({"input_ids": ids, "attention_mask": mask, "target_mask": targets})
        with torch.inference_mode(), session.autocast():
            wrong = model(batch).argmax(-1).cpu() != ids[targets]  # (N,)
        missed = torch.zeros(len(numbers)).index_add(0, targets.nonzero()[:, 0], wrong.float())
        for number, misses in zip(numbers, missed.tolist(), strict=True):
            found[number] = misses == 0
    return found


def measure(place: str, examples: list, args, session) -> dict[str, float]:
    """{way of asking: the share of the replies that one model continues word for word}"""
    from causal_models import CausalGenerator

    model = CausalGenerator.from_pretrained(place, cache=Paths(args.workdir).cache, device=session.device)
    model = model.for_use(session.device)
    rows = [asked(model, e, args.given, args.words) for e in examples]
    shares = {}
    for way in ("chat", "plain"):
        found = continued(model, [row[way] for row in rows], args.batch_size, f"{place}, {way}", session)
        shares[way] = sum(found) / len(found)
    return shares


def main(argv=None):
    args = parse_args(argv)
    import numpy as np

    from corpora import listener_turns

    session, paths, file = reporting.begin(args, "memorised")
    long = args.given + args.words
    examples = [e for e in listener_turns(paths.dialogues(args.split)) if len(e.response.split()) >= long]
    if not examples:
        raise UserError(f"{paths.dialogues(args.split)}: no reply of {long} words; lower --given or --words")
    if args.items:
        drawn = np.random.default_rng(args.seed).permutation(len(examples))[: args.items]
        examples = [examples[i] for i in sorted(drawn)]
    print(f"{len(examples):,} replies of at least {long} words, {args.split} split")
    result = {"split": args.split, "replies": len(examples), "given": args.given, "words": args.words}
    shares = {}
    for place in args.runs:
        shares[Path(place).name] = found = measure(place, examples, args, session)
        print(f"{place}: " + ", ".join(f"{100 * v:.2f} % as {k}" for k, v in found.items()))
    reporting.write(file, vars(args), session.device.type, {**result, "shares": shares})
    return shares


if __name__ == "__main__":
    run(main)
