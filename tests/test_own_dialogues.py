"""People's own dialogues become a corpus: roles, joined turns, a split, and every later stage."""

import json
import shlex
from pathlib import Path

import pytest
from conftest import ROOT, SAMPLE
from test_causal_models import make_tokenizer, save_llama

import dpr_exemplar_retriever
import evaluate_responses
import label_dialogues
import own_dialogues
import prepare_data
import preparing
import recipes
import train_causal_lm
import train_glove_t5
from corpora import listener_turns, read_dialogues
from options import SPLITS, Paths, UserError
from own_dialogues import convert, draw_splits, read_all
from settings import pick
from turns import cast

MAINS = {
    "prepare_data.py": prepare_data.main,
    "dpr_exemplar_retriever.py": dpr_exemplar_retriever.main,
    "label_dialogues.py": label_dialogues.main,
    "train_glove_t5.py": train_glove_t5.main,
    "train_causal_lm.py": train_causal_lm.main,
    "evaluate_responses.py": evaluate_responses.main,
}
TALK = [("Ann", "Hello."), ("Ann", "My cat, Tom, is ill."), ("Bob", 'Oh "no"!'), ("Ann", "He sleeps.")]


def jsonl(file: Path, *dialogues, **fields) -> Path:
    """Each dialogue a list of (speaker, text)."""
    lines = []
    for turns in dialogues:
        said = [{"speaker": speaker, "text": text} for speaker, text in turns]
        lines.append(json.dumps({"turns": said, **fields}) + "\n")
    file.write_text("".join(lines), encoding="utf-8")
    return file


def converted(files: list[Path], folder: Path, listener: str | None = None, seed: int = 42) -> dict:
    folder.mkdir(exist_ok=True)
    return own_dialogues.convert(files, folder, listener, seed)


def all_rows(folder: Path) -> dict[str, list[str]]:
    """{conversation: its turns} of all splits."""
    found = {}
    for split in SPLITS:
        for name, turns in read_dialogues(folder / f"{split}.csv").groupby("conv_id"):
            found[name] = turns["utterance"].tolist()
    return found


def test_turns_of_one_person_are_joined_and_the_first_to_speak_is_the_speaker(tmp_path, capsys):
    file = jsonl(tmp_path / "a.jsonl", *[TALK] * 3)
    converted([file], tmp_path / "out")
    turns = ["Hello. My cat, Tom, is ill.", 'Oh "no"!', "He sleeps."]
    assert all_rows(tmp_path / "out") == {f"a:{n}": turns for n in (1, 2, 3)}
    assert "3 with consecutive turns of one person: 3 joined" in capsys.readouterr().out


def test_a_named_listener_answers_and_its_first_turn_is_left_out(tmp_path, capsys):
    file = jsonl(tmp_path / "a.jsonl", *[[("Bob", "Yes?"), *TALK, ("Bob", "Poor Tom.")]] * 3)
    converted([file], tmp_path / "out", listener="Bob")
    assert all_rows(tmp_path / "out")["a:1"] == [
        "Hello. My cat, Tom, is ill.",
        'Oh "no"!',
        "He sleeps.",
        "Poor Tom.",
    ]
    assert "3 where the listener begins: that turn left out" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"a.jsonl, line 1: nobody is called 'Eva' \(--listener\); Bob, Ann"):
        converted([file], tmp_path / "out", listener="Eva")


def test_a_csv_a_chat_export_and_plain_turns_give_the_same_corpus(tmp_path):
    rows, chats, plain = ["Dialogue_ID\tRole\tUtterance"], [], []
    for n in range(3):
        talk = [("user", f"Hello {n}, you."), ("assistant", 'Oh "no"!'), ("user", "Yes.")]
        rows += [f'{n}\t{speaker}\t"{text.replace(chr(34), chr(34) * 2)}"' for speaker, text in talk]
        messages = [{"role": speaker, "content": text} for speaker, text in talk]
        chats.append(json.dumps({"conversation_id": n, "messages": messages}))
        plain.append(json.dumps({"id": n, "turns": [text for _, text in talk]}))
    found = []
    for name, lines in (("a.tsv", rows), ("b.jsonl", chats), ("c.jsonl", plain)):
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        converted([tmp_path / name], tmp_path / "out")
        found.append({s: (tmp_path / "out" / f"{s}.csv").read_text() for s in SPLITS})
    assert found[0] == found[1] == found[2]
    assert '"Hello 0, you."' in "".join(found[0].values())


def different(count: int) -> list[tuple[str, ...]]:
    return [(str(n), "yes") for n in range(count)]


def test_a_split_is_drawn_by_dialogue_from_the_seed_with_one_each_at_least(tmp_path):
    assert sorted(own_dialogues.draw_splits(different(3), 0)) == ["test", "train", "valid"]
    drawn = own_dialogues.draw_splits(different(40), 7)
    assert [drawn.count(s) for s in SPLITS] == [32, 4, 4]
    assert drawn == own_dialogues.draw_splits(different(40), 7) != own_dialogues.draw_splits(different(40), 8)


def test_files_that_only_their_endings_tell_apart_keep_their_own_dialogues(tmp_path):
    files = [tmp_path / "chats.csv", jsonl(tmp_path / "chats.jsonl", TALK, id=1)]
    files[0].write_text("id,speaker,text\n1,a,One.\n1,b,Two.\n2,a,Three.\n2,b,Four.\n")
    converted(files, tmp_path / "out")
    found = all_rows(tmp_path / "out")
    assert found["chats.csv:1"] == ["One.", "Two."] != found["chats.jsonl:1"]


def test_files_named_by_their_split_keep_it(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("train", "dev", "test"):
        jsonl(source / f"{name}.jsonl", TALK, emotion="Sad")
    said = converted(own_dialogues.files_in(source), tmp_path / "out")
    assert said["split"] == "as given" and said["emotions"]
    assert [e.conv_id for e in listener_turns(tmp_path / "out" / "valid.csv")] == ["dev:dev:1"]
    assert listener_turns(tmp_path / "out" / "test.csv")[0].emotion == "sad"


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.csv", "id,who,text\n1,a,b\n", "line 1: no column for the speaker: name it one of speaker"),
        (
            "a.csv",
            "id,who,said\n1,a,b\n",
            "no column for the speaker: name it one of .*no column for the text: name it one of .*id, who",
        ),
        (
            "a.csv",
            "id,speaker,Text,text\n1,a,b,c\n1,b,c,d\n",
            r"line 1: columns have one name but for its capitals \(Text, text\), .* rename one",
        ),
        (
            "a.csv",
            "id,speaker,text\n1,a,b\n2,a,b\n1,b,c\n",
            "line 4: conversation 1 was there already .*another id",
        ),
        (
            "a.csv",
            "id,turn_idx,speaker,text\n1,2,a,b\n1,1,b,c\n",
            "line 3: turn 1 after turn 2; sort the turns",
        ),
        ("a.csv", "id,speaker,text\n1,a,\n", "line 2: its text is empty; fill it in, or leave the turn out"),
        ("a.jsonl", '{"turns": [{"who": "a", "text": "\\u200b"}]}', "line 1, turn 1: no speaker; it stands"),
        ("a.jsonl", '{"turns": ["Hi", "\\u200b"]}', "line 1, turn 2: its text is empty"),
        (
            "a.jsonl",
            '{"turns": [{"speaker": "a", "text": "Hi"}, {"speaker": "b", "text": NaN}]}',
            "line 1, turn 2: its text is empty; fill it in",
        ),
        ("a.csv", f"id,speaker,text\n1,a,{'a' * 60_000}\n1,a,{'b' * 60_000}\n1,b,c\n", "120,001 characters"),
        ("a.csv", "id,speaker,text,emotion\n1,a,b,sad\n1,b,c,proud\n", "line 3: emotion 'proud' in a"),
        ("a.jsonl", '{"turns": [["a", "b"]]}\n', "line 1, turn 1: expected"),
        ("a.jsonl", '{"turns": ["a"], "id": 1}\n\n{"turns": ["b"], "id": 1}\n', "line 3: conversation 1 was"),
        ("a.jsonl", '{"lines": []}\n', "line 1: no list of turns; .*found: lines"),
        ("a.jsonl", '{"turns": []}\n', "line 1: its list of turns is empty; leave the dialogue out"),
        (
            "a.tsv",
            "id\tspeaker\ttext\n1\ta\tb\tc\n",
            'line 2: 4 columns, expected 3; put texts with tabs in "',
        ),
        ("a.jsonl", '{"turns": ["a", "b"], "emotion": "hungry"}\n', "line 1: unknown emotion 'hungry'"),
        ("a.jsonl", '{"turns": ["a", "b"], "split": "eval"}\n', "line 1: unknown split 'eval'"),
        ("a.jsonl", '{"turns": ["a", "b"]}\n' * 2, "2 dialogues with a reply"),
        ("a.jsonl", '{"turns": ["a"]}\n' * 3, "no dialogue has a reply"),
        ("a.txt", "hello\n", "ends in .csv, .tsv, .jsonl"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(tmp_path, name, content, named):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=named):
        converted([tmp_path / name], tmp_path / "out")


def test_what_pandas_found_empty_is_no_id_emotion_or_split(tmp_path):
    """json.dumps of its rows writes NaN there."""
    nothing = dict.fromkeys(("id", "emotion", "split"), float("nan"))
    said = converted([jsonl(tmp_path / "a.jsonl", TALK, TALK, TALK, **nothing)], tmp_path / "out")
    assert not said["emotions"] and said["split"].startswith("drawn")
    assert sorted(all_rows(tmp_path / "out")) == ["a:1", "a:2", "a:3"]


@pytest.mark.parametrize("sign", "\u200b\ufeff\u061c\u200e\u200f\u202a\u202e\u2066\u2069")
def test_a_turn_that_shows_nothing_is_empty_and_one_that_shows_something_is_kept(tmp_path, sign):
    file = tmp_path / "a.jsonl"
    for nothing in (sign, f"{sign} {sign}"):
        file.write_text(json.dumps({"turns": ["Hi", nothing]}), encoding="utf-8")
        with pytest.raises(UserError, match="line 1, turn 2: its text is empty; fill it in"):
            converted([file], tmp_path / "out")
    jsonl(file, *[[("Ann", "Hi"), ("Bob", f"{sign}Oh{sign} no")]] * 3)
    converted([file], tmp_path / "out")
    assert all_rows(tmp_path / "out")["a:1"] == ["Hi", f"{sign}Oh{sign} no"]


def test_a_third_person_is_refused_with_the_line(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", TALK, [*TALK, ("Eva", "Hello?")])
    with pytest.raises(UserError, match=r"line 2: 3 speakers \(Ann, Bob, Eva\), expected two"):
        converted([file], tmp_path / "out")


def test_who_has_a_listeners_name_listens_and_instructions_are_nobody(tmp_path, capsys):
    turns = [("system", "Be kind."), ("assistant", "Hi!"), ("user", "I passed!"), ("assistant", "Well done!")]
    jsonl(tmp_path / "a.jsonl", *[[*turns, ("user", f"Thanks {n}")] for n in range(3)])
    converted([tmp_path / "a.jsonl"], tmp_path / "out")
    assert [texts[:2] for texts in all_rows(tmp_path / "out").values()] == [["I passed!", "Well done!"]] * 3
    assert "3 where the listener begins: that turn left out" in capsys.readouterr().out
    # where two speak, "system" is one of them
    jsonl(tmp_path / "b.jsonl", *[[("user", "A taxi."), ("system", f"When? {n}")] for n in range(3)])
    converted([tmp_path / "b.jsonl"], tmp_path / "other")
    assert {texts[0] for texts in all_rows(tmp_path / "other").values()} == {"A taxi."}
    # where it only begins, nobody has replied
    lone = [*(turns for _ in range(3)), [("system", "Be kind."), ("user", "Hello?")]]
    jsonl(tmp_path / "c.jsonl", *([*t, ("user", f"{n}")] for n, t in enumerate(lone)))
    assert sum(converted([tmp_path / "c.jsonl"], tmp_path / "lone")["dialogues"].values()) == 3
    assert "1 without a reply: left out" in capsys.readouterr().out


def test_a_file_of_a_folder_that_is_left_out_is_named(tmp_path, capsys):
    (tmp_path / "good.csv").write_text("id,speaker,text\n1,a,b\n1,b,c\n")
    (tmp_path / "bad.csv").write_text("id,speaker\n1,a\n")
    (tmp_path / "other.json").write_text("[]")
    assert own_dialogues.files_in(tmp_path) == [tmp_path / "good.csv"]
    said = capsys.readouterr().out
    assert f"{tmp_path / 'bad.csv'}: left out, no columns for conversation, speaker, text" in said
    assert f"{tmp_path / 'other.json'}: left out, not one of .csv" in said


def test_a_file_with_semicolons_is_not_left_out_of_its_folder(tmp_path):
    (tmp_path / "good.csv").write_text("id,speaker,text\n1,a,b\n1,b,c\n")
    (tmp_path / "excel.csv").write_text("id;speaker;text\n1;a;b\n")
    with pytest.raises(UserError, match=r"excel\.csv, line 1: one column, .* its separator seems to be ';'"):
        converted(own_dialogues.files_in(tmp_path), tmp_path / "out")


def test_excels_own_first_line_says_the_separator(tmp_path):
    for sign in ",;":
        file = tmp_path / "mine.csv"
        file.write_text(f"sep={sign}\nid,speaker,text\n1,a,b\n1,b,c\n".replace(",", sign))
        assert [d.turns for d in own_dialogues.read(file)] == [[("a", "b"), ("b", "c")]]


def test_the_only_file_of_a_folder_is_named_with_what_it_lacks(tmp_path):
    (tmp_path / "mine.csv").write_text("id;speaker;text\n1;a;b\n")
    with pytest.raises(UserError, match=r"mine\.csv, line 1: one column, .* its separator seems to be ';'"):
        converted(own_dialogues.files_in(tmp_path), tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("id;speaker;text\n1;a;b\n", "line 1: one column, .* its separator seems to be ';'"),
        ("Conversation ID,Speaker,Text\n1,a,b\n", "line 1: no column for the conversation: name it one of"),
        ("", "holds no rows"),
    ],
)
def test_files_named_as_the_official_ones_are_told_what_own_dialogues_lack(tmp_path, text, named):
    source = tmp_path / "mine"
    source.mkdir()
    for split in SPLITS:
        (source / f"{split}.csv").write_text(text)
    with pytest.raises(UserError, match=rf"mine/test\.csv.*{named}"):
        prepare_data.main(["--source", str(source), "--workdir", str(tmp_path)])


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("speaker_idx", "Person", r"missing column speaker_idx \(found: "),
        (",", ";", "separated by semicolons, expected commas; convert it with: python -c"),
    ],
)
def test_a_damaged_header_of_the_official_dialogues_is_none_of_own_ones(corpus, tmp_path, old, new, named):
    official = next(corpus.rglob("train.csv")).parent
    source = tmp_path / "official"
    source.mkdir()
    for file in [*official.glob("*.csv"), *corpus.rglob("*-reddit.csv")]:
        text = file.read_text(encoding="utf-8")
        head, rest = text.split("\n", 1)
        if not file.name.endswith("-reddit.csv"):
            head = head.replace(old, new)
        (source / file.name).write_text(f"{head}\n{rest}", encoding="utf-8")
    glove = str(SAMPLE / "glove.sample.50d.txt")  # before the dialogues it is asked for
    with pytest.raises(UserError, match=rf"train\.csv, line 1: {named}"):
        prepare_data.main(["--source", str(source), "--workdir", str(tmp_path), "--glove", glove])


@pytest.mark.parametrize(
    ("numbers", "speakers", "fault"),
    [
        ((0, 1, 2), "aba", None),
        ((0, 0, 1), "aba", None),  # an exchange has one number
        ((2, 0, 1), "aba", "turn 0 after turn 2"),
        ((0, 0, 1), "aab", "turn 0 after turn 0"),
    ],
)
def test_numbered_turns_of_a_jsonl_stand_in_their_order(tmp_path, numbers, speakers, fault):
    turns = [
        {"turn_id": number, "speaker": speaker, "text": f"text {n}"}
        for n, (number, speaker) in enumerate(zip(numbers, speakers, strict=True))
    ]
    lines = [json.dumps({"id": name, "turns": turns}) for name in "xyz"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    if fault:
        with pytest.raises(UserError, match=f"a.jsonl, line 1, turn 2: {fault}; sort the turns"):
            converted([tmp_path / "a.jsonl"], tmp_path / "out")
        return
    converted([tmp_path / "a.jsonl"], tmp_path / "out")
    assert all_rows(tmp_path / "out")["x"] == ["text 0", "text 1", "text 2"]


def test_a_turn_without_a_known_name_is_said_with_the_names_that_it_has(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"turns": [{"who": "a", "body": "Hello."}]}))
    with pytest.raises(UserError, match=r"turn 1: no speaker; it stands under .* \(found: who, body\)"):
        converted([tmp_path / "a.jsonl"], tmp_path / "out")


def test_numbered_rows_of_pandas_stand_in_their_order(tmp_path):
    rows = "".join(f"{c},{n}.0,{'ab'[n % 2]},text {n}\n" for c in "xyz" for n in (1, 2, 10))
    (tmp_path / "a.csv").write_text(f"id,utterance_idx,speaker,text\n{rows}")
    converted([tmp_path / "a.csv"], tmp_path / "out")
    assert all_rows(tmp_path / "out")["x"] == ["text 1", "text 2 text 10"]


@pytest.mark.parametrize("order", ["turn_id", "turn"])
def test_rows_that_are_numbered_another_way_than_they_stand_are_refused(order, tmp_path):
    rows = "".join(f"{c},{n},{'ab'[n]},text {n}\n" for c in "xyz" for n in (1, 0))
    (tmp_path / "a.csv").write_text(f"conversation,{order},speaker,text\n{rows}")
    with pytest.raises(UserError, match=r"line 3: turn 0 after turn 1; sort the turns"):
        converted([tmp_path / "a.csv"], tmp_path / "out")
    texts = "".join(f"{c},{'ab'[n]},{9 - n}\n" for c in "xyz" for n in (0, 1))
    (tmp_path / "a.csv").write_text(f"conversation,speaker,turn\n{texts}")  # the text itself
    converted([tmp_path / "a.csv"], tmp_path / "out")
    assert all_rows(tmp_path / "out")["x"] == ["9", "8"]


def test_who_speaks_in_one_dialogue_and_listens_in_another_is_named(tmp_path, capsys):
    one = [("ann", "I lost my job."), ("bob", "Oh no.")]
    other = [("bob", "Hello, what brings you here?"), ("ann", "I lost my job."), ("bob", "Oh.")]
    file = jsonl(tmp_path / "a.jsonl", one, one, other)
    said = "whose speaker listens in others"
    converted([file], tmp_path / "out")
    assert f"3 {said} (ann, bob): replies of both are learnt; --listener NAME" in capsys.readouterr().out
    converted([file], tmp_path / "out", listener="bob")
    assert said not in capsys.readouterr().out
    alone = jsonl(tmp_path / "c.jsonl", one, one, other, [("ann", "Is anybody there?")])
    converted([alone], tmp_path / "out", listener="bob")  # whose words nobody has answered
    assert len(all_rows(tmp_path / "out")) == 3
    named = [
        [(name.replace("bob", "Supporter"), text) for name, text in turns] for turns in (one, one, other)
    ]
    converted([jsonl(tmp_path / "b.jsonl", *named)], tmp_path / "out")
    assert all_rows(tmp_path / "out")["b:3"] == ["I lost my job.", "Oh."]


def test_turns_longer_than_sentencepiece_expects_and_words_that_glove_lacks_are_prepared(tmp_path, capsys):
    said = " ".join(f"sound{n} of words" for n in range(400))  # above 4,192 bytes
    file = jsonl(
        tmp_path / "letters.jsonl", *[[("Ann", f"{said} {n}"), ("Bob", f"Yes, {said}")] for n in range(3)]
    )
    (tmp_path / "w").mkdir()
    words = ["--glove", str(SAMPLE / "glove.sample.50d.txt"), "--min-count", "1"]
    prepare_data.main(["--source", str(file), "--workdir", str(tmp_path / "w"), *words])
    assert (Paths(tmp_path / "w").t5_tiny / "spiece.model").exists()
    assert "warning: to a GloVe model" in capsys.readouterr().out


def test_flags_of_pairs_are_refused_where_there_are_none(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"turns": ["Hello.", f"Hi {n}."]}) + "\n" for n in range(9))
    )
    for flags in (["--levels", "3"], ["--split", "grouped"]):
        with pytest.raises(UserError, match=f"{flags[0]}: of labelled pairs"):
            prepare_data.main(["--source", str(tmp_path / "a.jsonl"), "--workdir", str(tmp_path), *flags])


def test_official_folders_are_not_taken_for_own_dialogues(corpus, tmp_path):
    assert own_dialogues.files_in(corpus) == own_dialogues.files_in(SAMPLE) == []


# ------------------------------------------------------------------------------------------ the page, walked


def commands_of_the_page() -> list[list[str]]:
    """All but those of the recipe, which has a test of its own."""
    page = (ROOT / "docs" / "own-dialogues.md").read_text(encoding="utf-8")
    found = [shlex.split(line)[1:] for line in page.splitlines() if line.startswith("python ")]
    return [words for words in found if words[0] not in ("reproduce.py", "respond.py")]


def small(script: str, words: list[str], folder: Path) -> list[str]:
    """A command with less training, and without the word vectors and the encoder that a test machine may
    lack."""
    if script == "prepare_data.py":
        return words if "--glove" in words else [*words, "--glove", str(SAMPLE / "glove.sample.50d.txt")]
    if "minilm" in words:
        words[words.index("minilm")] = str(folder / "data" / "bert-tiny")
    if script.startswith("train_"):
        words += ["--max-steps", "1", "--max-new-tokens", "4"]
    return [*words, "--device", "cpu"]


def test_every_command_of_the_page_runs(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sample").symlink_to(SAMPLE)
    (tmp_path / "demo").symlink_to(trained)
    (tmp_path / "saved").symlink_to(ROOT / "saved")
    commands = commands_of_the_page()
    assert {words[0] for words in commands} == set(MAINS) - {"train_causal_lm.py"} and len(commands) == 9
    for script, *words in commands:
        folder = Path(words[words.index("--workdir") + 1])
        folder.mkdir(exist_ok=True)
        MAINS[script](small(script, words, folder))

    paths = Paths("own")
    turns = {split: listener_turns(paths.dialogues(split)) for split in SPLITS}
    assert sum(len({e.conv_id for e in found}) for found in turns.values()) == 20
    exemplars = (paths.dialogues_dir / "test_dpr.csv").read_text(encoding="utf-8")
    assert all(e.conv_id in exemplars for e in turns["test"]) and not paths.pairs_dir.exists()
    made = json.loads((paths.data / "prepared.json").read_text())
    assert made["own"]["dialogues"] == {"train": 16, "valid": 2, "test": 2} and made["own"]["joined"] == 3
    table = Path("own-critics", "results", "evaluation", "table.md").read_text(encoding="utf-8")
    assert "exemplars-empathy" in table
    labels = Paths("own-critics").labels("train").read_text(encoding="utf-8").splitlines()
    assert len(labels) == 1 + len(turns["train"])

    capsys.readouterr()
    again = ["--source", str(SAMPLE / "own.jsonl"), "--workdir", "own", "--min-count", "1"]
    again += ["--glove", str(SAMPLE / "glove.sample.50d.txt")]
    prepare_data.main(again)
    assert "already made from the same inputs, kept" in capsys.readouterr().out
    with pytest.raises(UserError, match="already there: .*--overwrite"):
        prepare_data.main([*again, "--seed", "43"])


def test_too_small_a_corpus_is_told_of_rare_words(tmp_path):
    lines = "".join(json.dumps({"turns": [f"hello{n}", f"hi{n}"]}) + "\n" for n in range(3))
    (tmp_path / "few.jsonl").write_text(lines, encoding="utf-8")
    words = ["--source", str(tmp_path / "few.jsonl"), "--workdir", str(tmp_path)]
    with pytest.raises(UserError, match="no word is used 2 times in training; .*--min-count 1"):
        prepare_data.main([*words, "--glove", str(SAMPLE / "glove.sample.50d.txt")])


def test_the_recipe_goes_from_a_file_to_a_table(tmp_path):
    base = save_llama(tmp_path / "base", make_tokenizer())
    recipe = recipes.RECIPES["own"](str(SAMPLE / "own.jsonl"))
    for stage in recipes.plan(recipe, str(tmp_path), "own.jsonl", recipes.Changes()):
        script, *words = stage.command
        if script == "train_glove_t5.py":
            words[words.index("mini")] = "tiny"
        if script == "train_causal_lm.py":
            words += ["--model", base]
        MAINS[script](small(script, words, tmp_path))
    scored = json.loads((tmp_path / "results" / "own" / "metrics.json").read_text())
    assert set(scored["systems"]) == {"gold", "glove-t5/plain", "glove-t5/exemplars", "causal-lm/plain"}
    assert (Paths(tmp_path).saved / "causal-lm" / "plain" / "result.json").exists()


def test_dialogues_of_the_same_words_are_drawn_into_one_split():
    """Else what is tested was learnt."""
    said = [(f"I lost my {n % 10}.", "Oh no!") for n in range(40)]
    for seed in range(5):
        splits = draw_splits(said, seed)
        assert splits == splits[:10] * 4 and set(splits) == {"train", "valid", "test"}


def test_a_dialogues_own_split_counts_more_than_the_name_of_its_file(tmp_path):
    files = []
    for name, split in (("train", "test"), ("dev", None)):
        row = {"turns": ["Hi.", "Hello."]} | ({"split": split} if split else {})
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert [d.split for d in read_all(files)] == ["test", "valid"]


def test_of_two_with_listeners_names_the_second_to_speak_listens():
    found = cast([("helper", "I lost my dog."), ("bot", "Oh no!")], "chats.jsonl, line 1")
    assert (found.texts, found.people, found.opening) == (
        ["I lost my dog.", "Oh no!"],
        ("helper", "bot"),
        False,
    )


def test_a_dialogue_that_is_learnt_and_tested_is_said(tmp_path, capsys):
    file = tmp_path / "chats.jsonl"
    rows = [{"turns": [said, "Oh!"], "split": split} for said, split in zip("ABA", SPLITS, strict=True)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    convert([file], tmp_path, None, 0)
    said = capsys.readouterr().out
    assert f"1 stand there before, word for word (the first: {file}, line 3)" in said
    assert "1 of these in another split: what is tested was learnt" in said


def test_emotions_that_only_some_dialogues_have_are_not_used_and_that_is_said(tmp_path, capsys):
    files = [
        jsonl(tmp_path / "a.jsonl", *[TALK] * 2, emotion="sad"),
        jsonl(tmp_path / "b.jsonl", *[TALK] * 2),
    ]
    assert not converted(files, tmp_path / "out")["emotions"]
    assert "of 4 have an emotion: none is used" in capsys.readouterr().out
    assert len(all_rows(tmp_path / "out")) == 4


def test_the_command_hands_the_listener_and_the_seed_on(tmp_path):
    talks = [[("Bob", "Hello."), ("Ann", f"My cat {n} is ill."), ("Bob", "Oh no!")] for n in range(30)]
    file, tested = jsonl(tmp_path / "a.jsonl", *talks), []
    for seed in ("1", "2", "1"):
        folder = tmp_path / f"{len(tested)}"
        folder.mkdir()
        words = ["--source", str(file), "--listener", "Bob", "--seed", seed, "--workdir", str(tmp_path)]
        asked = pick(preparing.PrepareOptions, prepare_data.parse_args(words))
        preparing.sources_of(asked, Paths(tmp_path), folder)
        assert all(len(turns) == 2 and turns[1] == "Oh no!" for turns in all_rows(folder).values())
        tested.append((folder / "test.csv").read_text())
    assert tested[0] == tested[2] != tested[1]
