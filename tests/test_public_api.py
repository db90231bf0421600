"""What `import kernel_env` gives, which layer may know which, and whether the documents tell the truth."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import kernel_env
from kernel_env.reading import SCHEMA

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "kernel_env"

LAYERS = [
    {"errors"},
    {"types", "isolation", "seccomp", "syntax", "metrics", "fitting", "removal"},
    {"config", "sidefiles", "recorded"},
    {"budget", "reading"},
    {"episode"},
    {"schema"},
    {"outputs", "answer", "portal", "wire", "refusals"},
    {"folder"},
    {"calls", "workdir", "meter"},
    {"bridge"},
    {"execution", "install", "forked"},
    {"templates"},
    {"fork"},
    {"kernelspecs"},
    {"process"},
    {"live"},
    {"kernel", "helpers", "rubrics"},
    {"pool"},
    {"rollout"},
    {"prompts", "example", "example_cells"},
    {"markup"},
    {"notebook"},
    {"exporters"},
    {"llm", "tree"},
    {"tasks"},
    {"suite"},
    {"rows", "needle", "code"},
    {"aggregation", "pairs"},
    {"suites"},
    {"recursion"},
    {"own_model"},
    {"environment"},
    {"local", "runner", "replay", "grading"},
    {"trial", "rundir", "report"},
    {"policies"},
    {"summary"},
    {"evaluate"},
    {"views"},
    {"cli_records", "cli_eval"},
    {"cli"},
    {"__init__", "__main__"},
]


def test_all_is_sorted_and_complete() -> None:
    names = kernel_env.__all__
    assert names == sorted(names, key=lambda name: (not name.isupper(), name[0].islower(), name))
    assert len(names) <= 60
    public = {n for n, v in vars(kernel_env).items() if not n.startswith("_") and not inspect.ismodule(v)}
    assert public - {"annotations"} == set(names)
    for name in names:
        if isinstance(getattr(kernel_env, name), str | dict):
            continue
        assert getattr(kernel_env, name).__module__ == "kernel_env"
        assert getattr(kernel_env, name).__doc__


def test_modules_import_only_from_layers_below() -> None:
    level = {name: number for number, names in enumerate(LAYERS) for name in names}
    modules = {path.stem: path for path in PACKAGE.glob("*.py")}
    modules |= {path.stem: path for path in PACKAGE.glob("provisioners/[!_]*.py")}
    modules |= {path.stem: path for path in PACKAGE.glob("suites/[!_]*.py")}
    modules["suites"] = PACKAGE / "suites" / "__init__.py"
    assert modules.keys() == level.keys()
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kernel_env"):
                parts = [part for part in (node.module or "").split(".")[1:] if part != "provisioners"]
                imported = [parts[-1]] if parts else [alias.name for alias in node.names]
                for other in imported:
                    assert level[other] < level[name], f"{name} imports {other}"
                    assert other != "guest"


@pytest.mark.parametrize("name", ["LocalREPLEnv", "REPLEnvironment"])
def test_the_facades_keep_the_published_parameters(name: str) -> None:
    parameters = inspect.signature(getattr(kernel_env, name)).parameters
    published = {
        "llm_query_fn": None,
        "llm_batch_fn": None,
        "subcall_fn": None,
        "subcall_batch_fn": None,
        "max_output_length": 8192,
        "context_preview_length": 500,
        "rubric": None,
        "rlm_max_depth": 1,
        "rlm_max_iterations": None,
        "kernel_name": "python3",
        "limits": None,
        "tools": None,
        "isolation": "auto",
        "preload": (),
        "files": None,
        "on_output": None,
        "on_turn": None,
    }
    if name == "REPLEnvironment":
        published |= {"context": None, "task_prompt": None, "max_iterations": 30}
    assert {key: parameter.default for key, parameter in parameters.items()} == published


def readme_blocks(language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )


@pytest.mark.parametrize(
    ("code", "printed"),
    list(zip(readme_blocks("python"), readme_blocks("text"), strict=True)),
    ids=["episode", "run", "evaluation"],
)
def test_the_examples_of_the_readme_print_what_it_says(tmp_path: Path, code: str, printed: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, cwd=tmp_path
    )
    assert done.stdout == printed
    assert (tmp_path / "episode.ipynb").exists() == ("export" in code)
    assert len(code.splitlines()) <= 15


def test_ci_runs_the_test_command_of_the_readme() -> None:
    _, test_command = readme_blocks("sh")
    assert "pytest" in test_command
    assert f"\n{test_command}" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_the_notebooks_run(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    nbformat.validate(notebook)
    NotebookClient(notebook, timeout=100, resources={"metadata": {"path": str(tmp_path)}}).execute()


@pytest.mark.parametrize(
    "path", sorted((ROOT / "notebooks" / "gallery").glob("*.ipynb")), ids=lambda path: path.stem
)
def test_the_gallery_is_of_whole_episodes_of_the_present_schema(path: Path) -> None:
    episode = kernel_env.Episode.from_notebook(path)
    assert episode.edits == []
    assert episode.final_answer is not None
    shipped = nbformat.read(path, as_version=4).metadata.kernel_env.schema  # type: ignore[no-untyped-call]
    assert shipped == SCHEMA
    assert kernel_env.replay(episode).is_reproduced
