"""Configs: what is unknown or malformed is refused by name."""

import dataclasses
import pathlib

import pytest

from diffusion_kd import errors
from training import config, demo, distill, finetune, teacher


@pytest.mark.parametrize(("schema", "name"), [(teacher.TeacherConfig, "shapes"), (distill.DistillConfig, "shapes_add")])
def test_shipped_configs_are_valid(schema: type, name: str) -> None:
    assert isinstance(config.load(schema, name), schema)


def test_every_shipped_config_belongs_to_a_command() -> None:
    for path in config.FOLDER.glob("*.yaml"):
        loaded = []
        for schema in (teacher.TeacherConfig, distill.DistillConfig, finetune.FineTuneConfig):
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
        ("objective.student_steps=5", "must be 1, 2 or 4, not 5"),
        ("objective.student_steps=3", "must be 1, 2 or 4, not 3"),
        ("objective.student_steps=0", "must be 1, 2 or 4, not 0"),
        ("training.images=many", "images"),
        ("precision=fp16", "fp32 or bf16"),
        ("seed=-1", "seed is -1"),
        ("scenes=3", "4 or more"),
        ("discriminator_learning_rate=0", "discriminator_learning_rate is 0"),
        ("feature_network=open_clip:ViT-B-32", "open_clip:ARCHITECTURE:WEIGHTS"),
        ("objective.weighting=nfsd", "negative_prompt is ''"),
        ("training.images=0", "at least one batch"),
        ("seed", "not of the form key=value"),
        ("=5", "not of the form key=value"),
        ("seed=99999999999999999999", "below 2"),
        ("objective.teacher_guidance=[1", "override 'objective.teacher_guidance"),
        ("objective=5", r"objective is 5; it is a group of keys, to be given as objective\.student_steps=VALUE"),
        ("training=[1]", r"training is \[1\]; it is a group of keys"),
        (
            "objective.teacher_guidance=2",
            r"objective\.teacher_guidance is 2; it must be a list, as \[a, b\], each a number",
        ),
        ("objective.teacher_guidance=[a]", r"objective\.teacher_guidance is \['a'\]; it must be a list"),
        ("objective.teacher_guidance={a: 1}", r"objective\.teacher_guidance is \{'a': 1\}; it must be a list"),
        ("negative_prompt=${nothing}", "negative_prompt has no value"),
        ("training.trackers[0]=a", "training.trackers is .*; it must be a list"),
        ("training.trackers=[[a]]", "a list of names"),
        ("compile=maybe", "compile is 'maybe'; it must be true or false"),
        ("compile=2", "compile is 2; it must be true or false"),
        ("seed=1.5", "seed is 1.5; it must be a whole number"),
        ("seed=null", "seed is None; it must be a whole number"),
    ],
)
def test_bad_overrides_are_named(override: str, message: str) -> None:
    with pytest.raises(errors.ConfigError, match=message):
        config.load(distill.DistillConfig, "shapes_add", [override])


@pytest.mark.parametrize(
    "text", ["seed: 2020-01-01", "null: 3", "precision: ${", "training: &t\n  images: *t", "training: !!set {a, b}"]
)
def test_yaml_that_no_config_can_hold_is_named(text: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(errors.ConfigError, match=r"own\.yaml holds what no config can"):
        config.load(distill.DistillConfig, str(tmp_path / "own.yaml"))


def test_another_run_is_told_in_few_words(tmp_path: pathlib.Path) -> None:
    config.claim(tmp_path, {"identity": "a" * 5000}, write=True)
    with pytest.raises(errors.ConfigError, match="identity") as told:
        config.claim(tmp_path, {"identity": "b" * 5000}, write=True)
    assert len(str(told.value)) < 500


def test_of_two_values_the_one_that_does_not_fit_is_named() -> None:
    with pytest.raises(errors.ConfigError, match=r"seed is 1\.5;"):
        config.load(distill.DistillConfig, "shapes_add", ["seed=1.5", "seed=2"])


def test_an_unknown_config_lists_the_known() -> None:
    with pytest.raises(errors.ConfigError, match="shapes_add"):
        config.load(distill.DistillConfig, "nowhere")


def test_a_file_that_is_no_table_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(errors.ConfigError, match="holds a list"):
        config.load(distill.DistillConfig, str(tmp_path / "list.yaml"))
    for content in (b"a: [1\n", "seed: 1 # W\u00fcrfel".encode("latin-1")):
        (tmp_path / "broken.yaml").write_bytes(content)
        with pytest.raises(errors.ConfigError, match=r"broken\.yaml is not YAML in UTF-8"):
            config.load(distill.DistillConfig, str(tmp_path / "broken.yaml"))


def test_a_saved_config_loads_to_itself(tmp_path: pathlib.Path) -> None:
    original = config.load(distill.DistillConfig, "shapes_add", ["objective.terminal_probability=0.5"])
    config.save(original, tmp_path / "config.yaml")
    assert dataclasses.asdict(config.load(distill.DistillConfig, str(tmp_path / "config.yaml"))) == dataclasses.asdict(
        original
    )


@pytest.mark.parametrize("stages", ["contrastive,vae,unet", "contrastive,vae,decoder", "vae", "vae,decoder"])
def test_stages_may_be_left_out_where_nothing_needs_them(stages: str) -> None:
    assert config.load(teacher.TeacherConfig, "shapes", [f"stages=[{stages}]"]).stages == stages.split(",")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prediction_type=sample", "epsilon or v_prediction"),
        ("seed=-1", "seed is -1"),
        ("scenes=3", "scenes is 3"),
        ("caption_dropout=2", "caption_dropout is 2"),
        ("kl_weight=nan", "kl_weight is nan"),
        ("stages=[unett]", "unett"),
        ("stages=[]", "at least one"),
        ("stages=[vae,contrastive]", "in the order"),
        ("stages=[vae,vae]", "each once"),
        ("stages=[contrastive,decoder]", "decoder needs vae"),
        ("stages=[contrastive,unet]", "unet needs vae"),
        ("stages=[vae,unet]", "unet needs contrastive"),
    ],
)
def test_bad_teachers_are_named(override: str, message: str) -> None:
    with pytest.raises(errors.ConfigError, match=message):
        config.load(teacher.TeacherConfig, "shapes", [override])


def test_a_folder_remembers_what_its_run_started_from(tmp_path: pathlib.Path) -> None:
    config.claim(tmp_path / "run", {"teacher": "a", "seed": 0}, write=False)
    assert not (tmp_path / "run").exists()
    for _ in range(2):
        config.claim(tmp_path / "run", {"teacher": "a", "seed": 0}, write=True)
    with pytest.raises(errors.ConfigError, match="a run with teacher = 'a', not 'b'"):
        config.claim(tmp_path / "run", {"teacher": "b", "seed": 0}, write=True)
    for damaged in ("{", "[]"):
        (tmp_path / "run" / "origin.json").write_text(damaged)
        with pytest.raises(errors.ConfigError, match=r"origin\.json cannot be read"):
            config.claim(tmp_path / "run", {"teacher": "a", "seed": 0}, write=True)


def test_the_demo_is_adversarial() -> None:
    loaded = config.load(distill.DistillConfig, "shapes_add_plus", demo.SHORT)
    assert loaded.objective.latent_weight > 0 and loaded.objective.distillation_weight > 0


def test_a_bare_off_is_the_word_and_not_a_truth_value() -> None:
    assert config.load(distill.DistillConfig, "shapes_add", ["training.health=off"]).training.health == "off"
