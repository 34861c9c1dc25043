"""What each training keeps: the best of its logged evaluations on valid, which the saved model gives again.

Learning rates are far too high and dropout is strong, so that evaluations go up and down, the last one is not
the best, and a model that is not in eval mode gives other figures.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import logged
from helpers import chat_ids
from sklearn.metrics import f1_score
from test_causal_models import make_tokenizer, save_llama
from transformers import AutoTokenizer, BertConfig, BertModel, DPRContextEncoder, DPRQuestionEncoder

import train_causal_lm
import train_empathy_classifier
import train_glove_t5
import train_sentiment_regressor
import train_t5
from causal_generators import load
from corpora import listener_turns, read_pairs, read_vader
from DPR import prepare_dpr_data, train_dpr
from models import Critic, Generator
from options import Paths
from session import Session


def train(script, workdir, flags: str) -> None:
    script.main(["--workdir", str(workdir), "--device", "cpu", "--eval-every", "1", *flags.split()])


def kept_value(folder, metric: str, best) -> float:
    """What the run kept by `best` (min or max) of its logged evaluations, after a look at log and result."""
    values = {row["step"]: row[metric] for row in logged(folder, "valid")}
    result = json.loads((folder / "result.json").read_text())
    assert result[metric] == best(values.values()) == values[result["best_step"]]
    assert values[max(values)] != result[metric]  # else keeping the last would do as well
    reported = result["after"] if "after" in result else result["valid"]
    assert reported[metric] == pytest.approx(result[metric])
    return result[metric]


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def critic_output(critic, tokenizer, context: list[str], reply: str, context_len: int) -> list[float]:
    """The critic's outputs for one `context </s> reply </s>`, the latest of the context and 64 of the
    reply."""
    before = [i for turn in context for i in ids_of(tokenizer, turn)]
    before = before[max(0, len(before) - context_len) :]
    start = [] if tokenizer.cls_token_id is None else [tokenizer.cls_token_id]
    head = [*start, *before, tokenizer.eos_token_id]
    tail = [*ids_of(tokenizer, reply)[:64], tokenizer.eos_token_id]
    ids = torch.tensor([head + tail])
    reply_mask = torch.tensor([[0] * len(head) + [1] * len(tail)])
    return critic(ids, torch.ones_like(ids), reply_mask)[0].tolist()


def test_the_classifier_of_the_best_macro_f1_on_valid_is_kept(workdir):
    flags = "--model glove-t5 --size tiny --dim emo --lr 0.01 --max-steps 8 --head-dropout 0.8"
    train(train_empathy_classifier, workdir, flags)
    folder = Paths(workdir).critic("emo", "glove-t5")
    kept = kept_value(folder, "macro_f1", max)

    critic, tokenizer = Critic.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    valid = read_pairs(Paths(workdir).pairs("emo", "valid"))
    predicted = []
    for post, reply in zip(valid["seeker_post"], valid["response_post"], strict=True):
        logits = critic_output(critic, tokenizer, [post], reply, context_len=0)
        predicted.append(logits.index(max(logits)))
    assert kept == pytest.approx(100 * f1_score(valid["label"], predicted, average="macro"))


def test_the_heads_of_the_best_mean_macro_f1_on_valid_are_kept(workdir):
    flags = "--model glove-t5 --size tiny --dim all --lr 0.05 --max-steps 8 --head-dropout 0.8"
    train(train_empathy_classifier, workdir, flags)
    folder = Paths(workdir).critic("all", "glove-t5")
    kept = kept_value(folder, "macro_f1", max)
    joint, tokenizer, each = Critic.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), []
    for dim in ("emo", "exp", "int"):
        valid, predicted = read_pairs(Paths(workdir).pairs(dim, "valid")), []
        for post, reply in zip(valid["seeker_post"], valid["response_post"], strict=True):
            logits = critic_output(joint.of(dim), tokenizer, [post], reply, context_len=0)
            predicted.append(logits.index(max(logits)))
        each.append(100 * f1_score(valid["label"], predicted, average="macro"))
    assert kept == pytest.approx(sum(each) / 3)


def test_the_regressor_of_the_lowest_error_on_valid_is_kept(workdir):
    flags = "--model t5 --size tiny --lr 2 --warmup-steps 6 --max-steps 6 --dropout 0.3 --context-len 30"
    train(train_sentiment_regressor, workdir, flags)
    folder = Paths(workdir).critic("sentiment", "t5")
    kept = kept_value(folder, "mse", min)

    critic, tokenizer = Critic.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    errors = []
    for _, turns in read_vader(Paths(workdir).vader("valid")).groupby("conv_id", sort=False):
        texts = turns["utterance"].tolist()
        for n, sentiment in enumerate(turns["sentiment"]):
            (score,) = critic_output(critic, tokenizer, texts[:n], texts[n], context_len=30)
            errors.append((score - sentiment) ** 2)
    assert kept == pytest.approx(sum(errors) / len(errors), rel=1e-4)


@pytest.mark.parametrize(
    ("script", "family", "flags"),
    [(train_t5, "t5", "--model t5-tiny"), (train_glove_t5, "glove-t5", "--size tiny")],
)
def test_the_generator_of_the_lowest_nll_on_valid_is_kept(workdir, script, family, flags):
    flags += " --name run --lr 1.5 --warmup-steps 5 --max-steps 5 --dropout 0.3 --src-len 40 --tgt-len 12"
    flags += " --no-predict --add-exemplars none --empathy-loss-w 0 --sentiment-loss-w 0"
    train(script, workdir, flags)
    folder = Paths(workdir).saved / family / "run"
    kept = kept_value(folder, "nll", min)

    model, tokenizer = Generator.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    nll = tokens = 0
    for example in listener_turns(Paths(workdir).dialogues("valid")):
        ids, speakers = [], []
        for n, turn in enumerate(example.history):
            row = [*ids_of(tokenizer, turn), tokenizer.eos_token_id]
            ids += row
            speakers += [1 + n % 2] * len(row)
        labels = torch.tensor([[*ids_of(tokenizer, example.response), tokenizer.eos_token_id]])
        source = torch.tensor([ids[-40:]])
        batch = {
            "source_ids": source,
            "source_mask": torch.ones_like(source),
            "speaker_ids": torch.tensor([speakers[-40:]]),
            "labels": labels,
        }
        with torch.no_grad():
            nll += float(F.cross_entropy(model(batch)[0], labels[0], reduction="sum"))
        tokens += labels.numel()
    assert kept == pytest.approx(nll / tokens, rel=1e-4)


def test_the_language_model_of_the_lowest_nll_on_valid_is_kept(workdir):
    base = save_llama(workdir / "llama", make_tokenizer())
    flags = (
        f"--model {base} --name run --lr 0.2 --schedule constant --max-steps 9 --epochs 9 --lora-dropout 0.3"
    )
    train(train_causal_lm, workdir, f"{flags} --lora-rank 2 --batch-size 1 --batch-tokens 0 --no-predict")
    folder = Paths(workdir).saved / "causal-lm" / "run"
    kept = kept_value(folder, "nll", min)

    model = load(folder, Paths(workdir), Session("cpu"))
    nll = tokens = 0
    for example in listener_turns(Paths(workdir).dialogues("valid")):
        before = chat_ids(model.tokenizer, example.history, src_len=model.settings.src_len).tolist()
        reply = [*ids_of(model.tokenizer, example.response), model.chat.end_id]
        with torch.no_grad():
            logits = model.lm(torch.tensor([before + reply])).logits[0, len(before) - 1 : -1]
        nll += float(F.cross_entropy(logits, torch.tensor(reply), reduction="sum"))
        tokens += len(reply)
    assert kept == pytest.approx(nll / tokens, rel=1e-3)


@torch.no_grad()
def text_vectors(encoder, tokenizer, texts: list[str]) -> torch.Tensor:
    """(N, E), each text alone."""
    rows = [encoder(**tokenizer(t, return_tensors="pt")).pooler_output[0] for t in texts]
    return torch.stack(rows)


def save_bert(workdir, folder) -> None:
    """A BERT with weights so large that ranks differ from one evaluation to the next."""
    tokenizer = AutoTokenizer.from_pretrained(Paths(workdir).bert_tiny)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.5,
    )
    torch.manual_seed(2)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_the_retriever_of_the_lowest_average_rank_on_valid_is_kept(workdir, tmp_path):
    prepare_dpr_data.main(["--workdir", str(workdir)])
    save_bert(workdir, tmp_path / "bert")
    train(train_dpr, workdir, f"--encoder {tmp_path / 'bert'} --lr 0.01 --max-steps 6")
    folder = Paths(workdir).saved / "dpr" / "empd"
    kept = kept_value(folder, "average_rank", min)

    question = DPRQuestionEncoder.from_pretrained(folder / "question_encoder").eval()
    context = DPRContextEncoder.from_pretrained(folder / "context_encoder").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "question_encoder")
    examples = listener_turns(Paths(workdir).dialogues("valid"))
    entries = json.loads(Paths(workdir).dpr_data("empd", "valid").read_text(encoding="utf-8"))
    passages = {
        p["text"]
        for entry in entries
        for kind in ("positive_ctxs", "hard_negative_ctxs", "negative_ctxs")
        for p in entry[kind]
    }
    passages = sorted(passages)
    questions = text_vectors(question, tokenizer, [" ".join(e.history) for e in examples])
    scores = questions @ text_vectors(context, tokenizer, passages).T
    ranks = []
    for row, example in zip(scores, examples, strict=True):
        ranks.append(int((row > row[passages.index(example.response)]).sum()))
    assert kept == pytest.approx(sum(ranks) / len(ranks))
