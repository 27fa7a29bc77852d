"""SH-KD's three runs: which one is next, and what its config is.

Each run is an ordinary one of arcface_torch or of the compact trainer, with a few keys changed. Which runs are done is
read from their checkpoints, so whatever ends a run, the next start goes on where it stood. What each run was started
with is kept in ``shkd.json``, so that runs of different settings are never joined.

    OUTPUT/stage1_student   the temporary student
    OUTPUT/stage2_teacher   the teacher, against that student's classifier; its cache where one is wanted
    OUTPUT                  the final student, where any other method leaves its own

OUTPUT has to be a folder that all ranks see: they read the checkpoints in it, and the second and third run read those
of all ranks of the first.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arcface_kd import registry
from arcface_kd.backbones import KNOWN_NAMES, OWN, FaceBackbone, is_network
from arcface_kd.checkpoints.files import checkpoint_file, read_checkpoint
from arcface_kd.config.kd import CLASS_MEANS, KDConfig, option_items
from arcface_kd.config.options import build
from arcface_kd.distributed.ranks import RankGroup, on_first_rank_first
from arcface_kd.errors import CheckpointError, ConfigError, TeacherError
from arcface_kd.methods.base import Method
from arcface_kd.methods.recipe import Stage
from arcface_kd.methods.shkd.options import SHKDConfig
from arcface_kd.methods.views import refuse_views
from arcface_kd.system.files import atomic_write
from arcface_kd.teachers.base import Teacher, load_teacher
from arcface_kd.teachers.checkpoint import load_network
from arcface_kd.teachers.onnx.session import OnnxNetwork
from arcface_kd.teachers.onnx.torch_module import TorchGraph
from arcface_kd.teachers.options import Preprocessing
from arcface_kd.teachers.student_init import trained_graph_file

NAME = "shkd"
RECORD = "shkd.json"
RUNS = 3

# Settings that must match on resume; the rest of a config may change.
_DECIDING = (
    *("rec", "rec_identities", "num_classes", "num_image", "num_epoch", "warmup_epoch", "network", "embedding_size"),
    "margin_list",
    *("sample_rate", "interclass_filtering_threshold", "batch_size", "optimizer", "lr", "momentum", "weight_decay"),
    *("seed", *(key.name for key in KDConfig.keys().values() if key.decides)),
)

# Keys that each run has its own of; all others are the config's.
_ITS_OWN = ("kd", "kd_teacher", "kd_cache", "kd_classifier", "kd_option")


def next_stage(config: Mapping[str, Any]) -> Stage | None:
    """The run to start next, or to resume; None when all three are done."""
    stages = _Stages(config)
    # The third is looked at when the second is done: its teacher is what that one leaves.
    for make in (stages.first, stages.second, stages.third):
        stage = make()
        if stage is not None and not _done(stage, config):
            return stage
    return None


class _Stages:
    """The three runs of one config."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.output = Path(config["output"])
        options = dict(option_items(config.get("kd_option")))

        def under(prefix: str) -> dict[str, object]:
            return {name: value for name, value in options.items() if name.partition(".")[0] == prefix}

        own = {name.partition(".")[2]: value for name, value in under(NAME).items()}
        self.settings = build(SHKDConfig, own, NAME)
        self.teacher_options = under("teacher")
        self.distil_options = {name: value for name, value in options.items() if name not in under(NAME)}
        # Means of the teacher's embeddings are not what a student has learned: the first run is not spared by them.
        self.asks_for_means = config.get("kd_classifier") == CLASS_MEANS
        self.spares_first = bool(config.get("kd_classifier")) and not self.asks_for_means
        self.classifier = str(config["kd_classifier"] if self.spares_first else self.output / "stage1_student")
        self._check_distillation()
        if isinstance(config.get("kd_teacher"), list | tuple):
            raise ConfigError(f"{NAME} trains its teacher further: kd_teacher names {config['kd_teacher']}, wanted one")
        self.source = None if config.get("kd_teacher") is None else str(config["kd_teacher"])
        self.network, self.teacher = self._teacher()

    def _check_distillation(self) -> None:
        """Find what is wrong with the third run before the first has begun."""
        keys = {"kd": self.settings.distil, "kd_option": self.distil_options, "kd_cache": self.config.get("kd_cache")}
        kd = KDConfig.from_config(keys)
        kinds = {name: registry.load(registry.METHODS, name) for name in kd.methods}
        methods = {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Method)}
        refuse_views(
            kd, methods, {name: build(kind.Config, kd.options.get(name, {}), name) for name, kind in methods.items()}
        )

    def _teacher(self) -> tuple[str, Teacher | None]:
        """The teacher's architecture, and the teacher itself where one is given."""
        wanted = self.settings.teacher_network
        if self.source is None:
            if wanted is None:
                raise ConfigError(
                    f"{NAME} trains a teacher: give the one to start from with --kd-teacher FILE, or the network to "
                    f"train from scratch with --kd-option {NAME}.teacher_network=r50"
                )
            useless = [name for name in self.teacher_options if name != "teacher.precision"]
            if useless:
                raise ConfigError(f"{useless[0]} belongs to a teacher that is given, and this one begins from scratch")
            if not is_network(wanted):
                raise ConfigError(f"{NAME}.teacher_network is {wanted!r}; it must be one of {KNOWN_NAMES}")
            return wanted, None
        given = {name.partition(".")[2]: value for name, value in self.teacher_options.items()}
        teacher = load_teacher(self.source, given)
        name = None if given.get("network") is None else str(given["network"])
        if isinstance(teacher.network, OnnxNetwork | TorchGraph):
            network = "onnx"
        elif name is not None and name.startswith(OWN):
            network = name
        elif isinstance(teacher.network, FaceBackbone):
            network = load_network(Path(self.source).expanduser(), name).name
        else:
            raise TeacherError(
                f"{NAME} trains a checkpoint or an ONNX file further, and {teacher.description} is neither"
            )
        if wanted not in (None, network):
            raise ConfigError(f"{NAME}.teacher_network is {wanted!r}, and {self.source} is {network!r}: leave it out")
        if teacher.embedding_size != self.config["embedding_size"]:
            raise TeacherError(
                f"the teacher {self.source} has {teacher.embedding_size} dimensions, the student "
                f"{self.config['embedding_size']}, and {NAME} shares one classifier: set "
                f"embedding_size={teacher.embedding_size}"
            )
        return network, teacher

    def first(self) -> Stage | None:
        """The temporary student; None where its classifier is given."""
        if self.spares_first:
            return None
        shared = f", whose classifier stands in for {CLASS_MEANS}" if self.asks_for_means else ""
        return self._stage(
            1,
            f"the temporary student, {self.config['network']}{shared}",
            self.output / "stage1_student",
            num_epoch=self.settings.student_epochs or self.config["num_epoch"],
        )

    def second(self) -> Stage:
        """The teacher, against the student's classifier."""
        settings, config = self.settings, self.config
        options: dict[str, object] = {}
        rate, beginning = config["lr"], "from scratch"
        if self.source is not None:
            options = {**self._preprocessing(), **self.teacher_options, "student.init": self.source}
            rate, beginning = config["lr"] / 10, f"starting from {self.source}"
        return self._stage(
            2,
            f"the teacher, {self.network}, {beginning}, against the classes of {self.classifier}",
            self.output / "stage2_teacher",
            network=self.network,
            num_epoch=settings.teacher_epochs or config["num_epoch"],
            lr=settings.teacher_lr or rate,
            batch_size=settings.teacher_batch_size or config["batch_size"],
            kd="proxylesskd",
            kd_classifier=self.classifier,
            kd_option=options,
        )

    def third(self) -> Stage:
        """The final student. Asked for when the teacher is there."""
        folder = self.output / "stage2_teacher"
        file, options = checkpoint_file(folder, 0), {**self._preprocessing(), **self.distil_options}
        # The cache that the config names may hold the embeddings of the teacher as it was given.
        cache = str(folder / "teacher.cache") if self.config.get("kd_cache") else None
        if self.network == "onnx":
            file = on_first_rank_first(lambda: self._exported(folder))
        else:
            options["teacher.network"] = self.network
        return self._stage(
            3,
            f"the final student, {self.config['network']}, distilled by {self.settings.distil} from {file}",
            self.output,
            kd=self.settings.distil,
            kd_teacher=str(file),
            kd_classifier=self.classifier,
            kd_cache=cache,
            kd_option=options,
        )

    def _exported(self, folder: Path) -> Path:
        """The trained ONNX graph as a file."""
        assert self.teacher is not None
        file, checkpoint = folder / "teacher.onnx", checkpoint_file(folder, 0)
        if not file.exists() or file.stat().st_mtime < checkpoint.stat().st_mtime:
            content = trained_graph_file(self.teacher, read_checkpoint(checkpoint)["state_dict_backbone"])
            with atomic_write(file) as stream:
                stream.write(content)
        return file

    def _preprocessing(self) -> dict[str, object]:
        """What a given teacher wants of its images, in full: what training leaves of it does not say so again."""
        if self.teacher is None or (self.network != "onnx" and self.teacher.preprocessing == Preprocessing()):
            return {}
        return {f"teacher.{name}": value for name, value in vars(self.teacher.preprocessing).items()}

    def _stage(self, number: int, title: str, folder: Path, **changes: object) -> Stage:
        nothing = dict.fromkeys(_ITS_OWN)
        # Checkpoints are what the next run needs, and what this one goes on from.
        kept = {"output": str(folder), "save_all_states": True, "resume": checkpoint_file(folder, 0).exists()}
        return Stage(NAME, number, RUNS, title, {**nothing, **kept, **changes})


def _done(stage: Stage, config: Mapping[str, Any]) -> bool:
    """Whether a run has come to its end; one that has not yet begun is put on record."""
    settings = {**config, **stage.changes}
    # As JSON has it: tuples are lists.
    own = json.loads(json.dumps({key: settings[key] for key in _DECIDING if key in settings}))
    record = Path(config["output"]) / RECORD
    known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    checkpoint = checkpoint_file(stage.changes["output"], 0)
    if not checkpoint.exists():
        if RankGroup().rank == 0:
            record.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(record) as stream:
                stream.write(json.dumps({**known, str(stage.number): own}, indent=1).encode())
        return False
    before = known.get(str(stage.number))
    if before is None:
        raise ConfigError(f"{checkpoint.parent} holds the checkpoints of another run; give another output")
    for key, value in own.items():
        # A trainer's base may leave out what ours has.
        if before.get(key, value) != value:
            raise ConfigError(
                f"run {stage.number} of {NAME} in {checkpoint.parent} was begun with {key}={before[key]!r}, and is "
                f"now to have {value!r}: set it back, or give another output"
            )
    epoch = read_checkpoint(checkpoint).get("epoch")
    if not isinstance(epoch, int):
        raise CheckpointError(f"{checkpoint} says nothing of its epoch: it is of another trainer")
    return bool(epoch >= settings["num_epoch"])
