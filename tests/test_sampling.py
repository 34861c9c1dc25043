"""sampling.py: the fast way of many replies to one prompt gives what the plain way gives."""

from functools import partial

import pytest
import torch
from test_causal_models import TALKS, make_tokenizer, save_llama, trained
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Lfm2Config,
    LogitsProcessorList,
    MistralConfig,
    Qwen2Config,
)

import causal_generators
from causal_models import CausalGenerator
from chats import causal_data, prompt_data
from sampling import choose, sample, side_by_side
from session import Session
from settings import Decoding, SampledOptions
from vocabulary import logits_nll


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> CausalGenerator:
    base = save_llama(tmp_path_factory.mktemp("llama"), make_tokenizer())
    return trained(base, tmp_path_factory.mktemp("cache"))


def prompts(model: CausalGenerator, numbers: list[int]) -> dict:
    return prompt_data(TALKS, model.tokenizer, **model.settings.layout).collate(numbers)


def by_generate(model: CausalGenerator, batch: dict, draws: torch.Tensor, decoding: Decoding) -> list:
    """transformers' own loop, each reply with its own prompt, the words taken by the same draws; then a
    second pass for the log-probabilities. [(ids, mean log-probability)]"""
    count = draws.shape[1]
    draws = draws.flatten(0, 1)

    def take(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        step = ids.shape[1] - batch["input_ids"].shape[1]
        taken = choose(logits, draws[:, step], decoding)
        return torch.full_like(logits, -torch.inf).scatter(1, taken[:, None], 0)

    many = {k: batch[k].repeat_interleave(count, 0) for k in ("input_ids", "attention_mask")}
    out = model.generate(
        many,
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,
        logits_processor=LogitsProcessorList([take]),
    )
    found = []
    for n, row in enumerate(out.tolist()):
        end = row.index(model.chat.end_id) + 1 if model.chat.end_id in row else len(row)
        said = torch.tensor([row[:end]])
        ids = torch.cat([many["input_ids"][n : n + 1], said], 1)
        mask = torch.cat([many["attention_mask"][n : n + 1], torch.ones_like(said)], 1)
        asked = torch.zeros_like(ids).bool()
        asked[:, -end:] = True
        with torch.no_grad():
            logits = model({"input_ids": ids, "attention_mask": mask, "target_mask": asked})
        found.append((row[:end], -float(logits_nll(logits, said[0]).mean())))
    return found


@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(1, 1.0, 6),  # greedy
        Decoding(400, 2.0, 20),
        Decoding(50, 1.5, 6, top_p=0.9),
    ],
    ids=["greedy", "all words", "top-p"],
)
def test_words_and_log_probabilities_are_those_of_generate_and_a_second_pass(model, decoding):
    batch = prompts(model, [2, 3])  # of unlike lengths
    draws = torch.rand(2, 8, decoding.max_new_tokens)
    found = sample(model, batch, draws, decoding)
    expected = by_generate(model, batch, draws, decoding)
    rows = [row[:n] for row, n in zip(found.ids.tolist(), found.tokens.tolist(), strict=True)]
    assert rows == [ids for ids, _ in expected]
    assert found.log_probability.tolist() == pytest.approx([p for _, p in expected], abs=1e-5)
    if decoding.top_k == 400:  # some ended, and left
        assert len(set(found.tokens.tolist())) > 1


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    "config, able",
    [
        (partial(Lfm2Config, num_key_value_heads=2, layer_types=["conv", "full_attention"]), False),
        (partial(MistralConfig, num_key_value_heads=2, sliding_window=5), False),
        (partial(FalconConfig, alibi=True), False),
        (partial(Qwen2Config, num_key_value_heads=2), True),
    ],
    ids=["convolutions", "windows", "biases", "plain"],
)
def test_other_kinds_of_layers_sample_and_score_as_they_do_alone(config, able, tmp_path):
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    given = config(vocab_size=len(tokenizer), initializer_range=0.2, **SMALL)
    AutoModelForCausalLM.from_config(given).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = trained(str(tmp_path / "base"), tmp_path)
    batch, draws, decoding = prompts(model, [2, 3]), torch.rand(2, 16, 40), Decoding(400, 3.0, 40)
    found = sample(model, batch, draws, decoding)
    expected = by_generate(model, batch, draws, decoding)
    rows = [row[:n] for row, n in zip(found.ids.tolist(), found.tokens.tolist(), strict=True)]
    assert rows == [ids for ids, _ in expected] and len(set(map(len, rows))) > 1
    assert found.log_probability.tolist() == pytest.approx([p for _, p in expected], abs=1e-4)

    assert side_by_side(model.lm) == able
    options = SampledOptions(1.0, "energy", 3, 0, 0, 1.0)
    data = prompt_data(TALKS, model.tokenizer, **model.settings.layout)
    draw = causal_generators.draw_replies(data, 9, options, torch.device("cpu"))
    drawn = draw(model, {"examples": torch.tensor([2, 3])}, 0, 3).batch
    [part] = drawn["parts"]
    scored = causal_generators.sampled_nll(model, drawn, options).tolist()
    for number, nll in enumerate(scored):
        prompt = data.collate([[2, 3][number // 3]])["input_ids"][0]
        reply = part["target_ids"][part["example_of"] == number]
        with torch.no_grad():
            logits = model.lm(torch.cat([prompt, reply])[None]).logits[0, len(prompt) - 1 : -1]
        logits[:, model.banned] = -torch.inf
        alone = -logits.log_softmax(-1).gather(1, reply[:, None]).sum()
        assert nll == pytest.approx(float(alone), rel=1e-3)


def test_for_a_loss_so_many_examples_of_a_batch_get_so_many_replies(model):
    data = prompt_data(TALKS, model.tokenizer, **model.settings.layout)
    options = SampledOptions(1.0, "energy", 3, 2, 0, 1.0)
    draw = causal_generators.draw_replies(data, 5, options, torch.device("cpu"))
    drawn = draw(model, {"examples": torch.arange(4)}, 2, 3)
    assert len(drawn.texts) == 6 and len(set(drawn.examples)) == 2
    assert drawn.examples == [n for n in drawn.examples[::3] for _ in range(3)]
    assert len(draw(model, {"examples": torch.arange(4)}, 0, 3).texts) == 12, "0: all of them"
    twice = draw(model, {"examples": torch.tensor([1, 1])}, 0, 3).texts
    assert twice[:3] != twice[3:], "each has random numbers of its own"


def test_what_may_not_be_said_takes_no_probability_from_a_sampled_reply(model, monkeypatch):
    words = [n for n in range(0, len(model.tokenizer), 2) if n != model.chat.end_id]
    monkeypatch.setattr(CausalGenerator, "banned", sorted({*model.banned, *words}))  # half of all
    data = prompt_data(TALKS, model.tokenizer, **model.settings.layout)
    options = SampledOptions(1.0, "energy", 3, 0, 0, 1.0)
    draw = causal_generators.draw_replies(data, 5, options, torch.device("cpu"))
    drawn = draw(model, {"examples": torch.tensor([1])}, 0, 3).batch
    [part] = drawn["parts"]
    with torch.no_grad():
        found = causal_generators.sampled_nll(model, drawn, options)
        logits = model(part)
    logits[:, model.banned] = -torch.inf
    each = -logits.log_softmax(-1).gather(1, part["target_ids"][:, None])[:, 0]
    torch.testing.assert_close(found, torch.zeros(3).index_add(0, part["example_of"], each))


def test_the_prompt_is_read_once_and_who_has_ended_no_more(model):
    read = []

    def note(_, args: tuple, given: dict) -> None:
        read.append(tuple(given["input_ids"].shape))

    batch = prompts(model, [0, 3])
    with model.lm.get_base_model().register_forward_pre_hook(note, with_kwargs=True):
        found = sample(model, batch, torch.rand(2, 16, 40), Decoding(400, 1.0, 40))
    assert read[0] == tuple(batch["input_ids"].shape)
    lengths = found.tokens.tolist()
    assert read[1:] == [(sum(n > step for n in lengths), 1) for step in range(1, max(lengths))]


def test_a_base_without_other_control_tokens_than_its_end_writes_too(tmp_path):
    """As GPT-2's: one token for begin and end, a word for every other row."""
    tokenizer = make_tokenizer(None, pad=False, begin="<|end|>", end="<|end|>")
    model = trained(save_llama(tmp_path / "base", tokenizer), tmp_path)
    assert not model.banned
    decoding, batch, draws = Decoding(400, 1.0, 6), prompts(model, [0, 3]), torch.rand(2, 3, 6)
    found = sample(model, batch, draws, decoding)
    expected = [torch.tensor(ids) for ids, _ in by_generate(model, batch, draws, decoding)]
    assert all(row[: len(ids)].equal(ids) for row, ids in zip(found.ids, expected, strict=True))


def test_a_reply_does_not_depend_on_how_many_are_drawn_beside_it(model):
    decoding = Decoding(400, 1.0, 30)
    draws = torch.rand(2, 6, 30)
    together = sample(model, prompts(model, [0, 3]), draws, decoding)
    alone = sample(model, prompts(model, [3]), draws[1:, :2], decoding)
    texts = model.replies(together.ids)
    assert model.replies(alone.ids) == texts[6:8] and len(set(texts)) > 6


def test_words_are_drawn_as_often_as_they_are_likely_within_top_k_and_top_p():
    logits = torch.tensor([0.4, 0.05, 0.3, 0.2, 0.05]).log()
    draws = (torch.arange(1000) + 0.5) / 1000

    def shares(**changes) -> list[float]:
        decoding = Decoding(**{"top_k": 5, "temperature": 1.0, "max_new_tokens": 1} | changes)
        return (choose(logits.expand(1000, -1), draws, decoding).bincount(minlength=5) / 1000).tolist()

    assert shares() == pytest.approx([0.4, 0.05, 0.3, 0.2, 0.05], abs=2e-3)
    assert shares(top_k=2) == pytest.approx([4 / 7, 0, 3 / 7, 0, 0], abs=2e-3)
    assert shares(top_p=0.65) == pytest.approx([4 / 7, 0, 3 / 7, 0, 0], abs=2e-3)
    assert shares(top_p=0.75) == pytest.approx([4 / 9, 0, 3 / 9, 2 / 9, 0], abs=2e-3)
    assert shares(top_k=3, top_p=0.5) == pytest.approx([4 / 7, 0, 3 / 7, 0, 0], abs=2e-3)  # of the three: 4/9
    assert shares(temperature=0.5, top_k=2) == pytest.approx([16 / 25, 0, 9 / 25, 0, 0], abs=2e-3)
    assert shares(top_p=0.01) == [1, 0, 0, 0, 0]


def test_no_reply_holds_a_control_token(model):
    found = sample(model, prompts(model, [0]), torch.rand(1, 64, 40), Decoding(400, 3.0, 40))
    control = set(model.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<pad>"]))
    for row, n in zip(found.ids.tolist(), found.tokens.tolist(), strict=True):
        assert not control & set(row[:n])


def test_for_use_the_adapter_goes_into_the_weights_and_the_function_stays(model, tmp_path):
    """Also with attention and matrices laid out otherwise, and prompts of unlike lengths."""
    batch = prompts(model, [0, 1, 3])
    draws = torch.rand(3, 2, 12)
    before = sample(model, batch, draws, Decoding(1, 1.0, 12))
    model.save_pretrained(tmp_path / "run", half=False)
    merged = CausalGenerator.from_pretrained(tmp_path / "run", cache=tmp_path).for_use()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    linear = [m.weight for m in merged.modules() if isinstance(m, torch.nn.Linear)]
    assert linear and all(w.stride() == (1, w.shape[0]) for w in linear)
    given = merged.lm(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    plain = model.lm(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(given[:, -1], plain[:, -1], atol=1e-4, rtol=1e-4)
    after = sample(merged, batch, draws, Decoding(1, 1.0, 12))
    assert after.ids.tolist() == before.ids.tolist()
    assert after.log_probability.tolist() == pytest.approx(before.log_probability.tolist(), abs=1e-4)


def test_for_use_in_bf16_its_weights_are_cast_once_and_it_says_the_same(model, tmp_path):
    model.save_pretrained(tmp_path / "run")
    batch, found = prompts(model, [0, 1, 3]), []
    for precision, kept in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        ready = CausalGenerator.from_pretrained(tmp_path / "run", cache=tmp_path).for_use("cpu", precision)
        products = [n for n, m in ready.named_modules() if n.endswith("_proj") and m.weight.dtype == kept]
        assert len(products) == 7 * len(ready.lm.model.layers)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            found.append(
                ready.lm(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            )
    assert torch.equal(*found)


@pytest.mark.parametrize("keeps", [True, False], ids=["keys and values kept", "none kept"])
@pytest.mark.parametrize("ngram", [0, 1], ids=["", "words said once"])
def test_predictions_are_generate_s_whichever_way_writes_them(model, keeps, ngram, monkeypatch):
    """Greedy, so that nothing is left to chance; three replies to each context, side by side."""
    if not keeps:
        monkeypatch.setattr(causal_generators, "cache_name", lambda lm: None)
    decoding = Decoding(1, 1.0, 6, predict_batch_size=2, no_repeat_ngram=ngram, replies=3)
    data = prompt_data(TALKS, model.tokenizer, **model.settings.layout)
    predictor = causal_generators.CausalPredictor(model, data, data, decoding, Session(device="cpu"))
    found = model.replies(predictor.write(prompts(model, [2, 3]))[0])
    plain = dict(top_k=1, do_sample=True, max_new_tokens=6, no_repeat_ngram_size=ngram)
    expected = [model.replies(model.generate(prompts(model, [n]), **plain))[0] for n in (2, 3)]
    assert found == [text for text in expected for _ in range(3)]


def test_beams_are_searched_where_they_are_asked_for(model):
    data = prompt_data(TALKS, model.tokenizer, **model.settings.layout)
    found = []
    for beams in (4, 1):
        decoding = Decoding(1, 1.0, 12, beams=beams)
        predictor = causal_generators.CausalPredictor(model, data, data, decoding, Session(device="cpu"))
        found.append(model.replies(predictor.write(prompts(model, [0, 1, 2, 3]))[0]))
    searched, greedy = found
    plain = dict(num_beams=4, do_sample=False, max_new_tokens=12)
    assert searched == model.replies(model.generate(prompts(model, [0, 1, 2, 3]), **plain)) != greedy


def test_in_whatever_order_a_batch_stands_each_example_gets_its_own_reply(model):
    layout = model.settings.layout
    gold = causal_data(TALKS, model.tokenizer, packed=False, **layout)
    asked = prompt_data(TALKS, model.tokenizer, **layout)
    greedy = Decoding(1, 1.0, 6)
    predictor = causal_generators.CausalPredictor(model, gold, asked, greedy, Session(device="cpu"))
    rows = predictor.batch(0, [3, 0, 2])
    found = dict(zip(rows["numbers"].tolist(), rows["response"][:, 0].tolist(), strict=True))
    alone = {n: predictor.batch(0, [n])["response"][0, 0] for n in (3, 0, 2)}
    assert found == alone and len(set(alone.values())) > 1


@pytest.mark.parametrize("keeps", [True, False], ids=["keys and values kept", "none kept"])
def test_each_batch_of_replies_has_random_numbers_of_its_own(model, keeps, monkeypatch):
    """One dialogue in two batches is answered twice, and each batch as ever, whichever is written first."""
    if not keeps:
        monkeypatch.setattr(causal_generators, "cache_name", lambda lm: None)
    layout = model.settings.layout
    gold = causal_data(TALKS, model.tokenizer, packed=False, **layout)
    asked = prompt_data(TALKS, model.tokenizer, **layout)
    predictor = causal_generators.CausalPredictor(
        model, gold, asked, Decoding(0, 2.0, 12, replies=4), Session(device="cpu")
    )
    replies = [str(predictor.batch(number, [2])["response"]) for number in (0, 1, 1, 0)]
    assert replies[0] == replies[3] != replies[1] == replies[2]


def test_among_all_words_is_among_as_many_as_there_are():
    logits, draws = torch.randn(40, 7), torch.rand(40)
    every = [choose(logits, draws, Decoding(k, 1.0, 6)) for k in (0, 7)]
    assert torch.equal(*every) and len(set(every[0].tolist())) > 3


@pytest.mark.parametrize("replies", [1, 3])
def test_gold_replies_behind_prompts_that_were_read_are_as_likely_as_read_anew(model, monkeypatch, replies):
    layout = model.settings.layout
    gold = causal_data(TALKS, model.tokenizer, packed=False, **layout | {"tgt_len": None})
    data = prompt_data(TALKS, model.tokenizer, **layout)
    decoding = Decoding(5, 1.0, 12, replies=replies)
    predictor = causal_generators.CausalPredictor(model, gold, data, decoding, Session(device="cpu"))
    numbers = [3, 0, 2, 1]
    read = []
    forward = CausalGenerator.forward
    monkeypatch.setattr(CausalGenerator, "forward", lambda *given: (read.append(1), forward(*given))[1])
    quick = predictor.batch(0, numbers)
    assert not read, "the prompts are read once"
    monkeypatch.setattr(causal_generators, "side_by_side", lambda lm: False)
    plain = predictor.batch(0, numbers)
    assert read and quick.keys() == plain.keys()
    for name in ("numbers", "tokens", "unknown", "response"):
        assert quick[name].tolist() == plain[name].tolist()
    for name in ("nll", "nll_end"):
        assert quick[name].tolist() == pytest.approx(plain[name].tolist(), abs=1e-4)


def test_a_gold_reply_has_its_whole_history_where_a_prompts_earlier_replies_are_cut(model, monkeypatch):
    layout = model.settings.layout | {"tgt_len": 3}
    gold = causal_data(TALKS, model.tokenizer, packed=False, **layout | {"tgt_len": None})
    data = prompt_data(TALKS, model.tokenizer, **layout)
    predictor = causal_generators.CausalPredictor(model, gold, data, Decoding(5, 1.0, 4), Session("cpu"))
    found = predictor.batch(0, [0, 1, 2, 3])
    monkeypatch.setattr(causal_generators, "side_by_side", lambda lm: False)
    assert found["nll"].tolist() == pytest.approx(predictor.batch(0, [0, 1, 2, 3])["nll"].tolist(), abs=1e-4)


def test_without_a_top_k_every_word_can_be_drawn():
    logits, draws = torch.zeros(1, 400), torch.tensor([0.9999])
    (likely,) = logits.topk(400).indices
    assert choose(logits, draws, Decoding(0, 1.0, 1)).tolist() == [likely[-1]]
