"""The tab of app.py's page where two runs reply side by side, blinded, and a vote is given."""

import random
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gradio as gr

import chat_views as views
import distress
import page_widgets as widgets
import storage
from conversation import RespondOptions, reply, seed_of
from options import UserError
from page_widgets import AS_IT_IS
from responder import Answer, Responder
from votes import CHOICES, Shown, Votes


@dataclass(frozen=True)
class System:
    """A run, opened."""

    name: str  # as the votes call it
    folder: Path
    responder: Responder


@dataclass
class Pair:
    """A dialogue that two runs reply to, and their two replies in the order of the screen."""

    visit: str = field(default_factory=lambda: uuid.uuid4().hex)
    turns: list[str] = field(default_factory=list)
    shown: list[tuple[System, Answer]] = field(default_factory=list)  # empty: nothing to vote on


class PairTab:
    """Which reply is whose stands nowhere on the page, before the vote or after it; the count of
    the votes, which is asked for, can tell."""

    def __init__(self, systems: list[System], options: RespondOptions, votes: Votes):
        self.systems, self.options, self.votes = systems, options, votes
        self.weights = {s.name: storage.identity(s.folder) for s in systems}
        self.order = random.SystemRandom()  # no seed foretells it

    def widgets(self) -> None:
        state = gr.State(None)  # a Pair, from the first message on
        gr.HTML(
            views.quiet(
                "Both runs reply to what you write, in an order that is drawn anew each time. The dialogue "
                "goes on with the reply that you prefer, or else with A. Votes are kept with the dialogue, "
                f"on this machine: {self.votes.file}"
            )
        )
        chat = gr.HTML(views.dialogue([], height="low"), elem_id="pair-chat")
        notice = widgets.said("pair-notice")
        message, send = widgets.message("pair")
        with gr.Row():
            cards = [gr.HTML(elem_id=f"reply-{letter}", elem_classes="half") for letter in "ab"]
        with gr.Row():
            choices = [gr.Button(title, min_width=70, interactive=False) for title in CHOICES]
        note = widgets.said("pair-note")
        with gr.Row():
            fresh, count, table = map(widgets.small, ("New dialogue", "Count the votes", "Save as csv"))
        counted = widgets.said("count")
        seen = [state, chat, notice, message, *cards, *choices, note]
        sent = [send.click, message.submit]
        widgets.listen(sent, self.ask, [state, message], seen, **widgets.WRITING)
        for choice, button in zip(CHOICES, choices, strict=True):
            # one after the other: a second click finds nothing to vote on
            widgets.listen(button.click, self.voter(choice), [state], seen, **widgets.WRITING)
        widgets.listen(fresh.click, lambda: self.shown(Pair()), [], seen, **widgets.WRITING)
        widgets.listen(count.click, self.counted, [], [counted])
        widgets.download(table, "votes.csv", self.as_csv, [])

    def shown(self, pair: Pair, note: str = "", message: str = AS_IT_IS, waiting: bool = False) -> tuple:
        """The values of all that shows two replies."""
        cards = [views.card(letter, a.reply) for letter, (_, a) in zip("AB", pair.shown, strict=False)]
        buttons = [gr.update(interactive=bool(pair.shown)) for _ in CHOICES]
        notice = views.notice(distress.notice(pair.turns[::2]))
        chat = views.dialogue(pair.turns, waiting, "low")
        return pair, chat, notice, message, *(cards or ["", ""]), *buttons, views.note(note)

    def ask(self, pair: Pair | None, message: str) -> Iterator[tuple]:
        """Both replies to a message; the notice, where it is due, stands before anything is written."""
        pair, line = pair or Pair(), " ".join(message.split())
        if pair.shown:
            yield self.shown(pair, "Please vote on these two replies first.", message)
            return
        if not line:
            yield self.shown(pair, "Write something first.")
            return
        asked = replace(pair, turns=[*pair.turns, line])
        yield self.shown(asked, message="", waiting=True)
        seed = seed_of(self.options, asked.turns)
        try:
            found = [(s, reply(s.responder, asked.turns, self.options, seed=seed)) for s in self.systems]
        except UserError as error:
            yield self.shown(pair, str(error), message)
            return
        # of either: which of the two it was of would tell them apart
        notes = dict.fromkeys(note for _, answer in found for note in answer.notes)
        yield self.shown(replace(asked, shown=self.order.sample(found, 2)), views.sentences(notes))

    def counted(self) -> str:
        try:
            return views.count(self.votes.tally())
        except UserError as error:
            raise gr.Error(str(error)) from error

    def as_csv(self) -> str:
        try:
            return self.votes.table().to_csv(index=False)
        except UserError as error:
            raise gr.Error(str(error)) from error

    def voter(self, choice: str) -> Callable[[Any], tuple]:
        """What the button of a choice does."""

        def vote(pair: Pair | None) -> tuple:
            if not pair or not pair.shown:  # a second click on its way
                return self.shown(pair or Pair(), "Nothing to vote on yet.")
            sides = [Shown(s.name, self.weights[s.name], a.seed, a.reply) for s, a in pair.shown]
            try:
                number = self.votes.add(pair.visit, pair.turns, sides[0], sides[1], choice)
            except UserError as error:
                return self.shown(pair, str(error))
            kept = sides[1] if choice == "B" else sides[0]
            after = replace(pair, turns=[*pair.turns, kept.reply], shown=[])
            return self.shown(after, f"Vote {number} is kept: {choice}. Write the next message.")

        return vote
