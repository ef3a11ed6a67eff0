"""Templates of what Gradio has no component for, and of what report.html has. What is put into them is escaped."""

import pathlib
from typing import Any

import jinja2

from eval import economics, views
from serve.playground import words

_FOLDER = pathlib.Path(__file__).parent / "templates"
STYLE = _FOLDER / "style.css"

_environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader([_FOLDER, views.TEMPLATES]),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_environment.filters |= {
    "duration": words.duration,
    "usd": economics.money,
    "percent": economics.percent,
    "sentence": words.sentence,
}
_environment.globals["count"] = words.count


def render(template: str, **given: Any) -> str:
    """A template of this folder, by its name without `.html.j2`."""
    return words.printable(_environment.get_template(f"{template}.html.j2").render(**given))


def notice(sentence: str, kind: str = "plain") -> str:
    """One sentence in a quiet box. kind: plain, good, doubtful or bad."""
    return render("notice", sentence=sentence, kind=kind)
