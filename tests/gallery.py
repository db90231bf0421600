"""Makes the notebooks in `notebooks/gallery` from real episodes.

    python tests/gallery.py [FOLDER]

The policies are scripts, and the one language model is a stand-in that says so in its replies.
"""

from __future__ import annotations

import sys
from pathlib import Path

from kernel_env import Limits, LocalREPLEnv, LocalRLMRunner, write_notebook
from kernel_env.example import language_reference

GALLERY = Path(__file__).parent.parent / "notebooks" / "gallery"

LOG = "\n".join(
    f"2026-0{1 + day // 28}-{1 + day % 28:02} station={'ABC'[day % 3]} wind={(day * 37) % 23 + day // 30}"
    for day in range(90)
)

PICTURES = [
    "rows = [dict(part.split('=') for part in line.split()[1:]) for line in context.splitlines()]\n"
    "len(rows), rows[0]",
    "import matplotlib.pyplot as plt\n"
    "by_station = {s: [int(r['wind']) for r in rows if r['station'] == s] for s in 'ABC'}\n"
    "fig, ax = plt.subplots(figsize=(6, 2.5))\n"
    "for station, winds in by_station.items():\n"
    "    ax.plot(winds, label=station)\n"
    "ax.set_ylabel('wind'); ax.legend(title='station'); plt.show()",
    "means = {station: sum(winds) / len(winds) for station, winds in by_station.items()}\n"
    "verdicts = llm_query_batched([f'Is a mean wind of {mean:.1f} stormy?' for mean in means.values()])\n"
    "dict(zip(means, verdicts))",
    "best = max(means, key=means.get)\nFINAL(best)",
]

TROUBLE = [
    "numbers = [int(line) for line in context.splitlines()]",
    "numbers = [int(line) for line in context.splitlines() if line.isdigit()]\n"
    "print(len(numbers), numbers[:5])",
    "total = 0\nwhile True:  # forgot to stop\n    total += 1",
    "import os; os.kill(os.getpid(), 9)",
    "print('numbers' in globals())\nFINAL(sum(int(line) for line in context.splitlines() if line.isdigit()))",
]


def pictures(folder: Path) -> None:
    """Solved, with a picture and calls of a model."""

    def stand_in(prompt: str) -> str:
        return f"{'yes' if float(prompt.split()[5]) > 12 else 'no'} (a stand-in for a model compares with 12)"

    with LocalREPLEnv(llm_query_fn=stand_in) as env:
        env.reset(
            context=LOG,
            task_prompt="Which station had the strongest mean wind?",
            episode_id="gallery-pictures",
            expected_answer="B",
        )
        for cell in PICTURES:
            env.execute(cell)
        env.episode.expected_answer = "B"
        env.export(folder / "pictures.ipynb")


def trouble(folder: Path) -> None:
    """An error, a time-out, a kernel that was lost and replaced, and an answer all the same."""
    lines = [str(n * 7 % 101) if n % 10 else "n/a" for n in range(200)]
    expected = str(sum(int(line) for line in lines if line.isdigit()))
    with LocalREPLEnv(limits=Limits(cell_active=1)) as env:
        env.reset(
            context="\n".join(lines),
            task_prompt="What is the sum of the numbers?",
            episode_id="gallery-trouble",
            expected_answer=expected,
        )
        for cell in TROUBLE:
            env.execute(cell)
        env.export(folder / "trouble.ipynb")


def recursion(folder: Path) -> None:
    """A run whose cells give parts of the context to children."""

    def stand_in(messages: list[dict[str, str]]) -> str:
        if "Which half" not in messages[2]["content"]:
            return "I count them in Python.\n\n```repl\nFINAL(context.lower().count('exception'))\n```"
        if len(messages) == 3:
            return (
                "The context is long, so I look at its *size* first.\n\n"
                "```repl\nlines = context.splitlines()\nlen(lines)\n```\n\n"
                "Then I ask a child about each half.\n\n```repl\n"
                "half = len(lines) // 2\n"
                "parts = ['\\n'.join(lines[:half]), '\\n'.join(lines[half:])]\n"
                "counts = rlm_query_batched(['Count the word exception.'] * 2, contexts=parts)\n"
                "print(counts)\n```\n"
            )
        return (
            "Both children answered; I compare.\n\n"
            "```repl\nFINAL('first' if int(counts[0]) > int(counts[1]) else 'second')\n```"
        )

    task = "Which half of the reference says exception more often, the first or the second?"
    runner = LocalRLMRunner(stand_in, max_batch_workers=2)
    write_notebook(runner.run(language_reference()[:60_000], task).episode, folder / "recursion.ipynb")


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else GALLERY
    folder.mkdir(parents=True, exist_ok=True)
    for make in (pictures, trouble, recursion):
        make(folder)


if __name__ == "__main__":
    main()
