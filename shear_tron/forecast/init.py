"""`shear-tron init`: first configurations of both stages for a model, a size and some text, to be read and changed."""

import argparse
import re
from contextlib import suppress
from pathlib import Path

from shear_tron.checkpoint.model_folder import read_architecture
from shear_tron.config import ConfigError
from shear_tron.data.documents import DAMAGED, Fields, Piece, format_of, read
from shear_tron.data.manifest import FILE, Manifest
from shear_tron.forecast.command import number
from shear_tron.forecast.target import propose
from shear_tron.params import count
from shear_tron.train.schedule import learning_rate_factor
from shear_tron.train.show import said

PAPER_BATCH, PAPER_STEPS = 32 * 4096, 3200  # tokens; Table 7
PAPER_BATCH_AFTER, PAPER_TOKENS_AFTER = 256 * 4096, 125  # tokens; times those of pruning
TRAVEL = 37  # what logits of gates must be able to move: four times from open to closed

PREPARE = """\
# Your text as tokens, with the tokenizer of {model}: shear-tron prepare {file}
output: {output}
tokenizer: {model}
# separator: <|endoftext|>   # what closes a document: what the model was trained with; default: the tokenizer's eos
held_out: 0.02               # share of documents for evaluation
deduplicate: domain          # exact copies within a domain count once
domains:                     # one for each kind of text; their mixture follows their losses
{domains}
"""

# What the files of both stages end with.
TRAINING = """
train:
  steps: {steps}             # {tokens} tokens; the paper {paper}
  batch: {batch}             # sequences of a step, all ranks' together
  micro_batch: 1             # sequences a rank runs at a time; larger is faster while memory lasts
  activation_checkpointing: none   # selective or full where memory is short

optimizer:
  learning_rate: 1e-4        # the paper's
  warmup_steps: {rate_warmup}

checkpoint:
  every: {every}             # steps; a stopped run goes on from the newest

parallel:
  tp: {tp}
"""

PRUNE = """\
# {model}, {source:,} parameters, sheared to {parameters:,}. Every key: shear-tron config, or docs/config.md.
# Check it:  shear-tron show {file}
# Plan it:   shear-tron plan {file} --gpus 8 --gpu h100
# Run it:    shear-tron train {file} --nproc 2
run: {run}
model: {model}

data:
  folder: {data}
  sequence: {sequence}       # tokens of a training window, at most {context}
  reference_losses: source   # aim for the source's own loss in every domain, measured before the first step
  update_every: {update}     # steps between updates of the mixture
  evaluate_windows: {windows}

prune:
  target: {{{target}}}
  warmup_steps: {warmup}     # the sparsity grows to the target over these
  learning_rate: {gates:.2g} # of the gates: 1.0 in the paper, more where there are few steps
"""

CONTINUE = """\
# Stage 2: the model that {prune} leaves, trained on. First: shear-tron extract {pruned} {small}
# Check it:  shear-tron show {file} --after {prune}
# Plan both: shear-tron plan {prune} {file} --gpus 8 --gpu h100
# Run it:    shear-tron train {file} --nproc 2
run: {pruned}-continued
model: {small}

data:
  folder: {data}
  sequence: {sequence}
  weights: {pruned} # go on from the mixture that pruning ended with
  after: {pruned} # and with the samples after its last
  reference_losses: {pruned}/reference_losses.json # the source's own losses
  update_every: {update}     # steps between updates of the mixture
  evaluate_windows: {windows}
"""
SMALL = "models/small"  # as a pruning run's last line has it


def init(arguments: argparse.Namespace) -> str:
    """Write ``prune.yaml`` and ``continue.yaml`` (``prepare.yaml`` where the data is text). Returns what to do next.

    Raises ValueError for a model that cannot be sheared so, data that is not there, or files that are.
    """
    model, folder = read_architecture(arguments.model), Path(arguments.output)
    files = {name: folder / f"{name}.yaml" for name in ("prepare", "prune", "continue")}
    data, written = Path(arguments.data), {}
    if not data.is_dir():
        raise ConfigError(f"--data={data} is not a folder; give one made by `shear-tron prepare`, or one of text")
    prepared = (data / FILE).exists()
    tokens, held_out = number(arguments.tokens), None
    target = propose(model, number(arguments.target), arguments.tp)[0]
    if prepared:
        manifest = Manifest.read(str(data), tokenizer=arguments.model, vocab=model.shape.vocab)
        held_out = min(domain.tokens("held_out") for domain in manifest.domains.values())
    else:
        output = folder / "data"
        written[files["prepare"]] = PREPARE.format(
            model=arguments.model, file=files["prepare"], output=output, domains=_domains(data)
        )
        data = output
    sequence = min(model.context, 4096 if tokens >= 1e8 else 512 if tokens >= 1e6 else 128)
    while held_out is not None and held_out <= 4 * sequence and sequence > 64:  # a few windows must be held out
        sequence //= 2
    batch, steps = _spent(tokens, sequence, PAPER_BATCH)
    steps = min(PAPER_STEPS, steps)
    travel = sum(learning_rate_factor(step, steps, steps // 10, 0.1) for step in range(steps))
    given = {n: getattr(target, n) for n in ("hidden", "layers", "heads", "kv_heads", "ffn")}
    run = f"runs/{Path(arguments.model).name}-to-{arguments.target}"
    both = {"data": data, "sequence": sequence, "windows": 32 if tokens >= 1e8 else 8, "tp": arguments.tp}
    written[files["prune"]] = (PRUNE + TRAINING).format(
        **both,
        paper="prunes with 0.4 billion",
        model=arguments.model,
        source=count(model),
        parameters=count(model.resized(target)),
        file=files["prune"],
        run=run,
        context=model.context,
        update=max(5, steps // 64),
        target=", ".join(f"{n}: {size}" for n, size in given.items() if size != getattr(model.shape, n)),
        warmup=max(1, steps // 5),
        gates=max(1.0, TRAVEL / travel),
        steps=steps,
        tokens=said(steps * batch * sequence),
        batch=batch,
        rate_warmup=steps // 10,
        every=max(10, steps // 8),
    )
    after = number(arguments.continue_tokens) if arguments.continue_tokens else PAPER_TOKENS_AFTER * tokens
    batch, steps = _spent(after, sequence, PAPER_BATCH_AFTER)
    written[files["continue"]] = (CONTINUE + TRAINING).format(
        **both,
        paper="continues with 50 billion",
        prune=files["prune"],
        file=files["continue"],
        pruned=run,
        small=SMALL,
        update=max(5, steps // 128),
        steps=steps,
        tokens=said(steps * batch * sequence),
        batch=batch,
        rate_warmup=max(1, round(0.03 * steps)),
        every=max(10, steps // 16),
    )
    if there := [str(file) for file in written if file.exists()]:
        raise ConfigError(
            f"{', '.join(there)} exist{'s' * (len(there) == 1)}; give another --output, or delete what is there"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in written.items():
        file.write_text(_aligned(content))
    first = [] if prepared else [f"shear-tron prepare {files['prepare']}"]
    commands = [
        *first,
        f"shear-tron show {files['prune']}",
        f"shear-tron train {files['prune']} --nproc 2",
        f"shear-tron extract {run} {SMALL}",
        f"shear-tron train {files['continue']} --nproc 2",
    ]
    return f"wrote {', '.join(map(str, written))}; next:\n" + "\n".join(f"  {line}" for line in commands)


def _spent(tokens: float, sequence: int, most: int) -> tuple[int, int]:
    """(sequences of a batch, steps): about ``tokens`` in some hundred steps or more, of ``most`` tokens or fewer."""
    batch = max(4, int(min(most, tokens / 400) / sequence) // 4 * 4)
    return batch, max(40, round(tokens / batch / sequence))


def _aligned(text: str) -> str:
    """Comments beside keys, below each other whatever the numbers are."""
    return re.sub(r"^([^#\n]*[^#\s]) +# ", lambda key: f"{key[1]:<34} # ", text, flags=re.M)


def _domains(folder: Path) -> str:
    """A domain for each subfolder or file of text."""
    names: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        readable = path.is_dir() and any(format_of(str(inner)) for inner in path.rglob("*"))
        if not path.name.startswith((".", "_")) and (readable or (path.is_file() and format_of(path.name))):
            names.setdefault(path.name.split(".")[0], path)
    if not names:
        raise ConfigError(f"--data={folder} holds no domains.json and no text; it needs jsonl, parquet or txt files")
    listed = [_domain(name, path) for name, path in names.items()]
    if all(line.lstrip().startswith("#") for line in listed):
        raise ConfigError(
            f"--data={folder}: no file there begins with a line of JSON; give jsonl, parquet or txt files"
        )
    return "\n".join(listed)


def _domain(name: str, path: Path) -> str:
    """A line of ``domains``; a comment for JSON that is not JSON lines, such as a list of sources beside the text."""
    line = f"{name}: {{path: {path}}}"
    if path.is_file() and format_of(path.name) == "jsonl":
        with suppress(ValueError):  # another field is the text: prepare tells which there are
            if next(read(Piece(str(path)), "jsonl", Fields("text")), "") is DAMAGED:
                return f"  # {line} # left out: its first line is no record of JSON"
    return f"  {line}"
