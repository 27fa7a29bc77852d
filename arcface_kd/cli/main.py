"""The command line: ``arcface-kd COMMAND``. Bad input ends in one line and exit code 2."""

import argparse
import contextlib
import faulthandler
import os
import sys
from collections.abc import Sequence

import arcface_kd
from arcface_kd.cli import data, evaluate, host, train
from arcface_kd.cli.command import CommandLine, Commands
from arcface_kd.errors import ArcfaceKDError, RankError
from arcface_kd.system.console import flush_or_stop, printable, stop_printing

# What a shell says of a command that SIGPIPE has ended.
_NOBODY_READS = 141

# Modules of the packages that an installation of this one brings along, itself or through insightface.
_BROUGHT_ALONG = frozenset(
    (
        *("cv2", "easydict", "insightface", "numpy", "onnx", "onnxruntime", "PIL", "safetensors", "tensorboard"),
        *("torch", "tqdm", "unidiff"),
    )
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = CommandLine(
        prog="arcface-kd",
        description="Knowledge distillation for face recognition, beside InsightFace's arcface_torch.",
        epilog="example: arcface-kd demo; each command has an example of its own: arcface-kd COMMAND --help",
    )
    parser.add_argument("--version", action="version", version=f"arcface-kd {arcface_kd.__version__}")
    commands = Commands(parser)
    for family in (train, host, evaluate, data):
        family.add_commands(commands)
    return parser


def _complain(error: BaseException, message: str) -> None:
    """One line to stderr; of several ranks, it names the one that it comes from."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not isinstance(error, RankError)
    rank = f"rank {os.environ.get('RANK', '?')}: " if several else ""
    with contextlib.suppress(OSError):
        print(f"arcface-kd: {rank}{printable(message)}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. The exit code: 0, 2 for input that cannot be run, 130 interrupted, 141 when nobody reads."""
    if not faulthandler.is_enabled():
        # A mapped file that is cut short while it is read, or whose disk fails, ends the process: this says where.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            faulthandler.enable()
    try:
        arguments = build_parser().parse_args(argv)
        arguments.run(arguments)
        # What waits to be written would fail behind this function, with a traceback.
        sys.stdout.flush()
    except BrokenPipeError:
        stop_printing()
        return _NOBODY_READS
    except (ArcfaceKDError, OSError) as error:
        _complain(error, str(error))
        # What still waits to be printed may be what has failed.
        flush_or_stop()
        return 2
    except (MemoryError, RuntimeError) as error:
        from arcface_kd.system.memory import out_of_memory_message

        lacked = out_of_memory_message(error, "lower batch_size, or use a machine with more")
        if lacked is None:
            raise
        _complain(error, lacked)
        return 2
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _BROUGHT_ALONG:
            raise
        print(
            f"arcface-kd: the package {package} is missing: pip install PATH/TO/arcface_kd brings it", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        print("arcface-kd: interrupted", file=sys.stderr)
        return 130
    return 0
