"""``python -m lightning_qat`` is the same as the console script ``lightning-qat``."""

from lightning_qat.recipes._cli import main

if __name__ == "__main__":
    raise SystemExit(main())
