"""The pages of docs/, and the README's blocks: they build, links lead somewhere, commands and tables are true."""

import dataclasses
import re
import shlex
import subprocess
import sys
from argparse import ArgumentParser
from html.parser import HTMLParser
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch

from arcface_kd import registry
from arcface_kd.backbones import get_backbone
from arcface_kd.cli.main import build_parser
from arcface_kd.config.flags import add_arguments
from arcface_kd.config.kd import KDConfig
from arcface_kd.config.options import build
from arcface_kd.evaluation.report.cost import size_line
from arcface_kd.methods.base import Method, Requirement
from benchmarks.scale import Share, arcface_kd_share, partial_fc_share, published_share

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(DOCS)): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
BLOCKS = [
    (page, language, block)
    for page, text in {**PAGES, "README.md": (ROOT / "README.md").read_text(encoding="utf-8")}.items()
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
]
COMMANDS = [
    (page, shlex.split(line))
    for page, language, block in BLOCKS
    if language == "bash"
    for line in block.splitlines()
    if line
]
NEEDS = {
    Requirement.TEACHER_EMBEDDINGS: "teacher embeddings",
    Requirement.TEACHER_CLASSIFIER: "teacher classifier",
    Requirement.CACHED_EMBEDDINGS: "cached embeddings",
    Requirement.TEACHER_TAIL: "teacher tail",
}
HEADINGS = ["Formula", "Needs", "Knobs", "In the log", "Published", "What we measured", "When to use it"]


def own_methods() -> dict[str, type[Method]]:
    """This project's methods, not those of other packages that happen to be installed."""
    found = entry_points(group=registry.METHODS)
    return {each.name: each.load() for each in found if each.value.startswith("arcface_kd.")}


def page_of(method: str) -> str:
    """The page that a method is on: its own, or one whose heading names it."""
    headings = {page: text.splitlines()[0] for page, text in PAGES.items() if page.startswith("methods/")}
    (page,) = [page for page, heading in headings.items() if method in re.split(r"[#,\s]+", heading)]
    return page


def section(text: str, heading: str) -> str:
    """What stands under a heading of the second level."""
    (found,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return str(found)


def rows(text: str) -> list[list[str]]:
    """The tables' rows, heads and rules left out."""
    lines = [line.strip().strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line] for line in lines]
    rules = {place for place, line in enumerate(cells) if all(set(cell) <= set("-:") for cell in line)}
    return [line for place, line in enumerate(cells) if place not in rules and place + 1 not in rules]


class References(HTMLParser):
    """What a built page fetches by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        if tag in ("img", "script", "iframe", "source") and "src" in found:
            self.found.append(found["src"])
        if tag == "link":
            self.found.append(found["href"])


def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    built = sorted((tmp_path / "site").rglob("index.html"))
    assert len(built) == len(PAGES)
    for page in built:
        references = References()
        references.feed(page.read_text(encoding="utf-8"))
        assert not [found for found in references.found if re.match(r"(https?:)?//", found)], page


def test_a_dead_link_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# A\n\n[b](b.md) and [c](#c)\n")
    own = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    (tmp_path / "mkdocs.yml").write_text(own[: own.index("nav:\n  - Start")])
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert finished.returncode != 0
    said = finished.stdout + finished.stderr
    assert "b.md" in said
    assert "#c" in said


def test_no_kind_of_block_is_left_out() -> None:
    assert {language for _, language, _ in BLOCKS} <= {"bash", "mermaid", "python", "text"}


@pytest.mark.parametrize(("page", "block"), [(page, block) for page, kind, block in BLOCKS if kind == "python"])
def test_a_python_block_runs(page: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(block, page, "exec"), {})


def _host_parser() -> ArgumentParser:
    parser = ArgumentParser()
    parser.add_argument("config")
    add_arguments(parser)
    return parser


def _check_options(arguments: Any) -> None:
    """Methods that are named exist, and so do their options."""
    kd = KDConfig.from_config({"kd": arguments.kd, "kd_option": arguments.kd_option} if arguments.kd else {})
    for method in kd.methods:
        build(registry.load(registry.METHODS, method).Config, kd.options.get(method, {}), method)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[" ".join(command) for _, command in COMMANDS])
def test_a_command_is_understood(page: str, command: list[str]) -> None:
    words = [word for word in command if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    program = words[0]
    if program == "torchrun":
        if "-m" in words:
            assert words[words.index("-m") + 1] == "arcface_kd"
            words = ["arcface-kd", *words[words.index("-m") + 2 :]]
        else:
            arguments = _host_parser().parse_args(words[words.index("train_v2.py") + 1 :])
            _check_options(arguments)
            assert arguments.kd or (ROOT / arguments.config).with_suffix(".py").is_file()
            return
    if words[0] == "arcface-kd":
        arguments = build_parser().parse_args(words[1:])
        assert arguments.run is not None
        if hasattr(arguments, "kd"):
            _check_options(arguments)
        config = getattr(arguments, "config", None)
        # A plain one is the host's own, with the method on the command line.
        assert config is None or arguments.kd or (ROOT / config).with_suffix(".py").is_file(), config
        return
    if page == "README.md" and program in ("cp", "pip", "python3", "."):
        return
    assert program in ("cd", "make") or words[:3] == ["python", "-m", "pytest"], f"{page}: nobody checks {command}"
    for word in words[3:]:
        assert (ROOT / word).exists(), f"{page}: {word}"


def test_methods_and_pages_are_the_same() -> None:
    headings = [text.splitlines()[0] for page, text in PAGES.items() if re.match(r"methods/(?!index)", page)]
    assert sorted(re.findall(r"\w+", " ".join(headings))) == sorted(own_methods())
    overview = PAGES["methods/index.md"]
    for method in own_methods():
        assert f"`{method}`" in overview
        assert f"]({page_of(method).removeprefix('methods/')})" in overview


@pytest.mark.parametrize("page", [page for page in PAGES if re.match(r"methods/(?!index)", page)])
def test_a_method_s_page_has_all_parts(page: str) -> None:
    assert re.findall(r"^## (.*)$", PAGES[page], re.MULTILINE) == HEADINGS
    assert "arxiv.org/abs/" in PAGES[page].split("## Formula")[0]
    assert "```text" in section(PAGES[page], "Formula")
    assert "```bash" in section(PAGES[page], "Needs")
    assert section(PAGES[page], "What we measured").strip()


@pytest.mark.parametrize("method", sorted(own_methods()))
def test_knobs_are_those_of_the_method(method: str) -> None:
    page = page_of(method)
    told = {row[0].strip("`"): row[1].strip("`") for row in rows(section(PAGES[page], "Knobs"))}
    # A page of several methods names each knob with its method.
    several = {name.partition(".")[2]: value for name, value in told.items() if name.startswith(f"{method}.")}
    shared = {name: value for name, value in told.items() if "." not in name}
    fields = dataclasses.fields(own_methods()[method].Config)
    assert {**shared, **several} == {field.name: str(field.default) for field in fields}


@pytest.mark.parametrize("method", sorted(own_methods()))
def test_needs_are_those_of_the_method(method: str) -> None:
    needs = section(PAGES[page_of(method)], "Needs").lower()
    requires = own_methods()[method].requires
    for requirement, words in NEEDS.items():
        # Cached embeddings are the teacher's embeddings too.
        if requirement is Requirement.TEACHER_EMBEDDINGS and Requirement.CACHED_EMBEDDINGS in requires:
            continue
        assert (words in needs) == (requirement in requires), f"{method}: {words}"


def test_memory_is_that_of_the_formulas() -> None:
    found = rows(section(PAGES["scale.md"], "Memory"))
    assert len(found) == 4 * 3
    for _, classes, head, *numbers in found:
        whole = (int(classes.replace(",", "")), 8, 128, 512)
        if head == "`adadistill`":
            share: Share = arcface_kd_share(*whole, torch.device("cuda"))
        else:
            share = partial_fc_share(*whole) if head.startswith("PartialFC") else published_share(*whole)
        assert numbers == [
            f"{share.classes:,}",
            f"{share.state / 1e6:,.0f}",
            f"{share.working / 1e6:,.0f}",
            f"{share.operations / 1e12:.2f}",
            f"{share.sent / 1e6:,.2f}",
        ]


def test_disk_is_two_rows_an_image() -> None:
    found = rows(section(PAGES["scale.md"], "Disk"))
    assert len(found) == 4
    for _, images, gigabytes in found:
        assert gigabytes == f"{2 * int(images.replace(',', '')) * 512 * 2 / 1e9:.1f}"


def test_students_cost_what_their_page_says() -> None:
    table = {row[0].strip("`"): row[1:3] for row in rows(PAGES["students.md"])}
    assert {"mbf", "ghostfacenet", "timm:edgenext_xx_small"} <= table.keys()
    for name, (parameters, adds) in table.items():
        # Those of timm are counted where timm is, and large ones cost the test its time.
        if not name.startswith(("timm:", "r", "ir_", "evolve_")):
            assert size_line(get_backbone(name)) == f"{parameters} parameters, {adds} multiply-adds an image", name
