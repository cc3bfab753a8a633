"""Settings of how a run is driven."""

from pydantic import BaseModel, ConfigDict, Field, field_validator

from vestige.training import compute
from vestige.training.tracking.trackers import check_names


class TrainerConfig(BaseModel):
    """How a run is driven; apart from budgets nothing here is meant to change what is learned.

    Attributes:
        device: "auto" takes a GPU if there is one, else "cpu", "cuda" or "cuda:1".
        log_every: optimizer steps between two rows of the metrics file; higher is faster on a GPU.
        evaluate_every: rounds between two evaluations; the last round is always evaluated.
        checkpoint_every: rounds between two checkpoints; the last round always gets one.
        minutes: the run stops at the end of the round in which this much time has passed.
        threads: of torch on the CPU; None leaves torch's choice. Networks of a few thousand weights
            are as fast on one thread, and many times faster where others use the machine, too.
        max_steps: the run stops at the end of the round in which this many steps were done.
        precision: of what the method computes. "bf16" runs its passes under autocast in bfloat16;
            weights, optimizers, losses, checkpoints and evaluation stay in float32. Measured on a
            CPU with bfloat16 instructions, WRN-40-2 to WRN-16-1, batch 64, channels-last: single
            passes take 0.37 to 0.69 of the time and DFAD as a whole 0.55; without such instructions
            it may be slower. Weights differ from those of "fp32" by more than rounding.
        compile: whether teacher, student and generator go through torch.compile. Costs about a
            minute per network at the start of a run and of each resumed one; calls that look inside
            a network by hooks, evaluate it at other weights, or are the trainer's own stay
            uncompiled. Measured on a CPU, channels-last: WRN-16-1 training 0.80 of the time, DFAD's
            generator 0.99, WRN-40-2 forward with folded BatchNorm 1.03, so for long runs only.
        channels_last: memory format of networks with 2-D convolutions. "auto" takes channels-last
            on a CPU for networks of 100,000 weights or more. Measured there, batch 64, 32x32:
            WRN-40-2 forward 0.89 of the time, WRN-16-1 training 0.81, ResNet-18 training 0.83,
            DFAD's generator 0.66, DFAD as a whole 0.81; for 24,000 weights nothing is gained. The
            student is handed back in the format in which it came.
        fold_teacher: whether BatchNorm of a frozen teacher is folded into the weights in front of
            it, for calls in which nobody looks inside. "auto" does so from 100,000 weights on.
            Measured on a CPU: WRN-40-2 forward 0.86 of the time, with channels-last 0.62 (0.84 with
            the backward to its input); ResNet-18 0.97 and 0.78. Holds a second copy of the weights.
        track: trackers that are told what the metrics file is told: "tensorboard", "trackio",
            "wandb", "mlflow". Each needs its package; none needs a network.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str = "auto"
    threads: int | None = Field(None, ge=1, le=1024)
    log_every: int = Field(10, ge=1)
    evaluate_every: int = Field(1, ge=1)
    checkpoint_every: int = Field(1, ge=1)
    minutes: float | None = Field(None, gt=0, allow_inf_nan=False)
    max_steps: int | None = Field(None, ge=1)
    precision: compute.Precision = "fp32"
    compile: bool = False
    channels_last: compute.Switch = "auto"
    fold_teacher: compute.Switch = "auto"
    track: tuple[str, ...] = ()

    @field_validator("track")
    @classmethod
    def _known_trackers(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        check_names(names)
        return names
