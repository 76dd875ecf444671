"""The commands, put together. Heavy imports wait until a command runs."""

from __future__ import annotations

import typer

from headrace.cli.bench import bench
from headrace.cli.calibrate import calibrate
from headrace.cli.chat import chat
from headrace.cli.cluster import drain, explain, status
from headrace.cli.config import app as config
from headrace.cli.demo import demo
from headrace.cli.deploy import app as deploy
from headrace.cli.gateway import gateway
from headrace.cli.generate import generate
from headrace.cli.models import app as models
from headrace.cli.serve import serve
from headrace.cli.simulate import app as simulate
from headrace.cli.top import top
from headrace.cli.version import version
from headrace.cli.worker import worker

app = typer.Typer(
    name="headrace",
    help="Serve large language models: an OpenAI-compatible server on what this machine has.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(serve)
app.command()(generate)
app.command()(bench)
app.command()(chat)
app.command()(demo)
app.command()(gateway)
app.command()(worker)
app.command()(status)
app.command()(explain)
app.command()(drain)
app.command()(top)
app.command()(calibrate)
app.command()(version)
app.add_typer(config, name="config")
app.add_typer(deploy, name="deploy")
app.add_typer(simulate, name="simulate")
app.add_typer(models, name="models")
