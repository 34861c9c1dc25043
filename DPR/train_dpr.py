"""Fine-tune the dense passage retriever: two BERT encoders, inner product, in-batch + hard + other negatives.

  python -m DPR.train_dpr --dataset empd --epochs 8 --warmup-steps 1237          (the paper's: from facebook/dpr-*)
  python -m DPR.train_dpr --dataset empd --encoder minilm --pooling mean --epochs 1
  torchrun --standalone --nproc-per-node=2 -m DPR.train_dpr ...        in-batch negatives come from both processes

Kept: the evaluation with the lowest average rank of the positive among all passages of the held-out questions.
Saved as two folders, question_encoder/ and context_encoder/, that `from_pretrained` loads.
"""

import json

import options
from options import Paths, UserError, add_common, add_device, add_training, check, make_parser

HUB = {
    "question": "facebook/dpr-question_encoder-single-nq-base",
    "context": "facebook/dpr-ctx_encoder-single-nq-base",
}


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_common(parser)
    group = parser.add_argument_group("retriever")
    group.add_argument(
        "--dataset",
        choices=["empd", "reddit", "empd-reddit"],
        default="empd",
        help="which file of DPR.prepare_dpr_data",
    )
    group.add_argument(
        "--encoder",
        help="hub name or folder of a BERT that both encoders begin from, or minilm (default: facebook/dpr-*)",
    )
    group.add_argument(
        "--question-encoder", default=HUB["question"], help="where the question encoder begins"
    )
    group.add_argument("--context-encoder", default=HUB["context"], help="where the passage encoder begins")
    group.add_argument(
        "--pooling",
        choices=["cls", "mean"],
        default="cls",
        help="cls is DPR's; mean for encoders trained so (MiniLM)",
    )
    group.add_argument(
        "--max-length", type=int, default=128, help="tokens of a question; the latest are kept"
    )
    group.add_argument("--max-passage-length", type=int, default=64, help="tokens of a passage")
    group.add_argument("--hard-negatives", type=int, default=1, help="per question")
    group.add_argument("--other-negatives", type=int, default=1, help="per question")
    group.add_argument(
        "--valid-queries",
        type=int,
        default=1000,
        help="held-out questions for average rank and recall; 0: all",
    )
    add_training(parser, epochs=8, lr=2e-5, batch_size=16, clip=2.0)
    parser.set_defaults(schedule="linear")
    add_device(parser)
    args = parser.parse_args(argv)
    problems = [
        f"--{n.replace('_', '-')} {getattr(args, n)}: must be 8 to 512"
        for n in ("max_length", "max_passage_length")
        if not 8 <= getattr(args, n) <= 512
    ]
    if args.batch_size in (1, "auto") and not args.hard_negatives + args.other_negatives:
        problems.append(
            f"--batch-size {args.batch_size} without negatives: there may be nothing to tell the positive from"
        )
    check(parser, args, problems, hard_negatives=0, other_negatives=0, valid_queries=0)
    return args


def read_entries(path) -> list[dict]:
    """The JSON of DPR.prepare_dpr_data (or published DPR data), checked."""
    if not path.exists():
        raise UserError(f"{path}: no such file; make it with: python -m DPR.prepare_dpr_data")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(entries, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error

    def texts(passages):
        return isinstance(passages, list) and all(
            isinstance(p, dict) and isinstance(p.get("text"), str) for p in passages
        )

    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: expected a JSON list of questions")
    for n, e in enumerate(entries):
        good = isinstance(e, dict) and isinstance(e.get("question"), str) and e.get("positive_ctxs")
        if not good or not all(
            texts(e.get(k, [])) for k in ("positive_ctxs", "hard_negative_ctxs", "negative_ctxs")
        ):
            raise UserError(
                f"{path}, entry {n}: needs question, and positive_ctxs (not empty), hard_negative_ctxs, negative_ctxs with a text each"
            )
    return entries


def passages_of(entry: dict, hard: int, other: int) -> list[str]:
    """The positive first, then the negatives of the question itself."""
    chosen = (
        entry["positive_ctxs"][:1]
        + entry.get("hard_negative_ctxs", [])[:hard]
        + entry.get("negative_ctxs", [])[:other]
    )
    return [p["text"] for p in chosen]


def training_data(entries: list[dict], args, tokenizers: dict):
    """Batches of questions with their passages; `text_numbers` tells copies of one text apart from negatives."""

    import torch

    from dataloaders import Data, pad
    from DPR.biencoder import tokenize

    questions = tokenize(
        tokenizers["question"], [e["question"] for e in entries], args.max_length, keep_latest=True
    )
    passages = [passages_of(e, args.hard_negatives, args.other_negatives) for e in entries]
    texts = list(dict.fromkeys(t for row in passages for t in row))
    number = {t: i for i, t in enumerate(texts)}
    encoded = tokenize(tokenizers["context"], texts, args.max_passage_length, keep_latest=False)

    def collate(numbers: list[int]) -> dict:
        chosen = [number[t] for i in numbers for t in passages[i]]
        sizes = torch.tensor([len(passages[i]) for i in numbers])
        question_ids, question_mask = pad(
            [questions[i] for i in numbers], tokenizers["question"].pad_token_id
        )
        context_ids, context_mask = pad([encoded[n] for n in chosen], tokenizers["context"].pad_token_id)
        return {
            "ids": [f"question {i}" for i in numbers],
            "question_ids": question_ids,
            "question_mask": question_mask,
            "context_ids": context_ids,
            "context_mask": context_mask,
            "positive": sizes.cumsum(0) - sizes,  # (B,): where each question's passages begin, its positive
            "text_numbers": torch.tensor(chosen),  # (N,)
        }

    return Data([len(q) for q in questions], collate)


def rank_report(questions, contexts, positive) -> dict[str, float]:
    """Average rank (0 is best) of each question's positive among all passages, and recall@k in percent.

    questions (Q, E), contexts (P, E), positive (Q,). Ties count half, so that constant vectors rank in the middle.
    """
    import numpy as np

    scores = questions @ contexts.T  # (Q, E) @ (E, P) -> (Q, P)
    own = scores[np.arange(len(positive)), positive][:, None]
    ranks = (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2
    return {
        "average_rank": float(ranks.mean()),
        **{f"recall_{k}": 100 * float((ranks < k).mean()) for k in (1, 10, 50)},
    }


def main(argv=None):
    args = parse_args(argv)
    import numpy as np

    from dataloaders import tokenizer_hash
    from DPR.biencoder import BiEncoder, dpr_loss, embed, load_side, load_tokenizer
    from session import Session
    from training import Loop, Objective

    session = Session(args)
    paths = Paths(args.workdir)
    files = [paths.dpr_data(args.dataset, split) for split in ("train", "valid")]
    entries, held = (read_entries(f) for f in files)
    begin = {
        "question": args.encoder or args.question_encoder,
        "context": args.encoder or args.context_encoder,
    }
    tokenizers = {side: load_tokenizer(name) for side, name in begin.items()}
    model = BiEncoder(*(load_side(name, side, args.pooling) for side, name in begin.items())).to(
        session.device
    )
    data = training_data(entries, args, tokenizers)

    rng = np.random.default_rng(args.seed)
    chosen = rng.permutation(len(held))[: args.valid_queries or None]
    held = [held[i] for i in sorted(chosen)]
    pool = list(dict.fromkeys(t for e in held for t in passages_of(e, 1, 1)))
    place = {t: i for i, t in enumerate(pool)}
    positive = np.array([place[e["positive_ctxs"][0]["text"]] for e in held])

    def terms(wrapped, batch):
        questions, contexts = wrapped(batch)
        numbers, where = batch["text_numbers"], batch["positive"]
        own = numbers[where]  # (B,) text of each question's positive
        if session.world > 1:
            contexts, numbers, before = session.gather_rows(contexts, numbers, counted=not batch["stand_in"])
            where = where * 0 if batch["stand_in"] else where + before
        return {"nll": dpr_loss(questions, contexts, where, own[:, None] == numbers[None])}

    def evaluate():
        q = embed(
            model.question,
            tokenizers["question"],
            [e["question"] for e in held],
            session,
            args.max_length,
            True,
            "valid questions",
        )
        c = embed(
            model.context,
            tokenizers["context"],
            pool,
            session,
            args.max_passage_length,
            False,
            "valid passages",
        )
        return rank_report(q, c, positive)

    def export(folder):
        for side, encoder in (("question", model.question), ("context", model.context)):
            encoder.save_pretrained(str(folder / f"{side}_encoder"))
            tokenizers[side].save_pretrained(str(folder / f"{side}_encoder"))

    folder = paths.saved / "dpr" / (args.name or args.dataset)
    objective = Objective({"nll": 1.0}, lambda batch: {"nll": len(batch["positive"])}, terms)
    loop = Loop(
        args,
        session,
        model,
        objective,
        data,
        evaluate,
        export,
        folder,
        files=files,
        inputs={f"{side} tokenizer": tokenizer_hash(t) for side, t in tokenizers.items()},
        metric="average_rank",
        mode="min",
        micro_batches_matter=True,
        evaluate_first=True,
    )
    session.say(f"held out: {len(held):,} questions, {len(pool):,} passages")
    result = loop.train()
    if result.get("already_finished"):
        return
    result |= {
        "questions": len(held),
        "passages": len(pool),
        "before": loop.run.logged("valid")[0],
        "after": loop.measure(),
    }
    for when in ("before", "after"):
        session.say(f"{when}: {result[when]}")
    loop.finish(result)


if __name__ == "__main__":
    options.run(main)
