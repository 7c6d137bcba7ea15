"""The user script that every training rank runs: ``python deepy.py train.py configs/metarl.yml``."""

from neox_rl.step.main import leave, main

if __name__ == "__main__":
    leave(main())
