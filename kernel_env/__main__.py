"""`python -m kernel_env` is the command `kernel-env`."""

from kernel_env.cli import app

app(prog_name="kernel-env")
