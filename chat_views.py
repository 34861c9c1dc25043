"""What the page of app.py shows, as HTML: levels, exemplars, notes. Every text in it is escaped.

Knows nothing of gradio.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from critics import Critic, Score
from DPR.retriever import Hit
from options import DIMENSIONS, SENTIMENT

#: in the order in which they are shown
LABELS = {kind: known.title for kind, known in DIMENSIONS.items()} | {SENTIMENT: "Sentiment"}

SHOWN = 3  # exemplars that are seen at once

CSS = """
.gradio-container { max-width: 1120px !important; margin: 0 auto !important; }
.gradio-container .html-container { padding: 0; }
.intro h1 { font-size: 1.3rem; font-weight: 650; margin: 0 0 .1rem; }
.quiet { color: var(--neutral-500); font-size: .87rem; margin: 0 0 .3rem; }
.quiet code { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem; }
.part { font-weight: 600; font-size: .95rem; margin: .1rem 0 .5rem; }
/* reversed: it stays scrolled to its end */
.dialogue { display: flex; flex-direction: column-reverse; overflow-y: auto; min-height: 9rem;
  border: 1px solid var(--border-color-primary); border-radius: 12px;
  background: var(--background-fill-primary); }
.dialogue.tall { max-height: 27rem; min-height: 15rem; }
.dialogue.low { max-height: 16rem; }
.dialogue > div { display: flex; flex-direction: column; gap: .55rem; padding: .9rem; }
.dialogue::before { content: ""; flex: 1; }
.dialogue p { max-width: 84%; margin: 0; padding: .5rem .8rem; border-radius: 14px;
  overflow-wrap: anywhere; }
.dialogue .speaker { align-self: flex-end; color: #fff; background: #0f766e;
  border-bottom-right-radius: 4px; }
.dialogue .listener { align-self: flex-start; background: var(--background-fill-secondary);
  border: 1px solid var(--border-color-primary); border-bottom-left-radius: 4px; }
.dialogue .quiet { max-width: none; padding: 0; }
.dialogue .waiting { animation: waiting 1.2s ease-in-out infinite; }
@keyframes waiting { 50% { opacity: .3; } }
.notice { border-left: 4px solid #c2410c; background: #fff4ec; color: #431407; padding: .6rem .8rem;
  border-radius: 6px; }
.note { border-left: 4px solid var(--border-color-primary); padding: .2rem .7rem; font-size: .9rem;
  overflow-wrap: anywhere; }
.said:not(:has(.told)) { display: none; }
.level { margin: 0 0 .65rem; font-size: .87rem; }
.level .head { display: flex; justify-content: space-between; align-items: baseline; gap: .5rem; }
.level .head span:first-child { white-space: nowrap; }
.level .head span:last-child { color: var(--neutral-500); text-align: right; font-size: .8rem; }
.track { position: relative; height: 9px; border-radius: 5px; overflow: hidden; margin-top: .2rem;
  background: var(--border-color-primary); }
.track i { position: absolute; top: 0; bottom: 0; background: #0d9488; border-radius: 5px; }
.track i.low { background: #c2410c; }
.track b { position: absolute; left: calc(50% - 1px); top: 0; bottom: 0; width: 2px;
  background: var(--neutral-500); }
.aim { display: flex !important; flex-direction: row; align-items: center; justify-content: space-between;
  flex-wrap: wrap; gap: .2rem .6rem; }
.aim > span { margin: 0 !important; }
.aim label { padding: .25rem .5rem !important; }
@media (max-width: 480px) { .aim { flex-direction: column; align-items: flex-start; } }
.exemplars { margin: 0; padding: 0 !important; list-style: none !important; font-size: .9rem; }
.exemplars li { display: flex; gap: .7rem; padding: .3rem 0; margin: 0;
  border-top: 1px solid var(--border-color-primary); }
.exemplars .score { font-variant-numeric: tabular-nums; color: var(--neutral-500); }
.exemplars .text { overflow-wrap: anywhere; }
summary { cursor: pointer; font-size: .87rem; color: var(--neutral-500); }
.reply { border: 1px solid var(--border-color-primary); border-radius: 12px; padding: .7rem .9rem;
  min-height: 5rem; background: var(--background-fill-primary); overflow-wrap: anywhere; }
.reply strong { display: block; margin-bottom: .2rem; color: var(--neutral-500); }
.count { border-collapse: collapse; font-size: .9rem; }
.count td, .count th { border: 1px solid var(--border-color-primary); padding: .25rem .6rem;
  text-align: left; }
"""


def part(title: str) -> str:
    return f'<div class="part">{escape(title)}</div>'


def quiet(text: str) -> str:
    return f'<p class="quiet">{escape(text)}</p>'


def how_to(text: str, command: str) -> str:
    """What is missing, with the command that helps."""
    return f'<p class="quiet">{escape(text)}<br><code>{escape(command)}</code></p>'


def sentences(notes: Iterable[str]) -> str:
    """A responder's notes as running text."""
    return " ".join(f"{said[0].upper()}{said[1:]}." for said in notes)


def note(text: str) -> str:
    return f'<div class="note told" role="status">{escape(text)}</div>' if text else ""


def notice(text: str | None) -> str:
    return f'<div class="notice told" role="alert">{escape(text)}</div>' if text else ""


def dialogue(turns: Sequence[str], waiting: bool = False, height: str = "tall") -> str:
    """Speaker and listener in turn. `waiting`: a reply is being written. `height`: tall or low."""
    said = []
    for n, turn in enumerate(turns):
        role = ("speaker", "listener")[n % 2]
        said.append(f'<p class="{role}">{escape(turn)}</p>')
    if waiting:
        said.append('<p class="listener waiting" aria-label="a reply is being written">&hellip;</p>')
    empty = quiet("What happened to you? Write a message, or begin with an example.")
    inner = "".join(said) or empty
    return (
        f'<div class="dialogue {height}" role="log" aria-live="polite" tabindex="0"><div>{inner}</div></div>'
    )


# --------------------------------------------------------------------------------------------------- a reply


def levels(scores: Mapping[str, Score], judges: Mapping[str, Critic]) -> str:
    """A bar for each critic: from nothing to its highest level, or of sentiment from the middle."""
    bars = [bar(kind, scores[kind], judges[kind].limits) for kind in LABELS if kind in scores]
    return "".join(bars)


def bar(kind: str, score: Score, limits: tuple[float, float]) -> str:
    """One critic's expected level with what it means."""
    low, high = limits
    share = (min(max(score.value, low), high) - low) / (high - low)
    left, right, middle, shown = 0.0, share, "", f"{score.value:.2f}"
    if kind == SENTIMENT:
        left, right = sorted((0.5, share))
        middle, shown = "<b></b>", f"{score.value:+.2f}"
    side = ' class="low"' if kind == SENTIMENT and score.value < 0 else ""
    filled = f'<i{side} style="left:{left:.1%};width:{right - left:.1%}"></i>'
    return (
        f'<div class="level" data-kind="{kind}"><div class="head"><span>{LABELS[kind]}</span>'
        f"<span>{escape(score.meaning)} &middot; {shown}</span></div>"
        f'<div class="track" role="img" aria-label="{shown} between {low:g} and {high:g}">'
        f"{filled}{middle}</div></div>"
    )


def exemplars(hits: Sequence[Hit]) -> str:
    """The replies that the generator read, nearest first, each with the retriever's score."""
    rows = [
        f'<li><span class="score">{hit.score:.2f}</span><span class="text">{escape(hit.text)}</span></li>'
        for hit in hits
    ]
    first, more = rows[:SHOWN], rows[SHOWN:]
    listed = f'<ul class="exemplars">{"".join(first)}</ul>'
    if more:
        listed += f"<details><summary>{len(more)} more</summary>"
        listed += f'<ul class="exemplars">{"".join(more)}</ul></details>'
    return listed


# ---------------------------------------------------------------------------------------------- side by side


def card(letter: str, text: str) -> str:
    """One of two replies, under a letter."""
    return f'<div class="reply"><strong>{letter}</strong>{escape(text)}</div>'


def count(tally: Mapping[tuple[str, str], Counter]) -> str:
    """How often each run was preferred."""
    if not tally:
        return f'<div class="told">{quiet("No votes yet.")}</div>'
    rows = []
    for pair, votes in tally.items():
        for outcome in (*pair, "tie", "both bad"):
            rows.append(f"<tr><td>{escape(outcome)}</td><td>{votes[outcome]}</td></tr>")
        rows.append(f"<tr><th>votes</th><th>{votes.total()}</th></tr>")
    return f'<table class="count told">{"".join(rows)}</table>'
