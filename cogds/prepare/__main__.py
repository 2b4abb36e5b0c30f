"""`python -m cogds.prepare` is not a command."""

from cogds.errors import refuse_to_run

if __name__ == "__main__":
    refuse_to_run("cogds.prepare", "prepare")
