"""What both tabs of app.py's page are made of: gradio's widgets, and how they are wired."""

from collections.abc import Callable
from functools import partial
from typing import Any

import gradio as gr

LONGEST = 20_000  # letters of a message
#: hands a text over as a file, without the server keeping one
DOWNLOAD = """(text) => {
  if (!text) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "text/plain;charset=utf-8"}));
  link.download = "NAME";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}"""
#: one reply is written at a time, whoever asked for it
WRITING: dict[str, Any] = {"concurrency_id": "reply", "concurrency_limit": 1}
#: the value of a widget that an event leaves alone: what is being typed there stays
AS_IT_IS: Any = gr.skip()


def listen(trigger: Any, function: Callable | None, inputs: list, outputs: list, **settings: Any) -> Any:
    """An event of the page alone: no address for other programs. Of a list of triggers, which are ways to the
    same, none is taken while another is at work."""
    settings = {"api_visibility": "private", "show_progress": "hidden", **settings}
    on = partial(gr.on, trigger) if isinstance(trigger, list) else trigger
    return on(function, inputs, outputs, **settings)


def message(name: str) -> tuple[gr.Textbox, gr.Button]:
    """Where a message is written, and the button that sends it."""
    with gr.Row():
        text = gr.Textbox(
            placeholder="Your message",
            label="Your message",
            show_label=False,
            lines=1,
            max_lines=6,
            max_length=LONGEST,
            container=False,
            scale=6,
            min_width=160,
            elem_id=f"{name}-message",
        )
        send = gr.Button("Send", variant="primary", scale=1, min_width=70, elem_id=f"{name}-send")
    return text, send


def said(name: str) -> gr.HTML:
    """A place that takes no room while nothing is said there."""
    return gr.HTML(elem_id=name, elem_classes="said")


def small(title: str) -> gr.Button:
    return gr.Button(title, size="sm", min_width=70)


def download(button: gr.Button, name: str, text: Callable[..., str], inputs: list) -> None:
    """A click hands over `text(*inputs)` as a file; where that is empty it says so."""

    def found(*values: Any) -> str:
        whole = text(*values)
        if not whole:
            gr.Info("Nothing to save yet; write something first.")
        return str(whole)

    carried = gr.Textbox(visible="hidden")
    made = listen(button.click, found, inputs, [carried])
    listen(made.then, None, [carried], [], js=DOWNLOAD.replace("NAME", name))
