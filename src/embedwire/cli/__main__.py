"""``python -m embedwire.cli``: how one command starts another as a child."""

from embedwire.cli import main

if __name__ == "__main__":
    main()
