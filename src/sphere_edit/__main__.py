"""``python -m sphere_edit`` is the command ``sphere-edit``."""

from sphere_edit.cli import main

if __name__ == "__main__":
    main()
