"""The configuration of a run: its sections, and those of training itself."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from shear_tron.architecture import Architecture
from shear_tron.config import Section
from shear_tron.data.config import DataConfig
from shear_tron.parallel.config import ParallelConfig
from shear_tron.pruning.config import PruneConfig


class TrainConfig(Section):
    """How long and in what portions. ``batch`` and ``micro_batch`` count sequences; a batch is all ranks' together."""

    steps: int = Field(ge=0)  # updates of the weights; 0: only with `prune`, to choose units and be done
    batch: PositiveInt  # sequences of a step, all ranks' together
    micro_batch: PositiveInt = 1  # sequences that a rank runs at a time; the rest of its share is accumulated
    seed: int = Field(default=0, ge=0)  # of masks and of the order of samples
    # what backward computes again instead of keeping it: nothing, all but products and attention, or whole layers
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    # torch.compile of every layer: not with prune, whose sizes change by the step, nor with selective checkpointing
    compile: bool = False
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # compute; auto: bfloat16 on CUDA, float32 on the CPU
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where there is one
    log_every: PositiveInt = 1  # steps between lines of metrics.jsonl
    # a step whose loss or gradient is not finite changes nothing; after so many of them in a row the run stops
    max_skipped: PositiveInt = 3
    # where a step's loss is so many nats above the mean of the 32 before: go back to the newest checkpoint, and on with
    # the samples after the step's (docs/reliability.md); none: never
    rewind_above: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.batch % self.micro_batch:
            raise ValueError(f"batch={self.batch} is not a multiple of micro_batch={self.micro_batch}")
        return self


class ScheduleConfig(Section):
    """A schedule of which a run is a part: pruning and continued pre-training under one warm-up and one cosine."""

    steps: PositiveInt  # of all its runs together
    before: int = Field(default=0, ge=0)  # steps of it that earlier runs have made


Memory = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """AdamW and its rate: linear warm-up, then a cosine. The defaults are the paper's (section 3.1)."""

    learning_rate: float = Field(default=1e-4, gt=0)  # the peak, after the warm-up
    warmup_steps: int = Field(default=0, ge=0)  # the rate grows linearly over them
    min_learning_rate: float = Field(default=0.1, ge=0, le=1)  # as a share of learning_rate, at the end of the cosine
    weight_decay: float = Field(default=0.0, ge=0)  # decoupled, on every weight
    betas: tuple[Memory, Memory] = (0.9, 0.95)  # memory of the two moments
    eps: float = Field(default=1e-8, gt=0)  # added to the root of the second moment
    clip: float = Field(default=1.0, gt=0)  # global gradient norm
    schedule: ScheduleConfig | None = None  # none: the schedule is this run's alone, as in the paper
    moments: str | None = None  # a pruning run: go on with its Adam moments, cut as the model was; none: from zero


class DistillConfig(Section):
    """Learning from a teacher, in pruning and in plain training: run forward in the same layout at every step, or from
    a cache of samples of it (docs/distillation.md)."""

    teacher: str | None = None  # a model with the same tokenizer, such as the source
    cache: str | None = None  # its samples, filled by `shear-tron cache-teacher`; training then needs no teacher
    samples: PositiveInt = 16  # in the cache, per token
    alpha: float = Field(default=0.5, gt=0, le=1)  # share of the divergence; the rest is the next-token loss
    temperature: float = Field(default=1.0, gt=0)  # of both models in the divergence
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of the teacher; auto: that of train.precision

    @model_validator(mode="after")
    def _has_teacher(self) -> Self:
        if self.teacher is None and self.cache is None:
            raise ValueError("has neither teacher nor cache; give one of them, or leave the section out")
        return self


class CheckpointConfig(Section):
    """When to save, and how much to keep."""

    every: int = Field(default=0, ge=0)  # steps; 0: by the clock only
    minutes: float = Field(default=30, ge=0)  # since the last one; 0: by steps only
    keep: PositiveInt = 2  # the newest that stay on disk
    keep_every: int = Field(default=0, ge=0)  # and those of steps that are multiples of it; 0: none
    background: bool = False  # train on while writing, from a copy in the host's memory
    # a URL of fsspec (s3://bucket/run) where every checkpoint goes too; a run folder without one goes on from there
    upload: str | None = None


class LogConfig(Section):
    """The steps' numbers, and where else they go; ``metrics.jsonl`` in the run's folder always has them."""

    tensorboard: bool = False  # event files in the run's folder; needs shear-tron[tensorboard]
    wandb: str | None = None  # project at Weights & Biases; needs shear-tron[wandb]; offline with WANDB_MODE=offline
    # of one rank's device, dense 16-bit, as its data sheet has it: what MFU is a share of; none: of H100, H200, A100
    peak_tflops: float | None = Field(default=None, gt=0)


class InitConfig(Section):
    """Where a new run's weights come from: the newest checkpoint of another run of ``model``."""

    run: str  # folder of that run, in any layout, pruning or not; masks are not taken over
    optimizer: bool = False  # with its Adam moments


class RunConfig(Section):
    """One run of ``shear-tron train``: pruning if ``prune`` is there, (continued) pre-training if not."""

    run: str  # folder of this run: its resolved config, log and checkpoints
    model: str  # a Hugging Face folder, a nanotron checkpoint, or a Hub id (org/name, hf://org/name@revision)
    tokenizer: str | None = None  # a folder or Hub id; none: the model's own, which a nanotron checkpoint has not
    init_from: InitConfig | None = None  # none: the weights of model
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    prune: PruneConfig | None = None
    distill: DistillConfig | None = None
    parallel: ParallelConfig = ParallelConfig()

    def source(self, architecture: Architecture) -> Architecture:
        """What this run trains, started from a model of ``architecture``: the same, or untied to be rotated."""
        from shear_tron.pruning.rotate import untied  # needs torch, which `shear-tron config` does without

        if self.prune is None or not self.prune.rotate:
            return architecture
        return untied(architecture)
