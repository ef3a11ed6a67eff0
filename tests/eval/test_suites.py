"""The prompt suites: what is in them, that they are what their maker makes, and what is refused."""

import collections
import json
import pathlib

import numpy as np
import pytest

from diffusion_kd import errors
from diffusion_kd.shapes import oracle, scenes
from eval import suites
from eval.suites import shapes as maker

SHAPES, GENERAL = suites.load("shapes"), suites.load("general")


@pytest.mark.parametrize("suite", [SHAPES, GENERAL])
def test_at_least_500_standard_prompts_and_150_edge_cases_of_different_text(suite: suites.Suite) -> None:
    edge = [prompt for prompt in suite.prompts if prompt.edge_case]
    assert len(edge) >= 150
    assert len(suite.prompts) - len(edge) >= 500
    assert len({prompt.id for prompt in suite.prompts}) == len(suite.prompts)
    assert len({prompt.text for prompt in suite.prompts}) == len(suite.prompts)
    assert {prompt.category for prompt in edge}.isdisjoint(
        {prompt.category for prompt in suite.prompts if not prompt.edge_case}
    )


def test_the_shapes_file_is_what_its_maker_makes() -> None:
    assert list(SHAPES.prompts) == maker.make()


def test_standard_shapes_prompts_ask_for_seen_pairs_and_the_held_out_for_others() -> None:
    for prompt in SHAPES.prompts:
        if not prompt.edge_case:
            assert prompt.asks is not None and not prompt.asks.held_out
        if prompt.category == "held-out":
            assert prompt.asks is not None and prompt.asks.held_out


def test_strata_say_what_they_promise() -> None:
    by_category = collections.defaultdict(list)
    for prompt in SHAPES.prompts:
        by_category[prompt.category].append(prompt.asks)
    assert all(len(by_category[name]) == 64 for name in maker.STRATA)
    for asks in by_category["pair-full"]:
        assert asks is not None
        assert len(asks.objects) == 2 and asks.relation and asks.background and all(each.size for each in asks.objects)
    assert {asks.relation for asks in by_category["pair-vertical"] if asks} == {"above", "below"}
    assert all(asks is None for asks in by_category["empty"])
    assert all(len(asks.objects) == 3 for asks in by_category["three-objects"] if asks)


def test_a_render_of_what_a_standard_prompt_asks_is_right_by_the_oracle() -> None:
    for number, prompt in enumerate(SHAPES.prompts[:512:5]):
        assert prompt.asks is not None
        picture = scenes.render(scenes.complete(prompt.asks, np.random.default_rng(number)))
        assert oracle.judge(oracle.read(picture), prompt.asks).correct, prompt


def test_general_strata_are_those_of_the_field() -> None:
    counts = collections.Counter(prompt.category for prompt in GENERAL.prompts)
    assert {
        "people", "hands", "text-rendering", "counting", "spatial", "attribute-binding", "style", "negation",
        "long-detail", "non-english", "rare-concept", "one-word", "empty", "adversarial-unicode", "safety-sensitive",
    } <= counts.keys()  # fmt: skip
    assert min(count for name, count in counts.items() if name != "empty") >= 16
    languages = " ".join(prompt.text for prompt in GENERAL.prompts if prompt.category == "non-english")
    assert all(
        any(low <= letter <= high for letter in languages) for low, high in ("一鿿", "ぁヿ", "؀ۿ", "ऀॿ", "Ѐӿ", "가힣")
    )


def test_a_line_survives_the_way_to_a_file_and_back(tmp_path: pathlib.Path) -> None:
    for suite in (SHAPES, GENERAL):
        path = tmp_path / "mine.jsonl"
        path.write_text("".join(suites.to_line(prompt) + "\n" for prompt in suite.prompts), encoding="utf-8")
        again = suites.load(str(path))
        assert again.prompts == suite.prompts
        assert again.sha256 == suite.sha256


def test_another_word_or_order_is_another_suite() -> None:
    first, *rest = SHAPES.prompts
    changed = suites.Prompt(first.id, first.category, first.edge_case, first.text + ".", first.asks)
    hashes = {suites.Suite("x", prompts).sha256 for prompts in ((first, *rest), (changed, *rest), (*rest, first))}
    assert len(hashes) == 3


def test_standard_prompts_are_dealt_out_to_groups_wherever_they_stand() -> None:
    prompts = [suites.Prompt(str(n), f"k{n % 20 == 0}", n % 20 != 0, str(n)) for n in range(100)]
    suite = suites.Suite("sparse", tuple(prompts))
    assert suite.groups[suite.standard].tolist() == [0, 1, 2, 3, 4]
    assert set(suite.groups) == {-1, 0, 1, 2, 3, 4}


def test_a_quick_look_keeps_the_strata_and_the_ids() -> None:
    some = SHAPES.thinned(76)
    assert 60 <= len(some.prompts) <= 90
    assert {prompt.category for prompt in some.prompts} == {prompt.category for prompt in SHAPES.prompts}
    assert set(some.prompts) <= set(SHAPES.prompts)


GOOD = {"id": "a", "category": "c", "edge_case": False, "text": "t"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no prompts"),
        (["", "  "], "holds no prompts"),
        (["{"], "line 1 is not JSON"),
        (["[]"], "line 1 must be an object"),
        ([json.dumps(GOOD), json.dumps({**GOOD, "text": 7})], "line 2: text must be str, not 7"),
        (
            [json.dumps({key: value for key, value in GOOD.items() if key != "edge_case"})],
            "edge_case must be bool, not None",
        ),
        ([json.dumps({**GOOD, "colour": 1})], "unknown key 'colour'"),
        ([json.dumps(GOOD), json.dumps({**GOOD, "text": "u"})], "several prompts with the id 'a'"),
        ([json.dumps({**GOOD, "edge_case": True})], "edge cases alone"),
        (
            [json.dumps(GOOD), json.dumps({**GOOD, "id": "b", "edge_case": True})],
            "category 'c' holds standard prompts and edge",
        ),
        ([json.dumps({**GOOD, "category": "all prompts"})], "a name of the"),
        ([json.dumps({**GOOD, "text": "\ud800"})], "surrogate"),
        ([json.dumps({**GOOD, "asks": {"objects": [{"shape": "cube"}]}})], "no shape 'cube'"),
        ([json.dumps({**GOOD, "asks": [1]})], "asks must hold objects"),
    ],
)
def test_what_is_no_suite_is_refused(tmp_path: pathlib.Path, lines: list[str], message: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(errors.DataError, match=message):
        suites.load(str(path))


def test_a_suite_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(errors.DataError, match="general, shapes"):
        suites.load("genral")
