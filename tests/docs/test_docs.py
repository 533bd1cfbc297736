"""Commands, settings, links, tests and paths that the pages name: all of them exist, and none runs here.

A block whose first line is a comment with a file's name (`# two.yaml`, `# my_project/losses/reinforce.py`) is that
file: commands are read in a folder that holds all of these.
"""

import ast
import importlib
import importlib.util
import inspect
import re
import shlex
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from cyclopts.exceptions import MissingArgumentError, UnknownCommandError
from paths import REPOSITORY

from thinkimg.cli.main import app
from thinkimg.config.load import list_presets, load_config
from thinkimg.config.tree import Config

PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CHANGELOG.md",
    REPOSITORY / "artifacts" / "README.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
    *sorted((REPOSITORY / "examples").glob("*.md")),
]
FILE = re.compile(r"# ([\w/-]+\.(?:py|yaml|toml))$")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
TEST = re.compile(r"\b(?:tests/)?((?:\w+/)+test_\w+)(?:\.py)?(?:::(\w+))?")
PATH = re.compile(r"(?:thinkimg|flows|tests|docs|benchmarks|requirements|examples|artifacts)/[\w./-]*\w/?")
FILES = (".md", ".py", ".yaml", ".json", ".jsonl", ".parquet", ".png")
MACHINE = re.compile(r"(?<![\w.>-])/(?:work|tmp|root|home)\b")
PREFECT = ("server start", "worker start", "deployment run", "deployment schedule", "deploy", "work-pool create")
MAKEFILE = (REPOSITORY / "Makefile").read_text(encoding="utf-8")


def label(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


@pytest.fixture(params=PAGES, ids=label)
def page(request) -> Path:
    assert request.param.is_file(), f"{label(request.param)} is missing"
    return request.param


@cache
def split(page: Path) -> tuple[str, tuple[str, ...]]:
    """Return (prose, code blocks) of a page; a block is fenced, or indented by four spaces after an empty line."""
    prose: list[str] = []
    blocks: list[list[str]] = []
    fence, inside, empty = None, False, True
    for line in page.read_text(encoding="utf-8").splitlines():
        if fence or line.lstrip().startswith("```"):
            if fence and line.strip() == fence:
                fence = None
            elif fence:
                blocks[-1].append(line)
            else:
                fence = "```"
                blocks.append([])
            inside = False
        elif line.startswith("    ") and (inside or empty):
            if not inside:
                blocks.append([])
            blocks[-1].append(line[4:])
            inside = True
        elif inside and not line.strip():
            blocks[-1].append("")
        else:
            inside = False
            prose.append(line)
        empty = not line.strip()
    return "\n".join(prose), tuple("\n".join(block) for block in blocks)


def spans(page: Path) -> list[str]:
    """Return the code within the text of a page."""
    return [" ".join(span.split()) for span in SPAN.findall(split(page)[0])]


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each command of a shell block, without variables before it and files after it."""
    for line in text.replace("\\\n", " ").splitlines():
        if not re.match(r"(\$ )?(\w+=\S+ )*(\S*/)?(thinkimg|prefect|make|python|pytest) ", f"{line.strip()} "):
            continue
        words = shlex.split(line.strip().removeprefix("$ "), comments=True)
        command: list[str] = []
        for end, word in [*enumerate(words, 1), (0, ";")]:
            if word in (";", "&&", "||", "|", ">"):
                first = next((place for place, part in enumerate(command) if not re.match(r"\w+=", part)), None)
                if first is not None:
                    yield [Path(command[first]).name, *command[first + 1 :]]
                command = []
            elif word != "…" and words[end - 2 : end - 1] != [">"]:
                command.append(word)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Iterator[Path]:
    """A folder with the files that the pages show."""
    folder = tmp_path_factory.mktemp("project")
    for page in PAGES:
        for block in split(page)[1] if page.is_file() else ():
            if first := FILE.match(block.partition("\n")[0].strip()):
                path = folder / first[1]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block, encoding="utf-8")
    roots = {path.stem for path in folder.iterdir()}
    before = list(sys.path)
    importlib.invalidate_caches()
    yield folder
    sys.path[:] = before
    for module in [module for module in sys.modules if module.partition(".")[0] in roots]:
        del sys.modules[module]


def check_thinkimg(words: list[str], partial: bool) -> None:
    """partial: whether arguments may be missing, as in the name of a command within a sentence."""
    try:
        command, bound, *_ = app.parse_args(words, exit_on_error=False, print_error=False)
    except MissingArgumentError:
        assert partial, "an argument is missing"
        return
    except UnknownCommandError as error:
        raise AssertionError(f"there is no command {error.unused_tokens}") from None
    arguments = {name: flag.default for name, flag in inspect.signature(command).parameters.items()}
    arguments |= bound.arguments
    if "preset" in arguments:
        check_settings(arguments["preset"], arguments.get("set") or [])


def check_settings(preset: str, overrides: list[str]) -> None:
    own = preset.endswith(".yaml") and not Path(preset).is_file()  # a file that no page shows
    load_config("development" if own else preset, [installed(override) for override in overrides])


def installed(override: str) -> str:
    """Return an override with the modules of the entry points that pyproject.toml in the working directory names."""
    path = Path("pyproject.toml")
    groups = tomllib.loads(path.read_text())["project"].get("entry-points", {}) if path.is_file() else {}
    for entry, module in (item for entries in groups.values() for item in entries.items()):
        override = re.sub(rf"(?<![\w.]){entry}(?![\w.])", module, override)
    return override


def check_make(words: list[str]) -> None:
    for word in words:
        variable, equals, _ = word.partition("=")
        known = f"$({variable})" in MAKEFILE if equals else re.search(rf"^{re.escape(word)}:", MAKEFILE, re.MULTILINE)
        assert known, f"the Makefile has no {variable}"


def check_prefect(words: list[str]) -> None:
    """Verb, deployment, and the parameters of its form."""
    assert " ".join(words).startswith(PREFECT), "not among the verbs of PREFECT"
    names = [word for word in words if re.fullmatch(r"\w+/\w+", word)]
    assert set(names) <= deployments(), names
    given = [words[place + 1] for place, word in enumerate(words) if word in ("--param", "-p")]
    parameters = dict(text.split("=", 1) for text in given)
    if parameters:
        form = loop_parameters() if names == ["thinkimg/loop"] else stage_parameters(names[0].partition("/")[0])
        assert parameters.keys() <= form, form
        check_settings(parameters.get("preset", "tiny"), yaml.safe_load(parameters.get("overrides", "[]")))


def loop_parameters() -> set[str]:
    """Return the parameters of the loop's flow, without the seconds that Prefect takes to be imported."""
    tree = ast.parse((REPOSITORY / "flows" / "loop.py").read_text(encoding="utf-8"))
    [loop] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "loop"]
    return {argument.arg for argument in loop.args.args}


def stage_parameters(stage: str) -> set[str]:
    """Return the fields of a stage's form: the flags of its command."""
    flags = inspect.signature(app[stage.replace("_", "-")].default_command).parameters
    return {"overrides", *flags} - {"set", "dry_run"}


@cache
def deployments() -> set[str]:
    names = [entry["name"] for entry in yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())["deployments"]]
    return {"thinkimg/loop", *(f"{name}/{name}" for name in names if name != "loop")}


def check_python(words: list[str]) -> None:
    if words[:1] == ["-m"]:
        assert words[1] in ("venv", "build", "pip") or importlib.util.find_spec(words[1]), words[1]
        if words[1] == "thinkimg":
            check_thinkimg(words[2:], partial=False)
    elif words and not words[0].startswith("-"):
        assert (REPOSITORY / words[0]).is_file() or Path(words[0]).is_file(), f"there is no {words[0]}"


def check(words: list[str], partial: bool = False) -> None:
    program, *rest = (re.sub(r"^\$(\w+)$", r"\1", word) for word in words)  # a variable of the shell
    if program == "thinkimg":
        check_thinkimg(rest, partial)
    elif program == "make":
        check_make(rest)
    elif program == "prefect":
        check_prefect(rest)
    elif program == "python":
        check_python(rest)


def test_every_command_is_one_and_names_settings_that_exist(page, project, monkeypatch):
    monkeypatch.chdir(project)
    texts = [(block, False) for block in split(page)[1]] + [(span, True) for span in spans(page)]
    wrong = []
    for text, partial in texts:
        for words in commands(text):
            try:
                check(words, partial)
            except Exception as error:
                wrong.append(f"{shlex.join(words)}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)


def test_every_setting_in_the_text_exists(page):
    """Code such as `train.loss.beta=0.01` or `where.store`."""
    wrong = []
    for span in spans(page):
        setting, _, _ = span.partition("=")
        named = re.fullmatch(r"\w+(\.\w+)+", setting) and Path(setting).suffix not in FILES
        if named and setting.partition(".")[0] in Config.model_fields and not any(has(schema(), setting.split("."))):
            wrong.append(span)
    assert not wrong, wrong


@cache
def schema() -> dict[str, Any]:
    return Config.model_json_schema()


def has(node: dict[str, Any], keys: list[str]) -> Iterator[bool]:
    """Yield True for each place of the schema at which the keys lead to something."""
    if reference := node.get("$ref"):
        node = schema()["$defs"][reference.rpartition("/")[2]]
    if not keys:
        yield True
        return
    for variant in [*node.get("anyOf", ()), *node.get("oneOf", ()), *node.get("allOf", ())]:
        yield from has(variant, keys)
    if keys[0] in node.get("properties", {}):
        yield from has(node["properties"][keys[0]], keys[1:])
    elif isinstance(node.get("additionalProperties"), dict):
        yield from has(node["additionalProperties"], keys[1:])


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub makes them."""
    seen: Counter[str] = Counter()
    result = set()
    for heading in re.findall(r"^#+ (.+)$", split(page)[0], re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", LINK.sub("", heading).lower()).strip().replace(" ", "-")
        result.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return result


def test_every_link_leads_somewhere(page):
    wrong = []
    for link in LINK.findall(split(page)[0]):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert not wrong, wrong


def test_every_test_and_path_that_is_named_exists(page):
    text = page.read_text(encoding="utf-8")
    wrong = []
    for module, function in TEST.findall(text):
        path = REPOSITORY / "tests" / f"{module}.py"
        if not path.is_file() or (function and function not in functions(path)):
            wrong.append(f"{module}.py::{function}".removesuffix("::"))
    for path in [span for span in spans(page) if PATH.fullmatch(span) and span not in deployments()]:
        wrong += [] if (REPOSITORY / path).exists() or TEST.fullmatch(path) else [path]
    assert not wrong, wrong


@cache
def functions(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_every_picture_is_shown():
    shown = {page.parent / link for page in PAGES for link in LINK.findall(split(page)[0]) if "://" not in link}
    assert [label(picture) for picture in (REPOSITORY / "docs").glob("*.png") if picture not in shown] == []


def test_no_page_names_a_path_of_somebodys_machine(page):
    assert not MACHINE.findall(page.read_text(encoding="utf-8"))


def test_the_readme_is_short_and_names_every_preset_and_page():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= 130
    assert [line for line in lines if len(line) > 120] == []
    assert [preset for preset in list_presets() if f"`{preset}`" not in text] == []
    links = LINK.findall(text)
    assert [label(page) for page in PAGES[1:] if label(page) not in links] == []


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("thinkimg run --preset tinny", "no preset"),
        ("thinkimg run --preset tiny --set train.loss.gama=1", "no setting"),
        ("thinkimg score --preset tiny", "missing"),
        ("thinkimg scores --preset tiny", "scores"),
        ("thinkimg run --presets tiny", "presets"),
        ("CUDA_VISIBLE_DEVICES=0 thinkimg run --set where.engin.keep=false", "no setting"),
        ("make demos", "Makefile"),
        ("make setup CLOSUR=gpu", "Makefile"),
        ("prefect deployment run score/scores", "score/scores"),
        ("prefect deployment run score/score --param rollout=1", "rollouts"),
        ("python -m flows.scor", "flows.scor"),
        ("python benchmarks/lerning.py", "lerning"),
    ],
)
def test_a_wrong_command_is_noticed(text, complaint):
    [words] = commands(text)
    with pytest.raises(Exception, match=complaint):
        check(words)


def test_what_a_shell_takes_for_itself_is_no_argument():
    text = "X=1 .venv/bin/thinkimg run \\\n    --preset tiny  # a comment\n$ thinkimg schema > schema.json && make ui"
    assert list(commands(text)) == [["thinkimg", "run", "--preset", "tiny"], ["thinkimg", "schema"], ["make", "ui"]]


@pytest.mark.parametrize("key", ["data.columns.image", "image.embedding.model", "train.loss.beta", "where.store"])
def test_a_setting_is_looked_for_in_every_variant(key):
    assert any(has(schema(), key.split(".")))
    assert not any(has(schema(), f"{key}s".split(".")))
