"""``python -m neox_rl.search``: a program of the top floor under the name that users look for; see ``neox_rl.run.search_cli``."""

from neox_rl.run.search_cli import main

if __name__ == "__main__":
    raise SystemExit(main())
