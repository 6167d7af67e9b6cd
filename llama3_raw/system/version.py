"""The version of this package, which pyproject.toml and a checkout that is not installed both take from here."""

VERSION = "0.2.0"
