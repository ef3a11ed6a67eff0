"""Configs: what is unknown or malformed is refused by name."""

import dataclasses
import pathlib

import pytest

from diffusion_kd import errors
from training import config, distill, teacher


@pytest.mark.parametrize(("schema", "name"), [(teacher.TeacherConfig, "shapes"), (distill.DistillConfig, "shapes_add")])
def test_shipped_configs_are_valid(schema: type, name: str) -> None:
    assert isinstance(config.load(schema, name), schema)


def test_every_shipped_config_belongs_to_a_command() -> None:
    for path in config.FOLDER.glob("*.yaml"):
        loaded = []
        for schema in (teacher.TeacherConfig, distill.DistillConfig):
            try:
                loaded.append(config.load(schema, str(path)))
            except errors.ConfigError:
                continue
        assert loaded, path


def test_overrides_reach_nested_keys() -> None:
    loaded = config.load(
        distill.DistillConfig,
        "shapes_add",
        ["objective.weighting=sds", "training.images=320", "objective.teacher_guidance=[3,8]"],
    )
    assert (loaded.objective.weighting, loaded.training.images, loaded.objective.teacher_guidance) == (
        "sds",
        320,
        [3.0, 8.0],
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lamda=2", "unknown config key 'lamda'"),
        ("objective.lamda=2", "unknown config key 'objective.lamda'"),
        ("objective.weighting=huber", "weighting is 'huber'"),
        ("objective.student_steps=5", "1 to 4 steps, not 5"),
        ("objective.student_steps=0", "1 to 4 steps, not 0"),
        ("training.images=many", "images"),
        ("training.images=0", "at least one batch"),
        ("seed", "not of the form key=value"),
    ],
)
def test_bad_overrides_are_named(override: str, message: str) -> None:
    with pytest.raises(errors.ConfigError, match=message):
        config.load(distill.DistillConfig, "shapes_add", [override])


def test_an_unknown_config_lists_the_known() -> None:
    with pytest.raises(errors.ConfigError, match="shapes_add"):
        config.load(distill.DistillConfig, "nowhere")


def test_a_file_that_is_no_table_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(errors.ConfigError, match="holds a list"):
        config.load(distill.DistillConfig, str(tmp_path / "list.yaml"))
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(errors.ConfigError):
        config.load(distill.DistillConfig, str(tmp_path / "broken.yaml"))


def test_a_saved_config_loads_to_itself(tmp_path: pathlib.Path) -> None:
    original = config.load(distill.DistillConfig, "shapes_add", ["objective.terminal_probability=0.5"])
    config.save(original, tmp_path / "config.yaml")
    assert dataclasses.asdict(config.load(distill.DistillConfig, str(tmp_path / "config.yaml"))) == dataclasses.asdict(
        original
    )


@pytest.mark.parametrize(
    ("override", "message"), [("prediction_type=sample", "epsilon or v_prediction"), ("stages=[unett]", "unett")]
)
def test_bad_teachers_are_named(override: str, message: str) -> None:
    with pytest.raises(errors.ConfigError, match=message):
        config.load(teacher.TeacherConfig, "shapes", [override])
