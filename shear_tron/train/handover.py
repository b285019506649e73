"""A nanotron checkpoint with what its main branch needs to go on at once: tokenizer, the run's next samples, a YAML."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import yaml
from torch import Tensor

from shear_tron.architecture import Architecture
from shear_tron.checkpoint import huggingface
from shear_tron.checkpoint.atomic import atomic
from shear_tron.checkpoint.model_folder import Form, write_model
from shear_tron.checkpoint.nanotron_config import MODEL, training
from shear_tron.checkpoint.safetensors_stream import read_json
from shear_tron.data.manifest import Manifest
from shear_tron.data.sampler import Sampler
from shear_tron.train import saved
from shear_tron.train.run_folder import RunFolder

SAMPLES = Path("s3", "samples")  # nanotron asserts that the path of its data contains s3
AT_ONCE = 1024  # samples in memory


def require_samples(run: RunFolder, architecture: Architecture, form: Form, samples: int) -> None:
    """Raise ValueError where nanotron would not read the samples, or would read them as something else."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ValueError("handing samples over needs transformers; pip install 'shear-tron[transformers]'") from None

    if form.format != "nanotron" or form.flavour != "main":
        raise ValueError(f"samples={samples}: only nanotron's main branch reads token shards; use --to nanotron")
    if samples % run.config.train.batch:
        raise ValueError(
            f"samples={samples} are not whole steps; use a multiple of train.batch={run.config.train.batch}"
        )
    if run.config.data.document_masking:
        raise ValueError(
            "samples: the run masks documents and nanotron's reader does not; leave --samples out and prepare "
            "nanotron's data for it"
        )
    found = len(
        AutoTokenizer.from_pretrained(run.tokenizer, local_files_only=True, trust_remote_code=False).get_vocab()
    )
    if found != architecture.shape.vocab:
        raise ValueError(
            f"samples: nanotron wants vocab={architecture.shape.vocab} to be the tokenizer's {found} entries; leave "
            "--samples out and write its config by hand"
        )


def hand_over(
    run: RunFolder,
    output: Path,
    architecture: Architecture,
    tensors: Iterable[tuple[str, Tensor]],
    form: Form,
    samples: int,
) -> str:
    """Write ``output`` whole or not at all: a checkpoint, ``tokenizer``, ``s3/samples`` and ``config.yaml``.

    The samples are the very next ones that `shear-tron train` would draw after the checkpoint, in its order and under
    its mixture as it stands there. config.yaml names ``output`` by its absolute path. Returns a sentence.
    """
    config, output = run.config, output.resolve()
    with atomic(output) as partial:
        said = write_model(partial, architecture, tensors, form, run.tokenizer)
        _copy_tokenizer(run.tokenizer, partial / "tokenizer")
        _write_samples(partial / SAMPLES, output / "tokenizer", run, samples)
        yaml_file = training(
            output,
            read_json(partial / MODEL),
            samples=output / SAMPLES,
            sequence=config.data.sequence,
            steps=samples // config.train.batch,
            micro_batch=config.train.micro_batch,
            accumulate=config.train.batch // config.train.micro_batch,
            seed=config.train.seed,
            optimizer=config.optimizer.model_dump(),
        )
        (partial / "config.yaml").write_text(yaml.safe_dump(yaml_file, sort_keys=False))
    return f"{said}; {samples} samples; torchrun run_train.py --config-file {output / 'config.yaml'}"


def _copy_tokenizer(source: Path, folder: Path) -> None:
    folder.mkdir()
    for name in (*huggingface.TOKENIZER_FILES, "config.json"):  # AutoTokenizer may ask the config for its class
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def _write_samples(folder: Path, tokenizer: Path, run: RunFolder, samples: int) -> None:
    """datatrove's format: ids, ends of documents (here: of samples), and the tokenizer's place."""
    manifest = Manifest.read(str(run.data))
    progress = saved.progress(run.checkpoint)
    weights: dict[str, float] = progress.state["mixture"]["weights"]
    sampler = Sampler(manifest, tuple(weights), run.config.data.sequence, run.config.train.seed)
    sampler.restore(progress.state["sampler"])
    folder.mkdir(parents=True)
    length = run.config.data.sequence + 1
    with open(folder / "00000.ds", "wb") as file:
        for first in range(0, samples, AT_ONCE):
            drawn = sampler.draw(min(AT_ONCE, samples - first), list(weights.values()))
            file.write(sampler.read(drawn).numpy().astype(f"<u{manifest.token_bytes}").tobytes())
    ends = np.arange(1, samples + 1, dtype="<u8") * length
    (folder / "00000.ds.index").write_bytes(ends.tobytes())
    (folder / "00000.ds.metadata").write_text(f"{tokenizer}|{manifest.token_bytes}\n{samples * length}\n")
