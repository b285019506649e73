"""The command line: one function per verb.

Verbs import what they need when they run, so that ``--help`` and ``config`` answer without torch.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from shear_tron import unforeseen
from shear_tron.arguments import parse
from shear_tron.quick import quick_imports

if TYPE_CHECKING:
    import torch

    from shear_tron.checkpoint.model_folder import Form
    from shear_tron.train.plan import Inputs, Plan
    from shear_tron.train.run_folder import RunFolder


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Bad input is one line on stderr, said once by all ranks together, and exit status 2.

    Anything else that goes wrong is one line too, and status 1; ``--debug`` shows where.
    """
    arguments = parse(argv)
    try:
        name = arguments.verb.replace("-", "_")
        status = int((globals().get(f"{name}_") or globals()[name])(arguments) or 0)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a shell says of a process that SIGPIPE ended
    except KeyboardInterrupt:
        print(f"shear-tron {arguments.verb}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, FileNotFoundError) as error:
        if arguments.debug:
            raise
        from shear_tron.parallel.topology import is_main_process

        if is_main_process():
            print(f"shear-tron {arguments.verb}: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if arguments.debug:
            raise
        print(f"shear-tron {arguments.verb}: {unforeseen.told(error, debug=True)}", file=sys.stderr)
        return 1


def prepare(arguments: argparse.Namespace) -> None:
    from shear_tron.config import load
    from shear_tron.data.prepare import PrepareConfig, document
    from shear_tron.data.prepare import prepare as run
    from shear_tron.data.stats import stats

    config = load(PrepareConfig, arguments.config, arguments.overrides)
    if arguments.stats is None:
        print(document(config), flush=True)
        run(config)
    print(stats(config.output, arguments.stats or None))
    if arguments.stats == "":
        print(f"for a picture too: shear-tron stats {config.output} stats.png")


def init(arguments: argparse.Namespace) -> None:
    from shear_tron.forecast.init import init

    print(init(arguments))


def stats(arguments: argparse.Namespace) -> None:
    from shear_tron.data.stats import stats

    print(stats(arguments.folder, arguments.picture))


def config(arguments: argparse.Namespace) -> None:
    from shear_tron.explain import explain, markdown

    print(markdown() if arguments.markdown else explain(arguments.key))


def train(arguments: argparse.Namespace) -> int:
    from shear_tron.config import load
    from shear_tron.parallel import topology
    from shear_tron.parallel.launch import launch
    from shear_tron.train.claim import claim_run_folder, fetch_copy
    from shear_tron.train.config import RunConfig
    from shear_tron.train.plan import inputs, plan, precision

    config = load(RunConfig, arguments.config, arguments.overrides)
    planned = plan(config, arguments.nproc or topology.world_size())
    device, _ = precision(config)
    fetched = fetch_copy(config)
    if fetched is not None:
        print(f"shear-tron train: fetched step {fetched} from {config.checkpoint.upload}", file=sys.stderr, flush=True)
    inputs(planned)
    allowed = tuple(arguments.allow_change)
    claim_run_folder(config, allowed)
    command = ["train", arguments.config, *arguments.overrides]
    command += [f"--allow-change={key}" for key in allowed] + ["--strict"] * arguments.strict
    if arguments.nproc and arguments.nproc > 1:
        command += ["--nproc", str(arguments.nproc)]
        rank = (arguments.config, arguments.overrides, allowed, command, arguments.strict)
        return launch(arguments.nproc, device, _train, *rank)
    return _train(arguments.config, arguments.overrides, allowed, command, arguments.strict)


def _train(path: str, overrides: list[str], allowed: tuple[str, ...], command: list[str], strict: bool) -> int:
    """What one rank does. Whatever is wrong with the input was said before; from here on any one rank may fail."""
    from shear_tron.config import load
    from shear_tron.parallel import topology
    from shear_tron.train.claim import claim_run_folder
    from shear_tron.train.config import RunConfig
    from shear_tron.train.plan import inputs, plan, precision
    from shear_tron.train.session import session

    config = load(RunConfig, path, overrides)
    planned = plan(config, topology.world_size())
    device, compute = precision(config)
    opened = inputs(planned)
    changed = claim_run_folder(config, allowed)
    return session(planned, opened, device, compute, changed, command, strict)


def cache_teacher(arguments: argparse.Namespace) -> int:
    from shear_tron.parallel.launch import launch

    given = arguments.config, arguments.overrides, arguments.headroom
    device = _fillable(*given[:2], arguments.nproc)[2]
    if arguments.nproc and arguments.nproc > 1:
        return launch(arguments.nproc, device, _cache_teacher, *given)
    return _cache_teacher(*given)


def _fillable(
    path: str, overrides: list[str], nproc: int | None = None
) -> "tuple[Plan, Inputs, torch.device, torch.dtype]":
    """(plan, inputs, device, compute) of filling a cache: those of a run that has its teacher with it."""
    from shear_tron.config import ConfigError, load
    from shear_tron.parallel import topology
    from shear_tron.train.config import RunConfig
    from shear_tron.train.plan import inputs, plan, precision

    config = load(RunConfig, path, overrides)
    if config.distill is None or config.distill.teacher is None or config.distill.cache is None:
        raise ConfigError("cache-teacher wants distill.teacher and distill.cache, a folder to fill; give both")
    online = config.model_copy(update={"distill": config.distill.model_copy(update={"cache": None})})
    planned = plan(online, nproc or topology.world_size())
    device, compute = precision(config)
    return replace(planned, config=config), inputs(planned), device, compute


def _cache_teacher(path: str, overrides: list[str], headroom: float | None) -> int:
    from shear_tron.train.session import fill

    return fill(*_fillable(path, overrides), headroom)


def plan(arguments: argparse.Namespace) -> None:
    with quick_imports():
        from shear_tron.forecast.command import plan as text

    print(text(arguments))


def extract(arguments: argparse.Namespace) -> None:
    from shear_tron.train.outputs import extract as run

    print(run(_run_folder(arguments), arguments.output, _form(arguments), arguments.samples))


def export(arguments: argparse.Namespace) -> None:
    from shear_tron.train.outputs import export as run

    print(run(_run_folder(arguments), arguments.output, _form(arguments), arguments.samples))


def _run_folder(arguments: argparse.Namespace) -> "RunFolder":
    from shear_tron.train.run_folder import RunFolder

    return RunFolder.open(arguments.run, arguments.step, arguments.model, arguments.tokenizer)


def _form(arguments: argparse.Namespace) -> "Form":
    from shear_tron.checkpoint.model_folder import Form

    return Form(arguments.to, arguments.dtype, arguments.flavour, arguments.tp)


def import_(arguments: argparse.Namespace) -> None:
    from shear_tron.data.mds import import_data, is_mds
    from shear_tron.train.migrate import import_model

    if is_mds(arguments.checkpoint):
        if arguments.held_out is None:
            raise ValueError(f"{arguments.checkpoint} holds token shards; give those held out with --held-out FOLDER")
        folders = (arguments.checkpoint, arguments.held_out, arguments.output)
        tokens = sum(domain.tokens() for domain in import_data(*folders, arguments.tokenizer).domains.values())
        print(f"{arguments.output}: {tokens:,} tokens to train on; shear-tron stats {arguments.output}")
        return
    print(import_model(arguments.checkpoint, arguments.output, arguments.tokenizer, arguments.dtype, arguments.target))


def verify(arguments: argparse.Namespace) -> None:
    from shear_tron.train.verify import verify

    print(verify(arguments.folder))


def show(arguments: argparse.Namespace) -> None:
    with quick_imports():
        from shear_tron.config import load
        from shear_tron.forecast.job import Job
        from shear_tron.forecast.known import teacher
        from shear_tron.forecast.memory import peak, told
        from shear_tron.train.config import RunConfig
        from shear_tron.train.show import show as text

    before = load(RunConfig, arguments.after) if arguments.after else None
    planned, shown = text(load(RunConfig, arguments.config, arguments.overrides), arguments.world, before)
    print(shown)
    print(told(peak(Job.of(planned.config, planned.architecture, planned.layout, teacher(planned.config)))))


def report(arguments: argparse.Namespace) -> None:
    from shear_tron.report.write import write

    baselines = [Path(run) for run in arguments.baseline]
    for file in write([Path(run) for run in arguments.runs], baselines, arguments.output, arguments.png):
        print(file)


def eval_(arguments: argparse.Namespace) -> None:
    from shear_tron.use.compare import compare, table

    result = compare(arguments.models, arguments.data, arguments.sequence, arguments.windows, arguments.batch)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def generate(arguments: argparse.Namespace) -> None:
    from shear_tron.use.generate import generate as run

    options = {key: getattr(arguments, key) for key in ("tokens", "temperature", "seed", "chat", "tokenizer")}
    run(arguments.model, arguments.prompt, say=lambda text: print(text, end="", flush=True), **options)
    print()


def reference_loss(arguments: argparse.Namespace) -> None:
    from shear_tron.config import load
    from shear_tron.use.reference import ReferenceConfig, reference_losses

    losses = reference_losses(load(ReferenceConfig, arguments.config, arguments.overrides))
    print(json.dumps({name: round(loss, 4) for name, loss in losses.items()}))


def bench(arguments: argparse.Namespace) -> int:
    import shear_kernels

    script = Path(shear_kernels.__file__).parents[1] / "bench" / "run.py"
    if not script.exists():
        raise ValueError(f"{script} is not there: the benchmark comes with a checkout, not with a wheel; clone one")
    return subprocess.run([sys.executable, str(script), *arguments.options], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
