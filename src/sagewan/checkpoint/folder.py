"""A diffusers folder of a Wan model → what it is, as values. Reads JSON and headers; no torch.

The layout is the one diffusers' ``save_pretrained`` writes: ``model_index.json`` names the
components, each in a folder of its own with a config and safetensors weights. A folder may add
``sagewan.json`` (the settings it was trained for) and ``vocabulary.json`` (the words it knows).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sagewan.checkpoint.architecture import Architecture
from sagewan.checkpoint.describe import Traits, is_published, model_of, nearest
from sagewan.checkpoint.files import read_json, tensor_files
from sagewan.checkpoint.infer import config_of, main_dtypes, quantized_as
from sagewan.checkpoint.roles import IMAGE_ENCODER, TEXT_ENCODER, TRANSFORMER, VAE
from sagewan.checkpoint.source import open_source
from sagewan.errors import CheckpointError
from sagewan.plan.models import Model, Sampling
from sagewan.plan.request import SCHEDULERS

TRANSFORMERS = ("transformer", "transformer_2")
WITH_WEIGHTS = {*TRANSFORMERS, VAE, TEXT_ENCODER, IMAGE_ENCODER}
PARTS = (*TRANSFORMERS, VAE, TEXT_ENCODER, "tokenizer", IMAGE_ENCODER, "image_processor")
# Parts that every Wan model has, whether its index names them or not.
_ALWAYS = ("transformer", VAE, TEXT_ENCODER, "tokenizer")

PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")

_SCHEDULERS = {
    "UniPCMultistepScheduler": "unipc",
    "DPMSolverMultistepScheduler": "dpm++2m",
    "FlowMatchEulerDiscreteScheduler": "flow-euler",
    "FlowMatchLCMScheduler": "lcm",
}

_PLAIN = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Folder:
    """A folder with its ``model_index.json``, which :func:`open_folder` has checked."""

    path: Path
    index: Mapping[str, Any]

    def has(self, component: str) -> bool:
        """Whether the index names this component; an absent one is written as two nulls."""
        entry = self.index.get(component)
        return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None

    def config(self, component: str) -> dict[str, Any]:
        """The config of a component; CheckpointError if its folder or config is missing."""
        if not (self.path / component).is_dir():
            raise CheckpointError(f"{self.path} has no folder {component}: fetch the model again")
        return read_json(self.path / component / "config.json")

    def checked_config(self, component: str, class_name: str) -> dict[str, Any]:
        """The config of a diffusers component, which must be of this class."""
        config = self.config(component)
        if config.get("_class_name") != class_name:
            raise CheckpointError(
                f"{self.path / component / 'config.json'} describes "
                f"{config.get('_class_name', 'no model')}, and a Wan model has {class_name}"
            )
        return config


def open_folder(path: Path) -> Folder:
    """The folder, if it is a diffusers folder of a Wan pipeline; CheckpointError if not."""
    index_path = path / "model_index.json"
    if not index_path.exists():
        raise CheckpointError(
            f"model={path}: this folder has no model_index.json, so it is not a diffusers folder; "
            "choose the folder that holds that file"
        )
    index = read_json(index_path)
    pipeline = index.get("_class_name")
    if pipeline not in PIPELINES:
        raise CheckpointError(
            f"{index_path} describes {pipeline}; Wan models are {' or '.join(PIPELINES)}"
        )
    return Folder(path, index)


def read_model(path: Path, name: str | None = None, experts: tuple[Path, ...] = ()) -> Model:
    """The model in a diffusers folder, every file of which is there and whole.

    ``experts`` are weights, elsewhere, that stand in for those of the folder's transformers: one
    for each, or one for the first alone. Raises CheckpointError, one sentence, for anything else.
    Reads some kilobytes.
    """
    folder = open_folder(path)
    parts = dict(_parts(folder, experts))
    traits = _traits(folder, parts)
    model = replace(
        _with_sampling(model_of(traits, name or path.name), folder),
        location=path,
        parts=parts,
        words=_words(path),
    )
    files = {part: tensor_files(parts[part]) for part in WITH_WEIGHTS & parts.keys()}
    looked_at = {part: files[part] for part in (TRANSFORMER, TEXT_ENCODER)}
    model = replace(model, dtypes=main_dtypes(looked_at))
    if all(x.dtype in _PLAIN for file in files["transformer"] for x in file.tensors.values()):
        return model
    return replace(model, quantized=quantized_as(open_source(parts["transformer"], TRANSFORMER)))


def _parts(folder: Folder, experts: tuple[Path, ...]) -> Iterator[tuple[str, Path]]:
    """Each part and the file or folder that it is in."""
    for name in PARTS:
        if folder.has(name) or name in _ALWAYS or _is_processor(folder, name):
            yield name, folder.path / name
    yield from zip(TRANSFORMERS, experts, strict=False)


def _is_processor(folder: Folder, name: str) -> bool:
    return name == "image_processor" and (folder.path / name).is_dir()


def _traits(folder: Folder, parts: Mapping[str, Path]) -> Traits:
    architecture = _architecture(folder, parts["transformer"])
    vae = folder.checked_config("vae", "AutoencoderKLWan")
    _check_text_encoder(folder, architecture)
    boundary = _boundary(folder)
    if boundary is not None and _architecture(folder, parts["transformer_2"]) != architecture:
        raise CheckpointError(
            f"{folder.path}: transformer and transformer_2 have different shapes, so they are not "
            "the two experts of one model"
        )
    _check_image_encoder(folder, architecture)
    return Traits(
        architecture=architecture,
        vae=vae,
        expand_timesteps=bool(folder.index.get("expand_timesteps")),
        boundary=boundary,
        config=parts["transformer"] / "config.json",
        vae_config=folder.path / "vae" / "config.json",
    )


def _architecture(folder: Folder, transformer: Path) -> Architecture:
    if transformer.parent == folder.path and transformer.name in TRANSFORMERS:
        config = folder.checked_config(transformer.name, "WanTransformer3DModel")
        return Architecture.of(config, transformer / "config.json")
    return Architecture.of(config_of(open_source(transformer, TRANSFORMER)), transformer)


def _check_image_encoder(folder: Folder, architecture: Architecture) -> None:
    if architecture.image_dim is None:
        return
    if not folder.has("image_encoder"):
        raise CheckpointError(
            f"{folder.path}: its transformer wants CLIP's view of a picture, and model_index.json "
            "names no image_encoder: fetch the model again"
        )
    folder.config("image_encoder")
    read_json(folder.path / "image_processor" / "preprocessor_config.json")


def _check_text_encoder(folder: Folder, architecture: Architecture) -> None:
    config = folder.config("text_encoder")
    path = folder.path / "text_encoder" / "config.json"
    if config.get("model_type") != "umt5":
        raise CheckpointError(
            f"{path} describes {config.get('model_type', 'no model')}, and Wan reads text with umt5"
        )
    if config.get("d_model") != architecture.text_dim:
        raise CheckpointError(
            f"{path}: d_model is {config.get('d_model')}, and the transformer takes text of "
            f"{architecture.text_dim} features: these are parts of two models"
        )
    if not any((folder.path / "tokenizer").glob("*.json")):
        raise CheckpointError(f"{folder.path} has no folder tokenizer: fetch the model again")


def _boundary(folder: Folder) -> float | None:
    """Where the second expert begins, for a model that has one."""
    boundary = folder.index.get("boundary_ratio")
    if boundary is None and not folder.has("transformer_2"):
        return None
    if boundary is None or not folder.has("transformer_2"):
        raise CheckpointError(
            f"{folder.path / 'model_index.json'}: two experts want both transformer_2 and "
            "boundary_ratio, and only one of them is there: fetch this file again"
        )
    if not isinstance(boundary, float | int) or not 0 <= boundary <= 1:
        raise CheckpointError(
            f"{folder.path / 'model_index.json'}: boundary_ratio is {boundary!r}, not from 0 to 1"
        )
    return float(boundary)


def _with_sampling(model: Model, folder: Folder) -> Model:
    """The settings to use where the user names none: the folder's own, else those of the
    published model it equals, else those of the nearest with the shift of its scheduler."""
    own = folder.path / "sagewan.json"
    if own.exists():
        settings = read_json(own)
        return replace(
            model,
            family=str(settings.get("family", model.family)),
            sampling=_own_sampling(settings, own),
        )
    near = nearest(model)
    if is_published(model, near):
        return replace(model, family=near.family, sampling=near.sampling)
    return replace(model, family=near.family, sampling=_rescheduled(near.sampling, folder))


def _rescheduled(sampling: Sampling, folder: Folder) -> Sampling:
    path = folder.path / "scheduler" / "scheduler_config.json"
    if not path.exists():
        return sampling
    config = read_json(path)
    shift = config.get("flow_shift", config.get("shift"))
    scheduler = _SCHEDULERS.get(str(config.get("_class_name")), sampling.scheduler)
    if not isinstance(shift, float | int) or shift <= 0:
        return replace(sampling, scheduler=scheduler)
    return replace(sampling, scheduler=scheduler, shift=float(shift))


def _own_sampling(settings: Mapping[str, Any], path: Path) -> Sampling:
    scheduler = settings.get("scheduler", "unipc")
    if scheduler not in SCHEDULERS:
        raise CheckpointError(
            f"{path}: scheduler is {scheduler!r}, none of {', '.join(SCHEDULERS)}"
        )
    try:
        return Sampling(
            size=(int(settings["width"]), int(settings["height"])),
            frames=int(settings["frames"]),
            fps=int(settings["fps"]),
            steps=int(settings["steps"]),
            cfg=float(settings["cfg"]),
            shift=float(settings["shift"]),
            scheduler=scheduler,
            negative=str(settings.get("negative", "")),
        )
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error.args[0]}") from None
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} holds something that is no number ({error})") from None


def _words(path: Path) -> Mapping[str, tuple[str, ...]]:
    """The words by kind, those of every language together; empty where any word will do."""
    vocabulary = path / "vocabulary.json"
    if not vocabulary.exists():
        return {}
    words: dict[str, tuple[str, ...]] = {}
    for kinds in read_json(vocabulary).values():
        if not isinstance(kinds, dict):
            raise CheckpointError(f"{vocabulary} must hold words by language and kind")
        for kind, listed in kinds.items():
            words[kind] = (*words.get(kind, ()), *map(str, listed))
    return words
