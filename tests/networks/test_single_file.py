"""SDXL checkpoints of one file: the same model as the folder, and a clear word on every file that is none."""

import logging
import pathlib

import huggingface_hub
import pytest
import safetensors.torch
import torch

from diffusion_kd import artifact, errors, pipeline
from diffusion_kd.networks import sdxl, single_file
from tests import original_naming

EMPTY = torch.zeros(0)

# diffusers' Euler scheduler asks numpy for an array in numpy 1's way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with an SDXL pipeline a few channels wide in `base`, and the same as one file."""
    folder = tmp_path_factory.mktemp("narrow")
    torch.manual_seed(0)
    parts = sdxl.build_parts("cpu", original_naming.NARROW)
    # Norms and biases begin all alike, and weights that were exchanged would not show.
    for weight in (*parts.unet.parameters(), *parts.vae.parameters(), *parts.text.parameters()):
        weight.add_(0.02 * torch.randn_like(weight))
    artifact.save_pipeline(folder / "base", parts=parts)
    original_naming.save(folder / "model.safetensors", parts, dtype=torch.float16)
    return folder


def rewrite(
    narrow: pathlib.Path,
    path: pathlib.Path,
    *,
    drop: str = "-",
    extra: dict[str, torch.Tensor] | None = None,
    metadata: dict[str, str] | None = None,
) -> str:
    """The single file once more, without the tensors whose names begin with `drop`, with others."""
    weights = safetensors.torch.load_file(narrow / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith(drop)} | (extra or {})
    safetensors.torch.save_file(kept, path, metadata)
    return str(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_a_file_is_its_folder(narrow: pathlib.Path, dtype: torch.dtype) -> None:
    alone = artifact.load(str(narrow / "model.safetensors"), dtype=dtype, base=str(narrow / "base"))
    folder = artifact.load(str(narrow / "base"), dtype=dtype)
    assert alone.unet.dtype == dtype and alone.vae.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    for one, other in ((alone.unet, folder.unet), (alone.vae, folder.vae), (alone.text, folder.text)):
        ours, theirs = one.state_dict(), other.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
        assert all(weight.dtype == theirs[name].dtype for name, weight in ours.items())
        assert not any(weight.requires_grad for weight in one.parameters()) and not one.training
    cond, other_cond = (parts.text.encode(["a cat"], (32, 32)) for parts in (alone, folder))
    assert torch.equal(cond.prompt_embeds, other_cond.prompt_embeds) and torch.equal(cond.pooled, other_cond.pooled)


def test_the_names_are_those_of_the_true_checkpoint() -> None:
    """A few of sd_xl_base_1.0.safetensors', and how many tensors its U-Net has."""
    names = {original_naming._unet(name) for name in sdxl.build_unet().state_dict()}
    assert len(names) == 1680
    assert names >= {
        "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight",
        "input_blocks.6.0.op.weight",
        "middle_block.1.transformer_blocks.9.ff.net.0.proj.weight",
        "output_blocks.5.2.conv.weight",
        "output_blocks.8.0.skip_connection.weight",
        "label_emb.0.2.bias",
    }


@pytest.mark.parametrize(
    ("extra", "metadata", "kind", "rescaled", "told_by"),
    [
        ({}, None, "epsilon", False, "base"),
        ({"v_pred": EMPTY}, None, "v_prediction", False, "the key v_pred"),
        ({"v_pred": EMPTY, "ztsnr": EMPTY}, None, "v_prediction", True, "the key v_pred"),
        ({}, {"modelspec.prediction_type": "v"}, "v_prediction", False, "modelspec.prediction_type"),
        ({"v_pred": EMPTY}, {"modelspec.prediction_type": "epsilon"}, "v_prediction", False, "the key v_pred"),
    ],
    ids=["nothing", "v_pred", "v_pred-ztsnr", "metadata", "contradiction"],
)
def test_what_a_file_predicts_is_found_and_said(
    narrow: pathlib.Path,
    tmp_path: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
    extra: dict[str, torch.Tensor],
    metadata: dict[str, str] | None,
    kind: str,
    rescaled: bool,
    told_by: str,
) -> None:
    caplog.set_level(logging.INFO)
    path = rewrite(narrow, tmp_path / "model.safetensors", extra=extra, metadata=metadata)
    parts = artifact.load(path, base=str(narrow / "base"))
    assert parts.denoiser().prediction_type == kind
    assert parts.denoiser().schedule.zero_terminal_signal == rescaled
    assert parts.scheduler.config.timestep_spacing == ("trailing" if rescaled else "leading")
    (said,) = caplog.messages
    assert f"predicts {kind}, says" in said and said.endswith(told_by)
    planned = artifact.architecture(path, base=str(narrow / "base"))
    assert planned.scheduler.config == parts.scheduler.config


def test_a_prediction_type_that_nobody_knows_is_refused(narrow: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path = rewrite(narrow, tmp_path / "model.safetensors", metadata={"modelspec.prediction_type": "flow"})
    with pytest.raises(errors.ModelError, match="'flow' is not supported"):
        artifact.load(path, base=str(narrow / "base"))


def test_a_file_of_velocity_samples(narrow: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path = rewrite(narrow, tmp_path / "model.safetensors", extra={"v_pred": EMPTY, "ztsnr": EMPTY})
    velocity = pipeline.TeacherPipeline(artifact.load(path, base=str(narrow / "base")))(["a cat"], [0], steps=3)
    noise = pipeline.load_teacher(str(narrow / "base"))(["a cat"], [0], steps=3)
    assert bool(velocity.isfinite().all()) and float((velocity - noise).abs().mean()) > 0.01


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight"], "no U-Net, .* looks like one of a LoRA"),
        (["unet.down_blocks.1.attentions.0.proj_in.lora_A.weight"], "looks like one of a LoRA"),
        (["unet.down_blocks.1.attentions.0.processor.to_q_lora.down.weight"], "looks like one of a LoRA"),
        (
            ["model.diffusion_model.out.2.bias", "first_stage_model.x", "cond_stage_model.transformer.text_model.y"],
            "no first text encoder, no second text encoder, and looks like one of Stable Diffusion 1",
        ),
        (["model.diffusion_model.out.2.bias", "cond_stage_model.model.ln_final.bias"], "Stable Diffusion 2"),
        (["model.diffusion_model.joint_blocks.0.x"], "Stable Diffusion 3"),
        (["encoder.conv_in.weight", "decoder.conv_in.weight"], "no U-Net, .* looks like one of an autoencoder alone"),
        (["first_stage_model.encoder.conv_in.weight"], "looks like one of an autoencoder alone"),
        (["down_blocks.0.resnets.0.conv1.weight"], "in diffusers' naming; give the pipeline's folder"),
        (["model.diffusion_model.out.2.bias", "conditioner.embedders.0.model.ln_final.bias"], "SDXL's refiner"),
        (["something.else"], "no second text encoder$"),
    ],
)
def test_a_file_of_another_kind_says_what_it_is(tmp_path: pathlib.Path, names: list[str], message: str) -> None:
    path = tmp_path / "file.safetensors"
    safetensors.torch.save_file({name: torch.zeros(1) for name in names}, path)
    for look in (artifact.load, artifact.architecture):
        with pytest.raises(errors.ModelError, match=f"no SDXL checkpoint in its original naming.*{message}"):
            look(str(path))


def test_a_file_of_the_edm_kind_is_refused(narrow: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path = rewrite(narrow, tmp_path / "file.safetensors", extra={"edm_mean": EMPTY})
    with pytest.raises(errors.ModelError, match=r"of the EDM kind \(it holds edm_mean\)"):
        artifact.load(path, base=str(narrow / "base"))


@pytest.mark.parametrize("kept", [0, 4, 1000, 100_000])
def test_a_file_cut_short_is_an_error_of_ours(narrow: pathlib.Path, tmp_path: pathlib.Path, kept: int) -> None:
    path, whole = tmp_path / "model.safetensors", (narrow / "model.safetensors").read_bytes()
    path.write_bytes(whole[:kept])
    with pytest.raises(errors.ModelError, match=r"cut short or no safetensors file .*fetch it again"):
        artifact.load(str(path), base=str(narrow / "base"))
    path.write_bytes(whole[:-1])
    with pytest.raises(errors.ModelError, match="cut short"):
        artifact.load(str(path), base=str(narrow / "base"))


def test_a_file_that_is_not_there_says_so(tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.ModelError, match=r"no file .*model\.safetensors"):
        artifact.load(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    "lost",
    [
        "model.diffusion_model.middle_block.1.norm.bias",
        "model.diffusion_model.label_emb.0.2.bias",
        "first_stage_model.decoder.up.1.block.0.conv1.bias",
        "conditioner.embedders.0.transformer.text_model.encoder.layers.1.mlp.fc1.bias",
        "conditioner.embedders.1.model.transformer.resblocks.2.mlp.c_fc.bias",
        "conditioner.embedders.1.model.text_projection",
    ],
)
def test_a_weight_that_a_file_lacks_is_named(narrow: pathlib.Path, tmp_path: pathlib.Path, lost: str) -> None:
    path = rewrite(narrow, tmp_path / "model.safetensors", drop=lost)
    with pytest.raises(errors.ModelError, match=r"lacks (1 weights|the weight 'label_emb\.0\.2\.bias')"):
        artifact.load(path, base=str(narrow / "base"))


def test_weights_beyond_the_base_or_of_another_shape_are_named(narrow: pathlib.Path, tmp_path: pathlib.Path) -> None:
    inpainting = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(16, 9, 3, 3)}
    path = rewrite(narrow, tmp_path / "shape.safetensors", extra=inpainting)
    with pytest.raises(errors.ModelError, match=r"conv_in.weight is \(16, 9, 3, 3\) and in its base \(16, 4, 3, 3\)"):
        artifact.load(path, base=str(narrow / "base"))
    more = {"model.diffusion_model.middle_block.1.transformer_blocks.9.norm1.bias": torch.zeros(64)}
    path = rewrite(narrow, tmp_path / "more.safetensors", extra=more)
    with pytest.raises(errors.ModelError, match="unet has 1 weights more than its base"):
        artifact.load(path, base=str(narrow / "base"))


def test_a_weight_that_is_not_finite_is_named(narrow: pathlib.Path, tmp_path: pathlib.Path) -> None:
    broken = {"model.diffusion_model.out.2.bias": torch.full((4,), torch.nan)}
    path = rewrite(narrow, tmp_path / "model.safetensors", extra=broken)
    with pytest.raises(
        errors.ModelError, match=r"unet: conv_out.bias holds NaN or infinite values; the file is damaged"
    ):
        artifact.load(path, base=str(narrow / "base"))


def test_a_base_that_cannot_be_had_says_what_would_do(
    narrow: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(name: str, **options: object) -> None:
        raise OSError(f"cannot reach the hub for {name}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    path = str(narrow / "model.safetensors")
    with pytest.raises(errors.ModelError, match=r"for stabilityai/.*give the folder of an SDXL pipeline as base"):
        artifact.load(path)
    (tmp_path / "unet").mkdir()
    with pytest.raises(errors.ModelError, match=r"has no vae/.*give the folder of an SDXL pipeline as base"):
        artifact.load(path, base=str(tmp_path))


def test_weights_in_the_precision_asked_for_are_not_copied(
    narrow: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = safetensors.torch.load_file(narrow / "model.safetensors")
    monkeypatch.setattr(single_file.safetensors.torch, "load_file", lambda path: loaded)
    networks = single_file.load(narrow / "model.safetensors", narrow / "base", torch.float16)
    ours = networks.unet.mid_block.attentions[0].proj_in.weight
    assert ours.data_ptr() == loaded["model.diffusion_model.middle_block.1.proj_in.weight"].data_ptr()
    clip = dict(networks.text_encoder.named_parameters())
    (ours,) = (weight for name, weight in clip.items() if name.endswith("layers.1.mlp.fc1.weight"))
    name = "conditioner.embedders.0.transformer.text_model.encoder.layers.1.mlp.fc1.weight"
    assert ours.data_ptr() == loaded[name].data_ptr()
