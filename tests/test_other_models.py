"""Models and data that are not the default: other encoders as critics, padded vocabularies, what cannot be
learnt."""

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import logged
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    ByT5Tokenizer,
    GPT2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

import critic_training
import critics
import dpr_exemplar_retriever
import generators
import label_dialogues
import labelling
import predicting
import train_empathy_classifier
import train_glove_t5
import train_sentiment_regressor
import train_t5
from corpora import listener_turns, read_labels
from critic_set import CriticSet
from dataloaders import critic_data, generator_data, tokenizer_hash
from DPR import evaluate_retriever, learning, train_dpr
from DPR.biencoder import embed, load_side, require_fitting
from DPR.index import Index
from DPR.learning import read_entries, without_rivals
from DPR.retriever import Retriever, write_exemplars
from models import Critic, Generator, soft_response
from options import Paths, UserError
from pretrained import load_encoder, load_tokenizer, positions, without_word
from responder import Responder
from session import Session
from settings import Decoding

WORDS = 60
#: in the published order of RoBERTa's relatives; MPNet takes id 1 for padding whatever its config says
MARKS = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>"}
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}
#: what each type's config calls its sizes, where it is not BERT's name
OTHERS = {
    "bert": SHAPE,
    "roberta": SHAPE,
    "xlm-roberta": SHAPE,
    "mpnet": SHAPE,
    "albert": SHAPE | {"embedding_size": 16},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 40},
    "electra": SHAPE | {"embedding_size": 16},
    "deberta-v2": SHAPE
    | {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c"]},
    "modernbert": SHAPE,
    "mt5": {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64, "num_layers": 2},
    "umt5": {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64, "num_layers": 2},
}


@pytest.fixture(scope="module")
def words(prepared) -> list[str]:
    """Some words of the corpus."""
    text = " ".join(e.response.lower() for e in listener_turns(Paths(prepared).dialogues("train")))
    return list(dict.fromkeys(w for w in text.split() if w.isalpha()))[: WORDS - 4]


def make_tokenizer(words, **marks) -> PreTrainedTokenizerFast:
    """<s> 0, <pad> 1, </s> 2, <unk> 3, then the words."""
    marks = MARKS | marks
    marks = {k: v for k, v in marks.items() if v is not None}
    vocabulary = {w: i for i, w in enumerate([*MARKS.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks)


def config_of(kind: str, **changes):
    return AutoConfig.for_model(
        kind, **{"vocab_size": WORDS, "pad_token_id": 1, "eos_token_id": 2} | OTHERS[kind] | changes
    )


def save_model(folder, kind: str, words, **changes):
    """A masked (or sequence-to-sequence) language model with its tokenizer: what the hub holds of these."""
    torch.manual_seed(5)
    auto = AutoModelForSeq2SeqLM if kind in ("mt5", "umt5") else AutoModelForMaskedLM
    auto.from_config(config_of(kind, **changes)).save_pretrained(folder)
    make_tokenizer(words).save_pretrained(str(folder))
    return folder


def critic_flags(workdir, model, *more) -> list[str]:
    flags = [
        "--workdir",
        workdir,
        "--device",
        "cpu",
        "--model",
        model,
        "--max-steps",
        "2",
        "--batch-size",
        "8",
    ]
    return [str(f) for f in [*flags, "--context-len", "12", "--reply-len", "12", "--lr", "1e-3", *more]]


def refusal(main, flags) -> str:
    with pytest.raises(UserError) as error:
        main(flags)
    return str(error.value)


# --------------------------------------------------------------------------------------------------- encoders


@pytest.mark.parametrize("pooling", ["first", "reply"])
@pytest.mark.parametrize("kind", OTHERS)
def test_an_encoder_of_any_of_these_types_is_saved_and_scores_as_before(tmp_path, words, kind, pooling):
    encoder = load_encoder(save_model(tmp_path / "model", kind, words))
    settings = {
        "kind": "emo",
        "outputs": 3,
        "pooling": pooling,
        "context_len": 12,
        "reply_len": 12,
        "head_dropout": 0.1,
        "word_dropout": 0.0,
        "backbone": encoder.config.to_dict(),
        "tokenizer": "words",
    }
    critic = Critic(settings, encoder).eval()
    critic.save_pretrained(tmp_path / "critic")
    loaded = Critic.from_pretrained(tmp_path / "critic")
    ids = torch.tensor([[0, 7, 8, 2, 9, 10, 11, 2], [0, 12, 2, 13, 2, 1, 1, 1]])
    mask = (ids != 1).long()
    reply = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0, 0]])
    scores = critic(ids, mask, reply)
    assert torch.equal(loaded(ids, mask, reply), scores)
    # alone, without padding, and from word ids by the model's own way
    torch.testing.assert_close(critic(ids[1:, :5], mask[1:, :5], reply[1:, :5])[0], scores[1])
    hidden = encoder(input_ids=ids[1:, :5]).last_hidden_state[0]  # (5, D)
    if pooling == "first":
        torch.testing.assert_close(critic.head(hidden[0]), scores[1], atol=1e-5, rtol=1e-4)
    else:
        said = encoder.get_input_embeddings()(ids[1, 3:5])  # (2, D of the words)
        parts = [hidden[3:].mean(0), hidden[3:].amax(0), said.mean(0), said.amax(0)]
        torch.testing.assert_close(critic.head(torch.cat(parts)), scores[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", OTHERS)
def test_every_weight_of_a_critic_is_pretrained_and_trained(tmp_path, words, kind):
    """A layer that nothing reads (a pooler) would be random, and stop training on several processes."""
    folder = save_model(tmp_path, kind, words)
    encoder = load_encoder(folder)
    auto = AutoModelForSeq2SeqLM if kind in ("mt5", "umt5") else AutoModelForMaskedLM
    stored = auto.from_pretrained(folder).state_dict()
    for name, weight in encoder.state_dict().items():
        if "position_ids" not in name and "token_type_ids" not in name:
            there = [w for n, w in stored.items() if n.endswith(name)]
            assert any(w.shape == weight.shape and torch.equal(w, weight) for w in there), name
    ids = torch.tensor([[0, 7, 8, 2, 9, 2]])
    encoder.train()
    words_in = F.embedding(ids, encoder.get_input_embeddings().weight)
    hidden = encoder(inputs_embeds=words_in, attention_mask=torch.ones_like(ids)).last_hidden_state
    (hidden * torch.randn_like(hidden)).sum().backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("kind", ["distilbert", "modernbert", "bert", "mt5"])
def test_the_dropout_asked_for_is_the_encoders_whatever_it_calls_it(tmp_path, words, kind):
    encoder = load_encoder(save_model(tmp_path, kind, words), dropout=0.25)
    inside = {m.p for m in encoder.modules() if isinstance(m, torch.nn.Dropout)}
    assert inside - {0.0} == {0.25}


def test_other_encoders_are_trained_and_label_as_they_score_by_word_ids(workdir, tmp_path, words):
    runs = {}
    for dim, kind in (("emo", "xlm-roberta"), ("exp", "mpnet"), ("int", "albert")):
        folder = save_model(tmp_path / kind, kind, words)
        pooling = ["--pooling", "reply"] if kind == "albert" else []
        train_empathy_classifier.main(critic_flags(workdir, folder, "--dim", dim, *pooling))
        runs[dim] = workdir / "saved" / "empathy" / f"{kind}-{dim}"
    folder = save_model(tmp_path / "distilbert", "distilbert", words)
    assert math.isfinite(train_sentiment_regressor.main(critic_flags(workdir, folder))["valid"]["mse"])
    flags = [f for dim, run in runs.items() for f in (f"--{dim}", str(run))]
    label_dialogues.main(["--workdir", str(workdir), "--device", "cpu", "--splits", "valid", *flags])
    paths = Paths(workdir)
    examples = listener_turns(paths.dialogues("valid"))
    found = read_labels(paths.labels("valid"), examples)
    for dim in ("emo", "exp"):  # "first": written out with the model itself
        critic, tokenizer = Critic.from_pretrained(runs[dim]), load_tokenizer(runs[dim])
        for example, label in zip(examples, found[dim], strict=True):
            said = [i for turn in example.history for i in tokenizer.encode(turn, add_special_tokens=False)]
            reply = tokenizer.encode(example.response, add_special_tokens=False)[:12]
            ids = torch.tensor([[0, *said[-12:], 2, *reply, 2]])
            with torch.no_grad():
                scores = critic.head(critic.encoder(input_ids=ids).last_hidden_state[0, 0])
            assert scores.max() - scores[label] < 1e-4


@pytest.mark.parametrize("model", ["bart", "gpt2", "fnet"])
def test_what_is_no_encoder_for_critics_is_refused_in_words(workdir, tmp_path, words, model):
    folder = tmp_path / model
    sizes = {
        "bart": {
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
        },
        "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2},
        "fnet": {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32},
    }[model]
    config = AutoConfig.for_model(
        model, vocab_size=WORDS, pad_token_id=1, bos_token_id=0, eos_token_id=2, **sizes
    )
    if model == "gpt2":
        GPT2Model(config).save_pretrained(folder)
    else:
        AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    make_tokenizer(words).save_pretrained(str(folder))
    text = refusal(train_empathy_classifier.main, critic_flags(workdir, folder, "--dim", "emo"))
    assert str(folder) in text and f"a {model} model" in text and "\n" not in text


def test_a_causal_language_model_in_place_of_a_t5_names_the_script_for_it(tmp_path, prepared):
    AutoConfig.for_model("llama", vocab_size=WORDS).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="a llama model; the generator needs a T5; train_causal_lm.py is for"):
        generators.load_t5(str(tmp_path), False, 0.1, Paths(prepared))


def test_bart_is_refused_as_generator_and_as_encoder_of_exemplars(tmp_path, words, prepared):
    config = AutoConfig.for_model("bart", vocab_size=WORDS, d_model=32, encoder_layers=1, decoder_layers=1)
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="a bart model; the generator needs a T5$"):
        generators.load_t5(str(tmp_path), False, 0.1, Paths(prepared))
    options = SimpleNamespace(add_exemplars="t5", exemplar_model=str(tmp_path))
    with pytest.raises(UserError, match="--exemplar-model .* a bart model, not a T5"):
        generators.exemplars.way_settings(options, "tiny", Paths(prepared))


def test_the_encoder_half_of_a_t5_is_a_critic_and_no_generator(tmp_path, words, prepared):
    torch.manual_seed(2)
    half = T5EncoderModel(T5Config(**OTHERS["mt5"], vocab_size=WORDS))
    half.save_pretrained(tmp_path)
    make_tokenizer(words).save_pretrained(str(tmp_path))
    loaded = load_encoder(tmp_path)
    assert torch.equal(loaded.get_input_embeddings().weight, half.get_input_embeddings().weight)
    with pytest.raises(UserError, match="weights lack"):
        generators.load_t5(str(tmp_path), False, 0.1, Paths(prepared))


def test_a_folder_without_its_tokenizer_is_no_model_whose_words_are_all_unknown(tmp_path):
    for kind, config in (("bert", BertConfig(vocab_size=WORDS)), ("t5", T5Config(vocab_size=WORDS))):
        config.save_pretrained(tmp_path / kind)
        with pytest.raises(UserError, match=f"{kind}: there are no files of its tokenizer, .*save the tok"):
            load_tokenizer(tmp_path / kind)


def byte_t5(folder) -> str:
    """A T5 over bytes, as ByT5; its config does not say how a reply begins."""
    torch.manual_seed(3)
    config = T5Config(**OTHERS["mt5"], vocab_size=384, decoder_start_token_id=None)
    T5ForConditionalGeneration(T5Config(**OTHERS["mt5"], vocab_size=384)).save_pretrained(folder)
    config.save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(str(folder))
    return str(folder)


def test_a_t5_over_bytes_trains_replies_and_says_what_it_cuts(workdir, tmp_path, capsys):
    model = ["--workdir", str(workdir), "--model", byte_t5(tmp_path / "byt5"), "--name", "bytes"]
    flags = "--device cpu --add-exemplars none --empathy-loss-w 0 --sentiment-loss-w 0 --max-steps 2"
    train_t5.main([*model, *flags.split(), "--batch-size", "4", "--no-predict"])
    said = capsys.readouterr().out
    assert re.search(r"--tgt-len 50 cuts \d+ of \d+ training replies, which lose their end; raise it", said)
    assert "--src-len 200 cuts" in said
    answer = Responder.from_pretrained(workdir / "saved" / "t5" / "bytes", session=Session("cpu"))
    assert isinstance(answer.reply(["My dog died last week."], n_candidates=1).reply, str)


def test_what_cuts_few_texts_is_not_warned_of(workdir, capsys):
    flags = (
        "--device cpu --size tiny --add-exemplars none --empathy-loss-w 0 --sentiment-loss-w 0 --max-steps 1"
    )
    train_glove_t5.main(["--workdir", str(workdir), *flags.split(), "--no-predict"])
    critic = ["--workdir", str(workdir), *"--device cpu --model glove-t5 --size tiny --dim emo".split()]
    train_empathy_classifier.main([*critic, "--max-steps", "1"])
    assert " cuts " not in capsys.readouterr().out
    train_empathy_classifier.main([*critic, "--max-steps", "1", "--reply-len", "2", "--name", "short"])
    assert "WARNING: --reply-len 2 cuts" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["model.safetensors", "spiece.model", "pytorch_model.bin"])
def test_a_pointer_in_place_of_a_file_names_git_lfs(tmp_path, prepared, name):
    folder = Path(byte_t5(tmp_path / "cloned"))
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match=rf"{name}: a pointer of Git LFS.*git lfs pull"):
        generators.load_t5(str(folder), False, 0.1, Paths(prepared))


def test_damaged_weights_never_advise_to_read_them_unsafely(tmp_path, prepared):
    folder = Path(byte_t5(tmp_path / "damaged"))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError) as error:
        generators.load_t5(str(folder), False, 0.1, Paths(prepared))
    assert "damaged" in str(error.value) and "weights_only" not in str(error.value)


def test_a_run_or_an_adapter_given_as_a_model_says_what_is_for_it(home, tmp_path, prepared):
    with pytest.raises(UserError, match="a run of this project, not a model of transformers: .*--init-from"):
        generators.load_t5(str(home / "saved" / "glove-t5" / "exemplars"), False, 0.1, Paths(prepared))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="an adapter without its base; merge them"):
        generators.load_t5(str(tmp_path), False, 0.1, Paths(prepared))


# -------------------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize(
    ("kind", "most"),
    [
        ("bert", 40),
        ("roberta", 38),
        ("xlm-roberta", 38),
        ("mpnet", 38),
        ("albert", 40),
        ("distilbert", 40),
        ("modernbert", 40),
        ("deberta-v2", None),
        ("mt5", None),
    ],
)
def test_an_encoder_reads_as_many_tokens_as_it_says(tmp_path, words, kind, most):
    """RoBERTa and its relatives count from behind the padding's position, 1."""
    encoder = load_encoder(save_model(tmp_path, kind, words))
    assert positions(encoder) == most
    width = encoder.get_input_embeddings().weight.shape[1]
    read = most or 90
    assert encoder(inputs_embeds=torch.zeros(1, read, width)).last_hidden_state.shape == (1, read, 32)
    if most and kind != "modernbert":  # rotary positions have no end, only one that was trained
        with pytest.raises((IndexError, RuntimeError)):
            encoder(inputs_embeds=torch.zeros(1, read + 1, width))


def test_lengths_beyond_an_encoders_positions_are_refused_before_training(workdir, tmp_path, words):
    folder = save_model(tmp_path / "roberta", "roberta", words)
    flags = critic_flags(workdir, folder, "--dim", "emo")
    text = refusal(train_empathy_classifier.main, [*flags, "--context-len", "24"])  # 1 + 24 + 1 + 12 + 1 = 39
    assert "--context-len 24" in text and "--reply-len 12" in text and "only 38" in text and "most 35" in text
    assert not (workdir / "saved" / "empathy").exists()
    train_empathy_classifier.main([*flags, "--context-len", "23"])


@pytest.mark.parametrize("side", ["question", "context"])
def test_a_retriever_asked_to_read_more_than_its_encoder_can_is_refused(prepared, tmp_path, side):
    folder = tmp_path / "bert"
    shutil.copytree(prepared / "data" / "bert-tiny", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}))
    weights = load_file(folder / "model.safetensors")
    table = next(n for n in weights if n.endswith("position_embeddings.weight"))
    weights[table] = weights[table][:16].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    encoder, tokenizer = load_side(folder, side), load_tokenizer(folder)
    require_fitting(encoder, tokenizer, "--max-length", 16)
    with pytest.raises(UserError, match="--max-length 17.*only 16"):
        require_fitting(encoder, tokenizer, "--max-length", 17)
    flags = [
        "--workdir",
        str(prepared),
        "--device",
        "cpu",
        "--encoder",
        str(folder),
        "--output",
        str(tmp_path),
    ]
    lengths = {"question": "16", "context": "16"} | {side: "17"}
    flags += ["--max-length", lengths["question"], "--max-passage-length", lengths["context"]]
    flag = "--max-length" if side == "question" else "--max-passage-length"
    assert f"{flag} 17" in refusal(dpr_exemplar_retriever.main, flags)


# ------------------------------------------------------------------------------------------------------ words


@pytest.mark.parametrize("missing", ["padding", "end or separator"])
def test_a_tokenizer_without_a_token_of_the_layout_is_refused(workdir, tmp_path, words, missing):
    folder = save_model(tmp_path / "model", "bert", words)
    lacking = {"pad_token": None} if missing == "padding" else {"sep_token": None}
    make_tokenizer(words, **lacking).save_pretrained(str(folder))
    text = refusal(train_empathy_classifier.main, critic_flags(workdir, folder, "--dim", "emo"))
    assert f"no {missing} token" in text and str(folder) in text


def test_a_tokenizer_with_more_words_than_the_model_is_refused(workdir, tmp_path, words):
    folder = save_model(tmp_path / "model", "bert", words)
    make_tokenizer([*words, "onemore"]).save_pretrained(str(folder))
    text = refusal(train_empathy_classifier.main, critic_flags(workdir, folder, "--dim", "emo"))
    assert "ids reach 60" in text and "knows 60 words" in text


def t5_of(vocabulary: int) -> T5ForConditionalGeneration:
    torch.manual_seed(1)
    sizes = OTHERS["mt5"] | {"decoder_start_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    return T5ForConditionalGeneration(T5Config(vocab_size=vocabulary, **sizes))


def t5_critic(vocabulary: int, words: str) -> Critic:
    settings = {
        "kind": "emo",
        "outputs": 3,
        "pooling": "first",
        "context_len": 12,
        "reply_len": 12,
        "head_dropout": 0.1,
        "word_dropout": 0.0,
        "tokenizer": words,
        "backbone": t5_of(vocabulary).config.to_dict(),
    }
    return Critic(settings)


def test_critics_padded_as_their_generator_serve_as_a_loss_and_others_are_refused(words):
    known = tokenizer_hash(make_tokenizer(words))
    padded = CriticSet({"emo": t5_critic(WORDS + 28, known)}, torch.device("cpu"))
    padded.check_tokenizer(known, WORDS + 28)
    logits = torch.randn(2, 5, WORDS + 28, requires_grad=True)
    batch = {"context_ids": torch.tensor([[5, 2], [6, 2]]), "critic_targets": {"emo": torch.tensor([0, 2])}}
    batch["labels"] = torch.tensor([[5, 6, 7, 8, 2]] * 2)
    batch["context_mask"] = torch.ones(2, 2, dtype=torch.long)
    batch["reply_mask"] = torch.ones(2, 5, dtype=torch.long)
    padded.losses(soft_response(logits, 0), batch)["emo"].backward()
    assert torch.isfinite(logits.grad).all() and logits.grad.abs().max() > 0
    with pytest.raises(UserError, match="emo critic has 88 word embeddings, the generator 60"):
        padded.check_tokenizer(known, WORDS)


@pytest.mark.parametrize("beams", [1, 3])
def test_no_reply_holds_an_id_beyond_the_tokenizers_words(words, beams):
    tokenizer, t5 = make_tokenizer(words), t5_of(WORDS + 28)
    with torch.no_grad():  # the padding's scores are the farthest from 0
        t5.get_input_embeddings().weight[WORDS:] *= 5
    settings = {"backbone": t5.config.to_dict(), "exemplars": "none"}
    model = Generator(settings, t5).eval()
    ids = torch.tensor([[5, 6, 7, 2]] * 8)
    batch = {"source_ids": ids, "source_mask": torch.ones_like(ids), "speaker_ids": torch.ones_like(ids)}
    decoding = Decoding(20, 0.9, 10, beams=beams, predict_batch_size=8, seed=1)
    assert without_word(tokenizer, WORDS + 28) == list(range(WORDS, WORDS + 28))
    free = predicting.decoding_arguments(decoding, tokenizer, WORDS)
    assert model.generate(batch, **free).max() >= WORDS  # they would come
    arguments = predicting.decoding_arguments(decoding, tokenizer, WORDS + 28)
    assert model.generate(batch, **arguments).max() < WORDS
    predictor = predicting.Predictor(model, tokenizer, None, decoding, Session("cpu"))
    assert predictor.arguments == arguments


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_deterministic_kernels_leave_top_p_its_one_sum(top_p):
    """Of which a GPU has no deterministic one; transformers takes it."""
    seen = []

    class Writes:
        def generate(self, batch, **arguments):
            seen.append(torch.is_deterministic_algorithms_warn_only_enabled())
            return torch.tensor([[1]])

    class Reads:
        pad_token_id = bos_token_id = unk_token_id = None

        def batch_decode(self, rows, **_):
            return ["yes"]

    arguments = {"do_sample": True, **({"top_p": top_p} if top_p < 1 else {})}
    torch.use_deterministic_algorithms(True)
    try:
        predicting.reply(Writes(), Reads(), {}, arguments)
        assert seen == [top_p < 1]
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_weights_cast_once_write_and_score_what_weights_cast_in_each_pass_do(workdir, monkeypatch):
    """Under bf16, where autocast would cast them for each token of a reply."""
    backbone = generators.load_t5("t5-tiny", False, 0.1, Paths(workdir))
    model = Generator({"backbone": backbone.t5.config.to_dict(), "exemplars": "none"}, backbone.t5)
    talks = listener_turns(Paths(workdir).dialogues("valid"))[:4]
    data = generator_data(talks, backbone.tokenizer, src_len=30, tgt_len=None)
    found = []
    for cast in (lambda *_: None, predicting.cast_frozen):
        monkeypatch.setattr(predicting, "cast_frozen", cast)
        session = Session("cpu", "bf16", 1)
        decoding = Decoding(20, 0.9, 8, seed=1)
        predictor = predicting.Predictor(model, backbone.tokenizer, data, decoding, session)
        found.append(predictor.batch(0, [0, 1, 2, 3]))
    assert any(m.weight.dtype == torch.bfloat16 for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert found[0]["response"].tolist() == found[1]["response"].tolist()
    assert found[0]["nll"].tolist() == found[1]["nll"].tolist()


# ----------------------------------------------------------------------------------------------- not a number


@pytest.fixture
def session():
    return Session("cpu", "fp32", 1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["question", "context"])
def test_vectors_that_are_not_finite_are_refused_with_side_and_text(prepared, session, side, value):
    folder = prepared / "data" / "bert-tiny"
    encoder, tokenizer = load_side(folder, side), load_tokenizer(folder)
    texts = ["i am sad", "oh", "i am sad", "my dog is happy"]
    row = tokenizer("dog", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        encoder.base_model.get_input_embeddings().weight[row] = value
    with pytest.raises(
        UserError, match=f"candidates: the {'question' if side == 'question' else 'passage'}.*text 3"
    ):
        embed(encoder, tokenizer, texts, session, 32, side == "question", "candidates")


def test_an_index_refuses_vectors_without_a_place_in_any_order():
    good = np.ones((3, 4), np.float32)
    for value in (np.nan, np.inf, -np.inf, 1e30):
        bad = good.copy()
        bad[1, 2] = value
        with pytest.raises(UserError, match="candidate 1 "):
            Index(bad, ["a", "b", "c"])
        with pytest.raises(UserError, match="query 1 "):
            Index(good, ["a", "b", "c"]).search(bad, 2, [None] * 3)


def test_scores_that_are_no_numbers_never_become_labels(words, session):
    critic = t5_critic(WORDS, "words").eval()
    critic.head.weight.data[0] = math.nan
    data = critic_data([("hello",)], ["you"], None, make_tokenizer(words), critic.settings)
    with pytest.raises(UserError, match="emo critic's score of row 0 is not finite"):
        critics.critic_scores(critic, data, session, "valid")


# ------------------------------------------------------------------------- what has nothing to be learnt from


def entry(question: str, positive: str | None, *negatives: str) -> dict:
    return {
        "question": question,
        "positive_ctxs": [{"text": positive}] if positive else [],
        "hard_negative_ctxs": [{"text": t} for t in negatives],
        "negative_ctxs": [],
    }


def write_entries(workdir, train: list[dict], valid: list[dict] | None = None) -> None:
    folder = workdir / "data" / "dpr"
    folder.mkdir(parents=True, exist_ok=True)
    for split, entries in (("train", train), ("valid", valid or train)):
        (folder / f"empd_{split}.json").write_text(json.dumps(entries))


def retriever_flags(workdir, *more) -> list[str]:
    encoder = workdir / "data" / "bert-tiny"
    flags = [
        "--workdir",
        workdir,
        "--device",
        "cpu",
        "--encoder",
        encoder,
        "--epochs",
        "1",
        "--log-every",
        "1",
    ]
    return [str(f) for f in [*flags, *more]]


SEVEN = [entry(f"question {i}", f"answer {i}") for i in range(7)]


def test_questions_that_never_meet_another_passage_are_refused(workdir):
    write_entries(workdir, SEVEN)
    text = refusal(train_dpr.main, retriever_flags(workdir, "--batch-size", "1"))
    assert "nothing to tell" in text and "--batch-size above 1" in text and "empd_train.json" in text
    write_entries(workdir, [entry(f"question {i}", "the one answer", "the one answer") for i in range(7)])
    assert "nothing to tell" in refusal(train_dpr.main, retriever_flags(workdir, "--batch-size", "4"))


@pytest.mark.parametrize(
    ("entries", "flags", "alone"),
    [
        (SEVEN, ("--batch-size", "2"), "1 of 7"),  # the last batch of an epoch
        (
            SEVEN,
            ("--batch-size", "1", "--accumulate", "4"),
            None,
        ),  # micro-batches of one, although four an update
        ([*SEVEN[:6], entry("q", "p", "n")], ("--batch-size", "1"), "6 of 7"),
        (SEVEN[:6], ("--batch-size", "2"), ""),
        ([entry(f"q {i}", "p", f"n {i}") for i in range(3)], ("--batch-size", "1"), ""),
    ],
)
def test_questions_that_meet_no_other_passage_are_counted_aloud(workdir, capsys, entries, flags, alone):
    write_entries(workdir, entries)
    if alone is None:
        assert "nothing to tell" in refusal(train_dpr.main, retriever_flags(workdir, *flags))
        return
    train_dpr.main(retriever_flags(workdir, *flags))
    said = [line for line in capsys.readouterr().out.splitlines() if "nothing to tell" in line]
    assert [alone in line and "WARNING" in line for line in said] == ([True] if alone else [])
    zero = [r for r in logged(workdir / "saved/dpr/empd", "train") if r["nll"] < 1e-6]
    assert len(zero) == int(alone.split()[0] or 0 if alone else 0)  # that many updates of one question


def test_passages_of_all_processes_are_rivals():
    passages = [[f"answer {i}"] for i in range(4)]
    assert without_rivals([[0, 1, 2, 3]], passages, accumulate=1, world=2) == []
    assert without_rivals([[0, 1, 2]], passages, accumulate=2, world=1) == [1]  # dealt as 0 2 | 1
    assert without_rivals([[0, 1, 2]], passages, accumulate=2, world=2) == [
        2
    ]  # 0 and 1 together, then 2 alone


def test_entries_without_a_positive_are_left_out_aloud_where_asked_to(workdir, capsys):
    write_entries(workdir, [*SEVEN, entry("nothing", None, "a negative")], SEVEN)
    text = refusal(train_dpr.main, retriever_flags(workdir, "--batch-size", "4"))
    assert "entry 7" in text and "--drop-without-positive" in text
    train_dpr.main(retriever_flags(workdir, "--batch-size", "4", "--drop-without-positive"))
    out = capsys.readouterr().out
    assert "1 of 8 entries left out" in out and "data: 7 examples" in out
    write_entries(workdir, SEVEN, [*SEVEN, entry("nothing", None, "a negative")])
    evaluate_retriever.main(["--bm25", "--workdir", str(workdir), "--device", "cpu"])
    assert "1 of 8 entries left out" in capsys.readouterr().out
    file = workdir / "none.json"
    file.write_text(json.dumps([entry("q", None)]))
    with pytest.raises(UserError, match="none of its 1 entries"):
        read_entries(file, drop_without_positive=True)
    file.write_text(
        json.dumps([*SEVEN, {"question": "q", "hard_negative_ctxs": [{"text": "t"}]}])
    )  # no such key
    assert read_entries(file, drop_without_positive=True) == SEVEN
    file.write_text(json.dumps([*SEVEN, {"question": 3}]))
    with pytest.raises(UserError, match="entry 7: needs question"):
        read_entries(file, drop_without_positive=True)


# -------------------------------------------------------------------------- said by the stage that makes them


@pytest.mark.parametrize(
    ("valid", "baselines", "useless"),
    [
        ({"mse": 0.2}, {"mean": {"mse": 0.1}}, True),
        ({"mse": math.nan}, {"mean": {"mse": 0.1}}, True),
        ({"mse": 0.05}, {"mean": {"mse": 0.1}}, False),
        ({"accuracy": 60.0, "macro_f1": 25.0}, {"majority": {"accuracy": 60.0, "macro_f1": 25.0}}, True),
        ({"accuracy": 70.0, "macro_f1": 50.0}, {"majority": {"accuracy": 60.0, "macro_f1": 25.0}}, False),
        # of rare labels some are found, though fewer are right in all; a few points of F1 are chance
        ({"accuracy": 55.0, "macro_f1": 40.0}, {"majority": {"accuracy": 60.0, "macro_f1": 25.0}}, False),
        ({"accuracy": 55.0, "macro_f1": 29.0}, {"majority": {"accuracy": 60.0, "macro_f1": 25.0}}, True),
    ],
)
def test_a_critic_no_better_than_guessing_is_said_where_it_is_trained(valid, baselines, useless, capsys):
    session = Session("cpu", "fp32", 1)
    critic_training.report({"kind": "emo", "valid": valid, "baselines": baselines}, session)
    assert ("WARNING: the emo critic is no better than guessing" in capsys.readouterr().out) == useless


def test_labels_of_one_class_are_said_where_they_are_made(trained_copy, capsys):
    run = trained_copy / "saved" / "empathy" / "glove-t5-emo"
    critic = Critic.from_pretrained(run)
    with torch.no_grad():
        critic.head.weight.zero_()
        critic.head.bias.copy_(torch.tensor([0.0, 9.0, 0.0])[: len(critic.head.bias)])
    critic.save_pretrained(run)
    result = json.loads((run / "result.json").read_text())
    result["valid"] = result["baselines"]["majority"]
    (run / "result.json").write_text(json.dumps(result))
    flags = ["--workdir", str(trained_copy), "--device", "cpu", "--family", "glove-t5", "--splits", "valid"]
    label_dialogues.main([*flags, "--overwrite"])
    out = capsys.readouterr().out
    assert "every one of the emo critic's labels is 1" in out
    assert "critic emo" in out and "no better than guessing" in out


def test_columns_with_more_than_one_value_are_not_warned_of():
    table = pd.DataFrame({"emo": [0, 1], "exp": [2, 2], "int": [0, 2], "sentiment": [0.0, 0.0]})
    assert [line.split(" is ")[0] for line in labelling.one_sided(table)] == [
        "every one of the exp critic's labels",
        "every one of VADER's scores",
    ]


@pytest.mark.parametrize("candidates", ["same-emotion", "all"])
def test_exemplars_for_nobody_are_said_where_they_are_made(prepared, tmp_path, capsys, candidates):
    examples = listener_turns(Paths(prepared).dialogues("valid"))[:3]
    for hits, said in ([], "no listener turn gets an exemplar"), ([(0, 1.0)], "2 get no exemplar"):
        write_exemplars(
            tmp_path / "valid_dpr.csv", examples, examples, [hits, [], []], {"candidates": candidates}
        )
        out = capsys.readouterr().out
        assert "WARNING" in out and said in out
        assert ("--candidates all" in out) == (candidates == "same-emotion")
    write_exemplars(tmp_path / "valid_dpr.csv", examples, examples, [[(0, 1.0)]] * 3, {})
    assert "WARNING" not in capsys.readouterr().out


def test_a_retriever_that_ranks_by_chance_is_said(workdir, capsys, monkeypatch):
    write_entries(workdir, SEVEN)
    monkeypatch.setattr(
        learning, "embed", lambda model, tokenizer, texts, *a: np.ones((len(texts), 4), np.float32)
    )
    train_dpr.main(retriever_flags(workdir, "--batch-size", "4"))
    assert "no better than chance (3.0)" in capsys.readouterr().out


def test_what_labels_are_worth_is_said_where_they_are_made(trained_copy, tmp_path, capsys):
    file = Paths(trained_copy).critic("emo", "glove-t5") / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"reply_len": 3}))
    words = ["--workdir", str(trained_copy), "--device", "cpu", "--family", "glove-t5", "--splits", "valid"]
    label_dialogues.main([*words, "--output", str(tmp_path)])
    said = capsys.readouterr().out
    assert re.search(r"note: valid: \d+ replies are longer than the 3 tokens that emo reads", said)


def test_pretrained_encoders_of_few_positions_are_asked_for_no_more_unless_somebody_does(tmp_path, words):
    place, session = str(save_model(tmp_path, "bert", words)), Session("cpu")
    found = Retriever.from_pretrained(encoder=place, session=session)
    assert found.encoders.lengths == {"question": 40, "context": 40}
    with pytest.raises(UserError, match="--max-length 50: .* reads only 40 tokens"):
        Retriever.from_pretrained(encoder=place, session=session, max_length=50)
