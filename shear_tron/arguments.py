"""What each verb of the command line takes."""

import argparse
import pkgutil
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from argcomplete import autocomplete

VERBS = {
    "prepare": "tokenise domains of text into shards",
    "init": "write commented configs for your model and text",
    "stats": "how much there is of each prepared domain",
    "config": "every key of a configuration explained",
    "plan": "will it fit, how long, in which layout",
    "show": "dry run: counts, what ranks hold, whether all fits",
    "cache-teacher": "fill a cache with samples of distill.teacher",
    "train": "prune (given a `prune` section) or pre-train",
    "extract": "write a pruning run's dense model, in a format of choice",
    "export": "write a training run's model, in a format of choice",
    "import": "a nanotron model, or LLM-Shearing's models and tokens",
    "verify": "whether data, a run or a model is what was written",
    "report": "what runs did, as one HTML page; also while they run",
    "eval": "losses of models on held-out data, side by side",
    "generate": "let a model go on with a text",
    "reference-loss": "reference losses of domains, predicted or measured",
    "bench": "the kernel benchmark; without a GPU its rooflines",
}
OVERRIDABLE = ("prepare", "show", "cache-teacher", "train", "reference-loss")  # they read a config
EXAMPLE = """\
example: shear-tron prepare prepare.yaml
         shear-tron train prune.yaml --nproc 2 train.steps=400
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The verb and its arguments. Exits with a usage line where they are wrong."""
    listed = "\n".join(f"  {verb:16}{text}" for verb, text in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="shear-tron",
        usage="shear-tron VERB ... | [VERB] --help | --version",
        description=f"Shear a large language model down to a shape you choose. Verbs:\n{listed}",
        epilog=EXAMPLE,
        add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    hidden = argparse.SUPPRESS  # usage and description name them
    parser.add_argument("-h", "--help", action="help", help=hidden)
    parser.add_argument("--version", action="version", version=f"shear-tron {_version()}", help=hidden)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", prog=parser.prog, help=hidden)
    for verb, text in VERBS.items():
        sub = verbs.add_parser(verb, help=text, description=text[0].upper() + text[1:] + ".")
        _arguments(verb, sub)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
    autocomplete(parser)  # a shell that asks what could follow gets its answer here
    arguments, options = parser.parse_known_args(argv)
    if taken := {"overrides", "given"} & vars(arguments).keys():  # argparse takes none that come after an option
        after = [word for word in options if "=" in word and not word.startswith("-")]
        getattr(arguments, *taken).extend(after)
        options = [word for word in options if word not in after]
    if options and arguments.verb != "bench":  # bench hands its options to kernels/bench/run.py
        parser.error(f"unrecognized arguments: {' '.join(options)}")
    arguments.options = options
    return arguments


def _arguments(verb: str, sub: argparse.ArgumentParser) -> None:
    """What each verb takes."""
    if verb in OVERRIDABLE:
        sub.add_argument("config", help="YAML file")
        overrides: Any = sub.add_argument("overrides", nargs="*", default=[], metavar="section.key=value")
        overrides.completer = lambda **_: [f"{key}=" for key in _keys(verb)]
    if verb == "config":
        key: Any = sub.add_argument("key", nargs="?", default="", metavar="section.key", help="default: all")
        key.completer = lambda **_: _keys("train")
        sub.add_argument("--explain", action="store_true", help="accepted and implied")
        sub.add_argument("--markdown", action="store_true", help="the whole reference, as docs/config.md has it")
    if verb == "plan":
        sub.add_argument("given", nargs="*", metavar="CONFIG", help="of one run or of both stages; and overrides")
        sub.add_argument("--gpus", type=int, default=8, help="how many; default: 8")
        sub.add_argument("--gpu", default="h100", help="a line of the table of devices; default: h100")
        sub.add_argument("--gpus-per-node", type=int, default=None, help="default: the table's")
        sub.add_argument("--devices", default=None, help="your table; default: shear_tron/forecast/devices.yaml")
        sub.add_argument("--model", default=None, help="without a config: a model's folder, Hub id or known name")
        sub.add_argument("--parameters", default=None, help="without a config: size of the target, such as 1.3B")
        sub.add_argument("--tokens", default="50B", help="of stage 2, where it has no config; default: 50B")
    if verb == "init":
        sub.add_argument("model", help="Hugging Face folder or Hub id (org/name)")
        sub.add_argument("--target", required=True, help="parameters to shear to, such as 3B")
        sub.add_argument("--data", required=True, help="folder made by prepare, or of text: one domain per subfolder")
        sub.add_argument("--tokens", default="0.4B", help="to prune with; the paper's 0.4B by default")
        sub.add_argument("--continue-tokens", default=None, help="to continue with; default: 125 times, as the paper")
        sub.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks that must divide the target")
        sub.add_argument("--output", default=".", metavar="DIR", help="for the files; default: here")
    if verb in ("cache-teacher", "train"):
        sub.add_argument("--nproc", type=int, default=None, help="ranks to start on this machine; torchrun for more")
    if verb == "cache-teacher":
        sub.add_argument("--headroom", type=float, default=None, help="times the windows of the starting mixture")
    if verb == "train":
        sub.add_argument("--strict", action="store_true", help="exit with 3 where masks do not reach the target")
        sub.add_argument("--allow-change", action="append", default=[], metavar="KEY", help="in a run that goes on")
    if verb == "verify":
        sub.add_argument("folder", help="prepared data, a run, a checkpoint, or a model")
    if verb == "report":
        sub.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, in the order they were made")
        sub.add_argument("--output", default=None, metavar="HTML", help="default: report.html in the last run")
        sub.add_argument("--baseline", action="append", default=[], metavar="RUN", help="compare the end with it")
        sub.add_argument("--png", default=None, metavar="DIR", help="write the figures as PNG and SVG too")
    if verb == "show":
        sub.add_argument("--world", type=int, default=None, help="ranks to plan for; default: the fewest that fit")
        sub.add_argument("--after", default=None, metavar="CONFIG", help="of the pruning run that makes this model")
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
        sub.add_argument("--tokenizer", default=None, help="where its tokenizer is; default: where it was")
        sub.add_argument(
            "--to", choices=["huggingface", "nanotron", "gguf"], default="huggingface", help="default: huggingface"
        )
        sub.add_argument("--flavour", choices=["main", "0.4"], default="main", help="of nanotron; default: main")
        sub.add_argument("--tp", type=int, default=1, help="pieces of every tensor, for nanotron; any can be read")
        sub.add_argument("--samples", type=int, default=0, help="of the run's next samples to hand to nanotron")
    if verb == "import":
        sub.add_argument("checkpoint", help="folder that nanotron saved; of LLM-Shearing: state dict, or MDS folder")
        sub.add_argument("output", help="folder to write (a model: Hugging Face); must not exist")
        sub.add_argument("--tokenizer", required=True, help="folder or Hub id of the model's tokenizer")
        sub.add_argument("--held-out", metavar="FOLDER", help="MDS folder of the held-out samples, such as `eval`")
        sub.add_argument("--target", help="to cut LLM-Shearing's masked model to: hidden=..,layers=..,heads=..,ffn=..")
    if verb in ("extract", "export", "import"):
        default = None if verb == "import" else "float32"
        q8_0 = [] if verb == "import" else ["q8_0"]  # of GGUF
        text = f"of the weights written; default: {default or 'as they are stored'}"
        sub.add_argument("--dtype", choices=["float32", "bfloat16", "float16", *q8_0], default=default, help=text)
    if verb == "eval":
        sub.add_argument("models", nargs="+", metavar="model", help="folder (Hugging Face, nanotron) or Hub id")
        sub.add_argument("data", help="made by `shear-tron prepare` with the models' tokenizer")
        sub.add_argument("--sequence", type=int, default=2048, help="tokens of a window; default: 2048")
        sub.add_argument("--windows", type=int, default=64, help="held-out windows of each domain; default: 64")
        sub.add_argument("--batch", type=int, default=1, help="windows at a time; default: 1")
        sub.add_argument("--json", metavar="FILE", help="write all numbers there")
    if verb == "generate":
        sub.add_argument("model", help="folder (Hugging Face, nanotron) or Hub id")
        sub.add_argument("prompt", help="text to go on with")
        sub.add_argument("--tokenizer", default=None, help="its folder or Hub id; default: the model's own")
        sub.add_argument("--tokens", type=int, default=128, help="at most; default: 128")
        sub.add_argument("--temperature", type=float, default=0.0, help="default: 0, the likeliest token each time")
        sub.add_argument("--seed", type=int, default=0, help="of the drawn tokens; default: 0")
        sub.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")


def _keys(verb: str) -> list[str]:
    """Of the config that a verb reads."""
    from shear_tron.explain import FILES, keys

    return [key.name for key in keys(pkgutil.resolve_name(FILES[verb if verb in FILES else "train"]))]


def _version() -> str:
    try:
        return version("shear-tron")
    except PackageNotFoundError:
        return "(not installed)"
