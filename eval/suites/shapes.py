"""Writes the shapes suite: `python -m eval.suites.shapes`. The file in the repository is what this makes.

Standard prompts ask, in the training grammar, for pairs seen in training, stratified by what they say. Edge cases ask
in ways that training never showed.
"""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator

import numpy as np

from diffusion_kd.shapes import scenes
from eval import suites

SEED = 2026
PER_STRATUM = 64
Words = tuple[str, scenes.Prompt | None]


# --- standard prompts -------------------------------------------------------------------------------

_NOTHING = scenes.Mentions((False, False), place=False, background=False)
STRATA: dict[str, tuple[int, scenes.Mentions]] = {
    "single": (1, _NOTHING),
    "single-placed": (1, scenes.Mentions((False, False), place=True, background=False)),
    "single-sized": (1, scenes.Mentions((True, False), place=False, background=True)),
    "single-full": (1, scenes.Mentions.everything()),
    "pair-horizontal": (2, _NOTHING),
    "pair-vertical": (2, _NOTHING),
    "pair-sized": (2, scenes.Mentions((True, True), place=False, background=False)),
    "pair-full": (2, scenes.Mentions.everything()),
}
"""Number of objects and what is said of them."""

_LAYOUTS = {"pair-horizontal": ("left of", "right of"), "pair-vertical": ("above", "below")}


def _standard(category: str) -> Iterator[Words]:
    count, mentions = STRATA[category]
    rng = _stream(category)
    while True:
        scene = scenes.draw_scene(rng)
        if len(scene.objects) == count and scene.layout in _LAYOUTS.get(category, (scene.layout,)):
            prompt = scenes.describe(scene, rng, mentions)
            yield prompt.text, prompt


# --- edge cases -------------------------------------------------------------------------------------


def _held_out() -> Iterator[Words]:
    rng = _stream("held-out")
    while True:
        prompt = scenes.describe(scenes.draw_scene(rng, held_out=True), rng)
        yield prompt.text, prompt


def _facts(rng: np.random.Generator, objects: int) -> scenes.Prompt:
    """What a prompt asks for, of shapes, colours and the relation alone."""
    while True:
        scene = scenes.draw_scene(rng)
        if len(scene.objects) == objects:
            return scenes.describe(scene, rng, _NOTHING)


def _named(facts: scenes.Prompt) -> dict[str, str]:
    """The words of a prompt of two objects, for templates."""
    first, second = facts.objects
    back = {"left of": "right", "right of": "left", "above": "below", "below": "above"}[facts.relation or ""]
    return {
        "c1": str(first.colour), "s1": str(first.shape), "c2": str(second.colour), "s2": str(second.shape),
        "rel": str(facts.relation), "back": back,
    }  # fmt: skip


_PARAPHRASES = (
    "{rel} a {c2} {s2} sits a {s1} that is {c1}",
    "a {s1}, {c1} in colour, lies {rel} a {s2}, {c2} in colour",
    "two things: a {c1} {s1}, and {back} from it a {c2} {s2}",
    "draw me a {c1} {s1} {rel} a {c2} {s2} please",
    "the {s1} is {c1}, the {s2} is {c2}, and the {s1} is {rel} the {s2}",
    "I would like to see one {c1} {s1} and, {rel} which it should stand, one {c2} {s2}",
    "{c1} {s1} ({rel}) {c2} {s2}",
    "an illustration that shows a {s2} coloured {c2} with a {s1} coloured {c1} {rel} it",
)
_LONG = (
    "a {c1} {s1} {rel} a {c2} {s2}, drawn with flat colours and clean edges, without any text, frame, shadow or other "
    "thing, as if it had been cut out of paper and laid down with care by somebody who had all the time in the world",
    "please take a moment before you start, think of a calm and simple picture such as one finds in a book for small "
    "children, leave out everything that is not needed, and then show nothing other than a {c1} {s1} {rel} a {c2} {s2}",
    "a {c1} {s1}, yes, a {c1} {s1} and no other kind of thing, and it has to be {rel} a {c2} {s2}, again a {c2} {s2} "
    "and no other kind of thing, so that in the end there is a {c1} {s1} {rel} a {c2} {s2} and nothing more than that",
)


def _templated(category: str, templates: tuple[str, ...]) -> Iterator[Words]:
    rng = _stream(category)
    while True:
        for template in templates:
            facts = _facts(rng, 2)
            yield template.format(**_named(facts)), facts


def _misspelt() -> Iterator[Words]:
    rng = _stream("misspelt")
    while True:
        facts = _facts(rng, 1 + int(rng.integers(2)))
        yield " ".join(_misspell(word, rng) for word in facts.text.split()), facts


def _misspell(word: str, rng: np.random.Generator) -> str:
    """Two letters swapped, one lost or one doubled, in most words of more than three."""
    if len(word) < 4 or rng.random() < 0.25:
        return word
    at = int(rng.integers(1, len(word) - 1))
    swapped = word[: at - 1] + word[at] + word[at - 1] + word[at + 1 :]
    return (swapped, word[:at] + word[at + 1 :], word[:at] + word[at] + word[at:])[int(rng.integers(3))]


_CONTRADICTIONS = (
    ("a {c1} {s1} that is {c2}", "shape"),
    ("a {s1} which is really a {s2}, {c1}", "colour"),
    ("a {c1} {s1} with the shape of a {s2}", "colour"),
    ("a {s1} that is {c1} all over and {c2} all over", "shape"),
)
"""Templates, and the one fact of the first object that is not contradicted."""


def _contradictory() -> Iterator[Words]:
    rng = _stream("contradictory")
    while True:
        for template, kept in _CONTRADICTIONS:
            facts = _facts(rng, 2)
            first = facts.objects[0]
            shape, colour = (first.shape, None) if kept == "shape" else (None, first.colour)
            wanted = scenes.Wanted(shape, colour, None)
            yield template.format(**_named(facts)), scenes.Prompt("", (wanted,), None, None, None)


def _three_objects() -> Iterator[Words]:
    rng = _stream("three-objects")
    while True:
        objects = tuple(_facts(rng, 1).objects[0] for _ in range(3))
        if len(set(objects)) == 3:
            first, second, third = (f"{each.colour} {each.shape}" for each in objects)
            text = f"one {first}, one {second} and one {third}"
            yield text, scenes.Prompt(text, objects, None, None, None)


_LANGUAGES: tuple[tuple[str, str], ...] = (
    # German, French, Spanish, Italian, Portuguese, Dutch, Polish, Russian, Turkish, Chinese, Japanese, Korean
    ("ein roter Kreis", "circle red"),
    ("ein blaues Quadrat links von einem gelben Stern", "square blue|left of|star yellow"),
    ("ein grünes Dreieck über einem roten Kreuz", "triangle green|above|cross red"),
    ("ein rosa Ring unter einem orangen Kreis", "ring pink|below|circle orange"),
    ("un cercle bleu", "circle blue"),
    ("un carré rouge à gauche d'une étoile jaune", "square red|left of|star yellow"),
    ("un triangle vert au-dessus d'une croix violette", "triangle green|above|cross purple"),
    ("un anneau orange en dessous d'un cercle rose", "ring orange|below|circle pink"),
    ("una estrella amarilla", "star yellow"),
    ("un círculo verde a la derecha de un cuadrado naranja", "circle green|right of|square orange"),
    ("un triángulo azul encima de una cruz roja", "triangle blue|above|cross red"),
    ("un anillo rosa debajo de una estrella morada", "ring pink|below|star purple"),
    ("un quadrato viola", "square purple"),
    ("una croce verde a sinistra di un cerchio rosso", "cross green|left of|circle red"),
    ("una stella blu sopra un anello giallo", "star blue|above|ring yellow"),
    ("um triângulo vermelho", "triangle red"),
    ("um círculo amarelo à direita de uma estrela azul", "circle yellow|right of|star blue"),
    ("een oranje vierkant", "square orange"),
    ("een paarse ster links van een groene cirkel", "star purple|left of|circle green"),
    ("czerwony kwadrat nad niebieskim kołem", "square red|above|circle blue"),
    ("żółty trójkąt", "triangle yellow"),
    ("синий круг", "circle blue"),
    ("красная звезда слева от зелёного квадрата", "star red|left of|square green"),
    ("mavi bir kare", "square blue"),
    ("kırmızı bir yıldızın sağında yeşil bir daire", "circle green|right of|star red"),  # noqa: RUF001 - Turkish
    ("一个红色的圆形", "circle red"),
    ("一个蓝色的正方形在一颗黄色的星星左边", "square blue|left of|star yellow"),
    ("緑の三角形", "triangle green"),
    ("赤い星の上にある青い円", "circle blue|above|star red"),
    ("보라색 별", "star purple"),
    ("빨간 원 아래에 있는 파란 사각형", "square blue|below|circle red"),
    ("دائرة خضراء", "circle green"),
)


def _other_languages() -> Iterator[Words]:
    for text, short in _LANGUAGES:
        first, *rest = short.split("|")
        names = [first, *rest[1:]]
        looks = [name.split() for name in names]
        objects = tuple(scenes.Wanted(shape, colour, None) for shape, colour in looks)
        yield text, scenes.Prompt(text, objects, rest[0] if rest else None, None, None)


def _empty() -> Iterator[Words]:
    for text in ("", " ", "\n", ".", "...", "-", "?", '""'):
        yield text, None


def _one_word() -> Iterator[Words]:
    for shape in scenes.SHAPES:
        yield shape, scenes.Prompt(shape, (scenes.Wanted(shape, None, None),), None, None, None)
    for colour in scenes.COLOURS:
        yield colour, scenes.Prompt(colour, (scenes.Wanted(None, colour, None),), None, None, None)
    for word in ("small", "large", "left", "background", "picture", "nothing"):
        yield word, None


_ZERO_WIDTH, _OVERRIDE, _ACUTE = "\u200b", "\u202e", "\u0301"
_LOOKALIKES = str.maketrans({"a": "а", "c": "с", "e": "е", "o": "о", "p": "р"})  # noqa: RUF001 - that is the point
_ODD: tuple[Callable[[str], str], ...] = (
    lambda text: "".join(chr(ord(letter) + 0xFEE0) if "!" <= letter <= "~" else letter for letter in text),
    lambda text: _ZERO_WIDTH.join(text),
    lambda text: text.translate(_LOOKALIKES),
    lambda text: "".join(letter + _ACUTE if letter in "aeiou" else letter for letter in text),
    lambda text: _OVERRIDE + text[::-1],
    lambda text: "\U0001f534 " + text.upper() + " \U0001f535\ufe0f",
)


def _odd_unicode() -> Iterator[Words]:
    rng = _stream("odd-unicode")
    while True:
        for change in _ODD:
            facts = _facts(rng, 1)
            yield change(facts.text), facts


EDGE_CASES: dict[str, tuple[int, Callable[[], Iterator[Words]]]] = {
    "held-out": (48, _held_out),
    "paraphrase": (32, lambda: _templated("paraphrase", _PARAPHRASES)),
    "long": (24, lambda: _templated("long", _LONG)),
    "misspelt": (24, _misspelt),
    "contradictory": (16, _contradictory),
    "three-objects": (24, _three_objects),
    "other-languages": (32, _other_languages),
    "empty": (8, _empty),
    "one-word": (20, _one_word),
    "odd-unicode": (24, _odd_unicode),
}


# --- the suite --------------------------------------------------------------------------------------


def _stream(category: str) -> np.random.Generator:
    return np.random.default_rng([SEED, *category.encode()])


def make() -> list[suites.Prompt]:
    """All prompts, standard before edge cases, no text twice."""
    kinds = [(name, PER_STRATUM, _standard(name), False) for name in STRATA]
    kinds += [(name, count, words(), True) for name, (count, words) in EDGE_CASES.items()]
    taken: set[str] = set()
    return [
        suites.Prompt(f"{name}-{number:03d}", name, edge_case, text, _asking(text, asks))
        for name, count, words, edge_case in kinds
        for number, (text, asks) in enumerate(_take(count, words, taken), 1)
    ]


def _take(count: int, words: Iterator[Words], taken: set[str]) -> Iterator[Words]:
    return itertools.islice(_fresh(words, taken), count)


def _fresh(words: Iterator[Words], taken: set[str]) -> Iterator[Words]:
    for text, asks in words:
        if text not in taken:
            taken.add(text)
            yield text, asks


def _asking(text: str, asks: scenes.Prompt | None) -> scenes.Prompt | None:
    return None if asks is None else dataclasses.replace(asks, text=text)


def main() -> None:
    path = suites.BUILT_IN["shapes"]
    path.write_text("".join(suites.to_line(prompt) + "\n" for prompt in make()), encoding="utf-8")
    sys.stdout.write(f"written: {path}\n")


if __name__ == "__main__":
    main()
