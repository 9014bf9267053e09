"""From a stated business problem to a production AI model that can be defended, in notebooks."""

__version__ = "0.1.0"
