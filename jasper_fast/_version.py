"""The version, where modules can import it without the package."""

__version__ = "0.1.0"
