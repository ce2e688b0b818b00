"""`fsa bench`: measures, and what becomes of results."""

from __future__ import annotations

import typer

from .bench_reports import compare, report

bench_app = typer.Typer(help="Benchmarks that anyone can repeat, and their results.", no_args_is_help=True)
bench_app.command("report")(report)
bench_app.command("compare")(compare)
