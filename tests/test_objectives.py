"""The variants of the generators' objective, and the loss on replies that a model samples."""

import itertools
import json
import re
import shutil
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import Killed, assert_same_run, logged
from test_causal_models import make_tokenizer, save_llama
from test_vocabulary import batch_of, config
from test_vocabulary import critics as two_critics
from test_vocabulary import options as generator_options

import corpora
import critics
import dataloaders
import families
import generators
import lineage
import objectives
import storage
import train_causal_lm
import train_glove_t5
import updates
from critic_set import CriticSet
from glove_models import glove_config
from models import Critic, Generator
from options import CRITICS, Paths, UserError
from pretrained import load_tokenizer
from session import Session
from settings import SampledOptions

TINY = "--device cpu --size tiny --batch-size 8 --add-exemplars none --no-predict --log-every 1".split()


#: how replies are drawn for a loss: from the whole distribution, or from what use would draw from
DRAWS = [SampledOptions(1.0, "energy", 3, 0, k, t) for k, t in ((0, 1.0), (4, 0.7))]


def glove_batch(folder):
    found = {
        k: Critic.from_pretrained(folder / "saved" / "empathy" / f"glove-t5-{k}") for k in ("emo", "int")
    }
    tokenizer = load_tokenizer(folder / "saved" / "empathy" / "glove-t5-emo")
    examples = corpora.listener_turns(folder / "data" / "empathetic_dialogues" / "original" / "train.csv")
    labels = {k: [1] * len(examples) for k in found}
    data = dataloaders.generator_data(
        examples, tokenizer, src_len=40, tgt_len=9, labels=labels, critic_context_len=0
    )
    return CriticSet(found, torch.device("cpu")), data.collate([0, 5, 9]), len(tokenizer)


def test_a_soft_target_is_reached_by_the_gold_reply_itself(trained):
    frozen, batch, vocabulary = glove_batch(trained)
    gold = torch.nn.functional.one_hot(batch["labels"].clamp(min=0), vocabulary).float()
    views = frozen.views(batch)
    exact = frozen.losses(gold, batch, views)
    assert all(float(v) == pytest.approx(0, abs=1e-5) for v in exact.values())
    flat = torch.full_like(gold, 1 / vocabulary)
    assert all(float(v) > 1e-4 for v in frozen.losses(flat, batch, views).values())
    # the same reply does not reach labels that the critic does not see in it
    assert all(float(v) > 1e-2 for v in frozen.losses(gold, batch).values())


def test_no_critic_pulls_harder_than_its_share():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    weights = [torch.randn(2, 3, 5) * size for size in (1, 40, 1e-3)]
    main, *others = objectives.balanced(logits, 0.5, 2)
    sum((w * x).sum() for w, x in zip(weights, (main, *others), strict=True)).backward()
    long, short = weights[1], weights[2]
    expected = weights[0] + long / long.norm() * 0.5 * weights[0].norm() + short
    torch.testing.assert_close(logits.grad, expected)


def test_the_critics_weights_rise_and_their_gradients_are_logged(trained_copy):
    words = ["--workdir", str(trained_copy), *TINY, "--max-steps", "3", "--critic-ramp", "4"]
    words += [
        "--lr",
        "1e-9",
        "--log-gradients",
        "--critic-targets",
        "soft",
        "--balance",
        "0.5",
        "--dropout",
        "0",
    ]
    train_glove_t5.main([*words, "--name", "ramp"])
    run = trained_copy / "saved" / "glove-t5" / "ramp"
    for step, row in enumerate(logged(run, "train")):
        critics = sum(row[k] for k in ("emo", "exp", "int", "sentiment"))
        assert row["loss"] == pytest.approx(row["nll"] + (step + 1) / 4 * critics, rel=1e-5)
    (valid,) = logged(run, "valid")
    assert valid["grad_nll"] > 0 and valid["grad_emo"] > 0


def test_a_model_learns_to_write_what_is_rewarded(trained):
    """Policy gradient alone, without any gold reply, makes rewarded words more frequent."""
    _, batch, vocabulary = glove_batch(trained)
    run = trained / "saved" / "empathy" / "glove-t5-emo"
    tokenizer = load_tokenizer(run)
    torch.manual_seed(3)
    model = Generator({"backbone": glove_config(tokenizer, "tiny", 0.0).to_dict(), "exemplars": "none"})
    draw = objectives.draw_replies(
        tokenizer, {"do_sample": True, "top_k": 0, "max_new_tokens": 6}, torch.device("cpu")
    )

    def rewards(numbers, texts, samples):
        words = [t.split() or ["-"] for t in texts]
        found = torch.tensor([sum(w[0] in "st" for w in row) / len(row) for row in words])
        return found, objectives.advantages(found.view(-1, samples)).flatten()

    options = SampledOptions(1.0, "distance", 8, 0, 0, 1.0)
    sampled = objectives.SampledReplies(SimpleNamespace(of=rewards), draw, options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seen = []
    for _ in range(30):
        drawn = sampled.prepare(model, batch)
        nll = objectives.sampled_nll(model, drawn["sampled"], options)
        sampled.terms(nll, drawn)["sampled"].backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(float(drawn["reward"].mean()))
    assert sum(seen[-5:]) > sum(seen[:5]) + 1.5


def test_balanced_critics_read_what_the_strategy_makes_of_the_logits():
    model = Generator({"backbone": config(16).to_dict(), "exemplars": "none"})
    frozen, batch = two_critics(), batch_of([3, 8, 5])
    for strategy in (0, 1, 2):
        objective = objectives.GeneratorObjective(frozen, generator_options(strategy=strategy, balance=0.5))
        one, two = (objective.gold_terms(model, batch)["emo"] for _ in range(2))
        assert torch.equal(one, two) == (strategy == 0)  # of the others each draws anew


def test_logged_gradients_are_of_means_whatever_the_size_of_the_batch():
    model = Generator({"backbone": config(16).to_dict(), "exemplars": "none"})
    objective, batch = objectives.GeneratorObjective(two_critics(), generator_options()), batch_of([3, 8, 5])
    targets = batch.pop("critic_targets")
    twice = {k: torch.cat([v, v]) for k, v in batch.items()}
    found = [
        objectives.gradient_norms(
            model, objective, b | {"critic_targets": {k: v.repeat(n) for k, v in targets.items()}}
        )
        for n, b in ((1, batch), (2, twice))
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-4) and len(found[0]) == 3


def test_replies_are_sampled_without_dropout_and_the_training_goes_on_with_it(prepared):
    tokenizer = load_tokenizer(Paths(prepared).glove)
    model = Generator({"backbone": glove_config(tokenizer, "tiny", 0.5).to_dict(), "exemplars": "none"})
    examples = corpora.listener_turns(Paths(prepared).dialogues("train"))
    batch = dataloaders.generator_data(examples, tokenizer, src_len=40, tgt_len=9).collate([0, 5, 9])
    greedy = {"do_sample": True, "top_k": 1, "max_new_tokens": 6}
    draw, said = objectives.draw_replies(tokenizer, greedy, torch.device("cpu")), []

    def rewards(numbers, texts, samples):
        said.append(texts)
        return torch.zeros(len(texts)), torch.zeros(len(texts))

    sampled = objectives.SampledReplies(
        SimpleNamespace(of=rewards), draw, SampledOptions(1.0, "distance", 2, 0, 1, 1.0)
    )
    sampled.prepare(model.train(), batch)
    assert model.training
    noisy, plain = draw(model, batch, 0, 2).texts, draw(model.eval(), batch, 0, 2).texts
    assert said == [plain] != [noisy]


def test_a_reply_that_says_nothing_is_of_the_words_that_replies_hold(trained):
    folder = trained / "saved" / "empathy" / "glove-t5-emo"
    tokenizer, frozen = load_tokenizer(folder), glove_batch(trained)[0]
    examples = corpora.listener_turns(trained / "data" / "empathetic_dialogues" / "original" / "train.csv")[
        :9
    ]
    data = dataloaders.generator_data(
        examples, tokenizer, src_len=40, tgt_len=30, labels={k: [1] * 9 for k in frozen.critics}
    )
    batch = data.collate(list(range(9)))
    said = batch["labels"][batch["labels"] != -100]
    assert len(said) < batch["labels"].numel(), "there is padding that could be taken for a word"
    share = torch.bincount(said, minlength=len(tokenizer)) / len(said)
    soft = share.expand(*batch["labels"].shape, -1)
    with torch.no_grad():
        expected = frozen.losses(soft, batch)
    found = critics.uninformed_losses(frozen, data, Session("cpu"))
    for kind, total in expected.items():
        assert found[kind] == pytest.approx((float(total) / 9, 0), rel=1e-4)  # who guesses 1 is right


def test_which_examples_of_a_batch_are_replied_to_is_drawn_by_chance():
    found = [objectives.some(6, 2).tolist() for _ in range(60)]
    assert all(len(row) == 2 and row[0] < row[1] for row in found)
    assert {n for row in found for n in row} == set(range(6))
    assert objectives.some(4, 0).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("options", DRAWS)
def test_a_sampled_reply_is_scored_under_the_distribution_it_was_drawn_from(options, trained):
    """Tokens that no reply may hold are likely here; the sampler never draws them."""
    _, batch, vocabulary = glove_batch(trained)
    tokenizer = load_tokenizer(trained / "saved" / "empathy" / "glove-t5-emo")
    config = glove_config(tokenizer, "tiny", 0.0)
    model = Generator({"backbone": config.to_dict(), "exemplars": "none"}).eval()
    banned = list(range(2, vocabulary - 40)) + [tokenizer.pad_token_id, tokenizer.unk_token_id]
    banned.remove(tokenizer.eos_token_id)
    arguments = {"do_sample": True, "max_new_tokens": 6, "suppress_tokens": banned}
    arguments |= {"top_k": options.sampled_top_k, "temperature": options.sampled_temperature}
    torch.manual_seed(1)
    drawn = objectives.draw_replies(tokenizer, arguments, torch.device("cpu"))(model, batch, 0, 2)
    found = objectives.sampled_nll(model, drawn.batch, options)
    torch.manual_seed(1)
    objectives.some(3, 0)  # it draws, too
    read = ("source_ids", "source_mask", "speaker_ids")
    given = {k: drawn.batch[k].repeat_interleave(2, 0) for k in read}
    out = model.generate(given, **arguments, return_dict_in_generate=True, output_scores=True)
    scores = torch.stack(out.scores, 1).log_softmax(-1)  # (M, T, V), what was drawn from
    each = scores.gather(2, out.sequences[:, 1:, None])[..., 0]
    expected = -(each.masked_fill(drawn.batch["labels"] == -100, 0)).sum(1)
    torch.testing.assert_close(found, expected)

    # the plain way: each reply behind a source of its own, all words of all positions
    worth = torch.tensor([1.0, -2.0, 0.5, 1.0, -1.0, 3.0])
    (worth * found).sum().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits = model(given | {"labels": drawn.batch["labels"]}).index_fill(-1, torch.tensor(banned), -torch.inf)
    if options.sampled_top_k > 0:
        least = logits.topk(options.sampled_top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    nll = objectives.token_nll(logits / options.sampled_temperature, drawn.batch["labels"]).sum(1)
    (worth * nll).sum().backward()
    plain = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == plain.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], plain[name], atol=1e-5, rtol=1e-4, msg=name)


def test_one_loss_alone_needs_its_own_critic_only(trained_copy, capsys):
    shutil.rmtree(trained_copy / "saved" / "empathy" / "glove-t5-int")
    words = ["--workdir", str(trained_copy), *TINY, "--max-steps", "1", "--empathy-losses", "exp"]
    train_glove_t5.main([*words, "--sentiment-loss-w", "0"])
    rows = logged(trained_copy / "saved" / "glove-t5" / "plain-exp")
    terms = [set(row) & {"nll", *CRITICS} for row in rows]
    assert terms and all(found == {"nll", "exp"} for found in terms)
    with pytest.raises(SystemExit):
        train_glove_t5.main([*words, "--empathy-loss-w", "0"])
    assert "--empathy-losses: of the critics' losses that --empathy-loss-w 0" in capsys.readouterr().err


def test_a_critic_that_reads_less_than_a_trained_reply_is_refused_as_a_loss(trained):
    folder, session = trained / "saved" / "empathy" / "glove-t5-emo", Session("cpu")
    reads = Critic.from_pretrained(folder).settings.reply_len
    words = dataloaders.tokenizer_hash(load_tokenizer(folder))

    def chosen(tgt_len: int) -> CriticSet:
        return critics.choose_for_loss({"emo": folder}, "glove-t5", words, tgt_len, session).critics

    assert len(chosen(reads + 1)) == 1  # as many words, and the end
    with pytest.raises(UserError, match=f"--tgt-len {reads + 2}: the emo critic reads only {reads} tokens"):
        chosen(reads + 2)


def test_sampled_replies_go_on_bit_for_bit(trained_copy, tmp_path, monkeypatch, the_end_is_kept):
    words = [
        "--workdir",
        str(trained_copy),
        *TINY,
        "--max-steps",
        "4",
        "--save-every",
        "1",
        "--empathy-loss-w",
    ]
    words += [
        "0",
        "--sentiment-loss-w",
        "0",
        "--sampled-loss-w",
        "1",
        "--sampled-reward",
        "distance",
        "--samples",
        "2",
        "--sampled-examples",
        "2",
    ]
    train_glove_t5.main([*words, "--name", "whole"])
    real, made = updates.Update.__call__, []

    def kill_at_the_third(self, numbers):
        made.append(0)
        if len(made) == 3:
            raise Killed
        return real(self, numbers)

    monkeypatch.setattr(updates.Update, "__call__", kill_at_the_third)
    with pytest.raises(Killed):
        train_glove_t5.main([*words, "--name", "killed"])
    monkeypatch.setattr(updates.Update, "__call__", real)
    train_glove_t5.main([*words, "--name", "killed"])
    saved = trained_copy / "saved" / "glove-t5"
    assert_same_run(saved / "whole", saved / "killed")
    assert all(-1 <= row["reward"] < 0 for row in logged(saved / "whole", "train"))
    assert json.loads((saved / "whole" / "sources.json").read_text())["reward emo"]["path"].endswith(
        "glove-t5-emo"
    )


def test_labels_that_the_rewarding_critic_does_not_know_are_refused(trained_copy):
    file = Paths(trained_copy).labels("train")
    table = pd.read_csv(file)
    table.loc[0, "int"] = 2
    table.to_csv(file, index=False)
    words = ["--workdir", str(trained_copy), *TINY, "--empathy-loss-w", "0", "--sentiment-loss-w", "0"]
    sampled = "--sampled-loss-w 1 --sampled-reward distance".split()
    with pytest.raises(UserError, match="its int labels are of 3 levels, and the critic knows 2; .*--int"):
        train_glove_t5.main([*words, *sampled])
    with pytest.raises(UserError, match="its int labels are of 3 levels, and the critic knows 2; .*--int"):
        train_glove_t5.main(words[:-4])


def test_labels_of_fewer_levels_than_the_critics_mean_something_else(trained_copy):
    """Level 1 of two is "at all", of three "weakly"."""
    file = Paths(trained_copy).labels("train")
    note = json.loads(storage.origin_file(file).read_text())
    assert [note[dim]["levels"] for dim in ("emo", "exp", "int")] == [2, 2, 2]
    # as if they were of a critic with one level less than the loss's
    storage.write_csv(
        file, pd.read_csv(file).assign(exp=0), origin=note | {"exp": note["exp"] | {"levels": 1}}
    )
    words = ["--workdir", str(trained_copy), *TINY, "--add-exemplars", "none"]
    none = "--empathy-loss-w 0 --sentiment-loss-w 0 --sampled-loss-w 1 --sampled-reward distance".split()
    for more in ([], none):
        with pytest.raises(UserError, match="its exp labels are of 1 levels, and the critic knows 2"):
            train_glove_t5.main([*words, *more])


def test_labels_that_reward_are_missed_or_old_in_the_words_of_the_family_that_is_there(trained_copy, capsys):
    file = Paths(trained_copy).labels("train")
    examples = corpora.listener_turns(Paths(trained_copy).dialogues("train"))
    note = json.loads(storage.origin_file(file).read_text())
    storage.origin_file(file).write_text(json.dumps(note | {"dialogues": "0" * 64}))
    families.gold_labels("train", examples, Paths(trained_copy))
    assert f"{file}: what it was made from has changed since: dialogues" in capsys.readouterr().out
    file.unlink()
    shutil.rmtree(trained_copy / "saved" / "empathy" / "t5-emo")
    words = ["--workdir", str(trained_copy), *TINY, "--empathy-loss-w", "0", "--sentiment-loss-w", "0"]
    with pytest.raises(UserError, match="label_dialogues.py.*--family glove-t5"):
        train_glove_t5.main([*words, *"--sampled-loss-w 1 --sampled-reward distance".split()])
    shutil.rmtree(trained_copy / "saved" / "empathy" / "glove-t5-exp")
    with pytest.raises(UserError, match="glove-t5-exp: .*; make it with: .*--dim exp .*--model glove-t5"):
        train_glove_t5.main([*words, *"--sampled-loss-w 1".split()])


def test_a_causal_model_is_rewarded_by_critics_of_another_family(trained_copy, tmp_path):
    base = save_llama(tmp_path / "llama", make_tokenizer())
    words = ["--workdir", str(trained_copy), "--model", base, "--family", "glove-t5", "--device", "cpu"]
    words += "--max-steps 2 --batch-size 2 --lora-rank 2 --no-predict --log-every 1".split()
    words += "--sampled-loss-w 1 --tgt-len 6 --valid-conversations 2".split()
    energy = "--samples 3 --sampled-top-k 9 --sampled-temperature 0.9".split()
    for name, more in (("distance", "--sampled-reward distance --samples 2".split()), ("energy", energy)):
        train_causal_lm.main([*words, *more, "--name", name])
        folder = trained_copy / "saved" / "causal-lm" / name
        assert all(-1 <= row["reward"] < 0 and row["sampled"] != 0 for row in logged(folder, "train"))
        # an energy score reads the gold replies themselves, no label of theirs
        sources = json.loads((folder / "sources.json").read_text())
        assert ("labels train" in sources) == (name == "distance")
    with pytest.raises(SystemExit):
        train_causal_lm.main([*words, *energy, "--samples", "2"])


@pytest.mark.parametrize("options", DRAWS)
def test_sampled_tokens_are_scored_as_they_were_drawn(options, trained_copy, tmp_path, monkeypatch):
    """What the policy gradient takes for a reply's likelihood is that of the prompt with that reply alone."""
    import causal_generators
    from causal_generators import draw_replies, sampled_nll
    from causal_models import CausalGenerator
    from chats import causal_data, prompt_data

    tokenizer = make_tokenizer()
    base = save_llama(tmp_path / "llama", tokenizer)
    model = CausalGenerator.start(base, rank=2, cache=tmp_path, exemplars="none").eval()
    examples = corpora.listener_turns(
        trained_copy / "data" / "empathetic_dialogues" / "original" / "train.csv"
    )[:5]
    layout = model.settings.layout
    prompts = prompt_data(examples, model.tokenizer, **layout)
    batch = causal_data(examples, model.tokenizer, packed=True, **layout).collate([0, 1])
    found, ways = [], [(0, True), (1, True), (0, False), (1, False)]
    for part_tokens, positions in ways:  # all at once or not; a prompt once for its replies, or once for each
        monkeypatch.setattr(causal_generators, "side_by_side", lambda lm, able=positions: able)
        torch.manual_seed(5)
        drawn = draw_replies(prompts, 7, options, torch.device("cpu"), part_tokens)(model, batch, 0, 3)
        parts = drawn.batch["parts"]
        assert len(parts) == (1 if not part_tokens else len(drawn.texts) // (3 if positions else 1))
        assert ("position_ids" in parts[0]) == positions
        model.zero_grad()
        nll = sampled_nll(model, drawn.batch, options)
        (nll * torch.arange(len(nll))).sum().backward()
        found.append((nll.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, atol=1e-4, rtol=1e-4)
    replies = [p["target_ids"] for p in parts]  # of the last way, each by itself
    for number, reply, together in zip(drawn.examples, replies, found[0][0], strict=True):
        prompt = prompts.collate([number])["input_ids"][0]
        with torch.no_grad():
            logits = model.lm(torch.cat([prompt, reply])[None]).logits[0, len(prompt) - 1 : -1]
        logits[:, model.banned] = -torch.inf  # none of them could be drawn
        if options.sampled_top_k:
            logits[logits < logits.topk(options.sampled_top_k).values[:, -1:]] = -torch.inf
        logits /= options.sampled_temperature
        alone = -logits.log_softmax(-1).gather(1, reply[:, None]).sum()
        assert float(together) == pytest.approx(float(alone), rel=1e-3)


def test_critics_that_were_cast_once_serve_every_loss(trained_copy):
    """Evaluation, log of gradients and rewards as well as the updates: all of them under autocast."""
    words = [
        "--workdir",
        str(trained_copy),
        *TINY,
        "--max-steps",
        "1",
        "--log-gradients",
        "--precision",
        "bf16",
    ]
    train_glove_t5.main([*words, "--sampled-loss-w", "1", "--samples", "3", "--sampled-examples", "1"])
    rows = logged(trained_copy / "saved" / "glove-t5" / "plain-critics-energy")
    assert all(row["emo"] > 0 for row in rows) and rows[-1]["grad_emo"] > 0 and -1 <= rows[0]["reward"] < 0


def test_a_finished_run_says_whom_it_was_trained_to_please_when_they_are_gone(trained_copy):
    train_glove_t5.main(["--workdir", str(trained_copy), *TINY, "--max-steps", "1"])
    run, paths = trained_copy / "saved" / "glove-t5" / "plain-critics", Paths(trained_copy)
    shutil.rmtree(paths.saved / "empathy")
    assert {(c.kind, c.half) for c in lineage.served(run, paths)} == {(kind, "all") for kind in CRITICS}


def test_gradients_are_logged_of_no_more_examples_than_fit_in_training(trained_copy, monkeypatch):
    asked, plain = [], generators.gradient_norms

    def watched(model, objective, batch):
        asked.append(len(batch["labels"]))
        return plain(model, objective, batch)

    monkeypatch.setattr(generators, "gradient_norms", watched)
    words = [
        "--workdir",
        str(trained_copy),
        *TINY,
        "--max-steps",
        "1",
        "--log-gradients",
        "--batch-size",
        "3",
    ]
    train_glove_t5.main(words)
    assert set(asked) == {3}


def test_what_fits_and_what_goes_on_count_the_sampled_replies(trained_copy, monkeypatch, capsys):
    """Each micro-batch samples: their number is not free, and neither is their memory."""
    plain = objectives.sampled_nll

    def short(model, sampled, options):
        if len(sampled["labels"]) > 2 * 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(model, sampled, options)

    monkeypatch.setattr(objectives, "sampled_nll", short)
    words = ["--workdir", str(trained_copy), "--name", "run", "--sampled-loss-w", "1", "--samples", "3"]
    words += "--device cpu --size tiny --add-exemplars none --no-predict --max-steps 1".split()
    words += "--empathy-loss-w 0 --sentiment-loss-w 0 --sampled-examples 0".split()
    train_glove_t5.main([*words, "--batch-size", "auto"])
    pieces = int(re.search(r"--batch-size auto: 2 x (\d+) micro-batches fit", capsys.readouterr().out)[1])
    with pytest.raises(UserError, match="--batch-size"):
        train_glove_t5.main([*words, "--batch-size", "1", "--accumulate", str(2 * pieces)])


def test_a_share_of_no_gradient_is_refused(capsys):
    with pytest.raises(SystemExit):
        train_glove_t5.parse_args(["--main-loss-w", "0", "--balance", "0.5"])
    assert "which --main-loss-w 0 takes away" in capsys.readouterr().err


# ------------------------------------------------------------------------------- what an energy score teaches

VALUES = torch.tensor([0.1, 0.5, 0.9])  # the level that a critic sees in each of three replies


def worth_of_draws(name, drawn, gold):
    levels = VALUES[drawn]  # (B, S)
    if name == "energy":
        return objectives.energy_scores(levels, gold)[1]
    return objectives.advantages(-(levels - gold[:, None]).abs())


def test_the_energy_score_s_gradient_is_its_own_on_average():
    """All draws of four replies out of three, each as often as it is likely, beside the exact gradient."""
    logits, gold = torch.tensor([0.3, -0.5, 0.1], dtype=torch.double, requires_grad=True), torch.tensor(0.2)
    p = logits.softmax(0)
    apart = (VALUES[:, None] - VALUES).abs()
    score = p @ (VALUES - gold).abs().double() - p @ apart.double() @ p / 2
    (exact,) = torch.autograd.grad(score, logits)
    found = torch.zeros(3, dtype=torch.double)
    for drawn in itertools.product(range(3), repeat=4):
        logp = logits.log_softmax(0)[list(drawn)]
        worth = worth_of_draws("energy", torch.tensor([drawn]), gold[None])[0]
        loss = -(worth.double() * logp).mean()  # advantage * nll, the mean over replies
        found += logp.sum().exp().detach() * torch.autograd.grad(loss, logits)[0]
    torch.testing.assert_close(found, exact, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("name, learnt", [("energy", [0.3, 0.1, 0.6]), ("distance", [0.0, 0.0, 1.0])])
def test_an_energy_score_teaches_how_often_and_a_distance_what_is_commonest(name, learnt):
    """People show the three levels in 30, 10 and 60 % of their replies to one context."""
    torch.manual_seed(1)
    logits = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.03)
    for _ in range(500):
        gold = VALUES[torch.multinomial(torch.tensor([0.3, 0.1, 0.6]), 256, replacement=True)]
        drawn = torch.multinomial(logits.detach().softmax(0).expand(256, 3), 4, replacement=True)
        loss = -(worth_of_draws(name, drawn, gold) * logits.log_softmax(0)[drawn]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(logits.softmax(0).detach(), torch.tensor(learnt), atol=0.06, rtol=0)


def test_critics_see_the_gold_replies_beside_the_sampled_ones(trained):
    """Worth of the energy score: what a critic says of plain texts, by its definition."""
    scorer = critics.Critic.from_pretrained(trained / "saved" / "empathy" / "glove-t5-emo")
    contexts = [["my dog died ."], ["i won a prize !"]]
    golds = ["i am so sorry .", "how nice ! what is it ?"]
    replies = ["sorry", "oh no , that is sad", "why ?", "great", "good for you !", "i had a dog"]
    numbers = [1, 1, 1, 0, 0, 0]
    rewards = objectives.EnergyScore({"emo": scorer}, contexts, golds)
    reward, worth = rewards.of(numbers, replies, 3)
    value = [s.value for s in scorer.score(replies, [contexts[n] for n in numbers])]
    gold = [s.value for s in scorer.score(golds, contexts)]
    for row in (0, 1):
        x, y = value[3 * row : 3 * row + 3], gold[numbers[3 * row]]
        energy = sum(abs(v - y) for v in x) / 3 - sum(abs(v - w) for v in x for w in x) / 6 / 2
        assert -float(reward[3 * row : 3 * row + 3].mean()) == pytest.approx(energy, abs=1e-5)
    found = torch.tensor(value).view(2, 3)
    expected = objectives.energy_scores(found, torch.tensor([gold[1], gold[0]]))[1].flatten()
    torch.testing.assert_close(worth, expected, atol=1e-5, rtol=0)


def test_a_distance_is_to_each_replys_own_label_as_a_share_of_what_its_critic_can_say(trained):
    saved = trained / "saved"
    scorers = {
        "emo": critics.Critic.from_pretrained(saved / "empathy" / "glove-t5-emo"),
        "sentiment": critics.Critic.from_pretrained(saved / "sentiment" / "glove-t5"),
    }
    contexts, replies = [["my dog died ."], ["i won a prize !"]], ["sorry", "oh no", "why ?", "great !"]
    numbers, labels = [1, 1, 0, 0], {"emo": [0, 1], "sentiment": [-0.4, 0.8]}
    reward, advantage = objectives.Distance(scorers, contexts, labels).of(numbers, replies, 2)
    expected = []
    for number, reply in zip(numbers, replies, strict=True):
        away = [
            abs(scorer.score([reply], [contexts[number]])[0].value - labels[kind][number]) / width
            for (kind, scorer), width in zip(scorers.items(), (1, 2), strict=True)
        ]
        expected.append(-sum(away) / 2)
    assert reward.tolist() == pytest.approx(expected, abs=1e-5)
    first, second, third, fourth = expected
    apart = [first - second, second - first, third - fourth, fourth - third]
    assert advantage.tolist() == pytest.approx(apart, abs=1e-5)


def test_contexts_that_are_sampled_are_read_with_their_own_exemplars_alone():
    share = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0.5, 0, 0.5]])
    batch = {
        "source_ids": torch.arange(8).view(4, 2),
        "exemplar_ids": torch.tensor([[5, 0, 0], [6, 7, 0], [8, 0, 0], [9, 9, 9]]),
        "exemplar_mask": torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 0], [1, 1, 1]]),
        "exemplar_pieces": [(4, 3)],
        "exemplar_share": share,
    }
    part = objectives.rows_of(batch, torch.tensor([0, 3]))
    assert part["source_ids"].tolist() == [[0, 1], [6, 7]]
    rows = part["exemplar_ids"].tolist()
    assert rows == [[5, 0, 0], [6, 7, 0], [9, 9, 9]] and part["exemplar_pieces"] == [(3, 3)]
    assert part["exemplar_share"].tolist() == [[0.5, 0.5, 0], [0, 0.5, 0.5]]
    nobody = objectives.rows_of(batch, torch.tensor([2]))
    assert nobody["exemplar_share"].tolist() == [[0.0]] and len(nobody["exemplar_ids"]) == 1


@pytest.mark.parametrize(("strategy", "balance"), [(0, 0.0), (2, 0.0), (0, 0.5), (2, 0.5)])
def test_with_soft_targets_no_label_counts_whatever_the_strategy_and_the_balance(strategy, balance):
    model = Generator({"backbone": config(16).to_dict(), "exemplars": "none"})
    frozen, batch = two_critics(), batch_of([3, 8, 5])
    other = batch | {"critic_targets": {k: v.flip(0) for k, v in batch["critic_targets"].items()}}

    def losses(given: dict, targets: str) -> list[float]:
        asked = generator_options(strategy=strategy, balance=balance, critic_targets=targets)
        torch.manual_seed(1)
        terms = objectives.GeneratorObjective(frozen, asked).gold_terms(model, given)
        return [float(terms[kind]) for kind in frozen.critics]

    assert losses(batch, "soft") == losses(other, "soft") != losses(batch, "labels")
    assert losses(batch, "labels") != losses(other, "labels")


def test_a_ramp_is_of_the_critics_alone_and_ends_at_their_full_weights():
    sampled = objectives.SampledReplies(None, None, SampledOptions(2.0, "energy", 3, 0, 0, 1.0))
    objective = objectives.GeneratorObjective(two_critics(), generator_options(critic_ramp=4), sampled)
    whole = objective.weights
    assert whole == {"nll": 1, "emo": 1, "sentiment": 1, "sampled": 2, "reward": 0}
    assert objective.weights_at(0) == whole | {"emo": 0.25, "sentiment": 0.25}
    assert objective.weights_at(3) == objective.weights_at(99) == whole


def test_how_an_update_is_split_counts_where_critics_are_balanced(trained_copy):
    words = ["--workdir", str(trained_copy), *TINY, "--max-steps", "1", "--name", "run", "--balance", "0.5"]
    train_glove_t5.main(words)
    with pytest.raises(UserError, match="was begun with other settings:\n  --accumulate: 1 then, 2 now"):
        train_glove_t5.main([*words, "--batch-size", "4", "--accumulate", "2"])
