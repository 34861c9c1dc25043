"""Judges: what they learn from, what they say of replies, and what is said of them."""

import json
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score
from torch import nn
from transformers import T5EncoderModel

import advice
import critic_training
import critics
import judges
import labelling
import lineage
import objectives
import storage
import train_empathy_classifier
import train_glove_t5
import train_t5
from corpora import PAIR_COLUMNS, Example, choose_pairs, listener_turns, read_pairs
from critic_set import CriticSet
from dataloaders import tokenizer_hash
from lineage import Served, other_half
from measuring import Standard
from metrics import calibration_error
from models import Critic, CriticSettings
from options import DIMENSIONS, Paths, UserError
from pretrained import load_encoder, load_tokenizer
from responder import open_writer
from session import Session
from settings import CriticOptions, TeacherOptions, generator_command, pick

# --------------------------------------------------------------------------------------- what they learn from


def test_minilm_is_a_family_of_critics_with_its_own_defaults_and_never_a_loss(workdir, monkeypatch):
    tiny = str(Paths(workdir).bert_tiny)
    monkeypatch.setattr(critic_training, "resolve", lambda name: tiny if name == "minilm" else name)
    flags = ["--workdir", str(workdir), "--device", "cpu", "--max-steps", "2", "--dim", "emo"]
    train_empathy_classifier.main([*flags, "--model", "minilm", "--part", "a"])
    folder = workdir / "saved" / "empathy" / "minilm-a-emo"
    made = json.loads((folder / "args.json").read_text())["args"]
    assert (made["lr"], made["epochs"], made["batch_size"], made["part"]) == (6e-5, 2, 16, "a")
    assert lineage.half_of(folder, Paths(workdir)) == "a"
    assert "calibration_error" in json.loads((folder / "result.json").read_text())["valid"]
    critic = Critic.from_pretrained(folder)
    with pytest.raises(UserError, match="can label and judge, but not serve as a loss"):
        CriticSet({"emo": critic}, torch.device("cpu")).check_tokenizer(critic.settings.tokenizer)


def test_the_command_for_a_critic_of_one_half_names_the_half():
    line = advice.makes("w/saved/empathy/minilm-seeker-b-int", "")
    made = "--dim int --workdir w --model minilm --split-by seeker --part b"
    assert line.endswith(f"train_empathy_classifier.py {made}")
    args = train_empathy_classifier.parse_args(made.replace("--workdir w", "").split())
    assert (args.model, args.split_by, args.part) == ("minilm", "seeker", "b")


def test_critics_of_a_family_that_is_named_are_asked_for_by_its_model(workdir):
    args = train_empathy_classifier.parse_args(["--dim", "emo", "--model", "google/flan-t5-base@main"])
    assert pick(CriticOptions, args).family == "flan-t5-base"
    words = ["--workdir", str(workdir), "--model", "t5-tiny", "--device", "cpu", "--family", "flan-t5-base"]
    with pytest.raises(UserError, match="--model flan-t5-base; --model takes its whole name") as refused:
        train_t5.main([*words, "--add-exemplars", "none"])
    assert f"--workdir {workdir}" in str(refused.value)
    halved = advice.for_critic("w/saved/empathy/flan-t5-base-seeker-a-int", "int", "flan-t5-base-seeker-a")
    assert "--model flan-t5-base --split-by seeker --part a;" in halved


def test_halves_and_sides_by_seeker_share_no_seeker_in_any_dimension(prepared):
    posts: dict[str, set] = {"a": set(), "b": set(), "valid": set()}
    for dim in DIMENSIONS:
        pairs = [read_pairs(Paths(prepared).pairs(dim, split)) for split in ("train", "valid")]
        for part in "ab":
            train, valid = choose_pairs(*pairs, "seeker", part)
            posts[part] |= set(train["seeker_post"])
            posts["valid"] |= set(valid["seeker_post"])
        whole = choose_pairs(*pairs, "seeker", "all")
        assert sum(map(len, whole)) == sum(map(len, pairs))
    assert all(posts.values())
    assert not posts["a"] & posts["b"] and not posts["valid"] & (posts["a"] | posts["b"])
    assert 0.1 < len(posts["valid"]) / len(set.union(*posts.values())) < 0.27, "a fifth"


def test_calibration_error_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.0, 1.0]])
    # of the two at .9 one is right: gap .4; at .6 wrong: .6; at 1.0 right: 0
    assert calibration_error([0, 1, 0, 1], probabilities) == pytest.approx(100 * (2 * 0.4 + 0.6 + 0) / 4)


# ------------------------------------------------------------------------------------------ what they say


NOISE = "bus shop tea road lamp coat cup door rain bread".split()
#: a word that tells each dimension, and no other
WORDS = {"emo": "sorry", "exp": "why", "int": "understand"}
WORDS = {dim: WORDS.get(dim, DIMENSIONS[dim].telling.split()[0]) for dim in DIMENSIONS}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Paths:
    """Prepared pairs whose labels follow from one word each, written for these tests."""
    paths = Paths(tmp_path_factory.mktemp("judged"))
    paths.pairs_dir.mkdir(parents=True)
    rng = random.Random(1)
    for dim, word in WORDS.items():
        for split, count in (("train", 240), ("valid", 30)):
            rows = []
            for n in range(count):
                noise = rng.sample(NOISE, 2)
                said = " ".join([word, *noise] if n % 3 == 0 else noise)
                level = int(n % 3 == 0) + int(n % 6 == 0)
                rows.append((n, n, f"post number {n}", said, level, int(level > 0)))
            table = pd.DataFrame(rows, columns=list(PAIR_COLUMNS))
            table.to_csv(paths.pairs(dim, split), index=False)
    return paths


@pytest.fixture(scope="module")
def tfidf(pairs):
    return judges.load(pairs, Session(device="cpu"), ["tfidf"])[0]


def test_the_word_judge_needs_only_the_pairs_and_knows_their_words(tfidf, pairs):
    assert tfidf.held_out == pytest.approx({"emo": 100, "exp": 100, "int": 100})
    replies = ["sorry tea cup", "why tea cup", "tea cup", "", "understand sorry"]
    levels = tfidf.levels(replies, [("anything", "before")] * 5)
    found = {dim: (values >= 0.5).tolist() for dim, values in levels.items()}
    assert found["emo"] == [True, False, False, False, True]
    assert found["exp"] == [False, True, False, False, False]
    assert found["int"] == [False, False, False, False, True]
    assert levels["emo"][3] == tfidf.levels([" \n"])["emo"] == 0, "an empty reply shows nothing"
    again = judges.load(pairs, Session(device="cpu"), ["tfidf"])[0]
    assert again.sha256 == tfidf.sha256 and len(set(again.sha256.values())) == 3
    assert np.array_equal(again.levels(replies)["emo"], levels["emo"])


def test_the_word_judges_of_two_halves_learn_apart_and_say_so(pairs, tfidf):
    halves = judges.load(pairs, Session(device="cpu"), ["tfidf-a", "tfidf-b"])
    assert len({judge.sha256["emo"] for judge in (*halves, tfidf)}) == 3
    lines = judges.report([tfidf, *halves], ["sorry tea", "why tea"], [(), ()])
    for line, what in zip(
        lines, ("all seeker", "half a of the seeker", "half b of the seeker"), strict=False
    ):
        assert f"learnt from {what} posts; macro-F1" in line


def test_each_text_is_asked_about_once_and_answers_keep_their_order(tfidf):
    asked = []

    def ask(replies, contexts):
        asked.extend(replies)
        return np.array([len(reply) / 100 for reply in replies])

    judge = judges.Judge("counting", {}, {}, {"emo": ask}, reads_context=True)
    said = judge.levels(["bb", "a", "bb"], [("x",), ("x",), ("x",)])["emo"]
    assert said.tolist() == [0.02, 0.01, 0.02] and asked == ["bb", "a"]
    judge.levels(["a", "ccc"], [("x",), ("x",)])
    assert asked == ["bb", "a", "ccc"]
    judge.levels(["a"], [("another context",)])
    assert asked == ["bb", "a", "ccc", "a"]


def test_critics_of_a_family_judge_as_they_score_and_cost_nothing_the_second_time(
    workdir, capsys, monkeypatch
):
    paths, session = Paths(workdir), Session(device="cpu")
    tokenizer, encoder = load_tokenizer(paths.bert_tiny), load_encoder(paths.bert_tiny)
    for dim in DIMENSIONS:
        layout = {"context_len": 8, "reply_len": 8, "head_dropout": 0.0, "word_dropout": 0.0}
        made = {"backbone": encoder.config.to_dict(), "tokenizer": tokenizer_hash(tokenizer)}
        settings = CriticSettings(kind=dim, outputs=3, pooling="reply", **layout, **made)
        Critic(settings, encoder).save_pretrained(paths.critic(dim, "other"))
        tokenizer.save_pretrained(str(paths.critic(dim, "other")))
        storage.write_json(paths.critic(dim, "other") / "result.json", {"valid": {"macro_f1": 40.0}})
    assert [judge.name for judge in judges.load(paths, session)] == ["tfidf"]
    said = capsys.readouterr().out
    assert "no minilm judge" in said and "--dim all --workdir" in said and said.count("--model minilm") == 1
    with pytest.raises(UserError, match="no minilm-b judge.*--model minilm --part b"):
        judges.load(paths, session, ["minilm-b"])
    judge = judges.load(paths, session, ["other"])[0]
    replies, contexts = ["i am so sorry", "what happened ?"], [("i lost my job", "oh no"), ("it broke",)]
    levels = judge.levels(replies, contexts)
    scorer = critics.Critic.from_pretrained(paths.critic("exp", "other"), session)
    wanted = [sum(score.probabilities[1:]) for score in scorer.score(replies, contexts)]
    assert levels["exp"] == pytest.approx(wanted)
    with pytest.raises(UserError, match="other-emo: holds a critic of emo, none of exp"):
        judges.load(paths, session, [str(paths.critic("emo", "other"))])
    for dim in DIMENSIONS:
        shutil.copytree(paths.critic(dim, "other"), workdir / "mine" / dim)
    beside = judges.load(paths, session, [str(workdir / "mine")])[0]
    assert beside.name == "mine" and np.array_equal(beside.levels(replies, contexts)["exp"], levels["exp"])
    again = judges.load(paths, session, ["other"])[0]
    monkeypatch.setattr(judges, "critic_scores", None)  # what is asked is known
    assert np.array_equal(again.levels(replies, contexts)["exp"], levels["exp"])


@pytest.fixture(scope="module")
def joint(prepared, tmp_path_factory) -> Paths:
    """A workdir with a critic of all three dimensions, after four updates."""
    folder = tmp_path_factory.mktemp("joint") / "work"
    shutil.copytree(prepared, folder)
    flags = ["--workdir", str(folder), "--device", "cpu", "--max-steps", "4", "--model", "glove-t5"]
    train_empathy_classifier.main([*flags, "--size", "tiny", "--dim", "all", "--part", "b"])
    return Paths(folder)


REPLIES = ["i am so sorry", "what happened ?", "i understand you , my friend , that is hard", "ok ."]
BEFORE = [("i lost my job", "oh no"), ("it broke",), ("my dog died",), ("hello",)]


def test_heads_of_one_encoder_in_a_loss_are_said_to_be_read_for_each(joint, capsys):
    folder, session = joint.critic("all", "glove-t5-b"), Session("cpu")
    words = tokenizer_hash(load_tokenizer(folder))
    for kinds, said in ((("emo",), ""), (("emo", "int"), "note: emo, int are heads of one encoder")):
        folders = dict.fromkeys(kinds, folder)
        assert len(critics.choose_for_loss(folders, "glove-t5", words, 20, session).critics) == len(kinds)
        printed = capsys.readouterr().out
        assert said in printed and ("heads of one encoder" in printed) == bool(said)


def test_three_heads_of_one_encoder_answer_as_three_critics_do_and_read_once(joint, monkeypatch):
    session, folder = Session(device="cpu"), joint.critic("all", "glove-t5-b")
    alone = [critics.Critic.from_pretrained(folder, session, dim) for dim in DIMENSIONS]
    asked = []
    monkeypatch.setattr(
        judges, "critic_scores", lambda *a, **k: asked.append(a[3]) or critics.critic_scores(*a, **k)
    )
    (judge,) = judges.load(joint, session, ["glove-t5-b"])
    levels = judge.levels(REPLIES, BEFORE)
    assert asked == ["glove-t5-b, all"] and judge.halves == dict.fromkeys(DIMENSIONS, "b")
    for scorer in alone:
        wanted = [sum(score.probabilities[1:]) for score in scorer.score(REPLIES, BEFORE)]
        assert levels[scorer.kind] == pytest.approx(wanted, abs=1e-6)
        one_by_one = [scorer.rows([r], [b])[0, 0] for r, b in zip(REPLIES, BEFORE, strict=True)]
        assert 1 - levels[scorer.kind] == pytest.approx(one_by_one, abs=1e-5)
    assert len({tuple(values) for values in levels.values()}) == 3
    (given,) = judges.load(joint, session, [str(folder)])
    assert given.name == "glove-t5-b-all" and given.sha256 == judge.sha256
    assert asked == ["glove-t5-b, all"] and np.array_equal(
        given.levels(REPLIES, BEFORE)["int"], levels["int"]
    )


def test_three_heads_label_teach_and_reward_in_one_pass_as_each_would_alone(joint, tmp_path):
    session, folder = Session(device="cpu"), joint.critic("all", "glove-t5-b")
    turns = listener_turns(joint.dialogues("valid"))
    replies, before = [e.response for e in turns], [e.history for e in turns]
    alone = {dim: critics.Critic.from_pretrained(folder, session, dim) for dim in DIMENSIONS}
    paths, together = Paths(joint.root, labels=tmp_path), dict.fromkeys(DIMENSIONS, folder)
    heads = critics.open_critics(together, session)
    training = judges.training_critics(heads, tmp_path)
    passes: list[nn.Module] = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: passes.append(module))

    def counted(ask):
        """How often an encoder is run, and what comes of it."""
        passes.clear()
        found = ask()
        return sum(isinstance(module, T5EncoderModel) for module in passes), found

    def taught(dim):
        task = critic_training.empathy_task(dim, paths, weigh_classes=False)
        teacher = TeacherOptions(teacher=[str(folder)], turns=0, pieces=0, teacher_w=1.0)
        return critic_training.with_teacher(task, teacher, paths, session).train[2]

    try:
        once = counted(lambda: alone["emo"].rows(replies, before))[0]
        assert once > 0
        labelled, _ = counted(
            lambda: labelling.label(together, "glove-t5-b", ["valid"], 0, paths, False, {"device": "cpu"})
        )
        asked, values = counted(lambda: [training[dim](replies, before) for dim in DIMENSIONS])
        zero = dict.fromkeys(DIMENSIONS, [0.0] * len(replies))
        rewards = objectives.Distance(heads, before, zero)
        rewarded, (reward, _) = counted(lambda: rewards.of(range(len(replies)), replies, len(replies)))
        first, later = counted(lambda: taught("exp")), counted(lambda: taught("int"))
    finally:
        hook.remove()
    assert labelled == asked == rewarded == once
    assert first[0] > 0 and later[0] == 0, "what it says of a dialogue is kept for every dimension"
    labels = pd.read_csv(paths.labels("valid"))
    for n, (dim, scorer) in enumerate(alone.items()):
        rows = scorer.rows(replies, before)
        assert labels[dim].tolist() == rows.argmax(1).tolist()
        assert values[n] == pytest.approx(rows @ np.arange(rows.shape[1]), abs=1e-5)
    ranges = [scorer.limits[1] for scorer in alone.values()]
    np.testing.assert_allclose(
        -reward, np.mean([v / r for v, r in zip(values, ranges, strict=True)], 0), atol=1e-5
    )
    turns = listener_turns(joint.dialogues("train"))
    wanted = alone["int"].rows([e.response for e in turns], [e.history for e in turns])
    np.testing.assert_allclose(later[1][-len(turns) :], wanted, atol=1e-5)


def test_replies_of_like_length_are_read_in_batches_of_so_many_tokens(joint, monkeypatch):
    scorer = critics.Critic.from_pretrained(joint.critic("all", "glove-t5-b"), Session(device="cpu"))
    texts = [" ".join(["sorry"] * (1 + n % 20)) for n in range(60)]
    at_once, padded = scorer.rows(texts), []
    forward = scorer.critic.forward
    monkeypatch.setattr(
        scorer.critic, "forward", lambda ids, *m: padded.append(ids.shape) or forward(ids, *m)
    )
    monkeypatch.setitem(critics.BATCH_TOKENS, "cpu", 66)
    np.testing.assert_allclose(scorer.rows(texts), at_once, atol=1e-5)
    assert len(padded) > 10 and all(rows * width <= 66 for rows, width in padded)
    held = sum(rows * width for rows, width in padded)
    assert held < 1.1 * sum(len(text.split()) + 2 for text in texts), "what is padded is little"


def test_a_critic_of_all_dimensions_stands_for_each_that_a_family_lacks(joint):
    folder = joint.critic("all", "glove-t5-b")
    result = json.loads((folder / "result.json").read_text())
    figures = [result["heads"][dim]["valid"]["macro_f1"] for dim in DIMENSIONS]
    assert result["macro_f1"] == pytest.approx(np.mean(figures)) and len(set(figures)) > 1
    assert result["heads"]["exp"]["learnt_elsewhere"] == 0, "here the sides are of whole seeker posts"
    led = "--add-exemplars none --sentiment-loss-w 0 --family glove-t5-b --workdir".split()
    args = train_glove_t5.parse_args([*led, str(joint.root)])
    leading = generator_command(args, "glove-t5").critics
    assert leading == dict.fromkeys(DIMENSIONS, folder)
    loaded = critics.load_critics(leading, "glove-t5-b", Session(device="cpu"))
    assert [critic.kind for critic in loaded.values()] == list(DIMENSIONS)
    assert loaded["emo"].critic.encoder is loaded["int"].critic.encoder
    found = critics.find_critics(joint, ["glove-t5-b"], {}, Session(device="cpu"))
    assert [(kind, scorer.kind, scorer.folder) for kind, scorer in found.items()] == [
        (dim, dim, folder) for dim in DIMENSIONS
    ]
    assert found["emo"].critic.encoder is found["int"].critic.encoder
    with pytest.raises(UserError, match="holds a critic of emo, exp, int, none of sentiment"):
        critics.Critic.from_pretrained(folder, kind="sentiment")
    with pytest.raises(UserError, match="a critic of emo, exp, int; name the one to ask"):
        critics.Critic.from_pretrained(folder).score(["ok"])
    with pytest.raises(
        UserError, match="holds a critic of emo, exp, int; give it with --emo or --exp or --int"
    ):
        critics.load_finished({"sentiment": folder}, Session(device="cpu"), ["sentiment"])
    with pytest.raises(UserError, match="not a generator; respond.py takes it with --emo or --exp or --int"):
        open_writer(folder, Session(device="cpu"), joint)
    with pytest.raises(UserError, match="no judge in .*--dim all"):
        judges.load(joint, Session(device="cpu"), [str(folder.parent / "nobody")])
    with pytest.raises(UserError, match="no minlim judge: .*minlim-emo is not there; give the folder of a"):
        judges.load(joint, Session(device="cpu"), ["minlim"])
    card = (folder / "README.md").read_text()
    assert 'kind="emo")' in card and "shows understanding" in card and "asks about nothing" in card


def test_a_critic_of_one_dimension_goes_on_from_its_head_among_three(joint):
    folder = joint.critic("all", "glove-t5-b")
    flags = f"--workdir {joint.root} --device cpu --max-steps 1 --lr 1e-9 --model glove-t5 --size tiny"
    words = [*flags.split(), "--dim", "exp", "--name", "on", "--init-from", str(folder)]
    train_empathy_classifier.main(words)
    on = critics.Critic.from_pretrained(joint.critic("exp", "glove-t5").with_name("on"))
    head = critics.Critic.from_pretrained(folder, kind="exp")
    np.testing.assert_allclose(on.rows(REPLIES), head.rows(REPLIES), atol=1e-6)


def test_pairs_of_three_dimensions_are_merged_with_the_labels_that_each_has():
    emo = ([("p",), ("p",), ("q",)], ["r", "r", "s"], [1, 0, 1])
    exp = ([("q",), ("p",)], ["s", "r"], [0, 1])
    contexts, replies, labels = critic_training.merged([emo, exp])
    found = sorted(zip(contexts, replies, labels, strict=True))
    none = critic_training.NO_LABEL
    assert found == [(("p",), "r", [0, none]), (("p",), "r", [1, 1]), (("q",), "s", [1, 0])]


def test_a_pair_that_each_dimension_spaces_in_its_own_way_is_one_pair():
    """As the official files do: else a judge of one half would have read what a critic of the other has."""
    emo, exp = ([("my  dog died",)], ["so\nsorry"], [1]), ([("my dog died",)], ["so sorry"], [0])
    assert critic_training.merged([emo, exp]) == ([("my  dog died",)], ["so\nsorry"], [[1, 0]])
    head = SimpleNamespace(valid=exp, baselines={})
    valid = {f"exp_{name}": 50.0 for name in critic_training.HEAD_FIGURES}
    found = critic_training.of_heads(valid, SimpleNamespace(train=emo, tasks={"exp": head}))
    assert found["exp"]["learnt_elsewhere"] == 1
    posts = [f"post number {n} of them" for n in range(40)]
    apart = [pd.DataFrame({"seeker_post": [blank.join(p.split()) for p in posts]}) for blank in (" ", " \n ")]
    for split_by, part in (("files", "a"), ("files", "b"), ("seeker", "a")):
        one, other = (choose_pairs(table, table[:0], split_by, part) for table in apart)
        for side in (0, 1):
            assert one[side].index.tolist() == other[side].index.tolist()
    assert 0 < len(one[0]) < len(posts)


def test_a_judge_whose_critics_know_more_levels_than_it_is_asked_about_says_so(trained_copy, monkeypatch):
    (judge,) = judges.load(Paths(trained_copy), Session("cpu"), ["glove-t5"])
    assert "levels" not in judge.caveat
    monkeypatch.setattr(critics.Critic, "limits", property(lambda critic: (0, 2)))
    (judge,) = judges.load(Paths(trained_copy), Session("cpu"), ["glove-t5"])
    assert "of 3 levels, where the judge is asked about level 1 alone" in judge.caveat


def test_flags_of_one_dimension_are_refused_with_all_of_them(capsys):
    with pytest.raises(SystemExit):
        train_empathy_classifier.parse_args("--dim all --teacher x --mixture-share 0.5 --baselines".split())
    said = capsys.readouterr().err
    assert all(f"--dim all: --{f} is of one" in said for f in ("teacher", "mixture-share", "baselines"))


# --------------------------------------------------------------------------------------- what is said of them


def judge_of(name: str, ask) -> judges.Judge:
    held_out, sha256 = dict.fromkeys(DIMENSIONS, 70.0), dict.fromkeys(DIMENSIONS, name * 20)
    return judges.Judge(name, sha256, held_out, dict.fromkeys(DIMENSIONS, ask), reads_context=False)


def test_a_judge_that_nonsense_pleases_and_two_that_disagree_are_named_under_the_table():
    gold = ["sorry to hear", "the tea", "my road", "sorry again", "rain", "a lamp", "sorry sorry", "cup"]
    sound = judge_of("sound", lambda texts, _: np.array([float(t.startswith("sorry")) for t in texts]))
    short = judge_of("short", lambda texts, _: np.array([float(len(t) < 6) for t in texts]))
    contexts = [("before",)] * len(gold)
    lines = judges.report([sound, short], gold, contexts)
    assert "Judge sound (sha256: emo soundsoundso" in lines[0] and "emo 70.0" in lines[0]
    # both 4 times of 8 apart: sound yes 3, short yes 2, both yes 0
    expected = (3 / 8 - (3 * 2 + 5 * 6) / 64) / (1 - (3 * 2 + 5 * 6) / 64)
    assert judges.agreement([sound, short], gold, contexts)["sound", "short"]["emo"] == pytest.approx(
        expected
    )
    assert f"emo {expected:.2f}" in lines[2]
    assert '"ok ." emo 0.00, exp 0.00, int 0.00;' in lines[3], "no nonsense here is below gold"
    assert '"ok ." emo 1.00, exp 1.00, int 1.00 (fooled: emo, exp, int)' in lines[4]
    same = judges.report([judge_of("same", lambda texts, _: np.full(len(texts), 0.5))], gold, contexts)
    assert same[1].count("(fooled: emo, exp, int)") == 3, "nonsense that is worth as much as gold fools, too"


def test_a_judge_is_told_how_far_it_sees_the_difference_that_people_see(trained_copy):
    paths = Paths(trained_copy)
    for dim in DIMENSIONS:
        rows = read_pairs(paths.pairs(dim, "valid"))
        shows = set(rows["response_post"][rows["level"] >= 1]) - set(rows["response_post"][rows["level"] < 1])
        half = judge_of("half", lambda texts, _, shows=shows: np.array([0.5 * (t in shows) for t in texts]))
        labelled = rows["level"] >= 1
        caught = rows["response_post"][labelled].isin(shows).mean()
        assert caught > 0.2 and judges.told_apart(half, paths)[dim] == pytest.approx(caught / 2)


def test_a_judge_that_reads_contexts_is_told_the_post_that_each_reply_answers(trained_copy):
    paths, ask, expected = Paths(trained_copy), {}, {}
    for dim in DIMENSIONS:
        rows = read_pairs(paths.pairs(dim, "valid"))
        pairs = list(zip(rows["seeker_post"], rows["response_post"], strict=True))
        shown = {pair for pair, level in zip(pairs, rows["level"], strict=True) if level >= 1}
        others = [pair in shown for pair, level in zip(pairs, rows["level"], strict=True) if level < 1]

        def knows(replies, contexts, shown=shown):
            return np.array([(*turns, r) in shown for r, turns in zip(replies, contexts, strict=True)], float)

        ask[dim], expected[dim] = knows, 1 - np.mean(others)
    reading = judges.Judge("reading", {}, {}, ask, reads_context=True)
    assert judges.told_apart(reading, paths) == pytest.approx(expected) and min(expected.values()) > 0.5
    paths.pairs("emo", "valid").unlink()  # as in a workdir of own dialogues, whose judge is another's
    assert set(judges.told_apart(reading, paths)) == set(DIMENSIONS) - {"emo"}


# ----------------------------------------------------------------------------------- what a context foretells


def test_context_auc_is_the_usual_one_and_its_interval_covers():
    rng = np.random.default_rng(0)
    gold = rng.random(400)
    levels = np.round(np.where(gold >= 0.5, 0.3, 0.0) + rng.normal(0, 0.5, 400), 1)  # many ties
    found = judges.context_auc(levels, gold, draws=300)
    assert found.point == pytest.approx(roc_auc_score(gold >= 0.5, levels))
    low, high = found.interval()
    assert low < found.point < high and 0.05 < high - low < 0.2
    assert np.isnan(judges.context_auc(levels, np.zeros(400)).point)
    # ten turns of one conversation that are all alike are one, and a level of .5 is reached
    talks = np.repeat(np.arange(40), 10)
    alike = levels[talks], np.where(gold[talks] >= 0.5, 0.5, 0.4)
    widths = [np.ptp(judges.context_auc(*alike, groups, draws=300).interval()) for groups in (None, talks)]
    assert widths[1] > 2 * widths[0]


def test_what_a_context_foretells_is_found_and_what_it_does_not_is_not(tfidf):
    def turns(count, seed):
        rng, out = random.Random(seed), []
        for n in range(count):
            sad = rng.random() < 0.5
            history = (" ".join(["funeral" if sad else "party", *rng.sample(NOISE, 3)]),)
            reply = " ".join([*(["sorry"] * sad), *(["why"] * (rng.random() < 0.5)), *rng.sample(NOISE, 2)])
            out.append(Example(str(n), 2, "sad", history, reply))
        return out

    train, held = turns(200, 1), turns(150, 2)
    found = judges.context_predictor(tfidf, train, held, Session(device="cpu"), encoder=None)
    gold = tfidf.levels([e.response for e in held])
    assert judges.context_auc(found["emo"], gold["emo"], draws=50).point > 0.95
    assert 0.35 < judges.context_auc(found["exp"], gold["exp"], draws=50).point < 0.65
    assert np.isnan(judges.context_auc(found["int"], gold["int"], draws=50).point)
    # and how much was said already, where the words are the same
    # (a word of one letter is none to TF-IDF)
    late = []
    for n in range(80):
        history = ("ok", *["a"] * (2 * (n % 4)))
        late.append(Example(str(n), len(history) + 1, "sad", history, "sorry" if n % 4 > 1 else "tea"))
    found = judges.context_predictor(tfidf, late, late, Session(device="cpu"), encoder=None)
    gold = tfidf.levels([e.response for e in late])
    assert judges.context_auc(found["emo"], gold["emo"], draws=2).point == 1


def test_a_judge_that_reads_the_context_foretells_nothing_from_a_constant_reply():
    def ask(replies, contexts):
        return np.array([0.9 if "funeral" in " ".join(turns) else 0.1 for turns in contexts])

    judge = judges.Judge("reading", {}, {}, {"emo": ask}, reads_context=True)
    examples = [Example(str(n), 2, "sad", (("funeral", "party")[n % 2],), "oh") for n in range(20)]
    standard = Standard(examples, [], None, [judge], lambda *_: {}, Session(device="cpu"))
    found = standard.context_auc(judge, [["ok .", "ok ."]] * 20, tuple(range(20)))
    assert {k: v.point for k, v in found.items()} == {"reading_emo_context_auc": 0.5}
    # for a level it reads the turns before each reply
    for samples in (None, [["oh", "ah"]] * 3):
        figures = standard.measure("x", ["oh"] * 3, (2, 3, 5), samples=samples).figures
        assert figures["reading_emo_level"].items() == pytest.approx([0.9, 0.1, 0.1])


def test_a_context_auc_is_drawn_as_often_and_from_the_seed_that_the_table_says():
    def ask(replies, _):
        return np.array([len(reply) / 9 for reply in replies])

    judge = judges.Judge("by length", {}, {}, {"emo": ask}, reads_context=False)
    examples = [Example(str(n), 2, "sad", ("so",), "o" * (n % 9)) for n in range(40)]
    samples = [["a" * (n * 7 % 5), "b"] for n in range(40)]
    found = []
    for resamples, seed in ((50, 1), (50, 2), (200, 1)):
        asked = Standard(
            examples, [], None, [judge], lambda *_: {}, Session("cpu"), resamples=resamples, seed=seed
        )
        [estimate] = asked.context_auc(judge, samples, tuple(range(40))).values()
        found.append(estimate)
    assert [len(estimate.replicates) for estimate in found] == [50, 50, 200]
    assert len({estimate.interval() for estimate in found}) == 3
    # and with all turns of a conversation
    talks = [Example(str(n // 4), 2, "sad", ("so",), e.response) for n, e in enumerate(examples)]
    asked = Standard(talks, [], None, [judge], lambda *_: {}, Session("cpu"), resamples=50, seed=1)
    [together] = asked.context_auc(judge, samples, tuple(range(40))).values()
    assert together.point == found[0].point and together.interval() != found[0].interval()


def test_judges_are_named_with_or_without_blanks():
    assert judges.named("tfidf, minilm-b") == ["tfidf", "minilm-b"] and judges.named("none") == []


def test_confidences_of_one_tenth_are_one_bin():
    probabilities = np.array([[0.64, 0.36], [0.66, 0.34]])  # one is right: .5 less than .65
    assert calibration_error([0, 1], probabilities) == pytest.approx(15)


def test_of_the_held_out_pairs_of_a_head_the_share_is_told_that_another_has_learnt():
    train = ([("p",), ("q",), ("s",)], ["r", "r", "r"], [])
    emo = SimpleNamespace(valid=([("p",), ("t",)], ["r", "r"], []), baselines={})
    valid = {f"emo_{name}": 50.0 for name in critic_training.HEAD_FIGURES}
    found = critic_training.of_heads(valid, SimpleNamespace(train=train, tasks={"emo": emo}))
    assert found["emo"]["learnt_elsewhere"] == 1 / 2


def test_a_judge_that_was_trained_again_is_asked_again(trained_copy):
    paths, said = Paths(trained_copy), []
    for _ in range(2):
        (judge,) = judges.load(paths, Session("cpu"), ["glove-t5"])
        said.append(judge.levels(["I am so sorry."])["emo"][0])
        file = paths.critic("emo", "glove-t5") / "model.safetensors"
        save_file({k: -w if "head" in k else w for k, w in load_file(file).items()}, file)
    assert said[1] == pytest.approx(1 - said[0], abs=1e-5)


def test_a_seeker_post_stays_in_the_half_in_which_earlier_critics_have_seen_it():
    """A judge of half b that is trained today must share no post with a critic of half a of then."""
    posts = [
        "My dog died.",
        "I lost my job.",
        "I cannot sleep.",
        "Nobody calls me.",
        "I passed!",
        "She left me.",
    ]
    table = pd.DataFrame({"seeker_post": posts})
    halves = {part: choose_pairs(table, table, "files", part)[0]["seeker_post"].tolist() for part in "ab"}
    assert halves == {"a": [posts[0], *posts[3:]], "b": posts[1:3]}


def test_where_critics_have_seen_both_halves_no_half_is_left_for_a_judge():
    assert other_half([Served("emo", "x", "a"), Served("exp", "y", "a")]) == "b"
    assert other_half([Served("emo", "x", "a"), Served("exp", "y", "b")]) == "all"
