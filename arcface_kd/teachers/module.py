"""Teachers that are the user's own modules or callables, and timm models by name."""

import hashlib
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from arcface_kd.errors import TeacherError, first_line
from arcface_kd.teachers.base import Teacher, tensors_digest
from arcface_kd.teachers.options import Preprocessing, TeacherOptions
from arcface_kd.teachers.preparation import default_precision

_TIMM = "timm:"
# Models on Hugging Face's hub, which timm keeps no list of: their weights are there, or loading them fails.
_HUB = ("hf-hub:", "hf_hub:")
# What the last layer of such a model puts out if it is an embedding, as that of networks for faces; classes come in
# other numbers.
_EMBEDDING_SIZES = (64, 128, 256, 512, 1024, 2048)


def _name(network: object) -> str:
    kind = network if hasattr(network, "__qualname__") else type(network)
    return f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', '')}"


def _digest(network: Callable[[Tensor], Tensor], size: int) -> str:
    """Identity of a network's weights.

    That of a module is over its ``state_dict`` and class. A callable may bring its own as ``fingerprint``; that of any
    other is over its name and its answer to a fixed input, rounded so that the last bits do not matter.
    """
    own = getattr(network, "fingerprint", None)
    if isinstance(own, str) and own:
        return own
    if isinstance(network, nn.Module) and (state := network.state_dict()):
        return hashlib.sha256(f"{_name(network)} {tensors_digest(state)}".encode()).hexdigest()
    images = torch.linspace(-1, 1, 2 * 3 * size * size).view(2, 3, size, size)
    with torch.no_grad():
        answer = network(images)
    if not isinstance(answer, Tensor):
        return hashlib.sha256(_name(network).encode()).hexdigest()
    directions = nn.functional.normalize(answer.detach().float().cpu().flatten(1), dim=1)
    return hashlib.sha256(
        _name(network).encode() + directions.mul(100).round().to(torch.int8).numpy().tobytes()
    ).hexdigest()


class ModuleSource:
    """Any ``nn.Module`` or callable from (B, 3, S, S) to (B, D), fed RGB as (x - 127.5) / 127.5."""

    description: ClassVar[str] = "from the library, an nn.Module or a callable"

    @staticmethod
    def accepts(source: object) -> bool:
        """Whether this is a network rather than the name of one."""
        return isinstance(source, nn.Module) or callable(source)

    @staticmethod
    def load(source: Callable[[Tensor], Tensor], options: TeacherOptions) -> Teacher:
        """Wrap a network; a module is frozen and put into evaluation mode in place."""
        if isinstance(source, Teacher):
            if options != TeacherOptions():
                raise TeacherError(f"{source.description} is a teacher already; give the options when loading it")
            return source
        options.refuse("network", "the network is given")
        options.refuse("output", "only an ONNX file has outputs to choose from")
        preprocessing = options.preprocessing(Preprocessing())
        if isinstance(source, nn.Module):
            source.eval()
        try:
            weights = _digest(source, preprocessing.size)
        # The user's own code: it may raise anything.
        except Exception as error:
            shown = f"{preprocessing.size}x{preprocessing.size}"
            raise TeacherError(f"teacher {_name(source)} cannot embed {shown} images: {first_line(error)}") from error
        return Teacher(
            source,
            preprocessing=preprocessing,
            description=_name(source),
            weights=weights,
            precision=options.precision,
            embedding_size=options.embedding_size,
        )


class TimmSource:
    """timm models by name, such as SSL teachers, with their published weights and without their classifier.

    The weights come from timm's own cache or are downloaded.
    """

    description: ClassVar[str] = "timm:NAME, a timm model with its published weights"

    @staticmethod
    def accepts(source: object) -> bool:
        """Whether this is ``timm:`` and a name."""
        return isinstance(source, str) and source.startswith(_TIMM)

    @staticmethod
    def load(source: str, options: TeacherOptions) -> Teacher:
        """Build ``timm:NAME``, with a tag of weights if wished, or ``timm:hf-hub:OWNER/MODEL``.

        The embedding is the model's pooled features, or what a model on the hub makes of them for an embedding, as
        those for faces do; the preprocessing is its own unless given.
        """
        options.refuse("network", "timm:NAME names it")
        options.refuse("output", "only an ONNX file has outputs to choose from")
        name = source[len(_TIMM) :]
        try:
            import timm
        except ImportError as error:
            raise TeacherError(f"teacher {source} needs timm: pip install timm") from error
        # A torchvision built for another torch raises RuntimeError, for one.
        except Exception as error:
            raise TeacherError(f"teacher {source}: timm cannot be imported here: {first_line(error)}") from error
        try:
            # timm builds a network with random weights where it has none to offer; that is no teacher.
            on_hub = name.startswith(_HUB)
            if not on_hub and not timm.is_model_pretrained(name):
                raise TeacherError(f"teacher {source}: timm has no model of that name with published weights")
            network = timm.create_model(name, pretrained=True, **({} if on_hub else {"num_classes": 0}))
            if on_hub and network.num_classes not in _EMBEDDING_SIZES:
                network.reset_classifier(0)
            known = _expected(timm.data.resolve_model_data_config(network))
        except TeacherError:
            raise
        # timm raises RuntimeError for names, and whatever its downloads and safetensors raise.
        except Exception as error:
            raise TeacherError(f"teacher {source} cannot be loaded by timm: {first_line(error)}") from error
        return Teacher(
            network,
            preprocessing=options.preprocessing(known),
            description=source,
            weights=_digest(network, known.size),
            precision=options.precision or default_precision(),
            embedding_size=options.embedding_size,
        )


def _expected(config: dict[str, Any]) -> Preprocessing:
    """Timm's input in our terms: it counts pixel values from 0 to 1."""
    mean, std = (tuple(255.0 * float(value) for value in config[key]) for key in ("mean", "std"))
    return Preprocessing("rgb", (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]), int(config["input_size"][-1]))
