"""Text of every kind, in code, output, context, prompts, answers, file names and the written notebook."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import nbformat
import pytest

from kernel_env import Episode, REPLAction
from kernel_env.sidefiles import FOLDER

from .conftest import LendEnv, StartEnv

TEXTS = {
    "lone surrogates": "a\ud800b\udfffc",
    "a surrogate pair in halves": "\ud83d\ude00 \U0001f600",
    "NUL": "a\x00b",
    "CR and CRLF": "a\r\nb\rc\n\rd",
    "ANSI": "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x1b[2J",
    "bidi controls": "\u202eabc\u202c \u2066x\u2069 \u200f",
    "separators": "a\u2028b\u2029c\x85d\x0be\x0cf",
    "control characters": "".join(map(chr, range(1, 32))) + "\x7f\x80\x9f",
    "noncharacters": "\ufffe\uffff\U0010ffff\ufeff",
    "combining": "e\u0301" * 50 + "\u0915\u094d\u0937",
    "a line of 1 MB": "é" * 2**20,
    "markup": "<script>alert(1)</script> & ``` $x$ {{ }} %%",
}


NO_CODE = ("lone surrogates", "a surrogate pair in halves", "NUL")
"""Text that Python does not take as code."""


def in_jupyter(text: str) -> str:
    """`text` after a way through Jupyter's JSON, which joins two lone surrogates that make a pair."""
    return json.loads(json.dumps(text))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", TEXTS)
def test_text_goes_everywhere_and_comes_back_the_same(start: StartEnv, tmp_path: Path, name: str) -> None:
    text = TEXTS[name]
    prompts = []

    def model(prompt: str) -> str:
        prompts.append(prompt)
        return prompt + prompt

    env = start({"context": text, "task_prompt": text}, llm_query_fn=model, max_output_length=10**7)
    assert env.state().context == text
    code = f"x = {text!a}\nassert context == x\nassert llm_query(x) == x + x\nprint(x, end='')"
    observation = env.execute(code).observation
    assert observation.result.exception is None
    # A terminal's NUL and CR are characters like any other here.
    assert observation.result.stdout == in_jupyter(text)
    assert prompts == [text]
    assert env.get_variable("x").observation.result.stdout == f"{text!r}\n"
    failed = env.execute("raise ValueError(x)").observation
    assert failed.result.exception == f"ValueError: {in_jupyter(text)}"
    final = env.execute("FINAL(x)").observation
    assert final.final_answer == text
    path = env.export(tmp_path / "episode.ipynb")
    notebook = nbformat.reads(path.read_text("utf-8"), as_version=4)  # type: ignore[no-untyped-call]
    nbformat.validate(notebook)
    stored = Episode.from_notebook(path)
    assert (stored.context, stored.final_answer) == (text, text)
    assert stored == env.episode


@pytest.mark.parametrize("name", [n for n in TEXTS if n not in ("a line of 1 MB",)])
def test_text_in_code_is_an_observation(lend: LendEnv, tmp_path: Path, name: str) -> None:
    env = lend()
    code = f"x = '''{TEXTS[name]}'''\nprint(ascii(x))"
    observation = env.execute(code).observation
    assert not observation.restarted
    if name in NO_CODE:
        assert observation.status == "error"
        assert "which Python source cannot hold" in (observation.result.exception or "")
    else:
        assert observation.status == "ok", observation.result
        # Python's own way with the ends of lines, and IPython's.
        lines = TEXTS[name].replace("\r\n", "\n").replace("\r", "\n")
        assert observation.result.stdout == f"{lines!a}\n"
    assert env.execute("print('on')").observation.result.stdout == "on\n"
    path = env.export(tmp_path / "episode.ipynb")
    nbformat.validate(json.loads(path.read_bytes()))
    assert Episode.from_notebook(path).turns[-2].action.code == code


def test_code_of_one_line_of_a_megabyte_runs(lend: LendEnv) -> None:
    env = lend()
    assert env.execute(f"x = '{'é' * 2**20}'; len(x)").observation.result.stdout == f"{2**20}\n"


def test_bytes_that_are_no_text_come_through_a_descriptor_as_replacements(lend: LendEnv) -> None:
    env = lend()
    observation = env.execute(r"import os; _ = os.write(1, b'a\xff\xfeb\n'); _ = os.write(1, 'é\n'.encode())")
    assert observation.observation.result.stdout == "a\ufffd\ufffdb\né\n"


@pytest.mark.parametrize("name", ["lone surrogates", "ANSI", "bidi controls", "CR and CRLF", "markup"])
def test_a_file_s_name_may_be_any(start: StartEnv, tmp_path: Path, name: str) -> None:
    env = start()
    # A lone surrogate is how Python names a file whose name is no UTF-8.
    text = TEXTS[name].replace("/", "_").replace("\ud800", "\udc80").replace("\udfff", "\udcff")
    code = f"name = {text!a}\n_ = open(name, 'w').write('x')\nimport os; os.listdir() == [name]"
    assert env.execute(f"{code}").observation.result.stdout == "True\n"
    assert not env.execute("os.listdir()").observation.restarted
    assert [artifact.name for artifact in env.artifacts()] == [text]
    assert env.read_artifact(text) == b"x"
    folder = Path(env.get_variable("os.getcwd()").observation.result.stdout.strip().strip("'"))
    env.reset()
    path = env.export(tmp_path / f"{text}.ipynb")
    assert Episode.from_notebook(path) == env.episode
    env.close()
    assert not folder.exists()


def test_a_file_that_is_given_may_have_any_name(start: StartEnv) -> None:
    names = [TEXTS[name] for name in ("ANSI", "bidi controls", "CR and CRLF", "markup", "combining")]
    files = {text.replace("/", "_")[:80]: f"given {number}".encode() for number, text in enumerate(names)}
    env = start(files=files)
    code = "import os\nprint(ascii({name: open(name, 'rb').read() for name in sorted(os.listdir())}))"
    expected = ascii({name: files[name] for name in sorted(files)})
    assert env.execute(code).observation.result.stdout == f"{expected}\n"


def test_a_notebook_is_never_half_written(start: StartEnv, tmp_path: Path) -> None:
    env = start({"context": "x" * 10**6})
    path = env.export(tmp_path / "episode.ipynb")
    seen = []
    ended = threading.Event()

    def read() -> None:
        while not ended.is_set():
            seen.append(len(json.loads(path.read_bytes())["cells"]))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(20):
        env.step(REPLAction(code=f"print({TEXTS['lone surrogates']!a}, {number})"))
        env.export(path)
    ended.set()
    reader.join()
    assert seen == sorted(seen)
    assert {p.name for p in tmp_path.iterdir()} == {"episode.ipynb", FOLDER}
    assert [p.stat().st_size for p in (tmp_path / FOLDER).iterdir()] == [10**6]


def test_a_display_of_json_with_nan_is_valid_json(lend: LendEnv, tmp_path: Path) -> None:
    env = lend()
    code = "from IPython.display import display\ndisplay({'application/json': [float('nan'), 1]}, raw=True)"
    observation = env.execute(code).observation
    assert observation.outputs[0]["data"] == {"application/json": [None, 1]}
    assert observation.result.stderr == ""
    json.loads(env.export(tmp_path / "e.ipynb").read_bytes(), parse_constant=pytest.fail)
