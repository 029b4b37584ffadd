"""Train: python train.py --config conf/mini/supervised_street.yaml [--config OVERLAY] [--model.lr 1e-4]"""

import signal
import sys

from config_files import check_configs, set_environment, short_errors


def main(args: list[str] | None = None) -> None:
    """Train from the words of a command line; a mistake in them ends with exit code 2."""
    args = sys.argv[1:] if args is None else args
    set_environment()
    with short_errors():
        check_configs(args)  # a mistyped file name should not cost the seconds that importing torch takes
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])  # waits until train listens
        from cli import train

        train(args)


if __name__ == "__main__":
    main()
