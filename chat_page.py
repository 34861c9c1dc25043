"""The local page of app.py: a conversation with one run, and beside it a tab where two are compared.

The conversation is the terminal's (conversation.Conversation), so that a seed gives the same replies here and
there. Only this module, pair_tab and page_widgets import gradio.
"""

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr

import advice
import bundled
import chat_views as views
import distress
import page_widgets as widgets
import storage
from conversation import Conversation, RespondOptions, newest_generator, open_responder
from critics import doubts
from hub import folder_given
from options import DIMENSIONS, SENTIMENT, Paths, UserError
from page_widgets import AS_IT_IS
from pair_tab import PairTab, System
from responder import Answer
from session import Session
from votes import Votes

EXAMPLES = [
    "My dog died last week, and the house is so quiet now.",
    "I finally passed my driving test on the fourth try!",
    "My sister has not called me back since we argued.",
    "I start a new job on Monday and I can hardly sleep.",
]
LEAVE = "any"  # a dimension that a reply is not chosen by
HERE = "127.0.0.1"  # the page is for this machine alone


@dataclass(frozen=True)
class PageOptions:
    """What app.py was asked for (it explains each flag)."""

    respond: RespondOptions
    other: str | None
    family: str | None
    given: dict[str, Path]  # critics by kind
    device: str
    precision: str


def reads_exemplars(run: Path) -> bool:
    config = run / "config.json"
    return not config.exists() or storage.read_json(config).get("exemplars") != "none"


def open_system(options: PageOptions, run: Path, paths: Paths, session: Session, pool: bool) -> System:
    """`pool`: whether what was said of exemplars is for this run; of two that are compared it may be for one
    alone."""
    asked = replace(options.respond, run=str(run))
    if not pool:
        asked = replace(asked, pool=None, column=None, path=None, encoder=None)
    responder = open_responder(asked, options.given, paths, session, options.family)
    return System(paths.note(run), run, responder)


def serve(options: PageOptions, paths: Paths, port: int) -> None:
    """Open the page, until Ctrl-C. Raises `UserError` where a run cannot be opened, or the port is taken."""
    asked = options.respond.run
    runs = [folder_given("--model", asked) if asked else newest_generator(paths)]
    if options.other:
        runs.append(folder_given("--other", options.other))
        if runs[0].resolve() == runs[1].resolve():
            raise UserError(f"--other {options.other}: the same run as --model; name another one")
    require_free(port)
    session = Session(options.device, options.precision)
    some_read = any(map(reads_exemplars, runs))
    systems = [
        open_system(options, run, paths, session, reads_exemplars(run) or not some_read) for run in runs
    ]
    hosts = filter(None, [os.environ.get("NO_PROXY"), HERE])
    os.environ["NO_PROXY"] = ",".join(hosts)  # gradio asks its own server whether it is up
    launch(page(systems, options, paths), port)


def require_free(port: int) -> None:
    """Raises `UserError` where the page could not be served at the port; asked before anything is loaded."""
    with socket.socket() as asked:
        asked.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gradio does
        try:
            asked.bind((HERE, port))
        except OSError as error:
            raise UserError(
                f"--port {port}: cannot be used ({error.strerror}); end the page that runs there, or choose "
                "another port"
            ) from error


def page(systems: list[System], options: PageOptions, paths: Paths) -> gr.Blocks:
    """One tab for one run, a second one for two."""
    talk = TalkTab(systems[0], options, paths)
    with gr.Blocks(title="Empathetic replies", analytics_enabled=False) as blocks:
        run = Path(*systems[0].folder.absolute().parts[-2:])
        why = bundled.why(systems[0].folder, paths.cache)
        said = "English only. A research system, not a counsellor. "
        said += f"Generator: {run.as_posix()}{why and f' ({why})'}"
        critics = systems[0].responder.critics.items()
        if came := [kind for kind, critic in critics if bundled.is_bundled(critic.folder)]:
            said += f". Bundled critics: {', '.join(came)}"
        gr.HTML(f'<div class="intro"><h1>Empathetic replies</h1>{views.quiet(said)}</div>')
        if len(systems) == 1:
            talk.widgets()
        else:
            with gr.Tab("Conversation"):
                talk.widgets()
            with gr.Tab("Side by side"):
                PairTab(systems, options.respond, Votes(paths.results / "votes.sqlite")).widgets()
    return blocks


def launch(blocks: gr.Blocks, port: int) -> None:
    """Serve on this machine alone, until Ctrl-C."""
    font = ["ui-sans-serif", "system-ui", "sans-serif"]  # the machine's own
    blocks.launch(
        server_name=HERE,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        run_history=False,  # nothing that is written here stays in the browser
        ssr_mode=False,
        mcp_server=False,
        theme=gr.themes.Default(primary_hue="teal", font=font, font_mono=["ui-monospace", "monospace"]),
        css=views.CSS,
    )
    print(f"open {blocks.local_url} in a browser on this machine; Ctrl-C ends it", flush=True)
    blocks.block_thread()


def silent(text: str) -> None:
    """The page shows an answer itself."""


class TalkTab:
    """A conversation with one run, what each reply came from, and what the next one is to be like."""

    def __init__(self, system: System, options: PageOptions, paths: Paths):
        self.responder, self.options, self.paths = system.responder, options.respond, paths
        self.family = options.family or self.responder.writer.family
        self.other = options.other

    def widgets(self) -> None:
        state = gr.State(None)  # a Conversation, from the first message on
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                chat = gr.HTML(views.dialogue([]), elem_id="talk-chat")
                notice = widgets.said("notice")
                message, send = widgets.message("talk")
                with gr.Row():
                    retry, undo, reset = map(widgets.small, ("Retry", "Undo", "Reset"))
                note = widgets.said("note")
                examples = gr.Examples(EXAMPLES, message, label="Begin with").dataset
            with gr.Column(scale=2, min_width=290):
                levels = gr.HTML(self.levels(None), elem_id="levels")
                aims = self.aims()
                exemplars = gr.HTML(self.exemplars(None), elem_id="exemplars")
                with gr.Row():
                    line, markdown = map(widgets.small, ("Save as JSON", "Save as markdown"))
        seen = [state, chat, notice, message, note, examples, levels, exemplars]
        sent = [send.click, message.submit]
        widgets.listen(sent, self.say, [state, message, *aims], seen, **widgets.WRITING)
        widgets.listen(retry.click, self.again, [state, *aims], seen, **widgets.WRITING)
        widgets.listen(undo.click, self.undo, [state], seen, **widgets.WRITING)
        # after a reply that is being written, which would bring the old conversation back
        widgets.listen(reset.click, lambda: self.shown(None), [], seen, **widgets.WRITING)

        def said(talk: Any) -> bool:
            return bool(talk and talk.turns)

        widgets.download(line, "dialogue.jsonl", lambda talk: talk.as_line() if said(talk) else "", [state])
        widgets.download(
            markdown, "dialogue.md", lambda talk: talk.as_markdown() if said(talk) else "", [state]
        )

    # --------------------------------------------------------------------------------------------------- aims

    def aims(self) -> list[Any]:
        """A choice for each dimension; whether sentiment counts, and its slider."""
        gr.HTML(views.part("Aim of the next reply"))
        critics, aims = self.responder.critics, []
        with gr.Group():
            for kind in DIMENSIONS:
                most = critics[kind].limits[1] if kind in critics else 1
                choices = [LEAVE, *(str(level) for level in range(int(most) + 1))]
                aims.append(
                    gr.Radio(
                        choices,
                        value=LEAVE,
                        label=views.LABELS[kind],
                        interactive=kind in critics,
                        elem_id=f"aim-{kind}",
                        elem_classes="aim",
                    )
                )
            there = SENTIMENT in critics
            counts = gr.Checkbox(label=views.LABELS[SENTIMENT], interactive=there)
            slider = gr.Slider(
                -1,
                1,
                value=0,
                step=0.1,
                label="Negative to positive",
                interactive=there,
                buttons=[],
                elem_id="aim-sentiment",
            )
        widgets.listen(slider.input, None, [], [counts], js="() => true")
        return [*aims, counts, slider]

    def target(self, *aims: Any) -> dict[str, float]:
        """The widgets' values as a target."""
        *levels, counts, sentiment = aims
        found = {}
        for kind, level in zip(DIMENSIONS, levels, strict=True):
            if level != LEAVE:
                found[kind] = float(level)
        if counts:
            found[SENTIMENT] = float(sentiment)
        return found

    # ----------------------------------------------------------------------------------------- a conversation

    def shown(self, talk: Conversation | None, note: str = "", message: str = AS_IT_IS) -> tuple:
        """The values of all that shows a conversation."""
        turns, last = talk.turns if talk else [], talk.answers[-1] if talk and talk.answers else None
        if last and last.notes and not note:
            note = views.sentences(last.notes)
        return (
            talk,
            views.dialogue(turns),
            views.notice(distress.notice(turns[::2])),
            message,
            views.note(note),
            gr.update(visible=not turns),
            self.levels(last),
            self.exemplars(last),
        )

    def say(self, talk: Conversation | None, message: str, *aims: Any) -> Iterator[tuple]:
        talk = talk or Conversation(self.responder, self.options, write=silent)
        line = " ".join(message.split())
        if not line:
            yield self.shown(talk, "Write something first.")
            return
        yield from self.answered(talk, [*talk.turns, line], 0, message, aims)

    def again(self, talk: Conversation | None, *aims: Any) -> Iterator[tuple]:
        if not talk or not talk.turns:
            yield self.shown(talk, "Nothing to reply to yet; write something first.")
            return
        yield from self.answered(talk, talk.turns[:-1], talk.tries + 1, AS_IT_IS, aims)

    def answered(
        self, talk: Conversation, turns: list[str], tries: int, message: str, aims: tuple
    ) -> Iterator[tuple]:
        """The turns, with the notice where it is due, before anything is written; then the reply. The
        conversation as it was, with the reason, where there can be none."""
        notice = views.notice(distress.notice(turns[::2]))
        sent = message if message is AS_IT_IS else ""
        begun = talk, views.dialogue(turns, waiting=True), notice, sent, "", gr.update(visible=False)
        yield *begun, AS_IT_IS, AS_IT_IS
        talk.tries, talk.target = tries, self.target(*aims)
        try:
            talk.answer(turns)
        except UserError as error:
            yield self.shown(talk, str(error), message)
        else:
            yield self.shown(talk)

    def undo(self, talk: Conversation | None) -> tuple:
        """One's last message stands where messages are written."""
        if not talk or not talk.turns:
            return self.shown(talk, "Nothing to take back.")
        last = talk.turns[-2]
        talk.undo()
        return self.shown(talk, message=last)

    # --------------------------------------------------------------------------------- what a reply came from

    def levels(self, answer: Answer | None) -> str:
        """The critics' bars, and what is missing with how to get it."""
        critics = self.responder.critics
        parts = [views.part("The reply, as the critics see it")]
        if answer:
            parts.append(views.levels(answer.scores, critics))
            parts += [views.quiet(f"In doubt: {doubt}") for doubt in doubts(critics, [answer.reply])]
        elif critics:
            parts.append(views.quiet("A bar for each level, once there is a reply."))
        missing = [kind for kind in views.LABELS if kind not in critics]
        if missing:
            names = ", ".join(views.LABELS[kind].lower() for kind in missing)
            flags = ", ".join(f"--{kind} RUN" for kind in missing)
            commands = [advice.train_critic(kind, self.family, self.paths.root) for kind in missing]
            text = f"No critic of {names}: no bar, and nothing to aim by. Name one with {flags}; or train it:"
            parts.append(views.how_to(text, "\n".join(commands)))
        return "".join(parts)

    def exemplars(self, answer: Answer | None) -> str:
        """What the generator read, or why it read nothing."""
        title = views.part("Exemplars that it read")
        if not self.responder.writer.reads_exemplars:
            return title + views.quiet("None: this generator was trained without exemplars.")
        if not self.responder.has_exemplars:
            flags = {"pool": "FILE", "encoder": "minilm"}
            runs = {"model": self.responder.folder, "other": self.other}
            start = advice.command("app.py", workdir=self.paths.root, **runs, **flags)
            why = "None: it reads exemplars, but a retriever or a pool is missing. With replies of your own:"
            return title + views.how_to(why, start)
        if answer is None:
            return title + views.quiet("The nearest replies of the pool, with their scores.")
        return title + views.exemplars(answer.exemplars)
