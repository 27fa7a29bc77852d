"""The page: complete in itself, sound as HTML, and looked at in a browser where there is one."""

import base64
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest

from arcface_kd.cli.main import main
from arcface_kd.config.kd import KDConfig
from arcface_kd.data.formats.tinyface import read_tinyface
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.evaluation.report.run_folder import read_run
from arcface_kd.evaluation.tinyface import embed_tinyface, judge_tinyface
from arcface_kd.teachers.base import load_teacher
from arcface_kd.training.trainer import train
from tests.browser import Page, find_browser, open_browser
from tests.data.tinyface_folders import write_tinyface
from tests.evaluation.runs import DIMENSION, NETWORK, write_run
from tests.host.trainer.faces import Faces, draw_faces
from tests.networks import untrained_file
from tests.teachers.onnx_models import face_network, saved, weights
from tests.training.runs import config_for

_VOID = {"meta", "link", "img", "source", "br"}
# A name that would break the page or the table, were it not escaped.
ODD = "a|b<c>&_d_"

SCALARS = {
    "loss": [40.0, 30.0, 20.0, 10.0],
    "kd/ce": [30.0, 25.0, 15.0, 9.0],
    "kd/pull": [10.0, 5.0, 5.0, 1.0],
    "kd/gradient_norm/ce": [1.0, 1.0, 1.0, 1.0],
    "kd/gradient_norm/pull": [1.0, 0.5, 0.25, 0.1],
    "kd/gradient_share/ce": [0.5, 0.66, 0.8, 0.9],
    "kd/gradient_share/pull": [0.5, 0.34, 0.2, 0.1],
}


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Faces:
    return draw_faces(tmp_path_factory.mktemp("faces"), identities=4, images=4)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained_file(tmp_path_factory.mktemp("teacher"), NETWORK, DIMENSION)


@pytest.fixture(scope="module")
def runs(faces: Faces, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One of the compact trainer with AdaDistill, one as the host leaves it, one with nothing but its model."""
    folder = tmp_path_factory.mktemp("runs")
    keys = {"network": NETWORK, "embedding_size": DIMENSION, "batch_size": 4}
    config = config_for(faces, folder / "adadistill", num_epoch=1, **keys)
    train(config, distiller=Distiller(KDConfig(methods=("adadistill",)), load_teacher(teacher)))
    host = write_run(folder / ODD, {"rec": faces.folder, "kd": "mine"}, SCALARS, seed=1)
    bare = write_run(folder / "bare", {"rec": faces.folder}, seed=2)
    return [folder / "adadistill", host, bare]


@pytest.fixture(scope="module")
def report(runs: list[Path], faces: Faces, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "report"
    words = [*map(str, runs), "--data", str(faces.folder), "--out", str(out), "--kd-teacher", str(teacher)]
    assert main(["compare", *words]) == 0
    return out


class Sound(HTMLParser):
    """Reads a page and notes what is wrong with it."""

    def __init__(self) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.faults: list[str] = []
        self.references: list[str] = []
        self.images: list[dict[str, str]] = []
        self.headings: list[str] = []
        self.cells: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        self.references += [found[name] for name in ("src", "srcset", "href") if name in found]
        if tag == "img":
            self.images.append(found)
        if tag in ("script", "iframe", "object", "embed") or any(name.startswith("on") for name in found):
            self.faults.append(f"<{tag}> that runs something")
        if tag not in _VOID:
            self.open_tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open_tags or self.open_tags.pop() != tag:
            self.faults.append(f"</{tag}> that was not open")

    def handle_data(self, data: str) -> None:
        inside = self.open_tags[-1] if self.open_tags else ""
        if inside in ("h1", "h2", "h3"):
            self.headings.append(data)
        if "td" in self.open_tags:
            self.cells.append(data)
        self.text.append(data)


def read(report: Path) -> Sound:
    page = Sound()
    page.feed((report / "report.html").read_text(encoding="utf-8"))
    page.close()
    assert page.open_tags == []
    return page


def test_the_page_is_sound_and_complete_in_itself(report: Path) -> None:
    page = read(report)
    assert page.faults == []
    assert page.references
    assert all(reference.startswith("data:") for reference in page.references)
    text = (report / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"url\(|@import|https?://", re.sub(r"data:[^\"]*", "", text)) == []
    for rule in ("prefers-color-scheme: dark", 'content="light dark"', "width=device-width", "default-src 'none'"):
        assert rule in text


def test_every_picture_has_words_and_can_be_read(report: Path) -> None:
    page = read(report)
    pictures, faces = [], []
    for image in page.images:
        assert image["alt"]
        kind, _, content = image["src"].partition(";base64,")
        data = base64.b64decode(content, validate=True)
        if kind == "data:image/svg+xml":
            assert data.startswith(b"<?xml")
            pictures.append(image["alt"])
        else:
            assert kind == "data:image/jpeg"
            assert cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR).shape == (112, 224, 3)
            faces.append(image["alt"])
    # Four models on one set, five genuine and five impostor pairs each.
    assert len(faces) == 4 * 2 * 5
    wanted = ("ROC", "Histograms", "loss, all", "loss term ce", "loss term pull", "gradient shares", "alpha", "drift")
    for word in wanted:
        assert any(word in picture for picture in pictures), word
    assert len(pictures) == len(wanted)


def test_dark_pictures_are_the_light_ones_in_other_colours(report: Path) -> None:
    page = read(report)
    drawn = [r.partition(",")[2] for r in page.references if r.startswith("data:image/svg")]
    dark, light = (base64.b64decode(drawn[at]).decode() for at in (0, 1))
    assert "#17181c" in dark
    assert "#fefefe" in light
    plain = [re.sub(r"#[0-9a-f]{6}", "#", text) for text in (dark, light)]
    assert plain[0] == plain[1]
    assert "#fefefe" not in dark


def test_what_it_says(report: Path, runs: list[Path]) -> None:
    page = read(report)
    assert page.headings[0] == "4 models compared"
    assert {"Verification", "Cost", "ROC and similarities", "Training", "Hardest pairs"} <= set(page.headings)
    assert ODD in page.cells
    assert {"teacher", "adadistill", "mine", "alone"} <= set(page.cells)
    assert any("teacher.pt" in cell for cell in page.cells)
    assert not any("/" in cell for cell in page.cells if cell != "images/s")
    words = " ".join(page.text)
    assert "the set names no identities and no image occurs twice" in words
    assert "No curves: bare left no TensorBoard scalars" in words
    assert any(re.fullmatch(r"\d+\.\d\d to \d+\.\d\d", cell) for cell in page.cells)
    parameters = sum(p.numel() for p in read_run(runs[0]).load().parameters())
    assert page.cells.count(f"{parameters:,}") == 4


def test_markdown_has_the_same_tables(report: Path) -> None:
    lines = (report / "report.md").read_text(encoding="utf-8").splitlines()
    tables = [line for line in lines if line.startswith("|")]
    columns = {len(re.findall(r"(?<!\\)\|", line)) for line in tables[: 2 + 4]}
    assert len(columns) == 1, "a name with | breaks no row"
    assert any(r"a\|b\<c\>\&\_d\_" in line for line in tables)
    assert not any(ODD in line for line in lines)
    assert sum("**" in line for line in tables) >= 1
    cells = set(read(report).cells)
    numbers = re.findall(r"\d+\.\d\d to \d+\.\d\d", "\n".join(tables))
    assert numbers
    assert set(numbers) <= cells
    assert "pair " in "\n".join(lines)


def test_other_ways_to_judge(faces: Faces, tmp_path: Path) -> None:
    """Low resolution, a gallery, a group, TinyFace and exported files are on the page as well."""
    exported = [saved(tmp_path, face_network(arrays=weights(seed)), f"{seed}.onnx") for seed in (0, 1)]
    (tmp_path / "other.bin").write_bytes((faces.folder / "pairs.bin").read_bytes())
    tiny = write_tinyface(tmp_path / "tiny", persons=2, distractors=2)
    words = ["--data", str(faces.folder), str(tiny), "--low-res", "28", "--gallery-model", str(exported[1])]
    words += ["--groups", f"both={faces.folder / 'pairs.bin'},{tmp_path / 'other.bin'}", "--no-faces"]
    words += ["--kd-teacher", str(exported[0]), "--kd-teacher", str(exported[1])]
    words += ["--kd-option", "teacher.merge=mean", "teacher.2.std=128"]
    assert main(["compare", *map(str, exported), *words, "--out", str(tmp_path / "report")]) == 0
    page = read(tmp_path / "report")
    assert page.faults == []
    assert {"pairs: low resolution and galleries", "other: low resolution and galleries"} <= set(page.headings)
    for title in ("groups of verification sets, accuracy in %", "identification of low-resolution faces, in %"):
        assert title in page.headings
    assert {"28 px, both sides", "gallery of 1.onnx, 28 px, one side"} <= set(page.text)
    assert any("by the mean of each area, and back by cubics" in words for words in page.text)
    assert {"both", "tiny", "0.onnx"} <= set(page.cells)
    assert any(re.match(r"mean of ONNX 0\.onnx.* and ONNX 1\.onnx", cell) for cell in page.cells)
    assert page.cells.count(f"{exported[0].stat().st_size / 1e6:.1f} MB") == 2
    assert "gallery of 1.onnx" in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert not any("jpeg" in reference for reference in page.references), "--no-faces"
    assert re.search(r"pair \d+, cosine -?\d", " ".join(page.text))


def test_models_of_one_name_are_judged_apart(tmp_path: Path) -> None:
    """One of them against the gallery of the other."""
    a, b = (saved(tmp_path / f"{seed}", face_network(arrays=weights(seed)), "student.onnx") for seed in (0, 1))
    faces = read_tinyface(write_tinyface(tmp_path / "tiny", persons=4, distractors=8))
    words = ["--data", str(faces.folder), "--gallery-model", str(b), "--out", str(tmp_path / "report")]
    own, other = (embed_tinyface(load_teacher(model), faces) for model in (a, b))
    wanted = {
        ("0/student.onnx", ""): judge_tinyface(faces, own),
        ("1/student.onnx", ""): judge_tinyface(faces, other),
        ("0/student.onnx", "1/student.onnx"): judge_tinyface(faces, own, other),
    }
    for models in ([a, b], [a]):
        assert main(["compare", *map(str, models), *words]) == 0
        lines = (tmp_path / "report" / "report.md").read_text(encoding="utf-8").splitlines()
        met = [line.strip("| ").split(" | ") for line in lines if line.startswith("| tiny")]
        assert {(model, gallery): rank for _, model, gallery, _, _, rank, *_ in met} == {
            (model, gallery): f"{100 * (numbers['rank-1'] or 0):.3f}"
            for (model, gallery), numbers in wanted.items()
            if len(models) == 2 or model == "0/student.onnx"
        }
        assert "Judged on tiny." in lines[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{folder}/none"], "none is no folder"),
        (["{run}", "{run}"], "is given twice"),
        (["{run}", "--gallery-model", "{run}", "--kd-option", "teacher.std=128"], "leave the options out"),
        (["{run}", "--groups", "two={folder}/a.bin,{folder}/b.bin"], "a.bin"),
        (["{run}", "--data", "{folder}"], "holds no set"),
        (["{run}", "--kd-option", "teacher.std=128"], "teacher options were given without a teacher"),
        (["{run}", "--kd-teacher", "{folder}/none.pt"], "none.pt"),
    ],
)
def test_bad_words_end_in_one_line(
    words: list[str], message: str, runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word.format(folder=tmp_path, run=runs[1]) for word in words]
    assert main(["compare", *given, "--out", str(tmp_path / "report")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "report").exists()


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    program = find_browser()
    if program is None:
        pytest.skip("no headless browser here: apt-get install chromium-headless-shell, or name one in CHROMIUM")
    with open_browser(program) as page:
        yield page


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [375, 1200])
def test_in_a_browser(browser: Page, report: Path, width: int, dark: bool) -> None:
    browser.open(report / "report.html", width=width, dark=dark)
    assert browser.complaints == []
    assert browser.run("document.images.length") > 20
    missing = "[...document.images].filter(image => !image.complete || !image.naturalWidth).map(image => image.alt)"
    assert browser.run(missing) == []
    assert browser.run("window.innerWidth") == width
    assert browser.run("document.documentElement.scrollWidth") <= width
    shown = "[...document.querySelectorAll('main *:not(thead *)')]"
    too_far = "e => e.getBoundingClientRect().right > innerWidth"
    assert browser.run(f"{shown}.filter({too_far}).map(e => e.tagName + e.className)") == []
    sizes = "[...document.querySelectorAll('main *')].map(e => parseFloat(getComputedStyle(e).fontSize))"
    assert min(browser.run(sizes)) >= 11
    assert (browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(23, 24, 28)") == dark
    picture = browser.run("document.querySelector('picture img').currentSrc").partition(",")[2]
    assert ("#17181c" in base64.b64decode(picture).decode()) == dark


def test_a_wide_table_scrolls_by_itself(browser: Page, report: Path) -> None:
    browser.open(report / "report.html", width=700)
    browser.run("document.querySelectorAll('thead th:last-child').forEach(e => e.textContent = 'w'.repeat(200))")
    assert browser.run("document.querySelector('table').offsetWidth") > 1400
    assert browser.run("document.documentElement.scrollWidth") <= 700


def test_the_browser_hears_a_page_complain(browser: Page, tmp_path: Path) -> None:
    """The test above could not fail otherwise."""
    page = tmp_path / "bad.html"
    page.write_text('<img src="data:image/png;base64,AAAA" alt="x"><script>console.error("no"); missing()</script>')
    browser.open(page, width=375)
    assert len(browser.complaints) == 2
    assert browser.run("document.images[0].naturalWidth") == 0
