"""What is loaded by one call: from a run's folder or the hub; what is sent there, and what a card says."""

import base64
import contextlib
import hashlib
import http.server
import io
import json
import os
import re
import threading
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from transformers import AutoModel, AutoTokenizer
from transformers.utils import hub as transformers_hub

import bundled
import cards
import exemplars
import hub
import score
import searching
from critics import Critic
from DPR.retriever import Retriever
from hub import published
from options import DATASETS, Paths, UserError
from responder import Responder
from session import Session
from settings import Decoding

COMMIT = "a" * 40
SAID = ["My dog ran away last night."]
REPLIES = ["I am so sorry.", "What happened then?", "That is great news!"]


def runs_of(home: Path) -> dict[str, Path]:
    paths = Paths(home)
    return {
        "Critic": paths.critic("emo", "glove-t5"),
        "Retriever": paths.saved / "dpr" / "empd",
        "Generator": paths.saved / "glove-t5" / "exemplars",
    }


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


# ------------------------------------------------------------------------------------------------------ cards


@pytest.mark.parametrize("kind", ["Critic", "Retriever", "Generator"])
def test_the_snippet_of_a_card_runs_and_its_head_is_the_hubs(home, kind, monkeypatch):
    card = (runs_of(home)[kind] / "README.md").read_text(encoding="utf-8")
    head = front_matter(card)
    assert head["language"] == "en" and head["license"] in ("cc-by-nc-4.0", "other") and head["pipeline_tag"]
    (snippet,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(str(ROOT))
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(snippet, {})
    assert said.getvalue().strip()


def test_a_card_shows_the_command_without_places_on_this_machine(tmp_path):
    typed = (
        f"python {tmp_path}/code/train_t5.py --workdir {tmp_path} --emo={tmp_path}/saved/my\\ emo --lr 1e-4"
    )
    typed += " --model /mnt/models/t5-small --exp ../../home/me/exp --labels ours/labels"
    shown = "python code/train_t5.py --workdir . '--emo=saved/my emo' --lr 1e-4 --model t5-small --exp exp"
    assert cards.command_to_show(typed, Paths(tmp_path)) == f"{shown} --labels ours/labels"
    assert cards.command_to_show("unknown", Paths(tmp_path)) == "unknown"


def test_what_exemplars_were_found_by_is_known_of_a_run_from_the_hub(home, tmp_path):
    run = tmp_path / "run"
    Responder.from_pretrained(
        runs_of(home)["Generator"], session=Session("cpu"), workdir=home
    ).save_pretrained(run)
    assert exemplars.matched_by(run, Paths(home)) == "reply"
    config = json.loads((run / "config.json").read_text())
    assert config["match"] == "reply"
    (run / "config.json").write_text(json.dumps(config | {"match": "context"}))
    assert exemplars.matched_by(run, Paths(home)) == "context"


def test_a_critics_card_says_what_its_labels_mean_and_whose_terms_hold(home):
    emo = (runs_of(home)["Critic"] / "README.md").read_text(encoding="utf-8")
    assert "| 0 | no warmth or concern |" in emo and "| 1 | warmth or concern |" in emo
    assert front_matter(emo)["license"] == "other" and "academic, non-commercial" in emo
    assert "EmpatheticDialogues" not in emo  # taught by another critic it has read those, too
    taught = cards.licence("Critic", "emo", ["pairs train", "dialogues train", "teacher"], str(home))
    assert taught[0] == "other" and "CC BY-NC 4.0" in taught[1]
    found = {name: cards.licence("Retriever", "", [], str(home), name) for name in DATASETS}
    assert found["empd"] == cards.DIALOGUES and found["reddit"] == cards.PAIRS
    assert found["empd-reddit"] == taught
    sentiment = (Paths(home).critic("sentiment", "t5") / "README.md").read_text(encoding="utf-8")
    assert "from -1 (negative) to 1 (positive)" in sentiment
    assert front_matter(sentiment)["license"] == "cc-by-nc-4.0"


def test_a_card_names_the_model_on_the_hub_that_a_run_began_from(tmp_path):
    adapter = (bundled.ADAPTER / "README.md").read_text(encoding="utf-8")
    assert front_matter(adapter)["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    for given, base in (
        ({"encoder": "minilm"}, "sentence-transformers/all-MiniLM-L6-v2"),
        ({"model": "x"}, None),
    ):
        head = cards.front_matter("Retriever", "mit", cards.base_model("Retriever", tmp_path, given))
        assert front_matter(head + "\n").get("base_model") == base
    for name, place in (("model", "them/t5@v1"), ("model", "t5-base"), ("base", "them/lm@v1")):
        noted = {"path": place, "sha256": "a" * 64 if name == "base" else place, "revision": COMMIT}
        (tmp_path / "sources.json").write_text(json.dumps({name: noted}), encoding="utf-8")
        assert cards.base_model("Generator", tmp_path, {"model": place}) == place.removesuffix("@v1")
    found_with = {"question encoder": {"path": "them/dpr", "sha256": "them/dpr"}}
    (tmp_path / "sources.json").write_text(json.dumps(found_with), encoding="utf-8")
    assert cards.base_model("Retriever", tmp_path, {}) == "them/dpr"
    assert cards.base_model("Generator", tmp_path, {}) is None  # its exemplars were found with it


def test_no_config_of_a_run_holds_a_place_on_this_machine(home):
    files = [f for f in (home / "saved").rglob("*.json") if "config" in f.name or f.name == "modules.json"]
    assert len(files) > 20
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert str(home.parent.parent) not in text and not re.search(r'"/[a-z]+/', text), file


# ------------------------------------------------------------------------------------------------ two threads


def test_two_threads_get_the_replies_that_one_gets(home):
    runs = runs_of(home)
    short = Decoding(20, 0.9, 8)
    responder = Responder.from_pretrained(
        runs["Generator"],
        {"emo": runs["Critic"]},
        runs["Retriever"],
        REPLIES,
        Session("cpu"),
        home,
        decoding=short,
    )

    def ask(seed: int) -> tuple:
        answer = responder.reply([f"{SAID[0]} {seed}"], n_candidates=2, seed=seed)
        return answer.reply, [h.place for h in answer.exemplars], [c.total for c in answer.candidates]

    alone = [ask(seed) for seed in range(4)]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(ask, range(4))) == alone


# ------------------------------------------------------------------------------------------- a hub of our own


class Hub(http.server.BaseHTTPRequestHandler):
    """The few routes of the hub that pushing and loading need; keeps what is committed, file by file."""

    repos: dict[str, dict[str, bytes]]  # of one server
    asked: list[str]
    private: list[bool]

    def log_message(self, *_):
        pass

    def answer(self, content: bytes, kind: str = "application/json", status: int = 200, **headers: str):
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"]))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def do_POST(self):
        said, place = self.body(), self.path
        self.asked.append(f"POST {place}")
        if place == "/api/repos/create":
            made = json.loads(said)
            self.private.append(made.get("private") or made.get("visibility") == "private")
            name = f"{made['organization']}/{made['name']}"
            self.repos.setdefault(name, {})
            return self.answer(
                json.dumps({"url": f"http://{self.headers['Host']}/{name}", "id": name}).encode()
            )
        if place.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(said)["files"]
            ]
            return self.answer(json.dumps({"files": files}).encode())
        if place.endswith("/commit/main"):
            for line in map(json.loads, said.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    name = place.removeprefix("/api/models/").removesuffix("/commit/main")
                    self.repos[name][line["value"]["path"]] = content
            return self.answer(json.dumps({"commitUrl": f"{name}/commit/1", "commitOid": COMMIT}).encode())
        return self.answer(b'{"errors": [], "warnings": []}')  # of a card's head

    def do_GET(self):
        self.asked.append(f"{self.command} {self.path}")
        place = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        if found := re.fullmatch(r"/api/models/(.+?)/(revision|tree)/.+", place):
            if (files := self.repos.get(found[1])) is not None:
                tree = [
                    {"type": "file", "path": name, "oid": COMMIT, "size": len(content)}
                    for name, content in files.items()
                ]
                known = {"id": found[1], "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
                return self.answer(json.dumps(tree if found[2] == "tree" else known).encode())
        elif found := re.fullmatch(r"/(.+?/.+?)/resolve/[^/]+/(.+)", place):
            content = self.repos.get(found[1], {}).get(found[2])
            if content is not None:
                etag = hashlib.sha1(content).hexdigest()
                return self.answer(
                    content, "application/octet-stream", X_Repo_Commit=COMMIT, ETag=f'"{etag}"'
                )
            return self.answer(b"", status=404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        return self.answer(b"", status=404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    """A hub on this machine, and a cache of its own."""
    kind = type("OurHub", (Hub,), {"repos": {}, "asked": [], "private": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    constants = huggingface_hub.constants
    ours = f"http://127.0.0.1:{server.server_port}"
    for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"):
        monkeypatch.setattr(constants, name, getattr(constants, name).replace("https://huggingface.co", ours))
    shared = getattr(transformers_hub, "hf_api", lambda: None)()  # newer transformers have one of their own
    for api in filter(None, (huggingface_hub.hf_api.api, shared)):
        monkeypatch.setattr(api, "endpoint", ours)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()
    yield kind
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()


def test_what_is_pushed_comes_back_by_its_name_and_answers_the_same(home, fake_hub, monkeypatch):
    session = Session("cpu")
    runs = runs_of(home)
    critic = Critic.from_pretrained(str(runs["Critic"]), session)
    retriever = Retriever.from_pretrained(str(runs["Retriever"]), session)
    responder = Responder.from_pretrained(str(runs["Generator"]), session=session, workdir=home)
    for name, made in (("critic", critic), ("retriever", retriever), ("generator", responder)):
        assert made.push_to_hub(f"me/{name}", token="a token").endswith("/commit/1")
    assert fake_hub.private == [True] * 3

    again = Critic.from_pretrained("me/critic", session)
    assert again.score(REPLIES) == critic.score(REPLIES) and again.guesses == critic.guesses
    found = Retriever.from_pretrained("me/retriever", session)
    assert found.search(SAID, REPLIES, 2) == retriever.search(SAID, REPLIES, 2)
    both = [
        Responder.from_pretrained(run, {"emo": "me/critic"}, "me/retriever", REPLIES, session, home)
        for run in ("me/generator", str(runs["Generator"]))
    ]
    assert both[0].reply(SAID, seed=1) == both[1].reply(SAID, seed=1)

    # the scripts take the same names
    words = ["--workdir", str(home), "--device", "cpu", "--family", "glove-t5"]
    (said,) = score.main([*words, "--emo", "me/critic", REPLIES[0]])
    assert said["critic_emo_expected"] == pytest.approx(critic.score(REPLIES[:1])[0].value, abs=1e-4)
    by_name = searching.find_retriever(Paths(home), "me/retriever", session)
    assert by_name.search(SAID, REPLIES, 2) == found.search(SAID, REPLIES, 2)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    before = len(fake_hub.asked)
    assert Retriever.from_pretrained("me/retriever", session).search(SAID, REPLIES, 1)
    assert len(fake_hub.asked) == before


def test_nothing_but_weights_settings_words_and_the_card_is_published(home, tmp_path):
    run = runs_of(home)["Retriever"]
    Retriever.from_pretrained(run, Session("cpu")).save_pretrained(tmp_path / "out")
    there = {str(f.relative_to(tmp_path / "out")) for f in (tmp_path / "out").rglob("*") if f.is_file()}
    assert {Path(name).suffix for name in there} == {".safetensors", ".json", ".md"}
    assert {"README.md", "question_encoder/modules.json", "context_encoder/0_BERT/config.json"} <= there
    for side in ("question", "context"):  # what sentence-transformers compares them by
        assert f"{side}_encoder/config_sentence_transformers.json" in there
    assert not {"args.json", "environment.json", "sources.json", "metrics.jsonl"} & there
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "args.json" in (run / "README.md").read_text(encoding="utf-8")
    assert not {"args.json", "environment.json", "metrics.jsonl"} & {*re.findall(r"[a-z_]+\.jsonl?", card)}
    assert f", torch {version('torch')}" in card  # as installed: without +cu130
    for name in there - {"config.json", "README.md"}:  # as they were checked
        first, second = (hashlib.sha256((f / name).read_bytes()).digest() for f in (run, tmp_path / "out"))
        assert first == second
    with pytest.raises(UserError, match="not empty, so it is left alone"):
        Retriever.from_pretrained(run, Session("cpu")).save_pretrained(tmp_path / "out")


def test_a_name_that_nobody_has_is_one_error_without_the_network(tmp_path, monkeypatch):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(UserError, match="me/nothing: no such folder here, and not to be had from the hub"):
        Critic.from_pretrained("me/nothing")
    with pytest.raises(UserError, match="not loaded from a run"):
        hub.Published().push_to_hub("me/x")
    (tmp_path / "saved").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="saved/nothing: no such folder; give that of a trained critic"):
        Critic.from_pretrained("saved/nothing")  # a slip of the pen: no hub is asked


# ------------------------------------------------------------------------------------ sentence-transformers


@pytest.mark.parametrize("side", ["question", "context"])
def test_a_side_is_a_bert_and_a_pooling_for_sentence_transformers(home, side):
    folder = runs_of(home)["Retriever"] / f"{side}_encoder"
    retriever = Retriever.from_pretrained(folder.parent, Session("cpu"))
    most = retriever.encoders.lengths[side]
    texts = [" ".join(REPLIES), "Oh?", " ".join(f"{word} and" for word in " ".join(REPLIES * 20).split())]
    ours = retriever.encoders.embed(side, texts, retriever.session, "test")

    modules = json.loads((folder / "modules.json").read_text())
    assert [m["path"] for m in modules] == ["0_BERT", "1_Pooling"]
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    assert pooling["pooling_mode_cls_token"] and not pooling["pooling_mode_mean_tokens"]
    how = json.loads((folder / "0_BERT" / "sentence_bert_config.json").read_text())
    assert how["max_seq_length"] == most
    bert, info = AutoModel.from_pretrained(folder / "0_BERT", output_loading_info=True, **how["model_args"])
    assert not info["missing_keys"] and not info["unexpected_keys"]
    words = AutoTokenizer.from_pretrained(folder / "0_BERT")
    batch = words(texts, padding=True, truncation=True, max_length=most, return_tensors="pt")
    with torch.inference_mode():
        theirs = bert.eval()(**batch).last_hidden_state[:, 0]
    np.testing.assert_allclose(theirs.numpy(), ours, atol=1e-5)

    package = pytest.importorskip("sentence_transformers")
    loaded = package.SentenceTransformer(str(folder), device="cpu")
    np.testing.assert_allclose(loaded.encode(texts), ours, atol=1e-5)


# ------------------------------------------------------------------------------------------- others' models


@pytest.fixture
def encoder_of(prepared, fake_hub):
    """Puts the tiny BERT on the hub under a name, with a pooling file of this content beside it, if any."""

    def put(name: str, pooling: dict | None) -> str:
        files = (prepared / "data" / "bert-tiny").iterdir()
        fake_hub.repos[name] = {file.name: file.read_bytes() for file in files}
        if pooling is not None:
            fake_hub.repos[name]["1_Pooling/config.json"] = json.dumps(pooling).encode()
        return name

    return put


@pytest.mark.parametrize(
    ("pooling", "way"),
    [
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode_cls_token": True}, "cls"),
        (None, "cls"),
    ],
)
def test_an_encoder_on_the_hub_pools_as_it_was_trained(encoder_of, pooling, way):
    name = encoder_of("them/encoder", pooling)
    found = Retriever.from_pretrained(encoder=name, session=Session("cpu"), max_length=12)
    assert found.encoders.origin["pooling"] == way
    assert found.encoders.sides["question"][0].config.pooling == way


@pytest.mark.parametrize(
    "pooling", [{"pooling_mode_max_tokens": True}, {"pooling_mode": ["mean", "lasttoken"]}]
)
def test_an_encoder_that_pools_as_nothing_here_does_is_refused(encoder_of, pooling):
    name = encoder_of("them/encoder", pooling)
    with pytest.raises(UserError, match=r"them/encoder: vectors made by .*cls and mean.*--pooling"):
        Retriever.from_pretrained(encoder=name, session=Session("cpu"))
    told = Retriever.from_pretrained(encoder=name, pooling="mean", session=Session("cpu"), max_length=12)
    assert told.encoders.origin["pooling"] == "mean"


@pytest.mark.parametrize("layer", ["Dense", "LayerNorm"])
def test_an_encoder_with_one_more_layer_is_refused(encoder_of, fake_hub, layer):
    name = encoder_of("them/encoder", {"pooling_mode_mean_tokens": True})
    kinds = ("Transformer", "Pooling", layer, "Normalize")
    modules = [{"type": f"sentence_transformers.models.{kind}"} for kind in kinds]
    fake_hub.repos[name]["modules.json"] = json.dumps(modules).encode()
    with pytest.raises(UserError, match=rf"them/encoder: .*mean and one more layer, {layer} .*--pooling"):
        Retriever.from_pretrained(encoder=name, session=Session("cpu"))
    told = Retriever.from_pretrained(encoder=name, pooling="mean", session=Session("cpu"), max_length=12)
    assert told.encoders.origin["pooling"] == "mean"


@pytest.mark.parametrize("content", ["{}", '["Dense"]', '[{"idx": 0}]', "null", "{"])
def test_a_list_of_modules_of_another_shape_is_an_error_that_names_it(encoder_of, fake_hub, content):
    name = encoder_of("them/encoder", {"pooling_mode_mean_tokens": True})
    fake_hub.repos[name]["modules.json"] = content.encode()
    with pytest.raises(UserError, match=r"modules\.json: "):
        Retriever.from_pretrained(encoder=name, session=Session("cpu"))


def test_a_model_of_the_hub_is_noted_with_its_revision_and_can_be_pinned(encoder_of, fake_hub):
    name = encoder_of("them/encoder", None)
    found = Retriever.from_pretrained(encoder=f"{name}@v1", session=Session("cpu"), max_length=12)
    pinned = {"path": f"{name}@v1", "sha256": f"{name}@v1", "revision": COMMIT}
    assert found.encoders.origin["question"] == pinned
    # transformers 5.17 asks for an adapter without the revision
    files = [p for p in fake_hub.asked if "/resolve/" in p and not p.endswith("adapter_config.json")]
    assert files and all("/resolve/v1/" in place or f"/resolve/{COMMIT}/" in place for place in files)


def test_a_folder_has_no_revision(prepared):
    with pytest.raises(UserError, match="bert-tiny is a folder here, which has no revisions; leave out @v1"):
        Retriever.from_pretrained(encoder=f"{prepared / 'data' / 'bert-tiny'}@v1", session=Session("cpu"))


def test_without_a_network_how_an_encoder_pools_is_known_or_asked_of_the_user(encoder_of, monkeypatch):
    def load(name: str, pooling: str | None = None) -> str:
        session = Session("cpu")
        found = Retriever.from_pretrained(encoder=name, pooling=pooling, session=session, max_length=12)
        return found.encoders.origin["pooling"]

    plain, other = encoder_of("them/plain", None), encoder_of("them/encoder", None)
    load(plain)  # the hub says that it has no such file
    load(other, "cls")  # it was not asked
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert load(plain) == "cls"
    with pytest.raises(UserError, match=r"them/encoder: no 1_Pooling/config.json .*--pooling cls or mean"):
        load(other)
    assert load(other, "mean") == "mean"


def test_a_critic_of_all_dimensions_has_the_terms_and_the_levels_of_each():
    terms = cards.licence(
        "Critic", "all", ["pairs emo train", "pairs exp train", "pairs int train"], "nowhere"
    )
    assert terms == cards.PAIRS
    shown = cards.labels({"kind": "all", "outputs": 5, "heads": {"emo": 2, "exp": 3}})
    rows = [line for line in shown.splitlines() if line.startswith(("| 0 |", "| 1 |", "| 2 |"))]
    assert len(rows) == 5 and "| 2 |" in rows[-1]


def test_of_a_run_with_checkpoints_left_none_is_published(tmp_path):
    for place in ("model.safetensors", "checkpoints/step-00000002/model.safetensors", ".end/config.json"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
    assert [file.as_posix() for file in published(tmp_path)] == ["model.safetensors"]


def test_how_to_push_arrives_at_the_hub(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(hub.Run, "push_to_hub", lambda self, name, **how: asked.append((name, how)))
    model = hub.Published()
    model.folder = tmp_path
    model.push_to_hub("me/run", branch="trial")
    assert asked == [("me/run", {"private": True, "branch": "trial"})]
