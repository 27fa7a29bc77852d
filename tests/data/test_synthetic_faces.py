"""The built-in faces: reproducible, aligned, varied, and faces to a network that learned real ones."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arcface_kd.data.dataset import RecordDataset
from arcface_kd.data.formats.face_alignment import TEMPLATE
from arcface_kd.data.formats.pair_identities import pair_identities
from arcface_kd.data.formats.verification_bin import read_bin
from arcface_kd.data.synthetic_faces import SyntheticFaces, write_dataset
from arcface_kd.data.synthetic_faces.canvas import (
    FIELD_LEFT,
    FIELD_SIZE,
    FIELD_TOP,
    SIDE,
    sample,
    to_pixels,
)
from arcface_kd.data.synthetic_faces.face_dataset import draw_pairs
from arcface_kd.data.synthetic_faces.features import Expression, Eyewear, landmarks
from arcface_kd.data.synthetic_faces.photograph import alignment, visible_points
from arcface_kd.data.synthetic_faces.portrait import Portrait
from arcface_kd.data.synthetic_faces.shot import Camera, Light, Shot, draw_shot
from arcface_kd.data.synthetic_faces.traits import Identity, draw_identity
from arcface_kd.errors import ConfigError, DataError

AT_REST = Expression(0.0, 0.0, 0.0, 1.0, (0.0, 0.0), Eyewear.NONE, None)
FRONTAL = Shot(
    yaw=0.0,
    pitch=0.0,
    roll=0.0,
    shift=(0.0, 0.0),
    zoom=1.0,
    expression=AT_REST,
    light=Light(np.array([0, 0, 1], np.float32), np.ones(3, np.float32), np.zeros(3, np.float32)),
    camera=Camera(1.0, 1.0, 1.0, 1.0, 0.0, None, 0.0, 95),
)

SQUARE = np.array([(-20, -20), (20, -20), (20, 20), (-20, 20)], np.float32)


@pytest.fixture(scope="module")
def crowd() -> np.ndarray:
    """One image of each of 150 identities, (150, 112, 112, 3)."""
    faces = SyntheticFaces(3)
    return np.stack([faces.image(identity, 0) for identity in range(150)])


def people(count: int) -> list[Identity]:
    return [draw_identity(np.random.default_rng(number)) for number in range(count)]


# Reproducible and distinct


def test_an_image_does_not_depend_on_what_was_drawn_before() -> None:
    asked = [(identity, index) for identity in (0, 1, 40) for index in (0, 7)]
    first, second = SyntheticFaces(11), SyntheticFaces(11)
    forward = {key: first.jpeg(*key) for key in asked}
    # More identities than an instance keeps, so that some portraits are drawn again.
    for identity in range(60, 100):
        second.jpeg(identity, 3)
    backward = {key: second.jpeg(*key) for key in reversed(asked)}
    assert forward == backward
    assert forward == {key: second.jpeg(*key) for key in asked}


@pytest.mark.parametrize(("seed", "identity", "index"), [(1, 5, 2), (0, 6, 2), (0, 5, 3), (0, 2, 5)])
def test_another_seed_identity_or_index_is_another_image(seed: int, identity: int, index: int) -> None:
    one, other = SyntheticFaces(0).image(5, 2), SyntheticFaces(seed).image(identity, index)
    assert np.abs(one.astype(int) - other.astype(int)).mean() > 8


def test_many_images_are_all_different() -> None:
    faces = SyntheticFaces(2)
    drawn = {faces.jpeg(identity, index) for identity in range(12) for index in range(6)}
    assert len(drawn) == 12 * 6


def test_an_identity_keeps_its_traits_and_populations_differ() -> None:
    def drawn(seed: int, identity: int) -> str:
        return repr(SyntheticFaces(seed)._portrait(identity).identity)

    assert drawn(4, 9) == drawn(4, 9)
    assert len({drawn(seed, identity) for seed in range(3) for identity in range(10)}) == 30


@pytest.mark.parametrize(("identity", "index"), [(-1, 0), (0, -1)])
def test_numbers_are_not_negative(identity: int, index: int) -> None:
    with pytest.raises(ValueError, match="negative"):
        SyntheticFaces(0).jpeg(identity, index)


# Pixels


def test_image_is_the_decoded_jpeg() -> None:
    faces = SyntheticFaces(0)
    pixels, encoded = faces.image(3, 4), faces.jpeg(3, 4)
    assert encoded[:2] == b"\xff\xd8"
    decoded = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
    assert decoded is not None
    assert pixels.dtype == np.uint8
    assert pixels.shape == (112, 112, 3)
    assert np.array_equal(pixels, cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB))


def test_images_are_neither_flat_nor_saturated(crowd: np.ndarray) -> None:
    brightness = crowd.mean(axis=(1, 2, 3))
    assert brightness.min() > 12
    assert brightness.max() < 243
    assert 80 < brightness.mean() < 160
    assert brightness.std() > 15, "light and skin should vary"
    assert crowd.std(axis=(1, 2, 3)).min() > 8
    saturated = (crowd == 255).mean(axis=(1, 2, 3))
    assert np.median(saturated) < 0.02


def test_the_average_is_an_aligned_symmetric_face(crowd: np.ndarray) -> None:
    average = cv2.GaussianBlur(crowd.mean(axis=(0, 3)), (0, 0), 1.0)
    assert np.corrcoef(average.ravel(), average[:, ::-1].ravel())[0, 1] > 0.88

    def brightness(x: float, y: float) -> float:
        return float(average[round(y), round(x)])

    (left_x, left_y), (right_x, right_y), nose, left_corner, right_corner = TEMPLATE
    cheeks = (brightness(34, 76) + brightness(78, 76)) / 2
    assert max(brightness(left_x, left_y), brightness(right_x, right_y)) < cheeks - 20, "eyes are darker than cheeks"
    assert brightness(left_x, left_y - 10) < cheeks - 5, "brows too"
    assert brightness(*((left_corner + right_corner) / 2)) < cheeks - 8, "and the mouth"
    assert brightness(nose[0], nose[1] - 6) > cheeks - 5, "the bridge of the nose catches light"


def test_a_person_varies_less_than_people_but_does_vary(crowd: np.ndarray) -> None:
    faces = SyntheticFaces(3)
    own = np.stack([[faces.image(identity, index) for index in range(6)] for identity in range(8)]).astype(float)
    within = own.std(axis=1).mean()
    assert within > 20
    assert within < crowd.astype(float).std(axis=0).mean()


def test_red_is_the_first_channel() -> None:
    portraits = [Portrait(np.random.default_rng(number)) for number in range(20)]
    cheek = to_pixels(np.array([22, 6], np.float32)).astype(int)
    colours = np.array([portrait.paint(AT_REST)[cheek[1], cheek[0], :3] for portrait in portraits]).mean(axis=0)
    assert colours[0] > colours[1] + 15 > colours[2] + 20, "skin is redder than green, greener than blue"


# Traits


def test_anatomy_holds_over_the_population() -> None:
    for person in people(300):
        eyes, brows, nose, mouth, head = person.eyes, person.brows, person.nose, person.mouth, person.head
        assert min(eyes.upper, eyes.lower) > 0.5, "lids must not cross"
        assert eyes.half_spacing - eyes.half_width > 4, "eyes leave room for the nose"
        assert eyes.half_spacing + eyes.half_width < head.temple, "eyes are inside the head"
        assert brows.lift - brows.thickness / 2 > eyes.upper, "brows are above the eyes"
        assert nose.tip_y + 4 < mouth.y - mouth.upper, "the mouth is below the nose"
        assert mouth.y + mouth.lower + 4 < head.chin_y, "the chin is below the mouth"
        assert head.chin < head.jaw < head.cheek, "the head tapers"
        assert head.cheek + person.hair.volume < -FIELD_LEFT, "the head fits into the field"
        for colour in (person.colours.skin, person.colours.hair, person.colours.lips, person.colours.iris):
            assert colour.shape == (3,)
            assert colour.min() >= 0
            assert colour.max() <= 255


def test_the_population_has_every_hair_style_beards_glasses_and_none() -> None:
    crowd = people(400)
    styles = Counter(person.hair.style for person in crowd)
    assert len(styles) == 8
    assert max(styles.values()) < 0.4 * len(crowd)
    for share in (
        np.mean([person.facial_hair.beard > 0 for person in crowd]),
        np.mean([person.glasses.worn > 0.2 for person in crowd]),
        np.mean([person.marks.freckles > 0 for person in crowd]),
    ):
        assert 0.04 < share < 0.4
    assert np.std([person.colours.skin.mean() for person in crowd]) > 20


# Pose and alignment


@settings(max_examples=50, deadline=None)
@given(
    st.floats(-3.1, 3.1), st.floats(0.2, 5.0), st.floats(-200, 200), st.floats(-200, 200)
)  # fmt: skip
def test_alignment_undoes_a_similarity(angle: float, scale: float, x: float, y: float) -> None:
    turn = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    moved = TEMPLATE @ turn.T + (x, y)
    fit = alignment(moved.astype(np.float32), FRONTAL)
    assert np.allclose(moved @ fit[:, :2].T + fit[:, 2], TEMPLATE, atol=1e-2)


@settings(max_examples=30, deadline=None)
@given(st.floats(-0.9, 0.9), st.floats(-0.5, 0.5))
def test_pose_is_a_rotation(yaw: float, pitch: float) -> None:
    rotation = replace(FRONTAL, yaw=yaw, pitch=pitch).rotation
    assert np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-6)
    assert np.linalg.det(rotation) == pytest.approx(1, abs=1e-6)
    ahead = rotation @ np.array([0, 0, 1], np.float32)
    assert ahead[0] * yaw >= 0, "positive yaw looks to the viewer's right"
    assert ahead[1] * pitch >= 0, "positive pitch looks down"


def test_every_pixel_shows_the_point_that_projects_to_it() -> None:
    person = people(3)[2]
    height = Portrait(np.random.default_rng(2)).relief.rest.height
    points = landmarks(person, AT_REST)
    for yaw, pitch in ((0, 0), (0.3, 0), (-0.3, 0.1), (0.1, -0.25)):
        shot = replace(FRONTAL, yaw=yaw, pitch=pitch)
        x, y = visible_points(height, points, shot)
        marks = np.stack([*points.T, sample(height, points[:, :1], points[:, 1:2])[:, 0]], 1)
        fit = alignment((marks @ shot.rotation.T)[:, :2], shot)
        seen = np.stack([x, y, sample(height, x, y)], -1) @ shot.rotation.T
        pixels = seen[..., :2] @ fit[:, :2].T + fit[:, 2]
        rows, columns = np.mgrid[0:112, 0:112]
        error = np.hypot(pixels[..., 0] - columns, pixels[..., 1] - rows)
        # The inner face; at the silhouette a slope hides another and no point need project there.
        assert np.percentile(error[30:100, 30:82], 98) < 1.0
        assert np.median(error[30:100, 30:82]) < 0.15


def test_landmarks_lie_on_the_template_in_every_pose() -> None:
    offsets = []
    for number, person in enumerate(people(15)):
        shot = replace(draw_shot(np.random.default_rng(number), person.glasses), roll=0.0, zoom=1.0, shift=(0.0, 0.0))
        height = Portrait(np.random.default_rng(number)).relief.rest.height
        points = landmarks(person, shot.expression)
        x, y = visible_points(height, points, shot)
        shown = np.array([(x[round(v), round(u)], y[round(v), round(u)]) for u, v in TEMPLATE])
        offsets.append(np.hypot(*(shown - points).T))
    assert np.median(offsets) < 2.5
    assert np.percentile(offsets, 95) < 9


def test_a_smile_raises_and_spreads_the_corners_of_the_mouth() -> None:
    person = people(1)[0]
    rest, smile = landmarks(person, AT_REST), landmarks(person, replace(AT_REST, smile=1.0))
    assert np.array_equal(rest[:3], smile[:3])
    assert (smile[3:, 1] < rest[3:, 1] - 1).all()
    assert smile[4, 0] - smile[3, 0] > rest[4, 0] - rest[3, 0] + 2


def test_an_expression_moves_only_its_features() -> None:
    portrait = Portrait(np.random.default_rng(8))
    rest = portrait.paint(AT_REST).astype(int)
    assert np.array_equal(rest, portrait.paint(AT_REST)), "painting must not wear the portrait"

    def changed(expression: Expression) -> tuple[float, float]:
        rows = np.flatnonzero((portrait.paint(expression) != rest).any(axis=(1, 2)))
        return float(rows.min() * FIELD_SIZE / SIDE + FIELD_TOP), float(rows.max() * FIELD_SIZE / SIDE + FIELD_TOP)

    top, bottom = changed(replace(AT_REST, mouth_open=1.0))
    assert top > 5
    assert bottom < 45
    top, bottom = changed(replace(AT_REST, eyes_open=0.2))
    assert top > -32
    assert bottom < -8
    top, bottom = changed(replace(AT_REST, brow_raise=1.0))
    assert top > -48
    assert bottom < -18
    top, bottom = changed(replace(AT_REST, cap=np.array([200, 0, 0], np.float32)))
    assert bottom < -30
    top, bottom = changed(replace(AT_REST, eyewear=Eyewear.SUNGLASSES))
    assert top > -40
    assert bottom < 0


# Relief


def test_relief_is_a_face() -> None:
    for number in range(10):
        portrait = Portrait(np.random.default_rng(number))
        person, height = portrait.identity, portrait.relief.rest.height

        def at(x: float, y: float, height: np.ndarray = height) -> float:
            return float(sample(height, np.array([[x]], np.float32), np.array([[y]], np.float32))[0, 0])

        tip = at(0, person.nose.tip_y)
        assert tip == pytest.approx(height.max(), abs=1.5), "the nose stands out most"
        assert tip > at(15, person.nose.tip_y) + 5
        assert at(0, person.mouth.y) > at(person.head.cheek, person.mouth.y) + 10, "the sides recede"
        smile = portrait.relief.surface(1.0)
        assert np.allclose(smile.height, height + portrait.relief.smile.height)
        assert portrait.relief.surface(0.0) is portrait.relief.rest
        assert portrait.relief.surface(-0.4) is portrait.relief.rest


# Data sets


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(2, 50), st.integers(0, 100))
def test_pairs_are_balanced_in_every_fold(twenties: int, identities: int, seed: int) -> None:
    persons, is_same = draw_pairs(20 * twenties, identities, np.random.default_rng(seed))
    assert persons.shape == (20 * twenties, 2)
    assert persons.min() >= 0
    assert persons.max() < identities
    assert np.array_equal(persons[:, 0] == persons[:, 1], is_same)
    for fold in np.split(is_same, 10):
        assert np.array_equal(fold, np.arange(2 * twenties) < twenties)


def test_impostors_are_drawn_from_everybody() -> None:
    persons, is_same = draw_pairs(6000, 5, np.random.default_rng(0))
    met = Counter(map(tuple, persons[~is_same].tolist()))
    assert len(met) == 20
    assert max(met.values()) < 1.5 * min(met.values())


def write_small(folder: Path, seed: int, processes: int = 1) -> Path:
    write_dataset(
        folder, identities=5, images_per_identity=3, pairs=40, heldout_identities=4, seed=seed, processes=processes
    )
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("faces") / "new", 21)


def test_training_records_are_the_first_identities(written: Path) -> None:
    files = ["property", "synthetic.bin", "synthetic.identities.txt", "train.idx", "train.rec"]
    assert sorted(path.name for path in written.iterdir()) == files
    assert (written / "property").read_text().split(",")[0] == "5"
    records, faces = RecordDataset(written, num_classes=5), SyntheticFaces(21)
    assert len(records) == 15
    for place in range(15):
        label, index = divmod(place, 3)
        assert records.label(place) == label
        assert bytes(records.image_bytes(place)) == faces.jpeg(label, index)


def test_verification_pairs_are_of_heldout_identities(written: Path) -> None:
    faces = SyntheticFaces(21)
    pairs = read_bin(written / "synthetic.bin")
    # Eighty images of four persons: none has nearly forty.
    known = {faces.jpeg(identity, index): identity for identity in range(9) for index in range(40)}
    assert len(pairs.images) == 80
    assert len(set(pairs.images)) == 80, "no image occurs twice"
    persons = np.array([known[image] for image in pairs.images]).reshape(-1, 2)
    assert persons.min() >= 5, "no training identity is verified"
    assert set(persons.ravel().tolist()) == {5, 6, 7, 8}
    assert np.array_equal(persons[:, 0] == persons[:, 1], pairs.is_same)
    stated = pair_identities(written / "synthetic.bin", pairs)
    assert stated.source == "stated"
    assert np.array_equal(stated.numbers, np.unique(persons, return_inverse=True)[1].reshape(-1, 2))
    for fold in np.split(pairs.is_same, 10):
        assert fold.tolist() == [True, True, False, False]


def test_two_processes_draw_the_same_files(written: Path, tmp_path: Path) -> None:
    again = write_small(tmp_path, 21, processes=2)
    for file in written.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes()


def test_writing_again_gives_the_same_files_and_another_seed_others(written: Path, tmp_path: Path) -> None:
    def contents(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    first = contents(write_small(tmp_path, 22))
    assert contents(write_small(tmp_path, 21)) == contents(written)
    assert first["train.rec"] != (written / "train.rec").read_bytes()
    assert first["synthetic.bin"] != (written / "synthetic.bin").read_bytes()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"identities": 1}, "identities is 1; it must be at least 2"),
        ({"images_per_identity": 0}, "images_per_identity is 0; it must be at least 1"),
        ({"heldout_identities": 1}, "heldout_identities is 1; it must be at least 2"),
        ({"pairs": 0}, "pairs is 0"),
        ({"pairs": 30}, "pairs is 30; it must be a multiple of 20"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_number_out_of_range_is_named(wrong: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        write_dataset(tmp_path / "none", **wrong)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "none").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(DataError, match="taken"):
        write_dataset(tmp_path / "taken", identities=2, images_per_identity=1, pairs=20, heldout_identities=2)


# Real enough


def _face_network(model: Path):  # type: ignore[no-untyped-def]  # onnxruntime is untyped
    """A session of a real face network; its denormal weights, which slow every multiplication, become zero."""
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    graph = onnx.load(str(model))
    for tensor in graph.graph.initializer:
        weights = onnx.numpy_helper.to_array(tensor)
        if weights.dtype == np.float32:
            weights = np.where(np.abs(weights) < 1e-20, np.float32(0), weights)
            tensor.CopyFrom(onnx.numpy_helper.from_array(weights, tensor.name))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.real
@pytest.mark.slow
def test_a_network_of_real_faces_tells_the_identities_apart(real_data: Path) -> None:
    from sklearn.metrics import roc_auc_score

    session = _face_network(real_data / "teachers" / "mobilefacenet_512.onnx")
    name = session.get_inputs()[0].name
    faces, rng = SyntheticFaces(12345), np.random.default_rng(12345)
    people, images = 120, 4

    def embedding(identity: int, index: int) -> np.ndarray:
        bgr = faces.image(identity, index)[..., ::-1].astype(np.float32)
        vector = session.run(None, {name: ((bgr - 127) / 128).transpose(2, 0, 1)[None].copy()})[0][0]
        return vector / np.linalg.norm(vector)

    identities = rng.choice(100_000, people, replace=False).tolist()
    embeddings = np.array([[embedding(who, int(rng.integers(1000))) for _ in range(images)] for who in identities])
    first, second = np.triu_indices(images, 1)
    genuine = (embeddings[:, first] * embeddings[:, second]).sum(-1).ravel()
    one, step = rng.integers(people, size=720), rng.integers(1, people, size=720)
    other = (one + step) % people
    impostor = (
        embeddings[one, rng.integers(images, size=720)] * embeddings[other, rng.integers(images, size=720)]
    ).sum(-1)
    auc = roc_auc_score(np.repeat([1, 0], [len(genuine), len(impostor)]), np.concatenate([genuine, impostor]))
    assert auc >= 0.88, "0.85 is asked of the built-in faces"
    assert auc <= 0.98, "a set without variation within an identity teaches nothing"
