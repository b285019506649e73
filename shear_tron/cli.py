"""The command line: one function per verb.

Verbs import what they need when they run, so that ``--help`` and ``config`` answer without torch.
"""

import argparse
import json
import keyword
import os
import subprocess
import sys
import tempfile
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shear_tron.checkpoint.model_folder import Form
    from shear_tron.train.run_folder import RunFolder

VERBS = {
    "prepare": "tokenise domains of text into shards",
    "stats": "how much there is of each prepared domain",
    "config": "every key of a configuration explained",
    "show": "dry run: counts, what ranks hold, whether all fits",
    "train": "prune (given a `prune` section) or pre-train",
    "extract": "write a pruning run's dense model: Hugging Face, nanotron, GGUF",
    "export": "write a training run's model: Hugging Face, nanotron, GGUF",
    "import": "make a Hugging Face folder of a nanotron checkpoint",
    "report": "what runs did, as one HTML page; also while they run",
    "reference-loss": "reference losses of domains, predicted or measured",
    "bench": "the kernel benchmark; without a GPU its rooflines",
}
OVERRIDABLE = ("prepare", "show", "train", "reference-loss")  # they read a config
EXAMPLE = """\
example, on one machine with two ranks:
  shear-tron prepare prepare.yaml
  shear-tron train prune.yaml --nproc 2 train.steps=400
  shear-tron extract runs/prune models/small
"""


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Bad input is one line on stderr, said once by all ranks together, and exit status 2.

    Anything else that goes wrong is one line too, and status 1; ``--debug`` shows where.
    """
    arguments = _parse(argv)
    try:
        name = arguments.verb.replace("-", "_")
        status = int(globals()[f"{name}_" if keyword.iskeyword(name) else name](arguments) or 0)
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
        print(f"shear-tron {arguments.verb}: {_in_one_line(error)}", file=sys.stderr)
        return 1


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="shear-tron",
        usage="shear-tron VERB ...",
        description="Shear a large language model down to a shape you choose.",
        epilog=EXAMPLE,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=20),
    )
    parser.add_argument("--version", action="version", version=f"shear-tron {_version()}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="", title="verbs (VERB --help tells more)")
    for verb, text in VERBS.items():
        sub = verbs.add_parser(verb, help=text, description=text[0].upper() + text[1:] + ".")
        _arguments(verb, sub)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments, options = parser.parse_known_args(argv)
    if options and arguments.verb != "bench":  # bench hands its options to kernels/bench/run.py
        parser.error(f"unrecognized arguments: {' '.join(options)}")
    arguments.options = options
    return arguments


def _arguments(verb: str, sub: argparse.ArgumentParser) -> None:
    """What each verb takes."""
    if verb in OVERRIDABLE:
        sub.add_argument("config", help="YAML file")
        sub.add_argument("overrides", nargs="*", metavar="section.key=value")
    if verb == "config":
        sub.add_argument("key", nargs="?", default="", metavar="section.key", help="default: all")
        sub.add_argument("--explain", action="store_true", help="accepted and implied")
        sub.add_argument("--markdown", action="store_true", help="the whole reference, as docs/config.md has it")
    if verb == "train":
        sub.add_argument("--nproc", type=int, default=None, help="ranks to start on this machine; torchrun for more")
    if verb == "report":
        sub.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, in the order they were made")
        sub.add_argument("--output", default=None, metavar="HTML", help="default: report.html in the last run")
        sub.add_argument("--baseline", action="append", default=[], metavar="RUN", help="compare the end with it")
        sub.add_argument("--png", default=None, metavar="DIR", help="write the figures as PNG and SVG too")
    if verb == "show":
        sub.add_argument("--world", type=int, default=None, help="ranks to plan for; default: the fewest that fit")
    if verb == "prepare":
        sub.add_argument("--stats", nargs="?", const="", metavar="PNG", help="like `stats` of its output")
    if verb == "stats":
        sub.add_argument("folder", help="made by `shear-tron prepare`")
        sub.add_argument("picture", nargs="?", metavar="PNG", help="draw tokens and document lengths there")
    if verb in ("extract", "export"):
        sub.add_argument("run", help="folder of the run")
        sub.add_argument("output", help="folder (for gguf: file) to write; must not exist")
        sub.add_argument("--step", type=int, default=None, help="checkpoint to take; default: the newest")
        sub.add_argument("--model", default=None, help="where the run's source model is; default: where it was")
        sub.add_argument("--to", choices=["huggingface", "nanotron", "gguf"], default="huggingface")
        sub.add_argument("--flavour", choices=["main", "0.4"], default="main", help="of nanotron")
        sub.add_argument("--tp", type=int, default=1, help="pieces of every tensor, for nanotron; any can be read")
        sub.add_argument("--samples", type=int, default=0, help="of the run's next samples to hand to nanotron")
    if verb == "import":
        sub.add_argument("checkpoint", help="folder that nanotron saved")
        sub.add_argument("output", help="Hugging Face folder to write; must not exist")
        sub.add_argument("--tokenizer", required=True, help="folder of the model's tokenizer")
    if verb in ("extract", "export", "import"):
        default = None if verb == "import" else "float32"  # None: as it is stored
        q8_0 = [] if verb == "import" else ["q8_0"]  # of GGUF
        sub.add_argument("--dtype", choices=["float32", "bfloat16", "float16", *q8_0], default=default)


def _version() -> str:
    try:
        return version("shear-tron")
    except PackageNotFoundError:
        return "(not installed)"


def _in_one_line(error: Exception) -> str:
    """An error nobody foresaw: what it says, and a file that says where it came from."""
    with tempfile.NamedTemporaryFile("w", prefix="shear-tron-", suffix=".txt", delete=False) as trace:
        trace.write("".join(traceback.format_exception(error)))
    lines = str(error).strip().splitlines() or [""]
    name = type(error).__name__
    return f"{lines[0] or name}{f' ({name})' if lines[0] else ''}; {trace.name} says where, as does --debug"


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
    from shear_tron.train.config import RunConfig
    from shear_tron.train.plan import claim_run_folder, inputs, plan, precision

    config = load(RunConfig, arguments.config, arguments.overrides)
    planned = plan(config, arguments.nproc or topology.world_size())
    device, _ = precision(config)
    inputs(planned)
    claim_run_folder(config)
    if arguments.nproc and arguments.nproc > 1:
        return launch(arguments.nproc, device, _train, arguments.config, arguments.overrides)
    return _train(arguments.config, arguments.overrides)


def _train(path: str, overrides: list[str]) -> int:
    """What one rank does. Whatever is wrong with the input was said before; from here on any one rank may fail."""
    from shear_tron.config import load
    from shear_tron.parallel import topology
    from shear_tron.parallel.agree import AgreedError
    from shear_tron.train.config import RunConfig
    from shear_tron.train.loop import Trainer
    from shear_tron.train.plan import inputs, plan, precision

    config = load(RunConfig, path, overrides)
    planned = plan(config, topology.world_size())
    device, compute = precision(config)
    ranks = topology.start(planned.layout, device)
    try:
        losses = Trainer(planned, inputs(planned), ranks, compute).fit()
    except AgreedError as error:
        if ranks.is_main:
            print(f"shear-tron train: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        raise RuntimeError(f"training failed: {error}") from error
    else:
        if ranks.is_main:
            print(json.dumps({"run": config.run, "held_out": losses}))
        return 0
    finally:
        topology.stop()


def extract(arguments: argparse.Namespace) -> None:
    from shear_tron.train.outputs import extract as run

    print(run(_run_folder(arguments), arguments.output, _form(arguments), arguments.samples))


def export(arguments: argparse.Namespace) -> None:
    from shear_tron.train.outputs import export as run

    print(run(_run_folder(arguments), arguments.output, _form(arguments), arguments.samples))


def _run_folder(arguments: argparse.Namespace) -> "RunFolder":
    from shear_tron.train.run_folder import RunFolder

    return RunFolder.open(arguments.run, arguments.step, arguments.model)


def _form(arguments: argparse.Namespace) -> "Form":
    from shear_tron.checkpoint.model_folder import Form

    return Form(arguments.to, arguments.dtype, arguments.flavour, arguments.tp)


def import_(arguments: argparse.Namespace) -> None:
    from shear_tron.train.outputs import import_model

    print(import_model(arguments.checkpoint, arguments.output, arguments.tokenizer, arguments.dtype))


def show(arguments: argparse.Namespace) -> None:
    from shear_tron.config import load
    from shear_tron.train.config import RunConfig
    from shear_tron.train.show import show as text

    print(text(load(RunConfig, arguments.config, arguments.overrides), arguments.world))


def report(arguments: argparse.Namespace) -> None:
    from shear_tron.report.write import write

    baselines = [Path(run) for run in arguments.baseline]
    for file in write([Path(run) for run in arguments.runs], baselines, arguments.output, arguments.png):
        print(file)


def reference_loss(arguments: argparse.Namespace) -> None:
    from shear_tron.config import load
    from shear_tron.data.reference import ReferenceConfig, reference_losses

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
