"""Train the T5 generator: empathetic replies, guided by exemplars and by frozen critics.

  python train_t5.py --epochs 15 --lr 1e-4                                    LEMPEx on T5-small
  python train_t5.py --add-exemplars none --empathy-loss-w 0 --sentiment-loss-w 0        plain T5: the paper's T5-PT
  python train_t5.py --model t5-tiny --epochs 1 --workdir demo                offline, random weights
  python train_t5.py --inference saved/t5/lempex --beams 8 --overwrite        only write a run's predictions again

    loss = main_w * nll + empathy_w * (emo + exp + int) + sentiment_w * sentiment        (paper, eq. 14)

nll is averaged over reply tokens; the critics' losses, against the labels of the gold reply, over examples. Kept: the
evaluation with the lowest validation nll. Afterwards the run's predictions.tsv and likelihood.csv of the test split.
"""

import argparse
from pathlib import Path

import options
from options import Paths, UserError, add_common, add_device, add_training, check, make_parser

PARAPHRASER = "Vamsi/T5_Paraphrase_Paws"


def add_generator_flags(parser: argparse.ArgumentParser) -> None:
    """What both generators share."""
    group = parser.add_argument_group("exemplars")
    group.add_argument(
        "--add-exemplars",
        choices=["none", "prepend", "t5", "glove-t5"],
        default="prepend",
        help="prepend their text to the source; or the paper's pooled vector, by a frozen T5 or by a GloVe encoder trained along",
    )
    group.add_argument("--top-exemplars", type=int, default=10, help="exemplars for each example")
    group.add_argument(
        "--exemplar-len",
        type=int,
        default=150,
        help="source tokens that prepended exemplars share; or tokens of one pooled exemplar",
    )
    group.add_argument(
        "--exemplar-model",
        default=PARAPHRASER,
        help="of --add-exemplars t5: hub name or folder (t5-tiny: offline)",
    )
    group.add_argument(
        "--exemplar-layers", type=int, default=6, help="of --add-exemplars glove-t5: depth of its encoder"
    )
    group.add_argument(
        "--exemplars", metavar="DIR", help="folder of {split}_dpr.csv (default: data/empathetic_dialogues)"
    )
    group = parser.add_argument_group("losses")
    group.add_argument(
        "--main-loss-w", type=float, default=1.0, help="weight of the reply's negative log-likelihood"
    )
    group.add_argument(
        "--empathy-loss-w",
        type=float,
        default=1.0,
        help="weight of the three empathy critics' losses; 0 loads none of them",
    )
    group.add_argument(
        "--sentiment-loss-w",
        type=float,
        default=1.0,
        help="weight of the sentiment critic's loss; 0 does not load it",
    )
    group.add_argument(
        "--strategy",
        type=int,
        choices=[0, 1, 2],
        default=0,
        help="soft reply: 0 softmax, 1 Gumbel-softmax, 2 straight-through Gumbel",
    )
    for kind in options.CRITICS:
        group.add_argument(
            f"--{kind}", metavar="RUN", help=f"run folder of the {kind} critic (default: this family's)"
        )
    group.add_argument(
        "--labels", metavar="DIR", help="folder of {split}_labels.csv (default: data/empathetic_dialogues)"
    )
    group = parser.add_argument_group("lengths and decoding")
    group.add_argument("--src-len", type=int, default=200, help="latest tokens of the dialogue")
    group.add_argument("--tgt-len", type=int, default=50, help="tokens of a reply in training")
    group.add_argument("--dropout", type=float, default=0.1, help="inside the generator")
    group.add_argument("--top-k", type=int, default=20, help="sample among so many most likely tokens")
    group.add_argument("--temperature", type=float, default=0.9, help="of sampling")
    group.add_argument(
        "--beams", type=int, default=1, help="above 1: beam search in place of sampling (the paper: 8)"
    )
    group.add_argument(
        "--max-new-tokens", type=int, default=100, help="a reply that has not ended by then is cut"
    )
    group.add_argument(
        "--predict",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write predictions after training",
    )
    group.add_argument("--predict-split", choices=["valid", "test"], default="test", help="whose predictions")
    group.add_argument("--predict-batch-size", type=int, default=64, help="replies written at a time")
    group.add_argument(
        "--inference",
        metavar="RUN",
        help="train nothing; write predictions of this finished run, with its own lengths and exemplars",
    )


#: flags that change what is written after training, not the training
DECODING = {
    "top_k",
    "temperature",
    "beams",
    "max_new_tokens",
    "predict",
    "predict_split",
    "predict_batch_size",
    "inference",
}


def settle(
    parser: argparse.ArgumentParser, args: argparse.Namespace, **at_least: float
) -> argparse.Namespace:
    problems = []
    if args.temperature <= 0:
        problems.append(f"--temperature {args.temperature}: must be above 0")
    if not args.main_loss_w + args.empathy_loss_w + args.sentiment_loss_w:
        problems.append(
            "--main-loss-w, --empathy-loss-w and --sentiment-loss-w are all 0: nothing to train on"
        )
    check(
        parser,
        args,
        problems,
        top_exemplars=1,
        exemplar_len=2,
        exemplar_layers=1,
        main_loss_w=0,
        empathy_loss_w=0,
        sentiment_loss_w=0,
        src_len=1,
        tgt_len=2,
        top_k=1,
        beams=1,
        max_new_tokens=1,
        predict_batch_size=1,
        **at_least,
    )
    return args


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_common(parser)
    parser.add_argument(
        "--model",
        default="t5-small",
        help="hub name or folder of a T5; t5-tiny: random weights, made by prepare_data.py",
    )
    parser.add_argument("--from-scratch", action="store_true", help="the model's config with random weights")
    add_generator_flags(parser)
    add_training(parser, epochs=15, lr=1e-4, batch_size=8)
    add_device(parser)
    return settle(parser, parser.parse_args(argv))


def load_t5(args, paths: Paths):
    """(tokenizer, T5) for --model."""
    from transformers import AutoConfig, T5ForConditionalGeneration

    from inference import require
    from models import from_hub, load_pretrained, load_tokenizer

    tiny = args.model == "t5-tiny"
    name = require(paths.t5_tiny) if tiny else args.model
    config = from_hub(AutoConfig.from_pretrained, name)
    if config.model_type != "t5":
        raise UserError(f"--model {args.model}: a {config.model_type} model; the generator needs a T5")
    config.dropout_rate = args.dropout
    if tiny or args.from_scratch:
        return load_tokenizer(name), T5ForConditionalGeneration(config)
    return load_tokenizer(name), load_pretrained(T5ForConditionalGeneration, name, config)


# ------------------------------------------------------------------------------------------------------------- parts


def choose_critics(args, family: str, paths: Paths, session, tokenizer_hash: str):
    """(the frozen critics that the weights ask for or None, {name: sha256}); says how good each one is."""
    import storage
    from inference import load_critics
    from models import CriticSet, critic_names

    folders = {
        k: Path(getattr(args, k) or paths.critic(k, family))
        for k in critic_names(args.empathy_loss_w > 0, args.sentiment_loss_w > 0)
    }
    if not folders:
        return None, {}
    critics = CriticSet(load_critics(folders, family, session.device), session.device)
    critics.check_tokenizer(tokenizer_hash)
    for kind, folder in folders.items():
        if args.tgt_len > critics.critics[kind].settings["reply_len"] + 1:
            raise UserError(
                f"--tgt-len {args.tgt_len}: the {kind} critic reads only {critics.critics[kind].settings['reply_len']} tokens of a reply"
            )
        session.say(f"critic {kind}: {folder} | {quality(folder)}")
    checksums = {k: storage.sha256(f / "model.safetensors") for k, f in folders.items()}
    labels = paths.labels("train", args.labels)
    made_by = storage.read_origin(labels)
    for kind in made_by.keys() & checksums.keys():
        if made_by[kind]["sha256"] != checksums[kind]:
            session.say(
                f"note: the {kind} labels in {labels.parent} are of {made_by[kind]['critic']}, another critic than the loss's"
            )
    return critics, {f"critic {k}": digest for k, digest in checksums.items()}


def quality(folder: Path) -> str:
    """A critic's own figures beside its baselines, and a plain warning where it is no better than chance."""
    import storage

    result = storage.read_json(folder / "result.json")
    valid, baselines = result["valid"], result["baselines"]
    if "mse" in valid:
        text, useless = (
            f"mse {valid['mse']:.4f} (the mean's {baselines['mean']['mse']:.4f})",
            not valid["mse"] < baselines["mean"]["mse"],
        )
    else:
        rows = [valid, baselines["majority"], baselines["tfidf"]]
        text = "macro-F1 {:.1f} (majority class {:.1f}, TF-IDF {:.1f})".format(*(r["macro_f1"] for r in rows))
        useless = (
            not valid["accuracy"] > baselines["majority"]["accuracy"]
            and not valid["macro_f1"] > baselines["majority"]["macro_f1"] + 5
        )
    return text + (
        " | WARNING: no better than guessing, its loss will be noise; train it longer or set its weight to 0"
        if useless
        else ""
    )


def build(args, family: str, load, paths: Paths, session):
    """(tokenizer, Generator) for the flags."""
    from dataloaders import tokenizer_hash
    from glove_models import glove_config, load_vectors, set_word_vectors
    from inference import require
    from models import Generator, from_hub, load_tokenizer

    tokenizer, t5 = load(args, paths)
    settings = {
        "family": family,
        "exemplars": args.add_exemplars,
        "exemplar_width": 0,
        "exemplar_backbone": None,
        "exemplar_tokenizer": None,
        "tokenizer": tokenizer_hash(tokenizer),
    }
    settings |= {
        k: getattr(args, k) for k in ("src_len", "tgt_len", "exemplar_len", "top_exemplars", "exemplar_model")
    }
    settings["backbone"] = t5.config.to_dict()
    if args.add_exemplars == "t5":
        from transformers import AutoConfig

        name = require(paths.t5_tiny) if args.exemplar_model == "t5-tiny" else args.exemplar_model
        settings["exemplar_width"] = from_hub(AutoConfig.from_pretrained, name).d_model
    if args.add_exemplars == "glove-t5":
        size = (
            getattr(args, "size", "paper")
            if family == "glove-t5"
            else "tiny"
            if args.model == "t5-tiny"
            else "paper"
        )
        words = load_tokenizer(require(paths.glove))
        settings["exemplar_backbone"] = glove_config(
            words, size, args.dropout, num_layers=args.exemplar_layers
        ).to_dict()
        settings["exemplar_tokenizer"] = tokenizer_hash(words)
    model = Generator(settings, t5)
    if args.add_exemplars == "glove-t5":
        set_word_vectors(model.exemplar_encoder.get_input_embeddings(), load_vectors(paths.glove), args.seed)
    return tokenizer, model


# --------------------------------------------------------------------------------------------------------- the stage


def train_generator(args, family: str, load) -> dict | None:
    """Train and predict: the one function behind both generators. `load(args, paths) -> (tokenizer, T5)`."""
    from dataloaders import plan_once
    from inference import infer, split_data, uninformed_losses, validate, write_predictions
    from models import soft_response, token_nll
    from session import Session
    from training import Loop, Objective

    session = Session(args)
    paths = Paths(args.workdir)
    if args.inference:
        return infer(args, Path(args.inference), session, paths)
    tokenizer, model = build(args, family, load, paths, session)
    critics, checksums = choose_critics(args, family, paths, session, model.settings["tokenizer"])
    _, data = split_data(args, model.settings, "train", tokenizer, session, paths, critics, whole=False)
    held_examples, held = split_data(args, model.settings, "valid", tokenizer, session, paths, critics)
    for kind, (loss, prior) in uninformed_losses(critics, data, session).items() if critics else ():
        warning = (
            " | WARNING: confidently wrong there; from scratch, a weight of 0.1 or less keeps it from leading"
            if loss > 2 * prior + 0.1
            else ""
        )
        session.say(
            f"critic {kind} on a reply that says nothing: loss {loss:.2f}, of a guess by frequency {prior:.2f}{warning}"
        )
    # read before the training: what would be missing after it is missed now
    predicted = (
        split_data(args, model.settings, args.predict_split, tokenizer, session, paths)
        if args.predict
        else ()
    )

    weights = {"nll": args.main_loss_w}
    for kind in critics.critics if critics else ():
        weights[kind] = args.sentiment_loss_w if kind == "sentiment" else args.empathy_loss_w

    def terms(wrapped, batch, strategy=args.strategy):
        logits = wrapped(batch)  # (B, T, V)
        out = {"nll": token_nll(logits, batch["labels"]).sum()}
        if critics:
            out |= critics.losses(soft_response(logits, strategy), (batch["labels"] != -100).long(), batch)
        return out

    def units(batch):
        return {
            k: int((batch["labels"] != -100).sum()) if k == "nll" else len(batch["labels"]) for k in weights
        }

    def evaluate():
        batches = plan_once(held.lengths, 2 * args.batch_size, 2 * args.batch_tokens)
        responses = [e.response for e in held_examples]
        return validate(
            held,
            batches,
            responses,
            list(weights),
            lambda batch: terms(model, batch, strategy=0),
            units,
            session,
        )

    def export(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(str(folder))

    folder = paths.saved / family / (args.name or default_name(args))
    files = [paths.dialogues(s) for s in ("train", "valid")]
    files += [paths.exemplars(s, args.exemplars) for s in ("train", "valid") if args.add_exemplars != "none"]
    files += [paths.labels(s, args.labels) for s in ("train", "valid") if critics]
    inputs = checksums | {k: v for k in ("tokenizer", "exemplar_tokenizer") if (v := model.settings[k])}
    loop = Loop(
        args,
        session,
        model,
        Objective(weights, units, terms),
        data,
        evaluate,
        export,
        folder,
        files=files,
        inputs=inputs,
        free=DECODING,
        metric="nll",
        mode="min",
    )
    result = loop.train()
    if result.get("already_finished"):
        return result
    result |= {"valid": loop.measure()}
    if args.predict and session.main:
        result[args.predict_split] = write_predictions(
            args, folder, model, tokenizer, *predicted, session, paths
        )
    loop.finish(result)
    session.say(f"next: python evaluate_responses.py {folder}")
    return result


def default_name(args) -> str:
    """lempex, or what the ablation leaves of it."""
    name = {"none": "plain", "prepend": "exemplars", "t5": "pool-t5", "glove-t5": "pool-glove"}[
        args.add_exemplars
    ]
    full = args.empathy_loss_w > 0 and args.sentiment_loss_w > 0
    if full:
        return {"exemplars": "lempex"}.get(name, f"{name}-critics")
    return (
        name
        + ("-empathy" if args.empathy_loss_w > 0 else "")
        + ("-sentiment" if args.sentiment_loss_w > 0 else "")
    )


def main(argv=None):
    train_generator(parse_args(argv), "t5", load_t5)


if __name__ == "__main__":
    options.run(main)
