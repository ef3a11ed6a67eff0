"""Two reports side by side, where they were measured alike."""

import copy
import json
import pathlib
from typing import Any

import pytest

from eval import compare

PRINT = {"metric": "FD[toy]", "network_sha256": "a", "versions": {"torch": "2.13.0"}, "samples": 1024}

KID = {"name": "KID[toy]", "value": 1.0, "fingerprint": "y"}


def _report(value: float, **changes: Any) -> dict[str, Any]:
    made = copy.deepcopy(PRINT) | changes
    values = {
        "fd": {"name": "FD[toy]", "value": value, "fingerprint": "x"},
        "kid": {"name": "KID[toy]", "value": 1.0, "fingerprint": "y"},
    }
    rows = [{"model": "student", "steps": 1, "guidance_scale": 0.0, "values": values}]
    return {"schema_version": 2, "lost": {}, "rows": rows, "fingerprints": {"x": made, "y": {"metric": "KID[toy]"}}}


@pytest.fixture
def write(tmp_path: pathlib.Path) -> Any:
    def write(name: str, content: object) -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(content))
        return str(tmp_path / name)

    return write


def test_what_was_measured_alike_is_subtracted(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([write("old", _report(2.0)), write("new", _report(1.5)) + "/report.json"]) == 0
    shown = capsys.readouterr().out
    assert [line.split()[-3:] for line in shown.splitlines()[1:]] == [["2", "1.5", "-0.5"], ["1", "1", "+0"]]


def test_what_was_not_is_left_out_and_the_field_is_named(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([write("old", _report(2.0)), write("new", _report(1.5, samples=512))]) == 0
    shown = capsys.readouterr().out
    assert "left out: FD[toy] and FD[toy] cannot be compared: samples is 1024 and 512" in shown
    assert "-0.5" not in shown


def test_what_only_one_of_them_holds_is_told(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    new = _report(1.5)
    new["rows"].append({**new["rows"][0], "steps": 4})
    new["lost"] = {"a": "NaN"}
    assert compare.main([write("old", _report(2.0)), write("new", new)]) == 0
    shown = capsys.readouterr().out
    assert "only in new: student 4 fd, student 4 kid" in shown and "only in old" not in shown
    assert "new lost prompts" in shown


def test_reports_with_nothing_in_common_are_an_error(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    new = _report(1.5, versions={"torch": "2.14.0"})
    del new["rows"][0]["values"]["kid"]
    assert compare.main([write("old", _report(2.0)), write("new", new)]) == 3
    assert "versions.torch is '2.13.0' and '2.14.0'" in capsys.readouterr().err
    new["rows"] = []
    assert compare.main([write("older", _report(2.0)), write("newer", new)]) == 3
    assert "no value in common" in capsys.readouterr().err


@pytest.mark.parametrize("content", [{"schema_version": 1}, [], "x"])
def test_what_is_no_report_is_refused(write: Any, content: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([write("old", content), write("new", _report(1.0))]) == 3
    assert "schema version" in capsys.readouterr().err
    assert compare.main([write("damaged", {"schema_version": 2}), write("whole", _report(1.0))]) == 3
    assert "a report is damaged" in capsys.readouterr().err
    assert compare.main(["nowhere.json", "nowhere.json"]) == 3
    assert "is not a report" in capsys.readouterr().err
