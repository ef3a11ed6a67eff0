"""Licences by their names in any spelling, by their texts, and what stops an export."""

import datetime
import logging
import pathlib

import pytest

from diffusion_kd import errors, licences
from diffusion_kd.licences import Kind

DAY = datetime.date(2026, 3, 1)


@pytest.mark.parametrize(
    ("name", "canonical", "kind"),
    [
        ("apache-2.0", "Apache-2.0", Kind.ALLOWS),
        ("Apache License, Version 2.0", "Apache-2.0", Kind.ALLOWS),
        ("The MIT License", "MIT", Kind.ALLOWS),
        ("bsd-3-clause", "BSD-3-Clause", Kind.ALLOWS),
        ("CC0", "CC0-1.0", Kind.ALLOWS),
        ("cc0-1.0", "CC0-1.0", Kind.ALLOWS),
        ("GPLv3", "GPL-3.0", Kind.ALLOWS),
        ("gpl-3.0-or-later", "GPL-3.0", Kind.ALLOWS),
        ("openrail++", "openrail++", Kind.ALLOWS),
        ("CreativeML Open RAIL++-M License", "openrail++", Kind.ALLOWS),
        ("creativeml-openrail-m", "creativeml-openrail-m", Kind.ALLOWS),
        ("CC BY 4.0", "CC-BY-4.0", Kind.ALLOWS),
        ("cc-by-sa-4.0", "CC-BY-SA-4.0", Kind.ALLOWS),
        ("Creative Commons Attribution-ShareAlike 3.0 Unported", "CC-BY-SA-3.0", Kind.ALLOWS),
        ("cc-by-nc-4.0", "CC-BY-NC-4.0", Kind.NON_COMMERCIAL),
        ("Creative Commons Attribution NonCommercial 4.0", "CC-BY-NC-4.0", Kind.NON_COMMERCIAL),
        ("my-research-only-licence", "my-research-only-licence", Kind.NON_COMMERCIAL),
        ("CC BY-ND 4.0", "CC-BY-ND-4.0", Kind.FORBIDS),
        ("cc_by_nd", "CC-BY-ND", Kind.FORBIDS),
        ("CC-BY-NC-ND-4.0", "CC-BY-NC-ND-4.0", Kind.FORBIDS),
        ("https://creativecommons.org/licenses/by-nc-nd/4.0/", "CC-BY-NC-ND-4.0", Kind.FORBIDS),
        ("Attribution-NoDerivatives 4.0 International", "CC-BY-ND-4.0", Kind.FORBIDS),
        ("No Derivatives, ask us", "No Derivatives, ask us", Kind.FORBIDS),
        ("sai-nc-community", "sai-nc-community", Kind.FORBIDS),
        ("flux-1-dev-non-commercial-license", "flux-1-dev-non-commercial-license", Kind.FORBIDS),
        ("house licence 7", "house licence 7", Kind.UNKNOWN),
        ("unlicensed", "unlicensed", Kind.UNKNOWN),
        ("Apache 2.0 with Commons Clause", "Apache 2.0 with Commons Clause", Kind.NON_COMMERCIAL),
        ("other", "unknown", Kind.UNKNOWN),
        ("  ", "unknown", Kind.UNKNOWN),
    ],
)
def test_names_in_any_spelling(name: str, canonical: str, kind: Kind) -> None:
    assert licences.canonical(name) == canonical
    assert licences.kind_of(name) == licences.kind_of(name.upper()) == kind


def test_which_spellings_mean_the_same() -> None:
    assert licences.same("cc by nd", "CC-BY-ND-4.0") and licences.same("CC-BY-ND-4.0", "cc_by_nd_4.0")
    assert licences.same("Some Licence 3", "some-licence")
    assert not licences.same("CC-BY-ND-3.0", "CC-BY-ND-4.0")
    assert not licences.same("CC-BY", "CC-BY-ND-4.0") and not licences.same("CC-BY-NC", "CC-BY-NC-ND")


_TEXTS = {
    "Apache-2.0": "\n\n      Apache License\n   Version 2.0, January 2004\n   ... may not use this file",
    "MIT": "MIT License\n\nCopyright (c) someone\n\nPermission is hereby granted, free of charge, to any person",
    "Unlicense": "This is free and unencumbered software released into the public domain.\n\nAnyone is free to copy, "
    "for any purpose, commercial or non-commercial.",
    "openrail++": "CreativeML Open RAIL++-M License\nYou shall not use the Model ... including - but not limited to - "
    "distillation methods entailing the use of synthetic data by the Model for training the other model.",
}


@pytest.mark.parametrize("name", sorted(_TEXTS))
def test_texts_of_free_licences(name: str) -> None:
    assert licences.of_text(_TEXTS[name]) == (name, Kind.ALLOWS)


@pytest.mark.parametrize(
    ("text", "name", "kind"),
    [
        ("Creative Commons Legal Code\n\nAttribution-NoDerivs 3.0 Unported\n", "CC-BY-ND-3.0", Kind.FORBIDS),
        ("Attribution-NonCommercial 4.0 International\n====\n", "CC-BY-NC-4.0", Kind.NON_COMMERCIAL),
        (
            "HOUSE COMMUNITY LICENSE\n\nYou will not use the Materials, or the output or results of them, to create\n"
            "or improve any foundational generative AI model.",
            "HOUSE COMMUNITY LICENSE",
            Kind.FORBIDS,
        ),
        ("Weights\nIt is prohibited to distil other models from these.", "Weights", Kind.FORBIDS),
        ("Weights\nYou may not make derivative works of the model.", "Weights", Kind.FORBIDS),
        ("Weights\nFor non-commercial use.", "Weights", Kind.NON_COMMERCIAL),
        ("Weights\nFor commercial or non-commercial use.", "Weights", Kind.UNKNOWN),
        ("Weights\nYou may not sue us. We train models all day.", "Weights", Kind.UNKNOWN),
        ("CC BY-NC 4.0\nYou must not train models on the output.", "CC-BY-NC-4.0", Kind.FORBIDS),
        ("", "unknown", Kind.UNKNOWN),
    ],
)
def test_texts_of_others(text: str, name: str, kind: Kind) -> None:
    assert licences.of_text(text) == (name, kind)


@pytest.mark.parametrize(
    ("files", "stated", "name", "kind", "found_in"),
    [
        ({"README.md": "---\nlicense: mit\n---\n"}, "", "MIT", Kind.ALLOWS, "README.md"),
        ({"README.md": "---\nlicense: [mit, cc-by-nd-4.0]\n---\n"}, "", "CC-BY-ND-4.0", Kind.FORBIDS, "README.md"),
        (
            {"README.md": "---\nlicense: other\nlicense_name: no-derivatives-1\n---\n"},
            "",
            "no-derivatives-1",
            Kind.FORBIDS,
            "README.md",
        ),
        (
            {
                "README.md": "---\nlicense: other\nlicense_name: house\n---\n",
                "LICENSE.md": "House\nYou shall not train models on the output.",
            },
            "",
            "house",
            Kind.FORBIDS,
            "LICENSE.md",
        ),
        ({"README.md": "no front matter", "LICENCE": "MIT License"}, "", "MIT", Kind.ALLOWS, "LICENCE"),
        ({"README.md": "---\nlicense: other\n---\n"}, "cc by 4.0", "CC-BY-4.0", Kind.ALLOWS, "stated by the user"),
        ({"README.md": "---\nlicense: mit\n---\n"}, "apache-2.0", "MIT", Kind.ALLOWS, "README.md"),
        ({"README.md": "---\nlicense: [oops\n---\n"}, "", "unknown", Kind.UNKNOWN, "nowhere"),
        ({}, "", "unknown", Kind.UNKNOWN, "nowhere"),
        ({}, "CC BY-ND", "CC-BY-ND", Kind.FORBIDS, "stated by the user"),
    ],
)
def test_where_a_model_says_its_licence(
    tmp_path: pathlib.Path, files: dict[str, str], stated: str, name: str, kind: Kind, found_in: str
) -> None:
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    found = licences.of_model(tmp_path, covers="teacher toy", stated=stated)
    assert found == licences.Licence("teacher toy", name, kind, found_in)


def test_a_licence_that_forbids_is_not_stated_away(tmp_path: pathlib.Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-nd-4.0\n---\n")
    with pytest.raises(errors.ConfigError, match=r"says CC-BY-ND-4\.0 and you state 'MIT'.*--accept-licence"):
        licences.of_model(tmp_path, covers="teacher toy", stated="MIT")


def test_licences_of_data_are_counted_by_their_true_name() -> None:
    found = licences.of_data({"CC BY 4.0": 2, "cc-by-4.0": 3, "": 4, "CC-BY-ND-4.0": 1})
    assert [(each.name, each.items, each.kind) for each in found] == [
        ("CC-BY-4.0", 5, Kind.ALLOWS),
        ("unknown", 4, Kind.UNKNOWN),
        ("CC-BY-ND-4.0", 1, Kind.FORBIDS),
    ]
    assert found[0].record() == {
        "covers": "data",
        "name": "CC-BY-4.0",
        "kind": "allows derivatives",
        "found_in": "the data's manifest",
        "items": 5,
    }


def licence(name: str) -> licences.Licence:
    return licences.Licence("teacher toy", name, licences.kind_of(name), "README.md")


def test_a_licence_that_forbids_needs_acceptance_by_its_name() -> None:
    found = [licence("MIT"), licence("CC-BY-ND-4.0")]
    for names in ((), ("MIT",), ("CC-BY-NC-ND-4.0",), ("CC-BY-ND-3.0",), ("yes",)):
        with pytest.raises(
            errors.ArtifactError, match=r"teacher toy is under CC-BY-ND-4\.0.*--accept-licence 'CC-BY-ND"
        ):
            licences.require(found, licences.Acceptance(names, "Ada", DAY))
    assert licences.require(found, licences.Acceptance(("cc by nd",), "Ada", DAY)) == [
        {"licence": "CC-BY-ND-4.0", "covers": "teacher toy", "accepted_by": "Ada", "on": "2026-03-01"}
    ]


def test_every_licence_that_forbids_needs_its_own_acceptance() -> None:
    found = [licence("CC-BY-ND-4.0"), licence("sai-nc-community")]
    with pytest.raises(errors.ArtifactError, match="is under sai-nc-community") as caught:
        licences.require(found, licences.Acceptance(("CC-BY-ND-4.0",), "Ada", DAY))
    assert "is under CC-BY-ND" not in str(caught.value)


def test_unknown_and_unused_names_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert licences.require([licence("house"), licence("CC-BY-NC-4.0")], licences.Acceptance(("wtfpl",))) == []
    assert [record.getMessage() for record in caplog.records] == [
        "teacher toy: its licence is not known (house); the card says so",
        "nothing here is under the accepted licence wtfpl; what there is: house, CC-BY-NC-4.0",
    ]
