"""app.py's page in a headless Chromium, on tiny models; and the votes beneath it."""

import csv
import json
import shutil
import socket
import sqlite3
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest

import app
import bundled
import distress
import respond
import train_glove_t5
from conversation import RespondOptions
from options import UserError
from responder import Answer, Responder
from settings import pick
from votes import Shown, Votes

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
MISSING = [name for name in ("gradio", "playwright") if find_spec(name) is None]
MISSING += [] if CHROMIUM else ["chromium"]
in_browser = pytest.mark.skipif(
    bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (requirements-app.txt)"
)
POOL = ["I am so sorry.", "What happened then?", "That is great news, you must be proud of it!"]
LOST = "My dog ran away last night."
#: as HTML, as markdown and as two kinds of template it would not stay what it is
HTML = (
    '<b>bold</b> <img src=x onerror="document.title=1"> **stars** $x$ ${1+1} {{value}} '
    "<script>document.title=2</script>"
)


@pytest.fixture(scope="module")
def home(home, tmp_path_factory) -> Path:
    """A workdir with critics, a retriever and two short generators, one of which reads exemplars."""
    folder = tmp_path_factory.mktemp("app") / "work"
    shutil.copytree(home, folder)
    words = "--src-len 40 --tgt-len 12 --max-steps 2 --batch-size 4 --no-predict --size tiny --device cpu"
    words += " --empathy-loss-w 0 --sentiment-loss-w 0 --add-exemplars none"
    train_glove_t5.main(["--workdir", str(folder), *words.split()])
    return folder


# ------------------------------------------------------------------------------------------ without a browser


def test_a_vote_is_kept_whole_and_exported(tmp_path, capsys):
    votes = Votes(tmp_path / "results" / "votes.sqlite")
    sides = Shown("saved/one", "aa", 7, 'She said "no",\nand left.'), Shown("saved/two", "bb", 8, "Oh.")
    with pytest.raises(UserError, match="no votes yet; collect some with"):
        votes.export(tmp_path / "votes.csv", overwrite=False)
    assert votes.tally() == {} and not votes.file.exists()  # looking makes none
    assert {"time", "turns", "reply_a", "weights_b", "choice"} <= set(votes.table().columns)
    with pytest.raises(UserError, match="no votes yet; collect some with"):
        votes.export(tmp_path / "votes.csv", overwrite=False)
    assert [votes.add("v", ["Hi.", "Hello.", "Well"], *sides, choice) for choice in ("A", "both bad")] == [
        1,
        2,
    ]
    votes.add("v", ["Hi."], *sides[::-1], "B")
    assert votes.tally() == {("saved/one", "saved/two"): {"saved/one": 2, "both bad": 1}}
    with pytest.raises(SystemExit):
        app.main(["--workdir", str(tmp_path), "--export-votes", str(tmp_path / "votes.xlsx")])
    assert "--export-votes" in (said := capsys.readouterr().err) and "must end in .csv" in said
    app.main(["--workdir", str(tmp_path), "--export-votes", str(tmp_path / "votes.csv")])
    assert "3 votes" in capsys.readouterr().out
    with open(tmp_path / "votes.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert rows[0]["reply_a"] == sides[0].reply and rows[0]["run_b"] == "saved/two"
    assert json.loads(rows[1]["turns"]) == ["Hi.", "Hello.", "Well"] and rows[1]["choice"] == "both bad"
    assert (rows[2]["run_a"], rows[2]["seed_a"], rows[2]["weights_a"]) == ("saved/two", "8", "bb")
    with pytest.raises(UserError, match="already there.*--overwrite"):
        votes.export(tmp_path / "votes.csv", overwrite=False)
    with pytest.raises(UserError, match="readonly"), votes.opened(looking=True) as connection:
        connection.execute("DELETE FROM votes")  # looking needs no right to write
    with pytest.raises(ValueError, match="C: none of A, B"):
        votes.add("v", ["Hi."], *sides, "C")


def test_a_file_that_holds_no_votes_is_left_alone(tmp_path):
    (tmp_path / "a.sqlite").write_text("my notes, and a good deal of them " * 9)
    with pytest.raises(UserError, match="a.sqlite: the votes cannot be kept there"):
        Votes(tmp_path / "a.sqlite").table()
    with sqlite3.connect(tmp_path / "b.sqlite") as connection:
        connection.execute("PRAGMA user_version = 9")
    with pytest.raises(UserError, match="another version"):
        Votes(tmp_path / "b.sqlite").table()


def test_the_page_answers_as_the_terminal_does_where_nothing_is_asked_for():
    """Also where gradio is missing: a flag that respond.py gets and the page does not know stops it."""
    terminal, page = respond.parse_args(["hello"]), app.parse_args([])
    for name in app.FIXED:
        assert getattr(page, name) == (getattr(terminal, name) or app.FIXED[name])
    assert pick(RespondOptions, page).candidates_per_reply == terminal.candidates_per_reply


def test_without_gradio_one_line_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    monkeypatch.delitem(__import__("sys").modules, "chat_page", raising=False)
    with pytest.raises(UserError, match=r"gradio.*pip install -r requirements-app.txt") as error:
        app.main(["--workdir", str(tmp_path)])
    assert "\n" not in str(error.value)


class Says:
    """A responder that always says the same."""

    def __init__(self, text: str, unread: int = 0):
        self.text, self.unread = text, unread

    def reply(self, turns, *_, **__) -> Answer:
        return Answer(self.text, [], [], self.unread, None, 1)


@pytest.mark.skipif(find_spec("gradio") is None, reason="not installed: gradio (requirements-app.txt)")
def test_which_run_stands_first_is_drawn_anew_and_named_nowhere(tmp_path):
    from pair_tab import PairTab, System

    systems = []
    for name in ("saved/one", "saved/two"):
        (tmp_path / name).mkdir(parents=True)
        systems.append(System(name, tmp_path / name, Says(f"as {name[-3:]} says")))
    options = pick(RespondOptions, app.parse_args(["--seed", "1"]))
    tab, first = PairTab(systems, options, Votes(tmp_path / "votes.sqlite")), set()
    for _ in range(40):
        *_, (pair, *seen) = tab.ask(None, "Hi")
        assert f"A</strong>{pair.shown[0][1].reply}" in seen[3] and "saved/" not in str(seen)
        first.add(pair.shown[0][0].name)
    assert first == {"saved/one", "saved/two"}


@pytest.mark.skipif(find_spec("gradio") is None, reason="not installed: gradio (requirements-app.txt)")
def test_what_did_not_reach_a_run_is_said_beside_two_replies_without_its_letter(tmp_path):
    from pair_tab import PairTab, System

    systems = []
    for name, unread in (("saved/one", 2), ("saved/two", 0)):
        (tmp_path / name).mkdir(parents=True)
        systems.append(System(name, tmp_path / name, Says(f"as {name[-3:]} says", unread)))
    options = pick(RespondOptions, app.parse_args(["--seed", "1"]))
    *_, (_, *seen) = PairTab(systems, options, Votes(tmp_path / "votes.sqlite")).ask(None, "Hi")
    assert "The dialogue is long; its oldest 2 turns were left out or cut." in seen[-1]


def test_words_that_a_run_does_not_know_are_named_in_few_letters():
    [note] = Answer("so", [], [], 0, None, 1, ("y" * 9000, "blorp")).notes
    assert "blorp" in note and len(note) < 120


# --------------------------------------------------------------------------------------------- in the browser


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def serve(browser, home):
    """serve(*flags): the address of app.py's page with these flags, served in this process."""
    import gradio

    served = []

    def start(*flags: str) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gradio.Blocks, "block_thread", lambda blocks: served.append(blocks))
            app.main(["--workdir", str(home), "--device", "cpu", "--port", str(port), *flags])
        return f"http://127.0.0.1:{port}"

    yield start
    for blocks in served:
        blocks.close()


@pytest.fixture(scope="module")
def both(serve, home) -> str:
    """A page with exemplars, and a second run beside it, under a fixed seed."""
    runs = home / "saved" / "glove-t5"
    (home / "pool.txt").write_text("\n".join(POOL))
    flags = ["--model", runs / "exemplars", "--other", runs / "plain", "--pool", home / "pool.txt"]
    return serve(*map(str, flags), "--seed", "4")


@pytest.mark.skipif("gradio" in MISSING, reason="gradio is not installed (requirements-app.txt)")
def test_a_port_that_is_taken_is_named_before_anything_is_loaded(home, monkeypatch, capsys):
    monkeypatch.setattr("chat_page.open_system", lambda *_: pytest.fail("loaded first"))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(UserError, match=f"--port {other.getsockname()[1]}: cannot be used .*in use"):
            app.main(["--workdir", str(home), "--port", str(other.getsockname()[1]), "--device", "cpu"])


class Visitor:
    """Somebody at the page. What is asked of `wait` comes about within a minute."""

    def __init__(self, browser, address: str):
        self.page = browser.new_page(viewport={"width": 1200, "height": 900})
        self.page.set_default_timeout(60_000)
        self.requests: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(address)
        self.page.wait_for_selector("#talk-message textarea")

    def text(self, place: str) -> str:
        return self.page.inner_text(place)

    def turns(self, tab: str = "talk") -> list[str]:
        return self.page.locator(
            f"#{tab}-chat .speaker, #{tab}-chat .listener:not(.waiting)"
        ).all_inner_texts()

    def wait_for_turns(self, count: int, tab: str = "talk") -> list[str]:
        said = f"#{tab}-chat .dialogue"
        script = f"""document.querySelectorAll("{said} p:not(.quiet):not(.waiting)").length == {count}
            && !document.querySelector("{said} .waiting")"""
        self.page.wait_for_function(script)
        return self.turns(tab)

    def wait_for(self, place: str, text: str) -> None:
        self.page.locator(place, has_text=text).wait_for()

    def send(self, text: str, tab: str = "talk") -> None:
        self.page.fill(f"#{tab}-message textarea", text)
        self.page.click(f"#{tab}-send")

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()

    def fits_a_phone(self) -> bool:
        """Whether nothing has to be moved sideways on a phone's width."""
        self.page.set_viewport_size({"width": 390, "height": 844})
        fits = self.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        self.page.set_viewport_size({"width": 1200, "height": 900})
        return fits

    def saved(self, name: str) -> str:
        with self.page.expect_download() as found:
            self.press(name)
        return Path(found.value.path()).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def visitor(browser, both) -> Visitor:
    return Visitor(browser, both)


@pytest.fixture
def somebody(visitor) -> Visitor:
    """At the page with two runs, at the beginning of a conversation. One page for all: it takes long to
    load."""
    visitor.press("Reset")
    visitor.wait_for_turns(0)
    return visitor


@in_browser
def test_a_message_gets_a_reply_with_its_exemplars_and_a_bar_for_each_level(somebody, home):
    somebody.send(LOST)
    turns = somebody.wait_for_turns(2)
    assert turns[0] == LOST and turns[1]
    assert somebody.page.input_value("#talk-message textarea") == ""
    shown = somebody.page.locator("#exemplars .text").all_inner_texts()
    assert sorted(shown) == sorted(POOL)
    scores = [float(t) for t in somebody.page.locator("#exemplars .score").all_inner_texts()]
    assert scores == sorted(scores, reverse=True)
    bars = somebody.page.locator("#levels .level")
    assert [t.split("\n")[0] for t in bars.all_inner_texts()] == [
        "Emotional reaction",
        "Exploration",
        "Interpretation",
        "Sentiment",
    ]
    asked = [url for url in somebody.requests if not url.startswith(("data:", "blob:"))]
    assert asked and all("//127.0.0.1:" in url for url in asked)  # no fonts or scripts from elsewhere
    assert somebody.text("body").count("English only") == 1

    somebody.press("Undo")
    somebody.wait_for_turns(0)
    for name in ("Save as JSON", "Save as markdown"):  # no file of nothing
        somebody.press(name)
        somebody.page.get_by_text("Nothing to save yet").first.wait_for()
    somebody.send(LOST)
    turns = somebody.wait_for_turns(2)
    row = json.loads(somebody.saved("Save as JSON"))
    assert row["turns"] == turns and row["answers"][0]["reply"] == turns[1]
    assert f"**You:** {LOST}" in somebody.saved("Save as markdown")


@in_browser
def test_a_conversation_is_tried_again_taken_back_and_begun_anew(somebody):
    example = "I finally passed my driving test on the fourth try!"
    somebody.page.get_by_text(example).click()
    filled = "text => document.querySelector('#talk-message textarea').value == text"
    somebody.page.wait_for_function(filled, arg=example)
    somebody.press("Retry")
    somebody.wait_for("#note", "write something first")
    somebody.send(LOST)
    first = somebody.wait_for_turns(2)
    somebody.press("Retry")
    somebody.page.wait_for_function(
        "old => ![old, '\u2026'].includes(document.querySelector('#talk-chat .listener')?.innerText)",
        arg=first[1],
    )
    again = somebody.wait_for_turns(2)
    assert again[0] == LOST and again[1] != first[1]
    somebody.send("We looked at the lake.")
    assert somebody.wait_for_turns(4)[:2] == again
    somebody.press("Undo")
    assert somebody.wait_for_turns(2) == again
    assert somebody.page.input_value("#talk-message textarea") == "We looked at the lake."
    somebody.press("Reset")
    somebody.wait_for_turns(0)
    somebody.send(LOST)
    assert somebody.wait_for_turns(2) == first  # the seed's


@in_browser
def test_an_aim_changes_the_reply_under_a_fixed_seed(somebody):
    found = {}
    for end in ("Home", "End"):
        somebody.press("Reset")
        somebody.wait_for_turns(0)
        slider = somebody.page.locator("#aim-sentiment input[type=range]")
        slider.focus()
        slider.press(end)
        somebody.page.locator("input[type=checkbox]:checked").wait_for()
        somebody.send(LOST)
        found[end] = somebody.wait_for_turns(2)[1]
        value = somebody.text("#levels [data-kind=sentiment] .head span:last-child").split()[-1]
        found[end] = (found[end], float(value))
    somebody.page.locator("input[type=checkbox]").uncheck()
    assert found["Home"][0] != found["End"][0] and found["Home"][1] < found["End"][1]


@in_browser
def test_empty_long_and_dangerous_messages(somebody):
    somebody.send("  \n ")
    somebody.wait_for("#note", "Write something first")
    assert somebody.turns() == []
    somebody.send(HTML)
    assert somebody.wait_for_turns(2)[0] == HTML
    assert somebody.page.title() == "Empathetic replies"
    assert somebody.page.locator("#talk-chat b, #talk-chat img, #talk-chat script").count() == 0
    somebody.send("sorry " * 833 + "no")
    assert len(somebody.wait_for_turns(4)[2]) == 5000
    somebody.wait_for("#note", "left out or cut")
    assert somebody.fits_a_phone()


@in_browser
def test_the_notice_stands_before_anything_is_written(somebody, monkeypatch):
    writing, real = threading.Event(), Responder.reply

    def slow(*args, **settings):
        assert writing.wait(60)
        return real(*args, **settings)

    monkeypatch.setattr(Responder, "reply", slow)
    somebody.send("I want to kill myself.")
    somebody.wait_for("#notice", distress.NOTICE)
    assert somebody.turns() == ["I want to kill myself."]
    writing.set()
    somebody.wait_for_turns(2)
    assert somebody.text("#notice") == distress.NOTICE


@in_browser
@pytest.mark.parametrize("tab, title", [("talk", "Conversation"), ("pair", "Side by side")])
def test_what_is_typed_while_a_reply_is_written_stays_and_is_not_sent(somebody, monkeypatch, tab, title):
    writing, real = threading.Event(), Responder.reply

    def slow(*args, **settings):
        assert writing.wait(60)
        return real(*args, **settings)

    monkeypatch.setattr(Responder, "reply", slow)
    somebody.page.get_by_role("tab", name=title).click()
    box = f"#{tab}-message textarea"
    somebody.send(LOST, tab)
    somebody.wait_for(f"#{tab}-chat .waiting", "…")
    somebody.page.fill(box, "We looked at the lake.")
    somebody.page.press(box, "Enter")  # another way than the button that is pending
    writing.set()
    somebody.page.wait_for_function(f"!document.querySelector('#{tab}-chat .waiting')")
    if tab == "talk":
        assert somebody.wait_for_turns(2)[0] == LOST
        somebody.press("Reset")
        somebody.wait_for_turns(0)
        somebody.press("Retry")
        somebody.wait_for("#note", "write something first")
    else:
        somebody.wait_for("#reply-b", "B")
        somebody.press("New dialogue")
        somebody.wait_for_turns(0, "pair")
    assert somebody.page.input_value(box) == "We looked at the lake."
    somebody.page.get_by_role("tab", name="Conversation").click()


@in_browser
def test_a_vote_on_two_replies_is_kept_with_what_was_shown(somebody, home):
    somebody.page.get_by_role("tab", name="Side by side").click()
    somebody.send(HTML, "pair")
    somebody.wait_for("#reply-b", "B")
    assert somebody.fits_a_phone()
    shown = [somebody.page.inner_text(f"#reply-{side} .reply").split("\n", 1)[1] for side in "ab"]
    somebody.send("more", "pair")
    somebody.wait_for("#pair-note", "vote on these two replies first")
    assert "exemplars" not in somebody.text("#pair-chat") + "".join(shown)
    somebody.press("B")
    somebody.wait_for("#pair-note", "Vote 1 is kept: B")
    assert somebody.wait_for_turns(2, "pair") == [HTML, shown[1]]  # it goes on with the better one
    with sqlite3.connect(home / "results" / "votes.sqlite") as connection:
        (row,) = connection.execute("SELECT turns, reply_a, reply_b, choice, run_a, run_b FROM votes")
    assert json.loads(row[0]) == [HTML] and list(row[1:3]) == shown and row[3] == "B"
    assert set(row[4:]) == {"saved/glove-t5/exemplars", "saved/glove-t5/plain"}
    (exported,) = csv.DictReader(somebody.saved("Save as csv").splitlines())
    assert exported["choice"] == "B" and exported["run_b"] == row[5]
    somebody.press("Count the votes")
    somebody.wait_for("#count", "tie")
    somebody.page.get_by_role("tab", name="Conversation").click()


@in_browser
def test_without_critics_and_exemplars_the_page_says_what_is_missing(
    browser, serve, home, tmp_path, monkeypatch
):
    monkeypatch.setattr(bundled, "MINI", tmp_path / "none")
    shutil.copytree(home / "saved" / "glove-t5" / "exemplars", tmp_path / "run")
    somebody = Visitor(browser, serve("--workdir", str(tmp_path), "--model", str(tmp_path / "run")))
    assert "train_sentiment_regressor.py" in somebody.text("#levels")
    assert "--pool FILE" in somebody.text("#exemplars")
    assert somebody.page.locator("#aim-emo input").first.is_disabled()
    assert somebody.page.get_by_role("tab").count() == 0
    somebody.send(LOST)
    assert somebody.wait_for_turns(2)[0] == LOST
