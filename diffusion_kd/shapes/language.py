"""What words ask for: the way back from a caption of the shapes domain, and the short words for what is asked or seen.

`understand` reads the grammar of `scenes.phrase`, from the words that `scenes` has for it, and nothing else: what lies
outside of it is not understood rather than half understood.
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence

from diffusion_kd.shapes import scenes

_ARTICLES = {"a", "an", "the"}


def understand(text: str) -> scenes.Prompt | None:
    """What a typed prompt asks of a picture, with `text` as given; None unless all of it is of the training grammar.

    Case, blanks, articles and a full stop at the end do not matter. A shape or a colour alone is an object, a size
    alone is not. Two backgrounds, or a place beside a relation, are not understood.
    """
    matched = _grammar().fullmatch(_bare(text.lower().strip().removesuffix(".")))
    if matched is None:
        return None
    said, words = matched.groupdict(), _words()
    relation, place = words["relation"].get(said["relation"]), words["place"].get(said["place"])
    objects = tuple(_wanted(said, which) for which in (("first", "second") if relation else ("first",)))
    return scenes.Prompt(text, objects, relation, place, words["ground"].get(said["before"] or said["after"]))


def _wanted(said: Mapping[str, str], which: str) -> scenes.Wanted:
    shape = said[f"shape_{which}"] or said[f"alone_{which}"]
    return scenes.Wanted(shape, said[f"colour_{which}"], _words()["size"].get(said[f"size_{which}"]))


def _bare(text: str) -> str:
    """Without articles, one blank between words."""
    return " ".join(word for word in text.split() if word not in _ARTICLES)


@functools.cache
def _words() -> dict[str, dict[str, str]]:
    """For each kind of fact: a wording without articles -> what it means."""
    grounds = {name: (scenes.ground_noun(name),) for name in scenes.BACKGROUNDS}
    kinds: dict[str, Mapping[str, Sequence[str]]] = {
        "size": scenes.SIZE_WORDS, "place": scenes.PLACE_WORDS, "relation": scenes.RELATION_WORDS, "ground": grounds,
    }  # fmt: skip
    return {
        kind: {_bare(wording): meaning for meaning, wordings in table.items() for wording in wordings}
        for kind, table in kinds.items()
    }


@functools.cache
def _grammar() -> re.Pattern[str]:
    """A whole prompt without articles. No part repeats, so that a match ends soon whatever is typed."""
    words = {kind: _any(table) for kind, table in _words().items()}
    shape, colour = _any(scenes.SHAPES), _any(scenes.COLOURS)
    opening = _any(map(_bare, filter(None, scenes.OPENINGS)))

    def noun(which: str) -> str:
        look = f"(?P<colour_{which}>{colour})(?: (?P<shape_{which}>{shape}))?|(?P<alone_{which}>{shape})"
        return f"(?:(?P<size_{which}>{words['size']}) )?(?:{look})"

    def ground(where: str) -> str:
        return f"{_any(scenes.GROUND_WORDS)} (?P<{where}>{words['ground']})"

    layout = f"(?P<relation>{words['relation']}) {noun('second')}|(?P<place>{words['place']})"
    after = f"(?(before)|(?: {ground('after')})?)"
    return re.compile(f"(?:{ground('before')}, )?(?:{opening} )?{noun('first')}(?: (?:{layout}))?{after}")


def _any(wordings: Iterable[str]) -> str:
    return f"(?:{'|'.join(map(re.escape, wordings))})"


def say(prompt: scenes.Prompt) -> str:
    """What is asked for, in short: `large red circle left of blue star, on a gray background`."""
    things = [" ".join(filter(None, (thing.size, thing.colour, thing.shape or "object"))) for thing in prompt.objects]
    return sentence(things, prompt.relation, prompt.place, prompt.background)


def sentence(things: Sequence[str], relation: str | None, place: str | None, background: str | None) -> str:
    """Things and their layout in short words; what is None is left out."""
    said = f" {relation} ".join(things) if relation else ", ".join(things)
    if place:
        said += f" {scenes.PLACE_WORDS[place][0]}"
    return f"{said}, on a {scenes.ground_noun(background)}" if background else said
