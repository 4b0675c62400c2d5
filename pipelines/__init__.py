"""The stages of the pipeline on Ray, and what they share. Import the modules by name; nothing is loaded here."""

__version__ = "0.1.0"
