"""Start a run: ``python deepy.py train.py configs/metarl.yml``. ``--dry-run`` shows what it would start."""

from neox_rl.run.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
