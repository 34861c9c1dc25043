"""Train one empathy critic: does a response show emotional reaction, exploration or interpretation?

  python train_empathy_classifier.py --epochs 12 --model "t5" --lr 1e-5 --dim emo
  python train_empathy_classifier.py --epochs 15 --model "glove-t5" --lr 2e-5 --dim exp --pooling first --layers 6 --context-len 100      (the paper's)
  python train_empathy_classifier.py --model glove-t5 --dim int                          (the recipe that learns)
  python train_empathy_classifier.py --model t5 --size tiny --dim emo --epochs 2         (offline, seconds)

Loss: cross-entropy. Kept: the epoch with the best macro-F1 on the validation side. Reported beside it: the majority
class, and TF-IDF + logistic regression on the response.
"""

import argparse

import options
from options import DIMENSIONS, Paths, UserError, add_common, add_device, add_training, check, make_parser

#: what `--model glove-t5` uses where a flag is not given: from scratch the paper's recipe stays at chance
GLOVE_DEFAULTS = {
    "pooling": "reply",
    "layers": 1,
    "context_len": 0,
    "word_dropout": 0.1,
    "head_dropout": 0.4,
    "lr": 5e-4,
}
T5_DEFAULTS = {
    "pooling": "first",
    "layers": None,
    "context_len": 100,
    "word_dropout": 0.0,
    "head_dropout": 0.1,
    "lr": 1e-5,
}


def add_critic_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that all four critics share."""
    group = parser.add_argument_group("critic")
    group.add_argument(
        "--model",
        default="t5",
        help="t5, glove-t5, or a hub name or folder of any encoder (T5, BERT, RoBERTa ...)",
    )
    group.add_argument(
        "--size",
        choices=["tiny", "small", "base", "large"],
        default="base",
        help="of --model t5: t5-base and so on, tiny is random weights made by prepare_data.py; of glove-t5: tiny, else width 300",
    )
    group.add_argument(
        "--pooling",
        choices=["first", "reply"],
        help="first position (the paper's; default but for glove-t5), or mean and max over the reply",
    )
    group.add_argument("--layers", type=int, help="depth of a glove-t5 encoder (default 1; the paper's 6)")
    group.add_argument(
        "--context-len",
        type=int,
        help="latest tokens of the context that are read (default 100, glove-t5 0: from scratch it only distracts)",
    )
    group.add_argument("--reply-len", type=int, default=64, help="first tokens of the reply that are read")
    group.add_argument("--dropout", type=float, default=0.1, help="inside the encoder")
    group.add_argument(
        "--word-dropout",
        type=float,
        help="share of word embeddings set to 0 in training (default 0, glove-t5 0.1)",
    )
    group.add_argument(
        "--head-dropout", type=float, help="before the linear head (default 0.1, glove-t5 0.4)"
    )


def settle(
    parser: argparse.ArgumentParser, args: argparse.Namespace, t5_lr: float = T5_DEFAULTS["lr"]
) -> argparse.Namespace:
    """Fill in what depends on the model, then check."""
    for name, value in (GLOVE_DEFAULTS if args.model == "glove-t5" else T5_DEFAULTS | {"lr": t5_lr}).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    problems = []
    if args.layers is not None and args.model != "glove-t5":
        problems.append("--layers: only a glove-t5 encoder has a choice of depth")
    check(
        parser,
        args,
        problems,
        reply_len=1,
        context_len=0,
        **({"layers": 1} if args.layers is not None else {}),
    )
    return args


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_common(parser)
    add_critic_flags(parser)
    parser.add_argument(
        "--dim",
        choices=list(DIMENSIONS),
        required=True,
        help="emotional reaction, exploration or interpretation",
    )
    parser.add_argument(
        "--class-weights",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="weight classes by inverse frequency",
    )
    add_training(parser, epochs=12, lr=None, batch_size=16)
    add_device(parser)
    return settle(parser, parser.parse_args(argv))


def family_name(args) -> str:
    """t5, glove-t5, or the last part of a name or folder: names the run, so that the commands chain."""
    return args.model if args.model in ("t5", "glove-t5") else args.model.rstrip("/").split("/")[-1]


def load_backbone(args, paths: Paths):
    """(tokenizer, encoder) for --model and --size."""
    from glove_models import glove_config, load_vectors, set_word_vectors
    from inference import require
    from models import load_encoder, load_tokenizer, new_encoder

    if args.model == "glove-t5":
        tokenizer = load_tokenizer(require(paths.glove))
        size = "tiny" if args.size == "tiny" else "paper"
        config = glove_config(tokenizer, size, args.dropout, num_layers=args.layers)
        encoder = new_encoder(config)
        set_word_vectors(encoder.get_input_embeddings(), load_vectors(paths.glove), args.seed)
        return tokenizer, encoder
    tiny = args.model == "t5" and args.size == "tiny"
    name = require(paths.t5_tiny) if tiny else f"t5-{args.size}" if args.model == "t5" else args.model
    return load_tokenizer(name), load_encoder(name, from_scratch=tiny, dropout=args.dropout)


def train_critic(
    args,
    kind: str,
    train: tuple,
    valid: tuple,
    outputs: int,
    inputs: list,
    measure,
    metric: str,
    mode: str,
    baselines: dict,
    class_weights=None,
):
    """Train the critic of one `kind`: the one function behind all four.

    `train`, `valid`: (contexts as lists of turns, replies, targets). `measure(gold, raw scores (N, outputs)) -> {name: value}`.
    """
    import torch

    from dataloaders import critic_data, plan_once, tokenizer_hash
    from models import Critic
    from session import Session
    from training import Loop, Objective

    session = Session(args)
    paths = Paths(args.workdir)
    tokenizer, encoder = load_backbone(args, paths)
    settings = {
        "kind": kind,
        "outputs": outputs,
        "backbone": encoder.config.to_dict(),
        "tokenizer": tokenizer_hash(tokenizer),
    }
    settings |= {
        k: getattr(args, k) for k in ("pooling", "context_len", "reply_len", "head_dropout", "word_dropout")
    }
    critic = Critic(settings, encoder)
    data, held = (critic_data(*side, tokenizer, settings, paths.cache) for side in (train, valid))
    weights = None if class_weights is None else torch.tensor(class_weights, device=session.device)

    def scores_of(model, batch):
        return model(batch["input_ids"], batch["attention_mask"], batch["reply_mask"])

    # loss = sum over examples of cross-entropy or squared error / number of examples (with class weights: their sum)
    def terms(model, batch):
        return {kind: critic.loss_sum(scores_of(model, batch), batch["targets"], weights)}

    def units(batch):
        count = (
            len(batch["targets"])
            if weights is None
            else float(torch.tensor(class_weights)[batch["targets"]].sum())
        )
        return {kind: count}

    def evaluate():
        found = []
        for numbers in session.over(plan_once(held.lengths, 4 * args.batch_size), "valid"):
            batch = session.move(held.collate(numbers))
            with session.autocast():
                found += zip(numbers, scores_of(critic, batch).tolist(), strict=True)
        scores = dict(session.gather(found))
        return measure(valid[2], [scores[i] for i in range(len(held))])

    def export(folder):
        critic.save_pretrained(folder)
        tokenizer.save_pretrained(str(folder))

    folder = (
        paths.saved
        / ("sentiment" if kind == "sentiment" else "empathy")
        / (args.name or paths.critic(kind, family_name(args)).name)
    )
    objective = Objective({kind: 1.0}, units, terms)
    loop = Loop(
        args,
        session,
        critic,
        objective,
        data,
        evaluate,
        export,
        folder,
        files=inputs,
        inputs={"tokenizer": settings["tokenizer"]},
        metric=metric,
        mode=mode,
    )
    result = loop.train()
    if result.get("already_finished"):
        return result
    result |= {"kind": kind, "valid": loop.measure(), "baselines": baselines}
    report(result, session)
    loop.finish(result)
    return result


def report(result: dict, session) -> None:
    """The critic beside its baselines, one row each."""
    names = list(result["valid"])
    session.say(
        f"{result['kind']}: on the validation side, whose best epoch was chosen there too (a little flattering)"
    )
    session.say("  " + " ".join(f"{n:>12}" for n in ["", *names]))
    for row, values in {**result["baselines"], "this critic": result["valid"]}.items():
        session.say("  " + " ".join([f"{row:>12}", *(f"{values[n]:12.3f}" for n in names)]))


def main(argv=None):
    args = parse_args(argv)
    import metrics
    from dataloaders import read_pairs

    paths = Paths(args.workdir)
    files = [paths.pairs(args.dim, split) for split in ("train", "valid")]
    train, valid = (read_pairs(f) for f in files)
    labels = int(max(train["label"].max(), valid["label"].max())) + 1
    if train["label"].nunique() < 2:
        raise UserError(f"{files[0]}: every label is {train['label'].iloc[0]}; there is nothing to learn")
    counts = train["label"].value_counts()
    weights = (
        [len(train) / (labels * max(int(counts.get(i, 0)), 1)) for i in range(labels)]
        if args.class_weights
        else None
    )
    sides = [
        ([(post,) for post in t["seeker_post"]], t["response_post"].tolist(), t["label"].tolist())
        for t in (train, valid)
    ]
    baselines = metrics.classification_baselines(sides[0][1:], sides[1][1:], labels)

    def measure(gold, scores):
        return metrics.classification(
            gold, [max(range(labels), key=row.__getitem__) for row in scores], labels
        )

    train_critic(args, args.dim, *sides, labels, files, measure, "macro_f1", "max", baselines, weights)


if __name__ == "__main__":
    options.run(main)
