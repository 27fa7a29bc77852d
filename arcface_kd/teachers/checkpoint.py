"""Teachers from checkpoints of known networks: PyTorch's and safetensors files, folders of runs and of Hugging Face."""

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from arcface_kd.backbones import KNOWN_NAMES, NETWORKS, OWN, FaceBackbone, get_backbone, is_network
from arcface_kd.backbones.ir import IRLayout, IRNet
from arcface_kd.backbones.vit import HOST_NAMES, VITS
from arcface_kd.errors import ConfigError, TeacherError, first_line
from arcface_kd.teachers.authors import MAGFACE, TRAINED_HERE, Author, author_of
from arcface_kd.teachers.base import Teacher, local_path, tensors_digest
from arcface_kd.teachers.file_type import signature
from arcface_kd.teachers.options import Precision, Preprocessing, TeacherOptions
from arcface_kd.teachers.preparation import autocast, default_precision
from arcface_kd.teachers.state_dict import carried_networks, is_trained, outlined, read_content, short, state_dicts

logger = logging.getLogger(__name__)

# What a run leaves in its folder; backbone.pth is arcface_torch's name until 2021, and its model zoo's.
_STUDENTS = ("model.pt", "backbone.pth", "checkpoint_gpu_0.pt")
# Weights beside the config.json of a Hugging Face folder.
HUB_FILES = ("model.safetensors", "model.pt", "pytorch_model.bin", "pretrained_model/model.pt")
_SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors")
_WEIGHTS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
_T = TypeVar("_T")
_KNOWN = {**NETWORKS, **VITS}
# MagFace's names for the IResNets, whose batch norms have another epsilon than arcface_torch's.
_MAGFACE = {f"iresnet{depth}": f"r{depth}" for depth in (18, 34, 50, 100)}
_MAGFACE_EPS, _EPS = 2e-5, 1e-5
# Stands for tokens that are hidden in training; some trainers leave it out.
_OPTIONAL = frozenset(("mask_token",))
# Networks are outlined at both embedding sizes: what differs depends on it. Own networks may want a power of two.
_SIZE, _OTHER_SIZE = 512, 1024
# Of CVLface's KP-RPE, a ViT that takes landmarks beside the image.
_LANDMARKS = "keypoint_linear"
_OWN_IN_LOG = re.compile(rf": network +({OWN}[\w.]+:\w+)$")
Shape = tuple[int, ...]
_IR_FIRST = "input_layer.0.weight"


@dataclass(frozen=True)
class NetworkCheckpoint:
    """A backbone rebuilt from a checkpoint."""

    network: nn.Module  # the backbone with its weights, in evaluation mode, on the CPU
    name: str  # as :func:`arcface_kd.backbones.get_backbone` takes it, or one of ``arcface_kd.backbones.vit.VITS``
    num_features: int  # dimension of its embeddings
    digest: str  # SHA-256 over its name and weights
    author: Author | None = TRAINED_HERE  # who trained it; None where that decides on the channels and cannot be told


class Backbone(NamedTuple):
    """Where a known network's tensors are in a file."""

    place: str  # keys that lead to the state dict, as `state_dicts` gives them
    prefix: str  # what all of the network's names begin with
    name: str  # the network
    num_features: int  # dimension of its embeddings
    tensors: dict[str, Tensor]  # by the network's own names
    beside: tuple[str, ...]  # names of the state dict's other tensors, a head's as a rule

    def __str__(self) -> str:
        where = "/".join(part for part in (self.place, self.prefix) if part)
        return f"{self.name} under {where!r}" if where else self.name


def backbone_file(folder: Path) -> Path | None:
    """The student in a run's folder: ``model.pt``, ``backbone.pth`` or rank 0's checkpoint."""
    return next((folder / name for name in _STUDENTS if (folder / name).is_file()), None)


def hub_file(folder: Path) -> Path | None:
    """The weights of a Hugging Face folder; None where there is no ``config.json`` or nothing beside it."""
    files = HUB_FILES if (folder / "config.json").is_file() else ()
    return next((folder / name for name in files if (folder / name).is_file()), None)


def weights_file(path: Path) -> Path | None:
    """The one file that a source on disk is read from: itself, or the weights of a Hugging Face or a run's folder.

    None where there are several, as beside MXNet's ``NAME-symbol.json``.
    """
    if path.is_file():
        return None if path.suffix == ".json" else path
    return hub_file(path) or backbone_file(path)


def is_run_folder(source: object) -> bool:
    """Whether this is the folder of a run of arcface_torch or of ``arcface-kd train``, with its student."""
    path = local_path(source)
    return path is not None and backbone_file(path) is not None and hub_file(path) is None


def _without_counters(entries: Mapping[str, _T]) -> dict[str, _T]:
    # Old checkpoints lack BatchNorm's num_batches_tracked, and torch fills it in.
    return {name: entry for name, entry in entries.items() if not name.endswith("num_batches_tracked")}


def _shapes(state: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in _without_counters(state).items()}


def own_network_in_log(folder: Path) -> str | None:
    """The ``python:MODULE:FUNCTION`` that a run trained, from its log; it is not imported."""
    log = folder / "training.log"
    if not log.is_file():
        return None
    with log.open(encoding="utf-8", errors="replace") as lines:
        found = [match[1] for line in lines if (match := _OWN_IN_LOG.search(line.rstrip()))]
    return found[-1] if found else None


def _build(name: str, num_features: int, fp16: bool = False) -> nn.Module:
    layout = IRLayout.of(name)
    build = partial(IRNet, layout) if layout else _KNOWN.get(name, partial(get_backbone, name))
    return build(num_features=num_features, fp16=fp16)


@cache
def _outline(name: str, num_features: int = _SIZE) -> dict[str, Shape]:
    """Names and shapes of a network's tensors, where possible without making them."""
    # A user's own code, or timm's, may read tensors while it builds; those without data cannot be read.
    with torch.device("meta" if name in _KNOWN or IRLayout.of(name) else "cpu"), torch.random.fork_rng(devices=[]):
        return _shapes(_build(name, num_features).state_dict())


def _num_features(name: str, state: Mapping[str, Shape]) -> int | None:
    """The embedding size that makes network ``name`` fit these shapes exactly, if there is one."""
    outline = _outline(name)
    if outline.keys() - _OPTIONAL != state.keys() - _OPTIONAL:
        return None
    other = _outline(name, _OTHER_SIZE)
    # The last one as a rule is as large as the embedding.
    for key, shape in reversed(outline.items()):
        if shape != other[key] and len(shape) == len(state[key]):
            axis = next(axis for axis, size in enumerate(shape) if size != other[key][axis])
            # An own network's may be a multiple of it.
            growth = other[key][axis] - shape[axis]
            size = _SIZE + (state[key][axis] - shape[axis]) * (_OTHER_SIZE - _SIZE) // growth
            fits = 0 < size <= 65536 and state.items() <= _outline(name, size).items()
            return size if fits else None
    # An own network that has one size whatever it is asked for.
    return _SIZE if state.items() <= outline.items() else None


def _own(entries: Mapping[str, _T], prefix: str, name: str) -> dict[str, _T]:
    """What could be a network's behind a prefix: all that begins as one of its modules does, without the prefix."""
    modules = {key.partition(".")[0] for key in _outline(name)}
    behind = {key.removeprefix(prefix): entry for key, entry in entries.items() if key.startswith(prefix)}
    return {key: entry for key, entry in behind.items() if key.partition(".")[0] in modules}


def _prefixes(state: Mapping[str, Shape], name: str) -> list[str]:
    """What stands before a network's last tensor, wherever a state dict has one of its name."""
    last = next(reversed(_outline(name)))
    return [key.removesuffix(last) for key in state if key == last or key.endswith(f".{last}")]


def _candidates(
    shapes: Mapping[str, Shape], name: str | None, carried: Iterable[str] = ()
) -> Iterator[tuple[str, str]]:
    """Names and prefixes of networks that a state dict may be of: of ``name``, or of ``carried`` and all known ones."""
    for each in dict.fromkeys((*carried, *_KNOWN)) if name is None else (name,):
        yield from ((each, prefix) for prefix in _prefixes(shapes, each))
    if name is not None:
        return
    # There are as many IR networks as depths and widths: theirs are read off the tensors.
    for prefix in (key.removesuffix(_IR_FIRST) for key in shapes if key.endswith(_IR_FIRST)):
        layout = IRLayout.in_shapes({key.removeprefix(prefix): each for key, each in shapes.items()})
        if layout is not None:
            yield layout.name, prefix


def find_backbones(content: object, name: str | None = None) -> Iterator[Backbone]:
    """Find known networks in a file's state dicts, under any key and behind any prefix; ``name`` None is any.

    Of names that fit the same tensors, one that the file itself carries comes first, and a network that is a part of
    another one is left out. None of these is imported.
    """
    carried = [each for each in carried_networks(content) if is_network(each) and not each.startswith(OWN)]
    for place, tensors in state_dicts(content).items():
        shapes = _shapes(tensors)
        found: list[Backbone] = []
        for each, prefix in _candidates(shapes, name, carried):
            size = _num_features(each, _own(shapes, prefix, each))
            if size is not None:
                own = _own(tensors, prefix, each)
                beside = tuple(key for key in tensors if key.removeprefix(prefix) not in own)
                found.append(Backbone(place, prefix, each, size, own, beside))
        for one in found:
            alike = [other.tensors for other in found if other.prefix == one.prefix]
            if not any(one.tensors.keys() < tensors.keys() for tensors in alike):
                yield one


def _the_backbone(content: object, path: Path, name: str | None) -> Backbone:
    """The one network that a file is of."""
    found = list(find_backbones(content, name))
    if any(_LANDMARKS in key.split(".") for each in found for key in each.beside):
        raise TeacherError(f"teacher {path} takes landmarks beside its image, and a teacher is shown images alone")
    if not found:
        carried = (each for each in carried_networks(content) if each.startswith(OWN))
        own = next(carried, own_network_in_log(path.parent)) if name is None else None
        if own is not None:
            raise TeacherError(
                f"teacher {path} is of the network {own}, as it or the training.log beside it says: that is Python "
                f"code and is not run on a file's word; if you trust it, add --kd-option teacher.network={own}"
            )
        raise TeacherError(f"teacher {path} {_misfit(content, name)}")
    first = found[0]
    others = [each for each in found[1:] if not _same(each, first)]
    networks = list(dict.fromkeys(each.name for each in found if each[:2] == first[:2]))
    if len(networks) > 1 and first.name not in carried_networks(content):
        raise TeacherError(f"teacher {path} fits several networks: {', '.join(networks)}; name one as teacher.network")
    # A copy that was averaged, say, lies under another key; two networks side by side may be teacher and student.
    if any(not is_trained(first.place) or each.place == first.place for each in others):
        raise TeacherError(
            f"teacher {path} holds several networks: {', '.join(map(str, (first, *others)))}; save the state_dict() of "
            "the one that is meant by itself"
        )
    if first.place or first.prefix or first.beside:
        logger.info("%s: %s; passed over there: %s", path, first, ", ".join(map(short, first.beside[:5])) or "nothing")
    if foreign := _foreign(first, tensors=state_dicts(content)[first.place]):
        logger.warning(
            "%s: taken for %s, but these tensors among its own are not of such a network, nor of a head on its "
            "embeddings, and are passed over: %s; if it needs them, its embeddings are wrong: name the network as "
            "--kd-option teacher.network=%sMODULE:FUNCTION",
            *(path, first.name, ", ".join(map(short, foreign[:5])), OWN),
        )
    return first


def _foreign(found: Backbone, tensors: Mapping[str, Tensor]) -> list[str]:
    """Matrices and kernels behind a network's own prefix that do not take its embeddings."""
    return [
        key
        for key in found.beside
        if key.startswith(found.prefix) and tensors[key].ndim > 1 and found.num_features not in tensors[key].shape
    ]


def _same(one: Backbone, other: Backbone) -> bool:
    return one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(tensor, other.tensors[key]) for key, tensor in one.tensors.items()
    )


def _misfit(content: object, name: str | None) -> str:
    """Why a file is of none of the networks, by the one that comes nearest."""
    states = state_dicts(content).values()
    if not states:
        return f"holds {outlined(content)}; wanted a state dict: tensors by name"
    state = max(states, key=len)
    shapes = _shapes(state)

    def common(candidate: tuple[str, str]) -> int:
        return len(_own(shapes, candidate[1], candidate[0]).keys() & _outline(candidate[0]).keys())

    candidates = [*_candidates(shapes, name), *((each, "") for each in ([name] if name else _KNOWN))]
    nearest, prefix = max(candidates, key=common)
    outline = _outline(nearest)
    own = _own(shapes, prefix, nearest)
    missing, foreign = sorted(outline.keys() - own.keys() - _OPTIONAL), sorted(own.keys() - outline.keys())
    words = []
    if missing:
        words.append(f"{len(missing)} tensors missing, such as {short(prefix + missing[0])}")
    if foreign:
        words.append(f"{len(foreign)} foreign, such as {short(prefix + foreign[0])}")
    if not words:
        other = _outline(nearest, _OTHER_SIZE)
        wrong = next((key for key in own if outline[key] == other[key] != own[key]), next(iter(own)))
        words.append(f"{prefix + wrong!r} has shape {own[wrong]}, wanted {outline[wrong]}")
    if name is not None:
        return f"does not fit network {name!r}: {'; '.join(words)}"
    key, shape = next(iter(shapes.items()), ("none", ()))
    closest = f"; closest is {nearest}: {'; '.join(words)}" if common((nearest, prefix)) > len(outline) / 2 else ""
    return (
        f"is of none of the networks {', '.join(_KNOWN)} and ir_*: it has {len(state)} tensors (the first: "
        f"{short(key)} {shape}){closest}; name a network of your own with --kd-option "
        f"teacher.network={OWN}MODULE:FUNCTION"
    )


def load_network(
    path: str | os.PathLike[str], name: str | None = None, *, fp16: bool = False, size: int = 112
) -> NetworkCheckpoint:
    """Rebuild the backbone whose weights a checkpoint or a run's folder holds; every tensor has to fit.

    ``name`` None takes the name that the file carries, or infers the network from the names and shapes of the tensors,
    but never an own one; an own one's module is imported, and takes images of ``size``.
    """
    place = weights_file(Path(path)) or Path(path)
    magface = name in _MAGFACE
    if name is not None:
        name = {**HOST_NAMES, **_MAGFACE}.get(name, name)
        if name not in _KNOWN and not is_network(name):
            raise ConfigError(f"teacher.network={name!r}: no such network; there are {KNOWN_NAMES}, {', '.join(VITS)}")
    content = read_content(place)
    found = _the_backbone(content, place, name)
    state = found.tensors
    for key, tensor in _without_counters(state).items():
        called = found.prefix + key
        if tensor.dtype not in _WEIGHTS:
            wanted = "float16, bfloat16, float32 or float64"
            raise TeacherError(f"teacher {place}: tensor {called!r} is of {tensor.dtype}; wanted {wanted}")
        if not torch.isfinite(tensor).all():
            raise TeacherError(f"teacher {place}: tensor {called!r} holds NaN or inf")
    author: Author | None = MAGFACE if magface else TRAINED_HERE
    if not magface and found.name not in carried_networks(content):
        author = author_of(place, found.name, found.prefix, found.beside)
    if author == MAGFACE:
        logger.info("%s: batch norms of MagFace, with epsilon %g", place, _MAGFACE_EPS)
        # x / sqrt(v + 2e-5) is x / sqrt((v + 1e-5) + 1e-5): the network computes what MagFace's does.
        for key in [key for key in state if key.endswith("running_var")]:
            state[key] = state[key].float() + (_MAGFACE_EPS - _EPS)
    network = _build(found.name, found.num_features, fp16)
    state.update({key: value for key, value in network.state_dict().items() if key in _OPTIONAL - state.keys()})
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise TeacherError(f"teacher {place} does not fit network {found.name!r}: {first_line(error)}") from error
    # Digested as loaded and without counters: a file in float16 or from an old torch is no other teacher.
    computing = _without_counters(network.state_dict())
    digest = tensors_digest({f"{found.name}.{key}": value for key, value in computing.items()})
    num_features = found.num_features
    if found.name.startswith(OWN):
        # What its function takes for the embedding size need not be that of its embeddings.
        shown = Preprocessing(size=size)
        tried = Teacher(network, preprocessing=shown, description=f"{found.name} from {place}", weights=digest)
        num_features = tried.embedding_size
    return NetworkCheckpoint(network.eval(), found.name, num_features, digest, author)


def _autocast(precision: Precision, tensor: Tensor, *, half: bool) -> torch.autocast:
    """A backbone's context for its convolutions in the type asked for; its own rule goes by the device."""
    return autocast(precision if half else "fp32", tensor.device)


class CheckpointSource:
    """Checkpoints of ``arcface_kd.backbones``, ViTs and own networks included, fed as their authors do; folders too."""

    description: ClassVar[str] = (
        "a PyTorch checkpoint (.pt, .pth), a .safetensors file, a run's or a Hugging Face folder, of "
        + f"{KNOWN_NAMES}, {', '.join(VITS)}"
    )

    @staticmethod
    def accepts(source: object) -> bool:
        """Whether this is such a file by its content, or by its name where the content says nothing."""
        path = local_path(source)
        if path is not None and (hub_file(path) or backbone_file(path)):
            return True
        if path is None or not path.is_file():
            return False
        kind = signature(path)
        return kind in ("zip", "pickle", "safetensors") or (kind is None and path.suffix.lower() in _SUFFIXES)

    @staticmethod
    def load(source: str | os.PathLike[str], options: TeacherOptions) -> Teacher:
        """Load the checkpoint's backbone as a teacher."""
        options.refuse("output", "only an ONNX file has outputs to choose from")
        path = local_path(source)
        assert path is not None
        checkpoint = load_network(path, options.network, size=options.preprocessing(Preprocessing()).size)
        if checkpoint.author is None and options.channels is None:
            raise TeacherError(
                f"teacher {path}: some authors train {checkpoint.name} on RGB and some on BGR, and neither its name "
                "nor what is beside it says who has: give --kd-option teacher.channels=rgb or bgr; "
                "`arcface-kd check` with pairs tells which is better"
            )
        author, layout = checkpoint.author or TRAINED_HERE, IRLayout.of(checkpoint.name)
        known = replace(author.shown, size=layout.image_size) if layout else author.shown
        preprocessing = options.preprocessing(known)
        precision: Precision = options.precision or default_precision()
        if precision != "fp32" and isinstance(checkpoint.network, FaceBackbone):
            checkpoint.network.fp16 = True
            setattr(checkpoint.network, "autocast", partial(_autocast, precision))  # noqa: B010
        return Teacher(
            checkpoint.network,
            preprocessing=preprocessing,
            description=f"{checkpoint.name}{author.name and f' of {author.name}'} from {path}",
            weights=checkpoint.digest,
            precision=precision,
            embedding_size=options.embedding_size,
            channels_last=True,
        )
