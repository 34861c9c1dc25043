"""What the generators' stages compute, made again by hand from the files they leave: likelihoods, the table,
losses, replies."""

import csv
import html
import json
import math
import random
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import logged
from helpers import forward_soft
from sacrebleu.metrics import BLEU
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import evaluate_responses
import glove_models
import probe_critics
import train_glove_t5
import train_t5
from corpora import Example, listener_turns, read_exemplars
from dataloaders import generator_data
from metrics import count_words, distinct
from models import Critic, Generator
from normalising import normalise
from options import CRITICS, Paths
from predicting import Predictor
from session import Session
from settings import Decoding

FAMILIES = {"t5": (train_t5, ["--model", "t5-tiny"]), "glove-t5": (train_glove_t5, ["--size", "tiny"])}
NO_CRITICS = ["--empathy-loss-w", "0", "--sentiment-loss-w", "0"]
SRC_LEN, TGT_LEN = 40, 9


def train(workdir: Path, family: str, *flags: str) -> Path:
    """A short run without exemplars, named "run"; its folder."""
    script, model = FAMILIES[family]
    common = ["--workdir", str(workdir), "--device", "cpu", "--name", "run", "--add-exemplars", "none"]
    lengths = ["--src-len", str(SRC_LEN), "--tgt-len", str(TGT_LEN)]
    script.main([*common, *model, *lengths, *flags])
    return Paths(workdir).saved / family / "run"


def predict(workdir: Path, folder: Path, *flags: str) -> list[str]:
    """--inference RUN; the replies that it writes for the test split."""
    common = ["--workdir", str(workdir), "--device", "cpu", "--inference", str(folder), "--overwrite"]
    train_t5.main([*common, "--max-new-tokens", "8", *flags])
    file = folder / "predictions.tsv"
    return list(replies_in(file).values()) if file.exists() else []


def replies_in(file: Path) -> dict[tuple[str, int], str]:
    rows = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()[1:]]
    return {(conv, int(index)): reply for conv, index, reply in rows}


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def alone(tokenizer, example: Example, tgt_len: int | None = None) -> dict[str, torch.Tensor]:
    """The batch of one example by itself: `turn </s> turn </s>` with speakers 1 and 2 in turn, and the reply
    with its end, if that is not cut."""
    ids, speakers = [], []
    for n, turn in enumerate(example.history):
        words = [*ids_of(tokenizer, turn), tokenizer.eos_token_id]
        ids += words
        speakers += [1 + n % 2] * len(words)
    reply = [*ids_of(tokenizer, example.response), tokenizer.eos_token_id]
    source = torch.tensor([ids[-SRC_LEN:]])
    return {
        "source_ids": source,
        "source_mask": torch.ones_like(source),
        "speaker_ids": torch.tensor([speakers[-SRC_LEN:]]),
        "labels": torch.tensor([reply[:tgt_len]]),
    }


@torch.no_grad()
def logits_of(model: Generator, batch: dict) -> torch.Tensor:
    """(T, V)"""
    return model(batch)[0]


def nll_of(logits: torch.Tensor, batch: dict) -> float:
    """The summed negative log-likelihood of the reply, its end included."""
    return -float(logits.log_softmax(-1).gather(1, batch["labels"][0][:, None]).sum())


def give_critics_other_heads(workdir: Path, family: str) -> None:
    """After two steps the tiny critics say almost the same of everything; with these heads a mix-up shows."""
    for seed, kind in enumerate(CRITICS):
        file = Paths(workdir).critic(kind, family) / "model.safetensors"
        weights = load_file(file)
        generator = torch.Generator().manual_seed(seed)
        weights["head.weight"] = torch.randn(weights["head.weight"].shape, generator=generator) * 0.2
        save_file(weights, file)


# ------------------------------------------------------------------------------------------------- perplexity


def say_unknown_words(dialogues: Path) -> None:
    """In the first listener's turn."""
    lines = dialogues.read_text(encoding="utf-8").splitlines()
    place = next(n for n, line in enumerate(lines) if line.split(",")[1] == "2")
    fields = lines[place].split(",")
    fields[5] = "Zyzzyva zyzzyva or qwertz ?"
    lines[place] = ",".join(fields)
    dialogues.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_is_of_whole_gold_replies_by_the_saved_model(workdir, family):
    """--tgt-len cuts replies in training, and nowhere else."""
    for split in ("train", "valid"):
        say_unknown_words(Paths(workdir).dialogues(split))
    steps = ["--max-steps", "3", "--lr", "3e-3", "--batch-size", "8"]
    folder = train(workdir, family, *NO_CRITICS, *steps, "--no-predict")
    predict(workdir, folder, "--predict-split", "valid")
    model, tokenizer = Generator.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    examples = listener_turns(Paths(workdir).dialogues("valid"))
    table = pd.read_csv(folder / "likelihood_valid.csv")
    assert list(zip(table["conv_id"], table["utterance_idx"], strict=True)) == [e.key for e in examples]
    for example, row in zip(examples, table.itertuples(), strict=True):
        batch = alone(tokenizer, example)
        assert row.tokens == len(ids_of(tokenizer, example.response)) + 1
        assert row.words == count_words(example.response) + 1
        logits = logits_of(model, batch)
        assert row.nll == pytest.approx(nll_of(logits, batch), rel=1e-4)
        assert row.nll_end == pytest.approx(-float(logits[-1].log_softmax(-1)[tokenizer.eos_token_id]), 1e-4)
        assert row.unknown == ids_of(tokenizer, example.response).count(tokenizer.unk_token_id)
    assert table["tokens"].max() > TGT_LEN  # else nothing was there to cut

    nll, tokens, words = (table[column].sum() for column in ("nll", "tokens", "words"))
    expected = {"ppl_token": math.exp(nll / tokens), "ppl_word": math.exp(nll / words)}
    apart = {"ppl_word_open": math.exp((nll - table["nll_end"].sum()) / (words - len(table)))}
    if family == "glove-t5":  # whose words are told apart in a second way
        said = glove_models.word_counts(e.response for e in listener_turns(Paths(workdir).dialogues("train")))
        assert said.keys() - tokenizer.get_vocab().keys() == {"zyzzyva", "qwertz"}
        assert table["unknown"].sum() >= 3
        apart["ppl_word_class"] = math.exp((nll + table["unknown"].sum() * math.log(2)) / words)
    result = json.loads((folder / "result.json").read_text())
    common = ["--workdir", str(workdir), "--device", "cpu", "--split", "valid", "--cases", "1"]
    evaluate_responses.main([*common, str(folder)])
    scored = json.loads((Paths(workdir).results / "evaluation" / "metrics.json").read_text())
    for name, found in {
        "validation": logged(folder, "valid")[-1],
        "result": result["valid"],
        "table": scored["systems"][f"{family}/run"],
    }.items():
        assert {k: found[k] for k in expected} == pytest.approx(expected, rel=1e-4), name
    assert {k: scored["systems"][f"{family}/run"][k] for k in apart} == pytest.approx(apart, rel=1e-4)
    assert result["valid"]["nll"] == result["nll"] == pytest.approx(nll / tokens, rel=1e-4)


def test_unknown_words_are_charged_or_there_is_no_such_figure(workdir):
    """A vocabulary of all training words: how many others there are nobody knows, and none of them is
    free."""
    train_file, file = Paths(workdir).dialogues("train"), Paths(workdir).dialogues("valid")
    say_unknown_words(file)
    learnt = train_file.read_text("utf-8").splitlines()[2].split(",")[5]
    lines = file.read_text("utf-8").splitlines()
    last = next(n for n in range(len(lines) - 1, 0, -1) if int(lines[n].split(",")[1]) % 2 == 0)
    fields = lines[last].split(",")
    lines[last] = ",".join([*fields[:5], learnt, *fields[6:]])
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    folder = train(workdir, "glove-t5", *NO_CRITICS, "--max-steps", "1", "--no-predict")
    predict(workdir, folder, "--predict-split", "valid")
    table = pd.read_csv(folder / "likelihood_valid.csv")
    assert table["unknown"].sum() >= 3
    none = table["unknown"] == 0  # of these replies the figure is there
    assert none.any() and (table["nll_class"][none] == 0).all() and table["nll_class"][~none].isna().all()
    common = ["--workdir", str(workdir), "--device", "cpu", "--split", "valid", "--cases", "1"]
    evaluate_responses.main([*common, str(folder)])
    scored = json.loads((Paths(workdir).results / "evaluation" / "metrics.json").read_text())
    row = scored["systems"]["glove-t5/run"]
    assert "ppl_word" in row and "ppl_word_class" not in row


# ------------------------------------------------------------------------------------------------------ table

#: column title of table.md -> name in metrics.json
TITLES = {
    "#params": "parameters",
    "PPL/token": "ppl_token",
    "PPL/word": "ppl_word",
    "BLEU-1 raw": "bleu_1",
    "BLEU-4": "norm_bleu_4",
    "ROUGE-L": "rouge_l",
    "Distinct-1 %": "distinct_1",
    "Distinct-2 %": "distinct_2",
    "Distinct-1 % of 5 items": "distinct_1_items",
    "Distinct-2 % of 5 items": "distinct_2_items",
    "words": "length",
    "VADER": "vader",
}


@torch.no_grad()
def score(critic: Critic, tokenizer, history: tuple[str, ...], reply: str) -> float:
    """Expected level, or sentiment, of one reply after its history: `context </s> reply </s>`."""
    end, settings = tokenizer.eos_token_id, critic.settings
    turns = [i for turn in history for i in ids_of(tokenizer, turn)]
    context = [*turns[len(turns) - min(len(turns), settings.context_len) :], end]
    words = [*ids_of(tokenizer, reply)[: settings.reply_len], end]
    ids = torch.tensor([context + words])
    of_reply = torch.tensor([[0] * len(context) + [1] * len(words)])
    found = critic(ids, torch.ones_like(ids), of_reply)[0]
    if settings.kind == "sentiment":
        return float(found[0])
    return sum(level * float(p) for level, p in enumerate(found.softmax(-1)))


def cells(line: str) -> list[str]:
    return [html.unescape(c.strip()) for c in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_each_figure_of_the_table_is_of_its_own_replies_under_its_own_title(trained_copy):
    """The judges read the context; theirs.tsv is in no order, and shares half of each reply with the gold
    one."""
    give_critics_other_heads(trained_copy, "t5")
    paths = Paths(trained_copy)
    steps = ["--max-steps", "2", "--lr", "3e-3", "--batch-size", "8", "--max-new-tokens", "6"]
    folder = train(trained_copy, "glove-t5", *NO_CRITICS, *steps)
    examples = listener_turns(paths.dialogues("test"))
    theirs = {}
    for example in examples:
        words = example.response.split()
        theirs[example.key] = " ".join([*words[: 1 + len(words) // 2], "I", "see", "<it>"])
    rows = [f"{conv}\t{index}\t{reply}\n" for (conv, index), reply in theirs.items()]
    random.Random(0).shuffle(rows)
    (trained_copy / "theirs.tsv").write_text(
        "conv_id\tutterance_idx\tresponse\n" + "".join(rows), encoding="utf-8"
    )
    common = ["--workdir", str(trained_copy), "--device", "cpu", "--family", "t5", "--cases", "99"]
    evaluate_responses.main([*common, str(folder), str(trained_copy / "theirs.tsv")])

    gold = {e.key: e.response for e in examples}
    systems = {"gold": gold, "glove-t5/run": replies_in(folder / "predictions.tsv"), "theirs": theirs}
    tables = json.loads((paths.results / "evaluation" / "metrics.json").read_text())
    scored = tables["systems"]
    judges = {kind: Critic.from_pretrained(paths.critic(kind, "t5")) for kind in CRITICS}
    tokenizer = AutoTokenizer.from_pretrained(paths.critic("emo", "t5"))
    scores = {}  # (system, kind, key) -> the critic's score
    for name, replies in systems.items():
        assert list(replies) == list(gold)
        texts, right = list(replies.values()), list(gold.values())
        raw = BLEU(tokenize="none", max_ngram_order=1, force=True).corpus_score(texts, [right])
        expected = {"bleu_1": raw.score, "distinct_1": distinct(texts, 1), "distinct_2": distinct(texts, 2)}
        expected["length"] = np.mean([len(normalise(text).split()) for text in texts])
        for kind, critic in judges.items():
            for example in examples:
                reply = replies[example.key]
                scores[name, kind, example.key] = score(critic, tokenizer, example.history, reply)
            expected[f"critic_{kind}"] = sum(scores[name, kind, key] for key in gold) / len(gold)
        assert {k: scored[name][k] for k in expected} == pytest.approx(expected, rel=1e-4)
    assert scored["glove-t5/run"]["parameters"] == sum(
        p.numel() for p in Generator.from_pretrained(folder).parameters()
    )

    header, _, *lines = (paths.results / "evaluation" / "table.md").read_text().split("\n\n")[0].splitlines()
    assert set(cells(header)[1:]) == set(TITLES)
    rows = [cells(line) for line in lines]
    assert [row[0] for row in rows if not row[0].startswith("floor: ")] == list(systems)
    assert [row[0] for row in rows][1:5] == list(tables["floors"])[:4]
    retrieved = tables["floors"]["floor: top exemplar"]
    found = read_exemplars(paths.exemplars("test"), examples)
    assert retrieved["verbatim_exemplar"] == pytest.approx(np.mean([100 * bool(texts) for texts in found]))
    words = [len(normalise(texts[0]).split()) if texts else 0 for texts in found]
    assert retrieved["length"] == pytest.approx(np.mean(words))
    for name, *values in rows:
        if name not in systems:
            continue
        for title, shown in zip(cells(header)[1:], values, strict=True):
            value = scored[name].get(TITLES[title])
            if value is None:
                assert shown == "-"
            else:
                figure = shown.split()[0]  # after it the gap to gold, and marks
                digits = len(figure.partition(".")[2])
                assert float(figure.replace(",", "")) == pytest.approx(value, abs=0.51 * 10**-digits), title

    page = (paths.results / "evaluation" / "case_studies.md").read_text()
    exemplars = dict(zip(gold, read_exemplars(paths.exemplars("test"), examples), strict=True))
    of_key = {e.key: e for e in examples}
    cases = page.split("\n## ")[1:]
    assert len(cases) == len(examples)
    for case in cases:
        conv, index = re.search(r"\((\S+), utterance (\d+)\)", case).groups()
        key = conv, int(index)
        turns = [html.unescape(t) for t in re.findall(r"^- \*\*\w+:\*\* (.*)$", case, re.MULTILINE)]
        assert turns == [" ".join(turn.split()) for turn in of_key[key].history]
        shown = [html.unescape(t) for t in re.findall(r"^> exemplar \d+: (.*?)\s*$", case, re.MULTILINE)]
        assert shown == [" ".join(text.split()) for text in exemplars[key][:3]]
        header, _, *lines = [line for line in case.splitlines() if line.startswith("|")]
        kinds = cells(header)[2:]
        assert [cells(line)[0] for line in lines] == list(systems)
        for line in lines:
            name, reply, *values = cells(line)
            assert reply == " ".join(systems[name][key].split())
            assert {*CRITICS, "tfidf: emo"} <= set(kinds)
            for kind, value in zip(kinds, values, strict=True):
                if kind not in CRITICS:
                    continue
                assert float(value) == pytest.approx(scores[name, kind, key], abs=0.0051)


# -------------------------------------------------------------------------------------------------- objective

WEIGHTS = {"nll": 0.7, "emo": 0.3, "exp": 0.3, "int": 0.3, "sentiment": 1.9}


def write_labels(folder: Path, split: str, examples: list[Example]) -> dict[tuple[str, int], dict]:
    """Labels in which no two kinds agree, in no order; {key: {kind: label}}."""
    labels = {}
    for n, example in enumerate(examples):
        labels[example.key] = {
            "emo": n % 2,
            "exp": int(n % 3 == 0),
            "int": int(n % 5 < 3),
            "sentiment": round(math.sin(n), 3),
        }
    order = list(labels)
    random.Random(1).shuffle(order)
    folder.mkdir(exist_ok=True)
    with open(folder / f"{split}_labels.csv", "w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["conv_id", "utterance_idx", *CRITICS, "utterance"])
        for key in order:
            writer.writerow([*key, *(labels[key][kind] for kind in CRITICS), "not read"])
    return labels


@torch.no_grad()
def critic_scores(critic: Critic, tokenizer, example: Example, soft: torch.Tensor) -> torch.Tensor:
    """What it says of one soft reply (T, V) after its context.

    As in the critic's own training at most reply_len tokens and then </s>; the end of a whole reply is as
    soft.
    """
    turns = [i for turn in example.history for i in ids_of(tokenizer, turn)]
    cut = len(turns) - min(len(turns), critic.settings.context_len)
    context = torch.tensor([[*turns[cut:], tokenizer.eos_token_id]])
    words, reads = len(ids_of(tokenizer, example.response)), critic.settings.reply_len
    if len(soft) <= words or words > reads:  # cut in training, or longer than the critic reads
        end = F.one_hot(torch.tensor([tokenizer.eos_token_id]), soft.shape[1])
        soft = torch.cat([soft[:reads], end])
    soft = soft[None]
    mask = torch.ones(soft.shape[:2], dtype=torch.long)
    return forward_soft(critic, context, torch.ones_like(context), soft, mask)[0]


def critic_loss(scores: torch.Tensor, target: float | torch.Tensor) -> float:
    """Cross-entropy, or squared error of the sentiment; with its own view of the gold reply as the target,
    the divergence from that."""
    if len(scores) == 1:
        return (float(scores) - float(target)) ** 2
    if isinstance(target, torch.Tensor):
        own = target.log_softmax(-1)
        return float((own.exp() * (own - scores.log_softmax(-1))).sum())
    return -float(scores.log_softmax(-1)[target])


class Recorder:
    """torch's Gumbel-softmax, which keeps what it was given and what it drew: its noise can be had in no
    other way."""

    def __init__(self, original):
        self.original, self.calls = original, []

    def __call__(self, logits, *args, **kwargs):
        soft = self.original(logits, *args, **kwargs)
        self.calls.append((logits.detach(), soft.detach()))
        return soft


@pytest.mark.parametrize(
    ("family", "strategy", "targets"),
    [("t5", 0, "labels"), ("glove-t5", 1, "labels"), ("t5", 2, "labels"), ("glove-t5", 0, "soft")],
)
def test_the_first_loss_is_the_formula_over_labels_and_saved_critics(
    trained_copy, monkeypatch, family, strategy, targets
):
    """One update over all training examples at a rate that moves nothing: the saved model is the one that was
    asked."""
    give_critics_other_heads(trained_copy, family)
    paths = Paths(trained_copy)
    for kind in CRITICS:  # they read more of a reply than the training keeps, less than an evaluation does
        config = paths.critic(kind, family) / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"reply_len": TGT_LEN + 2}))
    splits = {split: listener_turns(paths.dialogues(split)) for split in ("train", "valid")}
    labels = {split: write_labels(trained_copy / "mine", split, found) for split, found in splits.items()}
    gumbel = Recorder(torch.nn.functional.gumbel_softmax)
    monkeypatch.setattr(torch.nn.functional, "gumbel_softmax", gumbel)
    flags = ["--labels", str(trained_copy / "mine"), "--dropout", "0", "--strategy", str(strategy)]
    flags += ["--critic-targets", targets]
    flags += ["--main-loss-w", "0.7", "--empathy-loss-w", "0.3", "--sentiment-loss-w", "1.9"]
    flags += ["--batch-size", str(len(splits["train"])), "--max-steps", "1", "--log-every", "1"]
    folder = train(trained_copy, family, *flags, "--lr", "1e-12", "--no-predict")

    model, tokenizer = Generator.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    critics = {kind: Critic.from_pretrained(paths.critic(kind, family)) for kind in CRITICS}

    def by_hand(split: str, tgt_len: int | None, soft_reply) -> dict[str, float]:
        sums, tokens = dict.fromkeys(WEIGHTS, 0.0), 0
        for example in splits[split]:
            batch = alone(tokenizer, example, tgt_len)
            logits = logits_of(model, batch)
            sums["nll"] += nll_of(logits, batch)
            tokens += len(logits)
            soft = soft_reply(logits)
            for kind, critic in critics.items():
                target = labels[split][example.key][kind]
                if targets == "soft":
                    gold = F.one_hot(batch["labels"][0], soft.shape[1]).float()
                    target = critic_scores(critic, tokenizer, example, gold)
                sums[kind] += critic_loss(critic_scores(critic, tokenizer, example, soft), target)
        units = {kind: tokens if kind == "nll" else len(splits[split]) for kind in sums}
        return {kind: total / units[kind] for kind, total in sums.items()}

    def softmax(logits: torch.Tensor) -> torch.Tensor:
        return logits.softmax(-1)

    def drawn(logits: torch.Tensor) -> torch.Tensor:
        """What was drawn for the row of the one batch that had these logits."""
        given, soft = gumbel.calls[0]
        distance = (given[:, : len(logits)] - logits).abs().amax((1, 2))
        assert distance.min() < 1e-4
        return soft[distance.argmin(), : len(logits)]

    assert len(gumbel.calls) == (1 if strategy else 0)  # for the one update, not for the evaluation
    expected = by_hand("train", TGT_LEN, drawn if strategy else softmax)
    row = logged(folder, "train")[0]
    assert {kind: row[kind] for kind in WEIGHTS} == pytest.approx(expected, rel=1e-4)
    assert row["loss"] == pytest.approx(sum(WEIGHTS[k] * v for k, v in expected.items()), rel=1e-4)

    # an evaluation is of whole replies and without noise, whatever the strategy
    row = logged(folder, "valid")[0]
    assert {kind: row[kind] for kind in WEIGHTS} == pytest.approx(by_hand("valid", None, softmax), rel=1e-4)
    if (strategy, targets) == (0, "labels"):  # and so is what the critics are asked beforehand
        words = ["--workdir", str(trained_copy), "--device", "cpu", "--labels", str(trained_copy / "mine")]
        probed = probe_critics.main([*words, str(folder), "--family", family, "--examples", "99"])
        gold = torch.cat([alone(tokenizer, e, TGT_LEN)["labels"][0] for e in splits["valid"]])
        share = torch.bincount(gold, minlength=model.vocabulary) / len(gold)
        means = {"soft_replies": softmax, "nothing": lambda logits: share.expand(len(logits), -1)}
        for what, soft in means.items():
            asked = by_hand("valid", TGT_LEN, soft)
            found = {kind: losses[f"loss_of_{what}"] for kind, losses in probed.items()}
            assert found == pytest.approx({kind: asked[kind] for kind in CRITICS}, rel=1e-4)
    if strategy == 1:  # the noise of a Gumbel distribution, at temperature 1
        given, soft = gumbel.calls[0]
        noise = soft.clamp(min=1e-38).log() - given
        assert float((noise - noise.mean(-1, keepdim=True)).std()) == pytest.approx(
            math.pi / 6**0.5, rel=0.02
        )
    if strategy == 2:  # one word at each position, and not always the likeliest
        given, soft = gumbel.calls[0]
        assert soft.amax(-1).min() > 0.999 and torch.allclose(soft.sum(-1), torch.ones(soft.shape[:2]))
        assert not torch.equal(soft.argmax(-1), given.argmax(-1))


# --------------------------------------------------------------------------------------------------- decoding


def test_what_interrupted_predictions_have_kept_serves_no_others(workdir, monkeypatch):
    folder = train(workdir, "glove-t5", *NO_CRITICS, "--max-steps", "1", "--no-predict")
    flags, batch = ["--predict-batch-size", "1", "--seed"], Predictor.batch
    expected = predict(workdir, folder, *flags, "2")

    def stop(self, number: int, numbers: list[int]):
        if number == 9:
            raise KeyboardInterrupt
        return batch(self, number, numbers)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Predictor, "batch", stop)
        predict(workdir, folder, *flags, "1")
    assert list(folder.glob(".partial-*/*.npz"))
    assert predict(workdir, folder, *flags, "2") == expected


def test_each_batch_of_replies_has_random_numbers_of_its_own():
    """One dialogue in two batches is answered twice, and each batch as ever, whichever is written first."""
    tokenizer = glove_models.word_tokenizer(f"word{n}" for n in range(60))
    backbone = glove_models.glove_config(tokenizer, "tiny").to_dict()
    model = Generator({"backbone": backbone, "tokenizer": "words", "exemplars": "none"})
    examples = [Example("c", 2, "", ("word1 word2",), "word3")] * 2
    data = generator_data(examples, tokenizer, src_len=8, tgt_len=None)
    decoding = Decoding(0, 1.0, 12, replies=4)
    predictor = Predictor(model, tokenizer, data, decoding, Session(device="cpu"))
    replies = [str(predictor.batch(n, [n])["response"]) for n in (0, 1, 1, 0)]
    assert replies[0] == replies[3] != replies[1] == replies[2]


def test_decoding_flags_arrive_in_decoding(workdir):
    """Replies made again by hand: with beams; and greedily, which sampling among one word, or at no
    temperature, must equal."""
    folder = train(workdir, "glove-t5", *NO_CRITICS, "--max-steps", "1", "--no-predict")
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if "block" in name and weight.ndim > 1:
            weight *= 4  # random weights of the usual size say one word over and over, however they decode
    save_file(weights, folder / "model.safetensors")
    model, tokenizer = Generator.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    examples = listener_turns(Paths(workdir).dialogues("test"))

    def by_hand(**decoding) -> list[str]:
        banned = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id]
        found = []
        for example in examples:
            batch = alone(tokenizer, example)
            ids = model.generate(batch, max_new_tokens=8, suppress_tokens=banned, **decoding)
            found.append(" ".join(tokenizer.decode(ids[0], skip_special_tokens=True).split()))
        return found

    greedy, beams = by_hand(do_sample=False), by_hand(num_beams=4)
    assert predict(workdir, folder, "--beams", "4") == beams
    unrepeated = by_hand(num_beams=4, no_repeat_ngram_size=1)
    assert predict(workdir, folder, "--beams", "4", "--no-repeat-ngram", "1") == unrepeated != beams
    assert predict(workdir, folder, "--top-k", "1") == greedy
    assert predict(workdir, folder, "--temperature", "1e-6") == greedy
    assert predict(workdir, folder, "--top-p", "1e-6") == greedy
    sampled = predict(workdir, folder)
    assert sampled != greedy and greedy != beams and beams != sampled


def test_gold_replies_are_measured_whole_right_after_a_training_too(workdir):
    """--tgt-len cuts replies in training, and nowhere else."""
    flags = (
        "--size tiny --max-steps 1 --batch-size 4 --src-len 20 --tgt-len 4 --max-new-tokens 2 --device cpu"
    )
    none = "--add-exemplars none --empathy-loss-w 0 --sentiment-loss-w 0 --name run"
    train_glove_t5.main(["--workdir", str(workdir), *flags.split(), *none.split()])
    folder = Paths(workdir).saved / "glove-t5" / "run"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    replies = [e.response for e in listener_turns(Paths(workdir).dialogues("test"))]
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in replies]
    assert pd.read_csv(folder / "likelihood.csv")["tokens"].tolist() == lengths
    assert max(lengths) > 4  # else nothing was there to cut
