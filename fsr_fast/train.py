"""Train from image-level labels: `fsr-fast train [--config F.yaml] [--section.key value]`.

On several GPUs: `torchrun --nproc-per-node N -m fsr_fast.train …`.
"""

from collections.abc import Sequence

from fsr_fast.cli import run_command
from fsr_fast.config import ModelConfig, dump_config, load_config


def main(arguments: Sequence[str]) -> None:
    """Train as the arguments say."""
    config, print_only = load_config(arguments)
    if print_only:
        print(f"{dump_config(config)}# start weights: {_start_weights(config.model)}")
        return
    # Imported late, so that mistakes do not load torch.
    from fsr_fast.runtime.distributed import start_process, stop_process
    from fsr_fast.trainer import Trainer

    process = start_process(config.run.device, config.run.timeout)
    try:
        trainer = Trainer(config, process)
        try:
            trainer.run()
        finally:
            trainer.close()
    finally:
        stop_process()


def _start_weights(config: ModelConfig) -> str:
    if config.initial is None and config.pretrained == "none":
        return "none"
    from fsr_fast.models.pretrained import describe_start

    return str(describe_start(config) or "none")


if __name__ == "__main__":
    run_command(main)
