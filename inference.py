"""What is computed with trained models, in bulk: a run's data, likelihood, replies, and critics' scores.

Stands on the ground modules; the training scripts, the tables, and later the chat page stand on this.
"""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

import runs
import storage
from dataloaders import (
    Data,
    Example,
    fingerprint,
    generator_data,
    hash_seed,
    listener_turns,
    pad,
    plan_once,
    pooled_tokens,
    pooled_vectors,
    read_exemplars,
    read_labels,
    tokenizer_hash,
)
from metrics import count_words, perplexity
from models import EXEMPLAR_PREFIX, Critic, CriticSet, Generator, load_encoder, load_tokenizer, token_nll
from options import DIMENSIONS, Paths, UserError, refuse_existing
from session import Session, own_random_stream


def load_critics(folders: dict[str, Path], family: str, device: torch.device) -> dict[str, Critic]:
    """The finished critic of each kind; an error names the flag, or the command that makes it."""
    critics = {}
    for kind, folder in folders.items():
        script = (
            "train_sentiment_regressor.py"
            if kind == "sentiment"
            else f"train_empathy_classifier.py --dim {kind}"
        )
        runs.require_run(folder, f"python {script} --model {family}")
        critics[kind] = Critic.from_pretrained(folder).to(device)
        if critics[kind].settings["kind"] != kind:
            raise UserError(f"--{kind} {folder}: holds a critic of {critics[kind].settings['kind']}")
    return critics


def require(folder: Path) -> Path:
    """A folder that prepare_data.py makes."""
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; make it with: python prepare_data.py --workdir {folder.parent.parent}"
        )
    return folder


# -------------------------------------------------------------------------------------------------------------- data


def frozen_vectors(
    model_name: str, texts: list[str], max_len: int, session: Session, paths: Paths
) -> tuple[dict[str, np.ndarray], int]:
    """({text: (E,) vector}, E): each distinct exemplar through the frozen T5 encoder once, cached by content (paper, eq. 3)."""
    tiny = model_name == "t5-tiny"
    name = require(paths.t5_tiny) if tiny else model_name
    with own_random_stream(0):  # t5-tiny's weights are random: draw the same ones in training and in use
        tokenizer, encoder = (
            load_tokenizer(name),
            load_encoder(name, from_scratch=tiny).to(session.device).eval(),
        )
    # one table for all splits: exemplars are training replies
    distinct = sorted(set(texts) | {e.response for e in listener_turns(paths.dialogues("train"))})
    weights = sum(p.detach().double().sum().item() for p in encoder.parameters())
    cache = (
        paths.cache
        / f"exemplars-{fingerprint(model_name, weights, max_len, session.precision, distinct)[:32]}.npz"
    )

    def embed() -> dict[str, np.ndarray]:
        rows = tokenizer([EXEMPLAR_PREFIX + t for t in distinct], truncation=True, max_length=max_len + 8)[
            "input_ids"
        ]
        table = np.zeros((len(distinct), encoder.config.d_model), dtype=np.float32)
        with torch.inference_mode(), session.autocast():
            for numbers in tqdm(
                plan_once([len(r) for r in rows], 128), desc="exemplars", disable=None, leave=False
            ):
                ids, mask = (
                    session.move(t) for t in pad([np.array(rows[i]) for i in numbers], tokenizer.pad_token_id)
                )
                hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state.float()  # (B, L, E)
                table[numbers] = ((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).cpu().numpy()
        return {"vectors": table}

    table = storage.cached(cache, embed)["vectors"]
    return dict(zip(distinct, table, strict=True)), table.shape[1]


def exemplar_parts(settings: dict, exemplars: list[list[str]] | None, session: Session, paths: Paths) -> dict:
    """How the exemplars enter `generator_data`: as source text, or as the pooled part of a batch."""
    if exemplars is None:
        return {}
    if settings["exemplars"] == "prepend":
        return {"exemplars": exemplars, "exemplar_len": settings["exemplar_len"]}
    if settings["exemplars"] == "glove-t5":
        tokenizer = load_tokenizer(require(paths.glove))
        if tokenizer_hash(tokenizer) != settings["exemplar_tokenizer"]:
            raise UserError(
                f"{paths.glove}: its words are others than this model's exemplar encoder was trained with"
            )
        return {"pooled": pooled_tokens(exemplars, tokenizer, settings["exemplar_len"], paths.cache)}
    texts = [t for row in exemplars for t in row]
    vectors, width = frozen_vectors(
        settings["exemplar_model"], texts, settings["exemplar_len"], session, paths
    )
    return {"pooled": pooled_vectors(exemplars, vectors, width)}


def split_data(
    args,
    settings: dict,
    split: str,
    tokenizer,
    session: Session,
    paths: Paths,
    critics: CriticSet | None = None,
    whole: bool = True,
) -> tuple[list[Example], Data]:
    """The examples of one split and their batches; files are joined on (conv_id, utterance_idx). `whole`: replies are not cut."""
    examples = listener_turns(paths.dialogues(split))
    exemplars = labels = None
    if settings["exemplars"] != "none":
        file = paths.exemplars(split, args.exemplars)
        exemplars = read_exemplars(file, examples, settings["top_exemplars"])
        storage.warn_if_stale(file, {"dialogues": paths.dialogues(split), "corpus": paths.dialogues("train")})
    if critics is not None:
        file = paths.labels(split, args.labels)
        found = read_labels(file, examples)
        made_by = storage.read_origin(file)
        labellers = {
            d: Path(made_by[d]["critic"]) / "model.safetensors"
            for d in DIMENSIONS
            if isinstance(made_by.get(d), dict)
        }
        storage.warn_if_stale(
            file, {"dialogues": paths.dialogues(split), "vader": paths.vader(split), **labellers}
        )
        for kind, critic in critics.critics.items():
            if kind != "sentiment" and max(found[kind]) >= critic.settings["outputs"]:
                raise UserError(
                    f"{file}: {kind} label {max(found[kind])}, but the critic knows {critic.settings['outputs']} labels; label with critics of "
                    "the same --levels, or train this one on them"
                )
        labels = {k: found[k] for k in critics.critics}
    data = generator_data(
        examples,
        tokenizer,
        src_len=settings["src_len"],
        tgt_len=None if whole else settings["tgt_len"],
        cache=paths.cache,
        labels=labels,
        critic_context_len=critics.context_len if critics else 0,
        **exemplar_parts(settings, exemplars, session, paths),
    )
    return examples, data


# ----------------------------------------------------------------------------------------------------------- numbers


def uninformed_losses(
    critics: CriticSet, data: Data, session: Session, examples: int = 128
) -> dict[str, tuple[float, float]]:
    """{kind: (mean loss, loss of a guess)} on replies that say nothing: each word's frequency, at every position.

    The guess knows how frequent the labels are. A critic has only seen real words in training; where it is far worse
    than guessing on a mixture of them, a generator that still writes mixtures is led by its errors.
    """
    numbers = list(range(0, len(data), max(1, len(data) // examples)))[:examples]
    batches = [session.move(data.collate(numbers[i : i + 16])) for i in range(0, len(numbers), 16)]
    words = torch.cat([b["labels"][b["labels"] != -100] for b in batches])
    vocabulary = len(next(iter(critics.critics.values())).embeddings)  # the same for all: see check_tokenizer
    share = torch.bincount(words, minlength=vocabulary) / len(words)  # (V,)
    sums = dict.fromkeys(critics.critics, 0.0)
    for batch in batches:
        reply_mask = (batch["labels"] != -100).long()
        with torch.inference_mode():
            found = critics.losses(
                share.expand(*reply_mask.shape, -1), reply_mask, batch
            )  # (V,) -> (B, T, V)
        sums = {k: v + float(found[k]) for k, v in sums.items()}
    out = {}
    for kind, total in sums.items():
        targets = torch.cat([b["critic_targets"][kind] for b in batches]).double()
        shares = targets.unique(return_counts=True)[1] / len(targets)
        guess = targets.var(correction=0) if kind == "sentiment" else (shares * shares.log()).sum().abs()
        out[kind] = total / len(numbers), float(guess)
    return out


def validate(
    data: Data,
    batches: list[list[int]],
    responses: list[str],
    names: list[str],
    terms,
    units,
    session: Session,
) -> dict[str, float]:
    """Each of the `names` of `terms(batch)` averaged over its own unit on a whole split; perplexity per model token and per word."""
    totals, counts = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for numbers in session.over(batches, "valid"):
        batch = session.move(data.collate(numbers))
        with session.autocast():
            sums = terms(batch)
        for k, n in units(batch).items():
            totals[k] += float(sums[k])
            counts[k] += n
    summed = session.sum([totals[k] for k in names] + [counts[k] for k in names])
    values = {k: summed[i] / summed[len(names) + i] for i, k in enumerate(names)}
    nll, tokens = summed[names.index("nll")], summed[len(names) + names.index("nll")]
    words = sum(count_words(r) + 1 for r in responses)  # the end of a reply counts as a word
    return values | {"ppl_token": perplexity(nll, tokens), "ppl_word": perplexity(nll, words)}


def critic_scores(
    critic: Critic, data: Data, session: Session, title: str, batch_size: int = 128, keep: Path | None = None
) -> np.ndarray:
    """(N, labels) probabilities of a classifier, or (N, 1) scores of the regressor. `keep`: see `storage.in_chunks`."""

    def work(group: list[list[int]]) -> dict[str, np.ndarray]:
        found = []
        for numbers in group:
            batch = session.move(data.collate(numbers))
            with torch.inference_mode(), session.autocast():
                scores = critic(batch["input_ids"], batch["attention_mask"], batch["reply_mask"])
            found.append(
                (scores if critic.settings["kind"] == "sentiment" else scores.softmax(-1))
                .float()
                .cpu()
                .numpy()
            )
        return {"numbers": np.concatenate(group), "scores": np.concatenate(found)}

    return storage.in_chunks(plan_once(data.lengths, batch_size), work, keep, title)["scores"]


def prediction_files(folder: Path, split: str) -> list[Path]:
    ending = "" if split == "test" else f"_{split}"
    return [folder / f"predictions{ending}.tsv", folder / f"likelihood{ending}.csv"]


def write_predictions(
    args,
    folder: Path,
    model: Generator,
    tokenizer,
    examples: list[Example],
    data: Data,
    session: Session,
    paths: Paths,
) -> dict[str, float]:
    """A reply, and the gold reply's NLL, for each of the `examples` of --predict-split: predictions.tsv and likelihood.csv."""
    split = args.predict_split
    banned = [
        i for i in (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id) if i is not None
    ]
    sampling = (
        {"do_sample": True, "top_k": args.top_k, "temperature": args.temperature}
        if args.beams == 1
        else {"num_beams": args.beams}
    )
    model.eval()

    def work(group: list[tuple[int, list[int]]]) -> dict[str, np.ndarray]:
        rows = []
        for n, numbers in group:
            batch = session.move(data.collate(numbers))
            try:
                with torch.inference_mode(), session.autocast(), own_random_stream(hash_seed(args.seed, n)):
                    nll = token_nll(model(batch), batch["labels"]).sum(1)  # (B,)
                    out = model.generate(
                        batch, max_new_tokens=args.max_new_tokens, suppress_tokens=banned, **sampling
                    )
            except torch.OutOfMemoryError as error:
                size = args.predict_batch_size
                raise UserError(
                    f"--predict-batch-size {size}: out of memory; try {max(1, size // 2)}"
                ) from error
            texts = [" ".join(t.split()) for t in tokenizer.batch_decode(out, skip_special_tokens=True)]
            rows += zip(numbers, nll.tolist(), (batch["labels"] != -100).sum(1).tolist(), texts, strict=True)
        return dict(
            zip(("numbers", "nll", "tokens", "response"), map(np.array, zip(*rows, strict=True)), strict=True)
        )

    predictions, likelihoods = prediction_files(folder, split)
    shown = paths.exemplars(split, args.exemplars)
    origin = {
        "model": storage.sha256(folder / "model.safetensors"),
        "dialogues": storage.sha256(paths.dialogues(split)),
        "split": split,
    }
    if model.settings["exemplars"] != "none":
        origin |= {"exemplars": {"path": str(shown), "sha256": storage.sha256(shown)}}
    origin |= (
        sampling
        | {k: getattr(args, k) for k in ("max_new_tokens", "predict_batch_size", "seed")}
        | {"precision": session.precision}
    )
    keep = folder / f".partial-{fingerprint(str(origin), banned)[:16]}"
    batches = list(enumerate(plan_once(data.lengths, args.predict_batch_size)))
    found = storage.in_chunks(batches, work, keep, f"replies, {split}", size=4)
    keys = pd.DataFrame(
        {"conv_id": [e.conv_id for e in examples], "utterance_idx": [e.utterance_idx for e in examples]}
    )
    table = keys.assign(
        nll=found["nll"].round(5),
        tokens=found["tokens"],
        words=[count_words(e.response) + 1 for e in examples],
    )
    storage.write_csv(likelihoods, table)
    storage.write_csv(predictions, keys.assign(response=found["response"]), sep="\t", origin=origin)
    shutil.rmtree(keep, ignore_errors=True)
    sums = table[["nll", "tokens", "words"]].sum()
    result = {
        "ppl_token": perplexity(sums["nll"], sums["tokens"]),
        "ppl_word": perplexity(sums["nll"], sums["words"]),
    }
    print(
        f"{predictions}: {len(examples):,} replies | gold replies' perplexity {result['ppl_token']:.2f} a token, {result['ppl_word']:.2f} a word"
    )
    return result


def infer(args, folder: Path, session: Session, paths: Paths) -> dict[str, float]:
    """Only evaluate a finished run, with the exemplars it was trained on unless others are given."""
    if session.world > 1:
        raise UserError("--inference: replies are written by one process; run it without torchrun")
    trained = runs.require_run(folder, "python train_t5.py, or train_glove_t5.py")
    args.exemplars = args.exemplars or trained.get("exemplars")
    refuse_existing(prediction_files(folder, args.predict_split), args.overwrite)
    model = Generator.from_pretrained(folder).to(session.device)
    tokenizer = load_tokenizer(folder)
    found = split_data(args, model.settings, args.predict_split, tokenizer, session, paths)
    return write_predictions(args, folder, model, tokenizer, *found, session, paths)
