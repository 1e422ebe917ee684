"""What the documentation says is so: its commands parse, its links lead somewhere, its messages occur in the source.

That the commands of the README's tour and demo also run, with these very launchers, is tests/test_demo.py's and
tests/test_deepspeed.py's business; here each is taken as far as it goes without doing anything.
"""

import ast
import functools
import pkgutil
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ldt import submit
from ldt.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELL = ("", "bash", "sh")
PROGRAMS = ("ldt", "torchrun", "deepspeed", "srun", "sbatch", "python", "make")
STANDS_FOR = {
    "CONFIG": "configs/debug.yaml",
    "CONFIG.yaml": "configs/debug.yaml",
    "COMMAND": "train",
    "RUN": "runs/debug",
    "CHECKPOINT": "runs/debug",
    "PATH": "runs/debug",
    "JOB": "1",
    "A": "runs/a",
    "B": "runs/b",
    "C": "runs/c",
}


def blocks(page: Path) -> list[str]:
    """The shell blocks of a page."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.M | re.S)
    return [text for language, text in found if language in SHELL and re.match(rf"({'|'.join(PROGRAMS)}) ", text)]


def commands() -> list[tuple[str, str]]:
    """(page, command): the lines of shell blocks, and inline code that begins like a command with arguments."""
    out = []
    for page in PAGES:
        lines = [line for block in blocks(page) for line in block.splitlines()]
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
        lines += re.findall(rf"`((?:{'|'.join(PROGRAMS)}) [^`\n]+)`", prose)
        for line in lines:
            for part in line.split(" && "):
                if part.strip().split(" ")[0] in PROGRAMS:
                    out.append((page.name, part.strip()))
    return sorted(set(out))


def words_of(command: str) -> list[str]:
    """Its words without comment, optional parts and ellipses, placeholders filled in."""
    command = re.sub(r"\s{2,}\S.*$", "", re.sub(r"\[[^\]]*\.\.\.\]", "", command))  # text after two spaces explains
    words = [w for w in shlex.split(command, comments=True) if w not in ("…", "...")]
    stands_for = STANDS_FOR | ({"CONFIG": "configs/encode/fashion_mnist.yaml"} if "encode" in words[1:3] else {})
    return [stands_for.get(word, word) for word in words]


WRAPPED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
NO_END = ("e.g.", "i.e.", "et al.", "vs.", "cf.", "...")


def sentences(text: str) -> list[str]:
    """A line cut after each full stop, question or exclamation mark that a new sentence follows.

    Code, parentheses and the number or bold title that a line begins with are never cut.
    """
    found, start, depth, code = [], 0, 0, False
    for i, c in enumerate(text):
        code ^= c == "`"
        depth += (c in "([") - (c in ")]") if not code else 0
        head = text[start:i]
        ends = not (code or depth) and c == " " and re.search(r"[.!?]\)?$", head)
        begins = re.match(r"[A-Z`*\[(\"0-9]", text[i + 1 :])
        if ends and begins and not head.endswith(NO_END) and not re.fullmatch(r"\**\d+\.", head):
            found.append(head)
            start = i + 1
    return [*found, text[start:]]


def prose_lines(page: Path) -> list[tuple[str, str]]:
    """(line, the line after it), for the lines of paragraphs and lists: no code, tables or headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    lines = [line for line in text.split("\n") if not line.startswith(("|", "#", "!", "<"))]
    return [(line, after) for line, after in zip(lines, [*lines[1:], ""], strict=True) if line.strip()]


@pytest.mark.parametrize("page", WRAPPED, ids=lambda p: p.name)
def test_a_line_is_a_sentence(page: Path) -> None:
    """Changes of one sentence are changes of one line, and reviews show what was rewritten."""
    for line, after in prose_lines(page):
        assert len(sentences(line.strip())) == 1, f"{page.name}: two sentences in one line: {line}"
        ends_block = not after.strip() or re.match(r"\s*([-*]|\d+\.) ", after)
        assert ends_block or re.search(r"[.!?:][)*]*$", line), f"{page.name}: a sentence goes on after: {line}"


def test_there_are_commands() -> None:
    assert len(commands()) > 50


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_blocks_are_shell(page: Path) -> None:
    for block in blocks(page):
        checked = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True)
        assert checked.returncode == 0, f"{block}\n{checked.stderr}"


@pytest.mark.parametrize(("page", "command"), commands(), ids=lambda x: x)
def test_a_command_is_taken(page: str, command: str, monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    """As far as `--dry-run`: known program, flags and keys, and every file that is named is there."""
    monkeypatch.chdir(ROOT)
    words = words_of(command)
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{word}:", makefile, re.M) for word in words[1:]), command
    elif words[0] == "python" and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file(), command
        if words[1] == "tools/submit.py":
            assert submit.submit([*words[2:], "--dry-run"])
    elif words[0] == "sbatch":
        for script in (w for w in words if w.startswith("slurm/")):
            assert (ROOT / script).is_file(), command
            dry_run([Path(script).stem, *words[words.index(script) + 1 :]])
    elif "ldt" in words:
        dry_run(words[words.index("ldt") + 1 :])


def dry_run(words: list[str]) -> None:
    if words[:1] == ["COMMAND"] or set(words) & {"--help", "--version"}:
        words = ["train", "--help"]
    parts = 2 if " ".join(words[:2]) in COMMANDS else 1
    assert words and " ".join(words[:parts]) in COMMANDS, words
    if len(words) > parts:  # `ldt train` alone is only a name
        assert main([*words, "--dry-run"]) == 0, words


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name) if name else page
        assert path.exists(), f"{page.name}: {target}"
        headings = re.findall(r"^#+ (.+)$", path.read_text(), re.M) if anchor else []
        slugs = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
        assert not anchor or anchor in slugs, f"{page.name}: {target}"


def said_by_the_source() -> list[str]:
    """Every string of the package, what is filled in shown as …"""
    out = []
    for path in (ROOT / "ldt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values]
                out.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                out.append(re.sub(r"%[sd]|%\.\df", "…", node.value))
    return out


def quoted_messages() -> list[tuple[str, str]]:
    """The first column of every table whose head is `message`."""
    out = []
    for page in PAGES:
        for table in re.findall(r"^\| message \|.*\n(?:\|.*\n)+", page.read_text(), re.M):
            out += [(page.name, m) for m in re.findall(r"^\| `([^`]+)` \|", table, re.M)]
    return out


def test_quoted_messages_are_what_the_source_says() -> None:
    source, quoted = said_by_the_source(), quoted_messages()
    assert len(quoted) > 20
    for page, message in quoted:
        pieces = [re.escape(piece) for piece in message.split("…")]
        pattern = re.compile(".*?…".join(pieces) if len(pieces) > 1 else pieces[0])
        assert any(pattern.search(text) for text in source), f"{page}: no code says {message!r}"


FOREIGN = {
    *("nohup", "SBATCH_ACCOUNT", "SBATCH_PARTITION"),  # the shell's and SLURM's
    *("VIRTUAL_imagenet256_labeled", "npz", "cin", "param", "_hp_mapping"),  # of ADM, latent-diffusion and DeepSpeed
    *("OWNERS", "ARMS", "case", "test_"),  # of the tests
    *("data_x", "photos"),  # stand for any attribute, and for any directory of the reader's
}


def without_docstrings(tree: ast.AST) -> ast.AST:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


@functools.cache
def words_of_the_source() -> set[str]:
    """Every word of the code of ldt/, tools/ and the tests' names, without comments and docstrings, and of configs/."""
    texts = [p.read_text() for folder in ("configs", "slurm") for p in (ROOT / folder).rglob("*.*")]
    for folder in ("ldt", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            texts.append(ast.unparse(without_docstrings(ast.parse(path.read_text()))))
            texts.append(path.stem)
        texts += [p.name for p in (ROOT / folder).iterdir()]
    return set(re.findall(r"\w+", " ".join(texts)))


def code_spans() -> list[tuple[str, str]]:
    """(where, code): what stands in backticks in the pages and in the package's docstrings."""
    out = []
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
        out += [(page.name, code) for code in re.findall(r"`([^`\n]+)`", text)]
    for path in (ROOT / "ldt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                found = re.findall(r"`([^`\n]+)`", ast.get_docstring(node) or "")
                out += [(str(path.relative_to(ROOT)), code) for code in found]
    return sorted(set(out))


def unknown(code: str) -> str:
    """What of a piece of code exists nowhere; empty where all does, or where it is no name or path."""
    if re.fullmatch(r"(ldt|tests|tools|docs|configs|slurm)/[\w./-]+", code):
        return "" if (ROOT / code).exists() else code
    match = re.fullmatch(r"([A-Za-z_][\w.]*)(\(.*\)|=.*)?", code)
    if not match:
        return ""
    name = match[1].removesuffix(".")
    if name.startswith("ldt."):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            return name
        return ""
    if set(name.split(".")) <= words_of_the_source() | FOREIGN or (ROOT / name).exists():
        return ""
    return name


def test_what_stands_in_backticks_exists() -> None:
    lost = {code: where for where, code in code_spans() if unknown(code)}
    assert not lost, "no such name or path: " + "; ".join(f"`{code}` in {where}" for code, where in lost.items())


@pytest.mark.parametrize(
    "invented", ["ldt/nowhere.py", "ldt.rng.nothing", "blocks_off", "train.no_such_key=1", "no_f(x)"]
)
def test_what_is_invented_is_found(invented: str) -> None:
    assert unknown(invented)


def test_the_drawing_has_the_floors_of_the_contract() -> None:
    """docs/architecture.md draws every floor, in the contract's order, and names every package in its tree."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (floors,) = [c["layers"] for c in contracts if c["type"] == "layers"]
    page = (ROOT / "docs" / "architecture.md").read_text()
    section = page[page.index("## Floors") : page.index("## Who writes")]
    (drawing,) = re.findall(r"^```text\n(.*?)^```", section, re.M | re.S)
    assert [re.split(r"\s{2,}", line.strip())[0] for line in drawing.splitlines()] == floors
    tree = page[page.index("## The source tree") :]
    for package in sorted(p.parent.name for p in (ROOT / "ldt").glob("*/__init__.py")):
        assert re.search(rf"^  {package}/ ", tree, re.M), package
    for module in sorted(p.name for p in (ROOT / "ldt").glob("[a-z]*.py")):
        assert re.search(rf"\b{module}\b", tree), module


def test_the_lines_of_the_library_page_run() -> None:
    """docs/api.md's example is Python that parses, with names that exist; what they do is tested in test_api.py."""
    import ldt

    (example,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "api.md").read_text(), re.M | re.S)
    used = {n.attr for n in ast.walk(ast.parse(example)) if isinstance(n, ast.Attribute)}
    assert used == {"load", "sample", "encode", "decode", "evaluate"}
    assert all(hasattr(ldt.Model, name) for name in used - {"load"})
    assert sys.modules["ldt.api"].load is ldt.load


def test_the_plan_that_is_shown_is_the_plan(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "imagenet.md").read_text()
    ((command, shown),) = re.findall(r"^```bash\n(ldt plan .*)\n```\n\n```text\n(.*?)\n```", page, re.M | re.S)
    assert main(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out.strip() == shown
