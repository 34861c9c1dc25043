"""Texts embedded a second: padded to one length in file order against batches of like length, each text once.

  python benchmarks/embed.py --workdir demo
  python benchmarks/embed.py --texts 1024 --batch-size 64 --device cuda
  python benchmarks/embed.py --stand-in --texts 40000 --device cuda       no files: random words and weights

The plain way reads every text, also one that came before, in file order and padded to --padded tokens;
beside it, padded to its batch's longest only. Ours is DPR.biencoder.embed, as every stage uses it. Texts are
training replies and the dialogues before them, in equal number, with as many copies as the corpus has.
Printed: texts and tokens a second, the ratio, and by how much any number of a vector differs from the plain
way's.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import reporting
from options import NATURAL, TOKENS, Paths, run


def parse_args(argv=None):
    parser = reporting.flags(__doc__)
    add = parser.add_argument
    add("--stand-in", action="store_true", help="random weights of MiniLM's shape, texts of random words")
    add("--encoder", default="minilm", help="hub name or folder of a BERT, or minilm")
    add("--pooling", choices=["cls", "mean"], default="mean", help="the vector of an encoder")
    add("--texts", type=NATURAL, default=512, help="replies and dialogues, from the first training turns")
    add("--padded", type=TOKENS, default=256, help="tokens to which the plain way pads, and cuts, every text")
    add("--batch-size", type=NATURAL, default=32, help="texts in one forward pass, in all ways")
    add("--repeats", type=NATURAL, default=1, help="turns of each way, of which the fastest counts")
    return reporting.parsed(parser, argv)


def real(args, paths: Paths) -> tuple:
    """The encoder, its tokenizer, and the first training turns."""
    from corpora import listener_turns
    from DPR.biencoder import load_side, require_fitting, resolve
    from pretrained import load_tokenizer

    encoder = load_side(args.encoder, "context", args.pooling)
    tokenizer = load_tokenizer(resolve(args.encoder))
    require_fitting(encoder, tokenizer, "--padded", args.padded)
    turns = listener_turns(paths.dialogues("train"))[: (args.texts + 1) // 2]
    return encoder, tokenizer, turns


def stand_in(args) -> tuple:
    """The same, drawn by chance: no text comes twice."""
    from transformers import DPRConfig, DPRContextEncoder

    from benchmarks.shapes import MINILM
    from benchmarks.steps import drawn_examples, words

    encoder = DPRContextEncoder(DPRConfig(**MINILM))
    encoder.config.pooling = args.pooling
    turns, _ = drawn_examples((args.texts + 1) // 2, MINILM["vocab_size"], args.seed)
    return encoder, words(MINILM["vocab_size"]), turns


def main(argv=None):
    args = parse_args(argv)
    import numpy as np
    import torch

    from dataloaders import pad
    from DPR.biencoder import embed, tokenize, vectors
    from session import Session

    session, paths, file = reporting.begin(args, "embed")
    encoder, tokenizer, turns = stand_in(args) if args.stand_in else real(args, paths)
    texts = [text for turn in turns for text in (" ".join(turn.history), turn.response)][: args.texts]
    encoder = encoder.to(session.device).eval()
    read: dict[str, int] = {}

    def in_file_order(width: int | None) -> np.ndarray:
        rows = tokenize(tokenizer, texts, args.padded, keep_latest=False)
        out, read["tokens"] = [], sum(map(len, rows))
        for start in range(0, len(rows), args.batch_size):
            ids, mask = pad(rows[start : start + args.batch_size], tokenizer.pad_token_id)
            short = (width or ids.shape[1]) - ids.shape[1]
            ids = torch.nn.functional.pad(ids, (0, short), value=tokenizer.pad_token_id)
            mask = torch.nn.functional.pad(mask, (0, short))
            with torch.inference_mode(), session.autocast():
                out.append(vectors(encoder, session.move(ids), session.move(mask)).float().cpu().numpy())
        return np.concatenate(out)

    def ours(session=session) -> np.ndarray:
        title = "texts"
        return embed(encoder, tokenizer, texts, session, args.padded, False, title, args.batch_size)

    ways = {
        f"file order, padded to {args.padded}": lambda: in_file_order(args.padded),
        "file order, padded to the batch": lambda: in_file_order(None),
        "ours": ours,
    }
    skipped = ""
    if session.precision == "bf16":
        skipped = "bf16 is what all ways were measured in (--precision)"
    elif reporting.knows_bf16(session.device.type):
        half = Session(args.device, "bf16", args.seed)
        ways["ours, bf16"] = lambda: ours(half)
    else:
        skipped = "bf16 left out: this processor has no instructions for it, and only imitates it"
    reporting.say("warming up")
    embed(encoder, tokenizer, texts[:2], session, args.padded, False, "warming up")
    taken, given = reporting.seconds(ways, args.repeats)
    first = next(iter(taken))
    rows = []
    for way, seconds in taken.items():
        apart = float(np.abs(given[way] - given[first]).max())
        rows.append([way, len(texts) / seconds, read["tokens"] / seconds, taken[first] / seconds, apart])
    distinct = len(set(texts))
    print(
        f"\n{len(texts):,} texts, {distinct:,} of them distinct, {read['tokens']:,} tokens, "
        f"{session.precision}"
    )
    print(reporting.table(["way", "texts a second", "tokens a second", "times plain", "differs by"], rows))
    if skipped:
        print(skipped)
    result = {"seconds": taken, "texts": len(texts), "distinct": distinct, **read, "skipped": skipped}
    result["times_plain"] = {way: taken[first] / seconds for way, seconds in taken.items()}
    reporting.write(file, vars(args), session.device.type, result)
    return result


if __name__ == "__main__":
    run(main)
