"""The command line. Heavy imports are inside the commands, so that --help is fast."""

from __future__ import annotations

from typing import Annotated

import typer

from scout_hf import __version__
from scout_hf.cli_options import command
from scout_hf.cli_shared import (
    benchmark,
    ends_on_interrupt,
    evaluation,
    exits_on_errors,
    must_be_there,
    must_lead_to_a_folder,
    must_run,
    tell,
    typed,
)
from scout_hf.eval.ask.options import Ask, Read
from scout_hf.eval.batch.options import Batch
from scout_hf.eval.bench.options import CpuDecode, CpuKernel, Drafts, Gpu, Rivals, Sessions
from scout_hf.eval.families.options import Families
from scout_hf.eval.kept.options import Info, Ls, Prune, Rm
from scout_hf.eval.methods.options import Methods
from scout_hf.eval.options import Demo, Fidelity, MakeData, Report, Serve, Trace
from scout_hf.eval.plan.options import Plan

ABOUT = "Long-context decoding for HuggingFace Transformers: KV in host memory, attended block-sparsely."
ABOUT_BENCH = "How fast this machine attends and decodes, beside its own limits. Start with cpu-decode."
ABOUT_HARNESS = "lm-eval with scout_hf: LongBench, RULER and any other of its tasks."
ABOUT_SESSION = "What is kept on disk: saved sessions, and the texts of prefix stores."
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

app = typer.Typer(no_args_is_help=True, add_completion=False, help=ABOUT)
bench = typer.Typer(no_args_is_help=True, help=ABOUT_BENCH)
session = typer.Typer(no_args_is_help=True, help=ABOUT_SESSION)
harness = typer.Typer(no_args_is_help=True, help=ABOUT_HARNESS)
app.add_typer(bench, name="bench")
app.add_typer(session, name="session")
app.add_typer(harness, name="lm-eval")


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"scout_hf {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="The version of scout_hf alone.")
    ] = False,
) -> None:
    """What stands before a command."""


@command(app, "demo", Demo)
def demo(options: Demo) -> None:
    # A model of one million parameters is slower with more threads.
    with evaluation(options.threads or 1):
        from scout_hf.eval.demo import run

        same = run(options)
    raise typer.Exit(0 if same else 1)


@command(app, "fidelity", Fidelity)
def fidelity(options: Fidelity) -> None:
    with exits_on_errors():
        must_be_there(options.report, options.readme)
    with evaluation(1):
        from scout_hf.eval.language.command import run

        with ends_on_interrupt():
            run(options, tell)


@command(app, "families", Families)
def families(options: Families) -> None:
    # Only --check needs torch.
    with evaluation(1) if options.check else exits_on_errors(), ends_on_interrupt():
        from scout_hf.eval.families.command import run

        well = run(options, tell)
    raise typer.Exit(0 if well else 1)


@command(app, "serve", Serve)
def serve(options: Serve) -> None:
    with exits_on_errors():
        from scout_hf.eval.serve.needs import must_be_servable

        must_be_servable()
    with evaluation(options.threads):
        from scout_hf.eval.serve.command import run

        run(options, tell)


@command(app, "read", Read)
def read(options: Read) -> None:
    with evaluation(options.threads), ends_on_interrupt():
        from scout_hf.eval.ask.reading import run

        run(options, tell, typer.echo)


@command(app, "ask", Ask)
def ask(options: Ask) -> None:
    with evaluation(options.threads), ends_on_interrupt():
        from scout_hf.eval.ask.answering import run

        run(options, tell)


@command(app, "batch", Batch)
def batch(options: Batch) -> None:
    with exits_on_errors():
        must_be_there(options.source)
    with evaluation(options.threads), ends_on_interrupt():
        from scout_hf.eval.batch.command import answer

        failed = answer(options, tell).failed
    raise typer.Exit(1 if failed else 0)


@command(session, "ls", Ls)
def session_ls(options: Ls) -> None:
    with exits_on_errors():
        from scout_hf.eval.kept.command import ls

        ls(options, typer.echo)


@command(session, "info", Info)
def session_info(options: Info) -> None:
    with evaluation(None):
        from scout_hf.eval.kept.command import info

        whole = info(options, typer.echo, tell)
    raise typer.Exit(0 if whole else 1)


@command(session, "rm", Rm)
def session_rm(options: Rm) -> None:
    with exits_on_errors():
        from scout_hf.eval.kept.command import rm

        done = rm(options, typer.echo)
    raise typer.Exit(0 if done else 1)


@command(session, "prune", Prune)
def session_prune(options: Prune) -> None:
    with exits_on_errors():
        from scout_hf.eval.kept.command import prune

        prune(options, typer.echo)


# Added, and listed, from the last one to the first.
@command(bench, "sessions", Sessions)
@command(bench, "cpu-kernel", CpuKernel)
@command(bench, "cpu-decode", CpuDecode)
def cpu_benchmark(options: CpuKernel | CpuDecode | Sessions) -> None:
    with benchmark(options.out, options.threads) as finish:
        finish(options.measure(tell))


@command(bench, "rivals", Rivals)
def rivals(options: Rivals) -> None:
    with exits_on_errors():
        must_run("--rivals-python", options.rivals_python)
        must_be_there(*options.gguf)
    with benchmark(options.out, options.threads) as finish:
        finish(options.measure(tell))


@command(bench, "drafts", Drafts)
def drafts(options: Drafts) -> None:
    with exits_on_errors():
        must_be_there(*options.text)
    with benchmark(options.out, options.threads) as finish:
        finish(options.measure(tell))


@command(bench, "methods", Methods)
def methods(options: Methods) -> None:
    with exits_on_errors():
        must_lead_to_a_folder("--shape", options.shape)
        must_run("--kvpress-python", options.kvpress_python)
    with benchmark(options.out, options.threads, resumes=True, device=options.device) as finish:
        finish(options.measure(typed(), tell))


@command(bench, "gpu", Gpu)
def gpu(options: Gpu) -> None:
    with exits_on_errors(), ends_on_interrupt():
        from scout_hf.eval.bench.gpu import run, show

        record = run(options, tell)
        show(record)
        typer.echo(f"wrote {options.out / 'gpu.json'}")
    raise typer.Exit(1 if any(one["state"] == "failed" for one in record["stages"]) else 0)


@command(app, "trace", Trace)
def trace(options: Trace) -> None:
    with exits_on_errors():
        from scout_hf.files import check_timeline_path

        check_timeline_path(options.out, options.out.with_suffix(".png"))
        must_lead_to_a_folder("--model", options.model)
    with evaluation(options.threads, options.device):
        from scout_hf.eval.timeline import run

        run(options)


@command(app, "plan", Plan)
def plan(options: Plan) -> None:
    # Only --measure needs torch.
    with evaluation(options.threads) if options.measure else exits_on_errors():
        from scout_hf.eval.plan import command as plans

        if options.measure:
            plans.measure(options.out, tell)
        elif options.check:
            plans.check(options.check, options.machine)
        else:
            plans.show(options)


@command(app, "report", Report)
def report(options: Report) -> None:
    with exits_on_errors():
        from scout_hf.eval.report.find import find

        find(options.results, options.out)
        from scout_hf.eval.report.page import write

        for used in write(options.results, options.out):
            typer.echo(f"from  {used}")
        typer.echo(f"wrote {options.out}")


@harness.command("run", context_settings=PASSED_ON, help="Evaluate, with any option of lm-eval run; see run --help.")
@harness.command("ls", context_settings=PASSED_ON, help="List tasks, as lm-eval ls does.")
@harness.command("validate", context_settings=PASSED_ON, help="Check tasks, as lm-eval validate does.")
def lm_eval(context: typer.Context) -> None:
    """One of lm-eval's own commands; everything after its name is passed on."""
    from scout_hf.eval.harness.command import main

    raise typer.Exit(main([context.info_name, *context.args]))


@command(harness, "make-data", MakeData)
def make_data(options: MakeData) -> None:
    with exits_on_errors():
        options.folder.mkdir(parents=True, exist_ok=True)
        from scout_hf.eval.harness.pocket_longbench import make_longbench

        for path in make_longbench(options.folder, options.rows, options.tokens, options.seed):
            typer.echo(path)


@app.command()
def version() -> None:
    """Versions and hardware, for bug reports."""
    with exits_on_errors():
        from scout_hf.about import facts

        for name, value in facts():
            typer.echo(f"{name:<13} {value}")
