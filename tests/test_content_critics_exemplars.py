"""What critics and generators are really given: texts, labels, exemplars and word vectors of their own rows.

Every test runs a script and compares what entered the models' forward passes, and what the script left
behind, with a recomputation from the csv files, one example at a time.
"""

import functools
import inspect
import json
import random
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import logged
from safetensors.torch import load_file
from transformers import AutoTokenizer, T5EncoderModel

import exemplars
import label_dialogues
import train_empathy_classifier
import train_glove_t5
import train_sentiment_regressor
import train_t5
from corpora import listener_turns
from models import Critic, Generator, GeneratorSettings
from options import DIMENSIONS, Paths
from session import Session

FAMILIES = {"t5": (train_t5, "--model t5-tiny"), "glove-t5": (train_glove_t5, "--size tiny")}
GENERATOR = "--device cpu --batch-size 8 --no-predict --name run"
NO_CRITICS = "--empathy-loss-w 0 --sentiment-loss-w 0"
#: nothing random between a row of the log and its recomputation
NO_DROPOUT = "--dropout 0 --head-dropout 0 --word-dropout 0"


def on(workdir, *flags: str) -> list[str]:
    return ["--workdir", str(workdir), *" ".join(flags).split()]


def watch(monkeypatch, owner: type, method: str, note) -> None:
    """After each call of `owner.method`: `note(the object, its arguments by name, what it returned)`."""
    original = getattr(owner, method)
    signature = inspect.signature(original)

    @functools.wraps(original)
    def watched(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        note(self, signature.bind(self, *args, **kwargs).arguments, result)
        return result

    monkeypatch.setattr(owner, method, watched)


class Words:
    """Texts as tuples of token ids, by the tokenizer of a folder."""

    def __init__(self, folder):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        ends = self.tokenizer.eos_token_id
        self.end = (self.tokenizer.sep_token_id if ends is None else ends,)
        self.begin = () if self.tokenizer.cls_token_id is None else (self.tokenizer.cls_token_id,)

    def __call__(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def latest(self, turns, most: int) -> tuple[int, ...]:
        """The latest `most` tokens of all turns together."""
        ids = sum((self(turn) for turn in turns), ())
        return ids[max(0, len(ids) - most) :]


def unpadded(ids, mask) -> list[tuple[int, ...]]:
    """(B, L) ids -> the ids of each row that `mask` (B, L) keeps."""
    return [tuple(row[keep.bool()].tolist()) for row, keep in zip(ids, mask, strict=True)]


# ------------------------------------------------------------------------------- labels and what critics read


def give_random_head(folder, context_len: int, words: Words, examples, seed: int) -> list[int]:
    """Make the critic of `folder` say both labels, half and half, and read `context_len` tokens of context.

    Returns its label of each example, asked about one (history, reply) at a time.
    """
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"context_len": context_len}))
    critic = Critic.from_pretrained(folder)
    torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(seed))

    def score(example) -> float:
        before = words.latest(example.history, context_len) + words.end
        reply = words(example.response) + words.end
        ids = torch.tensor([before + reply])
        mask = torch.ones_like(ids)
        with torch.no_grad():
            low, high = critic(ids, mask, mask * (torch.arange(ids.shape[1]) >= len(before)))[0].tolist()
        return high - low

    scores = [score(e) for e in examples]
    ranked = sorted(scores)
    middle = (ranked[len(ranked) // 2 - 1] + ranked[len(ranked) // 2]) / 2  # no example lies on the border
    critic.head.bias.data[1] -= middle
    critic.save_pretrained(folder)
    return [int(s > middle) for s in scores]


def test_each_label_is_its_own_critics_answer_about_history_and_reply_alone(trained_copy):
    paths = Paths(trained_copy)
    words, examples = Words(paths.glove), listener_turns(paths.dialogues("train"))
    expected = {}
    for seed, dim in enumerate(DIMENSIONS):
        folder = paths.critic(dim, "glove-t5")
        expected[dim] = give_random_head(folder, 30, words, examples, seed)
    label_dialogues.main(on(trained_copy, "--family glove-t5 --splits train --device cpu --overwrite"))
    table = pd.read_csv(paths.labels("train"))
    keys = zip(table["conv_id"], table["utterance_idx"], strict=True)
    assert list(keys) == [e.key for e in examples]
    assert {dim: table[dim].tolist() for dim in DIMENSIONS} == expected


@pytest.fixture
def read_in_training(monkeypatch) -> dict[str, list]:
    """What critics in training read and are told to say, one entry for each example of each batch."""
    seen = {"contexts": [], "replies": [], "targets": [], "scores": []}

    def note_texts(critic, inputs, scores):
        if critic.training:
            ids, mask, reply = (inputs[k] for k in ("input_ids", "attention_mask", "reply_mask"))
            seen["contexts"] += unpadded(ids, mask - reply)
            seen["replies"] += unpadded(ids, reply)
            seen["scores"] += scores.detach()

    def note_targets(critic, inputs, _):
        if critic.training:
            seen["targets"] += inputs["targets"].tolist()

    watch(monkeypatch, Critic, "forward", note_texts)
    watch(monkeypatch, Critic, "loss_sum", note_targets)
    return seen


@pytest.mark.parametrize("model", ["glove-t5", "bert-tiny"])
def test_an_empathy_critic_reads_each_post_then_its_reply_and_learns_that_pairs_label(
    workdir, model, read_in_training
):
    paths = Paths(workdir)
    folder = {"glove-t5": paths.glove, "bert-tiny": paths.bert_tiny}[model]
    name = model if model == "glove-t5" else str(folder)
    flags = "--dim exp --epochs 1 --batch-size 16 --context-len 7 --reply-len 5 --device cpu"
    size = "--size tiny" if model == "glove-t5" else ""  # a folder's model has its own
    train_empathy_classifier.main(on(workdir, flags, size, "--model", name))
    words, expected = Words(folder), []
    for row in pd.read_csv(paths.pairs("exp", "train")).itertuples():
        context = words.begin + words.latest([row.seeker_post], 7) + words.end
        expected.append((context, words(row.response_post)[:5] + words.end, row.label))
    seen = read_in_training
    assert sorted(zip(seen["contexts"], seen["replies"], seen["targets"], strict=True)) == sorted(expected)


def test_the_sentiment_critic_reads_only_the_turns_before_the_utterance_it_scores(workdir, read_in_training):
    paths = Paths(workdir)
    flags = "--model glove-t5 --size tiny --epochs 1 --batch-size 16 --context-len 12 --device cpu"
    train_sentiment_regressor.main(on(workdir, flags))
    words, expected = Words(paths.glove), []
    for _, turns in pd.read_csv(paths.vader("train")).groupby("conv_id"):
        said = turns["utterance"].tolist()
        for n, sentiment in enumerate(turns["sentiment"]):
            context = words.latest(said[:n], 12) + words.end
            expected.append((context, words(said[n])[:64] + words.end, round(sentiment, 4)))
    seen = read_in_training
    targets = [round(t, 4) for t in seen["targets"]]
    assert sorted(zip(seen["contexts"], seen["replies"], targets, strict=True)) == sorted(expected)


def test_with_class_weights_an_example_weighs_the_more_the_rarer_its_label(workdir, read_in_training):
    """The loss is the mean by weights that give both labels the same share of the training split."""
    flags = "--model glove-t5 --size tiny --dim emo --class-weights --max-steps 1 --log-every 1 --device cpu"
    train_empathy_classifier.main(on(workdir, flags, "--batch-size 16 --accumulate 2", NO_DROPOUT))
    paths = Paths(workdir)
    counts = pd.read_csv(paths.pairs("emo", "train"))["label"].value_counts().sort_index()
    assert counts[0] != counts[1]
    scores, targets = torch.stack(read_in_training["scores"]), torch.tensor(read_in_training["targets"])
    weights = torch.tensor(1 / counts.to_numpy(), dtype=torch.float32)
    expected = F.cross_entropy(scores, targets, weight=weights).item()  # torch divides by the sum of weights
    assert len(targets) == 32
    (row,) = logged(paths.critic("emo", "glove-t5"), "train")
    assert row["emo"] == pytest.approx(expected, rel=1e-4)


def test_each_critic_of_the_loss_reads_the_history_before_the_reply_and_is_given_its_own_label(
    trained_copy, monkeypatch
):
    paths = Paths(trained_copy)
    context_lens = {"emo": 4, "exp": 9, "int": 0, "sentiment": 15}  # each critic is known by its own
    for kind, length in context_lens.items():
        file = paths.critic(kind, "glove-t5") / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"context_len": length}))
    labels = pd.read_csv(paths.labels("train"))
    draw = np.random.default_rng(0)
    for kind in context_lens:  # the critics of the fixture give every kind nearly the same
        labels[kind] = draw.integers(0, 2, len(labels))
    labels["sentiment"] = draw.uniform(-1, 1, len(labels)).round(4)
    labels.to_csv(paths.labels("train"), index=False)

    words = Words(paths.glove)
    replies, contexts, seen = [], [], {}

    def note_replies(model, inputs, _):
        gold = inputs["batch"]["labels"]
        replies[:] = unpadded(gold, gold != -100) if model.training else []

    def note_contexts(_, inputs, __):
        contexts[:] = unpadded(inputs["context_ids"], inputs["context_mask"])
        if replies:  # a reply that was cut is closed for the critic, as in the critic's own training
            read = [len(r) + (r[-1:] != words.end) for r in replies]
            assert inputs["reply_mask"].sum(1).tolist() == read

    def note_targets(critic, inputs, _):
        if replies:  # an update, and neither an evaluation nor the questions before the first update
            told = [round(t, 4) for t in inputs["targets"].tolist()]
            seen.setdefault(critic, []).extend(zip(contexts, replies, told, strict=True))

    watch(monkeypatch, Generator, "forward", note_replies)
    watch(monkeypatch, Critic, "forward_words", note_contexts)
    watch(monkeypatch, Critic, "loss_sum", note_targets)
    flags = "--size tiny --epochs 1 --tgt-len 12 --add-exemplars none"
    train_glove_t5.main(on(trained_copy, GENERATOR, flags))

    examples = listener_turns(paths.dialogues("train"))
    expected = []
    for kind, length in context_lens.items():
        rows = []
        for example, label in zip(examples, labels[kind], strict=True):
            context = words.latest(example.history, length) + words.end
            rows.append((context, (words(example.response) + words.end)[:12], label))
        expected.append(sorted(rows))
    assert sorted(sorted(rows) for rows in seen.values()) == sorted(expected)


# -------------------------------------------------------------------------------------------- exemplars enter


def draw_exemplars(paths: Paths) -> dict[tuple[str, int], list[str]]:
    """Give each listener turn 0 to 3 training replies of its own as exemplars; returns those of `train`."""
    draw = random.Random(0)
    replies = sorted({e.response for e in listener_turns(paths.dialogues("train"))})
    for split in ("valid", "train"):
        table = pd.read_csv(paths.exemplars(split))
        texts = [draw.sample(replies, (n + 3) % 4) for n in range(len(table))]
        table["exemplars"] = [json.dumps(row) for row in texts]
        table.to_csv(paths.exemplars(split), index=False)
    return dict(zip(zip(table["conv_id"], table["utterance_idx"], strict=True), texts, strict=True))


@pytest.fixture
def batches(monkeypatch) -> list[dict]:
    """The batches of a generator's updates, as its forward pass got them."""
    seen = []

    def note(model, inputs, _):
        if model.training:
            seen.append(inputs["batch"])

    watch(monkeypatch, Generator, "forward", note)
    return seen


def rows_of_batch(batch: dict) -> list[tuple]:
    """(source, reply) of each row, which tell whose row it is."""
    sources = unpadded(batch["source_ids"], batch["source_mask"])
    return list(zip(sources, unpadded(batch["labels"], batch["labels"] != -100), strict=True))


def dialogue_row(words: Words, example) -> tuple:
    """(source, reply) of an example without prepended exemplars."""
    source = sum((words(turn) + words.end for turn in example.history), ())
    return source, words(example.response) + words.end


def test_the_source_holds_the_keys_own_exemplars_and_no_more_than_asked_for(trained_copy, batches):
    paths = Paths(trained_copy)
    own = draw_exemplars(paths)
    flags = "--size tiny --epochs 1 --src-len 400 --tgt-len 100 --exemplar-len 200 --top-exemplars 2"
    train_glove_t5.main(on(trained_copy, GENERATOR, NO_CRITICS, flags))
    words, expected = Words(paths.glove), []
    for example in listener_turns(paths.dialogues("train")):
        block = sum((words("example: " + text) for text in own[example.key][:2]), ())
        source, reply = dialogue_row(words, example)
        expected.append(((block + words.end if block else ()) + source, reply))
    assert sorted(row for batch in batches for row in rows_of_batch(batch)) == sorted(expected)


def test_the_trained_exemplar_encoder_gets_the_keys_own_exemplars_in_equal_shares(trained_copy, batches):
    paths = Paths(trained_copy)
    own = draw_exemplars(paths)
    flags = "--size tiny --epochs 1 --src-len 400 --tgt-len 100 --add-exemplars glove-t5"
    train_glove_t5.main(
        on(trained_copy, GENERATOR, NO_CRITICS, flags, "--top-exemplars 2 --exemplar-layers 1")
    )
    words, expected = Words(paths.glove), []
    for example in listener_turns(paths.dialogues("train")):
        chosen = own[example.key][:2]
        shares = sorted((words(text) + words.end, 1 / len(chosen)) for text in chosen)
        expected.append((*dialogue_row(words, example), shares))
    seen = []
    for batch in batches:
        texts = unpadded(batch["exemplar_ids"], batch["exemplar_mask"])
        for row, shares in zip(rows_of_batch(batch), batch["exemplar_share"].tolist(), strict=True):
            held = sorted((text, share) for text, share in zip(texts, shares, strict=True) if share)
            seen.append((*row, held))
    assert sorted(seen) == sorted(expected)


def test_the_frozen_exemplar_encoder_reads_each_text_once_and_gives_its_mean_over_tokens(
    trained_copy, batches, monkeypatch
):
    paths = Paths(trained_copy)
    own = draw_exemplars(paths)
    encoders, read = [], []

    def note(encoder, inputs, _):
        encoders.append(encoder)
        read.extend(unpadded(inputs["input_ids"], inputs["attention_mask"]))

    watch(monkeypatch, T5EncoderModel, "forward", note)
    flags = "--size tiny --epochs 1 --src-len 400 --tgt-len 100 --add-exemplars t5 --exemplar-model t5-tiny"
    train_glove_t5.main(on(trained_copy, GENERATOR, NO_CRITICS, flags, "--top-exemplars 2"))

    paraphraser, examples = Words(paths.t5_tiny), listener_turns(paths.dialogues("train"))
    ids = {e.response: paraphraser("paraphrase: " + e.response) + paraphraser.end for e in examples}
    assert sorted(read) == sorted(set(ids.values()))
    words, encoder, expected = Words(paths.glove), encoders[0], {}
    for example in examples:
        vectors = [torch.zeros(encoder.config.d_model)]
        for text in own[example.key][:2]:
            alone = torch.tensor([ids[text]])
            with torch.no_grad():
                hidden = encoder(input_ids=alone, attention_mask=torch.ones_like(alone)).last_hidden_state
            vectors.append(hidden[0].mean(0))
        expected[dialogue_row(words, example)] = sum(vectors) / max(1, len(vectors) - 1)
    assert sum(len(b["labels"]) for b in batches) == len(expected) == len(examples)
    for batch in batches:
        for row, vector in zip(rows_of_batch(batch), batch["exemplar_vectors"], strict=True):
            torch.testing.assert_close(vector, expected[row], rtol=1e-4, atol=1e-5)


def frozen(workdir, exemplar_len: int, seed: int = 42, precision: str = "fp32") -> exemplars.Way:
    settings = GeneratorSettings(
        {}, "t5", exemplar_model="t5-tiny", exemplar_width=64, exemplar_len=exemplar_len
    )
    return exemplars.enter(settings, None, Session("cpu", precision, seed), Paths(workdir))


def test_a_frozen_encoder_of_random_weights_is_the_same_whatever_the_seed(prepared):
    found = [frozen(prepared, 8, seed).inputs()["exemplar encoder"] for seed in (1, 2)]
    assert found[0] == found[1]


def test_kept_exemplar_vectors_are_of_as_many_tokens_as_are_read_now(workdir):
    texts = [["i am so sorry to hear that about your dog , " * 9]]
    short, whole = (frozen(workdir, n).split(texts).part([0])["exemplar_vectors"] for n in (4, 200))
    assert not torch.allclose(short, whole, rtol=1e-3)
    torch.testing.assert_close(frozen(workdir, 4).split(texts).part([0])["exemplar_vectors"], short)


# ---------------------------------------------------------------------------------------------- learned parts


@pytest.fixture
def at_first(monkeypatch) -> dict[str, torch.Tensor]:
    """The generator's weights as its first forward pass found them."""
    weights = {}

    def note(model, _, __):
        if not weights:
            weights.update((k, v.detach().clone()) for k, v in model.state_dict().items())

    watch(monkeypatch, Generator, "forward", note)
    return weights


def after_one_update(trained_copy, family: str, *flags: str) -> dict[str, torch.Tensor]:
    """The weights that a run leaves behind whose one update saw the whole training split."""
    script, size = FAMILIES[family]
    script.main(on(trained_copy, GENERATOR, NO_CRITICS, size, "--max-steps 1 --batch-size 64", *flags))
    return load_file(Paths(trained_copy).saved / family / "run" / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_one_update_moves_speaker_and_listener_away_from_zero_and_nobody_else(trained_copy, family, at_first):
    speakers = after_one_update(trained_copy, family, "--add-exemplars prepend")["speakers.weight"]
    assert not at_first["speakers.weight"].any()
    assert [bool(row.any()) for row in speakers] == [False, True, True]  # 0 is padding and exemplars


@pytest.mark.parametrize("family", FAMILIES)
def test_one_update_changes_every_weight_of_the_exemplar_encoder(trained_copy, family, at_first):
    trained = after_one_update(trained_copy, family, "--add-exemplars glove-t5 --exemplar-layers 1")
    names = [k for k in trained if k.startswith("exemplar_encoder.")]
    assert names and not [k for k in names if torch.equal(trained[k], at_first[k])]


def test_training_begins_from_the_glove_vectors(trained_copy, at_first):
    after_one_update(trained_copy, "glove-t5", "--add-exemplars glove-t5 --exemplar-layers 1")
    vectors = load_file(Paths(trained_copy).glove / "vectors.safetensors")["vectors"]
    for name in ("t5.shared.weight", "exemplar_encoder.shared.weight"):
        words = at_first[name][-len(vectors) :]  # the special tokens stand before them
        assert torch.equal(words[:, : vectors.shape[1]], vectors)


def test_kept_exemplar_vectors_are_of_the_precision_that_is_asked_for_now(workdir):
    texts = [["i am so sorry to hear that about your dog"]]
    half, whole = (
        frozen(workdir, 200, precision=precision).split(texts).part([0])["exemplar_vectors"]
        for precision in ("bf16", "fp32")
    )
    assert not torch.equal(half, whole)


def test_the_encoder_of_exemplars_is_as_deep_as_is_asked_for(prepared):
    asked = SimpleNamespace(add_exemplars="glove-t5", dropout=0.0, exemplar_layers=3)
    found = exemplars.way_settings(asked, "tiny", Paths(prepared))["exemplar_backbone"]
    assert found["num_layers"] == 3
