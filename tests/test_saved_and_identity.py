"""What is saved loads again and is what was trained; what a thing is, is its content and not its path."""

import argparse
import copy
import json
import math
import shutil
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_models import VOCAB, make_batch, t5_config
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, T5ForConditionalGeneration

import dpr_exemplar_retriever
import evaluate_responses
import exemplars
import generators
import hub
import label_dialogues
import labelling
import predicting
import recipes
import reproduce
import responder
import runs
import stages
import storage
import tables
import train_empathy_classifier
import train_glove_t5
import train_sentiment_regressor
import train_t5
from corpora import listener_turns
from DPR import evaluate_retriever, prepare_dpr_data, retriever, train_dpr
from models import Generator, token_nll
from options import Paths, UserError
from pretrained import SavedModule, load_config, load_pretrained
from session import Session
from settings import Decoding

EXAMPLES = [([5, 6, 7, 1], [8, 9], []), ([10, 11, 1], [12], [])]


def publish(folder: Path, config, own_head: bool) -> Path:
    """A T5 as the hub has it; `own_head`: T5 v1.1, whose output layer is another matrix than its words."""
    torch.manual_seed(1)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    if own_head:
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"] = 0.3 * torch.randn_like(weights["shared.weight"])
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        stored = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
        stored.pop("scale_decoder_outputs", None)
        (folder / "config.json").write_text(json.dumps(stored))
    return folder


def around(folder: Path) -> Generator:
    """A new generator, speakers not zero, around a published T5."""
    t5 = load_pretrained(T5ForConditionalGeneration, folder, load_config(folder))
    model = Generator({"backbone": t5.config.to_dict(), "exemplars": "none"}, t5).eval()
    torch.nn.init.normal_(model.speakers.weight)
    return model


# ---------------------------------------------------------------------------------------------- saved, loaded


@pytest.mark.parametrize("activation", ["relu", "gated-gelu"])
@pytest.mark.parametrize("own_head", [False, True])
def test_a_generator_is_loaded_with_the_head_it_was_saved_with(tmp_path, own_head, activation):
    model = around(publish(tmp_path / "base", t5_config(feed_forward_proj=activation), own_head))
    model.save_pretrained(tmp_path / "run")
    again = Generator.from_pretrained(tmp_path / "run")
    batch = make_batch(EXAMPLES)
    with torch.no_grad():
        assert torch.equal(again(batch), model(batch))
    head, words = again.t5.lm_head.weight, again.t5.shared.weight
    assert (head is words) == (not own_head)
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "run" / "config.json").read_text()


@pytest.mark.parametrize("own_head", [False, True])
def test_a_t5_from_scratch_begins_near_a_guess_among_all_words(workdir, tmp_path, own_head):
    tokenizer = AutoTokenizer.from_pretrained(Paths(workdir).t5_tiny)
    base = publish(tmp_path / "base", t5_config(len(tokenizer), feed_forward_proj="gated-gelu"), own_head)
    tokenizer.save_pretrained(base)
    backbone = generators.load_t5(str(base), True, 0.0, Paths(workdir))
    assert (backbone.t5.lm_head.weight is backbone.t5.shared.weight) == (not own_head)
    model = Generator({"backbone": backbone.t5.config.to_dict(), "exemplars": "none"}, backbone.t5).eval()
    batch = make_batch(EXAMPLES)
    with torch.no_grad():
        nll = token_nll(model(batch), batch["labels"]).sum() / (batch["labels"] != -100).sum()
    assert float(nll) == pytest.approx(math.log(len(tokenizer)), rel=0.3)


# --------------------------------------------------------------------------------------------------- decoding

OTHERS_WISHES = {
    "num_beams": 3,
    "do_sample": True,
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 9,
    "length_penalty": 9.0,
    "top_p": 0.01,
    "temperature": 5.0,
    "forced_eos_token_id": 7,
    "bad_words_ids": [[9]],
}


@pytest.mark.parametrize("beams", [1, 3])
def test_the_base_models_own_decoding_decides_nothing(tmp_path, beams):
    plain = publish(tmp_path / "plain", t5_config(), own_head=False)
    opinionated = publish(tmp_path / "opinionated", t5_config(), own_head=False)
    (opinionated / "generation_config.json").write_text(json.dumps(OTHERS_WISHES))
    decoding = Decoding(5, 0.9, 12, beams=beams, predict_batch_size=64, seed=42)

    class Tokenizer:
        pad_token_id, bos_token_id, unk_token_id = 0, None, 2

        def get_vocab(self):
            return {str(i): i for i in range(VOCAB)}

    arguments = predicting.decoding_arguments(decoding, Tokenizer(), VOCAB)
    models = [around(plain), around(opinionated)]
    models[1].load_state_dict(models[0].state_dict())
    models[1].save_pretrained(tmp_path / "run")
    models.append(Generator.from_pretrained(tmp_path / "run"))
    found = []
    for model in models:
        torch.manual_seed(4)
        found.append(model.generate(make_batch(EXAMPLES), **arguments))
    assert found[0].shape[1] > 3
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_two_decodings_of_one_run_stand_side_by_side(trained_copy, tmp_path, capsys):
    call(train_glove_t5, trained_copy, "--size tiny --add-exemplars none --max-new-tokens 5")
    folder = Paths(trained_copy).saved / "glove-t5" / "plain-critics"
    own = (folder / "predictions.tsv").read_bytes()
    common = ["--workdir", str(trained_copy), "--device", "cpu"]
    beams = ["--inference", str(folder), "--output", str(tmp_path / "beams"), "--beams", "3"]
    train_glove_t5.main([*common, *beams, "--max-new-tokens", "6", "--no-repeat-ngram", "2"])
    assert (folder / "predictions.tsv").read_bytes() == own
    assert (tmp_path / "beams" / "predictions.tsv").read_bytes() != own
    with pytest.raises(UserError, match="already there: .*beams"):
        train_glove_t5.main([*common, *beams])
    with pytest.raises(UserError, match="the folder of another run"):
        other = Paths(trained_copy).critic("emo", "t5")
        train_glove_t5.main([*common, "--inference", str(folder), "--output", str(other)])
    capsys.readouterr()
    found = evaluate_responses.main(
        [*common, str(folder), str(tmp_path / "beams"), "--family", "glove-t5", "--cases", "1"]
    )
    rows = found["systems"]
    assert list(rows) == ["gold", "glove-t5/plain-critics", "beams"]
    assert rows["beams"]["ppl_token"] == pytest.approx(rows["glove-t5/plain-critics"]["ppl_token"], rel=1e-4)
    below = (Paths(trained_copy).results / "evaluation" / "table.md").read_text()
    assert (
        "Replies of glove-t5/plain-critics: sampled among the 20 likeliest tokens at temperature 0.9, "
        "seed 42, at most 5 tokens.\n" in below
    )
    expected = "Replies of beams: beam search, 3 beams, no 2 tokens in a row twice, at most 6 tokens.\n"
    assert expected in below
    own = "beams was trained against the very critics that judge it here, or on their labels: "
    assert f"{own}emo, exp, int, sentiment." in below


def test_flags_that_inference_ignores_are_said(capsys):
    train_t5.parse_args("--inference run --lr 3 --epochs 2 --src-len 9 --beams 2 --exemplars x".split())
    assert "note: --src-len, --epochs, --lr: ignored, since --inference" in capsys.readouterr().out
    train_t5.parse_args("--inference run --top-k 3 --output x --seed 1 --predict-split valid".split())
    assert not capsys.readouterr().out
    with pytest.raises(SystemExit):
        train_t5.parse_args(["--output", "x"])
    assert "--output: only with --inference" in capsys.readouterr().err


# ------------------------------------------------------------------------- loaded once before it is finished

SHORT = "--device cpu --max-steps 2 --batch-size 4"
PLAIN = "--add-exemplars none --empathy-loss-w 0 --sentiment-loss-w 0 --src-len 30 --max-new-tokens 5"


def call(script, workdir: Path, flags: str):
    return script.main(["--workdir", str(workdir), *SHORT.split(), *flags.split()])


def train_retriever(workdir: Path, flags: str):
    if not Paths(workdir).dpr_data("empd", "train").exists():
        prepare_dpr_data.main(["--workdir", str(workdir)])
    return call(train_dpr, workdir, f"--encoder {Paths(workdir).bert_tiny} {flags}")


TRAININGS = {
    "classifier": (
        "empathy/t5-emo",
        partial(call, train_empathy_classifier),
        "--model t5 --size tiny --dim emo",
    ),
    "regressor": (
        "sentiment/glove-t5",
        partial(call, train_sentiment_regressor),
        "--model glove-t5 --size tiny",
    ),
    "T5": ("t5/plain", partial(call, train_t5), f"--model t5-tiny {PLAIN}"),
    "GloVe T5": ("glove-t5/plain", partial(call, train_glove_t5), f"--size tiny {PLAIN}"),
    "retriever": ("dpr/empd", train_retriever, ""),
}


@pytest.mark.parametrize("stage", TRAININGS)
def test_a_run_that_saved_something_else_than_it_trained_does_not_finish(workdir, monkeypatch, stage):
    """A weight is lost on its way to the disk; the same command, once that is mended, finishes the run."""
    name, train, flags = TRAININGS[stage]
    folder = Paths(workdir).saved / name

    def spoil(model):
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if n.endswith("wi.weight") or "dense" in n).mul_(-1)
        return model

    with monkeypatch.context() as patch:
        for kind, method in ((SavedModule, "save_pretrained"), (PreTrainedModel, "save_pretrained")):
            save = getattr(kind, method)
            patch.setattr(
                kind, method, lambda self, *a, save=save, **k: save(spoil(copy.deepcopy(self)), *a, **k)
            )
        with pytest.raises(UserError, match=r"answers otherwise than the trained model .* are kept"):
            train(workdir, flags)
    assert not (folder / "result.json").exists() and list((folder / "checkpoints").glob("step-*"))
    train(workdir, flags)
    assert (folder / "result.json").exists()


@pytest.mark.parametrize("stage", ["classifier", "T5", "retriever"])
def test_a_run_whose_saved_words_are_others_does_not_finish(workdir, monkeypatch, stage):
    name, train, flags = TRAININGS[stage]
    save = PreTrainedTokenizerBase.save_pretrained

    def save_more_words(self, folder, *args, **kwargs):
        changed = copy.deepcopy(self)
        changed.add_tokens(["unheard-of"])
        return save(changed, folder, *args, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", save_more_words)
    with pytest.raises(UserError, match="cannot be loaded again .* other words"):
        train(workdir, flags)
    assert not (Paths(workdir).saved / name / "result.json").exists()


def test_a_t5_with_its_own_head_is_trained_and_loaded_by_the_scripts(workdir, tmp_path):
    """Its config says gated and untied, as Flan-T5's does; the saved run gives the nll that was logged."""
    words = AutoTokenizer.from_pretrained(Paths(workdir).t5_tiny)
    config = t5_config(len(words), feed_forward_proj="gated-gelu")
    words.save_pretrained(publish(tmp_path / "flan", config, own_head=True))
    for how in ("", "--from-scratch "):
        result = call(train_t5, workdir, f"--model {tmp_path / 'flan'} --name run{len(how)} {how}{PLAIN}")
        folder = Paths(workdir).saved / "t5" / f"run{len(how)}"
        assert json.loads((folder / "config.json").read_text())["own_head"]
        predicted = pd.read_csv(folder / "likelihood.csv")[["nll", "tokens"]].sum()
        call(train_t5, workdir, f"--inference {folder} --overwrite --max-new-tokens 5")
        again = pd.read_csv(folder / "likelihood.csv")[["nll", "tokens"]].sum()
        assert again["nll"] == pytest.approx(predicted["nll"], rel=1e-5)
        assert result["nll"] < 2 * math.log(len(words))


# ----------------------------------------------------------------------------------- content, never spelling


def spellings(workdir: Path, monkeypatch, tmp_path: Path):
    """The same workdir as users spell it, from where they are."""
    monkeypatch.chdir(workdir)
    yield "."
    monkeypatch.chdir(tmp_path)
    yield workdir.relative_to(tmp_path)
    yield workdir / "saved" / ".."
    (tmp_path / "link").symlink_to(workdir)
    yield tmp_path / "link"
    monkeypatch.chdir("/")
    moved = workdir.rename(tmp_path / "moved")
    yield moved


def test_a_place_is_found_again_however_the_workdir_is_spelled(workdir, monkeypatch, tmp_path):
    noted = Paths(workdir).note(workdir / "saved" / "t5")
    outside = Paths(workdir).note(tmp_path / "elsewhere")
    for root in spellings(workdir, monkeypatch, tmp_path):
        assert Paths(root).note(Path(root) / "saved" / "t5") == noted == "saved/t5"
        assert Paths(root).find(noted).resolve() == Path(root).resolve() / "saved" / "t5"
        assert Paths(root).find(outside) == tmp_path / "elsewhere"


def test_labels_and_exemplars_are_kept_however_the_workdir_is_spelled(
    trained_copy, monkeypatch, tmp_path, capsys
):
    paths = Paths(trained_copy)
    before = [f.read_bytes() for f in (paths.labels("test"), paths.exemplars("test"))]
    for root in spellings(trained_copy, monkeypatch, tmp_path):
        common = ["--workdir", str(root), "--device", "cpu"]
        label_dialogues.main([*common, "--family", "glove-t5"])
        emo = Path(root) / "saved" / "empathy" / "glove-t5-emo"
        label_dialogues.main([*common, "--family", "glove-t5", "--emo", str(emo)])
        dpr_exemplar_retriever.main([*common, "--path", str(Path(root) / "saved/dpr/empd"), "--top-k", "3"])
        assert capsys.readouterr().out.count("already made from the same inputs, kept") == 9
    paths = Paths(root)
    assert before == [f.read_bytes() for f in (paths.labels("test"), paths.exemplars("test"))]
    with pytest.raises(UserError, match="made with another emo;"):
        other = paths.critic("emo", "t5")
        label_dialogues.main([*common, "--family", "glove-t5", "--emo", str(other)])


def test_a_run_goes_on_from_the_same_files_at_another_place(trained_copy, monkeypatch, tmp_path):
    """Labels, exemplars, critics and the exemplars' encoder, each by a flag; exchanged content is refused."""
    encoder = shutil.copytree(Paths(trained_copy).t5_tiny, tmp_path / "encoder")
    publish(encoder, t5_config(len(AutoTokenizer.from_pretrained(encoder))), own_head=False)
    flags = "--size tiny --add-exemplars t5 --no-predict --name run --src-len 30 --sentiment-loss-w 0"

    def train(root: Path, encoder: Path):
        folder, emo = Path(root) / "data" / "empathetic_dialogues", Path(root) / "saved/empathy/glove-t5-emo"
        places = f"--labels {folder} --exemplars {folder} --emo {emo} --exemplar-model {encoder}"
        return call(train_glove_t5, root, f"{flags} {places}")

    assert not train(trained_copy, encoder).get("already_finished")
    for root in spellings(trained_copy, monkeypatch, tmp_path):
        assert train(root, encoder)["already_finished"]
    run = Path(root) / "saved" / "glove-t5" / "run"
    assert json.loads((run / "config.json").read_text())["exemplar_model"] == "encoder"
    assert all(str(tmp_path) not in (run / n).read_text() for n in ("config.json", "README.md"))
    encoder = encoder.rename(tmp_path / "encoder, moved")
    with pytest.raises(UserError, match="encoder: .* say where its folder lies: --base"):
        responder.Responder.from_pretrained(run, session=Session("cpu"), workdir=root)
    responder.Responder.from_pretrained(run, session=Session("cpu"), workdir=root, base=str(encoder))
    words = [
        "--workdir",
        str(root),
        "--size",
        "tiny",
        "--device",
        "cpu",
        "--overwrite",
        "--max-new-tokens",
        "4",
    ]
    words += ["--inference", str(Path(root) / "saved" / "glove-t5" / "run")]
    train_glove_t5.main([*words, "--exemplar-model", str(encoder)])
    encoder.rename(tmp_path / "encoder")

    def spoil(folder: Path):
        weights = load_file(folder / "model.safetensors")
        weights = {k: v * 1.5 for k, v in weights.items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    spoil(tmp_path / "encoder")
    with pytest.raises(UserError, match="exemplar encoder: its content has changed"):
        train(root, tmp_path / "encoder")
    with pytest.raises(UserError, match="exemplar encoder .* other weights than in its training"):
        train_glove_t5.main(words)
    spoil(Paths(root).critic("emo", "glove-t5"))
    with pytest.raises(UserError, match="critic emo: its content has changed"):
        train(root, tmp_path / "encoder")


@pytest.mark.parametrize("stage", ["classifier", "T5", "retriever"])
def test_the_model_a_run_began_from_is_part_of_it(workdir, tmp_path, stage):
    """The same by another path goes on; other weights under the old path do not."""
    name, train, flags = TRAININGS[stage]
    place = tmp_path / "base"
    if stage == "retriever":
        shutil.copytree(Paths(workdir).bert_tiny, place)
    else:
        words = AutoTokenizer.from_pretrained(Paths(workdir).t5_tiny)
        words.save_pretrained(publish(place, t5_config(len(words)), own_head=False))
        flags = flags.replace("--size tiny", "").replace("--model t5-tiny", "--model t5")
    flags += " --name run"

    def begin(place: Path):
        if stage == "retriever":
            return train(workdir, f"{flags} --encoder {place}")
        return train(workdir, flags.replace("--model t5", f"--model {place}"))

    begin(place)
    folder = (Paths(workdir).saved / name).with_name("run")
    inputs = json.loads((folder / "args.json").read_text())["inputs"]
    result = (folder / "result.json").read_bytes()
    begin(place.rename(tmp_path / "moved"))
    weights = load_file(tmp_path / "moved" / "model.safetensors")
    weights = {k: v * 1.5 for k, v in weights.items()}
    save_file(weights, tmp_path / "moved" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"(model|encoder): its content has changed"):
        begin(tmp_path / "moved")
    assert (folder / "result.json").read_bytes() == result
    assert storage.identity(tmp_path / "moved") not in inputs.values()
    assert storage.identity("t5-small") == "t5-small"  # a hub name stays a name


def test_labels_older_than_their_critic_are_named_from_any_directory(
    trained_copy, monkeypatch, tmp_path, capsys
):
    file = Paths(trained_copy).critic("emo", "glove-t5") / "model.safetensors"
    weights = {k: v * 1.01 for k, v in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    for n, root in enumerate(spellings(trained_copy, monkeypatch, tmp_path)):
        call(train_glove_t5, root, f"--size tiny --no-predict --name run{n} --sentiment-loss-w 0")
        assert "train_labels.csv: what it was made from has changed since: emo" in capsys.readouterr().out


def test_exemplars_older_than_their_retriever_are_named(trained_copy, capsys):
    paths = Paths(trained_copy)
    examples = listener_turns(paths.dialogues("test"))
    exemplars.of_split("test", examples, 1, paths)
    assert "has changed" not in capsys.readouterr().out
    file = paths.saved / "dpr" / "empd" / "question_encoder" / "model.safetensors"
    save_file({k: v * 1.01 for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    exemplars.of_split("test", examples, 1, paths)
    said = capsys.readouterr().out
    assert "test_dpr.csv: what it was made from has changed since: question; " in said


def test_exemplars_that_were_found_otherwise_than_the_trainings_are_said_to_be(trained_copy, capsys):
    paths = Paths(trained_copy)
    examples = listener_turns(paths.dialogues("test"))
    exemplars.of_split("test", examples, 2, paths)
    assert "found with another" not in capsys.readouterr().out
    asked = "--splits test --match random --candidates all --top-k 2 --overwrite".split()
    dpr_exemplar_retriever.main(["--device", "cpu", "--workdir", str(trained_copy), *asked])
    capsys.readouterr()
    exemplars.of_split("test", examples, 2, paths)
    said = capsys.readouterr().out
    assert "test_dpr.csv: found with another question, context" in said and "match, top_k than the tr" in said


def test_a_run_notes_as_many_exemplars_as_there_are_to_read(trained_copy, capsys):
    """In use as many are searched: pooled, a mean over twenty would be another thing than one over ten."""
    note = storage.read_origin(Paths(trained_copy).exemplars("train"))
    for asked, read in ((note["top_k"] + 10, note["top_k"]), (2, 2)):
        flags = f"--size tiny --max-steps 1 --no-predict --top-exemplars {asked} --name top{asked}"
        call(train_glove_t5, trained_copy, f"{flags} --empathy-loss-w 0 --sentiment-loss-w 0")
        kept = json.loads((trained_copy / "saved" / "glove-t5" / f"top{asked}" / "config.json").read_text())
        assert kept["top_exemplars"] == read
        said = f"so --top-exemplars is {read} and not {asked}" in capsys.readouterr().out
        assert said == (asked > read)


def test_questions_older_than_their_dialogues_are_named(trained_copy, capsys):
    """By who trains on them, and by who is measured on them."""
    words = f"--workdir {trained_copy} --device cpu --encoder {Paths(trained_copy).bert_tiny}".split()
    for split in ("train", "valid"):
        file = Paths(trained_copy).dialogues(split)
        file.write_text(file.read_text(encoding="utf-8").replace(" my ", " your "), encoding="utf-8")
    train_dpr.main([*words, "--max-steps", "1", "--batch-size", "4", "--name", "late"])
    said = capsys.readouterr().out
    for split in ("train", "valid"):
        assert f"empd_{split}.json: what it was made from has changed since: empd; " in said
    evaluate_retriever.main([*words, "--name", "late"])
    assert "empd_valid.json: what it was made from has changed since: empd; " in capsys.readouterr().out


@pytest.mark.parametrize("main", [label_dialogues.main, dpr_exemplar_retriever.main, evaluate_responses.main])
def test_what_another_process_wrote_meanwhile_is_not_replaced(trained_copy, monkeypatch, main):
    """As if a second call, with other inputs, had ended just before the first one writes."""
    paths, words = Paths(trained_copy), ["--workdir", str(trained_copy), "--device", "cpu"]
    if main is label_dialogues.main:
        words += ["--family", "glove-t5", "--output", str(trained_copy / "mine"), "--splits", "test"]
        theirs, place = trained_copy / "mine" / "test_labels.csv", (labelling, "critic_scores")
    elif main is dpr_exemplar_retriever.main:
        words += ["--path", str(paths.saved / "dpr" / "empd"), "--output", str(trained_copy / "mine")]
        words += ["--splits", "test"]
        theirs, place = trained_copy / "mine" / "test_dpr.csv", (retriever, "own_conversations")
    else:
        gold = trained_copy / "gold.txt"
        texts = [example.response for example in listener_turns(paths.dialogues("test"))]
        gold.write_text("\n".join(texts) + "\n", encoding="utf-8")
        words += f"{gold} --references {gold} --family none --judges none --nearest none".split()
        theirs, place = paths.results / "evaluation" / "metrics.json", (tables, "settled")
    before = getattr(*place)

    def late(*args, **kwargs):
        storage.write_text(theirs, "theirs", {"dialogues": "other ones"})
        return before(*args, **kwargs)

    monkeypatch.setattr(*place, late)
    with pytest.raises(UserError, match="already there"):
        main(words)
    assert theirs.read_text(encoding="utf-8") == "theirs"


def test_a_recipe_knows_its_finished_stages_however_the_workdir_is_spelled(workdir, monkeypatch, tmp_path):
    done = []

    class Finishes:
        def __init__(self, command, log, ended, *rest):
            done.append(command)
            self.process, self.began, self.commit = argparse.Namespace(returncode=0), 0.0, "unknown"
            ended()

    monkeypatch.setattr(stages, "Process", Finishes)
    monkeypatch.setattr(reproduce, "HERE", tmp_path)
    for root in spellings(workdir, monkeypatch, tmp_path):
        reproduce.main(["--recipe", "t5", "--workdir", str(root)])
    assert len(done) == len(recipes.lines_of(recipes.RECIPES["t5"]("download")))


def test_a_run_says_what_it_was_made_from_and_where_that_lies(trained_copy, monkeypatch, tmp_path):
    call(train_glove_t5, trained_copy, "--size tiny --no-predict")
    for root in spellings(trained_copy, monkeypatch, tmp_path):
        paths = Paths(root)
        found = runs.sources(paths.saved / "glove-t5" / "lempex", paths)
        for kind in ("emo", "exp", "int", "sentiment"):
            critic = found[f"critic {kind}"]
            assert critic.path.samefile(paths.critic(kind, "glove-t5"))
            assert critic.sha256 == storage.sha256(critic.path / "model.safetensors")
        for name, file in (
            ("exemplars train", paths.exemplars("train")),
            ("labels valid", paths.labels("valid")),
            ("pool", paths.dialogues("train")),
        ):
            assert found[name].path.samefile(file) and found[name].sha256 == storage.sha256(file)
        for side in ("question", "context"):
            encoder = found[f"{side} encoder"]
            assert encoder.path.samefile(paths.saved / "dpr" / "empd" / f"{side}_encoder")
            assert encoder.sha256 == storage.sha256(encoder.path / "model.safetensors")
        assert found["model"].path.samefile(paths.glove)


def test_a_frozen_encoder_of_exemplars_is_loaded_once(trained_copy, monkeypatch):
    loaded = []
    load = exemplars.load_encoder
    monkeypatch.setattr(exemplars, "load_encoder", lambda *a, **k: loaded.append(a) or load(*a, **k))
    flags = "--size tiny --add-exemplars t5 --exemplar-model t5-tiny --empathy-loss-w 0 --sentiment-loss-w 0"
    call(train_glove_t5, trained_copy, f"{flags} --max-new-tokens 4")
    assert len(loaded) == 1


def test_a_t5_that_reads_exemplars_by_glove_has_their_words_in_its_folder(trained_copy):
    flags = (
        "--model t5-tiny --add-exemplars glove-t5 --exemplar-layers 1 --empathy-loss-w 0 --sentiment-loss-w 0"
    )
    more = "--max-new-tokens 4 --max-steps 1 --name pooled"
    call(train_t5, trained_copy, f"{flags} {more}")
    run = Paths(trained_copy).saved / "t5" / "pooled"
    replies = (run / "predictions.tsv").read_text(encoding="utf-8")
    shutil.rmtree(Paths(trained_copy).glove)
    call(train_t5, trained_copy, f"--inference {run} --output {trained_copy / 'again'} --max-new-tokens 4")
    assert (trained_copy / "again" / "predictions.tsv").read_text(encoding="utf-8") == replies
    assert Path("exemplar_words/tokenizer.json") in hub.published(run)


def test_from_scratch_takes_a_models_config_and_none_of_its_weights(workdir, tmp_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(Paths(workdir).t5_tiny)
    base = publish(tmp_path / "base", t5_config(len(tokenizer)), own_head=False)
    tokenizer.save_pretrained(base)
    monkeypatch.setattr(generators, "run", lambda command, load: load(command.paths).t5.shared.weight)
    words = ["--workdir", str(workdir), "--model", str(base), "--add-exemplars", "none"]
    words += ["--empathy-loss-w", "0", "--sentiment-loss-w", "0"]
    first, again, new = train_t5.main(words), train_t5.main(words), train_t5.main([*words, "--from-scratch"])
    assert torch.equal(first, again) and not torch.equal(first, new)
