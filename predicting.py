"""Replies to a split by a trained generator of any family, and the gold replies' likelihood."""

import contextlib
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import advice
import caches
import runs
import storage
from corpora import listener_turns
from dataloaders import Data, SplitData, plan_once
from metrics import count_words, perplexity, unknown_words
from models import Generator, token_nll
from options import Paths, UserError, is_out_of_memory, refuse_existing
from pretrained import decoded, without_word
from quick import cast_frozen
from session import Session, own_random_stream
from settings import Decoding, StageCommand
from storage import fingerprint, hash_seed


def prediction_files(folder: Path, split: str) -> tuple[Path, Path]:
    """(predictions, likelihood) of a run."""
    ending = "" if split == "test" else f"_{split}"
    return folder / f"predictions{ending}.tsv", folder / f"likelihood{ending}.csv"


def likelihood_key(split: str) -> str:
    """Under what result.json keeps the gold replies' perplexities; `valid` holds the evaluation's figures."""
    return "valid_likelihood" if split == "valid" else split


def decoding_arguments(decoding: Decoding, tokenizer, vocabulary: int) -> dict[str, Any]:
    """What transformers' `generate` is told: the decoding, and the tokens that no reply holds.

    `vocabulary`: the length of the model's table of words, which can be padded beyond the tokenizer's.
    """
    banned = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id]
    banned += without_word(tokenizer, vocabulary)
    return {"suppress_tokens": [i for i in banned if i is not None], **of_flags(decoding)}


def of_flags(decoding: Decoding) -> dict[str, Any]:
    """What of it the decoding's flags alone say."""
    arguments: dict[str, Any] = {"max_new_tokens": decoding.max_new_tokens}
    if decoding.no_repeat_ngram:
        arguments["no_repeat_ngram_size"] = decoding.no_repeat_ngram
    if decoding.beams > 1:
        return arguments | {"num_beams": decoding.beams}
    if decoding.top_p < 1:
        arguments["top_p"] = decoding.top_p
    if decoding.replies > 1:
        arguments["num_return_sequences"] = decoding.replies
    return arguments | {"do_sample": True, "top_k": decoding.top_k, "temperature": decoding.temperature}


def otherwise_decoded(predictions: Path, decoding: Decoding) -> list[str]:
    """In which of transformers' arguments replies were written otherwise than `decoding` asks, each with both
    values; none where the note beside them does not say."""
    noted, asked = storage.read_origin(predictions).get("decoding"), of_flags(decoding)
    if not isinstance(noted, dict):
        return []
    names = sorted(noted.keys() - {"suppress_tokens"} | asked.keys())
    other = [name for name in names if noted.get(name) != asked.get(name)]
    return [f"{name} {noted.get(name, 'none')}, now {asked.get(name, 'none')}" for name in other]


@contextlib.contextmanager
def strict_but_for_top_p(arguments: dict[str, Any]) -> Iterator[None]:
    """Under --deterministic transformers' top-p may take a running sum, of which a GPU has no deterministic
    kernel: it would fail, and after the whole training; now torch warns."""
    strict = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(strict, warn_only=warns or "top_p" in arguments)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warns)


def reply(model: Generator, tokenizer, batch: dict, arguments: dict[str, Any]) -> list[str]:
    """Replies, each on one line, to the examples of a batch; several to one example side by side."""
    with strict_but_for_top_p(arguments):
        out = model.generate(batch, **arguments)  # (B, T)
    return decoded(tokenizer, out)


#: of each gold reply: nats of all tokens and of its end alone, tokens, and how many of them are unknown
GOLD = ("nll", "nll_end", "tokens", "unknown")
#: what the gold replies' likelihood follows from, of the note beside predictions
READ_WITH = ("model", "base", "dialogues", "exemplars", "precision")


class Predictor:
    """The gold reply's likelihood, and a reply, for every example of a split; an interrupted one goes on."""

    def __init__(self, model: Generator, tokenizer, data: Data, decoding: Decoding, session: Session):
        self.model, self.tokenizer, self.data = model.eval(), tokenizer, data
        self.decoding, self.session = decoding, session
        if session.precision == "bf16":  # once, and not in each pass, for each token of a reply
            cast_frozen(self.model.requires_grad_(False))
        self.unknown = -1 if tokenizer.unk_token_id is None else tokenizer.unk_token_id  # -1: no token
        self.arguments = decoding_arguments(decoding, tokenizer, model.vocabulary)
        self.notes: dict[str, str] = {}  # what else a reply depends on

    def batch(self, number: int, numbers: list[int]) -> dict[str, np.ndarray]:
        """The rows of one batch; it draws from a stream of its own, so that any batch can be written
        first."""
        batch = self.session.move(self.data.collate(numbers))
        seed = hash_seed(self.decoding.seed, number)
        texts = {}
        with torch.inference_mode(), self.session.autocast(), own_random_stream(seed):
            batch["encoded"] = self.model.encode(batch)  # once, for the likelihood and for the reply
            nll = token_nll(self.model(batch), batch["labels"])  # (B, T)
            if self.decoding.predict:
                replies = reply(self.model, self.tokenizer, batch, self.arguments)
                texts["response"] = np.array(replies).reshape(len(numbers), -1)  # (B, replies)
        tokens = batch["reply_mask"].sum(1)  # (B,), replies are whole: the last one is the end
        return {
            "numbers": np.array(numbers),
            "nll": np.array(nll.sum(1).tolist()),
            "nll_end": np.array(nll.gather(1, tokens[:, None] - 1)[:, 0].tolist()),
            "tokens": np.array(tokens.tolist()),
            "unknown": np.array((batch["labels"] == self.unknown).sum(1).tolist()),
            **texts,
        }

    def chunk(self, group: list[tuple[int, list[int]]]) -> dict[str, np.ndarray]:
        """The rows of some batches, as `caches.in_chunks` asks for them."""
        try:
            parts = [self.batch(number, numbers) for number, numbers in group]
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            size = self.decoding.predict_batch_size
            raise UserError(f"--predict-batch-size {size}: out of memory; try {max(1, size // 2)}") from error
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def write_predictions(
    folder: Path, split: str, found: SplitData, predictor: Predictor, paths: Paths, output: Path
) -> dict[str, float]:
    """predictions.tsv and likelihood.csv of a run on one split, into `output`; returns the gold replies'
    perplexities. Batches are planned by `found`. Without `decoding.predict` only the likelihood is written.
    """
    decoding, session = predictor.decoding, predictor.session
    origin: dict[str, Any] = {
        **storage.sources_of({"model": folder}, paths),
        "dialogues": storage.sha256(paths.dialogues(split)),
        "split": split,
    }
    if predictor.model.settings.exemplars != "none":
        shown = paths.exemplars(split)
        origin["exemplars"] = {"path": paths.note(shown), "sha256": storage.sha256(shown)}
    origin |= {"precision": session.precision, **predictor.notes}
    origin |= {"decoding": predictor.arguments if decoding.predict else "none"}
    origin |= {"predict_batch_size": decoding.predict_batch_size, "seed": decoding.seed}
    # with what a chunk holds: one of another layout would not join these
    keep = output / f".partial-{fingerprint(str(storage.content(origin)), *GOLD, '(B, replies)')[:16]}"
    batches = list(enumerate(plan_once(found.data.lengths, decoding.predict_batch_size)))
    title = "replies" if decoding.predict else "likelihood"
    rows = caches.in_chunks(batches, predictor.chunk, keep, f"{title}, {split}", size=1)

    predictions, likelihood = prediction_files(output, split)
    examples = found.examples
    keys = pd.DataFrame([e.key for e in examples], columns=["conv_id", "utterance_idx"])
    words = [count_words(e.response) + 1 for e in examples]  # the end counts as a word
    table = keys.assign(**{name: rows[name] for name in GOLD}, words=words, nll_class=0.0)
    if table["unknown"].any():
        charge = table["unknown"] * class_nats(predictor.tokenizer, paths)
        table["nll_class"] = charge.where(table["unknown"] > 0, 0.0)  # 0 x nan is nan
    table = table.round({"nll": 5, "nll_end": 5, "nll_class": 5})
    sums = table[["nll", "tokens", "words"]].sum()
    result = {
        "ppl_token": perplexity(sums["nll"], sums["tokens"]),
        "ppl_word": perplexity(sums["nll"], sums["words"]),
    }
    read_with = {name: origin[name] for name in READ_WITH if name in origin}
    storage.write_csv(likelihood, table, origin=read_with | {"perplexity": result})
    if decoding.predict:
        storage.write_csv(predictions, several(keys, rows["response"]), sep="\t", origin=origin)
    shutil.rmtree(keep, ignore_errors=True)
    made = f"{likelihood}: {len(examples):,} gold replies"
    if decoding.predict:
        made = f"{predictions}: {rows['response'].size:,} replies"
    print(
        f"{made} | gold replies' perplexity {result['ppl_token']:.2f} a token, "
        f"{result['ppl_word']:.2f} a word"
    )
    return result


def several(keys: pd.DataFrame, replies: np.ndarray) -> pd.DataFrame:
    """The rows of predictions.tsv: (items, replies to each) texts; more than one are numbered."""
    count = replies.shape[1]
    table = keys.loc[keys.index.repeat(count)].reset_index(drop=True)
    if count > 1:
        table["sample"] = np.tile(np.arange(count), len(keys))
    return table.assign(response=replies.flatten())


def class_nats(tokenizer, paths: Paths) -> float:
    """What an unknown token costs beside its own probability, in nats: log C, for one of the C distinct words
    of the training replies that are unknown to a tokenizer, each as likely; nan without those dialogues, and
    where it knows all of their words: how many the others are, nothing says."""
    file = paths.dialogues("train")
    if not file.exists():
        return math.nan
    count = len(unknown_words(tokenizer, [t.response for t in listener_turns(file)]))
    return math.log(count) if count else math.nan


def output_folder(run: Path, output: str | None, split: str, overwrite: bool, replies: bool) -> Path:
    """Where --inference writes. Raises `UserError` where another run's, or what it would write, lies there.
    `replies`: else the likelihood alone is written."""
    folder = Path(output) if output else run
    if (folder / "args.json").exists() and not folder.samefile(run):
        raise UserError(
            f"--output {folder}: the folder of another run; choose one for these predictions alone"
        )
    predictions, likelihood = prediction_files(folder, split)
    refuse_existing([predictions, likelihood] if replies else [likelihood], overwrite, "")
    return folder


def inference(folder: Path, command: StageCommand, session: Session) -> tuple[Paths, str, Path]:
    """Of a finished run: where its exemplars and dialogues lie, the split, and where its predictions go."""
    if session.world > 1:
        raise UserError("--inference: replies are written by one process; run it without torchrun")
    published = runs.is_published(folder)
    if published and not command.output:
        raise UserError(f"--inference {folder}: a published model; say where its replies go: --output DIR")
    if not published:
        runs.require_run(folder, advice.GIVE_A_GENERATOR)
    paths = command.paths
    if not command.flags.get("exemplars"):
        paths = runs.with_own_exemplars(paths, folder)
    split = command.flags["predict_split"]
    replies = command.decoding.predict
    return paths, split, output_folder(folder, command.output, split, command.training.overwrite, replies)
