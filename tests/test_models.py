"""Critics, soft responses, the frozen critic set and the generator, with tiny random configs."""

import copy
import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import forward_soft
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

import models
import train_t5
from critic_set import CriticSet
from dataloaders import in_pieces, pad, reply_layout
from glove_models import glove_config, word_tokenizer
from models import Critic, Generator, soft_response, token_nll
from options import UserError
from pretrained import load_encoder
from settings import GeneratorOptions, pick

VOCAB, EOS = 50, 1
NONE = np.zeros(0, dtype=np.int64)


# ---------------------------------------------------------------------------------------------------- helpers


def t5_config(vocab=VOCAB, **changes) -> T5Config:
    return T5Config(
        vocab_size=vocab,
        d_model=32,
        d_kv=8,
        num_heads=4,
        d_ff=64,
        num_layers=2,
        decoder_start_token_id=0,
        dropout_rate=0.1,
        **changes,
    )


def bert_config() -> BertConfig:
    return BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )


def make_critic(
    kind="emo", pooling="first", backbone=None, vocab=VOCAB, context_len=12, outputs=None, **changes
) -> Critic:
    """A critic in eval mode whose word embeddings differ by position and word."""
    options = {
        "kind": kind,
        "outputs": outputs or (1 if kind == "sentiment" else 3),
        "pooling": pooling,
        "tokenizer": "words",
    }
    options |= {"context_len": context_len, "reply_len": 12, "head_dropout": 0.1, "word_dropout": 0.1}
    options |= {"backbone": (backbone or t5_config(vocab)).to_dict()}
    return Critic(options | changes).eval()


def critic_ids(examples, context_len=12) -> tuple:
    """(context, reply) rows in the critics' layout, padded on the right: what `Critic.forward` takes."""
    rows = [
        reply_layout(np.array(c, dtype=int), np.array(r, dtype=int), EOS, None, context_len, 12)
        for c, r in examples
    ]
    ids, mask = pad([r for r, _ in rows], 0)
    begins = torch.tensor([b for _, b in rows])[:, None]
    return ids, mask, mask * (torch.arange(ids.shape[1]) >= begins)


def critic_soft(examples, context_len=12, vocab=VOCAB) -> tuple:
    """The same rows with the reply as a one-hot distribution: what `forward_soft` takes."""
    context_ids, context_mask = pad(
        [np.append(np.array(c, dtype=int)[-context_len:] if context_len else NONE, EOS) for c, _ in examples],
        0,
        left=True,
    )
    reply_ids, reply_mask = pad([np.append(r, EOS) for _, r in examples], 0)
    return context_ids, context_mask, F.one_hot(reply_ids, vocab).float(), reply_mask


def make_generator(exemplars="none", seed=3, **changes) -> Generator:
    """A generator in eval mode with speaker weights that are not zero."""
    torch.manual_seed(seed)
    options = {
        "exemplars": exemplars,
        "exemplar_width": 16 if exemplars == "t5" else 0,
        "backbone": t5_config().to_dict(),
    }
    options |= {
        "exemplar_backbone": t5_config(VOCAB).to_dict() if exemplars == "glove-t5" else None,
        "tokenizer": "words",
    }
    model = Generator(options | changes).eval()
    with torch.no_grad():
        model.speakers.weight[1:].normal_()
    return model


def make_batch(examples, exemplars="none", critics=False) -> dict:
    """`examples`: (source ids, reply ids, exemplar token lists); exemplar vectors follow from the source."""
    sources, replies, texts = zip(*examples, strict=True)
    source_ids, source_mask = pad([np.array(s) for s in sources], 0)
    batch = {"source_ids": source_ids, "source_mask": source_mask}
    batch["speaker_ids"] = source_mask * (1 + source_ids % 2)
    batch["labels"], batch["reply_mask"] = pad([np.append(r, EOS) for r in replies], -100)
    if exemplars == "t5":
        batch["exemplar_vectors"] = torch.tensor([[math.sin(sum(s) * i) for i in range(16)] for s in sources])
    if exemplars == "glove-t5":
        distinct = list(dict.fromkeys(t for row in texts for t in row))
        batch["exemplar_ids"], batch["exemplar_mask"] = pad([np.array(t) for t in distinct], 0)
        batch["exemplar_share"] = torch.tensor([[row.count(t) / len(row) for t in distinct] for row in texts])
    if critics:
        batch["context_ids"], batch["context_mask"] = pad([np.append(s, EOS) for s in sources], 0, left=True)
        count = len(examples)
        batch["critic_targets"] = {k: torch.arange(count) % 3 for k in ("emo", "exp", "int")} | {
            "sentiment": torch.linspace(-1, 1, count)
        }
    return batch


EXAMPLES = [
    ([5, 6, 7, 8, 9, 10], [11, 12, 13], [(7, 8), (9, 10, 11, 12, 13)]),
    ([20], [21, 22, 23, 24, 25, 26], [(31,)]),
    ([30, 31, 32, 33, 34, 35, 36, 37, 38], [39], [(9, 10, 11, 12, 13), (31,), (44, 45)]),
]
words = st.lists(st.integers(3, VOCAB - 1), max_size=9)
batches = st.lists(st.tuples(words, words), min_size=2, max_size=4)
few = settings(max_examples=30, deadline=None)


# ---------------------------------------------------------------------------------------------- soft response


@pytest.mark.parametrize("strategy", [0, 1, 2])
def test_soft_response_is_a_distribution_over_the_vocabulary(strategy):
    soft = soft_response(torch.randn(3, 7, VOCAB), strategy)
    assert soft.shape == (3, 7, VOCAB)
    assert (soft > -1e-6).all()
    torch.testing.assert_close(soft.sum(-1), torch.ones(3, 7))


def test_straight_through_is_one_hot_forward_and_soft_backward():
    logits = torch.randn(2, 5, VOCAB, requires_grad=True)
    soft = soft_response(logits, 2)
    assert ((soft.detach() - 0).abs().lt(1e-5) | (soft.detach() - 1).abs().lt(1e-5)).all()
    (soft * torch.randn(VOCAB)).sum().backward()
    assert (logits.grad.abs().sum(-1) > 1e-4).all()  # every position learns
    torch.testing.assert_close(
        logits.grad.sum(-1), torch.zeros(2, 5), atol=1e-5, rtol=0
    )  # the gradient of a softmax


def test_only_the_gumbel_strategies_are_random():
    logits = torch.randn(2, 5, VOCAB)
    same = [torch.equal(soft_response(logits, s), soft_response(logits, s)) for s in (0, 1, 2)]
    assert same == [True, False, False]


@pytest.mark.parametrize("strategy", [0, 1, 2])
def test_soft_embedding_of_confident_logits_is_the_true_tokens(strategy):
    embeddings = make_critic(vocab=2000).embeddings
    ids = torch.randint(0, 2000, (4, 6))
    logits = 50 * F.one_hot(ids, 2000).float()

    def cosine(soft):
        return F.cosine_similarity(soft @ embeddings, embeddings[ids], dim=-1)

    assert cosine(soft_response(logits, strategy)).min() > 0.99
    assert (
        cosine(logits.softmax(dim=1)).mean() < 0.5
    )  # the published fault, over positions, would be seen here


# ---------------------------------------------------------------------------------------------------- critics


@pytest.mark.parametrize("pooling", ["first", "reply"])
@pytest.mark.parametrize("backbone", [t5_config, bert_config])
def test_critic_scores_an_example_alone_as_in_any_batch(pooling, backbone):
    critic = make_critic(pooling=pooling, backbone=backbone())

    @few
    @given(batches)
    def check(examples):
        together = critic(*critic_ids(examples))
        alone = torch.cat([critic(*critic_ids([e])) for e in examples])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)

    check()


@pytest.mark.parametrize("context_len", [0, 4, 12])
@pytest.mark.parametrize("pooling", ["first", "reply"])
def test_one_hot_reply_scores_like_its_token_ids(pooling, context_len):
    critic = make_critic(pooling=pooling, context_len=context_len)

    @few
    @given(batches)
    def check(examples):
        hard, soft = (
            critic(*critic_ids(examples, context_len)),
            forward_soft(critic, *critic_soft(examples, context_len)),
        )
        torch.testing.assert_close(soft, hard, atol=1e-5, rtol=1e-4)

    check()


@pytest.mark.parametrize("pooling", ["first", "reply"])
def test_soft_reply_after_a_padded_context_would_be_noticed(pooling):
    """The published layout, context + padding + reply, scores otherwise, so the two tests above can fail."""
    critic = make_critic(pooling=pooling)
    short, long = ([4, 5], [6, 7, 8]), ([9, 10, 11, 12, 13, 14, 15, 16], [17, 18])
    *_, soft, reply_mask = critic_soft([short, long])
    context_ids, context_mask = pad([np.append(c, EOS) for c, _ in (short, long)], 0)  # padded on the right
    faulty = forward_soft(critic, context_ids, context_mask, soft, reply_mask)
    hard = critic(*critic_ids([short, long]))
    torch.testing.assert_close(faulty[1], hard[1], atol=1e-5, rtol=1e-4)  # the longest has no padding
    assert (faulty[0] - hard[0]).abs().max() > 1e-3


@pytest.mark.parametrize("pooling", ["first", "reply"])
def test_pooling_written_out(pooling):
    """The first position; or mean and max over reply and </s>, of the encoder's output and of the words."""
    critic = make_critic(pooling=pooling)
    context, reply = [4, 5, 6], [7, 8]
    ids = torch.tensor([[*context, EOS, *reply, EOS]])
    hidden, words = critic.encoder(input_ids=ids).last_hidden_state[0], critic.embeddings[ids[0]]
    parts = [
        f(v[len(context) + 1 :]) for v in (hidden, words) for f in (lambda x: x.mean(0), lambda x: x.amax(0))
    ]
    pooled = hidden[0] if pooling == "first" else torch.cat(parts)
    torch.testing.assert_close(
        critic(*critic_ids([(context, reply)]))[0], critic.head(pooled), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("pooling", ["first", "reply"])
def test_critic_reads_the_reply_and_its_context(pooling):
    critic = make_critic(pooling=pooling)
    base, other_reply, other_context = critic(
        *critic_ids([([5, 6], [7, 8]), ([5, 6], [9, 8]), ([4, 6], [7, 8])])
    )
    assert not torch.allclose(base, other_reply, atol=1e-4)
    assert not torch.allclose(base, other_context, atol=1e-4)


def test_sentiment_scores_stay_between_minus_one_and_one():
    critic = make_critic("sentiment")
    with torch.no_grad():
        critic.head.weight.mul_(1000)  # without tanh this would be far outside
    examples = [([i, i + 1], [i + 2]) for i in range(3, 40)]
    for scores in (critic(*critic_ids(examples)), forward_soft(critic, *critic_soft(examples))):
        assert scores.shape == (len(examples), 1)
        assert scores.abs().max() <= 1
        assert scores.min() < -0.5 and scores.max() > 0.5


def test_critic_losses_are_sums_over_the_batch():
    scores = torch.randn(4, 3)
    targets = torch.tensor([0, 2, 1, 1])
    by_hand = sum(
        math.log(sum(math.exp(s) for s in row)) - row[t]
        for row, t in zip(scores.tolist(), targets.tolist(), strict=True)
    )
    assert make_critic("emo").loss_sum(scores, targets).item() == pytest.approx(by_hand, rel=1e-5)
    squares = make_critic("sentiment").loss_sum(torch.tensor([[0.5], [-1.0]]), torch.tensor([0.0, 1.0]))
    assert squares.item() == pytest.approx(0.25 + 4.0)


@pytest.mark.parametrize(("pooling", "fan_in"), [("first", 32), ("reply", 128)])
def test_head_begins_at_torchs_scale_not_t5s(pooling, fan_in):
    std = make_critic(pooling=pooling, outputs=300).head.weight.std().item()
    assert std == pytest.approx(1 / math.sqrt(3 * fan_in), rel=0.05)  # T5's factor would make it 1.0


def test_dropout_of_words_and_head_acts_in_training_only():
    critic, batch = make_critic(word_dropout=0.5), critic_ids([([5, 6, 7], [8, 9])] * 4)
    assert torch.equal(critic(*batch), critic(*batch))
    critic.train()
    assert not torch.allclose(critic(*batch), critic(*batch), atol=1e-4)


# ----------------------------------------------------------------------------------------- the frozen critics


def make_critics(**changes) -> CriticSet:
    critics = {k: make_critic(k, **changes) for k in ("emo", "exp", "int", "sentiment")}
    return CriticSet({k: c.train() for k, c in critics.items()}, torch.device("cpu"))


def states(critics: CriticSet) -> dict:
    return {k: copy.deepcopy(c.state_dict()) for k, c in critics.critics.items()}


def unchanged(before: dict, critics: CriticSet) -> bool:
    return all(
        torch.equal(before[k][n], w) for k, c in critics.critics.items() for n, w in c.state_dict().items()
    )


def steps_on_empathy_alone(generator: Generator, critics: CriticSet, strategy=0, steps=3) -> None:
    """Updates everything that wants a gradient, as a careless script would."""
    generator.train()
    parameters = [*generator.parameters(), *(p for c in critics.critics.values() for p in c.parameters())]
    optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-2, weight_decay=0.1)
    batch = make_batch(EXAMPLES, critics=True)
    for _ in range(steps):
        optimizer.zero_grad()
        losses = critics.losses(soft_response(generator(batch), strategy), batch)
        sum(losses[k] for k in ("emo", "exp", "int")).backward()
        optimizer.step()


@pytest.mark.parametrize("strategy", [0, 1, 2])
def test_critics_teach_the_generator_and_stay_as_they_are(strategy):
    generator, critics = make_generator(), make_critics()
    before = states(critics)
    steps_on_empathy_alone(generator, critics, strategy)
    assert unchanged(before, critics)
    assert not any(c.training for c in critics.critics.values())
    assert all(
        p.grad is None and not p.requires_grad for c in critics.critics.values() for p in c.parameters()
    )
    learned = {n: p.grad.abs().max() for n, p in generator.named_parameters() if p.grad is not None}
    assert learned["t5.shared.weight"] > 0
    assert learned["t5.encoder.block.0.layer.0.SelfAttention.q.weight"] > 0


def test_critics_trained_jointly_would_be_noticed():
    critics = make_critics()
    for critic in critics.critics.values():
        critic.requires_grad_(True)  # the published fault
    before = states(critics)
    steps_on_empathy_alone(make_generator(), critics, steps=1)
    assert not unchanged(before, critics)


def test_critics_are_no_part_of_a_model_that_holds_them():
    holder = torch.nn.Module()
    holder.critics = make_critics()
    assert not list(holder.parameters()) and not holder.state_dict()
    holder.train()
    assert not any(c.training for c in holder.critics.critics.values())


def test_critic_losses_of_a_one_hot_reply_are_those_of_its_ids():
    critics, batch = make_critics(pooling="reply"), make_batch(EXAMPLES, critics=True)
    labels = batch["labels"]
    soft = F.one_hot(labels.clamp(min=0), VOCAB).float()
    losses = critics.losses(soft, batch)
    ids = critic_ids([(s, r) for s, r, _ in EXAMPLES])
    for kind, critic in critics.critics.items():
        torch.testing.assert_close(
            losses[kind], critic.loss_sum(critic(*ids), batch["critic_targets"][kind]), atol=1e-5, rtol=1e-4
        )


def test_each_critic_sees_its_own_length_of_context():
    """One batch serves critics of different context_len; the longest decides what the batch holds."""
    critics = CriticSet(
        {"emo": make_critic("emo", context_len=0), "exp": make_critic("exp", context_len=3)},
        torch.device("cpu"),
    )
    assert critics.context_len == 3
    batch = make_batch(EXAMPLES, critics=True)
    soft = F.one_hot(batch["labels"].clamp(min=0), VOCAB).float()
    losses = critics.losses(soft, batch)
    for kind, length in (("emo", 0), ("exp", 3)):
        scores = critics.critics[kind](*critic_ids([(s, r) for s, r, _ in EXAMPLES], length))
        expected = critics.critics[kind].loss_sum(scores, batch["critic_targets"][kind])
        torch.testing.assert_close(losses[kind], expected, atol=1e-5, rtol=1e-4)


def test_critics_of_another_tokenizer_or_encoder_are_refused():
    make_critics().check_tokenizer("words")
    with pytest.raises(UserError, match="emo critic.*another tokenizer.*prepare_data.py --glove"):
        make_critics().check_tokenizer("other words")
    with pytest.raises(UserError, match="int critic"):
        CriticSet({"int": make_critic("int", backbone=bert_config())}, torch.device("cpu")).check_tokenizer(
            "words"
        )


@pytest.mark.parametrize(
    ("empathy", "sentiment", "names"),
    [
        (False, False, []),
        (True, False, ["emo", "exp", "int"]),
        (False, True, ["sentiment"]),
        (True, True, ["emo", "exp", "int", "sentiment"]),
    ],
)
def test_a_weight_of_zero_asks_for_no_critic(empathy, sentiment, names):
    words = f"--empathy-loss-w {int(empathy)} --sentiment-loss-w {int(sentiment)}"
    assert pick(GeneratorOptions, train_t5.parse_args(words.split())).critics == names


def test_a_term_has_the_weight_of_its_own_flag_and_none_of_anothers():
    flags = "--main-loss-w 2 --empathy-loss-w 3 --sentiment-loss-w 4"
    options = pick(GeneratorOptions, train_t5.parse_args(flags.split()))
    assert [options.weight(term) for term in ("nll", "exp", "sentiment")] == [2, 3, 4]
    with pytest.raises(KeyError):
        options.weight("unlikelihood")


# -------------------------------------------------------------------------------------------- saving, loading


@pytest.mark.parametrize("backbone", [t5_config, bert_config])
def test_saved_critic_gives_equal_scores(tmp_path, backbone):
    critic = make_critic("sentiment", "reply", backbone())
    critic.save_pretrained(tmp_path / "critic")
    loaded = Critic.from_pretrained(tmp_path / "critic")
    batch = critic_ids([([5, 6], [7, 8])])
    assert asdict(loaded.settings) == json.loads(json.dumps(asdict(critic.settings))) and not loaded.training
    assert torch.equal(loaded(*batch), critic(*batch))


@pytest.mark.parametrize("exemplars", ["none", "t5", "glove-t5"])
def test_saved_generator_gives_equal_logits(tmp_path, exemplars):
    model, batch = make_generator(exemplars), make_batch(EXAMPLES, exemplars)
    model.save_pretrained(tmp_path)
    assert torch.equal(Generator.from_pretrained(tmp_path)(batch), model(batch))


def damage(folder, how):
    config, weights = folder / "config.json", folder / "model.safetensors"
    settings_ = json.loads(config.read_text())
    match how:
        case "no folder":
            config.unlink(), weights.unlink(), folder.rmdir()
        case "no config":
            config.unlink()
        case "no weights":
            weights.unlink()
        case "cut weights":
            weights.write_bytes(weights.read_bytes()[:-1000])
        case "empty weights":
            weights.write_bytes(b"")
        case "config is no json":
            config.write_text(config.read_text()[:-40])
        case "config is binary":
            config.write_bytes(b"\xff\xfe\x00")
        case "config is a list":
            config.write_text("[]")
        case "config lacks settings":
            config.write_text(json.dumps({"model": "Critic"}))
        case "unknown backbone":
            config.write_text(json.dumps(settings_ | {"backbone": {"model_type": "no such model"}}))
        case "other width":
            config.write_text(json.dumps(settings_ | {"backbone": t5_config(VOCAB + 1).to_dict()}))
        case "other class":
            config.write_text(json.dumps(settings_ | {"model": "Generator"}))
        case "a transformers folder":
            config.write_text(json.dumps(t5_config().to_dict()))


@pytest.mark.parametrize(
    "how",
    [
        "no folder",
        "no config",
        "no weights",
        "cut weights",
        "empty weights",
        "config is no json",
        "config is binary",
        "config is a list",
        "config lacks settings",
        "unknown backbone",
        "other width",
        "other class",
        "a transformers folder",
    ],
)
def test_a_folder_without_a_whole_critic_is_a_plain_error(tmp_path, how):
    folder = tmp_path / "critic"
    make_critic().save_pretrained(folder)
    damage(folder, how)
    with pytest.raises(UserError, match=str(folder)):
        Critic.from_pretrained(folder)


def test_encoders_are_loaded_in_fp32_whatever_was_saved(tmp_path):
    bert = BertModel(bert_config(), add_pooling_layer=False).to(torch.bfloat16)
    bert.save_pretrained(tmp_path)
    loaded = load_encoder(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(
        loaded.get_input_embeddings().weight, bert.get_input_embeddings().weight.float()
    )


def test_head_beside_a_loaded_encoder_begins_at_torchs_scale(tmp_path):
    T5ForConditionalGeneration(t5_config()).save_pretrained(tmp_path)
    critic = Critic(make_critic(outputs=300).settings, load_encoder(tmp_path))
    assert critic.head.weight.std().item() == pytest.approx(1 / math.sqrt(3 * 32), rel=0.05)


def test_weights_that_do_not_fill_an_encoder_are_refused(tmp_path):
    """A checkpoint that lacks a layer must not leave it random in silence."""
    T5ForConditionalGeneration(t5_config()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_layers": 3}))
    with pytest.raises(UserError, match=str(tmp_path)):
        load_encoder(tmp_path)


def test_encoders_that_cannot_be_loaded_are_plain_errors(prepared, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        load_encoder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="t5-tiny"):
        load_encoder(prepared / "data" / "t5-tiny")  # a config without weights must not become random weights
    assert (
        load_encoder(prepared / "data" / "t5-tiny", from_scratch=True, dropout=0.3).config.dropout_rate == 0.3
    )


# -------------------------------------------------------------------------------------------------- generator


def test_generator_begins_as_the_plain_t5():
    t5 = T5ForConditionalGeneration(t5_config()).eval()
    options = {
        "exemplars": "none",
        "exemplar_width": 0,
        "backbone": t5.config.to_dict(),
        "exemplar_backbone": None,
    }
    batch = make_batch(EXAMPLES)
    plain = t5(
        input_ids=batch["source_ids"], attention_mask=batch["source_mask"], labels=batch["labels"]
    ).logits
    torch.testing.assert_close(Generator(options, t5).eval()(batch), plain)


@pytest.mark.parametrize("exemplars", ["t5", "glove-t5"])
def test_fusion_begins_as_the_identity(exemplars):
    with_exemplars, without = make_generator(exemplars), make_generator("none")
    without.load_state_dict(
        {k: v for k, v in with_exemplars.state_dict().items() if k.startswith(("t5.", "speakers."))}
    )
    with torch.no_grad():
        with_exemplars.fusion.bias.zero_()
    batch = make_batch(EXAMPLES, exemplars)
    fused = with_exemplars(batch)
    key = "exemplar_vectors" if exemplars == "t5" else "exemplar_share"
    batch[key] = torch.zeros_like(batch[key])
    torch.testing.assert_close(with_exemplars(batch), without(batch), atol=1e-5, rtol=1e-5)
    assert (fused - without(batch)).abs().max() > 1e-3  # exemplars do have a say


@pytest.mark.parametrize("exemplars", ["none", "t5", "glove-t5"])
def test_generator_gives_an_example_alone_the_logits_of_any_batch(exemplars):
    model = make_generator(exemplars)
    together = model(make_batch(EXAMPLES, exemplars))
    for i, example in enumerate(EXAMPLES):
        alone = model(make_batch([example], exemplars))[0]
        torch.testing.assert_close(together[i, : len(alone)], alone, atol=1e-4, rtol=1e-4)


def test_pooled_exemplars_are_the_mean_over_exemplars_of_the_mean_over_tokens():
    model = make_generator("glove-t5")
    with torch.no_grad():  # let nothing but the exemplars through
        model.fusion.weight.copy_(torch.eye(64)[32:])
        model.fusion.bias.zero_()
    found = model.encode(make_batch(EXAMPLES, "glove-t5"))
    for positions, (_, _, texts) in zip(found, EXAMPLES, strict=True):
        means = [
            model.exemplar_encoder(input_ids=torch.tensor([t])).last_hidden_state[0].mean(0) for t in texts
        ]
        torch.testing.assert_close(
            positions, torch.stack(means).mean(0).expand_as(positions), atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("full", [1, 100, 10**6])
def test_exemplars_that_are_read_in_pieces_are_what_they_are_all_at_once(full, monkeypatch):
    monkeypatch.setitem(models.FULL, "cpu", full)
    model = make_generator("glove-t5")
    texts = [tuple(range(3, 4 + n % 9)) + (3 + n % 20, 4 + n // 20) for n in range(70)]
    examples = [([3, 4], [5], texts[n::7]) for n in range(7)]
    batch, read = make_batch(examples, "glove-t5"), []
    model.exemplar_encoder.register_forward_hook(
        lambda module, given, kept, out: read.append(kept["input_ids"].numel()), with_kwargs=True
    )
    whole = model.encode(batch)
    order, pieces = in_pieces(batch["exemplar_mask"].sum(1).tolist())
    rows = {k: batch[k][order] for k in ("exemplar_ids", "exemplar_mask")}
    share = {"exemplar_share": batch["exemplar_share"][:, order], "exemplar_pieces": pieces}
    torch.testing.assert_close(model.encode(batch | rows | share), whole)
    assert len(read) == 1 + {1: len(pieces), 100: len(pieces), 10**6: 1}[full] and len(pieces) == 3
    if full == 1:
        assert sum(read[1:]) < 0.8 * read[0]


@pytest.mark.parametrize("exemplars", ["none", "t5", "glove-t5"])
def test_generation_starts_from_the_logits_of_teacher_forcing(exemplars):
    """So speakers and exemplars reach generate's encoder too; logits are compared, for tokens may hide it."""
    model, batch = make_generator(exemplars), make_batch(EXAMPLES, exemplars)
    out = model.generate(
        batch, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    torch.testing.assert_close(out.logits[0], model(batch)[:, 0], atol=1e-5, rtol=1e-5)


def test_speakers_change_what_is_encoded_and_generated():
    model, batch = make_generator(), make_batch(EXAMPLES)
    swapped = batch | {"speaker_ids": (3 - batch["speaker_ids"]) * batch["source_mask"]}
    real = batch["source_mask"].bool()
    assert ((model.encode(batch) - model.encode(swapped))[real].abs().amax(-1) > 1e-3).all()
    first = [
        model.generate(
            b, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
        ).logits[0]
        for b in (batch, swapped)
    ]
    assert ((first[0] - first[1]).abs().amax(-1) > 1e-3).all()


def test_speaker_of_padding_and_exemplars_adds_nothing():
    model, batch = make_generator(), make_batch(EXAMPLES)
    nobody = model.encode(batch | {"speaker_ids": torch.zeros_like(batch["speaker_ids"])})
    model.speakers.weight.data.zero_()
    torch.testing.assert_close(nobody, model.encode(batch))


@pytest.mark.parametrize("decoding", [{"num_beams": 4}, {"do_sample": False}])
def test_generation_leaves_the_encoded_source_as_it_was(decoding):
    model, batch = make_generator(), make_batch(EXAMPLES)
    with torch.inference_mode():
        hidden = model.encode(batch)
        kept = hidden.clone()
        model.encode = lambda batch: hidden
        first = model.generate(batch, max_new_tokens=8, **decoding)
        assert torch.equal(hidden, kept)
        assert torch.equal(model.generate(batch, max_new_tokens=8, **decoding), first)


@pytest.mark.parametrize("decoding", [{"do_sample": True, "top_k": 20}, {"num_beams": 3}])
def test_suppressed_tokens_are_never_generated(decoding):
    model, batch = make_generator(), make_batch(EXAMPLES * 4)
    free = set(model.generate(batch, max_new_tokens=10, **decoding)[:, 1:].unique().tolist())
    banned = sorted(set(range(VOCAB)) - {EOS, 7, 8})
    assert free & set(banned) - {0}  # they would come
    for row in model.generate(batch, max_new_tokens=10, suppress_tokens=banned, **decoding).tolist():
        reply = row[1 : row.index(EOS)] if EOS in row else row[1:]
        assert set(reply) <= {7, 8}


def test_token_nll_is_cross_entropy_written_out():
    logits, labels = 3 * torch.randn(2, 4, VOCAB), torch.tensor([[5, 6, EOS, -100], [EOS, -100, -100, -100]])
    found = token_nll(logits, labels)
    for row, targets, values in zip(logits.tolist(), labels.tolist(), found.tolist(), strict=True):
        for scores, target, value in zip(row, targets, values, strict=True):
            expected = 0.0 if target == -100 else math.log(sum(math.exp(s) for s in scores)) - scores[target]
            assert value == pytest.approx(expected, abs=1e-4)
    assert token_nll(logits.bfloat16(), labels).dtype == torch.float32


def parameters_of(config: T5Config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in T5ForConditionalGeneration(config).parameters())


def test_parameter_counts_are_the_papers():
    tokenizer = word_tokenizer(f"word{i}" for i in range(21_132 - 4))
    assert parameters_of(glove_config(tokenizer)) == 27_575_184
    assert parameters_of(T5Config()) == 60_506_624


def test_words_of_a_reply_drop_out_one_by_one_and_whole(monkeypatch):
    critic, batch = make_critic(word_dropout=0.5).train(), critic_ids([([5, 6, 7], [8, 9, 10, 11])] * 40)
    seen, read = [], critic.encoder.forward
    monkeypatch.setattr(
        critic.encoder, "forward", lambda **given: seen.append(given["inputs_embeds"]) or read(**given)
    )
    critic(*batch)
    gone = (seen[0] == 0).float().mean(-1)  # (B, L): of each word all or nothing
    assert set(gone.flatten().tolist()) == {0, 1} and 0.4 < float(gone.mean()) < 0.6
    assert len(torch.unique(gone, dim=0)) > 20
