"""What the retriever's two commands compute, against the formula, with encoders that differ and texts that
are cut."""

import json
import math

import pandas as pd
import pytest
import torch
from conftest import logged
from transformers import AutoTokenizer, DPRConfig, DPRContextEncoder, DPRQuestionEncoder

import dpr_exemplar_retriever
from corpora import listener_turns
from DPR import train_dpr
from options import SPLITS, Paths


def save_encoders(workdir, folder, dropout: float):
    """Two encoders with weights of their own, large enough that each token moves the vector."""
    tokenizer = AutoTokenizer.from_pretrained(Paths(workdir).bert_tiny)
    config = DPRConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.3,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    for name, encoder in (
        ("question_encoder", DPRQuestionEncoder(config)),
        ("context_encoder", DPRContextEncoder(config)),
    ):
        encoder.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def load_encoders(folder):
    question = DPRQuestionEncoder.from_pretrained(folder / "question_encoder").eval()
    context = DPRContextEncoder.from_pretrained(folder / "context_encoder").eval()
    return question, context, AutoTokenizer.from_pretrained(folder / "question_encoder")


def text_vectors(encoder, tokenizer, texts, most: int, end: str) -> torch.Tensor:
    """(N, E): each text alone, without padding; of too long a text its first or its latest tokens."""
    inside = most - 2  # [CLS] and [SEP] count too
    vectors = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = ids[-inside:] if end == "latest" else ids[:inside]
        row = torch.tensor([[tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]])
        with torch.no_grad():
            vectors.append(encoder(input_ids=row).pooler_output[0])
    return torch.stack(vectors)


@pytest.mark.parametrize(
    ("rule", "match"), [("same-emotion", "reply"), ("all", "reply"), ("same-emotion", "context")]
)
def test_the_retrieved_exemplars_are_those_of_a_brute_force(workdir, tmp_path, rule, match):
    save_encoders(workdir, tmp_path, dropout=0.1)
    dpr_exemplar_retriever.main(
        ["--workdir", str(workdir), "--device", "cpu", "--path", str(tmp_path), "--output", str(tmp_path)]
        + ["--candidates", rule, "--top-k", "4", "--max-length", "40", "--max-passage-length", "12"]
        + ["--match", match]
    )
    paths = Paths(workdir)
    question, context, tokenizer = load_encoders(tmp_path)
    corpus = listener_turns(paths.dialogues("train"))
    if match == "reply":
        passages = text_vectors(context, tokenizer, [c.response for c in corpus], 12, "first")
    else:  # both sides are dialogues
        answered = [" ".join(c.history) for c in corpus]
        passages = text_vectors(question, tokenizer, answered, 40, "latest")
    lengths = []
    for split in SPLITS:
        examples = listener_turns(paths.dialogues(split))
        texts = [" ".join(e.history) for e in examples]
        lengths += [len(tokenizer(t)["input_ids"]) for t in texts]
        scores = (text_vectors(question, tokenizer, texts, 40, "latest") @ passages.T).tolist()
        table = pd.read_csv(
            Paths(paths.root, exemplars=tmp_path).exemplars(split), dtype=str, keep_default_na=False
        )
        for example, row, own in zip(examples, table.itertuples(), scores, strict=True):
            assert (row.conv_id, int(row.utterance_idx)) == example.key
            of_key = {
                c.key: score
                for c, score in zip(corpus, own, strict=True)
                if c.conv_id != example.conv_id and (rule == "all" or c.emotion == example.emotion)
            }
            best = sorted(of_key.values(), reverse=True)[:4]
            found = [tuple(key) for key in json.loads(row.exemplars_index)]
            assert json.loads(row.scores) == pytest.approx(best, abs=2e-4)
            # by the score of each key: two replies that begin alike have the same vector
            assert [of_key[key] for key in found] == pytest.approx(best, abs=2e-4)
            assert len(set(found)) == len(found)
    assert min(lengths) < 40 < max(lengths)  # some questions are cut, and some are not


def test_an_index_for_exemplars_by_chance_is_refused(capsys):
    with pytest.raises(SystemExit):
        dpr_exemplar_retriever.parse_args(["--match", "random", "--index", "ivf"])
    assert "--index: --match random compares nothing" in capsys.readouterr().err
    dpr_exemplar_retriever.parse_args(["--match", "context", "--max-passage-length", "9"])
    assert "note: --max-passage-length: ignored" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flag", ["--path", "--encoder", "--pooling mean", "--max-length 9", "--max-passage-length 9"]
)
def test_what_only_a_comparison_reads_is_refused_for_exemplars_by_chance(flag, capsys):
    name, value = flag.split() if " " in flag else (flag, "any")
    with pytest.raises(SystemExit):
        dpr_exemplar_retriever.parse_args(["--match", "random", name, value])
    assert f"{name}: --match random compares nothing" in capsys.readouterr().err


def test_a_length_that_is_read_is_not_said_to_be_ignored(capsys):
    dpr_exemplar_retriever.parse_args(["--max-passage-length", "9"])
    assert "ignored" not in capsys.readouterr().out


def test_random_exemplars_keep_the_rules_and_come_again(workdir, tmp_path):
    found = {}
    for name, seed in (("a", "1"), ("again", "1"), ("b", "2")):
        words = ["--workdir", str(workdir), "--match", "random", "--top-k", "2", "--seed", seed]
        dpr_exemplar_retriever.main([*words, "--splits", "train", "valid", "--output", str(tmp_path / name)])
        for split in ("train", "valid"):
            file = Paths(workdir, exemplars=tmp_path / name).exemplars(split)
            found[name, split] = pd.read_csv(file, dtype=str, keep_default_na=False)
    emotions = {c.key: c.emotion for c in listener_turns(Paths(workdir).dialogues("train"))}
    for row in found["a", "train"].itertuples():
        for key in map(tuple, json.loads(row.exemplars_index)):
            assert key[0] != row.conv_id and emotions[key] == row.emotion
    assert found["a", "valid"].equals(found["again", "valid"])
    assert not found["a", "valid"]["exemplars"].equals(found["b", "valid"]["exemplars"])


#: question, positive, hard negatives, other negatives; the first two questions share their positive
ENTRIES = [
    (
        "i lost my old dog and i am so sad about it",
        "i am so sorry to hear that about your dog",
        ["that is great news for you"],
        ["what did you do then ?"],
    ),
    (
        "my cat is gone since the weekend",
        "i am so sorry to hear that about your dog",
        ["oh no", "this one stands beyond --hard-negatives"],
        ["congratulations !"],
    ),
    (
        "i got the job !",
        "wow , you must be proud of your work",
        ["i am so sorry to hear that about your dog"],
        [],
    ),
    (
        "my friend is moving away",
        "do you think you will see her",
        [],
        ["wow , you must be proud of your work"],
    ),
]


def test_the_first_logged_loss_of_dpr_is_the_formula_where_questions_share_a_positive(workdir, tmp_path):
    """A copy of a question's positive is none of its negatives; every other passage of the batch is one."""
    save_encoders(workdir, tmp_path, dropout=0.0)
    entries = [
        {
            "question": question,
            "positive_ctxs": [{"title": "", "text": positive}],
            "hard_negative_ctxs": [{"title": "", "text": t} for t in hard],
            "negative_ctxs": [{"title": "", "text": t} for t in other],
        }
        for question, positive, hard, other in ENTRIES
    ]
    for split in ("train", "valid"):
        file = Paths(workdir).dpr_data("empd", split)
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(entries), encoding="utf-8")
    train_dpr.main(
        ["--workdir", str(workdir), "--device", "cpu", "--max-steps", "1", "--batch-size", "4"]
        + ["--question-encoder", str(tmp_path / "question_encoder")]
        + ["--context-encoder", str(tmp_path / "context_encoder")]
        + ["--max-length", "8", "--max-passage-length", "9"]
    )
    written = logged(Paths(workdir).saved / "dpr" / "empd", "train")[0]

    question, context, tokenizer = load_encoders(tmp_path)
    texts = []
    for _, positive, hard, other in ENTRIES:
        texts += [positive, *hard[:1], *other[:1]]
    questions = text_vectors(question, tokenizer, [e[0] for e in ENTRIES], 8, "latest")
    scores = (questions @ text_vectors(context, tokenizer, texts, 9, "first").T).tolist()
    losses = []
    for row, (_, positive, _, _) in zip(scores, ENTRIES, strict=True):
        own = row[texts.index(positive)]
        rivals = [score for score, text in zip(row, texts, strict=True) if text != positive]
        losses.append(math.log(sum(math.exp(s - own) for s in [own, *rivals])))
    assert written["nll"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert written["loss"] == pytest.approx(written["nll"])
