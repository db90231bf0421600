"""Questions about a real source tree, Python's standard library, with answers from its syntax trees."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import platform
import random
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from kernel_env.errors import ConfigError
from kernel_env.suites.suite import SIZES, Made, Suite, code_of
from kernel_env.syntax import parse

__all__ = ["CodeQuestions"]

_ABOUT = "The context is a dict from the paths of Python files to their source. "
_FACTS = '''
import ast, warnings
warnings.simplefilter("ignore")
def facts(source):
    """Classes with their methods and bases, and functions with their parameters, of the top level."""
    classes, functions = {}, {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            methods = [n.name for n in node.body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
            bases = [ast.unparse(base) for base in node.bases]
            classes[node.name] = (len(set(methods)), bases[0] if bases else "object")
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            functions[node.name] = [arg.arg for arg in node.args.posonlyargs + node.args.args]
    return classes, functions
'''
_ENDS = {
    "class_file": "FINAL(next(p for p, source in context.items() if name in facts(source)[0]))",
    "function_file": "FINAL(next(p for p, source in context.items() if name in facts(source)[1]))",
    "methods": "FINAL(facts(context[path])[0][name][0])",
    "base": "FINAL(facts(context[path])[0][name][1])",
    "parameters": "FINAL(', '.join(facts(context[path])[1][name]))",
}
_CHUNKED = """
paths = [path] if path else sorted(context)
prompts = [f"{question}\\n\\n# {p}\\n{context[p]}" for p in paths]
replies, todo = [None] * len(prompts), list(range(len(prompts)))
for _ in range(6):
    for n, reply in zip(todo, llm_query_batched([prompts[n] for n in todo]) if todo else []):
        replies[n] = reply
    todo = [n for n, reply in enumerate(replies) if isinstance(reply, HelperFailure)]
said = [reply for reply in replies if not isinstance(reply, HelperFailure) and reply != "not here"]
FINAL(said[0] if said else "unknown")
"""


class _Module(NamedTuple):
    path: str
    file: Path
    size: int
    """Characters of its JSON text."""


class _Facts(NamedTuple):
    classes: dict[str, tuple[int, str]]
    """Name → how many methods it defines, and its first base."""
    functions: dict[str, list[str]]


class CodeQuestions(Suite):
    """Where a class or function is defined, and what classes and functions are like; scored exactly.

    The tasks depend on the version of Python, which `describe` has: the context is its own library.
    """

    name = "code"
    source = "CodeQA of LongBench v2 (arXiv:2412.15204), as in arXiv:2512.24601"
    kinds = tuple(_ENDS)

    def make(self, rng: random.Random, size: int, kind: str) -> Made:
        while True:  # a small choice may define nothing of the kind
            modules = _chosen(rng, size)
            asked = _ask(rng, kind, {module.path: _known(module.file) for module in modules})
            if asked is not None:
                break
        path, name, expected, question = asked
        values = {"path": path, "name": name}
        return Made(
            {module.path: _source(module.file) for module in modules},
            _ABOUT + question,
            expected,
            "set_f1" if kind == "parameters" else "exact",
            _FACTS + code_of(_ENDS[kind], **values),
            code_of(_CHUNKED, path=path, question=question),
        )

    def read(self, prompt: str, errs: Callable[[], bool]) -> str:
        question, _, rest = prompt.partition("\n\n# ")
        path, _, source = rest.partition("\n")
        found = _facts_of(source)
        name = question.split("`")[1]
        reply = _reply(question, path, name, found)
        return ("not here" if reply != "not here" else "unknown") if errs() else reply

    def list_splits(self) -> list[str]:
        whole = sum(module.size for module in _library())
        return [split for split, size in SIZES.items() if size <= whole * 1.05]

    def describe(self) -> dict[str, Any]:
        files = repr([(module.path, module.size) for module in _library()])
        digest = hashlib.sha256(files.encode("utf-8", "surrogatepass")).hexdigest()
        return super().describe() | {"python": platform.python_version(), "library": digest}


@functools.cache
def _library() -> list[_Module]:
    """The modules of the standard library whose source is here, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root).as_posix()
        if not any(part in ("site-packages", "dist-packages", "lib2to3") for part in path.split("/")):
            found.append(_Module(path, file, file.stat().st_size))
    if not found:
        raise ConfigError(
            f"the suite 'code' needs the source of the standard library, which is not in {root}"
        )
    return found


def _chosen(rng: random.Random, size: int) -> list[_Module]:
    """Modules that make `size` characters of JSON, about, in the order of their paths."""
    pool = [module for module in _library() if module.size < size / 2 and module.size > 500]
    rng.shuffle(pool)
    chosen, total = [], 0
    for module in pool:
        if total + module.size <= size and _facts(module.file) is not None:
            length = len(json.dumps(_source(module.file), ensure_ascii=False))
            if total + length <= size:
                chosen.append(module)
                total += length
        if total > size * 0.9:
            break
    return sorted(chosen)


def _source(file: Path) -> str:
    return file.read_bytes().decode("utf-8")


@functools.cache
def _facts(file: Path) -> _Facts | None:
    """What is defined in a module; None if it is no UTF-8 or no Python, as some of Python's own tests."""
    try:
        return _facts_of(_source(file))
    except (ValueError, SyntaxError, RecursionError):
        return None


def _known(file: Path) -> _Facts:
    found = _facts(file)
    assert found is not None  # only such were chosen
    return found


def _facts_of(source: str) -> _Facts:
    classes, functions = {}, {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = parse(source)
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
            methods = {inner.name for inner in node.body if isinstance(inner, kinds)}
            classes[node.name] = (len(methods), ast.unparse(node.bases[0]) if node.bases else "object")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            functions[node.name] = [arg.arg for arg in node.args.posonlyargs + node.args.args]
    return _Facts(classes, functions)


_QUESTIONS = {
    "class_file": "Which file defines the class `{name}` at its top level? Answer with the path.",
    "function_file": "Which file defines the function `{name}` at its top level? Answer with the path.",
    "methods": "How many methods does the class `{name}` of {path} define itself? Count a name once.",
    "base": "What is the first base of the class `{name}` of {path}, as written? Answer `object` if none.",
    "parameters": "Which positional parameters has the function `{name}` of {path}? List them with commas.",
}


def _ask(rng: random.Random, kind: str, facts: dict[str, _Facts]) -> tuple[str, str, Any, str] | None:
    """Path (empty where it is the answer), name, answer and question; None without a name."""
    of_classes = kind in ("class_file", "methods", "base")
    names = [
        (path, name)
        for path, found in facts.items()
        for name in (found.classes if of_classes else found.functions)
        if kind != "parameters" or len(set(found.functions[name])) == len(found.functions[name]) > 0
    ]
    if kind.endswith("_file"):
        times = Counter(name for _, name in names)
        names = [(path, name) for path, name in names if times[name] == 1]
    if not names:
        return None
    path, name = rng.choice(names)
    question = _QUESTIONS[kind].format(name=name, path=path)
    found = facts[path]
    if kind.endswith("_file"):
        return "", name, path, question
    expected = found.functions[name] if kind == "parameters" else found.classes[name][kind == "base"]
    return path, name, expected, question


def _reply(question: str, path: str, name: str, found: _Facts) -> str:
    """What a reader of one file says."""
    if question.startswith("Which file"):
        defined = found.classes if "the class" in question else found.functions
        return path if name in defined else "not here"
    if question.startswith("How many"):
        return str(found.classes[name][0])
    if question.startswith("What is the first base"):
        return found.classes[name][1]
    return ", ".join(found.functions[name])
