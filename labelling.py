"""Every listener turn's labels by critics: what label_dialogues.py does."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

import advice
import runs
import storage
from corpora import LABEL_COLUMNS, listener_turns, read_sentiment
from critics import critic_scores, load_critics, quality, unread, wholes
from dataloaders import critic_data
from options import CRITICS, DIMENSIONS, SENTIMENT, Paths
from session import Session
from storage import fingerprint


def label(
    folders: Mapping[str, Path],
    family: str,
    splits: Sequence[str],
    batch_size: int,
    paths: Paths,
    overwrite: bool,
    device: dict,
) -> None:
    """{split}_labels.csv: every listener turn's labels by the critics in `folders`, and its sentiment by
    VADER."""
    session = Session(**device)
    labellers = load_critics(folders, family, session)
    critic_origins = {}
    for dim, folder in folders.items():
        if "WARNING" in (known := quality(folder, dim)):
            session.say(f"critic {dim}: {folder} | {known}")
        weights = storage.sha256(folder / "model.safetensors")
        levels = labellers[dim].critic.settings.outputs
        critic_origins[dim] = {"critic": paths.note(folder), "sha256": weights, "levels": levels}
    for split in splits:
        target, dialogues, vader = paths.labels(split), paths.dialogues(split), paths.vader(split)
        for file in (dialogues, vader):
            storage.require_file(file, advice.prepare(paths.root))
        origin = {**critic_origins, "dialogues": storage.sha256(dialogues), "vader": storage.sha256(vader)}
        if storage.ready(target, origin, overwrite):
            continue
        examples = listener_turns(dialogues)
        contexts, replies = [e.history for e in examples], [e.response for e in examples]
        if how := unread(labellers, replies)[1]:
            print(f"note: {split}: {how}")
        columns: dict = {
            "conv_id": [e.conv_id for e in examples],
            "utterance_idx": [e.utterance_idx for e in examples],
            SENTIMENT: read_sentiment(vader, examples),
            "utterance": replies,
        }
        kept: list[Path] = []
        rows = {}
        for scorer in wholes(labellers):
            critic, asked = scorer.critic, f"{split}, {scorer.kind}"
            data = critic_data(contexts, replies, None, scorer.tokenizer, critic.settings, paths.cache)
            # an interrupted stage goes on there
            made_of = str(storage.content(origin)), asked, scorer.folder, session.precision, batch_size
            kept.append(paths.cache / f"labels-{fingerprint(*made_of)[:16]}")
            rows[scorer] = critic_scores(critic, data, session, asked, batch_size, kept[-1])
        columns |= {dim: scorer.own(rows[scorer.whole]).argmax(1) for dim, scorer in labellers.items()}
        table = pd.DataFrame(columns)[list(LABEL_COLUMNS)]
        if storage.ready(target, origin, overwrite):  # another process was faster
            continue
        storage.write_csv(target, table, origin=origin | {"command": runs.command_line()})
        for folder in kept:
            shutil.rmtree(folder, ignore_errors=True)
        print(f"{target}: {len(table):,} listener turns; {label_shares(table)}")
        for warning in one_sided(table):
            print(f"WARNING: {target}: {warning}")


def one_sided(table: pd.DataFrame) -> list[str]:
    """A line for each column of labels in which there is nothing to learn from."""
    out = []
    for kind in CRITICS if len(table) > 1 else ():
        values = table[kind].unique()
        if len(values) == 1:
            source = "VADER's scores" if kind == SENTIMENT else f"the {kind} critic's labels"
            out.append(
                f"every one of {source} is {values[0]}: a generator that is led by them learns only to be "
                "so always"
            )
    return out


def label_shares(table: pd.DataFrame) -> str:
    """How often each label stands there."""
    parts = []
    for dim in DIMENSIONS:
        shares = table[dim].value_counts(normalize=True).sort_index()
        parts.append(f"{dim} " + ", ".join(f"{level}: {share:.1%}" for level, share in shares.items()))
    return f"labels {' | '.join(parts)} | mean sentiment {table[SENTIMENT].mean():.3f}"
