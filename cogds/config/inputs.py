"""The files and folders that a run config names as inputs."""

from cogds.config.schema import DataConfig, RunConfig, SetConfig


def data_paths(cfg: RunConfig) -> dict[str, str]:
    """Paths of the datasets, by config key."""
    sets: list[tuple[str, DataConfig | SetConfig]] = [(f"data.sets[{n}]", each) for n, each in enumerate(cfg.data.sets)]
    paths: dict[str, str | None] = {}
    for section, data in sets or [("data", cfg.data)]:
        paths |= {f"{section}.path": data.path, f"{section}.root": data.root}
    paths["eval.path"] = cfg.eval.path
    return {key: path for key, path in paths.items() if path is not None}


def prompt_images(cfg: RunConfig) -> dict[str, str]:
    """Images of the prompts that training makes videos of, by config key."""
    prompts = cfg.sample.prompts if cfg.sample.every is not None else ()
    return {f"sample.prompts[{index}].image": prompt.image for index, prompt in enumerate(prompts)}
