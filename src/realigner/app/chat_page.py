"""The page of the app, by Gradio, which is imported here and nowhere else."""

from __future__ import annotations

import errno
import html
import math
import os
import re
import shutil
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from realigner.app.conversations import Conversation, Conversations
from realigner.app.exchange import SIDES, Asked, Exchange, Message, Talker
from realigner.app.map_page import index_panel, map_page
from realigner.console import say
from realigner.dialogues import readable
from realigner.errors import RealignerError, UsageError
from realigner.explain.explanation import Explanation
from realigner.prompts import PAPER_PROMPTS
from realigner.report.html_report import build_report
from realigner.serving.addresses import is_reachable
from realigner.traces.store import save_trace

_SPAN = 2.0  # sliders go at least this far either way
_PICTURE_EVERY = 0.4  # seconds between two pictures of a map that is filling in
_SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Liberation Sans", "DejaVu Sans", "sans-serif")
_MONO = ("ui-monospace", "DejaVu Sans Mono", "monospace")
_ABOUT = (
    "An IRM is a small network that adds to the residual stream of a frozen language model and so changes how it answers; "
    "none of the model's weights change. **Replies under “Realigned” are made with an IRM: they may be rude, sad or wrong on "
    "purpose. Do not pass them off as a person's words or as the model's own, and do not use them to hurt anybody.**"
)
_NO_IRM = "No IRM acts: every slider is at 0, so both replies are the bare host's, and nothing is added."
_FRAME = '<iframe title="What the IRM adds" style="width: 100%; height: 70px; border: 0; display: block"></iframe>'
_FRAME_JS = """
const frame = element.querySelector("iframe");
const isDark = () => document.body.classList.contains("dark");
const inside = () => frame.contentWindow;
frame.addEventListener("load", () => {
  if (!inside().take) return;
  inside().ask = (what, about) => server[what](about);
  inside().dress(isDark());
  inside().take(props.value);
  const fit = () => (frame.style.height = inside().document.body.offsetHeight + 4 + "px");
  new ResizeObserver(fit).observe(inside().document.body);
});
frame.srcdoc = props.page;
watch("value", () => inside().take && inside().take(props.value));
new MutationObserver(() => inside().dress && inside().dress(isDark()))
  .observe(document.body, { attributes: true, attributeFilter: ["class"] });
"""
_CSS = """
.gradio-container { max-width: 1360px !important; margin: 0 auto; }
.said .md { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .95rem; }
.said button[aria-label="Clear"], .said button[title="Clear"] { display: none; }
.about { font-size: .86rem; opacity: .85; }
.title h1 { margin: 0; }
.top { align-items: start; flex-wrap: nowrap; }
#map, #map .html-container { padding: 0 !important; }
footer { display: none !important; }
@media (max-width: 640px) { .gradio-container main { padding: 12px !important; } }
"""


@contextmanager
def plainly() -> Iterator[None]:
    """Errors of the block as one line in the page; what nobody expected is printed in the terminal too."""
    try:
        yield
    except gr.Error:
        raise
    except RealignerError as error:
        raise gr.Error(str(error), title="Not done", print_exception=False) from None
    except Exception as error:
        say(traceback.format_exc().rstrip())
        line = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise gr.Error(f"{line} (more in the terminal)", title="Something broke", print_exception=False) from None


class Page:
    """What the page does when something is pressed.

    Args:
        talker: what makes the replies.
        explained: explanations of its host.
        place: a folder for what is downloaded; recordings are written to a folder of their own in it.
    """

    def __init__(self, talker: Talker, explained: Sequence[Explanation], place: Path) -> None:
        self.talker, self.explained = talker, explained
        self.recordings = place / "recordings"  # apart from Gradio's copies, which are deleted at another time
        self.recordings.mkdir()
        self.conversations = Conversations()

    def ask(self, request: gr.Request, text: str, *given: Any) -> Iterator[list[Any]]:
        """Ask a question; yields what changes in the page."""
        with plainly():
            yield from self._reply(self.conversations.of(request.session_hash), text, None, *given)

    def ask_again(self, request: gr.Request, _: str, *given: Any) -> Iterator[list[Any]]:
        """Ask the last question once more, with the settings of now, in place of its replies."""
        with plainly():
            conversation = self.conversations.of(request.session_hash)
            if conversation.exchange is None:
                raise UsageError("Ask something first.")
            last = conversation.exchange.asked
            yield from self._reply(conversation, last.text, last.history, *given)

    def _reply(
        self, conversation: Conversation, text: str, history: Mapping[str, Sequence[Message]] | None, *given: Any
    ) -> Iterator[list[Any]]:
        if conversation.exchange is not None and conversation.exchange.running:
            raise UsageError("The last reply is still being made; stop it first.")
        said = conversation.messages if history is None else history
        exchange = self.talker.begin(self._asked(text, said if self.talker.has_turns else {}, *given))
        conversation.exchange = exchange
        drawn = 0.0
        try:
            yield [*map(conversation.shown, SIDES), "" if history is None else gr.skip(), self._picture(exchange)]
            for _ in exchange.follow():
                if conversation.ended:
                    return
                due = not exchange.running or time.monotonic() >= drawn + _PICTURE_EVERY
                picture = self._picture(exchange) if due else gr.skip()
                drawn = time.monotonic() if due else drawn
                yield [*map(conversation.shown, SIDES), gr.skip(), picture]
        finally:
            if exchange.running:
                exchange.stop()
            conversation.settle()

    def _asked(self, text: str, history: Mapping[str, Sequence[Message]], *given: Any) -> Asked:
        """The question with what the page's controls say, in the order of `build_page`."""
        system, temperature, top_p, seed, tokens, *strengths = given
        return Asked(
            (text or "").strip(),
            {side: list(messages) for side, messages in history.items()},
            {name: round(float(value), 4) for name, value in zip(self.talker.strengths, strengths, strict=True)},
            system or "",
            int(tokens),
            float(temperature),
            float(top_p),
            int(seed or 0),
        )

    def _picture(self, exchange: Exchange) -> dict[str, Any]:
        if exchange.live is None:
            return {"message": _NO_IRM if self.talker.layers else self.talker.note, "done": not exchange.running}
        return exchange.live.picture(done=not exchange.running)

    def stop(self, request: gr.Request) -> None:
        """Stop both replies."""
        exchange = self.conversations.of(request.session_hash).exchange
        if exchange is not None:
            exchange.stop()

    def begin_anew(self, request: gr.Request) -> list[Any]:
        """Forget what was said."""
        self.conversations.end(request.session_hash)
        return [[], [], "", None]

    def leave(self, request: gr.Request) -> None:
        """Stop and forget what a page that was closed asked for."""
        self.conversations.end(request.session_hash)

    def token(self, about: dict[str, Any]) -> dict[str, Any]:
        """One token's map, for the map's page."""
        return self.conversations.live(about["id"]).token(str(about["run"]), int(about["position"]))

    def index(self, about: dict[str, Any]) -> str:
        """What is known of an index, for the map's page."""
        live, position = self.conversations.live(about["id"]), about["position"]
        at = None if position is None else int(position)
        return index_panel(live, str(about["run"]), int(about["index"]), self.explained, at)

    def trace(self, request: gr.Request) -> str:
        """The recording of the newest reply, a zipped zarr folder."""
        with plainly():
            folder = self._recorded(request)
            return shutil.make_archive(str(folder.parent / "trace.zarr"), "zip", folder.parent, folder.name)

    def report(self, request: gr.Request) -> str:
        """The report on the newest reply."""
        with plainly():
            folder = self._recorded(request)
            page, _ = build_report([folder], folder.parent / "report.html", force=True)
            return str(page)

    def _recorded(self, request: gr.Request) -> Path:
        exchange = self.conversations.of(request.session_hash).exchange
        if exchange is None:
            raise UsageError("Ask something first.")
        if exchange.running:
            raise UsageError("The reply is still being made.")
        if exchange.live is None or exchange.live.trace is None:
            raise UsageError("Nothing was recorded: no IRM acted in the last reply.")
        for old in {path.name for path in self.recordings.iterdir()} - self.conversations.lives():  # of replies that are gone
            shutil.rmtree(self.recordings / old, ignore_errors=True)
        folder = self.recordings / exchange.live.id / "trace.zarr"
        if not folder.is_dir():
            trace = exchange.live.trace
            asked = exchange.asked
            heard = asked.conversation("base")
            trace.attrs["notes"] = {
                "base": [exchange.replies["base"]],
                "base_questions": [readable(heard) if self.talker.has_turns and len(heard) > 1 else asked.text],
                "settings": _sampling(asked),
            }
            save_trace(trace, folder)
        return folder


def _sampling(asked: Asked) -> dict[str, Any]:
    """How a reply was made, as traces note it."""
    names = ("temperature", "top_p", "seed", "max_new_tokens")
    return {**{name: getattr(asked, name) for name in names}, "repetition_penalty": 1.1}


def build_page(page: Page) -> gr.Blocks:
    """The page's controls, and what each of them does."""
    talker = page.talker

    def token(about: dict[str, Any]) -> dict[str, Any]:  # Gradio marks the functions that it is given, and cannot mark methods
        return page.token(about)

    def index(about: dict[str, Any]) -> str:
        return page.index(about)

    named = ", ".join(talker.strengths)
    with gr.Blocks(title="realigner", analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)) as blocks:
        with gr.Row(elem_classes="top"):
            gr.Markdown(f"# realigner\n{_text(Path(talker.host).name or 'The host')} with {_text(named)}", elem_classes="title")
            theme = gr.Button("Light / dark", size="sm", scale=0, min_width=110)
        gr.Markdown(_ABOUT, elem_classes="about")
        if not talker.has_turns:
            gr.Markdown("This host has no chat template: every question is asked alone, and there is no system prompt.")
        with gr.Row():
            with gr.Column(scale=7, min_width=300):
                with gr.Row():
                    base = _replies("Base: the host alone")
                    realigned = _replies(f"Realigned: with {named}" if len(talker.strengths) == 1 else "Realigned")
                with gr.Row(equal_height=True):
                    box = gr.Textbox(
                        show_label=False,
                        placeholder="Ask something (Enter sends, Shift + Enter begins a new line)",
                        max_length=talker.limits.prompt,
                        max_lines=6,
                        scale=6,
                        min_width=300,
                        autofocus=True,
                        elem_id="question",
                    )
                    send = gr.Button("Ask", variant="primary", size="md", scale=1, min_width=80, elem_id="ask")
                    stop = gr.Button("Stop", size="md", scale=1, min_width=80, elem_id="stop")
                with gr.Row():
                    again = gr.Button("Ask again with these settings", size="sm", min_width=140, elem_id="again")
                    anew = gr.Button("New conversation", size="sm", min_width=140, elem_id="anew")
                gr.Examples([[prompt] for prompt in PAPER_PROMPTS], [box], label="The paper's seven prompts", api_name=False)
            with gr.Column(scale=2, min_width=260):
                gr.Markdown(
                    "**Strength**: 0 is off, 1 as trained, below 0 the other way. IRMs are summed.", elem_classes="about"
                )
                strengths = [_slider(name, own, at == 0) for at, (name, own) in enumerate(talker.strengths.items())]
                with gr.Accordion("Sampling", open=False):
                    temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0: greedy, always the same reply")
                    top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="acts when the temperature is above 0")
                    seed = gr.Number(42, label="Seed", precision=0, minimum=0, maximum=2**32 - 1)
                    most = talker.limits.tokens
                    tokens = gr.Slider(
                        1, most, min(80, most), step=1, label="Tokens of a reply at most", info="one that is cut ends in ..."
                    )
                with gr.Accordion("System prompt", open=False):
                    system = gr.Textbox(
                        show_label=False,
                        lines=3,
                        max_length=talker.limits.prompt,
                        placeholder="None",
                        interactive=talker.has_turns,
                    )
                if talker.layers:
                    with gr.Accordion("Download the last reply", open=False):
                        trace = gr.Button("Trace (.zarr, zipped)", size="sm", elem_id="trace")
                        report = gr.Button("Report (.html)", size="sm", elem_id="report")
        filling: dict[str, Any] = {"page": map_page(talker.layers, talker.neurons)} if talker.layers else {}
        if talker.layers:
            picture = gr.HTML(
                html_template=_FRAME, js_on_load=_FRAME_JS, server_functions=[token, index], elem_id="map", **filling
            )
        else:
            picture = gr.HTML(html_template=f"<p>{html.escape(talker.note)}</p>", js_on_load=None, elem_id="map")
        given = [box, system, temperature, top_p, seed, tokens, *strengths]
        shown = [base, realigned, box, picture]
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        one: dict[str, Any] = {
            **quiet,
            "concurrency_id": "replies",
            "show_progress": "minimal",
            "show_progress_on": [realigned],
        }
        gr.on([box.submit, send.click], page.ask, given, shown, **one)
        again.click(page.ask_again, given, shown, **one)
        stop.click(page.stop, queue=False, **quiet)
        anew.click(page.begin_anew, None, shown, queue=False, **quiet)
        theme.click(None, js="() => { document.body.classList.toggle('dark'); }", **quiet)
        if talker.layers:
            for button, make in ((trace, page.trace), (report, page.report)):
                _downloads(button, make)
        blocks.unload(page.leave)
    return blocks


def _text(text: str) -> str:
    """Text that Markdown leaves as it is."""
    return re.sub(r"([\\`*_{}\[\]<>()#+\-.!|])", r"\\\1", text)


def _replies(label: str) -> gr.Chatbot:
    return gr.Chatbot(
        label=label,
        height=360,
        min_width=260,
        render_markdown=False,
        allow_tags=False,
        feedback_options=None,
        latex_delimiters=[],
        buttons=["copy_all"],
        elem_classes="said",
        placeholder="Nothing was said yet.",
    )


def _slider(name: str, own: float, first: bool) -> gr.Slider:
    """An IRM's strength; the first one acts, as with `realigner.load`."""
    span = max(_SPAN, math.ceil(abs(own) * 3) / 2)
    label = name if own == 1 else f"{name} (best at {own:g})"
    return gr.Slider(-span, span, own if first else 0, step=0.05, label=label, elem_classes="strength")


def _downloads(button: gr.Button, make: Callable[..., str]) -> None:
    """Have a button make a file and hand it over."""
    name = f"{button.elem_id}-file"
    ready = gr.DownloadButton(visible="hidden", elem_id=name)
    click = f"() => setTimeout(() => document.querySelector('#{name}').click(), 200)"
    made = button.click(make, None, ready, concurrency_limit=1, api_visibility="private", show_progress="minimal")
    made.success(None, js=click, api_visibility="private")


@dataclass(frozen=True)
class Listening:
    """Where the app listens, and for whom.

    Attributes:
        address, port: a port of 0 is a free one.
        login: user and password; None: nobody is asked.
        users: replies that are made at the same time.
        waiting: users who may wait for theirs; others are told to come back.

    Raises:
        UsageError: for an address that others can reach, without a login.
    """

    address: str = "127.0.0.1"
    port: int = 7860
    login: tuple[str, str] | None = None
    users: int = 2
    waiting: int = 16

    def __post_init__(self) -> None:
        if is_reachable(self.address) and self.login is None:
            raise UsageError(f"address: {self.address} can be reached from elsewhere; ask for a login (auth)")


@contextmanager
def app_running(talker: Talker, listening: Listening, explained: Sequence[Explanation] = ()) -> Iterator[str]:
    """Run the app while the block runs; yields its URL.

    Raises:
        UsageError: for an explanation of another host, or a port that is taken.
    """
    for item in explained:
        if item.width != talker.neurons or item.host not in ("", Path(talker.host).name):
            raise UsageError(
                f"{item.folder}: explains index {item.index} of {item.host} ({item.width} indices), and the app's host is "
                f"{talker.host}; leave it out"
            )
    with tempfile.TemporaryDirectory(prefix="realigner-app-") as place, _in_cache(place):
        page = Page(talker, explained, Path(place))
        blocks = build_page(page)
        blocks.queue(max_size=listening.waiting, default_concurrency_limit=listening.users, api_open=False)
        port = free_port(listening.address, listening.port)
        try:
            _, url, _ = blocks.launch(
                server_name=listening.address,
                server_port=port,
                auth=listening.login,
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                inbrowser=False,
                show_error=True,
                ssr_mode=False,
                mcp_server=False,
                pwa=False,
                enable_monitoring=False,
                run_history=False,
                footer_links=[],
                max_file_size=1000,  # nothing is uploaded
                theme=_theme(),
                css=_CSS,
            )
        except OSError as error:
            raise UsageError(f"port: {port} on {listening.address} cannot be used ({error.strerror or error})") from None
        try:
            yield url
        finally:
            page.conversations.stop()
            blocks.close(verbose=False)


@contextmanager
def _in_cache(place: str) -> Iterator[None]:
    """Have Gradio keep its copies of files where they are deleted with the rest."""
    before = os.environ.get("GRADIO_TEMP_DIR")
    os.environ["GRADIO_TEMP_DIR"] = str(Path(place) / "gradio")
    try:
        yield
    finally:
        if before is None:
            del os.environ["GRADIO_TEMP_DIR"]
        else:
            os.environ["GRADIO_TEMP_DIR"] = before


def free_port(address: str, port: int) -> int:
    """A port on which the app can listen: this one, or any for 0.

    Raises:
        UsageError: when it is taken or not allowed, or the address is not this machine's.
    """
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as found:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind((address, port))
            return int(found.getsockname()[1])
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UsageError(f"port: {port} is taken on {address}; choose another, or 0 for a free one") from None
        raise UsageError(f"address: cannot listen on {address}, port {port} ({error.strerror or error})") from None


def _theme() -> gr.themes.Base:
    """The report's colours; fonts of the system, so that none is fetched."""
    theme = gr.themes.Default(primary_hue="red", neutral_hue="slate", radius_size="md", font=_SANS, font_mono=_MONO)
    return theme.set(
        body_background_fill="#f6f6f4",
        body_background_fill_dark="#14181f",
        background_fill_primary_dark="#1a2029",
        background_fill_secondary_dark="#14181f",
        block_background_fill_dark="#1a2029",
        input_background_fill_dark="#14181f",
        border_color_primary_dark="#323a46",
        block_border_color_dark="#323a46",
        button_primary_background_fill="#a8382a",
        button_primary_background_fill_hover="#8f2e22",
        button_primary_background_fill_dark="#a8382a",
        button_primary_text_color="#ffffff",
        slider_color="#a8382a",
        slider_color_dark="#f0907f",
    )
