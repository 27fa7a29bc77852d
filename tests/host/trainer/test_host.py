"""The real arcface_torch, patched by our own command: off is off, distilling trains, today's stack runs it.

Needs ARCFACE_TORCH. Everything runs on gloo and CPUs, so that a run repeats to the last bit.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from arcface_kd.backbones import get_backbone
from arcface_kd.data.dataset import open_dataset
from arcface_kd.data.formats.record import unpack
from arcface_kd.data.formats.recordio import RecordReader
from arcface_kd.distributed.class_shard import ClassShard
from arcface_kd.methods.class_centers import initial_centers
from tests.compatibility.same_losses import losses_of
from tests.host.trainer.faces import Faces, cut_faces, draw_faces
from tests.host.trainer.host import checkout, settings
from tests.host.trainer.launch import head_state, launch, train, write_config
from tests.host.trainer.teacher import Teacher, untrained_teacher

pytestmark = [pytest.mark.trainer, pytest.mark.slow]


@pytest.fixture(scope="module")
def stack(arcface_torch: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Today's stack, nothing else: what somebody with a GPU and without KD has."""
    return checkout(arcface_torch, tmp_path_factory.mktemp("stack") / "arcface_torch", "current_stack")


@pytest.fixture(scope="module")
def plain(arcface_torch: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Today's stack on CPUs, without the flag."""
    return checkout(arcface_torch, tmp_path_factory.mktemp("plain") / "arcface_torch", "current_stack", "cpu_gloo")


@pytest.fixture(scope="module")
def flagged(arcface_torch: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the flag."""
    folder = tmp_path_factory.mktemp("flagged") / "arcface_torch"
    return checkout(arcface_torch, folder, "kd_flag", "cpu_gloo", "current_stack")


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Faces:
    return draw_faces(tmp_path_factory.mktemp("faces"), identities=8, images=8)


@pytest.fixture(scope="module")
def teacher(faces: Faces, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return untrained_teacher(faces, tmp_path_factory.mktemp("teacher") / "model.pt", 512)


def falls(losses: dict[int, float]) -> bool:
    values = [losses[step] for step in sorted(losses)]
    third = len(values) // 3
    return third > 1 and float(np.mean(values[-third:])) < float(np.mean(values[:third])) - 1


class TestOffIsOff:
    @pytest.mark.parametrize("ranks", [1, 2])
    def test_same_losses_and_same_bytes(
        self, plain: Path, flagged: Path, faces: Faces, tmp_path: Path, ranks: int
    ) -> None:
        runs = {"plain": plain, "flagged": flagged}
        for name, folder in runs.items():
            train(folder, write_config(folder, "off", settings(faces, tmp_path / name)), ranks=ranks)
        traces = [losses_of(tmp_path / name) for name in runs]
        # The host's log starts with the second step.
        assert sorted(traces[0]) == list(range(2, 1 + faces.num_image // (8 * ranks)))
        assert traces[0] == traces[1]
        assert len(set(traces[0].values())) > 1
        first, second = ((tmp_path / name / "model.pt").read_bytes() for name in runs)
        assert first == second
        for rank in range(ranks):
            one, two = (head_state(tmp_path / name, rank) for name in runs)
            assert torch.equal(one["weight"], two["weight"])


class TestAdaDistill:
    def test_two_ranks_train(self, flagged: Path, faces: Faces, teacher: Teacher, tmp_path: Path) -> None:
        output = tmp_path / "run"
        train(
            flagged,
            write_config(flagged, "two_ranks", settings(faces, output, num_epoch=4, batch_size=4)),
            *("--kd", "adadistill", *teacher.arguments),
            ranks=2,
            torchrun=True,
        )
        assert falls(losses_of(output)), losses_of(output)
        get_backbone("mbf", num_features=512).load_state_dict(torch.load(output / "model.pt", weights_only=True))
        for rank in range(2):
            shard = ClassShard(8, rank, 2)
            centers = head_state(output, rank)["methods.adadistill.centers.weight"]
            assert centers.shape == (4, 512)
            moved = (centers - initial_centers(shard, 512, 2048)).norm(dim=1)
            assert float(moved.min()) > 0.1

    def test_an_interrupted_run_goes_on_to_the_same_bytes(
        self, flagged: Path, faces: Faces, teacher: Teacher, tmp_path: Path
    ) -> None:
        arguments = ("--kd", "adadistill", *teacher.arguments)
        whole, halves = tmp_path / "whole", tmp_path / "halves"
        train(flagged, write_config(flagged, "whole", settings(faces, whole, num_epoch=2)), *arguments)
        # Twice the images in one epoch make the schedule of the whole run; the data set decides where the epoch ends.
        first = settings(faces, halves, num_image=2 * faces.num_image)
        train(flagged, write_config(flagged, "first", first), *arguments)
        second = settings(faces, halves, num_epoch=2, resume=True)
        train(flagged, write_config(flagged, "second", second), *arguments)
        kept, straight = losses_of(halves), losses_of(whole)
        steps = faces.num_image // 8
        assert max(straight) == max(kept) == 2 * steps
        # The host's log leaves out the first step of each run, and averages it into the second.
        seen = sorted(set(kept) - {steps + 2})
        assert [kept[step] for step in seen] == [straight[step] for step in seen]
        assert (halves / "model.pt").read_bytes() == (whole / "model.pt").read_bytes()
        assert head_state(halves).keys() == head_state(whole).keys()
        for name, value in head_state(whole).items():
            assert torch.equal(head_state(halves)[name], value), name

    def test_a_wrong_method_stops_before_the_first_step(self, flagged: Path, faces: Faces, tmp_path: Path) -> None:
        config = write_config(flagged, "wrong", settings(faces, tmp_path / "run"))
        run = launch(flagged, config, "--kd", "adadistil")
        assert run.exit_code != 0
        assert "did you mean 'adadistill'" in run.printed
        assert not (tmp_path / "run" / "model.pt").exists()

    @pytest.mark.real
    def test_real_faces_and_a_real_teacher(self, flagged: Path, real_data: Path, tmp_path: Path) -> None:
        folder, output = tmp_path / "faces", tmp_path / "run"
        folder.mkdir()
        faces = cut_faces(real_data / "faces_real", folder, identities=8, images=8)
        onnx = real_data / "teachers" / "mobilefacenet_512.onnx"
        printed = train(
            flagged,
            write_config(flagged, "real", settings(faces, output, num_epoch=3, val_targets=["pairs"], verbose=24)),
            *("--kd", "adadistill", "--kd-teacher", str(onnx)),
            *("--kd-option", "teacher.channels=bgr", "teacher.mean=127", "teacher.std=128"),
        )
        assert falls(losses_of(output)), losses_of(output)
        assert "[pairs][24]Accuracy-Flip: " in printed
        centers = normalize(head_state(output)["methods.adadistill.centers.weight"])
        # A trained teacher keeps people apart, and so do centers that follow it.
        assert float((centers @ centers.T - 2 * torch.eye(8)).max()) < 0.6


class TestTodaysStack:
    def test_trains_and_verifies_without_mxnet_and_torchvision(self, plain: Path, faces: Faces, tmp_path: Path) -> None:
        output = tmp_path / "run"
        trainer = plain / "train_v2.py"
        source = trainer.read_text(encoding="utf-8")
        # Where the two are installed, an import would pass unseen.
        blocked = "import sys\nsys.modules['mxnet'] = sys.modules['torchvision'] = None\n"
        (plain / "train_blocked.py").write_text(blocked + source, encoding="utf-8")
        config = write_config(plain, "verified", settings(faces, output, val_targets=["pairs"], verbose=4))
        trainer.rename(plain / "kept.py")
        (plain / "train_blocked.py").rename(trainer)
        try:
            printed = train(plain, config)
        finally:
            (plain / "kept.py").replace(trainer)
        assert "[pairs][4]Accuracy-Flip: " in printed
        assert "SyntaxWarning" not in printed
        state = torch.load(output / "model.pt", weights_only=True)
        get_backbone("mbf", num_features=512).load_state_dict(state)

    def test_sampling_and_fp16_run_on_two_ranks(self, plain: Path, faces: Faces, tmp_path: Path) -> None:
        output = tmp_path / "run"
        keys = settings(faces, output, sample_rate=0.5, fp16=True, optimizer="adamw", lr=1e-3, gradient_acc=2)
        train(plain, write_config(plain, "sampled", keys), ranks=2)
        assert np.isfinite(list(losses_of(output).values())).all()

    def test_records_and_folders_come_as_the_host_showed_them(self, stack: Path, faces: Faces, tmp_path: Path) -> None:
        records = open_dataset(faces.folder)
        for at in range(6):
            (tmp_path / "people" / f"{at // 3}").mkdir(parents=True, exist_ok=True)
            (tmp_path / "people" / f"{at // 3}" / f"{at}.jpg").write_bytes(records.image_bytes(at))
        probe = (
            "import json, sys, torch; from dataset import MXFaceDataset\n"
            "for root, count in json.loads(sys.argv[1]):\n"
            "    data = MXFaceDataset(root_dir=root, local_rank=0)\n"
            "    torch.manual_seed(5)\n"
            "    items = [data[at] for at in range(count)]\n"
            "    torch.save(([i[0] for i in items], [i[1] for i in items], len(data)), root + '/items.pt')\n"
        )
        roots = {str(faces.folder): 20, str(tmp_path / "people"): 6}
        command = [sys.executable, "-c", probe, json.dumps(list(roots.items()))]
        subprocess.run(command, cwd=stack, check=True, capture_output=True)
        for root, count in roots.items():
            images, labels, size = torch.load(Path(root) / "items.pt", weights_only=True)
            (Path(root) / "items.pt").unlink()
            torch.manual_seed(5)
            flips = []
            for at in range(count):
                # torchvision's RandomHorizontalFlip, ToTensor and Normalize, step by step.
                flips.append(bool(torch.rand(1) < 0.5))
                image = records[at].image.float().div(255).sub(0.5).div(0.5)
                assert torch.equal(images[at], image.flip(-1) if flips[-1] else image)
                assert labels[at].dtype == torch.long
                assert int(labels[at]) == (records[at].label if count == 20 else at // 3)
            assert len(set(flips)) == 2
            assert size == (faces.num_image if count == 20 else 6)

    def test_verification_reads_what_the_bin_holds(self, stack: Path, faces: Faces, tmp_path: Path) -> None:
        probe = (
            "import sys, torch, numpy as np; from eval import verification\n"
            "(plain, mirrored), same = verification.load_bin(sys.argv[1], (112, 112))\n"
            "torch.save((plain, mirrored, torch.tensor(same)), sys.argv[2])\n"
            "even = np.arange(40) % 2 == 0\n"
            "distance = np.where(even, 0.3, 1.4415**0.5)[:, None]\n"
            "thresholds = np.arange(0, 4, 0.001)\n"
            "print(*verification.calculate_val(thresholds, 0 * distance, distance, even, 1e-3, nrof_folds=2))\n"
        )
        file = tmp_path / "bin.pt"
        command = [sys.executable, "-c", probe, str(faces.folder / "pairs.bin"), str(file)]
        run = subprocess.run(command, cwd=stack, check=True, capture_output=True, text=True)
        plain, mirrored, same = torch.load(file, weights_only=True)
        assert plain.shape == (80, 3, 112, 112)
        assert plain.dtype == torch.float32
        assert torch.equal(mirrored, plain.flip(-1))
        assert same.tolist() == [at % 2 == 0 for at in range(40)]
        assert 0 <= float(plain.min()) < 64 < 192 < float(plain.max()) <= 255
        # Nothing is falsely accepted up to 1.441, so the threshold is that plateau's end, where equal pairs are
        # accepted; at its beginning none is.
        assert [float(word) for word in run.stdout.splitlines()[-1].split()] == [1.0, 0.0, 0.0]

    def test_onnx_export(self, stack: Path, tmp_path: Path) -> None:
        import onnxruntime

        torch.manual_seed(0)
        network = get_backbone("r18", num_features=512).eval()
        torch.save(network.state_dict(), tmp_path / "model.pt")
        command = [sys.executable, "torch2onnx.py", str(tmp_path), "--network", "r18"]
        command += ["--output", str(tmp_path / "model.onnx")]
        subprocess.run(command, cwd=stack, check=True, capture_output=True)
        images = torch.randn(2, 3, 112, 112)
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
        (embeddings,) = session.run(None, {"data": images.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(embeddings, network(images).numpy(), rtol=1e-3, atol=1e-4)

    def test_records_are_shuffled(self, stack: Path, faces: Faces, tmp_path: Path) -> None:
        shutil.copytree(faces.folder, tmp_path / "faces")
        command = [sys.executable, "scripts/shuffle_rec.py", str(tmp_path / "faces")]
        subprocess.run(command, cwd=stack, check=True, capture_output=True)

        def images(folder: Path) -> list[tuple[float, bytes]]:
            with RecordReader(folder / "train.rec", folder / "train.idx") as reader:
                parts = [unpack(reader.read(int(key))) for key in reader.keys]
                return [(float(header.label), bytes(image)) for header, image in parts if header.flag == 0]

        before, after = images(faces.folder), images(tmp_path / "shuffled_faces")
        assert sorted(after) == sorted(before)
        assert after != before

    def test_tools_name_no_type_that_numpy_dropped(self, stack: Path) -> None:
        names = ("np.int)", "np.float)", "np.bool)", "import mxnet", "import torchvision", "from torchvision")
        for path in stack.rglob("*.py"):
            source = path.read_text(encoding="utf-8")
            code = "\n".join(line for line in source.splitlines() if not line.lstrip().startswith("#"))
            assert not [name for name in names if name in code], path
