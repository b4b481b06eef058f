"""Subcommands of `adamix`: each module has main(argv) -> exit status."""
