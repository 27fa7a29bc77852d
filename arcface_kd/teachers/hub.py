"""Teachers from the Hugging Face hub, by name: weights and settings are downloaded, code is not."""

import logging
from typing import ClassVar

from arcface_kd.errors import TeacherError, first_line
from arcface_kd.teachers.base import Teacher
from arcface_kd.teachers.checkpoint import HUB_FILES, CheckpointSource
from arcface_kd.teachers.options import TeacherOptions

logger = logging.getLogger(__name__)

_HUB = "hf:"
# CVLface keeps its weights twice; the second copy is not fetched.
_WANTED = ["config.json", "*.yaml", *(name for name in HUB_FILES if "/" not in name)]


class HubSource:
    """Repositories of the Hugging Face hub that hold weights of known networks: CVLface's, for one."""

    description: ClassVar[str] = "hf:OWNER/NAME, weights of one of the checkpoints' networks from the Hugging Face hub"

    @staticmethod
    def accepts(source: object) -> bool:
        """Whether this is ``hf:`` and a name."""
        return isinstance(source, str) and source.startswith(_HUB)

    @staticmethod
    def load(source: str, options: TeacherOptions) -> Teacher:
        """Download what is not in the hub's cache on this machine, and load it as a folder's checkpoint."""
        name = source[len(_HUB) :]
        try:
            from huggingface_hub import snapshot_download
        except ImportError as error:
            raise TeacherError(f"teacher {source} needs huggingface_hub: pip install huggingface_hub") from error
        logger.warning("%s: huggingface_hub asks the hub, and downloads what this machine has not got", source)
        try:
            folder = snapshot_download(name, allow_patterns=_WANTED)
        # It raises its own errors, those of its HTTP client and the system's.
        except Exception as error:
            raise TeacherError(f"teacher {source} cannot be downloaded: {first_line(error)}") from error
        if not CheckpointSource.accepts(folder):
            raise TeacherError(f"teacher {source} lacks config.json or one of {', '.join(HUB_FILES[:3])}")
        return CheckpointSource.load(folder, options)
