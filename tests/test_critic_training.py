"""How critics learn: from a teacher, and from mixtures of words."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import forward_soft
from safetensors.torch import load_file

import critic_training
import probe_critics
import teaching
import train_empathy_classifier
import train_glove_t5
import train_sentiment_regressor
from corpora import Example, listener_turns, read_pairs, read_vader
from critics import Critic, is_useless, loss_batches
from dataloaders import Data
from mixtures import Mixtures, mean_target
from models import Critic as CriticModel
from models import CriticSettings, Mixture
from options import Paths, UserError
from pretrained import load_tokenizer, new_encoder
from session import Session
from teaching import SENTENCE_END, pieces

SHORT = "--device cpu --model glove-t5 --max-steps 2 --batch-size 8 --log-every 1".split()


def small_critic(paths: Paths, kind: str = "emo", outputs: int = 2) -> CriticModel:
    from glove_models import glove_config

    tokenizer = load_tokenizer(paths.glove)
    encoder = new_encoder(glove_config(tokenizer, "small", 0.0))
    backbone = encoder.config.to_dict()
    return CriticModel(CriticSettings(kind, outputs, "reply", 4, 9, 0.0, 0.0, backbone, "x"), encoder).eval()


def test_a_mixture_is_the_word_itself_at_share_one_and_a_soft_reply_of_frequencies_at_none(prepared):
    critic = small_critic(Paths(prepared))
    words = len(critic.embeddings)
    ids, mask = torch.randint(4, words, (3, 7)), torch.ones(3, 7, dtype=torch.long)
    reply = mask * (torch.arange(7) >= 3)
    others, frequencies = torch.randint(4, words, (3, 7)), torch.rand(words).softmax(0)
    own, none = torch.ones(3, 7), torch.zeros(3, 7)
    plain = critic(ids, mask, reply)
    assert torch.equal(critic(ids, mask, reply, Mixture(own, none, others, frequencies)), plain)
    nothing = critic(ids, mask, reply, Mixture(1.0 - reply, none, others, frequencies))
    soft = frequencies.expand(3, 4, -1)
    torch.testing.assert_close(nothing, forward_soft(critic, ids[:, :3], mask[:, :3], soft, mask[:, 3:]))
    swapped = critic(ids, mask, reply, Mixture(none, own, others, frequencies))
    torch.testing.assert_close(swapped, critic(others, mask, reply))


@pytest.mark.parametrize("soft", [False, True])
def test_a_mixed_reply_keeps_its_target_as_long_as_it_keeps_half_of_its_words(soft):
    count = 400
    reply = torch.cat([torch.zeros(count, 2), torch.ones(count, 3)], 1).long()
    labels = torch.randint(2, (count,))
    rows = torch.nn.functional.one_hot(labels, 2) * 0.5  # what a teacher says, at half a pair's weight
    ids = torch.where(reply > 0, torch.randint(9, (count, 5)), 9)  # no word of a reply is one of a context
    batch = {"input_ids": ids, "reply_mask": reply}
    batch["targets"] = rows if soft else labels
    mean = torch.tensor([0.7, 0.3])
    drawn = Mixtures(0.5, torch.full((9,), 1 / 9), mean).draw(batch)
    own, targets = drawn["own"], drawn["targets"]
    assert (own[:, :2] == 1).all() and (own[:, 2:] == own[:, 2:3]).all()
    assert ((own + drawn["rest"])[:, 2:] <= 1 + 1e-6).all() and (drawn["rest"][:, :2] == 0).all()
    assert (drawn["others"] < 9).all(), "what a reply is mixed with was said in replies"
    shares = (drawn["rest"] / (1 - own))[:, 2][own[:, 2] < 1]  # of what it does not keep
    assert shares.mean() == pytest.approx(0.4, abs=0.08) and 0.1 < (shares == 0).float().mean() < 0.3
    own, whole = own[:, 2], rows if soft else 2 * rows
    assert 0.4 < (own == 1).float().mean() < 0.6 and (own == 0).sum() > 10
    torch.testing.assert_close(targets.sum(1), whole.sum(1))  # an example counts as much as before
    torch.testing.assert_close(targets[own >= 0.5], whole[own >= 0.5])
    torch.testing.assert_close(targets[own == 0], whole[own == 0].sum(1, keepdim=True) * mean)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_as_many_replies_are_mixed_as_is_asked_and_a_score_is_drawn_to_the_mean(share):
    ids, scores = torch.randint(9, (400, 3)), torch.linspace(-1, 1, 400)
    batch = {"input_ids": ids, "reply_mask": torch.ones_like(ids), "targets": scores}
    drawn = Mixtures(share, torch.full((9,), 1 / 9), torch.tensor(0.3)).draw(batch)
    own = drawn["own"][:, 0]
    assert bool((own == 1).all()) == (share == 0) and bool((own < 1).all()) == (share == 1)
    kept = (2 * own).clamp(max=1)
    torch.testing.assert_close(drawn["targets"], kept * scores + (1 - kept) * 0.3)


def test_what_is_known_of_a_reply_that_says_nothing_is_the_mean_of_the_targets():
    assert float(mean_target([0.0, 0.0, 1.0], 1)) == pytest.approx(1 / 3)
    assert mean_target([0, 1, 1, 1], 2).tolist() == [0.25, 0.75]
    soft = mean_target([[0.5, 0.5], [0.0, 0.5]], 2)  # of which the second counts half as much
    assert soft.tolist() == pytest.approx([1 / 3, 2 / 3])


def test_a_teacher_labels_listener_turns_once_and_they_are_learnt_beside_the_pairs(
    workdir, capsys, monkeypatch
):
    common = ["--workdir", str(workdir), *SHORT, "--dim", "emo"]
    train_empathy_classifier.main([*common, "--size", "tiny", "--name", "teacher"])
    alone = capsys.readouterr().out
    teacher = ["--teacher", str(workdir / "saved" / "empathy" / "teacher"), "--turns", "7"]
    taught = [*common, "--size", "small", *teacher, "--teacher-w", "0.5", "--mixture-share", "0.5"]
    train_empathy_classifier.main([*taught, "--name", "taught"])
    pairs = int(alone.split("data: ")[1].split()[0])
    assert f"data: {pairs + 7} examples" in capsys.readouterr().out
    run = workdir / "saved" / "empathy" / "taught"
    result = json.loads((run / "result.json").read_text())
    assert result["loss_of_nothing"] > 0 and 0 < result["loss_of_a_guess"] < 0.7
    assert json.loads((run / "sources.json").read_text())["teacher"]["path"] == "saved/empathy/teacher"
    monkeypatch.setattr(Critic, "rows", None)  # what it said is known
    train_empathy_classifier.main([*taught, "--name", "again"])
    first, second = (load_file(run.with_name(n) / "model.safetensors") for n in ("taught", "again"))
    assert all(torch.equal(first[k], second[k]) for k in first)
    with pytest.raises(UserError, match="--teacher: not given then"):
        other = ["--teacher", str(run.with_name("taught"))]
        train_empathy_classifier.main([*common, "--size", "tiny", "--name", "teacher", *other])
    with pytest.raises(UserError, match="teacher: a critic of emo with 2 labels; what is learnt is exp"):
        train_empathy_classifier.main(["--workdir", str(workdir), *SHORT, "--dim", "exp", *teacher])


def test_a_critic_that_fits_in_its_training_fits_to_its_end(workdir, monkeypatch):
    plain = CriticModel.forward

    def small(self, ids, *given, **named):
        if len(ids) > 8:  # four times --batch-size, as an evaluation has
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(self, ids, *given, **named)

    monkeypatch.setattr(CriticModel, "forward", small)
    words = ["--workdir", str(workdir), *SHORT, "--dim", "emo", "--size", "tiny", "--batch-size", "2"]
    assert train_empathy_classifier.main(words)["loss_of_nothing"] > 0


def test_a_critic_is_asked_about_a_reply_that_says_nothing_and_held_against_a_guess(workdir):
    words = ["--workdir", str(workdir), *SHORT, "--dim", "emo", "--size", "tiny"]
    result = train_empathy_classifier.main(words)
    folder, paths = workdir / "saved" / "empathy" / "glove-t5-emo", Paths(workdir)
    critic, tokenizer = CriticModel.from_pretrained(folder), load_tokenizer(folder)

    def ids_of(text: str) -> list[int]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*ids[: critic.settings.reply_len], tokenizer.eos_token_id]

    learnt, held = (read_pairs(paths.pairs("emo", split)) for split in ("train", "valid"))
    read = torch.tensor([i for reply in learnt["response_post"] for i in ids_of(reply)])
    share = torch.bincount(read, minlength=len(critic.embeddings)) / len(read)
    before, total = torch.tensor([[tokenizer.eos_token_id]]), 0.0
    for reply, label in zip(held["response_post"], held["label"], strict=True):
        soft = share.expand(1, len(ids_of(reply)), -1)
        mask = torch.ones(soft.shape[:2], dtype=torch.long)
        with torch.no_grad():
            said = forward_soft(critic, before, torch.ones_like(before), soft, mask)[0]
        total -= float(said.log_softmax(-1)[label])
    assert result["loss_of_nothing"] == pytest.approx(total / len(held), rel=1e-4)
    rate = held["label"].mean()
    assert result["loss_of_a_guess"] == pytest.approx(-rate * np.log(rate) - (1 - rate) * np.log(1 - rate))


def test_of_several_teachers_the_mean_is_learnt(workdir, monkeypatch):
    common = ["--workdir", str(workdir), *SHORT, "--dim", "emo", "--size", "tiny"]
    folders = [str(workdir / "saved" / "empathy" / name) for name in ("one", "two")]
    for n, folder in enumerate(folders):
        train_empathy_classifier.main([*common, "--seed", str(n), "--name", Path(folder).name])
    learnt, task = [], critic_training.with_teacher
    monkeypatch.setattr(critic_training, "with_teacher", lambda *a: learnt.append(task(*a)) or learnt[-1])

    def pupil(name: str, *teachers: str) -> np.ndarray:
        train_empathy_classifier.main(
            [*common, "--turns", "7", "--teacher-w", "0.5", "--name", name, "--teacher", *teachers]
        )
        return np.array(learnt[-1].train[2])

    first, second, both = pupil("a", folders[0]), pupil("b", folders[1]), pupil("c", *folders)
    assert not np.allclose(first[-7:], second[-7:], atol=1e-4)
    np.testing.assert_allclose(both, (first + second) / 2)
    turns = [turn.response for turn in listener_turns(Paths(workdir).dialogues("train"))]
    asked, left = learnt[-1].train[1][-7:], iter(turns)
    assert all(reply in left for reply in asked) and asked != turns[:7], "some of all dialogues, in order"
    np.testing.assert_allclose(first.sum(1), [1.0] * (len(first) - 7) + [0.5] * 7, rtol=1e-5)  # --teacher-w
    sources = json.loads((workdir / "saved" / "empathy" / "c" / "sources.json").read_text())
    assert [sources[name]["path"][-3:] for name in ("teacher", "teacher 2")] == ["one", "two"]
    with pytest.raises(UserError, match="--teacher: fewer given then"):
        pupil("a", *folders)
    with pytest.raises(UserError, match="a critic of emo with 2 labels; what is learnt is exp"):
        train_empathy_classifier.main([*common[:-3], "exp", *common[-2:], "--teacher", *folders])


def test_pieces_are_a_replys_sentences_runs_of_its_words_and_splices_of_two():
    contexts = [("a cold day",), ("a long way",), ("an end",)]
    replies = ["I am so sorry. What did you do? Tell me.", "oh no", "Things will surely get better soon."]
    found = pieces(contexts, replies, 2)
    assert found == pieces(contexts, replies, 2) != pieces(contexts, replies, 2, seed=1)
    befores, texts = found
    assert len(set(texts)) == len(texts) and not {"", *replies} & set(texts)
    of = dict(zip(texts, befores, strict=True))
    assert all(of[part] == contexts[0] for part in ("I am so sorry.", "What did you do?", "Tell me."))
    assert set(pieces(contexts, replies, 0)[1]) == {"I am so sorry.", "What did you do?", "Tell me."}
    known = [part for reply in replies for part in SENTENCE_END.split(reply)]
    runs = [text for text in texts if any(text in reply for reply in replies) and text not in known]
    assert runs and all(3 <= len(text.split()) <= 40 for text in runs)
    assert any(not reply.startswith(run) for run in runs for reply in replies if run in reply)
    splices = set(texts) - set(runs) - set(known)
    assert any(replies[2] in text and ("oh no" in text or "What did" in text) for text in splices)
    for text in splices:  # whole sentences, some of two replies
        rest = text
        for part in sorted(known, key=len, reverse=True):
            rest = rest.replace(part, "")
        assert not rest.strip()
        first = next(reply for reply, context in zip(replies, contexts, strict=True) if context == of[text])
        assert any(text.startswith(part) for part in SENTENCE_END.split(first))


def test_pieces_are_learnt_beside_turns_and_pairs(workdir, capsys):
    common = ["--workdir", str(workdir), *SHORT, "--dim", "emo", "--size", "small", "--turns", "7"]
    train_empathy_classifier.main([*common[:-2], "--name", "teacher"])
    teacher = ["--teacher", str(workdir / "saved" / "empathy" / "teacher")]
    pairs = read_pairs(Paths(workdir).pairs("emo", "train"))
    own = pieces([(post,) for post in pairs["seeker_post"]], pairs["response_post"].tolist(), 2)[1]
    capsys.readouterr()
    train_empathy_classifier.main([*common, *teacher, "--pieces", "2", "--name", "taught"])
    assert f"data: {len(pairs) + 7 + len(own)} examples" in capsys.readouterr().out


def test_flags_of_a_teacher_without_one_are_refused(capsys):
    words = ["--dim", "emo", "--turns", "5", "--pieces", "2", "--teacher-w", "0.5"]
    with pytest.raises(SystemExit):
        train_empathy_classifier.parse_args(words)
    said = capsys.readouterr().err
    assert all(f"--{flag}: only with --teacher" in said for flag in ("turns", "pieces", "teacher-w"))


def test_a_pretrained_encoder_has_no_choice_of_size(capsys):
    with pytest.raises(SystemExit):
        train_empathy_classifier.parse_args(["--dim", "emo", "--model", "minilm", "--size", "small"])
    assert "--size: of --model t5 and glove-t5" in capsys.readouterr().err


def test_sentiment_is_learnt_from_mixtures_too(workdir):
    words = ["--workdir", str(workdir), *SHORT, "--size", "small", "--mixture-share", "1"]
    result = train_sentiment_regressor.main(words)
    gold = critic_training.sentiment_task(Paths(workdir)).valid[2]
    mean = sum(gold) / len(gold)
    assert result["loss_of_a_guess"] == pytest.approx(sum((g - mean) ** 2 for g in gold) / len(gold))
    assert result["loss_of_nothing"] > 0


@pytest.mark.parametrize("share", [0, 1])
def test_how_an_update_is_split_counts_where_replies_are_mixed_with_each_other(workdir, share):
    """The words that are mixed in are those of the micro-batch."""
    words = ["--workdir", str(workdir), *SHORT, "--mixture-share", str(share)]
    train_sentiment_regressor.main([*words, "--batch-size", "8"])
    split = [*words, "--batch-size", "4", "--accumulate", "2"]
    if share:
        with pytest.raises(UserError, match="--batch-size: 8 then, 4 now"):
            train_sentiment_regressor.main(split)
    else:
        assert train_sentiment_regressor.main(split)["already_finished"]


def test_what_critics_are_asked_about_is_spread_over_all_the_data():
    asked = []
    data = Data([1] * 20, lambda numbers: asked.extend(numbers) or {})
    loss_batches(data, Session("cpu"), 11)
    assert len(set(asked)) == 11 and asked[0] == 0 and asked[-1] >= 18


def test_critics_are_probed_on_the_soft_replies_of_a_generator(trained_copy, tmp_path, capsys):
    words = ["--workdir", str(trained_copy), "--device", "cpu"]
    plain = "--size tiny --max-steps 1 --add-exemplars none --no-predict --empathy-loss-w 0"
    train_glove_t5.main([*words, *plain.split(), "--sentiment-loss-w", "0", "--name", "plain"])
    run, file = trained_copy / "saved" / "glove-t5" / "plain", tmp_path / "probe.json"
    words += [str(run), "--examples", "9", "--output", str(file)]
    found = probe_critics.main(words)
    assert json.loads(file.read_text()) == found and list(found) == ["emo", "exp", "int", "sentiment"]
    assert "soft replies" in capsys.readouterr().out
    again = probe_critics.main([*words, "--overwrite", "--kinds", "int"])
    assert again["int"] == pytest.approx(found["int"], rel=1e-4)
    one = probe_critics.main([*words, "--overwrite", "--examples", "1"])
    assert all(losses["loss_of_a_guess"] == 0 for losses in one.values()), "one label is no guess"
    assert any(losses["loss_of_a_guess"] > 0 for losses in found.values())
    with pytest.raises(UserError, match="already there.*--overwrite"):
        probe_critics.main(words)


def test_the_mean_that_a_sentiment_critic_has_to_beat_is_of_the_training_side(workdir):
    train, valid = (read_vader(Paths(workdir).vader(split))["sentiment"] for split in ("train", "valid"))
    assert train.mean() != pytest.approx(valid.mean(), abs=1e-3)
    found = critic_training.sentiment_task(Paths(workdir)).baselines["mean"]["mse"]
    assert found == pytest.approx(((valid - train.mean()) ** 2).mean())


@pytest.mark.parametrize(
    ("accuracy", "macro_f1", "useless"), [(71, 42, False), (69, 47, False), (70, 46, True), (69, 41, True)]
)
def test_a_critic_is_of_use_that_is_right_more_often_or_that_knows_the_rarer_labels(
    accuracy, macro_f1, useless
):
    majority = {"majority": {"accuracy": 70, "macro_f1": 41}}
    assert is_useless({"accuracy": accuracy, "macro_f1": macro_f1}, majority) == useless


def test_a_teacher_that_knows_other_levels_is_refused(monkeypatch):
    settings = SimpleNamespace(kind="emo", outputs=2)
    teacher = SimpleNamespace(folder="saved/empathy/big-emo", critic=SimpleNamespace(settings=settings))
    opened = SimpleNamespace(of=lambda kind: teacher)
    monkeypatch.setattr(teaching.Critic, "from_pretrained", lambda *asked: opened)
    options = SimpleNamespace(teacher=["saved/empathy/big-emo"], turns=0, pieces=0)
    with pytest.raises(UserError, match="of emo with 2 labels; what is learnt is emo with 3"):
        teaching.taught(options, "emo", 3, ([], []), None, SimpleNamespace(world=1))


def test_a_teacher_reads_what_was_said_before_a_turn(monkeypatch, tmp_path):
    turns = [
        Example("c", 2, "sad", ("My dog died.",), "Oh no!"),
        Example("d", 2, "sad", ("I won.",), "Nice!"),
    ]
    asked = []

    def answers_of(whole, title, cache):
        return lambda replies, contexts: asked.append((list(replies), list(contexts))) or np.ones((2, 2))

    settings = SimpleNamespace(kind="emo", outputs=2)
    teacher = SimpleNamespace(
        folder=tmp_path, critic=SimpleNamespace(settings=settings), whole=None, own=lambda said: said
    )
    opened = SimpleNamespace(of=lambda kind: teacher)
    monkeypatch.setattr(teaching.Critic, "from_pretrained", lambda *asked: opened)
    monkeypatch.setattr(teaching.judges, "answers_of", answers_of)
    monkeypatch.setattr(teaching, "listener_turns", lambda file: turns)
    options, session = SimpleNamespace(teacher=["x"], turns=0, pieces=0), SimpleNamespace(world=1)
    contexts, replies, _ = teaching.taught(options, "emo", 2, ([], []), Paths(tmp_path), session)
    assert asked == [(replies, contexts)] == [(["Oh no!", "Nice!"], [("My dog died.",), ("I won.",)])]
