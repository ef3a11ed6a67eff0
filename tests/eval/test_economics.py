"""The economics of a student: the worked cases, what must hold of every case, and the command."""

import dataclasses
import json
import math
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from diffusion_kd import errors
from eval import economics

TOO_LITTLE, HIGH, BETWEEN = (economics.EXAMPLES[name] for name in ("too-little-volume", "high-volume", "in-between"))

RANK = [economics.Outcome.DO_NOT, economics.Outcome.PILOT_FIRST, economics.Outcome.DISTIL]

CASES = st.builds(
    economics.Case,
    monthly_images=st.floats(1, 1e10),
    premium_usd=st.floats(0, 1),
    turbo_usd=st.floats(0, 0.1),
    project_usd=st.floats(0, 1e7),
    upkeep_usd=st.floats(0, 1e5),
    turbo_share=st.floats(0, 1),
    fallback_share=st.floats(0, 1),
    premium_utilisation=st.floats(0.01, 1),
    turbo_utilisation=st.floats(0.01, 1),
)


def changed(case: economics.Case, **values: float) -> economics.Case:
    return dataclasses.replace(case, **values)


# --- worked cases -----------------------------------------------------------------------------------


def test_too_little_volume_takes_twelve_and_a_half_years() -> None:
    assert TOO_LITTLE.monthly_images == 200_000 and TOO_LITTLE.project_usd == 300_000
    assert economics.monthly_saving_usd(TOO_LITTLE) == pytest.approx(2000)
    assert economics.payback_months(TOO_LITTLE) == pytest.approx(150)
    assert economics.payback_images(TOO_LITTLE) == pytest.approx(300_000 / 36 / 0.01)
    found = economics.verdict(TOO_LITTLE)
    assert found.outcome is economics.Outcome.DO_NOT
    assert found.because == (
        "The project is paid back in 12.5 years, or in 16.9 years if turbo's devices are half as busy and premium "
        "makes another 20 % of its requests again. From 834,000 images a month it is paid back within 3 years, "
        "and from 3.38 million images a month within 12 months in the worse case too."
    )


def test_high_volume_is_paid_back_within_two_months() -> None:
    assert economics.monthly_saving_usd(HIGH) == pytest.approx(492_000)
    assert economics.payback_months(HIGH) == pytest.approx(600 / 492)
    assert economics.break_even_images(HIGH) == pytest.approx(13_000 / 0.0101)
    worst = economics.worse(HIGH)
    assert economics.monthly_saving_usd(worst) == pytest.approx(50e6 * (0.011 * 0.8 - 0.0018) - 13_000)
    found = economics.verdict(HIGH)
    assert found.outcome is economics.Outcome.DISTIL
    assert "paid back in 1.2 months, or in 1.8 months if turbo's devices are half as busy" in found.because
    assert "from 9 million images a month within 12 months in the worse case too." in found.because
    assert "$492,000" in economics.text(HIGH)


def test_what_a_worse_case_would_not_bear_wants_a_pilot() -> None:
    assert economics.monthly_saving_usd(changed(BETWEEN, upkeep_usd=0)) == pytest.approx(89_600)
    assert economics.payback_months(BETWEEN) < 12 < economics.payback_months(economics.worse(BETWEEN))
    found = economics.verdict(BETWEEN)
    assert found.outcome is economics.Outcome.PILOT_FIRST
    assert "in 8.6 months, or in 13.6 months if" in found.because


def test_idle_devices_and_fallback_by_hand() -> None:
    """Half of 1,000 images from turbo: premium at 2 / 0.5 = 4, turbo at 0.3 / 0.1 = 3, a fifth of them made again."""
    case = economics.Case(
        monthly_images=1000,
        premium_usd=2,
        turbo_usd=0.3,
        project_usd=500,
        upkeep_usd=50,
        turbo_share=0.5,
        fallback_share=0.2,
        premium_utilisation=0.5,
        turbo_utilisation=0.1,
    )
    assert economics.image_usd(case) == pytest.approx((4, 3))
    assert economics.saved_per_image_usd(case) == pytest.approx(4 * 0.8 - 3)
    assert economics.monthly_saving_usd(case) == pytest.approx(500 * 0.2 - 50)
    assert economics.payback_months(case) == pytest.approx(10)
    assert economics.break_even_images(case) == pytest.approx(500)
    assert economics.payback_images(case, 5) == pytest.approx((50 + 100) / (0.5 * 0.2))
    assert economics.curve(case, 2) == pytest.approx((-500, -450, -400))


# --- verdicts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "because"),
    [
        ({"turbo_usd": 0.012}, "at no volume, as a turbo image ($0.012) costs no less than a premium one ($0.011)."),
        ({"turbo_usd": 0.011}, "at no volume, as a turbo image ($0.011) costs no less than a premium one ($0.011)."),
        ({"turbo_utilisation": 0.05}, "as a turbo image ($0.018) costs no less than a premium one ($0.011)."),
        ({"fallback_share": 0.95}, "as premium makes 95 % of turbo's requests again, at the cost of both."),
        ({"turbo_share": 0}, "at no volume, as no request goes to turbo."),
        ({"monthly_images": 1e6}, "is never paid back; from 2.94 million images a month it would be within 3 years."),
        ({"monthly_images": 1.8e6}, "From 2.94 million images a month it is paid back within 3 years,"),
    ],
)
def test_a_refusal_says_why_or_from_which_volume_it_would_pay(changes: dict[str, float], because: str) -> None:
    found = economics.verdict(changed(HIGH, **changes))
    assert found.outcome is economics.Outcome.DO_NOT and because in found.because


@settings(suppress_health_check=[HealthCheck.filter_too_much])  # many cases pay at no volume
@given(CASES)
def test_the_volumes_that_a_verdict_names_turn_it(case: economics.Case) -> None:
    least, sure = economics.payback_images(case), economics.payback_images(economics.worse(case), 12)
    assume(2 <= least <= sure <= 5e11 and case.project_usd >= 1)
    counts = (least * 0.9999, least * 1.000001, sure * 0.9999, sure * 1.000001)
    ranks = [RANK.index(economics.outcome(changed(case, monthly_images=count))) for count in counts]
    assert ranks[0] == 0 < ranks[1] and ranks[2] < ranks[3] == 2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"monthly_images": 833_334}, economics.Outcome.PILOT_FIRST),
        ({"monthly_images": 833_332}, economics.Outcome.DO_NOT),
        ({"project_usd": 24_000}, economics.Outcome.PILOT_FIRST),  # 12 months, and longer in the worse case
        ({"project_usd": 2000 * 36}, economics.Outcome.PILOT_FIRST),
        ({"project_usd": 2000 * 36.01}, economics.Outcome.DO_NOT),
        ({"project_usd": 12 * 200_000 * (0.0105 * 0.8 - 0.001)}, economics.Outcome.DISTIL),  # the worse case: 12 months
        ({"project_usd": 12.01 * 200_000 * (0.0105 * 0.8 - 0.001)}, economics.Outcome.PILOT_FIRST),
    ],
)
def test_the_limits_are_twelve_and_thirty_six_months(changes: dict[str, float], expected: economics.Outcome) -> None:
    assert economics.verdict(changed(TOO_LITTLE, **changes)).outcome is expected


def test_what_no_volume_makes_up_for_in_the_worse_case_wants_a_pilot() -> None:
    found = economics.verdict(changed(HIGH, turbo_utilisation=0.1))
    assert found.outcome is economics.Outcome.PILOT_FIRST
    assert ", or never if" in found.because
    assert found.because.endswith(", and at no volume within 12 months in the worse case too.")


def test_a_project_without_cost_is_paid_back_at_once_if_it_saves() -> None:
    free = changed(HIGH, project_usd=0, upkeep_usd=0)
    assert economics.payback_months(free) == 0 and economics.payback_images(free) == 0
    assert "is paid back at once, even if turbo's" in economics.verdict(free).because
    assert "At any volume it is paid back within 3 years" in economics.verdict(free).because
    assert economics.payback_months(changed(free, turbo_usd=0.011)) == math.inf
    assert economics.break_even_images(changed(free, turbo_usd=0.011)) == math.inf


@given(CASES)
def test_every_case_has_words(case: economics.Case) -> None:
    found = economics.verdict(case)
    assert found.because.endswith(".") and "inf" not in found.because and "nan" not in found.because
    shown = economics.text(case)
    assert shown.startswith(found.outcome.upper()) and max(map(len, shown.splitlines())) <= 100
    json.dumps(economics.to_dict(case), allow_nan=False)


def test_the_ends_of_every_range_have_words_too() -> None:
    for ends in (
        {"monthly_images": 1.0, "turbo_share": 5e-324},
        {"monthly_images": 1e12, "premium_usd": 1e6, "premium_utilisation": 1e-4, "project_usd": 1e12},
        {"turbo_usd": 1e6, "turbo_utilisation": 1e-4, "fallback_share": 1.0, "upkeep_usd": 1e12},
        {"turbo_usd": 5e-324, "premium_usd": 5e-324, "project_usd": 5e-324, "upkeep_usd": 0.0},
    ):
        shown = economics.text(changed(HIGH, **ends))
        assert "inf" not in shown and "nan" not in shown and "E+" not in shown


# --- what holds of every case -----------------------------------------------------------------------


@given(CASES)
def test_payback_times_saving_is_the_project(case: economics.Case) -> None:
    saving_usd = economics.monthly_saving_usd(case)
    assume(saving_usd <= 0 or saving_usd > 1e-300)  # a payback that a float can hold
    if saving_usd <= 0:
        assert economics.payback_months(case) == math.inf
        assert economics.outcome(case) is economics.Outcome.DO_NOT
    else:
        assert economics.payback_months(case) * saving_usd == pytest.approx(case.project_usd)


@given(CASES)
def test_at_the_break_even_volume_a_month_saves_nothing(case: economics.Case) -> None:
    count = economics.break_even_images(case)
    assume(1 <= count <= 1e12)
    saving_usd = economics.monthly_saving_usd(changed(case, monthly_images=count))
    assert saving_usd == pytest.approx(0, abs=1e-9 * case.upkeep_usd)


@given(CASES, st.sampled_from([12, 36]))
def test_the_payback_volume_pays_back_in_just_that_time(case: economics.Case, months: int) -> None:
    count = economics.payback_images(case, months)
    assume(1 <= count <= 1e12 and case.project_usd >= 1)
    at = changed(case, monthly_images=count)
    assert economics.payback_months(at) == pytest.approx(months, rel=1e-6)


def test_the_last_bits_of_a_float_do_not_turn_a_verdict() -> None:
    for project_usd in range(1000, 200_000, 1000):
        case = changed(HIGH, project_usd=project_usd)
        at = changed(case, monthly_images=economics.payback_images(case))
        assert economics.outcome(at) is economics.Outcome.PILOT_FIRST


@given(CASES)
def test_the_curve_is_a_line_that_crosses_zero_at_the_payback(case: economics.Case) -> None:
    net_usd = economics.curve(case)
    assert len(net_usd) == 37 and net_usd[0] == -case.project_usd
    saving_usd = economics.monthly_saving_usd(case)
    for month in (1, 17, 36):
        assert net_usd[month] == pytest.approx(saving_usd * month - case.project_usd)
    assert (net_usd[-1] >= 0) == (saving_usd * 36 >= case.project_usd)


@given(CASES, st.floats(1, 100))
def test_more_volume_is_never_worse_where_an_image_saves(case: economics.Case, factor: float) -> None:
    assume(economics.saved_per_image_usd(case) >= 0)
    more = changed(case, monthly_images=case.monthly_images * factor)
    assert economics.monthly_saving_usd(more) >= economics.monthly_saving_usd(case)
    assert economics.payback_months(more) <= economics.payback_months(case)
    assert RANK.index(economics.outcome(more)) >= RANK.index(economics.outcome(case))


@given(CASES, st.floats(0, 1), st.sampled_from(["fallback_share", "turbo_utilisation", "upkeep_usd"]))
def test_no_verdict_is_better_with_more_fallback_idle_time_or_upkeep(
    case: economics.Case, part: float, name: str
) -> None:
    own = getattr(case, name)
    value = {
        "fallback_share": own + part * (1 - own),
        "turbo_utilisation": max(own * part, 0.001),
        "upkeep_usd": own + 1e5 * part,
    }[name]
    assume(name != "turbo_utilisation" or value <= own)
    harder = changed(case, **{name: min(value, 1.0) if name != "upkeep_usd" else value})
    assert RANK.index(economics.outcome(harder)) <= RANK.index(economics.outcome(case))


# --- sensitivity ------------------------------------------------------------------------------------


def test_rows_go_from_best_to_worst_and_hold_the_case_s_own() -> None:
    case = changed(HIGH, turbo_utilisation=0.3, fallback_share=0.15)
    tables = economics.sensitivity(case)
    assert [row.value for row in tables.turbo_utilisation] == [1, 0.75, 0.5, 0.3, 0.25, 0.1, 0.05]
    assert [row.value for row in tables.fallback_share] == [0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5]
    for rows in (tables.turbo_utilisation, tables.fallback_share):
        (own,) = (row for row in rows if row.own)
        assert own.monthly_saving_usd == economics.monthly_saving_usd(case)
        assert own.payback_months == economics.payback_months(case) and own.outcome is economics.outcome(case)
        savings_usd = [row.monthly_saving_usd for row in rows]
        assert savings_usd == sorted(savings_usd, reverse=True)
    assert len(economics.sensitivity(HIGH).fallback_share) == 6


def test_a_row_changes_that_input_alone() -> None:
    case = changed(HIGH, turbo_utilisation=0.3, fallback_share=0.15)
    row = economics.sensitivity(case).turbo_utilisation[-1]
    expected = 50e6 * (0.011 * 0.85 - 0.0009 / 0.05) - 13_000
    assert row.value == 0.05 and row.monthly_saving_usd == pytest.approx(expected)
    assert row.outcome is economics.Outcome.DO_NOT and row.payback_months == math.inf


# --- inputs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((field, bad) for field in economics.FIELDS for bad in (math.nan, math.inf, -1, -0.001, None, "1", True)),
        ("monthly_images", 0),
        ("monthly_images", 1.1e12),
        ("turbo_share", 1.01),
        ("fallback_share", 1.01),
        ("premium_utilisation", 0),
        ("turbo_utilisation", 1.5),
    ],
)
def test_what_cannot_be_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(errors.ConfigError, match=f"^{name} is {value!r}; it must be "):
        changed(HIGH, **{name: value})


def test_every_input_is_explained() -> None:
    assert list(economics.FIELDS) == [field.name for field in dataclasses.fields(economics.Case)]


# --- for people -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("usd", "shown"),
    [
        (491_999.9999999999, "$492,000"),
        (12.5, "$12.50"),
        (0.5, "$0.50"),
        (0.0018, "$0.0018"),
        (1_005_000, "$1,010,000"),
        (-86.7, "-$86.70"),
        (0, "$0"),
        (-1e-300, "$0"),
        (99.999, "$100"),
    ],
)
def test_money(usd: float, shown: str) -> None:
    assert economics.money(usd) == shown


@pytest.mark.parametrize(
    ("months", "shown"),
    [
        (0, "at once"),
        (0.01, "a day"),
        (1, "1 month"),
        (1.2195, "1.2 months"),
        (12, "12 months"),
        (12.01, "just over 12 months"),
        (23.97, "2 years"),
        (36, "3 years"),
        (36.1, "just over 3 years"),
        (150, "12.5 years"),
        (1201, "over 100 years"),
        (math.inf, "never"),
    ],
)
def test_duration(months: float, shown: str) -> None:
    assert economics.duration(months) == shown


def test_volumes_are_rounded_up_so_that_they_suffice() -> None:
    assert economics.images(833_333.3) == "834,000"
    assert economics.images(1_201_000) == "1.21 million"
    assert economics.images(1_200_000.0000001) == "1.2 million"
    assert economics.images(2.5e9) == "2.5 billion"
    assert economics.images(0.3) == "1"


def test_percent() -> None:
    shares = (1, 0.918, 0.0005, 0, 5e-324, 0.0512)
    assert [economics.percent(share) for share in shares] == ["100 %", "91.8 %", "0.05 %", "0 %", "0 %", "5.1 %"]


# --- the command ------------------------------------------------------------------------------------

ARGUMENTS = [
    *("--monthly-images", "50e6", "--premium-usd", ".011", "--turbo-usd", ".0009"),
    *("--project-usd", "600_000", "--upkeep-usd", "13000"),
]


def test_the_command_shows_the_verdict_first_and_then_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert economics.main(ARGUMENTS) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert lines[0] == "DISTIL"
    assert "saved a month         $492,000 after upkeep" in lines
    assert "a turbo image         $0.0009, 91.8 % less" in lines
    assert "break-even            from 1.29 million images a month" in lines
    assert "pays back in 3 years  from 2.94 million images a month" in lines
    assert "net after year 3      $17,100,000" in lines
    assert [line.split()[0] for line in lines if line.endswith("(this case)")] == ["100", "0"]
    assert not any(line != line.rstrip() for line in lines)


def test_an_example_is_a_case_and_can_be_changed(capsys: pytest.CaptureFixture[str]) -> None:
    assert economics.main(["--example", "high-volume"]) == 0
    whole = capsys.readouterr().out
    assert economics.main(ARGUMENTS) == 0
    assert capsys.readouterr().out == whole
    assert economics.main(["--example", "high-volume", "--monthly-images", "1e6", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["case"]["monthly_images"] == 1e6


def test_any_verdict_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert [economics.main(["--example", name]) for name in economics.EXAMPLES] == [0, 0, 0]
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if line.isupper()] == ["DO NOT", "DISTIL", "PILOT FIRST"]


def test_json_holds_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert economics.main([*ARGUMENTS, "--json", "--turbo-usd", "0.02"]) == 0
    found = json.loads(capsys.readouterr().out)
    case = changed(HIGH, turbo_usd=0.02)
    assert found["case"] == dataclasses.asdict(case)
    assert found["payback_months"] is found["break_even_images"] is found["payback_images"] is None
    assert found["verdict"]["outcome"] == "do not" and set(found["verdict"]) == {"outcome", "because"}
    assert found["monthly_saving_usd"] == pytest.approx(50e6 * -0.009 - 13_000)
    assert found["net_usd"] == list(economics.curve(case)) and found["horizon_months"] == 36
    assert found["sensitivity"]["turbo_utilisation"][-1]["payback_months"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no value for --monthly-images, --premium-usd, --turbo-usd, --project-usd, --upkeep-usd"),
        (ARGUMENTS[:-2], "no value for --upkeep-usd; give one, 0 if it costs nothing"),
        ([*ARGUMENTS, "--turbo-utilisation", "0"], "turbo_utilisation is 0.0; it must be a share of the time from"),
        ([*ARGUMENTS, "--monthly-images", "nan"], "monthly_images is nan"),
    ],
)
def test_what_cannot_be_weighed_is_one_sentence_and_a_3(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert economics.main(arguments) == 3
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and words in shown.err and shown.err.count("\n") == 1 and not shown.out


def test_what_is_no_number_is_a_3_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        economics.main([*ARGUMENTS, "--project-usd", "much"])
    assert ended.value.code == 3 and "--project-usd: invalid float value: 'much'" in capsys.readouterr().err


def test_the_docs_show_what_the_command_says(capsys: pytest.CaptureFixture[str]) -> None:
    page = (pathlib.Path(__file__).parents[2] / "docs/economics.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"```\n\$ python -m eval.economics --example (\S+)\n(.*?)```", page, re.DOTALL))
    assert list(shown) == list(economics.EXAMPLES)
    for name, expected in shown.items():
        assert economics.main(["--example", name]) == 0
        assert capsys.readouterr().out == expected


def test_the_command_starts_without_what_an_evaluation_needs() -> None:
    loaded = "import sys, eval.economics; sys.exit(' '.join({'eval.run', 'torchvision', 'scipy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=False)
    assert (done.stderr.strip(), done.stdout) == ("", "")
