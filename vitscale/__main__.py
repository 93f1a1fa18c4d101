"""`python -m vitscale`: what launchers start."""

from vitscale.cli import main

if __name__ == "__main__":
    main()
