"""Prints one reading of this node's GPUs as one JSON document: the child process of ``Reader``."""

from placement.nvml.reading import read

if __name__ == "__main__":
    print(read().model_dump_json())
