"""Settings: each is documented, and a malformed one is told in one line."""

import pathlib

import pytest

from diffusion_kd import errors
from serve import __main__ as entry
from serve import build, command, settings

OPERATIONS = (pathlib.Path(__file__).parents[2] / "docs" / "operations.md").read_text()


def read(*options: str) -> settings.Settings:
    """The settings of a command line."""
    return command.settings(entry._parser().parse_args(options))


def fields() -> list[str]:
    tiers = {**settings.TurboSettings.model_fields, **settings.PremiumSettings.model_fields}
    return [*settings.Settings.model_fields, *tiers]


@pytest.mark.parametrize("field", fields())
def test_every_setting_is_in_the_operators_table(field: str) -> None:
    rows = [line.split("|")[1] for line in OPERATIONS.splitlines() if line.startswith("| `")]
    assert any(f"`{field}`" in row for row in rows)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("PORT", "eighty", "setting port: "),
        ("TURBO_TIER__MAX_BATCH", "0", "setting turbo_tier.max_batch: "),
        ("TURBO_TIER__SIZES", "512x512", "a list is given as JSON"),
        ("PREMIUM_TIER__SPEED", "3", "setting premium_tier.speed: "),
        ("ADMIN_KEY", "hunter2", "setting admin_key: Value should have at least 16 characters"),
        ("IMAGE_TTL_S", "1e12", "setting image_ttl_s: "),
        ("HOST", "", "setting host: "),
        ("IMAGE_TTL", "5", "DIFFUSION_KD_IMAGE_TTL is no setting"),
    ],
)
def test_a_malformed_setting_is_told(name: str, value: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"DIFFUSION_KD_{name}", value)
    with pytest.raises(errors.ConfigError) as caught:
        read()
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--monthly-budget-usd", "nan"),
        ("--monthly-budget-usd", "-1"),
        ("--monthly-budget-usd", "1e30"),
        ("--requests-per-minute", "-1"),
        ("--requests-per-minute", str(10**20)),
        ("--scopes", "generate,root"),
        ("--name", ""),
        ("--name", "two\nlines"),
    ],
)
def test_a_key_of_the_command_line_has_the_rules_of_the_api(option: str, value: str) -> None:
    given = entry._parser().parse_args(["keys", "create", "--name", "n", f"{option}={value}"])
    with pytest.raises(errors.ConfigError, match=option) as caught:
        entry._key_body(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("folder", ["a file", "a file/below"])
def test_a_data_folder_that_cannot_be_made_is_told(folder: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "a file").write_text("")
    with pytest.raises(errors.ConfigError, match="is a file"):
        build.open_store(settings.Settings(data_folder=tmp_path / folder))


def test_what_is_given_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSION_KD_PORT", "1234")
    monkeypatch.setenv("DIFFUSION_KD_TURBO_TIER__MAX_BATCH", "3")
    assert read().port == 1234 and read("--port", "5").port == 5
    assert read().turbo_tier.max_batch == 3


@pytest.mark.parametrize(
    ("host", "loopback"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False)]
)
def test_which_hosts_are_this_machine_alone(host: str, loopback: bool) -> None:
    assert settings.Settings(host=host).loopback is loopback
