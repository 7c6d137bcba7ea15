"""The user script that every training rank runs: ``python deepy.py train.py configs/metarl.yml``."""

from neox_rl.step.main import main

if __name__ == "__main__":
    raise SystemExit(main())
