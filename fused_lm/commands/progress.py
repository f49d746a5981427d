"""What a training run shows: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

PLAIN_SECONDS = 10.0


@contextmanager
def make_display() -> Iterator[Display]:
    """The display that fits where the output goes."""
    if sys.stdout.isatty():
        from rich.console import Console

        with BarDisplay(Console()) as display:
            yield display
    else:
        yield Display(lambda line: print(line, flush=True))


class Display:
    """Plain lines: what was measured, each evaluation, and a step every ten seconds."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self._last = time.monotonic()

    def note(self, message: str) -> None:
        """Says something that is not an event of the run. Safe in a signal handler."""
        print(message, file=sys.stderr, flush=True)

    def on_event(self, event: dict[str, Any]) -> None:
        handler = getattr(self, f"on_{event['event']}", None)
        if handler is not None:
            handler(event)

    def on_text(self, event: dict[str, Any]) -> None:
        from fused_lm.lm.text import describe

        self.say(describe(event["text"]))
        self.say(
            f"entropy in bits per byte: {event['unigram_bits']:.3f} from byte frequencies, "
            f"{event['bigram_bits']:.3f} from byte pairs"
        )

    def on_measured(self, event: dict[str, Any]) -> None:
        measured = event["measured"]
        verdict = "fits" if measured.affordable else "too large for the time"
        cost = measured.cost
        threads = f" with {cost.threads} thread(s)" if cost.threads else ""
        self.say(
            f"measured {measured.rung}: {cost.parameters / 1e6:.2f} M parameters, "
            f"{1 / cost.step_seconds:.1f} steps/s{threads}, {measured.steps} steps: {verdict}"
        )

    def on_begin(self, event: dict[str, Any]) -> None:
        model = event["model"]
        verb = "goes on from" if event["step"] else "starts at"
        self.say(
            f"model: {model['num_layers']} layers x {model['embed_dim']}, "
            f"{event['parameters'] / 1e6:.2f} M parameters, context {model['context']}, "
            f"batch {event['batch']}, on {event['device']}; {verb} step {event['step']} "
            f"of about {event['expected_steps']}"
        )

    def on_train(self, event: dict[str, Any]) -> None:
        if time.monotonic() - self._last >= PLAIN_SECONDS:
            self.say(self._line(event))

    def on_validation(self, event: dict[str, Any]) -> None:
        self.say(
            f"step {event['step']:6d}  {event['elapsed_s']:6.1f} s  "
            f"validation {event['bits_per_byte']:.3f} bits per byte, "
            f"{100 * event['accuracy']:.1f} % of next tokens right"
        )
        self._last = time.monotonic()

    def on_warning(self, event: dict[str, Any]) -> None:
        self.note(f"warning: {event['message']}")

    def _line(self, event: dict[str, Any]) -> str:
        self._last = time.monotonic()
        return (
            f"step {event['step']:6d}  {event['elapsed_s']:6.1f} s  "
            f"training   {event['bits_per_byte']:.3f} bits per byte  "
            f"{event['tokens_per_s']:,.0f} tokens/s"
        )


class BarDisplay(Display):
    """A rich progress bar with loss, validation and speed; evaluations move into its columns."""

    def __init__(self, console: Any) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        super().__init__(lambda line: console.print(line, highlight=False))
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("step {task.fields[step]}/{task.fields[expected]}"),
            TextColumn("[cyan]train {task.fields[train]}"),
            TextColumn("[green]val {task.fields[val]}"),
            TextColumn("[dim]{task.fields[speed]}"),
            TimeElapsedColumn(),
            console=console,
            expand=True,
        )
        self._task: Any = None

    def __enter__(self) -> BarDisplay:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def on_begin(self, event: dict[str, Any]) -> None:
        super().on_begin(event)
        self._bar.start()
        self._task = self._bar.add_task(
            "training",
            total=1.0,
            step=event["step"],
            expected=event["expected_steps"],
            train="-",
            val="-",
            speed="",
        )

    def on_step(self, event: dict[str, Any]) -> None:
        self._bar.update(self._task, completed=event["progress"], step=event["step"])

    def on_train(self, event: dict[str, Any]) -> None:
        self._bar.update(
            self._task,
            expected=event["expected_steps"],
            train=f"{event['bits_per_byte']:.3f}",
            speed=f"{event['tokens_per_s'] / 1e3:,.1f}k tokens/s",
        )

    def on_validation(self, event: dict[str, Any]) -> None:
        self._bar.update(self._task, val=f"{event['bits_per_byte']:.3f}")

    def on_end(self, event: dict[str, Any]) -> None:
        if not event["result"].interrupted:
            self._bar.update(self._task, completed=1.0)
